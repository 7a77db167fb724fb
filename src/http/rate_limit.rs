//! The rate limit of an API, from `Retry-After`.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use crate::domain::time::{Millis, Timestamp};

/// Maximum `Retry-After`: a mistyped one must not stop the daemon for days.
pub(super) const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);

/// The end of the limit by this machine's clock; 0: there never was one.
#[derive(Debug, Default)]
pub(super) struct RateLimit(AtomicI64);

impl RateLimit {
    /// The end of the latest limit, even if it has passed.
    pub(super) fn not_before(&self) -> Millis {
        Millis(self.0.load(Ordering::Relaxed))
    }

    /// The end of the limit, if it is in force.
    pub(super) fn until(&self, now: Millis) -> Option<Millis> {
        let until = self.not_before();
        // An end beyond the maximum means that this machine's clock was set back.
        (now < until && until <= now.plus(RETRY_AFTER_MAX)).then_some(until)
    }

    /// [`Self::until`] as of now, without reading the clock if there never was a limit.
    pub(super) fn until_now(&self) -> Option<Millis> {
        match self.not_before() {
            Millis(0) => None,
            _ => self.until(Millis::now()),
        }
    }

    pub(super) fn raise(&self, until: Millis) {
        // An earlier end may have been set while this machine's clock was wrong.
        let valid = self.until(Millis::now()).unwrap_or_default();
        self.0.store(until.max(valid).0, Ordering::Relaxed);
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
    use super::*;

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
        let limit = RateLimit::default();
        limit.raise(Millis(10_000_000));
        assert_eq!(limit.until(Millis(9_000_000)), Some(Millis(10_000_000)));
        assert_eq!(limit.until(Millis(10_000_000)), None);
        assert_eq!(limit.until(Millis(1_000_000)), None);
    }
}
