//! Both services, with their quirks and faults, and the comparison of what BigChat reported with what OurAPI has in the end:
//! for the demo, the tests, the exhaustive check and the benchmarks.
//!
//! [`BigChat`] and [`OurApi`] are plain values that answer a request without waiting for anything ([`Api`]); a copy answers
//! alike. [`Service`] adds the [faults](fault) that strike a request and records what was asked; [`Server`] puts it on the
//! net. They are true to what the real services were seen to do, and can do better, or worse, on request. The comparison
//! ([`compare`]) works out on its own what should be there. Nothing in here uses any of the daemon's code, so that a mistake
//! is not made twice; running a daemon is left to the users.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

pub mod bigchat;
mod chance;
pub mod chaos;
pub mod compare;
pub mod event;
mod exchange;
pub mod fault;
pub mod our_api;
mod server;
mod service;
#[cfg(test)]
mod tests;
mod watch;

pub use bigchat::BigChat;
pub use exchange::{Api, Reply, Request, id, shortened};
pub use our_api::OurApi;
pub use server::{KEEP_ALIVE, Server};
pub use service::{Asked, Service};
pub use watch::{Answered, Happening, Watch};

use server::Thread;

/// A free port of the loopback interface.
pub const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Both services, listening until this is dropped.
pub struct Simulator {
    pub bigchat: Server<BigChat>,
    pub our_api: Server<OurApi>,
}

impl Simulator {
    /// Starts both on free ports.
    pub async fn start(bigchat: BigChat, our_api: OurApi) -> io::Result<Self> {
        let [bigchat_at, our_api_at] = [ANY_PORT; 2];
        let mut starting = Starting::new()?;
        Ok(Self {
            bigchat: starting.listen(bigchat_at, bigchat).await?,
            our_api: starting.listen(our_api_at, our_api).await?,
        })
    }

    /// Compares what BigChat reported so far with what OurAPI has now, by the usual rules.
    pub fn compare(&self) -> compare::Report {
        self.compare_by(&compare::Rules::default())
    }

    /// The same by other rules.
    pub fn compare_by(&self, rules: &compare::Rules) -> compare::Report {
        let expected = compare::expected(&self.bigchat.state().reported(), rules);
        compare::compare(&expected, self.our_api.state().data(), rules)
    }
}

/// Starts services one by one, on one thread.
pub struct Starting {
    thread: Arc<Thread>,
    seed: u64,
    keep_alive: Duration,
}

impl Starting {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            thread: Arc::new(Thread::start()?),
            seed: 1,
            keep_alive: KEEP_ALIVE,
        })
    }

    /// Of the faults that strike by chance.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Idle connections are closed after so long.
    pub fn keep_alive(mut self, keep_alive: Duration) -> Self {
        self.keep_alive = keep_alive;
        self
    }

    pub async fn listen<A: Api>(&mut self, address: SocketAddr, api: A) -> io::Result<Server<A>> {
        let service = Service::new(api, self.seed);
        Server::start(&self.thread, address, service, self.keep_alive).await
    }
}
