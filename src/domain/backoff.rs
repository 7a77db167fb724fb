//! Exponential back-off with full jitter. Pure. Delivery determines when an event has no attempts left.

use std::time::Duration;

/// `--retry-initial`, `--retry-max` and `--max-attempts`.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    pub initial: Duration,
    pub max: Duration,
    /// Counted attempts before an event becomes a dead letter.
    pub max_attempts: u32,
}

impl Policy {
    /// The wait after failure number `attempts` (from 1): `fraction` (0 to 1) of `initial`, doubled with each further
    /// failure up to `max`. A random fraction spreads requests that failed together.
    pub fn backoff(&self, attempts: u32, fraction: f64) -> Duration {
        let doubled = self
            .initial
            .saturating_mul(2_u32.saturating_pow(attempts.saturating_sub(1).min(31)));
        doubled.min(self.max).mul_f64(fraction.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The default settings.
    pub(crate) const POLICY: Policy = Policy {
        initial: Duration::from_secs(1),
        max: Duration::from_secs(300),
        max_attempts: 10,
    };

    #[test]
    fn backoff_doubles_up_to_its_maximum() {
        let longest = |attempts| POLICY.backoff(attempts, 1.0).as_secs();
        assert_eq!(
            [1, 2, 3, 9, 10, u32::MAX].map(longest),
            [1, 2, 4, 256, 300, 300]
        );
        assert_eq!(POLICY.backoff(5, 0.0), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn backoff_stays_within_its_bounds(attempts: u32, fraction in 0.0..=1.0_f64, initial in 0_u64..10_000, max in 0_u64..1_000_000) {
            let policy = Policy { initial: Duration::from_millis(initial), max: Duration::from_millis(max), max_attempts: 1 };
            let delay = policy.backoff(attempts, fraction);
            prop_assert!(delay <= policy.max);
            prop_assert!(policy.backoff(attempts, 1.0) >= delay, "the longest wait is that of the largest fraction");
            prop_assert!(policy.backoff(attempts.saturating_add(1), fraction) >= delay, "waits never get shorter");
        }
    }
}
