//! `--chaos`: the daemon as a process of its own, which is killed, stopped and started again while both services fail in
//! every way the plan ([`simulator::chaos`](crate::simulator::chaos)) has.
//!
//! In the end all is calm, the daemon runs, and there is nothing to excuse a difference but one thing: what a BigChat
//! that tells everything once had answered when the daemon was killed, before the daemon had kept it. Whether it had, is
//! looked up in the journal at each kill ([`count_apart`]).

use std::ffi::OsString;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::DemoError;
use crate::domain::event::Event;
use crate::journal::{Journal, Result, Store};
use crate::simulator::chaos::{self, Plan, Strike};
use crate::simulator::compare::count;
use crate::simulator::event::message;
use crate::simulator::{BigChat, Happening, Simulator, Watch};

/// A daemon that is asked to stop has promised to within 10 s; this machine may be busy besides.
const STOPPED_WITHIN: Duration = Duration::from_secs(12);

/// How long anything else may take that needs nobody's patience.
const AT_ONCE: Duration = Duration::from_secs(30);

/// How often it is looked whether something has come about.
const LOOK: Duration = Duration::from_millis(5);

/// The daemon's settings beside where everything is: quick, so that much happens, and with a time-out that outages of
/// seconds reach.
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

/// What has struck so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Score {
    /// The daemon runs.
    pub up: bool,
    /// How often it was killed.
    pub kills: usize,
    /// How often it was stopped, and did in good order.
    pub stops: usize,
    /// How often BigChat has restarted.
    pub restarts: usize,
    /// How often OurAPI has lost something.
    pub losses: usize,
    /// How often either service was out of order for a while.
    pub outages: usize,
    /// Events told that never reached the journal, since the daemon was killed before it could keep them.
    pub unstored: usize,
    /// All is calm, and every loss has been touched.
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

/// Takes what the latest answer reported out of what the daemon is to have, if the daemon, which was killed, had not stored
/// it: of a page that was stored, all is there. Returns how many events that were.
///
/// # Errors
///
/// When the journal cannot be read.
pub fn count_apart(bigchat: &mut BigChat, journal: &mut Store) -> Result<usize> {
    let latest = bigchat.latest();
    for reported in &latest {
        // What cannot be understood makes no chat.
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

/// All that strikes, and what it strikes.
pub(super) struct Chaos {
    pub(super) sim: Arc<Simulator>,
    pub(super) journal: Arc<Journal>,
    pub(super) daemon: Daemon,
    pub(super) seed: u64,
    pub(super) watch: Watch,
    pub(super) score: Arc<Mutex<Score>>,
    /// Cancelled when the demo was asked to stop, which whoever asked may have asked the daemon, too.
    pub(super) stopping: CancellationToken,
    /// Cancelled when there has been enough of it.
    pub(super) enough: CancellationToken,
    /// Cancelled when the daemon is to stop for good.
    pub(super) stop: CancellationToken,
}

impl Chaos {
    /// Lets everything strike until there has been enough; then runs the daemon until it is to stop.
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
            } else if self.score().up {
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
            // No shorter than planned.
            sleep(services_next.saturating_duration_since(Instant::now())).await;
            self.end(&strike.1).await?;
        }
        chaos::calm(&self.sim).await?;
        self.say("all is calm again".to_owned());
        if !self.score().up {
            self.start()?;
        }
        self.touch().await?;
        self.score().calm = true;
        let stop = self.stop.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            ended = self.daemon.ended() => self.ended_by_itself(ended?).await?,
        }
        self.stop_daemon().await
    }

    fn score(&self) -> MutexGuard<'_, Score> {
        self.score.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, what: String) {
        self.watch.report(Some(Happening::Struck(what)));
    }

    /// Waits until then. False: there has been enough.
    async fn pause(&mut self, until: Instant) -> std::result::Result<bool, DemoError> {
        let enough = self.enough.clone();
        tokio::select! {
            () = tokio::time::sleep_until(until.into()) => Ok(true),
            () = enough.cancelled() => Ok(false),
            ended = self.daemon.ended() => {
                self.ended_by_itself(ended?).await?;
                Ok(!self.enough.is_cancelled())
            }
        }
    }

    /// It never does, unless somebody has stopped all of us at once, as Ctrl-C does.
    async fn ended_by_itself(&mut self, status: ExitStatus) -> std::result::Result<(), DemoError> {
        self.score().up = false;
        match timeout(AT_ONCE / 10, self.stopping.cancelled()).await {
            Ok(()) if status.success() => Ok(()),
            _ => Err(DemoError::FetchEnd(status)),
        }
    }

    async fn begin(&self, strike: &Strike) {
        strike.begin(&self.sim).await;
        self.say(strike.to_string());
        let mut score = self.score();
        match strike {
            Strike::Outage(..) | Strike::Refuses(_) => score.outages += 1,
            Strike::BigChatRestarts => {}
            _ => score.losses += 1,
        }
    }

    async fn end(&self, strike: &Strike) -> io::Result<()> {
        strike.end(&self.sim).await?;
        if *strike == Strike::BigChatRestarts {
            self.score().restarts += 1;
        }
        Ok(())
    }

    fn start(&mut self) -> io::Result<()> {
        self.daemon.start()?;
        self.say("the daemon is started".to_owned());
        self.score().up = true;
        Ok(())
    }

    async fn kill(&mut self) -> std::result::Result<(), DemoError> {
        self.daemon.kill().await?;
        self.score().up = false;
        self.score().kills += 1;
        // What was on its way when it was killed is answered, or given up, by now.
        until("BigChat has nobody to answer", async || {
            self.sim.bigchat.connected() == 0
        })
        .await?;
        let sim = Arc::clone(&self.sim);
        let unstored = self
            .journal
            .with(move |store| count_apart(&mut sim.bigchat.state(), store))
            .await?;
        self.score().unstored += unstored;
        self.say("the daemon is killed".to_owned());
        Ok(())
    }

    async fn stop_daemon(&mut self) -> std::result::Result<(), DemoError> {
        if self.score().up {
            self.daemon.stop().await?;
            let mut score = self.score();
            score.up = false;
            score.stops += 1;
        }
        self.say("the daemon is stopped".to_owned());
        Ok(())
    }

    /// A loss of OurAPI is noticed once something touches what is lost, which may never happen again to what was lost
    /// last. So one more chat is lost, and touched: all that is known is looked for then.
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
        let deadline = Instant::now() + super::CHAOS_PATIENCE;
        while chat.is_none() && Instant::now() < deadline && !self.stop.is_cancelled() {
            sleep(LOOK * 10).await;
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
    let deadline = Instant::now() + AT_ONCE;
    while !condition().await {
        if Instant::now() > deadline {
            return Err(DemoError::Never(what));
        }
        sleep(LOOK).await;
    }
    Ok(())
}

/// The daemon as a process, which never outlives this.
pub(super) struct Daemon {
    program: PathBuf,
    arguments: Vec<OsString>,
    log: PathBuf,
    /// How long the log was when it was started.
    log_before: u64,
    child: Option<Child>,
}

impl Daemon {
    /// This same program between these services, over a database; it logs to a file beside it.
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

    /// Ends as it ends by itself; never, if there is none.
    async fn ended(&mut self) -> io::Result<ExitStatus> {
        match &mut self.child {
            Some(child) => child.wait().await,
            None => std::future::pending().await,
        }
    }

    /// SIGKILL.
    async fn kill(&mut self) -> io::Result<()> {
        match self.child.take() {
            Some(mut child) => child.kill().await,
            None => Ok(()),
        }
    }

    /// SIGTERM, and nothing but exit code 0 in time is right.
    async fn stop(&mut self) -> std::result::Result<(), DemoError> {
        // Before, a signal does what it does to any process.
        until("the daemon says that it runs", async || {
            self.says_that_it_runs().unwrap_or(false)
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
            Ok(status) => Err(DemoError::FetchEnd(status?)),
            Err(_) => Err(DemoError::Never("the daemon stops when it is asked to")),
        }
    }

    fn says_that_it_runs(&self) -> io::Result<bool> {
        let mut log = File::open(&self.log)?;
        log.seek(SeekFrom::Start(self.log_before))?;
        let mut text = String::new();
        log.read_to_string(&mut text)?;
        Ok(text.contains(" is running"))
    }
}
