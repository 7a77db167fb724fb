//! The rate limit of an API, from `Retry-After`.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::domain::time::{Millis, Timestamp};

/// Maximum `Retry-After`: a mistyped one must not stop the daemon for days.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);

/// A longer limit is reported as a problem, because it delays events without any other visible cause.
const LONG: Duration = Duration::from_secs(60);

/// A period without requests, by this machine's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RateLimit {
    pub at: Millis,
    pub until: Millis,
    /// The status of the response that asked for it.
    pub status: u16,
}

impl RateLimit {
    pub fn is_in_force(&self, now: Millis) -> bool {
        // An end beyond the maximum means that this machine's clock was set back.
        now < self.until && self.until <= now.plus(RETRY_AFTER_MAX)
    }

    /// Whether it is a problem while it is in force.
    pub fn is_long(&self) -> bool {
        self.until.since(self.at) > LONG
    }

    /// The one that ends later. An earlier one may have been set while this machine's clock was wrong.
    pub(super) fn later(self, earlier: Option<Self>, now: Millis) -> Self {
        match earlier.filter(|earlier| earlier.is_in_force(now)) {
            Some(earlier) if earlier.until > self.until => earlier,
            _ => self,
        }
    }
}

/// `until 2026-11-22T22:00:00Z (429, Retry-After 3600 s)`
impl fmt::Display for RateLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, until, status } = self;
        let wait = until.since(*at);
        let more = if wait < RETRY_AFTER_MAX {
            ""
        } else {
            " or more"
        };
        write!(
            f,
            "until {until} ({status}, Retry-After {} s{more})",
            wait.as_secs()
        )
    }
}

/// The wait in `Retry-After`: seconds, or an HTTP date by the server's clock; `None` if it is neither.
pub(super) fn retry_after(value: &str, date: Option<Timestamp>) -> Option<Duration> {
    let value = value.trim();
    let wait = if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        Duration::from_secs(value.parse().unwrap_or(u64::MAX))
    } else {
        let until = Timestamp::parse_http_date(value)?;
        let now = date.unwrap_or_else(Timestamp::of_this_machine);
        Duration::from_secs(u64::try_from(until.unix() - now.unix()).unwrap_or(0))
    };
    Some(wait.min(RETRY_AFTER_MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Any value gives the wait that it names, up to the maximum, or none.
        #[test]
        fn fuzzed_retry_after_is_limited(
            now in 0_i64..253_402_300_800,
            seconds in -10_000_i64..10_000,
            zeros in 0_usize..40,
            value in "[ -~]{0,40}|[0-9]{1,40}|\\PC{0,20}",
        ) {
            let now = Timestamp::from_unix(now).expect("a time");
            let expected = u64::try_from(seconds).ok().map(|seconds| Duration::from_secs(seconds).min(RETRY_AFTER_MAX));
            let digits = format!(" {}{seconds}", "0".repeat(zeros));
            prop_assert_eq!(retry_after(&digits, Some(now)), expected);
            if let Some(until) = chrono::DateTime::from_timestamp(now.unix() + seconds, 0) {
                let until = until.format("%a, %d %b %Y %H:%M:%S GMT").to_string();
                if let Some(wait) = retry_after(&until, Some(now)) {
                    prop_assert_eq!(wait, expected.unwrap_or_default());
                }
            }
            if let Some(wait) = retry_after(&value, Some(now)) {
                prop_assert!(wait <= RETRY_AFTER_MAX);
            }
        }
    }

    #[test]
    fn retry_after_forms_and_maximum() {
        let date = Timestamp::parse_http_date("Sun, 22 Nov 2026 22:00:00 GMT");
        let wait = |value| retry_after(value, date).map(|wait| wait.as_secs());
        assert_eq!(wait("7"), Some(7));
        assert_eq!(wait("Sun, 22 Nov 2026 22:00:30 GMT"), Some(30));
        assert_eq!(wait("Sun, 22 Nov 2026 21:00:00 GMT"), Some(0));
        assert_eq!(wait("99999999999999999999999999"), Some(3600));
        assert_eq!(wait("soon"), None);
        assert_eq!(wait("-1"), None);
        assert_eq!(wait(""), None);
    }

    #[test]
    fn clock_set_back_ends_rate_limit() {
        let limit = |until| RateLimit {
            at: Millis(9_000_000),
            until: Millis(until),
            status: 429,
        };
        let (short, long) = (limit(9_000_500), limit(10_000_000));
        assert!(long.is_in_force(Millis(9_000_000)));
        assert!(!long.is_in_force(Millis(10_000_000)));
        assert!(!long.is_in_force(Millis(1_000_000)));
        assert_eq!(short.later(Some(long), Millis(9_000_000)), long);
        assert_eq!(short.later(Some(long), Millis(1_000_000)), short);
    }
}
