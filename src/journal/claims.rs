//! What delivery takes on and what became of it.
//!
//! A claim is made before anything is sent and ends with its settlement, in one transaction with what was learnt.
//! Whatever is claimed when the daemon starts was in work when it died: its outcome is unknown.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use rusqlite::{
    CachedStatement, Connection, OptionalExtension, Row, Transaction, named_params, params,
};

use super::knowledge::uuid;
use super::minutes::Counts;
use super::rebuild::{claim_checks, note_finding};
use super::{JournalError, Result, Store, written};
use crate::conversation::{
    Attempts, Chat, Conversation, DetailsState, Failure, Outcome, Said, Sent, Settlement, Transfer,
    Waiting, Work,
};
use crate::event::{Kind, What};
use crate::messages::{self, MessageKey, Standing};
use crate::time::{Millis, Timestamp};

/// How many events of one conversation are claimed at once, so that a long one neither fills the memory nor keeps
/// others waiting.
const EVENTS_A_CLAIM: u32 = 200;

/// And how many bytes of messages; the one that exceeds it still belongs to it.
const BYTES_A_CLAIM: usize = 256 << 10;

/// How many of its latest failures are kept with an event.
const FAILURES_KEPT: u32 = 10;

/// What is due later than this when the daemon starts is due at once: a clock that was wrong must not make it wait for
/// ever.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// What delivery starts with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// Its number.
    pub id: i64,
    /// The latest event there was: those up to it may have been delivered by another copy of the database.
    pub last_event: i64,
    /// How many writes have succeeded ever.
    pub successes: i64,
    /// How many losses of OurAPI there have been.
    pub losses: i64,
    /// The conversations that were in work when the daemon died.
    pub interrupted: Vec<i64>,
    /// Until when the APIs asked to be left alone.
    pub throttles: Throttles,
    /// How long OurAPI's answers took at the worst of late, where that is long.
    pub slowest: Duration,
    /// For how long what was on its way may still be under way.
    pub pause: Duration,
}

/// Until when the APIs asked to be left alone, by this machine's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Throttles {
    /// BigChat.
    pub bigchat: Millis,
    /// OurAPI.
    pub our_api: Millis,
    /// OurAPI, since requests that nobody waits for any more may be under way.
    pub late: Millis,
}

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
    /// Starts a session of delivery: what was claimed has an unknown outcome from now on. It is left alone for
    /// `pause`, or for twice as long as answers took: what was on its way to OurAPI must have arrived before it is
    /// looked for.
    pub fn start_session(&mut self, pause: Duration, now: Millis) -> Result<Session> {
        let transaction = self.begin()?;
        let slowest: i64 =
            transaction.query_row("SELECT slowest FROM delivery", [], |row| row.get(0))?;
        let slowest = Duration::from_millis(u64::try_from(slowest).unwrap_or_default());
        let pause = pause.max(slowest * 2);
        let claimed: Vec<i64> = {
            let mut statement = transaction
                .prepare_cached("SELECT id FROM conversations WHERE claimed_through IS NOT NULL")?;
            let ids = statement.query_map([], |row| row.get(0))?;
            ids.collect::<rusqlite::Result<_>>()?
        };
        for conversation in &claimed {
            abandon(&transaction, *conversation, pause, now)?;
        }
        // OurAPI may have been mended since.
        transaction.execute("DELETE FROM agents WHERE agent_id IS NULL", [])?;
        let session = transaction.query_row(
            "UPDATE delivery SET session = session + 1
             RETURNING session, successes, losses, bigchat_throttled, our_api_throttled,
                (SELECT coalesce(max(id), 0) FROM events), late",
            [],
            |row| {
                Ok(Session {
                    id: row.get(0)?,
                    successes: row.get(1)?,
                    losses: row.get(2)?,
                    throttles: Throttles {
                        bigchat: Millis(row.get(3)?),
                        our_api: Millis(row.get(4)?),
                        late: Millis(row.get(6)?),
                    },
                    last_event: row.get(5)?,
                    interrupted: claimed.clone(),
                    slowest,
                    pause,
                })
            },
        )?;
        nothing_later_than(&transaction, now.plus(LONGEST_WAIT), now)?;
        transaction.commit()?;
        Ok(session)
    }

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

    /// Makes everything due now that would be due later: this machine's clock was set back. What is in doubt is due
    /// after `pause`: how long it has waited already is not known.
    pub fn clock_set_back(&mut self, pause: Duration, now: Millis) -> Result<()> {
        let transaction = self.begin()?;
        transaction.execute(
            "UPDATE conversations SET due_at = iif(EXISTS (
                SELECT 1 FROM events e JOIN attempts a ON a.event = e.id
                WHERE e.conversation = conversations.id AND e.state = 'waiting' AND a.in_doubt = 1), ?2, ?1)
             WHERE due_at > ?1",
            [now.0, now.plus(pause).0],
        )?;
        transaction.execute(
            "UPDATE attempts SET next_at = iif(in_doubt = 1, ?2, ?1) WHERE next_at > ?1",
            [now.0, now.plus(pause).0],
        )?;
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

    /// Keeps until when the APIs asked to be left alone.
    pub fn note_throttles(&mut self, throttles: Throttles) -> Result<()> {
        self.connection.execute(
            "UPDATE delivery SET bigchat_throttled = ?1, our_api_throttled = ?2, late = ?3
             WHERE bigchat_throttled <> ?1 OR our_api_throttled <> ?2 OR late <> ?3",
            [throttles.bigchat.0, throttles.our_api.0, throttles.late.0],
        )?;
        Ok(())
    }

    /// Keeps how long OurAPI's answers took at the worst of late.
    pub fn note_slowest(&mut self, slowest: Duration) -> Result<()> {
        let slowest = i64::try_from(slowest.as_millis()).unwrap_or(i64::MAX);
        self.connection
            .execute("UPDATE delivery SET slowest = ?1", [slowest])?;
        Ok(())
    }

    /// The earliest time any event of a conversation tells.
    pub fn earliest(&mut self, conversation: i64) -> Result<Option<Timestamp>> {
        let earliest: Option<i64> = self
            .connection
            .prepare_cached("SELECT min(event_at) FROM events WHERE conversation = ?1")?
            .query_row([conversation], |row| row.get(0))?;
        Ok(earliest.map(Timestamp::clamped))
    }

    /// Whether another conversation of that id was told of in an earlier run of BigChat.
    pub fn id_was_used(&mut self, conversation: &Conversation) -> Result<bool> {
        Ok(self
            .connection
            .prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM conversations c WHERE c.bigchat_id = ?1 AND c.epoch < ?2
                    AND (c.external_id IS NOT NULL OR EXISTS (SELECT 1 FROM events e WHERE e.conversation = c.id)))",
            )?
            .query_row([conversation.bigchat_id, conversation.epoch], |row| row.get(0))?)
    }

    /// Keeps the external id and start time a chat is about to be created with, where they could not be worked out
    /// again: whether the chat is ours could not be told if the answer were lost.
    pub fn note_creation(
        &mut self,
        conversation: i64,
        external_id: &str,
        started_at: Timestamp,
    ) -> Result<()> {
        self.connection.execute(
            "UPDATE conversations SET external_id = ?2, chat_started_at = ?3 WHERE id = ?1",
            params![conversation, external_id, started_at.unix()],
        )?;
        Ok(())
    }

    /// OurAPI has lost the chat of a conversation. If `again`, its messages are to be delivered again; `in_doubt`:
    /// there is another chat in its place, which may hold some of them.
    pub fn chat_replaced(&mut self, conversation: i64, again: bool, in_doubt: bool) -> Result<()> {
        let transaction = self.begin()?;
        transaction.execute("DELETE FROM found WHERE conversation = ?1", [conversation])?;
        if again && in_doubt {
            transaction.execute(
                "INSERT INTO attempts (event, in_doubt)
                 SELECT id, 1 FROM events WHERE conversation = ?1 AND name = 'MESSAGE' AND state IN ('delivered', 'waiting')
                 ON CONFLICT (event) DO UPDATE SET in_doubt = 1",
                [conversation],
            )?;
        }
        if again {
            transaction.execute(
                "UPDATE events SET state = 'waiting', settled_at = NULL
                 WHERE conversation = ?1 AND name = 'MESSAGE' AND state = 'delivered'",
                [conversation],
            )?;
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

    /// Compares the messages OurAPI holds for a conversation with those the journal has. Those that wait, may stand
    /// there (in doubt, or not after `up_to`) and do are delivered; which these are is returned. What OurAPI holds
    /// beyond is remembered for what BigChat may tell again.
    pub fn note_look_up(
        &mut self,
        conversation: i64,
        held: Vec<MessageKey>,
        up_to: i64,
        session: i64,
        now: Millis,
    ) -> Result<HashSet<i64>> {
        let transaction = self.begin()?;
        let journal = messages_of(&transaction, conversation, up_to)?;
        let result = messages::look_up(held, &journal);
        let mut counts = Counts::default();
        let mut delivery = Deliveries::of(&transaction, now)?;
        for id in &result.there {
            delivery.note(*id, Kind::Message, Sent::Nothing, &mut counts)?;
        }
        drop(delivery);
        counts.keep(&transaction, now)?;
        for id in &result.missing {
            transaction
                .prepare_cached("UPDATE attempts SET in_doubt = 0 WHERE event = ?1")?
                .execute([id])?;
        }
        transaction
            .prepare_cached("DELETE FROM found WHERE conversation = ?1")?
            .execute([conversation])?;
        for ((sent_at, text), count) in &result.beyond {
            transaction
                .prepare_cached("INSERT INTO found (conversation, sent_at, text, count) VALUES (?1, ?2, ?3, ?4)")?
                .execute(params![conversation, sent_at.unix(), text, count])?;
        }
        transaction
            .prepare_cached("UPDATE conversations SET looked_up = ?2 WHERE id = ?1")?
            .execute([conversation, session])?;
        transaction.commit()?;
        Ok(result.there.into_iter().collect())
    }

    /// Whether OurAPI was found to hold such a message that no event accounted for; from now on this one does.
    pub fn take_found(
        &mut self,
        conversation: i64,
        event: i64,
        key: &MessageKey,
        now: Millis,
    ) -> Result<bool> {
        let transaction = self.begin()?;
        let left: Option<i64> = transaction
            .prepare_cached(
                "SELECT count FROM found WHERE conversation = ?1 AND sent_at = ?2 AND text = ?3",
            )?
            .query_row(params![conversation, key.0.unix(), key.1], |row| row.get(0))
            .optional()?;
        let Some(left) = left else { return Ok(false) };
        let statement = if left > 1 {
            "UPDATE found SET count = count - 1 WHERE conversation = ?1 AND sent_at = ?2 AND text = ?3"
        } else {
            "DELETE FROM found WHERE conversation = ?1 AND sent_at = ?2 AND text = ?3"
        };
        transaction.prepare_cached(statement)?.execute(params![
            conversation,
            key.0.unix(),
            key.1
        ])?;
        let mut counts = Counts::default();
        Deliveries::of(&transaction, now)?.note(
            event,
            Kind::Message,
            Sent::Nothing,
            &mut counts,
        )?;
        counts.keep(&transaction, now)?;
        transaction.commit()?;
        Ok(true)
    }
}

fn abandon(
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

/// Makes due `now` what would be due later than `latest`.
fn nothing_later_than(connection: &Connection, latest: Millis, now: Millis) -> Result<()> {
    connection.execute(
        "UPDATE conversations SET due_at = ?2 WHERE due_at > ?1",
        [latest.0, now.0],
    )?;
    connection.execute(
        "UPDATE attempts SET next_at = ?2 WHERE next_at > ?1",
        [latest.0, now.0],
    )?;
    Ok(())
}

fn next_due(connection: &Connection) -> Result<Option<Millis>> {
    let due: Option<i64> = connection
        .prepare_cached("SELECT min(due_at) FROM conversations WHERE due_at IS NOT NULL")?
        .query_row([], |row| row.get(0))?;
    Ok(due.map(Millis))
}

pub(super) fn limit(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
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
        let mut ids = due(transaction, claim.conversations, now)?;
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
                        .execute("UPDATE conversations SET due_at = NULL WHERE id = ?1", [id])?;
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
    let what = What::from_data(kind, text(3)?)
        .map_err(|error| JournalError::Corrupt(error.to_string()))?;
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

fn settle(
    transaction: &Transaction<'_>,
    settlement: &Settlement,
    counts: &mut Counts,
    now: Millis,
) -> Result<()> {
    let Conversation {
        id,
        started_at,
        first_advisor,
        details,
        said,
        chat,
        ..
    } = &settlement.conversation;
    transaction
        .prepare_cached(
            // Its START may have arrived, or its details been read, meanwhile.
            "UPDATE conversations SET
                started_at = coalesce(started_at, :started_at),
                first_advisor = coalesce(:first_advisor, first_advisor),
                details = iif(:details = 'unread', details, :details),
                ended_at = :ended_at, transfer_at = :transfer_at, transfer_event = :transfer_event,
                transfer_advisor = :transfer_advisor, external_id = :external_id, chat_id = :chat_id,
                chat_started_at = :chat_started_at, chat_ended_at = :chat_ended_at, chat_agent = :chat_agent,
                chat_unsure = :chat_unsure, chat_seen = :chat_seen, looked_up = :looked_up, claimed_through = NULL
             WHERE id = :id",
        )?
        .execute(named_params! {
            ":id": id,
            ":started_at": started_at.map(Timestamp::unix),
            ":first_advisor": first_advisor,
            ":details": match details {
                DetailsState::Unread => "unread",
                DetailsState::Read => "read",
                DetailsState::Gone => "gone",
            },
            ":ended_at": said.ended_at.map(Timestamp::unix),
            ":transfer_at": said.transfer.map(|transfer| transfer.at.unix()),
            ":transfer_event": said.transfer.map(|transfer| transfer.event),
            ":transfer_advisor": said.transfer.map(|transfer| transfer.advisor),
            ":external_id": chat.external_id,
            ":chat_id": chat.id.map(|id| id.to_string()),
            ":chat_started_at": chat.started_at.map(Timestamp::unix),
            ":chat_ended_at": chat.ended_at.map(Timestamp::unix),
            ":chat_agent": chat.agent.map(|id| id.to_string()),
            ":chat_unsure": chat.unsure,
            ":chat_seen": chat.seen,
            ":looked_up": chat.looked_up,
        })?;
    if let Some((check, finding)) = &settlement.finding {
        note_finding(transaction, *id, *check, finding.as_ref())?;
    }
    let mut not_before = None;
    let mut deliveries = Deliveries::of(transaction, now)?;
    for settled in &settlement.outcomes {
        let (event, kind) = (settled.event, settled.kind);
        match &settled.outcome {
            Outcome::Delivered(sent) => deliveries.note(event, kind, *sent, counts)?,
            Outcome::Waiting {
                attempts,
                next_at,
                failure,
            } => {
                note_attempt(transaction, event, attempts, Some(*next_at), failure, now)?;
                not_before = not_before.max(Some(*next_at));
            }
            Outcome::Failed { attempts, failure } => {
                let failed = transaction
                    .prepare_cached(
                        "UPDATE events SET state = 'failed', settled_at = ?2 WHERE id = ?1 AND state = 'waiting'",
                    )?
                    .execute([event, now.0])?;
                if failed > 0 {
                    counts.of(kind.name()).failed += 1;
                    note_attempt(transaction, event, attempts, None, failure, now)?;
                }
            }
        }
    }
    reschedule(transaction, *id, not_before, now)
}

/// Notes that events are delivered: the one statement that is carried out for each of them.
struct Deliveries<'a> {
    statement: CachedStatement<'a>,
    now: Millis,
}

impl<'a> Deliveries<'a> {
    fn of(transaction: &'a Transaction<'_>, now: Millis) -> Result<Self> {
        let statement = transaction.prepare_cached(
            "UPDATE events SET state = 'delivered', settled_at = ?2, sent = ?3 WHERE id = ?1 AND state = 'waiting'",
        )?;
        Ok(Self { statement, now })
    }

    /// Notes it of one event, unless that is noted already.
    fn note(&mut self, event: i64, kind: Kind, sent: Sent, counts: &mut Counts) -> Result<()> {
        let noted = self
            .statement
            .execute(params![event, self.now.0, sent.name()])?;
        if noted > 0 {
            counts.of(kind.name()).delivered += 1;
        }
        Ok(())
    }
}

/// Notes what an event came to, unless somebody has deleted it by hand: that must not keep the others from being settled.
fn note_attempt(
    transaction: &Transaction<'_>,
    event: i64,
    attempts: &Attempts,
    next_at: Option<Millis>,
    failure: &Failure,
    now: Millis,
) -> Result<()> {
    let noted = transaction
        .prepare_cached(
            "INSERT OR REPLACE INTO attempts (event, tries, counted, next_at, successes, in_doubt, reason, request, response)
             SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9 WHERE EXISTS (SELECT 1 FROM events WHERE id = ?1)",
        )?
        .execute(params![
            event,
            attempts.tries,
            attempts.counted,
            next_at.map(|next| next.0),
            attempts.successes,
            attempts.in_doubt,
            failure.reason,
            failure.request,
            failure.response,
        ])?;
    if noted == 0 {
        return Ok(());
    }
    transaction
        .prepare_cached(
            "INSERT OR REPLACE INTO failures (event, number, failed_at, reason, request, response)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?
        .execute(params![
            event,
            attempts.tries,
            now.0,
            failure.reason,
            failure.request,
            failure.response,
        ])?;
    transaction
        .prepare_cached("DELETE FROM failures WHERE event = ?1 AND number <= ?2 - ?3")?
        .execute(params![event, attempts.tries, FAILURES_KEPT])?;
    Ok(())
}

/// Makes a conversation due when its first waiting event is: at the time of its next attempt, else since it was kept;
/// but not before the next attempt of what has just failed, which need not be the first.
pub(super) fn reschedule(
    transaction: &Transaction<'_>,
    conversation: i64,
    not_before: Option<Millis>,
    now: Millis,
) -> Result<()> {
    transaction
        .prepare_cached(
            "UPDATE conversations SET due_at = (
                SELECT max(coalesce(a.next_at, min(e.kept_at, ?3)), coalesce(?2, 0))
                FROM events e LEFT JOIN attempts a ON a.event = e.id
                WHERE e.conversation = ?1 AND e.state = 'waiting' ORDER BY e.id LIMIT 1)
             WHERE id = ?1 AND claimed_through IS NULL",
        )?
        .execute(params![conversation, not_before.map(|at| at.0), now.0])?;
    Ok(())
}

/// Makes a conversation due, unless it is in work (whoever works on it looks again) or waits for its next attempt.
pub(super) fn wake(
    connection: &rusqlite::Connection,
    conversation: i64,
    now: Millis,
) -> Result<()> {
    connection
        .prepare_cached(
            "UPDATE conversations SET due_at = ?2 WHERE id = ?1 AND due_at IS NULL AND claimed_through IS NULL",
        )?
        .execute([conversation, now.0])?;
    Ok(())
}

/// The messages of a conversation that are delivered or wait, in order of arrival.
pub(super) fn messages_of(
    connection: &Connection,
    conversation: i64,
    up_to: i64,
) -> Result<Vec<(i64, MessageKey, Standing)>> {
    let mut statement = connection.prepare_cached(
        "SELECT e.id, e.event_at, e.data, e.state = 'delivered', coalesce(a.in_doubt, 0)
         FROM events e LEFT JOIN attempts a ON a.event = e.id
         WHERE e.conversation = ?1 AND e.name = 'MESSAGE' AND e.state IN ('delivered', 'waiting') ORDER BY e.id",
    )?;
    let mut rows = statement.query([conversation])?;
    let mut messages = Vec::new();
    while let Some(row) = rows.next()? {
        let id: i64 = row.get(0)?;
        let data: Option<String> = row.get(2)?;
        let What::Message { text } = What::from_data(Kind::Message, data.as_deref())
            .map_err(|error| JournalError::Corrupt(error.to_string()))?
        else {
            continue;
        };
        let standing = match (row.get(3)?, row.get(4)?) {
            (true, _) => Standing::Delivered,
            (false, true) => Standing::MayBeThere,
            (false, false) if id <= up_to => Standing::MayBeThere,
            (false, false) => Standing::New,
        };
        messages.push((
            id,
            messages::key(Timestamp::clamped(row.get(1)?), &text),
            standing,
        ));
    }
    Ok(messages)
}

/// Makes a conversation due now, as after a decision about one of its events.
pub(super) fn due_now(transaction: &Transaction<'_>, conversation: i64, now: Millis) -> Result<()> {
    wake(transaction, conversation, now)?;
    reschedule(transaction, conversation, None, now)
}
