//! Delivery: reconciles due conversations with OurAPI, and commits their progress.
//!
//! ```text
//! scheduler ──work──▶ workers (reconcile) ──reports──▶ committer
//!     ▲                                                    │
//!     └───────────────────── released ────────────────────┘
//! ```
//!
//! The scheduler hands out due conversations to as many workers as requests may be in flight. A conversation is claimed
//! until its report is committed, which preserves the order of its events. Claims are only in memory, since chats with
//! waiting events are read back when a session starts. The committer takes all reports that have queued up into one
//! transaction: the slower the disk, the more reports share a commit, and no worker waits for it.

mod agents;
mod attempts;
mod committer;
mod handlers;
mod reconcile;
mod report;
mod scheduler;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::bigchat::Source;
use crate::domain::ids::ConversationId;
use crate::journal::{Journal, STORAGE_PAUSE, Session, Storage};
use crate::metrics::Metrics;
use crate::our_api::OurApi;
use crate::settings::Settings;
use crate::telemetry::liveness::Liveness;

pub(crate) use self::agents::Agents;
pub use self::attempts::AttemptError;
use self::committer::Committer;
use self::scheduler::Scheduler;

/// How long requests in flight may take at shutdown.
pub const DRAIN: Duration = Duration::from_secs(8);

/// What is delivered and verified, and until when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunMode {
    /// Everything, including the pass in idle time, until shutdown.
    All,
    /// Everything until nothing is due, or nothing can be delivered now.
    Once,
    /// Events and requested verifications, until shutdown.
    Requested,
    /// Requested verifications, but no events, until shutdown.
    Verifications,
}

/// What the scheduler and its workers share.
#[derive(Debug)]
pub struct Delivery {
    pub settings: Settings,
    pub source: Arc<Source>,
    pub our_api: Arc<OurApi>,
    pub journal: Arc<Journal>,
    pub session: Session,
    pub storage: Arc<Storage>,
    pub metrics: Arc<Metrics>,
    pub liveness: Arc<Liveness>,
    /// Notified of events to be delivered.
    pub work_available: Arc<Notify>,
    /// Cancelled at shutdown: no further request is begun.
    pub stopping: CancellationToken,
    pub(crate) agents: Agents,
    /// Chats whose fields were read, but whose messages cannot be read.
    pub(crate) unreadable: Mutex<HashSet<ConversationId>>,
}

impl Delivery {
    /// Delivers events, then records in the journal whether the end was clean: no request given up in flight, and all
    /// reports committed.
    pub async fn run(self, mode: RunMode) {
        let (reports, reported) = mpsc::channel(committer::MAX_CLAIMED);
        let (release, released) = mpsc::unbounded_channel();
        let committer = Committer::new(&self);
        let delivery = Arc::new(self);
        let mut scheduler = Scheduler::new(Arc::clone(&delivery), mode, reports, released);
        let drained = CancellationToken::new();
        let deliver = async {
            scheduler.run().await;
            // Dropping the scheduler closes the channel of reports, which ends the committer.
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
                    tracing::error!("the last deliveries could not be committed; their chats will be read back at the next start");
                    false
                }
            }
        };
        let (nothing_given_up, committed) = tokio::join!(deliver, commit);
        let clean = nothing_given_up && committed;
        let timed_out_until = delivery.our_api.timed_out_until();
        let ended = delivery
            .journal
            .with(move |store| store.end_session(timed_out_until, clean));
        let failed = match timeout(STORAGE_PAUSE, ended).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the disk did not answer in time".to_owned(),
        };
        tracing::error!(
            reason = failed,
            "the end of the session could not be recorded; the chats of the last deliveries will be read back at the next start"
        );
    }
}
