//! The command line: the commands, the settings, and errors that name where a bad value was set.

pub mod check;
pub mod conversation;
pub mod export;
pub mod failed;
pub mod forget;
mod json;
pub mod manual;
pub mod pause;
pub mod resolutions;
pub mod status;
mod table;
pub mod verify;

use std::any::TypeId;
use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;

use thiserror::Error;

use self::manual::Chapter;
use crate::daemon::DaemonError;
use crate::demo;
use crate::domain::ids::{Epoch, EventId};
use crate::journal::{JournalError, OpenError, Resolution};
use crate::settings::{Settings, token_variables};
use crate::version;

/// Keeps OurAPI's chats, agents and messages in sync with BigChat.
///
/// Without a command, the daemon runs until it is stopped (SIGTERM, Ctrl-C). `bigchat-sync help man` lists the chapters
/// of the manual.
///
/// Bearer tokens come from the environment or from files, never from flags. The one for BigChat is in
/// BIGCHAT_SYNC_BIGCHAT_TOKEN, or in the file that BIGCHAT_SYNC_BIGCHAT_TOKEN_FILE names. BIGCHAT_SYNC_OUR_API_TOKEN,
/// BIGCHAT_SYNC_CONSOLE_TOKEN (the console) and BIGCHAT_SYNC_CONSOLE_READ_TOKEN (read-only access to the console) work
/// in the same way, and so does BIGCHAT_SYNC_HEARTBEAT_URL, the URL of a dead man's switch that expects a request every
/// minute. SIGHUP reads the files again.
#[derive(Debug, Parser)]
#[command(version = version::text(), about, long_about)]
pub struct Cli {
    /// The command.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// The settings.
    #[command(flatten)]
    pub settings: Settings,

    /// The settings that were given as flags or in the environment, for the unit: each flag and its value.
    #[arg(skip)]
    pub given: Vec<(String, String)>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Poll and deliver until stopped (the default).
    Run,
    /// Poll up to now, deliver what is due, and exit; for cron.
    ///
    /// While deliveries are paused, the command only polls, reports the pause, and exits with code 0.
    Once,
    /// Report problems and their remedies; exit code 1 if there is a problem. Works whether or not a daemon is running.
    ///
    /// The command reads only the database, and sends no request to either API.
    Status(status::Args),
    /// Test the settings, the database and both APIs; print a remedy for each failure. Exit code 1 if a test fails.
    ///
    /// If a daemon is running, the results of its latest requests to the APIs are reported, because OurAPI may accept
    /// only one request at a time. Otherwise both APIs receive requests that change nothing and consume no events. If
    /// the daemon has crashed, its last request may still be in flight, so the command waits for one --request-timeout
    /// before it sends a request to OurAPI.
    Check(check::Args),
    /// Show the state of each event of a conversation, with times and reasons.
    ///
    /// BigChat reuses its ids after a restart. If several conversations had the id, all are shown, each with its epoch
    /// (an epoch lasts from one restart to the next). Events whose kind is ignored (--ignore-events) are counted but
    /// not stored, so they are not shown.
    Conversation(conversation::Args),
    /// Print the events delivered in a period, one JSON object per line.
    ///
    /// Events are selected by their time of delivery, by this machine's clock, and printed in order of delivery. The
    /// command works while the daemon is running, and does not delay it. Events already dropped (see --retention) are
    /// not included.
    Export(export::Args),
    /// List, show, retry or discard dead letters (failed events), or undo a discard; works while the daemon is running.
    #[command(subcommand)]
    Failed(failed::Command),
    /// Erase the text of a conversation from the database, for a person's right to erasure.
    ///
    /// The text is erased from the events, the failed events with their requests and responses, the stored pages and
    /// the files of the database. Kinds, times and fingerprints of the events remain, to recognize events that BigChat
    /// reports again. The conversation is no longer sent, verified or restored; `export` prints its delivered events
    /// without text. An event that arrives later is counted, and its text is not stored. The operator must erase
    /// OurAPI's chat, backups of the database, and logs that were written with --log-message-text. The command asks for
    /// confirmation, unless --yes is given. It works while the daemon is running.
    Forget(forget::Args),
    /// List who retried, discarded or reopened which failed event, and when; latest first.
    Resolutions(resolutions::Args),
    /// Pause deliveries during maintenance of OurAPI; polling continues, because BigChat reports an event only once.
    ///
    /// Within a second, the daemon stops sending requests to OurAPI, including probes and verifications. The command
    /// works whether or not a daemon is running, and the pause survives a restart of the daemon.
    Pause(pause::Args),
    /// Resume deliveries after `pause`.
    Resume,
    /// Compare OurAPI with the journal (the database), chat by chat; exit code 1 if something is missing or differs.
    ///
    /// With --repair, missing chats, agents and messages are sent again, as far as their events are still stored, and
    /// fields that differ are overwritten with the values from the events. If a daemon is running, it does the work;
    /// otherwise the command does it, and does not poll.
    Verify(verify::Args),
    /// Watch the daemon work between a simulated BigChat and a simulated OurAPI; needs no setup.
    ///
    /// At the end, the events that BigChat reported are compared with the chats in OurAPI, message by message; exit
    /// code 1 if they differ. The demo has its own settings and a temporary database. Settings in the environment are
    /// ignored, and flags that set them are refused.
    Demo(demo::Args),
    /// Print a systemd unit with the given settings, for /etc/systemd/system.
    ///
    /// The database of the service is /var/lib/bigchat-sync/bigchat-sync.db.
    ///
    /// For example:
    /// `bigchat-sync unit --our-api-url https://our-api.example > /etc/systemd/system/bigchat-sync.service`
    Unit,
    /// Print the completions for a shell.
    ///
    /// For example: `bigchat-sync completions bash > /etc/bash_completion.d/bigchat-sync`
    Completions {
        /// The shell.
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Print the manual page (for `man -l` or /usr/local/share/man/man1), or a chapter of the manual as Markdown.
    ///
    /// For example: `bigchat-sync man operation | less`
    Man {
        /// The chapter [default: the manual page].
        #[arg(value_enum)]
        chapter: Option<Chapter>,
    },
}

#[derive(Debug, Error)]
pub enum CommandError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("the answer cannot be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error("no event of conversation {0} has ever been received")]
    NoSuchConversation(i64),
    #[error("the period is empty: --until (now, if it is not given) must be after --since")]
    EmptyPeriod,
    /// This process cannot take the place of the daemon.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    #[error("the operating system reports an error: {0}")]
    System(#[from] io::Error),
    #[error("standard output cannot be written: {0}")]
    Output(#[source] io::Error),
    /// The conversation has no chat that could be verified.
    #[error(
        "conversation {0} has no chat: nothing has been delivered for the conversation yet, OurAPI has lost the chat and it is being restored, or the conversation was forgotten"
    )]
    NoSuchChat(i64),
    #[error("{0}")]
    Interrupted(&'static str),
    #[error("there is no failed event {0}; see `bigchat-sync failed list`")]
    NoSuchEvent(i64),
    /// No event with the text in its reason can be resolved in this way.
    #[error(
        "nothing was resolved: no such event has a reason with this text, or those that do still cannot be parsed; see `bigchat-sync failed list` for the reasons"
    )]
    NoSuchReason,
    /// Some of the named events cannot be resolved in this way.
    #[error("{done} of {asked} resolved; not {}", failed::others(.left, *.resolution))]
    Partly {
        /// How many were resolved.
        done: usize,
        /// How many were given.
        asked: usize,
        /// The others.
        left: Vec<EventId>,
        resolution: Resolution,
    },
    /// There is nothing to erase.
    #[error(
        "no event of conversation {0} has ever been received, or none in that epoch; nothing was erased"
    )]
    NothingToForget(i64),
    /// Several conversations have the id.
    #[error(
        "several conversations have the id {id}, one in each of the epochs {}; choose one with --epoch (`bigchat-sync conversation {id}` shows them)",
        joined(.epochs)
    )]
    Ambiguous { id: i64, epochs: Vec<Epoch> },
    /// Erased, except on one page.
    #[error(
        "erased, except on a page that is still being processed; run the command again after the next poll"
    )]
    OnNewPage,
    /// Erased, except in the write-ahead log.
    #[error(
        "erased, but another process (a backup, for example) is reading an old state of the database, so the text may still be in the -wal file; run the command again when that process has ended"
    )]
    InLog,
    /// There is no terminal to ask for confirmation.
    #[error("this would {0}, and there is no terminal for the confirmation; add --yes")]
    NoTerminal(String),
    #[error("{0}")]
    NotConfirmed(&'static str),
    /// The operator cannot be asked.
    #[error("cannot ask on the terminal: {0}")]
    Terminal(#[source] io::Error),
}

/// Asks on the terminal for confirmation. `would`: what the command is about to do. `refused`: the result if the
/// operator declines.
fn confirm(question: &str, would: &str, refused: &'static str) -> Result<(), CommandError> {
    if !io::stdin().is_terminal() {
        return Err(CommandError::NoTerminal(would.to_owned()));
    }
    match ask(question).map_err(CommandError::Terminal)? {
        true => Ok(()),
        false => Err(CommandError::NotConfirmed(refused)),
    }
}

fn ask(question: &str) -> io::Result<bool> {
    write!(io::stderr(), "{question} [y/N] ")?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(matches!(&*answer.trim().to_lowercase(), "y" | "yes"))
}

/// The ids in one line.
fn joined(ids: &[impl ToString]) -> String {
    let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
    ids.join(", ")
}

impl Cli {
    /// Reads the command line and the environment.
    ///
    /// # Errors
    ///
    /// If the command line or a variable is wrong: what is wrong, and where it was set. Also the help or the version,
    /// if requested.
    pub fn read() -> Result<Self, clap::Error> {
        Self::try_read(std::env::args_os().collect()).map_err(|mut error| {
            let variable = set_by_environment(&error);
            hide_secrets(&mut error);
            if let Some(variable) = variable {
                error.insert(
                    ContextKind::Suggested,
                    ContextValue::StyledStrs(vec![
                        format!("it was set by the environment variable {variable}").into(),
                    ]),
                );
            }
            error
        })
    }

    fn try_read(line: Vec<OsString>) -> Result<Self, clap::Error> {
        let mut command = Self::command();
        let is_demo = line.get(1).is_some_and(|command| command == "demo");
        if is_demo {
            // A bad setting in the environment must not stop this command.
            command = command.mut_args(|argument| argument.env(None::<&str>).hide(true));
        }
        command = with_own_help(command);
        let matches = command.try_get_matches_from_mut(line)?;
        let unknown = if is_demo {
            None
        } else {
            unknown_variables(std::env::vars_os())
        };
        if let Some(unknown) = unknown {
            return Err(command.error(ErrorKind::UnknownArgument, unknown));
        }
        let mut cli = Self::from_arg_matches(&matches)?;
        let set = settings_of(&matches, |source| source == ValueSource::CommandLine);
        let no_effect = match cli.command {
            Some(Command::Demo(_)) => set
                .first()
                .map(|set| ("the demo has its own settings", set)),
            Some(Command::Unit) => {
                let db = set.iter().find(|(flag, _)| flag == "db");
                db.map(|db| ("the database of the unit is in /var/lib/bigchat-sync", db))
            }
            _ => None,
        };
        if let Some((why, (flag, _))) = no_effect {
            let message = format!("{why}: --{flag} would have no effect");
            return Err(command.error(ErrorKind::ArgumentConflict, message));
        }
        cli.given = settings_of(&matches, |source| source != ValueSource::DefaultValue);
        // The setting is for other commands.
        cli.given.retain(|(flag, _)| flag != "db");
        for (flag, value) in &mut cli.given {
            // The service has another working directory.
            if flag == "our-api-lock"
                && let Ok(path) = std::path::absolute(&value)
            {
                *value = path.to_string_lossy().into_owned();
            }
        }
        Ok(cli)
    }
}

/// The settings that a short help shows.
const BASIC: [&str; 3] = ["bigchat_url", "our_api_url", "db"];

/// The settings that matter to a command; `None`: all of them.
fn settings_for(command: &str) -> Option<&'static [&'static str]> {
    Some(match command {
        "run" | "once" | "unit" => return None,
        "check" => &["bigchat_url", "our_api_url", "db", "our_api_lock", "listen"],
        "verify" => &[
            "bigchat_url",
            "our_api_url",
            "db",
            "our_api_lock",
            "our_api_concurrency",
        ],
        "demo" | "completions" | "man" => &[],
        // The others only work on the journal.
        _ => &["db"],
    })
}

/// Makes the help of each command show the settings that matter to it, after its own options.
fn with_own_help(mut command: clap::Command) -> clap::Command {
    // From here on, each command has its own copy of the settings as arguments.
    command.build();
    with_more_settings(command).mut_subcommands(|command| match settings_for(command.get_name()) {
        Some(settings) => with_settings(command, settings),
        None if command.get_name() == "unit" => with_more_settings(command).mut_args(|argument| {
            if argument.get_id() == "db" {
                argument.hide(true)
            } else {
                argument
            }
        }),
        None => with_more_settings(command),
    })
}

/// Shows the [`BASIC`] settings, and all others only in the long help, below a separate heading.
fn with_more_settings(command: clap::Command) -> clap::Command {
    command.mut_args(|argument| {
        if argument.is_global_set() && !BASIC.contains(&argument.get_id().as_str()) {
            argument.hide_short_help(true).help_heading("More settings")
        } else {
            argument
        }
    })
}

/// Shows these settings, and no others.
fn with_settings(command: clap::Command, settings: &'static [&'static str]) -> clap::Command {
    command
        .mut_args(|argument| {
            let is_other =
                argument.is_global_set() && !settings.contains(&argument.get_id().as_str());
            if is_other {
                argument.hide(true)
            } else {
                argument
            }
        })
        .mut_subcommands(|command| with_settings(command, settings))
}

/// The settings from one source: each flag and its value.
fn settings_of(matches: &ArgMatches, from: impl Fn(ValueSource) -> bool) -> Vec<(String, String)> {
    let settings = Settings::augment_args(clap::Command::new("settings"));
    let given = settings.get_arguments().filter_map(|argument| {
        let id = argument.get_id().as_str();
        matches.value_source(id).filter(|source| from(*source))?;
        let values = matches.get_raw(id)?.map(|value| value.to_string_lossy());
        let value = values.collect::<Vec<_>>().join(",");
        Some((argument.get_long()?.to_owned(), value))
    });
    given.collect()
}

/// Shown instead of a value that may contain a secret.
const HIDDEN: &str = "***";

/// Removes possible secrets from an error: every bad URL, and any value that looks like one with credentials.
fn hide_secrets(error: &mut clap::Error) {
    let is_url = error
        .get(ContextKind::InvalidArg)
        .is_some_and(|argument| argument.to_string().ends_with("<URL>"));
    let may_be_secret = |(kind, value): (ContextKind, &ContextValue)| {
        let text = value.to_string();
        let is_value = is_url && kind == ContextKind::InvalidValue && !text.is_empty();
        (is_value || text.contains("://") || text.contains('@')).then_some(kind)
    };
    let secrets: Vec<ContextKind> = error.context().filter_map(may_be_secret).collect();
    for kind in secrets {
        let shown = match kind {
            ContextKind::Suggested => ContextValue::None,
            _ => ContextValue::String(HIDDEN.to_owned()),
        };
        error.insert(kind, shown);
    }
}

/// The prefix of the program's environment variables.
const PREFIX: &str = "BIGCHAT_SYNC_";

/// Names the variables that look like settings but are not, each with the nearest setting. Values are not repeated,
/// because they may be tokens.
fn unknown_variables(
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Option<String> {
    let settings = Settings::augment_args(clap::Command::new("settings"));
    let known: Vec<String> = settings
        .get_arguments()
        .filter_map(|argument| Some(argument.get_env()?.to_str()?.to_owned()))
        .chain(token_variables())
        .collect();
    let unknown = environment.into_iter().filter_map(|(name, value)| {
        let (name, value) = (name.to_string_lossy(), value.to_string_lossy());
        let end = name.strip_prefix(PREFIX)?;
        if known.iter().any(|known| *known == name)
            || end.starts_with("TEST_")
            || end.starts_with("BUILD_")
            || is_service_link(end, &value)
        {
            return None;
        }
        let likeness = |known: &str| strsim::jaro_winkler(end, &known[PREFIX.len()..]);
        let nearest = known
            .iter()
            .map(|known| (likeness(known), known))
            .filter(|(likeness, _)| *likeness > 0.8)
            .max_by(|(one, _), (other, _)| one.total_cmp(other));
        Some(match nearest {
            Some((_, meant)) => format!("{name} is not a setting; did you mean {meant}?"),
            None => format!("{name} is not a setting; see --help"),
        })
    });
    let mut unknown: Vec<String> = unknown.collect();
    unknown.sort_unstable();
    (!unknown.is_empty()).then(|| format!("environment variable {}", unknown.join("\n  and ")))
}

/// Whether Kubernetes sets such a variable in every container, for a service named bigchat-sync or bigchat-sync-….
fn is_service_link(end: &str, value: &str) -> bool {
    let is_port = |(_, number): (&str, &str)| number.starts_with(|c: char| c.is_ascii_digit());
    end.ends_with("SERVICE_HOST")
        || end.contains("SERVICE_PORT")
        || end.ends_with("PORT") && value.contains("://")
        || end.split_once("PORT_").is_some_and(is_port)
}

/// The environment variable that set a bad value, if any.
fn set_by_environment(error: &clap::Error) -> Option<String> {
    if error.kind() == ErrorKind::InvalidUtf8 {
        return Cli::command().get_arguments().find_map(not_utf8);
    }
    let (Some(ContextValue::String(argument)), Some(ContextValue::String(value))) = (
        error.get(ContextKind::InvalidArg),
        error.get(ContextKind::InvalidValue),
    ) else {
        return None;
    };
    let flag = argument.trim_start_matches("--").split([' ', '=']).next()?;
    let command = Cli::command();
    let argument = command
        .get_arguments()
        .find(|argument| argument.get_long() == Some(flag))?;
    let variable = argument.get_env()?.to_str()?;
    // The value may be one of a list. The flag may also be on the command line, with another value.
    let has_value = |set: &str| set == value || set.split(',').any(|item| item == value);
    let on_the_line = std::env::args_os().any(|given| {
        let given = given.to_string_lossy();
        let of_flag = given.split_once('=').map(|(_, set)| set);
        has_value(&given) || of_flag.is_some_and(has_value)
    });
    (!on_the_line && std::env::var(variable).is_ok_and(|set| has_value(&set)))
        .then(|| variable.to_owned())
}

/// The argument's variable, if its value is not UTF-8 but must be. A path need not be.
fn not_utf8(argument: &clap::Arg) -> Option<String> {
    let variable = argument.get_env()?;
    let is_path = argument.get_value_parser().type_id() == TypeId::of::<PathBuf>();
    let is_bad = std::env::var_os(variable)?.to_str().is_none();
    (is_bad && !is_path).then(|| variable.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Unknown variables are named, each with the nearest setting.
    #[test]
    fn unknown_variable_names_nearest_setting() {
        for (name, meant) in [
            ("BIGCHAT_SYNC_POL_INTERVAL", "BIGCHAT_SYNC_POLL_INTERVAL"),
            ("BIGCHAT_SYNC_OURAPI_TOKEN", "BIGCHAT_SYNC_OUR_API_TOKEN"),
            (
                "BIGCHAT_SYNC_OUR_API_TOKENFILE",
                "BIGCHAT_SYNC_OUR_API_TOKEN_FILE",
            ),
            ("BIGCHAT_SYNC_LISTEN_ON", "BIGCHAT_SYNC_LISTEN"),
            ("BIGCHAT_SYNC_XYZZY", "--help"),
        ] {
            let text = unknown_variables([(name.into(), "s3cret".into())]).expect("it is unknown");
            assert!(text.contains(&format!("{name} is not")), "{text}");
            assert!(text.contains(meant), "{text}");
            assert!(!text.contains("s3cret"), "{text}");
        }
    }

    /// Settings, tokens and Kubernetes' service links are known variables.
    #[test]
    fn known_variables_are_accepted() {
        let settings = Settings::augment_args(clap::Command::new("settings"));
        let settings = settings
            .get_arguments()
            .map(|argument| argument.get_env().expect("a variable").to_owned());
        let service = [
            ("SERVICE_HOST", "10.0.0.1"),
            ("SERVICE_PORT", "8268"),
            ("SERVICE_PORT_METRICS", "8268"),
            ("PORT", "tcp://10.0.0.1:8268"),
            ("PORT_8268_TCP_ADDR", "10.0.0.1"),
            ("CONSOLE_SERVICE_HOST", "10.0.0.1"),
        ];
        let known = settings
            .chain(token_variables().map(OsString::from))
            .map(|name| (name, OsString::from("8268")))
            .chain(service.map(|(end, value)| (format!("{PREFIX}{end}").into(), value.into())))
            .chain([
                ("PATH".into(), "/bin".into()),
                ("BIGCHAT_SYNC".into(), "".into()),
            ]);
        assert_eq!(unknown_variables(known), None);
        let port = [("BIGCHAT_SYNC_PORT".into(), "8268".into())];
        assert!(unknown_variables(port).is_some(), "no service link");
    }
}
