//! What either side does to us: BigChat restarts and gives its ids to others, OurAPI loses its data, goes away, and
//! comes back.

use std::time::Duration;

use bigchat_sync::sim::Sim;
use bigchat_sync::sim::bigchat::{NextPage, Options};
use bigchat_sync::sim::faults::{Fault, Faults, RetryAfter, When};
use bigchat_sync::sim::our_api;
use serde_json::json;

use crate::daemon::{agrees, message, more_told, scripted, seconds, sim};
use crate::fakes::{self, Scene, status};
use crate::harness::until;
use crate::process::Process;

fn quiet() -> Options {
    Options {
        quiet: true,
        ..Options::default()
    }
}

#[tokio::test]
async fn a_restart_of_bigchat_mixes_nothing() {
    let (sim, bench) = sim(
        Options {
            seed: 11,
            ..Options::default()
        },
        our_api::Options::default(),
    )
    .await;
    let daemon = bench.start();
    for _ in 0..3 {
        more_told(&sim, 40).await;
        sim.bigchat.restart_at_next_poll();
        let run = sim.bigchat.run();
        until("a restart", async || sim.bigchat.run() > run).await;
    }
    more_told(&sim, 40).await;
    sim.bigchat.set_quiet(true);
    agrees(&sim, &bench).await;
    daemon.stop().await;
    assert_eq!(bench.value::<i64>("SELECT max(id) FROM epochs"), 4);
}

#[tokio::test]
async fn a_restart_while_the_daemon_was_down_is_noticed_by_a_message_too() {
    let (sim, bench) = sim(quiet(), our_api::Options::default()).await;
    let now = sim.bigchat.clock.now().timestamp();
    sim.bigchat
        .push(1, "MESSAGE", now, json!({"message": "of before"}));
    bench.once().await;
    sim.bigchat.restart();
    let now = sim.bigchat.clock.now().timestamp();
    sim.bigchat
        .push(1, "MESSAGE", now, json!({"message": "of after"}));
    bench.once().await;
    let report = sim.compare();
    assert!(report.is_clean(), "{report}");
    assert_eq!(report.fallbacks(), 0);
    assert_eq!(sim.our_api.chats().len(), 2);
}

/// Lets so many questions for events pass, and has the next one wait until it is told to go on.
fn pause_after(faults: &Faults, passing: u32) {
    let as_ever = Fault::Hang(Duration::ZERO);
    faults.script("GET /events", When::Before, as_ever, passing);
    faults.script("GET /events", When::Before, Fault::Pause, 1);
}

#[tokio::test]
async fn a_restart_between_two_pages_of_a_poll_mixes_nothing() {
    let (sim, bench) = sim(quiet(), our_api::Options::default()).await;
    let daemon = bench.start();
    until("a poll", async || bench.cursor().is_some()).await;
    // The first page is told as ever; before the second one BigChat restarts.
    let faults = &sim.bigchat.faults;
    faults.hold(true);
    pause_after(faults, 1);
    let now = seconds(&sim);
    sim.bigchat.open(2, now - 100, 1);
    sim.bigchat.open(3, now - 100, 2);
    let of_before = vec![message(2, now, "of before"), message(3, now, "of before")];
    let next = NextPage::Usual;
    sim.bigchat.push_page(of_before, next);
    faults.hold(false);
    until("half a poll", async || faults.paused() == 1).await;
    sim.bigchat.restart();
    let now = seconds(&sim);
    // The ids of the new run are given out anew, so far up to 2.
    sim.bigchat.open(2, now, 1);
    let of_after = vec![message(1, now, "of after"), message(2, now, "of after")];
    sim.bigchat.push_page(of_after, NextPage::None);
    faults.go_on();
    agrees(&sim, &bench).await;
    assert_eq!(sim.our_api.chats().len(), 4);
    daemon.stop().await;
}

/// Tells of a conversation on two pages, the second of which begins as the first one ended: they have shifted. BigChat
/// restarts before the next poll.
async fn restart_among_shifted_pages(sim: &Sim, conversation: i64) {
    let faults = &sim.bigchat.faults;
    faults.hold(true);
    pause_after(faults, 2);
    let now = seconds(sim);
    let say = |text| message(conversation, now, text);
    sim.bigchat
        .push_page(vec![say("one"), say("two")], NextPage::Usual);
    sim.bigchat
        .push_page(vec![say("two"), say("three")], NextPage::None);
    faults.hold(false);
    until("the third question", async || faults.paused() == 1).await;
    sim.bigchat.restart();
    faults.go_on();
}

#[tokio::test]
async fn pages_that_shift_before_a_restart_make_no_message_two() {
    let (sim, bench) = sim(quiet(), our_api::Options::default()).await;
    let daemon = bench.start();
    until("a poll", async || bench.cursor().is_some()).await;
    sim.bigchat.open(3, seconds(&sim) - 100, 2);
    restart_among_shifted_pages(&sim, 3).await;
    bench.until_events("delivered", 3).await;
    let held: Vec<_> = sim.our_api.held().messages.into_values().collect();
    let texts: Vec<_> = held.iter().flatten().map(|message| &message.text).collect();
    assert_eq!(texts, ["one", "two", "three"]);
    daemon.stop().await;
}

#[tokio::test]
async fn a_page_is_of_the_run_that_was_seen_after_it() {
    let (sim, bench) = sim(quiet(), our_api::Options::default()).await;
    let daemon = bench.start();
    until("a poll", async || bench.cursor().is_some()).await;
    sim.bigchat.restart();
    until("it is noticed", async || {
        bench.value::<i64>("SELECT max(id) FROM epochs") == 2
    })
    .await;
    // Of a conversation that each run has, and about when this one began: nothing on the page tells which it is.
    restart_among_shifted_pages(&sim, 1).await;
    bench.until_events("delivered", 3).await;
    until("it is noticed", async || {
        bench.value::<i64>("SELECT max(id) FROM epochs") == 3
    })
    .await;
    let of: i64 = bench.value(
        "SELECT min(c.epoch) * max(c.epoch) FROM events e JOIN conversations c ON c.id = e.conversation",
    );
    assert_eq!(of, 4, "all of them of the second run");
    daemon.stop().await;
}

#[tokio::test]
async fn what_our_api_loses_is_built_again() {
    let (sim, bench) = sim(
        Options {
            seed: 13,
            active: 8,
            ..Options::default()
        },
        our_api::Options::default(),
    )
    .await;
    let daemon = bench.start();
    more_told(&sim, 80).await;
    sim.our_api.wipe();
    more_told(&sim, 40).await;
    sim.our_api.wipe_agents();
    more_told(&sim, 40).await;
    sim.our_api.forget_chat("1");
    let now = sim.bigchat.clock.now().timestamp();
    let touched = json!({"message": "are you there?"});
    sim.bigchat.push(1, "MESSAGE", now, touched);
    more_told(&sim, 80).await;
    sim.bigchat.set_quiet(true);
    agrees(&sim, &bench).await;
    daemon.stop().await;
}

#[tokio::test]
async fn a_proxy_that_answers_404_to_everything_is_no_loss() {
    let (sim, bench) = sim(
        Options {
            seed: 14,
            ..Options::default()
        },
        our_api::Options::default(),
    )
    .await;
    let daemon = bench.start();
    more_told(&sim, 40).await;
    sim.our_api.faults.outage(Some(Fault::Status(404)));
    more_told(&sim, 40).await;
    sim.our_api.faults.outage(None);
    sim.bigchat.set_quiet(true);
    agrees(&sim, &bench).await;
    daemon.stop().await;
    assert_eq!(bench.value::<i64>("SELECT losses FROM control"), 0);
}

#[tokio::test]
async fn outages_spend_no_attempts_and_are_probed_one_at_a_time() {
    for (fault, what) in [
        (Fault::Drop, "connections dropped"),
        (Fault::Status(500), "500"),
        (Fault::Status(401), "401"),
        (Fault::Status(503), "503"),
        (Fault::Html, "HTML"),
    ] {
        let (sim, bench) = sim(
            Options {
                seed: 15,
                awkward: false,
                ..Options::default()
            },
            our_api::Options::default(),
        )
        .await;
        let bench = bench.set("--max-attempts", "1").set("--retry-max", "40ms");
        let daemon = bench.start();
        more_told(&sim, 30).await;
        sim.our_api.faults.outage(Some(fault));
        let before = sim.our_api.traffic.total();
        until("probes", async || sim.our_api.traffic.total() > before + 20).await;
        more_told(&sim, 30).await;
        sim.our_api.faults.outage(None);
        sim.bigchat.set_quiet(true);
        agrees(&sim, &bench).await;
        daemon.stop().await;
        assert_eq!(bench.events("failed"), 0, "{what}");
        assert_eq!(sim.our_api.traffic.max_in_flight(), 1, "{what}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_takes_no_memory_and_is_followed_by_no_storm() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let bench = bench.set("--retry-max", "1s");
    let now = seconds(&sim);
    sim.our_api.faults.outage(Some(Fault::Status(503)));
    let daemon = Process::start(&bench);
    let tell = |poll: i64, count: i64| {
        let event = |n: i64| {
            let text = format!("number {n} of {poll} {}", "x".repeat(10_000));
            message(10 + n, now - 5, &text)
        };
        sim.bigchat
            .push_page((0..count).map(event).collect(), NextPage::None);
    };
    (10..30).for_each(|id| sim.bigchat.open(id, now - 100, 1));
    tell(0, 20);
    bench.until_events("waiting", 20).await;
    let before = daemon.mebibytes("VmRSS");
    for poll in 1..=40 {
        tell(poll, 20);
    }
    bench.until_events("waiting", 41 * 20).await;
    let probes = sim.our_api.traffic.total();
    until("more probes", async || {
        sim.our_api.traffic.total() > probes + 3
    })
    .await;
    let grown = daemon.mebibytes("VmRSS").saturating_sub(before);
    assert!(grown < 8, "8 MB wait, and it has grown by {grown} MiB");
    assert_eq!(
        sim.our_api.traffic.max_in_flight(),
        0,
        "none was carried out"
    );
    assert_eq!(
        bench.value::<i64>("SELECT coalesce(max(counted), 0) FROM attempts"),
        0
    );
    // At most one more than the probe that found it well: what waits is not tried all at once.
    sim.our_api.faults.outage(None);
    agrees(&sim, &bench).await;
    assert_eq!(sim.our_api.traffic.max_in_flight(), 1);
    assert!(daemon.stop().await.success());
    assert_eq!(bench.events("failed"), 0);
}

#[tokio::test]
async fn faults_of_all_kinds_lose_and_double_nothing() {
    let (sim, bench) = sim(
        Options {
            seed: 16,
            ..Options::default()
        },
        our_api::Options::default(),
    )
    .await;
    let bench = bench.set("--request-timeout", "300ms");
    for when in [When::Before, When::After] {
        sim.our_api.faults.rate(0.02, when, Fault::Drop);
        sim.our_api.faults.rate(0.02, when, Fault::Status(500));
        sim.our_api.faults.rate(0.02, when, Fault::CutOff);
        sim.our_api.faults.rate(0.02, when, Fault::Html);
        sim.our_api
            .faults
            .rate(0.003, when, Fault::Hang(Duration::from_millis(600)));
    }
    sim.our_api.faults.rate(
        0.01,
        When::Before,
        Fault::RetryLater(429, RetryAfter::Seconds(0)),
    );
    sim.bigchat
        .faults
        .rate(0.05, When::Before, Fault::Status(500));
    sim.bigchat.faults.rate(0.05, When::Before, Fault::Drop);
    let daemon = bench.start();
    more_told(&sim, 400).await;
    sim.bigchat.set_quiet(true);
    sim.our_api.faults.clear();
    sim.bigchat.faults.clear();
    agrees(&sim, &bench).await;
    daemon.stop().await;
    assert!(sim.our_api.faults.injected() > 20);
}

#[tokio::test]
async fn a_404_of_what_is_not_bigchat_is_not_believed() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let faults = &sim.bigchat.faults;
    let (now, route) = (seconds(&sim), "GET /conversations/{id}");
    faults.script(route, When::Before, Fault::Status(500), 1_000);
    sim.bigchat.open(10, now - 100, 7);
    sim.bigchat
        .push(10, "MESSAGE", now - 5, json!({"message": "hello"}));
    bench.once().await;
    assert_eq!(bench.events("waiting"), 1);
    faults.clear();
    faults.outage(Some(Fault::Status(404)));
    let daemon = bench.start();
    let tries = "SELECT max(attempts) FROM attempts";
    until("it is tried", async || bench.value::<i64>(tries) > 3).await;
    faults.outage(None);
    agrees(&sim, &bench).await;
    daemon.stop().await;
    assert_eq!(sim.compare().fallbacks(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_of_bigchat_that_is_set_back_after_a_restart_mixes_nothing() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    sim.bigchat
        .push_page(vec![message(10, now, "of before")], NextPage::None);
    let daemon = bench.start();
    agrees(&sim, &bench).await;
    sim.bigchat.clock.set_offset(60);
    sim.bigchat.restart();
    sim.bigchat.open(10, seconds(&sim), 2);
    let told = vec![message(10, seconds(&sim), "of after")];
    sim.bigchat.push_page(told, NextPage::None);
    bench.until_events("delivered", 2).await;
    agrees(&sim, &bench).await;
    assert_eq!(bench.value::<i64>("SELECT max(id) FROM epochs"), 2);
    sim.bigchat.clock.set_offset(-3600);
    let told = vec![message(10, seconds(&sim), "after the step")];
    sim.bigchat.push_page(told, NextPage::None);
    bench.until_events("delivered", 3).await;
    agrees(&sim, &bench).await;
    daemon.stop().await;
}

#[tokio::test]
async fn one_stray_404_of_bigchat_is_not_believed() {
    let scene = Scene::new().await;
    scene.bigchat.upset("GET /advisors/8", status(404));
    scene.bigchat.upset("GET /conversations/43", status(404));
    let daemon = scene.bench.start();
    scene
        .delivers([fakes::start(42, 0), fakes::transfer(42, 3, 8)])
        .await;
    scene.delivers([fakes::message(43, 30, "first")]).await;
    daemon.stop().await;
    assert_eq!(
        scene.our_api.chats(),
        ["42 22:00:00 - a1", "43 22:00:01 - a2"]
    );
}

#[tokio::test]
async fn an_advisor_whom_bigchat_did_not_know_is_asked_for_again_by_the_next_session() {
    let scene = Scene::new().await;
    scene.bigchat.upset("GET /advisors/8", status(404).always());
    let daemon = scene.bench.start();
    scene
        .delivers([fakes::start(42, 0), fakes::transfer(42, 3, 8)])
        .await;
    daemon.stop().await;
    assert_eq!(scene.our_api.chats(), ["42 22:00:00 - -"]);
    scene.bigchat.calm();
    let daemon = scene.bench.start();
    scene
        .delivers([fakes::start(43, 1), fakes::transfer(43, 4, 8)])
        .await;
    daemon.stop().await;
    assert_eq!(scene.our_api.chats()[1], "43 22:00:01 - a1");
}

#[tokio::test]
async fn stray_404s_for_the_first_conversation_do_not_blind_it_to_a_restart() {
    let scene = Scene::new().await;
    let first = status(404).times(3);
    scene.bigchat.upset("GET /conversations/1", first);
    let daemon = scene.bench.start();
    scene
        .delivers([fakes::start(42, 0), fakes::message(42, 2, "of before")])
        .await;
    until("it is known", async || {
        scene.bigchat.further_polls(1).await;
        scene
            .bench
            .value::<i64>("SELECT count(*) FROM conversations WHERE bigchat_id = 1")
            > 0
    })
    .await;
    // Conversation 1 starts anew, nobody knows 42, and advisor 7 is somebody else.
    scene.bigchat.restarts(2, 100);
    scene.bigchat.advisor(7, "Carl", "carl@x.test");
    scene
        .delivers([fakes::start(2, 100), fakes::message(2, 101, "of after")])
        .await;
    daemon.stop().await;
    assert_eq!(scene.our_api.count("POST /agents"), 2);
    assert_eq!(
        scene.our_api.chats(),
        ["42 22:00:00 - a1", "2 22:01:40 - a2"]
    );
}
