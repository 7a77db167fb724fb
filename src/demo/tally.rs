//! Figures and messages about what has happened.
//!
//! It observes both ends only, what BigChat reported and what OurAPI answered, and pairs them to show how long each
//! event took. Foreign text is shown without control characters.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use chrono::DateTime;
use serde_json::Value;

use super::chaos::Score;
use super::result::FailedPolls;
use crate::simulator::bigchat::Reported;
use crate::simulator::event::message_text;
use crate::simulator::{Answered, Happening};
use crate::telemetry::terminal::printable;

/// More of a message is not needed to recognize it, and a line should fit 80 columns.
const SHOWN: usize = 38;

/// The columns of the figures: the owner, if it changes, and the heading.
const COLUMNS: [(&str, &str); 9] = [
    ("BigChat", "events"),
    ("", "conversations"),
    ("", "errors"),
    ("OurAPI", "chats"),
    ("", "agents"),
    ("", "messages"),
    ("", "requests"),
    ("daemon", "waiting"),
    ("", "failed"),
];

/// The narrowest column.
const NARROWEST: usize = 6;

/// The two lines of headings over [`Tally::figures`].
pub(super) fn headings() -> [String; 2] {
    let owners = COLUMNS.map(|column @ (owner, _)| {
        let gap = gap(column);
        format!("{:gap$}{owner:<width$}", "", width = width(column) - gap)
    });
    let headings = COLUMNS.map(|column| format!("{:>width$}", column.1, width = width(column)));
    [owners.concat().trim_end().to_owned(), headings.concat()]
}

fn gap((owner, _): (&str, &str)) -> usize {
    if owner.is_empty() { 1 } else { 2 }
}

fn width(column: (&str, &str)) -> usize {
    let (owner, heading) = column;
    gap(column) + owner.len().max(heading.len()).max(NARROWEST)
}

/// A message about one thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    /// The time from BigChat's response to OurAPI's, if both are known.
    pub(super) took: Option<Duration>,
    /// The service or the conversation.
    pub(super) who: String,
    /// What happened.
    pub(super) what: String,
}

/// The state of OurAPI and of the journal, as read for a frame.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Snapshot {
    /// The chats that OurAPI has.
    pub(super) chats: usize,
    /// Its agents.
    pub(super) agents: usize,
    /// Its messages.
    pub(super) messages: usize,
    /// The most requests that it ever carried out at once.
    pub(super) at_once: usize,
    /// The events that wait in the daemon's journal.
    pub(super) waiting: usize,
    /// The failed events there.
    pub(super) failed: usize,
    /// The discarded events there.
    pub(super) discarded: usize,
    /// The faults so far, with `--chaos`.
    pub(super) score: Option<Score>,
}

/// The counts, and the reported events without a response of OurAPI.
#[derive(Debug, Default)]
pub(super) struct Tally {
    events: usize,
    conversations: HashSet<i64>,
    failed_polls: FailedPolls,
    requests: usize,
    /// When a message was reported, by conversation, time and text as OurAPI stores it.
    messages: HashMap<(String, i64, String), VecDeque<Instant>>,
    /// When an END or a TRANSFER of a conversation was last reported, and when its first event was.
    changes: HashMap<(String, &'static str), Instant>,
}

impl Tally {
    /// `reported_again`: whether BigChat reports the events of a failed poll again.
    pub(super) fn new(reported_again: bool) -> Self {
        let failed_polls = FailedPolls {
            count: 0,
            reported_again,
        };
        Self {
            failed_polls,
            ..Self::default()
        }
    }

    /// Counts what happened. Returns a line about it, if it is of interest.
    pub(super) fn record(&mut self, at: Instant, happening: Happening) -> Option<Line> {
        match happening {
            Happening::Reported(events) => {
                for event in &events {
                    self.reported(at, event);
                }
                None
            }
            Happening::Failed => {
                self.failed_polls.count += 1;
                let what = match self.failed_polls.reported_again {
                    true => "poll failed; its events will be reported again",
                    false => "poll failed; its events are not recoverable",
                };
                Some(Line {
                    took: None,
                    who: "BigChat".to_owned(),
                    what: what.to_owned(),
                })
            }
            Happening::Struck(what) => Some(Line {
                took: None,
                who: "chaos".to_owned(),
                what,
            }),
            Happening::Answered(answered) => {
                self.requests += 1;
                self.answered(at, &answered)
            }
        }
    }

    /// How many events were reported.
    pub(super) fn events(&self) -> usize {
        self.events
    }

    /// The polls that BigChat answered with an error.
    pub(super) fn failed_polls(&self) -> FailedPolls {
        self.failed_polls
    }

    /// How many requests OurAPI got.
    pub(super) fn requests(&self) -> usize {
        self.requests
    }

    fn reported(&mut self, at: Instant, event: &Reported) {
        self.events += 1;
        let chat = event.conversation_id.to_string();
        if self.conversations.insert(event.conversation_id) {
            self.changes.insert((chat.clone(), "START"), at);
        }
        if let Some(text) = message_text(&event.name, &event.data) {
            let key = (chat, event.event_at, text.trim().to_owned());
            self.messages.entry(key).or_default().push_back(at);
        } else if let Some(change) = ["END", "TRANSFER"]
            .into_iter()
            .find(|kind| *kind == event.name)
        {
            self.changes.insert((chat, change), at);
        }
    }

    fn answered(&mut self, at: Instant, answered: &Answered) -> Option<Line> {
        let Answered {
            route,
            chat,
            body,
            status,
            ..
        } = answered;
        let good = (200..300).contains(status);
        let say = |reported: Option<Instant>, who, what| {
            let took = reported.map(|reported| at.saturating_duration_since(reported));
            Some(Line { took, who, what })
        };
        let conversation = |id: &str| format!("conversation {}", printable(id));
        match (route.as_str(), chat) {
            ("POST /agents", _) => {
                let name = quoted(&body["name"]);
                let what = match status {
                    _ if good => format!("new agent {name}"),
                    500 | 409 => format!("new agent {name}: {status}, the name may be taken"),
                    _ => format!("new agent {name}: {status}"),
                };
                say(None, "OurAPI".to_owned(), what)
            }
            ("POST /chats", _) if good => {
                let id = body["external_id"].as_str().unwrap_or_default().to_owned();
                let what = format!("new chat, {}", changes(answered, "with"));
                let who = conversation(&id);
                say(self.changes.remove(&(id, "START")), who, what)
            }
            ("PATCH /chats/{id}", Some(chat)) if good => {
                let reported = [("ended_at", "END"), ("agent_id", "TRANSFER")]
                    .into_iter()
                    .filter(|(field, _)| !body[*field].is_null())
                    .find_map(|(_, kind)| self.changes.remove(&(chat.clone(), kind)));
                say(reported, conversation(chat), changes(answered, "now with"))
            }
            ("POST /chats/{id}/messages", Some(chat)) => {
                // A message that fails now may be stored later.
                let reported = good.then(|| self.message_reported(chat, body)).flatten();
                let text = quoted(&body["text"]);
                let what = match status {
                    _ if good => format!("message {text}"),
                    422 => format!("message {text}: permanently rejected"),
                    _ => format!("message {text}: {status}"),
                };
                say(reported, conversation(chat), what)
            }
            _ if good => None,
            _ => {
                let what = format!("{route}: {status}");
                say(None, "OurAPI".to_owned(), what)
            }
        }
    }

    /// When a message that OurAPI received was reported.
    fn message_reported(&mut self, chat: &str, body: &Value) -> Option<Instant> {
        let sent_at = DateTime::parse_from_rfc3339(body["sent_at"].as_str()?).ok()?;
        let text = body["text"].as_str()?.trim().to_owned();
        let key = (chat.to_owned(), sent_at.timestamp(), text);
        let reported = self.messages.get_mut(&key)?;
        let first = reported.pop_front();
        if reported.is_empty() {
            self.messages.remove(&key);
        }
        first
    }

    /// The figures, under the [`headings`].
    pub(super) fn figures(&self, snapshot: &Snapshot) -> String {
        let figures = [
            self.events,
            self.conversations.len(),
            self.failed_polls.count,
            snapshot.chats,
            snapshot.agents,
            snapshot.messages,
            self.requests,
            snapshot.waiting,
            snapshot.failed,
        ];
        let cells = COLUMNS.into_iter().zip(figures);
        cells
            .map(|(column, figure)| format!("{figure:>width$}", width = width(column)))
            .collect()
    }
}

impl Snapshot {
    /// The faults so far, and whether the daemon runs; empty without chaos.
    pub(super) fn chaos(&self) -> String {
        match self.score {
            None => String::new(),
            Some(score) if score.up => format!("daemon up; {score}"),
            Some(score) => format!("daemon down; {score}"),
        }
    }
}

/// The fields of a chat that a request sets; `with` precedes the agent.
fn changes(answered: &Answered, with: &str) -> String {
    let Answered { agent, body, .. } = answered;
    let time = |name: &str| body[name].as_str().and_then(|time| time.get(11..19));
    let started = time("started_at").map(|time| format!("started {time}"));
    let ended = time("ended_at").map(|time| format!("ended {time}"));
    let agent = agent
        .as_ref()
        .map(|agent| format!("{with} {}", shown(agent)));
    let parts: Vec<String> = [started, ended, agent].into_iter().flatten().collect();
    parts.join(", ")
}

fn quoted(text: &Value) -> String {
    format!("“{}”", shown(text.as_str().unwrap_or_default()))
}

/// Foreign text, shortened and without control characters.
fn shown(text: &str) -> String {
    let text = printable(text);
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn reported(conversation_id: i64, name: &str, data: Value) -> Reported {
        Reported {
            epoch: 1,
            forgotten: false,
            poll: 1,
            lost: false,
            conversation_id,
            name: name.to_owned(),
            event_at: 1_763_849_007, // 2025-11-22T22:03:27Z
            data,
            started_at: Some(1_763_849_007),
            first_advisor: None,
            advisor: None,
        }
    }

    fn message(text: &str) -> Reported {
        reported(4, "MESSAGE", json!({ "message": text }))
    }

    fn answered(method: &str, chat: Option<&str>, body: Value, status: u16) -> Happening {
        let route = match (method, chat) {
            ("POST", Some(_)) => "POST /chats/{id}/messages",
            ("PATCH", _) => "PATCH /chats/{id}",
            _ => "POST /chats",
        };
        Happening::Answered(Answered {
            route: route.to_owned(),
            chat: chat.map(str::to_owned),
            agent: body["agent_id"].as_str().map(|_| "Zoë Ng".to_owned()),
            body,
            status,
        })
    }

    fn posted(text: &str, status: u16) -> Happening {
        let body = json!({ "sent_at": "2025-11-22T22:03:27Z", "text": text });
        answered("POST", Some("4"), body, status)
    }

    fn line(took: Option<u64>, what: &str) -> Option<Line> {
        Some(Line {
            took: took.map(Duration::from_millis),
            who: "conversation 4".to_owned(),
            what: what.to_owned(),
        })
    }

    /// Each message is paired with its report.
    #[test]
    fn messages_are_paired_with_reports() {
        let (start, mut tally) = (Instant::now(), Tally::default());
        let at = |millis| start + Duration::from_millis(millis);
        let mut record = |millis, happening| tally.record(at(millis), happening);
        assert_eq!(
            record(0, Happening::Reported(vec![message("a"), message(" ok")])),
            None
        );
        assert_eq!(record(10, Happening::Reported(vec![message(" ok")])), None);
        assert_eq!(
            record(12, posted(" ok", 503)),
            line(None, "message “ ok”: 503")
        );
        assert_eq!(
            record(15, posted(" ok", 200)),
            line(Some(15), "message “ ok”")
        );
        assert_eq!(
            record(16, posted(" ok", 200)),
            line(Some(6), "message “ ok”")
        );
        assert_eq!(record(17, posted(" ok", 200)), line(None, "message “ ok”"));
        assert_eq!(
            record(18, posted("a", 422)),
            line(None, "message “a”: permanently rejected")
        );
        assert_eq!((tally.events(), tally.requests()), (3, 5));
    }

    /// A line about a change of a chat has its delay.
    #[test]
    fn chat_changes_show_their_delay() {
        let (start, mut tally) = (Instant::now(), Tally::default());
        let at = |millis| start + Duration::from_millis(millis);
        let mut record = |millis, happening| tally.record(at(millis), happening);
        let (time, agent) = ("2025-11-22T22:03:27Z", "its id");
        record(
            0,
            Happening::Reported(vec![reported(4, "START", Value::Null)]),
        );
        let chat = json!({ "external_id": "4", "started_at": time, "agent_id": agent });
        assert_eq!(
            record(9, answered("POST", None, chat, 201)),
            line(Some(9), "new chat, started 22:03:27, with Zoë Ng")
        );
        let change = ["TRANSFER", "END"].map(|name| reported(4, name, Value::Null));
        record(1000, Happening::Reported(change.into()));
        let change = json!({ "ended_at": time, "agent_id": agent });
        assert_eq!(
            record(1007, answered("PATCH", Some("4"), change, 204)),
            line(Some(7), "ended 22:03:27, now with Zoë Ng")
        );
    }

    #[test]
    fn figures_align_with_headings() {
        let [owners, headings] = headings();
        let mut tally = Tally::new(false);
        tally.record(Instant::now(), Happening::Reported(vec![message("a")]));
        tally.record(Instant::now(), Happening::Failed);
        let snapshot = Snapshot {
            chats: 2,
            failed: 9,
            ..Snapshot::default()
        };
        let figures = tally.figures(&snapshot);
        assert!(headings.len() <= 80, "it fits a terminal");
        for (heading, figure) in [
            ("events", "1"),
            ("errors", "1"),
            ("chats", "2"),
            ("failed", "9"),
        ] {
            let end = headings.find(heading).expect(heading) + heading.len();
            assert!(
                figures[..end].ends_with(&format!(" {figure}")),
                "{heading}: {figures:?}"
            );
        }
        assert_eq!(owners.find("daemon"), headings.find("waiting"));
    }

    #[test]
    fn failed_poll_reports_losses() {
        for (reported_again, says) in [(true, "reported again"), (false, "not recoverable")] {
            let mut tally = Tally::new(reported_again);
            let line = tally
                .record(Instant::now(), Happening::Failed)
                .expect("a line");
            assert!(line.what.contains(says), "{line:?}");
            assert!(tally.failed_polls().to_string().contains(says));
        }
    }

    #[test]
    fn foreign_text_is_safe_and_short() {
        let mut tally = Tally::default();
        let mut what = |text: &str| {
            let line = tally.record(Instant::now(), posted(text, 200));
            line.expect("a line").what
        };
        assert_eq!(
            what("\u{1b}[2J\r\nhello"),
            "message “\u{fffd}[2J\u{fffd}\u{fffd}hello”"
        );
        assert_eq!(
            what(&"é".repeat(99)),
            format!("message “{}…”", "é".repeat(SHOWN))
        );
    }
}
