//! `bigchat-sync verify`: drift is found, and repaired only with `--repair`.

use crate::harness::process::{Process, Signal, finished};
use crate::harness::services::ADD_MESSAGE;
use crate::harness::{Bench, Daemon, Test, run_live_test, run_test, side_by_side, until};
use bigchat_sync::simulator::event::{end, message, start, transfer};
use bigchat_sync::simulator::fault::{dropped, slow, status};
use std::io::Read;
use std::process::{Output, Stdio};
use std::time::Duration;

use bigchat_sync::journal::Store;
use serde_json::{Value, json};

/// Delivers three conversations, with rebuilding off.
async fn delivered(t: &Test) {
    t.set("--rebuild", "off");
    let now = t.now();
    for id in [10, 11, 12] {
        t.bigchat.open(id, now - 100, id - 9);
    }
    let events = vec![
        message(10, now - 5, "hello"),
        message(10, now - 5, "hello"),
        message(10, now - 4, "who is there?"),
        transfer(11, now - 4, 7),
        message(11, now - 3, "goodbye"),
        end(12, now - 2),
    ];
    t.bigchat.reports(events);
    t.once().await;
    t.until_events("delivered", 6).await;
}

/// Runs the command. Returns its standard output, and whether it found no drift.
pub(super) async fn verify(t: &Bench, arguments: &[&str]) -> (String, bool) {
    let output = outcome(t, arguments).await;
    let text = String::from_utf8(output.stdout).expect("text");
    let found_nothing = match output.status.code() {
        Some(0) => true,
        // An error is written to standard error.
        Some(1) if !text.is_empty() => false,
        other => panic!("{other:?}: {}", String::from_utf8_lossy(&output.stderr)),
    };
    (text, found_nothing)
}

pub(super) async fn outcome(t: &Bench, arguments: &[&str]) -> Output {
    let mut command = t.program("verify");
    command.args(arguments);
    finished(command).await
}

fn writes(t: &Test) -> usize {
    t.our_api.count("POST") + t.our_api.count("PATCH")
}

/// `verify` reports what is missing or differs and changes nothing; `verify --repair` restores it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drift_is_reported_and_repaired() {
    let difference = |id: &str, chat: &str, messages: u32| {
        json!({
            "external_id": id, "chat": chat, "messages_missing": messages, "fields": [],
            "not_repaired": null,
        })
    };
    let expected = json!({
        "chats": 3, "chats_missing": 1, "chats_differing": 1, "messages_missing": 2,
        "repaired": false, "complete": true,
        "differences": [
            difference("10", "same", 1),
            difference("11", "missing", 1),
            difference("12", "differs", 0),
        ],
    });
    // With and without a running daemon.
    side_by_side([true, false], async |daemon_runs| {
        run_live_test(async |t| {
            delivered(t).await;
            let daemon = daemon_runs.then(|| t.start());
            // Otherwise the command may lock the database before the daemon does.
            until("the database is locked by the daemon or free", async || {
                Store::open_shared(&t.db()).is_ok_and(|store| store.is_in_use()) == daemon_runs
            })
            .await;
            let (output, clean) = verify(t, &[]).await;
            assert!(
                clean && output.contains("OurAPI has everything"),
                "{output}"
            );
            t.our_api.loses_chat("11");
            t.our_api.loses_message("10");
            let not_ended = json!({"ended_at": null});
            t.our_api.is_changed("12", &not_ended).await;
            let before = writes(t);
            let (output, clean) = verify(t, &[]).await;
            assert!(!clean, "{output}");
            let rows: Vec<Vec<&str>> = output
                .lines()
                .map(|line| line.split_whitespace().collect())
                .collect();
            assert_eq!(rows[1], ["10", "same", "1"], "{output}");
            assert_eq!(rows[2], ["11", "missing", "1"], "{output}");
            assert_eq!(rows[3], ["12", "differs", "0"], "{output}");
            assert!(output.contains("nothing was changed"), "{output}");
            let fields = "chat 12: ended_at is none in OurAPI, 20";
            assert!(
                output.contains(fields)
                    && output.contains("do not repair if this database is an older copy"),
                "{output}"
            );
            let (json, clean) = verify(t, &["--json"]).await;
            assert!(!clean && json.ends_with("\n}\n"), "{json}");
            let mut found: Value = serde_json::from_str(&json).expect("JSON");
            let fields = std::mem::replace(&mut found["differences"][2]["fields"], json!([]));
            assert_eq!(
                (&fields[0]["field"], &fields[0]["found"]),
                (&json!("ended_at"), &Value::Null)
            );
            assert!(fields[0]["recorded"].is_string(), "{fields}");
            assert_eq!(found, expected);
            assert_eq!(writes(t), before, "nothing is changed");
            assert!(!t.compare().is_clean());
            // First one conversation, then the rest.
            let (output, clean) = verify(t, &["--conversation", "11", "--repair"]).await;
            assert!(
                !clean && output.contains("everything was repaired"),
                "{output}"
            );
            assert_eq!(t.our_api.chats().len(), 3);
            assert!(!t.compare().is_clean());
            let (output, clean) = verify(t, &["--repair"]).await;
            assert!(
                !clean && output.contains("everything was repaired"),
                "{output}"
            );
            t.agrees().await;
            let (output, clean) = verify(t, &[]).await;
            assert!(
                clean && output.contains("OurAPI has everything"),
                "{output}"
            );
            if let Some(daemon) = daemon {
                daemon.stop().await;
            }
            assert!(!t.our_api.has_stumbled(), "never two requests at once");
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_chats_are_restored() {
    run_live_test(async |t| {
        delivered(t).await;
        t.our_api.loses_everything();
        let (output, clean) = verify(t, &[]).await;
        assert!(!clean && output.contains("3 missing"), "{output}");
        assert!(t.our_api.chats().is_empty());
        verify(t, &["--repair"]).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_agents_are_restored() {
    run_live_test(async |t| {
        delivered(t).await;
        t.our_api.loses_agents();
        let (output, clean) = verify(t, &[]).await;
        assert!(!clean && output.contains("3 with differences"), "{output}");
        t.start();
        verify(t, &["--repair"]).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_conversation_is_an_error() {
    run_live_test(async |t| {
        delivered(t).await;
        let refused = outcome(t, &["--conversation", "99"]).await;
        assert_eq!(refused.status.code(), Some(1));
        let detail = String::from_utf8_lossy(&refused.stderr);
        assert!(detail.contains("conversation 99"), "{detail}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verification_while_an_event_waits() {
    run_live_test(async |t| {
        t.differs("an event is made to wait by hand");
        delivered(t).await;
        // Like an event after a failure, or an event of a page that was stored when the daemon was stopped.
        t.execute(
            "UPDATE conversations SET offset = 2, waiting = 1, waiting_since = 1, due_at = 1
         WHERE bigchat_id = 10",
        );
        assert_eq!(t.events("waiting"), 1);
        let ended = Process::start_as(t, t.program("verify")).ended().await;
        assert!(ended.success(), "{}", t.logged());
    })
    .await;
}

/// A chat whose advisor BigChat denies is restored without a daemon, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repair_with_a_denied_advisor() {
    run_test(async |t| {
        t.differs("the advisor is denied");
        t.bigchat.forgets_advisor(7);
        let daemon = t.start();
        t.delivers([start(42, 0), message(42, 1, "hello")]).await;
        daemon.stop().await;
        t.our_api.loses_chat("42");
        verify(t, &["--repair"]).await;
        assert_eq!(t.our_api.messages(), ["hello"]);
    })
    .await;
}

/// A second command does not discard the findings of the first one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_verifications_at_once() {
    run_live_test(async |t| {
        delivered(t).await;
        t.our_api.loses_message("10");
        // Sending the message again takes a while.
        let faults = &t.our_api;
        let slow = slow(Duration::from_secs(3));
        faults.upset(ADD_MESSAGE, slow);
        t.start();
        let first = verify(t, &["--repair"]);
        let second = async {
            until("it is in flight", async || faults.faults_left() == 0).await;
            verify(t, &["--conversation", "12", "--repair"]).await
        };
        let ((output, _), _) = tokio::join!(first, second);
        assert!(output.contains("1 message missing"), "{output}");
    })
    .await;
}

/// While OurAPI cannot be reached, `verify` waits and says why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verification_waits_for_our_api() {
    let limited = status(429).header("retry-after", "3");
    side_by_side(
        [
            ("no connection", None, false),
            ("503", Some(status(503)), false),
            ("401, with a daemon", Some(status(401)), true),
            ("429 with Retry-After", Some(limited), true),
        ],
        async |(case, fault, daemon_runs)| {
            run_live_test(async |t| {
                delivered(t).await;
                let daemon = daemon_runs.then(|| t.start());
                match &fault {
                    Some(fault) => t.our_api.outage(Some(fault.clone())),
                    None => t.our_api.down().await,
                }
                let mut command = Process::start_as(t, t.program("verify"));
                command.until_logged("verification waits: OurAPI").await;
                assert!(command.is_running(), "{case}: it waits");
                match &fault {
                    Some(_) => t.our_api.outage(None),
                    None => t.our_api.up().await.expect("it is up"),
                }
                command.ended().await;
                if let Some(daemon) = daemon {
                    daemon.stop().await;
                }
            })
            .await;
        },
    )
    .await;
}

/// An interrupted `verify --json` prints what it has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interrupted_verification_in_json() {
    run_live_test(async |t| {
        delivered(t).await;
        t.our_api.outage(Some(status(503)));
        let mut verify = t.program("verify");
        verify
            .arg("--json")
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut verify = Process::spawn(verify);
        let mut stdout = verify.stdout();
        until("it is requested", async || {
            t.value::<i64>("SELECT count(*) FROM verifications WHERE NOT idle") == 1
        })
        .await;
        verify.signal(Signal::TERM);
        assert_eq!(verify.ended().await.code(), Some(1));
        let mut json = String::new();
        stdout.read_to_string(&mut json).expect("text");
        let object: Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(
            (&object["complete"], &object["chats"]),
            (&json!(false), &json!(3))
        );
        t.our_api.outage(None);
    })
    .await;
}

/// Repairing many lost chats counts as one loss. A loss for each group of chats would read all of them again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repair_of_many_lost_chats() {
    run_live_test(async |t| {
        t.set("--rebuild", "report");
        let now = t.now();
        let events = (10..610).map(|id| {
            t.bigchat.open(id, now - 100, 1);
            message(id, now - 5, "hello")
        });
        t.bigchat.reports(events.collect::<Vec<_>>());
        t.once().await;
        t.our_api.loses_everything();
        let before = t.our_api.count("GET /chats?");
        verify(t, &["--repair"]).await;
        let reads = t.our_api.count("GET /chats?") - before;
        assert!(reads < 3 * 600, "{reads} reads of 600 chats");
        assert!(t.losses() <= 1, "{} losses", t.losses());
    })
    .await;
}

/// A change of unknown outcome that was carried out is the daemon's own, not another client's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn own_change_of_unknown_outcome() {
    run_live_test(async |t| {
        t.fails(1);
        t.set("--max-attempts", "1").set("--retry-initial", "2s");
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.open(11, now - 100, 1);
        t.bigchat
            .reports([10, 11].map(|id| message(id, now - 5, "hello")));
        let daemon = t.start();
        t.until_events("delivered", 2).await;
        t.our_api.upset("PATCH", dropped().carried_out());
        t.bigchat.reports([transfer(10, now - 4, 7)]);
        t.our_api.upset("GET /chats?external_id=10", status(500));
        until("the transfer has failed", async || t.attempts() == 1).await;
        // Its next failure counts, because another conversation was delivered meanwhile.
        t.bigchat.reports([message(11, now, "meanwhile")]);
        t.until_events("failed", 1).await;
        daemon.stop().await;
        for arguments in [&[][..], &["--repair"]] {
            let (output, clean) = verify(t, arguments).await;
            assert!(clean, "{output}");
        }
    })
    .await;
}

/// Interrupts `verify --repair` during an outage, and starts a daemon, which finishes the repair of `chats`.
async fn interrupted_repair(t: &Test, chats: i64) -> Daemon {
    t.our_api.outage(Some(status(503)));
    let mut command = t.program("verify");
    command
        .arg("--repair")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let command = Process::spawn(command);
    until("it is requested", async || {
        t.value::<i64>("SELECT count(*) FROM verifications WHERE NOT idle") == 1
    })
    .await;
    command.signal(Signal::TERM);
    assert_eq!(command.ended().await.code(), Some(1));
    t.our_api.outage(None);
    let daemon = t.start();
    until("the daemon has finished the repair", async || {
        t.value::<i64>("SELECT coalesce(max(verified), 0) FROM verifications WHERE NOT idle")
            == chats
    })
    .await;
    daemon
}

/// An interrupted `verify --repair` that the daemon has finished is over: what is erased later stays erased.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interrupted_repair_ends_once_finished() {
    run_live_test(async |t| {
        t.differs("a chat is erased");
        delivered(t).await;
        t.set("--rebuild", "report");
        let daemon = interrupted_repair(t, 3).await;
        // Days later, the chat is erased in OurAPI. Only the chat of a new event is built.
        t.our_api.loses_chat("10");
        t.bigchat
            .reports([message(10, t.now(), "are you still there?")]);
        t.until_events("delivered", 7).await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        daemon.stop().await;
        let held = t.our_api.data();
        let chat = held
            .chats
            .iter()
            .find(|chat| chat.external_id == "10")
            .expect("a chat")
            .chat_id;
        let texts: Vec<_> = held.messages[&chat]
            .iter()
            .map(|message| message.text.clone())
            .collect();
        assert_eq!(
            texts,
            ["are you still there?"],
            "--rebuild report restores nothing"
        );
    })
    .await;
}

/// A chat that could not be read was not repaired.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unreadable_chat_is_not_repaired() {
    run_live_test(async |t| {
        t.set("--max-attempts", "2");
        delivered(t).await;
        let chat = t.our_api.data().chats[0].chat_id;
        let messages = format!("GET /chats/{chat}/messages");
        t.our_api.upset(&messages, status(500).always());
        let (json, _) = verify(t, &["--repair", "--json"]).await;
        let (output, _) = verify(t, &["--repair"]).await;
        t.our_api.calm();
        assert!(output.contains("unreadable"), "{output}");
        assert!(
            output.contains("1 chat could not be repaired completely"),
            "{output}"
        );
        let object: Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(object["repaired"], json!(false), "{json}");
    })
    .await;
}

/// A message that OurAPI now rejects was not repaired.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rejected_message_is_not_repaired() {
    run_live_test(async |t| {
        t.differs("OurAPI rejects the message now");
        delivered(t).await;
        t.our_api.loses_message("11");
        t.our_api.upset(ADD_MESSAGE, status(422));
        let (output, _) = verify(t, &["--repair"]).await;
        assert_eq!(t.events("failed"), 1);
        assert!(
            output.contains("1 chat could not be repaired completely"),
            "{output}"
        );
        assert!(
            output.contains("chat 11: not completely repaired: an event could"),
            "{output}"
        );
    })
    .await;
}

/// An agent that another client has set, in a chat without a TRANSFER.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changed_agent_without_transfer() {
    run_live_test(async |t| {
        t.differs("another client changes the agent");
        delivered(t).await;
        let data = t.our_api.data();
        let of = |id: &str| {
            let mut chats = data.chats.iter();
            chats
                .find(|chat| chat.external_id == id)
                .expect("a chat")
                .agent_id
        };
        let (own, other) = (of("10"), of("11"));
        assert!(own.is_some() && own != other);
        t.our_api
            .is_changed("10", &json!({"agent_id": other}))
            .await;
        let (output, _) = verify(t, &["--repair"]).await;
        let after = t.our_api.data();
        let mut chats = after.chats.iter();
        let agent = chats
            .find(|chat| chat.external_id == "10")
            .expect("a chat")
            .agent_id;
        assert_eq!(agent, other, "no TRANSFER names another");
        assert!(
            output.contains(
                "chat 10: not completely repaired: no TRANSFER names the agent, or no START"
            ),
            "{output}"
        );
        assert_eq!(t.status().0["drifted"], json!(1));
        let (again, clean) = verify(t, &[]).await;
        assert!(!clean && again.contains("agent_id is"), "{again}");
    })
    .await;
}

/// `verify --repair` without a daemon ends only when the fields of all chats are written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn field_repair_of_many_chats() {
    run_live_test(async |t| {
        let now = t.now();
        let ids = 10..210;
        let events = ids.clone().map(|id| {
            t.bigchat.open(id, now - 100, 1);
            end(id, now - 5)
        });
        t.bigchat.reports(events.collect::<Vec<_>>());
        t.once().await;
        for id in ids {
            t.our_api
                .is_changed(&id.to_string(), &json!({"ended_at": null}))
                .await;
        }
        t.our_api.set_latency(Duration::from_millis(10));
        let (output, _) = verify(t, &["--repair"]).await;
        let left = t
            .our_api
            .data()
            .chats
            .iter()
            .filter(|chat| chat.ended_at.is_none())
            .count();
        assert!(output.contains("everything was repaired"), "{output}");
        assert_eq!(
            left, 0,
            "chats without their end after `everything was repaired`"
        );
    })
    .await;
}

/// The same for one chat whose repair is answered with an error at first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn field_repair_is_awaited() {
    run_live_test(async |t| {
        delivered(t).await;
        t.set("--retry-initial", "4s").set("--retry-max", "4s");
        t.our_api.is_changed("12", &json!({"ended_at": null})).await;
        t.our_api.upset("PATCH", status(503));
        let (output, _) = verify(t, &["--repair"]).await;
        let data = t.our_api.data();
        let mut chats = data.chats.iter();
        let chat = chats.find(|chat| chat.external_id == "12").expect("a chat");
        assert!(chat.ended_at.is_some(), "{output}");
        assert!(output.contains("everything was repaired"), "{output}");
    })
    .await;
}

/// A chat that has only failed events is created again before the command ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repair_of_chat_without_waiting_events() {
    run_live_test(async |t| {
        t.set("--rebuild", "off")
            .set("--retry-initial", "4s")
            .set("--retry-max", "4s");
        let now = t.now();
        t.bigchat.open(42, now - 100, 1);
        // OurAPI stores no message of one character.
        t.bigchat.reports([message(42, now - 5, "k")]);
        t.once().await;
        assert_eq!((t.events("failed"), t.our_api.chats().len()), (1, 1));
        t.our_api.loses_chat("42");
        t.our_api.upset("POST /chats", status(503));
        let (output, _) = verify(t, &["--repair"]).await;
        assert_eq!(t.our_api.chats().len(), 1, "{output}");
        assert!(output.contains("everything was repaired"), "{output}");
    })
    .await;
}

/// The same by default: what another client changes later is not overwritten.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interrupted_repair_and_a_later_change() {
    run_test(async |t| {
        t.differs("another client changes a chat");
        t.set("--retention", "1h").set("--max-window", "60s");
        t.bigchat.reports([start(42, 0), message(42, 5, "hello")]);
        t.once().await;
        let daemon = interrupted_repair(t, 1).await;
        t.execute("UPDATE deliveries SET delivered_at = delivered_at - 7200000");
        t.bigchat.clock(3 * 3600);
        until("the events are dropped", async || {
            t.value::<i64>("SELECT count(*) FROM events") == 0
        })
        .await;
        let changed = json!({"started_at": "2026-11-22T21:00:00Z"});
        t.our_api.is_changed("42", &changed).await;
        t.bigchat.reports([message(42, 3 * 3600 - 5, "much later")]);
        t.until_events("delivered", 1).await;
        tokio::time::sleep(Duration::from_secs(4)).await;
        daemon.stop().await;
        let chats = t.our_api.chats();
        assert!(chats[0].starts_with("42 21:00:00"), "{chats:?}");
    })
    .await;
}

/// An invalid row of the database does not keep `verify` from ending.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invalid_row_and_a_command() {
    run_live_test(async |t| {
        delivered(t).await;
        t.execute("UPDATE conversations SET chat_agent = 'nobody' WHERE bigchat_id = 10");
        for arguments in [&[][..], &["--repair"]] {
            let (output, clean) = verify(t, arguments).await;
            assert!(!clean && output.contains("unreadable"), "{output}");
            assert!(output.contains("3 chats verified"), "{output}");
        }
    })
    .await;
}

/// An event whose row is invalid does not keep `verify` from ending.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invalid_event_and_a_command() {
    run_live_test(async |t| {
        t.differs("one row is invalid");
        delivered(t).await;
        t.set("--max-attempts", "3")
            .set("--retry-initial", "50ms")
            .set("--retry-max", "100ms");
        t.execute(
            "UPDATE events SET data = '{}' WHERE kind = 'MESSAGE'
                AND conversation = (SELECT id FROM conversations WHERE bigchat_id = 10)",
        );
        let verified = tokio::time::timeout(Duration::from_secs(25), verify(t, &[])).await;
        verified.expect("`verify` ends");
    })
    .await;
}

/// A chat whose change always fails, while others get through, is tried less and less often, and does not keep
/// `verify --repair` from ending. The next repair tries again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn field_repair_that_always_fails() {
    run_live_test(async |t| {
        delivered(t).await;
        t.set("--max-attempts", "3")
            .set("--retry-initial", "50ms")
            .set("--retry-max", "60s");
        t.start();
        t.our_api.is_changed("12", &json!({"ended_at": null})).await;
        let before = t.our_api.count("PATCH");
        t.our_api.upset("PATCH", status(500).always());
        let repaired =
            async { tokio::time::timeout(Duration::from_secs(15), verify(t, &["--repair"])).await };
        let others = async {
            for other in 0.. {
                t.bigchat
                    .reports([message(11, t.now(), &format!("meanwhile {other}"))]);
                t.bigchat.further_polls(1).await;
            }
        };
        let repaired = tokio::select! {
            repaired = repaired => repaired,
            () = others => unreachable!("it has no end"),
        };
        let patches = t.our_api.count("PATCH") - before;
        let (output, _) = repaired.unwrap_or_else(|_| panic!("no end after {patches} attempts"));
        assert!(output.contains("fails to make it"), "{output}");
        assert!(patches < 20, "{patches} attempts");
        t.our_api.calm();
        let (output, _) = verify(t, &["--repair"]).await;
        assert!(output.contains("everything was repaired"), "{output}");
    })
    .await;
}

/// A repair keeps a start that another client has set, if there is no START, and says so each time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repair_without_a_start() {
    run_test(async |t| {
        t.differs("another client changes a chat");
        // BigChat does not know the conversation: only its events show when it started.
        t.bigchat.reports([message(99, 10, "hello")]);
        let daemon = t.start();
        t.until_events("delivered", 1).await;
        daemon.stop().await;
        assert_eq!(t.our_api.chats(), ["99 22:00:10 - -"]);
        t.our_api
            .is_changed("99", &json!({"started_at": "2026-11-22T21:00:00Z"}))
            .await;
        for _ in 0..2 {
            let (output, _) = verify(t, &["--repair"]).await;
            assert!(
                output.contains("the value that was found is kept"),
                "{output}"
            );
            assert_eq!(t.our_api.chats(), ["99 21:00:00 - -"], "{output}");
        }
    })
    .await;
}
