//! SIGKILL of the real binary, at random moments and at every point between journal, request and commit: nothing of a
//! stored page is lost, and nothing is duplicated.

use crate::harness::process::Process;
use crate::harness::services::{ADD_MESSAGE, ROUTES, busy_log, quiet_log, time};
use crate::harness::{Test, number, run_live_test, run_with, side_by_side, until};
use bigchat_sync::simulator::bigchat::Log;
use bigchat_sync::simulator::event::{end, message, start, transfer};
use bigchat_sync::simulator::fault::{Fault, crashed, paused};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// The default number of kills.
const KILLS: u32 = 15;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_random_moments() {
    let kills = number("BIGCHAT_SYNC_TEST_KILLS", KILLS);
    let seed = number("BIGCHAT_SYNC_TEST_SEED", 1);
    // With a stable log, nothing may be lost, not even a response that was not stored.
    run_with(busy_log(seed, 40.0, 20), async |t| {
        // After each kill, nothing is sent to OurAPI for this long.
        t.set("--request-timeout", "300ms");
        let mut random = StdRng::seed_from_u64(seed);
        for _ in 0..kills {
            let daemon = Process::start(t);
            // Some kills come before the first poll, and others in the middle of the work.
            tokio::time::sleep(Duration::from_millis(random.random_range(20..1200))).await;
            drop(daemon);
        }
        t.bigchat.calms_down();
        let daemon = t.start();
        t.agrees().await;
        daemon.stop().await;
        assert!(!t.our_api.has_stumbled(), "never two requests at once");
    })
    .await;
}

/// The daemon is killed while many conversations are waiting and are committed together.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_during_a_backlog() {
    run_live_test(async |t| {
        t.set("--request-timeout", "1s");
        let now = t.now();
        let events = (10..410).flat_map(|conversation| {
            t.bigchat.open(conversation, now - 100, 1);
            let messages = ["hello", "hello", "goodbye"];
            let messages = messages.map(|text| message(conversation, now, text));
            std::iter::once(start(conversation, now - 100)).chain(messages)
        });
        t.bigchat.reports(events);
        let mut random = StdRng::seed_from_u64(1);
        let (mut interrupted, mut uncommitted) = (0, 0);
        for _ in 0..12 {
            let asked = t.our_api.total() + random.random_range(1..60);
            let daemon = Process::start(t);
            until("requests", async || t.our_api.total() >= asked).await;
            drop(daemon);
            let delivered = t.count_events("state = 'delivered' AND kind = 'MESSAGE'");
            let delivered = usize::try_from(delivered).expect("few");
            interrupted += usize::from(t.events("waiting") > 32);
            uncommitted += usize::from(t.our_api.message_count() > delivered);
        }
        assert!(
            interrupted > 3,
            "killed in the middle of the backlog {interrupted} times"
        );
        assert!(
            uncommitted > 3,
            "killed {uncommitted} times with a delivery that was not committed"
        );
        t.start();
        t.agrees().await;
        assert!(!t.our_api.has_stumbled(), "never two requests at once");
    })
    .await;
}

/// The start of a conversation without a START event is known only from its details, and a restart of BigChat erases
/// them. The chat that was created from them must be found again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_before_bigchat_restarts() {
    side_by_side(MOMENTS, async |moment| {
        run_live_test(async |t| {
            t.set("--request-timeout", TIMEOUT);
            let now = t.now();
            t.bigchat.open(10, now - 100, 1);
            let events = vec![message(10, now - 5, "hello")];
            t.bigchat.reports(events);
            t.upset("POST /chats", moment.pause());
            let daemon = Process::start(t);
            until("the chat is being created", async || t.pausing() > 0).await;
            kill_at(moment, daemon, t).await;
            t.bigchat.restart();
            t.start();
            t.agrees().await;
            assert_eq!(t.our_api.chats().len(), 1, "{moment:?}");
        })
        .await;
    })
    .await;
}

/// The progress of a request when the daemon is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// It has arrived, but has not been carried out.
    Sent,
    /// It has been carried out, but not answered.
    CarriedOut,
    /// It has been answered, but the response cannot be stored, because another process locks the database.
    Answered,
}

/// The request timeout: longer than it takes to kill a daemon. After a kill, nothing is sent to OurAPI for this long.
const TIMEOUT: &str = "8s";

const MOMENTS: [Moment; 3] = [Moment::Sent, Moment::CarriedOut, Moment::Answered];

/// The request whose response must be lost to make a request of this route necessary.
fn cause(route: &str) -> Option<&'static str> {
    match route {
        "GET /chats" => Some("POST /chats"),
        "GET /chats/{id}/messages" => Some(ADD_MESSAGE),
        _ => None,
    }
}

/// The daemon is killed before each kind of request is carried out, before it is answered, and before its response is
/// stored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_every_request() {
    let points = ROUTES
        .iter()
        .flat_map(|route| MOMENTS.map(|moment| (route, moment)));
    side_by_side(points, async |(route, moment)| {
        killed_at(route, moment).await;
    })
    .await;
}

/// Kills the daemon twice at a request to that route.
async fn killed_at(route: &str, moment: Moment) {
    run_with(quiet_log(Log::default()), async |t| {
        let now = t.now();
        let since = time(now - 60);
        t.set("--request-timeout", TIMEOUT).set("--since", &since);
        t.bigchat.open(10, now - 100, 1);
        let first = vec![
            message(10, now - 5, "hello"),
            message(10, now - 5, "hello"),
            message(10, now - 5, " hello"),
        ];
        t.bigchat.reports(first);
        if let Some(cause) = cause(route) {
            let lost = crashed();
            t.our_api.upset(cause, lost.carried_out());
        }
        let mut more = Some(());
        // Events that need requests for an existing chat.
        let mut report_more = || {
            let now = t.now();
            if more.take().is_some() {
                let events = vec![
                    end(10, now),
                    transfer(10, now, 2),
                    message(10, now, "goodbye"),
                ];
                t.bigchat.reports(events);
            }
        };
        for round in 0..2 {
            t.upset(route, moment.pause());
            let daemon = Process::start(t);
            until(&format!("{moment:?} {route}"), async || {
                if t.is_ready() && t.events("delivered") >= 3 {
                    report_more();
                }
                // A request carried out the first time need not be sent again.
                let done = round > 0 && t.events("delivered") == 6;
                t.pausing() > 0 || done
            })
            .await;
            kill_at(moment, daemon, t).await;
            until(
                &format!("no request waits: {moment:?} {route}"),
                async || t.pausing() == 0,
            )
            .await;
        }
        t.calm();
        report_more();
        let daemon = t.start();
        t.until_events("delivered", 6).await;
        daemon.stop().await;
        let stumbled = t.our_api.has_stumbled();
        assert!(!stumbled, "two requests at once: {route}, {moment:?}");
    })
    .await;
}

/// Kills the daemon once its request has reached `moment`.
async fn kill_at(moment: Moment, daemon: Process, t: &Test) {
    let _locked = (moment == Moment::Answered).then(|| t.lock_database());
    if moment == Moment::Answered {
        t.resume();
        until("an answer", async || t.pausing() == 0).await;
    }
    drop(daemon);
}

impl Moment {
    /// The fault that pauses a request at this moment.
    fn pause(self) -> Fault {
        match self {
            Self::Sent | Self::Answered => paused(),
            Self::CarriedOut => paused().carried_out(),
        }
    }
}
