//! The log of the real process: JSON with documented names, a line for each failure, no lines for routine work, and no
//! flood.

use crate::harness::process::{Process, finished, printed, unreachable};
use crate::harness::services::seeded;
use crate::harness::{Bench, run_live_test, run_with, until};
use bigchat_sync::cli::manual::Chapter;
use bigchat_sync::simulator::event::message;
use bigchat_sync::simulator::fault::{crashed, dropped, html, status};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use serde_json::Value;

/// How many lines of a kind are written in full between two summaries.
const BURST: usize = 10;

/// The log, each line parsed as JSON.
fn lines(log: &str) -> Vec<Value> {
    let lines = log.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

/// The number of lines with each message.
fn messages(log: &str) -> BTreeMap<String, usize> {
    let mut messages = BTreeMap::new();
    for line in lines(log) {
        let message = line["message"].as_str().expect("a message").to_owned();
        *messages.entry(message).or_default() += 1;
    }
    messages
}

/// The sum of a figure over all summaries.
fn summed(log: &str, figure: &str) -> u64 {
    let summaries = lines(log)
        .into_iter()
        .filter(|line| line["message"] == "summary");
    summaries.filter_map(|line| line[figure].as_u64()).sum()
}

/// The fields listed in the manual's chapter on the log.
fn documented() -> BTreeSet<String> {
    let chapter = Chapter::Log.text();
    let rows = chapter.lines().filter(|line| line.starts_with("| `"));
    let cells = rows.map(|row| row.split('|').nth(1).unwrap_or_default());
    let names = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    names.map(str::to_owned).collect()
}

async fn with_log(t: &Bench, summary: &str) -> Process {
    t.set("--log-summary", summary);
    let daemon = Process::start(t);
    daemon.until_logged("is running").await;
    daemon
}

/// A mistyped level is read as the name of a module, and would hide every line.
#[test]
fn invalid_rust_log_is_reported() {
    for (level, is_invalid) in [
        ("inof", true),
        ("a=b=c", true),
        ("off", false),
        ("info", false),
    ] {
        let directory = tempfile::tempdir().expect("a directory");
        let mut once = unreachable(directory.path(), "once", "journal.db");
        let log = printed(&once.env("RUST_LOG", level).output().expect("a process"));
        assert_eq!(
            log.contains("RUST_LOG is ignored"),
            is_invalid,
            "{level}: {log}"
        );
        assert_eq!(log.contains("is running"), level != "off", "{level}: {log}");
    }
}

/// Every line is JSON with fields that the manual lists.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_line_is_documented_json() {
    run_with(seeded(31), async |t| {
        t.differs("the daemon is stopped before all is delivered");
        let daemon = with_log(t, "100ms").await;
        t.bigchat.reports_more(100).await;
        for fault in [dropped(), status(503), html(), status(401)] {
            t.our_api.upset_at_random(0.05, fault.clone().carried_out());
            t.bigchat.upset_at_random(0.05, fault);
        }
        t.bigchat.reports_more(100).await;
        t.our_api.loses_everything();
        t.bigchat.restart();
        t.bigchat.reports_more(100).await;
        t.our_api.calm();
        t.bigchat.calm();
        assert!(daemon.stop().await.success());
        let log = t.logged();
        let documented = documented();
        let (mut names, mut kinds) = (BTreeSet::new(), BTreeMap::new());
        for line in lines(&log) {
            let line = line.as_object().expect("an object");
            for name in ["timestamp", "level", "target", "message"] {
                assert!(line[name].is_string(), "{name}: {line:?}");
            }
            for (name, value) in line {
                assert!(
                    documented.contains(name),
                    "{name} is not in the manual: {line:?}"
                );
                let kind = std::mem::discriminant(value);
                assert_eq!(*kinds.entry(name.clone()).or_insert(kind), kind, "{name}");
                names.insert(name.clone());
            }
        }
        for name in [
            "conversation",
            "event",
            "kind",
            "attempts",
            "reason",
            "request",
            "response",
            "since",
        ] {
            assert!(names.contains(name), "{name}: {log}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn healthy_daemon_logs_summaries_only() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        let daemon = with_log(t, "100ms").await;
        for n in 0..20 {
            let events = vec![message(10, now - 5, &format!("message {n}"))];
            t.bigchat.reports(events);
            t.until_events("delivered", n + 1).await;
        }
        until("it is summed up", async || {
            summed(&daemon.log(), "delivered") == 20
        })
        .await;
        let before = daemon.log();
        let polls = t.bigchat.polls();
        until("polls that bring nothing", async || {
            t.bigchat.polls() > polls + 20
        })
        .await;
        assert_eq!(daemon.log(), before);
        assert!(daemon.stop().await.success());
        let log = t.logged();
        assert_eq!(
            (summed(&log, "received"), summed(&log, "delivered")),
            (20, 20)
        );
        let mut messages = messages(&log);
        assert!(messages.remove("summary").is_some_and(|count| count <= 21));
        let counts: Vec<_> = messages
            .iter()
            .map(|(message, count)| (message.as_str(), *count))
            .collect();
        assert_eq!(
            counts,
            [
                (
                    concat!("bigchat-sync ", env!("CARGO_PKG_VERSION"), " is running"),
                    1
                ),
                ("stopped", 1),
                ("stopping; requests in flight are finished first", 1),
            ]
        );
    })
    .await;
}

/// An outage while a thousand conversations are waiting takes one line at its beginning and one at its end, besides the
/// first failure.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outage_is_logged_twice() {
    run_live_test(async |t| {
        t.differs("the daemon is stopped before all is delivered");
        let now = t.now();
        let events = (10..1010).map(|id| message(id, now - 5, "hello"));
        for id in 10..1010 {
            t.bigchat.open(id, now - 100, 1);
        }
        t.bigchat.reports(events);
        t.our_api.outage(Some(status(503)));
        let daemon = with_log(t, "1h").await;
        t.until_events("waiting", 1000).await;
        let asked = t.our_api.total();
        until("many attempts", async || t.our_api.total() > asked + 30).await;
        let log = daemon.log();
        let of_the_outage = |log: &str| {
            let mut messages = messages(log);
            messages
                .retain(|message, _| !message.contains("is running") && message != "catching up");
            messages
        };
        let down = "OurAPI is down; pausing requests to it and probing with one at a time";
        let first = "delivery failed; it will be retried";
        let expected = [(first, 1), (down, 1)].map(|(message, count)| (message.to_owned(), count));
        assert_eq!(of_the_outage(&log), expected.into(), "{log}");
        let line = lines(&log).into_iter().find(|line| line["message"] == down);
        let line = line.expect("a line");
        assert_eq!(line["level"], "WARN");
        assert_eq!(line["response"], "503");
        t.our_api.outage(None);
        until("some get through", async || t.events("delivered") > 20).await;
        assert!(daemon.stop().await.success());
        let log = t.logged();
        let messages = of_the_outage(&log);
        assert_eq!(messages["OurAPI is back"], 1);
        assert_eq!((messages[down], messages[first]), (1, 1), "{log}");
        assert!(summed(&log, "attempts_failed") > 30);
        assert!(summed(&log, "waiting") > 0);
    })
    .await;
}

/// Of many failures, the first ones are logged in full, and the others are counted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_failures_are_counted() {
    run_live_test(async |t| {
        t.differs("OurAPI fails at random, and two attempts are too few");
        t.our_api.state().be_good();
        t.set("--our-api-concurrency", "8")
            .set("--max-attempts", "2");
        let now = t.now();
        let mut events = Vec::new();
        for id in 10..110 {
            t.bigchat.open(id, now - 100, 1);
            // OurAPI never accepts the first one.
            events.push(message(id, now - 6, "k"));
            events.push(message(id, now - 5, "hello"));
        }
        t.bigchat.reports(events);
        let daemon = with_log(t, "1h").await;
        t.until_events("failed", 100).await;
        t.until_events("delivered", 100).await;
        // Now every other message gets a 500, so some are retried repeatedly while others succeed.
        t.our_api.upset_at_random(0.5, crashed());
        let events = (10..110).map(|id| message(id, now - 4, "and on"));
        t.bigchat.reports(events);
        until("all have been tried", async || {
            t.events("waiting") == 0 && t.events("delivered") + t.events("failed") == 300
        })
        .await;
        let failed = t.events("failed");
        assert!(daemon.stop().await.success());
        let log = t.logged();
        let (lines, messages) = (lines(&log), messages(&log));
        let for_good = "OurAPI permanently rejects an event; see `bigchat-sync failed list`";
        assert_eq!(messages[for_good], BURST, "{log}");
        assert!(
            messages.values().all(|count| *count <= BURST),
            "{messages:?}"
        );
        let left_out: BTreeMap<_, _> = lines
            .iter()
            .filter(|line| line["message"] == "left out of the log")
            .map(|line| {
                (
                    line["like"].as_str().expect("a line"),
                    line["lines"].as_u64(),
                )
            })
            .collect();
        assert_eq!(left_out[for_good], Some(90));
        assert_eq!(summed(&log, "failed"), u64::try_from(failed).expect("few"));
        assert!(summed(&log, "attempts_failed") > 50);
        let full = lines
            .iter()
            .find(|line| line["message"] == for_good)
            .expect("a line");
        for name in [
            "conversation",
            "event",
            "kind",
            "chat",
            "attempts",
            "reason",
            "request",
            "response",
        ] {
            assert!(!full[name].is_null(), "{name}: {full}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn once_logs_a_summary() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.reports([message(10, now - 5, "hello")]);
        let output = finished(t.program("once")).await;
        assert!(output.status.success());
        let log = String::from_utf8(output.stderr).expect("text");
        assert_eq!(
            (summed(&log, "received"), summed(&log, "delivered")),
            (1, 1),
            "{log}"
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn catching_up_logs_time_left() {
    run_live_test(async |t| {
        t.differs("the daemon is stopped before all is delivered");
        t.our_api.set_latency(Duration::from_millis(50));
        let now = t.now();
        for id in 10..40 {
            t.bigchat.open(id, now - 100, 1);
        }
        let events = (0..1500).map(|n| message(10 + n % 30, now - 5, &format!("message {n}")));
        t.bigchat.reports(events);
        let daemon = with_log(t, "1h").await;
        daemon.until_logged("catching up").await;
        let line = lines(&daemon.log())
            .into_iter()
            .find(|line| line["message"] == "catching up");
        let line = line.expect("a line");
        let [delivered, left, seconds_left] = ["delivered", "left", "seconds_left"]
            .map(|name| line[name].as_u64().expect("a number"));
        assert!(delivered > 0 && delivered + left <= 1500, "{line}");
        assert!(
            seconds_left > 0 && line["per_second"].as_f64().expect("a rate") > 0.0,
            "{line}"
        );
        assert!(daemon.stop().await.success());
    })
    .await;
}

/// A filter for one module of this program is obeyed, and one that is only for other modules is reported as ignored.
#[test]
fn rust_log_for_modules() {
    for (filter, is_invalid) in [
        (&b"bigchat_sync::daemon=info"[..], false),
        (
            b"bigchat_sync::poller=debug,bigchat_sync::daemon=info",
            false,
        ),
        (b"hyper=debug,bigchat_sync=info", false),
        (b"hyper=debug", true),
        (b"info\xff", true),
    ] {
        let directory = tempfile::tempdir().expect("a directory");
        let mut once = unreachable(directory.path(), "once", "journal.db");
        let once = once.env("RUST_LOG", OsStr::from_bytes(filter)).output();
        let log = printed(&once.expect("a process"));
        assert_eq!(
            log.contains("RUST_LOG is ignored"),
            is_invalid,
            "{filter:?}: {log}"
        );
        assert!(log.contains("is running"), "{filter:?}: {log}");
    }
}
