//! What the `verify` command has requested, what was found, and how far it is. Whichever process delivers does the work.

use std::collections::HashSet;
use std::time::Duration;

use rusqlite::{Connection, params};

use super::queue::{Loading, load_chat};
use super::{JournalError, Result, Store, limit, present};
use crate::domain::ids::ConversationId;
use crate::domain::progress::{ChatState, VerificationResult, Verify, Work};
use crate::domain::time::Millis;
use crate::http::Api;

/// When a request that nobody waits for any more is dropped.
const DROPPED_AFTER: Duration = Duration::from_secs(30 * 24 * 3600);

/// Which conversations' chats to verify.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All that have one.
    All,
    /// Those of this BigChat id, in whichever epoch.
    Conversation(i64),
}

/// How far a verification is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VerificationProgress {
    /// How many chats are to be verified.
    pub chats: u64,
    pub verified: u64,
    /// Chats that did not exist.
    pub missing: u64,
    /// Chats that existed, with other fields than they should have.
    pub differing: u64,
    /// Messages that were missing.
    pub messages: u64,
    /// Events of the chats that differed that still wait to be sent again.
    pub waiting: u64,
}

/// A chat that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    pub external_id: String,
    pub finding: VerificationResult,
}

impl VerificationProgress {
    /// Whether all chats are verified and what was missing is sent.
    pub fn is_done(&self) -> bool {
        self.chats > 0 && self.verified == self.chats && self.waiting == 0
    }
}

impl Store {
    /// Why nothing is asked of OurAPI now, as far as whoever delivers has stored it.
    pub fn our_api_waits_for(&mut self, now: Millis) -> Result<Option<String>> {
        if let Some(pause) = self.pause()?.filter(|pause| pause.left(now).is_some()) {
            return Ok(Some(format!(
                "deliveries are {pause}; `bigchat-sync resume` ends the pause"
            )));
        }
        let status = self.api(Api::OurApi.name())?;
        if status.up == Some(false) {
            let since = status.since.unwrap_or_default();
            let problem = status.problem.unwrap_or_default();
            return Ok(Some(format!("OurAPI is down since {since}: {problem}")));
        }
        let until: Option<i64> = self
            .connection
            .prepare_cached("SELECT our_api_retry_after FROM control")?
            .query_row([], |row| row.get(0))?;
        let until = Millis(until.unwrap_or_default());
        Ok((now < until).then(|| format!("OurAPI is rate-limited until {until}")))
    }

    /// Requests that chats be compared with the journal, and repaired if so. Returns the request's id; `None`: there are no
    /// such chats.
    pub fn request_verification(
        &mut self,
        scope: Scope,
        repair: bool,
        now: Millis,
    ) -> Result<Option<i64>> {
        let transaction = self.begin()?;
        // The command withdraws its request at the end, unless it is interrupted.
        transaction.execute(
            "DELETE FROM verifications WHERE requested_at < ?1 AND NOT EXISTS (
                SELECT 1 FROM verified_chats WHERE verification = verifications.id AND chat IS NULL)",
            [now.minus(DROPPED_AFTER).0],
        )?;
        let verification: i64 = transaction.query_row(
            "INSERT INTO verifications (requested_at, repair, last_event)
             VALUES (?1, ?2, (SELECT coalesce(max(id), 0) FROM events)) RETURNING id",
            params![now.0, repair],
            |row| row.get(0),
        )?;
        let conversation = match scope {
            Scope::All => None,
            Scope::Conversation(id) => Some(id),
        };
        let chats = transaction.execute(
            "INSERT INTO verified_chats (verification, conversation)
             SELECT ?1, id FROM conversations WHERE chat_id IS NOT NULL AND forgotten_at IS NULL AND (?2 IS NULL OR bigchat_id = ?2)",
            params![verification, conversation],
        )?;
        if chats == 0 {
            return Ok(None);
        }
        transaction.commit()?;
        Ok(Some(verification))
    }

    /// Withdraws a request: it is done, or its command has ended.
    pub fn withdraw_verification(&mut self, verification: i64) -> Result<()> {
        self.connection
            .execute("DELETE FROM verifications WHERE id = ?1", [verification])?;
        Ok(())
    }

    /// How far a verification is.
    pub fn verification_progress(&mut self, verification: i64) -> Result<VerificationProgress> {
        let count = |row: &rusqlite::Row<'_>, index| {
            Ok::<_, rusqlite::Error>(u64::try_from(row.get::<_, i64>(index)?).unwrap_or_default())
        };
        Ok(self
            .connection
            .prepare_cached(
                "SELECT count(*), count(chat), count(*) FILTER (WHERE chat = 'missing'),
                count(*) FILTER (WHERE chat = 'differs'), coalesce(sum(messages), 0),
                (SELECT coalesce(sum(v.waiting), 0)
                    FROM verified_chats c JOIN verifications r ON r.id = c.verification
                    JOIN conversations v ON v.id = c.conversation
                    WHERE c.verification = ?1 AND r.repair AND (c.chat <> 'same' OR c.messages > 0)
                        AND (v.offset < min(v.restored_through, r.last_event)
                            OR EXISTS (SELECT 1 FROM redeliveries WHERE conversation = v.id)))
             FROM verified_chats WHERE verification = ?1",
            )?
            .query_row([verification], |row| {
                Ok(VerificationProgress {
                    chats: count(row, 0)?,
                    verified: count(row, 1)?,
                    missing: count(row, 2)?,
                    differing: count(row, 3)?,
                    messages: count(row, 4)?,
                    waiting: count(row, 5)?,
                })
            })?)
    }

    /// The chats that are not as they should be, in order of arrival.
    pub fn differences(&mut self, verification: i64, at_most: u32) -> Result<Vec<Difference>> {
        let mut statement = self.connection.prepare_cached(
            "SELECT v.external_id, c.chat, c.messages FROM verified_chats c JOIN conversations v ON v.id = c.conversation
             WHERE c.verification = ?1 AND (c.chat <> 'same' OR c.messages > 0) ORDER BY v.id LIMIT ?2",
        )?;
        let mut rows = statement.query(params![verification, at_most])?;
        let mut differences = Vec::new();
        while let Some(row) = rows.next()? {
            let chat: String = row.get(1)?;
            differences.push(Difference {
                external_id: row.get::<_, Option<String>>(0)?.unwrap_or_default(),
                finding: VerificationResult {
                    chat: present(chat_state(&chat), &chat)?,
                    messages: row.get(2)?,
                },
            });
        }
        Ok(differences)
    }
}

/// Claims chats to be verified. What waits of their conversations goes on waiting.
pub(super) fn claim_verifications(
    connection: &Connection,
    at_most: usize,
    exclude: &HashSet<ConversationId>,
    loading: Loading,
    now: Millis,
) -> Result<Vec<Work>> {
    let mut statement = connection.prepare_cached(
        "SELECT v.conversation, v.verification, r.repair
         FROM verified_chats v JOIN verifications r ON r.id = v.verification
         JOIN conversations c ON c.id = v.conversation
         WHERE v.chat IS NULL AND (c.due_at IS NULL OR c.due_at <= ?2)
         ORDER BY v.attempts, v.verification, v.conversation LIMIT ?1",
    )?;
    let enough = at_most.saturating_add(exclude.len());
    let pending: Vec<(ConversationId, Verify)> = statement
        .query_map([limit(enough), now.0], |row| {
            let verify = Verify {
                verification: row.get(1)?,
                repair: row.get(2)?,
            };
            Ok((row.get(0)?, verify))
        })?
        .collect::<rusqlite::Result<_>>()?;
    let mut claimed = HashSet::new();
    let mut work: Vec<Work> = Vec::new();
    for (id, verify) in pending {
        // Requested twice, it is done one after the other.
        if work.len() == at_most || exclude.contains(&id) || !claimed.insert(id) {
            continue;
        }
        match load_chat(connection, id, loading) {
            Ok(chat) => work.push(Work {
                verify: Some(verify),
                ..chat
            }),
            Err(JournalError::InvalidRow(what)) => {
                tracing::error!(row = id.0, reason = %what, "invalid row in the database; its chat cannot be verified");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(work)
}

/// Records what a verification found; `None`: it failed, and others go first.
pub(super) fn record_finding(
    connection: &Connection,
    conversation: ConversationId,
    verify: Verify,
    finding: Option<&VerificationResult>,
) -> Result<()> {
    match finding {
        None => connection
            .prepare_cached(
                "UPDATE verified_chats SET attempts = attempts + 1 WHERE verification = ?1 AND conversation = ?2",
            )?
            .execute(params![verify.verification, conversation])?,
        Some(finding) => connection
            .prepare_cached(
                "UPDATE verified_chats SET chat = ?3, messages = ?4 WHERE verification = ?1 AND conversation = ?2",
            )?
            .execute(params![
                verify.verification,
                conversation,
                match finding.chat {
                    ChatState::Same => "same",
                    ChatState::Differs => "differs",
                    ChatState::Missing => "missing",
                },
                finding.messages,
            ])?,
    };
    Ok(())
}

fn chat_state(name: &str) -> Option<ChatState> {
    Some(match name {
        "same" => ChatState::Same,
        "differs" => ChatState::Differs,
        "missing" => ChatState::Missing,
        _ => return None,
    })
}
