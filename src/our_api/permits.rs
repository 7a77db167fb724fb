//! Permits for requests in flight, so that OurAPI never has more at a time than the settings allow.
//!
//! A request that timed out may still be carried out, so its permit is held for another time-out. Otherwise, if OurAPI
//! hangs for a while, it would receive a second request meanwhile, which may corrupt its data if it allows only one.

use std::sync::Mutex;
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, sleep_until};

use super::lock::Turn;
use crate::domain::time::Millis;
use crate::mutex::lock;

#[derive(Debug)]
pub(super) struct Permits {
    max_in_flight: u16,
    request_timeout: Duration,
    free: Semaphore,
    held: Mutex<Vec<Held>>,
}

/// The permits of requests that were given up.
#[derive(Debug)]
struct Held {
    permits: u16,
    /// Monotonic, so that a step of this machine's clock frees no permit.
    until: Instant,
    /// The same by this machine's clock, for a later session.
    by_clock: Millis,
    /// The held lock, because no other process may send a request meanwhile.
    turn: Option<Turn>,
}

impl Permits {
    pub(super) fn new(max_in_flight: u16, request_timeout: Duration) -> Self {
        Self {
            max_in_flight,
            request_timeout,
            free: Semaphore::new(usize::from(max_in_flight)),
            held: Mutex::default(),
        }
    }

    pub(super) async fn acquire(&self) -> Permit<'_> {
        loop {
            if let Ok(permit) = self.free.try_acquire() {
                return Permit {
                    permits: self,
                    permit,
                };
            }
            match self.first_to_end() {
                None => {
                    // This fails only if the semaphore is closed, which never happens.
                    if let Ok(permit) = self.free.acquire().await {
                        return Permit {
                            permits: self,
                            permit,
                        };
                    }
                }
                Some(until) => tokio::select! {
                    biased;
                    Ok(permit) = self.free.acquire() => return Permit { permits: self, permit },
                    () = sleep_until(until) => {}
                },
            }
        }
    }

    /// See [`OurApi::free_permits`](super::OurApi::free_permits).
    pub(super) fn free_permits(&self, now: Millis) -> Result<u16, Millis> {
        let first = self.first_to_end();
        let held: u16 = lock(&self.held).iter().map(|held| held.permits).sum();
        match (self.max_in_flight.saturating_sub(held), first) {
            (0, Some(first)) => Err(now.plus(first.saturating_duration_since(Instant::now()))),
            (free, _) => Ok(free),
        }
    }

    /// See [`OurApi::timed_out_until`](super::OurApi::timed_out_until).
    pub(super) fn timed_out_until(&self) -> Millis {
        let held = lock(&self.held);
        let by_clock = held.iter().map(|held| held.by_clock);
        by_clock.max().unwrap_or_default()
    }

    pub(super) fn record_timeout(&self, requests: u16) {
        self.hold_free(requests, self.request_timeout);
    }

    /// Holds all permits, because an earlier session gave up an unknown number of requests.
    pub(super) fn restore(&self, until: Millis) {
        let left = until.since(Millis::now()).min(self.request_timeout);
        self.hold_free(self.max_in_flight, left);
    }

    fn hold_free(&self, permits: u16, time: Duration) {
        // If requests in flight have the permits, only the time is recorded.
        let free = self.free.try_acquire_many(u32::from(permits));
        let permits = free.map_or(0, |free| {
            free.forget();
            permits
        });
        self.hold(permits, time, None);
    }

    fn hold(&self, permits: u16, time: Duration, turn: Option<Turn>) {
        lock(&self.held).push(Held {
            permits,
            until: Instant::now() + time,
            by_clock: Millis::now().plus(time),
            turn,
        });
    }

    /// Frees the permits whose time has passed. Returns the next time to do so.
    fn first_to_end(&self) -> Option<Instant> {
        let mut held = lock(&self.held);
        if held.is_empty() {
            return None;
        }
        let now = Instant::now();
        held.retain_mut(|held| {
            let holds = now < held.until;
            if !holds {
                self.free.add_permits(usize::from(held.permits));
                if let Some(turn) = held.turn.take() {
                    turn.finish();
                }
            }
            holds
        });
        held.iter().map(|held| held.until).min()
    }
}

/// Allows one request in flight.
pub(super) struct Permit<'a> {
    permits: &'a Permits,
    permit: SemaphorePermit<'a>,
}

impl Permit<'_> {
    /// Holds the permit for another time-out.
    pub(super) fn hold(self, turn: Option<Turn>) {
        self.permit.forget();
        self.permits.hold(1, self.permits.request_timeout, turn);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn clock_step_frees_no_permit() {
        for step in [-1_000, 40_000] {
            let permits = Permits::new(1, TIMEOUT);
            permits.acquire().await.hold(None);
            let now = Millis::now();
            assert!(
                permits.free_permits(now).is_err(),
                "the request may be in flight"
            );
            assert!(
                permits.free_permits(Millis(now.0 + step)).is_err(),
                "the clock stepped by {step} ms"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn timed_out_request_holds_its_permit() {
        let permits = Permits::new(2, TIMEOUT);
        permits.acquire().await.hold(None);
        assert_eq!(permits.free_permits(Millis::now()), Ok(1));
        let other = permits.acquire().await;
        let start = Instant::now();
        let third = permits.acquire();
        let third = timeout(TIMEOUT * 2, third).await.expect("it is freed");
        assert_eq!(start.elapsed().as_secs(), TIMEOUT.as_secs());
        drop((other, third));
        assert_eq!(permits.free_permits(Millis::now()), Ok(2));
        assert_eq!(permits.free.available_permits(), 2, "none is lost");
    }

    #[tokio::test(start_paused = true)]
    async fn earlier_session_holds_all_permits() {
        let permits = Permits::new(3, TIMEOUT);
        permits.restore(Millis::now().plus(TIMEOUT * 9));
        assert!(permits.free_permits(Millis::now()).is_err());
        let start = Instant::now();
        permits.acquire().await;
        assert_eq!(
            start.elapsed().as_secs(),
            TIMEOUT.as_secs(),
            "no longer than a request takes"
        );
        assert_eq!(permits.free.available_permits(), 3);
    }
}
