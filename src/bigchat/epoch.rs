//! Detecting a restart of BigChat.
//!
//! A restarted BigChat has lost its data and reuses its ids, so only id and start time together identify a
//! conversation. If BigChat reports another start time for a known conversation, it has restarted. A not-found response
//! or an error proves nothing. Conversation 1 is the first after BigChat's start, which makes it the best probe,
//! whether or not the journal knows it.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use super::{Details, Source};
use crate::domain::event::{Event, EventKind};
use crate::domain::ids::Epoch;
use crate::domain::time::Timestamp;
use crate::http::ApiError;
use crate::journal::{FirstConversation, JournalError, Probe, StoredPage};

/// Maximum number of known conversations that a probe requests until BigChat reports the start of one. Conversation 1
/// may be requested in addition.
const PROBE_CONVERSATIONS: u32 = 3;

/// Attempts in a row for a request that fails transiently, as about one request in twenty to BigChat does.
const ATTEMPTS: u32 = 3;

/// How many conversations of a page are requested to determine its epoch.
const PAGE_CONVERSATIONS: usize = 5;

/// A not-found response for a conversation of a page is believed after this many in a row. A single one may come from
/// an instance that lags behind the others at the same address.
const NOT_FOUND_ATTEMPTS: u32 = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeResult {
    Same,
    /// BigChat has restarted; the journal has a new epoch.
    Restarted,
    /// There is no conversation to compare: the journal knows none, or BigChat does not report the start of any of
    /// them.
    Unknown,
    Unanswered,
}

/// Checks whether BigChat has restarted in the current epoch. If so, begins a new epoch.
pub async fn probe(source: &Source) -> Result<ProbeResult, JournalError> {
    let (epoch, probes) = source
        .journal
        .with(|store| store.probes(PROBE_CONVERSATIONS))
        .await?;
    // Conversation 1 is requested first. If a known conversation that is requested after it still has its known start,
    // BigChat has not restarted in between, so conversation 1 is of this epoch, too.
    let first = match probes.iter().any(|probe| probe.bigchat_id == 1) {
        true => None,
        false => request_first(source).await,
    };
    if probes.is_empty() {
        // The next probes compare with conversation 1 as it is now.
        if let Some(first) = first {
            record_first(source, epoch, first).await?;
        }
        return Ok(ProbeResult::Unknown);
    }
    let mut result = ProbeResult::Unknown;
    for Probe {
        bigchat_id,
        started_at: known,
    } in probes
    {
        match source.conversation(bigchat_id, ATTEMPTS).await {
            Ok(Details {
                started_at: Some(started_at),
                ..
            }) if started_at == known => {
                if let Some(first) = first {
                    record_first(source, epoch, first).await?;
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
            Err(_) => result = ProbeResult::Unanswered,
        }
    }
    Ok(result)
}

/// Begins the epoch after `epoch` in the journal, unless it exists already. BigChat has restarted: it reports a
/// conversation that started at `started_at` in the new epoch. The new epoch begins with the start of its conversation
/// 1 if that is known and earlier.
pub async fn begin(
    source: &Source,
    epoch: Epoch,
    started_at: Timestamp,
) -> Result<(), JournalError> {
    let first = source
        .conversation(1, ATTEMPTS)
        .await
        .ok()
        .and_then(first_of);
    let began_at = first.map_or(started_at, |first| first.started_at.min(started_at));
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
        tracing::warn!(epoch = epoch.0, since = %began_at, "BigChat restarted and reuses its ids; starting a new epoch");
    }
    Ok(())
}

/// The epoch of a page; `None` if BigChat does not answer. The first of these rules that applies determines it:
///
/// 1. BigChat has not restarted since the page was requested: the current epoch.
/// 2. The journal has a message of the page in an earlier epoch, and not in the current one: that epoch.
/// 3. A few conversations of the page are requested, the highest id first. BigChat knows a conversation whose START is
///    on the page: the current epoch if the start times are equal, else an earlier epoch. Or BigChat knows a
///    conversation whose START is not on the page, and which started after the page was served: an earlier epoch.
/// 4. BigChat no longer knows one of these conversations: an earlier epoch.
/// 5. The epoch at the time when the page was served.
pub async fn epoch_of(source: &Source, page: &StoredPage) -> Result<Option<Epoch>, JournalError> {
    if page.epoch.is_some() {
        return Ok(page.epoch);
    }
    let current = source.epoch();
    if current <= page.requested_in {
        return Ok(Some(page.requested_in));
    }
    let (messages, requested_in) = (page.messages(), page.requested_in);
    let repeated = source
        .journal
        .with(move |store| store.earlier_epoch(&messages, requested_in, current))
        .await?;
    if repeated.is_some() {
        return Ok(repeated);
    }
    let by_time = epoch_by_time(source, page).await?;
    let earlier = by_time.min(Epoch(current.0 - 1));
    let events = page.events();
    let mut is_gone = false;
    // The highest id first: so far, the new epoch has used only the lowest ids.
    let ids: BTreeSet<_> = events
        .iter()
        .map(|event| Reverse(event.conversation))
        .collect();
    for Reverse(id) in ids.into_iter().take(PAGE_CONVERSATIONS) {
        let is_start = |event: &&Event| event.kind == EventKind::Start && event.conversation == id;
        let reported = events.iter().find(is_start).map(|event| event.at);
        match conversation(source, id).await {
            Err(error) if error.is_not_found() => is_gone |= source.is_gone(&error),
            Err(_) => return Ok(None),
            Ok(Details { started_at, .. }) => match reported.zip(started_at) {
                Some((reported, started_at)) if reported != started_at => {
                    return Ok(Some(earlier));
                }
                Some(_) => return Ok(Some(current)),
                None if started_at.is_some_and(|at| page.was_served_before(at)) => {
                    return Ok(Some(earlier));
                }
                None => {}
            },
        }
    }
    Ok(Some(if is_gone { earlier } else { by_time }))
}

/// Requests a conversation of a page. A not-found response is believed if it comes several times in a row.
async fn conversation(source: &Source, id: i64) -> Result<Details, ApiError> {
    let mut requests = 1;
    loop {
        match source.unless_down(source.conversation(id, ATTEMPTS)).await {
            Err(error) if error.is_not_found() && requests < NOT_FOUND_ATTEMPTS => requests += 1,
            result => return result,
        }
    }
}

pub async fn epoch_by_time(source: &Source, page: &StoredPage) -> Result<Epoch, JournalError> {
    let served_at = page.served_at;
    let now = source.clock().latest().unwrap_or(served_at);
    let by_time = source
        .journal
        .with(move |store| store.epoch_at(served_at, now))
        .await?;
    Ok(by_time.max(page.requested_in))
}

fn first_of(details: Details) -> Option<FirstConversation> {
    Some(FirstConversation {
        started_at: details.started_at?,
        advisor: details.advisor,
    })
}

/// Requests conversation 1, if it is due, for the next probes.
async fn request_first(source: &Source) -> Option<FirstConversation> {
    if !source.epochs.requests_first_conversation() {
        return None;
    }
    match source.conversation(1, ATTEMPTS).await {
        Ok(details) => first_of(details),
        Err(error) if source.is_gone(&error) => {
            source.epochs.probed_without_first();
            None
        }
        Err(_) => None,
    }
}

async fn record_first(
    source: &Source,
    epoch: Epoch,
    first: FirstConversation,
) -> Result<(), JournalError> {
    source
        .journal
        .with(move |store| store.record_details(epoch, 1, first.started_at, first.advisor))
        .await
}
