//! The API's texts, reasons for chats without an agent, and retries that can succeed.

use crate::harness::journal::{CONVERSATION, dead_letter, failed_message, spent};
use crate::harness::web::Console;
use crate::harness::{run_test, side_by_side, until};
use bigchat_sync::settings::Tokens;
use bigchat_sync::simulator::bigchat::raw;
use bigchat_sync::simulator::event::{message, start, transfer};
use bigchat_sync::simulator::fault::status;
use serde_json::{Value, json};

/// The console's response, which must be a success.
async fn get(console: &Console<'_>, path: &str, query: &[(&str, &str)]) -> Value {
    let query = url::form_urlencoded::Serializer::new(String::new())
        .extend_pairs(query)
        .finish();
    let (status, answer) = console.get(&format!("{path}?{query}")).await;
    assert!(status.is_success(), "{path}: {status}");
    answer
}

/// A conversation as a search finds it.
async fn found(console: &Console<'_>, id: i64) -> Value {
    let mut found = get(console, "/api/search", &[("q", &id.to_string())]).await;
    found["conversations"][0].take()
}

/// The same. The conversation's own page must agree with it.
async fn conversation(console: &Console<'_>, id: i64) -> Value {
    let found = found(console, id).await;
    let path = format!("/api/conversations/{}", found["key"]);
    let itself = get(console, &path, &[]).await;
    assert_eq!(itself["conversation"], found);
    found
}

/// An event that cannot be parsed is shown as received, although its conversation is known.
#[tokio::test]
async fn unreadable_event_is_shown_as_received() {
    run_test(async |t| {
        let received = r#"{"conversation_id":42,"note":"?"}"#;
        let event = dead_letter(1, 100, "UNREADABLE", received, "why", 0);
        let console = Console::over(t, &format!("{CONVERSATION}{event}")).await;
        let event = get(&console, "/api/failed/1", &[]).await;
        assert_eq!(event["conversation"], 42);
        assert_eq!(event["raw"], received);
        console.daemon.stop().await;
    })
    .await;
}

/// A text is shown completely, whatever characters are in it.
#[tokio::test]
async fn texts_with_control_characters() {
    let texts = [
        "before\0after",
        "\0",
        "two\0\0of them\0",
        "\u{1b}[2J\u{7f}\u{85}\u{202e}reversed\u{2066}",
        "",
        " \t\n",
    ];
    let events = (1..).zip(texts);
    let events: String = events
        .map(|(id, text)| failed_message(id, text, "why"))
        .collect();
    run_test(async |t| {
        let console = Console::over(t, &format!("{CONVERSATION}{events}")).await;
        let texts_of = |rows: &Value| -> Vec<String> {
            let rows = rows.as_array().expect("rows").iter();
            rows.map(|row| row["text"].as_str().expect("a text").to_owned())
                .collect()
        };
        let list = get(&console, "/api/failed", &[("reason", "why")]).await;
        assert_eq!(texts_of(&list["rows"]), texts);
        let conversation = get(&console, "/api/conversations/100", &[]).await;
        assert_eq!(texts_of(&conversation["events"]), texts);
        for (id, text) in (1..).zip(texts) {
            let event = get(&console, &format!("/api/failed/{id}"), &[]).await;
            let raw: Value =
                serde_json::from_str(event["raw"].as_str().expect("JSON")).expect("JSON");
            assert_eq!(raw["data"]["message"], text);
        }
        console.daemon.stop().await;
    })
    .await;
}

#[tokio::test]
async fn long_text_truncated_in_lists_only() {
    for (length, in_list, in_conversation) in [
        (200, 200, 200),
        (201, 200, 201),
        (4_001, 200, 4_000),
        (300_000, 200, 4_000),
    ] {
        // Characters of two bytes each, after a NUL, which would end a text in C.
        let text = format!("\0{}", "é".repeat(length - 1));
        let events = failed_message(1, &text, "why");
        run_test(async |t| {
            let console = Console::over(t, &format!("{CONVERSATION}{events}")).await;
            let of = |row: &Value| row["text"].as_str().expect("a text").chars().count();
            let list = get(&console, "/api/failed", &[("reason", "why")]).await;
            assert_eq!(of(&list["rows"][0]), in_list);
            let conversation = get(&console, "/api/conversations/100", &[]).await;
            let event = &conversation["events"][0];
            assert_eq!(
                (of(event), &event["text_truncated"]),
                (in_conversation, &json!(in_conversation < length))
            );
            let event = get(&console, "/api/failed/1", &[]).await;
            assert_eq!(event["raw_truncated"], false);
            assert!(event["raw"].as_str().expect("JSON").contains(&text[1..]));
            console.daemon.stop().await;
        })
        .await;
    }
}

#[tokio::test]
async fn chat_without_agent_has_reason() {
    let gone = "BigChat does not know advisor 9007199254740993, or has no usable record";
    let rejected = "OurAPI does not accept the agent Ann (ann@x.test)";
    let details =
        "no advisor is known, and BigChat does not know the conversation or has no usable record";
    side_by_side(["advisor", "agent", "details"], async |case| {
        run_test(async |t| {
            t.differs("the chat gets no agent");
            let (id, expected, events) = match case {
                "advisor" => (
                    42,
                    gone,
                    vec![start(42, 0), transfer(42, 5, 9_007_199_254_740_993)],
                ),
                "agent" => {
                    t.our_api
                        .upset("POST /agents", status(422).body("{}").always());
                    (42, rejected, vec![start(42, 0)])
                }
                _ => (77, details, vec![message(77, 5, "Hello")]),
            };
            let console = Console::new(t, Tokens::default());
            t.delivers(events).await;
            let conversation = conversation(&console, id).await;
            assert!(conversation["chat_id"].is_string(), "{case}");
            assert_eq!(conversation["chat_agent"], Value::Null, "{case}");
            assert_eq!(conversation["no_agent"], expected, "{case}");
            console.daemon.stop().await;
        })
        .await;
    })
    .await;
}

#[tokio::test]
async fn agent_not_resolved_yet() {
    let unread = "not resolved yet: the conversation's details have not been read from BigChat";
    let advisor = "not resolved yet: advisor 7 has not been read from BigChat";
    let agent = "not resolved yet: OurAPI has not been asked for Ann (ann@x.test)";
    side_by_side(
        [
            ("GET /conversations/42", unread),
            ("GET /advisors/7", advisor),
            ("GET /agents", agent),
        ],
        async |(down, expected)| {
            run_test(async |t| {
                t.upset(down, status(500).always());
                let console = Console::new(t, Tokens::default());
                t.bigchat.reports([start(42, 0)]);
                t.until_events("waiting", 1).await;
                let mut no_agent = Value::Null;
                until("it says so", async || {
                    no_agent = found(&console, 42).await["no_agent"].take();
                    no_agent == expected
                })
                .await;
                t.bigchat.calm();
                t.our_api.calm();
                t.until_events("delivered", 1).await;
                let conversation = conversation(&console, 42).await;
                assert_eq!(conversation["no_agent"], Value::Null);
                assert_eq!(conversation["agent_email"], "ann@x.test");
                console.daemon.stop().await;
            })
            .await;
        },
    )
    .await;
}

/// For each failed event, the console shows whether a retry can succeed.
#[tokio::test]
async fn retries_that_can_succeed() {
    run_test(async |t| {
        t.differs("OurAPI rejects what it could store");
        t.our_api
            .upset("POST /chats/c1/messages*No", status(422).always());
        t.our_api
            .upset("POST /chats/c1/messages*Spam", status(409).always());
        let console = Console::new(t, Tokens::default());
        t.delivers([start(42, 0), start(43, 1)]).await;
        t.bigchat
            .reports([message(42, 5, "No"), message(42, 6, "Spam")]);
        t.until_events("failed", 2).await;
        assert_eq!(conversation(&console, 42).await["permanent"], true);
        for unreadable in [
            r#"{"conversation_id":42,"event_name":"PAUSE","event_at":1795384900}"#,
            r#"{"conversation_id":42,"event_name":"END","event_at":-1}"#,
            "{}",
        ] {
            let before = t.events("failed");
            t.bigchat.reports(raw(&format!(
                r#"{{"nextPageUrl":null,"events":[{unreadable}]}}"#
            )));
            t.until_events("failed", before + 1).await;
        }
        let Console { t, daemon, .. } = console;
        daemon.stop().await;
        // An event that has used up its attempts may succeed once the cause is gone.
        t.execute(&spent(90, 42));
        let console = Console::new(t, Tokens::default());
        assert_eq!(conversation(&console, 42).await["permanent"], false);
        let failed = get(&console, "/api/failed", &[]).await;
        let groups = failed["groups"].as_array().expect("groups");
        assert!(groups.len() >= 5, "{groups:#?}");
        for group in groups {
            let reason = group["reason"].as_str().expect("a reason");
            let may_succeed = reason == "OurAPI gave no usable answer";
            assert_eq!(group["permanent"], !may_succeed, "{reason}");
            let list = get(&console, "/api/failed", &[("reason", reason)]).await;
            for row in list["rows"].as_array().expect("rows") {
                let event = get(&console, &format!("/api/failed/{}", row["id"]), &[]).await;
                assert_eq!(event["permanent"], !may_succeed, "{reason}");
            }
        }
        console.daemon.stop().await;
    })
    .await;
}
