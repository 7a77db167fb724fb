//! A simulated BigChat: conversations, advisors and events that random numbers make up, and that tests can script.
//!
//! In [`Mode::Once`] it behaves as the real one, which makes events up at each poll and tells each once; in [`Mode::Log`]
//! as a usual vendor, whose log gives the same events for the same window. Either way it remembers what it told whom, and
//! whether the answer went out, which is what the comparison works from. A poll, here, is a request for a first page and
//! those for later pages up to the next first one.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Extension, Router,
    extract::{Request, State},
    http::{HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::Response,
};
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use url::form_urlencoded;

use super::{
    faults::{Faults, inject},
    http::{Clock, KEEP_ALIVE, Refused, Server, Traffic, invalid, lock, parse_time, reply},
};

const FIRST_NAMES: [&str; 14] = [
    "Ann-Marie",
    "Dr. Olive",
    "Seán",
    "Zoë",
    "Mr Bernard",
    "J.",
    "D'Arcy",
    "Mary Jane",
    "Ali",
    "Ngozi",
    "Pat",
    "Xi",
    "Iñaki",
    "Miss Una",
];
const LAST_NAMES: [&str; 14] = [
    "O'Brien",
    "Smith-Jones",
    "St. John",
    "de la Cruz",
    "Murphy",
    "Ó Súilleabháin",
    "Li",
    "Njoroge",
    "Müller",
    "D'Souza",
    "Byrne Jr.",
    "Ng",
    "Walsh",
    "van 't Hoff",
];
const WORDS: [&str; 16] = [
    "dolor", "sit", "amet", "order", "parcel", "refund", "please", "late", "account", "quidem",
    "vero", "nihil", "invoice", "help", "eos", "when",
];
/// What a service that stores, strips, escapes or measures text may get wrong. The first ones are too short for OurAPI.
const AWKWARD: [&str; 14] = [
    "k",
    "😀",
    "",
    "   ",
    "\u{a0}x\u{a0}",
    "ok",
    "  ok",
    "ok  \n",
    "👍🏽 thanks",
    "<script>alert('hi')</script>",
    "O'Brien said \"no\"; DROP TABLE chats; --",
    "line one\nline two\r\n\tline three",
    "a\u{0}b \\u0000 \\",
    "ünïcödé שלום e\u{301}",
];

/// How events come about and are told.
#[derive(Clone, Debug)]
pub enum Mode {
    /// As the real one: events are made up when asked for, told once, and forgotten.
    Once,
    /// As usual elsewhere: a log that grows with the clock. A window includes its start and excludes its end; a page is a
    /// part of the window as the log is now, by `event_at` and then arrival, so that what is late shifts the pages.
    Log(Log),
}

/// The settings of [`Mode::Log`].
#[derive(Clone, Debug)]
pub struct Log {
    /// How fast the log grows.
    pub events_per_second: f64,
    /// Events per page.
    pub page_size: usize,
    /// One event in ten turns up late by up to so many seconds.
    pub max_late: u32,
    /// How far the log reaches back at the start.
    pub history: Duration,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            events_per_second: 1.0,
            page_size: 100,
            max_late: 2,
            history: Duration::ZERO,
        }
    }
}

/// The settings of a simulated BigChat.
#[derive(Clone, Debug)]
pub struct Options {
    /// The same seed makes the same choices.
    pub seed: u64,
    /// How events come about and are told.
    pub mode: Mode,
    /// Nothing happens by itself: no events, no errors, no second pages.
    pub quiet: bool,
    /// Some messages are short, padded, twins or otherwise awkward, and two advisors share a name.
    pub awkward: bool,
    /// So many of the latest conversations get events; the real one's all do.
    pub active: usize,
    /// How many seconds its clock is ahead of the machine's.
    pub clock_offset: i64,
    /// After which time it closes an idle connection.
    pub keep_alive: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            seed: 1,
            mode: Mode::Once,
            quiet: false,
            awkward: true,
            active: 30,
            clock_offset: 0,
            keep_alive: KEEP_ALIVE,
        }
    }
}

/// An advisor, as BigChat shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advisor {
    /// From 1, in each run.
    pub advisor_id: i64,
    /// Two may share it.
    pub name: String,
    /// The identity.
    pub email_address: String,
}

/// An event that was told, with what only BigChat knows about it.
#[derive(Clone, Debug)]
pub struct Told {
    /// Counts BigChat's restarts, from 1.
    pub run: u32,
    /// BigChat has restarted since, and knows nothing of this any more.
    pub over: bool,
    /// Which poll it was told in; 0 in a log, which tells everything in every poll.
    pub poll: u64,
    /// Which page.
    pub page: i64,
    /// Which request, counting all that BigChat ever got; 0 in a log.
    pub request: u64,
    /// The answer never went out, and will not again.
    pub lost: bool,
    /// As in the event.
    pub conversation_id: i64,
    /// As in the event.
    pub name: String,
    /// As in the event.
    pub event_at: i64,
    /// As in the event.
    pub data: Value,
    /// When the conversation really started.
    pub started_at: i64,
    /// Who had the conversation first, if BigChat knows.
    pub first_advisor: Option<Arc<Advisor>>,
    /// Who gets it, in a TRANSFER to somebody known.
    pub advisor: Option<Arc<Advisor>>,
}

impl Told {
    fn json(&self) -> Value {
        event(
            self.conversation_id,
            &self.name,
            self.event_at,
            self.data.clone(),
        )
    }
}

/// What a scripted page says about the next one.
#[derive(Clone, Debug, Default)]
pub enum NextPage {
    /// There is none.
    #[default]
    None,
    /// The usual address.
    Usual,
    /// This one, whatever it is.
    Url(String),
}

#[derive(Clone, Copy, Debug)]
struct RequestNumber(u64);

/// Marks the answer that tells events, as long as nothing has replaced it.
#[derive(Clone)]
struct Intact;

#[derive(Clone)]
enum Item {
    Told(usize),
    Raw(Value),
}

struct Conversation {
    started_at: i64,
    first_advisor: i64,
    events: Vec<usize>,
}

struct World {
    options: Options,
    clock: Clock,
    rng: StdRng,
    run: u32,
    first_of_run: usize,
    last_start: i64,
    /// The `date` header moves on once a second, at this part of it, as with the real one: it is up to a second behind.
    phase: i64,
    advisors: BTreeMap<i64, Arc<Advisor>>,
    addresses: HashSet<String>,
    conversations: BTreeMap<i64, Conversation>,
    told: Vec<Told>,
    arrived: Vec<bool>,
    /// What is told by requests under way.
    answering: HashMap<u64, Vec<usize>>,
    requests: u64,
    poll: u64,
    pushed: Vec<Value>,
    pages: VecDeque<(Vec<Value>, NextPage)>,
    /// The ENDs and TRANSFERs of the page before.
    repeatable: Vec<Value>,
    log: BTreeMap<(i64, usize), Item>,
    /// When the log grows next.
    next_arrival: f64,
    restart_at_poll: bool,
}

impl World {
    fn new(options: Options, clock: Clock) -> Self {
        let mut world = Self {
            rng: StdRng::seed_from_u64(options.seed),
            options,
            clock,
            run: 0,
            first_of_run: 0,
            last_start: 0,
            phase: 0,
            advisors: BTreeMap::new(),
            addresses: HashSet::new(),
            conversations: BTreeMap::new(),
            told: Vec::new(),
            arrived: Vec::new(),
            answering: HashMap::new(),
            requests: 0,
            poll: 0,
            pushed: Vec::new(),
            pages: VecDeque::new(),
            repeatable: Vec::new(),
            log: BTreeMap::new(),
            next_arrival: 0.0,
            restart_at_poll: false,
        };
        let history = match &world.options.mode {
            Mode::Log(log) => i64::try_from(log.history.as_secs()).unwrap_or(0),
            Mode::Once => 0,
        };
        let start = world.now() - history;
        world.boot(start);
        world
    }

    fn in_log(&self) -> bool {
        matches!(self.options.mode, Mode::Log(_))
    }

    fn now(&self) -> i64 {
        self.clock.now().timestamp()
    }

    /// Begins a run. Its first conversation starts later than any before, in whole seconds.
    fn boot(&mut self, at: i64) {
        self.run += 1;
        self.first_of_run = self.told.len();
        self.restart_at_poll = false;
        self.phase = self.rng.random_range(0..1000);
        self.conversations.clear();
        self.log.clear();
        self.repeatable.clear();
        self.advisors.clear();
        for advisor_id in 1..=10 {
            let shared = self.options.awkward && advisor_id == 7;
            let name = match self.advisors.get(&3) {
                Some(third) if shared => third.name.clone(),
                _ => self.person(),
            };
            let email_address = loop {
                let address = format!(
                    "{}@company.com",
                    self.person().replace(' ', "_").to_lowercase()
                );
                // Over several runs the names run out.
                let address = if self.addresses.len() < 100 {
                    address
                } else {
                    format!("{}.{address}", self.addresses.len())
                };
                if self.addresses.insert(address.clone()) {
                    break address;
                }
            };
            self.advisors.insert(
                advisor_id,
                Arc::new(Advisor {
                    advisor_id,
                    name,
                    email_address,
                }),
            );
        }
        let at = at.max(self.last_start + 1);
        self.last_start = at;
        self.open(1, at, 1);
        self.next_arrival = at as f64;
        if self.in_log() && !self.options.quiet {
            self.log_item(event(1, "START", at, Value::Null));
        }
    }

    fn person(&mut self) -> String {
        let (first, last) = (
            pick(&mut self.rng, &FIRST_NAMES),
            pick(&mut self.rng, &LAST_NAMES),
        );
        format!("{first} {last}")
    }

    fn open(&mut self, id: i64, started_at: i64, first_advisor: i64) {
        self.conversations.insert(
            id,
            Conversation {
                started_at,
                first_advisor,
                events: Vec::new(),
            },
        );
    }

    fn open_scripted(&mut self, id: i64, started_at: i64, first_advisor: i64) {
        // It may be any number; the next run's are to be later only than those that can be.
        self.last_start = self.last_start.max(started_at.min(self.now()));
        self.open(id, started_at, first_advisor);
    }

    /// Opens the next conversation, now.
    fn open_next(&mut self, now: i64) -> (i64, i64) {
        let id = self
            .conversations
            .last_key_value()
            .map_or(1, |(id, _)| id + 1);
        // Right after a restart this run may have begun a second from now.
        let now = self
            .conversations
            .get(&1)
            .map_or(now, |first| now.max(first.started_at));
        let advisor = self.rng.random_range(1..=10);
        self.last_start = self.last_start.max(now);
        self.open(id, now, advisor);
        (id, now)
    }

    fn tell(
        &mut self,
        (number, page): (u64, i64),
        conversation_id: i64,
        name: &str,
        event_at: i64,
        data: Value,
    ) -> usize {
        let now = self.now();
        if !self.conversations.contains_key(&conversation_id) {
            self.open_scripted(
                conversation_id,
                if name == "START" { event_at } else { now },
                1,
            );
        }
        let index = self.told.len();
        let (mut started_at, mut first) = (now, 1);
        if let Some(conversation) = self.conversations.get_mut(&conversation_id) {
            conversation.events.push(index);
            (started_at, first) = (conversation.started_at, conversation.first_advisor);
        }
        self.told.push(Told {
            run: self.run,
            over: false,
            poll: if self.in_log() { 0 } else { self.poll },
            page,
            request: number,
            lost: false,
            conversation_id,
            name: name.to_owned(),
            event_at,
            started_at,
            first_advisor: self.advisors.get(&first).cloned(),
            advisor: data["new_advisor_id"]
                .as_i64()
                .and_then(|id| self.advisors.get(&id).cloned()),
            data,
        });
        self.arrived.push(false);
        index
    }

    /// Tells a scripted event, or, where it is none, just serves it.
    fn item(&mut self, (number, page): (u64, i64), raw: Value) -> Item {
        let understood = (|| {
            Some((
                raw["conversation_id"].as_i64()?,
                raw["event_name"].as_str()?,
                raw["event_at"].as_i64()?,
            ))
        })();
        match understood {
            Some((id, name @ ("START" | "END" | "MESSAGE" | "TRANSFER"), at)) => {
                Item::Told(self.tell((number, page), id, name, at, raw["data"].clone()))
            }
            _ => Item::Raw(raw),
        }
    }

    fn log_item(&mut self, raw: Value) {
        let at = raw["event_at"].as_i64().unwrap_or_else(|| self.now());
        let item = self.item((0, 0), raw);
        let arrival = self.log.len();
        self.log.insert((at, arrival), item);
    }

    fn text(&mut self) -> String {
        if self.options.awkward && self.rng.random_bool(0.15) {
            return pick(&mut self.rng, &AWKWARD).to_owned();
        }
        let words: Vec<&str> = (0..self.rng.random_range(3..9))
            .map(|_| pick(&mut self.rng, &WORDS))
            .collect();
        format!("{}.", words.join(" "))
    }

    /// What happens to a conversation next, if anything.
    fn happening(&mut self, id: i64) -> Option<(&'static str, Value)> {
        if self.rng.random_bool(0.2) {
            Some(("END", Value::Null))
        } else if self.rng.random_bool(0.2) {
            let old = self
                .conversations
                .get(&id)
                .map_or(1, |conversation| conversation.first_advisor);
            Some((
                "TRANSFER",
                json!({ "old_advisor_id": old, "new_advisor_id": self.rng.random_range(1..=10) }),
            ))
        } else if self.rng.random_bool(0.7) {
            Some(("MESSAGE", json!({ "message": self.text() })))
        } else {
            None
        }
    }

    fn active(&self) -> Vec<i64> {
        self.conversations
            .keys()
            .rev()
            .take(self.options.active)
            .rev()
            .copied()
            .collect()
    }

    /// A page as the real one makes it up.
    fn make_up(&mut self, start_at: i64, page: i64) -> Vec<Value> {
        let now = self.now();
        let mut events = Vec::new();
        for id in self.active() {
            let Some((name, data)) = self.happening(id) else {
                continue;
            };
            // A window of a second or less, and one that begins in the future, has but one time.
            let at = if now - start_at <= 1 {
                start_at
            } else {
                self.rng.random_range(start_at..=now)
            };
            let twin = name == "MESSAGE" && self.options.awkward && self.rng.random_bool(0.03);
            events.extend(std::iter::repeat_n(
                event(id, name, at, data),
                1 + usize::from(twin),
            ));
        }
        if page > 0 && self.rng.random_bool(0.4) {
            events.extend(self.repeatable.choose(&mut self.rng).cloned());
        }
        if self.rng.random_bool(0.5) {
            let (id, at) = self.open_next(now);
            events.push(event(id, "START", at, Value::Null));
        }
        let repeatable =
            |event: &&Value| event["event_name"] == "END" || event["event_name"] == "TRANSFER";
        self.repeatable = events.iter().filter(repeatable).cloned().collect();
        events
    }

    /// A page of [`Mode::Once`]; `None` is an error that loses it.
    fn once(&mut self, start_at: i64, page: i64) -> Option<(Vec<Value>, NextPage)> {
        if let Some(scripted) = self.pages.pop_front() {
            return Some(scripted);
        }
        let random = !self.options.quiet;
        if random && self.rng.random_bool(0.05) {
            return None;
        }
        let mut events = std::mem::take(&mut self.pushed);
        if random {
            events.extend(self.make_up(start_at, page));
        }
        let more = random && page < 1 && !events.is_empty() && self.rng.random_bool(0.2);
        Some((
            events,
            if more {
                NextPage::Usual
            } else {
                NextPage::None
            },
        ))
    }

    /// Lets the log of [`Mode::Log`] grow up to now.
    fn grow(&mut self) {
        let Mode::Log(Log {
            events_per_second: rate,
            max_late,
            ..
        }) = self.options.mode
        else {
            return;
        };
        let now = self.clock.now().timestamp_millis() as f64 / 1000.0;
        if self.options.quiet || rate <= 0.0 {
            self.next_arrival = self.next_arrival.max(now);
            return;
        }
        while self.next_arrival <= now {
            let arrival = self.next_arrival as i64;
            self.next_arrival += 1.0 / rate;
            let late = if self.rng.random_bool(0.1) {
                i64::from(self.rng.random_range(0..=max_late))
            } else {
                0
            };
            if self.rng.random_bool(0.1) {
                let (id, at) = self.open_next(arrival);
                self.log_item(event(id, "START", at, Value::Null));
                continue;
            }
            let active = self.active();
            let id = active.choose(&mut self.rng).copied().unwrap_or(1);
            if let Some((name, data)) = self.happening(id) {
                let twin = name == "MESSAGE" && self.options.awkward && self.rng.random_bool(0.05);
                for _ in 0..=usize::from(twin) {
                    self.log_item(event(id, name, arrival - late, data.clone()));
                }
            }
        }
    }

    fn events(&mut self, request: &Request, number: u64) -> Result<Response, Refused> {
        let query = request.uri().query().unwrap_or_default();
        // Of several the last counts.
        let given = |name: &str| {
            let values = form_urlencoded::parse(query.as_bytes()).filter(|(key, _)| key == name);
            values.last().map(|(_, value)| value.into_owned())
        };
        let time = |name: &str| {
            let Some(text) = given(name) else {
                return Ok(None);
            };
            let message = "Input should be a valid datetime or date";
            let (time, offset) = parse_time(&text).ok_or_else(|| {
                Refused::invalid(vec![invalid(
                    "datetime_from_date_parsing",
                    ["query", name],
                    message,
                    &text.into(),
                )])
            })?;
            Ok(Some(time.and_utc().timestamp() - i64::from(offset)))
        };
        let (start_at, end_at) = (time("start_at")?, time("end_at")?);
        let page = given("page").map_or(Ok(0), |text| integer(["query", "page"], &text))?;
        if page <= 0 {
            self.poll += 1;
            if self.restart_at_poll {
                self.restart();
            }
        }
        let start_at = start_at.ok_or_else(Refused::unhandled)?;
        let (items, next): (Vec<Item>, _) =
            if let Mode::Log(Log { page_size, .. }) = self.options.mode {
                self.grow();
                let skip = usize::try_from(page).unwrap_or(0).saturating_mul(page_size);
                let end_at = end_at.unwrap_or(i64::MAX).max(start_at);
                let mut window = self
                    .log
                    .range((start_at, 0)..(end_at, 0))
                    .skip(skip)
                    .map(|(_, item)| item.clone());
                let items = window.by_ref().take(page_size).collect();
                (
                    items,
                    if window.next().is_some() {
                        NextPage::Usual
                    } else {
                        NextPage::None
                    },
                )
            } else {
                let (events, next) = self.once(start_at, page).ok_or_else(Refused::unhandled)?;
                (
                    events
                        .into_iter()
                        .map(|raw| self.item((number, page), raw))
                        .collect(),
                    next,
                )
            };
        let told = |item: &Item| {
            if let Item::Told(index) = item {
                Some(*index)
            } else {
                None
            }
        };
        self.answering
            .insert(number, items.iter().filter_map(told).collect());
        let show = |item| match item {
            Item::Told(index) => self.told[index].json(),
            Item::Raw(raw) => raw,
        };
        let events: Vec<Value> = items.into_iter().map(show).collect();
        let next = match next {
            NextPage::None => None,
            NextPage::Url(url) => Some(url),
            NextPage::Usual => {
                let host = request
                    .headers()
                    .get(header::HOST)
                    .and_then(|host| host.to_str().ok());
                // The real one appends, even where there is a `page` already.
                let kept = query
                    .split('&')
                    .filter(|part| !self.in_log() || !part.starts_with("page="));
                let (kept, page) = (kept.collect::<Vec<_>>().join("&"), page + 1);
                Some(format!(
                    "http://{}{}?{kept}&page={page}",
                    host.unwrap_or_default(),
                    request.uri().path()
                ))
            }
        };
        let mut response = reply(
            StatusCode::OK,
            &json!({ "nextPageUrl": next, "events": events }),
        );
        response.extensions_mut().insert(Intact);
        Ok(response)
    }

    fn conversation(&mut self, id: i64) -> Result<Response, Refused> {
        self.grow();
        let conversation = self
            .conversations
            .get(&id)
            .ok_or_else(|| Refused::not_found("Conversation not found"))?;
        let (mut events, mut advisor) = (
            vec![event(id, "START", conversation.started_at, Value::Null)],
            conversation.first_advisor,
        );
        if self.in_log() {
            let told = conversation.events.iter().map(|index| &self.told[*index]);
            events.extend(
                told.clone()
                    .filter(|told| told.name != "START")
                    .map(Told::json),
            );
            let transfers = told
                .filter_map(|told| Some((told.event_at, told.data["new_advisor_id"].as_i64()?)));
            // The last of equals, as they arrived.
            advisor = transfers
                .max_by_key(|(at, _)| *at)
                .map_or(advisor, |(_, advisor)| advisor);
        }
        Ok(reply(
            StatusCode::OK,
            &json!({ "events": events, "conversation_id": id, "advisor_id": advisor }),
        ))
    }

    fn advisor(&self, id: i64) -> Result<Response, Refused> {
        let advisor = self
            .advisors
            .get(&id)
            .ok_or_else(|| Refused::not_found("Advisor not found"))?;
        Ok(reply(StatusCode::OK, advisor.as_ref()))
    }

    fn restart(&mut self) {
        self.grow();
        let in_log = self.in_log();
        for (told, arrived) in self.told[self.first_of_run..]
            .iter_mut()
            .zip(&self.arrived[self.first_of_run..])
        {
            told.over = true;
            told.lost |= in_log && !arrived;
        }
        let now = self.now();
        self.boot(now);
    }
}

fn pick(rng: &mut StdRng, choices: &[&'static str]) -> &'static str {
    choices.choose(rng).copied().unwrap_or_default()
}

/// A running simulated BigChat; stops when it is dropped.
pub struct BigChat {
    /// What goes wrong.
    pub faults: Faults,
    /// What it was asked.
    pub traffic: Traffic,
    /// Its own clock.
    pub clock: Clock,
    world: Arc<Mutex<World>>,
    server: Server,
}

impl BigChat {
    /// Starts it; port 0 takes a free one.
    pub async fn start(address: SocketAddr, options: Options) -> io::Result<Self> {
        let (clock, traffic, keep_alive) = (
            Clock::ahead(options.clock_offset),
            Traffic::default(),
            options.keep_alive,
        );
        let faults = Faults::new(options.seed, clock.clone());
        let world = Arc::new(Mutex::new(World::new(options, clock.clone())));
        let router = Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&world))
            .layer(middleware::from_fn_with_state(faults.clone(), inject))
            .layer(middleware::from_fn_with_state(Arc::clone(&world), envelope));
        let server = Server::start(address, router, &traffic, keep_alive).await?;
        Ok(Self {
            faults,
            traffic,
            clock,
            world,
            server,
        })
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        format!("http://{}", self.server.address)
    }

    /// Stops it, and waits until it has.
    pub async fn shutdown(self) -> io::Result<()> {
        self.server.shutdown().await
    }

    /// Everything told so far, in order of telling; of a log, everything in it.
    pub fn told(&self) -> Vec<Told> {
        let mut world = lock(&self.world);
        world.grow();
        let in_log = world.in_log();
        let with_fate = |(told, arrived): (&Told, &bool)| Told {
            lost: told.lost || (!in_log && !arrived),
            ..told.clone()
        };
        world
            .told
            .iter()
            .zip(&world.arrived)
            .map(with_fate)
            .collect()
    }

    /// An event of a test's own: told on the next page, or put in the log. A conversation not known yet starts with it.
    pub fn push(&self, conversation_id: i64, name: &str, event_at: i64, data: Value) {
        self.push_raw(event(conversation_id, name, event_at, data));
    }

    /// The same with anything for an event, understood or not.
    pub fn push_raw(&self, event: Value) {
        let mut world = lock(&self.world);
        if world.in_log() {
            world.log_item(event)
        } else {
            world.pushed.push(event)
        }
    }

    /// A whole page: in [`Mode::Once`] exactly what the next request gets, in [`Mode::Log`] put in the log.
    pub fn push_page(&self, events: Vec<Value>, next: NextPage) {
        let mut world = lock(&self.world);
        if world.in_log() {
            events.into_iter().for_each(|event| world.log_item(event));
        } else {
            world.pages.push_back((events, next));
        }
    }

    /// Nothing, or again something, happens by itself from now on.
    pub fn set_quiet(&self, quiet: bool) {
        let mut world = lock(&self.world);
        world.grow();
        world.options.quiet = quiet;
    }

    /// Makes somebody else of an advisor.
    pub fn set_advisor(&self, advisor_id: i64, name: &str, email_address: &str) {
        let advisor = Advisor {
            advisor_id,
            name: name.to_owned(),
            email_address: email_address.to_owned(),
        };
        lock(&self.world)
            .advisors
            .insert(advisor_id, Arc::new(advisor));
    }

    /// An advisor of the current run.
    pub fn advisor(&self, advisor_id: i64) -> Option<Arc<Advisor>> {
        lock(&self.world).advisors.get(&advisor_id).cloned()
    }

    /// Opens a conversation of which nothing has been told.
    pub fn open(&self, conversation_id: i64, started_at: i64, first_advisor: i64) {
        lock(&self.world).open_scripted(conversation_id, started_at, first_advisor);
    }

    /// Restarts at once: everything is forgotten, and ids begin at 1 again, for others. What is scripted and not told yet
    /// is told by the next run; in a log it is forgotten, too.
    pub fn restart(&self) {
        lock(&self.world).restart();
    }

    /// Restarts just before the next poll's first page, so that no poll is half of one run and half of the next.
    pub fn restart_at_next_poll(&self) {
        lock(&self.world).restart_at_poll = true;
    }

    /// The current run, from 1.
    pub fn run(&self) -> u32 {
        lock(&self.world).run
    }

    /// The number of the latest request, as in [`Told::request`].
    pub fn requests(&self) -> u64 {
        lock(&self.world).requests
    }
}

async fn answer(
    State(world): State<Arc<Mutex<World>>>,
    Extension(RequestNumber(number)): Extension<RequestNumber>,
    request: Request,
) -> Result<Response, Refused> {
    let mut world = lock(&world);
    let parts: Vec<&str> = request.uri().path().split('/').skip(1).collect();
    match (request.method(), parts.as_slice()) {
        (&Method::GET, ["events"]) => world.events(&request, number),
        (&Method::GET, ["conversations", id]) => {
            world.conversation(integer(["path", "conversation_id"], id)?)
        }
        (&Method::GET, ["advisors", id]) => world.advisor(integer(["path", "advisor_id"], id)?),
        (_, ["events"] | ["conversations" | "advisors", _]) => Err(Refused::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "Method Not Allowed",
        )),
        _ => Err(Refused::not_found("Not Found")),
    }
}

fn integer(place: [&str; 2], text: &str) -> Result<i64, Refused> {
    let message = "Input should be a valid integer, unable to parse string as an integer";
    text.parse()
        .map_err(|_| Refused::invalid(vec![invalid("int_parsing", place, message, &text.into())]))
}

fn event(id: i64, name: &str, at: i64, data: Value) -> Value {
    json!({ "conversation_id": id, "event_name": name, "event_at": at, "data": data })
}

/// Numbers the request, dates the answer, and notes whether what it tells went out.
async fn envelope(
    State(world): State<Arc<Mutex<World>>>,
    mut request: Request,
    next: Next,
) -> Response {
    let number = {
        let mut world = lock(&world);
        world.requests += 1;
        world.requests
    };
    request.extensions_mut().insert(RequestNumber(number));
    let mut response = next.run(request).await;
    let mut world = lock(&world);
    let told = world.answering.remove(&number).unwrap_or_default();
    if response.extensions().get::<Intact>().is_some() {
        told.into_iter()
            .for_each(|index| world.arrived[index] = true);
    }
    let phase = if world.in_log() { 0 } else { world.phase };
    let date = world.clock.now() - chrono::TimeDelta::milliseconds(phase);
    if let Ok(date) = HeaderValue::from_str(&httpdate::fmt_http_date(date.into())) {
        response.headers_mut().insert(header::DATE, date);
    }
    response
}
