//! A BigChat that follows a script: a plain value, whose answers depend on nothing but what it was asked before.

use std::sync::Arc;

use reqwest::StatusCode;
use serde_json::{Value, json};
use url::Url;

use crate::http::Response;
use crate::sim::bigchat::{Advisor, Told};
use crate::time::Timestamp;

/// 2026-11-22T22:00:00Z, when the first run begins.
pub(super) const T0: i64 = 1_795_384_800;

/// How far its clock moves on with each page or, in a log, with each poll, as long as there is more to tell.
const TICK: i64 = 10;

/// How it tells what happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Each page once, whatever is asked for.
    Once,
    /// A log, in pages of so many events. Each poll finds one more page of the script in it.
    Log(usize),
}

/// What happens.
#[derive(Debug)]
pub(super) struct Script {
    pub(super) mode: Mode,
    /// How many seconds after its last word before a restart BigChat begins anew.
    pub(super) gap: i64,
    /// From one restart to the next.
    pub(super) runs: Vec<Run>,
}

/// What happens from one restart to the next.
#[derive(Debug)]
pub(super) struct Run {
    /// By id from 1: when each began, in seconds after the run did, and who had it first.
    pub(super) conversations: Vec<(i64, i64)>,
    pub(super) pages: Vec<Page>,
}

/// What is told at once.
#[derive(Debug, Clone)]
pub(super) struct Page {
    pub(super) events: Vec<Event>,
    /// The next one belongs to the same poll.
    pub(super) more: bool,
}

/// Something that happens: in which conversation, so many seconds after the run began, and what.
pub(super) type Event = (i64, i64, What);

/// What happens in a conversation.
#[derive(Debug, Clone)]
pub(super) enum What {
    Start,
    End,
    Message(String),
    Transfer(i64),
}

impl What {
    fn told(&self) -> (&'static str, Value) {
        match self {
            Self::Start => ("START", Value::Null),
            Self::End => ("END", Value::Null),
            Self::Message(text) => ("MESSAGE", json!({ "message": text })),
            Self::Transfer(advisor) => (
                "TRANSFER",
                json!({ "old_advisor_id": 1, "new_advisor_id": advisor }),
            ),
        }
    }
}

/// The one that follows the script.
#[derive(Debug, Clone)]
pub(super) struct BigChat {
    script: Arc<Script>,
    run: usize,
    /// When this run began.
    began_at: i64,
    /// How many pages of this run were told; of a log, how many stand in it.
    pages: usize,
    /// How many messages beyond the script are to be told.
    pub(super) nudges: usize,
    /// What was told and is the daemon's to keep from then on.
    told: Vec<Told>,
    /// A page that is on its way: its body, and what it tells.
    on_its_way: Option<(String, Vec<Told>)>,
    /// How often a log was asked for from its beginning since all there is stood in it.
    asked: usize,
}

impl BigChat {
    pub(super) fn new(script: Arc<Script>) -> Self {
        Self {
            script,
            run: 0,
            began_at: T0,
            pages: 0,
            nudges: 0,
            told: Vec::new(),
            on_its_way: None,
            asked: 0,
        }
    }

    /// What tells it from one that will behave otherwise.
    pub(super) fn canonical(&self) -> String {
        let told = |told: &Told| {
            format!(
                "{}/{} {} {} {} {}",
                told.run, told.conversation_id, told.name, told.event_at, told.data, told.poll
            )
        };
        let told: Vec<String> = self.told.iter().map(told).collect();
        let Self {
            run,
            began_at,
            pages,
            nudges,
            ..
        } = self;
        format!(
            "BigChat: run {run} from {began_at}, {pages} pages, {nudges} nudges, {}\n",
            told.join("; ")
        )
    }

    /// Whether it has told all there is.
    pub(super) fn has_told_all(&self) -> bool {
        let asked = self.script.mode == Mode::Once || self.asked >= 2;
        self.pages == self.all_pages() && self.on_its_way.is_none() && asked
    }

    /// Whether it can begin another run.
    pub(super) fn can_restart(&self) -> bool {
        self.run + 1 < self.script.runs.len()
    }

    /// Forgets everything, and gives its ids to others.
    pub(super) fn restart(&mut self) {
        self.began_at = self.date() + self.script.gap;
        self.run += 1;
        self.pages = 0;
        self.nudges = 0;
    }

    /// Whoever asked has died: what was on its way is gone.
    pub(super) fn forsaken(&mut self) {
        self.on_its_way = None;
        self.asked = 0;
    }

    /// What is on its way is kept, if `kept` says so of its body.
    pub(super) fn arrived(&mut self, kept: impl FnOnce(&str) -> bool) {
        if let Some((body, told)) = self.on_its_way.take() {
            if kept(&body) {
                self.told.extend(told);
            } else {
                self.on_its_way = Some((body, told));
            }
        }
    }

    /// All that OurAPI has to hold.
    pub(super) fn told(&self) -> Vec<Told> {
        let over = |told: &Told| usize::try_from(told.run).is_ok_and(|run| run <= self.run);
        let told = self.told.iter().map(|told| Told {
            over: over(told),
            ..told.clone()
        });
        told.collect()
    }

    /// Time goes on with each poll: what happens meanwhile stands in the log, whatever becomes of the request.
    pub(super) fn is_asked(&mut self, url: &Url) {
        if self.script.mode == Mode::Once || url.path() != "/events" || page_of(url) > 0 {
        } else if self.pages < self.all_pages() {
            self.told.extend(self.in_full(self.pages));
            self.pages += 1;
            self.asked = 0;
        } else {
            self.asked += 1;
        }
    }

    /// Responses one request.
    pub(super) fn answer(&mut self, url: &Url) -> Response {
        let path: Vec<&str> = url.path().split('/').skip(1).collect();
        let body = match path.as_slice() {
            ["events"] => Some(self.events(url)),
            ["conversations", id] => id.parse().ok().and_then(|id| self.details(id)),
            ["advisors", id] => id.parse().ok().map(|id| json!(self.advisor(self.run, id))),
            _ => None,
        };
        Response {
            status: body
                .as_ref()
                .map_or(StatusCode::NOT_FOUND, |_| StatusCode::OK),
            date: Some(Timestamp::clamped(self.date())),
            retry_at: None,
            location: None,
            body: body.unwrap_or_default().to_string().into_bytes(),
        }
    }

    fn script(&self) -> &Run {
        &self.script.runs[self.run]
    }

    fn date(&self) -> i64 {
        self.began_at + TICK * (1 + i64::try_from(self.pages).unwrap_or_default())
    }

    fn all_pages(&self) -> usize {
        self.script().pages.len() + self.nudges
    }

    fn page(&self, number: usize) -> Page {
        let pages = &self.script().pages;
        pages.get(number).cloned().unwrap_or_else(|| {
            let conversation = pages[0].events[0].0;
            let at = TICK * i64::try_from(number).unwrap_or_default() + 1;
            let nudge = What::Message(format!("nudge {}", number - pages.len()));
            Page {
                events: vec![(conversation, at, nudge)],
                more: false,
            }
        })
    }

    /// Which poll of the script a page belongs to, by its first page.
    fn poll(&self, number: usize) -> usize {
        let mut first = number;
        while first > 0 && self.page(first - 1).more {
            first -= 1;
        }
        first
    }

    fn advisor(&self, run: usize, id: i64) -> Advisor {
        Advisor {
            advisor_id: id,
            name: format!("Advisor {id} of {run}"),
            email_address: format!("{id}.{run}@company.com"),
        }
    }

    fn conversation(&self, id: i64) -> Option<(i64, i64)> {
        let index = usize::try_from(id.checked_sub(1)?).ok()?;
        let (began, advisor) = self.script().conversations.get(index)?;
        Some((self.began_at + began, *advisor))
    }

    fn in_full(&self, number: usize) -> Vec<Told> {
        let log = self.script.mode != Mode::Once;
        let told = |(conversation_id, at, what): &Event| {
            let (name, data) = what.told();
            let advisor = data["new_advisor_id"].as_i64();
            let (started_at, first) = self.conversation(*conversation_id).unwrap_or_default();
            Told {
                run: u32::try_from(self.run).unwrap_or_default() + 1,
                over: false,
                poll: if log { 0 } else { self.poll(number) as u64 },
                page: 0,
                request: 0,
                lost: false,
                conversation_id: *conversation_id,
                name: name.to_owned(),
                event_at: self.began_at + at,
                started_at,
                first_advisor: Some(Arc::new(self.advisor(self.run, first))),
                advisor: advisor.map(|id| Arc::new(self.advisor(self.run, id))),
                data,
            }
        };
        self.page(number).events.iter().map(told).collect()
    }

    /// What of this run stands in the log.
    fn log(&self) -> Vec<Told> {
        let mut log: Vec<Told> = (0..self.pages)
            .flat_map(|page| self.in_full(page))
            .collect();
        log.sort_by_key(|told| told.event_at);
        log
    }

    fn events(&mut self, url: &Url) -> Value {
        let page = page_of(url);
        let (events, more) = match self.script.mode {
            Mode::Once if self.pages < self.all_pages() => {
                let number = self.pages;
                self.pages += 1;
                (self.in_full(number), self.page(number).more)
            }
            Mode::Once => (Vec::new(), false),
            Mode::Log(size) => {
                let time = |name| {
                    given(url, name)
                        .and_then(|at| Timestamp::parse(&at))
                        .map(Timestamp::unix)
                };
                let window = time("start_at").unwrap_or(0)..time("end_at").unwrap_or(i64::MAX);
                let mut log = self.log();
                log.retain(|told| window.contains(&told.event_at));
                let more = log.len() > (page + 1) * size;
                (log.into_iter().skip(page * size).take(size).collect(), more)
            }
        };
        let next = more.then(|| {
            let mut next = url.clone();
            let kept: Vec<String> = url
                .query()
                .unwrap_or_default()
                .split('&')
                .filter(|part| !part.starts_with("page="))
                .map(str::to_owned)
                .collect();
            next.set_query(Some(&format!("{}&page={}", kept.join("&"), page + 1)));
            next.to_string()
        });
        let shown: Vec<Value> = events
            .iter()
            .map(|told| {
                json!({ "conversation_id": told.conversation_id, "event_name": told.name, "event_at": told.event_at,
                    "data": told.data })
            })
            .collect();
        let body = json!({ "nextPageUrl": next, "events": shown });
        if self.script.mode == Mode::Once && !events.is_empty() {
            self.on_its_way = Some((body.to_string(), events));
        }
        body
    }

    fn details(&self, id: i64) -> Option<Value> {
        let (started_at, first) = self.conversation(id)?;
        // A usual vendor's tell the advisor of now.
        let advisor = match self.script.mode {
            Mode::Once => first,
            Mode::Log(_) => self
                .log()
                .iter()
                .rfind(|told| told.conversation_id == id && told.advisor.is_some())
                .and_then(|told| told.data["new_advisor_id"].as_i64())
                .unwrap_or(first),
        };
        let start = json!({ "conversation_id": id, "event_name": "START", "event_at": started_at, "data": null });
        Some(json!({ "conversation_id": id, "advisor_id": advisor, "events": [start] }))
    }
}

fn given(url: &Url, name: &str) -> Option<String> {
    let mut pairs = url.query_pairs();
    pairs.find_map(|(key, value)| (key == name).then(|| value.into_owned()))
}

fn page_of(url: &Url) -> usize {
    let page = given(url, "page");
    page.and_then(|page| page.parse().ok()).unwrap_or(0)
}
