//! Erasure: the text of a conversation is removed from the journal and its files for good, and later text is not
//! stored.
//!
//! The conversation's row stays and is marked as forgotten. The identity of its events stays (kind, time, fingerprint),
//! so that polling does not ingest them again. All of them count as settled: none waits, and none is sent, verified or
//! restored.

use rusqlite::{Connection, OptionalExtension, Transaction, params};

use super::{Result, Store, limit};
use crate::domain::dedupe::Key;
use crate::domain::event::{Event, PartialEvent, fingerprint, page_events};
use crate::domain::ids::{ConversationId, Epoch, EventId};
use crate::domain::time::Millis;

/// How many free pages of the file are overwritten at once. A daemon that wants to write waits no longer than one such
/// batch takes.
const PAGES_AT_ONCE: i64 = 512;

/// How often emptying the log is attempted while another process is reading it. Each attempt waits as long as a
/// statement does.
const CHECKPOINTS: u32 = 5;

/// The result of an erasure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forgotten {
    /// When it was forgotten before; `None`: it was not.
    pub before: Option<Millis>,
    /// Events of the conversation, including those without a text.
    pub events: i64,
    /// Events that could not be parsed and name the conversation.
    pub unparsed: i64,
    /// A page of the unfinished window names the conversation and is not ingested yet. Its text there is erased once
    /// the window is finished.
    pub is_on_new_page: bool,
}

impl Store {
    /// The epochs in which a conversation with that id is known, or is named by an event that could not be parsed.
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

    /// Erases the text of a conversation: in its events, its dead letters with their requests and responses, and the
    /// stored pages. A request in flight to OurAPI is not cancelled.
    pub fn forget(
        &mut self,
        epoch: Epoch,
        bigchat_id: i64,
        who: &str,
        now: Millis,
    ) -> Result<Forgotten> {
        // Content deleted or replaced in this transaction is overwritten with zeros.
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
        let before: Option<Option<Millis>> = transaction
            .query_row(
                "SELECT forgotten_at FROM conversations WHERE epoch = ?1 AND bigchat_id = ?2",
                params![epoch, bigchat_id],
                |row| row.get(0),
            )
            .optional()?;
        let conversation: ConversationId = transaction.query_row(
            "INSERT INTO conversations (epoch, bigchat_id, forgotten_at, forgotten_by) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (epoch, bigchat_id) DO UPDATE SET
                forgotten_at = coalesce(forgotten_at, excluded.forgotten_at),
                forgotten_by = coalesce(forgotten_by, excluded.forgotten_by)
             RETURNING id",
            params![epoch, bigchat_id, now, who],
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
            before: before.flatten(),
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

    /// Makes sure that no erased text is left in the database's files: overwrites the free pages of the file and
    /// empties the write-ahead log. Returns whether the log could be emptied; if not, another process is reading an old
    /// state of the database.
    pub fn overwrite_erased(&mut self) -> Result<bool> {
        let page_size: i64 = self
            .connection
            .pragma_query_value(None, "page_size", |row| row.get(0))?;
        let free = |connection: &Connection| {
            connection.pragma_query_value(None, "freelist_count", |row| row.get::<_, i64>(0))
        };
        // Allocates free pages, fills them with zeros, and frees them. Other processes may free more meanwhile.
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

/// Erases the stored text of a forgotten conversation, and settles its events. It can be repeated.
pub(super) fn erase(
    transaction: &Transaction<'_>,
    conversation: ConversationId,
    now: Millis,
) -> Result<()> {
    settle(transaction, conversation, now)?;
    // Retention drops an event by its delivery. Dead letters and waiting retried events have none.
    transaction
        .prepare_cached(
            "INSERT INTO deliveries (conversation, from_event, through, delivered_at, effect)
             SELECT conversation, id, id, ?2, 'forgotten' FROM events e WHERE conversation = ?1 AND NOT EXISTS (
                SELECT 1 FROM deliveries WHERE conversation = ?1 AND e.id BETWEEN from_event AND through)",
        )?
        .execute(params![conversation, now])?;
    for sql in [
        "UPDATE conversations SET waiting = 0, waiting_since = NULL, due_at = NULL, verified_in = NULL, drift = NULL,
            missing = NULL WHERE id = ?1",
        "UPDATE events SET data = NULL WHERE conversation = ?1 AND data IS NOT NULL",
        "DELETE FROM attempts WHERE conversation = ?1",
        "DELETE FROM dead_letters WHERE conversation = ?1",
        "DELETE FROM redeliveries WHERE conversation = ?1",
        "DELETE FROM credits WHERE conversation = ?1",
        "DELETE FROM requested_chats WHERE conversation = ?1",
        // A reason may quote an event that could not be parsed.
        "UPDATE resolutions SET reason = '' WHERE event IN (SELECT id FROM events WHERE conversation = ?1)
            OR conversation = (SELECT bigchat_id FROM conversations WHERE id = ?1)
                AND NOT EXISTS (SELECT 1 FROM events WHERE id = resolutions.event)",
    ] {
        transaction.prepare_cached(sql)?.execute([conversation])?;
    }
    Ok(())
}

/// Moves the offset of a forgotten conversation past all its events. For the retention period, they count as delivered
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
        .execute(params![conversation, from, through, now])?;
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

/// Erases an event that could not be parsed. It stays as a discarded dead letter, so that it is recognized if it is
/// received again.
pub(super) fn erase_unparsed(
    transaction: &Transaction<'_>,
    event: EventId,
    now: Millis,
) -> Result<()> {
    transaction.execute(
        "UPDATE dead_letters SET discarded_at = coalesce(discarded_at, ?2) WHERE event = ?1",
        params![event, now],
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

/// Events that could not be parsed but name that conversation, and their epochs.
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

/// Erases a conversation from the ingested pages of the unfinished window. From then on, these pages serve only for
/// counting. Returns whether the conversation is on a page that is not ingested yet.
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

/// The page, with the conversation's events replaced by their keys. `None`: it has none of them.
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
