//! Processes, and their memory and CPU time.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::server::Server;

/// The unit in which the kernel reports a process's CPU time: 1/100 s.
const TICK: Duration = Duration::from_millis(10);

/// This program.
pub(crate) fn itself() -> Command {
    Command::new(std::env::current_exe().expect("a path"))
}

/// A running process. Dropping it kills it.
pub(crate) struct Process(Child);

/// Starts the daemon with this database.
pub(crate) fn daemon(server: &Server, db: &Path, flags: &[&str]) -> Process {
    daemon_under(
        Command::new(env!("CARGO_BIN_EXE_bigchat-sync")),
        server,
        db,
        flags,
    )
}

/// The same, started by another program, such as `strace`.
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

    /// Waits until the process exits, which must be with code 0.
    pub(crate) fn succeeds(&mut self) {
        assert!(self.0.wait().expect("an end").success());
    }

    /// The peak of its resident memory, in KiB.
    pub(crate) fn peak_kib(&self) -> u64 {
        self.status("VmHWM")
    }

    /// Its resident memory, in KiB.
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

    /// Its CPU time so far.
    pub(crate) fn cpu_time(&self) -> Duration {
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
        // An error means that the process has already exited.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Waits until `condition` is true, and panics after `at_most`.
pub(crate) fn until(what: &str, at_most: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + at_most;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
