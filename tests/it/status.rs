//! `bigchat-sync status` and `bigchat-sync check`: what is wrong is said, and what to do about it; nothing is asked beside a
//! daemon that runs.

use std::process::{Command, Output};

use bigchat_sync::sim::Sim;
use bigchat_sync::sim::bigchat::NextPage;
use bigchat_sync::sim::our_api;
use serde_json::{Value, json};
use wiremock::matchers::{method, path};
use wiremock::{Mock, MockServer, ResponseTemplate};

use crate::daemon::{agrees, end, message, scripted, seconds};
use crate::harness::{Bench, until};

/// A conversation that was delivered, and the daemon that did it.
async fn delivered() -> (Sim, Bench, crate::harness::Daemon) {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    let told = vec![message(10, now - 5, "hello"), end(10, now - 4)];
    sim.bigchat.push_page(told, NextPage::None);
    let daemon = bench.start();
    agrees(&sim, &bench).await;
    bench.until_events("delivered", 2).await;
    (sim, bench, daemon)
}

fn troubles(status: &Value) -> Vec<String> {
    let troubles = status["troubles"].as_array().expect("an array");
    for trouble in troubles {
        assert!(
            trouble["remedy"]
                .as_str()
                .is_some_and(|remedy| !remedy.is_empty())
        );
    }
    troubles
        .iter()
        .map(|trouble| trouble["what"].as_str().expect("text").to_owned())
        .collect()
}

/// Waits until the status has these troubles and no others: what each of them begins with.
async fn until_troubles(bench: &Bench, expected: &[&str]) -> Value {
    let mut last = Value::Null;
    until(&format!("{expected:?}"), async || {
        let (status, well) = bench.status();
        assert_eq!(json!(well), status["well"]);
        let troubles = troubles(&status);
        let as_expected = troubles.len() == expected.len()
            && troubles
                .iter()
                .zip(expected)
                .all(|(is, should)| is.starts_with(should));
        last = status;
        as_expected
    })
    .await;
    last
}

async fn until_found_up(bench: &Bench) {
    until("what the daemon found is kept", async || {
        bench.value::<i64>("SELECT count(*) FROM api_status WHERE up = 1") == 2
    })
    .await;
}

async fn check(bench: &Bench) -> (bool, String) {
    let mut command = bench.program("check");
    let ended = tokio::task::spawn_blocking(move || command.output());
    let Output { status, stdout, .. } = ended.await.expect("no panic").expect("a process");
    (status.success(), String::from_utf8(stdout).expect("text"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_well_is_said_whether_or_not_the_daemon_runs() {
    let (sim, bench, daemon) = delivered().await;
    until_found_up(&bench).await;
    let status = until_troubles(&bench, &[]).await;
    assert_eq!(status["daemon_runs"], json!(true));
    assert_eq!(status["our_api"]["up"], json!(true));
    assert_eq!(
        (&status["waiting"], &status["failed"]),
        (&json!(0), &json!(0))
    );
    assert_eq!(status["delivery_ms"]["of"], json!(2));
    // Of a journal that is younger than what rates are taken over.
    for rate in ["told_per_minute", "delivered_per_minute"] {
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

    sim.our_api.down().await.expect("it is down");
    let now = seconds(&sim);
    sim.bigchat.push_page(
        vec![message(10, now, "anybody?"), message(10, now, "k")],
        NextPage::None,
    );
    let status = until_troubles(&bench, &["OurAPI is down since "]).await;
    assert_eq!(status["waiting"], json!(2));
    assert_eq!(status["oldest_waiting"]["conversation"], json!(10));
    let since = status["our_api"]["since"].clone();

    daemon.stop().await;
    let stopped = ["no daemon works on this database", "OurAPI is down since "];
    until_troubles(&bench, &stopped).await;
    sim.bigchat.down().await.expect("it is down");
    let daemon = bench.start();
    let down = ["BigChat is down since ", "OurAPI is down since "];
    let status = until_troubles(&bench, &down).await;
    assert_eq!(
        status["our_api"]["since"], since,
        "a restart changes nothing about it"
    );

    sim.our_api.up().await.expect("it is up");
    sim.bigchat.up().await.expect("it is up");
    let status = until_troubles(&bench, &["1 failed event waits"]).await;
    let reasons = status["failed_by_reason"].as_array().expect("an array");
    assert_eq!(reasons.len(), 1);
    let reason = reasons[0]["reason"].as_str().expect("a reason");
    assert_eq!(reasons[0]["count"], json!(1));
    let text = bench.program("status").output().expect("a process");
    let text = String::from_utf8(text.stdout).expect("text");
    assert!(text.contains(&format!("1 × {reason}")), "{text}");
    bench
        .failed_command(&["discard", "--yes", "--reason", "another one"])
        .expect_err("none is meant");
    assert_eq!(bench.events("failed"), 1);
    bench
        .failed_command(&["discard", "--yes", "--reason", reason])
        .expect("it is done");
    until_troubles(&bench, &[]).await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_check_asks_the_apis_only_where_no_daemon_runs() {
    let (sim, bench, daemon) = delivered().await;
    until_found_up(&bench).await;
    let (polls, requests) = (sim.bigchat.polls(), sim.our_api.traffic.total());
    let (well, report) = check(&bench).await;
    assert!(well, "{report}");
    assert!(
        report.contains("the APIs are as it last found them"),
        "{report}"
    );
    assert_eq!(
        sim.our_api.traffic.total(),
        requests,
        "OurAPI is not asked beside it"
    );
    let db = bench.db();
    let elsewhere = Command::new(env!("CARGO_BIN_EXE_bigchat-sync"))
        .args(["check", "--our-api-url", "http://127.0.0.1:9"])
        .args(["--bigchat-url", &sim.bigchat_url(), "--db"])
        .arg(&db)
        .output()
        .expect("a process");
    let report = String::from_utf8_lossy(&elsewhere.stdout);
    assert!(
        !elsewhere.status.success() && report.contains("is asked elsewhere by the daemon"),
        "{report}"
    );
    daemon.stop().await;

    let polled = sim.bigchat.polls();
    assert!(polled >= polls);
    let (well, report) = check(&bench).await;
    assert!(well, "{report}");
    assert_eq!(
        sim.our_api.traffic.total(),
        requests + 2,
        "what it is, and whether it answers"
    );
    assert_eq!(
        sim.bigchat.polls(),
        polled,
        "BigChat tells everything only once"
    );

    sim.our_api.down().await.expect("it is down");
    let (well, report) = check(&bench).await;
    assert!(
        !well && report.contains("FAIL  OurAPI") && report.contains("--our-api-url"),
        "{report}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_check_says_what_is_set_up_wrongly() {
    // Each says of itself what it is.
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
    let (well, report) = check(&bench).await;
    assert!(
        well && report.contains("says it is \"Big Chat 1\""),
        "{report}"
    );
    assert!(!bench.db().exists(), "it makes no database");

    let swapped = Bench::new(&our_api.uri(), &bigchat.uri());
    let (well, report) = check(&swapped).await;
    assert!(!well, "{report}");
    assert_eq!(
        report.matches("are the two URLs mixed up?").count(),
        2,
        "{report}"
    );

    let twice = Bench::new(&our_api.uri(), &our_api.uri());
    let (well, report) = check(&twice).await;
    assert!(
        !well && report.contains("the same place for both APIs"),
        "{report}"
    );

    let bench = bench.set("--listen", "0.0.0.0:8268");
    let (well, report) = check(&bench).await;
    assert!(
        !well && report.contains("BIGCHAT_SYNC_CONSOLE_TOKEN"),
        "{report}"
    );

    std::fs::write(bench.db(), "Dear diary").expect("a file");
    let (well, report) = check(&bench).await;
    assert!(
        !well && report.contains("is not a bigchat-sync database"),
        "{report}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn once_tells_by_its_exit_code_what_it_left_undone() {
    let (sim, bench, daemon) = delivered().await;
    daemon.stop().await;
    let once = async || {
        let mut command = bench.program("once");
        let ended = tokio::task::spawn_blocking(move || command.output()).await;
        let ended = ended.expect("no panic").expect("a process");
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        (ended.status.code(), said)
    };
    assert_eq!(once().await.0, Some(0));
    sim.our_api.down().await.expect("it is down");
    let told = vec![message(10, seconds(&sim), "anybody?")];
    sim.bigchat.push_page(told, NextPage::None);
    let (code, said) = once().await;
    assert!(
        code == Some(1) && said.contains("1 events are not delivered yet"),
        "{said}"
    );
    sim.bigchat.down().await.expect("it is down");
    let (code, said) = once().await;
    assert!(
        code == Some(1) && said.contains("BigChat was not read"),
        "{said}"
    );
    sim.bigchat.up().await.expect("it is up");
    sim.our_api.up().await.expect("it is up");
    let (code, said) = once().await;
    assert_eq!(code, Some(0), "{said}");
    bench.until_events("delivered", 3).await;
}
