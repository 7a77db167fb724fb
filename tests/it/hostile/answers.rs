//! Hostile or broken responses cost bounded time and memory, and cause a warning. No other data is lost.

use crate::harness::process::Process;
use crate::harness::services::{NOW, ROUTES, Tampered, tampering, unix, window, with_header};
use crate::harness::{run_live_test, run_test, side_by_side, until};
use bigchat_sync::simulator::bigchat::{Page, page, raw};
use bigchat_sync::simulator::event::{end, message, start, transfer};
use bigchat_sync::simulator::fault::status;
use std::time::Duration;

use serde::de::IgnoredAny;
use serde_json::json;

/// The memory limit, in MiB. A debug build needs less for the largest response that it reads (32 MiB).
const MEMORY: u64 = 256;

fn deep(levels: usize) -> String {
    format!("{}{}", "[".repeat(levels), "]".repeat(levels))
}

/// Bodies that no route returns.
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

/// A successful response whose body violates the contract causes no loss and no duplicate.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn success_with_unexpected_body() {
    side_by_side(ROUTES, async |route| {
        for body in bodies() {
            run_live_test(async |t| {
                t.unmet("a body that may be a success causes no second request, and no read back");
                let now = t.now();
                t.bigchat.open(10, now - 100, 1);
                let events = vec![message(10, now - 9, "one"), message(10, now - 9, "one")];
                t.bigchat.reports(events);
                // A request that was carried out must not be sent again, and one that was not must be.
                let reported_once = route.ends_with("events");
                let json = body.trim_start_matches('\u{feff}');
                let may_be_success =
                    json.is_empty() || serde_json::from_str::<IgnoredAny>(json).is_ok();
                let fault = status(200).body(body.clone());
                let first = match reported_once {
                    true => fault.clone(),
                    false => fault.clone().carried_out(),
                };
                t.upset(route, first);
                if !may_be_success && !reported_once {
                    t.upset(route, fault);
                }
                let case = format!("{route}: {}", body.chars().take(60).collect::<String>());
                let daemon = t.start();
                t.until_events("delivered", 2).await;
                let events = vec![
                    message(10, now - 8, "two"),
                    transfer(10, now - 7, 7),
                    end(10, now - 6),
                ];
                t.bigchat.reports(events);
                t.until_events("delivered", 5).await;
                t.agrees().await;
                daemon.stop().await;
                assert_eq!(t.our_api.chats().len(), 1, "{case}");
                assert_eq!(t.our_api.data().agents.len(), 2, "{case}");
                assert_eq!(t.events("failed"), 0, "{case}");
            })
            .await;
        }
    })
    .await;
}

/// JSON values of wrong types or out of range.
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

/// An event with any value anywhere is delivered or becomes a dead letter, and the other events of its page are
/// delivered.
#[tokio::test]
async fn event_with_any_value() {
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
    let first = message(42, 1, "the first").to_string();
    let last = message(42, 2, "the last").to_string();
    let body = format!(r#"{{"events":[{first},{},{last}]}}"#, events.join(","));
    run_test(async |t| {
        t.differs("the comparison knows nothing of such events");
        t.bigchat.reports(raw(&body));
        t.once().await;
        let before = t.count_events("true");
        assert!(before > 200, "{before}");
        assert_eq!(t.events("waiting"), 0);
        let texts = t.our_api.messages();
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
        assert_eq!(t.bigchat.queries(), [window(NOW - 10, NOW)]);
        // An event reported again is recognized, parsed or not.
        t.bigchat.reports(raw(&body));
        t.once().await;
        assert_eq!(t.count_events("true"), before);
        assert_eq!(t.our_api.messages(), texts);
        // A reason never quotes a value in full.
        for failed in t.failed() {
            assert!(failed.reason.len() < 3_000, "{failed:?}");
        }
    })
    .await;
}

/// No header moves the cursor or hides the page.
#[tokio::test]
async fn page_with_odd_headers() {
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
            run_test(async |t| {
                t.once().await;
                t.bigchat.clock(NOW + 60);
                t.bigchat.queries();
                let name = header.split(':').next().expect("a name").to_owned();
                t.tamper_pages(1, move |answer| with_header(&answer, &name, &header))
                    .await;
                t.bigchat.reports([message(42, 1, "one")]);
                t.once().await;
                t.once().await;
                assert_eq!(t.our_api.messages(), ["one"], "{case}");
                let queries = t.bigchat.queries();
                assert_eq!(queries[0], window(NOW - 5, NOW + 60), "{case}");
                assert_eq!(queries[1], window(NOW + 55, NOW + 60), "{case}");
            })
            .await;
        },
    )
    .await;
}

/// A response with a wrong `content-length` is not accepted as a page.
#[tokio::test]
async fn content_length_is_wrong() {
    side_by_side(
        [
            "1",
            "1000000",
            "-1",
            "99999999999999999999999",
            "many",
            "7\r\ncontent-length: 9",
        ],
        async |length| {
            run_test(async |t| {
                let header = format!("content-length: {length}");
                t.tamper_pages(1, move |answer| {
                    with_header(&answer, "content-length", &header)
                })
                .await;
                t.once().await;
                t.bigchat.reports([message(42, 1, "one")]);
                t.once().await;
                assert_eq!(t.our_api.messages(), ["one"], "{length}");
                let queries = t.bigchat.queries();
                assert_eq!(
                    queries[..2],
                    [window(NOW - 10, NOW), window(NOW - 10, NOW)],
                    "{length}"
                );
            })
            .await;
        },
    )
    .await;
}

/// An endless response is read only up to the size limit.
#[tokio::test]
async fn response_without_end() {
    run_test(async |t| {
        t.set("--request-timeout", "60s")
            .set("--log-format", "text");
        let (bigchat, our_api) = (
            flooding(&t.bigchat.url(), "GET /events").await,
            flooding(&t.our_api.url(), "POST /chats").await,
        );
        t.set("--bigchat-url", &bigchat)
            .set("--our-api-url", &our_api);
        let daemon = Process::start(t);
        until("three answers without end", async || {
            t.bigchat.count("GET /events") > 3
        })
        .await;
        t.bigchat.reports([start(42, 0), message(42, 1, "one")]);
        t.until_events("delivered", 2).await;
        assert!(
            daemon.lines_with("larger than 32 MiB") > 0,
            "{}",
            daemon.log()
        );
        let peak = daemon.mebibytes("VmHWM");
        assert!(peak < MEMORY, "{peak} MiB");
        assert!(daemon.stop().await.success());
        assert_eq!(t.our_api.messages(), ["one"]);
        assert_eq!(t.our_api.chats().len(), 1);
    })
    .await;
}

/// A proxy whose first three responses to requests with this line never end. The requests themselves are carried out.
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

/// A response that trickles times out like one that never comes.
#[tokio::test]
async fn response_that_trickles() {
    run_test(async |t| {
        t.set("--request-timeout", "300ms");
        t.tamper_pages(1, |_| {
            let head = b"HTTP/1.1 200 OK\r\n\r\n";
            Tampered::without_end(head, b" ", Duration::from_millis(20))
        })
        .await;
        t.start();
        until("the next poll", async || t.bigchat.count("GET /events") > 1).await;
        t.bigchat.reports([message(42, 1, "one")]);
        t.until_events("delivered", 1).await;
    })
    .await;
}

/// A chat of a million messages costs bounded memory, and does not delay other conversations.
#[tokio::test]
async fn chat_of_a_million_messages() {
    run_test(async |t| {
        t.differs("a chat cannot be read back");
        t.set("--max-attempts", "2");
        let daemon = t.start();
        t.delivers([start(42, 0), start(43, 1)]).await;
        daemon.stop().await;
        let million = r#"{"text":"hello","sent_at":"2026-11-22T22:00:05"},"#.repeat(1_000_000);
        let million = format!("[{}]", million.trim_end_matches(','));
        let messages = "GET /chats/c1/messages";
        t.our_api
            .upset(messages, status(200).body(&million).always());
        let daemon = Process::start(t);
        t.bigchat
            .reports([message(42, 5, "hello"), message(43, 6, "other")]);
        let mut n = 0;
        until("the event has failed", async || {
            n += 1;
            t.bigchat.reports([message(43, 7, &format!("number {n}"))]);
            t.events("failed") == 1
        })
        .await;
        let peak = daemon.mebibytes("VmHWM");
        assert!(peak < MEMORY, "{peak} MiB");
        assert!(daemon.stop().await.success());
        assert!(t.our_api.messages().contains(&"other".to_owned()));
        let failed = t.failed();
        assert!(
            failed[0]
                .response
                .as_deref()
                .is_some_and(|response| response.contains("32 MiB")),
            "{failed:?}"
        );
        // Half as many messages fit within the limit, and the message is found among them.
        t.our_api.calm();
        let many = r#"{"text":"hello","sent_at":"2026-11-22T22:00:05"},"#.repeat(500_000);
        let many = format!("[{}]", many.trim_end_matches(','));
        t.our_api.upset(messages, status(200).body(&many));
        t.failed_command(&["retry", "--all"]).expect("a retry");
        let daemon = Process::start(t);
        until("the message is found", async || {
            t.events("failed") + t.events("waiting") == 0
        })
        .await;
        let peak = daemon.mebibytes("VmHWM");
        assert!(peak < MEMORY, "{peak} MiB");
        assert!(daemon.stop().await.success());
        assert!(!t.our_api.messages().contains(&"hello".to_owned()));
    })
    .await;
}

/// A page of a million events costs bounded memory and time.
#[tokio::test]
async fn page_of_a_million_events() {
    run_test(async |t| {
        t.fails(1);
        let body = format!(r#"{{"events":[{}0]}}"#, "0,".repeat(1 << 20));
        t.bigchat.reports(raw(&body));
        let daemon = Process::start(t);
        until("the dead letter is stored", async || {
            t.is_ready() && t.events("failed") == 1
        })
        .await;
        t.bigchat.reports([message(42, 1, "one")]);
        t.until_events("delivered", 1).await;
        let peak = daemon.mebibytes("VmHWM");
        assert!(peak < MEMORY / 4, "{peak} MiB");
        assert!(daemon.stop().await.success());
    })
    .await;
}

/// A next page that cannot be requested completes the poll.
#[tokio::test]
async fn next_page_cannot_be_requested() {
    side_by_side(
        [
            format!("?page={}", "2".repeat(100_000)),
            "\u{0}".into(),
            "?".into(),
            "http://[/?".into(),
        ],
        async |next| {
            run_test(async |t| {
                t.bigchat.reports(page([message(42, 1, "one")], &*next));
                t.once().await;
                assert_eq!(t.our_api.messages(), ["one"]);
                t.once().await;
                let queries = t.bigchat.queries();
                assert_eq!(queries, [window(NOW - 10, NOW), window(NOW - 5, NOW)]);
            })
            .await;
        },
    )
    .await;
}

/// No request can contain an address of 100,000 characters, so the chat has no agent.
#[tokio::test]
async fn advisor_with_an_endless_address() {
    run_test(async |t| {
        t.differs("no request can contain the advisor's address");
        t.bigchat
            .advisor(7, "Ann", &format!("{}@x.test", "a".repeat(100_000)));
        let daemon = t.start();
        t.delivers([start(42, 0), message(42, 1, "one")]).await;
        daemon.stop().await;
        assert_eq!(t.our_api.chats(), ["42 22:00:00 - -"]);
    })
    .await;
}

/// Messages in OurAPI whose times are impossible for an event do not delay events.
#[tokio::test]
async fn messages_of_impossible_times() {
    run_test(async |t| {
        t.our_api.has_chat("c1", "42", 0);
        let held = |at: &str| json!({"text": "from elsewhere", "sent_at": at});
        let body = json!([
            held("0001-01-01T00:00:00"),
            held("1969-12-31T23:59:59Z"),
            held("9999-12-31T23:59:59.999999")
        ]);
        let upset = status(200).body(body.to_string());
        t.our_api.upset("GET /chats/c1/messages", upset);
        let daemon = t.start();
        t.delivers([start(42, 0), message(42, 1, "one")]).await;
        daemon.stop().await;
        assert_eq!(
            t.our_api.count("GET /chats/c1/messages"),
            1,
            "it is not retried"
        );
        assert_eq!(
            t.our_api.count("POST /chats/c1/messages"),
            1,
            "it is not retried"
        );
    })
    .await;
}

/// No request and no token goes to another host, even if a response names one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redirects_to_another_host() {
    let trap = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let address = trap.local_addr().expect("an address");
    let elsewhere = format!("http://{address}");
    run_test(async |t| {
        t.unmet("each service gets the faults of both");
        for (code, route) in [301, 302, 303, 307, 308]
            .into_iter()
            .cycle()
            .zip(ROUTES.into_iter().cycle().take(20))
        {
            let upset = status(code)
                .header("location", &format!("{elsewhere}/{route}"))
                .header("refresh", &format!("0; url={elsewhere}"))
                .header("alt-svc", &format!("h2=\"{address}\"; ma=3600"))
                .header("link", &format!("<{elsewhere}/events>; rel=next"))
                .header("proxy-authenticate", "Basic");
            t.bigchat.upset(route, upset.clone());
            t.our_api.upset(route, upset);
        }
        t.bigchat.reports(page(
            [start(42, 0), message(42, 1, "one")],
            format!("{elsewhere}/events?page=2"),
        ));
        t.bigchat.reports(page(
            [message(42, 2, "two")],
            format!("//{address}/events?page=3"),
        ));
        t.bigchat.reports(Page::from([end(42, 9)]));
        let mut program = t.program("run");
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
        let daemon = Process::start_as(t, program);
        t.until_events("delivered", 4).await;
        assert!(daemon.stop().await.success());
        assert_eq!(t.our_api.messages(), ["one", "two"]);
        let heard = tokio::time::timeout(Duration::from_millis(50), trap.accept()).await;
        assert!(heard.is_err(), "{heard:?}");
    })
    .await;
}

/// An odd event in the details delays no message of the conversation.
#[tokio::test]
async fn details_with_an_odd_event() {
    side_by_side([
        r#"{"conversation_id": 42, "event_name": "MESSAGE", "event_at": 1795384805.5, "data": {"message": "?"}}"#,
        r#"{"conversation_id": 42, "event_name": "MESSAGE", "event_at": 1795384805, "data": {"message": "\ud800"}}"#,
        r#"{"conversation_id": 42, "event_name": "NOTE", "event_at": null}"#,
        r#"["START"]"#,
        r#"["START", 5]"#,
    ], async |odd| {
        run_test(async |t| {
            let start = start(42, 0);
            let details = format!(
                r#"{{"events": [{odd}, {start}], "conversation_id": 42, "advisor_id": 7}}"#
            );
            let response = status(200).body(&details).always();
            t.bigchat.upset("GET /conversations/42", response);
            let daemon = t.start();
            t.delivers([message(42, 2, "hello")]).await;
            daemon.stop().await;
            assert_eq!(t.our_api.chats(), ["42 22:00:00 - a1"]);
            assert_eq!(t.our_api.messages(), ["hello"]);
        })
        .await;
    })
    .await;
}
