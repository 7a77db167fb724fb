//! The command line: what can be asked of the program, and what it answers with.

use std::ffi::OsString;
use std::path::Path;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::demo;
use crate::journal::{Decision, FailedEvent, JournalError, OpenError, Selection, Store, Who};
use crate::rebuild;
use crate::settings::Settings;
use crate::status;
use crate::time::Millis;

/// Keeps OurAPI's chats, agents and messages in step with what happens in BigChat.
///
/// Without a command it runs until it is stopped (SIGTERM, Ctrl-C). Bearer tokens come from the environment or from
/// files, never from flags: BIGCHAT_SYNC_BIGCHAT_TOKEN or BIGCHAT_SYNC_BIGCHAT_TOKEN_FILE, likewise
/// BIGCHAT_SYNC_OUR_API_TOKEN and, to be let into the console, BIGCHAT_SYNC_CONSOLE_TOKEN.
#[derive(Debug, Parser)]
#[command(version, about, long_about, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// How to do it.
    #[command(flatten)]
    pub settings: Settings,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Poll and deliver until stopped (the default).
    Run,
    /// Poll up to now, deliver what is due, and exit; for cron.
    Once,
    /// Tell whether all is well, and what is not: exit code 0 or 1; works whether or not the daemon runs.
    ///
    /// Asks neither API anything: it tells what the daemon last found.
    Status(status::Args),
    /// List, show, retry or discard the events that failed; works while the daemon runs.
    #[command(subcommand)]
    Failed(FailedCommand),
    /// Compare OurAPI with the journal, chat by chat, and build again what is missing; works while the daemon runs.
    ///
    /// Missing chats and agents are created again, chats that are otherwise than their events say are put right, and
    /// messages that are missing are sent again, as far as the retention reaches. Where the daemon runs, it does all this;
    /// else the command does, and delivers what is due meanwhile, but polls nothing.
    Rebuild(rebuild::Args),
    /// Watch the daemon at work between a simulated BigChat and a simulated OurAPI; needs nothing prepared.
    ///
    /// Ends by comparing what BigChat told with what OurAPI holds, chat by chat and message by message: exit code 1 on
    /// any difference. Everything is the demo's own, down to a temporary database: the settings have no say in it, neither
    /// those of the environment (BIGCHAT_SYNC_...) nor as flags, which are refused.
    Demo(demo::Args),
}

/// What can be done about failed events.
#[derive(Debug, Subcommand)]
pub enum FailedCommand {
    /// List them, the oldest first.
    List {
        /// How many at the most.
        #[arg(long, default_value_t = 100)]
        limit: u32,
    },
    /// Show one whole: what BigChat told, what was asked and answered.
    Show {
        /// Its id, as listed.
        id: i64,
    },
    /// Have them tried again: as safe as the first try.
    Retry(Which),
    /// Give them up: they are never tried again.
    Discard(Which),
}

/// Which failed events.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Which {
    /// Those of these ids.
    ids: Vec<i64>,
    /// Those that failed for this reason, as listed.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// All of them.
    #[arg(long)]
    all: bool,
}

impl From<Which> for Selection {
    fn from(which: Which) -> Self {
        match which {
            Which { all: true, .. } => Self::All,
            Which {
                reason: Some(reason),
                ..
            } => Self::Reason(reason),
            Which { ids, .. } => Self::Ids(ids),
        }
    }
}

impl Cli {
    /// Reads the command line and the environment; exits with code 2 and what is wrong, and where it was set, if
    /// something is.
    pub fn read() -> Self {
        Self::try_read(std::env::args_os().collect()).unwrap_or_else(|mut error| {
            if let Some(variable) = set_by_environment(&error) {
                error.insert(
                    ContextKind::Suggested,
                    ContextValue::StyledStrs(vec![
                        format!("it was set by the environment variable {variable}").into(),
                    ]),
                );
            }
            error.exit()
        })
    }

    fn try_read(line: Vec<OsString>) -> Result<Self, clap::Error> {
        let mut command = Self::command();
        if line.get(1).is_some_and(|command| command == "demo") {
            // Not even a setting of the environment that cannot be used keeps it from running.
            command = command.mut_args(|argument| argument.env(None::<&str>).hide(true));
        }
        let matches = command.try_get_matches_from_mut(line)?;
        let cli = Self::from_arg_matches(&matches)?;
        if let (Some(Command::Demo(_)), Some(flag)) = (&cli.command, set_by_flag(&matches)) {
            let message =
                format!("the demo has settings of its own: --{flag} would have no effect");
            return Err(command.error(ErrorKind::ArgumentConflict, message));
        }
        Ok(cli)
    }
}

/// A setting that is given as a flag, if any is.
fn set_by_flag(matches: &ArgMatches) -> Option<String> {
    let settings = Settings::augment_args(clap::Command::new("settings"));
    let given = settings.get_arguments().find(|argument| {
        matches.value_source(argument.get_id().as_str()) == Some(ValueSource::CommandLine)
    })?;
    given.get_long().map(str::to_owned)
}

/// The environment variable that a bad value comes from, if it comes from one.
fn set_by_environment(error: &clap::Error) -> Option<String> {
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
    let on_the_line = std::env::args()
        .any(|given| given.trim_start_matches("--").split('=').next() == Some(flag));
    (!on_the_line && std::env::var(variable).is_ok_and(|set| set == *value))
        .then(|| variable.to_owned())
}

/// Does something about failed events. Returns what to print.
///
/// # Errors
///
/// When the database cannot be opened or refuses.
pub fn failed(db: &Path, command: FailedCommand) -> Result<String, FailedError> {
    let mut store = Store::open_beside(db)?;
    Ok(match command {
        FailedCommand::List { limit } => list(&store.failed(limit)?, store.count_failed()?),
        FailedCommand::Show { id } => show(
            &store
                .failed_event(id)?
                .ok_or(FailedError::NoSuchEvent(id))?,
        ),
        FailedCommand::Retry(which) => {
            let count = decide(&mut store, which, Decision::Retry)?;
            format!(
                "{count} to be tried again: by the daemon within a second, or when it next runs\n"
            )
        }
        FailedCommand::Discard(which) => {
            let count = decide(&mut store, which, Decision::Discard)?;
            format!("{count} discarded\n")
        }
    })
}

/// Why a command about failed events came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum FailedError {
    /// The database cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The database refuses.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// There is none of that id.
    #[error("there is no failed event {0}; `bigchat-sync failed list` lists them")]
    NoSuchEvent(i64),
    /// Some of those named are not failed, or could not be understood and so cannot be retried.
    #[error(
        "done for {done} of {asked}: the others are not failed events, or are events that could not be understood, which can only be discarded"
    )]
    Partly {
        /// How many it was done for.
        done: usize,
        /// How many were named.
        asked: usize,
    },
}

fn decide(store: &mut Store, which: Which, decision: Decision) -> Result<usize, FailedError> {
    let which = Selection::from(which);
    let (mut done, mut next) = (0, Some(0));
    while let Some(after) = next {
        let decided = store.decide_failed(&which, decision, Who::Command, after, Millis::now())?;
        done += decided.done;
        next = decided.next;
    }
    match which {
        Selection::Ids(ids) if ids.len() != done => Err(FailedError::Partly {
            done,
            asked: ids.len(),
        }),
        _ => Ok(done),
    }
}

fn list(events: &[FailedEvent], count: u64) -> String {
    if events.is_empty() {
        return "no event has failed\n".to_owned();
    }
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header([
        "id",
        "conversation",
        "event",
        "at",
        "failed at",
        "tries",
        "reason",
    ]);
    for event in events {
        let conversation = event
            .conversation
            .map_or_else(|| "-".to_owned(), |id| id.to_string());
        table.add_row([
            event.id.to_string(),
            conversation,
            event.name.clone(),
            event.at.to_string(),
            event.failed_at.to_string(),
            event.tries.to_string(),
            printable(&event.reason),
        ]);
    }
    let shown = if (events.len() as u64) < count {
        format!(", {} shown", events.len())
    } else {
        String::new()
    };
    format!(
        "{}\n\n{count} failed{shown}. `bigchat-sync failed show ID` tells all about one; `failed retry` and `failed discard` decide.\n",
        table.trim_fmt()
    )
}

fn show(event: &FailedEvent) -> String {
    let unknown = || "-".to_owned();
    let lines = [
        ("event", event.id.to_string()),
        ("kind", event.name.clone()),
        (
            "conversation",
            event.conversation.map_or_else(unknown, |id| id.to_string()),
        ),
        ("chat", event.chat.clone().unwrap_or_else(unknown)),
        ("happened at", event.at.to_string()),
        ("failed at", event.failed_at.to_string()),
        ("tries", event.tries.to_string()),
        ("reason", event.reason.clone()),
        ("data", event.data.clone().unwrap_or_else(unknown)),
        ("request", event.request.clone().unwrap_or_else(unknown)),
        ("response", event.response.clone().unwrap_or_else(unknown)),
    ];
    lines
        .iter()
        .map(|(name, value)| format!("{name:<13}{}\n", printable(value)))
        .collect()
}

/// What strangers wrote, without what a terminal would obey.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}
