//! Only the daemon's account can read customers' messages and tokens.

use crate::harness::process::{Process, in_shell, printed};
use crate::harness::{Bench, run_live_test, side_by_side, until};
use std::fs::{Permissions, metadata, set_permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// The database and SQLite's files beside it while the daemon runs.
const FILES: [&str; 3] = ["journal.db", "journal.db-shm", "journal.db-wal"];

fn mode(path: &Path) -> u32 {
    metadata(path).expect("a file").permissions().mode() & 0o777
}

fn chmod(path: &Path, mode: u32) {
    set_permissions(path, Permissions::from_mode(mode)).expect("a file of ours");
}

/// The modes of all files of a database.
fn modes(t: &Bench) -> Vec<(String, u32)> {
    let entries = std::fs::read_dir(t.directory()).expect("a directory");
    let mut modes: Vec<_> = entries
        .map(|entry| entry.expect("a file"))
        .map(|entry| (entry.file_name().into_string().expect("text"), entry.path()))
        .filter(|(name, _)| name.starts_with("journal.db"))
        .map(|(name, path)| (name, mode(&path)))
        .collect();
    modes.sort();
    modes
}

fn private() -> Vec<(String, u32)> {
    FILES.map(|name| (name.to_owned(), 0o600)).into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn database_private_under_any_umask() {
    side_by_side(["022", "000", "077", "0777"], async |umask| {
        run_live_test(async |t| {
            // The log is not the daemon's file.
            std::fs::write(t.log(), "").expect("a log");
            let shell = in_shell(&format!("umask {umask}"), &t.program("run"));
            let daemon = Process::start_as(t, shell);
            t.until_polled().await;
            assert_eq!(modes(t), private(), "umask {umask}");
            assert!(daemon.stop().await.success());
            assert_eq!(mode(&t.db()), 0o600, "umask {umask}");
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn existing_database_is_made_private() {
    side_by_side([0o644, 0o666, 0o640], async |open| {
        run_live_test(async |t| {
            let killed = Process::start(t);
            t.until_polled().await;
            drop(killed);
            for name in FILES {
                chmod(&t.directory().join(name), open);
            }
            let daemon = Process::start(t);
            until("they are private", async || modes(t) == private()).await;
            assert!(daemon.stop().await.success());
        })
        .await;
    })
    .await;
}

#[test]
fn foreign_file_keeps_its_mode() {
    let t = Bench::unreachable();
    for (content, mode_before) in [
        ("Dear diary", 0o644),
        ("SQLite format 3\0", 0o664),
        ("x", 0o755),
    ] {
        std::fs::write(t.db(), content).expect("a file");
        chmod(&t.db(), mode_before);
        let refused = t.program("once").output().expect("a process");
        assert_eq!(refused.status.code(), Some(1));
        assert_eq!(mode(&t.db()), mode_before, "{content:?}");
    }
}

#[test]
fn exposed_token_file_gets_warning() {
    let t = Bench::unreachable();
    let file = t.directory().join("token");
    std::fs::write(&file, "0123456789abcdef").expect("a file");
    let run = |command: &str, variable: &str| {
        let mut program = t.program(command);
        printed(&program.env(variable, &file).output().expect("a process"))
    };
    for (open, warns) in [
        (0o644, true),
        (0o604, true),
        (0o602, true),
        (0o600, false),
        (0o640, false),
    ] {
        chmod(&file, open);
        for variable in ["BIGCHAT", "OUR_API", "CONSOLE"] {
            let variable = format!("BIGCHAT_SYNC_{variable}_TOKEN_FILE");
            for command in ["once", "check"] {
                let text = run(command, &variable);
                let warned = text
                    .lines()
                    .any(|line| line.contains("chmod 600") || line.contains("have access to"));
                assert_eq!(warned, warns, "{open:o} {variable} {command}: {text}");
            }
        }
    }
}

/// The README's command that copies a database.
fn backup() -> String {
    let readme = include_str!("../../../README.md");
    let blocks = readme.split("```").skip(1).step_by(2);
    let vacuum = blocks.filter(|block| block.contains("VACUUM INTO"));
    let vacuum: Vec<&str> = vacuum
        .map(|block| block.trim_start_matches("sh\n"))
        .collect();
    assert_eq!(vacuum.len(), 1);
    vacuum[0].to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documented_backup_is_private() {
    if Command::new("sqlite3").arg("-version").output().is_err() {
        println!("not tested: there is no sqlite3 on this machine");
        return;
    }
    run_live_test(async |t| {
        t.once().await;
        let directory = t.directory().display().to_string();
        let db = t.db().display().to_string();
        let script = backup()
            .replace("/var/lib/bigchat-sync/bigchat-sync.db", &db)
            .replace("/backup", &directory);
        let copied = Command::new("sh")
            .args(["-c", &format!("umask 022\n{script}")])
            .status();
        assert!(copied.expect("a shell").success(), "{script}");
        let copy = t.directory().join("bigchat-sync.db");
        assert_eq!(mode(&copy), 0o600, "{script}");
    })
    .await;
}
