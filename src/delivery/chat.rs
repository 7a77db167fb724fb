//! The chat of a conversation: the fields it should have, its external id, and its creation.

use uuid::Uuid;

use super::attempts::AttemptError;
use super::handlers;
use super::worker::Worker;
use crate::bigchat::details;
use crate::domain::conversation::{Conversation, Desired, Details, Fields, Pending};
use crate::domain::time::Timestamp;
use crate::http::route::Route;
use crate::http::{ErrorKind, Resource};
use crate::our_api::{self, NewChat};

/// Reads the conversation's details before its chat is created, unless its events say all that they do: when it started
/// and who has it.
pub(super) async fn read_details(
    worker: &Worker,
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
        details::read(&worker.source, conversation).await?;
    }
    Ok(())
}

/// The fields that the chat should have. `changes` are folded into what is desired; `earliest`: of all events at hand.
pub(super) async fn fields(
    worker: &Worker,
    conversation: &Conversation,
    desired: &Desired,
    changes: &[Pending],
    earliest: Option<Timestamp>,
) -> Result<Fields, AttemptError> {
    let observed = &conversation.observed;
    let started_at = match (desired.started_at, observed.started_at) {
        (Some(started_at), _) => started_at,
        // Only the events tell.
        (None, Some(before)) => earliest.map_or(before, |earliest| before.min(earliest)),
        (None, None) => {
            let id = conversation.id;
            let known = worker
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
    // Another client, or a newer copy of the journal, may have changed the agent since that advisor's was written: what an
    // event says is written all the same.
    let latest = desired.transfer.map(|transfer| transfer.event);
    let is_named = changes.iter().any(|event| Some(event.id) == latest);
    let agent = match desired.advisor() {
        // What is known needs no look-up.
        advisor if observed.agent.is_some() && observed.advisor == advisor && !is_named => {
            observed.agent
        }
        Some(advisor) => worker.agents.resolve(conversation.epoch, advisor).await?,
        None => observed.agent,
    };
    Ok(Fields {
        started_at,
        ended_at: desired.ended_at,
        agent,
    })
}

/// Where a conversation's chat came from.
pub(super) enum Created {
    New,
    /// It existed already, and was taken over.
    Adopted(Uuid),
}

/// Creates the chat with these fields, or takes over the one that exists. Where only events tell when it started, it starts
/// as was intended first: it may have been created so already, and is known for its own by nothing else.
pub(super) async fn create(
    worker: &Worker,
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
        choose_external_id(worker, conversation, desired, fields.started_at).await?;
    loop {
        let new = NewChat {
            external_id: &external_id,
            started_at: fields.started_at,
            ended_at: fields.ended_at,
            agent_id: fields.agent,
        };
        let error = match worker.our_api.create_chat(&new).await {
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
                return Err(worker.agents.missing(fields.agent, error).await);
            }
            _ => return Err(AttemptError::Write(error)),
        }
        match worker.our_api.chat(&external_id).await? {
            // Taken, yet not listed: what answers is not OurAPI, or not all of it.
            None => {
                let http = worker.our_api.http();
                let kind = ErrorKind::WrongService;
                return Err(http.reconsider(error, Route::CreateChat, kind).into());
            }
            Some(found) if is_ours(conversation, fields, &found) => {
                let observed = &mut conversation.observed;
                observed.adopt(external_id, found.chat_id, &found.fields(), desired);
                return Ok(Created::Adopted(found.chat_id));
            }
            Some(found) => {
                let longer = with_start(worker, conversation, fields.started_at);
                if longer == external_id {
                    return Err(AttemptError::Write(error.with_kind(ErrorKind::Rejected)));
                }
                tracing::warn!(
                    conversation = conversation.bigchat_id, %external_id, started_at = %found.started_at,
                    "OurAPI has a chat of another conversation with this id; the start time is added to it"
                );
                record_intent(worker, conversation, &longer, fields.started_at).await?;
                external_id = longer;
            }
        }
    }
}

/// The start time together with the id is the identity. It may be the one with which the chat was created before a better
/// one was known.
fn is_ours(conversation: &Conversation, fields: &Fields, found: &our_api::Chat) -> bool {
    found.started_at == fields.started_at
        || conversation.observed.started_at == Some(found.started_at)
}

/// The conversation's id, after the prefix; with its start time if the id was used before.
async fn choose_external_id(
    worker: &Worker,
    conversation: &mut Conversation,
    desired: &Desired,
    started_at: Timestamp,
) -> Result<String, AttemptError> {
    if let Some(chosen) = conversation.observed.external_id.clone() {
        return Ok(chosen);
    }
    let (epoch, bigchat_id) = (conversation.epoch, conversation.bigchat_id);
    let used = epoch.0 > 1
        && worker
            .journal
            .with(move |store| store.id_was_used_before(epoch, bigchat_id))
            .await?;
    let chosen = if used {
        with_start(worker, conversation, started_at)
    } else {
        plain(worker, conversation)
    };
    if used || desired.started_at.is_none() {
        record_intent(worker, conversation, &chosen, started_at).await?;
    }
    Ok(chosen)
}

fn plain(worker: &Worker, conversation: &Conversation) -> String {
    format!(
        "{}{}",
        worker.settings.external_id_prefix, conversation.bigchat_id
    )
}

fn with_start(worker: &Worker, conversation: &Conversation, started_at: Timestamp) -> String {
    format!("{}@{started_at}", plain(worker, conversation))
}

/// Stores the identity with which a chat is about to be created, if it could not be worked out again: after a lost answer
/// nothing else tells whose the chat is.
async fn record_intent(
    worker: &Worker,
    conversation: &mut Conversation,
    external_id: &str,
    started_at: Timestamp,
) -> Result<(), AttemptError> {
    let (id, stored) = (conversation.id, external_id.to_owned());
    worker
        .journal
        .with(move |store| store.record_intent(id, &stored, started_at))
        .await?;
    conversation.observed.external_id = Some(external_id.to_owned());
    conversation.observed.started_at = Some(started_at);
    Ok(())
}
