//! SIGKILL of the real binary, at random moments and at every point between journal, request and commit: nothing of
//! a page that was kept is lost, nothing is doubled.

use std::time::Duration;

use bigchat_sync::sim::Sim;
use bigchat_sync::sim::bigchat::{Log, Mode, NextPage, Options};
use bigchat_sync::sim::faults::{Fault, Faults, When};
use bigchat_sync::sim::our_api;
use bigchat_sync::time::Timestamp;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::daemon::{agrees, end, message, scripted, seconds, sim, transfer};
use crate::harness::{Bench, Process, side_by_side, until};

/// How many kills, if the environment does not say otherwise.
const KILLS: u32 = 15;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_random_moments() {
    let variable = |name: &str| std::env::var(name).ok();
    let kills =
        variable("BIGCHAT_SYNC_TEST_KILLS").map_or(KILLS, |kills| kills.parse().expect("a number"));
    let seed = variable("BIGCHAT_SYNC_TEST_SEED").map_or(1, |seed| seed.parse().expect("a number"));
    // With a stable log nothing at all may be lost, not even what was answered and not kept.
    let log = Log {
        events_per_second: 40.0,
        page_size: 20,
        ..Log::default()
    };
    let options = Options {
        seed,
        mode: Mode::Log(log),
        ..Options::default()
    };
    let (sim, bench) = sim(options, our_api::Options::default()).await;
    // After each kill OurAPI is left alone for so long.
    let bench = bench.set("--request-timeout", "300ms");
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..kills {
        let daemon = bench.spawn();
        // From before the first poll to well into the work.
        tokio::time::sleep(Duration::from_millis(random.random_range(20..1200))).await;
        drop(daemon);
    }
    sim.bigchat.set_quiet(true);
    let daemon = bench.start();
    agrees(&sim, &bench).await;
    daemon.stop().await;
    assert!(!sim.our_api.stumbled(), "never two requests at once");
}

/// Killed while many conversations wait, and are committed together.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_in_the_midst_of_a_backlog() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let bench = bench.set("--request-timeout", "1s");
    let now = seconds(&sim);
    let told = (10..210).flat_map(|conversation| {
        sim.bigchat.open(conversation, now - 100, 1);
        ["hello", "hello", "goodbye"].map(|text| message(conversation, now, text))
    });
    sim.bigchat.push_page(told.collect(), NextPage::None);
    let mut random = StdRng::seed_from_u64(1);
    let mut interrupted = 0;
    for _ in 0..12 {
        let asked = sim.our_api.traffic.total() + random.random_range(1..60);
        let daemon = bench.spawn();
        until("requests", async || sim.our_api.traffic.total() >= asked).await;
        drop(daemon);
        interrupted += usize::from(bench.events("waiting") > 32);
    }
    assert!(interrupted > 3, "in the midst of it: {interrupted} times");
    let daemon = bench.start();
    agrees(&sim, &bench).await;
    daemon.stop().await;
    assert!(!sim.our_api.stumbled(), "never two requests at once");
}

/// A conversation whose START nobody told is known by its details alone, and BigChat forgets them: what was sent by them
/// must be known again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_while_a_chat_is_created_and_bigchat_restarts() {
    for moment in MOMENTS {
        let (sim, bench) = scripted(our_api::Options::default()).await;
        let bench = bench.set("--request-timeout", TIMEOUT);
        let now = seconds(&sim);
        sim.bigchat.open(10, now - 100, 1);
        let told = vec![message(10, now - 5, "hello")];
        sim.bigchat.push_page(told, NextPage::None);
        let faults = &sim.our_api.faults;
        faults.script("POST /chats", moment.when(), Fault::Pause, 1);
        let daemon = bench.spawn();
        until("it is being created", async || faults.paused() > 0).await;
        kill_at(moment, daemon, &bench, faults).await;
        sim.bigchat.restart();
        let daemon = bench.start();
        agrees(&sim, &bench).await;
        daemon.stop().await;
        assert_eq!(sim.our_api.chats().len(), 1, "{moment:?}");
    }
}

/// How far a request has come when the daemon is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// It has arrived, and is not carried out.
    Sent,
    /// It is carried out, and not answered.
    CarriedOut,
    /// It is answered, and nothing of that can be kept: another process holds the database.
    Answered,
}

/// Longer than it takes to kill a daemon; OurAPI is left alone for as long afterwards.
const TIMEOUT: &str = "8s";

const MOMENTS: [Moment; 3] = [Moment::Sent, Moment::CarriedOut, Moment::Answered];

/// Every request there is, and what brings it about where nothing else does.
const REQUESTS: [(&str, Option<&str>); 10] = [
    ("GET /events", None),
    ("GET /conversations/{id}", None),
    ("GET /advisors/{id}", None),
    ("GET /agents", None),
    ("POST /agents", None),
    ("POST /chats", None),
    ("GET /chats", Some("POST /chats")),
    ("PATCH /chats/{id}", None),
    ("POST /chats/{id}/messages", None),
    (
        "GET /chats/{id}/messages",
        Some("POST /chats/{id}/messages"),
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_every_point() {
    let points = REQUESTS
        .iter()
        .flat_map(|request| MOMENTS.map(|moment| (*request, moment)));
    side_by_side(points, async |((route, cause), moment)| {
        killed_at(route, cause, moment).await;
    })
    .await;
}

/// Kills the daemon twice at a request of that route.
async fn killed_at(route: &str, cause: Option<&str>, moment: Moment) {
    let options = Options {
        quiet: true,
        mode: Mode::Log(Log::default()),
        ..Options::default()
    };
    let (sim, bench) = sim(options, our_api::Options::default()).await;
    let now = seconds(&sim);
    let since = Timestamp::clamped(now - 60).to_string();
    let bench = bench
        .set("--request-timeout", TIMEOUT)
        .set("--since", &since);
    sim.bigchat.open(10, now - 100, 1);
    let first = vec![
        message(10, now - 5, "hello"),
        message(10, now - 5, "hello"),
        message(10, now - 5, " hello"),
    ];
    sim.bigchat.push_page(first, NextPage::None);
    if let Some(cause) = cause {
        let lost = Fault::Status(500);
        sim.our_api.faults.script(cause, When::After, lost, 1);
    }
    let (faults, when) = (asked(&sim, route), moment.when());
    let mut more = Some(());
    // What there is to do for a chat that is there already.
    let mut tell_more = || {
        let now = seconds(&sim);
        if more.take().is_some() {
            let told = vec![
                end(10, now),
                transfer(10, now, 2),
                message(10, now, "goodbye"),
            ];
            sim.bigchat.push_page(told, NextPage::None);
        }
    };
    for round in 0..2 {
        faults.script(route, when, Fault::Pause, 1);
        let daemon = bench.spawn();
        until(&format!("{moment:?} {route}"), async || {
            if bench.is_ready() && bench.events("delivered") >= 3 {
                tell_more();
            }
            // What was carried out the first time need not be asked for again.
            let done = round > 0 && bench.events("delivered") == 6;
            faults.paused() > 0 || done
        })
        .await;
        kill_at(moment, daemon, &bench, faults).await;
        until(&format!("nobody waits: {moment:?} {route}"), async || {
            faults.paused() == 0
        })
        .await;
    }
    faults.clear();
    tell_more();
    let daemon = bench.start();
    agrees(&sim, &bench).await;
    daemon.stop().await;
    let stumbled = sim.our_api.stumbled();
    assert!(!stumbled, "two requests at once: {route}, {moment:?}");
}

/// Kills the daemon, one request of which waits, once that has come as far as `moment`.
async fn kill_at(moment: Moment, daemon: Process, bench: &Bench, faults: &Faults) {
    let _held = (moment == Moment::Answered).then(|| hold_database(bench));
    if moment == Moment::Answered {
        faults.go_on();
        until("an answer", async || faults.paused() == 0).await;
    }
    drop(daemon);
}

impl Moment {
    fn when(self) -> When {
        match self {
            Self::Sent | Self::Answered => When::Before,
            Self::CarriedOut => When::After,
        }
    }
}

/// The faults of the service that has that route.
fn asked<'a>(sim: &'a Sim, route: &str) -> &'a Faults {
    let of_bigchat = ["GET /events", "GET /conversations", "GET /advisors"];
    if of_bigchat.iter().any(|prefix| route.starts_with(prefix)) {
        &sim.bigchat.faults
    } else {
        &sim.our_api.faults
    }
}

/// Keeps everybody else from writing to the database, until it is dropped.
fn hold_database(bench: &Bench) -> rusqlite::Connection {
    let other = rusqlite::Connection::open(bench.db()).expect("a database");
    other
        .busy_timeout(Duration::from_secs(30))
        .expect("a busy timeout");
    other
        .execute_batch("BEGIN IMMEDIATE")
        .expect("nobody holds it for long");
    other
}
