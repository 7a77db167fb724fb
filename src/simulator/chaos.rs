//! A seeded plan of mischief: what strikes the services and the daemon between them, when, and for how long.
//!
//! The same seed makes the same plan; what of it strikes which request still depends on who comes first. Nothing in it
//! is beyond what the daemon promises to survive: no answer lies, nothing is carried out after its client has gone.
//! Killing and starting the daemon is left to whoever runs it.

use std::{fmt, io, ops::Range, time::Duration};

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::Simulator;
use super::fault::{self, Fault};

/// Longer than any client waits. One that gave up meanwhile gets nothing, and nothing is done for it.
const FOR_EVER: Duration = Duration::from_secs(600);

/// How often a request meets a fault of its own: one of each kind, in a thousand.
const OFTEN: f64 = 0.006;

/// The same for those that cost a client seconds each.
const SELDOM: f64 = 0.001;

/// How often a poll ends in a circle of pages.
const CIRCLES: f64 = 0.05;

/// The milliseconds between two strikes at the services, and how long one lasts.
const BETWEEN: Range<u64> = 300..3_000;
const LASTING: Range<u64> = 200..4_000;

/// How long a BigChat that restarts is away. Its dates are whole seconds and lag behind, so that of a page that it served
/// within 2 s before its new run began nobody can tell which run it is of.
const RESTARTING: Range<u64> = 3_000..5_000;

/// The milliseconds that the daemon lives at a time: every other time hardly long enough for a poll. And is dead.
const ALIVE: [Range<u64>; 2] = [20..500, 500..4_000];
const DEAD: Range<u64> = 50..1_500;

/// Either service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// BigChat.
    BigChat,
    /// OurAPI.
    OurApi,
}

/// What strikes a service, for a while.
#[derive(Clone, Debug, PartialEq)]
pub enum Strike {
    /// Every request meets this fault.
    Outage(Service, Fault),
    /// No connection is accepted.
    Refuses(Service),
    /// The same, and BigChat has restarted afterwards: its ids are others'.
    BigChatRestarts,
    /// The same, and OurAPI comes back with nothing.
    OurApiRestarts,
    /// OurAPI loses everything in mid-work.
    OurApiLosesAll,
    /// OurAPI loses its agents.
    OurApiLosesAgents,
    /// OurAPI loses some of its chats: those at these parts of the list.
    OurApiLosesChats(Vec<f64>),
}

/// What becomes of the daemon next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// After so long.
    pub after: Duration,
    /// Killed, without a word; else stopped in good order.
    pub kill: bool,
    /// For so long there is no daemon.
    pub down: Duration,
}

/// The plan. Services and daemon have theirs side by side.
#[derive(Debug)]
pub struct Plan {
    services: StdRng,
    daemon: StdRng,
}

impl Plan {
    /// The plan of a seed.
    pub fn new(seed: u64) -> Self {
        Self {
            services: StdRng::seed_from_u64(seed),
            daemon: StdRng::seed_from_u64(!seed),
        }
    }

    /// What strikes a service next, after how long, and how long it lasts.
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

    /// What becomes of the daemon next.
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

/// A fault that everything may meet for a while.
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

/// Lets single requests to either service meet faults of all kinds, until [`calm`].
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
    // A service that says so has done nothing.
    let too_many = fault::status(429).header("retry-after", "1");
    upset(simulator, SELDOM, too_many);
}

fn upset(simulator: &Simulator, probability: f64, fault: Fault) {
    simulator
        .bigchat
        .upset_at_random(probability, fault.clone());
    simulator.our_api.upset_at_random(probability, fault);
}

/// Ends all faults, and has both services back.
///
/// # Errors
///
/// When a service cannot listen again where it did.
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
    /// Strikes.
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
                    // Of no chats none is lost.
                    if let Some(chat) = chats.get((part * chats.len() as f64) as usize) {
                        our_api().lose_chat(&chat.external_id);
                    }
                }
            }
        }
    }

    /// It is over.
    ///
    /// # Errors
    ///
    /// When a service cannot listen again where it did.
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
            Self::BigChatRestarts => f.write_str("BigChat restarts, its ids are others' now"),
            Self::OurApiRestarts => f.write_str("OurAPI restarts and has lost everything"),
            Self::OurApiLosesAll => f.write_str("OurAPI loses everything"),
            Self::OurApiLosesAgents => f.write_str("OurAPI loses its agents"),
            Self::OurApiLosesChats(_) => f.write_str("OurAPI loses some chats"),
        }
    }
}
