//! Sending requests and receiving responses.

use std::pin::Pin;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use std::{fmt, io};

use reqwest::header::{self, HeaderMap, HeaderValue};
use reqwest::{Body, Client, Method, StatusCode, redirect};
use secrecy::{ExposeSecret, SecretString};
use url::Url;

use super::error::ErrorKind;
use super::exchange::location;
use super::rate_limit::{RateLimit, retry_after};
use crate::domain::text::{decoded, inflated};
use crate::domain::time::{Millis, Timestamp};
use crate::mutex::lock;

/// Maximum size of a response in bytes. A page of 100,000 events is smaller.
pub(super) const MAX_BODY: usize = 32 << 20;

/// Maximum `age` of a cached response in seconds. A larger value is not plausible.
const MAX_AGE: u64 = 366 * 86_400;

/// Maximum idle time of a connection. Both servers close a connection that is idle for 5 s, possibly during the next
/// request.
const POOL_IDLE: Duration = Duration::from_secs(4);

/// Sends requests over the network, or to a service in this process.
pub trait Transport: fmt::Debug + Send + Sync {
    /// Sends a request once, and reads the complete response.
    fn send<'a>(&'a self, request: Request<'a>) -> Sending<'a>;
}

pub type Sending<'a> = Pin<Box<dyn Future<Output = Result<Response, NoResponse>> + Send + 'a>>;

#[derive(Debug)]
pub struct Request<'a> {
    pub method: Method,
    pub url: &'a Url,
    /// The time of sending.
    pub at: Instant,
    pub token: Option<SecretString>,
    /// JSON.
    pub body: Option<&'a str>,
}

/// A complete response.
#[derive(Debug)]
pub struct Response {
    pub status: StatusCode,
    /// The server's clock, from the `date` header.
    pub date: Option<Timestamp>,
    /// The wait in `Retry-After`.
    pub rate_limit: Option<RateLimit>,
    /// The location of a redirect, without secrets.
    pub location: Option<String>,
    pub body: Vec<u8>,
}

#[derive(Debug)]
pub struct NoResponse {
    pub kind: ErrorKind,
    pub reason: String,
    /// The response was larger than the limit.
    pub too_large: bool,
}

impl NoResponse {
    pub(super) fn new(kind: ErrorKind, reason: impl Into<String>) -> Self {
        Self {
            kind,
            reason: reason.into(),
            too_large: false,
        }
    }

    /// There was no connection, so the request was not sent.
    pub fn unreachable(cause: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Unreachable, format!("no connection: {cause}"))
    }

    /// The request cannot be encoded, for instance because its URL is too long.
    fn impossible(cause: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Rejected, format!("cannot be sent: {cause}"))
    }

    /// The request was sent; the response was lost, truncated or too large.
    pub fn lost(cause: impl fmt::Display) -> Self {
        let kind = ErrorKind::OutcomeUnknown { timed_out: false };
        Self::new(kind, format!("incomplete response: {cause}"))
    }

    fn too_large() -> Self {
        Self {
            too_large: true,
            ..Self::lost(format_args!("larger than {} MiB", MAX_BODY >> 20))
        }
    }

    pub fn timed_out() -> Self {
        let kind = ErrorKind::OutcomeUnknown { timed_out: true };
        Self::new(kind, "no answer in time")
    }
}

/// If a connection breaks later than this after the request was sent, a load balancer may have given up waiting, and
/// the API may still carry out the request, as after a time-out. If it breaks sooner, the API broke it.
const PROMPT: Duration = Duration::from_secs(1);

/// Maximum age of connections. After this time, the host name may resolve to another address while the old one still
/// answers.
const RENEW_EVERY: Duration = Duration::from_secs(60);

/// HTTP over the network: no redirects, no proxies, no cached responses, and no retries, except of a GET whose
/// connection broke. Compressed responses are decompressed, although compression is never requested; text is decoded as
/// declared.
///
/// After a lost response or a server error, no open connection is used again: all lead to the same server, which may
/// have closed them, too.
#[derive(Debug)]
pub struct Network {
    timeout: Duration,
    with_tls: bool,
    pool: Mutex<Pool>,
}

/// Each client has separate connections. Dropping it does not interrupt requests in flight.
#[derive(Debug)]
struct Pool {
    client: Client,
    opened: Instant,
    is_suspect: bool,
}

impl Network {
    /// # Errors
    ///
    /// If `base` needs TLS and the certificates of this machine cannot be read.
    pub fn new(base: &Url, timeout: Duration) -> Result<Self, reqwest::Error> {
        let with_tls = base.scheme() != "http";
        let pool = Mutex::new(Pool {
            client: client(with_tls, timeout)?,
            opened: Instant::now(),
            is_suspect: false,
        });
        Ok(Self {
            timeout,
            with_tls,
            pool,
        })
    }

    fn client(&self, now: Instant) -> Client {
        let mut pool = lock(&self.pool);
        let is_old = now.saturating_duration_since(pool.opened) >= RENEW_EVERY;
        // If the certificates cannot be read, the old client stays in use.
        if (pool.is_suspect || is_old)
            && let Ok(client) = client(self.with_tls, self.timeout)
        {
            *pool = Pool {
                client,
                opened: now,
                is_suspect: false,
            };
        }
        pool.client.clone()
    }

    fn suspect(&self) {
        lock(&self.pool).is_suspect = true;
    }

    async fn send_once(&self, request: Request<'_>) -> Result<Response, NoResponse> {
        let response = self.exchange(request).await;
        let is_suspect = match &response {
            Ok(response) => response.status.is_server_error(),
            Err(error) => error.kind.outcome_unknown(),
        };
        if is_suspect {
            self.suspect();
        }
        response
    }

    async fn exchange(&self, request: Request<'_>) -> Result<Response, NoResponse> {
        let client = self.client(request.at);
        let is_read = request.method.is_safe();
        let sent_at = Instant::now();
        let response = match client.execute(encode(&request)?).await {
            // After a 500, both servers close the connection without notice, so a pooled connection may be broken. A
            // read can be repeated; the outcome of a write is unknown.
            Err(error) if is_read && !error.is_timeout() && !error.is_connect() => {
                self.suspect();
                let client = self.client(request.at);
                client.execute(encode(&request)?).await
            }
            response => response,
        }
        .map_err(|error| no_response(error, sent_at.elapsed()))?;
        let (status, headers) = (response.status(), response.headers());
        let date = date(headers);
        let rate_limit = rate_limit(status, headers, date);
        let location = text(headers, header::LOCATION)
            .filter(|_| status.is_redirection())
            .map(location);
        let body = match read(response).await {
            // The body of a rate-limited response is not needed.
            Err(_) if rate_limit.is_some() => Vec::new(),
            body => body?,
        };
        Ok(Response {
            status,
            date,
            rate_limit,
            location,
            body,
        })
    }
}

impl Transport for Network {
    fn send<'a>(&'a self, request: Request<'a>) -> Sending<'a> {
        Box::pin(self.send_once(request))
    }
}

/// Builds a client. This takes about 1 ms, or 10 ms with TLS, which needs the certificates of this machine.
pub(crate) fn client(with_tls: bool, timeout: Duration) -> Result<Client, reqwest::Error> {
    let mut client = Client::builder();
    if !with_tls {
        client = client.tls_certs_only([]);
    }
    client
        .user_agent(concat!("bigchat-sync/", env!("CARGO_PKG_VERSION")))
        .timeout(timeout)
        .connect_timeout(timeout)
        .pool_idle_timeout(POOL_IDLE)
        .redirect(redirect::Policy::none())
        .retry(reqwest::retry::never())
        .no_proxy()
        .tcp_nodelay(true)
        .build()
}

fn encode(request: &Request<'_>) -> Result<reqwest::Request, NoResponse> {
    let mut encoded = reqwest::Request::new(request.method.clone(), Url::clone(request.url));
    let headers = encoded.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(
        header::ACCEPT_ENCODING,
        HeaderValue::from_static("identity"),
    );
    if let Some(body) = request.body {
        let json = HeaderValue::from_static("application/json");
        encoded.headers_mut().insert(header::CONTENT_TYPE, json);
        *encoded.body_mut() = Some(Body::from(body.to_owned()));
    }
    if let Some(token) = &request.token {
        let bearer = format!("Bearer {}", token.expose_secret());
        let mut bearer = HeaderValue::try_from(bearer).map_err(NoResponse::impossible)?;
        bearer.set_sensitive(true);
        encoded.headers_mut().insert(header::AUTHORIZATION, bearer);
    }
    Ok(encoded)
}

/// When the response was generated: the `date`, plus the `age` of a cached response.
fn date(headers: &HeaderMap) -> Option<Timestamp> {
    let age = text(headers, header::AGE).and_then(|age| age.trim().parse().ok());
    let age = Duration::from_secs(age.unwrap_or(0).min(MAX_AGE));
    let date = text(headers, header::DATE).and_then(Timestamp::parse_http_date)?;
    Some(date.plus(age))
}

fn rate_limit(
    status: StatusCode,
    headers: &HeaderMap,
    date: Option<Timestamp>,
) -> Option<RateLimit> {
    if !matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
    ) {
        return None;
    }
    let wait = retry_after(text(headers, header::RETRY_AFTER)?, date)?;
    let at = Millis::now();
    Some(RateLimit {
        at,
        until: at.plus(wait),
        status: status.as_u16(),
    })
}

/// The body, inflated and as UTF-8.
async fn read(mut response: reqwest::Response) -> Result<Vec<u8>, NoResponse> {
    let [content_type, content_encoding] =
        [header::CONTENT_TYPE, header::CONTENT_ENCODING].map(|name| {
            text(response.headers(), name)
                .unwrap_or_default()
                .to_owned()
        });
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(lost)? {
        if body.len() + chunk.len() > MAX_BODY {
            return Err(NoResponse::too_large());
        }
        body.extend_from_slice(&chunk);
    }
    let body = inflated(body, &content_encoding, MAX_BODY).map_err(|error| match error.kind() {
        io::ErrorKind::FileTooLarge => NoResponse::too_large(),
        _ => NoResponse::lost(error),
    })?;
    Ok(decoded(body, &content_type).into_bytes())
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn no_response(error: reqwest::Error, waited: Duration) -> NoResponse {
    if error.is_builder() {
        NoResponse::impossible(cause(error))
    } else if error.is_connect() {
        NoResponse::unreachable(cause(error))
    } else {
        let timed_out = error.is_timeout() || waited > PROMPT;
        let kind = ErrorKind::OutcomeUnknown { timed_out };
        NoResponse {
            kind,
            ..lost(error)
        }
    }
}

fn lost(error: reqwest::Error) -> NoResponse {
    if error.is_timeout() {
        NoResponse::timed_out()
    } else {
        NoResponse::lost(cause(error))
    }
}

/// The root cause of an error, without the URL, whose query may contain an e-mail address.
pub(crate) fn cause(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut cause: &dyn std::error::Error = &error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    /// Serves a request, given the number of the connection and of the request on it, from 0.
    type Serve = fn(usize, usize, &mut TcpStream);

    struct Server {
        url: Url,
        connections: Arc<AtomicUsize>,
    }

    impl Server {
        fn start(serve: Serve) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let url = format!("http://{}/", listener.local_addr().expect("an address"));
            let connections = Arc::new(AtomicUsize::new(0));
            let count = Arc::clone(&connections);
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let Ok(mut stream) = stream else { return };
                    let connection = count.fetch_add(1, Ordering::SeqCst);
                    thread::spawn(move || {
                        let reader = stream.try_clone().expect("a stream");
                        let mut reader = BufReader::new(reader);
                        for request in 0.. {
                            let mut line = String::new();
                            while reader.read_line(&mut line).is_ok_and(|read| read > 2) {
                                line.clear();
                            }
                            if line != "\r\n" {
                                return;
                            }
                            serve(connection, request, &mut stream);
                        }
                    });
                }
            });
            Self {
                url: url.parse().expect("a URL"),
                connections,
            }
        }

        fn request(&self) -> Request<'_> {
            Request {
                method: Method::POST,
                url: &self.url,
                at: Instant::now(),
                token: None,
                body: None,
            }
        }
    }

    fn respond(stream: &mut TcpStream, status: &str) {
        let response = format!("HTTP/1.1 {status} \r\ncontent-length: 0\r\n\r\n");
        stream.write_all(response.as_bytes()).ok();
    }

    /// Opens two connections, lets a request fail on one, and expects the next request on a third.
    async fn second_attempt_after(serve: Serve, first: fn(&Result<Response, NoResponse>) -> bool) {
        let server = Server::start(serve);
        let network = Network::new(&server.url, Duration::from_millis(500)).expect("a client");
        let (one, other) = tokio::join!(
            network.send(server.request()),
            network.send(server.request())
        );
        assert!(one.is_ok() && other.is_ok(), "{one:?} {other:?}");
        assert_eq!(server.connections.load(Ordering::SeqCst), 2);
        let broken = network.send(server.request()).await;
        assert!(first(&broken), "{broken:?}");
        let again = network.send(server.request()).await;
        assert!(again.is_ok_and(|again| again.status == 200));
        assert_eq!(server.connections.load(Ordering::SeqCst), 3, "a fresh one");
    }

    /// Slow enough that the other request needs a second connection.
    fn serve_first(request: usize, stream: &mut TcpStream) -> bool {
        if request == 0 {
            thread::sleep(Duration::from_millis(100));
            respond(stream, "200");
        }
        request == 0
    }

    fn is_lost(sent: &Result<Response, NoResponse>) -> bool {
        let unknown = ErrorKind::OutcomeUnknown { timed_out: false };
        sent.as_ref().is_err_and(|error| error.kind == unknown)
    }

    #[tokio::test]
    async fn fresh_connection_after_an_unnoticed_close() {
        let serve: Serve = |_, request, stream| {
            if !serve_first(request, stream) {
                stream.shutdown(std::net::Shutdown::Both).ok();
            }
        };
        second_attempt_after(serve, is_lost).await;
    }

    #[tokio::test]
    async fn fresh_connection_after_a_timeout() {
        let serve: Serve = |_, request, stream| {
            serve_first(request, stream);
        };
        let timed_out = |sent: &Result<Response, NoResponse>| {
            sent.as_ref().is_err_and(|error| error.kind.timed_out())
        };
        second_attempt_after(serve, timed_out).await;
    }

    /// A load balancer that gives up waiting closes the connection, while the API may still carry out the request.
    #[tokio::test]
    async fn late_close_counts_as_a_timeout() {
        let serve: Serve = |_, _, stream| {
            thread::sleep(PROMPT + Duration::from_millis(100));
            stream.shutdown(std::net::Shutdown::Both).ok();
        };
        let server = Server::start(serve);
        let network = Network::new(&server.url, Duration::from_secs(10)).expect("a client");
        let sent = network.send(server.request()).await;
        assert!(sent.is_err_and(|error| error.kind.timed_out()));
    }

    #[tokio::test]
    async fn fresh_connection_after_a_server_error() {
        let serve: Serve = |_, request, stream| {
            if !serve_first(request, stream) {
                respond(stream, "500");
            }
        };
        let failed = |sent: &Result<Response, NoResponse>| {
            sent.as_ref().is_ok_and(|response| response.status == 500)
        };
        second_attempt_after(serve, failed).await;
    }

    #[tokio::test]
    async fn fresh_connection_after_a_truncated_response() {
        let serve: Serve = |_, request, stream| {
            if !serve_first(request, stream) {
                let cut = b"HTTP/1.1 200 \r\ncontent-length: 9\r\n\r\n{";
                stream.write_all(cut).ok();
                stream.shutdown(std::net::Shutdown::Both).ok();
            }
        };
        second_attempt_after(serve, is_lost).await;
    }

    #[tokio::test]
    async fn connections_are_renewed_every_minute() {
        let server = Server::start(|_, _, stream| respond(stream, "200"));
        let timeout = Duration::from_secs(10);
        let network = Network::new(&server.url, timeout).expect("a client");
        let start = Instant::now();
        for (after, connections) in [(0, 1), (1, 1), (59, 1), (61, 2), (62, 2), (122, 3)] {
            let request = Request {
                at: start + Duration::from_secs(after),
                ..server.request()
            };
            network.send(request).await.expect("a response");
            let opened = server.connections.load(Ordering::SeqCst);
            assert_eq!(opened, connections, "after {after} s");
        }
    }
}
