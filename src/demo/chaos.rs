//! `--chaos`: the daemon as a separate process, which is killed, stopped and started again while both services fail in
//! every way of the plan ([`simulator::chaos`](crate::simulator::chaos)).
//!
//! In the end all faults stop and the daemon runs. Only one kind of difference is excused: events that BigChat reports
//! only once, and sent to a daemon that was killed before it stored them. The journal is read at each kill to find them
//! ([`count_apart`]).

use std::ffi::OsString;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::DemoError;
use crate::domain::event::Event;
use crate::journal::{Journal, Result, Store};
use crate::mutex::lock;
use crate::simulator::chaos::{self, Plan, Strike};
use crate::simulator::compare::count;
use crate::simulator::event::message;
use crate::simulator::{BigChat, Happening, Simulator, Watch};

/// The daemon promises to stop within 10 s. This machine may be busy as well.
const STOPPED_WITHIN: Duration = Duration::from_secs(12);

/// The time limit for anything else.
const SOON: Duration = Duration::from_secs(30);

/// How often a condition is checked.
const CHECK_EVERY: Duration = Duration::from_millis(5);

/// The daemon's settings besides addresses and paths: short intervals, so that much happens, and a time-out shorter
/// than the outages.
const SETTINGS: [&str; 9] = [
    "run",
    "--poll-interval=200ms",
    "--request-timeout=3s",
    "--retry-initial=100ms",
    "--retry-max=2s",
    "--log-format=text",
    "--our-api-concurrency=1",
    "--max-attempts=10",
    "--retention=30d",
];

/// The faults so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Score {
    /// Whether the daemon is running.
    pub up: bool,
    pub kills: usize,
    /// How often the daemon was stopped cleanly.
    pub stops: usize,
    /// How often BigChat has restarted.
    pub restarts: usize,
    /// How often OurAPI has lost data.
    pub losses: usize,
    /// How often a service was down for a while.
    pub outages: usize,
    /// Reported events that never reached the journal, because the daemon was killed before it stored them.
    pub unstored: usize,
    /// Whether all faults have ended, and BigChat has the event whose delivery reveals the latest loss.
    pub calm: bool,
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kills,
            stops,
            restarts,
            losses,
            outages,
            ..
        } = *self;
        write!(
            f,
            "{}, {}, {} of BigChat, {} of OurAPI, {}",
            count(kills, "kill"),
            count(stops, "stop"),
            count(restarts, "restart"),
            if losses == 1 {
                "1 loss".to_owned()
            } else {
                format!("{losses} losses")
            },
            count(outages, "outage"),
        )
    }
}

/// Excludes the events of the latest response from the expected state, if the daemon was killed before it stored them.
/// Events of a stored page stay. Returns how many events were excluded.
///
/// # Errors
///
/// If the journal cannot be read.
pub fn count_apart(bigchat: &mut BigChat, journal: &mut Store) -> Result<usize> {
    let latest = bigchat.latest();
    for reported in &latest {
        // An event that cannot be parsed belongs to no chat.
        if let Ok(event) = Event::parse(&reported.json().to_string())
            && journal.has_event(&event)?
        {
            return Ok(0);
        }
    }
    Ok(if latest.is_empty() {
        0
    } else {
        bigchat.lose_latest()
    })
}

/// The faults, the services and the daemon.
pub(super) struct Chaos {
    pub(super) sim: Arc<Simulator>,
    pub(super) journal: Arc<Journal>,
    pub(super) daemon: Daemon,
    pub(super) seed: u64,
    pub(super) watch: Watch,
    pub(super) score: Arc<Mutex<Score>>,
    /// Cancelled when the demo is asked to stop. The daemon may receive the same signal.
    pub(super) stopping: CancellationToken,
    /// Cancelled when the faults are to end.
    pub(super) enough: CancellationToken,
    /// Cancelled when the daemon is to stop for good.
    pub(super) stop: CancellationToken,
}

impl Chaos {
    /// Runs the faults until they are to end, then the daemon until it is to stop.
    pub(super) async fn run(mut self) -> std::result::Result<(), DemoError> {
        chaos::weather(&self.sim);
        let mut plan = Plan::new(self.seed);
        let mut strike = plan.strike();
        let mut struck = None;
        let mut end = plan.end();
        self.start()?;
        let (mut services_next, mut daemon_next) =
            (Instant::now() + strike.0, Instant::now() + end.after);
        while self.pause(services_next.min(daemon_next)).await? {
            if services_next <= daemon_next {
                services_next = match struck.take() {
                    None => {
                        self.begin(&strike.1).await;
                        struck = Some(());
                        Instant::now() + strike.2
                    }
                    Some(()) => {
                        self.end(&strike.1).await?;
                        strike = plan.strike();
                        Instant::now() + strike.0
                    }
                };
            } else if lock(&self.score).up {
                if end.kill {
                    self.kill().await?;
                } else {
                    self.stop_daemon().await?;
                }
                daemon_next = Instant::now() + end.down;
            } else {
                self.start()?;
                end = plan.end();
                daemon_next = Instant::now() + end.after;
            }
        }
        if struck.is_some() {
            // A fault lasts at least as long as planned.
            sleep(services_next.saturating_duration_since(Instant::now())).await;
            self.end(&strike.1).await?;
        }
        chaos::calm(&self.sim).await?;
        self.report("all is calm again".to_owned());
        if !lock(&self.score).up {
            self.start()?;
        }
        self.touch().await?;
        lock(&self.score).calm = true;
        let stop = self.stop.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            ended = self.daemon.ended() => self.ended_unexpectedly(ended?).await?,
        }
        self.stop_daemon().await
    }

    fn report(&self, what: String) {
        self.watch.report(Some(Happening::Struck(what)));
    }

    /// Waits until a time. Returns false if the faults are to end.
    async fn pause(&mut self, until: Instant) -> std::result::Result<bool, DemoError> {
        let enough = self.enough.clone();
        tokio::select! {
            () = tokio::time::sleep_until(until.into()) => Ok(true),
            () = enough.cancelled() => Ok(false),
            ended = self.daemon.ended() => {
                self.ended_unexpectedly(ended?).await?;
                Ok(!self.enough.is_cancelled())
            }
        }
    }

    /// Handles an end of the daemon that was not planned. Only a signal to the whole process group, such as Ctrl-C, may
    /// cause one.
    async fn ended_unexpectedly(
        &mut self,
        status: ExitStatus,
    ) -> std::result::Result<(), DemoError> {
        lock(&self.score).up = false;
        match timeout(SOON / 10, self.stopping.cancelled()).await {
            Ok(()) if status.success() => Ok(()),
            _ => Err(DemoError::DaemonEnded(status)),
        }
    }

    async fn begin(&self, strike: &Strike) {
        strike.begin(&self.sim).await;
        self.report(strike.to_string());
        let mut score = lock(&self.score);
        match strike {
            Strike::Outage(..) | Strike::Refuses(_) => score.outages += 1,
            Strike::BigChatRestarts => {}
            _ => score.losses += 1,
        }
    }

    async fn end(&self, strike: &Strike) -> io::Result<()> {
        strike.end(&self.sim).await?;
        if *strike == Strike::BigChatRestarts {
            lock(&self.score).restarts += 1;
        }
        Ok(())
    }

    fn start(&mut self) -> io::Result<()> {
        self.daemon.start()?;
        self.report("the daemon is started".to_owned());
        lock(&self.score).up = true;
        Ok(())
    }

    async fn kill(&mut self) -> std::result::Result<(), DemoError> {
        self.daemon.kill().await?;
        lock(&self.score).up = false;
        lock(&self.score).kills += 1;
        // After this, the requests that were in flight at the kill have been answered or given up.
        until("BigChat has no open requests", async || {
            self.sim.bigchat.connected() == 0
        })
        .await?;
        let sim = Arc::clone(&self.sim);
        let unstored = self
            .journal
            .with(move |store| count_apart(&mut sim.bigchat.state(), store))
            .await?;
        lock(&self.score).unstored += unstored;
        self.report("the daemon is killed".to_owned());
        Ok(())
    }

    async fn stop_daemon(&mut self) -> std::result::Result<(), DemoError> {
        if lock(&self.score).up {
            self.daemon.stop().await?;
            let mut score = lock(&self.score);
            score.up = false;
            score.stops += 1;
        }
        self.report("the daemon is stopped".to_owned());
        Ok(())
    }

    /// A loss of OurAPI is noticed only when a lost chat is used, which may never happen for the latest loss. So one
    /// more chat is lost and used, and then all known chats are checked.
    async fn touch(&self) -> io::Result<()> {
        let [first, second] = ["the chat with this is lost", "this shows that it is"];
        let chat_with = |text: &str| {
            let our_api = self.sim.our_api.state();
            let data = our_api.data();
            let mut chats = data.chats.iter();
            let chat = chats.find(|chat| {
                let mut messages = data.messages.get(&chat.chat_id).into_iter().flatten();
                messages.any(|message| message.text == text)
            })?;
            Some(chat.external_id.clone())
        };
        let push = |text: &str| {
            let mut bigchat = self.sim.bigchat.state();
            let now = bigchat.now();
            bigchat.push(message(1, now, text));
        };
        push(first);
        let mut chat = None;
        let deadline = Instant::now() + super::CHAOS_TIME_LIMIT;
        while chat.is_none() && Instant::now() < deadline && !self.stop.is_cancelled() {
            sleep(CHECK_EVERY * 10).await;
            chat = chat_with(first);
        }
        if let Some(chat) = chat {
            self.sim.our_api.state().lose_chat(&chat);
            push(second);
        }
        Ok(())
    }
}

async fn until(
    what: &'static str,
    mut condition: impl AsyncFnMut() -> bool,
) -> std::result::Result<(), DemoError> {
    let deadline = Instant::now() + SOON;
    while !condition().await {
        if Instant::now() > deadline {
            return Err(DemoError::Never(what));
        }
        sleep(CHECK_EVERY).await;
    }
    Ok(())
}

/// The daemon as a process. It is killed when this is dropped.
pub(super) struct Daemon {
    program: PathBuf,
    arguments: Vec<OsString>,
    log: PathBuf,
    /// The size of the log when the daemon was started.
    log_before: u64,
    child: Option<Child>,
}

impl Daemon {
    /// This program as a daemon between these services, with the database `db`. It logs to the file `log`.
    pub(super) fn new(
        sim: &Simulator,
        db: &Path,
        listen: SocketAddr,
        log: PathBuf,
    ) -> io::Result<Self> {
        let mut arguments = SETTINGS.map(OsString::from).to_vec();
        arguments.push(format!("--bigchat-url={}", sim.bigchat.url()).into());
        arguments.push(format!("--our-api-url={}", sim.our_api.url()).into());
        arguments.extend(["--db".into(), db.into()]);
        arguments.push(format!("--listen={listen}").into());
        Ok(Self {
            program: std::env::current_exe()?,
            arguments,
            log,
            log_before: 0,
            child: None,
        })
    }

    fn start(&mut self) -> io::Result<()> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)?;
        self.log_before = log.metadata()?.len();
        let mut command = Command::new(&self.program);
        let ours = std::env::vars_os().map(|(name, _)| name);
        for name in ours.filter(|name| name.to_string_lossy().starts_with("BIGCHAT_SYNC_")) {
            command.env_remove(name);
        }
        command
            .args(&self.arguments)
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true);
        self.child = Some(command.spawn()?);
        Ok(())
    }

    /// Waits for the daemon's end; pending if there is no daemon.
    async fn ended(&mut self) -> io::Result<ExitStatus> {
        match &mut self.child {
            Some(child) => child.wait().await,
            None => std::future::pending().await,
        }
    }

    /// Sends SIGKILL.
    async fn kill(&mut self) -> io::Result<()> {
        match self.child.take() {
            Some(mut child) => child.kill().await,
            None => Ok(()),
        }
    }

    /// Sends SIGTERM. Any result except exit code 0 in time is an error.
    async fn stop(&mut self) -> std::result::Result<(), DemoError> {
        // The daemon does not handle signals until its log says that it is running.
        until("the daemon's log says that it is running", async || {
            self.has_started().unwrap_or(false)
        })
        .await?;
        let Some(mut child) = self.child.take() else {
            return Ok(());
        };
        if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
            kill_process(pid, Signal::TERM).map_err(io::Error::from)?;
        }
        match timeout(STOPPED_WITHIN, child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(status) => Err(DemoError::DaemonEnded(status?)),
            Err(_) => Err(DemoError::Never("the daemon stops when it is asked to")),
        }
    }

    fn has_started(&self) -> io::Result<bool> {
        let mut log = File::open(&self.log)?;
        log.seek(SeekFrom::Start(self.log_before))?;
        let mut text = String::new();
        log.read_to_string(&mut text)?;
        Ok(text.contains(" is running"))
    }
}
