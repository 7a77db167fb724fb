//! Resolutions of failed events: permissions, confirmations, and the recorded user.

use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

use bigchat_sync::settings::Tokens;
use bigchat_sync::user;
use serde_json::{Value, json};

use crate::harness::Bench;
use crate::harness::journal::failed_messages;
use crate::harness::process::{fed, finished, program};
use crate::harness::web::{TOKEN, client, console_token};

/// A journal with four failed events, two for each of two reasons; both APIs are down.
async fn four_failed() -> Bench {
    let bench = Bench::unreachable();
    bench.once().await;
    bench.execute(&failed_messages(["early", "early", "late", "late"]));
    bench
}

fn failed(bench: &Bench, arguments: &[&str]) -> Command {
    let mut command = bench.program("failed");
    command
        .args(arguments)
        .env_remove("SUDO_USER")
        .env_remove("DOAS_USER");
    command
}

fn done(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test]
async fn discarding_needs_yes_without_terminal() {
    let bench = four_failed().await;
    for (arguments, count) in [
        (&["discard", "--all"][..], 4),
        (&["discard", "--reason", "late"], 2),
        (&["discard", "--reason=early"], 2),
    ] {
        let output = failed(&bench, arguments).output().expect("a process");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
        assert!(text.contains("--yes"), "{text}");
        assert!(text.contains(&format!("discard {count} failed")), "{text}");
        assert_eq!(bench.events("failed"), 4);
    }
    for (arguments, left) in [
        (&["discard", "1"][..], 3),
        (&["retry", "--reason", "early"], 2),
        (&["discard", "--yes", "--all"], 0),
        (&["discard", "--all"], 0),
    ] {
        done(&failed(&bench, arguments).output().expect("a process"));
        assert_eq!(bench.events("failed"), left, "{arguments:?}");
    }
}

/// The question states the number of events.
#[tokio::test]
async fn discarding_asks_on_a_terminal() {
    let bench = four_failed().await;
    for (arguments, answer, count, left) in [
        ("discard --all", "n\n", 4, 4),
        ("discard --all", "\n", 4, 4),
        ("discard --reason late", "no\n", 2, 4),
        ("discard --reason late", "y\n", 2, 2),
        ("discard --all", "Yes\n", 2, 0),
    ] {
        // `script` gives the program a terminal.
        let program = program();
        let program = program.get_program().display();
        let line = format!("{program} failed --db={} {arguments}", bench.db().display());
        let mut script = Command::new("script");
        script.args(["-qec", &line, "/dev/null"]);
        let output = fed(&mut script, answer).expect("script, of Debian's bsdutils");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            text.contains(&format!("Discard {count} failed events")),
            "{text}"
        );
        assert_eq!(bench.events("failed"), left, "{arguments} {answer}: {text}");
        assert_eq!(
            output.status.success(),
            answer.to_lowercase().starts_with('y')
        );
    }
}

#[tokio::test]
async fn command_records_its_user() {
    let bench = four_failed().await;
    let own = user::name(rustix::process::getuid().as_raw());
    for (id, variable, expected) in [
        ("1", None, own.clone()),
        (
            "2",
            Some(("SUDO_USER", "ann")),
            format!("{own} (sudo by ann)"),
        ),
        (
            "3",
            Some(("DOAS_USER", "bob")),
            format!("{own} (doas by bob)"),
        ),
        ("4", Some(("SUDO_USER", "")), own.clone()),
    ] {
        let mut retry = failed(&bench, &["retry", id]);
        retry.envs(variable);
        done(&retry.output().expect("a process"));
        // The retried event fails again.
        bench.execute(&format!(
            "INSERT INTO dead_letters (event, conversation, failed_at) VALUES ({id}, 100, 3000)"
        ));
        let shown = done(&failed(&bench, &["show", id]).output().expect("a process"));
        let by = format!("retry by {expected}, command line\n");
        assert!(shown.contains(&by), "{by}: {shown}");
    }
    // As in a database from before users were recorded.
    bench.execute("UPDATE resolutions SET user = NULL WHERE event = 1");
    let shown = done(&failed(&bench, &["show", "1"]).output().expect("a process"));
    assert!(shown.contains("retry by command\n"), "{shown}");
}

/// The response of the console to a process of that user.
async fn asked_by(uid: u32, url: &str, method: &str, path: &str, body: &Value) -> String {
    let (host, port) = url
        .strip_prefix("http://")
        .and_then(|address| address.rsplit_once(':'))
        .expect("an address");
    let body = body.to_string();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nX-Bigchat-Sync: 1\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut bash = Command::new("/bin/bash");
    bash.args([
        "-c",
        "exec 3<>/dev/tcp/$0/$1; printf %s \"$2\" >&3; cat <&3",
        host,
        port,
        &request,
    ])
    .current_dir("/")
    .env_clear()
    .env("PATH", "/bin:/usr/bin")
    .stdin(Stdio::null());
    // Only root can send requests as another user.
    if rustix::process::geteuid().is_root() {
        bash.uid(uid).gid(uid);
    }
    let output = finished(bash).await;
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Without a token, only the daemon's own user can resolve failed events in the console.
#[tokio::test]
async fn resolution_without_console_token() {
    let bench = four_failed().await;
    let (daemon, url) = bench.start_listening(Tokens::default());
    let own = rustix::process::geteuid();
    // Only root can send requests as another user.
    let others = if own.is_root() {
        &[4242, 65_534, 1][..]
    } else {
        &[]
    };
    for uid in others.iter().copied() {
        let read = asked_by(uid, &url, "GET", "/api/failed", &json!(null)).await;
        assert!(read.starts_with("HTTP/1.1 200"), "{uid}: {read}");
        for (path, which) in [
            ("/api/failed/discard", json!({"all": true})),
            ("/api/failed/discard", json!({"ids": [1]})),
            ("/api/failed/retry", json!({"reason": "late"})),
        ] {
            let answer = asked_by(uid, &url, "POST", path, &which).await;
            assert!(answer.starts_with("HTTP/1.1 403"), "{uid}: {answer}");
            assert!(
                answer.contains("BIGCHAT_SYNC_CONSOLE_TOKEN_FILE"),
                "{answer}"
            );
            assert!(answer.contains(&user::name(uid)), "{answer}");
        }
    }
    assert_eq!(bench.events("failed"), 4);
    let which = json!({"ids": [1]});
    let answer = asked_by(own.as_raw(), &url, "POST", "/api/failed/discard", &which).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let log = asked_by(own.as_raw(), &url, "GET", "/api/resolutions", &json!(null)).await;
    let by = format!("\"by\":\"{}, console\"", user::name(own.as_raw()));
    assert!(log.contains(&by), "{by}: {log}");
    daemon.stop().await;
}

#[tokio::test]
async fn console_records_token_and_address() {
    let bench = four_failed().await;
    let (daemon, url) = bench.start_listening(console_token());
    let client = client();
    for (decision, which) in [
        ("discard", json!({"ids": [1]})),
        ("retry", json!({"reason": "late"})),
        ("discard", json!({"all": true})),
    ] {
        let post = client.post(format!("{url}/api/failed/{decision}"));
        let post = post.header("x-bigchat-sync", "1").json(&which);
        let answer = post.bearer_auth(TOKEN).send().await.expect("an answer");
        assert!(answer.status().is_success(), "{decision} {which}");
    }
    let log = client.get(format!("{url}/api/resolutions"));
    let log = log.bearer_auth(TOKEN).send().await.expect("an answer");
    let log: Value = log.json().await.expect("JSON");
    let rows = log["rows"].as_array().expect("rows");
    assert!(rows.len() >= 4, "{log}");
    for row in rows {
        assert_eq!(row["by"], "token holder at 127.0.0.1, console");
    }
    daemon.stop().await;
}
