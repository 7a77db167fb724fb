//! What both simulated services share: a server whose connections can be cut, counts of what came in, a clock, and answers
//! in the shape of the real ones.
//!
//! It closes a connection that was idle for the keep-alive time, and, like the real services, the connection of an
//! unhandled error, right after the 500 and without having announced it. What is answered is left to the services.

use std::{
    collections::BTreeMap,
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Extension, Router,
    extract::{
        ConnectInfo, Request, State,
        connect_info::{Connected, IntoMakeServiceWithConnectInfo},
    },
    http::{Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    serve::{IncomingStream, Listener},
};
use chrono::{DateTime, NaiveDateTime, TimeDelta, Utc};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::{Instant, Sleep},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use uuid::Uuid;

/// The real services run under a server that closes idle connections after this time.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// A panic elsewhere in a test must not hide behind a poisoned lock.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A service's own clock: the machine's, some seconds ahead or behind.
#[derive(Clone, Debug, Default)]
pub struct Clock(Arc<AtomicI64>);

impl Clock {
    /// A clock this many seconds ahead of the machine's.
    pub fn ahead(seconds: i64) -> Self {
        let clock = Self::default();
        clock.set_offset(seconds);
        clock
    }

    /// From now on so many seconds ahead of the machine's.
    pub fn set_offset(&self, seconds: i64) {
        self.0.store(seconds, Relaxed);
    }

    /// The time by this clock.
    pub fn now(&self) -> DateTime<Utc> {
        Utc::now() + TimeDelta::seconds(self.0.load(Relaxed))
    }
}

/// How many are inside now, and were at most.
#[derive(Debug, Default)]
struct Gauge {
    now: AtomicUsize,
    max: AtomicUsize,
}

/// Counts as inside until it is dropped.
pub(super) struct Inside(Arc<Gauge>, usize);

impl Inside {
    /// How many were inside before.
    pub(super) fn before(&self) -> usize {
        self.1
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Relaxed);
    }
}

fn enter(gauge: &Arc<Gauge>) -> Inside {
    let before = gauge.now.fetch_add(1, Relaxed);
    gauge.max.fetch_max(before + 1, Relaxed);
    Inside(Arc::clone(gauge), before)
}

/// What a service has been asked.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    requests: Arc<Mutex<BTreeMap<String, u64>>>,
    connections: Arc<AtomicU64>,
    connected: Arc<Gauge>,
    open: Arc<Gauge>,
    carried_out: Arc<Gauge>,
}

impl Traffic {
    /// Requests by route, such as `POST /chats/{id}/messages`, whatever became of them.
    pub fn requests(&self) -> BTreeMap<String, u64> {
        lock(&self.requests).clone()
    }

    /// Requests of one route.
    pub fn count(&self, route: &str) -> u64 {
        lock(&self.requests).get(route).copied().unwrap_or(0)
    }

    /// All requests.
    pub fn total(&self) -> u64 {
        lock(&self.requests).values().sum()
    }

    /// Connections accepted.
    pub fn connections(&self) -> u64 {
        self.connections.load(Relaxed)
    }

    /// Connections that are open now.
    pub fn connected(&self) -> usize {
        self.connected.now.load(Relaxed)
    }

    /// Requests that wait for their answer now, held and hanging ones too.
    pub fn open(&self) -> usize {
        self.open.now.load(Relaxed)
    }

    /// The most that were ever carried out at once, without those held or hanging.
    pub fn max_in_flight(&self) -> usize {
        self.carried_out.max.load(Relaxed)
    }

    /// Starts the counts anew.
    pub fn reset(&self) {
        lock(&self.requests).clear();
        self.connections.store(0, Relaxed);
        self.open.max.store(self.open(), Relaxed);
        self.carried_out
            .max
            .store(self.carried_out.now.load(Relaxed), Relaxed);
    }

    pub(super) fn carry_out(&self) -> Inside {
        enter(&self.carried_out)
    }
}

/// The route of a request: its method and its path, with `{id}` for every number and UUID.
pub(super) fn route(method: &Method, path: &str) -> String {
    let is_id = |part: &str| part.parse::<i64>().is_ok() || Uuid::try_parse(part).is_ok();
    let parts = path
        .split('/')
        .map(|part| if is_id(part) { "{id}" } else { part });
    format!("{method} {}", parts.collect::<Vec<_>>().join("/"))
}

/// A service, on the net until it goes down. Dropping it stops it and cuts its connections.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    router: Router,
    traffic: Traffic,
    keep_alive: Duration,
    running: Mutex<Option<Running>>,
}

struct Running {
    stop: CancellationToken,
    task: JoinHandle<io::Result<()>>,
}

impl Server {
    pub(super) async fn start(
        address: SocketAddr,
        router: Router,
        traffic: &Traffic,
        keep_alive: Duration,
    ) -> io::Result<Self> {
        let mut server = Self {
            address,
            router: router.layer(middleware::from_fn_with_state(traffic.clone(), observe)),
            traffic: traffic.clone(),
            keep_alive,
            running: Mutex::default(),
        };
        server.address = server.up().await?;
        Ok(server)
    }

    /// Listens, again, where it did, unless it does. Returns where that is.
    pub(super) async fn up(&self) -> io::Result<SocketAddr> {
        if lock(&self.running).is_some() {
            return Ok(self.address);
        }
        let tcp = TcpListener::bind(self.address).await?;
        let (address, stop) = (tcp.local_addr()?, CancellationToken::new());
        let listener = Sockets {
            tcp,
            traffic: self.traffic.clone(),
            stop: stop.clone(),
            keep_alive: self.keep_alive,
        };
        let service: IntoMakeServiceWithConnectInfo<_, Connection> =
            self.router.clone().into_make_service_with_connect_info();
        let serving =
            axum::serve(listener, service).with_graceful_shutdown(stop.clone().cancelled_owned());
        let task = tokio::spawn(serving.into_future());
        *lock(&self.running) = Some(Running { stop, task });
        Ok(address)
    }

    /// Cuts all connections and refuses new ones, until it is up again. Waits until it does.
    pub(super) async fn down(&self) -> io::Result<()> {
        let running = lock(&self.running).take();
        let Some(mut running) = running else {
            return Ok(());
        };
        running.stop.cancel();
        (&mut running.task).await.map_err(io::Error::other)?
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn observe(
    State(traffic): State<Traffic>,
    ConnectInfo(connection): ConnectInfo<Connection>,
    request: Request,
    next: Next,
) -> Response {
    let _busy = enter(&connection.busy);
    let _open = enter(&traffic.open);
    *lock(&traffic.requests)
        .entry(route(request.method(), request.uri().path()))
        .or_default() += 1;
    let response = next.run(request).await;
    if response.extensions().get::<Unhandled>().is_some() {
        connection.last.store(true, Relaxed);
    }
    response
}

struct Sockets {
    tcp: TcpListener,
    traffic: Traffic,
    stop: CancellationToken,
    keep_alive: Duration,
}

impl Listener for Sockets {
    type Io = Socket;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Socket, SocketAddr) {
        let (tcp, peer) = Listener::accept(&mut self.tcp).await;
        self.traffic.connections.fetch_add(1, Relaxed);
        // Without it small answers wait for acknowledgements; where it cannot be set they are merely slower.
        tcp.set_nodelay(true).ok();
        let cut = self.stop.child_token();
        let socket = Socket {
            tcp,
            cut: Box::pin(cut.clone().cancelled_owned()),
            idle: Box::pin(tokio::time::sleep(self.keep_alive)),
            connection: Connection {
                cut,
                busy: Arc::default(),
                last: Arc::default(),
            },
            answered_last: false,
            keep_alive: self.keep_alive,
            _connected: enter(&self.traffic.connected),
        };
        (socket, peer)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }
}

/// A connection as a request sees it.
#[derive(Clone)]
pub(super) struct Connection {
    cut: CancellationToken,
    busy: Arc<Gauge>,
    last: Arc<AtomicBool>,
}

impl Connection {
    /// Closes it at once: nothing more is sent.
    pub(super) fn cut(&self) {
        self.cut.cancel();
    }
}

impl Connected<IncomingStream<'_, Sockets>> for Connection {
    fn connect_info(stream: IncomingStream<'_, Sockets>) -> Self {
        stream.io().connection.clone()
    }
}

struct Socket {
    tcp: TcpStream,
    connection: Connection,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    idle: Pin<Box<Sleep>>,
    answered_last: bool,
    keep_alive: Duration,
    _connected: Inside,
}

impl Socket {
    fn is_in_use(&mut self) {
        let until = Instant::now() + self.keep_alive;
        self.idle.as_mut().reset(until);
    }

    fn sent(&mut self, sent: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if sent.is_ready() {
            self.is_in_use();
            self.answered_last |= self.connection.last.load(Relaxed);
            if self.answered_last {
                // Has it read again, and close, at once.
                self.idle.as_mut().reset(Instant::now());
            }
        }
        sent
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.cut.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if self.answered_last {
            return Poll::Ready(Ok(()));
        }
        let read = Pin::new(&mut self.tcp).poll_read(cx, buffer);
        if read.is_ready() {
            self.is_in_use();
            return read;
        }
        // Asked for during a request too: once it is answered, nobody reads again before there is something to read.
        while self.idle.as_mut().poll(cx).is_ready() {
            if self.connection.busy.now.load(Relaxed) == 0 {
                return Poll::Ready(Ok(()));
            }
            self.is_in_use();
        }
        read
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.connection.cut.is_cancelled() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let sent = Pin::new(&mut self.tcp).poll_write(cx, bytes);
        self.sent(sent)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

/// Marks the answer of an unhandled error.
#[derive(Clone)]
struct Unhandled;

/// An answer with a JSON body.
pub(super) fn reply(status: StatusCode, body: &impl Serialize) -> Response {
    match serde_json::to_vec(body) {
        Ok(body) => (status, [(header::CONTENT_TYPE, "application/json")], body).into_response(),
        Err(_) => Refused::unhandled().into_response(),
    }
}

/// A refusal, as the real services put it: `{"detail": …}`, or without it an error of the service itself.
pub(super) struct Refused(StatusCode, Option<Value>);

impl Refused {
    pub(super) fn new(status: StatusCode, detail: impl Into<Value>) -> Self {
        Self(status, Some(detail.into()))
    }

    pub(super) fn not_found(detail: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, detail)
    }

    /// A 422 with all that is wrong.
    pub(super) fn invalid(errors: Vec<Value>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, errors)
    }

    pub(super) fn unhandled() -> Self {
        Self(StatusCode::INTERNAL_SERVER_ERROR, None)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        match self {
            Self(status, Some(detail)) => reply(status, &json!({ "detail": detail })),
            Self(status, None) => {
                (status, Extension(Unhandled), "Internal Server Error").into_response()
            }
        }
    }
}

/// One entry of a 422's `detail`.
pub(super) fn invalid(kind: &str, place: [&str; 2], message: &str, input: &Value) -> Value {
    json!({ "type": kind, "loc": place, "msg": message, "input": input })
}

/// A time as the real services read it: the time as written, and its offset from UTC in seconds, if one was given.
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
