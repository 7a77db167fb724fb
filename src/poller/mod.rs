//! The poller: asks BigChat what happened and keeps it, page by page, before anything else is done.
//!
//! BigChat tells everything once, so a page is kept durably before the next is asked for, and a page that the disk
//! refuses stays in memory until the disk takes it. Once the pages of a poll are kept it is looked whether BigChat
//! has restarted meanwhile; then their events are admitted to the journal, from where delivery takes them. The
//! poller knows nothing of OurAPI.

mod ingest;
mod pages;
mod read;
mod standstill;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use self::pages::Pages;
use self::read::FetchEnd;
use self::standstill::Standstill;
use crate::bigchat::Source;
use crate::bigchat::clock::SteadyClock;
use crate::bigchat::epoch;
use crate::bigchat::window_query;
use crate::domain::time::{Millis, Timestamp};
use crate::domain::window::Window;
use crate::http::{ApiError, Exchange};
use crate::journal::{Journal, JournalError, NewPage, ReplayUntil, STORAGE_PAUSE, Storage};
use crate::metrics::{self, Metrics};
use crate::settings::Settings;
use crate::telemetry::liveness::Liveness;
use crate::telemetry::log::log_at;

/// How many pages one poll asks for before what it brought is delivered: a `nextPageUrl` may go on for ever.
const MAX_PAGES: usize = 200;

/// How much one poll reads before what it brought is delivered, in bytes: so much is held in memory.
const MAX_BYTES: usize = 8 << 20;

/// How many answers may tell BigChat's time before the first poll: one that is wrong, and two that agree.
const CLOCK_TRIES: u32 = 3;

/// In how many polls at the most a window that is read again may bring nothing new before it counts as read.
const REREAD: u32 = 100;

/// How far back the first poll ever reaches, if no `--since` says otherwise.
const FIRST_WINDOW: Duration = Duration::from_secs(10);

/// How many old events are dropped at once, so that nobody waits for it.
const PRUNED_AT_ONCE: u32 = 500;

/// What the poller tells others of its work, and they tell it.
#[derive(Debug, Clone)]
pub struct Signals {
    /// What it counts.
    pub metrics: Arc<Metrics>,
    /// Whether the journal refuses it.
    pub storage: Arc<Storage>,
    /// That it makes progress.
    pub liveness: Arc<Liveness>,
    /// Notified of events to be delivered.
    pub work_available: Arc<Notify>,
    /// Cancelled when BigChat was read up to now for the first time, or could not be.
    pub caught_up: CancellationToken,
    /// Cancelled when it is to stop: it begins no further request.
    pub stopping: CancellationToken,
    /// Raised with events of windows that began before the session did.
    pub replay_until: ReplayUntil,
}

/// Polls BigChat.
#[derive(Debug)]
pub struct Poller {
    source: Arc<Source>,
    journal: Arc<Journal>,
    settings: Settings,
    signals: Signals,
    /// A page that came and is not kept yet.
    unstored: Option<Arc<NewPage>>,
    /// When this daemon started, by BigChat's clock.
    started_at: Option<Timestamp>,
    /// BigChat has not told its time, which was logged.
    without_clock: bool,
    /// In how many polls the same further page could not be had.
    page_failures: u32,
    /// In how many polls it could not be told whether BigChat has restarted.
    unanswered: u32,
    /// In how many polls it could not be told which run of BigChat told a page.
    undecided: u32,
    /// This machine's clock, by which old events are dropped.
    clock: SteadyClock,
    standstill: Standstill,
}

/// What a poll came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PollOutcome {
    /// BigChat was read up to now.
    UpToDate,
    /// There is more to be read at once.
    More,
    /// It could not be read to the end; the next poll goes on from where it got.
    Incomplete,
}

/// Why a poll could not be made.
#[derive(Debug, Error)]
enum PollError {
    #[error(transparent)]
    BigChat(#[from] ApiError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(
        "BigChat does not tell whether it has restarted: what it told stays kept until it does"
    )]
    Unanswered,
}

impl Poller {
    /// A poller that has not polled yet.
    pub fn new(
        source: Arc<Source>,
        journal: Arc<Journal>,
        settings: Settings,
        signals: Signals,
    ) -> Self {
        Self {
            source,
            journal,
            settings,
            signals,
            unstored: None,
            started_at: None,
            without_clock: false,
            page_failures: 0,
            unanswered: 0,
            undecided: 0,
            clock: SteadyClock::new(Millis::now(), Instant::now()),
            standstill: Standstill::default(),
        }
    }

    /// How many events were told and could not be kept so far.
    pub fn unstored(&self) -> usize {
        self.unstored.as_ref().map_or(0, |page| page.events)
    }

    /// Polls at every tick until the daemon is to stop.
    pub async fn run(&mut self) {
        let interval = self.settings.poll_interval;
        let mut tick = Instant::now();
        loop {
            let polled = self.poll().await;
            if polled != PollOutcome::More {
                self.signals.caught_up.cancel();
            }
            let wait = match (polled, self.unstored.is_some()) {
                (_, true) => STORAGE_PAUSE.min(interval),
                (PollOutcome::More, _) => Duration::ZERO,
                _ => {
                    if !self.signals.storage.polling.load(Ordering::Relaxed) {
                        self.prune(tick + interval).await;
                    }
                    interval
                }
            };
            // A slow poll delays the next one and piles up nothing.
            tick = (tick + wait).max(Instant::now());
            self.signals.liveness.polling.beat(wait);
            let stopping = self.signals.stopping.clone();
            tokio::select! {
                () = stopping.cancelled() => return,
                () = sleep_until(tick) => {}
            }
        }
    }

    /// Polls until BigChat is read up to now, or cannot be read; what it told is kept. True if it is read up to now.
    pub async fn catch_up(&mut self) -> bool {
        let mut polled = PollOutcome::More;
        while !self.signals.stopping.is_cancelled() {
            polled = self.poll().await;
            match polled {
                PollOutcome::More => {}
                _ if self.unstored() > 0 => sleep(STORAGE_PAUSE).await,
                PollOutcome::UpToDate | PollOutcome::Incomplete => break,
            }
        }
        self.prune(Instant::now()).await;
        polled == PollOutcome::UpToDate
    }

    /// One poll. What goes wrong is logged here, and the next one goes on from there.
    async fn poll(&mut self) -> PollOutcome {
        let polled = self.try_poll().await;
        if !matches!(polled, Ok(PollOutcome::More)) {
            self.source.clock().count_poll();
        }
        let Signals {
            metrics, storage, ..
        } = &self.signals;
        metrics.polled(match &polled {
            Ok(PollOutcome::Incomplete) => metrics::Poll::Incomplete,
            Ok(PollOutcome::UpToDate | PollOutcome::More) => metrics::Poll::Complete,
            Err(PollError::BigChat(_) | PollError::Unanswered) => metrics::Poll::BigChatFailed,
            Err(PollError::Journal(_)) => metrics::Poll::JournalFailed,
        });
        let refused = &storage.polling;
        match polled {
            Ok(polled) => {
                if refused.swap(false, Ordering::Relaxed) {
                    tracing::info!("the journal can be written again: polling goes on");
                }
                polled
            }
            Err(PollError::BigChat(error)) => {
                // That BigChat is down is said once, when it goes down.
                let Exchange {
                    request, response, ..
                } = error.exchange.logged();
                log_at!(
                    !self.source.http().is_failing(),
                    reason = error.summary(),
                    request,
                    response,
                    "the poll failed; the next one goes on from the same point"
                );
                PollOutcome::Incomplete
            }
            Err(error @ PollError::Unanswered) => {
                tracing::warn!("{error}");
                PollOutcome::Incomplete
            }
            Err(PollError::Journal(error)) => {
                if !refused.swap(true, Ordering::Relaxed) {
                    tracing::error!(reason = %error, "the journal cannot be written: polling pauses until it can");
                }
                PollOutcome::Incomplete
            }
        }
    }

    async fn try_poll(&mut self) -> Result<PollOutcome, PollError> {
        if let Some(page) = self.unstored.clone() {
            self.keep(page).await?;
        }
        self.journal.with(|store| store.in_place()).await?;
        for _ in 0..CLOCK_TRIES {
            if !self.source.clock().is_sure() {
                // The first answer of all tells BigChat's time, by which the first window goes.
                epoch::look(&self.source).await?;
            }
        }
        let now = self.source.clock().now().unwrap_or_else(|| {
            let now = Timestamp::of_this_machine();
            if !std::mem::replace(&mut self.without_clock, true) {
                tracing::warn!(date = %now, "BigChat does not tell its time: this machine's clock is taken for it");
            }
            now
        });
        self.started_at.get_or_insert(now);
        // What was kept and not admitted before: the daemon was stopped, or the journal refused. A poll that goes on
        // goes on with its earlier pages, by which equal messages on the next ones are told apart.
        let mut pages = Pages::load(&self.journal).await?;
        if pages.are_new() {
            self.ingest(&mut pages).await?;
        }
        if self.signals.stopping.is_cancelled() {
            return Ok(PollOutcome::Incomplete);
        }
        let (window, next, rescans_left) = self.window(now).await?;
        let first = window_query(window.start, window.end);
        if next.as_ref().is_none_or(|next| *next == first) {
            pages.forget(&self.journal).await?;
        } else if pages.are_many() {
            pages.forget_but_the_last(&self.journal).await?;
        }
        let read = self.read(&mut pages, window, next.unwrap_or(first)).await;
        if self.signals.stopping.is_cancelled() {
            // What was kept is admitted at the next start.
            return Ok(PollOutcome::Incomplete);
        }
        // A BigChat that tells nothing at all tells nothing of a restart either.
        let progress = if !pages.are_new() && read.is_err() {
            false
        } else {
            self.ingest(&mut pages).await?
        };
        let (polled, cursor) = match read? {
            FetchEnd::Complete if window.catching_up => (PollOutcome::More, None),
            FetchEnd::Complete => (PollOutcome::UpToDate, None),
            FetchEnd::Stuck => (PollOutcome::Incomplete, None),
            FetchEnd::TooOld(oldest) => return self.skip_gap(oldest).await,
            FetchEnd::Budget if progress || rescans_left > 0 => {
                self.journal.with(|store| store.rescan()).await?;
                tracing::warn!(
                    "a poll had more pages than are asked for at once; the next one goes on from there"
                );
                return Ok(PollOutcome::Incomplete);
            }
            FetchEnd::Budget => {
                tracing::warn!(
                    "a poll went on and on and brought nothing new; it counts as complete"
                );
                (PollOutcome::UpToDate, Some(window.end))
            }
        };
        let rescans_left = if polled == PollOutcome::Incomplete {
            REREAD
        } else {
            0
        };
        let read = (polled != PollOutcome::Incomplete).then(|| {
            let here = Timestamp::of_this_machine();
            let there = self.source.clock().now().unwrap_or(here);
            (Millis::now(), there.unix() - here.unix())
        });
        let source = self
            .journal
            .with(move |store| {
                store.end_poll(cursor, rescans_left, read)?;
                store.source()
            })
            .await?;
        if let (Some(cursor), true) = (source.cursor, polled == PollOutcome::UpToDate) {
            self.standstill.observe(cursor, Instant::now());
        }
        Ok(polled)
    }

    /// Goes on from where BigChat still answers.
    async fn skip_gap(&self, oldest: Timestamp) -> Result<PollOutcome, PollError> {
        let cursor = oldest.plus(self.settings.poll_overlap);
        let source = self.journal.with(|store| store.source()).await?;
        let is_new = self
            .journal
            .with(move |store| store.skip_gap(oldest, cursor, Millis::now()))
            .await?;
        if let (Some(from), true) = (source.cursor, is_new) {
            tracing::error!(
                %from, until = %oldest,
                "BigChat no longer reports what happened then, and it had not been read: it is lost to us"
            );
        }
        Ok(PollOutcome::More)
    }

    /// The window of the poll under way and its next page, else the next window; and in how many polls it may still
    /// bring nothing new.
    async fn window(&mut self, now: Timestamp) -> Result<(Window, Option<String>, u32), PollError> {
        let settings = &self.settings;
        let source = self.journal.with(|store| store.source()).await?;
        if let Some(((start, end), Some(next))) = source.poll {
            let window = Window {
                start,
                end,
                catching_up: end < now,
            };
            return Ok((window, Some(next), source.rescans_left));
        }
        let cursor = match source.cursor {
            Some(cursor) => cursor,
            // The first window, too, begins at the cursor less the overlap.
            None => {
                if let Some(since) = settings.since.filter(|since| *since > now) {
                    tracing::warn!(%since, date = %now, "--since is in the future: BigChat is read from now on");
                }
                settings
                    .since
                    .unwrap_or(now.minus(FIRST_WINDOW))
                    .plus(settings.poll_overlap)
            }
        };
        let cursor = cursor.min(now);
        if source.cursor != Some(cursor) || source.poll.is_some() {
            self.journal
                .with(move |store| store.set_cursor(cursor, Millis::now()))
                .await?;
        }
        let window = Window::next(cursor, now, settings.poll_overlap, settings.max_window);
        Ok((window, None, source.rescans_left))
    }

    /// Drops old events, and stops for the next poll: the rest of them can wait. But a tenth of the interval is theirs:
    /// slow polls must not let the journal grow.
    async fn prune(&mut self, next_poll: Instant) {
        let Settings {
            retention,
            poll_overlap: overlap,
            poll_interval,
            ..
        } = self.settings;
        let until = next_poll.max(Instant::now() + poll_interval / 10);
        loop {
            let bigchat = self.source.clock().now();
            let now = self.clock.read(Millis::now(), Instant::now(), bigchat);
            let pruned = self
                .journal
                .with(move |store| store.prune(retention, overlap, now, PRUNED_AT_ONCE))
                .await;
            match pruned {
                Ok(pruned)
                    if pruned == PRUNED_AT_ONCE as usize
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
