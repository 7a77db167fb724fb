//! What the console is shown, row by row. Times are in Unix ms; those that end in `_s` are BigChat's, in seconds.

use serde::Serialize;

use crate::domain::time::Millis;
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
    pub name: String,
    /// BigChat's id of its conversation; `None`: that could not be understood.
    pub conversation: Option<i64>,
    /// What it says, at least its beginning.
    pub says: Option<String>,
    /// How often it was tried.
    pub tries: u32,
    /// When it failed for good.
    pub failed_at: Millis,
}

/// An event whole, whatever became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WholeEvent {
    /// Its id.
    pub id: i64,
    /// START, END, MESSAGE, TRANSFER or UNREADABLE.
    pub name: String,
    /// BigChat's id of its conversation; `None`: that could not be understood.
    pub conversation: Option<i64>,
    /// The journal's id of it.
    pub conversation_key: Option<i64>,
    /// OurAPI's id of the chat, if there is one.
    pub chat_id: Option<String>,
    /// When it happened, by BigChat's clock, in Unix seconds; `None`: that could not be understood either.
    pub event_at_s: Option<i64>,
    /// The event as BigChat told it; of one that was understood, put together again.
    pub raw: String,
    /// Whether that is not all of it.
    pub raw_cut: bool,
    /// `waiting`, `delivered`, `failed` or `discarded`.
    pub state: String,
    /// When it was told.
    pub kept_at: Millis,
    /// When it came to that state.
    pub settled_at: Option<Millis>,
    /// How often it failed.
    pub tries: u32,
    /// Whether it may stand in OurAPI all the same.
    pub in_doubt: bool,
    /// Why it failed last.
    pub reason: Option<String>,
    /// Whether a retry can never succeed.
    pub permanent: bool,
    /// What was asked then.
    pub request: Option<String>,
    /// What was answered.
    pub response: Option<String>,
    /// The latest failed attempts, the last one first.
    pub attempts: Vec<FailedAttempt>,
    /// What was decided about it, the latest first.
    pub decisions: Vec<PastResolution>,
}

/// A conversation, the chat it is, and how it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConversationRow {
    /// The journal's id of it, which no other ever has.
    pub key: i64,
    /// BigChat's id of it.
    pub conversation: i64,
    /// Of which run of BigChat it is.
    pub run: i64,
    /// How many runs of BigChat there were.
    pub runs: i64,
    /// When it started, in Unix seconds, by BigChat's clock as all of these.
    pub started_at_s: Option<i64>,
    /// When it ended, by the latest END that was delivered.
    pub ended_at_s: Option<i64>,
    /// Who had it first, by BigChat's id.
    pub first_advisor: Option<i64>,
    /// Who has it since a TRANSFER.
    pub transfer_advisor: Option<i64>,
    /// When that happened.
    pub transfer_at_s: Option<i64>,
    /// Whether BigChat's details of it were read: `unread`, `read` or `gone`.
    pub details: String,
    /// OurAPI's external id of the chat.
    pub external_id: Option<String>,
    /// OurAPI's id of the chat.
    pub chat_id: Option<String>,
    /// When the chat says it started.
    pub chat_started_at_s: Option<i64>,
    /// And ended.
    pub chat_ended_at_s: Option<i64>,
    /// OurAPI's id of its agent.
    pub chat_agent: Option<String>,
    /// The name of the advisor who is that agent.
    pub agent_name: Option<String>,
    /// The address.
    pub agent_email: Option<String>,
    /// Why the chat has no agent; `None`: it has one.
    pub no_agent: Option<String>,
    /// Whether a change was sent whose outcome is unknown.
    pub unsure: bool,
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
    pub name: String,
    /// When it happened, by BigChat's clock, in Unix seconds.
    pub event_at_s: i64,
    /// What it says.
    pub says: Option<String>,
    /// Whether that is only its beginning.
    pub says_cut: bool,
    /// `waiting`, `delivered`, `failed` or `discarded`.
    pub state: String,
    /// When it was told.
    pub kept_at: Millis,
    /// When it came to that state.
    pub settled_at: Option<Millis>,
    /// What delivering it took.
    pub sent: Option<String>,
    /// How often it failed.
    pub tries: u32,
    /// Why.
    pub reason: Option<String>,
    /// When it is tried again.
    pub next_at: Option<Millis>,
}
