//! Odd bytes in a page, empty pages of all kinds, URLs in all spellings and wrong dates. Each costs at most one event,
//! and no data is altered.

use crate::harness::services::{NOW, tampering, time, unix, window, with_body, with_header};
use crate::harness::{Bench, Test, run_test, side_by_side};
use bigchat_sync::simulator::bigchat::{Page, page, raw};
use bigchat_sync::simulator::event::{end, event, message, transfer};
use bigchat_sync::simulator::fault::status;
use std::io::Write;

use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use serde_json::json;

/// Replaces the headers and the body of the next page.
async fn answering(t: &Test, headers: &'static str, body: Vec<u8>) {
    t.tamper_pages(1, move |answer| with_body(&answer, headers, &body))
        .await;
}

fn message_json(text: &str) -> String {
    message(42, 5, text).to_string()
}

/// The raw JSON of the dead letters.
fn dead_letters(t: &Bench) -> Vec<String> {
    let failed = t.failed().into_iter();
    failed.filter_map(|failed| failed.data).collect()
}

/// An odd value costs only its own event.
#[tokio::test]
async fn odd_value_costs_its_event() {
    let at = unix(5);
    let odd = |id: &str, data: &str| {
        format!(
            r#"{{"conversation_id":{id},"event_name":"MESSAGE","event_at":{at},"data":{data}}}"#
        )
    };
    side_by_side(
        [
            odd("NaN", r#"{"message":"bad"}"#),
            odd("42", "NaN"),
            odd("42", r#"{"message":NaN}"#),
            odd("42", r#"{"message":"bad\q"}"#),
            odd("42", "{\"message\":\"a\tb\"}"),
            odd("42", r#"{"message":'bad'}"#),
            "NaN".to_owned(),
            "undefined".to_owned(),
            "1e400".to_owned(),
        ],
        async |bad| {
            run_test(async |t| {
                t.differs("pages are altered in transit");
                let body = format!(
                    r#"{{"total":NaN,"events":[{},{bad},{}],"nextPageUrl":"?page=2"}}"#,
                    message_json("one"),
                    message_json("two")
                );
                t.bigchat.reports(raw(&body));
                t.bigchat.reports([message(42, 6, "three")]);
                t.once().await;
                assert_eq!(
                    t.our_api.sorted_messages(),
                    ["one", "three", "two"],
                    "{bad}"
                );
                assert_eq!(dead_letters(t), [bad]);
                assert_eq!(t.cursor(), Some(NOW));
            })
            .await;
        },
    )
    .await;
}

/// An odd value in an unused field costs no message.
#[tokio::test]
async fn odd_value_in_unused_field() {
    let at = unix(5);
    side_by_side(
        [
            "NaN",
            "-Infinity",
            "1e400",
            r#""\ud800""#,
            "\"a\tb\"",
            &format!("{}{}", "[".repeat(300), "]".repeat(300)),
        ],
        async |odd| {
            run_test(async |t| {
                t.differs("pages are altered in transit");
                let event = format!(
                    r#"{{"weight":{odd},"conversation_id":42,"event_name":"MESSAGE",
                "event_at":{at}.0,"data":{{"weight":{odd},"message":"one"}}}}"#
                );
                t.bigchat
                    .reports(raw(&format!(r#"{{"events":[{event}]}}"#)));
                t.bigchat
                    .reports(raw(&format!(r#"{{"events":[{event}]}}"#)));
                t.once().await;
                t.once().await;
                assert_eq!(t.our_api.messages(), ["one"], "{odd}");
                assert_eq!(t.events("failed"), 0, "{odd}");
            })
            .await;
        },
    )
    .await;
}

#[tokio::test]
async fn text_decoded_as_declared() {
    let page = format!(r#"{{"events":[{}]}}"#, message_json("Grüße"));
    let latin: Vec<u8> = page.chars().map(|c| c as u8).collect();
    let utf16: Vec<u8> = page.encode_utf16().flat_map(u16::to_le_bytes).collect();
    side_by_side(
        [
            ("", [b"\xef\xbb\xbf", page.as_bytes()].concat()),
            (
                "content-type: application/json; charset=ISO-8859-1\r\n",
                latin.clone(),
            ),
            (
                "content-type: application/json; charset=\"Windows-1252\"\r\n",
                latin,
            ),
            ("", [b"\xff\xfe", &*utf16].concat()),
            ("content-type: text/plain; charset=utf-16le\r\n", utf16),
            (
                "content-type: application/json; charset=nonsense\r\n",
                page.clone().into_bytes(),
            ),
        ],
        async |(headers, body)| {
            run_test(async |t| {
                t.differs("pages are altered in transit");
                answering(t, headers, body).await;
                t.once().await;
                assert_eq!(t.our_api.messages(), ["Grüße"], "{headers}");
            })
            .await;
        },
    )
    .await;
}

/// Events with bytes of another encoding become dead letters. Their text is never altered and stored as a message.
#[tokio::test]
async fn bytes_of_another_encoding() {
    for (bad, shown) in [
        (&b"Gr\xfc\xdfe"[..], r"Gr\xFC\xDFe"),
        (b"cut off \xe2\x82", r"cut off \xE2\x82"),
        (b"overlong \xc0\x80", r"overlong \xC0\x80"),
        (b"a surrogate \xed\xa0\x80", r"a surrogate \xED\xA0\x80"),
    ] {
        let (before, after) = (message_json("one"), message_json("two"));
        let marked = message_json("HERE");
        let (head, tail) = marked.split_once("HERE").expect("the mark");
        let odd = [head.as_bytes(), bad, tail.as_bytes()].concat();
        let body = [
            br#"{"events":["#,
            before.as_bytes(),
            b",",
            &odd,
            b",",
            after.as_bytes(),
            b"]}",
        ]
        .concat();
        run_test(async |t| {
            t.differs("pages are altered in transit");
            answering(t, "", body).await;
            t.once().await;
            assert_eq!(t.our_api.sorted_messages(), ["one", "two"], "{shown}");
            let failed = &t.failed()[0];
            assert_eq!(failed.data, Some(format!("{head}{shown}{tail}")));
            assert!(failed.reason.contains("declared encoding"), "{failed:?}");
        })
        .await;
    }
}

/// A body is decompressed although no compression was requested, up to the size limit.
#[tokio::test]
async fn compressed_body_is_read() {
    let page = format!(r#"{{"events":[{}]}}"#, message_json("one")).into_bytes();
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(&page).expect("bytes");
    let gzip = gzip.finish().expect("bytes");
    let mut zlib = ZlibEncoder::new(Vec::new(), Compression::fast());
    zlib.write_all(&page).expect("bytes");
    let zlib = zlib.finish().expect("bytes");
    side_by_side(
        [
            ("content-encoding: gzip\r\n", &gzip),
            ("", &gzip),
            ("content-encoding: deflate\r\n", &zlib),
            ("content-encoding: gzip\r\n", &page),
            ("content-encoding: br\r\n", &page),
        ],
        async |(headers, body)| {
            run_test(async |t| {
                t.differs("pages are altered in transit");
                answering(t, headers, body.clone()).await;
                t.once().await;
                assert_eq!(t.our_api.messages(), ["one"], "{headers}");
            })
            .await;
        },
    )
    .await;
    // A body that inflates beyond the limit is not read to its end.
    let mut bomb = GzEncoder::new(Vec::new(), Compression::fast());
    for _ in 0..64 {
        bomb.write_all(&[b' '; 1 << 20]).expect("bytes");
    }
    let bomb = bomb.finish().expect("bytes");
    run_test(async |t| {
        answering(t, "content-encoding: gzip\r\n", bomb).await;
        t.once().await;
        t.bigchat.reports([message(42, 1, "two")]);
        t.once().await;
        // Its window is read again in two parts.
        let windows = [(-10, 0), (-10, -3), (-8, 0), (-5, 0)];
        let windows = windows.map(|(start, end)| window(NOW + start, NOW + end));
        assert_eq!(t.bigchat.queries(), windows);
        assert_eq!(t.our_api.messages(), ["two"]);
    })
    .await;
}

#[tokio::test]
async fn requests_forbid_cache_and_compression() {
    let heads = std::sync::mpsc::channel();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let task = tokio::spawn(async move {
        use tokio::io::AsyncReadExt;
        let (mut stream, _) = listener.accept().await.expect("a connection");
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            stream.read_buf(&mut request).await.expect("a request");
        }
        heads.0.send(String::from_utf8(request)).expect("a reader");
    });
    run_test(async |t| {
        t.set("--bigchat-url", &url);
        t.once().await;
        task.await.expect("a request came");
        let head = heads.1.try_recv().expect("a request").expect("text");
        let head = head.to_ascii_lowercase();
        for header in ["cache-control: no-cache", "accept-encoding: identity"] {
            assert!(head.contains(header), "{head}");
        }
    })
    .await;
}

/// A page without events is read like any other, and the poll continues.
#[tokio::test]
async fn page_without_events() {
    side_by_side(
        [
            status(204),
            status(200).body(r#"{"events":null,"nextPageUrl":null}"#),
            status(200).body(r#"{"events":null}"#),
            status(200).body(r#"{"nextPageUrl":null,"total":0}"#),
            status(200).body("{}"),
        ]
        .into_iter()
        .enumerate(),
        async |(case, upset)| {
            // A backlog with an hour without events.
            run_test(async |t| {
                t.set("--since", &time(-7200));
                t.bigchat.reports([message(42, 1, "one")]);
                t.bigchat.upset("GET /events?start_at=2026-11-22T21", upset);
                t.once().await;
                t.once().await;
                let queries = t.bigchat.queries();
                assert_eq!(queries.len(), 4, "case {case}: {queries:?}");
                assert_eq!(t.our_api.messages(), ["one"], "case {case}");
                assert_eq!(t.cursor(), Some(NOW), "case {case}");
            })
            .await;
        },
    )
    .await;
}

/// An empty page does not end the poll.
#[tokio::test]
async fn empty_page_among_others() {
    side_by_side(
        [
            json!({"events": [], "nextPageUrl": "?page=3"}),
            json!({"events": null, "nextPageUrl": "?page=3"}),
            json!({"nextPageUrl": "?page=3"}),
        ],
        async |empty| {
            run_test(async |t| {
                t.bigchat.reports(page([message(42, 1, "one")], "?page=2"));
                t.bigchat.reports(raw(&empty.to_string()));
                t.bigchat.reports([message(42, 2, "two")]);
                t.once().await;
                assert_eq!(t.our_api.messages(), ["one", "two"], "{empty}");
            })
            .await;
        },
    )
    .await;
}

/// A sloppy `nextPageUrl` is followed if it is unambiguous.
#[tokio::test]
async fn sloppy_next_page_url() {
    side_by_side(
        [
            ("page=2", "page=2"),
            (" /events?page=2\n", "page=2"),
            ("/events?limit=9&amp;page=2", "limit=9&page=2"),
            ("events?cursor=a b|\"c\"", "cursor=a%20b|%22c%22"),
            ("?cursor=ü", "cursor=%C3%BC"),
            (
                "?start_at=2026-11-22T22:00:00+00:00&page=2",
                "start_at=2026-11-22T22:00:00%2B00:00&page=2",
            ),
        ],
        async |(next, asked)| {
            run_test(async |t| {
                t.bigchat.reports(page([message(42, 1, "one")], next));
                t.bigchat.reports([message(42, 2, "two")]);
                t.once().await;
                assert_eq!(
                    t.bigchat.queries(),
                    [&window(NOW - 10, NOW), asked],
                    "{next}"
                );
                assert_eq!(t.our_api.messages(), ["one", "two"], "{next}");
            })
            .await;
        },
    )
    .await;
}

/// The same page in another spelling is not requested again.
#[tokio::test]
async fn next_page_is_same_page() {
    let first = window(NOW - 10, NOW);
    let (start, end) = first.split_once('&').expect("two parameters");
    side_by_side(
        [
            format!("?{end}&{start}"),
            format!("?{}", first.replace("%3A", ":")),
            format!("?{}", first.replace("%3A", "%3a")),
            format!("?{}", first.replace('Z', "%2B00:00")),
            format!("?{}", first.replace('Z', "+00:00")),
            format!("?{}", first.replace('Z', ".000Z")),
            format!("?&{start}&amp;{end}"),
        ],
        async |next| {
            run_test(async |t| {
                for _ in 0..3 {
                    t.bigchat
                        .reports(page([message(42, 1, "one"), message(42, 1, "two")], &*next));
                }
                t.once().await;
                assert_eq!(t.bigchat.queries(), [&*first], "{next}");
                assert_eq!(t.our_api.messages(), ["one", "two"], "{next}");
            })
            .await;
        },
    )
    .await;
}

/// Adds a header to all responses of BigChat.
async fn with_one_more(t: &Test, header: &'static str) {
    let url = tampering(&t.bigchat.url(), move |_, answer| {
        with_header(&answer, "none", header)
    })
    .await;
    t.set("--bigchat-url", &url);
}

/// The `age` header of a cached response is added to its `date`.
#[tokio::test]
async fn date_of_a_cached_response() {
    side_by_side(
        [
            ("age: 60", 60),
            ("Age:  30 ", 30),
            ("age: 0", 0),
            ("age: soon", 0),
            ("age: -5", 0),
        ],
        async |(header, age)| {
            run_test(async |t| {
                with_one_more(t, header).await;
                t.once().await;
                assert_eq!(
                    t.bigchat.queries(),
                    [window(NOW + age - 10, NOW + age)],
                    "{header}"
                );
            })
            .await;
        },
    )
    .await;
}

/// The status shows a cursor that does not move while polls complete.
#[tokio::test]
async fn cursor_does_not_move() {
    run_test(async |t| {
        t.once().await;
        let shown = || {
            let (status, _) = t.status();
            let problems = status["problems"].as_array().expect("a list").iter();
            let mut whats = problems.filter_map(|problem| problem["what"].as_str());
            whats.any(|what| what.contains("has not advanced"))
        };
        assert!(!shown());
        // Waiting two minutes would take too long.
        t.execute("UPDATE poll_state SET cursor_moved_at = cursor_moved_at - 121000");
        for what in ["at first", "after another poll"] {
            assert!(shown(), "{what}");
            t.once().await;
        }
        t.bigchat.clock(NOW + 1);
        t.once().await;
        assert!(!shown(), "the cursor advances again");
    })
    .await;
}

/// The starts of the requested windows.
fn starts(t: &Test) -> Vec<String> {
    let asked = t.bigchat.ever_asked("GET /events?start_at=");
    let starts = asked
        .iter()
        .filter_map(|asked| asked.line.split('&').next());
    starts.map(str::to_owned).collect()
}

fn start_of(window: &str) -> String {
    let start = window.split('&').next().expect("a start");
    format!("GET /events?{start}")
}

/// A wrong date for some polls leaves no gap.
#[tokio::test]
async fn wrong_date_for_some_polls() {
    side_by_side([3600, 86_400, -7200, 700], async |off| {
        run_test(async |t| {
            let daemon = t.start();
            t.until_cursor(NOW).await;
            t.bigchat.clock(NOW + off);
            t.bigchat.further_polls(5).await;
            t.bigchat.reports([message(42, NOW + 5, "meanwhile")]);
            t.bigchat.clock(NOW + 10);
            t.until_cursor(NOW + 10).await;
            t.until_events("delivered", 1).await;
            daemon.stop().await;
            let (earliest, latest) = (window(NOW - 10, 0), window(NOW + 5, 0));
            for start in starts(t) {
                let is_sane = start_of(&earliest) <= start && start <= start_of(&latest);
                assert!(is_sane, "{off}: {start}");
            }
            assert_eq!(t.our_api.messages(), ["meanwhile"], "{off}");
        })
        .await;
    })
    .await;
}

/// A new date is believed after ten polls.
#[tokio::test]
async fn new_date_for_ten_polls() {
    side_by_side([3600, -3600, 86_400], async |off| {
        run_test(async |t| {
            t.set("--max-window", "10d");
            t.start();
            t.until_cursor(NOW).await;
            let before = t.bigchat.count("GET /events");
            t.bigchat.clock(NOW + off);
            t.until_cursor(NOW + off).await;
            let polls = t.bigchat.count("GET /events") - before;
            assert!((10..20).contains(&polls), "{off}: {polls}");
        })
        .await;
    })
    .await;
}

/// Makes BigChat reject windows that begin at these times. Reading begins at 20:00.
async fn refusing(t: &Test, code: u16, starts: &[&str]) {
    t.unmet("the search does not ask for each window");
    t.set("--since", &time(-7200));
    for start in starts {
        let pattern = format!("GET /events?start_at=2026-11-22T{start}");
        t.bigchat.upset(&pattern, status(code).always());
    }
    for text in ["one", "two", "three"] {
        t.bigchat.reports([message(42, 5, text)]);
    }
}

/// The oldest window that BigChat accepts is read, and the status shows the gap.
#[tokio::test]
async fn window_is_too_old() {
    let quarters = ["20", "21%3A0", "21%3A1", "21%3A2"];
    side_by_side(
        [
            (410, &["20", "21"][..], 0),
            (400, &["20", "21"], 0),
            (422, &["20"], -3600),
            (413, &quarters, -1800),
        ],
        async |(code, refused, oldest)| {
            run_test(async |t| {
                refusing(t, code, refused).await;
                t.once().await;
                let queries = t.bigchat.queries();
                assert!(
                    queries.len() < 40,
                    "a search of few requests: {}",
                    queries.len()
                );
                let read = queries
                    .iter()
                    .filter(|query| start_of(query) == start_of(&window(oldest, 0)));
                assert!(read.count() >= 1, "{code}: {queries:?}");
                // Events in responses to the search are delivered, too.
                assert_eq!(
                    t.our_api.sorted_messages(),
                    ["one", "three", "two"],
                    "{code}"
                );
                assert_eq!(t.cursor(), Some(NOW), "{code}");
                let (status, _) = t.status();
                let gaps = status["gaps"].as_array().expect("a list");
                assert_eq!(gaps.len(), 1, "{code}: {gaps:?}");
                assert_eq!(gaps[0]["from"], time(-7195), "{code}");
                assert_eq!(gaps[0]["until"], time(oldest), "{code}");
                t.once().await;
                assert_eq!(t.bigchat.queries(), [window(NOW - 5, NOW)], "{code}");
            })
            .await;
        },
    )
    .await;
}

/// A rejection that is not about the age of the window is no gap.
#[tokio::test]
async fn rejection_that_is_no_gap() {
    side_by_side(
        [
            ("of everything", status(400).always(), -7195),
            ("now and then", status(410), NOW),
            ("once", status(422), NOW),
        ],
        async |(case, upset, cursor)| {
            run_test(async |t| {
                refusing(t, 400, &[]).await;
                t.bigchat.upset("GET /events", upset);
                t.once().await;
                t.once().await;
                t.once().await;
                let (status, _) = t.status();
                assert_eq!(status["gaps"], json!([]), "{case}");
                assert_eq!(t.cursor(), Some(cursor), "{case}");
            })
            .await;
        },
    )
    .await;
}

/// A window that is rejected for its length is no gap, and a shorter `--max-window` is the remedy.
#[tokio::test]
async fn window_is_too_long() {
    run_test(async |t| {
        refusing(t, 400, &[]).await;
        let longest = format!("GET /events?{}", window(-7200, -3600));
        t.bigchat.upset(&longest, status(400).always());
        t.once().await;
        t.once().await;
        assert_eq!(t.cursor(), Some(-7195));
        assert_eq!(t.status().0["gaps"], json!([]));
        t.set("--max-window", "30m");
        t.once().await;
        assert_eq!(t.cursor(), Some(NOW));
        assert_eq!(t.our_api.sorted_messages(), ["one", "three", "two"]);
    })
    .await;
}

/// Events of the kinds in `--ignore-events` are dropped. A later event is read even if they fill the maximum number of
/// pages of a poll.
#[tokio::test]
async fn ignored_kinds_hide_nothing() {
    let odd = |n: i64| event(42, "TYPING", n, json!({"n": n}));
    run_test(async |t| {
        t.differs("a kind of event is ignored");
        t.set("--ignore-events", "TYPING, END");
        for n in 1..=200 {
            let events = [odd(n), odd(n), end(42, n)];
            t.bigchat.reports(page(events, format!("?page={}", n + 1)));
        }
        t.bigchat.reports([
            odd(1),
            message(42, 5, "one"),
            json!({"event_name": "typing"}),
        ]);
        t.once().await;
        t.once().await;
        assert_eq!(t.our_api.messages(), ["one"]);
        assert_eq!(t.our_api.chats(), ["42 22:00:00 - a1"], "no END");
        let failed = t.failed();
        assert_eq!(failed.len(), 1, "another name: {failed:?}");
    })
    .await;
}

/// A later event is read even if unparsable events fill the maximum number of pages of a poll.
#[tokio::test]
async fn page_budget_of_unreadable_events() {
    run_test(async |t| {
        t.fails(200);
        let odd = |n: i64| json!({"event_name": "TYPING", "n": n});
        for last in ["", "one"] {
            for n in 1..=200 {
                t.bigchat
                    .reports(page([odd(n)], format!("?page={}", n + 1)));
            }
            let last = (!last.is_empty()).then(|| message(42, 5, last));
            t.bigchat.reports(Page::from(last));
            t.once().await;
            t.once().await;
        }
        assert_eq!(t.events("failed"), 200);
        assert_eq!(t.our_api.messages(), ["one"]);
    })
    .await;
}

/// If a newer version can parse a dead letter, a retry ingests it into the epoch in which it was reported.
#[tokio::test]
async fn dead_letter_readable_after_upgrade() {
    let unknown = r#"{"event_name":"OF ANOTHER VERSION"}"#;
    side_by_side(
        [
            (message(42, 5, "twin"), 2),
            (transfer(42, 5, 8), 1),
            (end(42, 5), 1),
        ],
        async |(event, expected)| {
            run_test(async |t| {
                t.differs("the journal is changed by hand");
                t.bigchat.reports(raw(&format!(
                    r#"{{"events":[{unknown},{unknown},{}]}}"#,
                    message(42, 1, "first")
                )));
                t.once().await;
                assert_eq!(t.events("failed"), 1);
                let retry = || t.failed_command(&["retry", "--all"]).ok();
                retry();
                assert_eq!(t.events("failed"), 1, "it cannot be parsed yet");
                // BigChat restarts, and the id means another conversation.
                t.bigchat.restarts(42, NOW - 1);
                t.bigchat.reports([message(42, NOW, "of after")]);
                t.once().await;
                // As if this version could parse it.
                let known = event.to_string().replace('\'', "''");
                t.execute(&format!(
                    "UPDATE events SET data = '{known}' WHERE conversation IS NULL"
                ));
                retry();
                assert_eq!(t.events("failed"), 0, "{event}");
                t.once().await;
                let kind = event["event_name"].as_str().expect("a name");
                let ingested = format!(
                    "state = 'delivered' AND kind = '{kind}' AND event_at = {}
                 AND conversation = (SELECT conversation FROM event_states WHERE event_at = {})",
                    unix(5),
                    unix(1)
                );
                assert_eq!(t.count_events(&ingested), expected, "{event}");
                assert_eq!(t.resolutions().len(), 1, "{event}");
            })
            .await;
        },
    )
    .await;
}
