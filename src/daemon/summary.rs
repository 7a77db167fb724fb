//! The summary of what the daemon has done, which is logged from time to time.
//!
//! It replaces a line for each poll and each event. While the daemon is healthy and idle, no summary is logged.

use std::convert::Infallible;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::parts::Parts;
use crate::http::Api;
use crate::journal::Store;
use crate::metrics::Counts;
use crate::telemetry::log;

/// Failed events are counted up to this limit, so that the count is quick.
const COUNTED: u32 = 100_000;

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
        let counts = parts.metrics.counts();
        let done = counts.since(&self.before);
        let period = self.at.elapsed();
        (self.before, self.at) = (counts, Instant::now());
        let apis = Api::ALL.map(|api| parts.apis.status(api));
        let [bigchat, our_api] = &apis;
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
            bigchat = bigchat.word(),
            our_api = our_api.word(),
            paused = paused.map(|_| true),
            "summary"
        );
    }
}

/// The state of the daemon in one sentence.
pub(super) async fn message(parts: &Parts) -> String {
    let paused = parts.our_api.paused();
    let counts = parts.metrics.counts();
    let mut text = paused.map_or_else(String::new, |pause| format!("deliveries are {pause}; "));
    text += &format!(
        "BigChat is {}, OurAPI is {}; {} received and {} delivered since the start",
        parts.apis.status(Api::BigChat),
        parts.apis.status(Api::OurApi),
        counts.received,
        counts.delivered,
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
