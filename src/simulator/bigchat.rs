//! BigChat: conversations, advisors and events, scripted or random.
//!
//! [`Mode::Once`] behaves like the real BigChat, which makes up events at each poll and reports each once.
//! [`Mode::Log`] behaves like the APIs of most vendors: a log gives the same events for the same window. In both modes,
//! BigChat records what it reported and whether the response was sent; the comparison uses that record. Random behavior
//! is in `chance`.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::event::{T0, event_at, is_known};
use super::exchange::{Api, Reply, Request, invalid, parse_time};
use super::watch::Happening;

/// How events arise and are reported.
#[derive(Clone, Debug)]
pub enum Mode {
    /// Like the real BigChat: events are made up on request, reported once, and forgotten.
    Once,
    /// Like most vendors: a log that grows with the clock. A window includes its start and excludes its end. Pages are
    /// parts of the window's current events, ordered by `event_at` and then by arrival, so that late events shift the
    /// pages.
    Log(Log),
}

/// The settings of [`Mode::Log`].
#[derive(Clone, Debug)]
pub struct Log {
    pub events_per_second: f64,
    /// Events per page.
    pub page_size: usize,
    /// One event in ten arrives late, by up to this many seconds.
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

/// BigChat's own clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// This machine's clock, plus this many seconds.
    Ahead(i64),
    /// A stopped clock, at this many seconds after [`T0`].
    Still(i64),
}

impl Clock {
    fn now(self) -> DateTime<Utc> {
        match self {
            Self::Ahead(seconds) => Utc::now() + TimeDelta::seconds(seconds),
            Self::Still(seconds) => DateTime::from_timestamp(T0 + seconds, 0).unwrap_or_default(),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Options {
    /// The same seed makes the same choices.
    pub seed: u64,
    pub mode: Mode,
    /// Nothing random happens: no events, no errors, no second pages.
    pub quiet: bool,
    /// Some messages are short, padded, twins or otherwise awkward, and two advisors share a name.
    pub awkward: bool,
    /// Advisors' e-mail addresses are made from their own names. The real BigChat makes them from other names.
    pub own_addresses: bool,
    /// Only this many of the latest conversations get events. In the real BigChat, all do.
    pub active: usize,
    pub clock: Clock,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            seed: 1,
            mode: Mode::Once,
            quiet: false,
            awkward: true,
            own_addresses: false,
            active: 30,
            clock: Clock::Ahead(0),
        }
    }
}

/// An advisor, as BigChat returns it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advisor {
    /// From 1, in each epoch.
    pub advisor_id: i64,
    /// Not unique.
    pub name: String,
    /// The address identifies the advisor.
    pub email_address: String,
}

/// An event that was reported, with what only BigChat knows about it.
#[derive(Clone, Debug)]
pub struct Reported {
    /// BigChat's epoch, from 1.
    pub epoch: u32,
    /// Whether BigChat no longer knows its conversation, or never did.
    pub forgotten: bool,
    /// Which poll reported it; 0 in a log, which reports everything in every poll.
    pub poll: u64,
    /// Whether the response was not sent and never will be.
    pub lost: bool,
    pub conversation_id: i64,
    pub name: String,
    pub event_at: i64,
    pub data: Value,
    /// When the conversation really started, if BigChat knows.
    pub started_at: Option<i64>,
    /// The conversation's first advisor, if BigChat knows.
    pub first_advisor: Option<Arc<Advisor>>,
    /// The new advisor of a TRANSFER, if BigChat knows the advisor.
    pub advisor: Option<Arc<Advisor>>,
}

impl Reported {
    /// The event, as BigChat returns it.
    pub fn json(&self) -> Value {
        event_at(
            self.conversation_id,
            &self.name,
            self.event_at,
            self.data.clone(),
        )
    }
}

/// The link of a scripted page to the next one.
#[derive(Clone, Debug)]
pub enum NextPage {
    None,
    /// The usual link.
    Usual,
    /// A link to the page itself: A, A, …
    Same,
    /// A link to the poll's first page: A, B, A, B, …
    First,
    /// This value.
    Is(Value),
}

/// The response to one request for events.
#[derive(Clone, Debug)]
pub enum Page {
    Events(Vec<Value>, NextPage),
    /// A body as given, whether or not it is a page.
    Raw(String),
}

impl<E: IntoIterator<Item = Value>> From<E> for Page {
    fn from(events: E) -> Self {
        Self::Events(events.into_iter().collect(), NextPage::None)
    }
}

/// A page with a given link to the next one.
pub fn page(events: impl IntoIterator<Item = Value>, next: impl Into<Value>) -> Page {
    Page::Events(events.into_iter().collect(), NextPage::Is(next.into()))
}

/// A body that may not be a page.
pub fn raw(body: &str) -> Page {
    Page::Raw(body.to_owned())
}

/// The maximum size of a raw body whose events are recorded.
const MAX_PARSED: usize = 1 << 20;

#[derive(Clone, Debug)]
enum Item {
    Event(usize),
    Raw(Value),
}

#[derive(Clone, Debug)]
pub(super) struct Conversation {
    pub(super) started_at: i64,
    pub(super) first_advisor: i64,
    /// Its events in the log.
    events: Vec<usize>,
}

/// BigChat as a plain value, without a network.
#[derive(Clone, Debug)]
pub struct BigChat {
    pub(super) options: Options,
    pub(super) rng: Xoshiro256PlusPlus,
    epoch: u32,
    first_of_epoch: usize,
    pub(super) last_start: i64,
    /// Milliseconds by which the `date` header is behind the clock: up to a second, as with the real BigChat.
    phase: i64,
    /// A value to send instead of the date.
    date: Option<String>,
    advisors: BTreeMap<i64, Arc<Advisor>>,
    pub(super) addresses: HashSet<String>,
    pub(super) conversations: BTreeMap<i64, Conversation>,
    reported: Vec<Reported>,
    arrived: Vec<bool>,
    poll: u64,
    pushed: Vec<Value>,
    pages: VecDeque<Page>,
    /// The ENDs and TRANSFERs of the previous page.
    pub(super) repeatable: Vec<Value>,
    log: BTreeMap<(i64, usize), Item>,
    /// When the log grows next.
    pub(super) next_arrival: f64,
    restart_at_poll: bool,
    /// Whether BigChat is down, so that nothing happens.
    pub(super) down: bool,
    circles: f64,
    /// Events of the latest response that were never reported before.
    latest: Vec<usize>,
    /// The number of reported events after each request for events.
    reported_by: Vec<usize>,
}

impl BigChat {
    pub fn new(options: Options) -> Self {
        let history = match &options.mode {
            Mode::Log(log) => i64::try_from(log.history.as_secs()).unwrap_or(0),
            Mode::Once => 0,
        };
        let start = options.clock.now().timestamp() - history;
        let mut bigchat = Self {
            rng: Xoshiro256PlusPlus::seed_from_u64(options.seed),
            options,
            epoch: 0,
            first_of_epoch: 0,
            last_start: 0,
            phase: 0,
            date: None,
            advisors: BTreeMap::new(),
            addresses: HashSet::new(),
            conversations: BTreeMap::new(),
            reported: Vec::new(),
            arrived: Vec::new(),
            poll: 0,
            pushed: Vec::new(),
            pages: VecDeque::new(),
            repeatable: Vec::new(),
            log: BTreeMap::new(),
            next_arrival: 0.0,
            restart_at_poll: false,
            down: false,
            circles: 0.0,
            latest: Vec::new(),
            reported_by: Vec::new(),
        };
        bigchat.boot(start);
        bigchat
    }

    pub(super) fn in_log(&self) -> bool {
        matches!(self.options.mode, Mode::Log(_))
    }

    pub(super) fn unix_now(&self) -> i64 {
        self.options.clock.now().timestamp()
    }

    /// BigChat's time, in seconds after [`T0`].
    pub fn now(&self) -> i64 {
        self.unix_now() - T0
    }

    pub(super) fn now_in_seconds(&self) -> f64 {
        self.options.clock.now().timestamp_millis() as f64 / 1000.0
    }

    pub fn set_clock(&mut self, clock: Clock) {
        self.options.clock = clock;
    }

    /// Sends this value instead of the date from now on.
    pub fn set_date(&mut self, date: Option<&str>) {
        self.date = date.map(str::to_owned);
    }

    /// Turns random behavior off or on.
    pub fn set_quiet(&mut self, quiet: bool) {
        self.grow();
        self.options.quiet = quiet;
    }

    /// Turns awkward messages on or off.
    pub fn set_awkward(&mut self, awkward: bool) {
        self.options.awkward = awkward;
    }

    /// Takes BigChat down, or brings it up again. While it is down, nothing happens.
    pub fn set_down(&mut self, down: bool) {
        self.grow();
        self.down = down;
    }

    /// Sets how often (0 to 1) the last page of a poll links to itself or to the first page.
    pub fn set_circles(&mut self, probability: f64) {
        self.circles = probability;
    }

    /// The current epoch, from 1.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// How many polls there were, in either mode. A poll is a request for a first page, with the requests for later
    /// pages up to the next first one.
    pub fn polls(&self) -> u64 {
        self.poll
    }

    /// Adds a conversation without events; `started_at` in seconds after [`T0`].
    pub fn open(&mut self, id: i64, started_at: i64, first_advisor: i64) {
        let started_at = T0.saturating_add(started_at);
        // The start may be arbitrary. One in the future does not delay the start of the next epoch.
        self.last_start = self.last_start.max(started_at.min(self.unix_now()));
        self.insert_conversation(id, started_at, first_advisor);
    }

    pub(super) fn insert_conversation(&mut self, id: i64, started_at: i64, first_advisor: i64) {
        let conversation = Conversation {
            started_at,
            first_advisor,
            events: Vec::new(),
        };
        self.conversations.insert(id, conversation);
    }

    pub fn forget_conversation(&mut self, id: i64) {
        self.conversations.remove(&id);
    }

    /// An advisor of the current epoch.
    pub fn advisor(&self, id: i64) -> Option<Arc<Advisor>> {
        self.advisors.get(&id).cloned()
    }

    /// Adds an advisor, or changes the name and address.
    pub fn set_advisor(&mut self, advisor_id: i64, name: &str, email_address: &str) {
        let advisor = Advisor {
            advisor_id,
            name: name.to_owned(),
            email_address: email_address.to_owned(),
        };
        self.advisors.insert(advisor_id, Arc::new(advisor));
    }

    pub fn forget_advisor(&mut self, id: i64) {
        self.advisors.remove(&id);
    }

    /// Adds an event to the next page or to the log.
    pub fn push(&mut self, event: Value) {
        if self.in_log() {
            self.log_item(event);
        } else {
            self.pushed.push(event);
        }
    }

    /// Adds a complete page: in [`Mode::Once`] the exact response to the next request, in [`Mode::Log`] events of the
    /// log.
    pub fn push_page(&mut self, page: impl Into<Page>) {
        match page.into() {
            Page::Events(events, _) if self.in_log() => {
                events.into_iter().for_each(|event| self.log_item(event));
            }
            page => self.pages.push_back(page),
        }
    }

    /// Restarts at once: everything is forgotten, and ids begin at 1 again, for other conversations and advisors.
    /// Scripted events not reported yet belong to the next epoch; in a log they are forgotten, too.
    pub fn restart(&mut self) {
        self.restart_at(self.now());
    }

    /// Restarts. The first conversation of the new epoch starts at `at`, or a second after the latest start so far if
    /// that is later.
    pub fn restart_at(&mut self, at: i64) {
        self.grow();
        let in_log = self.in_log();
        let of_epoch = self.first_of_epoch..;
        let arrived = &self.arrived[of_epoch.clone()];
        for (reported, arrived) in self.reported[of_epoch].iter_mut().zip(arrived) {
            reported.lost |= in_log && !arrived;
        }
        self.boot(T0 + at);
    }

    /// The latest start of a conversation so far, in seconds after [`T0`].
    pub fn latest_start(&self) -> i64 {
        self.last_start - T0
    }

    /// Restarts just before the next poll's first page, so that no poll spans two epochs.
    pub fn restart_at_next_poll(&mut self) {
        self.restart_at_poll = true;
    }

    /// Begins an epoch. Its first conversation starts later than any before, in whole seconds.
    fn boot(&mut self, at: i64) {
        self.epoch += 1;
        self.first_of_epoch = self.reported.len();
        self.restart_at_poll = false;
        self.phase = self.rng.random_range(0..1000);
        self.conversations.clear();
        self.log.clear();
        self.repeatable.clear();
        self.advisors.clear();
        for id in 1..=10 {
            let (mut name, mut address) = self.make_up_advisor();
            if self.options.awkward && id == 7 {
                let namesake = &self.advisors[&3];
                name.clone_from(&namesake.name);
                if self.options.own_addresses {
                    address = format!("{id}.{}", namesake.email_address);
                }
            }
            self.set_advisor(id, &name, &address);
        }
        let at = at.max(self.last_start + 1);
        self.last_start = at;
        self.insert_conversation(1, at, 1);
        self.next_arrival = at as f64;
        if self.in_log() && !self.options.quiet {
            self.log_item(event_at(1, "START", at, Value::Null));
        }
    }

    /// All events reported so far, in order. With a log, all its events.
    pub fn reported(&mut self) -> Vec<Reported> {
        self.grow();
        let in_log = self.in_log();
        let with_fate = |(reported, arrived): (&Reported, &bool)| Reported {
            lost: reported.lost || (!in_log && !arrived),
            forgotten: reported.epoch < self.epoch
                || !self.conversations.contains_key(&reported.conversation_id),
            ..reported.clone()
        };
        self.reported
            .iter()
            .zip(&self.arrived)
            .map(with_fate)
            .collect()
    }

    /// The number of events in [`Self::reported`] after each request for events, the first request first.
    pub fn reported_by(&self) -> &[usize] {
        &self.reported_by
    }

    /// Events of the latest response that had no equal before. A client can have them only from that response.
    pub fn latest(&self) -> Vec<Reported> {
        let key = |index: &usize| {
            let reported = &self.reported[*index];
            (
                reported.conversation_id,
                &reported.name,
                reported.event_at,
                &reported.data,
            )
        };
        let is_new = |new: &&usize| {
            let mut before = (0..self.reported.len()).filter(|index| !self.latest.contains(index));
            !before.any(|index| self.arrived[index] && key(&index) == key(new))
        };
        let new = self.latest.iter().filter(is_new);
        new.map(|index| self.reported[*index].clone()).collect()
    }

    /// Records that the client was killed before it stored the latest response. A log that still exists will report its
    /// events again; otherwise they are lost. Returns how many new events the response had.
    pub fn lose_latest(&mut self) -> usize {
        let latest = std::mem::take(&mut self.latest);
        for index in &latest {
            self.arrived[*index] = false;
            // A log reports them again, if it still exists.
            let reported = &mut self.reported[*index];
            reported.lost |= reported.epoch < self.epoch;
        }
        latest.len()
    }

    /// Whether an event of a conversation with this time and data was reported.
    pub(super) fn has_reported(&self, id: i64, at: i64, data: &Value) -> bool {
        let conversation = self.conversations.get(&id);
        let mut events = conversation.into_iter().flat_map(|known| &known.events);
        events.any(|index| {
            let reported = &self.reported[*index];
            reported.event_at == at && reported.data == *data
        })
    }

    fn report(&mut self, conversation_id: i64, name: &str, event_at: i64, data: Value) -> usize {
        let index = self.reported.len();
        let conversation = self.conversations.get_mut(&conversation_id);
        let conversation = conversation.map(|conversation| {
            conversation.events.push(index);
            (conversation.started_at, conversation.first_advisor)
        });
        let advisor = |id: Option<i64>| self.advisors.get(&id?).cloned();
        self.reported.push(Reported {
            epoch: self.epoch,
            forgotten: false,
            poll: if self.in_log() { 0 } else { self.poll },
            lost: false,
            conversation_id,
            name: name.to_owned(),
            event_at,
            started_at: conversation.map(|(started_at, _)| started_at),
            first_advisor: advisor(conversation.map(|(_, first)| first)),
            advisor: advisor(data["new_advisor_id"].as_i64()),
            data,
        });
        self.arrived.push(false);
        index
    }

    /// Records a scripted event as reported. Anything that is not an event is served but not recorded.
    fn item(&mut self, raw: Value) -> Item {
        let id = raw["conversation_id"].as_i64();
        match (id, raw["event_name"].as_str(), raw["event_at"].as_i64()) {
            (Some(id), Some(name), Some(at)) if is_known(name) => {
                Item::Event(self.report(id, name, at, raw["data"].clone()))
            }
            _ => Item::Raw(raw),
        }
    }

    pub(super) fn log_item(&mut self, raw: Value) {
        let at = raw["event_at"].as_i64().unwrap_or_else(|| self.unix_now());
        let item = self.item(raw);
        let arrival = self.log.len();
        self.log.insert((at, arrival), item);
    }

    /// The response to a request for a page; `None`: an error that loses the page.
    fn page(
        &mut self,
        window: (Option<i64>, Option<i64>),
        number: i64,
    ) -> Option<(Page, Vec<usize>)> {
        if number <= 0 {
            self.poll += 1;
            if self.restart_at_poll {
                self.restart();
            }
        }
        self.latest.clear();
        let (items, mut next) = if let Mode::Log(Log { page_size, .. }) = self.options.mode {
            self.grow();
            let start_at = window.0?;
            let end_at = window.1.unwrap_or(i64::MAX).max(start_at);
            let window = self.log.range((start_at, 0)..(end_at, 0));
            let window: Vec<&Item> = window.map(|(_, item)| item).collect();
            let number = usize::try_from(number).unwrap_or(0);
            let [from, to] =
                [number, number.saturating_add(1)].map(|page| self.edge(&window, page, page_size));
            let more = to < window.len();
            (
                window[from..to]
                    .iter()
                    .copied()
                    .cloned()
                    .collect::<Vec<Item>>(),
                if more {
                    NextPage::Usual
                } else {
                    NextPage::None
                },
            )
        } else {
            match self.pages.pop_front() {
                Some(Page::Raw(body)) => {
                    let parsed = (body.len() <= MAX_PARSED).then(|| serde_json::from_str(&body));
                    let mut parsed: Value = parsed.and_then(Result::ok).unwrap_or_default();
                    let events = parsed["events"].as_array_mut().map(std::mem::take);
                    let items = events.into_iter().flatten().map(|raw| self.item(raw));
                    let events = items.filter_map(|item| match item {
                        Item::Event(index) => Some(index),
                        Item::Raw(_) => None,
                    });
                    return Some((Page::Raw(body), events.collect()));
                }
                Some(Page::Events(events, next)) => {
                    (events.into_iter().map(|raw| self.item(raw)).collect(), next)
                }
                None => {
                    let start_at = window.0?;
                    let mut events = std::mem::take(&mut self.pushed);
                    let more =
                        !self.options.quiet && self.make_up(start_at, number, &mut events)?;
                    let items = events.into_iter().map(|raw| self.item(raw)).collect();
                    (
                        items,
                        if more {
                            NextPage::Usual
                        } else {
                            NextPage::None
                        },
                    )
                }
            }
        };
        if matches!(next, NextPage::None)
            && self.circles > 0.0
            && self.rng.random_bool(self.circles)
        {
            next = if number > 0 && self.rng.random() {
                NextPage::First
            } else {
                NextPage::Same
            };
        }
        let mut reported = Vec::new();
        let show = |item| match item {
            Item::Event(index) => {
                reported.push(index);
                self.reported[index].json()
            }
            Item::Raw(raw) => raw,
        };
        let events = items.into_iter().map(show).collect::<Vec<Value>>();
        Some((Page::Events(events, next), reported))
    }

    /// The index at which a page of the log begins. It is never between two equal events, because there a client cannot
    /// distinguish twins from pages that have shifted.
    fn edge(&self, window: &[&Item], page: usize, page_size: usize) -> usize {
        let json = |at: usize| match window[at] {
            Item::Event(index) => self.reported[*index].json(),
            Item::Raw(raw) => raw.clone(),
        };
        let mut edge = page.saturating_mul(page_size).min(window.len());
        while 0 < edge && edge < window.len() && json(edge) == json(edge - 1) {
            edge += 1;
        }
        edge
    }

    fn events(&mut self, request: &Request) -> Result<Reply, Reply> {
        let time = |name: &str| {
            let Some(text) = request.parameter(name) else {
                return Ok(None);
            };
            let message = "Input should be a valid datetime or date";
            let (time, offset) = parse_time(&text).ok_or_else(|| {
                let place = ["query", name];
                let error = invalid("datetime_from_date_parsing", place, message, &text.into());
                Reply::detail(422, vec![error])
            })?;
            Ok(Some(time.and_utc().timestamp() - i64::from(offset)))
        };
        let window = (time("start_at")?, time("end_at")?);
        let number = request.parameter("page");
        let number = number.map_or(Ok(0), |text| integer(["query", "page"], &text))?;
        let page = self.page(window, number);
        let (page, reported) = page.ok_or_else(Reply::unhandled)?;
        let (events, next) = match page {
            Page::Events(events, next) => (events, next),
            Page::Raw(body) => {
                let reply = Reply::new(200).with("content-type", "application/json");
                return Ok(Reply {
                    body: body.into(),
                    events: reported,
                    ..reply
                });
            }
        };
        let query = &request.query;
        let first = || {
            let parts = query.split('&').filter(|part| !part.starts_with("page="));
            parts.collect::<Vec<_>>().join("&")
        };
        let url = |query: &str| json!(format!("http://{}{}?{query}", request.host, request.path));
        let next = match next {
            NextPage::None => Value::Null,
            NextPage::Is(next) => next,
            NextPage::Same => url(query),
            NextPage::First => url(&first()),
            // The real BigChat appends a second `page` parameter.
            NextPage::Usual if !self.in_log() => url(&format!("{query}&page={}", number + 1)),
            NextPage::Usual => url(&format!("{}&page={}", first(), number + 1)),
        };
        let reply = Reply::json(200, &json!({ "nextPageUrl": next, "events": events }));
        Ok(Reply {
            events: reported,
            ..reply
        })
    }

    fn details(&mut self, id: i64) -> Option<Value> {
        self.grow();
        let conversation = self.conversations.get(&id)?;
        let start = event_at(id, "START", conversation.started_at, Value::Null);
        let (mut events, mut advisor) = (vec![start], conversation.first_advisor);
        if self.in_log() {
            let all = conversation
                .events
                .iter()
                .map(|index| &self.reported[*index]);
            let others = all.clone().filter(|reported| reported.name != "START");
            events.extend(others.map(Reported::json));
            let transfers = all.filter_map(|reported| {
                Some((reported.event_at, reported.data["new_advisor_id"].as_i64()?))
            });
            // Of several at the same time, the last to arrive counts.
            let last = transfers.max_by_key(|(at, _)| *at);
            advisor = last.map_or(advisor, |(_, advisor)| advisor);
        }
        Some(json!({ "events": events, "conversation_id": id, "advisor_id": advisor }))
    }

    fn try_answer(&mut self, request: &Request) -> Result<Reply, Reply> {
        match (&*request.method, &*request.segments()) {
            ("GET", ["events"]) => self.events(request),
            ("GET", ["conversations", id]) => {
                let details = self.details(integer(["path", "conversation_id"], id)?);
                let details = details.map(|details| Reply::json(200, &details));
                details.ok_or_else(|| Reply::not_found("Conversation not found"))
            }
            ("GET", ["advisors", id]) => {
                let advisor = self.advisors.get(&integer(["path", "advisor_id"], id)?);
                let advisor = advisor.map(|advisor| Reply::json(200, advisor.as_ref()));
                advisor.ok_or_else(|| Reply::not_found("Advisor not found"))
            }
            (_, ["events"] | ["conversations" | "advisors", _]) => Err(Reply::method_not_allowed()),
            _ => Err(Reply::not_found("Not Found")),
        }
    }
}

impl Api for BigChat {
    fn answer(&mut self, request: &Request, _: usize) -> Reply {
        let reply = self.try_answer(request).unwrap_or_else(|refusal| refusal);
        if request.path == "/events" {
            self.reported_by.push(self.reported.len());
        }
        match &self.date {
            None => reply,
            Some(date) => reply.with("date", date),
        }
    }

    fn date(&self) -> DateTime<Utc> {
        let behind = match self.options {
            Options {
                mode: Mode::Once,
                clock: Clock::Ahead(_),
                ..
            } => self.phase,
            _ => 0,
        };
        self.options.clock.now() - TimeDelta::milliseconds(behind)
    }

    fn sent(&mut self, request: &Request, reply: &Reply) -> Option<Happening> {
        if request.path != "/events" {
            return None;
        }
        if reply.status >= 500 {
            return Some(Happening::Failed);
        }
        let arrived = &mut self.arrived;
        let new = reply.events.iter().copied();
        let new = new.filter(|index| !std::mem::replace(&mut arrived[*index], true));
        self.latest = new.collect();
        let new = self
            .latest
            .iter()
            .map(|index| self.reported[*index].conversation_id);
        (!self.latest.is_empty()).then(|| Happening::Reported(new.collect()))
    }
}

fn integer(place: [&str; 2], text: &str) -> Result<i64, Reply> {
    let message = "Input should be a valid integer, unable to parse string as an integer";
    text.parse().map_err(|_| {
        let error = invalid("int_parsing", place, message, &text.into());
        Reply::detail(422, vec![error])
    })
}
