//! BigChat's clock, from its `date` headers, and this machine's clock without its steps ahead.
//!
//! Windows and the cursor use BigChat's clock: for a window in its future, BigChat reports events that have not
//! happened yet. This machine's clock, which may be an hour off, replaces it only while BigChat's time is unknown.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use crate::domain::time::{Millis, Timestamp};
use crate::mutex::lock;

/// A date that differs from the expected one by more than this has jumped. A single wrong header must move the cursor
/// neither past unread events nor back by years.
const JUMP: Duration = Duration::from_secs(600);

/// How many polls a jump must last before it is believed. Until then the old time continues, so that no events are
/// skipped if BigChat's date is wrong for some minutes.
const POLLS: u64 = 10;

/// Differences from this machine's clock of up to this many seconds are ignored. Dates are whole seconds, and requests
/// take time.
const TOLERANCE: u64 = 60;

/// The difference of the two clocks in words; `None`: they agree. `ahead` is in seconds.
pub fn difference(ahead: i64) -> Option<String> {
    let seconds = ahead.unsigned_abs();
    if seconds <= TOLERANCE {
        return None;
    }
    let minutes = Duration::from_secs(seconds / 60 * 60);
    let direction = if ahead > 0 { "ahead of" } else { "behind" };
    Some(format!(
        "BigChat's clock is {} {direction} this machine's",
        humantime::format_duration(minutes)
    ))
}

#[derive(Debug, Default)]
pub struct BigChatClock {
    readings: Mutex<Readings>,
}

#[derive(Debug, Default)]
struct Readings {
    latest: Option<Reading>,
    believed: Option<Reading>,
    /// A date that has jumped, and the number of the poll that first saw it.
    doubted: Option<(Reading, u64)>,
    /// Whether a response had no valid date.
    undated: bool,
    polls: u64,
}

/// A date, and when it was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reading {
    date: Timestamp,
    at: Instant,
}

impl Reading {
    fn now(self, now: Instant) -> Timestamp {
        self.date.plus(now.saturating_duration_since(self.at))
    }

    fn agrees(self, other: Self) -> bool {
        let expected = self.now(other.at);
        other.date.unix().abs_diff(expected.unix()) <= JUMP.as_secs()
    }
}

impl BigChatClock {
    /// Records the date of a response; `None` if it had no valid one.
    pub fn observe(&self, date: Option<Timestamp>) {
        let mut readings = lock(&self.readings);
        match date {
            None => readings.undated = true,
            Some(date) => {
                let at = Instant::now();
                readings.observe(Reading { date, at }, Timestamp::of_this_machine());
            }
        }
    }

    /// Counts a poll. Back-to-back polls count once.
    pub fn count_poll(&self) {
        lock(&self.readings).polls += 1;
    }

    /// Whether a date is believed. If not, another response is needed.
    pub fn is_sure(&self) -> bool {
        lock(&self.readings).believed.is_some()
    }

    /// Whether BigChat has answered and its time is settled: by a date that is believed or, if its answers have no
    /// date, by this machine's clock.
    pub fn has_answered(&self) -> bool {
        let readings = lock(&self.readings);
        readings.believed.is_some() || readings.undated && readings.doubted.is_none()
    }

    /// BigChat's time: its last believed date, or else its first date, plus the monotonic time since; `None` before the
    /// first date.
    pub fn now(&self) -> Option<Timestamp> {
        lock(&self.readings).now(Instant::now())
    }

    /// BigChat's time by its latest date, even if that is not believed.
    pub fn latest(&self) -> Option<Timestamp> {
        let latest = lock(&self.readings).latest?;
        Some(latest.now(Instant::now()))
    }
}

impl Readings {
    fn now(&self, now: Instant) -> Option<Timestamp> {
        let doubted = self.doubted.map(|(reading, _)| reading);
        Some(self.believed.or(doubted)?.now(now))
    }

    /// The first date is compared with this machine's clock. Either may be wrong. If they differ, the next date
    /// decides.
    fn observe(&mut self, reading: Reading, this_machine: Timestamp) {
        self.latest = Some(reading);
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
                "BigChat's date has jumped, or differs from this machine's clock; ignoring it unless it lasts"
            );
            self.doubted = Some((reading, self.polls));
        }
    }
}

/// This machine's clock, for actions that cannot be undone. It ignores a step ahead unless BigChat's clock agrees.
#[derive(Debug)]
pub struct SteadyClock {
    now: Millis,
    at: Instant,
}

impl SteadyClock {
    pub fn new(now: Millis, at: Instant) -> Self {
        Self { now, at }
    }

    /// The time after a further `reading` of this machine's clock, given BigChat's time.
    pub fn read(&mut self, reading: Millis, at: Instant, bigchat: Option<Timestamp>) -> Millis {
        let agrees = |there: Timestamp| {
            let here = reading.second();
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

    #[test]
    fn difference_in_words() {
        assert_eq!(difference(60), None);
        assert_eq!(difference(-60), None);
        let ahead = difference(71_530).expect("a difference");
        assert_eq!(ahead, "BigChat's clock is 19h 52m ahead of this machine's");
        let behind = difference(-61).expect("a difference");
        assert_eq!(behind, "BigChat's clock is 1m behind this machine's");
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::clamped(seconds)
    }

    /// Observes one date per poll, every ten seconds, on a machine whose clock is right. Dates are relative to that.
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

    fn offset_after(dates: &[i64]) -> i64 {
        let (readings, now) = polled(dates);
        let elapsed = 10 * (dates.len() as i64 - 1);
        readings.now(now).expect("a time").unix() - elapsed
    }

    #[test]
    fn it_advances_between_responses() {
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

    /// The first date is believed if this machine's clock or the next date agrees.
    #[test]
    fn first_date_needs_a_second_source() {
        assert_eq!(offset_after(&[1_000_000]), 1_000_000, "the only one");
        assert!(polled(&[1_000_000]).0.believed.is_none());
        assert_eq!(offset_after(&[1_000_000, 1]), 1);
        assert!(polled(&[1_000_000, 1_000_001]).0.believed.is_some());
    }

    #[test]
    fn answer_without_a_date() {
        let clock = BigChatClock::default();
        assert!(!clock.has_answered());
        clock.observe(None);
        assert!(clock.has_answered());
        clock.observe(Some(at(1_000_000)));
        assert!(!clock.has_answered(), "a date that is not believed yet");
        clock.observe(Some(at(1_000_000)));
        assert!(clock.has_answered());
    }

    #[test]
    fn jump_to_this_machines_time() {
        let off = 1_000_000;
        assert_eq!(offset_after(&[off, off, 0]), 0, "believed at once");
        assert_eq!(offset_after(&[off, off, 500]), 500);
    }

    #[test]
    fn jump_must_last_ten_polls() {
        for off in [3600, 86_400 * 365, 601] {
            let lasting = |polls| [&[0, 0][..], &vec![off; polls]].concat();
            assert_eq!(offset_after(&lasting(1)), 0, "{off}");
            assert_eq!(offset_after(&lasting(10)), 0, "{off}");
            assert_eq!(offset_after(&lasting(11)), off, "{off}");
            let interrupted = [&lasting(9)[..], &[0], &[off; 9]].concat();
            assert_eq!(offset_after(&interrupted), 0, "{off}: interrupted");
            let another = [&lasting(9)[..], &[2 * off + 601; 2]].concat();
            assert_eq!(offset_after(&another), 0, "{off}: another jump");
        }
    }

    #[test]
    fn machine_step_ahead_is_ignored() {
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
        // A step that is reverted leaves no trace.
        let mut clock = SteadyClock::new(Millis(0), start);
        clock.read(Millis(DAYS), start + after, None);
        let later = clock.read(Millis(20_000), start + 2 * after, None);
        assert_eq!(later, Millis(20_000));
    }
}
