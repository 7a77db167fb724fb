//! START: the conversation's details, its advisor, the advisor's agent, and the chat with that agent and start time.

use crate::conversation::{Conversation, Waiting};

/// What a START says: when the conversation started. Who has it is in its details.
pub(super) fn apply(conversation: &mut Conversation, event: &Waiting) {
    conversation.started_at.get_or_insert(event.at);
}
