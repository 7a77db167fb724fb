//! Requests and replies, as both services read and write them. Nothing here does I/O.

use chrono::{DateTime, NaiveDateTime, Utc};
use serde::Serialize;
use serde_json::{Value, json};
use url::form_urlencoded;

use super::watch::Happening;

/// The beginning of the ids that OurAPI assigns in order.
const ORDERED_ID: &str = "00000000-0000-0000-0000-";

/// A service without a network: a plain value whose copies give the same answers.
pub trait Api: Clone + Send + 'static {
    /// Answers a request that arrives while this many others are being carried out.
    fn answer(&mut self, request: &Request, others: usize) -> Reply;

    /// The time in its `date` headers.
    fn date(&self) -> DateTime<Utc>;

    /// Called when a request has been carried out. Returns what an observer receives.
    fn carried_out(&mut self, _: &Request, _: &Reply) -> Option<Happening> {
        None
    }

    /// Called when a reply is sent to a client that is still waiting. Returns what an observer receives.
    fn sent(&mut self, _: &Request, _: &Reply) -> Option<Happening> {
        None
    }
}

/// A request, with the headers that matter here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub query: String,
    pub host: String,
    pub authorization: Option<String>,
    pub body: Vec<u8>,
}

impl Request {
    /// `target` is a path with or without a query.
    pub fn new(method: &str, target: &str, body: impl Into<Vec<u8>>) -> Self {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        Self {
            method: method.to_owned(),
            path: path.to_owned(),
            query: query.to_owned(),
            body: body.into(),
            ..Self::default()
        }
    }

    /// Path and query.
    pub fn target(&self) -> String {
        match &*self.query {
            "" => self.path.clone(),
            query => format!("{}?{query}", self.path),
        }
    }

    /// Method, path, query and body in one line, with sorted keys and shortened ordered ids.
    pub fn line(&self) -> String {
        let body = match serde_json::from_slice::<Value>(&self.body) {
            Ok(json) => json.to_string(),
            Err(_) => String::from_utf8_lossy(&self.body).into_owned(),
        };
        let line = format!("{} {} {body}", self.method, self.target());
        shortened(line.trim_end())
    }

    pub(super) fn segments(&self) -> Vec<&str> {
        self.path.split('/').skip(1).collect()
    }

    /// A parameter of the query. If it is repeated, the last value counts.
    pub(super) fn parameter(&self, name: &str) -> Option<String> {
        let pairs = form_urlencoded::parse(self.query.as_bytes());
        let values = pairs.filter(|(key, _)| key == name);
        values.last().map(|(_, value)| value.into_owned())
    }
}

/// The full form of an id assigned in order, from its end.
pub fn id(end: &str) -> String {
    format!("{ORDERED_ID}{end:0>12}")
}

/// The text, with each id assigned in order reduced to its end.
pub fn shortened(text: &str) -> String {
    let mut parts = text.split(ORDERED_ID);
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + part.trim_start_matches('0'))
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Whether the connection is closed after this reply without a `connection: close` header, as both services do
    /// after an unhandled error.
    pub closes: bool,
    /// How many of the bytes announced by `content-length` are not sent.
    pub missing: usize,
    /// The events in this reply, as indexes into BigChat's list of reported events.
    pub(super) events: Vec<usize>,
}

impl Reply {
    pub fn new(status: u16) -> Self {
        Self {
            status,
            ..Self::default()
        }
    }

    pub fn json(status: u16, body: &impl Serialize) -> Self {
        match serde_json::to_vec(body) {
            Ok(body) => Self {
                body,
                ..Self::new(status)
            }
            .with("content-type", "application/json"),
            Err(_) => Self::unhandled(),
        }
    }

    /// An error response in the format of both services.
    pub(super) fn detail(status: u16, detail: impl Into<Value>) -> Self {
        Self::json(status, &json!({ "detail": detail.into() }))
    }

    pub(super) fn not_found(detail: &str) -> Self {
        Self::detail(404, detail)
    }

    pub(super) fn method_not_allowed() -> Self {
        Self::detail(405, "Method Not Allowed")
    }

    /// An error of the service itself.
    pub(super) fn unhandled() -> Self {
        Self {
            body: b"Internal Server Error".to_vec(),
            closes: true,
            ..Self::new(500)
        }
    }

    pub(super) fn with(mut self, header: &str, value: impl Into<String>) -> Self {
        self.headers.push((header.to_owned(), value.into()));
        self
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        let found = headers.find(|(header, _)| header.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }
}

/// One entry of a 422's `detail`.
pub(super) fn invalid(kind: &str, place: [&str; 2], message: &str, input: &Value) -> Value {
    json!({ "type": kind, "loc": place, "msg": message, "input": input })
}

/// A time as both services read it: the local time, and the offset from UTC in seconds, if given.
pub(super) fn parse_time(text: &str) -> Option<(NaiveDateTime, i32)> {
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Some((time.naive_local(), time.offset().local_minus_utc()));
    }
    if let Ok(seconds) = text.parse() {
        return Some((DateTime::from_timestamp(seconds, 0)?.naive_utc(), 0));
    }
    let naive = |format| NaiveDateTime::parse_from_str(text, format).ok();
    Some((
        naive("%Y-%m-%dT%H:%M:%S%.f").or_else(|| naive("%Y-%m-%d %H:%M:%S%.f"))?,
        0,
    ))
}
