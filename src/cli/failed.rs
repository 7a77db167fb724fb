//! `bigchat-sync failed`: dead letters, why they failed, and how the operator resolves them.

use std::path::Path;

use serde::Serialize;
use serde_json::json;

use super::table::{Row, table};
use super::{CommandError, confirm, joined, json};
use crate::domain::ids::EventId;
use crate::domain::time::Millis;
use crate::journal::{
    FailedAttempt, FailedEvent, Operator, PastResolution, Reason, Resolution, Selection, Store,
};
use crate::settings::{at_least_one, number};
use crate::telemetry::terminal::printable;
use crate::user;

/// How many of an event's latest resolutions are shown.
const SHOWN: i64 = 10;

/// The commands for dead letters.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List dead letters with their texts, oldest first.
    List {
        /// Maximum number of rows.
        #[arg(long, value_name = "N", default_value_t = 100, value_parser = at_least_one, allow_hyphen_values = true)]
        limit: u32,
        /// Only events whose reason contains this text.
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
        /// Print one JSON object instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Show a dead letter, open or discarded, with its data, requests and responses.
    Show {
        /// Id of the event: `failed list` has those of open events, `resolutions` those of discarded ones.
        #[arg(value_name = "ID", value_parser = number::<i64>)]
        id: i64,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Deliver dead letters again; a retry is as safe as the first attempt.
    Retry(Which),
    /// Discard dead letters, so that they are never sent. Asks for confirmation with --reason or --all.
    Discard {
        #[command(flatten)]
        which: Which,
        /// Do not ask for confirmation. Required with --reason or --all if there is no terminal.
        #[arg(long)]
        yes: bool,
    },
    /// Reopen discarded events that have not been dropped yet (see --retention). They then need action again.
    Undo(Which),
}

/// Which dead letters.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Which {
    /// Ids of the events: `failed list` has those of open events, `resolutions` those of discarded ones (for `undo`).
    #[arg(value_name = "ID", value_parser = number::<i64>)]
    ids: Vec<i64>,
    /// All events whose reason contains this text.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// All events.
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
            } => Self::Ids(ids.into_iter().map(EventId).collect()),
            Which { reason, .. } => Self::By {
                reason: reason.map(Reason::Contains),
                failed_by: Millis(i64::MAX),
            },
        }
    }
}

/// Runs a command for failed events. Returns what to print.
///
/// # Errors
///
/// If the database cannot be opened, read or written.
pub fn run(db: &Path, command: Command) -> Result<String, CommandError> {
    let mut store = match command {
        Command::List { .. } | Command::Show { .. } => Store::open_reader(db)?,
        Command::Retry(_) | Command::Discard { .. } | Command::Undo(_) => Store::open_shared(db)?,
    };
    Ok(match command {
        Command::List {
            limit,
            reason,
            json,
        } => {
            let reason = reason.map(Reason::Contains);
            let events = store.failed(limit, reason.as_ref())?;
            let (total, _) = store.failed_so_far(reason.as_ref(), Resolution::Retry)?;
            match json {
                true => json::text(&json!({ "total": total, "events": events }))?,
                false => list(&events, total, reason.is_some()),
            }
        }
        Command::Show { id, json } => {
            let event = store
                .failed_event(EventId(id))?
                .ok_or(CommandError::NoSuchEvent(id))?;
            let shown = Shown {
                event,
                failures: store.failed_attempts(EventId(id))?,
                resolutions: store.resolutions(Some(EventId(id)), None, SHOWN)?,
            };
            match json {
                true => json::text(&shown)?,
                false => show(&shown),
            }
        }
        Command::Retry(which) => {
            let count = resolve(&mut store, &which.into(), Resolution::Retry)?;
            let unreadable = store.count_unreadable()?;
            retried(count, store.count_failed()?, unreadable)
        }
        Command::Discard { which, yes } => {
            let which = match which.into() {
                // A list of ids needs no confirmation.
                Selection::By { reason, .. } if !yes => {
                    let (count, failed_by) =
                        store.failed_so_far(reason.as_ref(), Resolution::Discard)?;
                    if count > 0 {
                        let what = events(count);
                        confirm(
                            &format!("Discard {what}?"),
                            &format!("discard {what}"),
                            "nothing was discarded",
                        )?;
                    }
                    // An event that failed after the question is not included.
                    Selection::By { reason, failed_by }
                }
                which => which,
            };
            let count = resolve(&mut store, &which, Resolution::Discard)?;
            format!("{} discarded\n", events(count as u64))
        }
        Command::Undo(which) => {
            let count = resolve(&mut store, &which.into(), Resolution::Undo)?;
            format!("{} reopened\n", events(count as u64))
        }
    })
}

/// An event with its history.
#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    event: FailedEvent,
    /// The last one first.
    failures: Vec<FailedAttempt>,
    /// The latest one first.
    resolutions: Vec<PastResolution>,
}

/// The other named events, and why they could not be resolved.
pub(super) fn others(left: &[EventId], resolution: Resolution) -> String {
    let ids = joined(left);
    match (resolution, left.len()) {
        (Resolution::Retry, 1) => format!(
            "{ids}: it is not a failed event, or it still cannot be parsed (then discard it)"
        ),
        (Resolution::Retry, _) => format!(
            "{ids}: they are not failed events, or they still cannot be parsed (then discard them)"
        ),
        (Resolution::Discard, 1) => format!("{ids}: it is not a failed event"),
        (Resolution::Discard, _) => format!("{ids}: they are not failed events"),
        (Resolution::Undo, 1) => {
            format!(
                "{ids}: it is not a discarded event, or it has already been dropped (--retention)"
            )
        }
        (Resolution::Undo, _) => {
            format!(
                "{ids}: they are not discarded events, or they have already been dropped (--retention)"
            )
        }
    }
}

fn resolve(
    store: &mut Store,
    which: &Selection,
    resolution: Resolution,
) -> Result<usize, CommandError> {
    let who = Operator::Command(user::of_process());
    let (mut done, mut left, mut next) = (0, Vec::new(), Some(EventId(0)));
    while let Some(after) = next {
        let resolved = store.resolve_failed(which, resolution, &who, after, Millis::now())?;
        done += resolved.done;
        left.extend(resolved.left);
        next = resolved.next;
    }
    match which {
        Selection::Ids(ids) if ids.len() != done => Err(CommandError::Partly {
            done,
            asked: ids.len(),
            left,
            resolution,
        }),
        Selection::By {
            reason: Some(_), ..
        } if done == 0 => Err(CommandError::NoSuchReason),
        _ => Ok(done),
    }
}

/// The result of a retry, and why some events are left.
fn retried(count: usize, left: u64, unreadable: u64) -> String {
    let mut text = match (count, left) {
        (0, 0) => "no event has failed".to_owned(),
        (0, _) => "no event can be retried".to_owned(),
        _ => format!(
            "{} will be retried: within a second, or when the daemon next runs",
            events(count as u64)
        ),
    };
    if unreadable > 0 {
        text += &format!(
            "; {} still cannot be parsed (see `bigchat-sync failed list`)",
            events(unreadable)
        );
    }
    text + "\n"
}

/// A count of failed events.
fn events(count: u64) -> String {
    match count {
        1 => "1 failed event".to_owned(),
        count => format!("{count} failed events"),
    }
}

fn list(failed: &[FailedEvent], total: u64, is_filtered: bool) -> String {
    match (failed.is_empty(), is_filtered) {
        (false, _) => {}
        (true, false) => return "no event has failed\n".to_owned(),
        (true, true) => return "no failed event has a reason with this text\n".to_owned(),
    }
    let unknown = || "-".to_owned();
    let rows = failed.iter().map(|event| Row {
        cells: [
            event.id.to_string(),
            event.conversation.map_or_else(unknown, |id| id.to_string()),
            event.kind.clone(),
            event.event_at.map_or_else(unknown, |at| at.to_string()),
            event.failed_at.to_string(),
            event.attempts.to_string(),
            event.reason.clone(),
        ],
        text: event.text.clone(),
    });
    let header = [
        "id",
        "conversation",
        "event",
        "at",
        "failed at",
        "attempts",
        "reason",
    ];
    let shown = match (failed.len() as u64) < total {
        true => format!(", {} shown", failed.len()),
        false => String::new(),
    };
    format!(
        "{}\n{}{shown}; show one with `bigchat-sync failed show ID`, resolve it with `failed retry` or `failed discard`\n",
        table(header, &rows.collect::<Vec<_>>()),
        events(total)
    )
}

fn show(shown: &Shown) -> String {
    let Shown {
        event,
        failures,
        resolutions,
    } = shown;
    let unknown = || "-".to_owned();
    let mut lines = vec![
        ("event", event.id.to_string()),
        ("kind", event.kind.clone()),
        (
            "conversation",
            event.conversation.map_or_else(unknown, |id| id.to_string()),
        ),
        ("chat", event.chat_id.clone().unwrap_or_else(unknown)),
        (
            "happened at",
            event.event_at.map_or_else(unknown, |at| at.to_string()),
        ),
        ("failed at", event.failed_at.to_string()),
    ];
    if let Some(at) = event.discarded_at {
        let discarded = match (event.conversation, &event.data) {
            // Nothing else identifies an event that could not be parsed.
            (None, None) => format!("{at}; its text was erased"),
            _ => format!("{at}; `bigchat-sync failed undo {}` reopens it", event.id),
        };
        lines.push(("discarded at", discarded));
    }
    lines.extend([
        ("attempts", event.attempts.to_string()),
        ("reason", event.reason.clone()),
        ("data", event.data.clone().unwrap_or_else(unknown)),
        ("request", event.request.clone().unwrap_or_else(unknown)),
        ("response", event.response.clone().unwrap_or_else(unknown)),
    ]);
    let lines = lines
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value));
    let failures = failures.iter().map(|failure| {
        let FailedAttempt {
            attempt,
            failed_at,
            reason,
            response,
            ..
        } = failure;
        (
            format!("attempt {attempt}"),
            format!("{failed_at}  {reason}: {response}"),
        )
    });
    let resolutions = resolutions.iter().map(|past| {
        let text = format!("{}  {} by {}", past.at, past.resolution, past.by);
        ("resolved".to_owned(), text)
    });
    lines
        .chain(failures)
        .chain(resolutions)
        .map(|(name, value)| format!("{name:<13}{}\n", printable(&value)))
        .collect()
}
