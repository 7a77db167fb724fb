//! `bigchat-sync conversation`: the events of one of BigChat's conversations, and the outcome of each.

use std::path::Path;

use serde::Serialize;

use super::table::{Row, counted, table};
use super::{CommandError, json};
use crate::domain::ids::EventId;
use crate::domain::progress::Effect;
use crate::domain::time::{Millis, Timestamp};
use crate::journal::{ConversationRow, EventRow, EventState, Store};
use crate::settings::number;
use crate::status;
use crate::telemetry::terminal::printable;

/// Which conversation.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// BigChat's id of the conversation.
    #[arg(value_name = "ID", value_parser = number::<i64>, allow_negative_numbers = true)]
    id: i64,

    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// All conversations that had this id, and their events.
#[derive(Debug, Serialize)]
struct Answer {
    now: Millis,
    /// Why nothing can be sent to OurAPI now; `None`: events can be sent.
    our_api_waits_for: Option<String>,
    /// The latest epoch first.
    conversations: Vec<WithEvents>,
    /// Events that could not be parsed but name the id.
    unparsed_events: Vec<EventId>,
}

#[derive(Debug, Serialize)]
struct WithEvents {
    #[serde(flatten)]
    conversation: ConversationRow,
    events: Vec<EventRow>,
}

/// Returns what to print.
pub fn run(db: &Path, args: &Args) -> Result<String, CommandError> {
    let mut store = Store::open_reader(db)?;
    let now = Millis::now();
    let found = store.conversations_of(args.id)?;
    let mut answer = Answer {
        now,
        our_api_waits_for: status::our_api_waits_for(&mut store, now)?,
        conversations: Vec::with_capacity(found.len()),
        unparsed_events: store.unparsed_of(args.id)?,
    };
    for conversation in found {
        let (mut events, mut next) = (Vec::new(), Some(0));
        while let Some(after) = next {
            let page = store.events_of(conversation.key, EventId(after))?;
            events.extend(page.rows);
            next = page.next;
        }
        answer.conversations.push(WithEvents {
            conversation,
            events,
        });
    }
    if answer.conversations.is_empty() && answer.unparsed_events.is_empty() {
        return Err(CommandError::NoSuchConversation(args.id));
    }
    if args.json {
        return Ok(json::text(&answer)?);
    }
    Ok(text(&answer))
}

fn text(answer: &Answer) -> String {
    let mut text = String::new();
    for WithEvents {
        conversation,
        events,
    } in &answer.conversations
    {
        for (name, value) in about(conversation) {
            text += &format!("{name:<14}{}\n", printable(&value));
        }
        text.push('\n');
        if events.is_empty() {
            text += "none of its events are stored\n\n";
            continue;
        }
        let rows: Vec<_> = events.iter().map(row).collect();
        let header = ["id", "event", "at", "received", "state", "how, or why not"];
        text += &table(header, &rows);
        text.push('\n');
    }
    for id in &answer.unparsed_events {
        text += &format!(
            "event {id} names this conversation and could not be parsed; `bigchat-sync failed show {id}` shows it\n"
        );
    }
    if let Some(reason) = &answer.our_api_waits_for {
        text += &format!("nothing is sent now: {}\n", printable(reason));
    }
    text
}

/// The lines about a conversation, its chat and its agent.
fn about(conversation: &ConversationRow) -> Vec<(&'static str, String)> {
    let ConversationRow {
        conversation: id,
        epoch,
        current_epoch,
        ..
    } = conversation;
    let which = match epoch == current_epoch {
        true => format!("{id}, epoch {epoch}"),
        false => {
            format!(
                "{id}, epoch {epoch} (BigChat has restarted since; the current epoch is {current_epoch})"
            )
        }
    };
    let times = |started: Option<Timestamp>, ended: Option<Timestamp>| {
        let started =
            started.map_or_else(|| "start unknown".to_owned(), |at| format!("started {at}"));
        let ended = ended.map_or_else(|| "not ended".to_owned(), |at| format!("ended {at}"));
        format!("{started}, {ended}")
    };
    let chat = match (&conversation.chat_id, &conversation.external_id) {
        (Some(chat), external_id) => format!(
            "{}, id {chat}, {}",
            external_id.as_deref().unwrap_or("-"),
            times(conversation.chat_started_at, conversation.chat_ended_at)
        ),
        (None, Some(external_id)) => format!("none yet; its external id is {external_id}"),
        (None, None) => "none yet".to_owned(),
    };
    let agent = match (&conversation.no_agent, &conversation.agent_email) {
        (Some(reason), _) => format!("none: {reason}"),
        (None, Some(email)) => {
            let name = conversation.agent_name.as_deref().unwrap_or_default();
            format!("{name} <{email}>")
        }
        (None, None) => conversation.chat_agent.clone().unwrap_or_default(),
    };
    let mut about = vec![
        ("conversation", which),
        (
            "in BigChat",
            times(conversation.started_at, conversation.ended_at),
        ),
        ("chat", chat),
        ("agent", agent),
    ];
    if let Some(at) = conversation.forgotten_at {
        let by = conversation.forgotten_by.as_deref().unwrap_or_default();
        about.push(("forgotten", format!("at {at} by {by}; its text was erased")));
    }
    if conversation.stale {
        let stale = "the chat in OurAPI may differ from the journal; it is read back before anything is sent";
        about.push(("stale", stale.to_owned()));
    }
    about
}

fn row(event: &EventRow) -> Row<6> {
    Row {
        cells: [
            event.id.to_string(),
            event.kind.clone(),
            event.event_at.to_string(),
            event.received_at.to_string(),
            event.state.to_string(),
            fate(event),
        ],
        text: event.text.clone(),
    }
}

/// When and how an event was delivered, or why not and when the next attempt is due.
fn fate(event: &EventRow) -> String {
    let at = event.state_since.unwrap_or_default();
    let reason = event.reason.as_deref().unwrap_or_default();
    match (event.state, event.attempts) {
        (EventState::Delivered, _) => {
            let effect = match event.effect {
                Some(Effect::Nothing) => "nothing to change",
                Some(effect) => effect.name(),
                None => "delivered",
            };
            format!("{effect} at {at}")
        }
        (EventState::Waiting, _) if reason.is_empty() => "not tried yet".to_owned(),
        (EventState::Waiting, attempts) => {
            let attempts = match attempts {
                // A denial does not count as a failed attempt.
                0 => String::new(),
                _ => format!("{}, the last one: ", counted(attempts, "failed attempt")),
            };
            let next = event
                .next_at
                .map_or_else(String::new, |at| format!("; next at {at}"));
            format!("{attempts}{reason}{next}")
        }
        (EventState::Failed, _) => format!("at {at}: {reason}"),
        (EventState::Discarded, _) => format!("at {at}"),
        (EventState::Forgotten, _) => "its text was erased".to_owned(),
    }
}
