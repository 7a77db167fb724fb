//! The life of the daemon: open the journal, poll and deliver side by side, and stop within a bound.

pub mod context;
pub mod health;
pub mod progress;
pub mod service;
pub mod summary;

use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use self::context::Context;
use self::service::SystemdNotifier;
use self::summary::Summary;
use crate::bigchat::BigChat;
use crate::console::{self, Listener};
use crate::delivery::{self, Scope, Until};
use crate::domain::time::Millis;
use crate::http::{Api, Http, Network, Transport};
use crate::journal::{Journal, JournalError, OpenError, STORAGE_PAUSE, Store};
use crate::our_api::OurApi;
use crate::poller::Poller;
use crate::settings::{Listen, LiveTokens, Settings};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::terminal::{Terminal, shown};

/// How long delivery waits for the first poll. An answer takes some ms; what does not come soon may not come at all.
const FIRST_POLL_WITHIN: Duration = Duration::from_secs(2);

/// Why the daemon did not start, or did not stop well.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// The database cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The database refuses.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The HTTP client cannot be made.
    #[error("the HTTP client cannot be made (are there CA certificates on this machine?): {0}")]
    Client(#[from] reqwest::Error),
    /// The operating system refuses something the daemon cannot do without: a thread, a signal handler.
    #[error("the operating system refuses: {0}")]
    System(#[from] std::io::Error),
    /// The daemon was stopped while the disk refused what BigChat had told.
    #[error(
        "stopped while the database could not be written: {0} events that BigChat told are lost"
    )]
    Unstored(usize),
    /// The database was deleted or replaced under the daemon, and what waits in it goes with it.
    #[error("stopped while the database was deleted or replaced: {0} events in it are lost")]
    Replaced(u64),
    /// `once` could not read BigChat up to now.
    #[error(
        "BigChat was not read up to now; the log says why, and the next run goes on from there"
    )]
    Unread,
    /// `once` left events undelivered.
    #[error(
        "{0} events are not delivered yet; the log says why, and the next run goes on with them"
    )]
    Undelivered(u64),
}

impl DaemonError {
    /// Whether it may pass by itself: a full disk, somebody who holds the database for a while.
    fn is_transient(&self) -> bool {
        match self {
            Self::Open(error) => error.is_transient(),
            Self::Journal(error) => error.is_transient(),
            _ => false,
        }
    }
}

/// Polls and delivers until `stopping` is cancelled; then lets what is in flight end, for at most 8 s, and keeps what
/// came of it, within 1 s.
pub async fn run(
    settings: Settings,
    tokens: impl Into<LiveTokens>,
    observers: Observers,
    stopping: CancellationToken,
) -> Result<(), DaemonError> {
    let listener = match settings.listen {
        Listen::Off => None,
        Listen::At(address) => Some(Listener::At(address)),
    };
    run_at(listener, settings, tokens, observers, stopping).await
}

/// The same, answering at that door, whatever the settings say of it.
pub async fn run_at(
    listener: Option<Listener>,
    settings: Settings,
    tokens: impl Into<LiveTokens>,
    observers: Observers,
    stopping: CancellationToken,
) -> Result<(), DaemonError> {
    let tokens = tokens.into();
    let token = tokens.console.clone();
    let starting = start_when_possible(settings, tokens, stopping);
    let Some(context) = observers.manager.during_start(starting).await? else {
        return Ok(());
    };
    // Whoever asks is answered until the daemon has stopped; dropped, it ends too.
    let (mut web, closing) = (JoinSet::new(), CancellationToken::new());
    if let Some(listener) = listener {
        web.spawn(console::serve(
            Arc::clone(&context),
            listener,
            token,
            closing.clone(),
        ));
    }
    let work = observers.watch(&context, serve(Arc::clone(&context)));
    let served = health::keep(&context, work).await;
    closing.cancel();
    web.join_all().await;
    served
}

/// Who watches the daemon, besides those who read its log: nobody, unless it is all that the process does.
#[derive(Debug, Clone, Default)]
pub struct Observers {
    /// Whoever looks at the terminal.
    pub terminal: Option<Terminal>,
    /// What has started the process.
    pub manager: SystemdNotifier,
}

impl Observers {
    /// Those of this process.
    pub fn of_process(terminal: Terminal) -> Self {
        Self {
            terminal: Some(terminal),
            manager: SystemdNotifier::detect(),
        }
    }

    /// Shows all of them how the daemon fares, until `work` is done.
    async fn watch(
        &self,
        context: &Context,
        work: impl Future<Output = Result<(), DaemonError>>,
    ) -> Result<(), DaemonError> {
        let mut summary = Summary::begin();
        let watching = async {
            tokio::join!(
                summary.run(context),
                progress::show(context, self.terminal.as_ref()),
                self.manager.run_watchdog(
                    || context.liveness.stuck(Instant::now()),
                    || summary::sentence(context),
                    &context.stopping
                ),
            )
        };
        let done = tokio::select! {
            biased;
            done = work => done,
            (never, ..) = watching => match never {},
        };
        summary.tell(context).await;
        if done.is_ok() {
            tracing::info!("stopped; nothing is forgotten");
        }
        done
    }
}

/// The daemon between its start and its end.
pub(crate) async fn serve(context: Arc<Context>) -> Result<(), DaemonError> {
    let mut poller = poller(&context);
    let polling = until_stopped(&context, poller.run());
    let delivering = async {
        caught_up(&context).await;
        delivery::run(Arc::clone(&context), Scope::All, Until::Stopped).await;
    };
    let liveness = &context.liveness;
    tokio::join!(
        liveness.polling.supervise(polling),
        liveness.delivering.supervise(delivering)
    );
    stopped(&context, &poller).await
}

fn poller(context: &Context) -> Poller {
    Poller::new(
        Arc::clone(&context.bigchat),
        Arc::clone(&context.journal),
        context.settings.clone(),
        context.poller_signals(),
    )
}

/// Polls once, as far as now, and delivers what is due.
///
/// # Errors
///
/// Also where that came to nothing or not to its end: nobody else tells whoever has started it.
pub async fn once(
    settings: Settings,
    tokens: impl Into<LiveTokens>,
    observers: Observers,
    stopping: CancellationToken,
) -> Result<(), DaemonError> {
    let context = start(settings, tokens.into(), stopping).await?;
    let work = async {
        let mut poller = poller(&context);
        let up_to_date = until_stopped(&context, poller.catch_up()).await;
        delivery::run(Arc::clone(&context), Scope::All, Until::Done).await;
        stopped(&context, &poller).await?;
        if context.stopping.is_cancelled() {
            return Ok(());
        }
        if up_to_date != Some(true) {
            return Err(DaemonError::Unread);
        }
        match context.journal.with(Store::waiting).await? {
            0 => Ok(()),
            waiting => Err(DaemonError::Undelivered(waiting)),
        }
    };
    health::keep(&context, observers.watch(&context, work)).await
}

/// Polls nothing: verifies chats where that is requested and, unless `only_look`, delivers what is due, until `stopping`
/// is cancelled.
///
/// # Errors
///
/// [`OpenError::InUse`] where a daemon runs: it does so itself.
pub async fn verify(
    settings: Settings,
    tokens: LiveTokens,
    stopping: CancellationToken,
    only_look: bool,
) -> Result<(), DaemonError> {
    let context = start(settings, tokens, stopping).await?;
    let work = async {
        let scope = if only_look {
            Scope::Verifications
        } else {
            Scope::All
        };
        delivery::run(Arc::clone(&context), scope, Until::Stopped).await;
    };
    health::keep(&context, work).await;
    Ok(())
}

/// Waits until BigChat was read up to now, within a bound. The database may be an older copy: what waits in it of a chat
/// is delivered together with what happened since, and sets nothing back.
async fn caught_up(context: &Context) {
    tokio::select! {
        () = context.polled.cancelled() => {}
        () = context.stopping.cancelled() => {}
        () = sleep(FIRST_POLL_WITHIN) => {}
    }
}

/// Lets polling go on until it ends by itself; once the daemon is to stop, only for so long. `None`: it did not end.
async fn until_stopped<T>(context: &Context, polling: impl Future<Output = T>) -> Option<T> {
    let last_poll = async {
        context.stopping.cancelled().await;
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

/// Starts; a disk that is full or a database that is locked is waited for, as at any other time. `None`: the daemon was
/// stopped meanwhile.
async fn start_when_possible(
    settings: Settings,
    tokens: LiveTokens,
    stopping: CancellationToken,
) -> Result<Option<Arc<Context>>, DaemonError> {
    let mut refused = false;
    loop {
        match start(settings.clone(), tokens.clone(), stopping.clone()).await {
            Err(error) if error.is_transient() => {
                if !std::mem::replace(&mut refused, true) {
                    tracing::error!(reason = %error, "the database cannot be used yet: the daemon starts when it can");
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
    tokens: LiveTokens,
    stopping: CancellationToken,
) -> Result<Arc<Context>, DaemonError> {
    let db = settings.db();
    let store = tokio::task::spawn_blocking(move || Store::open(&db))
        .await
        .map_err(std::io::Error::other)??;
    let journal = Journal::start(store)?;
    let bigchat = Network::new(&settings.bigchat_url, settings.request_timeout)?;
    let our_api = Network::new(&settings.our_api_url, settings.request_timeout)?;
    begin(settings, tokens, journal, bigchat, our_api, stopping).await
}

/// Begins a session over a journal and what carries requests to the two APIs.
pub(crate) async fn begin(
    settings: Settings,
    tokens: LiveTokens,
    journal: Journal,
    bigchat: impl Transport + 'static,
    our_api: impl Transport + 'static,
    stopping: CancellationToken,
) -> Result<Arc<Context>, DaemonError> {
    let metrics = Metrics::default();
    let (url, token) = (settings.bigchat_url.clone(), tokens.bigchat);
    let bigchat = Http::new(Api::BigChat, bigchat, url, token, settings.retry())
        .counted_by(metrics.requests_to(Api::BigChat));
    let (url, token) = (settings.our_api_url.clone(), tokens.our_api);
    let our_api = Http::new(Api::OurApi, our_api, url, token, settings.retry())
        .counted_by(metrics.requests_to(Api::OurApi));
    let session = journal
        .with(|store| store.start_session(Millis::now()))
        .await?;
    tracing::info!(
        db = shown(&settings.db()), bigchat_url = %settings.bigchat_url, our_api_url = %settings.our_api_url,
        session = session.id, "bigchat-sync {} is running", env!("CARGO_PKG_VERSION")
    );
    if !session.after_clean_end {
        tracing::warn!(
            "the last session did not end cleanly; what waits is verified before it is sent"
        );
        // A request may still be in flight, and OurAPI may take only one at a time.
        our_api.hold_until(Millis::now().plus(settings.request_timeout));
    }
    let bigchat = BigChat::new(bigchat);
    let (max_in_flight, timeout) = (settings.our_api_concurrency, settings.request_timeout);
    let our_api = OurApi::new(our_api, max_in_flight, timeout);
    let journal = Arc::new(journal);
    Ok(Arc::new(Context::new(
        settings, bigchat, our_api, journal, session, metrics, stopping,
    )))
}

async fn stopped(context: &Context, poller: &Poller) -> Result<(), DaemonError> {
    if poller.unstored() > 0 {
        return Err(DaemonError::Unstored(poller.unstored()));
    }
    let left = context
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
