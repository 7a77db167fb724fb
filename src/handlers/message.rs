//! MESSAGE: the message is added to the chat; first it is looked for, if it may stand there already.

use std::collections::HashSet;

use crate::context::Context;
use crate::conversation::{Chat, Conversation, Waiting};
use crate::event::What;
use crate::messages;
use crate::our_api::{MessageTarget, NewMessage, Trouble};
use crate::resolve::chat;
use crate::setback::Setback;
use crate::settings::MessageAuthor;
use crate::time::Millis;

/// Looks up which of the chat's messages stand there already, if any of these may: one in doubt, or told before the
/// daemon started and not looked for since. Returns the events found, or `None` where there was no need to look.
pub(super) async fn look_up(
    context: &Context,
    conversation: &mut Conversation,
    events: &[Waiting],
) -> Result<Option<HashSet<i64>>, Setback> {
    let looked_up = conversation.chat.looked_up == context.session.id;
    let found = conversation.chat.looked_up == Chat::FOUND;
    let needed = events.iter().any(|event| {
        found || event.attempts.in_doubt || (context.may_be_there(event.id) && !looked_up)
    });
    let Some(chat) = conversation.chat.id.filter(|_| needed) else {
        return Ok(None);
    };
    let held = match context.our_api.messages(chat).await {
        Ok(held) => held,
        Err(error) if error.trouble == Trouble::NoSuchChat => {
            return Err(chat::missing(context, conversation, error).await);
        }
        Err(error) => return Err(error.into()),
    };
    let held = messages::keys(&held);
    let up_to = if found {
        i64::MAX
    } else {
        context.look_up_through()
    };
    let (id, session) = (conversation.id, context.session.id);
    let there = context
        .journal
        .with(move |store| store.note_look_up(id, held, up_to, session, Millis::now()))
        .await?;
    conversation.chat.looked_up = session;
    Ok(Some(there))
}

/// Adds a message to its conversation's chat, whose `target` it goes to, unless it stands there: `looked_up` is what a
/// look-up just found. Returns how many writes it took.
pub(super) async fn deliver(
    context: &Context,
    conversation: &mut Conversation,
    target: &MessageTarget,
    event: &Waiting,
    looked_up: Option<&HashSet<i64>>,
) -> Result<u32, Setback> {
    let What::Message { text } = &event.what else {
        return Ok(0);
    };
    match looked_up {
        Some(there) if there.contains(&event.id) => return Ok(0),
        None if conversation.chat.holds_more && context.may_be_there(event.id) => {
            // An earlier look-up in this session may have found it, before BigChat told of it again.
            let key = messages::key(event.at, text);
            let (id, event) = (conversation.id, event.id);
            if context
                .journal
                .with(move |store| store.take_found(id, event, &key, Millis::now()))
                .await?
            {
                return Ok(0);
            }
        }
        _ => {}
    }
    let author = match context.settings.message_author {
        MessageAuthor::None => None,
        MessageAuthor::Agent => conversation.chat.agent,
    };
    let message = NewMessage {
        sent_at: event.at,
        text,
        agent_id: author,
    };
    match context.our_api.add_message(target, &message).await {
        Ok(()) => Ok(1),
        Err(error) => Err(match error.trouble {
            Trouble::NoSuchChat => chat::missing(context, conversation, error).await,
            Trouble::NoSuchAgent => chat::without_agent(context, conversation, author, error).await,
            _ => Setback::of_write(error),
        }),
    }
}
