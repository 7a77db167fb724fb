//! Derives what OurAPI should have from what BigChat reported, and compares that with what OurAPI has.
//!
//! The expected state follows from the specification, without any of the daemon's code. If BigChat restarted and forgot
//! what only it knew, several results are accepted; [`Report::fallbacks`] counts such chats. Scripted pages of
//! [`Mode::Once`](super::bigchat::Mode::Once) that imitate a shifting log are not supported: every equal MESSAGE of one
//! poll counts as a separate message.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
};

use chrono::{DateTime, Datelike, NaiveDateTime};
use comfy_table::{Cell, Table, presets};
use uuid::Uuid;

use super::{
    bigchat::{Advisor, Reported},
    event::{is_message, message_text},
    our_api::{Agent, Chat, Data, Message},
};

/// The settings that affect the result, and the initial state.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// The prefix of each `external_id`.
    pub prefix: String,
    /// Whether messages may name an agent.
    pub credited: bool,
    /// What OurAPI had before the daemon wrote to it.
    pub before: Data,
}

/// The expected state.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// By epoch and conversation.
    pub chats: Vec<ExpectedChat>,
    /// The names reported for each advisor's e-mail address.
    pub names: BTreeMap<String, BTreeSet<String>>,
}

/// An expected chat. If several values are accepted, the first is the usual one.
#[derive(Clone, Debug)]
pub struct ExpectedChat {
    /// The accepted external ids.
    pub external_ids: Vec<String>,
    /// The accepted start times.
    pub started_at: Vec<NaiveDateTime>,
    /// The accepted agents, by e-mail address.
    pub agents: Vec<Option<String>>,
    pub ended_at: Option<NaiveDateTime>,
    /// The messages, with the number of copies of each.
    pub messages: BTreeMap<(NaiveDateTime, String), usize>,
    /// How many more messages were reported that OurAPI can never store.
    pub refused: usize,
}

/// The result for one chat.
#[derive(Clone, Debug, Default)]
pub struct Line {
    /// The chat's `external_id`.
    pub chat: String,
    /// Expected messages.
    pub expected: usize,
    /// Messages in OurAPI.
    pub held: usize,
    /// Missing messages, one entry for each copy.
    pub missing: Vec<(NaiveDateTime, String)>,
    /// Unexpected messages, including duplicates.
    pub extra: Vec<(NaiveDateTime, String)>,
    /// Other differences, in words.
    pub differences: Vec<String>,
    /// Whether a value other than the usual one was accepted.
    pub fallback: bool,
}

impl Line {
    fn is_clean(&self) -> bool {
        self.missing.is_empty() && self.extra.is_empty() && self.differences.is_empty()
    }
}

/// The result for all chats. Its `Display` is a table of the chats that differ, and a summary.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// A line for each chat, expected or found.
    pub lines: Vec<Line>,
    /// Differences of agents, in words.
    pub agents: Vec<String>,
    /// Reported messages that OurAPI can never store. They are not expected.
    pub refused: usize,
}

impl Report {
    /// Whether OurAPI has exactly what is expected.
    pub fn is_clean(&self) -> bool {
        self.agents.is_empty() && self.lines.iter().all(Line::is_clean)
    }

    /// Chats compared.
    pub fn chats(&self) -> usize {
        self.lines.len()
    }

    /// Expected messages.
    pub fn expected(&self) -> usize {
        self.lines.iter().map(|line| line.expected).sum()
    }

    /// Messages in OurAPI.
    pub fn held(&self) -> usize {
        self.lines.iter().map(|line| line.held).sum()
    }

    /// Missing messages.
    pub fn missing(&self) -> usize {
        self.lines.iter().map(|line| line.missing.len()).sum()
    }

    /// Unexpected messages, including duplicates.
    pub fn extra(&self) -> usize {
        self.lines.iter().map(|line| line.extra.len()).sum()
    }

    /// Chats for which a value other than the usual one was accepted.
    pub fn fallbacks(&self) -> usize {
        self.lines.iter().filter(|line| line.fallback).count()
    }
}

/// The time as OurAPI stores it; `None`: out of its range.
fn time(at: i64) -> Option<NaiveDateTime> {
    let time = DateTime::from_timestamp(at, 0)?.naive_utc();
    (1..=9999).contains(&time.year()).then_some(time)
}

/// The text as OurAPI stores it; `None`: it cannot be stored.
fn storable(text: &str) -> Option<String> {
    let text = text.trim();
    (text.chars().count() >= 2).then(|| text.to_owned())
}

/// The e-mail address of an advisor who can become an agent in OurAPI.
fn address(advisor: &Advisor) -> Option<String> {
    storable(&advisor.name).and(storable(&advisor.email_address))
}

/// Whether an event has all required data. Other events belong to no chat.
fn understood(reported: &Reported) -> bool {
    let complete = match reported.name.as_str() {
        name if is_message(name) => message_text(name, &reported.data).is_some(),
        "TRANSFER" => reported.data["new_advisor_id"].is_i64(),
        _ => true,
    };
    complete && reported.event_at >= 0 && time(reported.event_at).is_some()
}

/// The expected state after these events. Lost ones are left out.
pub fn expected(reported: &[Reported], rules: &Rules) -> Expected {
    let mut conversations = BTreeMap::<(u32, i64), Vec<&Reported>>::new();
    let mut all = Expected::default();
    for reported in reported
        .iter()
        .filter(|reported| !reported.lost && understood(reported))
    {
        conversations
            .entry((reported.epoch, reported.conversation_id))
            .or_default()
            .push(reported);
        for advisor in [&reported.first_advisor, &reported.advisor]
            .into_iter()
            .flatten()
        {
            if let Some(address) = address(advisor) {
                all.names
                    .entry(address)
                    .or_default()
                    .insert(advisor.name.trim().to_owned());
            }
        }
    }
    // With a log, the details of a conversation name the current advisor, even after a TRANSFER that BigChat forgot
    // before it reported it.
    let mut gone = HashMap::<(u32, i64), Vec<&Advisor>>::new();
    for reported in reported
        .iter()
        .filter(|reported| reported.lost && reported.forgotten && reported.poll == 0)
    {
        if let Some(advisor) = &reported.advisor {
            gone.entry((reported.epoch, reported.conversation_id))
                .or_default()
                .push(advisor);
        }
    }
    let mut used: HashMap<String, Option<NaiveDateTime>> = rules
        .before
        .chats
        .iter()
        .map(|chat| (chat.external_id.clone(), Some(chat.started_at)))
        .collect();
    for (identity @ (_, id), events) in &conversations {
        let mut chat = expected_chat(format!("{}{id}", rules.prefix), events, &used);
        let by_events = events.iter().any(|reported| reported.name == "TRANSFER");
        for advisor in gone.get(identity).into_iter().flatten() {
            if let Some(address) = address(advisor) {
                // An agent may be created even if a later TRANSFER was reported.
                let names = all.names.entry(address.clone()).or_default();
                names.insert(advisor.name.trim().to_owned());
                if !by_events {
                    chat.agents.push(Some(address));
                }
            }
        }
        // Later epochs use other external ids, whatever the start time.
        used.insert(format!("{}{id}", rules.prefix), None);
        all.chats.push(chat);
    }
    all
}

fn expected_chat(
    plain: String,
    events: &[&Reported],
    used: &HashMap<String, Option<NaiveDateTime>>,
) -> ExpectedChat {
    // Of the events with the latest time, the last to arrive. A repeated report does not count as an arrival.
    let last_at = |name: &str| {
        let of_kind = || events.iter().filter(|reported| reported.name == name);
        let latest = of_kind().map(|reported| reported.event_at).max()?;
        let tied: Vec<_> = of_kind()
            .filter(|reported| reported.event_at == latest)
            .collect();
        let arrives = |at: &usize| {
            tied[..*at]
                .iter()
                .all(|reported| reported.data != tied[*at].data)
        };
        let last = (0..tied.len()).rev().find(arrives)?;
        Some(tied[last])
    };
    let forgotten = events.iter().any(|reported| reported.forgotten);
    let known_start = events
        .iter()
        .find(|reported| reported.name == "START")
        .map(|reported| reported.event_at);
    let mut started_at: Vec<_> = known_start
        .or(events.first().and_then(|reported| reported.started_at))
        .into_iter()
        .collect();
    // The start may be unknown when the chat is created by another event, and may stay unknown.
    let mut created_at = started_at.clone();
    if forgotten {
        created_at.extend(events.iter().map(|reported| reported.event_at));
        if known_start.is_none() {
            started_at.extend(events.iter().map(|reported| reported.event_at).min());
        }
    }
    let started_at: Vec<_> = started_at.into_iter().filter_map(time).collect();
    let is_taken = match used.get(&plain) {
        None => false,
        Some(None) => true,
        Some(Some(start)) => !started_at.contains(start),
    };
    let external_ids = if is_taken {
        let with_start = |at| format!("{plain}@{}Z", at_seconds(at));
        created_at
            .into_iter()
            .filter_map(time)
            .map(with_start)
            .collect()
    } else {
        vec![plain]
    };
    let advisor = match last_at("TRANSFER") {
        Some(transfer) => transfer.advisor.as_ref(),
        None => events
            .first()
            .and_then(|reported| reported.first_advisor.as_ref()),
    };
    let mut agents = vec![advisor.and_then(|advisor| address(advisor))];
    if forgotten {
        agents.push(None);
    }
    // An equal message in several polls is the same one. The poll with the most copies counts.
    let mut by_poll = BTreeMap::<(i64, &str), BTreeMap<u64, usize>>::new();
    for reported in events {
        let Some(text) = message_text(&reported.name, &reported.data) else {
            continue;
        };
        *by_poll
            .entry((reported.event_at, text))
            .or_default()
            .entry(reported.poll)
            .or_default() += 1;
    }
    let (mut messages, mut refused) = (BTreeMap::new(), 0);
    for ((at, text), polls) in by_poll {
        let count = polls.into_values().max().unwrap_or(0);
        match time(at).zip(storable(text)) {
            Some(message) => *messages.entry(message).or_default() += count,
            None => refused += count,
        }
    }
    let ended_at = last_at("END").and_then(|reported| time(reported.event_at));
    ExpectedChat {
        external_ids,
        started_at,
        agents,
        ended_at,
        messages,
        refused,
    }
}

fn at_seconds(time: NaiveDateTime) -> impl fmt::Display {
    time.format("%Y-%m-%dT%H:%M:%S")
}

/// Compares the expected state with the actual one.
pub fn compare(expected: &Expected, held: &Data, rules: &Rules) -> Report {
    let agents: HashMap<Uuid, &Agent> = held
        .agents
        .iter()
        .map(|agent| (agent.agent_id, agent))
        .collect();
    let mut by_external_id = HashMap::<&str, Vec<&Chat>>::new();
    for chat in &held.chats {
        by_external_id
            .entry(&chat.external_id)
            .or_default()
            .push(chat);
    }
    let mut report = Report {
        lines: Vec::new(),
        agents: doubtful_agents(expected, held, rules),
        refused: expected.chats.iter().map(|chat| chat.refused).sum(),
    };
    let mut matched = BTreeSet::new();
    // An alternative external id of one chat is often the usual one of another.
    let is_held = |id: &&String| by_external_id.contains_key(id.as_str());
    let own = expected
        .chats
        .iter()
        .filter_map(|wanted| wanted.external_ids.first());
    let mut claimed: BTreeSet<&String> = own.filter(is_held).collect();
    for wanted in &expected.chats {
        let own = wanted.external_ids.first().filter(is_held);
        let id = own.or_else(|| {
            wanted
                .external_ids
                .iter()
                .find(|id| is_held(id) && claimed.insert(id))
        });
        let chats = id
            .and_then(|id| by_external_id.get(id.as_str()))
            .map_or(&[][..], Vec::as_slice);
        matched.extend(chats.iter().map(|chat| chat.chat_id));
        report.lines.push(line(wanted, chats, &agents, held, rules));
    }
    let before: BTreeSet<Uuid> = rules.before.chats.iter().map(|chat| chat.chat_id).collect();
    for chat in held
        .chats
        .iter()
        .filter(|chat| !matched.contains(&chat.chat_id) && !before.contains(&chat.chat_id))
    {
        let held = held.messages.get(&chat.chat_id).map_or(0, Vec::len);
        let differences = vec!["not expected".to_owned()];
        report.lines.push(Line {
            chat: chat.external_id.clone(),
            held,
            differences,
            ..Line::default()
        });
    }
    report
}

fn line(
    wanted: &ExpectedChat,
    chats: &[&Chat],
    agents: &HashMap<Uuid, &Agent>,
    held: &Data,
    rules: &Rules,
) -> Line {
    let name = chats
        .first()
        .map(|chat| &chat.external_id)
        .or(wanted.external_ids.first());
    let mut line = Line {
        chat: name.cloned().unwrap_or_default(),
        ..Line::default()
    };
    match chats {
        [] => line.differences.push("no such chat".to_owned()),
        [_] => {}
        more => line.differences.push(format!("{} chats", more.len())),
    }
    if let Some(chat) = chats.first() {
        let agent = chat.agent_id.map(|id| {
            agents.get(&id).map_or_else(
                || format!("unknown agent {id}"),
                |agent| agent.email.clone(),
            )
        });
        let mut check = |what: &str, is: &str, at: Option<usize>, should: &str| match at {
            None => line.differences.push(format!("{what} {is}, not {should}")),
            Some(at) => line.fallback |= at > 0,
        };
        let show = |time: Option<&NaiveDateTime>| {
            time.map_or_else(
                || "none".to_owned(),
                |time| format!("{}", time.format("%F %T%.f")),
            )
        };
        let start = wanted
            .started_at
            .iter()
            .position(|start| *start == chat.started_at);
        check(
            "started",
            &show(Some(&chat.started_at)),
            start,
            &show(wanted.started_at.first()),
        );
        let end = (wanted.ended_at == chat.ended_at).then_some(0);
        check(
            "ended",
            &show(chat.ended_at.as_ref()),
            end,
            &show(wanted.ended_at.as_ref()),
        );
        let should = wanted.agents.first().cloned().flatten();
        let none = || "none".to_owned();
        let who = wanted.agents.iter().position(|wanted| *wanted == agent);
        check(
            "agent",
            &agent.unwrap_or_else(none),
            who,
            &should.unwrap_or_else(none),
        );
        line.fallback |= wanted.external_ids.first() != Some(&chat.external_id);
    }
    let mut left = wanted.messages.clone();
    line.expected = left.values().sum();
    for Message {
        sent_at,
        text,
        agent_id,
        ..
    } in chats
        .iter()
        .flat_map(|chat| held.messages.get(&chat.chat_id))
        .flatten()
    {
        line.held += 1;
        if agent_id.is_some() && !rules.credited {
            line.differences
                .push(format!("message names an agent: {text:?}"));
        }
        let message = (*sent_at, text.clone());
        match left.get_mut(&message) {
            Some(count) if *count > 0 => *count -= 1,
            _ => line.extra.push(message),
        }
    }
    line.missing = left
        .into_iter()
        .flat_map(|(message, count)| std::iter::repeat_n(message, count))
        .collect();
    line
}

/// Agents that are duplicated, misnamed or unexpected.
fn doubtful_agents(expected: &Expected, held: &Data, rules: &Rules) -> Vec<String> {
    let mut doubtful = Vec::new();
    let before: BTreeSet<Uuid> = rules
        .before
        .agents
        .iter()
        .map(|agent| agent.agent_id)
        .collect();
    let mut seen = BTreeSet::new();
    for agent in &held.agents {
        let email = agent.email.trim();
        if !seen.insert(email) {
            doubtful.push(format!("{email} exists twice"));
        }
        if before.contains(&agent.agent_id) {
            continue;
        }
        let Some(names) = expected.names.get(email) else {
            doubtful.push(format!("{email} belongs to no advisor"));
            continue;
        };
        let taken = |name: &str| {
            held.agents
                .iter()
                .any(|other| other.agent_id != agent.agent_id && other.name == name)
        };
        let fits = |name: &String| {
            agent.name == *name || (agent.name == format!("{name} ({email})") && taken(name))
        };
        if !names.iter().any(fits) {
            doubtful.push(format!(
                "{email} has the name {:?}, not {names:?}",
                agent.name
            ));
        }
    }
    doubtful
}

/// The maximum number of rows: about a screen.
const ROWS: usize = 40;
/// How many differences of one chat are shown. They usually have one cause.
const SHOWN: usize = 3;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wrong = || self.lines.iter().filter(|line| !line.is_clean());
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        table.set_header([
            "chat",
            "expected",
            "found",
            "missing",
            "extra",
            "differences",
        ]);
        for line in wrong().take(ROWS) {
            let of = |word: &'static str| {
                move |(at, text): &(NaiveDateTime, String)| {
                    format!("{word} {} {text:?}", at.format("%T"))
                }
            };
            let words = line
                .differences
                .iter()
                .cloned()
                .chain(line.missing.iter().map(of("missing")))
                .chain(line.extra.iter().map(of("extra")));
            let counts = [
                line.expected,
                line.held,
                line.missing.len(),
                line.extra.len(),
            ];
            let mut row = vec![Cell::new(&line.chat)];
            row.extend(counts.map(Cell::new));
            row.push(Cell::new(words.take(SHOWN).collect::<Vec<_>>().join("\n")));
            table.add_row(row);
        }
        let wrong = wrong().count();
        if wrong > 0 {
            writeln!(f, "{table}")?;
        }
        if wrong > ROWS {
            writeln!(f, "… and {} more", wrong - ROWS)?;
        }
        for agent in &self.agents {
            writeln!(f, "agent {agent}")?;
        }
        write!(
            f,
            "{} compared, {wrong} with differences; {} expected, {} found, {} missing, {} extra; {} with differences",
            count(self.chats(), "chat"),
            count(self.expected(), "message"),
            self.held(),
            self.missing(),
            self.extra(),
            count(self.agents.len(), "agent"),
        )
    }
}

/// A count with its noun.
pub fn count(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}
