//! The state that all workers share.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::Delivery;
use super::agents::Agents;
use crate::bigchat::Source;
use crate::domain::conversation::Pending;
use crate::domain::ids::ConversationId;
use crate::domain::progress::Claim;
use crate::journal::{Journal, Session, Storage};
use crate::metrics::Metrics;
use crate::our_api::OurApi;
use crate::settings::Settings;
use crate::telemetry::liveness::Liveness;

#[derive(Debug)]
pub(super) struct Worker {
    pub(super) settings: Settings,
    pub(super) source: Arc<Source>,
    pub(super) our_api: Arc<OurApi>,
    pub(super) journal: Arc<Journal>,
    pub(super) session: Session,
    pub(super) storage: Arc<Storage>,
    pub(super) agents: Agents,
    pub(super) metrics: Arc<Metrics>,
    pub(super) liveness: Arc<Liveness>,
    pub(super) work_available: Arc<Notify>,
    /// Cancelled at shutdown: no further request is begun.
    pub(super) stopping: CancellationToken,
    /// Chats whose fields were read, but whose messages cannot be read.
    unreadable: Mutex<HashSet<ConversationId>>,
}

impl Worker {
    pub(super) fn new(delivery: Delivery) -> Self {
        let Delivery {
            settings,
            source,
            our_api,
            journal,
            session,
            storage,
            metrics,
            liveness,
            work_available,
            stopping,
        } = delivery;
        let agents = Agents::new(
            Arc::clone(&source),
            Arc::clone(&our_api),
            settings.rebuild.restores(),
            session.losses,
        );
        Self {
            settings,
            source,
            our_api,
            journal,
            session,
            storage,
            agents,
            metrics,
            liveness,
            work_available,
            stopping,
            unreadable: Mutex::default(),
        }
    }

    /// Records that the chat's messages cannot be read. Its fields were read.
    pub(super) fn record_unreadable(&self, conversation: ConversationId) {
        self.unreadable().insert(conversation);
    }

    pub(super) fn is_unreadable(&self, conversation: ConversationId) -> bool {
        self.unreadable().contains(&conversation)
    }

    fn unreadable(&self) -> MutexGuard<'_, HashSet<ConversationId>> {
        self.unreadable
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the chat may have a waiting event that has not failed: a newer copy of this database may have delivered
    /// it, or it was delivered before OurAPI reported the chat lost, and the chat found since then was not read.
    pub(super) fn may_be_delivered(&self, claim: &Claim, event: &Pending) -> bool {
        event.id <= self.session.replay_until.get() || event.restored && !claim.is_read
    }
}
