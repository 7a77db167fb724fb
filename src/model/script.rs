//! A BigChat that follows a script. Its clock and its reports depend only on the requests so far.

use std::collections::BTreeSet;
use std::sync::Arc;

use reqwest::StatusCode;
use serde_json::Value;
use url::{Position, Url};

use crate::domain::time::Timestamp;
use crate::http::Response;
use crate::simulator::bigchat::{Clock, Log, Mode, NextPage, Options, Page as Shown, Reported};
use crate::simulator::event::{T0, message};
use crate::simulator::{Api, BigChat, Reply, Request};

/// The seconds by which BigChat's clock advances with each page or, in a log, with each poll, as long as there is more
/// to report.
const TICK: i64 = 10;

/// A script. All times are in seconds since the epoch began. The first epoch begins at [`T0`].
#[derive(Debug)]
pub(super) struct Script {
    /// For a log, the number of events per page. Each poll finds one more page of the script in the log.
    pub(super) log: Option<usize>,
    /// How many seconds pass between BigChat's last report before a restart and the new epoch.
    pub(super) gap: i64,
    pub(super) epochs: Vec<Epoch>,
}

/// The part of a script between two restarts.
#[derive(Debug)]
pub(super) struct Epoch {
    /// By id from 1: the start and the first advisor of each conversation.
    pub(super) conversations: Vec<(i64, i64)>,
    pub(super) pages: Vec<Page>,
}

/// Events reported together.
#[derive(Debug, Clone)]
pub(super) struct Page {
    pub(super) events: Vec<Value>,
    /// The next page belongs to the same poll.
    pub(super) more: bool,
}

/// BigChat as it follows the script.
#[derive(Debug, Clone)]
pub(super) struct Scripted {
    script: Arc<Script>,
    bigchat: BigChat,
    epoch: usize,
    /// The beginning of this epoch, in seconds after [`T0`].
    began_at: i64,
    /// How many pages of this epoch have been reported or, for a log, are in it.
    pages: usize,
    /// How many more messages are to be reported beyond the script.
    pub(super) nudges: usize,
    /// A page that the daemon has not stored.
    in_flight: Option<(Request, Reply)>,
    /// How many polls have begun since the log became complete.
    asked: usize,
}

impl Scripted {
    pub(super) fn new(script: Arc<Script>) -> Self {
        let log = |page_size| {
            Mode::Log(Log {
                page_size,
                ..Log::default()
            })
        };
        let bigchat = BigChat::new(Options {
            mode: script.log.map_or(Mode::Once, log),
            quiet: true,
            awkward: false,
            clock: Clock::Still(0),
            ..Options::default()
        });
        let mut scripted = Self {
            script,
            bigchat,
            epoch: 0,
            began_at: 0,
            pages: 0,
            nudges: 0,
            in_flight: None,
            asked: 0,
        };
        scripted.open_conversations();
        scripted
    }

    fn open_conversations(&mut self) {
        let conversations = &self.script.epochs[self.epoch].conversations;
        for (id, (began, advisor)) in (1..).zip(conversations) {
            self.bigchat.open(id, self.began_at + began, *advisor);
        }
    }

    /// A text that differs between states that behave differently.
    pub(super) fn canonical(&mut self) -> String {
        let mut reported = self.reported();
        reported.retain(|reported| !reported.lost);
        let polls: BTreeSet<u64> = reported.iter().map(|reported| reported.poll).collect();
        let shown: Vec<String> = reported
            .iter()
            .map(|reported| {
                let poll = polls.range(..reported.poll).count();
                format!("{}: {} {poll}", reported.epoch, reported.json())
            })
            .collect();
        // The next page may belong to the same poll as the last one.
        let continues = self.pages > 0 && self.page(self.pages - 1).more;
        let continues = continues && polls.last() == Some(&self.bigchat.polls());
        let Self {
            epoch,
            began_at,
            pages,
            nudges,
            ..
        } = self;
        format!(
            "BigChat: epoch {epoch} from {began_at}, {pages} pages {continues}, {nudges} nudges, {}\n",
            shown.join("; ")
        )
    }

    /// Whether everything has been reported.
    pub(super) fn has_reported_all(&self) -> bool {
        let asked = self.script.log.is_none() || self.asked >= 2;
        self.pages == self.all_pages() && self.in_flight.is_none() && asked
    }

    /// Whether the script has another epoch.
    pub(super) fn can_restart(&self) -> bool {
        self.epoch + 1 < self.script.epochs.len()
    }

    /// Restarts BigChat, which forgets everything and reuses its ids.
    pub(super) fn restart(&mut self) {
        self.began_at = self.now() + self.script.gap;
        self.epoch += 1;
        self.pages = 0;
        self.nudges = 0;
        self.bigchat.restart_at(self.began_at);
        self.open_conversations();
    }

    /// Called when the daemon has died, so that the response in flight is lost.
    pub(super) fn client_died(&mut self) {
        self.in_flight = None;
        self.asked = 0;
    }

    /// Called when the journal has changed. The response in flight has arrived if `stored` is true for its body.
    pub(super) fn arrived(&mut self, stored: impl FnOnce(&str) -> bool) {
        let is_stored =
            |(_, reply): &mut (Request, Reply)| std::str::from_utf8(&reply.body).is_ok_and(stored);
        if let Some((request, reply)) = self.in_flight.take_if(is_stored) {
            self.bigchat.sent(&request, &reply);
        }
    }

    /// Everything reported.
    pub(super) fn reported(&mut self) -> Vec<Reported> {
        self.bigchat.reported()
    }

    /// Called when a request arrives. Each poll of a log adds the next page of events to it, even if the request then
    /// fails.
    pub(super) fn on_request(&mut self, url: &Url) {
        let is_first =
            url.path() == "/events" && !url.query_pairs().any(|(name, _)| name == "page");
        if self.script.log.is_none() || !is_first {
        } else if self.pages < self.all_pages() {
            let events = self.next_page().events;
            self.bigchat.push_page(events);
            self.asked = 0;
        } else {
            self.asked += 1;
        }
    }

    /// Answers one request.
    pub(super) fn answer(&mut self, url: &Url) -> Response {
        let mut request = Request::new("GET", &url[Position::BeforePath..], Vec::new());
        url.authority().clone_into(&mut request.host);
        let reports = self.script.log.is_none() && request.path == "/events";
        let reports = reports && self.pages < self.all_pages();
        if reports {
            let Page { events, more } = self.next_page();
            let next = if more {
                NextPage::Usual
            } else {
                NextPage::None
            };
            self.bigchat.push_page(Shown::Events(events, next));
        }
        self.bigchat.set_clock(Clock::Still(self.now()));
        let reply = self.bigchat.answer(&request, 0);
        let response = Response {
            status: StatusCode::from_u16(reply.status).expect("a status"),
            date: Some(Timestamp::clamped(T0 + self.now())),
            rate_limit: None,
            location: None,
            body: reply.body.clone(),
        };
        if reports {
            self.in_flight = Some((request, reply));
        }
        response
    }

    fn now(&self) -> i64 {
        self.began_at + TICK * (1 + i64::try_from(self.pages).unwrap_or_default())
    }

    fn all_pages(&self) -> usize {
        self.script.epochs[self.epoch].pages.len() + self.nudges
    }

    fn page(&self, number: usize) -> Page {
        let pages = &self.script.epochs[self.epoch].pages;
        pages.get(number).cloned().unwrap_or_else(|| {
            let conversation = pages[0].events[0]["conversation_id"].as_i64();
            let at = TICK * i64::try_from(number).unwrap_or_default() + 1;
            let nudge = format!("nudge {}", number - pages.len());
            Page {
                events: vec![message(conversation.unwrap_or(1), at, &nudge)],
                more: false,
            }
        })
    }

    /// Advances to the next page, and returns its events with their times.
    fn next_page(&mut self) -> Page {
        let mut page = self.page(self.pages);
        self.pages += 1;
        for event in &mut page.events {
            let at = event["event_at"].as_i64().unwrap_or_default();
            event["event_at"] = (at + self.began_at).into();
        }
        page
    }
}
