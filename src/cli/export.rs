//! `bigchat-sync export`: what was delivered in a period, for other programs.

use std::io::{self, BufWriter, Write};
use std::path::Path;

use clap::{Arg, ArgMatches, FromArgMatches};

use super::CommandError;
use crate::domain::time::Millis;
use crate::journal::{Position, Store};
use crate::settings::{millis, timestamp};

const SINCE: &str = "since";
const UNTIL: &str = "until";

/// Which deliveries.
#[derive(Debug)]
pub struct Args {
    since: Millis,
    until: Option<Millis>,
}

/// Not derived, because `since` replaces the daemon's setting and must have its type, which has whole seconds. The
/// milliseconds are read from the text.
impl clap::Args for Args {
    fn augment_args(command: clap::Command) -> clap::Command {
        let time = |name| {
            let time = Arg::new(name).long(name).value_name("TIME");
            time.allow_hyphen_values(true).value_parser(timestamp)
        };
        command
            .arg(
                time(SINCE)
                    .required(true)
                    .help("Delivered at this time or later, RFC 3339 such as 2026-11-22T22:00:00Z"),
            )
            .arg(time(UNTIL).help("Delivered before this time [default: now]"))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Args {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let time = |name| millis(matches.get_raw(name)?.next()?.to_str()?).ok();
        Ok(Self {
            // It is required, and was parsed.
            since: time(SINCE).unwrap_or_default(),
            until: time(UNTIL),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Writes one JSON object a line.
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
