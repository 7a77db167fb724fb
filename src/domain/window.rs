//! The next window of time to request from BigChat. Pure.

use std::time::Duration;

use crate::domain::time::Timestamp;

const SECOND: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub start: Timestamp,
    /// The cursor once the window has been read.
    pub end: Timestamp,
}

impl Window {
    /// The window from `overlap` before `cursor`, for late events, to `now`, by BigChat's clock. It is at most `max`
    /// long, unless the overlap takes more than half of that. A cursor ahead of `now` counts as `now`.
    pub fn next(cursor: Timestamp, now: Timestamp, overlap: Duration, max: Duration) -> Self {
        let cursor = cursor.min(now);
        let length = max.saturating_sub(overlap).max(max / 2).max(SECOND);
        Self {
            start: cursor.minus(overlap),
            end: cursor.plus(length).min(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn windows_without_gaps_up_to_now(
            cursor in 0_i64..1_000_000, now in 0_i64..1_000_000, overlap in 0_u64..100, max in 1_u64..100_000,
        ) {
            let (overlap, max) = (Duration::from_secs(overlap), Duration::from_secs(max));
            let now = Timestamp::clamped(now);
            let mut cursor = Timestamp::clamped(cursor);
            let mut windows = 0;
            loop {
                let window = Window::next(cursor, now, overlap, max);
                prop_assert!(window.start <= cursor.min(now), "no gap after the previous window");
                prop_assert!(window.start <= window.end && window.end <= now, "never in BigChat's future");
                prop_assert!(cursor.min(now).unix() - window.start.unix() <= overlap.as_secs().cast_signed());
                let longest = max.max(overlap + (max / 2).max(SECOND));
                prop_assert!(window.end.unix() - window.start.unix() <= longest.as_secs().cast_signed());
                windows += 1;
                cursor = window.end;
                if window.end == now {
                    break;
                }
                prop_assert!(windows <= 1_000_000);
            }
        }
    }
}
