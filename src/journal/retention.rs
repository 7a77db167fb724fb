//! Retention: what is dropped, and when. What waits, open dead letters, conversations and advisors stay.

use std::time::Duration;

use rusqlite::params;

use super::activity;
use super::{Result, Store};
use crate::domain::ids::{ConversationId, EventId};
use crate::time::Millis;

/// The next window may bring again what is a little older than its start, which is a matter of whole seconds: a MESSAGE can
/// be dated before its START.
const MARGIN: Duration = Duration::from_secs(60);

/// A row of `deliveries` that is old enough to be dropped with its events.
struct Old {
    id: i64,
    conversation: ConversationId,
    from: EventId,
    through: EventId,
}

impl Store {
    /// Drops events that were delivered or discarded `retention` ago, unless the next window could bring them again; some at
    /// a time, so that nothing waits for it. Returns how many.
    pub fn prune(
        &mut self,
        retention: Duration,
        overlap: Duration,
        now: Millis,
        at_most: u32,
    ) -> Result<usize> {
        activity::forget(&self.connection, now)?;
        let Some(cursor) = self.source()?.cursor else {
            return Ok(0);
        };
        let (delivered_before, happened_before) = (
            now.minus(retention).0,
            cursor.minus(overlap).minus(MARGIN).unix(),
        );
        let transaction = self.begin()?;
        let old: Vec<Old> = transaction
            .prepare_cached(OLD)?
            .query_map(params![delivered_before, happened_before, at_most], |row| {
                Ok(Old {
                    id: row.get(0)?,
                    conversation: row.get(1)?,
                    from: row.get(2)?,
                    through: row.get(3)?,
                })
            })?
            .collect::<rusqlite::Result<_>>()?;
        let mut dropped = 0;
        for Old {
            id,
            conversation,
            from,
            through,
        } in old
        {
            dropped += transaction.prepare_cached(DROP)?.execute(params![
                conversation,
                from,
                through,
                happened_before,
                delivered_before
            ])?;
            transaction
                .prepare_cached(
                    "DELETE FROM deliveries WHERE id = ?1 AND NOT EXISTS (
                        SELECT 1 FROM events WHERE conversation = ?2 AND id BETWEEN ?3 AND ?4)",
                )?
                .execute(params![id, conversation, from, through])?;
            if dropped >= at_most as usize {
                break;
            }
        }
        dropped += transaction
            .prepare_cached(DROP_DISCARDED)?
            .execute(params![delivered_before, happened_before, at_most])?;
        transaction.commit()?;
        Ok(dropped)
    }
}

/// An equal event waits or is an open dead letter: received again, it could no longer be told from it.
macro_rules! has_twin {
    () => {
        "EXISTS (
            SELECT 1 FROM events t JOIN conversations c ON c.id = t.conversation
            WHERE t.conversation = e.conversation AND t.fingerprint = e.fingerprint AND t.id <> e.id
                AND (t.id > c.offset AND NOT EXISTS (SELECT 1 FROM dead_letters WHERE event = t.id)
                    OR EXISTS (SELECT 1 FROM dead_letters WHERE event = t.id AND discarded_at IS NULL)
                    OR EXISTS (SELECT 1 FROM redeliveries WHERE event = t.id)))"
    };
}

/// The event was delivered, and not again since.
macro_rules! is_droppable {
    ($happened_before:literal, $delivered_before:literal) => {
        concat!(
            "e.event_at < ",
            $happened_before,
            " AND e.id <= (SELECT offset FROM conversations WHERE id = e.conversation)
             AND NOT EXISTS (SELECT 1 FROM dead_letters WHERE event = e.id)
             AND NOT EXISTS (SELECT 1 FROM redeliveries WHERE event = e.id)
             AND NOT EXISTS (SELECT 1 FROM deliveries n WHERE n.conversation = e.conversation
                AND n.through = e.id AND n.from_event = e.id AND n.delivered_at >= ",
            $delivered_before,
            ") AND NOT ",
            has_twin!()
        )
    };
}

const OLD: &str = concat!(
    "SELECT d.id, d.conversation, d.from_event, d.through FROM deliveries d
     WHERE d.delivered_at < ?1 AND (NOT EXISTS (SELECT 1 FROM events e
            WHERE e.conversation = d.conversation AND e.id BETWEEN d.from_event AND d.through)
        OR EXISTS (SELECT 1 FROM events e
            WHERE e.conversation = d.conversation AND e.id BETWEEN d.from_event AND d.through AND ",
    is_droppable!("?2", "?1"),
    ")) ORDER BY d.delivered_at LIMIT ?3"
);

const DROP: &str = concat!(
    "DELETE FROM events AS e WHERE e.conversation = ?1 AND e.id BETWEEN ?2 AND ?3 AND ",
    is_droppable!("?4", "?5")
);

const DROP_DISCARDED: &str = concat!(
    "DELETE FROM events WHERE id IN (
        SELECT d.event FROM dead_letters d JOIN events e ON e.id = d.event
        WHERE d.discarded_at < ?1 AND e.event_at < ?2 AND NOT ",
    has_twin!(),
    " ORDER BY d.discarded_at LIMIT ?3)"
);
