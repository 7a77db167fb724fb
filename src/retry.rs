//! When to try again: pure decisions, given the time and a random number.
//!
//! A failed attempt is data: the event waits, with exponential back-off and full jitter. When its attempts are spent is
//! for delivery to say. The [`Breaker`] is about an API as a whole: when
//! it is down, one probe at a time takes the place of every event's own retry.

use std::time::Duration;

use crate::time::Millis;

/// How long and how often to try again (`--retry-initial`, `--retry-max`, `--max-attempts`).
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// The longest wait after the first failure.
    pub initial: Duration,
    /// The longest wait ever.
    pub max: Duration,
    /// How many counted attempts an event has.
    pub max_attempts: u32,
}

impl Policy {
    /// How long to wait after failure number `tries` (from 1): anything from nothing to `initial` doubled with each
    /// failure, at most `max`, chosen by `fraction` (0 to 1). Full jitter, so that what failed together does not
    /// come back together.
    pub fn backoff(&self, tries: u32, fraction: f64) -> Duration {
        let doubled = self
            .initial
            .saturating_mul(2_u32.saturating_pow(tries.saturating_sub(1).min(31)));
        doubled.min(self.max).mul_f64(fraction.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
impl Policy {
    /// As the settings have it where nobody says otherwise.
    pub(crate) const DEFAULT: Self = Self {
        initial: Duration::from_secs(1),
        max: Duration::from_secs(300),
        max_attempts: 10,
    };
}

/// The longest `Retry-After` that is kept: a mistyped one must not stop the daemon for days.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);

/// The longest wait between two probes of a dead API. An outage of hours must not be followed by
/// minutes of waiting for the next probe, as `--retry-max` alone would allow.
const PROBE_MAX: Duration = Duration::from_secs(30);

/// What is known of whether an API is up, from its last answers.
#[derive(Debug, Clone, Copy, Default)]
pub struct Breaker {
    failures: u32,
    since: Millis,
    probe_at: Millis,
}

/// How much may be asked of an API now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowance {
    /// As much as the settings say.
    Full,
    /// One request: whether it fails tells whether the API is back.
    Probe,
    /// Nothing before then.
    NotBefore(Millis),
}

impl Breaker {
    /// An answer that shows the API to be well. True if it was down until now.
    pub fn succeeded(&mut self) -> bool {
        let was_down = self.is_down();
        *self = Self::default();
        was_down
    }

    /// An answer, or none, that may mean that the API is down. True if it counts as down from now on and did not
    /// before: one failure may be its event's own fault, so another event is tried at once; two are an outage.
    pub fn failed(&mut self, now: Millis, policy: &Policy, fraction: f64) -> bool {
        if self.is_down() && matches!(self.allowance(now), Allowance::NotBefore(_)) {
            // It was on its way before the others failed.
            return false;
        }
        if self.failures == 0 {
            self.since = now;
        }
        self.failures = self.failures.saturating_add(1);
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
        self.failures == 2
    }

    /// How much may be asked now.
    pub fn allowance(&self, now: Millis) -> Allowance {
        match self.failures {
            0 => Allowance::Full,
            // A clock that was set back must not make the probe wait for longer than it ever should.
            _ if now >= self.probe_at || self.probe_at > now.plus(PROBE_MAX) => Allowance::Probe,
            _ => Allowance::NotBefore(self.probe_at),
        }
    }

    /// Whether the API counts as down.
    pub fn is_down(&self) -> bool {
        self.failures >= 2
    }

    /// Since when it has been failing.
    pub fn since(&self) -> Millis {
        self.since
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICY: Policy = Policy::DEFAULT;

    #[test]
    fn backoff_doubles_up_to_its_maximum() {
        let longest = |tries| POLICY.backoff(tries, 1.0).as_secs();
        assert_eq!(
            [1, 2, 3, 9, 10, u32::MAX].map(longest),
            [1, 2, 4, 256, 300, 300]
        );
        assert_eq!(POLICY.backoff(5, 0.0), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn backoff_stays_within_its_bounds(tries: u32, fraction in 0.0..=1.0_f64, initial in 0_u64..10_000, max in 0_u64..1_000_000) {
            let policy = Policy { initial: Duration::from_millis(initial), max: Duration::from_millis(max), max_attempts: 1 };
            let delay = policy.backoff(tries, fraction);
            prop_assert!(delay <= policy.max);
            prop_assert!(policy.backoff(tries, 1.0) >= delay, "the longest wait is that of the largest fraction");
            prop_assert!(policy.backoff(tries.saturating_add(1), fraction) >= delay, "waits never get shorter");
        }

        #[test]
        fn an_outage_is_probed_and_never_forgotten(failures in 2_u32..100, fraction in 0.0..=1.0_f64, start in 0_i64..i64::MAX / 4) {
            let mut breaker = Breaker::default();
            let mut now = Millis(start);
            for _ in 0..failures {
                breaker.failed(now, &POLICY, fraction);
                if let Allowance::NotBefore(then) = breaker.allowance(now) {
                    prop_assert!(then.since(now) <= PROBE_MAX);
                    now = then;
                }
                prop_assert_eq!(breaker.allowance(now), Allowance::Probe);
            }
            prop_assert!(breaker.is_down());
            prop_assert_eq!(breaker.since(), Millis(start));
            prop_assert!(breaker.succeeded());
            prop_assert_eq!(breaker.allowance(now), Allowance::Full);
        }
    }

    #[test]
    fn one_failure_lets_another_event_try_at_once() {
        let mut breaker = Breaker::default();
        assert!(!breaker.failed(Millis(7), &POLICY, 1.0));
        assert_eq!(breaker.allowance(Millis(7)), Allowance::Probe);
        assert!(
            breaker.failed(Millis(8), &POLICY, 1.0),
            "two in a row are an outage"
        );
        assert_eq!(
            breaker.allowance(Millis(8)),
            Allowance::NotBefore(Millis(1008))
        );
        assert_eq!(
            breaker.allowance(Millis(8 - 3_600_000)),
            Allowance::Probe,
            "the clock was set back"
        );
        assert!(
            !breaker.failed(Millis(1008), &POLICY, 1.0),
            "it was down already"
        );
    }

    #[test]
    fn probes_are_paced_after_the_clock_was_set_back_too() {
        let mut breaker = Breaker::default();
        for _ in 0..10 {
            breaker.failed(Millis(100_000_000), &POLICY, 1.0);
            breaker.failed(Millis(100_030_000), &POLICY, 1.0);
        }
        assert!(breaker.is_down());
        // An hour back. The first probe may go at once; it fails.
        let now = Millis(100_030_000 - 3_600_000);
        assert_eq!(breaker.allowance(now), Allowance::Probe);
        breaker.failed(now, &POLICY, 1.0);
        assert_ne!(
            breaker.allowance(now.plus(Duration::from_millis(1))),
            Allowance::Probe,
            "the next one waits"
        );
    }
}
