//! OurAPI loses what it held, or holds what this journal knows nothing of.

use std::time::Duration;

use bigchat_sync::sim::bigchat::NextPage;
use bigchat_sync::sim::faults::{Fault, When};
use bigchat_sync::sim::our_api;

use crate::daemon::{agrees, end, message, scripted, seconds, transfer};
use crate::fakes::{self, Scene, status};
use crate::harness::{Bench, until};

#[tokio::test]
async fn what_was_sent_to_a_chat_before_it_was_lost_is_sent_again() {
    let (sim, bench) = scripted(our_api::Options {
        latency: Duration::from_millis(30),
        ..our_api::Options::default()
    })
    .await;
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    let six = (0..6).map(|n| message(10, now - 5, &format!("number {n}")));
    sim.bigchat.push_page(six.collect(), NextPage::None);
    let daemon = bench.start();
    until("three of six", async || sim.our_api.message_count() >= 3).await;
    sim.our_api.wipe();
    agrees(&sim, &bench).await;
    daemon.stop().await;
}

#[tokio::test]
async fn messages_that_are_gone_while_their_chat_is_there_are_built_again() {
    // As after OurAPI was restored from a copy of some time ago.
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    sim.bigchat.open(11, now - 100, 2);
    let told = vec![
        message(10, now - 5, "hello"),
        message(10, now - 5, "hello"),
        message(11, now - 5, "good morning"),
    ];
    sim.bigchat.push_page(told, NextPage::None);
    let daemon = bench.start();
    bench.until_events("delivered", 3).await;
    sim.our_api.forget_message("10");
    sim.our_api.forget_chat("11");
    sim.bigchat
        .push_page(vec![message(11, now - 4, "are you there?")], NextPage::None);
    agrees(&sim, &bench).await;
    daemon.stop().await;
}

#[tokio::test]
async fn chats_without_messages_are_built_again_although_it_fails_at_first() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let now = seconds(&sim);
    for id in [10, 11, 12] {
        sim.bigchat.open(id, now - 100, id - 9);
    }
    let told = vec![
        end(10, now - 5),
        end(12, now - 5),
        message(11, now - 5, "hello"),
    ];
    sim.bigchat.push_page(told, NextPage::None);
    let daemon = bench.start();
    bench.until_events("delivered", 3).await;
    sim.our_api.wipe();
    // The first try to create each of them fails.
    sim.our_api
        .faults
        .script("POST /chats", When::Before, Fault::Status(500), 3);
    sim.bigchat
        .push_page(vec![message(11, now - 3, "hello again")], NextPage::None);
    agrees(&sim, &bench).await;
    daemon.stop().await;
}

#[tokio::test]
async fn a_chat_found_in_our_api_keeps_what_another_journal_delivered() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    let told = vec![
        message(10, now - 9, "hello"),
        transfer(10, now - 8, 7),
        end(10, now - 6),
    ];
    sim.bigchat.push_page(told, NextPage::None);
    bench.once().await;
    // That database is lost; with another one an earlier END comes, and a message.
    let other = Bench::new(&sim.bigchat_url(), &sim.our_api_url());
    let told = vec![end(10, now - 7), message(10, now - 5, "hello again")];
    sim.bigchat.push_page(told, NextPage::None);
    let daemon = other.start();
    other.until_events("delivered", 2).await;
    sim.bigchat
        .push_page(vec![end(10, now - 7), end(10, now - 8)], NextPage::None);
    other.until_events("delivered", 3).await;
    agrees(&sim, &other).await;
    daemon.stop().await;
}

#[tokio::test]
async fn a_loss_that_was_none_doubles_nothing() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let bench = bench.set("--poll-overlap", "0s");
    let daemon = bench.start();
    // Let the windows begin after the daemon did, so that nothing is looked up for that reason.
    let started = seconds(&sim);
    until("a later window", async || {
        bench.cursor() > Some(started + 1)
    })
    .await;
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    let told = vec![message(10, now - 1, "one"), message(10, now - 1, "two")];
    sim.bigchat.push_page(told, NextPage::None);
    bench.until_events("delivered", 2).await;
    let faults = &sim.our_api.faults;
    faults.script(
        "POST /chats/{id}/messages",
        When::Before,
        Fault::Status(404),
        1,
    );
    faults.script("GET /chats", When::Before, Fault::Body("[]".into()), 1);
    sim.bigchat
        .push_page(vec![message(10, now, "three")], NextPage::None);
    bench.until_events("delivered", 3).await;
    agrees(&sim, &bench).await;
    daemon.stop().await;
    assert_eq!(
        bench.value::<i64>("SELECT losses FROM control"),
        1,
        "it was believed"
    );
}

#[tokio::test]
async fn without_rebuild_only_what_new_events_need_is_built() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let bench = bench.set("--rebuild", "false");
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    sim.bigchat.open(11, now - 100, 2);
    let told = vec![message(10, now - 5, "ten"), message(11, now - 5, "eleven")];
    sim.bigchat.push_page(told, NextPage::None);
    let daemon = bench.start();
    bench.until_events("delivered", 2).await;
    sim.our_api.wipe();
    sim.bigchat
        .push_page(vec![message(10, now - 4, "ten again")], NextPage::None);
    bench.until_events("delivered", 3).await;
    daemon.stop().await;
    let texts: Vec<_> = sim
        .our_api
        .held()
        .messages
        .into_values()
        .flatten()
        .map(|message| message.text)
        .collect();
    assert_eq!(texts, ["ten again"]);
    assert_eq!(sim.our_api.chats().len(), 1);
    assert_eq!(sim.our_api.agents().len(), 1);
}

#[tokio::test]
async fn a_page_of_html_is_no_success_whatever_its_status() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    sim.bigchat
        .push_page(vec![message(10, now - 5, "hello")], NextPage::None);
    let daemon = bench.start();
    bench.until_events("delivered", 1).await;
    sim.our_api.faults.script("*", When::Before, Fault::Html, 2);
    sim.bigchat
        .push_page(vec![end(10, now - 4)], NextPage::None);
    bench.until_events("delivered", 2).await;
    agrees(&sim, &bench).await;
    daemon.stop().await;
}

#[tokio::test]
async fn a_lost_agent_keeps_no_message_from_its_chat() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let bench = bench
        .set("--rebuild", "false")
        .set("--message-author", "agent");
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    sim.bigchat
        .push_page(vec![message(10, now - 5, "one")], NextPage::None);
    let daemon = bench.start();
    bench.until_events("delivered", 1).await;
    sim.our_api.wipe_agents();
    sim.bigchat
        .push_page(vec![message(10, now - 4, "two")], NextPage::None);
    bench.until_events("delivered", 2).await;
    daemon.stop().await;
    let [agent] = &sim.our_api.agents()[..] else {
        panic!("one agent: {:?}", sim.our_api.agents());
    };
    assert_eq!(sim.our_api.chats()[0].agent_id, Some(agent.agent_id));
}

#[tokio::test]
async fn two_chats_that_cannot_be_built_again_keep_no_other_from_it() {
    let scene = Scene::new().await;
    let daemon = scene.bench.start();
    scene
        .delivers([fakes::end(1, 10), fakes::end(42, 10)])
        .await;
    scene
        .delivers([fakes::transfer(43, 11, 8), fakes::message(43, 12, "lost")])
        .await;
    scene
        .delivers([fakes::transfer(44, 13, 8), fakes::message(44, 14, "news")])
        .await;
    scene.our_api.loses_everything();
    // Ann cannot be created any more, Bob can.
    let ann = r#"POST /agents {"email":"ann@x.test""#;
    scene.our_api.upset(ann, status(500).always());
    scene.bigchat.tells([fakes::message(44, 20, "more news")]);
    until("what is not Ann's is built again", async || {
        scene.our_api.messages().iter().any(|text| text == "lost")
    })
    .await;
    daemon.stop().await;
}
