//! The consequences of a failed attempt for its event. Pure.
//!
//! The event is retried after a back-off. If it fails repeatedly while writes of other conversations succeed, the fault
//! must be the event's own, and it becomes a dead letter. An event that OurAPI permanently rejects becomes one at once.

use std::time::Duration;

use crate::bigchat::SourceError;
use crate::domain::backoff::Policy;
use crate::domain::conversation::Attempts;
use crate::domain::ids::ConversationId;
use crate::domain::progress::{Failure, Outcome};
use crate::domain::time::Millis;
use crate::http::{Api, ApiError, ErrorKind};
use crate::journal::JournalError;

#[derive(Debug)]
pub enum AttemptError {
    Write(ApiError),
    /// A read before the write failed; the write was not attempted.
    Read(ApiError),
    Journal(JournalError),
    /// OurAPI has lost data that has to be restored first.
    DataLost(&'static str),
    /// The handler panicked; the outcome of its last request is unknown.
    Panicked,
}

impl From<JournalError> for AttemptError {
    fn from(error: JournalError) -> Self {
        Self::Journal(error)
    }
}

impl From<SourceError> for AttemptError {
    fn from(error: SourceError) -> Self {
        match error {
            SourceError::Api(error) => error.into(),
            SourceError::Journal(error) => error.into(),
        }
    }
}

/// Errors of writes are wrapped explicitly.
impl From<ApiError> for AttemptError {
    fn from(error: ApiError) -> Self {
        Self::Read(error)
    }
}

impl AttemptError {
    /// Whether OurAPI will never accept the event. The rejection of a read does not count.
    pub fn is_rejection(&self) -> bool {
        matches!(self, Self::Write(error) if error.kind == ErrorKind::Rejected)
    }

    /// Whether the event may have been delivered.
    pub fn outcome_unknown(&self) -> bool {
        match self {
            Self::Write(error) => error.kind.outcome_unknown(),
            Self::Panicked => true,
            _ => false,
        }
    }

    /// Whether the chat must be read back before the event is sent again.
    pub(super) fn leaves_stale(&self) -> bool {
        self.outcome_unknown()
            || matches!(self, Self::Write(error) if error.kind.may_be_carried_out())
    }

    /// Whether OurAPI may still carry out the request.
    pub(super) fn is_timeout(&self) -> bool {
        match self {
            Self::Write(error) => error.kind.timed_out(),
            Self::Panicked => true,
            _ => false,
        }
    }

    /// Whether a request failed.
    pub(super) fn is_of_api(&self) -> bool {
        matches!(self, Self::Read(_) | Self::Write(_))
    }

    /// Whether the cause lies in this program or its database, and waiting does not remove it.
    pub(super) fn is_bug_or_damage(&self) -> bool {
        match self {
            Self::Journal(error) => !error.is_transient(),
            Self::Panicked => true,
            _ => false,
        }
    }

    fn is_denial(&self) -> bool {
        matches!(self, Self::Read(error) if error.kind == ErrorKind::Denied)
    }

    /// Whether no request was made. The event is then unchanged.
    pub(super) fn is_withheld(&self) -> bool {
        matches!(self, Self::Read(error) | Self::Write(error) if error.kind == ErrorKind::Withheld)
    }

    /// Whether a request to BigChat failed.
    pub(super) fn is_of_bigchat(&self) -> bool {
        matches!(self, Self::Read(error) if error.api == Api::BigChat)
    }

    /// As logged: without bodies, unless message text may be logged.
    pub fn logged(&self) -> Failure {
        match self {
            Self::Write(error) | Self::Read(error) => error.logged(),
            _ => self.failure(),
        }
    }

    /// As stored with the event.
    pub fn failure(&self) -> Failure {
        let reason = match self {
            Self::Write(error) | Self::Read(error) => return error.failure(),
            Self::Journal(error) => error.to_string(),
            Self::DataLost(reason) => (*reason).to_owned(),
            Self::Panicked => "the handler panicked; please report this with the log".to_owned(),
        };
        Failure {
            reason,
            ..Failure::default()
        }
    }

    /// Whether the fault may be the event's own, given that writes of other conversations succeed.
    fn may_be_its_own(&self, bigchat_is_failing: bool) -> bool {
        match self {
            Self::Write(error) | Self::Read(error) => match (error.api, error.kind) {
                (_, ErrorKind::RateLimited { .. } | ErrorKind::Denied) => false,
                // A successful write to OurAPI proves nothing about BigChat.
                (Api::BigChat, ErrorKind::Unauthorized) => false,
                (Api::BigChat, _) => !bigchat_is_failing,
                (Api::OurApi, _) => true,
            },
            // A row that is needed for the event.
            Self::Journal(JournalError::InvalidRow(_)) | Self::Panicked => true,
            Self::Journal(_) | Self::DataLost(_) => false,
        }
    }
}

/// The state of the APIs at the time of a failure.
#[derive(Debug, Clone, Copy)]
pub(super) struct Circumstances {
    pub(super) now: Millis,
    pub(super) bigchat_is_failing: bool,
    /// The end of BigChat's rate limit.
    pub(super) bigchat_retry_after: Option<Millis>,
    /// After a time-out, the request may still be in flight for as long again.
    pub(super) request_timeout: Duration,
    /// Denials in shorter succession count once.
    pub(super) poll_interval: Duration,
    /// Jitter: 0 to 1.
    pub(super) fraction: f64,
}

/// The outcome of an event after a failed attempt.
pub(super) fn outcome(
    before: Attempts,
    error: &AttemptError,
    conversation: ConversationId,
    writes: &Writes,
    policy: &Policy,
    at: &Circumstances,
) -> Outcome {
    let failure = error.failure();
    if error.is_rejection() {
        let attempts = Attempts {
            failed: before.failed.saturating_add(1),
            ..before
        };
        return Outcome::DeadLetter {
            attempts,
            failure,
            permanent: true,
        };
    }
    let attempts = attempts_after(before, error, conversation, writes, at.bigchat_is_failing);
    if attempts.counted >= policy.max_attempts {
        return Outcome::DeadLetter {
            attempts,
            failure,
            permanent: false,
        };
    }
    let next_at = at.now.plus(back_off(error, attempts.failed, policy, at));
    let next_at = match error {
        error if error.is_of_bigchat() => next_at.max(at.bigchat_retry_after.unwrap_or_default()),
        // The scheduler enforces OurAPI's rate limit.
        _ => next_at,
    };
    Outcome::Retry {
        attempts,
        next_at,
        failure,
    }
}

fn attempts_after(
    before: Attempts,
    error: &AttemptError,
    conversation: ConversationId,
    writes: &Writes,
    bigchat_is_failing: bool,
) -> Attempts {
    let others_succeeded = before
        .writes_then
        .is_some_and(|then| writes.another_conversation_succeeded_since(conversation, then));
    let counts = others_succeeded && error.may_be_its_own(bigchat_is_failing);
    Attempts {
        failed: before.failed.saturating_add(u32::from(!error.is_denial())),
        counted: before.counted + u32::from(counts),
        writes_then: Some(writes.count),
        outcome_unknown: before.outcome_unknown || error.outcome_unknown(),
    }
}

/// The wait after failure number `attempts`. A write of unknown outcome gets time to arrive before it is read back.
fn back_off(error: &AttemptError, attempts: u32, policy: &Policy, at: &Circumstances) -> Duration {
    let at_least = match (error.leaves_stale(), error.is_timeout()) {
        (false, _) if error.is_denial() => at.poll_interval,
        (false, _) => Duration::ZERO,
        (true, false) => policy.initial / 2,
        (true, true) => at.request_timeout,
    };
    policy.backoff(attempts, at.fraction).max(at_least)
}

/// Counts successful writes. The last two conversations suffice to know whether a write of another one has succeeded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Writes {
    pub(super) count: i64,
    /// The conversation of the latest write, and the count after it.
    last: Option<(ConversationId, i64)>,
    /// The count after the latest write of any other conversation.
    last_of_another: Option<i64>,
}

impl Writes {
    /// Continues the count of earlier sessions.
    pub(super) fn since(count: i64) -> Self {
        Self {
            count,
            last: None,
            last_of_another: None,
        }
    }

    pub(super) fn record(&mut self, conversation: ConversationId, writes: u32) {
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

    fn another_conversation_succeeded_since(
        &self,
        conversation: ConversationId,
        then: i64,
    ) -> bool {
        let latest = match self.last {
            Some((other, count)) if other != conversation => Some(count),
            _ => self.last_of_another,
        };
        latest.is_some_and(|latest| latest > then)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::backoff::tests::POLICY;

    const ONE: ConversationId = ConversationId(1);
    const TWO: ConversationId = ConversationId(2);

    const UNKNOWN: ErrorKind = ErrorKind::OutcomeUnknown { timed_out: false };
    const TIMED_OUT: ErrorKind = ErrorKind::OutcomeUnknown { timed_out: true };

    fn write(kind: ErrorKind) -> AttemptError {
        AttemptError::Write(ApiError::not_sent(Api::OurApi, kind, ""))
    }

    fn read(api: Api, kind: ErrorKind) -> AttemptError {
        AttemptError::from(ApiError::not_sent(api, kind, ""))
    }

    fn rate_limited(outcome_unknown: bool) -> ErrorKind {
        ErrorKind::RateLimited {
            until: Millis(1),
            outcome_unknown,
        }
    }

    #[test]
    fn writes_of_the_same_conversation() {
        let mut writes = Writes::since(5);
        let since = Writes::another_conversation_succeeded_since;
        assert!(!since(&writes, ONE, 5));
        writes.record(ONE, 2);
        assert!(!since(&writes, ONE, 5));
        assert!(since(&writes, TWO, 5));
        writes.record(TWO, 1);
        assert!(since(&writes, ONE, 5));
        assert!(!since(&writes, ONE, 8));
        assert!(since(&writes, TWO, 5), "the earlier write of the first");
        assert!(!since(&writes, TWO, 7));
        writes.record(ConversationId(3), 0);
        assert_eq!(writes.count, 8);
    }

    #[test]
    fn only_the_events_own_faults_count() {
        let mut writes = Writes::since(5);
        let counted = |error: &AttemptError, writes: &Writes, down| {
            let before = Attempts {
                failed: 1,
                counted: 3,
                writes_then: Some(5),
                outcome_unknown: false,
            };
            let after = attempts_after(before, error, ONE, writes, down);
            let failed = if error.is_denial() { 1 } else { 2 };
            assert_eq!(after.failed, failed, "{error:?}");
            assert_eq!(after.writes_then, Some(writes.count));
            after.counted - before.counted
        };
        let fails = write(UNKNOWN);
        let invalid_row = AttemptError::Journal(JournalError::InvalidRow("kind".into()));
        assert_eq!(counted(&fails, &writes, false), 0, "no other write");
        writes.record(TWO, 1);
        for (error, counts, while_bigchat_is_failing) in [
            (write(UNKNOWN), 1, 1),
            (write(ErrorKind::Unreachable), 1, 1),
            (write(ErrorKind::Unauthorized), 1, 1),
            (read(Api::OurApi, ErrorKind::Rejected), 1, 1),
            (write(rate_limited(false)), 0, 0),
            (write(rate_limited(true)), 0, 0),
            (read(Api::BigChat, UNKNOWN), 1, 0),
            (read(Api::BigChat, ErrorKind::Rejected), 1, 0),
            (read(Api::BigChat, ErrorKind::Unauthorized), 0, 0),
            (read(Api::BigChat, rate_limited(false)), 0, 0),
            (read(Api::BigChat, ErrorKind::Denied), 0, 0),
            (read(Api::OurApi, ErrorKind::Denied), 0, 0),
            (AttemptError::Journal(JournalError::Closed), 0, 0),
            (invalid_row, 1, 1),
            (AttemptError::DataLost("its chat is gone"), 0, 0),
        ] {
            assert_eq!(counted(&error, &writes, false), counts, "{error:?}");
            assert_eq!(
                counted(&error, &writes, true),
                while_bigchat_is_failing,
                "{error:?}, BigChat down"
            );
        }
    }

    #[test]
    fn first_failure_with_unknown_outcome() {
        let mut writes = Writes::since(5);
        writes.record(TWO, 1);
        let after = |before, kind, writes: &Writes| {
            attempts_after(before, &write(kind), ONE, writes, false)
        };
        let first = after(Attempts::default(), TIMED_OUT, &writes);
        assert_eq!(
            (first.failed, first.counted, first.outcome_unknown),
            (1, 0, true)
        );
        let second = after(first, ErrorKind::Unreachable, &writes);
        assert_eq!((second.counted, second.outcome_unknown), (0, true));
        writes.record(TWO, 1);
        let third = after(second, ErrorKind::Unreachable, &writes);
        assert_eq!(
            (third.failed, third.counted, third.outcome_unknown),
            (3, 1, true)
        );
    }

    #[test]
    fn dead_letters_and_retries() {
        let mut writes = Writes::since(0);
        writes.record(TWO, 1);
        let at = Circumstances {
            now: Millis(0),
            bigchat_is_failing: false,
            bigchat_retry_after: Some(Millis(9_000)),
            request_timeout: Duration::from_secs(10),
            poll_interval: Duration::ZERO,
            fraction: 0.0,
        };
        let outcome = |counted, error: &AttemptError| {
            let before = Attempts {
                failed: 20,
                counted,
                writes_then: Some(0),
                outcome_unknown: false,
            };
            outcome(before, error, ONE, &writes, &POLICY, &at)
        };
        let is_dead = |outcome: &Outcome| matches!(outcome, Outcome::DeadLetter { .. });
        assert!(is_dead(&outcome(0, &write(ErrorKind::Rejected))));
        assert!(is_dead(&outcome(9, &write(UNKNOWN))));
        assert!(!is_dead(&outcome(8, &write(UNKNOWN))));
        assert!(!is_dead(&outcome(
            0,
            &read(Api::OurApi, ErrorKind::Rejected)
        )));
        let Outcome::Retry { next_at, .. } = outcome(0, &read(Api::BigChat, UNKNOWN)) else {
            panic!("it is retried");
        };
        assert_eq!(next_at, Millis(9_000), "as BigChat asked");
    }

    #[test]
    fn least_wait_of_each_error() {
        let wait = |error, attempts, fraction| {
            let at = Circumstances {
                now: Millis(0),
                bigchat_is_failing: false,
                bigchat_retry_after: None,
                request_timeout: Duration::from_secs(30),
                poll_interval: Duration::from_secs(10),
                fraction,
            };
            back_off(&error, attempts, &POLICY, &at).as_millis()
        };
        assert_eq!(wait(write(ErrorKind::Unreachable), 1, 0.0), 0);
        assert_eq!(wait(write(UNKNOWN), 1, 0.0), 500);
        assert_eq!(wait(write(TIMED_OUT), 1, 0.0), 30_000);
        assert_eq!(wait(write(TIMED_OUT), 9, 1.0), 256_000);
        assert_eq!(wait(AttemptError::Panicked, 1, 0.0), 30_000);
        assert_eq!(wait(read(Api::BigChat, ErrorKind::Denied), 1, 1.0), 10_000);
    }
}
