//! The README and the manual: every command in them runs, and everything that they name exists.
//!
//! A shell runs each fenced `sh` or `console` block in a scratch directory, between the simulated services, with a
//! database in which conversation 42 was delivered and events 17 to 20 have failed. The shell finds stand-ins for
//! programs that need root, systemd or a build ([`NOT_RUN`]), and one for this program, which limits long runs. The
//! arguments of all calls of this program must also be valid.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bigchat_sync::cli::Cli;
use bigchat_sync::cli::manual::Chapter;
use bigchat_sync::simulator::event::{message, start};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, ValueEnum};

use super::commands::stdout_of;
use crate::harness::journal::dead_letter;
use crate::harness::process;
use crate::harness::web::{TOKEN, client, console_token, sent};
use crate::harness::{Test, run_live_test, until};

/// Programs that the documents name and the test does not run.
const NOT_RUN: [&str; 3] = [
    // They need systemd.
    "systemctl",
    "journalctl",
    // It needs a replica.
    "litestream",
];

/// Replaces `cargo`, because the program is already built, and running the tests in a test would never end.
const CARGO: &str = r#"case "$1" in
    build | test | bench) exit 0 ;;
    run) while [ "$1" != -- ]; do shift; done; shift; exec bigchat-sync "$@" ;;
esac
exit 64"#;

/// Replaces the program. Records the arguments, stops a daemon once it is running, and shortens a demo.
const BOUNDED: &str = r#"{ for argument; do printf '%s\037' "$argument"; done; echo; } >> "$RECORD"
case "$1" in
run)
    "$PROGRAM" "$@" 2> "$HOME/log" & daemon=$!
    until grep -q 'is running' "$HOME/log"; do kill -0 $daemon || exit 70; sleep 0.02; done
    kill -TERM $daemon
    wait $daemon ;;
status)
    # Exit code 1 is right: no daemon is running.
    "$PROGRAM" "$@" > "$HOME/status" || [ -s "$HOME/status" ] ;;
demo)
    case "$*" in
    *--serve*) exit 0 ;; # Its ports are fixed.
    *--seed*) ;;
    *) set -- "$@" --seed 1 ;;
    esac
    left=$#
    while [ $left -gt 0 ]; do
        case "$1" in
        --duration) shift; left=$((left - 1)) ;;
        *) set -- "$@" "$1" ;;
        esac
        shift; left=$((left - 1))
    done
    "$PROGRAM" "$@" --duration 3s > "$HOME/demo" && exit
    # The events that it makes fail are left to the operator, and count as a difference.
    case "$*" in *--faults*) grep -q ' can never be stored' "$HOME/demo" && exit ;; esac
    cat "$HOME/demo"; exit 71 ;;
*) exec "$PROGRAM" "$@" ;;
esac"#;

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The README and the chapters of the manual.
fn documents() -> Vec<PathBuf> {
    let manual = fs::read_dir(repository().join("src/cli/manual")).expect("the manual");
    let paths = manual.map(|entry| entry.expect("a file").path());
    let mut documents: Vec<PathBuf> = paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .chain([repository().join("README.md")])
        .collect();
    documents.sort();
    documents
}

fn read(document: &Path) -> String {
    fs::read_to_string(document).expect("a document")
}

fn readme() -> String {
    read(&repository().join("README.md"))
}

/// A script in a document.
struct Script {
    place: String,
    text: String,
}

/// The scripts of a document: its blocks, without the output that a `console` block shows.
fn scripts(document: &Path) -> Vec<Script> {
    let (mut scripts, mut block) = (Vec::new(), None);
    for (number, line) in read(document).lines().enumerate() {
        match (&mut block, line.strip_prefix("```")) {
            (None, Some(language)) => {
                let place = format!("{}:{}", document.display(), number + 1);
                let text = String::new();
                block = Some((language.to_owned(), Script { place, text }));
            }
            (Some(_), Some(_)) => match block.take() {
                Some((language, script)) if ["sh", "console"].contains(&&*language) => {
                    scripts.push(script);
                }
                _ => {}
            },
            (Some((language, script)), None) => {
                let line = match &**language {
                    "console" => line.strip_prefix("$ "),
                    _ => Some(line),
                };
                script.text.extend(line.map(|line| format!("{line}\n")));
            }
            (None, None) => {}
        }
    }
    scripts
}

/// The demo's forms, from the table in the README.
fn demo_forms() -> Vec<Script> {
    let readme = readme();
    let rows = readme
        .lines()
        .skip_while(|line| !line.starts_with("| `cargo run --release -- demo"));
    let rows = rows.skip(2).take_while(|line| line.starts_with('|'));
    let forms = rows.map(|row| {
        let flags = row.split('`').nth(1).unwrap_or_default();
        let text = format!("bigchat-sync demo {flags}\n");
        Script {
            place: format!("README.md: {row}"),
            text,
        }
    });
    forms.collect()
}

/// Code within the text of a document.
fn spans(text: &str) -> Vec<&str> {
    let outside = text.split("```").step_by(2);
    let spans = outside.flat_map(|text| text.split('`').skip(1).step_by(2));
    spans.collect()
}

/// A directory that replaces the root of the machine.
struct Machine<'a> {
    t: &'a Test,
    root: tempfile::TempDir,
}

impl<'a> Machine<'a> {
    fn new(t: &'a Test) -> Self {
        let machine = Self {
            t,
            root: tempfile::tempdir().expect("a directory"),
        };
        for directory in [
            "bin",
            "backup",
            "etc/systemd/system",
            "usr/local/bin",
            "var/lib/bigchat-sync",
            "work/target/release",
        ] {
            fs::create_dir_all(machine.path(directory)).expect("a directory");
        }
        for file in ["work/target/release/bigchat-sync", "work/our-api-token"] {
            fs::write(machine.path(file), "a stand-in").expect("a file");
        }
        for directory in ["work", "var/lib/bigchat-sync"] {
            let db = machine.path(directory).join("bigchat-sync.db");
            t.execute(&format!("VACUUM INTO '{}'", db.display()));
        }
        machine.stand_in("bigchat-sync", BOUNDED);
        machine.stand_in("cargo", CARGO);
        machine.stand_in("sudo", r#"exec "$@""#);
        for program in NOT_RUN {
            machine.stand_in(program, "exit 0");
        }
        machine
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    fn stand_in(&self, program: &str, script: &str) {
        let path = self.path("bin").join(program);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("our file");
    }

    /// Runs a script. Every command in it must succeed. Returns how often the program was called.
    fn run(&self, script: &Script) -> usize {
        let mut text = script.text.clone();
        let services = [
            ("https://bigchat.example", self.t.bigchat.url()),
            ("https://our-api.example", self.t.our_api.url()),
        ];
        for (documented, url) in services {
            text = text.replace(documented, &url);
        }
        for directory in ["/etc/", "/var/lib/", "/usr/local/", "/backup"] {
            let stand_in = self.path(&directory[1..]);
            text = text.replace(directory, &stand_in.display().to_string());
        }
        let path = std::env::var("PATH").expect("a path");
        let output = Command::new("timeout")
            .args(["-k", "5", "120", "sh", "-ec", &text])
            .current_dir(self.path("work"))
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            .env("HOME", self.root.path())
            .env("TMPDIR", self.root.path())
            .env("PROGRAM", process::program().get_program())
            .env("RECORD", self.path("record"))
            .env("BIGCHAT_SYNC_BIGCHAT_URL", self.t.bigchat.url())
            .env("BIGCHAT_SYNC_OUR_API_URL", self.t.our_api.url())
            .env(
                "BIGCHAT_SYNC_DB",
                self.path("var/lib/bigchat-sync/bigchat-sync.db"),
            )
            .env("BIGCHAT_SYNC_LISTEN", "off")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .output()
            .expect("a shell");
        assert!(
            output.status.success(),
            "{}: {}\n{text}\n{}{}",
            script.place,
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        let record = fs::read_to_string(self.path("record")).unwrap_or_default();
        for call in record.lines() {
            assert_parses(&script.place, call.split_terminator('\u{1f}'));
        }
        record.lines().count()
    }
}

/// Asserts that the program has these commands and flags.
fn assert_parses<'a>(place: &str, arguments: impl IntoIterator<Item = &'a str>) {
    let line = ["bigchat-sync"].into_iter().chain(arguments);
    let Err(error) = Cli::try_parse_from(line) else {
        return;
    };
    let is_shortened = matches!(
        error.kind(),
        ErrorKind::DisplayHelp
            | ErrorKind::DisplayVersion
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
            | ErrorKind::MissingRequiredArgument
    );
    assert!(is_shortened, "{place}: {error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documented_commands_run() {
    run_live_test(async |t| {
        t.differs("the documents retry and discard");
        let now = t.now();
        t.bigchat.open(42, now - 100, 1);
        t.bigchat
            .reports([start(42, now - 100), message(42, now - 5, "a parcel")]);
        t.once().await;
        assert_eq!(t.events("delivered"), 2);
        let conversation = "(SELECT id FROM conversations WHERE bigchat_id = 42)";
        for id in 17..=20 {
            let data = r#"{"message":"k"}"#;
            t.execute(&dead_letter(id, conversation, "MESSAGE", data, "why", 1));
        }
        let has_sqlite = Command::new("sqlite3").arg("-version").output().is_ok();
        let scripts = documents()
            .into_iter()
            .flat_map(|document| scripts(&document));
        let mut calls = 0;
        for script in scripts.chain(demo_forms()) {
            if script.text.contains("sqlite3") && !has_sqlite {
                println!("not tested: {} needs sqlite3", script.place);
                continue;
            }
            calls += Machine::new(t).run(&script);
        }
        assert!(calls > 20, "{calls} calls");
    })
    .await;
}

#[test]
fn documents_have_scripts_and_forms() {
    let count = |name: &str| scripts(&repository().join(name)).len();
    assert!(count("README.md") >= 6);
    assert!(count("src/cli/manual/operation.md") >= 6);
    assert_eq!(demo_forms().len(), 6);
}

#[test]
fn inline_commands_and_flags_exist() {
    let command = Cli::command();
    let mut known: BTreeSet<String> = BTreeSet::new();
    let mut commands = vec![&command];
    while let Some(command) = commands.pop() {
        let flags = command.get_arguments().filter_map(clap::Arg::get_long);
        known.extend(flags.map(str::to_owned));
        commands.extend(command.get_subcommands());
    }
    for document in documents() {
        let place = document.display().to_string();
        for span in spans(&read(&document)) {
            let words = || span.split_whitespace().filter(|word| *word != "…");
            match span.split_once(' ').map_or(span, |(first, _)| first) {
                "bigchat-sync" => assert_parses(&place, words().skip(1)),
                "cargo" if span.starts_with("cargo run") => {
                    assert_parses(&place, words().skip_while(|word| *word != "--").skip(1));
                }
                flag if flag.starts_with("--") && flag != "--quick" => {
                    let name = flag[2..].split('=').next().unwrap_or_default();
                    assert!(known.contains(name), "{place}: {span}");
                }
                _ => {}
            }
        }
    }
}

#[test]
fn readme_has_at_most_200_lines() {
    assert!(readme().lines().count() <= 200);
}

#[test]
fn every_chapter_is_printed() {
    let files = documents().len() - 1;
    assert_eq!(
        files,
        Chapter::value_variants().len(),
        "each file is a chapter"
    );
    for chapter in Chapter::value_variants() {
        let name = chapter.to_possible_value().expect("a name");
        let text = stdout_of(&["man", name.get_name()]);
        assert!(text.starts_with("# "), "{name:?}");
        assert_eq!(text, chapter.text());
        assert!(!text.contains("<!--"), "{name:?}");
    }
}

/// All files below a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).expect("a directory");
    let paths = entries.map(|entry| entry.expect("a file").path());
    let files = paths.flat_map(|path| match path.is_dir() {
        true => files(&path),
        false => vec![path],
    });
    files.collect()
}

#[test]
fn documented_files_exist() {
    let tests = files(&repository().join("tests/it"));
    for document in documents() {
        let text = read(&document);
        let directory = document.parent().expect("a directory");
        let between = |before: &str, after: char| -> Vec<String> {
            let parts = text.split(before).skip(1);
            let targets = parts.filter_map(|part| part.split(after).next());
            targets.map(str::to_owned).collect()
        };
        let links = [
            between("](", ')'),
            between("src=\"", '"'),
            between("srcset=\"", '"'),
        ];
        for link in links
            .concat()
            .iter()
            .filter(|link| !link.starts_with("http"))
        {
            assert!(
                directory.join(link).exists(),
                "{}: {link}",
                document.display()
            );
        }
        let places = ["src/", "tests/", "migrations/", ".ci/"];
        for span in spans(&text) {
            let path = repository().join(span);
            let exists = if places.iter().any(|place| span.starts_with(place)) {
                path.exists()
            } else if span.ends_with(".rs") {
                tests.iter().any(|test| test.ends_with(span))
            } else {
                continue;
            };
            assert!(exists, "{}: {span}", document.display());
        }
    }
}

/// The cells of a chapter's tables, by row, without headings and lines.
fn rows(chapter: Chapter) -> Vec<Vec<String>> {
    let text = chapter.text();
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    let cells = rows.map(|row| {
        let cells = row.trim_matches('|').split('|');
        cells.map(|cell| cell.trim().to_owned()).collect()
    });
    cells.collect()
}

#[test]
fn every_setting_is_documented() {
    let rows = rows(Chapter::Settings);
    let command = Cli::command();
    let settings = command
        .get_arguments()
        .filter(|one| one.get_env().is_some());
    let mut count = 0;
    for setting in settings {
        let flag = format!("`--{}`", setting.get_long().expect("a flag"));
        let row = rows.iter().find(|row| row[0] == flag);
        let row = row.unwrap_or_else(|| panic!("{flag} is not in settings.md"));
        let defaults = setting.get_default_values();
        let default = defaults
            .first()
            .map(|value| format!("`{}`", value.to_string_lossy()));
        let default = default.filter(|default| default != "``");
        assert_eq!(row[1], default.unwrap_or_default(), "default of {flag}");
        count += 1;
    }
    let documented = rows.iter().filter(|row| row[0].starts_with("`--"));
    assert_eq!(documented.count(), count);
}

#[tokio::test]
async fn every_metric_is_documented() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(42, now - 100, 1);
        t.bigchat.reports([message(42, now - 5, "a parcel")]);
        let (daemon, url) = t.start_listening(console_token());
        let mut metrics = String::new();
        until("an event is measured", async || {
            let request = client().get(format!("{url}/metrics")).bearer_auth(TOKEN);
            metrics = sent(request).await.text().await.expect("text");
            // The pass in idle time begins once nothing is waiting.
            metrics.contains("bigchat_sync_newest_event_age_seconds ")
                && metrics.contains("bigchat_sync_verification_left_chats ")
        })
        .await;
        t.until_events("delivered", 1).await;
        daemon.stop().await;
        let types = metrics
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE bigchat_sync_"));
        let measured: BTreeSet<&str> = types.filter_map(|line| line.split(' ').next()).collect();
        let text = Chapter::Monitoring.text();
        let table = text
            .split("\n## Metrics\n")
            .nth(1)
            .expect("a section on metrics");
        let cells = table
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split('|').next());
        let documented: BTreeSet<&str> = cells
            .flat_map(|cell| {
                cell.split('`')
                    .filter(|name| name.contains(|c: char| c.is_alphabetic()))
            })
            .collect();
        assert_eq!(documented, measured);
    })
    .await;
}

#[test]
fn every_alert_is_documented() {
    let alerts = include_str!("../../../src/metrics/alerts.yml");
    let alerts = alerts
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "));
    let documented = rows(Chapter::Monitoring)
        .into_iter()
        .map(|row| row[0].clone());
    let documented: Vec<String> = documented
        .filter(|name| name.contains("`Bigchat"))
        .collect();
    assert_eq!(
        alerts.map(|name| format!("`{name}`")).collect::<Vec<_>>(),
        documented
    );
}

/// Messages explained in the runbook are messages of the program.
#[test]
fn explained_messages_exist() {
    let sources = files(&repository().join("src"));
    let sources = sources
        .iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    // The runbook names only one of the two APIs.
    let source = sources
        .map(|path| read(path).replace("{api}", "OurAPI"))
        .collect::<String>();
    let text = Chapter::Operation.text();
    let table = text
        .split("| message |")
        .nth(1)
        .expect("a table of messages");
    let cells = table
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('|').next());
    let messages: Vec<&str> = cells.flat_map(|cell| cell.split('`').step_by(2)).collect();
    assert!(messages.len() > 12, "{messages:?}");
    for message in messages {
        assert!(source.contains(message), "no message has {message:?}");
    }
}
