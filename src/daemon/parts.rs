//! The parts of the daemon, and those that polling, delivery and the console receive.

use std::sync::{Arc, Mutex};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::bigchat::Source;
use crate::console::Console;
use crate::delivery::{Agents, Delivery};
use crate::http::Apis;
use crate::journal::{Journal, Session, Storage};
use crate::metrics::Metrics;
use crate::our_api::OurApi;
use crate::poller::{Poller, Signals};
use crate::settings::Settings;
use crate::telemetry::liveness::Liveness;

/// Only the daemon has all of them; see the [module](self).
#[derive(Debug)]
pub(crate) struct Parts {
    pub(super) settings: Settings,
    pub(super) apis: Apis,
    pub(super) source: Arc<Source>,
    pub(super) our_api: Arc<OurApi>,
    pub(crate) journal: Arc<Journal>,
    pub(super) session: Session,
    pub(super) storage: Arc<Storage>,
    pub(super) metrics: Arc<Metrics>,
    pub(crate) liveness: Arc<Liveness>,
    pub(super) work_available: Arc<Notify>,
    /// Cancelled when the first poll up to the present has ended, successfully or not.
    pub(super) caught_up: CancellationToken,
    /// Cancelled when the daemon is to stop. From then on, no request is begun.
    pub(super) stopping: CancellationToken,
}

impl Parts {
    pub(super) fn poller(&self) -> Poller {
        let signals = Signals {
            metrics: Arc::clone(&self.metrics),
            storage: Arc::clone(&self.storage),
            liveness: Arc::clone(&self.liveness),
            work_available: Arc::clone(&self.work_available),
            caught_up: self.caught_up.clone(),
            stopping: self.stopping.clone(),
            replay_until: self.session.replay_until.clone(),
        };
        let (source, journal) = (Arc::clone(&self.source), Arc::clone(&self.journal));
        Poller::new(source, journal, self.settings.clone(), signals)
    }

    pub(super) fn delivery(&self) -> Delivery {
        Delivery {
            settings: self.settings.clone(),
            source: Arc::clone(&self.source),
            our_api: Arc::clone(&self.our_api),
            journal: Arc::clone(&self.journal),
            session: self.session.clone(),
            storage: Arc::clone(&self.storage),
            metrics: Arc::clone(&self.metrics),
            liveness: Arc::clone(&self.liveness),
            work_available: Arc::clone(&self.work_available),
            stopping: self.stopping.clone(),
            agents: Agents::new(
                &self.settings,
                &self.session,
                Arc::clone(&self.source),
                Arc::clone(&self.our_api),
                Arc::clone(&self.journal),
            ),
            unreadable: Mutex::default(),
        }
    }

    pub(crate) fn console(&self) -> Console {
        Console {
            settings: self.settings.clone(),
            apis: self.apis.clone(),
            our_api: Arc::clone(&self.our_api),
            journal: Arc::clone(&self.journal),
            storage: Arc::clone(&self.storage),
            metrics: Arc::clone(&self.metrics),
            liveness: Arc::clone(&self.liveness),
            work_available: Arc::clone(&self.work_available),
        }
    }
}
