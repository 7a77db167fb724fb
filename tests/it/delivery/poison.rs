//! Events that fail again and again do not delay the others.

use crate::harness::{run_live_test, run_test, until};
use bigchat_sync::simulator::event::{end, message, start, transfer};
use bigchat_sync::simulator::fault::{crashed, status};

#[tokio::test]
async fn change_fails_behind_older_message() {
    run_live_test(async |t| {
        t.differs("OurAPI fails all changes");
        t.set("--max-attempts", "3").set("--retry-max", "40ms");
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.open(11, now - 100, 2);
        let events = vec![message(10, now - 5, "hello"), message(11, now - 5, "hello")];
        t.bigchat.reports(events);
        let daemon = t.start();
        t.until_events("delivered", 2).await;
        t.our_api.upset("PATCH *", crashed().always());
        let events = vec![message(10, now - 4, "before the end"), end(10, now - 4)];
        t.bigchat.reports(events);
        let mut others = 0;
        until("the change fails", async || {
            let events = vec![message(11, now - 3, &format!("meanwhile {others}"))];
            t.bigchat.reports(events);
            others += 1;
            t.events("failed") == 1
        })
        .await;
        until("all else is delivered", async || t.events("waiting") == 0).await;
        daemon.stop().await;
        let failed = t.failed();
        assert_eq!(
            (failed[0].kind.as_str(), failed[0].conversation),
            ("END", Some(10))
        );
        assert!(
            failed[0]
                .request
                .as_deref()
                .is_some_and(|request| request.starts_with("PATCH /chats/"))
        );
        assert!(
            failed[0]
                .response
                .as_deref()
                .is_some_and(|response| response.starts_with("500"))
        );
    })
    .await;
}

/// Changes are written together. If that fails, those before the failing one still get through.
#[tokio::test]
async fn failing_transfer_delays_no_end() {
    run_live_test(async |t| {
        t.differs("OurAPI fails all changes of an agent");
        t.set("--retry-max", "40ms");
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.reports([message(10, now - 5, "hello")]);
        let daemon = t.start();
        t.until_events("delivered", 1).await;
        t.our_api.upset("PATCH *agent_id*", crashed().always());
        t.bigchat
            .reports(vec![end(10, now - 4), transfer(10, now - 4, 7)]);
        until("the chat is ended", async || {
            t.our_api.data().chats[0].ended_at.is_some()
        })
        .await;
        daemon.stop().await;
        assert_eq!(t.events("delivered"), 2);
        assert_eq!(t.events("waiting"), 1);
    })
    .await;
}

#[tokio::test]
async fn event_waiting_for_bigchat_backs_off() {
    run_live_test(async |t| {
        t.differs("BigChat fails to the end");
        t.set("--retry-initial", "1s").set("--retry-max", "5m");
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.upset("GET /advisors/{id}", crashed().always());
        let events = vec![message(10, now - 5, "hello"), transfer(10, now - 4, 7)];
        t.bigchat.reports(events);
        let daemon = t.start();
        until("it is tried", async || t.attempts() > 0).await;
        let polls = t.bigchat.count("GET /events");
        until("twenty more polls", async || {
            t.bigchat.count("GET /events") > polls + 20
        })
        .await;
        daemon.stop().await;
        let attempts = t.attempts();
        assert!(attempts < 10, "{attempts} attempts in a second");
    })
    .await;
}

/// Events that always fail, in many conversations, are not tried before events that have never failed.
#[tokio::test]
async fn event_without_failure_probed_first() {
    run_test(async |t| {
        t.differs("OurAPI fails to the end");
        t.set("--retry-initial", "300ms")
            .set("--retry-max", "300ms");
        let daemon = t.start();
        t.delivers([start(43, 1)]).await;
        let poisoned = 100..120;
        let started = poisoned.clone().map(|id| start(id, 2));
        t.delivers(started.collect::<Vec<_>>()).await;
        let refused = "POST /chats/*/messages*poison";
        t.our_api.upset(refused, status(500).always());
        let events = poisoned.map(|id| message(id, 4, "poison"));
        t.bigchat.reports(events.collect::<Vec<_>>());
        // Each of them would be due again before any other event is tried, because OurAPI counts as down.
        until("each has failed", async || t.our_api.count(refused) >= 40).await;
        t.bigchat.reports([message(43, 5, "well")]);
        until("it is stored", async || {
            t.events("waiting") == 21 || !t.our_api.messages().is_empty()
        })
        .await;
        let before = t.our_api.count(refused);
        until("it gets through", async || t.our_api.messages() == ["well"]).await;
        let tried = t.our_api.count(refused) - before;
        daemon.stop().await;
        assert!(tried <= 3, "{tried} probes went to events that always fail");
    })
    .await;
}
