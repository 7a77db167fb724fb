//! Delivery with a slow OurAPI and a slow disk. The rate should be as high as they allow.

use std::process::{Command, Stdio};
use std::time::Duration;

use crate::backlog::{self, until_delivered, usual, waiting};
use crate::process::daemon_under;
use crate::server::Server;
use crate::{Scale, row};

const LATENCY: Duration = Duration::from_millis(50);

/// The delay added to each fdatasync and fsync.
const DELAY: Duration = Duration::from_millis(10);

pub(crate) fn measure_api(scale: Scale) {
    for in_flight in [1_u16, 8] {
        let (_directory, db) = waiting(scale.of(50) * i64::from(in_flight), usual);
        let server = Server::start(LATENCY);
        let flags = ["--our-api-concurrency", &in_flight.to_string()];
        let delivered = backlog::deliver(&server, &db, &flags);
        print_rate("OurAPI takes 50 ms", in_flight, delivered.per_second());
    }
}

pub(crate) fn measure_disk(scale: Scale) {
    let strace = Command::new("strace")
        .arg("-V")
        .stdout(Stdio::null())
        .status();
    if !strace.is_ok_and(|status| status.success()) {
        row("a slow disk", "not measured: strace is missing", "");
        return;
    }
    for in_flight in [1_u16, 8] {
        let conversations = scale.of(50) * i64::from(in_flight);
        let rate = on_disk(DELAY, LATENCY, conversations, in_flight);
        print_rate("OurAPI takes 50 ms, fsync 10 ms", in_flight, rate);
    }
    // Tracing costs time, which matters if OurAPI is fast. The baseline is therefore a traced daemon, too.
    for in_flight in [1, 8] {
        let rate = |delay| on_disk(delay, Duration::ZERO, scale.of(2_000), in_flight);
        let (slow, usual) = (rate(DELAY), rate(Duration::ZERO));
        row(
            &format!(
                "a fast OurAPI, fsync 10 ms, {in_flight} in flight, relative to the usual disk"
            ),
            &format!("{:.2}", slow / usual),
            "near 1",
        );
    }
}

/// The requests per second of a daemon with `delay` added to each fsync, and with an OurAPI of this latency.
fn on_disk(delay: Duration, latency: Duration, conversations: i64, in_flight: u16) -> f64 {
    let (_directory, db) = waiting(conversations, usual);
    let server = Server::start(latency);
    let mut strace = Command::new("strace");
    // With -D, the started process is the daemon, and strace exits with it.
    strace.args(["-D", "-f", "--seccomp-bpf", "-qq", "-e"]);
    strace.arg(format!(
        "inject=fdatasync,fsync:delay_exit={}",
        delay.as_micros()
    ));
    strace.args(["--", env!("CARGO_BIN_EXE_bigchat-sync")]);
    strace.stderr(Stdio::null());
    let flags = ["--our-api-concurrency", &in_flight.to_string()];
    let daemon = daemon_under(strace, &server, &db, &flags);
    until_delivered(&server, &db, daemon).per_second()
}

fn print_rate(what: &str, in_flight: u16, rate: f64) {
    let ideal = f64::from(in_flight) / LATENCY.as_secs_f64();
    let measured = format!("{:.2} ({rate:.1} of {ideal:.0} per second)", rate / ideal);
    row(
        &format!("{what}, {in_flight} in flight, relative to concurrency ÷ latency"),
        &measured,
        "near 1",
    );
}
