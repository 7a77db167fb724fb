//! A conversation as the journal knows it: what its events say, and the chat that OurAPI holds for it.
//!
//! Pure: what should stand in OurAPI follows from here, and what differs from it is what there is to send.

use uuid::Uuid;

use crate::event::{Kind, What};
use crate::our_api::ChatChange;
use crate::time::{Millis, Timestamp};

/// One conversation of one run of BigChat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversation {
    /// The journal's own id of it, which no other ever has.
    pub id: i64,
    /// The run of BigChat it belongs to.
    pub epoch: i64,
    /// BigChat's id of it, which it gives to another one after a restart.
    pub bigchat_id: i64,
    /// When it started, by its START or its details.
    pub started_at: Option<Timestamp>,
    /// Who had it when its details were first read, by BigChat's id.
    pub first_advisor: Option<i64>,
    /// Whether its details were read.
    pub details: DetailsState,
    /// What its delivered events say.
    pub said: Said,
    /// What OurAPI holds for it, as far as is known.
    pub chat: Chat,
}

/// Whether a conversation's details were read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DetailsState {
    /// Not yet.
    Unread,
    /// Yes; never again, since a usual vendor's show the advisor of now.
    Read,
    /// BigChat does not know the conversation any more.
    Gone,
}

/// What the events of a conversation add up to, whatever order they come in: the last by time of happening counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Said {
    /// The latest END.
    pub ended_at: Option<Timestamp>,
    /// The latest TRANSFER.
    pub transfer: Option<Transfer>,
}

/// A TRANSFER, ordered by when it happened; ties go to the later arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Transfer {
    /// When it happened.
    pub at: Timestamp,
    /// The event, whose ids are in order of arrival.
    pub event: i64,
    /// Who has the conversation from then on, by BigChat's id.
    pub advisor: i64,
}

/// What OurAPI holds for a conversation, as far as is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chat {
    /// Its external id, once chosen.
    pub external_id: Option<String>,
    /// OurAPI's id of it; `None`: there is none yet.
    pub id: Option<Uuid>,
    /// Its start time, also while its creation is under way.
    pub started_at: Option<Timestamp>,
    /// Its end time.
    pub ended_at: Option<Timestamp>,
    /// Its agent.
    pub agent: Option<Uuid>,
    /// Whether a change was sent whose outcome is unknown: what stands above may not be what OurAPI holds.
    pub unsure: bool,
    /// How many losses of OurAPI there had been when the chat was last seen there.
    pub seen: i64,
    /// The session of the daemon in which the chat's messages were last looked up, or [`Chat::FOUND`].
    pub looked_up: i64,
    /// Whether a look-up found messages in it that no event accounted for: one that BigChat tells may be among them.
    pub holds_more: bool,
}

/// An event that waits to be delivered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Its id, in order of arrival.
    pub id: i64,
    /// When it happened.
    pub at: Timestamp,
    /// What happened.
    pub what: What,
    /// What came of it so far.
    pub attempts: Attempts,
}

impl Waiting {
    /// How many bytes its message has.
    pub fn bytes(&self) -> usize {
        match &self.what {
            What::Message { text } => text.len(),
            What::Start | What::End | What::Transfer { .. } => 0,
        }
    }

    /// This became of it.
    pub fn settled(&self, outcome: Outcome) -> Settled {
        Settled {
            event: self.id,
            kind: self.what.kind(),
            outcome,
        }
    }
}

/// What came of an event's delivery so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attempts {
    /// How often it has failed.
    pub tries: u32,
    /// How often it has failed while others got through.
    pub counted: u32,
    /// How many writes had succeeded at the last failure.
    pub successes: Option<i64>,
    /// Whether it may have been carried out all the same.
    pub in_doubt: bool,
}

/// What should stand in OurAPI for a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// The start time.
    pub started_at: Timestamp,
    /// The end time, if it has ended.
    pub ended_at: Option<Timestamp>,
    /// The agent, if one can be had.
    pub agent: Option<Uuid>,
}

impl Said {
    /// The advisor who has the conversation, if a TRANSFER said so.
    pub fn advisor(&self) -> Option<i64> {
        self.transfer.map(|transfer| transfer.advisor)
    }
}

impl Chat {
    /// In [`Chat::looked_up`]: the chat was found in OurAPI rather than created, and any message may stand in it.
    pub const FOUND: i64 = -1;

    /// What has to be sent so that the chat is as wanted: only what differs, or all of it where it is not sure what
    /// stands there. An end time that no END told of is never cleared.
    pub fn change_to(&self, wanted: &Wanted) -> ChatChange {
        let differs = |differs: bool| differs || self.unsure;
        ChatChange {
            started_at: differs(self.started_at != Some(wanted.started_at))
                .then_some(wanted.started_at),
            ended_at: wanted
                .ended_at
                .filter(|_| differs(self.ended_at != wanted.ended_at)),
            agent_id: differs(self.agent != wanted.agent).then_some(wanted.agent),
        }
    }

    /// Notes that the chat is now as wanted.
    pub fn is_now(&mut self, wanted: &Wanted) {
        self.started_at = Some(wanted.started_at);
        self.ended_at = wanted.ended_at.or(self.ended_at);
        self.agent = wanted.agent;
        self.unsure = false;
    }
}

/// What delivery takes on at once: a conversation and the events of it that wait, in order of arrival.
#[derive(Debug, Clone)]
pub struct Work {
    /// The conversation.
    pub conversation: Conversation,
    /// Its waiting events; there are none if only its chat is to be looked after.
    pub events: Vec<Waiting>,
    /// Its chat is to be compared with the journal.
    pub check: Option<Check>,
}

impl Work {
    /// How many bytes its messages have.
    pub fn bytes(&self) -> usize {
        self.events.iter().map(Waiting::bytes).sum()
    }
}

/// A comparison of a chat with the journal, as asked for by hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Check {
    /// What it belongs to.
    pub rebuild: i64,
    /// Only look; change nothing.
    pub dry_run: bool,
}

/// What a [`Check`] has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finding {
    /// The chat.
    pub chat: ChatFound,
    /// How many of its delivered messages are missing.
    pub messages: u32,
}

/// How a chat was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChatFound {
    /// As it should be.
    There,
    /// With another agent, start or end than it should have, or with an agent that is gone.
    Differs,
    /// Not at all, or another one stands in its place.
    Missing,
}

/// What it took to deliver an event. Several events may share one change of their chat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// Its chat was created.
    Chat,
    /// Its chat was changed.
    Change,
    /// A message was added.
    Message,
    /// Nothing: it stood there, or a later event overrides it.
    Nothing,
}

impl Sent {
    /// Its name in the journal.
    pub fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat created",
            Self::Change => "chat changed",
            Self::Message => "message added",
            Self::Nothing => "nothing",
        }
    }
}

/// What became of one event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It stands in OurAPI.
    Delivered(Sent),
    /// It waits until it is tried again.
    Waiting {
        /// Its attempts, this one included.
        attempts: Attempts,
        /// When it is tried again.
        next_at: Millis,
        /// What went wrong.
        failure: Failure,
    },
    /// It goes to the failed events.
    Failed {
        /// Its attempts, this one included.
        attempts: Attempts,
        /// What went wrong.
        failure: Failure,
    },
}

/// An event, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settled {
    /// Its id.
    pub event: i64,
    /// What it told of.
    pub kind: Kind,
    /// What became of it.
    pub outcome: Outcome,
}

/// What went wrong, as kept with the event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Failure {
    /// In words.
    pub reason: String,
    /// What was asked.
    pub request: String,
    /// What was answered.
    pub response: String,
}

/// What became of a piece of [`Work`]. Its events that are not named were not tried: they wait as before.
#[derive(Debug, Clone)]
pub struct Settlement {
    /// The conversation, as it is now.
    pub conversation: Conversation,
    /// What became of its events.
    pub outcomes: Vec<Settled>,
    /// What was found when its chat was compared with the journal; nothing, if that failed.
    pub finding: Option<(Check, Option<Finding>)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::clamped(seconds)
    }

    #[test]
    fn only_what_differs_is_sent() {
        let agent = Uuid::from_u128(1);
        let chat = Chat {
            started_at: Some(at(1)),
            agent: Some(agent),
            ended_at: Some(at(9)),
            ..Chat::default()
        };
        let same = Wanted {
            started_at: at(1),
            agent: Some(agent),
            ended_at: Some(at(9)),
        };
        assert!(chat.change_to(&same).is_empty());
        let later = chat.change_to(&Wanted {
            ended_at: Some(at(10)),
            ..same
        });
        assert_eq!(
            later,
            ChatChange {
                ended_at: Some(at(10)),
                ..ChatChange::default()
            }
        );
        let nobody = chat.change_to(&Wanted {
            agent: None,
            ..same
        });
        assert_eq!(
            nobody,
            ChatChange {
                agent_id: Some(None),
                ..ChatChange::default()
            }
        );
        let no_end = chat.change_to(&Wanted {
            ended_at: None,
            ..same
        });
        assert!(
            no_end.is_empty(),
            "an end nobody told of is not ours to clear"
        );
    }

    #[test]
    fn where_it_is_not_sure_what_stands_there_all_is_sent() {
        let same = Wanted {
            started_at: at(1),
            agent: None,
            ended_at: Some(at(9)),
        };
        let mut chat = Chat::default();
        chat.is_now(&same);
        assert!(chat.change_to(&same).is_empty());
        chat.unsure = true;
        let all = ChatChange {
            started_at: Some(at(1)),
            agent_id: Some(None),
            ended_at: Some(at(9)),
        };
        assert_eq!(chat.change_to(&same), all);
    }
}
