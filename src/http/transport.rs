//! What carries requests and brings responses.

use std::fmt;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use reqwest::header::{self, HeaderMap, HeaderValue};
use reqwest::{Body, Client, Method, StatusCode, redirect};
use secrecy::{ExposeSecret, SecretString};
use url::Url;

use super::error::ErrorKind;
use super::exchange::location;
use super::rate_limit::retry_after;
use crate::domain::text::{decoded, inflated};
use crate::domain::time::{Millis, Timestamp};

/// Larger responses are not read to their end. A page of 100,000 events fits in.
const MAX_BODY: usize = 32 << 20;

/// A cache that says it has had an answer for longer than a year (in seconds) says nothing.
const MAX_AGE: u64 = 366 * 86_400;

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
    /// Now.
    pub at: Instant,
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
    /// Where a redirect leads, without secrets.
    pub location: Option<String>,
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

/// How long connections are used: an address may lead elsewhere by now, though what was there still answers.
const RENEW_EVERY: Duration = Duration::from_secs(60);

/// HTTP over the network: no redirects, no proxies, no answers from a cache, and no retry but of a GET whose connection
/// broke. What a server compresses unasked is inflated, and text is decoded as declared.
///
/// After a response was lost, or the server failed, the connections that are open are not used again: they lead where the
/// last one led, and a server that closes one without a word does so to the others.
#[derive(Debug)]
pub struct Network {
    timeout: Duration,
    with_tls: bool,
    pool: Mutex<Pool>,
}

/// A client holds its own connections. Dropped, it lets requests in flight end.
#[derive(Debug)]
struct Pool {
    client: Client,
    opened: Instant,
    is_suspect: bool,
}

impl Network {
    /// To the host of `base`. Requests take at most `timeout`.
    ///
    /// # Errors
    ///
    /// If TLS is needed and the certificates of this machine cannot be read.
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

    /// The client to use now.
    fn client(&self, now: Instant) -> Client {
        let mut pool = self.pool();
        let is_old = now.saturating_duration_since(pool.opened) >= RENEW_EVERY;
        // Without the certificates of this machine the old one has to do.
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
        self.pool().is_suspect = true;
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
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

    async fn exchange(&self, mut request: Request<'_>) -> Result<Response, NoResponse> {
        let client = self.client(request.at);
        let is_read = request.method.is_safe();
        let body = request.body.take();
        let mut response = match client.execute(encode(&request, body)?).await {
            // After a 500 both servers close the connection without saying so, and a pooled one breaks. A read is safe to
            // repeat; of all else the outcome is unknown, and is for the caller to find out.
            Err(error) if is_read && !error.is_timeout() && !error.is_connect() => {
                self.suspect();
                let client = self.client(request.at);
                client.execute(encode(&request, None)?).await
            }
            response => response,
        }
        .map_err(no_response)?;
        let status = response.status();
        // A cache says for how long it has had the answer.
        let age = text(response.headers(), header::AGE).and_then(|age| age.trim().parse().ok());
        let age = Duration::from_secs(age.unwrap_or(0).min(MAX_AGE));
        let date = text(response.headers(), header::DATE)
            .and_then(Timestamp::parse_http_date)
            .map(|date| date.plus(age));
        let [content_type, content_encoding] = [header::CONTENT_TYPE, header::CONTENT_ENCODING]
            .map(|name| {
                text(response.headers(), name)
                    .unwrap_or_default()
                    .to_owned()
            });
        let asks_to_wait = matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
        );
        let retry_at = text(response.headers(), header::RETRY_AFTER)
            .filter(|_| asks_to_wait)
            .and_then(|value| retry_after(value, date))
            .map(|wait| Millis::now().plus(wait));
        let location = text(response.headers(), header::LOCATION)
            .filter(|_| status.is_redirection())
            .map(location);
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
        let body = inflated(body, &content_encoding, MAX_BODY).map_err(NoResponse::lost)?;
        Ok(Response {
            status,
            date,
            retry_at,
            location,
            body: decoded(body, &content_type).into_bytes(),
        })
    }
}

impl Transport for Network {
    fn send<'a>(&'a self, request: Request<'a>) -> Sending<'a> {
        Box::pin(self.send_once(request))
    }
}

/// A client takes 1 ms; with TLS, for which it reads the certificates of this machine, some 10 ms.
fn client(with_tls: bool, timeout: Duration) -> Result<Client, reqwest::Error> {
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

fn encode(request: &Request<'_>, body: Option<Vec<u8>>) -> Result<reqwest::Request, NoResponse> {
    let mut encoded = reqwest::Request::new(request.method.clone(), Url::clone(request.url));
    let headers = encoded.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(
        header::ACCEPT_ENCODING,
        HeaderValue::from_static("identity"),
    );
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

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    /// What a server does with a request: the number of the connection, from 0, and of the request on it.
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

    fn answer(stream: &mut TcpStream, status: &str) {
        let answer = format!("HTTP/1.1 {status} \r\ncontent-length: 0\r\n\r\n");
        stream.write_all(answer.as_bytes()).ok();
    }

    /// Both connections are open when the first breaks.
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

    /// Slow enough that the other request needs a connection of its own.
    fn answer_first(request: usize, stream: &mut TcpStream) -> bool {
        if request == 0 {
            thread::sleep(Duration::from_millis(100));
            answer(stream, "200");
        }
        request == 0
    }

    fn is_lost(sent: &Result<Response, NoResponse>) -> bool {
        let unknown = ErrorKind::OutcomeUnknown { timed_out: false };
        sent.as_ref().is_err_and(|error| error.kind == unknown)
    }

    #[tokio::test]
    async fn a_fresh_connection_after_one_was_closed_without_a_word() {
        let serve: Serve = |_, request, stream| {
            if !answer_first(request, stream) {
                stream.shutdown(std::net::Shutdown::Both).ok();
            }
        };
        second_attempt_after(serve, is_lost).await;
    }

    #[tokio::test]
    async fn a_fresh_connection_after_a_time_out() {
        let serve: Serve = |_, request, stream| {
            answer_first(request, stream);
        };
        let timed_out = |sent: &Result<Response, NoResponse>| {
            sent.as_ref().is_err_and(|error| error.kind.timed_out())
        };
        second_attempt_after(serve, timed_out).await;
    }

    #[tokio::test]
    async fn a_fresh_connection_after_the_server_failed() {
        let serve: Serve = |_, request, stream| {
            if !answer_first(request, stream) {
                answer(stream, "500");
            }
        };
        let failed = |sent: &Result<Response, NoResponse>| {
            sent.as_ref().is_ok_and(|response| response.status == 500)
        };
        second_attempt_after(serve, failed).await;
    }

    #[tokio::test]
    async fn a_fresh_connection_after_a_response_was_cut_off() {
        let serve: Serve = |_, request, stream| {
            if !answer_first(request, stream) {
                let cut = b"HTTP/1.1 200 \r\ncontent-length: 9\r\n\r\n{";
                stream.write_all(cut).ok();
                stream.shutdown(std::net::Shutdown::Both).ok();
            }
        };
        second_attempt_after(serve, is_lost).await;
    }

    #[tokio::test]
    async fn connections_are_reused_for_a_while_and_then_renewed() {
        let server = Server::start(|_, _, stream| answer(stream, "200"));
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
