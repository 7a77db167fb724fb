//! A seeded plan of faults: which ones strike the services and the daemon, when, and for how long.
//!
//! The same seed gives the same plan, but the requests that meet the faults depend on timing. The plan contains only
//! faults that the daemon promises to survive: no response lies, and nothing is carried out after its client has gone.
//! The user of the plan kills and starts the daemon.

use std::{fmt, io, ops::Range, time::Duration};

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::Simulator;
use super::fault::{self, Fault};

/// Longer than any client waits. A client that gave up gets no response, and its request is not carried out.
const FOR_EVER: Duration = Duration::from_secs(600);

/// The probability of a fault of each kind, for a single request.
const OFTEN: f64 = 0.006;

/// The same for faults that cost a client seconds.
const SELDOM: f64 = 0.001;

/// The probability that the pagination of a poll loops.
const CIRCLES: f64 = 0.05;

/// Milliseconds between two faults of a service, and their duration.
const BETWEEN: Range<u64> = 300..3_000;
const LASTING: Range<u64> = 200..4_000;

/// How long a restarting BigChat is down. Its dates are whole seconds and lag behind, so that the epoch of a page
/// served within 2 s before a new epoch is uncertain.
const RESTARTING: Range<u64> = 3_000..5_000;

/// How long the daemon runs, in milliseconds. Half of the runs are hardly long enough for a poll. `DEAD` is how long
/// the daemon is then down.
const ALIVE: [Range<u64>; 2] = [20..500, 500..4_000];
const DEAD: Range<u64> = 50..1_500;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    BigChat,
    OurApi,
}

/// A fault of a service that lasts for a while.
#[derive(Clone, Debug, PartialEq)]
pub enum Strike {
    /// Every request meets this fault.
    Outage(Service, Fault),
    /// No connection is accepted.
    Refuses(Service),
    /// BigChat accepts no connection. Afterwards it has restarted, and reuses its ids.
    BigChatRestarts,
    /// OurAPI accepts no connection. Afterwards it is empty.
    OurApiRestarts,
    /// OurAPI loses everything while it is running.
    OurApiLosesAll,
    OurApiLosesAgents,
    /// OurAPI loses the chats at these positions of the list, as fractions.
    OurApiLosesChats(Vec<f64>),
}

/// How and when the daemon ends next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// How long it runs before it ends.
    pub after: Duration,
    /// Whether it is killed; else it is stopped by SIGTERM.
    pub kill: bool,
    /// How long it is down.
    pub down: Duration,
}

/// The plan: two independent random sequences, one for the services and one for the daemon.
#[derive(Debug)]
pub struct Plan {
    services: StdRng,
    daemon: StdRng,
}

impl Plan {
    pub fn new(seed: u64) -> Self {
        Self {
            services: StdRng::seed_from_u64(seed),
            daemon: StdRng::seed_from_u64(!seed),
        }
    }

    /// The next fault of a service: when it begins, what it is, and how long it lasts.
    pub fn strike(&mut self) -> (Duration, Strike, Duration) {
        let rng = &mut self.services;
        let after = millis(rng, BETWEEN);
        let service = if rng.random() {
            Service::BigChat
        } else {
            Service::OurApi
        };
        let strike = match rng.random_range(0..100) {
            0..45 => Strike::Outage(service, outage(rng)),
            45..55 => Strike::Refuses(service),
            55..70 => Strike::BigChatRestarts,
            70..76 => Strike::OurApiRestarts,
            76..80 => Strike::OurApiLosesAll,
            80..88 => Strike::OurApiLosesAgents,
            _ => Strike::OurApiLosesChats((0..3).map(|_| rng.random()).collect()),
        };
        let lasting = match strike {
            Strike::BigChatRestarts => RESTARTING,
            _ => LASTING,
        };
        (after, strike, millis(rng, lasting))
    }

    /// How and when the daemon ends next.
    pub fn end(&mut self) -> End {
        let rng = &mut self.daemon;
        let [short, long] = ALIVE;
        End {
            after: if rng.random() {
                millis(rng, short)
            } else {
                millis(rng, long)
            },
            kill: rng.random_bool(0.75),
            down: millis(rng, DEAD),
        }
    }
}

fn millis(rng: &mut StdRng, range: Range<u64>) -> Duration {
    Duration::from_millis(rng.random_range(range))
}

/// A fault for every request to a service.
fn outage(rng: &mut StdRng) -> Fault {
    match rng.random_range(0..8) {
        0 => fault::dropped(),
        1 => fault::slow(FOR_EVER),
        2 => fault::status(401),
        3 => fault::status(403),
        4 => fault::status(502),
        5 => fault::html(),
        6 => fault::status(503).header("retry-after", "1"),
        _ => fault::crashed(),
    }
}

/// Injects faults of all kinds into random requests to both services, until [`calm`].
pub fn weather(simulator: &Simulator) {
    simulator.bigchat.state().set_circles(CIRCLES);
    let often = [
        fault::dropped(),
        fault::cut_off(),
        fault::html(),
        fault::status(200),
        fault::status(200).body("null"),
        fault::status(302),
        fault::status(408),
        fault::crashed(),
        fault::status(503),
        fault::slow(Duration::from_millis(300)),
    ];
    let seldom = [fault::slow(FOR_EVER), fault::status(503).retry_date(2)];
    let often = often.into_iter().map(|fault| (OFTEN, fault));
    let seldom = seldom.into_iter().map(|fault| (SELDOM, fault));
    for (probability, fault) in often.chain(seldom) {
        for fault in [fault.clone(), fault.carried_out()] {
            upset(simulator, probability, fault);
        }
    }
    // A service that answers 429 has carried out nothing.
    let too_many = fault::status(429).header("retry-after", "1");
    upset(simulator, SELDOM, too_many);
}

fn upset(simulator: &Simulator, probability: f64, fault: Fault) {
    simulator
        .bigchat
        .upset_at_random(probability, fault.clone());
    simulator.our_api.upset_at_random(probability, fault);
}

/// Ends all faults, and brings both services up.
///
/// # Errors
///
/// If a service cannot listen on its address again.
pub async fn calm(simulator: &Simulator) -> io::Result<()> {
    simulator.bigchat.state().set_circles(0.0);
    simulator.bigchat.calm();
    simulator.our_api.calm();
    Service::BigChat.up(simulator).await?;
    Service::OurApi.up(simulator).await
}

impl Service {
    fn outage(self, simulator: &Simulator, fault: Option<Fault>) {
        match self {
            Self::BigChat => simulator.bigchat.outage(fault),
            Self::OurApi => simulator.our_api.outage(fault),
        }
    }

    async fn down(self, simulator: &Simulator) {
        match self {
            Self::BigChat => {
                simulator.bigchat.state().set_down(true);
                simulator.bigchat.down().await;
            }
            Self::OurApi => simulator.our_api.down().await,
        }
    }

    async fn up(self, simulator: &Simulator) -> io::Result<()> {
        match self {
            Self::BigChat => {
                simulator.bigchat.state().set_down(false);
                simulator.bigchat.up().await
            }
            Self::OurApi => simulator.our_api.up().await,
        }
    }
}

impl Strike {
    pub async fn begin(&self, simulator: &Simulator) {
        let our_api = || simulator.our_api.state();
        match self {
            Self::Outage(service, fault) => service.outage(simulator, Some(fault.clone())),
            Self::Refuses(service) => service.down(simulator).await,
            Self::BigChatRestarts => Service::BigChat.down(simulator).await,
            Self::OurApiRestarts => Service::OurApi.down(simulator).await,
            Self::OurApiLosesAll => our_api().lose_everything(),
            Self::OurApiLosesAgents => our_api().lose_agents(),
            Self::OurApiLosesChats(parts) => {
                let chats = our_api().data().chats.clone();
                for part in parts {
                    // If there are no chats, none is lost.
                    if let Some(chat) = chats.get((part * chats.len() as f64) as usize) {
                        our_api().lose_chat(&chat.external_id);
                    }
                }
            }
        }
    }

    /// Ends the fault.
    ///
    /// # Errors
    ///
    /// If a service cannot listen on its address again.
    pub async fn end(&self, simulator: &Simulator) -> io::Result<()> {
        match self {
            Self::Outage(service, _) => service.outage(simulator, None),
            Self::Refuses(service) => service.up(simulator).await?,
            Self::BigChatRestarts => {
                simulator.bigchat.state().restart();
                Service::BigChat.up(simulator).await?;
            }
            Self::OurApiRestarts => {
                simulator.our_api.state().lose_everything();
                Service::OurApi.up(simulator).await?;
            }
            Self::OurApiLosesAll | Self::OurApiLosesAgents | Self::OurApiLosesChats(_) => {}
        }
        Ok(())
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BigChat => "BigChat",
            Self::OurApi => "OurAPI",
        })
    }
}

impl fmt::Display for Strike {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Outage(service, fault) => write!(f, "{service} {}", fault.in_words()),
            Self::Refuses(service) => write!(f, "{service} is down"),
            Self::BigChatRestarts => f.write_str("BigChat restarts and reuses its ids"),
            Self::OurApiRestarts => f.write_str("OurAPI restarts and has lost everything"),
            Self::OurApiLosesAll => f.write_str("OurAPI loses everything"),
            Self::OurApiLosesAgents => f.write_str("OurAPI loses its agents"),
            Self::OurApiLosesChats(_) => f.write_str("OurAPI loses some chats"),
        }
    }
}
