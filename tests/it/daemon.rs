//! The whole daemon against the simulated services, with restarts and crashes in between.

use std::time::Duration;

use bigchat_sync::sim::bigchat::{Log, Mode, Options};
use bigchat_sync::sim::our_api;
use bigchat_sync::sim::{self, Sim};
use serde_json::{Value, json};

use crate::harness::{Bench, until};

pub(crate) async fn sim(bigchat: Options, our_api: our_api::Options) -> (Sim, Bench) {
    let options = sim::Options {
        bigchat,
        our_api,
        ..sim::Options::default()
    };
    let sim = Sim::start(options).await.expect("the services");
    let bench = Bench::new(&sim.bigchat_url(), &sim.our_api_url());
    (sim, bench)
}

/// The services, a BigChat of which everything is scripted, and a database.
pub(crate) async fn scripted(our_api: our_api::Options) -> (Sim, Bench) {
    let quiet = Options {
        quiet: true,
        ..Options::default()
    };
    sim(quiet, our_api).await
}

/// BigChat's time now, in Unix seconds.
pub(crate) fn seconds(sim: &Sim) -> i64 {
    sim.bigchat.clock.now().timestamp()
}

pub(crate) fn message(conversation: i64, at: i64, text: &str) -> Value {
    json!({"conversation_id": conversation, "event_name": "MESSAGE", "event_at": at, "data": {"message": text}})
}

pub(crate) fn end(conversation: i64, at: i64) -> Value {
    json!({"conversation_id": conversation, "event_name": "END", "event_at": at, "data": null})
}

pub(crate) fn transfer(conversation: i64, at: i64, to: i64) -> Value {
    let data = json!({"old_advisor_id": 1, "new_advisor_id": to});
    json!({"conversation_id": conversation, "event_name": "TRANSFER", "event_at": at, "data": data})
}

/// Waits until what BigChat told stands in OurAPI, and nothing else.
pub(crate) async fn agrees(sim: &Sim, bench: &Bench) {
    let mut report = String::new();
    let agreed = tokio::time::timeout(
        Duration::from_secs(20),
        until("no difference", async || {
            let compared = sim.compare();
            report = compared.to_string();
            compared.is_clean() && compared.chats() > 0
        }),
    );
    if agreed.await.is_err() {
        panic!("{report}\nfailed: {:#?}", bench.failed());
    }
}

/// Waits until BigChat has told so many more events than now.
pub(crate) async fn more_told(sim: &Sim, more: usize) {
    let told = sim.bigchat.told().len();
    until("more events", async || {
        sim.bigchat.told().len() >= told + more
    })
    .await;
}

fn log(seed: u64) -> Options {
    Options {
        seed,
        mode: Mode::Log(Log {
            events_per_second: 60.0,
            page_size: 7,
            ..Log::default()
        }),
        ..Options::default()
    }
}

#[tokio::test]
async fn what_happened_stands_in_our_api_across_restarts() {
    let (sim, bench) = sim(
        Options {
            seed: 7,
            ..Options::default()
        },
        our_api::Options::default(),
    )
    .await;
    for _ in 0..5 {
        let daemon = bench.start();
        more_told(&sim, 40).await;
        daemon.stop().await;
    }
    sim.bigchat.set_quiet(true);
    let daemon = bench.start();
    agrees(&sim, &bench).await;
    daemon.stop().await;
    assert_eq!(
        sim.our_api.traffic.max_in_flight(),
        1,
        "one request at a time"
    );
    assert_eq!(sim.compare().fallbacks(), 0);
}

#[tokio::test]
async fn a_stable_log_with_late_events_and_small_pages_is_told_exactly() {
    let (sim, bench) = sim(log(3), our_api::Options::default()).await;
    for _ in 0..4 {
        let daemon = bench.start();
        more_told(&sim, 60).await;
        daemon.stop().await;
    }
    sim.bigchat.set_quiet(true);
    let daemon = bench.start();
    agrees(&sim, &bench).await;
    daemon.stop().await;
}

#[tokio::test]
async fn several_at_once_where_our_api_takes_them() {
    let slow = our_api::Options {
        latency: Duration::from_millis(20),
        ..our_api::Options::good()
    };
    let (sim, bench) = sim(log(4), slow).await;
    let bench = bench.set("--our-api-concurrency", "8");
    let daemon = bench.start();
    more_told(&sim, 200).await;
    sim.bigchat.set_quiet(true);
    agrees(&sim, &bench).await;
    daemon.stop().await;
    let at_once = sim.our_api.traffic.max_in_flight();
    assert!((2..=8).contains(&at_once), "{at_once} at once");
}

#[tokio::test]
async fn a_backfill_reads_the_past_in_windows() {
    let options = Options {
        seed: 5,
        mode: Mode::Log(Log {
            events_per_second: 0.5,
            page_size: 7,
            history: Duration::from_secs(600),
            ..Log::default()
        }),
        ..Options::default()
    };
    let (sim, bench) = sim(options, our_api::Options::default()).await;
    let since = sim.bigchat.clock.now() - Duration::from_secs(700);
    let bench = bench
        .set("--since", &since.to_rfc3339())
        .set("--max-window", "60s");
    bench.once().await;
    sim.bigchat.set_quiet(true);
    assert!(sim.bigchat.told().len() > 100);
    until("no difference", async || {
        // What happened in the second the window ended in is told by the next.
        bench.once().await;
        sim.compare().is_clean()
    })
    .await;
}

#[tokio::test]
async fn crashes_at_any_moment_lose_and_double_nothing() {
    let (sim, bench) = sim(log(6), our_api::Options::default()).await;
    // After each crash OurAPI is left alone for so long.
    let bench = bench.set("--request-timeout", "200ms");
    for crash in 0..12_u8 {
        let asked = sim.our_api.traffic.total();
        let daemon = bench.start();
        more_told(&sim, 10 + usize::from(crash)).await;
        // What is told must be delivered in the end.
        sim.bigchat.set_quiet(true);
        until("requests", async || {
            sim.our_api.traffic.total() > asked + u64::from(crash)
        })
        .await;
        daemon.crash(&bench).await;
        sim.bigchat.set_quiet(false);
    }
    sim.bigchat.set_quiet(true);
    let daemon = bench.start();
    agrees(&sim, &bench).await;
    daemon.stop().await;
}

#[tokio::test]
async fn steady_state_costs_one_request_per_event() {
    let (sim, bench) = sim(
        Options {
            seed: 9,
            awkward: false,
            active: 10,
            ..Options::default()
        },
        our_api::Options::default(),
    )
    .await;
    let daemon = bench.start();
    more_told(&sim, 300).await;
    sim.bigchat.set_quiet(true);
    agrees(&sim, &bench).await;
    daemon.stop().await;
    let (requests, events) = (sim.our_api.traffic.total(), bench.events("delivered"));
    // Each of the ten agents costs one request to look it up and one to create it.
    let agents = 20;
    assert!(
        requests <= u64::try_from(events).expect("few") + agents + 10,
        "{requests} requests for {events} events"
    );
}

#[tokio::test]
async fn two_transfers_of_one_second_are_two_however_often_a_log_tells_them() {
    let quiet = Options {
        quiet: true,
        mode: Mode::Log(Log::default()),
        ..Options::default()
    };
    let (sim, bench) = sim(quiet, our_api::Options::default()).await;
    let at = sim.bigchat.clock.now().timestamp() - 1;
    sim.bigchat.open(2, at, 1);
    for to in [2, 3] {
        let data = json!({ "old_advisor_id": 1, "new_advisor_id": to });
        sim.bigchat.push(2, "TRANSFER", at, data);
    }
    let daemon = bench.start();
    agrees(&sim, &bench).await;
    let polls = sim.bigchat.polls();
    until("the same told again", async || {
        sim.bigchat.polls() > polls + 5
    })
    .await;
    daemon.stop().await;
    assert_eq!(bench.value::<i64>("SELECT count(*) FROM events"), 2);
}
