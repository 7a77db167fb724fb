//! A full disk, or a database that another process locks, reads, moves or deletes: polling pauses, the cursor stays,
//! and polling continues automatically. A damaged database is refused and not changed.

use crate::harness::process::{
    Process, finished, has_posix_lock, in_own_mounts, in_shell, printed, unreachable,
};
use crate::harness::services::{ADD_MESSAGE, NOW};
use crate::harness::web::{Console, client, sent, succeeds};
use crate::harness::{Bench, Test, run_live_test, run_test, side_by_side, until};
use bigchat_sync::simulator::event::{message, start};
use bigchat_sync::simulator::fault::{paused, slow, status};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bigchat_sync::journal::{OpenError, Store};
use bigchat_sync::settings::Tokens;

use tokio::time::timeout;

/// Longer than any statement waits for a locked database.
const LONGER_THAN_A_STATEMENT: Duration = Duration::from_millis(2_500);

/// Shorter than the total wait of one statement for each claimed conversation.
const TIME_LIMIT: Duration = Duration::from_secs(15);

/// The database and the files beside it, byte by byte.
fn contents(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(directory).expect("a directory");
    let file = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.expect("a file").path();
        let name = path
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        (name, std::fs::read(&path).expect("its bytes"))
    };
    let mut files: BTreeMap<_, _> = entries.map(file).collect();
    files.retain(|name, _| name.starts_with("journal.db"));
    files
}

/// Creates a database with some events, as a daemon that was stopped leaves it.
async fn with_events(t: &Test) {
    let now = t.now();
    t.bigchat.open(10, now - 100, 1);
    let events = (0..50).map(|n| message(10, now - 5, &format!("number {n} {}", "x".repeat(500))));
    t.bigchat.reports(events);
    t.once().await;
}

/// A damaged database is refused, and not changed.
#[tokio::test]
async fn damaged_database_is_refused() {
    type Damage = fn(&mut Vec<u8>);
    let damages: [(&str, Damage); 5] = [
        ("half of it is missing", |bytes| {
            bytes.truncate(bytes.len() / 2)
        }),
        ("its last page is missing", |bytes| {
            bytes.truncate(bytes.len() - 1)
        }),
        ("only its beginning is left", |bytes| bytes.truncate(99)),
        ("its schema is written over", |bytes| {
            bytes[100..4096].fill(0xa5)
        }),
        ("its first tables are written over", |bytes| {
            bytes[4096..5 * 4096].fill(0xa5)
        }),
    ];
    side_by_side(damages, async |(case, damage)| {
        run_live_test(async |t| {
            t.differs("the database is damaged");
            with_events(t).await;
            let mut bytes = std::fs::read(t.db()).expect("a database");
            damage(&mut bytes);
            std::fs::write(t.db(), bytes).expect("a database");
            let before = contents(t.directory());
            let requests = t.bigchat.total();
            let run = t.program("once").output().expect("it runs");
            let text = String::from_utf8_lossy(&run.stderr);
            assert_eq!(run.status.code(), Some(1), "{case}: {text}");
            assert!(
                text.contains("is damaged") && text.contains("was not changed"),
                "{case}: {text}"
            );
            assert!(contents(t.directory()) == before, "{case}: untouched");
            assert_eq!(t.bigchat.total(), requests, "{case}");
        })
        .await;
    })
    .await;
}

#[tokio::test]
async fn database_in_an_impossible_place() {
    for db in ["/proc/journal.db", "/does/not/exist/journal.db"] {
        let t = Bench::unreachable();
        t.set("--db", db);
        let run = t.program("once").output().expect("it runs");
        let text = String::from_utf8_lossy(&run.stderr);
        assert_eq!(run.status.code(), Some(1), "{text}");
        assert!(
            text.contains(db) && text.contains("cannot be opened"),
            "{text}"
        );
    }
}

#[tokio::test]
async fn second_daemon_is_refused() {
    run_live_test(async |t| {
        with_events(t).await;
        let first = t.start();
        let polls = t.bigchat.polls();
        until("it polls", async || t.bigchat.polls() > polls).await;
        for name in ["run", "once"] {
            let second = t.program(name).output().expect("it runs");
            let text = String::from_utf8_lossy(&second.stderr);
            assert_eq!(second.status.code(), Some(1), "{text}");
            assert!(text.contains("another bigchat-sync is using"), "{text}");
        }
        t.bigchat.reports([message(10, t.now() - 1, "and on")]);
        t.until_events("delivered", 51).await;
        first.stop().await;
        assert!(t.compare().is_clean());
    })
    .await;
}

/// Starts the daemon with a limit on the size of its files, as on a full disk, until the limit is [`lift`]ed.
fn on_a_small_disk(t: &Bench, kibibytes: u32) -> Process {
    let limit = format!("ulimit -S -f {}", kibibytes * 2);
    Process::start_as(t, in_shell(&limit, &t.program("run")))
}

/// Lifts the limit.
fn lift(process: &Process) {
    let lifted = Command::new("prlimit")
        .args(["--fsize=unlimited:", "--pid", &process.id()])
        .status();
    assert!(lifted.expect("prlimit, of util-linux").success());
}

const REFUSED: &str = "the journal cannot be written; polling pauses";

/// A daemon that has received a page of three events while the disk is full.
async fn received_on_full_disk(t: &Test) -> (Process, Option<i64>) {
    let now = t.now();
    t.bigchat.open(10, now - 100, 1);
    let daemon = on_a_small_disk(t, 1024);
    t.bigchat.reports([message(10, now - 6, "before")]);
    t.until_events("delivered", 1).await;
    // The twins would show whether the page is ingested twice. The large event exceeds the limit.
    let large = "x".repeat(2 << 20);
    let events = ["twin", "twin", &large].map(|text| message(10, now - 5, text));
    t.bigchat.reports(events);
    daemon.until_logged(REFUSED).await;
    let cursor = t.cursor();
    (daemon, cursor)
}

/// Polling pauses with one error, and continues once there is space.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_disk_pauses_polling() {
    run_live_test(async |t| {
        let (daemon, cursor) = received_on_full_disk(t).await;
        let polls = t.bigchat.count("GET /events");
        tokio::time::sleep(LONGER_THAN_A_STATEMENT).await;
        assert_eq!(
            t.bigchat.count("GET /events"),
            polls,
            "nothing more is asked"
        );
        assert_eq!(t.cursor(), cursor);
        assert_eq!(daemon.lines_with("ERROR"), 1, "{}", daemon.log());
        lift(&daemon);
        t.agrees().await;
        until("polling continues", async || {
            t.bigchat.count("GET /events") > polls + 2
        })
        .await;
        assert_eq!(
            daemon.lines_with("polling continues"),
            1,
            "{}",
            daemon.log()
        );
        assert!(daemon.stop().await.success());
        assert_eq!(t.events("delivered"), 4);
        assert!(t.compare().is_clean());
    })
    .await;
}

/// The error says how many events are lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stop_while_disk_is_full() {
    run_live_test(async |t| {
        t.differs("events are lost with the daemon");
        let (daemon, _) = received_on_full_disk(t).await;
        assert_eq!(daemon.stop().await.code(), Some(1));
        let text = t.logged();
        assert!(
            text.contains("reported events that may be lost: 3"),
            "{text}"
        );
    })
    .await;
}

/// When the daemon stops, a page is stored if there is space again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stop_after_disk_was_full() {
    run_live_test(async |t| {
        t.set("--poll-interval", "1s");
        let (daemon, _) = received_on_full_disk(t).await;
        lift(&daemon);
        assert!(daemon.stop().await.success(), "{}", t.logged());
        t.start();
        t.agrees().await;
    })
    .await;
}

/// A daemon waits for space if the disk is full at the start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_full_at_the_start() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.reports([message(10, now - 6, "hello")]);
        let waits = "the database cannot be used yet";
        let stopped = on_a_small_disk(t, 16);
        stopped.until_logged_times(waits, 1).await;
        assert!(stopped.stop().await.success());
        let daemon = on_a_small_disk(t, 16);
        daemon.until_logged_times(waits, 2).await;
        assert_eq!(t.bigchat.total(), 0);
        lift(&daemon);
        t.agrees().await;
        assert!(daemon.stop().await.success());
    })
    .await;
}

/// A daemon waits for a database that is locked at the start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn database_locked_at_the_start() {
    run_live_test(async |t| {
        with_events(t).await;
        let other = t.lock_database();
        let daemon = Process::start(t);
        daemon
            .until_logged_times("the database cannot be used yet", 1)
            .await;
        drop(other);
        t.bigchat.reports([message(10, t.now() - 1, "and on")]);
        t.until_events("delivered", 51).await;
        assert!(daemon.stop().await.success());
        assert_eq!(t.logged().matches("ERROR").count(), 1, "{}", t.logged());
    })
    .await;
}

/// Claimed events are delivered while the database is locked, and committed afterwards.
#[tokio::test]
async fn delivery_while_database_is_locked() {
    // As many conversations as are claimed together, each with more messages than are sent before the database is
    // locked.
    let conversations = 2..34;
    run_test(async |t| {
        let daemon = t.start();
        t.delivers(conversations.clone().map(|id| start(id, NOW)))
            .await;
        let messages = conversations
            .flat_map(|id| (0..20).map(move |n| message(id, NOW, &format!("Message {n}"))));
        let messages: Vec<_> = messages.collect();
        let (count, sent) = (messages.len(), || t.our_api.message_count());
        t.bigchat.reports(messages);
        until("the first is sent", async || sent() > 0).await;
        let other = t.lock_database();
        // A commit after each conversation would take longer.
        let all = until("all are sent", async || sent() == count);
        timeout(TIME_LIMIT, all).await.expect("no wait for commits");
        drop(other);
        t.until_events("delivered", i64::try_from(count + 32).expect("few"))
            .await;
        daemon.stop().await;
        assert_eq!(sent(), count, "each once");
    })
    .await;
}

/// A long-running reader delays nothing, and the write-ahead log shrinks afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn write_ahead_log_after_long_reader() {
    const LIMIT: u64 = 8 << 20;
    run_live_test(async |t| {
        with_events(t).await;
        let log = t.db().with_extension("db-wal");
        let size = || std::fs::metadata(&log).map_or(0, |log| log.len());
        let daemon = t.start();
        let polls = t.bigchat.polls();
        until("it polls", async || t.bigchat.polls() > polls).await;
        let reader = rusqlite::Connection::open(t.db()).expect("the database");
        reader.execute_batch("BEGIN").expect("a transaction");
        let count = "SELECT count(*) FROM events";
        let before: i64 = reader
            .query_row(count, [], |row| row.get(0))
            .expect("a count");
        let text = "x".repeat(1 << 20);
        let mut delivered = 50;
        let mut deliver = async |count: i64| {
            let number = |n| message(10, t.now() - 1, &format!("number {n} {text}"));
            t.bigchat
                .reports((delivered..delivered + count).map(number));
            delivered += count;
            t.until_events("delivered", delivered).await;
        };
        while size() < 3 * LIMIT {
            deliver(4).await;
        }
        let still: i64 = reader
            .query_row(count, [], |row| row.get(0))
            .expect("a count");
        assert_eq!(still, before, "it reads what it began with");
        reader.execute_batch("COMMIT").expect("it ends");
        until("the log is as small as it should be", async || {
            deliver(1).await;
            size() <= LIMIT
        })
        .await;
        daemon.stop().await;
        assert!(t.compare().is_clean());
    })
    .await;
}

/// Nothing is polled until the file is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn database_moved_away() {
    run_live_test(async |t| {
        with_events(t).await;
        let elsewhere = t.directory().join("elsewhere.db");
        let daemon = Process::start(t);
        let polls = t.bigchat.count("GET /events");
        until("it polls", async || t.bigchat.count("GET /events") > polls).await;
        std::fs::rename(t.db(), &elsewhere).expect("it moves");
        daemon.until_logged("was deleted or replaced").await;
        let polls = t.bigchat.count("GET /events");
        t.bigchat.reports([message(10, t.now() - 1, "and on")]);
        let other = "another database altogether";
        std::fs::write(t.db(), other).expect("a file");
        tokio::time::sleep(LONGER_THAN_A_STATEMENT / 5).await;
        assert_eq!(t.bigchat.count("GET /events"), polls);
        assert_eq!(
            daemon.lines_with("was deleted or replaced"),
            1,
            "{}",
            daemon.log()
        );
        assert_eq!(std::fs::read_to_string(t.db()).expect("a file"), other);
        std::fs::rename(&elsewhere, t.db()).expect("it moves back");
        t.until_events("delivered", 51).await;
        assert!(daemon.stop().await.success());
        assert!(t.compare().is_clean());
    })
    .await;
}

/// Events that were waiting are delivered, or reported as lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn database_deleted_while_running() {
    side_by_side([true, false], async |our_api_is_up| {
        run_live_test(async |t| {
            t.differs("the database is deleted");
            with_events(t).await;
            t.our_api.hold(true);
            let mut program = t.program("run");
            program.env("RUST_LOG", "bigchat_sync=debug");
            let daemon = Process::start_as(t, program);
            t.bigchat.reports([message(10, t.now() - 1, "and on")]);
            t.until_events("waiting", 1).await;
            for end in ["", "-wal", "-shm"] {
                std::fs::remove_file(format!("{}{end}", t.db().display())).expect("a file");
            }
            daemon.until_logged("was deleted or replaced").await;
            if our_api_is_up {
                t.our_api.hold(false);
                t.agrees().await;
                daemon.until_logged("\"delivered\"").await;
                assert!(daemon.stop().await.success());
            } else {
                assert_eq!(daemon.stop().await.code(), Some(1));
                let text = t.logged();
                assert!(text.contains("events in it that are lost: 1"), "{text}");
            }
            assert!(!t.db().exists(), "no other one is created in its place");
        })
        .await;
    })
    .await;
}

/// A command does not disturb a daemon that is creating its database.
#[test]
fn command_while_database_is_made() {
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..75).for_each(make_beside_a_command));
        }
    });
}

fn make_beside_a_command(n: u32) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("a.db");
    let beside = {
        let path = path.clone();
        std::thread::spawn(move || {
            loop {
                match Store::open_shared(&path) {
                    Err(OpenError::Missing(_)) => {}
                    opened => return opened.map(drop),
                }
            }
        })
    };
    let daemon = Store::open(&path).map(drop);
    let beside = beside.join().expect("no panic");
    for opened in [&daemon, &beside] {
        let is_acceptable = opened
            .as_ref()
            .map_or_else(OpenError::is_transient, |()| true);
        assert!(is_acceptable, "{n}: daemon {daemon:?}, beside {beside:?}");
    }
}

/// Reads by the console do not release the daemon's lock on the database.
#[tokio::test]
async fn console_leaves_the_database_lock() {
    run_live_test(async |t| {
        let (_, url) = t.start_listening(Tokens::default());
        let ready = format!("{url}/readyz");
        until("it is ready", async || succeeds(&ready).await).await;
        assert!(has_posix_lock(&t.db()), "SQLite locks what it has open");
        assert!(succeeds(&format!("{url}/api/status")).await);
        // Without the lock, the next `sqlite3` that closes the database deletes the write-ahead log.
        assert!(has_posix_lock(&t.db()), "the lock is gone");
    })
    .await;
}

/// Old events are dropped even if each poll takes longer than the interval.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retention_with_slow_polls() {
    run_live_test(async |t| {
        with_events(t).await;
        // Delivering ten thousand events would take too long.
        t.execute(
        "WITH RECURSIVE number(n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM number WHERE n < 10000)
         INSERT INTO events (conversation, kind, event_at, data, fingerprint, received_at)
         SELECT 1, 'MESSAGE', n, '{\"message\": \"long ago\"}', n, 1 FROM number;
         INSERT INTO deliveries (conversation, from_event, through, delivered_at, effect, waited)
         SELECT 1, min(id), max(id), 1, 'message added', 0 FROM events WHERE received_at = 1;
         UPDATE conversations SET offset = (SELECT max(id) FROM events) WHERE id = 1",
    );
        let slow = slow(Duration::from_millis(1_200));
        let faults = &t.bigchat;
        faults.upset("GET /events", slow.always());
        t.set("--poll-interval", "1s");
        t.start();
        let polls = || t.bigchat.count("GET /events");
        let before = polls();
        until("they are gone", async || t.events("delivered") == 50).await;
        let after = polls() - before;
        assert!(
            after < 10,
            "{after} polls, each of which drops at least 500"
        );
    })
    .await;
}

/// An event deleted by hand while in flight does not delay other events.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn event_deleted_while_in_flight() {
    run_live_test(async |t| {
        t.differs("an event is deleted by hand");
        t.set("--request-timeout", "2s");
        let now = t.now();
        let conversations = [10, 11];
        for conversation in conversations {
            t.bigchat.open(conversation, now - 100, 1);
        }
        let events = conversations.map(|conversation| message(conversation, now - 5, "hello"));
        t.bigchat.reports(events);
        let faults = &t.our_api;
        faults.upset(ADD_MESSAGE, paused());
        let daemon = t.start();
        until("it is sent", async || faults.pausing() > 0).await;
        t.execute("DELETE FROM events WHERE id = 1");
        t.until_events("delivered", 1).await;
        daemon.stop().await;
        assert_eq!(t.events("waiting"), 0);
    })
    .await;
}

/// `check` writes to the disk, and not only to SQLite's cache.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_on_full_disk() {
    run_live_test(async |t| {
        with_events(t).await;
        // The -shm file needs 32 KiB.
        let full = "ulimit -S -f 96";
        let checked = finished(in_shell(full, &t.program("check"))).await;
        let text = printed(&checked);
        assert!(text.contains("FAIL  database"), "{text}");
        assert!(text.contains("is not writable"), "{text}");
        let checked = finished(t.program("check")).await;
        let text = printed(&checked);
        assert!(text.contains("is writable"), "{text}");
    })
    .await;
}

/// `status` never writes, so it checks the free space.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_on_full_disk() {
    run_live_test(async |t| {
        with_events(t).await;
        let full = "mkdir full && mount -t tmpfs -o size=2m none full && cp journal.db full \
            && head -c 200K /dev/zero > full/room && { cat /dev/zero > full/rest; rm full/room; }";
        let status = unreachable(t.directory(), "status", "full/journal.db");
        let Some(status) = in_own_mounts(full, &status) else {
            return;
        };
        let text = printed(&finished(status).await);
        assert!(
            text.contains("! the disk of the database is full: "),
            "{text}"
        );
    })
    .await;
}

/// It is a problem only if nothing has been read for several poll intervals.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_without_completed_poll() {
    run_live_test(async |t| {
        t.set("--poll-interval", "1h");
        let daemon = t.start();
        t.until_polled().await;
        until("a poll is completed", async || t.status().1).await;
        t.execute(
            "UPDATE poll_state SET polled_at = polled_at - 100000, page_at = polled_at - 100000",
        );
        assert!(t.status().1, "less than three intervals");
        t.execute("UPDATE control SET poll_interval = 10");
        let (status, healthy) = t.status();
        let what = status["problems"][0]["what"].as_str().unwrap_or_default();
        assert!(
            !healthy && what.starts_with("nothing has been read from BigChat for "),
            "{status}"
        );
        daemon.stop().await;
    })
    .await;
}

/// `check` sends nothing to OurAPI beside a daemon, even if the database is gone and cannot show that a daemon is
/// running.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_after_database_was_deleted() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.reports([message(10, now - 5, "hello")]);
        let console = Console::new(t, Tokens::default());
        t.until_events("delivered", 1).await;
        t.set("--listen", console.address());
        let away = t.directory().join("away.db");
        std::fs::rename(t.db(), &away).expect("it is moved");
        until("the console reports it", async || {
            let (_, status) = console.get("/api/status").await;
            let text = status.to_string();
            text.contains("the journal cannot be written")
                && text.contains("was deleted or replaced")
        })
        .await;
        let requests = t.our_api.total();
        let text = printed(&finished(t.program("check")).await);
        for part in [
            "FAIL  daemon    a bigchat-sync already serves the console at ",
            &format!("its database was {}, put the file back", t.db().display()),
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(t.our_api.total(), requests, "OurAPI is not asked");
        std::fs::rename(&away, t.db()).expect("it is moved back");
        let text = printed(&finished(t.program("check")).await);
        assert!(text.contains("is running"), "{text}");
    })
    .await;
}

/// A database that can be written again is not reported as unwritable while BigChat is down.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn database_is_writable_during_an_outage() {
    run_live_test(async |t| {
        let (_daemon, url) = t.start_listening(Tokens::default());
        t.until_polled().await;
        let client = client();
        let ready = async || {
            let answer = sent(client.get(format!("{url}/readyz"))).await;
            answer.text().await.expect("a text")
        };
        let refused = "the journal cannot be written";
        let lock = t.lock_database();
        t.bigchat.open(10, t.now() - 100, 1);
        t.bigchat.reports([message(10, t.now() - 1, "hello")]);
        until("it is refused", async || ready().await.contains(refused)).await;
        t.bigchat.outage(Some(status(503)));
        drop(lock);
        until("only BigChat is reported", async || {
            let problems = ready().await;
            problems.contains("BigChat is down") && !problems.contains(refused)
        })
        .await;
        t.bigchat.outage(None);
        t.until_events("delivered", 1).await;
    })
    .await;
}
