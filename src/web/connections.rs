//! Connections, so many at a time and each bounded: a client that says nothing, or says it slowly, or reads nothing, costs
//! a few kilobytes for a while, and keeps nobody else out.
//!
//! When all places are taken, the connection that has been open for longest without a request being answered on it gives
//! way: that is never one whose request has arrived whole.

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
    /// How many requests on it have arrived and are not answered.
    answering: Arc<AtomicUsize>,
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
                .position(|connection| connection.answering.load(Ordering::Relaxed) == 0)
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
                let answering = Arc::new(AtomicUsize::new(0));
                let serving = serve(stream, peer, router.clone(), Arc::clone(&answering));
                let task = tasks.spawn(serving);
                connections.push_back(Connection { task, answering });
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                tracing::debug!(%error, "no connection can be accepted");
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

async fn serve(stream: TcpStream, peer: SocketAddr, router: Router, answering: Arc<AtomicUsize>) {
    // Where it cannot be set answers are merely slower.
    stream.set_nodelay(true).ok();
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(ConnectInfo(peer));
        let answer = router.call(request);
        let answering = Answering::one_more(&answering);
        async move {
            let answer = answer.await;
            drop(answering);
            answer
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, %peer, "a connection ended before its time");
    }
}

/// A request that is being answered, until it is dropped.
struct Answering(Arc<AtomicUsize>);

impl Answering {
    fn one_more(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
