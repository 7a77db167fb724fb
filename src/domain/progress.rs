//! Progress: the outcomes of a claim's events, and how far they move the conversation's offset.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::account::{Accounting, MessageKey};
use super::conversation::{Attempts, Conversation, FieldSet, Pending};
use super::ids::{EventId, VerificationId};
use super::named::named;
use crate::domain::event::EventKind;
use crate::domain::time::Millis;

/// A claimed conversation with the next of its waiting events. No other worker gets it before its report is committed.
#[derive(Debug, Clone)]
pub struct Work {
    pub conversation: Conversation,
    /// In order of arrival, redeliveries first.
    pub events: Arc<[Pending]>,
    pub claim: Claim,
    /// `Some`: the chat is only to be verified.
    pub verify: Option<Verify>,
}

impl Work {
    /// Size of the message texts in bytes.
    pub fn bytes(&self) -> usize {
        self.events.iter().map(Pending::bytes).sum()
    }
}

/// The events that a claim covers, and the state of the conversation at the claim.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claim {
    pub offset: EventId,
    /// The last event covered.
    pub through: EventId,
    /// Dead letters above the offset, up to `through`.
    pub skipped: Vec<EventId>,
    /// The conversation's latest event.
    pub last_event: EventId,
    pub stale_seq: i64,
    /// The chat became stale after it was last read.
    pub became_stale: bool,
    /// The loss counter of OurAPI.
    pub losses: i64,
    /// OurAPI lost data after the chat was last read or created.
    pub is_lost: bool,
    /// In this session, the chat's messages were read or the chat was created.
    pub is_read: bool,
    /// The chat was lost and has not been rebuilt yet.
    pub is_rewound: bool,
    /// Passes in idle time verify the chat: it exists, and the journal has events of it.
    pub is_in_passes: bool,
    /// The fields that another client had changed when the chat was last read.
    pub drift: FieldSet,
}

impl Claim {
    /// Whether an attempt at the event may have been carried out: its outcome is unknown, or it was refused, perhaps by
    /// a proxy after OurAPI had carried it out, which made the chat stale.
    pub fn may_be_carried_out(&self, event: &Pending) -> bool {
        event.attempts.outcome_unknown || self.became_stale && event.attempts.failed > 0
    }

    /// Whether a waiting event may have been delivered although it has not failed: without a record in this journal, or
    /// before OurAPI lost the chat, if the chat that was found afterwards has not been read.
    pub fn may_be_delivered(&self, event: &Pending, replay_until: EventId) -> bool {
        event.id <= replay_until || event.restored && !self.is_read
    }

    /// Whether a waiting message may have been delivered.
    pub fn is_outcome_unknown(&self, event: &Pending, replay_until: EventId) -> bool {
        event.payload.kind().is_message()
            && (self.may_be_carried_out(event) || self.may_be_delivered(event, replay_until))
    }
}

/// A verification of a chat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verify {
    pub verification: VerificationId,
    pub mode: VerifyMode,
    /// A verification in idle time gives way to events.
    pub is_idle: bool,
}

/// How a verification treats differences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VerifyMode {
    /// Changes nothing.
    Report,
    /// Restores what is missing. A field that another client has changed stays.
    Restore,
    /// Restores what is missing, and overwrites fields with the values from the events.
    Overwrite,
}

/// The verification of all chats in idle time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdlePass {
    /// The period in which each chat is verified once.
    pub every: Duration,
    pub mode: VerifyMode,
}

/// What a verification found out about a chat.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VerificationResult {
    /// The verification failed repeatedly while OurAPI was up.
    pub is_unreadable: bool,
    pub missing: Missing,
    pub drift: FieldSet,
    /// The drift that not even a repair overwrites.
    pub kept: FieldSet,
    pub fields: Vec<FieldDifference>,
}

/// A differing field of a chat, with OurAPI's name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldDifference {
    pub field: String,
    /// The value in this database.
    pub recorded: Option<String>,
    /// The value in OurAPI.
    pub found: Option<String>,
}

impl FieldDifference {
    pub fn new<T: ToString>(field: &str, recorded: Option<T>, found: Option<T>) -> Self {
        let text = |value: Option<T>| value.map(|value| value.to_string());
        Self {
            field: field.to_owned(),
            recorded: text(recorded),
            found: text(found),
        }
    }
}

impl VerificationResult {
    /// The state of the chat, as shown and stored.
    pub fn state(&self) -> &'static str {
        match self {
            Self {
                is_unreadable: true,
                ..
            } => "unreadable",
            _ if self.missing.chat => "missing",
            _ if !self.drift.is_empty() || self.missing.ended_at || self.missing.agent => "differs",
            _ => "same",
        }
    }

    /// The remaining difference after a verification in that mode.
    pub fn left(&self, mode: VerifyMode) -> (Missing, FieldSet) {
        match mode {
            VerifyMode::Report => (self.missing, self.drift),
            VerifyMode::Restore => (Missing::default(), self.drift),
            VerifyMode::Overwrite => (Missing::default(), self.kept),
        }
    }
}

named! {
    /// Why a requested repair of a chat is not complete.
    NotRepaired {
        Unreadable = "the chat could not be read from OurAPI or from the database; see the log",
        DeadLetter = "an event could not be sent again; see `bigchat-sync failed list`",
        Kept = "no TRANSFER names the agent, or no START gives the start, so the value that was found is kept",
        Waiting = "an event of the conversation waits for its next attempt, and the repair with it",
        Rejected = "OurAPI rejects the change, or fails to make it",
    }
}

/// The parts of a chat that OurAPI has lost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Missing {
    pub chat: bool,
    /// The number of delivered messages.
    pub messages: u32,
    pub ended_at: bool,
    /// The agent of the chat.
    pub agent: bool,
}

impl Missing {
    pub fn is_none(self) -> bool {
        self == Self::default()
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let messages = match self.messages {
            0 => None,
            1 => Some("1 message".to_owned()),
            messages => Some(format!("{messages} messages")),
        };
        let named = |is_missing: bool, name: &str| is_missing.then(|| name.to_owned());
        let all = [
            named(self.chat, "the chat"),
            messages,
            named(self.ended_at, "ended_at"),
            named(self.agent, "its agent"),
        ];
        let all: Vec<String> = all.into_iter().flatten().collect();
        f.write_str(&all.join(", "))
    }
}

named! {
    /// What a delivery changed in OurAPI. Several events may share one change of their chat.
    Effect {
        ChatCreated = "chat created",
        ChatChanged = "chat changed",
        MessageAdded = "message added",
        /// OurAPI had the event already, or a later event overrides it.
        Nothing = "nothing",
    }
}

/// The record of a failed attempt, as stored with the event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Failure {
    pub reason: String,
    pub request: String,
    pub response: String,
}

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
        /// A retry is pointless unless OurAPI changes.
        permanent: bool,
    },
}

impl Outcome {
    /// Records that the failed request did not send the event, so that the failure does not make the event's outcome
    /// unknown.
    pub fn was_not_sent(&mut self, event: &Pending) {
        if let Self::Retry { attempts, .. } | Self::DeadLetter { attempts, .. } = self {
            attempts.outcome_unknown = event.attempts.outcome_unknown;
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventOutcome {
    pub event: EventId,
    pub kind: EventKind,
    pub redelivery: bool,
    /// It was delivered before, to a chat that has lost it.
    pub restored: bool,
    pub received_at: Millis,
    /// An earlier attempt failed.
    pub had_failed: bool,
    pub outcome: Outcome,
}

impl EventOutcome {
    pub fn of(event: &Pending, outcome: Outcome) -> Self {
        Self {
            event: event.id,
            kind: event.payload.kind(),
            redelivery: event.redelivery,
            restored: event.restored,
            received_at: event.received_at,
            had_failed: event.attempts != Attempts::default(),
            outcome,
        }
    }

    /// Whether metrics and activity count it. An event delivered above the offset is delivered again with the next
    /// claim, and a restored one was counted before.
    pub fn counts(&self, offset: EventId) -> bool {
        match self.outcome {
            Outcome::Delivered(_) => !self.restored && (self.redelivery || self.event <= offset),
            Outcome::Retry { .. } | Outcome::DeadLetter { .. } => true,
        }
    }

    /// Whether the event no longer waits.
    fn is_settled(&self) -> bool {
        !matches!(self.outcome, Outcome::Retry { .. })
    }
}

/// What a claim observed about the chat, apart from its own writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observation {
    None,
    /// The chat was created, so it cannot have messages that would be duplicated.
    Created,
    /// The chat existed already, and was not read yet.
    Adopted,
    /// The chat was read; `None`: without its messages.
    Read(Option<Accounting>),
    /// OurAPI has lost the chat. `rebuild`: all of its events are delivered again.
    Gone {
        rebuild: bool,
    },
}

impl Observation {
    /// Whether the journal's record of the chat is correct again.
    pub fn is_fresh(&self) -> bool {
        matches!(self, Self::Created | Self::Read(_))
    }

    /// Whether the journal knows which messages the chat has.
    pub fn is_read(&self) -> bool {
        matches!(self, Self::Created | Self::Read(Some(_)))
    }
}

/// The result of a claim.
#[derive(Debug, Clone)]
pub struct Report {
    pub conversation: Conversation,
    pub claim: Claim,
    /// The outcomes of the attempted events. All other events still wait.
    pub outcomes: Vec<EventOutcome>,
    pub advance: Advance,
    /// The credits consumed.
    pub consumed: Vec<MessageKey>,
    pub observation: Observation,
    /// The chat becomes stale: the outcome of a write is unknown, or the content of an adopted chat is.
    pub becomes_stale: bool,
    pub due: Due,
    /// How many writes have succeeded since the journal was created.
    pub writes_succeeded: i64,
    /// `None`: the claim delivered events.
    pub verify: Option<Verify>,
    /// `None`: the chat was not verified, or the verification failed or gave way to events.
    pub found: Option<VerificationResult>,
    /// The drift that remains after the chat was read; `None`: as before.
    pub drift: Option<FieldSet>,
    pub missing: Option<Missing>,
}

impl Report {
    /// When the conversation is due for reasons other than waiting events.
    pub fn due_at(&self, now: Millis) -> Option<Millis> {
        match self.due {
            Due::At(_) if self.is_requested() => None,
            Due::At(at) => Some(at),
            Due::IfWaiting => self.is_due_again().then_some(now),
        }
    }

    /// Whether something is left to do that follows from what was observed.
    pub fn is_due_again(&self) -> bool {
        match self.observation {
            // Without a chat there is nothing left to write, so the conversation is not due again at once.
            Observation::Read(None) => self.conversation.observed.chat.is_some(),
            Observation::Read(Some(_)) | Observation::Gone { .. } => true,
            Observation::None | Observation::Created | Observation::Adopted => false,
        }
    }

    /// Whether a `verify` command requested it. Such a verification has a time of its own for another attempt, which
    /// neither delays the conversation's events nor waits for them.
    fn is_requested(&self) -> bool {
        self.verify.is_some_and(|verify| !verify.is_idle)
    }
}

/// When a conversation is due after a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// As soon as possible, if an event waits.
    IfWaiting,
    /// Not before this time.
    At(Millis),
}

/// The new offset, and the events settled with it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Advance {
    pub offset: EventId,
    /// How many events no longer wait.
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

/// Moves the offset to the end of the claim, or to just before the first event that still waits. A change delivered
/// above the new offset is folded again with the next claim, which has no effect.
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
                    Some(last)
                        if (last.effect, last.restored) == (effect, restored)
                            && !redelivery
                            && !last_redelivery =>
                    {
                        last.through = event;
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

    #[test]
    fn states_of_a_verified_chat() {
        let unreadable = VerificationResult {
            is_unreadable: true,
            ..VerificationResult::default()
        };
        let missing = |missing| VerificationResult {
            missing,
            ..VerificationResult::default()
        };
        let nothing = Missing::default();
        let drift = VerificationResult {
            drift: FieldSet::named("agent_id"),
            ..VerificationResult::default()
        };
        for (found, state) in [
            (unreadable, "unreadable"),
            (
                missing(Missing {
                    chat: true,
                    ..nothing
                }),
                "missing",
            ),
            (
                missing(Missing {
                    agent: true,
                    ..nothing
                }),
                "differs",
            ),
            (
                missing(Missing {
                    ended_at: true,
                    ..nothing
                }),
                "differs",
            ),
            (drift, "differs"),
            (
                missing(Missing {
                    messages: 1,
                    ..nothing
                }),
                "same",
            ),
        ] {
            assert_eq!(found.state(), state);
        }
    }

    fn pending(id: i64, redelivery: bool) -> Pending {
        Pending {
            id: EventId(id),
            at: Timestamp::clamped(1),
            received_at: Millis(1),
            payload: Payload::End,
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
            permanent: true,
        }
    }

    const ADDED: Outcome = Outcome::Delivered(Effect::MessageAdded);
    const CHANGED: Outcome = Outcome::Delivered(Effect::ChatChanged);

    /// Advances a claim of events 10, 20 and 30 from offset 5, with dead letter 15 between them.
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
    fn offset_stops_before_a_waiting_event() {
        for (outcomes, offset, settled) in [
            (vec![], 5, 0),
            (vec![(10, retry())], 5, 0),
            (vec![(10, ADDED), (20, retry())], 15, 1),
            (vec![(10, dead()), (20, ADDED), (30, ADDED)], 30, 3),
            // Changes go first: 30 is delivered and still waits.
            (vec![(30, CHANGED), (10, retry())], 5, 0),
            // A dead letter no longer waits.
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
    fn consecutive_events_of_the_same_effect() {
        let advance = advanced(&[(20, ADDED), (30, ADDED), (10, CHANGED)]);
        let delivered: Vec<_> = advance
            .delivered
            .iter()
            .map(|delivered| (delivered.from.0, delivered.through.0, delivered.effect))
            .collect();
        assert_eq!(
            delivered,
            [
                (10, 10, Effect::ChatChanged),
                (20, 30, Effect::MessageAdded)
            ]
        );
    }

    #[test]
    fn redelivery_settles_below_the_offset() {
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
        fn offset_passes_only_settled_events(
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
            let waiting: Vec<_> = events.iter().filter(|event| match event.redelivery {
                true => !settled(event),
                false => event.id > advance.offset
                    && !outcomes.iter().any(|outcome| outcome.event == event.id && matches!(outcome.outcome, Outcome::DeadLetter { .. })),
            }).collect();
            prop_assert_eq!(waiting.len() + advance.settled as usize, events.len());
        }
    }
}
