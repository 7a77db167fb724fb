//! The four handlers: the exact requests to BigChat and OurAPI for each event.

use crate::harness::process::printed;
use crate::harness::services::{NOW, line, time, unix};
use crate::harness::{run_test, side_by_side};
use bigchat_sync::domain::event::EventKind;
use bigchat_sync::domain::time::Timestamp;
use bigchat_sync::simulator::compare::Rules;
use bigchat_sync::simulator::event::{KINDS, end, message, start, transfer};
use bigchat_sync::simulator::fault::status;
use bigchat_sync::simulator::id;
use std::collections::{BTreeSet, HashSet};

use serde_json::{Value, json};

const ANN: [&str; 2] = [
    "GET /agents?email=ann%40x.test",
    r#"POST /agents {"email":"ann@x.test","name":"Ann"}"#,
];

const BOB: [&str; 2] = [
    "GET /agents?email=bob%40x.test",
    r#"POST /agents {"email":"bob@x.test","name":"Bob"}"#,
];

const NOTHING: [&str; 0] = [];

/// The creation of a chat of conversation 42.
fn created(started_at: i64, agent: &str) -> String {
    let chat = json!({"external_id": "42", "started_at": time(started_at), "agent_id": agent});
    line("POST /chats", chat)
}

fn sent(chat: &str, at: i64, text: &str) -> String {
    let message = json!({"sent_at": time(at), "text": text});
    line(&format!("POST /chats/{chat}/messages"), message)
}

fn changed(chat: &str, change: Value) -> String {
    line(&format!("PATCH /chats/{chat}"), change)
}

/// The simulator has its own list, because it shares no code with the daemon that it checks.
#[test]
fn simulator_has_the_same_kinds() {
    let kinds = EventKind::ALL.map(|kind| (kind.name(), kind.is_message()));
    let simulated = KINDS.map(|(name, field)| (name, field.is_some()));
    assert_eq!(BTreeSet::from(simulated), BTreeSet::from(kinds));
}

/// Each event causes the requests that it needs, and only one once everything is known.
#[tokio::test]
async fn requests_of_each_event() {
    run_test(async |t| {
        let daemon = t.start();
        for (event, bigchat, our_api) in [
            (
                start(42, 0),
                &["GET /conversations/42", "GET /advisors/7"][..],
                vec![ANN[0], ANN[1], &created(0, "a1")],
            ),
            (
                message(42, 5, " Hello "),
                &[],
                vec![&sent("c1", 5, " Hello ")],
            ),
            (
                transfer(42, 60, 8),
                &["GET /advisors/8"],
                vec![BOB[0], BOB[1], &changed("c1", json!({"agent_id": "a2"}))],
            ),
            (
                end(42, 90),
                &[],
                vec![&changed("c1", json!({"ended_at": time(90)}))],
            ),
            (
                message(42, 95, "Still here"),
                &[],
                vec![&sent("c1", 95, "Still here")],
            ),
            (
                transfer(42, 100, 7),
                &[],
                vec![&changed("c1", json!({"agent_id": "a1"}))],
            ),
            (
                end(42, 110),
                &[],
                vec![&changed("c1", json!({"ended_at": time(110)}))],
            ),
            (
                start(43, 1),
                &["GET /conversations/43"],
                vec![&line(
                    "POST /chats",
                    json!({"external_id": "43", "started_at": time(1), "agent_id": "a1"}),
                )],
            ),
        ] {
            t.bigchat.asked();
            assert_eq!(t.delivers([event.clone()]).await, our_api, "{event}");
            assert_eq!(t.bigchat.asked_besides(), bigchat, "{event}");
        }
        daemon.stop().await;
        assert_eq!(
            t.our_api.chats(),
            ["42 22:00:00 22:01:50 a1", "43 22:00:01 - a1"]
        );
    })
    .await;
}

/// A poll without new events requests the events and the first conversation.
#[tokio::test]
async fn requests_of_an_idle_poll() {
    run_test(async |t| {
        let daemon = t.start();
        t.delivers([start(42, 0)]).await;
        t.bigchat.further_polls(1).await;
        t.bigchat.asked();
        t.bigchat.further_polls(3).await;
        daemon.stop().await;
        let (asked, our_api) = (t.bigchat.asked(), t.our_api.asked());
        let (events, probes): (Vec<_>, Vec<_>) = asked
            .iter()
            .partition(|line| line.starts_with("GET /events?"));
        assert!(probes.iter().all(|line| *line == "GET /conversations/1"));
        assert!(
            events.len().abs_diff(probes.len()) <= 1,
            "one each: {asked:?}"
        );
        assert_eq!(our_api, NOTHING);
    })
    .await;
}

/// All changes of a chat on one page are written with its creation.
#[tokio::test]
async fn one_page_makes_one_chat() {
    run_test(async |t| {
        let daemon = t.start();
        let events = [
            start(42, 0),
            message(42, 5, "first"),
            transfer(42, 10, 8),
            message(42, 3, "second"),
            end(42, 20),
        ];
        let chat = json!({
            "external_id": "42", "started_at": time(0), "ended_at": time(20), "agent_id": "a1",
        });
        assert_eq!(
            t.delivers(events).await,
            [
                BOB[0],
                BOB[1],
                &line("POST /chats", chat),
                &sent("c1", 5, "first"),
                &sent("c1", 3, "second"),
            ]
        );
        daemon.stop().await;
        assert_eq!(
            t.bigchat.asked_besides(),
            ["GET /advisors/8"],
            "the events have start and advisor: no details are needed"
        );
    })
    .await;
}

/// An agent is found by its address, or created.
#[tokio::test]
async fn agent_by_its_address() {
    let name = "GET /agents?name=Ann";
    let again = r#"POST /agents {"email":"ann@x.test","name":"Ann (ann@x.test)"}"#;
    side_by_side(
        [
            ("none", vec![], vec![ANN[0], ANN[1]], "a1"),
            (
                "another agent has a similar address",
                vec![("a1", "Ann B", "ann@x.test.test")],
                vec![ANN[0], ANN[1]],
                "a2",
            ),
            (
                "one",
                vec![("a5", "Anna", "ann@x.test")],
                vec![ANN[0]],
                "a5",
            ),
            (
                "several, one of whom has the name",
                vec![
                    ("a1", "Anna", "ann@x.test"),
                    ("a4", "Ann", "ann@x.test"),
                    ("a3", "Ann", "ann@x.test"),
                ],
                vec![ANN[0]],
                "a3",
            ),
            (
                "several, none of whom has the name",
                vec![("a6", "Anna", "ann@x.test"), ("a2", "Anne", "ann@x.test")],
                vec![ANN[0]],
                "a2",
            ),
            (
                "the name is taken",
                vec![("a1", "Ann", "other@x.test")],
                vec![ANN[0], ANN[1], ANN[0], name, again],
                "a2",
            ),
        ],
        async |(case, held, asked, agent)| {
            run_test(async |t| {
                t.differs("OurAPI has two agents of one address");
                for (id, name, email) in held {
                    t.our_api.has_agent(id, name, email);
                }
                t.start();
                let chat = created(0, agent);
                let expected = [asked, vec![&chat]].concat();
                assert_eq!(t.delivers([start(42, 0)]).await, expected, "{case}");
            })
            .await;
        },
    )
    .await;
}

#[tokio::test]
async fn same_agent_across_a_restart() {
    run_test(async |t| {
        t.differs("OurAPI has two agents of one address");
        t.our_api.has_agent("a6", "Anna", "ann@x.test");
        let daemon = t.start();
        t.delivers([start(42, 0)]).await;
        daemon.stop().await;
        t.our_api.has_agent("a2", "Ann", "ann@x.test");
        t.start();
        let chat = json!({"external_id": "43", "started_at": time(1), "agent_id": "a6"});
        assert_eq!(
            t.delivers([start(43, 1)]).await,
            [line("POST /chats", chat)]
        );
    })
    .await;
}

#[tokio::test]
async fn agent_created_in_spite_of_500() {
    run_test(async |t| {
        t.our_api.upset("POST /agents", status(500).carried_out());
        t.start();
        assert_eq!(
            t.delivers([start(42, 0)]).await,
            [ANN[0], ANN[1], ANN[0], &created(0, "a1")]
        );
    })
    .await;
}

/// A chat whose agent cannot be created has none until a TRANSFER names one.
#[tokio::test]
async fn chat_without_agent_until_transfer() {
    side_by_side(
        [(true, ANN.repeat(3)), (false, Vec::new())],
        async |(refused, asked)| {
            run_test(async |t| {
                t.differs("OurAPI rejects the agent");
                if refused {
                    let upset = status(422).always();
                    t.our_api.upset("POST /agents*ann@x.test", upset);
                } else {
                    t.bigchat.forgets_advisor(7);
                }
                let daemon = t.start();
                let chat = json!({"external_id": "42", "started_at": time(0)});
                let chat = line("POST /chats", chat);
                let expected = [&asked[..], &[&chat]].concat();
                assert_eq!(t.delivers([start(42, 0)]).await, expected);
                t.bigchat.asked();
                let chat = json!({"external_id": "43", "started_at": time(1)});
                assert_eq!(
                    t.delivers([start(43, 1)]).await,
                    [line("POST /chats", chat)],
                    "no advisor is requested again"
                );
                assert_eq!(t.bigchat.asked_besides(), ["GET /conversations/43"]);
                assert_eq!(
                    t.delivers([transfer(42, 60, 8)]).await,
                    [BOB[0], BOB[1], &changed("c1", json!({"agent_id": "a1"}))]
                );
                daemon.stop().await;
                assert_eq!(t.our_api.chats(), ["42 22:00:00 - a1", "43 22:00:01 - -"]);
            })
            .await;
        },
    )
    .await;
}

/// A chat that is transferred to an advisor unknown to BigChat has no agent.
#[tokio::test]
async fn transfer_to_unknown_advisor() {
    run_test(async |t| {
        t.start();
        t.delivers([start(42, 0)]).await;
        assert_eq!(
            t.delivers([transfer(42, 60, 99)]).await,
            [changed("c1", json!({"agent_id": null}))]
        );
    })
    .await;
}

/// OurAPI's list is never queried for an empty address.
#[tokio::test]
async fn advisor_with_empty_address() {
    run_test(async |t| {
        t.bigchat.advisor(7, " Ann ", "  ");
        t.our_api.has_agent("a1", "Bob", "bob@x.test");
        t.our_api.upset("POST /agents", status(422).always());
        t.start();
        let agent = r#"POST /agents {"email":"","name":"Ann"}"#;
        let chat = json!({"external_id": "42", "started_at": time(0)});
        assert_eq!(
            t.delivers([start(42, 0)]).await,
            [agent, agent, agent, &line("POST /chats", chat)]
        );
    })
    .await;
}

/// An agent that was rejected is created by the next session, and set on its chat.
#[tokio::test]
async fn rejected_agent_in_next_session() {
    run_test(async |t| {
        let upset = status(422).always();
        t.our_api.upset("POST /agents", upset);
        let daemon = t.start();
        t.delivers([start(42, 0)]).await;
        daemon.stop().await;
        t.our_api.calm();
        t.start();
        let change = json!({"agent_id": "a1", "ended_at": time(9)});
        assert_eq!(
            t.delivers([end(42, 9)]).await,
            [
                "GET /chats?external_id=42",
                "GET /chats/c1/messages",
                ANN[0],
                ANN[1],
                &changed("c1", change)
            ]
        );
    })
    .await;
}

/// The first event of any kind creates the chat, with the start and the advisor of the details.
#[tokio::test]
async fn first_event_of_any_kind() {
    let first = |body: Value| line("POST /chats", body);
    side_by_side(
        [
            (
                message(42, 30, "Hello"),
                vec!["GET /conversations/42", "GET /advisors/7"],
                vec![ANN[0], ANN[1], &created(0, "a1"), &sent("c1", 30, "Hello")],
            ),
            (
                end(42, 30),
                vec!["GET /conversations/42", "GET /advisors/7"],
                vec![
                    ANN[0],
                    ANN[1],
                    &first(json!({
                        "external_id": "42", "started_at": time(0), "ended_at": time(30),
                        "agent_id": "a1",
                    })),
                ],
            ),
            (
                transfer(42, 30, 8),
                vec!["GET /conversations/42", "GET /advisors/8"],
                vec![BOB[0], BOB[1], &created(0, "a1")],
            ),
            (
                message(1, 30, "Hello"),
                vec!["GET /advisors/7"],
                vec![
                    ANN[0],
                    ANN[1],
                    &first(json!({
                        "external_id": "1", "started_at": time(-3600), "agent_id": "a1",
                    })),
                    &sent("c1", 30, "Hello"),
                ],
            ),
        ],
        async |(event, bigchat, our_api)| {
            run_test(async |t| {
                let daemon = t.start();
                assert_eq!(t.delivers([event.clone()]).await, our_api, "{event}");
                daemon.stop().await;
                assert_eq!(t.bigchat.asked_besides(), bigchat, "{event}");
            })
            .await;
        },
    )
    .await;
}

/// If BigChat does not know the start, the chat starts with the earliest event, until a START is reported.
#[tokio::test]
async fn start_known_from_later_events() {
    run_test(async |t| {
        t.bigchat.forgets_conversation(42);
        let daemon = t.start();
        let chat = json!({"external_id": "42", "started_at": time(30)});
        for (event, expected) in [
            (
                message(42, 30, "Hello"),
                vec![line("POST /chats", chat), sent("c1", 30, "Hello")],
            ),
            (message(42, 40, "later"), vec![sent("c1", 40, "later")]),
            (
                message(42, 20, "earlier"),
                vec![
                    changed("c1", json!({"started_at": time(20)})),
                    sent("c1", 20, "earlier"),
                ],
            ),
            (
                end(42, 15),
                vec![changed(
                    "c1",
                    json!({"ended_at": time(15), "started_at": time(15)}),
                )],
            ),
            (
                start(42, 10),
                vec![changed("c1", json!({"started_at": time(10)}))],
            ),
            (
                message(42, 5, "before it all"),
                vec![sent("c1", 5, "before it all")],
            ),
        ] {
            assert_eq!(t.delivers([event.clone()]).await, expected, "{event}");
        }
        daemon.stop().await;
        // A few 404s may be a mistake. After three, the conversation is not requested again.
        assert_eq!(t.bigchat.count("GET /conversations/42"), 3);
    })
    .await;
}

/// An existing chat is adopted if it has the same start; any other one is left as it is.
#[tokio::test]
async fn existing_chat_adopted_by_start() {
    let plain = created(0, "a1");
    let find = "GET /chats?external_id=42";
    let longer = json!({
        "external_id": "42@2026-11-22T22:00:00Z", "started_at": time(0), "agent_id": "a1",
    });
    let longer = line("POST /chats", longer);
    let find_longer = "GET /chats?external_id=42%402026-11-22T22%3A00%3A00Z";
    let [change_8, change_9] = ["c8", "c9"].map(|chat| changed(chat, json!({"agent_id": "a1"})));
    let cases = [
        (
            "the same start",
            vec![("c8", "42", 0)],
            vec![&*plain, find, "GET /chats/c8/messages", &change_8],
            "c8",
        ),
        (
            "another start",
            vec![("c8", "42", 50)],
            vec![&plain, find, &longer],
            "c2",
        ),
        (
            "another start, and it was created before",
            vec![("c8", "42", 50), ("c9", "42@2026-11-22T22:00:00Z", 0)],
            vec![
                &plain,
                find,
                &longer,
                find_longer,
                "GET /chats/c9/messages",
                &change_9,
            ],
            "c9",
        ),
    ];
    for conflict in [404, 409] {
        side_by_side(&cases, async |(case, held, asked, chat)| {
            run_test(async |t| {
                t.our_api.conflict_is(conflict);
                for (id, external_id, started_at) in held {
                    t.our_api.has_chat(id, external_id, *started_at);
                }
                t.start();
                let expected = [&ANN, &asked[..]].concat();
                assert_eq!(
                    t.delivers([start(42, 0)]).await,
                    expected,
                    "{conflict}, {case}"
                );
                t.delivers([message(42, 1, "one")]).await;
                assert_eq!(
                    t.delivers([message(42, 2, "two")]).await,
                    [sent(chat, 2, "two")],
                    "{conflict}, {case}"
                );
            })
            .await;
        })
        .await;
    }
}

/// The messages of an adopted chat are read once, before anything is added to it.
#[tokio::test]
async fn adopted_chat_is_read_once() {
    run_test(async |t| {
        t.our_api.has_chat("c8", "42", 0);
        t.our_api.has_message("c8", 1, "one");
        t.start();
        let asked = t.delivers([start(42, 0)]).await;
        let read_back = |line: &&String| *line == "GET /chats/c8/messages";
        assert_eq!(asked.iter().filter(read_back).count(), 1, "{asked:?}");
        // Messages found there are not sent, whichever poll reports them.
        assert_eq!(t.delivers([message(42, 1, "one")]).await, NOTHING);
        assert_eq!(
            t.delivers([message(42, 2, "two")]).await,
            [sent("c8", 2, "two")]
        );
    })
    .await;
}

/// After a restart, a chat is read once, and only for events that may be from before the restart.
#[tokio::test]
async fn reads_after_a_restart() {
    run_test(async |t| {
        let daemon = t.start();
        t.delivers([start(42, 0), start(43, 1)]).await;
        daemon.stop().await;
        t.set("--poll-overlap", "1s");
        t.start();
        for (event, expected) in [
            (
                end(42, 9),
                vec![
                    "GET /chats?external_id=42".to_owned(),
                    "GET /chats/c1/messages".to_owned(),
                    changed("c1", json!({"ended_at": time(9)})),
                ],
            ),
            (
                end(42, 10),
                vec![changed("c1", json!({"ended_at": time(10)}))],
            ),
            (message(42, 10, "one"), vec![sent("c1", 10, "one")]),
            (message(42, 11, "two"), vec![sent("c1", 11, "two")]),
        ] {
            assert_eq!(t.delivers([event.clone()]).await, expected, "{event}");
        }
        // The windows now begin after the daemon's start.
        let here = Timestamp::of_this_machine().unix();
        t.bigchat.clock_runs(unix(NOW) - here);
        t.until_cursor_passes(NOW).await;
        assert_eq!(
            t.delivers([message(43, 12, "three")]).await,
            [sent("c2", 12, "three")]
        );
    })
    .await;
}

/// The latest END and TRANSFER count, in any order of arrival. An event that changes nothing costs no request.
#[tokio::test]
async fn latest_end_and_transfer_count() {
    let agent = |agent: &str| vec![changed("c1", json!({"agent_id": agent}))];
    let ended = |at| vec![changed("c1", json!({"ended_at": time(at)}))];
    run_test(async |t| {
        let daemon = t.start();
        t.delivers([start(42, 0), transfer(42, 10, 8)]).await;
        t.delivers([transfer(42, 20, 7)]).await;
        for (event, expected, why) in [
            (transfer(42, 30, 7), vec![], "the agent of the chat already"),
            (
                transfer(42, 15, 8),
                vec![],
                "an earlier one, reported later",
            ),
            (
                transfer(42, 30, 8),
                agent("a1"),
                "a tie: the one reported later",
            ),
            (transfer(42, 29, 7), vec![], "a second too early"),
            (transfer(42, 31, 7), agent("a2"), "a second later"),
            (end(42, 100), ended(100), "the first"),
            (end(42, 99), vec![], "an earlier one, reported later"),
            (end(42, 101), ended(101), "a later one"),
        ] {
            assert_eq!(t.delivers([event]).await, expected, "{why}");
        }
        let held = t.count_events("true");
        t.bigchat.reports([end(42, 101), transfer(42, 31, 7)]);
        t.bigchat.reports([end(42, 100), transfer(42, 30, 8)]);
        assert_eq!(
            t.delivers([message(42, 120, "on")]).await,
            [sent("c1", 120, "on")],
            "reported again: no change"
        );
        assert_eq!(t.count_events("true"), held + 1);
        daemon.stop().await;
        assert_eq!(t.our_api.chats(), ["42 22:00:00 22:01:41 a2"]);
    })
    .await;
}

#[tokio::test]
async fn external_ids_have_the_prefix() {
    let chat = |external_id: &str| {
        let chat = json!({"external_id": external_id, "started_at": time(0), "agent_id": "a1"});
        line("POST /chats", chat)
    };
    run_test(async |t| {
        t.differs("another client has created a chat without the prefix");
        t.set("--external-id-prefix", "eu/");
        t.our_api.has_chat("c7", "42", 0);
        t.our_api.has_chat("c8", "eu/42", 50);
        t.start();
        assert_eq!(
            t.delivers([start(42, 0)]).await,
            [
                ANN[0],
                ANN[1],
                &chat("eu/42"),
                "GET /chats?external_id=eu%2F42",
                &chat("eu/42@2026-11-22T22:00:00Z"),
            ]
        );
    })
    .await;
}

/// With `--message-author agent`, a message names the agent of its chat.
#[tokio::test]
async fn messages_credited_to_the_agent() {
    let credited = |at, text: &str, agent: &str| {
        let message = json!({"sent_at": time(at), "text": text, "agent_id": agent});
        line("POST /chats/c1/messages", message)
    };
    run_test(async |t| {
        t.rules(Rules {
            credited: true,
            ..Rules::default()
        });
        t.set("--message-author", "agent");

        t.bigchat.forgets_advisor(7);
        t.start();
        t.delivers([start(42, 0)]).await;
        assert_eq!(
            t.delivers([message(42, 1, "one")]).await,
            [sent("c1", 1, "one")],
            "there is no agent"
        );
        t.delivers([transfer(42, 2, 8)]).await;
        assert_eq!(
            t.delivers([message(42, 3, "two")]).await,
            [credited(3, "two", "a1")]
        );
    })
    .await;
}

/// Names and addresses reach OurAPI unchanged, and advisors with the same address are the same agent.
#[tokio::test]
async fn names_and_addresses_unchanged() {
    side_by_side(
        [
            (
                "Seán O'Neil",
                "o'neil+x@x.test",
                "email=o%27neil%2Bx%40x.test",
                "name=Se%C3%A1n+O%27Neil",
            ),
            (
                "A & B = C",
                "a b&c=d@x.test",
                "email=a+b%26c%3Dd%40x.test",
                "name=A+%26+B+%3D+C",
            ),
        ],
        async |(name, email, by_email, by_name)| {
            run_test(async |t| {
                t.bigchat.advisor(7, name, email);
                t.our_api.has_agent("a1", name, "somebody@x.test");
                t.bigchat.advisor(8, "Else", email);
                let daemon = t.start();
                let creation =
                    |name: &str| line("POST /agents", json!({"name": name, "email": email}));
                assert_eq!(
                    t.delivers([start(42, 0)]).await,
                    [
                        format!("GET /agents?{by_email}"),
                        creation(name),
                        format!("GET /agents?{by_email}"),
                        format!("GET /agents?{by_name}"),
                        creation(&format!("{name} ({email})")),
                        created(0, "a2"),
                    ]
                );
                assert_eq!(
                    t.delivers([transfer(42, 1, 8)]).await,
                    NOTHING,
                    "another advisor of that address is the same agent"
                );
                daemon.stop().await;

                run_test(async |t| {
                    t.bigchat.advisor(7, name, email);
                    t.our_api.has_agent("a5", "Somebody", email);
                    t.start();
                    assert_eq!(
                        t.delivers([start(42, 0)]).await,
                        [format!("GET /agents?{by_email}"), created(0, "a5")],
                        "it is found"
                    );
                })
                .await;
            })
            .await;
        },
    )
    .await;
}

/// Tokens are sent with every request, and are in no log and no file.
#[tokio::test]
async fn tokens_sent_but_never_shown() {
    run_test(async |t| {
        let refused = [message(42, 5, "k"), message(42, 6, "kk")];
        t.bigchat.reports(refused);
        t.bigchat.upset("GET /advisors/7", status(401));
        t.our_api.upset("POST /chats", status(401));
        let mut log = String::new();
        for _ in 0..3 {
            let once = t
                .program("once")
                .env("BIGCHAT_SYNC_BIGCHAT_TOKEN", "t0ken-for-bigchat")
                .env("BIGCHAT_SYNC_OUR_API_TOKEN", "t0ken-for-our-api")
                .env("RUST_LOG", "trace")
                .output()
                .expect("it runs");
            // Most events fail, some of them permanently.
            assert!(once.status.code().is_some_and(|code| code < 2));
            log += &printed(&once);
        }
        for part in ["401", "422", "delivered"] {
            assert!(log.contains(part), "{part}: {log}");
        }
        assert!(!log.contains("t0ken"), "{log}");
        assert_eq!(t.our_api.messages(), ["kk"]);

        let sent = |asked: Vec<bigchat_sync::simulator::Asked>| {
            let tokens = asked.into_iter().map(|asked| asked.request.authorization);
            tokens.collect::<HashSet<_>>()
        };
        let bearer = |token: &str| HashSet::from([Some(format!("Bearer {token}"))]);
        assert_eq!(sent(t.bigchat.ever_asked("")), bearer("t0ken-for-bigchat"));
        assert_eq!(sent(t.our_api.ever_asked("")), bearer("t0ken-for-our-api"));
        for file in std::fs::read_dir(t.directory()).expect("a directory") {
            let bytes = std::fs::read(file.expect("a file").path()).expect("its bytes");
            assert!(!String::from_utf8_lossy(&bytes).contains("t0ken"));
        }
    })
    .await;
}

/// The response to a creation is not believed if it contains another chat.
#[tokio::test]
async fn created_chat_of_another_conversation() {
    run_test(async |t| {
        t.our_api.has_chat("c9", "99", 0);
        let other = json!({
            "chat_id": id("c9"), "external_id": "99", "started_at": "2026-11-22T22:00:00",
            "agent_id": null,
        });
        let answer = status(201).body(other.to_string()).carried_out();
        t.our_api.upset("POST /chats {", answer);
        let daemon = t.start();
        t.delivers([start(42, 0), message(42, 4, "hello")]).await;
        daemon.stop().await;
        assert_eq!(t.our_api.count("POST /chats/c9/messages"), 0);
        assert_eq!(t.our_api.messages(), ["hello"]);
    })
    .await;
}

#[tokio::test]
async fn agent_address_in_another_case() {
    run_test(async |t| {
        t.differs("OurAPI writes the address in another case");
        t.bigchat.advisor(8, "Bob", "Bob@X.test");
        t.our_api.has_agent("a9", "Bob", "bob@x.test");
        let found = json!([{"agent_id": id("a9"), "name": "Bob", "email": "bob@x.test"}]);
        let answer = status(200).body(found.to_string()).always();
        t.our_api.upset("GET /agents?email=Bob", answer);
        let daemon = t.start();
        t.delivers([start(42, 0), transfer(42, 3, 8)]).await;
        daemon.stop().await;
        assert_eq!(t.our_api.chats(), ["42 22:00:00 - a9"]);
    })
    .await;
}
