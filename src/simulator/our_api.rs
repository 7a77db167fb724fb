//! OurAPI: chats, agents and messages in memory.
//!
//! By default it is as fragile as the real one: two concurrent requests reach two databases, and from then on any
//! request may reach the wrong one. [`OurApi::be_good`] makes it robust. Its responses equal those of the real one,
//! including the texts that a client may depend on. The comparison and the tests read the first database.

use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, NaiveDateTime, Utc};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::exchange::{Api, Reply, Request, id, invalid, parse_time};
use super::watch::{Answered, Happening};

/// An agent, as OurAPI returns it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agent {
    /// Unique.
    pub name: String,
    /// Unique.
    pub email: String,
    pub agent_id: Uuid,
}

/// A chat, as OurAPI returns it. Its times have no zone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chat {
    pub agent_id: Option<Uuid>,
    pub started_at: NaiveDateTime,
    pub ended_at: Option<NaiveDateTime>,
    /// Unique.
    pub external_id: String,
    pub chat_id: Uuid,
}

/// A message, as OurAPI returns it. Its time has no zone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    pub chat_id: Option<Uuid>,
    pub agent_id: Option<Uuid>,
    pub sent_at: NaiveDateTime,
    /// Stripped.
    pub text: String,
    pub message_id: Uuid,
}

/// All data of OurAPI.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Data {
    /// In order of creation.
    pub chats: Vec<Chat>,
    /// In order of creation.
    pub agents: Vec<Agent>,
    /// By chat, in order of creation.
    pub messages: BTreeMap<Uuid, Vec<Message>>,
}

/// How ids are assigned.
#[derive(Clone, Debug)]
enum Ids {
    Random,
    /// How many agents, chats and messages have an id.
    InOrder([u32; 3]),
}

#[derive(Clone, Debug, Default)]
struct Database {
    data: Data,
    by_id: HashMap<Uuid, usize>,
    by_external_id: HashMap<String, usize>,
}

/// OurAPI as a plain value, without a network.
#[derive(Clone, Debug)]
pub struct OurApi {
    rng: Xoshiro256PlusPlus,
    /// There is one until the first concurrent requests.
    databases: Vec<Database>,
    ids: Ids,
    /// Whether concurrent requests reach separate databases.
    fragile: bool,
    /// The answer to an attempt to create an object that already exists, instead of 404 (chats) and 500 (agents).
    conflict: Option<u16>,
    spam: Option<String>,
}

type Answer = Result<Reply, Reply>;

impl OurApi {
    /// An empty OurAPI, as fragile as the real one. `seed` determines which database a request reaches.
    pub fn new(seed: u64) -> Self {
        Self {
            rng: Xoshiro256PlusPlus::seed_from_u64(seed),
            databases: vec![Database::default()],
            ids: Ids::Random,
            fragile: true,
            conflict: None,
            spam: None,
        }
    }

    /// Assigns ids in order, so that runs are repeatable: agents get `…a1`, `…a2`, chats `…c1`, messages `…d1`. See
    /// [`id`].
    pub fn in_order(mut self) -> Self {
        self.ids = Ids::InOrder([0; 3]);
        self
    }

    /// From now on, behaves as OurAPI may in production: it accepts concurrent requests, and answers 409 if an object
    /// already exists.
    pub fn be_good(&mut self) {
        (self.fragile, self.conflict) = (false, Some(409));
    }

    /// Sets whether two concurrent requests reach two databases.
    pub fn set_fragile(&mut self, fragile: bool) {
        self.fragile = fragile;
    }

    /// Sets the answer to an attempt to create an object that already exists, instead of 404 (chats) and 500 (agents).
    pub fn set_conflict(&mut self, status: u16) {
        self.conflict = Some(status);
    }

    /// From now on, rejects messages with these words, like a spam filter that an operator has to fix. `None`: rejects
    /// none.
    pub fn set_spam(&mut self, words: Option<&str>) {
        self.spam = words.map(str::to_owned);
    }

    /// All its data.
    pub fn data(&self) -> &Data {
        &self.databases[0].data
    }

    /// How many messages it has.
    pub fn message_count(&self) -> usize {
        self.data().messages.values().map(Vec::len).sum()
    }

    /// Whether concurrent requests have split its data.
    pub fn has_stumbled(&self) -> bool {
        self.databases.len() > 1
    }

    /// Adds an agent, a chat or a message, as another client would.
    pub fn add(&mut self, item: impl Into<Item>) {
        let item = item.into();
        if let Ids::InOrder(given) = &mut self.ids {
            given[item.kind()] += 1;
        }
        self.databases[0].insert(item);
    }

    /// Loses everything, as in a restart.
    pub fn lose_everything(&mut self) {
        self.databases = vec![Database::default()];
    }

    /// Loses the agents; the chats still name them.
    pub fn lose_agents(&mut self) {
        self.databases[0].data.agents.clear();
    }

    /// Loses the agent with this e-mail address; the chats still name it.
    pub fn lose_agent(&mut self, email: &str) {
        let agents = &mut self.databases[0].data.agents;
        agents.retain(|agent| agent.email != email);
    }

    /// Loses a chat and its messages.
    pub fn lose_chat(&mut self, external_id: &str) {
        let database = &mut self.databases[0];
        let Some(at) = database.by_external_id.get(external_id) else {
            return;
        };
        let gone = database.data.chats.remove(*at);
        database.data.messages.remove(&gone.chat_id);
        database.by_id.clear();
        database.by_external_id.clear();
        (0..database.data.chats.len()).for_each(|at| database.index(at));
    }

    /// Loses the first message of a chat.
    pub fn lose_message(&mut self, external_id: &str) {
        let Data {
            chats, messages, ..
        } = &mut self.databases[0].data;
        let chat = chats.iter().find(|chat| chat.external_id == external_id);
        let messages = chat.and_then(|chat| messages.get_mut(&chat.chat_id));
        if let Some(messages) = messages.filter(|messages| !messages.is_empty()) {
            messages.remove(0);
        }
    }

    /// The database that a request reaches while this many others are being carried out; `None`: a database without
    /// tables.
    fn reach(&mut self, others: usize) -> Option<usize> {
        let others = if self.fragile { others } else { 0 };
        let count = self.databases.len();
        if others >= count {
            self.databases.push(Database::default());
            return self.rng.random::<bool>().then_some(count);
        }
        Some(if count == 1 {
            0
        } else {
            self.rng.random_range(0..count)
        })
    }

    fn try_answer(&mut self, request: &Request, others: usize) -> Answer {
        let Some(at) = self.reach(others) else {
            return Err(Reply::unhandled());
        };
        // An empty value is no filter.
        let filter = |name: &str| request.parameter(name).filter(|value| !value.is_empty());
        let body = || parse(&request.body);
        let database = &mut self.databases[at];
        match (&*request.method, &*request.segments()) {
            ("GET", ["agents"]) => {
                let (name, email) = (filter("name"), filter("email"));
                let fits = |agent: &&Agent| {
                    name.as_ref().is_none_or(|name| *name == agent.name)
                        && email.as_ref().is_none_or(|email| *email == agent.email)
                };
                let agents: Vec<_> = database.data.agents.iter().filter(fits).collect();
                Ok(Reply::json(200, &agents))
            }
            ("GET", ["agents", id]) => {
                let id = uuid("agent_id", id)?;
                let agent = database.agent(id);
                agent
                    .map(|agent| Reply::json(200, agent))
                    .ok_or_else(|| Reply::not_found("Agent not found"))
            }
            ("GET", ["chats"]) => Ok(match filter("external_id") {
                None => Reply::json(200, &database.data.chats),
                Some(id) => {
                    let chat = database.by_external_id.get(&id);
                    let chat = chat.map(|at| &database.data.chats[*at]);
                    Reply::json(200, &Vec::from_iter(chat))
                }
            }),
            ("GET", ["chats", id]) => Ok(Reply::json(200, database.chat(uuid("chat_id", id)?)?)),
            ("GET", ["chats", id, "messages"]) => {
                let id = database.chat(uuid("chat_id", id)?)?.chat_id;
                let messages = database.data.messages.get(&id);
                Ok(messages
                    .map_or_else(|| Reply::json(200, &json!([])), |all| Reply::json(200, all)))
            }
            ("PATCH", ["chats", id]) => database.patch_chat(uuid("chat_id", id)?, &body()?),
            ("POST", ["agents"]) => self.post_agent(at, &body()?),
            ("POST", ["chats"]) => self.post_chat(at, &body()?),
            ("POST", ["chats", id, "messages"]) => {
                self.post_message(at, uuid("chat_id", id)?, &body()?)
            }
            (_, ["agents" | "chats"] | ["agents" | "chats", _] | ["chats", _, "messages"]) => {
                Err(Reply::method_not_allowed())
            }
            _ => Err(Reply::not_found("Not Found")),
        }
    }

    fn id(&mut self, kind: usize) -> Uuid {
        match &mut self.ids {
            Ids::Random => Uuid::new_v4(),
            Ids::InOrder(given) => {
                given[kind] += 1;
                let end = format!("{}{}", ["a", "c", "d"][kind], given[kind]);
                Uuid::try_parse(&id(&end)).unwrap_or_default()
            }
        }
    }

    fn post_agent(&mut self, at: usize, body: &Map<String, Value>) -> Answer {
        let mut fields = Fields::of(body);
        let (name, email) = (fields.text("name"), fields.text("email"));
        let (name, email) = fields.done(name.zip(email))?;
        let mut agents = self.databases[at].data.agents.iter();
        if agents.any(|agent| agent.name == name || agent.email == email) {
            let taken = "An agent with that name or email already exists.";
            let conflict = self.conflict.map(|status| Reply::detail(status, taken));
            return Err(conflict.unwrap_or_else(Reply::unhandled));
        }
        let agent = Agent {
            name,
            email,
            agent_id: self.id(AGENT),
        };
        let location = format!("/agents/{}", agent.agent_id);
        let reply = Reply::json(201, &agent).with("location", location);
        self.databases[at].insert(Item::Agent(agent));
        Ok(reply)
    }

    fn post_chat(&mut self, at: usize, body: &Map<String, Value>) -> Answer {
        let mut fields = Fields::of(body);
        let (agent_id, started_at) = (fields.uuid("agent_id"), fields.time("started_at", true));
        let (ended_at, external_id) =
            (fields.time("ended_at", false), fields.string("external_id"));
        let (started_at, external_id) = fields.done(started_at.zip(external_id))?;
        let database = &self.databases[at];
        database.agent_exists(agent_id)?;
        if database.by_external_id.contains_key(&external_id) {
            let taken = "A chat with that external ID already exists.";
            return Err(Reply::detail(self.conflict.unwrap_or(404), taken));
        }
        let chat = Chat {
            agent_id,
            started_at,
            ended_at,
            external_id,
            chat_id: self.id(CHAT),
        };
        let location = format!("/chats/{}", chat.chat_id);
        let reply = Reply::json(201, &chat).with("location", location);
        self.databases[at].insert(Item::Chat(chat));
        Ok(reply)
    }

    fn post_message(&mut self, at: usize, chat: Uuid, body: &Map<String, Value>) -> Answer {
        let mut fields = Fields::of(body);
        let agent_id = fields.uuid("agent_id");
        let (sent_at, text) = (fields.time("sent_at", true), fields.text("text"));
        let (sent_at, text) = fields.done(sent_at.zip(text))?;
        if let Some(words) = self.spam.as_ref().filter(|words| text.contains(*words)) {
            let mut spam = Fields::of(body);
            let why = format!("the spam filter refuses {words:?}");
            spam.wrong::<()>("text", "spam", &why);
            return spam.done(None);
        }
        let database = &mut self.databases[at];
        database.chat(chat)?;
        database.agent_exists(agent_id)?;
        let message = Message {
            chat_id: Some(chat),
            agent_id,
            sent_at,
            text,
            message_id: self.id(MESSAGE),
        };
        self.databases[at].insert(Item::Message(message));
        Ok(Reply::json(200, &Map::new()))
    }
}

impl Api for OurApi {
    fn answer(&mut self, request: &Request, others: usize) -> Reply {
        let answer = self.try_answer(request, others);
        answer.unwrap_or_else(|refusal| refusal)
    }

    fn date(&self) -> DateTime<Utc> {
        Utc::now()
    }

    fn carried_out(&mut self, request: &Request, reply: &Reply) -> Option<Happening> {
        let database = &mut self.databases[0];
        let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        let named = |id: &str| Uuid::try_parse(id).ok();
        let segments = request.segments();
        let chat = match &*segments {
            ["chats", id, ..] => named(id).and_then(|id| database.chat(id).ok()),
            _ => None,
        };
        let chat = chat.map(|chat| chat.external_id.clone());
        let agent = body["agent_id"].as_str().and_then(named);
        let agent = agent.and_then(|id| database.agent(id));
        let agent = agent.map(|agent| agent.name.clone());
        let is_id = |part: &&str| named(part).is_some();
        let route = segments
            .iter()
            .map(|part| if is_id(part) { "{id}" } else { part });
        Some(Happening::Answered(Answered {
            route: format!(
                "{} /{}",
                request.method,
                route.collect::<Vec<_>>().join("/")
            ),
            chat,
            agent,
            body,
            status: reply.status,
        }))
    }
}

/// An object of OurAPI.
#[derive(Clone, Debug)]
pub enum Item {
    Agent(Agent),
    Chat(Chat),
    Message(Message),
}

const AGENT: usize = 0;
const CHAT: usize = 1;
const MESSAGE: usize = 2;

impl Item {
    fn kind(&self) -> usize {
        match self {
            Self::Agent(_) => AGENT,
            Self::Chat(_) => CHAT,
            Self::Message(_) => MESSAGE,
        }
    }
}

impl From<Agent> for Item {
    fn from(agent: Agent) -> Self {
        Self::Agent(agent)
    }
}

impl From<Chat> for Item {
    fn from(chat: Chat) -> Self {
        Self::Chat(chat)
    }
}

impl From<Message> for Item {
    fn from(message: Message) -> Self {
        Self::Message(message)
    }
}

impl Database {
    fn insert(&mut self, item: Item) {
        match item {
            Item::Agent(agent) => self.data.agents.push(agent),
            Item::Chat(chat) => {
                self.data.chats.push(chat);
                self.index(self.data.chats.len() - 1);
            }
            Item::Message(message) => {
                let chat = message.chat_id.unwrap_or_default();
                self.data.messages.entry(chat).or_default().push(message);
            }
        }
    }

    fn index(&mut self, at: usize) {
        let chat = &self.data.chats[at];
        self.by_id.insert(chat.chat_id, at);
        self.by_external_id.insert(chat.external_id.clone(), at);
    }

    fn agent(&self, id: Uuid) -> Option<&Agent> {
        self.data.agents.iter().find(|agent| agent.agent_id == id)
    }

    fn agent_exists(&self, id: Option<Uuid>) -> Result<(), Reply> {
        match id {
            Some(id) if self.agent(id).is_none() => {
                Err(Reply::detail(400, "That agent does not exist."))
            }
            _ => Ok(()),
        }
    }

    fn chat(&mut self, id: Uuid) -> Result<&mut Chat, Reply> {
        let at = self.by_id.get(&id);
        let at = at.ok_or_else(|| Reply::not_found("Chat not found"))?;
        Ok(&mut self.data.chats[*at])
    }

    fn patch_chat(&mut self, id: Uuid, body: &Map<String, Value>) -> Answer {
        let mut fields = Fields::of(body);
        let agent_id = fields.uuid("agent_id");
        let (started_at, ended_at) = (
            fields.time("started_at", false),
            fields.time("ended_at", false),
        );
        fields.done(Some(()))?;
        self.chat(id)?;
        self.agent_exists(agent_id)?;
        let named = |name: &str| body.contains_key(name);
        if named("started_at") && started_at.is_none() {
            return Err(Reply::unhandled());
        }
        let chat = self.chat(id)?;
        chat.started_at = started_at.unwrap_or(chat.started_at);
        if named("agent_id") {
            chat.agent_id = agent_id;
        }
        if named("ended_at") {
            chat.ended_at = ended_at;
        }
        Ok(Reply::new(204))
    }
}

/// The fields of a body, and what is wrong with them.
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
        let error = invalid(kind, ["body", name], message, &self.body[name]);
        self.errors.push(error);
        None
    }

    /// `None` if an optional field is absent, or if the field is invalid.
    fn given(&mut self, name: &str, required: bool) -> Option<&'a Value> {
        let value = self.body.get(name);
        if value.is_none() && required {
            let input = self.body.clone().into();
            let error = invalid("missing", ["body", name], "Field required", &input);
            self.errors.push(error);
        }
        value.filter(|value| required || !value.is_null())
    }

    fn string(&mut self, name: &str) -> Option<String> {
        match self.given(name, true)? {
            Value::String(text) => Some(text.clone()),
            _ => self.wrong(name, "string_type", "Input should be a valid string"),
        }
    }

    /// A text that is stripped and must then have at least two characters.
    fn text(&mut self, name: &str) -> Option<String> {
        let text = self.string(name)?.trim().to_owned();
        if text.chars().nth(1).is_some() {
            return Some(text);
        }
        let short = "String should have at least 2 characters";
        self.wrong::<()>(name, "string_too_short", short);
        if let Some(Value::Object(error)) = self.errors.last_mut() {
            error.insert("ctx".to_owned(), json!({ "min_length": 2 }));
        }
        None
    }

    /// The local time as written; an offset is dropped.
    fn time(&mut self, name: &str, required: bool) -> Option<NaiveDateTime> {
        let parsed = match self.given(name, required)? {
            Value::String(text) => parse_time(text),
            Value::Number(seconds) => parse_time(&seconds.to_string()),
            _ => return self.wrong(name, "datetime_type", "Input should be a valid datetime"),
        };
        let wrong = "Input should be a valid datetime or date";
        parsed
            .map(|(time, _)| time)
            .or_else(|| self.wrong(name, "datetime_from_date_parsing", wrong))
    }

    fn uuid(&mut self, name: &str) -> Option<Uuid> {
        let value = self.given(name, false)?;
        let id = value.as_str().and_then(|text| Uuid::try_parse(text).ok());
        id.or_else(|| self.wrong(name, "uuid_parsing", "Input should be a valid UUID"))
    }

    /// The values, if all fields are valid.
    fn done<T>(self, values: Option<T>) -> Result<T, Reply> {
        match values {
            Some(values) if self.errors.is_empty() => Ok(values),
            _ => Err(Reply::detail(422, self.errors)),
        }
    }
}

fn parse(body: &[u8]) -> Result<Map<String, Value>, Reply> {
    let wrong = |kind, message, input: &Value| {
        let error = invalid(kind, ["body", ""], message, input);
        Err(Reply::detail(422, vec![error]))
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

fn uuid(place: &str, text: &str) -> Result<Uuid, Reply> {
    Uuid::try_parse(text).map_err(|_| {
        let place = ["path", place];
        let error = invalid(
            "uuid_parsing",
            place,
            "Input should be a valid UUID",
            &text.into(),
        );
        Reply::detail(422, vec![error])
    })
}
