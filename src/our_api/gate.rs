//! The gate in front of OurAPI: while deliveries are paused, no caller sends anything.

use std::sync::Mutex;

use tokio::time::Instant;

use crate::domain::pause::Pause;
use crate::domain::time::Millis;
use crate::mutex::lock;

#[derive(Debug, Default)]
pub(super) struct Gate(Mutex<Option<Closed>>);

#[derive(Debug, Clone, Copy)]
struct Closed {
    pause: Pause,
    /// The end by the monotonic clock; `None`: until an operator resumes.
    until: Option<Instant>,
}

impl Gate {
    /// Closes the gate for a pause, or opens it. Setting the same pause again does not change its end.
    pub(super) fn set(&self, pause: Option<Pause>) {
        let mut closed = lock(&self.0);
        if closed.map(|closed| closed.pause) == pause {
            return;
        }
        *closed = pause.and_then(|pause| {
            let left = pause.left(Millis::now())?;
            let until = Instant::now().checked_add(left);
            Some(Closed { pause, until })
        });
    }

    /// The pause, if it is not over. Setting the clock ahead can end it, as expected of a pause until a given time.
    pub(super) fn paused(&self) -> Option<Pause> {
        let Closed { pause, until } = (*lock(&self.0))?;
        let is_over = until.is_some_and(|until| until <= Instant::now())
            || pause.left(Millis::now()).is_none();
        (!is_over).then_some(pause)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::advance;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test(start_paused = true)]
    async fn pause_ends_though_the_clock_was_set_back() {
        let gate = Gate::default();
        // The wall clock is stopped from here on, as if it were set back repeatedly.
        let pause = Pause::begin(Some(HOUR), Millis::now());
        gate.set(Some(pause));
        advance(HOUR - Duration::from_secs(60)).await;
        gate.set(Some(pause));
        assert_eq!(gate.paused(), Some(pause));
        advance(Duration::from_secs(60)).await;
        assert_eq!(gate.paused(), None);
        gate.set(Some(pause));
        assert_eq!(gate.paused(), None, "the journal may not know yet");
    }

    #[tokio::test(start_paused = true)]
    async fn only_resuming_ends_an_endless_pause() {
        let gate = Gate::default();
        let pause = Pause::begin(None, Millis::now());
        gate.set(Some(pause));
        advance(HOUR * 24 * 365).await;
        assert_eq!(gate.paused(), Some(pause));
        gate.set(None);
        assert_eq!(gate.paused(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn pause_that_is_over_does_not_begin() {
        let gate = Gate::default();
        gate.set(Some(Pause::begin(Some(HOUR), Millis::now().minus(HOUR))));
        assert_eq!(gate.paused(), None);
    }
}
