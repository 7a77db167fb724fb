//! One event that fails again and again does not hold up the others.

use bigchat_sync::sim::bigchat::NextPage;
use bigchat_sync::sim::faults::{Fault, When};
use bigchat_sync::sim::our_api;

use crate::daemon::{end, message, scripted, seconds, transfer};
use crate::fakes::{self, Scene, status};
use crate::harness::until;

#[tokio::test]
async fn a_change_that_always_fails_behind_an_older_message() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let bench = bench.set("--max-attempts", "3").set("--retry-max", "40ms");
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    sim.bigchat.open(11, now - 100, 2);
    let told = vec![message(10, now - 5, "hello"), message(11, now - 5, "hello")];
    sim.bigchat.push_page(told, NextPage::None);
    let daemon = bench.start();
    bench.until_events("delivered", 2).await;
    sim.our_api
        .faults
        .script("PATCH *", When::Before, Fault::Status(500), 1_000_000);
    let told = vec![message(10, now - 4, "before the end"), end(10, now - 4)];
    sim.bigchat.push_page(told, NextPage::None);
    let mut others = 0;
    until("the change fails", async || {
        let told = vec![message(11, now - 3, &format!("meanwhile {others}"))];
        sim.bigchat.push_page(told, NextPage::None);
        others += 1;
        bench.events("failed") == 1
    })
    .await;
    until("all else is delivered", async || {
        bench.events("waiting") == 0
    })
    .await;
    daemon.stop().await;
    let failed = bench.failed();
    assert_eq!(
        (failed[0].name.as_str(), failed[0].conversation),
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
}

#[tokio::test]
async fn what_waits_for_bigchat_is_not_tried_without_pause() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let bench = bench.set("--retry-initial", "1s").set("--retry-max", "5m");
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    sim.bigchat.faults.script(
        "GET /advisors/{id}",
        When::Before,
        Fault::Status(500),
        1_000_000,
    );
    let told = vec![message(10, now - 5, "hello"), transfer(10, now - 4, 7)];
    sim.bigchat.push_page(told, NextPage::None);
    let daemon = bench.start();
    let tries = "SELECT coalesce(max(attempts), 0) FROM attempts";
    until("it is tried", async || {
        bench.cursor().is_some() && bench.value::<i64>(tries) > 0
    })
    .await;
    let polls = sim.bigchat.traffic.count("GET /events");
    until("twenty more polls", async || {
        sim.bigchat.traffic.count("GET /events") > polls + 20
    })
    .await;
    daemon.stop().await;
    assert!(
        bench.value::<i64>(tries) < 10,
        "{} tries in a second",
        bench.value::<i64>(tries)
    );
}

#[tokio::test]
async fn what_always_fails_in_many_conversations_is_not_tried_before_what_never_failed() {
    let scene = Scene::new()
        .await
        .set("--retry-initial", "300ms")
        .set("--retry-max", "300ms");
    let daemon = scene.bench.start();
    scene.delivers([fakes::start(43, 1)]).await;
    let poisoned = 100..120;
    let started = poisoned.clone().map(|id| fakes::start(id, 2));
    scene.delivers(started.collect::<Vec<_>>()).await;
    let refused = "POST /chats/*/messages*poison";
    scene.our_api.upset(refused, status(500).always());
    let told = poisoned.map(|id| fakes::message(id, 4, "poison"));
    scene.bigchat.tells(told.collect::<Vec<_>>());
    // Each of them is due again by the time that it could be its turn: OurAPI counts as down.
    until("each has failed", async || {
        scene.our_api.count(refused) >= 40
    })
    .await;
    scene.bigchat.tells([fakes::message(43, 5, "well")]);
    until("it is kept", async || {
        scene.bench.events("waiting") == 21 || !scene.our_api.messages().is_empty()
    })
    .await;
    let before = scene.our_api.count(refused);
    until("it gets through", async || {
        scene.our_api.messages() == ["well"]
    })
    .await;
    let tried = scene.our_api.count(refused) - before;
    daemon.stop().await;
    assert!(tried <= 3, "{tried} probes went to what has always failed");
}
