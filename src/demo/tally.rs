//! Figures and messages about what has happened.
//!
//! They are based only on what BigChat reported, what OurAPI answered, and counts of the journal. Foreign text is shown
//! without control characters.

use std::collections::HashSet;

use serde_json::Value;

use super::chaos::Score;
use super::result::FailedPolls;
use crate::simulator::{Answered, Happening};
use crate::telemetry::terminal::printable;

/// How many characters of a text are shown: enough to recognize it in a line of 80 columns.
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
    /// The service or the conversation.
    pub(super) who: String,
    pub(super) what: String,
}

/// The state of OurAPI and of the journal, as read for a frame.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Snapshot {
    /// The chats that OurAPI has.
    pub(super) chats: usize,
    pub(super) agents: usize,
    pub(super) messages: usize,
    /// The most requests that OurAPI ever carried out at once.
    pub(super) at_once: usize,
    /// The events that are waiting in the daemon's journal.
    pub(super) waiting: usize,
    /// The failed events in the journal.
    pub(super) failed: usize,
    /// The discarded events in the journal.
    pub(super) discarded: usize,
    /// The faults so far, with `--chaos`.
    pub(super) score: Option<Score>,
}

#[derive(Debug, Default)]
pub(super) struct Tally {
    events: usize,
    conversations: HashSet<i64>,
    failed_polls: FailedPolls,
    requests: usize,
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

    /// Counts what happened. Returns a line to show, if there is one.
    pub(super) fn record(&mut self, happening: Happening) -> Option<Line> {
        match happening {
            Happening::Reported(conversations) => {
                self.events += conversations.len();
                self.conversations.extend(conversations);
                None
            }
            Happening::Failed => {
                self.failed_polls.count += 1;
                let what = match self.failed_polls.reported_again {
                    true => "poll failed; its events will be reported again",
                    false => "poll failed; its events are not recoverable",
                };
                Some(Line {
                    who: "BigChat".to_owned(),
                    what: what.to_owned(),
                })
            }
            Happening::Struck(what) => Some(Line {
                who: "chaos".to_owned(),
                what,
            }),
            Happening::Answered(answered) => {
                self.requests += 1;
                line_about(&answered)
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

    /// How many requests OurAPI answered.
    pub(super) fn requests(&self) -> usize {
        self.requests
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
    /// The faults so far, and whether the daemon is running; empty without chaos.
    pub(super) fn chaos(&self) -> String {
        match self.score {
            None => String::new(),
            Some(score) if score.up => format!("daemon up; {score}"),
            Some(score) => format!("daemon down; {score}"),
        }
    }
}

/// The line about a request that OurAPI answered.
fn line_about(answered: &Answered) -> Option<Line> {
    let Answered {
        route,
        chat,
        body,
        status,
        ..
    } = answered;
    let good = (200..300).contains(status);
    let conversation = |id: &str| format!("conversation {}", printable(id));
    let (who, what) = match (route.as_str(), chat) {
        ("POST /agents", _) => {
            let name = quoted(&body["name"]);
            let what = match status {
                _ if good => format!("new agent {name}"),
                500 | 409 => format!("new agent {name}: {status}, the name may be taken"),
                _ => format!("new agent {name}: {status}"),
            };
            ("OurAPI".to_owned(), what)
        }
        ("POST /chats", _) if good => {
            let id = body["external_id"].as_str().unwrap_or_default();
            let what = format!("new chat, {}", changes(answered, "with"));
            (conversation(id), what)
        }
        ("PATCH /chats/{id}", Some(chat)) if good => {
            (conversation(chat), changes(answered, "now with"))
        }
        ("POST /chats/{id}/messages", Some(chat)) => {
            let text = quoted(&body["text"]);
            let what = match status {
                _ if good => format!("message {text}"),
                422 => format!("message {text}: permanently rejected"),
                _ => format!("message {text}: {status}"),
            };
            (conversation(chat), what)
        }
        _ if good => return None,
        _ => ("OurAPI".to_owned(), format!("{route}: {status}")),
    };
    Some(Line { who, what })
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

    /// The text about conversation 4.
    fn what(happening: Happening) -> String {
        let line = Tally::default().record(happening).expect("a line");
        assert_eq!(line.who, "conversation 4");
        line.what
    }

    #[test]
    fn lines_about_answers() {
        let (time, agent) = ("2025-11-22T22:03:27Z", "its id");
        let chat = json!({ "external_id": "4", "started_at": time, "agent_id": agent });
        let change = json!({ "ended_at": time, "agent_id": agent });
        for (happening, expected) in [
            (posted("a", 201), "message “a”"),
            (posted("a", 503), "message “a”: 503"),
            (posted("a", 422), "message “a”: permanently rejected"),
            (
                answered("POST", None, chat, 201),
                "new chat, started 22:03:27, with Zoë Ng",
            ),
            (
                answered("PATCH", Some("4"), change, 204),
                "ended 22:03:27, now with Zoë Ng",
            ),
        ] {
            assert_eq!(what(happening), expected);
        }
    }

    #[test]
    fn figures_align_with_headings() {
        let [owners, headings] = headings();
        let mut tally = Tally::new(false);
        tally.record(Happening::Reported(vec![4]));
        tally.record(Happening::Failed);
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
            let line = tally.record(Happening::Failed).expect("a line");
            assert!(line.what.contains(says), "{line:?}");
            assert!(tally.failed_polls().to_string().contains(says));
        }
    }

    #[test]
    fn foreign_text_is_safe_and_short() {
        let what = |text: &str| what(posted(text, 200));
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
