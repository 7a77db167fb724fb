//! Random input for everything read from outside: pages, `nextPageUrl`, dates, OurAPI's responses, requests to the
//! console, and the database file.
//!
//! Generators know the format that they corrupt, so that most cases pass the first check. `PROPTEST_CASES` (256 by
//! default) sets the number of cases, and `BIGCHAT_SYNC_TEST_SEED` the first seed of the tests that have one. A failed
//! case prints itself or its seed.

use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::time::{Duration, Instant};

use bigchat_sync::bigchat::canonical_query;
use bigchat_sync::domain::event::{Event, Payload, page_events};
use bigchat_sync::domain::text::decoded;
use bigchat_sync::domain::time::{Millis, Timestamp};
use bigchat_sync::journal::Store;
use bigchat_sync::settings::Tokens;
use bigchat_sync::simulator::bigchat::raw;
use bigchat_sync::simulator::event::{message, start, transfer};
use bigchat_sync::status::Status;
use futures_util::FutureExt;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt, SeedableRng};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::harness::services::{Tampered, tampering};
use crate::harness::web::{READ_TOKEN, TOKEN};
use crate::harness::{Test, number, run_test, until};

/// The time limit for a single case.
const TIME_LIMIT: Duration = Duration::from_secs(20);

/// The seeds of a test in which each case takes as long as `weight` ordinary ones. `BIGCHAT_SYNC_TEST_SEED` is the
/// first.
fn seeds(weight: u32) -> Range<u64> {
    let first = number("BIGCHAT_SYNC_TEST_SEED", 0);
    first..first + u64::from((ProptestConfig::default().cases / weight).max(1))
}

/// An event as BigChat may report it, in any spelling of its JSON.
#[derive(Debug, Clone)]
struct Good {
    conversation: i64,
    at: i64,
    data: Value,
    name: &'static str,
    json: String,
}

/// A string in JSON. Characters for which `escaped` is true are written as `\uXXXX`.
fn spelled(text: &str, escaped: &[bool]) -> String {
    let mut escaped = escaped.iter().cycle();
    let characters = text.chars().map(|character| {
        let plain = serde_json::to_string(&character.to_string()).expect("JSON");
        if *escaped.next().unwrap_or(&false) {
            let mut units = [0; 2];
            let units = character.encode_utf16(&mut units);
            units.iter().map(|unit| format!("\\u{unit:04x}")).collect()
        } else {
            plain[1..plain.len() - 1].to_owned()
        }
    });
    format!("\"{}\"", characters.collect::<String>())
}

/// An odd value, which may be text that no parser accepts. It does no harm in an unneeded field, and costs only the
/// event that it replaces.
fn odd_value() -> impl Strategy<Value = String> {
    prop_oneof![
        select(vec![
            "NaN",
            "-Infinity",
            "1e999",
            r#""\ud800""#,
            r#""\xff""#,
            "'a'",
            "undefined",
            "01",
            "[]",
            "{}",
            "true",
            r#"{"a":NaN}"#,
            "[[[[[[]]]]]]",
            "\"\"",
            "-",
            "\u{feff}1",
        ])
        .prop_map(str::to_owned),
        "[a-z0-9.+-][a-z0-9 .+-]{0,7}",
        (1_usize..300).prop_map(|levels| format!("{}{}", "[".repeat(levels), "]".repeat(levels))),
    ]
}

fn good() -> impl Strategy<Value = Good> {
    let data = prop_oneof![
        Just(("START", Value::Null)),
        Just(("END", Value::Null)),
        any::<String>().prop_map(|text| ("MESSAGE", json!({ "message": text }))),
        any::<i64>().prop_map(|advisor| ("TRANSFER", json!({ "new_advisor_id": advisor }))),
    ];
    // The event times that the daemon accepts: 1970 to 9999.
    let at = 0_i64..253_402_300_800;
    let spelling = (vec(any::<bool>(), 1..8), 0_usize..4, "[ \t\r\n]{0,3}");
    let unneeded = vec(("[a-z]{1,6}_x", odd_value()), 0..3);
    (any::<i64>(), at, data, spelling, unneeded).prop_map(
        |(conversation, at, (name, data), (escaped, first, space), unneeded)| {
            let data_json = match &data["message"] {
                Value::String(text) => format!("{{\"message\":{}}}", spelled(text, &escaped)),
                _ => data.to_string(),
            };
            let mut fields = vec![
                ("conversation_id".to_owned(), conversation.to_string()),
                ("event_name".to_owned(), spelled(name, &escaped)),
                ("event_at".to_owned(), at.to_string()),
                ("data".to_owned(), data_json),
            ];
            fields.rotate_left(first);
            fields.extend(unneeded);
            let fields: Vec<String> = fields
                .iter()
                .map(|(name, value)| format!("{space}\"{name}\"{space}:{space}{value}{space}"))
                .collect();
            Good {
                conversation,
                at,
                data,
                name,
                json: format!("{{{}}}", fields.join(",")),
            }
        },
    )
}

/// An item that is not an event. It must not cost any other item.
fn bad() -> impl Strategy<Value = String> {
    let needed = select(vec!["conversation_id", "event_name", "event_at"]);
    let spoiled = (good(), needed).prop_map(|(good, field)| {
        good.json
            .replacen(&format!("\"{field}\""), "\"another\"", 1)
    });
    prop_oneof![odd_value(), spoiled]
}

#[derive(Debug, Clone)]
enum Item {
    Good(Good),
    Bad(String),
}

impl Item {
    fn json(&self) -> &str {
        match self {
            Self::Good(good) => &good.json,
            Self::Bad(json) => json,
        }
    }

    /// Checks the parsed event.
    fn check(&self, read: &str) -> Result<(), TestCaseError> {
        let event = Event::parse(read);
        let Self::Good(good) = self else {
            prop_assert!(event.is_err(), "{read} is no event");
            return Ok(());
        };
        let event = event.map_err(|error| TestCaseError::fail(format!("{error}: {read}")))?;
        prop_assert_eq!(event.conversation, good.conversation);
        prop_assert_eq!(event.at.unix(), good.at);
        prop_assert_eq!(event.kind.name(), good.name);
        let payload = Payload::from_data(event.kind, event.data.as_deref());
        match payload.map_err(|error| TestCaseError::fail(error.to_string()))? {
            Payload::Message { text } => {
                prop_assert_eq!(Some(&*text), good.data["message"].as_str())
            }
            Payload::Transfer { advisor } => {
                prop_assert_eq!(Some(advisor), good.data["new_advisor_id"].as_i64());
            }
            Payload::Start | Payload::End => {}
        }
        Ok(())
    }
}

fn items() -> impl Strategy<Value = Vec<Item>> {
    let item = prop_oneof![3 => good().prop_map(Item::Good), 1 => bad().prop_map(Item::Bad)];
    vec(item, 0..12)
}

fn page(items: &[Item]) -> String {
    let items: Vec<&str> = items.iter().map(Item::json).collect();
    format!(
        "{{\"events\":[{}],\"nextPageUrl\":null}}",
        items.join(" , ")
    )
}

fn events(body: &str) -> Option<Vec<&str>> {
    let mut events = Vec::new();
    page_events(body, |event| events.push(event)).ok()?;
    Some(events)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// An event is read as it was written, whatever else is on the page or in its unneeded fields.
    #[test]
    fn fuzzed_page_costs_only_odd_events(items in items()) {
        let body = page(&items);
        let read = events(&body);
        prop_assert!(read.is_some(), "no page: {}", body);
        let read = read.unwrap_or_default();
        prop_assert_eq!(read.len(), items.len());
        for (item, read) in items.iter().zip(read) {
            item.check(read)?;
        }
    }

    /// A byte in another encoding costs only the event that contains it.
    #[test]
    fn fuzzed_byte_costs_one_event(
        items in vec(good().prop_map(Item::Good), 1..8),
        at in any::<prop::sample::Index>(),
        byte in 0x80..=0xff_u8,
    ) {
        let spoiled = at.index(items.len());
        let mut body = Vec::new();
        for (number, item) in items.iter().enumerate() {
            body.extend(if number == 0 { &b"{\"events\":["[..] } else { b"," });
            body.extend(item.json().as_bytes());
            if number == spoiled {
                // Within the name of a needed field.
                let name = item.json().find("\"event_name\"").expect("its field");
                body.insert(body.len() - item.json().len() + name + 2, byte);
            }
        }
        body.extend(b"]}");
        let body = decoded(body, "application/json");
        let read = events(&body);
        prop_assert!(read.is_some(), "no page: {}", body);
        let read = read.unwrap_or_default();
        prop_assert_eq!(read.len(), items.len());
        for (number, (item, read)) in items.iter().zip(read).enumerate() {
            if number == spoiled {
                prop_assert!(Event::parse(read).is_err(), "{} has a byte in another encoding", read);
            } else {
                item.check(read)?;
            }
        }
    }

    /// A corrupted page, in any declared encoding, never causes a panic.
    #[test]
    fn fuzzed_body_never_panics(
        items in items(),
        edits in vec((any::<prop::sample::Index>(), any::<u8>(), 0_u8..3), 1..6),
        charset in "(; ?charset=[a-zA-Z0-9-]{0,12})?",
    ) {
        let mut body = page(&items).into_bytes();
        for (at, byte, edit) in edits {
            let at = at.index(body.len());
            match edit {
                0 => body[at] = byte,
                1 => body.insert(at, byte),
                _ => body.truncate(at + 1),
            }
        }
        let body = decoded(body, &format!("application/json{charset}"));
        for event in events(&body).unwrap_or_default() {
            drop(Event::parse(event));
        }
    }

    /// Two spellings of one query mean the same page, and two different queries do not.
    #[test]
    fn fuzzed_next_page_has_one_meaning(
        pairs in vec(("[a-z]{1,5}", any::<String>()), 1..6),
        (rotated, encoded) in (0_usize..6, vec(any::<bool>(), 1..9)),
        other in any::<String>(),
    ) {
        let spelling = |pairs: &[(String, String)], encoded: &[bool]| {
            let mut encoded = encoded.iter().cycle();
            let mut spelled = |text: &str| -> String {
                let bytes = text.bytes().map(|byte| match byte {
                    b' ' if *encoded.next().unwrap_or(&true) => "+".to_owned(),
                    b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' if *encoded.next().unwrap_or(&true) => {
                        char::from(byte).to_string()
                    }
                    byte => format!("%{byte:02X}"),
                });
                bytes.collect()
            };
            let pairs: Vec<String> =
                pairs.iter().map(|(name, value)| format!("{}={}", spelled(name), spelled(value))).collect();
            pairs.join("&")
        };
        let plain = canonical_query(&spelling(&pairs, &[false]));
        let mut shuffled = pairs.clone();
        shuffled.rotate_left(rotated % pairs.len());
        prop_assert_eq!(&canonical_query(&spelling(&shuffled, &encoded)), &plain);
        prop_assert_eq!(&canonical_query(&plain), &plain);
        let mut changed = pairs.clone();
        changed[0].1 = other;
        let is_other = changed != pairs && changed.iter().all(|pair| pairs.iter().filter(|own| *own == pair).count() == 0
            || pair != &changed[0]);
        if is_other {
            prop_assert_ne!(canonical_query(&spelling(&changed, &[false])), plain);
        }
    }

    /// An HTTP date is read as it was written. Any other text gives no date, or an arbitrary one.
    #[test]
    fn fuzzed_date_is_read_or_none(at in 0_i64..253_402_300_800, edit in (any::<prop::sample::Index>(), "[ -~]")) {
        let at = Timestamp::from_unix(at).expect("a time");
        let date = chrono::DateTime::from_timestamp(at.unix(), 0).expect("a time");
        let date = date.format("%a, %d %b %Y %H:%M:%S GMT").to_string();
        prop_assert_eq!(Timestamp::parse_http_date(&date), Some(at));
        let (index, with) = edit;
        let mut edited = date;
        let index = index.index(edited.len());
        edited.replace_range(index..=index, &with);
        let _ = Timestamp::parse_http_date(&edited);
    }
}

/// Corrupts the body of an HTTP response. Its `content-length` may then be wrong.
fn spoil(random: &mut impl Rng, mut answer: Vec<u8>) -> Vec<u8> {
    let head = answer.windows(4).position(|end| end == b"\r\n\r\n");
    let body = head.map_or(answer.len(), |head| head + 4);
    for _ in 0..random.random_range(1..4) {
        if body >= answer.len() {
            break;
        }
        let at = random.random_range(body..answer.len());
        match random.random_range(0..6) {
            0 => answer[at] = random.random(),
            1 => answer[at] ^= 1 << random.random_range(0..8),
            2 => answer.truncate(at),
            3 => answer.extend_from_within(at..),
            4 => answer.splice(at..at, *b"[{\"a\":NaN},").for_each(drop),
            _ => answer.splice(body.., *b"null").for_each(drop),
        }
    }
    answer
}

/// Corrupts responses in transit, and checks that OurAPI has each message in the end and no event is waiting. Pages of
/// events are not corrupted, because they would then contain different events.
async fn with_spoiled_answers(t: &Test, seed: u64) {
    let spoiling = |seed: u64, share: f64, left: u32| {
        let (mut random, mut left) = (StdRng::seed_from_u64(seed), left);
        move |line: &str, answer: Vec<u8>| {
            if left == 0 || line.starts_with("GET /events") || !random.random_bool(share) {
                return Tampered::from(answer);
            }
            left -= 1;
            spoil(&mut random, answer).into()
        }
    };
    t.differs("an altered answer may name another chat");
    t.set("--request-timeout", "500ms");
    let bigchat = tampering(&t.bigchat.url(), spoiling(seed, 0.3, 5)).await;
    let our_api = tampering(&t.our_api.url(), spoiling(seed + 1, 0.4, 20)).await;
    t.set("--bigchat-url", &bigchat)
        .set("--our-api-url", &our_api);
    let daemon = t.start();
    let mut texts = Vec::new();
    for number in 0..4 {
        let conversation = 42 + number % 2;
        let text = format!("message {number}");
        t.bigchat.reports([
            start(conversation, number % 2),
            message(conversation, 10 + number, &text),
            transfer(conversation, 20 + number, 7 + number % 2),
        ]);
        texts.push(text);
        t.bigchat.further_polls(2).await;
    }
    // There may be more events if an altered response looks like a restart of BigChat, because a START may then begin
    // another chat.
    let count = 2 + 4 + 4;
    let nothing_is = async |states: &str| {
        until(states, async || {
            t.is_ready() && t.count_events("true") >= count && t.count_events(states) == 0
        })
        .await;
    };
    nothing_is("state = 'waiting'").await;
    if t.events("failed") > 0 {
        t.failed_command(&["retry", "--all"]).expect("a retry");
        nothing_is("state IN ('waiting', 'failed')").await;
    }
    let there = t.our_api.messages();
    let missing: Vec<&String> = texts.iter().filter(|text| !there.contains(text)).collect();
    assert!(missing.is_empty(), "missing messages: {missing:?}");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fuzzed_answers_lose_no_message() {
    for seed in seeds(32) {
        run_test(async |t| {
            let run = AssertUnwindSafe(with_spoiled_answers(t, seed));
            if let Err(panic) = run.catch_unwind().await {
                println!("seed {seed}");
                std::panic::resume_unwind(panic);
            }
        })
        .await;
    }
}

/// An HTTP request that may be malformed, and whether it has the token for read access.
fn request(random: &mut StdRng, host: &str) -> (Vec<u8>, bool) {
    fn one<'a>(random: &mut StdRng, of: &[&'a str]) -> &'a str {
        of.choose(random).copied().unwrap_or_default()
    }
    let junk = |random: &mut StdRng| -> String {
        let length = random.random_range(0..40);
        (0..length)
            .map(|_| char::from(random.random_range(b' '..=b'~')))
            .collect()
    };
    let method = one(
        random,
        &[
            "GET", "POST", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "GET\t", "",
        ],
    );
    let route = one(
        random,
        &[
            "/",
            "/healthz",
            "/readyz",
            "/metrics",
            "/api/login",
            "/api/logout",
            "/api/status",
            "/api/activity",
            "/api/failed",
            "/api/failed/retry",
            "/api/failed/discard",
            "/api/failed/undo",
            "/api/failed/1",
            "/api/pause",
            "/api/resume",
            "/api/search",
            "/api/conversations/1",
            "/api/resolutions",
            "/../etc/passwd",
            "//",
            "/api/",
        ],
    );
    let tail = match random.random_range(0..4) {
        0 => format!(
            "?{}={}",
            one(
                random,
                &["q", "before", "limit", "minutes", "kind", "page", "all"]
            ),
            junk(random)
        ),
        1 => format!("/{}", random.random::<i64>()),
        2 => junk(random),
        _ => String::new(),
    };
    let mut head = format!("{method} {route}{tail} HTTP/1.1\r\n");
    let is_known = random.random_bool(0.5);
    let mut headers = vec![
        format!(
            "host: {}",
            if random.random_bool(0.9) {
                host.to_owned()
            } else {
                junk(random)
            }
        ),
        "connection: close".to_owned(),
        format!("x-bigchat-sync: {}", one(random, &["1", "", "0"])),
        format!(
            "content-type: {}",
            one(random, &["application/json", "text/plain", ""])
        ),
    ];
    if is_known {
        headers.push(format!("authorization: Bearer {READ_TOKEN}"));
    } else {
        let made_up = one(
            random,
            &[
                "authorization: Bearer ",
                "cookie: session=",
                "authorization: Basic ",
                "origin: ",
            ],
        );
        headers.push(format!("{made_up}{}", junk(random)));
    }
    let body = match random.random_range(0..5) {
        0 => r#"{"all":true}"#.to_owned(),
        1 => r#"{"events":[1,2,3]}"#.to_owned(),
        2 => format!(
            "{{\"ids\":[{}],\"for\":{}}}",
            random.random::<i64>(),
            random.random::<f64>()
        ),
        3 => "[".repeat(random.random_range(0..3000)),
        _ => junk(random),
    };
    if random.random_bool(0.8) {
        headers.push(format!("content-length: {}", body.len()));
    } else {
        headers.push(format!(
            "content-length: {}",
            random.random_range(0..20_000)
        ));
    }
    head.push_str(&headers.join("\r\n"));
    head.push_str("\r\n\r\n");
    let mut bytes = head.into_bytes();
    bytes.extend(body.into_bytes());
    if random.random_bool(0.2) {
        let at = random.random_range(0..bytes.len());
        bytes[at] = random.random();
    }
    (bytes, is_known)
}

/// Requests to the console without the required token change nothing, show nothing, and cause no internal error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fuzzed_requests_change_nothing() {
    run_test(async |t| {
        let tokens = Tokens {
            console: Some(TOKEN.into()).into(),
            console_read: Some(READ_TOKEN.into()).into(),
            ..Tokens::default()
        };
        let (_daemon, url) = t.start_listening(tokens);
        t.bigchat
            .reports(raw(r#"{"events":[{"event_name":"?"}],"nextPageUrl":null}"#));
        t.until_events("failed", 1).await;
        t.fails(1);
        let address = url.trim_start_matches("http://");
        for seed in seeds(1) {
            let mut random = StdRng::seed_from_u64(seed);
            let (bytes, is_known) = request(&mut random, address);
            let mut stream = TcpStream::connect(address).await.expect("a connection");
            // The request may be rejected before it is sent completely.
            drop(stream.write_all(&bytes).await);
            drop(stream.shutdown().await);
            let mut answer = Vec::new();
            let ended = timeout(TIME_LIMIT, stream.read_to_end(&mut answer)).await;
            let asked = String::from_utf8_lossy(&bytes);
            assert!(
                ended.is_ok(),
                "seed {seed}: the response does not end: {asked}"
            );
            let answer = String::from_utf8_lossy(&answer);
            let status = answer.split(' ').nth(1).unwrap_or_default();
            assert!(
                !["500", "503"].contains(&status) || asked.contains("readyz"),
                "seed {seed}: {answer} to {asked}"
            );
            let is_secret = asked.contains("/api/") || asked.contains("/metrics");
            let shows = status.starts_with('2') && answer.contains("event_name");
            assert!(
                is_known || !(is_secret && shows),
                "seed {seed}: {answer} to {asked}"
            );
        }
        assert_eq!(t.events("failed"), 1);
        assert!(t.resolutions().is_empty(), "nothing was resolved");
        assert_eq!(
            t.value::<Option<i64>>("SELECT paused_at FROM control"),
            None
        );
    })
    .await;
}

/// Reads from a database what the daemon and its commands read first.
fn read_all(db: &Path, t: &Test) {
    let now = Millis::now();
    for open in [Store::open_reader, Store::open_shared, Store::open] {
        let Ok(mut store) = open(db) else {
            continue;
        };
        drop(store.waiting());
        drop(Status::read(&mut store, t.settings().db(), now));
        drop(store.stored_pages());
        drop(store.failed(100, None));
    }
}

/// A damaged database is refused, or read as far as it is intact, without a panic or an endless loop.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fuzzed_database_never_panics() {
    run_test(async |t| {
        let daemon = t.start();
        t.bigchat
            .reports(raw(r#"{"events":[{"event_name":"?"}],"nextPageUrl":null}"#));
        t.fails(1);
        let messages = (0..100).map(|at| message(42, at, &format!("message {at}")));
        t.delivers(std::iter::once(start(42, 0)).chain(messages))
            .await;
        daemon.stop().await;
        let whole = std::fs::read(t.db()).expect("a database");
        let damaged = t.directory().join("damaged.db");
        for seed in seeds(2) {
            let mut random = StdRng::seed_from_u64(seed);
            let mut bytes = whole.clone();
            for _ in 0..random.random_range(1..6) {
                let at = random.random_range(0..bytes.len());
                match random.random_range(0..4) {
                    // Damage to the header and the roots of the tables has the greatest effect.
                    0 => bytes[at % 4096] = random.random(),
                    1 => bytes[at] = random.random(),
                    2 => {
                        let page = at / 4096 * 4096;
                        let end = (page + 4096).min(bytes.len());
                        bytes[page..end].fill(random.random());
                    }
                    _ => bytes.truncate(at.max(100)),
                }
            }
            std::fs::write(&damaged, &bytes).expect("a file");
            let began = Instant::now();
            read_all(&damaged, t);
            assert!(
                began.elapsed() < TIME_LIMIT,
                "seed {seed} took {:?}",
                began.elapsed()
            );
            for left in ["damaged.db-wal", "damaged.db-shm"] {
                std::fs::remove_file(t.directory().join(left)).ok();
            }
        }
    })
    .await;
}
