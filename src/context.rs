//! What polling and delivery share: both APIs, the journal, and what is known as of now.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::bigchat::BigChat;
use crate::domain::ids::{AdvisorId, Epoch, EventId};
use crate::health::Storage;
use crate::http::{Api, ApiError, ApiStatus, Circuit, Http};
use crate::journal::{Journal, JournalError, Session, Throttles};
use crate::metrics::Metrics;
use crate::our_api::OurApi;
use crate::pulse::Pulse;
use crate::resolve::epochs::Epochs;
use crate::settings::Settings;
use crate::time::Millis;

/// Shared by the poller, delivery and the handlers.
#[derive(Debug)]
pub struct Context {
    /// The settings.
    pub settings: Settings,
    /// The source of events.
    pub bigchat: BigChat,
    /// From one restart of it to the next.
    pub epochs: Epochs,
    /// Where they go.
    pub our_api: OurApi,
    /// Where both are kept.
    pub journal: Journal,
    /// This session of the daemon.
    pub session: Session,
    /// Whether the journal can be written.
    pub storage: Storage,
    /// What is counted and measured.
    pub metrics: Metrics,
    /// Whether polling and delivery turn over.
    pub pulse: Pulse,
    /// Told when there is something new to deliver.
    pub work_available: Notify,
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
        journal: Journal,
        session: Session,
        metrics: Metrics,
        stopping: CancellationToken,
    ) -> Self {
        bigchat.http().leave_alone(session.rate_limits.bigchat);
        our_api.http().leave_alone(session.rate_limits.our_api);
        our_api.recall_given_up(session.rate_limits.late);
        let (losses, last_event) = (session.losses, session.last_event);
        let pulse = Pulse::new(settings.request_timeout, Instant::now());
        Self {
            settings,
            bigchat,
            epochs: Epochs::default(),
            our_api,
            journal,
            session,
            storage: Storage::default(),
            metrics,
            pulse,
            work_available: Notify::new(),
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

    /// Where that is stored, to be raised with the events of windows that began before the session did.
    pub fn replay_mark(&self) -> Arc<AtomicI64> {
        Arc::clone(&self.replay_until)
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
    pub fn throttles(&self) -> Throttles {
        Throttles {
            bigchat: self.bigchat.http().asked_until(),
            our_api: self.our_api.http().asked_until(),
            late: self.our_api.held_until(),
        }
    }

    /// Asks BigChat, at most `tries` times at once if it gives no usable answer.
    pub async fn ask_bigchat<T, F>(
        &self,
        tries: u32,
        question: impl Fn() -> F,
    ) -> Result<T, ApiError>
    where
        F: Future<Output = Result<T, ApiError>>,
    {
        let mut left = tries;
        loop {
            left = left.saturating_sub(1);
            match question().await {
                Err(error)
                    if error.kind.is_transient() && left > 0 && !self.stopping.is_cancelled() => {}
                answer => return answer,
            }
        }
    }

    /// Whether BigChat may be asked about a conversation or an advisor.
    pub fn may_ask_bigchat(&self) -> bool {
        let circuit = self.bigchat.http().circuit(Millis::now());
        !matches!(circuit, Circuit::Open { .. })
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
