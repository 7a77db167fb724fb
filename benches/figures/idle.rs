//! A daemon with nothing to do.

use std::time::{Duration, Instant};

use bigchat_sync::journal::Store;

use crate::process::{daemon, until};
use crate::server::Server;
use crate::{Scale, row};

pub(crate) fn measure(scale: Scale) {
    let time = Duration::from_secs(scale.of(100).unsigned_abs());
    let directory = tempfile::tempdir().expect("a directory");
    let db = directory.path().join("journal.db");
    let server = Server::start(Duration::ZERO);
    // The first start creates the database.
    let mut starts = Vec::new();
    let mut last = None;
    for _ in 0..5 {
        drop(last.take());
        server.reset(false);
        let began = Instant::now();
        last = Some(daemon(&server, &db, &[]));
        until("the first poll", Duration::from_secs(10), || {
            server.polled().is_some()
        });
        starts.push(server.polled().expect("it polled") - began);
    }
    let first = starts[0];
    starts.sort();
    let start = format!(
        "{:.0} ms ({:.0} ms the first time)",
        ms(starts[2]),
        ms(first)
    );
    row("start to first poll", &start, "≤ 100 ms");

    let daemon = last.expect("it runs");
    std::thread::sleep(Duration::from_secs(1));
    let (before, began) = (daemon.cpu_time(), Instant::now());
    std::thread::sleep(time);
    let share = (daemon.cpu_time() - before).as_secs_f64() / began.elapsed().as_secs_f64();
    row(
        "idle",
        &format!("{:.2}% of a core", share * 100.0),
        "< 0.1%",
    );
    row(
        "idle",
        &format!("{:.1} MiB", daemon.resident_kib() as f64 / 1024.0),
        "< 15 MiB",
    );
    drop(daemon);
    Store::open(&db).expect("the database is no longer locked");
}

pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
