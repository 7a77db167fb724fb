//! Reading: the pages of a window, one after the other, each kept before the next is asked for.

use std::sync::Arc;

use super::pages::Pages;
use super::{MAX_BYTES, MAX_PAGES, PollError, Poller};
use crate::bigchat::{Page, canonical_query, window_query};
use crate::domain::ids::Epoch;
use crate::domain::time::Timestamp;
use crate::domain::window::Window;
use crate::http::route::Route;
use crate::http::{ApiError, ErrorKind, Exchange};
use crate::journal::{JournalError, NewPage, Progress, StoredPage, keys};

/// How often a further page is asked for at once if it cannot be had.
const PAGE_TRIES: u32 = 3;

/// In how many polls the same further page may fail before its window is read again from the beginning.
const PAGE_FAILURES: u32 = 3;

/// How the reading of a window ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FetchEnd {
    /// With the last page.
    Complete,
    /// With the last page that one poll asks for.
    Budget,
    /// With a page that cannot be had.
    Stuck,
    /// At once: BigChat no longer answers for windows that start before then.
    TooOld(Timestamp),
}

impl Poller {
    /// Asks for the pages of the window, one after the other, each kept before the next.
    pub(super) async fn read(
        &mut self,
        pages: &mut Pages,
        window: Window,
        first: String,
    ) -> Result<FetchEnd, PollError> {
        let mut next = Some(first);
        let mut bytes = 0;
        for _ in 0..MAX_PAGES {
            if bytes > MAX_BYTES || self.signals.stopping.is_cancelled() {
                break;
            }
            let Some(query) = next else {
                return Ok(FetchEnd::Complete);
            };
            let page = match self.ask(&query, bytes > 0).await {
                Ok(page) => page,
                Err(error) => {
                    let is_first = query == window_query(window.start, window.end);
                    if is_first && error.kind == ErrorKind::Rejected {
                        return self.find_oldest(pages, window, error).await;
                    }
                    return self.page_failed(error, !is_first);
                }
            };
            self.page_failures = 0;
            bytes += page.body.len();
            let now = self.source.clock().now().unwrap_or(window.end);
            let keys = keys(&page.body);
            next = page.next.filter(|next| {
                let end = if canonical_query(next) == canonical_query(&query) || pages.has(next) {
                    Some("BigChat's pagination loops")
                } else {
                    pages.end_of(&keys)
                };
                if let Some(reason) = end {
                    tracing::warn!(%next, reason, "no further page is requested; treating the poll as complete");
                }
                end.is_none()
            });
            let progress = match &next {
                Some(next) => Progress::Next(next.clone()),
                None => Progress::Complete(window.end.min(now)),
            };
            let kept = NewPage {
                query,
                served_at: now,
                window: (window.start, window.end),
                body: page.body,
                events: page.events,
                progress,
            };
            pages.add(self.store_page(kept).await?, keys);
        }
        Ok(if next.is_none() {
            FetchEnd::Complete
        } else {
            FetchEnd::Budget
        })
    }

    /// Asks for a page. What fails for a moment is asked for again at once if the pages before it are fresh: later
    /// they may have shifted beyond recognition.
    async fn ask(&self, query: &str, at_once: bool) -> Result<Page, ApiError> {
        let tries = if at_once { PAGE_TRIES } else { 1 };
        let bigchat = &self.source.client;
        let answer = self.source.ask(tries, || bigchat.events(query)).await;
        self.source.epochs.polled(answer.is_ok());
        answer
    }

    /// A page cannot be had. The next poll goes on from it; if that does not help, from the beginning of the window.
    fn page_failed(&mut self, error: ApiError, further: bool) -> Result<FetchEnd, PollError> {
        if !further && matches!(error.kind, ErrorKind::NotFound(_)) {
            let http = self.source.http();
            let kind = ErrorKind::WrongService;
            return Err(http.reconsider(error, Route::Events, kind).into());
        }
        if is_outage(&error) {
            return Err(error.into());
        }
        self.page_failures += u32::from(further);
        if !further || !is_gone(&error) && self.page_failures < PAGE_FAILURES {
            return Err(error.into());
        }
        self.page_failures = 0;
        let Exchange {
            request, response, ..
        } = error.exchange.logged();
        tracing::warn!(
            reason = error.summary(),
            request,
            response,
            "the next page cannot be had: the window is read again from its beginning"
        );
        Ok(FetchEnd::Stuck)
    }

    /// BigChat refuses a window. If it answers for a recent one, it has dropped what is older than some limit, which is
    /// searched for here. Its answers on the way are ingested, each as a poll of its own: BigChat may report only once.
    async fn find_oldest(
        &mut self,
        pages: &mut Pages,
        window: Window,
        error: ApiError,
    ) -> Result<FetchEnd, PollError> {
        let now = self.source.clock().now().unwrap_or(window.end);
        let mut answered = now.minus(self.settings.poll_overlap);
        let mut refused = window.start;
        if answered <= refused || !self.is_answered(pages, window, answered).await? {
            return Err(error.into());
        }
        while let Some(middle) = refused.middle(answered) {
            if self.signals.stopping.is_cancelled() {
                return Err(error.into());
            }
            if self.is_answered(pages, window, middle).await? {
                answered = middle;
            } else {
                refused = middle;
            }
        }
        // A service that refuses now and then has no limit.
        if self.is_answered(pages, window, refused).await? {
            return Err(error.into());
        }
        Ok(FetchEnd::TooOld(answered))
    }

    /// Whether BigChat answers for a window that starts then. If so, its first page is ingested.
    async fn is_answered(
        &mut self,
        pages: &mut Pages,
        window: Window,
        start: Timestamp,
    ) -> Result<bool, PollError> {
        let now = self.source.clock().now().unwrap_or(window.end);
        let end = start.plus(self.settings.max_window).min(now).max(start);
        let query = window_query(start, end);
        let page = match self.ask(&query, false).await {
            Ok(page) => page,
            Err(error) if error.kind == ErrorKind::Rejected => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let keys = keys(&page.body);
        let page = NewPage {
            query,
            served_at: now,
            window: (window.start, window.end),
            body: page.body,
            events: page.events,
            // If that is all that becomes of it, the search begins anew.
            progress: Progress::Next(window_query(window.start, window.end)),
        };
        pages.add(self.store_page(page).await?, keys);
        self.ingest(pages).await?;
        pages.forget(&self.journal).await?;
        Ok(true)
    }

    async fn store_page(&mut self, page: NewPage) -> Result<StoredPage, PollError> {
        let page = Arc::new(page);
        let (id, kept_in) = self.keep(Arc::clone(&page)).await?;
        tracing::debug!(events = page.events, query = %page.query, "a page was kept");
        let NewPage {
            query,
            served_at,
            window,
            body,
            ..
        } = Arc::unwrap_or_clone(page);
        Ok(StoredPage {
            id,
            query,
            served_at,
            window_start: window.0,
            body,
            ingested: false,
            kept_in,
            told_by: None,
        })
    }

    /// Keeps the page that came last; where the disk refuses, it stays in memory. Returns its id and the run it is kept in.
    pub(super) async fn keep(&mut self, page: Arc<NewPage>) -> Result<(i64, Epoch), JournalError> {
        self.unstored = Some(Arc::clone(&page));
        let kept = self
            .journal
            .with(move |store| store.store_page(&page))
            .await?;
        self.unstored = None;
        Ok(kept)
    }
}

/// Whether it is not the page's own fault.
fn is_outage(error: &ApiError) -> bool {
    matches!(
        error.kind,
        ErrorKind::RateLimited { .. } | ErrorKind::Unauthorized
    )
}

/// Whether it is no use in asking for that page again.
fn is_gone(error: &ApiError) -> bool {
    matches!(error.kind, ErrorKind::NotFound(_) | ErrorKind::Rejected)
}
