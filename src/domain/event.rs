//! BigChat's events. Each is parsed separately, so that a malformed one does not affect the rest of its page.

use std::hash::Hasher;

use serde::Deserialize;
use serde::de::Error as _;
use serde_json::Value;
use siphasher::sip::SipHasher13;
use thiserror::Error;

use crate::domain::json::{self, Integer, Malformed};
use crate::domain::named::named;
use crate::domain::text::has_undecoded;
use crate::domain::time::Timestamp;

named! {
    /// The kinds of events, with BigChat's names, in the order in which charts stack them.
    EventKind {
        /// A message was written. BigChat does not report the author.
        Message = "MESSAGE",
        /// The conversation began.
        Start = "START",
        /// Another advisor took over, or the same one again.
        Transfer = "TRANSFER",
        /// The conversation ended. BigChat reports it repeatedly; the latest counts.
        End = "END",
    }
}

impl EventKind {
    /// Whether events of this kind are stored as messages of the chat; all others change the chat itself.
    pub fn is_message(self) -> bool {
        match self {
            Self::Message => true,
            Self::Start | Self::End | Self::Transfer => false,
        }
    }

    /// The field of `data` that delivery needs.
    fn needed_field(self) -> Option<&'static str> {
        match self {
            Self::Message => Some("message"),
            Self::Transfer => Some("new_advisor_id"),
            Self::Start | Self::End => None,
        }
    }
}

/// The kind of an event, with the part of its data that delivery needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    Start,
    End,
    Message {
        /// As it is to be sent, before OurAPI strips white space from both ends.
        text: String,
    },
    Transfer {
        /// The new advisor, by BigChat's id.
        advisor: i64,
    },
}

impl Payload {
    pub fn kind(&self) -> EventKind {
        match self {
            Self::Start => EventKind::Start,
            Self::End => EventKind::End,
            Self::Message { .. } => EventKind::Message,
            Self::Transfer { .. } => EventKind::Transfer,
        }
    }

    /// The text, if the event is stored as a message in OurAPI.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Message { text } => Some(text),
            Self::Start | Self::End | Self::Transfer { .. } => None,
        }
    }

    /// Parses the `data` of an event, as the journal stores it.
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
        let invalid = |source| ParseError::Data { kind, source };
        Ok(match kind {
            EventKind::Start => Self::Start,
            EventKind::End => Self::End,
            EventKind::Message => Self::Message {
                text: serde_json::from_str::<Message>(present()?)
                    .map_err(invalid)?
                    .message,
            },
            EventKind::Transfer => Self::Transfer {
                advisor: serde_json::from_str::<Transfer>(present()?)
                    .map_err(invalid)?
                    .new_advisor_id
                    .0,
            },
        })
    }
}

/// An event that could be parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// BigChat's id of the conversation, which identifies it only within an epoch.
    pub conversation: i64,
    /// By BigChat's clock.
    pub at: Timestamp,
    pub kind: EventKind,
    /// `data` in canonical form (keys sorted, no white space), so that equal data are equal text.
    pub data: Option<String>,
}

/// Why an event could not be parsed. Such an event becomes a dead letter with its raw JSON.
#[derive(Debug, Error)]
pub enum ParseError {
    #[error("not a BigChat event: {0}")]
    Shape(#[from] Malformed),
    #[error("not a BigChat event: missing field `{0}`")]
    Missing(&'static str),
    /// A field does not have the type that the contract specifies.
    #[error("not a BigChat event: {name}: {source}")]
    Field {
        name: &'static str,
        source: serde_json::Error,
    },
    /// Some bytes are not in the encoding that BigChat declares, or UTF-8 by default.
    #[error("text not in the declared encoding: \\xNN is a byte that could not be decoded")]
    Encoding,
    #[error("unknown event name: {0:?}")]
    Name(String),
    /// RFC 3339 cannot represent the time.
    #[error("event time out of range: {0}")]
    Time(i64),
    #[error("{0} without data")]
    NoData(EventKind),
    #[error("invalid data of a {kind}: {source}")]
    Data {
        kind: EventKind,
        source: serde_json::Error,
    },
}

impl Event {
    /// BigChat's name of an event, even if the rest of it cannot be parsed.
    pub fn name(raw: &str) -> Option<String> {
        let [name] = json::fields(raw, ["event_name"]).ok()?;
        serde_json::from_str(name?).ok()
    }

    /// Parses one event. Fields that are not needed may have any value.
    pub fn parse(raw: &str) -> Result<Self, ParseError> {
        Self::parse_fields(raw).map_err(|error| {
            if has_undecoded(raw) {
                ParseError::Encoding
            } else {
                error
            }
        })
    }

    fn parse_fields(raw: &str) -> Result<Self, ParseError> {
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

    /// Equal events have the same fingerprint. Other events may share it, so it serves as an index and does not prove
    /// equality.
    pub fn fingerprint(&self) -> i64 {
        fingerprint(&[
            self.kind.name().as_bytes(),
            &self.at.unix().to_le_bytes(),
            self.data.as_deref().unwrap_or("").as_bytes(),
        ])
    }
}

/// The readable parts of an event that could not be parsed, for the operator.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PartialEvent {
    pub conversation: Option<i64>,
    pub at: Option<Timestamp>,
}

impl PartialEvent {
    /// `raw` may be any text, and truncated.
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

/// A field of malformed JSON: the text from its name to the next delimiter.
fn bare_field(raw: &str, name: &str) -> Option<String> {
    let (_, after) = raw.split_once(&format!("\"{name}\""))?;
    let value = after.trim_start().strip_prefix(':')?.trim_start();
    let value = value.strip_prefix('"').unwrap_or(value);
    let end = value.find(['"', ',', '}', ' ', '\n'])?;
    Some(value[..end].to_owned())
}

/// Calls `each` with the raw JSON of every event of a page. It collects none of them, since a hostile page may have
/// millions.
///
/// # Errors
///
/// If the body is not a page. A body without `events` is an empty page only if it has `nextPageUrl` or no fields at
/// all. Any other object may be an error report.
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

/// `data` in canonical form. If part of it is invalid JSON, only the needed field is returned. If a field is needed,
/// `data` must be an object, because serde would accept a list as the values of the fields.
fn canonical(kind: EventKind, data: &str) -> Result<Option<String>, ParseError> {
    let invalid = |source| ParseError::Data { kind, source };
    // `Value` sorts object keys.
    match serde_json::from_str::<serde_json::Value>(data) {
        Ok(data) if kind.needed_field().is_some() && !data.is_object() => {
            Err(invalid(serde_json::Error::custom("expected an object")))
        }
        Ok(data) => Ok(Some(serde_json::to_string(&data).map_err(invalid)?)),
        Err(source) => {
            let Some(needed) = kind.needed_field() else {
                return Ok(None);
            };
            let Ok([Some(value)]) = json::fields(data, [needed]) else {
                return Err(invalid(source));
            };
            let value: serde_json::Value = serde_json::from_str(value).map_err(invalid)?;
            Ok(Some(serde_json::json!({ needed: value }).to_string()))
        }
    }
}

/// A 64-bit hash. The journal stores it, so it must not change between releases.
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
    fn data_equal_despite_key_order() {
        let one = Event::parse(
            r#"{"conversation_id":1,"event_name":"TRANSFER","event_at":5,"data":{"new_advisor_id":2,"old_advisor_id":1}}"#,
        );
        let two = Event::parse(
            r#"{ "event_at":5, "event_name":"TRANSFER","data":{"old_advisor_id":1, "new_advisor_id":2},"conversation_id":1}"#,
        );
        assert_eq!(one.expect("an event"), two.expect("an event"));
    }

    #[test]
    fn invalid_unneeded_field() {
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
    fn unparsable_events_give_the_reason() {
        for (raw, why) in [
            ("[]", "not a BigChat event"),
            (
                r#"{"conversation_id":"1","event_name":"END","event_at":5}"#,
                "not a BigChat event",
            ),
            (
                r#"{"conversation_id":1,"event_name":"PAUSE","event_at":5}"#,
                "unknown event name",
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
                "invalid data of a MESSAGE",
            ),
            (
                r#"{"conversation_id":1,"event_name":"MESSAGE","event_at":5,"data":["Hi"]}"#,
                "invalid data of a MESSAGE: expected an object",
            ),
            (
                r#"{"conversation_id":1,"event_name":"TRANSFER","event_at":5,"data":[7]}"#,
                "invalid data of a TRANSFER: expected an object",
            ),
            (
                r#"{"conversation_id":1,"event_name":"MESSAGE","event_at":5,"data":{"message":"\ud800"}}"#,
                "invalid data of a MESSAGE",
            ),
            (
                r#"{"conversation_id":1,"event_name":"MESSAGE","event_at":5,"data":{"message":"Gr\xFC"}}"#,
                "not in the declared encoding",
            ),
            (
                r#"{"conversation_id":NaN,"event_name":"END","event_at":5}"#,
                "not a BigChat event",
            ),
        ] {
            let error = Event::parse(raw).expect_err(raw).to_string();
            assert!(error.contains(why), "{raw}: {error}");
        }
    }

    #[test]
    fn fingerprint_is_stable_across_releases() {
        // If this value changed, no event in an existing journal would be recognized.
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
    fn partial_event_of_malformed_json() {
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
    fn page_without_events_or_error_report() {
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
