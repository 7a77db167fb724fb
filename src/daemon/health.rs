//! Whether the two APIs are up, according to the daemon's own exchanges with them.
//!
//! [`record`] stores this in the journal. The console reads it there, and so do commands, even while no daemon is
//! running.

use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::parts::Parts;
use crate::domain::time::Millis;
use crate::http::{Api, ApiState, ApiStatus};
use crate::journal::STORAGE_PAUSE;

/// How often to check for a later exchange while nothing else changes.
const CHECK_EVERY: Duration = Duration::from_secs(5);

/// How often to store the time of the latest exchange while nothing else changes.
const STORE_EVERY: Duration = Duration::from_secs(10);

/// Restores the state of both APIs from the end of the last session.
///
/// If the base URL is the same, "up", "down" and a rate limit in force are restored. Otherwise the state is unknown.
pub(super) async fn recall(parts: &Parts) {
    for api in Api::ALL {
        let here = parts.apis.of(api).base().clone();
        let recalled = parts.journal.with(move |store| {
            let now = Millis::now();
            let status = store.api(api)?.without_passed_limit(now);
            let is_this = status.is_of(&here);
            let is_known = matches!(status.state, ApiState::Up | ApiState::Down);
            if is_this && is_known {
                return Ok(status);
            }
            store.forget_api(api)?;
            let unknown = ApiStatus {
                rate_limit: status.rate_limit.filter(|_| is_this),
                asked_at: status.asked_at,
                request: status.request,
                response: status.response,
                ..ApiStatus::default()
            };
            if unknown.rate_limit.is_some() {
                store.record_api_status(&[(api, unknown.clone())])?;
            }
            Ok(unknown)
        });
        // Polling and delivery report a journal that cannot be used.
        if let Ok(status) = recalled.await {
            parts.apis.of(api).recall(&status);
        }
    }
}

/// Stores the state of both APIs whenever it changes, until `work` is done.
pub(super) async fn record<T>(parts: &Parts, work: impl Future<Output = T>) -> T {
    let done = CancellationToken::new();
    let work = async {
        let outcome = work.await;
        done.cancel();
        outcome
    };
    let (outcome, ()) = tokio::join!(work, record_until(parts, &done));
    outcome
}

async fn record_until(parts: &Parts, done: &CancellationToken) {
    let mut stored = Api::ALL.map(|_| ApiStatus::default());
    loop {
        let last = done.is_cancelled();
        let now = Api::ALL.map(|api| parts.apis.status(api));
        let mut rest = CHECK_EVERY;
        let news = now
            .iter()
            .zip(&stored)
            .any(|(now, stored)| !is_stored(now, stored));
        if news || last {
            // Both are stored in one operation, so that a journal that cannot be written causes only one wait.
            let found: Vec<_> = Api::ALL.into_iter().zip(now.clone()).collect();
            let recorded = parts
                .journal
                .with(move |store| store.record_api_status(&found));
            match recorded.await {
                Ok(()) => stored = now,
                Err(_) => rest = STORAGE_PAUSE,
            }
        }
        if last {
            return;
        }
        tokio::select! {
            () = done.cancelled() => {}
            () = parts.apis.bigchat.changed() => {}
            () = parts.apis.our_api.changed() => {}
            () = sleep(rest) => {}
        }
    }
}

/// Whether the stored state is recent enough.
fn is_stored(api: &ApiStatus, stored: &ApiStatus) -> bool {
    let recent = |at: Option<Millis>| at.unwrap_or_default();
    let state = |api: &ApiStatus| (api.state, api.since, api.problem.clone(), api.rate_limit);
    state(api) == state(stored) && recent(api.asked_at).since(recent(stored.asked_at)) < STORE_EVERY
}
