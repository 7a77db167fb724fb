//! A pause of deliveries, and when it ends.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::time::Millis;

/// A period in which nothing is delivered, while polling continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Pause {
    pub since: Millis,
    /// `None`: until an operator resumes.
    pub until: Option<Millis>,
}

impl Pause {
    /// A pause that begins at `now` and lasts for `length`, or until an operator resumes.
    pub fn begin(length: Option<Duration>, now: Millis) -> Self {
        Self {
            since: now,
            until: length.map(|length| now.plus(length)),
        }
    }

    /// The remaining time, [`Duration::MAX`] if it lasts until an operator resumes; `None`: the pause is over. A clock
    /// that was set back does not make the pause longer than intended.
    pub fn left(self, now: Millis) -> Option<Duration> {
        let Some(until) = self.until else {
            return Some(Duration::MAX);
        };
        let left = until.since(now).min(until.since(self.since));
        (!left.is_zero()).then_some(left)
    }
}

impl fmt::Display for Pause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.until {
            Some(until) => write!(f, "paused until {until} (since {})", self.since),
            None => write!(f, "paused until resumed (since {})", self.since),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    /// A clock that was set back does not prolong a pause.
    #[test]
    fn clock_set_back_during_pause() {
        let begin = Millis(100 * 3_600_000);
        let pause = Pause::begin(Some(HOUR), begin);
        assert_eq!(pause.left(begin), Some(HOUR));
        assert_eq!(pause.left(begin.plus(HOUR / 4)), Some(HOUR * 3 / 4));
        assert_eq!(pause.left(begin.plus(HOUR)), None);
        assert_eq!(pause.left(begin.minus(HOUR * 99)), Some(HOUR), "no longer");
        let endless = Pause::begin(None, begin);
        assert_eq!(endless.left(begin.plus(HOUR * 1000)), Some(Duration::MAX));
    }
}
