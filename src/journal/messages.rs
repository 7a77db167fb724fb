//! The recorded messages of a conversation, and the identity of its chat.

use rusqlite::params;

use super::{Result, Store, payload};
use crate::domain::account::{MessageKey, MessageState, Recorded};
use crate::domain::event::EventKind;
use crate::domain::ids::{ConversationId, Epoch, EventId};
use crate::domain::time::Timestamp;

impl Store {
    /// The messages of a conversation in order of arrival, each with its [`MessageState`]. Waiting messages up to
    /// `replay_until` may have been sent. Messages delivered before the chat was lost may still be in OurAPI if the
    /// loss is false.
    pub fn recorded_messages(
        &mut self,
        conversation: ConversationId,
        replay_until: EventId,
    ) -> Result<Vec<Recorded>> {
        let mut statement = self.connection.prepare_cached(
            "SELECT e.id, e.kind, e.event_at, e.data, e.id > c.offset OR r.event IS NOT NULL, d.event IS NOT NULL,
                d.discarded_at IS NOT NULL, coalesce(a.outcome_unknown, 0)
                    OR d.event IS NULL AND e.id > c.offset AND e.id <= c.restored_through
             FROM events e JOIN conversations c ON c.id = e.conversation
             LEFT JOIN redeliveries r ON r.conversation = e.conversation AND r.event = e.id
             LEFT JOIN dead_letters d ON d.event = e.id LEFT JOIN attempts a ON a.event = e.id
             WHERE e.conversation = ?1 ORDER BY e.id",
        )?;
        let mut rows = statement.query([conversation])?;
        let mut messages = Vec::new();
        while let Some(row) = rows.next()? {
            let name = row.get_ref(1)?.as_str().unwrap_or_default();
            if !EventKind::from_name(name).is_some_and(EventKind::is_message) {
                continue;
            }
            let data: Option<String> = row.get(3)?;
            let payload = payload(name, data.as_deref())?;
            let id: EventId = row.get(0)?;
            let (waits, is_dead, is_discarded, outcome_unknown) =
                (row.get(4)?, row.get(5)?, row.get(6)?, row.get(7)?);
            let state = match (is_dead, is_discarded, waits, outcome_unknown) {
                (true, false, _, true) => MessageState::DeadOutcomeUnknown,
                (true, true, _, true) => MessageState::DiscardedOutcomeUnknown,
                (true, ..) => MessageState::NotSent,
                (false, _, false, _) => MessageState::Delivered,
                (false, _, true, true) => MessageState::OutcomeUnknown,
                (false, _, true, false) if id <= replay_until => MessageState::MaybeSent,
                (false, _, true, false) => MessageState::NotSent,
            };
            messages.push(Recorded {
                id,
                key: MessageKey::new(row.get(2)?, payload.text().unwrap_or_default()),
                state,
            });
        }
        Ok(messages)
    }

    /// The earliest event time of a conversation.
    pub fn earliest_event(&mut self, conversation: ConversationId) -> Result<Option<Timestamp>> {
        Ok(self
            .connection
            .prepare_cached("SELECT min(event_at) FROM events WHERE conversation = ?1")?
            .query_row([conversation], |row| row.get(0))?)
    }

    /// Whether BigChat gave the id to another conversation in an earlier epoch.
    pub fn id_was_used_before(&mut self, epoch: Epoch, bigchat_id: i64) -> Result<bool> {
        Ok(self
            .connection
            .prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM conversations c WHERE c.bigchat_id = ?1 AND c.epoch < ?2
                    AND (c.external_id IS NOT NULL OR EXISTS (SELECT 1 FROM events e WHERE e.conversation = c.id)))",
            )?
            .query_row(params![bigchat_id, epoch], |row| row.get(0))?)
    }

    /// Records the external id and start time with which a chat is about to be created.
    pub fn record_intent(
        &mut self,
        conversation: ConversationId,
        external_id: &str,
        started_at: Timestamp,
    ) -> Result<()> {
        self.connection.execute(
            "UPDATE conversations SET external_id = ?2, chat_started_at = ?3 WHERE id = ?1",
            params![conversation, external_id, started_at],
        )?;
        Ok(())
    }
}
