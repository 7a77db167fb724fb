//! What delivery keeps in the journal at a time, in which order, and what of it the journal has not taken.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use crate::context::Context;
use crate::conversation::{Settlement, Work};
use crate::journal::{Claim, Claimed, JournalError, Throttles};
use crate::time::Millis;

/// All of it.
pub(super) struct ToKeep {
    /// Claims that are not begun now: they go back.
    pub(super) unbegun: Vec<Work>,
    /// Conversations whose handler has panicked.
    pub(super) abandoned: Vec<i64>,
    /// As they were kept, and as they are.
    pub(super) throttles: Option<(Throttles, Throttles)>,
    /// The same.
    pub(super) slowest: Option<(Duration, Duration)>,
    /// This machine's clock was set back.
    pub(super) clock_set_back: bool,
    pub(super) settlements: Arc<Vec<Settlement>>,
    pub(super) successes: i64,
    /// What is claimed along with it.
    pub(super) claim: Option<Claim>,
    pub(super) now: Millis,
}

/// What was not kept, and what was claimed.
pub(super) type Kept = (ToKeep, Result<Claimed, JournalError>);

/// Being kept.
pub(super) type Keeping = Pin<Box<dyn Future<Output = Kept> + Send>>;

impl ToKeep {
    /// Whether there is nothing to be kept and nothing wanted.
    pub(super) fn is_nothing(&self) -> bool {
        !self.settles_or_claims()
            && self.unbegun.is_empty()
            && self.abandoned.is_empty()
            && self.throttles.is_none()
            && self.slowest.is_none()
            && !self.clock_set_back
    }

    fn settles_or_claims(&self) -> bool {
        self.claim.is_some() || !self.settlements.is_empty()
    }

    /// Keeps it.
    pub(super) fn keep(mut self, context: Arc<Context>) -> Keeping {
        Box::pin(async move {
            let claimed = self.try_keep(&context).await;
            (self, claimed)
        })
    }

    async fn try_keep(&mut self, context: &Context) -> Result<Claimed, JournalError> {
        let (journal, now) = (&context.journal, self.now);
        if !self.unbegun.is_empty() {
            let ids = self.unbegun.iter().map(|work| work.conversation.id);
            let ids: Vec<i64> = ids.collect();
            journal.with(move |store| store.release(&ids, now)).await?;
            self.unbegun.clear();
        }
        while let Some(id) = self.abandoned.last().copied() {
            let pause = context.settings.retry_initial;
            journal
                .with(move |store| store.abandon(id, pause, now))
                .await?;
            self.abandoned.pop();
        }
        if let Some((_, throttles)) = self.throttles {
            journal
                .with(move |store| store.note_throttles(throttles))
                .await?;
            self.throttles = None;
        }
        if let Some((_, slowest)) = self.slowest {
            journal
                .with(move |store| store.note_slowest(slowest))
                .await?;
            self.slowest = None;
        }
        if self.clock_set_back {
            let pause = context.settings.request_timeout;
            journal
                .with(move |store| store.clock_set_back(pause, now))
                .await?;
            self.clock_set_back = false;
        }
        if !self.settles_or_claims() {
            return Ok(Claimed::default());
        }
        let (settlements, successes) = (Arc::clone(&self.settlements), self.successes);
        let claim = self.claim.take();
        let claimed = journal
            .with(move |store| store.settle_and_claim(&settlements, successes, claim.as_ref(), now))
            .await?;
        self.settlements = Arc::default();
        Ok(claimed)
    }
}
