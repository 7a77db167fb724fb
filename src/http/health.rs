//! Whether an API is up, by the results of ordinary requests. Changes are logged.
//!
//! An outage that may end without action of the operator is a warning, as is its end. One that lasts until the operator
//! acts is an error.

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

/// Maximum length in characters of the response that is stored with a problem.
const MAX_RESPONSE: usize = 200;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ApiStatus {
    /// `None`: unknown.
    pub up: Option<bool>,
    /// The time of the latest change of `up`.
    pub since: Option<Millis>,
    /// The end of the latest exchange.
    pub asked_at: Option<Millis>,
    /// Method and URL of it, without the query, which may have an e-mail address.
    pub request: Option<String>,
    /// Its status, or why there was no response.
    pub response: Option<String>,
    /// The cause of an outage.
    pub problem: Option<String>,
    /// The outage lasts until the operator acts.
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

#[derive(Debug, Default)]
pub(super) struct Health {
    pub(super) breaker: Breaker,
    up: Option<bool>,
    since: Option<Millis>,
    problem: Option<String>,
    lasts: bool,
    /// How the outage was logged in this session.
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

    /// Logs an outage when it begins, and again if it proves lasting.
    fn log(&mut self, error: &ApiError, base: &Url) {
        let kind = match error.lasts() {
            false => Logged::Transient,
            true => Logged::Lasting,
        };
        if self.logged.is_some() && (self.logged == Some(kind) || kind == Logged::Transient) {
            return;
        }
        self.logged = Some(kind);
        let (api, reason, exchange) = (error.api, error.summary(), error.exchange.logged());
        let (request, response) = (exchange.request, exchange.response);
        if kind == Logged::Transient {
            tracing::warn!(
                reason, request, response, url = %base,
                "{api} is down; pausing requests to it and probing with one at a time"
            );
        } else {
            tracing::error!(
                reason, request, response, url = %base,
                "{api} is down until its settings are corrected; pausing requests to it and probing with one at a time"
            );
        }
    }

    pub(super) fn status(&self) -> ApiStatus {
        let latest = self.latest.as_ref();
        ApiStatus {
            up: self.up,
            since: self.since,
            problem: self.problem.clone(),
            lasts: self.lasts,
            asked_at: latest.map(|latest| Millis::now().minus(latest.at.elapsed())),
            request: latest.map(|latest| latest.target.name()),
            response: latest.map(|latest| match &latest.response {
                Ok(status) => status.to_string(),
                Err(reason) => reason.clone(),
            }),
        }
    }

    /// Restores the status at the end of the last session.
    pub(super) fn recall(&mut self, status: &ApiStatus) {
        self.up = status.up;
        self.since = status.since;
        self.problem = status.problem.clone();
        self.lasts = status.lasts;
    }
}
