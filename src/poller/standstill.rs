//! Detects a cursor that does not advance although polls complete: BigChat's clock has stopped, or a cache answers for it.

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

impl Standstill {
    /// Records the cursor after a poll that read BigChat up to now.
    pub(super) fn observe(&mut self, cursor: Timestamp, now: Instant) {
        match self.observed(cursor, now) {
            Some((true, lasted)) => tracing::warn!(
                %cursor, seconds = lasted.as_secs(),
                "BigChat's clock does not advance although polls complete; a cache may be answering for it"
            ),
            Some((false, _)) => tracing::info!(%cursor, "BigChat's clock advances again"),
            None => {}
        }
    }

    /// Whether the cursor has stopped, and for how long; `None` if that was reported already.
    fn observed(&mut self, cursor: Timestamp, now: Instant) -> Option<(bool, Duration)> {
        match self.since {
            Some((same, since)) if same == cursor => {
                let lasted = now.saturating_duration_since(since);
                (lasted > THRESHOLD && !std::mem::replace(&mut self.is_reported, true))
                    .then_some((true, lasted))
            }
            _ => {
                self.since = Some((cursor, now));
                std::mem::take(&mut self.is_reported).then_some((false, Duration::ZERO))
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
        let mut observed = |cursor, seconds| {
            let now = start + Duration::from_secs(seconds);
            standstill
                .observed(Timestamp::clamped(cursor), now)
                .map(|(stands_still, _)| stands_still)
        };
        for (cursor, seconds, expected) in [
            (10, 0, None),
            (10, 120, None),
            (10, 121, Some(true)),
            (10, 300, None),
            (11, 310, Some(false)),
            (12, 500, None),
            (12, 620, None),
            (5, 621, None),
            (5, 742, Some(true)),
        ] {
            assert_eq!(observed(cursor, seconds), expected, "{cursor} at {seconds}");
        }
    }
}
