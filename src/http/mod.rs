//! Carrying requests to the two APIs: one request, one response, within a time and a size, and nothing done behind the
//! caller's back. The daemon's promises rest on knowing of each request whether it was sent.
//!
//! Each API has a client, [`Http`], which owns what is known of it: its circuit breaker, its rate limit, and whether it is
//! up. No request and no credentials go to another host than the configured one. What is asked and what it means is left
//! to [`crate::bigchat`] and [`crate::our_api`].

mod api;
mod breaker;
mod error;
mod exchange;
mod health;
mod rate_limit;
pub mod route;
mod transport;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde::Serialize;
use url::Url;

pub use self::api::Api;
pub use self::breaker::Circuit;
pub use self::error::{ApiError, ErrorKind, REJECTED_WRITE, Resource};
pub use self::exchange::{
    Cause, Exchange, json, request_head, response_head, shortened, unreadable,
};
pub use self::health::ApiStatus;
use self::health::{Health, Latest};
use self::rate_limit::RateLimit;
use self::route::Route;
pub use self::transport::{Network, NoResponse, Request, Response, Sending, Transport};
use crate::domain::backoff::Policy;
use crate::domain::time::Millis;
use crate::settings::Token;
use crate::telemetry::liveness;

/// The client of one API at one base URL.
#[derive(Debug)]
pub struct Http {
    api: Api,
    transport: Box<dyn Transport>,
    base: Url,
    token: Token,
    /// How probes are spaced.
    policy: Policy,
    rate_limit: RateLimit,
    health: Mutex<Health>,
    observer: Option<Box<dyn RequestObserver>>,
}

/// A route and its URL. Made once, it can be asked for often.
#[derive(Debug, Clone)]
pub struct Target {
    pub route: Route,
    url: Arc<Url>,
}

/// Who is told of each request.
pub trait RequestObserver: std::fmt::Debug + Send + Sync {
    /// A request was made: the status of its response or the reason why there was none, and how long that took.
    fn request_made(&self, route: Route, outcome: Result<StatusCode, ErrorKind>, took: Duration);
}

/// The clients of both APIs.
#[derive(Debug, Clone)]
pub struct Apis {
    pub bigchat: Arc<Http>,
    pub our_api: Arc<Http>,
}

impl Apis {
    /// The client of one of them.
    pub fn of(&self, api: Api) -> &Http {
        match api {
            Api::BigChat => &self.bigchat,
            Api::OurApi => &self.our_api,
        }
    }

    /// Whether an API is up, with the latest exchange.
    pub fn status(&self, api: Api) -> ApiStatus {
        self.of(api).status()
    }
}

impl Target {
    /// Its path and query.
    fn path(&self) -> &str {
        &self.url[url::Position::BeforePath..]
    }

    /// Its method and URL, without its query: that may hold an e-mail address.
    fn name(&self) -> String {
        let Self { route, url } = self;
        format!("{} {}", route.method(), &url[..url::Position::AfterPath])
    }
}

impl Http {
    /// A client of the API at `base`. While the API fails, probes are spaced by `policy`.
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
            rate_limit: RateLimit::default(),
            health: Mutex::default(),
            observer: None,
        }
    }

    /// The same, with its requests reported to an observer.
    pub fn observed_by(self, observer: impl RequestObserver + 'static) -> Self {
        Self {
            observer: Some(Box::new(observer)),
            ..self
        }
    }

    /// The configured base URL.
    pub fn base(&self) -> &Url {
        &self.base
    }

    /// Until when nothing may be asked, if the API asked for that.
    pub fn rate_limited_until(&self, now: Millis) -> Option<Millis> {
        self.rate_limit.until(now)
    }

    /// Until when the API asked to be left alone, whether that is over or not.
    pub fn not_before(&self) -> Millis {
        self.rate_limit.not_before()
    }

    /// Leaves the API alone until then.
    pub fn hold_until(&self, until: Millis) {
        self.rate_limit.raise(until);
    }

    /// What may be asked now, apart from the rate limit.
    pub fn circuit(&self, now: Millis) -> Circuit {
        self.health().circuit(now)
    }

    /// Whether the API fails, and not only for one request.
    pub fn is_failing(&self) -> bool {
        self.health().breaker.is_failing()
    }

    /// Whether that is an outage, or it was one when the last session ended and nothing has shown its end.
    pub fn is_down(&self) -> bool {
        self.health().is_down()
    }

    /// Whether the API is up, with the latest exchange.
    pub fn status(&self) -> ApiStatus {
        self.health().status()
    }

    /// Takes over how the API was when the last session ended.
    pub fn recall(&self, status: &ApiStatus) {
        self.health().recall(status);
    }

    /// A route below the base URL, for what `id` names and with `query` (encoded already), if it takes them.
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

    /// Sends one request, with `body` as JSON, and reads the response with `read`, which says what is wrong with it if
    /// it is unusable.
    pub async fn call<T>(
        &self,
        target: &Target,
        body: Option<&impl Serialize>,
        read: impl FnOnce(&mut Response) -> Result<T, String>,
    ) -> Result<T, ApiError> {
        let sent = self.send(target, body).await;
        self.conclude(target, body, sent, read)
    }

    /// The first half of [`Self::call`].
    pub async fn send(
        &self,
        target: &Target,
        body: Option<&impl Serialize>,
    ) -> Result<Response, NoResponse> {
        if let Some(until) = self.rate_limit.until_now() {
            return Err(NoResponse {
                kind: ErrorKind::RateLimited {
                    until,
                    outcome_unknown: false,
                },
                why: format!("the API asked to be left alone until {until}"),
            });
        }
        let body = body
            .map(serde_json::to_vec)
            .transpose()
            .map_err(NoResponse::impossible)?;
        self.exchange(target, body).await
    }

    async fn exchange(
        &self,
        target: &Target,
        body: Option<Vec<u8>>,
    ) -> Result<Response, NoResponse> {
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
        liveness::goes_on(ended);
        let status = match &response {
            Ok(response) => Ok(response.status),
            Err(error) => Err(error.kind),
        };
        if let Some(observer) = &self.observer {
            observer.request_made(target.route, status, ended - sent);
        }
        self.health().latest = Some(Latest {
            at: ended,
            target: target.clone(),
            response: match &response {
                Ok(response) => Ok(response.status),
                Err(error) => Err(error.why.clone()),
            },
        });
        if let Ok(response) = &response
            && let Some(until) = response.retry_at
        {
            self.rate_limit.raise(until);
        }
        response
    }

    /// The second half of [`Self::call`]: what became of the request, which also shows how the API is.
    pub fn conclude<T>(
        &self,
        target: &Target,
        body: Option<&impl Serialize>,
        sent: Result<Response, NoResponse>,
        read: impl FnOnce(&mut Response) -> Result<T, String>,
    ) -> Result<T, ApiError> {
        let route = target.route;
        let mut cause = None;
        let (kind, mut exchange) = match sent {
            Ok(mut response) => {
                cause = Cause::of(&response);
                let kind = match (ErrorKind::of(route, &response), response.retry_at) {
                    (_, Some(until)) => ErrorKind::RateLimited {
                        until,
                        outcome_unknown: response.status.is_server_error(),
                    },
                    (Some(kind), None) => kind,
                    (None, None) => match read(&mut response) {
                        Ok(value) => {
                            self.health().succeeded(self.api, route);
                            return Ok(value);
                        }
                        Err(why) => {
                            cause = Some(Cause::InvalidJson(why));
                            ErrorKind::OutcomeUnknown { timed_out: false }
                        }
                    },
                };
                (kind, Exchange::new(target, body, Ok(&response)))
            }
            Err(NoResponse { kind, why }) => (kind, Exchange::new(target, body, Err(&why))),
        };
        exchange.cause = cause;
        let error = ApiError {
            api: self.api,
            kind,
            exchange: Box::new(exchange),
        };
        self.failed(&error, route);
        Err(error)
    }

    /// A result turned out to mean something else than it did by itself.
    pub fn reconsider(&self, error: ApiError, route: Route, kind: ErrorKind) -> ApiError {
        let error = error.with_kind(kind);
        self.failed(&error, route);
        error
    }

    fn failed(&self, error: &ApiError, route: Route) {
        self.health().failed(error, route, &self.base, &self.policy);
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
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
    fn paths_are_encoded_and_stay_below_the_base() {
        let chats = http("http://h:1").target(Route::Chats, "", None);
        assert_eq!(chats.url.as_str(), "http://h:1/chats");
        let base = http("http://h/api/");
        let odd = base.target(Route::ChangeChat, "a/../b?", Some("x=1"));
        assert_eq!(odd.url.as_str(), "http://h/api/chats/a%2F..%2Fb%3F?x=1");
    }
}
