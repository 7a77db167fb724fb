//! BigChat as the poller and delivery use it.

use std::sync::Arc;

use thiserror::Error;
use tokio_util::sync::CancellationToken;

use super::clock::BigChatClock;
use super::{BigChat, Epochs};
use crate::domain::ids::Epoch;
use crate::domain::time::Millis;
use crate::http::{ApiError, Circuit, Http};
use crate::journal::{Journal, JournalError};

#[derive(Debug, Error)]
pub enum SourceError {
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(transparent)]
    Journal(#[from] JournalError),
}

#[derive(Debug)]
pub struct Source {
    pub client: BigChat,
    pub epochs: Epochs,
    pub journal: Arc<Journal>,
    stopping: CancellationToken,
}

impl Source {
    /// `epoch`: the latest one in the journal. Once `stopping` is cancelled, no request is retried.
    pub fn new(
        client: BigChat,
        journal: Arc<Journal>,
        epoch: Epoch,
        stopping: CancellationToken,
    ) -> Self {
        Self {
            client,
            epochs: Epochs::new(epoch),
            journal,
            stopping,
        }
    }

    pub fn http(&self) -> &Http {
        self.client.http()
    }

    pub fn clock(&self) -> &BigChatClock {
        self.client.clock()
    }

    /// Makes a request, at most `attempts` times in a row while it fails transiently.
    pub async fn request<T, F>(&self, attempts: u32, send: impl Fn() -> F) -> Result<T, ApiError>
    where
        F: Future<Output = Result<T, ApiError>>,
    {
        let mut left = attempts;
        loop {
            left = left.saturating_sub(1);
            match send().await {
                Err(error)
                    if error.kind.is_transient() && left > 0 && !self.stopping.is_cancelled() => {}
                result => return result,
            }
        }
    }

    /// Whether the circuit breaker lets requests for details pass.
    pub fn accepts_requests(&self) -> bool {
        let circuit = self.http().circuit(Millis::now());
        !matches!(circuit, Circuit::Open { .. })
    }
}
