//! The metrics match the services' own counts, and show which part has a problem.

use crate::harness::process::{fed, printed};
use crate::harness::services::{ADD_MESSAGE, seeded};
use crate::harness::web::{client, sent};
use crate::harness::{Bench, Daemon, run_live_test, run_test, run_with, until};
use bigchat_sync::simulator::bigchat::page;
use bigchat_sync::simulator::event::message;
use bigchat_sync::simulator::fault::{dropped, status};
use std::process::Command;

use bigchat_sync::settings::Tokens;
use reqwest::header::CONTENT_TYPE;
use serde_json::json;

/// A daemon and its metrics.
struct Measured {
    daemon: Daemon,
    url: String,
}

impl Measured {
    fn start(t: &Bench) -> Self {
        let (daemon, url) = t.start_listening(Tokens::default());
        Self { daemon, url }
    }

    async fn text(&self) -> String {
        let answer = sent(client().get(format!("{}/metrics", self.url))).await;
        let kind = answer.headers()[CONTENT_TYPE].to_str().expect("a kind");
        assert_eq!(kind, "text/plain; version=0.0.4; charset=utf-8");
        answer.text().await.expect("a text")
    }

    /// The value of a sample; 0 if it is missing.
    async fn value(&self, series: &str) -> f64 {
        value(&self.text().await, series).unwrap_or_default()
    }

    /// Whether polls complete, BigChat's events are recent, and events are delivered.
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

/// The sum of all samples with that prefix.
fn sum(text: &str, series: &str) -> f64 {
    let samples = text.lines().filter(|line| line.starts_with(series));
    samples
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

/// Requests and events are counted as in the services and the journal.
#[tokio::test]
async fn counts_match_the_services() {
    run_with(seeded(12), async |t| {
        let measured = Measured::start(t);
        t.bigchat.reports_more(60).await;
        t.bigchat.calms_down();
        t.agrees().await;
        let same = async |api: &str, total: &dyn Fn() -> u64| {
            let (before, text, after) = (total(), measured.text().await, total());
            let of_api =
                |series: &str| sum(&text, &format!("bigchat_sync_{series}{{api=\"{api}\""));
            let (total, took) = (
                of_api("requests_total"),
                of_api("request_duration_seconds_count"),
            );
            // A GET over a connection that the service had closed was lost and sent again.
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
            same("our_api", &|| t.our_api.total()).await
        })
        .await;
        until("BigChat's requests", async || {
            same("bigchat", &|| t.bigchat.total()).await
        })
        .await;
        let text = measured.text().await;
        for (kind, events) in ["START", "END", "MESSAGE", "TRANSFER"].map(|kind| {
            let events = t.count_events(&format!("kind = '{kind}'"));
            (kind, events as f64)
        }) {
            let series = format!("bigchat_sync_events_received_total{{kind=\"{kind}\"}}");
            assert_eq!(value(&text, &series), Some(events), "{kind}");
        }
        let (delivered, failed) = (t.events("delivered"), t.events("failed"));
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
    })
    .await;
}

/// The metrics distinguish a stuck source, stale data and a stuck delivery.
#[tokio::test]
async fn stuck_source_and_stuck_delivery() {
    run_live_test(async |t| {
        let old = t.now() - 3600;
        t.bigchat.open(2, old, 1);
        t.bigchat.reports_event(message(2, t.now() - 1, "Hello"));
        let measured = Measured::start(t);
        let (all_healthy, up) = ((true, true, true), "bigchat_sync_api_up");
        measured
            .until_signs("everything is healthy", all_healthy)
            .await;

        // Polls are empty, so the only sign is that BigChat reports nothing new. Waiting a minute for that would take
        // too long.
        t.execute(&format!("UPDATE poll_state SET newest_event = {old}"));
        measured
            .until_signs("stale data", (true, false, true))
            .await;
        t.bigchat
            .reports_event(message(2, t.now() - 1, "Still there?"));
        measured.until_signs("news", all_healthy).await;

        t.bigchat.outage(Some(dropped()));
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
        t.bigchat.outage(None);
        measured
            .until_signs("the source is back", all_healthy)
            .await;

        t.our_api.outage(Some(status(503)));
        t.bigchat.reports_event(message(2, t.now() - 1, "And now?"));
        measured
            .until_signs("a stuck delivery", (true, true, false))
            .await;
        assert_eq!(measured.value("bigchat_sync_waiting_events").await, 1.0);
        let open = "bigchat_sync_breaker_open{api=\"our_api\"}";
        assert_eq!(measured.value(open).await, 1.0);
        t.our_api.outage(None);
        measured
            .until_signs("delivery continues", all_healthy)
            .await;
        assert_eq!(measured.value(open).await, 0.0);
        measured.daemon.stop().await;
    })
    .await;
}

/// Unknown outcomes, losses and unparsable events are counted.
#[tokio::test]
async fn rare_incidents_are_counted() {
    run_live_test(async |t| {
        t.fails(1);
        let now = t.now();
        t.bigchat.open(2, now - 60, 1);
        t.bigchat.reports_event(json!({"event_name": "RENAMED"}));
        t.our_api.upset(ADD_MESSAGE, dropped().carried_out());
        t.bigchat.reports_event(message(2, now - 1, "Hello"));
        let measured = Measured::start(t);
        t.until_events("delivered", 1).await;
        until("an unknown outcome", async || {
            measured.value("bigchat_sync_unknown_outcomes_total").await == 1.0
        })
        .await;
        let series = concat!(
            r#"bigchat_sync_requests_total{api="our_api","#,
            r#"route="POST /chats/{id}/messages",status="lost"}"#
        );
        assert_eq!(measured.value(series).await, 1.0);
        assert_eq!(
            measured
                .value("bigchat_sync_events_received_total{kind=\"UNREADABLE\"}")
                .await,
            1.0
        );
        t.our_api.loses_everything();
        t.bigchat.reports_event(message(2, now, "Where are you?"));
        t.agrees().await;
        until("a loss", async || {
            measured.value("bigchat_sync_our_api_losses_total").await >= 1.0
        })
        .await;
        let rebuilt = "bigchat_sync_chats_rebuilt_total{chat=\"missing\"}";
        assert_eq!(measured.value(rebuilt).await, 1.0);
        measured.daemon.stop().await;
    })
    .await;
}

/// If the journal refuses a page, the events of the pages before it are counted and delivered.
#[tokio::test]
async fn page_that_cannot_be_ingested() {
    run_test(async |t| {
        t.once().await;
        t.execute(
            "CREATE TRIGGER refuses BEFORE INSERT ON events WHEN NEW.data LIKE '%two%'
             BEGIN SELECT RAISE(ABORT, 'refused'); END",
        );
        t.bigchat.reports(page([message(42, 1, "one")], "?page=2"));
        t.bigchat.reports([message(42, 2, "two")]);
        let measured = Measured::start(t);
        let received = async |count| {
            until("received events", async || {
                let series = "bigchat_sync_events_received_total{kind=\"MESSAGE\"}";
                measured.value(series).await == count
            })
            .await;
        };
        t.until_events("delivered", 1).await;
        received(1.0).await;
        t.execute("DROP TRIGGER refuses");
        t.until_events("delivered", 2).await;
        received(2.0).await;
        measured.daemon.stop().await;
    })
    .await;
}

#[tokio::test]
async fn metrics_without_the_journal() {
    run_live_test(async |t| {
        let measured = Measured::start(t);
        until("a poll", async || {
            measured
                .value("bigchat_sync_polls_total{outcome=\"complete\"}")
                .await
                > 0.0
        })
        .await;
        let away = t.directory().join("away.db");
        std::fs::rename(t.db(), &away).expect("it is moved");
        until("the journal refuses", async || {
            measured.value("bigchat_sync_journal_writable").await == 0.0
        })
        .await;
        assert!(
            measured
                .value("bigchat_sync_polls_total{outcome=\"journal_failed\"}")
                .await
                > 0.0
        );
        std::fs::rename(away, t.db()).expect("it is moved back");
        until("the journal can be written again", async || {
            measured.value("bigchat_sync_journal_writable").await == 1.0
        })
        .await;
        measured.daemon.stop().await;
    })
    .await;
}

/// Runs promtool with this input.
fn promtool(arguments: &[&str], input: &str) {
    let mut promtool = Command::new("promtool");
    promtool
        .args(arguments)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src/metrics"));
    let output = fed(&mut promtool, input).expect("promtool, from the package prometheus");
    let all = printed(&output);
    assert!(output.status.success(), "{arguments:?}: {all}\n{input}");
}

#[tokio::test]
#[ignore = "needs promtool"]
async fn promtool_accepts_metrics_and_alerts() {
    run_with(seeded(13), async |t| {
        let measured = Measured::start(t);
        t.our_api.upset(ADD_MESSAGE, dropped().carried_out());
        t.bigchat.reports_more(60).await;
        t.our_api.loses_everything();
        t.bigchat.reports_more(60).await;
        t.bigchat.calms_down();
        t.agrees().await;
        let text = measured.text().await;
        promtool(&["check", "metrics"], &text);
        promtool(&["check", "rules", "alerts.yml"], "");
        promtool(&["test", "rules", "alerts_test.yml"], "");
        let rules = include_str!("../../../src/metrics/alerts.yml");
        let names = rules
            .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .filter(|word| word.starts_with("bigchat_sync_"));
        for name in names {
            let is_there = text.lines().any(|line| {
                line.strip_prefix(name)
                    .is_some_and(|rest| rest.starts_with(['{', ' ']))
            });
            assert!(is_there, "an alert uses {name}, which does not exist");
        }
        measured.daemon.stop().await;
    })
    .await;
}
