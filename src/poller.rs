//! The poller: asks BigChat what happened and keeps it, page by page, before anything else is done.
//!
//! BigChat tells everything once, so a page is kept durably before the next is asked for, and a page that the disk
//! refuses stays in memory until the disk takes it. Once the pages of a poll are kept it is looked whether BigChat
//! has restarted meanwhile; then their events are admitted to the journal, from where delivery takes them. The
//! poller knows nothing of OurAPI.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::time::{Instant, sleep_until};

use crate::bigchat::{BigChatError, window_query};
use crate::context::Context;
use crate::dedupe::{Key, Tally};
use crate::event::{Event, Kind};
use crate::journal::{JournalError, KeptPage, PageToKeep, Progress, Source};
use crate::resolve::restart::{self, Seen};
use crate::time::{Millis, Timestamp};
use crate::window::Window;

/// How many pages one poll asks for before what it brought is delivered: a `nextPageUrl` may go on for ever.
const MAX_PAGES: usize = 200;

/// How much one poll reads before what it brought is delivered, in bytes: so much is held in memory.
const MAX_BYTES: usize = 8 << 20;

/// How often the same further page may fail before its window is read again from the beginning.
const PAGE_FAILURES: u32 = 3;

/// How far back the first poll ever reaches, if no `--since` says otherwise.
const FIRST_WINDOW: Duration = Duration::from_secs(10);

/// How often a page that the disk refuses is tried again.
const STORAGE_PAUSE: Duration = Duration::from_secs(1);

/// How many old events are dropped at once, so that nobody waits for it.
const PRUNED_AT_ONCE: u32 = 500;

/// Polls BigChat.
#[derive(Debug)]
pub struct Poller {
    context: Arc<Context>,
    /// A page that came and is not kept yet.
    unkept: Option<PageToKeep>,
    /// When this daemon started, by BigChat's clock.
    started_at: Option<Timestamp>,
    storage_refuses: bool,
    page_failures: u32,
}

/// What a poll came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Polled {
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
}

impl Poller {
    /// A poller that has not polled yet.
    pub fn new(context: Arc<Context>) -> Self {
        Self {
            context,
            unkept: None,
            started_at: None,
            storage_refuses: false,
            page_failures: 0,
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
            let wait = match (polled, self.unkept.is_some()) {
                (_, true) => STORAGE_PAUSE.min(interval),
                (Polled::More, _) => Duration::ZERO,
                _ => {
                    self.prune().await;
                    interval
                }
            };
            // A slow poll delays the next one and piles up nothing.
            tick = (tick + wait).max(Instant::now());
            let stopping = self.context.stopping.clone();
            tokio::select! {
                () = stopping.cancelled() => return,
                () = sleep_until(tick) => {}
            }
        }
    }

    /// Polls until BigChat is read up to now, or cannot be read.
    pub async fn catch_up(&mut self) {
        while self.poll().await == Polled::More && !self.context.stopping.is_cancelled() {}
    }

    /// One poll. What goes wrong is logged here, and the next one goes on from there.
    pub async fn poll(&mut self) -> Polled {
        match self.try_poll().await {
            Ok(polled) => {
                if std::mem::take(&mut self.storage_refuses) {
                    tracing::info!("the journal can be written again: polling goes on");
                }
                polled
            }
            Err(PollError::BigChat(error)) => {
                // What is asked for is told only once: it may be gone, which is BigChat's loss and not ours.
                tracing::warn!(%error, "the poll failed; the next one goes on from the same point");
                Polled::Incomplete
            }
            Err(PollError::Journal(error)) => {
                if !std::mem::replace(&mut self.storage_refuses, true) {
                    tracing::error!(%error, "the journal cannot be written: polling pauses until it can");
                }
                Polled::Incomplete
            }
        }
    }

    async fn try_poll(&mut self) -> Result<Polled, PollError> {
        self.keep().await?;
        if self.context.bigchat.clock().now().is_none() {
            // The first answer of all tells BigChat's time, by which the first window goes.
            restart::look(&self.context).await?;
        }
        let now = self.context.bigchat.clock().now().unwrap_or_else(|| {
            let now = Timestamp::of_this_machine();
            tracing::warn!(%now, "BigChat does not tell its time: this machine's clock is taken for it");
            now
        });
        let started_at = *self.started_at.get_or_insert(now);
        let (window, catching_up) = self.window(now).await?;
        let mut pages = Pages::load(&self.context).await?;
        let read = self.read(&mut pages, window).await;
        if self.context.stopping.is_cancelled() {
            // What was kept is admitted at the next start.
            return Ok(Polled::Incomplete);
        }
        let admitted = self.admit(&mut pages, started_at).await?;
        let ended = read?;
        let polled = match ended {
            Ended::Stuck => Polled::Incomplete,
            Ended::Complete if catching_up => Polled::More,
            Ended::Complete => Polled::UpToDate,
            Ended::Budget if admitted > 0 => {
                tracing::warn!(
                    "a poll had more pages than are asked for at once; the next one goes on from there"
                );
                self.context
                    .journal
                    .with(|store| store.forget_admitted_pages())
                    .await?;
                return Ok(Polled::Incomplete);
            }
            Ended::Budget => {
                tracing::warn!(
                    "a poll went on and on and brought nothing new; it counts as complete"
                );
                Polled::UpToDate
            }
        };
        let cursor = (ended == Ended::Budget).then_some(window.1);
        self.context
            .journal
            .with(move |store| store.end_poll(cursor))
            .await?;
        Ok(polled)
    }

    /// The window of the poll under way, or the next one.
    async fn window(
        &mut self,
        now: Timestamp,
    ) -> Result<((Timestamp, Timestamp), bool), PollError> {
        let settings = &self.context.settings;
        let source = self.context.journal.with(|store| store.source()).await?;
        if let Source {
            poll: Some((window, _)),
            ..
        } = source
        {
            return Ok((window, window.1 < now));
        }
        let cursor = match source.cursor {
            Some(cursor) if cursor <= now => cursor,
            cursor => {
                let first = settings
                    .since
                    .filter(|_| cursor.is_none())
                    .unwrap_or(now.minus(FIRST_WINDOW));
                let cursor = if cursor.is_none() {
                    first.min(now)
                } else {
                    now
                };
                self.context
                    .journal
                    .with(move |store| store.set_cursor(cursor))
                    .await?;
                cursor
            }
        };
        let window = Window::next(cursor, now, settings.poll_overlap, settings.max_window);
        Ok(((window.start, window.end), window.catching_up))
    }

    /// Asks for the pages of the window, one after the other, each kept before the next.
    async fn read(
        &mut self,
        pages: &mut Pages,
        window: (Timestamp, Timestamp),
    ) -> Result<Ended, PollError> {
        let source = self.context.journal.with(|store| store.source()).await?;
        let mut next = match source.poll {
            Some((_, next)) => next,
            None => Some(window_query(window.0, window.1)),
        };
        let mut bytes = 0;
        for _ in 0..MAX_PAGES {
            self.clear_up(pages, window).await?;
            if bytes > MAX_BYTES || self.context.stopping.is_cancelled() {
                break;
            }
            let Some(query) = next else {
                return Ok(Ended::Complete);
            };
            let answer = self.context.bigchat.events(&query).await;
            self.context.bigchat_answered(&answer);
            let page = match answer {
                Ok(page) => page,
                Err(error) if pages.kept.is_empty() => return Err(error.into()),
                Err(error) => {
                    self.page_failures += 1;
                    let gone =
                        matches!(error, BigChatError::NotFound(_) | BigChatError::Refused(_));
                    if !gone && self.page_failures < PAGE_FAILURES {
                        return Err(error.into());
                    }
                    tracing::warn!(%error, "the next page cannot be had: the window is read again from its beginning");
                    self.page_failures = 0;
                    return Ok(Ended::Stuck);
                }
            };
            self.page_failures = 0;
            bytes += page.body.len();
            let served_at = self.context.bigchat.clock().now().unwrap_or(window.1);
            let asked_before =
                |next: &str| next == query || pages.kept.iter().any(|page| page.query == next);
            let progress = match page.next {
                Some(next) if asked_before(&next) => {
                    tracing::warn!(%next, "BigChat's pages go in a circle; the poll is complete");
                    Progress::Complete(window.1.min(served_at))
                }
                Some(next) => Progress::Next(next),
                None => Progress::Complete(window.1.min(served_at)),
            };
            next = match &progress {
                Progress::Next(query) => Some(query.clone()),
                Progress::Complete(_) | Progress::Unchanged => None,
            };
            let kept = PageToKeep {
                query,
                again_of: None,
                served_at,
                window,
                body: page.body,
                events: page.events,
                progress,
            };
            let kept = self.keep_page(kept).await?;
            pages.add(&self.context, kept).await?;
        }
        self.clear_up(pages, window).await?;
        Ok(if next.is_none() {
            Ended::Complete
        } else {
            Ended::Budget
        })
    }

    /// Where an equal message on two pages may be one or two: asks for the earlier page again.
    async fn clear_up(
        &mut self,
        pages: &mut Pages,
        window: (Timestamp, Timestamp),
    ) -> Result<(), PollError> {
        while let Some(number) = pages.tally.unclear() {
            let Some((id, query)) = pages.first_told.get(number).cloned() else {
                return Ok(());
            };
            tracing::debug!(%query, "an equal message came on a later page; the earlier one is asked for again");
            let answer = self.context.bigchat.events(&query).await;
            self.context.bigchat_answered(&answer);
            let page = answer?;
            let served_at = self.context.bigchat.clock().now().unwrap_or(window.1);
            let kept = PageToKeep {
                query,
                again_of: Some(id),
                served_at,
                window,
                body: page.body,
                events: page.events,
                progress: Progress::Unchanged,
            };
            let kept = self.keep_page(kept).await?;
            pages.add(&self.context, kept).await?;
        }
        Ok(())
    }

    async fn keep_page(&mut self, page: PageToKeep) -> Result<KeptPage, PollError> {
        let events = page.events;
        self.unkept = Some(page.clone());
        let id = self.keep().await?.unwrap_or_default();
        tracing::debug!(events, query = %page.query, "a page was kept");
        let PageToKeep {
            query,
            again_of,
            served_at,
            window,
            body,
            ..
        } = page;
        Ok(KeptPage {
            id,
            query,
            again_of,
            served_at,
            window_start: window.0,
            body,
            admitted: false,
        })
    }

    /// Keeps the page that came last, if it is not kept yet.
    async fn keep(&mut self) -> Result<Option<i64>, JournalError> {
        let Some(page) = self.unkept.clone() else {
            return Ok(None);
        };
        let id = self
            .context
            .journal
            .with(move |store| store.keep_page(&page))
            .await?;
        self.unkept = None;
        Ok(Some(id))
    }

    /// Admits the events of the pages that were kept, now that it is known which run of BigChat told them. Returns
    /// how many were new.
    async fn admit(
        &mut self,
        pages: &mut Pages,
        started_at: Timestamp,
    ) -> Result<usize, PollError> {
        self.look_for_restart(pages).await?;
        let (unclear, tally) = (
            pages.tally.unclear().is_some(),
            Arc::new(std::mem::take(&mut pages.tally)),
        );
        let mut new = 0;
        for page in pages.kept.drain(..).filter(|page| !page.admitted) {
            if unclear {
                // It stays kept, and is admitted once the earlier page has been asked for.
                break;
            }
            let (tally, before_start) = (Arc::clone(&tally), page.window_start < started_at);
            let (admitted, query) = self
                .context
                .journal
                .with(move |store| Ok((store.admit(&page, &tally, Millis::now())?, page.query)))
                .await?;
            if before_start {
                self.context.raise_look_up_through(admitted.last_event);
            }
            if admitted.unreadable > 0 {
                tracing::warn!(
                    events = admitted.unreadable, %query,
                    "events that cannot be understood; see `bigchat-sync failed`"
                );
            }
            if admitted.new > 0 {
                tracing::info!(events = admitted.new, "told by BigChat");
                self.context.work.notify_one();
            }
            new += admitted.new;
        }
        Ok(new)
    }

    /// Looks once a poll whether BigChat has restarted: a START of a known conversation tells it too.
    async fn look_for_restart(&mut self, pages: &Pages) -> Result<(), PollError> {
        if restart::look(&self.context).await? != Seen::Unclear {
            return Ok(());
        }
        for page in pages.kept.iter().filter(|page| !page.admitted) {
            for event in page
                .events()
                .into_iter()
                .filter(|event| event.kind == Kind::Start)
            {
                let known = self
                    .context
                    .journal
                    .with(move |store| store.start_of(event.conversation))
                    .await?;
                if known.is_some_and(|known| known != event.at) {
                    restart::begin(&self.context, event.at.min(page.served_at)).await?;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    async fn prune(&mut self) {
        let (retention, overlap) = (
            self.context.settings.retention,
            self.context.settings.poll_overlap,
        );
        loop {
            let pruned = self
                .context
                .journal
                .with(move |store| store.prune(retention, overlap, Millis::now(), PRUNED_AT_ONCE))
                .await;
            match pruned {
                Ok(pruned)
                    if pruned == PRUNED_AT_ONCE as usize
                        && !self.context.stopping.is_cancelled() => {}
                Ok(_) => return,
                Err(error) => {
                    tracing::warn!(%error, "old events could not be dropped");
                    return;
                }
            }
        }
    }
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

/// The pages of the poll under way.
#[derive(Debug, Default)]
struct Pages {
    kept: Vec<KeptPage>,
    tally: Tally,
    /// Id and query of the pages, by their number in the tally; those asked for again are not among them.
    first_told: Vec<(i64, String)>,
}

impl Pages {
    async fn load(context: &Context) -> Result<Self, JournalError> {
        let mut pages = Self::default();
        for page in context.journal.with(|store| store.kept_pages()).await? {
            pages.add(context, page).await?;
        }
        Ok(pages)
    }

    async fn add(&mut self, context: &Context, page: KeptPage) -> Result<(), JournalError> {
        let events = page.events();
        let keys: Vec<Key> = events.iter().map(Key::from).collect();
        match page
            .again_of
            .and_then(|id| self.first_told.iter().position(|(told, _)| *told == id))
        {
            Some(number) => self.tally.again(number, &keys),
            None => {
                let known = self.known(context, &events).await?;
                self.tally.page(&keys, |key| {
                    known
                        .iter()
                        .find(|(known, _)| known == key)
                        .map_or(0, |(_, count)| *count)
                });
                self.first_told.push((page.id, page.query.clone()));
            }
        }
        self.kept.push(page);
        Ok(())
    }

    /// How many the journal holds of those messages that this poll has told before.
    async fn known(
        &self,
        context: &Context,
        events: &[Event],
    ) -> Result<Vec<(Key, u32)>, JournalError> {
        let told_before: HashSet<Key> = events
            .iter()
            .map(Key::from)
            .filter(|key| key.kind == Kind::Message && self.tally.told(key) > 0)
            .collect();
        let mut known = Vec::new();
        for event in events
            .iter()
            .filter(|event| told_before.contains(&Key::from(*event)))
        {
            let (key, event) = (Key::from(event), event.clone());
            known.push((
                key,
                context
                    .journal
                    .with(move |store| store.count_known(&event))
                    .await?,
            ));
        }
        Ok(known)
    }
}
