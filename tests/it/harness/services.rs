//! Both simulated services for tests, and a proxy for responses that no service would send.
//!
//! BigChat's clock is stopped at [`NOW`] unless a test moves it. Each request is shown as one line (`POST /agents
//! {"email":…}`), so that a test can state exactly what it expects. OurAPI's ids are shortened to their last
//! characters: `a1` is the first agent, `c1` the first chat.

use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bigchat_sync::simulator::bigchat::{Clock, Log, Mode, Options, Page, Reported};
use bigchat_sync::simulator::event::T0;
use bigchat_sync::simulator::our_api::{Agent, Chat, Data, Item, Message};
use bigchat_sync::simulator::{self, Server, shortened};
use chrono::{DateTime, NaiveDateTime};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use uuid::Uuid;

use crate::harness::until;

/// A pattern for each kind of request.
pub(crate) const ROUTES: [&str; 10] = [
    "GET /events",
    "GET /conversations/{id}",
    "GET /advisors/{id}",
    "GET /agents",
    "POST /agents",
    "GET /chats",
    "POST /chats",
    "PATCH /chats/{id}",
    "GET /chats/{id}/messages",
    ADD_MESSAGE,
];

/// The request that adds a message to a chat.
pub(crate) const ADD_MESSAGE: &str = "POST /chats/{id}/messages";

/// The time at which BigChat's clock is stopped, in seconds after 22:00:00.
pub(crate) const NOW: i64 = 600;

/// The time this many seconds after 22:00:00, in Unix seconds.
pub(crate) fn unix(seconds: i64) -> i64 {
    T0 + seconds
}

fn naive(seconds: i64) -> NaiveDateTime {
    let time = DateTime::from_timestamp(unix(seconds), 0).expect("a time");
    time.naive_utc()
}

/// The time this many seconds after 22:00:00, as it should be sent to OurAPI.
pub(crate) fn time(seconds: i64) -> String {
    naive(seconds).format("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// A request with a body, as a service shows it.
pub(crate) fn line(what: &str, body: Value) -> String {
    format!("{what} {body}")
}

/// The query for a window, as BigChat should receive it.
pub(crate) fn window(start: i64, end: i64) -> String {
    let [start, end] = [start, end].map(|at| time(at).replace(':', "%3A"));
    format!("start_at={start}&end_at={end}")
}

/// A BigChat that reports random events, each once.
pub(crate) fn seeded(seed: u64) -> Options {
    Options {
        seed,
        ..Options::default()
    }
}

/// A BigChat that stores its events, and produces this many random ones per second.
pub(crate) fn busy_log(seed: u64, events_per_second: f64, page_size: usize) -> Options {
    let log = Log {
        events_per_second,
        page_size,
        ..Log::default()
    };
    Options {
        mode: Mode::Log(log),
        ..seeded(seed)
    }
}

/// A BigChat that stores its events, and has only those of the test.
pub(crate) fn quiet_log(log: Log) -> Options {
    Options {
        quiet: true,
        mode: Mode::Log(log),
        ..Options::default()
    }
}

/// The full id that ends with these characters.
fn uuid(end: &str) -> Uuid {
    Uuid::try_parse(&simulator::id(end)).expect("an id")
}

/// BigChat.
pub(crate) struct BigChat(pub(crate) Server<simulator::BigChat>);

impl Deref for BigChat {
    type Target = Server<simulator::BigChat>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl BigChat {
    /// Responds to the next request for events with this page. Further calls add pages for further requests.
    pub(crate) fn reports(&self, page: impl Into<Page>) {
        // The iterator may lock this service, too.
        let page = page.into();
        self.state().push_page(page);
    }

    /// Reports this event on its next page.
    pub(crate) fn reports_event(&self, event: Value) {
        self.state().push(event);
    }

    /// Its time, in seconds after 22:00:00.
    pub(crate) fn now(&self) -> i64 {
        self.state().now()
    }

    /// Stops its clock at this time.
    pub(crate) fn clock(&self, at: i64) {
        self.state().set_date(None);
        self.state().set_clock(Clock::Still(at));
    }

    /// Makes its clock run this many seconds ahead of this machine's.
    pub(crate) fn clock_runs(&self, ahead: i64) {
        self.state().set_clock(Clock::Ahead(ahead));
    }

    /// Sets its `date` header.
    pub(crate) fn date(&self, date: &str) {
        self.state().set_date(Some(date));
    }

    /// Stops random events.
    pub(crate) fn calms_down(&self) {
        self.state().set_quiet(true);
    }

    /// Adds or replaces an advisor.
    pub(crate) fn advisor(&self, id: i64, name: &str, email: &str) {
        self.state().set_advisor(id, name, email);
    }

    /// Adds a conversation without events.
    pub(crate) fn open(&self, conversation: i64, at: i64, advisor: i64) {
        self.state().open(conversation, at, advisor);
    }

    /// Restarts, with its first conversation and one more, both with advisor 7.
    pub(crate) fn restarts(&self, conversation: i64, at: i64) {
        let mut bigchat = self.state();
        bigchat.restart_at(at - 1);
        bigchat.open(1, at - 1, 7);
        bigchat.open(conversation, at, 7);
        bigchat.set_advisor(7, "Ann", "ann@x.test");
        bigchat.set_advisor(8, "Bob", "bob@x.test");
    }

    /// Restarts immediately, and reuses its ids.
    pub(crate) fn restart(&self) {
        self.state().restart();
    }

    /// Restarts before the next poll, and waits for that poll. The first conversation of the new epoch starts later
    /// than any earlier one, so the clock must have passed the latest start.
    pub(crate) async fn restarts_between_polls(&self) {
        until("a later second", async || {
            let state = self.state();
            state.now() > state.latest_start()
        })
        .await;
        let before = self.state().epoch();
        self.state().restart_at_next_poll();
        until("a restart", async || self.state().epoch() > before).await;
    }

    /// Forgets a conversation.
    pub(crate) fn forgets_conversation(&self, id: i64) {
        self.state().forget_conversation(id);
    }

    /// Forgets an advisor.
    pub(crate) fn forgets_advisor(&self, id: i64) {
        self.state().forget_advisor(id);
    }

    /// All reported events.
    pub(crate) fn reported(&self) -> Vec<Reported> {
        self.state().reported()
    }

    /// Waits until it has reported this many more events than now.
    pub(crate) async fn reports_more(&self, more: usize) {
        let before = self.reported().len();
        until("more events", async || {
            self.reported().len() >= before + more
        })
        .await;
    }

    /// How many times it was polled.
    pub(crate) fn polls(&self) -> u64 {
        self.state().polls()
    }

    /// Waits for this many further requests for events, so that the consequences of earlier polls are complete.
    pub(crate) async fn further_polls(&self, polls: usize) {
        let before = self.count("GET /events");
        until("further polls", async || {
            self.count("GET /events") >= before + polls
        })
        .await;
    }

    /// The queries of the requests for events since this or `asked` was last called.
    pub(crate) fn queries(&self) -> Vec<String> {
        let lines = self.asked().into_iter();
        lines
            .filter_map(|line| line.strip_prefix("GET /events?").map(str::to_owned))
            .collect()
    }

    /// The requests except those that every poll makes: for events, and for the first conversation.
    pub(crate) fn asked_besides(&self) -> Vec<String> {
        let mut lines = self.asked();
        lines.retain(|line| !line.starts_with("GET /events") && line != "GET /conversations/1");
        lines
    }
}

/// OurAPI.
pub(crate) struct OurApi {
    server: Server<simulator::OurApi>,
    /// All data at the time when another client last added to it.
    pub(crate) before: Mutex<Data>,
}

impl Deref for OurApi {
    type Target = Server<simulator::OurApi>;

    fn deref(&self) -> &Self::Target {
        &self.server
    }
}

impl OurApi {
    pub(crate) fn new(server: Server<simulator::OurApi>) -> Self {
        let before = Mutex::default();
        Self { server, before }
    }

    /// Sets the status of the response to the creation of a chat or an agent that already exists.
    pub(crate) fn conflict_is(&self, status: u16) {
        self.state().set_conflict(status);
    }

    /// Changes a chat, as another client would.
    pub(crate) async fn is_changed(&self, external_id: &str, change: &Value) {
        let chats = self.data().chats;
        let chat = chats.iter().find(|chat| chat.external_id == external_id);
        let chat = chat.expect("a chat").chat_id;
        let url = format!("{}/chats/{chat}", self.url());
        let changed = reqwest::Client::new().patch(url).json(change).send().await;
        assert!(changed.expect("an answer").status().is_success());
    }

    fn has(&self, item: impl Into<Item>) {
        self.state().add(item);
        let before = self.state().data().clone();
        *self.before.lock().unwrap_or_else(PoisonError::into_inner) = before;
    }

    /// Adds an agent.
    pub(crate) fn has_agent(&self, end: &str, name: &str, email: &str) {
        self.has(Agent {
            agent_id: uuid(end),
            name: name.to_owned(),
            email: email.to_owned(),
        });
    }

    /// Adds a chat without an agent, as another client would.
    pub(crate) fn has_chat(&self, end: &str, external_id: &str, started_at: i64) {
        self.has(Chat {
            chat_id: uuid(end),
            external_id: external_id.to_owned(),
            started_at: naive(started_at),
            ended_at: None,
            agent_id: None,
        });
    }

    /// Adds a message to a chat.
    pub(crate) fn has_message(&self, chat: &str, at: i64, text: &str) {
        let mut our_api = self.state();
        our_api.add(Message {
            chat_id: Some(uuid(chat)),
            agent_id: None,
            sent_at: naive(at),
            text: text.to_owned(),
            // This id is after the existing ones.
            message_id: Uuid::from_u128(u128::MAX),
        });
    }

    /// Loses everything.
    pub(crate) fn loses_everything(&self) {
        self.state().lose_everything();
        *self.before.lock().unwrap_or_else(PoisonError::into_inner) = Data::default();
    }

    /// Loses a chat and its messages.
    pub(crate) fn loses_chat(&self, external_id: &str) {
        self.state().lose_chat(external_id);
    }

    /// Loses the first message of a chat.
    pub(crate) fn loses_message(&self, external_id: &str) {
        self.state().lose_message(external_id);
    }

    /// Loses its agents, which its chats still name.
    pub(crate) fn loses_agents(&self) {
        self.state().lose_agents();
    }

    /// Loses the agent with this e-mail address, which its chats still name.
    pub(crate) fn loses_agent(&self, email: &str) {
        self.state().lose_agent(email);
    }

    /// All its data.
    pub(crate) fn data(&self) -> Data {
        self.state().data().clone()
    }

    /// The chats: external id, start and end in seconds after 22:00:00, agent.
    pub(crate) fn chats(&self) -> Vec<String> {
        let time = |at: NaiveDateTime| at.format("%Y-%m-%dT%H:%M:%S").to_string();
        let line = |chat: &Chat| {
            let agent = chat.agent_id.map(|id| shortened(&id.to_string()));
            let fields = [Some(time(chat.started_at)), chat.ended_at.map(time), agent];
            let fields = fields.map(|field| field.unwrap_or_else(|| "-".to_owned()));
            let fields = fields.join(" ").replace("2026-11-22T", "");
            format!("{} {fields}", chat.external_id)
        };
        self.data().chats.iter().map(line).collect()
    }

    /// The texts of all messages, in order of arrival.
    pub(crate) fn messages(&self) -> Vec<String> {
        let data = self.data();
        let mut messages: Vec<&Message> = data.messages.values().flatten().collect();
        messages.sort_by_key(|message| message.message_id);
        messages
            .iter()
            .map(|message| message.text.clone())
            .collect()
    }

    /// The same in alphabetical order.
    pub(crate) fn sorted_messages(&self) -> Vec<String> {
        let mut messages = self.messages();
        messages.sort();
        messages
    }

    /// How many messages it has.
    pub(crate) fn message_count(&self) -> usize {
        self.state().message_count()
    }

    /// Whether concurrent requests have split its data.
    pub(crate) fn has_stumbled(&self) -> bool {
        self.state().has_stumbled()
    }

    /// Moves to another address, with its data.
    pub(crate) async fn move_to(&self, address: SocketAddr) {
        self.server
            .move_to(address)
            .await
            .expect("the port is free");
    }
}

/// A response altered by [`tampering`].
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
    /// Sends `bytes`, and then `forever` again and again, after a pause each time, as long as the client reads.
    pub(crate) fn without_end(bytes: &[u8], forever: &[u8], pause: Duration) -> Self {
        Self {
            bytes: bytes.to_owned(),
            forever: forever.to_owned(),
            pause,
        }
    }
}

/// Starts a proxy in front of a service, and returns its URL. `tamper` receives the request line and the complete
/// response, and returns what is sent instead. After that, the connection is closed.
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
                let tamper = |line: &str, answer| {
                    let mut tamper = tamper.lock().unwrap_or_else(PoisonError::into_inner);
                    tamper(line, answer).into()
                };
                // A client that does not read the whole response is no error.
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

/// Whether a request is complete.
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

/// A response with these headers, this body and the date of `answer`.
pub(crate) fn with_body(answer: &[u8], headers: &str, body: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(answer);
    let is_date = |line: &&str| line.to_ascii_lowercase().starts_with("date:");
    let date = text.lines().find(is_date).expect("a date");
    let length = body.len();
    let head = format!(
        "HTTP/1.1 200 OK\r\n{date}\r\ncontent-length: {length}\r\nconnection: close\r\n{headers}\r\n"
    );
    [head.as_bytes(), body].concat()
}

/// The response with this header replaced or added.
pub(crate) fn with_header(answer: &[u8], name: &str, header: &str) -> Vec<u8> {
    let split = answer
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .expect("an answer");
    let head = String::from_utf8_lossy(&answer[..split]).into_owned();
    let others = head
        .lines()
        .filter(|line| !line.to_ascii_lowercase().starts_with(&format!("{name}:")));
    let head = others.chain([header]).collect::<Vec<_>>().join("\r\n");
    [head.as_bytes(), &answer[split..]].concat()
}
