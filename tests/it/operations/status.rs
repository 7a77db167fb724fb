//! `bigchat-sync status`, `check` and `once`: each problem with its remedy, and no request beside a running daemon.

use crate::harness::journal::failed_messages;
use crate::harness::process::{Process, Signal, finished, printed, program};
use crate::harness::services::ADD_MESSAGE;
use crate::harness::{Bench, Daemon, Test, run_live_test, side_by_side, until};
use bigchat_sync::domain::time::Millis;
use bigchat_sync::http::Api;
use bigchat_sync::journal::Store;
use bigchat_sync::simulator::bigchat::page;
use bigchat_sync::simulator::event::{end, message};
use bigchat_sync::simulator::fault::{overdue, status};
use std::process::Output;
use std::time::Duration;

use serde_json::{Value, json};
use wiremock::matchers::{method, path};
use wiremock::{Mock, MockServer, ResponseTemplate};

/// A delivered conversation, and the daemon that delivered it.
pub(super) async fn delivered(t: &Test) -> Daemon {
    let now = t.now();
    t.bigchat.open(10, now - 100, 1);
    let events = vec![message(10, now - 5, "hello"), end(10, now - 4)];
    t.bigchat.reports(events);
    let daemon = t.start();
    t.agrees().await;
    t.until_events("delivered", 2).await;
    daemon
}

/// Two more messages of the conversation that [`delivered`] has opened.
pub(super) fn more_messages(t: &Test) {
    let now = t.now();
    let messages = [message(10, now, "anybody?"), message(10, now, "Hello?")];
    t.bigchat.reports(messages);
}

fn problems(status: &Value) -> Vec<String> {
    let problems = status["problems"].as_array().expect("an array");
    for problem in problems {
        assert!(
            problem["remedy"]
                .as_str()
                .is_some_and(|remedy| !remedy.is_empty())
        );
    }
    problems
        .iter()
        .map(|problem| problem["what"].as_str().expect("text").to_owned())
        .collect()
}

/// Waits until the status has exactly the problems that begin with these texts.
pub(super) async fn until_problems(t: &Bench, expected: &[&str]) -> Value {
    let mut last = Value::Null;
    until(&format!("{expected:?}"), async || {
        let (status, healthy) = t.status();
        assert_eq!(json!(healthy), status["healthy"]);
        let problems = problems(&status);
        let as_expected = problems.len() == expected.len()
            && problems
                .iter()
                .zip(expected)
                .all(|(is, should)| is.starts_with(should));
        last = status;
        as_expected
    })
    .await;
    last
}

async fn until_found_up(t: &Bench) {
    until("what the daemon found is stored", async || {
        [Api::BigChat, Api::OurApi].map(|api| t.is_up(api)) == [Some(true); 2]
    })
    .await;
}

pub(super) async fn check(t: &Bench) -> (bool, String) {
    let Output { status, stdout, .. } = finished(t.program("check")).await;
    (status.success(), String::from_utf8(stdout).expect("text"))
}

/// The status shows each problem, with a remedy, whether or not a daemon is running.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_with_and_without_daemon() {
    run_live_test(async |t| {
        let daemon = delivered(t).await;
        until_found_up(t).await;
        let status = until_problems(t, &[]).await;
        assert_eq!(status["daemon_runs"], json!(true));
        assert_eq!(status["our_api"]["state"], json!("up"));
        assert_eq!(
            (&status["waiting"], &status["failed"]),
            (&json!(0), &json!(0))
        );
        assert_eq!(status["delivery_ms"]["count"], json!(2));
        // The journal is younger than the period over which rates are measured.
        for rate in ["received_per_minute", "delivered_per_minute"] {
            assert!(
                status[rate].as_f64().is_some_and(|rate| rate > 0.9),
                "{status}"
            );
        }
        assert!(
            status["behind_s"]
                .as_i64()
                .is_some_and(|behind| behind < 60)
        );
        // Over four minutes, the rate is lower.
        t.execute("UPDATE activity SET minute = minute - 4");
        let (status, _) = t.status();
        for rate in ["received_per_minute", "delivered_per_minute"] {
            assert!(
                status[rate].as_f64().is_some_and(|rate| rate < 0.6),
                "{status}"
            );
        }

        t.our_api.down().await;
        let now = t.now();
        t.bigchat
            .reports([message(10, now, "anybody?"), message(10, now, "k")]);
        let status = until_problems(t, &["OurAPI has been down since "]).await;
        assert_eq!(status["waiting"], json!(2));
        assert_eq!(status["oldest_waiting"]["conversation"], json!(10));
        let since = status["our_api"]["since"].clone();

        daemon.stop().await;
        let stopped = [
            "no daemon is running on this database",
            "OurAPI has been down since ",
        ];
        until_problems(t, &stopped).await;
        t.bigchat.down().await;
        t.start();
        let down = [
            "BigChat has been down since ",
            "OurAPI has been down since ",
        ];
        let status = until_problems(t, &down).await;
        assert_eq!(
            status["our_api"]["since"], since,
            "a restart changes nothing about it"
        );

        t.our_api.up().await.expect("it is up");
        t.bigchat.up().await.expect("it is up");
        let status = until_problems(t, &["1 failed event needs action"]).await;
        let reasons = status["failed_by_reason"].as_array().expect("an array");
        assert_eq!(reasons.len(), 1);
        let reason = reasons[0]["reason"].as_str().expect("a reason");
        assert_eq!(reasons[0]["count"], json!(1));
        let text = t.program("status").output().expect("a process");
        let text = String::from_utf8(text.stdout).expect("text");
        assert!(text.contains(&format!("1 × {reason}")), "{text}");
        t.failed_command(&["discard", "--yes", "--reason", "another one"])
            .expect_err("no event has that reason");
        assert_eq!(t.events("failed"), 1);
        t.failed_command(&["discard", "--yes", "--reason", reason])
            .expect("it is done");
        until_problems(t, &[]).await;
    })
    .await;
}

/// `check` sends requests to the APIs only if no daemon is running.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_beside_a_daemon() {
    run_live_test(async |t| {
        let daemon = delivered(t).await;
        until_found_up(t).await;
        let (polls, requests) = (t.bigchat.polls(), t.our_api.total());
        let (passed, report) = check(t).await;
        assert!(passed, "{report}");
        assert!(
            report.contains("the results for the APIs are from its latest requests"),
            "{report}"
        );
        assert_eq!(t.our_api.total(), requests, "OurAPI is not asked beside it");
        let db = t.db();
        let elsewhere = program()
            .args(["check", "--our-api-url", "http://127.0.0.1:9"])
            .args(["--bigchat-url", &t.bigchat.url(), "--db"])
            .arg(&db)
            .output()
            .expect("a process");
        let report = String::from_utf8_lossy(&elsewhere.stdout);
        assert!(
            !elsewhere.status.success()
                && report.contains("the daemon uses another URL for this API"),
            "{report}"
        );
        daemon.stop().await;

        let polled = t.bigchat.polls();
        assert!(polled >= polls);
        let (passed, report) = check(t).await;
        assert!(passed, "{report}");
        assert_eq!(
            t.our_api.total(),
            requests + 2,
            "what it is, and whether it answers"
        );
        assert_eq!(
            t.bigchat.polls(),
            polled,
            "BigChat reports everything only once"
        );

        t.our_api.down().await;
        let (passed, report) = check(t).await;
        assert!(
            !passed && report.contains("FAIL  OurAPI") && report.contains("--our-api-url"),
            "{report}"
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_of_wrong_settings() {
    // Each server describes itself.
    let server = async |title: &str, route: &str, answers: &str, body: Value| {
        let server = MockServer::start().await;
        let description = json!({"info": {"title": title, "version": "1"}, "paths": {route: {}}});
        for (asked, body) in [("/openapi.json", description), (answers, body)] {
            let mock = Mock::given(method("GET")).and(path(asked));
            mock.respond_with(ResponseTemplate::new(200).set_body_json(body))
                .mount(&server)
                .await;
        }
        server
    };
    let bigchat = json!({"conversation_id": 1, "advisor_id": 1, "events": []});
    let bigchat = server("Big Chat", "/events", "/conversations/1", bigchat).await;
    let our_api = server("Our API", "/chats", "/chats", json!([])).await;
    let bench = Bench::new(&bigchat.uri(), &our_api.uri());
    let (passed, report) = check(&bench).await;
    assert!(
        passed && report.contains("says it is \"Big Chat 1\""),
        "{report}"
    );
    assert!(!bench.db().exists(), "`check` creates no database");

    let swapped = Bench::new(&our_api.uri(), &bigchat.uri());
    let (passed, report) = check(&swapped).await;
    assert!(!passed, "{report}");
    assert_eq!(
        report.matches("are the two URLs swapped?").count(),
        2,
        "{report}"
    );

    let twice = Bench::new(&our_api.uri(), &our_api.uri());
    let (passed, report) = check(&twice).await;
    assert!(
        !passed && report.contains("--bigchat-url and --our-api-url are the same"),
        "{report}"
    );

    bench.set("--listen", "0.0.0.0:8268");
    let (passed, report) = check(&bench).await;
    assert!(
        !passed && report.contains("BIGCHAT_SYNC_CONSOLE_TOKEN"),
        "{report}"
    );

    std::fs::write(bench.db(), "Dear diary").expect("a file");
    let (passed, report) = check(&bench).await;
    assert!(
        !passed && report.contains("is not a bigchat-sync database"),
        "{report}"
    );
}

/// The exit code of `once` shows whether everything was read and delivered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exit_code_of_once() {
    run_live_test(async |t| {
        let daemon = delivered(t).await;
        daemon.stop().await;
        let once = async || {
            let ended = finished(t.program("once")).await;
            let text = String::from_utf8_lossy(&ended.stderr).into_owned();
            (ended.status.code(), text)
        };
        assert_eq!(once().await.0, Some(0));
        t.our_api.down().await;
        let events = vec![message(10, t.now(), "anybody?")];
        t.bigchat.reports(events);
        let (code, text) = once().await;
        assert!(
            code == Some(1) && text.contains("events not delivered yet: 1"),
            "{text}"
        );
        t.bigchat.down().await;
        let (code, text) = once().await;
        assert!(
            code == Some(1) && text.contains("BigChat was not read"),
            "{text}"
        );
        t.bigchat.up().await.expect("it is up");
        t.our_api.up().await.expect("it is up");
        until("the event is due again", async || {
            t.value::<i64>("SELECT max(due_at) FROM conversations") <= Millis::now().0
        })
        .await;
        let (code, text) = once().await;
        assert_eq!(code, Some(0), "{text}");
        t.until_events("delivered", 3).await;
    })
    .await;
}

/// Before the first verification pass, the status shows when it begins. Long delays are shown in seconds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_before_first_verification() {
    run_live_test(async |t| {
        let daemon = delivered(t).await;
        t.execute("UPDATE deliveries SET waited = 20660");
        until("the status says so", async || {
            let ended = finished(t.program("status")).await;
            let text = String::from_utf8(ended.stdout).expect("text");
            text.contains("verification  none yet; the first begins at 20")
                && text.contains("median 20.7 s, p95 20.7 s, max 20.7 s")
        })
        .await;
        daemon.stop().await;
    })
    .await;
}

/// If a token cannot be read, no request is sent to the APIs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_without_token_file() {
    run_live_test(async |t| {
        let mut check = t.program("check");
        check.env("BIGCHAT_SYNC_OUR_API_TOKEN_FILE", "/does/not/exist");
        let ended = finished(check).await;
        let report = String::from_utf8(ended.stdout).expect("text");
        assert!(
            !ended.status.success() && report.contains("FAIL  settings"),
            "{report}"
        );
        assert!(report.contains("the APIs are not asked"), "{report}");
        assert_eq!((t.bigchat.total(), t.our_api.total()), (0, 0));
    })
    .await;
}

/// The number of requests that OurAPI receives before it has carried out the one in flight.
async fn requests_meanwhile(t: &Test) -> u64 {
    let (asked, mut meanwhile) = (t.our_api.total(), 0);
    until("it is carried out", async || {
        let total = t.our_api.total();
        let is_in_flight = t.our_api.pausing() > 0;
        if is_in_flight {
            meanwhile = total - asked;
        }
        !is_in_flight
    })
    .await;
    meanwhile
}

/// `check` waits for the last request of a daemon that has crashed, which may still be in flight.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_after_crash_waits_for_request() {
    run_live_test(async |t| {
        t.set("--request-timeout", "4s");
        t.bigchat.open(10, t.now() - 100, 1);
        t.our_api
            .upset(ADD_MESSAGE, overdue(Duration::from_secs(3)));
        t.bigchat.reports([message(10, t.now() - 5, "hello")]);
        let daemon = t.start();
        until("it is in flight", async || t.our_api.pausing() == 1).await;
        daemon.crash(t).await;
        let ((passed, report), meanwhile) = tokio::join!(check(t), requests_meanwhile(t));
        assert!(passed, "{report}");
        assert_eq!(meanwhile, 0, "requests while one was in flight");
        t.start();
        t.until_events("delivered", 1).await;
    })
    .await;
}

/// A daemon waits for a request of `check`, which may still be in flight when the daemon starts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn daemon_waits_for_request_of_check() {
    side_by_side([true, false], async |is_killed| {
        run_live_test(async |t| {
            let daemon = delivered(t).await;
            daemon.stop().await;
            // The check gives up after 2 s, but OurAPI carries the request out after 3 s.
            t.set("--request-timeout", if is_killed { "4s" } else { "2s" });
            t.our_api
                .upset("GET /chats", overdue(Duration::from_secs(3)));
            let check = Process::start_as(t, t.program("check"));
            until("it is in flight", async || t.our_api.pausing() == 1).await;
            if is_killed {
                check.signal(Signal::KILL);
            }
            check.ended().await;
            assert_eq!(t.our_api.pausing(), 1, "still in flight");
            t.bigchat.reports([message(10, t.now() - 1, "later")]);
            t.start();
            assert_eq!(
                requests_meanwhile(t).await,
                0,
                "requests while one was in flight"
            );
            t.until_events("delivered", 3).await;
        })
        .await;
    })
    .await;
}

/// The wait of a retried dead letter begins with the retry.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wait_begins_with_the_retry() {
    // The event is above the offset in the first case, and not in the second.
    side_by_side([0, 1], async |offset| {
        run_live_test(async |t| {
            t.bigchat.open(42, t.now() - 100, 1);
            // The event was received in 1970.
            let failed = failed_messages(["the disk was full"]);
            t.fill(&format!(
                "{failed} UPDATE conversations SET offset = {offset};"
            ))
            .await;
            let before = Millis::now();
            t.failed_command(&["retry", "1"]).expect("it is retried");
            let mut store = Store::open_reader(&t.db()).expect("a database");
            let figures = store.figures(Millis::now()).expect("the figures");
            let oldest = figures.oldest_waiting.expect("it waits");
            assert!(oldest.since >= before, "{oldest:?}");
            until_problems(t, &["no daemon is running"]).await;
            // A failed attempt does not change that.
            t.our_api.outage(Some(status(503)));
            t.once().await;
            t.our_api.outage(None);
            let figures = store.figures(Millis::now()).expect("the figures");
            let oldest = figures.oldest_waiting.expect("it waits again");
            assert!(oldest.since >= before, "{oldest:?}");
            t.start();
            t.until_events("delivered", 1).await;
            let figures = store.figures(Millis::now()).expect("the figures");
            assert_eq!((figures.oldest_waiting, figures.delivery_ms), (None, None));
        })
        .await;
    })
    .await;
}

/// A loss that is not restored is a problem, even if chats are not verified in idle time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unrestored_loss_is_a_problem() {
    run_live_test(async |t| {
        delivered(t).await.stop().await;
        t.set("--rebuild", "report");
        t.our_api.loses_message("10");
        t.differs("the loss is only reported");
        let text = |command| printed(&t.program(command).output().expect("a process"));
        let verified = text("verify");
        assert!(verified.contains("1 message missing"), "{verified}");
        let status = until_problems(
            t,
            &[
                "no daemon is running",
                "OurAPI has lost 1 chat, in whole or in part",
            ],
        )
        .await;
        let remedy = status["problems"][1]["remedy"].as_str().expect("a remedy");
        assert!(remedy.contains("verify --repair"), "{remedy}");
        for every in ["24h", "off"] {
            t.set("--verify-every", every);
            t.once().await;
            let status = text("status");
            assert!(
                status.contains("; 1 not complete in OurAPI"),
                "{every}: {status}"
            );
        }
        t.program("verify")
            .arg("--repair")
            .output()
            .expect("a process");
        until_problems(t, &["no daemon is running"]).await;
    })
    .await;
}

/// What happened while this machine's clock was ahead does not count as recent until the clock has caught up.
#[tokio::test]
async fn status_after_the_clock_was_ahead() {
    run_live_test(async |t| {
        delivered(t).await.stop().await;
        let ahead = Millis::now().plus(Duration::from_secs(30 * 86_400)).0;
        t.execute(&format!(
            "UPDATE deliveries SET delivered_at = {ahead};
             INSERT INTO losses (minute, count) VALUES ({ahead} / 60000, 3);
             INSERT INTO activity (minute, kind, received, delivered) VALUES ({ahead} / 60000, 'MESSAGE', 60000, 60000);"
        ));
        let (status, _) = t.status();
        for rate in ["received_per_minute", "delivered_per_minute"] {
            let rate = status[rate].as_f64();
            assert!(rate.is_some_and(|rate| rate < 100.0), "{rate:?}");
        }
        assert_eq!(status["delivery_ms"], Value::Null);
        assert_eq!(status["recent_losses"], 0);
    })
    .await;
}

/// While a long window is read over several polls, events arrive.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_while_a_long_window_is_read() {
    run_live_test(async |t| {
        t.set("--poll-interval", "1s");
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.start();
        t.until_polled().await;
        until("a poll is completed", async || t.status().1).await;
        for n in 1..450 {
            let event = message(10, now - 5, &format!("text {n}"));
            t.bigchat.reports(page([event], format!("?page={}", n + 1)));
        }
        t.bigchat.reports([message(10, now - 4, "last")]);
        until("a budget is used up", async || {
            t.count_events("true") >= 400
        })
        .await;
        t.execute("UPDATE poll_state SET polled_at = polled_at - 40000");
        let (status, _) = t.status();
        let problems = status["problems"].to_string();
        assert!(t.count_events("true") < 450, "it is still being read");
        assert!(!problems.contains("no new events arrive"), "{problems}");
    })
    .await;
}

/// Waits until OurAPI is down. After `then`, no request is due, so its state is not known, and is no problem.
async fn outage_is_forgotten(t: &Test, then: impl AsyncFnOnce()) {
    until("OurAPI is down", async || {
        t.is_up(Api::OurApi) == Some(false)
    })
    .await;
    then().await;
    let status = until_problems(t, &[]).await;
    assert_eq!(status["our_api"]["state"], "unknown");
    t.our_api.outage(None);
}

/// An outage of OurAPI that only an interrupted `verify` has seen does not count as one until the next event.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outage_seen_by_an_interrupted_verify() {
    run_live_test(async |t| {
        delivered(t).await;
        t.our_api.outage(Some(status(500)));
        let verify = Process::start_as(t, t.program("verify"));
        outage_is_forgotten(t, async || {
            verify.stop().await;
        })
        .await;
        more_messages(t);
        t.agrees().await;
        until("OurAPI is up", async || t.is_up(Api::OurApi) == Some(true)).await;
    })
    .await;
}

/// The same if the event that has seen the outage was forgotten.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outage_seen_by_a_forgotten_event() {
    run_live_test(async |t| {
        t.differs("the chat is forgotten");
        delivered(t).await;
        t.our_api.outage(Some(status(500)));
        t.bigchat.reports([message(10, t.now(), "later")]);
        outage_is_forgotten(t, async || {
            let mut forget = t.program("forget");
            forget.args(["10", "--yes"]);
            let forgotten = finished(forget).await;
            assert!(forgotten.status.success(), "{}", printed(&forgotten));
        })
        .await;
    })
    .await;
}

/// A lost chat of which no event is stored any more is no problem that `verify --repair` cannot solve.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_chat_beyond_the_retention() {
    run_live_test(async |t| {
        t.set("--retention", "0s").set("--max-window", "10s");
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.reports([message(10, now - 90, "hello")]);
        let daemon = t.start();
        t.until_events("delivered", 1).await;
        until("that is recorded", async || {
            t.value::<i64>("SELECT count(*) FROM deliveries") == 1
        })
        .await;
        t.execute("UPDATE deliveries SET delivered_at = 0");
        until("the event is dropped", async || {
            t.value::<i64>("SELECT count(*) FROM events") == 0
        })
        .await;
        daemon.stop().await;
        t.differs("OurAPI has lost the chat, and its events are dropped");
        // The loss is noticed, but the operator does not want it to be restored.
        t.our_api.loses_everything();
        let mut store = Store::open_shared(&t.db()).expect("a database");
        store.record_loss(Millis::now()).expect("a loss");
        t.set("--rebuild", "report");
        t.start();
        until("the chat was checked", async || {
            t.value::<i64>(
                "SELECT min(verified_losses) FROM conversations WHERE external_id IS NOT NULL",
            ) == 1
        })
        .await;
        let mut verify = t.program("verify");
        verify.arg("--repair");
        let verified = finished(verify).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let (status, _) = t.status();
        assert_eq!(problems(&status), [""; 0], "{}", printed(&verified));
    })
    .await;
}
