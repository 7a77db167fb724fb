//! Windows and pages, and responses that are not pages.

use crate::harness::services::{
    NOW, Tampered, quiet_log, tampering, time, unix, window, with_body, with_header,
};
use crate::harness::{Test, run_test, run_with, side_by_side, until};
use bigchat_sync::domain::time::Timestamp;
use bigchat_sync::http::Api;
use bigchat_sync::simulator::bigchat::{Clock, Log, Options, page, raw};
use bigchat_sync::simulator::event::{end, message, start, transfer};
use bigchat_sync::simulator::fault::{dropped, paused, status};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use url::form_urlencoded;
use wiremock::MockServer;

/// The query of the first window.
fn first_window() -> String {
    window(NOW - 10, NOW)
}

/// Pages are read one after the other, and the next window begins at the cursor minus the overlap.
#[tokio::test]
async fn pages_then_next_window() {
    run_test(async |t| {
        let next = |n| format!("http://{}/events?page={n}", "bigchat.test");
        t.bigchat.reports(page([start(42, 0)], next(2)));
        t.bigchat.reports(page([message(42, 1, "one")], next(3)));
        t.bigchat.reports([message(42, 2, "two")]);
        t.once().await;
        assert_eq!(t.bigchat.queries(), [&first_window(), "page=2", "page=3"]);
        assert_eq!(t.our_api.messages(), ["one", "two"]);
        t.bigchat.clock(NOW + 60);
        t.once().await;
        t.once().await;
        assert_eq!(
            t.bigchat.queries(),
            [window(NOW - 5, NOW + 60), window(NOW + 55, NOW + 60)]
        );
    })
    .await;
}

#[tokio::test]
async fn failed_page_is_retried_at_once() {
    run_test(async |t| {
        t.bigchat.reports(page([message(42, 1, "one")], "?page=2"));
        t.bigchat.reports([message(42, 2, "two")]);
        t.bigchat.upset("GET /events?page=2", status(500));
        t.once().await;
        assert_eq!(
            t.bigchat.queries(),
            [&first_window(), "page=2", "page=2"],
            "again at once, while the pages before it are fresh"
        );
        assert_eq!(t.our_api.messages(), ["one", "two"]);
    })
    .await;
}

/// The next poll continues from the page that failed.
#[tokio::test]
async fn failed_page_across_restarts() {
    run_test(async |t| {
        t.bigchat.reports(page([message(42, 1, "one")], "?page=2"));
        t.bigchat.reports([message(42, 2, "two")]);
        t.bigchat.upset("GET /events?page=2", status(500).times(3));
        t.once().await;
        assert_eq!(
            t.bigchat.queries(),
            [&first_window(), "page=2", "page=2", "page=2"]
        );
        assert_eq!(t.our_api.messages(), ["one"]);
        t.once().await;
        t.once().await;
        assert_eq!(t.bigchat.queries(), ["page=2", &window(NOW - 5, NOW)]);
        assert_eq!(t.our_api.messages(), ["one", "two"]);
    })
    .await;
}

#[tokio::test]
async fn missing_page_restarts_the_window() {
    // After a 500, the page is requested three times immediately, and then once in each of two more polls.
    side_by_side([(404, 1), (422, 1), (500, 5)], async |(answer, times)| {
        run_test(async |t| {
            t.bigchat.reports(page([message(42, 1, "one")], "?page=2"));
            t.bigchat.reports([message(42, 2, "two")]);
            let upset = status(answer).always();
            t.bigchat.upset("GET /events?page=2", upset);
            let daemon = t.start();
            t.until_events("delivered", 2).await;
            daemon.stop().await;
            let queries = t.bigchat.queries();
            let again = queries.iter().skip(1).find(|query| **query != "page=2");
            let start_of = |query: &str| query.split('&').next().map(str::to_owned);
            assert_eq!(
                again.and_then(|query| start_of(query)),
                start_of(&first_window()),
                "{answer}"
            );
            let asked = queries.iter().filter(|query| *query == "page=2").count();
            assert_eq!(asked, times, "{answer}");
            assert_eq!(t.our_api.messages(), ["one", "two"], "{answer}");
        })
        .await;
    })
    .await;
}

/// Pages in a loop complete the poll.
#[tokio::test]
async fn pages_in_a_loop() {
    let first = format!("?{}", first_window());
    side_by_side(
        [
            (vec![&*first], vec![]),
            (vec!["?page=2", &first], vec!["page=2"]),
            (vec!["?page=2", "?page=2"], vec!["page=2"]),
            (
                vec!["?page=2", "?page=3", "?page=2"],
                vec!["page=2", "page=3"],
            ),
        ],
        async |(nexts, asked)| {
            run_test(async |t| {
                for (n, next) in (1..).zip(&nexts) {
                    let events = [message(42, n, &format!("text {n}")), end(42, 9)];
                    t.bigchat.reports(page(events, *next));
                }
                t.once().await;
                let expected = [&[&first[1..]], &asked[..]].concat();
                assert_eq!(t.bigchat.queries(), expected, "{nexts:?}");
                assert_eq!(t.our_api.messages().len(), nexts.len(), "{nexts:?}");
                t.once().await;
                assert_eq!(
                    t.bigchat.queries(),
                    [window(NOW - 5, NOW)],
                    "the cursor moved"
                );
            })
            .await;
        },
    )
    .await;
}

/// Only the query of a `nextPageUrl` is used.
#[tokio::test]
async fn next_page_url_of_another_host() {
    let elsewhere = MockServer::start().await;
    side_by_side(
        [
            format!("{}/steal?page=2", elsewhere.uri()),
            format!("{}?page=2", elsewhere.uri().replace("http:", "")),
            "https://bigchat.test:1/events?page=2#end".into(),
            "/events?page=2".into(),
            "?page=2".into(),
            "not a URL at all ?page=2".into(),
        ],
        async |next| {
            run_test(async |t| {
                t.bigchat.reports(page([message(42, 1, "one")], &*next));
                t.bigchat.reports([message(42, 2, "two")]);
                t.once().await;
                assert_eq!(t.bigchat.queries(), [&first_window(), "page=2"], "{next}");
                assert_eq!(t.our_api.messages(), ["one", "two"], "{next}");
            })
            .await;
        },
    )
    .await;
    let received = elsewhere.received_requests().await;
    assert_eq!(received.expect("it records").len(), 0);
}

/// A `nextPageUrl` of a wrong type is not followed.
#[tokio::test]
async fn next_page_of_wrong_type() {
    side_by_side(
        [
            json!(null),
            json!(""),
            json!("http://bigchat.test/events"),
            json!("?"),
            json!(2),
            json!(true),
            json!(["?page=2"]),
            json!({"url": "?page=2"}),
        ],
        async |next| {
            run_test(async |t| {
                t.bigchat
                    .reports(page([message(42, 1, "one")], next.clone()));
                t.once().await;
                assert_eq!(t.our_api.messages(), ["one"], "{next}");
                t.once().await;
                let queries = t.bigchat.queries();
                assert_eq!(queries, [first_window(), window(NOW - 5, NOW)], "{next}");
            })
            .await;
        },
    )
    .await;
}

/// Each unparsable event becomes a dead letter with its raw JSON and the reason. The others on the page are delivered.
#[tokio::test]
async fn unreadable_events_are_dead_lettered() {
    let at = unix(5);
    let bad = [
        (
            format!(
                r#"{{ "conversation_id":42, "event_name":"REOPEN","event_at":{at},"data":null}}"#
            ),
            "unknown event name: \"REOPEN\"",
        ),
        (
            format!(r#"{{"conversation_id":"42","event_name":"END","event_at":{at}}}"#),
            "not a BigChat event",
        ),
        (
            r#"{"conversation_id":42,"event_name":"END","event_at":17.5}"#.into(),
            "not a BigChat event",
        ),
        (
            r#"{"conversation_id":42,"event_name":"END","event_at":99999999999999999999}"#.into(),
            "not a BigChat event",
        ),
        (
            r#"{"conversation_id":42,"event_name":"END"}"#.into(),
            "missing field `event_at`",
        ),
        (
            r#"{"conversation_id":42,"event_name":"END","event_at":-1}"#.into(),
            "event time out of range: -1",
        ),
        (
            format!(r#"{{"conversation_id":42,"event_name":"MESSAGE","event_at":{at}}}"#),
            "MESSAGE without data",
        ),
        (
            format!(
                r#"{{"conversation_id":42,"event_name":"MESSAGE","event_at":{at},"data":{{"text":"Hi"}}}}"#
            ),
            "invalid data of a MESSAGE",
        ),
        (
            format!(
                r#"{{"conversation_id":42,"event_name":"TRANSFER","event_at":{at},"data":{{"new_advisor_id":"8"}}}}"#
            ),
            "invalid data of a TRANSFER",
        ),
        (r#""END""#.into(), "not a BigChat event"),
        ("null".into(), "not a BigChat event"),
        ("[]".into(), "not a BigChat event"),
    ];
    run_test(async |t| {
        t.fails(12);
        let mut events: Vec<&str> = bad.iter().map(|(raw, _)| &**raw).collect();
        let [first, last] = [message(42, 1, "one"), message(42, 2, "two")].map(|e| e.to_string());
        events.insert(0, &first);
        events.push(&last);
        let body = format!(r#"{{"events":[{}]}}"#, events.join(","));
        t.bigchat.reports(raw(&body));
        t.bigchat.reports(raw(&body));
        for why in ["at first", "reported again, nothing is new"] {
            t.once().await;
            assert_eq!(t.our_api.messages(), ["one", "two"], "{why}");
            let failed = t.failed();
            assert_eq!(failed.len(), bad.len(), "{why}");
            for (failed, (raw, reason)) in failed.iter().zip(&bad) {
                assert_eq!(failed.kind, "UNREADABLE");
                assert_eq!(failed.data.as_ref(), Some(raw));
                assert!(failed.reason.contains(reason), "{raw}: {}", failed.reason);
            }
        }
        assert_eq!(t.bigchat.queries(), [first_window(), window(NOW - 5, NOW)]);
    })
    .await;
}

/// The cursor does not move after a response that is not a page.
#[tokio::test]
async fn response_that_is_no_page() {
    let elsewhere = MockServer::start().await;
    let html = status(200).body("<html>We will be right back</html>");
    let redirect = status(302).header("location", &format!("{}/events", elsewhere.uri()));
    side_by_side(
        [
            status(500),
            status(503),
            status(429),
            status(404),
            status(401),
            redirect,
            html,
            status(200),
            status(200).body("[]"),
            status(200).body(r#"{"detail":"maintenance"}"#),
            status(200).body(r#"{"events":{},"nextPageUrl":null}"#),
            status(200).body(r#"{"events":[{"conversation_id":42"#),
        ]
        .into_iter()
        .enumerate(),
        async |(case, upset)| {
            run_test(async |t| {
                t.once().await;
                t.bigchat.clock(NOW + 60);
                t.bigchat.queries();
                t.bigchat.upset("GET /events", upset);
                t.once().await;
                t.bigchat.reports([message(42, 1, "one")]);
                t.once().await;
                let window = window(NOW - 5, NOW + 60);
                assert_eq!(t.bigchat.queries(), [&*window, &window], "case {case}");
                assert_eq!(t.our_api.messages(), ["one"], "case {case}");
                assert_eq!(t.failed(), [], "case {case}");
            })
            .await;
        },
    )
    .await;
    let received = elsewhere.received_requests().await;
    assert_eq!(received.expect("it records").len(), 0);
}

/// A response with this much additional data.
fn padded(answer: &[u8], mebibytes: usize) -> Vec<u8> {
    let text = String::from_utf8_lossy(answer);
    let (_, body) = text.split_once("\r\n\r\n").expect("an answer");
    let padding = "x".repeat(mebibytes << 20);
    let body = format!(r#"{{"padding":"{padding}",{}"#, &body[1..]);
    with_body(answer, "", body.as_bytes())
}

type Tamper = fn(Vec<u8>) -> Vec<u8>;

/// A body that is truncated or too large is not accepted as a page.
#[tokio::test]
async fn body_cut_off_or_too_large() {
    let cut_off: Tamper = |answer| answer[..answer.len() - 10].to_vec();
    let too_large: Tamper = |answer| padded(&answer, 33);
    let large: Tamper = |answer| padded(&answer, 1);
    side_by_side(
        [
            ("cut off", cut_off, None, vec![first_window()]),
            ("too large", too_large, None, shorter_windows()),
            ("large", large, Some("one"), vec![window(NOW - 5, NOW)]),
        ],
        async |(case, tamper, text, windows)| {
            run_test(async |t| {
                t.differs("pages are damaged in transit");
                t.tamper_pages(1, tamper).await;
                t.bigchat.reports([message(42, 1, "one")]);
                t.once().await;
                assert_eq!(t.our_api.messages(), Vec::from_iter(text), "{case}");
                t.bigchat.reports([message(42, 2, "two")]);
                t.once().await;
                let queries = [vec![first_window()], windows].concat();
                assert_eq!(t.bigchat.queries(), queries, "{case}");
                let expected = text.into_iter().chain(["two"]);
                assert_eq!(t.our_api.messages(), Vec::from_iter(expected), "{case}");
            })
            .await;
        },
    )
    .await;
}

/// The windows after the first one, whose page was too large: it is read in two parts, and then the next one is read.
fn shorter_windows() -> Vec<String> {
    vec![
        window(NOW - 10, NOW - 3),
        window(NOW - 8, NOW),
        window(NOW - 5, NOW),
    ]
}

fn messages(texts: &str) -> Vec<Value> {
    let texts = texts.split_whitespace();
    texts.map(|text| message(42, 5, text)).collect()
}

/// Equal messages on later pages count separately, except where pages have shifted and overlap.
#[tokio::test]
async fn equal_messages_on_later_pages() {
    for (case, first, second, expected) in [
        ("not at an edge", "kk aa", "bb kk", "aa bb kk kk"),
        ("the pages have shifted", "aa kk", "kk bb", "aa bb kk"),
        ("by two", "aa kk bb", "kk bb cc", "aa bb cc kk"),
        ("twins, and no shift", "kk kk", "aa kk", "aa kk kk kk"),
    ] {
        for fails in [false, true] {
            run_test(async |t| {
                t.differs("scripted pages imitate a log that shifts");
                t.bigchat.reports(page(messages(first), "?page=2"));
                t.bigchat.reports(messages(second));
                let mut asked = vec![first_window(), "page=2".into()];
                if fails {
                    t.bigchat.upset("GET /events?page=2", status(500).times(3));
                    asked.extend(vec!["page=2".into(); 3]);
                    t.once().await;
                }
                t.once().await;
                assert_eq!(t.bigchat.queries(), asked, "{case}, {fails}");
                assert_eq!(
                    t.our_api.sorted_messages().join(" "),
                    expected,
                    "{case}, {fails}"
                );
            })
            .await;
        }
    }
}

/// Twins on either side of a page edge count as two once the next poll has reported both.
#[tokio::test]
async fn twins_at_a_page_edge() {
    run_test(async |t| {
        t.bigchat.reports(page(messages("aa kk"), "?page=2"));
        t.bigchat.reports(messages("kk bb"));
        t.once().await;
        t.bigchat.reports(messages("aa kk kk bb"));
        t.once().await;
        assert_eq!(t.our_api.sorted_messages().join(" "), "aa bb kk kk");
    })
    .await;
}

/// Ten successive pages that repeat earlier ones under other URLs complete the poll.
#[tokio::test]
async fn pages_repeated_by_other_urls() {
    side_by_side(
        [
            ("at once", vec!["aa bb"], 1),
            ("with one event", vec!["aa"], 1),
            ("in turns", vec!["aa bb", "cc dd"], 3),
            ("after an empty one", vec!["aa bb", ""], 1),
        ],
        async |(case, pages, before)| {
            run_test(async |t| {
                t.differs("scripted pages imitate a log that shifts");
                for (n, texts) in pages.iter().cycle().take(20).enumerate() {
                    let next = format!("?page={}&session={n}", n + 2);
                    t.bigchat.reports(page(messages(texts), next));
                }
                t.once().await;
                assert_eq!(t.bigchat.queries().len(), before + 10, "{case}");
                let mut once: Vec<_> = pages
                    .join(" ")
                    .split_whitespace()
                    .map(str::to_owned)
                    .collect();
                once.sort();
                once.dedup();
                assert_eq!(t.our_api.sorted_messages(), once, "{case}");
                assert_eq!(t.cursor(), Some(NOW), "{case}");
            })
            .await;
        },
    )
    .await;
}

/// A flood of equal messages does not hide the events on later pages.
#[tokio::test]
async fn pages_after_a_repeated_one() {
    run_test(async |t| {
        t.differs("equal pages count once");
        for (n, texts) in ["ok ok", "ok ok", "aa bb"].iter().enumerate() {
            let next = format!("?page={}", n + 2);
            t.bigchat.reports(page(messages(texts), next));
        }
        t.bigchat.reports(messages("cc"));
        t.once().await;
        assert_eq!(t.our_api.sorted_messages(), ["aa", "bb", "cc", "ok", "ok"]);
    })
    .await;
}

/// A page that equals an earlier page, but not the previous one, does not complete the poll.
#[tokio::test]
async fn equal_pages_apart() {
    run_test(async |t| {
        for (n, texts) in ["ok ok", "aa bb", "ok ok"].iter().enumerate() {
            let next = format!("?page={}", n + 2);
            t.bigchat.reports(page(messages(texts), next));
        }
        t.bigchat.reports(messages("cc"));
        t.once().await;
        assert_eq!(t.bigchat.queries().len(), 4);
        let texts = t.our_api.sorted_messages();
        assert_eq!(texts, ["aa", "bb", "cc", "ok", "ok", "ok", "ok"]);
    })
    .await;
}

/// Equal ENDs and TRANSFERs on successive pages count once.
#[tokio::test]
async fn end_and_transfer_repeated() {
    run_test(async |t| {
        let repeated = [end(42, 5), transfer(42, 6, 8)];
        t.bigchat.reports(page(repeated.clone(), "?page=2"));
        t.bigchat.reports(repeated);
        t.once().await;
        assert_eq!(t.bigchat.queries(), [&first_window(), "page=2"]);
        assert_eq!(t.count_events("kind = 'END'"), 1);
        assert_eq!(t.count_events("kind = 'TRANSFER'"), 1);
        assert_eq!(t.count_events("state = 'delivered'"), 2);
    })
    .await;
}

/// Transfers reported again on pages that are cut elsewhere change nothing.
#[tokio::test]
async fn transfers_reported_again() {
    run_test(async |t| {
        let twin = || transfer(42, 5, 7);
        t.bigchat.reports(page([twin()], "?page=2"));
        t.bigchat.reports([twin(), transfer(42, 5, 8)]);
        t.once().await;
        assert_eq!(t.our_api.chats(), ["42 22:00:00 - a1"]);
        for again in [
            [twin(), twin(), transfer(42, 5, 8)],
            [twin(), transfer(42, 5, 8), twin()],
        ] {
            t.bigchat.reports(again);
            t.once().await;
            assert_eq!(t.our_api.chats(), ["42 22:00:00 - a1"]);
            assert_eq!(t.count_events("kind = 'TRANSFER'"), 2);
        }
    })
    .await;
}

/// Each of several equal messages on one page counts, but none counts again in a later poll.
#[tokio::test]
async fn equal_messages_on_one_page() {
    run_test(async |t| {
        for (events, held) in [("kk kk", 2), ("kk", 2), ("kk kk", 2), ("kk kk kk", 3)] {
            t.bigchat.reports(messages(events));
            t.once().await;
            assert_eq!(t.our_api.messages(), vec!["kk"; held], "{events}");
        }
    })
    .await;
}

#[tokio::test]
async fn first_window_as_set() {
    let since = "--since";
    side_by_side(
        [
            ("--poll-interval", "1h", NOW - 10, 5),
            ("--poll-overlap", "0s", NOW - 10, 0),
            ("--poll-overlap", "61500ms", NOW - 61, 61),
            (since, "2026-11-22T22:01:00Z", 60, 5),
            (since, "2026-11-23T00:01:00.9+02:00", 60, 5),
            (since, "2026-11-23T22:01:00Z", NOW - 5, 5),
        ],
        async |(flag, value, start, overlap)| {
            run_test(async |t| {
                t.set(flag, value);
                t.once().await;
                t.once().await;
                assert_eq!(
                    t.bigchat.queries(),
                    [window(start, NOW), window(NOW - overlap, NOW)],
                    "{flag}={value}"
                );
            })
            .await;
        },
    )
    .await;
}

/// A long backfill is read in consecutive windows.
#[tokio::test]
async fn backfill_in_windows() {
    run_test(async |t| {
        t.set("--since", &time(-7200)).set("--poll-interval", "1h");
        for n in 0..3 {
            t.bigchat.reports([message(42, n, &format!("text {n}"))]);
        }
        let daemon = t.start();
        t.until_events("delivered", 3).await;
        daemon.stop().await;
        assert_eq!(
            t.bigchat.queries(),
            [window(-7200, -3600), window(-3605, -5), window(-10, NOW)]
        );
    })
    .await;
}

#[tokio::test]
async fn windows_by_bigchat_clock() {
    run_test(async |t| {
        let ahead = SystemTime::now() + Duration::from_secs(3600);
        t.bigchat.date(&httpdate::fmt_http_date(ahead));
        t.once().await;
        let ahead = ahead.duration_since(SystemTime::UNIX_EPOCH);
        let ahead = ahead.expect("after 1970").as_secs().cast_signed() - unix(0);
        assert_eq!(t.bigchat.queries(), [window(ahead - 10, ahead)]);

        t.bigchat.clock(0);
        t.bigchat.reports([message(42, 1, "one")]);
        t.once().await;
        assert_eq!(
            t.bigchat.queries(),
            [window(-5, 0)],
            "a cursor ahead of its clock goes back to it"
        );
        assert_eq!(t.our_api.messages(), ["one"]);
    })
    .await;
}

/// Without a readable date, this machine's clock is used.
#[tokio::test]
async fn date_cannot_be_read() {
    run_test(async |t| {
        t.bigchat.date("soon");
        let seconds = || {
            let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            since.expect("after 1970").as_secs().cast_signed() - unix(0)
        };
        let before = seconds();
        t.once().await;
        let asked = t.bigchat.queries();
        let mut possible = (before..=seconds()).map(|now| window(now - 10, now));
        assert!(possible.any(|window| asked == [window]), "{asked:?}");
    })
    .await;
}

/// Reports pages with one message each. Each page links to the next.
fn reports_pages(t: &Test, pages: i64) {
    reports_linked_pages(t, pages - 1);
    t.bigchat
        .reports([message(42, pages, &format!("text {pages}"))]);
}

/// The same, and the last one links to a further page.
fn reports_linked_pages(t: &Test, pages: i64) {
    for n in 1..=pages {
        let event = message(42, n, &format!("text {n}"));
        t.bigchat.reports(page([event], format!("?page={}", n + 1)));
    }
}

/// A poll without end pauses after its page budget, and the next poll continues from there, at once if all pages were
/// known.
#[tokio::test]
async fn poll_without_end() {
    run_test(async |t| {
        let rest = ["page=201", "page=202", "page=203"];
        reports_pages(t, 203);
        t.once().await;
        assert_eq!(t.bigchat.queries().len(), 200);
        assert_eq!(t.our_api.messages().len(), 200);
        t.once().await;
        assert_eq!(t.bigchat.queries(), rest);
        assert_eq!(t.our_api.messages().len(), 203);
        reports_pages(t, 203);
        t.once().await;
        assert_eq!(t.bigchat.queries()[200..], rest);
        assert_eq!(t.our_api.messages().len(), 203);
    })
    .await;
}

/// An overlap that fills the page budget does not hide the events after it: a short one in a burst of events, or a long
/// one.
#[tokio::test]
async fn new_events_after_a_full_overlap() {
    side_by_side([("5s", 0), ("10m", 1)], async |(overlap, apart)| {
        let log = Log {
            page_size: 1,
            ..Log::default()
        };
        let options = Options {
            clock: Clock::Still(NOW),
            ..quiet_log(log)
        };
        run_with(options, async |t| {
            t.set("--poll-overlap", overlap)
                .set("--since", &time(NOW - 300));
            t.bigchat.open(10, NOW - 300, 1);
            for n in 0..205 {
                let event = message(10, NOW - 2 - apart * n, &format!("text {n}"));
                t.bigchat.reports_event(event);
            }
            for _ in 0..3 {
                t.once().await;
            }
            assert_eq!(t.our_api.message_count(), 205);
            t.bigchat.clock(NOW + 10);
            t.bigchat.reports_event(message(10, NOW + 5, "new"));
            t.bigchat.clock(NOW + 20);
            for _ in 0..3 {
                t.once().await;
            }
            let messages = t.our_api.messages();
            assert!(messages.contains(&"new".to_owned()), "overlap {overlap}");
        })
        .await;
    })
    .await;
}

/// Known pages without end complete a window after many page budgets, which are read without waiting, so that new
/// events of the next window are not delayed. The cursor then moves up to now, which shows that BigChat's clock
/// advances.
#[tokio::test]
async fn known_pages_without_end() {
    run_test(async |t| {
        reports_pages(t, 603);
        for _ in 0..4 {
            t.once().await;
        }
        t.bigchat.queries();
        t.execute("UPDATE poll_state SET cursor_moved_at = cursor_moved_at - 600000");
        t.set("--max-window", "30s");
        t.bigchat.clock(NOW + 60);
        reports_linked_pages(t, 600);
        t.execute("UPDATE poll_state SET idle_polls = 18");
        t.once().await;
        let queries = t.bigchat.queries();
        let windows = [window(NOW + 20, NOW + 50), window(NOW + 45, NOW + 60)];
        assert_eq!(queries[600..], windows);
        assert_eq!(t.cursor(), Some(NOW + 60));
        let (shown, _) = t.status();
        let problems = shown["problems"].to_string();
        assert!(!problems.contains("has not advanced"), "{problems}");
        let idle: i64 = t.value("SELECT idle_polls FROM poll_state");
        assert_eq!(idle, 0, "the next window begins anew");
        t.bigchat.reports([message(42, 604, "new")]);
        t.once().await;
        assert_eq!(t.our_api.messages().len(), 604);
    })
    .await;
}

/// If each window has known pages without end, a window that reached up to now waits for the next tick, although
/// reading it took a while.
#[tokio::test]
async fn known_pages_without_end_in_each_window() {
    run_test(async |t| {
        reports_pages(t, 603);
        for _ in 0..4 {
            t.once().await;
        }
        t.bigchat.queries();
        t.bigchat.clock(NOW + 60);
        t.bigchat.upset("GET /events?page=100", paused());
        reports_linked_pages(t, 603);
        t.execute("UPDATE poll_state SET idle_polls = 18");
        let time_passes = async {
            until("a poll", async || t.bigchat.pausing() == 1).await;
            t.bigchat.clock(NOW + 62);
            t.bigchat.resume();
        };
        tokio::join!(t.once(), time_passes);
        assert_eq!(t.bigchat.queries().len(), 600);
    })
    .await;
}

/// An overlap that fills the page budget, and whose next page is gone by the next poll, does not stop polling for good.
/// The polls before the window is read again count, too.
#[tokio::test]
async fn known_pages_before_missing_page() {
    run_test(async |t| {
        reports_pages(t, 203);
        t.once().await;
        t.once().await;
        let before = t.cursor();
        t.bigchat.clock(NOW + 60);
        t.bigchat
            .upset("GET /events?page=201", status(404).always());
        t.execute("UPDATE poll_state SET idle_polls = 18");
        for _ in 0..6 {
            reports_linked_pages(t, 200);
        }
        for _ in 0..6 {
            t.once().await;
        }
        assert!(t.cursor() > before, "the cursor moves");
    })
    .await;
}

/// A link to the first page completes the poll, even after a pause.
#[tokio::test]
async fn link_to_the_first_page_after_a_pause() {
    run_test(async |t| {
        let text = |n| message(42, n, &format!("text {n}"));
        for n in 1..=200 {
            t.bigchat
                .reports(page([text(n)], format!("?page={}", n + 1)));
        }
        t.bigchat
            .reports(page([text(201)], format!("?{}", first_window())));
        t.once().await;
        t.bigchat.queries();
        t.once().await;
        assert_eq!(t.bigchat.queries(), ["page=201"]);
        assert_eq!(t.cursor(), Some(NOW));
    })
    .await;
}

/// Ten successive pages without events complete the poll.
#[tokio::test]
async fn ten_pages_without_events() {
    side_by_side(
        [
            ("from the start", vec![], 10),
            ("after full ones", vec![1, 2], 12),
            ("with a full one among them", vec![9], 19),
        ],
        async |(case, full, asked)| {
            run_test(async |t| {
                for n in 1..=250 {
                    let events = full
                        .contains(&n)
                        .then(|| message(42, n, &format!("text {n}")));
                    t.bigchat.reports(page(events, format!("?page={}", n + 1)));
                }
                t.once().await;
                assert_eq!(t.bigchat.queries().len(), asked, "{case}");
                t.once().await;
                let next = &t.bigchat.queries()[0];
                assert_eq!(*next, window(NOW - 5, NOW), "{case}");
            })
            .await;
        },
    )
    .await;
}

/// A window with more pages than the page budget is read again to its end.
#[tokio::test]
async fn window_rescanned_across_restarts() {
    run_test(async |t| {
        reports_linked_pages(t, 202);
        t.bigchat.upset("GET /events?page=203", status(404));
        t.once().await;
        t.once().await;
        assert_eq!(t.our_api.messages().len(), 202);
        t.bigchat.queries();
        let idle: i64 = t.value("SELECT idle_polls FROM poll_state");
        assert_eq!(
            idle, -1,
            "pages that were new do not count when they are read again"
        );
        // The window is read from its beginning, although no page of the first poll has a new event.
        reports_linked_pages(t, 202);
        t.bigchat.reports([message(42, 203, "text 203")]);
        t.once().await;
        let rest = ["page=201", "page=202", "page=203"];
        assert_eq!(t.bigchat.queries()[200..], rest);
        assert_eq!(t.our_api.messages().len(), 203);
    })
    .await;
}

#[tokio::test]
async fn broken_connection_is_retried_at_once() {
    run_test(async |t| {
        t.bigchat.upset("GET /events", dropped());
        t.bigchat.reports([message(42, 1, "one")]);
        t.once().await;
        let window = first_window();
        assert_eq!(t.bigchat.queries(), [&*window, &window]);
        assert_eq!(t.our_api.messages(), ["one"]);
    })
    .await;
}

/// A rate limit of BigChat outlasts a restart, and lasts an hour at most.
#[tokio::test]
async fn bigchat_retry_after_across_restart() {
    let now = SystemTime::now();
    let date = |at| httpdate::fmt_http_date(at);
    let in_a_day = date(now + Duration::from_secs(86_400));
    let now = date(now);
    side_by_side(
        [
            (429, "9999999999999999999999", true),
            (503, &*in_a_day, true),
            (429, "later", false),
            (503, "-1", false),
            (503, "Thu, 01 Jan 1970 00:00:00 GMT", false),
        ],
        async |(code, after, waits)| {
            run_test(async |t| {
                t.bigchat.date(&now);
                let upset = status(code).header("retry-after", after);
                t.bigchat.upset("GET /events", upset);
                t.bigchat.reports([message(42, 1, "one")]);
                t.once().await;
                assert_eq!(t.bigchat.count("GET /events"), 1, "{code} {after}");
                let until = t.limited_until(Api::BigChat);
                t.once().await;
                let asked = if waits { 1 } else { 2 };
                assert_eq!(t.bigchat.count("GET /events"), asked, "{code} {after}");
                if waits {
                    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
                    let left = until
                        - i64::try_from(since.expect("after 1970").as_millis()).expect("soon");
                    assert!((3_500_000..=3_600_000).contains(&left), "{left}");
                    t.set_limited_until(Api::BigChat, 1);
                    t.once().await;
                }
                assert_eq!(t.our_api.messages(), ["one"], "{code} {after}");
            })
            .await;
        },
    )
    .await;
}

#[tokio::test]
async fn bigchat_retry_after() {
    run_test(async |t| {
        let upset = status(429).header("retry-after", "1");
        t.bigchat.upset("GET /events", upset);
        let daemon = t.start();
        t.bigchat.reports([message(42, 1, "one")]);
        t.until_events("delivered", 1).await;
        until("the next poll", async || t.bigchat.count("GET /events") > 2).await;
        daemon.stop().await;
        let asked = t.bigchat.ever_asked("");
        let refused = asked
            .iter()
            .position(|asked| asked.line.contains("/events"));
        let refused = refused.expect("a poll");
        let pause = asked[refused + 1].at.duration_since(asked[refused].at);
        assert!(pause >= Duration::from_millis(900), "{pause:?}");
    })
    .await;
}

/// A rate limit in the middle of a window does not restart the window.
#[tokio::test]
async fn rate_limit_between_pages() {
    run_test(async |t| {
        // Longer than three polls.
        t.bigchat.upset("GET /events?page=2", status(429).times(12));
        t.bigchat.reports(page(messages("aa"), "?page=2"));
        t.bigchat.reports(messages("bb"));
        let daemon = t.start();
        t.until_events("delivered", 2).await;
        daemon.stop().await;
        let queries = t.bigchat.queries();
        assert_eq!(queries[0], first_window());
        assert_eq!(queries[1..14], ["page=2"; 13], "12 refusals");
    })
    .await;
}

/// `once` delivers even if BigChat does not answer the probe for a restart, and waits no longer than `--retry-max`.
#[tokio::test]
async fn once_without_details() {
    run_test(async |t| {
        t.set("--poll-interval", "10m");
        t.bigchat.reports([start(42, 0), message(42, 1, "one")]);
        t.once().await;
        t.bigchat
            .upset("GET /conversations/{id}", status(500).always());
        t.bigchat.reports([message(42, 2, "two")]);
        t.once().await;
        assert_eq!(t.our_api.messages(), ["one", "two"]);
    })
    .await;
}

/// A BigChat that answers only for windows of up to ten minutes is read up to the present, by the daemon and by `once`.
#[tokio::test]
async fn long_windows_are_not_answered() {
    side_by_side([true, false], async |once| {
        run_test(async |t| {
            t.once().await;
            let url = tampering(&t.bigchat.url(), |line, answer| {
                let query = line.split(['?', ' ']).nth(2).unwrap_or_default();
                let times: Vec<_> = form_urlencoded::parse(query.as_bytes())
                    .filter_map(|(_, value)| Timestamp::parse(&value))
                    .collect();
                match times[..] {
                    [start, end] if end.unix() - start.unix() > 600 => Vec::new(),
                    _ => answer,
                }
            })
            .await;
            t.set("--bigchat-url", &url);
            t.bigchat.clock(NOW + 7200);
            if once {
                t.once().await;
            } else {
                t.start();
            }
            t.until_cursor(NOW + 7200).await;
        })
        .await;
    })
    .await;
}

/// The length of the window of this query in seconds; `None`: it is no query of a window.
fn length_of(query: &str) -> Option<i64> {
    let times: Vec<_> = form_urlencoded::parse(query.as_bytes())
        .filter_map(|(_, value)| Timestamp::parse(&value))
        .collect();
    match times[..] {
        [start, end] => Some(end.unix() - start.unix()),
        _ => None,
    }
}

/// A response that does not end.
fn too_large() -> Tampered {
    Tampered::without_end(b"HTTP/1.1 200 OK\r\n\r\n", &[b' '; 1 << 20], Duration::ZERO)
}

/// If the page of a window is too large, shorter ones are read. If that does not help, the reason names the setting.
#[tokio::test]
async fn page_of_a_window_is_too_large() {
    run_test(async |t| {
        t.once().await;
        // The overlap and one second.
        let longest = Arc::new(AtomicI64::new(6));
        let limit = Arc::clone(&longest);
        let url = tampering(&t.bigchat.url(), move |line, answer| {
            let query = line.split(['?', ' ']).nth(2).unwrap_or_default();
            match length_of(query) {
                Some(length) if length > limit.load(Ordering::Relaxed) => too_large(),
                _ => answer.into(),
            }
        })
        .await;
        t.set("--bigchat-url", &url);
        t.bigchat.clock(NOW + 20);
        t.start();
        t.until_cursor(NOW + 20).await;
        longest.store(0, Ordering::Relaxed);
        let reason = "a page of BigChat is larger than 32 MiB; set a shorter --max-window";
        until("the reason", async || {
            t.status().0.to_string().contains(reason)
        })
        .await;
    })
    .await;
}

/// The same if a later page is too large.
#[tokio::test]
async fn later_page_is_too_large() {
    run_test(async |t| {
        t.once().await;
        let url = tampering(&t.bigchat.url(), move |line, answer| {
            let query = line.split(['?', ' ']).nth(2).unwrap_or_default();
            if line.starts_with("GET /events") && query.contains("page=2") {
                return too_large();
            }
            if length_of(query).is_some_and(|length| length > 6) {
                let body = br#"{"nextPageUrl":"?page=2","events":[]}"#;
                return with_body(&answer, "", body).into();
            }
            answer.into()
        })
        .await;
        t.set("--bigchat-url", &url);
        t.bigchat.clock(NOW + 20);
        t.start();
        t.until_cursor(NOW + 20).await;
    })
    .await;
}

/// A wrong date after a restart does not mix up epochs.
#[tokio::test]
async fn wrong_date_after_a_restart() {
    run_test(async |t| {
        t.bigchat.reports([message(42, 1, "of before")]);
        t.once().await;
        t.bigchat.restarts(42, NOW - 1);
        t.bigchat.reports([message(42, NOW, "of after")]);
        t.once().await;
        assert_eq!(t.restarts(), 1);
        let wrong = UNIX_EPOCH + Duration::from_secs(unix(NOW - 86_400).unsigned_abs());
        let header = format!("date: {}", httpdate::fmt_http_date(wrong));
        t.tamper_pages(usize::MAX, move |answer| {
            with_header(&answer, "date", &header)
        })
        .await;
        t.bigchat.reports([message(42, NOW, "with a wrong date")]);
        t.once().await;
        assert_eq!(t.restarts(), 1);
        assert_eq!(t.our_api.messages().len(), 3);
    })
    .await;
}

#[tokio::test]
async fn pages_shift_where_poll_pauses() {
    run_test(async |t| {
        t.differs("scripted pages imitate a log that shifts");
        reports_linked_pages(t, 199);
        let twin = || message(42, 300, "twin");
        t.bigchat
            .reports(page([message(42, 200, "text 200"), twin()], "?page=201"));
        t.bigchat.reports([twin(), message(42, 301, "last")]);
        t.once().await;
        t.once().await;
        let texts = t.our_api.messages();
        assert!(texts.contains(&"last".to_owned()));
        assert_eq!(texts.iter().filter(|text| *text == "twin").count(), 1);
    })
    .await;
}
