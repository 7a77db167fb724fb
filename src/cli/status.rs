//! `bigchat-sync status`: prints the [`Status`].

use super::table::counted;
use super::{CommandError, json};
use crate::domain::time::Millis;
use crate::http::{ApiState, ApiStatus};
use crate::journal::{Denial, DifferingChat, Gap, Store, Verification, WithoutAgent};
use crate::settings::Settings;
use crate::status::{Problem, Status, duration, seconds, stored_seconds};
use crate::telemetry::terminal::{printable, shown};

/// Why a field may differ from the value that this database recorded.
const CHANGED: &str = "changed by another client or, if this database is a restored backup, after the backup was made";

/// The options.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Print one JSON object, for programs.
    #[arg(long)]
    pub json: bool,
}

/// Returns what `bigchat-sync status` prints, and whether there is no problem.
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
    let mut text = Text {
        status,
        lines: Vec::new(),
    };
    text.database();
    text.apis();
    text.polling();
    text.queue();
    text.verification();
    text.without_agent();
    text.verdict();
    text.lines.join("\n")
}

/// The text, built section by section.
struct Text<'a> {
    status: &'a Status,
    lines: Vec<String>,
}

impl Text<'_> {
    fn line(&mut self, name: &str, value: impl AsRef<str>) {
        let value = printable(value.as_ref());
        self.lines.push(format!("{name:<14}{value}"));
    }

    fn database(&mut self) {
        let Status {
            version,
            database,
            daemon_runs,
            ..
        } = self.status;
        let (path, size) = (shown(&database.path), mega(database.size_bytes));
        self.lines
            .push(format!("bigchat-sync {version} on {path} ({size:.1} MB)"));
        self.lines.push(String::new());
        let daemon = match daemon_runs {
            true => "running",
            false => "not running",
        };
        self.line("daemon", daemon);
    }

    fn apis(&mut self) {
        let Status { figures, now, .. } = self.status;
        for (name, status) in [("BigChat", &figures.bigchat), ("OurAPI", &figures.our_api)] {
            self.line(name, api(status, *now));
            if let Some(limit) = status.rate_limit {
                self.line("", format!("rate-limited {limit}"));
            }
        }
    }

    fn polling(&mut self) {
        let Status { figures, now, .. } = self.status;
        let behind = figures.behind_s.map_or_else(String::new, |behind| {
            format!(", {} behind BigChat", duration(seconds(behind)))
        });
        let polled = figures
            .polled_at
            .map_or_else(|| "never".into(), |at| ago(at, *now));
        self.line("last poll", polled + &behind);
        let newest = figures.newest_event_at;
        let newest = newest.map_or_else(|| "none yet".into(), |at| at.to_string());
        self.line("newest event", newest);
        for Gap { from, until, .. } in &figures.gaps {
            self.line(
                "lost",
                format!("events from {from} to {until}; BigChat no longer reports them"),
            );
        }
    }

    fn queue(&mut self) {
        let Status { figures, now, .. } = self.status;
        if let Some(pause) = figures.paused {
            self.line(
                "deliveries",
                format!("{pause}; `bigchat-sync resume` ends the pause"),
            );
        }
        let oldest = figures.oldest_waiting.as_ref();
        let since = oldest.map_or_else(String::new, |oldest| {
            format!(", the oldest for {}", duration(now.since(oldest.since)))
        });
        self.line("waiting", format!("{}{since}", figures.waiting));
        self.line("failed", figures.failed.to_string());
        for group in &figures.failed_by_reason {
            self.line("", format!("{} × {}", group.count, group.reason));
        }
        self.line(
            "per minute",
            format!(
                "{:.1} received, {:.1} delivered, over the last 5 minutes",
                figures.received_per_minute, figures.delivered_per_minute
            ),
        );
        if let Some(times) = figures.delivery_ms {
            self.line(
                "delivery",
                format!(
                    "median {}, p95 {}, max {}",
                    millis(times.median),
                    millis(times.p95),
                    millis(times.max)
                ),
            );
        }
    }

    fn verification(&mut self) {
        let figures = &self.status.figures;
        match figures.rebuilding {
            0 => {}
            1 => self.line("rebuilding", "1 chat to be verified"),
            count => self.line("rebuilding", format!("{count} chats to be verified")),
        }
        if figures.losses > 0 {
            self.line(
                "losses",
                format!(
                    "of data in OurAPI: {}, {} of them within the last hour",
                    figures.losses, figures.recent_losses
                ),
            );
        }
        self.line("verification", verification(self.status));
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
            self.line("", format!("chat {external_id}: {}", what.join("; ")));
        }
    }

    fn without_agent(&mut self) {
        let figures = &self.status.figures;
        let without = &figures.without_agent;
        for WithoutAgent {
            denied,
            count,
            advisors,
        } in without
        {
            let ids: Vec<_> = advisors.iter().map(ToString::to_string).collect();
            let more = match *count > advisors.len() as u64 {
                true => ", …",
                false => "",
            };
            let who = match denied {
                Denial::Agent => "whose agent OurAPI does not accept",
                Denial::Advisor | Denial::Conversation => {
                    "whom BigChat does not know, or without a usable record"
                }
            };
            let (advisors, ids) = (counted(*count, "advisor"), ids.join(", "));
            self.line("no agent", format!("{advisors} {who}: {ids}{more}"));
        }
        if !without.is_empty() {
            let pass = match figures.verify_every_s {
                Some(_) => " (with --rebuild auto, the next pass does it)",
                None => "",
            };
            self.line(
                "",
                format!("correct the cause, then run `bigchat-sync verify --repair` to set the agents of their chats{pass}"),
            );
        }
    }

    fn verdict(&mut self) {
        let Status {
            healthy,
            problems,
            figures,
            ..
        } = self.status;
        self.lines.push(String::new());
        if *healthy {
            self.lines.push(match figures.paused {
                Some(_) => "no problems; deliveries are paused".into(),
                None => "no problems".into(),
            });
        }
        for Problem { what, remedy } in problems {
            self.lines
                .push(format!("! {}\n  → {remedy}", printable(what)));
        }
        self.lines.push(String::new());
    }
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
            "{verified} chats in {}, {}",
            duration(took),
            ago(ended_at, *now)
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

/// A time in milliseconds, or in seconds from 10 s.
fn millis(ms: i64) -> String {
    match ms {
        10_000.. => format!("{:.1} s", ms as f64 / 1e3),
        _ => format!("{ms} ms"),
    }
}

fn mega(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn ago(at: Millis, now: Millis) -> String {
    format!("{} ago", duration(now.since(at)))
}

fn api(api: &ApiStatus, now: Millis) -> String {
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
        ago(*asked_at, now)
    )
}
