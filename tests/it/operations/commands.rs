//! The operator's commands: their output as text and as JSON, and their changes.

use std::io::Read;
use std::process::{Output, Stdio};
use std::time::Duration;

use bigchat_sync::simulator::event::{end, message, start, transfer};
use bigchat_sync::simulator::fault::status;
use serde_json::{Value, json};

use crate::harness::journal::dead_letter;
use crate::harness::process::{finished, printed, program};
use crate::harness::{Bench, Test, run_test, until};

/// Runs a command, whether or not a daemon is running.
pub(crate) fn command(t: &Bench, arguments: &[&str]) -> Output {
    let mut program = t.program(arguments[0]);
    program.args(&arguments[1..]);
    program.output().expect("a process")
}

/// The same, but the command must succeed. Returns its standard output.
pub(crate) fn done(t: &Bench, arguments: &[&str]) -> String {
    let output = command(t, arguments);
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        printed(&output)
    );
    String::from_utf8(output.stdout).expect("text")
}

/// The same with `--json`, parsed.
fn json_of(t: &Bench, arguments: &[&str]) -> Value {
    let text = done(t, &[arguments, &["--json"]].concat());
    serde_json::from_str(&text).expect("JSON")
}

fn is_time(value: &Value) -> bool {
    let time = value.as_str().unwrap_or_default();
    time.ends_with('Z') && chrono::DateTime::parse_from_rfc3339(time).is_ok()
}

/// Conversation 42 with delivered events, a failed one (3) and a waiting one, while OurAPI fails all messages.
async fn each_state(t: &Test) {
    t.differs("one event failed, and one waits");
    t.start();
    t.delivers([start(42, 0), message(42, 5, "Hello\nthere")])
        .await;
    t.bigchat.reports([message(42, 6, "k")]);
    t.until_events("failed", 1).await;
    t.our_api
        .upset("POST /chats/*/messages", status(500).always());
    t.bigchat.reports([message(42, 7, "later")]);
    until("an attempt fails", async || {
        t.value::<i64>("SELECT count(*) FROM attempts WHERE next_at IS NOT NULL") == 1
    })
    .await;
}

/// `conversation` shows each event with its state.
#[tokio::test]
async fn conversation_shows_event_states() {
    run_test(async |t| {
        each_state(t).await;
        let answer = json_of(t, &["conversation", "42"]);
        assert!(is_time(&answer["now"]), "{answer}");
        let conversation = &answer["conversations"][0];
        for (name, value) in [
            ("conversation", json!(42)),
            ("epoch", json!(1)),
            ("external_id", json!("42")),
            ("started_at", json!("2026-11-22T22:00:00Z")),
            ("ended_at", Value::Null),
            ("agent_email", json!("ann@x.test")),
            ("no_agent", Value::Null),
            ("waiting", json!(1)),
            ("failed", json!([3])),
        ] {
            assert_eq!(conversation[name], value, "{name}: {answer}");
        }
        let events = conversation["events"].as_array().expect("events");
        let of = |name: &str| -> Vec<&Value> { events.iter().map(|event| &event[name]).collect() };
        assert_eq!(of("kind"), ["START", "MESSAGE", "MESSAGE", "MESSAGE"]);
        assert_eq!(of("state"), ["delivered", "delivered", "failed", "waiting"]);
        assert_eq!(of("effect")[..2], ["chat created", "message added"]);
        assert_eq!(events[1]["text"], "Hello\nthere");
        assert_eq!(events[1]["event_at"], "2026-11-22T22:00:05Z");
        assert!(of("received_at").into_iter().all(is_time), "{answer}");
        assert!(
            of("state_since")[..3].iter().all(|time| is_time(time)),
            "{answer}"
        );
        assert!(is_time(&events[3]["next_at"]), "{answer}");
        assert!(events[3]["attempts"].as_i64() > Some(0), "{answer}");

        let text = done(t, &["conversation", "42"]);
        for part in [
            "42, epoch 1",
            "Ann <ann@x.test>",
            "chat created at 20",
            "message added at 20",
            "\n    Hello\u{fffd}there\n",
            ", the last one: OurAPI gave no usable answer",
            "; next at 20",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        done(t, &["failed", "discard", "3"]);
        let answer = json_of(t, &["conversation", "42"]);
        assert_eq!(
            answer["conversations"][0]["events"][2]["state"],
            "discarded"
        );
    })
    .await;
}

/// A journal in which two conversations have had the id 42, and an unparsable event has it, too. Both APIs are down.
async fn two_epochs() -> Bench {
    let bench = Bench::unreachable();
    bench.once().await;
    let of = |id, conversation, text: &str| {
        let data = json!({ "message": text }).to_string();
        dead_letter(id, conversation, "MESSAGE", &data, "why", 1)
    };
    bench.execute(&format!(
        "INSERT INTO epochs (id, began_at) VALUES (2, 5);
         INSERT INTO conversations (id, epoch, bigchat_id, external_id) VALUES (100, 1, 42, '42'), (200, 2, 42, NULL);
         {}{}
         INSERT INTO events (id, kind, event_at, data, fingerprint, received_at)
         VALUES (3, 'UNREADABLE', 0, '{{\"conversation_id\":42,\"note\":\"S3cretNote\"}}', 7, 1000);
         INSERT INTO attempts (event, attempts, counted, reason, request, response) VALUES (3, 0, 0, 'S3cretReason', '', '');
         INSERT INTO dead_letters (event, failed_at, epoch, received, permanent) VALUES (3, 2000, 1, 1, 1);",
        of(1, 100, "S3cretOne"),
        of(2, 200, "S3cretTwo"),
    ));
    bench
}

/// `conversation` shows every epoch of an id.
#[tokio::test]
async fn conversation_shows_all_epochs() {
    let bench = two_epochs().await;
    let answer = json_of(&bench, &["conversation", "42"]);
    let of = |name: &str| -> Vec<&Value> {
        let conversations = answer["conversations"].as_array().expect("a list");
        conversations.iter().map(|one| &one[name]).collect()
    };
    assert_eq!(of("epoch"), [2, 1]);
    assert_eq!(of("current_epoch"), [2, 2]);
    assert_eq!(of("external_id"), [&Value::Null, &json!("42")]);
    assert_eq!(answer["unparsed_events"], json!([3]));
    let text = done(&bench, &["conversation", "42"]);
    for part in [
        "42, epoch 2\n",
        "42, epoch 1 (BigChat has restarted since; the current epoch is 2)",
        "failed show 3",
        "none: not resolved yet",
        "S3cretTwo",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let unknown = command(&bench, &["conversation", "-7"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(
        printed(&unknown).contains("no event of conversation -7"),
        "{}",
        printed(&unknown)
    );
}

/// Failed events are listed with their texts, and can be selected by their reasons.
#[tokio::test]
async fn failed_list_and_reason_filter() {
    let bench = two_epochs().await;
    let list = done(&bench, &["failed", "list"]);
    for part in ["\n    S3cretOne\n", "3 failed events;"] {
        assert!(list.contains(part), "{part}: {list}");
    }
    let list = json_of(&bench, &["failed", "list", "--reason", "h"]);
    assert_eq!(list["total"], 2);
    let texts = list["events"].as_array().expect("events").iter();
    let texts: Vec<_> = texts.map(|event| &event["text"]).collect();
    assert_eq!(texts, ["S3cretOne", "S3cretTwo"]);
    assert!(is_time(&list["events"][0]["failed_at"]), "{list}");
    let none = done(&bench, &["failed", "list", "--reason", "xyz"]);
    assert!(none.contains("no failed event has a reason with this text"));
    let show = json_of(&bench, &["failed", "show", "1"]);
    for (name, value) in [
        ("kind", json!("MESSAGE")),
        ("conversation", json!(42)),
        ("data", json!(r#"{"message":"S3cretOne"}"#)),
        ("discarded_at", Value::Null),
        ("resolutions", json!([])),
    ] {
        assert_eq!(show[name], value, "{name}: {show}");
    }
    assert_eq!(
        done(&bench, &["failed", "discard", "--yes", "--reason", "wh"]),
        "2 failed events discarded\n"
    );
    assert_eq!(bench.events("failed"), 1);
}

/// A discard can be undone once.
#[tokio::test]
async fn discard_can_be_undone() {
    let bench = two_epochs().await;
    done(&bench, &["failed", "discard", "1", "2", "3"]);
    let shown = done(&bench, &["failed", "show", "1"]);
    assert!(shown.contains("failed undo 1"), "{shown}");
    assert_eq!(
        done(&bench, &["failed", "undo", "1"]),
        "1 failed event reopened\n"
    );
    assert_eq!((bench.events("failed"), bench.events("discarded")), (1, 2));
    let again = command(&bench, &["failed", "undo", "1", "2"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(
        printed(&again).contains("1 of 2 resolved"),
        "{}",
        printed(&again)
    );
    assert_eq!(
        done(&bench, &["failed", "undo", "--all"]),
        "1 failed event reopened\n"
    );
    assert_eq!(bench.events("failed"), 3);
    assert_eq!(
        done(&bench, &["failed", "undo", "--all"]),
        "0 failed events reopened\n"
    );

    // The latest first. The unparsable event has the conversation that it names.
    let log = json_of(&bench, &["resolutions"]);
    let rows = log["resolutions"].as_array().expect("rows");
    let of = |name: &str| -> Vec<&Value> { rows.iter().map(|row| &row[name]).collect() };
    let kinds = ["undo", "undo", "undo", "discard", "discard", "discard"];
    assert_eq!(of("resolution"), kinds);
    assert_eq!(of("event"), [3, 2, 1, 3, 2, 1]);
    assert_eq!(of("conversation"), [42; 6]);
    assert!(
        of("can_undo").iter().all(|can| **can == json!(false)),
        "{log}"
    );
    assert!(of("at").into_iter().all(is_time), "{log}");
    let latest = done(&bench, &["resolutions", "--limit", "1"]);
    assert_eq!(latest.lines().count(), 2, "{latest}");
    assert!(
        latest.contains("undo") && latest.contains("command line"),
        "{latest}"
    );
    done(&bench, &["failed", "discard", "1"]);
    let log = json_of(&bench, &["resolutions", "--limit", "1"]);
    assert_eq!(log["resolutions"][0]["can_undo"], true);
}

/// The lines of an export.
fn exported(t: &Bench, arguments: &[&str]) -> Vec<Value> {
    let text = done(t, &[&["export"], arguments].concat());
    text.lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

#[tokio::test]
async fn export_has_each_delivery_once() {
    run_test(async |t| {
        let daemon = t.start();
        t.delivers([
            start(42, 0),
            message(42, 5, "Hello"),
            transfer(42, 6, 8),
            end(42, 9),
        ])
        .await;
        t.bigchat.reports([message(42, 7, "k")]);
        t.until_events("failed", 1).await;
        // An event that is sent again is exported with its latest delivery.
        t.our_api.loses_message("42");
        let mut verify = t.program("verify");
        verify.arg("--repair");
        // The daemon runs on this thread, so the command must not block it.
        let verified = tokio::task::spawn_blocking(move || verify.output()).await;
        let verified = verified.expect("no panic").expect("a process");
        assert_eq!(verified.status.code(), Some(1), "{}", printed(&verified));
        until("it is sent again", async || {
            t.our_api.messages() == ["Hello"]
        })
        .await;
        daemon.stop().await;
        let since = ["--since", "2020-01-01T00:00:00Z"];
        let mut events = exported(t, &since);
        assert!(events.iter().all(|event| is_time(&event["delivered_at"])));
        events.sort_by_key(|event| event["event"].as_i64());
        let of = |name: &str| -> Vec<&Value> { events.iter().map(|event| &event[name]).collect() };
        assert_eq!(of("kind"), ["START", "MESSAGE", "TRANSFER", "END"]);
        assert_eq!(of("conversation"), [42; 4]);
        assert_eq!(of("epoch"), [1; 4]);
        assert_eq!(of("external_id"), ["42"; 4]);
        assert_eq!(events[1]["text"], "Hello");
        assert_eq!(events[1]["effect"], "message added");
        assert_eq!(events[1]["event_at"], "2026-11-22T22:00:05Z");
        assert_eq!(events[2]["data"]["new_advisor_id"], 8);
        let ended = [&since[..], &["--until", "2020-01-02T00:00:00Z"]].concat();
        assert_eq!(exported(t, &ended), [] as [Value; 0]);

        // The period includes its start and excludes its end.
        t.execute("UPDATE deliveries SET delivered_at = 1000 * id");
        let span = [
            "--since",
            "1970-01-01T00:00:01Z",
            "--until",
            "1970-01-01T00:00:02Z",
        ];
        let first: i64 = t.value("SELECT through - from_event + 1 FROM deliveries WHERE id = 1");
        assert_eq!(
            exported(t, &span).len(),
            usize::try_from(first).expect("few")
        );
    })
    .await;
}

/// An event that is sent again has a delivery of its own. The events delivered together with it before keep theirs.
#[tokio::test]
async fn delivery_around_an_event_sent_again() {
    run_test(async |t| {
        let daemon = t.start();
        t.our_api
            .upset("POST /chats/*/messages*two", status(422).body("{}"));
        t.bigchat.reports([
            start(42, 0),
            message(42, 1, "one"),
            message(42, 2, "two"),
            message(42, 3, "three"),
        ]);
        t.until_events("delivered", 3).await;
        t.until_events("failed", 1).await;
        let texts = || -> Vec<String> {
            let events = exported(t, &["--since", "2020-01-01T00:00:00Z"]);
            let texts = events.iter().filter_map(|event| event["text"].as_str());
            let mut texts: Vec<String> = texts.map(str::to_owned).collect();
            texts.sort();
            texts
        };
        let times = || -> Vec<Value> {
            let shown = json_of(t, &["conversation", "42"]);
            let events = shown["conversations"][0]["events"].as_array();
            let events = events.unwrap_or_else(|| panic!("{shown:#}"));
            let since = |event: &Value| event["state_since"].clone();
            events.iter().map(since).collect()
        };
        assert_eq!(texts(), ["one", "three"]);
        let before = times();
        tokio::time::sleep(Duration::from_millis(50)).await;
        t.failed_command(&["retry", "--all"])
            .expect("it is retried");
        t.until_events("delivered", 4).await;
        daemon.stop().await;
        assert_eq!(texts(), ["one", "three", "two"]);
        let after = times();
        assert_ne!(after[2], before[2]);
        assert_eq!((&after[1], &after[3]), (&before[1], &before[3]));
    })
    .await;
}

/// An export whose reader stalls does not delay a checkpoint.
#[tokio::test]
async fn stalled_export_and_checkpoint() {
    let bench = Bench::unreachable();
    bench.once().await;
    bench.execute(
        "INSERT INTO conversations (id, epoch, bigchat_id, offset) VALUES (100, 1, 42, 5000);
         WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000)
         INSERT INTO events (id, conversation, kind, event_at, data, fingerprint, received_at)
            SELECT i, 100, 'MESSAGE', i, json_object('message', 'No ' || i), i, i FROM n;
         INSERT INTO deliveries (conversation, from_event, through, delivered_at, effect)
            SELECT 100, id, id, id, 'message added' FROM events;",
    );
    let mut export = bench.program("export");
    export.args(["--since", "1970-01-01T00:00:00Z"]);
    let mut export = export.stdout(Stdio::piped()).spawn().expect("a process");
    let mut output = export.stdout.take().expect("a pipe");
    // The export has begun, and is larger than a pipe's buffer.
    let mut text = vec![0; 1];
    output.read_exact(&mut text).expect("a byte");
    let writer = rusqlite::Connection::open(bench.db()).expect("a database");
    writer
        .execute("UPDATE control SET losses = losses", [])
        .expect("it can be written");
    let busy: i64 = writer
        .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))
        .expect("a checkpoint");
    assert_eq!(busy, 0);
    output.read_to_end(&mut text).expect("the rest");
    assert!(export.wait().expect("it ends").success());
    let lines = String::from_utf8(text).expect("text");
    assert_eq!(lines.lines().count(), 5000);
}

/// The database's files that contain this text.
fn files_with(t: &Bench, text: &str) -> Vec<String> {
    let files = ["journal.db", "journal.db-wal"].map(|name| t.directory().join(name));
    let holds = |bytes: &[u8]| {
        bytes
            .windows(text.len())
            .any(|part| part == text.as_bytes())
    };
    files
        .iter()
        .filter(|file| std::fs::read(file).is_ok_and(|bytes| holds(&bytes)))
        .map(|file| file.display().to_string())
        .collect()
}

/// Forgotten text is removed from every file for good.
#[tokio::test]
async fn forgotten_text_leaves_all_files() {
    run_test(async |t| {
        t.differs("a conversation is forgotten");
        let reject = status(422).body(r#"{"detail":"S3cretEcho"}"#).always();
        t.our_api.upset("POST /chats/*/messages*S3cretBad", reject);
        let later = status(500).body("S3cretError").always();
        t.our_api.upset("POST /chats/*/messages*S3cretLater", later);
        let daemon = t.start();
        let long = format!("S3cretLong{}", "x".repeat(20_000));
        let reported = [
            start(42, 0),
            message(42, 5, "S3cretOne"),
            message(42, 6, &long),
            message(42, 7, "S3cretBad"),
            json!({"conversation_id": 42, "event_name": "NOTE", "event_at": 1_795_384_810, "data": "S3cretNote"}),
            message(42, 8, "S3cretLater"),
            message(43, 9, "Not forgotten"),
        ];
        t.bigchat.reports(reported.clone());
        t.until_events("failed", 2).await;
        until("an attempt fails", async || {
            t.value::<i64>("SELECT count(*) FROM attempts WHERE next_at IS NOT NULL") == 1
        })
        .await;
        t.until_events("delivered", 4).await;
        assert!(!files_with(t, "S3cret").is_empty());
        done(t, &["failed", "retry", "--reason", "permanently"]);
        t.until_events("failed", 2).await;

        let text = done(t, &["forget", "42", "--yes"]);
        assert!(text.contains("the text of its 6 events was erased"), "{text}");
        assert!(text.contains("OurAPI still has its chat 42 (id "), "{text}");
        assert_eq!(files_with(t, "S3cret"), [] as [String; 0]);
        assert!(!files_with(t, "Not forgotten").is_empty());
        assert_eq!((t.events("failed"), t.events("waiting")), (0, 0));
        assert_eq!(t.events("forgotten"), 6);

        // An event reported again is recognized. A new one is counted, but its text is not stored.
        t.bigchat.reports(reported);
        t.bigchat.reports([message(42, 20, "S3cretNew"), end(42, 21)]);
        t.bigchat.reports(bigchat_sync::simulator::bigchat::raw(
            r#"{"events":[{"conversation_id":42,"event_name":"NOTE","event_at":1795384899,"data":"S3cretNote2"}]}"#,
        ));
        t.until_events("forgotten", 9).await;
        assert_eq!((t.events("failed"), t.events("waiting")), (0, 0));
        assert_eq!(t.our_api.count("*S3cretNew*"), 0, "its text is not sent");
        let stored = "SELECT count(*) FROM events WHERE data LIKE '%S3cret%'";
        assert_eq!(t.value::<i64>(stored), 0);
        until("the poll has ended", async || t.value::<i64>("SELECT count(*) FROM inbox") == 0).await;
        done(t, &["forget", "42", "--yes"]);
        assert_eq!(files_with(t, "S3cret"), [] as [String; 0]);

        // Neither a loss nor a verification restores the chat.
        t.our_api.calm();
        t.our_api.loses_everything();
        t.bigchat.reports([message(43, 30, "Still there?")]);
        until("the other chat is restored", async || {
            t.our_api.messages() == ["Not forgotten", "Still there?"]
        })
        .await;
        assert_eq!(t.our_api.chats().len(), 1);
        let verified = command(t, &["verify", "--conversation", "42"]);
        assert!(printed(&verified).contains("or the conversation was forgotten"), "{}", printed(&verified));
        let export = done(t, &["export", "--since", "2020-01-01T00:00:00Z"]);
        assert!(!export.contains("S3cret"), "{export}");
        let answer = json_of(t, &["conversation", "42"]);
        assert!(is_time(&answer["conversations"][0]["forgotten_at"]), "{answer}");
        daemon.stop().await;
    })
    .await;
}

/// A forgotten conversation is not sent, even if it was loaded long before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forgotten_while_in_queue() {
    run_test(async |t| {
        t.differs("a conversation is forgotten");
        let daemon = t.start();
        t.delivers([start(43, 1), start(42, 0)]).await;
        t.our_api.set_latency(Duration::from_millis(150));
        let others = (0..60).map(|n| message(43, n, "before it"));
        let events: Vec<_> = others.chain([message(42, 5, "S3cret")]).collect();
        t.bigchat.reports(events);
        until("one is sent", async || t.our_api.message_count() == 1).await;
        done(t, &["forget", "42", "--yes"]);
        t.until_events("delivered", 61).await;
        daemon.stop().await;
        assert_eq!(t.our_api.count("*S3cret*"), 0);
    })
    .await;
}

#[tokio::test]
async fn forget_names_one_epoch_and_asks() {
    let bench = two_epochs().await;
    for (arguments, expected) in [
        (
            &["forget", "42", "--yes"][..],
            "epochs 1, 2; choose one with --epoch",
        ),
        (&["forget", "42", "--epoch", "1"], "add --yes"),
        (
            &["forget", "42", "--epoch", "3", "--yes"],
            "nothing was erased",
        ),
        (&["forget", "7", "--yes"], "nothing was erased"),
    ] {
        let output = command(&bench, arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(printed(&output).contains(expected), "{}", printed(&output));
        assert_eq!(bench.events("failed"), 3, "{arguments:?}");
    }
    let text = done(&bench, &["forget", "42", "--epoch", "1", "--yes"]);
    assert!(
        text.contains("epoch 1 is forgotten: the text of its 2 events"),
        "{text}"
    );
    for erased in ["S3cretOne", "S3cretNote", "S3cretReason"] {
        assert_eq!(files_with(&bench, erased), [] as [String; 0], "{erased}");
    }
    assert_eq!(files_with(&bench, "S3cretTwo").len(), 1);
    assert_eq!((bench.events("failed"), bench.events("forgotten")), (1, 2));
    let undone = command(&bench, &["failed", "undo", "--all"]);
    assert_eq!(
        printed(&undone),
        "0 failed events reopened\n",
        "no discarded event is left"
    );
}

/// A request in flight during `forget` stores no forgotten text.
#[tokio::test]
async fn forget_with_request_in_flight() {
    run_test(async |t| {
        t.differs("a conversation is forgotten");
        t.set("--request-timeout", "300ms");
        let daemon = t.start();
        t.delivers([start(42, 0)]).await;
        let overdue = bigchat_sync::simulator::fault::paused().always();
        t.our_api.upset("POST /chats/*/messages", overdue);
        t.bigchat.reports([message(42, 5, "S3cret")]);
        until("it is in flight", async || t.our_api.pausing() == 1).await;
        done(t, &["forget", "42", "--yes"]);
        until("its outcome is committed", async || {
            t.value::<i64>("SELECT stale_seq FROM conversations WHERE bigchat_id = 42") > 0
        })
        .await;
        assert_eq!(t.value::<i64>("SELECT count(*) FROM attempts"), 0);
        assert_eq!(
            t.value::<i64>("SELECT count(*) FROM conversations WHERE due_at > 0"),
            0
        );
        assert_eq!((t.events("waiting"), t.events("forgotten")), (0, 2));
        assert_eq!(files_with(t, "S3cret"), [] as [String; 0]);
        t.resume();
        daemon.stop().await;
    })
    .await;
}

/// The program's standard output. The program must succeed, and has an empty environment.
pub(super) fn stdout_of(arguments: &[&str]) -> String {
    let output = program().args(arguments).env_clear().output();
    let output = output.expect("a process");
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        printed(&output)
    );
    String::from_utf8(output.stdout).expect("text")
}

/// The help of each command shows the settings that matter to it.
#[test]
fn help_shows_relevant_settings() {
    for (arguments, shown, hidden) in [
        (
            &["-h"][..],
            &["--db", "--our-api-url", "forget"][..],
            &["--retry-max", "More settings"][..],
        ),
        (
            &["--help"],
            &["--db", "--retry-max", "More settings", "--listen"],
            &["--json"],
        ),
        (&["run", "-h"], &["--db"], &["--retry-max"]),
        (&["run", "--help"], &["--retry-max", "More settings"], &[]),
        (
            &["failed", "list", "-h"],
            &["--reason", "--db"],
            &["--our-api-url", "--listen"],
        ),
        (
            &["help", "failed", "list"],
            &["--reason", "--db"],
            &["--our-api-url", "--listen"],
        ),
        (
            &["help", "verify"],
            &["--repair", "--our-api-url"],
            &["--listen"],
        ),
        (
            &["help", "export"],
            &["--since", "--until"],
            &["first start only"],
        ),
        (&["help", "demo"], &["--faults"], &["--db"]),
        (&["help", "man"], &["Usage"], &["--db"]),
    ] {
        let help = stdout_of(arguments);
        for part in shown {
            assert!(help.contains(part), "{arguments:?} {part}: {help}");
        }
        for part in hidden {
            assert!(!help.contains(part), "{arguments:?} {part}: {help}");
        }
        if let (Some(own), Some(setting)) = (help.find("\nOptions:"), help.find("\nSettings (")) {
            assert!(own < setting, "{arguments:?}: {help}");
        }
    }
    let page = stdout_of(&["man"]);
    for section in ["EXAMPLES", "ENVIRONMENT", "FILES", "EXIT STATUS"] {
        assert!(
            page.contains(&format!(".SH \"{section}\""))
                || page.contains(&format!(".SH {section}\n")),
            "{section}"
        );
    }
}

#[tokio::test]
async fn check_as_json() {
    run_test(async |t| {
        t.differs("nothing is reported");
        let report = json_of(t, &["check"]);
        assert_eq!(report["passed"], true, "{report}");
        let checks = report["checks"].as_array().expect("checks");
        let names: Vec<_> = checks.iter().map(|check| &check["check"]).collect();
        assert_eq!(
            names,
            [
                "settings", "database", "daemon", "BigChat", "OurAPI", "console"
            ]
        );
        std::fs::write(t.db(), "Dear diary").expect("a file");
        let output = command(t, &["check", "--json"]);
        assert_eq!(output.status.code(), Some(1));
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(report["passed"], false);
        let remedy = report["checks"][1]["remedy"].as_str();
        assert!(
            remedy.is_some_and(|remedy| remedy.contains("set another one")),
            "{report}"
        );
        assert_eq!(report["checks"][0]["remedy"], Value::Null);
    })
    .await;
}

/// An error names what is refused, and a command claims nothing that it did not do.
#[tokio::test]
async fn commands_name_what_they_refuse() {
    let (bench, empty) = (two_epochs().await, Bench::unreachable());
    let missing = format!("there is no database {}; start", empty.db().display());
    let (since, until) = ("2026-11-22T22:00:00Z", "2026-11-22T21:00:00Z");
    for (bench, arguments, expected) in [
        (
            &bench,
            &["failed", "discard", "1", "999999"][..],
            "1 of 2 resolved; not 999999: it is not a failed event",
        ),
        (
            &bench,
            &["export", "--since", since, "--until", until],
            "the period is empty",
        ),
        (&empty, &["status"], &missing),
    ] {
        let output = command(bench, arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(printed(&output).contains(expected), "{}", printed(&output));
    }
    let forget = ["forget", "42", "--epoch", "1", "--yes"];
    done(&bench, &forget);
    let again = done(&bench, &forget);
    assert!(
        again.contains("was already forgotten at 20") && !again.contains("was erased"),
        "{again}"
    );
}

/// A consumer can continue an export at the time of its last event, without repeating earlier ones.
#[tokio::test]
async fn export_period_to_the_millisecond() {
    run_test(async |t| {
        let daemon = t.start();
        t.delivers([message(42, 5, "one")]).await;
        t.delivers([message(42, 6, "two")]).await;
        daemon.stop().await;
        t.execute("DELETE FROM deliveries WHERE id < (SELECT max(id) FROM deliveries) - 1");
        t.execute("UPDATE deliveries SET delivered_at = 1000 + 100 * (id = (SELECT max(id) FROM deliveries))");
        let texts = |period: &[&str]| -> Vec<Value> {
            let events = exported(t, period).into_iter();
            events.map(|event| event["text"].clone()).collect()
        };
        let time = |millis: i64| format!("1970-01-01T00:00:01.{millis:03}Z");
        assert_eq!(texts(&["--since", &time(0)]), ["one", "two"]);
        assert_eq!(texts(&["--since", &time(1)]), ["two"]);
        assert_eq!(texts(&["--since", &time(100)]), ["two"]);
        assert_eq!(texts(&["--since", &time(101)]), [] as [Value; 0]);
        assert_eq!(texts(&["--since", &time(0), "--until", &time(100)]), ["one"]);
    })
    .await;
}

/// A reader that has gone does not make the command fail.
#[tokio::test]
async fn verify_into_a_closed_pipe() {
    run_test(async |t| {
        let daemon = t.start();
        t.delivers([message(42, 5, "Hello")]).await;
        daemon.stop().await;
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let output = t.program("verify").stdout(writer).output();
        let output = output.expect("a process");
        assert_eq!(output.status.code(), Some(0), "{}", printed(&output));
        assert_eq!(printed(&output), "");
    })
    .await;
}

/// A verification whose output cannot be written is withdrawn, not left to the daemon.
#[tokio::test]
async fn verify_with_failed_output_is_withdrawn() {
    run_test(async |t| {
        let daemon = t.start();
        t.delivers([message(42, 5, "Hello")]).await;
        daemon.stop().await;
        done(t, &["pause"]);
        let full = std::fs::File::options().write(true).open("/dev/full");
        let mut verify = t.program("verify");
        verify.stdout(full.expect("a device"));
        let output = finished(verify).await;
        assert_eq!(output.status.code(), Some(1), "{}", printed(&output));
        let left = "SELECT count(*) FROM verifications WHERE NOT idle";
        assert_eq!(t.value::<i64>(left), 0, "{}", printed(&output));
        done(t, &["resume"]);
    })
    .await;
}

/// `check` treats an empty file like a missing one, and does not change it.
#[test]
fn check_changes_no_empty_file() {
    let bench = Bench::unreachable();
    std::fs::write(bench.db(), "").expect("a file");
    let text = printed(&command(&bench, &["check"]));
    assert!(
        text.contains("will be created at the first start"),
        "{text}"
    );
    assert_eq!(std::fs::read(bench.db()).expect("a file"), b"");
}

/// The events of a forgotten conversation are dropped after the retention period, failed ones, too.
#[tokio::test]
async fn forgotten_failed_event_is_dropped() {
    run_test(async |t| {
        t.differs("a conversation is forgotten");
        t.set("--retention", "1h");
        let daemon = t.start();
        t.bigchat
            .reports([start(42, 0), message(42, 5, "k"), start(43, 1)]);
        t.until_events("failed", 1).await;
        t.until_events("delivered", 2).await;
        daemon.stop().await;
        done(t, &["forget", "42", "--yes"]);
        t.execute("UPDATE deliveries SET delivered_at = delivered_at - 7200000");
        t.bigchat.clock(3 * 3600);
        t.start();
        until("the others are dropped", async || {
            t.value::<i64>("SELECT count(*) FROM events WHERE kind = 'START'") == 0
        })
        .await;
        t.bigchat.further_polls(40).await;
        let left: i64 = t.value("SELECT count(*) FROM events");
        assert_eq!(left, 0, "events of the forgotten conversation");
    })
    .await;
}

/// SQL for 60 epochs, as after two months of daily restarts, each with a conversation 42 that has a chat.
const EPOCHS: &str = "
    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 60)
    INSERT OR IGNORE INTO epochs (id, began_at) SELECT i, i FROM n;
    INSERT INTO conversations (id, epoch, bigchat_id, started_at, details, external_id, chat_id, chat_started_at, offset)
        SELECT 100 + id, id, 42, id, 'read', '42@' || id, printf('00000000-0000-0000-0000-%012d', id), id, 1000 + id FROM epochs;
    INSERT INTO events (id, conversation, kind, event_at, data, fingerprint, received_at)
        SELECT 1000 + id, 100 + id, 'MESSAGE', id, '{\"message\":\"S3cret\"}', id, 1000 FROM epochs;";

/// However often BigChat has reused an id, all of its conversations are shown.
#[tokio::test]
async fn id_of_many_epochs() {
    run_test(async |t| {
        t.fill(EPOCHS).await;
        let answer = json_of(t, &["conversation", "42"]);
        let shown = answer["conversations"].as_array().expect("a list").len();
        assert_eq!(shown, 60, "all are shown");
    })
    .await;
}

/// The chat that the operator must erase is named, however often BigChat has reused the id.
#[tokio::test]
async fn forgotten_conversation_of_an_old_epoch() {
    run_test(async |t| {
        t.fill(EPOCHS).await;
        for epoch in ["60", "1"] {
            let text = done(t, &["forget", "42", "--epoch", epoch, "--yes"]);
            assert!(
                text.contains(&format!("OurAPI still has its chat 42@{epoch} ")),
                "{text}"
            );
        }
    })
    .await;
}

/// Why a chat has no agent: BigChat names no advisor. This is not a matter of details that have not been read.
#[tokio::test]
async fn conversation_that_no_advisor_has_taken() {
    run_test(async |t| {
        t.differs("BigChat names no advisor");
        let nobody = r#"{"events":[{"conversation_id":42,"event_name":"START","event_at":1795384800,"data":null}],
            "conversation_id":42,"advisor_id":null}"#;
        t.bigchat
            .upset("GET /conversations/42", status(200).body(nobody).always());
        t.start();
        t.delivers([start(42, 0), message(42, 5, "Hello")]).await;
        assert_eq!(t.bigchat.count("GET /conversations/42"), 1, "they were read");
        let text = done(t, &["conversation", "42"]);
        assert!(!text.contains("details have not been read"), "{text}");
    })
    .await;
}

/// A denial is the reason for which an event waits, although it is no failed attempt.
#[tokio::test]
async fn denied_conversation_says_why_it_waits() {
    run_test(async |t| {
        t.differs("the conversation is denied");
        t.set("--poll-interval", "1h");
        t.bigchat.reports([message(42, 5, "Hello")]);
        t.bigchat
            .upset("GET /conversations/42", status(404).always());
        t.start();
        t.until_polled().await;
        until("the denial is recorded", async || {
            t.value::<i64>("SELECT count(*) FROM attempts") == 1
        })
        .await;
        let text = done(t, &["conversation", "42"]);
        assert!(!text.contains("not tried yet"), "{text}");
        assert!(
            text.contains("waiting  BigChat denied the request"),
            "{text}"
        );
    })
    .await;
}

/// A chat that was believed lost may still be there, with all its messages: `forget` names it.
#[tokio::test]
async fn forgotten_conversation_whose_chat_seemed_lost() {
    run_test(async |t| {
        t.differs("the conversation is forgotten");
        t.start();
        t.delivers([start(42, 0), message(42, 5, "S3cret")]).await;
        // For a moment OurAPI does not show the chat (a restore, a replica), and then it is down.
        t.our_api.upset("POST /chats/{id}/messages", status(404));
        t.our_api.upset("GET /chats", status(200).body("[]"));
        t.our_api.upset("POST /chats", status(500).always());
        t.bigchat.reports([message(42, 6, "again")]);
        until("the chat is created again", async || {
            t.our_api.count("POST /chats") > 1
        })
        .await;
        assert_eq!(t.our_api.messages(), ["S3cret"], "OurAPI has the chat");
        let text = done(t, &["forget", "42", "--yes"]);
        t.calm();
        assert!(text.contains("chat 42"), "{text}");
    })
    .await;
}

/// An event that could not be parsed and was erased cannot be reopened, and `failed show` does not claim that.
#[tokio::test]
async fn erased_unparsable_event_is_shown() {
    run_test(async |t| {
        t.differs("the event cannot be parsed");
        t.start();
        t.bigchat
            .reports([json!({"conversation_id": 42, "event_name": "NOTE", "event_at": 1_795_384_810, "data": "S3cret"})]);
        t.until_events("failed", 1).await;
        until("the window is read", async || {
            t.value::<i64>("SELECT count(*) FROM inbox") == 0
        })
        .await;
        done(t, &["forget", "42", "--yes"]);
        let undo = command(t, &["failed", "undo", "1"]);
        assert!(!undo.status.success(), "nothing is left to reopen");
        let text = done(t, &["failed", "show", "1"]);
        assert!(!text.contains("reopens it"), "{text}");
    })
    .await;
}
