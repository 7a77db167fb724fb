//! The OurAPI client, typed after the contract: each answer becomes what the caller can do about it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use reqwest::StatusCode;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use uuid::Uuid;

use crate::http::{Answer, Exchange, Http, NoAnswer, Target};
use crate::route::Route;
use crate::time::{Millis, Timestamp};

/// OurAPI, with a bound on the requests in flight that holds for whoever asks.
#[derive(Debug)]
pub struct OurApi {
    http: Http,
    at_once: u16,
    in_flight: Semaphore,
    /// How long a request may take, and as long again it may be under way after nobody waits for it any more.
    patience: Duration,
    /// Until when requests count as in flight that were not answered in time.
    late: Mutex<Vec<Late>>,
    /// How many requests were answered usably.
    answers: AtomicU64,
}

/// Until when a request counts as in flight that was not answered in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Late {
    /// Whatever happens to this machine's clock.
    until: Instant,
    /// By that clock, for a later session.
    by_clock: Millis,
}

/// A chat as OurAPI holds it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Chat {
    /// OurAPI's id of it.
    pub chat_id: Uuid,
    /// The conversation it is.
    pub external_id: String,
    /// Who has it.
    pub agent_id: Option<Uuid>,
    /// When it started.
    #[serde(deserialize_with = "time")]
    pub started_at: Timestamp,
    /// When it ended, as far as is known.
    #[serde(default, deserialize_with = "optional_time")]
    pub ended_at: Option<Timestamp>,
}

/// An agent as OurAPI holds it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Agent {
    /// OurAPI's id of it.
    pub agent_id: Uuid,
    /// Unique.
    pub name: String,
    /// Unique, and the identity.
    pub email: String,
}

/// A message as OurAPI holds it: its text stripped of white space at both ends.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Message {
    /// The words.
    pub text: String,
    /// When they were sent.
    #[serde(deserialize_with = "time")]
    pub sent_at: Timestamp,
}

/// A chat to be created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NewChat<'a> {
    /// Unique; cannot be changed afterwards.
    pub external_id: &'a str,
    /// When it started.
    pub started_at: Timestamp,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// Who has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<Uuid>,
}

/// What is to change of a chat: only what is named here is named to OurAPI, since what is named is set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ChatChange {
    /// The start time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// The end time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// The agent; `Some(None)` clears it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<Option<Uuid>>,
}

impl ChatChange {
    /// Whether there is nothing to change.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A message to be added to a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NewMessage<'a> {
    /// When it was sent.
    pub sent_at: Timestamp,
    /// The words.
    pub text: &'a str,
    /// Whom it is from, where that is to be said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<Uuid>,
}

/// What became of a request that did not succeed, as what the caller can do about it.
#[derive(Debug, Clone, Error)]
#[error("{trouble}: {exchange}")]
pub struct OurApiError {
    /// What the caller can do.
    pub trouble: Trouble,
    /// What was asked and answered.
    pub exchange: Exchange,
}

impl OurApiError {
    /// The same exchange, understood otherwise.
    pub fn but(self, trouble: Trouble) -> Self {
        Self { trouble, ..self }
    }
}

/// See [`OurApiError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Trouble {
    /// Never sent, or turned away unread: try again later.
    #[error("OurAPI cannot be reached or turns requests away")]
    NotCarriedOut,
    /// It may have been carried out or not: look, then try again.
    #[error(
        "OurAPI gave no usable answer, so that it is unknown whether the request was carried out"
    )]
    Unknown,
    /// Nor is it known when it will be: it may still be carried out.
    #[error(
        "OurAPI did not answer in time, so that it is unknown whether the request was carried out, or still will be"
    )]
    Late,
    /// Try again then, and ask nothing before.
    #[error("OurAPI asks to be left alone until {until}")]
    Throttled {
        /// Until when.
        until: Millis,
        /// Whether it may have been carried out (503 does not say; 429 does).
        in_doubt: bool,
    },
    /// 401 or 403: nothing will succeed until somebody mends it.
    #[error("OurAPI refuses us; check BIGCHAT_SYNC_OUR_API_TOKEN and --our-api-url")]
    Denied,
    /// 404 to a request that names nothing that could be missing, 405, or a page of HTML: this is not OurAPI.
    #[error("this does not seem to be OurAPI; check --our-api-url")]
    NotOurApi,
    /// 404 on a chat by its id: it may be gone, which only its list can tell.
    #[error("OurAPI does not know the chat")]
    NoSuchChat,
    /// 400 `That agent does not exist.`: it may be gone, which only its list can tell.
    #[error("OurAPI does not know the agent")]
    NoSuchAgent,
    /// 404 or 409 on a creation: there is one like it already (if this is OurAPI at all).
    #[error("OurAPI has one like it already")]
    Conflict,
    /// 500 on the creation of an agent: there is one of that name or address already, unless it is an outage.
    #[error("OurAPI has an agent of that name or address already, or fails")]
    ConflictOrOutage,
    /// It will never accept this: no use in trying again.
    #[error("OurAPI refuses it for good")]
    Refused,
}

impl Trouble {
    /// Whether the request may have been carried out.
    pub fn in_doubt(self) -> bool {
        matches!(
            self,
            Self::Unknown
                | Self::Late
                | Self::ConflictOrOutage
                | Self::Throttled { in_doubt: true, .. }
        )
    }

    /// Whether it may mean that OurAPI is down as a whole.
    pub fn may_be_outage(self) -> bool {
        matches!(
            self,
            Self::NotCarriedOut
                | Self::Unknown
                | Self::Late
                | Self::Denied
                | Self::NotOurApi
                | Self::ConflictOrOutage
        )
    }
}

/// What the answer to a reference to an agent that is not there says.
const NO_SUCH_AGENT: &[u8] = b"agent does not exist";

/// Where messages are added to a chat.
#[derive(Debug, Clone)]
pub struct MessageTarget(Target);

type Result<T> = std::result::Result<T, OurApiError>;

impl OurApi {
    /// OurAPI behind `http`, each request of which takes at most `patience`, with at most `at_once` requests in flight.
    pub fn new(http: Http, at_once: u16, patience: Duration) -> Self {
        Self {
            http,
            at_once,
            in_flight: Semaphore::new(usize::from(at_once)),
            patience,
            late: Mutex::default(),
            answers: AtomicU64::new(0),
        }
    }

    /// How many requests may be in flight beside those that were not answered in time and may still be under way: an
    /// OurAPI that hung and goes on would be asked two things at once, and falls over. If none may: until when.
    pub fn room(&self, now: Millis) -> std::result::Result<u16, Millis> {
        let mut late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        let instant = Instant::now();
        late.retain(|late| instant < late.until);
        let taken = u16::try_from(late.len()).unwrap_or(u16::MAX);
        match (self.at_once.saturating_sub(taken), late.iter().min()) {
            (0, Some(first)) => Err(now.plus(first.until - instant)),
            (room, _) => Ok(room),
        }
    }

    /// How many requests were answered usably so far.
    pub fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }

    /// Until when requests may be under way that nobody waits for any more, by this machine's clock.
    pub fn late_until(&self) -> Millis {
        let late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        late.iter()
            .map(|late| late.by_clock)
            .max()
            .unwrap_or_default()
    }

    /// So many requests are given up, and may still be under way.
    pub fn give_up(&self, requests: usize) {
        self.late_for(self.patience, requests);
    }

    /// A session before gave up requests, how many is not known: none is sent before they can no longer be under way.
    pub fn recall_late(&self, until: Millis) {
        let left = until.since(Millis::now()).min(self.patience);
        self.late_for(left, usize::from(self.at_once));
    }

    fn late_for(&self, time: Duration, requests: usize) {
        let late = Late {
            until: Instant::now() + time,
            by_clock: Millis::now().plus(time),
        };
        let mut all = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        all.extend(std::iter::repeat_n(late, requests));
    }

    /// Base URL and throttle.
    pub fn http(&self) -> &Http {
        &self.http
    }

    /// The chat of that external id, if there is one.
    pub async fn chat(&self, external_id: &str) -> Result<Option<Chat>> {
        let chats: Vec<Chat> = self.list(Route::Chats, "external_id", external_id).await?;
        // Another OurAPI may find parts of it too, or not know the filter.
        Ok(chats
            .into_iter()
            .find(|chat| chat.external_id == external_id))
    }

    /// The agents of that e-mail address.
    pub async fn agents_by_email(&self, email: &str) -> Result<Vec<Agent>> {
        let mut agents: Vec<Agent> = self.list(Route::Agents, "email", email).await?;
        agents.retain(|agent| agent.email.eq_ignore_ascii_case(email));
        // An OurAPI for which the case says nothing has one of them only.
        if agents.iter().any(|agent| agent.email == email) {
            agents.retain(|agent| agent.email == email);
        }
        Ok(agents)
    }

    /// The agents of that name.
    pub async fn agents_by_name(&self, name: &str) -> Result<Vec<Agent>> {
        let agents: Vec<Agent> = self.list(Route::Agents, "name", name).await?;
        Ok(agents
            .into_iter()
            .filter(|agent| agent.name == name)
            .collect())
    }

    /// Creates a chat; [`Trouble::Conflict`] if its external id is taken.
    pub async fn create_chat(&self, chat: &NewChat<'_>) -> Result<Chat> {
        let chats = self.http.target(Route::CreateChat, "", None);
        let created = |answer: &Answer| {
            json(answer).filter(|created: &Chat| created.external_id == chat.external_id)
        };
        self.send(&chats, Some(chat), created).await
    }

    /// Creates an agent; [`Trouble::ConflictOrOutage`] if its name or address is taken.
    pub async fn create_agent(&self, name: &str, email: &str) -> Result<Agent> {
        #[derive(Serialize)]
        struct NewAgent<'a> {
            name: &'a str,
            email: &'a str,
        }
        let agents = self.http.target(Route::CreateAgent, "", None);
        let agent = NewAgent { name, email };
        let created = |answer: &Answer| {
            json(answer).filter(|created: &Agent| created.email.eq_ignore_ascii_case(email))
        };
        self.send(&agents, Some(&agent), created).await
    }

    /// Changes a chat.
    pub async fn change_chat(&self, chat: Uuid, change: &ChatChange) -> Result<()> {
        let chat = self.of_chat(Route::ChangeChat, chat);
        self.send(&chat, Some(change), nothing_else).await
    }

    /// Where messages are added to a chat: worked out once for all of them.
    pub fn message_target(&self, chat: Uuid) -> MessageTarget {
        MessageTarget(self.of_chat(Route::AddMessage, chat))
    }

    /// Adds a message to a chat. The answer does not carry its id.
    pub async fn add_message(
        &self,
        target: &MessageTarget,
        message: &NewMessage<'_>,
    ) -> Result<()> {
        self.send(&target.0, Some(message), nothing_else).await
    }

    /// The messages of a chat.
    pub async fn messages(&self, chat: Uuid) -> Result<Vec<Message>> {
        let messages = self.of_chat(Route::Messages, chat);
        self.send(&messages, None::<&()>, json).await
    }

    fn of_chat(&self, route: Route, chat: Uuid) -> Target {
        self.http.target(route, &chat.to_string(), None)
    }

    async fn list<T: DeserializeOwned>(
        &self,
        route: Route,
        filter: &str,
        value: &str,
    ) -> Result<Vec<T>> {
        // An empty filter is no filter: it would list everything. Nothing has an empty name.
        if value.is_empty() {
            return Ok(Vec::new());
        }
        let query = url::form_urlencoded::Serializer::new(String::new())
            .append_pair(filter, value)
            .finish();
        let list = self.http.target(route, "", Some(&query));
        self.send(&list, None::<&()>, json).await
    }

    async fn send<T>(
        &self,
        target: &Target,
        body: Option<&impl Serialize>,
        read: impl FnOnce(&Answer) -> Option<T>,
    ) -> Result<T> {
        let answer = {
            let _permit = self.in_flight.acquire().await;
            let answer = self.http.send(target, body).await;
            if is_late(&answer) {
                self.give_up(1);
            }
            answer
        };
        let trouble = match &answer {
            Err(NoAnswer::Throttled(until)) => Trouble::Throttled {
                until: *until,
                in_doubt: false,
            },
            Err(NoAnswer::NotSent(_)) => Trouble::NotCarriedOut,
            Err(NoAnswer::Impossible(_)) => Trouble::Refused,
            Err(NoAnswer::Lost(_)) => Trouble::Unknown,
            Err(NoAnswer::Late) => Trouble::Late,
            Ok(answer) => match (
                trouble(answer.status, &answer.body, target.route),
                answer.retry_at,
            ) {
                (_, Some(until)) => Trouble::Throttled {
                    until,
                    in_doubt: answer.status.is_server_error(),
                },
                (Some(trouble), None) => trouble,
                (None, None) => match read(answer) {
                    Some(value) => {
                        self.answers.fetch_add(1, Ordering::Relaxed);
                        return Ok(value);
                    }
                    None => Trouble::Unknown,
                },
            },
        };
        let exchange = Exchange::new(target, body, answer.as_ref());
        Err(OurApiError { trouble, exchange })
    }
}

/// Whether nobody waits any more for what OurAPI may still be doing: neither this client nor a gateway in between.
fn is_late(answer: &std::result::Result<Answer, NoAnswer>) -> bool {
    match answer {
        Ok(answer) => answer.status == StatusCode::GATEWAY_TIMEOUT,
        Err(error) => matches!(error, NoAnswer::Late),
    }
}

/// What a status means on a route; `None`: success.
fn trouble(status: StatusCode, body: &[u8], route: Route) -> Option<Trouble> {
    Some(match status.as_u16() {
        200..=299 => return None,
        401 | 403 => Trouble::Denied,
        429 => Trouble::NotCarriedOut,
        404 if matches!(
            route,
            Route::ChangeChat | Route::Messages | Route::AddMessage
        ) =>
        {
            Trouble::NoSuchChat
        }
        404 if matches!(route, Route::Chats | Route::Agents) => Trouble::NotOurApi,
        404 | 409 if matches!(route, Route::CreateChat | Route::CreateAgent) => Trouble::Conflict,
        400 if body
            .windows(NO_SUCH_AGENT.len())
            .any(|part| part == NO_SUCH_AGENT) =>
        {
            Trouble::NoSuchAgent
        }
        500 if route == Route::CreateAgent => Trouble::ConflictOrOutage,
        504 => Trouble::Late,
        300..=399 | 408 | 425 | 500..=599 => Trouble::Unknown,
        405 => Trouble::NotOurApi,
        400..=499 if body.trim_ascii_start().starts_with(b"<") => Trouble::NotOurApi,
        400..=499 => Trouble::Refused,
        _ => Trouble::Unknown,
    })
}

fn json<T: DeserializeOwned>(answer: &Answer) -> Option<T> {
    serde_json::from_slice(&answer.body).ok()
}

/// 204, or any JSON object: a page of HTML, or no body where there should be one, is not OurAPI's, whatever its status.
fn nothing_else(answer: &Answer) -> Option<()> {
    let is_object =
        || answer.body.trim_ascii_start().starts_with(b"{") && json::<IgnoredAny>(answer).is_some();
    (answer.status == StatusCode::NO_CONTENT || is_object()).then_some(())
}

fn time<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Timestamp, D::Error> {
    let text = String::deserialize(deserializer)?;
    Timestamp::parse(&text).ok_or_else(|| serde::de::Error::custom("not a time"))
}

fn optional_time<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<Timestamp>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    text.map(|text| Timestamp::parse(&text).ok_or_else(|| serde::de::Error::custom("not a time")))
        .transpose()
}

#[cfg(test)]
mod tests {
    use url::Url;

    use super::*;
    use crate::settings::Token;

    #[test]
    fn a_status_means_what_the_contract_says() {
        use Route::{AddMessage, Agents, ChangeChat, Chats, CreateAgent, CreateChat, Messages};
        for (status, body, route, expected) in [
            (201, "{}", CreateChat, None),
            (204, "", ChangeChat, None),
            (404, "", CreateChat, Some(Trouble::Conflict)),
            (409, "", CreateAgent, Some(Trouble::Conflict)),
            (409, "", AddMessage, Some(Trouble::Refused)),
            (404, "", ChangeChat, Some(Trouble::NoSuchChat)),
            (404, "", AddMessage, Some(Trouble::NoSuchChat)),
            (404, "", Messages, Some(Trouble::NoSuchChat)),
            (404, "", Chats, Some(Trouble::NotOurApi)),
            (404, "", Agents, Some(Trouble::NotOurApi)),
            (
                400,
                r#"{"detail":"That agent does not exist."}"#,
                AddMessage,
                Some(Trouble::NoSuchAgent),
            ),
            (400, "", CreateChat, Some(Trouble::Refused)),
            (422, "", AddMessage, Some(Trouble::Refused)),
            (413, "<html>", AddMessage, Some(Trouble::NotOurApi)),
            (405, "", CreateChat, Some(Trouble::NotOurApi)),
            (500, "", CreateAgent, Some(Trouble::ConflictOrOutage)),
            (500, "", CreateChat, Some(Trouble::Unknown)),
            (503, "", CreateAgent, Some(Trouble::Unknown)),
            (302, "", Chats, Some(Trouble::Unknown)),
            (408, "", AddMessage, Some(Trouble::Unknown)),
            (401, "", Chats, Some(Trouble::Denied)),
            (403, "", AddMessage, Some(Trouble::Denied)),
            (429, "", AddMessage, Some(Trouble::NotCarriedOut)),
        ] {
            let status = StatusCode::from_u16(status).expect("a status");
            assert_eq!(
                trouble(status, body.as_bytes(), route),
                expected,
                "{status} {body}"
            );
        }
    }

    #[test]
    fn a_clock_that_steps_ends_no_request_that_was_given_up() {
        let patience = Duration::from_secs(30);
        let base = Url::parse("http://h").expect("a URL");
        let http = Http::new(base, Token::default(), patience).expect("a client");
        for step in [-1_000, 40_000] {
            let our_api = OurApi::new(
                Http::new(http.base().clone(), Token::default(), patience).expect("a client"),
                1,
                patience,
            );
            our_api.give_up(1);
            let now = Millis::now();
            assert!(our_api.room(now).is_err(), "it may be under way");
            assert!(
                our_api.room(Millis(now.0 + step)).is_err(),
                "the clock stepped by {step} ms"
            );
        }
    }

    #[test]
    fn a_change_names_only_what_changes() {
        let json = |change: &ChatChange| serde_json::to_string(change).expect("JSON");
        assert_eq!(json(&ChatChange::default()), "{}");
        assert_eq!(
            json(&ChatChange {
                agent_id: Some(None),
                ..Default::default()
            }),
            r#"{"agent_id":null}"#
        );
        let ended = ChatChange {
            ended_at: Some(Timestamp::clamped(0)),
            ..Default::default()
        };
        assert_eq!(json(&ended), r#"{"ended_at":"1970-01-01T00:00:00Z"}"#);
    }
}
