//! Settlements: what became of events, and when their conversation is due again.

use rusqlite::{CachedStatement, Connection, Transaction, named_params, params};

use super::Result;
use super::minutes::Counts;
use super::rebuild::note_finding;
use crate::conversation::{
    Attempts, Conversation, DetailsState, Failure, Outcome, Sent, Settlement,
};
use crate::event::Kind;
use crate::time::{Millis, Timestamp};

/// How many of its latest failures are kept with an event.
const FAILURES_KEPT: u32 = 10;

pub(super) fn settle(
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
pub(super) struct Deliveries<'a> {
    statement: CachedStatement<'a>,
    now: Millis,
}

impl<'a> Deliveries<'a> {
    pub(super) fn of(transaction: &'a Transaction<'_>, now: Millis) -> Result<Self> {
        let statement = transaction.prepare_cached(
            "UPDATE events SET state = 'delivered', settled_at = ?2, sent = ?3 WHERE id = ?1 AND state = 'waiting'",
        )?;
        Ok(Self { statement, now })
    }

    /// Notes it of one event, unless that is noted already.
    pub(super) fn note(
        &mut self,
        event: i64,
        kind: Kind,
        sent: Sent,
        counts: &mut Counts,
    ) -> Result<()> {
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
pub(super) fn wake(connection: &Connection, conversation: i64, now: Millis) -> Result<()> {
    connection
        .prepare_cached(
            "UPDATE conversations SET due_at = ?2 WHERE id = ?1 AND due_at IS NULL AND claimed_through IS NULL",
        )?
        .execute([conversation, now.0])?;
    Ok(())
}

/// Makes a conversation due now, as after a decision about one of its events.
pub(super) fn due_now(transaction: &Transaction<'_>, conversation: i64, now: Millis) -> Result<()> {
    wake(transaction, conversation, now)?;
    reschedule(transaction, conversation, None, now)
}
