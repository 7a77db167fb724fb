//! The queue: which conversations are due, and which of their events wait.
//!
//! The waiting events of a conversation follow from its offset: those above it that are not dead letters, and its
//! redeliveries. A claim is recorded only in memory.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Row, params};
use uuid::Uuid;

use super::verification::{claim_requested, set_unreadable};
use super::{JournalError, Result, Store, count, limit, payload, present};
use crate::domain::account::MessageKey;
use crate::domain::conversation::{
    Attempts, Conversation, Desired, FieldSet, Observed, Pending, Transfer,
};
use crate::domain::ids::{ConversationId, EventId};
use crate::domain::progress::{Claim, IdlePass, Work};
use crate::domain::time::Millis;

/// How many events of one conversation are claimed at once. A long conversation then neither fills memory nor delays
/// others.
const EVENTS_PER_CLAIM: usize = 200;

/// How many bytes of messages are claimed at once. The message that exceeds the limit is included.
const BYTES_PER_CLAIM: usize = 256 << 10;

/// What the scheduler requests.
#[derive(Debug, Clone)]
pub struct ClaimRequest {
    /// No events are to be delivered.
    pub verifications_only: bool,
    /// The pass in idle time, which continues if nothing else is due.
    pub idle_pass: Option<IdlePass>,
    /// The claim is for a probe of OurAPI. Conversations without a failed waiting event come first, so that an event
    /// that always fails does not block all others.
    pub probe: bool,
    /// The maximum number of conversations.
    pub conversations: usize,
    /// The maximum bytes of messages. The conversation that exceeds it is included.
    pub bytes: usize,
    /// Conversations that are already claimed.
    pub exclude: HashSet<ConversationId>,
    pub session: i64,
    /// This machine's clock was set back, so everything is due now. If a request may still be in flight, its
    /// conversation is due after `request_timeout`.
    pub clock_set_back: bool,
    pub request_timeout: Duration,
    /// The longest possible wait. If something is due later, this machine's clock was ahead when the time was recorded.
    pub max_wait: Duration,
}

/// The conversations due.
#[derive(Debug, Default)]
pub struct Claimed {
    pub work: Vec<Work>,
    /// More conversations may be due than were requested.
    pub is_more: bool,
    /// When the next other conversation is due.
    pub next_due: Option<Millis>,
    /// Nothing is due, now or later, and nothing was claimed before.
    pub nothing_waits: bool,
}

/// The values that apply to everything loaded by one claim.
#[derive(Debug, Clone, Copy)]
pub(super) struct Loading {
    pub(super) session: i64,
    pub(super) losses: i64,
}

impl Store {
    /// Claims in this order: the conversations due for the longest time, with their waiting events; chats not verified
    /// since OurAPI last lost data; chats to be verified by hand; if there are none of these, the next chat of the pass
    /// in idle time.
    pub fn claim(&mut self, request: &ClaimRequest, now: Millis) -> Result<Claimed> {
        let latest_due = self.latest_due()?;
        if request.clock_set_back || latest_due > Some(now.plus(request.max_wait)) {
            tracing::warn!("this machine's clock was set back; waiting events are retried now");
            self.make_due(request.request_timeout, now)?;
        }
        let transaction = self.connection.transaction()?;
        let losses = transaction
            .prepare_cached("SELECT losses FROM control")?
            .query_row([], |row| row.get(0))?;
        let loading = Loading {
            session: request.session,
            losses,
        };
        let mut claimed = Claimed::default();
        let mut corrupt = Vec::new();
        if !request.verifications_only {
            let ids = due(&transaction, request, losses, now)?;
            claimed.is_more = ids.len() >= request.conversations;
            let mut bytes = 0;
            for id in ids {
                if bytes >= request.bytes {
                    claimed.is_more = true;
                    break;
                }
                match load(&transaction, id, loading, EVENTS_PER_CLAIM) {
                    Ok(work) => {
                        bytes += work.bytes();
                        claimed.work.push(work);
                    }
                    Err(JournalError::InvalidRow(what)) => corrupt.push((id, what)),
                    Err(error) => return Err(error),
                }
            }
        }
        let unverifiable = claim_requested(&transaction, request, loading, now, &mut claimed.work)?;
        claimed.next_due = next_due(&transaction, now)?;
        drop(transaction);
        if let Some(idle_pass) = request.idle_pass
            && claimed.work.is_empty()
            && !claimed.is_more
        {
            let work = self.claim_idle(idle_pass, &request.exclude, loading, now)?;
            claimed.work.extend(work);
        }
        claimed.nothing_waits =
            latest_due.is_none() && claimed.work.is_empty() && request.exclude.is_empty();
        for (id, what) in corrupt {
            tracing::error!(row = id.0, reason = %what, "invalid row in the database; the conversation is set aside");
            self.connection.execute(
                "UPDATE conversations SET due_at = NULL, verified_losses = (SELECT losses FROM control) WHERE id = ?1",
                [id],
            )?;
            set_unreadable(&self.connection, id)?;
        }
        for id in unverifiable {
            set_unreadable(&self.connection, id)?;
        }
        Ok(claimed)
    }

    fn latest_due(&self) -> Result<Option<Millis>> {
        Ok(self
            .connection
            .prepare_cached(
                "SELECT max(at) FROM (SELECT max(due_at) AS at FROM conversations WHERE due_at IS NOT NULL
                    UNION ALL SELECT max(next_at) FROM requested_chats WHERE state IS NULL)",
            )?
            .query_row([], |row| row.get(0))?)
    }

    /// Makes everything due now that would be due later. An event that may have been delivered is due after `pause`,
    /// because it is not known how long it has been waiting.
    fn make_due(&mut self, pause: Duration, now: Millis) -> Result<()> {
        let transaction = self.begin()?;
        transaction.execute(
            "UPDATE conversations SET due_at = iif(stale_seq > fresh_seq, ?2, ?1) WHERE due_at > ?1",
            [now, now.plus(pause)],
        )?;
        transaction.execute(
            "UPDATE attempts SET next_at = iif(outcome_unknown, ?2, ?1) WHERE next_at > ?1",
            [now, now.plus(pause)],
        )?;
        transaction.execute(
            "UPDATE requested_chats SET next_at = ?1 WHERE state IS NULL AND next_at > ?1",
            [now],
        )?;
        Ok(transaction.commit()?)
    }

    /// How many events are waiting.
    pub fn waiting(&mut self) -> Result<u64> {
        count_waiting(&self.connection)
    }
}

pub(super) fn count_waiting(connection: &Connection) -> Result<u64> {
    Ok(connection
        .prepare_cached(
            "SELECT coalesce(sum(waiting), 0) FROM conversations WHERE due_at IS NOT NULL",
        )?
        .query_row([], count)?)
}

fn due(
    connection: &Connection,
    request: &ClaimRequest,
    losses: i64,
    now: Millis,
) -> Result<Vec<ConversationId>> {
    if request.probe
        && let Some(id) = never_failed(connection, request, now)?
    {
        return Ok(vec![id]);
    }
    // The due conversations may include claimed ones.
    let enough = request.conversations.saturating_add(request.exclude.len());
    let is_free = |id: &ConversationId| !request.exclude.contains(id);
    let mut statement = connection.prepare_cached(
        "SELECT id FROM conversations WHERE due_at <= ?1 ORDER BY due_at, id LIMIT ?2",
    )?;
    let mut ids: Vec<ConversationId> = statement
        .query_map(params![now, limit(enough)], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    ids.retain(is_free);
    if ids.len() < request.conversations {
        let mut statement = connection.prepare_cached(
            "SELECT id FROM conversations
             WHERE external_id IS NOT NULL AND forgotten_at IS NULL AND verified_losses < ?1 AND due_at IS NULL LIMIT ?2",
        )?;
        let lost: Vec<ConversationId> = statement
            .query_map(params![losses, limit(enough)], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        ids.extend(lost.into_iter().filter(is_free));
    }
    ids.truncate(request.conversations);
    Ok(ids)
}

/// The conversation due for the longest time, among those without a failed waiting event.
fn never_failed(
    connection: &Connection,
    request: &ClaimRequest,
    now: Millis,
) -> Result<Option<ConversationId>> {
    let mut statement = connection.prepare_cached(
        "SELECT id FROM conversations c WHERE due_at <= ?1 AND NOT EXISTS (
            SELECT 1 FROM attempts a WHERE a.conversation = c.id AND a.next_at IS NOT NULL AND a.attempts > 0)
         ORDER BY due_at, id LIMIT ?2",
    )?;
    let mut ids = statement.query_map(params![now, limit(request.exclude.len() + 1)], |row| {
        row.get(0)
    })?;
    let free = ids.find(|id| id.as_ref().map_or(true, |id| !request.exclude.contains(id)));
    Ok(free.transpose()?)
}

fn next_due(connection: &Connection, now: Millis) -> Result<Option<Millis>> {
    Ok(connection
        .prepare_cached(
            "SELECT min(at) FROM (SELECT min(due_at) AS at FROM conversations WHERE due_at > ?1
                UNION ALL SELECT min(next_at) FROM requested_chats WHERE state IS NULL AND next_at > ?1)",
        )?
        .query_row([now], |row| row.get(0))?)
}

/// Loads a conversation with up to `at_most` of its waiting events.
pub(super) fn load(
    connection: &Connection,
    id: ConversationId,
    loading: Loading,
    at_most: usize,
) -> Result<Work> {
    let (conversation, mut claim, restored_through) = read_conversation(connection, id, loading)?;
    let mut events = Vec::new();
    let mut bytes = 0;
    let attempts = read_attempts(connection, id)?;
    let mut take = |row: &Row<'_>, redelivery: bool, restored: bool| -> Result<bool> {
        let event = read_pending(row, &attempts, redelivery, restored)?;
        bytes += event.bytes();
        events.push(event);
        Ok(bytes < BYTES_PER_CLAIM && events.len() < at_most)
    };
    let mut statement = connection.prepare_cached(
        "SELECT e.id, e.kind, e.event_at, e.data, e.received_at, r.restored
         FROM redeliveries r JOIN events e ON e.id = r.event WHERE r.conversation = ?1 ORDER BY r.event",
    )?;
    let mut rows = statement.query([id])?;
    let mut is_more_wanted = at_most > 0;
    while is_more_wanted && let Some(row) = rows.next()? {
        is_more_wanted = take(row, true, row.get(5)?)?;
    }
    let dead = dead_letters(connection, id, claim.offset)?;
    let mut statement = connection.prepare_cached(
        "SELECT id, kind, event_at, data, received_at FROM events WHERE conversation = ?1 AND id > ?2 ORDER BY id",
    )?;
    let mut rows = statement.query(params![id, claim.offset])?;
    while is_more_wanted && let Some(row) = rows.next()? {
        let event: EventId = row.get(0)?;
        claim.through = event;
        if dead.contains(&event) {
            claim.skipped.push(event);
        } else {
            is_more_wanted = take(row, false, event <= restored_through)?;
        }
    }
    credit(connection, id, &mut events)?;
    Ok(Work {
        conversation,
        events: events.into(),
        claim,
        verify: None,
    })
}

/// Loads a conversation without its events.
pub(super) fn load_chat(
    connection: &Connection,
    id: ConversationId,
    loading: Loading,
) -> Result<Work> {
    load(connection, id, loading, 0)
}

fn read_conversation(
    connection: &Connection,
    id: ConversationId,
    loading: Loading,
) -> Result<(Conversation, Claim, EventId)> {
    let mut statement = connection.prepare_cached(
        "SELECT epoch, bigchat_id, details, started_at, first_advisor, ended_at, transfer_at, transfer_event,
            transfer_advisor, external_id, chat_id, chat_started_at, chat_ended_at, chat_agent, chat_advisor,
            stale_seq, fresh_seq, verified_losses, read_in_session, offset, restored_through,
            (SELECT coalesce(max(id), 0) FROM events WHERE conversation = ?1), verified_in IS NOT NULL, drift
         FROM conversations WHERE id = ?1",
    )?;
    let mut rows = statement.query([id])?;
    let row = present(rows.next()?, || format!("no conversation {}", id.0))?;
    let id_at = |index| -> Result<Option<Uuid>> {
        let text: Option<String> = row.get(index)?;
        text.map(|text| uuid(&text)).transpose()
    };
    let transfer = match (row.get(6)?, row.get(7)?, row.get(8)?) {
        (Some(at), Some(event), Some(advisor)) => Some(Transfer { at, event, advisor }),
        _ => None,
    };
    let conversation = Conversation {
        id,
        epoch: row.get(0)?,
        bigchat_id: row.get(1)?,
        details: row.get(2)?,
        desired: Desired {
            started_at: row.get(3)?,
            first_advisor: row.get(4)?,
            ended_at: row.get(5)?,
            transfer,
        },
        observed: Observed {
            external_id: row.get(9)?,
            chat: id_at(10)?,
            started_at: row.get(11)?,
            ended_at: row.get(12)?,
            agent: id_at(13)?,
            advisor: row.get(14)?,
        },
    };
    let (stale_seq, fresh_seq): (i64, i64) = (row.get(15)?, row.get(16)?);
    let (offset, restored_through) = (row.get(19)?, row.get(20)?);
    let claim = Claim {
        offset,
        through: offset,
        skipped: Vec::new(),
        last_event: row.get(21)?,
        stale_seq,
        became_stale: stale_seq > fresh_seq,
        losses: loading.losses,
        is_lost: row.get::<_, i64>(17)? < loading.losses,
        is_read: row.get::<_, i64>(18)? == loading.session,
        is_rewound: restored_through > offset,
        is_in_passes: row.get(22)?,
        drift: match row.get_ref(23)?.as_str_or_null() {
            Ok(Some(names)) => FieldSet::named(names),
            _ => FieldSet::default(),
        },
    };
    Ok((conversation, claim, restored_through))
}

fn read_attempts(
    connection: &Connection,
    conversation: ConversationId,
) -> Result<HashMap<EventId, Attempts>> {
    let mut statement = connection.prepare_cached(
        "SELECT event, attempts, counted, writes_then, outcome_unknown FROM attempts WHERE conversation = ?1",
    )?;
    let attempts = statement.query_map([conversation], |row| {
        let attempts = Attempts {
            failed: row.get(1)?,
            counted: row.get(2)?,
            writes_then: row.get(3)?,
            outcome_unknown: row.get(4)?,
        };
        Ok((row.get(0)?, attempts))
    })?;
    Ok(attempts.collect::<rusqlite::Result<_>>()?)
}

fn dead_letters(
    connection: &Connection,
    conversation: ConversationId,
    above: EventId,
) -> Result<BTreeSet<EventId>> {
    let mut statement = connection
        .prepare_cached("SELECT event FROM dead_letters WHERE conversation = ?1 AND event > ?2")?;
    let dead = statement.query_map(params![conversation, above], |row| row.get(0))?;
    Ok(dead.collect::<rusqlite::Result<_>>()?)
}

fn read_pending(
    row: &Row<'_>,
    attempts: &HashMap<EventId, Attempts>,
    redelivery: bool,
    restored: bool,
) -> Result<Pending> {
    let text = |column| -> Result<Option<&str>> {
        let value = row.get_ref(column)?.as_str_or_null();
        value.map_err(|error| JournalError::InvalidRow(error.to_string()))
    };
    let name = text(1)?.unwrap_or_default();
    let payload = payload(name, text(3)?)?;
    let id = row.get(0)?;
    Ok(Pending {
        id,
        at: row.get(2)?,
        received_at: row.get(4)?,
        payload,
        attempts: attempts.get(&id).copied().unwrap_or_default(),
        redelivery,
        restored,
        credit: None,
    })
}

/// Marks the messages for which there is a credit, using each credit once.
fn credit(
    connection: &Connection,
    conversation: ConversationId,
    events: &mut [Pending],
) -> Result<()> {
    let has_credits: bool = connection
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM credits WHERE conversation = ?1)")?
        .query_row([conversation], |row| row.get(0))?;
    if !has_credits {
        return Ok(());
    }
    let mut left: HashMap<MessageKey, (u32, EventId)> = HashMap::new();
    for event in events {
        let Some(key) = event.key() else {
            continue;
        };
        if !left.contains_key(&key) {
            let credit = connection
                .prepare_cached(
                    "SELECT count, as_of FROM credits WHERE conversation = ?1 AND sent_at = ?2 AND text = ?3",
                )?
                .query_row(params![conversation, key.sent_at, key.text], |row| {
                    Ok((row.get(0)?, row.get(1)?))
                })
                .optional()?;
            left.insert(key.clone(), credit.unwrap_or_default());
        }
        if let Some((count, as_of)) = left.get_mut(&key)
            && *count > 0
        {
            *count -= 1;
            event.credit = Some(*as_of);
        }
    }
    Ok(())
}

pub(super) fn uuid(text: &str) -> Result<Uuid> {
    present(Uuid::parse_str(text).ok(), || text.to_owned())
}
