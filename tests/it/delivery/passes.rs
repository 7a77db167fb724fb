//! Verification passes in idle time: losses that no event touches are found, and restored or reported.

use std::time::{Duration, Instant};

use bigchat_sync::simulator::event::{end, message, start, transfer};
use bigchat_sync::simulator::fault::{dropped, paused, status};
use bigchat_sync::simulator::id;
use serde_json::{Value, json};

use bigchat_sync::http::Api;

use super::until_meanwhile;
use super::verify::verify;
use crate::harness::process::Process;
use crate::harness::{Bench, Test, run_test, side_by_side, until};

/// Delivers some conversations.
async fn delivered(t: &Test, conversations: std::ops::Range<i64>) {
    let events = conversations.clone().flat_map(|id| {
        t.bigchat.open(id, id, 7);
        [
            start(id, id),
            message(id, 200, "hello"),
            message(id, 201, "goodbye"),
        ]
    });
    t.bigchat.reports(events.collect::<Vec<_>>());
    t.once().await;
    t.our_api.asked();
}

/// Makes a pass due: the next daemon begins it immediately, and begins no other within a day.
fn pass_is_due(t: &Bench) {
    t.execute(
        "DELETE FROM verifications;
         INSERT INTO verifications (idle, requested_at, ended_at, repair, last_event) VALUES (1, 0, 0, 0, 0)",
    );
}

/// Checks that a pass restores what is lost.
async fn is_restored(t: &Test) {
    assert!(!t.compare().is_clean());
    pass_is_due(t);
    t.start();
    t.agrees().await;
}

/// Waits until that pass has ended.
async fn until_verified(t: &Bench) {
    until("the pass has ended", async || has_ended(t)).await;
}

/// Runs a daemon for one pass.
async fn make_a_pass(t: &Test) {
    pass_is_due(t);
    let daemon = t.start();
    until_verified(t).await;
    daemon.stop().await;
}

/// Whether that pass has ended.
fn has_ended(t: &Bench) -> bool {
    t.value("SELECT EXISTS (SELECT 1 FROM verifications WHERE requested_at > 0 AND ended_at IS NOT NULL)")
}

/// Changes a chat, as another client would.
async fn another_client_changes(t: &Test, external_id: &str, change: &Value) {
    t.our_api.is_changed(external_id, change).await;
    t.our_api.asked();
}

const NO_WRITES: [&String; 0] = [];

fn writes(asked: &[String]) -> Vec<&String> {
    let is_write = |line: &&String| !line.starts_with("GET");
    asked.iter().filter(is_write).collect()
}

/// Losses that no event touches are restored.
#[tokio::test]
async fn untouched_losses_are_restored() {
    run_test(async |t| {
        delivered(t, 10..13).await;
        t.our_api.loses_chat("10");
        t.our_api.loses_message("11");
        is_restored(t).await;
        until_verified(t).await;
    })
    .await;
}

/// An end time that OurAPI has lost is restored.
#[tokio::test]
async fn lost_end_is_restored() {
    run_test(async |t| {
        delivered(t, 10..11).await;
        t.bigchat.reports([end(10, 300)]);
        t.once().await;
        another_client_changes(t, "10", &json!({"ended_at": null})).await;
        is_restored(t).await;
        until_verified(t).await;
    })
    .await;
}

/// Agents that OurAPI has lost are restored.
#[tokio::test]
async fn untouched_agents_are_restored() {
    run_test(async |t| {
        delivered(t, 10..12).await;
        t.our_api.loses_agents();
        is_restored(t).await;
    })
    .await;
}

#[tokio::test]
async fn passes_follow_one_another() {
    run_test(async |t| {
        t.set("--verify-every", "20ms");
        delivered(t, 10..13).await;
        t.start();
        for _ in 0..2 {
            t.our_api.loses_chat("12");
            assert!(!t.compare().is_clean());
            t.agrees().await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drift_reported_once_a_pass() {
    run_test(async |t| {
        t.differs("another client changes a chat");
        delivered(t, 10..12).await;
        let started = "2026-11-22T21:00:00Z";
        let agent = t.our_api.data().agents[0].agent_id;
        another_client_changes(t, "10", &json!({"started_at": started})).await;
        another_client_changes(t, "11", &json!({"agent_id": null})).await;
        for pass in 1..=2 {
            pass_is_due(t);
            // The first two reads of messages fail.
            let unreadable = status(500).times(2);
            t.our_api.upset("GET /chats/{id}/messages", unreadable);
            let daemon = Process::start(t);
            until_verified(t).await;
            let (shown, _) = t.status();
            assert!(daemon.stop().await.success());
            let asked = t.our_api.asked();
            let reads = asked.iter().filter(|line| line.starts_with("GET /chats?"));
            assert!(reads.count() > 3, "{asked:#?}");
            assert_eq!(writes(&asked), Vec::<&String>::new());
            let log = t.logged();
            assert_eq!(log.matches("changed in OurAPI by another client").count(), 2 * pass, "{log}");
            let drift = |chat: &str, field: &str| json!({"external_id": chat, "drift": field, "missing": null});
            let expected = json!([drift("10", "started_at"), drift("11", "agent_id")]);
            assert_eq!(shown["differing"], expected, "{shown:#}");
            assert_eq!((&shown["drifted"], &shown["incomplete"]), (&json!(2), &json!(0)));
        }
        // Both chats are changed back.
        another_client_changes(t, "10", &json!({"started_at": "2026-11-22T22:00:10Z"})).await;
        another_client_changes(t, "11", &json!({"agent_id": agent})).await;
        make_a_pass(t).await;
        assert_eq!(t.status().0["differing"], json!([]));
        assert_eq!(writes(&t.our_api.asked()), Vec::<&String>::new());
    })
    .await;
}

/// With `--rebuild report`, an erased chat stays erased.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn erased_chat_with_rebuild_report() {
    run_test(async |t| {
        t.differs("what is lost is not restored");
        t.set("--rebuild", "report");
        delivered(t, 10..13).await;
        t.our_api.loses_chat("10");
        t.our_api.loses_message("11");
        pass_is_due(t);
        let daemon = t.start();
        until_verified(t).await;
        let shown = t.status().0;
        let missing =
            |chat: &str, what: &str| json!({"external_id": chat, "drift": null, "missing": what});
        let expected = json!([
            missing("10", "the chat, 2 messages"),
            missing("11", "1 message")
        ]);
        assert_eq!(shown["differing"], expected, "{shown:#}");
        assert_eq!(shown["incomplete"], json!(2));
        assert_eq!(writes(&t.our_api.asked()), Vec::<&String>::new());
        // Only the chat of a new event is built.
        let asked = t.delivers([message(10, 400, "Is this on?")]).await;
        assert_eq!(writes(&asked).len(), 2, "{asked:#?}");
        daemon.stop().await;
        assert_eq!(
            t.our_api.data().messages.values().flatten().count(),
            1 + 1 + 2
        );
        make_a_pass(t).await;
        let shown = t.status().0;
        let expected = json!([missing("10", "2 messages"), missing("11", "1 message")]);
        assert_eq!(shown["differing"], expected, "{shown:#}");
        // With `--rebuild auto`, everything is restored.
        t.set("--rebuild", "auto");
        pass_is_due(t);
        t.start();
        t.agrees().await;
        until_verified(t).await;
        assert_eq!(t.status().0["differing"], json!([]));
    })
    .await;
}

/// No chat is read if passes are off.
#[tokio::test]
async fn passes_are_off() {
    let off = [("--rebuild", "off"), ("--verify-every", "off")];
    side_by_side(off, async |(flag, value)| {
        run_test(async |t| {
            t.differs("what is lost is not restored");
            t.set("--verify-every", "1ms").set(flag, value);
            delivered(t, 10..12).await;
            t.our_api.loses_chat("10");
            pass_is_due(t);
            t.start();
            // Longer than the interval at which delivery checks the journal anyway.
            t.bigchat.further_polls(40).await;
            assert_eq!(t.our_api.asked(), Vec::<String>::new());
        })
        .await;
    })
    .await;
}

#[tokio::test]
async fn a_pass_gives_way_to_events() {
    run_test(async |t| {
        delivered(t, 10..12).await;
        pass_is_due(t);
        t.our_api.upset("GET /chats", paused());
        t.start();
        until("a chat is read", async || t.our_api.pausing() == 1).await;
        t.bigchat.reports([message(11, 300, "first")]);
        t.until_events("waiting", 1).await;
        t.bigchat.further_polls(2).await;
        t.our_api.resume();
        t.until_events("delivered", 7).await;
        let asked = t.our_api.asked();
        let before: Vec<&String> = asked
            .iter()
            .take_while(|line| !line.contains("first"))
            .collect();
        assert!(before[0].contains("external_id=10"), "{asked:#?}");
        let is_of_another =
            |line: &&String| !line.contains("external_id=11") && !line.contains("c2");
        let of_others = before.into_iter().skip(1).filter(is_of_another);
        assert_eq!(of_others.count(), 0, "{asked:#?}");
    })
    .await;
}

/// An outage only interrupts a pass.
#[tokio::test]
async fn outage_interrupts_a_pass() {
    run_test(async |t| {
        delivered(t, 10..16).await;
        pass_is_due(t);
        t.our_api.upset("GET /chats/{id}/messages", paused());
        t.start();
        until("a chat is read", async || t.our_api.pausing() == 1).await;
        let pass: i64 = t.value("SELECT id FROM verifications");
        t.our_api.outage(Some(status(503)));
        t.our_api.loses_chat("15");
        t.our_api.resume();
        until("OurAPI is down", async || {
            t.value("SELECT EXISTS (SELECT 1 FROM api_status WHERE name = 'our_api' AND state = 'down')")
        })
        .await;
        assert!(t.value::<bool>("SELECT ended_at IS NULL FROM verifications"));
        t.our_api.outage(None);
        t.agrees().await;
        until_verified(t).await;
        assert_eq!(t.value::<i64>("SELECT id FROM verifications"), pass);
    })
    .await;
}

/// After a restart, the pass continues.
#[tokio::test]
async fn pass_continues_after_restart() {
    run_test(async |t| {
        delivered(t, 10..18).await;
        pass_is_due(t);
        t.our_api.set_latency(Duration::from_millis(10));
        let daemon = t.start();
        until("some chats are verified", async || {
            t.value::<i64>("SELECT verified FROM verifications") >= 3
        })
        .await;
        daemon.stop().await;
        let pass: i64 = t.value("SELECT id FROM verifications WHERE ended_at IS NULL");
        t.start();
        until_verified(t).await;
        let verified: (i64, i64) = (
            t.value("SELECT id FROM verifications"),
            t.value("SELECT verified FROM verifications"),
        );
        assert_eq!(verified, (pass, 8));
        // The chat in flight when the daemon stopped is read again.
        let reads = t.our_api.count("GET /chats?");
        assert!((8..=9).contains(&reads), "{reads}");
    })
    .await;
}

#[tokio::test]
async fn chats_of_all_epochs_are_restored() {
    run_test(async |t| {
        let daemon = t.start();
        t.delivers([start(42, 0), message(42, 1, "of before")])
            .await;
        t.bigchat.restarts(42, 100);
        t.bigchat.advisor(7, "Carl", "carl@x.test");
        t.delivers([start(42, 100), message(42, 101, "of after")])
            .await;
        daemon.stop().await;
        for chat in ["42", "42@2026-11-22T22:01:40Z"] {
            t.our_api.loses_chat(chat);
        }
        assert!(t.our_api.chats().is_empty());
        pass_is_due(t);
        t.start();
        t.agrees().await;
        assert_eq!(t.our_api.chats().len(), 2);
    })
    .await;
}

/// With a short `--verify-every`, passes take at most a tenth of the time.
#[tokio::test]
async fn passes_take_a_tenth_of_time() {
    run_test(async |t| {
        const LATENCY: Duration = Duration::from_millis(10);
        t.set("--verify-every", "1ms");
        delivered(t, 10..13).await;
        t.our_api.set_latency(LATENCY);
        let began = Instant::now();
        t.start();
        let reads = || t.our_api.ever_asked("GET /chats/{id}/messages").len();
        until("two passes", async || reads() >= 7).await;
        let (took, reads) = (began.elapsed(), u32::try_from(reads()).expect("few"));
        // For each chat, the list and the messages are read. After the last one there is no pause yet.
        let at_least = LATENCY * 2 * 10 * (reads - 1);
        assert!(took >= at_least, "{reads} chats in {took:?}");
        until("status says that it takes longer", async || {
            let status = t.program("status").output().expect("a process");
            String::from_utf8_lossy(&status.stdout).contains("longer than --verify-every")
        })
        .await;
    })
    .await;
}

/// A chat that cannot be read does not stop a pass.
#[tokio::test]
async fn unreadable_chat_in_a_pass() {
    run_test(async |t| {
        t.set("--max-attempts", "3");
        delivered(t, 10..13).await;
        t.our_api
            .upset("GET /chats/c1/messages", status(500).always());
        pass_is_due(t);
        t.start();
        until_verified(t).await;
        assert_eq!(t.value::<i64>("SELECT verified FROM verifications"), 3);
        assert!(t.our_api.injected() > 0, "one list cannot be read");
        assert_ne!(t.is_up(Api::OurApi), Some(false), "only one");
    })
    .await;
}

/// The same while other chats get messages, so that the chat is claimed between two reads.
#[tokio::test]
async fn unreadable_chat_among_active_ones() {
    run_test(async |t| {
        t.set("--max-attempts", "3").set("--retry-initial", "100ms");
        delivered(t, 10..12).await;
        t.our_api
            .upset("GET /chats/c1/messages", status(500).always());
        pass_is_due(t);
        t.start();
        let mut at = 300..;
        until("the pass has ended", async || {
            let at = at.next().expect("a number");
            t.bigchat.reports([message(11, at, "hello again")]);
            t.bigchat.further_polls(1).await;
            has_ended(t)
        })
        .await;
        assert!(t.our_api.injected() > 0, "one list cannot be read");
    })
    .await;
}

/// A loss elsewhere is no reason to set an agent again that another client has removed.
#[tokio::test]
async fn removed_agent_and_a_loss_elsewhere() {
    run_test(async |t| {
        t.differs("another client changes a chat");
        t.bigchat.reports([start(42, 0), start(43, 1)]);
        t.once().await;
        another_client_changes(t, "42", &json!({"agent_id": null})).await;
        t.our_api.loses_chat("43");
        t.bigchat.reports([message(43, 2, "hello")]);
        let daemon = t.start();
        t.until_events("delivered", 3).await;
        until("the other chat is read", async || {
            t.value("SELECT NOT EXISTS (SELECT 1 FROM conversations WHERE due_at IS NOT NULL)")
        })
        .await;
        daemon.stop().await;
        assert_eq!(t.status().0["drifted"], json!(1));
        assert!(
            t.our_api.chats().contains(&"42 22:00:00 - -".to_owned()),
            "{:?}",
            t.our_api.chats()
        );
    })
    .await;
}

/// An agent that OurAPI has lost is replaced, even if another client had set it.
#[tokio::test]
async fn gone_agent_of_another_client() {
    run_test(async |t| {
        t.our_api.has_agent("b9", "Bob", "bob@x.test");
        t.bigchat.reports([start(42, 0)]);
        t.once().await;
        let delivered = t.our_api.chats();
        another_client_changes(t, "42", &json!({"agent_id": id("b9")})).await;
        make_a_pass(t).await;
        assert_eq!(t.status().0["drifted"], json!(1));
        t.our_api.loses_agent("bob@x.test");
        pass_is_due(t);
        t.start();
        until("the agent is set", async || t.our_api.chats() == delivered).await;
    })
    .await;
}

/// If OurAPI also removes a lost agent from its chats, the agent is set again, even if the chat is read for another
/// reason before the loss is noticed.
#[tokio::test]
async fn agent_lost_and_removed_from_chat() {
    run_test(async |t| {
        t.set("--verify-every", "off");
        t.bigchat.reports([start(42, 0)]);
        t.once().await;
        let agent = t.our_api.data().agents.remove(0);
        another_client_changes(t, "42", &json!({"agent_id": null})).await;
        t.our_api.loses_agent(&agent.email);
        let add = "POST /chats/{id}/messages";
        t.our_api.upset(add, dropped().carried_out());
        t.bigchat.reports([message(42, 5, "hello")]);
        t.start();
        t.until_events("delivered", 2).await;
        until("the chat has its agent", async || {
            let data = t.our_api.data();
            let mut agents = data.agents.iter();
            agents.any(|found| {
                found.email == agent.email && data.chats[0].agent_id == Some(found.agent_id)
            })
        })
        .await;
        assert_eq!(t.our_api.messages(), ["hello"]);
    })
    .await;
}

/// If OurAPI loses the agent and BigChat no longer knows the advisor, the chat has no agent.
#[tokio::test]
async fn gone_agent_and_gone_advisor() {
    run_test(async |t| {
        t.our_api.has_agent("b9", "Bob", "bob@x.test");
        t.bigchat.forgets_advisor(7);
        t.bigchat.open(42, 0, 7);
        let daemon = t.start();
        t.delivers([start(42, 0)]).await;
        daemon.stop().await;
        another_client_changes(t, "42", &json!({"agent_id": id("b9")})).await;
        t.our_api.loses_agent("bob@x.test");
        pass_is_due(t);
        let daemon = t.start();
        until("the chat has no agent", async || {
            t.our_api.chats() == ["42 22:00:00 - -"]
        })
        .await;
        until_verified(t).await;
        daemon.stop().await;
        t.our_api.asked();
        make_a_pass(t).await;
        assert_eq!(writes(&t.our_api.asked()), NO_WRITES);
    })
    .await;
}

/// OurAPI may not show yet what was just delivered, so a chat is read 2 s later.
#[tokio::test]
async fn reads_that_lag_behind() {
    run_test(async |t| {
        delivered(t, 42..43).await;
        // However long it takes to start the daemon.
        t.execute("UPDATE deliveries SET delivered_at = delivered_at + 3600000");
        pass_is_due(t);
        let began = Instant::now();
        let daemon = t.start();
        until("the chat is read", async || {
            t.our_api.count("GET /chats?") > 0
        })
        .await;
        assert!(began.elapsed() >= Duration::from_secs(2));
        until_verified(t).await;
        daemon.stop().await;
        assert_eq!(writes(&t.our_api.asked()), NO_WRITES);
    })
    .await;
}

/// After a pass has forgotten that an advisor is denied, the messages of existing chats still do not wait for an answer
/// about the advisor.
#[tokio::test]
async fn advisor_fails_after_a_denial() {
    run_test(async |t| {
        t.differs("the advisor is denied");
        let advisor = "GET /advisors/7";
        t.bigchat.upset(advisor, status(404).times(3));
        let daemon = t.start();
        t.delivers([start(42, 0), message(42, 1, "hello")]).await;
        daemon.stop().await;
        t.bigchat.calm();
        t.bigchat.upset(advisor, status(500).always());
        make_a_pass(t).await;
        t.start();
        t.delivers([message(42, 2, "again")]).await;
    })
    .await;
}

/// If BigChat denies an advisor, or OurAPI the agent, nothing but the agent is missing. `status` names the advisor, and
/// the next pass sets the agent. Until then the cost of an event does not rise.
#[tokio::test]
async fn denied_advisor_has_an_agent_after_the_next_pass() {
    let (advisor, agent) = ("GET /advisors/7", "POST /agents");
    let record = |body| status(200).body(body).always();
    side_by_side(
        [
            ("advisor", advisor, status(404).always()),
            ("advisor", advisor, record(r#"{"name":"Ann"}"#)),
            (
                "advisor",
                advisor,
                record(r#"{"name":"Ann","email_address":7}"#),
            ),
            ("agent", agent, status(422).always()),
            ("agent", agent, status(409).body("{}").always()),
        ],
        async |(denied, route, upset)| {
            run_test(async |t| {
                match denied {
                    "agent" => t.our_api.upset(route, upset),
                    _ => t.bigchat.upset(route, upset),
                }
                let daemon = t.start();
                t.delivers([start(42, 0), message(42, 1, "hello")]).await;
                t.delivers([start(43, 1)]).await;
                assert_eq!(t.our_api.chats(), ["42 22:00:00 - -", "43 22:00:01 - -"]);
                let asked = t.bigchat.count(advisor);
                assert_eq!(asked, if denied == "agent" { 1 } else { 3 });
                for api in Api::ALL {
                    assert_eq!(t.is_up(api), Some(true), "{api}");
                }
                let (shown, _) = t.status();
                let named = json!([{"denied": denied, "count": 1, "advisors": [7]}]);
                assert_eq!(shown["without_agent"], named);
                let text = t.program("status").output().expect("a process").stdout;
                let line = String::from_utf8_lossy(&text).into_owned();
                assert!(line.contains("no agent      1 advisor who"), "{line}");
                daemon.stop().await;
                make_a_pass(t).await;
                assert_eq!(t.status().0["without_agent"], named, "one is enough now");
                t.bigchat.calm();
                t.our_api.calm();
                make_a_pass(t).await;
                assert_eq!(t.our_api.chats(), ["42 22:00:00 - a1", "43 22:00:01 - a1"]);
                assert_eq!(t.status().0["without_agent"], json!([]));
                t.our_api.asked();
                make_a_pass(t).await;
                assert_eq!(writes(&t.our_api.asked()), NO_WRITES);
            })
            .await;
        },
    )
    .await;
}

/// BigChat knows conversation 1 again, and a probe finds it.
async fn knows_conversation_1_again(t: &Test) {
    t.bigchat.calm();
    until("a probe has found conversation 1", async || {
        t.value("SELECT started_at IS NOT NULL FROM conversations WHERE bigchat_id = 1")
    })
    .await;
}

/// If BigChat denies a conversation, the next pass asks again and sets the agent, unless another client has set one.
#[tokio::test]
async fn denied_conversation_has_an_agent_after_the_next_pass() {
    side_by_side([false, true], async |is_set| {
        run_test(async |t| {
            let details = "GET /conversations/42";
            t.bigchat.upset(details, status(404).always());
            let daemon = t.start();
            t.delivers([start(42, 0), message(42, 1, "hello")]).await;
            daemon.stop().await;
            assert_eq!(t.bigchat.count(details), 3);
            make_a_pass(t).await;
            assert_eq!(t.bigchat.count(details), 4, "one is enough now");
            assert_eq!(t.our_api.chats(), ["42 22:00:00 - -"]);
            if is_set {
                t.differs("another client changes a chat");
                t.our_api.has_agent("b9", "Bob", "bob@x.test");
                another_client_changes(t, "42", &json!({"agent_id": id("b9")})).await;
            }
            t.bigchat.calm();
            make_a_pass(t).await;
            let agent = if is_set { "b9" } else { "a1" };
            let expected = [format!("42 22:00:00 - {agent}")];
            assert_eq!(t.our_api.chats(), expected);
            t.our_api.asked();
            make_a_pass(t).await;
            t.start();
            t.delivers([message(42, 2, "again")]).await;
            assert_eq!(t.our_api.chats(), expected);
        })
        .await;
    })
    .await;
}

/// The same for conversation 1, of which every probe for a restart asks, too: the probe's answer must not hide that the
/// agent is still missing.
#[tokio::test]
async fn denied_first_conversation_has_an_agent_after_the_next_pass() {
    run_test(async |t| {
        let details = "GET /conversations/1";
        t.bigchat.upset(details, status(404).always());
        let daemon = t.start();
        t.delivers([message(1, 1, "hello")]).await;
        assert_eq!(t.our_api.chats(), ["1 22:00:01 - -"]);
        knows_conversation_1_again(t).await;
        daemon.stop().await;
        make_a_pass(t).await;
        make_a_pass(t).await;
        assert_eq!(t.our_api.chats(), ["1 21:00:00 - a1"]);
    })
    .await;
}

/// A start that becomes known after the chat was created is written, even if no further event arrives.
#[tokio::test]
async fn late_start_of_the_first_conversation_is_written_by_a_pass() {
    run_test(async |t| {
        t.bigchat
            .upset("GET /conversations/1", status(404).always());
        let daemon = t.start();
        t.delivers([message(1, 1, "hello"), transfer(1, 3, 8)])
            .await;
        assert_eq!(t.our_api.chats(), ["1 22:00:01 - a1"]);
        knows_conversation_1_again(t).await;
        daemon.stop().await;
        make_a_pass(t).await;
        assert_eq!(t.our_api.chats(), ["1 21:00:00 - a1"]);
    })
    .await;
}

/// A 404 of another service does not prove that an agent is gone.
#[tokio::test]
async fn agent_of_another_client_and_a_404() {
    run_test(async |t| {
        t.differs("another client changes a chat");
        t.our_api.has_agent("b9", "Bob", "bob@x.test");
        t.bigchat.reports([start(42, 0)]);
        t.once().await;
        another_client_changes(t, "42", &json!({"agent_id": id("b9")})).await;
        t.our_api.upset("GET /agents/{id}", status(404));
        make_a_pass(t).await;
        assert_eq!(t.our_api.faults_left(), 0);
        assert_eq!(writes(&t.our_api.asked()), NO_WRITES);
    })
    .await;
}

/// Lost agents are restored even if the journal does not know them, because no event has needed them since an earlier
/// loss.
#[tokio::test]
async fn gone_agent_missing_from_journal() {
    run_test(async |t| {
        delivered(t, 42..44).await;
        t.execute("DELETE FROM agents");
        t.our_api.loses_agents();
        is_restored(t).await;
    })
    .await;
}

/// A pass that only reports changes nothing, even if one of its requests fails.
#[tokio::test]
async fn failed_pass_changes_nothing() {
    side_by_side(
        [
            (
                "report",
                json!({"ended_at": null}),
                "missing",
                json!("ended_at"),
            ),
            (
                "auto",
                json!({"agent_id": null}),
                "drift",
                json!("agent_id"),
            ),
        ],
        async |(rebuild, change, shown, field)| {
            run_test(async |t| {
                t.differs("another client changes a chat");
                t.set("--rebuild", rebuild);
                t.bigchat
                    .reports([start(42, 0), message(42, 1, "hello"), end(42, 9)]);
                t.once().await;
                another_client_changes(t, "42", &change).await;
                t.our_api.upset("GET /agents?email=", status(500));
                make_a_pass(t).await;
                assert_eq!(t.our_api.faults_left(), 0);
                assert_eq!(writes(&t.our_api.asked()), NO_WRITES);
                assert_eq!(t.status().0["differing"][0][shown], field);
            })
            .await;
        },
    )
    .await;
}

/// A message says nothing about the agent: an agent that another client has removed stays removed.
#[tokio::test]
async fn removed_agent_stays_removed() {
    run_test(async |t| {
        t.differs("another client changes a chat");
        t.bigchat.reports([start(42, 0), message(42, 1, "hello")]);
        t.once().await;
        another_client_changes(t, "42", &json!({"agent_id": null})).await;
        pass_is_due(t);
        let daemon = t.start();
        until_verified(t).await;
        assert_eq!(t.status().0["drifted"], json!(1));
        t.bigchat.reports([message(42, 2, "are you there?")]);
        t.until_events("delivered", 3).await;
        daemon.stop().await;
        assert_eq!(t.our_api.chats(), ["42 22:00:00 - -"]);
    })
    .await;
}

/// A verification that fails does not delay an event of its chat.
#[tokio::test]
async fn event_after_a_failed_verification() {
    run_test(async |t| {
        delivered(t, 10..12).await;
        t.set("--retry-initial", "20s").set("--retry-max", "60s");
        // Only one read of one chat fails.
        t.our_api.upset("GET /chats/c1/messages", status(500));
        pass_is_due(t);
        t.start();
        until("the failure is recorded", async || {
            t.value("SELECT EXISTS (SELECT 1 FROM conversations WHERE due_at IS NOT NULL)")
        })
        .await;
        let began = Instant::now();
        t.bigchat.reports([message(10, 300, "anybody?")]);
        t.until_events("delivered", 7).await;
        let took = began.elapsed();
        assert!(
            took < Duration::from_secs(4),
            "the event waited for {took:?}"
        );
    })
    .await;
}

/// An event that cannot be delivered for a long time does not end the verification of the other chats.
#[tokio::test]
async fn stuck_event_and_later_losses() {
    run_test(async |t| {
        t.differs("one event is stuck");
        t.set("--verify-every", "200ms");
        delivered(t, 10..13).await;
        let daemon = t.start();
        // BigChat refuses to say who advisor 9 is, for as long as this lasts.
        t.bigchat.upset("GET /advisors/9", status(401).always());
        t.bigchat.reports([transfer(10, 210, 9)]);
        until("the transfer fails", async || t.attempts() > 3).await;
        t.our_api.loses_chat("12");
        assert!(t.our_api.chats().len() == 2);
        let deadline = Instant::now() + Duration::from_secs(20);
        while t.our_api.chats().len() == 2 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let first = t.our_api.chats().len();
        t.our_api.loses_chat("12");
        let deadline = Instant::now() + Duration::from_secs(20);
        while t.our_api.chats().len() == 2 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let second = t.our_api.chats().len();
        daemon.stop().await;
        assert_eq!(
            (first, second),
            (3, 3),
            "restored after the first and the second loss"
        );
    })
    .await;
}

/// `verify` ends although one event cannot be delivered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verify_ends_beside_a_stuck_event() {
    run_test(async |t| {
        t.differs("one event is stuck");
        delivered(t, 10..13).await;
        let daemon = t.start();
        t.bigchat.upset("GET /advisors/9", status(401).always());
        t.bigchat.reports([transfer(10, 210, 9)]);
        until("the transfer fails", async || t.attempts() > 3).await;
        let verified = tokio::time::timeout(Duration::from_secs(20), verify(t, &[])).await;
        verified.expect("`verify` ends");
        t.our_api.loses_message("10");
        let repair = verify(t, &["--repair"]);
        let repaired = tokio::time::timeout(Duration::from_secs(40), repair).await;
        daemon.stop().await;
        let (output, _) = repaired.expect("`verify --repair` ends");
        assert!(
            output.contains("chat 10: not completely repaired: an event of the conversation waits"),
            "{output}"
        );
    })
    .await;
}

/// `verify` without `--repair` does not keep the passes from restoring what is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verify_beside_passes() {
    run_test(async |t| {
        t.differs("what is lost is not restored");
        t.set("--verify-every", "2s");
        delivered(t, 10..13).await;
        t.our_api.set_latency(Duration::from_millis(30));
        t.our_api.loses_chat("12");
        let daemon = t.start();
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut passes: Vec<i64> = Vec::new();
        let mut commands = 0;
        while t.our_api.chats().len() == 2 && Instant::now() < deadline {
            let pass = t.value("SELECT coalesce(max(id), 0) FROM verifications WHERE idle");
            if !passes.contains(&pass) {
                passes.push(pass);
            }
            verify(t, &[]).await;
            commands += 1;
        }
        daemon.stop().await;
        let passes = passes.len();
        assert_eq!(
            t.our_api.chats().len(),
            3,
            "after {passes} passes and {commands} commands"
        );
    })
    .await;
}

/// An invalid row of the database keeps only its own chat from being verified.
#[tokio::test]
async fn invalid_row_and_a_pass() {
    run_test(async |t| {
        t.differs("one row is invalid");
        delivered(t, 10..13).await;
        t.execute("UPDATE conversations SET chat_agent = 'nobody' WHERE bigchat_id = 10");
        // Otherwise, the verifications wait until reads show these deliveries for sure.
        t.execute("UPDATE deliveries SET delivered_at = 0");
        t.our_api.loses_message("12");
        pass_is_due(t);
        let daemon = t.start();
        let deadline = Instant::now() + Duration::from_secs(15);
        while t.our_api.messages().len() < 6 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        daemon.stop().await;
        assert_eq!(t.our_api.messages().len(), 6, "the message is restored");
    })
    .await;
}

/// An event whose row is invalid keeps only its own chat from being verified, in each pass.
#[tokio::test]
async fn invalid_event_and_later_passes() {
    run_test(async |t| {
        t.differs("one row is invalid");
        t.set("--max-attempts", "3")
            .set("--retry-initial", "50ms")
            .set("--retry-max", "100ms");
        delivered(t, 10..13).await;
        t.execute(
            "UPDATE events SET data = '{}' WHERE kind = 'MESSAGE'
                AND conversation = (SELECT id FROM conversations WHERE bigchat_id = 10)",
        );
        t.execute("UPDATE deliveries SET delivered_at = 0");
        t.set("--verify-every", "200ms");
        let daemon = t.start();
        for loss in ["first", "second"] {
            t.our_api.loses_chat("12");
            until(&format!("the {loss} loss is restored"), async || {
                t.our_api.chats().len() == 3
            })
            .await;
        }
        daemon.stop().await;
    })
    .await;
}

/// If BigChat denies a conversation, the next pass asks again and corrects the start, with and without a TRANSFER.
#[tokio::test]
async fn denied_conversation_has_its_start_after_the_next_pass() {
    for first in [message(42, 10, "first"), transfer(42, 10, 8)] {
        run_test(async |t| {
            let details = "GET /conversations/42";
            t.bigchat.upset(details, status(404).always());
            let daemon = t.start();
            t.delivers([first.clone(), message(42, 12, "hello")]).await;
            daemon.stop().await;
            assert!(t.our_api.chats()[0].starts_with("42 22:00:10 -"));
            t.bigchat.calm();
            for _ in 0..3 {
                make_a_pass(t).await;
            }
            let chats = t.our_api.chats();
            assert!(
                chats[0].starts_with("42 22:00:00 -"),
                "{first}: {chats:?}, asked {} times",
                t.bigchat.count(details)
            );
        })
        .await;
    }
}

/// A message of unknown outcome does not wait without end because an event of its chat is invalid in the database.
#[tokio::test]
async fn invalid_event_and_an_unknown_outcome() {
    run_test(async |t| {
        t.differs("one row is invalid");
        t.set("--max-attempts", "2").set("--retry-max", "40ms");
        t.start();
        t.delivers([start(42, 0), start(43, 1), message(42, 5, "hello")])
            .await;
        t.execute("UPDATE events SET data = '{}' WHERE kind = 'MESSAGE'");
        t.our_api.upset("POST /chats/c1/messages", dropped());
        t.bigchat.reports([message(42, 6, "goodbye")]);
        let began = Instant::now();
        until_meanwhile(t, (43, 10), "it is delivered or fails", || {
            t.count_events("conversation = (SELECT id FROM conversations WHERE bigchat_id = 42) AND state <> 'waiting'") == 3
                || began.elapsed() > Duration::from_secs(15)
        })
        .await;
        assert!(
            began.elapsed() < Duration::from_secs(15),
            "it waits without end"
        );
    })
    .await;
}
