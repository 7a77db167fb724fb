//! BigChat's clock, told by its `date` headers.
//!
//! Windows and the cursor go by it and never by this machine's clock, which may be an hour off: a window in
//! BigChat's future makes it tell of events that have not happened.

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
                .observe(date, Instant::now());
        }
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
        self.believed.map(|reading| carried_on(reading, now))
    }

    fn observe(&mut self, date: Timestamp, now: Instant) {
        let leaps = |reading| {
            let expected = carried_on(reading, now);
            date > expected.plus(DOUBTFUL_LEAP) || date < expected.minus(DOUBTFUL_LEAP)
        };
        let doubtful = self.believed.is_some_and(leaps) && self.doubted.is_none_or(leaps);
        if doubtful {
            tracing::warn!(%date, "BigChat's clock leaps; not believed unless it says so again");
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
        readings.observe(at(1000), start);
        assert_eq!(
            readings.at(start + Duration::from_millis(2900)),
            Some(at(1002))
        );
        readings.observe(at(900), start);
        assert_eq!(
            readings.at(start),
            Some(at(900)),
            "its clock may be set back"
        );
    }

    #[test]
    fn a_leap_is_believed_when_it_is_said_again() {
        let start = Instant::now();
        let mut readings = Readings::default();
        readings.observe(at(1000), start);
        readings.observe(at(1_000_000), start);
        assert_eq!(readings.at(start), Some(at(1000)));
        readings.observe(at(1001), start + Duration::from_secs(1));
        readings.observe(at(1_000_000), start + Duration::from_secs(2));
        assert_eq!(
            readings.at(start + Duration::from_secs(2)),
            Some(at(1002)),
            "it was one wrong header each time"
        );
        readings.observe(at(0), start + Duration::from_secs(3));
        assert_eq!(
            readings.at(start + Duration::from_secs(3)),
            Some(at(1003)),
            "nor back by years"
        );
        readings.observe(at(1_000_000), start + Duration::from_secs(2));
        readings.observe(at(1_000_010), start + Duration::from_secs(12));
        assert_eq!(
            readings.at(start + Duration::from_secs(12)),
            Some(at(1_000_010))
        );
    }
}
