//! The consequences of each failure of either API, and the attempts recorded in the journal.

use crate::harness::process::free_address;
use crate::harness::services::{NOW, line, time, unix};
use crate::harness::{Bench, Daemon, Test, run_test, side_by_side, until};
use bigchat_sync::domain::time::Timestamp;
use bigchat_sync::http::Api;
use bigchat_sync::simulator::bigchat::raw;
use bigchat_sync::simulator::event::{end, message, start, transfer};
use bigchat_sync::simulator::fault::{Fault, dropped, late, paused, status};
use bigchat_sync::simulator::id;
use std::time::{Duration, SystemTime};

use bigchat_sync::cli::CommandError;
use serde_json::json;
use wiremock::MockServer;

const NO_ANSWER: &str = "OurAPI gave no usable answer";
const LATE: &str = "OurAPI did not answer in time";
const TURNED_AWAY: &str = "OurAPI cannot be reached or refuses requests";
const DENIED: &str =
    "OurAPI rejected the credentials; renew BIGCHAT_SYNC_OUR_API_TOKEN or check --our-api-url";
const PROXY: &str = "a firewall or proxy in front of OurAPI refuses the request";
const REDIRECT: &str = "OurAPI redirects to http://";
const REFUSED: &str = "OurAPI permanently rejects it";

/// This machine's clock, in Unix ms.
fn now() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    i64::try_from(now.expect("after 1970").as_millis()).expect("soon")
}

const POST: &str = "POST /chats/c1/messages";
const READ: &str = "GET /chats/c1/messages";
const FIND: &str = "GET /chats?external_id=42";

/// A running daemon that has written the chat of conversation 42 with its agent.
async fn with_a_chat(t: &Test) -> Daemon {
    let daemon = t.start();
    t.delivers([start(42, 0)]).await;
    daemon
}

/// The requests without their bodies.
fn heads(asked: &[String]) -> Vec<&str> {
    let head = |line: &'_ String| line.find(" {").unwrap_or(line.len());
    asked.iter().map(|line| &line[..head(line)]).collect()
}

/// Shortens the request timeout for cases with a late response. In other cases, requests could time out on a busy
/// machine.
fn time_out_if_late(t: &Bench, case: &str) {
    if case.contains("late") {
        t.set("--request-timeout", "1s");
    }
}

/// Shortens the request timeout, because nothing is sent to OurAPI for that long after a crash.
fn shorten_request_timeout(t: &Bench) {
    t.set("--request-timeout", "4s");
}

/// Checks the only failed attempt at the latest event of a kind.
fn failed_once(t: &Bench, kind: &str, case: &str, reason: &str, request: &str, response: &str) {
    let attempts = t.failed_attempts(t.latest(kind));
    let [attempt] = &attempts[..] else {
        panic!("{case}: one attempt fails: {attempts:#?}");
    };
    for (is, begins) in [
        (&attempt.reason, reason),
        (&attempt.request, request),
        (&attempt.response, response),
    ] {
        assert!(is.starts_with(begins), "{case}: {is}");
    }
    assert_eq!(t.counted_attempts(), 0, "{case}");
}

/// A message is sent again after each failure; if its outcome is unknown, the chat is read first.
#[tokio::test]
async fn message_after_each_failure() {
    let elsewhere = MockServer::start().await;
    let redirect = status(307).header("location", &elsewhere.uri());
    let no_agent_named = status(400).body(r#"{"detail":"That agent does not exist."}"#);
    let (no_agent, lost) = ("OurAPI does not know the agent", "incomplete response: ");
    let (read_back, not) = (&[POST, FIND, READ, POST][..], &[POST, POST][..]);
    side_by_side(
        [
            ("500", status(500), read_back, NO_ANSWER, "500"),
            ("502", status(502), read_back, NO_ANSWER, "502"),
            ("503", status(503), read_back, NO_ANSWER, "503"),
            ("408", status(408), read_back, NO_ANSWER, "408"),
            ("425", status(425), read_back, NO_ANSWER, "425"),
            ("a redirect", redirect, read_back, REDIRECT, "307"),
            (
                "HTML",
                status(200).body("<p>"),
                read_back,
                NO_ANSWER,
                "200 <p>",
            ),
            ("dropped", dropped(), read_back, NO_ANSWER, lost),
            ("late", late(), read_back, LATE, "no answer in time"),
            (
                "404",
                status(404),
                &[POST, FIND, FIND, READ, POST],
                NO_ANSWER,
                "404",
            ),
            ("429", status(429), not, TURNED_AWAY, "429"),
            ("423", status(423), not, TURNED_AWAY, "423"),
            ("401", status(401), read_back, DENIED, "401"),
            ("403", status(403), read_back, DENIED, "403"),
            ("407", status(407), read_back, PROXY, "407"),
            (
                "a page",
                status(413).body("<p>"),
                read_back,
                "the service does not seem to be OurAPI",
                "413 <p>",
            ),
            ("400", no_agent_named, not, no_agent, "400 {"),
        ],
        async |(case, upset, asked, reason, response)| {
            let may_be_there = asked.contains(&READ);
            for carried_out in [false, true] {
                if carried_out && !may_be_there {
                    continue;
                }
                run_test(async |t| {
                    time_out_if_late(t, case);
                    with_a_chat(t).await;
                    let upset = upset.clone();
                    let (upset, asked) = if carried_out {
                        (upset.carried_out(), &asked[..asked.len() - 1])
                    } else {
                        (upset, asked)
                    };
                    t.our_api.upset(POST, upset);
                    let delivered = t.delivers([message(42, 5, "Hello")]).await;
                    assert_eq!(heads(&delivered), asked, "{case}");
                    assert_eq!(t.our_api.messages(), ["Hello"], "{case}");
                    let request = "POST /chats/00000000-0000-0000-0000-0000000000c1/messages {";
                    failed_once(t, "MESSAGE", case, reason, request, response);
                })
                .await;
            }
        },
    )
    .await;
    let received = elsewhere.received_requests().await;
    assert_eq!(received.expect("it records").len(), 0);
}

/// An event that is permanently rejected becomes a dead letter immediately, and the conversation makes progress without
/// it.
#[tokio::test]
async fn permanent_rejection_is_dead_lettered() {
    side_by_side([400, 409, 410, 413, 422], async |refusal| {
        let upset = status(refusal).body(r#"{"detail":"No."}"#);
        run_test(async |t| {
            t.differs("OurAPI rejects events that it could store");
            with_a_chat(t).await;
            t.our_api.asked();
            t.our_api
                .upset("POST /chats/c1/messages*bad", upset.clone());
            t.our_api.upset("PATCH /chats/c1", upset);
            t.bigchat
                .reports([message(42, 5, "bad"), end(42, 6), message(42, 7, "good")]);
            t.until_events("failed", 2).await;
            t.until_events("delivered", 2).await;
            assert_eq!(t.our_api.messages(), ["good"]);
            let asked = t.our_api.asked();
            let patch = "PATCH /chats/c1";
            assert_eq!(heads(&asked), [patch, POST, POST], "{refusal}");
            let failed = t.failed();
            assert_eq!([&failed[0].kind, &failed[1].kind], ["MESSAGE", "END"]);
            for event in failed {
                assert_eq!(
                    (event.attempts, &*event.reason),
                    (1, &*format!("{REFUSED}: No."))
                );
                assert_eq!(event.conversation, Some(42));
                let (request, response) = (event.request, event.response);
                assert!(request.is_some_and(|request| request.contains("/chats/")));
                assert_eq!(response, Some(format!(r#"{refusal} {{"detail":"No."}}"#)));
            }
            assert_eq!(
                t.delivers([end(42, 8)]).await,
                [line(patch, json!({"ended_at": time(8)}))],
                "{refusal}: the rejected end is not sent again"
            );
        })
        .await;
    })
    .await;
}

/// Without its chat, every event of a conversation fails, and all of them can be retried.
#[tokio::test]
async fn retry_after_rejected_chat() {
    run_test(async |t| {
        t.our_api.upset("POST /chats", status(422).always());
        let daemon = t.start();
        t.bigchat.reports([
            start(42, 0),
            message(42, 5, "one"),
            end(42, 6),
            message(42, 7, "two"),
        ]);
        t.until_events("failed", 4).await;
        t.our_api.calm();
        let printed = t.failed_command(&["retry", "--all"]);
        assert!(printed.expect("they are there").starts_with("4 "));
        t.until_events("delivered", 4).await;
        daemon.stop().await;
        assert_eq!(t.our_api.chats(), ["42 22:00:00 22:00:06 a1"]);
        assert_eq!(t.our_api.messages(), ["one", "two"]);
    })
    .await;
}

/// A proxy may reject a message that OurAPI has added. The retry finds it.
#[tokio::test]
async fn retry_of_a_rejected_message_that_was_added() {
    run_test(async |t| {
        with_a_chat(t).await;
        let upset = status(422).body("{}").carried_out();
        t.our_api.upset(POST, upset);
        t.bigchat.reports([message(42, 5, "Hello")]);
        t.until_events("failed", 1).await;
        t.our_api.asked();
        let printed = t.failed_command(&["retry", "--all"]);
        assert!(printed.expect("it is there").starts_with("1 "));
        t.until_events("delivered", 2).await;
        assert_eq!(heads(&t.our_api.asked()), [FIND, READ]);
        assert_eq!(t.our_api.messages(), ["Hello"]);
    })
    .await;
}

/// Lets OurAPI refuse a message once. After a rejection, the message is retried.
async fn delivers_after(t: &Test, refusal: u16) {
    t.our_api.upset(POST, status(refusal).body("{}"));
    t.bigchat.reports([message(42, 5, "Hello")]);
    if refusal == 422 {
        t.until_events("failed", 1).await;
        t.failed_command(&["retry", "--all"]).expect("it is there");
    }
    t.until_events("delivered", 2).await;
}

/// A message that a proxy refuses, or that is retried after a rejection, is not mistaken for another client's message
/// of the same second.
#[tokio::test]
async fn refused_message_beside_another_clients() {
    side_by_side([403, 422], async |refusal| {
        run_test(async |t| {
            t.differs("another client adds a message");
            let daemon = with_a_chat(t).await;
            t.our_api.has_message("c1", 5, "of another client");
            delivers_after(t, refusal).await;
            daemon.stop().await;
            assert_eq!(t.our_api.sorted_messages(), ["Hello", "of another client"]);
        })
        .await;
    })
    .await;
}

/// A refused message does not overwrite what another client has changed meanwhile.
#[tokio::test]
async fn refused_message_and_a_changed_agent() {
    side_by_side([401, 422], async |refusal| {
        run_test(async |t| {
            t.differs("another client changes the agent");
            let daemon = with_a_chat(t).await;
            t.our_api.is_changed("42", &json!({"agent_id": null})).await;
            delivers_after(t, refusal).await;
            daemon.stop().await;
            assert_eq!(t.our_api.chats(), ["42 22:00:00 - -"], "{refusal}");
        })
        .await;
    })
    .await;
}

/// A message that could not be parsed at first does not overwrite what another client has changed meanwhile.
#[tokio::test]
async fn unparsable_message_and_a_changed_agent() {
    run_test(async |t| {
        t.differs("another client changes the agent");
        let daemon = with_a_chat(t).await;
        let note = json!({
            "conversation_id": 42, "event_name": "NOTE", "event_at": unix(5), "data": {"message": "Hello"}
        });
        t.bigchat.reports([note]);
        t.until_events("failed", 1).await;
        t.our_api.is_changed("42", &json!({"agent_id": null})).await;
        // As if this program were a version that can parse it.
        t.execute("UPDATE events SET data = replace(data, 'NOTE', 'MESSAGE') WHERE kind = 'UNREADABLE'");
        t.failed_command(&["retry", "--all"]).expect("it is there");
        t.until_events("delivered", 2).await;
        daemon.stop().await;
        assert_eq!(t.our_api.messages(), ["Hello"]);
        assert_eq!(t.our_api.chats(), ["42 22:00:00 - -"]);
    })
    .await;
}

/// A denied advisor is asked about again after a poll interval, however long that is.
#[tokio::test]
async fn denial_with_a_long_poll_interval() {
    run_test(async |t| {
        t.differs("the advisor is denied");
        t.set("--poll-interval", "2h");
        t.bigchat.forgets_advisor(7);
        t.bigchat.reports([start(42, 0), message(42, 1, "Hello")]);
        t.start();
        let advisor = "GET /advisors/7";
        until("it is denied", async || t.bigchat.count(advisor) > 0).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let count = t.bigchat.count(advisor);
        assert!(count <= 2, "{count} requests");
    })
    .await;
}

/// A denial is no failed attempt, so changes are still merged after it.
#[tokio::test]
async fn merged_changes_after_a_denial() {
    run_test(async |t| {
        t.bigchat.upset("GET /advisors/8", status(404));
        let daemon = t.start();
        let asked = t
            .delivers([start(42, 0), transfer(42, 3, 8), end(42, 9)])
            .await;
        daemon.stop().await;
        let writes = asked.iter().filter(|line| !line.starts_with("GET"));
        assert_eq!(writes.count(), 2, "an agent and a chat: {asked:?}");
    })
    .await;
}

/// The messages are read back after the restart, and only what is missing is sent.
#[tokio::test]
async fn crash_with_a_message_in_flight() {
    side_by_side([false, true], async |carried_out| {
        run_test(async |t| {
            shorten_request_timeout(t);
            let daemon = with_a_chat(t).await;
            let upset = if carried_out {
                late().carried_out()
            } else {
                late()
            };
            t.our_api.upset(POST, upset);
            t.our_api.asked();
            t.bigchat
                .reports([message(42, 5, "one"), message(42, 6, "two")]);
            until("it is sent", async || t.our_api.count(POST) == 1).await;
            daemon.crash(t).await;
            let daemon = t.start();
            t.until_events("delivered", 3).await;
            daemon.stop().await;
            let left = if carried_out { 1 } else { 2 };
            let expected = [vec![POST, FIND, READ], vec![POST; left]].concat();
            assert_eq!(heads(&t.our_api.asked()), expected);
            assert_eq!(t.our_api.messages(), ["one", "two"]);
        })
        .await;
    })
    .await;
}

/// The chat is read back after the restart.
#[tokio::test]
async fn crash_during_a_chat_change() {
    let [create, change] = ["POST /chats", "PATCH /chats/c1"];
    let part = line(change, json!({"ended_at": time(9)}));
    side_by_side([false, true], async |carried_out| {
        let upset = || {
            if carried_out {
                late().carried_out()
            } else {
                late()
            }
        };
        run_test(async |t| {
            shorten_request_timeout(t);
            t.our_api.upset(create, upset());
            let daemon = t.start();
            t.bigchat.reports([start(42, 0)]);
            until("it is sent", async || t.our_api.count(create) == 1).await;
            daemon.crash(t).await;
            t.our_api.asked();
            let daemon = t.start();
            t.until_events("delivered", 1).await;
            let asked = t.our_api.asked();
            let conflict = if carried_out { &[FIND, READ][..] } else { &[] };
            assert_eq!(heads(&asked), [&[create], conflict].concat());

            t.our_api.upset(change, upset());
            t.bigchat.reports([end(42, 9)]);
            until("it is sent", async || t.our_api.count(change) == 1).await;
            daemon.crash(t).await;
            let daemon = t.start();
            t.until_events("delivered", 2).await;
            daemon.stop().await;
            let again = if carried_out { &[][..] } else { &[&*part] };
            assert_eq!(t.our_api.asked(), [&[&*part, FIND, READ], again].concat());
            assert_eq!(t.our_api.chats(), ["42 22:00:00 22:00:09 a1"]);
        })
        .await;
    })
    .await;
}

/// The conflict at the next attempt shows whether the chat was created.
#[tokio::test]
async fn chat_creation_with_unknown_outcome() {
    let create = "POST /chats";
    side_by_side(
        [
            ("500", status(500), true),
            ("503", status(503), true),
            (
                "503 with Retry-After",
                status(503).header("retry-after", "0"),
                true,
            ),
            ("HTML", status(201).body("<p>"), true),
            ("dropped", dropped(), true),
            ("late", late(), true),
            ("429", status(429), false),
            ("401", status(401), false),
        ],
        async |(case, upset, outcome_unknown)| {
            for carried_out in [false, true] {
                let (upset, expected) = match (outcome_unknown, carried_out) {
                    (true, false) => (upset.clone(), vec![create, create]),
                    // The conflict shows that it was carried out.
                    (true, true) => (
                        upset.clone().carried_out(),
                        vec![create, create, FIND, READ],
                    ),
                    (false, _) => (upset.clone(), vec![create, create]),
                };
                run_test(async |t| {
                    time_out_if_late(t, case);
                    t.our_api.has_agent("a1", "Ann", "ann@x.test");
                    t.our_api.upset(create, upset);
                    t.start();
                    let asked = t.delivers([start(42, 0)]).await;
                    assert_eq!(heads(&asked)[1..], expected, "{case}");
                    assert_eq!(t.our_api.chats(), ["42 22:00:00 - a1"], "{case}");
                })
                .await;
            }
        },
    )
    .await;
}

/// A service that reports a conflict without having the chat is not OurAPI, and the error names the setting.
#[tokio::test]
async fn conflict_without_a_chat() {
    run_test(async |t| {
        t.our_api.has_agent("a1", "Ann", "ann@x.test");
        t.our_api.upset("POST /chats", status(404));
        t.start();
        let asked = t.delivers([start(42, 0)]).await;
        assert_eq!(heads(&asked)[1..], ["POST /chats", FIND, "POST /chats"]);
        let reason = "the service does not seem to be OurAPI; check --our-api-url";
        failed_once(t, "START", "", reason, "POST /chats", "404");
    })
    .await;
}

/// The chat is read back, and the change is sent again only if it is missing there.
#[tokio::test]
async fn change_with_unknown_outcome() {
    let part = &*line("PATCH /chats/c1", json!({"ended_at": time(9)}));
    let (again, carried_out) = (vec![part, FIND, part], vec![part, FIND]);
    side_by_side(
        [
            ("500", status(500), again.clone()),
            (
                "500, carried out",
                status(500).carried_out(),
                carried_out.clone(),
            ),
            ("dropped", dropped(), again.clone()),
            ("late", late().carried_out(), carried_out.clone()),
            ("404", status(404), vec![part, FIND, FIND, part]),
            (
                "503 with Retry-After",
                status(503).header("retry-after", "0").carried_out(),
                carried_out.clone(),
            ),
            ("429", status(429), vec![part, part]),
            ("403", status(403), again.clone()),
            (
                "403, carried out",
                status(403).carried_out(),
                carried_out.clone(),
            ),
        ],
        async |(case, upset, expected)| {
            run_test(async |t| {
                time_out_if_late(t, case);
                with_a_chat(t).await;
                t.our_api.upset("PATCH", upset);
                let asked = t.delivers([end(42, 9)]).await;
                assert_eq!(asked, expected, "{case}");
                assert_eq!(t.our_api.chats(), ["42 22:00:00 22:00:09 a1"], "{case}");
            })
            .await;
        },
    )
    .await;
}

/// An agent is created once, whatever goes wrong.
#[tokio::test]
async fn agent_creation_after_each_failure() {
    let [list, create, by_name] = [
        "GET /agents?email=ann%40x.test",
        "POST /agents",
        "GET /agents?name=Ann",
    ];
    side_by_side(
        [
            (
                "list: 500",
                "GET /agents",
                status(500),
                vec![list, list, create],
            ),
            (
                "list: no JSON",
                "GET /agents",
                status(200),
                vec![list, list, create],
            ),
            (
                "list: 404",
                "GET /agents",
                status(404),
                vec![list, list, create],
            ),
            (
                "list: dropped",
                "GET /agents",
                dropped(),
                vec![list, list, create],
            ),
            (
                "500",
                create,
                status(500),
                vec![list, create, list, by_name, list, create],
            ),
            (
                "500, done",
                create,
                status(500).carried_out(),
                vec![list, create, list],
            ),
            (
                "list: 409",
                "GET /agents",
                status(409).body("{}"),
                vec![list, list, create],
            ),
            ("429", create, status(429), vec![list, create, list, create]),
            (
                "dropped",
                create,
                dropped(),
                vec![list, create, list, create],
            ),
            (
                "dropped, done",
                create,
                dropped().carried_out(),
                vec![list, create, list],
            ),
            (
                "409, done",
                create,
                status(409).carried_out(),
                vec![list, create, list],
            ),
        ],
        async |(case, pattern, upset, expected)| {
            run_test(async |t| {
                t.our_api.upset(pattern, upset);
                t.start();
                let asked = t.delivers([start(42, 0)]).await;
                let expected = [expected, vec!["POST /chats"]].concat();
                assert_eq!(heads(&asked), expected, "{case}");
                assert_eq!(t.our_api.chats(), ["42 22:00:00 - a1"], "{case}");
            })
            .await;
        },
    )
    .await;
}

/// An agent appears between the two lists that are read after a failed creation.
#[tokio::test]
async fn agent_created_between_two_lists() {
    run_test(async |t| {
        t.our_api.upset("POST /agents", status(500));
        t.our_api.upset("GET /agents?name", paused());
        t.start();
        t.bigchat.reports([start(42, 0)]);
        until("the second list", async || t.our_api.pausing() == 1).await;
        t.our_api.has_agent("a1", "Ann", "ann@x.test");
        t.our_api.resume();
        t.until_events("delivered", 1).await;
        assert_eq!(t.our_api.chats(), ["42 22:00:00 - a1"]);
    })
    .await;
}

/// A 404 does not mean that the agent exists: it comes from another service.
#[tokio::test]
async fn stray_404_creates_no_namesake() {
    side_by_side(
        [(404, 1), (404, 2), (409, 1), (409, 2)],
        async |(code, times)| {
            run_test(async |t| {
                t.our_api.upset("POST /agents", status(code).times(times));
                t.start();
                t.delivers([start(42, 0)]).await;
                assert_eq!(t.our_api.chats(), ["42 22:00:00 - a1"], "{code} {times}");
                assert_eq!(t.our_api.data().agents[0].name, "Ann", "{code} {times}");
            })
            .await;
        },
    )
    .await;
}

/// An address that OurAPI rejects again and again leaves its chats without an agent.
#[tokio::test]
async fn address_is_always_rejected() {
    run_test(async |t| {
        t.differs("OurAPI rejects the agent");
        t.set("--retry-initial", "800ms")
            .set("--retry-max", "800ms");
        t.our_api
            .upset("GET /agents", status(400).body("{}").always());
        t.start();
        t.delivers([start(42, 0)]).await;
        assert_eq!(t.our_api.chats(), ["42 22:00:00 - -"]);
    })
    .await;
}

/// A longer address that contains the requested one belongs to another agent.
#[tokio::test]
async fn longer_address_and_a_failed_creation() {
    run_test(async |t| {
        t.our_api.has_agent("a9", "Bob", "joann@x.test");
        let listed = json!([{"agent_id": id("a9"), "name": "Bob", "email": "joann@x.test"}]);
        let contains = status(200).body(listed.to_string());
        t.our_api
            .upset("GET /agents?email=ann%40x.test", contains.times(2));
        t.our_api.upset("POST /agents", status(500));
        t.start();
        t.delivers([start(42, 0)]).await;
        assert_eq!(t.our_api.faults_left(), 0);
        assert_eq!(t.our_api.chats(), ["42 22:00:00 - a2"]);
    })
    .await;
}

/// A message that OurAPI has altered is not sent again, even if the chat is read twice before its credit is used.
#[tokio::test]
async fn altered_message_and_a_failed_change() {
    run_test(async |t| {
        let daemon = with_a_chat(t).await;
        let altered = json!([{"message_id": id("m1"), "sent_at": time(5), "text": "**** it"}]);
        let listed = status(200).body(altered.to_string()).always();
        t.our_api.upset(READ, listed);
        t.our_api.upset("PATCH", status(500).times(2));
        t.our_api.upset(POST, dropped().carried_out());
        t.our_api.upset("GET /chats?external_id=42", paused());
        t.bigchat.reports([message(42, 5, "damn it")]);
        until("the chat is read", async || t.our_api.pausing() == 1).await;
        // The end arrives before the credit is used, and is written first.
        t.bigchat.reports([end(42, 9)]);
        until("it waits", async || t.events("waiting") == 2).await;
        t.our_api.resume();
        t.until_events("delivered", 3).await;
        daemon.stop().await;
        assert_eq!(t.our_api.count("PATCH"), 3);
        assert_eq!(t.our_api.messages(), ["damn it"]);
    })
    .await;
}

/// A failed creation under the longer name does not prove that the address is taken.
#[tokio::test]
async fn namesake_and_a_failed_creation() {
    run_test(async |t| {
        t.our_api.has_agent("a1", "Ann", "another@x.test");
        t.our_api.upset("POST /agents {*Ann (", status(500));
        t.start();
        t.delivers([start(42, 0)]).await;
        assert_eq!(t.our_api.faults_left(), 0);
        assert_eq!(t.our_api.chats(), ["42 22:00:00 - a2"]);
    })
    .await;
}

/// Each of two equal messages is sent once.
#[tokio::test]
async fn equal_messages_with_unknown_outcome() {
    side_by_side(
        [(true, true), (true, false), (false, true), (false, false)],
        async |(carried_out, first)| {
            run_test(async |t| {
                with_a_chat(t).await;
                let hi = message(42, 5, "hi");
                if !first {
                    t.delivers([hi.clone()]).await;
                }
                let upset = if carried_out {
                    dropped().carried_out()
                } else {
                    dropped()
                };
                t.our_api.upset(POST, upset);
                t.our_api.asked();
                t.bigchat.reports([hi.clone(), hi]);
                t.until_events("delivered", 3).await;
                let left = usize::from(first) + usize::from(!carried_out);
                let expected = [vec![POST, FIND, READ], vec![POST; left]].concat();
                assert_eq!(
                    heads(&t.our_api.asked()),
                    expected,
                    "carried out: {carried_out}, the first: {first}"
                );
                assert_eq!(t.our_api.messages(), ["hi", "hi"]);
            })
            .await;
        },
    )
    .await;
}

/// A request that was never sent needs no read-back.
#[tokio::test]
async fn no_connection_needs_no_read() {
    run_test(async |t| {
        let daemon = with_a_chat(t).await;
        daemon.stop().await;
        let address = free_address();
        t.set("--our-api-url", &format!("http://{address}"))
            .set("--poll-overlap", "1s");
        t.start();
        // Chats with events from before the start are read back in any case, so the windows must begin after the start.
        t.bigchat.further_polls(1).await;
        let here = Timestamp::of_this_machine().unix();
        t.bigchat.clock_runs(unix(NOW) - here);
        t.until_cursor_passes(NOW).await;
        t.our_api.asked();
        t.bigchat.reports([message(42, 5, "Hello")]);
        t.until_events("waiting", 1).await;
        until("three attempts", async || t.attempts() >= 3).await;
        assert_eq!((t.counted_attempts(), t.unknown_outcomes()), (0, 0));
        let attempt = &t.failed_attempts(t.latest("MESSAGE"))[0];
        assert_eq!(attempt.reason, TURNED_AWAY);
        let response = &attempt.response;
        assert!(response.starts_with("no connection: "), "{response}");
        let address = address.parse().expect("an address");
        t.our_api.move_to(address).await;
        t.until_events("delivered", 2).await;
        assert_eq!(heads(&t.our_api.asked()), [POST]);
    })
    .await;
}

/// An event that fails again and again while others get through becomes a dead letter, and its conversation makes
/// progress.
#[tokio::test]
async fn poison_event_among_others() {
    run_test(async |t| {
        t.set("--max-attempts", "3");
        with_a_chat(t).await;
        t.delivers([start(43, 1)]).await;
        let poisoned = "POST /chats/c1/messages*poison";
        t.our_api.upset(poisoned, status(500).always());
        t.bigchat
            .reports([message(42, 5, "poison"), message(42, 6, "after")]);
        let mut others = 0;
        while t.events("failed") == 0 {
            others += 1;
            assert!(others < 300, "it never fails");
            let text = format!("other {others}");
            t.bigchat.reports([message(43, others, &text)]);
            t.bigchat.further_polls(1).await;
        }
        t.until_events("delivered", others + 3).await;
        let failed = &t.failed()[0];
        assert!(failed.reason.starts_with(NO_ANSWER), "{}", failed.reason);
        assert!(
            failed
                .request
                .as_ref()
                .is_some_and(|request| request.contains("poison"))
        );
        assert!(
            failed
                .response
                .as_ref()
                .is_some_and(|response| response.starts_with("500"))
        );
        assert_eq!(t.counted_attempts(), 3);
        let tries = t.our_api.count(poisoned);
        assert_eq!(usize::try_from(failed.attempts), Ok(tries));
        let mut messages = t.our_api.messages();
        messages.retain(|text| !text.starts_with("other"));
        assert_eq!(messages, ["after"]);

        // The next attempt finds out whether the last one was carried out.
        t.our_api.has_message("c1", 5, "poison");
        t.our_api.calm();
        let id = failed.id.to_string();
        let printed = t.failed_command(&["retry", &id]).expect("it is there");
        assert!(
            printed.starts_with("1 failed event will be retried"),
            "{printed}"
        );
        t.until_events("delivered", others + 4).await;
        assert_eq!(t.our_api.count(poisoned), tries, "its chat was read");
    })
    .await;
}

#[tokio::test]
async fn outage_spends_no_attempts() {
    side_by_side(
        [
            ("503", status(503), NO_ANSWER),
            ("dropped", dropped(), NO_ANSWER),
            ("401", status(401), DENIED),
            ("429", status(429), TURNED_AWAY),
        ],
        async |(case, upset, reason)| {
            run_test(async |t| {
                t.set("--max-attempts", "1");
                let daemon = with_a_chat(t).await;
                t.delivers([start(43, 1)]).await;
                t.our_api.upset("", upset.always());
                let texts = ["one", "two", "three", "four"];
                t.bigchat.reports(
                    [42, 43, 42, 43]
                        .iter()
                        .zip(texts)
                        .map(|(id, text)| message(*id, 5, text)),
                );
                until("four attempts at one event", async || t.attempts() >= 4).await;
                assert_eq!(t.counted_attempts(), 0, "{case}");
                let tried: Vec<_> = (1..=6)
                    .map(|event| t.failed_attempts(event))
                    .filter(|attempts| !attempts.is_empty())
                    .collect();
                assert_eq!(tried.len(), 2, "{case}: one of each conversation");
                for attempt in tried.iter().flatten() {
                    assert!(attempt.reason.starts_with(reason), "{case}: {attempt:?}");
                }
                assert_eq!(t.events("waiting"), 4, "{case}");
                t.our_api.calm();
                t.until_events("delivered", 6).await;
                daemon.stop().await;
                assert_eq!(
                    t.our_api.sorted_messages(),
                    ["four", "one", "three", "two"],
                    "{case}"
                );
            })
            .await;
        },
    )
    .await;
}

/// Adds a `retry-after` that is one second after the `date` of the same response.
fn in_a_second(upset: Fault) -> Fault {
    let now = SystemTime::now();
    let date = |at| httpdate::fmt_http_date(at);
    upset
        .header("date", &date(now))
        .header("retry-after", &date(now + Duration::from_secs(1)))
}

#[tokio::test]
async fn retry_after_in_each_form() {
    let past = "Sun, 22 Nov 2020 22:00:00 GMT";
    let after = |code, after: &str| status(code).header("retry-after", after);
    let (again, read_back) = (&[POST, POST][..], &[POST, FIND, READ, POST][..]);
    side_by_side(
        [
            ("429, seconds", after(429, "1"), again, true),
            ("429, a date", in_a_second(status(429)), again, true),
            ("503, seconds", after(503, "1"), read_back, true),
            ("503, a date", in_a_second(status(503)), read_back, true),
            ("429, nonsense", after(429, "in a while"), again, false),
            ("429, negative", after(429, "-1"), again, false),
            ("429, past", after(429, past), again, false),
            ("503, nonsense", after(503, "1.5"), read_back, false),
            ("500", after(500, "3600"), read_back, false),
            ("408", after(408, "3600"), read_back, false),
        ],
        async |(case, upset, expected, waits)| {
            run_test(async |t| {
                with_a_chat(t).await;
                t.our_api.upset(POST, upset);
                let asked = t.delivers([message(42, 5, "Hello")]).await;
                assert_eq!(heads(&asked), expected, "{case}");
                let all = t.our_api.ever_asked("");
                let since = all.len() - expected.len();
                let pause = all[since + 1].at.duration_since(all[since].at);
                if waits {
                    assert!(pause >= Duration::from_millis(900), "{case}: {pause:?}");
                    let reason = &t.failed_attempts(t.latest("MESSAGE"))[0].reason;
                    assert!(
                        reason.starts_with("OurAPI is rate-limited until "),
                        "{reason}"
                    );
                }
                // A limit that has passed is no longer recorded.
                if !waits && case != "429, past" {
                    assert_eq!(t.limited_until(Api::OurApi), 0, "{case}");
                }
            })
            .await;
        },
    )
    .await;
}

/// A rate limit outlasts a restart, and lasts an hour at most.
#[tokio::test]
async fn retry_after_across_a_restart() {
    run_test(async |t| {
        let daemon = with_a_chat(t).await;
        let upset = status(429).header("retry-after", "9999999");
        t.our_api.upset(POST, upset);
        t.our_api.asked();
        t.bigchat.reports([message(42, 5, "Hello")]);
        let left = |t: &Bench| t.limited_until(Api::OurApi) - now();
        until("it is stored", async || left(t) > 0).await;
        assert!(left(t) <= 3_600_000);
        daemon.stop().await;
        assert_eq!(heads(&t.our_api.asked()), [POST]);

        let daemon = t.start();
        t.bigchat.reports([start(43, 1), message(42, 6, "more")]);
        t.bigchat.further_polls(5).await;
        t.until_events("waiting", 3).await;
        t.bigchat.further_polls(3).await;
        daemon.stop().await;
        assert_eq!(t.our_api.asked().len(), 0, "nothing is asked meanwhile");
        assert!(left(t) > 3_500_000);

        let soon = t.limited_until(Api::OurApi) - left(t) + 500;
        t.set_limited_until(Api::OurApi, soon);
        let daemon = t.start();
        t.until_events("delivered", 4).await;
        daemon.stop().await;
        assert!(left(t) <= 0);
        assert_eq!(t.our_api.messages(), ["Hello", "more"]);
    })
    .await;
}

/// Details and advisors that BigChat does not return are requested again.
#[tokio::test]
async fn details_after_each_failure() {
    let html = || status(200).body("<html>");
    let reason = "BigChat gave no usable answer";
    let denied =
        "BigChat rejected the credentials; renew BIGCHAT_SYNC_BIGCHAT_TOKEN or check --bigchat-url";
    let (details, advisor) = ("GET /conversations/42", "GET /advisors/7");
    side_by_side(
        [
            ("details: 500", details, status(500), reason, "500"),
            (
                "details: late",
                details,
                late(),
                "BigChat did not answer in time",
                "no answer in time",
            ),
            ("details: HTML", details, html(), reason, "200 <html>"),
            ("details: 401", details, status(401), denied, "401"),
            ("advisor: 500", advisor, status(500), reason, "500"),
            ("advisor: 403", advisor, status(403), denied, "403"),
            ("advisor: HTML", advisor, html(), reason, "200 <html>"),
        ],
        async |(case, pattern, upset, reason, response)| {
            run_test(async |t| {
                time_out_if_late(t, case);
                t.bigchat.upset(pattern, upset);
                t.start();
                t.delivers([start(42, 0), message(42, 5, "Hello")]).await;
                let mut expected = vec![details, advisor];
                let again = expected.iter().position(|line| *line == pattern);
                expected.insert(again.expect("one of them"), pattern);
                assert_eq!(t.bigchat.asked_besides(), expected, "{case}");
                assert_eq!(t.our_api.chats(), ["42 22:00:00 - a1"], "{case}");
                assert_eq!(t.our_api.messages(), ["Hello"], "{case}");
                failed_once(t, "START", case, reason, pattern, response);
                assert_eq!(t.unknown_outcomes(), 0, "{case}");
            })
            .await;
        },
    )
    .await;
}

#[tokio::test]
async fn bigchat_outage_spends_no_attempts() {
    side_by_side(
        [
            (status(429).header("retry-after", "3600"), true),
            (status(503).header("retry-after", "3600"), true),
            (status(401).always(), false),
            (status(403).always(), false),
        ],
        async |(upset, for_an_hour)| {
            run_test(async |t| {
                t.differs("BigChat is rate-limited or fails to the end");
                t.set("--max-attempts", "1");
                t.start();
                t.delivers([start(43, 1), transfer(43, 2, 8)]).await;
                t.bigchat.upset("GET /conversations/42", upset);
                // These need no request to BigChat, and are delivered between the attempts at the first.
                let others = (100..140).flat_map(|id| [start(id, 3), transfer(id, 4, 8)]);
                t.bigchat
                    .reports(std::iter::once(start(42, 0)).chain(others));
                t.until_events("delivered", 2 + 80).await;
                until("it waits or fails", async || {
                    let waits = match for_an_hour {
                        true => t.limited_until(Api::BigChat) > now() + 3_500_000,
                        false => t.attempts() >= 3,
                    };
                    waits || t.events("failed") > 0
                })
                .await;
                assert_eq!(t.failed(), []);
                assert_eq!(t.counted_attempts(), 0);
            })
            .await;
        },
    )
    .await;
}

/// A chat counts as lost only if the list of chats does not have it.
#[tokio::test]
async fn chat_missing_from_the_list() {
    run_test(async |t| {
        let daemon = with_a_chat(t).await;
        t.delivers([message(42, 5, "one")]).await;
        t.our_api.upset(POST, status(404));
        t.our_api.upset(FIND, status(500));
        let asked = t.delivers([message(42, 6, "two")]).await;
        assert_eq!(heads(&asked), [POST, FIND, POST]);
        assert_eq!(t.our_api.messages(), ["one", "two"]);

        t.delivers([transfer(42, 7, 8), end(42, 8)]).await;
        t.our_api.loses_everything();
        t.bigchat.reports([message(42, 9, "three")]);
        t.until_events("delivered", 6).await;
        daemon.stop().await;
        assert_eq!(t.our_api.chats(), ["42 22:00:00 22:00:08 a3"]);
        assert_eq!(t.our_api.messages(), ["one", "two", "three"]);
    })
    .await;
}

#[tokio::test]
async fn failed_events_resolved_beside_daemon() {
    run_test(async |t| {
        with_a_chat(t).await;
        let garbled = "{\"event_name\":\"\\u001b[31mREOPEN\u{7f}\"}";
        let page = format!(r#"{{"events":[{},{garbled}]}}"#, message(42, 5, "k"));
        t.bigchat.reports(raw(&page));
        t.until_events("failed", 2).await;
        let command = |arguments: &[&str]| t.failed_command(arguments);
        let answer = |arguments: &[&str]| command(arguments).expect("it is done");

        let list = answer(&["list"]);
        for part in ["MESSAGE", "UNREADABLE", REFUSED, "2 failed events;"] {
            assert!(list.contains(part), "{part}: {list}");
        }
        assert!(answer(&["list", "--limit", "1"]).contains("2 failed events, 1 shown;"));
        let events = t.failed();
        let [refused, unreadable] = [&*events[0].id.to_string(), &*events[1].id.to_string()];
        let shown = answer(&["show", refused]);
        for part in [
            "request      POST /chats/00000000-0000-0000-0000-0000000000c1/messages {",
            "response     422 {\"detail\":",
            "happened at  2026-11-22T22:00:05Z",
            "data         {\"message\":\"k\"}",
            "conversation 42\n",
        ] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
        let shown = answer(&["show", unreadable]);
        assert!(shown.contains("REOPEN\u{fffd}"), "{shown}");
        assert!(matches!(
            command(&["show", "99"]),
            Err(CommandError::NoSuchEvent(99))
        ));

        answer(&["retry", refused]);
        until("it is refused again", async || {
            t.failed_attempts(events[0].id.0).len() == 2 && t.events("failed") == 2
        })
        .await;
        t.our_api.upset(POST, status(200).body("{}"));
        assert!(answer(&["retry", "--all"]).starts_with("1 failed event will be retried"));
        t.until_events("delivered", 2).await;
        assert_eq!(t.our_api.count(POST), 3);
        // The resolutions and the attempts stay recorded.
        let resolutions = t.resolutions();
        assert_eq!(resolutions.len(), 2);
        for past in resolutions {
            assert_eq!(past.resolution.name(), "retry");
            assert!(past.by.ends_with(", command line"), "{}", past.by);
            assert_eq!(
                (past.event, &past.reason),
                (events[0].id, &events[0].reason)
            );
        }
        assert_eq!(t.failed_attempts(events[0].id.0).len(), 2);

        assert!(matches!(
            command(&["retry", unreadable]),
            Err(CommandError::Partly {
                done: 0,
                asked: 1,
                ..
            })
        ));
        assert!(matches!(
            command(&["discard", unreadable, unreadable, refused]),
            Err(CommandError::Partly {
                done: 1,
                asked: 2,
                ..
            })
        ));
        t.until_events("discarded", 1).await;
        assert_eq!(answer(&["list"]), "no event has failed\n");
        assert_eq!(
            answer(&["discard", "--all", "--yes"]),
            "0 failed events discarded\n"
        );
        assert_eq!(answer(&["retry", "--all"]), "no event has failed\n");
    })
    .await;
}

#[tokio::test]
async fn resolution_while_another_process_writes() {
    run_test(async |t| {
        let daemon = with_a_chat(t).await;
        t.bigchat.reports([message(42, 5, "k")]);
        t.until_events("failed", 1).await;
        daemon.stop().await;
        let writer = t.lock_database();
        let written = std::thread::spawn(move || {
            // The command waits inside SQLite, which cannot be observed from outside.
            std::thread::sleep(Duration::from_millis(200));
            drop(writer);
        });
        let printed = t.failed_command(&["discard", "--all", "--yes"]);
        assert_eq!(printed.expect("it is done"), "1 failed event discarded\n");
        written.join().expect("no panic");
    })
    .await;
}

fn deliveries_were_two_hours_ago(t: &Test) {
    t.execute("UPDATE deliveries SET delivered_at = delivered_at - 7200000");
    t.bigchat.clock(3 * 3600);
}

/// Waits until the old event of another conversation is dropped.
async fn until_others_are_dropped(t: &Test) {
    until("an event of another conversation is dropped", async || {
        t.count_events("data LIKE '%of another%'") == 0
    })
    .await;
}

/// A waiting message is not confused with an equal one that was delivered before and is old enough to be dropped.
#[tokio::test]
async fn twin_waits_beyond_the_retention() {
    run_test(async |t| {
        t.set("--retention", "1s").set("--max-window", "10s");
        let daemon = t.start();
        let events = message(42, 10, "ok");
        let other = message(43, 10, "of another");
        t.delivers([start(42, 0), events.clone(), other]).await;
        let failing = status(500).always();
        t.our_api.upset("POST /chats/*/messages", failing);
        // The page has the message twice, so one of the two is new.
        t.bigchat.reports([events.clone(), events]);
        t.until_events("waiting", 1).await;
        t.execute("UPDATE deliveries SET delivered_at = delivered_at - 7200000");
        until_others_are_dropped(t).await;
        t.our_api.calm();
        until("it is delivered", async || t.events("waiting") == 0).await;
        daemon.stop().await;
        assert_eq!(t.our_api.messages(), ["ok", "of another", "ok"]);
    })
    .await;
}

/// A delivered message does not account for an unsent one of the same second, even if the outage outlasts the retention
/// period.
#[tokio::test]
async fn unsent_message_beyond_the_retention() {
    run_test(async |t| {
        t.set("--retention", "1h");
        t.start();
        let other = message(43, 5, "of another");
        t.delivers([start(42, 0), message(42, 5, "first"), other])
            .await;
        let second = "POST /chats/{id}/messages {*second";
        t.our_api.upset(second, dropped());
        t.our_api.upset("GET /chats?external_id=42", paused());
        t.bigchat.reports([message(42, 5, "second")]);
        until("the chat is read", async || t.our_api.pausing() == 1).await;
        t.our_api.outage(Some(status(503)));
        t.our_api.resume();
        deliveries_were_two_hours_ago(t);
        until_others_are_dropped(t).await;
        t.our_api.outage(None);
        until("nothing waits", async || t.events("waiting") == 0).await;
        assert_eq!(t.our_api.messages(), ["first", "of another", "second"]);
    })
    .await;
}

/// The same with a dead letter that is retried after the retention period, even if it was discarded meanwhile.
#[tokio::test]
async fn dead_letter_beyond_the_retention() {
    side_by_side([false, true], async |discarded| {
        run_test(async |t| {
            t.set("--max-attempts", "2").set("--retention", "1h");
            let daemon = t.start();
            let other = message(43, 5, "of another");
            t.delivers([start(42, 0), message(42, 5, "first"), other])
                .await;
            let second = "POST /chats/{id}/messages {*second";
            t.our_api.upset(second, dropped().always());
            t.bigchat.reports([message(42, 5, "second")]);
            let mut others = 6..;
            until("it fails", async || {
                let at = others.next().expect("a number");
                t.bigchat.reports([message(43, at, "meanwhile")]);
                t.bigchat.further_polls(1).await;
                t.events("failed") == 1
            })
            .await;
            daemon.stop().await;
            t.our_api.calm();
            if discarded {
                let discard = t.failed_command(&["discard", "--all", "--yes"]);
                discard.expect("it is discarded");
            }
            deliveries_were_two_hours_ago(t);
            let daemon = t.start();
            until_others_are_dropped(t).await;
            if discarded {
                let undo = t.failed_command(&["undo", "--all"]);
                undo.expect("it is reopened");
            }
            let retry = t.failed_command(&["retry", "--all"]);
            retry.expect("it is retried");
            until("nothing waits", async || t.events("waiting") == 0).await;
            daemon.stop().await;
            let messages = t.our_api.messages();
            assert!(messages.iter().any(|text| text == "second"), "{messages:?}");
        })
        .await;
    })
    .await;
}

/// An attempt that was scheduled while this machine's clock was 40 days ahead is made soon after the clock is
/// corrected.
#[tokio::test]
async fn attempt_scheduled_by_a_wrong_clock() {
    side_by_side([false, true], async |restarts| {
        run_test(async |t| {
            let daemon = with_a_chat(t).await;
            t.our_api.upset(POST, status(503).always());
            t.bigchat.reports([message(42, 5, "one")]);
            until("it has failed", async || t.attempts() > 0).await;
            t.our_api.outage(Some(status(503)));
            until("it is down", async || t.is_up(Api::OurApi) == Some(false)).await;
            if restarts {
                daemon.stop().await;
            }
            t.execute(
                "UPDATE conversations SET due_at = due_at + 3456000000 WHERE waiting > 0;
                 UPDATE attempts SET next_at = next_at + 3456000000",
            );
            if restarts {
                t.start();
            }
            t.our_api.calm();
            t.until_events("delivered", 2).await;
        })
        .await;
    })
    .await;
}

/// A read that finds every message in the chat shows that OurAPI is up.
#[tokio::test]
async fn read_back_ends_an_outage() {
    run_test(async |t| {
        let daemon = with_a_chat(t).await;
        t.our_api.upset(READ, status(503).always());
        t.our_api.upset(POST, status(503).carried_out());
        t.bigchat.reports([message(42, 5, "one")]);
        until("it is down", async || t.is_up(Api::OurApi) == Some(false)).await;
        t.our_api.calm();
        t.until_events("delivered", 2).await;
        until("it is up again", async || {
            t.is_up(Api::OurApi) == Some(true)
        })
        .await;
        daemon.stop().await;
        assert_eq!(t.our_api.messages(), ["one"]);
    })
    .await;
}

/// A delivery that the journal refuses holds back only its own conversation, until the next start.
#[tokio::test]
async fn delivery_that_cannot_be_committed() {
    run_test(async |t| {
        let daemon = t.start();
        t.until_polled().await;
        t.execute(
            "CREATE TRIGGER refuses BEFORE UPDATE OF offset ON conversations
             WHEN NEW.bigchat_id = 70 AND NEW.offset > OLD.offset BEGIN SELECT RAISE(ABORT, 'refused'); END",
        );
        let events = (50..90).map(|id| {
            t.bigchat.open(id, 0, 7);
            message(id, 5, "hello")
        });
        t.bigchat.reports(events.collect::<Vec<_>>());
        t.until_events("delivered", 39).await;
        assert_eq!(t.events("waiting"), 1);
        daemon.stop().await;
        t.execute("DROP TRIGGER refuses");
        t.start();
        t.until_events("delivered", 40).await;
    })
    .await;
}
