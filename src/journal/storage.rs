//! Whether the journal can be written, as seen by polling and delivery.

use std::sync::Mutex;

use super::JournalError;
use crate::mutex::lock;

/// Whether the poller and delivery can currently write to the journal.
#[derive(Debug, Default)]
pub struct Storage {
    poller: Writer,
    delivery: Writer,
}

/// Why the journal refuses one of its writers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub reason: String,
    /// The file was deleted or replaced.
    pub is_replaced: bool,
}

/// `None`: its latest write succeeded.
#[derive(Debug, Default)]
struct Writer(Mutex<Option<Refusal>>);

impl Writer {
    /// Records a failed write. Returns whether the previous one had succeeded.
    fn failed(&self, error: &JournalError) -> bool {
        let refusal = Refusal {
            reason: error.to_string(),
            is_replaced: matches!(error, JournalError::Replaced(_)),
        };
        lock(&self.0).replace(refusal).is_none()
    }

    /// Records a successful write. Returns whether the previous one had failed.
    fn succeeded(&self) -> bool {
        lock(&self.0).take().is_some()
    }
}

impl Storage {
    /// Records that the poller could not write.
    pub fn polling_failed(&self, error: &JournalError) {
        if self.poller.failed(error) {
            tracing::error!(reason = %error, "the journal cannot be written; polling pauses until it can");
        }
    }

    /// Records that the poller could write.
    pub fn polling_recovered(&self) {
        if self.poller.succeeded() {
            tracing::info!("the journal can be written again; polling continues");
        }
    }

    /// Records that delivery could not write.
    pub fn delivery_failed(&self, error: &JournalError) {
        if self.delivery.failed(error) {
            tracing::error!(reason = %error, "the journal cannot be written; pausing deliveries until it can");
        }
    }

    /// Records that delivery could write.
    pub fn delivery_recovered(&self) {
        if self.delivery.succeeded() {
            tracing::info!("the journal can be written again; deliveries continue");
        }
    }

    /// Whether the journal refuses the poller.
    pub fn refuses_polling(&self) -> bool {
        lock(&self.poller.0).is_some()
    }

    /// Whether the journal refuses delivery.
    pub fn refuses_delivery(&self) -> bool {
        lock(&self.delivery.0).is_some()
    }

    /// Why the journal refuses either of them; `None`: it does not.
    pub fn refusal(&self) -> Option<Refusal> {
        let refusal = lock(&self.poller.0).clone();
        refusal.or_else(|| lock(&self.delivery.0).clone())
    }
}
