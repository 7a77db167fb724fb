//! Dead letters: events that are not delivered until somebody resolves them.

use std::collections::BTreeSet;
use std::ops::Bound;

use rusqlite::{OptionalExtension, Transaction, params};

use super::inbox::ingest_dead_letter;
use super::{Result, Store, UNREADABLE, limit};
use crate::domain::event::PartialEvent;
use crate::domain::ids::{ConversationId, EventId};
use crate::domain::time::{Millis, Timestamp};
use crate::http::REJECTED_WRITE;

/// A failed event, with all that is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailedEvent {
    /// Its id, by which it is retried or discarded.
    pub id: i64,
    /// BigChat's id of its conversation; `None`: it could not be understood.
    pub conversation: Option<i64>,
    /// OurAPI's id of the chat, if there is one.
    pub chat: Option<String>,
    /// START, END, MESSAGE, TRANSFER or UNREADABLE.
    pub name: String,
    /// When it happened, by BigChat's clock; `None`: that could not be understood either.
    pub at: Option<Timestamp>,
    /// Its data, as JSON; of one that could not be understood, all of it, raw.
    pub data: Option<String>,
    /// When it went to the failed events, by this machine's clock.
    pub failed_at: Millis,
    /// How often it was tried.
    pub tries: u32,
    /// Why it failed.
    pub reason: String,
    /// What was asked.
    pub request: Option<String>,
    /// What was answered.
    pub response: Option<String>,
}

/// One failed attempt at an event.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct FailedAttempt {
    /// How often it had failed by then, this time included.
    pub number: u32,
    /// When it failed.
    pub at: Millis,
    /// Why it failed.
    pub reason: String,
    /// What was asked.
    pub request: String,
    /// What was answered.
    pub response: String,
}

/// What somebody decided about an event that had failed.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct PastResolution {
    /// Its own id, in order of time.
    pub id: i64,
    /// When.
    pub at: Millis,
    /// Who, as far as it is known, and by which way: `ann, command line`; without a user: `command` or `console`.
    pub by: String,
    /// What: `retry` or `discard`.
    pub decision: String,
    /// The event.
    pub event: i64,
    /// BigChat's id of its conversation; `None`: it could not be understood.
    pub conversation: Option<i64>,
    /// The journal's id of it, as long as the event is kept.
    pub conversation_key: Option<i64>,
    /// START, END, MESSAGE, TRANSFER or UNREADABLE.
    pub kind: String,
    /// Why it had failed.
    pub reason: String,
}

/// Which failed events are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// Those of these ids.
    Ids(BTreeSet<i64>),
    /// All that had failed by then, by this machine's clock: who decides has not seen the later ones.
    By {
        /// Only those of this reason.
        reason: Option<String>,
        /// Until when.
        failed_by: Millis,
    },
}

/// What somebody decides about failed events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// They are tried again, with all their attempts ahead of them. Whether one may have been carried out stays known,
    /// so that it is looked for first. Those that could not be understood are parsed again, as after an upgrade.
    Retry,
    /// They are given up: never tried again.
    Discard,
}

impl Resolution {
    /// Its name in the journal.
    pub fn name(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Discard => "discard",
        }
    }
}

/// The user who resolves failed events, and by which way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operator {
    /// By `bigchat-sync failed`.
    Command(String),
    /// In the console.
    Console(String),
}

impl Operator {
    /// The way, as the journal has it, and the user.
    fn parts(&self) -> (&'static str, &str) {
        match self {
            Self::Command(user) => ("command", user),
            Self::Console(user) => ("console", user),
        }
    }
}

/// Who resolved a failed event, in words, by what the journal has of it.
fn by(way: String, user: Option<String>) -> String {
    match (user, &*way) {
        (Some(user), "command") => format!("{user}, command line"),
        (Some(user), _) => format!("{user}, {way}"),
        (None, _) => way,
    }
}

/// How far a decision is carried out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resolved {
    /// For how many events.
    pub done: usize,
    /// After which event it goes on; `None`: it is carried out.
    pub next: Option<i64>,
}

/// For how many events a decision is carried out at once: nobody waits long for the database.
const RESOLVED_AT_ONCE: usize = 500;

impl Store {
    /// The failed events, the oldest first: at most `at_most` of them.
    pub fn failed(&mut self, at_most: u32) -> Result<Vec<FailedEvent>> {
        self.failed_where(
            "d.discarded_at IS NULL ORDER BY d.event LIMIT ?1",
            [i64::from(at_most)],
        )
    }

    /// How many failed events could not be understood, and so cannot be retried.
    pub fn count_unreadable(&mut self) -> Result<u64> {
        let count: i64 = self
            .connection
            .prepare_cached(
                "SELECT count(*) FROM dead_letters d JOIN events e ON e.id = d.event
                 WHERE d.discarded_at IS NULL AND e.kind = ?1",
            )?
            .query_row([UNREADABLE], |row| row.get(0))?;
        Ok(u64::try_from(count).unwrap_or_default())
    }

    /// How many events have failed.
    pub fn count_failed(&mut self) -> Result<u64> {
        self.failed_at_most(u32::MAX)
    }

    /// The same, counted up to so many: nobody waits for more.
    pub fn failed_at_most(&mut self, at_most: u32) -> Result<u64> {
        let count: i64 = self
            .connection
            .prepare_cached(
                "SELECT count(*) FROM (SELECT 1 FROM dead_letters WHERE discarded_at IS NULL LIMIT ?1)",
            )?
            .query_row([at_most], |row| row.get(0))?;
        Ok(u64::try_from(count).unwrap_or_default())
    }

    /// For how many events it was ever decided so.
    pub fn count_decisions(&mut self, decision: Resolution) -> Result<u64> {
        let count: i64 = self
            .connection
            .prepare_cached("SELECT count(*) FROM resolutions WHERE resolution = ?1")?
            .query_row([decision.name()], |row| row.get(0))?;
        Ok(u64::try_from(count).unwrap_or_default())
    }

    /// A failed event, if there is one of that id.
    pub fn failed_event(&mut self, id: i64) -> Result<Option<FailedEvent>> {
        Ok(self
            .failed_where("d.discarded_at IS NULL AND d.event = ?1", [id])?
            .pop())
    }

    /// The latest failed attempts at an event, the last one first.
    pub fn failed_attempts(&mut self, event: i64) -> Result<Vec<FailedAttempt>> {
        let mut statement = self.connection.prepare_cached(
            "SELECT attempt, failed_at, reason, request, response FROM failures WHERE event = ?1 ORDER BY attempt DESC",
        )?;
        let attempts = statement.query_map([event], |row| {
            Ok(FailedAttempt {
                number: row.get(0)?,
                at: Millis(row.get(1)?),
                reason: row.get(2)?,
                request: row.get(3)?,
                response: row.get(4)?,
            })
        })?;
        Ok(attempts.collect::<rusqlite::Result<_>>()?)
    }

    /// What was decided about an event, or about any, before the decision `before`, the latest one first: at most
    /// `at_most` of them.
    pub fn decisions(
        &mut self,
        event: Option<i64>,
        before: Option<i64>,
        at_most: i64,
    ) -> Result<Vec<PastResolution>> {
        let of = if event.is_some() {
            "d.event = ?1"
        } else {
            "?1 IS NULL"
        };
        let mut statement = self.connection.prepare_cached(&format!(
            "SELECT d.id, d.resolved_at, d.resolved_by, d.resolution, d.event, d.conversation, e.conversation, d.kind, d.reason, d.user
             FROM resolutions d LEFT JOIN events e ON e.id = d.event
             WHERE {of} AND d.id < ?2 ORDER BY d.id DESC LIMIT ?3"
        ))?;
        let before = before.unwrap_or(i64::MAX);
        let decisions = statement.query_map(params![event, before, at_most], |row| {
            Ok(PastResolution {
                id: row.get(0)?,
                at: Millis(row.get(1)?),
                by: by(row.get(2)?, row.get(9)?),
                decision: row.get(3)?,
                event: row.get(4)?,
                conversation: row.get(5)?,
                conversation_key: row.get(6)?,
                kind: row.get(7)?,
                reason: row.get(8)?,
            })
        })?;
        Ok(decisions.collect::<rusqlite::Result<_>>()?)
    }

    fn failed_where(
        &mut self,
        condition: &str,
        params: impl rusqlite::Params,
    ) -> Result<Vec<FailedEvent>> {
        let mut statement = self.connection.prepare_cached(&format!(
            "SELECT e.id, c.bigchat_id, c.chat_id, e.kind, e.event_at, e.data, d.failed_at, coalesce(a.attempts, 0),
                coalesce(a.reason, ''), nullif(a.request, ''), nullif(a.response, '')
             FROM dead_letters d JOIN events e ON e.id = d.event LEFT JOIN attempts a ON a.event = e.id
             LEFT JOIN conversations c ON c.id = e.conversation
             WHERE {condition}"
        ))?;
        let events = statement.query_map(params, |row| {
            let (name, data): (String, Option<String>) = (row.get(3)?, row.get(5)?);
            let known = PartialEvent {
                conversation: row.get(1)?,
                at: Some(Timestamp::clamped(row.get(4)?)),
            };
            let PartialEvent { conversation, at } = partial_event(&name, data.as_deref(), known);
            Ok(FailedEvent {
                id: row.get(0)?,
                conversation,
                chat: row.get(2)?,
                name,
                at,
                data,
                failed_at: Millis(row.get::<_, Option<i64>>(6)?.unwrap_or_default()),
                tries: row.get(7)?,
                reason: row.get(8)?,
                request: row.get(9)?,
                response: row.get(10)?,
            })
        })?;
        Ok(events.collect::<rusqlite::Result<_>>()?)
    }

    /// How many events have failed for this reason, or for any, and when the last one did.
    pub fn failed_so_far(&mut self, reason: Option<&str>) -> Result<(u64, Millis)> {
        let (count, last): (i64, Option<i64>) = self
            .connection
            .prepare_cached(&format!("SELECT count(*), max(d.failed_at) {MEANT}"))?
            .query_row(params![0, reason, i64::MAX], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })?;
        Ok((
            u64::try_from(count).unwrap_or_default(),
            Millis(last.unwrap_or_default()),
        ))
    }

    /// Carries a decision out, for some of the events that are meant: those after `after` (0 at first), by their ids. Each
    /// is noted, with who decided.
    pub fn resolve_failed(
        &mut self,
        which: &Selection,
        decision: Resolution,
        who: &Operator,
        after: i64,
        now: Millis,
    ) -> Result<Resolved> {
        let transaction = self.begin()?;
        let ids = selected(&transaction, which, after)?;
        let mut decided = Resolved {
            done: 0,
            next: ids
                .last()
                .copied()
                .filter(|_| ids.len() == RESOLVED_AT_ONCE),
        };
        for id in ids {
            decided.done += usize::from(resolve(&transaction, id, decision, who, now)?);
        }
        transaction.commit()?;
        Ok(decided)
    }
}

/// Conversation and time of an event: of one that could not be understood, what can be read of it.
pub(super) fn partial_event(name: &str, raw: Option<&str>, known: PartialEvent) -> PartialEvent {
    match name {
        UNREADABLE => PartialEvent::of(raw.unwrap_or_default()),
        _ => known,
    }
}

/// Whether a retry can never succeed for an event that failed for `reason`: it could not be understood, or OurAPI
/// permanently rejected it.
pub(super) fn is_permanent(name: &str, reason: &str) -> bool {
    name == UNREADABLE || reason.starts_with(REJECTED_WRITE)
}
/// The failed events after `?1` of the reason `?2`, or of any, that had failed by `?3`.
const MEANT: &str = "FROM dead_letters d LEFT JOIN attempts a ON a.event = d.event
    WHERE d.discarded_at IS NULL AND d.event > ?1 AND (?2 IS NULL OR coalesce(a.reason, '') = ?2) AND d.failed_at <= ?3";

/// The ids of the next events that are meant, in order.
fn selected(transaction: &Transaction<'_>, which: &Selection, after: i64) -> Result<Vec<i64>> {
    let (reason, failed_by) = match which {
        Selection::Ids(ids) => {
            let next = ids.range((Bound::Excluded(after), Bound::Unbounded));
            return Ok(next.take(RESOLVED_AT_ONCE).copied().collect());
        }
        Selection::By { reason, failed_by } => (reason, failed_by),
    };
    let mut statement =
        transaction.prepare_cached(&format!("SELECT d.event {MEANT} ORDER BY d.event LIMIT ?4"))?;
    let ids = statement.query_map(
        params![after, reason, failed_by.0, limit(RESOLVED_AT_ONCE)],
        |row| row.get(0),
    )?;
    Ok(ids.collect::<rusqlite::Result<_>>()?)
}

/// Carries a decision out for one event, if it has failed and can be decided so.
fn resolve(
    transaction: &Transaction<'_>,
    id: i64,
    decision: Resolution,
    who: &Operator,
    now: Millis,
) -> Result<bool> {
    let conversation: Option<Option<ConversationId>> = transaction
        .prepare_cached(
            "SELECT conversation FROM dead_letters WHERE event = ?1 AND discarded_at IS NULL",
        )?
        .query_row([id], |row| row.get(0))
        .optional()?;
    let Some(conversation) = conversation else {
        return Ok(false);
    };
    match (decision, conversation) {
        (Resolution::Retry, None) => {
            if !ingest_dead_letter(transaction, EventId(id), now)? {
                return Ok(false);
            }
        }
        (Resolution::Retry, Some(conversation)) => {
            retry(transaction, EventId(id), conversation, now)?
        }
        (Resolution::Discard, _) => {
            transaction
                .prepare_cached("UPDATE dead_letters SET discarded_at = ?2 WHERE event = ?1")?
                .execute(params![id, now.0])?;
        }
    }
    let (way, user) = who.parts();
    transaction
        .prepare_cached(
            "INSERT INTO resolutions (resolved_at, resolved_by, user, resolution, event, conversation, kind, reason)
             SELECT ?2, ?3, ?4, ?5, e.id, c.bigchat_id, e.kind, coalesce(a.reason, '')
             FROM events e LEFT JOIN attempts a ON a.event = e.id LEFT JOIN conversations c ON c.id = e.conversation
             WHERE e.id = ?1",
        )?
        .execute(params![id, now.0, way, user, decision.name()])?;
    if (decision, conversation) == (Resolution::Retry, None) {
        // The event that was read from it stands in its place.
        transaction
            .prepare_cached("DELETE FROM events WHERE id = ?1")?
            .execute([id])?;
    }
    Ok(true)
}

/// Has a dead letter tried again, with all its attempts ahead of it. Above the offset it waits again by being no dead letter
/// any more. If the outcome of an attempt is unknown, the chat is read back first.
fn retry(
    transaction: &Transaction<'_>,
    event: EventId,
    conversation: ConversationId,
    now: Millis,
) -> Result<()> {
    transaction
        .prepare_cached("DELETE FROM dead_letters WHERE event = ?1")?
        .execute([event])?;
    transaction
        .prepare_cached("UPDATE attempts SET counted = 0, next_at = NULL WHERE event = ?1")?
        .execute([event])?;
    transaction
        .prepare_cached(
            "INSERT INTO redeliveries (conversation, event, restored)
             SELECT id, ?2, 0 FROM conversations WHERE id = ?1 AND offset >= ?2",
        )?
        .execute(params![conversation, event])?;
    transaction
        .prepare_cached(
            "UPDATE conversations SET waiting = waiting + 1,
                -- A write that may still be in flight goes on waiting.
                due_at = iif(stale_seq > fresh_seq, coalesce(due_at, ?3), ?3),
                waiting_since = coalesce(waiting_since, (SELECT received_at FROM events WHERE id = ?2)),
                stale_seq = stale_seq
                    + EXISTS (SELECT 1 FROM attempts WHERE event = ?2 AND outcome_unknown)
             WHERE id = ?1",
        )?
        .execute(params![conversation, event, now.0])?;
    Ok(())
}
