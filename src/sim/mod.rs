//! Simulations of both APIs, to test and measure the daemon against, and the comparison of what BigChat told with what
//! OurAPI holds in the end.
//!
//! The simulated services are true to what the real ones were seen to do, and can do better, or worse, on request: see
//! [`bigchat`], [`our_api`] and [`faults`]. The comparison ([`compare`]) works out on its own what should be there and
//! shares no code with the daemon, so that a mistake is not made twice. Running a daemon against them is left to the
//! tests and to the [`demo`](crate::demo).

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
};

pub mod bigchat;
pub mod chaos;
pub mod compare;
pub mod faults;
mod http;
pub mod our_api;
#[cfg(test)]
mod tests;
mod watch;
mod world;

pub use bigchat::BigChat;
pub use http::{Clock, Traffic};
pub use our_api::OurApi;
pub use watch::{Answered, Happening, Watch};

/// The settings of both services.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where BigChat listens; a free port of the loopback interface unless said otherwise.
    pub bigchat_address: SocketAddr,
    /// Where OurAPI listens; the same.
    pub our_api_address: SocketAddr,
    /// BigChat's settings.
    pub bigchat: bigchat::Options,
    /// OurAPI's settings.
    pub our_api: our_api::Options,
}

impl Default for Options {
    fn default() -> Self {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Self {
            bigchat_address: any,
            our_api_address: any,
            bigchat: bigchat::Options::default(),
            our_api: our_api::Options::default(),
        }
    }
}

/// Both services, running until this is dropped.
pub struct Sim {
    /// The simulated BigChat.
    pub bigchat: BigChat,
    /// The simulated OurAPI.
    pub our_api: OurApi,
}

impl Sim {
    /// Starts both.
    pub async fn start(options: Options) -> io::Result<Self> {
        Ok(Self {
            bigchat: BigChat::start(options.bigchat_address, options.bigchat).await?,
            our_api: OurApi::start(options.our_api_address, options.our_api).await?,
        })
    }

    /// Where BigChat listens.
    pub fn bigchat_url(&self) -> String {
        self.bigchat.url()
    }

    /// Where OurAPI listens.
    pub fn our_api_url(&self) -> String {
        self.our_api.url()
    }

    /// Compares what BigChat told so far with what OurAPI holds now, by the usual rules.
    pub fn compare(&self) -> compare::Report {
        let rules = compare::Rules::default();
        compare::compare(
            &compare::expected(&self.bigchat.told(), &rules),
            &self.our_api.held(),
            &rules,
        )
    }

    /// Stops both, and waits until they have.
    pub async fn shutdown(self) -> io::Result<()> {
        self.bigchat.shutdown().await?;
        self.our_api.shutdown().await
    }
}
