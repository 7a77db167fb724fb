//! `bigchat-sync verify`: what is missing in OurAPI or differs is found, and repaired only if that is asked for.

use std::process::Output;
use std::time::Duration;

use bigchat_sync::journal::Store;
use bigchat_sync::sim::Sim;
use bigchat_sync::sim::bigchat::NextPage;
use bigchat_sync::sim::faults::{Fault, RetryAfter, When};
use bigchat_sync::sim::our_api;
use serde_json::{Value, json};

use crate::daemon::{agrees, end, message, scripted, seconds, transfer};
use crate::harness::{Bench, Process, side_by_side, until};

/// Three conversations that were delivered, by a daemon that rebuilds nothing by itself.
async fn delivered() -> (Sim, Bench) {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let bench = bench.set("--rebuild", "false");
    let now = seconds(&sim);
    for id in [10, 11, 12] {
        sim.bigchat.open(id, now - 100, id - 9);
    }
    let told = vec![
        message(10, now - 5, "hello"),
        message(10, now - 5, "hello"),
        message(10, now - 4, "who is there?"),
        transfer(11, now - 4, 7),
        message(11, now - 3, "goodbye"),
        end(12, now - 2),
    ];
    sim.bigchat.push_page(told, NextPage::None);
    bench.once().await;
    bench.until_events("delivered", 6).await;
    (sim, bench)
}

/// Runs the command, off the async threads. Returns what it wrote to standard output, and whether it found nothing.
async fn verify(bench: &Bench, arguments: &[&str]) -> (String, bool) {
    let output = outcome(bench, arguments).await;
    let text = String::from_utf8(output.stdout).expect("text");
    let found_nothing = match output.status.code() {
        Some(0) => true,
        // Else it was an error, which is not written there.
        Some(1) if !text.is_empty() => false,
        other => panic!("{other:?}: {}", String::from_utf8_lossy(&output.stderr)),
    };
    (text, found_nothing)
}

async fn outcome(bench: &Bench, arguments: &[&str]) -> Output {
    let mut command = bench.program("verify");
    command.args(arguments);
    let ended = tokio::task::spawn_blocking(move || command.output());
    ended.await.expect("no panic").expect("a process")
}

fn writes(sim: &Sim) -> u64 {
    let requests = sim.our_api.traffic.requests();
    let writes = requests
        .iter()
        .filter(|(route, _)| !route.starts_with("GET"));
    writes.map(|(_, count)| count).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_missing_is_found_and_built_again() {
    // With a daemon that does it, and without.
    side_by_side([true, false], async |daemon_runs| {
        let (sim, bench) = delivered().await;
        let daemon = daemon_runs.then(|| bench.start());
        // Else the command takes the database first, and the daemon is refused it.
        until("it is whose it is to be", async || {
            Store::open_beside(&bench.db()).is_ok_and(|store| store.is_in_use()) == daemon_runs
        })
        .await;
        let (said, clean) = verify(&bench, &[]).await;
        assert!(clean && said.contains("OurAPI holds everything"), "{said}");
        sim.our_api.forget_chat("11");
        sim.our_api.forget_message("10");
        let ended = json!({"ended_at": null});
        let chat = sim.our_api.chats();
        let chat = chat.iter().find(|chat| chat.external_id == "12");
        let chat = chat.expect("a chat").chat_id;
        let url = format!("{}/chats/{chat}", sim.our_api_url());
        let changed = reqwest::Client::new().patch(url).json(&ended).send().await;
        assert!(changed.expect("an answer").status().is_success());
        let before = writes(&sim);
        let (said, clean) = verify(&bench, &[]).await;
        assert!(!clean, "{said}");
        let rows: Vec<Vec<&str>> = said
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(rows[1], ["10", "same", "1"], "{said}");
        assert_eq!(rows[2], ["11", "missing", "1"], "{said}");
        assert_eq!(rows[3], ["12", "differs", "0"], "{said}");
        assert!(said.contains("nothing was changed"), "{said}");
        let (json, clean) = verify(&bench, &["--json"]).await;
        assert!(!clean, "{json}");
        let difference = |id: &str, chat: &str, messages: u32| {
            json!({"external_id": id, "chat": chat, "messages_missing": messages})
        };
        let expected = json!({
            "chats": 3, "chats_missing": 1, "chats_differing": 1, "messages_missing": 2, "repaired": false,
            "differences": [difference("10", "same", 1), difference("11", "missing", 1), difference("12", "differs", 0)],
        });
        assert_eq!(serde_json::from_str::<Value>(&json).expect("JSON"), expected);
        assert_eq!(writes(&sim), before, "nothing is changed");
        assert!(!sim.compare().is_clean());
        // One alone, then the rest.
        let (said, clean) = verify(&bench, &["--conversation", "11", "--repair"]).await;
        assert!(!clean && said.contains("all of it was repaired"), "{said}");
        assert_eq!(sim.our_api.chats().len(), 3);
        assert!(!sim.compare().is_clean());
        let (said, clean) = verify(&bench, &["--repair"]).await;
        assert!(!clean && said.contains("all of it was repaired"), "{said}");
        agrees(&sim, &bench).await;
        let (said, clean) = verify(&bench, &[]).await;
        assert!(clean && said.contains("OurAPI holds everything"), "{said}");
        if let Some(daemon) = daemon {
            daemon.stop().await;
        }
        assert!(!sim.our_api.stumbled(), "never two requests at once");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_built_again_where_everything_is_gone() {
    let (sim, bench) = delivered().await;
    sim.our_api.wipe();
    let (said, clean) = verify(&bench, &[]).await;
    assert!(!clean && said.contains("3 missing"), "{said}");
    assert!(sim.our_api.chats().is_empty());
    verify(&bench, &["--repair"]).await;
    agrees(&sim, &bench).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_that_are_gone_are_built_again() {
    let (sim, bench) = delivered().await;
    sim.our_api.wipe_agents();
    let (said, clean) = verify(&bench, &[]).await;
    assert!(!clean && said.contains("3 differ"), "{said}");
    let daemon = bench.start();
    verify(&bench, &["--repair"]).await;
    agrees(&sim, &bench).await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_what_is_not_known_nothing_can_be_built() {
    let (_sim, bench) = delivered().await;
    let refused = outcome(&bench, &["--conversation", "99"]).await;
    assert_eq!(refused.status.code(), Some(1));
    let complaint = String::from_utf8_lossy(&refused.stderr);
    assert!(complaint.contains("conversation 99"), "{complaint}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_repair_it_ends_although_an_event_waits() {
    let (_sim, bench) = delivered().await;
    // As after a failure, or of a page that was stored as the daemon was stopped.
    bench.execute(
        "UPDATE conversations SET offset = 2, waiting = 1, waiting_since = 1, due_at = 1 WHERE bigchat_id = 10",
    );
    assert_eq!(bench.events("waiting"), 1);
    let mut command = bench.program("verify");
    let mut command = Process(command.spawn().expect("a process"));
    until("it ends", async || {
        command.0.try_wait().expect("a status").is_some()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_command_does_not_make_the_first_one_forget_what_it_found() {
    let (sim, bench) = delivered().await;
    sim.our_api.forget_message("10");
    // It takes a while to be sent again.
    let faults = &sim.our_api.faults;
    let slow = Fault::Hang(Duration::from_secs(3));
    faults.script("POST /chats/{id}/messages", When::Before, slow, 1);
    let daemon = bench.start();
    let first = verify(&bench, &["--repair"]);
    let second = async {
        until("it is on its way", async || faults.left() == 0).await;
        verify(&bench, &["--conversation", "12", "--repair"]).await
    };
    let ((said, _), _) = tokio::join!(first, second);
    assert!(said.contains("1 messages missing"), "{said}");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_our_api_cannot_be_asked_it_says_so() {
    let limited = Fault::RetryLater(429, RetryAfter::Seconds(3));
    side_by_side(
        [
            ("no connection", None, false),
            ("503", Some(Fault::Status(503)), false),
            ("401, with a daemon", Some(Fault::Status(401)), true),
            ("429, and when", Some(limited), true),
        ],
        async |(case, fault, daemon_runs)| {
            let (sim, bench) = delivered().await;
            let daemon = daemon_runs.then(|| bench.start());
            match &fault {
                Some(fault) => sim.our_api.faults.outage(Some(fault.clone())),
                None => sim.our_api.down().await.expect("it is down"),
            }
            let log = bench.directory().join("verify.log");
            let mut command = bench.program("verify");
            let stderr = std::fs::File::create(&log).expect("a file");
            let mut command = Process(command.stderr(stderr).spawn().expect("a process"));
            let said = |what: &str| std::fs::read_to_string(&log).expect("a log").contains(what);
            until(case, async || said("nothing is verified for now: OurAPI")).await;
            let ended = command.0.try_wait().expect("a status");
            assert!(ended.is_none(), "{case}: it waits");
            match &fault {
                Some(_) => sim.our_api.faults.outage(None),
                None => sim.our_api.up().await.expect("it is up"),
            }
            until("it ends", async || {
                command.0.try_wait().expect("a status").is_some()
            })
            .await;
            if let Some(daemon) = daemon {
                daemon.stop().await;
            }
        },
    )
    .await;
}
