//! Verifications, by command or in idle time: which chats are to be verified, the progress, and the findings. The
//! process that delivers does the work.
//!
//! A request is a row with a number. A chat waits for the request while the number of the chat's latest verification is
//! smaller, so the cost of a request does not grow with the number of chats. The pass in idle time is such a request,
//! with the lowest priority. Its row stays, because its end decides when the next pass begins.

use std::collections::HashSet;
use std::time::Duration;

use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, params};

use super::directory::ask_again;
use super::queue::{ClaimRequest, Loading, load_chat};
use super::{JournalError, Result, Store, count, limit, unsigned};
use crate::domain::ids::{ConversationId, VerificationId};
use crate::domain::progress::{
    Claim, FieldDifference, IdlePass, VerificationResult, Verify, VerifyMode, Work,
};
use crate::domain::time::Millis;

/// When a request that was never withdrawn is dropped.
const DROPPED_AFTER: Duration = Duration::from_secs(30 * 24 * 3600);

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
    /// Events of the differing chats that are still waiting to be sent again.
    pub waiting: u64,
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
}

impl VerificationProgress {
    pub fn chats(&self) -> u64 {
        self.verified + self.left
    }

    /// Whether all chats are verified, and all missing data was sent.
    pub fn is_done(&self) -> bool {
        self.left == 0 && self.waiting == 0
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
        // The command withdraws its request at the end, unless it is interrupted.
        transaction.execute(
            "DELETE FROM verifications WHERE NOT idle AND requested_at < ?1 AND NOT EXISTS (
                SELECT 1 FROM conversations WHERE verified_in < verifications.id)",
            [now.minus(DROPPED_AFTER)],
        )?;
        let verification = transaction.query_row(
            "INSERT INTO verifications (idle, requested_at, conversation, repair, last_event)
             VALUES (0, ?1, ?2, ?3, (SELECT coalesce(max(id), 0) FROM events)) RETURNING id",
            params![now, conversation, repair],
            |row| row.get(0),
        )?;
        if left(&transaction, verification, conversation)? == 0 {
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
        let transaction = self.connection.transaction()?;
        let (conversation, progress) = transaction
            .prepare_cached(
                "SELECT conversation, verified, missing, differing, messages,
                    (SELECT coalesce(sum(c.waiting), 0)
                        FROM findings f JOIN conversations c ON c.id = f.conversation
                        WHERE f.verification = r.id AND r.repair AND (c.offset < min(c.restored_through, r.last_event)
                            OR EXISTS (SELECT 1 FROM redeliveries WHERE conversation = c.id)))
                 FROM verifications r WHERE id = ?1",
            )?
            .query_row([verification], |row| {
                let progress = VerificationProgress {
                    verified: unsigned(row, 1)?,
                    left: 0,
                    missing: unsigned(row, 2)?,
                    differing: unsigned(row, 3)?,
                    messages: unsigned(row, 4)?,
                    waiting: unsigned(row, 5)?,
                };
                Ok((row.get::<_, Option<i64>>(0)?, progress))
            })?;
        Ok(VerificationProgress {
            left: left(&transaction, verification, conversation)?,
            ..progress
        })
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
            "SELECT c.external_id, f.state, f.messages, f.fields FROM findings f JOIN conversations c ON c.id = f.conversation
             WHERE f.verification = ?1 ORDER BY c.id LIMIT ?2",
        )?;
        let differences = statement.query_map(params![verification, at_most], |row| {
            Ok(Difference {
                external_id: row.get::<_, Option<String>>(0)?.unwrap_or_default(),
                state: row.get(1)?,
                messages: row.get(2)?,
                fields: serde_json::from_str(row.get_ref(3)?.as_str()?).map_err(|error| {
                    rusqlite::Error::FromSqlConversionFailure(3, Type::Text, error.into())
                })?,
            })
        })?;
        Ok(differences.collect::<rusqlite::Result<_>>()?)
    }

    /// Claims the next chat of the pass in idle time; `None`: none is due. Begins the pass when it is time, and ends it
    /// when all chats are verified.
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
        let loading = Loading {
            verifications: loading.verifications.max(pass.id),
            ..loading
        };
        let pending = pending(&self.connection, pass.id, None, exclude, 1, now)?;
        if let Some(id) = pending.into_iter().next() {
            let verify = Verify {
                mode: idle.mode,
                is_idle: true,
            };
            return to_verify(&self.connection, id, verify, loading);
        }
        let is_left: bool = self
            .connection
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM conversations WHERE verified_in < ?1)")?
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
                "all chats are verified"
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

/// How many chats are still to be verified.
pub(super) fn left(
    connection: &Connection,
    verification: VerificationId,
    conversation: Option<i64>,
) -> Result<u64> {
    Ok(connection
        .prepare_cached(&format!("SELECT count(*) {}", unverified(conversation)))?
        .query_row(params![verification, conversation], count)?)
}

/// SQL for the chats that wait for verification `?1`: all of them, or only those of conversation `?2`. Uses the index
/// for either case.
fn unverified(conversation: Option<i64>) -> &'static str {
    match conversation {
        None => "FROM conversations WHERE verified_in < ?1 AND ?2 IS NULL",
        Some(_) => "FROM conversations WHERE +verified_in < ?1 AND bigchat_id = ?2",
    }
}

/// The next chats that wait for a verification.
fn pending(
    connection: &Connection,
    verification: VerificationId,
    conversation: Option<i64>,
    exclude: &HashSet<ConversationId>,
    at_most: usize,
    now: Millis,
) -> Result<Vec<ConversationId>> {
    // A chat that could not be read is due later, so that others go first.
    let sql = format!(
        "SELECT id {} AND (due_at IS NULL OR due_at <= ?3) ORDER BY verified_in, id LIMIT ?4",
        unverified(conversation)
    );
    let enough = limit(at_most.saturating_add(exclude.len()));
    let mut pending: Vec<ConversationId> = connection
        .prepare_cached(&sql)?
        .query_map(params![verification, conversation, now, enough], |row| {
            row.get(0)
        })?
        .collect::<rusqlite::Result<_>>()?;
    pending.retain(|id| !exclude.contains(id));
    pending.truncate(at_most);
    Ok(pending)
}

/// Adds the chats that `verify` has requested to the claimed work. Waiting events of their conversations continue to
/// wait.
pub(super) fn claim_verifications(
    connection: &Connection,
    request: &ClaimRequest,
    loading: Loading,
    now: Millis,
    claimed: &mut Vec<Work>,
) -> Result<()> {
    let requests: Vec<(VerificationId, Option<i64>)> = connection
        .prepare_cached("SELECT id, conversation FROM verifications WHERE NOT idle ORDER BY id")?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    if requests.is_empty() {
        return Ok(());
    }
    let mut exclude = request.exclude.clone();
    exclude.extend(claimed.iter().map(|work| work.conversation.id));
    for (verification, conversation) in requests {
        let free = request.conversations.saturating_sub(claimed.len());
        if free == 0 {
            break;
        }
        for id in pending(connection, verification, conversation, &exclude, free, now)? {
            exclude.insert(id);
            // A chat with several requests is verified once for all of them.
            let repair: bool = connection
                .prepare_cached(
                    "SELECT max(r.repair) FROM verifications r JOIN conversations c ON c.id = ?1
                     WHERE NOT r.idle AND r.id > c.verified_in
                        AND (r.conversation IS NULL OR r.conversation = c.bigchat_id)",
                )?
                .query_row([id], |row| row.get(0))?;
            let verify = Verify {
                mode: match repair {
                    true => VerifyMode::Overwrite,
                    false => VerifyMode::Report,
                },
                is_idle: false,
            };
            claimed.extend(to_verify(connection, id, verify, loading)?);
        }
    }
    Ok(())
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

/// Records the result of a verification for all requests made before the claim.
pub(super) fn record_finding(
    connection: &Connection,
    conversation: ConversationId,
    claim: &Claim,
    found: &VerificationResult,
) -> Result<()> {
    let fields = serde_json::to_string(&found.fields)
        .map_err(|error| JournalError::InvalidRow(error.to_string()))?;
    let values = params![
        claim.verified_in.unwrap_or_default(),
        claim.verifications,
        conversation,
        found.state(),
        found.missing.messages,
        fields
    ];
    // A withdrawn request no longer has a row.
    connection
        .prepare_cached(
            "UPDATE verifications SET verified = verified + 1, missing = missing + (?4 = 'missing'),
                differing = differing + (?4 = 'differs'), messages = messages + ?5
             WHERE id > ?1 AND id <= ?2 AND ended_at IS NULL
                AND (conversation IS NULL OR conversation = (SELECT bigchat_id FROM conversations WHERE id = ?3))",
        )?
        .execute(&values[..5])?;
    if *found != VerificationResult::default() {
        connection
            .prepare_cached(
                "INSERT INTO findings (verification, conversation, state, messages, fields)
                 SELECT id, ?3, ?4, ?5, ?6 FROM verifications
                 WHERE id > ?1 AND id <= ?2 AND NOT idle
                    AND (conversation IS NULL OR conversation = (SELECT bigchat_id FROM conversations WHERE id = ?3))
                 -- A chat that was created again meanwhile is verified again.
                 ON CONFLICT DO UPDATE SET state = excluded.state, messages = excluded.messages, fields = excluded.fields",
            )?
            .execute(values)?;
    }
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
