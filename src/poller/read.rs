//! Reading: the pages of a window, one after the other, each kept before the next is asked for.

use std::sync::Arc;

use super::pages::Pages;
use super::{MAX_BYTES, MAX_PAGES, PollError, Poller};
use crate::bigchat::{Page, window_query};
use crate::domain::ids::Epoch;
use crate::http::route::Route;
use crate::http::{ApiError, ErrorKind, Exchange};
use crate::journal::{JournalError, KeptPage, PageToKeep, Progress};
use crate::window::Window;

/// How much a poll may hold in memory with the pages that were asked for again: beyond, no more are.
const MAX_BYTES_AGAIN: usize = 4 * MAX_BYTES;

/// How often a further page is asked for at once if it cannot be had.
const PAGE_TRIES: u32 = 3;

/// In how many polls the same further page may fail before its window is read again from the beginning.
const PAGE_FAILURES: u32 = 3;

/// How the reading of a window ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// With the last page.
    Complete,
    /// With the last page that one poll asks for.
    Budget,
    /// With a page that cannot be had.
    Stuck,
}

impl Poller {
    /// Asks for the pages of the window, one after the other, each kept before the next.
    pub(super) async fn read(
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
    async fn ask(&self, query: &str, at_once: bool) -> Result<Page, ApiError> {
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
    fn page_failed(&mut self, error: ApiError, further: bool) -> Result<Ended, PollError> {
        if !further && matches!(error.kind, ErrorKind::NotFound(_)) {
            let http = self.context.bigchat.http();
            let kind = ErrorKind::WrongService;
            return Err(http.reconsider(error, Route::Events, kind).into());
        }
        if is_outage(&error) {
            return Err(error.into());
        }
        if further
            && self.gives_up(
                &error,
                "the next page cannot be had: the window is read again from its beginning",
            )
        {
            return Ok(Ended::Stuck);
        }
        Err(error.into())
    }

    /// Whether a page that could not be had again counts as lost from now on; then it is told `what` that means.
    fn gives_up(&mut self, error: &ApiError, what: &str) -> bool {
        self.page_failures += 1;
        let is_lost = is_gone(error) || self.page_failures >= PAGE_FAILURES;
        if is_lost {
            self.page_failures = 0;
            let (
                reason,
                Exchange {
                    request, response, ..
                },
            ) = (error.summary(), error.exchange.logged());
            tracing::warn!(reason, request, response, "{what}");
        }
        is_lost
    }

    /// Where an equal message on two pages may be one or two: asks for the earlier page again.
    pub(super) async fn clear_up(&mut self, pages: &mut Pages) -> Result<(), PollError> {
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
                Err(error) if is_outage(&error) || self.context.bigchat.http().is_failing() => {
                    return Err(error.into());
                }
                Err(error) => {
                    if !self.gives_up(&error, "an earlier page cannot be had again: equal messages on it and a later one count as two, unless they stand where the two meet") {
                        return Err(error.into());
                    }
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

    async fn keep_page(&mut self, page: PageToKeep) -> Result<KeptPage, PollError> {
        let page = Arc::new(page);
        let (id, kept_in) = self.keep(Arc::clone(&page)).await?;
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

    /// Keeps the page that came last; where the disk refuses, it stays in memory. Returns its id and the run it is kept in.
    pub(super) async fn keep(
        &mut self,
        page: Arc<PageToKeep>,
    ) -> Result<(i64, Epoch), JournalError> {
        self.unkept = Some(Arc::clone(&page));
        let kept = self
            .context
            .journal
            .with(move |store| store.keep_page(&page))
            .await?;
        self.unkept = None;
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
