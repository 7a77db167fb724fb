//! Events as BigChat returns them, at times in seconds after [`T0`].

use serde_json::{Value, json};

/// 2026-11-22T22:00:00Z, in Unix seconds.
pub const T0: i64 = 1_795_384_800;

/// The names of events. The second value is the field of `data` that has the text of a message; `None`: the event is
/// not a message.
pub const KINDS: [(&str, Option<&str>); 4] = [
    ("START", None),
    ("END", None),
    ("MESSAGE", Some("message")),
    ("TRANSFER", None),
];

/// The field of a kind's text; `None`: there is no such kind.
fn text_field(name: &str) -> Option<Option<&'static str>> {
    let kind = KINDS.iter().find(|(known, _)| *known == name);
    kind.map(|(_, field)| *field)
}

pub(super) fn is_known(name: &str) -> bool {
    text_field(name).is_some()
}

pub(super) fn is_message(name: &str) -> bool {
    text_field(name).flatten().is_some()
}

/// The text of a message, as reported; `None`: the event is not a message, or has no text.
pub fn message_text<'a>(name: &str, data: &'a Value) -> Option<&'a str> {
    data[text_field(name)??].as_str()
}

/// An event at a time in Unix seconds.
pub(super) fn event_at(conversation: i64, name: &str, at: i64, data: Value) -> Value {
    json!({"conversation_id": conversation, "event_name": name, "event_at": at, "data": data})
}

pub fn event(conversation: i64, name: &str, at: i64, data: Value) -> Value {
    event_at(conversation, name, T0 + at, data)
}

pub fn start(conversation: i64, at: i64) -> Value {
    event(conversation, "START", at, Value::Null)
}

pub fn end(conversation: i64, at: i64) -> Value {
    event(conversation, "END", at, Value::Null)
}

pub fn message(conversation: i64, at: i64, text: &str) -> Value {
    event(conversation, "MESSAGE", at, json!({ "message": text }))
}

/// A TRANSFER to another advisor.
pub fn transfer(conversation: i64, at: i64, advisor: i64) -> Value {
    let data = json!({"old_advisor_id": 1, "new_advisor_id": advisor});
    event(conversation, "TRANSFER", at, data)
}
