//! Dead letters: events that are not delivered until an operator resolves them.

use std::collections::BTreeSet;
use std::ops::Bound;

use rusqlite::{Connection, OptionalExtension, Transaction, params};

use super::console::says;
use super::inbox::ingest_dead_letter;
use super::{Result, Store, UNREADABLE, count, limit};
use crate::domain::event::{EventKind, PartialEvent};
use crate::domain::ids::{ConversationId, EventId};
use crate::domain::named::named;
use crate::domain::time::{Millis, Timestamp};

/// A dead letter with its details.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct FailedEvent {
    /// The id by which it is resolved.
    pub id: EventId,
    /// START, END, MESSAGE, TRANSFER or UNREADABLE.
    pub kind: String,
    /// BigChat's id of its conversation; `None`: it could not be parsed.
    pub conversation: Option<i64>,
    /// OurAPI's id of the chat, if there is one.
    pub chat_id: Option<String>,
    /// When it happened, by BigChat's clock; `None`: it could not be parsed.
    pub event_at: Option<Timestamp>,
    /// Its content as shown to people.
    pub text: Option<String>,
    /// Its data, as JSON; the whole raw event if it could not be parsed.
    pub data: Option<String>,
    /// When it became a dead letter, by this machine's clock.
    pub failed_at: Millis,
    /// `None`: it is open.
    pub discarded_at: Option<Millis>,
    /// How many attempts failed.
    pub attempts: u32,
    /// Why the last attempt failed.
    pub reason: String,
    pub request: Option<String>,
    pub response: Option<String>,
}

/// One failed attempt at an event.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct FailedAttempt {
    /// How many attempts had failed, including this one.
    pub attempt: u32,
    /// When it failed.
    pub failed_at: Millis,
    /// Why it failed.
    pub reason: String,
    /// The request.
    pub request: String,
    /// The response.
    pub response: String,
}

/// How a dead letter was resolved.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct PastResolution {
    /// The id. Later resolutions have greater ids.
    pub id: i64,
    /// When it was resolved.
    pub at: Millis,
    /// The user and the interface, such as `ann, command line`; if the user is not known, `command` or `console`.
    pub by: String,
    pub resolution: Resolution,
    pub event: EventId,
    /// BigChat's id of its conversation; `None`: it could not be parsed.
    pub conversation: Option<i64>,
    /// The conversation's key in the journal, as long as the event is stored.
    pub conversation_key: Option<ConversationId>,
    /// START, END, MESSAGE, TRANSFER or UNREADABLE.
    pub kind: String,
    /// Why it had failed.
    pub reason: String,
    /// Whether this is a discard that can still be undone.
    pub can_undo: bool,
}

/// Which dead letters to resolve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// Those with these ids.
    Ids(BTreeSet<EventId>),
    /// All that had failed by a certain time. The operator has not seen later ones.
    By {
        reason: Option<Reason>,
        /// The time, by this machine's clock.
        failed_by: Millis,
    },
}

/// A filter by the reason for the failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// Exactly this one.
    Is(String),
    /// A reason that contains this text.
    Contains(String),
}

impl Reason {
    /// The exact reason and the contained text, as SQL takes them.
    fn parts(reason: Option<&Self>) -> (Option<&str>, Option<&str>) {
        match reason {
            None => (None, None),
            Some(Self::Is(text)) => (Some(text), None),
            Some(Self::Contains(text)) => (None, Some(text)),
        }
    }
}

named! {
    /// How an operator resolves dead letters.
    Resolution {
        /// Try them again, with all attempts available. The journal still records which ones may have been carried out,
        /// so their chats are read first. Events that could not be parsed are parsed again, which helps after an
        /// upgrade.
        Retry = "retry",
        /// Give them up: they are never tried again.
        Discard = "discard",
        /// Take the discard back: they are open again.
        Undo = "undo",
    }
}

impl Resolution {
    /// The dead letters to which the resolution applies, as SQL.
    fn applies_to(self) -> &'static str {
        match self {
            Self::Retry | Self::Discard => "d.discarded_at IS NULL",
            // A forgotten event has no data left to send.
            Self::Undo => {
                "d.discarded_at IS NOT NULL AND (d.conversation IS NOT NULL
                    OR (SELECT data FROM events WHERE id = d.event) IS NOT NULL)"
            }
        }
    }
}

/// The user who resolves dead letters, and the interface used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operator {
    /// With `bigchat-sync failed`.
    Command(String),
    /// In the console.
    Console(String),
}

impl Operator {
    /// The interface, as the journal stores it, and the user.
    fn parts(&self) -> (&'static str, &str) {
        match self {
            Self::Command(user) => ("command", user),
            Self::Console(user) => ("console", user),
        }
    }
}

/// The user and the interface in words, from the journal's columns.
fn by(interface: String, user: Option<String>) -> String {
    match (user, &*interface) {
        (Some(user), "command") => format!("{user}, command line"),
        (Some(user), _) => format!("{user}, {interface}"),
        (None, _) => interface,
    }
}

/// The progress of a resolution.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolved {
    /// How many events were resolved.
    pub done: usize,
    /// The selected events to which the resolution does not apply.
    pub left: Vec<EventId>,
    /// The event after which to continue; `None`: the resolution is complete.
    pub next: Option<EventId>,
}

/// How many events are resolved in one transaction, so that other users of the database do not wait long.
const RESOLVED_AT_ONCE: usize = 500;

impl Store {
    /// The open dead letters, oldest first, at most `at_most` of them.
    pub fn failed(&mut self, at_most: u32, reason: Option<&Reason>) -> Result<Vec<FailedEvent>> {
        let (is, contains) = Reason::parts(reason);
        self.failed_where(
            &format!("d.discarded_at IS NULL AND {HAS_REASON} ORDER BY d.event LIMIT ?4"),
            params![0, is, contains, at_most],
        )
    }

    /// How many open dead letters could not be parsed.
    pub fn count_unreadable(&mut self) -> Result<u64> {
        Ok(self
            .connection
            .prepare_cached(
                "SELECT count(*) FROM dead_letters d JOIN events e ON e.id = d.event
                 WHERE d.discarded_at IS NULL AND e.kind = ?1",
            )?
            .query_row([UNREADABLE], count)?)
    }

    /// How many dead letters are open.
    pub fn count_failed(&mut self) -> Result<u64> {
        self.failed_at_most(u32::MAX)
    }

    /// The same, counted up to a limit, so that the count is quick.
    pub fn failed_at_most(&mut self, at_most: u32) -> Result<u64> {
        count_open(&self.connection, at_most)
    }

    /// How many events were ever resolved this way.
    pub fn count_resolutions(&mut self, resolution: Resolution) -> Result<u64> {
        Ok(self
            .connection
            .prepare_cached("SELECT count(*) FROM resolutions WHERE resolution = ?1")?
            .query_row([resolution], count)?)
    }

    /// A dead letter, open or discarded, if there is one with that id.
    pub fn failed_event(&mut self, id: EventId) -> Result<Option<FailedEvent>> {
        Ok(self.failed_where("d.event = ?1", [id])?.pop())
    }

    /// The latest failed attempts at an event, the last one first.
    pub fn failed_attempts(&mut self, event: EventId) -> Result<Vec<FailedAttempt>> {
        let mut statement = self.connection.prepare_cached(
            "SELECT attempt, failed_at, reason, request, response FROM failures WHERE event = ?1 ORDER BY attempt DESC",
        )?;
        let attempts = statement.query_map([event], |row| {
            Ok(FailedAttempt {
                attempt: row.get(0)?,
                failed_at: row.get(1)?,
                reason: row.get(2)?,
                request: row.get(3)?,
                response: row.get(4)?,
            })
        })?;
        Ok(attempts.collect::<rusqlite::Result<_>>()?)
    }

    /// The resolutions of an event, or of all events, that precede resolution `before`: latest first, at most
    /// `at_most`.
    pub fn resolutions(
        &mut self,
        event: Option<EventId>,
        before: Option<i64>,
        at_most: i64,
    ) -> Result<Vec<PastResolution>> {
        let of = if event.is_some() {
            "d.event = ?1"
        } else {
            "?1 IS NULL"
        };
        let mut statement = self.connection.prepare_cached(&format!(
            "SELECT d.id, d.resolved_at, d.resolved_by, d.resolution, d.event, d.conversation, e.conversation, d.kind, d.reason, d.user,
                d.resolution = 'discard' AND EXISTS (SELECT 1 FROM dead_letters x
                    WHERE x.event = d.event AND x.discarded_at = d.resolved_at AND (x.conversation IS NOT NULL OR e.data IS NOT NULL))
             FROM resolutions d LEFT JOIN events e ON e.id = d.event
             WHERE {of} AND d.id < ?2 ORDER BY d.id DESC LIMIT ?3"
        ))?;
        let before = before.unwrap_or(i64::MAX);
        let resolutions = statement.query_map(params![event, before, at_most], |row| {
            Ok(PastResolution {
                id: row.get(0)?,
                at: row.get(1)?,
                by: by(row.get(2)?, row.get(9)?),
                resolution: row.get(3)?,
                event: row.get(4)?,
                conversation: row.get(5)?,
                conversation_key: row.get(6)?,
                kind: row.get(7)?,
                reason: row.get(8)?,
                can_undo: row.get(10)?,
            })
        })?;
        Ok(resolutions.collect::<rusqlite::Result<_>>()?)
    }

    fn failed_where(
        &mut self,
        condition: &str,
        params: impl rusqlite::Params,
    ) -> Result<Vec<FailedEvent>> {
        let mut statement = self.connection.prepare_cached(&format!(
            "SELECT e.id, c.bigchat_id, c.chat_id, e.kind, e.event_at, e.data, d.failed_at, coalesce(a.attempts, 0),
                coalesce(a.reason, ''), nullif(a.request, ''), nullif(a.response, ''), d.discarded_at
             FROM dead_letters d JOIN events e ON e.id = d.event LEFT JOIN attempts a ON a.event = e.id
             LEFT JOIN conversations c ON c.id = e.conversation
             WHERE {condition}"
        ))?;
        let events = statement.query_map(params, |row| {
            let (kind, data): (String, Option<String>) = (row.get(3)?, row.get(5)?);
            let known = PartialEvent {
                conversation: row.get(1)?,
                at: Some(row.get(4)?),
            };
            let partial = partial_event(&kind, data.as_deref(), known);
            Ok(FailedEvent {
                id: row.get(0)?,
                conversation: partial.conversation,
                chat_id: row.get(2)?,
                event_at: partial.at,
                text: says::event(&kind, data.clone()),
                kind,
                data,
                failed_at: row.get(6)?,
                discarded_at: row.get(11)?,
                attempts: row.get(7)?,
                reason: row.get(8)?,
                request: row.get(9)?,
                response: row.get(10)?,
            })
        })?;
        Ok(events.collect::<rusqlite::Result<_>>()?)
    }

    /// The number of dead letters with that reason, or with any, to which the resolution applies, and when the last of
    /// them failed.
    pub fn failed_so_far(
        &mut self,
        reason: Option<&Reason>,
        resolution: Resolution,
    ) -> Result<(u64, Millis)> {
        let (is, contains) = Reason::parts(reason);
        let (count, last): (u64, Option<Millis>) = self
            .connection
            .prepare_cached(&format!(
                "SELECT count(*), max(d.failed_at) {DEAD_LETTERS} WHERE {} AND {HAS_REASON}",
                resolution.applies_to()
            ))?
            .query_row(params![0, is, contains], |row| {
                Ok((count(row)?, row.get(1)?))
            })?;
        Ok((count, last.unwrap_or_default()))
    }

    /// Resolves some of the selected dead letters: those after `after` (0 at first), in order of their ids. Records
    /// each resolution with its operator.
    pub fn resolve_failed(
        &mut self,
        which: &Selection,
        resolution: Resolution,
        who: &Operator,
        after: EventId,
        now: Millis,
    ) -> Result<Resolved> {
        let transaction = self.begin()?;
        let ids = selected(&transaction, which, resolution, after)?;
        let mut resolved = Resolved {
            done: 0,
            left: Vec::new(),
            next: ids
                .last()
                .copied()
                .filter(|_| ids.len() == RESOLVED_AT_ONCE),
        };
        for id in ids {
            match resolve(&transaction, id, resolution, who, now)? {
                true => resolved.done += 1,
                false => resolved.left.push(id),
            }
        }
        transaction.commit()?;
        Ok(resolved)
    }
}

pub(super) fn count_open(connection: &Connection, at_most: u32) -> Result<u64> {
    Ok(connection
        .prepare_cached(
            "SELECT count(*) FROM (SELECT 1 FROM dead_letters WHERE discarded_at IS NULL LIMIT ?1)",
        )?
        .query_row([at_most], count)?)
}

/// Conversation and time of an event. If the event could not be parsed, they are read from its JSON as far as possible.
pub(super) fn partial_event(name: &str, raw: Option<&str>, known: PartialEvent) -> PartialEvent {
    match name {
        UNREADABLE => PartialEvent::of(raw.unwrap_or_default()),
        _ => known,
    }
}

const DEAD_LETTERS: &str = "FROM dead_letters d LEFT JOIN attempts a ON a.event = d.event";

/// Dead letters after `?1` whose reason is `?2`, if given, and contains `?3`, if given.
const HAS_REASON: &str = "d.event > ?1 AND (?2 IS NULL OR coalesce(a.reason, '') = ?2)
    AND (?3 IS NULL OR instr(coalesce(a.reason, ''), ?3) > 0)";

/// The ids of the next selected events, in order.
fn selected(
    transaction: &Transaction<'_>,
    which: &Selection,
    resolution: Resolution,
    after: EventId,
) -> Result<Vec<EventId>> {
    let (reason, failed_by) = match which {
        Selection::Ids(ids) => {
            let next = ids.range((Bound::Excluded(after), Bound::Unbounded));
            return Ok(next.take(RESOLVED_AT_ONCE).copied().collect());
        }
        Selection::By { reason, failed_by } => (reason, failed_by),
    };
    let (is, contains) = Reason::parts(reason.as_ref());
    let mut statement = transaction.prepare_cached(&format!(
        "SELECT d.event {DEAD_LETTERS} WHERE {} AND {HAS_REASON} AND d.failed_at <= ?4 ORDER BY d.event LIMIT ?5",
        resolution.applies_to()
    ))?;
    let ids = statement.query_map(
        params![after, is, contains, failed_by, limit(RESOLVED_AT_ONCE)],
        |row| row.get(0),
    )?;
    Ok(ids.collect::<rusqlite::Result<_>>()?)
}

/// Resolves one dead letter, if it exists and the resolution applies to it.
fn resolve(
    transaction: &Transaction<'_>,
    id: EventId,
    resolution: Resolution,
    who: &Operator,
    now: Millis,
) -> Result<bool> {
    let dead_letter: Option<(Option<ConversationId>, PartialEvent, bool)> = transaction
        .prepare_cached(&format!(
            "SELECT d.conversation, c.bigchat_id, e.kind, iif(d.conversation IS NULL, e.data, NULL)
             FROM dead_letters d JOIN events e ON e.id = d.event LEFT JOIN conversations c ON c.id = d.conversation
             WHERE d.event = ?1 AND {}",
            resolution.applies_to()
        ))?
        .query_row([id], |row| {
            let known = PartialEvent {
                conversation: row.get(1)?,
                at: None,
            };
            let (kind, raw): (String, Option<String>) = (row.get(2)?, row.get(3)?);
            let is_message = EventKind::from_name(&kind).is_some_and(EventKind::is_message);
            let partial = partial_event(&kind, raw.as_deref(), known);
            Ok((row.get(0)?, partial, is_message))
        })
        .optional()?;
    let Some((conversation, partial, is_message)) = dead_letter else {
        return Ok(false);
    };
    match (resolution, conversation) {
        (Resolution::Retry, None) => {
            if !ingest_dead_letter(transaction, id, now)? {
                return Ok(false);
            }
        }
        (Resolution::Retry, Some(conversation)) => {
            retry(transaction, id, conversation, is_message, now)?;
        }
        (Resolution::Discard, _) => {
            transaction
                .prepare_cached("UPDATE dead_letters SET discarded_at = ?2 WHERE event = ?1")?
                .execute(params![id, now])?;
        }
        (Resolution::Undo, _) => {
            transaction
                .prepare_cached("UPDATE dead_letters SET discarded_at = NULL WHERE event = ?1")?
                .execute([id])?;
        }
    }
    let (way, user) = who.parts();
    transaction
        .prepare_cached(
            "INSERT INTO resolutions (resolved_at, resolved_by, user, resolution, event, conversation, kind, reason)
             SELECT ?2, ?3, ?4, ?5, e.id, ?6, e.kind, coalesce(a.reason, '')
             FROM events e LEFT JOIN attempts a ON a.event = e.id
             WHERE e.id = ?1",
        )?
        .execute(params![
            id,
            now,
            way,
            user,
            resolution,
            partial.conversation
        ])?;
    if (resolution, conversation) == (Resolution::Retry, None) {
        // The event parsed from it replaces it.
        transaction
            .prepare_cached("DELETE FROM events WHERE id = ?1")?
            .execute([id])?;
    }
    Ok(true)
}

/// Retries a dead letter, with all attempts available. Above the offset, an event waits again as soon as it is no
/// longer a dead letter; up to the offset, it becomes a redelivery. If the outcome of an attempt is unknown, the chat
/// is read back first. The outcome of a message always is, because a proxy may have rejected it after OurAPI had added
/// it.
fn retry(
    transaction: &Transaction<'_>,
    event: EventId,
    conversation: ConversationId,
    is_message: bool,
    now: Millis,
) -> Result<()> {
    transaction
        .prepare_cached("DELETE FROM dead_letters WHERE event = ?1")?
        .execute([event])?;
    transaction
        .prepare_cached(
            "UPDATE attempts SET counted = 0, next_at = NULL, retried_at = ?2
             WHERE event = ?1",
        )?
        .execute(params![event, now])?;
    transaction
        .prepare_cached(
            "INSERT INTO redeliveries (conversation, event, restored)
             SELECT id, ?2, 0 FROM conversations WHERE id = ?1 AND offset >= ?2",
        )?
        .execute(params![conversation, event])?;
    transaction
        .prepare_cached(
            "UPDATE conversations SET waiting = waiting + 1,
                -- If a write may still be in flight, the conversation must not become due earlier.
                due_at = iif(stale_seq > fresh_seq, coalesce(due_at, ?3), ?3),
                waiting_since = coalesce(waiting_since, ?3),
                stale_seq = stale_seq
                    + (?4 OR EXISTS (SELECT 1 FROM attempts WHERE event = ?2 AND outcome_unknown))
             WHERE id = ?1",
        )?
        .execute(params![conversation, event, now, is_message])?;
    Ok(())
}
