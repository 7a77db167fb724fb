//! The BigChat client: its three routes, typed after the contract.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::clock::BigChatClock;
use crate::http::route::Route;
use crate::http::{ApiError, Http, Response, Target, json, shortened, unreadable};
use crate::time::Timestamp;

/// No server takes a longer query than this.
const MAX_QUERY: usize = 16 << 10;

/// BigChat, as far as it is asked anything.
#[derive(Debug)]
pub struct BigChat {
    http: Http,
    clock: BigChatClock,
}

/// One page of `/events`.
#[derive(Debug)]
pub struct Page {
    /// The body, as it came: what is kept.
    pub body: String,
    /// The query of the next page, if there is one. Only the query of `nextPageUrl` is of use: its scheme, host and
    /// path are what a proxy made of them, or name another host altogether.
    pub next: Option<String>,
    /// How many events there are on it.
    pub events: usize,
    /// BigChat's clock as it told it.
    pub date: Option<Timestamp>,
}

/// What `/conversations/{id}` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Details {
    /// When the conversation started; `None` if its START is not among the events.
    pub started_at: Option<Timestamp>,
    /// Who has it: at BigChat the first advisor for ever, at a usual vendor the one of now.
    pub advisor: i64,
}

/// What `/advisors/{id}` tells.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Advisor {
    /// Not unique.
    pub name: String,
    /// The identity; made from another name.
    pub email_address: String,
}

type Result<T> = std::result::Result<T, ApiError>;

impl BigChat {
    /// BigChat behind `http`.
    pub fn new(http: Http) -> Self {
        Self {
            http,
            clock: BigChatClock::default(),
        }
    }

    /// Base URL and throttle.
    pub fn http(&self) -> &Http {
        &self.http
    }

    /// BigChat's clock.
    pub fn clock(&self) -> &BigChatClock {
        &self.clock
    }

    /// One page of what happened; `query` comes from [`window_query`] or from the page before.
    pub async fn events(&self, query: &str) -> Result<Page> {
        #[derive(Deserialize)]
        struct Wire<'a> {
            #[serde(borrow, rename = "nextPageUrl", default)]
            next: Option<&'a RawValue>,
            events: Counted,
        }
        self.get(
            self.http.target(Route::Events, "", Some(query)),
            |response| {
                let date = response.date;
                // A page is told once: what of it can be read is taken, whatever is wrong with the rest.
                let body = String::from_utf8_lossy(&response.body);
                let wire: Wire<'_> = serde_json::from_str(&body)
                    .map_err(|error| unreadable(body.as_bytes(), &error))?;
                let (next, events) = (
                    wire.next.and_then(|next| next_page(next.get())),
                    wire.events.0,
                );
                let body = match body {
                    Cow::Owned(body) => body,
                    Cow::Borrowed(_) => {
                        String::from_utf8(std::mem::take(&mut response.body)).unwrap_or_default()
                    }
                };
                Ok(Page {
                    body,
                    next,
                    events,
                    date,
                })
            },
        )
        .await
    }

    /// The details of a conversation.
    pub async fn conversation(&self, id: i64) -> Result<Details> {
        #[derive(Deserialize)]
        struct Wire {
            events: Start,
            advisor_id: i64,
        }
        self.get(
            self.http.target(Route::Conversation, &id.to_string(), None),
            |response| {
                let wire: Wire = json(&response.body)?;
                let started_at = match wire.events {
                    Start::At(at) => Timestamp::from_unix(at),
                    Start::Unreadable => return Err("its START has no time".to_owned()),
                    Start::Missing => None,
                };
                Ok(Details {
                    started_at,
                    advisor: wire.advisor_id,
                })
            },
        )
        .await
    }

    /// The name and address of an advisor.
    pub async fn advisor(&self, id: i64) -> Result<Advisor> {
        self.get(
            self.http.target(Route::Advisor, &id.to_string(), None),
            |response| json(&response.body),
        )
        .await
    }

    async fn get<T>(
        &self,
        target: Target,
        read: impl FnOnce(&mut Response) -> std::result::Result<T, String>,
    ) -> Result<T> {
        let sent = self.http.send(&target, None::<&()>).await;
        self.clock
            .observe(sent.as_ref().ok().and_then(|response| response.date));
        self.http.conclude(&target, None::<&()>, sent, read)
    }
}

/// The query for the first page of what happened from `start` to `end`: whole seconds in UTC, with `Z`.
pub fn window_query(start: Timestamp, end: Timestamp) -> String {
    url::form_urlencoded::Serializer::new(String::new())
        .append_pair("start_at", &start.to_string())
        .append_pair("end_at", &end.to_string())
        .finish()
}

/// Hands over the events of a page that was kept, each as it came and one by one: a hostile page has millions.
pub fn page_events<'a>(body: &'a str, each: impl FnMut(&'a str)) {
    #[derive(Deserialize)]
    struct Wire<'a> {
        #[serde(borrow)]
        events: &'a RawValue,
    }
    if let Ok(Wire { events }) = serde_json::from_str(body) {
        let mut events = serde_json::Deserializer::from_str(events.get());
        // That it is a list was seen when the page came.
        events.deserialize_seq(Each(each)).ok();
    }
}

/// Hands over what stands in a list.
struct Each<F>(F);

impl<'de, F: FnMut(&'de str)> Visitor<'de> for Each<F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> std::result::Result<(), A::Error> {
        while let Some(raw) = list.next_element::<&RawValue>()? {
            (self.0)(raw.get());
        }
        Ok(())
    }
}

/// How many stand in a list.
struct Counted(usize);

impl<'de> Deserialize<'de> for Counted {
    fn deserialize<D: Deserializer<'de>>(list: D) -> std::result::Result<Self, D::Error> {
        let mut count = 0;
        list.deserialize_seq(Each(|_: &str| count += 1))?;
        Ok(Self(count))
    }
}

/// What the first START in a list tells. What is wrong with other events is told where they are polled.
enum Start {
    At(i64),
    /// Its time is none.
    Unreadable,
    Missing,
}

impl<'de> Deserialize<'de> for Start {
    fn deserialize<D: Deserializer<'de>>(list: D) -> std::result::Result<Self, D::Error> {
        let mut start = Self::Missing;
        list.deserialize_seq(Each(|raw: &str| {
            if matches!(start, Self::Missing) {
                start = Self::of(raw);
            }
        }))?;
        Ok(start)
    }
}

impl Start {
    fn of(raw: &str) -> Self {
        fn read<'a, T: Deserialize<'a>>(value: Option<&&'a RawValue>) -> Option<T> {
            serde_json::from_str(value?.get()).ok()
        }
        let fields: HashMap<String, &RawValue> = serde_json::from_str(raw).unwrap_or_default();
        match read::<String>(fields.get("event_name")).as_deref() {
            Some("START") => read(fields.get("event_at")).map_or(Self::Unreadable, Self::At),
            _ => Self::Missing,
        }
    }
}

/// The query of the next page, where `nextPageUrl` (as JSON) tells one that can be asked for. What it tells else is
/// taken for the end: there is nothing to go on with.
fn next_page(next: &str) -> Option<String> {
    if next == "null" {
        return None;
    }
    let url: Option<String> = serde_json::from_str(next).ok();
    let query = url.as_deref().and_then(next_query);
    if query.is_none() {
        // Whatever precedes an @ may be a user and a password.
        let next = next.rsplit('@').next().unwrap_or_default();
        tracing::warn!(next = %shortened(next), "BigChat names a next page that cannot be asked for; the poll is complete");
    }
    query
}

/// The query of a `nextPageUrl`, which may be absolute or relative.
fn next_query(next: &str) -> Option<String> {
    let (_, query) = next.split_once('?')?;
    let query = query.split('#').next().unwrap_or_default();
    (!query.is_empty() && query.len() <= MAX_QUERY).then(|| query.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_query_of_the_next_page_is_taken() {
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
    fn windows_are_asked_for_in_utc_with_z() {
        let query = window_query(Timestamp::clamped(0), Timestamp::clamped(60));
        assert_eq!(
            query,
            "start_at=1970-01-01T00%3A00%3A00Z&end_at=1970-01-01T00%3A01%3A00Z"
        );
    }
}
