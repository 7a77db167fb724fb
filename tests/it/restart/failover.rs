//! The daemon starts with an older database (a copy, a replica), or with none and `--since`, as on another machine. If
//! BigChat stores its events, nothing is lost, and nothing that OurAPI has is sent again.

use crate::harness::services::{
    ADD_MESSAGE, busy_log, quiet_log, tampering, time, unix, with_header,
};
use crate::harness::{Bench, Test, run_live_test, run_with, side_by_side, until};
use bigchat_sync::simulator::bigchat::{Log, Options};
use bigchat_sync::simulator::event::{end, message, transfer};
use bigchat_sync::simulator::fault::slow;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

/// A BigChat that stores its events, busy enough to have every kind of event within a few seconds. OurAPI
/// rejects none of it: a rejected event would be sent again.
fn stores_its_events(seed: u64) -> Options {
    Options {
        active: 6,
        awkward: false,
        ..busy_log(seed, 60.0, 15)
    }
}

/// Copies the database as an online backup does.
fn copy(t: &Bench) -> PathBuf {
    let copy = t.directory().join("copy.db");
    t.execute(&format!("VACUUM INTO '{}'", copy.display()));
    copy
}

/// Replaces the database with a copy.
fn restore(t: &Bench, copy: &PathBuf) {
    lose(t);
    std::fs::copy(copy, t.db()).expect("a copy");
}

/// Deletes the database.
fn lose(t: &Bench) {
    for end in ["", "-wal", "-shm"] {
        // After a clean stop only the first file exists.
        std::fs::remove_file(format!("{}{end}", t.db().display())).ok();
    }
}

/// The numbers of requests that change OurAPI. Creations of chats are left out, because a chat that exists is not
/// created again.
fn writes(t: &Test) -> [usize; 3] {
    let routes = [
        "POST /agents",
        "PATCH /chats/{id}",
        "POST /chats/{id}/messages",
    ];
    routes.map(|route| t.our_api.count(route))
}

/// OurAPI's data, for comparison.
fn held(t: &Test) -> impl PartialEq + std::fmt::Debug {
    let held = t.our_api.data();
    let messages: std::collections::BTreeMap<_, _> = held.messages.into_iter().collect();
    (held.chats, held.agents, messages)
}

/// Runs a daemon until everything up to the present is delivered.
async fn catch_up(t: &Test) {
    // Later than any cursor so far.
    let now = unix(t.now() + 1);
    let daemon = t.start();
    // No view shows the pages that are stored and not ingested yet.
    let caught_up = format!(
        "SELECT coalesce(cursor, 0) >= {now} AND NOT EXISTS (SELECT 1 FROM inbox)
            AND NOT EXISTS (SELECT 1 FROM event_states WHERE state = 'waiting') FROM poll_state"
    );
    until("it has caught up", async || {
        t.is_ready() && t.value(&caught_up)
    })
    .await;
    daemon.stop().await;
}

/// With an older copy of the database, nothing is lost, and nothing is sent again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn older_copy_of_the_database() {
    side_by_side([21, 22, 23], async |seed| {
        run_with(stores_its_events(seed), async |t| {
            let daemon = t.start();
            t.bigchat.reports_more(120).await;
            // The database is copied in the middle of the daemon's work.
            let copy = copy(t);
            t.bigchat.reports_more(150).await;
            t.bigchat.calms_down();
            t.agrees().await;
            daemon.crash(t).await;
            let (before, sent) = (held(t), writes(t));
            restore(t, &copy);
            catch_up(t).await;
            assert!(held(t) == before, "seed {seed}: {}", t.compare());
            assert_eq!(writes(t), sent, "seed {seed}");
            // Afterwards, the daemon works as usual.
            t.bigchat.state().set_quiet(false);
            t.start();
            t.bigchat.reports_more(60).await;
            t.bigchat.calms_down();
        })
        .await;
    })
    .await;
}

/// The same if BigChat's date is behind at first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn older_copy_and_a_date_behind() {
    run_with(stores_its_events(21), async |t| {
        let daemon = t.start();
        t.bigchat.reports_more(120).await;
        daemon.stop().await;
        let copy = copy(t);
        let daemon = t.start();
        t.bigchat.reports_more(150).await;
        t.bigchat.calms_down();
        t.agrees().await;
        daemon.stop().await;
        let (before, sent) = (held(t), writes(t));
        restore(t, &copy);
        let mut polls = 0;
        let url = tampering(&t.bigchat.url(), move |line, answer| {
            polls += i32::from(line.starts_with("GET /events"));
            if polls > 2 {
                return answer;
            }
            let behind = SystemTime::now() - Duration::from_secs(300);
            let header = format!("date: {}", httpdate::fmt_http_date(behind));
            with_header(&answer, "date", &header)
        })
        .await;
        t.set("--bigchat-url", &url).set("--max-window", "10s");
        catch_up(t).await;
        assert!(held(t) == before, "{}", t.compare());
        // According to the first date, everything has been read, so an earlier TRANSFER may be written before the
        // latest one.
        let [agents, _, messages] = writes(t);
        assert_eq!([agents, messages], [sent[0], sent[2]]);
    })
    .await;
}

/// With an older copy and new events, nothing is lost or duplicated.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_and_crashes() {
    run_with(stores_its_events(24), async |t| {
        // After each crash, nothing is sent to OurAPI for this long.
        t.set("--request-timeout", "500ms");
        for _ in 0..3 {
            let daemon = t.start();
            t.bigchat.reports_more(60).await;
            let copy = copy(t);
            t.bigchat.reports_more(60).await;
            daemon.crash(t).await;
            restore(t, &copy);
            std::fs::remove_file(copy).expect("the copy");
        }
        t.bigchat.calms_down();
        t.start();
    })
    .await;
}

/// `--since` reads everything again, and nothing is sent again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_database_with_since() {
    side_by_side([25, 26], async |seed| {
        run_with(stores_its_events(seed), async |t| {
            let since = time(t.now() - 60);
            let daemon = t.start();
            t.bigchat.reports_more(200).await;
            t.bigchat.calms_down();
            t.agrees().await;
            daemon.stop().await;
            let (before, sent) = (held(t), writes(t));
            lose(t);
            t.set("--since", &since);
            catch_up(t).await;
            assert_eq!(held(t), before, "seed {seed}");
            assert_eq!(writes(t), sent, "seed {seed}");
        })
        .await;
    })
    .await;
}

/// The number of equal messages in one second does not change.
#[tokio::test]
async fn copy_with_equal_messages() {
    let log = Log {
        page_size: 3,
        ..Log::default()
    };
    run_with(quiet_log(log), async |t| {
        let at = t.now() - 2;
        t.bigchat.open(10, at - 100, 1);
        let reports = |text: &str| t.bigchat.reports_event(message(10, at, text));
        reports("twin");
        catch_up(t).await;
        let copy = copy(t);
        // More messages equal to the one in the copied database, and other messages.
        (0..4).for_each(|_| reports("twin"));
        (0..3).for_each(|n| reports(&format!("number {n}")));
        let daemon = t.start();
        t.agrees().await;
        daemon.stop().await;
        let (before, sent) = (held(t), writes(t));
        restore(t, &copy);
        catch_up(t).await;
        assert_eq!(t.events("delivered"), 8, "all of them were reported again");
        assert_eq!(held(t), before);
        assert_eq!(writes(t), sent);
    })
    .await;
}

/// An END that is missing from the copy is not replaced by an earlier one.
#[tokio::test]
async fn copy_without_the_last_end() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        let report = |events| t.bigchat.reports(events);
        report(vec![message(10, now - 20, "hello"), end(10, now - 15)]);
        t.once().await;
        let copy = copy(t);
        report(vec![end(10, now - 5), transfer(10, now - 5, 7)]);
        t.once().await;
        let (before, sent) = (held(t), writes(t));
        restore(t, &copy);
        report(vec![end(10, now - 10)]);
        t.once().await;
        assert_eq!(held(t), before);
        assert_eq!(writes(t), sent);
        // After that, a later END counts.
        report(vec![end(10, now - 7), end(10, now - 4)]);
        t.once().await;
        assert!(t.compare().is_clean(), "{}", t.compare());
    })
    .await;
}

/// If BigChat restarts after the copy was made, conversations of both epochs are distinguished.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copy_from_before_a_restart() {
    run_with(stores_its_events(27), async |t| {
        let daemon = t.start();
        t.bigchat.reports_more(80).await;
        // No event is waiting in the copy, because a BigChat that restarts forgets everything.
        t.bigchat.calms_down();
        t.agrees().await;
        t.until_events("waiting", 0).await;
        let copy = copy(t);
        t.bigchat.state().set_quiet(false);
        t.bigchat.reports_more(80).await;
        t.bigchat.calms_down();
        t.agrees().await;
        // BigChat's `date` has whole seconds and lags a little: pages from just before and just after a restart look
        // the same.
        let restart = t.now() + 3;
        until("some seconds", async || t.now() > restart).await;
        t.bigchat.restarts_between_polls().await;
        t.bigchat.state().set_quiet(false);
        t.bigchat.reports_more(120).await;
        t.bigchat.calms_down();
        t.agrees().await;
        daemon.stop().await;
        let (before, sent) = (held(t), writes(t));
        restore(t, &copy);
        catch_up(t).await;
        assert!(held(t) == before, "{}", t.compare());
        assert_eq!(writes(t), sent);
    })
    .await;
}

/// A message was in flight to a chat when the database was copied. A later END does not reset the agent of that chat.
#[tokio::test]
async fn copy_with_a_message_in_flight() {
    run_live_test(async |t| {
        t.set("--poll-overlap", "0s");
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        let report = |events| t.bigchat.reports(events);
        report(vec![message(10, now - 20, "hello")]);
        let daemon = t.start();
        t.until_events("delivered", 1).await;
        let faults = &t.our_api;
        let slow = slow(Duration::from_secs(2));
        faults.upset(ADD_MESSAGE, slow.carried_out());
        report(vec![message(10, now - 19, "in flight")]);
        until("the message is in flight", async || {
            t.our_api.message_count() == 2
        })
        .await;
        let copy = copy(t);
        report(vec![transfer(10, now - 5, 7)]);
        t.until_events("delivered", 3).await;
        daemon.stop().await;
        let agent = t.our_api.data().chats[0].agent_id;
        restore(t, &copy);
        let daemon = t.start();
        t.until_events("delivered", 2).await;
        let started = t.now();
        t.until_cursor_passes(started).await;
        let at = t.now();
        report(vec![end(10, at)]);
        t.until_events("delivered", 3).await;
        daemon.stop().await;
        assert_eq!(t.our_api.message_count(), 2);
        assert_eq!(t.our_api.data().chats[0].agent_id, agent, "{}", t.compare());
    })
    .await;
}

/// With an older copy of the database, a dead letter that can be parsed now is not delivered a second time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unparsable_dead_letter_and_older_copy() {
    run_live_test(async |t| {
        t.differs("one event could not be parsed at first");
        let now = t.now();
        t.bigchat.open(42, now - 100, 1);
        let daemon = t.start();
        t.delivers([message(42, now - 5, "first")]).await;
        let note = serde_json::json!({
            "conversation_id": 42, "event_name": "NOTE", "event_at": unix(now - 4), "data": {"message": "hello"}
        });
        t.bigchat.reports([note]);
        t.until_events("failed", 1).await;
        daemon.stop().await;
        // As if this program were a version that can parse it.
        t.execute("UPDATE events SET data = replace(data, 'NOTE', 'MESSAGE') WHERE kind = 'UNREADABLE'");
        let copy = copy(t);
        for round in 1..=2 {
            let daemon = t.start();
            t.until_polled().await;
            // Windows that begin before the session are over.
            t.until_cursor_passes(t.now() + 7).await;
            let answer = t.failed_command(&["retry", "--all"]).expect("it is done");
            assert!(answer.starts_with("1 failed event will be retried"), "{answer}");
            t.until_events("delivered", 2).await;
            daemon.stop().await;
            let mut messages = t.our_api.messages();
            messages.sort();
            assert_eq!(messages, ["first", "hello"], "round {round}");
            restore(t, &copy);
        }
    })
    .await;
}

/// With an older copy of the database, an END that can be parsed now does not replace a later one, as an END that is
/// received does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unparsable_end_and_older_copy() {
    run_live_test(async |t| {
        t.differs("one event could not be parsed at first");
        let now = t.now();
        t.bigchat.open(42, now - 100, 1);
        t.bigchat.reports([message(42, now - 20, "first")]);
        t.once().await;
        let stop = serde_json::json!({
            "conversation_id": 42, "event_name": "STOP", "event_at": unix(now - 10), "data": null
        });
        t.bigchat.reports([stop]);
        t.once().await;
        assert_eq!(t.events("failed"), 1);
        // As if this program were a version that can parse it.
        t.execute(
            "UPDATE events SET data = replace(data, 'STOP', 'END') WHERE kind = 'UNREADABLE'",
        );
        let copy = copy(t);
        t.bigchat
            .reports([end(42, now - 5), transfer(42, now - 5, 7)]);
        t.once().await;
        let before = held(t);
        restore(t, &copy);
        let daemon = t.start();
        t.until_polled().await;
        // Windows that begin before the session are over.
        t.until_cursor_passes(t.now() + 7).await;
        let answer = t.failed_command(&["retry", "--all"]).expect("it is done");
        assert!(
            answer.starts_with("1 failed event will be retried"),
            "{answer}"
        );
        t.until_events("delivered", 2).await;
        daemon.stop().await;
        assert_eq!(held(t), before, "the later END and TRANSFER stay");
    })
    .await;
}

/// With an older copy of the database, a message that can be parsed now does not undo a TRANSFER that the newer copy
/// delivered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unparsable_message_before_a_transfer() {
    run_live_test(async |t| {
        t.differs("one event could not be parsed at first");
        let now = t.now();
        t.bigchat.open(42, now - 100, 1);
        t.bigchat.reports([message(42, now - 20, "first"), end(42, now - 15)]);
        t.once().await;
        let note = serde_json::json!({
            "conversation_id": 42, "event_name": "NOTE", "event_at": unix(now - 10), "data": {"message": "hello"}
        });
        t.bigchat.reports([note]);
        t.once().await;
        assert_eq!(t.events("failed"), 1);
        // As if this program were a version that can parse it.
        t.execute("UPDATE events SET data = replace(data, 'NOTE', 'MESSAGE') WHERE kind = 'UNREADABLE'");
        let copy = copy(t);
        t.bigchat.reports([end(42, now - 5), transfer(42, now - 5, 7)]);
        t.once().await;
        let before = t.our_api.chats();
        restore(t, &copy);
        let daemon = t.start();
        t.until_polled().await;
        // Windows that begin before the session are over.
        t.until_cursor_passes(t.now() + 7).await;
        let answer = t.failed_command(&["retry", "--all"]).expect("it is done");
        assert!(answer.starts_with("1 failed event will be retried"), "{answer}");
        t.until_events("delivered", 3).await;
        daemon.stop().await;
        let mut messages = t.our_api.messages();
        messages.sort();
        assert_eq!(messages, ["first", "hello"]);
        assert_eq!(t.our_api.chats(), before, "the chat keeps its agent and its end");
    })
    .await;
}
