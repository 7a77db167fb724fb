//! How things stand, and whether all is well: `bigchat-sync status`, and what the console and the metrics show of it.
//!
//! It all comes from the journal, whether or not the daemon runs, and asks nobody anything. `problems` decides what is
//! not well and says what to do about it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Serialize, Serializer};
use thiserror::Error;

use crate::domain::time::{Millis, Timestamp};
use crate::http::{Api, ApiStatus};
use crate::journal::{Figures, Gap, JournalError, OpenError, Store};
use crate::telemetry::terminal::{printable, shown};

/// How long no poll may have come to its end, in poll intervals; at least [`STALE`].
const INTERVALS: u32 = 6;

/// How long no poll may have come to its end, BigChat's clock may be ahead of what was read, and an event may wait.
const STALE: Duration = Duration::from_secs(120);

/// What to show.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// As one JSON object, for programs.
    #[arg(long)]
    pub json: bool,
}

/// How things stand.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    /// Of this program.
    pub version: &'static str,
    /// This machine's clock.
    pub now: Millis,
    /// Whether a daemon works on the database.
    pub daemon_runs: bool,
    /// Whether there is nothing to be done by anybody.
    pub well: bool,
    /// What is not well, the gravest first.
    pub problems: Vec<Problem>,
    /// The database.
    pub database: Database,
    /// What the journal tells.
    #[serde(flatten)]
    pub figures: Figures,
}

/// The database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Database {
    /// Where it is.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// How large it is, with its write-ahead log, in bytes.
    pub bytes: u64,
}

/// Something that is not well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// What it is.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
}

/// Why there is no status.
#[derive(Debug, Error)]
pub enum StatusError {
    /// The database cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The database refuses.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// It cannot be written as JSON.
    #[error("it cannot be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// What `bigchat-sync status` prints, and whether all is well.
pub fn run(args: &Args, db: &Path, poll_interval: Duration) -> Result<(String, bool), StatusError> {
    let mut store = Store::open_reader(db)?;
    let status = Status::read(&mut store, db, poll_interval, Millis::now())?;
    let text = if args.json {
        format!("{}\n", serde_json::to_string_pretty(&status)?)
    } else {
        text(&status)
    };
    Ok((text, status.well))
}

impl Status {
    /// Reads it from the journal. `poll_interval` is the setting, which tells how long no poll is too long.
    pub fn read(
        store: &mut Store,
        db: &Path,
        poll_interval: Duration,
        now: Millis,
    ) -> Result<Self, JournalError> {
        let figures = store.figures(now)?;
        let daemon_runs = store.is_in_use();
        let problems = problems(&figures, daemon_runs, poll_interval, now);
        Ok(Self {
            version: env!("CARGO_PKG_VERSION"),
            now,
            daemon_runs,
            well: problems.is_empty(),
            problems,
            database: Database {
                path: db.to_owned(),
                bytes: store.bytes(),
            },
            figures,
        })
    }
}

/// JSON has no bytes that are not UTF-8.
fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

/// What is not well, the gravest first.
fn problems(
    figures: &Figures,
    daemon_runs: bool,
    poll_interval: Duration,
    now: Millis,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut trouble = |what: String, remedy: &str| {
        problems.push(Problem {
            what,
            remedy: remedy.to_owned(),
        });
    };
    if !daemon_runs {
        trouble(
            "no daemon works on this database".into(),
            "start it (`systemctl start bigchat-sync`, or `bigchat-sync run` with the same --db)",
        );
    }
    for (api, status) in [
        (Api::BigChat, &figures.bigchat),
        (Api::OurApi, &figures.our_api),
    ] {
        if status.up == Some(false) {
            let since = status.since.unwrap_or_default();
            let why = status.trouble.as_deref().unwrap_or("it does not answer");
            let remedy = match (status.lasts, api) {
                (true, _) => {
                    "this does not end by itself: correct what the reason names; until then requests wait, and nothing is lost".to_owned()
                }
                (false, Api::BigChat) => format!(
                    "an outage ends by itself, and what happened meanwhile is read then; if {api} is up, check {}",
                    api.url_setting()
                ),
                (false, Api::OurApi) => format!(
                    "an outage ends by itself, and everything waits meanwhile; if {api} is up, check {}",
                    api.url_setting()
                ),
            };
            trouble(format!("{api} is down since {since}: {why}"), &remedy);
        }
    }
    let stale = STALE.max(poll_interval.saturating_mul(INTERVALS));
    match figures.polled_at {
        None => trouble(
            "BigChat was never read to the end yet".into(),
            "wait for the first poll; if it stays so, the log says why",
        ),
        Some(at) if now.since(at) > stale => trouble(
            format!("BigChat was last read to the end at {at}"),
            "nothing new arrives: start the daemon if it does not run; else see BigChat's state above, or the log",
        ),
        Some(_)
            if figures
                .behind_s
                .is_some_and(|behind| seconds(behind) > stale) =>
        {
            trouble(
                format!(
                    "what is read of BigChat is {} behind",
                    duration(seconds(figures.behind_s.unwrap_or_default()))
                ),
                "it catches up by itself; if that stops getting less, see BigChat's state",
            )
        }
        Some(at)
            if figures
                .cursor_moved_at
                .is_some_and(|moved| at.since(moved) > stale) =>
        {
            let moved = figures.cursor_moved_at.unwrap_or_default();
            trouble(
                format!(
                    "BigChat's time has stood still for {} while polls complete",
                    duration(at.since(moved))
                ),
                "a cache may answer in BigChat's place: have it pass on requests with `cache-control: no-cache`",
            )
        }
        Some(_) => {}
    }
    if let Some(oldest) = &figures.oldest_waiting
        && now.since(oldest.at) > STALE
    {
        let why = oldest.reason.as_deref().unwrap_or("it was not tried yet");
        trouble(
            format!(
                "a {} of conversation {} waits for {}: {why}",
                oldest.kind,
                oldest.conversation,
                duration(now.since(oldest.at))
            ),
            "it is tried again by itself; if OurAPI is up and this stays, it goes to the failed events",
        );
    }
    if figures.failed > 0 {
        trouble(
            match figures.failed {
                1 => "1 failed event waits for somebody to decide".into(),
                count => format!("{count} failed events wait for somebody to decide"),
            },
            "see why with `bigchat-sync failed list` or in the console; then retry them, or discard them",
        );
    }
    problems
}

fn seconds(count: i64) -> Duration {
    Duration::from_secs(u64::try_from(count).unwrap_or_default())
}

/// As people say it, to the second; the larger, the coarser.
fn duration(duration: Duration) -> String {
    let seconds = match duration.as_secs() {
        seconds if seconds >= 172_800 => seconds / 3600 * 3600,
        seconds if seconds >= 7_200 => seconds / 60 * 60,
        seconds => seconds,
    };
    humantime::format_duration(Duration::from_secs(seconds)).to_string()
}

fn text(status: &Status) -> String {
    let Status { figures, now, .. } = status;
    let ago = |at: Millis| format!("{} ago", duration(now.since(at)));
    let mut lines = vec![
        format!(
            "bigchat-sync {} on {} ({:.1} MB)",
            status.version,
            shown(&status.database.path),
            mega(status.database.bytes)
        ),
        String::new(),
    ];
    let mut line =
        |name: &str, value: String| lines.push(format!("{name:<14}{}", printable(&value)));
    let runs = if status.daemon_runs {
        "runs"
    } else {
        "does not run"
    };
    line("daemon", runs.into());
    line("BigChat", api(&figures.bigchat, &ago));
    line("OurAPI", api(&figures.our_api, &ago));
    let behind = figures.behind_s.map_or_else(String::new, |behind| {
        format!(", {} behind BigChat", duration(seconds(behind)))
    });
    let polled = figures.polled_at.map_or_else(|| "never".into(), ago);
    line("last poll", format!("{polled}{behind}"));
    let newest = figures.newest_event_s.map(Timestamp::clamped);
    line(
        "newest event",
        newest.map_or_else(|| "none yet".into(), |at| at.to_string()),
    );
    for Gap { from, until, .. } in &figures.gaps {
        line(
            "lost",
            format!("what happened from {from} to {until}: BigChat no longer reports it"),
        );
    }
    let oldest = figures.oldest_waiting.as_ref();
    let since = oldest.map_or_else(String::new, |oldest| {
        format!(", the oldest for {}", duration(now.since(oldest.at)))
    });
    line("waiting", format!("{}{since}", figures.waiting));
    line("failed", figures.failed.to_string());
    for group in &figures.failed_by_reason {
        line("", format!("{} × {}", group.count, group.reason));
    }
    line(
        "a minute",
        format!(
            "{:.1} told, {:.1} delivered, over the last five",
            figures.told_per_minute, figures.delivered_per_minute
        ),
    );
    if let Some(times) = figures.delivery_ms {
        line(
            "delivery",
            format!(
                "half within {} ms, 95 of 100 within {} ms, the slowest in {} ms",
                times.median, times.p95, times.max
            ),
        );
    }
    if figures.rebuilding > 0 {
        line(
            "rebuilding",
            format!("{} chats to be verified", figures.rebuilding),
        );
    }
    lines.push(String::new());
    if status.well {
        lines.push("all is well".into());
    }
    for Problem { what, remedy } in &status.problems {
        lines.push(format!("! {}\n  → {remedy}", printable(what)));
    }
    lines.push(String::new());
    lines.join("\n")
}

#[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
fn mega(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn api(api: &ApiStatus, ago: &impl Fn(Millis) -> String) -> String {
    let ApiStatus {
        up,
        since,
        asked_at,
        request,
        response,
        ..
    } = api;
    let (Some(asked_at), Some(request), Some(response)) = (asked_at, request, response) else {
        return "not asked yet".into();
    };
    let state = match up {
        Some(true) => "up",
        Some(false) => "down",
        None => "not sure",
    };
    let since = since.map_or_else(String::new, |since| format!(" since {since}"));
    format!("{state}{since}; {}: {request} → {response}", ago(*asked_at))
}
