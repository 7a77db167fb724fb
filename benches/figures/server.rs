//! Both simulated services on one port, with the counts and times of their requests. BigChat reports the events that it
//! is given, and knows every conversation that the daemon may ask for. OurAPI accepts any number of concurrent
//! requests.

use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use bigchat_sync::simulator::bigchat::{Clock, Options, raw};
use bigchat_sync::simulator::{self, ANY_PORT, Api, BigChat, OurApi, Reply, Request, Starting};
use chrono::{DateTime, Utc};
use serde_json::json;

use crate::large::EVENTS;

/// Both services, with the counts and times of their requests.
#[derive(Clone)]
struct Both {
    bigchat: BigChat,
    our_api: OurApi,
    /// The requests; `None` if they are not recorded.
    made: Option<Vec<Request>>,
    /// The number of requests, except those to `/events`.
    count: u64,
    first: Option<Instant>,
    /// The last request to OurAPI. Requests to BigChat do not count, because each poll sends some even if nothing is
    /// waiting.
    last: Option<Instant>,
    /// The first request to OurAPI.
    sent: Option<Instant>,
    /// The first request to OurAPI that changes something.
    written: Option<Instant>,
    /// The start of all chats with which the journal was created; `None`: OurAPI has only the chats that were sent to
    /// it.
    chats_of: Option<i64>,
    /// How many times the messages of one of these chats were read.
    verified: u64,
    /// The last poll that returned new events, or else the first poll.
    polled: Option<Instant>,
    polls: u64,
    has_news: bool,
}

fn is_to_our_api(request: &Request) -> bool {
    request.path.starts_with("/chats") || request.path.starts_with("/agents")
}

impl Both {
    fn new() -> Self {
        let mut bigchat = BigChat::new(Options {
            quiet: true,
            clock: Clock::Ahead(0),
            ..Options::default()
        });
        bigchat.set_advisor(7, "Ada Lovelace", "ada@example.com");
        let mut our_api = OurApi::new(1).in_order();
        our_api.be_good();
        Self {
            bigchat,
            our_api,
            made: None,
            count: 0,
            first: None,
            last: None,
            sent: None,
            written: None,
            chats_of: None,
            verified: 0,
            polled: None,
            polls: 0,
            has_news: false,
        }
    }
}

impl Both {
    /// The answer to a read of a chat from `large::add`; `None` if the request is not such a read.
    fn chat(&mut self, request: &Request, start: i64) -> Option<Reply> {
        let time = |second: i64| {
            let time = DateTime::from_timestamp(start + second, 0).expect("a time");
            time.format("%Y-%m-%dT%H:%M:%S").to_string()
        };
        let id = |chat: i64| format!("00000000-0000-4000-8000-{chat:012x}");
        if request.method != "GET" {
            return None;
        }
        if request.path == "/chats" {
            let external_id = request.query.strip_prefix("external_id=")?;
            let chat = external_id.parse().ok().filter(|chat| *chat < 1_000_000)?;
            let chat = json!({
                "chat_id": id(chat), "external_id": external_id, "agent_id": null,
                "started_at": time(0), "ended_at": time((EVENTS - 1) * 10),
            });
            return Some(Reply::json(200, &json!([chat])));
        }
        let chat = request
            .path
            .strip_prefix("/chats/00000000-0000-4000-8000-")?;
        let chat = i64::from_str_radix(chat.strip_suffix("/messages")?, 16).ok()?;
        self.verified += 1;
        let text =
            |n: i64| format!("Message {n} of conversation {chat}, of a usual length for a chat.");
        let messages: Vec<_> = (1..EVENTS - 1)
            .map(|n| json!({"message_id": id(n), "chat_id": id(chat), "agent_id": null, "sent_at": time(n * 10), "text": text(n)}))
            .collect();
        Some(Reply::json(200, &json!(messages)))
    }
}

impl Api for Both {
    fn answer(&mut self, request: &Request, others: usize) -> Reply {
        let now = Instant::now();
        if request.path == "/events" {
            self.polls += 1;
            if std::mem::take(&mut self.has_news) || self.polled.is_none() {
                self.polled = Some(now);
            }
            return self.bigchat.answer(request, others);
        }
        self.count += 1;
        self.first.get_or_insert(now);
        if let Some(made) = &mut self.made {
            made.push(request.clone());
        }
        if is_to_our_api(request) {
            self.sent.get_or_insert(now);
            self.last = Some(now);
            if let Some(reply) = self.chats_of.and_then(|start| self.chat(request, start)) {
                return reply;
            }
            if request.method != "GET" {
                self.written.get_or_insert(now);
            }
            return self.our_api.answer(request, others);
        }
        let conversation = request.path.strip_prefix("/conversations/");
        if let Some(id) = conversation.and_then(|id| id.parse().ok()) {
            self.bigchat.open(id, 0, 7);
        }
        self.bigchat.answer(request, others)
    }

    fn date(&self) -> DateTime<Utc> {
        Utc::now()
    }
}

/// The server, until it is dropped.
pub(crate) struct Server(simulator::Server<Both>);

impl Server {
    /// Starts the server. Each request takes at least `latency`.
    pub(crate) fn start(latency: Duration) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let server = runtime.expect("a runtime").block_on(async {
            let mut starting = Starting::new().expect("a thread");
            starting
                .listen(ANY_PORT, Both::new())
                .await
                .expect("a port")
        });
        server.record(false);
        server.set_latency(latency);
        Self(server)
    }

    fn both(&self) -> MutexGuard<'_, Both> {
        self.0.state()
    }

    pub(crate) fn url(&self) -> String {
        self.0.url()
    }

    /// Resets the counts and times, and records requests from now on if `record` is set.
    pub(crate) fn reset(&self, record: bool) {
        let mut both = self.both();
        let before = std::mem::replace(&mut *both, Both::new());
        (both.bigchat, both.our_api) = (before.bigchat, before.our_api);
        both.chats_of = before.chats_of;
        both.made = record.then(Vec::new);
    }

    /// The same with an empty OurAPI.
    pub(crate) fn restart(&self, record: bool) {
        *self.both() = Both {
            made: record.then(Vec::new),
            ..Both::new()
        };
    }

    /// The number of requests, except those to `/events`.
    pub(crate) fn count(&self) -> u64 {
        self.both().count
    }

    /// The time from the first request to the last request to OurAPI.
    pub(crate) fn took(&self) -> Duration {
        let both = self.both();
        both.last.expect("requests") - both.first.expect("requests")
    }

    /// When the first request to OurAPI arrived.
    pub(crate) fn sent(&self) -> Option<Instant> {
        self.both().sent
    }

    /// When the first request to OurAPI that changes something arrived.
    pub(crate) fn written(&self) -> Option<Instant> {
        self.both().written
    }

    /// Makes OurAPI have all chats of `large::add`, with this start.
    pub(crate) fn has_chats_of(&self, start: i64) {
        self.both().chats_of = Some(start);
    }

    /// How many of these chats were verified.
    pub(crate) fn verified(&self) -> u64 {
        self.both().verified
    }

    /// The time of the last poll that returned new events, or else of the first poll.
    pub(crate) fn polled(&self) -> Option<Instant> {
        self.both().polled
    }

    /// How many times BigChat was polled.
    pub(crate) fn polls(&self) -> u64 {
        self.both().polls
    }

    /// Makes BigChat report these events at the next poll.
    pub(crate) fn report(&self, events: &str) {
        let page = format!(r#"{{"events":[{events}],"nextPageUrl":null}}"#);
        let mut both = self.both();
        both.bigchat.push_page(raw(&page));
        both.has_news = true;
    }

    /// Takes the recorded requests, and returns how many of them went to OurAPI.
    pub(crate) fn made_to_our_api(&self) -> usize {
        let made = self.made();
        made.iter().filter(|made| is_to_our_api(made)).count()
    }

    /// Takes the recorded requests, in order.
    pub(crate) fn made(&self) -> Vec<Request> {
        self.both().made.take().unwrap_or_default()
    }
}
