//! The whole daemon against the simulated services, with restarts and crashes in between.

use crate::harness::services::{busy_log, quiet_log, seeded, time};
use crate::harness::{run_with, until};
use bigchat_sync::simulator::bigchat::{Log, Mode, Options};
use bigchat_sync::simulator::event::transfer;
use std::time::Duration;

#[tokio::test]
async fn events_reported_once_across_restarts() {
    run_with(seeded(7), async |t| {
        for _ in 0..5 {
            let daemon = t.start();
            t.bigchat.reports_more(40).await;
            daemon.stop().await;
        }
        t.bigchat.calms_down();
        let daemon = t.start();
        t.agrees().await;
        daemon.stop().await;
        assert_eq!(t.our_api.max_at_once(), 1, "one request at a time");
        assert_eq!(t.compare().fallbacks(), 0);
    })
    .await;
}

/// The log has out-of-order events and small pages.
#[tokio::test]
async fn stable_log_across_restarts() {
    run_with(busy_log(3, 60.0, 7), async |t| {
        for _ in 0..4 {
            let daemon = t.start();
            t.bigchat.reports_more(60).await;
            daemon.stop().await;
        }
        t.bigchat.calms_down();
        t.start();
    })
    .await;
}

#[tokio::test]
async fn several_requests_in_flight() {
    run_with(busy_log(4, 60.0, 7), async |t| {
        t.our_api.set_latency(Duration::from_millis(20));
        t.our_api.state().be_good();
        t.set("--our-api-concurrency", "8");
        let daemon = t.start();
        t.bigchat.reports_more(200).await;
        t.bigchat.calms_down();
        t.agrees().await;
        daemon.stop().await;
        let at_once = t.our_api.max_at_once();
        assert!((2..=8).contains(&at_once), "{at_once} at once");
    })
    .await;
}

#[tokio::test]
async fn backfill_of_a_stable_log() {
    let log = Log {
        events_per_second: 0.5,
        page_size: 7,
        history: Duration::from_secs(600),
        ..Log::default()
    };
    let options = Options {
        mode: Mode::Log(log),
        ..seeded(5)
    };
    run_with(options, async |t| {
        let since = time(t.now() - 700);
        t.set("--since", &since).set("--max-window", "60s");
        t.once().await;
        t.bigchat.calms_down();
        assert!(t.bigchat.reported().len() > 100);
        until("no difference", async || {
            // Events of the second in which a window ended are reported in the next window.
            t.once().await;
            t.compare().is_clean()
        })
        .await;
    })
    .await;
}

#[tokio::test]
async fn crashes_at_any_moment() {
    run_with(busy_log(6, 60.0, 7), async |t| {
        // After each crash, nothing is sent to OurAPI for this long.
        t.set("--request-timeout", "200ms");
        for crash in 0..12_u8 {
            let asked = t.our_api.total();
            let daemon = t.start();
            t.bigchat.reports_more(10 + usize::from(crash)).await;
            // Everything reported must be delivered in the end.
            t.bigchat.calms_down();
            until("requests", async || {
                t.our_api.total() > asked + u64::from(crash)
            })
            .await;
            daemon.crash(t).await;
            t.bigchat.state().set_quiet(false);
        }
        t.bigchat.calms_down();
        t.start();
    })
    .await;
}

#[tokio::test]
async fn steady_state_requests_per_event() {
    run_with(
        Options {
            awkward: false,
            active: 10,
            ..seeded(9)
        },
        async |t| {
            let daemon = t.start();
            t.bigchat.reports_more(300).await;
            t.bigchat.calms_down();
            t.agrees().await;
            daemon.stop().await;
            let (requests, events) = (t.our_api.total(), t.events("delivered"));
            // Each of the ten agents costs one request to search for it and one to create it.
            let agents = 20;
            assert!(
                requests <= u64::try_from(events).expect("few") + agents + 10,
                "{requests} requests for {events} events"
            );
        },
    )
    .await;
}

/// Two TRANSFERs in one second count as two, however often a log reports them.
#[tokio::test]
async fn two_transfers_in_one_second() {
    run_with(quiet_log(Log::default()), async |t| {
        let at = t.now() - 1;
        t.bigchat.open(2, at, 1);
        for to in [2, 3] {
            t.bigchat.reports_event(transfer(2, at, to));
        }
        let daemon = t.start();
        t.agrees().await;
        let polls = t.bigchat.polls();
        until("the same event is reported again", async || {
            t.bigchat.polls() > polls + 5
        })
        .await;
        daemon.stop().await;
        assert_eq!(t.count_events("true"), 2);
    })
    .await;
}
