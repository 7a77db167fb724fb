//! BigChat as the poller and delivery ask it: what it answers is about the epoch that was asked for, or no answer.

use std::sync::Arc;

use thiserror::Error;
use tokio_util::sync::CancellationToken;

use super::clock::BigChatClock;
use super::{BigChat, Epochs};
use crate::domain::time::Millis;
use crate::http::{ApiError, Circuit, Http};
use crate::journal::{Journal, JournalError};

/// Why BigChat cannot be asked, or gave no answer.
#[derive(Debug, Error)]
pub enum SourceError {
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// BigChat, and what is known of its epochs.
#[derive(Debug)]
pub struct Source {
    pub client: BigChat,
    pub epochs: Epochs,
    pub journal: Arc<Journal>,
    stopping: CancellationToken,
}

impl Source {
    /// BigChat behind a client; its epochs are kept in the journal. Once `stopping` is cancelled, nothing is asked twice.
    pub fn new(client: BigChat, journal: Arc<Journal>, stopping: CancellationToken) -> Self {
        Self {
            client,
            epochs: Epochs::default(),
            journal,
            stopping,
        }
    }

    /// What carries its requests.
    pub fn http(&self) -> &Http {
        self.client.http()
    }

    /// Its clock.
    pub fn clock(&self) -> &BigChatClock {
        self.client.clock()
    }

    /// Asks, at most `tries` times at once if there is no usable answer.
    pub async fn ask<T, F>(&self, tries: u32, question: impl Fn() -> F) -> Result<T, ApiError>
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

    /// Whether it may be asked about a conversation or an advisor.
    pub fn may_be_asked(&self) -> bool {
        let circuit = self.http().circuit(Millis::now());
        !matches!(circuit, Circuit::Open { .. })
    }
}
