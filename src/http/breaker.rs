//! The circuit breaker of an API: while it fails, one probe at a time takes the place of every other request. Pure
//! decisions, given the time and a random number.

use std::time::Duration;

use super::route::Route;
use crate::domain::backoff::Policy;
use crate::domain::time::Millis;

/// The longest wait between two probes. An outage of hours must not be followed by minutes of waiting for the next probe,
/// as `--retry-max` alone would allow.
const PROBE_MAX: Duration = Duration::from_secs(30);

/// So many failures in a row open the circuit: a single one may be its request's own fault, so another is sent at once.
const OPEN_AFTER: u32 = 2;

/// So many in a row are an outage that is worth a line in the log. Two may be one dropped connection. Two failed probes
/// more are 1.5 s at least, with the default back-off.
const DOWN_AFTER: u32 = 4;

/// What may be asked of an API now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Circuit {
    /// As much as the settings say.
    Closed,
    /// One request: whether it fails shows whether the API is back.
    HalfOpen,
    /// Nothing before then.
    Open { until: Millis },
}

/// See the [module](self).
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Breaker {
    /// In a row.
    failures: u32,
    /// The route of the latest.
    failed: Option<Route>,
    since: Millis,
    probe_at: Millis,
}

impl Breaker {
    /// A request succeeded. Returns whether the circuit is closed now. Most reads show nothing if it was another route that
    /// failed: what is known of an outage of writes must not get lost with each chat that is read back meanwhile.
    pub(super) fn succeeded(&mut self, route: Route) -> bool {
        let shows_all = !route.is_read() || route == Route::Events;
        if !shows_all && self.failed.is_some_and(|failed| failed != route) {
            // What failed may be tried at once.
            self.probe_at = Millis::default();
            return false;
        }
        *self = Self::default();
        true
    }

    /// A request failed as in an outage.
    pub(super) fn failed(&mut self, route: Route, now: Millis, policy: &Policy, fraction: f64) {
        if self.is_failing() && matches!(self.circuit(now), Circuit::Open { .. }) {
            // It was in flight before the others failed.
            return;
        }
        if self.failures == 0 {
            self.since = now;
        }
        self.failures = self.failures.saturating_add(1);
        self.failed = Some(route);
        self.probe_at = match self.failures {
            1 => now,
            n => {
                let longest = Policy {
                    max: policy.max.min(PROBE_MAX),
                    ..*policy
                };
                // Half of the wait is fixed: probes that follow one another at once are a load of their own.
                now.plus(longest.backoff(n - 1, 0.5 + fraction / 2.0))
            }
        };
    }

    pub(super) fn circuit(&self, now: Millis) -> Circuit {
        match self.failures {
            0 => Circuit::Closed,
            // A clock that was set back must not make the probe wait for longer than it ever should.
            _ if now >= self.probe_at || self.probe_at > now.plus(PROBE_MAX) => Circuit::HalfOpen,
            _ => Circuit::Open {
                until: self.probe_at,
            },
        }
    }

    /// Whether it fails, and not only for one request.
    pub(super) fn is_failing(&self) -> bool {
        self.failures >= OPEN_AFTER
    }

    /// Whether that has lasted so long that it is an outage.
    pub(super) fn is_down(&self) -> bool {
        self.failures >= DOWN_AFTER
    }

    /// When the first of the failures was.
    pub(super) fn since(&self) -> Millis {
        self.since
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::backoff::tests::POLICY;

    proptest! {
        #[test]
        fn an_outage_is_probed_and_never_forgotten(failures in 4_u32..100, fraction in 0.0..=1.0_f64, start in 0_i64..i64::MAX / 4) {
            let mut breaker = Breaker::default();
            let mut now = Millis(start);
            for _ in 0..failures {
                breaker.failed(Route::AddMessage, now, &POLICY, fraction);
                if let Circuit::Open { until } = breaker.circuit(now) {
                    prop_assert!(until.since(now) <= PROBE_MAX);
                    now = until;
                }
                prop_assert_eq!(breaker.circuit(now), Circuit::HalfOpen);
            }
            prop_assert!(breaker.is_down());
            prop_assert_eq!(breaker.since(), Millis(start));
            prop_assert!(breaker.succeeded(Route::AddMessage));
            prop_assert!(!breaker.is_failing());
            prop_assert_eq!(breaker.circuit(now), Circuit::Closed);
        }
    }

    #[test]
    fn one_failure_lets_another_request_try_at_once() {
        let mut breaker = Breaker::default();
        breaker.failed(Route::AddMessage, Millis(7), &POLICY, 1.0);
        assert_eq!(breaker.circuit(Millis(7)), Circuit::HalfOpen);
        assert!(!breaker.is_failing());
        breaker.failed(Route::AddMessage, Millis(8), &POLICY, 1.0);
        assert!(breaker.is_failing(), "two in a row open it");
        let open = Circuit::Open {
            until: Millis(1008),
        };
        assert_eq!(breaker.circuit(Millis(8)), open);
        let clock_set_back = Millis(8 - 3_600_000);
        assert_eq!(breaker.circuit(clock_set_back), Circuit::HalfOpen);
    }

    #[test]
    fn what_was_in_flight_makes_no_outage() {
        let mut breaker = Breaker::default();
        for _ in 0..100 {
            breaker.failed(Route::AddMessage, Millis(7), &POLICY, 1.0);
        }
        assert!(!breaker.is_down(), "all of them failed at once");
        breaker.failed(Route::AddMessage, Millis(1_007), &POLICY, 1.0);
        assert!(!breaker.is_down());
        breaker.failed(Route::AddMessage, Millis(3_007), &POLICY, 1.0);
        assert!(breaker.is_down(), "two probes failed as well");
    }

    #[test]
    fn a_read_shows_nothing_of_what_failed() {
        use Route::*;
        for (failed, succeeded, closes) in [
            (AddMessage, Chats, false),
            (AddMessage, Messages, false),
            (Messages, Chats, false),
            (Events, Conversation, false),
            (Messages, Messages, true),
            (AddMessage, CreateChat, true),
            (Messages, ChangeChat, true),
            (Conversation, Events, true),
        ] {
            let mut breaker = Breaker::default();
            breaker.failed(failed, Millis(7), &POLICY, 1.0);
            breaker.failed(failed, Millis(8), &POLICY, 1.0);
            assert_eq!(
                breaker.succeeded(succeeded),
                closes,
                "{failed:?} {succeeded:?}"
            );
            assert_eq!(breaker.is_failing(), !closes);
            let circuit = breaker.circuit(Millis(8));
            assert!(!matches!(circuit, Circuit::Open { .. }), "{circuit:?}");
        }
    }

    #[test]
    fn probes_are_paced_after_the_clock_was_set_back_too() {
        let mut breaker = Breaker::default();
        for _ in 0..10 {
            breaker.failed(Route::AddMessage, Millis(100_000_000), &POLICY, 1.0);
            breaker.failed(Route::AddMessage, Millis(100_030_000), &POLICY, 1.0);
        }
        assert!(breaker.is_failing());
        // An hour back. The first probe may go at once; it fails.
        let now = Millis(100_030_000 - 3_600_000);
        assert_eq!(breaker.circuit(now), Circuit::HalfOpen);
        breaker.failed(Route::AddMessage, now, &POLICY, 1.0);
        assert_ne!(
            breaker.circuit(now.plus(Duration::from_millis(1))),
            Circuit::HalfOpen,
            "the next one waits"
        );
    }
}
