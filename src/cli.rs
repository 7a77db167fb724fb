//! The command line: what can be asked of the program, and what it answers with.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;

use crate::demo;
use crate::failed;
use crate::rebuild;
use crate::settings::Settings;
use crate::status;

/// Keeps OurAPI's chats, agents and messages in step with what happens in BigChat.
///
/// Without a command it runs until it is stopped (SIGTERM, Ctrl-C). Bearer tokens come from the environment or from
/// files, never from flags: BIGCHAT_SYNC_BIGCHAT_TOKEN or BIGCHAT_SYNC_BIGCHAT_TOKEN_FILE, likewise
/// BIGCHAT_SYNC_OUR_API_TOKEN and, to be let into the console, BIGCHAT_SYNC_CONSOLE_TOKEN. SIGHUP reads the files again.
#[derive(Debug, Parser)]
#[command(version, about, long_about, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// How to do it.
    #[command(flatten)]
    pub settings: Settings,

    /// The settings that are given for a unit, as flags or by the environment: each flag and its value.
    #[arg(skip)]
    pub given: Vec<(String, String)>,
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
    /// Look whether it can work: settings, database, both APIs; and say what to do about what is wrong.
    ///
    /// While a daemon runs, the APIs are as its last exchanges with them tell: nobody asks OurAPI beside it. Else both are
    /// asked, for what changes nothing and loses nothing.
    Check,
    /// List, show, retry or discard the events that failed; works while the daemon runs.
    #[command(subcommand)]
    Failed(failed::Command),
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
    /// Print the unit file by which systemd runs the daemon, with the settings given, ready for /etc/systemd/system.
    ///
    /// For example: `bigchat-sync unit --our-api-url https://our-api.example > /etc/systemd/system/bigchat-sync.service`
    Unit,
    /// Print what makes a shell complete these commands and flags.
    ///
    /// For example: `bigchat-sync completions bash > /etc/bash_completion.d/bigchat-sync`
    Completions {
        /// The shell.
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Print the manual page, for `man -l` or /usr/local/share/man/man1.
    Man,
}

impl Cli {
    /// Reads the command line and the environment.
    ///
    /// # Errors
    ///
    /// What is wrong, and where it was set; or what is asked for instead: help, or the version.
    pub fn read() -> Result<Self, clap::Error> {
        Self::try_read(std::env::args_os().collect()).map_err(|mut error| {
            if let Some(variable) = set_by_environment(&error) {
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
        if line.get(1).is_some_and(|command| command == "demo") {
            // Not even a setting of the environment that cannot be used keeps it from running.
            command = command.mut_args(|argument| argument.env(None::<&str>).hide(true));
        }
        let matches = command.try_get_matches_from_mut(line)?;
        let mut cli = Self::from_arg_matches(&matches)?;
        let set = settings_of(&matches, |source| source == ValueSource::CommandLine);
        let no_effect = match cli.command {
            Some(Command::Demo(_)) => set
                .first()
                .map(|set| ("the demo has settings of its own", set)),
            Some(Command::Unit) => {
                let db = set.iter().find(|(flag, _)| flag == "db");
                db.map(|db| ("the unit has its database in /var/lib/bigchat-sync", db))
            }
            _ => None,
        };
        if let Some((why, (flag, _))) = no_effect {
            let message = format!("{why}: --{flag} would have no effect");
            return Err(command.error(ErrorKind::ArgumentConflict, message));
        }
        cli.given = settings_of(&matches, |source| source != ValueSource::DefaultValue);
        // Set for other commands.
        cli.given.retain(|(flag, _)| flag != "db");
        Ok(cli)
    }
}

/// The settings that come from such a source: each flag and its value.
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
    let on_the_line = std::env::args_os().any(|given| {
        let given = given.to_string_lossy();
        given.trim_start_matches("--").split('=').next() == Some(flag)
    });
    (!on_the_line && std::env::var(variable).is_ok_and(|set| set == *value))
        .then(|| variable.to_owned())
}
