//! Everything fails at the same time. `demo --chaos`, with several seeds, kills and restarts the real daemon between
//! services that fail in every way. Its comparison may exclude only events that cannot be recovered.
//!
//! Short by default. `BIGCHAT_SYNC_TEST_SEEDS` and `BIGCHAT_SYNC_TEST_SECONDS` set the number of seeds and the
//! duration.

use crate::harness::process::{Process, files, finished, printed, program};
use crate::harness::services::ADD_MESSAGE;
use crate::harness::{Test, number, run_live_test, until};
use bigchat_sync::simulator::event::{end, message};
use bigchat_sync::simulator::fault::{paused, status};
use std::path::Path;
use std::process::Command;

use bigchat_sync::demo::count_apart;
use bigchat_sync::journal::Store;

/// The default number of seeds, and the default duration for each, in seconds.
const SEEDS: u64 = 2;
const SECONDS: u64 = 5;

fn chaos(temporary: &Path, seed: u64, seconds: u64, bigchat: &str) -> Command {
    let mut demo = program();
    demo.args(["demo", "--chaos", "--bigchat", bigchat])
        .args(["--duration", &format!("{seconds}s")])
        .args(["--seed", &seed.to_string()])
        .env("TMPDIR", temporary)
        .env("BIGCHAT_SYNC_POLL_INTERVAL", "soon")
        .env_remove("RUST_LOG");
    demo
}

/// Runs one seed after the other. Each run must end without a difference and leave no files behind.
async fn survives(bigchat: &str) {
    let seconds = number("BIGCHAT_SYNC_TEST_SECONDS", SECONDS);
    for seed in 1..=number("BIGCHAT_SYNC_TEST_SEEDS", SEEDS) {
        let temporary = tempfile::tempdir().expect("a directory");
        let output = finished(chaos(temporary.path(), seed, seconds, bigchat)).await;
        if !output.status.success() {
            // The database is not deleted, so that the failure can be analyzed.
            let stored = temporary.keep();
            panic!("seed {seed}, {}: {}", stored.display(), printed(&output));
        }
        let left = files(temporary.path());
        assert!(left.is_empty(), "files left behind: {left:?}");
    }
}

#[tokio::test]
async fn chaos_with_events_reported_once() {
    survives("once").await;
}

#[tokio::test]
async fn chaos_with_a_stable_log() {
    survives("log").await;
}

#[tokio::test]
async fn success_without_its_body() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        for (route, body) in [
            (ADD_MESSAGE, ""),
            (ADD_MESSAGE, "null"),
            ("PATCH /chats/{id}", ""),
        ] {
            let fault = status(200).body(body);
            t.our_api.upset(route, fault);
        }
        let daemon = t.start();
        for (reported, events) in [
            (1, vec![message(10, now - 5, "one")]),
            (3, vec![message(10, now - 5, "two"), end(10, now)]),
        ] {
            t.bigchat.reports(events);
            until("the event is reported", async || {
                t.bigchat.reported().len() == reported
            })
            .await;
            t.agrees().await;
        }
        daemon.stop().await;
        assert_eq!(t.our_api.faults_left(), 0);
    })
    .await;
}

/// Kills a daemon while OurAPI is down, before or after it has stored a page. Returns how many events the demo excludes
/// from the comparison, and whether OurAPI has all others.
async fn after_a_kill(t: &Test, stored: bool) -> (usize, bool) {
    t.our_api.down().await;
    let now = t.now();
    t.bigchat.open(10, now - 100, 1);
    let daemon = Process::start(t);
    t.until_polled().await;
    let faults = &t.bigchat;
    faults.upset("GET /events", paused());
    until("a poll is under way", async || faults.pausing() == 1).await;
    let locked = (!stored).then(|| t.lock_database());
    t.bigchat.reports([message(10, now - 5, "not stored")]);
    faults.resume();
    until("the event is reported", async || {
        t.bigchat.reported().iter().any(|events| !events.lost)
    })
    .await;
    if stored {
        t.until_events("waiting", 1).await;
    }
    drop(daemon);
    drop(locked);
    let mut journal = Store::open_shared(&t.db()).expect("the database");
    let apart =
        count_apart(&mut t.bigchat.state(), &mut journal).expect("the database can be read");
    (apart, t.compare().is_clean())
}

/// The demo excludes the events of a page that a killed daemon had not stored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_with_an_unstored_page() {
    run_live_test(async |t| {
        assert_eq!(after_a_kill(t, false).await, (1, true));
    })
    .await;
}

/// The demo excludes no event of a stored page.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_with_a_stored_page() {
    run_live_test(async |t| {
        t.differs("OurAPI is down to the end");
        assert_eq!(after_a_kill(t, true).await, (0, false));
    })
    .await;
}
