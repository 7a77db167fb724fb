//! Notices what other processes write to the journal: `pause`, `resume`, `failed retry` and `verify`.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::parts::Parts;
use crate::domain::pause::Pause;
use crate::domain::time::Millis;

/// How often to check. A command takes effect within a second.
const CHECK_EVERY: Duration = Duration::from_millis(500);

/// Applies pauses and their ends, and wakes delivery, because there may be work.
pub(super) async fn watch(parts: &Parts) -> Infallible {
    let (mut seen, mut logged) = (None, None);
    loop {
        let paused = parts.our_api.paused();
        // Polling and delivery report a journal that cannot be read.
        if let Ok(version) = parts.journal.with(|store| store.data_version()).await
            && seen != Some((version, paused))
        {
            let applied = apply(parts).await;
            let paused = parts.our_api.paused();
            log(logged, paused);
            (seen, logged) = (applied.then_some((version, paused)), paused);
            parts.work_available.notify_one();
        }
        sleep(CHECK_EVERY).await;
    }
}

/// Applies the pause in the journal, and ends it there if its time is over. Returns whether this succeeded.
async fn apply(parts: &Parts) -> bool {
    let our_api = Arc::clone(&parts.our_api);
    let applied = parts.journal.with(move |store| {
        // On the journal's thread, because the console may record another pause at any time.
        let recorded = store.pause()?;
        our_api.set_pause(recorded);
        match (recorded, our_api.paused()) {
            (Some(over), None) => store.end_pause(over, Millis::now()),
            _ => Ok(()),
        }
    });
    applied.await.is_ok()
}

fn log(known: Option<Pause>, paused: Option<Pause>) {
    match (known, paused) {
        (before, Some(pause)) if before != paused => {
            tracing::info!("deliveries are {pause}; polling continues");
        }
        (Some(before), None) => {
            tracing::info!(since = %before.since, "deliveries resume");
        }
        _ => {}
    }
}
