//! TRANSFER: the chat gets the new advisor's agent. After the first one these are the truth about who has a
//! conversation: its details never undo one. To the advisor who has it already, there is nothing to write.

use crate::conversation::{Conversation, Transfer, Waiting};

/// What a TRANSFER says: who has the conversation, unless a later one is known. Ties go to the later arrival.
pub(super) fn apply(conversation: &mut Conversation, event: &Waiting, advisor: i64) {
    let transfer = Transfer {
        at: event.at,
        event: event.id,
        advisor,
    };
    conversation.said.transfer = conversation.said.transfer.max(Some(transfer));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::{conversation, waiting};
    use super::*;
    use crate::event::What;

    proptest! {
        #[test]
        fn the_latest_by_time_then_arrival_counts_whatever_order_they_are_delivered_in(
            transfers in proptest::collection::vec((0_i64..4, 0_i64..9), 1..8),
            order in any::<prop::sample::Index>(),
        ) {
            let expected = transfers.iter().zip(1_i64..).max_by_key(|((at, _), id)| (*at, *id)).map(|((_, advisor), _)| *advisor);
            let mut events: Vec<_> = transfers.iter().zip(1_i64..).map(|((at, advisor), id)| (*at, id, *advisor)).collect();
            let length = events.len();
            events.rotate_left(order.index(length));
            let mut conversation = conversation();
            for (at, id, advisor) in events {
                apply(&mut conversation, &waiting(id, at, What::Transfer { advisor }), advisor);
            }
            prop_assert_eq!(conversation.said.advisor(), expected);
        }
    }
}
