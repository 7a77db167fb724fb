//! A conversation: its chat in OurAPI as it should be (desired), as the journal remembers it (observed), and the
//! difference. Only the difference is sent.

use std::fmt;

use serde::Serialize;
use uuid::Uuid;

use super::account::MessageKey;
use super::ids::{AdvisorId, ConversationId, Epoch, EventId};
use super::named::named;
use crate::domain::event::{EventKind, Payload};
use crate::domain::time::{Millis, Timestamp};

/// A conversation of one epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversation {
    pub id: ConversationId,
    pub epoch: Epoch,
    /// BigChat's id, which another conversation may have in another epoch.
    pub bigchat_id: i64,
    pub details: Details,
    pub desired: Desired,
    pub observed: Observed,
}

impl Conversation {
    /// Whether the chat exists and has the desired fields, as far as the journal remembers.
    pub fn is_written(&self) -> bool {
        let (desired, observed) = (&self.desired, &self.observed);
        observed.chat.is_some()
            && !self.lacks_start()
            && desired.ended_at <= observed.ended_at
            && (desired.advisor().is_none() || desired.advisor() == observed.advisor)
    }

    /// Whether the chat was written with another start, because the desired one was not known yet.
    pub fn lacks_start(&self) -> bool {
        self.desired.started_at.is_some() && self.desired.started_at != self.observed.started_at
    }

    /// Whether the chat has no agent although it should have one: for example, BigChat denied the advisor, OurAPI
    /// denied the agent, or another client has removed it.
    pub fn lacks_agent(&self) -> bool {
        self.observed.agent.is_none() && self.desired.advisor().is_some()
    }
}

named! {
    /// Whether a conversation's details were read from BigChat.
    Details {
        Unread = "unread",
        /// Never read again, since later details may name a later advisor.
        Read = "read",
        /// BigChat does not know the conversation, or has no usable record.
        Gone = "gone",
    }
}

/// The fold of a conversation's details and of the events whose change OurAPI has not rejected. Of several ENDs or
/// TRANSFERs, the one with the latest `event_at` counts, in any order of arrival; of several STARTs, the first
/// received.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Desired {
    /// From the START or the details; `None` if neither is known.
    pub started_at: Option<Timestamp>,
    /// From the details when they were first read.
    pub first_advisor: Option<AdvisorId>,
    /// From the latest END.
    pub ended_at: Option<Timestamp>,
    /// The latest TRANSFER.
    pub transfer: Option<Transfer>,
}

/// A TRANSFER, ordered by event time; ties go to the later arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Transfer {
    pub at: Timestamp,
    pub event: EventId,
    pub advisor: AdvisorId,
}

impl Desired {
    /// The advisor whose agent the chat should have. Details never undo a TRANSFER.
    pub fn advisor(&self) -> Option<AdvisorId> {
        self.transfer
            .map(|transfer| transfer.advisor)
            .or(self.first_advisor)
    }
}

/// A conversation's chat in OurAPI, as last written or read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// Set when the chat is created or adopted, or earlier if deriving it again later might give another id. Changed
    /// afterwards only if another conversation's chat turns out to have it.
    pub external_id: Option<String>,
    /// `None`: there is no chat yet.
    pub chat: Option<Uuid>,
    /// Set together with the external id.
    pub started_at: Option<Timestamp>,
    pub ended_at: Option<Timestamp>,
    pub agent: Option<Uuid>,
    /// The advisor whose agent it is; `None`: unknown, so the desired agent is written.
    pub advisor: Option<AdvisorId>,
}

/// The fields of a chat that events determine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fields {
    pub started_at: Timestamp,
    pub ended_at: Option<Timestamp>,
    pub agent: Option<Uuid>,
}

/// A change of a chat. OurAPI sets every field that a request names, so only changed fields are serialized.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ChatChange {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// `Some(None)` clears it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<Option<Uuid>>,
}

impl ChatChange {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Some of the fields of a chat that events determine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FieldSet {
    pub started_at: bool,
    pub ended_at: bool,
    pub agent: bool,
}

impl FieldSet {
    pub const ALL: Self = Self {
        started_at: true,
        ended_at: true,
        agent: true,
    };

    /// OurAPI's names of the fields.
    pub const NAMES: [&str; 3] = ["started_at", "ended_at", "agent_id"];

    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// The fields that these events change.
    pub fn changed_by<'a>(events: impl IntoIterator<Item = &'a Pending>) -> Self {
        let mut changed = Self::default();
        for event in events {
            match event.payload.kind() {
                EventKind::Start => changed.started_at = true,
                EventKind::End => changed.ended_at = true,
                EventKind::Transfer => changed.agent = true,
                EventKind::Message => {}
            }
        }
        changed
    }

    /// Reads the list of names that [`Display`](fmt::Display) writes.
    pub fn named(names: &str) -> Self {
        let [started_at, ended_at, agent] =
            Self::NAMES.map(|name| names.split(", ").any(|named| named == name));
        Self {
            started_at,
            ended_at,
            agent,
        }
    }
}

impl fmt::Display for FieldSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let has = [self.started_at, self.ended_at, self.agent];
        let names = Self::NAMES.into_iter().zip(has);
        let names: Vec<&str> = names
            .filter_map(|(name, has)| has.then_some(name))
            .collect();
        f.write_str(&names.join(", "))
    }
}

impl Observed {
    /// The change that gives the chat these fields. An end time never moves back and is never cleared.
    pub fn diff(&self, fields: &Fields) -> ChatChange {
        ChatChange {
            started_at: (self.started_at != Some(fields.started_at)).then_some(fields.started_at),
            ended_at: fields.ended_at.filter(|end| Some(*end) > self.ended_at),
            agent_id: (self.agent != fields.agent).then_some(fields.agent),
        }
    }

    /// Records that the chat has these fields now. The agent is that of `advisor`.
    pub fn apply(&mut self, fields: &Fields, advisor: Option<AdvisorId>) {
        self.started_at = Some(fields.started_at);
        self.ended_at = self.ended_at.max(fields.ended_at);
        self.agent = fields.agent;
        self.advisor = advisor;
    }

    /// Adopts an existing chat with the conversation's external id. The chat's agent counts as the desired advisor's,
    /// unless the chat has no agent, or a TRANSFER names the desired advisor.
    pub fn adopt(&mut self, external_id: String, chat: Uuid, found: &Fields, desired: &Desired) {
        let agent_counts = found.agent.is_some() && desired.transfer.is_none();
        *self = Self {
            external_id: Some(external_id),
            chat: Some(chat),
            started_at: Some(found.started_at),
            ended_at: found.ended_at,
            agent: found.agent,
            advisor: desired.advisor().filter(|_| agent_counts),
        };
    }

    /// The chat after the fields were read from OurAPI. A field in `unknown` may have been written although the journal
    /// does not record it: it takes the value read, so that it is written if another value is desired. Any other field
    /// that differs, except an end that is missing or later (see below), is drift: it stays in OurAPI and is returned.
    pub fn merged(&self, found: &Fields, unknown: FieldSet) -> (Self, FieldSet) {
        let mut merged = self.clone();
        let mut drift = FieldSet::default();
        if unknown.started_at {
            merged.started_at = Some(found.started_at);
        } else {
            drift.started_at = self.started_at != Some(found.started_at);
        }
        // A missing end was lost, since nothing clears one. A later end is taken over, since an end never moves back.
        if unknown.ended_at || found.ended_at.is_none() || found.ended_at > self.ended_at {
            merged.ended_at = found.ended_at;
        } else {
            drift.ended_at = self.ended_at != found.ended_at;
        }
        if unknown.agent {
            // The advisor of the recorded agent is known as long as the agent is the same.
            merged.advisor = self.advisor.filter(|_| self.agent == found.agent);
        } else {
            drift.agent = self.agent != found.agent;
        }
        merged.agent = found.agent;
        (merged, drift)
    }
}

/// A waiting event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    pub id: EventId,
    pub at: Timestamp,
    pub received_at: Millis,
    pub payload: Payload,
    pub attempts: Attempts,
    /// It is at or below the offset and is to be sent again.
    pub redelivery: bool,
    /// It was delivered before, to a chat that has lost it.
    pub restored: bool,
    /// There is a credit for it. The value is the conversation's latest event when the chat was read.
    pub credit: Option<EventId>,
}

impl Pending {
    /// The key of a message; `None`: it is not a message.
    pub fn key(&self) -> Option<MessageKey> {
        let text = self.payload.text()?;
        Some(MessageKey::new(self.at, text))
    }

    /// Whether it uses its credit. A credit counts only for a message that may have been sent before.
    pub fn uses_credit(&self, replay_until: EventId) -> bool {
        self.credit
            .is_some_and(|as_of| self.id <= as_of.max(replay_until))
    }

    /// Size of the message text in bytes.
    pub fn bytes(&self) -> usize {
        self.payload.text().map_or(0, str::len)
    }
}

/// The failed attempts of an event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attempts {
    /// All of them except denials, for the back-off.
    pub failed: u32,
    /// Those that count towards `--max-attempts`.
    pub counted: u32,
    /// How many writes had succeeded at the last failure.
    pub writes_then: Option<i64>,
    /// OurAPI may have carried out one of them.
    pub outcome_unknown: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::clamped(seconds)
    }

    fn found() -> Fields {
        Fields {
            started_at: at(2),
            ended_at: Some(at(8)),
            agent: Some(Uuid::from_u128(2)),
        }
    }

    fn observed() -> Observed {
        Observed {
            external_id: Some("42".into()),
            chat: Some(Uuid::from_u128(9)),
            started_at: Some(at(1)),
            ended_at: Some(at(9)),
            agent: Some(Uuid::from_u128(1)),
            advisor: Some(AdvisorId(1)),
        }
    }

    #[test]
    fn diff_names_only_what_differs() {
        let same = Fields {
            started_at: at(1),
            ended_at: Some(at(9)),
            agent: Some(Uuid::from_u128(1)),
        };
        let diff = |fields| observed().diff(&fields);
        assert!(diff(same).is_empty());
        for (end, written) in [(None, None), (Some(8), None), (Some(10), Some(10))] {
            let change = diff(Fields {
                ended_at: end.map(at),
                ..same
            });
            assert_eq!(change.ended_at, written.map(at), "an end never moves back");
        }
        let without_agent = diff(Fields {
            agent: None,
            ..same
        });
        assert_eq!(without_agent.agent_id, Some(None));
    }

    #[test]
    fn only_certain_fields_drift() {
        let (merged, drift) = observed().merged(&found(), FieldSet::default());
        assert!(drift.started_at && drift.ended_at && drift.agent);
        assert_eq!(
            (merged.started_at, merged.ended_at),
            (observed().started_at, observed().ended_at)
        );
        assert_eq!(merged.advisor, Some(AdvisorId(1)), "not written again");

        let (merged, drift) = observed().merged(&found(), FieldSet::ALL);
        assert!(drift.is_empty());
        assert_eq!(
            (merged.started_at, merged.ended_at),
            (Some(at(2)), Some(at(8)))
        );
        assert_eq!(merged.advisor, None, "written if another is desired");
    }

    #[test]
    fn later_end_is_no_drift() {
        let later = Fields {
            ended_at: Some(at(20)),
            started_at: at(1),
            agent: observed().agent,
        };
        let (merged, drift) = observed().merged(&later, FieldSet::default());
        assert!(drift.is_empty());
        assert_eq!(merged.ended_at, Some(at(20)));
    }

    #[test]
    fn adopted_agent_with_and_without_transfer() {
        let first = Desired {
            first_advisor: Some(AdvisorId(1)),
            ..Desired::default()
        };
        let transferred = Desired {
            transfer: Some(Transfer {
                at: at(3),
                event: EventId(1),
                advisor: AdvisorId(2),
            }),
            ..first
        };
        let agentless = Fields {
            agent: None,
            ..found()
        };
        for (desired, found, advisor) in [
            (first, found(), Some(AdvisorId(1))),
            (transferred, found(), None),
            (first, agentless, None),
        ] {
            let mut observed = Observed::default();
            observed.adopt("42".into(), Uuid::from_u128(9), &found, &desired);
            assert_eq!(observed.advisor, advisor);
            assert_eq!(observed.agent, found.agent);
        }
    }
}
