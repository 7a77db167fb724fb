//! Counts of what was done, for the metrics and for the summary in the log.

use std::sync::atomic::{AtomicU64, Ordering};

/// The counts since the daemon started.
#[derive(Debug, Default)]
pub struct Counters {
    /// Polls, completed or not.
    pub polls: Counter,
    /// Polls that failed because of BigChat or the journal.
    pub polls_failed: Counter,
    /// New events received.
    pub received: Counter,
    /// Events delivered.
    pub delivered: Counter,
    /// Failed attempts that will be repeated.
    pub attempts_failed: Counter,
    /// Events that became dead letters.
    pub failed: Counter,
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to the count.
    pub fn add(&self, more: u32) {
        self.0.fetch_add(more.into(), Ordering::Relaxed);
    }

    /// The current count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Counters {
    /// Events that no longer wait.
    pub fn settled(&self) -> u64 {
        self.delivered.get() + self.failed.get()
    }
}
