//! The program as a separate process, for tests of its memory, its exit codes and the limits of the operating system.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, open};
pub(crate) use rustix::process::Signal;
use rustix::process::{Pid, kill_process};
use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};

use crate::harness::{Bench, until};

/// The time limit for a stop.
pub(crate) const STOPS_WITHIN: Duration = Duration::from_secs(10);

/// The program.
pub(crate) fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_bigchat-sync"))
}

/// The program in a directory, with services that cannot be reached.
pub(crate) fn unreachable(directory: &Path, command: &str, db: impl AsRef<OsStr>) -> Command {
    let mut flag = OsString::from("--db=");
    flag.push(db);
    let mut program = program();
    program
        .current_dir(directory)
        .args(command.split(' '))
        .arg(flag)
        .args(["--listen", "off"])
        .args(["--bigchat-url", "http://127.0.0.1:1"])
        .args(["--our-api-url", "http://127.0.0.1:2"])
        .stdin(Stdio::null());
    program
}

/// A command run by a wrapper, which receives it as arguments.
pub(crate) fn through(wrapper: &[&str], command: &Command) -> Command {
    let mut wrapped = Command::new(wrapper[0]);
    wrapped
        .args(&wrapper[1..])
        .arg(command.get_program())
        .args(command.get_args())
        .stdin(Stdio::null());
    if let Some(directory) = command.get_current_dir() {
        wrapped.current_dir(directory);
    }
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(name, value),
            None => wrapped.env_remove(name),
        };
    }
    wrapped
}

/// A shell that runs `prepare` and then executes the command.
pub(crate) fn in_shell(prepare: &str, command: &Command) -> Command {
    let script = format!("{prepare} && exec \"$0\" \"$@\"");
    through(&["sh", "-c", &script], command)
}

/// A command that runs in a new mount namespace, after `prepare`. `None`: this user may not create a namespace.
pub(crate) fn in_own_mounts(prepare: &str, command: &Command) -> Option<Command> {
    let allowed = Command::new("unshare")
        .args(["-m", "mount", "--bind", "/tmp", "/tmp"])
        .output();
    if !allowed.is_ok_and(|output| output.status.success()) {
        println!("not tested: mounting takes root and util-linux");
        return None;
    }
    Some(through(&["unshare", "-m"], &in_shell(prepare, command)))
}

/// A program's standard output, followed by its standard error.
pub(crate) fn printed(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

/// Runs a command to its end, off the async threads.
pub(crate) async fn finished(mut command: Command) -> Output {
    let output = tokio::task::spawn_blocking(move || command.output());
    output.await.expect("no panic").expect("a process")
}

/// Runs a command with this standard input. `None`: the program does not exist.
pub(crate) fn fed(command: &mut Command, input: &str) -> Option<Output> {
    let child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.ok()?;
    let mut stdin = child.stdin.take().expect("a pipe");
    let input = input.to_owned();
    // A command that needs no input may end before all of it is written.
    let writing = std::thread::spawn(move || stdin.write_all(input.as_bytes()).ok());
    let output = child.wait_with_output().expect("it ends");
    writing.join().expect("no panic");
    Some(output)
}

/// An address on which nothing listens.
pub(crate) fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("its address").to_string()
}

/// A pseudo-terminal: the end for the test, and the end for the program.
pub(crate) fn terminal() -> (File, File) {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC);
    let master = master.expect("a terminal");
    unlockpt(&master).expect("a terminal");
    let name = ptsname(&master, Vec::new()).expect("a name");
    // The terminal must not become the controlling terminal of the test.
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let slave = open(name, flags, Mode::empty()).expect("a terminal");
    (File::from(master), File::from(slave))
}

/// The names of the files in a directory, sorted.
pub(crate) fn files(directory: &Path) -> Vec<OsString> {
    let entries = std::fs::read_dir(directory).expect("a directory");
    let mut files: Vec<_> = entries
        .map(|entry| entry.expect("a file").file_name())
        .collect();
    files.sort();
    files
}

/// Whether this process has SQLite's lock on a database, which shows other processes that it is open.
pub(crate) fn has_posix_lock(db: &Path) -> bool {
    let inode = format!(":{} ", std::fs::metadata(db).expect("a file").ino());
    let process = format!(" {} ", std::process::id());
    let locks = std::fs::read_to_string("/proc/locks").expect("the locks");
    locks
        .lines()
        .any(|line| line.contains("POSIX") && line.contains(&inode) && line.contains(&process))
}

/// A process that is killed when dropped, so that it does not outlive its test. A daemon left behind would send
/// requests to ports that other tests use by then.
pub(crate) struct Process {
    child: Child,
    /// The log of its [`Bench`]; `None`: the process does not log there.
    log: Option<PathBuf>,
}

impl Process {
    /// Starts a daemon.
    pub(crate) fn start(bench: &Bench) -> Self {
        Self::start_as(bench, bench.program("run"))
    }

    /// Starts a command that logs to the log of the bench.
    pub(crate) fn start_as(bench: &Bench, mut command: Command) -> Self {
        let log = bench.log();
        let stderr = File::options().create(true).append(true).open(&log);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr.expect("a log"));
        let mut process = Self::spawn(command);
        process.log = Some(log);
        process
    }

    /// Starts a command without redirecting its output to a log.
    pub(crate) fn spawn(mut command: Command) -> Self {
        let child = command.spawn();
        let name = command.get_program().display();
        let child = child.unwrap_or_else(|error| panic!("{name}: {error}"));
        Self { child, log: None }
    }

    /// Takes its standard output, which must be a pipe.
    pub(crate) fn stdout(&mut self) -> ChildStdout {
        self.child.stdout.take().expect("a pipe")
    }

    /// Its log so far, including the logs of earlier processes on the same bench.
    pub(crate) fn log(&self) -> String {
        let log = self.log.as_ref().expect("a process with a log");
        let bytes = std::fs::read(log).expect("a log");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// How many lines of its log contain `part`.
    pub(crate) fn lines_with(&self, part: &str) -> usize {
        let log = self.log();
        log.lines().filter(|line| line.contains(part)).count()
    }

    /// Waits until a line of its log contains `part`.
    pub(crate) async fn until_logged(&self, part: &str) {
        until(&format!("a line with {part:?}"), async || {
            self.lines_with(part) > 0
        })
        .await;
    }

    /// Waits until exactly this many lines of its log contain `part`.
    pub(crate) async fn until_logged_times(&self, part: &str, lines: usize) {
        until(&format!("{lines} lines with {part:?}"), async || {
            self.lines_with(part) == lines
        })
        .await;
    }

    /// Its id.
    pub(crate) fn id(&self) -> String {
        self.child.id().to_string()
    }

    /// A field of `/proc/…/status` in MiB: `VmHWM` is its peak memory, and `VmRSS` its current memory.
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

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
    }

    /// Whether it has not ended yet.
    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_none()
    }

    /// Stops it by SIGTERM, and returns how it ended.
    pub(crate) async fn stop(self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.ends_within(STOPS_WITHIN).await
    }

    /// Waits until it has ended, and returns how.
    pub(crate) async fn ended(mut self) -> ExitStatus {
        until("it ends", async || !self.is_running()).await;
        self.child.wait().expect("it has ended")
    }

    /// The same, but fails if that takes `limit` or longer.
    pub(crate) async fn ends_within(self, limit: Duration) -> ExitStatus {
        let since = Instant::now();
        let status = self.ended().await;
        let took = since.elapsed();
        assert!(took < limit, "the process took {took:?} to end");
        status
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // An error means that it has already ended.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
