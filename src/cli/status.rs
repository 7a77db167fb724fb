//! `bigchat-sync status`: prints the [`Status`].

use super::{CommandError, json};
use crate::domain::time::Millis;
use crate::http::{ApiState, ApiStatus};
use crate::journal::{DifferingChat, Gap, Store, Verification};
use crate::settings::Settings;
use crate::status::{Problem, Status, duration, seconds, stored_seconds};
use crate::telemetry::terminal::{printable, shown};

/// Why a field may differ from the value that this database recorded.
const CHANGED: &str =
    "changed by another client, or after the backup if this database was restored from one";

/// The options.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Print one JSON object, for programs.
    #[arg(long)]
    pub json: bool,
}

/// What `bigchat-sync status` prints, and whether there is no problem.
pub fn run(args: &Args, settings: &Settings) -> Result<(String, bool), CommandError> {
    let db = &settings.db();
    let mut store = Store::open_reader(db)?;
    let status = Status::read(&mut store, db.clone(), Millis::now())?;
    let text = if args.json {
        json::text(&status)?
    } else {
        text(&status)
    };
    Ok((text, status.healthy))
}

fn text(status: &Status) -> String {
    let Status { figures, now, .. } = status;
    let ago = |at: Millis| format!("{} ago", duration(now.since(at)));
    let mut lines = vec![
        format!(
            "bigchat-sync {} on {} ({:.1} MB)",
            status.version,
            shown(&status.database.path),
            mega(status.database.size_bytes)
        ),
        String::new(),
    ];
    let mut line =
        |name: &str, value: String| lines.push(format!("{name:<14}{}", printable(&value)));
    let daemon = if status.daemon_runs {
        "running"
    } else {
        "not running"
    };
    line("daemon", daemon.into());
    for (name, status) in [("BigChat", &figures.bigchat), ("OurAPI", &figures.our_api)] {
        line(name, api(status, &ago));
        if let Some(limit) = status.rate_limit {
            line("", format!("rate-limited {limit}"));
        }
    }
    let behind = figures.behind_s.map_or_else(String::new, |behind| {
        format!(", {} behind BigChat", duration(seconds(behind)))
    });
    let polled = figures.polled_at.map_or_else(|| "never".into(), ago);
    line("last poll", format!("{polled}{behind}"));
    let newest = figures.newest_event_at;
    line(
        "newest event",
        newest.map_or_else(|| "none yet".into(), |at| at.to_string()),
    );
    for Gap { from, until, .. } in &figures.gaps {
        line(
            "lost",
            format!("events from {from} to {until}; BigChat no longer reports them"),
        );
    }
    if let Some(pause) = figures.paused {
        line(
            "deliveries",
            format!("{pause}; `bigchat-sync resume` ends the pause"),
        );
    }
    let oldest = figures.oldest_waiting.as_ref();
    let since = oldest.map_or_else(String::new, |oldest| {
        format!(", the oldest for {}", duration(now.since(oldest.since)))
    });
    line("waiting", format!("{}{since}", figures.waiting));
    line("failed", figures.failed.to_string());
    for group in &figures.failed_by_reason {
        line("", format!("{} × {}", group.count, group.reason));
    }
    line(
        "per minute",
        format!(
            "{:.1} received, {:.1} delivered, over the last 5 minutes",
            figures.received_per_minute, figures.delivered_per_minute
        ),
    );
    if let Some(times) = figures.delivery_ms {
        line(
            "delivery",
            format!(
                "median {}, p95 {}, max {}",
                millis(times.median),
                millis(times.p95),
                millis(times.max)
            ),
        );
    }
    if figures.rebuilding > 0 {
        line(
            "rebuilding",
            match figures.rebuilding {
                1 => "1 chat to be verified".to_owned(),
                count => format!("{count} chats to be verified"),
            },
        );
    }
    if figures.losses > 0 {
        line(
            "losses",
            format!(
                "of data in OurAPI: {}, of them within the last hour: {}",
                figures.losses, figures.recent_losses
            ),
        );
    }
    line("verification", verification(status));
    for chat in &figures.differing {
        let DifferingChat {
            external_id,
            drift,
            missing,
        } = chat;
        let lost = missing
            .as_ref()
            .map(|missing| format!("OurAPI has lost {missing}; not restored"));
        let drift = drift.as_ref().map(|drift| format!("{drift} was {CHANGED}"));
        let what: Vec<String> = lost.into_iter().chain(drift).collect();
        line("", format!("chat {external_id}: {}", what.join("; ")));
    }
    lines.push(String::new());
    if status.healthy {
        lines.push(match figures.paused {
            Some(_) => "no problems; deliveries are paused".into(),
            None => "no problems".into(),
        });
    }
    for Problem { what, remedy } in &status.problems {
        lines.push(format!("! {}\n  → {remedy}", printable(what)));
    }
    lines.push(String::new());
    lines.join("\n")
}

/// The progress of the verification of all chats in idle time, and what it or `verify` found.
fn verification(status: &Status) -> String {
    let figures = &status.figures;
    let found = [
        (figures.incomplete, "not complete in OurAPI"),
        (figures.drifted, CHANGED),
    ];
    let found = found.into_iter().filter(|(count, _)| *count > 0);
    let found = found.map(|(count, what)| format!("; {count} {what}"));
    idle_pass(status) + &found.collect::<String>()
}

/// The progress of the verification of all chats in idle time.
fn idle_pass(status: &Status) -> String {
    let Status { figures, now, .. } = status;
    let Some(every) = figures.verify_every_s.map(stored_seconds) else {
        return "off".into();
    };
    let Some(Verification {
        began_at,
        ended_at,
        verified,
        left,
    }) = figures.verification
    else {
        return "not begun yet".into();
    };
    let took = ended_at.unwrap_or(*now).since(began_at);
    // The very first pass only begins the period.
    if ended_at.is_some() && verified == 0 && left == 0 {
        return format!("none yet; the first begins at {}", began_at.plus(every));
    }
    let mut text = match ended_at {
        Some(ended_at) => format!(
            "{verified} chats in {}, {} ago",
            duration(took),
            duration(now.since(ended_at))
        ),
        None => format!(
            "{verified} of {} chats, running for {}",
            verified + left,
            duration(took)
        ),
    };
    if took > every {
        text += &format!("; longer than --verify-every, {}", duration(every));
    }
    text
}

/// In milliseconds, or in seconds if there are many.
fn millis(ms: i64) -> String {
    match ms {
        10_000.. => format!("{:.1} s", ms as f64 / 1e3),
        _ => format!("{ms} ms"),
    }
}

fn mega(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn api(api: &ApiStatus, ago: &impl Fn(Millis) -> String) -> String {
    let ApiStatus {
        state,
        since,
        asked_at,
        request,
        response,
        ..
    } = api;
    let (Some(asked_at), Some(request), Some(response)) = (asked_at, request, response) else {
        return api.to_string();
    };
    let since = since.map_or_else(String::new, |since| format!(" since {since}"));
    let note = match state {
        ApiState::Failing => " (not yet counted as down)",
        _ => "",
    };
    format!(
        "{}{since}{note}; {}: {request} → {response}",
        api.state_in_words(),
        ago(*asked_at)
    )
}
