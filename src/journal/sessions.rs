//! Sessions of delivery: from one start of the daemon to the next, and what one hands on to the next beside its claims.

use std::time::Duration;

use rusqlite::Connection;

use super::claims::abandon;
use super::{Result, Store};
use crate::time::Millis;

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
        // OurAPI may have been mended since, and BigChat.
        transaction.execute("DELETE FROM agents WHERE agent_id IS NULL", [])?;
        transaction.execute("DELETE FROM advisors WHERE name IS NULL", [])?;
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
