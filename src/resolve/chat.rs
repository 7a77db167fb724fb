//! Which chat a conversation is: known, found by external id, or created; and brought to what it should be.

use uuid::Uuid;

use crate::context::Context;
use crate::conversation::{Chat, Conversation, DetailsState, Wanted};
use crate::our_api::{self, NewChat, OurApiError, Trouble};
use crate::resolve::{agent, details};
use crate::setback::Setback;
use crate::time::Timestamp;

/// How a chat's agent is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Agent {
    /// As it is known: without a TRANSFER, a chat keeps the agent it has.
    Known,
    /// From the advisor, since agents may have been lost.
    Anew,
}

/// What another, later copy of the database may have known of a chat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hindsight {
    /// Whether it may have known what the events in hand tell, and more.
    pub possible: bool,
    /// Whether these tell who has the conversation.
    pub transfer: bool,
}

/// Brings the chat of a conversation to what its events say: creates it where there is none, changes what differs,
/// asks for nothing where nothing does. `earliest` is the earliest time the events in hand tell. Returns how many
/// writes that took.
pub async fn reconcile(
    context: &Context,
    conversation: &mut Conversation,
    agent: Agent,
    earliest: Option<Timestamp>,
    hindsight: Hindsight,
) -> Result<u32, Setback> {
    if conversation.chat.id.is_none() && needs_details(conversation) {
        details::read(context, conversation).await?;
    }
    let wanted = wanted(context, conversation, agent, earliest).await?;
    let look = hindsight.possible && !context.looked_at_chats().contains(&conversation.id);
    match conversation.chat.id {
        Some(_) if look => {
            let wanted = look_at(context, conversation, hindsight, wanted).await?;
            change(context, conversation, &wanted).await
        }
        Some(_) => change(context, conversation, &wanted).await,
        None => {
            let writes = create(context, conversation, &wanted).await?;
            if look {
                context.looked_at_chats().insert(conversation.id);
            }
            Ok(writes)
        }
    }
}

/// The details tell when a conversation started and who had it first; once its events tell both they are not needed.
fn needs_details(conversation: &Conversation) -> bool {
    let told = conversation.started_at.is_some() && conversation.said.transfer.is_some();
    conversation.details == DetailsState::Unread && !told
}

async fn wanted(
    context: &Context,
    conversation: &Conversation,
    agent: Agent,
    earliest: Option<Timestamp>,
) -> Result<Wanted, Setback> {
    let started_at = match (conversation.started_at, conversation.chat.started_at) {
        (Some(started_at), _) => started_at,
        // Nobody knows better than its events.
        (None, Some(before)) => earliest.map_or(before, |earliest| before.min(earliest)),
        (None, None) => {
            let id = conversation.id;
            let known = context
                .journal
                .with(move |store| store.earliest(id))
                .await?;
            known
                .into_iter()
                .chain(earliest)
                .min()
                .unwrap_or_else(Timestamp::of_this_machine)
        }
    };
    let advisor = conversation.said.advisor().or(conversation.first_advisor);
    let agent = match advisor {
        _ if agent == Agent::Known && keeps_agent(conversation) => conversation.chat.agent,
        Some(advisor) => agent::resolve(context, conversation.epoch, advisor).await?,
        None => conversation
            .chat
            .agent
            .filter(|_| keeps_agent(conversation)),
    };
    Ok(Wanted {
        started_at,
        ended_at: conversation.said.ended_at,
        agent,
    })
}

/// OurAPI says that an agent does not exist. If that is so, the chat has none until it gets its own again.
pub async fn without_agent(
    context: &Context,
    conversation: &mut Conversation,
    agent: Option<Uuid>,
    error: OurApiError,
) -> Setback {
    let setback = agent::missing(context, agent, error).await;
    if matches!(setback, Setback::Rebuilding(_)) {
        conversation.chat.agent = None;
        conversation.chat.unsure = true;
    }
    setback
}

/// Details never undo a TRANSFER, be it one that only another copy of the database knows of.
fn keeps_agent(conversation: &Conversation) -> bool {
    let Conversation { said, chat, .. } = conversation;
    said.transfer.is_none() && chat.id.is_some() && chat.agent.is_some()
}

/// Before a chat is changed by what a later copy of the database may have known as well: looks how it stands. What
/// stands there already is not sent again, and a later END not set back. Of what the events in hand do not change it
/// stays as it is.
async fn look_at(
    context: &Context,
    conversation: &mut Conversation,
    hindsight: Hindsight,
    wanted: Wanted,
) -> Result<Wanted, Setback> {
    let chat = &conversation.chat;
    let Some(external_id) = chat
        .external_id
        .as_deref()
        .filter(|_| hindsight.transfer || !chat.change_to(&wanted).is_empty())
    else {
        return Ok(wanted);
    };
    let Some(found) = context
        .our_api
        .chat(external_id)
        .await?
        .filter(|found| Some(found.chat_id) == chat.id)
    else {
        // The change itself will tell.
        return Ok(wanted);
    };
    let Conversation { chat, said, .. } = conversation;
    if chat.started_at != Some(wanted.started_at) {
        chat.started_at = Some(found.started_at);
    }
    if hindsight.transfer || chat.agent != wanted.agent {
        chat.agent = found.agent_id;
    }
    if chat.agent == found.agent_id {
        context.looked_at_chats().insert(conversation.id);
    }
    chat.ended_at = found.ended_at;
    chat.unsure = false;
    said.ended_at = said.ended_at.max(found.ended_at);
    Ok(Wanted {
        ended_at: said.ended_at,
        ..wanted
    })
}

async fn change(
    context: &Context,
    conversation: &mut Conversation,
    wanted: &Wanted,
) -> Result<u32, Setback> {
    let change = conversation.chat.change_to(wanted);
    let Some(chat) = conversation.chat.id.filter(|_| !change.is_empty()) else {
        return Ok(0);
    };
    match context.our_api.change_chat(chat, &change).await {
        Ok(()) => {
            conversation.chat.is_now(wanted);
            Ok(1)
        }
        Err(error) => match error.trouble {
            Trouble::NoSuchChat => Err(missing(context, conversation, error).await),
            Trouble::NoSuchAgent => {
                Err(without_agent(context, conversation, wanted.agent, error).await)
            }
            _ => Err(Setback::of_write(error)),
        },
    }
}

async fn create(
    context: &Context,
    conversation: &mut Conversation,
    wanted: &Wanted,
) -> Result<u32, Setback> {
    let mut external_id = choose_external_id(context, conversation, wanted.started_at).await?;
    if conversation.chat.unsure
        && let Some(found) = context.our_api.chat(&external_id).await?
        && is_ours(conversation, wanted, &found)
    {
        return change_adopted(context, conversation, external_id, found, wanted).await;
    }
    loop {
        let new = NewChat {
            external_id: &external_id,
            started_at: wanted.started_at,
            ended_at: wanted.ended_at,
            agent_id: wanted.agent,
        };
        let losses = context.losses();
        let error = match context.our_api.create_chat(&new).await {
            Ok(created) => {
                adopt(conversation, external_id, created);
                conversation.chat.is_now(wanted);
                // Nothing is in it that could be doubled.
                conversation.chat.looked_up = context.session.id;
                conversation.chat.seen = losses;
                return Ok(1);
            }
            Err(error) => error,
        };
        match error.trouble {
            Trouble::Conflict => {}
            Trouble::NoSuchAgent => return Err(agent::missing(context, wanted.agent, error).await),
            _ => return Err(Setback::of_write(error)),
        }
        match context.our_api.chat(&external_id).await? {
            // Taken, and not there: what answers is not OurAPI, or not all of it.
            None => {
                return Err(error.but(Trouble::NotOurApi).into());
            }
            Some(found) if is_ours(conversation, wanted, &found) => {
                return change_adopted(context, conversation, external_id, found, wanted).await;
            }
            Some(found) => {
                let longer = with_start(context, conversation, wanted.started_at);
                if longer == external_id {
                    return Err(Setback::of_write(error.but(Trouble::Refused)));
                }
                tracing::warn!(
                    conversation = conversation.bigchat_id, %external_id, started_at = %found.started_at,
                    "OurAPI has another conversation of that id: this one's chat gets its start time added"
                );
                keep_choice(context, conversation, &longer, wanted.started_at).await?;
                external_id = longer;
            }
        }
    }
}

/// Takes a chat that stands in OurAPI already for the conversation's own, and changes what its events say otherwise.
async fn change_adopted(
    context: &Context,
    conversation: &mut Conversation,
    external_id: String,
    found: our_api::Chat,
    wanted: &Wanted,
) -> Result<u32, Setback> {
    adopt(conversation, external_id, found);
    let kept = keeps_agent(conversation).then_some(conversation.chat.agent);
    let wanted = Wanted {
        ended_at: conversation.said.ended_at,
        agent: kept.unwrap_or(wanted.agent),
        ..*wanted
    };
    change(context, conversation, &wanted).await
}

/// The id of the conversation, after the prefix; with its start time where the id was used before. Kept before it
/// is used, where it could not be worked out again.
async fn choose_external_id(
    context: &Context,
    conversation: &mut Conversation,
    started_at: Timestamp,
) -> Result<String, Setback> {
    if let Some(chosen) = &conversation.chat.external_id {
        return Ok(chosen.clone());
    }
    let asked = conversation.clone();
    let used = conversation.epoch > 1
        && context
            .journal
            .with(move |store| store.id_was_used(&asked))
            .await?;
    if used {
        let chosen = with_start(context, conversation, started_at);
        keep_choice(context, conversation, &chosen, started_at).await?;
        return Ok(chosen);
    }
    let chosen = plain(context, conversation);
    if conversation.started_at.is_none() {
        keep_choice(context, conversation, &chosen, started_at).await?;
    }
    Ok(chosen)
}

fn plain(context: &Context, conversation: &Conversation) -> String {
    format!(
        "{}{}",
        context.settings.external_id_prefix, conversation.bigchat_id
    )
}

fn with_start(context: &Context, conversation: &Conversation, started_at: Timestamp) -> String {
    format!("{}@{started_at}", plain(context, conversation))
}

async fn keep_choice(
    context: &Context,
    conversation: &mut Conversation,
    external_id: &str,
    started_at: Timestamp,
) -> Result<(), Setback> {
    let (id, kept) = (conversation.id, external_id.to_owned());
    context
        .journal
        .with(move |store| store.note_creation(id, &kept, started_at))
        .await?;
    conversation.chat.external_id = Some(external_id.to_owned());
    conversation.chat.started_at = Some(started_at);
    Ok(())
}

/// (id, start time) is the identity; the start time may be the one it was created with before a better one was known.
fn is_ours(conversation: &Conversation, wanted: &Wanted, found: &our_api::Chat) -> bool {
    found.started_at == wanted.started_at || conversation.chat.started_at == Some(found.started_at)
}

fn adopt(conversation: &mut Conversation, external_id: String, found: our_api::Chat) {
    let kept = &conversation.chat;
    conversation.chat = Chat {
        external_id: Some(external_id),
        id: Some(found.chat_id),
        started_at: Some(found.started_at),
        ended_at: found.ended_at,
        agent: found.agent_id,
        unsure: false,
        seen: kept.seen,
        looked_up: Chat::FOUND,
        holds_more: conversation.chat.holds_more,
    };
    // An END that another copy of the database had delivered counts as well.
    conversation.said.ended_at = conversation.said.ended_at.max(found.ended_at);
}

/// Looks whether the chat is still there, and as it is known to be. If it is not there and `again`, its messages wait
/// again.
pub async fn verify(
    context: &Context,
    conversation: &mut Conversation,
    again: bool,
) -> Result<(), Setback> {
    let (Some(id), Some(external_id)) =
        (conversation.chat.id, conversation.chat.external_id.clone())
    else {
        return Ok(());
    };
    match context.our_api.chat(&external_id).await? {
        Some(found) if found.chat_id == id => {
            let looked_up = conversation.chat.looked_up;
            adopt(conversation, external_id, found);
            conversation.chat.looked_up = looked_up;
        }
        found => replace(context, conversation, found, again).await?,
    }
    Ok(())
}

/// OurAPI says that a chat is not there. Believed only when the list of its chats, asked for it, answers without it.
pub async fn missing(
    context: &Context,
    conversation: &mut Conversation,
    error: OurApiError,
) -> Setback {
    let external_id = conversation.chat.external_id.clone().unwrap_or_default();
    match context.our_api.chat(&external_id).await {
        Ok(Some(found)) if Some(found.chat_id) == conversation.chat.id => {
            // It is there all the same.
            Setback::of_write(error.but(Trouble::Unknown))
        }
        Ok(found) => match lost(context, conversation, found).await {
            Ok(()) => Setback::Rebuilding("OurAPI has lost the chat"),
            Err(setback) => setback,
        },
        Err(error) => error.into(),
    }
}

async fn lost(
    context: &Context,
    conversation: &mut Conversation,
    found: Option<our_api::Chat>,
) -> Result<(), Setback> {
    tracing::error!(
        conversation = conversation.bigchat_id,
        chat = conversation.chat.id.map(tracing::field::display::<Uuid>),
        rebuild = context.settings.rebuild,
        "OurAPI has lost a chat"
    );
    // Unless another conversation has noticed it already.
    let news = conversation.chat.seen >= context.losses();
    if !context.settings.rebuild {
        // The agents may be gone with it; whether they are costs one request each.
        context.known_agents().clear();
    } else if news {
        context.our_api_lost_data().await?;
    }
    replace(context, conversation, found, context.settings.rebuild).await
}

/// The chat that was known is not there; `found` is what stands in its place. If `again`, its messages wait again.
async fn replace(
    context: &Context,
    conversation: &mut Conversation,
    found: Option<our_api::Chat>,
    again: bool,
) -> Result<(), Setback> {
    let (id, in_doubt) = (conversation.id, found.is_some());
    context
        .journal
        .with(move |store| store.chat_replaced(id, again, in_doubt))
        .await?;
    context.metrics.chat_was_missing();
    let external_id = conversation.chat.external_id.take();
    match (found, external_id) {
        (Some(found), Some(external_id)) => adopt(conversation, external_id, found),
        (_, external_id) => {
            let started_at = conversation.chat.started_at;
            conversation.chat = Chat {
                external_id,
                started_at,
                ..Chat::default()
            };
        }
    }
    Ok(())
}
