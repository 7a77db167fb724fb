//! Delivery: due conversations are reconciled with OurAPI, and their progress is committed.
//!
//! ```text
//! scheduler ──work──▶ workers (reconcile) ──reports──▶ committer
//!     ▲                                                    │
//!     └───────────────────── released ────────────────────┘
//! ```
//!
//! The scheduler hands out due conversations to as many workers as requests may be in flight. A conversation is claimed
//! in memory until its report is committed, so that its events keep their order; a claim needs no disk, since whatever
//! waits when a session starts is read back before it is sent. The committer takes whatever reports have piled up into one
//! transaction: the slower the disk, the more of them share a commit, and no worker waits for it.

mod agents;
mod attempts;
mod chat;
mod committer;
mod handlers;
mod reconcile;
mod report;
mod scheduler;
mod worker;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::bigchat::Source;
use crate::http::Apis;
use crate::journal::{Journal, STORAGE_PAUSE, Session, Storage};
use crate::metrics::Metrics;
use crate::our_api::OurApi;
use crate::settings::Settings;
use crate::telemetry::liveness::Liveness;

pub use self::attempts::AttemptError;
use self::committer::Committer;
use self::scheduler::Scheduler;
use self::worker::Worker;

/// How long requests in flight may take once the daemon is to stop.
pub const DRAIN: Duration = Duration::from_secs(8);

/// Until when to deliver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Until the daemon is to stop.
    Stopped,
    /// Until nothing is due any more, or nothing can be delivered now.
    Done,
}

/// What to work on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    All,
    /// No event is delivered; chats are verified where that is requested.
    Verifications,
}

/// What delivery is made of.
#[derive(Debug)]
pub struct Delivery {
    pub settings: Settings,
    pub apis: Apis,
    pub source: Arc<Source>,
    pub our_api: Arc<OurApi>,
    pub journal: Arc<Journal>,
    pub session: Session,
    pub storage: Arc<Storage>,
    pub metrics: Arc<Metrics>,
    pub liveness: Arc<Liveness>,
    /// Notified of events to be delivered.
    pub work_available: Arc<Notify>,
    /// Cancelled when no further request is to be begun.
    pub stopping: CancellationToken,
}

impl Delivery {
    /// Delivers until then. After a clean end nothing is in flight and everything is committed, which the journal
    /// remembers.
    pub async fn run(self, scope: Scope, until: Until) {
        let (reports, reported) = mpsc::channel(scheduler::MAX_CLAIMED);
        let (release, released) = mpsc::unbounded_channel();
        let worker = Arc::new(Worker::new(&self));
        let committer = Committer::new(&self);
        let mut scheduler = Scheduler::new(&self, Arc::clone(&worker), scope, reports, released);
        let drained = CancellationToken::new();
        let deliver = async {
            scheduler.run(until).await;
            // With the scheduler the channel of reports is closed, and the committer ends.
            let nothing_given_up = scheduler.drain(Instant::now() + DRAIN).await;
            drained.cancel();
            nothing_given_up
        };
        let commit = async {
            let too_late = async {
                drained.cancelled().await;
                sleep(STORAGE_PAUSE).await;
            };
            tokio::select! {
                () = committer.run(reported, release) => true,
                () = too_late => {
                    tracing::error!("the last deliveries could not be committed; they will be verified at the next start");
                    false
                }
            }
        };
        let (nothing_given_up, committed) = tokio::join!(deliver, commit);
        let (rate_limits, clean) = (worker.rate_limits(), nothing_given_up && committed);
        let ended = self
            .journal
            .with(move |store| store.end_session(rate_limits, clean));
        if let Ok(Err(error)) = timeout(STORAGE_PAUSE, ended).await {
            tracing::error!(reason = %error, "the end of the session could not be recorded");
        }
    }
}
