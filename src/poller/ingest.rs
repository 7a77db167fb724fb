//! Ingestion: appends the events of stored pages to the journal once the epoch of the pages is known.

use tokio::task::yield_now;
use tokio::time::Instant;

use super::pages::Pages;
use super::{PollError, Poller};
use crate::bigchat::epoch::{self, ProbeResult};
use crate::domain::event::EventKind;
use crate::domain::ids::Epoch;
use crate::domain::time::Millis;
use crate::journal::{JournalError, StoredPage};
use crate::settings::Settings;

/// How long new events have waited for BigChat's answer to a question about its epoch.
#[derive(Debug, Default)]
pub(super) struct Wait {
    /// When BigChat first left the question unanswered.
    since: Option<Instant>,
    is_over: bool,
}

impl Wait {
    /// Records that BigChat did not answer in this poll. New events wait for `--retry-max`, because waiting costs only
    /// time. After that, they are ingested without an answer, at the risk that the events of two epochs are mixed.
    ///
    /// # Errors
    ///
    /// [`PollError::Unanswered`] while the events still wait.
    fn unanswered(&mut self, settings: &Settings) -> Result<(), PollError> {
        let since = *self.since.get_or_insert_with(|| {
            let at_most = settings.retry_max.max(settings.poll_interval);
            tracing::warn!(
                at_most = %humantime::format_duration(at_most),
                "BigChat did not answer the probe for a restart; new events wait until it does"
            );
            Instant::now()
        });
        if since.elapsed() < settings.retry_max {
            return Err(PollError::Unanswered);
        }
        if !std::mem::replace(&mut self.is_over, true) {
            tracing::warn!(
                "BigChat did not answer the probe for a restart; new events wait no longer"
            );
        }
        Ok(())
    }
}

impl Poller {
    /// Ingests the stored pages. Returns whether any event was not known already.
    pub(super) async fn ingest(&mut self, pages: &mut Pages) -> Result<bool, PollError> {
        self.detect_restart(pages).await?;
        if !pages.has_new() {
            return Ok(false);
        }
        // This machine's clock may be wrong. Until BigChat's time is known, every window counts as one that starts
        // before the session.
        let now = self.source.clock().now();
        let started_at = now.map(|now| now.minus(self.created_at.elapsed()));
        self.started_at = self.started_at.max(started_at);
        let mut epochs = Vec::new();
        for page in &pages.new {
            epochs.push(self.epoch_of(page).await?);
        }
        self.page_wait = Wait::default();
        let new = std::mem::take(&mut pages.new).into_iter().zip(epochs);
        let (counts, mark) = (pages.counts(), self.signals.replay_until.clone());
        let (ignore, started_at) = (self.settings.ignore_events.clone(), self.started_at);
        let dropped_before = self.dropped_before;
        // All in one operation, so that delivery merges the changes of a chat across pages. If the journal refuses a
        // page, the pages before it are ingested nevertheless, and the next poll loads the rest.
        let (all, result) = self
            .journal
            .with(move |store| {
                let mut all = Vec::new();
                for (page, epoch) in new {
                    let now = Millis::now();
                    // True if the window goes back to dropped events, because BigChat's clock was set back.
                    let may_be_dropped = Some(page.window_start) < dropped_before;
                    let ingested =
                        match store.ingest(&page, epoch, may_be_dropped, &counts, &ignore, now) {
                            Ok(ingested) => ingested,
                            Err(error) => return Ok((all, Err(error))),
                        };
                    let before_session = started_at.is_none_or(|at| page.window_start < at);
                    if before_session || may_be_dropped {
                        // This must happen before delivery can claim these events.
                        mark.raise(ingested.last_event);
                    }
                    all.push((ingested, page.query));
                }
                Ok((all, Ok(())))
            })
            .await?;
        for (ingested, query) in &all {
            for (kind, count) in &ingested.received {
                self.signals.metrics.received(kind, *count);
            }
            self.signals.metrics.ignored(ingested.ignored);
            if ingested.unreadable > 0 {
                tracing::warn!(
                    events = ingested.unreadable, %query,
                    "some events cannot be parsed; see `bigchat-sync failed list`"
                );
            }
            if ingested.new > 0 {
                tracing::debug!(events = ingested.new, query = %query, "events ingested");
                self.signals.work_available.notify_one();
                // Lets delivery claim these events before the poll's next operation.
                yield_now().await;
            }
        }
        result?;
        Ok(all.iter().any(|(ingested, _)| ingested.progress))
    }

    /// The epoch of a page. If BigChat does not answer, the page waits. After that, the time at which it was served
    /// determines the epoch.
    async fn epoch_of(&mut self, page: &StoredPage) -> Result<Epoch, PollError> {
        if !self.page_wait.is_over {
            if let Some(epoch) = epoch::epoch_of(&self.source, page).await? {
                return Ok(epoch);
            }
            self.page_wait.unanswered(&self.settings)?;
        }
        Ok(epoch::epoch_by_time(&self.source, page).await?)
    }

    /// Checks before an ingestion whether BigChat has restarted: by a probe, or else by a START whose time is not that
    /// of the known conversation with the same id. If BigChat does not answer, the stored pages wait.
    async fn detect_restart(&mut self, pages: &mut Pages) -> Result<(), PollError> {
        let probed = self.probe(pages).await?;
        if matches!(probed, ProbeResult::Unknown | ProbeResult::Unanswered) {
            let current = self.source.epoch();
            // A page requested in an earlier epoch may report a START of that epoch.
            let is_current = |page: &&StoredPage| page.requested_in == current;
            let events = pages
                .new
                .iter()
                .filter(is_current)
                .flat_map(StoredPage::events);
            let starts: Vec<_> = events
                .filter(|event| event.kind == EventKind::Start)
                .collect();
            let other = self
                .journal
                .with(move |store| store.first_other_start(current, &starts))
                .await?;
            if let Some(started_at) = other {
                let now = self.source.clock().now().unwrap_or(started_at);
                epoch::begin(&self.source, current, started_at.min(now)).await?;
                self.wait = Wait::default();
                return Ok(());
            }
        }
        if probed != ProbeResult::Unanswered || !pages.has_new() {
            self.wait = Wait::default();
            return Ok(());
        }
        self.wait.unanswered(&self.settings)
    }

    /// Probes BigChat for a restart. If it has not restarted, pages requested in the current epoch were also served in
    /// it.
    async fn probe(&self, pages: &mut Pages) -> Result<ProbeResult, JournalError> {
        let probed = epoch::probe(&self.source).await?;
        if probed == ProbeResult::Same {
            let current = self.source.epoch();
            let new = pages.new.iter_mut();
            for page in new.filter(|page| page.requested_in == current) {
                page.epoch = Some(current);
            }
        }
        Ok(probed)
    }
}
