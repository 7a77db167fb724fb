//! The daemon stops within 10 s, whatever hangs, and loses nothing that is stored.

use crate::harness::process::STOPS_WITHIN;
use crate::harness::services::ADD_MESSAGE;
use crate::harness::{Daemon, Test, run_live_test, until};
use bigchat_sync::simulator::event::message;
use bigchat_sync::simulator::fault::slow;
use std::time::{Duration, Instant};

#[tokio::test]
async fn stop_while_both_apis_hang() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        let events = vec![message(10, now - 5, "one"), message(10, now - 5, "two")];
        t.bigchat.reports(events);
        let hang = slow(Duration::from_secs(60));
        t.our_api.upset(ADD_MESSAGE, hang.carried_out());
        let daemon = t.start();
        until("one of two", async || t.our_api.message_count() == 1).await;
        t.bigchat.hold(true);
        let stopped = Instant::now();
        daemon.stop().await;
        assert!(stopped.elapsed() < STOPS_WITHIN, "{:?}", stopped.elapsed());
        t.bigchat.hold(false);
        t.start();
    })
    .await;
}

/// A daemon that receives an event while another process locks the database.
async fn received_while_locked(t: &Test) -> (Daemon, rusqlite::Connection) {
    let now = t.now();
    t.bigchat.open(10, now - 100, 1);
    let daemon = t.start();
    t.until_polled().await;
    let polls = || t.bigchat.count("GET /events");
    let before = polls();
    let late = slow(Duration::from_secs(2));
    t.bigchat.upset("GET /events", late);
    until("a poll under way", async || polls() > before).await;
    let other = t.lock_database();
    t.bigchat
        .reports([message(10, now - 5, "reported meanwhile")]);
    until("the event is reported", async || {
        !t.bigchat.reported().is_empty()
    })
    .await;
    (daemon, other)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stop_while_database_is_locked() {
    run_live_test(async |t| {
        t.differs("an event is lost with the daemon");
        let (daemon, _other) = received_while_locked(t).await;
        let stopped = Instant::now();
        let outcome = daemon.outcome().await;
        assert!(stopped.elapsed() < STOPS_WITHIN, "{:?}", stopped.elapsed());
        let error = outcome.expect_err("an event was received and could not be stored");
        assert!(error.to_string().contains("lost: 1"), "{error}");
    })
    .await;
}

/// No further page is requested until a received page is stored, even if the database is locked for long.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn page_while_database_is_locked() {
    run_live_test(async |t| {
        let (_, other) = received_while_locked(t).await;
        let polls = t.bigchat.count("GET /events");
        // Longer than any statement waits for a locked database.
        tokio::time::sleep(Duration::from_millis(2_500)).await;
        assert_eq!(t.bigchat.count("GET /events"), polls);
        drop(other);
    })
    .await;
}

/// Deliveries that could not be committed are read back after the restart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delivered_but_not_committed() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        let late = slow(Duration::from_secs(1));
        t.our_api.upset(ADD_MESSAGE, late);
        let events = vec![message(10, now - 5, "twin"), message(10, now - 5, "twin")];
        t.bigchat.reports(events);
        let daemon = t.start();
        until("one is sent", async || t.our_api.count(ADD_MESSAGE) == 1).await;
        let other = t.lock_database();
        until("both exist in OurAPI", async || {
            t.our_api.message_count() == 2
        })
        .await;
        let stopped = Instant::now();
        // This is no error: nothing that the daemon has received is lost.
        daemon.stop().await;
        assert!(stopped.elapsed() < STOPS_WITHIN, "{:?}", stopped.elapsed());
        drop(other);
        assert_eq!(t.events("waiting"), 2);
        let daemon = t.start();
        t.until_events("delivered", 2).await;
        t.agrees().await;
        daemon.stop().await;
        assert_eq!(t.our_api.message_count(), 2);
    })
    .await;
}

#[tokio::test]
async fn once_while_bigchat_hangs() {
    run_live_test(async |t| {
        t.set("--request-timeout", "60s");
        t.bigchat.hold(true);
        let (stopping, once) = t.start_once();
        until("a request", async || t.bigchat.open_requests() > 0).await;
        let stopped = Instant::now();
        stopping.cancel();
        once.await
            .expect("no panic")
            .expect("a stop without an error");
        assert!(stopped.elapsed() < STOPS_WITHIN, "{:?}", stopped.elapsed());
    })
    .await;
}
