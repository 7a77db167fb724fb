//! How many events were told, delivered and refused in each minute: counted in the transactions in which it happens, so
//! that a chart of hours costs nobody a walk through millions of events.

use rusqlite::{Connection, Transaction, params};

use super::{Result, UNREADABLE};
use crate::time::Millis;

/// For how many minutes they are kept: a week.
const KEPT: i64 = 7 * 24 * 60;

/// What has happened to events of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Count {
    pub(super) told: u32,
    pub(super) delivered: u32,
    pub(super) failed: u32,
}

/// The names of all kinds of events, as the journal has them.
const KINDS: [&str; 5] = ["START", "END", "MESSAGE", "TRANSFER", UNREADABLE];

/// What has happened in one transaction.
#[derive(Debug, Default)]
pub(super) struct Counts([Count; KINDS.len()]);

impl Counts {
    /// The count of a kind, by its name in the journal.
    pub(super) fn of(&mut self, name: &str) -> &mut Count {
        let index = KINDS.iter().position(|kind| *kind == name);
        &mut self.0[index.unwrap_or(KINDS.len() - 1)]
    }

    /// How many of each kind were told.
    pub(super) fn told(&self) -> Vec<(&'static str, u32)> {
        let counts = KINDS.into_iter().zip(&self.0);
        counts
            .filter(|(_, count)| count.told > 0)
            .map(|(kind, count)| (kind, count.told))
            .collect()
    }

    /// Adds it all to the present minute.
    pub(super) fn keep(&self, transaction: &Transaction<'_>, now: Millis) -> Result<()> {
        for (kind, count) in KINDS.iter().zip(&self.0) {
            if *count == Count::default() {
                continue;
            }
            transaction
                .prepare_cached(
                    "INSERT INTO minutes (minute, kind, told, delivered, failed) VALUES (?1, ?2, ?3, ?4, ?5)
                     ON CONFLICT (minute, kind) DO UPDATE SET told = told + excluded.told,
                        delivered = delivered + excluded.delivered, failed = failed + excluded.failed",
                )?
                .execute(params![
                    minute(now),
                    kind,
                    count.told,
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

/// Forgets what is too long ago for any chart.
pub(super) fn forget(connection: &Connection, now: Millis) -> Result<()> {
    connection
        .prepare_cached("DELETE FROM minutes WHERE minute < ?1")?
        .execute([minute(now) - KEPT])?;
    Ok(())
}
