//! The heartbeat for a dead man's switch, by the protocol of healthchecks.io: a GET once a minute while the daemon is
//! healthy, else a POST to `/fail` with the problems. If neither arrives, the daemon, its machine or its network is
//! dead, which nothing on this machine could report.
//!
//! Besides the two APIs, this is the only host that the daemon contacts. Redirects are not followed.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use reqwest::header::{CONTENT_TYPE, HeaderValue};
use tokio::time::{Interval, MissedTickBehavior, interval, sleep, timeout};
use url::Url;

use super::parts::Parts;
use crate::domain::time::Millis;
use crate::http;
use crate::journal::Figures;
use crate::settings::{Token, heartbeat_url};
use crate::status::{self, Problem};

/// The default interval of such services.
const EVERY: Duration = Duration::from_secs(60);

/// The time limit for a request. A journal that does not answer within it counts as a problem.
const TIMEOUT: Duration = Duration::from_secs(10);

/// While heartbeats keep failing, one failure in this many is logged: about one an hour.
const LOGGED_EVERY: u32 = 60;

pub(super) async fn run(parts: &Parts, url: Token) -> Infallible {
    // Before the first poll, the journal has only the state of the last session.
    tokio::select! {
        () = parts.caught_up.cancelled() => {}
        () = sleep(EVERY) => {}
    }
    let (mut sender, mut beats) = (Sender::default(), beats());
    loop {
        beats.tick().await;
        // The token file may have been read again.
        if let Some(url) = url.get().and_then(|url| heartbeat_url(&url)) {
            sender.send(&url, &problems(parts).await).await;
        }
    }
}

/// The schedule of heartbeats: the first one is due at once, then one a minute, however long each takes.
fn beats() -> Interval {
    let mut beats = interval(EVERY);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    beats
}

/// The problems as `status` reports them; empty if there are none.
async fn problems(parts: &Parts) -> String {
    if let Some(stuck) = parts.liveness.stuck(Instant::now()) {
        return stuck.to_owned();
    }
    let now = Millis::now();
    let figures = parts.journal.with(move |store| store.figures(now));
    let problems = match timeout(TIMEOUT, figures).await {
        Ok(Ok(figures)) => {
            let figures = without_responses(figures);
            status::problems(&figures, true, now)
        }
        Ok(Err(error)) => return format!("the database cannot be read: {error}"),
        Err(_) => return "the database does not answer".to_owned(),
    };
    // As on the console. Only the daemon itself knows whether it can write to the journal.
    let refusal = parts.storage.refusal();
    let lines = refusal
        .iter()
        .map(Problem::from)
        .chain(problems)
        .map(|Problem { what, remedy }| format!("{what}\n  → {remedy}"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Removes the responses of the APIs. They may quote a customer, and a heartbeat leaves the machine.
fn without_responses(mut figures: Figures) -> Figures {
    let head = |reason: &mut Option<String>| {
        if let Some(reason) = reason
            && let Some(colon) = reason.find(": ")
        {
            reason.truncate(colon);
        }
    };
    head(&mut figures.bigchat.problem);
    head(&mut figures.our_api.problem);
    if let Some(oldest) = &mut figures.oldest_waiting {
        head(&mut oldest.reason);
    }
    figures
}

#[derive(Debug, Default)]
struct Sender {
    /// Consecutive failures.
    failures: u32,
}

impl Sender {
    async fn send(&mut self, url: &Url, problems: &str) {
        match send(url, problems).await {
            Ok(()) => {
                if self.failures > 0 {
                    tracing::info!("heartbeats are received again; {} were not", self.failures);
                }
                self.failures = 0;
            }
            Err(reason) => {
                if self.failures.is_multiple_of(LOGGED_EVERY) {
                    tracing::warn!(reason, "a heartbeat was not received");
                }
                self.failures = self.failures.saturating_add(1);
            }
        }
    }
}

/// Sends one heartbeat. An error does not name the URL, which is a secret.
async fn send(url: &Url, problems: &str) -> Result<(), String> {
    // Each heartbeat has a new client, because an idle one would take memory for a minute.
    let client = http::client(url.scheme() != "http", TIMEOUT).map_err(http::cause)?;
    let request = match problems {
        "" => client.get(url.clone()),
        problems => client
            .post(fail(url))
            .header(
                CONTENT_TYPE,
                HeaderValue::from_static("text/plain; charset=utf-8"),
            )
            .body(problems.to_owned()),
    };
    let status = request.send().await.map_err(http::cause)?.status();
    match status.is_success() {
        true => Ok(()),
        false => Err(format!("the response was {status}")),
    }
}

/// The URL to report problems to: `/fail` below the URL, before its query.
fn fail(url: &Url) -> Url {
    let mut fail = url.clone();
    if let Ok(mut segments) = fail.path_segments_mut() {
        segments.pop_if_empty().push("fail");
    }
    fail
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, advance};

    use super::*;

    #[test]
    fn failures_are_reported_below_the_url() {
        for (url, expected) in [
            ("https://hc.example/uuid", "https://hc.example/uuid/fail"),
            ("https://hc.example/uuid/", "https://hc.example/uuid/fail"),
            ("http://h:1/a/b?rid=1", "http://h:1/a/b/fail?rid=1"),
            ("https://hc.example", "https://hc.example/fail"),
        ] {
            let url: Url = url.parse().expect("a URL");
            assert_eq!(fail(&url).as_str(), expected);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn heartbeat_is_due_every_minute() {
        let (began, mut beats) = (Instant::now(), beats());
        for expected in [0, 60, 120] {
            beats.tick().await;
            assert_eq!(began.elapsed().as_secs(), expected);
            advance(TIMEOUT).await;
        }
    }
}
