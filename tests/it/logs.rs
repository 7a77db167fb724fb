//! The log of the real process: JSON with the names that the README gives, a line for each failure, none for what is
//! routine, and no flood.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bigchat_sync::sim::bigchat::{self, NextPage};
use bigchat_sync::sim::faults::{Fault, When};
use bigchat_sync::sim::our_api;
use serde_json::Value;

use crate::daemon::{message, more_told, scripted, seconds, sim};
use crate::harness::{Bench, until};
use crate::process::Process;

/// How many lines of a kind are written in full between two summaries.
const IN_FULL: usize = 10;

/// All that was logged, each line read as JSON.
fn lines(log: &str) -> Vec<Value> {
    let lines = log.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

/// How many lines there are of each message.
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

/// The names that the README gives, in its section on the log.
fn documented() -> BTreeSet<String> {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md"));
    let readme = readme.expect("a README");
    let section = readme
        .split("\n## ")
        .find(|part| part.starts_with("The log\n"));
    let rows = section
        .expect("a section on the log")
        .lines()
        .filter(|line| line.starts_with("| `"));
    let cells = rows.map(|row| row.split('|').nth(1).unwrap_or_default());
    let names = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    names.map(str::to_owned).collect()
}

async fn with_log(bench: Bench, summary: &str) -> (Bench, Process) {
    let bench = bench.set("--log-summary", summary);
    let daemon = Process::start(&bench);
    until("it runs", async || daemon.lines_with("is running") > 0).await;
    (bench, daemon)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_line_is_json_with_the_names_that_the_readme_gives() {
    let options = bigchat::Options {
        seed: 31,
        ..bigchat::Options::default()
    };
    let (sim, bench) = sim(options, our_api::Options::default()).await;
    let (_bench, daemon) = with_log(bench, "100ms").await;
    more_told(&sim, 100).await;
    for fault in [
        Fault::Drop,
        Fault::Status(503),
        Fault::Html,
        Fault::Status(401),
    ] {
        sim.our_api.faults.rate(0.05, When::After, fault.clone());
        sim.bigchat.faults.rate(0.05, When::Before, fault);
    }
    more_told(&sim, 100).await;
    sim.our_api.wipe();
    sim.bigchat.restart();
    more_told(&sim, 100).await;
    sim.our_api.faults.clear();
    sim.bigchat.faults.clear();
    let log = daemon.log_file();
    assert!(daemon.stop().await.success());
    let log = std::fs::read_to_string(log).expect("a log");
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
                "{name} is not in the README: {line:?}"
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
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_all_is_well_there_is_a_summary_of_what_was_done_and_nothing_else() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    let (bench, daemon) = with_log(bench, "100ms").await;
    for n in 0..20 {
        let told = vec![message(10, now - 5, &format!("message {n}"))];
        sim.bigchat.push_page(told, NextPage::None);
        bench.until_events("delivered", n + 1).await;
    }
    until("it is summed up", async || {
        summed(&daemon.log(), "delivered") == 20
    })
    .await;
    let before = daemon.log();
    let polls = sim.bigchat.polls();
    until("polls that bring nothing", async || {
        sim.bigchat.polls() > polls + 20
    })
    .await;
    assert_eq!(daemon.log(), before);
    let log = daemon.log_file();
    assert!(daemon.stop().await.success());
    let log = std::fs::read_to_string(log).expect("a log");
    assert_eq!((summed(&log, "told"), summed(&log, "delivered")), (20, 20));
    let mut messages = messages(&log);
    assert!(messages.remove("summary").is_some_and(|count| count <= 21));
    let said: Vec<_> = messages
        .iter()
        .map(|(message, count)| (message.as_str(), *count))
        .collect();
    assert_eq!(
        said,
        [
            (
                concat!("bigchat-sync ", env!("CARGO_PKG_VERSION"), " is running"),
                1
            ),
            ("stopped; nothing is forgotten", 1),
            ("stopping: what is in flight is finished first", 1),
        ]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_with_a_thousand_conversations_waiting_is_a_line_at_its_beginning_and_one_at_its_end()
 {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let now = seconds(&sim);
    let told = (10..1010).map(|id| message(id, now - 5, "hello")).collect();
    for id in 10..1010 {
        sim.bigchat.open(id, now - 100, 1);
    }
    sim.bigchat.push_page(told, NextPage::None);
    sim.our_api.faults.outage(Some(Fault::Status(503)));
    let (bench, daemon) = with_log(bench, "1h").await;
    bench.until_events("waiting", 1000).await;
    let asked = sim.our_api.traffic.total();
    until("many attempts", async || {
        sim.our_api.traffic.total() > asked + 30
    })
    .await;
    let log = daemon.log();
    let of_the_outage = |log: &str| {
        let mut messages = messages(log);
        messages.retain(|message, _| !message.contains("is running") && message != "catching up");
        messages
    };
    let down = "OurAPI is down; requests to it wait, and one at a time probes it";
    let first = "delivery failed; it will be retried";
    let expected = [(first, 1), (down, 1)].map(|(message, count)| (message.to_owned(), count));
    assert_eq!(of_the_outage(&log), expected.into(), "{log}");
    let line = lines(&log).into_iter().find(|line| line["message"] == down);
    let line = line.expect("a line");
    assert_eq!(line["level"], "WARN");
    assert_eq!(line["response"], "503");
    sim.our_api.faults.outage(None);
    until("some get through", async || bench.events("delivered") > 20).await;
    let log = daemon.log_file();
    assert!(daemon.stop().await.success());
    let log = std::fs::read_to_string(log).expect("a log");
    let messages = of_the_outage(&log);
    assert_eq!(messages["OurAPI is back"], 1);
    assert_eq!((messages[down], messages[first]), (1, 1), "{log}");
    assert!(summed(&log, "attempts_failed") > 30);
    assert!(summed(&log, "waiting") > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_that_fail_side_by_side_the_first_are_told_in_full_and_the_others_counted() {
    let (sim, bench) = scripted(our_api::Options::good()).await;
    let bench = bench
        .set("--our-api-concurrency", "8")
        .set("--max-attempts", "2");
    let now = seconds(&sim);
    let mut told = Vec::new();
    for id in 10..110 {
        sim.bigchat.open(id, now - 100, 1);
        // OurAPI never takes the first one.
        told.push(message(id, now - 6, "k"));
        told.push(message(id, now - 5, "hello"));
    }
    sim.bigchat.push_page(told, NextPage::None);
    let (bench, daemon) = with_log(bench, "1h").await;
    bench.until_events("failed", 100).await;
    bench.until_events("delivered", 100).await;
    // Now every other message meets a 500: some are tried again and again while others get through.
    sim.our_api
        .faults
        .rate(0.5, When::Before, Fault::Status(500));
    let told = (10..110).map(|id| message(id, now - 4, "and on")).collect();
    sim.bigchat.push_page(told, NextPage::None);
    until("all have been tried", async || {
        bench.events("waiting") == 0 && bench.events("delivered") + bench.events("failed") == 300
    })
    .await;
    let failed = bench.events("failed");
    let log = daemon.log_file();
    assert!(daemon.stop().await.success());
    let log = std::fs::read_to_string(log).expect("a log");
    let (lines, messages) = (lines(&log), messages(&log));
    let for_good = "OurAPI permanently rejects an event; resolve it with `bigchat-sync failed`";
    assert_eq!(messages[for_good], IN_FULL, "{log}");
    assert!(
        messages.values().all(|count| *count <= IN_FULL),
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
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn once_sums_up_what_it_did() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    sim.bigchat
        .push_page(vec![message(10, now - 5, "hello")], NextPage::None);
    let mut once = bench.program("once");
    let output = tokio::task::spawn_blocking(move || once.output());
    let output = output.await.expect("no panic").expect("a process");
    assert!(output.status.success());
    let log = String::from_utf8(output.stderr).expect("text");
    assert_eq!(
        (summed(&log, "told"), summed(&log, "delivered")),
        (1, 1),
        "{log}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn catching_up_is_told_of_with_rate_and_time_left() {
    let slow = our_api::Options {
        latency: Duration::from_millis(50),
        ..our_api::Options::default()
    };
    let (sim, bench) = scripted(slow).await;
    let now = seconds(&sim);
    for id in 10..40 {
        sim.bigchat.open(id, now - 100, 1);
    }
    let told = (0..1500).map(|n| message(10 + n % 30, now - 5, &format!("message {n}")));
    sim.bigchat.push_page(told.collect(), NextPage::None);
    let (_bench, daemon) = with_log(bench, "1h").await;
    until("it is told of", async || {
        daemon.lines_with("catching up") > 0
    })
    .await;
    let line = lines(&daemon.log())
        .into_iter()
        .find(|line| line["message"] == "catching up");
    let line = line.expect("a line");
    let [delivered, left, seconds_left] =
        ["delivered", "left", "seconds_left"].map(|name| line[name].as_u64().expect("a number"));
    assert!(delivered > 0 && delivered + left <= 1500, "{line}");
    assert!(
        seconds_left > 0 && line["per_second"].as_f64().expect("a rate") > 0.0,
        "{line}"
    );
    assert!(daemon.stop().await.success());
}
