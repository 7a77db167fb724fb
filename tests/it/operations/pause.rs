//! `bigchat-sync pause` and `resume`: during a pause, polling continues, and nothing is sent to OurAPI.

use std::fs::File;
use std::time::Duration;

use bigchat_sync::settings::Tokens;
use bigchat_sync::simulator::event::{message, start};
use bigchat_sync::simulator::fault::{paused, status};
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::harness::process::{Process, printed};
use crate::harness::web::{client, sent};
use crate::harness::{Bench, Test, run_live_test, run_test, until};

/// Runs a command to its end, and returns its exit code and what it printed.
fn command(t: &Bench, name: &str, arguments: &[&str]) -> (Option<i32>, String) {
    let output = t.program(name).args(arguments).output();
    let output = output.expect("a process");
    (output.status.code(), printed(&output))
}

fn pause(t: &Bench, arguments: &[&str]) -> String {
    let (code, text) = command(t, "pause", arguments);
    assert_eq!(code, Some(0), "{text}");
    text
}

fn resume(t: &Bench) -> String {
    let (code, text) = command(t, "resume", &[]);
    assert_eq!(code, Some(0), "{text}");
    text
}

/// Waits until the daemon is paused and requests in flight have ended. Returns the number of requests that OurAPI has
/// received.
async fn until_paused(t: &Test, daemon: &Process) -> u64 {
    until("the pause takes effect", async || {
        daemon.lines_with("polling continues") > 0 && t.our_api.open_requests() == 0
    })
    .await;
    t.our_api.total()
}

#[tokio::test]
async fn paused_daemon_polls_and_sends_nothing() {
    run_live_test(async |t| {
        let now = t.now();
        for id in [10, 11] {
            t.bigchat.open(id, now - 100, 1);
        }
        let daemon = Process::start(t);
        t.bigchat.reports([message(10, now - 5, "before")]);
        t.until_events("delivered", 1).await;
        t.our_api.outage(Some(status(503)));
        t.bigchat
            .reports([message(10, now - 4, "during the outage")]);
        daemon.until_logged_times("OurAPI is down", 1).await;

        let text = pause(t, &["--for", "1h"]);
        assert!(
            text.contains("a running daemon continues to poll"),
            "{text}"
        );
        let asked = until_paused(t, &daemon).await;
        t.bigchat
            .reports([message(11, now - 3, "during the pause")]);
        t.until_events("waiting", 2).await;
        t.bigchat.further_polls(20).await;
        assert_eq!(t.our_api.total(), asked, "not even a probe");

        // During OurAPI's maintenance, the daemon restarts.
        t.our_api.down().await;
        t.our_api.loses_everything();
        assert!(daemon.stop().await.success());
        t.execute("UPDATE conversations SET waiting_since = waiting_since - 3600000");
        t.our_api.up().await.expect("it is up");
        t.our_api.outage(None);
        let daemon = Process::start(t);
        t.bigchat.further_polls(10).await;
        assert_eq!(t.our_api.total(), asked, "the pause survives a restart");
        let (status, is_healthy) = t.status();
        assert!(is_healthy, "{status}");
        assert!(status["paused"]["until"].is_string() || status["paused"]["until"].is_i64());
        let (code, text) = command(t, "status", &[]);
        assert_eq!(code, Some(0), "{text}");
        assert!(text.contains("`bigchat-sync resume` ends"), "{text}");
        assert!(text.contains("deliveries are paused"), "{text}");

        assert!(resume(t).contains("deliveries resume"));
        t.agrees().await;
        assert_eq!(daemon.lines_with("deliveries resume"), 1);
        // Events that waited because of the pause are not late. The state of OurAPI is recorded within a second.
        until("there is no problem", async || t.status().1).await;
        assert!(resume(t).contains("are not paused"));
        assert!(daemon.stop().await.success());
    })
    .await;
}

#[tokio::test]
async fn pause_ends_automatically() {
    run_live_test(async |t| {
        t.once().await;
        t.bigchat.open(10, t.now() - 100, 1);
        let text = pause(t, &["--for", "2s"]);
        assert!(text.contains("no daemon is running"), "{text}");
        let daemon = t.start();
        t.bigchat.reports([message(10, t.now() - 1, "held back")]);
        t.until_events("delivered", 1).await;
        let in_time =
            "SELECT (SELECT min(delivered_at) FROM deliveries) >= paused_until FROM control";
        assert!(t.value::<bool>(in_time), "not before the end");
        let resumed = "SELECT coalesce(resumed_at >= paused_until, 0) FROM control";
        until("the end is recorded", async || t.value::<bool>(resumed)).await;
        daemon.stop().await;
    })
    .await;
}

#[tokio::test]
async fn once_while_paused_only_polls() {
    run_live_test(async |t| {
        t.once().await;
        let asked = t.our_api.total();
        pause(t, &[]);
        t.bigchat.open(10, t.now() - 100, 1);
        t.bigchat.reports([message(10, t.now() - 1, "held back")]);
        let (code, text) = command(t, "once", &[]);
        assert_eq!(code, Some(0), "{text}");
        assert!(
            text.contains("nothing was delivered: deliveries are paused"),
            "{text}"
        );
        assert_eq!(t.events("waiting"), 1);
        let (_, text) = command(t, "check", &[]);
        assert!(text.contains("is not asked: deliveries are"), "{text}");
        assert_eq!(t.our_api.total(), asked);
        resume(t);
        t.once().await;
    })
    .await;
}

#[tokio::test]
async fn pause_interrupts_a_long_conversation() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.our_api.set_latency(Duration::from_millis(20));
        let many = (0..200).map(|n| message(10, now - 5, &format!("message {n}")));
        t.bigchat.reports(many.collect::<Vec<_>>());
        let daemon = Process::start(t);
        until("it is amid the messages", async || {
            t.our_api.message_count() > 3
        })
        .await;
        pause(t, &[]);
        let asked = until_paused(t, &daemon).await;
        let sent = t.our_api.message_count();
        assert!(sent < 200, "{sent}");
        t.bigchat.further_polls(10).await;
        assert_eq!(t.our_api.total(), asked);
        assert_eq!(t.value::<i64>("SELECT count(*) FROM attempts"), 0);
        t.our_api.set_latency(Duration::ZERO);
        resume(t);
        t.agrees().await;
        assert!(daemon.stop().await.success());
    })
    .await;
}

/// `verify` waits for the end of a pause.
#[tokio::test]
async fn verify_waits_for_resume() {
    run_live_test(async |t| {
        t.bigchat.open(10, t.now() - 100, 1);
        t.bigchat.reports([message(10, t.now() - 1, "delivered")]);
        t.once().await;
        let asked = t.our_api.total();
        pause(t, &[]);
        let verify = Process::start_as(t, t.program("verify"));
        verify.until_logged("deliveries are paused").await;
        assert_eq!(t.our_api.total(), asked);
        resume(t);
        assert!(verify.ended().await.success());
        assert!(t.our_api.total() > asked);
    })
    .await;
}

#[tokio::test]
async fn console_pauses_and_resumes() {
    run_live_test(async |t| {
        let (daemon, url) = t.start_listening(Tokens::default());
        let client = client();
        let get = async |path: &str| {
            let answer = sent(client.get(format!("{url}{path}"))).await;
            (answer.status(), answer.text().await.expect("a text"))
        };
        let post = async |path: &str, body: Value| {
            let request = client.post(format!("{url}{path}"));
            let request = request.header("x-bigchat-sync", "1").json(&body);
            let answer = sent(request).await;
            (answer.status(), answer.text().await.expect("a text"))
        };
        until("it is ready", async || get("/readyz").await.1 == "ok\n").await;
        for bad in [json!({"seconds": 0}), json!({"minutes": 1}), json!([])] {
            let (code, _) = post("/api/pause", bad.clone()).await;
            assert!(code.is_client_error(), "{bad}");
        }
        assert_eq!(get("/readyz").await.1, "ok\n");

        let (code, text) = post("/api/pause", json!({"seconds": 3600})).await;
        assert_eq!(code, StatusCode::OK, "{text}");
        let (code, text) = get("/readyz").await;
        assert_eq!(code, StatusCode::OK);
        assert!(
            text.starts_with("ok: deliveries are paused until"),
            "{text}"
        );
        assert_eq!(get("/healthz").await, (StatusCode::OK, "ok\n".into()));
        let metrics = get("/metrics").await.1;
        assert!(metrics.contains("\nbigchat_sync_paused 1.0\n"), "{metrics}");
        assert!(metrics.contains("\nbigchat_sync_paused_until_timestamp_seconds 1"));
        let now = t.now();
        let asked = t.our_api.total();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.reports([message(10, now - 1, "held back")]);
        t.until_events("waiting", 1).await;
        t.bigchat.further_polls(10).await;
        assert_eq!(t.our_api.total(), asked);
        assert!(!t.status().0["paused"].is_null());

        let (code, text) = post("/api/resume", json!({})).await;
        assert_eq!(code, StatusCode::OK, "{text}");
        t.until_events("delivered", 1).await;
        assert_eq!(get("/readyz").await.1, "ok\n");
        let metrics = get("/metrics").await.1;
        assert!(metrics.contains("\nbigchat_sync_paused 0.0\n"), "{metrics}");
        assert!(t.status().0["paused"].is_null());
        daemon.stop().await;
    })
    .await;
}

/// A paused daemon does not keep the lock of a request that timed out.
#[tokio::test]
async fn paused_daemon_releases_the_lock() {
    run_live_test(async |t| {
        let path = t.directory().join("our-api.lock");
        t.set("--our-api-lock", &path.display().to_string());
        t.set("--request-timeout", "1s");
        t.start();
        t.bigchat.open(10, t.now() - 100, 1);
        t.our_api.upset("POST /chats/{id}/messages", paused());
        t.bigchat.reports([message(10, t.now() - 1, "hello")]);
        until("OurAPI hangs", async || t.our_api.pausing() == 1).await;
        pause(t, &[]);
        until("the request has timed out", async || t.attempts() == 1).await;
        t.our_api.resume();
        let lock = File::open(&path).expect("the file");
        until("the lock is free", async || lock.try_lock().is_ok()).await;
        drop(lock);
        resume(t);
        t.until_events("delivered", 1).await;
    })
    .await;
}

/// A `verify` that has taken the daemon's place does not poll.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pause_during_a_verification_without_a_daemon() {
    run_test(async |t| {
        t.bigchat.reports([start(42, 0), message(42, 1, "hello")]);
        t.once().await;
        t.our_api.upset("GET /chats", paused());
        let verify = Process::start_as(t, t.program("verify"));
        until("the verification", async || t.our_api.pausing() == 1).await;
        let polls = t.bigchat.polls();
        let (_, text) = command(t, "pause", &[]);
        assert_eq!(t.bigchat.polls(), polls);
        command(t, "resume", &[]);
        t.our_api.resume();
        verify.ended().await;
        assert!(!text.contains("polling continues"), "{text}");
    })
    .await;
}
