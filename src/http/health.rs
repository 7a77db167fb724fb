//! Whether an API is up, as its own results show: nobody asks it for that. The log says when that changes.
//!
//! One scheme for both APIs: an outage that ends without anybody's doing is a warning, as is its end; what stays until
//! somebody acts is an error.

use std::time::Instant;

use reqwest::StatusCode;
use serde::Serialize;
use url::Url;

use super::breaker::{Breaker, Circuit};
use super::error::{ApiError, Sign};
use super::route::Route;
use super::{Api, Target};
use crate::domain::backoff::Policy;
use crate::domain::time::Millis;

/// How much of a response is stored along with the problem, in characters.
const MAX_RESPONSE: usize = 200;

/// An API as the daemon last found it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ApiStatus {
    /// `None`: not known yet.
    pub up: Option<bool>,
    /// Since when it is up or down.
    pub since: Option<Millis>,
    /// The end of the latest exchange.
    pub asked_at: Option<Millis>,
    /// Method and URL, without its query, which may hold an e-mail address.
    pub request: Option<String>,
    /// The status, or why there was no response.
    pub response: Option<String>,
    /// While it is down: why.
    pub trouble: Option<String>,
    /// And whether it stays so until somebody acts.
    pub lasts: bool,
}

/// The latest exchange.
#[derive(Debug, Clone)]
pub(super) struct Latest {
    pub(super) at: Instant,
    pub(super) target: Target,
    pub(super) response: Result<StatusCode, String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Logged {
    Transient,
    Lasting,
}

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Health {
    pub(super) breaker: Breaker,
    up: Option<bool>,
    since: Option<Millis>,
    problem: Option<String>,
    lasts: bool,
    /// The outage was logged in this session, as one that ends without anybody's doing or not.
    logged: Option<Logged>,
    pub(super) latest: Option<Latest>,
}

impl Health {
    pub(super) fn is_down(&self) -> bool {
        self.up == Some(false)
    }

    pub(super) fn circuit(&self, now: Millis) -> Circuit {
        self.breaker.circuit(now)
    }

    /// A request succeeded.
    pub(super) fn succeeded(&mut self, api: Api, route: Route) {
        if !self.breaker.succeeded(route) || self.up == Some(true) {
            return;
        }
        if self.is_down() {
            tracing::warn!(since = %self.since.unwrap_or_default(), "{api} is back");
        }
        self.logged = None;
        self.up = Some(true);
        self.since = Some(Millis::now());
        self.problem = None;
        self.lasts = false;
    }

    /// A request failed.
    pub(super) fn failed(&mut self, error: &ApiError, route: Route, base: &Url, policy: &Policy) {
        match error.kind.sign(route.is_read()) {
            Sign::Up => return self.succeeded(error.api, route),
            Sign::Neither => return,
            Sign::Down => {}
        }
        self.breaker
            .failed(route, Millis::now(), policy, rand::random());
        if !self.breaker.is_down() {
            return;
        }
        self.log(error, base);
        let response = error.exchange.logged().response;
        let response: String = response.chars().take(MAX_RESPONSE).collect();
        if !self.is_down() {
            self.since = Some(self.breaker.since());
        }
        self.up = Some(false);
        self.problem = Some(format!("{}: {response}", error.summary()));
        self.lasts = error.lasts();
    }

    /// Logs an outage when it begins, and when it turns out that it does not end without anybody's doing.
    fn log(&mut self, error: &ApiError, base: &Url) {
        let how = match error.lasts() {
            false => Logged::Transient,
            true => Logged::Lasting,
        };
        if self.logged.is_some() && (self.logged == Some(how) || how == Logged::Transient) {
            return;
        }
        self.logged = Some(how);
        let (api, reason, exchange) = (error.api, error.summary(), error.exchange.logged());
        let (request, response) = (exchange.request, exchange.response);
        if how == Logged::Transient {
            tracing::warn!(
                reason, request, response, url = %base,
                "{api} is down; requests to it wait, and one at a time probes it"
            );
        } else {
            tracing::error!(
                reason, request, response, url = %base,
                "{api} is down until its settings are corrected; requests to it wait, and one at a time probes it"
            );
        }
    }

    pub(super) fn status(&self) -> ApiStatus {
        let latest = self.latest.as_ref();
        ApiStatus {
            up: self.up,
            since: self.since,
            trouble: self.problem.clone(),
            lasts: self.lasts,
            asked_at: latest.map(|latest| Millis::now().minus(latest.at.elapsed())),
            request: latest.map(|latest| latest.target.name()),
            response: latest.map(|latest| match &latest.response {
                Ok(status) => status.to_string(),
                Err(why) => why.clone(),
            }),
        }
    }

    /// Takes over how it was when the last session ended.
    pub(super) fn recall(&mut self, status: &ApiStatus) {
        self.up = status.up;
        self.since = status.since;
        self.problem = status.trouble.clone();
        self.lasts = status.lasts;
    }
}
