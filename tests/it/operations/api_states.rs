//! The state of an API (not reached yet, up, failing or down), its latest reason and its rate limit, as reported by
//! `status`, `check`, `once`, the health endpoints, the log and the summary.

use super::status::{check, delivered, more_messages, until_problems};
use crate::harness::process::{Process, finished, printed};
use crate::harness::services::{tampering, with_header};
use crate::harness::web::{client, sent};
use crate::harness::{Bench, run_live_test, run_with, side_by_side, until};
use bigchat_sync::http::Api;
use bigchat_sync::settings::Tokens;
use bigchat_sync::simulator::bigchat::{Clock, Options};
use bigchat_sync::simulator::fault::{Fault, status};

use reqwest::StatusCode;

fn limited() -> Fault {
    status(429).header("retry-after", "3600")
}

fn text_of(t: &Bench) -> String {
    printed(&t.program("status").output().expect("a process"))
}

async fn readiness(url: &str) -> (StatusCode, String) {
    let answer = sent(client().get(format!("{url}/readyz"))).await;
    (answer.status(), answer.text().await.expect("a text"))
}

/// A rate limit of more than a minute is reported as a problem immediately and everywhere, and still after a restart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_limit_of_our_api() {
    run_live_test(async |t| {
        t.differs("OurAPI limits the rate to the end");
        delivered(t).await.stop().await;
        let (daemon, url) = t.start_listening(Tokens::default());
        t.our_api.outage(Some(limited()));
        more_messages(t);
        let begins = ["OurAPI is rate-limited until "];
        let shown = until_problems(t, &begins).await;
        let what = shown["problems"][0]["what"].as_str().expect("a text");
        assert!(what.contains("(429, Retry-After 3600 s"), "{what}");
        assert!(what.ends_with("; 2 events are waiting"), "{what}");
        let remedy = shown["problems"][0]["remedy"].as_str().expect("a text");
        assert!(remedy.contains("ask the operator of OurAPI"), "{remedy}");
        let text = text_of(t);
        let line = text.lines().find(|line| line.starts_with("  "));
        assert!(
            line.is_some_and(|line| line.contains("rate-limited until ")),
            "{text}"
        );
        let (passed, report) = check(t).await;
        assert!(
            !passed && report.contains("FAIL  OurAPI    rate-limited until "),
            "{report}"
        );
        let (code, why) = readiness(&url).await;
        assert_eq!(code, StatusCode::SERVICE_UNAVAILABLE);
        assert!(why.starts_with("OurAPI is rate-limited"), "{why}");

        // An event that waits for the limit is no second problem, even after five minutes.
        t.execute("UPDATE conversations SET waiting_since = waiting_since - 300000");
        until_problems(t, &begins).await;

        daemon.stop().await;
        let asked = t.our_api.total();
        let (passed, report) = check(t).await;
        assert!(!passed && report.contains("rate-limited"), "{report}");
        t.start();
        until_problems(t, &begins).await;
        assert_eq!(t.our_api.total(), asked, "nothing is sent to it meanwhile");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_limit_of_bigchat() {
    run_live_test(async |t| {
        delivered(t).await.stop().await;
        let (_, url) = t.start_listening(Tokens::default());
        t.bigchat.outage(Some(limited()));
        until_problems(t, &["BigChat is rate-limited until "]).await;
        let (passed, report) = check(t).await;
        assert!(!passed, "{report}");
        let (code, why) = readiness(&url).await;
        assert_eq!(code, StatusCode::SERVICE_UNAVAILABLE);
        assert!(why.starts_with("BigChat is rate-limited"), "{why}");
    })
    .await;
}

/// A rate limit replaces the earlier reason of an outage, and is logged in any case.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limit_replaces_an_older_reason() {
    side_by_side([401, 503], async |before| {
        run_live_test(async |t| {
            t.differs("OurAPI limits the rate to the end");
            delivered(t).await.stop().await;
            t.our_api.outage(Some(status(before)));
            more_messages(t);
            let daemon = Process::start(t);
            until_problems(t, &["OurAPI has been down since "]).await;
            t.our_api.outage(Some(limited()));
            let shown = until_problems(t, &["OurAPI is rate-limited until "]).await;
            let what = shown["problems"][0]["what"].as_str().expect("a text");
            assert!(what.contains(", and has been down since "), "{what}");
            let problem = shown["our_api"]["problem"].as_str().expect("a text");
            assert!(problem.ends_with("→ 429"), "{problem}");
            let (_, report) = check(t).await;
            for text in [shown["problems"].to_string(), report] {
                assert!(!text.contains("credentials"), "{text}");
                assert!(!text.contains(&format!("→ {before}")), "{text}");
            }
            daemon
                .until_logged_times("OurAPI is rate-limited until", 1)
                .await;
            assert!(daemon.stop().await.success());
            assert!(t.logged().contains(r#""our_api":"rate_limited""#));
        })
        .await;
    })
    .await;
}

/// A few failures are reported before they count as an outage.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failing_api_is_not_up() {
    run_live_test(async |t| {
        t.differs("OurAPI fails to the end");
        // After two failures there is no request for at least 15 s.
        t.set("--retry-initial", "1h").set("--retry-max", "1h");
        delivered(t).await.stop().await;
        let (daemon, url) = t.start_listening(Tokens::default());
        t.our_api.outage(Some(status(500)));
        more_messages(t);
        until("it is failing", async || {
            t.status().0["our_api"]["state"] == "failing"
        })
        .await;
        let text = text_of(t);
        let line = text.lines().find(|line| line.starts_with("OurAPI"));
        let line = line.expect("a line");
        assert!(line.contains("failing since 20"), "{line}");
        assert!(line.contains("(not yet counted as down); "), "{line}");
        let (passed, report) = check(t).await;
        let fails = "FAIL  OurAPI    is failing, not yet counted as down: ";
        assert!(!passed && report.contains(fails), "{report}");
        let (code, why) = readiness(&url).await;
        assert_eq!(code, StatusCode::OK, "{why}");
        assert_eq!(why, "ok: OurAPI is failing, not yet counted as down\n");
        daemon.stop().await;
    })
    .await;
}

/// Before the first success, the state has no start time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bigchat_was_never_reached() {
    let t = Bench::unreachable();
    // There is no further poll and, after two failures, no further probe.
    t.set("--poll-interval", "1h");
    t.set("--retry-initial", "1h").set("--retry-max", "1h");
    let daemon = Process::start(&t);
    until("the first poll has failed", async || {
        t.is_ready() && t.status().0["bigchat"]["problem"].is_string()
    })
    .await;
    let text = text_of(&t);
    let line = text.lines().find(|line| line.starts_with("BigChat"));
    let line = line.expect("a line");
    assert!(line.contains(" not reached yet; "), "{line}");
    assert!(line.contains("no connection"), "{line}");
    assert!(!text.contains("1970"), "{text}");
    let (passed, report) = check(&t).await;
    assert!(
        !passed && report.contains("FAIL  BigChat   has not been reached yet: "),
        "{report}"
    );
    assert!(daemon.stop().await.success());
    let log = t.logged();
    assert!(
        !log.contains("usable date"),
        "BigChat has sent nothing: {log}"
    );
    assert!(log.contains(r#""bigchat":"unknown""#), "{log}");
}

/// The last line of `once` has the reason, whatever the log level.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn once_names_the_reason() {
    run_live_test(async |t| {
        delivered(t).await.stop().await;
        let last_line = async |flag: &str, url: &str| {
            t.set(flag, "http://127.0.0.1:1");
            let mut once = t.program("once");
            t.set(flag, url);
            once.env("RUST_LOG", "warn");
            let ended = finished(once).await;
            assert_eq!(ended.status.code(), Some(1));
            let log = printed(&ended);
            log.lines().last().expect("a line").to_owned()
        };
        let line = last_line("--bigchat-url", &t.bigchat.url()).await;
        let begins = "bigchat-sync: BigChat was not read up to the present: ";
        assert!(line.starts_with(begins), "{line}");
        let reason = ["http://127.0.0.1:1/", " → no connection: ", "refused"];
        assert!(reason.iter().all(|part| line.contains(part)), "{line}");
        more_messages(t);
        let line = last_line("--our-api-url", &t.our_api.url()).await;
        let begins = "bigchat-sync: events not delivered yet: 2; OurAPI cannot be reached";
        assert!(line.starts_with(begins), "{line}");
        assert!(reason.iter().all(|part| line.contains(part)), "{line}");
        t.once().await;
    })
    .await;
}

/// Each new kind of reason during an outage is logged once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_new_reason_is_logged() {
    run_live_test(async |t| {
        delivered(t).await.stop().await;
        let daemon = Process::start(t);
        let moved = status(302).header("location", "https://new.example/");
        t.our_api.outage(Some(moved));
        more_messages(t);
        daemon
            .until_logged("OurAPI is down until its settings are corrected")
            .await;
        let another = "OurAPI is still down, now for another reason";
        for (changes, code) in [(1, 403), (2, 503)] {
            t.our_api.outage(Some(status(code)));
            daemon.until_logged_times(another, changes).await;
            let asked = t.our_api.total();
            until("more probes", async || t.our_api.total() > asked + 3).await;
            assert_eq!(daemon.lines_with(another), changes, "{code}");
        }
        t.our_api.outage(None);
        daemon.until_logged("OurAPI is back").await;
        t.agrees().await;
        assert!(daemon.stop().await.success());
        assert_eq!(t.logged().matches("OurAPI is down").count(), 1);
    })
    .await;
}

/// A clock that differs by more than a minute is a problem, and is logged at the start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clocks_that_differ() {
    // 19 h 52 min, and half a minute for the test.
    side_by_side([(71_550, "ahead of"), (-71_550, "behind")], async |case| {
        let (ahead, direction) = case;
        let bigchat = Options {
            quiet: true,
            clock: Clock::Ahead(ahead),
            ..Options::default()
        };
        run_with(bigchat, async |t| {
            let difference = format!("BigChat's clock is 19h 52m {direction} this machine's");
            let daemon = Process::start(t);
            daemon.until_logged(&difference).await;
            until_problems(t, &[&difference]).await;
            assert!(daemon.stop().await.success());
            assert_eq!(t.logged().matches(&difference).count(), 1);
        })
        .await;
    })
    .await;
}

/// If BigChat answers without a date, this is logged once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bigchat_without_a_date() {
    run_live_test(async |t| {
        let url = tampering(&t.bigchat.url(), |_, answer| {
            with_header(&answer, "date", "x-date: none")
        })
        .await;
        t.set("--bigchat-url", &url);
        let daemon = Process::start(t);
        daemon.until_logged("BigChat sends no usable date").await;
        until("it is up", async || t.is_up(Api::BigChat) == Some(true)).await;
        assert!(daemon.stop().await.success());
        assert_eq!(t.logged().matches("no usable date").count(), 1);
    })
    .await;
}
