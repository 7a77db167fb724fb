//! END: the chat gets its end time. BigChat tells it again and again for the same conversation: the latest counts,
//! and nothing after it is dropped.

use crate::conversation::{Conversation, Waiting};

/// What an END says: when the conversation ended, unless a later one is known.
pub(super) fn apply(conversation: &mut Conversation, event: &Waiting) {
    conversation.said.ended_at = conversation.said.ended_at.max(Some(event.at));
}

#[cfg(test)]
mod tests {
    use super::super::tests::{conversation, waiting};
    use super::*;
    use crate::event::What;

    #[test]
    fn the_latest_end_counts_whatever_order_they_come_in() {
        let mut conversation = conversation();
        for at in [5, 9, 7] {
            apply(&mut conversation, &waiting(at, at, What::End));
        }
        assert_eq!(conversation.said.ended_at.map(|at| at.unix()), Some(9));
    }
}
