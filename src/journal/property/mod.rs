//! Random sequences of operations on the journal, compared after each with a [plain model](plain): the state of every
//! event, what is claimed, and when the rest is due.
//!
//! Reports are built as `delivery` builds them, from a script of outcomes, so that more cases are covered than OurAPI
//! would produce. They wait for their commit, as in the committer's channel, while other operations run.

mod plain;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::LazyLock;
use std::time::Duration;

use proptest::prelude::*;
use rusqlite::Connection;
use uuid::Uuid;

use super::{
    ClaimRequest, Intervals, NewPage, Operator, Resolution, Selection, Store, WindowProgress,
};
use crate::domain::account::{Accounting, MessageKey, MessageState};
use crate::domain::conversation::{Attempts, Pending};
use crate::domain::dedupe::Counts;
use crate::domain::ids::{AdvisorId, ConversationId, Epoch, EventId, VerificationId};
use crate::domain::progress::{
    Due, Effect, EventOutcome, Failure, IdlePass, Missing, Observation, Outcome, Report,
    VerificationResult, VerifyMode, Work, advance,
};
use crate::domain::time::{Millis, Timestamp};
use crate::domain::window::Window;
use plain::{Plain, State};

/// How long a conversation waits after a write of unknown outcome, in milliseconds.
const PAUSE: i64 = 500;

const RETENTION: Duration = Duration::from_secs(100);
const OVERLAP: Duration = Duration::from_secs(30);

const CONVERSATIONS: i64 = 3;

/// The period in which each chat is verified, in milliseconds.
const EVERY: i64 = 2_000;

const IDLE_PASS: IdlePass = IdlePass {
    every: Duration::from_millis(EVERY.unsigned_abs()),
    mode: VerifyMode::Restore,
};

/// The initial time, in Unix seconds.
const START: i64 = 1_000_000;

/// An event that BigChat may report.
struct Reported {
    name: &'static str,
    at: i64,
    data: serde_json::Value,
}

impl Reported {
    fn text(&self) -> Option<&str> {
        self.data["message"].as_str()
    }

    fn key(&self) -> Option<MessageKey> {
        let text = self.text()?;
        Some(MessageKey::new(Timestamp::clamped(self.at), text))
    }
}

/// All events that BigChat may report of a conversation. The last message is large enough to fill a claim.
static EVENTS: LazyLock<Vec<Reported>> = LazyLock::new(|| {
    let message = |text: &str| serde_json::json!({ "message": text });
    [
        ("MESSAGE", 1, message("a")),
        ("MESSAGE", 40, message("b")),
        ("START", 0, serde_json::Value::Null),
        ("END", 90, serde_json::Value::Null),
        ("TRANSFER", 50, serde_json::json!({ "new_advisor_id": 7 })),
        ("MESSAGE", 2, message(&"x".repeat(256 << 10))),
    ]
    .into_iter()
    .map(|(name, after, data)| Reported {
        name,
        at: START + after,
        data,
    })
    .collect()
});

#[derive(Debug, Clone)]
enum Step {
    /// A page with events arrives.
    Ingest(Vec<(i64, usize)>),
    /// Up to this many conversations are claimed.
    Claim(usize),
    Probe,
    /// A worker finishes one of the claims. Its report is not committed yet.
    Report(prop::sample::Index, Script),
    /// One of the claims is released without work.
    Release(prop::sample::Index),
    /// The next reports are committed together.
    Commit(usize),
    /// The database refuses the commit of all reports.
    Refuse,
    /// All due work is done and committed. Other operations happen between claim and commit.
    Deliver(Script, Vec<Step>),
    /// The operator resolves one dead letter, or all.
    Retry(Option<prop::sample::Index>),
    Discard(Option<prop::sample::Index>),
    /// OurAPI is found to have lost data.
    Loss,
    /// `verify` is requested for all chats or one of them; an earlier request may be withdrawn.
    Verify {
        repair: bool,
        conversation: Option<i64>,
        withdraws: bool,
    },
    /// If nothing else is due, the next chat of the pass in idle time is claimed.
    Idle,
    /// The daemon dies and starts again.
    Restart,
    Later(i64),
    SetBack(i64),
    /// Time passes, and old events are dropped.
    Prune {
        after: i64,
        at_most: u32,
    },
}

/// The outcomes of the events of a claim.
#[derive(Debug, Clone)]
struct Script {
    fates: Vec<Fate>,
    found: Found,
    /// Which delivered messages are missing.
    missing: Vec<bool>,
    /// How many copies of each message in OurAPI are not accounted for.
    credits: [u32; 2],
}

/// The outcome of an attempt.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Delivered,
    /// It is permanently rejected, and the next event is tried.
    Rejected,
    /// It fails, and no further event is tried.
    Retried {
        pause: i64,
        outcome_unknown: bool,
    },
    /// The same, with no attempts left.
    GivenUp {
        outcome_unknown: bool,
    },
    /// The database interrupts the attempt.
    Interrupted,
    /// The daemon is to stop.
    NotTried,
}

/// The state of the chat as read.
#[derive(Debug, Clone, Copy)]
enum Found {
    AsRemembered,
    Read,
    /// The fields are read, but not the messages, because none can have been delivered.
    ReadWithoutMessages,
    /// The fields are read, but the messages cannot be: those that may have been delivered become dead letters.
    UnreadableMessages,
    /// It cannot be read.
    Failed {
        pause: i64,
    },
    Gone {
        rebuild: bool,
    },
}

/// The journal and the plain model, and what is in memory.
struct Pair {
    store: Store,
    plain: Plain,
    work: Vec<Work>,
    reports: Vec<Report>,
    session: i64,
    replay_until: i64,
    writes: i64,
}

impl Pair {
    fn new() -> Self {
        let connection = Connection::open_in_memory().expect("a database in memory");
        let mut store = Store::in_memory(connection, true).expect("a journal");
        let mut plain = Plain {
            now: START * 1000,
            ..Plain::default()
        };
        for id in 1..=CONVERSATIONS {
            store
                .record_details(Epoch(1), id, Timestamp::clamped(START), Some(AdvisorId(1)))
                .expect("a conversation");
            plain.conversation(id);
        }
        let mut pair = Self {
            store,
            plain,
            work: Vec::new(),
            reports: Vec::new(),
            session: 0,
            replay_until: 0,
            writes: 0,
        };
        pair.restart();
        pair
    }

    fn now(&self) -> Millis {
        Millis(self.plain.now)
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Ingest(page) => self.ingest(&page),
            Step::Claim(at_most) => self.claim(&self.request(at_most, false)),
            Step::Probe => self.claim(&self.request(1, true)),
            Step::Report(which, script) => {
                if let Some(work) = self.take_work(which) {
                    let report = self.report(work, &script);
                    self.reports.push(report);
                }
            }
            Step::Release(which) => {
                if let Some(work) = self.take_work(which) {
                    self.plain.conversation(work.conversation.id.0).claimed = None;
                }
            }
            Step::Commit(at_most) => self.commit(at_most),
            Step::Refuse => self.refuse(),
            Step::Deliver(script, meanwhile) => {
                self.claim(&self.request(3, false));
                for work in std::mem::take(&mut self.work) {
                    let report = self.report(work, &script);
                    self.reports.push(report);
                }
                meanwhile.into_iter().for_each(|step| self.step(step));
                self.commit(usize::MAX);
            }
            Step::Retry(which) => {
                let ids = self.resolve(which, Resolution::Retry);
                ids.into_iter().for_each(|id| self.plain.retry(id));
            }
            Step::Discard(which) => {
                let ids = self.resolve(which, Resolution::Discard);
                ids.into_iter().for_each(|id| self.plain.discard(id));
            }
            Step::Loss => {
                self.plain.losses += 1;
                let losses = self.store.record_loss(self.now()).expect("a loss");
                assert_eq!(losses, self.plain.losses, "losses");
            }
            Step::Verify {
                repair,
                conversation,
                withdraws,
            } => self.verify(repair, conversation, withdraws),
            Step::Idle => self.claim_idle(),
            Step::Restart => self.restart(),
            Step::Later(by) => self.plain.now += by,
            Step::SetBack(by) => {
                self.plain.now -= by;
                self.plain.set_back(PAUSE);
                let request = ClaimRequest {
                    verifications_only: true,
                    clock_set_back: true,
                    ..self.request(0, false)
                };
                let claimed = self.store.claim(&request, self.now()).expect("a claim");
                assert!(claimed.work.is_empty(), "nothing is asked for");
            }
            Step::Prune { after, at_most } => {
                self.plain.now += after;
                self.ingest(&[]);
                self.prune(at_most);
                let started_at = Timestamp::clamped(START);
                self.store
                    .drop_credits(started_at, OVERLAP)
                    .expect("credits are dropped");
                if self.plain.now >= (START + OVERLAP.as_secs().cast_signed()) * 1000 {
                    self.plain.drop_credits();
                }
            }
        }
        self.compare();
    }

    fn take_work(&mut self, which: prop::sample::Index) -> Option<Work> {
        (!self.work.is_empty()).then(|| self.work.remove(which.index(self.work.len())))
    }

    fn ingest(&mut self, page: &[(i64, usize)]) {
        let events: Vec<_> = page
            .iter()
            .map(|(conversation, what)| {
                let Reported { name, at, data } = &EVENTS[*what];
                serde_json::json!({ "conversation_id": conversation, "event_name": name, "event_at": at, "data": data })
            })
            .collect();
        let at = Timestamp::clamped(self.plain.now / 1000);
        let new_page = NewPage {
            query: "page".into(),
            requested_in: Epoch(1),
            served_at: at,
            window: Window { start: at, end: at },
            body: serde_json::json!({ "nextPageUrl": null, "events": events }).to_string(),
            events: events.len(),
            window_at: Some(self.now()),
            progress: WindowProgress::Complete(at),
        };
        self.store.store_page(&new_page).expect("a stored page");
        let pages = self.store.stored_pages().expect("the stored pages");
        let stored = pages.last().expect("a page");
        self.store
            .ingest(
                stored,
                Epoch(1),
                false,
                &Counts::of(&[stored.keys()]),
                &[],
                self.now(),
            )
            .expect("its events are ingested");
        self.store
            .end_poll(at, self.now(), 0)
            .expect("the poll ends");
        self.plain.ingest(page);
    }

    fn request(&self, at_most: usize, probe: bool) -> ClaimRequest {
        let in_memory = self.plain.conversations.iter();
        let exclude = in_memory
            .filter(|(_, conversation)| conversation.claimed.is_some())
            .map(|(id, _)| ConversationId(*id));
        ClaimRequest {
            verifications_only: false,
            idle_pass: None,
            probe,
            conversations: at_most,
            bytes: usize::MAX,
            exclude: exclude.collect(),
            session: self.session,
            clock_set_back: false,
            request_timeout: Duration::from_millis(PAUSE.unsigned_abs()),
            max_wait: Duration::MAX,
        }
    }

    fn claim_idle(&mut self) {
        let request = self.request(1, false);
        let idle_pass = request.exclude.is_empty().then_some(IDLE_PASS);
        self.claim(&ClaimRequest {
            idle_pass,
            ..request
        });
    }

    fn claim(&mut self, request: &ClaimRequest) {
        let (at_most, probe) = (request.conversations, request.probe);
        let claimed = self.store.claim(request, self.now()).expect("a claim");
        let due = self.plain.due(at_most, probe);
        let mut lost = match probe && !due.is_empty() {
            true => BTreeSet::new(),
            false => self.plain.lost(),
        };
        let is_more = due.len() + lost.len() >= at_most;
        assert_eq!(claimed.is_more, is_more, "whether more is due");
        let next_due = self.plain.conversations.values();
        let next_due = next_due.filter_map(|conversation| conversation.due);
        let requests = self.plain.requests.iter();
        let next_at = requests.flat_map(|request| request.chats.values());
        let next_at = next_at
            .filter(|chat| !chat.is_verified)
            .map(|chat| chat.next_at);
        let next_due = next_due.chain(next_at);
        let next_due = next_due.filter(|due| *due > self.plain.now).min();
        assert_eq!(claimed.next_due, next_due.map(Millis), "what is due next");

        let mut work = claimed.work.into_iter();
        for id in due {
            let work = work.next().expect("what is due is claimed");
            assert_eq!(work.conversation.id.0, id, "what is due for longest");
            self.claimed(work);
        }
        let free = at_most - self.work_since(request).min(at_most);
        for _ in 0..free.min(lost.len()) {
            let work = work.next().expect("what is lost is claimed");
            assert!(lost.remove(&work.conversation.id.0), "it may be lost");
            self.claimed(work);
        }
        let free = at_most - self.work_since(request).min(at_most);
        for (id, request, repairs) in self.plain.to_verify().into_iter().take(free) {
            let work = work.next().expect("what is to be verified is claimed");
            assert_eq!(work.conversation.id.0, id, "what is to be verified");
            let verify = work.verify.expect("only that");
            assert_eq!(verify.verification.0, request, "the request");
            assert_eq!(verify.mode == VerifyMode::Overwrite, repairs, "repaired");
            self.claimed(work);
        }
        if request.idle_pass.is_some() && !claimed.is_more && self.work_since(request) == 0 {
            let next = self.plain.next_idle(EVERY);
            if let Some(id) = next {
                let work = work.next().expect("the next of the pass is claimed");
                assert_eq!(work.conversation.id.0, id, "the next of the pass");
                assert!(work.verify.is_some_and(|verify| verify.is_idle));
                self.claimed(work);
            }
        }
        assert!(work.next().is_none(), "nothing else is claimed");
    }

    /// How many conversations were claimed since a request was made.
    fn work_since(&self, request: &ClaimRequest) -> usize {
        let in_memory = self.plain.conversations.values();
        let in_memory = in_memory.filter(|conversation| conversation.claimed.is_some());
        in_memory.count() - request.exclude.len()
    }

    /// Compares a claimed conversation with the model.
    fn claimed(&mut self, work: Work) {
        let id = work.conversation.id.0;
        let before = &self.plain.conversations[&id];
        assert!(before.claimed.is_none(), "it is claimed once");
        assert_eq!(work.claim.became_stale, before.stale, "stale");
        assert_eq!(work.claim.is_read, before.is_read, "read in this session");
        let is_lost = before.verified_losses < self.plain.losses;
        assert_eq!(work.claim.is_lost, is_lost, "may be lost");
        let mut credits: BTreeMap<usize, (u32, i64)> = before.credits.clone();

        let claimed = self.plain.claim(id, work.verify.is_none());
        let expected: Vec<Pending> = claimed
            .events
            .iter()
            .map(|id| {
                let event = &self.plain.events[id];
                let credit = match credits.get_mut(&event.what) {
                    Some((count, as_of)) if *count > 0 => {
                        *count -= 1;
                        Some(EventId(*as_of))
                    }
                    _ => None,
                };
                let found = work.events.iter().find(|found| found.id.0 == *id);
                let found = found.unwrap_or_else(|| panic!("event {id} is not claimed"));
                Pending {
                    attempts: event.attempts,
                    redelivery: event.passed,
                    restored: event.is_restored(),
                    credit,
                    ..found.clone()
                }
            })
            .collect();
        let order: Vec<i64> = work.events.iter().map(|event| event.id.0).collect();
        assert_eq!(order, claimed.events, "what is sent, in order");
        assert!(
            work.events[..] == expected,
            "{:?}\nis claimed instead of {expected:?}",
            work.events
        );
        let skipped = claimed.covered.iter();
        let skipped = skipped.filter(|id| !claimed.events.contains(id)).copied();
        let skipped: Vec<EventId> = skipped.map(EventId).collect();
        assert_eq!(work.claim.skipped, skipped, "dead letters in between");
        assert_eq!(work.claim.last_event.0, claimed.last_event, "the latest");
        self.work.push(work);
    }

    /// The report of a worker, as `delivery` builds it.
    fn report(&mut self, work: Work, script: &Script) -> Report {
        let now = self.plain.now;
        let Work {
            mut conversation,
            events,
            claim,
            verify,
        } = work;
        let id = conversation.id.0;
        let mut outcomes: Vec<EventOutcome> = Vec::new();
        let mut consumed = Vec::new();
        let mut observation = Observation::None;
        let (mut becomes_stale, mut due) = (false, Due::IfWaiting);
        let mut result = None;
        let has_chat = conversation.observed.chat.is_some();
        let found = match script.found {
            Found::ReadWithoutMessages | Found::UnreadableMessages if !has_chat => {
                Found::AsRemembered
            }
            // Only a chat that this claim creates can be found gone.
            Found::Gone { .. } if !has_chat && !matches!(script.fates[0], Fate::Delivered) => {
                Found::AsRemembered
            }
            found => found,
        };
        if let Some(verify) = verify {
            let missing = self.missing(id, script).len();
            let (chat_is_missing, repaired) = match found {
                Found::Gone { .. } => (Some(true), Observation::Gone { rebuild: true }),
                Found::Failed { pause } => {
                    due = Due::At(Millis(now + pause));
                    (None, Observation::None)
                }
                // The verification gives way to events.
                Found::ReadWithoutMessages if verify.is_idle => (None, Observation::None),
                _ => (Some(false), self.read(id, script)),
            };
            if verify.mode != VerifyMode::Report {
                observation = repaired;
            }
            result = chat_is_missing.map(|chat| VerificationResult {
                missing: Missing {
                    chat,
                    messages: u32::try_from(missing).expect("a count"),
                    ..Missing::default()
                },
                ..VerificationResult::default()
            });
        } else {
            match found {
                Found::AsRemembered | Found::Gone { .. } => {
                    if !has_chat && matches!(script.fates[0], Fate::Delivered) {
                        observation = Observation::Created;
                        conversation.observed.chat = Some(Uuid::from_u128(1));
                        conversation.observed.external_id = Some(id.to_string());
                    }
                    if matches!(script.fates[0], Fate::Delivered) {
                        conversation.observed.started_at = conversation.desired.started_at;
                        conversation.observed.advisor = conversation.desired.advisor();
                        conversation.observed.agent = Some(Uuid::from_u128(2));
                    }
                    let changes = events.iter().filter(|event| event.payload.text().is_none());
                    let messages = events.iter().filter(|event| event.payload.text().is_some());
                    let fates = script.fates.iter().cycle();
                    for (event, fate) in changes.chain(messages).zip(fates) {
                        match fate {
                            Fate::NotTried => break,
                            Fate::Interrupted => {
                                due = Due::At(Millis(now + PAUSE));
                                break;
                            }
                            _ => {}
                        }
                        let outcome = self.outcome(event, *fate);
                        let text = event.payload.text();
                        if let (Outcome::Delivered(_), Some(_), Some(text)) =
                            (&outcome, event.credit, text)
                        {
                            consumed.push(MessageKey::new(event.at, text));
                        }
                        if let Outcome::Retry { next_at, .. } = &outcome {
                            due = Due::At(*next_at);
                        }
                        outcomes.push(EventOutcome::of(event, outcome));
                        match fate {
                            Fate::Delivered | Fate::Rejected => {}
                            Fate::Retried {
                                outcome_unknown, ..
                            }
                            | Fate::GivenUp { outcome_unknown } => {
                                becomes_stale = *outcome_unknown;
                                break;
                            }
                            Fate::Interrupted | Fate::NotTried => {}
                        }
                    }
                    if let Found::Gone { rebuild } = found {
                        // Only the request that showed the loss failed. It counts if the chat was new.
                        let is_new = observation == Observation::Created;
                        outcomes.retain(|outcome| match outcome.outcome {
                            Outcome::Delivered(_) => !rebuild,
                            Outcome::DeadLetter { .. } => true,
                            Outcome::Retry { .. } => is_new,
                        });
                        if !is_new {
                            due = Due::IfWaiting;
                        }
                        becomes_stale = false;
                        observation = Observation::Gone { rebuild };
                    }
                }
                Found::Read => {
                    // A conversation without a chat adopts the one it finds.
                    conversation.observed.chat = Some(Uuid::from_u128(1));
                    conversation.observed.external_id = Some(id.to_string());
                    observation = self.read(id, script);
                }
                Found::ReadWithoutMessages => observation = Observation::Read(None),
                Found::UnreadableMessages => {
                    let is_outcome_unknown = |event: &&Pending| {
                        event.payload.text().is_some()
                            && (event.attempts.outcome_unknown || event.id.0 <= self.replay_until)
                    };
                    let fate = Fate::GivenUp {
                        outcome_unknown: true,
                    };
                    let dead = events
                        .iter()
                        .filter(is_outcome_unknown)
                        .map(|event| EventOutcome::of(event, self.outcome(event, fate)));
                    outcomes.extend(dead);
                    observation = Observation::Read(None);
                }
                Found::Failed { pause } => match events.first() {
                    None => due = Due::At(Millis(now + pause)),
                    Some(first) => {
                        let fate = Fate::Retried {
                            pause,
                            outcome_unknown: false,
                        };
                        due = Due::At(Millis(now + pause));
                        outcomes.push(EventOutcome::of(first, self.outcome(first, fate)));
                    }
                },
            }
        }
        self.writes += 1;
        Report {
            advance: advance(&claim, &events, &outcomes),
            conversation,
            claim,
            outcomes,
            consumed,
            observation,
            becomes_stale,
            due,
            writes_succeeded: self.writes,
            verify,
            found: result,
            drift: None,
            missing: None,
        }
    }

    /// The outcome of an attempt; see `delivery::attempts`.
    fn outcome(&self, event: &Pending, fate: Fate) -> Outcome {
        let failure = Failure::default();
        let attempts = |counts: bool, outcome_unknown: bool| Attempts {
            failed: event.attempts.failed + 1,
            counted: event.attempts.counted + u32::from(counts),
            writes_then: Some(self.writes),
            outcome_unknown: event.attempts.outcome_unknown || outcome_unknown,
        };
        match fate {
            Fate::Delivered if event.credit.is_some() => Outcome::Delivered(Effect::Nothing),
            Fate::Delivered if event.payload.text().is_some() => {
                Outcome::Delivered(Effect::MessageAdded)
            }
            Fate::Delivered => Outcome::Delivered(Effect::ChatChanged),
            Fate::Rejected => Outcome::DeadLetter {
                attempts: attempts(false, false),
                failure,
                permanent: true,
            },
            Fate::GivenUp { outcome_unknown } => Outcome::DeadLetter {
                attempts: attempts(true, outcome_unknown),
                failure,
                permanent: false,
            },
            Fate::Retried {
                pause,
                outcome_unknown,
            } => Outcome::Retry {
                attempts: attempts(true, outcome_unknown),
                next_at: Millis(self.plain.now + pause),
                failure,
            },
            Fate::Interrupted | Fate::NotTried => unreachable!("it has no outcome"),
        }
    }

    /// The result of reading a conversation's chat.
    fn read(&mut self, id: i64, script: &Script) -> Observation {
        let messages = EVENTS.iter().filter_map(Reported::key);
        let credits: HashMap<_, _> = messages
            .zip(script.credits)
            .filter(|(_, count)| *count > 0)
            .collect();
        let missing = self.missing(id, script);
        let unknown = self.plain.events.iter().filter(|(_, event)| {
            let key = EVENTS[event.what].key();
            (event.conversation, event.state) == (id, State::Waiting)
                && event.attempts.outcome_unknown
                && key.is_some_and(|key| credits.contains_key(&key))
        });
        Observation::Read(Some(Accounting {
            missing,
            credited: unknown.map(|(event, _)| EventId(*event)).collect(),
            credits,
        }))
    }

    /// The delivered messages that are missing.
    fn missing(&mut self, id: i64, script: &Script) -> Vec<EventId> {
        let (conversation, replay_until) = (ConversationId(id), EventId(self.replay_until));
        let recorded = self.store.recorded_messages(conversation, replay_until);
        let recorded = recorded.expect("the messages");
        let states: Vec<_> = recorded
            .iter()
            .map(|message| (message.id.0, message.state))
            .collect();
        let expected = self.plain.message_states(id, self.replay_until);
        assert_eq!(states, expected, "what is known of each message");
        let is_missing = script.missing.iter().cycle();
        let delivered = recorded
            .iter()
            .filter(|message| message.state == MessageState::Delivered);
        delivered
            .zip(is_missing)
            .filter(|(_, is_missing)| **is_missing)
            .map(|(message, _)| message.id)
            .collect()
    }

    fn commit(&mut self, at_most: usize) {
        let now = self.now();
        let batch: Vec<_> = self
            .reports
            .drain(..at_most.min(self.reports.len()))
            .collect();
        self.store
            .commit(&batch, self.session, now)
            .expect("a commit");
        for report in batch {
            self.plain.commit(&report);
        }
    }

    /// The last report of a batch cannot be committed, so none of them is.
    fn refuse(&mut self) {
        let Some(mut impossible) = self.reports.first().cloned() else {
            return;
        };
        impossible.conversation.id = ConversationId(99);
        impossible.outcomes.clear();
        impossible.advance.delivered.clear();
        let now = self.now();
        let mut reports = self.reports.clone();
        reports.push(impossible);
        let refused = self.store.commit(&reports, self.session, now);
        assert!(refused.is_err(), "there is no such conversation");
    }

    /// The operator resolves one of the dead letters, or all.
    fn resolve(&mut self, which: Option<prop::sample::Index>, resolution: Resolution) -> Vec<i64> {
        let mut ids = self.plain.ids(|event| event.state == State::Failed);
        if let Some(which) = which
            && !ids.is_empty()
        {
            ids = vec![*which.get(&ids)];
        }
        let which = Selection::Ids(ids.iter().copied().map(EventId).collect());
        let resolved = self.store.resolve_failed(
            &which,
            resolution,
            &Operator::Command("ann".into()),
            EventId(0),
            self.now(),
        );
        assert_eq!(resolved.expect("a resolution").done, ids.len(), "resolved");
        ids
    }

    fn verify(&mut self, repair: bool, conversation: Option<i64>, withdraws: bool) {
        let now = self.now();
        if withdraws {
            let by_hand = "SELECT id FROM verifications WHERE NOT idle";
            for verification in self.rows(by_hand, |row| row.get(0)) {
                self.store
                    .withdraw_verification(verification)
                    .expect("it is withdrawn");
            }
            self.plain.requests.retain(|request| request.idle);
        }
        let requested = self.store.request_verification(conversation, repair, now);
        let requested = requested.expect("a request");
        let chats = self.plain.conversations.iter().filter(|(id, of)| {
            of.verified_in.is_some() && conversation.is_none_or(|conversation| conversation == **id)
        });
        let chats: Vec<i64> = chats.map(|(id, _)| *id).collect();
        let is_any = !chats.is_empty();
        assert_eq!(requested.is_some(), is_any, "there is something to verify");
        if is_any {
            self.plain.request(false, repair, chats);
        }
    }

    fn restart(&mut self) {
        self.work.clear();
        self.reports.clear();
        let session = self
            .store
            .start_session(Intervals::default(), self.now())
            .expect("a session");
        self.plain.restart();
        (self.session, self.replay_until) = (session.id, session.replay_until.get().0);
        let last = self.plain.events.keys().last().copied().unwrap_or(0);
        assert_eq!(session.replay_until.get().0, last, "the latest event");
    }

    fn prune(&mut self, at_most: u32) {
        let (may_be, must_be) = self.plain.droppable(RETENTION, OVERLAP);
        let pruned = self
            .store
            .prune(RETENTION, OVERLAP, self.now(), at_most)
            .expect("old events are dropped");
        let left: HashSet<i64> = self
            .rows("SELECT id FROM events", |row| row.get(0))
            .into_iter()
            .collect();
        let gone = self.plain.ids(|_| true);
        let gone: BTreeSet<i64> = gone.into_iter().filter(|id| !left.contains(id)).collect();
        assert_eq!(gone.len(), pruned.dropped, "how many are dropped");
        let of_gone: BTreeSet<i64> = gone
            .iter()
            .map(|id| self.plain.events[id].conversation)
            .collect();
        let needed: Vec<_> = gone.difference(&may_be).collect();
        assert!(needed.is_empty(), "events {needed:?} must not be dropped");
        assert!(
            pruned.is_more || must_be.is_subset(&gone),
            "{must_be:?} are to be dropped, and {gone:?} are"
        );
        self.plain.events.retain(|id, _| !gone.contains(id));
        self.plain.dropped(&of_gone);
    }

    /// Checks that both agree, and the invariants of each.
    fn compare(&mut self) {
        self.compare_events();
        self.compare_conversations();
        self.compare_verifications();
        let waiting = self.plain.ids(plain::Event::waits);
        assert_eq!(self.store.waiting().expect("a count"), waiting.len() as u64);
        let failed = self.plain.ids(|event| event.state == State::Failed).len();
        assert_eq!(self.store.count_failed().expect("a count"), failed as u64);
        let counted = "SELECT coalesce(sum(received), 0), coalesce(sum(delivered), 0), coalesce(sum(failed), 0) FROM activity";
        let counted = self.rows(counted, |row| {
            Ok(plain::Counted {
                received: row.get(0)?,
                delivered: row.get(1)?,
                failed: row.get(2)?,
            })
        });
        assert_eq!(counted, [self.plain.counted], "what was counted");

        let reported = self.reports.iter().flat_map(|report| &report.outcomes);
        let reported = reported.map(|outcome| outcome.event);
        let in_memory = self.work.iter().flat_map(|work| work.events.iter());
        let mut handed_out = HashSet::new();
        for event in in_memory.map(|event| event.id).chain(reported) {
            assert!(handed_out.insert(event), "event {event} is claimed twice");
            assert!(self.plain.events[&event.0].waits(), "event {event} waits");
        }
    }

    fn compare_events(&mut self) {
        let states = self.rows(
            "SELECT id, conversation, state FROM event_states ORDER BY id",
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
        );
        let expected: Vec<(i64, i64, String)> = self
            .plain
            .events
            .iter()
            .map(|(id, event)| (*id, event.conversation, event.state.name().to_owned()))
            .collect();
        assert_eq!(states, expected, "events: id, conversation, state");

        let attempts = "SELECT s.id, coalesce(a.attempts, 0), coalesce(a.counted, 0), coalesce(a.outcome_unknown, 0), a.next_at
            FROM event_states s LEFT JOIN attempts a ON a.event = s.id WHERE s.state IN ('waiting', 'failed') ORDER BY s.id";
        let attempts = self.rows(attempts, |row| {
            Ok((
                row.get(0)?,
                row.get(1)?,
                row.get(2)?,
                row.get(3)?,
                row.get(4)?,
            ))
        });
        let open = self
            .plain
            .events
            .iter()
            .filter(|(_, event)| matches!(event.state, State::Waiting | State::Failed));
        let expected: Vec<(i64, u32, u32, bool, Option<i64>)> = open
            .map(|(id, event)| {
                let Attempts {
                    failed,
                    counted,
                    outcome_unknown,
                    ..
                } = event.attempts;
                (*id, failed, counted, outcome_unknown, event.next_at)
            })
            .collect();
        assert_eq!(
            attempts, expected,
            "attempts: event, failed, counted, outcome unknown, next"
        );

        let again = self.rows(
            "SELECT event, conversation, restored FROM redeliveries ORDER BY event",
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
        );
        let expected: Vec<(i64, i64, bool)> = self
            .plain
            .events
            .iter()
            .filter(|(_, event)| event.waits() && event.passed)
            .map(|(id, event)| (*id, event.conversation, event.lost))
            .collect();
        assert_eq!(
            again, expected,
            "redeliveries: event, conversation, restored"
        );
    }

    fn compare_conversations(&mut self) {
        let conversations = "SELECT id, waiting, due_at, stale_seq > fresh_seq, verified_losses, read_in_session = (SELECT session FROM control),
                chat_id IS NOT NULL, external_id IS NOT NULL
            FROM conversations ORDER BY id";
        let conversations = self.rows(conversations, |row| {
            Ok((
                (row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?),
                (row.get(4)?, row.get(5)?, row.get(6)?, row.get(7)?),
            ))
        });
        type Row = ((i64, i64, Option<i64>, bool), (i64, bool, bool, bool));
        let expected: Vec<Row> = self
            .plain
            .conversations
            .iter()
            .map(|(id, conversation)| {
                let plain::Conversation {
                    due,
                    stale,
                    has_chat,
                    is_known,
                    verified_losses,
                    is_read,
                    ..
                } = conversation;
                let waiting = self.plain.waiting(*id).len() as i64;
                (
                    (*id, waiting, *due, *stale),
                    (*verified_losses, *is_read, *has_chat, *is_known),
                )
            })
            .collect();
        assert_eq!(
            conversations, expected,
            "conversations: id, waiting, due, stale; losses, read, chat, external id"
        );
        for ((id, waiting, due, _), _) in &expected {
            assert!(
                *waiting == 0 || due.is_some(),
                "what waits of conversation {id} is due some time"
            );
        }

        let since = "SELECT waiting > 0, waiting_since IS NOT NULL,
                EXISTS (SELECT 1 FROM redeliveries r WHERE r.conversation = c.id AND NOT r.restored)
                OR EXISTS (SELECT 1 FROM event_states e WHERE e.conversation = c.id AND e.state = 'waiting'
                    AND e.id > max(c.offset, c.restored_through))
            FROM conversations c";
        for (waits, has_age, is_first) in
            self.rows(since, |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        {
            let (waits, has_age, is_first): (bool, bool, bool) = (waits, has_age, is_first);
            assert!(
                !is_first || has_age,
                "what waits for its first delivery has an age"
            );
            assert!(waits || !has_age, "what does not wait has none");
        }

        let credits = self.rows(
            "SELECT conversation, sent_at, text, count, as_of FROM credits ORDER BY conversation, sent_at, text",
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?)),
        );
        let mut expected: Vec<(i64, i64, String, u32, i64)> = self
            .plain
            .conversations
            .iter()
            .flat_map(|(id, conversation)| {
                conversation.credits.iter().map(|(what, (count, as_of))| {
                    let MessageKey { sent_at, text } = EVENTS[*what].key().expect("a message");
                    (*id, sent_at.unix(), text, *count, *as_of)
                })
            })
            .collect();
        expected.sort();
        assert_eq!(
            credits, expected,
            "credits: conversation, time, text, count, as of"
        );
    }

    fn compare_verifications(&mut self) {
        let rows = self.rows(
            "SELECT id, verified_in FROM conversations ORDER BY id",
            |row| Ok((row.get(0)?, row.get(1)?)),
        );
        let conversations = self.plain.conversations.iter();
        let expected: Vec<(i64, Option<i64>)> = conversations
            .map(|(id, conversation)| (*id, conversation.verified_in))
            .collect();
        assert_eq!(rows, expected, "conversations: id, verified in");
        let rows = self.rows(
            "SELECT id, idle, requested_at, ended_at, verified FROM verifications ORDER BY id",
            |row| {
                Ok((
                    row.get(0)?,
                    row.get(1)?,
                    row.get(2)?,
                    row.get(3)?,
                    row.get(4)?,
                ))
            },
        );
        type Row = (i64, bool, i64, Option<i64>, i64);
        let requests = self.plain.requests.iter();
        let expected: Vec<Row> = requests
            .map(|of| (of.id, of.idle, of.began_at, of.ended_at, of.verified))
            .collect();
        assert_eq!(
            rows, expected,
            "verifications: id, idle, began, ended, verified"
        );
        let rows = self.rows(
            "SELECT verification, conversation, next_at, state IS NOT NULL, repairing, not_repaired,
                coalesce(state <> 'same', 0) OR messages > 0
             FROM requested_chats ORDER BY verification, conversation",
            |row| {
                let chat = plain::Requested {
                    next_at: row.get(2)?,
                    is_verified: row.get(3)?,
                    repairing: row.get(4)?,
                    not_repaired: row.get(5)?,
                    differs: row.get(6)?,
                };
                Ok((row.get(0)?, row.get(1)?, chat))
            },
        );
        let chats = |of: &plain::Request| {
            let chats = of.chats.iter().map(|(id, chat)| (of.id, *id, *chat));
            chats.collect::<Vec<_>>()
        };
        let expected: Vec<(i64, i64, plain::Requested)> =
            self.plain.requests.iter().flat_map(chats).collect();
        assert_eq!(
            rows, expected,
            "requested: verification, conversation, chat"
        );
        for request in self.plain.requests.iter().filter(|request| !request.idle) {
            let id = VerificationId(request.id);
            let progress = self.store.verification_progress(id).expect("the progress");
            let differing = self.store.differences(id, u32::MAX).expect("the findings");
            let count = |is: fn(&plain::Requested) -> bool| {
                request.chats.values().filter(|chat| is(chat)).count() as u64
            };
            assert_eq!(progress.verified, request.verified.unsigned_abs());
            assert_eq!(progress.left, count(|chat| !chat.is_verified));
            assert_eq!(progress.repairing, count(|chat| chat.repairing));
            assert_eq!(
                progress.not_repaired,
                count(|chat| chat.not_repaired.is_some())
            );
            assert_eq!(differing.len() as u64, count(|chat| chat.differs));
            assert!(progress.not_repaired <= differing.len() as u64);
        }
    }

    fn rows<T>(
        &mut self,
        sql: &str,
        read: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
    ) -> Vec<T> {
        let mut statement = self
            .store
            .connection()
            .prepare_cached(sql)
            .expect("a statement");
        let rows = statement.query_map([], read).expect("rows");
        rows.collect::<rusqlite::Result<_>>().expect("rows")
    }
}

fn pause() -> impl Strategy<Value = i64> {
    prop_oneof![5 => 0_i64..500, 4 => 0_i64..60_000, 1 => 0_i64..10_000_000]
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        8 => Just(Fate::Delivered),
        2 => Just(Fate::Rejected),
        2 => (pause(), any::<bool>())
            .prop_map(|(pause, outcome_unknown)| Fate::Retried { pause, outcome_unknown }),
        2 => any::<bool>().prop_map(|outcome_unknown| Fate::GivenUp { outcome_unknown }),
        1 => Just(Fate::Interrupted),
        1 => Just(Fate::NotTried),
    ]
}

fn script() -> impl Strategy<Value = Script> {
    let found = prop_oneof![
        8 => Just(Found::AsRemembered),
        3 => Just(Found::Read),
        1 => Just(Found::ReadWithoutMessages),
        1 => Just(Found::UnreadableMessages),
        1 => pause().prop_map(|pause| Found::Failed { pause }),
        2 => any::<bool>().prop_map(|rebuild| Found::Gone { rebuild }),
    ];
    let retried = (pause(), any::<bool>()).prop_map(|(pause, outcome_unknown)| Fate::Retried {
        pause,
        outcome_unknown,
    });
    // A change of the chat is delivered first, while a message that precedes it still waits.
    let change = prop_oneof![Just(Fate::Delivered), Just(Fate::Rejected)];
    let fates = prop_oneof![
        3 => proptest::collection::vec(fate(), 1..5),
        1 => (change, retried).prop_map(|(change, message)| vec![change, message]),
    ];
    (
        fates,
        found,
        proptest::collection::vec(any::<bool>(), 1..4),
        [0_u32..3, 0_u32..3],
    )
        .prop_map(|(fates, found, missing, credits)| Script {
            fates,
            found,
            missing,
            credits,
        })
}

/// A page with events, each in a number of copies.
fn page() -> impl Strategy<Value = Step> {
    let last = EVENTS.len() - 1;
    let conversation = prop_oneof![3 => Just(1), 2 => 2..=CONVERSATIONS];
    let event = prop_oneof![60 => 0..2_usize, 60 => 2..last, 1 => Just(last)];
    let events = (conversation, event, 1_usize..3)
        .prop_map(|(conversation, what, count)| vec![(conversation, what); count]);
    proptest::collection::vec(events, 1..4).prop_map(|events| Step::Ingest(events.concat()))
}

/// Operations of other processes, at any time.
fn meanwhile() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>;
    let after = prop_oneof![Just(0_i64), 0_i64..150_000];
    prop_oneof![
        6 => page(),
        3 => proptest::option::of(index()).prop_map(Step::Retry),
        2 => proptest::option::of(index()).prop_map(Step::Discard),
        1 => Just(Step::Loss),
        1 => (any::<bool>(), proptest::option::of(1..=CONVERSATIONS), any::<bool>())
            .prop_map(|(repair, conversation, withdraws)| Step::Verify { repair, conversation, withdraws }),
        2 => (0_i64..3_000).prop_map(Step::Later),
        1 => (0_i64..200_000).prop_map(Step::Later),
        3 => (after, prop_oneof![1 => 1_u32..3, 2 => Just(100)])
            .prop_map(|(after, at_most)| Step::Prune { after, at_most }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>;
    let while_claimed = proptest::collection::vec(meanwhile(), 0..3);
    prop_oneof![
        14 => meanwhile(),
        3 => (1_usize..4).prop_map(Step::Claim),
        1 => Just(Step::Probe),
        4 => (index(), script()).prop_map(|(work, script)| Step::Report(work, script)),
        1 => index().prop_map(Step::Release),
        4 => (1_usize..4).prop_map(Step::Commit),
        1 => Just(Step::Refuse),
        10 => (script(), while_claimed)
            .prop_map(|(script, meanwhile)| Step::Deliver(script, meanwhile)),
        1 => Just(Step::Restart),
        4 => Just(Step::Idle),
        1 => (0_i64..3_000).prop_map(Step::SetBack),
    ]
}

/// Few enough cases to run in seconds, unless `PROPTEST_CASES` sets another number.
fn config() -> ProptestConfig {
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => ProptestConfig::default(),
        None => ProptestConfig::with_cases(64),
    }
}

proptest! {
    #![proptest_config(config())]
    #[test]
    fn journal_equals_plain_model(steps in proptest::collection::vec(step(), 1..60)) {
        let mut pair = Pair::new();
        for step in steps {
            pair.step(step);
        }
    }
}

/// A chat that differs in a verification, and is then lost and created again, is verified again by the same
/// verification.
#[test]
fn chat_differs_twice_in_a_verification() {
    let script = |found, missing| Script {
        fates: vec![Fate::Delivered],
        found,
        missing: vec![missing],
        credits: [0, 0],
    };
    let deliver = |found, missing, meanwhile| Step::Deliver(script(found, missing), meanwhile);
    let verify = Step::Verify {
        repair: true,
        conversation: None,
        withdraws: false,
    };
    let gone = Found::Gone { rebuild: false };
    let mut pair = Pair::new();
    for step in [
        Step::Ingest(vec![(3, 0)]),
        deliver(Found::AsRemembered, false, vec![]),
        deliver(Found::AsRemembered, false, vec![verify]),
        deliver(Found::AsRemembered, true, vec![]),
        deliver(gone, false, vec![]),
        deliver(Found::AsRemembered, false, vec![]),
        deliver(gone, false, vec![]),
    ] {
        pair.step(step);
    }
}
