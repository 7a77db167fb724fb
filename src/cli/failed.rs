//! `bigchat-sync failed`: what has failed and why, and what somebody decides about it.

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

/// How many decisions about an event are shown, the latest ones.
const SHOWN: i64 = 10;

/// What can be done about failed events.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List them, the oldest first.
    List {
        /// How many at the most.
        #[arg(long, default_value_t = 100, value_parser = number::<u32>, allow_hyphen_values = true)]
        limit: u32,
    },
    /// Show one whole: what BigChat told, what was asked and answered.
    Show {
        /// Its id, as listed.
        #[arg(value_parser = number::<i64>)]
        id: i64,
    },
    /// Have them tried again: as safe as the first try.
    Retry(Which),
    /// Give them up: they are never tried again. Asks before it discards by --reason or --all.
    Discard {
        /// Which ones.
        #[command(flatten)]
        which: Which,
        /// Do not ask. Needed where there is no terminal to ask on.
        #[arg(long)]
        yes: bool,
    },
}

/// Which failed events.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Which {
    /// Those of these ids.
    #[arg(value_parser = number::<i64>)]
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

/// Does something about failed events. Returns what to print.
///
/// # Errors
///
/// When the database cannot be opened or refuses.
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
                // Whoever names ids knows how many there are.
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
    /// None has failed for that reason.
    #[error(
        "no event has failed for exactly this reason, or those that did still cannot be understood; `bigchat-sync failed list` tells the reasons"
    )]
    NoSuchReason,
    /// There is nobody to ask.
    #[error(
        "this would discard {count} failed events, for good, and there is no terminal to ask on: add --yes"
    )]
    NoTerminal {
        /// How many are meant.
        count: u64,
    },
    /// The operator did not agree.
    #[error("nothing was discarded")]
    NotConfirmed,
    /// The operator cannot be asked.
    #[error("the terminal cannot be read: {0}")]
    Terminal(#[from] io::Error),
    /// Some of those named are not failed, or could not be understood and so cannot be retried.
    #[error(
        "done for {done} of {asked}: the others are not failed events, or still cannot be understood; those can be discarded"
    )]
    Partly {
        /// How many it was done for.
        done: usize,
        /// How many were named.
        asked: usize,
    },
}

/// Asks on the terminal whether so many events are to be discarded.
fn confirm(count: u64) -> Result<(), FailedError> {
    let input = io::stdin();
    if !input.is_terminal() {
        return Err(FailedError::NoTerminal { count });
    }
    let events = if count == 1 { "event" } else { "events" };
    write!(
        io::stderr(),
        "Discard {count} failed {events}, for good? [y/N] "
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

/// What a retry came to, and why some events are left.
fn retried(count: usize, left: u64, unreadable: u64) -> String {
    let mut text = format!("{count} to be tried again");
    if count > 0 {
        text += ": by the daemon within a second, or when it next runs";
    } else if left == 0 {
        text += ": no event has failed";
    }
    if unreadable > 0 {
        text += &format!(
            "; {unreadable} could not be understood, and still cannot (`bigchat-sync failed list` shows them)"
        );
    }
    text + "\n"
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
            event.at.map_or_else(|| "-".to_owned(), |at| at.to_string()),
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
        ("tries", event.tries.to_string()),
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
        ("decided".to_owned(), text)
    });
    lines
        .chain(attempts)
        .chain(decisions)
        .map(|(name, value)| format!("{name:<13}{}\n", printable(&value)))
        .collect()
}
