//! BigChat's clock, told by its `date` headers.
//!
//! Windows and the cursor go by it and not by this machine's clock, which may be an hour off, unless BigChat has never told its
//! time: a window in BigChat's future makes it tell of events that have not happened.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::time::Timestamp;

/// A date further than this from where the clock should be is believed only when the next one agrees: a single wrong
/// header must neither move the cursor past what was never read, nor back by years.
const DOUBTFUL_LEAP: Duration = Duration::from_secs(600);

/// What is known of BigChat's clock.
#[derive(Debug, Default)]
pub struct BigChatClock {
    readings: Mutex<Readings>,
}

#[derive(Debug, Default)]
struct Readings {
    believed: Option<(Timestamp, Instant)>,
    doubted: Option<(Timestamp, Instant)>,
}

impl BigChatClock {
    /// Takes in the date of an answer, if it had one that can be read.
    pub fn observe(&self, date: Option<Timestamp>) {
        if let Some(date) = date {
            self.readings
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .observe(date, Instant::now(), Timestamp::of_this_machine());
        }
    }

    /// Whether what it says is to be relied on. If not, another answer tells.
    pub fn is_sure(&self) -> bool {
        let readings = self.readings.lock();
        let readings = readings.unwrap_or_else(PoisonError::into_inner);
        readings.believed.is_some()
    }

    /// BigChat's time now: the last date it gave, plus the time since by a monotonic clock. `None`: it never gave one.
    pub fn now(&self) -> Option<Timestamp> {
        self.readings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .at(Instant::now())
    }
}

impl Readings {
    fn at(&self, now: Instant) -> Option<Timestamp> {
        let reading = self.believed.or(self.doubted)?;
        Some(carried_on(reading, now))
    }

    /// The first date of all is held against this machine's clock, which may be as wrong: where they differ, the next
    /// one tells.
    fn observe(&mut self, date: Timestamp, now: Instant, this_machine: Timestamp) {
        let leaps = |reading| {
            let expected = carried_on(reading, now);
            date > expected.plus(DOUBTFUL_LEAP) || date < expected.minus(DOUBTFUL_LEAP)
        };
        let expected = self.believed.unwrap_or((this_machine, now));
        let doubtful = leaps(expected) && self.doubted.is_none_or(leaps);
        if doubtful {
            tracing::warn!(%date, "BigChat's clock leaps, or is far from this machine's; not believed unless it says so again");
            self.doubted = Some((date, now));
        } else {
            *self = Self {
                believed: Some((date, now)),
                doubted: None,
            };
        }
    }
}

fn carried_on((date, then): (Timestamp, Instant), now: Instant) -> Timestamp {
    date.plus(now.saturating_duration_since(then))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::clamped(seconds)
    }

    #[test]
    fn it_goes_on_by_itself_between_answers() {
        let start = Instant::now();
        let mut readings = Readings::default();
        assert_eq!(readings.at(start), None);
        readings.observe(at(1000), start, at(1000));
        assert_eq!(
            readings.at(start + Duration::from_millis(2900)),
            Some(at(1002))
        );
        readings.observe(at(900), start, at(1000));
        assert_eq!(
            readings.at(start),
            Some(at(900)),
            "its clock may be set back"
        );
    }

    #[test]
    fn the_first_date_is_believed_if_this_machine_or_the_next_one_says_the_same() {
        let start = Instant::now();
        let mut readings = Readings::default();
        readings.observe(at(1_000_000), start, at(1000));
        assert_eq!(readings.believed, None);
        assert_eq!(
            readings.at(start),
            Some(at(1_000_000)),
            "for want of better"
        );
        readings.observe(at(1001), start, at(1000));
        assert_eq!(readings.at(start), Some(at(1001)));
        let mut readings = Readings::default();
        readings.observe(at(1_000_000), start, at(1000));
        readings.observe(at(1_000_001), start, at(1000));
        assert_eq!(readings.believed, Some((at(1_000_001), start)));
    }

    #[test]
    fn a_leap_is_believed_when_it_is_said_again() {
        let start = Instant::now();
        let mut readings = Readings::default();
        readings.observe(at(1000), start, at(1000));
        readings.observe(at(1_000_000), start, at(1000));
        assert_eq!(readings.at(start), Some(at(1000)));
        readings.observe(at(1001), start + Duration::from_secs(1), at(1000));
        readings.observe(at(1_000_000), start + Duration::from_secs(2), at(1000));
        assert_eq!(
            readings.at(start + Duration::from_secs(2)),
            Some(at(1002)),
            "it was one wrong header each time"
        );
        readings.observe(at(0), start + Duration::from_secs(3), at(1000));
        assert_eq!(
            readings.at(start + Duration::from_secs(3)),
            Some(at(1003)),
            "nor back by years"
        );
        readings.observe(at(1_000_000), start + Duration::from_secs(2), at(1000));
        readings.observe(at(1_000_010), start + Duration::from_secs(12), at(1000));
        assert_eq!(
            readings.at(start + Duration::from_secs(12)),
            Some(at(1_000_010))
        );
    }
}
