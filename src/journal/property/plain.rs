//! The journal as a plain model: no database, no offset, one flag for each fact.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::EVENTS;
use crate::domain::account::{Accounting, MessageState};
use crate::domain::conversation::Attempts;
use crate::domain::progress::{
    Due, EventOutcome, NotRepaired, Observation, Outcome, Report, VerificationResult, Verify,
    VerifyMode,
};

/// The limits of a claim; see `queue`.
const BYTES_PER_CLAIM: usize = 256 << 10;

/// Longer waits end with the session.
const LONGEST_WAIT: i64 = 3_600_000;

/// By how much an event must be older than the next window to be dropped, in seconds.
const MARGIN: i64 = 60;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Waiting,
    Delivered,
    Failed,
    Discarded,
}

impl State {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Delivered => "delivered",
            Self::Failed => "failed",
            Self::Discarded => "discarded",
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Event {
    pub(super) conversation: i64,
    /// The index into [`EVENTS`].
    pub(super) what: usize,
    pub(super) state: State,
    pub(super) attempts: Attempts,
    pub(super) next_at: Option<i64>,
    /// It was processed, in order of arrival. If it waits, it is a redelivery.
    pub(super) passed: bool,
    /// It waits because OurAPI has lost it.
    pub(super) lost: bool,
    /// It was processed in a chat that is gone.
    pub(super) rewound: bool,
    /// When it was last delivered or discarded, and the latest such time: the clock may have been set back in between.
    pub(super) settled_at: i64,
    pub(super) latest: i64,
}

impl Event {
    /// Its delivery counts as a restoration.
    pub(super) fn is_restored(&self) -> bool {
        if self.passed { self.lost } else { self.rewound }
    }

    pub(super) fn waits(&self) -> bool {
        self.state == State::Waiting
    }

    fn settle(&mut self, state: State, now: i64) {
        (self.state, self.lost) = (state, false);
        (self.settled_at, self.latest) = (now, self.latest.max(now));
    }
}

/// A claim in memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Claimed {
    /// The events to send, in order.
    pub(super) events: Vec<i64>,
    /// The events processed with this claim: those that wait, and the dead letters between them.
    pub(super) covered: Vec<i64>,
    pub(super) last_event: i64,
    pub(super) losses: i64,
    /// The chat became stale after the claim.
    pub(super) became_stale: bool,
    /// Passes verify the chat.
    pub(super) is_in_passes: bool,
    /// No event has been processed in a chat yet.
    pub(super) is_first: bool,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Conversation {
    pub(super) due: Option<i64>,
    pub(super) claimed: Option<Claimed>,
    pub(super) stale: bool,
    pub(super) has_chat: bool,
    /// An external id was chosen for its chat.
    pub(super) is_known: bool,
    pub(super) verified_losses: i64,
    pub(super) is_read: bool,
    /// The pass that last verified its chat; `None`: there is nothing to verify.
    pub(super) verified_in: Option<i64>,
    /// An event was processed after its chat was last lost.
    pub(super) had_turn: bool,
    /// By [`EVENTS`]: the number of credits, and the latest event before the read.
    pub(super) credits: BTreeMap<usize, (u32, i64)>,
}

/// A requested verification, or the pass in idle time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) id: i64,
    pub(super) idle: bool,
    pub(super) repair: bool,
    /// The chats of a command's request.
    pub(super) chats: BTreeMap<i64, Requested>,
    /// The latest event at the request.
    pub(super) last_event: i64,
    pub(super) began_at: i64,
    pub(super) ended_at: Option<i64>,
    pub(super) verified: i64,
}

/// A requested chat.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Requested {
    pub(super) next_at: i64,
    pub(super) is_verified: bool,
    pub(super) differs: bool,
    pub(super) repairing: bool,
    pub(super) not_repaired: Option<NotRepaired>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) received: i64,
    pub(super) delivered: i64,
    pub(super) failed: i64,
}

#[derive(Debug, Default)]
pub(super) struct Plain {
    pub(super) now: i64,
    pub(super) cursor: Option<i64>,
    pub(super) last_id: i64,
    pub(super) losses: i64,
    pub(super) events: BTreeMap<i64, Event>,
    pub(super) conversations: BTreeMap<i64, Conversation>,
    /// In order. Only the latest pass in idle time is included.
    pub(super) requests: Vec<Request>,
    pub(super) last_request: i64,
    pub(super) counted: Counted,
}

impl Plain {
    pub(super) fn conversation(&mut self, id: i64) -> &mut Conversation {
        self.conversations.entry(id).or_default()
    }

    pub(super) fn ids(&self, fits: impl Fn(&Event) -> bool) -> Vec<i64> {
        let events = self.events.iter().filter(|(_, event)| fits(event));
        events.map(|(id, _)| *id).collect()
    }

    pub(super) fn waiting(&self, conversation: i64) -> Vec<i64> {
        self.ids(|event| event.conversation == conversation && event.waits())
    }

    fn each_of(&mut self, conversation: i64, mut change: impl FnMut(&mut Event)) {
        let of = self.events.values_mut();
        of.filter(|event| event.conversation == conversation)
            .for_each(&mut change);
    }

    /// Stores a page with events of conversations, in order.
    pub(super) fn ingest(&mut self, page: &[(i64, usize)]) {
        for (conversation, what) in page {
            let on_page = page
                .iter()
                .filter(|other| *other == &(*conversation, *what));
            let received = match EVENTS[*what].name {
                "MESSAGE" => on_page.count(),
                _ => 1,
            };
            let equal = |event: &Event| (event.conversation, event.what) == (*conversation, *what);
            if self.ids(equal).len() >= received {
                continue;
            }
            self.last_id += 1;
            let event = Event {
                conversation: *conversation,
                what: *what,
                state: State::Waiting,
                attempts: Attempts::default(),
                next_at: None,
                passed: false,
                lost: false,
                rewound: false,
                settled_at: 0,
                latest: 0,
            };
            self.events.insert(self.last_id, event);
            self.counted.received += 1;
            let (now, waited) = (self.now, self.waiting(*conversation).len() > 1);
            let of = self.conversation(*conversation);
            // The back-off of a failed verification does not delay an event.
            of.due = of.due.filter(|_| waited || of.stale).or(Some(now));
        }
        self.cursor = Some(self.now / 1000);
    }

    /// The due conversations, the longest due first. A probe prefers one without a failed waiting event.
    pub(super) fn due(&self, at_most: usize, probe: bool) -> Vec<i64> {
        let mut due: Vec<(i64, i64)> = self
            .conversations
            .iter()
            .filter(|(_, conversation)| conversation.claimed.is_none())
            .filter_map(|(id, conversation)| {
                Some((conversation.due.filter(|due| *due <= self.now)?, *id))
            })
            .collect();
        due.sort_unstable();
        let has_failed = |id: i64| {
            self.events.values().any(|event| {
                event.conversation == id && event.next_at.is_some() && event.attempts.failed > 0
            })
        };
        if probe && let Some((_, id)) = due.iter().find(|(_, id)| !has_failed(*id)) {
            return vec![*id];
        }
        due.into_iter().take(at_most).map(|(_, id)| id).collect()
    }

    /// Chats not verified since the last loss, in any order.
    pub(super) fn lost(&self) -> BTreeSet<i64> {
        let lost = self.conversations.iter().filter(|(_, conversation)| {
            conversation.is_known
                && conversation.claimed.is_none()
                && conversation.due.is_none()
                && conversation.verified_losses < self.losses
        });
        lost.map(|(id, _)| *id).collect()
    }

    /// Chats to be verified by hand, in order, each with its request, and whether it is to be repaired.
    pub(super) fn to_verify(&self) -> Vec<(i64, i64, bool)> {
        let mut open: Vec<(i64, i64, i64)> = Vec::new();
        for request in &self.requests {
            let chats = request.chats.iter().filter(|(id, chat)| {
                !chat.is_verified
                    && chat.next_at <= self.now
                    && self.conversations[id].claimed.is_none()
            });
            open.extend(chats.map(|(id, chat)| (chat.next_at, request.id, *id)));
        }
        open.sort_unstable();
        let mut seen = BTreeSet::new();
        open.retain(|(_, _, id)| seen.insert(*id));
        let repairs = |request: i64, id: i64| {
            let conversation = &self.conversations[&id];
            let may_be_written =
                conversation.stale && conversation.due.is_some_and(|due| due > self.now);
            let mut requests = self.requests.iter();
            requests.any(|of| of.id == request && of.repair) && !may_be_written
        };
        open.into_iter()
            .map(|(_, request, id)| (id, request, repairs(request, id)))
            .collect()
    }

    /// Chats that wait for a pass and can be verified now, in order.
    fn wait_for(&self, pass: i64) -> Vec<i64> {
        let mut waiting: Vec<(i64, i64)> = self
            .conversations
            .iter()
            .filter(|(_, conversation)| {
                conversation.claimed.is_none() && conversation.due.is_none_or(|due| due <= self.now)
            })
            .filter_map(|(id, conversation)| Some((conversation.verified_in?, *id)))
            .filter(|(verified_in, _)| *verified_in < pass)
            .collect();
        waiting.sort_unstable();
        waiting.into_iter().map(|(_, id)| id).collect()
    }

    /// `chats` are those of a command; a pass has none.
    pub(super) fn request(
        &mut self,
        idle: bool,
        repair: bool,
        chats: impl IntoIterator<Item = i64>,
    ) -> &mut Request {
        self.last_request += 1;
        let request = Request {
            id: self.last_request,
            idle,
            repair,
            chats: chats
                .into_iter()
                .map(|id| (id, Requested::default()))
                .collect(),
            last_event: self.events.keys().last().copied().unwrap_or(0),
            began_at: self.now,
            ended_at: None,
            verified: 0,
        };
        self.requests.push(request);
        self.requests.last_mut().expect("it was pushed")
    }

    /// The next chat of the pass in idle time, which begins and ends here. Each chat is to be verified within `every`
    /// milliseconds.
    pub(super) fn next_idle(&mut self, every: i64) -> Option<i64> {
        let now = self.now;
        let pass = self.requests.iter().find(|request| request.idle).cloned();
        let is_over = pass.as_ref().is_some_and(|pass| {
            pass.ended_at.is_some_and(|ended| {
                let took = (ended - pass.began_at).max(0);
                now < pass.began_at || now >= ended && now >= pass.began_at + (every - took).max(0)
            })
        });
        if pass.is_none() || is_over {
            self.requests.retain(|request| !request.idle);
            let begun = self.request(true, false, []);
            begun.ended_at = pass.is_none().then_some(now);
        }
        let pass = self.requests.iter().find(|request| request.idle)?;
        if pass.ended_at.is_some() {
            return None;
        }
        let next = self.wait_for(pass.id).first().copied();
        let mut others = self.conversations.iter();
        if !others.any(|(id, of)| {
            of.verified_in < Some(pass.id)
                && of.verified_in.is_some()
                && self.waiting(*id).is_empty()
        }) && next.is_none()
        {
            let request = self.requests.iter_mut().find(|request| request.idle);
            request.expect("it was found").ended_at = Some(now);
        }
        next
    }

    /// Credits are dropped, unless an event waits that may match one. A later event may also match one.
    pub(super) fn drop_credits(&mut self) {
        let ids: Vec<i64> = self.conversations.keys().copied().collect();
        for id in ids {
            let waits = !self.waiting(id).is_empty();
            let conversation = self.conversation(id);
            if !waits && !conversation.credits.is_empty() {
                conversation.credits.clear();
                conversation.is_read = false;
            }
        }
    }

    /// Whether the journal has events of a conversation.
    fn has_events(&self, id: i64) -> bool {
        self.events.values().any(|event| event.conversation == id)
    }

    /// Records that events of these conversations were dropped.
    pub(super) fn dropped(&mut self, conversations: &BTreeSet<i64>) {
        for id in conversations {
            if !self.has_events(*id) {
                self.conversation(*id).verified_in = None;
                for request in &mut self.requests {
                    request
                        .chats
                        .retain(|of, chat| of != id || chat.is_verified);
                }
            }
        }
    }

    /// Claims a conversation, with its events unless it is only to be verified.
    pub(super) fn claim(&mut self, id: i64, with_events: bool) -> Claimed {
        let mut claimed = Claimed {
            losses: self.losses,
            is_in_passes: self.conversation(id).verified_in.is_some(),
            is_first: !self.conversation(id).had_turn,
            ..Claimed::default()
        };
        let mut bytes = 0;
        let of = self
            .events
            .iter()
            .filter(|(_, event)| event.conversation == id);
        let (passed, others): (Vec<_>, Vec<_>) = of.partition(|(_, event)| event.passed);
        claimed.last_event = passed
            .iter()
            .chain(&others)
            .map(|(id, _)| **id)
            .max()
            .unwrap_or(0);
        let again = passed.into_iter().filter(|(_, event)| event.waits());
        for (id, event) in again.chain(others) {
            if !with_events || bytes >= BYTES_PER_CLAIM {
                break;
            }
            if !event.passed {
                claimed.covered.push(*id);
            }
            if event.waits() {
                claimed.events.push(*id);
                bytes += EVENTS[event.what].text().map_or(0, str::len);
            }
        }
        self.conversation(id).claimed = Some(claimed.clone());
        claimed
    }

    pub(super) fn mark_stale(&mut self, id: i64) {
        let conversation = self.conversation(id);
        conversation.stale = true;
        if let Some(claimed) = &mut conversation.claimed {
            claimed.became_stale = true;
        }
    }

    /// Records the outcome of an event.
    fn record(&mut self, outcome: &EventOutcome) {
        let event = self.events.get_mut(&outcome.event.0).expect("an event");
        assert!(event.waits(), "no event is processed twice");
        match &outcome.outcome {
            Outcome::Delivered(_) if event.attempts == Attempts::default() => {}
            Outcome::Delivered(_) => {
                let attempts = Attempts {
                    failed: event.attempts.failed,
                    ..Attempts::default()
                };
                (event.attempts, event.next_at) = (attempts, None);
            }
            Outcome::Retry {
                attempts, next_at, ..
            } => (event.attempts, event.next_at) = (*attempts, Some(next_at.0)),
            Outcome::DeadLetter { attempts, .. } => {
                (event.attempts, event.next_at) = (*attempts, None);
                event.settle(State::Failed, self.now);
                self.counted.failed += 1;
            }
        }
    }

    /// Commits a report. The report's new offset and number of settled events are not used.
    pub(super) fn commit(&mut self, report: &Report) {
        let id = report.conversation.id.0;
        let now = self.now;
        let claimed = self.conversation(id).claimed.take().expect("a claim");
        if report.observation == Observation::Created {
            self.each_of(id, |event| event.attempts.outcome_unknown = false);
        }
        let mut settled = BTreeSet::new();
        let mut sent = Vec::new();
        for outcome in &report.outcomes {
            self.record(outcome);
            match outcome.outcome {
                Outcome::Delivered(_) => sent.push(outcome.event.0),
                Outcome::Retry { .. } => continue,
                Outcome::DeadLetter { .. } => {}
            }
            settled.insert(outcome.event.0);
        }
        // In order of arrival: events after the first one that still waits are not processed yet, whether sent or not.
        let covered = claimed.covered.iter();
        let had_turn: Vec<i64> = covered
            .take_while(|id| settled.contains(id) || !claimed.events.contains(id))
            .copied()
            .collect();
        for id in sent {
            let event = self.events.get_mut(&id).expect("an event");
            if event.passed || had_turn.contains(&id) {
                self.counted.delivered += i64::from(!event.is_restored());
                event.settle(State::Delivered, now);
            }
        }
        self.conversation(id).had_turn |= !had_turn.is_empty();
        for id in had_turn {
            if let Some(event) = self.events.get_mut(&id) {
                event.passed = true;
            }
        }
        for key in &report.consumed {
            let is_it = |what: &usize| EVENTS[*what].key().as_ref() == Some(key);
            let credits = &mut self.conversation(id).credits;
            let what = credits.keys().copied().find(is_it).expect("a credit");
            let credit = credits.get_mut(&what).expect("a credit");
            credit.0 -= 1;
            if credit.0 == 0 {
                credits.remove(&what);
            }
        }
        let observed = &report.conversation.observed;
        let conversation = self.conversation(id);
        conversation.has_chat = observed.chat.is_some();
        conversation.is_known = observed.external_id.is_some();
        let has_events = self.has_events(id);
        let mut requests = self.requests.iter();
        let pass = requests
            .find(|request| request.idle)
            .map_or(0, |pass| pass.id);
        let verified_by = report
            .verify
            .filter(|verify| verify.is_idle && report.found.is_some())
            .map(|verify| verify.verification.0);
        let conversation = self.conversation(id);
        conversation.verified_in = match conversation.verified_in {
            _ if !conversation.has_chat => None,
            Some(before) => Some(verified_by.unwrap_or(before)),
            // A new chat, or one that has events again.
            None if has_events && !claimed.is_in_passes => {
                Some(if claimed.is_first { pass } else { 0 })
            }
            None => None,
        };
        let waited = !self.waiting(id).is_empty();
        let ends_claim = self.observe(id, &claimed, &report.observation);
        if report.becomes_stale {
            self.mark_stale(id);
        }
        let waits = !self.waiting(id).is_empty();
        let (due, is_certain) = match report.due {
            Due::At(_) if report.verify.is_some_and(|verify| !verify.is_idle) => {
                (waits.then_some(now), false)
            }
            Due::At(at) => (Some(at.0), true),
            Due::IfWaiting => ((waits || ends_claim).then_some(now), ends_claim),
        };
        let is_verification = report.verify.is_some();
        let conversation = self.conversation(id);
        conversation.due = match conversation.due {
            // A verification may end at any time, and makes no event due earlier or later.
            Some(before) if is_verification && waited => Some(before),
            Some(before) if is_verification => Some(due.unwrap_or(before).max(before)),
            None if is_verification => due.filter(|_| is_certain),
            _ => due,
        };
        match report.verify {
            Some(verify) => self.verified(id, report, verify),
            None => self.repaired(id, report),
        }
    }

    /// Records the result of a verification.
    fn verified(&mut self, id: i64, report: &Report, verify: Verify) {
        let mut requests = self.requests.iter_mut();
        let Some(request) = requests.find(|of| of.id == verify.verification.0) else {
            return;
        };
        let chat = request.chats.get_mut(&id);
        let Some(found) = &report.found else {
            if let (Some(chat), Due::At(at)) = (chat, report.due) {
                chat.next_at = at.0;
            }
            return;
        };
        request.verified += i64::from(request.ended_at.is_none());
        if let Some(chat) = chat {
            let differs = *found != VerificationResult::default();
            chat.is_verified = true;
            chat.differs = differs;
            chat.repairing = verify.mode == VerifyMode::Overwrite
                && (differs || report.conversation.lacks_agent());
            chat.not_repaired =
                (request.repair && differs && !chat.repairing).then_some(NotRepaired::Waiting);
        }
    }

    /// Records how far a delivery has repaired the chat.
    fn repaired(&mut self, id: i64, report: &Report) {
        let any = |is: &dyn Fn(&EventOutcome) -> bool| report.outcomes.iter().any(is);
        let is_retry = |of: &EventOutcome| matches!(of.outcome, Outcome::Retry { .. });
        let is_dead = |of: &EventOutcome| matches!(of.outcome, Outcome::DeadLetter { .. });
        let is_dead = any(&|of| of.restored && is_dead(of));
        let is_held_back = any(&|of| !of.restored && is_retry(of));
        for request in &mut self.requests {
            let last_event = request.last_event;
            let Some(chat) = request.chats.get_mut(&id).filter(|chat| chat.repairing) else {
                continue;
            };
            if is_dead && chat.differs {
                chat.not_repaired = Some(NotRepaired::DeadLetter);
            }
            let is_left = self.events.iter().any(|(event_id, event)| {
                event.conversation == id
                    && (event.passed && event.waits() && event.lost
                        || event.rewound && !event.passed && *event_id <= last_event)
            });
            let is_written = report.conversation.is_written();
            let ended = report.due == Due::IfWaiting;
            if report.is_due_again() {
                continue;
            }
            if !is_held_back && (is_left || !ended) {
                continue;
            }
            chat.repairing = false;
            if chat.differs && (is_left || !is_written) {
                let why = match is_held_back {
                    true => NotRepaired::Waiting,
                    false => NotRepaired::Rejected,
                };
                chat.not_repaired.get_or_insert(why);
            }
        }
    }

    /// Returns whether the conversation is due again at once.
    fn observe(&mut self, id: i64, claimed: &Claimed, observation: &Observation) -> bool {
        let losses = self.losses;
        let conversation = self.conversation(id);
        if matches!(observation, Observation::Created | Observation::Read(_)) {
            conversation.stale &= claimed.became_stale;
            conversation.verified_losses = claimed.losses;
        }
        if matches!(
            observation,
            Observation::Created | Observation::Read(Some(_))
        ) {
            conversation.is_read = true;
        }
        match observation {
            Observation::None | Observation::Created | Observation::Adopted => false,
            Observation::Read(None) => true,
            Observation::Read(Some(Accounting {
                missing,
                credits,
                credited,
            })) => {
                conversation.credits = credits
                    .iter()
                    .map(|(key, count)| {
                        let mut events = EVENTS.iter();
                        let what = events.position(|event| event.key().as_ref() == Some(key));
                        (what.expect("a message"), (*count, claimed.last_event))
                    })
                    .collect();
                let became_stale = claimed.became_stale;
                let of_conversation = self.events.iter_mut();
                for (event_id, event) in
                    of_conversation.filter(|(_, event)| event.conversation == id)
                {
                    event.attempts.outcome_unknown &= became_stale
                        || matches!(event.state, State::Failed | State::Discarded)
                        || credited.iter().any(|credited| credited.0 == *event_id);
                }
                for event in missing {
                    // The event may have been dropped meanwhile.
                    if let Some(event) = self.events.get_mut(&event.0) {
                        (event.state, event.lost) = (State::Waiting, true);
                    }
                }
                true
            }
            Observation::Gone { rebuild } => {
                conversation.has_chat = false;
                conversation.is_read = false;
                conversation.verified_in = None;
                conversation.had_turn &= !rebuild;
                conversation.verified_losses = losses;
                conversation.credits.clear();
                self.each_of(id, |event| {
                    if *rebuild {
                        event.rewound |= event.passed;
                        (event.passed, event.lost, event.latest) = (false, false, 0);
                        if event.state == State::Delivered {
                            event.state = State::Waiting;
                        }
                    }
                });
                true
            }
        }
    }

    pub(super) fn retry(&mut self, id: i64) {
        let now = self.now;
        let event = self.events.get_mut(&id).expect("an event");
        (event.state, event.attempts.counted, event.next_at) = (State::Waiting, 0, None);
        let is_message = EVENTS[event.what].key().is_some();
        let (conversation, unknown) = (
            event.conversation,
            is_message || event.attempts.outcome_unknown,
        );
        let was_stale = self.conversation(conversation).stale;
        if unknown {
            self.mark_stale(conversation);
        }
        let due = &mut self.conversation(conversation).due;
        // If a write may still be in flight, the conversation must not become due earlier.
        *due = due.filter(|_| was_stale).or(Some(now));
    }

    pub(super) fn discard(&mut self, id: i64) {
        let now = self.now;
        let event = self.events.get_mut(&id).expect("an event");
        event.settle(State::Discarded, now);
        event.latest = now;
    }

    pub(super) fn restart(&mut self) {
        let (now, latest) = (self.now, self.now + LONGEST_WAIT);
        for conversation in self.conversations.values_mut() {
            conversation.claimed = None;
            conversation.is_read = false;
            conversation.credits.clear();
            if conversation.due.is_some_and(|due| due > latest) {
                conversation.due = Some(now);
            }
        }
        for event in self.events.values_mut() {
            if event.next_at.is_some_and(|next| next > latest) {
                event.next_at = Some(now);
            }
        }
    }

    pub(super) fn set_back(&mut self, pause: i64) {
        let now = self.now;
        let due = |at: &mut Option<i64>, is_outcome_unknown: bool| {
            if at.is_some_and(|at| at > now) {
                *at = Some(if is_outcome_unknown { now + pause } else { now });
            }
        };
        for conversation in self.conversations.values_mut() {
            due(&mut conversation.due, conversation.stale);
        }
        for event in self.events.values_mut() {
            due(&mut event.next_at, event.attempts.outcome_unknown);
        }
        for chat in self
            .requests
            .iter_mut()
            .flat_map(|request| request.chats.values_mut())
        {
            if !chat.is_verified {
                chat.next_at = chat.next_at.min(now);
            }
        }
    }

    /// The events that may be dropped, and those of them that must be.
    pub(super) fn droppable(
        &self,
        retention: Duration,
        overlap: Duration,
    ) -> (BTreeSet<i64>, BTreeSet<i64>) {
        let seconds = |duration: Duration| i64::try_from(duration.as_secs()).expect("seconds");
        let Some(cursor) = self.cursor else {
            return Default::default();
        };
        let kept = seconds(retention).max(seconds(overlap) + MARGIN);
        let (happened_before, settled_before) = (cursor - kept, self.now - kept * 1000);
        let is_open = |event: &Event| matches!(event.state, State::Waiting | State::Failed);
        let is_discarded = |event: &Event| event.state == State::Discarded;
        let any_other = |event: &Event, is: &dyn Fn(&Event) -> bool| {
            let mut all = self.events.values();
            all.any(|other| other.conversation == event.conversation && is(other))
        };
        let may = |event: &Event| {
            let at = |event: &Event| EVENTS[event.what].at;
            at(event) < happened_before
                && event.settled_at < settled_before
                && !any_other(event, &is_open)
                && !any_other(event, &|other| is_discarded(other) && other.settled_at >= settled_before)
                // A discarded event that stays may be reopened.
                && (is_discarded(event)
                    || !any_other(event, &|other| is_discarded(other) && at(other) >= happened_before))
        };
        let may_be: BTreeSet<i64> = self.ids(may).into_iter().collect();
        let must_be = may_be
            .iter()
            .filter(|id| self.events[id].latest < settled_before);
        let must_be = must_be.copied().collect();
        (may_be, must_be)
    }

    /// Whether OurAPI has each message of a conversation, as far as the journal knows.
    pub(super) fn message_states(
        &self,
        conversation: i64,
        replay_until: i64,
    ) -> Vec<(i64, MessageState)> {
        let messages = self.events.iter().filter(|(_, event)| {
            event.conversation == conversation && EVENTS[event.what].text().is_some()
        });
        messages
            .map(|(id, event)| {
                let unknown = event.attempts.outcome_unknown;
                let state = match event.state {
                    State::Delivered => MessageState::Delivered,
                    State::Failed if unknown => MessageState::DeadOutcomeUnknown,
                    State::Discarded if unknown => MessageState::DiscardedOutcomeUnknown,
                    State::Failed | State::Discarded => MessageState::NotSent,
                    State::Waiting if unknown || event.rewound && !event.passed => {
                        MessageState::OutcomeUnknown
                    }
                    State::Waiting if *id <= replay_until => MessageState::MaybeSent,
                    State::Waiting => MessageState::NotSent,
                };
                (*id, state)
            })
            .collect()
    }
}
