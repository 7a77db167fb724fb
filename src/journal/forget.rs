//! Erasure: the text of a conversation leaves the journal and its files for good, and none is stored any more.
//!
//! Its row stays, marked, and of its events what they are recognised by (kind, time, fingerprint), so that polling does not
//! ingest them again. All of them count as settled: nothing of it waits, is sent, verified or restored.

use rusqlite::{Connection, OptionalExtension, Transaction, params};

use super::{Result, Store, limit};
use crate::domain::dedupe::Key;
use crate::domain::event::{Event, PartialEvent, fingerprint, page_events};
use crate::domain::ids::{ConversationId, Epoch, EventId};
use crate::domain::time::Millis;

/// How many free pages of the file are overwritten at once: a daemon that wants to write waits for no longer.
const PAGES_AT_ONCE: i64 = 512;

/// How often the log is tried to be emptied while it is read; each try waits as long as a statement waits.
const CHECKPOINTS: u32 = 5;

/// What was erased.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forgotten {
    /// Events of the conversation, those without a text included.
    pub events: i64,
    /// Events that could not be parsed and name the conversation.
    pub unparsed: i64,
    /// The poll in progress has pages that are not ingested yet, and the conversation is on one of them: it is erased there
    /// once that poll ends.
    pub is_on_new_page: bool,
}

impl Store {
    /// The epochs in which a conversation of that id is known, or an event that could not be parsed names it.
    pub fn epochs_of(&mut self, bigchat_id: i64) -> Result<Vec<Epoch>> {
        let mut epochs: Vec<Epoch> = self
            .connection
            .prepare_cached("SELECT epoch FROM conversations WHERE bigchat_id = ?1")?
            .query_map([bigchat_id], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        let unparsed = unparsed(&self.connection, bigchat_id)?;
        epochs.extend(unparsed.into_iter().map(|(_, epoch)| epoch));
        epochs.sort_unstable();
        epochs.dedup();
        Ok(epochs)
    }

    /// Erases the text of a conversation: of its events, its dead letters and their exchanges, and of the pages it is on.
    /// What is in flight to OurAPI is not called back.
    pub fn forget(
        &mut self,
        epoch: Epoch,
        bigchat_id: i64,
        who: &str,
        now: Millis,
    ) -> Result<Forgotten> {
        // What is deleted or replaced in this transaction is overwritten with zeros.
        self.connection.pragma_update(None, "secure_delete", "ON")?;
        let forgotten = self.forget_in_transaction(epoch, bigchat_id, who, now);
        self.connection
            .pragma_update(None, "secure_delete", "FAST")?;
        forgotten
    }

    fn forget_in_transaction(
        &mut self,
        epoch: Epoch,
        bigchat_id: i64,
        who: &str,
        now: Millis,
    ) -> Result<Forgotten> {
        let transaction = self.begin()?;
        let conversation: ConversationId = transaction.query_row(
            "INSERT INTO conversations (epoch, bigchat_id, forgotten_at, forgotten_by) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (epoch, bigchat_id) DO UPDATE SET
                forgotten_at = coalesce(forgotten_at, excluded.forgotten_at),
                forgotten_by = coalesce(forgotten_by, excluded.forgotten_by)
             RETURNING id",
            params![epoch, bigchat_id, now.0, who],
            |row| row.get(0),
        )?;
        erase(&transaction, conversation, now)?;
        let unparsed: Vec<_> = unparsed(&transaction, bigchat_id)?
            .into_iter()
            .filter(|(_, of)| *of == epoch)
            .collect();
        for (event, _) in &unparsed {
            erase_unparsed(&transaction, *event, now)?;
        }
        let forgotten = Forgotten {
            events: transaction.query_row(
                "SELECT count(*) FROM events WHERE conversation = ?1",
                [conversation],
                |row| row.get(0),
            )?,
            unparsed: limit(unparsed.len()),
            is_on_new_page: erase_pages(&transaction, bigchat_id)?,
        };
        transaction.commit()?;
        Ok(forgotten)
    }

    /// Makes sure that nothing erased is left in the database's files: overwrites the pages of the file that are free, and
    /// empties the write-ahead log. Returns whether the log could be emptied; if not, another process is reading an old
    /// state of the database.
    pub fn overwrite_erased(&mut self) -> Result<bool> {
        let page_size: i64 = self
            .connection
            .pragma_query_value(None, "page_size", |row| row.get(0))?;
        let free = |connection: &Connection| {
            connection.pragma_query_value(None, "freelist_count", |row| row.get::<_, i64>(0))
        };
        // Free pages are taken into use, filled with zeros, and given back. Others may free some meanwhile.
        let mut left = free(&self.connection)?;
        while left > 0 {
            let pages = left.min(PAGES_AT_ONCE).min(free(&self.connection)?).max(1);
            self.connection
                .prepare_cached("INSERT INTO scratch (zeros) VALUES (zeroblob(?1))")?
                .execute([pages * page_size])?;
            left -= pages;
        }
        while self
            .connection
            .prepare_cached("DELETE FROM scratch WHERE id = (SELECT min(id) FROM scratch)")?
            .execute([])?
            > 0
        {}
        for _ in 0..CHECKPOINTS {
            let is_busy: bool =
                self.connection
                    .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
            if !is_busy {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Erases what is stored of a forgotten conversation, and settles its events. May be repeated.
pub(super) fn erase(
    transaction: &Transaction<'_>,
    conversation: ConversationId,
    now: Millis,
) -> Result<()> {
    settle(transaction, conversation, now)?;
    for sql in [
        "UPDATE conversations SET waiting = 0, waiting_since = NULL, due_at = NULL, verified_in = NULL, drift = NULL,
            missing = NULL WHERE id = ?1",
        "UPDATE events SET data = NULL WHERE conversation = ?1 AND data IS NOT NULL",
        "DELETE FROM attempts WHERE conversation = ?1",
        "DELETE FROM dead_letters WHERE conversation = ?1",
        "DELETE FROM redeliveries WHERE conversation = ?1",
        "DELETE FROM credits WHERE conversation = ?1",
        // A reason may quote what could not be parsed.
        "UPDATE resolutions SET reason = '' WHERE event IN (SELECT id FROM events WHERE conversation = ?1)
            OR conversation = (SELECT bigchat_id FROM conversations WHERE id = ?1)
                AND NOT EXISTS (SELECT 1 FROM events WHERE id = resolutions.event)",
    ] {
        transaction.prepare_cached(sql)?.execute([conversation])?;
    }
    Ok(())
}

/// Moves the offset of a forgotten conversation past all its events. The retention drops them as if they had been delivered
/// now.
pub(super) fn settle(
    transaction: &Transaction<'_>,
    conversation: ConversationId,
    now: Millis,
) -> Result<()> {
    let above: Option<(EventId, EventId)> = transaction
        .prepare_cached(
            "SELECT min(id), max(id) FROM events
             WHERE conversation = ?1 AND id > (SELECT offset FROM conversations WHERE id = ?1)
             HAVING min(id) IS NOT NULL",
        )?
        .query_row([conversation], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((from, through)) = above else {
        return Ok(());
    };
    transaction
        .prepare_cached(
            "INSERT INTO deliveries (conversation, from_event, through, delivered_at, effect)
             VALUES (?1, ?2, ?3, ?4, 'forgotten')",
        )?
        .execute(params![conversation, from, through, now.0])?;
    transaction
        .prepare_cached("UPDATE conversations SET offset = ?2 WHERE id = ?1")?
        .execute(params![conversation, through])?;
    Ok(())
}

/// Whether a conversation was forgotten.
pub(super) fn is_forgotten(connection: &Connection, epoch: Epoch, bigchat_id: i64) -> Result<bool> {
    Ok(connection
        .prepare_cached(
            "SELECT EXISTS (SELECT 1 FROM conversations
                WHERE epoch = ?1 AND bigchat_id = ?2 AND forgotten_at IS NOT NULL)",
        )?
        .query_row(params![epoch, bigchat_id], |row| row.get(0))?)
}

/// What could not be parsed stays as a discarded dead letter, so that it is recognised when it comes again.
pub(super) fn erase_unparsed(
    transaction: &Transaction<'_>,
    event: EventId,
    now: Millis,
) -> Result<()> {
    transaction.execute(
        "UPDATE dead_letters SET discarded_at = coalesce(discarded_at, ?2) WHERE event = ?1",
        params![event, now.0],
    )?;
    for sql in [
        "UPDATE events SET data = NULL WHERE id = ?1",
        "DELETE FROM attempts WHERE event = ?1",
        "UPDATE resolutions SET reason = '' WHERE event = ?1",
    ] {
        transaction.prepare_cached(sql)?.execute([event])?;
    }
    Ok(())
}

/// The events that could not be parsed and yet name that conversation, and their epochs.
fn unparsed(connection: &Connection, bigchat_id: i64) -> Result<Vec<(EventId, Epoch)>> {
    let mut statement = connection.prepare_cached(
        "SELECT e.id, e.data, d.epoch FROM events e JOIN dead_letters d ON d.event = e.id
         WHERE e.conversation IS NULL AND e.data IS NOT NULL AND d.epoch IS NOT NULL",
    )?;
    let mut rows = statement.query([])?;
    let mut events = Vec::new();
    while let Some(row) = rows.next()? {
        let raw: String = row.get(1)?;
        if PartialEvent::of(&raw).conversation == Some(bigchat_id) {
            events.push((row.get(0)?, row.get(2)?));
        }
    }
    Ok(events)
}

/// Erases a conversation from the ingested pages of the poll in progress: from then on they serve for counting only.
/// Returns whether it is on one that is not ingested yet.
fn erase_pages(transaction: &Transaction<'_>, bigchat_id: i64) -> Result<bool> {
    let pages: Vec<(i64, bool)> = transaction
        .prepare("SELECT id, ingested FROM inbox ORDER BY id")?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    let mut is_on_new_page = false;
    for (id, ingested) in pages {
        let body: String =
            transaction.query_row("SELECT body FROM inbox WHERE id = ?1", [id], |row| {
                row.get(0)
            })?;
        let Some(erased) = without_text(&body, bigchat_id) else {
            continue;
        };
        if ingested {
            transaction.execute(
                "UPDATE inbox SET body = ?2 WHERE id = ?1",
                params![id, erased],
            )?;
        } else {
            is_on_new_page = true;
        }
    }
    Ok(is_on_new_page)
}

/// The page with only the keys of the conversation's events. `None`: none is on it.
fn without_text(body: &str, bigchat_id: i64) -> Option<String> {
    let (mut events, mut is_changed) = (Vec::new(), false);
    page_events(body, |raw| {
        let (key, of) = match Event::parse(raw) {
            Ok(event) => (Key::from(&event), Some(event.conversation)),
            Err(_) => (
                Key::unparsed(fingerprint(&[raw.as_bytes()])),
                PartialEvent::of(raw).conversation,
            ),
        };
        let is_erased = of == Some(bigchat_id);
        is_changed |= is_erased;
        events.push(match is_erased {
            true => key.to_json(),
            false => raw.to_owned(),
        });
    })
    .ok()?;
    is_changed.then(|| format!(r#"{{"events":[{}]}}"#, events.join(",")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::keys;

    #[test]
    fn erased_events_count_as_before() {
        let body = r#"{"nextPageUrl":"?page=2","events":[
            {"conversation_id":42,"event_name":"MESSAGE","event_at":5,"data":{"message":"S3cret"}},
            {"conversation_id":43,"event_name":"MESSAGE","event_at":5,"data":{"message":"Hi"}},
            {"conversation_id":"42","event_name":"NOTE","event_at":5,"data":"S3cret"},
            {"conversation_id":42,"event_name":"END","event_at":6,"data":null}
        ]}"#;
        let erased = without_text(body, 42).expect("it is on the page");
        assert!(
            !erased.contains("S3cret") && erased.contains("Hi"),
            "{erased}"
        );
        assert_eq!(keys(&erased), keys(body));
        assert_eq!(keys(body).len(), 4);
        assert_eq!(without_text(&erased, 42), None, "once is enough");
        assert_eq!(without_text(body, 44), None);
    }
}
