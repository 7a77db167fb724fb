//! Going on with an older database (a copy, a replica), or with none and `--since`, as on another machine: with a BigChat
//! that keeps its events nothing is lost, and nothing that OurAPI holds is sent again.

use std::path::PathBuf;
use std::time::Duration;

use bigchat_sync::sim::Sim;
use bigchat_sync::sim::bigchat::{Log, Mode, NextPage, Options};
use bigchat_sync::sim::faults::{Fault, When};
use bigchat_sync::sim::our_api;
use serde_json::json;

use crate::daemon::{agrees, end, message, more_told, scripted, seconds, sim, transfer};
use crate::harness::{Bench, side_by_side, until};

/// A BigChat that keeps its events, busy enough to have something of everything in a few seconds. Nothing in it is
/// refused: what OurAPI does not hold would be sent again.
fn keeps_its_events(seed: u64) -> Options {
    Options {
        seed,
        active: 6,
        awkward: false,
        mode: Mode::Log(Log {
            events_per_second: 60.0,
            page_size: 15,
            ..Log::default()
        }),
        ..Options::default()
    }
}

/// Takes a copy as a backup does that does not stop the daemon.
fn copy(bench: &Bench) -> PathBuf {
    let copy = bench.directory().join("copy.db");
    bench.execute(&format!("VACUUM INTO '{}'", copy.display()));
    copy
}

/// Puts a copy in the place of the database.
fn restore(bench: &Bench, copy: &PathBuf) {
    lose(bench);
    std::fs::copy(copy, bench.db()).expect("a copy");
}

/// Loses the database.
fn lose(bench: &Bench) {
    for end in ["", "-wal", "-shm"] {
        // Of a daemon that was stopped well only the first is there.
        std::fs::remove_file(format!("{}{end}", bench.db().display())).ok();
    }
}

/// The requests that changed something, or would have. (The creation of a chat that is there is refused, and harmless.)
fn writes(sim: &Sim) -> [u64; 3] {
    let routes = [
        "POST /agents",
        "PATCH /chats/{id}",
        "POST /chats/{id}/messages",
    ];
    routes.map(|route| sim.our_api.traffic.count(route))
}

/// All that OurAPI holds, to be compared.
fn held(sim: &Sim) -> impl PartialEq + std::fmt::Debug {
    let held = sim.our_api.held();
    let messages: std::collections::BTreeMap<_, _> = held.messages.into_iter().collect();
    (held.chats, held.agents, messages)
}

/// Lets a daemon read up to now and deliver all of it.
async fn catch_up(sim: &Sim, bench: &Bench) {
    // Later than any cursor by now.
    let now = seconds(sim) + 1;
    let daemon = bench.start();
    let caught_up = format!(
        "SELECT coalesce(cursor, 0) >= {now} AND NOT EXISTS (SELECT 1 FROM inbox)
            AND NOT EXISTS (SELECT 1 FROM event_states WHERE state = 'waiting') FROM poll_state"
    );
    until("it has caught up", async || {
        bench.is_ready() && bench.value(&caught_up)
    })
    .await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_an_older_copy_nothing_is_lost_and_nothing_is_sent_again() {
    side_by_side([21, 22, 23], async |seed| {
        let (sim, bench) = sim(keeps_its_events(seed), our_api::Options::default()).await;
        let daemon = bench.start();
        more_told(&sim, 120).await;
        // In the middle of whatever it is doing.
        let copy = copy(&bench);
        more_told(&sim, 150).await;
        sim.bigchat.set_quiet(true);
        agrees(&sim, &bench).await;
        daemon.crash(&bench).await;
        let (before, sent) = (held(&sim), writes(&sim));
        restore(&bench, &copy);
        catch_up(&sim, &bench).await;
        assert!(held(&sim) == before, "seed {seed}: {}", sim.compare());
        assert_eq!(writes(&sim), sent, "seed {seed}");
        // And it goes on as if nothing had been.
        sim.bigchat.set_quiet(false);
        let daemon = bench.start();
        more_told(&sim, 60).await;
        sim.bigchat.set_quiet(true);
        agrees(&sim, &bench).await;
        daemon.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_copy_and_what_happened_meanwhile_nothing_is_lost_or_doubled() {
    let (sim, bench) = sim(keeps_its_events(24), our_api::Options::default()).await;
    // After each crash OurAPI is left alone for so long.
    let bench = bench.set("--request-timeout", "500ms");
    for _ in 0..3 {
        let daemon = bench.start();
        more_told(&sim, 60).await;
        let copy = copy(&bench);
        more_told(&sim, 60).await;
        daemon.crash(&bench).await;
        restore(&bench, &copy);
        std::fs::remove_file(copy).expect("the copy");
    }
    sim.bigchat.set_quiet(true);
    let daemon = bench.start();
    agrees(&sim, &bench).await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_any_database_since_brings_it_back_and_nothing_is_sent_again() {
    side_by_side([25, 26], async |seed| {
        let (sim, bench) = sim(keeps_its_events(seed), our_api::Options::default()).await;
        let since = sim.bigchat.clock.now() - Duration::from_secs(60);
        let daemon = bench.start();
        more_told(&sim, 200).await;
        sim.bigchat.set_quiet(true);
        agrees(&sim, &bench).await;
        daemon.stop().await;
        let (before, sent) = (held(&sim), writes(&sim));
        lose(&bench);
        let bench = bench.set("--since", &since.to_rfc3339());
        catch_up(&sim, &bench).await;
        assert_eq!(held(&sim), before, "seed {seed}");
        assert_eq!(writes(&sim), sent, "seed {seed}");
    })
    .await;
}

#[tokio::test]
async fn equal_messages_of_one_second_are_as_many_as_before() {
    let quiet = Options {
        quiet: true,
        mode: Mode::Log(Log {
            page_size: 3,
            ..Log::default()
        }),
        ..Options::default()
    };
    let (sim, bench) = sim(quiet, our_api::Options::default()).await;
    let at = seconds(&sim) - 2;
    sim.bigchat.open(10, at - 100, 1);
    let twin = || {
        sim.bigchat
            .push(10, "MESSAGE", at, json!({"message": "twin"}))
    };
    twin();
    catch_up(&sim, &bench).await;
    let copy = copy(&bench);
    // One more of what the copy knows, and others.
    (0..4).for_each(|_| twin());
    (0..3).for_each(|n| {
        sim.bigchat
            .push(10, "MESSAGE", at, json!({"message": format!("number {n}")}))
    });
    let daemon = bench.start();
    agrees(&sim, &bench).await;
    daemon.stop().await;
    let (before, sent) = (held(&sim), writes(&sim));
    restore(&bench, &copy);
    catch_up(&sim, &bench).await;
    assert_eq!(bench.events("delivered"), 8, "all of them were told again");
    assert_eq!(held(&sim), before);
    assert_eq!(writes(&sim), sent);
}

#[tokio::test]
async fn an_end_that_the_copy_does_not_know_is_not_set_back() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    let tell = |events| sim.bigchat.push_page(events, NextPage::None);
    tell(vec![message(10, now - 20, "hello"), end(10, now - 15)]);
    bench.once().await;
    let copy = copy(&bench);
    tell(vec![end(10, now - 5), transfer(10, now - 5, 7)]);
    bench.once().await;
    let (before, sent) = (held(&sim), writes(&sim));
    restore(&bench, &copy);
    tell(vec![end(10, now - 10)]);
    bench.once().await;
    assert_eq!(held(&sim), before);
    assert_eq!(writes(&sim), sent);
    // What it did not know it knows now: a later one counts.
    tell(vec![end(10, now - 7), end(10, now - 4)]);
    bench.once().await;
    assert!(sim.compare().is_clean(), "{}", sim.compare());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conversations_of_a_bigchat_that_restarted_after_the_copy_are_told_apart() {
    let (sim, bench) = sim(keeps_its_events(27), our_api::Options::default()).await;
    let daemon = bench.start();
    more_told(&sim, 80).await;
    // Nothing waits in the copy: a BigChat that restarts keeps nothing of before.
    sim.bigchat.set_quiet(true);
    agrees(&sim, &bench).await;
    bench.until_events("waiting", 0).await;
    let copy = copy(&bench);
    sim.bigchat.set_quiet(false);
    more_told(&sim, 80).await;
    sim.bigchat.set_quiet(true);
    agrees(&sim, &bench).await;
    // By BigChat's `date`, to whole seconds and a little late, pages of just before are not told from those of after.
    let restart = seconds(&sim) + 3;
    until("some seconds", async || seconds(&sim) > restart).await;
    sim.bigchat.restart_at_next_poll();
    until("a restart", async || sim.bigchat.run() == 2).await;
    sim.bigchat.set_quiet(false);
    more_told(&sim, 120).await;
    sim.bigchat.set_quiet(true);
    agrees(&sim, &bench).await;
    daemon.stop().await;
    let (before, sent) = (held(&sim), writes(&sim));
    restore(&bench, &copy);
    catch_up(&sim, &bench).await;
    assert!(held(&sim) == before, "{}", sim.compare());
    assert_eq!(writes(&sim), sent);
    agrees(&sim, &bench).await;
}

#[tokio::test]
async fn an_end_does_not_set_back_the_agent_of_a_chat_that_was_in_work_when_it_was_copied() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let bench = bench.set("--poll-overlap", "0s");
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    let tell = |events| sim.bigchat.push_page(events, NextPage::None);
    tell(vec![message(10, now - 20, "hello")]);
    let daemon = bench.start();
    bench.until_events("delivered", 1).await;
    let faults = &sim.our_api.faults;
    let slow = Fault::Hang(Duration::from_secs(2));
    faults.script("POST /chats/{id}/messages", When::After, slow, 1);
    tell(vec![message(10, now - 19, "in work")]);
    until("it is in work", async || sim.our_api.message_count() == 2).await;
    let copy = copy(&bench);
    tell(vec![transfer(10, now - 5, 7)]);
    bench.until_events("delivered", 3).await;
    daemon.stop().await;
    let agent = sim.our_api.chats()[0].agent_id;
    restore(&bench, &copy);
    let daemon = bench.start();
    bench.until_events("delivered", 2).await;
    let started = seconds(&sim);
    until("a later window", async || {
        bench.cursor() > Some(started + 1)
    })
    .await;
    let at = seconds(&sim);
    tell(vec![end(10, at)]);
    bench.until_events("delivered", 3).await;
    daemon.stop().await;
    assert_eq!(sim.our_api.message_count(), 2);
    assert_eq!(sim.our_api.chats()[0].agent_id, agent, "{}", sim.compare());
}
