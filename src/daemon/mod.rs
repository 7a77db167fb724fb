//! The life of the daemon: it opens the journal, polls and delivers side by side, and stops within a time limit.

mod changes;
mod health;
mod heartbeat;
mod parts;
mod progress;
pub mod service;
mod summary;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

pub(crate) use self::parts::Parts;
use self::service::SystemdNotifier;
use self::summary::Summary;
use crate::bigchat::{BigChat, Source};
use crate::console::{self, Listener};
use crate::delivery::{self, RunMode};
use crate::domain::time::Millis;
use crate::http::{Api, Apis, Http, Network, Transport};
use crate::journal::{Intervals, Journal, JournalError, OpenError, STORAGE_PAUSE, Store};
use crate::metrics::Metrics;
use crate::our_api::OurApi;
use crate::poller::Poller;
use crate::settings::{Listen, Settings, Tokens};
use crate::telemetry::liveness::Liveness;
use crate::telemetry::terminal::{Terminal, shown};
use crate::version;

/// How long delivery waits for the first poll. BigChat usually answers within milliseconds. A response that takes
/// longer may never come.
const FIRST_POLL_WITHIN: Duration = Duration::from_secs(2);

/// Why the daemon did not start, or why it stopped with an error.
#[derive(Debug, Error)]
pub enum DaemonError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("the HTTP client cannot be made (are there CA certificates on this machine?): {0}")]
    Client(#[from] reqwest::Error),
    /// The operating system refused a thread or a signal handler.
    #[error("the operating system reports an error: {0}")]
    System(#[from] std::io::Error),
    /// The daemon was stopped while the disk refused events that BigChat had reported. If the disk only hangs, they may
    /// still be stored.
    #[error(
        "stopped while the database could not be written; reported events that may be lost: {0}"
    )]
    Unstored(usize),
    /// The database was deleted or replaced while the daemon was running. The events waiting in it are lost.
    #[error(
        "stopped after the database had been deleted or replaced; events in it that are lost: {0}"
    )]
    Replaced(u64),
    /// `once` could not read BigChat up to now.
    #[error("BigChat was not read up to the present: {0}; the next run continues from there")]
    Unread(String),
    /// `once` left events undelivered.
    #[error("events not delivered yet: {waiting}; {reason}; the next run continues with them")]
    Undelivered { waiting: u64, reason: String },
}

impl DaemonError {
    /// Whether waiting may help: a full disk, or a database that another process has locked.
    fn is_transient(&self) -> bool {
        match self {
            Self::Open(error) => error.is_transient(),
            Self::Journal(error) => error.is_transient(),
            _ => false,
        }
    }
}

/// Polls and delivers until `stopping` is cancelled. Then it waits for requests in flight, for at most 8 s, and stores
/// their results within 1 s.
pub async fn run(
    settings: Settings,
    tokens: Tokens,
    observers: Observers,
    stopping: CancellationToken,
) -> Result<(), DaemonError> {
    let listener = match settings.listen {
        Listen::Off => None,
        Listen::At(address) => Some(Listener::At(address)),
    };
    run_at(listener, settings, tokens, observers, stopping).await
}

/// The same, with the given listener instead of the one in the settings.
pub async fn run_at(
    listener: Option<Listener>,
    settings: Settings,
    tokens: Tokens,
    observers: Observers,
    stopping: CancellationToken,
) -> Result<(), DaemonError> {
    let (token, read_token) = (tokens.console.clone(), tokens.console_read.clone());
    let heartbeat_url = tokens.heartbeat_url.clone();
    let starting = start_when_possible(settings, tokens, stopping);
    let Some(parts) = observers.manager.during_start(starting).await? else {
        return Ok(());
    };
    // The console answers until the daemon has stopped. Dropping the set ends it.
    let (mut web, closing) = (JoinSet::new(), CancellationToken::new());
    if let Some(listener) = listener {
        web.spawn(console::serve(
            parts.console(),
            listener,
            [token, read_token],
            closing.clone(),
        ));
    }
    // Boxed, because each function that takes a future by value stores it a second time.
    let work = Box::pin(observers.watch(&parts, serve(&parts)));
    let work = alongside(heartbeat::run(&parts, heartbeat_url), work);
    let served = health::record(&parts, work).await;
    closing.cancel();
    // A panic of the console is logged, and is not a failure of the daemon.
    while web.join_next().await.is_some() {}
    served
}

/// The observers of the daemon besides the readers of its log. There are none if the process runs more than the daemon,
/// as the demo does.
#[derive(Debug, Clone, Default)]
pub struct Observers {
    /// The terminal, if it is interactive.
    pub terminal: Option<Terminal>,
    /// The service manager that started the process.
    pub manager: SystemdNotifier,
}

impl Observers {
    /// The observers of this process.
    pub fn of_process(terminal: Terminal) -> Self {
        Self {
            terminal: Some(terminal),
            manager: SystemdNotifier::detect(),
        }
    }

    /// Shows the daemon's progress to all observers until `work` is done.
    async fn watch(
        &self,
        parts: &Parts,
        work: impl Future<Output = Result<(), DaemonError>>,
    ) -> Result<(), DaemonError> {
        let mut summary = Summary::begin();
        let watching = async {
            let (never, ..) = tokio::join!(
                summary.run(parts),
                progress::show(parts, self.terminal.as_ref()),
                self.manager.run_watchdog(
                    || parts.liveness.stuck(Instant::now()),
                    || summary::message(parts),
                    &parts.stopping
                ),
            );
            never
        };
        let done = alongside(watching, work).await;
        summary.log(parts).await;
        if done.is_ok() {
            tracing::info!("stopped");
        }
        done
    }
}

/// Runs `other` for as long as `work` takes.
async fn alongside<T>(other: impl Future<Output = Infallible>, work: impl Future<Output = T>) -> T {
    tokio::select! {
        biased;
        done = work => done,
        never = other => match never {},
    }
}

/// Runs the started daemon until it stops.
pub(crate) async fn serve(parts: &Parts) -> Result<(), DaemonError> {
    alongside(changes::watch(parts), poll_and_deliver(parts)).await
}

/// The same, without checking for changes made by other processes.
pub(crate) async fn poll_and_deliver(parts: &Parts) -> Result<(), DaemonError> {
    let mut poller = parts.poller();
    let polling = until_stopped(parts, poller.run());
    let delivering = async {
        caught_up(parts).await;
        parts.delivery().run(RunMode::All).await;
    };
    let liveness = &parts.liveness;
    tokio::join!(
        liveness.polling.supervise(polling),
        liveness.delivering.supervise(delivering)
    );
    stopped(parts, &poller).await
}

/// Polls once, up to the present, and delivers what is due. While deliveries are paused, it delivers nothing, which is
/// not an error.
///
/// # Errors
///
/// Also if the poll or a delivery did not complete, because cron sees only the exit code.
pub async fn once(
    settings: Settings,
    tokens: Tokens,
    observers: Observers,
    stopping: CancellationToken,
) -> Result<(), DaemonError> {
    let parts = start(settings, tokens, stopping).await?;
    let work = async {
        let mut poller = parts.poller();
        let up_to_date = until_stopped(&parts, poller.catch_up()).await;
        parts.delivery().run(RunMode::Once).await;
        stopped(&parts, &poller).await?;
        if parts.stopping.is_cancelled() {
            return Ok(());
        }
        if up_to_date != Some(true) {
            let reason = parts.apis.status(Api::BigChat).reason(Api::BigChat);
            return Err(DaemonError::Unread(reason.unwrap_or_else(in_the_log)));
        }
        let now = Millis::now();
        let figures = parts.journal.with(move |store| store.figures(now)).await?;
        let waiting = figures.waiting;
        if let Some(pause) = parts.our_api.paused() {
            tracing::warn!(waiting, "nothing was delivered: deliveries are {pause}");
            return Ok(());
        }
        match waiting {
            0 => Ok(()),
            waiting => {
                let reason = parts.apis.status(Api::OurApi).reason(Api::OurApi);
                let of_oldest = figures.oldest_waiting.and_then(|oldest| oldest.reason);
                let reason = reason.or(of_oldest).unwrap_or_else(in_the_log);
                Err(DaemonError::Undelivered { waiting, reason })
            }
        }
    };
    let work = Box::pin(observers.watch(&parts, work));
    let work = alongside(changes::watch(&parts), work);
    health::record(&parts, work).await
}

fn in_the_log() -> String {
    "the log has the reason".to_owned()
}

/// Verifies the chats for which this is requested and, if the mode says so, delivers what is due, until `stopping` is
/// cancelled. Does not poll.
///
/// # Errors
///
/// [`OpenError::InUse`] if a daemon is running, because the daemon does this itself.
pub async fn verify(
    settings: Settings,
    tokens: Tokens,
    stopping: CancellationToken,
    mode: RunMode,
) -> Result<(), DaemonError> {
    let parts = start(settings, tokens, stopping).await?;
    let work = Box::pin(async { parts.delivery().run(mode).await });
    health::record(&parts, alongside(changes::watch(&parts), work)).await;
    Ok(())
}

/// Waits until BigChat has been read up to the present, for a limited time. If the database is an older copy, its
/// waiting changes of a chat are then merged with later ones, so that none sets the chat back.
async fn caught_up(parts: &Parts) {
    tokio::select! {
        () = parts.caught_up.cancelled() => {}
        () = parts.stopping.cancelled() => {}
        () = sleep(FIRST_POLL_WITHIN) => {}
    }
}

/// Waits for the end of polling, but only for a limited time once the daemon is to stop. `None`: polling did not end.
async fn until_stopped<T>(parts: &Parts, polling: impl Future<Output = T>) -> Option<T> {
    let last_poll = async {
        parts.stopping.cancelled().await;
        sleep(delivery::DRAIN).await;
    };
    tokio::select! {
        done = polling => Some(done),
        () = last_poll => {
            tracing::warn!("BigChat did not answer the last poll in time");
            None
        }
    }
}

/// Starts the daemon. While the disk is full or the database is locked, it waits and tries again. `None`: the daemon
/// was stopped meanwhile.
async fn start_when_possible(
    settings: Settings,
    tokens: Tokens,
    stopping: CancellationToken,
) -> Result<Option<Parts>, DaemonError> {
    let mut refused = false;
    loop {
        match start(settings.clone(), tokens.clone(), stopping.clone()).await {
            Err(error) if error.is_transient() => {
                if !std::mem::replace(&mut refused, true) {
                    tracing::error!(reason = %error, "the database cannot be used yet; the daemon starts when it can be used");
                }
            }
            started => return started.map(Some),
        }
        tokio::select! {
            () = stopping.cancelled() => return Ok(None),
            () = sleep(STORAGE_PAUSE) => {}
        }
    }
}

async fn start(
    settings: Settings,
    tokens: Tokens,
    stopping: CancellationToken,
) -> Result<Parts, DaemonError> {
    let db = settings.db();
    let store = tokio::task::spawn_blocking(move || Store::open(&db))
        .await
        .map_err(std::io::Error::other)??;
    let journal = Journal::start(store)?;
    let bigchat = Network::new(&settings.bigchat_url, settings.request_timeout)?;
    let our_api = Network::new(&settings.our_api_url, settings.request_timeout)?;
    begin(settings, tokens, journal, bigchat, our_api, stopping).await
}

/// Begins a session with a journal and the transports of the two APIs.
pub(crate) async fn begin(
    settings: Settings,
    tokens: Tokens,
    journal: Journal,
    bigchat: impl Transport + 'static,
    our_api: impl Transport + 'static,
    stopping: CancellationToken,
) -> Result<Parts, DaemonError> {
    let metrics = Metrics::default();
    let (url, token) = (settings.bigchat_url.clone(), tokens.bigchat);
    let bigchat = Http::new(Api::BigChat, bigchat, url, token, settings.retry())
        .observed_by(metrics.requests_to(Api::BigChat));
    let (url, token) = (settings.our_api_url.clone(), tokens.our_api);
    let our_api = Http::new(Api::OurApi, our_api, url, token, settings.retry())
        .observed_by(metrics.requests_to(Api::OurApi));
    let intervals = Intervals {
        poll_interval: settings.poll_interval,
        verify_every: settings.idle_pass().map(|pass| pass.every),
    };
    let session = journal
        .with(move |store| store.start_session(intervals, Millis::now()))
        .await?;
    tracing::info!(
        db = shown(&settings.db()), bigchat_url = %settings.bigchat_url, our_api_url = %settings.our_api_url,
        session = session.id, "bigchat-sync {} is running", version::text()
    );
    if !session.last_end.clean {
        tracing::warn!(
            "the last session did not end cleanly; waiting events are verified before they are sent"
        );
    }
    let apis = Apis {
        bigchat: Arc::new(bigchat),
        our_api: Arc::new(our_api),
    };
    let journal = Arc::new(journal);
    let bigchat = BigChat::new(Arc::clone(&apis.bigchat));
    let source = Source::new(
        bigchat,
        Arc::clone(&journal),
        session.epoch,
        stopping.clone(),
    );
    let our_api = OurApi::new(Arc::clone(&apis.our_api), &settings, stopping.clone());
    let last_end = session.last_end;
    let in_flight_until = last_end.in_flight_until(settings.request_timeout, Millis::now());
    our_api.restore_timed_out(in_flight_until);
    our_api.set_pause(session.pause);
    let liveness = Liveness::new(settings.request_timeout, Instant::now());
    let parts = Parts {
        settings,
        apis,
        source: Arc::new(source),
        our_api: Arc::new(our_api),
        journal,
        session,
        storage: Arc::default(),
        metrics: Arc::new(metrics),
        liveness: Arc::new(liveness),
        work_available: Arc::default(),
        caught_up: CancellationToken::new(),
        stopping,
    };
    health::recall(&parts).await;
    Ok(parts)
}

async fn stopped(parts: &Parts, poller: &Poller) -> Result<(), DaemonError> {
    if poller.unstored() > 0 {
        return Err(DaemonError::Unstored(poller.unstored()));
    }
    let left = parts
        .journal
        .with(|store| match store.in_place() {
            Ok(()) => Ok(0),
            Err(_) => store.waiting(),
        })
        .await?;
    if left > 0 {
        return Err(DaemonError::Replaced(left));
    }
    Ok(())
}
