//! What OurAPI carries out only after nobody waits for it any more: it is neither sent again before, nor met by another
//! request.

use std::time::Duration;

use bigchat_sync::sim::bigchat::NextPage;
use bigchat_sync::sim::faults::{Fault, When};
use bigchat_sync::sim::our_api;

use crate::daemon::{agrees, message, scripted, seconds};
use crate::harness::{side_by_side, until};

const MESSAGE: &str = "POST /chats/{id}/messages";

#[tokio::test]
async fn a_request_that_was_given_up_counts_as_under_way() {
    side_by_side([1, 2], async |at_once| {
        let (sim, bench) = scripted(our_api::Options {
            strict_single: at_once == 1,
            ..our_api::Options::default()
        })
        .await;
        let bench = bench
            .set("--request-timeout", "800ms")
            .set("--our-api-concurrency", &at_once.to_string());
        let now = seconds(&sim);
        sim.bigchat.open(10, now - 100, 1);
        sim.bigchat.open(11, now - 100, 2);
        let late = Fault::Late(Duration::from_millis(1_200));
        let faults = &sim.our_api.faults;
        faults.script(MESSAGE, When::Before, late, 1);
        let told = vec![message(10, now - 5, "hello"), message(10, now - 5, "hello")];
        sim.bigchat.push_page(told, NextPage::None);
        let daemon = bench.start();
        until("it is under way", async || faults.paused() == 1).await;
        let asked = sim.our_api.traffic.total();
        sim.bigchat
            .push_page(vec![message(11, now - 4, "are you there?")], NextPage::None);
        until("it is carried out", async || faults.paused() == 0).await;
        let meanwhile = sim.our_api.traffic.total() - asked;
        assert_eq!(meanwhile > 0, at_once > 1, "{meanwhile} of {at_once}");
        bench.until_events("delivered", 3).await;
        agrees(&sim, &bench).await;
        daemon.stop().await;
    })
    .await;
}

#[tokio::test]
async fn a_crash_is_followed_by_a_pause_as_long_as_answers_take() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let late = |millis| Fault::Late(Duration::from_millis(millis));
    let faults = &sim.our_api.faults;
    faults.script(MESSAGE, When::Before, late(600), 1);
    faults.script(MESSAGE, When::Before, late(800), 1);
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    sim.bigchat
        .push_page(vec![message(10, now - 5, "one")], NextPage::None);
    let daemon = bench.start();
    bench.until_events("delivered", 1).await;
    sim.bigchat
        .push_page(vec![message(10, now - 4, "two")], NextPage::None);
    until("the second is on its way", async || faults.left() == 0).await;
    daemon.crash(&bench).await;
    assert_eq!(sim.our_api.message_count(), 1, "it is not there yet");
    let daemon = bench.start();
    until("it is carried out", async || faults.paused() == 0).await;
    bench.until_events("delivered", 2).await;
    agrees(&sim, &bench).await;
    daemon.stop().await;
    assert!(!sim.our_api.stumbled(), "never two requests at once");
}

#[tokio::test]
async fn a_request_that_was_given_up_counts_as_under_way_after_a_restart_too() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let bench = bench.set("--request-timeout", "2s");
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    sim.bigchat.open(11, now - 100, 2);
    let faults = &sim.our_api.faults;
    let late = Fault::Late(Duration::from_millis(3_900));
    faults.script(MESSAGE, When::Before, late, 1);
    sim.bigchat
        .push_page(vec![message(10, now - 5, "hello")], NextPage::None);
    let daemon = bench.start();
    until("it was given up", async || {
        bench.is_ready()
            && bench.value::<i64>("SELECT count(*) FROM attempts WHERE attempts = 1") == 1
    })
    .await;
    daemon.stop().await;
    let asked = sim.our_api.traffic.total();
    sim.bigchat
        .push_page(vec![message(11, now - 4, "are you there?")], NextPage::None);
    let daemon = bench.start();
    let mut meanwhile = 0;
    until("it is carried out", async || {
        if faults.paused() > 0 {
            meanwhile = sim.our_api.traffic.total() - asked;
        }
        faults.paused() == 0
    })
    .await;
    assert_eq!(meanwhile, 0, "asked while it was under way");
    agrees(&sim, &bench).await;
    daemon.stop().await;
}

#[tokio::test]
async fn what_did_not_end_in_time_at_the_stop_is_not_looked_for_too_early() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    let faults = &sim.our_api.faults;
    let late = Fault::Late(Duration::from_secs(12));
    faults.script(MESSAGE, When::Before, late, 1);
    sim.bigchat
        .push_page(vec![message(10, now - 5, "hello")], NextPage::None);
    let daemon = bench.start();
    until("it is under way", async || faults.paused() == 1).await;
    daemon.stop().await;
    let daemon = bench.start();
    until("it is carried out", async || faults.paused() == 0).await;
    bench.until_events("delivered", 1).await;
    daemon.stop().await;
    assert_eq!(sim.our_api.message_count(), 1);
}
