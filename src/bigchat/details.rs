//! What BigChat knows of a conversation or an advisor, checked before it is used: an answer of a BigChat that has
//! restarted since is about somebody else.

use super::epoch::{self, ProbeResult};
use super::{Source, SourceError};
use crate::domain::conversation::{Conversation, Details};
use crate::domain::ids::{AdvisorId, Epoch};
use crate::domain::time::Timestamp;
use crate::http::{Api, ApiError, ErrorKind};
use crate::journal::KnownAdvisor;

/// How often BigChat says that it does not know something before that is believed: for good, and one of several behind the
/// same address may only not know it yet.
const NOT_FOUND_TRIES: u32 = 3;

/// Reads a conversation's details into it: its start time and who had it first. A conversation of which BigChat
/// knows nothing any more is left with what its events say.
pub async fn read(source: &Source, conversation: &mut Conversation) -> Result<(), SourceError> {
    if !is_present(source, conversation.epoch).await? {
        conversation.details = Details::Gone;
        return Ok(());
    }
    let id = conversation.bigchat_id;
    match ask(source, || source.client.conversation(id)).await {
        Err(error) if error.is_not_found() && source.epochs.reports_events() => {
            tracing::warn!(
                conversation = conversation.bigchat_id,
                "BigChat knows nothing of the conversation any more"
            );
            conversation.details = Details::Gone;
        }
        Err(error) => return Err(error.into()),
        Ok(details) => {
            let ours = match (conversation.desired.started_at, details.started_at) {
                (Some(known), Some(told)) if known == told => true,
                (Some(_), Some(told)) => {
                    epoch::begin(source, conversation.epoch, told).await?;
                    false
                }
                // A run that began later cannot have a conversation that started before this one was confirmed.
                (None, Some(told)) if told < source.epochs.verified_until() => {
                    is_present(source, conversation.epoch).await?
                }
                _ => is_same_epoch(source, conversation.epoch).await?,
            };
            if ours {
                if conversation.desired.started_at.is_none()
                    && let Some(started_at) = details.started_at
                {
                    store(source, conversation, started_at, AdvisorId(details.advisor)).await?;
                    conversation.desired.started_at = Some(started_at);
                }
                conversation.desired.first_advisor = Some(AdvisorId(details.advisor));
                conversation.details = Details::Read;
            } else {
                conversation.details = Details::Gone;
            }
        }
    }
    Ok(())
}

/// Keeps a start time that no START has told before a chat is created with it: if that is interrupted, and BigChat has
/// forgotten the conversation by then, the chat is known for its own by nothing else.
async fn store(
    source: &Source,
    conversation: &Conversation,
    started_at: Timestamp,
    advisor: AdvisorId,
) -> Result<(), SourceError> {
    let (epoch, id) = (conversation.epoch, conversation.bigchat_id);
    let stored = source
        .journal
        .with(move |store| store.record_details(epoch, id, started_at, advisor));
    Ok(stored.await?)
}

/// What an advisor of a run of BigChat is; asked for once.
pub async fn advisor(
    source: &Source,
    epoch: Epoch,
    id: AdvisorId,
) -> Result<KnownAdvisor, SourceError> {
    if let Some(known) = source
        .journal
        .with(move |store| store.advisor(epoch, id))
        .await?
    {
        return Ok(known);
    }
    let known = if !is_present(source, epoch).await? {
        KnownAdvisor::Gone
    } else {
        match ask(source, || source.client.advisor(id.0)).await {
            Ok(advisor) if is_same_epoch(source, epoch).await? => KnownAdvisor::Person {
                name: advisor.name.trim().to_owned(),
                email: advisor.email_address.trim().to_owned(),
            },
            Ok(_) => KnownAdvisor::Gone,
            Err(error) if error.is_not_found() && source.epochs.reports_events() => {
                KnownAdvisor::Gone
            }
            Err(error) => return Err(error.into()),
        }
    };
    if known == KnownAdvisor::Gone {
        tracing::warn!(
            advisor = %id,
            "BigChat knows nothing of the advisor any more: chats stay without an agent"
        );
    }
    let noted = known.clone();
    source
        .journal
        .with(move |store| store.record_advisor(epoch, id, &noted))
        .await?;
    Ok(known)
}

async fn is_present(source: &Source, epoch: Epoch) -> Result<bool, SourceError> {
    Ok(source.epochs.current(&source.journal).await? == epoch)
}

/// Whether what was just told was told by that run of BigChat.
async fn is_same_epoch(source: &Source, epoch: Epoch) -> Result<bool, SourceError> {
    match epoch::look(source).await? {
        ProbeResult::Restarted => Ok(false),
        ProbeResult::Same | ProbeResult::Unknown => is_present(source, epoch).await,
        ProbeResult::Unanswered => Err(not_asked("whether it has restarted is not known").into()),
    }
}

fn not_asked(why: &str) -> ApiError {
    ApiError::not_sent(Api::BigChat, ErrorKind::Unreachable, why)
}

async fn ask<T, F>(source: &Source, question: impl Fn() -> F) -> Result<T, ApiError>
where
    F: Future<Output = Result<T, ApiError>>,
{
    if !source.may_be_asked() {
        return Err(not_asked("BigChat is down, and is asked again later"));
    }
    let mut tries = 1;
    loop {
        match source.ask(1, &question).await {
            Err(error) if error.is_not_found() && tries < NOT_FOUND_TRIES => tries += 1,
            answer => return answer,
        }
    }
}
