//! Health endpoints and metrics, for machines.
//!
//! The health endpoints need no token, and reveal no more than a service manager needs.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::Console;
use super::Web;
use crate::domain::time::Millis;
use crate::http::{Api, ApiState, Http};
use crate::metrics::Now;
use crate::status::Status;
use crate::version;

/// The format of [`metrics`].
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Whether the process is making progress. While it is, a restart would not help, whatever is down.
pub(super) async fn healthz(State(web): State<Arc<Web>>) -> Response {
    match web.console.liveness.stuck(Instant::now()) {
        None => "ok\n".into_response(),
        Some(what) => (StatusCode::SERVICE_UNAVAILABLE, format!("{what}\n")).into_response(),
    }
}

/// Whether events can be delivered: BigChat has answered, no API is down or rate-limited for more than a minute, and
/// the journal can be written.
///
/// While deliveries are paused, the state of OurAPI does not count: an operator has paused them, and the console must
/// stay reachable.
pub(super) async fn readyz(State(web): State<Arc<Web>>) -> Response {
    let console = &web.console;
    let paused = console.our_api.paused();
    let (mut why, mut notes) = (String::new(), Vec::new());
    for api in Api::ALL {
        let status = console.apis.status(api);
        if api == Api::OurApi && paused.is_some() {
            continue;
        }
        if let Some(limit) = status.long_limit() {
            why += &format!("{api} is rate-limited until {}\n", limit.until);
            continue;
        }
        match status.state {
            ApiState::Down => why += &format!("{api} is down\n"),
            ApiState::Failing => notes.push(format!("{api} is failing, not yet counted as down")),
            // No request is sent to OurAPI until there is something to deliver.
            ApiState::Unknown if api == Api::BigChat => {
                why += "no request to BigChat has succeeded yet\n";
            }
            ApiState::Unknown | ApiState::Up => {}
        }
    }
    if console.storage.refusal().is_some() {
        why += "the journal cannot be written\n";
    }
    notes.extend(paused.map(|pause| format!("deliveries are {pause}")));
    match (why.is_empty(), notes.is_empty()) {
        (true, true) => "ok\n".into_response(),
        (true, false) => format!("ok: {}\n", notes.join("; ")).into_response(),
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, why).into_response(),
    }
}

/// All metrics, in Prometheus' text format.
pub(super) async fn metrics(State(web): State<Arc<Web>>) -> Response {
    // If the journal cannot be read, the process's own metrics are still served, and `journal_readable` is 0.
    let status = web.status().await;
    let mut now = Now::default();
    of_daemon(&mut now, &web.console);
    now.gauge(
        "journal_readable",
        "Whether the journal could be read; if not, its metrics are missing",
        f64::from(u8::from(status.is_ok())),
    );
    if web.login.is_needed() {
        now.counter(
            "console_wrong_tokens",
            "Requests and logins with a wrong token",
            web.login.failures(),
        );
    }
    if let Ok(status) = status {
        of_journal(&mut now, &status);
    }
    match web.console.metrics.text(&now) {
        Ok(text) => ([(header::CONTENT_TYPE, TEXT)], text).into_response(),
        Err(error) => super::error(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

/// The metrics of the process itself.
fn of_daemon(now: &mut Now, console: &Console) {
    let apis = Api::ALL.map(|api| (api.name(), console.apis.status(api)));
    now.gauges(
        "api_up",
        "Whether the API answers, according to the daemon's own requests; missing while this is not known",
        "api",
        apis.iter()
            .filter(|(_, api)| api.state != ApiState::Unknown)
            .map(|(name, api)| (*name, flag(!api.is_down()))),
    );
    now.gauges(
        "breaker_open",
        "Whether the API counts as down: probes failed after its circuit breaker had opened",
        "api",
        apis.iter().map(|(name, api)| (*name, flag(api.is_down()))),
    );
    let at = Millis::now();
    let left = |http: &Http| {
        let until = http.rate_limited_until(at).unwrap_or_default();
        until.since(at).as_secs_f64()
    };
    now.gauges(
        "rate_limit_remaining_seconds",
        "Remaining time of the API's rate limit",
        "api",
        [
            (Api::BigChat.name(), left(&console.apis.bigchat)),
            (Api::OurApi.name(), left(&console.apis.our_api)),
        ],
    );
    let paused = console.our_api.paused();
    now.gauge(
        "paused",
        "Whether deliveries are paused by an operator",
        flag(paused.is_some()),
    );
    if let Some(until) = paused.and_then(|pause| pause.until) {
        now.gauge(
            "paused_until_timestamp_seconds",
            "When the pause ends; missing if there is no pause, or if it lasts until an operator resumes",
            until.0 as f64 / 1e3,
        );
    }
    if let Some(waited) = console.our_api.lock_waited() {
        now.seconds(
            "our_api_lock_wait",
            "Total time that requests to OurAPI have waited for --our-api-lock; missing without a lock",
            waited,
        );
    }
    now.gauge(
        "journal_writable",
        "Whether the daemon's latest write to the journal succeeded",
        flag(console.storage.refusal().is_none()),
    );
    now.gauge(
        "stuck",
        "Whether polling or delivery has stopped making progress; waits after a failure of an API or the disk do not count",
        flag(console.liveness.stuck(Instant::now()).is_some()),
    );
    let build = [
        ("version", Some(version::VERSION)),
        ("commit", version::COMMIT),
        ("date", version::DATE),
    ];
    now.info(
        "build_info",
        "The version, and the commit and its date if they were known to the build; always 1",
        build,
    );
}

/// The metrics from the journal. Times are seconds since 1970 by this machine's clock, as usual in Prometheus.
fn of_journal(now: &mut Now, status: &Status) {
    let Status {
        figures, database, ..
    } = status;
    if let Some(at) = figures.last_read() {
        now.gauge(
            "last_poll_timestamp_seconds",
            "When BigChat was last read: a poll was completed, or a page of an unfinished one was stored",
            at.0 as f64 / 1e3,
        );
    }
    if let Some(behind) = figures.behind_s {
        now.gauge(
            "behind_seconds",
            "How far the cursor is behind BigChat's clock",
            behind as f64,
        );
    }
    if let Some(at) = figures.cursor_moved_at {
        now.gauge(
            "cursor_moved_timestamp_seconds",
            "When the cursor last changed",
            at.0 as f64 / 1e3,
        );
    }
    // The cursor plus `behind` is the time on BigChat's clock.
    if let (Some(cursor), Some(behind), Some(newest)) =
        (figures.cursor_at, figures.behind_s, figures.newest_event_at)
    {
        now.gauge(
            "newest_event_age_seconds",
            "Age of the newest event received, by BigChat's clock",
            (cursor.unix() + behind - newest.unix()).max(0) as f64,
        );
    }
    now.gauge(
        "waiting_events",
        "Events waiting to be delivered",
        figures.waiting as f64,
    );
    let oldest = figures.oldest_waiting.as_ref();
    now.gauge(
        "oldest_waiting_age_seconds",
        "Age of the oldest waiting event; 0 if there is none",
        oldest.map_or(0.0, |oldest| status.now.since(oldest.since).as_secs_f64()),
    );
    now.gauge(
        "failed_events",
        "Dead letters that need action",
        figures.failed as f64,
    );
    now.gauge(
        "rebuilding_chats",
        "Chats still to be verified after a loss or a request",
        figures.rebuilding as f64,
    );
    now.gauge(
        "drifted_chats",
        "Chats with fields that another client has changed in OurAPI; they are not overwritten",
        figures.drifted as f64,
    );
    now.gauge(
        "incomplete_chats",
        "Chats that OurAPI has lost, in whole or in part, and that have not been restored",
        figures.incomplete as f64,
    );
    if let Some(pass) = &figures.verification {
        now.gauge(
            "verification_timestamp_seconds",
            "When the latest pass that verifies all chats in idle time began",
            pass.began_at.0 as f64 / 1e3,
        );
        now.gauge(
            "verification_left_chats",
            "Chats that this pass still has to verify; 0: it has ended",
            pass.left as f64,
        );
    }
    now.counter(
        "our_api_losses",
        "Times OurAPI was found to have lost data",
        figures.losses,
    );
    now.counter(
        "bigchat_restarts",
        "Times BigChat was found to have restarted",
        figures.restarts,
    );
    now.gauge(
        "database_size_bytes",
        "Size of the database, including its write-ahead log",
        database.size_bytes as f64,
    );
}

fn flag(is: bool) -> f64 {
    f64::from(u8::from(is))
}
