//! Whether the journal can be written, as polling and delivery find it.

use std::sync::atomic::{AtomicBool, Ordering};

use super::JournalError;

/// Whether the poller and delivery can currently write to the journal.
#[derive(Debug, Default)]
pub struct Storage {
    /// The journal refuses the poller.
    pub polling: AtomicBool,
    /// The journal refuses delivery.
    pub delivery: AtomicBool,
}

impl Storage {
    /// Records that delivery could not write.
    pub fn delivery_failed(&self, error: &JournalError) {
        if !self.delivery.swap(true, Ordering::Relaxed) {
            tracing::error!(reason = %error, "the journal cannot be written; pausing deliveries until it can");
        }
    }

    /// Records that delivery could write.
    pub fn recovered(&self) {
        if self.delivery.load(Ordering::Relaxed) {
            self.delivery.store(false, Ordering::Relaxed);
            tracing::info!("the journal can be written again; deliveries continue");
        }
    }

    /// Whether the journal refuses either of them.
    pub fn refuses(&self) -> bool {
        self.polling.load(Ordering::Relaxed) || self.delivery.load(Ordering::Relaxed)
    }
}
