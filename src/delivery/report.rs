//! The report on a piece of work: the outcome of each event, with its log lines and metrics.

use std::collections::HashMap;
use std::sync::Arc;

use super::Delivery;
use super::attempts::{self, AttemptError, Circumstances, Writes};
use super::reconcile::{Reconciliation, Step, Stopped};
use crate::domain::conversation::{Attempts, Conversation, Pending};
use crate::domain::ids::{ConversationId, EventId};
use crate::domain::progress::{
    Advance, Claim, Due, Effect, EventOutcome, Failure, Observation, Outcome, Report,
    VerificationResult, advance,
};
use crate::domain::time::Millis;
use crate::http::Api;
use crate::journal::STORAGE_PAUSE;
use crate::mutex::lock;
use crate::telemetry::log::log_at;

pub(super) struct Reporter {
    delivery: Arc<Delivery>,
    writes: Writes,
    /// Failed reads of chats without waiting events.
    failed_reads: HashMap<ConversationId, u32>,
    /// Failed changes of chats without waiting events.
    failed_changes: HashMap<ConversationId, Attempts>,
}

impl Reporter {
    pub(super) fn new(delivery: Arc<Delivery>) -> Self {
        let writes = Writes::since(delivery.session.writes_succeeded);
        Self {
            delivery,
            writes,
            failed_reads: HashMap::new(),
            failed_changes: HashMap::new(),
        }
    }

    pub(super) fn report(&mut self, reconciliation: Reconciliation) -> Report {
        let now = Millis::now();
        let Reconciliation {
            conversation,
            events,
            claim,
            done,
            stopped,
            observation,
            consumed,
            writes,
            verify,
            found,
            drift,
            missing,
            ..
        } = reconciliation;
        self.writes.record(conversation.id, writes);
        let error = stopped.as_ref().map(|stopped| &stopped.error);
        let leaves_stale = error.is_some_and(AttemptError::leaves_stale);
        let outcome_unknown = error.is_some_and(AttemptError::outcome_unknown);
        let mut outcomes = Vec::with_capacity(done.len() + 1);
        for (id, result) in done {
            if let Some(event) = find(&events, id) {
                let outcome = match result {
                    Ok(effect) => delivered(&conversation, event, effect),
                    Err(error) => self.failed(&conversation, event, &error, now),
                };
                outcomes.push(EventOutcome::of(event, outcome));
            }
        }
        let mut report = Report {
            conversation,
            claim,
            outcomes,
            advance: Advance::default(),
            consumed,
            becomes_stale: leaves_stale || observation == Observation::Adopted,
            observation,
            due: Due::IfWaiting,
            writes_succeeded: self.writes.count,
            verify,
            found,
            drift,
            missing,
        };
        if stopped.as_ref().is_some_and(|stopped| stopped.at.is_none()) {
            // The offset stays: a lost chat with only dead letters counts as rebuilt once its offset has passed them.
            report.claim.through = report.claim.offset;
        }
        match stopped {
            None => self.nothing_failed(&report),
            Some(stopped) if stopped.error.is_withheld() => report.due = Due::At(now),
            Some(stopped) => match stopped.at.and_then(|at| find(&events, at)) {
                Some(event) => self.event_failed(&mut report, &events, event, &stopped, now),
                None if stopped.step == Step::ChangingChat => {
                    self.change_failed(&mut report, &stopped.error, now);
                }
                None => self.chat_failed(&mut report, &stopped, now),
            },
        }
        // Events sent to a lost chat are lost with it.
        if report.observation == (Observation::Gone { rebuild: true }) {
            let is_lost = |outcome: &Outcome| matches!(outcome, Outcome::Delivered(_));
            report.outcomes.retain(|event| !is_lost(&event.outcome));
        }
        report.advance = advance(&report.claim, &events, &report.outcomes);
        let offset = report.advance.offset;
        for outcome in report.outcomes.iter().filter(|of| of.counts(offset)) {
            let metrics = &self.delivery.metrics;
            metrics.attempted(outcome.kind, &outcome.outcome);
        }
        if outcome_unknown {
            self.delivery.metrics.unknown_outcome();
        }
        report
    }

    /// Ends the count of failed reads if the chat was read, and that of failed changes if it was changed. A claim with
    /// nothing to do does not count as a read, and a read does not count as a change.
    fn nothing_failed(&mut self, report: &Report) {
        let id = report.conversation.id;
        if report.observation != Observation::None || report.found.is_some() {
            self.failed_reads.remove(&id);
        }
        if report.verify.is_none() && !matches!(report.observation, Observation::Read(_)) {
            self.failed_changes.remove(&id);
        }
    }

    /// Handles work that ended at an event.
    fn event_failed(
        &self,
        report: &mut Report,
        events: &[Pending],
        event: &Pending,
        stopped: &Stopped,
        now: Millis,
    ) {
        let conversation = &report.conversation;
        if let AttemptError::Journal(error) = &stopped.error
            && error.is_transient()
        {
            // This does not count as an attempt of the event.
            tracing::error!(
                conversation = conversation.bigchat_id, event = event.id.0, kind = %event.payload.kind(),
                reason = %error, "the database interrupted a delivery"
            );
            report.due = Due::At(now.plus(STORAGE_PAUSE));
            return;
        }
        let mut outcome = self.failed(conversation, event, &stopped.error, now);
        match &outcome {
            Outcome::DeadLetter { failure, .. } if stopped.step == Step::ComparingMessages => {
                let unreadable = self.unreadable(&report.claim, events, failure);
                report.outcomes.extend(unreadable);
                self.verified_by_fields(report);
                return;
            }
            Outcome::Retry { next_at, .. } => report.due = Due::At(*next_at),
            Outcome::DeadLetter { .. } | Outcome::Delivered(_) => {}
        }
        if stopped.step == Step::ChangingChat {
            outcome.was_not_sent(event);
        }
        report.outcomes.push(EventOutcome::of(event, outcome));
    }

    /// Handles work that ended at the chat itself, without an event that needs it.
    fn chat_failed(&mut self, report: &mut Report, stopped: &Stopped, now: Millis) {
        let error = &stopped.error;
        let is_comparing = stopped.step == Step::ComparingMessages;
        // The chat itself was just read, so OurAPI is up.
        let is_up = report.verify.is_some() && is_comparing;
        let (failed, next_at) = self.read_failed(&report.conversation, error, is_up, now);
        report.due = Due::At(next_at);
        let may_pass = !error.is_of_api() && !error.is_bug_or_damage();
        if failed < self.delivery.settings.max_attempts || may_pass {
            return;
        }
        match report.verify {
            Some(_) => {
                report.found = Some(VerificationResult {
                    is_unreadable: true,
                    ..VerificationResult::default()
                });
                report.due = Due::IfWaiting;
            }
            None if is_comparing => {
                // No message has an unknown outcome.
                report.due = Due::IfWaiting;
                self.verified_by_fields(report);
            }
            None => return,
        }
        self.failed_reads.remove(&report.conversation.id);
    }

    /// Handles a failed change that no waiting event requests. A change that fails again and again while other chats
    /// are changed is given up, as if OurAPI had rejected it. The creation of a lost chat is never given up, so its
    /// failures do not count.
    fn change_failed(&mut self, report: &mut Report, error: &AttemptError, now: Millis) {
        let conversation = &report.conversation;
        let (id, chat) = (conversation.id, conversation.observed.chat);
        let mut before = self.failed_changes.remove(&id).unwrap_or_default();
        if chat.is_none() {
            before.writes_then = None;
        }
        let failure = error.logged();
        match self.outcome(id, before, error, now) {
            Outcome::Retry {
                attempts, next_at, ..
            } => {
                log_at!(
                    !self.is_logged_otherwise(error),
                    conversation = conversation.bigchat_id, chat = chat.map(tracing::field::display),
                    reason = %failure.reason, request = %failure.request, response = %failure.response,
                    "a chat could not be changed; it will be retried"
                );
                report.due = Due::At(next_at);
                self.failed_changes.insert(id, attempts);
            }
            _ => tracing::warn!(
                conversation = conversation.bigchat_id, chat = chat.map(tracing::field::display),
                reason = %failure.reason, request = %failure.request, response = %failure.response,
                "a change to a chat failed again while others got through; the chat is not changed until the conversation's next event or verification"
            ),
        }
    }

    /// The chat's messages cannot be compared, so only its fields are verified.
    fn verified_by_fields(&self, report: &mut Report) {
        lock(&self.delivery.unreadable).insert(report.conversation.id);
        report.observation = Observation::Read(None);
    }

    /// The chat's messages cannot be read, so the messages of unknown outcome cannot be resolved. All of them become
    /// dead letters.
    fn unreadable(
        &self,
        claim: &Claim,
        events: &[Pending],
        failure: &Failure,
    ) -> impl Iterator<Item = EventOutcome> {
        let replay_until = self.delivery.session.replay_until.get();
        let unknown = events
            .iter()
            .filter(move |event| claim.is_outcome_unknown(event, replay_until));
        unknown.map(|event| {
            let attempts = Attempts {
                failed: event.attempts.failed.saturating_add(1),
                outcome_unknown: true,
                ..event.attempts
            };
            let failure = failure.clone();
            EventOutcome::of(
                event,
                Outcome::DeadLetter {
                    attempts,
                    failure,
                    permanent: false,
                },
            )
        })
    }

    /// The outcome of an event after a failed attempt, which is also logged.
    fn failed(
        &self,
        conversation: &Conversation,
        event: &Pending,
        error: &AttemptError,
        now: Millis,
    ) -> Outcome {
        let outcome = self.outcome(conversation.id, event.attempts, error, now);
        let (Outcome::Retry { attempts, .. } | Outcome::DeadLetter { attempts, .. }) = &outcome
        else {
            return outcome;
        };
        let failure = error.logged();
        // A macro, so that each message is a call site of its own: the log limits the lines of each call site.
        macro_rules! log {
            ($so:expr, $message:literal) => {
                log_at!(
                    $so,
                    conversation = conversation.bigchat_id, event = event.id.0, kind = %event.payload.kind(),
                    chat = conversation.observed.chat.map(tracing::field::display), attempts = attempts.failed,
                    reason = %failure.reason, request = %failure.request, response = %failure.response,
                    $message
                )
            };
        }
        match &outcome {
            Outcome::DeadLetter { .. } if error.is_rejection() => {
                log!(
                    true,
                    "OurAPI permanently rejects an event; see `bigchat-sync failed list`"
                );
            }
            Outcome::DeadLetter { .. } => {
                log!(
                    true,
                    "an event failed again while others got through; see `bigchat-sync failed list`"
                );
            }
            _ => {
                // Only the first failure is news, and the first that counts as the event's own. An outage is logged
                // separately.
                let is_first = event.attempts == Attempts::default();
                let is_news = is_first || event.attempts.counted == 0 && attempts.counted == 1;
                log!(
                    is_news && !self.is_logged_otherwise(error),
                    "delivery failed; it will be retried"
                );
            }
        }
        outcome
    }

    fn outcome(
        &self,
        conversation: ConversationId,
        before: Attempts,
        error: &AttemptError,
        now: Millis,
    ) -> Outcome {
        let settings = &self.delivery.settings;
        let bigchat = self.delivery.source.http();
        let circumstances = Circumstances {
            now,
            bigchat_is_failing: bigchat.is_failing(),
            bigchat_retry_after: bigchat.rate_limited_until(now),
            request_timeout: settings.request_timeout,
            poll_interval: settings.poll_interval,
            fraction: rand::random(),
        };
        attempts::outcome(
            before,
            error,
            conversation,
            &self.writes,
            &settings.retry(),
            &circumstances,
        )
    }

    /// Handles a failed read of a chat without waiting events. Returns the number of failures while OurAPI was up, and
    /// the time of the next attempt.
    fn read_failed(
        &mut self,
        conversation: &Conversation,
        error: &AttemptError,
        is_up: bool,
        now: Millis,
    ) -> (u32, Millis) {
        let failure = error.logged();
        let is_failing = !is_up && self.delivery.our_api.http().is_failing();
        log_at!(
            !is_failing,
            conversation = conversation.bigchat_id,
            chat = conversation.observed.chat.map(tracing::field::display),
            reason = %failure.reason, request = %failure.request, response = %failure.response,
            "a chat could not be verified; it will be retried"
        );
        let failed = self.failed_reads.entry(conversation.id).or_default();
        *failed = failed.saturating_add(u32::from(!is_failing));
        let policy = self.delivery.settings.retry();
        // Half of the wait is fixed, since no event waits for the read.
        let wait = policy.backoff((*failed).max(1), 0.5 + rand::random::<f64>() / 2.0);
        (*failed, now.plus(wait))
    }

    /// Whether the cause is logged already: an outage or a loss is logged once.
    fn is_logged_otherwise(&self, error: &AttemptError) -> bool {
        match error {
            AttemptError::Read(error) | AttemptError::Write(error) => {
                let delivery = &self.delivery;
                match error.api {
                    Api::BigChat => delivery.source.http().is_failing(),
                    Api::OurApi => delivery.our_api.http().is_failing(),
                }
            }
            AttemptError::DataLost(_) | AttemptError::Panicked => true,
            AttemptError::Journal(_) => false,
        }
    }
}

/// Finds an event by its id. `events` is sorted by id.
fn find(events: &[Pending], id: EventId) -> Option<&Pending> {
    let at = events.binary_search_by_key(&id, |event| event.id).ok()?;
    events.get(at)
}

fn delivered(conversation: &Conversation, event: &Pending, effect: Effect) -> Outcome {
    tracing::debug!(
        conversation = conversation.bigchat_id,
        event = event.id.0,
        kind = %event.payload.kind(),
        at = %event.at,
        chat = conversation.observed.chat.map(tracing::field::display),
        effect = effect.name(),
        "delivered"
    );
    Outcome::Delivered(effect)
}
