//! BigChat's present epoch, as far as it is known just now.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};

use crate::domain::ids::Epoch;
use crate::domain::time::Timestamp;
use crate::journal::{Journal, JournalError};

/// How many probes may go without BigChat's conversation 1 before it is requested again: with a probe every 10 s, some ten
/// minutes.
const FIRST_CONVERSATION_AGAIN: u32 = 64;

/// What is known of the present epoch.
#[derive(Debug, Default)]
pub struct Epochs {
    /// 0: not read from the journal yet.
    current: Arc<AtomicI64>,
    verified_until: AtomicI64,
    reports_events: AtomicBool,
    probes_without_first: AtomicU32,
}

impl Epochs {
    /// The present epoch. Delivery asks for it with each use of what BigChat reports, and waits for no commit to be told.
    pub async fn current(&self, journal: &Journal) -> Result<Epoch, JournalError> {
        match self.current.load(Ordering::Acquire) {
            0 => {
                let mark = self.mark();
                let read = journal.with(move |store| {
                    let epoch = store.epoch()?;
                    Ok(Epoch(
                        mark.fetch_max(epoch.0, Ordering::AcqRel).max(epoch.0),
                    ))
                });
                read.await
            }
            epoch => Ok(Epoch(epoch)),
        }
    }

    /// Where it is, to be raised by the operation that begins one: every later operation of the journal finds it there.
    pub fn mark(&self) -> Arc<AtomicI64> {
        Arc::clone(&self.current)
    }

    /// Latest BigChat time at which the present epoch was verified.
    pub fn verified_until(&self) -> Timestamp {
        Timestamp::clamped(self.verified_until.load(Ordering::Relaxed))
    }

    /// BigChat had not restarted by then. Not the latest time there ever was: its clock may have been ahead for a while.
    pub fn verified(&self, at: Timestamp) {
        self.verified_until.store(at.unix(), Ordering::Relaxed);
    }

    /// Whether BigChat answered when it was last polled: only then is its 404 for anything else believed.
    pub fn reports_events(&self) -> bool {
        self.reports_events.load(Ordering::Relaxed)
    }

    /// BigChat was polled, with an answer or not.
    pub fn polled(&self, answered: bool) {
        self.reports_events.store(answered, Ordering::Relaxed);
    }

    /// Whether to request BigChat's conversation 1: a BigChat that does not know it may not have come up yet, or be without
    /// one for good. Then it is requested less and less often.
    pub fn requests_first_conversation(&self) -> bool {
        let probes = self.probes_without_first.load(Ordering::Relaxed);
        let requests = probes.is_power_of_two() || probes.is_multiple_of(FIRST_CONVERSATION_AGAIN);
        if !requests {
            self.probed_without_first();
        }
        requests
    }

    /// A probe had to do without conversation 1.
    pub fn probed_without_first(&self) {
        self.probes_without_first.fetch_add(1, Ordering::Relaxed);
    }
}
