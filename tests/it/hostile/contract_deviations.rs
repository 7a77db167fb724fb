//! Services that deviate from the contract: in their spelling of agents, their errors and their events.

use crate::harness::process::Process;
use crate::harness::services::{time, unix};
use crate::harness::{Bench, run_test, side_by_side, until};
use bigchat_sync::http::Api;
use bigchat_sync::simulator::bigchat::raw;
use bigchat_sync::simulator::event::{message, start, transfer};
use bigchat_sync::simulator::fault::{Fault, status};
use bigchat_sync::simulator::id;
use serde_json::{Value, json};

/// Answers every request for agents with this list.
fn agents(listed: &[(&str, &str, &str)]) -> Fault {
    let listed = listed
        .iter()
        .map(|(end, name, email)| json!({"agent_id": id(end), "name": name, "email": email}));
    status(200)
        .body(listed.collect::<Value>().to_string())
        .always()
}

/// If OurAPI treats two spellings of an address as the same agent, so does the daemon.
#[tokio::test]
async fn agent_equal_to_our_api() {
    let taken = |code| status(code).body("{}").always();
    side_by_side(
        [
            (
                "accents",
                "josé@x.test",
                ("a9", "Josef", "jose@x.test"),
                taken(409),
            ),
            (
                "a domain in its other form",
                "ann@bücher.example",
                ("a9", "Anna", "ann@xn--bcher-kva.example"),
                taken(500),
            ),
            (
                "another normal form",
                "andr\u{e9}@x.test",
                ("a9", "Andre", "andre\u{301}@x.test"),
                taken(404),
            ),
            (
                "an ignored dot, and the same name",
                "a.nn@x.test",
                ("a9", "Ann", "ann@x.test"),
                taken(500),
            ),
        ],
        async |(case, email, (end, name, spelled), refusal)| {
            run_test(async |t| {
                t.differs("OurAPI spells its agents differently");
                t.bigchat.advisor(7, "Ann", email);
                t.our_api.has_agent(end, name, spelled);
                let found = agents(&[(end, name, spelled)]);
                t.our_api.upset("GET /agents?email=", found);
                t.our_api.upset("POST /agents", refusal);
                t.start();
                t.delivers([start(42, 0)]).await;
                assert_eq!(t.our_api.chats(), ["42 22:00:00 - a9"], "{case}");
                assert_eq!(t.our_api.count("POST /agents"), 1, "{case}");
                // No command shows how OurAPI spells the address of an agent.
                let stored: String = t.value("SELECT spelled FROM agents");
                assert_eq!(stored, spelled, "{case}");
            })
            .await;
        },
    )
    .await;
}

/// A conversation that no advisor has taken yet gets a chat without an agent, and can be used to probe for a restart.
#[tokio::test]
async fn conversation_without_an_advisor() {
    run_test(async |t| {
        for (id, at) in [(1, -3600), (42, 0)] {
            let start = json!({"conversation_id": id, "event_name": "START", "event_at": unix(at), "data": null});
            let details = json!({"events": [start], "conversation_id": id, "advisor_id": null});
            let answer = status(200).body(details.to_string()).always();
            t.bigchat.upset(&format!("GET /conversations/{id}"), answer);
        }
        t.start();
        t.delivers([message(42, 3, "hello")]).await;
        assert_eq!(t.our_api.chats(), ["42 22:00:00 - -"]);
        assert_eq!(t.our_api.messages(), ["hello"]);
        t.delivers([transfer(42, 5, 8)]).await;
        assert_eq!(t.our_api.chats(), ["42 22:00:00 - a1"]);
    })
    .await;
}

/// Unusable records cost the agent, or nothing, but no event, and an unusable record of conversation 1 is no outage.
#[tokio::test]
async fn unusable_records() {
    let (advisor, conversation) = ("GET /advisors/7", "GET /conversations/42");
    let details = |advisor: &str, at: &str| {
        let start = format!(r#"{{"conversation_id":42,"event_name":"START","event_at":{at}}}"#);
        format!(r#"{{"conversation_id":42,"advisor_id":{advisor},"events":[{start}]}}"#)
    };
    let unknown_advisor = details(r#""x""#, &unix(0).to_string());
    let unknown_start = details("7", "null");
    side_by_side(
        [
            (advisor, "null", false),
            (advisor, "[]", false),
            (advisor, r#""unknown""#, false),
            (conversation, "null", false),
            (conversation, "[]", false),
            (conversation, "{}", false),
            (conversation, &unknown_advisor, false),
            (conversation, &unknown_start, true),
        ],
        async |(route, body, has_agent)| {
            run_test(async |t| {
                t.differs("the record is unusable");
                t.set("--max-attempts", "2");
                let unusable = || status(200).body(body).always();
                t.bigchat.upset(route, unusable());
                if body == "null" {
                    t.bigchat.upset("GET /conversations/1", unusable());
                }
                let daemon = Process::start(t);
                t.bigchat.reports([start(42, 0), message(42, 5, "hello")]);
                // While another conversation succeeds, attempts count.
                let mut at = 10;
                until("the events are delivered", async || {
                    at += 1;
                    t.bigchat
                        .reports([transfer(43, at, 8), message(43, at, "other")]);
                    t.bigchat.further_polls(2).await;
                    assert_eq!(t.events("failed"), 0, "{route} {body}");
                    t.our_api.messages().iter().any(|text| text == "hello")
                })
                .await;
                let chats = t.our_api.chats();
                let chat = chats.iter().find(|chat| chat.starts_with("42 22:00:00 - "));
                let chat = chat.expect("a chat");
                assert_eq!(!chat.ends_with(" -"), has_agent, "{route} {body}");
                assert_eq!(t.restarts(), 0, "{route} {body}");
                assert_eq!(daemon.lines_with("new events wait"), 0, "{route} {body}");
                assert!(daemon.stop().await.success(), "{route} {body}");
            })
            .await;
        },
    )
    .await;
}

/// An agent whose name differs in case is another agent.
#[tokio::test]
async fn agent_name_in_another_case() {
    run_test(async |t| {
        t.differs("OurAPI spells its agents differently");
        t.our_api.has_agent("a3", "ANN", "other@x.test");
        let namesake = agents(&[("a3", "ANN", "other@x.test")]);
        t.our_api.upset("GET /agents?name=", namesake);
        t.our_api.upset("POST /agents", status(409));
        t.start();
        t.delivers([start(42, 0)]).await;
        assert_eq!(t.our_api.chats(), ["42 22:00:00 - a2"]);
        let created = t.our_api.ever_asked("POST /agents");
        let named = created
            .last()
            .is_some_and(|asked| asked.line.contains("Ann (ann@x.test)"));
        assert!(named, "the address distinguishes them");
    })
    .await;
}

/// An agent stored in another spelling is used as OurAPI stores it.
#[tokio::test]
async fn agent_stored_in_another_spelling() {
    side_by_side(
        ["ANN@X.TEST", "ann@x.test.", "Ann <ann@x.test>"],
        async |spelled| {
            run_test(async |t| {
                t.differs("OurAPI spells its agents differently");
                let stored = json!({"agent_id": id("a1"), "name": "ann", "email": spelled});
                let answer = status(201).body(stored.to_string()).carried_out();
                t.our_api.upset("POST /agents", answer);
                t.start();
                t.delivers([start(42, 0)]).await;
                assert_eq!(t.our_api.chats(), ["42 22:00:00 - a1"], "{spelled}");
                assert_eq!(t.our_api.count("POST /agents"), 1, "{spelled}");
            })
            .await;
        },
    )
    .await;
}

/// If an agent is neither created nor listed, OurAPI does not count as down, and the chat has no agent.
#[tokio::test]
async fn agent_neither_created_nor_listed() {
    side_by_side([404, 409], async |code| {
        run_test(async |t| {
            t.differs("there can be no agent");
            t.our_api.upset("POST /agents", status(code).always());
            t.start();
            t.delivers([start(42, 0)]).await;
            assert_eq!(t.our_api.chats(), ["42 22:00:00 - -"]);
            until("it is known to be up", async || {
                t.is_up(Api::OurApi) == Some(true)
            })
            .await;
        })
        .await;
    })
    .await;
}

/// The problem and the remedy that `status` shows once an API is down.
async fn until_down(t: &Bench, case: &str, api: Api) -> (String, String) {
    until(&format!("{case}: {api} is down"), async || {
        t.is_up(api) == Some(false)
    })
    .await;
    let (status, _) = t.status();
    let problems = status["problems"].as_array().expect("an array");
    let begins = format!("{api} has been down since");
    let problem = problems.iter().find_map(|problem| {
        let (what, remedy) = (problem["what"].as_str()?, problem["remedy"].as_str()?);
        what.starts_with(&begins)
            .then(|| (what.to_owned(), remedy.to_owned()))
    });
    problem.expect("the problem is listed")
}

/// For each outage, `status` gives the reason, whether it ends automatically, and what to correct.
#[tokio::test]
async fn outages_that_need_a_correction() {
    let html = "<html>secret</html>";
    let moved = |to: &str| status(308).header("location", to);
    let elsewhere = moved("https://user:pass@new.example/v2/?key=secret");
    side_by_side(
        [
            (
                "401",
                status(401),
                "rejected the credentials; renew BIGCHAT_SYNC_",
                false,
            ),
            (
                "403",
                status(403).body("{}"),
                "rejected the credentials; renew BIGCHAT_SYNC_",
                false,
            ),
            (
                "403 of a firewall",
                status(403).body(html),
                "a firewall or proxy in front of",
                false,
            ),
            (
                "a redirect",
                elsewhere,
                "redirects to https://new.example; check --",
                false,
            ),
            (
                "a relative redirect",
                moved("/login?next=secret"),
                "redirects to another path; check --",
                false,
            ),
            (
                "400",
                status(400).body("{}"),
                "does not accept the query",
                false,
            ),
            (
                "HTML",
                status(200).body(html),
                "HTML instead of JSON",
                false,
            ),
            ("empty", status(200), "empty body", false),
            (
                "cut off",
                status(200).body("["),
                "invalid JSON: EOF while parsing",
                false,
            ),
            (
                "another JSON",
                status(200).body(r#""secret""#),
                "unexpected JSON: expected ",
                false,
            ),
            ("503", status(503), "gave no usable answer", true),
        ],
        async |(case, upset, why, ends)| {
            let says = |what: String, remedy: String| {
                assert!(what.contains(why), "{case}: {what}");
                assert!(
                    !what.contains("secret") && !what.contains("pass@"),
                    "{case}: {what}"
                );
                assert_eq!(
                    remedy.contains("an outage needs no action"),
                    ends,
                    "{case}: {remedy}"
                );
            };
            run_test(async |t| {
                t.bigchat.upset("GET /events", upset.clone().always());
                let daemon = t.start();
                let (what, remedy) = until_down(t, case, Api::BigChat).await;
                says(what, remedy);
                daemon.stop().await;

                if case == "400" {
                    // A 400 from OurAPI only means that it rejects the address in the query, and is no outage.
                    return;
                }
                run_test(async |t| {
                    t.differs("OurAPI is down to the end");
                    t.our_api.upset("GET /agents", upset.always());
                    t.start();
                    t.bigchat.reports([start(42, 0)]);
                    let (what, remedy) = until_down(t, case, Api::OurApi).await;
                    says(what, remedy);
                })
                .await;
            })
            .await;
        },
    )
    .await;
}

/// The conversation and the time of an unparsable event are shown, if they can be read.
#[tokio::test]
async fn readable_part_of_unreadable_event() {
    let event = |conversation: Value, name: &str, at: Value, data: Value| json!({"conversation_id": conversation, "event_name": name, "event_at": at, "data": data});
    side_by_side(
        [
            event(json!(42), "NOTE", json!(unix(5)), json!(null)),
            event(json!("42"), "END", json!(unix(5).to_string()), json!(null)),
            event(json!(42.0), "MESSAGE", json!(unix(5)), json!({})),
        ],
        async |event| {
            run_test(async |t| {
                t.fails(1);
                t.bigchat.reports(raw(
                    &json!({"events": [event], "nextPageUrl": null}).to_string()
                ));
                t.start();
                t.until_events("failed", 1).await;
                let failed = t.failed();
                assert_eq!(failed[0].conversation, Some(42), "{event}");
                let at = failed[0].event_at.expect("a time");
                assert_eq!(at.to_string(), time(5), "{event}");
                let run = |arguments: &[&str]| {
                    let output = t.failed_command(arguments);
                    output.unwrap_or_else(|error| error.to_string())
                };
                let list = run(&["list"]);
                assert!(list.contains(" 42 ") && list.contains(&time(5)), "{list}");
                assert!(!list.contains("1970"), "{list}");
                let show = run(&["show", &failed[0].id.to_string()]);
                assert!(show.contains(&time(5)) && !show.contains("1970"), "{show}");
                let retried = run(&["retry", "--all"]);
                assert!(
                    retried.contains("1 failed event still cannot be parsed"),
                    "{retried}"
                );
            })
            .await;
        },
    )
    .await;
}
