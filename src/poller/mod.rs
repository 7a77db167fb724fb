//! The poller: fetches new events from BigChat and stores each page before anything else happens to it.
//!
//! BigChat reports each event once, so a page is stored durably before the next is requested. A page that the disk
//! refuses stays in memory until the disk accepts it. After the last page, the poller checks whether BigChat has
//! restarted, then ingests the events into the journal. The poller does not use OurAPI.

mod ingest;
mod pages;
mod read;
mod standstill;

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use self::ingest::Wait;
use self::pages::Pages;
use self::read::FetchEnd;
use self::standstill::Standstill;
use crate::bigchat::Source;
use crate::bigchat::clock::{self, SteadyClock};
use crate::bigchat::epoch;
use crate::bigchat::window_query;
use crate::domain::time::{Millis, Timestamp};
use crate::domain::window::Window;
use crate::http::ApiError;
use crate::journal::{
    Journal, JournalError, NewPage, ReplayUntil, STORAGE_PAUSE, Storage, UnfinishedWindow,
};
use crate::metrics::{self, Metrics};
use crate::settings::Settings;
use crate::telemetry::liveness::Liveness;
use crate::telemetry::log::log_at;

/// Page budget of a poll. A chain of `nextPageUrl`s may never end, so the pages so far are ingested before the next
/// poll continues the window.
const MAX_PAGES: usize = 200;

/// Size budget of a poll in bytes. All pages of a poll are in memory.
const MAX_BYTES: usize = 8 << 20;

/// How many probes a poll may make to learn BigChat's time. The first date is believed if this machine's clock or the
/// next date agrees, so three probes suffice if the first date is wrong.
const CLOCK_ATTEMPTS: u32 = 3;

/// Polls of one window that use up their budget are counted: plus one for a poll without a new event, minus one for
/// any other. Above this count, the window counts as read, since a service may return known events without end.
/// That takes more than 4,000 pages (or 160 MiB), and events of the next window wait meanwhile.
const MAX_IDLE_POLLS: i64 = 20;

/// The length of the first window without `--since`.
const FIRST_WINDOW: Duration = Duration::from_secs(10);

/// How many old events are dropped in one transaction. Other writers wait for it.
const PRUNE_BATCH: u32 = 500;

/// What the next poll reads.
#[derive(Debug)]
struct NextPoll {
    window: Window,
    /// The query of the page from which an unfinished window continues; `None`: the window is a new one.
    next_page: Option<String>,
}

/// The handles that the poller shares with the rest of the daemon.
#[derive(Debug, Clone)]
pub struct Signals {
    pub metrics: Arc<Metrics>,
    pub storage: Arc<Storage>,
    pub liveness: Arc<Liveness>,
    /// Notified of events to be delivered.
    pub work_available: Arc<Notify>,
    /// Cancelled after the first poll that read BigChat up to now, failed, or left its window unfinished (unless all
    /// its events were known).
    pub caught_up: CancellationToken,
    /// Cancelled at shutdown: no further request is begun.
    pub stopping: CancellationToken,
    /// The latest event that may have been delivered before. Raised for each window that starts before the session,
    /// because a newer copy of the journal may have delivered its events, and for each window whose delivered events
    /// may have been dropped after the retention period.
    pub replay_until: ReplayUntil,
}

#[derive(Debug)]
pub struct Poller {
    source: Arc<Source>,
    journal: Arc<Journal>,
    settings: Settings,
    signals: Signals,
    /// A page that was received and is not stored yet.
    unstored: Option<Arc<NewPage>>,
    /// When this daemon started.
    created_at: Instant,
    /// The same by BigChat's clock: the latest of all estimates, because the first dates may have been behind.
    started_at: Option<Timestamp>,
    /// A window that starts before this time may report events again that were delivered, and then dropped in this
    /// session.
    dropped_before: Option<Timestamp>,
    /// Whether this machine's clock was compared with BigChat's in this session. A difference is logged once.
    clock_reported: bool,
    /// The longest window: the setting, or less after BigChat gave no usable answer for a first page, or after a page
    /// was too large.
    max_window: Duration,
    /// In how many polls the same page could not be fetched. Only a page that is not the first of its window counts.
    page_failures: u32,
    /// For a response to the probe for a restart.
    wait: Wait,
    /// For the epoch of a page.
    page_wait: Wait,
    /// For retention.
    clock: SteadyClock,
    /// When the unfinished window was computed; `None`: an earlier process computed it.
    window_at: Option<Instant>,
    /// BigChat's time at that moment.
    window_now: Option<Timestamp>,
    /// Like `window_at`, but for the latest window that was read to its end.
    read_at: Option<Instant>,
    standstill: Standstill,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PollOutcome {
    /// BigChat was read up to now.
    UpToDate,
    /// The window was read to its end, or a gap was skipped. The next window follows at once.
    More,
    /// The window is unfinished, and all events of this poll were known. The next poll continues at once, so that known
    /// pages do not delay new events.
    Known,
    /// The window is unfinished. The next poll continues after the last stored page, or reads the window again from its
    /// beginning.
    Incomplete,
}

#[derive(Debug, Error)]
enum PollError {
    #[error(transparent)]
    BigChat(#[from] ApiError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The stored pages are not ingested yet.
    #[error("BigChat did not answer the probe for a restart")]
    Unanswered,
}

/// Whether the next poll follows a poll with this result without waiting.
fn is_followed_at_once(result: &Result<PollOutcome, PollError>) -> bool {
    matches!(result, Ok(PollOutcome::More | PollOutcome::Known))
}

impl Poller {
    pub fn new(
        source: Arc<Source>,
        journal: Arc<Journal>,
        settings: Settings,
        signals: Signals,
    ) -> Self {
        Self {
            source,
            journal,
            max_window: settings.max_window,
            settings,
            signals,
            unstored: None,
            created_at: Instant::now(),
            started_at: None,
            dropped_before: None,
            clock_reported: false,
            page_failures: 0,
            wait: Wait::default(),
            page_wait: Wait::default(),
            clock: SteadyClock::new(Millis::now(), Instant::now()),
            standstill: Standstill::default(),
            window_at: None,
            window_now: None,
            read_at: None,
        }
    }

    /// How many events were received and are not stored yet.
    pub fn unstored(&self) -> usize {
        self.unstored.as_ref().map_or(0, |page| page.events)
    }

    /// Polls at every tick until shutdown. At the end, makes a last attempt to store a page that is not stored yet.
    pub async fn run(&mut self) {
        let interval = self.settings.poll_interval;
        let mut tick = Instant::now();
        loop {
            let result = self.poll().await;
            if !is_followed_at_once(&result) {
                self.signals.caught_up.cancel();
            }
            let wait = match result {
                _ if self.unstored.is_some() => STORAGE_PAUSE.min(interval),
                _ if is_followed_at_once(&result) => Duration::ZERO,
                _ => {
                    if !self.signals.storage.poller.is_refused() {
                        self.prune(tick + interval).await;
                    }
                    interval
                }
            };
            // A slow poll delays the next one; ticks do not queue.
            tick = (tick + wait).max(Instant::now());
            self.signals.liveness.polling.beat(wait);
            let stopping = self.signals.stopping.clone();
            tokio::select! {
                () = stopping.cancelled() => break,
                () = sleep_until(tick) => {}
            }
        }
        // If the disk refuses the page, the caller reports it as unstored.
        self.store_unstored().await.ok();
    }

    /// Polls until BigChat is read up to now, or a poll fails or leaves its window unfinished (unless all its events
    /// were known). A failed poll is repeated in three cases: the disk refuses a page, which would otherwise be lost;
    /// BigChat does not answer the probe; or the next window is shorter. Returns whether BigChat was read up to now.
    pub async fn catch_up(&mut self) -> bool {
        let mut up_to_date = false;
        while !self.signals.stopping.is_cancelled() {
            let max_window = self.max_window;
            let result = self.poll().await;
            up_to_date = matches!(result, Ok(PollOutcome::UpToDate));
            match result {
                _ if self.unstored() > 0 => sleep(STORAGE_PAUSE).await,
                _ if is_followed_at_once(&result) => {}
                Err(PollError::Unanswered) => tokio::select! {
                    () = sleep(self.settings.poll_interval.min(self.settings.retry_max)) => {}
                    () = self.signals.stopping.cancelled() => {}
                },
                _ if self.max_window < max_window => {}
                _ => break,
            }
        }
        self.prune(Instant::now()).await;
        up_to_date
    }

    /// One poll. Errors are logged here, and the next poll continues from the last stored page.
    async fn poll(&mut self) -> Result<PollOutcome, PollError> {
        let result = self.try_poll().await;
        if !is_followed_at_once(&result) {
            self.source.clock().count_poll();
        }
        let storage = &self.signals.storage;
        let counted_as = match &result {
            Ok(PollOutcome::UpToDate | PollOutcome::More) => {
                storage.poller.succeeded();
                metrics::Poll::Complete
            }
            Ok(PollOutcome::Known | PollOutcome::Incomplete) => {
                storage.poller.succeeded();
                metrics::Poll::Incomplete
            }
            Err(PollError::BigChat(error)) => {
                // An outage is logged once, when it begins.
                let failure = error.logged();
                log_at!(
                    !self.source.http().is_failing(),
                    reason = failure.reason,
                    request = failure.request,
                    response = failure.response,
                    "the poll failed; the next one continues from the same point"
                );
                self.retry_storage().await;
                metrics::Poll::BigChatFailed
            }
            // Logged at the first of these polls.
            Err(PollError::Unanswered) => {
                self.retry_storage().await;
                metrics::Poll::BigChatFailed
            }
            Err(PollError::Journal(error)) => {
                storage.poller.failed(error);
                metrics::Poll::JournalFailed
            }
        };
        self.signals.metrics.polled(counted_as);
        result
    }

    /// After a poll that failed because of BigChat, checks whether the journal is writable again.
    async fn retry_storage(&self) {
        let storage = &self.signals.storage;
        if storage.poller.is_refused()
            && self.unstored.is_none()
            && self
                .journal
                .with(|store| store.try_to_write())
                .await
                .is_ok()
        {
            storage.poller.succeeded();
        }
    }

    async fn try_poll(&mut self) -> Result<PollOutcome, PollError> {
        self.store_unstored().await?;
        self.journal.with(|store| store.in_place()).await?;
        self.learn_time().await?;
        // Some stored pages may not be ingested yet, because the daemon was stopped or the journal refused them. The
        // earlier pages of an unfinished window also show which messages on later pages are repeats.
        let mut pages = Pages::load(&self.journal).await?;
        if pages.has_new() {
            self.ingest(&mut pages).await?;
        }
        if self.signals.stopping.is_cancelled() {
            return Ok(PollOutcome::Incomplete);
        }
        let (there, asked_at) = (self.source.clock().now(), Instant::now());
        let now = there.unwrap_or_else(Timestamp::of_this_machine);
        let poll = self.next_poll(now).await?;
        if poll.next_page.is_none() {
            (self.window_at, self.window_now) = (Some(asked_at), Some(now));
            pages.clear(&self.journal).await?;
        } else if pages.exceed_budget() {
            pages.retain_last(&self.journal).await?;
        }
        let first = poll.next_page.unwrap_or_else(|| window_query(poll.window));
        let fetched = self.fetch(&mut pages, poll.window, first).await;
        if self.signals.stopping.is_cancelled() {
            // The stored pages are ingested at the next start.
            return Ok(PollOutcome::Incomplete);
        }
        // If BigChat failed and there is no new page, the probe for a restart would only fail, too.
        let progress = (pages.has_new() || fetched.is_ok()) && self.ingest(&mut pages).await?;
        let (cursor, present) = match fetched? {
            FetchEnd::Complete(cursor) => (cursor, now),
            FetchEnd::Stuck => return self.read_again().await,
            FetchEnd::TooOld(oldest) => return self.skip_gap(oldest).await,
            FetchEnd::Budget => match self.continues(progress, poll.window).await? {
                Some(outcome) => return Ok(outcome),
                // If known pages never end, neither does the next window. If this one reached the present when it was
                // computed, the next one waits for its tick.
                None => (poll.window.end, self.window_now.unwrap_or(now)),
            },
        };
        self.end_poll(cursor).await?;
        self.read_at = self.window_at;
        if poll.window.end < present {
            return Ok(PollOutcome::More);
        }
        self.standstill.observe(cursor, Instant::now());
        Ok(PollOutcome::UpToDate)
    }

    /// Stores the page that was received and is not stored yet, if there is one.
    async fn store_unstored(&mut self) -> Result<(), JournalError> {
        match self.unstored.clone() {
            Some(page) => self.store(page).await.map(drop),
            None => Ok(()),
        }
    }

    /// Learns BigChat's time, which the first window needs, unless it is known already. The response to a probe
    /// contains it.
    async fn learn_time(&self) -> Result<(), JournalError> {
        for _ in 0..CLOCK_ATTEMPTS {
            if !self.source.clock().is_sure() {
                epoch::probe(&self.source).await?;
            }
        }
        Ok(())
    }

    /// Ends a poll that has read its window. `cursor`: the time up to which BigChat was read.
    async fn end_poll(&mut self, cursor: Timestamp) -> Result<(), JournalError> {
        let now = Millis::now();
        let (here, there) = (now.second(), self.source.clock().now());
        if !std::mem::replace(&mut self.clock_reported, true) {
            report_clock(here, there);
        }
        let clock_ahead = there.unwrap_or(here).unix() - here.unix();
        self.journal
            .with(move |store| store.end_poll(cursor, now, clock_ahead))
            .await
    }

    /// The outcome of a poll that has used up its budget. The next poll continues from the page reached, even if
    /// this one found no new event (`progress` is false), since new events may follow more known ones than one poll can
    /// read. `None`: there were too many such polls.
    async fn continues(
        &self,
        progress: bool,
        window: Window,
    ) -> Result<Option<PollOutcome>, JournalError> {
        let idle_polls = self
            .journal
            .with(move |store| store.count_idle_poll(!progress))
            .await?;
        if progress {
            tracing::warn!(
                "a poll has used up its budget; the next one continues from the page reached"
            );
            return Ok(Some(PollOutcome::Incomplete));
        }
        if idle_polls > MAX_IDLE_POLLS {
            tracing::warn!(
                from = %window.start, until = %window.end,
                "too many polls of one window found only known events; treating the window as complete without reading \
                 its later pages"
            );
            return Ok(None);
        }
        Ok(Some(PollOutcome::Known))
    }

    /// The next poll reads the window again from its beginning.
    async fn read_again(&self) -> Result<PollOutcome, PollError> {
        self.journal.with(|store| store.forget_window()).await?;
        Ok(PollOutcome::Incomplete)
    }

    /// Moves the cursor, so that the next window starts at the oldest time for which BigChat still answers.
    async fn skip_gap(&mut self, oldest: Timestamp) -> Result<PollOutcome, PollError> {
        let cursor = oldest.plus(self.settings.poll_overlap);
        let new = self
            .journal
            .with(move |store| store.skip_gap(oldest, cursor, Millis::now()))
            .await?;
        self.read_at = Some(Instant::now());
        if let Some(from) = new {
            tracing::error!(
                %from, until = %oldest,
                "BigChat no longer reports events of this period; those not read before are lost"
            );
        }
        Ok(PollOutcome::More)
    }

    /// The rest of the unfinished window, or else the next window.
    async fn next_poll(&mut self, now: Timestamp) -> Result<NextPoll, PollError> {
        let state = self.journal.with(|store| store.poll_state()).await?;
        // A window whose next page is its first one was not read at all. It is computed anew, because BigChat may have
        // rejected its length.
        if let Some(UnfinishedWindow {
            window,
            next: Some(next),
        }) = state.unfinished
            && next != window_query(window)
        {
            return Ok(NextPoll {
                window,
                next_page: Some(next),
            });
        }
        let cursor = match state.cursor {
            Some(cursor) => self.resumes_at(cursor, now, state.read_at),
            None => self.first_cursor(now, state.read_at).await?,
        };
        Ok(NextPoll {
            window: Window::next(cursor, now, self.settings.poll_overlap, self.max_window),
            next_page: None,
        })
    }

    /// The cursor before the first poll: `--since`, or [`FIRST_WINDOW`] before the first start, by BigChat's clock. It
    /// is stored once BigChat has answered. Until then, `now` is this machine's time, which may be wrong.
    async fn first_cursor(
        &mut self,
        now: Timestamp,
        read_at: Option<Millis>,
    ) -> Result<Timestamp, JournalError> {
        let has_answered = self.source.clock().has_answered();
        if read_at.is_none() {
            self.read_at = Some(self.created_at);
        }
        let started_at = self
            .read_time(now, read_at)
            .filter(|started_at| is_ahead(now, *started_at))
            .unwrap_or(now);
        let since = self.settings.since.map(Millis::second);
        // A window begins before the cursor, by the overlap.
        let cursor = since
            .unwrap_or(started_at.minus(FIRST_WINDOW))
            .plus(self.settings.poll_overlap)
            .min(now);
        if let Some(since) = since.filter(|since| has_answered && *since > now) {
            tracing::warn!(%since, date = %now, "--since is in the future; reading BigChat from the current time instead");
        }
        if has_answered || read_at.is_none() {
            let started_at = by_machine_clock(self.created_at);
            let cursor = has_answered.then_some(cursor);
            self.journal
                .with(move |store| store.begin_reading(started_at, cursor, Millis::now()))
                .await?;
        }
        Ok(cursor)
    }

    /// The cursor, or the time of the last poll that ended, if that is earlier. It is earlier if the clock of BigChat,
    /// or of a server that answered for it, was ahead at that poll, or if a later poll stored its last page but has not
    /// ended. The result is never earlier than one `--max-window` before the cursor or BigChat's present time,
    /// whichever of these is earlier.
    fn resumes_at(&self, cursor: Timestamp, now: Timestamp, read_at: Option<Millis>) -> Timestamp {
        let latest = cursor.min(now);
        let earliest = latest.minus(self.settings.max_window);
        match self.read_time(now, read_at) {
            Some(read) if is_ahead(cursor, read) => read.max(earliest),
            Some(_) => latest,
            None => earliest,
        }
    }

    /// The time of the last poll that ended: BigChat's present time minus the time since that poll computed its window.
    /// `None`: unknown, because this machine's clock was set back.
    fn read_time(&self, now: Timestamp, read_at: Option<Millis>) -> Option<Timestamp> {
        let elapsed = match (self.read_at, read_at) {
            (Some(at), _) => at.elapsed(),
            (None, Some(at)) if at <= Millis::now() => Millis::now().since(at),
            (None, Some(_)) => return None,
            (None, None) => Duration::ZERO,
        };
        Some(now.minus(elapsed))
    }

    /// The cursor after a window: its end, unless BigChat's clock has been set back since the window was computed.
    async fn read_up_to(&self, end: Timestamp, now: Timestamp) -> Result<Timestamp, JournalError> {
        if !is_ahead(end, now) {
            return Ok(end.min(now));
        }
        let state = self.journal.with(|store| store.poll_state()).await?;
        Ok(self.resumes_at(end, now, state.read_at))
    }

    /// Drops old events until the next poll is due, but for at least a tenth of the interval, so that the journal does
    /// not grow without bound if polls are slow.
    async fn prune(&mut self, next_poll: Instant) {
        let Settings {
            retention,
            poll_overlap,
            max_window,
            poll_interval,
            ..
        } = self.settings;
        let (reach, started_at) = (poll_overlap + max_window, self.started_at);
        let until = next_poll.max(Instant::now() + poll_interval / 10);
        loop {
            let bigchat = self.source.clock().now();
            let now = self.clock.read(Millis::now(), Instant::now(), bigchat);
            let pruned = self
                .journal
                .with(move |store| {
                    if let Some(started_at) = started_at {
                        store.drop_credits(started_at, poll_overlap)?;
                    }
                    store.prune(retention, reach, now, PRUNE_BATCH)
                })
                .await;
            if let Ok(pruned) = &pruned {
                self.dropped_before = self.dropped_before.max(pruned.before);
            }
            match pruned {
                Ok(pruned)
                    if pruned.is_more
                        && Instant::now() < until
                        && !self.signals.stopping.is_cancelled() => {}
                Ok(_) => return,
                Err(error) => {
                    tracing::warn!(reason = %error, "old events could not be dropped");
                    return;
                }
            }
        }
    }
}

/// A moment of this process by this machine's clock.
fn by_machine_clock(at: Instant) -> Millis {
    Millis::now().minus(at.elapsed())
}

/// Whether a time is later than BigChat's time, which has a precision of one second.
fn is_ahead(time: Timestamp, now: Timestamp) -> bool {
    time > now.plus(Duration::from_secs(1))
}

/// Logs how BigChat's clock differs from this machine's. Called once a session.
fn report_clock(here: Timestamp, there: Option<Timestamp>) {
    match there.map(|there| (there, clock::difference(there.unix() - here.unix()))) {
        None => {
            tracing::warn!(date = %here, "BigChat sends no usable date; using this machine's clock instead");
        }
        Some((there, Some(difference))) => {
            tracing::warn!(date = %there, "{difference}; correct the wrong clock");
        }
        Some((_, None)) => {}
    }
}
