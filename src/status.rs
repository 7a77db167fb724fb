//! The state of the journal, its problems and their remedies, for `bigchat-sync status`, the console, the metrics and
//! the heartbeat.
//!
//! Only the database is read, whether or not a daemon is running. `problems` determines what is a problem.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::bigchat::clock;
use crate::domain::time::Millis;
use crate::http::{Api, ApiState, ApiStatus, RateLimit};
use crate::journal::{Figures, JournalError, Refusal, Store};
use crate::version;

/// For how many poll intervals a running daemon may read nothing from BigChat; at least [`NOT_READ`].
const INTERVALS: u32 = 3;

/// For how long a running daemon may read nothing from BigChat, however short its poll interval is.
const NOT_READ: Duration = Duration::from_secs(30);

/// How many poll intervals the poller may be behind BigChat's clock; at least [`LATE`].
const INTERVALS_BEHIND: u32 = 6;

/// This many losses in OurAPI within an hour are not explained by a single restart or restore.
const LOSSES: u64 = 3;

/// A disk with less space, in bytes, is about to refuse a write.
const SCARCE: u64 = 1 << 20;

/// How long the poller may be behind BigChat's clock, however short its poll interval is, and how long an event may
/// wait.
const LATE: Duration = Duration::from_secs(120);

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    pub version: &'static str,
    /// This machine's clock.
    pub now: Millis,
    /// Whether a daemon, or a command in its place, is using the database.
    pub daemon_runs: bool,
    /// Whether there is no problem.
    pub healthy: bool,
    /// The problems, the worst first.
    pub problems: Vec<Problem>,
    pub database: Database,
    #[serde(flatten)]
    pub figures: Figures,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Database {
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// Its size with the write-ahead log.
    pub size_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    pub what: String,
    pub remedy: String,
}

impl From<&Refusal> for Problem {
    fn from(refusal: &Refusal) -> Self {
        let remedy = match refusal.is_replaced {
            true => "put the file back with its -wal and -shm, or restart the daemon",
            false => WRITABLE,
        };
        Self {
            what: format!("the journal cannot be written: {}", refusal.reason),
            remedy: remedy.to_owned(),
        }
    }
}

impl Status {
    /// Reads the status from the journal in the file `path`.
    pub fn read(store: &mut Store, path: PathBuf, now: Millis) -> Result<Self, JournalError> {
        let mut figures = store.figures(now)?;
        // A pass from before verification was turned off does not count.
        figures.verification = figures
            .verification
            .filter(|_| figures.verify_every_s.is_some());
        let daemon_runs = store.is_in_use();
        let problems = problems(&figures, daemon_runs, now);
        Ok(Self {
            version: version::VERSION,
            now,
            daemon_runs,
            healthy: problems.is_empty(),
            problems,
            database: Database {
                path,
                size_bytes: store.bytes(),
            },
            figures,
        })
    }

    /// Adds that the daemon cannot write the journal, which only the daemon itself knows.
    pub(crate) fn journal_refuses(&mut self, refusal: &Refusal) {
        self.problems.insert(0, refusal.into());
        self.healthy = false;
    }
}

/// The remedy for a database that cannot be written.
pub(crate) const WRITABLE: &str = "free disk space, fix its permissions, or end the process that locks it; a running daemon then continues automatically";

/// Why no requests are sent to OurAPI now, as last stored by the delivering process.
pub fn our_api_waits_for(store: &mut Store, now: Millis) -> Result<Option<String>, JournalError> {
    if let Some(pause) = store.pause()?.filter(|pause| pause.left(now).is_some()) {
        return Ok(Some(format!(
            "deliveries are {pause}; `bigchat-sync resume` ends the pause"
        )));
    }
    let status = store.api(Api::OurApi)?.without_passed_limit(now);
    let reason = status.reason(Api::OurApi);
    Ok(match (status.rate_limit, status.state, status.since) {
        (None, ApiState::Down, Some(since)) => {
            let problem = reason.unwrap_or_default();
            Some(format!("OurAPI has been down since {since}: {problem}"))
        }
        (Some(_), ..) => reason,
        _ => None,
    })
}

/// JSON cannot represent bytes that are not UTF-8.
fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

/// The problems, the worst first.
pub(crate) fn problems(figures: &Figures, daemon_runs: bool, now: Millis) -> Vec<Problem> {
    let mut all = Problems {
        figures,
        daemon_runs,
        now,
        found: Vec::new(),
    };
    all.daemon();
    all.api(Api::BigChat, &figures.bigchat);
    // An operator may have paused deliveries because OurAPI is down.
    if figures.paused.is_none() {
        all.api(Api::OurApi, &figures.our_api);
    }
    all.disk();
    all.polling();
    all.losses();
    all.clock();
    all.waiting();
    all.failed();
    all.found
}

struct Problems<'a> {
    figures: &'a Figures,
    daemon_runs: bool,
    now: Millis,
    found: Vec<Problem>,
}

impl Problems<'_> {
    fn add(&mut self, what: impl Into<String>, remedy: impl Into<String>) {
        self.found.push(Problem {
            what: what.into(),
            remedy: remedy.into(),
        });
    }

    fn daemon(&mut self) {
        if !self.daemon_runs {
            self.add(
                "no daemon is running on this database",
                "start it with `systemctl start bigchat-sync`, or `bigchat-sync run` with the same --db",
            );
        }
    }

    fn api(&mut self, api: Api, status: &ApiStatus) {
        if let Some(limit) = status.long_limit() {
            self.rate_limit(api, status, limit);
        } else if status.is_down() {
            self.outage(api, status);
        }
    }

    fn rate_limit(&mut self, api: Api, status: &ApiStatus, limit: RateLimit) {
        let before = match status.since.filter(|_| status.is_down()) {
            Some(since) => format!(", and has been down since {since}"),
            None => String::new(),
        };
        let (wait, remedy) = match (api, self.figures.waiting) {
            (Api::BigChat, _) => (
                String::new(),
                "requests resume then, and the events of that time are read afterwards",
            ),
            (Api::OurApi, waiting) => (
                match waiting {
                    0 => String::new(),
                    1 => "; 1 event is waiting".to_owned(),
                    _ => format!("; {waiting} events are waiting"),
                },
                "deliveries continue then, and nothing is lost",
            ),
        };
        self.add(
            format!("{api} is rate-limited {limit}{before}{wait}"),
            format!("{remedy}; if this lasts, ask the operator of {api}"),
        );
    }

    fn outage(&mut self, api: Api, status: &ApiStatus) {
        let since = status.since.unwrap_or_default();
        let why = status.problem.as_deref().unwrap_or("it does not answer");
        let meanwhile = match api {
            Api::BigChat => "the events of that time are read afterwards",
            Api::OurApi => "all events wait",
        };
        let remedy = match status.lasts {
            true => "correct what the reason names; until then requests wait, and nothing is lost"
                .to_owned(),
            false => format!(
                "an outage needs no action, and {meanwhile}; if {api} is up, check {}",
                api.url_setting()
            ),
        };
        self.add(format!("{api} has been down since {since}: {why}"), remedy);
    }

    fn disk(&mut self) {
        if let Some(free) = self.figures.disk_free_bytes
            && free < SCARCE
        {
            let left = free / 1024;
            self.add(
                format!("the disk of the database is full: {left} KiB are left"),
                WRITABLE,
            );
        }
    }

    fn polling(&mut self) {
        let Figures {
            bigchat,
            polled_at,
            behind_s,
            cursor_moved_at,
            ..
        } = self.figures;
        let Some(last_read) = self.figures.last_read() else {
            return self.add(
                "no poll of BigChat has been completed yet",
                "wait for the first poll; if this persists, see the log",
            );
        };
        let poll_interval = stored_seconds(self.figures.poll_interval_s);
        let max_behind = LATE.max(poll_interval.saturating_mul(INTERVALS_BEHIND));
        let can_poll = self.daemon_runs && !bigchat.is_down() && bigchat.long_limit().is_none();
        let max_unread = match can_poll {
            true => NOT_READ.max(poll_interval.saturating_mul(INTERVALS)),
            false => max_behind,
        };
        let unread = self.now.since(last_read);
        let behind = behind_s.map(seconds).unwrap_or_default();
        let unmoved = polled_at
            .zip(*cursor_moved_at)
            .map_or(Duration::ZERO, |(polled_at, moved)| polled_at.since(moved));
        if unread > max_unread {
            self.add(
                format!("nothing has been read from BigChat for {}", duration(unread)),
                "no new events arrive; start the daemon if it is not running, otherwise see the other problems, `bigchat-sync check` and the log",
            );
        } else if behind > max_behind {
            self.add(
                format!("the poller is {} behind BigChat", duration(behind)),
                "the poller catches up automatically; if the delay does not shrink, see the state of BigChat above",
            );
        } else if unmoved > max_behind {
            let unmoved = duration(unmoved);
            self.add(
                format!("BigChat's clock has not advanced for {unmoved}, although polls have been completed"),
                "a cache may be answering instead of BigChat; make it forward requests with `cache-control: no-cache`",
            );
        }
    }

    fn losses(&mut self) {
        let Figures {
            recent_losses,
            incomplete,
            ..
        } = *self.figures;
        if recent_losses >= LOSSES {
            self.add(
                format!("OurAPI lost data {recent_losses} times within the last hour"),
                "if OurAPI was not restarted or restored, it receives more than one request at a time, which corrupts its data: stop the other daemon or client, or let all daemons share --our-api-lock (`bigchat-sync man deployment`)",
            );
        }
        if incomplete > 0 {
            let lost = match incomplete {
                1 => "1 chat, in whole or in part, and it is".to_owned(),
                count => format!("{count} chats, in whole or in part, and they are"),
            };
            self.add(
                format!("OurAPI has lost {lost} not restored"),
                "restore with `bigchat-sync verify --repair` (with --rebuild auto, the next pass does it); if a chat was erased on purpose, erase it here too with `bigchat-sync forget`",
            );
        }
    }

    fn clock(&mut self) {
        if let Some(difference) = self.figures.clock_ahead_s.and_then(clock::difference) {
            self.add(
                difference,
                "correct the wrong clock; polling uses BigChat's clock, and only the ages and rates shown are wrong",
            );
        }
    }

    fn waiting(&mut self) {
        let figures = self.figures;
        // An event that waited through a pause is late only if it is not delivered soon after.
        let could_be_sent_since = |at: Millis| at.max(figures.resumed_at.unwrap_or_default());
        if let Some(oldest) = &figures.oldest_waiting
            && figures.paused.is_none()
            // A long rate limit would be the reason, and it was reported above.
            && figures.our_api.long_limit().is_none()
            && self.now.since(could_be_sent_since(oldest.since)) > LATE
        {
            let why = oldest
                .reason
                .as_deref()
                .unwrap_or("it has not been tried yet");
            self.add(
                format!(
                    "a {} of conversation {} has waited for {}: {why}",
                    oldest.kind,
                    oldest.conversation,
                    duration(self.now.since(oldest.since))
                ),
                "the event is retried automatically; if it fails repeatedly while OurAPI is up, it becomes a failed event",
            );
        }
    }

    fn failed(&mut self) {
        let what = match self.figures.failed {
            0 => return,
            1 => "1 failed event needs action".to_owned(),
            count => format!("{count} failed events need action"),
        };
        self.add(
            what,
            "see the reasons with `bigchat-sync failed list` or in the console; then retry or discard",
        );
    }
}

/// A stored number of seconds; zero if it was edited and is not a duration.
pub(crate) fn stored_seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

pub(crate) fn seconds(count: i64) -> Duration {
    Duration::from_secs(u64::try_from(count).unwrap_or_default())
}

/// In seconds, minutes, hours or days, depending on the length.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = match duration.as_secs() {
        seconds if seconds >= 172_800 => seconds / 3600 * 3600,
        seconds if seconds >= 7_200 => seconds / 60 * 60,
        seconds => seconds,
    };
    humantime::format_duration(Duration::from_secs(seconds)).to_string()
}
