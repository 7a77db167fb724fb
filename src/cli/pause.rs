//! `bigchat-sync pause` and `resume` work through the database, whether or not a daemon is running.

use std::path::Path;
use std::time::Duration;

use super::CommandError;
use crate::domain::pause::Pause;
use crate::domain::time::Millis;
use crate::journal::Store;
use crate::settings::positive;

/// For how long.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Length of the pause, such as 1h [default: until `bigchat-sync resume`].
    #[arg(long = "for", value_name = "TIME", allow_hyphen_values = true, value_parser = positive)]
    length: Option<Duration>,
}

/// Pauses deliveries. Returns what to print.
pub fn pause(args: &Args, db: &Path) -> Result<String, CommandError> {
    let mut store = Store::open_shared(db)?;
    let pause = Pause::begin(args.length, Millis::now());
    store.set_pause(pause)?;
    let daemon = match store.is_in_use() {
        // `verify` may be in its place, and does not poll.
        true => "a running daemon continues to poll",
        false => "no daemon is running; the pause applies when one starts",
    };
    Ok(format!("deliveries are {pause}; {daemon}\n"))
}

/// Resumes deliveries. Returns what to print.
pub fn resume(db: &Path) -> Result<String, CommandError> {
    let mut store = Store::open_shared(db)?;
    let now = Millis::now();
    Ok(match store.pause()? {
        Some(pause) if pause.left(now).is_some() => {
            store.end_pause(pause, now)?;
            format!(
                "deliveries resume; they had been paused since {}\n",
                pause.since
            )
        }
        _ => "deliveries are not paused\n".to_owned(),
    })
}
