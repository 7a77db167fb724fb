//! The test harness. [`run_test`] owns both services, the database and the daemons that a test starts, and checks the
//! final state.
//!
//! A test scripts BigChat's events and the faults, and checks what OurAPI has. Afterwards, the harness stops the
//! daemons that are still running, as a signal would. Unless the test allows something else, OurAPI must then have
//! exactly what BigChat reported, no event may be waiting, and only events that OurAPI cannot store may have failed. A
//! failed test prints the expected and the actual state, and the daemon's log.

pub(crate) mod browser;
pub(crate) mod journal;
pub(crate) mod process;
pub(crate) mod services;
pub(crate) mod web;

use std::cell::RefCell;
use std::io::Write;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bigchat_sync::cli::Cli;
use bigchat_sync::console::Listener;
use bigchat_sync::daemon::{self, DaemonError, Observers};
use bigchat_sync::journal::Store;
use bigchat_sync::settings::{Settings, Tokens};
use bigchat_sync::simulator::bigchat::{Clock, Options};
use bigchat_sync::simulator::compare::{Report, Rules};
use bigchat_sync::simulator::fault::Fault;
use bigchat_sync::simulator::{self, ANY_PORT, Starting};
use clap::Parser;
use futures_util::future::join_all;
use serde_json::Value;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::subscriber::DefaultGuard;

use self::services::{BigChat, NOW, OurApi, Tampered, tampering};

/// The time limit for every wait. It is long because the machine may be busy.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// Waits until `condition` is true.
pub(crate) async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + TIME_LIMIT;
    while !condition().await {
        assert!(
            Instant::now() < deadline,
            "not within {TIME_LIMIT:?}: {what}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Runs a test for each case, all of them concurrently.
pub(crate) async fn side_by_side<C>(cases: impl IntoIterator<Item = C>, test: impl AsyncFn(C)) {
    join_all(cases.into_iter().map(|case| test(case))).await;
}

/// Runs a test in which only scripted events happen, and BigChat's clock is stopped at [`NOW`]. BigChat knows
/// conversations 1 (its first), 42 and 43, all with advisor 7 (Ann), and also advisor 8 (Bob).
pub(crate) async fn run_test(test: impl AsyncFnOnce(&Test)) {
    let options = Options {
        quiet: true,
        clock: Clock::Still(NOW),
        ..Options::default()
    };
    let bigchat = simulator::BigChat::new(options);
    let t = Test::new(bigchat, simulator::OurApi::new(1).in_order()).await;
    {
        let mut bigchat = t.bigchat.state();
        bigchat.open(1, -3600, 7);
        bigchat.open(42, 0, 7);
        bigchat.open(43, 1, 7);
        bigchat.set_advisor(7, "Ann", "ann@x.test");
        bigchat.set_advisor(8, "Bob", "bob@x.test");
    }
    t.run(test).await;
}

/// The same with this machine's clock. BigChat knows only its first conversation and its ten advisors.
pub(crate) async fn run_live_test(test: impl AsyncFnOnce(&Test)) {
    let options = Options {
        quiet: true,
        ..Options::default()
    };
    run_with(options, test).await;
}

/// Runs a test with these options for BigChat, and an OurAPI that is as fragile as the real one.
pub(crate) async fn run_with(bigchat: Options, test: impl AsyncFnOnce(&Test)) {
    let bigchat = simulator::BigChat::new(bigchat);
    let t = Test::new(bigchat, simulator::OurApi::new(1)).await;
    t.run(test).await;
}

/// Both services, a database, and the daemons between them.
pub(crate) struct Test {
    pub(crate) bigchat: BigChat,
    pub(crate) our_api: OurApi,
    bench: Bench,
    rules: RefCell<Rules>,
    /// Why OurAPI may differ from the expected state in the end. `None`: it must not differ.
    differs: RefCell<Option<&'static str>>,
    /// Why a fault may meet no request. `None`: each must meet one, or else the test does not show what it claims.
    unmet: RefCell<Option<&'static str>>,
    /// How many events have failed in the end although OurAPI could have stored them.
    failed: RefCell<usize>,
}

impl Deref for Test {
    type Target = Bench;

    fn deref(&self) -> &Bench {
        &self.bench
    }
}

impl Test {
    pub(crate) async fn new(bigchat: simulator::BigChat, our_api: simulator::OurApi) -> Self {
        let mut starting = Starting::new().expect("a thread");
        let bigchat = starting.listen(ANY_PORT, bigchat).await.expect("a port");
        let our_api = starting.listen(ANY_PORT, our_api).await.expect("a port");
        Self {
            bench: Bench::new(&bigchat.url(), &our_api.url()),
            bigchat: BigChat(bigchat),
            our_api: OurApi::new(our_api),
            rules: RefCell::default(),
            differs: RefCell::default(),
            unmet: RefCell::default(),
            failed: RefCell::default(),
        }
    }

    async fn run(self, test: impl AsyncFnOnce(&Self)) {
        Log::begin();
        test(&self).await;
        if self.differs.borrow().is_none() {
            // A running daemon completes its work first.
            let deadline = Instant::now() + TIME_LIMIT;
            while self.is_running() && self.problem().is_some() && Instant::now() < deadline {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        self.bench.stop_daemons().await;
        if self.differs.borrow().is_none()
            && let Some(problem) = self.problem()
        {
            panic!("{problem}");
        }
        let unmet = [self.bigchat.unmet(), self.our_api.unmet()].concat();
        assert!(
            unmet.is_empty() || self.unmet.borrow().is_some(),
            "no request has met the faults of {unmet:?}"
        );
    }

    /// Allows OurAPI to differ from the expected state in the end, for this reason.
    pub(crate) fn differs(&self, why: &'static str) {
        self.differs.replace(Some(why));
    }

    /// Allows faults that meet no request, for this reason.
    pub(crate) fn unmet(&self, why: &'static str) {
        self.unmet.replace(Some(why));
    }

    /// Expects that this many events have failed in the end, in addition to those that OurAPI cannot store.
    pub(crate) fn fails(&self, count: usize) {
        self.failed.replace(count);
    }

    /// Sets the rules of the comparison.
    pub(crate) fn rules(&self, rules: Rules) {
        self.rules.replace(rules);
    }

    /// Injects this fault into requests to either service that match the pattern.
    pub(crate) fn upset(&self, pattern: &str, fault: Fault) {
        let of_bigchat = ["GET /events", "GET /conversations", "GET /advisors"];
        match of_bigchat.iter().any(|route| pattern.starts_with(route)) {
            true => self.bigchat.upset(pattern, fault),
            false => self.our_api.upset(pattern, fault),
        }
    }

    /// Alters the next `count` pages on their way to the daemon.
    pub(crate) async fn tamper_pages<T: Into<Tampered>>(
        &self,
        count: usize,
        mut tamper: impl FnMut(Vec<u8>) -> T + Send + 'static,
    ) {
        let mut left = count;
        let url = tampering(&self.bigchat.url(), move |line, answer| {
            if left == 0 || !line.starts_with("GET /events") {
                return Tampered::from(answer);
            }
            left -= 1;
            tamper(answer).into()
        })
        .await;
        self.set("--bigchat-url", &url);
    }

    /// Ends all faults of both services.
    pub(crate) fn calm(&self) {
        self.bigchat.calm();
        self.our_api.calm();
    }

    /// The number of requests that are paused, or overdue and not yet carried out.
    pub(crate) fn pausing(&self) -> usize {
        self.bigchat.pausing() + self.our_api.pausing()
    }

    /// Lets paused requests continue.
    pub(crate) fn resume(&self) {
        self.bigchat.resume();
        self.our_api.resume();
    }

    /// BigChat's time, in seconds after 22:00:00.
    pub(crate) fn now(&self) -> i64 {
        self.bigchat.now()
    }

    /// Compares what BigChat reported with what OurAPI has.
    pub(crate) fn compare(&self) -> Report {
        let before = self.our_api.before.lock();
        let rules = Rules {
            before: before.unwrap_or_else(PoisonError::into_inner).clone(),
            ..self.rules.borrow().clone()
        };
        let expected = simulator::compare::expected(&self.bigchat.reported(), &rules);
        simulator::compare::compare(&expected, &self.our_api.data(), &rules)
    }

    /// The first problem with the current state, if there is one.
    fn problem(&self) -> Option<String> {
        let report = self.compare();
        if !report.is_clean() {
            return Some("OurAPI does not have what BigChat reported".to_owned());
        }
        if !self.is_ready() {
            return None;
        }
        let (waiting, failed) = (self.events("waiting"), self.failed().len());
        let discarded = usize::try_from(self.events("discarded")).unwrap_or_default();
        let right = report.refused + *self.failed.borrow();
        if waiting > 0 {
            Some(format!("{waiting} events are still waiting"))
        } else if !(failed..=failed + discarded).contains(&right) {
            Some(format!(
                "{failed} events failed instead of {right}: {:#?}",
                self.failed()
            ))
        } else {
            None
        }
    }

    /// Waits until OurAPI has exactly what BigChat reported and no event is waiting. The comparison alone is not
    /// enough, because the last events may not change OurAPI.
    pub(crate) async fn agrees(&self) {
        until("no difference", async || {
            let report = self.compare();
            let waits = || self.is_ready() && self.events("waiting") > 0;
            report.is_clean() && report.chats() > 0 && !waits()
        })
        .await;
    }

    /// Reports a page of events, waits until the running daemon has delivered them, and returns the requests to OurAPI.
    pub(crate) async fn delivers(&self, events: impl IntoIterator<Item = Value>) -> Vec<String> {
        let events: Vec<Value> = events.into_iter().collect();
        let before = match self.is_ready() {
            true => self.events("delivered"),
            false => 0,
        };
        let count = before + i64::try_from(events.len()).expect("few");
        self.our_api.asked();
        self.bigchat.reports(events);
        self.until_events("delivered", count).await;
        self.our_api.asked()
    }
}

impl Drop for Test {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("expected against actual:\n{}", self.compare());
            println!("log:\n{}{}", Log::take(), self.logged());
        }
    }
}

/// The log of the daemons on this thread.
#[derive(Clone, Copy)]
struct Log;

thread_local! {
    static LOG: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    static GUARD: RefCell<Option<DefaultGuard>> = const { RefCell::new(None) };
}

impl Log {
    /// Starts to capture the log of this thread.
    fn begin() {
        GUARD.with_borrow_mut(|guard| {
            guard.get_or_insert_with(|| {
                let subscriber = tracing_subscriber::fmt().with_ansi(false);
                tracing::subscriber::set_default(subscriber.with_writer(|| Self).finish())
            });
        });
    }

    fn take() -> String {
        let log = LOG.with_borrow_mut(std::mem::take);
        String::from_utf8_lossy(&log).into_owned()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.with_borrow_mut(|log| log.write(bytes))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Two URLs, a database, and the settings to run a daemon with.
pub(crate) struct Bench {
    directory: TempDir,
    flags: Mutex<Vec<String>>,
    daemons: Mutex<Vec<Daemon>>,
}

impl Bench {
    /// A new database, with frequent polls and fast retries.
    pub(crate) fn new(bigchat_url: &str, our_api_url: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let bench = Self {
            directory,
            flags: Mutex::default(),
            daemons: Mutex::default(),
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
            bench.set(flag, value);
        }
        bench
    }

    /// The same with services that cannot be reached.
    pub(crate) fn unreachable() -> Self {
        Self::new("http://127.0.0.1:1", "http://127.0.0.1:2")
    }

    /// Sets a flag, or replaces its value.
    pub(crate) fn set(&self, flag: &str, value: &str) -> &Self {
        let mut flags = lock(&self.flags);
        flags.retain(|set| !set.starts_with(&format!("{flag}=")));
        flags.push(format!("{flag}={value}"));
        drop(flags);
        self
    }

    /// The path of the database.
    pub(crate) fn db(&self) -> PathBuf {
        self.directory.path().join("journal.db")
    }

    /// The directory of the database and all its files.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The log file of daemons in separate processes.
    pub(crate) fn log(&self) -> PathBuf {
        self.directory().join("log")
    }

    /// The log of daemons in separate processes, so far.
    pub(crate) fn logged(&self) -> String {
        let log = std::fs::read(self.log()).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// The settings.
    pub(crate) fn settings(&self) -> Settings {
        let flags = lock(&self.flags).clone();
        let program = std::iter::once("bigchat-sync".to_owned());
        Cli::try_parse_from(program.chain(flags))
            .expect("good flags")
            .settings
    }

    /// The program as a separate process, with these settings.
    pub(crate) fn program(&self, command: &str) -> std::process::Command {
        let mut program = process::program();
        program
            .arg(command)
            .args(&*lock(&self.flags))
            .stdin(Stdio::null());
        program
    }

    /// Starts a daemon.
    pub(crate) fn start(&self) -> Daemon {
        let stopping = CancellationToken::new();
        let task = tokio::spawn(daemon::run(
            self.settings(),
            Tokens::default(),
            Observers::default(),
            stopping.clone(),
        ));
        self.daemon(stopping, task)
    }

    /// Starts a daemon with a console on a free port. Also returns the console's URL.
    pub(crate) fn start_listening(&self, tokens: Tokens) -> (Daemon, String) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("its address"));
        let (stopping, listener) = (CancellationToken::new(), Some(Listener::Open(listener)));
        let daemon = daemon::run_at(
            listener,
            self.settings(),
            tokens,
            Observers::default(),
            stopping.clone(),
        );
        let daemon = self.daemon(stopping, tokio::spawn(daemon));
        (daemon, url)
    }

    fn daemon(&self, stopping: CancellationToken, task: Task) -> Daemon {
        let daemon = Daemon {
            stopping,
            task: Arc::new(Mutex::new(Some(task))),
        };
        lock(&self.daemons).push(daemon.clone());
        daemon
    }

    /// Whether a daemon that was started here is still running.
    fn is_running(&self) -> bool {
        lock(&self.daemons)
            .iter()
            .any(|daemon| lock(&daemon.task).is_some())
    }

    /// Stops the daemons that are still running.
    async fn stop_daemons(&self) {
        let daemons = std::mem::take(&mut *lock(&self.daemons));
        for daemon in daemons {
            if lock(&daemon.task).is_some() {
                daemon.stop().await;
            }
        }
    }

    /// Starts a daemon that polls once, delivers what is due, and ends. Also returns the token that stops it.
    pub(crate) fn start_once(&self) -> (CancellationToken, JoinHandle<Result<(), DaemonError>>) {
        let stopping = CancellationToken::new();
        let once = daemon::once(
            self.settings(),
            Tokens::default(),
            Observers::default(),
            stopping.clone(),
        );
        (stopping, tokio::spawn(once))
    }

    /// Runs such a daemon until it ends. Unread or undelivered events are not an error.
    pub(crate) async fn once(&self) {
        let (_stopping, once) = self.start_once();
        let ended = timeout(TIME_LIMIT, once).await.expect("it ends");
        match ended.expect("no panic") {
            Ok(()) | Err(DaemonError::Unread(_) | DaemonError::Undelivered { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

type Task = JoinHandle<Result<(), DaemonError>>;

/// A number from an environment variable, or else `default`.
pub(crate) fn number<T: FromStr>(variable: &str, default: T) -> T {
    let number = std::env::var(variable).ok();
    number.map_or(default, |number| {
        number.parse().ok().expect("a number in the environment")
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A daemon that runs until its test, or the harness after the test, stops it.
#[derive(Clone)]
pub(crate) struct Daemon {
    stopping: CancellationToken,
    task: Arc<Mutex<Option<Task>>>,
}

impl Daemon {
    /// Stops it as a signal would, and expects that it ends without an error.
    pub(crate) async fn stop(self) {
        self.outcome().await.expect("it stops without an error");
    }

    fn task(&self) -> Task {
        lock(&self.task).take().expect("it was running")
    }

    /// Stops it as a signal would, and returns how it ended.
    pub(crate) async fn outcome(self) -> Result<(), DaemonError> {
        self.stopping.cancel();
        let ended = timeout(TIME_LIMIT, self.task()).await.expect("it ends");
        ended.expect("no panic")
    }

    /// Ends it at any point of its work, as a crash would, and waits until it has closed the database.
    pub(crate) async fn crash(self, bench: &Bench) {
        let task = self.task();
        task.abort();
        task.await.expect_err("it was running");
        until("the database is free", async || {
            Store::open(&bench.db()).is_ok()
        })
        .await;
    }
}
