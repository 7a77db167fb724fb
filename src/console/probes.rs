//! Probes and metrics, for machines. The probes need no token and tell no more than a service manager must know.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::Console;
use super::Web;
use crate::domain::time::Millis;
use crate::http::{Api, Http};
use crate::metrics::Now;
use crate::status::Status;
use crate::version;

/// The format of [`metrics`].
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Whether the process turns over. While it does there is no use in starting it again, whatever is down.
pub(super) async fn healthz(State(web): State<Arc<Web>>) -> Response {
    match web.console.liveness.stuck(Instant::now()) {
        None => "ok\n".into_response(),
        Some(what) => (StatusCode::SERVICE_UNAVAILABLE, format!("{what}\n")).into_response(),
    }
}

/// Whether events get through: both APIs answer, by the daemon's own last exchanges, and the journal takes them. While
/// deliveries are paused that is how an operator wants it: the daemon is ready, and the console stays within reach.
pub(super) async fn readyz(State(web): State<Arc<Web>>) -> Response {
    let console = &web.console;
    let [bigchat, our_api] = Api::ALL.map(|api| console.apis.status(api).up);
    let paused = console.our_api.paused();
    let why = [
        (bigchat.is_none(), "BigChat was not asked yet\n"),
        (bigchat == Some(false), "BigChat is down\n"),
        // It is asked only once there is something to deliver.
        (
            our_api == Some(false) && paused.is_none(),
            "OurAPI is down\n",
        ),
        (console.storage.refuses(), "the journal cannot be written\n"),
    ];
    let why: String = why
        .iter()
        .filter(|(is, _)| *is)
        .map(|(_, why)| *why)
        .collect();
    match (why.is_empty(), paused) {
        (true, None) => "ok\n".into_response(),
        (true, Some(pause)) => format!("ok: deliveries are {pause}\n").into_response(),
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, why).into_response(),
    }
}

/// Everything there is to measure, in Prometheus' text format.
pub(super) async fn metrics(State(web): State<Arc<Web>>) -> Response {
    // Without the journal there is still what this process knows, and that the journal is missing.
    let status = web.status().await;
    let mut now = Now::default();
    of_daemon(&mut now, &web.console);
    now.gauge(
        "journal_readable",
        "Whether the journal could be read for this: if not, what comes from it is missing here",
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

/// What the daemon knows itself.
fn of_daemon(now: &mut Now, console: &Console) {
    let apis = Api::ALL.map(|api| (api.name(), console.apis.status(api)));
    now.gauges(
        "api_up",
        "Whether an API answers, by the daemon's own exchanges with it; missing until it was asked",
        "api",
        apis.iter()
            .filter_map(|(name, api)| Some((*name, flag(api.up?)))),
    );
    now.gauges(
        "breaker_open",
        "Whether an API counts as down, so that one request at a time tells when it is back",
        "api",
        apis.iter()
            .map(|(name, api)| (*name, flag(api.up == Some(false)))),
    );
    let at = Millis::now();
    let left = |http: &Http| {
        let until = http.rate_limited_until(at).unwrap_or_default();
        until.since(at).as_secs_f64()
    };
    now.gauges(
        "api_throttle_remaining_seconds",
        "For how much longer an API has asked to be left alone",
        "api",
        [
            (Api::BigChat.name(), left(&console.apis.bigchat)),
            (Api::OurApi.name(), left(&console.apis.our_api)),
        ],
    );
    let paused = console.our_api.paused();
    now.gauge(
        "paused",
        "Whether an operator has paused deliveries",
        flag(paused.is_some()),
    );
    if let Some(until) = paused.and_then(|pause| pause.until) {
        now.gauge(
            "paused_until_timestamp_seconds",
            "When the pause ends; missing without a pause, and if only an operator ends it",
            until.0 as f64 / 1e3,
        );
    }
    if let Some(waited) = console.our_api.lock_waited() {
        now.seconds(
            "our_api_lock_wait",
            "For how long requests to OurAPI have waited for --our-api-lock, all together; missing without a lock",
            waited,
        );
    }
    now.gauge(
        "journal_writable",
        "Whether the journal took what the daemon last had for it",
        flag(!console.storage.refuses()),
    );
    now.gauge(
        "stuck",
        "Whether polling or delivery does not turn over any more, as opposed to waiting for somebody",
        flag(console.liveness.stuck(Instant::now()).is_some()),
    );
    let build = [
        ("version", Some(version::VERSION)),
        ("commit", version::COMMIT),
        ("date", version::DATE),
    ];
    now.info(
        "build_info",
        "Which version this is, and of which commit if the build said so; always 1",
        build,
    );
}

/// What the journal tells. Times are seconds since 1970 by this machine's clock, as everywhere in Prometheus.
fn of_journal(now: &mut Now, status: &Status) {
    let Status {
        figures, database, ..
    } = status;
    if let Some(at) = figures.polled_at {
        now.gauge(
            "last_poll_timestamp_seconds",
            "When BigChat was last read to the end of what was asked for",
            at.0 as f64 / 1e3,
        );
    }
    if let Some(behind) = figures.behind_s {
        now.gauge(
            "behind_seconds",
            "How far BigChat was not read yet, by its own clock",
            behind as f64,
        );
    }
    if let Some(at) = figures.cursor_moved_at {
        now.gauge(
            "cursor_moved_timestamp_seconds",
            "When the time up to which BigChat was read last changed",
            at.0 as f64 / 1e3,
        );
    }
    // Its clock's time is the cursor, and as much as that is behind.
    if let (Some(cursor), Some(behind), Some(newest)) =
        (figures.cursor_at, figures.behind_s, figures.newest_event_at)
    {
        now.gauge(
            "newest_event_age_seconds",
            "How long ago the newest event happened that BigChat has told, by its own clock",
            (cursor.unix() + behind - newest.unix()).max(0) as f64,
        );
    }
    now.gauge(
        "waiting_events",
        "Events that wait to be delivered",
        figures.waiting as f64,
    );
    let oldest = figures.oldest_waiting.as_ref();
    now.gauge(
        "oldest_waiting_age_seconds",
        "For how long the oldest of these has waited; 0 if none does",
        oldest.map_or(0.0, |oldest| status.now.since(oldest.since).as_secs_f64()),
    );
    now.gauge(
        "failed_events",
        "Dead letters that need action",
        figures.failed as f64,
    );
    now.gauge(
        "rebuilding_chats",
        "Chats that are still to be compared with the journal",
        figures.rebuilding as f64,
    );
    now.gauge(
        "drifted_chats",
        "Chats with fields that another client has changed in OurAPI; they stay so",
        figures.drifted as f64,
    );
    now.gauge(
        "incomplete_chats",
        "Chats that OurAPI has lost, whole or in part, and that were not restored",
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
        "How often OurAPI was found to have lost something",
        figures.losses,
    );
    now.counter(
        "bigchat_restarts",
        "How often BigChat was found to have restarted",
        figures.restarts,
    );
    now.gauge(
        "database_size_bytes",
        "How large the database is, with its write-ahead log",
        database.size_bytes as f64,
    );
}

fn flag(is: bool) -> f64 {
    f64::from(u8::from(is))
}
