//! The demo as a user runs it: its output, exit code and cleanup.

use crate::harness::process::{files, printed, program};
use crate::harness::run_live_test;

use bigchat_sync::simulator::compare::{Rules, compare, expected};
use bigchat_sync::simulator::event::{message, start};
use bigchat_sync::simulator::our_api::Data;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, ExitCode, Output, Stdio};

use bigchat_sync::demo::{DemoResult, FailedPolls, Figures};

/// The demo, in an environment that would stop a daemon, and with a separate temporary directory.
fn demo(temporary: &Path) -> Command {
    let mut demo = program();
    demo.arg("demo")
        .env("TMPDIR", temporary)
        .env("HTTP_PROXY", "http://127.0.0.1:1")
        .env("BIGCHAT_SYNC_BIGCHAT_URL", "not a URL")
        .env("BIGCHAT_SYNC_OUR_API_TOKEN", "")
        .env("BIGCHAT_SYNC_DB", "/does/not/exist")
        .env("BIGCHAT_SYNC_POLL_INTERVAL", "soon")
        .env_remove("RUST_LOG");
    demo
}

/// A figure in a line of the demo, by its heading.
fn figure(line: &str, heading: &str) -> Option<u64> {
    const HEADINGS: [&str; 9] = [
        "events",
        "conversations",
        "errors",
        "chats",
        "agents",
        "messages",
        "requests",
        "waiting",
        "failed",
    ];
    let (_, figures) = line.trim_start().split_once(" s ")?;
    let index = HEADINGS.iter().position(|one| *one == heading)?;
    figures.split_whitespace().nth(index)?.parse().ok()
}

fn run(flags: &[&str]) -> Output {
    let temporary = tempfile::tempdir().expect("a directory");
    let output = demo(temporary.path()).args(flags).output();
    assert_left_clean(temporary.path());
    output.expect("it runs")
}

fn assert_left_clean(temporary: &Path) {
    let left = files(temporary);
    assert!(left.is_empty(), "files left behind: {left:?}");
}

fn assert_proved(output: &Output) {
    let all = printed(output);
    assert_eq!(output.status.code(), Some(0), "{all}");
    assert!(!all.contains('\u{1b}'), "{all}");
    let out = String::from_utf8_lossy(&output.stdout);
    let result = out.lines().last().unwrap_or_default();
    assert!(
        result.starts_with("No difference: ") && result.ends_with("never more than 1 at once"),
        "{result}"
    );
}

#[test]
fn demo_with_events_reported_once() {
    assert_proved(&run(&["--duration", "3s", "--seed", "1"]));
}

#[test]
fn demo_with_a_stable_log() {
    assert_proved(&run(&[
        "--duration",
        "3s",
        "--seed",
        "1",
        "--bigchat",
        "log",
    ]));
}

/// A demo that a signal ends early still compares both services.
#[test]
fn signal_ends_the_demo_early() {
    let temporary = tempfile::tempdir().expect("a directory");
    let mut demo = demo(temporary.path())
        .args(["--duration", "1h", "--seed", "1"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("it runs");
    let mut out = BufReader::new(demo.stdout.take().expect("its output"));
    let mut line = String::new();
    while figure(&line, "chats") != Some(2) {
        line.clear();
        assert!(out.read_line(&mut line).expect("a line") > 0, "it ended");
    }
    let kill = Command::new("kill").arg(demo.id().to_string()).status();
    assert!(kill.expect("kill").success());
    let mut rest = String::new();
    out.read_to_string(&mut rest).expect("the rest");
    assert!(demo.wait().expect("it ends").success(), "{rest}");
    let result = rest.lines().last().unwrap_or_default();
    assert!(result.starts_with("No difference: "), "{rest}");
    assert_left_clean(temporary.path());
}

#[test]
fn failed_events_retried_beside_demo() {
    let temporary = tempfile::tempdir().expect("a directory");
    let mut demo = demo(temporary.path())
        .args(["--faults", "--duration", "15s", "--seed", "5"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("it runs");
    let out = BufReader::new(demo.stdout.take().expect("its output"));
    let (mut db, mut last) = (String::new(), String::new());
    let (mut fixed, mut retried) = (false, 0);
    for line in out.lines() {
        let line = line.expect("a line");
        if let Some((_, path)) = line.split_once("BIGCHAT_SYNC_DB=") {
            path.clone_into(&mut db);
        }
        fixed |= line.starts_with("OurAPI is fixed");
        // The last retry must come before the end: an event retried during the comparison would still be waiting.
        if fixed && retried < 3 && figure(&line, "failed").is_some_and(|failed| failed > 0) {
            // This time, everything that can be stored is delivered.
            let retry = program()
                .args(["failed", "retry", "--all", "--db", &db])
                .output();
            retried += u32::from(retry.expect("a process").status.success());
        }
        last = line;
    }
    assert!(fixed && retried > 0);
    assert!(last.starts_with("No difference: "), "{last}");
    assert!(demo.wait().expect("it ends").success());
    assert_left_clean(temporary.path());
}

/// The demo ends without an error if the reader of its output exits.
#[test]
fn closed_pipe_ends_the_demo() {
    let temporary = tempfile::tempdir().expect("a directory");
    let mut demo = demo(temporary.path())
        .args(["--duration", "1h"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let mut out = BufReader::new(demo.stdout.take().expect("its output"));
    out.read_line(&mut String::new()).expect("a line");
    drop(out);
    let ended = demo.wait_with_output().expect("it ends");
    assert!(ended.status.success(), "{}", printed(&ended));
    assert_eq!(printed(&ended), "");
    assert_left_clean(temporary.path());
}

#[test]
fn setting_without_effect_in_demo() {
    for flags in [&["--db", "mine.db"], &["--message-author", "agent"]] {
        let output = run(flags);
        assert_eq!(output.status.code(), Some(2));
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(
            log.contains(&format!("{} would have no effect", flags[0])),
            "{log}"
        );
    }
}

#[test]
fn demo_port_is_taken() {
    // The port is taken by this test or by another process.
    let taken = TcpListener::bind("127.0.0.1:8267");
    let output = run(&["--serve"]);
    assert_eq!(output.status.code(), Some(1));
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(
        log.contains("BigChat cannot listen on 127.0.0.1:8267"),
        "{log}"
    );
    drop(taken);
}

#[tokio::test]
async fn any_difference_is_exit_code_1() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(2, now, 1);
        t.bigchat.reports_event(start(2, now));
        for text in ["a parcel", "k"] {
            t.bigchat.reports_event(message(2, now, text));
        }
        t.once().await;
        let judge = |data: &Data, figures: &Figures| {
            let rules = Rules::default();
            let report = compare(&expected(&t.bigchat.reported(), &rules), data, &rules);
            let result = DemoResult::new(report, *figures);
            (result.exit_code(), result.text(false))
        };
    let held = t.our_api.data();
    let figures = Figures {
        events: 3,
        requests: 6,
        at_once: 1,
        failed: 1,
        waiting: 0,
        failed_polls: FailedPolls::default(),
        chaos: None,
    };
    let (code, text) = judge(&held, &figures);
    assert_eq!(code, ExitCode::SUCCESS, "{text}");
    assert!(
        text.ends_with("\nNo difference: 1 conversation, 3 events, 6 requests (2.00 per event), never more than 1 at once"),
        "{text}"
    );
    assert!(text.contains("1 message failed, as expected"), "{text}");

    let mut lost = held.clone();
    lost.messages.values_mut().for_each(Vec::clear);
    let mut doubled = held.clone();
    doubled
        .messages
        .values_mut()
        .for_each(|messages| messages.extend_from_within(..));
    let mut unended = held.clone();
    unended.chats[0].ended_at = Some(held.chats[0].started_at);
    for (what, held) in BTreeMap::from([("lost", lost), ("doubled", doubled), ("ended", unended)]) {
        let (code, text) = judge(&held, &figures);
        assert_eq!(code, ExitCode::from(1), "{what}: {text}");
        assert!(
            text.contains("\nFAILED, OurAPI does not have what BigChat reported: "),
            "{text}"
        );
    }
    let wrong = [
        (
            Figures {
                events: 0,
                ..figures
            },
            "BigChat reported no event",
        ),
        (
            Figures {
                waiting: 1,
                ..figures
            },
            "1 event still waiting",
        ),
        (
            Figures {
                failed: 2,
                ..figures
            },
            "2 events failed, of which 1 can never be stored",
        ),
        (
            Figures {
                at_once: 2,
                ..figures
            },
            "up to 2 requests at once",
        ),
    ];
    for (figures, why) in wrong {
        let (code, text) = judge(&held, &figures);
        assert_eq!(code, ExitCode::from(1), "{text}");
        assert!(text.contains(why), "{text}");
    }

    })
    .await;
}
