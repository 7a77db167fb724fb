//! The texts that the console and the commands show for an event and for a chat without an agent. Pure.

use crate::domain::conversation::Details;
use crate::domain::event::{EventKind, Payload};
use crate::journal::KnownAdvisor;

/// The content of an event for people. A message is complete, whatever characters are in it: SQLite's text functions
/// would end it at the first NUL.
pub(in crate::journal) fn event(name: &str, data: Option<String>) -> Option<String> {
    let Some(kind) = EventKind::from_name(name) else {
        return data;
    };
    match Payload::from_data(kind, data.as_deref()) {
        Ok(Payload::Start | Payload::End) => None,
        Ok(Payload::Message { text }) => Some(text),
        Ok(Payload::Transfer { advisor }) => Some(format!("to advisor {advisor}")),
        Err(_) => data,
    }
}

/// Why a chat has no agent. `advisor`: BigChat's id of the advisor who should be the agent. `details`: whether the
/// conversation's details, which name the first advisor, were read. `known`: what BigChat answered about the advisor.
/// `accepted`: whether OurAPI has the agent (true) or does not accept the agent (false).
pub(super) fn no_agent(
    details: Details,
    advisor: Option<i64>,
    known: Option<&KnownAdvisor>,
    accepted: Option<bool>,
) -> String {
    match (advisor, known, accepted) {
        (None, ..) => match details {
            Details::Unread => "not resolved yet: the conversation's details have not been read from BigChat",
            Details::Read => "BigChat names no advisor for the conversation",
            Details::Gone => "no advisor is known, and BigChat does not know the conversation or has no usable record",
        }
        .to_owned(),
        (Some(id), None, _) => {
            format!("not resolved yet: advisor {id} has not been read from BigChat")
        }
        (Some(id), Some(KnownAdvisor::Gone), _) => {
            format!("BigChat does not know advisor {id}, or has no usable record")
        }
        (Some(_), Some(KnownAdvisor::Person { name, email }), None) => {
            format!("not resolved yet: OurAPI has not been asked for {name} ({email})")
        }
        (Some(_), Some(KnownAdvisor::Person { name, email }), Some(false)) => {
            format!("OurAPI does not accept the agent {name} ({email})")
        }
        (Some(_), Some(KnownAdvisor::Person { name, email }), Some(true)) => {
            format!("not set yet: OurAPI has {name} ({email}), and the chat waits for its change")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_complete() {
        for text in [
            "",
            "a\0b",
            "\0",
            "\u{1b}[31m\u{202e}\u{7f}\u{85}",
            "\r\n\t",
            "\u{feff}👩\u{200d}💻",
        ] {
            let data = serde_json::json!({ "message": text }).to_string();
            assert_eq!(event("MESSAGE", Some(data)).as_deref(), Some(text));
        }
    }

    #[test]
    fn every_kind_has_content() {
        for (name, data, expected) in [
            ("START", Some("null"), None),
            ("END", None, None),
            (
                "TRANSFER",
                Some(r#"{"new_advisor_id":9007199254740993}"#),
                Some("to advisor 9007199254740993"),
            ),
            (
                "UNREADABLE",
                Some(r#"{"message":"a\u0000b"}"#),
                Some(r#"{"message":"a\u0000b"}"#),
            ),
            // No version of this program stores such data.
            ("MESSAGE", Some("[]"), Some("[]")),
        ] {
            let says = event(name, data.map(str::to_owned));
            assert_eq!(says.as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn chat_without_agent_has_reason() {
        use Details::{Gone, Read, Unread};
        let ann = KnownAdvisor::Person {
            name: "Ann".into(),
            email: "ann@x.test".into(),
        };
        for (details, advisor, known, accepted, expected) in [
            (Unread, None, None, None, "details have not been read"),
            (Gone, None, None, None, "does not know the conversation"),
            (Read, None, None, None, "names no advisor"),
            (Read, Some(7), None, None, "advisor 7 has not been read"),
            (
                Gone,
                Some(i64::MAX),
                Some(&KnownAdvisor::Gone),
                None,
                "does not know advisor 9223372036854775807",
            ),
            (Read, Some(7), Some(&ann), None, "not been asked for Ann"),
            (
                Read,
                Some(7),
                Some(&ann),
                Some(false),
                "does not accept the agent Ann (ann@x.test)",
            ),
            (Read, Some(7), Some(&ann), Some(true), "OurAPI has Ann"),
        ] {
            let why = no_agent(details, advisor, known, accepted);
            assert!(why.contains(expected), "{why}");
        }
    }
}
