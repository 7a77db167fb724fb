//! Retention: what is dropped, and when. Conversations and advisors stay, and so do all events of a conversation that
//! has a waiting event or an open dead letter.

use std::time::Duration;

use rusqlite::{Connection, params};

use super::activity;
use super::{Result, Store};
use crate::domain::ids::{ConversationId, EventId};
use crate::domain::time::{Millis, Timestamp};

/// The next window may report events again that are slightly older than its start: times are in whole seconds, and a
/// MESSAGE can be dated before its START.
const MARGIN: Duration = Duration::from_secs(60);

/// For how many conversations credits are dropped at once, so that other operations do not wait.
const CREDITS_BATCH: u32 = 500;

/// The result of [`Store::prune`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pruned {
    /// How many events were dropped.
    pub dropped: usize,
    /// There may be more to drop. In that case, the call dropped something, so a loop ends.
    pub is_more: bool,
    /// A window that starts before this time may report a delivered event again that was dropped; `None`: none was.
    pub before: Option<Timestamp>,
}

/// A row of `deliveries` that is old enough to be dropped with its events.
struct Old {
    id: i64,
    conversation: ConversationId,
    from: EventId,
    through: EventId,
}

impl Store {
    /// Drops events that were delivered or discarded at least `retention` ago by this machine's clock and happened as
    /// long ago by BigChat's. Both clocks must agree, because either may be wrong. Events that the next window could
    /// report again stay, even if they happened long before it: `reach` is how far before the cursor that window may
    /// begin. Drops about `at_most` at a time, so that other operations do not wait.
    pub fn prune(
        &mut self,
        retention: Duration,
        reach: Duration,
        now: Millis,
        at_most: u32,
    ) -> Result<Pruned> {
        activity::forget(&self.connection, now)?;
        let state = self.poll_state()?;
        let (Some(cursor), Some(read_at)) = (state.cursor, state.read_at) else {
            return Ok(Pruned {
                dropped: 0,
                is_more: false,
                before: None,
            });
        };
        let reach = reach + MARGIN;
        let happened_before = cursor.minus(retention.max(reach));
        // While BigChat is not polled, the cursor does not move, so the next window reaches further back.
        let delivered_before = now.minus(retention).min(now.min(read_at).minus(reach));
        let transaction = self.begin()?;
        let discarded: Vec<Option<ConversationId>> = transaction
            .prepare_cached(DROP_DISCARDED)?
            .query_map(params![delivered_before, happened_before, at_most], |row| {
                row.get(0)
            })?
            .collect::<rusqlite::Result<_>>()?;
        let mut dropped = discarded.len();
        for conversation in discarded.into_iter().flatten() {
            leave_unverified(&transaction, conversation)?;
        }
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
        let at_most = at_most as usize;
        let is_limited = old.len() == at_most;
        let mut latest = None;
        for Old {
            id,
            conversation,
            from,
            through,
        } in old
        {
            if dropped >= at_most {
                break;
            }
            let delivered: Vec<Timestamp> = transaction
                .prepare_cached(DROP)?
                .query_map(
                    params![
                        conversation,
                        from,
                        through,
                        happened_before,
                        delivered_before
                    ],
                    |row| row.get(0),
                )?
                .collect::<rusqlite::Result<_>>()?;
            dropped += delivered.len();
            latest = latest.max(delivered.into_iter().max());
            leave_unverified(&transaction, conversation)?;
            transaction
                .prepare_cached(
                    "DELETE FROM deliveries WHERE id = ?1 AND NOT EXISTS (
                        SELECT 1 FROM events WHERE conversation = ?2 AND id BETWEEN ?3 AND ?4)",
                )?
                .execute(params![id, conversation, from, through])?;
        }
        transaction.commit()?;
        Ok(Pruned {
            dropped,
            is_more: dropped >= at_most || is_limited,
            before: latest.map(|latest| latest.plus(MARGIN)),
        })
    }

    /// Drops the credits of conversations without waiting events: credits contain the text of messages that may
    /// themselves have been dropped. A later event can match a credit only if its window begins before `started_at`,
    /// the start of the session. So nothing is dropped while the next window begins that early. A later window may go
    /// back that far again, so the chats then count as not read.
    pub fn drop_credits(&mut self, started_at: Timestamp, overlap: Duration) -> Result<()> {
        let cursor = self.poll_state()?.cursor;
        if cursor.is_none_or(|cursor| cursor.minus(overlap) < started_at) {
            return Ok(());
        }
        let conversations: Vec<ConversationId> = self
            .connection
            .prepare_cached(
                "SELECT DISTINCT conversation FROM credits
                 WHERE (SELECT waiting FROM conversations WHERE id = credits.conversation) = 0 LIMIT ?1",
            )?
            .query_map([CREDITS_BATCH], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        if conversations.is_empty() {
            return Ok(());
        }
        let transaction = self.begin()?;
        for conversation in conversations {
            for sql in [
                "DELETE FROM credits WHERE conversation = ?1",
                "UPDATE conversations SET read_in_session = 0 WHERE id = ?1",
            ] {
                transaction.prepare_cached(sql)?.execute([conversation])?;
            }
        }
        Ok(transaction.commit()?)
    }
}

/// Excludes a chat from verification if none of its events is stored any longer.
fn leave_unverified(connection: &Connection, conversation: ConversationId) -> Result<()> {
    connection
        .prepare_cached(
            "UPDATE conversations SET verified_in = NULL, drift = NULL, missing = NULL
             WHERE id = ?1 AND verified_in IS NOT NULL AND NOT EXISTS (SELECT 1 FROM events WHERE conversation = ?1)",
        )?
        .execute([conversation])?;
    connection
        .prepare_cached(
            "DELETE FROM requested_chats WHERE conversation = ?1 AND state IS NULL
                AND NOT EXISTS (SELECT 1 FROM events WHERE conversation = ?1)",
        )?
        .execute([conversation])?;
    Ok(())
}

/// SQL condition: the event is old enough, was delivered, and was not delivered again recently.
macro_rules! is_droppable {
    ($happened_before:literal, $delivered_before:literal) => {
        concat!(
            "e.event_at < ",
            $happened_before,
            " AND e.id <= (SELECT offset FROM conversations WHERE id = e.conversation)
             AND NOT EXISTS (SELECT 1 FROM deliveries n WHERE n.conversation = e.conversation
                AND n.through = e.id AND n.from_event = e.id AND n.delivered_at >= ",
            $delivered_before,
            ")"
        )
    };
}

/// Delivered events stay while another event of their conversation may still be sent: one that waits, or a dead letter,
/// even a discarded one, which may be reopened. The other events of the same second are needed to find its message in
/// OurAPI. And if an equal event were dropped and received again, it would be taken for the waiting one.
const OLD: &str = concat!(
    "SELECT d.id, d.conversation, d.from_event, d.through FROM deliveries d
     WHERE d.delivered_at < ?1
        AND NOT EXISTS (SELECT 1 FROM conversations WHERE id = d.conversation AND waiting > 0)
        AND NOT EXISTS (SELECT 1 FROM dead_letters WHERE conversation = d.conversation)
        AND (NOT EXISTS (SELECT 1 FROM events e
            WHERE e.conversation = d.conversation AND e.id BETWEEN d.from_event AND d.through)
        OR EXISTS (SELECT 1 FROM events e
            WHERE e.conversation = d.conversation AND e.id BETWEEN d.from_event AND d.through AND ",
    is_droppable!("?2", "?1"),
    ")) ORDER BY d.delivered_at LIMIT ?3"
);

const DROP: &str = concat!(
    "DELETE FROM events AS e WHERE e.conversation = ?1 AND e.id BETWEEN ?2 AND ?3 AND ",
    is_droppable!("?4", "?5"),
    " RETURNING event_at"
);

/// The same for discarded events. An event that could not be parsed may have happened as late as it was received.
const DROP_DISCARDED: &str = "DELETE FROM events WHERE id IN (
        SELECT d.event FROM dead_letters d JOIN events e ON e.id = d.event
        WHERE d.discarded_at < ?1 AND max(e.event_at, e.received_at / 1000) < ?2
            AND NOT EXISTS (SELECT 1 FROM conversations WHERE id = e.conversation AND waiting > 0)
            AND NOT EXISTS (SELECT 1 FROM dead_letters o WHERE o.conversation = e.conversation
                AND (o.discarded_at IS NULL OR o.discarded_at >= ?1))
        ORDER BY d.discarded_at LIMIT ?3) RETURNING conversation";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::dedupe::Counts;
    use crate::domain::ids::Epoch;
    use crate::domain::window::Window;
    use crate::journal::{NewPage, WindowProgress};

    const DAY: i64 = 86_400;
    const RETENTION: Duration = Duration::from_secs(30 * 86_400);

    /// A journal with events that were received at `at`. BigChat was read up to `cursor`.
    fn received(events: &[String], at: i64, cursor: i64) -> Store {
        let connection = Connection::open_in_memory().expect("a database");
        let mut store = Store::in_memory(connection, true).expect("a journal");
        let (at, cursor) = (Timestamp::clamped(at), Timestamp::clamped(cursor));
        let read_at = Millis(cursor.unix() * 1000);
        let page = NewPage {
            query: String::new(),
            requested_in: Epoch(1),
            served_at: at,
            window: Window { start: at, end: at },
            body: format!(r#"{{"events":[{}]}}"#, events.join(",")),
            events: events.len(),
            window_at: Some(read_at),
            progress: WindowProgress::Complete(cursor),
        };
        store.store_page(&page).expect("a stored page");
        let now = Millis(at.unix() * 1000);
        for page in store.stored_pages().expect("pages") {
            let received = Counts::of(&[page.keys()]);
            store
                .ingest(&page, Epoch(1), false, &received, &[], now)
                .expect("events");
        }
        let ended = store.end_poll(cursor, read_at, 0);
        ended.expect("the end of a poll");
        store
    }

    /// The same with `each` messages of every conversation from 1 to `conversations`. Each conversation has one
    /// delivery, at `at`, when its messages happened.
    fn journal(conversations: usize, each: usize, at: i64, cursor: i64) -> Store {
        let messages: Vec<String> = (0..conversations * each)
            .map(|n| {
                let conversation = n / each + 1;
                format!(
                    r#"{{"conversation_id":{conversation},"event_name":"MESSAGE","event_at":{at},"data":{{"message":"{n}"}}}}"#
                )
            })
            .collect();
        let mut store = received(&messages, at, cursor);
        let connection = store.connection();
        connection
            .execute(
                "UPDATE conversations SET waiting = 0, waiting_since = NULL, due_at = NULL,
                    offset = (SELECT max(id) FROM events WHERE conversation = conversations.id)",
                [],
            )
            .expect("an update");
        connection
            .execute(
                "INSERT INTO deliveries (conversation, from_event, through, delivered_at, effect)
                 SELECT conversation, min(id), max(id), ?1, 'sent' FROM events GROUP BY conversation",
                [at * 1000],
            )
            .expect("deliveries");
        store
    }

    /// Neither clock alone drops an event.
    #[test]
    fn one_clock_drops_nothing() {
        let at = 100 * DAY;
        let days = |days: i64| at + days * DAY;
        for (here, cursor, dropped) in [
            (days(40), days(0), 0),
            (days(4000), days(29), 0),
            (days(0), days(4000), 0),
            (days(29), days(40), 0),
            (days(31), days(31), 1),
            (days(40), days(31), 1),
        ] {
            let mut store = journal(1, 1, at, cursor);
            let now = Millis(here * 1000);
            let pruned = store.prune(RETENTION, Duration::from_secs(5), now, 10);
            assert_eq!(
                pruned.expect("a result").dropped,
                dropped,
                "{here} {cursor}"
            );
        }
    }

    /// Deliveries are dropped as a whole, so that a batch may drop more than its limit. A delivery whose events are
    /// gone adds nothing to the count. Neither ends the loop early.
    #[test]
    fn batches_continue_to_the_end() {
        let at = 100 * DAY;
        for (each, are_gone) in [(3, false), (3, true), (1, false)] {
            let mut store = journal(10, each, at, at + 31 * DAY);
            if are_gone {
                let gone = store.connection().execute("DELETE FROM events", []);
                assert_eq!(gone.expect("a deletion"), 10 * each);
            }
            let now = Millis((at + 31 * DAY) * 1000);
            let mut batches = 1;
            while store
                .prune(RETENTION, Duration::from_secs(5), now, 2)
                .expect("a result")
                .is_more
            {
                batches += 1;
                assert!(batches < 100, "each batch drops something");
            }
            let left = "SELECT (SELECT count(*) FROM events) + (SELECT count(*) FROM deliveries)";
            let left: i64 = store
                .connection()
                .query_row(left, [], |row| row.get(0))
                .expect("a count");
            assert_eq!(left, 0, "deliveries of {each} events, gone: {are_gone}");
        }
    }

    /// An event that happened long before its delivery stays as long as the next window may report it again. That
    /// window begins where polling has ended.
    #[test]
    fn old_event_of_the_last_window_stays() {
        for (read, dropped) in [(0, 0), (60, 0), (66, 1)] {
            let at = 100 * DAY;
            let mut store = journal(1, 1, at, at + read);
            let connection = store.connection();
            let older = connection.execute("UPDATE events SET event_at = event_at - ?1", [DAY]);
            assert_eq!(older.expect("an update"), 1);
            let now = Millis((at + DAY) * 1000);
            let pruned = store.prune(Duration::ZERO, Duration::from_secs(5), now, 10);
            assert_eq!(pruned.expect("a result").dropped, dropped, "{read}");
        }
    }

    /// A discarded event that cannot be parsed stays as long as the next window may report it again.
    #[test]
    fn discarded_unparsable_event_stays() {
        for (read, dropped) in [(0, 0), (60, 0), (66, 1)] {
            let at = 100 * DAY;
            let mut store = received(&["{}".to_owned()], at, at + read);
            let connection = store.connection();
            let discarded =
                connection.execute("UPDATE dead_letters SET discarded_at = ?1", [at * 1000]);
            assert_eq!(discarded.expect("an update"), 1);
            let now = Millis((at + DAY) * 1000);
            let second = Duration::from_secs(1);
            let pruned = store.prune(second, 5 * second, now, 10);
            assert_eq!(pruned.expect("a result").dropped, dropped, "{read}");
        }
    }
}
