//! How soon after a page what it tells is on its way.

use std::time::Duration;

use crate::backlog::{START, event};
use crate::idle::ms;
use crate::process::{daemon, until};
use crate::server::Server;
use crate::{Scale, row};

pub(crate) fn measure(scale: Scale) {
    let directory = tempfile::tempdir().expect("a directory");
    let db = directory.path().join("journal.db");
    let server = Server::start(Duration::ZERO);
    let since = "2026-11-22T00:00:00Z";
    let _daemon = daemon(&server, &db, &["--poll-interval", "20ms", "--since", since]);
    let mut times = Vec::new();
    for number in 0..scale.of(1_000) {
        server.reset(false);
        let data = format!(r#"{{"message":"Message {number}"}}"#);
        server.tell(&event(number % 100 + 2, "MESSAGE", START + number, &data));
        until("a request", Duration::from_secs(10), || {
            server.sent().is_some()
        });
        let (told, sent) = (server.polled(), server.sent());
        // Those of a conversation that is new begin with a question to BigChat.
        if number >= 100 || scale == Scale::Quick {
            times.push(
                sent.zip(told)
                    .map(|(sent, told)| sent - told)
                    .expect("both"),
            );
        }
    }
    times.sort();
    let at = |share: usize| ms(times[(times.len() - 1) * share / 100]);
    row(
        "a page received → the first request of its events, 99th percentile",
        &format!("{:.1} ms (median {:.1} ms)", at(99), at(50)),
        "≤ 5 ms",
    );
}
