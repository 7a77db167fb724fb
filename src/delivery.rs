//! Delivery: takes what is due from the journal, hands it to the handlers, and settles what came of it.
//!
//! A conversation is one piece of work at a time, so that its events keep their order; several conversations are in
//! work side by side, up to the setting. A claim is kept before anything is sent, and a settlement goes into the
//! same transaction as the next claims. That takes place beside the work: what was claimed before is begun meanwhile,
//! and what is done meanwhile is settled by the next one. So under load one commit serves many conversations, the slower
//! the disk the more, and none waits for it.
//! While OurAPI is down, one probe at a time takes the place of every event's own retry.

mod keep;

use std::collections::{HashMap, VecDeque};
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::{self, JoinError, JoinSet};
use tokio::time::{Instant, sleep, timeout_at};

use crate::bigchat::BigChatError;
use crate::context::Context;
use crate::conversation::{Attempts, Conversation, Outcome, Sent, Settlement, Waiting, Work};
use crate::handlers::{self, Handled, Stopped};
use crate::health::Service;
use crate::journal::{Claim, Claimable, Claimed, JournalError, STORAGE_PAUSE, Throttles};
use crate::log::telling;
use crate::our_api::Trouble;
use crate::retry::{Allowance, Breaker};
use crate::setback::Setback;
use crate::time::Millis;

use self::keep::{Keeping, Kept, ToKeep};

/// How many conversations are claimed ahead of those in work: enough that nobody waits for a commit, few enough that
/// a crash leaves little to be looked up.
const AHEAD: usize = 64;

/// And how many bytes of messages, so that long ones do not fill the memory.
const BYTES_AHEAD: usize = 2 << 20;

/// How many conversations that are done may wait to be settled together, as long as there is enough to do.
const TOGETHER: usize = 32;

/// And for how long.
const SETTLED_WITHIN: Duration = Duration::from_millis(100);

/// How often the journal is asked for what is due, if nothing else tells: commands beside the daemon write to it too.
const LOOK: Duration = Duration::from_secs(1);

/// How long requests in flight may take once the daemon is to stop: to either side, since what BigChat was asked is told
/// only once.
pub const DRAIN: Duration = Duration::from_secs(8);

/// Until when to deliver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Until the daemon is to stop.
    Stopped,
    /// Until nothing is due any more, or nothing can be delivered now.
    Done,
}

/// Delivers until then.
pub async fn run(context: Arc<Context>, until: Until) {
    Delivery::new(context).run(until).await;
}

/// Delivers nothing; only compares chats with the journal where that is asked for, until the daemon is to stop.
pub async fn run_checks(context: Arc<Context>) {
    let mut delivery = Delivery::new(context);
    delivery.only_checks = true;
    delivery.run(Until::Stopped).await;
}

struct Delivery {
    context: Arc<Context>,
    breaker: Breaker,
    ready: VecDeque<Work>,
    in_work: JoinSet<Handled>,
    /// Which conversation each task works on.
    tasks: HashMap<task::Id, i64>,
    /// Conversations whose handler has panicked.
    abandoned: Vec<i64>,
    /// No event is delivered.
    only_checks: bool,
    settlements: Vec<Settlement>,
    /// Since when the first of them has been done.
    done_since: Option<Instant>,
    /// What is being kept in the journal. One at a time: what one has settled the next may claim.
    keeping: Option<Keeping>,
    /// Whether there may be something to be kept or claimed.
    look: bool,
    /// For how long there is nothing, unless something happens.
    rest: Duration,
    successes: Successes,
    /// Conversations whose chats could not be looked after: how often one time after the other, and until when they
    /// are put off.
    unchecked: HashMap<i64, (u32, Millis)>,
    /// How many usable answers of OurAPI are known of.
    answers: u64,
    last_look: Millis,
    clock_set_back: bool,
    throttles: Throttles,
    /// As it is kept.
    slowest: Duration,
}

/// The writes that have succeeded, as far as an event needs to know whether another conversation's has since.
#[derive(Debug, Clone, Copy)]
struct Successes {
    count: i64,
    /// The conversation of the latest, and the count with it.
    last: Option<(i64, i64)>,
    /// The count with the latest of another conversation than that.
    last_of_another: Option<i64>,
}

impl Successes {
    fn note(&mut self, conversation: i64, writes: u32) {
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
    fn another_since(&self, conversation: i64, count: i64) -> bool {
        let latest = match self.last {
            Some((other, count)) if other != conversation => Some(count),
            _ => self.last_of_another,
        };
        latest.is_some_and(|latest| latest > count)
    }
}

impl Delivery {
    fn new(context: Arc<Context>) -> Self {
        let successes = Successes {
            count: context.session.successes,
            last: None,
            last_of_another: None,
        };
        let (throttles, slowest) = (context.throttles(), context.session.slowest);
        Self {
            context,
            breaker: Breaker::default(),
            ready: VecDeque::new(),
            in_work: JoinSet::new(),
            tasks: HashMap::new(),
            abandoned: Vec::new(),
            only_checks: false,
            settlements: Vec::new(),
            done_since: None,
            keeping: None,
            look: true,
            rest: LOOK,
            successes,
            unchecked: HashMap::new(),
            answers: 0,
            last_look: Millis::now(),
            clock_set_back: false,
            throttles,
            slowest,
        }
    }

    async fn run(mut self, until: Until) {
        while !self.context.stopping.is_cancelled() {
            let now = Millis::now();
            let allowance = self.allowance(now);
            self.begin(allowance);
            let wait = self.settlement_may_wait(allowance);
            if self.keeping.is_none() && self.look && wait.is_zero() {
                self.look = false;
                self.rest = LOOK;
                let to_keep = self.what_to_keep(allowance, now);
                if !to_keep.is_nothing() {
                    self.keeping = Some(to_keep.keep(Arc::clone(&self.context)));
                }
            }
            let rest = match allowance {
                Allowance::NotBefore(then) => self.rest.min(then.since(now)),
                Allowance::Full | Allowance::Probe if wait.is_zero() => self.rest,
                Allowance::Full | Allowance::Probe => self.rest.min(wait),
            };
            if until == Until::Done && self.keeping.is_none() && self.in_work.is_empty() {
                tracing::debug!(wait = ?rest, "nothing more is due");
                break;
            }
            let context = Arc::clone(&self.context);
            tokio::select! {
                // Always in this order, so that a run can be had again exactly.
                biased;
                Some(handled) = self.in_work.join_next_with_id() => self.finished(handled),
                kept = kept(&mut self.keeping) => self.kept(kept),
                () = context.work.notified() => self.look = true,
                () = sleep(rest) => self.look = true,
                () = context.stopping.cancelled() => {}
            }
            while let Some(handled) = self.in_work.try_join_next_with_id() {
                self.finished(handled);
            }
            self.context.pulse.delivering.beat(LOOK);
            if self.in_work.is_empty() {
                self.context.pulse.handling.rest();
            }
        }
        self.drain().await;
    }

    fn allowance(&self, now: Millis) -> Allowance {
        let our_api = &self.context.our_api;
        match (our_api.http().throttled_until(now), our_api.room(now)) {
            (Some(until), _) | (None, Err(until)) => Allowance::NotBefore(until),
            (None, Ok(_)) => self.breaker.allowance(now),
        }
    }

    fn at_once(&self, allowance: Allowance) -> usize {
        match allowance {
            Allowance::Full => {
                usize::from(self.context.our_api.room(Millis::now()).unwrap_or_default())
            }
            Allowance::Probe => 1,
            Allowance::NotBefore(_) => 0,
        }
    }

    fn begin(&mut self, allowance: Allowance) {
        while self.in_work.len() < self.at_once(allowance)
            && let Some(work) = self.ready.pop_front()
        {
            let context = Arc::clone(&self.context);
            let conversation = work.conversation.id;
            let task = self.in_work.spawn(async move {
                let handling = &context.pulse.handling;
                handling
                    .beat_for_one(handlers::handle(&context, work))
                    .await
            });
            self.tasks.insert(task.id(), conversation);
        }
    }

    /// For how long what was done may wait for more, to be settled together: a commit is dear, and nobody waits for it as
    /// long as there is work that was claimed before.
    fn settlement_may_wait(&self, allowance: Allowance) -> Duration {
        let may_wait = allowance == Allowance::Full
            && (1..TOGETHER).contains(&self.settlements.len())
            && self.ready.len() * 2 > AHEAD;
        match self.done_since {
            Some(since) if may_wait => {
                SETTLED_WITHIN.saturating_sub(Instant::now().saturating_duration_since(since))
            }
            _ => Duration::ZERO,
        }
    }

    /// What is to be kept now: what was done, and claims for what is done next; and what has to be besides: claims that
    /// are not begun now go back, and throttles outlast a restart.
    fn what_to_keep(&mut self, allowance: Allowance, now: Millis) -> ToKeep {
        let unbegun = match allowance {
            Allowance::Full => Vec::new(),
            Allowance::Probe | Allowance::NotBefore(_) => self.ready.drain(..).collect(),
        };
        let settlements = Arc::new(std::mem::take(&mut self.settlements));
        self.done_since = None;
        let claim = self.claim(allowance, !settlements.is_empty());
        let (throttles, slowest) = (self.context.throttles(), self.slowest_to_keep());
        let differs = slowest > self.slowest * 5 / 4 || slowest < self.slowest / 2;
        if now < self.last_look {
            tracing::warn!("this machine's clock was set back: what waits is tried now");
            self.clock_set_back = true;
        }
        self.last_look = now;
        let to_keep = ToKeep {
            unbegun,
            abandoned: std::mem::take(&mut self.abandoned),
            throttles: (throttles != self.throttles).then_some((self.throttles, throttles)),
            slowest: differs.then_some((self.slowest, slowest)),
            clock_set_back: std::mem::take(&mut self.clock_set_back),
            settlements,
            successes: self.successes.count,
            claim,
            now,
        };
        self.throttles = throttles;
        if differs {
            self.slowest = slowest;
        }
        to_keep
    }

    /// What is to be claimed now, if anything: many conversations at a time, or along with settlements, since a commit is
    /// dear.
    fn claim(&self, allowance: Allowance, settles: bool) -> Option<Claim> {
        let ahead = match allowance {
            Allowance::Full => AHEAD,
            Allowance::Probe | Allowance::NotBefore(_) => 0,
        };
        let wanted = (self.at_once(allowance) + ahead).saturating_sub(self.in_work.len());
        let conversations = wanted.saturating_sub(self.ready.len());
        let bytes = BYTES_AHEAD.saturating_sub(self.ready.iter().map(Work::bytes).sum());
        let is_some = conversations > 0 && bytes > 0;
        let is_much = conversations * 2 > wanted && bytes * 2 > BYTES_AHEAD;
        let what = if self.only_checks {
            Claimable::Checks
        } else {
            Claimable::All
        };
        let put_off = self.unchecked.iter().map(|(id, (_, until))| (*id, *until));
        (is_some && (is_much || settles)).then(|| Claim {
            what,
            conversations,
            bytes,
            put_off: put_off.collect(),
        })
    }

    /// The journal has kept what it was given, or not all of it. What it has not is not forgotten: it is kept when the
    /// journal can be written again.
    fn kept(&mut self, (left, claimed): Kept) {
        self.keeping = None;
        self.ready.extend(left.unbegun);
        self.abandoned.extend(left.abandoned);
        self.throttles = left.throttles.map_or(self.throttles, |(before, _)| before);
        self.slowest = left.slowest.map_or(self.slowest, |(before, _)| before);
        self.clock_set_back |= left.clock_set_back;
        let settlements = Arc::unwrap_or_clone(left.settlements);
        self.settlements.splice(0..0, settlements);
        let refused = &self.context.storage.delivery;
        match claimed {
            Ok(Claimed { work, next_due }) => {
                if refused.swap(false, Ordering::Relaxed) {
                    tracing::info!("the journal can be written again");
                }
                self.ready.extend(work);
                let due = next_due.map(|due| due.since(left.now));
                self.rest = due.map_or(LOOK, |due| due.min(LOOK));
            }
            Err(error) => {
                if !refused.swap(true, Ordering::Relaxed) {
                    tracing::error!(reason = %error, "the journal cannot be written: delivery pauses until it can");
                }
                self.rest = STORAGE_PAUSE;
            }
        }
    }

    /// How long answers take, if that is so long that what is on its way may still be after the pause there is anyhow.
    fn slowest_to_keep(&self) -> Duration {
        let settings = &self.context.settings;
        let slowest = self.context.our_api.slowest().min(settings.request_timeout);
        if slowest * 2 > settings.retry_initial {
            slowest
        } else {
            Duration::ZERO
        }
    }

    fn finished(&mut self, handled: Result<(task::Id, Handled), JoinError>) {
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
                let failure = why.failure();
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
        let before = event.attempts;
        let others_got_through = before
            .successes
            .is_some_and(|count| self.successes.another_since(conversation.id, count));
        let counts = others_got_through
            && match setback {
                Setback::OurApi { error, .. } => {
                    !matches!(error.trouble, Trouble::Throttled { .. })
                }
                // That OurAPI takes others' writes says nothing of BigChat.
                Setback::BigChat(BigChatError::Throttled { .. } | BigChatError::Denied(_)) => false,
                Setback::BigChat(_) => !self.context.bigchat_is_down(),
                Setback::Journal(_) | Setback::Rebuilding(_) => false,
            };
        let attempts = Attempts {
            tries: before.tries.saturating_add(1),
            counted: before.counted + u32::from(counts),
            successes: Some(self.successes.count),
            in_doubt: before.in_doubt || setback.in_doubt(),
        };
        let policy = self.context.settings.retry();
        let failure = setback.failure();
        let failed = attempts.counted >= policy.max_attempts;
        let mut wait = policy.backoff(attempts.tries, rand::random());
        if setback.in_doubt() {
            // It may still be on its way: it is not looked for before it can have arrived.
            let arrives = if setback.is_late() {
                self.context.settings.request_timeout
            } else {
                policy.initial / 2
            };
            wait = wait.max(arrives);
        }
        // Once when it begins, once when it turns out to be the event's own; of an outage is told as such.
        let news = attempts.tries == 1 || counts && attempts.counted == 1;
        telling!(
            failed || news && !self.is_told_of(setback),
            conversation = conversation.bigchat_id, event = event.id, kind = %event.what.kind(),
            chat = conversation.chat.id.map(tracing::field::display), tries = attempts.tries,
            reason = %failure.reason, request = %failure.request, response = %failure.response,
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
        if self
            .breaker
            .failed(now, &self.context.settings.retry(), rand::random())
        {
            tracing::error!(
                reason = %error.trouble, request = %error.exchange.request, response = %error.exchange.response,
                url = %self.context.our_api.http().base(),
                "OurAPI is down; everything waits, and one request at a time tells when it is back"
            );
        }
        if self.breaker.is_down() {
            health.down(
                &error.trouble.to_string(),
                &error.exchange.response,
                self.breaker.since(),
            );
        }
    }

    /// Lets what is in work end within a bound, and keeps what came of it. What does not end stays claimed: its
    /// outcome is unknown, and is looked up at the next start.
    async fn drain(&mut self) {
        let deadline = Instant::now() + DRAIN;
        // Where the journal hangs, what was given to it stays claimed as well.
        if let Some(keeping) = self.keeping.take()
            && let Ok(left) = timeout_at(deadline, keeping).await
        {
            self.kept(left);
        }
        while !self.in_work.is_empty() {
            match timeout_at(deadline, self.in_work.join_next_with_id()).await {
                Ok(Some(handled)) => self.finished(handled),
                Ok(None) => break,
                Err(_) => {
                    tracing::warn!(
                        conversations = self.in_work.len(),
                        "not answered in time: looked up at the next start"
                    );
                    self.context.our_api.give_up(self.in_work.len());
                    self.in_work.abort_all();
                    break;
                }
            }
        }
        let settlements = std::mem::take(&mut self.settlements);
        let unbegun: Vec<i64> = self
            .ready
            .drain(..)
            .map(|work| work.conversation.id)
            .collect();
        let successes = self.successes.count;
        let throttles = self.context.throttles();
        let kept = self.context.journal.with(move |store| {
            store.note_throttles(throttles)?;
            store.release(&unbegun, Millis::now())?;
            store.settle_and_claim(&settlements, successes, None, Millis::now())
        });
        if let Err(error) = timeout_at(deadline + STORAGE_PAUSE, kept)
            .await
            .unwrap_or(Err(JournalError::Closed))
        {
            tracing::error!(reason = %error, "what was delivered last could not be kept: it is looked up at the next start");
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
    tracing::warn!(
        conversation = conversation.bigchat_id, event = event.id, kind = %event.what.kind(),
        chat = conversation.chat.id.map(tracing::field::display), tries = attempts.tries,
        reason = %failure.reason, request = %failure.request, response = %failure.response,
        "failed for good; decide with `bigchat-sync failed`"
    );
    Outcome::Failed { attempts, failure }
}

/// Waits until it is kept; for ever if there is nothing.
async fn kept(keeping: &mut Option<Keeping>) -> Kept {
    match keeping {
        Some(keeping) => keeping.await,
        None => pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_counts_once_another_conversation_got_through() {
        let mut successes = Successes {
            count: 5,
            last: None,
            last_of_another: None,
        };
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
}
