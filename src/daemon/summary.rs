//! The counts of what the daemon has done, and the summary that is logged from time to time.
//!
//! The summary replaces a line for each poll and each event. While the daemon is healthy and
//! idle, none is logged.

use std::convert::Infallible;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::parts::Parts;
use crate::http::Api;
use crate::journal::Store;
use crate::metrics::Counters;
use crate::telemetry::log;

/// Failed events are counted up to this limit, so that the count is quick.
const COUNTED: u32 = 100_000;

#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    polls: u64,
    polls_failed: u64,
    received: u64,
    delivered: u64,
    attempts_failed: u64,
    failed: u64,
}

impl Counts {
    fn of(counters: &Counters) -> Self {
        Self {
            polls: counters.polls.get(),
            polls_failed: counters.polls_failed.get(),
            received: counters.received.get(),
            delivered: counters.delivered.get(),
            attempts_failed: counters.attempts_failed.get(),
            failed: counters.failed.get(),
        }
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            polls: self.polls - before.polls,
            polls_failed: self.polls_failed - before.polls_failed,
            received: self.received - before.received,
            delivered: self.delivered - before.delivered,
            attempts_failed: self.attempts_failed - before.attempts_failed,
            failed: self.failed - before.failed,
        }
    }

    /// A poll without new events is not logged.
    fn something_happened(&self) -> bool {
        let Self {
            polls: _,
            polls_failed,
            received,
            delivered,
            attempts_failed,
            failed,
        } = self;
        polls_failed + received + delivered + attempts_failed + failed > 0
    }
}

/// Logs the counts since its previous line.
#[derive(Debug)]
pub(super) struct Summary {
    before: Counts,
    at: Instant,
}

impl Summary {
    /// Counts from now on.
    pub(super) fn begin() -> Self {
        Self {
            before: Counts::default(),
            at: Instant::now(),
        }
    }

    /// Logs a summary at a fixed interval.
    pub(super) async fn run(&mut self, parts: &Parts) -> Infallible {
        loop {
            sleep(parts.settings.log_summary).await;
            self.log(parts).await;
        }
    }

    /// Logs a summary, unless there is nothing to report.
    pub(super) async fn log(&mut self, parts: &Parts) {
        let left_out = log::report_left_out();
        let counts = Counts::of(parts.metrics.counters());
        let done = counts.since(&self.before);
        let period = self.at.elapsed();
        (self.before, self.at) = (counts, Instant::now());
        let apis = Api::ALL.map(|api| parts.apis.status(api));
        let queue = queue(parts).await;
        let paused = parts.our_api.paused();
        let has_problem = apis
            .iter()
            .any(|api| api.is_down() || api.long_limit().is_some());
        let is_healthy = !has_problem
            && paused.is_none()
            && !left_out
            && queue.is_some_and(|queue| queue.waiting == 0);
        if is_healthy && !done.something_happened() {
            return;
        }
        tracing::info!(
            seconds = rounded(period),
            polls = done.polls,
            polls_failed = done.polls_failed,
            received = done.received,
            delivered = done.delivered,
            attempts_failed = done.attempts_failed,
            failed = done.failed,
            waiting = queue.map(|queue| queue.waiting),
            failed_in_all = queue.map(|queue| queue.failed),
            bigchat = parts.apis.status(Api::BigChat).word(),
            our_api = parts.apis.status(Api::OurApi).word(),
            paused = paused.map(|_| true),
            "summary"
        );
    }
}

/// The state of the daemon in one sentence.
pub(super) async fn message(parts: &Parts) -> String {
    let paused = parts.our_api.paused();
    let mut text = paused.map_or_else(String::new, |pause| format!("deliveries are {pause}; "));
    text += &format!(
        "BigChat is {}, OurAPI is {}; {} received and {} delivered since the start",
        parts.apis.status(Api::BigChat),
        parts.apis.status(Api::OurApi),
        parts.metrics.counters().received.get(),
        parts.metrics.counters().delivered.get(),
    );
    if let Some(Queue { waiting, failed }) = queue(parts).await {
        text += &format!(", {waiting} waiting, {failed} failed");
    }
    text
}

#[derive(Debug, Clone, Copy)]
struct Queue {
    waiting: u64,
    failed: u64,
}

/// Waiting events, and failed events counted up to the limit; `None`: the journal does not answer.
async fn queue(parts: &Parts) -> Option<Queue> {
    let count = |store: &mut Store| {
        Ok(Queue {
            waiting: store.waiting()?,
            failed: store.failed_at_most(COUNTED)?,
        })
    };
    parts.journal.with(count).await.ok()
}

fn rounded(period: Duration) -> u64 {
    (period + Duration::from_millis(500)).as_secs()
}
