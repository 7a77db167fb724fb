//! The client of BigChat's three routes, with types that follow the contract.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use chrono::DateTime;
use reqwest::StatusCode;
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use url::form_urlencoded;

use super::clock::BigChatClock;
use crate::domain::event::{EventKind, page_events};
use crate::domain::ids::AdvisorId;
use crate::domain::json::{self, Integer, Malformed};
use crate::domain::time::Timestamp;
use crate::domain::window::Window;
use crate::http::route::Route;
use crate::http::{ApiError, Http, Resource, Response, Target, shortened, unreadable};

/// In bytes. No server accepts a longer query.
const MAX_QUERY: usize = 16 << 10;

#[derive(Debug)]
pub struct BigChat {
    http: Arc<Http>,
    clock: BigChatClock,
}

/// A page of `/events`.
#[derive(Debug)]
pub struct Page {
    /// As received.
    pub body: String,
    /// The query of `nextPageUrl`. Its scheme, host and path are not used: a proxy may have changed them, or they may
    /// name another host.
    pub next: Option<String>,
    pub events: usize,
    pub date: Option<Timestamp>,
}

/// The response of `/conversations/{id}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Details {
    /// `None` if its START is not among the events, or has no valid time.
    pub started_at: Option<Timestamp>,
    /// BigChat reports the first advisor, while most vendors report the current one; `None`: no advisor has taken the
    /// conversation.
    pub advisor: Option<AdvisorId>,
}

/// The response of `/advisors/{id}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advisor {
    /// Not unique.
    pub name: String,
    /// Identifies the advisor. It need not resemble the name.
    pub email_address: String,
}

type Result<T> = std::result::Result<T, ApiError>;

impl BigChat {
    pub fn new(http: Arc<Http>) -> Self {
        Self {
            http,
            clock: BigChatClock::default(),
        }
    }

    pub fn http(&self) -> &Http {
        &self.http
    }

    pub fn clock(&self) -> &BigChatClock {
        &self.clock
    }

    /// Requests a page of events. `query` comes from [`window_query`] or from the previous page.
    pub async fn events(&self, query: &str) -> Result<Page> {
        let target = self.http.target(Route::Events, "", Some(query));
        self.get(&target, |response| {
            if response.status == StatusCode::NO_CONTENT {
                response.body = b"{}".to_vec();
            }
            let body = text(response)?;
            let mut events = 0;
            page_events(body, |_| events += 1).map_err(|error| not_a_page(body, &error))?;
            let [next] = json::fields(body, ["nextPageUrl"]).map_err(text_of)?;
            let next = next.and_then(next_page);
            let body = String::from_utf8(std::mem::take(&mut response.body)).map_err(text_of)?;
            Ok(Page {
                body,
                next,
                events,
                date: response.date,
            })
        })
        .await
    }

    /// A record that is no object or has no list of events counts as not found. An unusable advisor counts as none, and
    /// an unusable START as missing.
    pub async fn conversation(&self, id: i64) -> Result<Details> {
        let target = self.http.target(Route::Conversation, &id.to_string(), None);
        self.record(target, Resource::Conversation, |body| {
            let Some([events, advisor]) = fields(body, ["events", "advisor_id"])? else {
                return Ok(None);
            };
            let started_at = events.and_then(|events| first_start(events).ok());
            Ok(started_at.map(|started_at| Details {
                started_at,
                advisor: read(advisor).map(|Integer(id)| AdvisorId(id)),
            }))
        })
        .await
    }

    /// A record without a usable name and address counts as not found.
    pub async fn advisor(&self, id: i64) -> Result<Advisor> {
        let target = self.http.target(Route::Advisor, &id.to_string(), None);
        self.record(target, Resource::Advisor, |body| {
            let [name, email] = fields(body, ["name", "email_address"])?.unwrap_or_default();
            let record = Option::zip(read(name), read(email));
            Ok(record.map(|(name, email_address)| Advisor {
                name,
                email_address,
            }))
        })
        .await
    }

    /// Requests a record. `parse` returns `None` if it is unusable.
    async fn record<T>(
        &self,
        target: Target,
        resource: Resource,
        parse: impl FnOnce(&str) -> std::result::Result<Option<T>, String>,
    ) -> Result<T> {
        let record = self.get(&target, |response| parse(text(response)?)).await?;
        record.ok_or_else(|| self.http.unusable(&target, resource))
    }

    async fn get<T>(
        &self,
        target: &Target,
        parse: impl FnOnce(&mut Response) -> std::result::Result<T, String>,
    ) -> Result<T> {
        let sent = self.http.send(target, None).await;
        if let Ok(response) = &sent {
            self.clock.observe(response.date);
        }
        self.http.conclude(target, None, sent, parse)
    }
}

/// The query of the first page of a window.
pub fn window_query(window: Window) -> String {
    form_urlencoded::Serializer::new(String::new())
        .append_pair("start_at", &window.start.to_string())
        .append_pair("end_at", &window.end.to_string())
        .finish()
}

/// Why a body is not a page.
fn not_a_page(body: &str, error: &Malformed) -> String {
    #[derive(Deserialize)]
    struct Wire {
        #[serde(rename = "events")]
        _events: Vec<IgnoredAny>,
    }
    match serde_json::from_str::<Wire>(body) {
        Err(error) => unreadable(body.as_bytes(), &error),
        Ok(_) => error.to_string(),
    }
}

fn text(response: &Response) -> std::result::Result<&str, String> {
    std::str::from_utf8(&response.body).map_err(text_of)
}

fn text_of(error: impl fmt::Display) -> String {
    error.to_string()
}

/// Fields of a record; `None`: the body is JSON, but no usable object.
fn fields<'a, const N: usize>(
    body: &'a str,
    names: [&'static str; N],
) -> std::result::Result<Option<[Option<&'a str>; N]>, String> {
    if let Ok(fields) = json::fields(body, names) {
        return Ok(Some(fields));
    }
    match serde_json::from_str(body) {
        Ok(IgnoredAny) => Ok(None),
        Err(error) => Err(unreadable(body.as_bytes(), &error)),
    }
}

fn read<T: DeserializeOwned>(value: Option<&str>) -> Option<T> {
    serde_json::from_str(value?).ok()
}

/// The time of the first START in a list, if there is one with a valid time. Malformed events are reported when they
/// are polled, not here.
fn first_start(events: &str) -> std::result::Result<Option<Timestamp>, Malformed> {
    let mut first = None;
    json::items(events, |raw| {
        if first.is_none()
            && let Ok([name, at]) = json::fields(raw, ["event_name", "event_at"])
            && read::<String>(name).as_deref() == Some(EventKind::Start.name())
        {
            first = Some(read(at).and_then(|Integer(at)| Timestamp::from_unix(at)));
        }
    })?;
    Ok(first.flatten())
}

/// The query of the next page, from `nextPageUrl` as JSON. Without a usable query, the page is the last one.
fn next_page(next: &str) -> Option<String> {
    if next == "null" {
        return None;
    }
    let url: Option<String> = serde_json::from_str(next).ok();
    let query = url.as_deref().and_then(next_query);
    if query.is_none() {
        // Text before an @ may be a user and a password.
        let next = next.rsplit('@').next().unwrap_or_default();
        tracing::warn!(next = %shortened(next), "BigChat sent an unusable nextPageUrl; treating the window as complete");
    }
    query
}

/// The query of a `nextPageUrl`, which is an absolute or relative URL, or the query alone, possibly HTML-escaped.
fn next_query(next: &str) -> Option<String> {
    let next = next.trim().replace("&amp;", "&");
    let query = match next.split_once('?') {
        Some((_, query)) => query,
        None if next.contains('=') && !next.contains(['/', ':']) => &next,
        None => return None,
    };
    let query = query.split('#').next().unwrap_or_default();
    if query.len() > MAX_QUERY {
        return None;
    }
    let parameters = query.split('&').filter(|parameter| !parameter.is_empty());
    let query = parameters
        .map(with_encoded_plus)
        .collect::<Vec<_>>()
        .join("&");
    (!query.is_empty()).then_some(query)
}

/// Percent-encodes a `+` in a time. Elsewhere in a query it means a space; in a time it can only mean an offset.
fn with_encoded_plus(parameter: &str) -> Cow<'_, str> {
    let encoded = parameter.replace('+', "%2B");
    let is_time = || form_urlencoded::parse(encoded.as_bytes()).any(|(_, value)| is_time(&value));
    if parameter.contains('+') && is_time() {
        encoded.into()
    } else {
        parameter.into()
    }
}

fn is_time(value: &str) -> bool {
    DateTime::parse_from_rfc3339(value).is_ok()
}

/// A query in canonical form: sorted, in one encoding, and with times in UTC. Equal canonical queries are for the same
/// page.
pub fn canonical_query(query: &str) -> String {
    let mut pairs: Vec<(String, String)> = form_urlencoded::parse(query.as_bytes())
        .map(|(name, value)| {
            let time = DateTime::parse_from_rfc3339(&value);
            let value = time.map_or_else(|_| value.into_owned(), |time| time.to_utc().to_rfc3339());
            (name.into_owned(), value)
        })
        .collect();
    pairs.sort();
    form_urlencoded::Serializer::new(String::new())
        .extend_pairs(pairs)
        .finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_query_counts() {
        assert_eq!(
            next_query("http://evil.example/steal?page=1&a=b#x"),
            Some("page=1&a=b".into())
        );
        assert_eq!(next_query("/events?page=1"), Some("page=1".into()));
        assert_eq!(next_query("?page=1"), Some("page=1".into()));
        assert_eq!(next_query("http://evil.example/steal"), None);
        assert_eq!(next_query(""), None);
    }

    #[test]
    fn sloppy_but_unambiguous_next_page() {
        for (next, query) in [
            (" /events?page=1\n", "page=1"),
            ("/events?a=b&amp;page=1", "a=b&page=1"),
            ("page=1&a=b", "page=1&a=b"),
            ("&page=1", "page=1"),
            ("/events?&&page=1&", "page=1"),
            (
                "?t=2026-11-22T22:00:00+00:00&q=a+b",
                "t=2026-11-22T22:00:00%2B00:00&q=a+b",
            ),
            (
                "?t=2026-11-22T22%3A00%3A00+02%3A00",
                "t=2026-11-22T22%3A00%3A00%2B02%3A00",
            ),
            ("?cursor=a b|c", "cursor=a b|c"),
        ] {
            assert_eq!(next_query(next).as_deref(), Some(query), "{next}");
        }
        for next in [
            "?",
            "?&",
            "?#page=1",
            "page",
            "http://h/a=b",
            "events/page=2",
        ] {
            assert_eq!(next_query(next), None, "{next}");
        }
    }

    #[test]
    fn same_page_in_any_spelling() {
        let same = |a, b| canonical_query(a) == canonical_query(b);
        for (a, b) in [
            ("a=1&b=2", "b=2&a=1"),
            ("a=x%20y", "a=x+y"),
            ("a=x y", "a=x%20y"),
            ("a=%7e", "a=~"),
            (
                "t=2026-11-22T22:00:00Z",
                "t=2026-11-22T22%3A00%3A00%2B00%3A00",
            ),
            (
                "t=2026-11-23T00:00:00%2B02:00",
                "t=2026-11-22T22:00:00.000Z",
            ),
        ] {
            assert!(same(a, b), "{a} {b}");
        }
        for (a, b) in [("a=1", "a=2"), ("a=1&a=1", "a=1"), ("a=1&b=2", "a=2&b=1")] {
            assert!(!same(a, b), "{a} {b}");
        }
    }

    #[test]
    fn windows_are_requested_in_utc() {
        let query = window_query(Window {
            start: Timestamp::clamped(0),
            end: Timestamp::clamped(60),
        });
        assert_eq!(
            query,
            "start_at=1970-01-01T00%3A00%3A00Z&end_at=1970-01-01T00%3A01%3A00Z"
        );
    }
}
