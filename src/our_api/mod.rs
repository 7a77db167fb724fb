//! The OurAPI client, with types that follow the contract. It limits how many requests all callers together have in
//! flight.

mod gate;
mod lock;
mod permits;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use reqwest::StatusCode;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::gate::Gate;
use self::lock::Lock;
pub use self::lock::{LockError, usable as lock_is_usable};
use self::permits::Permits;
use crate::domain::account::MessageKey;
use crate::domain::conversation::{ChatChange, Fields};
use crate::domain::pause::Pause;
use crate::domain::time::{Millis, Timestamp};
use crate::http::route::Route;
use crate::http::{self, Api, ApiError, ErrorKind, Http, Response, Target};
use crate::settings::Settings;

#[derive(Debug)]
pub struct OurApi {
    http: Arc<Http>,
    permits: Permits,
    lock: Option<Lock>,
    gate: Gate,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Chat {
    pub chat_id: Uuid,
    pub external_id: String,
    pub agent_id: Option<Uuid>,
    #[serde(deserialize_with = "time")]
    pub started_at: Timestamp,
    #[serde(default, deserialize_with = "optional_time")]
    pub ended_at: Option<Timestamp>,
}

impl Chat {
    pub fn fields(&self) -> Fields {
        Fields {
            started_at: self.started_at,
            ended_at: self.ended_at,
            agent: self.agent_id,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Agent {
    pub agent_id: Uuid,
    /// Unique.
    pub name: String,
    /// Unique; identifies the agent.
    pub email: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Message {
    /// Stripped of white space at both ends.
    pub text: String,
    #[serde(deserialize_with = "time")]
    pub sent_at: Timestamp,
}

impl Message {
    pub fn key(&self) -> MessageKey {
        MessageKey::new(self.sent_at, &self.text)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NewChat<'a> {
    /// Unique; cannot be changed afterwards.
    pub external_id: &'a str,
    pub started_at: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<Uuid>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NewMessage<'a> {
    pub sent_at: Timestamp,
    pub text: &'a str,
    /// The author, if `--message-author` selects one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<Uuid>,
}

type Result<T> = std::result::Result<T, ApiError>;

impl OurApi {
    /// `stopping`: cancelled at shutdown, so that no request waits for the lock.
    pub fn new(http: Arc<Http>, settings: &Settings, stopping: CancellationToken) -> Self {
        let timeout = settings.request_timeout;
        let lock = settings.our_api_lock.clone();
        Self {
            http,
            permits: Permits::new(settings.our_api_concurrency, timeout),
            lock: lock.map(|path| Lock::new(path, timeout, stopping)),
            gate: Gate::default(),
        }
    }

    /// How many requests may be in flight besides those that timed out and may still be carried out. If none may, the
    /// error is the time at which the first permit will be free again.
    pub fn free_permits(&self, now: Millis) -> std::result::Result<u16, Millis> {
        self.permits.free_permits(now)
    }

    /// Until when requests that timed out may still be carried out, by this machine's clock.
    pub fn timed_out_until(&self) -> Millis {
        self.permits.timed_out_until()
    }

    /// Records that this many requests were given up and may still be in flight.
    pub fn record_timeout(&self, requests: usize) {
        self.permits
            .record_timeout(u16::try_from(requests).unwrap_or(u16::MAX));
    }

    /// Holds back requests while those of earlier processes may still be in flight.
    pub fn restore_timed_out(&self, until: Millis) {
        self.permits.restore(until);
    }

    /// The total time for which requests have waited for the lock; `None`: there is no lock.
    pub fn lock_waited(&self) -> Option<Duration> {
        self.lock.as_ref().map(Lock::waited)
    }

    /// Makes all requests fail during this pause, without sending them; `None` ends the pause.
    pub fn set_pause(&self, pause: Option<Pause>) {
        self.gate.set(pause);
    }

    pub fn paused(&self) -> Option<Pause> {
        self.gate.paused()
    }

    pub fn http(&self) -> &Http {
        &self.http
    }

    pub async fn description(&self) -> Result<Value> {
        let description = self.http.target(Route::Description, "", None);
        self.send(&description, None, json).await
    }

    pub async fn chat(&self, external_id: &str) -> Result<Option<Chat>> {
        let chats: Vec<Chat> = self.list(Route::Chats, "external_id", external_id).await?;
        // Another implementation of OurAPI may match substrings, ignore the filter, or compare case-insensitively.
        let exact = chats
            .iter()
            .position(|chat| chat.external_id == external_id);
        let alike = || {
            let mut ids = chats.iter().map(|chat| &chat.external_id);
            ids.position(|id| is_alike(id, external_id))
        };
        let found = exact.or_else(alike);
        Ok(found.and_then(|at| chats.into_iter().nth(at)))
    }

    /// The agents that OurAPI finds by an e-mail address. OurAPI decides which addresses are equal.
    pub async fn agents_by_email(&self, email: &str) -> Result<Vec<Agent>> {
        self.list(Route::Agents, "email", email).await
    }

    /// The agents that OurAPI finds by a name. OurAPI decides which names are equal.
    pub async fn agents_by_name(&self, name: &str) -> Result<Vec<Agent>> {
        self.list(Route::Agents, "name", name).await
    }

    pub async fn agents(&self) -> Result<Vec<Agent>> {
        let agents = self.http.target(Route::Agents, "", None);
        self.send(&agents, None, json).await
    }

    pub async fn has_agent(&self, id: Uuid) -> Result<bool> {
        let agent = self.http.target(Route::Agent, &id.to_string(), None);
        match self.send(&agent, None, json::<Agent>).await {
            Ok(found) => Ok(found.agent_id == id),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Creates a chat.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Conflict`](crate::http::ErrorKind) if the external id is taken.
    pub async fn create_chat(&self, chat: &NewChat<'_>) -> Result<Chat> {
        let chats = self.http.target(Route::CreateChat, "", None);
        let created = |response: &mut Response| {
            let created: Chat = json(response)?;
            match is_alike(&created.external_id, chat.external_id) {
                true => Ok(created),
                false => Err("the response is about another chat".to_owned()),
            }
        };
        self.write(&chats, chat, created).await
    }

    /// # Errors
    ///
    /// [`ErrorKind::Conflict`](crate::http::ErrorKind) if the name or address is taken, or if OurAPI answers 500, which
    /// may mean the same.
    pub async fn create_agent(&self, name: &str, email: &str) -> Result<Agent> {
        #[derive(Serialize)]
        struct NewAgent<'a> {
            name: &'a str,
            email: &'a str,
        }
        let agents = self.http.target(Route::CreateAgent, "", None);
        let agent = NewAgent { name, email };
        // OurAPI may normalise name and address, so the response is not compared with them.
        self.write(&agents, &agent, json).await
    }

    pub async fn change_chat(&self, chat: Uuid, change: &ChatChange) -> Result<()> {
        let chat = self.of_chat(Route::ChangeChat, chat);
        self.write(&chat, change, acknowledged).await
    }

    pub async fn add_message(&self, chat: Uuid, message: &NewMessage<'_>) -> Result<()> {
        let chat = self.of_chat(Route::AddMessage, chat);
        self.write(&chat, message, acknowledged).await
    }

    pub async fn messages(&self, chat: Uuid) -> Result<Vec<Message>> {
        let messages = self.of_chat(Route::Messages, chat);
        self.send(&messages, None, json).await
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
        // An empty filter would list everything, and no name is empty.
        if value.is_empty() {
            return Ok(Vec::new());
        }
        let query = url::form_urlencoded::Serializer::new(String::new())
            .append_pair(filter, value)
            .finish();
        let list = self.http.target(route, "", Some(&query));
        self.send(&list, None, json).await
    }

    async fn write<T>(
        &self,
        target: &Target,
        body: &impl Serialize,
        read: impl FnOnce(&mut Response) -> std::result::Result<T, String>,
    ) -> Result<T> {
        let body = serde_json::to_string(body).map_err(|error| {
            let reason = format!("cannot be sent: {error}");
            ApiError::not_sent(Api::OurApi, ErrorKind::Rejected, reason)
        })?;
        self.send(target, Some(&body), read).await
    }

    async fn send<T>(
        &self,
        target: &Target,
        body: Option<&str>,
        read: impl FnOnce(&mut Response) -> std::result::Result<T, String>,
    ) -> Result<T> {
        let permit = self.permits.acquire().await;
        let withheld = |why| ApiError::not_sent(Api::OurApi, ErrorKind::Withheld, why);
        let turn = match &self.lock {
            None => None,
            Some(lock) => {
                // Boxed, so that the future of a request stays small.
                let turn = Box::pin(lock.acquire()).await;
                Some(turn.ok_or_else(|| withheld("the daemon is stopping".to_owned()))?)
            }
        };
        if let Some(pause) = self.paused() {
            return Err(withheld(format!("deliveries are {pause}")));
        }
        if let Some(turn) = &turn {
            turn.begin();
        }
        let result = self.http.call(target, body, read).await;
        match &result {
            Err(error) if error.kind.timed_out() => permit.hold(turn),
            _ => {
                if let Some(turn) = turn {
                    turn.finish();
                }
            }
        }
        result
    }
}

/// Whether two texts are equal for an implementation of OurAPI that compares case-insensitively.
pub fn is_alike(one: &str, other: &str) -> bool {
    one == other || one.trim().to_lowercase() == other.trim().to_lowercase()
}

fn json<T: DeserializeOwned>(response: &mut Response) -> std::result::Result<T, String> {
    http::json(&response.body)
}

/// Accepts a 204 or any JSON object. Any other success, with HTML or without a body, is not from OurAPI.
fn acknowledged(response: &mut Response) -> std::result::Result<(), String> {
    let is_empty = response.status == StatusCode::NO_CONTENT;
    if !is_empty {
        json::<HashMap<String, IgnoredAny>>(response)?;
    }
    Ok(())
}

fn time<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Timestamp, D::Error> {
    let text = String::deserialize(deserializer)?;
    Timestamp::parse(&text).ok_or_else(|| serde::de::Error::custom("expected a time"))
}

fn optional_time<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<Timestamp>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    text.map(|text| {
        Timestamp::parse(&text).ok_or_else(|| serde::de::Error::custom("expected a time"))
    })
    .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unchanged_fields_are_not_sent() {
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
