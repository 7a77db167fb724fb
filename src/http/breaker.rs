//! The circuit breaker of an API: while the API fails, one probe at a time replaces all other requests. Pure, given the
//! time and a random number.

use std::time::Duration;

use super::route::Route;
use crate::domain::backoff::Policy;
use crate::domain::time::Millis;

/// Maximum wait between two probes. With `--retry-max` alone, the end of a long outage could go unnoticed for minutes.
const PROBE_MAX: Duration = Duration::from_secs(30);

/// How many failures in a row open the circuit. The first may be specific to its request, so another request is sent at
/// once.
const OPEN_AFTER: u32 = 2;

/// How many failures in a row are an outage. Two may be a single dropped connection; two further failed probes take at
/// least 1.5 s with the default back-off.
const DOWN_AFTER: u32 = 4;

/// The requests that the breaker lets pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Circuit {
    /// All.
    Closed,
    /// One, as a probe.
    HalfOpen,
    /// None before `until`.
    Open { until: Millis },
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Breaker {
    /// How many in a row.
    failures: u32,
    /// The route of the latest failure.
    failed: Option<Route>,
    since: Millis,
    probe_at: Millis,
}

impl Breaker {
    /// Records a success and returns whether the circuit is closed. After a failure of another route, a read proves
    /// nothing, unless it is one of events: a chat that is read back during an outage of writes must not end that
    /// outage.
    pub(super) fn succeeded(&mut self, route: Route) -> bool {
        let proves_all = !route.is_read() || route == Route::Events;
        if !proves_all && self.failed.is_some_and(|failed| failed != route) {
            // The failed route is probed at once.
            self.probe_at = Millis::default();
            return false;
        }
        *self = Self::default();
        true
    }

    /// Records a failure that indicates an outage.
    pub(super) fn failed(&mut self, route: Route, now: Millis, policy: &Policy, fraction: f64) {
        if self.is_failing() && matches!(self.circuit(now), Circuit::Open { .. }) {
            // The request was in flight before the circuit opened.
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
                // Half of the wait is fixed, so that probes are never back to back.
                now.plus(longest.backoff(n - 1, 0.5 + fraction / 2.0))
            }
        };
    }

    pub(super) fn circuit(&self, now: Millis) -> Circuit {
        match self.failures {
            0 => Circuit::Closed,
            // A clock that was set back must not delay the probe beyond the maximum wait.
            _ if now >= self.probe_at || self.probe_at > now.plus(PROBE_MAX) => Circuit::HalfOpen,
            _ => Circuit::Open {
                until: self.probe_at,
            },
        }
    }

    /// Whether the latest request has failed.
    pub(super) fn has_failed(&self) -> bool {
        self.failures > 0
    }

    pub(super) fn is_failing(&self) -> bool {
        self.failures >= OPEN_AFTER
    }

    pub(super) fn is_down(&self) -> bool {
        self.failures >= DOWN_AFTER
    }

    /// The time of the first failure.
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
        fn outage_is_probed_until_a_success(failures in 4_u32..100, fraction in 0.0..=1.0_f64, start in 0_i64..i64::MAX / 4) {
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
    fn single_failure_is_probed_at_once() {
        let mut breaker = Breaker::default();
        breaker.failed(Route::AddMessage, Millis(7), &POLICY, 1.0);
        assert_eq!(breaker.circuit(Millis(7)), Circuit::HalfOpen);
        assert!(!breaker.is_failing());
        breaker.failed(Route::AddMessage, Millis(8), &POLICY, 1.0);
        assert!(breaker.is_failing(), "two in a row open the circuit");
        let open = Circuit::Open {
            until: Millis(1008),
        };
        assert_eq!(breaker.circuit(Millis(8)), open);
        let clock_set_back = Millis(8 - 3_600_000);
        assert_eq!(breaker.circuit(clock_set_back), Circuit::HalfOpen);
    }

    #[test]
    fn failures_in_flight_are_no_outage() {
        let mut breaker = Breaker::default();
        for _ in 0..100 {
            breaker.failed(Route::AddMessage, Millis(7), &POLICY, 1.0);
        }
        assert!(!breaker.is_down(), "all failed at once");
        breaker.failed(Route::AddMessage, Millis(1_007), &POLICY, 1.0);
        assert!(!breaker.is_down());
        breaker.failed(Route::AddMessage, Millis(3_007), &POLICY, 1.0);
        assert!(breaker.is_down(), "two probes failed, too");
    }

    #[test]
    fn read_after_another_route_failed() {
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
    fn probes_after_clock_set_back() {
        let mut breaker = Breaker::default();
        for _ in 0..10 {
            breaker.failed(Route::AddMessage, Millis(100_000_000), &POLICY, 1.0);
            breaker.failed(Route::AddMessage, Millis(100_030_000), &POLICY, 1.0);
        }
        assert!(breaker.is_failing());
        // An hour back. The first probe is sent at once and fails.
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
