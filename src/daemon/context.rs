//! What polling and delivery share: both APIs, the journal, and what is known as of now.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::bigchat::BigChat;
use crate::bigchat::Source;
use crate::domain::ids::{AdvisorId, Epoch, EventId};
use crate::http::{Api, ApiStatus, Http};
use crate::journal::{Journal, JournalError, RateLimits, Session, Storage};
use crate::our_api::OurApi;
use crate::poller::Signals;
use crate::settings::Settings;
use crate::telemetry::liveness::Liveness;
use crate::telemetry::metrics::Metrics;

/// Shared by the poller, delivery and the handlers.
#[derive(Debug)]
pub struct Context {
    /// The settings.
    pub settings: Settings,
    /// The source of events.
    pub bigchat: Arc<Source>,
    /// Where they go.
    pub our_api: OurApi,
    /// Where both are kept.
    pub journal: Arc<Journal>,
    /// This session of the daemon.
    pub session: Session,
    /// Whether the journal can be written.
    pub storage: Arc<Storage>,
    /// What is counted and measured.
    pub metrics: Arc<Metrics>,
    /// Whether polling and delivery turn over.
    pub liveness: Arc<Liveness>,
    /// Told when there is something new to deliver.
    pub work_available: Arc<Notify>,
    /// Cancelled when BigChat was read up to now for the first time, or could not be.
    pub polled: CancellationToken,
    /// Cancelled when the daemon is to stop: no further request is begun.
    pub stopping: CancellationToken,
    /// Held while an agent is looked for and created, so that two conversations do not both create it.
    pub creating_agent: tokio::sync::Mutex<()>,
    /// The agents of advisors; `None`: there is none.
    agents: Mutex<HashMap<(Epoch, AdvisorId), Option<Uuid>>>,
    /// The agents that a verification has asked for, and whether they are gone.
    verified_agents: Mutex<HashMap<(i64, Uuid), bool>>,
    replay_until: Arc<AtomicI64>,
    losses: AtomicI64,
}

impl Context {
    /// Puts together what is shared.
    pub fn new(
        settings: Settings,
        bigchat: BigChat,
        our_api: OurApi,
        journal: Arc<Journal>,
        session: Session,
        metrics: Metrics,
        stopping: CancellationToken,
    ) -> Self {
        bigchat.http().hold_until(session.rate_limits.bigchat);
        our_api.http().hold_until(session.rate_limits.our_api);
        our_api.restore_timed_out(session.rate_limits.late);
        let (losses, last_event) = (session.losses, session.last_event);
        let liveness = Liveness::new(settings.request_timeout, Instant::now());
        Self {
            settings,
            bigchat: Arc::new(Source::new(bigchat, Arc::clone(&journal), stopping.clone())),
            our_api,
            journal,
            session,
            storage: Arc::default(),
            metrics: Arc::new(metrics),
            liveness: Arc::new(liveness),
            work_available: Arc::default(),
            polled: CancellationToken::new(),
            stopping,
            creating_agent: tokio::sync::Mutex::new(()),
            agents: Mutex::new(HashMap::new()),
            verified_agents: Mutex::default(),
            replay_until: Arc::new(AtomicI64::new(last_event.0)),
            losses: AtomicI64::new(losses),
        }
    }

    /// Whether an event may have been delivered by another copy of the database: it waited when the session started, or
    /// came from a window that began before.
    pub fn may_be_delivered(&self, event: EventId) -> bool {
        event <= self.replay_until()
    }

    /// The latest event of which [`Self::may_be_delivered`] is true.
    pub fn replay_until(&self) -> EventId {
        EventId(self.replay_until.load(Ordering::Relaxed))
    }

    /// What the poller tells others and they tell it.
    pub fn poller_signals(&self) -> Signals {
        Signals {
            metrics: Arc::clone(&self.metrics),
            storage: Arc::clone(&self.storage),
            liveness: Arc::clone(&self.liveness),
            work_available: Arc::clone(&self.work_available),
            caught_up: self.polled.clone(),
            stopping: self.stopping.clone(),
            replay_until: Arc::clone(&self.replay_until),
        }
    }

    /// How many losses of OurAPI there have been.
    pub fn losses(&self) -> i64 {
        self.losses.load(Ordering::Relaxed)
    }

    /// OurAPI has lost something: nothing that is known of it is relied on before it is looked for.
    pub async fn our_api_lost_data(&self) -> Result<(), JournalError> {
        let losses = self.journal.with(|store| store.record_loss()).await?;
        self.losses.fetch_max(losses, Ordering::Relaxed);
        self.known_agents().clear();
        Ok(())
    }

    /// The agents of advisors that were needed so far.
    pub fn known_agents(&self) -> MutexGuard<'_, HashMap<(Epoch, AdvisorId), Option<Uuid>>> {
        self.agents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The agents that a verification, by its id, has asked for, and whether they are gone.
    pub fn verified_agents(&self) -> MutexGuard<'_, HashMap<(i64, Uuid), bool>> {
        self.verified_agents
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Until when the APIs asked to be left alone.
    pub fn rate_limits(&self) -> RateLimits {
        RateLimits {
            bigchat: self.bigchat.http().not_before(),
            our_api: self.our_api.http().not_before(),
            late: self.our_api.timed_out_until(),
        }
    }

    /// What carries the requests to an API.
    pub fn http(&self, api: Api) -> &Http {
        match api {
            Api::BigChat => self.bigchat.http(),
            Api::OurApi => self.our_api.http(),
        }
    }

    /// How an API is now, with the latest exchange.
    pub fn api(&self, api: Api) -> ApiStatus {
        self.http(api).status()
    }
}
