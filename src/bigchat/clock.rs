//! BigChat's clock, as its `date` headers tell it, and this machine's, as far as it can be relied on.
//!
//! Windows and the cursor go by BigChat's clock and not by this machine's, which may be an hour off, unless BigChat has
//! never told its time: a window in BigChat's future makes it report events that have not happened.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::domain::time::{Millis, Timestamp};

/// A date further than this from where the clock should be has jumped: a single wrong header must neither move the
/// cursor past what was never read, nor back by years.
const JUMP: Duration = Duration::from_secs(600);

/// In how many polls a date that has jumped must be seen before it is believed. Until then the old time goes on, so that
/// what happens during an error of minutes is read.
const POLLS: u64 = 10;

/// What is known of BigChat's clock.
#[derive(Debug, Default)]
pub struct BigChatClock {
    readings: Mutex<Readings>,
}

#[derive(Debug, Default)]
struct Readings {
    believed: Option<Reading>,
    /// A date that has jumped, and the poll in which it was first seen.
    doubted: Option<(Reading, u64)>,
    polls: u64,
}

/// A date, and when it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reading {
    date: Timestamp,
    at: Instant,
}

impl Reading {
    /// The time it is now by this reading.
    fn now(self, now: Instant) -> Timestamp {
        self.date.plus(now.saturating_duration_since(self.at))
    }

    fn agrees(self, other: Self) -> bool {
        let expected = self.now(other.at);
        other.date.unix().abs_diff(expected.unix()) <= JUMP.as_secs()
    }
}

impl BigChatClock {
    /// Takes in the date of an answer, if it had one that can be read.
    pub fn observe(&self, date: Option<Timestamp>) {
        if let Some(date) = date {
            let at = Instant::now();
            let this_machine = Timestamp::of_this_machine();
            self.readings().observe(Reading { date, at }, this_machine);
        }
    }

    /// Counts a poll. Those that follow one another without waiting are one.
    pub fn count_poll(&self) {
        self.readings().polls += 1;
    }

    /// Whether what it says is to be relied on. If not, another answer tells.
    pub fn is_sure(&self) -> bool {
        self.readings().believed.is_some()
    }

    /// BigChat's time now: the last date it gave, plus the time since by a monotonic clock. `None`: it never gave one.
    pub fn now(&self) -> Option<Timestamp> {
        self.readings().now(Instant::now())
    }

    fn readings(&self) -> MutexGuard<'_, Readings> {
        self.readings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Readings {
    fn now(&self, now: Instant) -> Option<Timestamp> {
        let doubted = self.doubted.map(|(reading, _)| reading);
        Some(self.believed.or(doubted)?.now(now))
    }

    /// The first date of all is held against this machine's clock, which may be as wrong: if they differ, the next one
    /// decides.
    fn observe(&mut self, reading: Reading, this_machine: Timestamp) {
        let here = Reading {
            date: this_machine,
            at: reading.at,
        };
        let seen_before = self.doubted.filter(|(doubted, _)| doubted.agrees(reading));
        let lasts = seen_before.is_some_and(|(_, since)| match self.believed {
            Some(_) => self.polls >= since + POLLS,
            None => true,
        });
        let is_believed = self
            .believed
            .is_some_and(|believed| believed.agrees(reading));
        if is_believed || lasts || here.agrees(reading) {
            if let (Some(believed), false) = (self.believed, is_believed) {
                tracing::warn!(from = %believed.now(reading.at), to = %reading.date, "BigChat's clock has jumped");
            }
            self.believed = Some(reading);
            self.doubted = None;
        } else if seen_before.is_none() {
            tracing::warn!(
                date = %reading.date,
                "the date of BigChat's answer has jumped, or is far from this machine's: not believed unless it lasts"
            );
            self.doubted = Some((reading, self.polls));
        }
    }
}

/// This machine's clock for what cannot be undone: a step ahead is not followed, unless BigChat's clock agrees with it.
#[derive(Debug)]
pub struct SteadyClock {
    now: Millis,
    at: Instant,
}

impl SteadyClock {
    /// A clock that was read then.
    pub fn new(now: Millis, at: Instant) -> Self {
        Self { now, at }
    }

    /// The time by a further reading, BigChat's clock being there.
    pub fn read(&mut self, reading: Millis, at: Instant, bigchat: Option<Timestamp>) -> Millis {
        let agrees = |there: Timestamp| {
            let here = Timestamp::clamped(reading.0 / 1000);
            there.unix().abs_diff(here.unix()) <= JUMP.as_secs()
        };
        let expected = self.now.plus(at.saturating_duration_since(self.at));
        let now = if bigchat.is_some_and(agrees) {
            reading
        } else {
            reading.min(expected)
        };
        *self = Self::new(now, at);
        now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::clamped(seconds)
    }

    /// A clock that has seen dates in one poll each, ten seconds apart, beside a machine that is right.
    fn polled(dates: &[i64]) -> (Readings, Instant) {
        let start = Instant::now();
        let mut readings = Readings::default();
        let mut now = start;
        for (n, date) in (0_i64..).zip(dates) {
            now = start + Duration::from_secs(10 * n.unsigned_abs());
            readings.polls += 1;
            let date = at(date + 10 * n);
            readings.observe(Reading { date, at: now }, at(10 * n));
        }
        (readings, now)
    }

    fn seen(dates: &[i64]) -> i64 {
        let (readings, now) = polled(dates);
        let elapsed = 10 * (dates.len() as i64 - 1);
        readings.now(now).expect("a time").unix() - elapsed
    }

    #[test]
    fn it_goes_on_by_itself_between_answers() {
        let start = Instant::now();
        let mut readings = Readings::default();
        assert_eq!(readings.now(start), None);
        let mut observe = |date, this_machine| {
            let reading = Reading {
                date: at(date),
                at: start,
            };
            readings.observe(reading, at(this_machine));
            readings.now(start + Duration::from_millis(2900))
        };
        assert_eq!(observe(1000, 1000), Some(at(1002)));
        assert_eq!(observe(900, 1000), Some(at(902)), "it may be set back");
    }

    #[test]
    fn the_first_date_is_believed_if_this_machine_or_the_next_one_says_the_same() {
        assert_eq!(seen(&[1_000_000]), 1_000_000, "for want of better");
        assert!(polled(&[1_000_000]).0.believed.is_none());
        assert_eq!(seen(&[1_000_000, 1]), 1);
        assert!(polled(&[1_000_000, 1_000_001]).0.believed.is_some());
    }

    #[test]
    fn a_jump_is_believed_at_once_if_this_machine_agrees() {
        let off = 1_000_000;
        assert_eq!(seen(&[off, off, 0]), 0, "it was wrong, and is right now");
        assert_eq!(seen(&[off, off, 500]), 500);
    }

    #[test]
    fn another_jump_is_believed_once_it_has_lasted_ten_polls() {
        for off in [3600, 86_400 * 365, 601] {
            let lasting = |polls| [&[0, 0][..], &vec![off; polls]].concat();
            assert_eq!(seen(&lasting(1)), 0, "{off}");
            assert_eq!(seen(&lasting(10)), 0, "{off}");
            assert_eq!(seen(&lasting(11)), off, "{off}");
            let interrupted = [&lasting(9)[..], &[0], &[off; 9]].concat();
            assert_eq!(seen(&interrupted), 0, "{off}: it was wrong each time");
            let another = [&lasting(9)[..], &[2 * off + 601; 2]].concat();
            assert_eq!(seen(&another), 0, "{off}: not the same");
        }
    }

    #[test]
    fn a_step_of_this_machine_ahead_is_not_followed() {
        const DAYS: i64 = 40 * 86_400_000;
        let (start, after) = (Instant::now(), Duration::from_secs(10));
        for (reading, bigchat, expected) in [
            (10_000, None, 10_000),
            (DAYS, None, 10_000),
            (DAYS, Some(10), 10_000),
            (DAYS, Some(-86_400), 10_000),
            (DAYS, Some(DAYS / 1000 + 500), DAYS),
            (5_000, Some(10), 5_000),
            (5_000, None, 5_000),
        ] {
            let mut clock = SteadyClock::new(Millis(0), start);
            let bigchat = bigchat.map(at);
            let read = clock.read(Millis(reading), start + after, bigchat);
            assert_eq!(read, Millis(expected), "{reading} {bigchat:?}");
        }
        // It comes back, and nothing is left of it.
        let mut clock = SteadyClock::new(Millis(0), start);
        clock.read(Millis(DAYS), start + after, None);
        let later = clock.read(Millis(20_000), start + 2 * after, None);
        assert_eq!(later, Millis(20_000));
    }
}
