//! The program as a process of its own, for what only a process shows: memory, limits of the operating system, exit codes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use crate::harness::{Bench, until};

/// The program in a directory, with services that cannot be reached.
pub(crate) fn unreachable(directory: &Path, command: &str, db: &str) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_bigchat-sync"));
    program
        .current_dir(directory)
        .args(command.split(' '))
        .args(["--db", db, "--listen", "off"])
        .args(["--bigchat-url", "http://127.0.0.1:1"])
        .args(["--our-api-url", "http://127.0.0.1:2"])
        .stdin(Stdio::null());
    program
}

/// All that a program has printed.
pub(crate) fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

/// Within which time it must end once it is told to.
pub(crate) const STOPS_WITHIN: Duration = Duration::from_secs(10);

/// A running `bigchat-sync run`.
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it.
    pub(crate) fn start(bench: &Bench) -> Self {
        Self::start_as(bench, bench.program("run"))
    }

    /// Starts it by another command, which becomes it.
    pub(crate) fn start_as(bench: &Bench, mut command: Command) -> Self {
        let log = bench.directory().join("log");
        let stderr = File::options().create(true).append(true).open(&log);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr.expect("a log"))
            .spawn()
            .expect("a process");
        Self { child, log }
    }

    /// Where it logs.
    pub(crate) fn log_file(&self) -> PathBuf {
        self.log.clone()
    }

    /// All it has logged so far, those started before it on the same bench included.
    pub(crate) fn log(&self) -> String {
        let bytes = std::fs::read(&self.log).expect("a log");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// How many lines of its log hold that.
    pub(crate) fn lines_with(&self, part: &str) -> usize {
        let log = self.log();
        log.lines().filter(|line| line.contains(part)).count()
    }

    /// Its id, for the tools that set limits.
    pub(crate) fn id(&self) -> String {
        self.child.id().to_string()
    }

    /// A field of `/proc/…/status` in MiB: `VmHWM` is the most memory it ever held, `VmRSS` what it holds now.
    pub(crate) fn mebibytes(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("it runs");
        let line = status.lines().find(|line| line.starts_with(field));
        let kibibytes = line.and_then(|line| line.split_whitespace().nth(1));
        kibibytes
            .and_then(|number| number.parse::<u64>().ok())
            .expect("a number of KiB")
            / 1024
    }

    /// Stops it by SIGTERM, and tells how it ended; in time, or the test fails.
    pub(crate) async fn stop(self) -> ExitStatus {
        let told = Instant::now();
        let kill = Command::new("sh")
            .args(["-c", "kill -TERM \"$0\"", &self.id()])
            .status();
        assert!(kill.expect("a shell").success());
        let status = self.ended().await;
        assert!(told.elapsed() < STOPS_WITHIN, "{:?}", told.elapsed());
        status
    }

    /// Waits until it has ended, and tells how.
    pub(crate) async fn ended(mut self) -> ExitStatus {
        let mut ended = None;
        until("it ends", async || {
            ended = self.child.try_wait().expect("a child");
            ended.is_some()
        })
        .await;
        ended.expect("it has ended")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself; there is nothing to be done about either outcome.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The program in a mount namespace of its own, after such a command of a shell. `None`: this user may make none.
pub(crate) fn in_own_mounts(prepare: &str, program: &Command) -> Option<Command> {
    let allowed = Command::new("unshare")
        .args(["-m", "mount", "--bind", "/tmp", "/tmp"])
        .output();
    if !allowed.is_ok_and(|output| output.status.success()) {
        println!("not tested: mounting takes root and util-linux");
        return None;
    }
    let mut unshared = Command::new("unshare");
    unshared
        .args(["-m", "sh", "-c"])
        .arg(format!("{prepare} && exec \"$0\" \"$@\""))
        .arg(program.get_program())
        .args(program.get_args())
        .stdin(Stdio::null());
    if let Some(directory) = program.get_current_dir() {
        unshared.current_dir(directory);
    }
    Some(unshared)
}
