//! Any sequence of operations against a plain model of the journal: what state each event is in, what is claimed and
//! when the rest is due.

mod plain;

use std::collections::HashMap;
use std::time::Duration;

use proptest::prelude::*;
use rusqlite::Connection;

use super::{Claim, Claimable, Decision, PageToKeep, Progress, Selection, Store, Who};
use crate::conversation::{Failure, Outcome, Sent, Settlement, Waiting, Work};
use crate::dedupe::{Key, Tally};
use crate::messages::{self, MessageKey};
use crate::time::{Millis, Timestamp};
use plain::{Event, Plain, State};

/// How long an interrupted conversation is left alone.
const PAUSE: Duration = Duration::from_millis(500);

/// How long what is done with is kept.
const RETENTION: i64 = 2_000;

/// How many conversations there are, and texts.
const CONVERSATIONS: usize = 3;
const TEXTS: u8 = 2;

#[derive(Debug, Clone)]
enum Step {
    /// A page tells that many equal messages of a conversation.
    Tell {
        conversation: usize,
        text: u8,
        count: usize,
    },
    /// Claims, without settling anything.
    Claim(usize),
    /// One of those in work is done: so many of its events are delivered, and the next one came to this.
    Settle {
        work: prop::sample::Index,
        delivered: prop::sample::Index,
        then: Then,
        claim: usize,
    },
    /// One of those in work goes back.
    Release(prop::sample::Index),
    /// The handler of one of those in work has panicked.
    Abandon(prop::sample::Index),
    /// The daemon dies and starts again.
    Restart,
    /// What OurAPI holds of one of those in work is compared: so many of each text. In doubt are those that waited at
    /// the start, if so.
    LookUp {
        work: prop::sample::Index,
        held: [u8; 2],
        from_start: bool,
    },
    /// An event of one in work is compared with what was found beyond.
    TakeFound(prop::sample::Index),
    /// The chat of one of those in work is gone, and another stands in its place, if so.
    Lose(prop::sample::Index, bool),
    /// Somebody decides about failed events.
    Retry(Option<prop::sample::Index>),
    Discard(Option<prop::sample::Index>),
    Later(i64),
    SetBack(i64),
    Prune,
}

/// What an event that was not delivered came to.
#[derive(Debug, Clone, Copy)]
enum Then {
    NotTried,
    Waits { pause: i64, in_doubt: bool },
    Fails,
}

/// The journal and the plain one, side by side, and what is in work.
struct Pair {
    store: Store,
    plain: Plain,
    work: Vec<Work>,
    session: i64,
    up_to: i64,
}

fn index(conversation: i64) -> usize {
    usize::try_from(conversation).expect("an id")
}

fn key_of(text: u8) -> MessageKey {
    messages::key(Timestamp::clamped(1_000), &format!("text {text}"))
}

impl Pair {
    fn new() -> Self {
        let connection = Connection::open_in_memory().expect("a database in memory");
        let mut store = Store::in_memory(connection, true).expect("a journal");
        for id in 1..=CONVERSATIONS as i64 {
            store
                .note_details(1, id, Timestamp::clamped(1), 1)
                .expect("a conversation");
        }
        let mut plain = Plain {
            now: 1_000_000,
            ..Plain::default()
        };
        for id in 1..=CONVERSATIONS {
            plain.conversation(id);
        }
        let mut pair = Self {
            store,
            plain,
            work: Vec::new(),
            session: 0,
            up_to: 0,
        };
        pair.restart();
        pair
    }

    fn now(&self) -> Millis {
        Millis(self.plain.now)
    }

    fn step(&mut self, step: Step) {
        let now = self.now();
        match step {
            Step::Tell {
                conversation,
                text,
                count,
            } => self.tell(conversation, text, count),
            Step::Claim(at_most) => self.settle_and_claim(&[], at_most),
            Step::Settle {
                work,
                delivered,
                then,
                claim,
            } => {
                if let Some(work) = self.take(work) {
                    self.settle(work, delivered, then, claim);
                }
            }
            Step::Release(work) => {
                if let Some(work) = self.take(work) {
                    let id = work.conversation.id;
                    self.store.release(&[id], now).expect("it goes back");
                    self.plain.conversation(index(id)).claimed = None;
                    self.plain.reschedule(index(id), None);
                }
            }
            Step::Abandon(work) => {
                if let Some(work) = self.take(work) {
                    let id = work.conversation.id;
                    self.store.abandon(id, PAUSE, now).expect("it is given up");
                    self.plain.abandon(index(id));
                }
            }
            Step::Restart => self.restart(),
            Step::LookUp {
                work,
                held,
                from_start,
            } => {
                if let Some(work) = self.pick(work) {
                    let id = work.conversation.id;
                    let up_to = if from_start { self.up_to } else { 0 };
                    let keys = (0..TEXTS)
                        .flat_map(|text| (0..held[usize::from(text)]).map(move |_| key_of(text)));
                    let there =
                        self.store
                            .note_look_up(id, keys.collect(), up_to, self.session, now);
                    let mut there: Vec<i64> = there.expect("a look-up").into_iter().collect();
                    there.sort_unstable();
                    let expected = self.plain.look_up(index(id), held, up_to);
                    assert_eq!(there, expected, "what stands there");
                }
            }
            Step::TakeFound(work) => self.take_found(work),
            Step::Lose(work, in_doubt) => {
                if let Some(work) = self.pick(work) {
                    let id = work.conversation.id;
                    self.store
                        .chat_replaced(id, true, in_doubt)
                        .expect("it is noted");
                    self.plain.lose(index(id), in_doubt);
                }
            }
            Step::Retry(which) => {
                let ids = self.failed(which);
                self.store
                    .decide_failed(
                        &Selection::Ids(ids.iter().copied().collect()),
                        Decision::Retry,
                        &Who::Command("ann".into()),
                        0,
                        now,
                    )
                    .expect("a decision");
                for id in ids {
                    let event = self.plain.events.get_mut(&id).expect("an event");
                    (event.state, event.settled_at, event.next_at) = (State::Waiting, None, None);
                    event.attempts.counted = 0;
                    let conversation = event.conversation;
                    self.plain.wake(conversation);
                    if self.plain.conversation(conversation).claimed.is_none() {
                        self.plain.reschedule(conversation, None);
                    }
                }
            }
            Step::Discard(which) => {
                let ids = self.failed(which);
                self.store
                    .decide_failed(
                        &Selection::Ids(ids.iter().copied().collect()),
                        Decision::Discard,
                        &Who::Console("ann".into()),
                        0,
                        now,
                    )
                    .expect("a decision");
                for id in ids {
                    let event = self.plain.events.get_mut(&id).expect("an event");
                    (event.state, event.settled_at) = (State::Discarded, Some(now.0));
                }
            }
            Step::Later(by) => self.plain.now += by,
            Step::SetBack(by) => {
                self.plain.now -= by;
                self.store
                    .clock_set_back(Duration::ZERO, self.now())
                    .expect("the clock is set back");
                self.plain.nothing_later_than(self.plain.now);
            }
            Step::Prune => {
                let retention = Duration::from_millis(RETENTION.unsigned_abs());
                self.store
                    .prune(retention, Duration::ZERO, now, 100)
                    .expect("old events go");
                let old = |event: &Event| event.settled_at.is_some_and(|at| at < now.0 - RETENTION);
                let undecided = self.plain.events.values();
                let undecided: Vec<(usize, u8)> = undecided
                    .filter(|event| matches!(event.state, State::Waiting | State::Failed))
                    .map(|event| (event.conversation, event.text))
                    .collect();
                self.plain.events.retain(|_, event| {
                    !old(event) || undecided.contains(&(event.conversation, event.text))
                });
            }
        }
        self.compare();
    }

    fn pick(&self, which: prop::sample::Index) -> Option<Work> {
        (!self.work.is_empty()).then(|| which.get(&self.work).clone())
    }

    fn take(&mut self, which: prop::sample::Index) -> Option<Work> {
        (!self.work.is_empty()).then(|| self.work.remove(which.index(self.work.len())))
    }

    /// One of the failed events, or all.
    fn failed(&self, which: Option<prop::sample::Index>) -> Vec<i64> {
        let failed = self.plain.in_state(State::Failed);
        match which {
            Some(which) if !failed.is_empty() => vec![*which.get(&failed)],
            _ => failed,
        }
    }

    fn tell(&mut self, conversation: usize, text: u8, count: usize) {
        let event = serde_json::json!({ "conversation_id": conversation, "event_name": "MESSAGE", "event_at": 1_000,
            "data": { "message": format!("text {text}") } });
        let at = Timestamp::clamped(1_000_000);
        let page = PageToKeep {
            query: "page".into(),
            again_of: None,
            served_at: at,
            window: (at, at),
            body: serde_json::json!({ "nextPageUrl": null, "events": vec![event; count] })
                .to_string(),
            events: count,
            progress: Progress::Complete(at),
        };
        self.store.keep_page(&page).expect("a page is kept");
        let kept = self
            .store
            .kept_pages()
            .expect("the pages")
            .pop()
            .expect("a page");
        let keys: Vec<Key> = kept.events().iter().map(Key::from).collect();
        let mut tally = Tally::default();
        tally.page(&keys, |_| 0);
        self.store
            .admit(&kept, 1, &tally, self.now())
            .expect("it is admitted");
        self.store.end_poll(None, 0, None).expect("the poll ends");
        self.plain.tell(conversation, text, count);
    }

    fn settle_and_claim(&mut self, settlements: &[Settlement], at_most: usize) {
        let now = self.now();
        let claim = Claim {
            probes: false,
            what: Claimable::All,
            conversations: at_most,
            bytes: usize::MAX,
            put_off: HashMap::new(),
        };
        let claimed = self
            .store
            .settle_and_claim(settlements, 0, Some(&claim), now)
            .expect("a claim");
        let expected = self.plain.claim(at_most);
        let work = claimed.work.iter().map(|work| {
            let events = work.events.iter().map(|event| (event.id, event.attempts));
            (index(work.conversation.id), events.collect())
        });
        assert_eq!(work.collect::<Vec<_>>(), expected, "what is claimed");
        let due = self
            .plain
            .conversations
            .values()
            .filter_map(|conversation| conversation.due)
            .min();
        assert_eq!(claimed.next_due, due.map(Millis), "what is due next");
        self.work.extend(claimed.work);
    }

    fn settle(&mut self, work: Work, delivered: prop::sample::Index, then: Then, claim: usize) {
        let delivered = delivered.index(work.events.len() + 1);
        let (done, rest) = work.events.split_at(delivered);
        let mut outcomes: Vec<_> = done
            .iter()
            .map(|event| event.settled(Outcome::Delivered(Sent::Message)))
            .collect();
        done.iter().for_each(|event| self.plain.deliver(event.id));
        let mut not_before = None;
        let waits = |event: &&Waiting| self.plain.in_state(State::Waiting).contains(&event.id);
        if let Some(event) = rest.iter().find(waits) {
            let now = self.plain.now;
            let mut attempts = event.attempts;
            attempts.tries += 1;
            let plain = self.plain.events.get_mut(&event.id).expect("an event");
            let failure = Failure::default();
            match then {
                Then::NotTried => {}
                Then::Waits { pause, in_doubt } => {
                    (attempts.counted, attempts.in_doubt) = (attempts.counted + 1, in_doubt);
                    not_before = Some(now + pause);
                    (plain.next_at, plain.attempts) = (not_before, attempts);
                    let next_at = Millis(now + pause);
                    outcomes.push(event.settled(Outcome::Waiting {
                        attempts,
                        next_at,
                        failure,
                    }));
                }
                Then::Fails => {
                    (plain.state, plain.settled_at) = (State::Failed, Some(now));
                    (plain.next_at, plain.attempts) = (None, attempts);
                    outcomes.push(event.settled(Outcome::Failed { attempts, failure }));
                }
            }
        }
        let id = index(work.conversation.id);
        self.plain.conversation(id).claimed = None;
        self.plain.reschedule(id, not_before);
        let settlement = Settlement {
            conversation: work.conversation,
            outcomes,
            finding: None,
        };
        self.settle_and_claim(&[settlement], claim);
    }

    fn take_found(&mut self, which: prop::sample::Index) {
        let Some(work) = self.pick(which) else { return };
        for event in &work.events {
            // What a look-up has found may have been pruned meanwhile.
            let plain = self.plain.events.get(&event.id);
            let Some(plain) = plain.filter(|plain| plain.state == State::Waiting) else {
                continue;
            };
            let (id, key, text) = (work.conversation.id, key_of(plain.text), plain.text);
            let taken = self
                .store
                .take_found(id, event.id, &key, self.now())
                .expect("a look");
            let left = &mut self.plain.conversation(index(id)).found[usize::from(text)];
            assert_eq!(taken, *left > 0, "whether it was found");
            if taken {
                *left -= 1;
                self.plain.deliver(event.id);
            }
        }
    }

    fn restart(&mut self) {
        self.work.clear();
        let session = self
            .store
            .start_session(PAUSE, self.now())
            .expect("a session");
        let claimed: Vec<usize> = self
            .plain
            .conversations
            .iter()
            .filter(|(_, conversation)| conversation.claimed.is_some())
            .map(|(id, _)| *id)
            .collect();
        assert_eq!(session.interrupted.len(), claimed.len(), "what was in work");
        claimed.into_iter().for_each(|id| self.plain.abandon(id));
        self.plain
            .nothing_later_than(self.plain.now + 24 * 3_600_000);
        (self.session, self.up_to) = (session.id, session.last_event);
        let last = self.plain.events.keys().last().copied().unwrap_or(0);
        assert_eq!(session.last_event, last, "the latest event");
    }

    /// Whether both say the same, and what must hold of either whatever was done.
    fn compare(&mut self) {
        let events = "SELECT e.id, e.conversation, e.state, coalesce(a.in_doubt, 0), coalesce(a.tries, 0), a.next_at
            FROM events e LEFT JOIN attempts a ON a.event = e.id ORDER BY e.id";
        let events = self.rows(events, |row| {
            Ok((
                row.get(0)?,
                row.get(1)?,
                row.get(2)?,
                row.get(3)?,
                row.get(4)?,
                row.get(5)?,
            ))
        });
        let expected: Vec<(i64, i64, String, bool, u32, Option<i64>)> = self
            .plain
            .events
            .iter()
            .map(|(id, event)| {
                let state = format!("{:?}", event.state).to_lowercase();
                (
                    *id,
                    event.conversation as i64,
                    state,
                    event.attempts.in_doubt,
                    event.attempts.tries,
                    event.next_at,
                )
            })
            .collect();
        assert_eq!(
            events, expected,
            "events: id, conversation, state, in doubt, tries, next"
        );
        let conversations = "SELECT id, due_at, claimed_through FROM conversations ORDER BY id";
        let conversations = self.rows(conversations, |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        });
        let expected: Vec<(i64, Option<i64>, Option<i64>)> = self
            .plain
            .conversations
            .iter()
            .map(|(id, conversation)| {
                let through = conversation
                    .claimed
                    .as_ref()
                    .map(|claimed| claimed.last().copied().unwrap_or(0));
                (*id as i64, conversation.due, through)
            })
            .collect();
        assert_eq!(conversations, expected, "conversations: id, due, claimed");
        for (id, due, claimed) in conversations {
            let waits = !self.plain.of(index(id), State::Waiting).is_empty();
            assert!(
                claimed.is_some() || waits == due.is_some(),
                "what waits is due some time, and nothing else is"
            );
            assert!(
                claimed.is_none() || due.is_none(),
                "what is in work is not due"
            );
        }
        let waiting = self.plain.in_state(State::Waiting).len() as u64;
        assert_eq!(self.store.waiting().expect("a count"), waiting);
        let failed = self.plain.in_state(State::Failed).len() as u64;
        assert_eq!(self.store.count_failed().expect("a count"), failed);
    }

    fn rows<T>(
        &mut self,
        sql: &str,
        read: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
    ) -> Vec<T> {
        let mut statement = self.store.connection().prepare(sql).expect("a statement");
        let rows = statement.query_map([], read).expect("rows");
        rows.collect::<rusqlite::Result<_>>().expect("rows")
    }
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>;
    let then = prop_oneof![
        Just(Then::NotTried),
        (0_i64..2_000, any::<bool>()).prop_map(|(pause, in_doubt)| Then::Waits { pause, in_doubt }),
        Just(Then::Fails),
    ];
    prop_oneof![
        4 => (1..=CONVERSATIONS, 0..TEXTS, 1_usize..4)
            .prop_map(|(conversation, text, count)| Step::Tell { conversation, text, count }),
        3 => (1_usize..4).prop_map(Step::Claim),
        4 => (index(), index(), then, 0_usize..3)
            .prop_map(|(work, delivered, then, claim)| Step::Settle { work, delivered, then, claim }),
        1 => index().prop_map(Step::Release),
        1 => index().prop_map(Step::Abandon),
        1 => Just(Step::Restart),
        2 => (index(), any::<[bool; 2]>(), any::<[u8; 2]>(), any::<bool>()).prop_map(|(work, some, held, from_start)| {
            let held = [0, 1].map(|text| if some[text] { held[text] % 5 } else { 0 });
            Step::LookUp { work, held, from_start }
        }),
        1 => index().prop_map(Step::TakeFound),
        1 => (index(), any::<bool>()).prop_map(|(work, in_doubt)| Step::Lose(work, in_doubt)),
        1 => proptest::option::of(index()).prop_map(Step::Retry),
        1 => proptest::option::of(index()).prop_map(Step::Discard),
        2 => (0_i64..3_000).prop_map(Step::Later),
        1 => (0_i64..3_000).prop_map(Step::SetBack),
        1 => Just(Step::Prune),
    ]
}

proptest! {
    #[test]
    fn the_journal_does_as_a_plain_one_would(steps in proptest::collection::vec(step(), 1..60)) {
        let mut pair = Pair::new();
        for step in steps {
            pair.step(step);
        }
    }
}
