//! Only one daemon can use a database, by whatever name the database is opened. SQLite's own locks are not lost.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bigchat_sync::journal::{OpenError, Store};
use tempfile::TempDir;

use crate::harness::process::{
    Process, has_posix_lock, in_own_mounts, printed, unreachable as program,
};
use crate::harness::until;

/// A directory with a daemon that has created its database through a dangling symbolic link.
async fn started_by_dangling_link() -> (TempDir, Process) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    std::fs::create_dir(path.join("data")).expect("a directory");
    symlink("data/journal.db", path.join("link.db")).expect("a link");
    let mut daemon = program(path, "run", "link.db");
    daemon.stdout(Stdio::null()).stderr(Stdio::null());
    let daemon = Process::spawn(daemon);
    until("it works", async || {
        let status = program(path, "status", "link.db").output();
        printed(&status.expect("a process")).contains("daemon        running")
    })
    .await;
    (directory, daemon)
}

/// Checks that a second daemon is refused, because the first one uses the database with this name.
fn is_refused(mut second: Command, name: &str) {
    let second = second.output().expect("a process");
    assert_eq!(second.status.code(), Some(1), "{name}");
    let text = printed(&second);
    assert!(
        text.contains("another bigchat-sync is using"),
        "{name}: {text}"
    );
}

#[tokio::test]
async fn second_daemon_by_any_name() {
    let (directory, _daemon) = started_by_dangling_link().await;
    let path = directory.path();
    symlink("link.db", path.join("link to link.db")).expect("a link");
    symlink("data", path.join("other data")).expect("a link");
    std::fs::hard_link(path.join("data/journal.db"), path.join("hard.db")).expect("a link");
    let absolute = path.join("data/journal.db");
    let names = [
        "link.db",
        "link to link.db",
        "data/journal.db",
        "./data/../link.db",
        "other data/journal.db",
        "hard.db",
        absolute.to_str().expect("text"),
    ];
    for name in names {
        for command in ["once", "run"] {
            is_refused(program(path, command, name), name);
        }
    }
}

#[tokio::test]
async fn second_daemon_through_bind_mount() {
    let (directory, _daemon) = started_by_dangling_link().await;
    let path = directory.path();
    std::fs::create_dir(path.join("mounted")).expect("a directory");
    std::fs::write(path.join("mounted.db"), "").expect("a file");
    for (mount, name) in [
        ("mount --bind data mounted", "mounted/journal.db"),
        ("mount --bind data/journal.db mounted.db", "mounted.db"),
        ("mount --bind . /mnt", "/mnt/link.db"),
    ] {
        let Some(second) = in_own_mounts(mount, &program(path, "once", name)) else {
            return;
        };
        is_refused(second, name);
    }
}

/// SQLite names the write-ahead log after the database, so a command that uses another name would create a second log.
#[tokio::test]
async fn command_by_another_database_name() {
    let (directory, _daemon) = started_by_dangling_link().await;
    let path = directory.path();
    std::fs::hard_link(path.join("data/journal.db"), path.join("hard.db")).expect("a link");
    for command in ["status", "failed list", "failed retry --all"] {
        let refused = program(path, command, "hard.db")
            .output()
            .expect("a process");
        let text = printed(&refused);
        assert_eq!(refused.status.code(), Some(1), "{command}");
        assert!(text.contains("by another name"), "{command}: {text}");
        for end in ["-wal", "-shm"] {
            assert!(!path.join(format!("hard.db{end}")).exists(), "{command}");
        }
        let by_link = program(path, command, "link.db")
            .output()
            .expect("a process");
        let text = printed(&by_link);
        assert!(!text.contains("another"), "{command}: {text}");
    }
}

/// Closing any descriptor of a file drops all POSIX locks of the process on that file.
#[test]
fn sqlite_locks_survive_other_opens() {
    let directory = tempfile::tempdir().expect("a directory");
    let db = directory.path().join("a.db");
    let link = directory.path().join("link.db");
    symlink(&db, &link).expect("a link");
    let daemon = Store::open(&db).expect("a database");
    assert!(has_posix_lock(&db));
    type Open = fn(&Path) -> Result<Store, OpenError>;
    let open: [(&str, Open); 3] = [
        ("daemon", Store::open),
        ("command", Store::open_shared),
        ("reader", Store::open_reader),
    ];
    for name in [&db, &link] {
        for (who, open) in open {
            let opened = open(name).map(|store| assert!(store.is_in_use()));
            assert_eq!(opened.is_err(), who == "daemon", "{who}: {opened:?}");
            assert!(has_posix_lock(&db), "{who} by {}", name.display());
        }
    }
    let reader = Store::open_reader(&link).expect("it is there");
    drop(daemon);
    assert!(!reader.is_in_use());
    assert!(has_posix_lock(&db), "the reader's");
    drop(reader);
    assert!(Store::open(&PathBuf::from(&link)).is_ok(), "it is free");
}
