//! Verifications, by command or in idle time: which chats are to be verified, the progress, and the findings. The
//! process that delivers does the work.
//!
//! A request by command is a set of chats. It ends when each of them is verified and, if that was requested, repaired
//! or given up, whether or not the command still runs. The pass in idle time is a number: a chat waits for it while the
//! number of the chat's latest pass is smaller. Its row stays, because its end decides when the next pass begins.

use std::collections::HashSet;
use std::time::Duration;

use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, params};

use super::directory::ask_again;
use super::queue::{ClaimRequest, Loading, load_chat};
use super::{JournalError, Result, Store, unsigned};
use crate::domain::ids::{ConversationId, VerificationId};
use crate::domain::progress::{
    Due, FieldDifference, IdlePass, NotRepaired, Outcome, Report, VerificationResult, Verify,
    VerifyMode, Work,
};
use crate::domain::time::Millis;

/// How long after it was made an ended request is dropped, if its command was interrupted and never withdrew it.
const DROPPED_AFTER: Duration = Duration::from_secs(24 * 3600);

/// The progress of a verification.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VerificationProgress {
    pub verified: u64,
    /// Chats that are still to be verified.
    pub left: u64,
    /// Chats that did not exist.
    pub missing: u64,
    /// Chats that existed, with other fields than they should have.
    pub differing: u64,
    /// Messages that were missing.
    pub messages: u64,
    /// Chats that are still being repaired.
    pub repairing: u64,
    /// Events of those chats that are still waiting to be sent again.
    pub waiting: u64,
    /// Chats that were not completely repaired.
    pub not_repaired: u64,
}

/// A chat that differs from its events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    pub external_id: String,
    /// `missing`, `differs`, `unreadable`; `same` if only messages were missing.
    pub state: String,
    /// How many messages were missing.
    pub messages: u32,
    /// The fields that differ.
    pub fields: Vec<FieldDifference>,
    /// Why it was not completely repaired.
    pub not_repaired: Option<NotRepaired>,
}

impl VerificationProgress {
    pub fn chats(&self) -> u64 {
        self.verified + self.left
    }

    /// Whether all chats are verified, and no repair is in progress.
    pub fn is_done(&self) -> bool {
        self.left == 0 && self.repairing == 0
    }
}

/// A pass in idle time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pass {
    pub(super) id: VerificationId,
    pub(super) began_at: Millis,
    pub(super) ended_at: Option<Millis>,
    /// How many chats were verified so far.
    pub(super) verified: u64,
}

impl Pass {
    /// Whether the next pass is to begin, early enough that it ends in time if it takes as long as this one.
    fn is_over(&self, every: Duration, now: Millis) -> bool {
        let Some(ended_at) = self.ended_at else {
            return false;
        };
        let next = self
            .began_at
            .plus(every.saturating_sub(ended_at.since(self.began_at)));
        // This machine's clock may have been set back.
        now >= ended_at.max(next) || now < self.began_at
    }
}

impl Store {
    /// Requests that chats be verified, and also repaired if `repair` is true: those of the conversations with this
    /// BigChat id, in any epoch, or else all that have events. Returns the request's id; `None`: there are no such
    /// chats.
    pub fn request_verification(
        &mut self,
        conversation: Option<i64>,
        repair: bool,
        now: Millis,
    ) -> Result<Option<VerificationId>> {
        let transaction = self.begin()?;
        drop_ended(&transaction, now)?;
        let verification = transaction.query_row(
            "INSERT INTO verifications (idle, requested_at, repair, last_event)
             VALUES (0, ?1, ?2, (SELECT coalesce(max(id), 0) FROM events)) RETURNING id",
            params![now, repair],
            |row| row.get(0),
        )?;
        let chats = transaction.execute(
            "INSERT INTO requested_chats (verification, conversation)
             SELECT ?1, id FROM conversations WHERE verified_in IS NOT NULL AND (?2 IS NULL OR bigchat_id = ?2)",
            params![verification, conversation],
        )?;
        if chats == 0 {
            return Ok(None);
        }
        if repair {
            ask_again(&transaction)?;
        }
        transaction.commit()?;
        Ok(Some(verification))
    }

    /// Withdraws a request that is done or whose command has ended.
    pub fn withdraw_verification(&mut self, verification: VerificationId) -> Result<()> {
        self.connection
            .execute("DELETE FROM verifications WHERE id = ?1", [verification])?;
        Ok(())
    }

    /// The progress of a verification.
    pub fn verification_progress(
        &mut self,
        verification: VerificationId,
    ) -> Result<VerificationProgress> {
        Ok(self
            .connection
            .prepare_cached(
                "SELECT v.verified, v.missing, v.differing, v.messages,
                    (SELECT count(*) FROM requested_chats WHERE state IS NULL AND verification = ?1),
                    count(c.id), coalesce(sum(c.waiting), 0),
                    (SELECT count(*) FROM requested_chats WHERE not_repaired IS NOT NULL AND verification = ?1)
                 FROM verifications v
                 LEFT JOIN requested_chats q ON q.verification = v.id AND q.repairing
                 LEFT JOIN conversations c ON c.id = q.conversation
                 WHERE v.id = ?1 GROUP BY v.id",
            )?
            .query_row([verification], |row| {
                Ok(VerificationProgress {
                    verified: unsigned(row, 0)?,
                    missing: unsigned(row, 1)?,
                    differing: unsigned(row, 2)?,
                    messages: unsigned(row, 3)?,
                    left: unsigned(row, 4)?,
                    repairing: unsigned(row, 5)?,
                    waiting: unsigned(row, 6)?,
                    not_repaired: unsigned(row, 7)?,
                })
            })?)
    }

    /// Whether an event of the conversation was delivered after `since`.
    pub fn was_delivered_since(
        &mut self,
        conversation: ConversationId,
        since: Millis,
    ) -> Result<bool> {
        Ok(self
            .connection
            .prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM deliveries WHERE conversation = ?1 AND delivered_at > ?2)",
            )?
            .query_row(params![conversation, since], |row| row.get(0))?)
    }

    /// The chats that differ from their events, in order of arrival.
    pub fn differences(
        &mut self,
        verification: VerificationId,
        at_most: u32,
    ) -> Result<Vec<Difference>> {
        let mut statement = self.connection.prepare_cached(
            "SELECT c.external_id, q.state, q.messages, q.fields, q.not_repaired
             FROM requested_chats q JOIN conversations c ON c.id = q.conversation
             WHERE q.verification = ?1 AND (q.state <> 'same' OR q.messages > 0) ORDER BY q.conversation LIMIT ?2",
        )?;
        let differences = statement.query_map(params![verification, at_most], |row| {
            Ok(Difference {
                external_id: row.get::<_, Option<String>>(0)?.unwrap_or_default(),
                state: row.get(1)?,
                messages: row.get(2)?,
                fields: serde_json::from_str(row.get_ref(3)?.as_str()?).map_err(|error| {
                    rusqlite::Error::FromSqlConversionFailure(3, Type::Text, error.into())
                })?,
                not_repaired: row.get(4)?,
            })
        })?;
        Ok(differences.collect::<rusqlite::Result<_>>()?)
    }

    /// Claims the next chat of the pass in idle time; `None`: none is due. Begins the pass when it is time, and ends it
    /// when no chat without waiting events is left.
    pub(super) fn claim_idle(
        &mut self,
        idle: IdlePass,
        exclude: &HashSet<ConversationId>,
        loading: Loading,
        now: Millis,
    ) -> Result<Option<Work>> {
        let pass = match latest_pass(&self.connection)? {
            Some(pass) if !pass.is_over(idle.every, now) => pass,
            latest => self.begin_pass(latest.is_none(), now)?,
        };
        if pass.ended_at.is_some() {
            return Ok(None);
        }
        let verify = Verify {
            verification: pass.id,
            mode: idle.mode,
            is_idle: true,
        };
        while let Some(id) = next_of_pass(&self.connection, pass.id, exclude, now)? {
            let work = to_verify(&self.connection, id, verify, loading)?;
            if work.is_some() {
                return Ok(work);
            }
            // Otherwise this chat would be the next one again.
            self.connection.execute(
                "UPDATE conversations SET verified_in = ?2 WHERE id = ?1",
                params![id, pass.id],
            )?;
        }
        // Chats with waiting events do not keep the pass open: delivery notices if such a chat is lost, and the next
        // pass verifies it.
        let is_left: bool = self
            .connection
            .prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM conversations WHERE verified_in < ?1 AND waiting = 0)",
            )?
            .query_row([pass.id], |row| row.get(0))?;
        if !is_left {
            self.end_pass(&pass, now)?;
        }
        Ok(None)
    }

    /// Begins a pass. The very first one verifies nothing: the period in which each chat is verified begins with it.
    fn begin_pass(&mut self, is_first: bool, now: Millis) -> Result<Pass> {
        let transaction = self.begin()?;
        transaction.execute("DELETE FROM verifications WHERE idle", [])?;
        drop_ended(&transaction, now)?;
        ask_again(&transaction)?;
        let ended_at = is_first.then_some(now);
        let id = transaction.query_row(
            "INSERT INTO verifications (idle, requested_at, ended_at, repair, last_event)
             VALUES (1, ?1, ?2, 0, (SELECT coalesce(max(id), 0) FROM events)) RETURNING id",
            params![now, ended_at],
            |row| row.get(0),
        )?;
        transaction.commit()?;
        Ok(Pass {
            id,
            began_at: now,
            ended_at,
            verified: 0,
        })
    }

    fn end_pass(&mut self, pass: &Pass, now: Millis) -> Result<()> {
        let found: (i64, i64, i64, i64) = self.connection.query_row(
            "UPDATE verifications SET ended_at = ?2 WHERE id = ?1 RETURNING verified, missing, differing, messages",
            params![pass.id, now],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)),
        )?;
        let (chats, missing, differing, messages) = found;
        if chats > 0 {
            tracing::info!(
                chats,
                missing,
                differing,
                messages_missing = messages,
                seconds = now.since(pass.began_at).as_secs(),
                "a verification pass has ended"
            );
        }
        Ok(())
    }
}

pub(super) fn latest_pass(connection: &Connection) -> Result<Option<Pass>> {
    Ok(connection
        .prepare_cached(
            "SELECT id, requested_at, ended_at, verified FROM verifications WHERE idle",
        )?
        .query_row([], |row| {
            Ok(Pass {
                id: row.get(0)?,
                began_at: row.get(1)?,
                ended_at: row.get(2)?,
                verified: unsigned(row, 3)?,
            })
        })
        .optional()?)
}

/// Drops old requests of which nothing is left to do.
fn drop_ended(connection: &Connection, now: Millis) -> Result<()> {
    connection.execute(
        "DELETE FROM verifications WHERE NOT idle AND requested_at < ?1 AND NOT EXISTS (
            SELECT 1 FROM requested_chats WHERE verification = verifications.id AND (state IS NULL OR repairing))",
        [now.minus(DROPPED_AFTER)],
    )?;
    Ok(())
}

/// The next chat that waits for a pass. A chat that could not be read is due later, so that others go first.
fn next_of_pass(
    connection: &Connection,
    pass: VerificationId,
    exclude: &HashSet<ConversationId>,
    now: Millis,
) -> Result<Option<ConversationId>> {
    let mut statement = connection.prepare_cached(
        "SELECT id FROM conversations WHERE verified_in < ?1 AND (due_at IS NULL OR due_at <= ?2)
         ORDER BY verified_in, id",
    )?;
    let mut ids = statement.query_map(params![pass, now], |row| row.get(0))?;
    let free = ids.find(|id| id.as_ref().map_or(true, |id| !exclude.contains(id)));
    Ok(free.transpose()?)
}

/// Adds the chats that `verify` has requested to the claimed work. Waiting events of their conversations continue to
/// wait. Returns the conversations that cannot be loaded.
pub(super) fn claim_requested(
    connection: &Connection,
    request: &ClaimRequest,
    loading: Loading,
    now: Millis,
    claimed: &mut Vec<Work>,
) -> Result<Vec<ConversationId>> {
    let mut exclude: HashSet<ConversationId> =
        claimed.iter().map(|work| work.conversation.id).collect();
    let mut unverifiable = Vec::new();
    // If a write of unknown outcome may still be carried out, the chat is not repaired: what is read might lack the
    // result of that write, and would count as the truth.
    let mut statement = connection.prepare_cached(
        "SELECT q.conversation, q.verification,
            v.repair AND NOT (c.stale_seq > c.fresh_seq AND c.due_at IS NOT NULL AND c.due_at > ?1)
         FROM requested_chats q JOIN verifications v ON v.id = q.verification JOIN conversations c ON c.id = q.conversation
         WHERE q.state IS NULL AND q.next_at <= ?1 ORDER BY q.next_at, q.verification, q.conversation",
    )?;
    let mut rows = statement.query([now])?;
    while claimed.len() < request.conversations
        && let Some(row) = rows.next()?
    {
        let id = row.get(0)?;
        if request.exclude.contains(&id) || !exclude.insert(id) {
            continue;
        }
        let verify = Verify {
            verification: row.get(1)?,
            mode: match row.get(2)? {
                true => VerifyMode::Overwrite,
                false => VerifyMode::Report,
            },
            is_idle: false,
        };
        match to_verify(connection, id, verify, loading)? {
            Some(work) => claimed.push(work),
            None => unverifiable.push(id),
        }
    }
    Ok(unverifiable)
}

fn to_verify(
    connection: &Connection,
    id: ConversationId,
    verify: Verify,
    loading: Loading,
) -> Result<Option<Work>> {
    match load_chat(connection, id, loading) {
        Ok(chat) => Ok(Some(Work {
            verify: Some(verify),
            ..chat
        })),
        Err(JournalError::InvalidRow(what)) => {
            tracing::error!(row = id.0, reason = %what, "invalid row in the database; its chat cannot be verified");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Records, in every request for the conversation, that it cannot be loaded.
pub(super) fn set_unreadable(connection: &Connection, conversation: ConversationId) -> Result<()> {
    connection.execute(
        "UPDATE verifications SET verified = verified + 1
         WHERE id IN (SELECT verification FROM requested_chats WHERE conversation = ?1 AND state IS NULL)",
        [conversation],
    )?;
    connection.execute(
        "UPDATE requested_chats SET state = coalesce(state, 'unreadable'), repairing = 0,
            not_repaired = iif((SELECT repair FROM verifications WHERE id = verification), ?2, NULL)
         WHERE conversation = ?1 AND (state IS NULL OR repairing)",
        params![conversation, NotRepaired::Unreadable],
    )?;
    Ok(())
}

/// Records the result of a verification.
pub(super) fn record_verification(
    connection: &Connection,
    report: &Report,
    verify: Verify,
) -> Result<()> {
    let conversation = report.conversation.id;
    let Some(found) = &report.found else {
        if let Due::At(at) = report.due
            && !verify.is_idle
        {
            connection
                .prepare_cached("UPDATE requested_chats SET next_at = ?3 WHERE conversation = ?1 AND verification = ?2")?
                .execute(params![conversation, verify.verification, at])?;
        }
        return Ok(());
    };
    let state = found.state();
    // A withdrawn request no longer has a row.
    connection
        .prepare_cached(
            "UPDATE verifications SET verified = verified + 1, missing = missing + (?2 = 'missing'),
                differing = differing + (?2 = 'differs'), messages = messages + ?3
             WHERE id = ?1 AND ended_at IS NULL",
        )?
        .execute(params![verify.verification, state, found.missing.messages])?;
    if verify.is_idle {
        return Ok(());
    }
    let differs = *found != VerificationResult::default();
    let is_repaired = verify.mode == VerifyMode::Overwrite;
    let not_repaired = if found.is_unreadable {
        Some(NotRepaired::Unreadable)
    } else if differs && !is_repaired {
        Some(NotRepaired::Waiting)
    } else {
        (!found.kept.is_empty()).then_some(NotRepaired::Kept)
    };
    let fields = serde_json::to_string(&found.fields)
        .map_err(|error| JournalError::InvalidRow(error.to_string()))?;
    connection
        .prepare_cached(
            "UPDATE requested_chats SET state = ?3, messages = ?4, fields = ?5, repairing = ?6,
                not_repaired = iif((SELECT repair FROM verifications WHERE id = ?2), ?7, NULL)
             WHERE conversation = ?1 AND verification = ?2",
        )?
        .execute(params![
            conversation,
            verify.verification,
            state,
            found.missing.messages,
            fields,
            is_repaired && !found.is_unreadable && (differs || report.conversation.lacks_agent()),
            not_repaired,
        ])?;
    Ok(())
}

/// Records how far a delivery has repaired the chat, if a request waits for that. A repair ends when everything is sent
/// and nothing has failed, or when the failure of an event that is not part of the repair holds it back.
pub(super) fn record_repair(connection: &Connection, report: &Report) -> Result<()> {
    let conversation = report.conversation.id;
    let is_repairing = connection
        .prepare_cached("SELECT 1 FROM requested_chats WHERE conversation = ?1 AND repairing")?
        .exists([conversation])?;
    if !is_repairing {
        return Ok(());
    }
    let is_restored_dead = report
        .outcomes
        .iter()
        .any(|of| of.restored && matches!(of.outcome, Outcome::DeadLetter { .. }));
    if is_restored_dead {
        connection.execute(
            "UPDATE requested_chats SET not_repaired = ?2
             WHERE conversation = ?1 AND repairing AND (state <> 'same' OR messages > 0)",
            params![conversation, NotRepaired::DeadLetter],
        )?;
    }
    if report.is_due_again() {
        return Ok(());
    }
    let is_held_back = report
        .outcomes
        .iter()
        .any(|of| !of.restored && matches!(of.outcome, Outcome::Retry { .. }));
    let not_repaired = if is_held_back {
        NotRepaired::Waiting
    } else {
        NotRepaired::Rejected
    };
    connection.execute(
        "UPDATE requested_chats SET repairing = 0,
            not_repaired = iif(is_sent AND ?2 OR state = 'same' AND messages = 0,
                not_repaired, coalesce(not_repaired, ?5))
         FROM (SELECT v.id,
                NOT EXISTS (SELECT 1 FROM redeliveries WHERE conversation = ?1 AND restored)
                AND NOT EXISTS (SELECT 1 FROM events e WHERE e.conversation = ?1 AND e.id > c.offset
                    AND e.id <= min(c.restored_through, v.last_event)) AS is_sent
            FROM verifications v JOIN conversations c ON c.id = ?1) r
         WHERE r.id = verification AND conversation = ?1 AND repairing AND (?3 OR is_sent AND ?4)",
        params![
            conversation,
            report.conversation.is_written(),
            is_held_back,
            report.due == Due::IfWaiting,
            not_repaired
        ],
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_pass_ends_in_time() {
        let every = Duration::from_secs(100);
        let pass = |began: i64, ended: Option<i64>| Pass {
            id: VerificationId(1),
            began_at: Millis(began * 1000),
            ended_at: ended.map(|at| Millis(at * 1000)),
            verified: 0,
        };
        for (began, ended, next) in [
            (1000, 1000, 1100),
            (1000, 1010, 1090),
            (1000, 1080, 1080),
            (1000, 1500, 1500),
        ] {
            let is_over = |at: i64| pass(began, Some(ended)).is_over(every, Millis(at * 1000));
            assert!(is_over(next), "{began} to {ended}");
            assert!(next == ended || !is_over(next - 1), "{began} to {ended}");
        }
        assert!(
            !pass(1000, None).is_over(every, Millis(9_000_000)),
            "in progress"
        );
        assert!(
            pass(1000, Some(1001)).is_over(every, Millis(900_000)),
            "set back"
        );
    }
}
