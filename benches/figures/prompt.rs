//! The delay from the receipt of a page to the first request to OurAPI for its events: with a small journal, and while
//! a large one is pruned.

use std::path::Path;
use std::time::Duration;

use rusqlite::Connection;

use crate::backlog::{START, event};
use crate::idle::ms;
use crate::large::{self, Before};
use crate::process::{daemon, until};
use crate::server::Server;
use crate::{Scale, row};

/// The first reported conversation. Conversations that the journal already has have smaller ids.
const FIRST: i64 = 1_000_000_000;

/// How many conversations have events. The first event of each needs a request to BigChat, and is not measured.
const CONVERSATIONS: i64 = 100;

pub(crate) fn measure(scale: Scale) {
    let (_directory, db) = large::journal();
    let times = times(&db, CONVERSATIONS + scale.of(1_000));
    row(
        "a page received → the first request to OurAPI for its events, 99th percentile",
        &percentiles(&times),
        "≤ 5 ms",
    );
}

pub(crate) fn measure_pruning(scale: Scale) {
    let (_directory, db) = large::journal();
    let events = scale.of(3_000_000);
    large::add(&db, 1, events / large::EVENTS, Before::Old);
    let times = times(&db, CONVERSATIONS + scale.of(300));
    let left: i64 = Connection::open(&db)
        .and_then(|connection| {
            connection.query_row("SELECT count(*) FROM events", [], |row| row.get(0))
        })
        .expect("a number");
    assert!(
        left > events / 10,
        "all was pruned before the end: {left} events are left"
    );
    assert!(left < events, "nothing was pruned");
    row(
        &format!("the same while {events} old events are pruned"),
        &format!("{}; {} pruned", percentiles(&times), events - left),
        "≤ 5 ms",
    );
}

fn percentiles(times: &[Duration]) -> String {
    let at = |share: usize| ms(times[(times.len() - 1) * share / 100]);
    format!("{:.1} ms (median {:.1} ms)", at(99), at(50))
}

/// The sorted delays of this many pages with one message each.
fn times(db: &Path, pages: i64) -> Vec<Duration> {
    let server = Server::start(Duration::ZERO);
    let since = "2026-11-22T00:00:00Z";
    let _daemon = daemon(&server, db, &["--poll-interval", "20ms", "--since", since]);
    let mut times = Vec::new();
    for number in 0..pages {
        server.reset(false);
        let data = format!(r#"{{"message":"Message {number}"}}"#);
        let conversation = FIRST + number % CONVERSATIONS;
        server.report(&event(conversation, "MESSAGE", START + number, &data));
        until("a request", Duration::from_secs(10), || {
            server.sent().is_some()
        });
        if number >= CONVERSATIONS {
            let time = server.sent().zip(server.polled());
            times.push(time.map(|(sent, polled)| sent - polled).expect("both"));
        }
    }
    times.sort();
    times
}
