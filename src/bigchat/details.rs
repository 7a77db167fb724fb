//! Details of conversations and advisors. Their epoch is checked before they are used, since an id means another
//! conversation or advisor after a restart of BigChat.

use super::epoch::{self, ProbeResult};
use super::source::not_sent;
use super::{Source, SourceError};
use crate::domain::conversation::{Conversation, Details};
use crate::domain::ids::{AdvisorId, Epoch};
use crate::domain::time::{Millis, Timestamp};
use crate::http::{ApiError, ErrorKind};
use crate::journal::{Denial, KnownAdvisor};

/// Reads a conversation's details into it: its start time and first advisor. If BigChat does not know the conversation,
/// or has no usable record, only its events count.
pub async fn read(source: &Source, conversation: &mut Conversation) -> Result<(), SourceError> {
    if source.epoch() != conversation.epoch {
        conversation.details = Details::Gone;
        return Ok(());
    }
    let id = conversation.bigchat_id;
    match source.unless_down(source.conversation(id, 1)).await {
        Err(error) => {
            denied(source, conversation.epoch, Denial::Conversation, id, error).await?;
            tracing::warn!(
                conversation = id,
                "BigChat does not know the conversation, or has no usable record; unless a TRANSFER names an advisor, its chat has no agent until a verification pass asks again"
            );
            conversation.details = Details::Gone;
        }
        Ok(details) => {
            let is_same = match (conversation.desired.started_at, details.started_at) {
                (Some(known), Some(reported)) if known == reported => true,
                (Some(_), Some(reported)) => {
                    epoch::begin(source, conversation.epoch, reported).await?;
                    false
                }
                _ => is_same_epoch(source, conversation.epoch).await?,
            };
            if is_same {
                if conversation.desired.started_at.is_none()
                    && let Some(started_at) = details.started_at
                {
                    record(source, conversation, started_at, details.advisor).await?;
                    conversation.desired.started_at = Some(started_at);
                }
                conversation.desired.first_advisor = details.advisor;
                conversation.details = Details::Read;
            } else {
                conversation.details = Details::Gone;
            }
        }
    }
    Ok(())
}

/// Stores a start time that is known only from the details. A chat will be created with it. If the creation is
/// interrupted and BigChat then no longer knows the conversation, only this start time identifies the chat.
async fn record(
    source: &Source,
    conversation: &Conversation,
    started_at: Timestamp,
    advisor: Option<AdvisorId>,
) -> Result<(), SourceError> {
    let (epoch, id) = (conversation.epoch, conversation.bigchat_id);
    let recorded = source
        .journal
        .with(move |store| store.record_details(epoch, id, started_at, advisor));
    Ok(recorded.await?)
}

/// An advisor of an epoch. The journal stores the result, so that each advisor is requested once.
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
    let known = if source.epoch() != epoch {
        KnownAdvisor::Gone
    } else {
        match source.unless_down(source.advisor(id)).await {
            Ok(advisor) if is_same_epoch(source, epoch).await? => KnownAdvisor::Person {
                name: advisor.name.trim().to_owned(),
                email: advisor.email_address.trim().to_owned(),
            },
            Ok(_) => KnownAdvisor::Gone,
            Err(error) => {
                denied(source, epoch, Denial::Advisor, id.0, error).await?;
                KnownAdvisor::Gone
            }
        }
    };
    if known == KnownAdvisor::Gone && source.epoch() == epoch {
        tracing::warn!(
            advisor = %id,
            "BigChat does not know the advisor, or has no usable record; the advisor's chats have no agent; see `bigchat-sync status`"
        );
    } else if known == KnownAdvisor::Gone {
        tracing::warn!(
            advisor = %id,
            "BigChat has restarted and no longer knows the advisor; the advisor's chats stay without an agent"
        );
    }
    let recorded = known.clone();
    source
        .journal
        .with(move |store| store.record_advisor(epoch, id, &recorded))
        .await?;
    Ok(known)
}

/// Whether a response just received belongs to the epoch.
async fn is_same_epoch(source: &Source, epoch: Epoch) -> Result<bool, SourceError> {
    match epoch::probe(source).await? {
        ProbeResult::Restarted => Ok(false),
        ProbeResult::Same | ProbeResult::Unknown => Ok(source.epoch() == epoch),
        ProbeResult::Unanswered => {
            Err(not_sent("BigChat did not answer the probe for a restart").into())
        }
    }
}

/// Handles a failed request for a conversation or an advisor. Returns `Ok` only if a denial is believed: this
/// failure, or an earlier one.
async fn denied(
    source: &Source,
    epoch: Epoch,
    what: Denial,
    id: i64,
    error: ApiError,
) -> Result<(), SourceError> {
    // While polls fail, a denial does not count.
    let counts = error.is_not_found() && source.epochs.answers() != Some(false);
    let now = Millis::now();
    let is_believed = source
        .journal
        .with(move |store| match counts {
            true => store.is_denied(epoch, what, id, now),
            // If this failure does not count as a denial, an earlier denial that was believed still holds.
            false => store.is_believed(epoch, what, id),
        })
        .await?;
    match (is_believed, error.is_not_found()) {
        (true, _) => Ok(()),
        (false, true) => Err(error.with_kind(ErrorKind::Denied).into()),
        (false, false) => Err(error.into()),
    }
}
