//! Answers that are hostile or broken: bounded time and memory, a warning, and nothing else lost.

use std::time::Duration;

use bigchat_sync::sim::bigchat::NextPage;
use bigchat_sync::sim::faults::{Fault, When};
use bigchat_sync::sim::our_api;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use crate::daemon::{agrees, end, message, scripted, seconds, transfer};
use crate::fakes::{
    self, NOW, Page, Scene, Tampered, page, raw, start, status, tampering, unix, window,
    with_header,
};
use crate::harness::{side_by_side, until};
use crate::process::Process;

/// More than the program ever needs for what it reads of one answer (32 MiB), in a debug build, in MiB.
const MEMORY: u64 = 256;

/// In the scene of the fakes, somebody writes something.
fn said(conversation: i64, at: i64, text: &str) -> Value {
    fakes::message(conversation, at, text)
}

fn deep(levels: usize) -> String {
    format!("{}{}", "[".repeat(levels), "]".repeat(levels))
}

/// Bodies that are not what was asked for, whatever that was. Of the lists, none could be meant.
fn bodies() -> Vec<String> {
    let id = "\"chat_id\":\"7\",\"agent_id\":\"7\",\"message_id\":\"7\"";
    vec![
        String::new(),
        "<!doctype html><p>Please sign in.".into(),
        "\u{feff}{}".into(),
        "{\"events\":[".into(),
        "not json at all \u{0}".into(),
        deep(100_000),
        "[".repeat(1 << 20),
        "[null]".into(),
        "[{}]".into(),
        "[[[]]]".into(),
        format!(
            "[{{{id},\"external_id\":10,\"started_at\":7,\"name\":7,\"email\":[],\"text\":7,\"sent_at\":{{}}}}]"
        ),
        format!(
            "[{{{id},\"external_id\":\"10\",\"started_at\":\"soon\",\"text\":\"one\",\"sent_at\":\"soon\"}}]"
        ),
        "x".repeat(1 << 20),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_success_that_is_not_what_was_asked_for_loses_and_doubles_nothing() {
    let routes = [
        "GET /events",
        "GET /conversations/{id}",
        "GET /advisors/{id}",
        "GET /agents",
        "POST /agents",
        "GET /chats",
        "POST /chats",
        "PATCH /chats/{id}",
        "GET /chats/{id}/messages",
        "POST /chats/{id}/messages",
    ];
    side_by_side(routes, async |route| {
        for body in bodies() {
            let (sim, bench) = scripted(our_api::Options::default()).await;
            let now = seconds(&sim);
            sim.bigchat.open(10, now - 100, 1);
            let told = vec![message(10, now - 9, "one"), message(10, now - 9, "one")];
            sim.bigchat.push_page(told, NextPage::None);
            // Where it was carried out nobody may believe that it was not; where it was not, that it was.
            let told_once = route.ends_with("events");
            let json = body.trim_start_matches('\u{feff}');
            let may_be_success =
                json.is_empty() || serde_json::from_str::<IgnoredAny>(json).is_ok();
            let faults = match route.starts_with("GET /events")
                || route.contains("/conv")
                || route.contains("/adv")
            {
                true => &sim.bigchat.faults,
                false => &sim.our_api.faults,
            };
            let when = if told_once { When::Before } else { When::After };
            faults.script(route, when, Fault::Body(body.clone()), 1);
            if !may_be_success && !told_once {
                faults.script(route, When::Before, Fault::Body(body.clone()), 1);
            }
            let case = format!("{route}: {}", body.chars().take(60).collect::<String>());
            let daemon = bench.start();
            bench.until_events("delivered", 2).await;
            let told = vec![
                message(10, now - 8, "two"),
                transfer(10, now - 7, 7),
                end(10, now - 6),
            ];
            sim.bigchat.push_page(told, NextPage::None);
            bench.until_events("delivered", 5).await;
            agrees(&sim, &bench).await;
            daemon.stop().await;
            assert_eq!(sim.our_api.chats().len(), 1, "{case}");
            assert_eq!(sim.our_api.agents().len(), 2, "{case}");
            assert_eq!(bench.events("failed"), 0, "{case}");
        }
    })
    .await;
}

/// JSON that stands where something else should, or is more than can be.
fn values() -> Vec<String> {
    let mut values: Vec<String> = [
        "null",
        "true",
        "-1",
        "0",
        "1.5",
        "1e400",
        "-0",
        "\"\"",
        "\"7\"",
        "[]",
        "{}",
        "[7]",
        "9223372036854775807",
        "-9223372036854775808",
        "9223372036854775808",
        "253402300799",
        "253402300800",
        "99999999999999999999999999999999999999",
        r#""\ud800""#,
        r#""\udc00\ud800""#,
        r#""a\u0000b""#,
        r#"{"message":7}"#,
        r#"{"message":"one","message":"two"}"#,
        r#"{"new_advisor_id":1.5}"#,
        r#"{"new_advisor_id":9223372036854775808}"#,
    ]
    .map(str::to_owned)
    .into();
    values.push(deep(200));
    values.push(deep(100_000));
    values
}

#[tokio::test]
async fn whatever_stands_in_an_event_it_is_delivered_or_kept_and_the_others_go_on() {
    let mut events = Vec::new();
    for name in ["START", "END", "MESSAGE", "TRANSFER", "message", "REOPEN"] {
        for value in values() {
            let at = unix(5);
            for (id, at, data) in [
                (
                    value.clone(),
                    at.to_string(),
                    r#"{"message":"one","new_advisor_id":8}"#.to_owned(),
                ),
                (
                    "42".into(),
                    value.clone(),
                    r#"{"message":"two","new_advisor_id":8}"#.into(),
                ),
                ("42".into(), at.to_string(), value.clone()),
                (
                    "42".into(),
                    at.to_string(),
                    format!(r#"{{"message":{value},"new_advisor_id":{value}}}"#),
                ),
            ] {
                events.push(format!(
                    r#"{{"conversation_id":{id},"event_name":"{name}","event_at":{at},"data":{data}}}"#
                ));
            }
        }
    }
    for value in values() {
        events.push(format!(
            r#"{{"conversation_id":42,"event_name":{value},"event_at":{},"data":null}}"#,
            unix(5)
        ));
        events.push(value);
    }
    events.push(format!(
        r#"{{"conversation_id":42,"conversation_id":43,"event_name":"END","event_at":{},"data":null}}"#,
        unix(5)
    ));
    let first = said(42, 1, "the first").to_string();
    let last = said(42, 2, "the last").to_string();
    let body = format!(r#"{{"events":[{first},{},{last}]}}"#, events.join(","));
    let scene = Scene::new().await;
    scene.bigchat.tells(raw(&body));
    scene.bench.once().await;
    let kept = "SELECT count(*) FROM events";
    let before: i64 = scene.bench.value(kept);
    assert!(before > 200, "{before}");
    assert_eq!(scene.bench.events("waiting"), 0);
    let texts = scene.our_api.messages();
    for text in ["the first", "the last"] {
        assert_eq!(
            texts.iter().filter(|held| *held == text).count(),
            1,
            "{texts:?}"
        );
    }
    assert!(
        texts.iter().all(|text| !text.contains('\u{fffd}')),
        "{texts:?}"
    );
    assert_eq!(scene.bigchat.queries(), [window(NOW - 10, NOW)]);
    // What is told again is known, understood or not.
    scene.bigchat.tells(raw(&body));
    scene.bench.once().await;
    assert_eq!(scene.bench.value::<i64>(kept), before);
    assert_eq!(scene.our_api.messages(), texts);
    // A reason never has in it all that it complains of.
    let longest = "SELECT max(length(reason)) FROM attempts";
    assert!(scene.bench.value::<i64>(longest) < 3_000);
}

#[tokio::test]
async fn no_header_moves_the_cursor_or_hides_the_answer() {
    let long = "x".repeat(50_000);
    side_by_side(
        [
            (
                "a date of long ago",
                "date: Thu, 01 Jan 1970 00:00:00 GMT".to_owned(),
            ),
            (
                "the year 9999",
                "date: Fri, 31 Dec 9999 23:59:59 GMT".into(),
            ),
            (
                "a date before all time",
                "date: Mon, 01 Jan 0001 00:00:00 GMT".into(),
            ),
            ("no date at all", "date: soon".into()),
            ("an empty date", "date:".into()),
            ("a date without end", format!("date: {long}")),
            ("a date that is no text", "date: \u{fc}\u{fc}".into()),
            ("two dates", "date: soon\r\ndate: later".into()),
            ("a long stranger", format!("x-stranger: {long}")),
            ("Retry-After with a success", "retry-after: 3600".into()),
            (
                "elsewhere",
                "location: http://bigchat.test/\r\nrefresh: 0;url=http://bigchat.test/".into(),
            ),
        ],
        async |(case, header)| {
            let scene = Scene::new().await;
            scene.bench.once().await;
            scene.bigchat.clock(NOW + 60);
            scene.bigchat.queries();
            let mut left = 1;
            let name = header.split(':').next().expect("a name").to_owned();
            let url = tampering(&scene.bigchat.url(), move |line, answer| {
                if left == 0 || !line.starts_with("GET /events") {
                    return answer;
                }
                left -= 1;
                with_header(&answer, &name, &header)
            })
            .await;
            let scene = scene.set("--bigchat-url", &url);
            scene.bigchat.tells([said(42, 1, "one")]);
            scene.bench.once().await;
            scene.bench.once().await;
            assert_eq!(scene.our_api.messages(), ["one"], "{case}");
            let queries = scene.bigchat.queries();
            assert_eq!(queries[0], window(NOW - 5, NOW + 60), "{case}");
            assert_eq!(queries[1], window(NOW + 55, NOW + 60), "{case}");
        },
    )
    .await;
}

#[tokio::test]
async fn a_length_that_is_not_that_of_the_body_is_no_page() {
    for length in [
        "1",
        "1000000",
        "-1",
        "99999999999999999999999",
        "many",
        "7\r\ncontent-length: 9",
    ] {
        let scene = Scene::new().await;
        let mut upset = true;
        let header = format!("content-length: {length}");
        let url = tampering(&scene.bigchat.url(), move |line, answer| {
            if line.starts_with("GET /events") && std::mem::take(&mut upset) {
                with_header(&answer, "content-length", &header)
            } else {
                answer
            }
        })
        .await;
        let scene = scene.set("--bigchat-url", &url);
        scene.bench.once().await;
        scene.bigchat.tells([said(42, 1, "one")]);
        scene.bench.once().await;
        assert_eq!(scene.our_api.messages(), ["one"], "{length}");
        let queries = scene.bigchat.queries();
        assert_eq!(
            queries[..2],
            [window(NOW - 10, NOW), window(NOW - 10, NOW)],
            "{length}"
        );
    }
}

#[tokio::test]
async fn of_an_answer_without_end_no_more_is_read_than_fits() {
    let scene = Scene::new()
        .await
        .set("--request-timeout", "60s")
        .set("--log-format", "text");
    let (bigchat, our_api) = (
        flooding(&scene.bigchat.url(), "GET /events").await,
        flooding(&scene.our_api.url(), "POST /chats").await,
    );
    let scene = scene
        .set("--bigchat-url", &bigchat)
        .set("--our-api-url", &our_api);
    let daemon = Process::start(&scene.bench);
    until("three answers without end", async || {
        scene.bigchat.count("GET /events") > 3
    })
    .await;
    scene.bigchat.tells([start(42, 0), said(42, 1, "one")]);
    scene.bench.until_events("delivered", 2).await;
    assert!(
        daemon.lines_with("larger than 32 MiB") > 0,
        "{}",
        daemon.log()
    );
    let peak = daemon.mebibytes("VmHWM");
    assert!(peak < MEMORY, "{peak} MiB");
    assert!(daemon.stop().await.success());
    assert_eq!(scene.our_api.messages(), ["one"]);
    assert_eq!(scene.our_api.chats().len(), 1);
}

/// A server in front of another whose first three answers to those requests have no end. The last of them was carried
/// out.
async fn flooding(url: &str, line: &'static str) -> String {
    let mut left = 3;
    tampering(url, move |asked, answer| {
        if left == 0 || !asked.starts_with(line) {
            return Tampered::from(answer);
        }
        left -= 1;
        let head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{\"events\":[";
        Tampered::without_end(head, &[b' '; 1 << 16], Duration::ZERO)
    })
    .await
}

#[tokio::test]
async fn an_answer_that_trickles_is_not_waited_for() {
    let scene = Scene::new().await.set("--request-timeout", "300ms");
    let mut left = 1;
    let url = tampering(&scene.bigchat.url(), move |line, answer| {
        if left == 0 || !line.starts_with("GET /events") {
            return Tampered::from(answer);
        }
        left -= 1;
        let head = b"HTTP/1.1 200 OK\r\n\r\n";
        Tampered::without_end(head, b" ", Duration::from_millis(20))
    })
    .await;
    let scene = scene.set("--bigchat-url", &url);
    let daemon = scene.bench.start();
    until("the next poll", async || {
        scene.bigchat.count("GET /events") > 1
    })
    .await;
    scene.bigchat.tells([said(42, 1, "one")]);
    scene.bench.until_events("delivered", 1).await;
    daemon.stop().await;
}

#[tokio::test]
async fn a_chat_of_a_million_messages_costs_bounded_memory_and_holds_up_nobody_else() {
    let scene = Scene::new().await.set("--max-attempts", "2");
    let daemon = scene.bench.start();
    scene.delivers([start(42, 0), start(43, 1)]).await;
    daemon.stop().await;
    let million = r#"{"text":"hello","sent_at":"2026-11-22T22:00:05"},"#.repeat(1_000_000);
    let million = format!("[{}]", million.trim_end_matches(','));
    let messages = "GET /chats/c1/messages";
    scene
        .our_api
        .upset(messages, status(200).body(&million).always());
    let daemon = Process::start(&scene.bench);
    scene
        .bigchat
        .tells([said(42, 5, "hello"), said(43, 6, "other")]);
    let mut n = 0;
    until("it is given up", async || {
        n += 1;
        scene.bigchat.tells([said(43, 7, &format!("number {n}"))]);
        scene.bench.events("failed") == 1
    })
    .await;
    let peak = daemon.mebibytes("VmHWM");
    assert!(peak < MEMORY, "{peak} MiB");
    assert!(daemon.stop().await.success());
    assert!(scene.our_api.messages().contains(&"other".to_owned()));
    let failed = scene.bench.failed();
    assert!(
        failed[0]
            .response
            .as_deref()
            .is_some_and(|response| response.contains("32 MiB")),
        "{failed:?}"
    );
    // Fewer fit in, and each is counted.
    scene.our_api.calm();
    let many = r#"{"text":"hello","sent_at":"2026-11-22T22:00:05"},"#.repeat(500_000);
    let many = format!("[{}]", many.trim_end_matches(','));
    scene.our_api.upset(messages, status(200).body(&many));
    scene
        .bench
        .failed_command(&["retry", "--all"])
        .expect("a retry");
    let daemon = Process::start(&scene.bench);
    until("it is found", async || {
        scene.bench.events("failed") + scene.bench.events("waiting") == 0
    })
    .await;
    let peak = daemon.mebibytes("VmHWM");
    assert!(peak < MEMORY, "{peak} MiB");
    assert!(daemon.stop().await.success());
    assert!(!scene.our_api.messages().contains(&"hello".to_owned()));
}

#[tokio::test]
async fn a_page_of_millions_costs_bounded_memory_and_time() {
    let scene = Scene::new().await;
    let body = format!(r#"{{"events":[{}0]}}"#, "0,".repeat(1 << 20));
    scene.bigchat.tells(raw(&body));
    let daemon = Process::start(&scene.bench);
    until("it is kept", async || {
        scene.bench.is_ready() && scene.bench.events("failed") == 1
    })
    .await;
    scene.bigchat.tells([said(42, 1, "one")]);
    scene.bench.until_events("delivered", 1).await;
    let peak = daemon.mebibytes("VmHWM");
    assert!(peak < MEMORY / 4, "{peak} MiB");
    assert!(daemon.stop().await.success());
}

#[tokio::test]
async fn a_next_page_that_nobody_could_ask_for_completes_the_poll() {
    for next in [
        format!("?page={}", "2".repeat(100_000)),
        "\u{0}".into(),
        "?".into(),
        "http://[/?".into(),
    ] {
        let scene = Scene::new().await;
        scene.bigchat.tells(page([said(42, 1, "one")], &*next));
        scene.bench.once().await;
        assert_eq!(scene.our_api.messages(), ["one"]);
        scene.bench.once().await;
        let queries = scene.bigchat.queries();
        assert_eq!(queries, [window(NOW - 10, NOW), window(NOW - 5, NOW)]);
    }
}

#[tokio::test]
async fn an_advisor_whom_nobody_could_ask_for_leaves_the_chat_without_an_agent() {
    let scene = Scene::new().await;
    scene
        .bigchat
        .advisor(7, "Ann", &format!("{}@x.test", "a".repeat(100_000)));
    let daemon = scene.bench.start();
    scene.delivers([start(42, 0), said(42, 1, "one")]).await;
    daemon.stop().await;
    assert_eq!(scene.our_api.chats(), ["42 22:00:00 - -"]);
}

#[tokio::test]
async fn times_that_no_event_has_stand_in_the_way_of_nothing() {
    let scene = Scene::new().await;
    scene.our_api.has_chat("c1", "42", 0);
    let held = |at: &str| json!({"text": "from elsewhere", "sent_at": at});
    let body = json!([
        held("0001-01-01T00:00:00"),
        held("1969-12-31T23:59:59Z"),
        held("9999-12-31T23:59:59.999999")
    ]);
    let upset = status(200).body(&body.to_string());
    scene.our_api.upset("GET /chats/c1/messages", upset);
    let daemon = scene.bench.start();
    scene.delivers([start(42, 0), said(42, 1, "one")]).await;
    daemon.stop().await;
    assert_eq!(scene.bench.value::<i64>("SELECT count(*) FROM attempts"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_and_no_token_goes_to_another_host() {
    let trap = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let address = trap.local_addr().expect("an address");
    let elsewhere = format!("http://{address}");
    let routes = [
        "GET /events",
        "GET /conversations",
        "GET /advisors",
        "GET /agents",
        "POST /agents",
        "GET /chats",
        "POST /chats",
        "PATCH /chats/c1",
        "GET /chats/c1/messages",
        "POST /chats/c1/messages",
    ];
    let scene = Scene::new().await;
    for (code, route) in [301, 302, 303, 307, 308]
        .into_iter()
        .cycle()
        .zip(routes.into_iter().cycle().take(20))
    {
        let upset = status(code)
            .header("location", &format!("{elsewhere}/{route}"))
            .header("refresh", &format!("0; url={elsewhere}"))
            .header("alt-svc", &format!("h2=\"{address}\"; ma=3600"))
            .header("link", &format!("<{elsewhere}/events>; rel=next"))
            .header("proxy-authenticate", "Basic");
        scene.bigchat.upset(route, upset.clone());
        scene.our_api.upset(route, upset);
    }
    scene.bigchat.tells(page(
        [start(42, 0), said(42, 1, "one")],
        format!("{elsewhere}/events?page=2"),
    ));
    scene.bigchat.tells(page(
        [said(42, 2, "two")],
        format!("//{address}/events?page=3"),
    ));
    scene.bigchat.tells(Page::from([fakes::end(42, 9)]));
    let mut program = scene.bench.program("run");
    for variable in [
        "HTTP_PROXY",
        "http_proxy",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "all_proxy",
    ] {
        program.env(variable, &elsewhere);
    }
    program
        .env("BIGCHAT_SYNC_BIGCHAT_TOKEN", "t0ken")
        .env("BIGCHAT_SYNC_OUR_API_TOKEN", "t0ken");
    let daemon = Process::start_as(&scene.bench, program);
    scene.bench.until_events("delivered", 4).await;
    assert!(daemon.stop().await.success());
    assert_eq!(scene.our_api.messages(), ["one", "two"]);
    let heard = tokio::time::timeout(Duration::from_millis(50), trap.accept()).await;
    assert!(heard.is_err(), "{heard:?}");
}

#[tokio::test]
async fn an_odd_event_among_the_details_keeps_no_message_from_its_chat() {
    for odd in [
        r#"{"conversation_id": 42, "event_name": "MESSAGE", "event_at": 1795384805.5, "data": {"message": "?"}}"#,
        r#"{"conversation_id": 42, "event_name": "MESSAGE", "event_at": 1795384805, "data": {"message": "\ud800"}}"#,
        r#"{"conversation_id": 42, "event_name": "NOTE", "event_at": null}"#,
        r#"["START"]"#,
        r#"["START", 5]"#,
    ] {
        let scene = Scene::new().await;
        let start = start(42, 0);
        let details =
            format!(r#"{{"events": [{odd}, {start}], "conversation_id": 42, "advisor_id": 7}}"#);
        let told = status(200).body(&details).always();
        scene.bigchat.upset("GET /conversations/42", told);
        let daemon = scene.bench.start();
        scene.delivers([fakes::message(42, 2, "hello")]).await;
        daemon.stop().await;
        assert_eq!(scene.our_api.chats(), ["42 22:00:00 - a1"]);
        assert_eq!(scene.our_api.messages(), ["hello"]);
    }
}
