//! A directory in which nothing can be written: `check` and the daemon report why, and commands that only read still
//! work.

use crate::harness::{Test, run_live_test, side_by_side};
use bigchat_sync::simulator::event::message;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::process::Command;

use serde_json::Value;

use crate::harness::process::{
    Process, files, in_own_mounts, printed, through, unreachable as program,
};

/// The user id of an account without rights.
const UNPRIVILEGED: u32 = 65_534;

/// A shell command that makes the directory read-only for one process.
const READ_ONLY: &str = "mount --bind \"$PWD\" \"$PWD\" && mount -o remount,bind,ro \"$PWD\"";

fn run(mut program: Command) -> (bool, String) {
    let output = program.output().expect("a process");
    (output.status.success(), printed(&output))
}

/// Checks that `check` and `once` report the same problem and the same remedy.
fn both_say(program: impl Fn(&str) -> Command, expected: &[&str]) {
    for command in ["check", "once"] {
        let (succeeded, text) = run(program(command));
        assert!(
            !succeeded && !text.contains("will be created at the first start"),
            "{text}"
        );
        assert!(!text.contains(".lock"), "{text}");
        for part in expected {
            assert!(
                text.contains(part),
                "{command} does not say {part:?}: {text}"
            );
        }
    }
}

#[test]
fn directory_that_takes_no_database() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    std::fs::write(path.join("file"), "").expect("a file");
    symlink("missing/a.db", path.join("dangling")).expect("a link");
    symlink("/proc/a.db", path.join("to proc")).expect("a link");
    let before = files(path);
    for (db, expected) in [
        (
            "missing/a.db",
            &["the directory missing does not exist; create it"][..],
        ),
        (
            "missing/too/a.db",
            &["the directory missing/too does not exist"],
        ),
        (
            "dangling",
            &[
                "dangling cannot be opened",
                "the directory missing does not exist",
            ],
        ),
        (
            "file/a.db",
            &["no file can be created in", "Not a directory"],
        ),
        ("/proc/a.db", &["no file can be created in /proc"]),
        ("to proc", &["no file can be created in /proc"]),
        ("/sys/a.db", &["no file can be created in /sys"]),
    ] {
        both_say(|command| program(path, command, db), expected);
    }
    assert_eq!(files(path), before, "nothing is left behind");
}

#[test]
fn check_leaves_no_file() {
    let directory = tempfile::tempdir().expect("a directory");
    symlink("real.db", directory.path().join("link.db")).expect("a link");
    for db in ["a.db", "./b.db", "link.db"] {
        let (_, text) = run(program(directory.path(), "check", db));
        assert!(
            text.contains("will be created at the first start"),
            "{text}"
        );
        assert_eq!(files(directory.path()), ["link.db"]);
    }
}

#[test]
fn directory_on_read_only_system() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    symlink("real.db", path.join("link.db")).expect("a link");
    for db in ["a.db", "./b.db", "link.db"] {
        if in_own_mounts(READ_ONLY, &program(path, "check", db)).is_none() {
            return;
        }
        both_say(
            |command| {
                let program = program(path, command, db);
                in_own_mounts(READ_ONLY, &program).expect("it could be mounted")
            },
            &["Read-only file system", "make the file system writable"],
        );
    }
}

/// The command, run by an account that may not write. `None`: this user cannot switch to the account.
fn unprivileged(mut program: Command) -> Option<Command> {
    let mut probe = Command::new(program.get_program());
    let started = probe
        .arg("--version")
        .uid(UNPRIVILEGED)
        .gid(UNPRIVILEGED)
        .output();
    if !started.is_ok_and(|output| output.status.success()) {
        println!(
            "not tested: only root can run this program as another account, and not from here"
        );
        return None;
    }
    program.uid(UNPRIVILEGED).gid(UNPRIVILEGED);
    Some(program)
}

#[test]
fn account_without_rights() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let open = |mode| std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(path, open(0o755)).expect("a directory of ours");
    run(program(path, "once", "root.db"));
    std::fs::create_dir(path.join("closed")).expect("a directory");
    std::fs::set_permissions(path.join("closed"), open(0o700)).expect("a directory of ours");
    for db in ["new.db", "root.db", "closed/a.db"] {
        if unprivileged(program(path, "check", db)).is_none() {
            return;
        }
        both_say(
            |command| unprivileged(program(path, command, db)).expect("it could be run"),
            &["Permission denied", "use the account of its owner"],
        );
    }
    // A writable file in a read-only directory.
    let owned = path.join("owned.db");
    run(program(path, "once", "owned.db"));
    std::os::unix::fs::chown(&owned, Some(UNPRIVILEGED), Some(UNPRIVILEGED)).expect("root");
    let expected = ["no file can be created in", "Permission denied"];
    both_say(
        |command| unprivileged(program(path, command, "owned.db")).expect("it could be run"),
        &expected,
    );
    let reads = unprivileged(program(path, "failed list", "owned.db")).expect("it could be run");
    let (succeeded, text) = run(reads);
    assert!(succeeded && text.contains("no event has failed"), "{text}");
}

/// Creates a database with a failed event, by a daemon that is then killed or stopped.
async fn with_a_failed_event(t: &Test, killed: bool) {
    let now = t.now();
    t.bigchat.open(10, now - 100, 1);
    let events = ["hello", "k"].map(|text| message(10, now - 5, text));
    t.bigchat.reports(events);
    let daemon = Process::start(t);
    t.until_events("failed", 1).await;
    t.until_events("delivered", 1).await;
    match killed {
        true => drop(daemon),
        false => assert!(daemon.stop().await.success()),
    }
    std::fs::remove_file(t.log()).expect("a log");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reading_on_read_only_system() {
    side_by_side([false, true], async |killed| {
        run_live_test(async |t| {
            with_a_failed_event(t, killed).await;
            let before = files(t.directory());
            let read_only = |command: &str| {
                let program = program(t.directory(), command, "journal.db");
                in_own_mounts(READ_ONLY, &program).map(run)
            };
            let Some((_, status)) = read_only("status --json") else {
                return;
            };
            let status: Value = serde_json::from_str(&status).expect(&status);
            assert_eq!(status["failed"], 1);
            assert_eq!(status["daemon_runs"], false);
            for command in ["failed list", "failed show 2"] {
                let (succeeded, text) = read_only(command).expect("it could be mounted");
                assert!(succeeded && text.contains("10"), "{command}: {text}");
            }
            for command in ["failed retry --all", "failed discard 2", "once"] {
                let (succeeded, text) = read_only(command).expect("it could be mounted");
                assert!(
                    !succeeded && text.contains("Read-only file system"),
                    "{text}"
                );
            }
            assert_eq!(files(t.directory()), before);
            assert_eq!(t.events("failed"), 1);
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reading_while_daemon_writes_elsewhere() {
    run_live_test(async |t| {
        with_a_failed_event(t, false).await;
        let daemon = Process::start(t);
        let events = vec![message(10, t.now() - 1, "and on")];
        t.bigchat.reports(events);
        t.until_events("delivered", 2).await;
        for command in ["status", "failed list", "failed show 2"] {
            let program = program(t.directory(), command, "journal.db");
            let Some(program) = in_own_mounts(READ_ONLY, &program) else {
                return;
            };
            let (_, text) = run(program);
            let expected = match command {
                "status" => "daemon        running",
                _ => "10",
            };
            assert!(text.contains(expected), "{command}: {text}");
        }
        assert!(daemon.stop().await.success());
    })
    .await;
}

/// Without the `-shm` file, SQLite cannot read the log, and without the log, the latest changes would be missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn write_ahead_log_without_shm() {
    run_live_test(async |t| {
        with_a_failed_event(t, true).await;
        std::fs::remove_file(t.directory().join("journal.db-shm")).expect("a file");
        for command in ["status", "failed list", "failed show 2"] {
            let program = program(t.directory(), command, "journal.db");
            let Some(program) = in_own_mounts(READ_ONLY, &program) else {
                return;
            };
            let (succeeded, text) = run(program);
            assert!(
                !succeeded && text.contains("only with a -shm file"),
                "{text}"
            );
        }
        assert_eq!(t.events("failed"), 1);
    })
    .await;
}

/// Opening a pipe would hang, and the mode of a device must not change.
#[test]
fn database_is_no_regular_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let made = Command::new("mkfifo").arg(path.join("pipe")).status();
    assert!(made.expect("mkfifo, of coreutils").success());
    std::os::unix::net::UnixListener::bind(path.join("socket")).expect("a socket");
    std::fs::create_dir(path.join("directory")).expect("a directory");
    for db in ["pipe", "socket", "directory", "/dev/zero"] {
        for command in ["once", "status", "check"] {
            let (succeeded, text) = run(through(&["timeout", "10"], &program(path, command, db)));
            assert!(
                !succeeded && text.contains("is not a bigchat-sync database"),
                "{command} {db}: {text}"
            );
        }
    }
    assert_eq!(files(path), ["directory", "pipe", "socket"]);
}
