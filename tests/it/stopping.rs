//! Stopping, whatever hangs: within 10 s, and nothing forgotten.

use std::time::{Duration, Instant};

use bigchat_sync::sim::Sim;
use bigchat_sync::sim::bigchat::NextPage;
use bigchat_sync::sim::faults::{Fault, When};
use bigchat_sync::sim::our_api;

use crate::daemon::{agrees, message, scripted, seconds};
use crate::harness::{Bench, Daemon, until};

const BOUND: Duration = Duration::from_secs(10);

#[tokio::test]
async fn while_both_apis_hang() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    let told = vec![message(10, now - 5, "one"), message(10, now - 5, "two")];
    sim.bigchat.push_page(told, NextPage::None);
    let hang = Fault::Hang(Duration::from_secs(60));
    let route = "POST /chats/{id}/messages";
    sim.our_api.faults.script(route, When::After, hang, 1);
    let daemon = bench.start();
    until("one of two", async || sim.our_api.message_count() == 1).await;
    sim.bigchat.faults.hold(true);
    let stopped = Instant::now();
    daemon.stop().await;
    assert!(stopped.elapsed() < BOUND, "{:?}", stopped.elapsed());
    sim.bigchat.faults.hold(false);
    let daemon = bench.start();
    agrees(&sim, &bench).await;
    daemon.stop().await;
}

/// A daemon that BigChat tells of an event while another process holds the database.
async fn told_while_held() -> (Sim, Bench, Daemon, rusqlite::Connection) {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    let daemon = bench.start();
    until("a poll", async || bench.cursor().is_some()).await;
    let polls = || sim.bigchat.traffic.count("GET /events");
    let before = polls();
    let late = Fault::Hang(Duration::from_secs(2));
    sim.bigchat
        .faults
        .script("GET /events", When::Before, late, 1);
    until("a poll under way", async || polls() > before).await;
    let other = rusqlite::Connection::open(bench.db()).expect("the database");
    until("the database is held", async || {
        other.execute_batch("BEGIN IMMEDIATE").is_ok()
    })
    .await;
    sim.bigchat
        .push_page(vec![message(10, now - 5, "told meanwhile")], NextPage::None);
    until("it is told", async || !sim.bigchat.told().is_empty()).await;
    (sim, bench, daemon, other)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_another_process_holds_the_database() {
    let (_sim, _bench, daemon, _other) = told_while_held().await;
    let stopped = Instant::now();
    let outcome = daemon.outcome().await;
    assert!(stopped.elapsed() < BOUND, "{:?}", stopped.elapsed());
    let error = outcome.expect_err("an event was told and could not be kept");
    assert!(error.to_string().contains("1 events"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_that_the_database_refuses_is_kept_before_anything_else_is_asked_for() {
    let (sim, bench, daemon, other) = told_while_held().await;
    let polls = sim.bigchat.traffic.count("GET /events");
    // Longer than any statement waits.
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    assert_eq!(sim.bigchat.traffic.count("GET /events"), polls);
    other.execute_batch("COMMIT").expect("it lets go");
    agrees(&sim, &bench).await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_delivered_and_could_not_be_settled_is_not_forgotten() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    let late = Fault::Hang(Duration::from_secs(1));
    let route = "POST /chats/{id}/messages";
    sim.our_api.faults.script(route, When::Before, late, 1);
    let told = vec![message(10, now - 5, "twin"), message(10, now - 5, "twin")];
    sim.bigchat.push_page(told, NextPage::None);
    let daemon = bench.start();
    until("one is sent", async || {
        sim.our_api.traffic.count(route) == 1
    })
    .await;
    let other = rusqlite::Connection::open(bench.db()).expect("the database");
    until("the database is held", async || {
        other.execute_batch("BEGIN IMMEDIATE").is_ok()
    })
    .await;
    until("both stand there", async || {
        sim.our_api.message_count() == 2
    })
    .await;
    let stopped = Instant::now();
    // Nothing that BigChat told goes with it.
    daemon.stop().await;
    assert!(stopped.elapsed() < BOUND, "{:?}", stopped.elapsed());
    other.execute_batch("COMMIT").expect("it lets go");
    assert_eq!(bench.events("waiting"), 2);
    let daemon = bench.start();
    bench.until_events("delivered", 2).await;
    agrees(&sim, &bench).await;
    daemon.stop().await;
    assert_eq!(sim.our_api.message_count(), 2);
}

#[tokio::test]
async fn once_while_bigchat_hangs() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let bench = bench.set("--request-timeout", "60s");
    sim.bigchat.faults.hold(true);
    let (stopping, once) = bench.start_once();
    until("a request", async || sim.bigchat.traffic.open() > 0).await;
    let stopped = Instant::now();
    stopping.cancel();
    once.await.expect("no panic").expect("it stops well");
    assert!(stopped.elapsed() < BOUND, "{:?}", stopped.elapsed());
}
