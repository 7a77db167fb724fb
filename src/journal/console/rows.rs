//! The rows that the console and the commands show.

use serde::Serialize;

use crate::domain::conversation::Details;
use crate::domain::ids::{ConversationId, Epoch, EventId};
use crate::domain::named::named;
use crate::domain::progress::Effect;
use crate::domain::time::{Millis, Timestamp};
use crate::journal::{FailedAttempt, PastResolution};

/// The activity of some minutes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Activity {
    /// The first minute, in Unix seconds / 60.
    pub from: i64,
    /// The last minute, which is not over yet.
    pub to: i64,
    /// The length of an interval, in minutes.
    pub step: i64,
    /// The names of all kinds of events. The last is that of events that could not be parsed.
    pub kinds: Vec<&'static str>,
    /// The intervals with activity.
    pub minutes: Vec<Minutes>,
}

/// The activity of one kind of event in an interval.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Minutes {
    /// The first minute of the interval.
    pub minute: i64,
    /// START, END, MESSAGE, TRANSFER or UNREADABLE.
    pub kind: String,
    /// How many were received.
    pub received: u64,
    /// How many were delivered.
    pub delivered: u64,
    /// How many became dead letters.
    pub failed: u64,
}

/// Some rows, and the id after which the next ones begin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Page<T> {
    /// The rows.
    pub rows: Vec<T>,
    /// `None`: there are no more.
    pub next: Option<i64>,
}

/// A failed event in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FailedRow {
    /// Its id.
    pub id: EventId,
    /// START, END, MESSAGE, TRANSFER or UNREADABLE.
    pub kind: String,
    /// BigChat's id of its conversation; `None`: it could not be parsed.
    pub conversation: Option<i64>,
    /// The beginning of its content.
    pub text: Option<String>,
    /// How many attempts failed.
    pub attempts: u32,
    /// When it became a dead letter.
    pub failed_at: Millis,
}

/// An event whose id is the number that was searched for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FoundEvent {
    /// Its id.
    pub id: EventId,
    /// START, END, MESSAGE, TRANSFER or UNREADABLE.
    pub name: String,
    /// BigChat's id of its conversation; `None`: the event could not be parsed.
    pub conversation: Option<i64>,
    /// The conversation's key in the journal.
    pub conversation_key: Option<ConversationId>,
}

named! {
    /// The state of an event, as in the view `event_states`.
    EventState {
        Waiting = "waiting",
        Delivered = "delivered",
        /// It is a dead letter that needs action.
        Failed = "failed",
        Discarded = "discarded",
        /// Its text was erased.
        Forgotten = "forgotten",
    }
}

/// An event with all its details.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WholeEvent {
    /// Its id.
    pub id: EventId,
    /// START, END, MESSAGE, TRANSFER or UNREADABLE.
    pub kind: String,
    /// BigChat's id of its conversation; `None`: it could not be parsed.
    pub conversation: Option<i64>,
    /// The conversation's key in the journal.
    pub conversation_key: Option<ConversationId>,
    /// OurAPI's id of the chat, if there is one.
    pub chat_id: Option<String>,
    /// When it happened, by BigChat's clock; `None`: it could not be parsed.
    pub event_at: Option<Timestamp>,
    /// The raw event as BigChat reported it; reassembled if it was parsed.
    pub raw: String,
    /// Whether `raw` is truncated.
    pub raw_truncated: bool,
    pub state: EventState,
    /// When it was received.
    pub received_at: Millis,
    /// When it was delivered, failed or discarded.
    pub state_since: Option<Millis>,
    /// How many attempts failed.
    pub attempts: u32,
    /// Whether OurAPI may have carried it out.
    pub outcome_unknown: bool,
    /// Why the last attempt failed.
    pub reason: Option<String>,
    /// Whether a retry is pointless unless this program or OurAPI changes.
    pub permanent: bool,
    /// The last request.
    pub request: Option<String>,
    /// The last response.
    pub response: Option<String>,
    /// The latest failed attempts, the last one first.
    pub failures: Vec<FailedAttempt>,
    /// How it was resolved, the latest first.
    pub resolutions: Vec<PastResolution>,
}

/// A conversation, its chat, and their state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConversationRow {
    /// The key in the journal, which is never reused.
    pub key: ConversationId,
    /// BigChat's id of the conversation.
    pub conversation: i64,
    /// The epoch in which it has that id.
    pub epoch: Epoch,
    /// The current epoch.
    pub current_epoch: Epoch,
    /// When it started, by BigChat's clock, like all times of conversation and chat.
    pub started_at: Option<Timestamp>,
    /// When it ended, by the latest END that was delivered.
    pub ended_at: Option<Timestamp>,
    /// BigChat's id of its first advisor.
    pub first_advisor: Option<i64>,
    /// BigChat's id of the advisor of the latest TRANSFER.
    pub transfer_advisor: Option<i64>,
    /// The time of that TRANSFER.
    pub transfer_at: Option<Timestamp>,
    /// Whether its details were read from BigChat.
    pub details: Details,
    /// OurAPI's external id of the chat.
    pub external_id: Option<String>,
    /// OurAPI's id of the chat.
    pub chat_id: Option<String>,
    /// The start time of the chat.
    pub chat_started_at: Option<Timestamp>,
    /// The end time of the chat.
    pub chat_ended_at: Option<Timestamp>,
    /// OurAPI's id of the chat's agent.
    pub chat_agent: Option<String>,
    /// The agent's name.
    pub agent_name: Option<String>,
    /// The agent's e-mail address.
    pub agent_email: Option<String>,
    /// Why the chat has no agent; `None`: it has one.
    pub no_agent: Option<String>,
    /// When its text was erased; `None`: it was not.
    pub forgotten_at: Option<Millis>,
    /// Who erased it.
    pub forgotten_by: Option<String>,
    /// Whether the chat is read back before anything is sent, for example because the outcome of a change is unknown.
    pub stale: bool,
    /// What OurAPI has lost of the chat and was not restored; `None`: nothing that is known.
    pub missing: Option<String>,
    /// How many of its events are waiting.
    pub waiting: u64,
    /// How many of its events were discarded.
    pub discarded: u64,
    /// Its failed events, up to a limit.
    pub failed: Vec<EventId>,
    /// Whether there are more of them.
    pub more_failed: bool,
    /// Whether retrying is pointless for all of these unless this program or OurAPI changes.
    pub permanent: bool,
}

/// An event in its conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EventRow {
    /// Its id.
    pub id: EventId,
    /// START, END, MESSAGE or TRANSFER.
    pub kind: String,
    /// When it happened, by BigChat's clock.
    pub event_at: Timestamp,
    /// Its content.
    pub text: Option<String>,
    /// Whether the text is truncated.
    pub text_truncated: bool,
    pub state: EventState,
    /// When it was received.
    pub received_at: Millis,
    /// When it was delivered, failed or discarded.
    pub state_since: Option<Millis>,
    /// What its delivery changed in OurAPI.
    pub effect: Option<Effect>,
    /// How many attempts failed.
    pub attempts: u32,
    /// Why the last attempt failed.
    pub reason: Option<String>,
    /// When the next attempt is due.
    pub next_at: Option<Millis>,
}
