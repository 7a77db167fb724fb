//! A slow OurAPI, and a slow disk: what then limits the rate is theirs, and nothing of it is lost.

use std::process::{Command, Stdio};
use std::time::Duration;

use crate::backlog::{self, until_delivered, usual, waiting};
use crate::process::daemon_under;
use crate::server::Server;
use crate::{Scale, row};

const LATENCY: Duration = Duration::from_millis(50);

/// How much longer each fdatasync and fsync takes.
const DELAY: Duration = Duration::from_millis(10);

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
    for at_once in [1_u16, 8] {
        let conversations = scale.of(50) * i64::from(at_once);
        let rate = on_disk(DELAY, LATENCY, conversations, at_once);
        tell("OurAPI takes 50 ms, fsync 10 ms", at_once, rate);
    }
    // To be traced is dear, which shows where OurAPI is fast: so it is compared with a traced daemon, too.
    for at_once in [1, 8] {
        let rate = |delay| on_disk(delay, Duration::ZERO, scale.of(2_000), at_once);
        let (slow, usual) = (rate(DELAY), rate(Duration::ZERO));
        row(
            &format!(
                "a fast OurAPI, fsync 10 ms, {at_once} in flight, of the rate on the usual disk"
            ),
            &format!("{:.2}", slow / usual),
            "near 1",
        );
    }
}

/// How many requests a second a daemon makes whose every fsync takes longer by `delay`, to an OurAPI of that latency.
fn on_disk(delay: Duration, latency: Duration, conversations: i64, at_once: u16) -> f64 {
    let (_directory, db) = waiting(conversations, usual);
    let server = Server::start(latency);
    let mut strace = Command::new("strace");
    // With -D it is strace that ends with the daemon, and not the other way round.
    strace.args(["-D", "-f", "--seccomp-bpf", "-qq", "-e"]);
    strace.arg(format!(
        "inject=fdatasync,fsync:delay_exit={}",
        delay.as_micros()
    ));
    strace.args(["--", env!("CARGO_BIN_EXE_bigchat-sync")]);
    strace.stderr(Stdio::null());
    let flags = ["--our-api-concurrency", &at_once.to_string()];
    let daemon = daemon_under(strace, &server, &db, &flags);
    until_delivered(&server, &db, daemon).per_second()
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
