//! Connections, so many at a time and each bounded: a client that says nothing, or says it slowly, or reads nothing, costs
//! a few kilobytes for a while, and keeps nobody else out.
//!
//! When all places are taken, the connection that has been open for longest gives way, of those on which no request is being
//! answered that has arrived whole: who says what he wants is answered, however many there are who do not.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// How many connections there may be at once: a few browsers, a monitor.
pub(super) const MAX_CONNECTIONS: usize = 64;

/// How long the head of a request may take, and so how long a connection may be idle.
const HEAD: Duration = Duration::from_secs(15);

/// How much a request's head may have.
const MAX_HEAD: usize = 16 << 10;

/// How long to wait when the operating system has no more connections to give.
const EXHAUSTED: Duration = Duration::from_secs(1);

/// A connection, as seen from those who look for a place.
struct Connection {
    task: AbortHandle,
    place: Place,
}

/// A connection, as seen from the requests on it.
#[derive(Debug, Clone, Default)]
pub(super) struct Place {
    /// How many of them have arrived and are not answered.
    answering: Arc<AtomicUsize>,
}

impl Place {
    /// Keeps the connection from giving way until that is dropped.
    pub(super) fn keep(&self) -> Kept {
        self.answering.fetch_add(1, Ordering::Relaxed);
        Kept(self.clone())
    }

    fn may_give_way(&self) -> bool {
        self.answering.load(Ordering::Relaxed) == 0
    }
}

/// See [`Place::keep`].
pub(super) struct Kept(Place);

impl Drop for Kept {
    fn drop(&mut self) {
        self.0.answering.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Accepts connections and answers what is asked on them, until they are to close: then it cuts them, and has let go of
/// all they used when it returns.
pub(super) async fn accept(listener: TcpListener, router: Router, closing: CancellationToken) {
    let mut tasks = JoinSet::new();
    closing
        .run_until_cancelled(accept_into(&mut tasks, listener, router))
        .await;
    tasks.shutdown().await;
}

async fn accept_into(tasks: &mut JoinSet<()>, listener: TcpListener, router: Router) {
    let mut connections = VecDeque::new();
    loop {
        while tasks.try_join_next().is_some() {}
        connections.retain(|connection: &Connection| !connection.task.is_finished());
        if connections.len() >= MAX_CONNECTIONS {
            match connections
                .iter()
                .position(|connection| connection.place.may_give_way())
            {
                Some(idle) => {
                    if let Some(connection) = connections.remove(idle) {
                        connection.task.abort();
                    }
                }
                None => {
                    tasks.join_next().await;
                    continue;
                }
            }
        }
        match listener.accept().await {
            Ok((stream, peer)) => {
                let place = Place::default();
                let task = tasks.spawn(serve(stream, peer, router.clone(), place.clone()));
                connections.push_back(Connection { task, place });
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

/// The two ends of a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends {
    /// The client's.
    pub(super) peer: SocketAddr,
    /// This side's; `None`: the operating system does not know it any more.
    pub(super) local: Option<SocketAddr>,
}

async fn serve(stream: TcpStream, peer: SocketAddr, router: Router, place: Place) {
    // Where it cannot be set answers are merely slower.
    stream.set_nodelay(true).ok();
    let local = stream.local_addr().ok();
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(ConnectInfo(peer));
        request.extensions_mut().insert(Ends { peer, local });
        request.extensions_mut().insert(place.clone());
        router.call(request)
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
