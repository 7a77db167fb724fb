//! `bigchat-sync export`: the events delivered in a period, for other programs.

use std::io::{self, BufWriter, Write};
use std::path::Path;

use super::CommandError;
use crate::domain::time::Millis;
use crate::journal::{Position, Store};
use crate::settings::point_in_time;

/// Which deliveries.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Delivered at this time or later, RFC 3339 such as 2026-11-22T22:00:00Z.
    #[arg(long, required = true, value_name = "TIME", allow_hyphen_values = true, value_parser = point_in_time)]
    since: Millis,

    /// Delivered before this time [default: now].
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, value_parser = point_in_time)]
    until: Option<Millis>,
}

/// Writes one JSON object per line.
pub fn run(db: &Path, args: &Args, out: &mut impl Write) -> Result<(), CommandError> {
    let mut store = Store::open_reader(db)?;
    let until = args.until.unwrap_or_else(Millis::now);
    if until <= args.since {
        return Err(CommandError::EmptyPeriod);
    }
    let mut out = BufWriter::new(out);
    let mut position = Position::before(args.since);
    while let Some((next, events)) = store.delivered_after(position, until)? {
        position = next;
        for event in &events {
            let mut line = serde_json::to_vec(event)?;
            line.push(b'\n');
            if !written(out.write_all(&line))? {
                return Ok(());
            }
        }
    }
    written(out.flush()).map(drop)
}

/// Whether the line was written; `false`: the reader has closed the pipe.
fn written(result: io::Result<()>) -> Result<bool, CommandError> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(CommandError::Output(error)),
    }
}
