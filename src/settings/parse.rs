//! Parses the values of settings. The errors do not repeat the value, which may contain a secret.

use std::str::FromStr;
use std::time::Duration;

use url::Url;

use super::{Listen, VerifyEvery};
use crate::domain::time::{Millis, Timestamp};

pub(super) fn base_url(text: &str) -> Result<Url, String> {
    // An `@` is refused anywhere, because with a slash in the password, the parser takes the user for the host and the
    // password for a path.
    if text.contains('@') {
        return Err("a URL must not contain credentials; see --help on tokens".into());
    }
    let no_scheme = || Err("it has no scheme: put http:// or https:// in front".into());
    let url = match Url::parse(text) {
        Ok(url) => url,
        Err(url::ParseError::RelativeUrlWithoutBase) if !text.is_empty() => return no_scheme(),
        Err(error) => {
            return Err(format!(
                "{error}; expected a URL such as https://api.example"
            ));
        }
    };
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        // The parser takes the host in `localhost:8266` for a scheme.
        return match text.contains("://") {
            true => Err("expected http:// or https:// and a host".into()),
            false => no_scheme(),
        };
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("expected a URL that ends with a host or a path, without ? or #".into());
    }
    Ok(url)
}

/// A whole number, for any argument.
pub(crate) fn number<N: FromStr>(text: &str) -> Result<N, String> {
    text.parse()
        .map_err(|_| "expected a whole number such as 10".into())
}

pub(super) fn up_to_256(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(count @ 1..=256) => Ok(count),
        _ => Err("expected a whole number from 1 to 256, such as 8".into()),
    }
}

pub(crate) fn at_least_one(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(count @ 1..) => Ok(count),
        _ => Err("expected a whole number from 1 to 4294967295, such as 10".into()),
    }
}

pub(super) fn listen(text: &str) -> Result<Listen, String> {
    if text == "off" {
        return Ok(Listen::Off);
    }
    text.parse()
        .map(Listen::At)
        .map_err(|_| "expected an address such as 127.0.0.1:8268 or [::1]:8268, or off".into())
}

pub(super) fn host(text: &str) -> Result<String, String> {
    match url::Host::parse(text) {
        Ok(host) => Ok(host.to_string()),
        Err(_) => Err("expected a host name such as sync.example, without a port".into()),
    }
}

/// The maximum of every duration, far below the range of a timestamp.
pub(crate) const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);

/// A length of time, for any argument.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(duration) if duration > LONGEST => Err("expected at most 100 years".into()),
        Ok(duration) => Ok(duration),
        Err(_) => {
            Err("expected a duration with its unit, such as 500ms, 10s, 5m, 1h or 30d".into())
        }
    }
}

pub(crate) fn positive(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        duration if duration < Duration::from_millis(1) => Err("expected at least 1ms".into()),
        duration => Ok(duration),
    }
}

pub(super) fn verify_every(text: &str) -> Result<VerifyEvery, String> {
    if text == "off" {
        return Ok(VerifyEvery::Off);
    }
    positive(text)
        .map(VerifyEvery::Within)
        .map_err(|_| "expected a duration with its unit, such as 12h or 7d, or off".into())
}

pub(crate) fn at_least_a_second(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        duration if duration < Duration::from_secs(1) => Err("expected at least 1s".into()),
        duration => Ok(duration),
    }
}

pub(crate) fn point_in_time(text: &str) -> Result<Millis, String> {
    let time = chrono::DateTime::parse_from_rfc3339(text)
        .map_err(|_| "expected a point in time with its zone, such as 2026-11-22T22:00:00Z")?;
    Timestamp::from_unix(time.timestamp()).ok_or("expected a time between 1970 and 9999")?;
    Ok(Millis(time.timestamp_millis()))
}

pub(super) fn event_name(text: &str) -> Result<String, String> {
    match text.trim() {
        "" => Err("expected the name of an event".into()),
        name => Ok(name.to_owned()),
    }
}

pub(super) fn prefix(text: &str) -> Result<String, String> {
    if text.chars().any(|c| c.is_whitespace() || c.is_control()) || text.chars().count() > 100 {
        return Err("expected at most 100 characters and no white space".into());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// URLs that cannot work are refused with the reason.
    #[test]
    fn unusable_urls_are_refused() {
        for bad in [
            "127.0.0.1:8266",
            "ftp://host",
            "http://user:secret@host",
            "http://host/?a=b",
            "",
        ] {
            assert!(base_url(bad).is_err(), "{bad}");
        }
        assert!(base_url("https://host/api/v1/").is_ok());
    }

    /// Durations that are too short, too long or invalid are refused.
    #[test]
    fn unusable_durations_are_refused() {
        assert_eq!(positive("1ms"), Ok(Duration::from_millis(1)));
        assert_eq!(duration("0s"), Ok(Duration::ZERO));
        for bad in ["0s", "999us", "101y", "18446744073709551615s", "soon"] {
            assert!(positive(bad).is_err(), "{bad}");
        }
        assert!(duration("101y").is_err());
        assert!(at_least_a_second("999ms").is_err());
    }
}
