//! Stale chats are read back in exactly the right cases.

use bigchat_sync::simulator::event::{end, message, start, transfer};
use bigchat_sync::simulator::fault::{crashed, dropped, paused, status};
use serde_json::json;

use super::until_meanwhile;
use super::verify::verify;
use crate::harness::services::time;
use crate::harness::{Bench, Daemon, Test, run_live_test, run_test, until};

/// A daemon whose windows begin after its start, so that no chat is read back because of earlier events.
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

/// OurAPI rejects more changes of a chat than are claimed together. The first is one second after `after`.
async fn rejects_many_changes(t: &Test, conversation: i64, after: i64) {
    t.our_api.upset("PATCH *", status(422).always());
    t.bigchat
        .reports((1..=201).map(|at| end(conversation, after + at)));
    t.until_events("failed", 201).await;
    t.our_api.calm();
}

/// Changes a chat's agent, as another client would.
async fn gives(t: &Test, external_id: &str, email: &str) {
    let agents = t.our_api.data().agents;
    let agent = agents.iter().find(|agent| agent.email == email);
    let change = json!({"agent_id": agent.expect("an agent").agent_id});
    t.our_api.is_changed(external_id, &change).await;
}

/// Delivers two chats. A TRANSFER has given the first one advisor 7.
async fn two_chats(t: &Test) -> Daemon {
    let now = t.now();
    t.bigchat.open(10, now - 100, 1);
    t.bigchat.open(11, now - 100, 2);
    t.bigchat.reports([
        message(10, now - 9, "hello"),
        transfer(10, now - 8, 7),
        message(11, now - 5, "hello"),
    ]);
    let daemon = t.start();
    t.until_events("delivered", 3).await;
    daemon
}

/// Waits until this many events are dead letters.
async fn give_up(t: &Test, dead_letters: i64) {
    attempts_count_until(t, "the messages are given up", || {
        t.events("failed") == dead_letters
    })
    .await;
}

/// Attempts count only while another conversation, 11, is being delivered.
async fn attempts_count_until(t: &Test, what: &str, is_so: impl Fn() -> bool) {
    let now = t.now();
    let mut others = 0;
    until(what, async || {
        others += 1;
        let meanwhile = format!("meanwhile {others}");
        t.bigchat.reports([message(11, now, &meanwhile)]);
        t.bigchat.further_polls(1).await;
        is_so()
    })
    .await;
}

/// The agent of a chat, by e-mail address.
fn agent(t: &Test, external_id: &str) -> Option<String> {
    let data = t.our_api.data();
    let chat = data
        .chats
        .iter()
        .find(|chat| chat.external_id == external_id)?;
    let agent = data
        .agents
        .iter()
        .find(|agent| Some(agent.agent_id) == chat.agent_id)?;
    Some(agent.email.clone())
}

/// Makes OurAPI lose a chat. A message shows the loss, and all other chats are read back.
async fn loses(t: &Test, bench: &Bench, external_id: i64, text: &str) {
    let losses = bench.value::<i64>("SELECT losses FROM control");
    t.our_api.loses_chat(&external_id.to_string());
    t.bigchat.reports([message(external_id, t.now(), text)]);
    until("all is read back", async || {
        bench.value::<i64>("SELECT losses FROM control") > losses
            && bench.value::<i64>(
                "SELECT count(*) FROM conversations WHERE external_id IS NOT NULL
                    AND verified_losses < (SELECT losses FROM control) OR due_at IS NOT NULL",
            ) == 0
    })
    .await;
}

/// A chat that was not lost and cannot be read immediately gets no message twice.
#[tokio::test]
async fn unreadable_chat_was_not_lost() {
    run_live_test(async |t| {
        let daemon = settled(t, t).await;
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        let equal = vec![message(10, now - 1, "one"), message(10, now - 1, "two")];
        t.bigchat.reports(equal);
        t.until_events("delivered", 2).await;
        t.our_api.upset("POST /chats/{id}/messages", status(404));
        t.our_api.upset("GET /chats", status(200).body("[]"));
        t.our_api.upset("GET /chats/{id}/messages", crashed());
        t.bigchat.reports([message(10, now, "three")]);
        t.until_events("delivered", 3).await;
        t.agrees().await;
        daemon.stop().await;
    })
    .await;
}

/// The same if its messages can never be read: those delivered before become dead letters of unknown outcome.
#[tokio::test]
async fn chat_that_was_not_lost_stays_unread() {
    run_live_test(async |t| {
        t.fails(2);
        t.set("--max-attempts", "2").set("--retry-max", "40ms");
        settled(t, t).await;
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.open(11, now - 100, 1);
        t.bigchat
            .reports(["one", "two"].map(|text| message(10, now - 1, text)));
        t.until_events("delivered", 2).await;
        t.our_api
            .upset("POST /chats/{id}/messages", status(404));
        t.our_api.upset("GET /chats", status(200).body("[]"));
        let chat = t.our_api.data().chats[0].chat_id;
        let messages = format!("GET /chats/{chat}/messages");
        t.our_api.upset(&messages, status(500).always());
        t.bigchat.reports([message(10, now, "three")]);
        give_up(t, 2).await;
        t.until_events("waiting", 0).await;
        assert_eq!(
            t.value::<i64>(
                "SELECT count(*) FROM dead_letters JOIN attempts USING (event) WHERE outcome_unknown"
            ),
            2
        );
    })
    .await;
}

/// The same with a third message whose outcome is unknown. It becomes a dead letter, too.
#[tokio::test]
async fn unknown_outcome_survives_a_false_loss() {
    run_live_test(async |t| {
        t.fails(3);
        t.set("--max-attempts", "2").set("--retry-max", "40ms");
        settled(t, t).await;
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.open(11, now - 100, 1);
        let before = ["one", "two"].map(|text| message(10, now - 1, text));
        t.bigchat.reports(before);
        t.until_events("delivered", 2).await;
        let chat = t.our_api.data().chats[0].chat_id;
        let messages = format!("GET /chats/{chat}/messages");
        t.our_api.upset(&messages, status(500).always());
        let add = "POST /chats/{id}/messages";
        t.our_api.upset(add, dropped().carried_out());
        t.our_api.upset("GET /chats", status(200).body("[]"));
        t.bigchat.reports([message(10, now, "three")]);
        give_up(t, 3).await;
        t.until_events("waiting", 0).await;
    })
    .await;
}

/// A message that OurAPI has altered counts as the delivered one, even after a false loss.
#[tokio::test]
async fn altered_message_and_a_false_loss() {
    run_live_test(async |t| {
        let daemon = settled(t, t).await;
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        let before = ["damn it", "two"].map(|text| message(10, now - 1, text));
        t.bigchat.reports(before);
        t.until_events("delivered", 2).await;
        let data = t.our_api.data();
        let chat = data.chats[0].chat_id;
        let altered = data.messages[&chat].iter().map(|message| {
            let text = message.text.replace("damn", "****");
            json!({"message_id": message.message_id, "sent_at": message.sent_at, "text": text})
        });
        let listed = json!(altered.collect::<Vec<_>>()).to_string();
        let messages = format!("GET /chats/{chat}/messages");
        t.our_api
            .upset(&messages, status(200).body(listed).always());
        t.our_api.upset("POST /chats/{id}/messages", status(404));
        t.our_api.upset("GET /chats", status(200).body("[]"));
        t.bigchat.reports([message(10, now, "three")]);
        t.until_events("delivered", 3).await;
        daemon.stop().await;
        assert_eq!(t.losses(), 1, "the loss was believed");
    })
    .await;
}

/// The agent of an adopted chat stays if other data is lost.
#[tokio::test]
async fn adopted_agent_survives_other_loss() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.open(11, now - 100, 2);
        t.bigchat
            .reports([message(10, now - 9, "hello"), transfer(10, now - 8, 7)]);
        t.once().await;
        let transferred = agent(t, "10");
        // Another daemon starts without that database.
        let other = Bench::new(&t.bigchat.url(), &t.our_api.url());
        let daemon = settled(t, &other).await;
        t.our_api.upset("GET /chats/{id}/messages", crashed());
        t.bigchat.reports([
            message(10, now - 5, "hello again"),
            message(11, now - 5, "hello"),
        ]);
        other.until_events("delivered", 2).await;
        assert_eq!(agent(t, "10"), transferred);
        loses(t, &other, 11, "are you there?").await;
        assert_eq!(agent(t, "10"), transferred);
        t.agrees().await;
        daemon.stop().await;
    })
    .await;
}

/// An agent set by another client stays after every loss.
#[tokio::test]
async fn foreign_agent_survives_losses() {
    run_live_test(async |t| {
        t.differs("another client changes a chat");
        let daemon = two_chats(t).await;
        t.our_api.has_agent("b1", "Zoe", "zoe@z.test");
        gives(t, "10", "zoe@z.test").await;
        for text in ["are you there?", "and now?"] {
            loses(t, t, 11, text).await;
            assert_eq!(agent(t, "10").as_deref(), Some("zoe@z.test"), "{text}");
        }
        daemon.stop().await;
    })
    .await;
}

/// Drift that was reported once still counts as drift.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reported_drift_is_still_drift() {
    run_live_test(async |t| {
        t.differs("another client changes a chat");
        let daemon = two_chats(t).await;
        let (ours, other) = (agent(t, "10"), agent(t, "11"));
        gives(t, "10", other.as_deref().expect("an agent")).await;
        loses(t, t, 11, "are you there?").await;
        daemon.stop().await;
        for (arguments, clean, holder) in [
            (&[][..], false, other),
            (&["--repair"], false, ours.clone()),
            (&[], true, ours),
        ] {
            let (output, found_nothing) = verify(t, arguments).await;
            assert_eq!(found_nothing, clean, "{arguments:?}: {output}");
            assert_eq!(agent(t, "10"), holder, "{arguments:?}: {output}");
        }
    })
    .await;
}

/// A verification of a stale chat does not forget its known drift.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn known_drift_of_a_stale_chat() {
    run_live_test(async |t| {
        t.differs("another client removes an agent");
        t.set("--retry-initial", "5s");
        let daemon = two_chats(t).await;
        let no_agent = json!({"agent_id": null});
        t.our_api.is_changed("10", &no_agent).await;
        loses(t, t, 11, "are you there?").await;
        t.our_api.upset("POST /chats/{id}/messages", dropped());
        t.bigchat.reports([message(10, t.now(), "hello again")]);
        until("it has failed", async || t.attempts() == 1).await;
        daemon.stop().await;
        let (output, found_nothing) = verify(t, &[]).await;
        assert!(!found_nothing, "{output}");
        t.start();
        t.until_events("delivered", 5).await;
        assert_eq!(agent(t, "10"), None);
    })
    .await;
}

/// The agent of an adopted chat does not count as drift.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adopted_agent_is_no_drift() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat
            .reports([message(10, now - 9, "hello"), transfer(10, now - 8, 7)]);
        t.once().await;
        let transferred = agent(t, "10");
        let other = Bench::new(&t.bigchat.url(), &t.our_api.url());
        t.bigchat.reports([message(10, now - 5, "hello again")]);
        other.once().await;
        for arguments in [&[][..], &["--repair"], &[]] {
            let (output, found_nothing) = verify(&other, arguments).await;
            assert!(found_nothing, "{arguments:?}: {output}");
            assert_eq!(agent(t, "10"), transferred, "{arguments:?}");
        }
    })
    .await;
}

/// A discarded message that OurAPI has does not account for another message of the same second.
#[tokio::test]
async fn discarded_message_accounts_for_itself() {
    run_test(async |t| {
        t.set("--max-attempts", "2").set("--retry-max", "40ms");
        t.differs("the discarded message is there");
        let daemon = t.start();
        t.delivers([start(42, 0), start(43, 1)]).await;
        // The message is stored, and cannot be read.
        t.our_api
            .upset("POST /chats/c1/messages", crashed().carried_out());
        t.our_api
            .upset("GET /chats/c1/messages", status(503).always());
        t.bigchat.reports([message(42, 5, "first")]);
        until_meanwhile(t, (43, 10), "it fails", || t.events("failed") == 1).await;
        t.failed_command(&["discard", "--all", "--yes"])
            .expect("it is discarded");
        t.our_api.calm();
        t.our_api.upset("POST /chats/c1/messages", dropped());
        t.bigchat.reports([message(42, 5, "second")]);
        until("the second one is there", async || {
            t.our_api.messages().iter().any(|text| text == "second")
        })
        .await;
        daemon.stop().await;
    })
    .await;
}

/// Without rebuilding, a chat that can never be created is not read back forever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rejected_chat_without_rebuild() {
    run_test(async |t| {
        t.differs("OurAPI rejects a chat");
        t.our_api
            .upset(r#"POST /chats {"external_id":"99"*"#, status(422).always());
        let daemon = t.start();
        t.delivers([start(42, 0), message(42, 1, "hello")]).await;
        // BigChat does not know conversation 99.
        t.bigchat.reports([message(99, 5, "who?")]);
        t.until_events("failed", 1).await;
        daemon.stop().await;
        // As if a loss had been found shortly before the end of the session, so that not all chats were read back.
        t.execute("UPDATE control SET losses = 1");
        t.set("--rebuild", "off");
        let daemon = t.start();
        until("nothing is left to be read back", async || {
            t.value::<i64>(
                "SELECT count(*) FROM conversations
                 WHERE external_id IS NOT NULL AND verified_losses < 1 AND due_at IS NULL",
            ) == 0
        })
        .await;
        daemon.stop().await;
    })
    .await;
}

/// A chat that OurAPI rejects is not tried again and again after a loss.
#[tokio::test]
async fn rejected_chat_after_a_loss() {
    run_test(async |t| {
        t.differs("OurAPI rejects a chat");
        t.our_api
            .upset(r#"POST /chats {"external_id":"99"*"#, status(422).always());
        t.start();
        t.delivers([start(42, 0), message(42, 1, "hello")]).await;
        // BigChat does not know conversation 99.
        t.bigchat.reports([message(99, 5, "who?")]);
        t.until_events("failed", 1).await;
        t.our_api.loses_chat("42");
        t.bigchat.reports([message(42, 2, "are you there?")]);
        until("it is settled", async || {
            t.losses() == 1
                && t.value::<i64>(
                    "SELECT count(*) FROM conversations WHERE bigchat_id = 99 AND verified_losses = 1
                        AND due_at IS NULL",
                ) == 1
        })
        .await;
        t.failed_command(&["retry", "--all"]).expect("it is tried again");
        t.until_events("failed", 1).await;
    })
    .await;
}

/// A chat whose messages can never be read still gets the changes that wait at a start.
#[tokio::test]
async fn change_of_unreadable_chat_at_start() {
    run_test(async |t| {
        t.set("--max-attempts", "2").set("--retry-max", "40ms");
        let daemon = t.start();
        t.delivers([start(42, 0), message(42, 1, "hello"), start(43, 1)])
            .await;
        daemon.stop().await;
        t.our_api
            .upset("GET /chats/c1/messages", status(500).always());
        t.bigchat.reports([end(42, 9)]);
        t.start();
        let others = until_meanwhile(t, (43, 10), "the end is there", || {
            t.our_api.chats()[0].contains("22:00:09")
        })
        .await;
        // The last page may have been requested and not stored yet.
        t.until_events("delivered", 4 + others).await;
    })
    .await;
}

/// An earlier message does not create a second chat if the first one may have been created.
#[tokio::test]
async fn earlier_message_after_lost_creation() {
    run_test(async |t| {
        t.set("--retry-initial", "2s").set("--retry-max", "2s");
        t.start();
        t.our_api.upset("POST /chats", dropped().carried_out());
        // BigChat does not know the conversation: only its events show when it started.
        t.bigchat.reports([message(99, 10, "later")]);
        until("it may be created", async || t.our_api.chats().len() == 1).await;
        t.bigchat.reports([message(99, 5, "sooner")]);
        t.until_events("delivered", 2).await;
        assert_eq!(t.our_api.chats(), ["99 22:00:05 - -"]);
    })
    .await;
}

/// A message of unknown outcome is read back, although many changes wait before it.
#[tokio::test]
async fn read_back_behind_many_changes() {
    run_test(async |t| {
        t.set("--retry-initial", "5s").set("--retry-max", "5s");
        t.start();
        t.delivers([start(42, 0)]).await;
        rejects_many_changes(t, 42, 0).await;
        t.our_api
            .upset("POST /chats/{id}/messages", dropped().carried_out());
        t.bigchat.reports([message(42, 5, "hello")]);
        until("it may be there", async || t.our_api.message_count() == 1).await;
        until("that is recorded", async || {
            t.value::<i64>("SELECT count(*) FROM attempts WHERE outcome_unknown") == 1
        })
        .await;
        t.failed_command(&["retry", "--all"])
            .expect("all are tried again");
    })
    .await;
}

/// An agent found just before a loss is requested again.
#[tokio::test]
async fn agent_found_just_before_a_loss() {
    run_test(async |t| {
        t.set("--our-api-concurrency", "4");
        t.our_api.state().set_fragile(false);
        t.start();
        // BigChat does not know the last two, which get no agent.
        t.delivers([
            start(42, 0),
            message(98, 5, "hello"),
            message(99, 6, "hello"),
        ])
        .await;
        let losses = |of: i64| {
            t.value::<i64>(&format!(
                "SELECT verified_losses FROM conversations WHERE bigchat_id = {of}"
            ))
        };
        t.our_api.upset("GET /agents", paused().carried_out());
        t.our_api.loses_chat("98");
        t.bigchat.reports([message(98, 10, "are you there?")]);
        until("the agent is found", async || {
            t.our_api.pausing() == 1 && losses(99) == 1
        })
        .await;
        t.our_api.loses_agents();
        t.our_api.loses_chat("99");
        t.bigchat.reports([message(99, 11, "and you?")]);
        until("that is noticed", async || t.losses() == 2).await;
        t.our_api.resume();
        t.until_events("delivered", 5).await;
        t.agrees().await;
    })
    .await;
}

/// A message whose chat could not be created is not matched with another of the same second.
#[tokio::test]
async fn unsent_message_matches_no_other() {
    run_test(async |t| {
        t.differs("a message of another client");
        t.our_api.has_chat("c1", "42", 0);
        t.our_api.has_message("c1", 5, "of another client");
        t.our_api.upset("POST /chats", dropped());
        t.start();
        t.delivers([message(42, 5, "hello")]).await;
        assert_eq!(t.our_api.messages(), ["hello", "of another client"]);
    })
    .await;
}

/// A start known only from events is not reported as drift if its correction gets no response.
#[tokio::test]
async fn corrected_start_is_no_drift() {
    run_test(async |t| {
        t.start();
        // BigChat does not know the conversation: only its events show when it started.
        for first in [message(99, 10, "later"), end(98, 10)] {
            t.delivers([first.clone()]).await;
            t.our_api
                .upset("PATCH /chats/{id}", dropped().carried_out());
            let id = first["conversation_id"].as_i64().expect("an id");
            t.delivers([message(id, 5, "sooner")]).await;
        }
        t.delivers([message(97, 10, "later")]).await;
        t.our_api
            .upset("PATCH /chats/{id}", dropped().carried_out());
        t.delivers([message(97, 5, "sooner"), end(97, 20)]).await;
        assert_eq!(
            t.value::<i64>("SELECT count(*) FROM conversations WHERE drift IS NOT NULL"),
            0
        );
    })
    .await;
}

/// An agent restored by the request that sets an end is not reported as drift if that request gets no response.
#[tokio::test]
async fn agent_restored_with_an_end() {
    run_test(async |t| {
        t.start();
        // BigChat does not know the second one, which gets no agent.
        t.delivers([start(42, 0), message(98, 5, "hello")]).await;
        t.our_api.loses_agents();
        t.our_api.loses_chat("98");
        t.our_api.upset("GET /chats?external_id=42", paused());
        t.our_api
            .upset("PATCH /chats/{id}", dropped().carried_out());
        t.bigchat.reports([message(98, 10, "are you there?")]);
        until("the other chat is read back", async || {
            t.our_api.pausing() == 1
        })
        .await;
        t.bigchat.reports([end(42, 20)]);
        until("its end waits", async || {
            t.count_events("kind = 'END' AND state = 'waiting'") == 1
        })
        .await;
        t.our_api.resume();
        t.until_events("delivered", 4).await;
        assert_eq!(t.our_api.count("PATCH *agent_id*ended_at"), 1);
        assert_eq!(
            t.value::<i64>("SELECT count(*) FROM conversations WHERE drift IS NOT NULL"),
            0
        );
    })
    .await;
}

/// Reading a chat back does not bring the text of dropped messages back into the database.
#[tokio::test]
async fn text_beyond_the_retention() {
    run_test(async |t| {
        // Without an overlap, the next window begins after the daemon's start.
        t.set("--retention", "1h").set("--poll-overlap", "0s");
        t.start();
        t.delivers([start(42, 0), message(42, 5, "S3cret")]).await;
        t.execute("UPDATE deliveries SET delivered_at = delivered_at - 7200000");
        t.bigchat.clock(3 * 3600);
        until("the events are dropped", async || {
            t.value::<i64>("SELECT count(*) FROM events") == 0
        })
        .await;
        t.our_api
            .upset("POST /chats/{id}/messages", dropped().carried_out());
        t.bigchat.reports([message(42, 3 * 3600 - 5, "much later")]);
        t.until_events("delivered", 1).await;
        until("nothing is left of its text", async || {
            t.value::<i64>("SELECT count(*) FROM credits") == 0
        })
        .await;
    })
    .await;
}

/// Retries the failed events of chat `c1` while a message of unknown outcome waits, which is stored, but the messages
/// of its chat cannot be read. Ends when nothing waits.
async fn retries_before_an_unreadable_message(t: &Test) {
    t.our_api
        .upset("GET /chats/c1/messages", status(500).always());
    t.our_api
        .upset("POST /chats/c1/messages", crashed().carried_out());
    t.bigchat.reports([message(42, 5, "hello")]);
    until("that is recorded", async || {
        t.value::<i64>("SELECT count(*) FROM attempts WHERE outcome_unknown") == 1
    })
    .await;
    t.failed_command(&["retry", "--all"])
        .expect("all are tried again");
    let waiting = "SELECT waiting FROM conversations WHERE bigchat_id = 42";
    until_meanwhile(t, (43, 10), "nothing waits", || {
        t.value::<i64>(waiting) == 0
    })
    .await;
}

/// A message of unknown outcome is not sent again unread because the chat's messages cannot be read while more events
/// than are claimed together wait before it.
#[tokio::test]
async fn unreadable_behind_many_changes() {
    run_test(async |t| {
        // The message is stored, but that cannot be found out.
        t.fails(1);
        t.set("--max-attempts", "2")
            .set("--retry-initial", "2s")
            .set("--retry-max", "2s");
        t.start();
        t.delivers([start(42, 0), start(43, 1)]).await;
        rejects_many_changes(t, 42, 0).await;
        retries_before_an_unreadable_message(t).await;
        let mut messages = t.our_api.messages();
        messages.retain(|text| text != "meanwhile");
        assert_eq!(messages, ["hello"], "it is doubled");
    })
    .await;
}

/// The same behind a single message that fills a claim.
#[tokio::test]
async fn unreadable_behind_a_long_message() {
    run_test(async |t| {
        t.differs("the long message has failed, since the chat cannot be read");
        t.set("--max-attempts", "2")
            .set("--retry-initial", "2s")
            .set("--retry-max", "2s");
        t.start();
        t.delivers([start(42, 0), start(43, 1)]).await;
        t.our_api.upset("POST /chats/c1/messages", status(422));
        let long = "x".repeat(300 << 10);
        t.bigchat.reports([message(42, 4, &long)]);
        t.until_events("failed", 1).await;
        retries_before_an_unreadable_message(t).await;
        let hello = t.our_api.messages();
        let hello = hello.iter().filter(|text| *text == "hello").count();
        assert_eq!(hello, 1, "it is doubled");
        assert_eq!(t.failed().len(), 2);
    })
    .await;
}

/// Of two equal messages, one was rejected and is retried, and the other one may have been delivered. The chat is read
/// back once, and what it has counts for either.
#[tokio::test]
async fn retried_message_before_an_equal_unknown_one() {
    run_test(async |t| {
        t.set("--retry-initial", "1s").set("--retry-max", "1s");
        t.start();
        t.delivers([start(42, 0)]).await;
        t.our_api.upset("POST /chats/c1/messages", status(422));
        t.our_api
            .upset("POST /chats/c1/messages", crashed().carried_out());
        t.bigchat
            .reports([message(42, 5, "hello"), message(42, 5, "hello")]);
        until("both have failed", async || {
            t.value::<i64>("SELECT count(*) FROM attempts") == 2
        })
        .await;
        t.failed_command(&["retry", "--all"])
            .expect("the first one is tried again");
        t.agrees().await;
        let read = t.our_api.ever_asked("GET /chats/c1/messages").len();
        assert_eq!(read, 1, "it is read back once");
    })
    .await;
}

/// The same if the two differ in white space only, which OurAPI strips.
#[tokio::test]
async fn credit_of_a_text_with_white_space() {
    run_live_test(async |t| {
        t.set("--retry-initial", "1s").set("--retry-max", "1s");
        settled(t, t).await;
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.delivers([message(10, now - 5, "hi there")]).await;
        t.our_api.upset("POST /chats/{id}/messages", status(422));
        t.our_api
            .upset("POST /chats/{id}/messages", crashed().carried_out());
        t.bigchat
            .reports([message(10, now, "hello "), message(10, now, "hello")]);
        until("both have failed", async || {
            t.value::<i64>("SELECT count(*) FROM attempts") == 2
        })
        .await;
        t.failed_command(&["retry", "--all"])
            .expect("the first one is tried again");
        let reads = || t.our_api.ever_asked("GET /chats/*/messages").len();
        until(
            "it is delivered, or read back again and again",
            async || t.events("waiting") == 0 || reads() > 100,
        )
        .await;
        assert_eq!(reads(), 1, "it is read back once");
    })
    .await;
}

/// The same if another client's equal message has left a credit, which does not count for a later message.
#[tokio::test]
async fn unreadable_beside_an_older_credit() {
    run_live_test(async |t| {
        t.differs("another client's message");
        t.set("--max-attempts", "2")
            .set("--retry-initial", "2s")
            .set("--retry-max", "2s");
        settled(t, t).await;
        let now = t.now();
        t.bigchat.open(42, now - 1000, 1);
        t.bigchat.open(11, now - 1000, 1);
        t.delivers([message(42, now - 5, "one"), message(11, now - 5, "one")])
            .await;
        let chats = t.our_api.data().chats;
        let chat = chats.iter().find(|chat| chat.external_id == "42");
        let chat = chat.expect("a chat").chat_id;
        rejects_many_changes(t, 42, now - 500).await;
        // Another client adds a message, and a lost response makes the daemon read it.
        let sent_at = now + 3;
        let url = format!("{}/chats/{chat}/messages", t.our_api.url());
        let body = json!({"sent_at": time(sent_at), "text": "hello"});
        let added = reqwest::Client::new().post(url).json(&body).send().await;
        assert!(added.expect("an answer").status().is_success());
        let messages = format!("GET /chats/{chat}/messages");
        let add = format!("POST /chats/{chat}/messages");
        t.our_api.upset(&add, dropped());
        t.our_api.upset(&add, paused());
        t.bigchat.reports([message(42, now, "two")]);
        until("it is sent again", async || t.our_api.pausing() == 1).await;
        // Its credit is left as long as an event waits.
        t.our_api.upset(&messages, status(500).always());
        t.our_api.upset(&add, crashed().carried_out());
        t.bigchat.reports([message(42, sent_at, "hello")]);
        until("it waits", async || t.events("waiting") == 2).await;
        t.our_api.resume();
        until("that is recorded", async || {
            t.value::<i64>("SELECT count(*) FROM attempts WHERE outcome_unknown") == 1
        })
        .await;
        t.failed_command(&["retry", "--all"])
            .expect("all are tried again");
        let waiting = "SELECT waiting FROM conversations WHERE bigchat_id = 42";
        attempts_count_until(t, "nothing waits", || t.value::<i64>(waiting) == 0).await;
        let hello = t.our_api.messages();
        let hello = hello.iter().filter(|text| *text == "hello").count();
        assert_eq!(hello, 2, "another client's, and ours");
    })
    .await;
}

/// A message that a proxy refuses, although OurAPI adds it, is read back, although many changes wait before it.
async fn is_read_back_behind_many_changes(refusal: u16) {
    run_live_test(async |t| {
        t.set("--retry-initial", "5s").set("--retry-max", "5s");
        settled(t, t).await;
        let now = t.now();
        t.bigchat.open(10, now - 1000, 1);
        t.delivers([message(10, now - 5, "one")]).await;
        rejects_many_changes(t, 10, now - 500).await;
        t.our_api
            .upset("POST /chats/{id}/messages", status(refusal).carried_out());
        t.bigchat.reports([message(10, now, "hello")]);
        until("it has failed", async || {
            t.value::<i64>("SELECT count(*) FROM attempts") == 202
        })
        .await;
        t.failed_command(&["retry", "--all"])
            .expect("all are tried again");
        t.until_events("waiting", 0).await;
        assert_eq!(t.our_api.sorted_messages(), ["hello", "one"]);
    })
    .await;
}

#[tokio::test]
async fn refused_message_behind_many_changes() {
    is_read_back_behind_many_changes(403).await;
}

#[tokio::test]
async fn rejected_message_retried_behind_many_changes() {
    is_read_back_behind_many_changes(422).await;
}
