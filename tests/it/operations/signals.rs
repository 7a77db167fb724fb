//! Signals: SIGHUP reloads the token files, a closed terminal stops the daemon cleanly, and a SIGTERM that `timeout`
//! sends twice counts once.

use crate::harness::process::{Process, STOPS_WITHIN, Signal, free_address, terminal, through};
use crate::harness::web::client;
use crate::harness::{Bench, Test, run_live_test, run_test, side_by_side, until};
use bigchat_sync::simulator::event::message;

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const OLD: &str = "the-old-token-of-the-test";
const NEW: &str = "the-new-token-of-the-test";

const APIS: [(&str, &str); 2] = [("BIGCHAT", "bigchat"), ("OUR_API", "our-api")];

fn write(directory: &Path, name: &str, token: &str) {
    std::fs::write(directory.join(name), token).expect("a file");
}

/// The tokens of the latest requests to both APIs.
fn sent(t: &Test) -> BTreeSet<Option<String>> {
    let bigchat = t.bigchat.ever_asked("");
    let our_api = t.our_api.ever_asked("");
    let latest = [bigchat.last(), our_api.last()].into_iter().flatten();
    latest
        .map(|asked| asked.request.authorization.clone())
        .collect()
}

fn only(token: &str) -> BTreeSet<Option<String>> {
    BTreeSet::from([Some(format!("Bearer {token}"))])
}

/// Reports another message, and waits until it is delivered and the latest requests to both APIs have this token.
async fn delivers_with(t: &Test, token: &str) {
    let delivered = t.our_api.message_count();
    let text = format!("message {delivered}");
    t.bigchat.reports([message(
        42,
        5 + i64::try_from(delivered).expect("few"),
        &text,
    )]);
    until(&format!("{text} is delivered with {token}"), async || {
        t.our_api.message_count() > delivered && sent(t) == only(token)
    })
    .await;
}

/// New tokens are used without a restart. A bad one is rejected, and the old one stays in use.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rotated_token_files() {
    // With files that variables name, and with files that systemd passes.
    side_by_side([false, true], async |systemd| {
        run_test(async |t| {
            let tokens = tempfile::tempdir().expect("a directory");
            let tokens = tokens.path();
            let mut run = t.program("run");
            let names: Vec<String> = APIS
                .iter()
                .map(|(variable, credential)| {
                    let name = format!("bigchat-sync.{credential}-token");
                    write(tokens, &name, OLD);
                    run.env_remove(format!("BIGCHAT_SYNC_{variable}_TOKEN"));
                    if !systemd {
                        let variable = format!("BIGCHAT_SYNC_{variable}_TOKEN_FILE");
                        run.env(variable, tokens.join(&name));
                    }
                    name
                })
                .collect();
            if systemd {
                run.env("CREDENTIALS_DIRECTORY", tokens);
            }
            let daemon = Process::start_as(t, run);
            delivers_with(t, OLD).await;

            // Bad tokens are rejected, each with an error, and the old ones stay.
            for (bad, reloads) in [("", 1), ("two words", 2), ("\u{e4}", 3)] {
                for name in &names {
                    write(tokens, name, bad);
                }
                daemon.signal(Signal::HUP);
                daemon
                    .until_logged_times("the old one stays in use", reloads * names.len())
                    .await;
                delivers_with(t, OLD).await;
            }
            for name in &names {
                std::fs::remove_file(tokens.join(name)).expect("a file");
            }
            daemon.signal(Signal::HUP);
            daemon
                .until_logged_times("the old one stays in use", 4 * names.len())
                .await;
            delivers_with(t, OLD).await;

            for name in &names {
                write(tokens, name, &format!("{NEW}\n"));
            }
            daemon.signal(Signal::HUP);
            daemon
                .until_logged_times("the new token is in use", names.len())
                .await;
            delivers_with(t, NEW).await;
            let log = daemon.log();
            assert!(!log.contains(OLD) && !log.contains(NEW), "{log}");
            assert!(daemon.stop().await.success());
        })
        .await;
    })
    .await;
}

/// SIGHUP does not change tokens in the environment, and the daemon continues.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sighup_with_tokens_in_environment() {
    run_test(async |t| {
        let mut run = t.program("run");
        run.env("BIGCHAT_SYNC_BIGCHAT_TOKEN", OLD)
            .env("BIGCHAT_SYNC_OUR_API_TOKEN", OLD);
        let daemon = Process::start_as(t, run);
        delivers_with(t, OLD).await;
        for times in 1..4 {
            daemon.signal(Signal::HUP);
            daemon
                .until_logged_times("no token has changed", times)
                .await;
            delivers_with(t, OLD).await;
        }
        assert!(daemon.stop().await.success());
    })
    .await;
}

/// The console accepts only the new token, and sessions of the old one end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rotated_console_token() {
    run_live_test(async |t| {
        let address = free_address();
        t.set("--listen", &address);
        write(t.directory(), "console", OLD);
        let mut run = t.program("run");
        let file = t.directory().join("console");
        run.env("BIGCHAT_SYNC_CONSOLE_TOKEN_FILE", &file)
            .env_remove("BIGCHAT_SYNC_CONSOLE_TOKEN");
        let daemon = Process::start_as(t, run);
        let client = client();
        let status = async |header: [(&str, String); 2]| {
            let mut request = client.get(format!("http://{address}/api/status"));
            for (name, value) in header {
                request = request.header(name, value);
            }
            request
                .send()
                .await
                .map_or(0, |answer| answer.status().as_u16())
        };
        let bearer = |token: &str| {
            [
                ("authorization", format!("Bearer {token}")),
                ("x-bigchat-sync", "1".into()),
            ]
        };
        until("it answers", async || status(bearer(OLD)).await == 200).await;
        let login = client
            .post(format!("http://{address}/api/login"))
            .header("x-bigchat-sync", "1")
            .json(&serde_json::json!({ "token": OLD }))
            .send();
        let login = login.await.expect("an answer");
        let cookie = login.headers()["set-cookie"].to_str().expect("text");
        let cookie = cookie.split(';').next().expect("a cookie").to_owned();
        let key: serde_json::Value = login.json().await.expect("JSON");
        let key = key["key"].as_str().expect("a key").to_owned();
        let session = || [("cookie", cookie.clone()), ("x-bigchat-sync", key.clone())];
        assert_eq!(status(session()).await, 200);

        // A token that can be guessed is rejected.
        write(t.directory(), "console", "short");
        daemon.signal(Signal::HUP);
        daemon
            .until_logged_times("the old one stays in use", 1)
            .await;
        assert_eq!(status(session()).await, 200);

        write(t.directory(), "console", NEW);
        daemon.signal(Signal::HUP);
        daemon
            .until_logged_times("the new token is in use", 1)
            .await;
        assert_eq!(status(bearer(NEW)).await, 200);
        assert_eq!(status(bearer(OLD)).await, 401);
        assert_eq!(status(session()).await, 401);
        assert!(daemon.stop().await.success());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stop_while_token_file_hangs() {
    run_live_test(async |t| {
        write(t.directory(), "token", OLD);
        let file = t.directory().join("token");
        let mut run = t.program("run");
        run.env("BIGCHAT_SYNC_OUR_API_TOKEN_FILE", &file)
            .env_remove("BIGCHAT_SYNC_OUR_API_TOKEN");
        let daemon = Process::start_as(t, run);
        t.until_polled().await;
        std::fs::remove_file(&file).expect("a file");
        // Opening a FIFO waits for a writer.
        let made = Command::new("mkfifo").arg(&file).status();
        assert!(made.expect("mkfifo").success());
        daemon.signal(Signal::HUP);
        let cursor = t.cursor();
        until("polling continues", async || t.cursor() > cursor).await;
        assert!(daemon.stop().await.success());
    })
    .await;
}

/// Starts a daemon with its own terminal. Returns the daemon and the other end of the terminal.
fn start_on_a_terminal(t: &Bench, command: &str) -> (Process, File) {
    let (master, slave) = terminal();
    let log = File::create(t.log()).expect("a log");
    // Makes standard input the controlling terminal, and executes the program.
    let mut setsid = through(&["setsid", "--ctty"], &t.program(command));
    setsid
        .stdin(Stdio::from(slave.try_clone().expect("a descriptor")))
        .stdout(Stdio::from(slave))
        .stderr(log);
    (Process::spawn(setsid), master)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closed_terminal_stops_daemon_cleanly() {
    side_by_side(["run", "once"], async |command| {
        run_live_test(async |t| {
            t.bigchat.hold(true);
            t.set("--request-timeout", "60s");
            let (daemon, terminal) = start_on_a_terminal(t, command);
            until("a request", async || t.bigchat.open_requests() > 0).await;
            // As long as the terminal is open, SIGHUP reloads the tokens.
            daemon.signal(Signal::HUP);
            until("polling continues", async || {
                t.logged().contains("no token has changed")
            })
            .await;
            assert!(!t.logged().contains("stopping"));
            drop(terminal);
            until("it stops", async || t.logged().contains("stopping")).await;
            t.bigchat.hold(false);
            let status = daemon.ends_within(STOPS_WITHIN).await;
            assert_eq!(status.code(), Some(0), "{command}: {}", t.logged());
        })
        .await;
    })
    .await;
}

/// A SIGTERM repeated within a second counts once. Any other second SIGTERM or SIGINT ends the daemon immediately.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn second_signal_of_each_kind() {
    let cases = [
        ([Signal::TERM, Signal::TERM], 0, 0),
        ([Signal::TERM, Signal::HUP], 0, 0),
        ([Signal::TERM, Signal::INT], 0, 1),
        ([Signal::INT, Signal::TERM], 0, 1),
        ([Signal::TERM, Signal::TERM], 1100, 1),
        ([Signal::INT, Signal::INT], 300, 1),
    ];
    side_by_side(cases, async |(signals, pause, code)| {
        run_live_test(async |t| {
            t.bigchat.hold(true);
            t.set("--request-timeout", "60s");
            let daemon = Process::start(t);
            until("a request", async || t.bigchat.open_requests() > 0).await;
            daemon.signal(signals[0]);
            daemon.until_logged("stopping").await;
            tokio::time::sleep(Duration::from_millis(pause)).await;
            daemon.signal(signals[1]);
            if code == 1 {
                daemon.until_logged("second signal").await;
            } else {
                t.bigchat.hold(false);
            }
            let status = daemon.ended().await;
            assert_eq!(status.code(), Some(code), "{signals:?} {pause}");
        })
        .await;
    })
    .await;
}
