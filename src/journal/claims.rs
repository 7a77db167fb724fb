//! What delivery takes on.
//!
//! A claim is made before anything is sent and ends with its settlement, in one transaction with what was learnt.
//! Whatever is claimed when the daemon starts was in work when it died: its outcome is unknown.

use std::collections::HashMap;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};

use super::knowledge::uuid;
use super::minutes::Counts;
use super::rebuild::claim_checks;
use super::settlements::{reschedule, settle};
use super::{JournalError, Result, Store, limit, written};
use crate::conversation::{
    Attempts, Chat, Conversation, DetailsState, Said, Settlement, Transfer, Waiting, Work,
};
use crate::event::{Kind, What};
use crate::time::{Millis, Timestamp};

/// How many events of one conversation are claimed at once, so that a long one neither fills the memory nor keeps
/// others waiting.
const EVENTS_A_CLAIM: u32 = 200;

/// And how many bytes of messages; the one that exceeds it still belongs to it.
const BYTES_A_CLAIM: usize = 256 << 10;

/// What may be claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claimable {
    /// Conversations with events that are due first, then chats not seen since OurAPI last lost something, then those to be compared by hand.
    All,
    /// Only chats to be compared by hand.
    Checks,
}

/// What is to be claimed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// What may be.
    pub what: Claimable,
    /// Whether it is only to tell whether OurAPI is back: what has not failed yet comes first, so that what always fails keeps
    /// nobody else from being tried.
    pub probes: bool,
    /// How many conversations at most.
    pub conversations: usize,
    /// Up to how many bytes of messages; the conversation that exceeds it still belongs to it.
    pub bytes: usize,
    /// The conversations whose chats could not be looked after, and until when others come first.
    pub put_off: HashMap<i64, Millis>,
}

/// What was claimed.
#[derive(Debug, Default)]
pub struct Claimed {
    /// The conversations, with their waiting events.
    pub work: Vec<Work>,
    /// When something is due next, beside those.
    pub next_due: Option<Millis>,
}

impl Store {
    /// Settles what was done and claims what comes next, those that have been due for longest first. All in one
    /// transaction, so that under load a commit serves many conversations.
    pub fn settle_and_claim(
        &mut self,
        settlements: &[Settlement],
        successes: i64,
        claim: Option<&Claim>,
        now: Millis,
    ) -> Result<Claimed> {
        let transaction = self.begin()?;
        let mut counts = Counts::default();
        for settlement in settlements {
            settle(&transaction, settlement, &mut counts, now)?;
        }
        counts.keep(&transaction, now)?;
        if !settlements.is_empty() {
            transaction
                .prepare_cached("UPDATE delivery SET successes = ?1")?
                .execute([successes])?;
        }
        let work = match claim {
            Some(claim) => claim_next(&transaction, claim, now)?,
            None => Vec::new(),
        };
        let next_due = next_due(&transaction)?;
        if !settlements.is_empty() || !work.is_empty() {
            transaction.commit()?;
        }
        Ok(Claimed { work, next_due })
    }

    /// Gives back what was claimed and not begun.
    pub fn release(&mut self, conversations: &[i64], now: Millis) -> Result<()> {
        let transaction = self.begin()?;
        for id in conversations {
            transaction
                .prepare_cached("UPDATE conversations SET claimed_through = NULL WHERE id = ?1")?
                .execute([id])?;
            reschedule(&transaction, *id, None, now)?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// Whoever worked on a conversation has gone without a word: what it was sending has an unknown outcome.
    pub fn abandon(&mut self, conversation: i64, pause: Duration, now: Millis) -> Result<()> {
        let transaction = self.begin()?;
        abandon(&transaction, conversation, pause, now)?;
        transaction.commit()?;
        Ok(())
    }

    /// How many events wait.
    pub fn waiting(&mut self) -> Result<u64> {
        self.waiting_at_most(u32::MAX)
    }

    /// How many events wait, counted up to so many: that takes no longer, however many there are.
    pub fn waiting_at_most(&mut self, at_most: u32) -> Result<u64> {
        let count: i64 = self
            .connection
            .prepare_cached(
                "SELECT count(*) FROM (
                    SELECT 1 FROM events WHERE state = 'waiting' AND conversation IS NOT NULL LIMIT ?1)",
            )?
            .query_row([at_most], |row| row.get(0))?;
        Ok(u64::try_from(count).unwrap_or_default())
    }
}

pub(super) fn abandon(
    transaction: &Transaction<'_>,
    conversation: i64,
    pause: Duration,
    now: Millis,
) -> Result<()> {
    transaction.execute(
        "INSERT INTO attempts (event, in_doubt)
         SELECT e.id, 1 FROM events e JOIN conversations c ON c.id = e.conversation
         WHERE c.id = ?1 AND e.state = 'waiting' AND e.id <= c.claimed_through
         ON CONFLICT (event) DO UPDATE SET in_doubt = 1",
        [conversation],
    )?;
    transaction.execute(
        "UPDATE conversations SET claimed_through = NULL, chat_unsure = 1,
            due_at = iif(EXISTS (SELECT 1 FROM events WHERE conversation = ?1 AND state = 'waiting'), ?2, NULL)
         WHERE id = ?1",
        [conversation, now.plus(pause).0],
    )?;
    Ok(())
}

/// The conversation of which nothing that waits has failed yet and that has been due for longest. Few have failed: those
/// that were tried since OurAPI is down, and those that always fail.
fn untried(connection: &Connection, now: Millis) -> Result<Option<i64>> {
    Ok(connection
        .prepare_cached(
            "SELECT id FROM conversations c WHERE due_at <= ?1 AND NOT EXISTS (
                SELECT 1 FROM events e JOIN attempts a ON a.event = e.id
                WHERE e.conversation = c.id AND e.state = 'waiting' AND a.tries > 0)
             ORDER BY due_at, id LIMIT 1",
        )?
        .query_row([now.0], |row| row.get(0))
        .optional()?)
}

fn due(connection: &Connection, at_most: usize, now: Millis) -> Result<Vec<i64>> {
    let mut statement = connection.prepare_cached(
        "SELECT id FROM conversations WHERE due_at <= ?1 ORDER BY due_at, id LIMIT ?2",
    )?;
    let ids = statement.query_map(params![now.0, limit(at_most)], |row| row.get(0))?;
    Ok(ids.collect::<rusqlite::Result<_>>()?)
}

/// Chats not seen since OurAPI last lost something: those first that were not put off, then those put off for longest.
fn unseen(
    connection: &Connection,
    at_most: usize,
    put_off: &HashMap<i64, Millis>,
    now: Millis,
) -> Result<Vec<i64>> {
    let mut statement = connection.prepare_cached(
        "SELECT id FROM conversations
         WHERE external_id IS NOT NULL AND chat_seen < (SELECT losses FROM delivery)
            AND due_at IS NULL AND claimed_through IS NULL
         LIMIT ?1",
    )?;
    let enough = at_most.saturating_add(put_off.len());
    let ids = statement.query_map([limit(enough)], |row| row.get(0))?;
    let mut ids: Vec<i64> = ids.collect::<rusqlite::Result<_>>()?;
    ids.retain(|id| put_off.get(id).is_none_or(|until| *until <= now));
    ids.sort_by_key(|id| put_off.get(id));
    ids.truncate(at_most);
    Ok(ids)
}

fn next_due(connection: &Connection) -> Result<Option<Millis>> {
    let due: Option<i64> = connection
        .prepare_cached("SELECT min(due_at) FROM conversations WHERE due_at IS NOT NULL")?
        .query_row([], |row| row.get(0))?;
    Ok(due.map(Millis))
}

fn conversation(connection: &Connection, id: i64) -> Result<Conversation> {
    connection
        .prepare_cached(
            "SELECT id, epoch, bigchat_id, started_at, first_advisor, details, ended_at, transfer_at, transfer_event,
                transfer_advisor, external_id, chat_id, chat_started_at, chat_ended_at, chat_agent, chat_unsure,
                chat_seen, looked_up, EXISTS (SELECT 1 FROM found WHERE found.conversation = conversations.id) AS holds_more
             FROM conversations WHERE id = ?1",
        )?
        .query_row([id], |row| Ok(read_conversation(row)))?
}

fn set_claimed(transaction: &Transaction<'_>, id: i64, through: i64) -> Result<()> {
    transaction
        .prepare_cached(
            "UPDATE conversations SET due_at = NULL, claimed_through = ?2 WHERE id = ?1",
        )?
        .execute([id, through])?;
    Ok(())
}

/// Claims a conversation and none of its events.
pub(super) fn claim_chat(transaction: &Transaction<'_>, id: i64) -> Result<Conversation> {
    let conversation = conversation(transaction, id)?;
    set_claimed(transaction, id, 0)?;
    Ok(conversation)
}

/// Claims what has been due for longest, as much as there is room for.
fn claim_next(transaction: &Transaction<'_>, claim: &Claim, now: Millis) -> Result<Vec<Work>> {
    let mut work = Vec::new();
    if claim.what == Claimable::All {
        let untried = match claim.probes {
            true => untried(transaction, now)?,
            false => None,
        };
        let mut ids = match untried {
            Some(id) => vec![id],
            None => due(transaction, claim.conversations, now)?,
        };
        let room = claim.conversations - ids.len();
        if room > 0 {
            ids.extend(unseen(transaction, room, &claim.put_off, now)?);
        }
        let mut bytes = 0;
        for id in ids {
            if bytes >= claim.bytes {
                return Ok(work);
            }
            match claim_waiting(transaction, id) {
                Ok(claimed) => {
                    bytes += claimed.bytes();
                    work.push(claimed);
                }
                Err(JournalError::Corrupt(what)) => {
                    tracing::error!(row = id, reason = %what, "the database holds what cannot be: left alone");
                    transaction
                        .execute("UPDATE conversations SET due_at = NULL, chat_seen = (SELECT losses FROM delivery) WHERE id = ?1", [id])?;
                }
                Err(error) => return Err(error),
            }
        }
    }
    let room = claim.conversations.saturating_sub(work.len());
    if room > 0 {
        work.extend(claim_checks(transaction, room, now)?);
    }
    Ok(work)
}

/// Claims a conversation with what waits of it, as much as one claim takes.
fn claim_waiting(transaction: &Transaction<'_>, id: i64) -> Result<Work> {
    let conversation = conversation(transaction, id)?;
    let mut statement = transaction.prepare_cached(
        "SELECT e.id, e.name, e.event_at, e.data, a.tries, a.counted, a.successes, a.in_doubt
         FROM events e LEFT JOIN attempts a ON a.event = e.id
         WHERE e.conversation = ?1 AND e.state = 'waiting' ORDER BY e.id LIMIT ?2",
    )?;
    let mut rows = statement.query(params![id, EVENTS_A_CLAIM])?;
    let (mut events, mut bytes) = (Vec::new(), 0);
    while let Some(row) = rows.next()?
        && bytes < BYTES_A_CLAIM
    {
        let event = read_waiting(row)?;
        bytes += event.bytes();
        events.push(event);
    }
    set_claimed(transaction, id, events.last().map_or(0, |event| event.id))?;
    Ok(Work {
        conversation,
        events,
        check: None,
    })
}

fn read_conversation(row: &Row<'_>) -> Result<Conversation> {
    let time = |column: &str| -> Result<Option<Timestamp>> {
        Ok(row.get::<_, Option<i64>>(column)?.map(Timestamp::clamped))
    };
    let id = |column: &str| {
        row.get::<_, Option<String>>(column)?
            .map(|id| uuid(&id))
            .transpose()
    };
    let transfer = match (
        time("transfer_at")?,
        row.get("transfer_event")?,
        row.get("transfer_advisor")?,
    ) {
        (Some(at), Some(event), Some(advisor)) => Some(Transfer { at, event, advisor }),
        _ => None,
    };
    let details: String = row.get("details")?;
    Ok(Conversation {
        id: row.get("id")?,
        epoch: row.get("epoch")?,
        bigchat_id: row.get("bigchat_id")?,
        started_at: time("started_at")?,
        first_advisor: row.get("first_advisor")?,
        details: match details.as_str() {
            "unread" => DetailsState::Unread,
            "read" => DetailsState::Read,
            _ => DetailsState::Gone,
        },
        said: Said {
            ended_at: time("ended_at")?,
            transfer,
        },
        chat: Chat {
            external_id: row.get("external_id")?,
            id: id("chat_id")?,
            started_at: time("chat_started_at")?,
            ended_at: time("chat_ended_at")?,
            agent: id("chat_agent")?,
            unsure: row.get("chat_unsure")?,
            seen: row.get("chat_seen")?,
            looked_up: row.get("looked_up")?,
            holds_more: row.get("holds_more")?,
        },
    })
}

fn read_waiting(row: &Row<'_>) -> Result<Waiting> {
    let text = |column| -> Result<Option<&str>> {
        let value = row.get_ref(column)?.as_str_or_null();
        value.map_err(|error| JournalError::Corrupt(error.to_string()))
    };
    let name = text(1)?.unwrap_or_default();
    let kind = written(Kind::from_name(name), name)?;
    // The log has the reason: it must not quote what the data says.
    let what = What::from_data(kind, text(3)?)
        .map_err(|_| JournalError::Corrupt(format!("the data of a {name} cannot be read")))?;
    Ok(Waiting {
        id: row.get(0)?,
        at: Timestamp::clamped(row.get(2)?),
        what,
        attempts: Attempts {
            tries: row.get::<_, Option<u32>>(4)?.unwrap_or(0),
            counted: row.get::<_, Option<u32>>(5)?.unwrap_or(0),
            successes: row.get(6)?,
            in_doubt: row.get::<_, Option<bool>>(7)?.unwrap_or(false),
        },
    })
}
