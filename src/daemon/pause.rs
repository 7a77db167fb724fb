//! Watches for pauses: commands and the console record them in the journal.

use std::convert::Infallible;
use std::time::Duration;

use tokio::time::sleep;

use super::parts::Parts;
use crate::domain::pause::Pause;
use crate::domain::time::Millis;
use crate::journal::Store;

/// How often to read the journal. A pause takes effect within a second.
const CHECK_EVERY: Duration = Duration::from_millis(500);

/// Applies pauses and their ends.
pub(super) async fn watch(parts: &Parts) -> Infallible {
    let mut known = None;
    loop {
        // Polling and delivery report a journal that cannot be read.
        if let Ok(stored) = parts.journal.with(Store::pause).await {
            parts.our_api.set_pause(stored);
            let paused = parts.our_api.paused();
            log(known, paused);
            known = paused;
            if let (Some(over), None) = (stored, paused) {
                let now = Millis::now();
                let ended = parts.journal.with(move |store| store.end_pause(over, now));
                // A failure is retried in the next round.
                ended.await.ok();
            }
        }
        sleep(CHECK_EVERY).await;
    }
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
