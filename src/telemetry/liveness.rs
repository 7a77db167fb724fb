//! Whether polling and delivery are making progress, or hang.
//!
//! Each supervised part has a pulse. A beat announces that the next one will follow within a certain time. Whenever a
//! request or an operation on the journal ends, the part that waits for it beats. If a beat is late by more than a
//! grace period, something hangs that nothing in this process will end, such as a disk that does not respond or a lock
//! that is never released. `/healthz` then fails, and the service manager's watchdog is not notified. An API that is
//! down is not such a case, because its requests end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task_local;

/// By how much a beat may be late on a busy machine.
const GRACE: Duration = Duration::from_secs(30);

/// There is no work, so no beat is due.
const AT_REST: u64 = u64::MAX;

task_local! {
    /// The pulse of the task that runs here.
    static HERE: Pulse;
}

/// The pulses of the daemon.
#[derive(Debug)]
pub struct Liveness {
    /// The poller's, including its requests.
    pub polling: Pulse,
    /// Delivery's, for claims and commits.
    pub delivering: Pulse,
    /// The shared pulse of all handlers, at rest while none is at work.
    pub handling: Pulse,
}

/// The pulse of a part of the daemon.
#[derive(Debug, Clone)]
pub struct Pulse(Arc<Beats>);

#[derive(Debug)]
struct Beats {
    began: Instant,
    /// The longest time that a request or an operation may take.
    max_duration: Duration,
    /// When the next beat is due, in ms since `began`.
    due: AtomicU64,
}

impl Liveness {
    /// Creates the pulses, all at rest. A request ends within `request_timeout`.
    pub fn new(request_timeout: Duration, now: Instant) -> Self {
        // A GET whose connection broke is sent a second time.
        let max_duration = request_timeout.saturating_mul(2);
        Self {
            polling: Pulse::new(max_duration, now),
            delivering: Pulse::new(max_duration, now),
            handling: Pulse::new(max_duration, now),
        }
    }

    /// The part that is making no progress, if there is one.
    pub fn stuck(&self, now: Instant) -> Option<&'static str> {
        let parts = [
            (&self.polling, "polling is stuck"),
            (&self.delivering, "delivery is stuck"),
            (
                &self.handling,
                "delivery is stuck: work in progress does not end",
            ),
        ];
        parts
            .into_iter()
            .find(|(pulse, _)| pulse.is_stuck(now))
            .map(|(_, what)| what)
    }
}

impl Pulse {
    fn new(max_duration: Duration, began: Instant) -> Self {
        Self(Arc::new(Beats {
            began,
            max_duration,
            due: AtomicU64::new(AT_REST),
        }))
    }

    /// Supervises `work` until it ends: beats at its start, and at the end of each request and operation in it.
    pub async fn supervise<T>(&self, work: impl Future<Output = T>) -> T {
        self.beat(Duration::ZERO);
        let done = HERE.scope(self.clone(), work).await;
        self.rest();
        done
    }

    /// The same for one of several concurrent tasks. [`Self::rest`] must be called when none is left.
    pub async fn supervise_one<T>(&self, work: impl Future<Output = T>) -> T {
        self.beat(Duration::ZERO);
        HERE.scope(self.clone(), work).await
    }

    /// Beats now. The next beat is due after `sleep` and the longest time of a request.
    pub fn beat(&self, sleep: Duration) {
        self.beat_at(Instant::now(), sleep);
    }

    fn beat_at(&self, now: Instant, sleep: Duration) {
        let due = self.ms(now + sleep + self.0.max_duration);
        self.0.due.store(due, Ordering::Relaxed);
    }

    /// Records that there is no work, so that no beat is due.
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

/// Records that a request or an operation on the journal has ended, successfully or not, so that the task that waits
/// for it makes progress.
pub(crate) fn record_progress(now: Instant) {
    // Commands have no pulse.
    HERE.try_with(|pulse| pulse.beat_at(now, Duration::ZERO))
        .ok();
}

fn ms(duration: Duration) -> u64 {
    // The result stays below the value that means "at rest".
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
    use crate::settings::Tokens;
    use crate::simulator::bigchat::Options;
    use crate::simulator::fault::paused;
    use crate::simulator::{BigChat, OurApi, Simulator};

    const TIMEOUT: Duration = Duration::from_secs(10);

    /// A part that neither sleeps nor ends is stuck.
    #[tokio::test]
    async fn missing_beat_means_stuck() {
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
            Some("delivery is stuck: work in progress does not end"),
            "other tasks may be at work"
        );
        liveness.handling.rest();
        liveness.delivering.supervise(async {}).await;
        assert_eq!(liveness.stuck(after(60)), None);
    }

    /// Requests and operations that end are beats of the part that waits for them.
    #[tokio::test]
    async fn inner_ends_are_beats() {
        let now = Instant::now();
        let liveness = Liveness::new(TIMEOUT, now);
        let polling = liveness.polling.supervise(async {
            let before = due(&liveness.polling);
            liveness.polling.0.due.store(0, Ordering::Relaxed);
            record_progress(Instant::now());
            assert!(due(&liveness.polling) >= before);
            assert_eq!(due(&liveness.handling), AT_REST, "not for others");
        });
        polling.await;
        record_progress(Instant::now());
        assert_eq!(due(&liveness.polling), AT_REST);
    }

    async fn until(what: &str, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !condition() {
            assert!(Instant::now() < deadline, "not in time: {what}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    fn due(pulse: &Pulse) -> u64 {
        pulse.0.due.load(Ordering::Relaxed)
    }

    /// Waits until the next beat.
    async fn beats(pulse: &Pulse, what: &str) {
        let before = due(pulse);
        until(what, || due(pulse) != before && due(pulse) != AT_REST).await;
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
        let (tokens, stopping) = (Tokens::default(), stopping.clone());
        let parts = daemon::begin(settings, tokens, journal, bigchat, our_api, stopping).await;
        Arc::new(parts.expect("a session"))
    }

    /// The daemon beats while it makes progress, and not while the disk hangs.
    #[tokio::test]
    async fn hanging_disk_stops_the_beat() {
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

        // A long request is a beat when it begins and when it ends.
        let our_api = &simulator.our_api;
        our_api.upset("*", paused());
        until("a request waits", || our_api.pausing() == 1).await;
        let during = due(&liveness.handling);
        assert_ne!(during, AT_REST, "a handler is at work");
        our_api.resume();
        until("it continues", || due(&liveness.handling) != during).await;
        simulator.bigchat.state().set_quiet(true);
        until("no handler is at work", || {
            due(&liveness.handling) == AT_REST
        })
        .await;
        beats(&liveness.polling, "polling continues").await;

        let (release, waits) = mpsc::channel::<()>();
        let disk = parts.journal.with(move |_| {
            waits.recv().ok();
            Ok(())
        });
        let hangs = async {
            // Whatever was in flight when the disk began to hang has ended by then.
            let (mut before, mut now) = (0, due(&liveness.polling));
            while before != now {
                sleep(Duration::from_millis(500)).await;
                (before, now) = (now, due(&liveness.polling));
            }
            let later = Instant::now() + TIMEOUT * 2 + GRACE + Duration::from_secs(2);
            assert_eq!(liveness.stuck(Instant::now()), None, "not at once");
            assert_eq!(liveness.stuck(later), Some("polling is stuck"));
            drop(release);
        };
        let (outcome, ()) = tokio::join!(disk, hangs);
        outcome.expect("it continues");
        beats(&liveness.polling, "polling continues").await;

        stopping.cancel();
        running
            .await
            .expect("no panic")
            .expect("a stop without an error");
        for pulse in [&liveness.polling, &liveness.delivering] {
            assert_eq!(due(pulse), AT_REST);
        }
    }
}
