//! Noticing that BigChat has restarted.
//!
//! It forgets everything and gives out its ids anew, so an id alone is no identity: (id, start time) is. A known
//! conversation with another start time tells a restart; a 404 or an error tells nothing. Conversation 1 exists from
//! BigChat's start on and so is the best one to ask for, known or not.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use super::{Details, Source};
use crate::domain::event::{Event, EventKind};
use crate::domain::ids::{AdvisorId, Epoch};
use crate::domain::time::Timestamp;
use crate::http::ApiError;
use crate::journal::{JournalError, Probe, Store, StoredPage};

/// How many conversations are asked for, if those before are not known any more.
const MARKERS: u32 = 3;

/// How often an answer that tells nothing is asked for again: about one call in twenty fails at BigChat.
const TRIES: u32 = 3;

/// How many conversations of a page are asked for, to tell which run told of them.
const PROBES: usize = 5;

/// What the look for a restart showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeResult {
    /// It is the same run.
    Same,
    /// It has restarted; a new run was begun in the journal.
    Restarted,
    /// Nothing is known by which it could be told.
    Unknown,
    /// BigChat gave no answer.
    Unanswered,
}

/// Looks whether BigChat has restarted since the present run was last confirmed, and notes it in the journal.
pub async fn look(source: &Source) -> Result<ProbeResult, JournalError> {
    let (epoch, probes) = source.journal.with(|store| store.probes(MARKERS)).await?;
    if probes.is_empty() {
        // Whatever it says of its first conversation is what the next answers are compared with.
        record_first(source, epoch).await?;
        return Ok(ProbeResult::Unknown);
    }
    let first_known = probes.iter().any(|marker| marker.bigchat_id == 1);
    let mut seen = ProbeResult::Unknown;
    for Probe {
        bigchat_id,
        started_at: known,
    } in probes
    {
        let (answer, asked_at) = details(source, bigchat_id).await;
        match answer {
            Ok(Details {
                started_at: Some(started_at),
                ..
            }) if started_at == known => {
                confirm(source, asked_at);
                if !first_known {
                    record_first(source, epoch).await?;
                }
                return Ok(ProbeResult::Same);
            }
            Ok(Details {
                started_at: Some(started_at),
                ..
            }) => {
                begin(source, epoch, started_at).await?;
                return Ok(ProbeResult::Restarted);
            }
            Ok(_) => {}
            Err(error) if error.is_not_found() => {}
            Err(_) => seen = ProbeResult::Unanswered,
        }
    }
    Ok(seen)
}

/// BigChat has restarted since run `epoch`: a conversation is known by now that started at `started_at` in the new
/// run. Begins that run in the journal, unless somebody else has, from the start of its first conversation on if
/// that can be had: pages served before were told by the run before.
pub async fn begin(
    source: &Source,
    epoch: Epoch,
    started_at: Timestamp,
) -> Result<(), JournalError> {
    let (answer, _) = details(source, 1).await;
    let first = answer
        .ok()
        .and_then(|details| Some((details.started_at?, AdvisorId(details.advisor))));
    let confirmed = source.epochs.verified_until();
    let began_at = match first {
        Some((first, _)) if first >= confirmed => first.min(started_at),
        _ => started_at,
    };
    let mark = source.epochs.mark();
    let begun = source
        .journal
        .with(move |store| {
            let begun = store.start_epoch(epoch, began_at, first)?;
            mark.fetch_max(begun.unwrap_or_default().0, Ordering::AcqRel);
            Ok(begun)
        })
        .await?;
    if let Some(epoch) = begun {
        tracing::warn!(epoch = epoch.0, since = %began_at, "BigChat has restarted: from now on its ids mean other conversations and advisors");
    }
    Ok(())
}

/// Which run of BigChat told a page. Where no restart was noticed since it was kept, the present one. Where it was served
/// about when BigChat restarted, its time does not tell: it was the run before if it tells of a conversation that the
/// present run does not know, or that started at another time. `None`: BigChat gives no answer to that.
pub async fn epoch_of(source: &Source, page: &StoredPage) -> Result<Option<Epoch>, JournalError> {
    if page.told_by.is_some() {
        return Ok(page.told_by);
    }
    let served_at = page.served_at;
    let by_time = move |store: &mut Store| store.epoch_at(served_at);
    let (epoch, certain) = source.journal.with(by_time).await?;
    if certain || epoch <= page.kept_in {
        return Ok(Some(epoch.max(page.kept_in)));
    }
    let events = page.events();
    // The present run has given out few ids, and those are the lowest.
    let ids: BTreeSet<_> = events
        .iter()
        .map(|event| Reverse(event.conversation))
        .collect();
    for Reverse(id) in ids.into_iter().take(PROBES) {
        let is_start = |event: &&Event| event.kind == EventKind::Start && event.conversation == id;
        let told = events.iter().find(is_start).map(|event| event.at);
        match details(source, id).await.0 {
            Err(error) if error.is_not_found() && source.epochs.reports_events() => {
                return Ok(Some(Epoch(epoch.0 - 1)));
            }
            Err(error) if error.is_not_found() => {}
            Err(_) => return Ok(None),
            Ok(Details { started_at, .. }) => match told.zip(started_at) {
                Some((told, started_at)) if told != started_at => {
                    return Ok(Some(Epoch(epoch.0 - 1)));
                }
                Some(_) => break,
                None => {}
            },
        }
    }
    Ok(Some(epoch))
}

/// Asks for the first conversation of a run, which tells it from the next better than any other.
async fn record_first(source: &Source, epoch: Epoch) -> Result<(), JournalError> {
    if !source.epochs.requests_first_conversation() {
        return Ok(());
    }
    let (answer, asked_at) = details(source, 1).await;
    match answer {
        Ok(Details {
            started_at: Some(started_at),
            advisor,
        }) => {
            source
                .journal
                .with(move |store| store.record_details(epoch, 1, started_at, AdvisorId(advisor)))
                .await?;
            confirm(source, asked_at);
        }
        Err(error) if error.is_not_found() && source.epochs.reports_events() => {
            source.epochs.probed_without_first();
        }
        _ => {}
    }
    Ok(())
}

fn confirm(source: &Source, at: Option<Timestamp>) {
    if let Some(at) = at {
        source.epochs.verified(at);
    }
}

/// The details of a conversation, and BigChat's time before it was asked.
async fn details(source: &Source, id: i64) -> (Result<Details, ApiError>, Option<Timestamp>) {
    let asked_at = source.client.clock().now();
    let answer = source.ask(TRIES, || source.client.conversation(id)).await;
    (answer, asked_at)
}
