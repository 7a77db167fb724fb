//! BigChat as the poller and delivery use it.

use std::sync::Arc;

use thiserror::Error;
use tokio_util::sync::CancellationToken;

use super::clock::BigChatClock;
use super::{Advisor, BigChat, Details, Epochs, Page};
use crate::domain::ids::{AdvisorId, Epoch};
use crate::domain::time::Millis;
use crate::http::{Api, ApiError, Circuit, ErrorKind, Http};
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
    client: BigChat,
    pub(super) epochs: Epochs,
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

    pub fn epoch(&self) -> Epoch {
        self.epochs.current()
    }

    /// Requests a page of events, at most `attempts` times in a row while this fails transiently.
    pub async fn events(&self, query: &str, attempts: u32) -> Result<Page, ApiError> {
        let page = self.request(attempts, || self.client.events(query)).await;
        self.epochs.answered(page.is_ok());
        page
    }

    /// The same for the details of a conversation. They belong to BigChat's present epoch, which the caller has to
    /// check.
    pub(super) async fn conversation(&self, id: i64, attempts: u32) -> Result<Details, ApiError> {
        self.request(attempts, || self.client.conversation(id))
            .await
            .inspect(|_| self.epochs.answered(true))
    }

    /// Requests an advisor, once.
    pub(super) async fn advisor(&self, id: AdvisorId) -> Result<Advisor, ApiError> {
        let advisor = self.client.advisor(id.0).await;
        advisor.inspect(|_| self.epochs.answered(true))
    }

    /// Whether BigChat does not know a conversation or an advisor. A not-found response is believed only while BigChat
    /// answers, and an unusable record proves nothing.
    pub(super) fn is_gone(&self, error: &ApiError) -> bool {
        matches!(error.kind, ErrorKind::NotFound(_)) && self.epochs.answers() == Some(true)
    }

    /// Makes a request, at most `attempts` times in a row while it fails transiently.
    async fn request<T, F>(&self, attempts: u32, send: impl Fn() -> F) -> Result<T, ApiError>
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

    /// Makes a request for details if the circuit breaker lets it pass.
    pub(super) async fn unless_down<T>(
        &self,
        request: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        match self.http().circuit(Millis::now()) {
            Circuit::Open { .. } => Err(not_sent("BigChat is down; the request waits")),
            _ => request.await,
        }
    }
}

pub(super) fn not_sent(reason: &str) -> ApiError {
    ApiError::not_sent(Api::BigChat, ErrorKind::Unreachable, reason)
}
