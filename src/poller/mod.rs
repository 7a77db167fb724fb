//! The poller: asks BigChat what happened and keeps it, page by page, before anything else is done.
//!
//! BigChat tells everything once, so a page is kept durably before the next is asked for, and a page that the disk
//! refuses stays in memory until the disk takes it. Once the pages of a poll are kept it is looked whether BigChat
//! has restarted meanwhile; then their events are admitted to the journal, from where delivery takes them. The
//! poller knows nothing of OurAPI.

mod pages;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use thiserror::Error;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, sleep_until};

use crate::bigchat::{BigChatError, Page, window_query};
use crate::context::Context;
use crate::event::Kind;
use crate::http::Exchange;
use crate::journal::{JournalError, KeptPage, PageToKeep, Progress, STORAGE_PAUSE};
use crate::log::telling;
use crate::metrics;
use crate::resolve::restart::{self, Seen};
use crate::settings::Settings;
use crate::time::{Millis, Timestamp};
use crate::window::Window;
use pages::Pages;

/// How many pages one poll asks for before what it brought is delivered: a `nextPageUrl` may go on for ever.
const MAX_PAGES: usize = 200;

/// How much one poll reads before what it brought is delivered, in bytes: so much is held in memory.
const MAX_BYTES: usize = 8 << 20;

/// How many answers may tell BigChat's time before the first poll: one that is wrong, and two that agree.
const CLOCK_TRIES: u32 = 3;

/// How much a poll may hold in memory with the pages that were asked for again: beyond, no more are.
const MAX_BYTES_AGAIN: usize = 4 * MAX_BYTES;

/// How often a further page is asked for at once if it cannot be had.
const PAGE_TRIES: u32 = 3;

/// In how many polls the same further page may fail before its window is read again from the beginning.
const PAGE_FAILURES: u32 = 3;

/// In how many polls at the most a window that is read again may bring nothing new before it counts as read.
const REREAD: u32 = 100;

/// In how many polls it may be unknown whether BigChat has restarted, before it is taken to be the same.
const UNANSWERED: u32 = 3;

/// How far back the first poll ever reaches, if no `--since` says otherwise.
const FIRST_WINDOW: Duration = Duration::from_secs(10);

/// How many old events are dropped at once, so that nobody waits for it.
const PRUNED_AT_ONCE: u32 = 500;

/// Polls BigChat.
#[derive(Debug)]
pub struct Poller {
    context: Arc<Context>,
    /// A page that came and is not kept yet.
    unkept: Option<Arc<PageToKeep>>,
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
}

/// What a poll came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Polled {
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
    BigChat(#[from] BigChatError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(
        "BigChat does not tell whether it has restarted: what it told stays kept until it does"
    )]
    Unanswered,
}

impl Poller {
    /// A poller that has not polled yet.
    pub fn new(context: Arc<Context>) -> Self {
        Self {
            context,
            unkept: None,
            started_at: None,
            without_clock: false,
            page_failures: 0,
            unanswered: 0,
            undecided: 0,
        }
    }

    /// How many events were told and could not be kept so far.
    pub fn unkept(&self) -> usize {
        self.unkept.as_ref().map_or(0, |page| page.events)
    }

    /// Polls at every tick until the daemon is to stop.
    pub async fn run(&mut self) {
        let interval = self.context.settings.poll_interval;
        let mut tick = Instant::now();
        loop {
            let polled = self.poll().await;
            if polled != Polled::More {
                self.context.polled.cancel();
            }
            let wait = match (polled, self.unkept.is_some()) {
                (_, true) => STORAGE_PAUSE.min(interval),
                (Polled::More, _) => Duration::ZERO,
                _ => {
                    if !self.context.storage.polling.load(Ordering::Relaxed) {
                        self.prune(tick + interval).await;
                    }
                    interval
                }
            };
            // A slow poll delays the next one and piles up nothing.
            tick = (tick + wait).max(Instant::now());
            self.context.pulse.polling.beat(wait);
            let stopping = self.context.stopping.clone();
            tokio::select! {
                () = stopping.cancelled() => return,
                () = sleep_until(tick) => {}
            }
        }
    }

    /// Polls until BigChat is read up to now, or cannot be read; what it told is kept. True if it is read up to now.
    pub async fn catch_up(&mut self) -> bool {
        let mut polled = Polled::More;
        while !self.context.stopping.is_cancelled() {
            polled = self.poll().await;
            match polled {
                Polled::More => {}
                _ if self.unkept() > 0 => sleep(STORAGE_PAUSE).await,
                Polled::UpToDate | Polled::Incomplete => break,
            }
        }
        self.prune(Instant::now()).await;
        polled == Polled::UpToDate
    }

    /// One poll. What goes wrong is logged here, and the next one goes on from there.
    async fn poll(&mut self) -> Polled {
        let polled = self.try_poll().await;
        let Context {
            metrics, storage, ..
        } = &*self.context;
        metrics.polled(match &polled {
            Ok(Polled::Incomplete) => metrics::Poll::Incomplete,
            Ok(Polled::UpToDate | Polled::More) => metrics::Poll::Complete,
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
                } = error.exchange();
                telling!(
                    !self.context.bigchat_is_down(),
                    reason = error.headline(),
                    request,
                    response,
                    "the poll failed; the next one goes on from the same point"
                );
                Polled::Incomplete
            }
            Err(error @ PollError::Unanswered) => {
                tracing::warn!("{error}");
                Polled::Incomplete
            }
            Err(PollError::Journal(error)) => {
                if !refused.swap(true, Ordering::Relaxed) {
                    tracing::error!(reason = %error, "the journal cannot be written: polling pauses until it can");
                }
                Polled::Incomplete
            }
        }
    }

    async fn try_poll(&mut self) -> Result<Polled, PollError> {
        self.keep().await?;
        self.context.journal.with(|store| store.in_place()).await?;
        for _ in 0..CLOCK_TRIES {
            if !self.context.bigchat.clock().is_sure() {
                // The first answer of all tells BigChat's time, by which the first window goes.
                restart::look(&self.context).await?;
            }
        }
        let now = self.context.bigchat.clock().now().unwrap_or_else(|| {
            let now = Timestamp::of_this_machine();
            if !std::mem::replace(&mut self.without_clock, true) {
                tracing::warn!(date = %now, "BigChat does not tell its time: this machine's clock is taken for it");
            }
            now
        });
        self.started_at.get_or_insert(now);
        // What was kept and not admitted before: the daemon was stopped, or the journal refused. A poll that goes on
        // goes on with its earlier pages, by which equal messages on the next ones are told apart.
        let mut pages = Pages::load(&self.context).await?;
        if pages.are_new() {
            self.clear_up(&mut pages).await?;
            self.admit(&mut pages).await?;
        }
        if self.context.stopping.is_cancelled() {
            return Ok(Polled::Incomplete);
        }
        let (window, next, rereading) = self.window(now).await?;
        if next.is_none() {
            pages.forget(&self.context).await?;
        } else if pages.are_many() {
            pages.forget_but_the_last(&self.context).await?;
        }
        let next = next.unwrap_or_else(|| window_query(window.start, window.end));
        let read = self.read(&mut pages, window, next).await;
        if self.context.stopping.is_cancelled() {
            // What was kept is admitted at the next start.
            return Ok(Polled::Incomplete);
        }
        // A BigChat that tells nothing at all tells nothing of a restart either.
        let new = if !pages.are_new() && read.is_err() {
            0
        } else {
            self.admit(&mut pages).await?
        };
        let (polled, cursor) = match read? {
            Ended::Complete if window.catching_up => (Polled::More, None),
            Ended::Complete => (Polled::UpToDate, None),
            Ended::Stuck => (Polled::Incomplete, None),
            Ended::Budget if new > 0 || rereading > 0 => {
                self.context.journal.with(|store| store.reread()).await?;
                tracing::warn!(
                    "a poll had more pages than are asked for at once; the next one goes on from there"
                );
                return Ok(Polled::Incomplete);
            }
            Ended::Budget => {
                tracing::warn!(
                    "a poll went on and on and brought nothing new; it counts as complete"
                );
                (Polled::UpToDate, Some(window.end))
            }
        };
        let rereading = if polled == Polled::Incomplete {
            REREAD
        } else {
            0
        };
        let read = (polled != Polled::Incomplete).then(|| {
            let here = Timestamp::of_this_machine();
            let there = self.context.bigchat.clock().now().unwrap_or(here);
            (Millis::now(), there.unix() - here.unix())
        });
        self.context
            .journal
            .with(move |store| store.end_poll(cursor, rereading, read))
            .await?;
        Ok(polled)
    }

    /// The window of the poll under way and its next page, else the next window; and in how many polls it may still
    /// bring nothing new.
    async fn window(&mut self, now: Timestamp) -> Result<(Window, Option<String>, u32), PollError> {
        let settings = &self.context.settings;
        let source = self.context.journal.with(|store| store.source()).await?;
        if let Some(((start, end), Some(next))) = source.poll {
            let window = Window {
                start,
                end,
                catching_up: end < now,
            };
            return Ok((window, Some(next), source.rereading));
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
            self.context
                .journal
                .with(move |store| store.set_cursor(cursor))
                .await?;
        }
        let window = Window::next(cursor, now, settings.poll_overlap, settings.max_window);
        Ok((window, None, source.rereading))
    }

    /// Asks for the pages of the window, one after the other, each kept before the next.
    async fn read(
        &mut self,
        pages: &mut Pages,
        window: Window,
        first: String,
    ) -> Result<Ended, PollError> {
        let mut next = Some(first);
        let mut bytes = 0;
        for _ in 0..MAX_PAGES {
            if bytes > MAX_BYTES || self.context.stopping.is_cancelled() {
                break;
            }
            let Some(query) = next else {
                return Ok(Ended::Complete);
            };
            let page = match self.ask(&query, bytes > 0).await {
                Ok(page) => page,
                Err(error) => {
                    let first = window_query(window.start, window.end);
                    return self.page_failed(error, query != first);
                }
            };
            self.page_failures = 0;
            bytes += page.body.len();
            let now = self.context.bigchat.clock().now().unwrap_or(window.end);
            let asked_before =
                |next: &str| next == query || pages.kept.iter().any(|page| page.query == next);
            next = page.next.filter(|next| {
                let circle = asked_before(next);
                if circle {
                    tracing::warn!(%next, "BigChat's pages go in a circle; the poll is complete");
                }
                !circle
            });
            let progress = match &next {
                Some(next) => Progress::Next(next.clone()),
                None => Progress::Complete(window.end.min(now)),
            };
            let kept = PageToKeep {
                query,
                again_of: None,
                served_at: page.date.unwrap_or(now),
                window: (window.start, window.end),
                body: page.body,
                events: page.events,
                progress,
            };
            let kept = self.keep_page(kept).await?;
            pages.add(&self.context, kept).await?;
            self.clear_up(pages).await?;
        }
        Ok(if next.is_none() {
            Ended::Complete
        } else {
            Ended::Budget
        })
    }

    /// Asks for a page. What fails for a moment is asked for again at once if the pages before it are fresh: later
    /// they may have shifted beyond recognition.
    async fn ask(&self, query: &str, at_once: bool) -> Result<Page, BigChatError> {
        let tries = if at_once { PAGE_TRIES } else { 1 };
        let bigchat = &self.context.bigchat;
        let answer = self
            .context
            .ask_bigchat(tries, || bigchat.events(query))
            .await;
        self.context.note_tells_events(answer.is_ok());
        answer
    }

    /// A page cannot be had. The next poll goes on from it; if that does not help, from the beginning of the window.
    fn page_failed(&mut self, error: BigChatError, further: bool) -> Result<Ended, PollError> {
        if let (false, BigChatError::NotFound(exchange)) = (further, &error) {
            let answer = Err(BigChatError::NotBigChat(exchange.clone()));
            self.context.bigchat_answered(&answer);
            return answer.map_err(Into::into);
        }
        if is_outage(&error) {
            return Err(error.into());
        }
        self.page_failures += 1;
        if further && (is_gone(&error) || self.page_failures >= PAGE_FAILURES) {
            let Exchange {
                request, response, ..
            } = error.exchange();
            tracing::warn!(
                reason = error.headline(),
                request,
                response,
                "the next page cannot be had: the window is read again from its beginning"
            );
            self.page_failures = 0;
            return Ok(Ended::Stuck);
        }
        Err(error.into())
    }

    /// Where an equal message on two pages may be one or two: asks for the earlier page again.
    async fn clear_up(&mut self, pages: &mut Pages) -> Result<(), PollError> {
        while let Some(number) = pages.tally.unclear()
            && !self.context.stopping.is_cancelled()
        {
            if pages.bytes() > MAX_BYTES_AGAIN {
                tracing::warn!(
                    "pages that were asked for again are too large: equal messages on two pages count as two, unless they stand where the two meet"
                );
                pages.give_up(number);
                continue;
            }
            // While it is certain which run told the pages so far.
            self.look(pages).await?;
            let Some(earlier) = pages.page(number) else {
                return Ok(());
            };
            let (id, query, window_start) =
                (earlier.id, earlier.query.clone(), earlier.window_start);
            tracing::debug!(%query, "an equal message came on a later page; the earlier one is asked for again");
            let page = match self.ask(&query, true).await {
                Ok(page) => page,
                // Nothing is wrong with the page while BigChat answers nothing at all.
                Err(error) if is_outage(&error) || self.context.bigchat_is_down() => {
                    return Err(error.into());
                }
                Err(error) => {
                    self.page_failures += 1;
                    if !is_gone(&error) && self.page_failures < PAGE_FAILURES {
                        return Err(error.into());
                    }
                    let Exchange {
                        request, response, ..
                    } = error.exchange();
                    tracing::warn!(
                        reason = error.headline(),
                        request,
                        response,
                        "an earlier page cannot be had again: equal messages on it and a later one count as two, unless they stand where the two meet"
                    );
                    self.page_failures = 0;
                    pages.give_up(number);
                    continue;
                }
            };
            let served_at = page.date.unwrap_or(earlier.served_at);
            let (earlier, strange) = (earlier.clone(), !pages.has_some_of(number, &page));
            let kept = PageToKeep {
                query,
                again_of: Some(id),
                served_at,
                window: (window_start, window_start),
                body: page.body,
                events: page.events,
                progress: Progress::Unchanged,
            };
            let mut kept = self.keep_page(kept).await?;
            let gone = strange && self.is_of_before(&earlier).await?;
            if gone {
                // It is a page like any other.
                kept.again_of = None;
            }
            pages.add(&self.context, kept).await?;
            if gone {
                tracing::warn!(
                    "BigChat has restarted in the middle of a poll: its earlier pages cannot be had again"
                );
                pages.give_up(number);
            }
        }
        Ok(())
    }

    /// Whether BigChat has restarted since it told a page.
    async fn is_of_before(&self, page: &KeptPage) -> Result<bool, PollError> {
        if restart::look(&self.context).await? == Seen::Unanswered {
            return Err(PollError::Unanswered);
        }
        let present = self.context.run().await?;
        let told_by = restart::run_of(&self.context, page).await?;
        Ok(told_by.is_some_and(|epoch| epoch < present))
    }

    /// Looks whether BigChat has restarted. If not, that is certain of the pages as well.
    async fn look(&self, pages: &mut Pages) -> Result<Seen, JournalError> {
        let seen = restart::look(&self.context).await?;
        if seen == Seen::Same {
            let present = self.context.run().await?;
            let kept = pages.kept.iter_mut();
            for page in kept.filter(|page| page.kept_in == present) {
                page.told_by = Some(present);
            }
        }
        Ok(seen)
    }

    async fn keep_page(&mut self, page: PageToKeep) -> Result<KeptPage, PollError> {
        let page = Arc::new(page);
        self.unkept = Some(Arc::clone(&page));
        let (id, kept_in) = self.keep().await?.unwrap_or_default();
        tracing::debug!(events = page.events, query = %page.query, "a page was kept");
        let PageToKeep {
            query,
            again_of,
            served_at,
            window,
            body,
            ..
        } = Arc::unwrap_or_clone(page);
        Ok(KeptPage {
            id,
            query,
            again_of,
            served_at,
            window_start: window.0,
            body,
            admitted: false,
            kept_in,
            told_by: None,
        })
    }

    /// Keeps the page that came last, if it is not kept yet.
    async fn keep(&mut self) -> Result<Option<(i64, i64)>, JournalError> {
        let Some(page) = self.unkept.clone() else {
            return Ok(None);
        };
        let kept = self
            .context
            .journal
            .with(move |store| store.keep_page(&page))
            .await?;
        self.unkept = None;
        Ok(Some(kept))
    }

    /// Admits the events of the pages that were kept, now that it can be known which run of BigChat told them.
    /// Returns how many were new. Where it is unclear how many there are, the pages stay kept until it is known.
    async fn admit(&mut self, pages: &mut Pages) -> Result<usize, PollError> {
        self.look_for_restart(pages).await?;
        if pages.kept.is_empty() || pages.tally.unclear().is_some() {
            return Ok(0);
        }
        let mut admitting = Vec::new();
        for page in pages.kept.iter().filter(|page| !page.admitted) {
            let before_start = self
                .started_at
                .is_none_or(|started_at| page.window_start < started_at);
            admitting.push((page.clone(), self.run_of(page).await?, before_start));
        }
        let tally = Arc::new(std::mem::take(&mut pages.tally));
        let (told, mark) = (Arc::clone(&tally), self.context.look_up_mark());
        // All at once, before delivery takes any of it on: what a later page says of a chat overrides an earlier one.
        let all = self
            .context
            .journal
            .with(move |store| {
                let mut all = Vec::new();
                for (page, epoch, before_start) in admitting {
                    let admitted = store.admit(&page, epoch, &told, Millis::now())?;
                    if before_start {
                        // Before anybody can take these events on.
                        mark.fetch_max(admitted.last_event, Ordering::Relaxed);
                    }
                    all.push((admitted, page.query));
                }
                Ok(all)
            })
            .await?;
        pages.kept.iter_mut().for_each(|page| page.admitted = true);
        for (admitted, query) in &all {
            for (kind, count) in &admitted.told {
                self.context.metrics.told(kind, *count);
            }
            if admitted.unreadable > 0 {
                tracing::warn!(
                    events = admitted.unreadable, %query,
                    "events that cannot be understood; see `bigchat-sync failed`"
                );
            }
            if admitted.new > 0 {
                tracing::debug!(events = admitted.new, query = %query, "told by BigChat");
                self.context.work.notify_one();
                // Its claims come first; what the poll still has to keep can wait.
                yield_now().await;
            }
        }
        pages.tally = Arc::into_inner(tally).unwrap_or_default();
        let new = all.iter().map(|(admitted, _)| admitted.new).sum();
        Ok(new)
    }

    /// Which run of BigChat told a page. Where BigChat gives no answer to that, the page stays kept until it does, for a
    /// while.
    async fn run_of(&mut self, page: &KeptPage) -> Result<i64, PollError> {
        if let Some(epoch) = restart::run_of(&self.context, page).await? {
            self.undecided = 0;
            return Ok(epoch);
        }
        self.undecided += 1;
        if self.undecided < UNANSWERED {
            return Err(PollError::Unanswered);
        }
        let served_at = page.served_at;
        let by_time = self
            .context
            .journal
            .with(move |store| store.epoch_at(served_at));
        Ok(by_time.await?.0)
    }

    /// Looks once a poll whether BigChat has restarted: a START of a known conversation tells it too. Where BigChat
    /// gives no answer to that, its pages stay kept until it does, for a while.
    async fn look_for_restart(&mut self, pages: &mut Pages) -> Result<(), PollError> {
        let seen = self.look(pages).await?;
        let mut starts = Vec::new();
        if matches!(seen, Seen::Unknown | Seen::Unanswered) {
            for page in pages.kept.iter().filter(|page| !page.admitted) {
                let events = page
                    .events()
                    .into_iter()
                    .filter(|event| event.kind == Kind::Start);
                starts.extend(events.map(|event| (event, page.served_at)));
            }
        }
        for (event, served_at) in starts {
            let (epoch, known) = self
                .context
                .journal
                .with(move |store| Ok((store.epoch()?, store.start_of(event.conversation)?)))
                .await?;
            if known.is_some_and(|known| known != event.at) {
                restart::begin(&self.context, epoch, event.at.min(served_at)).await?;
                self.unanswered = 0;
                return Ok(());
            }
        }
        if seen != Seen::Unanswered || !pages.are_new() {
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

    /// Drops old events, and stops for the next poll: the rest of them can wait. But a tenth of the interval is theirs:
    /// slow polls must not let the journal grow.
    async fn prune(&mut self, next_poll: Instant) {
        let Settings {
            retention,
            poll_overlap: overlap,
            poll_interval,
            ..
        } = self.context.settings;
        let until = next_poll.max(Instant::now() + poll_interval / 10);
        loop {
            let pruned = self
                .context
                .journal
                .with(move |store| store.prune(retention, overlap, Millis::now(), PRUNED_AT_ONCE))
                .await;
            match pruned {
                Ok(pruned)
                    if pruned == PRUNED_AT_ONCE as usize
                        && Instant::now() < until
                        && !self.context.stopping.is_cancelled() => {}
                Ok(_) => return,
                Err(error) => {
                    tracing::warn!(reason = %error, "old events could not be dropped");
                    return;
                }
            }
        }
    }
}

/// Whether it is not the page's own fault.
fn is_outage(error: &BigChatError) -> bool {
    matches!(
        error,
        BigChatError::Throttled { .. } | BigChatError::Denied(_)
    )
}

/// Whether it is no use in asking for that page again.
fn is_gone(error: &BigChatError) -> bool {
    matches!(error, BigChatError::NotFound(_) | BigChatError::Refused(_))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// With the last page.
    Complete,
    /// With the last page that one poll asks for.
    Budget,
    /// With a page that cannot be had.
    Stuck,
}
