//! Requests that OurAPI carries out only after they have timed out: nothing is sent again before that.

use crate::harness::services::ADD_MESSAGE;
use crate::harness::{run_live_test, side_by_side, until};
use bigchat_sync::simulator::event::message;
use bigchat_sync::simulator::fault::overdue;
use std::time::Duration;

#[tokio::test]
async fn timed_out_request_is_in_flight() {
    side_by_side([1, 2], async |at_once| {
        run_live_test(async |t| {
            t.our_api.state().set_fragile(at_once == 1);
            t.set("--request-timeout", "2s")
                .set("--our-api-concurrency", &at_once.to_string());
            let now = t.now();
            t.bigchat.open(10, now - 100, 1);
            t.bigchat.open(11, now - 100, 2);
            let late = overdue(Duration::from_millis(3_200));
            let faults = &t.our_api;
            faults.upset(ADD_MESSAGE, late);
            let events = vec![message(10, now - 5, "hello"), message(10, now - 5, "hello")];
            t.bigchat.reports(events);
            t.start();
            until("it is in flight", async || faults.pausing() == 1).await;
            let asked = t.our_api.total();
            t.bigchat.reports([message(11, now - 4, "are you there?")]);
            until("it is carried out", async || faults.pausing() == 0).await;
            let meanwhile = t.our_api.total() - asked;
            assert_eq!(meanwhile > 0, at_once > 1, "{meanwhile} of {at_once}");
            t.until_events("delivered", 3).await;
        })
        .await;
    })
    .await;
}

/// After a crash, no request is sent to OurAPI for as long as an earlier one may take.
#[tokio::test]
async fn crash_with_an_overdue_request() {
    run_live_test(async |t| {
        let late = |millis| overdue(Duration::from_millis(millis));
        let faults = &t.our_api;
        faults.upset(ADD_MESSAGE, late(600));
        faults.upset(ADD_MESSAGE, late(800));
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.reports([message(10, now - 5, "one")]);
        let daemon = t.start();
        t.until_events("delivered", 1).await;
        t.bigchat.reports([message(10, now - 4, "two")]);
        until("the second is in flight", async || {
            faults.faults_left() == 0
        })
        .await;
        daemon.crash(t).await;
        assert_eq!(t.our_api.message_count(), 1, "it is not carried out yet");
        let daemon = t.start();
        until("it is carried out", async || faults.pausing() == 0).await;
        t.until_events("delivered", 2).await;
        t.agrees().await;
        daemon.stop().await;
        assert!(!t.our_api.has_stumbled(), "never two requests at once");
    })
    .await;
}

/// A request that timed out counts as in flight after a restart, too.
#[tokio::test]
async fn timed_out_request_across_a_restart() {
    run_live_test(async |t| {
        t.set("--request-timeout", "2s");
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.open(11, now - 100, 2);
        let faults = &t.our_api;
        let late = overdue(Duration::from_millis(3_900));
        faults.upset(ADD_MESSAGE, late);
        t.bigchat.reports([message(10, now - 5, "hello")]);
        let daemon = t.start();
        until("it was given up", async || t.attempts() == 1).await;
        daemon.stop().await;
        let asked = t.our_api.total();
        t.bigchat.reports([message(11, now - 4, "are you there?")]);
        t.start();
        let mut meanwhile = 0;
        until("it is carried out", async || {
            if faults.pausing() > 0 {
                meanwhile = t.our_api.total() - asked;
            }
            faults.pausing() == 0
        })
        .await;
        assert_eq!(meanwhile, 0, "requests while one was in flight");
    })
    .await;
}

/// A request in flight when the daemon stopped may still be carried out, so the chat is not read too early.
#[tokio::test]
async fn stop_with_an_overdue_request() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        let faults = &t.our_api;
        let late = overdue(Duration::from_secs(12));
        faults.upset(ADD_MESSAGE, late);
        t.bigchat.reports([message(10, now - 5, "hello")]);
        let daemon = t.start();
        until("it is in flight", async || faults.pausing() == 1).await;
        daemon.stop().await;
        let daemon = t.start();
        until("it is carried out", async || faults.pausing() == 0).await;
        t.until_events("delivered", 1).await;
        daemon.stop().await;
        assert_eq!(t.our_api.message_count(), 1);
    })
    .await;
}

/// A request in flight at a crash still counts as in flight if the next session stops immediately.
#[tokio::test]
async fn crash_and_a_short_session() {
    run_live_test(async |t| {
        t.set("--request-timeout", "4s");
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        let faults = &t.our_api;
        faults.upset(ADD_MESSAGE, overdue(Duration::from_secs(3)));
        t.bigchat.reports([message(10, now - 5, "hello")]);
        let daemon = t.start();
        until("it is in flight", async || faults.pausing() == 1).await;
        daemon.crash(t).await;
        t.once().await;
        let daemon = t.start();
        until("it is carried out", async || faults.pausing() == 0).await;
        t.until_events("delivered", 1).await;
        daemon.stop().await;
        assert_eq!(t.our_api.message_count(), 1);
        assert!(!t.our_api.has_stumbled(), "never two requests at once");
    })
    .await;
}
