//! Commits the reports of claims, with one transaction per commit.
//!
//! Other operations (ingest, `failed retry`, a loss, a verification) may change the same rows after the claim. Columns
//! that they change are therefore updated relative to their current values.

use rusqlite::{OptionalExtension, Transaction, named_params, params};

use super::activity::Counts;
use super::forget::erase;
use super::verification::{record_repair, record_verification};
use super::{Result, Store, limit, present};
use crate::domain::account::{Accounting, MessageKey};
use crate::domain::conversation::{Attempts, Conversation};
use crate::domain::ids::{ConversationId, EventId};
use crate::domain::progress::{Due, EventOutcome, Failure, Observation, Outcome, Report};
use crate::domain::time::Millis;

/// How many of the latest failures are stored for each event.
const FAILURES_STORED: u32 = 10;

/// SQL for the time since which the oldest event has been waiting for its first delivery: since it was received, or
/// since its retry. Takes the conversation's offset.
macro_rules! waiting_since {
    ($offset:literal) => {
        concat!(
            "SELECT min(since) FROM (
                SELECT min(retried_at) AS since FROM attempts
                    WHERE conversation = conversations.id AND retried_at IS NOT NULL
                UNION ALL
                SELECT * FROM (SELECT e.received_at FROM events e
                    WHERE e.conversation = conversations.id AND e.id > max(",
            $offset,
            ", conversations.restored_through)
                        AND NOT EXISTS (SELECT 1 FROM dead_letters d WHERE d.event = e.id)
                        AND NOT EXISTS (SELECT 1 FROM attempts a WHERE a.event = e.id AND a.retried_at IS NOT NULL)
                    ORDER BY e.id LIMIT 1))"
        )
    };
}

impl Store {
    /// Commits the results of claims.
    pub fn commit(&mut self, reports: &[Report], session: i64, now: Millis) -> Result<()> {
        let transaction = self.begin()?;
        let mut counts = Counts::default();
        for report in reports {
            commit(&transaction, report, session, &mut counts, now)?;
        }
        let writes_succeeded = reports.iter().map(|report| report.writes_succeeded).max();
        counts.store(&transaction, now)?;
        transaction
            .prepare_cached("UPDATE control SET writes_succeeded = max(writes_succeeded, ?1)")?
            .execute([writes_succeeded.unwrap_or_default()])?;
        Ok(transaction.commit()?)
    }
}

fn commit(
    transaction: &Transaction<'_>,
    report: &Report,
    session: i64,
    counts: &mut Counts,
    now: Millis,
) -> Result<()> {
    let id = report.conversation.id;
    if report.observation == Observation::Created {
        // Whatever was sent before went to a chat that no longer exists.
        transaction
            .prepare_cached("UPDATE attempts SET outcome_unknown = 0 WHERE conversation = ?1 AND outcome_unknown")?
            .execute([id])?;
    }
    // This must precede the outcomes, which clear `retried_at`.
    for run in &report.advance.delivered {
        let waited = (!run.restored).then(|| now.0.saturating_sub(run.received_at.0));
        transaction
            .prepare_cached(
                "INSERT INTO deliveries (conversation, from_event, through, delivered_at, effect, waited)
                 VALUES (?1, ?2, ?3, ?4, ?5, iif(EXISTS (SELECT 1 FROM attempts
                    WHERE conversation = ?1 AND event BETWEEN ?2 AND ?3 AND retried_at IS NOT NULL), NULL, ?6))",
            )?
            .execute(params![id, run.from, run.through, now, run.effect, waited])?;
    }
    for outcome in &report.outcomes {
        commit_outcome(transaction, id, report.advance.offset, outcome, counts, now)?;
    }
    for key in &report.consumed {
        consume(transaction, id, key)?;
    }
    // A dead letter may have been retried meanwhile. If the offset passes it, it becomes a redelivery.
    for skipped in report
        .claim
        .skipped
        .iter()
        .filter(|event| **event <= report.advance.offset)
    {
        transaction
            .prepare_cached(
                "INSERT OR IGNORE INTO redeliveries (conversation, event, restored)
                 SELECT conversation, id, 0 FROM events
                 WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM dead_letters WHERE event = ?1)",
            )?
            .execute([skipped])?;
    }
    update_verification(transaction, report)?;
    if update(transaction, report, session, now)? {
        return erase(transaction, id, now);
    }
    match &report.observation {
        // No event was attempted. Some may have been deleted by hand, so the waiting ones are counted again.
        Observation::None if report.outcomes.is_empty() && report.due == Due::IfWaiting => {
            recount(transaction, id)?;
            if report.verify.is_none() {
                transaction.execute(
                    "UPDATE conversations SET due_at = NULL WHERE id = ?1 AND waiting = 0",
                    [id],
                )?;
            }
        }
        Observation::None
        | Observation::Created
        | Observation::Adopted
        | Observation::Read(None) => {}
        Observation::Read(Some(accounting)) => read(transaction, report, accounting)?,
        Observation::Gone { rebuild } => {
            gone(transaction, id, *rebuild)?;
            recount(transaction, id)?;
        }
    }
    match report.verify {
        Some(verify) => record_verification(transaction, report, verify),
        None => record_repair(transaction, report),
    }
}

/// Writes the conversation's new state. It is one statement, because most commits change nothing else. Returns whether
/// the conversation was forgotten after the claim.
fn update(
    transaction: &Transaction<'_>,
    report: &Report,
    session: i64,
    now: Millis,
) -> Result<bool> {
    let Conversation {
        id,
        details,
        desired,
        observed,
        ..
    } = &report.conversation;
    let is_forgotten = transaction
        .prepare_cached(concat!(
            // Its START may have arrived meanwhile, or its details may have been read.
            "UPDATE conversations SET
                started_at = coalesce(started_at, :started_at),
                first_advisor = coalesce(:first_advisor, first_advisor),
                details = iif(:details = 'unread', details, :details),
                ended_at = :ended_at, transfer_at = :transfer_at, transfer_event = :transfer_event,
                transfer_advisor = :transfer_advisor, external_id = :external_id, chat_id = :chat_id,
                chat_started_at = :chat_started_at, chat_ended_at = :chat_ended_at, chat_agent = :chat_agent,
                chat_advisor = :chat_advisor,
                stale_seq = stale_seq + :becomes_stale,
                fresh_seq = iif(:is_fresh, :stale_seq, fresh_seq),
                verified_losses = iif(:is_fresh, :losses, verified_losses),
                read_in_session = iif(:is_read, :session, read_in_session),
                offset = :offset,
                waiting = max(waiting - :settled, 0),
                waiting_since = iif(waiting > :settled, (", waiting_since!(":offset"), "), NULL),
                -- A verification may end at any time. It neither hastens nor delays the next attempt of an event.
                due_at = CASE
                    WHEN NOT :is_verification THEN coalesce(:due_at, iif(waiting > :settled, :now, NULL))
                    WHEN waiting > :settled THEN due_at
                    ELSE coalesce(max(:due_at, due_at), :due_at, due_at)
                END
             WHERE id = :id RETURNING forgotten_at IS NOT NULL"
        ))?
        .query_row(named_params! {
                ":id": id,
                ":started_at": desired.started_at,
                ":first_advisor": desired.first_advisor,
                ":details": details,
                ":ended_at": desired.ended_at,
                ":transfer_at": desired.transfer.map(|transfer| transfer.at),
                ":transfer_event": desired.transfer.map(|transfer| transfer.event),
                ":transfer_advisor": desired.transfer.map(|transfer| transfer.advisor),
                ":external_id": observed.external_id,
                ":chat_id": observed.chat.map(|id| id.to_string()),
                ":chat_started_at": observed.started_at,
                ":chat_ended_at": observed.ended_at,
                ":chat_agent": observed.agent.map(|id| id.to_string()),
                ":chat_advisor": observed.advisor,
                ":becomes_stale": report.becomes_stale,
                ":is_fresh": report.observation.is_fresh(),
                ":is_read": report.observation.is_read(),
                ":stale_seq": report.claim.stale_seq,
                ":losses": report.claim.losses,
                ":session": session,
                ":offset": report.advance.offset,
                ":settled": report.advance.settled,
                ":due_at": report.due_at(now),
                ":now": now,
                ":is_verification": report.verify.is_some(),
            }, |row| row.get(0))
        .optional()?;
    present(is_forgotten, || format!("no conversation {}", id.0))
}

/// Records in which pass the chat was last verified, and the differences that were not repaired. Most commits change
/// none of this, and then no index is updated.
fn update_verification(transaction: &Transaction<'_>, report: &Report) -> Result<()> {
    let Report {
        conversation,
        claim,
        verify,
        found,
        drift,
        missing,
        ..
    } = report;
    let observed = &conversation.observed;
    let pass = verify
        .filter(|verify| verify.is_idle && found.is_some())
        .map(|verify| verify.verification);
    let is_new = observed.chat.is_some() && !claim.is_in_passes;
    if pass.is_none() && !is_new && drift.is_none() && missing.is_none() && claim.drift.is_empty() {
        return Ok(());
    }
    transaction
        .prepare_cached(
            // A new chat counts as verified, unless something was delivered to an earlier chat of the conversation. A
            // chat of which no event is stored is not verified again, so nothing would end a difference.
            "UPDATE conversations SET
                verified_in = CASE
                    WHEN verified_in IS NOT NULL THEN coalesce(:pass, verified_in)
                    WHEN :is_new AND has_events THEN iif(:claimed_offset = 0,
                        coalesce((SELECT id FROM verifications WHERE idle), 0), 0)
                END,
                drift = CASE
                    WHEN :drift IS NOT NULL THEN iif(has_events, nullif(:drift, ''), NULL)
                    WHEN chat_agent IS NOT :chat_agent THEN NULL
                    ELSE drift
                END,
                missing = iif(:missing IS NOT NULL, iif(has_events, nullif(:missing, ''), NULL), missing)
             FROM (SELECT EXISTS (SELECT 1 FROM events WHERE conversation = :id) AS has_events)
             WHERE id = :id",
        )?
        .execute(named_params! {
            ":id": conversation.id,
            ":pass": pass,
            ":is_new": is_new,
            ":claimed_offset": claim.offset,
            ":drift": drift.map(|drift| drift.to_string()),
            ":chat_agent": observed.agent.map(|id| id.to_string()),
            ":missing": missing.map(|missing| missing.to_string()),
        })?;
    Ok(())
}

fn commit_outcome(
    transaction: &Transaction<'_>,
    conversation: ConversationId,
    offset: EventId,
    outcome: &EventOutcome,
    counts: &mut Counts,
    now: Millis,
) -> Result<()> {
    let EventOutcome {
        event,
        kind,
        redelivery,
        ..
    } = *outcome;
    let record = |attempts, next_at, failure| {
        record_attempt(
            transaction,
            conversation,
            event,
            attempts,
            next_at,
            failure,
            now,
        )
    };
    match &outcome.outcome {
        Outcome::Retry {
            attempts,
            next_at,
            failure,
        } => record(attempts, Some(*next_at), failure)?,
        Outcome::DeadLetter {
            attempts,
            failure,
            permanent,
        } => {
            record(attempts, None, failure)?;
            transaction
                .prepare_cached(
                    "INSERT OR IGNORE INTO dead_letters (event, conversation, failed_at, permanent)
                     SELECT id, conversation, ?2, ?3 FROM events WHERE id = ?1",
                )?
                .execute(params![event, now, permanent])?;
            counts.of(Some(kind)).failed += 1;
        }
        Outcome::Delivered(_) => {
            if outcome.had_failed {
                transaction
                    .prepare_cached(
                        // A change delivered ahead of the offset counts as waiting until the offset passes it. If the
                        // event is lost and sent again, its earlier failures do not count.
                        "UPDATE attempts SET next_at = NULL, counted = 0, writes_then = NULL, outcome_unknown = 0,
                            retried_at = iif(?2, NULL, retried_at)
                         WHERE event = ?1",
                    )?
                    .execute(params![event, redelivery || event <= offset])?;
            }
            if outcome.counts(offset) {
                counts.of(Some(kind)).delivered += 1;
            }
        }
    }
    if redelivery && !matches!(outcome.outcome, Outcome::Retry { .. }) {
        transaction
            .prepare_cached("DELETE FROM redeliveries WHERE conversation = ?1 AND event = ?2")?
            .execute(params![conversation, event])?;
    }
    Ok(())
}

/// Records a failure, unless the event was deleted by hand: such an event must not stop the commit of the others.
fn record_attempt(
    transaction: &Transaction<'_>,
    conversation: ConversationId,
    event: EventId,
    attempts: &Attempts,
    next_at: Option<Millis>,
    failure: &Failure,
    now: Millis,
) -> Result<()> {
    let Failure {
        reason,
        request,
        response,
    } = failure;
    let recorded = transaction
        .prepare_cached(
            "INSERT INTO attempts (event, conversation, attempts, counted, next_at, writes_then, outcome_unknown, reason,
                request, response)
             SELECT id, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10 FROM events WHERE id = ?1
             ON CONFLICT (event) DO UPDATE SET attempts = excluded.attempts, counted = excluded.counted,
                next_at = excluded.next_at, writes_then = excluded.writes_then,
                outcome_unknown = excluded.outcome_unknown, reason = excluded.reason, request = excluded.request,
                response = excluded.response, retried_at = iif(excluded.next_at IS NULL, NULL, retried_at)",
        )?
        .execute(params![
            event,
            conversation,
            attempts.failed,
            attempts.counted,
            next_at,
            attempts.writes_then,
            attempts.outcome_unknown,
            reason,
            request,
            response,
        ])?;
    if recorded == 0 {
        return Ok(());
    }
    transaction
        .prepare_cached(
            "INSERT OR IGNORE INTO failures (event, attempt, failed_at, reason, request, response)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?
        .execute(params![
            event,
            attempts.failed,
            now,
            reason,
            request,
            response
        ])?;
    transaction
        .prepare_cached("DELETE FROM failures WHERE event = ?1 AND attempt <= ?2 - ?3")?
        .execute(params![event, attempts.failed, FAILURES_STORED])?;
    Ok(())
}

fn consume(
    transaction: &Transaction<'_>,
    conversation: ConversationId,
    key: &MessageKey,
) -> Result<()> {
    let key = params![conversation, key.sent_at, key.text];
    transaction
        .prepare_cached(
            "UPDATE credits SET count = count - 1 WHERE conversation = ?1 AND sent_at = ?2 AND text = ?3",
        )?
        .execute(key)?;
    transaction
        .prepare_cached(
            "DELETE FROM credits WHERE conversation = ?1 AND sent_at = ?2 AND text = ?3 AND count < 1",
        )?
        .execute(key)?;
    Ok(())
}

/// Records that the chat's messages were read. Missing ones wait again.
fn read(transaction: &Transaction<'_>, report: &Report, accounting: &Accounting) -> Result<()> {
    let Accounting {
        missing,
        credits,
        credited,
    } = accounting;
    let id = report.conversation.id;
    transaction
        .prepare_cached("DELETE FROM credits WHERE conversation = ?1")?
        .execute([id])?;
    for (MessageKey { sent_at, text }, count) in credits {
        transaction
            .prepare_cached(
                "INSERT INTO credits (conversation, sent_at, text, count, as_of) VALUES (?1, ?2, ?3, ?4, ?5)",
            )?
            .execute(params![id, sent_at, text, count, report.claim.last_event])?;
    }
    // The outcome of the waiting events is known now. Only those with a credit remain recorded as unknown until the
    // credit is used. If the chat has become stale again meanwhile, for example by a retry, nothing is changed.
    let credited: Vec<String> = credited.iter().map(|event| event.0.to_string()).collect();
    transaction
        .prepare_cached(
            "UPDATE attempts SET outcome_unknown = 0 WHERE conversation = ?1 AND outcome_unknown
                AND NOT EXISTS (SELECT 1 FROM dead_letters d WHERE d.event = attempts.event)
                AND NOT EXISTS (SELECT 1 FROM conversations WHERE id = ?1 AND stale_seq > ?2)
                AND event NOT IN (SELECT value FROM json_each(?3))",
        )?
        .execute(params![
            id,
            report.claim.stale_seq,
            format!("[{}]", credited.join(","))
        ])?;
    let mut again = 0;
    for event in missing {
        again += transaction
            .prepare_cached(
                "INSERT OR IGNORE INTO redeliveries (conversation, event, restored)
                 SELECT conversation, id, 1 FROM events WHERE id = ?1",
            )?
            .execute([event])?;
    }
    if again > 0 {
        transaction.execute(
            "UPDATE conversations SET waiting = waiting + ?2 WHERE id = ?1",
            params![id, limit(again)],
        )?;
    }
    Ok(())
}

/// Records that the chat is gone. Its external id and start time stay recorded, so that it is created again with the
/// same ones. Unknown outcomes of messages stay unknown until then, because the chat is found again if the loss was
/// false.
fn gone(transaction: &Transaction<'_>, id: ConversationId, rebuild: bool) -> Result<()> {
    transaction.execute(
        "UPDATE conversations SET chat_id = NULL, chat_ended_at = NULL, chat_agent = NULL, chat_advisor = NULL,
            read_in_session = 0,
            verified_losses = (SELECT losses FROM control), verified_in = NULL, drift = NULL, missing = NULL
         WHERE id = ?1",
        [id],
    )?;
    transaction.execute("DELETE FROM credits WHERE conversation = ?1", [id])?;
    if rebuild {
        transaction.execute(
            "UPDATE conversations SET restored_through = max(restored_through, offset), offset = 0 WHERE id = ?1",
            [id],
        )?;
        transaction.execute("DELETE FROM redeliveries WHERE conversation = ?1", [id])?;
        transaction.execute("DELETE FROM deliveries WHERE conversation = ?1", [id])?;
    }
    Ok(())
}

/// Recounts the waiting events of a conversation.
fn recount(transaction: &Transaction<'_>, id: ConversationId) -> Result<()> {
    transaction
        .prepare_cached(concat!(
            "UPDATE conversations SET
                waiting = (SELECT count(*) FROM redeliveries WHERE conversation = ?1)
                    + (SELECT count(*) FROM events e WHERE e.conversation = ?1 AND e.id > conversations.offset
                        AND NOT EXISTS (SELECT 1 FROM dead_letters d WHERE d.event = e.id)),
                waiting_since = (",
            waiting_since!("conversations.offset"),
            ")
             WHERE id = ?1"
        ))?
        .execute([id])?;
    Ok(())
}
