//! Whether the journal can be written, as seen by polling and delivery.

use std::sync::Mutex;

use super::JournalError;
use crate::mutex::lock;

/// Whether the poller and delivery can currently write to the journal.
#[derive(Debug)]
pub struct Storage {
    pub poller: Writer,
    pub delivery: Writer,
}

/// Why the journal refuses one of its writers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub reason: String,
    /// The file was deleted or replaced.
    pub is_replaced: bool,
}

#[derive(Debug)]
pub struct Writer {
    /// What the writer does, as the log says it.
    work: &'static str,
    /// `None`: the latest write succeeded.
    refusal: Mutex<Option<Refusal>>,
}

impl Default for Storage {
    fn default() -> Self {
        let writer = |work| Writer {
            work,
            refusal: Mutex::default(),
        };
        Self {
            poller: writer("polling"),
            delivery: writer("delivery"),
        }
    }
}

impl Storage {
    /// Why the journal refuses either of them; `None`: it does not.
    pub fn refusal(&self) -> Option<Refusal> {
        let refusal = lock(&self.poller.refusal).clone();
        refusal.or_else(|| lock(&self.delivery.refusal).clone())
    }
}

impl Writer {
    /// Records a failed write.
    pub fn failed(&self, error: &JournalError) {
        let refusal = Refusal {
            reason: error.to_string(),
            is_replaced: matches!(error, JournalError::Replaced(_)),
        };
        if lock(&self.refusal).replace(refusal).is_none() {
            tracing::error!(reason = %error, "the journal cannot be written; {} pauses until it can", self.work);
        }
    }

    /// Records a successful write.
    pub fn succeeded(&self) {
        if lock(&self.refusal).take().is_some() {
            tracing::info!("the journal can be written again; {} continues", self.work);
        }
    }

    pub fn is_refused(&self) -> bool {
        lock(&self.refusal).is_some()
    }
}
