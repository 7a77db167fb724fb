//! The handlers: one file for each of START, END, MESSAGE and TRANSFER.
//!
//! Changes to the chat itself are folded into the desired chat, and the difference is sent as one change. Messages are
//! sent one by one, in order of arrival.

pub(super) mod end;
pub(super) mod message;
pub(super) mod start;
pub(super) mod transfer;

use crate::domain::conversation::{Desired, Pending};
use crate::domain::event::Payload;

/// Folds an event into the desired chat.
pub(super) fn fold(desired: &mut Desired, event: &Pending) {
    match &event.payload {
        Payload::Start => start::fold(desired, event),
        Payload::End => end::fold(desired, event),
        Payload::Transfer { advisor } => transfer::fold(desired, event, *advisor),
        Payload::Message { .. } => {}
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::conversation::{Attempts, Transfer};
    use crate::domain::ids::{AdvisorId, EventId};
    use crate::domain::time::{Millis, Timestamp};

    fn event(id: i64, at: i64, payload: Payload) -> Pending {
        Pending {
            id: EventId(id),
            at: Timestamp::clamped(at),
            received_at: Millis(1),
            payload,
            attempts: Attempts::default(),
            redelivery: false,
            restored: false,
            credit: None,
        }
    }

    fn payload() -> impl Strategy<Value = Payload> {
        prop_oneof![
            Just(Payload::Start),
            Just(Payload::End),
            (0_i64..9).prop_map(|advisor| Payload::Transfer { advisor }),
            Just(Payload::Message { text: "hi".into() }),
        ]
    }

    proptest! {
        #[test]
        fn fold_is_idempotent_and_order_independent(
            events in proptest::collection::vec((0_i64..4, payload()), 1..8),
            order in any::<prop::sample::Index>(),
        ) {
            let mut events: Vec<Pending> = events.into_iter().zip(1..).map(|((at, payload), id)| event(id, at, payload)).collect();
            let ends = events.iter().filter(|event| event.payload == Payload::End);
            let expected_end = ends.map(|event| event.at).max();
            let transfers = events.iter().filter_map(|event| match event.payload {
                Payload::Transfer { advisor } => Some(Transfer { at: event.at, event: event.id, advisor: AdvisorId(advisor) }),
                _ => None,
            });
            let expected_transfer = transfers.max_by_key(|transfer| (transfer.at, transfer.event));
            let first_start = events.iter().find(|event| event.payload == Payload::Start).map(|event| event.at);
            let mut desired = Desired { started_at: first_start, ..Desired::default() };
            let length = events.len();
            events.rotate_left(order.index(length));
            for event in events.iter().chain(&events) {
                fold(&mut desired, event);
            }
            prop_assert_eq!(desired.ended_at, expected_end);
            prop_assert_eq!(desired.transfer, expected_transfer);
            prop_assert_eq!(desired.started_at, first_start, "the first one received");
        }
    }
}
