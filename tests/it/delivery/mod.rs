//! The requests to OurAPI: which are sent, which are repeated, and which are not.

mod failures;
mod handlers;
mod late;
mod losses;
mod passes;
mod poison;
mod stale;
mod verify;

use bigchat_sync::simulator::event::message;

use crate::harness::{Test, until};

/// Waits until something is so, while another conversation gets further messages of the seconds after `after`: attempts
/// count only while others are delivered. Returns the number of these messages.
async fn until_meanwhile(
    t: &Test,
    (conversation, after): (i64, i64),
    what: &str,
    is_so: impl Fn() -> bool,
) -> i64 {
    let mut others = 0;
    until(what, async || {
        others += 1;
        t.bigchat
            .reports([message(conversation, after + others, "meanwhile")]);
        t.bigchat.further_polls(1).await;
        is_so()
    })
    .await;
    others
}
