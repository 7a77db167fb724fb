//! What BigChat tells: events, read one by one, so that one that cannot be understood does not hurt its page.

use std::fmt;
use std::hash::Hasher;

use serde::Deserialize;
use serde_json::Value;
use siphasher::sip::SipHasher13;
use thiserror::Error;

use crate::domain::json::{self, Integer, Malformed};
use crate::domain::text::has_undecoded;
use crate::domain::time::Timestamp;

/// The four things that happen to a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// The conversation began.
    Start,
    /// The conversation ended; told again and again for the same one, the latest counts.
    End,
    /// Somebody wrote something; BigChat does not say who.
    Message,
    /// Another advisor took over, or the same one again.
    Transfer,
}

impl EventKind {
    /// All of them, in the order in which charts stack them.
    pub const ALL: [Self; 4] = [Self::Message, Self::Start, Self::Transfer, Self::End];

    /// The name BigChat gives it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Start => "START",
            Self::End => "END",
            Self::Message => "MESSAGE",
            Self::Transfer => "TRANSFER",
        }
    }

    /// Whether events of this kind are stored as messages of the chat; all others change the chat itself.
    pub fn is_message(self) -> bool {
        match self {
            Self::Message => true,
            Self::Start | Self::End | Self::Transfer => false,
        }
    }

    /// The field of its data without which nothing can be done about it.
    fn needed_field(self) -> Option<&'static str> {
        match self {
            Self::Message => Some("message"),
            Self::Transfer => Some("new_advisor_id"),
            Self::Start | Self::End => None,
        }
    }

    /// The kind BigChat calls `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What happened, with what is needed to do something about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// See [`EventKind::Start`].
    Start,
    /// See [`EventKind::End`].
    End,
    /// See [`EventKind::Message`].
    Message {
        /// The words as BigChat told them; OurAPI strips white space from both ends.
        text: String,
    },
    /// See [`EventKind::Transfer`].
    Transfer {
        /// The advisor who has the conversation from then on, by BigChat's id.
        advisor: i64,
    },
}

impl Payload {
    /// Which of the four it is.
    pub fn kind(&self) -> EventKind {
        match self {
            Self::Start => EventKind::Start,
            Self::End => EventKind::End,
            Self::Message { .. } => EventKind::Message,
            Self::Transfer { .. } => EventKind::Transfer,
        }
    }

    /// The text of the message as which it is stored in OurAPI, if it is.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Message { text } => Some(text),
            Self::Start | Self::End | Self::Transfer { .. } => None,
        }
    }

    /// Reads the `data` of an event of that kind, as the journal keeps it.
    pub fn from_data(kind: EventKind, data: Option<&str>) -> Result<Self, ParseError> {
        #[derive(Deserialize)]
        struct Message {
            message: String,
        }
        #[derive(Deserialize)]
        struct Transfer {
            new_advisor_id: Integer,
        }
        let present = || data.ok_or(ParseError::NoData(kind));
        let wrong = |source| ParseError::Data { kind, source };
        Ok(match kind {
            EventKind::Start => Self::Start,
            EventKind::End => Self::End,
            EventKind::Message => Self::Message {
                text: serde_json::from_str::<Message>(present()?)
                    .map_err(wrong)?
                    .message,
            },
            EventKind::Transfer => Self::Transfer {
                advisor: serde_json::from_str::<Transfer>(present()?)
                    .map_err(wrong)?
                    .new_advisor_id
                    .0,
            },
        })
    }
}

/// One event that was understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// BigChat's id of the conversation: an identity only together with the run of BigChat it was told in.
    pub conversation: i64,
    /// When it happened, by BigChat's clock.
    pub at: Timestamp,
    /// What happened.
    pub kind: EventKind,
    /// `data` in one canonical form (keys sorted, no white space), so that equal data are equal text.
    pub data: Option<String>,
}

/// Why an event could not be understood. Such an event goes to the failed events with its raw JSON.
#[derive(Debug, Error)]
pub enum ParseError {
    /// Not an object.
    #[error("it is not an event as BigChat describes them: {0}")]
    Shape(#[from] Malformed),
    /// A field that every event has is missing.
    #[error("it is not an event as BigChat describes them: missing field `{0}`")]
    Missing(&'static str),
    /// A field is not of the type that the contract gives.
    #[error("it is not an event as BigChat describes them: {name}: {source}")]
    Field {
        /// Which one.
        name: &'static str,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// It has bytes that are not of the encoding that BigChat declares, or UTF-8 by default.
    #[error("its text is not of the declared encoding: \\xNN is a byte that could not be decoded")]
    Encoding,
    /// A name beside START, END, MESSAGE and TRANSFER.
    #[error("its name is unknown: {0:?}")]
    Name(String),
    /// A time that RFC 3339 cannot write.
    #[error("its time is out of range: {0}")]
    Time(i64),
    /// MESSAGE or TRANSFER without `data`.
    #[error("it is a {0} without data")]
    NoData(EventKind),
    /// MESSAGE or TRANSFER whose `data` lacks what they need.
    #[error("its data are not those of a {kind}: {source}")]
    Data {
        /// Which kind of event it claims to be.
        kind: EventKind,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

impl Event {
    /// What BigChat calls an event, whether or not the rest of it can be understood.
    pub fn name(raw: &str) -> Option<String> {
        let [name] = json::fields(raw, ["event_name"]).ok()?;
        serde_json::from_str(name?).ok()
    }

    /// Reads one event from its JSON. What it holds beside what is needed may be anything.
    pub fn parse(raw: &str) -> Result<Self, ParseError> {
        Self::read(raw).map_err(|error| {
            if has_undecoded(raw) {
                ParseError::Encoding
            } else {
                error
            }
        })
    }

    fn read(raw: &str) -> Result<Self, ParseError> {
        const NAMES: [&str; 4] = ["conversation_id", "event_name", "event_at", "data"];
        let [conversation, name, at, data] = json::fields(raw, NAMES)?;
        let Integer(conversation) = field(NAMES[0], conversation)?;
        let name: String = field(NAMES[1], name)?;
        let Integer(at) = field(NAMES[2], at)?;
        let kind = EventKind::from_name(&name).ok_or(ParseError::Name(name))?;
        let at = Timestamp::from_unix(at).ok_or(ParseError::Time(at))?;
        let data = match data {
            None | Some("null") => None,
            Some(data) => canonical(kind, data)?,
        };
        Payload::from_data(kind, data.as_deref())?;
        Ok(Self {
            conversation,
            at,
            kind,
            data,
        })
    }

    /// What an equal event has too, and hardly any other: the journal's index, never proof of equality by itself.
    pub fn fingerprint(&self) -> i64 {
        fingerprint(&[
            self.kind.name().as_bytes(),
            &self.at.unix().to_le_bytes(),
            self.data.as_deref().unwrap_or("").as_bytes(),
        ])
    }
}

/// What can be read of an event that cannot be understood, for the operator.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PartialEvent {
    pub conversation: Option<i64>,
    pub at: Option<Timestamp>,
}

impl PartialEvent {
    /// `raw` may be anything, and cut off.
    pub fn of(raw: &str) -> Self {
        let fields: Value = serde_json::from_str(raw).unwrap_or_default();
        let field = |name: &str| match fields.get(name) {
            Some(Value::String(text)) => Some(text.trim().to_owned()),
            Some(value) => Some(value.to_string()),
            None => bare_field(raw, name),
        };
        let integer = |text: &str| match text.split_once('.') {
            Some((whole, fraction)) if fraction.bytes().all(|byte| byte.is_ascii_digit()) => {
                whole.parse().ok()
            }
            _ => text.parse::<i64>().ok(),
        };
        let at = field("event_at");
        Self {
            conversation: field("conversation_id").and_then(|id| integer(&id)),
            at: at.and_then(|at| match integer(&at) {
                Some(seconds) => Timestamp::from_unix(seconds),
                None => Timestamp::parse(&at),
            }),
        }
    }
}

/// A field of what is no JSON as a whole: the text after its name, up to the next delimiter.
fn bare_field(raw: &str, name: &str) -> Option<String> {
    let (_, after) = raw.split_once(&format!("\"{name}\""))?;
    let value = after.trim_start().strip_prefix(':')?.trim_start();
    let value = value.strip_prefix('"').unwrap_or(value);
    let end = value.find(['"', ',', '}', ' ', '\n'])?;
    Some(value[..end].to_owned())
}

/// Hands over the events of a page, each as it came and one by one: a hostile page has millions.
///
/// # Errors
///
/// When it is no page. One without `events` is empty, if it says of the next page or nothing at all: an object of another
/// kind may be an error report.
pub fn page_events<'a>(body: &'a str, each: impl FnMut(&'a str)) -> Result<(), Malformed> {
    let mut fields = 0;
    json::all_fields(body, |_, _| fields += 1)?;
    match json::fields(body, ["events", "nextPageUrl"])? {
        [None | Some("null"), Some(_)] | [Some("null"), None] => Ok(()),
        [None, None] if fields == 0 => Ok(()),
        [events, _] => json::items(events.unwrap_or_default(), each),
    }
}

fn field<T: serde::de::DeserializeOwned>(
    name: &'static str,
    value: Option<&str>,
) -> Result<T, ParseError> {
    let value = value.ok_or(ParseError::Missing(name))?;
    serde_json::from_str(value).map_err(|source| ParseError::Field { name, source })
}

/// Data in one canonical form. Where that is impossible, since something in them is no JSON, only what is needed.
fn canonical(kind: EventKind, data: &str) -> Result<Option<String>, ParseError> {
    let wrong = |source| ParseError::Data { kind, source };
    // `Value` keeps object keys sorted.
    match serde_json::from_str::<serde_json::Value>(data) {
        Ok(data) => Ok(Some(serde_json::to_string(&data).map_err(wrong)?)),
        Err(source) => {
            let Some(needed) = kind.needed_field() else {
                return Ok(None);
            };
            let Ok([Some(value)]) = json::fields(data, [needed]) else {
                return Err(wrong(source));
            };
            let value: serde_json::Value = serde_json::from_str(value).map_err(wrong)?;
            Ok(Some(serde_json::json!({ needed: value }).to_string()))
        }
    }
}

/// A 64-bit digest that stays the same from one release to the next, since the journal keeps it.
pub fn fingerprint(parts: &[&[u8]]) -> i64 {
    let mut hasher = SipHasher13::new();
    for part in parts {
        hasher.write_u64(part.len() as u64);
        hasher.write(part);
    }
    hasher.finish().cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_are_compared_by_what_they_say() {
        let one = Event::parse(
            r#"{"conversation_id":1,"event_name":"TRANSFER","event_at":5,"data":{"new_advisor_id":2,"old_advisor_id":1}}"#,
        );
        let two = Event::parse(
            r#"{ "event_at":5, "event_name":"TRANSFER","data":{"old_advisor_id":1, "new_advisor_id":2},"conversation_id":1}"#,
        );
        assert_eq!(one.expect("an event"), two.expect("an event"));
    }

    #[test]
    fn what_nobody_needs_costs_no_event() {
        for odd in [
            "NaN",
            "1e400",
            r#""\ud800""#,
            r#""\xE4""#,
            "-Infinity",
            &format!("{}{}", "[".repeat(1000), "]".repeat(1000)),
        ] {
            let message = format!(
                r#"{{"meta":{odd},"conversation_id":1,"event_name":"MESSAGE","event_at":5.0,"data":{{"weight":{odd},"m\u0065ssage":"Hi"}}}}"#
            );
            let event = Event::parse(&message).expect("an event");
            assert_eq!(event.data.as_deref(), Some(r#"{"message":"Hi"}"#), "{odd}");
            assert_eq!(event.at, Timestamp::clamped(5));
            let end = format!(
                r#"{{"conversation_id":1,"event_name":"END","event_at":5,"data":{{"reason":{odd}}}}}"#
            );
            assert_eq!(Event::parse(&end).expect("an event").data, None, "{odd}");
        }
    }

    #[test]
    fn what_cannot_be_understood_says_why() {
        for (raw, why) in [
            ("[]", "not an event"),
            (
                r#"{"conversation_id":"1","event_name":"END","event_at":5}"#,
                "not an event",
            ),
            (
                r#"{"conversation_id":1,"event_name":"PAUSE","event_at":5}"#,
                "name is unknown",
            ),
            (
                r#"{"conversation_id":1,"event_name":"END","event_at":-5}"#,
                "out of range",
            ),
            (
                r#"{"conversation_id":1,"event_name":"END","event_at":9999999999999}"#,
                "out of range",
            ),
            (
                r#"{"conversation_id":1,"event_name":"MESSAGE","event_at":5,"data":null}"#,
                "without data",
            ),
            (
                r#"{"conversation_id":1,"event_name":"MESSAGE","event_at":5,"data":{"message":7}}"#,
                "data are not those",
            ),
            (
                r#"{"conversation_id":1,"event_name":"MESSAGE","event_at":5,"data":{"message":"\ud800"}}"#,
                "data are not those",
            ),
            (
                r#"{"conversation_id":1,"event_name":"MESSAGE","event_at":5,"data":{"message":"Gr\xFC"}}"#,
                "not of the declared encoding",
            ),
            (
                r#"{"conversation_id":NaN,"event_name":"END","event_at":5}"#,
                "not an event",
            ),
        ] {
            let error = Event::parse(raw).expect_err(raw).to_string();
            assert!(error.contains(why), "{raw}: {error}");
        }
    }

    #[test]
    fn the_digest_never_changes() {
        // The journal keeps it: another value here would make every event of an existing journal unknown.
        let event = Event {
            conversation: 1,
            at: Timestamp::clamped(1),
            kind: EventKind::End,
            data: None,
        };
        assert_eq!(event.fingerprint(), -6_468_275_528_176_648_252);
        assert_eq!(fingerprint(&[b"END"]), 1_109_980_383_522_413_077);
        assert_ne!(fingerprint(&[b"a", b"b"]), fingerprint(&[b"ab", b""]));
    }

    #[test]
    fn of_what_cannot_be_understood_something_can_be_read() {
        let at = Timestamp::from_unix(1_700_000_000);
        let partial_event = |raw| {
            let PartialEvent { conversation, at } = PartialEvent::of(raw);
            (conversation, at)
        };
        for (raw, expected) in [
            (
                r#"{"conversation_id":42,"event_name":"NOTE","event_at":1700000000}"#,
                (Some(42), at),
            ),
            (
                r#"{"conversation_id":"42","event_name":"END","event_at":"1700000000"}"#,
                (Some(42), at),
            ),
            (
                r#"{"conversation_id":42.0,"event_at":1700000000.5}"#,
                (Some(42), at),
            ),
            (
                r#"{"event_at":"2023-11-14T22:13:20Z","conversation_id":null}"#,
                (None, at),
            ),
            (
                r#"{"conversation_id": 42, "event_at": 1700000000, "data": NaN}"#,
                (Some(42), at),
            ),
            (
                r#"{"event_at" : 1700000000, "conversation_id":42,"data":{"mess"#,
                (Some(42), at),
            ),
            (r#"{"conversation_id":42,"event_at":-1}"#, (Some(42), None)),
            (r#"{"conversation_id":4"#, (None, None)),
            ("[]", (None, None)),
            ("", (None, None)),
        ] {
            assert_eq!(partial_event(raw), expected, "{raw}");
        }
    }

    #[test]
    fn a_page_without_events_is_empty_and_an_error_report_is_no_page() {
        let count = |body: &str| {
            let mut count = 0;
            page_events(body, |_| count += 1).map(|()| count)
        };
        for body in [
            "{}",
            r#"{"nextPageUrl":null}"#,
            r#"{"events":null}"#,
            r#"{"events":null,"nextPageUrl":"?page=2"}"#,
            r#"{"nextPageUrl":"?page=2","total":0}"#,
            r#"{"events":[]}"#,
        ] {
            assert_eq!(count(body), Ok(0), "{body}");
        }
        for body in [
            "",
            "null",
            "[]",
            "\"events\"",
            r#"{"detail":"maintenance"}"#,
            r#"{"events":{}}"#,
            r#"{"events":7}"#,
            r#"{"events":[]} <html>"#,
            r#"{"events":[1,2"#,
        ] {
            assert!(count(body).is_err(), "{body}");
        }
        assert_eq!(count(r#"{"events":[NaN,{},]}"#), Ok(2));
    }
}
