//! What the journal remembers of OurAPI, doubted once too little or once too much.

use bigchat_sync::simulator::event::{message, start};
use bigchat_sync::simulator::fault::{crashed, status};

use crate::harness::{Bench, Daemon, Test, run_live_test, until};

/// A daemon whose windows begin after it did, so that nothing is looked up for that reason.
async fn settled(t: &Test, bench: &Bench) -> Daemon {
    bench.set("--poll-overlap", "0s");
    let daemon = bench.start();
    let started = t.now();
    until("a later window", async || {
        bench.cursor() > Some(started + 1)
    })
    .await;
    daemon
}

#[tokio::test]
async fn a_chat_that_was_not_lost_and_cannot_be_read_at_once_is_not_filled_again() {
    run_live_test(async |t| {
        let daemon = settled(t, t).await;
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        let told = vec![message(10, now - 1, "one"), message(10, now - 1, "two")];
        t.bigchat.tells(told);
        t.until_events("delivered", 2).await;
        t.our_api.upset("POST /chats/{id}/messages", status(404));
        t.our_api.upset("GET /chats", status(200).body("[]"));
        t.our_api.upset("GET /chats/{id}/messages", crashed());
        t.bigchat.tells([message(10, now, "three")]);
        t.until_events("delivered", 3).await;
        t.agrees().await;
        daemon.stop().await;
    })
    .await;
}
