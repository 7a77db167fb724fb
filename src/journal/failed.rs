//! The failed events: kept until somebody decides.

use rusqlite::{OptionalExtension, params};

use super::claims::due_now;
use super::{Result, Store};
use crate::time::{Millis, Timestamp};

/// A failed event, with all that is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailedEvent {
    /// Its id, by which it is retried or discarded.
    pub id: i64,
    /// BigChat's id of its conversation; `None`: it could not be understood.
    pub conversation: Option<i64>,
    /// OurAPI's id of the chat, if there is one.
    pub chat: Option<String>,
    /// START, END, MESSAGE, TRANSFER or UNREADABLE.
    pub name: String,
    /// When it happened, by BigChat's clock.
    pub at: Timestamp,
    /// Its data, as JSON; of one that could not be understood, all of it, raw.
    pub data: Option<String>,
    /// When it went to the failed events, by this machine's clock.
    pub failed_at: Millis,
    /// How often it was tried.
    pub tries: u32,
    /// Why it failed.
    pub reason: String,
    /// What was asked.
    pub request: Option<String>,
    /// What was answered.
    pub response: Option<String>,
}

/// Which failed events are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// All of them.
    All,
    /// Those of these ids.
    Ids(Vec<i64>),
}

impl Store {
    /// The failed events, the oldest first: at most `at_most` of them.
    pub fn failed(&mut self, at_most: u32) -> Result<Vec<FailedEvent>> {
        self.failed_where(
            "e.state = 'failed' ORDER BY e.id LIMIT ?1",
            [i64::from(at_most)],
        )
    }

    /// How many events have failed.
    pub fn count_failed(&mut self) -> Result<u64> {
        let count: i64 = self.connection.query_row(
            "SELECT count(*) FROM events WHERE state = 'failed'",
            [],
            |row| row.get(0),
        )?;
        Ok(u64::try_from(count).unwrap_or_default())
    }

    /// A failed event, if there is one of that id.
    pub fn failed_event(&mut self, id: i64) -> Result<Option<FailedEvent>> {
        Ok(self
            .failed_where("e.state = 'failed' AND e.id = ?1", [id])?
            .pop())
    }

    fn failed_where(
        &mut self,
        condition: &str,
        params: impl rusqlite::Params,
    ) -> Result<Vec<FailedEvent>> {
        let mut statement = self.connection.prepare_cached(&format!(
            "SELECT e.id, c.bigchat_id, c.chat_id, e.name, e.event_at, e.data, e.settled_at, coalesce(a.tries, 0),
                coalesce(a.reason, ''), a.request, a.response
             FROM events e LEFT JOIN attempts a ON a.event = e.id LEFT JOIN conversations c ON c.id = e.conversation
             WHERE {condition}"
        ))?;
        let events = statement.query_map(params, |row| {
            Ok(FailedEvent {
                id: row.get(0)?,
                conversation: row.get(1)?,
                chat: row.get(2)?,
                name: row.get(3)?,
                at: Timestamp::clamped(row.get(4)?),
                data: row.get(5)?,
                failed_at: Millis(row.get::<_, Option<i64>>(6)?.unwrap_or_default()),
                tries: row.get(7)?,
                reason: row.get(8)?,
                request: row.get(9)?,
                response: row.get(10)?,
            })
        })?;
        Ok(events.collect::<rusqlite::Result<_>>()?)
    }

    /// Lets failed events be tried again, with all their attempts ahead of them. Whether one may have been carried
    /// out stays known, so that it is looked for first. Returns how many there were; those that could not be
    /// understood stay as they are.
    pub fn retry_failed(&mut self, which: &Selection, now: Millis) -> Result<usize> {
        self.decide(which, |transaction, id, conversation| {
            let Some(conversation) = conversation else {
                return Ok(false);
            };
            transaction
                .prepare_cached(
                    "UPDATE events SET state = 'waiting', settled_at = NULL WHERE id = ?1",
                )?
                .execute([id])?;
            transaction
                .prepare_cached("UPDATE attempts SET counted = 0, next_at = NULL WHERE event = ?1")?
                .execute([id])?;
            due_now(transaction, conversation, now)?;
            Ok(true)
        })
    }

    /// Gives failed events up: they are never tried again. Returns how many there were.
    pub fn discard_failed(&mut self, which: &Selection, now: Millis) -> Result<usize> {
        self.decide(which, |transaction, id, _| {
            transaction
                .prepare_cached(
                    "UPDATE events SET state = 'discarded', settled_at = ?2 WHERE id = ?1",
                )?
                .execute(params![id, now.0])?;
            Ok(true)
        })
    }

    fn decide(
        &mut self,
        which: &Selection,
        decision: impl Fn(&rusqlite::Transaction<'_>, i64, Option<i64>) -> Result<bool>,
    ) -> Result<usize> {
        let transaction = self.begin()?;
        let ids = match which {
            Selection::Ids(ids) => ids.clone(),
            Selection::All => {
                let mut statement = transaction
                    .prepare("SELECT id FROM events WHERE state = 'failed' ORDER BY id")?;
                let ids = statement.query_map([], |row| row.get(0))?;
                ids.collect::<rusqlite::Result<_>>()?
            }
        };
        let mut decided = 0;
        for id in ids {
            let conversation: Option<Option<i64>> = transaction
                .prepare_cached(
                    "SELECT conversation FROM events WHERE id = ?1 AND state = 'failed'",
                )?
                .query_row([id], |row| row.get(0))
                .optional()?;
            if let Some(conversation) = conversation
                && decision(&transaction, id, conversation)?
            {
                decided += 1;
            }
        }
        transaction.commit()?;
        Ok(decided)
    }
}
