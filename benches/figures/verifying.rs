//! How much the verification of all chats in idle time delays events that arrive meanwhile.

use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use crate::backlog::{START, event};
use crate::idle::ms;
use crate::large::{self, Before};
use crate::process::{daemon, until};
use crate::server::Server;
use crate::{Scale, row};

/// The time that OurAPI takes for a request.
const LATENCY: Duration = Duration::from_millis(5);

/// The interval between two events.
const EVERY: Duration = Duration::from_millis(100);

/// The first conversation with new events. Conversations that the journal already has have smaller ids.
const FIRST: i64 = 1_000_000_000;

/// How many conversations have new events. The first event of each creates its chat, and is not measured.
const CONVERSATIONS: i64 = 20;

pub(crate) fn measure(scale: Scale) {
    let (_directory, db) = large::journal();
    let chats = scale.of(100_000);
    large::add(&db, 1, chats, Before::Delivered);
    let due = "INSERT INTO verifications (idle, requested_at, ended_at, repair, last_event) VALUES (1, 0, 0, 0, 0)";
    Connection::open(&db)
        .and_then(|connection| connection.execute_batch(due))
        .expect("a pass is due");
    let events = scale.of(600);
    // Each run needs its own copy, because its OurAPI does not have the chats of the other run.
    let copy = db.with_file_name("copy.db");
    std::fs::copy(&db, &copy).expect("a copy");
    let (without, none) = times(&copy, events, "off");
    let (with, verified) = times(&db, events, "1ms");
    assert_eq!(none, 0, "nothing is verified if passes are off");
    assert!(verified > 0, "the pass makes progress");
    let at = |times: &[Duration], share: usize| ms(times[(times.len() - 1) * share / 100]);
    row(
        &format!(
            "10 events per second: a page received → the first write, 99th percentile, while {chats} chats of {} messages are verified",
            large::EVENTS - 2
        ),
        &format!(
            "{:.1} ms, without {:.1} ms (medians {:.1} and {:.1} ms; {verified} chats verified)",
            at(&with, 99),
            at(&without, 99),
            at(&with, 50),
            at(&without, 50)
        ),
        &format!("≤ {:.0} ms more, one request", ms(LATENCY)),
    );
}

/// The sorted delays of this many pages with one message each, and the number of chats verified meanwhile.
fn times(db: &Path, events: i64, verify_every: &str) -> (Vec<Duration>, u64) {
    let server = Server::start(LATENCY);
    server.has_chats_of(START);
    let flags = [
        "--poll-interval",
        "20ms",
        "--since",
        "2026-11-22T00:00:00Z",
        "--verify-every",
        verify_every,
    ];
    let _daemon = daemon(&server, db, &flags);
    let (mut times, mut verified) = (Vec::new(), 0);
    for number in 0..CONVERSATIONS + events {
        let next = Instant::now() + EVERY;
        verified += server.verified();
        server.reset(false);
        let text = format!(r#"{{"message":"Message {number}, --verify-every {verify_every}"}}"#);
        let conversation = FIRST + number % CONVERSATIONS;
        server.report(&event(conversation, "MESSAGE", START + number, &text));
        until("a write", Duration::from_secs(10), || {
            server.written().is_some()
        });
        if number >= CONVERSATIONS {
            let time = server.written().zip(server.polled());
            times.push(
                time.map(|(written, polled)| written - polled)
                    .expect("both"),
            );
        }
        std::thread::sleep(next - Instant::now());
    }
    times.sort();
    (times, verified)
}
