//! Points in time.
//!
//! BigChat reports whole Unix seconds ([`Timestamp`]). OurAPI takes RFC 3339 and ignores the offset, so times are sent
//! in UTC with `Z`. This machine's clock ([`Millis`]) is used for the journal's own times: retries, retention, status.
//! It stands in for BigChat's clock only while that is unknown.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use chrono::{DateTime, NaiveDateTime, SecondsFormat, Utc};
use rusqlite::types::{FromSql, FromSqlResult, ToSql, ToSqlOutput, ValueRef};

/// A point in time in whole Unix seconds, in the years 1970 to 9999: RFC 3339 can represent no later ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

impl Timestamp {
    /// 9999-12-31T23:59:59Z.
    const MAX: i64 = 253_402_300_799;

    /// `None` outside the years 1970 to 9999.
    pub fn from_unix(seconds: i64) -> Option<Self> {
        (0..=Self::MAX).contains(&seconds).then_some(Self(seconds))
    }

    /// The nearest representable time to `seconds`.
    pub fn clamped(seconds: i64) -> Self {
        Self(seconds.clamp(0, Self::MAX))
    }

    pub fn unix(self) -> i64 {
        self.0
    }

    /// The current time by this machine's clock, for use while BigChat's is unknown.
    pub fn of_this_machine() -> Self {
        Millis::now().second()
    }

    /// Adds `duration`, truncated to whole seconds.
    pub fn plus(self, duration: Duration) -> Self {
        Self::clamped(self.0.saturating_add(whole_seconds(duration)))
    }

    /// Subtracts `duration`, truncated to whole seconds.
    pub fn minus(self, duration: Duration) -> Self {
        Self::clamped(self.0.saturating_sub(whole_seconds(duration)))
    }

    /// The time from `earlier` to `self`; zero if `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_secs(u64::try_from(self.0 - earlier.0).unwrap_or(0))
    }

    /// The time halfway to `later`; `None` if no second is between them.
    pub fn middle(self, later: Self) -> Option<Self> {
        let middle = Self(self.0.midpoint(later.0));
        (self < middle && middle < later).then_some(middle)
    }

    /// Parses a time from OurAPI: RFC 3339, or the same with a space instead of the T, or without an offset, which
    /// means UTC. Other clients may have stored a year outside the range of `Timestamp`; the nearest time in range is
    /// returned.
    pub fn parse(text: &str) -> Option<Self> {
        let seconds = match DateTime::parse_from_rfc3339(text) {
            Ok(time) => time.timestamp(),
            Err(_) => {
                let time: NaiveDateTime = text.replacen(' ', "T", 1).parse().ok()?;
                time.and_utc().timestamp()
            }
        };
        Some(Self::clamped(seconds))
    }

    /// Parses an HTTP date (`date`, `retry-after`).
    pub fn parse_http_date(text: &str) -> Option<Self> {
        let time = httpdate::parse_http_date(text).ok()?;
        let seconds = time.duration_since(UNIX_EPOCH).ok()?.as_secs();
        Self::from_unix(i64::try_from(seconds).ok()?)
    }
}

fn whole_seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

/// RFC 3339 in UTC with `Z`, the one form that both APIs read correctly: BigChat answers 422 to `+00:00`, and OurAPI
/// ignores offsets.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = DateTime::<Utc>::from_timestamp(self.0, 0).unwrap_or_default();
        f.write_str(&time.to_rfc3339_opts(SecondsFormat::Secs, true))
    }
}

impl serde::Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl ToSql for Timestamp {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        self.0.to_sql()
    }
}

/// An edited row may have a time that cannot be represented.
impl FromSql for Timestamp {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        i64::column_result(value).map(Self::clamped)
    }
}

/// A reading of this machine's clock, in Unix milliseconds. The clock may be wrong and may step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Millis(pub i64);

impl Millis {
    pub fn now() -> Self {
        #[cfg(test)]
        if let Some(now) = crate::model::clock() {
            return now;
        }
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
    }

    /// The second that contains this time.
    pub fn second(self) -> Timestamp {
        Timestamp::clamped(self.0 / 1000)
    }

    pub fn minus(self, duration: Duration) -> Self {
        Self(
            self.0
                .saturating_sub(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)),
        )
    }

    pub fn plus(self, duration: Duration) -> Self {
        Self(
            self.0
                .saturating_add(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)),
        )
    }

    /// The time from `earlier` to `self`; zero if `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

/// RFC 3339 in UTC with `Z`, to the millisecond.
impl serde::Serialize for Millis {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let millis = self.0.clamp(0, Timestamp::MAX * 1000 + 999);
        let time = DateTime::<Utc>::from_timestamp_millis(millis).unwrap_or_default();
        serializer.collect_str(&time.to_rfc3339_opts(SecondsFormat::Millis, true))
    }
}

impl<'de> serde::Deserialize<'de> for Millis {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <String as serde::Deserialize>::deserialize(deserializer)?;
        let time = DateTime::parse_from_rfc3339(&text).map_err(serde::de::Error::custom)?;
        Ok(Self(time.timestamp_millis()))
    }
}

impl ToSql for Millis {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        self.0.to_sql()
    }
}

impl FromSql for Millis {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        i64::column_result(value).map(Self)
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.second().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn middle_lies_between() {
        let middle = |from, to| Timestamp::clamped(from).middle(Timestamp::clamped(to));
        assert_eq!(middle(10, 12), Some(Timestamp::clamped(11)));
        assert_eq!(middle(10, 13), Some(Timestamp::clamped(11)));
        for (from, to) in [(10, 10), (10, 11), (12, 10)] {
            assert_eq!(middle(from, to), None, "{from} {to}");
        }
    }

    #[test]
    fn millis_are_shown_in_seconds() {
        let shown = Millis(1_763_849_007_999).to_string();
        assert_eq!(shown, "2025-11-22T22:03:27Z");
    }

    #[test]
    fn times_from_our_api_without_offset() {
        let expected = Timestamp::from_unix(1_763_849_007);
        assert_eq!(Timestamp::parse("2025-11-22T22:03:27"), expected);
        assert_eq!(Timestamp::parse("2025-11-22T22:03:27Z"), expected);
        assert_eq!(Timestamp::parse("2025-11-22T22:03:27.000"), expected);
        assert_eq!(Timestamp::parse("2025-11-22 22:03:27"), expected);
        assert_eq!(Timestamp::parse("2025-11-22 22:03:27+00:00"), expected);
        assert_eq!(Timestamp::parse("2025-11-23T00:03:27+02:00"), expected);
        assert_eq!(Timestamp::parse("yesterday"), None);
        let nearest = |text| Timestamp::parse(text).map(|time| time.to_string());
        assert_eq!(
            nearest("0001-01-01T00:00:00").as_deref(),
            Some("1970-01-01T00:00:00Z")
        );
        assert_eq!(
            nearest("+12345-01-01T00:00:00").as_deref(),
            Some("9999-12-31T23:59:59Z")
        );
    }

    #[test]
    fn json_has_times_to_the_millisecond() {
        for (millis, written) in [
            (1_763_849_007_042, "\"2025-11-22T22:03:27.042Z\""),
            (i64::MIN, "\"1970-01-01T00:00:00.000Z\""),
            (i64::MAX, "\"9999-12-31T23:59:59.999Z\""),
        ] {
            let json = serde_json::to_string(&Millis(millis)).expect("JSON");
            assert_eq!(json, written);
        }
        let read = |text: &str| serde_json::from_str::<Millis>(text).ok();
        let time = Some(Millis(1_763_849_007_042));
        assert_eq!(read("\"2025-11-22T22:03:27.042Z\""), time);
        assert_eq!(read("\"2025-11-22T23:03:27.042+01:00\""), time);
        assert_eq!(read("1763849007042"), None);
    }

    #[test]
    fn times_are_sent_in_utc() {
        assert_eq!(
            Timestamp::clamped(1_763_849_007).to_string(),
            "2025-11-22T22:03:27Z"
        );
        assert_eq!(Timestamp::from_unix(-1), None);
        assert_eq!(Timestamp::from_unix(i64::MAX), None);
        assert_eq!(
            Timestamp::clamped(i64::MAX).to_string(),
            "9999-12-31T23:59:59Z"
        );
    }
}
