//! The state of BigChat's current epoch, in memory.

use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use crate::domain::ids::Epoch;
use crate::mutex::lock;

/// A missing conversation 1 is requested again at least once in this many probes: with a probe every 10 s, about every
/// ten minutes.
const FIRST_CONVERSATION_AGAIN: u32 = 64;

#[derive(Debug, Default)]
pub(super) struct Epochs {
    current: Arc<AtomicI64>,
    answered: Mutex<Option<bool>>,
    probes_without_first: AtomicU32,
}

impl Epochs {
    /// `current`: the latest epoch in the journal.
    pub(super) fn new(current: Epoch) -> Self {
        Self {
            current: Arc::new(AtomicI64::new(current.0)),
            ..Self::default()
        }
    }

    /// The current epoch. It is in memory, since delivery checks it for each use of details and must not wait for a
    /// commit.
    pub(super) fn current(&self) -> Epoch {
        Epoch(self.current.load(Ordering::Acquire))
    }

    /// The current epoch, to be raised inside the journal operation that begins an epoch, so that every later operation
    /// sees it.
    pub(super) fn mark(&self) -> Arc<AtomicI64> {
        Arc::clone(&self.current)
    }

    /// Whether the latest request for events succeeded, or a request for details since then; `None`: there was none.
    /// While requests for events fail, a not-found response for details proves nothing.
    pub(super) fn answers(&self) -> Option<bool> {
        *lock(&self.answered)
    }

    pub(super) fn answered(&self, succeeded: bool) {
        *lock(&self.answered) = Some(succeeded);
    }

    /// Whether to request BigChat's conversation 1. If BigChat does not know it, BigChat may have just started, or may
    /// not have a conversation 1 at all, so it is requested less and less often.
    pub(super) fn requests_first_conversation(&self) -> bool {
        let probes = self.probes_without_first.load(Ordering::Relaxed);
        let requests = probes.is_power_of_two() || probes.is_multiple_of(FIRST_CONVERSATION_AGAIN);
        if !requests {
            self.probed_without_first();
        }
        requests
    }

    /// Counts a probe without conversation 1.
    pub(super) fn probed_without_first(&self) {
        self.probes_without_first.fetch_add(1, Ordering::Relaxed);
    }
}
