//! A large journal: delivered events cost nothing, and waiting events are not held in memory.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bigchat_sync::journal::Store;
use rusqlite::Connection;
use tempfile::TempDir;

use crate::backlog::{self, START, deliver, usual};
use crate::process::{daemon, until};
use crate::server::Server;
use crate::{Scale, row};

/// How many bytes a long message has.
const LONG: u32 = 10_000;

/// How many events a conversation has.
pub(crate) const EVENTS: i64 = 20;

/// The state of the events that [`add`] writes directly to a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Before {
    /// Waiting for delivery.
    Waiting,
    /// Delivered.
    Delivered,
    /// Delivered so long ago that they are dropped.
    Old,
}

/// Adds conversations to a journal, with ids from `first` on.
pub(crate) fn add(db: &Path, first: i64, conversations: i64, before: Before) {
    let connection = Connection::open(db).expect("a database");
    let each = format!(
        "WITH RECURSIVE conversation(id) AS (VALUES ({first}) UNION ALL SELECT id + 1 FROM conversation WHERE id < {}),
            number(n) AS (VALUES (0) UNION ALL SELECT n + 1 FROM number WHERE n < {EVENTS} - 1)",
        first + conversations - 1
    );
    // Only events that both happened and were delivered long ago are dropped.
    let (event_at, delivered_at) = match before {
        Before::Waiting => (START, "NULL"),
        Before::Delivered => (START, "unixepoch() * 1000"),
        Before::Old => (START - 365 * 86_400, "unixepoch('now', '-1 year') * 1000"),
    };
    let is_delivered = before != Before::Waiting;
    // The id before the first event of a conversation.
    let before_first = format!("base.event + (id - {first}) * {EVENTS}");
    connection
        .execute_batch(&format!(
            "BEGIN;
             CREATE TEMP TABLE base AS SELECT coalesce(max(id), 0) AS event FROM events;
             {each} INSERT INTO conversations (id, epoch, bigchat_id, started_at, details, first_advisor, external_id, chat_id,
                chat_started_at, offset, waiting, waiting_since, due_at, verified_in)
             SELECT id, 1, id, {START}, 'read', iif({is_delivered}, NULL, 7), iif({is_delivered}, id, NULL),
                iif({is_delivered}, printf('00000000-0000-4000-8000-%012x', id), NULL), {START},
                iif({is_delivered}, {before_first} + {EVENTS}, 0), iif({is_delivered}, 0, {EVENTS}),
                iif({is_delivered}, NULL, 1), iif({is_delivered}, NULL, 1), iif({is_delivered}, 0, NULL)
             FROM conversation, base;
             {each} INSERT INTO events (id, conversation, kind, event_at, data, fingerprint, received_at)
             SELECT {before_first} + n + 1, id,
                CASE n WHEN 0 THEN 'START' WHEN {EVENTS} - 1 THEN 'END' ELSE 'MESSAGE' END, {event_at} + n * 10,
                iif(n IN (0, {EVENTS} - 1), NULL,
                    printf('{{\"message\":\"Message %d of conversation %d, of a usual length for a chat.\"}}', n, id)),
                random(), unixepoch() * 1000
             FROM conversation, number, base;
             {each} INSERT INTO deliveries (conversation, from_event, through, delivered_at, effect, waited)
             SELECT id, {before_first} + 1, {before_first} + {EVENTS}, {delivered_at}, 'message added', 0
             FROM conversation, base WHERE {is_delivered};
             DROP TABLE base;
             COMMIT; PRAGMA wal_checkpoint(TRUNCATE);"
        ))
        .expect("they are added");
}

/// An empty journal.
pub(crate) fn journal() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a directory");
    let db = directory.path().join("journal.db");
    drop(Store::open(&db).expect("a database"));
    (directory, db)
}

pub(crate) fn measure(scale: Scale) {
    let (before, conversations) = (scale.of(5_000_000) / EVENTS, scale.of(2_000));
    let (_small, small) = backlog::waiting(100, usual);
    add(&small, 1_000_000_000, conversations, Before::Waiting);
    let (_large, large) = journal();
    add(&large, 1, before, Before::Delivered);
    add(&large, 1_000_000_000, conversations, Before::Waiting);
    let server = Server::start(Duration::ZERO);
    let mut ratios = Vec::new();
    for _ in 0..3 {
        let cost = |db: &Path| {
            let directory = tempfile::tempdir().expect("a directory");
            let copy = directory.path().join("copy.db");
            std::fs::copy(db, &copy).expect("a copy");
            server.restart(false);
            let delivered = deliver(&server, &copy, &[]);
            let requests = delivered.requests as f64;
            (
                delivered.took.as_secs_f64() / requests,
                delivered.cpu_time.as_secs_f64() / requests,
            )
        };
        let (small, large) = (cost(&small), cost(&large));
        ratios.push((large.0 / small.0, large.1 / small.1));
    }
    ratios.sort_by(|one, other| one.0.total_cmp(&other.0));
    let (took, cpu_time) = ratios[1];
    let what = format!(
        "cost per event with {} events in the journal, relative to an empty journal",
        before * EVENTS
    );
    row(
        &what,
        &format!("{took:.2} × (CPU time {cpu_time:.2} ×)"),
        "≤ 1.1 ×",
    );
}

pub(crate) fn measure_memory(scale: Scale) {
    let events = scale.of(1_000_000);
    let (_directory, db) = journal();
    add(&db, 1, events / EVENTS, Before::Waiting);
    print_peaks(
        &db,
        events,
        &format!("resident memory with {events} waiting, 1 and 8 in flight"),
    );
    let events = events / 10;
    let (_directory, db) = journal();
    add(&db, 1, events / EVENTS, Before::Waiting);
    let lengthen =
        format!("UPDATE events SET data = replace(data, 'usual', printf('%.{LONG}c', 'x'))");
    Connection::open(&db)
        .and_then(|connection| connection.execute_batch(&lengthen))
        .expect("they are long");
    print_peaks(
        &db,
        events,
        &format!("the same with {events} messages of {LONG} bytes"),
    );
}

/// Prints the peak memory during the delivery of the first waiting events, with 1 and 8 requests in flight.
fn print_peaks(db: &Path, events: i64, what: &str) {
    let enough = events.unsigned_abs().min(100_000) / 5;
    let peak = |in_flight| {
        let server = Server::start(Duration::ZERO);
        server.reset(false);
        let daemon = daemon(&server, db, &["--our-api-concurrency", in_flight]);
        until("it delivers", Duration::from_secs(300), || {
            server.count() > enough
        });
        daemon.peak_kib() as f64 / 1024.0
    };
    let measured = format!("{:.1} and {:.1} MiB", peak("1"), peak("8"));
    row(what, &measured, "≤ 30 MiB");
}
