//! Processes, and what they cost.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::server::Server;

/// What the kernel counts a process's time in: 1/100 s.
const TICK: Duration = Duration::from_millis(10);

/// This program.
pub(crate) fn itself() -> Command {
    Command::new(std::env::current_exe().expect("a path"))
}

/// A process at work; dropped, it is killed.
pub(crate) struct Process(Child);

/// The daemon over a database.
pub(crate) fn daemon(server: &Server, db: &Path, flags: &[&str]) -> Process {
    daemon_under(
        Command::new(env!("CARGO_BIN_EXE_bigchat-sync")),
        server,
        db,
        flags,
    )
}

/// The same, started by another program.
pub(crate) fn daemon_under(
    mut command: Command,
    server: &Server,
    db: &Path,
    flags: &[&str],
) -> Process {
    command
        .arg("run")
        .args([
            "--bigchat-url",
            &server.url(),
            "--our-api-url",
            &server.url(),
        ])
        .arg("--db")
        .arg(db)
        .args(["--listen", "127.0.0.1:0"])
        .args(flags)
        .env("RUST_LOG", "warn");
    Process::start(&mut command)
}

impl Process {
    pub(crate) fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).spawn().expect("a process"))
    }

    /// Waits for its end, which has to be a good one.
    pub(crate) fn succeeds(&mut self) {
        assert!(self.0.wait().expect("an end").success());
    }

    /// The most memory it has held so far, in KiB.
    pub(crate) fn peak_kib(&self) -> u64 {
        self.status("VmHWM")
    }

    /// The memory it holds, in KiB.
    pub(crate) fn resident_kib(&self) -> u64 {
        self.status("VmRSS")
    }

    fn status(&self, what: &str) -> u64 {
        let status = self.read("status");
        let line = status.lines().find(|line| line.starts_with(what));
        let number = line.and_then(|line| line.split_whitespace().nth(1));
        number
            .and_then(|number| number.parse().ok())
            .expect("a number")
    }

    /// How long it was on a processor so far.
    pub(crate) fn on_processor(&self) -> Duration {
        let stat = self.read("stat");
        let after_name = stat.rsplit(')').next().expect("a name");
        let ticks = after_name.split_whitespace().skip(11).take(2);
        TICK * ticks
            .map(|ticks| ticks.parse::<u32>().expect("a number"))
            .sum::<u32>()
    }

    fn read(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.0.id())).expect("it runs")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended by itself is nobody to be killed any more.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Waits until `condition` holds, at most so long.
pub(crate) fn until(what: &str, at_most: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + at_most;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
