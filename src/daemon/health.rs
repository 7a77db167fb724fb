//! Whether the two APIs are up, as the daemon's own exchanges with them tell: nobody asks them for that.
//!
//! The daemon says so here when it notices; what is here is kept in the journal by [`keep`], for whoever asks how things
//! stand, whether the daemon runs or not.

use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::parts::Parts;
use crate::domain::time::Millis;
use crate::http::{Api, ApiStatus};

/// How often it is looked whether there is something to keep.
const LOOK: Duration = Duration::from_secs(1);

/// How often it is kept when an API was last asked, as long as nothing else changes.
const KEPT_EVERY: Duration = Duration::from_secs(10);

/// Takes over how both APIs were when the last session ended.
///
/// What was down is not known to be down where nothing will ask it, or where something else is asked now.
async fn recall(parts: &Parts) {
    for api in Api::ALL {
        let here = parts.apis.of(api).base().to_string();
        let recalled = parts.journal.with(move |store| {
            let status = store.api(api.name())?;
            let is_this = status
                .request
                .as_ref()
                .is_some_and(|asked| asked.contains(&here));
            let is_asked = api == Api::BigChat || store.is_any_waiting()?;
            if is_this && (status.up == Some(true) || is_asked) {
                return Ok(status);
            }
            store.forget_api(api.name())?;
            Ok(ApiStatus::default())
        });
        // A disk that refuses is told of by those who cannot work without it.
        if let Ok(status) = recalled.await {
            parts.apis.of(api).recall(&status);
        }
    }
}

/// Keeps how both APIs are, whenever that changes, until `work` is done.
pub(super) async fn keep<T>(parts: &Parts, work: impl Future<Output = T>) -> T {
    recall(parts).await;
    let done = CancellationToken::new();
    let work = async {
        let outcome = work.await;
        done.cancel();
        outcome
    };
    let (outcome, ()) = tokio::join!(work, keep_until(parts, &done));
    outcome
}

async fn keep_until(parts: &Parts, done: &CancellationToken) {
    let mut kept = Api::ALL.map(|_| ApiStatus::default());
    loop {
        let last = done.is_cancelled();
        let now = Api::ALL.map(|api| parts.apis.status(api));
        let news = now.iter().zip(&kept).any(|(now, kept)| !is_as(now, kept));
        if news || last {
            // Both at once: where the journal refuses, nobody waits for that twice.
            let names = Api::ALL.map(Api::name);
            let to_note: Vec<_> = names.into_iter().zip(now.clone()).collect();
            let noted = parts
                .journal
                .with(move |store| store.record_api_status(&to_note));
            if noted.await.is_ok() {
                kept = now;
            }
        }
        if last {
            return;
        }
        tokio::select! {
            () = done.cancelled() => {}
            () = sleep(LOOK) => {}
        }
    }
}

/// Whether nothing is worth keeping that was not kept.
fn is_as(api: &ApiStatus, kept: &ApiStatus) -> bool {
    let recent = |at: Option<Millis>| at.unwrap_or_default();
    (api.up, &api.problem) == (kept.up, &kept.problem)
        && recent(api.asked_at).since(recent(kept.asked_at)) < KEPT_EVERY
}
