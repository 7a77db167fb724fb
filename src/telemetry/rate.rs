//! Rate and remaining time, for every progress bar and line.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// The period over which the rate is measured.
const WINDOW: Duration = Duration::from_secs(10);

/// How much was done, at some recent moments.
#[derive(Debug)]
pub struct RateEstimate(VecDeque<(Instant, u64)>);

impl RateEstimate {
    /// Begins the measurement with what is already done.
    pub fn new(at: Instant, done: u64) -> Self {
        Self(VecDeque::from([(at, done)]))
    }

    /// Records how much is done, and returns the rate. `left`: how much is left; `None`: unknown.
    pub fn now(&mut self, at: Instant, done: u64, left: Option<u64>) -> Rate {
        self.0.push_back((at, done));
        while self.0.len() > 2 && at - self.0[1].0 >= WINDOW {
            self.0.pop_front();
        }
        let (since, before) = self.0[0];
        let elapsed = (at - since).as_secs_f64();
        let per_second = if elapsed > 0.0 {
            done.saturating_sub(before) as f64 / elapsed
        } else {
            0.0
        };
        let time_left = left
            .filter(|_| per_second > 0.0)
            .and_then(|left| Duration::try_from_secs_f64((left as f64 / per_second).ceil()).ok());
        Rate {
            per_second,
            time_left,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    pub per_second: f64,
    /// The remaining time at that rate; `None`: unknown.
    pub time_left: Option<Duration>,
}

impl std::fmt::Display for Rate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let digits = usize::from(self.per_second < 10.0);
        write!(f, "{:.digits$}/s, ", self.per_second)?;
        match self.time_left {
            Some(left) => write!(f, "{} left", in_words(left)),
            None => f.write_str("- left"),
        }
    }
}

/// A duration in whole seconds.
pub fn in_words(duration: Duration) -> String {
    humantime::format_duration(Duration::from_secs(duration.as_secs())).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_is_recent() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut estimate = RateEstimate::new(start, 5);
        let shown = |rate: Rate| rate.to_string();
        assert_eq!(shown(estimate.now(start, 5, Some(10))), "0.0/s, - left");
        assert_eq!(shown(estimate.now(at(2), 45, Some(100))), "20/s, 5s left");
        assert_eq!(shown(estimate.now(at(4), 47, None)), "10/s, - left");
        assert_eq!(
            shown(estimate.now(at(14), 52, Some(1000))),
            "0.5/s, 33m 20s left"
        );
        assert_eq!(shown(estimate.now(at(30), 52, Some(9))), "0.0/s, - left");
    }
}
