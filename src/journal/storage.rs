//! Whether the journal can be written, as polling and delivery find it.

use std::sync::atomic::{AtomicBool, Ordering};

use super::JournalError;

/// Whether the journal takes what those have for it who write to it again and again.
#[derive(Debug, Default)]
pub struct Storage {
    /// It refuses the poller.
    pub polling: AtomicBool,
    /// It refuses delivery.
    pub delivery: AtomicBool,
}

impl Storage {
    /// Delivery could not use it.
    pub fn delivery_failed(&self, error: &JournalError) {
        if !self.delivery.swap(true, Ordering::Relaxed) {
            tracing::error!(reason = %error, "the journal cannot be written; pausing deliveries until it can");
        }
    }

    /// Delivery could use it.
    pub fn recovered(&self) {
        if self.delivery.load(Ordering::Relaxed) {
            self.delivery.store(false, Ordering::Relaxed);
            tracing::info!("the journal can be written again");
        }
    }

    /// Whether it refuses anybody.
    pub fn refuses(&self) -> bool {
        self.polling.load(Ordering::Relaxed) || self.delivery.load(Ordering::Relaxed)
    }
}
