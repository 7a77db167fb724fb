//! What came of the work: each event's outcome, what it tells of OurAPI's health, and what of it is logged.

use tokio::task::{self, JoinError};
use tokio::time::Instant;

use super::{Delivery, verdict};
use crate::conversation::{Attempts, Conversation, Outcome, Sent, Settlement, Waiting};
use crate::handlers::{Handled, Stopped};
use crate::health::Service;
use crate::journal::STORAGE_PAUSE;
use crate::log::telling;
use crate::our_api::Trouble;
use crate::setback::Setback;
use crate::time::Millis;

impl Delivery {
    pub(super) fn finished(&mut self, handled: Result<(task::Id, Handled), JoinError>) {
        self.look = true;
        match handled {
            Ok((task, handled)) => {
                self.tasks.remove(&task);
                self.settle(handled);
            }
            Err(error) => {
                tracing::error!(reason = %error, "a handler has panicked: what it was sending is looked up");
                self.context.metrics.panicked();
                self.abandoned.extend(self.tasks.remove(&error.id()));
            }
        }
    }

    fn settle(&mut self, handled: Handled) {
        let now = Millis::now();
        let Handled {
            conversation,
            done,
            stopped,
            writes,
            finding,
        } = handled;
        self.successes.note(conversation.id, writes);
        self.note_health(
            &done,
            stopped.as_ref().map(|stopped| &stopped.why),
            writes,
            now,
        );
        let mut outcomes = Vec::with_capacity(done.len() + 1);
        let metrics = &self.context.metrics;
        for (event, result) in done {
            let outcome = match result {
                Ok(sent) => Outcome::Delivered(sent),
                Err(refusal) => refused(&conversation, &event, &refusal),
            };
            metrics.attempted(event.what.kind(), &outcome);
            outcomes.push(event.settled(outcome));
        }
        match stopped {
            None => {
                self.unchecked.remove(&conversation.id);
            }
            Some(Stopped { at: None, why }) => {
                let failure = why.logged();
                telling!(
                    !self.breaker.is_down(),
                    conversation = conversation.bigchat_id, chat = conversation.chat.id.map(tracing::field::display),
                    reason = %failure.reason, request = %failure.request, response = %failure.response,
                    "its chat could not be checked; it is checked again"
                );
                let (tries, again_at) = self.unchecked.entry(conversation.id).or_default();
                *tries += 1;
                let policy = self.context.settings.retry();
                // Half of it is fixed: nobody waits for it as for an event.
                let fraction = 0.5 + rand::random::<f64>() / 2.0;
                *again_at = now.plus(policy.backoff(*tries, fraction));
            }
            Some(Stopped {
                at: Some(event),
                why: Setback::Journal(error),
            }) => {
                tracing::error!(
                    conversation = conversation.bigchat_id, event = event.id, kind = %event.what.kind(),
                    reason = %error, "delivery was cut short by the journal"
                );
                // Nothing of it is the event's own.
                let failure = Setback::Journal(error).failure();
                let (attempts, next_at) = (event.attempts, now.plus(STORAGE_PAUSE));
                outcomes.push(event.settled(Outcome::Waiting {
                    attempts,
                    next_at,
                    failure,
                }));
            }
            Some(Stopped {
                at: Some(event),
                why,
            }) => {
                let verdict = self.verdict(&conversation, &event, &why, now);
                let metrics = &self.context.metrics;
                metrics.attempted(event.what.kind(), &verdict);
                if why.in_doubt() {
                    metrics.unknown_outcome();
                }
                outcomes.push(event.settled(verdict));
            }
        }
        self.done_since.get_or_insert_with(Instant::now);
        self.settlements.push(Settlement {
            conversation,
            outcomes,
            finding,
        });
    }

    /// What a failed attempt means for its event: it waits, or has spent its attempts while others got through.
    fn verdict(
        &self,
        conversation: &Conversation,
        event: &Waiting,
        setback: &Setback,
        now: Millis,
    ) -> Outcome {
        let attempts = verdict::attempts_after(
            event.attempts,
            setback,
            conversation.id,
            &self.successes,
            self.context.bigchat_is_down(),
        );
        let policy = self.context.settings.retry();
        let failed = attempts.counted >= policy.max_attempts;
        let failure = setback.failure();
        // Once when it begins, once when it turns out to be the event's own; of an outage is told as such.
        let news = attempts.tries == 1 || event.attempts.counted == 0 && attempts.counted == 1;
        let logged = setback.logged();
        telling!(
            failed || news && !self.is_told_of(setback),
            conversation = conversation.bigchat_id, event = event.id, kind = %event.what.kind(),
            chat = conversation.chat.id.map(tracing::field::display), tries = attempts.tries,
            reason = %logged.reason, request = %logged.request, response = %logged.response,
            "{}", if failed { "failed again while others got through; decide with `bigchat-sync failed`" } else { "not delivered yet; it is tried again" }
        );
        if failed {
            Outcome::Failed { attempts, failure }
        } else {
            let asked_until = match setback {
                Setback::BigChat(_) => self.context.bigchat.http().throttled_until(now),
                // While OurAPI is to be left alone nothing is begun anyhow.
                _ => None,
            };
            let timeout = self.context.settings.request_timeout;
            let wait = verdict::wait(setback, attempts.tries, &policy, timeout, rand::random());
            let next_at = now.plus(wait).max(asked_until.unwrap_or_default());
            Outcome::Waiting {
                attempts,
                next_at,
                failure,
            }
        }
    }

    /// Whether it comes of an outage or a loss, which the log tells of by itself.
    fn is_told_of(&self, setback: &Setback) -> bool {
        match setback {
            Setback::BigChat(_) => self.context.bigchat_is_down(),
            Setback::Rebuilding(_) => true,
            _ => self.breaker.is_down(),
        }
    }

    fn note_health(
        &mut self,
        done: &[(Waiting, Result<Sent, Setback>)],
        setback: Option<&Setback>,
        writes: u32,
        now: Millis,
    ) {
        let answers = self.context.our_api.answers();
        let looked = setback.is_none() && answers > self.answers;
        self.answers = answers;
        let answered = looked || writes > 0 || done.iter().any(|(_, result)| result.is_err());
        let (well, ill) = match setback {
            Some(Setback::OurApi { error, .. }) if error.trouble.may_be_outage() => {
                (false, Some(error))
            }
            Some(Setback::OurApi { error, .. }) => {
                (!matches!(error.trouble, Trouble::Throttled { .. }), None)
            }
            Some(Setback::Rebuilding(_)) => (true, None),
            Some(Setback::BigChat(_) | Setback::Journal(_)) | None => (false, None),
        };
        let health = self.context.health(Service::OurApi);
        let since = self.breaker.since();
        if answered || well {
            health.well(now);
            if self.breaker.succeeded() {
                tracing::info!(%since, "OurAPI is back");
            }
        }
        let Some(error) = ill else { return };
        let exchange = error.exchange.logged();
        if self
            .breaker
            .failed(now, &self.context.settings.retry(), rand::random())
        {
            tracing::error!(
                reason = %error.trouble, request = %exchange.request, response = %exchange.response,
                url = %self.context.our_api.http().base(),
                "OurAPI is down; everything waits, and one request at a time tells when it is back"
            );
        }
        if self.breaker.is_down() {
            health.down(
                &error.trouble.to_string(),
                &exchange.response,
                self.breaker.since(),
            );
        }
    }
}

/// OurAPI will never accept the event.
fn refused(conversation: &Conversation, event: &Waiting, refusal: &Setback) -> Outcome {
    let failure = refusal.failure();
    let attempts = Attempts {
        tries: event.attempts.tries.saturating_add(1),
        ..event.attempts
    };
    let logged = refusal.logged();
    tracing::warn!(
        conversation = conversation.bigchat_id, event = event.id, kind = %event.what.kind(),
        chat = conversation.chat.id.map(tracing::field::display), tries = attempts.tries,
        reason = %logged.reason, request = %logged.request, response = %logged.response,
        "failed for good; decide with `bigchat-sync failed`"
    );
    Outcome::Failed { attempts, failure }
}
