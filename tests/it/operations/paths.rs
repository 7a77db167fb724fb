//! Any path works, repeatedly, and is recognizable where it is printed.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::process::Output;

use serde_json::Value;

use crate::harness::process::{files, printed, program, unreachable};

/// Names that some layer above SQLite could misinterpret.
const NAMES: [&[u8]; 18] = [
    b"plain.db",
    b"a%20b.db",
    b"100%.db",
    b"%00.db",
    b"back\\slash.db",
    b"new\nline.db",
    b"\xff\xfe.db",
    b"\xc3\xbcber \xf0\x9f\x98\x80.db",
    b"question?mode=memory",
    b"hash#fragment",
    b"file:a.db",
    b"file:a.db?mode=memory&cache=shared",
    b":memory:",
    b"   ",
    b"-dash",
    b"quotes'\".db",
    b"\x1b[31mred",
    b"$HOME;&|*",
];

fn run(directory: &Path, command: &str, db: &OsStr) -> Output {
    let mut program = unreachable(directory, command, db);
    program.output().expect("a process")
}

/// Checks that a database with this name can be created, used and checked repeatedly.
fn works_again_and_again(name: &OsStr) {
    for is_absolute in [false, true] {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path();
        let db = match is_absolute {
            true => path.join(name).into_os_string(),
            false => name.to_owned(),
        };
        for sessions in 1..=3 {
            let once = run(path, "once", &db);
            let text = String::from_utf8_lossy(&once.stderr);
            assert!(text.contains("BigChat was not read"), "{name:?}: {text}");
            assert_eq!(files(path), [name], "{text}");
            // No command shows the number of sessions.
            let connection = rusqlite::Connection::open(path.join(name)).expect("a database");
            let counted: i64 = connection
                .query_row("SELECT session FROM control", [], |row| row.get(0))
                .expect("a count");
            assert_eq!(counted, sessions, "{name:?} is one database");
        }
        let status = run(path, "status --json", &db);
        let status: Value = serde_json::from_slice(&status.stdout).expect("JSON");
        assert_eq!(status["database"]["path"], db.to_string_lossy().as_ref());
        let listed = run(path, "failed list", &db);
        assert!(listed.status.success(), "{name:?}: {listed:?}");
        let check = run(path, "check", &db);
        let text = String::from_utf8_lossy(&check.stdout);
        assert!(text.contains("is writable"), "{name:?}: {text}");
    }
}

#[test]
fn database_of_any_file_name() {
    std::thread::scope(|scope| {
        for name in NAMES {
            scope.spawn(move || works_again_and_again(OsStr::from_bytes(name)));
        }
    });
}

/// An odd path is printed on one line, escaped.
#[test]
fn odd_path_printed_escaped() {
    for (name, shown) in [
        (&b"no\nsuch.db"[..], r#""no\nsuch.db""#),
        (b"\x1b[31mred.db", r#""\u{1b}[31mred.db""#),
        (b"\xffno.db", r#""\xFFno.db""#),
        (b"   ", r#""   ""#),
        (b"back\\slash.db", r#""back\\slash.db""#),
        (b"plain.db", "plain.db"),
    ] {
        let name = OsStr::from_bytes(name);
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path();
        for (command, made) in [
            ("status", false),
            ("once", true),
            ("status", true),
            ("check", true),
        ] {
            let output = run(path, command, name);
            let text = match made {
                false => output.stderr,
                true => [output.stdout, output.stderr].concat(),
            };
            let text = String::from_utf8(text).expect("UTF-8");
            // The path may be shown with its directory. In the log, it is a JSON string.
            let shown = shown.trim_start_matches('"');
            let in_json = serde_json::to_string(shown).expect("JSON");
            assert!(
                text.contains(shown) || text.contains(in_json.trim_matches('"')),
                "{command} {name:?}: {text}"
            );
            let is_plain = |c: char| c == '\n' || !c.is_control();
            assert!(text.chars().all(is_plain), "{command} {name:?}: {text:?}");
            assert!(made || text.trim_end().lines().count() == 1, "{text}");
        }
    }
}

#[test]
fn directory_of_any_name() {
    for name in [&b"a b%20"[..], b"\xff", b"new\nline", b"file:", b"?#"] {
        let directory = tempfile::tempdir().expect("a directory");
        let below = directory.path().join(OsStr::from_bytes(name));
        std::fs::create_dir(&below).expect("a directory");
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(below.join("a.db"), &link).expect("a link");
        for db in [&link, &below.join("a.db"), &link] {
            let once = run(directory.path(), "once", db.as_os_str());
            let text = String::from_utf8_lossy(&once.stderr);
            assert!(text.contains("BigChat was not read"), "{name:?}: {text}");
        }
        assert_eq!(files(&below), ["a.db"]);
    }
}

#[test]
fn path_too_long_for_sqlite() {
    let directory = tempfile::tempdir().expect("a directory");
    let long = directory.path().join("d".repeat(200)).join("e".repeat(200));
    std::fs::create_dir_all(&long).expect("directories");
    for length in [120, 200, 251] {
        let db = long.join("f".repeat(length));
        for command in ["once", "check"] {
            let output = run(directory.path(), command, db.as_os_str());
            let text = printed(&output);
            assert!(text.contains("SQLite accepts paths of up to"), "{text}");
        }
        assert!(files(&long).is_empty());
    }
}

#[test]
fn bad_setting_beside_odd_path() {
    for name in [&b"\xff.db"[..], b"\xc3\x28", b"a\nb"] {
        let mut flag = OsString::from("--db=");
        flag.push(OsString::from_vec(name.to_vec()));
        let output = program()
            .args(["once".into(), flag])
            .env("BIGCHAT_SYNC_POLL_INTERVAL", "soon")
            .output()
            .expect("a process");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains("BIGCHAT_SYNC_POLL_INTERVAL"), "{text}");
    }
}

/// The unit's database is in the state directory. A path set for other commands is ignored.
#[test]
fn unit_ignores_database_in_environment() {
    for db in [&b"/srv/a.db"[..], b"\xff.db", b"a\nb"] {
        let unit = program()
            .arg("unit")
            .env("BIGCHAT_SYNC_DB", OsStr::from_bytes(db))
            .output()
            .expect("a process");
        let unit = String::from_utf8(unit.stdout).expect("UTF-8");
        assert!(unit.contains(" run\n"), "{unit}");
    }
}
