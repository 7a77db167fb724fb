//! Notices that BigChat was read up to the same time again and again: its clock stands still, or a cache answers for it.

use std::time::Duration;

use tokio::time::Instant;

use crate::domain::time::Timestamp;

/// For how long a cursor may be the same.
const USUAL: Duration = Duration::from_secs(120);

/// A cursor, and since when it is the same.
#[derive(Debug, Default)]
pub(super) struct Standstill {
    since: Option<(Timestamp, Instant)>,
    is_reported: bool,
}

impl Standstill {
    /// Takes in where the cursor is after a poll that read BigChat up to its present time.
    pub(super) fn observe(&mut self, cursor: Timestamp, now: Instant) {
        match self.observed(cursor, now) {
            Some((true, lasted)) => tracing::warn!(
                %cursor, seconds = lasted.as_secs(),
                "BigChat's time stands still while polls complete: a cache may answer in its place"
            ),
            Some((false, _)) => tracing::info!(%cursor, "BigChat's time moves on again"),
            None => {}
        }
    }

    /// Whether it stands still, and for how long it has, if that is news.
    fn observed(&mut self, cursor: Timestamp, now: Instant) -> Option<(bool, Duration)> {
        match self.since {
            Some((same, since)) if same == cursor => {
                let lasted = now.saturating_duration_since(since);
                (lasted > USUAL && !std::mem::replace(&mut self.is_reported, true))
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
    fn a_standstill_is_reported_once_and_its_end_too() {
        let start = Instant::now();
        let mut standstill = Standstill::default();
        let mut news = |cursor, seconds| {
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
            assert_eq!(news(cursor, seconds), expected, "{cursor} at {seconds}");
        }
    }
}
