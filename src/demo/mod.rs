//! The demo: the real daemon, over HTTP, against both services simulated in this process, to be watched; and at the end
//! the proof, by a comparison that shares no code with the daemon.
//!
//! It needs nothing and leaves nothing: the services listen on free ports, the database is a temporary one, and the
//! daemon's settings and tokens in the environment have no say. It can also only serve the services, for a daemon in
//! another terminal.

mod chaos;
mod mishaps;
mod show;
mod tally;
mod verdict;

use std::fs::DirBuilder;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::{ExitCode, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use thiserror::Error;
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::task::JoinError;
use tokio_util::sync::CancellationToken;
use url::Url;
use uuid::Uuid;

use crate::daemon::{self, DaemonError, Observers};
use crate::journal::{Journal, JournalError, OpenError, Resolution, Store};
use crate::settings::{DEFAULT_LISTEN, Listen, Settings, Tokens, duration, number};
use crate::simulator::bigchat::{self, Log, Mode};
use crate::simulator::{BigChat, Happening, OurApi, Simulator, Starting, Watch};
use crate::telemetry::terminal::{Terminal, shown};

use chaos::{Chaos, Daemon};
pub use chaos::{Score, count_apart};
use mishaps::Mishaps;
use show::{FRAME, Show};
use tally::{Looked, Tally};
pub use verdict::{Figures, Struck, Verdict};

/// How often BigChat is polled: often, since somebody waits for something to happen.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// How long what was told may take to arrive, once nothing new is told.
const PATIENCE: Duration = Duration::from_secs(30);

/// The same after chaos, when much may have to be built again.
const CHAOS_PATIENCE: Duration = Duration::from_secs(180);

/// If OurAPI is asked nothing for so long, nothing more will come.
const STILL: Duration = Duration::from_secs(20);

/// About as long as the real OurAPI takes for a request.
const LATENCY: Duration = Duration::from_millis(6);

/// The same in chaos, where each loss has everything written again.
const CHAOS_LATENCY: Duration = Duration::from_millis(1);

/// How many conversations go on at a time in chaos: few, so that there is time for everything else.
const CHAOS_ACTIVE: usize = 8;

/// Where the real BigChat and the real OurAPI listen, and the daemon looks for them unless told otherwise.
const PORTS: [u16; 2] = [8267, 8266];

/// Any that are free.
const FREE_PORTS: [u16; 2] = [0, 0];

/// How long it goes on.
const DURATION: Duration = Duration::from_secs(30);

/// The same where somebody has something to mend.
const MENDING: Duration = Duration::from_secs(600);

/// What can be chosen.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// How long it goes on; what is under way then is waited for [default: 30s].
    #[arg(long, value_name = "TIME", value_parser = duration, allow_hyphen_values = true)]
    pub duration: Option<Duration>,

    /// What the simulated services' random choices come from [default: a random number, which is shown].
    #[arg(long, value_name = "N", value_parser = number::<u64>, allow_hyphen_values = true)]
    pub seed: Option<u64>,

    /// How the simulated BigChat tells events.
    #[arg(long, value_enum, default_value_t = Telling::Once)]
    pub bigchat: Telling,

    /// Let everything fail meanwhile: both services in every way they can, and the daemon, as a process of its own, is
    /// killed and started again. In the end all is calm, and compared all the same.
    #[arg(long)]
    pub chaos: bool,

    /// Let things fail, some of which somebody has to mend: see what and why in the console, or with `bigchat-sync status`
    /// and `failed`, and mend it. Goes on for 10 minutes or as --duration says, or until Ctrl-C.
    #[arg(long, conflicts_with_all = ["chaos", "serve"])]
    pub faults: bool,

    /// Only serve BigChat on port 8267 and OurAPI on port 8266, until stopped, for a daemon in another terminal.
    #[arg(long, conflicts_with_all = ["duration", "chaos"])]
    pub serve: bool,
}

impl Args {
    fn duration(&self) -> Duration {
        let usual = if self.faults { MENDING } else { DURATION };
        self.duration.unwrap_or(usual)
    }
}

/// `--bigchat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Telling {
    /// Each event once, made up when asked for, as the real BigChat does.
    Once,
    /// From a log that stays, the same events for the same time, as is usual elsewhere.
    Log,
}

/// Why there is no verdict.
#[derive(Debug, Error)]
pub enum DemoError {
    /// A port is taken, or may not be used.
    #[error("the simulated {service} cannot listen on {address}: {source}")]
    Listen {
        /// Which service.
        service: &'static str,
        /// Where it was to listen.
        address: SocketAddr,
        /// Why it cannot.
        source: io::Error,
    },
    /// No temporary directory can be made.
    #[error("{} cannot be made: {source}", shown(.path))]
    Scratch {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The temporary database cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The temporary database refuses.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The daemon did not start or did not stop well.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// The daemon has stopped by itself, which it never should.
    #[error("the daemon has stopped by itself")]
    Stopped,
    /// The same, of a daemon that is a process of its own, or it did not stop well.
    #[error("the daemon has ended with {0}")]
    FetchEnd(ExitStatus),
    /// What should come about at once does not.
    #[error("waited for in vain: {0}")]
    Never(&'static str),
    /// The daemon has panicked.
    #[error("the daemon has panicked: {0}")]
    Panicked(#[from] JoinError),
    /// Nothing can be shown, or a service cannot be stopped.
    #[error("the demo breaks off: {0}")]
    Io(#[from] io::Error),
    /// Stopped by a second signal.
    #[error("stopped at once: nothing was compared")]
    Interrupted,
}

/// Runs the demo, or only serves, until it is over or `stopping` is cancelled. `settings` are the daemon's but for where
/// everything is and how often it polls. 0 if OurAPI holds in the end what BigChat told, else 1. Whoever drops it ends it
/// at once, and nothing is left then either.
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
    let verdict = perform(args, settings, terminal, stopping).await?;
    terminal.say(&verdict.to_string()).await?;
    Ok(verdict.exit_code())
}

/// Serves both services where the real ones listen, until stopped.
async fn serve(
    args: &Args,
    terminal: &Terminal,
    stopping: &CancellationToken,
) -> Result<(), DemoError> {
    let seed = seed(args);
    let sim = start(args, seed, PORTS, Watch::default()).await?;
    terminal.say(&format!(
        "{}\n\nTo try in another terminal:\n\n    cargo run --release\n    curl {}/chats\n\nCtrl-C ends it.",
        services(&sim, args.bigchat, seed),
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
) -> Result<Verdict, DemoError> {
    let seed = seed(args);
    let (watcher, happenings) = mpsc::unbounded_channel();
    let watch = Watch::to(watcher);
    let sim = Arc::new(start(args, seed, FREE_PORTS, watch.clone()).await?);
    let scratch = Scratch::new()?;
    let db = scratch.0.join("journal.db");
    // The daemon finds it there, and so does who looks into it beside the daemon.
    drop(Store::open(&db)?);
    let journal = Arc::new(Journal::start(Store::open_shared(&db)?)?);
    let duration = args.duration();
    terminal
        .say(&format!(
            "The daemon for {} between two simulated services.\n{}",
            humantime::format_duration(duration),
            services(&sim, args.bigchat, seed)
        ))
        .await?;
    let listen = free_address()?;
    terminal
        .say(&format!("The console is at http://{listen}/\n"))
        .await?;
    let (enough, stop) = (CancellationToken::new(), CancellationToken::new());
    let score = args.chaos.then(Arc::<Mutex<Score>>::default);
    let daemon: Running = match &score {
        Some(score) => {
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
                listen: Listen::At(listen),
                ..settings
            };
            let daemon = tokio::spawn(daemon::run(
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
        tally: Tally::default(),
        show: Show::new(terminal, duration),
        daemon,
        enough,
        stop,
        score,
        begun: Instant::now(),
    };
    let verdict = stage.perform(duration, stopping).await;
    if args.chaos && !matches!(&verdict, Ok(verdict) if verdict.is_good()) {
        let kept = scratch.keep();
        terminal
            .say(&format!(
                "The daemon's database and log are kept in {}\n",
                shown(&kept)
            ))
            .await?;
    }
    verdict
}

/// The daemon at work, until it has stopped.
type Running = Pin<Box<dyn Future<Output = Result<(), DemoError>>>>;

/// All that is there while the demo runs.
struct Stage {
    sim: Arc<Simulator>,
    journal: Arc<Journal>,
    happenings: UnboundedReceiver<(Instant, Happening)>,
    tally: Tally,
    show: Show,
    daemon: Running,
    /// Cancelled when nothing more is to strike.
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
    ) -> Result<Verdict, DemoError> {
        while self.begun.elapsed() < duration && !stopping.is_cancelled() {
            self.frame().await?;
            if let Some(mishaps) = &mut self.mishaps
                && let Some(news) = mishaps.go_on(self.begun.elapsed()).await?
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
        let patience = match self.score {
            Some(_) => CHAOS_PATIENCE,
            None => PATIENCE,
        };
        let (mut quiet_since, mut polls) = (Instant::now(), self.sim.bigchat.state().polls());
        let (mut still_since, mut requests) = (quiet_since, 0);
        while quiet_since.elapsed() < patience && still_since.elapsed() < STILL {
            let looked = self.frame().await?;
            if requests != self.tally.requests() || looked.waiting > 0 {
                (still_since, requests) = (Instant::now(), self.tally.requests());
            }
            if looked.score.is_some_and(|score| !score.calm) {
                (quiet_since, polls) = (Instant::now(), self.sim.bigchat.state().polls());
                still_since = quiet_since;
                continue;
            }
            // What the poll told that was under way is kept, and waits, once there is another.
            if self.sim.bigchat.state().polls() > polls && looked.waiting == 0 {
                let report = self.sim.compare();
                if report.is_clean() && looked.failed + looked.discarded == report.refused {
                    break;
                }
            }
        }
        self.stop.cancel();
        (&mut self.daemon).await?;
        self.take_note();
        let looked = self.look().await?;
        let figures = Figures {
            events: self.tally.events(),
            requests: self.tally.requests(),
            at_once: looked.at_once,
            failed: looked.failed + looked.discarded,
            waiting: looked.waiting,
            chaos: looked.score.map(|score| Struck {
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
        Ok(Verdict::new(self.sim.compare(), figures))
    }

    /// Lets a moment pass, and shows what happened in it.
    async fn frame(&mut self) -> Result<Looked, DemoError> {
        tokio::select! {
            () = tokio::time::sleep(FRAME) => {}
            ended = &mut self.daemon => {
                ended?;
                return Err(DemoError::Stopped);
            }
        }
        self.take_note();
        let looked = self.look().await?;
        self.show
            .frame(self.begun.elapsed(), &self.tally, &looked)
            .await?;
        Ok(looked)
    }

    fn take_note(&mut self) {
        while let Ok((at, happening)) = self.happenings.try_recv() {
            if let Some(line) = self.tally.note(at, happening) {
                self.show.tell(line);
            }
        }
    }

    async fn look(&self) -> Result<Looked, DemoError> {
        let in_journal = |store: &mut Store| {
            Ok([
                store.waiting()?,
                store.count_failed()?,
                store.count_decisions(Resolution::Discard)?,
            ])
        };
        let counts = self.journal.with(in_journal).await?;
        let [waiting, failed, discarded] =
            counts.map(|count| usize::try_from(count).unwrap_or(usize::MAX));
        let our_api = self.sim.our_api.state();
        let (chats, agents) = (our_api.data().chats.len(), our_api.data().agents.len());
        let messages = our_api.message_count();
        drop(our_api);
        Ok(Looked {
            chats,
            agents,
            messages,
            at_once: self.sim.our_api.max_at_once(),
            waiting,
            failed,
            discarded,
            score: self
                .score
                .as_ref()
                .map(|score| *score.lock().unwrap_or_else(PoisonError::into_inner)),
        })
    }
}

/// A directory of our own, removed with all that is in it when this is dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, DemoError> {
        let path = std::env::temp_dir().join(format!("bigchat-sync-demo-{}", Uuid::new_v4()));
        match DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => Ok(Self(path)),
            Err(source) => Err(DemoError::Scratch { path, source }),
        }
    }

    /// Leaves it there. Returns where that is.
    fn keep(mut self) -> PathBuf {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty()
            && let Err(error) = std::fs::remove_dir_all(&self.0)
        {
            tracing::warn!(path = shown(&self.0), reason = %error, "the temporary database stays");
        }
    }
}

/// Where the console is served: where everybody looks for it, if that is free.
fn free_address() -> io::Result<SocketAddr> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    TcpListener::bind(DEFAULT_LISTEN)
        .or_else(|_| TcpListener::bind(any))?
        .local_addr()
}

fn seed(args: &Args) -> u64 {
    // Short enough to be typed again.
    args.seed.unwrap_or_else(|| rand::random::<u16>().into())
}

async fn start(
    args: &Args,
    seed: u64,
    ports: [u16; 2],
    watch: Watch,
) -> Result<Simulator, DemoError> {
    let mode = match args.bigchat {
        Telling::Once => Mode::Once,
        // With many pages, which shift.
        Telling::Log if args.chaos => Mode::Log(Log {
            events_per_second: 12.0,
            page_size: 6,
            max_late: 4,
            ..Log::default()
        }),
        // As lively as the other, and with more than a page now and then.
        Telling::Log => Mode::Log(Log {
            events_per_second: 6.0,
            page_size: 25,
            ..Log::default()
        }),
    };
    let options = bigchat::Options {
        seed,
        mode,
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

/// What the services are, for people.
fn services(sim: &Simulator, log_at: Telling, seed: u64) -> String {
    let tells = match log_at {
        Telling::Once => "tells each event once",
        Telling::Log => "tells from a log that stays",
    };
    format!(
        "BigChat at {} {tells} (--seed {seed}).\nOurAPI at {} stands one request at a time.",
        sim.bigchat.url(),
        sim.our_api.url()
    )
}
