//! Detects a cursor that does not advance although polls complete: BigChat's clock has stopped, or a cache is answering
//! for it.

use std::time::Duration;

use tokio::time::Instant;

use crate::domain::time::Timestamp;

/// How long the cursor may stay the same before a warning is logged.
const THRESHOLD: Duration = Duration::from_secs(120);

#[derive(Debug, Default)]
pub(super) struct Standstill {
    /// The cursor, and when it was first seen.
    since: Option<(Timestamp, Instant)>,
    is_reported: bool,
}

/// A change to report.
#[derive(Debug, PartialEq, Eq)]
enum Change {
    Stopped { lasted: Duration },
    Advances,
}

impl Standstill {
    /// Records the cursor after a poll that read BigChat up to now.
    pub(super) fn observe(&mut self, cursor: Timestamp, now: Instant) {
        match self.change(cursor, now) {
            Some(Change::Stopped { lasted }) => tracing::warn!(
                %cursor, seconds = lasted.as_secs(),
                "BigChat's clock does not advance although polls complete; a cache may be answering for it"
            ),
            Some(Change::Advances) => tracing::info!(%cursor, "BigChat's clock advances again"),
            None => {}
        }
    }

    /// `None`: there is no change, or it was reported already.
    fn change(&mut self, cursor: Timestamp, now: Instant) -> Option<Change> {
        match self.since {
            Some((same, since)) if same == cursor => {
                let lasted = now.saturating_duration_since(since);
                (lasted > THRESHOLD && !std::mem::replace(&mut self.is_reported, true))
                    .then_some(Change::Stopped { lasted })
            }
            _ => {
                self.since = Some((cursor, now));
                std::mem::take(&mut self.is_reported).then_some(Change::Advances)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standstill_is_reported_once() {
        let start = Instant::now();
        let mut standstill = Standstill::default();
        let mut change = |cursor, seconds| {
            let now = start + Duration::from_secs(seconds);
            standstill.change(Timestamp::clamped(cursor), now)
        };
        let stopped = || {
            let lasted = Duration::from_secs(121);
            Some(Change::Stopped { lasted })
        };
        for (cursor, seconds, expected) in [
            (10, 0, None),
            (10, 120, None),
            (10, 121, stopped()),
            (10, 300, None),
            (11, 310, Some(Change::Advances)),
            (12, 500, None),
            (12, 620, None),
            (5, 621, None),
            (5, 742, stopped()),
        ] {
            assert_eq!(change(cursor, seconds), expected, "{cursor} at {seconds}");
        }
    }
}
