//! Signs of life: whether polling and delivery still turn over, as opposed to waiting for somebody who is down.
//!
//! What turns over beats: it says that it beats again within a time, and each request and each operation on the journal
//! that comes to an end beats for whoever waits for it. A beat that is late by more than a grace means that something
//! hangs that nothing in this process will ever end, such as a disk that does not answer, or a lock that is never let
//! go. Failures are no such thing: they end. What follows from it is left to whoever asks: `/healthz` fails, and the
//! service manager's watchdog is not fed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task_local;

/// How late a beat may be on a busy machine.
const GRACE: Duration = Duration::from_secs(30);

/// Nothing is to be done, so nothing beats.
const AT_REST: u64 = u64::MAX;

task_local! {
    /// Whose future runs here.
    static HERE: Heartbeat;
}

/// The hearts of the daemon.
#[derive(Debug)]
pub struct Liveness {
    /// The poller's: its polls, and the requests they are made of.
    pub polling: Heartbeat,
    /// Delivery's, as far as it settles and claims.
    pub delivering: Heartbeat,
    /// The handlers', all in one: at rest while none is in work.
    pub handling: Heartbeat,
}

/// Beats for one part of the daemon.
#[derive(Debug, Clone)]
pub struct Heartbeat(Arc<Beats>);

#[derive(Debug)]
struct Beats {
    began: Instant,
    /// How long anything takes that ends by itself.
    at_the_most: Duration,
    /// When it beats again at the latest, in ms since `began`.
    due: AtomicU64,
}

impl Liveness {
    /// All at rest; a request is over after `request_timeout`.
    pub fn new(request_timeout: Duration, now: Instant) -> Self {
        // A GET whose connection broke is sent twice.
        let at_the_most = request_timeout.saturating_mul(2);
        Self {
            polling: Heartbeat::new(at_the_most, now),
            delivering: Heartbeat::new(at_the_most, now),
            handling: Heartbeat::new(at_the_most, now),
        }
    }

    /// What does not turn over, if anything.
    pub fn stuck(&self, now: Instant) -> Option<&'static str> {
        let parts = [
            (&self.polling, "polling is stuck"),
            (&self.delivering, "delivery is stuck"),
            (
                &self.handling,
                "delivery is stuck: what is in work does not end",
            ),
        ];
        parts
            .into_iter()
            .find(|(heart, _)| heart.is_stuck(now))
            .map(|(_, what)| what)
    }
}

impl Heartbeat {
    fn new(at_the_most: Duration, began: Instant) -> Self {
        Self(Arc::new(Beats {
            began,
            at_the_most,
            due: AtomicU64::new(AT_REST),
        }))
    }

    /// Lets it beat for `work` until that ends: at once, and with whatever ends in it.
    pub async fn supervise<T>(&self, work: impl Future<Output = T>) -> T {
        self.beat(Duration::ZERO);
        let done = HERE.scope(self.clone(), work).await;
        self.rest();
        done
    }

    /// The same for one of several pieces of work; that there is none any more is to be told by [`Self::rest`].
    pub async fn supervise_one<T>(&self, work: impl Future<Output = T>) -> T {
        self.beat(Duration::ZERO);
        HERE.scope(self.clone(), work).await
    }

    /// It beats now, and again once it has slept for `sleep` and then done something.
    pub fn beat(&self, sleep: Duration) {
        self.beat_at(Instant::now(), sleep);
    }

    fn beat_at(&self, now: Instant, sleep: Duration) {
        let due = self.ms(now + sleep + self.0.at_the_most);
        self.0.due.store(due, Ordering::Relaxed);
    }

    /// There is nothing to be done.
    pub fn rest(&self) {
        self.0.due.store(AT_REST, Ordering::Relaxed);
    }

    fn is_stuck(&self, now: Instant) -> bool {
        let due = self.0.due.load(Ordering::Relaxed);
        due < self.ms(now).saturating_sub(ms(GRACE))
    }

    fn ms(&self, at: Instant) -> u64 {
        ms(at.saturating_duration_since(self.0.began))
    }
}

/// A request or an operation on the journal has ended, however it did: whoever waits for it goes on.
pub(crate) fn goes_on(now: Instant) {
    // Commands have no heart.
    HERE.try_with(|heart| heart.beat_at(now, Duration::ZERO))
        .ok();
}

fn ms(duration: Duration) -> u64 {
    // Never quite the end of time, which is for those at rest.
    u64::try_from(duration.as_millis()).map_or(AT_REST - 1, |ms| ms.min(AT_REST - 1))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use clap::Parser;
    use rusqlite::Connection;
    use tokio::time::sleep;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::cli::Cli;
    use crate::daemon::{self, Parts};
    use crate::http::Network;
    use crate::journal::{Journal, Store};
    use crate::settings::LiveTokens;
    use crate::simulator::bigchat::Options;
    use crate::simulator::fault::paused;
    use crate::simulator::{BigChat, OurApi, Simulator};

    const TIMEOUT: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn what_neither_sleeps_nor_ends_is_stuck() {
        let now = Instant::now();
        let after = |seconds| now + Duration::from_secs(seconds);
        let liveness = Liveness::new(TIMEOUT, now);
        assert_eq!(liveness.stuck(after(1_000_000)), None, "all at rest");

        liveness.polling.beat(Duration::from_secs(60));
        assert_eq!(liveness.stuck(after(105)), None);
        assert_eq!(liveness.stuck(after(120)), Some("polling is stuck"));

        liveness.polling.rest();
        liveness.handling.supervise_one(async {}).await;
        assert_eq!(
            liveness.stuck(after(60)),
            Some("delivery is stuck: what is in work does not end"),
            "others may be in work"
        );
        liveness.handling.rest();
        liveness.delivering.supervise(async {}).await;
        assert_eq!(liveness.stuck(after(60)), None);
    }

    #[tokio::test]
    async fn what_ends_in_it_beats_for_whoever_waits_for_it() {
        let now = Instant::now();
        let liveness = Liveness::new(TIMEOUT, now);
        let polling = liveness.polling.supervise(async {
            let before = due(&liveness.polling);
            liveness.polling.0.due.store(0, Ordering::Relaxed);
            goes_on(Instant::now());
            assert!(due(&liveness.polling) >= before);
            assert_eq!(due(&liveness.handling), AT_REST, "not for others");
        });
        polling.await;
        goes_on(Instant::now());
        assert_eq!(due(&liveness.polling), AT_REST);
    }

    async fn until(what: &str, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !condition() {
            assert!(Instant::now() < deadline, "not in time: {what}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    fn due(heart: &Heartbeat) -> u64 {
        heart.0.due.load(Ordering::Relaxed)
    }

    /// Waits until it beats again.
    async fn beats(heart: &Heartbeat, what: &str) {
        let before = due(heart);
        until(what, || due(heart) != before && due(heart) != AT_REST).await;
    }

    async fn begin(simulator: &Simulator, stopping: &CancellationToken) -> Arc<Parts> {
        let flags = [
            "bigchat-sync".to_owned(),
            "--poll-interval=20ms".to_owned(),
            format!("--bigchat-url={}", simulator.bigchat.url()),
            format!("--our-api-url={}", simulator.our_api.url()),
        ];
        let settings = Cli::try_parse_from(flags).expect("good flags").settings;
        let connection = Connection::open_in_memory().expect("a database");
        let store = Store::in_memory(connection, true).expect("a schema");
        let journal = Journal::start(store).expect("a thread");
        let network = |url| Network::new(url, TIMEOUT).expect("a client");
        let bigchat = network(&settings.bigchat_url);
        let our_api = network(&settings.our_api_url);
        let (tokens, stopping) = (LiveTokens::default(), stopping.clone());
        let parts = daemon::begin(settings, tokens, journal, bigchat, our_api, stopping).await;
        Arc::new(parts.expect("a session"))
    }

    #[tokio::test]
    async fn the_daemon_beats_while_it_turns_over_and_not_when_the_disk_hangs() {
        let bigchat = BigChat::new(Options::default());
        let simulator = Simulator::start(bigchat, OurApi::new(1)).await;
        let simulator = simulator.expect("the services");
        let stopping = CancellationToken::new();
        let parts = begin(&simulator, &stopping).await;
        let liveness = &parts.liveness;
        let served = Arc::clone(&parts);
        let running = tokio::spawn(async move { daemon::serve(&served).await });
        beats(&liveness.polling, "polling").await;
        beats(&liveness.delivering, "delivery").await;

        // A request that takes long is beaten for when it begins and when it ends.
        let our_api = &simulator.our_api;
        our_api.upset("*", paused());
        until("a request waits", || our_api.pausing() == 1).await;
        let during = due(&liveness.handling);
        assert_ne!(during, AT_REST, "somebody is in work");
        our_api.resume();
        until("it goes on", || due(&liveness.handling) != during).await;
        simulator.bigchat.state().set_quiet(true);
        until("nobody is in work", || due(&liveness.handling) == AT_REST).await;
        beats(&liveness.polling, "polling goes on").await;

        let (go_on, waits) = mpsc::channel::<()>();
        let disk = parts.journal.with(move |_| {
            waits.recv().ok();
            Ok(())
        });
        let hangs = async {
            // What was on its way when it began to hang has ended by then.
            let (mut before, mut now) = (0, due(&liveness.polling));
            while before != now {
                sleep(Duration::from_millis(500)).await;
                (before, now) = (now, due(&liveness.polling));
            }
            let later = Instant::now() + TIMEOUT * 2 + GRACE + Duration::from_secs(2);
            assert_eq!(liveness.stuck(Instant::now()), None, "not at once");
            assert_eq!(liveness.stuck(later), Some("polling is stuck"));
            drop(go_on);
        };
        let (outcome, ()) = tokio::join!(disk, hangs);
        outcome.expect("it goes on");
        beats(&liveness.polling, "polling goes on").await;

        stopping.cancel();
        running.await.expect("no panic").expect("it stops well");
        for heart in [&liveness.polling, &liveness.delivering] {
            assert_eq!(due(heart), AT_REST);
        }
    }
}
