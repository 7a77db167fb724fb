//! Comparing a chat with the journal, since OurAPI has lost something or `bigchat-sync rebuild` asks for it: what is missing
//! is built again.

use super::Handled;
use crate::context::Context;
use crate::conversation::{ChatFound, Conversation, Finding};
use crate::journal::Store;
use crate::messages::{self, MessageKey};
use crate::our_api;
use crate::resolve::agent;
use crate::resolve::chat::{self, Agent};
use crate::setback::Setback;

/// Tells how a chat differs from what the journal says, and changes nothing.
pub(super) async fn look(
    context: &Context,
    conversation: &Conversation,
    rebuild: i64,
) -> Result<Finding, Setback> {
    let external_id = conversation.chat.external_id.as_deref().unwrap_or_default();
    let found = context.our_api.chat(external_id).await?;
    let Some(found) = found.filter(|found| Some(found.chat_id) == conversation.chat.id) else {
        return Ok(Finding {
            chat: ChatFound::Missing,
            messages: count_lost(context, conversation, Vec::new()).await?,
        });
    };
    let as_known = is_as_known(conversation, &found)
        && agent::is_there(context, rebuild, conversation.chat.agent).await?;
    let held = messages::keys(&context.our_api.messages(found.chat_id).await?);
    Ok(Finding {
        chat: if as_known {
            ChatFound::There
        } else {
            ChatFound::Differs
        },
        messages: count_lost(context, conversation, held).await?,
    })
}

/// Brings a chat to what the journal says. If `again`, messages that are missing wait again, to be delivered like any
/// others.
pub(super) async fn put_right(
    context: &Context,
    handled: &mut Handled,
    again: bool,
) -> Result<Finding, Setback> {
    let before = handled.conversation.clone();
    let delivered = count_lost(context, &before, Vec::new()).await?;
    chat::verify(context, &mut handled.conversation, again).await?;
    let writes = handled.writes;
    match handled.change_chat(context, &[], Agent::Anew, None).await {
        // What is not to be changed stays as it is, and says so when an event asks for it.
        Err(setback) if setback.is_refusal() => {}
        changed => {
            changed?;
        }
    }
    let there = handled.conversation.chat.id == before.chat.id;
    let messages = match before.chat.id.filter(|_| there) {
        None => delivered,
        Some(chat) if again && delivered > 0 => {
            let held = messages::keys(&context.our_api.messages(chat).await?);
            let id = before.id;
            let again = move |store: &mut Store| store.deliver_lost_again(id, held);
            clamped(context.journal.with(again).await?)
        }
        Some(_) => 0,
    };
    let chat = match there {
        false => ChatFound::Missing,
        true if handled.writes == writes => ChatFound::There,
        true => ChatFound::Differs,
    };
    if there && (chat == ChatFound::Differs || messages > 0) {
        context.metrics.chat_differed();
    }
    Ok(Finding { chat, messages })
}

fn is_as_known(conversation: &Conversation, found: &our_api::Chat) -> bool {
    let known = &conversation.chat;
    known.started_at == Some(found.started_at)
        && known.ended_at == found.ended_at
        && known.agent == found.agent_id
}

/// How many delivered messages are not among those held.
async fn count_lost(
    context: &Context,
    conversation: &Conversation,
    held: Vec<MessageKey>,
) -> Result<u32, Setback> {
    let id = conversation.id;
    let lost = context
        .journal
        .with(move |store| store.count_lost(id, held))
        .await?;
    Ok(clamped(lost))
}

fn clamped(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
