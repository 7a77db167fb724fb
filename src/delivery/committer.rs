//! The committer: commits all queued reports in one transaction, and releases their conversations.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::{Receiver, UnboundedSender};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::Delivery;
use crate::domain::ids::ConversationId;
use crate::domain::progress::Report;
use crate::domain::time::Millis;
use crate::journal::{Journal, JournalError, STORAGE_PAUSE, Storage};

/// Maximum number of claimed conversations: in progress, loaded ahead, or waiting for the commit of their reports. It
/// is so large that no worker waits for a commit of 20 ms.
pub(super) const MAX_CLAIMED: usize = 1024;

/// After a commit, the committer pauses for this many times its duration, so that reports that arrive meanwhile share
/// the next commit and the disk is free for other writers. No request is delayed, since enough conversations are
/// claimed ahead.
const PAUSE_FACTOR: u32 = 20;

/// Maximum pause, so that a crash leaves few chats to read back.
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// The result of a batch.
#[derive(Debug, Default)]
pub(super) struct Released {
    pub(super) committed: Vec<ConversationId>,
    /// How many conversations are set aside until the next start, since their reports cannot be committed.
    pub(super) set_aside: usize,
}

pub(super) struct Committer {
    journal: Arc<Journal>,
    storage: Arc<Storage>,
    session: i64,
    stopping: CancellationToken,
}

impl Committer {
    pub(super) fn new(delivery: &Delivery) -> Self {
        Self {
            journal: Arc::clone(&delivery.journal),
            storage: Arc::clone(&delivery.storage),
            session: delivery.session.id,
            stopping: delivery.stopping.clone(),
        }
    }

    /// Commits until the channel of reports is closed. While the database cannot be written, the same batch
    /// is retried.
    pub(super) async fn run(
        &self,
        mut reported: Receiver<Report>,
        release: UnboundedSender<Released>,
    ) {
        let mut batch = Vec::new();
        while reported.recv_many(&mut batch, MAX_CLAIMED).await > 0 {
            let began = Instant::now();
            let reports = Arc::new(std::mem::take(&mut batch));
            // A scheduler that has ended needs no release.
            release.send(self.commit(reports).await).ok();
            if !self.stopping.is_cancelled() {
                sleep((began.elapsed() * PAUSE_FACTOR).min(PAUSE_MAX)).await;
            }
        }
    }

    /// Commits a batch, if possible in one transaction. If one report is at fault, it is found by bisection, and the
    /// others are committed.
    async fn commit(&self, batch: Arc<Vec<Report>>) -> Released {
        let mut released = Released::default();
        let mut rows = 0..batch.len();
        while !rows.is_empty() {
            match self.try_commit(Arc::clone(&batch), rows.clone()).await {
                Ok(()) => {
                    let committed = batch[rows.clone()]
                        .iter()
                        .map(|report| report.conversation.id);
                    released.committed.extend(committed);
                }
                Err(error) if error.is_transient() => {
                    self.refused(&error).await;
                    continue;
                }
                Err(_) if rows.len() > 1 => {
                    rows.end = rows.start + rows.len() / 2;
                    continue;
                }
                Err(error) => {
                    released.set_aside += 1;
                    tracing::error!(
                        row = batch[rows.start].conversation.id.0, reason = %error,
                        "a delivery could not be committed; the conversation is set aside until the next start"
                    );
                }
            }
            rows = rows.end..batch.len();
        }
        released
    }

    async fn refused(&self, error: &JournalError) {
        self.storage.delivery.failed(error);
        sleep(STORAGE_PAUSE).await;
    }

    async fn try_commit(
        &self,
        batch: Arc<Vec<Report>>,
        rows: std::ops::Range<usize>,
    ) -> Result<(), JournalError> {
        let session = self.session;
        let committed = self
            .journal
            .with(move |store| store.commit(&batch[rows], session, Millis::now()));
        committed.await?;
        self.storage.delivery.succeeded();
        Ok(())
    }
}
