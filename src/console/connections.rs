//! Accepts a limited number of connections, each bounded: a client that sends nothing, sends slowly or reads nothing
//! costs a few kilobytes for a while.
//!
//! At the limit, the oldest connection without a complete request is closed, so that slow clients cannot starve active
//! ones. Every other connection is closed after its response, so that active clients cannot starve new ones.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// The maximum number of connections: enough for a few browsers and a monitor.
pub(super) const MAX_CONNECTIONS: usize = 64;

/// The time limit for the head of a request, and so for an idle connection.
const HEAD: Duration = Duration::from_secs(15);

/// The maximum size of a request's head.
const MAX_HEAD: usize = 16 << 10;

/// A younger connection is not closed at the limit: its first request may be on the way.
const YOUNG: Duration = Duration::from_secs(1);

/// How often to check at the limit whether a connection can be closed.
const CHECK_EVERY: Duration = Duration::from_millis(100);

/// How long to wait when the operating system cannot accept another connection.
const EXHAUSTED: Duration = Duration::from_secs(1);

/// A connection, as seen by the accept loop.
struct Connection {
    task: AbortHandle,
    place: Place,
    since: Instant,
}

impl Connection {
    fn may_give_way(&self) -> bool {
        self.since.elapsed() >= YOUNG && self.place.is_idle()
    }
}

/// A connection, as seen by its requests.
#[derive(Debug, Clone, Default)]
pub(super) struct Place {
    /// How many complete requests are not answered yet.
    answering: Arc<AtomicUsize>,
}

impl Place {
    /// Keeps the connection open at the limit, until the result is dropped.
    pub(super) fn hold_open(&self) -> HeldOpen {
        self.answering.fetch_add(1, Ordering::Relaxed);
        HeldOpen(self.clone())
    }

    fn is_idle(&self) -> bool {
        self.answering.load(Ordering::Relaxed) == 0
    }
}

/// See [`Place::hold_open`].
pub(super) struct HeldOpen(Place);

impl Drop for HeldOpen {
    fn drop(&mut self) {
        self.0.answering.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Accepts connections and answers their requests until `closing` is cancelled. Then it closes all of them, and returns
/// when their resources are released.
pub(super) async fn accept(listener: TcpListener, router: Router, closing: CancellationToken) {
    let mut tasks = JoinSet::new();
    closing
        .run_until_cancelled(accept_into(&mut tasks, listener, router))
        .await;
    tasks.shutdown().await;
}

async fn accept_into(tasks: &mut JoinSet<()>, listener: TcpListener, router: Router) {
    let mut connections = VecDeque::new();
    let at_limit = Arc::<AtomicBool>::default();
    loop {
        while tasks.try_join_next().is_some() {}
        connections.retain(|connection: &Connection| !connection.task.is_finished());
        let is_full = connections.len() >= MAX_CONNECTIONS;
        at_limit.store(is_full, Ordering::Relaxed);
        if is_full {
            match connections.iter().position(Connection::may_give_way) {
                Some(idle) => {
                    if let Some(connection) = connections.remove(idle) {
                        connection.task.abort();
                    }
                }
                None => {
                    timeout(CHECK_EVERY, tasks.join_next()).await.ok();
                    continue;
                }
            }
        }
        match listener.accept().await {
            Ok((stream, peer)) => {
                let place = Place::default();
                let (router, at_limit) = (router.clone(), Arc::clone(&at_limit));
                let task = tasks.spawn(serve(stream, peer, router, place.clone(), at_limit));
                let since = Instant::now();
                connections.push_back(Connection { task, place, since });
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                tracing::debug!(reason = %error, "cannot accept a connection");
                sleep(EXHAUSTED).await;
            }
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
    )
}

/// Both addresses of a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends {
    /// The client's address.
    pub(super) peer: SocketAddr,
    /// The local address; `None`: the operating system no longer knows it.
    pub(super) local: Option<SocketAddr>,
}

async fn serve(
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    place: Place,
    at_limit: Arc<AtomicBool>,
) {
    // If this fails, responses are only slower.
    stream.set_nodelay(true).ok();
    let local = stream.local_addr().ok();
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(ConnectInfo(peer));
        request.extensions_mut().insert(Ends { peer, local });
        request.extensions_mut().insert(place.clone());
        let (answer, at_limit) = (router.call(request), Arc::clone(&at_limit));
        async move {
            let mut answer = answer.await?;
            if at_limit.load(Ordering::Relaxed) {
                let close = HeaderValue::from_static("close");
                answer.headers_mut().insert(CONNECTION, close);
            }
            Ok::<_, Infallible>(answer)
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(reason = %error, %peer, "a connection failed");
    }
}
