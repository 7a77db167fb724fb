//! A simulated OurAPI: chats, agents and messages in memory.
//!
//! By default it is as fragile as the real one: two requests at once reach two databases, and from then on any request may
//! land on the wrong one. It can also be a better one. It promises the answers of the real one, down to the texts that a
//! client may go by; what the comparison and tests look at is always the first database.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::{Bytes, to_bytes},
    extract::{Request, State},
    http::{HeaderValue, StatusCode, header},
    middleware,
    response::{IntoResponse, Response},
};
use chrono::NaiveDateTime;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use url::form_urlencoded;
use uuid::Uuid;

use super::{
    faults::{Faults, inject},
    http::{Clock, KEEP_ALIVE, Refused, Server, Traffic, invalid, lock, parse_time, reply, route},
    watch::{Answered, Happening, Watch},
};

/// The settings of a simulated OurAPI.
#[derive(Clone, Debug)]
pub struct Options {
    /// The same seed makes the same choices.
    pub seed: u64,
    /// Whether requests at the same time reach databases of their own, as with the real one.
    pub strict_single: bool,
    /// Whether what is known already is refused with 409, instead of 404 (chats) and 500 (agents).
    pub conflict_409: bool,
    /// How long each request takes. The real one takes some 6 ms.
    pub latency: Duration,
    /// After which time it closes an idle connection.
    pub keep_alive: Duration,
    /// Who is told what it does.
    pub watch: Watch,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            seed: 1,
            strict_single: true,
            conflict_409: false,
            latency: Duration::ZERO,
            keep_alive: KEEP_ALIVE,
            watch: Watch::default(),
        }
    }
}

impl Options {
    /// An OurAPI as it may be in production: many requests at once, and 409 for what is known already.
    pub fn good() -> Self {
        Self {
            strict_single: false,
            conflict_409: true,
            ..Self::default()
        }
    }
}

/// An agent, as OurAPI shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agent {
    /// Unique.
    pub name: String,
    /// Unique.
    pub email: String,
    /// Given by OurAPI.
    pub agent_id: Uuid,
}

/// A chat, as OurAPI shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chat {
    /// Who has it.
    pub agent_id: Option<Uuid>,
    /// Without a zone.
    pub started_at: NaiveDateTime,
    /// Without a zone.
    pub ended_at: Option<NaiveDateTime>,
    /// Unique.
    pub external_id: String,
    /// Given by OurAPI.
    pub chat_id: Uuid,
}

/// A message, as OurAPI shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Its chat.
    pub chat_id: Option<Uuid>,
    /// Who wrote it, if said.
    pub agent_id: Option<Uuid>,
    /// Without a zone.
    pub sent_at: NaiveDateTime,
    /// Stripped.
    pub text: String,
    /// Given by OurAPI.
    pub message_id: Uuid,
}

/// All that an OurAPI holds.
#[derive(Clone, Debug, Default)]
pub struct Held {
    /// In order of creation.
    pub chats: Vec<Chat>,
    /// In order of creation.
    pub agents: Vec<Agent>,
    /// By chat, in order of creation.
    pub messages: HashMap<Uuid, Vec<Message>>,
}

/// One database and the answers it gives, without a wire.
#[derive(Clone, Debug, Default)]
pub(crate) struct Database {
    pub(crate) held: Held,
    by_id: HashMap<Uuid, usize>,
    by_external_id: HashMap<String, usize>,
    /// How many ids were given in sequence; `None`: they are random.
    given: Option<u128>,
    /// What its spam filter refuses.
    spam: Option<&'static str>,
}

/// What a body says, or what is wrong with it.
struct Fields<'a> {
    body: &'a Map<String, Value>,
    errors: Vec<Value>,
}

impl<'a> Fields<'a> {
    fn of(body: &'a Map<String, Value>) -> Self {
        Self {
            body,
            errors: Vec::new(),
        }
    }

    fn wrong<T>(&mut self, name: &str, kind: &str, message: &str) -> Option<T> {
        self.errors
            .push(invalid(kind, ["body", name], message, &self.body[name]));
        None
    }

    /// `None` where it may be missing and is, or where it is wrong.
    fn given(&mut self, name: &str, required: bool) -> Option<Value> {
        let value = self.body.get(name).cloned();
        if value.is_none() && required {
            self.errors.push(invalid(
                "missing",
                ["body", name],
                "Field required",
                &self.body.clone().into(),
            ));
        }
        value.filter(|value| required || !value.is_null())
    }

    fn string(&mut self, name: &str) -> Option<String> {
        match self.given(name, true)? {
            Value::String(text) => Some(text),
            _ => self.wrong(name, "string_type", "Input should be a valid string"),
        }
    }

    /// A text that is stripped and then needs two characters.
    fn text(&mut self, name: &str) -> Option<String> {
        let text = self.string(name)?.trim().to_owned();
        if text.chars().count() < 2 {
            self.wrong::<()>(
                name,
                "string_too_short",
                "String should have at least 2 characters",
            );
            if let Some(Value::Object(error)) = self.errors.last_mut() {
                error.insert("ctx".to_owned(), serde_json::json!({ "min_length": 2 }));
            }
            return None;
        }
        Some(text)
    }

    /// The time as it is written: an offset is dropped.
    fn time(&mut self, name: &str, required: bool) -> Option<NaiveDateTime> {
        let text = match self.given(name, required)? {
            Value::String(text) => text,
            Value::Number(seconds) => seconds.to_string(),
            _ => return self.wrong(name, "datetime_type", "Input should be a valid datetime"),
        };
        let wrong = "Input should be a valid datetime or date";
        parse_time(&text)
            .map(|(time, _)| time)
            .or_else(|| self.wrong(name, "datetime_from_date_parsing", wrong))
    }

    fn uuid(&mut self, name: &str) -> Option<Uuid> {
        let value = self.given(name, false)?;
        let id = value.as_str().and_then(|text| Uuid::try_parse(text).ok());
        id.or_else(|| self.wrong(name, "uuid_parsing", "Input should be a valid UUID"))
    }

    /// The values, if nothing is wrong with any.
    fn done<T>(self, values: Option<T>) -> Result<T, Refused> {
        match values {
            Some(values) if self.errors.is_empty() => Ok(values),
            _ => Err(Refused::invalid(self.errors)),
        }
    }
}

fn parse(body: &[u8]) -> Result<Map<String, Value>, Refused> {
    let wrong = |kind, message, input: &Value| {
        Err(Refused::invalid(vec![invalid(
            kind,
            ["body", ""],
            message,
            input,
        )]))
    };
    match serde_json::from_slice(body) {
        Ok(Value::Object(body)) => Ok(body),
        Ok(other) => wrong(
            "model_attributes_type",
            "Input should be a valid dictionary or object to extract fields from",
            &other,
        ),
        Err(_) => wrong("json_invalid", "JSON decode error", &Value::Null),
    }
}

fn created(place: &str, id: Uuid, body: &impl Serialize) -> Response {
    let mut response = reply(StatusCode::CREATED, body);
    if let Ok(location) = HeaderValue::from_str(&format!("/{place}/{id}")) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

impl Database {
    /// One that gives its ids in sequence and never again, so that a run can be had again exactly.
    #[cfg(test)]
    pub(crate) fn in_sequence() -> Self {
        Self {
            given: Some(0),
            ..Self::default()
        }
    }

    /// Loses everything, as by a restart.
    #[cfg(test)]
    pub(crate) fn wipe(&mut self) {
        *self = Self {
            given: self.given,
            ..Self::default()
        };
    }

    fn id(&mut self) -> Uuid {
        match &mut self.given {
            None => Uuid::new_v4(),
            Some(given) => {
                *given += 1;
                Uuid::from_u128(*given)
            }
        }
    }

    /// Answers one request.
    pub(crate) fn respond(
        &mut self,
        method: &str,
        path: &str,
        query: &str,
        body: &[u8],
        conflict_409: bool,
    ) -> Response {
        self.answer(method, path, query, body, conflict_409)
            .into_response()
    }

    fn answer(
        &mut self,
        method: &str,
        path: &str,
        query: &str,
        body: &[u8],
        conflict_409: bool,
    ) -> Result<Response, Refused> {
        let parts: Vec<&str> = path.split('/').skip(1).collect();
        // An empty value is no filter.
        let filter = |name: &str| {
            let given = form_urlencoded::parse(query.as_bytes())
                .filter(|(key, _)| key == name)
                .last();
            given
                .map(|(_, value)| value.into_owned())
                .filter(|value| !value.is_empty())
        };
        match (method, parts.as_slice()) {
            ("POST", ["agents"]) => self.post_agent(&parse(body)?, conflict_409),
            ("GET", ["agents"]) => {
                let (name, email) = (filter("name"), filter("email"));
                let fits = |agent: &&Agent| {
                    name.as_ref().is_none_or(|name| *name == agent.name)
                        && email.as_ref().is_none_or(|email| *email == agent.email)
                };
                Ok(reply(
                    StatusCode::OK,
                    &self.held.agents.iter().filter(fits).collect::<Vec<_>>(),
                ))
            }
            ("GET", ["agents", id]) => {
                let id = uuid("agent_id", id)?;
                let agent = self.held.agents.iter().find(|agent| agent.agent_id == id);
                agent
                    .map(|agent| reply(StatusCode::OK, agent))
                    .ok_or_else(|| Refused::not_found("Agent not found"))
            }
            ("POST", ["chats"]) => self.post_chat(&parse(body)?, conflict_409),
            ("GET", ["chats"]) => Ok(match filter("external_id") {
                None => reply(StatusCode::OK, &self.held.chats),
                Some(id) => {
                    let chat = self.by_external_id.get(&id).map(|at| &self.held.chats[*at]);
                    reply(StatusCode::OK, &chat.into_iter().collect::<Vec<_>>())
                }
            }),
            ("GET", ["chats", id]) => Ok(reply(StatusCode::OK, self.chat(uuid("chat_id", id)?)?)),
            ("PATCH", ["chats", id]) => self.patch_chat(uuid("chat_id", id)?, &parse(body)?),
            ("POST", ["chats", id, "messages"]) => {
                self.post_message(uuid("chat_id", id)?, &parse(body)?)
            }
            ("GET", ["chats", id, "messages"]) => {
                let id = self.chat(uuid("chat_id", id)?)?.chat_id;
                Ok(reply(
                    StatusCode::OK,
                    self.held.messages.get(&id).unwrap_or(&Vec::new()),
                ))
            }
            (_, ["agents" | "chats"] | ["agents" | "chats", _] | ["chats", _, "messages"]) => Err(
                Refused::new(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed"),
            ),
            _ => Err(Refused::not_found("Not Found")),
        }
    }

    fn chat(&mut self, id: Uuid) -> Result<&mut Chat, Refused> {
        let at = self
            .by_id
            .get(&id)
            .ok_or_else(|| Refused::not_found("Chat not found"))?;
        Ok(&mut self.held.chats[*at])
    }

    /// The `external_id` of the chat that a path names.
    fn chat_named(&mut self, path: &str) -> Option<String> {
        let id = path.strip_prefix("/chats/")?.split('/').next()?;
        let chat = self.chat(Uuid::try_parse(id).ok()?).ok()?;
        Some(chat.external_id.clone())
    }

    /// The name of the agent that a body names.
    fn agent_named(&self, body: &Value) -> Option<String> {
        let id = Uuid::try_parse(body["agent_id"].as_str()?).ok()?;
        let agent = self.held.agents.iter().find(|agent| agent.agent_id == id)?;
        Some(agent.name.clone())
    }

    fn agent_exists(&self, id: Option<Uuid>) -> Result<(), Refused> {
        match id {
            Some(id) if !self.held.agents.iter().any(|agent| agent.agent_id == id) => Err(
                Refused::new(StatusCode::BAD_REQUEST, "That agent does not exist."),
            ),
            _ => Ok(()),
        }
    }

    fn post_agent(
        &mut self,
        body: &Map<String, Value>,
        conflict_409: bool,
    ) -> Result<Response, Refused> {
        let mut fields = Fields::of(body);
        let (name, email) = (fields.text("name"), fields.text("email"));
        let (name, email) = fields.done(name.zip(email))?;
        if self
            .held
            .agents
            .iter()
            .any(|agent| agent.name == name || agent.email == email)
        {
            let conflict = || {
                Refused::new(
                    StatusCode::CONFLICT,
                    "An agent with that name or email already exists.",
                )
            };
            return Err(if conflict_409 {
                conflict()
            } else {
                Refused::unhandled()
            });
        }
        let agent = Agent {
            name,
            email,
            agent_id: self.id(),
        };
        self.held.agents.push(agent.clone());
        Ok(created("agents", agent.agent_id, &agent))
    }

    fn post_chat(
        &mut self,
        body: &Map<String, Value>,
        conflict_409: bool,
    ) -> Result<Response, Refused> {
        let mut fields = Fields::of(body);
        let (agent_id, started_at) = (fields.uuid("agent_id"), fields.time("started_at", true));
        let (ended_at, external_id) =
            (fields.time("ended_at", false), fields.string("external_id"));
        let (started_at, external_id) = fields.done(started_at.zip(external_id))?;
        self.agent_exists(agent_id)?;
        if self.by_external_id.contains_key(&external_id) {
            let status = if conflict_409 {
                StatusCode::CONFLICT
            } else {
                StatusCode::NOT_FOUND
            };
            return Err(Refused::new(
                status,
                "A chat with that external ID already exists.",
            ));
        }
        let chat = Chat {
            agent_id,
            started_at,
            ended_at,
            external_id,
            chat_id: self.id(),
        };
        self.held.chats.push(chat.clone());
        self.index(self.held.chats.len() - 1);
        Ok(created("chats", chat.chat_id, &chat))
    }

    fn patch_chat(&mut self, id: Uuid, body: &Map<String, Value>) -> Result<Response, Refused> {
        let mut fields = Fields::of(body);
        let (agent_id, started_at, ended_at) = (
            fields.uuid("agent_id"),
            fields.time("started_at", false),
            fields.time("ended_at", false),
        );
        fields.done(Some(()))?;
        self.chat(id)?;
        self.agent_exists(agent_id)?;
        let named = |name: &str| body.contains_key(name);
        if named("started_at") && started_at.is_none() {
            return Err(Refused::unhandled());
        }
        let chat = self.chat(id)?;
        chat.started_at = started_at.unwrap_or(chat.started_at);
        if named("agent_id") {
            chat.agent_id = agent_id;
        }
        if named("ended_at") {
            chat.ended_at = ended_at;
        }
        Ok(StatusCode::NO_CONTENT.into_response())
    }

    fn post_message(&mut self, id: Uuid, body: &Map<String, Value>) -> Result<Response, Refused> {
        let mut fields = Fields::of(body);
        let (agent_id, sent_at, text) = (
            fields.uuid("agent_id"),
            fields.time("sent_at", true),
            fields.text("text"),
        );
        let (sent_at, text) = fields.done(sent_at.zip(text))?;
        if let Some(words) = self.spam.filter(|words| text.contains(words)) {
            let mut spam = Fields::of(body);
            spam.wrong::<()>(
                "text",
                "spam",
                &format!("the spam filter refuses {words:?}"),
            );
            return spam.done(None);
        }
        self.chat(id)?;
        self.agent_exists(agent_id)?;
        let message = Message {
            chat_id: Some(id),
            agent_id,
            sent_at,
            text,
            message_id: self.id(),
        };
        self.held.messages.entry(id).or_default().push(message);
        Ok(reply(StatusCode::OK, &Map::new()))
    }

    fn index(&mut self, at: usize) {
        let chat = &self.held.chats[at];
        self.by_id.insert(chat.chat_id, at);
        self.by_external_id.insert(chat.external_id.clone(), at);
    }

    fn forget(&mut self, external_id: &str) {
        let Some(at) = self.by_external_id.get(external_id) else {
            return;
        };
        let gone = self.held.chats.remove(*at);
        self.held.messages.remove(&gone.chat_id);
        self.by_id.clear();
        self.by_external_id.clear();
        (0..self.held.chats.len()).for_each(|at| self.index(at));
    }
}

fn uuid(place: &str, text: &str) -> Result<Uuid, Refused> {
    let wrong = || {
        vec![invalid(
            "uuid_parsing",
            ["path", place],
            "Input should be a valid UUID",
            &text.into(),
        )]
    };
    Uuid::try_parse(text).map_err(|_| Refused::invalid(wrong()))
}

/// The databases: one, until requests come at once.
struct Databases {
    rng: StdRng,
    all: Vec<Database>,
}

impl Databases {
    /// The database that a request reaches which finds so many others under way; `None`: one without tables.
    fn reach(&mut self, others: usize) -> Option<&mut Database> {
        if others >= self.all.len() {
            self.all.push(Database::default());
            return if self.rng.random() {
                self.all.last_mut()
            } else {
                None
            };
        }
        let at = if self.all.len() == 1 {
            0
        } else {
            self.rng.random_range(0..self.all.len())
        };
        self.all.get_mut(at)
    }
}

#[derive(Clone)]
struct Service {
    options: Options,
    databases: Arc<Mutex<Databases>>,
    traffic: Traffic,
}

/// A running simulated OurAPI; stops when it is dropped.
pub struct OurApi {
    /// What goes wrong.
    pub faults: Faults,
    /// What it was asked.
    pub traffic: Traffic,
    databases: Arc<Mutex<Databases>>,
    server: Server,
}

impl OurApi {
    /// Starts it; port 0 takes a free one.
    pub async fn start(address: SocketAddr, options: Options) -> io::Result<Self> {
        let (traffic, keep_alive) = (Traffic::default(), options.keep_alive);
        let faults = Faults::new(options.seed, Clock::default());
        let databases = Databases {
            rng: StdRng::seed_from_u64(options.seed),
            all: vec![Database::default()],
        };
        let databases = Arc::new(Mutex::new(databases));
        let service = Service {
            options,
            databases: Arc::clone(&databases),
            traffic: traffic.clone(),
        };
        let router = Router::new()
            .fallback(answer)
            .with_state(service)
            .layer(middleware::from_fn_with_state(faults.clone(), inject));
        let server = Server::start(address, router, &traffic, keep_alive).await?;
        Ok(Self {
            faults,
            traffic,
            databases,
            server,
        })
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        format!("http://{}", self.server.address)
    }

    /// Stops it, and waits until it has.
    pub async fn shutdown(self) -> io::Result<()> {
        self.server.down().await
    }

    /// Cuts all connections and refuses new ones, until it is up again.
    pub async fn down(&self) -> io::Result<()> {
        self.server.down().await
    }

    /// Is there again, where it was.
    pub async fn up(&self) -> io::Result<()> {
        self.server.up().await.map(drop)
    }

    /// Refuses messages with these words from now on, or none any more: a spam filter that somebody has to mend.
    pub fn set_spam(&self, words: Option<&'static str>) {
        lock(&self.databases)
            .all
            .iter_mut()
            .for_each(|database| database.spam = words);
    }

    /// Loses everything, as by a restart.
    pub fn wipe(&self) {
        lock(&self.databases).all = vec![Database::default()];
    }

    /// Loses the agents; the chats keep their ids.
    pub fn wipe_agents(&self) {
        lock(&self.databases).all[0].held.agents.clear();
    }

    /// Loses a chat and its messages.
    pub fn forget_chat(&self, external_id: &str) {
        lock(&self.databases).all[0].forget(external_id);
    }

    /// Loses the first message of a chat.
    pub fn forget_message(&self, external_id: &str) {
        let held = &mut lock(&self.databases).all[0].held;
        let chat = held
            .chats
            .iter()
            .find(|chat| chat.external_id == external_id);
        let messages = chat.and_then(|chat| held.messages.get_mut(&chat.chat_id));
        if let Some(messages) = messages
            && !messages.is_empty()
        {
            messages.remove(0);
        }
    }

    /// Holds all requests before they are carried out, until let go.
    pub fn hang(&self, hang: bool) {
        self.faults.hold(hang);
    }

    /// Whether requests at once have made it lose track of its data.
    pub fn stumbled(&self) -> bool {
        lock(&self.databases).all.len() > 1
    }

    /// All that it holds.
    pub fn held(&self) -> Held {
        lock(&self.databases).all[0].held.clone()
    }

    /// The chats, in order of creation.
    pub fn chats(&self) -> Vec<Chat> {
        lock(&self.databases).all[0].held.chats.clone()
    }

    /// The agents, in order of creation.
    pub fn agents(&self) -> Vec<Agent> {
        lock(&self.databases).all[0].held.agents.clone()
    }

    /// A chat's messages, in order of creation.
    pub fn messages(&self, chat_id: Uuid) -> Vec<Message> {
        lock(&self.databases).all[0]
            .held
            .messages
            .get(&chat_id)
            .cloned()
            .unwrap_or_default()
    }

    /// How many messages it holds.
    pub fn message_count(&self) -> usize {
        lock(&self.databases).all[0]
            .held
            .messages
            .values()
            .map(Vec::len)
            .sum()
    }
}

async fn answer(State(service): State<Service>, request: Request) -> Response {
    let Service {
        options,
        databases,
        traffic,
    } = service;
    let (parts, body) = request.into_parts();
    let body: Bytes = to_bytes(body, usize::MAX).await.unwrap_or_default();
    let inside = traffic.carry_out();
    if options.latency.is_zero() {
        // Lets whatever else has arrived get in, so that requests at once are seen as such.
        tokio::task::yield_now().await;
    } else {
        tokio::time::sleep(options.latency).await;
    }
    let mut databases = lock(&databases);
    let others = if options.strict_single {
        inside.before()
    } else {
        0
    };
    let Some(database) = databases.reach(others) else {
        return Refused::unhandled().into_response();
    };
    let query = parts.uri.query().unwrap_or_default();
    let path = parts.uri.path();
    let response = database.respond(
        parts.method.as_str(),
        path,
        query,
        &body,
        options.conflict_409,
    );
    options.watch.tell(|| {
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        Happening::Answered(Answered {
            route: route(&parts.method, path),
            chat: database.chat_named(path),
            agent: database.agent_named(&body),
            body,
            status: response.status().as_u16(),
        })
    });
    response
}
