//! OurAPI loses data, or has data that this journal does not know.

use super::until_meanwhile;
use crate::harness::process::Process;
use crate::harness::services::ADD_MESSAGE;
use crate::harness::{Bench, run_live_test, run_test, until};
use bigchat_sync::simulator::compare::Rules;
use bigchat_sync::simulator::event::{end, message, start, transfer};
use bigchat_sync::simulator::fault::{crashed, html, paused, status};
use std::time::{Duration, Instant};

use serde_json::json;

#[tokio::test]
async fn chat_lost_among_its_messages() {
    run_live_test(async |t| {
        t.our_api.set_latency(Duration::from_millis(30));
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        let six = (0..6).map(|n| message(10, now - 5, &format!("number {n}")));
        t.bigchat.reports(six);
        t.start();
        until("three of six", async || t.our_api.message_count() >= 3).await;
        t.our_api.loses_everything();
    })
    .await;
}

/// Messages that OurAPI has lost without their chat are sent again.
#[tokio::test]
async fn messages_lost_without_their_chat() {
    // This happens if OurAPI is restored from an older copy.
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.open(11, now - 100, 2);
        let events = vec![
            message(10, now - 5, "hello"),
            message(10, now - 5, "hello"),
            message(11, now - 5, "good morning"),
        ];
        t.bigchat.reports(events);
        let daemon = Process::start(t);
        t.until_events("delivered", 3).await;
        t.our_api.loses_message("10");
        t.our_api.loses_chat("11");
        t.bigchat.reports([message(11, now - 4, "are you there?")]);
        let sent_again = "OurAPI has lost messages of a chat; they are sent again";
        until("all is sent", async || {
            t.our_api.message_count() == 4
                && t.logged().contains(sent_again)
                && t.status().0["waiting"] == 0
        })
        .await;
        assert!(daemon.stop().await.success());
        let log = t.logged();
        for line in [sent_again, "OurAPI has lost a chat\""] {
            assert_eq!(log.matches(line).count(), 1, "{line}: {log}");
        }
    })
    .await;
}

/// Chats without messages are rebuilt, too, even if the first attempt fails.
#[tokio::test]
async fn rebuild_fails_at_first() {
    run_live_test(async |t| {
        let now = t.now();
        for id in [10, 11, 12] {
            t.bigchat.open(id, now - 100, id - 9);
        }
        let events = vec![
            end(10, now - 5),
            end(12, now - 5),
            message(11, now - 5, "hello"),
        ];
        t.bigchat.reports(events);
        t.start();
        t.until_events("delivered", 3).await;
        t.our_api.loses_everything();
        // The first attempt to create each of them fails.
        t.our_api.upset("POST /chats", crashed().times(3));
        t.bigchat.reports([message(11, now - 3, "hello again")]);
    })
    .await;
}

/// A chat delivered by another journal stays as it is.
#[tokio::test]
async fn chat_delivered_by_another_journal() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        let events = vec![
            message(10, now - 9, "hello"),
            transfer(10, now - 8, 7),
            end(10, now - 6),
        ];
        t.bigchat.reports(events);
        t.once().await;
        // That database is lost. With a new one, an earlier END and a message arrive.
        let other = Bench::new(&t.bigchat.url(), &t.our_api.url());
        let events = vec![end(10, now - 7), message(10, now - 5, "hello again")];
        t.bigchat.reports(events);
        let daemon = other.start();
        other.until_events("delivered", 2).await;
        t.bigchat.reports([end(10, now - 7), end(10, now - 8)]);
        other.until_events("delivered", 3).await;
        t.agrees().await;
        daemon.stop().await;
    })
    .await;
}

/// Many chats lost together count as one loss. Otherwise each of them would make all others stale again.
#[tokio::test]
async fn loss_of_many_chats_is_one_loss() {
    run_live_test(async |t| {
        let now = t.now();
        let (chats, daemon) = (10..16, t.start());
        for id in chats.clone() {
            t.bigchat.open(id, now - 100, 1);
        }
        t.bigchat
            .reports(chats.clone().map(|id| message(id, now - 9, "hello")));
        t.until_events("delivered", 6).await;
        t.our_api.loses_everything();
        t.bigchat
            .reports(chats.map(|id| message(id, now - 8, "hello again")));
        t.until_events("delivered", 12).await;
        t.agrees().await;
        daemon.stop().await;
        assert_eq!(t.losses(), 1);
    })
    .await;
}

/// Repeated losses have a cause that an operator must find.
#[tokio::test]
async fn repeated_losses_are_a_problem() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.reports([message(10, now - 9, "hello")]);
        t.start();
        t.until_events("delivered", 1).await;
        for loss in 1..=3_u8 {
            t.our_api.loses_everything();
            let text = format!("loss {loss}");
            t.bigchat
                .reports([message(10, now - 9 + i64::from(loss), &text)]);
            until("it is found", async || t.losses() >= u64::from(loss)).await;
            t.agrees().await;
            let is_reported = || {
                t.status().0["problems"]
                    .to_string()
                    .contains("OurAPI lost data ")
            };
            assert_eq!(is_reported(), t.losses() >= 3, "loss {loss}");
        }
    })
    .await;
}

#[tokio::test]
async fn false_loss_duplicates_nothing() {
    run_live_test(async |t| {
        t.set("--poll-overlap", "0s");
        let daemon = t.start();
        // Chats with events from before the start are read back in any case, so the windows must begin after the start.
        let started = t.now();
        t.until_cursor_passes(started).await;
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        let events = vec![message(10, now - 1, "one"), message(10, now - 1, "two")];
        t.bigchat.reports(events);
        t.until_events("delivered", 2).await;
        let faults = &t.our_api;
        faults.upset(ADD_MESSAGE, status(404));
        faults.upset("GET /chats", status(200).body("[]"));
        t.bigchat.reports([message(10, now, "three")]);
        t.until_events("delivered", 3).await;
        t.agrees().await;
        daemon.stop().await;
        assert_eq!(t.losses(), 1, "it was believed");
    })
    .await;
}

/// With `--rebuild off`, only what new events need is created.
#[tokio::test]
async fn loss_without_rebuild() {
    run_live_test(async |t| {
        t.differs("what is lost is not rebuilt");
        t.set("--rebuild", "off");
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.open(11, now - 100, 2);
        let events = vec![message(10, now - 5, "ten"), message(11, now - 5, "eleven")];
        t.bigchat.reports(events);
        let daemon = t.start();
        t.until_events("delivered", 2).await;
        t.our_api.loses_everything();
        t.bigchat.reports([message(10, now - 4, "ten again")]);
        t.until_events("delivered", 3).await;
        daemon.stop().await;
        assert_eq!(t.our_api.messages(), ["ten again"]);
        assert_eq!(t.our_api.chats().len(), 1);
        assert_eq!(t.our_api.data().agents.len(), 1);
    })
    .await;
}

/// With `--rebuild report`, a loss is logged once, and nothing is logged for a complete chat.
#[tokio::test]
async fn losses_are_reported_without_rebuild() {
    run_live_test(async |t| {
        t.differs("what is lost is not rebuilt");
        t.set("--rebuild", "report").set("--verify-every", "off");
        let now = t.now();
        for id in [10, 11] {
            t.bigchat.open(id, now - 100, 1);
        }
        let events = vec![message(10, now - 5, "ten"), message(11, now - 5, "eleven")];
        t.bigchat.reports(events);
        let daemon = Process::start(t);
        t.until_events("delivered", 2).await;
        t.our_api.loses_message("10");
        assert!(daemon.stop().await.success());
        // After a crash, chats with waiting messages are read back.
        t.execute("UPDATE control SET clean_end = 0");
        t.bigchat.reports(vec![
            message(10, now - 4, "ten again"),
            message(11, now - 4, "eleven again"),
        ]);
        let daemon = Process::start(t);
        t.until_events("delivered", 4).await;
        assert!(daemon.stop().await.success());
        let log = t.logged();
        let lines = log.lines();
        let reports: Vec<_> = lines
            .filter(|line| line.contains("it is not restored, because of --rebuild"))
            .collect();
        assert_eq!(reports.len(), 1, "{log}");
        assert!(reports[0].contains("1 message"), "{log}");
    })
    .await;
}

/// A change by another client is logged once, however often the chat is read back.
#[tokio::test]
async fn drift_is_reported_once() {
    run_live_test(async |t| {
        t.differs("another client changes a chat");
        t.set("--verify-every", "off");
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        for n in 1..=3 {
            t.bigchat
                .reports([message(10, now - 5, &format!("message {n}"))]);
            let daemon = Process::start(t);
            t.until_events("delivered", n).await;
            assert!(daemon.stop().await.success());
            let log = t.logged();
            let reported = log.matches("changed in OurAPI by another client").count();
            assert_eq!(reported, usize::from(n > 1), "{log}");
            let started = json!({"started_at": "2026-11-22T21:00:00Z"});
            t.our_api.is_changed("10", &started).await;
            // After a crash, a chat with waiting messages is read back.
            t.execute("UPDATE control SET clean_end = 0");
        }
    })
    .await;
}

#[tokio::test]
async fn html_is_no_success() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.reports([message(10, now - 5, "hello")]);
        t.start();
        t.until_events("delivered", 1).await;
        t.our_api.upset("*", html().times(2));
        t.bigchat.reports([end(10, now - 4)]);
        t.until_events("delivered", 2).await;
    })
    .await;
}

#[tokio::test]
async fn lost_agent_delays_no_message() {
    run_live_test(async |t| {
        t.rules(Rules {
            credited: true,
            ..Rules::default()
        });
        t.set("--rebuild", "off").set("--message-author", "agent");
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.reports([message(10, now - 5, "one")]);
        let daemon = t.start();
        t.until_events("delivered", 1).await;
        t.our_api.loses_agents();
        t.bigchat.reports([message(10, now - 4, "two")]);
        t.until_events("delivered", 2).await;
        daemon.stop().await;
        let [agent] = &t.our_api.data().agents[..] else {
            panic!("one agent: {:?}", t.our_api.data().agents);
        };
        assert_eq!(t.our_api.data().chats[0].agent_id, Some(agent.agent_id));
    })
    .await;
}

/// All chats except those whose agent cannot be created are rebuilt.
#[tokio::test]
async fn chats_that_cannot_be_rebuilt() {
    run_test(async |t| {
        t.differs("Ann cannot be created again");
        t.start();
        t.delivers([end(1, 10), end(42, 10)]).await;
        t.delivers([transfer(43, 11, 8), message(43, 12, "lost")])
            .await;
        t.delivers([transfer(44, 13, 8), message(44, 14, "news")])
            .await;
        t.our_api.loses_everything();
        // Ann can no longer be created, but Bob can.
        let ann = r#"POST /agents {"email":"ann@x.test""#;
        t.our_api.upset(ann, status(500).always());
        t.bigchat.reports([message(44, 20, "more news")]);
        until("the chats of other agents are rebuilt", async || {
            t.our_api.messages().iter().any(|text| text == "lost")
        })
        .await;
    })
    .await;
}

/// A chat that is gone again right after its creation is not created again at once, and again.
#[tokio::test]
async fn chat_vanishes_after_its_creation() {
    run_test(async |t| {
        t.differs("OurAPI stores nothing");
        t.set("--retry-initial", "1s").set("--retry-max", "60s");
        let daemon = t.start();
        t.bigchat.reports([start(42, 0), message(42, 1, "hello")]);
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if !t.our_api.chats().is_empty() {
                t.our_api.loses_everything();
            }
            tokio::task::yield_now().await;
        }
        let created = t.our_api.count("POST /chats");
        daemon.stop().await;
        assert!(created < 50, "{created} creations in 10 s");
    })
    .await;
}

/// A chat that could not be read after one loss is read as often as any other after the next.
#[tokio::test]
async fn failed_read_after_an_earlier_unreadable_chat() {
    run_test(async |t| {
        t.set("--max-attempts", "3")
            .set("--retry-max", "40ms")
            .set("--verify-every", "off");
        t.start();
        t.delivers([start(42, 0), start(43, 1), message(42, 5, "hello")])
            .await;
        let is_verified = |losses: i64| {
            t.value::<i64>(&format!(
                "SELECT count(*) FROM conversations WHERE verified_losses >= {losses} AND due_at IS NULL"
            )) == 2
        };
        let read = "GET /chats/c1/messages";
        t.our_api.upset(read, status(500).always());
        t.our_api.loses_chat("43");
        t.bigchat.reports([message(43, 10, "are you there?")]);
        until_meanwhile(t, (43, 20), "it is given up", || is_verified(1)).await;
        t.until_events("waiting", 0).await;
        t.our_api.calm();
        let before = t.our_api.count(read);
        // It can be read again, and has lost a message.
        t.our_api.loses_message("42");
        t.our_api.upset(read, status(500));
        t.our_api.loses_chat("43");
        t.bigchat.reports([message(43, 11, "and now?")]);
        until("it is read again", async || is_verified(2)).await;
        assert!(
            t.our_api.messages().contains(&"hello".to_owned()),
            "the message is not restored: {} reads",
            t.our_api.count(read) - before
        );
    })
    .await;
}

/// The failures before an event was delivered do not count when it is sent again after a loss.
#[tokio::test]
async fn failures_before_a_loss_do_not_count_after_it() {
    run_live_test(async |t| {
        t.set("--retry-max", "40ms");
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.open(11, now - 100, 2);
        t.start();
        t.delivers([message(10, now - 9, "one"), message(11, now - 9, "one")])
            .await;
        let mut others = 0;
        let mut meanwhile = async || {
            others += 1;
            t.bigchat
                .reports([message(11, now, &format!("meanwhile {others}"))]);
            t.bigchat.further_polls(1).await;
        };
        // It fails several times, and is delivered.
        t.our_api
            .upset("POST /chats/*/messages*difficult", status(500).always());
        t.bigchat.reports([message(10, now - 5, "difficult")]);
        let counted = || t.value::<Option<i64>>("SELECT max(counted) FROM attempts");
        until("failures count", async || {
            meanwhile().await;
            counted() >= Some(5)
        })
        .await;
        t.our_api.calm();
        t.until_events("waiting", 0).await;
        // It fails once more after a loss.
        t.our_api.loses_chat("10");
        t.our_api
            .upset("POST /chats/*/messages*difficult", status(500));
        t.bigchat.reports([message(10, now - 4, "are you there?")]);
        until("it is sent again", async || {
            meanwhile().await;
            t.our_api.unmet().is_empty() && t.losses() == 1
        })
        .await;
        t.until_events("waiting", 0).await;
        assert_eq!(
            (t.events("failed"), counted()),
            (0, Some(0)),
            "it has failed once"
        );
    })
    .await;
}

/// A loss elsewhere does not make a message be sent twice that was just delivered, and that OurAPI does not show yet.
#[tokio::test]
async fn reads_that_lag_behind_and_a_loss() {
    run_test(async |t| {
        t.start();
        t.delivers([start(42, 0), start(43, 1), message(42, 5, "hello")])
            .await;
        t.our_api.loses_chat("42");
        t.our_api
            .upset("GET /chats/c2/messages", status(200).body("[]"));
        t.bigchat.reports([
            message(43, 10, "just delivered"),
            message(42, 11, "are you there?"),
        ]);
        t.until_events("waiting", 0).await;
        t.agrees().await;
    })
    .await;
}

/// An agent that OurAPI has lost is not reported as the change of another client.
#[tokio::test]
async fn lost_agent_is_no_drift() {
    run_test(async |t| {
        t.start();
        t.delivers([start(42, 0), transfer(42, 2, 8)]).await;
        t.delivers([transfer(42, 3, 7)]).await;
        t.our_api.loses_agents();
        t.our_api.upset("POST /agents", paused());
        t.bigchat.reports([transfer(42, 5, 8)]);
        until("the agent is created again", async || {
            t.our_api.pausing() == 1
        })
        .await;
        let drift = t.value::<Option<String>>("SELECT max(drift) FROM conversations");
        t.our_api.resume();
        t.agrees().await;
        assert_eq!(drift, None, "no other client has changed the chat");
    })
    .await;
}
