//! What is to be compared with OurAPI by hand, what came of it, and how far it is.

use std::time::Duration;

use rusqlite::{Connection, Transaction, params};

use super::chats::messages_of;
use super::claims::claim_chat;
use super::{JournalError, Result, Store, limit, written};
use crate::conversation::{ChatFound, Check, Finding, Work};
use crate::messages::{self, MessageKey};
use crate::time::Millis;

/// When what nobody waits for any more is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(30 * 24 * 3600);

/// Which conversations' chats to compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All that have one.
    All,
    /// Those of this id at BigChat, of whatever run.
    Conversation(i64),
}

/// How far it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RebuildProgress {
    /// How many chats are to be compared.
    pub chats: u64,
    /// How many were.
    pub compared: u64,
    /// How many of these were not there.
    pub missing: u64,
    /// How many were there and not as they should be.
    pub differing: u64,
    /// How many messages were missing.
    pub messages: u64,
    /// How many events of the chats that lacked something still wait.
    pub waiting: u64,
}

/// A chat that lacked something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lacking {
    /// Its external id.
    pub external_id: String,
    /// What it lacked.
    pub finding: Finding,
}

impl RebuildProgress {
    /// Whether all is compared, and what was missing sent.
    pub fn is_done(&self) -> bool {
        self.chats > 0 && self.compared == self.chats && self.waiting == 0
    }
}

impl Store {
    /// Asks for chats to be compared with the journal, and put right unless `dry_run`. Returns the request's id;
    /// `None`: there are no such chats.
    pub fn ask_rebuild(&mut self, scope: Scope, dry_run: bool, now: Millis) -> Result<Option<i64>> {
        let transaction = self.begin()?;
        // Who asked takes it back at the end, unless interrupted.
        transaction.execute(
            "DELETE FROM rebuilds WHERE asked_at < ?1 AND NOT EXISTS (
                SELECT 1 FROM checks WHERE rebuild = rebuilds.id AND chat IS NULL)",
            [now.minus(FORGOTTEN).0],
        )?;
        let rebuild: i64 = transaction.query_row(
            "INSERT INTO rebuilds (asked_at, dry_run, last_event)
             VALUES (?1, ?2, (SELECT coalesce(max(id), 0) FROM events)) RETURNING id",
            params![now.0, dry_run],
            |row| row.get(0),
        )?;
        let conversation = match scope {
            Scope::All => None,
            Scope::Conversation(id) => Some(id),
        };
        let chats = transaction.execute(
            "INSERT INTO checks (rebuild, conversation)
             SELECT ?1, id FROM conversations WHERE chat_id IS NOT NULL AND (?2 IS NULL OR bigchat_id = ?2)",
            params![rebuild, conversation],
        )?;
        if chats == 0 {
            return Ok(None);
        }
        transaction.commit()?;
        Ok(Some(rebuild))
    }

    /// Takes back what was asked for: it is done, or nobody waits for it any more.
    pub fn withdraw_rebuild(&mut self, rebuild: i64) -> Result<()> {
        self.connection
            .execute("DELETE FROM rebuilds WHERE id = ?1", [rebuild])?;
        Ok(())
    }

    /// How far it is.
    pub fn rebuild_progress(&mut self, rebuild: i64) -> Result<RebuildProgress> {
        let count = |row: &rusqlite::Row<'_>, index| {
            Ok::<_, rusqlite::Error>(u64::try_from(row.get::<_, i64>(index)?).unwrap_or_default())
        };
        Ok(self.connection.prepare_cached(
            "SELECT count(*), count(chat), count(*) FILTER (WHERE chat = 'missing'),
                count(*) FILTER (WHERE chat = 'differs'), coalesce(sum(messages), 0),
                (SELECT count(*) FROM checks c JOIN rebuilds r ON r.id = c.rebuild
                    JOIN events e ON e.conversation = c.conversation AND e.state = 'waiting' AND e.id <= r.last_event
                    WHERE c.rebuild = ?1 AND NOT r.dry_run AND (c.chat <> 'there' OR c.messages > 0))
             FROM checks WHERE rebuild = ?1",
        )?.query_row([rebuild], |row| {
            Ok(RebuildProgress {
                chats: count(row, 0)?,
                compared: count(row, 1)?,
                missing: count(row, 2)?,
                differing: count(row, 3)?,
                messages: count(row, 4)?,
                waiting: count(row, 5)?,
            })
        })?)
    }

    /// The chats that lacked something, by external id.
    pub fn lacking(&mut self, rebuild: i64, at_most: u32) -> Result<Vec<Lacking>> {
        let mut statement = self.connection.prepare_cached(
            "SELECT v.external_id, c.chat, c.messages FROM checks c JOIN conversations v ON v.id = c.conversation
             WHERE c.rebuild = ?1 AND (c.chat <> 'there' OR c.messages > 0) ORDER BY v.id LIMIT ?2",
        )?;
        let mut rows = statement.query(params![rebuild, at_most])?;
        let mut lacking = Vec::new();
        while let Some(row) = rows.next()? {
            let chat: String = row.get(1)?;
            lacking.push(Lacking {
                external_id: row.get::<_, Option<String>>(0)?.unwrap_or_default(),
                finding: Finding {
                    chat: written(chat_found(&chat), &chat)?,
                    messages: row.get(2)?,
                },
            });
        }
        Ok(lacking)
    }

    /// How many messages of a conversation are delivered and not among those held.
    pub fn count_lost(&mut self, conversation: i64, held: Vec<MessageKey>) -> Result<usize> {
        Ok(lost(&self.connection, conversation, held)?.len())
    }

    /// Has those messages of a conversation wait again that are delivered and not among those held. Returns how many.
    pub fn deliver_lost_again(
        &mut self,
        conversation: i64,
        held: Vec<MessageKey>,
    ) -> Result<usize> {
        let transaction = self.begin()?;
        let lost = lost(&transaction, conversation, held)?;
        for event in &lost {
            transaction
                .prepare_cached(
                    "UPDATE events SET state = 'waiting', settled_at = NULL WHERE id = ?1",
                )?
                .execute([event])?;
        }
        transaction.commit()?;
        Ok(lost.len())
    }
}

fn lost(connection: &Connection, conversation: i64, held: Vec<MessageKey>) -> Result<Vec<i64>> {
    let journal = messages_of(connection, conversation, 0)?;
    Ok(messages::lost(held, &journal))
}

/// Claims conversations that are to be compared and that nobody works on. What waits of them goes on waiting.
pub(super) fn claim_checks(
    transaction: &Transaction<'_>,
    at_most: usize,
    now: Millis,
) -> Result<Vec<Work>> {
    let mut statement = transaction.prepare_cached(
        "SELECT c.conversation, c.rebuild, r.dry_run
         FROM checks c JOIN rebuilds r ON r.id = c.rebuild JOIN conversations v ON v.id = c.conversation
         WHERE c.chat IS NULL AND v.claimed_through IS NULL
            AND (v.due_at IS NULL OR v.due_at <= ?2
                OR EXISTS (SELECT 1 FROM events e WHERE e.conversation = v.id AND e.state = 'waiting'))
         ORDER BY c.tries, c.rebuild, c.conversation LIMIT ?1",
    )?;
    let pending: Vec<(i64, Check)> = statement
        .query_map([limit(at_most), now.0], |row| {
            let check = Check {
                rebuild: row.get(1)?,
                dry_run: row.get(2)?,
            };
            Ok((row.get(0)?, check))
        })?
        .collect::<rusqlite::Result<_>>()?;
    let mut work: Vec<Work> = Vec::new();
    for (id, check) in pending {
        // Asked for twice, it is done one after the other.
        if work.iter().any(|work| work.conversation.id == id) {
            continue;
        }
        match claim_chat(transaction, id) {
            Ok(conversation) => work.push(Work {
                conversation,
                events: Vec::new(),
                check: Some(check),
            }),
            Err(JournalError::Corrupt(what)) => {
                tracing::error!(row = id, reason = %what, "the database holds what cannot be: not compared");
                transaction.execute("DELETE FROM checks WHERE conversation = ?1", [id])?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(work)
}

/// Notes what was found, or that nothing could be.
pub(super) fn note_finding(
    connection: &Connection,
    conversation: i64,
    check: Check,
    finding: Option<&Finding>,
) -> Result<()> {
    let Some(finding) = finding else {
        // The others first, then.
        connection
            .prepare_cached(
                "UPDATE checks SET tries = tries + 1 WHERE rebuild = ?1 AND conversation = ?2",
            )?
            .execute(params![check.rebuild, conversation])?;
        return Ok(());
    };
    connection
        .prepare_cached(
            "UPDATE checks SET chat = ?3, messages = ?4 WHERE rebuild = ?1 AND conversation = ?2",
        )?
        .execute(params![
            check.rebuild,
            conversation,
            match finding.chat {
                ChatFound::There => "there",
                ChatFound::Differs => "differs",
                ChatFound::Missing => "missing",
            },
            finding.messages,
        ])?;
    Ok(())
}

fn chat_found(name: &str) -> Option<ChatFound> {
    Some(match name {
        "there" => ChatFound::There,
        "differs" => ChatFound::Differs,
        "missing" => ChatFound::Missing,
        _ => return None,
    })
}
