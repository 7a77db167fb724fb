//! What carries requests and brings responses.

use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use reqwest::header::{self, HeaderMap, HeaderValue};
use reqwest::{Body, Client, Method, StatusCode, redirect};
use secrecy::{ExposeSecret, SecretString};
use url::Url;

use super::error::ErrorKind;
use super::rate_limit::retry_after;
use crate::time::{Millis, Timestamp};

/// Larger responses are not read to their end. A page of 100,000 events fits in.
const MAX_BODY: usize = 32 << 20;

/// Both servers close connections that were idle for 5 s; an older one breaks in mid-request.
const POOL_IDLE: Duration = Duration::from_secs(4);

/// Carries requests: over the network, or to a service in this process.
pub trait Transport: fmt::Debug + Send + Sync {
    /// Sends a request once, and reads the response to its end.
    fn send<'a>(&'a self, request: Request<'a>) -> Sending<'a>;
}

/// What [`Transport::send`] comes to.
pub type Sending<'a> = Pin<Box<dyn Future<Output = Result<Response, NoResponse>> + Send + 'a>>;

/// A request as a transport takes it.
#[derive(Debug)]
pub struct Request<'a> {
    pub method: Method,
    pub url: &'a Url,
    pub token: Option<SecretString>,
    /// JSON.
    pub body: Option<Vec<u8>>,
}

/// A response, read to its end.
#[derive(Debug)]
pub struct Response {
    pub status: StatusCode,
    /// The server's clock, by the `date` header.
    pub date: Option<Timestamp>,
    /// Until when `Retry-After` asks to wait.
    pub retry_at: Option<Millis>,
    pub body: Vec<u8>,
}

/// Why there is no response, and in words for the record.
#[derive(Debug)]
pub struct NoResponse {
    pub kind: ErrorKind,
    pub why: String,
}

impl NoResponse {
    /// There was no connection, so nothing was carried out.
    pub fn unreachable(cause: impl fmt::Display) -> Self {
        Self {
            kind: ErrorKind::Unreachable,
            why: format!("no connection: {cause}"),
        }
    }

    /// Nobody could ever send it: its URL is too long, say.
    pub(super) fn impossible(cause: impl fmt::Display) -> Self {
        Self {
            kind: ErrorKind::Rejected,
            why: format!("it cannot be sent: {cause}"),
        }
    }

    /// Sent; the response was lost, cut off or too large.
    pub fn lost(cause: impl fmt::Display) -> Self {
        Self {
            kind: ErrorKind::OutcomeUnknown { timed_out: false },
            why: format!("no whole answer: {cause}"),
        }
    }

    /// Sent, and not answered in time.
    pub fn timed_out() -> Self {
        Self {
            kind: ErrorKind::OutcomeUnknown { timed_out: true },
            why: "no answer in time".to_owned(),
        }
    }
}

/// HTTP over the network: no redirects, no proxies, no decompression, and no retry but of a GET whose connection broke.
#[derive(Debug)]
pub struct Network {
    client: Client,
}

impl Network {
    /// Requests take at most `timeout`.
    ///
    /// # Errors
    ///
    /// If the certificates of this machine cannot be read.
    pub fn new(timeout: Duration) -> Result<Self, reqwest::Error> {
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
        Ok(Self { client })
    }

    async fn exchange(&self, mut request: Request<'_>) -> Result<Response, NoResponse> {
        let client = &self.client;
        let is_read = request.method.is_safe();
        let body = request.body.take();
        let mut response = match client.execute(encode(&request, body)?).await {
            // After a 500 both servers close the connection without saying so, and a pooled one breaks. A read is safe to
            // repeat; of all else the outcome is unknown, and is for the caller to find out.
            Err(error) if is_read && !error.is_timeout() && !error.is_connect() => {
                client.execute(encode(&request, None)?).await
            }
            response => response,
        }
        .map_err(no_response)?;
        let status = response.status();
        let date = text(response.headers(), header::DATE).and_then(Timestamp::parse_http_date);
        let asks_to_wait = matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
        );
        let retry_at = text(response.headers(), header::RETRY_AFTER)
            .filter(|_| asks_to_wait)
            .and_then(|value| retry_after(value, date))
            .map(|wait| Millis::now().plus(wait));
        let mut body = Vec::new();
        loop {
            let chunk = match response.chunk().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => break,
                // The head says all there is to know.
                Err(_) if retry_at.is_some() => break,
                Err(error) => return Err(lost(error)),
            };
            if body.len() + chunk.len() > MAX_BODY {
                let limit = MAX_BODY >> 20;
                return Err(NoResponse::lost(format_args!(
                    "the answer is larger than {limit} MiB"
                )));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Response {
            status,
            date,
            retry_at,
            body,
        })
    }
}

impl Transport for Network {
    fn send<'a>(&'a self, request: Request<'a>) -> Sending<'a> {
        Box::pin(self.exchange(request))
    }
}

fn encode(request: &Request<'_>, body: Option<Vec<u8>>) -> Result<reqwest::Request, NoResponse> {
    let mut encoded = reqwest::Request::new(request.method.clone(), Url::clone(request.url));
    if let Some(body) = body {
        let json = HeaderValue::from_static("application/json");
        encoded.headers_mut().insert(header::CONTENT_TYPE, json);
        *encoded.body_mut() = Some(Body::from(body));
    }
    if let Some(token) = &request.token {
        let bearer = format!("Bearer {}", token.expose_secret());
        let mut bearer = HeaderValue::try_from(bearer).map_err(NoResponse::impossible)?;
        bearer.set_sensitive(true);
        encoded.headers_mut().insert(header::AUTHORIZATION, bearer);
    }
    Ok(encoded)
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn no_response(error: reqwest::Error) -> NoResponse {
    if error.is_builder() {
        NoResponse::impossible(cause(error))
    } else if error.is_connect() {
        NoResponse::unreachable(cause(error))
    } else {
        lost(error)
    }
}

fn lost(error: reqwest::Error) -> NoResponse {
    if error.is_timeout() {
        NoResponse::timed_out()
    } else {
        NoResponse::lost(cause(error))
    }
}

/// The first cause of an error, which says more than what followed from it; without the URL: a query may hold an e-mail
/// address.
fn cause(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut cause: &dyn std::error::Error = &error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}
