//! What the console and the commands show, row by row.

use serde::Serialize;

use crate::domain::time::{Millis, Timestamp};
use crate::journal::{FailedAttempt, PastResolution};

/// What happened in each of some minutes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Activity {
    /// The first minute, in Unix seconds / 60.
    pub from: i64,
    /// The last one, which is not over.
    pub to: i64,
    /// How many minutes are taken together.
    pub step: i64,
    /// The names of all kinds of events, and of those that could not be understood, which come last.
    pub kinds: Vec<&'static str>,
    /// What happened, where anything did.
    pub minutes: Vec<Minutes>,
}

/// What happened to events of one kind in some minutes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Minutes {
    /// The first of the minutes.
    pub minute: i64,
    /// START, END, MESSAGE, TRANSFER or UNREADABLE.
    pub kind: String,
    /// How many BigChat told.
    pub told: u64,
    /// How many were delivered.
    pub delivered: u64,
    /// How many went to the failed events.
    pub failed: u64,
}

/// Some rows, and after which id it goes on.
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
    pub id: i64,
    /// START, END, MESSAGE, TRANSFER or UNREADABLE.
    pub kind: String,
    /// BigChat's id of its conversation; `None`: it could not be parsed.
    pub conversation: Option<i64>,
    /// The beginning of what it says.
    pub text: Option<String>,
    /// How many attempts failed.
    pub attempts: u32,
    /// When it became a dead letter.
    pub failed_at: Millis,
}

/// An event that a search for a number may mean.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FoundEvent {
    /// Its id.
    pub id: i64,
    /// START, END, MESSAGE, TRANSFER or UNREADABLE.
    pub name: String,
    /// BigChat's id of its conversation; `None`: that could not be understood.
    pub conversation: Option<i64>,
    /// The journal's id of it.
    pub conversation_key: Option<i64>,
}

/// An event whole, whatever became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WholeEvent {
    /// Its id.
    pub id: i64,
    /// START, END, MESSAGE, TRANSFER or UNREADABLE.
    pub kind: String,
    /// BigChat's id of its conversation; `None`: it could not be parsed.
    pub conversation: Option<i64>,
    /// The journal's id of it.
    pub conversation_key: Option<i64>,
    /// OurAPI's id of the chat, if there is one.
    pub chat_id: Option<String>,
    /// When it happened, by BigChat's clock; `None`: it could not be parsed.
    pub event_at: Option<Timestamp>,
    /// The event as BigChat reported it; of one that was parsed, put together again.
    pub raw: String,
    /// Whether that is not all of it.
    pub raw_truncated: bool,
    /// `waiting`, `delivered`, `failed`, `discarded` or `forgotten`.
    pub state: String,
    /// When it was received.
    pub received_at: Millis,
    /// When it was delivered, failed or discarded.
    pub state_since: Option<Millis>,
    /// How many attempts failed.
    pub attempts: u32,
    /// Whether OurAPI may hold it all the same.
    pub outcome_unknown: bool,
    /// Why it failed last.
    pub reason: Option<String>,
    /// Whether a retry can never succeed.
    pub permanent: bool,
    /// What was asked then.
    pub request: Option<String>,
    /// What was answered.
    pub response: Option<String>,
    /// The latest failed attempts, the last one first.
    pub failures: Vec<FailedAttempt>,
    /// How it was resolved, the latest first.
    pub resolutions: Vec<PastResolution>,
}

/// A conversation, the chat it is, and how it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConversationRow {
    /// The journal's id of it, which no other ever has.
    pub key: i64,
    /// BigChat's id of it.
    pub conversation: i64,
    /// The epoch in which it has that id.
    pub epoch: i64,
    /// The current epoch.
    pub current_epoch: i64,
    /// When it started, by BigChat's clock as all of these.
    pub started_at: Option<Timestamp>,
    /// When it ended, by the latest END that was delivered.
    pub ended_at: Option<Timestamp>,
    /// Who had it first, by BigChat's id.
    pub first_advisor: Option<i64>,
    /// Who has it since a TRANSFER.
    pub transfer_advisor: Option<i64>,
    /// When that happened.
    pub transfer_at: Option<Timestamp>,
    /// Whether BigChat's details of it were read: `unread`, `read` or `gone`.
    pub details: String,
    /// OurAPI's external id of the chat.
    pub external_id: Option<String>,
    /// OurAPI's id of the chat.
    pub chat_id: Option<String>,
    /// When the chat says it started.
    pub chat_started_at: Option<Timestamp>,
    /// And ended.
    pub chat_ended_at: Option<Timestamp>,
    /// OurAPI's id of its agent.
    pub chat_agent: Option<String>,
    /// The name of the advisor who is that agent.
    pub agent_name: Option<String>,
    /// The address.
    pub agent_email: Option<String>,
    /// Why the chat has no agent; `None`: it has one.
    pub no_agent: Option<String>,
    /// When its text was erased; `None`: it was not.
    pub forgotten_at: Option<Millis>,
    /// Who erased it.
    pub forgotten_by: Option<String>,
    /// Whether the chat is read back before anything is sent: the outcome of a change is unknown, say.
    pub stale: bool,
    /// How many of its events wait, as far as they are counted.
    pub waiting: u64,
    /// Which of its events have failed, as far as they are counted.
    pub failed: Vec<i64>,
    /// Whether a retry can never succeed for any of these.
    pub permanent: bool,
}

/// An event in its conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EventRow {
    /// Its id.
    pub id: i64,
    /// START, END, MESSAGE or TRANSFER.
    pub kind: String,
    /// When it happened, by BigChat's clock.
    pub event_at: Timestamp,
    /// What it says.
    pub text: Option<String>,
    /// Whether that is only its beginning.
    pub text_truncated: bool,
    /// `waiting`, `delivered`, `failed`, `discarded` or `forgotten`.
    pub state: String,
    /// When it was received.
    pub received_at: Millis,
    /// When it was delivered, failed or discarded.
    pub state_since: Option<Millis>,
    /// What its delivery changed in OurAPI.
    pub effect: Option<String>,
    /// How many attempts failed.
    pub attempts: u32,
    /// Why the last one did.
    pub reason: Option<String>,
    /// When the next one is due.
    pub next_at: Option<Millis>,
}
