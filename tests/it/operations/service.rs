//! The program as a service: notifications to systemd, the unit, completions and the manual page.

use super::commands::stdout_of;
use crate::harness::process::{self, Process, fed};
use crate::harness::{Bench, run_live_test, until};
use bigchat_sync::simulator::fault::status;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

/// A service manager's socket, and the notifications received there.
struct SystemdNotifier {
    socket: UnixDatagram,
    directory: TempDir,
    received: Vec<String>,
}

impl SystemdNotifier {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = UnixDatagram::bind(directory.path().join("notify")).expect("a socket");
        socket.set_nonblocking(true).expect("a socket");
        Self {
            socket,
            directory,
            received: Vec::new(),
        }
    }

    /// Starts the daemon as systemd would.
    fn start(&self, t: &Bench, watchdog: Option<Duration>) -> Process {
        let mut program = t.program("run");
        program
            .env("NOTIFY_SOCKET", self.directory.path().join("notify"))
            .env_remove("WATCHDOG_PID");
        match watchdog {
            Some(watchdog) => program.env("WATCHDOG_USEC", watchdog.as_micros().to_string()),
            None => program.env_remove("WATCHDOG_USEC"),
        };
        Process::start_as(t, program)
    }

    fn listen(&mut self) -> &[String] {
        let mut datagram = [0; 4096];
        while let Ok(length) = self.socket.recv(&mut datagram) {
            let text = std::str::from_utf8(&datagram[..length]).expect("text");
            self.received.extend(text.lines().map(str::to_owned));
        }
        &self.received
    }

    fn count(&mut self, what: &str) -> usize {
        let received = self.listen().iter();
        received
            .filter(|received| received.starts_with(what))
            .count()
    }
}

/// systemd is notified when the daemon is ready, how it is doing, that it is alive, and when it stops.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn systemd_is_notified_of_state() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        let mut manager = SystemdNotifier::new();
        let daemon = manager.start(t, Some(Duration::from_millis(100)));
        until("it is ready", async || manager.count("READY=1") == 1).await;
        assert!(t.is_ready(), "not before the session has begun");
        until("it is alive", async || manager.count("WATCHDOG=1") > 3).await;
        until("the status is sent", async || {
            manager.count("STATUS=BigChat is up, OurAPI is not asked yet; ") > 0
        })
        .await;
        assert_eq!(manager.count("STOPPING=1"), 0);
        assert!(daemon.stop().await.success());
        assert_eq!(manager.count("STOPPING=1"), 1);
        assert_eq!(manager.count("READY=1"), 1);
    })
    .await;
}

/// While the database is locked, the start is extended, and not reported as complete.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn systemd_start_with_locked_database() {
    run_live_test(async |t| {
        t.once().await;
        let other = t.lock_database();
        let mut manager = SystemdNotifier::new();
        let daemon = manager.start(t, None);
        daemon
            .until_logged_times("the database cannot be used yet", 1)
            .await;
        assert!(manager.count("EXTEND_TIMEOUT_USEC=") > 0);
        assert_eq!(manager.count("READY=1"), 0);
        drop(other);
        until("it is ready", async || manager.count("READY=1") == 1).await;
        assert!(daemon.stop().await.success());
        assert_eq!(manager.count("WATCHDOG=1"), 0, "no watchdog was requested");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn systemd_credentials_are_used() {
    run_live_test(async |t| {
        let credentials = tempfile::tempdir().expect("a directory");
        let token = |name: &str, text: &str| {
            std::fs::write(credentials.path().join(name), text).expect("a file");
        };
        // An empty token is an error, which shows that the file was read.
        token("bigchat-sync.our-api-token", "");
        let once = |variable: Option<&str>| {
            let mut once = t.program("once");
            once.env("CREDENTIALS_DIRECTORY", credentials.path())
                .env_remove("BIGCHAT_SYNC_OUR_API_TOKEN_FILE")
                .env_remove("BIGCHAT_SYNC_OUR_API_TOKEN");
            if let Some(token) = variable {
                once.env("BIGCHAT_SYNC_OUR_API_TOKEN", token);
            }
            once.output().expect("a process")
        };
        let refused = once(None);
        assert_eq!(refused.status.code(), Some(2));
        assert!(text(&refused.stderr).contains("BIGCHAT_SYNC_OUR_API_TOKEN_FILE"));
        assert!(
            once(Some("t0ken")).status.success(),
            "a variable takes precedence"
        );
        token("bigchat-sync.our-api-token", "t0ken\n");
        assert!(once(None).status.success());
    })
    .await;
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn unit_has_the_settings_given() {
    let unit = stdout_of(&[
        "unit",
        "--our-api-url=https://our-api.example/a%20b",
        "--external-id-prefix",
        "a'$\"",
    ]);
    let line = unit.lines().find(|line| line.starts_with("ExecStart="));
    assert_eq!(
        line.expect("a command"),
        format!(
            "ExecStart={} run --our-api-url=https://our-api.example/a%%20b \"--external-id-prefix=a'$$\\\"\"",
            process::program().get_program().display()
        )
    );
    // The service has another working directory.
    let unit = stdout_of(&["unit", "--our-api-lock", "our-api.lock"]);
    let lock = std::path::absolute("our-api.lock").expect("a path");
    let flag = format!("--our-api-lock={}\n", lock.display());
    assert!(unit.contains(&flag), "{unit}");
    let mut refused = process::program();
    refused.args(["unit", "--db", "elsewhere.db"]);
    let refused = refused.output().expect("a process");
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused.stderr).contains("--db would have no effect"));
}

/// systemd accepts the unit, and rates its confinement as good.
#[test]
#[ignore = "needs systemd"]
fn systemd_accepts_the_unit() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("bigchat-sync.service");
    let unit = stdout_of(&["unit", "--external-id-prefix=50%", "--max-window=30m"]);
    std::fs::write(&path, unit).expect("a file");
    let analyze = |arguments: &[&str]| {
        let analyzed = Command::new("systemd-analyze")
            .args(arguments)
            .arg(&path)
            .output();
        let analyzed = analyzed.expect("systemd-analyze, of Debian's systemd");
        let text = process::printed(&analyzed);
        assert!(analyzed.status.success(), "{text}");
        text
    };
    assert_eq!(analyze(&["verify"]), "", "not even a warning");
    // The exposure is at most 1.5 of 10. Most services are above 9.
    analyze(&["security", "--offline=true", "--threshold=15"]);
}

#[test]
fn completions_for_every_shell() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = stdout_of(&["completions", shell]);
        for known in ["verify", "discard", "our-api-url", "repair"] {
            assert!(script.contains(known), "{shell} does not know {known}");
        }
        // The shells that are installed must accept it.
        if let "bash" | "fish" | "zsh" = shell
            && let Some(read) = fed(Command::new(shell).arg("-n"), &script)
        {
            assert!(read.status.success(), "{shell}: {}", text(&read.stderr));
        }
    }
    let script = stdout_of(&["completions", "bash"]);
    let ask = "COMP_WORDS=(bigchat-sync failed re); COMP_CWORD=2
        _bigchat__sync bigchat-sync re failed; echo \"${COMPREPLY[@]}\"";
    let completed = fed(&mut Command::new("bash"), &format!("{script}\n{ask}\n"));
    let completed = completed.expect("bash");
    assert_eq!(
        text(&completed.stdout),
        "retry\n",
        "{}",
        text(&completed.stderr)
    );
}

#[test]
fn manual_has_commands_and_settings() {
    let page = stdout_of(&["man"]);
    let help = stdout_of(&["--help"]);
    let flags = help
        .split_whitespace()
        .filter(|word| word.starts_with("--"));
    let flags: Vec<&str> = flags.filter(|word| word.len() > 2).collect();
    assert!(flags.len() > 15, "{flags:?}");
    for flag in flags {
        let flag = flag.trim_end_matches(|c: char| !c.is_ascii_lowercase());
        let written = flag.replace('-', "\\-");
        assert!(page.contains(&written), "{flag}");
    }
    for command in [
        "once",
        "status",
        "failed retry",
        "failed discard",
        "verify",
        "unit",
        "man",
    ] {
        assert!(
            page.contains(&format!(".SS \"{command}")) || page.contains(&format!(".SS {command}")),
            "{command}"
        );
    }
    // As `man` shows it, if it is installed.
    let mut groff = Command::new("groff");
    groff.args(["-man", "-Tascii", "-P-cbu", "-ww"]);
    let Some(rendered) = fed(&mut groff, &page) else {
        return;
    };
    assert_eq!(text(&rendered.stderr), "", "it is well formed");
    let rendered = text(&rendered.stdout);
    for section in [
        "NAME",
        "SYNOPSIS",
        "COMMANDS",
        "OPTIONS",
        "EXIT STATUS",
        "FILES",
    ] {
        assert!(
            rendered.lines().any(|line| line.contains(section)),
            "{section}: {rendered}"
        );
    }
}

/// Each line for systemd's journal begins with its priority.
#[tokio::test]
async fn journal_lines_have_priorities() {
    run_live_test(async |t| {
        let once = |format: &str, stream: Option<&str>| {
            let path = t.directory().join("stderr");
            let stderr = File::create(&path).expect("a file");
            let metadata = stderr.metadata().expect("a file");
            let this = format!("{}:{}", metadata.dev(), metadata.ino());
            let mut once = t.program("once");
            once.env("JOURNAL_STREAM", stream.unwrap_or(&this))
                .env("RUST_LOG", "bigchat_sync=debug")
                .args(["--log-format", format])
                .stderr(stderr);
            once.status().expect("a process");
            std::fs::read_to_string(path).expect("a log")
        };
        // A failed poll is a detail, but the reason why the program failed is an error.
        t.bigchat.outage(Some(status(401)));
        let log = once("text", None);
        let mut lines: Vec<&str> = log.lines().collect();
        let last = lines.pop().expect("a line");
        assert!(last.starts_with("<3>bigchat-sync: "), "{log}");
        for (priority, level) in [("<7>", " DEBUG "), ("<6>", " INFO ")] {
            let (of_level, others): (Vec<&str>, Vec<&str>) =
                lines.iter().partition(|line| line.contains(level));
            assert!(!of_level.is_empty(), "{level}: {log}");
            assert!(of_level.iter().all(|line| line.starts_with(priority)));
            assert!(!others.iter().any(|line| line.starts_with(priority)));
        }
        for (format, stream) in [("json", None), ("text", Some("1:1"))] {
            let log = once(format, stream);
            assert!(!log.is_empty() && !log.contains('<'), "{format}: {log}");
        }
    })
    .await;
}
