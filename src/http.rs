//! What both API clients share: one request, one answer, within a time and a size, and nothing done behind the
//! caller's back.
//!
//! No redirects, no proxies, no decompression, and no retries but of a GET whose connection broke: the daemon's
//! promises rest on knowing of each request whether it was sent. No request and no token ever goes to another host than
//! the configured one.

use std::fmt;
#[cfg(test)]
use std::pin::Pin;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[cfg(test)]
use reqwest::Method;
use reqwest::header::{self, HeaderValue};
use reqwest::{Body, Client, Request, RequestBuilder, StatusCode, redirect};
use secrecy::ExposeSecret;
use serde::Deserialize;
use thiserror::Error;
use url::Url;

use crate::log;
use crate::metrics::ApiRequests;
use crate::pulse;
use crate::retry::RETRY_AFTER_MAX;
use crate::route::Route;
use crate::settings::Token;
use crate::time::{Millis, Timestamp};

/// Larger answers are not read to their end. A page of 100,000 events fits in.
const MAX_BODY: usize = 32 << 20;

/// How much of a request or an answer goes into records and logs.
const MAX_RECORD: usize = 2_000;

/// How much of what an answer says is wrong, in characters: failed events are grouped by it.
const MAX_COMPLAINT: usize = 200;

/// Both servers close connections that were idle for 5 s; one that is older breaks in mid-request.
const POOL_IDLE: Duration = Duration::from_secs(4);

/// One API at one base URL.
#[derive(Debug)]
pub struct Http {
    wire: Wire,
    base: Url,
    token: Token,
    throttled_until: AtomicI64,
    latest: Mutex<Option<Latest>>,
    requests: Option<ApiRequests>,
}

/// What is asked for: a route, and where. Made once, it can be asked for often.
#[derive(Debug, Clone)]
pub struct Target {
    /// The route.
    pub route: Route,
    url: Arc<Url>,
}

impl Target {
    /// Its path and query.
    fn path(&self) -> &str {
        &self.url[url::Position::BeforePath..]
    }
}

/// The latest exchange with an API.
#[derive(Debug, Clone)]
pub struct Latest {
    /// When it ended.
    pub at: Millis,
    target: Target,
    /// The status that was answered, or why there was no answer. It is put into words only when somebody asks.
    pub answer: Result<StatusCode, String>,
}

impl Latest {
    /// What was asked, without its query: that may hold an e-mail address.
    pub fn request(&self) -> String {
        let Target { route, url } = &self.target;
        format!("{} {}", route.method(), &url[..url::Position::AfterPath])
    }
}

/// What carries requests and brings answers.
#[derive(Debug)]
enum Wire {
    Network(Client),
    #[cfg(test)]
    Here(Arc<dyn Carrier>),
}

/// Answers requests within this process, without a network.
#[cfg(test)]
pub(crate) trait Carrier: fmt::Debug + Send + Sync {
    /// Answers a request with this body, or loses it or its answer.
    fn carry(&self, method: Method, url: Url, body: Vec<u8>) -> Carried;
}

/// What [`Carrier::carry`] comes to.
#[cfg(test)]
pub(crate) type Carried = Pin<Box<dyn Future<Output = Result<Answer, NoAnswer>> + Send>>;

/// An answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// The server's clock, by the `date` header.
    pub date: Option<Timestamp>,
    /// Until when `Retry-After` asks to wait.
    pub retry_at: Option<Millis>,
    /// Its body.
    pub body: Vec<u8>,
}

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum NoAnswer {
    /// The request never left this machine: there was no connection. Nothing was carried out.
    #[error("no connection: {0}")]
    NotSent(String),
    /// Nobody could ever send it: its URL is too long, say.
    #[error("it cannot be sent: {0}")]
    Impossible(String),
    /// Sent, perhaps carried out; the answer was lost, cut off or too large.
    #[error("no whole answer: {0}")]
    Lost(String),
    /// Sent, and not answered in time: it may still be carried out.
    #[error("no answer in time")]
    Late,
    /// Not sent, since the API has asked to be left alone until then.
    #[error("the API asked to be left alone until {0}")]
    Throttled(Millis),
}

impl Http {
    /// A client for the API at `base`, each request of which takes at most `timeout`.
    ///
    /// # Errors
    ///
    /// When the machine's certificates cannot be read.
    pub fn new(base: Url, token: Token, timeout: Duration) -> Result<Self, reqwest::Error> {
        let client = Client::builder()
            .user_agent(concat!("bigchat-sync/", env!("CARGO_PKG_VERSION")))
            .timeout(timeout)
            .connect_timeout(timeout)
            .pool_idle_timeout(POOL_IDLE)
            .redirect(redirect::Policy::none())
            .retry(reqwest::retry::never())
            .no_proxy()
            .tcp_nodelay(true)
            .build()?;
        Ok(Self {
            wire: Wire::Network(client),
            base,
            token,
            throttled_until: AtomicI64::new(0),
            latest: Mutex::default(),
            requests: None,
        })
    }

    /// An API within this process.
    #[cfg(test)]
    pub(crate) fn here(base: Url, carrier: Arc<dyn Carrier>) -> Self {
        Self {
            wire: Wire::Here(carrier),
            base,
            token: Token::default(),
            throttled_until: AtomicI64::new(0),
            latest: Mutex::default(),
            requests: None,
        }
    }

    /// The same, with its requests counted there.
    pub fn counted_by(self, requests: ApiRequests) -> Self {
        Self {
            requests: Some(requests),
            ..self
        }
    }

    /// The configured base URL.
    pub fn base(&self) -> &Url {
        &self.base
    }

    /// Until when the API is left alone, if it asked for that.
    pub fn throttled_until(&self, now: Millis) -> Option<Millis> {
        let until = Millis(self.throttled_until.load(Ordering::Relaxed));
        // Further ahead than ever asked for, it is this machine's clock that was set back.
        (now < until && until <= now.plus(RETRY_AFTER_MAX)).then_some(until)
    }

    /// Until when the API asked to be left alone, whether that is over or not.
    pub fn asked_until(&self) -> Millis {
        Millis(self.throttled_until.load(Ordering::Relaxed))
    }

    /// Leaves the API alone until then.
    pub fn throttle(&self, until: Millis) {
        let now = Millis::now();
        // One noted while this machine's clock was wrong must not outweigh this one.
        let valid = self.throttled_until(now).unwrap_or_default();
        self.throttled_until
            .store(until.max(valid).0, Ordering::Relaxed);
    }

    /// A route below the base URL, asked for what `id` names and with `query` (encoded already), if it takes them.
    pub fn target(&self, route: Route, id: &str, query: Option<&str>) -> Target {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(route.path(id));
        }
        url.set_query(query);
        Target {
            route,
            url: Arc::new(url),
        }
    }

    /// Sends one request, with `body` as JSON, and reads the answer.
    pub async fn send(
        &self,
        target: &Target,
        body: Option<&impl serde::Serialize>,
    ) -> Result<Answer, NoAnswer> {
        let now = Millis::now();
        if let Some(until) = self.throttled_until(now) {
            return Err(NoAnswer::Throttled(until));
        }
        let body = body
            .map(serde_json::to_vec)
            .transpose()
            .map_err(|error| NoAnswer::Impossible(error.to_string()))?;
        let sent = Instant::now();
        let answer = match &self.wire {
            Wire::Network(client) => self.over_network(client, target, body, sent).await,
            #[cfg(test)]
            Wire::Here(carrier) => {
                let url = Url::clone(&target.url);
                let body = body.unwrap_or_default();
                carrier.carry(target.route.method(), url, body).await
            }
        };
        let ended = Instant::now();
        self.note(target, &answer, sent, ended, now);
        pulse::goes_on(ended);
        let answer = answer?;
        if let Some(until) = answer.retry_at {
            self.throttle(until);
        }
        Ok(answer)
    }

    /// The latest exchange, if there was one.
    pub fn latest(&self) -> Option<Latest> {
        self.last_exchange().clone()
    }

    /// Counts an exchange, and keeps it as the latest.
    fn note(
        &self,
        target: &Target,
        answer: &Result<Answer, NoAnswer>,
        sent: Instant,
        ended: Instant,
        sent_at: Millis,
    ) {
        let took = ended - sent;
        let status = answer.as_ref().map(|answer| answer.status);
        self.count(target.route, status, took);
        *self.last_exchange() = Some(Latest {
            at: sent_at.plus(took),
            target: target.clone(),
            answer: status.map_err(ToString::to_string),
        });
    }

    fn count(&self, route: Route, answer: Result<StatusCode, &NoAnswer>, took: Duration) {
        if let Some(requests) = &self.requests {
            requests.made(route, answer, took);
        }
    }

    fn last_exchange(&self) -> MutexGuard<'_, Option<Latest>> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn request(
        &self,
        client: &Client,
        target: &Target,
        body: Option<Vec<u8>>,
    ) -> Result<Request, NoAnswer> {
        let mut request = Request::new(target.route.method(), Url::clone(&target.url));
        if let Some(body) = body {
            let json = HeaderValue::from_static("application/json");
            request.headers_mut().insert(header::CONTENT_TYPE, json);
            *request.body_mut() = Some(Body::from(body));
        }
        let Some(token) = self.token.get() else {
            return Ok(request);
        };
        // The builder marks the header as sensitive; without a token it is only a detour.
        RequestBuilder::from_parts(client.clone(), request)
            .bearer_auth(token.expose_secret())
            .build()
            .map_err(no_answer)
    }

    async fn over_network(
        &self,
        client: &Client,
        target: &Target,
        body: Option<Vec<u8>>,
        sent: Instant,
    ) -> Result<Answer, NoAnswer> {
        let request = self.request(client, target, body)?;
        let again = request.method().is_safe().then(|| request.try_clone());
        let mut response = match (client.execute(request).await, again.flatten()) {
            // After a 500 both servers close the connection without saying so, and a pooled one breaks. To ask again
            // is safe for what changes nothing; for all else the outcome is unknown, and is the caller's to look up.
            (Err(error), Some(again)) if !error.is_timeout() && !error.is_connect() => {
                self.count(target.route, Err(&lost(error)), sent.elapsed());
                client.execute(again).await
            }
            (answer, _) => answer,
        }
        .map_err(no_answer)?;
        let status = response.status();
        let header = |name| {
            response
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok())
        };
        let date = header(header::DATE).and_then(Timestamp::parse_http_date);
        let asks_to_wait = matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
        );
        let retry_at = header(header::RETRY_AFTER)
            .filter(|_| asks_to_wait)
            .and_then(|value| retry_after(value, date))
            .map(|wait| Millis::now().plus(wait));
        let mut bytes = Vec::new();
        loop {
            let chunk = match response.chunk().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => break,
                // The head says all there is to know.
                Err(_) if retry_at.is_some() => break,
                Err(error) => return Err(lost(error)),
            };
            if bytes.len() + chunk.len() > MAX_BODY {
                return Err(NoAnswer::Lost(format!(
                    "the answer is larger than {} MiB",
                    MAX_BODY >> 20
                )));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(Answer {
            status,
            date,
            retry_at,
            body: bytes,
        })
    }
}

fn no_answer(error: reqwest::Error) -> NoAnswer {
    if error.is_builder() {
        NoAnswer::Impossible(cause(error))
    } else if error.is_connect() {
        NoAnswer::NotSent(cause(error))
    } else {
        lost(error)
    }
}

fn lost(error: reqwest::Error) -> NoAnswer {
    if error.is_timeout() {
        NoAnswer::Late
    } else {
        NoAnswer::Lost(cause(error))
    }
}

/// What caused the error in the first place, which says more than all that followed from it; without the URL: a query may
/// hold an e-mail address.
fn cause(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut cause: &dyn std::error::Error = &error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

/// How long `Retry-After` asks to wait: seconds, or an HTTP date by the server's own clock. Nonsense asks for
/// nothing, and nobody waits for longer than an hour.
fn retry_after(value: &str, date: Option<Timestamp>) -> Option<Duration> {
    let value = value.trim();
    let wait = if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        Duration::from_secs(value.parse().unwrap_or(u64::MAX))
    } else {
        let until = Timestamp::parse_http_date(value)?;
        let now = date.unwrap_or_else(Timestamp::of_this_machine);
        Duration::from_secs(u64::try_from(until.unix() - now.unix()).unwrap_or(0))
    };
    Some(wait.min(RETRY_AFTER_MAX))
}

/// A request and what came of it, as kept with a failed event. Bounded; never holds a token.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exchange {
    /// Method, path, query and body.
    pub request: String,
    /// Status and body, or why there is no answer.
    pub response: String,
    /// What the answer says is wrong with the request, if it says so: short, and on one line.
    pub complaint: Option<String>,
}

impl Exchange {
    /// The record of a request that got this answer, or none.
    pub fn new(
        target: &Target,
        body: Option<&impl serde::Serialize>,
        response: Result<&Answer, &NoAnswer>,
    ) -> Self {
        let (method, path) = (target.route.method(), target.path());
        let body = body
            .and_then(|body| serde_json::to_string(body).ok())
            .unwrap_or_default();
        let complaint = response
            .ok()
            .filter(|answer| answer.status.is_client_error())
            .and_then(|answer| complaint(&answer.body));
        let response = match response {
            Ok(answer) => format!(
                "{} {}",
                answer.status.as_u16(),
                String::from_utf8_lossy(head(&answer.body))
            ),
            Err(error) => error.to_string(),
        };
        Self {
            request: shortened(&format!("{method} {path} {body}")),
            response: shortened(&response),
            complaint,
        }
    }
}

/// A request as [`Exchange`] has it, without query and body: these hold messages, names and addresses.
pub fn request_head(request: &str) -> &str {
    let path = request.find(' ').map_or(0, |space| space + 1);
    let end = request[path..].find([' ', '?']);
    end.map_or(request, |end| &request[..path + end])
}

/// A response as [`Exchange`] has it, without its body, which may repeat what was sent: the status, or why there is none.
pub fn response_head(response: &str) -> &str {
    if response.starts_with(|c: char| c.is_ascii_digit()) {
        response.split(' ').next().unwrap_or_default()
    } else {
        response
    }
}

/// What is wrong, by the body of a 4xx: `{"detail": "…"}`, or a list of what is wrong with which field, as both services
/// answer.
fn complaint(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Wire {
        detail: Detail,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Detail {
        All(String),
        Each(Vec<Wrong>),
    }
    #[derive(Deserialize)]
    struct Wrong {
        #[serde(default)]
        loc: Vec<serde_json::Value>,
        msg: String,
    }
    let text = match serde_json::from_slice::<Wire>(body).ok()?.detail {
        Detail::All(text) => text,
        Detail::Each(all) => {
            let all = all.iter().map(|wrong| {
                match wrong.loc.last().and_then(serde_json::Value::as_str) {
                    Some(field) => format!("{field}: {}", wrong.msg),
                    None => wrong.msg.clone(),
                }
            });
            all.collect::<Vec<_>>().join("; ")
        }
    };
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    (!line.is_empty()).then(|| line.chars().take(MAX_COMPLAINT).collect())
}

impl Exchange {
    /// What the log and the figures show of it, unless message text may be logged.
    pub fn logged(&self) -> Self {
        Self {
            request: log::shown(&self.request, request_head).to_owned(),
            response: log::shown(&self.response, response_head).to_owned(),
            complaint: None,
        }
    }
}

impl fmt::Display for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            request, response, ..
        } = self.logged();
        write!(f, "{request} -> {response}")
    }
}

fn head(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.len().min(MAX_RECORD)]
}

/// `text`, without its end where it is long.
pub fn shortened(text: &str) -> String {
    let text = text.trim();
    match text.char_indices().nth(MAX_RECORD) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_kept_within_an_hour_and_nonsense_is_no_request() {
        let date = Timestamp::parse_http_date("Sun, 22 Nov 2026 22:00:00 GMT");
        let wait = |value| retry_after(value, date).map(|wait| wait.as_secs());
        assert_eq!(wait("7"), Some(7));
        assert_eq!(wait("Sun, 22 Nov 2026 22:00:30 GMT"), Some(30));
        assert_eq!(wait("Sun, 22 Nov 2026 21:00:00 GMT"), Some(0));
        assert_eq!(wait("99999999999999999999999999"), Some(3600));
        assert_eq!(wait("soon"), None);
        assert_eq!(wait("-1"), None);
        assert_eq!(wait(""), None);
    }

    #[test]
    fn what_an_answer_says_is_wrong_is_put_in_short() {
        let of = |body: &str| complaint(body.as_bytes());
        let each = r#"{"detail":[{"loc":["body","text"],"msg":"too\n short","input":"k"},{"loc":["body",0],"msg":"no"}]}"#;
        assert_eq!(of(each).as_deref(), Some("text: too short; no"));
        assert_eq!(of(r#"{"detail":" gone "}"#).as_deref(), Some("gone"));
        let long = format!(r#"{{"detail":"{}"}}"#, "ä".repeat(1000));
        assert_eq!(
            of(&long).map(|text| text.chars().count()),
            Some(MAX_COMPLAINT)
        );
        for nothing in ["", "{}", "<html>", r#"{"detail":""}"#, r#"{"detail":7}"#] {
            assert_eq!(of(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn heads_hold_nothing_of_bodies_and_queries() {
        for (request, head) in [
            (
                "POST /chats/c1/messages {\"text\":\"secret\"}",
                "POST /chats/c1/messages",
            ),
            ("GET /agents?email=ann%40x.test", "GET /agents"),
            ("GET /agents?name=a b", "GET /agents"),
            ("PATCH /chats/c1 {\"a\":\"x?y\"}", "PATCH /chats/c1"),
            ("GET /chats", "GET /chats"),
            ("", ""),
        ] {
            assert_eq!(request_head(request), head);
        }
        for (response, head) in [
            ("422 {\"input\":\"secret\"}", "422"),
            ("200 secret", "200"),
            ("503", "503"),
            ("no connection: refused", "no connection: refused"),
            ("", ""),
        ] {
            assert_eq!(response_head(response), head);
        }
    }

    #[test]
    fn paths_are_encoded_and_stay_below_the_base() {
        let http = |base: &str| {
            Http::new(
                Url::parse(base).expect("a URL"),
                Token::default(),
                Duration::from_secs(1),
            )
            .expect("a client")
        };
        let chats = http("http://h:1").target(Route::Chats, "", None);
        assert_eq!(chats.url.as_str(), "http://h:1/chats");
        let base = http("http://h/api/");
        let odd = base.target(Route::ChangeChat, "a/../b?", Some("x=1"));
        assert_eq!(odd.url.as_str(), "http://h/api/chats/a%2F..%2Fb%3F?x=1");
    }

    #[test]
    fn a_clock_set_back_does_not_prolong_a_throttle() {
        let http = Http::new(
            Url::parse("http://h").expect("a URL"),
            Token::default(),
            Duration::from_secs(1),
        )
        .expect("a client");
        http.throttle(Millis(10_000_000));
        assert_eq!(
            http.throttled_until(Millis(9_000_000)),
            Some(Millis(10_000_000))
        );
        assert_eq!(http.throttled_until(Millis(10_000_000)), None);
        assert_eq!(http.throttled_until(Millis(1_000_000)), None);
    }
}
