//! A slow OurAPI, and a slow disk: what then limits the rate is theirs, and nothing of it is lost.

use std::process::{Command, Stdio};
use std::time::Duration;

use crate::backlog::{self, until_delivered, usual, waiting};
use crate::process::daemon_under;
use crate::server::Server;
use crate::{Scale, row};

const LATENCY: Duration = Duration::from_millis(50);

/// Each fdatasync and fsync takes 10 ms longer.
const SLOW_DISK: [&str; 5] = ["-f", "-qq", "-e", "trace=none", "-e"];
const DELAY: &str = "inject=fdatasync,fsync:delay_exit=10000";

pub(crate) fn measure_api(scale: Scale) {
    for at_once in [1_u16, 8] {
        let (_directory, db) = waiting(scale.of(50) * i64::from(at_once), usual);
        let server = Server::start(LATENCY);
        let flags = ["--our-api-concurrency", &at_once.to_string()];
        let delivered = backlog::deliver(&server, &db, &flags);
        tell("OurAPI takes 50 ms", at_once, delivered.per_second());
    }
}

pub(crate) fn measure_disk(scale: Scale) {
    let there = Command::new("strace")
        .arg("-V")
        .stdout(Stdio::null())
        .status();
    if !there.is_ok_and(|status| status.success()) {
        row("a slow disk", "not measured: strace is missing", "");
        return;
    }
    for (latency, at_once) in [
        (LATENCY, 1_u16),
        (LATENCY, 8),
        (Duration::ZERO, 1),
        (Duration::ZERO, 8),
    ] {
        let conversations = if latency.is_zero() {
            2_000
        } else {
            50 * i64::from(at_once)
        };
        let (_directory, db) = waiting(scale.of(conversations), usual);
        let server = Server::start(latency);
        let mut command = Command::new("strace");
        command
            .args(SLOW_DISK)
            .arg(DELAY)
            .arg("--")
            .arg(env!("CARGO_BIN_EXE_bigchat-sync"));
        command.stderr(Stdio::null());
        let flags = ["--our-api-concurrency", &at_once.to_string()];
        let daemon = daemon_under(command, &server, &db, &flags);
        let delivered = until_delivered(&server, &db, daemon);
        let rate = delivered.per_second();
        if latency.is_zero() {
            let what = format!("fsync takes 10 ms, a fast OurAPI, {at_once} in flight");
            row(&what, &format!("{rate:.0} requests a second"), "");
        } else {
            tell("OurAPI takes 50 ms, fsync 10 ms", at_once, rate);
        }
    }
}

fn tell(what: &str, at_once: u16, rate: f64) {
    let ideal = f64::from(at_once) / LATENCY.as_secs_f64();
    let measured = format!("{:.2} ({rate:.1} of {ideal:.0} a second)", rate / ideal);
    row(
        &format!("{what}, {at_once} in flight, of concurrency ÷ latency"),
        &measured,
        "near 1",
    );
}
