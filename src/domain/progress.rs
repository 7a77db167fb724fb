//! Progress: what became of the events of a claim, and how far the conversation's offset moves.

use super::account::{Accounting, MessageKey};
use super::conversation::{Attempts, Conversation, Pending};
use super::ids::{ConversationId, EventId};
use crate::domain::event::EventKind;
use crate::domain::time::Millis;

/// What delivery works on at a time: a conversation and the next of its events that wait. Nobody else works on it until
/// the report is committed.
#[derive(Debug, Clone)]
pub struct Work {
    pub conversation: Conversation,
    /// In order of arrival, redeliveries first.
    pub events: Vec<Pending>,
    pub claim: Claim,
    /// The chat is to be verified, and nothing else.
    pub verify: Option<Verify>,
}

impl Work {
    /// Size of its messages in bytes.
    pub fn bytes(&self) -> usize {
        self.events.iter().map(Pending::bytes).sum()
    }
}

/// What a claim covers, and what was known when it was made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claim {
    pub offset: EventId,
    /// The last event it covers.
    pub through: EventId,
    /// Dead letters above the offset that it covers.
    pub skipped: Vec<EventId>,
    /// The conversation's latest event.
    pub last_event: EventId,
    pub stale_seq: i64,
    /// Something is not known since the chat was last read: the outcome of a write, or all of it.
    pub is_in_doubt: bool,
    /// How many losses of OurAPI there had been.
    pub losses: i64,
    /// There was a loss since the chat was last read or created.
    pub is_lost: bool,
    /// The chat's messages were read in this session, or the chat was created in it.
    pub is_read: bool,
    /// The chat was lost, and has not been built again yet.
    pub is_rewound: bool,
}

/// A verification by hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verify {
    pub verification: i64,
    pub repair: bool,
}

/// What a verification found of a chat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerificationResult {
    pub chat: ChatState,
    /// How many delivered messages are missing.
    pub messages: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChatState {
    Same,
    /// Its agent, start or end is not what was written, or its agent is gone.
    Differs,
    Missing,
}

/// What delivering an event changed in OurAPI. Several events may share one change of their chat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    ChatCreated,
    ChatChanged,
    MessageAdded,
    /// OurAPI had it already, or a later event overrides it.
    Nothing,
}

impl Effect {
    /// As stored.
    pub fn name(self) -> &'static str {
        match self {
            Self::ChatCreated => "chat created",
            Self::ChatChanged => "chat changed",
            Self::MessageAdded => "message added",
            Self::Nothing => "nothing",
        }
    }
}

/// Why an attempt failed, as stored with the event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Failure {
    pub reason: String,
    pub request: String,
    pub response: String,
}

/// What became of an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Delivered(Effect),
    Retry {
        attempts: Attempts,
        next_at: Millis,
        failure: Failure,
    },
    DeadLetter {
        attempts: Attempts,
        failure: Failure,
    },
}

/// An event, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventOutcome {
    pub event: EventId,
    pub kind: EventKind,
    pub redelivery: bool,
    /// It was delivered before, to a chat that has lost it.
    pub restored: bool,
    pub received_at: Millis,
    /// It had failed before.
    pub had_failed: bool,
    pub outcome: Outcome,
}

impl EventOutcome {
    pub fn of(event: &Pending, outcome: Outcome) -> Self {
        Self {
            event: event.id,
            kind: event.what.kind(),
            redelivery: event.redelivery,
            restored: event.restored,
            received_at: event.received_at,
            had_failed: event.attempts != Attempts::default(),
            outcome,
        }
    }

    /// Whether it counts in figures: what is delivered above the offset is delivered again with the next claim, and what was
    /// delivered before is restored.
    pub fn counts(&self, offset: EventId) -> bool {
        match self.outcome {
            Outcome::Delivered(_) => !self.restored && (self.redelivery || self.event <= offset),
            Outcome::Retry { .. } | Outcome::DeadLetter { .. } => true,
        }
    }

    /// Whether it is done with: there is nothing to wait for.
    fn is_settled(&self) -> bool {
        !matches!(self.outcome, Outcome::Retry { .. })
    }
}

/// What was learnt of the chat itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observation {
    /// Nothing but what was written.
    None,
    /// It was created: there is nothing in it that could be duplicated.
    Created,
    /// It was read; `None`: but not its messages.
    Read(Option<Accounting>),
    /// OurAPI has lost it. `rebuild`: all of its events are delivered again.
    Gone { rebuild: bool },
}

/// What became of a claim, to be committed.
#[derive(Debug, Clone)]
pub struct Report {
    pub conversation: Conversation,
    pub claim: Claim,
    /// Of the events that were tried; the others wait as before.
    pub outcomes: Vec<EventOutcome>,
    /// Where the offset is now, and how many events wait no longer.
    pub advance: Advance,
    /// The credits that were consumed.
    pub consumed: Vec<MessageKey>,
    pub observation: Observation,
    /// The outcome of a write is unknown, or what a chat holds that was taken over.
    pub in_doubt: bool,
    /// When it is due, if something is still to be done.
    pub due: Due,
    /// How many writes have succeeded in all.
    pub writes_succeeded: i64,
    /// `None` in it: the verification failed.
    pub verified: Option<(Verify, Option<VerificationResult>)>,
}

/// When a conversation is due after a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// As soon as possible, if anything waits.
    IfWaiting,
    /// Then, and not before.
    At(Millis),
}

/// How far a conversation got.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Advance {
    pub offset: EventId,
    /// How many events wait no longer.
    pub settled: u32,
    pub delivered: Vec<Delivered>,
}

/// Consecutive events that were delivered with the same effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivered {
    pub from: EventId,
    pub through: EventId,
    pub effect: Effect,
    /// When the first of them was received.
    pub received_at: Millis,
    /// They were delivered before, to a chat that has lost them.
    pub restored: bool,
}

/// The report on a worker that ended without one: whatever it did is unknown.
#[derive(Debug, Clone)]
pub struct Lost {
    pub conversation: ConversationId,
    /// Of the first event that it was given.
    pub outcome: Option<EventOutcome>,
    pub due_at: Millis,
}

/// How far the outcomes move the offset of a claim: to its end, or to just before the first event that still waits. A
/// change that is delivered above the new offset is folded again with the next claim, which changes nothing.
pub fn advance(claim: &Claim, events: &[Pending], outcomes: &[EventOutcome]) -> Advance {
    let mut in_order: Vec<&EventOutcome> = outcomes.iter().collect();
    in_order.sort_by_key(|outcome| outcome.event);
    let is_settled = |event: &Pending| {
        in_order
            .binary_search_by_key(&event.id, |outcome| outcome.event)
            .is_ok_and(|at| in_order[at].is_settled())
    };
    let first_waiting = events
        .iter()
        .filter(|event| !event.redelivery)
        .find(|event| !is_settled(event));
    let offset = match first_waiting {
        None => claim.through,
        Some(first) => events
            .iter()
            .filter(|event| !event.redelivery)
            .map(|event| event.id)
            .chain(claim.skipped.iter().copied())
            .filter(|id| *id < first.id)
            .max()
            .unwrap_or(claim.offset),
    };
    let mut advance = Advance {
        offset,
        ..Advance::default()
    };
    let mut last_redelivery = true;
    for outcome in in_order {
        let EventOutcome {
            event,
            redelivery,
            restored,
            received_at,
            ..
        } = *outcome;
        match outcome.outcome {
            Outcome::Retry { .. } => {}
            Outcome::DeadLetter { .. } => advance.settled += 1,
            Outcome::Delivered(effect) if redelivery || event <= offset => {
                advance.settled += 1;
                match advance.delivered.last_mut() {
                    Some(run)
                        if (run.effect, run.restored) == (effect, restored)
                            && !redelivery
                            && !last_redelivery =>
                    {
                        run.through = event;
                    }
                    _ => advance.delivered.push(Delivered {
                        from: event,
                        through: event,
                        effect,
                        received_at,
                        restored,
                    }),
                }
                last_redelivery = redelivery;
            }
            Outcome::Delivered(_) => {}
        }
    }
    advance
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::event::Payload;
    use crate::domain::time::Timestamp;

    fn pending(id: i64, redelivery: bool) -> Pending {
        Pending {
            id: EventId(id),
            at: Timestamp::clamped(1),
            received_at: Millis(1),
            what: Payload::End,
            attempts: Attempts::default(),
            redelivery,
            restored: false,
            credit: None,
        }
    }

    fn retry() -> Outcome {
        Outcome::Retry {
            attempts: Attempts::default(),
            next_at: Millis(1),
            failure: Failure::default(),
        }
    }

    fn dead() -> Outcome {
        Outcome::DeadLetter {
            attempts: Attempts::default(),
            failure: Failure::default(),
        }
    }

    const ADDED: Outcome = Outcome::Delivered(Effect::MessageAdded);
    const CHANGED: Outcome = Outcome::Delivered(Effect::ChatChanged);

    /// Advances a claim of events 10, 20, 30 with a dead letter 15 in between, from offset 5.
    fn advanced(outcomes: &[(i64, Outcome)]) -> Advance {
        let claim = Claim {
            offset: EventId(5),
            through: EventId(30),
            skipped: vec![EventId(15)],
            ..Claim::default()
        };
        let events = [10, 20, 30].map(|id| pending(id, false));
        let outcomes: Vec<EventOutcome> = outcomes
            .iter()
            .map(|(id, outcome)| EventOutcome::of(&pending(*id, false), outcome.clone()))
            .collect();
        advance(&claim, &events, &outcomes)
    }

    #[test]
    fn the_offset_stops_before_the_first_event_that_waits() {
        for (outcomes, offset, settled) in [
            (vec![], 5, 0),
            (vec![(10, retry())], 5, 0),
            (vec![(10, ADDED), (20, retry())], 15, 1),
            (vec![(10, dead()), (20, ADDED), (30, ADDED)], 30, 3),
            // Changes go first: 30 is delivered and waits all the same.
            (vec![(30, CHANGED), (10, retry())], 5, 0),
            // It is a dead letter from now on.
            (vec![(30, dead()), (10, retry())], 5, 1),
        ] {
            let advance = advanced(&outcomes);
            assert_eq!(
                (advance.offset, advance.settled),
                (EventId(offset), settled),
                "{outcomes:?}"
            );
        }
    }

    #[test]
    fn consecutive_events_of_one_effect_are_one_delivery() {
        let advance = advanced(&[(20, ADDED), (30, ADDED), (10, CHANGED)]);
        let runs: Vec<_> = advance
            .delivered
            .iter()
            .map(|run| (run.from.0, run.through.0, run.effect))
            .collect();
        assert_eq!(
            runs,
            [
                (10, 10, Effect::ChatChanged),
                (20, 30, Effect::MessageAdded)
            ]
        );
    }

    #[test]
    fn a_redelivery_settles_below_the_offset() {
        let claim = Claim {
            offset: EventId(30),
            through: EventId(30),
            ..Claim::default()
        };
        let events = [pending(10, true), pending(20, true)];
        let outcomes = events
            .each_ref()
            .map(|event| EventOutcome::of(event, ADDED));
        let both = advance(&claim, &events, &outcomes);
        assert_eq!(
            (both.offset, both.settled, both.delivered.len()),
            (EventId(30), 2, 2)
        );
        let one = advance(&claim, &events, &outcomes[..1]);
        assert_eq!((one.offset, one.settled), (EventId(30), 1));
    }

    proptest! {
        #[test]
        fn the_offset_passes_only_what_is_settled(
            states in proptest::collection::vec((0_u8..4, any::<bool>()), 0..12),
            skipped in proptest::collection::btree_set(1_i64..24, 0..4),
        ) {
            let events: Vec<Pending> = states.iter().zip(1_i64..)
                .map(|((_, redelivery), n)| pending(n * 2, *redelivery)).collect();
            let outcomes: Vec<EventOutcome> = states.iter().zip(&events).filter_map(|((state, _), event)| {
                let outcome = match state { 0 => return None, 1 => retry(), 2 => dead(), _ => ADDED };
                Some(EventOutcome::of(event, outcome))
            }).collect();
            let skipped: Vec<EventId> = skipped.into_iter().map(|n| EventId(n | 1)).collect();
            let last = events.iter().map(|event| event.id).chain(skipped.iter().copied()).max();
            let claim = Claim { through: last.unwrap_or_default(), skipped, ..Claim::default() };
            let advance = advance(&claim, &events, &outcomes);
            let settled = |event: &Pending| outcomes.iter().any(|outcome| outcome.event == event.id && outcome.is_settled());
            for event in events.iter().filter(|event| !event.redelivery) {
                prop_assert!(event.id > advance.offset || settled(event), "{} is passed", event.id);
            }
            let still: Vec<_> = events.iter().filter(|event| match event.redelivery {
                true => !settled(event),
                false => event.id > advance.offset
                    && !outcomes.iter().any(|outcome| outcome.event == event.id && matches!(outcome.outcome, Outcome::DeadLetter { .. })),
            }).collect();
            prop_assert_eq!(still.len() + advance.settled as usize, events.len());
        }
    }
}
