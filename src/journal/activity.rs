//! How many events were received, delivered and dead-lettered in each minute. The counts are updated in the same
//! transactions as the events, so that a chart of several hours does not scan millions of events.

use rusqlite::{Connection, Transaction, params};

use super::{Result, UNREADABLE};
use crate::domain::event::EventKind;
use crate::domain::time::Millis;

/// How long the counts are stored, in minutes: a week.
const MINUTES_STORED: i64 = 7 * 24 * 60;

/// The counts of one kind of event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Count {
    pub(super) received: u32,
    pub(super) delivered: u32,
    pub(super) failed: u32,
}

/// All kinds of events, and events that could not be parsed.
const KINDS: usize = EventKind::ALL.len() + 1;

/// The counts of one transaction.
#[derive(Debug, Default)]
pub(super) struct Counts([Count; KINDS]);

/// The names of all kinds, as the journal stores them.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    EventKind::ALL
        .into_iter()
        .map(EventKind::name)
        .chain([UNREADABLE])
}

impl Counts {
    /// The count of a kind; `None`: events that could not be parsed.
    pub(super) fn of(&mut self, kind: Option<EventKind>) -> &mut Count {
        &mut self.0[kind.map_or(KINDS - 1, |kind| kind as usize)]
    }

    /// How many of each kind were received.
    pub(super) fn received(&self) -> Vec<(&'static str, u32)> {
        let counts = names().zip(&self.0);
        counts
            .filter(|(_, count)| count.received > 0)
            .map(|(kind, count)| (kind, count.received))
            .collect()
    }

    /// Adds the counts to the current minute.
    pub(super) fn store(&self, transaction: &Transaction<'_>, now: Millis) -> Result<()> {
        for (kind, count) in names().zip(&self.0) {
            if *count == Count::default() {
                continue;
            }
            transaction
                .prepare_cached(
                    "INSERT INTO activity (minute, kind, received, delivered, failed) VALUES (?1, ?2, ?3, ?4, ?5)
                     ON CONFLICT (minute, kind) DO UPDATE SET received = received + excluded.received,
                        delivered = delivered + excluded.delivered, failed = failed + excluded.failed",
                )?
                .execute(params![
                    minute(now),
                    kind,
                    count.received,
                    count.delivered,
                    count.failed
                ])?;
        }
        Ok(())
    }
}

/// The minute of a point in time.
pub(super) fn minute(at: Millis) -> i64 {
    at.0.div_euclid(60_000)
}

/// Drops counts that are too old for any chart.
pub(super) fn forget(connection: &Connection, now: Millis) -> Result<()> {
    connection
        .prepare_cached("DELETE FROM activity WHERE minute < ?1")?
        .execute([minute(now) - MINUTES_STORED])?;
    Ok(())
}
