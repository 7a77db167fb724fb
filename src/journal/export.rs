//! What was delivered in a period, one delivery at a time. No transaction is open between two of them, so that an
//! export of any length, read at any pace, neither fills memory nor prevents the write-ahead log from being reset.

use rusqlite::{OptionalExtension, Row, params};
use serde::Serialize;
use serde_json::value::RawValue;

use super::{JournalError, Result, Store, payload};
use crate::domain::event::EventKind;
use crate::domain::ids::{ConversationId, Epoch, EventId};
use crate::domain::progress::Effect;
use crate::domain::time::{Millis, Timestamp};

/// A delivered event.
#[derive(Debug, Serialize)]
pub struct Exported {
    pub event: EventId,
    /// BigChat's id of the conversation, within `epoch`.
    pub conversation: i64,
    pub epoch: Epoch,
    pub kind: String,
    /// By BigChat's clock.
    pub event_at: Timestamp,
    /// The text of a message.
    pub text: Option<String>,
    /// The data of any other event, as BigChat reported it.
    pub data: Option<Box<RawValue>>,
    pub external_id: Option<String>,
    pub chat_id: Option<String>,
    /// By this machine's clock.
    pub delivered_at: Millis,
    /// What the delivery changed in OurAPI.
    pub effect: Effect,
    /// Text and data were erased.
    pub forgotten: bool,
}

/// A delivery's position in the order of export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    delivered_at: Millis,
    delivery: i64,
}

impl Position {
    /// The position before all deliveries at that time or later.
    pub fn before(time: Millis) -> Self {
        Self {
            delivered_at: Millis(time.0.saturating_sub(1)),
            delivery: i64::MAX,
        }
    }
}

impl Store {
    /// The events of the next delivery after a position and before a time, and the position of that delivery.
    pub fn delivered_after(
        &mut self,
        after: Position,
        until: Millis,
    ) -> Result<Option<(Position, Vec<Exported>)>> {
        // Both queries must see the same state.
        let transaction = self.connection.transaction()?;
        let delivery = transaction
            .prepare_cached(NEXT)?
            .query_row(params![after.delivered_at, after.delivery, until], |row| {
                Ok(Delivery {
                    id: row.get(0)?,
                    conversation: row.get(1)?,
                    from: row.get(2)?,
                    through: row.get(3)?,
                    at: row.get(4)?,
                    effect: row.get(5)?,
                })
            })
            .optional()?;
        let Some(delivery) = delivery else {
            return Ok(None);
        };
        let mut statement = transaction.prepare_cached(EVENTS)?;
        let mut rows = statement.query(params![
            delivery.conversation,
            delivery.from,
            delivery.through,
            delivery.id
        ])?;
        let mut events = Vec::new();
        while let Some(row) = rows.next()? {
            events.push(exported(row, &delivery)?);
        }
        let position = Position {
            delivered_at: delivery.at,
            delivery: delivery.id,
        };
        Ok(Some((position, events)))
    }
}

struct Delivery {
    id: i64,
    conversation: ConversationId,
    from: EventId,
    through: EventId,
    at: Millis,
    effect: Effect,
}

fn exported(row: &Row<'_>, delivery: &Delivery) -> Result<Exported> {
    let (kind, data): (String, Option<String>) = (row.get(1)?, row.get(3)?);
    let forgotten: bool = row.get(8)?;
    let is_message = EventKind::from_name(&kind).is_some_and(EventKind::is_message);
    let (text, data) = match (is_message, data) {
        (true, data) if !forgotten => {
            let payload = payload(&kind, data.as_deref())?;
            (payload.text().map(str::to_owned), None)
        }
        (_, None) | (true, _) => (None, None),
        (false, Some(data)) => {
            let invalid = |_| JournalError::InvalidRow(format!("the data of a {kind} is not JSON"));
            (None, Some(RawValue::from_string(data).map_err(invalid)?))
        }
    };
    Ok(Exported {
        event: row.get(0)?,
        conversation: row.get(4)?,
        epoch: row.get(5)?,
        kind,
        event_at: row.get(2)?,
        text,
        data,
        external_id: row.get(6)?,
        chat_id: row.get(7)?,
        delivered_at: delivery.at,
        effect: delivery.effect,
        forgotten,
    })
}

/// Excludes events that were forgotten before they were delivered.
const NEXT: &str =
    "SELECT id, conversation, from_event, through, delivered_at, effect FROM deliveries
    WHERE (delivered_at, id) > (?1, ?2) AND delivered_at < ?3 AND effect <> 'forgotten'
    ORDER BY delivered_at, id LIMIT 1";

/// SQL for the delivery of a delivered event `e`. An event that was sent again has a delivery of its own, within that
/// of the events around it.
macro_rules! delivery_of_event {
    () => {
        "(SELECT n.id FROM deliveries n WHERE n.conversation = e.conversation AND n.through >= e.id
            AND n.from_event <= e.id ORDER BY n.through, n.id DESC LIMIT 1)"
    };
}
pub(super) use delivery_of_event;

/// The events of a delivery.
const EVENTS: &str = concat!(
    "SELECT e.id, e.kind, e.event_at, e.data, c.bigchat_id, c.epoch, c.external_id, c.chat_id,
        c.forgotten_at IS NOT NULL
    FROM events e JOIN conversations c ON c.id = e.conversation
    WHERE e.conversation = ?1 AND e.id BETWEEN ?2 AND ?3 AND e.id <= c.offset
        AND NOT EXISTS (SELECT 1 FROM dead_letters d WHERE d.event = e.id)
        AND NOT EXISTS (SELECT 1 FROM redeliveries r WHERE r.conversation = e.conversation AND r.event = e.id)
        AND ?4 = ",
    delivery_of_event!(),
    " ORDER BY e.id"
);

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use super::*;

    #[test]
    fn export_scans_no_table() {
        let memory = Connection::open_in_memory().expect("a database");
        let mut store = Store::in_memory(memory, true).expect("our tables");
        for (sql, index) in [
            (NEXT, "deliveries_by_time"),
            (EVENTS, "events_of_conversation (conversation=? AND id>?"),
        ] {
            let mut statement = store
                .connection()
                .prepare(&format!("EXPLAIN QUERY PLAN {sql}"))
                .expect(sql);
            let nothing = vec![rusqlite::types::Null; statement.parameter_count()];
            let plan = statement.query_map(rusqlite::params_from_iter(nothing), |row| {
                row.get::<_, String>(3)
            });
            let plan: Vec<String> = plan.and_then(Iterator::collect).expect("a plan");
            assert!(plan.iter().any(|step| step.contains(index)), "{plan:?}");
            let walks = |step: &String| {
                // A sort is allowed only among equal keys, which are few.
                let is_sorted = step.contains("TEMP B-TREE") && !step.contains("LAST TERM");
                step.starts_with("SCAN") || is_sorted
            };
            assert!(!plan.iter().any(walks), "{plan:?}");
        }
    }
}
