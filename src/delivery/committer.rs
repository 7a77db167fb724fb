//! The committer: takes the reports that have piled up into one transaction, and releases their conversations.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::{Receiver, UnboundedSender};
use tokio::time::{Instant, sleep};

use crate::daemon::context::Context;
use crate::domain::ids::ConversationId;
use crate::domain::progress::{Lost, Report};
use crate::domain::time::Millis;
use crate::journal::{JournalError, STORAGE_PAUSE};

use super::scheduler::MAX_CLAIMED;

/// A commit is followed by a pause of so many times as long as it took, so that it is shared by the reports of that time
/// and the disk is left to others. It delays no request: as many conversations are claimed ahead.
const PAUSE_FACTOR: u32 = 20;

/// The longest pause: what a crash leaves to be read back stays small.
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// What became of a claim.
#[derive(Debug)]
pub(super) enum ToCommit {
    Report(Box<Report>),
    /// Its worker has panicked.
    Lost(Lost),
}

/// What became of a batch.
#[derive(Debug, Default)]
pub(super) struct Released {
    /// The conversations whose reports are committed.
    pub(super) committed: Vec<ConversationId>,
    /// How many are set aside until the next start, since their reports can never be committed.
    pub(super) set_aside: usize,
}

impl ToCommit {
    fn conversation(&self) -> ConversationId {
        match self {
            Self::Report(report) => report.conversation.id,
            Self::Lost(lost) => lost.conversation,
        }
    }
}

/// Commits until the last report. While the disk refuses, the same batch is tried again and nothing is forgotten.
pub(super) async fn run(
    context: &Context,
    mut reported: Receiver<ToCommit>,
    release: UnboundedSender<Released>,
) {
    let mut batch = Vec::new();
    while reported.recv_many(&mut batch, MAX_CLAIMED).await > 0 {
        let began = Instant::now();
        let reports = Arc::new(std::mem::take(&mut batch));
        // A scheduler that has ended needs no release.
        release.send(commit(context, reports).await).ok();
        if !context.stopping.is_cancelled() {
            sleep((began.elapsed() * PAUSE_FACTOR).min(PAUSE_MAX)).await;
        }
    }
}

async fn commit(context: &Context, batch: Arc<Vec<ToCommit>>) -> Released {
    let mut released = Released::default();
    loop {
        match try_commit(context, Arc::clone(&batch), 0..batch.len()).await {
            Ok(()) => {
                released.committed = batch.iter().map(ToCommit::conversation).collect();
                return released;
            }
            Err(error) if error.is_transient() => refused(context, &error).await,
            // One row is at fault: the others are committed without it.
            Err(_) => break,
        }
    }
    let mut next = 0;
    while next < batch.len() {
        let conversation = batch[next].conversation();
        match try_commit(context, Arc::clone(&batch), next..next + 1).await {
            Err(error) if error.is_transient() => {
                refused(context, &error).await;
                continue;
            }
            Err(error) => {
                released.set_aside += 1;
                tracing::error!(
                    row = conversation.0, reason = %error,
                    "a delivery could not be committed; the conversation is set aside until the next start"
                );
            }
            Ok(()) => released.committed.push(conversation),
        }
        next += 1;
    }
    released
}

async fn refused(context: &Context, error: &JournalError) {
    context.storage.delivery_failed(error);
    sleep(STORAGE_PAUSE).await;
}

async fn try_commit(
    context: &Context,
    batch: Arc<Vec<ToCommit>>,
    rows: std::ops::Range<usize>,
) -> Result<(), JournalError> {
    let session = context.session.id;
    let committed = context.journal.with(move |store| {
        let reports = batch[rows].iter().map(|row| match row {
            ToCommit::Report(report) => Ok(report.as_ref()),
            ToCommit::Lost(lost) => Err(lost),
        });
        store.commit(reports, session, Millis::now())
    });
    committed.await?;
    context.storage.recovered();
    Ok(())
}
