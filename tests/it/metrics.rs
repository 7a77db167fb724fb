//! What the metrics tell: what the services were really asked, and which of the things that can be wrong is wrong.

use std::io::Write;
use std::process::{Command, Stdio};

use bigchat_sync::settings::Tokens;
use bigchat_sync::sim::faults::{Fault, When};
use bigchat_sync::sim::{Traffic, bigchat, our_api};
use reqwest::header::CONTENT_TYPE;
use serde_json::json;

use crate::daemon::{agrees, message, scripted, seconds, sim};
use crate::harness::{Bench, Daemon, until};

/// A daemon, and what it measures.
struct Measured {
    daemon: Daemon,
    url: String,
}

impl Measured {
    fn start(bench: &Bench) -> Self {
        let (daemon, url) = bench.start_listening(Tokens::default());
        Self { daemon, url }
    }

    async fn text(&self) -> String {
        let client = reqwest::Client::builder().no_proxy().build();
        let asked = client
            .expect("a client")
            .get(format!("{}/metrics", self.url));
        let answer = asked.send().await.expect("an answer");
        let kind = answer.headers()[CONTENT_TYPE].to_str().expect("a kind");
        assert_eq!(kind, "text/plain; version=0.0.4; charset=utf-8");
        answer.text().await.expect("a text")
    }

    /// A sample's value; 0 if it is not there.
    async fn value(&self, series: &str) -> f64 {
        value(&self.text().await, series).unwrap_or_default()
    }

    /// Whether polls come to their end, BigChat's events are young, and what it told is delivered.
    async fn signs(&self) -> (bool, bool, bool) {
        let text = self.text().await;
        let value = |series| value(&text, series).unwrap_or(f64::MAX);
        let polled = value("bigchat_sync_last_poll_timestamp_seconds");
        let now = chrono::Utc::now().timestamp_millis() as f64 / 1e3;
        (
            (0.0..3.0).contains(&(now - polled)),
            value("bigchat_sync_newest_event_age_seconds") < 60.0,
            value("bigchat_sync_oldest_waiting_age_seconds") < 3.0,
        )
    }

    async fn until_signs(&self, what: &str, signs: (bool, bool, bool)) {
        until(what, async || self.signs().await == signs).await;
    }
}

/// The value of a sample, by its name and labels.
fn value(text: &str, series: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(series));
    rest?.trim().parse().ok()
}

/// The sum of all samples that begin so.
fn sum(text: &str, series: &str) -> f64 {
    let samples = text.lines().filter(|line| line.starts_with(series));
    samples
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

#[tokio::test]
async fn requests_and_events_are_those_there_were() {
    let options = bigchat::Options {
        seed: 12,
        ..bigchat::Options::default()
    };
    let (sim, bench) = sim(options, our_api::Options::default()).await;
    let measured = Measured::start(&bench);
    crate::daemon::more_told(&sim, 60).await;
    sim.bigchat.set_quiet(true);
    agrees(&sim, &bench).await;
    let same = async |api: &str, traffic: &Traffic| {
        let (before, text, after) = (traffic.total(), measured.text().await, traffic.total());
        let of_api = |series: &str| sum(&text, &format!("bigchat_sync_{series}{{api=\"{api}\""));
        let (total, took) = (
            of_api("requests_total"),
            of_api("request_duration_seconds_count"),
        );
        // A GET over a connection that the service had closed was lost, and asked again.
        let lost: f64 = ["events", "conversations/{id}", "agents", "chats"]
            .iter()
            .filter_map(|route| {
                let labels = format!("api=\"{api}\",route=\"GET /{route}\",status=\"lost\"");
                value(&text, &format!("bigchat_sync_requests_total{{{labels}}}"))
            })
            .sum();
        before == after && total - lost == before as f64 && took == total
    };
    until("OurAPI's requests", async || {
        same("our_api", &sim.our_api.traffic).await
    })
    .await;
    until("BigChat's requests", async || {
        same("bigchat", &sim.bigchat.traffic).await
    })
    .await;
    let text = measured.text().await;
    for (kind, told) in ["START", "END", "MESSAGE", "TRANSFER"].map(|kind| {
        let told: i64 = bench.value(&format!(
            "SELECT count(*) FROM events WHERE kind = '{kind}'"
        ));
        (kind, told as f64)
    }) {
        let series = format!("bigchat_sync_events_told_total{{kind=\"{kind}\"}}");
        assert_eq!(value(&text, &series), Some(told), "{kind}");
    }
    let (delivered, failed) = (bench.events("delivered"), bench.events("failed"));
    let attempts = |outcome: &str| -> f64 {
        let kinds = ["START", "END", "MESSAGE", "TRANSFER"];
        let of_kind = |kind| format!("{{kind=\"{kind}\",outcome=\"{outcome}\"}}");
        let of_kind = |kind| {
            sum(
                &text,
                &format!("bigchat_sync_event_attempts_total{}", of_kind(kind)),
            )
        };
        kinds.map(of_kind).iter().sum()
    };
    assert_eq!(attempts("delivered"), delivered as f64);
    assert_eq!(attempts("failed"), failed as f64);
    assert_eq!(
        value(&text, "bigchat_sync_failed_events"),
        Some(failed as f64)
    );
    measured.daemon.stop().await;
}

#[tokio::test]
async fn a_stuck_source_stale_data_and_a_stuck_delivery_are_told_apart() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let old = seconds(&sim) - 3600;
    sim.bigchat.open(2, old, 1);
    sim.bigchat.push_raw(message(2, seconds(&sim) - 1, "Hello"));
    let measured = Measured::start(&bench);
    let (all_well, up) = ((true, true, true), "bigchat_sync_api_up");
    measured.until_signs("all is well", all_well).await;

    // Polls come back empty: nothing is wrong that could be seen but that BigChat has nothing new to tell.
    bench.execute(&format!("UPDATE poll_state SET newest_event = {old}"));
    measured
        .until_signs("stale data", (true, false, true))
        .await;
    sim.bigchat
        .push_raw(message(2, seconds(&sim) - 1, "Still there?"));
    measured.until_signs("news", all_well).await;

    sim.bigchat.faults.outage(Some(Fault::Drop));
    measured
        .until_signs("a stuck source", (false, true, true))
        .await;
    assert_eq!(
        measured.value(&format!("{up}{{api=\"bigchat\"}}")).await,
        0.0
    );
    assert_eq!(
        measured.value(&format!("{up}{{api=\"our_api\"}}")).await,
        1.0
    );
    sim.bigchat.faults.outage(None);
    measured.until_signs("the source is back", all_well).await;

    sim.our_api.faults.outage(Some(Fault::Status(503)));
    sim.bigchat
        .push_raw(message(2, seconds(&sim) - 1, "And now?"));
    measured
        .until_signs("a stuck delivery", (true, true, false))
        .await;
    assert_eq!(measured.value("bigchat_sync_waiting_events").await, 1.0);
    let open = "bigchat_sync_breaker_open{api=\"our_api\"}";
    assert_eq!(measured.value(open).await, 1.0);
    sim.our_api.faults.outage(None);
    measured.until_signs("delivery goes on", all_well).await;
    assert_eq!(measured.value(open).await, 0.0);
    measured.daemon.stop().await;
}

#[tokio::test]
async fn what_must_not_happen_often_is_counted() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let now = seconds(&sim);
    sim.bigchat.open(2, now - 60, 1);
    sim.bigchat.push_raw(json!({"event_name": "RENAMED"}));
    let add = "POST /chats/{id}/messages";
    sim.our_api.faults.script(add, When::After, Fault::Drop, 1);
    sim.bigchat.push_raw(message(2, now - 1, "Hello"));
    let measured = Measured::start(&bench);
    bench.until_events("delivered", 1).await;
    until("an unknown outcome", async || {
        measured.value("bigchat_sync_unknown_outcomes_total").await == 1.0
    })
    .await;
    let series = "bigchat_sync_requests_total{api=\"our_api\",route=\"POST /chats/{id}/messages\",status=\"lost\"}";
    assert_eq!(measured.value(series).await, 1.0);
    assert_eq!(
        measured
            .value("bigchat_sync_events_told_total{kind=\"UNREADABLE\"}")
            .await,
        1.0
    );
    sim.our_api.wipe();
    sim.bigchat.push_raw(message(2, now, "Where are you?"));
    agrees(&sim, &bench).await;
    until("a loss", async || {
        measured.value("bigchat_sync_our_api_losses_total").await >= 1.0
    })
    .await;
    let rebuilt = "bigchat_sync_chats_rebuilt_total{chat=\"missing\"}";
    assert_eq!(measured.value(rebuilt).await, 1.0);
    measured.daemon.stop().await;
}

#[tokio::test]
async fn without_the_journal_there_is_still_what_the_process_knows() {
    let (_sim, bench) = scripted(our_api::Options::default()).await;
    let measured = Measured::start(&bench);
    until("a poll", async || {
        measured
            .value("bigchat_sync_polls_total{outcome=\"complete\"}")
            .await
            > 0.0
    })
    .await;
    let away = bench.directory().join("away.db");
    std::fs::rename(bench.db(), &away).expect("it is moved");
    until("it is told", async || {
        measured.value("bigchat_sync_journal_writable").await == 0.0
    })
    .await;
    assert!(
        measured
            .value("bigchat_sync_polls_total{outcome=\"journal_failed\"}")
            .await
            > 0.0
    );
    std::fs::rename(away, bench.db()).expect("it is moved back");
    until("it is told", async || {
        measured.value("bigchat_sync_journal_writable").await == 1.0
    })
    .await;
    measured.daemon.stop().await;
}

/// Has promtool read what is given to it.
fn promtool(arguments: &[&str], input: &str) {
    let mut promtool = Command::new("promtool")
        .args(arguments)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src/metrics"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool, from the package prometheus");
    let mut stdin = promtool.stdin.take().expect("its input");
    // What does not read it needs none.
    stdin.write_all(input.as_bytes()).ok();
    drop(stdin);
    let output = promtool.wait_with_output().expect("its output");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success(), "{arguments:?}: {said}\n{input}");
}

#[tokio::test]
#[ignore = "needs promtool"]
async fn promtool_accepts_the_metrics_and_alerts_go_off_by_them() {
    let options = bigchat::Options {
        seed: 13,
        ..bigchat::Options::default()
    };
    let (sim, bench) = sim(options, our_api::Options::default()).await;
    let measured = Measured::start(&bench);
    let add = "POST /chats/{id}/messages";
    sim.our_api.faults.script(add, When::After, Fault::Drop, 1);
    crate::daemon::more_told(&sim, 60).await;
    sim.our_api.wipe();
    crate::daemon::more_told(&sim, 60).await;
    sim.bigchat.set_quiet(true);
    agrees(&sim, &bench).await;
    let text = measured.text().await;
    promtool(&["check", "metrics"], &text);
    promtool(&["check", "rules", "alerts.yml"], "");
    promtool(&["test", "rules", "alerts_test.yml"], "");
    let rules = include_str!("../../src/metrics/alerts.yml");
    let names = rules
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("bigchat_sync_"));
    for name in names {
        let is_there = text.lines().any(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with(['{', ' ']))
        });
        assert!(is_there, "an alert goes by {name}, which there is not");
    }
    measured.daemon.stop().await;
}
