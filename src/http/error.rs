//! Why a request did not succeed, classified by the caller's options.

use std::fmt;

use super::Target;
use super::api::Api;
use super::exchange::{Cause, Exchange};
use super::route::Route;
use super::transport::Response;
use crate::domain::named::named;
use crate::domain::progress::Failure;
use crate::domain::time::Millis;
use crate::telemetry::log;

#[derive(Debug, Clone)]
pub struct ApiError {
    pub api: Api,
    pub kind: ErrorKind,
    /// Boxed, since results travel through many futures.
    pub exchange: Box<Exchange>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// Never sent, or refused without effect. Retry later.
    Unreachable,
    /// The request may have been carried out. Read back, then retry.
    OutcomeUnknown {
        /// Whether it may still be carried out.
        timed_out: bool,
    },
    /// Send nothing before `until`.
    RateLimited {
        until: Millis,
        /// Whether the request may have been carried out: possibly after a 503, but not after a 429.
        outcome_unknown: bool,
    },
    /// Not sent: deliveries are paused, or the daemon is stopping. This is not an attempt, and shows nothing about the
    /// API.
    Withheld,
    /// 401, 403 or 407: no request will succeed before the credentials are renewed. Like the next kind, it may come
    /// from a proxy that has forwarded the request.
    Unauthorized,
    /// Another service is answering.
    WrongService,
    /// The API does not know the resource. In OurAPI, only a list proves that a resource is gone.
    NotFound(Resource),
    /// A success whose record is unusable. It counts as not found, but proves nothing.
    Unusable(Resource),
    /// The API denies an advisor, a conversation or an agent, but not yet often enough to be believed. Retry later.
    Denied,
    /// An equal resource exists, if the service is OurAPI at all.
    Conflict,
    /// An equal resource exists, and it cannot be identified. Do not retry.
    Ambiguous,
    /// Never acceptable. Do not retry.
    Rejected,
}

named! {
    /// A resource that a request can name.
    Resource {
        Events = "events",
        Conversation = "conversation",
        Advisor = "advisor",
        Chat = "chat",
        Agent = "agent",
    }
}

/// What a result shows about the health of an API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sign {
    Up,
    Down,
    Neither,
}

impl ErrorKind {
    /// Whether the request may have been carried out.
    pub fn outcome_unknown(self) -> bool {
        matches!(
            self,
            Self::OutcomeUnknown { .. }
                | Self::RateLimited {
                    outcome_unknown: true,
                    ..
                }
        )
    }

    /// The same, or a proxy may have forwarded the request before it answered itself.
    pub fn may_be_carried_out(self) -> bool {
        self.outcome_unknown() || matches!(self, Self::Unauthorized | Self::WrongService)
    }

    /// Whether the request may still be carried out.
    pub fn timed_out(self) -> bool {
        self == Self::OutcomeUnknown { timed_out: true }
    }

    /// Whether a retry at once may succeed.
    pub fn is_transient(self) -> bool {
        matches!(self, Self::Unreachable | Self::OutcomeUnknown { .. })
    }

    /// A rejected write shows that the API works; a rejected read shows that it does not.
    pub(super) fn sign(self, is_read: bool) -> Sign {
        match self {
            Self::Unreachable
            | Self::OutcomeUnknown { .. }
            | Self::Unauthorized
            | Self::WrongService => Sign::Down,
            Self::Rejected if is_read => Sign::Down,
            Self::Rejected => Sign::Up,
            Self::RateLimited { .. }
            | Self::Withheld
            | Self::NotFound(_)
            | Self::Unusable(_)
            | Self::Denied
            | Self::Conflict
            | Self::Ambiguous => Sign::Neither,
        }
    }

    /// The meaning of a status on a route; `None`: success.
    pub(super) fn of(route: Route, response: &Response) -> Option<Self> {
        use Route::*;
        let Response { status, body, .. } = response;
        let is_html = body.trim_ascii_start().starts_with(b"<");
        Some(match (status.as_u16(), route) {
            (200..=299, _) => return None,
            (401 | 403 | 407, _) => Self::Unauthorized,
            (423 | 429, _) => Self::Unreachable,
            (404, ChangeChat | Messages | AddMessage) => Self::NotFound(Resource::Chat),
            (404, Agent) => Self::NotFound(Resource::Agent),
            (404, Chats | Agents) => Self::WrongService,
            (404 | 409, CreateChat | CreateAgent) if !is_html => Self::Conflict,
            // OurAPI answers 500 to a name or an address that is taken; the caller checks.
            (500, CreateAgent) if !is_html => Self::Conflict,
            (404, Events) => Self::NotFound(Resource::Events),
            (404, Conversation) => Self::NotFound(Resource::Conversation),
            (404, Advisor) => Self::NotFound(Resource::Advisor),
            (400, CreateChat | ChangeChat | AddMessage) if names_no_agent(body) => {
                Self::NotFound(Resource::Agent)
            }
            (504 | 524, _) => Self::OutcomeUnknown { timed_out: true },
            (408 | 425, _) => Self::OutcomeUnknown { timed_out: false },
            (405 | 421 | 426, _) => Self::WrongService,
            (400..=499, _) if is_html => Self::WrongService,
            (400..=499, _) => Self::Rejected,
            _ => Self::OutcomeUnknown { timed_out: false },
        })
    }
}

/// OurAPI's `That agent does not exist.`
fn names_no_agent(body: &[u8]) -> bool {
    const NO_SUCH_AGENT: &[u8] = b"agent does not exist";
    body.windows(NO_SUCH_AGENT.len())
        .any(|part| part == NO_SUCH_AGENT)
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Failure {
            reason,
            request,
            response,
        } = self.logged();
        write!(f, "{reason}: {request} -> {response}")
    }
}

impl std::error::Error for ApiError {}

impl ApiError {
    pub fn not_sent(api: Api, kind: ErrorKind, reason: impl Into<String>) -> Self {
        let exchange = Exchange {
            response: reason.into(),
            ..Exchange::default()
        };
        Self {
            api,
            kind,
            exchange: Box::new(exchange),
        }
    }

    /// Whether the failure lasts until the operator acts, unlike an outage of the API.
    pub fn lasts(&self) -> bool {
        self.exchange.cause.is_some() || !self.kind.is_transient()
    }

    /// The remedy, for the operator.
    pub fn remedy(&self) -> String {
        let (api, url) = (self.api, self.api.url_setting());
        match (&self.exchange.cause, self.kind) {
            (Some(Cause::Firewall), _) => {
                format!("allow requests from this machine to {api}, or correct {url}")
            }
            (Some(Cause::PageTooLarge), _) => "set a shorter --max-window".to_owned(),
            (Some(_), _) | (None, ErrorKind::WrongService) => {
                format!("set {url} to the base URL of {api}")
            }
            (None, ErrorKind::Unauthorized) => {
                format!("renew {} or correct {url}", api.token_setting())
            }
            (None, ErrorKind::RateLimited { .. }) => {
                format!("wait; nothing is lost; if this lasts, ask the operator of {api}")
            }
            (None, kind) if kind.is_transient() => {
                format!("start {api}, or correct {url}")
            }
            _ => format!("the response has {api}'s reason; correct {url}, or update this program"),
        }
    }

    /// Whether the API does not know the resource, or has no usable record of it.
    pub fn is_not_found(&self) -> bool {
        matches!(self.kind, ErrorKind::NotFound(_) | ErrorKind::Unusable(_))
    }

    pub fn with_kind(self, kind: ErrorKind) -> Self {
        Self { kind, ..self }
    }

    /// As stored with an event.
    pub fn failure(&self) -> Failure {
        let exchange = &self.exchange;
        Failure {
            reason: match &exchange.detail {
                Some(detail) if self.kind == ErrorKind::Rejected => {
                    format!("{}: {detail}", self.summary())
                }
                _ => self.summary(),
            },
            request: exchange.request.clone(),
            response: exchange.response.clone(),
        }
    }

    /// As logged: without bodies and queries, unless message text may be logged.
    pub fn logged(&self) -> Failure {
        if log::shows_message_text() {
            return self.failure();
        }
        let Exchange {
            target,
            status,
            response,
            ..
        } = &*self.exchange;
        Failure {
            reason: self.summary(),
            request: target.as_ref().map(Target::head).unwrap_or_default(),
            response: match status {
                Some(status) => status.as_str().to_owned(),
                None => response.clone(),
            },
        }
    }

    /// The error in one line, without text of the request or the response.
    pub fn summary(&self) -> String {
        let api = self.api;
        if let Some(cause) = &self.exchange.cause {
            return cause.summary(api);
        }
        match self.kind {
            ErrorKind::Unreachable => {
                format!("{api} cannot be reached or refuses requests")
            }
            ErrorKind::OutcomeUnknown { timed_out: false } => {
                format!("{api} gave no usable answer")
            }
            ErrorKind::OutcomeUnknown { timed_out: true } => {
                format!("{api} did not answer in time")
            }
            ErrorKind::RateLimited { until, .. } => {
                format!("{api} is rate-limited until {until}")
            }
            ErrorKind::Withheld => format!("nothing is sent to {api} now"),
            ErrorKind::Unauthorized => format!(
                "{api} rejected the credentials; renew {} or check {}",
                api.token_setting(),
                api.url_setting()
            ),
            ErrorKind::WrongService => format!(
                "the service does not seem to be {api}; check {}",
                api.url_setting()
            ),
            ErrorKind::NotFound(resource) => format!("{api} does not know the {resource}"),
            ErrorKind::Unusable(resource) => {
                format!("{api} has no usable record of the {resource}")
            }
            ErrorKind::Denied => {
                format!(
                    "{api} denied the request; the request is repeated before the denial is believed"
                )
            }
            ErrorKind::Conflict => format!("{api} already has an equal resource"),
            ErrorKind::Ambiguous => format!(
                "{api} already has an agent with this name or address, and its lists do not show which one"
            ),
            ErrorKind::Rejected => match &self.exchange.target {
                Some(target) if target.route.is_read() => {
                    format!("{api} does not accept the query")
                }
                _ => "OurAPI permanently rejects it".to_owned(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use reqwest::StatusCode;

    use super::*;

    #[test]
    fn statuses_by_route() {
        use Route::*;
        let unknown = ErrorKind::OutcomeUnknown { timed_out: false };
        let no_chat = ErrorKind::NotFound(Resource::Chat);
        let no_agent = r#"{"detail":"That agent does not exist."}"#;
        for (status, body, route, expected) in [
            (201, "{}", CreateChat, None),
            (204, "", ChangeChat, None),
            (404, "", CreateChat, Some(ErrorKind::Conflict)),
            (409, "", CreateAgent, Some(ErrorKind::Conflict)),
            (409, "", AddMessage, Some(ErrorKind::Rejected)),
            (404, "", ChangeChat, Some(no_chat)),
            (404, "", AddMessage, Some(no_chat)),
            (404, "", Messages, Some(no_chat)),
            (404, "", Chats, Some(ErrorKind::WrongService)),
            (404, "", Agents, Some(ErrorKind::WrongService)),
            (
                404,
                "",
                Conversation,
                Some(ErrorKind::NotFound(Resource::Conversation)),
            ),
            (
                404,
                "",
                Advisor,
                Some(ErrorKind::NotFound(Resource::Advisor)),
            ),
            (
                400,
                no_agent,
                AddMessage,
                Some(ErrorKind::NotFound(Resource::Agent)),
            ),
            (400, no_agent, Events, Some(ErrorKind::Rejected)),
            (400, "", CreateChat, Some(ErrorKind::Rejected)),
            (422, "", AddMessage, Some(ErrorKind::Rejected)),
            (413, "<html>", AddMessage, Some(ErrorKind::WrongService)),
            (404, "<html>", CreateChat, Some(ErrorKind::WrongService)),
            (409, " <html>", CreateAgent, Some(ErrorKind::WrongService)),
            (500, "<html>", CreateAgent, Some(unknown)),
            (
                404,
                "<html>",
                Advisor,
                Some(ErrorKind::NotFound(Resource::Advisor)),
            ),
            (407, "", AddMessage, Some(ErrorKind::Unauthorized)),
            (421, "", AddMessage, Some(ErrorKind::WrongService)),
            (423, "", AddMessage, Some(ErrorKind::Unreachable)),
            (426, "", Events, Some(ErrorKind::WrongService)),
            (405, "", CreateChat, Some(ErrorKind::WrongService)),
            (500, "", CreateAgent, Some(ErrorKind::Conflict)),
            (500, "", CreateChat, Some(unknown)),
            (503, "", CreateAgent, Some(unknown)),
            (
                504,
                "",
                CreateAgent,
                Some(ErrorKind::OutcomeUnknown { timed_out: true }),
            ),
            (302, "", Chats, Some(unknown)),
            (408, "", AddMessage, Some(unknown)),
            (425, "", Events, Some(unknown)),
            (401, "", Chats, Some(ErrorKind::Unauthorized)),
            (403, "", AddMessage, Some(ErrorKind::Unauthorized)),
            (429, "", AddMessage, Some(ErrorKind::Unreachable)),
        ] {
            let response = Response {
                status: StatusCode::from_u16(status).expect("a status"),
                date: None,
                rate_limit: None,
                location: None,
                body: body.into(),
            };
            let kind = ErrorKind::of(route, &response);
            assert_eq!(kind, expected, "{route:?} {response:?}");
        }
    }
}
