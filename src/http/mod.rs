//! HTTP for the two APIs: one request, one response, bounded in time and size, without hidden retries or redirects. The
//! daemon's guarantees rest on knowing whether each request was sent.
//!
//! Each API has a client, [`Http`], with its circuit breaker, rate limit and health. No request and no credentials go
//! to any host but the configured one. [`crate::bigchat`] and [`crate::our_api`] build the requests and interpret the
//! responses.

mod api;
mod breaker;
mod error;
mod exchange;
mod health;
mod rate_limit;
pub mod route;
mod transport;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use url::{Position, Url};

pub use self::api::Api;
pub use self::breaker::Circuit;
pub use self::error::{ApiError, ErrorKind, Resource};
pub use self::exchange::{Cause, Exchange, json, shortened, unreadable};
pub use self::health::{ApiState, ApiStatus};
use self::health::{Health, Latest};
pub use self::rate_limit::{RETRY_AFTER_MAX, RateLimit};
use self::route::Route;
pub use self::transport::{Network, NoResponse, Request, Response, Sending, Transport};
pub(crate) use self::transport::{cause, client};
use crate::domain::backoff::Policy;
use crate::domain::time::Millis;
use crate::mutex::lock;
use crate::settings::Token;
use crate::telemetry::liveness;

/// The client of one API at one base URL.
#[derive(Debug)]
pub struct Http {
    api: Api,
    transport: Box<dyn Transport>,
    base: Url,
    token: Token,
    /// Back-off between probes.
    policy: Policy,
    health: Mutex<Health>,
    observer: Option<Box<dyn RequestObserver>>,
}

/// A route and its URL, built once for many requests.
#[derive(Debug, Clone)]
pub struct Target {
    pub route: Route,
    url: Arc<Url>,
}

pub trait RequestObserver: std::fmt::Debug + Send + Sync {
    /// Called after each request, with the status of the response or the kind of error.
    fn request_made(&self, route: Route, outcome: Result<StatusCode, ErrorKind>, took: Duration);
}

#[derive(Debug, Clone)]
pub struct Apis {
    pub bigchat: Arc<Http>,
    pub our_api: Arc<Http>,
}

impl Apis {
    pub fn of(&self, api: Api) -> &Http {
        match api {
            Api::BigChat => &self.bigchat,
            Api::OurApi => &self.our_api,
        }
    }

    pub fn status(&self, api: Api) -> ApiStatus {
        self.of(api).status()
    }
}

impl Target {
    /// Path and query.
    fn path(&self) -> &str {
        &self.url[Position::BeforePath..]
    }

    /// Method and URL, without the query, which may contain an e-mail address.
    fn name(&self) -> String {
        let Self { route, url } = self;
        format!("{} {}", route.method(), &url[..Position::AfterPath])
    }

    /// Method and path.
    fn head(&self) -> String {
        let path = &self.url[Position::BeforePath..Position::AfterPath];
        format!("{} {path}", self.route.method())
    }
}

impl Http {
    pub fn new(
        api: Api,
        transport: impl Transport + 'static,
        base: Url,
        token: Token,
        policy: Policy,
    ) -> Self {
        Self {
            api,
            transport: Box::new(transport),
            base,
            token,
            policy,
            health: Mutex::default(),
            observer: None,
        }
    }

    pub fn observed_by(self, observer: impl RequestObserver + 'static) -> Self {
        Self {
            observer: Some(Box::new(observer)),
            ..self
        }
    }

    pub fn base(&self) -> &Url {
        &self.base
    }

    /// The end of the rate limit, if one is in force.
    pub fn rate_limited_until(&self, now: Millis) -> Option<Millis> {
        let limit = lock(&self.health).rate_limit?;
        limit.is_in_force(now).then_some(limit.until)
    }

    /// The state of the circuit breaker, apart from the rate limit.
    pub fn circuit(&self, now: Millis) -> Circuit {
        lock(&self.health).circuit(now)
    }

    /// Whether several requests in a row have failed.
    pub fn is_failing(&self) -> bool {
        lock(&self.health).breaker.is_failing()
    }

    /// Whether there is an outage. An outage in the last session counts until a request succeeds.
    pub fn is_down(&self) -> bool {
        lock(&self.health).is_down()
    }

    pub fn status(&self) -> ApiStatus {
        lock(&self.health).status()
    }

    /// Waits until a rate limit begins, a request fails, or a failure ends.
    pub async fn changed(&self) {
        let changed = Arc::clone(&lock(&self.health).changed);
        changed.notified().await;
    }

    /// If the latest requests have failed, makes the state unknown, because no further request is due.
    pub fn forget_failures(&self) {
        lock(&self.health).forget_failures(self.api);
    }

    /// Restores the status as of the end of the last session.
    pub fn recall(&self, status: &ApiStatus) {
        lock(&self.health).recall(self.api, status);
    }

    /// The target of a route, with `id` and `query` (already encoded) if the route has them.
    pub fn target(&self, route: Route, id: &str, query: Option<&str>) -> Target {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(route.path(id));
        }
        url.set_query(query);
        Target {
            route,
            url: Arc::new(url),
        }
    }

    /// Sends a request with `body`, which is JSON, and parses a successful response with `read`. If the response is
    /// unusable, `read` returns the reason.
    pub async fn call<T>(
        &self,
        target: &Target,
        body: Option<&str>,
        read: impl FnOnce(&mut Response) -> Result<T, String>,
    ) -> Result<T, ApiError> {
        let sent = self.send(target, body).await;
        self.conclude(target, body, sent, read)
    }

    /// The first half of [`Self::call`].
    pub async fn send(&self, target: &Target, body: Option<&str>) -> Result<Response, NoResponse> {
        let limit = lock(&self.health).rate_limit;
        if let Some(RateLimit { until, .. }) =
            limit.filter(|limit| limit.is_in_force(Millis::now()))
        {
            let kind = ErrorKind::RateLimited {
                until,
                outcome_unknown: false,
            };
            let reason = format!("not sent: rate-limited until {until}");
            return Err(NoResponse::new(kind, reason));
        }
        self.exchange(target, body).await
    }

    async fn exchange(&self, target: &Target, body: Option<&str>) -> Result<Response, NoResponse> {
        let sent = Instant::now();
        let request = Request {
            method: target.route.method(),
            url: &target.url,
            at: sent,
            token: self.token.get(),
            body,
        };
        let response = self.transport.send(request).await;
        let ended = Instant::now();
        liveness::record_progress(ended);
        let status = match &response {
            Ok(response) => Ok(response.status),
            Err(error) => Err(error.kind),
        };
        if let Some(observer) = &self.observer {
            observer.request_made(target.route, status, ended - sent);
        }
        let mut health = lock(&self.health);
        if let Ok(Response {
            rate_limit: Some(limit),
            ..
        }) = &response
        {
            health.limited(*limit, self.api);
        }
        health.latest = Some(Latest {
            at: ended,
            target: target.clone(),
            response: match &response {
                Ok(response) => Ok(response.status),
                Err(error) => Err(error.reason.clone()),
            },
        });
        drop(health);
        response
    }

    /// The second half of [`Self::call`]: interprets the response and records the API's health.
    pub fn conclude<T>(
        &self,
        target: &Target,
        body: Option<&str>,
        sent: Result<Response, NoResponse>,
        read: impl FnOnce(&mut Response) -> Result<T, String>,
    ) -> Result<T, ApiError> {
        let route = target.route;
        let is_withheld = matches!(
            &sent,
            Err(NoResponse {
                kind: ErrorKind::RateLimited { .. },
                ..
            })
        );
        let (kind, exchange) = match sent {
            Ok(mut response) => {
                let mut cause = Cause::of(&response);
                let kind = match (ErrorKind::of(route, &response), response.rate_limit) {
                    (_, Some(limit)) => ErrorKind::RateLimited {
                        until: limit.until,
                        outcome_unknown: response.status.is_server_error(),
                    },
                    (Some(kind), None) => kind,
                    (None, None) => match read(&mut response) {
                        Ok(value) => {
                            lock(&self.health).succeeded(self.api, route);
                            return Ok(value);
                        }
                        Err(reason) => {
                            cause = Some(Cause::InvalidJson(reason));
                            ErrorKind::OutcomeUnknown { timed_out: false }
                        }
                    },
                };
                (kind, Exchange::new(target, body, Ok(&response), cause))
            }
            Err(NoResponse {
                kind,
                reason,
                too_large,
            }) => {
                let is_page = too_large && route == Route::Events;
                let cause = is_page.then_some(Cause::PageTooLarge);
                (kind, Exchange::new(target, body, Err(&reason), cause))
            }
        };
        let error = ApiError {
            api: self.api,
            kind,
            exchange: Box::new(exchange),
        };
        if !is_withheld {
            self.failed(&error);
        }
        Err(error)
    }

    /// The error for a success whose record is unusable.
    pub fn unusable(&self, target: &Target, resource: Resource) -> ApiError {
        let reason = "the record is unusable";
        let exchange = Exchange::new(target, None, Err(reason), None);
        ApiError {
            api: self.api,
            kind: ErrorKind::Unusable(resource),
            exchange: Box::new(exchange),
        }
    }

    /// Reclassifies an error in the light of later responses, and records the API's health again.
    pub fn reclassify(&self, error: ApiError, kind: ErrorKind) -> ApiError {
        let error = error.with_kind(kind);
        self.failed(&error);
        error
    }

    fn failed(&self, error: &ApiError) {
        lock(&self.health).failed(error, &self.base, &self.policy);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::backoff::tests::POLICY;

    fn http(base: &str) -> Http {
        let base: Url = base.parse().expect("a URL");
        let network = Network::new(&base, Duration::from_secs(1)).expect("a client");
        Http::new(Api::OurApi, network, base, Token::default(), POLICY)
    }

    #[test]
    fn encoded_path_below_the_base() {
        let chats = http("http://h:1").target(Route::Chats, "", None);
        assert_eq!(chats.url.as_str(), "http://h:1/chats");
        let base = http("http://h/api/");
        let odd = base.target(Route::ChangeChat, "a/../b?", Some("x=1"));
        assert_eq!(odd.url.as_str(), "http://h/api/chats/a%2F..%2Fb%3F?x=1");
    }

    /// Queries and bodies contain messages, names and addresses, and a response may repeat them.
    #[test]
    fn secrets_are_not_logged() {
        let http = http("http://h:1/api");
        let agents = http.target(Route::Agents, "", Some("email=secret"));
        let sent = Ok(Response {
            status: StatusCode::UNPROCESSABLE_ENTITY,
            date: None,
            rate_limit: None,
            location: None,
            body: b"secret".to_vec(),
        });
        let concluded: Result<(), _> = http.conclude(&agents, Some("secret"), sent, |_| Ok(()));
        let error = concluded.expect_err("a rejection");
        assert_eq!(
            error.failure().request,
            "GET /api/agents?email=secret secret"
        );
        assert_eq!(error.failure().response, "422 secret");
        assert_eq!(error.logged().request, "GET /api/agents");
        assert_eq!(error.logged().response, "422");
        let problem = http.status().problem.expect("a problem");
        assert_eq!(
            problem,
            "OurAPI does not accept the query: GET http://h:1/api/agents → 422"
        );
        let unreachable = Err(NoResponse::unreachable("refused"));
        let concluded: Result<(), _> = http.conclude(&agents, None, unreachable, |_| Ok(()));
        let error = concluded.expect_err("no response");
        assert_eq!(error.logged().response, "no connection: refused");
    }
}
