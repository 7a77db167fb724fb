//! Sessions: the state that passes from one session to the next.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use rusqlite::{Connection, params};

use super::directory::ask_again;
use super::{Result, Store, pause};
use crate::domain::ids::{Epoch, EventId};
use crate::domain::pause::Pause;
use crate::domain::time::Millis;

/// At the start of the daemon, everything that would be due later than this is due at once, because a clock that was
/// wrong must not delay it forever.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// The state with which delivery starts.
#[derive(Debug, Clone)]
pub struct Session {
    pub id: i64,
    pub replay_until: ReplayUntil,
    /// The latest epoch.
    pub epoch: Epoch,
    /// How many writes have succeeded so far.
    pub writes_succeeded: i64,
    /// How many losses in OurAPI there have been.
    pub losses: i64,
    pub last_end: LastEnd,
    /// The latest pause, unless it was ended.
    pub pause: Option<Pause>,
}

/// How the last process that sent requests to OurAPI ended.
#[derive(Debug, Clone, Copy)]
pub struct LastEnd {
    /// Whether it gave up no request in flight and committed everything.
    pub clean: bool,
    /// The time until which OurAPI may still carry out requests that timed out, by this machine's clock.
    pub timed_out_until: Millis,
}

impl LastEnd {
    /// The time until which requests of earlier processes may still be in flight. A process that ended uncleanly may
    /// have abandoned requests without recording them.
    pub fn in_flight_until(self, request_timeout: Duration, now: Millis) -> Millis {
        match self.clean {
            true => self.timed_out_until,
            false => now.plus(request_timeout),
        }
    }
}

/// The latest event that may have been delivered without a record in this journal: it arrived before the session, its
/// window starts before the session, or delivered events of its window may have been dropped. Polling raises it, and
/// delivery reads it.
#[derive(Debug, Clone, Default)]
pub struct ReplayUntil(Arc<AtomicI64>);

impl ReplayUntil {
    pub fn new(event: EventId) -> Self {
        Self(Arc::new(AtomicI64::new(event.0)))
    }

    pub fn get(&self) -> EventId {
        EventId(self.0.load(Ordering::Relaxed))
    }

    /// Must be called before the event is visible to delivery.
    pub fn raise(&self, event: EventId) {
        self.0.fetch_max(event.0, Ordering::Relaxed);
    }
}

/// The settings of a session by which its own and other processes judge its progress.
#[derive(Debug, Clone, Copy, Default)]
pub struct Intervals {
    /// Time between polls.
    pub poll_interval: Duration,
    /// The period in which each chat is verified; `None`: chats are not verified in idle time.
    pub verify_every: Option<Duration>,
}

impl Store {
    /// Starts a session. It counts as ended uncleanly until it ends cleanly.
    pub fn start_session(&mut self, intervals: Intervals, now: Millis) -> Result<Session> {
        let transaction = self.begin()?;
        let last_end = last_end(&transaction)?;
        let (pause, _) = pause::latest(&transaction)?;
        // OurAPI or BigChat may have been repaired since.
        ask_again(&transaction)?;
        // Chats with waiting events are read back anyway.
        transaction.execute("DELETE FROM credits", [])?;
        let session = transaction.query_row(
            "UPDATE control SET session = session + 1, clean_end = 0, poll_interval = ?1, verify_every = ?2
             RETURNING session, writes_succeeded, losses,
                (SELECT coalesce(max(id), 0) FROM events), (SELECT max(id) FROM epochs)",
            params![
                intervals.poll_interval.as_secs_f64(),
                intervals.verify_every.map(|every| every.as_secs_f64())
            ],
            |row| {
                Ok(Session {
                    id: row.get(0)?,
                    writes_succeeded: row.get(1)?,
                    losses: row.get(2)?,
                    replay_until: ReplayUntil::new(row.get(3)?),
                    epoch: row.get(4)?,
                    last_end,
                    pause,
                })
            },
        )?;
        let latest = now.plus(LONGEST_WAIT);
        transaction.execute(
            "UPDATE conversations SET due_at = ?2 WHERE due_at > ?1",
            [latest, now],
        )?;
        transaction.execute(
            "UPDATE attempts SET next_at = ?2 WHERE next_at > ?1",
            [latest, now],
        )?;
        transaction.commit()?;
        Ok(session)
    }

    /// Makes this process count as ended uncleanly until [`Self::end_session`]. Returns how the previous one ended.
    pub fn begin_requests(&mut self) -> Result<LastEnd> {
        let transaction = self.begin()?;
        let last_end = last_end(&transaction)?;
        transaction.execute("UPDATE control SET clean_end = 0", [])?;
        transaction.commit()?;
        Ok(last_end)
    }

    /// Ends the session.
    pub fn end_session(&mut self, timed_out_until: Millis, clean: bool) -> Result<()> {
        self.connection.execute(
            "UPDATE control SET timed_out_until = ?1, clean_end = ?2",
            params![timed_out_until, clean],
        )?;
        Ok(())
    }
}

fn last_end(connection: &Connection) -> Result<LastEnd> {
    let sql = "SELECT clean_end, timed_out_until FROM control";
    Ok(connection.query_row(sql, [], |row| {
        Ok(LastEnd {
            clean: row.get(0)?,
            timed_out_until: row.get(1)?,
        })
    })?)
}
