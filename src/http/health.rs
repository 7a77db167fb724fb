//! The state of an API, as shown by the results of ordinary requests, and its rate limit. Changes are logged.
//!
//! An outage that may end without action by the operator is logged as a warning. One that lasts until the operator acts
//! is logged as an error. The end of either is a warning.

use std::fmt;
use std::mem::{Discriminant, discriminant};
use std::sync::Arc;
use std::time::Instant;

use reqwest::StatusCode;
use serde::Serialize;
use tokio::sync::Notify;
use url::Url;

use super::breaker::{Breaker, Circuit};
use super::error::{ApiError, ErrorKind, Sign};
use super::exchange::Cause;
use super::rate_limit::RateLimit;
use super::route::Route;
use super::{Api, Target};
use crate::domain::backoff::Policy;
use crate::domain::named::named;
use crate::domain::progress::Failure;
use crate::domain::time::Millis;

/// Maximum length in characters of the response that is stored with a problem.
const MAX_RESPONSE: usize = 200;

named! {
    #[derive(Default)]
    ApiState {
        /// Neither a success nor an outage has been seen yet.
        #[default]
        Unknown = "unknown",
        Up = "up",
        /// It was up, and its latest requests failed, but too few for an outage.
        Failing = "failing",
        /// An outage. It counts until a request succeeds or no further request is due.
        Down = "down",
    }
}

/// What is known about an API: all that commands, probes, console and log report about it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ApiStatus {
    pub state: ApiState,
    /// When the state began; `None` while it is unknown.
    pub since: Option<Millis>,
    /// Why the latest requests failed, with the latest of them; `None` while the API is up.
    pub problem: Option<String>,
    /// The problem lasts until the operator acts.
    pub lasts: bool,
    /// The rate limit in force.
    pub rate_limit: Option<RateLimit>,
    /// When the latest exchange ended.
    pub asked_at: Option<Millis>,
    /// Its method and URL, without the query, which may contain an e-mail address.
    pub request: Option<String>,
    /// Its status, or why there was no response.
    pub response: Option<String>,
}

impl ApiStatus {
    pub fn is_down(&self) -> bool {
        self.state == ApiState::Down
    }

    /// The rate limit, if it is long enough to be a problem.
    pub fn long_limit(&self) -> Option<RateLimit> {
        self.rate_limit.filter(RateLimit::is_long)
    }

    /// Why no request succeeds now.
    pub fn reason(&self, api: Api) -> Option<String> {
        let limit = self.rate_limit;
        limit
            .map(|limit| format!("{api} is rate-limited {limit}"))
            .or_else(|| self.problem.clone())
    }

    pub fn state_in_words(&self) -> &'static str {
        match (self.state, self.asked_at, &self.problem) {
            (ApiState::Unknown, None, _) => "not asked yet",
            (ApiState::Unknown, _, Some(_)) => "not reached yet",
            (ApiState::Unknown, _, None) => "not known yet",
            (state, ..) => state.name(),
        }
    }

    /// The state in one word, for the log.
    pub fn word(&self) -> &'static str {
        match self.long_limit() {
            Some(_) => "rate_limited",
            None => self.state.name(),
        }
    }

    /// Whether the latest request was sent to the API at this base URL.
    pub fn is_of(&self, base: &Url) -> bool {
        let base = base.as_str();
        let path = self.request.as_deref().and_then(|request| {
            let (_, url) = request.split_once(' ')?;
            url.strip_prefix(base.strip_suffix('/').unwrap_or(base))?
                .strip_prefix('/')
        });
        path.is_some_and(Route::is_path)
    }

    pub fn without_passed_limit(self, now: Millis) -> Self {
        let rate_limit = self.rate_limit.filter(|limit| limit.is_in_force(now));
        Self { rate_limit, ..self }
    }
}

/// The state in a sentence: `OurAPI is up`.
impl fmt::Display for ApiStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.state_in_words())?;
        match self.long_limit() {
            Some(limit) => write!(f, " and rate-limited until {}", limit.until),
            None => Ok(()),
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Latest {
    pub(super) at: Instant,
    pub(super) target: Target,
    pub(super) response: Result<StatusCode, String>,
}

/// The kind of a problem. A problem of another kind in the same outage is logged again.
type ProblemKind = (Discriminant<ErrorKind>, Option<Discriminant<Cause>>);

#[derive(Debug, Default)]
pub(super) struct Health {
    pub(super) breaker: Breaker,
    /// `None`: unknown. Failures that are not yet an outage are recorded only in the breaker.
    up: Option<bool>,
    since: Option<Millis>,
    problem: Option<String>,
    lasts: bool,
    /// The kind of problem that was last logged for the outage, in this session.
    logged: Option<ProblemKind>,
    pub(super) latest: Option<Latest>,
    /// The latest rate limit, even if it has passed.
    pub(super) rate_limit: Option<RateLimit>,
    /// Notified when a rate limit begins, a request fails, or a failure ends.
    pub(super) changed: Arc<Notify>,
}

impl Health {
    pub(super) fn is_down(&self) -> bool {
        self.up == Some(false)
    }

    pub(super) fn circuit(&self, now: Millis) -> Circuit {
        self.breaker.circuit(now)
    }

    /// Records a rate limit that the API asked for. Logs the beginning of a long one.
    pub(super) fn limited(&mut self, limit: RateLimit, api: Api) {
        let now = Millis::now();
        let is_logged = self
            .rate_limit
            .is_some_and(|limit| limit.is_in_force(now) && limit.is_long());
        if limit.is_long() && !is_logged {
            tracing::warn!("{api} is rate-limited {limit}; no request is sent to it until then");
        }
        self.rate_limit = Some(limit.later(self.rate_limit, now));
        self.changed.notify_one();
    }

    pub(super) fn succeeded(&mut self, api: Api, route: Route) {
        if !self.breaker.succeeded(route) {
            return;
        }
        if self.problem.take().is_some() || self.up != Some(true) {
            self.changed.notify_one();
        }
        self.lasts = false;
        if self.up == Some(true) {
            return;
        }
        if self.is_down() {
            tracing::warn!(since = %self.since.unwrap_or_default(), "{api} is back");
        }
        self.logged = None;
        self.up = Some(true);
        self.since = Some(Millis::now());
    }

    /// No further request is due, so nothing would show that the API is back.
    pub(super) fn forget_failures(&mut self, api: Api) {
        if self.problem.is_none() {
            return;
        }
        if self.is_down() {
            tracing::warn!(since = %self.since.unwrap_or_default(),
                "{api} was down, and no further request is due; the next one will show whether it is back");
        }
        *self = Self {
            latest: self.latest.take(),
            rate_limit: self.rate_limit,
            changed: Arc::clone(&self.changed),
            ..Self::default()
        };
        self.changed.notify_one();
    }

    pub(super) fn failed(&mut self, error: &ApiError, base: &Url, policy: &Policy) {
        // Without a request, nothing is known about the API.
        let Some(target) = &error.exchange.target else {
            return;
        };
        let route = target.route;
        match error.kind.sign(route.is_read()) {
            Sign::Up => return self.succeeded(error.api, route),
            Sign::Neither => {
                // The rate limit may hide that an older problem has ended.
                if matches!(error.kind, ErrorKind::RateLimited { .. }) && self.problem.is_some() {
                    self.set_problem(error, target);
                }
                return;
            }
            Sign::Down => {}
        }
        self.breaker
            .failed(route, Millis::now(), policy, rand::random());
        self.set_problem(error, target);
        if !self.breaker.is_down() {
            return;
        }
        if !self.is_down() {
            self.since = Some(self.breaker.since());
        }
        self.up = Some(false);
        self.log(error, base);
    }

    fn set_problem(&mut self, error: &ApiError, target: &Target) {
        self.changed.notify_one();
        let response = error.logged().response;
        let response: String = response.chars().take(MAX_RESPONSE).collect();
        self.problem = Some(format!(
            "{}: {} → {response}",
            error.summary(),
            target.name()
        ));
        self.lasts = error.lasts() && !matches!(error.kind, ErrorKind::RateLimited { .. });
    }

    /// Logs an outage when it begins, and again when its problem is of another kind.
    fn log(&mut self, error: &ApiError, base: &Url) {
        let kind = (
            discriminant(&error.kind),
            error.exchange.cause.as_ref().map(discriminant),
        );
        let Some(before) = self.logged.replace(kind) else {
            return log_outage(error, base, true);
        };
        if before != kind {
            log_outage(error, base, false);
        }
    }

    pub(super) fn status(&self) -> ApiStatus {
        let latest = self.latest.as_ref();
        let (state, since) = match self.up {
            None => (ApiState::Unknown, None),
            Some(false) => (ApiState::Down, self.since),
            Some(true) if self.breaker.has_failed() => {
                (ApiState::Failing, Some(self.breaker.since()))
            }
            Some(true) => (ApiState::Up, self.since),
        };
        let status = ApiStatus {
            state,
            since,
            problem: self.problem.clone(),
            lasts: self.lasts,
            rate_limit: self.rate_limit,
            asked_at: latest.map(|latest| Millis::now().minus(latest.at.elapsed())),
            request: latest.map(|latest| latest.target.name()),
            response: latest.map(|latest| match &latest.response {
                Ok(status) => status.to_string(),
                Err(reason) => reason.clone(),
            }),
        };
        status.without_passed_limit(Millis::now())
    }

    /// Restores the status as of the end of the last session. Failures too few for an outage are not restored.
    pub(super) fn recall(&mut self, api: Api, status: &ApiStatus) {
        if let Some(limit) = status.rate_limit {
            self.limited(limit, api);
        }
        let up = match status.state {
            ApiState::Unknown | ApiState::Failing => return,
            ApiState::Up => true,
            ApiState::Down => false,
        };
        self.up = Some(up);
        self.since = status.since;
        self.problem = status.problem.clone();
        self.lasts = status.lasts;
    }
}

/// Logs an outage: its beginning, or another reason for it.
fn log_outage(error: &ApiError, base: &Url, begins: bool) {
    let api = error.api;
    let Failure {
        reason,
        request,
        response,
    } = error.logged();
    let text = match (begins, error.lasts()) {
        (true, true) => format!(
            "{api} is down until its settings are corrected; pausing requests to it and probing with one at a time"
        ),
        (true, false) => {
            format!("{api} is down; pausing requests to it and probing with one at a time")
        }
        (false, true) => {
            format!("{api} is still down, now for another reason, until its settings are corrected")
        }
        (false, false) => format!("{api} is still down, now for another reason"),
    };
    if error.lasts() {
        tracing::error!(reason, request, response, url = %base, "{text}");
    } else {
        tracing::warn!(reason, request, response, url = %base, "{text}");
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    /// The base URL of another API may begin with that of this one.
    #[test]
    fn status_belongs_to_one_base_url() {
        let status = |request: &str| ApiStatus {
            request: Some(request.to_owned()),
            ..ApiStatus::default()
        };
        for (request, base, is_of) in [
            ("GET http://h:1/chats", "http://h:1", true),
            ("GET http://h:1/events", "http://h:1", true),
            ("PATCH https://h/api/chats/7", "https://h/api", true),
            ("PATCH https://h/api/chats/7", "https://h/api/", true),
            ("POST https://h/api/agents", "https://h/ap", false),
            ("POST https://h/api2/agents", "https://h/api", false),
            ("POST https://h/api/v2/agents", "https://h/api", false),
            ("POST https://h/api/agents", "https://h", false),
            ("POST https://h/api/agents", "https://h/api/v2", false),
            ("POST https://proxy/https://h/chats", "https://h", false),
        ] {
            let base = Url::parse(base).expect("a URL");
            assert_eq!(status(request).is_of(&base), is_of, "{request} {base}");
        }
        let base = Url::parse("https://h").expect("a URL");
        assert!(!ApiStatus::default().is_of(&base));
    }

    /// The daemon stores changes at once, because a crash must not hide a rate limit.
    #[tokio::test]
    async fn changes_are_announced() {
        let mut health = Health::default();
        let is_changed = async |health: &Health| {
            let changed = health.changed.notified();
            timeout(Duration::ZERO, changed).await.is_ok()
        };
        assert!(!is_changed(&health).await);
        health.succeeded(Api::BigChat, Route::Events);
        assert!(is_changed(&health).await);
        health.succeeded(Api::BigChat, Route::Events);
        assert!(!is_changed(&health).await, "it was up");
        let now = Millis::now();
        let limit = RateLimit {
            at: now,
            until: now.plus(Duration::from_secs(30)),
            status: 429,
        };
        health.limited(limit, Api::BigChat);
        assert!(is_changed(&health).await);
        assert_eq!(health.status().rate_limit, Some(limit));
    }
}
