//! Fetching the pages of a window. Each page is stored before the next is requested.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::pages::Pages;
use super::{MAX_BYTES, MAX_PAGES, PollError, Poller, by_machine_clock};
use crate::bigchat::{Page, canonical_query, window_query};
use crate::domain::ids::Epoch;
use crate::domain::time::Timestamp;
use crate::domain::window::Window;
use crate::http::{ApiError, Cause, ErrorKind};
use crate::journal::{JournalError, NewPage, StoredPage, WindowProgress, keys};

const SECOND: Duration = Duration::from_secs(1);

/// How often in a row a page is requested while this fails transiently, unless it is the first page of a poll.
const PAGE_ATTEMPTS: u32 = 3;

/// In how many polls the same page may fail before its window is read again from the beginning. The first page of a
/// window does not count.
const MAX_PAGE_FAILURES: u32 = 3;

/// A window of this length or less is not shortened, unless its page is too large: its length is not the reason why
/// BigChat gives no usable answer.
const SHORT_WINDOW: Duration = Duration::from_secs(300);

/// How the fetch of a window ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FetchEnd {
    /// The last page was fetched: BigChat was read up to this time.
    Complete(Timestamp),
    /// The budget of the poll was used up.
    Budget,
    /// A later page cannot be fetched, so the window is read again.
    Stuck,
    /// BigChat rejected the first page, because it no longer answers for windows that start before this time.
    TooOld(Timestamp),
}

impl Poller {
    pub(super) async fn fetch(
        &mut self,
        pages: &mut Pages,
        window: Window,
        first: String,
    ) -> Result<FetchEnd, PollError> {
        let mut query = first;
        let mut bytes = 0;
        for _ in 0..MAX_PAGES {
            if bytes > MAX_BYTES || self.signals.stopping.is_cancelled() {
                break;
            }
            // This must be read before the request, because BigChat may restart before the page is stored.
            let requested_in = self.source.epoch();
            let is_first = query == window_query(window);
            // If an earlier page was just read, this one is retried at once: by the next poll, BigChat may have divided
            // the events into pages differently.
            let attempts = if bytes > 0 { PAGE_ATTEMPTS } else { 1 };
            let mut page = match self.source.events(&query, attempts).await {
                Ok(page) => page,
                Err(error) => {
                    if (is_first || error.exchange.cause == Some(Cause::PageTooLarge))
                        && matches!(error.kind, ErrorKind::OutcomeUnknown { .. })
                    {
                        self.shorten_windows(window, &error);
                    }
                    if is_first && error.kind == ErrorKind::Rejected {
                        return self.find_oldest(pages, window, error).await;
                    }
                    return self.page_failed(error, !is_first);
                }
            };
            self.page_failures = 0;
            if is_first {
                self.max_window = (self.max_window * 2).min(self.settings.max_window);
            }
            bytes += page.body.len();
            let now = self.source.clock().now().unwrap_or(window.end);
            let keys = keys(&page.body);
            let next = page.next.take().filter(|next| {
                // The first page is checked separately: after a pause, the earlier pages are no longer in memory.
                let read = [window_query(window), query.clone()].map(|query| canonical_query(&query));
                let end = if read.contains(&canonical_query(next)) || pages.has(next) {
                    Some("BigChat's pagination loops")
                } else {
                    pages.end_of(&keys)
                };
                if let Some(reason) = end {
                    tracing::warn!(%next, reason, "the next page is not requested; treating the window as complete");
                }
                end.is_none()
            });
            let progress = match next {
                Some(next) => WindowProgress::Next(next),
                None => WindowProgress::Complete(self.read_up_to(window.end, now).await?),
            };
            let page = self
                .store_new(page, now, query, requested_in, window, progress.clone())
                .await?;
            pages.add(page, keys);
            match progress {
                WindowProgress::Next(next) => query = next,
                WindowProgress::Complete(cursor) => return Ok(FetchEnd::Complete(cursor)),
            }
        }
        Ok(FetchEnd::Budget)
    }

    /// Handles a page that cannot be fetched. The next poll continues from it. If a later page is gone, or has failed
    /// in several polls without an outage, the window is read again from its beginning.
    fn page_failed(&mut self, error: ApiError, is_later: bool) -> Result<FetchEnd, PollError> {
        if !is_later && matches!(error.kind, ErrorKind::NotFound(_)) {
            let http = self.source.http();
            let kind = ErrorKind::WrongService;
            return Err(http.reclassify(error, kind).into());
        }
        if is_outage(&error) {
            return Err(error.into());
        }
        self.page_failures += u32::from(is_later);
        if !is_later || !is_gone(&error) && self.page_failures < MAX_PAGE_FAILURES {
            return Err(error.into());
        }
        self.page_failures = 0;
        let failure = error.logged();
        tracing::warn!(
            reason = failure.reason,
            request = failure.request,
            response = failure.response,
            "the next page cannot be fetched; the window is read again from its beginning"
        );
        Ok(FetchEnd::Stuck)
    }

    /// Halves the length of the next windows, since BigChat may answer faster for a shorter one, with a smaller first
    /// page. Each first page that is received doubles the maximum again, up to the setting.
    fn shorten_windows(&mut self, window: Window, error: &ApiError) {
        let shortest = match error.exchange.cause {
            Some(Cause::PageTooLarge) => SECOND,
            _ => SHORT_WINDOW.max(self.settings.poll_overlap + SECOND),
        };
        let length = window.end.since(window.start);
        let max_window = (length / 2).max(shortest);
        // The windows are as short already, or this one was short enough not to be the reason.
        if max_window >= length.min(self.max_window) {
            return;
        }
        // A single failure need not be due to the length, so only the next one is logged.
        if self.max_window < self.settings.max_window {
            tracing::warn!(
                from = %window.start, until = %window.end,
                "BigChat gave no usable answer for a window of this length; trying shorter ones; if this happens again, set \
                 a shorter --max-window"
            );
        }
        self.max_window = max_window;
    }

    /// Handles a window that BigChat rejects. If BigChat answers for a recent window, this one is too long or too old.
    /// If BigChat rejects even one second from its start, it is too old, and a binary search finds the oldest time for
    /// which BigChat answers. Each response is ingested as a separate window, since BigChat may report its events only
    /// once.
    async fn find_oldest(
        &mut self,
        pages: &mut Pages,
        window: Window,
        error: ApiError,
    ) -> Result<FetchEnd, PollError> {
        let (began, longest) = (Instant::now(), self.max_window);
        let now = self.source.clock().now().unwrap_or(window.end);
        let mut answered = now.minus(self.settings.poll_overlap);
        let mut refused = window.start;
        if answered <= refused || !self.is_answered(pages, window, answered, longest).await? {
            return Err(error.into());
        }
        if self.is_answered(pages, window, refused, SECOND).await? {
            tracing::error!(
                from = %window.start, until = %window.end,
                "BigChat rejects a window of this length, but not a shorter one; set a shorter --max-window"
            );
            return Err(error.into());
        }
        while let Some(middle) = refused.middle(answered) {
            if self.signals.stopping.is_cancelled() {
                return Err(error.into());
            }
            if self.is_answered(pages, window, middle, longest).await? {
                answered = middle;
            } else {
                refused = middle;
            }
        }
        // If BigChat now answers for a time that it refused before, its refusals were not due to an age limit.
        if self.is_answered(pages, window, refused, longest).await? {
            return Err(error.into());
        }
        // The limit moves forward with time, and the next window must not start before it.
        Ok(FetchEnd::TooOld(answered.plus(began.elapsed())))
    }

    /// Whether BigChat answers for a window of this length from `start`. If so, ingests its first page.
    async fn is_answered(
        &mut self,
        pages: &mut Pages,
        window: Window,
        start: Timestamp,
        length: Duration,
    ) -> Result<bool, PollError> {
        let now = self.source.clock().now().unwrap_or(window.end);
        let end = start.plus(length).min(now).max(start);
        let query = window_query(Window { start, end });
        let requested_in = self.source.epoch();
        let page = match self.source.events(&query, 1).await {
            Ok(page) => page,
            Err(error) if error.kind == ErrorKind::Rejected => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let keys = keys(&page.body);
        // After an interruption, the window is requested anew, and so the search begins again.
        let progress = WindowProgress::Next(window_query(window));
        let page = self
            .store_new(page, now, query, requested_in, window, progress)
            .await?;
        pages.add(page, keys);
        self.ingest(pages).await?;
        pages.clear(&self.journal).await?;
        Ok(true)
    }

    /// Stores a page that was received at `now`.
    async fn store_new(
        &mut self,
        page: Page,
        now: Timestamp,
        query: String,
        requested_in: Epoch,
        window: Window,
        progress: WindowProgress,
    ) -> Result<StoredPage, PollError> {
        let page = Arc::new(NewPage {
            query,
            requested_in,
            served_at: page.date.unwrap_or(now),
            window,
            window_at: self.window_at.map(by_machine_clock),
            body: page.body,
            events: page.events,
            progress,
        });
        let id = self.store(Arc::clone(&page)).await?;
        tracing::debug!(events = page.events, query = %page.query, "page stored");
        let page = Arc::unwrap_or_clone(page);
        Ok(StoredPage {
            id,
            query: page.query,
            served_at: page.served_at,
            window_start: window.start,
            body: page.body,
            ingested: false,
            requested_in,
            epoch: None,
        })
    }

    /// Stores a received page and returns its id. If the disk refuses the page, it stays in memory.
    pub(super) async fn store(&mut self, page: Arc<NewPage>) -> Result<i64, JournalError> {
        self.unstored = Some(Arc::clone(&page));
        let id = self
            .journal
            .with(move |store| store.store_page(&page))
            .await?;
        self.unstored = None;
        Ok(id)
    }
}

/// Whether requests for other pages would fail, too.
fn is_outage(error: &ApiError) -> bool {
    matches!(
        error.kind,
        ErrorKind::Unreachable | ErrorKind::RateLimited { .. } | ErrorKind::Unauthorized
    )
}

/// Whether another request for the page would fail, too.
fn is_gone(error: &ApiError) -> bool {
    matches!(error.kind, ErrorKind::NotFound(_) | ErrorKind::Rejected)
        || error.exchange.cause == Some(Cause::PageTooLarge)
}
