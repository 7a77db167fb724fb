//! The scheduler: hands out due conversations, never one that is already claimed. At most as many conversations are in
//! progress as requests may be in flight.

use std::collections::{HashMap, HashSet, VecDeque};
use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;

use super::Delivery;
use super::RunMode;
use super::committer::{MAX_CLAIMED, Released};
use super::reconcile::{Reconciliation, reconcile};
use super::report::Reporter;
use crate::domain::ids::ConversationId;
use crate::domain::progress::{IdlePass, Report, Work};
use crate::domain::time::Millis;
use crate::http::{Circuit, RETRY_AFTER_MAX};
use crate::journal::{ClaimRequest, Claimed, JournalError, STORAGE_PAUSE};

/// How many conversations are loaded ahead of the workers.
const AHEAD: usize = 256;

/// How many bytes of message text are loaded ahead, so that memory stays bounded.
const BYTES_AHEAD: usize = 2 << 20;

/// Work loaded ahead is loaded again after this time, because its conversation may have been forgotten.
const LOADED_FOR: Duration = Duration::from_secs(5);

/// How often the journal is queried for due conversations even without a notification. A change of this machine's clock
/// can make some conversations due earlier than expected.
const QUERY_EVERY: Duration = Duration::from_secs(10);

/// After a verification in idle time, the next one waits for this many times as long as the former took.
const IDLE_FACTOR: u32 = 9;

/// The journal's response.
type Fetched = Result<Claimed, JournalError>;

type Fetch = Pin<Box<dyn Future<Output = Fetched> + Send>>;

/// Work that has ended, and the time when it began if it was a verification in idle time.
type Done = (Option<Instant>, Reconciliation);

/// The pass that verifies all chats in idle time, one at a time.
struct Pass {
    /// `None`: no chat is verified in idle time.
    settings: Option<IdlePass>,
    /// The earliest time at which the next verification may begin.
    not_before: Instant,
    /// Whether the latest query of the journal included the pass.
    was_queried: bool,
    /// Whether the journal had a chat to verify in idle time when last queried.
    is_unfinished: bool,
    /// Cancelled when the verification in progress must give way to events.
    give_way: CancellationToken,
}

impl Pass {
    /// Sets the pause after a verification that began at `began` and has just ended.
    fn ended(&mut self, began: Instant) {
        self.not_before = Instant::now() + began.elapsed() * IDLE_FACTOR;
    }
}

pub(super) struct Scheduler {
    delivery: Arc<Delivery>,
    mode: RunMode,
    /// Claimed work that has not been started, each with the time of loading.
    ready: VecDeque<(Instant, Work)>,
    /// Claimed: ready, in progress, or reported and not committed yet.
    claimed: HashSet<ConversationId>,
    at_work: JoinSet<Done>,
    /// How many conversations stay claimed until the next start, because their reports cannot be committed.
    set_aside: usize,
    /// Conversations of which a write timed out, and the time until which the write may be carried out.
    timed_out: HashMap<ConversationId, Instant>,
    reports: mpsc::Sender<Report>,
    released: mpsc::UnboundedReceiver<Released>,
    fetch: Option<Fetch>,
    /// Whether there may be a due conversation that is not claimed.
    may_be_due: bool,
    /// The time until the next query without a notification.
    query_in: Duration,
    reporter: Reporter,
    pass: Pass,
    last_query: Millis,
}

impl Scheduler {
    pub(super) fn new(
        delivery: Arc<Delivery>,
        mode: RunMode,
        reports: mpsc::Sender<Report>,
        released: mpsc::UnboundedReceiver<Released>,
    ) -> Self {
        let pass = delivery.settings.idle_pass();
        Self {
            reporter: Reporter::new(Arc::clone(&delivery)),
            delivery,
            mode,
            ready: VecDeque::new(),
            claimed: HashSet::new(),
            at_work: JoinSet::new(),
            set_aside: 0,
            timed_out: HashMap::new(),
            reports,
            released,
            fetch: None,
            may_be_due: true,
            query_in: QUERY_EVERY,
            pass: Pass {
                settings: pass.filter(|_| mode == RunMode::All),
                not_before: Instant::now(),
                was_queried: false,
                is_unfinished: false,
                give_way: CancellationToken::new(),
            },
            last_query: Millis::now(),
        }
    }

    pub(super) async fn run(&mut self) {
        while !self.delivery.stopping.is_cancelled() {
            let now = Millis::now();
            let circuit = self.circuit(now);
            self.hand_out(circuit);
            self.fetch(circuit, now);
            if self.mode == RunMode::Once && self.is_done(circuit) {
                break;
            }
            let rest = self.rest(circuit, now);
            let delivery = Arc::clone(&self.delivery);
            tokio::select! {
                // A fixed order makes a simulation reproducible.
                biased;
                Some(done) = self.at_work.join_next() => self.finished(done),
                Some(released) = self.released.recv() => self.release(released),
                fetched = fetched(&mut self.fetch) => self.fetched(fetched),
                () = delivery.work_available.notified() => self.may_be_due = true,
                () = sleep(rest) => {
                    self.may_be_due = true;
                    self.query_in = QUERY_EVERY;
                }
                () = delivery.stopping.cancelled() => {}
            }
            while let Some(done) = self.at_work.try_join_next() {
                self.finished(done);
            }
            self.delivery.liveness.delivering.beat(QUERY_EVERY);
            if self.at_work.is_empty() {
                self.delivery.liveness.handling.rest();
            }
        }
    }

    /// How long to wait if no notification arrives.
    fn rest(&self, circuit: Circuit, now: Millis) -> Duration {
        let rest = match circuit {
            Circuit::Open { until } => self.query_in.min(until.since(now)),
            Circuit::Closed | Circuit::HalfOpen => {
                let pause = self.pass.not_before - Instant::now();
                let waits = self.pass.is_unfinished && self.is_unoccupied() && self.fetch.is_none();
                if waits {
                    self.query_in.min(pause)
                } else {
                    self.query_in
                }
            }
        };
        // Times that have passed do not count. The next query removes them, but it may not be possible yet.
        let held = self.timed_out.values().map(|until| *until - Instant::now());
        held.filter(|left| !left.is_zero())
            .fold(rest, Duration::min)
    }

    fn is_unoccupied(&self) -> bool {
        self.claimed.len() == self.set_aside
    }

    /// Whether nothing is due, or nothing can be delivered now.
    fn is_done(&self, circuit: Circuit) -> bool {
        let nothing_is_due = !self.may_be_due && self.is_unoccupied();
        self.at_work.is_empty()
            && self.fetch.is_none()
            && (nothing_is_due || self.limit(circuit) == 0)
    }

    /// How many reports are not committed yet.
    fn uncommitted(&self) -> usize {
        self.claimed
            .len()
            .saturating_sub(self.ready.len() + self.at_work.len() + self.set_aside)
    }

    /// Holds back a conversation while a write that timed out may still be carried out.
    fn hold(&mut self, conversation: ConversationId) {
        let until = Instant::now() + self.delivery.settings.request_timeout;
        self.timed_out.insert(conversation, until);
    }

    fn circuit(&self, now: Millis) -> Circuit {
        let our_api = &self.delivery.our_api;
        // This also releases the permits and the lock of timed-out requests that can no longer be carried out.
        let free = our_api.free_permits(now);
        if our_api.paused().is_some() {
            let until = now.plus(QUERY_EVERY);
            return Circuit::Open { until };
        }
        match (our_api.http().rate_limited_until(now), free) {
            (Some(until), _) | (None, Err(until)) => Circuit::Open { until },
            (None, Ok(_)) => our_api.http().circuit(now),
        }
    }

    /// How many conversations may be in progress.
    fn limit(&self, circuit: Circuit) -> usize {
        // While reports cannot be committed, no work is begun.
        if self.uncommitted() > 0 && self.delivery.storage.delivery.is_refused() {
            return 0;
        }
        match circuit {
            Circuit::Closed => usize::from(
                self.delivery
                    .our_api
                    .free_permits(Millis::now())
                    .unwrap_or_default(),
            ),
            Circuit::HalfOpen => 1,
            Circuit::Open { .. } => 0,
        }
    }

    fn hand_out(&mut self, circuit: Circuit) {
        if circuit != Circuit::Closed && self.at_work.is_empty() {
            // The journal chooses the conversation to probe with, so loaded work is given back. The exception: if the
            // circuit is half-open and only one conversation is loaded, the journal chose it for the probe.
            let from = usize::from(circuit == Circuit::HalfOpen && self.ready.len() == 1);
            for (_, work) in self.ready.drain(from..) {
                self.claimed.remove(&work.conversation.id);
            }
        }
        let now = Instant::now();
        while let Some((_, old)) = self
            .ready
            .pop_front_if(|(loaded_at, _)| now - *loaded_at > LOADED_FOR)
        {
            self.claimed.remove(&old.conversation.id);
            self.may_be_due = true;
        }
        let limit = self.limit(circuit);
        while self.at_work.len() < limit
            && let Some((_, work)) = self.ready.pop_front()
        {
            let delivery = Arc::clone(&self.delivery);
            let is_idle = work.verify.is_some_and(|verify| verify.is_idle);
            let pass_since = is_idle.then(Instant::now);
            let give_way = CancellationToken::new();
            if is_idle {
                self.pass.give_way = give_way.clone();
            }
            self.at_work.spawn(async move {
                let liveness = Arc::clone(&delivery.liveness);
                let work = reconcile(delivery, work, &give_way);
                (pass_since, liveness.handling.supervise_one(work).await)
            });
        }
        if !self.ready.is_empty() {
            self.pass.give_way.cancel();
        }
    }

    /// Queries the journal for due conversations if more can be claimed.
    fn fetch(&mut self, circuit: Circuit, now: Millis) {
        if self.fetch.is_some() {
            return;
        }
        let Some((conversations, bytes)) = self.claim_size(circuit) else {
            return;
        };
        self.may_be_due = false;
        self.query_in = QUERY_EVERY;
        let instant = Instant::now();
        self.timed_out.retain(|_, until| instant < *until);
        let mut exclude = self.claimed.clone();
        exclude.extend(self.timed_out.keys());
        let clock_set_back = now < self.last_query;
        self.last_query = now;
        self.pass.was_queried = self.is_unoccupied() && instant >= self.pass.not_before;
        let settings = &self.delivery.settings;
        let request = ClaimRequest {
            verifications_only: self.mode == RunMode::Verifications,
            idle_pass: self.pass.settings.filter(|_| self.pass.was_queried),
            probe: circuit == Circuit::HalfOpen,
            conversations,
            bytes,
            exclude,
            session: self.delivery.session.id,
            clock_set_back,
            request_timeout: settings.request_timeout,
            max_wait: settings
                .retry_max
                .max(RETRY_AFTER_MAX)
                .max(settings.poll_interval)
                .saturating_add(settings.request_timeout),
        };
        let journal = Arc::clone(&self.delivery.journal);
        self.fetch = Some(Box::pin(async move {
            let claimed = journal.with(move |store| store.claim(&request, now));
            claimed.await
        }));
    }

    /// How many conversations and bytes to claim; `None`: nothing is to be claimed now. The sizes are added up last,
    /// because this is called after each piece of work.
    fn claim_size(&self, circuit: Circuit) -> Option<(usize, usize)> {
        let limit = self.limit(circuit);
        if !self.may_be_due || limit == 0 {
            return None;
        }
        let ahead = match circuit {
            Circuit::Closed => AHEAD,
            Circuit::HalfOpen | Circuit::Open { .. } => 0,
        };
        let wanted = limit + ahead;
        let free = wanted
            .saturating_sub(self.ready.len() + self.at_work.len())
            .min(MAX_CLAIMED + self.set_aside - self.claimed.len());
        if free * 2 <= wanted {
            return None;
        }
        let bytes =
            BYTES_AHEAD.saturating_sub(self.ready.iter().map(|(_, work)| work.bytes()).sum());
        (bytes * 2 > BYTES_AHEAD).then_some((free, bytes))
    }

    fn fetched(&mut self, fetched: Fetched) {
        self.fetch = None;
        match fetched {
            Ok(Claimed {
                work,
                is_more,
                next_due,
                nothing_waits,
            }) => {
                if self.uncommitted() == 0 {
                    self.delivery.storage.delivery.succeeded();
                }
                self.may_be_due |= is_more;
                let mut verifications = work.iter().filter_map(|work| work.verify);
                if verifications.any(|verify| verify.is_idle) {
                    self.pass.is_unfinished = true;
                } else if self.pass.was_queried && work.is_empty() {
                    self.pass.is_unfinished = false;
                }
                if nothing_waits && !self.pass.is_unfinished {
                    self.delivery.our_api.http().forget_failures();
                }
                self.query_in = next_due.map_or(QUERY_EVERY, |due| {
                    due.since(self.last_query).min(QUERY_EVERY)
                });
                let loaded_at = Instant::now();
                for work in work {
                    let is_new = self.claimed.insert(work.conversation.id);
                    debug_assert!(is_new, "claimed conversations are not loaded");
                    self.ready.push_back((loaded_at, work));
                }
            }
            Err(error) => {
                self.delivery.storage.delivery.failed(&error);
                self.may_be_due = false;
                self.query_in = STORAGE_PAUSE;
                self.pass.not_before = Instant::now() + STORAGE_PAUSE;
            }
        }
    }

    fn release(&mut self, released: Released) {
        for conversation in &released.committed {
            self.claimed.remove(conversation);
        }
        self.set_aside += released.set_aside;
        self.may_be_due = true;
    }

    fn finished(&mut self, done: Result<Done, JoinError>) {
        let (pass_since, reconciliation) = match done {
            Ok(done) => done,
            Err(error) => {
                // A panic of a handler does not end its task, so this is not expected.
                tracing::error!(reason = %error, "a delivery ended without a report; its conversation is set aside until the next start");
                self.set_aside += 1;
                return;
            }
        };
        if let Some(began) = pass_since {
            self.pass.ended(began);
        }
        if reconciliation.is_timeout() {
            self.hold(reconciliation.conversation.id);
        }
        let report = self.reporter.report(reconciliation);
        // The channel has room for the reports of all claimed conversations.
        if self.reports.try_send(report).is_err() {
            tracing::error!(
                "a report could not be committed; its conversation will be read back at the next start"
            );
        }
    }

    /// Waits until `deadline` for the work in progress. Returns whether all of it ended.
    pub(super) async fn drain(mut self, deadline: Instant) -> bool {
        while !self.at_work.is_empty() {
            match timeout_at(deadline, self.at_work.join_next()).await {
                Ok(Some(done)) => self.finished(done),
                Ok(None) => break,
                Err(_) => {
                    let requests = self.at_work.len();
                    tracing::warn!(
                        conversations = requests,
                        "OurAPI did not answer in time; the chats with requests in flight will be read back at the next start"
                    );
                    self.delivery.our_api.record_timeout(requests);
                    self.at_work.abort_all();
                    return false;
                }
            }
        }
        true
    }
}

/// Waits for the query in progress; forever if there is none.
async fn fetched(fetch: &mut Option<Fetch>) -> Fetched {
    match fetch {
        Some(fetch) => fetch.await,
        None => pending().await,
    }
}
