//! START: the conversation gets its start time. The chat, and the agent of whoever has it first by the conversation's
//! details, follow in [`resolve::chat`](crate::resolve::chat).

use crate::conversation::{Conversation, Waiting};

/// What a START says: when the conversation started. Who has it is in its details.
pub(super) fn apply(conversation: &mut Conversation, event: &Waiting) {
    conversation.started_at.get_or_insert(event.at);
}
