//! One harness for all: a daemon that is run and stopped as a signal would stop it, over a database of its own, and
//! conditions that are waited for instead of time.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use bigchat_sync::cli::{Cli, Command};
use bigchat_sync::daemon::{self, DaemonError, Onlookers};
use bigchat_sync::failed::{self, FailedError};
use bigchat_sync::journal::{FailedEvent, Store};
use bigchat_sync::settings::{Settings, Tokens};
use bigchat_sync::web::Door;
use clap::Parser;
use futures_util::future::join_all;
use rusqlite::types::FromSql;
use serde_json::Value;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How long anything may take before the test fails. Long, since the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `condition` holds.
pub(crate) async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Runs a test for each case, all of them side by side.
pub(crate) async fn side_by_side<C>(cases: impl IntoIterator<Item = C>, test: impl AsyncFn(C)) {
    join_all(cases.into_iter().map(|case| test(case))).await;
}

/// Two URLs, a database, and the settings to run a daemon with.
pub(crate) struct Bench {
    directory: TempDir,
    flags: Vec<String>,
}

impl Bench {
    /// A fresh database, quick polls and retries.
    pub(crate) fn new(bigchat_url: &str, our_api_url: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let mut bench = Self {
            directory,
            flags: Vec::new(),
        };
        let db = bench.db().display().to_string();
        for (flag, value) in [
            ("--bigchat-url", bigchat_url),
            ("--our-api-url", our_api_url),
            ("--db", &db),
            ("--poll-interval", "50ms"),
            ("--retry-initial", "20ms"),
            ("--retry-max", "200ms"),
            ("--listen", "off"),
        ] {
            bench = bench.set(flag, value);
        }
        bench
    }

    /// Sets one more flag, or sets it otherwise.
    pub(crate) fn set(mut self, flag: &str, value: &str) -> Self {
        self.flags
            .retain(|set| !set.starts_with(&format!("{flag}=")));
        self.flags.push(format!("{flag}={value}"));
        self
    }

    /// Where the database is.
    pub(crate) fn db(&self) -> PathBuf {
        self.directory.path().join("journal.db")
    }

    /// Where the database and all its files are.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The settings.
    pub(crate) fn settings(&self) -> Settings {
        let flags = std::iter::once("bigchat-sync").chain(self.flags.iter().map(String::as_str));
        Cli::try_parse_from(flags).expect("good flags").settings
    }

    /// The program as a process of its own, with these settings.
    pub(crate) fn program(&self, command: &str) -> std::process::Command {
        let mut program = std::process::Command::new(env!("CARGO_BIN_EXE_bigchat-sync"));
        program.arg(command).args(&self.flags).stdin(Stdio::null());
        program
    }

    /// Starts a daemon as a process of its own.
    pub(crate) fn spawn(&self) -> Process {
        let mut daemon = self.program("run");
        daemon.stdout(Stdio::null()).stderr(Stdio::null());
        Process(daemon.spawn().expect("a process"))
    }

    /// Starts a daemon.
    pub(crate) fn start(&self) -> Daemon {
        self.start_with(Tokens::default())
    }

    /// Starts a daemon with bearer tokens.
    pub(crate) fn start_with(&self, tokens: Tokens) -> Daemon {
        let stopping = CancellationToken::new();
        let task = tokio::spawn(daemon::run(
            self.settings(),
            tokens,
            Onlookers::default(),
            stopping.clone(),
        ));
        Daemon { stopping, task }
    }

    /// Starts a daemon that listens as well, on a free port, and tells where.
    pub(crate) fn start_listening(&self, tokens: Tokens) -> (Daemon, String) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("its address"));
        let (stopping, door) = (CancellationToken::new(), Some(Door::Open(listener)));
        let daemon = daemon::run_at(
            door,
            self.settings(),
            tokens,
            Onlookers::default(),
            stopping.clone(),
        );
        let task = tokio::spawn(daemon);
        (Daemon { stopping, task }, url)
    }

    /// Polls once, delivers what is due, and ends, in the background: with what stops it.
    pub(crate) fn start_once(&self) -> (CancellationToken, JoinHandle<Result<(), DaemonError>>) {
        let stopping = CancellationToken::new();
        let once = daemon::once(
            self.settings(),
            Tokens::default(),
            Onlookers::default(),
            stopping.clone(),
        );
        (stopping, tokio::spawn(once))
    }

    /// Up to which BigChat was read, in Unix seconds.
    pub(crate) fn cursor(&self) -> Option<i64> {
        self.is_ready()
            .then(|| self.value("SELECT cursor FROM poll_state"))
            .flatten()
    }

    /// Polls once, delivers what is due, and ends, with all of it done or not.
    pub(crate) async fn once(&self) {
        let (_stopping, once) = self.start_once();
        let ended = timeout(PATIENCE, once).await.expect("it ends");
        match ended.expect("no panic") {
            Ok(()) | Err(DaemonError::Unread | DaemonError::Undelivered(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }

    /// One value from the database, by SQL.
    pub(crate) fn value<T: FromSql>(&self, sql: &str) -> T {
        let connection = rusqlite::Connection::open(self.db()).expect("a database");
        connection.busy_timeout(PATIENCE).expect("a busy timeout");
        connection.query_row(sql, [], |row| row.get(0)).expect(sql)
    }

    /// Changes the database, by SQL, while no daemon runs.
    pub(crate) fn execute(&self, sql: &str) {
        let connection = rusqlite::Connection::open(self.db()).expect("a database");
        connection.execute_batch(sql).expect(sql);
    }

    /// How many events are in a state: waiting, delivered, failed or discarded.
    pub(crate) fn events(&self, state: &str) -> i64 {
        self.value(&format!(
            "SELECT count(*) FROM event_states WHERE state = '{state}'"
        ))
    }

    /// Waits until so many events are in a state.
    pub(crate) async fn until_events(&self, state: &str, count: i64) {
        until(&format!("{count} events {state}"), async || {
            self.is_ready() && self.events(state) == count
        })
        .await;
    }

    /// Whether the daemon has made the database.
    pub(crate) fn is_ready(&self) -> bool {
        self.db().exists()
            && self.value::<i64>("SELECT count(*) FROM sqlite_master WHERE name = 'control'") == 1
    }

    /// Runs `bigchat-sync failed` with those arguments, beside whatever runs.
    pub(crate) fn failed_command(&self, arguments: &[&str]) -> Result<String, FailedError> {
        let line = ["bigchat-sync", "failed"].iter().chain(arguments);
        match Cli::try_parse_from(line).expect("a good command").command {
            Some(Command::Failed(command)) => failed::run(&self.db(), command),
            other => panic!("not about failed events: {other:?}"),
        }
    }

    /// How things stand, as `bigchat-sync status --json` tells, and whether it says that all is well by its exit code.
    pub(crate) fn status(&self) -> (Value, bool) {
        let output = self.program("status").arg("--json").output();
        let output = output.expect("a process");
        let status = serde_json::from_slice(&output.stdout);
        (status.expect("JSON"), output.status.success())
    }

    /// The failed events.
    pub(crate) fn failed(&self) -> Vec<FailedEvent> {
        let mut store = Store::open_beside(&self.db()).expect("a database");
        store.failed(1000).expect("the failed events")
    }
}

/// SQL for a dead letter: an event whose delivery has failed so often. Its conversation is SQL, too.
pub(crate) fn dead_letter(
    id: impl Display,
    conversation: impl Display,
    kind: &str,
    data: &str,
    reason: &str,
    attempts: u32,
) -> String {
    let data = data.replace('\'', "''");
    format!(
        "INSERT INTO events (id, conversation, kind, event_at, data, fingerprint, received_at)
         VALUES ({id}, {conversation}, '{kind}', 1795384800, '{data}', {id}, 1000);
         INSERT INTO attempts (event, conversation, attempts, counted, reason, request, response)
         SELECT id, conversation, {attempts}, 0, '{reason}', '', '' FROM events WHERE id = {id};
         INSERT INTO dead_letters (event, conversation, failed_at)
         SELECT id, conversation, 2000 FROM events WHERE id = {id};"
    )
}

/// A process that does not outlive its test: dropped, it is killed. A daemon left behind would go on asking ports that
/// belong to other tests by then.
pub(crate) struct Process(pub(crate) Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// A running daemon.
pub(crate) struct Daemon {
    stopping: CancellationToken,
    task: JoinHandle<Result<(), DaemonError>>,
}

impl Daemon {
    /// Stops it as a signal would, and expects it to end well.
    pub(crate) async fn stop(self) {
        self.outcome().await.expect("it stops well");
    }

    /// Stops it as a signal would, and tells how it ended.
    pub(crate) async fn outcome(self) -> Result<(), DaemonError> {
        self.stopping.cancel();
        let ended = timeout(PATIENCE, self.task).await.expect("it ends");
        ended.expect("no panic")
    }

    /// Ends it in the middle of whatever it is doing, as a crash would, and waits until it has let go of the database.
    pub(crate) async fn crash(self, bench: &Bench) {
        self.task.abort();
        self.task.await.expect_err("it was running");
        until("the database is free", async || {
            Store::open(&bench.db()).is_ok()
        })
        .await;
    }
}
