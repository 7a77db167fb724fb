//! What has happened so far, counted and in words: what the simulated services do goes in, what can be shown comes out.
//!
//! It looks at both ends only, what BigChat told and what OurAPI answered, and pairs them up to say how long each event
//! took in between. What it shows of strangers' words has nothing in it that a terminal would obey.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use chrono::DateTime;
use serde_json::Value;

use super::chaos::Score;
use crate::simulator::bigchat::Reported;
use crate::simulator::{Answered, Happening};
use crate::telemetry::terminal::printable;

/// More of a message than this does not help to tell it from others, and a line is to fit 80 columns.
const SHOWN: usize = 38;

/// How many counters there are.
pub(super) const ROWS: usize = 6;

/// The kinds of events, in the order in which they are shown.
const KINDS: [&str; 4] = ["START", "MESSAGE", "TRANSFER", "END"];

/// One thing that happened, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    /// From BigChat's answer to OurAPI's, where both are known.
    pub(super) took: Option<Duration>,
    /// Whom it is about.
    pub(super) who: String,
    /// What happened.
    pub(super) what: String,
}

/// What is not known from the services' doings, but looked up.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Looked {
    /// The chats that OurAPI holds.
    pub(super) chats: usize,
    /// The agents that it holds.
    pub(super) agents: usize,
    /// The messages that it holds.
    pub(super) messages: usize,
    /// The most requests that it ever carried out at once.
    pub(super) at_once: usize,
    /// The events that wait in the daemon's journal.
    pub(super) waiting: usize,
    /// The failed events there.
    pub(super) failed: usize,
    /// Those that somebody has given up.
    pub(super) discarded: usize,
    /// What has struck so far, if anything is to.
    pub(super) score: Option<Score>,
}

/// The counts, and what is told of and not answered yet.
#[derive(Debug, Default)]
pub(super) struct Tally {
    told: BTreeMap<String, usize>,
    conversations: HashSet<i64>,
    failures: usize,
    requests: usize,
    /// When a message was told, by conversation, time and text as OurAPI keeps it.
    messages: HashMap<(String, i64, String), VecDeque<Instant>>,
    /// When a conversation was last told to end or to be handed over, and when it was first heard of.
    changes: HashMap<(String, &'static str), Instant>,
}

impl Tally {
    /// Takes in what happened; returns what there is to say about it.
    pub(super) fn note(&mut self, at: Instant, happening: Happening) -> Option<Line> {
        match happening {
            Happening::Reported(told) => {
                told.iter().for_each(|told| self.told(at, told));
                None
            }
            Happening::Failed => {
                self.failures += 1;
                Some(Line {
                    took: None,
                    who: "BigChat".to_owned(),
                    what: "answers 500: what it would have told is gone".to_owned(),
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

    /// How many events were told.
    pub(super) fn events(&self) -> usize {
        self.told.values().sum()
    }

    /// How many requests OurAPI got.
    pub(super) fn requests(&self) -> usize {
        self.requests
    }

    fn told(&mut self, at: Instant, told: &Reported) {
        *self.told.entry(told.name.clone()).or_default() += 1;
        let chat = told.conversation_id.to_string();
        if self.conversations.insert(told.conversation_id) {
            self.changes.insert((chat.clone(), "START"), at);
        }
        match (told.name.as_str(), told.data["message"].as_str()) {
            ("MESSAGE", Some(text)) => {
                let key = (chat, told.event_at, text.trim().to_owned());
                self.messages.entry(key).or_default().push_back(at);
            }
            ("END", _) => drop(self.changes.insert((chat, "END"), at)),
            ("TRANSFER", _) => drop(self.changes.insert((chat, "TRANSFER"), at)),
            _ => {}
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
        let say = |told: Option<Instant>, who, what| {
            let took = told.map(|told| at.saturating_duration_since(told));
            Some(Line { took, who, what })
        };
        let conversation = |id: &str| format!("conversation {}", printable(id));
        match (route.as_str(), chat) {
            ("POST /agents", _) => {
                let name = quoted(&body["name"]);
                let what = match status {
                    _ if good => format!("new agent {name}"),
                    500 | 409 => format!("new agent {name} meets {status}: is the name taken?"),
                    _ => format!("new agent {name} meets {status}"),
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
                let told = [("ended_at", "END"), ("agent_id", "TRANSFER")]
                    .into_iter()
                    .filter(|(field, _)| !body[*field].is_null())
                    .find_map(|(_, kind)| self.changes.remove(&(chat.clone(), kind)));
                say(told, conversation(chat), changes(answered, "now with"))
            }
            ("POST /chats/{id}/messages", Some(chat)) => {
                // What is not stored now may be, later.
                let told = good.then(|| self.message_told(chat, body)).flatten();
                let text = quoted(&body["text"]);
                let what = match status {
                    _ if good => format!("message {text}"),
                    422 => format!("message {text} is refused for good"),
                    _ => format!("message {text} meets {status}"),
                };
                say(told, conversation(chat), what)
            }
            _ if good => None,
            _ => {
                let what = format!("{route} meets {status}");
                say(None, "OurAPI".to_owned(), what)
            }
        }
    }

    /// When a message that OurAPI got was told.
    fn message_told(&mut self, chat: &str, body: &Value) -> Option<Instant> {
        let sent_at = DateTime::parse_from_rfc3339(body["sent_at"].as_str()?).ok()?;
        let text = body["text"].as_str()?.trim().to_owned();
        let key = (chat.to_owned(), sent_at.timestamp(), text);
        let told = self.messages.get_mut(&key)?;
        let first = told.pop_front();
        if told.is_empty() {
            self.messages.remove(&key);
        }
        first
    }

    /// The counters, for people: what, and how much of it.
    pub(super) fn rows(&self, looked: &Looked) -> [(&'static str, String); ROWS] {
        let kinds = KINDS.map(|kind| {
            let count = self.told.get(kind).copied().unwrap_or_default();
            format!("{count} {kind}")
        });
        [
            ("BigChat told", self.told_in_words()),
            ("", kinds.join("   ")),
            ("OurAPI holds", looked.held_in_words()),
            ("which took", self.requests_in_words(looked)),
            ("daemon keeps", looked.waiting_in_words()),
            match looked.score {
                None => ("", String::new()),
                Some(score) if score.up => ("daemon is up", score.to_string()),
                Some(score) => ("daemon is down", score.to_string()),
            },
        ]
    }

    /// The counters in one line.
    pub(super) fn sentence(&self, looked: &Looked) -> String {
        let score = looked.score.map(|score| {
            let state = if score.up { "up" } else { "down" };
            format!("; daemon {state} after {score}")
        });
        format!(
            "BigChat told {}; OurAPI holds {} after {}; {}{}",
            self.told_in_words(),
            looked.held_in_words(),
            self.requests_in_words(looked),
            looked.waiting_in_words(),
            score.unwrap_or_default()
        )
    }

    fn told_in_words(&self) -> String {
        let failures = match self.failures {
            0 => String::new(),
            1 => ", and answered 500 once".to_owned(),
            failures => format!(", and answered 500 {failures} times"),
        };
        format!(
            "{} of {}{failures}",
            count(self.events(), "event"),
            count(self.conversations.len(), "conversation"),
        )
    }

    fn requests_in_words(&self, looked: &Looked) -> String {
        format!(
            "{}{}, at most {} at once",
            count(self.requests, "request"),
            per_event(self.requests, self.events()),
            looked.at_once
        )
    }
}

impl Looked {
    fn held_in_words(&self) -> String {
        format!(
            "{}, {}, {}",
            count(self.chats, "chat"),
            count(self.agents, "agent"),
            count(self.messages, "message")
        )
    }

    fn waiting_in_words(&self) -> String {
        format!(
            "{} waiting, {} failed",
            count(self.waiting, "event"),
            self.failed
        )
    }
}

/// Of what there is one or more.
pub(super) fn count(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// How many requests that was for each event.
pub(super) fn per_event(requests: usize, events: usize) -> String {
    if events == 0 {
        return String::new();
    }
    format!(" ({:.2} per event)", requests as f64 / events as f64)
}

/// What a request says of a chat besides its name, whose agent is `with` it.
fn changes(answered: &Answered, with: &str) -> String {
    let Answered { agent, body, .. } = answered;
    let time = |name: &str| body[name].as_str().and_then(|time| time.get(11..19));
    let started = time("started_at").map(|time| format!("started {time}"));
    let ended = time("ended_at").map(|time| format!("ended {time}"));
    let agent = agent
        .as_ref()
        .map(|agent| format!("{with} {}", shown(agent)));
    let said: Vec<String> = [started, ended, agent].into_iter().flatten().collect();
    said.join(", ")
}

fn quoted(text: &Value) -> String {
    format!("“{}”", shown(text.as_str().unwrap_or_default()))
}

/// What strangers wrote, harmless and not too long.
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

    fn told(conversation_id: i64, name: &str, data: Value) -> Reported {
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
        told(4, "MESSAGE", json!({ "message": text }))
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

    #[test]
    fn each_message_is_paired_with_its_own_telling() {
        let (start, mut tally) = (Instant::now(), Tally::default());
        let at = |millis| start + Duration::from_millis(millis);
        let mut note = |millis, happening| tally.note(at(millis), happening);
        assert_eq!(
            note(0, Happening::Reported(vec![message("a"), message(" ok")])),
            None
        );
        assert_eq!(note(10, Happening::Reported(vec![message(" ok")])), None);
        assert_eq!(
            note(12, posted(" ok", 503)),
            line(None, "message “ ok” meets 503")
        );
        assert_eq!(
            note(15, posted(" ok", 200)),
            line(Some(15), "message “ ok”")
        );
        assert_eq!(note(16, posted(" ok", 200)), line(Some(6), "message “ ok”"));
        assert_eq!(note(17, posted(" ok", 200)), line(None, "message “ ok”"));
        assert_eq!(
            note(18, posted("a", 422)),
            line(None, "message “a” is refused for good")
        );
        assert_eq!((tally.events(), tally.requests()), (3, 5));
    }

    #[test]
    fn what_changes_a_chat_is_said_with_the_time_since_it_was_told() {
        let (start, mut tally) = (Instant::now(), Tally::default());
        let at = |millis| start + Duration::from_millis(millis);
        let mut note = |millis, happening| tally.note(at(millis), happening);
        let (time, agent) = ("2025-11-22T22:03:27Z", "its id");
        note(0, Happening::Reported(vec![told(4, "START", Value::Null)]));
        let chat = json!({ "external_id": "4", "started_at": time, "agent_id": agent });
        assert_eq!(
            note(9, answered("POST", None, chat, 201)),
            line(Some(9), "new chat, started 22:03:27, with Zoë Ng")
        );
        let change = ["TRANSFER", "END"].map(|name| told(4, name, Value::Null));
        note(1000, Happening::Reported(change.into()));
        let change = json!({ "ended_at": time, "agent_id": agent });
        assert_eq!(
            note(1007, answered("PATCH", Some("4"), change, 204)),
            line(Some(7), "ended 22:03:27, now with Zoë Ng")
        );
    }

    #[test]
    fn strangers_words_are_harmless_and_short() {
        let mut tally = Tally::default();
        let mut what = |text: &str| {
            let line = tally.note(Instant::now(), posted(text, 200));
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
