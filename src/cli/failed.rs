//! `bigchat-sync failed`: dead letters, why they failed, and how the operator resolves them.

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use crate::domain::time::Millis;
use crate::journal::{
    FailedAttempt, FailedEvent, JournalError, OpenError, Operator, PastResolution, Resolution,
    Selection, Store,
};
use crate::settings::number;
use crate::telemetry::terminal::printable;
use crate::user;

/// How many resolutions of an event are shown, the latest ones.
const SHOWN: i64 = 10;

/// The commands for dead letters.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List dead letters, the oldest first.
    List {
        /// Largest number of rows.
        #[arg(long, default_value_t = 100, value_parser = number::<u32>, allow_hyphen_values = true)]
        limit: u32,
    },
    /// Show one with its data, its request and its response.
    Show {
        /// Its id, as listed.
        #[arg(value_parser = number::<i64>)]
        id: i64,
    },
    /// Deliver them again; as safe as the first attempt.
    Retry(Which),
    /// Give them up: they are never delivered. Asks before it discards by --reason or --all.
    Discard {
        /// Which dead letters.
        #[command(flatten)]
        which: Which,
        /// Do not ask. Needed without a terminal.
        #[arg(long)]
        yes: bool,
    },
}

/// Which dead letters.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Which {
    /// Their ids, as listed.
    #[arg(value_parser = number::<i64>)]
    ids: Vec<i64>,
    /// All with this reason, as listed.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// All.
    #[arg(long)]
    all: bool,
}

impl From<Which> for Selection {
    fn from(which: Which) -> Self {
        match which {
            Which {
                all: false,
                reason: None,
                ids,
            } => Self::Ids(ids.into_iter().collect()),
            Which { reason, .. } => Self::By {
                reason,
                failed_by: Millis(i64::MAX),
            },
        }
    }
}

/// Runs a command. Returns what to print.
pub fn run(db: &Path, command: Command) -> Result<String, FailedError> {
    let mut store = match command {
        Command::List { .. } | Command::Show { .. } => Store::open_reader(db)?,
        Command::Retry(_) | Command::Discard { .. } => Store::open_shared(db)?,
    };
    Ok(match command {
        Command::List { limit } => list(&store.failed(limit)?, store.count_failed()?),
        Command::Show { id } => {
            let event = store
                .failed_event(id)?
                .ok_or(FailedError::NoSuchEvent(id))?;
            let decisions = store.decisions(Some(id), None, SHOWN)?;
            show(&event, &store.failed_attempts(id)?, &decisions)
        }
        Command::Retry(which) => {
            let count = resolve(&mut store, &which.into(), Resolution::Retry)?;
            let unreadable = store.count_unreadable()?;
            retried(count, store.count_failed()?, unreadable)
        }
        Command::Discard { which, yes } => {
            let which = match which.into() {
                // Ids are already a selection.
                Selection::By { reason, .. } if !yes => {
                    let (count, failed_by) = store.failed_so_far(reason.as_deref())?;
                    if count > 0 {
                        confirm(count)?;
                    }
                    // An event that failed after the question is not meant.
                    Selection::By { reason, failed_by }
                }
                which => which,
            };
            let count = resolve(&mut store, &which, Resolution::Discard)?;
            format!("{} discarded\n", events(count as u64))
        }
    })
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum FailedError {
    /// The database cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The database refuses.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// There is none of that id.
    #[error("there is no failed event {0}; see `bigchat-sync failed list`")]
    NoSuchEvent(i64),
    /// None has failed for that reason.
    #[error(
        "no event can be retried that failed for exactly this reason; see `bigchat-sync failed list` for the reasons"
    )]
    NoSuchReason,
    /// There is no terminal.
    #[error(
        "this would permanently discard {}, and there is no terminal to ask on; add --yes",
        events(*.count)
    )]
    NoTerminal {
        /// How many are meant.
        count: u64,
    },
    /// The operator did not agree.
    #[error("nothing was discarded")]
    NotConfirmed,
    /// The operator cannot be asked.
    #[error("cannot ask on the terminal: {0}")]
    Terminal(#[from] io::Error),
    /// Some of those named are not failed, or could not be understood and so cannot be retried.
    #[error(
        "{done} of {asked} resolved; the others are not failed events, or still cannot be understood (discard those)"
    )]
    Partly {
        /// How many it was done for.
        done: usize,
        /// How many were named.
        asked: usize,
    },
}

/// Asks on the terminal whether to discard so many events.
fn confirm(count: u64) -> Result<(), FailedError> {
    let input = io::stdin();
    if !input.is_terminal() {
        return Err(FailedError::NoTerminal { count });
    }
    write!(
        io::stderr(),
        "Discard {} permanently? [y/N] ",
        events(count)
    )?;
    let mut answer = String::new();
    input.read_line(&mut answer)?;
    match answer.trim().to_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(FailedError::NotConfirmed),
    }
}

fn resolve(
    store: &mut Store,
    which: &Selection,
    decision: Resolution,
) -> Result<usize, FailedError> {
    let who = Operator::Command(user::of_process());
    let (mut done, mut next) = (0, Some(0));
    while let Some(after) = next {
        let decided = store.resolve_failed(which, decision, &who, after, Millis::now())?;
        done += decided.done;
        next = decided.next;
    }
    match which {
        Selection::Ids(ids) if ids.len() != done => Err(FailedError::Partly {
            done,
            asked: ids.len(),
        }),
        Selection::By {
            reason: Some(_), ..
        } if done == 0 => Err(FailedError::NoSuchReason),
        _ => Ok(done),
    }
}

/// The result of a retry, and why some events are left.
fn retried(count: usize, left: u64, unreadable: u64) -> String {
    let mut text = match (count, left) {
        (0, 0) => "no event has failed".to_owned(),
        (0, _) => "no event can be retried".to_owned(),
        _ => format!(
            "{} will be retried, by the daemon within a second or when it next runs",
            events(count as u64)
        ),
    };
    if unreadable > 0 {
        text += &format!(
            "; {} still cannot be understood (see `bigchat-sync failed list`)",
            events(unreadable)
        );
    }
    text + "\n"
}

/// So many failed events.
fn events(count: u64) -> String {
    match count {
        1 => "1 failed event".to_owned(),
        count => format!("{count} failed events"),
    }
}

fn list(failed: &[FailedEvent], count: u64) -> String {
    if failed.is_empty() {
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
        "attempts",
        "reason",
    ]);
    for event in failed {
        let conversation = event
            .conversation
            .map_or_else(|| "-".to_owned(), |id| id.to_string());
        table.add_row([
            event.id.to_string(),
            conversation,
            event.name.clone(),
            event.at.map_or_else(|| "-".to_owned(), |at| at.to_string()),
            event.failed_at.to_string(),
            event.tries.to_string(),
            printable(&event.reason),
        ]);
    }
    let shown = if (failed.len() as u64) < count {
        format!(", {} shown", failed.len())
    } else {
        String::new()
    };
    format!(
        "{}\n\n{}{shown}; show one with `bigchat-sync failed show ID`, resolve it with `failed retry` or `failed discard`\n",
        table.trim_fmt(),
        events(count)
    )
}

fn show(event: &FailedEvent, attempts: &[FailedAttempt], decisions: &[PastResolution]) -> String {
    let unknown = || "-".to_owned();
    let lines = [
        ("event", event.id.to_string()),
        ("kind", event.name.clone()),
        (
            "conversation",
            event.conversation.map_or_else(unknown, |id| id.to_string()),
        ),
        ("chat", event.chat.clone().unwrap_or_else(unknown)),
        (
            "happened at",
            event.at.map_or_else(unknown, |at| at.to_string()),
        ),
        ("failed at", event.failed_at.to_string()),
        ("attempts", event.tries.to_string()),
        ("reason", event.reason.clone()),
        ("data", event.data.clone().unwrap_or_else(unknown)),
        ("request", event.request.clone().unwrap_or_else(unknown)),
        ("response", event.response.clone().unwrap_or_else(unknown)),
    ];
    let lines = lines
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value));
    let attempts = attempts.iter().map(|attempt| {
        let FailedAttempt {
            at,
            reason,
            response,
            ..
        } = attempt;
        (
            format!("attempt {}", attempt.number),
            format!("{at}  {reason}: {response}"),
        )
    });
    let decisions = decisions.iter().map(|past| {
        let text = format!("{}  {} by {}", past.at, past.decision, past.by);
        ("resolved".to_owned(), text)
    });
    lines
        .chain(attempts)
        .chain(decisions)
        .map(|(name, value)| format!("{name:<13}{}\n", printable(&value)))
        .collect()
}
