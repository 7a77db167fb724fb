//! Admission: the events of the pages that were kept go to the journal, once it is known which run of BigChat told them.

use tokio::task::yield_now;

use super::pages::Pages;
use super::{PollError, Poller};
use crate::bigchat::epoch::{self, ProbeResult};
use crate::domain::event::EventKind;
use crate::domain::ids::Epoch;
use crate::domain::time::Millis;
use crate::journal::{JournalError, StoredPage};

/// In how many polls it may be unknown whether BigChat has restarted, before it is taken to be the same.
const UNANSWERED: u32 = 3;

impl Poller {
    /// Admits the events of the pages that were kept, now that it can be known which run of BigChat told them.
    /// Returns whether there was anything but what is known already.
    pub(super) async fn ingest(&mut self, pages: &mut Pages) -> Result<bool, PollError> {
        self.look_for_restart(pages).await?;
        if !pages.are_new() {
            return Ok(false);
        }
        let mut admitting = Vec::new();
        for page in pages.kept.iter().filter(|page| !page.ingested) {
            let before_start = self
                .started_at
                .is_none_or(|started_at| page.window_start < started_at);
            admitting.push((page.clone(), self.epoch_of(page).await?, before_start));
        }
        let (counts, mark) = (pages.counts(), self.signals.replay_until.clone());
        let ignore = self.settings.ignore_events.clone();
        // All at once, before delivery takes any of it on: what a later page says of a chat overrides an earlier one.
        let all = self
            .journal
            .with(move |store| {
                let mut all = Vec::new();
                for (page, epoch, before_start) in admitting {
                    let ingested = store.ingest(&page, epoch, &counts, &ignore, Millis::now())?;
                    if before_start {
                        // Before anybody can take these events on.
                        mark.raise(ingested.last_event);
                    }
                    all.push((ingested, page.query));
                }
                Ok(all)
            })
            .await?;
        pages.kept.iter_mut().for_each(|page| page.ingested = true);
        for (ingested, query) in &all {
            for (kind, count) in &ingested.told {
                self.signals.metrics.told(kind, *count);
            }
            self.signals.metrics.ignored(ingested.ignored);
            if ingested.unreadable > 0 {
                tracing::warn!(
                    events = ingested.unreadable, %query,
                    "events that cannot be understood; see `bigchat-sync failed`"
                );
            }
            if ingested.new > 0 {
                tracing::debug!(events = ingested.new, query = %query, "told by BigChat");
                self.signals.work_available.notify_one();
                // Its claims come first; what the poll still has to keep can wait.
                yield_now().await;
            }
        }
        Ok(all.iter().any(|(ingested, _)| ingested.progress))
    }

    /// Which run of BigChat told a page. Where BigChat gives no answer to that, the page stays kept until it does, for a
    /// while.
    async fn epoch_of(&mut self, page: &StoredPage) -> Result<Epoch, PollError> {
        if let Some(epoch) = epoch::epoch_of(&self.source, page).await? {
            self.undecided = 0;
            return Ok(epoch);
        }
        self.undecided += 1;
        if self.undecided < UNANSWERED {
            return Err(PollError::Unanswered);
        }
        let served_at = page.served_at;
        let by_time = self.journal.with(move |store| store.epoch_at(served_at));
        Ok(by_time.await?.0)
    }

    /// Looks once a poll whether BigChat has restarted: a START of a known conversation tells it too. Where BigChat
    /// gives no answer to that, its pages stay kept until it does, for a while.
    async fn look_for_restart(&mut self, pages: &mut Pages) -> Result<(), PollError> {
        let seen = self.look(pages).await?;
        let mut starts = Vec::new();
        if matches!(seen, ProbeResult::Unknown | ProbeResult::Unanswered) {
            for page in pages.kept.iter().filter(|page| !page.ingested) {
                let events = page
                    .events()
                    .into_iter()
                    .filter(|event| event.kind == EventKind::Start);
                starts.extend(events.map(|event| (event, page.served_at)));
            }
        }
        for (event, served_at) in starts {
            let (epoch, known) = self
                .journal
                .with(move |store| Ok((store.epoch()?, store.start_of(event.conversation)?)))
                .await?;
            if known.is_some_and(|known| known != event.at) {
                epoch::begin(&self.source, epoch, event.at.min(served_at)).await?;
                self.unanswered = 0;
                return Ok(());
            }
        }
        if seen != ProbeResult::Unanswered || !pages.are_new() {
            self.unanswered = 0;
            return Ok(());
        }
        self.unanswered += 1;
        if self.unanswered < UNANSWERED {
            return Err(PollError::Unanswered);
        }
        tracing::warn!(
            "BigChat does not tell whether it has restarted; it is taken to be the same"
        );
        Ok(())
    }

    /// Looks whether BigChat has restarted. If not, that is certain of the pages as well.
    async fn look(&self, pages: &mut Pages) -> Result<ProbeResult, JournalError> {
        let seen = epoch::look(&self.source).await?;
        if seen == ProbeResult::Same {
            let present = self.source.epochs.current(&self.journal).await?;
            let kept = pages.kept.iter_mut();
            for page in kept.filter(|page| page.kept_in == present) {
                page.told_by = Some(present);
            }
        }
        Ok(seen)
    }
}
