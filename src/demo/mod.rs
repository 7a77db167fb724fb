//! The demo: the real daemon works over HTTP, between two services that this process simulates. At the end, a
//! comparison that shares no code with the daemon proves the result.
//!
//! It needs nothing and leaves nothing behind: the services listen on free ports, the database is temporary, and
//! settings and tokens in the environment are ignored. It can also only serve the services, for a daemon in another
//! terminal.

mod chaos;
mod mishaps;
mod result;
mod show;
mod tally;

use std::fs::DirBuilder;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::{ExitCode, ExitStatus};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use thiserror::Error;
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::task::JoinError;
use tokio_util::sync::CancellationToken;
use url::Url;
use uuid::Uuid;

use crate::console::Listener;
use crate::daemon::{self, DaemonError, Observers};
use crate::journal::{Journal, JournalError, OpenError, Resolution, Store};
use crate::mutex::lock;
use crate::settings::{DEFAULT_LISTEN, Settings, Tokens, at_least_a_second, number};
use crate::simulator::bigchat::{self, Log, Mode};
use crate::simulator::{BigChat, Happening, OurApi, Simulator, Starting, Watch};
use crate::telemetry::terminal::{Terminal, shown};

use chaos::{Chaos, Daemon};
pub use chaos::{Score, count_apart};
use mishaps::Mishaps;
pub use result::{DemoResult, FailedPolls, Figures, Struck};
use show::{FRAME, Show};
use tally::{Snapshot, Tally};

/// Time between polls: short, because a user is watching.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// The time limit for the last events, once BigChat reports nothing new.
const TIME_LIMIT: Duration = Duration::from_secs(30);

/// The same after chaos, when much may have to be restored.
const CHAOS_TIME_LIMIT: Duration = Duration::from_secs(180);

/// After this time without a request to OurAPI, no more are expected.
const STILL: Duration = Duration::from_secs(20);

/// About the time that the real OurAPI takes for a request.
const LATENCY: Duration = Duration::from_millis(6);

/// The same in chaos, where everything is written again after each loss.
const CHAOS_LATENCY: Duration = Duration::from_millis(1);

/// Active conversations in chaos: few, to leave time for everything else.
const CHAOS_ACTIVE: usize = 8;

/// The ports of the real BigChat and the real OurAPI, which are the defaults of the settings.
const PORTS: [u16; 2] = [8267, 8266];

/// Any free ports.
const FREE_PORTS: [u16; 2] = [0, 0];

/// How long the demo takes.
const DURATION: Duration = Duration::from_secs(30);

/// The same where the operator has something to fix.
const FAULTS_DURATION: Duration = Duration::from_secs(600);

/// The options of the demo.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// How long BigChat reports events; the demo then waits until the last ones are delivered [default: 30s].
    #[arg(long, value_name = "TIME", value_parser = at_least_a_second, allow_hyphen_values = true)]
    pub duration: Option<Duration>,

    /// Seed of the simulated services [default: a random number, which is printed].
    #[arg(long, value_name = "N", value_parser = number::<u64>, allow_hyphen_values = true)]
    pub seed: Option<u64>,

    /// How the simulated BigChat reports events.
    #[arg(long, value_enum, default_value_t = Reporting::Once)]
    pub bigchat: Reporting,

    /// Make everything fail: both services fail in every way they can, while the daemon, as a separate process, is
    /// killed and started again. The comparison at the end is the same.
    #[arg(long)]
    pub chaos: bool,

    /// Make requests fail, some of them permanently. Find the reasons in the console, or with `bigchat-sync status` and
    /// `failed`, and retry or discard the events. Runs for 10 minutes, for --duration, or until Ctrl-C.
    #[arg(long, conflicts_with_all = ["chaos", "serve"])]
    pub faults: bool,

    /// Only serve BigChat on port 8267 and OurAPI on port 8266 until stopped, for a daemon in another terminal.
    #[arg(long, conflicts_with_all = ["duration", "chaos"])]
    pub serve: bool,
}

impl Args {
    fn duration(&self) -> Duration {
        let usual = if self.faults {
            FAULTS_DURATION
        } else {
            DURATION
        };
        self.duration.unwrap_or(usual)
    }
}

/// `--bigchat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Reporting {
    /// Each event once, as the real BigChat does.
    Once,
    /// From a stored log, the same events for the same window, as most vendors do.
    Log,
}

/// Why the demo has no result.
#[derive(Debug, Error)]
pub enum DemoError {
    /// A port is in use or not permitted.
    #[error("the simulated {service} cannot listen on {address}: {source}")]
    Listen {
        service: &'static str,
        address: SocketAddr,
        source: io::Error,
    },
    /// No temporary directory can be made.
    #[error("cannot create {}: {source}", shown(.path))]
    Scratch { path: PathBuf, source: io::Error },
    /// The temporary database cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The temporary database cannot be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The daemon did not start, or stopped with an error.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// The daemon stopped, which it should only do when asked.
    #[error("the daemon stopped unexpectedly")]
    Stopped,
    /// The daemon process ended unexpectedly, or with an error.
    #[error("the daemon ended with {0}")]
    DaemonEnded(ExitStatus),
    /// A condition was not met in time.
    #[error("timed out waiting until {0}")]
    Never(&'static str),
    #[error("the daemon panicked: {0}")]
    Panicked(#[from] JoinError),
    /// Nothing can be shown, or a service cannot be stopped.
    #[error("the demo stopped: {0}")]
    Io(#[from] io::Error),
    /// Stopped by a second signal.
    #[error("interrupted before the comparison")]
    Interrupted,
}

/// Runs the demo, or only serves, until it is over or `stopping` is cancelled. `settings` are those of the daemon,
/// except for addresses and the poll interval. Returns 0 if OurAPI has in the end what BigChat reported, else 1.
/// Dropping the future ends the demo at once and also cleans up.
pub async fn run(
    args: &Args,
    settings: Settings,
    terminal: &Terminal,
    stopping: &CancellationToken,
) -> Result<ExitCode, DemoError> {
    if args.serve {
        serve(args, terminal, stopping).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let result = perform(args, settings, terminal, stopping).await?;
    terminal
        .say(&result.text(terminal.is_interactive()))
        .await?;
    Ok(result.exit_code())
}

/// Serves both services on the addresses of the real ones, until stopped.
async fn serve(
    args: &Args,
    terminal: &Terminal,
    stopping: &CancellationToken,
) -> Result<(), DemoError> {
    let seed = seed(args);
    let sim = start(args, seed, PORTS, Watch::default()).await?;
    terminal.say(&format!(
        "{}\n\nTry in another terminal:\n\n    {} run\n\nWhile no daemon is running (two requests at once corrupt this OurAPI, like the real one):\n\n    curl {}/chats\n\nCtrl-C stops it.",
        services(&sim, args.bigchat, seed),
        mishaps::shell_word(&std::env::current_exe()?.to_string_lossy()),
        sim.our_api.url()
    )).await?;
    sim.bigchat.record(false);
    sim.our_api.record(false);
    stopping.cancelled().await;
    Ok(())
}

async fn perform(
    args: &Args,
    settings: Settings,
    terminal: &Terminal,
    stopping: &CancellationToken,
) -> Result<DemoResult, DemoError> {
    let seed = seed(args);
    let (watcher, happenings) = mpsc::unbounded_channel();
    let watch = Watch::to(watcher);
    let sim = Arc::new(start(args, seed, FREE_PORTS, watch.clone()).await?);
    let scratch = Scratch::new()?;
    let db = scratch.0.join("journal.db");
    // Commands may open the database before the daemon does.
    drop(Store::open(&db)?);
    let journal = Arc::new(Journal::start(Store::open_shared(&db)?)?);
    let duration = args.duration();
    terminal
        .say(&format!(
            "The daemon runs for {} between two simulated services.\n{}",
            humantime::format_duration(duration),
            services(&sim, args.bigchat, seed)
        ))
        .await?;
    let console = console(args.chaos)?;
    let listen = console.local_addr()?;
    terminal
        .say(&format!(
            "Console  http://{listen}/\nCommands in another terminal need --db {}\n",
            mishaps::shell_word(&db.to_string_lossy())
        ))
        .await?;
    let (enough, stop) = (CancellationToken::new(), CancellationToken::new());
    let score = args.chaos.then(Arc::<Mutex<Score>>::default);
    let daemon: Running = match &score {
        Some(score) => {
            drop(console);
            let chaos = Chaos {
                daemon: Daemon::new(&sim, &db, listen, scratch.0.join("daemon.log"))?,
                sim: Arc::clone(&sim),
                journal: Arc::clone(&journal),
                seed,
                watch,
                score: Arc::clone(score),
                stopping: stopping.clone(),
                enough: enough.clone(),
                stop: stop.clone(),
            };
            Box::pin(chaos.run())
        }
        None => {
            let settings = Settings {
                bigchat_url: Url::parse(&sim.bigchat.url()).map_err(io::Error::other)?,
                our_api_url: Url::parse(&sim.our_api.url()).map_err(io::Error::other)?,
                db: Some(db.clone()),
                poll_interval: POLL_INTERVAL,
                ..settings
            };
            let daemon = tokio::spawn(daemon::run_at(
                Some(Listener::Open(console)),
                settings,
                Tokens::default(),
                Observers::default(),
                stop.clone(),
            ));
            Box::pin(async move { Ok(daemon.await??) })
        }
    };
    let mishaps = args
        .faults
        .then(|| Mishaps::new(Arc::clone(&sim), duration));
    if args.faults {
        terminal
            .say(&mishaps::what_to_do(&std::env::current_exe()?, &db))
            .await?;
    }
    let stage = Stage {
        mishaps,
        terminal: terminal.clone(),
        sim,
        journal,
        happenings,
        tally: Tally::new(args.bigchat == Reporting::Log),
        show: Show::new(terminal, duration),
        daemon,
        enough,
        stop,
        score,
        begun: Instant::now(),
    };
    let result = stage.perform(duration, stopping).await;
    if args.chaos && !matches!(&result, Ok(result) if result.is_good()) {
        let path = scratch.keep();
        terminal
            .say(&format!(
                "The daemon's database and log are in {}\n",
                shown(&path)
            ))
            .await?;
    }
    result
}

/// The running daemon, until it has stopped.
type Running = Pin<Box<dyn Future<Output = Result<(), DemoError>>>>;

/// The state of a running demo.
struct Stage {
    sim: Arc<Simulator>,
    journal: Arc<Journal>,
    happenings: UnboundedReceiver<Happening>,
    tally: Tally,
    show: Show,
    daemon: Running,
    /// Cancelled when the chaos is to end.
    enough: CancellationToken,
    /// Cancelled when the daemon is to stop.
    stop: CancellationToken,
    score: Option<Arc<Mutex<Score>>>,
    mishaps: Option<Mishaps>,
    terminal: Terminal,
    begun: Instant,
}

impl Stage {
    async fn perform(
        mut self,
        duration: Duration,
        stopping: &CancellationToken,
    ) -> Result<DemoResult, DemoError> {
        while self.begun.elapsed() < duration && !stopping.is_cancelled() {
            self.frame().await?;
            if let Some(mishaps) = &mut self.mishaps
                && let Some(news) = mishaps.advance(self.begun.elapsed()).await?
            {
                self.terminal.say(news).await?;
            }
        }
        if let Some(mishaps) = self.mishaps.take() {
            mishaps.end().await?;
        }
        self.enough.cancel();
        self.sim.bigchat.state().set_quiet(true);
        self.show.finishing().await?;
        let limit = match self.score {
            Some(_) => CHAOS_TIME_LIMIT,
            None => TIME_LIMIT,
        };
        let (mut quiet_since, mut polls) = (Instant::now(), self.sim.bigchat.state().polls());
        let (mut still_since, mut requests) = (quiet_since, 0);
        while quiet_since.elapsed() < limit && still_since.elapsed() < STILL {
            let snapshot = self.frame().await?;
            if requests != self.tally.requests() || snapshot.waiting > 0 {
                (still_since, requests) = (Instant::now(), self.tally.requests());
            }
            if snapshot.score.is_some_and(|score| !score.calm) {
                (quiet_since, polls) = (Instant::now(), self.sim.bigchat.state().polls());
                still_since = quiet_since;
                continue;
            }
            // After one more poll, the pages of the poll that was in progress have been stored.
            if self.sim.bigchat.state().polls() > polls && snapshot.waiting == 0 {
                let report = self.sim.compare();
                if report.is_clean() && snapshot.failed + snapshot.discarded == report.refused {
                    break;
                }
            }
        }
        self.stop.cancel();
        (&mut self.daemon).await?;
        self.record_happenings();
        let snapshot = self.snapshot().await?;
        let figures = Figures {
            events: self.tally.events(),
            failed_polls: self.tally.failed_polls(),
            requests: self.tally.requests(),
            at_once: snapshot.at_once,
            failed: snapshot.failed + snapshot.discarded,
            waiting: snapshot.waiting,
            chaos: snapshot.score.map(|score| Struck {
                score,
                faults: self.sim.bigchat.injected() + self.sim.our_api.injected(),
                lost: self
                    .sim
                    .bigchat
                    .state()
                    .reported()
                    .iter()
                    .filter(|reported| reported.lost)
                    .count(),
            }),
        };
        Ok(DemoResult::new(self.sim.compare(), figures))
    }

    /// Waits for one frame, and shows what happened in it.
    async fn frame(&mut self) -> Result<Snapshot, DemoError> {
        tokio::select! {
            () = tokio::time::sleep(FRAME) => {}
            ended = &mut self.daemon => {
                ended?;
                return Err(DemoError::Stopped);
            }
        }
        self.record_happenings();
        let snapshot = self.snapshot().await?;
        self.show
            .frame(self.begun.elapsed(), &self.tally, &snapshot)
            .await?;
        Ok(snapshot)
    }

    fn record_happenings(&mut self) {
        while let Ok(happening) = self.happenings.try_recv() {
            if let Some(line) = self.tally.record(happening) {
                self.show.push(line);
            }
        }
    }

    async fn snapshot(&self) -> Result<Snapshot, DemoError> {
        let in_journal = |store: &mut Store| {
            Ok([
                store.waiting()?,
                store.count_failed()?,
                store.count_resolutions(Resolution::Discard)?,
            ])
        };
        let counts = self.journal.with(in_journal).await?;
        let [waiting, failed, discarded] =
            counts.map(|count| usize::try_from(count).unwrap_or(usize::MAX));
        let our_api = self.sim.our_api.state();
        let (chats, agents) = (our_api.data().chats.len(), our_api.data().agents.len());
        let messages = our_api.message_count();
        drop(our_api);
        Ok(Snapshot {
            chats,
            agents,
            messages,
            at_once: self.sim.our_api.max_at_once(),
            waiting,
            failed,
            discarded,
            score: self.score.as_ref().map(|score| *lock(score)),
        })
    }
}

/// A temporary directory. It is removed with its content when this is dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, DemoError> {
        let path = std::env::temp_dir().join(format!("bigchat-sync-demo-{}", Uuid::new_v4()));
        match DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => Ok(Self(path)),
            Err(source) => Err(DemoError::Scratch { path, source }),
        }
    }

    /// Leaves the directory in place, and returns its path.
    fn keep(mut self) -> PathBuf {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty()
            && let Err(error) = std::fs::remove_dir_all(&self.0)
        {
            tracing::warn!(path = shown(&self.0), reason = %error, "cannot remove the temporary database; delete it by hand");
        }
    }
}

/// The listener of the console: at its default address, if that is free. A daemon that is killed from time to time gets
/// another one, because a second demo could take the default address meanwhile.
fn console(is_killed: bool) -> io::Result<TcpListener> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    if is_killed {
        return TcpListener::bind(any);
    }
    TcpListener::bind(DEFAULT_LISTEN).or_else(|_| TcpListener::bind(any))
}

fn seed(args: &Args) -> u64 {
    // Short enough to type.
    args.seed.unwrap_or_else(|| rand::random::<u16>().into())
}

async fn start(
    args: &Args,
    seed: u64,
    ports: [u16; 2],
    watch: Watch,
) -> Result<Simulator, DemoError> {
    let mode = match args.bigchat {
        Reporting::Once => Mode::Once,
        // Small pages, which shift.
        Reporting::Log if args.chaos => Mode::Log(Log {
            events_per_second: 12.0,
            page_size: 6,
            max_late: 4,
            ..Log::default()
        }),
        // As many events as in the other mode, and sometimes more than a page.
        Reporting::Log => Mode::Log(Log {
            events_per_second: 6.0,
            page_size: 25,
            ..Log::default()
        }),
    };
    let options = bigchat::Options {
        seed,
        mode,
        own_addresses: true,
        ..bigchat::Options::default()
    };
    let (active, latency) = match args.chaos {
        true => (CHAOS_ACTIVE, CHAOS_LATENCY),
        false => (options.active, LATENCY),
    };
    let bigchat = BigChat::new(bigchat::Options { active, ..options });
    let [bigchat_at, our_api_at] = ports.map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    let failed = |service, address| {
        move |source| DemoError::Listen {
            service,
            address,
            source,
        }
    };
    let mut starting = Starting::new()?.seed(seed);
    let bigchat = starting.listen(bigchat_at, bigchat).await;
    let our_api = starting.listen(our_api_at, OurApi::new(seed)).await;
    let sim = Simulator {
        bigchat: bigchat.map_err(failed("BigChat", bigchat_at))?,
        our_api: our_api.map_err(failed("OurAPI", our_api_at))?,
    };
    sim.bigchat.watched(watch.clone());
    sim.our_api.watched(watch);
    sim.our_api.set_latency(latency);
    Ok(sim)
}

/// The services and their addresses.
fn services(sim: &Simulator, reporting: Reporting, seed: u64) -> String {
    let reports = match reporting {
        Reporting::Once => "reports each event once",
        Reporting::Log => "reports from a stored log",
    };
    format!(
        "BigChat  {}  {reports} (--seed {seed})\nOurAPI   {}  takes one request at a time",
        sim.bigchat.url(),
        sim.our_api.url()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two demos, or a demo beside a daemon, have a console each.
    #[test]
    fn two_demos_have_two_consoles() {
        let (one, other) = (console(false), console(false));
        let address = |listener: io::Result<TcpListener>| {
            let listener = listener.expect("a port");
            (listener.local_addr().expect("its address"), listener)
        };
        let (one, other) = (address(one), address(other));
        assert_ne!(one.0, other.0);
    }
}
