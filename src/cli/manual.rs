//! The texts that the program prints about itself: the systemd unit, shell completions, the manual page, and the
//! chapters of the manual.
//!
//! The manual page covers all commands, with the same text as `--help`. The chapters are the Markdown files beside this
//! one.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, Command, CommandFactory, ValueEnum};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};
use thiserror::Error;

use crate::cli::Cli;
use crate::telemetry::terminal::shown;

const NAME: &str = "bigchat-sync";

const UNIT: &str = include_str!("manual/bigchat-sync.service");

/// A chapter of the manual.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Chapter {
    /// All settings, tokens and the network.
    Settings,
    /// The runbook: what to do in which situation.
    Operation,
    /// The commands for conversations, failed events, exports and erasure.
    Commands,
    /// The style of the output of `--json`.
    Json,
    /// Health endpoints, alerts, metrics.
    Monitoring,
    /// Losses in OurAPI: how they are found and repaired.
    Verify,
    /// Levels and fields of the log.
    Log,
    /// What is guaranteed, what is not, and the tests that prove it.
    Guarantees,
    /// What was tested, with how many cases, by which command.
    Evidence,
    /// Pausing deliveries during maintenance of OurAPI.
    Pause,
    /// Heartbeat, several daemons, the read-only token, the systemd journal, the Debian package.
    Deployment,
    /// How it works.
    Design,
}

impl Chapter {
    /// The chapter as Markdown.
    pub fn text(self) -> String {
        let text = match self {
            Self::Settings => include_str!("manual/settings.md"),
            Self::Operation => include_str!("manual/operation.md"),
            Self::Commands => include_str!("manual/commands.md"),
            Self::Json => include_str!("manual/json.md"),
            Self::Monitoring => include_str!("manual/monitoring.md"),
            Self::Verify => include_str!("manual/verify.md"),
            Self::Log => include_str!("manual/log.md"),
            Self::Guarantees => include_str!("manual/guarantees.md"),
            Self::Evidence => include_str!("manual/evidence.md"),
            Self::Pause => include_str!("manual/pause.md"),
            Self::Deployment => include_str!("manual/deployment.md"),
            Self::Design => include_str!("manual/design.md"),
        };
        // Comments are for the authors of the chapters.
        let lines = text.split_inclusive('\n');
        lines.filter(|line| !line.starts_with("<!--")).collect()
    }
}

/// The sections of the manual page that `--help` does not have.
const SECTIONS: [(&str, &[(&str, &str)]); 5] = [
    (
        "EXIT STATUS",
        &[
            (
                "0",
                "Success. For status, check and verify: no problem was found.",
            ),
            (
                "1",
                "The command failed in whole or in part; standard error says why. For status, check and verify: a problem was found.",
            ),
            (
                "2",
                "A setting or an argument is wrong; standard error names it, and where it was set.",
            ),
        ],
    ),
    (
        "ENVIRONMENT",
        &[
            (
                "BIGCHAT_SYNC_...",
                "Each setting, named after its flag: --poll-interval is BIGCHAT_SYNC_POLL_INTERVAL. A flag takes precedence. An unknown variable with this prefix is refused.",
            ),
            (
                "BIGCHAT_SYNC_BIGCHAT_TOKEN, BIGCHAT_SYNC_BIGCHAT_TOKEN_FILE",
                "The bearer token for BigChat, or a file that contains it; likewise BIGCHAT_SYNC_OUR_API_TOKEN, BIGCHAT_SYNC_CONSOLE_TOKEN, BIGCHAT_SYNC_CONSOLE_READ_TOKEN and BIGCHAT_SYNC_HEARTBEAT_URL. No flag sets a token.",
            ),
            (
                "RUST_LOG",
                "The level of the log: error, warn, info (the default), debug or trace.",
            ),
            (
                "STATE_DIRECTORY, CREDENTIALS_DIRECTORY",
                "Set by systemd: the directory of the database, unless --db is set, and the directory of the tokens.",
            ),
            (
                "SUDO_USER, DOAS_USER",
                "The user who ran sudo or doas; recorded with each resolution of a failed event and each erasure.",
            ),
        ],
    ),
    (
        "SIGNALS",
        &[
            (
                "SIGTERM, SIGINT",
                "Finish the requests in flight and stop, within 10 s. A second signal stops the daemon immediately, which is as safe as a crash. A SIGTERM repeated within a second counts once.",
            ),
            (
                "SIGHUP",
                "Read the token files again. If a new token is invalid, the old one stays in use and an error is logged. If the terminal was closed, stop as after SIGTERM.",
            ),
        ],
    ),
    (
        "FILES",
        &[
            (
                "bigchat-sync.db",
                "The database, with -wal and -shm beside it, readable only by its owner. In $STATE_DIRECTORY (/var/lib/bigchat-sync as a service), else in the working directory; --db names another file.",
            ),
            (
                "/etc/credstore/bigchat-sync.our-api-token",
                "The bearer token of OurAPI, for the service; likewise bigchat-token, console-token, console-read-token and heartbeat-url.",
            ),
            (
                "/etc/default/bigchat-sync",
                "Settings as variables, for the service.",
            ),
        ],
    ),
    (
        "EXAMPLES",
        &[
            (
                "bigchat-sync check --bigchat-url https://bigchat.example --our-api-url https://our-api.example",
                "Checks the settings, the database and both APIs before the first start.",
            ),
            (
                "bigchat-sync status || bigchat-sync failed list",
                "Shows problems and their remedies and, if there are any, the failed events with their texts.",
            ),
            (
                "bigchat-sync failed retry --reason 'did not answer'",
                "Retries the failed events whose reason contains this text.",
            ),
            (
                "bigchat-sync conversation 42",
                "Shows the state of each event of conversation 42.",
            ),
            (
                "bigchat-sync export --since 2026-11-22T00:00:00Z | jq -r 'select(.kind == \"MESSAGE\").text'",
                "Prints the messages that were delivered since then.",
            ),
            (
                "bigchat-sync forget 42",
                "Erases the text of conversation 42 from the database, after a confirmation.",
            ),
        ],
    ),
];

/// A path of the program that systemd does not accept.
#[derive(Debug, Error)]
#[error(
    "systemd does not accept a path with quotation marks, backslashes or control characters; move {}",
    shown(.0)
)]
pub struct NotStartable(PathBuf);

/// The systemd unit that runs `program` with these settings, each a flag and its value.
///
/// # Errors
///
/// If systemd cannot start a program with this path.
pub fn unit(program: &Path, settings: &[(String, String)]) -> Result<String, NotStartable> {
    let path = program.as_os_str().as_bytes();
    let is_refused = |byte: &u8| b"\"'\\".contains(byte) || byte.is_ascii_control();
    if path.iter().any(is_refused) {
        return Err(NotStartable(program.to_owned()));
    }
    let flags = settings
        .iter()
        // systemd does not replace variables in the path itself.
        .map(|(flag, value)| format!("--{flag}={value}").replace('$', "$$"));
    let line: Vec<String> = [quoted(path), "run".to_owned()]
        .into_iter()
        .chain(flags.map(|flag| quoted(flag.as_bytes())))
        .collect();
    Ok(UNIT.replace("@exec@", &line.join(" ")))
}

/// A word of a command line in a unit file.
fn quoted(word: &[u8]) -> String {
    let mut quoted = String::new();
    let escape = |byte: &u8| format!("\\x{byte:02x}");
    for chunk in word.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' | '"' => quoted.extend(['\\', c]),
                '%' => quoted.push_str("%%"),
                c if c.is_ascii_control() => quoted.push_str(&escape(&(c as u8))),
                c => quoted.push(c),
            }
        }
        quoted.extend(chunk.invalid().iter().map(escape));
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@,+%$".contains(c);
    match quoted.chars().all(plain) {
        true => quoted,
        false => format!("\"{quoted}\""),
    }
}

/// The completions for a shell.
pub fn completions(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), NAME, &mut script);
    if shell != Shell::Bash {
        return script;
    }
    // If the program's name has a hyphen, clap_complete 4.6 spells the names of the cases in two ways, so nothing is
    // completed after a command (clap's issue 6421).
    let script = String::from_utf8_lossy(&script);
    script
        .replace("bigchat__subcmd__sync", "bigchat__sync")
        .into_bytes()
}

/// The manual page, for `man -l`.
///
/// # Errors
///
/// Never, because the page is written to memory.
pub fn man() -> io::Result<Vec<u8>> {
    let command = Cli::command();
    let man = Man::new(command.clone());
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    let mut roff = Roff::new();
    roff.control("SH", ["SYNOPSIS"]);
    let synopsis = [
        bold(NAME),
        roman(" ["),
        italic("COMMAND"),
        roman("] ["),
        italic("SETTINGS"),
        roman("]"),
    ];
    roff.text(synopsis);
    roff.to_writer(&mut page)?;
    man.render_description_section(&mut page)?;
    let mut roff = Roff::new();
    roff.control("SH", ["COMMANDS"]);
    for command in command.get_subcommands() {
        describe(&mut roff, command, &[]);
    }
    roff.to_writer(&mut page)?;
    man.render_options_section(&mut page)?;
    let mut roff = Roff::new();
    for (title, entries) in SECTIONS {
        roff.control("SH", [title]);
        for (what, text) in entries {
            roff.control("TP", []);
            roff.text([bold(*what)]);
            roff.text([roman(*text)]);
        }
    }
    roff.control("SH", ["CHAPTERS"]);
    roff.text([
        roman("Print one with "),
        bold("bigchat-sync man CHAPTER"),
        roman("."),
    ]);
    for chapter in Chapter::value_variants() {
        if let Some(value) = chapter.to_possible_value() {
            roff.control("TP", []);
            roff.text([bold(value.get_name())]);
            paragraphs(&mut roff, "IP", value.get_help());
        }
    }
    roff.to_writer(&mut page)?;
    Ok(page)
}

/// A command with its own arguments, or its subcommands.
fn describe(roff: &mut Roff, command: &Command, above: &[&str]) {
    let path: Vec<&str> = above.iter().copied().chain([command.get_name()]).collect();
    if command.has_subcommands() {
        for command in command.get_subcommands() {
            describe(roff, command, &path);
        }
        return;
    }
    let own: Vec<&Arg> = command
        .get_arguments()
        .filter(|argument| !argument.is_global_set() && !argument.is_hide_set())
        .collect();
    let usage = own.iter().map(|argument| usage(argument));
    let usage: Vec<String> = path.iter().map(ToString::to_string).chain(usage).collect();
    roff.control("SS", [usage.join(" ").as_str()]);
    paragraphs(roff, "PP", command.get_long_about().or(command.get_about()));
    for argument in own {
        roff.control("TP", []);
        let (flag, value) = parts(argument);
        let between = (flag.is_some() && value.is_some()).then(|| roman("="));
        let parts = flag.map(bold).into_iter().chain(between);
        roff.text(parts.chain(value.map(italic)).collect::<Vec<_>>());
        paragraphs(roff, "IP", argument.get_long_help().or(argument.get_help()));
        let possible: Vec<_> = argument
            .get_possible_values()
            .iter()
            .map(|value| value.get_name().to_owned())
            .collect();
        if argument.get_action().takes_values() && !possible.is_empty() {
            roff.text([roman(format!("[possible values: {}]", possible.join(", ")))]);
        }
        if let [default] = argument.get_default_values() {
            roff.text([roman(format!("[default: {}]", default.to_string_lossy()))]);
        }
    }
}

/// An argument's flag, and the name of its value.
fn parts(argument: &Arg) -> (Option<String>, Option<String>) {
    let value = argument.get_action().takes_values().then(|| {
        let names = argument.get_value_names().unwrap_or_default();
        names
            .first()
            .map_or("VALUE", |name| name.as_str())
            .to_owned()
    });
    (argument.get_long().map(|long| format!("--{long}")), value)
}

fn usage(argument: &Arg) -> String {
    let (flag, value) = parts(argument);
    let words: Vec<String> = flag.into_iter().chain(value).collect();
    let more = match argument.get_action() {
        ArgAction::Append => "...",
        _ => "",
    };
    let words = words.join("=") + more;
    if argument.is_required_set() {
        words
    } else {
        format!("[{words}]")
    }
}

/// Adds the text of one or more paragraphs, separated by the macro `next`.
fn paragraphs(roff: &mut Roff, next: &str, text: Option<&clap::builder::StyledStr>) {
    let text = text.map(ToString::to_string).unwrap_or_default();
    for line in text.lines() {
        if line.trim().is_empty() {
            roff.control(next, []);
        } else {
            roff.text([roman(line)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    fn command(program: &[u8]) -> Option<String> {
        let unit = unit(Path::new(OsStr::from_bytes(program)), &[]).ok()?;
        let mut lines = unit.lines();
        lines.find_map(|line| Some(line.strip_prefix("ExecStart=")?.to_owned()))
    }

    /// The program's path is written as systemd reads it.
    #[test]
    fn program_path_is_quoted_for_systemd() {
        for (path, written) in [
            (&b"/usr/bin/sync"[..], "/usr/bin/sync run"),
            (b"/opt/a b/sync", "\"/opt/a b/sync\" run"),
            (b"/opt/100%/$x", "/opt/100%%/$x run"),
            (b"/opt/\xff", "\"/opt/\\xff\" run"),
            (b"/opt/\xc3\xbc", "\"/opt/\u{fc}\" run"),
        ] {
            assert_eq!(command(path).as_deref(), Some(written));
        }
        for refused in [&b"/a\"b"[..], b"/a'b", b"/a\\b", b"/a\nb", b"/a\x7fb"] {
            assert_eq!(command(refused), None);
        }
    }

    /// A setting stays one word on one line of the unit.
    #[test]
    fn setting_stays_one_word() {
        for (value, written) in [
            ("a\nb", r#""--x=a\x0ab""#),
            ("\t", r#""--x=\x09""#),
            (r"a\b", r#""--x=a\\b""#),
            ("50% $x", r#""--x=50%% $$x""#),
        ] {
            let settings = [("x".to_owned(), value.to_owned())];
            let unit = unit(Path::new("/a"), &settings).expect("it can be started");
            let line = format!("ExecStart=/a run {written}");
            assert!(unit.lines().any(|is| is == line), "{value:?}: {unit}");
        }
    }
}
