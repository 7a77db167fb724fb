//! The chat of a conversation: the fields it should have, its external id, and its creation.

use uuid::Uuid;

use super::Delivery;
use super::attempts::AttemptError;
use super::handlers;
use crate::bigchat::details;
use crate::domain::conversation::{Conversation, Desired, Details, Fields, Pending};
use crate::domain::time::Timestamp;
use crate::http::route::Route;
use crate::http::{ErrorKind, Resource};
use crate::our_api::{self, NewChat};

/// Reads the conversation's details before its chat is created, unless its events give both the start and the advisor.
pub(super) async fn read_details(
    delivery: &Delivery,
    conversation: &mut Conversation,
    changes: &[Pending],
) -> Result<(), AttemptError> {
    let mut desired = conversation.desired;
    for event in changes {
        handlers::fold(&mut desired, event);
    }
    let is_complete = desired.started_at.is_some() && desired.transfer.is_some();
    if conversation.observed.chat.is_none()
        && conversation.details == Details::Unread
        && !is_complete
    {
        details::read(&delivery.source, conversation).await?;
    }
    Ok(())
}

/// The desired fields of the chat. `changes` are already folded into `desired`. `earliest` is the earliest time of all
/// claimed events. `agent_removed`: another client has changed the agent, so a chat without an agent stays without one.
pub(super) async fn fields(
    delivery: &Delivery,
    conversation: &Conversation,
    desired: &Desired,
    changes: &[Pending],
    earliest: Option<Timestamp>,
    agent_removed: bool,
) -> Result<Fields, AttemptError> {
    let observed = &conversation.observed;
    let started_at = match (desired.started_at, observed.started_at) {
        (Some(started_at), _) => started_at,
        // Without a START, the chat starts with the earliest event.
        (None, Some(before)) => earliest.map_or(before, |earliest| before.min(earliest)),
        (None, None) => {
            let id = conversation.id;
            let known = delivery
                .journal
                .with(move |store| store.earliest_event(id))
                .await?;
            known
                .into_iter()
                .chain(earliest)
                .min()
                .unwrap_or_else(Timestamp::of_this_machine)
        }
    };
    // Another client, or a newer copy of the journal, may have changed the agent meanwhile. The agent of a new TRANSFER
    // is written in any case.
    let latest = desired.transfer.map(|transfer| transfer.event);
    let is_named = changes.iter().any(|event| Some(event.id) == latest);
    let is_settled = observed.agent.is_some() || observed.chat.is_some() && agent_removed;
    let agent = match desired.advisor() {
        // The chat has the advisor's agent, or another client has removed it.
        advisor if is_settled && observed.advisor == advisor && !is_named => observed.agent,
        Some(advisor) => delivery.agents.resolve(conversation.epoch, advisor).await?,
        None => observed.agent,
    };
    Ok(Fields {
        started_at,
        ended_at: desired.ended_at,
        agent,
    })
}

pub(super) enum Created {
    New,
    /// The chat existed already.
    Adopted(Uuid),
}

/// Creates the chat with these fields, or adopts the existing one. If neither a START nor the details give the start,
/// the first intended start is used again: the chat may already have been created with it, and nothing else identifies
/// the chat.
pub(super) async fn create(
    delivery: &Delivery,
    conversation: &mut Conversation,
    desired: &Desired,
    fields: &Fields,
) -> Result<Created, AttemptError> {
    let observed = &conversation.observed;
    let intended = observed
        .started_at
        .filter(|_| observed.external_id.is_some() && desired.started_at.is_none());
    let fields = &Fields {
        started_at: intended.unwrap_or(fields.started_at),
        ..*fields
    };
    let mut external_id =
        choose_external_id(delivery, conversation, desired, fields.started_at).await?;
    loop {
        let new = NewChat {
            external_id: &external_id,
            started_at: fields.started_at,
            ended_at: fields.ended_at,
            agent_id: fields.agent,
        };
        let error = match delivery.our_api.create_chat(&new).await {
            Ok(created) => {
                let observed = &mut conversation.observed;
                observed.external_id = Some(external_id);
                observed.chat = Some(created.chat_id);
                observed.ended_at = None;
                observed.apply(fields, desired.advisor());
                return Ok(Created::New);
            }
            Err(error) => error,
        };
        match error.kind {
            ErrorKind::Conflict => {}
            ErrorKind::NotFound(Resource::Agent) => {
                return Err(delivery.agents.missing(fields.agent, error).await);
            }
            _ => return Err(AttemptError::Write(error)),
        }
        match delivery.our_api.chat(&external_id).await? {
            // The external id is taken, but no listed chat has it, so the service does not behave like OurAPI.
            None => {
                let http = delivery.our_api.http();
                let kind = ErrorKind::WrongService;
                return Err(http.reclassify(error, Route::CreateChat, kind).into());
            }
            Some(found) if is_ours(conversation, fields, &found) => {
                let observed = &mut conversation.observed;
                observed.adopt(external_id, found.chat_id, &found.fields(), desired);
                return Ok(Created::Adopted(found.chat_id));
            }
            Some(found) => {
                let extended = with_start(delivery, conversation, fields.started_at);
                if extended == external_id {
                    return Err(AttemptError::Write(error.with_kind(ErrorKind::Rejected)));
                }
                tracing::warn!(
                    conversation = conversation.bigchat_id, %external_id, started_at = %found.started_at,
                    "OurAPI has a chat of another conversation with this external id; adding the start time to the external id"
                );
                record_intent(delivery, conversation, &extended, fields.started_at).await?;
                external_id = extended;
            }
        }
    }
}

/// Whether the chat belongs to this conversation: it has the conversation's start, or the start that was intended for
/// it before the conversation's start was known.
fn is_ours(conversation: &Conversation, fields: &Fields, found: &our_api::Chat) -> bool {
    found.started_at == fields.started_at
        || conversation.observed.started_at == Some(found.started_at)
}

/// Chooses the external id: the prefix and the conversation id, with the start time if the id was used before.
async fn choose_external_id(
    delivery: &Delivery,
    conversation: &mut Conversation,
    desired: &Desired,
    started_at: Timestamp,
) -> Result<String, AttemptError> {
    if let Some(chosen) = conversation.observed.external_id.clone() {
        return Ok(chosen);
    }
    let (epoch, bigchat_id) = (conversation.epoch, conversation.bigchat_id);
    let used = epoch.0 > 1
        && delivery
            .journal
            .with(move |store| store.id_was_used_before(epoch, bigchat_id))
            .await?;
    let chosen = if used {
        with_start(delivery, conversation, started_at)
    } else {
        plain(delivery, conversation)
    };
    if used || desired.started_at.is_none() {
        record_intent(delivery, conversation, &chosen, started_at).await?;
    }
    Ok(chosen)
}

fn plain(delivery: &Delivery, conversation: &Conversation) -> String {
    format!(
        "{}{}",
        delivery.settings.external_id_prefix, conversation.bigchat_id
    )
}

fn with_start(delivery: &Delivery, conversation: &Conversation, started_at: Timestamp) -> String {
    format!("{}@{started_at}", plain(delivery, conversation))
}

/// Stores the identity of a chat before the chat is created. If the response is lost, an identity that cannot be
/// derived again would otherwise be unknown.
async fn record_intent(
    delivery: &Delivery,
    conversation: &mut Conversation,
    external_id: &str,
    started_at: Timestamp,
) -> Result<(), AttemptError> {
    let (id, stored) = (conversation.id, external_id.to_owned());
    delivery
        .journal
        .with(move |store| store.record_intent(id, &stored, started_at))
        .await?;
    conversation.observed.external_id = Some(external_id.to_owned());
    conversation.observed.started_at = Some(started_at);
    Ok(())
}
