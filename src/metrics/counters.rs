//! What was done so far, counted for the metrics and for the line that sums it up.

use std::sync::atomic::{AtomicU64, Ordering};

/// What was done since the daemon started.
#[derive(Debug, Default)]
pub struct Counters {
    /// Polls, read to their end or not.
    pub polls: Counter,
    /// Those that were not, through BigChat's or the journal's fault.
    pub polls_failed: Counter,
    /// New events that BigChat received.
    pub received: Counter,
    /// Events that now stand in OurAPI.
    pub delivered: Counter,
    /// Attempts to deliver an event that have failed, and are made again.
    pub attempts_failed: Counter,
    /// Events that went to the failed events.
    pub failed: Counter,
}

/// Only ever grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// So many more.
    pub fn add(&self, more: u32) {
        self.0.fetch_add(more.into(), Ordering::Relaxed);
    }

    /// How many so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Counters {
    /// Events that need not be thought of any more.
    pub fn settled(&self) -> u64 {
        self.delivered.get() + self.failed.get()
    }
}
