//! What a failed attempt means for its event: pure decisions.
//!
//! An event is given up only for what is its own: it counts an attempt as spent if it failed though writes of other
//! conversations got through since the one before, and if not everybody is held up by the same.

use std::time::Duration;

use crate::bigchat::BigChatError;
use crate::conversation::Attempts;
use crate::our_api::Trouble;
use crate::retry::Policy;
use crate::setback::Setback;

/// What an event's attempts come to after one more that failed.
pub(super) fn attempts_after(
    before: Attempts,
    setback: &Setback,
    conversation: i64,
    successes: &Successes,
    bigchat_is_down: bool,
) -> Attempts {
    let others_got_through = before
        .successes
        .is_some_and(|count| successes.another_since(conversation, count));
    let counts = others_got_through && may_be_its_own(setback, bigchat_is_down);
    Attempts {
        tries: before.tries.saturating_add(1),
        counted: before.counted + u32::from(counts),
        successes: Some(successes.count),
        in_doubt: before.in_doubt || setback.in_doubt(),
    }
}

/// Whether it may be the event's own, if others get through.
fn may_be_its_own(setback: &Setback, bigchat_is_down: bool) -> bool {
    match setback {
        Setback::OurApi { error, .. } => !matches!(error.trouble, Trouble::Throttled { .. }),
        // That OurAPI takes others' writes says nothing of BigChat.
        Setback::BigChat(BigChatError::Throttled { .. } | BigChatError::Denied(_)) => false,
        Setback::BigChat(_) => !bigchat_is_down,
        Setback::Journal(_) | Setback::Rebuilding(_) => false,
    }
}

/// How long an event waits after failure number `tries`, chosen by `fraction` (0 to 1). What may have been carried out is
/// not looked for before it can have arrived: the requests that are still on their way last `request_timeout` at the most.
pub(super) fn wait(
    setback: &Setback,
    tries: u32,
    policy: &Policy,
    request_timeout: Duration,
    fraction: f64,
) -> Duration {
    let backoff = policy.backoff(tries, fraction);
    backoff.max(match (setback.in_doubt(), setback.is_late()) {
        (false, _) => Duration::ZERO,
        (true, false) => policy.initial / 2,
        (true, true) => request_timeout,
    })
}

/// The writes that have succeeded, as far as an event needs to know whether another conversation's has since.
#[derive(Debug, Clone, Copy)]
pub(super) struct Successes {
    pub(super) count: i64,
    /// The conversation of the latest, and the count with it.
    last: Option<(i64, i64)>,
    /// The count with the latest of another conversation than that.
    last_of_another: Option<i64>,
}

impl Successes {
    /// As they were when the session began.
    pub(super) fn since(count: i64) -> Self {
        Self {
            count,
            last: None,
            last_of_another: None,
        }
    }

    pub(super) fn note(&mut self, conversation: i64, writes: u32) {
        if writes == 0 {
            return;
        }
        self.count += i64::from(writes);
        if let Some((other, count)) = self.last
            && other != conversation
        {
            self.last_of_another = Some(count);
        }
        self.last = Some((conversation, self.count));
    }

    /// Whether a write of another conversation has succeeded since there had been `count` of them.
    pub(super) fn another_since(&self, conversation: i64, count: i64) -> bool {
        let latest = match self.last {
            Some((other, count)) if other != conversation => Some(count),
            _ => self.last_of_another,
        };
        latest.is_some_and(|latest| latest > count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::Exchange;
    use crate::journal::JournalError;
    use crate::our_api::OurApiError;
    use crate::time::Millis;

    const POLICY: Policy = Policy::DEFAULT;

    fn of_write(trouble: Trouble) -> Setback {
        Setback::of_write(OurApiError {
            trouble,
            exchange: Exchange::default(),
        })
    }

    fn throttled(in_doubt: bool) -> Setback {
        let until = Millis(1);
        of_write(Trouble::Throttled { until, in_doubt })
    }

    fn bigchat(error: impl Fn(Exchange) -> BigChatError) -> Setback {
        Setback::BigChat(error(Exchange::default()))
    }

    #[test]
    fn an_attempt_counts_once_another_conversation_got_through() {
        let mut successes = Successes::since(5);
        assert!(!successes.another_since(1, 5));
        successes.note(1, 2);
        assert!(!successes.another_since(1, 5), "its own do not count");
        assert!(successes.another_since(2, 5));
        successes.note(2, 1);
        assert!(successes.another_since(1, 5));
        assert!(!successes.another_since(1, 8));
        assert!(successes.another_since(2, 5), "that of 1 before");
        assert!(!successes.another_since(2, 7));
        successes.note(3, 0);
        assert_eq!(successes.count, 8);
    }

    #[test]
    fn only_what_may_be_its_own_counts() {
        let mut successes = Successes::since(5);
        let counted = |setback: &Setback, successes: &Successes, down| {
            let before = Attempts {
                tries: 1,
                counted: 3,
                successes: Some(5),
                in_doubt: false,
            };
            let after = attempts_after(before, setback, 1, successes, down);
            assert_eq!((after.tries, after.successes), (2, Some(successes.count)));
            after.counted - before.counted
        };
        let fails = of_write(Trouble::Unknown);
        assert_eq!(counted(&fails, &successes, false), 0, "nobody got through");
        successes.note(2, 1);
        for (setback, counts, while_bigchat_is_down) in [
            (of_write(Trouble::Unknown), 1, 1),
            (of_write(Trouble::NotCarriedOut), 1, 1),
            (of_write(Trouble::Denied), 1, 1),
            (throttled(false), 0, 0),
            (throttled(true), 0, 0),
            (bigchat(BigChatError::Unavailable), 1, 0),
            (bigchat(BigChatError::Refused), 1, 0),
            (bigchat(BigChatError::Denied), 0, 0),
            (
                bigchat(|_| BigChatError::Throttled { until: Millis(1) }),
                0,
                0,
            ),
            (Setback::Journal(JournalError::Closed), 0, 0),
            (Setback::Rebuilding("its chat is gone"), 0, 0),
        ] {
            assert_eq!(counted(&setback, &successes, false), counts, "{setback:?}");
            assert_eq!(
                counted(&setback, &successes, true),
                while_bigchat_is_down,
                "{setback:?}, BigChat down"
            );
        }
    }

    #[test]
    fn the_first_failure_never_counts_and_a_doubt_stays() {
        let mut successes = Successes::since(5);
        successes.note(2, 1);
        let first = attempts_after(
            Attempts::default(),
            &of_write(Trouble::Late),
            1,
            &successes,
            false,
        );
        assert_eq!((first.tries, first.counted, first.in_doubt), (1, 0, true));
        let second = attempts_after(
            first,
            &of_write(Trouble::NotCarriedOut),
            1,
            &successes,
            false,
        );
        assert_eq!(
            (second.counted, second.in_doubt),
            (0, true),
            "nobody got through in between"
        );
        successes.note(2, 1);
        let third = attempts_after(
            second,
            &of_write(Trouble::NotCarriedOut),
            1,
            &successes,
            false,
        );
        assert_eq!((third.tries, third.counted, third.in_doubt), (3, 1, true));
    }

    #[test]
    fn what_may_be_on_its_way_is_given_time_to_arrive() {
        let timeout = Duration::from_secs(30);
        let wait = |trouble, tries, fraction| {
            wait(&of_write(trouble), tries, &POLICY, timeout, fraction).as_millis()
        };
        assert_eq!(wait(Trouble::NotCarriedOut, 1, 0.0), 0);
        assert_eq!(wait(Trouble::Unknown, 1, 0.0), 500);
        assert_eq!(wait(Trouble::Late, 1, 0.0), 30_000);
        assert_eq!(wait(Trouble::Late, 9, 1.0), 256_000);
    }
}
