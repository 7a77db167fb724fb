//! Delivery of a backlog, as fast as OurAPI accepts it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bigchat_sync::domain::dedupe::Counts;
use bigchat_sync::domain::event::page_events;
use bigchat_sync::domain::ids::Epoch;
use bigchat_sync::domain::time::{Millis, Timestamp};
use bigchat_sync::domain::window::Window;
use bigchat_sync::journal::{NewPage, Store, WindowProgress};
use tempfile::TempDir;

use crate::process::{Process, daemon, until};
use crate::server::Server;
use crate::{Scale, bare, row};

/// The number of measured rounds. In each, the daemon and the bare client run one after the other. The median round is
/// printed.
const ROUNDS: usize = 3;

/// When the conversations begin, by BigChat's clock.
pub(crate) const START: i64 = 1_795_384_800;

/// The events of a conversation, by their number.
type Story = fn(conversation: i64, number: i64) -> Option<(&'static str, String)>;

/// START, 18 MESSAGEs, END.
pub(crate) fn usual(conversation: i64, number: i64) -> Option<(&'static str, String)> {
    Some(match number {
        0 => ("START", "null".to_owned()),
        19 => ("END", "null".to_owned()),
        1..19 => (
            "MESSAGE",
            format!(
                r#"{{"message":"Message {number} of conversation {conversation}, of a usual length for a chat."}}"#
            ),
        ),
        _ => return None,
    })
}

/// The same, but an END and a TRANSFER replace every other pair of events.
fn restless(conversation: i64, number: i64) -> Option<(&'static str, String)> {
    Some(match number % 4 {
        2 => ("END", "null".to_owned()),
        3 => {
            let (from, to) = (number % 3 + 1, (number + 1) % 3 + 1);
            let data = format!(r#"{{"old_advisor_id":{from},"new_advisor_id":{to}}}"#);
            ("TRANSFER", data)
        }
        _ => return usual(conversation, number),
    })
}

/// A journal with this many waiting conversations.
pub(crate) fn waiting(conversations: i64, story: Story) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a directory");
    let db = directory.path().join("journal.db");
    let mut store = Store::open(&db).expect("a database");
    for from in (0..conversations).step_by(100) {
        let events: Vec<String> = (from + 1..=conversations.min(from + 100))
            .flat_map(|id| events_of(id, story))
            .collect();
        ingest(&mut store, &events);
    }
    drop(store);
    (directory, db)
}

fn events_of(id: i64, story: Story) -> impl Iterator<Item = String> {
    let events = (0..).map_while(move |number| Some((number, story(id, number)?)));
    events.map(move |(number, (name, data))| event(id, name, START + number * 10, &data))
}

/// An event, as BigChat reports it.
pub(crate) fn event(id: i64, name: &str, at: i64, data: &str) -> String {
    format!(r#"{{"conversation_id":{id},"event_name":"{name}","event_at":{at},"data":{data}}}"#)
}

fn ingest(store: &mut Store, events: &[String]) {
    let at = Timestamp::clamped(START + 1000);
    let page = NewPage {
        query: "page=1".to_owned(),
        requested_in: Epoch(1),
        served_at: at,
        window: Window {
            start: Timestamp::clamped(START),
            end: at,
        },
        events: events.len(),
        window_at: None,
        progress: WindowProgress::Complete(at),
        body: format!(r#"{{"events":[{}],"nextPageUrl":null}}"#, events.join(",")),
    };
    store.store_page(&page).expect("it is stored");
    let page = store.stored_pages().expect("pages").pop().expect("one");
    let mut count = 0;
    page_events(&page.body, |_| count += 1).expect("a page");
    assert_eq!(count, events.len());
    store
        .ingest(
            &page,
            Epoch(1),
            false,
            &Counts::default(),
            &[],
            Millis::now(),
        )
        .expect("it is ingested");
    store.end_poll(at, Millis::now(), 0).expect("it ends");
}

/// The cost of delivering a backlog.
pub(crate) struct Delivered {
    pub(crate) requests: u64,
    pub(crate) took: Duration,
    pub(crate) cpu_time: Duration,
    pub(crate) peak_kib: u64,
}

impl Delivered {
    pub(crate) fn per_second(&self) -> f64 {
        self.requests as f64 / self.took.as_secs_f64()
    }
}

/// Delivers all waiting events with a new daemon.
pub(crate) fn deliver(server: &Server, db: &Path, flags: &[&str]) -> Delivered {
    until_delivered(server, db, daemon(server, db, flags))
}

/// The same with a daemon that is already running.
pub(crate) fn until_delivered(server: &Server, db: &Path, daemon: Process) -> Delivered {
    // Querying the journal meanwhile would slow down the daemon.
    let mut before = u64::MAX;
    until("no more requests", Duration::from_secs(900), || {
        std::thread::sleep(Duration::from_millis(1500));
        let count = server.count();
        count > 0 && std::mem::replace(&mut before, count) == count
    });
    let delivered = Delivered {
        requests: server.count(),
        took: server.took(),
        cpu_time: daemon.cpu_time(),
        peak_kib: daemon.peak_kib(),
    };
    drop(daemon);
    let mut store = Store::open_shared(db).expect("a database");
    assert_eq!(store.waiting().expect("a number"), 0);
    delivered
}

pub(crate) fn measure_one(scale: Scale) {
    measure(scale, 1);
}

pub(crate) fn measure_eight(scale: Scale) {
    measure(scale, 8);
}

fn measure(scale: Scale, in_flight: u16) {
    let conversations = scale.of(5_000);
    let (_directory, db) = waiting(conversations, usual);
    let events = conversations * 20;
    let server = Server::start(Duration::ZERO);
    let flags = ["--our-api-concurrency", &in_flight.to_string()];
    let mut rounds = Vec::new();
    // The first round is not measured, because it records the requests for the bare client, which takes time.
    let mut made = Vec::new();
    for round in 0..=ROUNDS {
        let directory = tempfile::tempdir().expect("a directory");
        let copy = directory.path().join("copy.db");
        std::fs::copy(&db, &copy).expect("a copy");
        server.restart(round == 0);
        let ours = deliver(&server, &copy, &flags);
        if round == 0 {
            made = server.made();
            continue;
        }
        let (took, cpu_time) = bare::replay(&server, &made, in_flight);
        let each = |time: Duration| time.as_secs_f64() * 1e6 / ours.requests as f64;
        let ratio = took.as_secs_f64() / ours.took.as_secs_f64();
        let measured = format!(
            "{ratio:.2} ({:.0} and {:.0} per second; CPU time {:.1} and {:.1} µs per request; peak {:.1} MiB)",
            ours.per_second(),
            ours.requests as f64 / took.as_secs_f64(),
            each(ours.cpu_time),
            each(cpu_time),
            ours.peak_kib as f64 / 1024.0,
        );
        rounds.push((ratio, measured));
        if round == ROUNDS {
            let bytes = bytes_beyond_payload(&copy) as f64 / events as f64;
            row(
                "journal on disk, without the data of the events",
                &format!("{bytes:.0} bytes per event"),
                "≤ 300",
            );
        }
    }
    rounds.sort_by(|one, other| one.0.total_cmp(&other.0));
    let what =
        format!("backlog of {events} events, {in_flight} in flight, relative to a bare client");
    row(&what, &rounds[ROUNDS / 2].1, "≥ 0.9");
}

/// The size of the journal without the data of its events.
fn bytes_beyond_payload(db: &Path) -> i64 {
    let connection = rusqlite::Connection::open(db).expect("a database");
    let all = "SELECT (page_count - freelist_count) * page_size
            - (SELECT sum(length(CAST(coalesce(data, '') AS BLOB))) FROM events)
        FROM pragma_page_count, pragma_freelist_count, pragma_page_size";
    connection
        .query_row(all, [], |row| row.get(0))
        .expect("a number")
}

pub(crate) fn measure_merging(scale: Scale) {
    for (what, story, target) in [
        ("requests per event, backlog", usual as Story, "< 1"),
        ("the same with repeated ENDs and TRANSFERs", restless, "< 1"),
    ] {
        let conversations = scale.of(1_000);
        let (_directory, db) = waiting(conversations, story);
        let server = Server::start(Duration::ZERO);
        server.reset(true);
        deliver(&server, &db, &[]);
        print_ratio(what, server.made_to_our_api(), conversations * 20, target);
    }
}

/// Each poll returns the next event of each conversation. The next poll follows when all of them are delivered.
pub(crate) fn measure_steady(scale: Scale) {
    let conversations = scale.of(1_000);
    let directory = tempfile::tempdir().expect("a directory");
    let db = directory.path().join("journal.db");
    let server = Server::start(Duration::ZERO);
    server.reset(true);
    let since = "2026-11-22T00:00:00Z";
    let _daemon = daemon(&server, &db, &["--poll-interval", "20ms", "--since", since]);
    until("a database", Duration::from_secs(10), || {
        server.polled().is_some()
    });
    let mut store = Store::open_shared(&db).expect("a database");
    let mut report_all = |number: i64| {
        let events = (1..=conversations).filter_map(|id| {
            let (name, data) = usual(id, number)?;
            Some(event(id, name, START + number * 10, &data))
        });
        let events: Vec<String> = events.collect();
        let before = server.polls();
        server.report(&events.join(","));
        until("all events are delivered", Duration::from_secs(60), || {
            // All events are ingested once the poll after the one that reported them has begun.
            server.polls() > before + 2 && store.waiting().expect("a number") == 0
        });
        events.len() as i64
    };
    let events = (0..20).map(&mut report_all).sum();
    let made = server.made_to_our_api();
    print_ratio("requests per event, steady state", made, events, "≤ 1.02");
    server.reset(true);
    let events = (0..20).map(&mut report_all).sum();
    let made = server.made_to_our_api();
    print_ratio("the same if nothing changes", made, events, "0");
}

fn print_ratio(what: &str, requests: usize, events: i64, target: &str) {
    row(
        what,
        &format!("{:.3}", requests as f64 / events as f64),
        target,
    );
}
