//! The API of the console: its pages, recorded resolutions, and bad requests.

use crate::harness::journal::failed_messages;
use crate::harness::web::{Console, console_token};
use crate::harness::{run_test, until};
use bigchat_sync::settings::Tokens;
use bigchat_sync::simulator::event::{message, start};
use reqwest::StatusCode;
use serde_json::{Value, json};

/// SQL for this many failed messages. Every third one has another reason.
fn failed(count: usize) -> String {
    let reasons = ["a & b", "a & b", "another"].into_iter().cycle();
    failed_messages(reasons.take(count))
}

fn ids(rows: &Value) -> Vec<i64> {
    let rows = rows.as_array().expect("rows");
    rows.iter().filter_map(|row| row["id"].as_i64()).collect()
}

/// Failed events are grouped by reason, and listed a page at a time.
#[tokio::test]
async fn failed_events_by_reason_and_page() {
    run_test(async |t| {
        let console = Console::over(t, &failed(180)).await;
        let (_, groups) = console.get("/api/failed").await;
        assert_eq!(
            (&groups["total"], &groups["more"]),
            (&json!(180), &json!(false))
        );
        assert_eq!(groups["groups"][0]["reason"], "a & b");
        assert_eq!(groups["groups"][0]["count"], 120);
        let (mut seen, mut after, mut sizes) = (Vec::new(), 0, Vec::new());
        loop {
            let path = format!("/api/failed?reason=a%20%26%20b&after={after}");
            let (_, page) = console.get(&path).await;
            sizes.push(ids(&page["rows"]).len());
            seen.extend(ids(&page["rows"]));
            match page["next"].as_i64() {
                Some(next) => after = next,
                None => break,
            }
        }
        assert_eq!(sizes, [50, 50, 20]);
        assert!(seen.iter().copied().eq((1..=180).filter(|id| id % 3 != 0)));
        console.daemon.stop().await;
    })
    .await;
}

/// A conversation lists some of its failed events, and says whether there are more.
#[tokio::test]
async fn conversation_with_many_failed_events() {
    for (failures, listed, more) in [(100, 100, false), (101, 100, true)] {
        run_test(async |t| {
            let console = Console::over(t, &failed(failures)).await;
            t.execute("UPDATE conversations SET waiting = 150");
            let (_, found) = console.get("/api/search?q=42").await;
            let one = &found["conversations"][0];
            let ids = one["failed"].as_array().expect("ids");
            assert_eq!((ids.len(), &one["more_failed"]), (listed, &json!(more)));
            assert_eq!(one["waiting"], 150);
            t.execute("UPDATE conversations SET waiting = 0");
            console.daemon.stop().await;
        })
        .await;
    }
}

/// A resolution applies only to the events that it names, and it is recorded. A request that names none is
/// rejected.
#[tokio::test]
async fn resolution_by_id_reason_and_all() {
    run_test(async |t| {
        let console = Console::over(t, &failed(12)).await;
        for nonsense in [
            json!({}),
            json!({"all": false}),
            json!({"all": true, "ids": [1]}),
            json!({"ids": [1], "reason": "another"}),
            json!({"ids": ["1"]}),
            json!({"ids": [1], "conversation": 42}),
        ] {
            let (status, answer) = console.resolve("discard", nonsense.clone()).await;
            assert_eq!(status, StatusCode::BAD_REQUEST, "{nonsense}");
            assert!(answer["error"].is_string(), "{nonsense}");
        }
        assert_eq!(t.events("failed"), 12);
        let discard = async |which| console.resolve("discard", which).await.1;
        assert_eq!(
            discard(json!({"ids": [1, 2, 2, 99]})).await,
            json!({"done": 2, "next": null})
        );
        // All of them failed at 2000 ms. An operator who resolves only earlier failures has not seen them.
        for unseen in [
            json!({"reason": "another", "failed_by": "1970-01-01T00:00:01.999Z"}),
            json!({"all": true, "failed_by": "1970-01-01T00:00:01.999Z"}),
        ] {
            assert_eq!(discard(unseen).await, json!({"done": 0, "next": null}));
        }
        assert_eq!(
            discard(json!({"reason": "another", "failed_by": "1970-01-01T00:00:02Z"})).await,
            json!({"done": 4, "next": null})
        );
        assert_eq!(
            discard(json!({"all": true, "after": 10})).await,
            json!({"done": 1, "next": null})
        );
        let (_, log) = console.get("/api/resolutions").await;
        assert_eq!(ids(&log["rows"]), [7, 6, 5, 4, 3, 2, 1]);
        let own = rustix::process::geteuid().as_raw();
        let by = format!("{}, console", bigchat_sync::user::name(own));
        let latest = json!({
            "resolution": "discard", "by": by, "event": 11, "conversation": 42, "reason": "a & b",
        });
        for (name, value) in latest.as_object().expect("an object") {
            assert_eq!(&log["rows"][0][name], value, "{name}");
        }
        let (_, earlier) = console.get("/api/resolutions?before=3").await;
        assert_eq!(ids(&earlier["rows"]), [2, 1]);
        let (_, event) = console.get("/api/failed/11").await;
        assert_eq!(event["state"], "discarded");
        assert_eq!(event["resolutions"][0]["resolution"], "discard");

        // A discard is undone once.
        for (which, done) in [(json!({"ids": [11]}), 1), (json!({"ids": [11]}), 0)] {
            let answer = console.resolve("undo", which).await.1;
            assert_eq!(answer, json!({"done": done, "next": null}));
        }
        let (_, log) = console.get("/api/resolutions").await;
        assert_eq!(log["rows"][0]["resolution"], "undo");
        let can_undo = |event: i64| {
            let mut rows = log["rows"].as_array().expect("rows").iter();
            rows.any(|row| row["event"] == event && row["can_undo"] == true)
        };
        assert!(!can_undo(11) && can_undo(1), "{log}");
        assert_eq!(discard(json!({"ids": [11]})).await["done"], 1);

        // The rest is retried together, and delivered.
        assert_eq!(
            console.resolve("retry", json!({"all": true})).await.1["done"],
            5
        );
        t.until_events("delivered", 5).await;
        let (_, status) = console.get("/api/status").await;
        // BigChat's clock is stopped.
        let mut problems = status["problems"].as_array().expect("problems").iter();
        assert_eq!(
            (
                &status["failed"],
                problems.all(|problem| problem["what"].to_string().contains("BigChat's clock is"))
            ),
            (&json!(0), true)
        );
        console.daemon.stop().await;
    })
    .await;
}

/// A conversation's page shows what each event changed in OurAPI.
#[tokio::test]
async fn conversation_shows_each_effect() {
    run_test(async |t| {
        let console = Console::new(t, Tokens::default());
        let long = "x".repeat(10_000);
        let events = [start(42, 0), message(42, 5, "Hello"), message(42, 6, &long)];
        t.delivers(events).await;
        let (_, found) = console.get("/api/search?q=42").await;
        let key = found["conversations"][0]["key"].as_i64().expect("a key");
        let (_, answer) = console.get(&format!("/api/conversations/{key}")).await;
        let conversation = &answer["conversation"];
        assert_eq!(conversation["agent_email"], "ann@x.test");
        assert_eq!(conversation["external_id"], "42");
        let sent: Vec<_> = answer["events"]
            .as_array()
            .expect("events")
            .iter()
            .map(|event| &event["effect"])
            .collect();
        assert_eq!(sent, ["chat created", "message added", "message added"]);
        assert_eq!(answer["events"][1]["text"], "Hello");
        let cut = answer["events"][2]["text"].as_str().expect("text");
        assert_eq!(
            (cut.len(), &answer["events"][2]["text_truncated"]),
            (4_000, &json!(true))
        );
        for (text, expected) in [("ANN%40", 1), ("nn", 0), ("%25", 0), ("_nn", 0)] {
            let (_, found) = console.get(&format!("/api/search?q={text}")).await;
            let found = found["conversations"].as_array().expect("a list");
            assert_eq!(found.len(), expected, "{text}");
        }
        let (_, page) = console
            .get(&format!("/api/conversations/{key}?after=2"))
            .await;
        assert_eq!(ids(&page["events"]), [3]);
        let (_, activity) = console.get("/api/activity?hours=1").await;
        let total = |what: &str| -> i64 {
            let minutes = activity["minutes"].as_array().expect("minutes");
            minutes
                .iter()
                .filter_map(|minute| minute[what].as_i64())
                .sum()
        };
        assert_eq!(
            (total("received"), total("delivered"), total("failed")),
            (3, 3, 0)
        );
        console.daemon.stop().await;
    })
    .await;
}

/// An unknown id is answered with 404, and a bad query with 400, each with an error.
#[tokio::test]
async fn unknown_ids_and_bad_queries() {
    run_test(async |t| {
        let console = Console::new(t, Tokens::default());
        until("there is something to read", async || {
            console.get("/api/status").await.0 == StatusCode::OK
        })
        .await;
        for (path, expected) in [
            ("/api/failed/9", StatusCode::NOT_FOUND),
            ("/api/conversations/9", StatusCode::NOT_FOUND),
            ("/api/failed/nine", StatusCode::BAD_REQUEST),
            ("/api/failed/99999999999999999999", StatusCode::BAD_REQUEST),
            ("/api/failed?reason=x&after=last", StatusCode::BAD_REQUEST),
            ("/api/activity?hours=-1", StatusCode::BAD_REQUEST),
            ("/api/activity?hours=4000000000", StatusCode::OK),
            ("/api/search?q=%25%5F%5C", StatusCode::OK),
            ("/api/failed/-9223372036854775808", StatusCode::NOT_FOUND),
            ("/api/nothing", StatusCode::NOT_FOUND),
        ] {
            let (status, answer) = console.get(path).await;
            assert_eq!(status, expected, "{path}");
            assert_eq!(
                answer["error"].is_string(),
                expected != StatusCode::OK,
                "{path}"
            );
        }
        console.daemon.stop().await;
    })
    .await;
}

#[tokio::test]
async fn search_finds_agents_by_name() {
    run_test(async |t| {
        t.bigchat.advisor(7, "Ada King Lovelace", "al@x.test");
        let console = Console::new(t, Tokens::default());
        t.delivers([start(42, 0), message(42, 5, "Hello")]).await;
        for (text, expected) in [
            ("ada", 1),
            ("Lovelace", 1),
            ("ada%20k", 1),
            ("ovelace", 0),
            ("ada_king", 0),
        ] {
            let (_, found) = console.get(&format!("/api/search?q={text}")).await;
            let found = found["conversations"].as_array().expect("a list");
            assert_eq!(found.len(), expected, "{text}");
        }
        console.daemon.stop().await;
    })
    .await;
}

/// A search for a number finds the event with that id.
#[tokio::test]
async fn search_by_event_id() {
    run_test(async |t| {
        let console = Console::new(t, Tokens::default());
        t.delivers([start(42, 0), message(42, 5, "Hello")]).await;
        let (_, found) = console.get("/api/search?q=%232").await;
        let event = &found["event"];
        assert_eq!(
            (&event["id"], &event["name"]),
            (&json!(2), &json!("MESSAGE"))
        );
        assert_eq!(event["conversation"], 42);
        assert_eq!(found["conversations"], json!([]));
        let (_, found) = console.get("/api/search?q=42").await;
        assert_eq!(found["event"], Value::Null, "there is no event 42");
        assert_eq!(found["conversations"][0]["conversation"], 42);
        console.daemon.stop().await;
    })
    .await;
}

/// Without the token, the page is served, but no data is.
#[tokio::test]
async fn page_without_the_token() {
    run_test(async |t| {
        let console = Console::new(t, console_token());
        for path in ["/", "/console.css", "/console.js", "/theme.js", "/icon.svg"] {
            assert_eq!(console.get(path).await.0, StatusCode::OK, "{path}");
        }
        for path in [
            "/api/status",
            "/api/activity",
            "/api/failed",
            "/api/failed/1",
            "/api/search",
            "/api/conversations/1",
            "/api/resolutions",
        ] {
            assert_eq!(
                console.get(path).await.0,
                StatusCode::UNAUTHORIZED,
                "{path}"
            );
        }
        for decision in ["retry", "discard", "undo"] {
            let (status, _) = console.resolve(decision, json!({"all": true})).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{decision}");
        }
        console.daemon.stop().await;
    })
    .await;
}

/// A search that does not show all conversations says so, however many agents it matches.
#[tokio::test]
async fn search_that_matches_many_agents() {
    run_test(async |t| {
        let many = "
            WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 21)
            INSERT INTO advisors (epoch, bigchat_id, name, email)
                SELECT 1, 100 + i, 'Ann ' || i, printf('ann%02d@x.test', i) FROM n;
            INSERT INTO agents (email, agent_id)
                SELECT email, printf('00000000-0000-0000-0000-%012d', bigchat_id) FROM advisors WHERE bigchat_id > 100;
            INSERT INTO conversations (epoch, bigchat_id, details, external_id, first_advisor, chat_agent)
                SELECT 1, bigchat_id, 'read', bigchat_id, bigchat_id, printf('00000000-0000-0000-0000-%012d', bigchat_id)
                FROM advisors WHERE bigchat_id > 100;";
        let console = Console::over(t, many).await;
        let (_, found) = console.get("/api/search?q=ann").await;
        let shown = found["conversations"].as_array().expect("a list").len();
        assert!(
            shown == 21 || found["more"] == true,
            "{shown} of 21, more: {}",
            found["more"]
        );
        console.daemon.stop().await;
    })
    .await;
}
