//! `bigchat-sync resolutions`: lists who resolved which failed event.

use std::path::Path;

use serde_json::json;

use super::table::{Row, table};
use super::{CommandError, json};
use crate::journal::Store;
use crate::settings::at_least_one;

/// What to list.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Maximum number of rows.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = at_least_one, allow_hyphen_values = true)]
    limit: u32,

    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// Returns what to print.
pub fn run(db: &Path, args: &Args) -> Result<String, CommandError> {
    let mut store = Store::open_reader(db)?;
    let resolutions = store.resolutions(None, None, i64::from(args.limit))?;
    if args.json {
        return Ok(json::text(&json!({ "resolutions": resolutions }))?);
    }
    if resolutions.is_empty() {
        return Ok("no failed event has been resolved yet\n".to_owned());
    }
    let rows = resolutions.into_iter().map(|resolution| Row {
        cells: [
            resolution.at.to_string(),
            resolution.resolution.to_string(),
            resolution.event.to_string(),
            resolution.kind,
            resolution
                .conversation
                .map_or_else(|| "-".to_owned(), |id| id.to_string()),
            resolution.by,
            resolution.reason,
        ],
        text: None,
    });
    let header = [
        "at",
        "resolution",
        "event",
        "kind",
        "conversation",
        "by",
        "reason for the failure",
    ];
    Ok(table(header, &rows.collect::<Vec<_>>()))
}
