//! What is known of the chat of a conversation, and of the messages OurAPI holds in it.

use std::collections::HashSet;

use rusqlite::{Connection, OptionalExtension, params};

use super::minutes::Counts;
use super::settlements::Deliveries;
use super::{JournalError, Result, Store};
use crate::conversation::{Conversation, Sent};
use crate::event::{Kind, What};
use crate::messages::{self, MessageKey, Standing};
use crate::time::{Millis, Timestamp};

impl Store {
    /// The earliest time any event of a conversation tells.
    pub fn earliest(&mut self, conversation: i64) -> Result<Option<Timestamp>> {
        let earliest: Option<i64> = self
            .connection
            .prepare_cached("SELECT min(event_at) FROM events WHERE conversation = ?1")?
            .query_row([conversation], |row| row.get(0))?;
        Ok(earliest.map(Timestamp::clamped))
    }

    /// Whether another conversation of that id was told of in an earlier run of BigChat.
    pub fn id_was_used(&mut self, conversation: &Conversation) -> Result<bool> {
        Ok(self
            .connection
            .prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM conversations c WHERE c.bigchat_id = ?1 AND c.epoch < ?2
                    AND (c.external_id IS NOT NULL OR EXISTS (SELECT 1 FROM events e WHERE e.conversation = c.id)))",
            )?
            .query_row([conversation.bigchat_id, conversation.epoch], |row| row.get(0))?)
    }

    /// Keeps the external id and start time a chat is about to be created with, where they could not be worked out
    /// again: whether the chat is ours could not be told if the answer were lost.
    pub fn note_creation(
        &mut self,
        conversation: i64,
        external_id: &str,
        started_at: Timestamp,
    ) -> Result<()> {
        self.connection.execute(
            "UPDATE conversations SET external_id = ?2, chat_started_at = ?3 WHERE id = ?1",
            params![conversation, external_id, started_at.unix()],
        )?;
        Ok(())
    }

    /// OurAPI has lost the chat of a conversation. If `again`, its messages are to be delivered again; `in_doubt`:
    /// there is another chat in its place, which may hold some of them.
    pub fn chat_replaced(&mut self, conversation: i64, again: bool, in_doubt: bool) -> Result<()> {
        let transaction = self.begin()?;
        transaction.execute("DELETE FROM found WHERE conversation = ?1", [conversation])?;
        if again && in_doubt {
            transaction.execute(
                "INSERT INTO attempts (event, in_doubt)
                 SELECT id, 1 FROM events WHERE conversation = ?1 AND name = 'MESSAGE' AND state IN ('delivered', 'waiting')
                 ON CONFLICT (event) DO UPDATE SET in_doubt = 1",
                [conversation],
            )?;
        }
        if again {
            transaction.execute(
                "UPDATE events SET state = 'waiting', settled_at = NULL
                 WHERE conversation = ?1 AND name = 'MESSAGE' AND state = 'delivered'",
                [conversation],
            )?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// Compares the messages OurAPI holds for a conversation with those the journal has. Those that wait, may stand
    /// there (in doubt, or not after `up_to`) and do are delivered; which these are is returned. What OurAPI holds
    /// beyond is remembered for what BigChat may tell again.
    pub fn note_look_up(
        &mut self,
        conversation: i64,
        held: Vec<MessageKey>,
        up_to: i64,
        session: i64,
        now: Millis,
    ) -> Result<HashSet<i64>> {
        let transaction = self.begin()?;
        let journal = messages_of(&transaction, conversation, up_to)?;
        let result = messages::look_up(held, &journal);
        let mut counts = Counts::default();
        let mut delivery = Deliveries::of(&transaction, now)?;
        for id in &result.there {
            delivery.note(*id, Kind::Message, Sent::Nothing, &mut counts)?;
        }
        drop(delivery);
        counts.keep(&transaction, now)?;
        for id in &result.missing {
            transaction
                .prepare_cached("UPDATE attempts SET in_doubt = 0 WHERE event = ?1")?
                .execute([id])?;
        }
        transaction
            .prepare_cached("DELETE FROM found WHERE conversation = ?1")?
            .execute([conversation])?;
        for ((sent_at, text), count) in &result.beyond {
            transaction
                .prepare_cached("INSERT INTO found (conversation, sent_at, text, count) VALUES (?1, ?2, ?3, ?4)")?
                .execute(params![conversation, sent_at.unix(), text, count])?;
        }
        transaction
            .prepare_cached("UPDATE conversations SET looked_up = ?2 WHERE id = ?1")?
            .execute([conversation, session])?;
        transaction.commit()?;
        Ok(result.there.into_iter().collect())
    }

    /// Whether OurAPI was found to hold such a message that no event accounted for; from now on this one does.
    pub fn take_found(
        &mut self,
        conversation: i64,
        event: i64,
        key: &MessageKey,
        now: Millis,
    ) -> Result<bool> {
        let transaction = self.begin()?;
        let left: Option<i64> = transaction
            .prepare_cached(
                "SELECT count FROM found WHERE conversation = ?1 AND sent_at = ?2 AND text = ?3",
            )?
            .query_row(params![conversation, key.0.unix(), key.1], |row| row.get(0))
            .optional()?;
        let Some(left) = left else { return Ok(false) };
        let statement = if left > 1 {
            "UPDATE found SET count = count - 1 WHERE conversation = ?1 AND sent_at = ?2 AND text = ?3"
        } else {
            "DELETE FROM found WHERE conversation = ?1 AND sent_at = ?2 AND text = ?3"
        };
        transaction.prepare_cached(statement)?.execute(params![
            conversation,
            key.0.unix(),
            key.1
        ])?;
        let mut counts = Counts::default();
        Deliveries::of(&transaction, now)?.note(
            event,
            Kind::Message,
            Sent::Nothing,
            &mut counts,
        )?;
        counts.keep(&transaction, now)?;
        transaction.commit()?;
        Ok(true)
    }
}

/// The messages of a conversation that are delivered or wait, in order of arrival.
pub(super) fn messages_of(
    connection: &Connection,
    conversation: i64,
    up_to: i64,
) -> Result<Vec<(i64, MessageKey, Standing)>> {
    let mut statement = connection.prepare_cached(
        "SELECT e.id, e.event_at, e.data, e.state = 'delivered', coalesce(a.in_doubt, 0)
         FROM events e LEFT JOIN attempts a ON a.event = e.id
         WHERE e.conversation = ?1 AND e.name = 'MESSAGE' AND e.state IN ('delivered', 'waiting') ORDER BY e.id",
    )?;
    let mut rows = statement.query([conversation])?;
    let mut messages = Vec::new();
    while let Some(row) = rows.next()? {
        let id: i64 = row.get(0)?;
        let data: Option<String> = row.get(2)?;
        let What::Message { text } = What::from_data(Kind::Message, data.as_deref())
            .map_err(|error| JournalError::Corrupt(error.to_string()))?
        else {
            continue;
        };
        let standing = match (row.get(3)?, row.get(4)?) {
            (true, _) => Standing::Delivered,
            (false, true) => Standing::MayBeThere,
            (false, false) if id <= up_to => Standing::MayBeThere,
            (false, false) => Standing::New,
        };
        messages.push((
            id,
            messages::key(Timestamp::clamped(row.get(1)?), &text),
            standing,
        ));
    }
    Ok(messages)
}
