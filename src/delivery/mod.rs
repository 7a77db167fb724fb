//! Delivery: takes what is due from the journal, hands it to the handlers, and settles what came of it.
//!
//! A conversation is one piece of work at a time, so that its events keep their order; several conversations are in
//! work side by side, up to the setting. A claim is kept before anything is sent, and a settlement goes into the
//! same transaction as the next claims. That takes place beside the work: what was claimed before is begun meanwhile,
//! and what is done meanwhile is settled by the next one. So under load one commit serves many conversations, the slower
//! the disk the more, and none waits for it.
//! While OurAPI is down, one probe at a time takes the place of every event's own retry.

mod keep;
mod outcomes;
mod verdict;

use std::collections::{HashMap, VecDeque};
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::{self, JoinSet};
use tokio::time::{Instant, sleep, timeout_at};

use crate::context::Context;
use crate::conversation::{Settlement, Work};
use crate::handlers::{self, Handled};
use crate::journal::{Claim, Claimable, Claimed, JournalError, STORAGE_PAUSE, Throttles};
use crate::retry::{Allowance, Breaker};
use crate::time::Millis;

use self::keep::{Keeping, Kept, ToKeep};
use self::verdict::Successes;

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

impl Delivery {
    fn new(context: Arc<Context>) -> Self {
        let successes = Successes::since(context.session.successes);
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
            probes: allowance == Allowance::Probe,
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

/// Waits until it is kept; for ever if there is nothing.
async fn kept(keeping: &mut Option<Keeping>) -> Kept {
    match keeping {
        Some(keeping) => keeping.await,
        None => pending().await,
    }
}
