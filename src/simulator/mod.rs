//! Simulates both services, with their quirks and faults, and compares what BigChat reported with what OurAPI has in
//! the end.
//!
//! The demo, the tests, the exhaustive check and the benchmarks use this module, and run the daemon themselves.
//!
//! [`BigChat`] and [`OurApi`] are plain values that answer a request without waiting ([`Api`]). A copy gives the same
//! answers. [`Service`] adds [faults](fault) and records requests; [`Server`] listens on the network. They behave as
//! the real services were observed to behave; options make them better or worse. The comparison ([`compare`]) derives
//! the expected state independently. Nothing here uses the daemon's code, so that a mistake is not made twice.

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

    /// Compares what BigChat reported with what OurAPI has, by the default rules.
    pub fn compare(&self) -> compare::Report {
        self.compare_by(&compare::Rules::default())
    }

    /// The same, by other rules.
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

    /// The seed of random faults.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// How long an idle connection stays open.
    pub fn keep_alive(mut self, keep_alive: Duration) -> Self {
        self.keep_alive = keep_alive;
        self
    }

    pub async fn listen<A: Api>(&mut self, address: SocketAddr, api: A) -> io::Result<Server<A>> {
        let service = Service::new(api, self.seed);
        Server::start(&self.thread, address, service, self.keep_alive).await
    }
}
