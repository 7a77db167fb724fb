//! The demo as somebody runs it: what it prints, what it leaves behind, and its exit code.

use crate::harness::run_live_test;

use bigchat_sync::simulator::compare::{Rules, compare, expected};
use bigchat_sync::simulator::event::{message, start};
use bigchat_sync::simulator::our_api::Data;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, ExitCode, Output, Stdio};

use bigchat_sync::demo::{Figures, Verdict};

/// The demo, in surroundings that would stop a daemon, and with a temporary directory of its own.
fn demo(temporary: &Path) -> Command {
    let mut demo = Command::new(env!("CARGO_BIN_EXE_bigchat-sync"));
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

fn run(flags: &[&str]) -> Output {
    let temporary = tempfile::tempdir().expect("a directory");
    let output = demo(temporary.path()).args(flags).output();
    assert_left_clean(temporary.path());
    output.expect("it runs")
}

fn assert_left_clean(temporary: &Path) {
    let left = std::fs::read_dir(temporary).expect("the directory").count();
    assert_eq!(left, 0, "the temporary database is gone");
}

fn assert_proved(output: &Output) {
    let (out, log) = [&output.stdout, &output.stderr]
        .map(|bytes| String::from_utf8_lossy(bytes))
        .into();
    assert_eq!(output.status.code(), Some(0), "{out}{log}");
    assert!(
        !out.contains('\u{1b}') && !log.contains('\u{1b}'),
        "{out}{log}"
    );
    let verdict = out.lines().last().unwrap_or_default();
    assert!(
        verdict.contains(" events told, ")
            && verdict.ends_with("never more than 1 at once, no difference"),
        "{verdict}"
    );
}

#[test]
fn it_proves_that_nothing_is_lost_told_once() {
    assert_proved(&run(&["--duration", "3s", "--seed", "1"]));
}

#[test]
fn it_proves_that_nothing_is_lost_told_from_a_log() {
    assert_proved(&run(&[
        "--duration",
        "3s",
        "--seed",
        "1",
        "--bigchat",
        "log",
    ]));
}

#[test]
fn a_signal_ends_it_early_and_it_still_compares() {
    let temporary = tempfile::tempdir().expect("a directory");
    let mut demo = demo(temporary.path())
        .args(["--duration", "1h", "--seed", "1"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("it runs");
    let mut out = BufReader::new(demo.stdout.take().expect("its output"));
    let mut line = String::new();
    while !line.contains("OurAPI holds 2 chats") {
        line.clear();
        assert!(out.read_line(&mut line).expect("a line") > 0, "it ended");
    }
    let kill = Command::new("kill").arg(demo.id().to_string()).status();
    assert!(kill.expect("kill").success());
    let mut rest = String::new();
    out.read_to_string(&mut rest).expect("the rest");
    assert!(demo.wait().expect("it ends").success(), "{rest}");
    assert!(rest.ends_with("no difference\n"), "{rest}");
    assert_left_clean(temporary.path());
}

#[test]
fn what_fails_can_be_mended_beside_it() {
    let temporary = tempfile::tempdir().expect("a directory");
    let mut demo = demo(temporary.path())
        .args(["--faults", "--duration", "30s", "--seed", "5"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("it runs");
    let out = BufReader::new(demo.stdout.take().expect("its output"));
    let (mut db, mut last) = (String::new(), String::new());
    let (mut mended, mut retried) = (false, false);
    for line in out.lines() {
        let line = line.expect("a line");
        if let Some((_, path)) = line.split_once("BIGCHAT_SYNC_DB=") {
            path.clone_into(&mut db);
        }
        mended |= line.contains("has mended OurAPI");
        let waiting = line.contains(" of 30s ") && !line.contains(" 0 failed");
        if mended && waiting {
            // All but what can never be stored gets through this time.
            let retry = Command::new(env!("CARGO_BIN_EXE_bigchat-sync"))
                .args(["failed", "retry", "--all", "--db", &db])
                .output();
            // The demo may just be over.
            retried |= retry.expect("a process").status.success();
        }
        last = line;
    }
    assert!(mended && retried);
    assert!(last.ends_with("no difference"), "{last}");
    assert!(demo.wait().expect("it ends").success());
    assert_left_clean(temporary.path());
}

#[test]
fn nothing_told_proves_nothing() {
    let output = run(&["--duration", "0s"]);
    assert_eq!(output.status.code(), Some(1));
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(out.ends_with("nothing was told\n"), "{out}");
}

#[test]
fn a_setting_that_would_have_no_effect_is_refused() {
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
fn a_port_that_is_taken_is_named() {
    // By this test, or by whoever else is there.
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
        t.bigchat.tells_of(start(2, now));
        for text in ["a parcel", "k"] {
            t.bigchat.tells_of(message(2, now, text));
        }
        t.once().await;
        let judge = |data: &Data, figures: &Figures| {
            let rules = Rules::default();
            let report = compare(&expected(&t.bigchat.reported(), &rules), data, &rules);
            let verdict = Verdict::new(report, *figures);
            (verdict.exit_code(), verdict.to_string())
        };
    let held = t.our_api.data();
    let figures = Figures {
        events: 3,
        requests: 6,
        at_once: 1,
        failed: 1,
        waiting: 0,
        chaos: None,
    };
    let (code, text) = judge(&held, &figures);
    assert_eq!(code, ExitCode::SUCCESS, "{text}");
    assert!(
        text.ends_with("\n1 conversation, 3 events told, 6 requests to OurAPI (2.00 per event), never more than 1 at once, no difference"),
        "{text}"
    );
    assert!(text.contains("1 message failed, and rightly so"), "{text}");

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
            text.ends_with("OurAPI does not hold what BigChat told"),
            "{text}"
        );
    }
    let wrong = [
        (
            Figures {
                events: 0,
                ..figures
            },
            "nothing was told",
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
            "more than 1 request at once",
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
