//! When to try again: pure decisions, given the time and a random number.
//!
//! A failed attempt is data: the event waits, with exponential back-off and full jitter. When its attempts are spent is
//! for delivery to say.

use std::time::Duration;

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
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As the settings are by default.
    pub(crate) const POLICY: Policy = Policy {
        initial: Duration::from_secs(1),
        max: Duration::from_secs(300),
        max_attempts: 10,
    };

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
    }
}
