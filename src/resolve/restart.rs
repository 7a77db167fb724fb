//! Noticing that BigChat has restarted.
//!
//! It forgets everything and gives out its ids anew, so an id alone is no identity: (id, start time) is. A known
//! conversation with another start time tells a restart; a 404 or an error tells nothing. Conversation 1 exists from
//! BigChat's start on and so is the best one to ask for, known or not.

use crate::bigchat::{BigChatError, Details};
use crate::context::Context;
use crate::journal::{JournalError, Marker};
use crate::time::Timestamp;

/// How many conversations are asked for, if those before are not known any more.
const MARKERS: u32 = 3;

/// How often an answer that tells nothing is asked for again: about one call in twenty fails at BigChat.
const TRIES: u32 = 3;

/// What the look for a restart showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// It is the same run.
    Same,
    /// It has restarted; a new run was begun in the journal.
    Restarted,
    /// Nothing can be told.
    Unclear,
}

/// Looks whether BigChat has restarted since the present run was last confirmed, and notes it in the journal.
pub async fn look(context: &Context) -> Result<Seen, JournalError> {
    let markers = context.journal.with(|store| store.markers(MARKERS)).await?;
    if markers.is_empty() {
        // Whatever it says of its first conversation is what the next answers are compared with.
        if let Some((
            Details {
                started_at: Some(started_at),
                advisor,
            },
            asked_at,
        )) = details(context, 1).await
        {
            context
                .journal
                .with(move |store| store.note_details(1, started_at, advisor))
                .await?;
            confirm(context, asked_at);
        }
        return Ok(Seen::Unclear);
    }
    for Marker {
        bigchat_id,
        started_at: known,
    } in markers
    {
        match details(context, bigchat_id).await {
            Some((
                Details {
                    started_at: Some(started_at),
                    ..
                },
                asked_at,
            )) if started_at == known => {
                confirm(context, asked_at);
                return Ok(Seen::Same);
            }
            Some((
                Details {
                    started_at: Some(started_at),
                    ..
                },
                _,
            )) => {
                begin(context, started_at).await?;
                return Ok(Seen::Restarted);
            }
            _ => {}
        }
    }
    Ok(Seen::Unclear)
}

/// BigChat has restarted: a conversation is known by now that started at `started_at` in the new run. Begins that
/// run in the journal, from the start of its first conversation on if that can be had: pages served before were
/// told by the run before.
pub async fn begin(context: &Context, started_at: Timestamp) -> Result<(), JournalError> {
    let first = details(context, 1)
        .await
        .and_then(|(details, _)| Some((details.started_at?, details.advisor)));
    let confirmed = context.confirmed_at();
    let began_at = match first {
        Some((first, _)) if first >= confirmed => first.min(started_at),
        _ => started_at,
    };
    let epoch = context
        .journal
        .with(move |store| {
            let epoch = store.begin_epoch(began_at)?;
            if let Some((started_at, advisor)) = first {
                store.note_details(1, started_at, advisor)?;
            }
            Ok(epoch)
        })
        .await?;
    tracing::warn!(epoch, %began_at, "BigChat has restarted: from now on its ids mean other conversations and advisors");
    Ok(())
}

fn confirm(context: &Context, at: Option<Timestamp>) {
    if let Some(at) = at {
        context.confirm(at);
    }
}

/// The details of a conversation, and BigChat's time before it was asked.
async fn details(context: &Context, id: i64) -> Option<(Details, Option<Timestamp>)> {
    for _ in 0..TRIES {
        if context.stopping.is_cancelled() {
            return None;
        }
        let asked_at = context.bigchat.clock().now();
        let answer = context.bigchat.conversation(id).await;
        context.bigchat_answered(&answer);
        match answer {
            Ok(details) => return Some((details, asked_at)),
            Err(BigChatError::Unavailable(_)) => {}
            Err(_) => return None,
        }
    }
    None
}
