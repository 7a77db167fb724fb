//! MESSAGE: the message is added to the chat.

use uuid::Uuid;

use crate::domain::conversation::Pending;
use crate::http::ApiError;
use crate::our_api::{NewMessage, OurApi};

/// `author`: the agent credited with the message.
pub(in crate::delivery) async fn send(
    our_api: &OurApi,
    chat: Uuid,
    event: &Pending,
    text: &str,
    author: Option<Uuid>,
) -> Result<(), ApiError> {
    let message = NewMessage {
        sent_at: event.at,
        text,
        agent_id: author,
    };
    our_api.add_message(chat, &message).await
}
