//! What happens in a simulated BigChat: who is there, what random numbers make of it, and what was told to whom.
//!
//! It knows nothing of HTTP, which is [`bigchat`](super::bigchat)'s. A poll, here, is a request for a first page and those
//! for later pages up to the next first one.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use chrono::{DateTime, TimeDelta, Utc};
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    http::{Clock, KEEP_ALIVE},
    watch::{Happening, Watch},
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
    /// Who is told what it does.
    pub watch: Watch,
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
            watch: Watch::default(),
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
    /// The event, as BigChat shows it.
    pub fn json(&self) -> Value {
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
    /// That of this very page: A A.
    Same,
    /// That of the poll's first page: A B A B.
    First,
    /// This one, whatever it is.
    Url(String),
}

impl NextPage {
    fn usual_if(more: bool) -> Self {
        if more { Self::Usual } else { Self::None }
    }
}

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

pub(super) struct World {
    options: Options,
    clock: Clock,
    rng: StdRng,
    pub(super) run: u32,
    first_of_run: usize,
    last_start: i64,
    /// The `date` header moves on once a second, at this part of it, as with the real one: it is up to a second behind.
    phase: i64,
    pub(super) advisors: BTreeMap<i64, Arc<Advisor>>,
    addresses: HashSet<String>,
    conversations: BTreeMap<i64, Conversation>,
    told: Vec<Told>,
    arrived: Vec<bool>,
    /// What is told by requests under way.
    answering: HashMap<u64, Vec<usize>>,
    pub(super) requests: u64,
    pub(super) poll: u64,
    pushed: Vec<Value>,
    pages: VecDeque<(Vec<Value>, NextPage)>,
    /// The ENDs and TRANSFERs of the page before.
    repeatable: Vec<Value>,
    log: BTreeMap<(i64, usize), Item>,
    /// When the log grows next.
    next_arrival: f64,
    pub(super) restart_at_poll: bool,
    /// It is not there: nothing happens.
    down: bool,
    /// How often a last page names an earlier one as the next.
    pub(super) circles: f64,
    /// What the latest request for events told that was never told before.
    latest: Vec<usize>,
}

impl World {
    pub(super) fn new(options: Options, clock: Clock) -> Self {
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
            down: false,
            circles: 0.0,
            latest: Vec::new(),
        };
        let history = match &world.options.mode {
            Mode::Log(log) => i64::try_from(log.history.as_secs()).unwrap_or(0),
            Mode::Once => 0,
        };
        let start = world.now() - history;
        world.boot(start);
        world
    }

    pub(super) fn in_log(&self) -> bool {
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

    pub(super) fn open_scripted(&mut self, id: i64, started_at: i64, first_advisor: i64) {
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
        Some((events, NextPage::usual_if(more)))
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
        if self.options.quiet || self.down || rate <= 0.0 {
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

    /// What a request for a page gets; `None` is an error that loses it.
    pub(super) fn page(
        &mut self,
        number: u64,
        (start_at, end_at): (Option<i64>, Option<i64>),
        page: i64,
    ) -> Option<(Vec<Value>, NextPage)> {
        if page <= 0 {
            self.poll += 1;
            if self.restart_at_poll {
                self.restart();
            }
        }
        self.latest.clear();
        let start_at = start_at?;
        let (items, mut next) = if let Mode::Log(Log { page_size, .. }) = self.options.mode {
            self.grow();
            let skip = usize::try_from(page).unwrap_or(0).saturating_mul(page_size);
            let end_at = end_at.unwrap_or(i64::MAX).max(start_at);
            let window = self.log.range((start_at, 0)..(end_at, 0)).skip(skip);
            let mut window = window.map(|(_, item)| item.clone());
            let items: Vec<Item> = window.by_ref().take(page_size).collect();
            (items, NextPage::usual_if(window.next().is_some()))
        } else {
            let (events, next) = self.once(start_at, page)?;
            let told = events.into_iter().map(|raw| self.item((number, page), raw));
            (told.collect(), next)
        };
        if matches!(next, NextPage::None) && self.rng.random_bool(self.circles) {
            next = if page > 0 && self.rng.random() {
                NextPage::First
            } else {
                NextPage::Same
            };
        }
        let mut telling = Vec::new();
        let show = |item| match item {
            Item::Told(index) => {
                telling.push(index);
                self.told[index].json()
            }
            Item::Raw(raw) => raw,
        };
        let events = items.into_iter().map(show).collect();
        self.answering.insert(number, telling);
        Some((events, next))
    }

    /// A conversation's details, as BigChat shows them.
    pub(super) fn details(&mut self, id: i64) -> Option<Value> {
        self.grow();
        let conversation = self.conversations.get(&id)?;
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
        Some(json!({ "events": events, "conversation_id": id, "advisor_id": advisor }))
    }

    pub(super) fn restart(&mut self) {
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

    /// Counts a request; the number is its own.
    pub(super) fn request(&mut self) -> u64 {
        self.requests += 1;
        self.requests
    }

    /// A request is over; what it was to tell has been told if the answer goes out.
    pub(super) fn answered(&mut self, number: u64, goes_out: bool) {
        let Some(mut told) = self.answering.remove(&number).filter(|_| goes_out) else {
            return;
        };
        told.retain(|index| !std::mem::replace(&mut self.arrived[*index], true));
        self.latest.clone_from(&told);
        if !told.is_empty() {
            self.options.watch.tell(|| {
                let told = told.iter().map(|index| self.told[*index].clone());
                Happening::Told(told.collect())
            });
        }
    }

    /// What the latest request for events told, as far as nothing equal was told before.
    pub(super) fn latest(&self) -> Vec<Told> {
        let key = |index: &usize| {
            let told = &self.told[*index];
            (told.conversation_id, &told.name, told.event_at, &told.data)
        };
        let is_new = |new: &&usize| {
            let mut before = (0..self.told.len()).filter(|index| !self.latest.contains(index));
            !before.any(|index| self.arrived[index] && key(&index) == key(new))
        };
        let new = self.latest.iter().filter(is_new);
        new.map(|index| self.told[*index].clone()).collect()
    }

    /// What the latest request for events told has reached nobody. Returns how many events that were.
    pub(super) fn unsay(&mut self) -> usize {
        let latest = std::mem::take(&mut self.latest);
        for index in &latest {
            self.arrived[*index] = false;
            // A log tells them again, unless it is gone.
            self.told[*index].lost |= self.told[*index].over;
        }
        latest.len()
    }

    /// A request for events was answered with an error.
    pub(super) fn failed(&self) {
        self.options.watch.tell(|| Happening::Failed);
    }

    /// The time that its answers carry.
    pub(super) fn date(&self) -> DateTime<Utc> {
        let phase = if self.in_log() { 0 } else { self.phase };
        self.clock.now() - TimeDelta::milliseconds(phase)
    }

    /// Everything told so far, in order of telling; of a log, everything in it.
    pub(super) fn told(&mut self) -> Vec<Told> {
        self.grow();
        let in_log = self.in_log();
        let with_fate = |(told, arrived): (&Told, &bool)| Told {
            lost: told.lost || (!in_log && !arrived),
            ..told.clone()
        };
        self.told.iter().zip(&self.arrived).map(with_fate).collect()
    }

    /// Takes in a scripted event: told on the next page, or put in the log.
    pub(super) fn push(&mut self, event: Value) {
        if self.in_log() {
            self.log_item(event);
        } else {
            self.pushed.push(event);
        }
    }

    /// Takes in a scripted page: told as it is to the next request, or put in the log.
    pub(super) fn push_page(&mut self, events: Vec<Value>, next: NextPage) {
        if self.in_log() {
            events.into_iter().for_each(|event| self.log_item(event));
        } else {
            self.pages.push_back((events, next));
        }
    }

    /// It goes down, or is there again. Meanwhile nothing happens.
    pub(super) fn set_down(&mut self, down: bool) {
        self.grow();
        self.down = down;
    }

    /// Whether some messages are awkward from now on.
    pub(super) fn set_awkward(&mut self, awkward: bool) {
        self.options.awkward = awkward;
    }

    /// Nothing, or again something, happens by itself from now on.
    pub(super) fn set_quiet(&mut self, quiet: bool) {
        self.grow();
        self.options.quiet = quiet;
    }
}

fn pick(rng: &mut StdRng, choices: &[&'static str]) -> &'static str {
    choices.choose(rng).copied().unwrap_or_default()
}

/// An event, as BigChat shows it.
pub(super) fn event(id: i64, name: &str, at: i64, data: Value) -> Value {
    json!({ "conversation_id": id, "event_name": name, "event_at": at, "data": data })
}
