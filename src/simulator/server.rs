//! A service on the network: only as much of HTTP/1.1 as the clients here use, so that serving costs little.
//!
//! It closes a connection that has been idle for the keep-alive time. After an unhandled error, it closes the
//! connection right after the reply.

use std::fmt::Write;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::Mutex;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::exchange::{Api, Reply, Request};
use super::service::{Service, lock};

/// The real services close connections that have been idle for this time.
pub const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// How many bytes are read at a time.
const READ: usize = 16 << 10;

/// A thread for the services, so that a caller that blocks does not stop them.
pub(super) struct Thread {
    handle: Handle,
    _stops: DropGuard,
}

impl Thread {
    pub(super) fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (handle, stopping) = (runtime.handle().clone(), CancellationToken::new());
        let stopped = stopping.clone();
        std::thread::Builder::new()
            .name("simulator".to_owned())
            .spawn(move || runtime.block_on(stopped.cancelled()))?;
        Ok(Self {
            handle,
            _stops: stopping.drop_guard(),
        })
    }
}

/// A [`Service`] that listens until it is dropped.
pub struct Server<A> {
    service: Service<A>,
    /// The address to listen on.
    address: Mutex<SocketAddr>,
    keep_alive: Duration,
    running: Mutex<Option<(CancellationToken, JoinHandle<()>)>>,
    thread: std::sync::Arc<Thread>,
}

impl<A> Deref for Server<A> {
    type Target = Service<A>;

    fn deref(&self) -> &Service<A> {
        &self.service
    }
}

impl<A> Drop for Server<A> {
    fn drop(&mut self) {
        if let Some((stop, _)) = lock(&self.running).take() {
            stop.cancel();
        }
    }
}

impl<A: Api> Server<A> {
    /// Starts a service. Port 0 takes a free port.
    pub(super) async fn start(
        thread: &std::sync::Arc<Thread>,
        address: SocketAddr,
        service: Service<A>,
        keep_alive: Duration,
    ) -> io::Result<Self> {
        let server = Self {
            service,
            address: Mutex::new(address),
            keep_alive,
            running: Mutex::default(),
            thread: std::sync::Arc::clone(thread),
        };
        server.listen().await?;
        Ok(server)
    }

    /// The base URL.
    pub fn url(&self) -> String {
        format!("http://{}", lock(&self.address))
    }

    /// Cuts all connections, and refuses new ones until [`up`](Self::up) is called.
    pub async fn down(&self) {
        let running = lock(&self.running).take();
        if let Some((stop, listening)) = running {
            stop.cancel();
            // The task neither panics nor is aborted.
            listening.await.ok();
        }
    }

    /// Listens again on the same address.
    pub async fn up(&self) -> io::Result<()> {
        if lock(&self.running).is_none() {
            self.listen().await?;
        }
        Ok(())
    }

    /// Continues on another address.
    pub async fn move_to(&self, address: SocketAddr) -> io::Result<()> {
        self.down().await;
        *lock(&self.address) = address;
        self.up().await
    }

    async fn listen(&self) -> io::Result<()> {
        let (stop, (bound, address)) = (CancellationToken::new(), oneshot::channel());
        let (service, keep_alive, at) =
            (self.service.clone(), self.keep_alive, *lock(&self.address));
        let stopped = stop.clone();
        let listening = self.thread.handle.spawn(async move {
            let listener = TcpListener::bind(at).await;
            let address = listener
                .as_ref()
                .map_err(|error| io::Error::new(error.kind(), error.to_string()));
            let address = address.and_then(TcpListener::local_addr);
            if bound.send(address).is_ok()
                && let Ok(listener) = listener
            {
                let mut connections = JoinSet::new();
                stopped
                    .run_until_cancelled(accept(listener, service, keep_alive, &mut connections))
                    .await;
                connections.shutdown().await;
            }
        });
        *lock(&self.address) = address.await.map_err(io::Error::other)??;
        *lock(&self.running) = Some((stop, listening));
        Ok(())
    }
}

async fn accept<A: Api>(
    listener: TcpListener,
    service: Service<A>,
    keep_alive: Duration,
    connections: &mut JoinSet<io::Result<()>>,
) {
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(connections.spawn(serve(stream, service.clone(), keep_alive))),
                // For example, there is no file descriptor left until a connection ends.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Answers one request after the other, until either side closes the connection.
async fn serve<A: Api>(
    mut stream: TcpStream,
    service: Service<A>,
    keep_alive: Duration,
) -> io::Result<()> {
    // Otherwise small replies wait for acknowledgements.
    stream.set_nodelay(true)?;
    let _connected = service.connected_gauge().enter();
    let (mut read, mut part, mut written) = (Vec::new(), vec![0; READ], Vec::new());
    loop {
        let (request, length, last) = loop {
            if let Some(parsed) = parse(&read) {
                break parsed;
            }
            let more = timeout(keep_alive, read_more(&mut stream, &mut part, &mut read));
            if !matches!(more.await, Ok(Ok(1..))) {
                return Ok(());
            }
        };
        read.drain(..length);
        let gone = async {
            while matches!(read_more(&mut stream, &mut part, &mut read).await, Ok(1..)) {}
        };
        let reply = tokio::select! {
            biased;
            reply = service.answer(request) => reply,
            () = gone => None,
        };
        let Some(reply) = reply else { return Ok(()) };
        write(&reply, &mut written);
        let mut rest = &written[..];
        while !rest.is_empty() {
            let count = poll_fn(|cx| Pin::new(&mut stream).poll_write(cx, rest)).await?;
            rest = &rest[count..];
        }
        if reply.closes || last {
            return Ok(());
        }
    }
}

/// Reads available bytes; 0 at the end.
async fn read_more(
    stream: &mut TcpStream,
    part: &mut [u8],
    read: &mut Vec<u8>,
) -> io::Result<usize> {
    let mut part = ReadBuf::new(part);
    poll_fn(|cx| Pin::new(&mut *stream).poll_read(cx, &mut part)).await?;
    read.extend_from_slice(part.filled());
    Ok(part.filled().len())
}

/// The first complete request, its length, and whether it is the last of its connection.
fn parse(bytes: &[u8]) -> Option<(Request, usize, bool)> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let head = String::from_utf8_lossy(&bytes[..end]);
    let mut lines = head.lines();
    let mut line = lines.next().unwrap_or_default().split(' ');
    let (method, target) = (
        line.next().unwrap_or_default(),
        line.next().unwrap_or_default(),
    );
    let mut request = Request::new(method, target, Vec::new());
    let (mut length, mut last) = (0, false);
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            length = value.parse().unwrap_or_default();
        } else if name.eq_ignore_ascii_case("host") {
            value.clone_into(&mut request.host);
        } else if name.eq_ignore_ascii_case("connection") {
            last = value.eq_ignore_ascii_case("close");
        } else if name.eq_ignore_ascii_case("authorization") {
            request.authorization = Some(value.to_owned());
        }
    }
    request.body = bytes.get(end..end + length)?.to_vec();
    Some((request, end + length, last))
}

fn write(reply: &Reply, bytes: &mut Vec<u8>) {
    bytes.clear();
    let reason = hyper::StatusCode::from_u16(reply.status).ok();
    let reason = reason
        .and_then(|status| status.canonical_reason())
        .unwrap_or_default();
    let mut head = format!("HTTP/1.1 {} {reason}\r\n", reply.status);
    let mut header = |name: &str, value: &str| {
        // Writing to a string cannot fail.
        write!(head, "{name}: {value}\r\n").ok();
    };
    for (name, value) in &reply.headers {
        header(name, value);
    }
    // A reply with status 204 must not have a body or its length.
    if reply.status != 204 {
        header(
            "content-length",
            &(reply.body.len() + reply.missing).to_string(),
        );
    }
    head.push_str("\r\n");
    bytes.extend_from_slice(head.as_bytes());
    bytes.extend_from_slice(&reply.body);
}
