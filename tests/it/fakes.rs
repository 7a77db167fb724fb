//! A fake BigChat and a fake OurAPI, each answering as the contract says until a test upsets it. What they were asked
//! is told line by line (`POST /agents {"email":…}`), so that a test can say exactly what it expects.
//!
//! BigChat's clock stands still at [`NOW`] unless a test moves it. The ids that OurAPI gives are told by their ends:
//! `a1` is the first agent, `c1` the first chat.

use std::collections::{HashMap, VecDeque};
use std::net::TcpListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use wiremock::{Mock, MockServer, Request, ResponseTemplate, matchers};

use crate::harness::{Bench, until};

/// 2026-11-22T22:00:00Z, from which the tests count seconds.
const T0: i64 = 1_795_384_800;

/// BigChat's clock, in seconds after 22:00:00.
pub(crate) const NOW: i64 = 600;

/// The ids that OurAPI gives begin with this.
const ID: &str = "00000000-0000-0000-0000-";

/// Longer than any test waits for an answer.
const LATE: Duration = Duration::from_secs(60);

/// The time so many seconds after 22:00:00, in Unix seconds.
pub(crate) fn unix(seconds: i64) -> i64 {
    T0 + seconds
}

/// The time so many seconds after 22:00:00, as OurAPI should be sent it.
pub(crate) fn time(seconds: i64) -> String {
    let time = chrono::DateTime::from_timestamp(unix(seconds), 0).expect("a time");
    time.format("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// A request with a body, as a fake tells of it.
pub(crate) fn line(what: &str, body: Value) -> String {
    format!("{what} {body}")
}

/// The query for a window, as BigChat should be asked.
pub(crate) fn window(start: i64, end: i64) -> String {
    let [start, end] = [start, end].map(|at| time(at).replace(':', "%3A"));
    format!("start_at={start}&end_at={end}")
}

fn event(name: &str, conversation: i64, at: i64, data: Value) -> Value {
    json!({"conversation_id": conversation, "event_name": name, "event_at": unix(at), "data": data})
}

/// A conversation begins.
pub(crate) fn start(conversation: i64, at: i64) -> Value {
    event("START", conversation, at, Value::Null)
}

/// A conversation ends.
pub(crate) fn end(conversation: i64, at: i64) -> Value {
    event("END", conversation, at, Value::Null)
}

/// Somebody writes something.
pub(crate) fn message(conversation: i64, at: i64, text: &str) -> Value {
    event("MESSAGE", conversation, at, json!({"message": text}))
}

/// An advisor takes over.
pub(crate) fn transfer(conversation: i64, at: i64, advisor: i64) -> Value {
    let data = json!({"old_advisor_id": 1, "new_advisor_id": advisor});
    event("TRANSFER", conversation, at, data)
}

/// What a fake does instead of answering as the contract says.
#[derive(Clone)]
pub(crate) struct Upset {
    answer: Option<ResponseTemplate>,
    carried_out: bool,
    left: usize,
}

/// Answers with that status, once, and does nothing.
pub(crate) fn status(status: u16) -> Upset {
    Upset {
        answer: Some(ResponseTemplate::new(status)),
        carried_out: false,
        left: 1,
    }
}

/// Breaks the connection instead of answering, once.
pub(crate) fn dropped() -> Upset {
    Upset {
        answer: None,
        ..status(200)
    }
}

/// Answers far too late, once.
pub(crate) fn late() -> Upset {
    status(200).after(LATE)
}

impl Upset {
    /// With that body.
    pub(crate) fn body(self, body: &str) -> Self {
        self.with(|answer| answer.set_body_string(body))
    }

    /// With that header.
    pub(crate) fn header(self, name: &'static str, value: &str) -> Self {
        self.with(|answer| answer.insert_header(name, value))
    }

    /// After so long.
    pub(crate) fn after(self, delay: Duration) -> Self {
        self.with(|answer| answer.set_delay(delay))
    }

    /// Having done what was asked all the same.
    pub(crate) fn carried_out(mut self) -> Self {
        self.carried_out = true;
        self
    }

    /// So many times.
    pub(crate) fn times(mut self, times: usize) -> Self {
        self.left = times;
        self
    }

    /// Until the fake is calmed.
    pub(crate) fn always(self) -> Self {
        self.times(usize::MAX)
    }

    fn with(mut self, change: impl FnOnce(ResponseTemplate) -> ResponseTemplate) -> Self {
        self.answer = self.answer.map(change);
        self
    }
}

/// How a fake answers by itself.
pub(crate) trait Service: Send + 'static {
    fn answer(&mut self, request: &Request) -> ResponseTemplate;

    /// Adds what all its answers have, upset or not.
    fn stamp(&self, answer: ResponseTemplate) -> ResponseTemplate {
        answer
    }
}

/// A fake over wiremock.
pub(crate) struct Fake<S> {
    inner: Arc<Mutex<Inner<S>>>,
    server: MockServer,
}

struct Inner<S> {
    service: S,
    upsets: Vec<(String, Upset)>,
    asked: Vec<Asked>,
    /// How many of these were told already.
    told: usize,
}

/// One request.
#[derive(Clone)]
pub(crate) struct Asked {
    /// Method, path, query and body, with ids shortened and the body's keys sorted.
    pub(crate) line: String,
    /// When it came.
    pub(crate) at: Instant,
    /// Its `authorization` header.
    pub(crate) authorization: Option<String>,
}

impl From<&Request> for Asked {
    fn from(request: &Request) -> Self {
        let body = match serde_json::from_slice::<Value>(&request.body) {
            Ok(json) => json.to_string(),
            Err(_) => String::from_utf8_lossy(&request.body).into_owned(),
        };
        let url = &request.url[url::Position::BeforePath..];
        let line = format!("{} {url} {body}", request.method);
        let authorization = request.headers.get("authorization");
        Self {
            line: shortened(line.trim_end()),
            at: Instant::now(),
            authorization: authorization.map(|value| value.to_str().expect("text").to_owned()),
        }
    }
}

/// Whether a line begins with the first part of a pattern and holds its other parts after it, `*` being between them.
fn fits(line: &str, pattern: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().and_then(|part| line.strip_prefix(part));
    let rest = first.and_then(|rest| {
        parts.try_fold(rest, |rest, part| {
            rest.split_once(part).map(|(_, rest)| rest)
        })
    });
    rest.is_some()
}

impl<S: Service> Inner<S> {
    fn upset(&mut self, line: &str) -> Option<&mut Upset> {
        let mut upsets = self.upsets.iter_mut();
        let (_, upset) = upsets.find(|(pattern, upset)| upset.left > 0 && fits(line, pattern))?;
        Some(upset)
    }

    fn drops(&mut self, request: &Request) -> bool {
        self.upset(&Asked::from(request).line)
            .is_some_and(|upset| upset.answer.is_none())
    }

    fn serve(&mut self, request: &Request) -> Option<ResponseTemplate> {
        let asked = Asked::from(request);
        let upset = self.upset(&asked.line).map(|upset| {
            upset.left -= 1;
            upset.clone()
        });
        self.asked.push(asked);
        let answer = match upset {
            None => Some(self.service.answer(request)),
            Some(upset) => {
                if upset.carried_out {
                    self.service.answer(request);
                }
                upset.answer
            }
        };
        answer.map(|answer| self.service.stamp(answer))
    }
}

impl<S: Service> Fake<S> {
    async fn of(service: S) -> Self {
        let inner = Arc::new(Mutex::new(Inner {
            service,
            upsets: Vec::new(),
            asked: Vec::new(),
            told: 0,
        }));
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let server = serve(&inner, listener).await;
        Self { inner, server }
    }

    fn inner(&self) -> MutexGuard<'_, Inner<S>> {
        lock(&self.inner)
    }

    /// Where it is.
    pub(crate) fn url(&self) -> String {
        self.server.uri()
    }

    /// Goes on elsewhere, with all it holds.
    pub(crate) async fn move_to(&mut self, listener: TcpListener) {
        self.server = serve(&self.inner, listener).await;
    }

    /// Does something else where a request fits the pattern: the beginning of its line, and further parts after `*`.
    pub(crate) fn upset(&self, pattern: &str, upset: Upset) {
        self.inner().upsets.push((pattern.to_owned(), upset));
    }

    /// From now on answers as the contract says.
    pub(crate) fn calm(&self) {
        self.inner().upsets.clear();
    }

    /// What it was asked since this was last called.
    pub(crate) fn asked(&self) -> Vec<String> {
        let mut inner = self.inner();
        let new = inner.asked[inner.told..].iter();
        let new = new.map(|asked| asked.line.clone()).collect();
        inner.told = inner.asked.len();
        new
    }

    /// What it was ever asked that fits the pattern.
    pub(crate) fn ever_asked(&self, pattern: &str) -> Vec<Asked> {
        let mut asked = self.inner().asked.clone();
        asked.retain(|asked| fits(&asked.line, pattern));
        asked
    }

    /// How often it was asked what fits the pattern.
    pub(crate) fn count(&self, pattern: &str) -> usize {
        self.ever_asked(pattern).len()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn serve<S: Service>(inner: &Arc<Mutex<Inner<S>>>, listener: TcpListener) -> MockServer {
    let server = MockServer::builder()
        .listener(listener)
        .disable_request_recording()
        .start()
        .await;
    let [drops, serves_not, serves] = [(); 3].map(|()| Arc::clone(inner));
    Mock::given(move |request: &Request| lock(&drops).drops(request))
        .respond_with_err(move |request: &Request| {
            lock(&serves_not).serve(request);
            std::io::Error::other("the connection is broken")
        })
        .with_priority(1)
        .mount(&server)
        .await;
    Mock::given(matchers::any())
        .respond_with(move |request: &Request| lock(&serves).serve(request).expect("an answer"))
        .mount(&server)
        .await;
    server
}

fn detail(status: u16, detail: &str) -> ResponseTemplate {
    ResponseTemplate::new(status).set_body_json(json!({"detail": detail}))
}

/// What BigChat knows.
pub(crate) struct BigChat {
    date: String,
    pages: VecDeque<Page>,
    conversations: HashMap<i64, (i64, i64)>,
    advisors: HashMap<i64, (String, String)>,
}

/// An answer to `/events`.
#[derive(Clone)]
pub(crate) struct Page {
    body: String,
}

impl<E: IntoIterator<Item = Value>> From<E> for Page {
    fn from(events: E) -> Self {
        page(events, Value::Null)
    }
}

/// A page with what it says of the next one, whatever that is.
pub(crate) fn page(events: impl IntoIterator<Item = Value>, next: impl Into<Value>) -> Page {
    let events: Vec<Value> = events.into_iter().collect();
    raw(&json!({"events": events, "nextPageUrl": next.into()}).to_string())
}

/// A page that may be none.
pub(crate) fn raw(body: &str) -> Page {
    let body = body.to_owned();
    Page { body }
}

impl Service for BigChat {
    fn answer(&mut self, request: &Request) -> ResponseTemplate {
        let segments: Vec<&str> = request.url.path()[1..].split('/').collect();
        match segments[..] {
            ["events"] => {
                let page = self.pages.pop_front().unwrap_or_else(|| Page::from([]));
                ResponseTemplate::new(200).set_body_raw(page.body, "application/json")
            }
            ["conversations", id] => {
                let id = id.parse().expect("an id");
                match self.conversations.get(&id) {
                    None => detail(404, "Conversation not found"),
                    Some((at, advisor)) => ResponseTemplate::new(200).set_body_json(json!(
                        {"events": [start(id, *at)], "conversation_id": id, "advisor_id": advisor}
                    )),
                }
            }
            ["advisors", id] => match self.advisors.get(&id.parse().expect("an id")) {
                None => detail(404, "Advisor not found"),
                Some((name, email)) => ResponseTemplate::new(200)
                    .set_body_json(json!({"name": name, "email_address": email})),
            },
            _ => detail(404, "Not Found"),
        }
    }

    fn stamp(&self, answer: ResponseTemplate) -> ResponseTemplate {
        answer.insert_header("date", self.date.as_str())
    }
}

impl Fake<BigChat> {
    /// A BigChat in which nothing happens: it knows its first conversation, 42 and 43 with advisor 7 (Ann), and
    /// advisor 8 (Bob).
    pub(crate) async fn big_chat() -> Self {
        let bigchat = Self::of(BigChat {
            date: String::new(),
            pages: VecDeque::new(),
            conversations: HashMap::from([(1, (-3600, 7)), (42, (0, 7)), (43, (1, 7))]),
            advisors: HashMap::new(),
        })
        .await;
        bigchat.advisor(7, "Ann", "ann@x.test");
        bigchat.advisor(8, "Bob", "bob@x.test");
        bigchat.clock(NOW);
        bigchat
    }

    /// Answers the next question for events with this; the one after with what is told next.
    pub(crate) fn tells(&self, page: impl Into<Page>) {
        self.inner().service.pages.push_back(page.into());
    }

    /// Sets its clock.
    pub(crate) fn clock(&self, at: i64) {
        let at = std::time::UNIX_EPOCH + Duration::from_secs(unix(at).unsigned_abs());
        self.date(&httpdate::fmt_http_date(at));
    }

    /// Sets its `date` header.
    pub(crate) fn date(&self, date: &str) {
        self.inner().service.date = date.to_owned();
    }

    /// Knows an advisor.
    pub(crate) fn advisor(&self, id: i64, name: &str, email: &str) {
        let advisor = (name.to_owned(), email.to_owned());
        self.inner().service.advisors.insert(id, advisor);
    }

    /// Restarts: it knows its first conversation and one more, both with advisor 7, and nothing of before.
    pub(crate) fn restarts(&self, conversation: i64, at: i64) {
        let known = &mut self.inner().service.conversations;
        *known = HashMap::from([(1, (at - 1, 7)), (conversation, (at, 7))]);
    }

    /// Knows a conversation no longer.
    pub(crate) fn forgets_conversation(&self, id: i64) {
        self.inner().service.conversations.remove(&id);
    }

    /// Knows an advisor no longer.
    pub(crate) fn forgets_advisor(&self, id: i64) {
        self.inner().service.advisors.remove(&id);
    }

    /// Waits for so many further polls: what was to follow from those before has had its time.
    pub(crate) async fn further_polls(&self, polls: usize) {
        let before = self.count("GET /events");
        until("further polls", async || {
            self.count("GET /events") >= before + polls
        })
        .await;
    }

    /// The queries it was asked for events with, since it was last asked what it was asked.
    pub(crate) fn queries(&self) -> Vec<String> {
        let lines = self.asked().into_iter();
        lines
            .filter_map(|line| line.strip_prefix("GET /events?").map(str::to_owned))
            .collect()
    }

    /// What it was asked beside the events and its first conversation, both of which belong to every poll.
    pub(crate) fn asked_besides(&self) -> Vec<String> {
        let mut lines = self.asked();
        lines.retain(|line| !line.starts_with("GET /events") && line != "GET /conversations/1");
        lines
    }
}

/// What OurAPI holds.
pub(crate) struct OurApi {
    agents: Vec<Value>,
    chats: Vec<Value>,
    /// Of the chat in `chat`.
    messages: Vec<Value>,
    conflict: u16,
}

impl OurApi {
    fn agent_exists(&self, body: &Value) -> bool {
        let id = &body["agent_id"];
        id.is_null() || self.agents.iter().any(|agent| agent["agent_id"] == *id)
    }

    fn chat(&mut self, id: &str) -> Option<&mut Value> {
        self.chats.iter_mut().find(|chat| chat["chat_id"] == *id)
    }

    fn list(&self, what: &[Value], request: &Request) -> ResponseTemplate {
        let filters: Vec<_> = request.url.query_pairs().collect();
        let fits = |item: &&Value| filters.iter().all(|(name, value)| item[&**name] == **value);
        let found: Vec<&Value> = what.iter().filter(fits).collect();
        ResponseTemplate::new(200).set_body_json(found)
    }
}

/// OurAPI drops what follows the seconds.
fn without_zone(time: &Value) -> Value {
    time.as_str().map_or(Value::Null, |time| time[..19].into())
}

impl Service for OurApi {
    fn answer(&mut self, request: &Request) -> ResponseTemplate {
        let path = request.url.path()[1..].to_owned();
        let segments: Vec<&str> = path.split('/').collect();
        let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        let taken = |held: &[Value], name: &str| held.iter().any(|item| item[name] == body[name]);
        match (request.method.as_str(), &segments[..]) {
            ("GET", ["agents"]) => self.list(&self.agents, request),
            ("POST", ["agents"]) => {
                if taken(&self.agents, "name") || taken(&self.agents, "email") {
                    return ResponseTemplate::new(500).set_body_string("Internal Server Error");
                }
                let mut agent = body.clone();
                agent["agent_id"] = id(&format!("a{}", self.agents.len() + 1)).into();
                self.agents.push(agent.clone());
                ResponseTemplate::new(201).set_body_json(agent)
            }
            ("GET", ["chats"]) => self.list(&self.chats, request),
            ("POST", ["chats"]) => {
                if taken(&self.chats, "external_id") {
                    return detail(
                        self.conflict,
                        "A chat with that external ID already exists.",
                    );
                }
                if !self.agent_exists(&body) {
                    return detail(400, "That agent does not exist.");
                }
                let chat = json!({
                    "chat_id": id(&format!("c{}", self.chats.len() + 1)),
                    "external_id": body["external_id"],
                    "started_at": without_zone(&body["started_at"]),
                    "ended_at": without_zone(&body["ended_at"]),
                    "agent_id": body["agent_id"],
                });
                self.chats.push(chat.clone());
                ResponseTemplate::new(201).set_body_json(chat)
            }
            (_, ["chats", id, ..]) if self.chat(id).is_none() => {
                detail(404, "That chat does not exist.")
            }
            ("PATCH", ["chats", id]) => {
                if !self.agent_exists(&body) {
                    return detail(400, "That agent does not exist.");
                }
                let chat = self.chat(id).expect("it was there a moment ago");
                for (name, value) in body.as_object().expect("an object") {
                    let is_time = name.ends_with("_at");
                    chat[name] = if is_time {
                        without_zone(value)
                    } else {
                        value.clone()
                    };
                }
                ResponseTemplate::new(204)
            }
            ("GET", ["chats", id, "messages"]) => {
                let of_chat = |message: &&Value| message["chat"] == **id;
                let found: Vec<&Value> = self.messages.iter().filter(of_chat).collect();
                ResponseTemplate::new(200).set_body_json(found)
            }
            ("POST", ["chats", id, "messages"]) => {
                let text = body["text"].as_str().expect("a text").trim();
                if text.chars().count() < 2 {
                    return detail(422, "String should have at least 2 characters");
                }
                let sent_at = without_zone(&body["sent_at"]);
                self.messages
                    .push(json!({"chat": id, "text": text, "sent_at": sent_at}));
                ResponseTemplate::new(200).set_body_json(json!({}))
            }
            _ => detail(404, "Not Found"),
        }
    }
}

/// An id by its end.
pub(crate) fn id(end: &str) -> String {
    format!("{ID}{end:0>12}")
}

/// With only the ends of ids.
fn shortened(text: &str) -> String {
    let mut parts = text.split(ID);
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + part.trim_start_matches('0'))
}

impl Fake<OurApi> {
    /// An OurAPI that holds nothing.
    pub(crate) async fn our_api() -> Self {
        Self::of(OurApi {
            agents: Vec::new(),
            chats: Vec::new(),
            messages: Vec::new(),
            conflict: 404,
        })
        .await
    }

    /// Answers this to the creation of a chat that is there already, instead of 404.
    pub(crate) fn conflict_is(&self, status: u16) {
        self.inner().service.conflict = status;
    }

    /// Holds an agent.
    pub(crate) fn has_agent(&self, end: &str, name: &str, email: &str) {
        let agent = json!({"agent_id": id(end), "name": name, "email": email});
        self.inner().service.agents.push(agent);
    }

    /// Holds a chat without an agent, from another hand.
    pub(crate) fn has_chat(&self, end: &str, external_id: &str, started_at: i64) {
        let chat = json!({
            "chat_id": id(end),
            "external_id": external_id,
            "started_at": without_zone(&time(started_at).into()),
            "ended_at": null,
            "agent_id": null,
        });
        self.inner().service.chats.push(chat);
    }

    /// Holds a message in a chat.
    pub(crate) fn has_message(&self, chat: &str, at: i64, text: &str) {
        let sent_at = without_zone(&time(at).into());
        let message = json!({"chat": id(chat), "text": text, "sent_at": sent_at});
        self.inner().service.messages.push(message);
    }

    /// Holds nothing any more.
    pub(crate) fn loses_everything(&self) {
        let OurApi {
            agents,
            chats,
            messages,
            ..
        } = &mut self.inner().service;
        agents.clear();
        chats.clear();
        messages.clear();
    }

    /// The chats: external id, start and end in seconds after 22:00:00, agent.
    pub(crate) fn chats(&self) -> Vec<String> {
        let inner = self.inner();
        let field = |chat: &Value, name: &str| match &chat[name] {
            Value::String(text) => shortened(&text.replace("2026-11-22T", "")),
            _ => "-".to_owned(),
        };
        let fields = ["external_id", "started_at", "ended_at", "agent_id"];
        let line = |chat| fields.map(|name| field(chat, name)).join(" ");
        inner.service.chats.iter().map(line).collect()
    }

    /// The texts of all messages, in the order in which they came.
    pub(crate) fn messages(&self) -> Vec<String> {
        let inner = self.inner();
        let texts = inner.service.messages.iter();
        texts
            .map(|message| message["text"].as_str().expect("a text").to_owned())
            .collect()
    }
}

/// Both fakes, and what runs a daemon between them.
pub(crate) struct Scene {
    pub(crate) bigchat: Fake<BigChat>,
    pub(crate) our_api: Fake<OurApi>,
    pub(crate) bench: Bench,
}

impl Scene {
    pub(crate) async fn new() -> Self {
        let (bigchat, our_api) = (Fake::big_chat().await, Fake::our_api().await);
        let bench = Bench::new(&bigchat.url(), &our_api.url());
        Self {
            bigchat,
            our_api,
            bench,
        }
    }

    /// With one more setting.
    pub(crate) fn set(self, flag: &str, value: &str) -> Self {
        let bench = self.bench.set(flag, value);
        Self { bench, ..self }
    }

    /// BigChat tells of events, one page of them, which the running daemon is to deliver; returns what OurAPI was
    /// asked for that.
    pub(crate) async fn delivers(&self, events: impl IntoIterator<Item = Value>) -> Vec<String> {
        let events: Vec<Value> = events.into_iter().collect();
        let before = match self.bench.is_ready() {
            true => self.bench.events("delivered"),
            false => 0,
        };
        let count = before + i64::try_from(events.len()).expect("few");
        self.our_api.asked();
        self.bigchat.tells(events);
        self.bench.until_events("delivered", count).await;
        self.our_api.asked()
    }
}

/// What a server by hand sends instead of an answer.
pub(crate) struct Tampered {
    bytes: Vec<u8>,
    forever: Vec<u8>,
    pause: Duration,
}

impl From<Vec<u8>> for Tampered {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            forever: Vec::new(),
            pause: Duration::ZERO,
        }
    }
}

impl Tampered {
    /// First these, then those again and again, with a pause between, for as long as anybody reads.
    pub(crate) fn without_end(bytes: &[u8], forever: &[u8], pause: Duration) -> Self {
        Self {
            bytes: bytes.to_owned(),
            forever: forever.to_owned(),
            pause,
        }
    }
}

/// A server by hand in front of another: `tamper` makes of each request's line and the whole answer what is sent
/// instead of it, and the connection is closed after that. Returns its URL.
pub(crate) async fn tampering<T: Into<Tampered>>(
    url: &str,
    tamper: impl FnMut(&str, Vec<u8>) -> T + Send + 'static,
) -> String {
    let backend = url.trim_start_matches("http://").to_owned();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let tamper = Arc::new(Mutex::new(tamper));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (backend, tamper) = (backend.clone(), Arc::clone(&tamper));
            tokio::spawn(async move {
                let tamper = |line: &str, answer| lock(&tamper)(line, answer).into();
                // Whoever asked may not want to read all of it.
                drop(relay(stream, &backend, tamper).await);
            });
        }
    });
    url
}

async fn relay(
    mut client: TcpStream,
    backend: &str,
    tamper: impl FnOnce(&str, Vec<u8>) -> Tampered,
) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !is_whole(&request) {
        if client.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let text = String::from_utf8_lossy(&request).into_owned();
    let mut server = TcpStream::connect(backend).await?;
    let closing = text.replacen("\r\n", "\r\nconnection: close\r\n", 1);
    server.write_all(closing.as_bytes()).await?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer).await?;
    let line = text.lines().next().unwrap_or_default();
    let tampered = tamper(line, answer);
    client.write_all(&tampered.bytes).await?;
    while !tampered.forever.is_empty() {
        tokio::time::sleep(tampered.pause).await;
        client.write_all(&tampered.forever).await?;
    }
    client.shutdown().await
}

/// Whether a request has come to its end.
fn is_whole(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request);
    text.split_once("\r\n\r\n").is_some_and(|(head, body)| {
        let length = head.lines().find_map(|line| {
            line.to_ascii_lowercase()
                .strip_prefix("content-length:")
                .map(|length| length.trim().parse::<usize>().expect("a length"))
        });
        body.len() >= length.unwrap_or(0)
    })
}

/// The answer with that header instead of its own.
pub(crate) fn with_header(answer: &[u8], name: &str, header: &str) -> Vec<u8> {
    let split = answer
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .expect("an answer");
    let head = String::from_utf8_lossy(&answer[..split]).into_owned();
    let kept = head
        .lines()
        .filter(|line| !line.to_ascii_lowercase().starts_with(&format!("{name}:")));
    let head = kept.chain([header]).collect::<Vec<_>>().join("\r\n");
    [head.as_bytes(), &answer[split..]].concat()
}
