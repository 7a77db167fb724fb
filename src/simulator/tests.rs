//! Checks the simulated services against known facts about the real ones, and the comparison against right and wrong
//! results.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chrono::{DateTime, NaiveDateTime, TimeDelta};
use futures_util::future::join_all;
use reqwest::Client;
use serde_json::{Value, json};

use super::bigchat::{Clock, Log, Mode, NextPage, Options, Page, Reported};
use super::compare::{Rules, compare, expected};
use super::event::{T0, end, event, message, start, transfer};
use super::fault::{crashed, cut_off, dropped, html, late, overdue, paused, slow, status};
use super::our_api::Data;
use super::service::Service;
use super::{ANY_PORT, Api, BigChat, OurApi, Request, Server, Simulator, Starting};

/// Sends a request to a service directly.
fn ask(api: &mut impl Api, method: &str, target: &str, body: &Value) -> (u16, Value) {
    let body = match body {
        Value::Null => String::new(),
        body => body.to_string(),
    };
    let request = Request {
        host: "bigchat.test".to_owned(),
        ..Request::new(method, target, body)
    };
    let reply = api.answer(&request, 0);
    api.sent(&request, &reply);
    let text = String::from_utf8(reply.body).unwrap();
    (
        reply.status,
        serde_json::from_str(&text).unwrap_or(Value::String(text)),
    )
}

fn get(api: &mut impl Api, target: &str) -> (u16, Value) {
    ask(api, "GET", target, &Value::Null)
}

/// The query for a window that begins at this many seconds after [`T0`].
fn since(at: i64) -> String {
    let time = DateTime::from_timestamp(T0 + at, 0).unwrap();
    format!("/events?start_at={}", time.format("%Y-%m-%dT%H:%M:%SZ"))
}

fn events(page: &Value) -> &Vec<Value> {
    page["events"].as_array().unwrap()
}

/// Options with random events, and a clock that is stopped an hour after [`T0`].
fn lively() -> Options {
    Options {
        clock: Clock::Still(3600),
        ..Options::default()
    }
}

fn quiet() -> BigChat {
    BigChat::new(Options {
        quiet: true,
        ..lively()
    })
}

fn log(log: Log) -> Options {
    Options {
        mode: Mode::Log(log),
        ..lively()
    }
}

#[test]
fn once_reports_as_the_real_one() {
    let mut big = BigChat::new(lively());
    let (mut names, mut counts) = (BTreeMap::<String, u32>::new(), [0; 3]);
    for _ in 0..300 {
        let (status, page) = get(&mut big, &since(3590));
        if status == 500 {
            counts[0] += 1;
            continue;
        }
        counts[1] += 1;
        for event in events(&page) {
            let at = event["event_at"].as_i64().unwrap() - T0;
            assert!((3590..=3601).contains(&at), "{event}");
            let is_first = event["event_name"] == "START" && event["conversation_id"] == 1;
            assert!(!is_first, "the first START is never reported");
            let name = event["event_name"].as_str().unwrap().to_owned();
            *names.entry(name).or_default() += 1;
        }
        if let Some(next) = page["nextPageUrl"].as_str() {
            counts[2] += 1;
            let query = format!("http://bigchat.test{}&page=1", since(3590));
            assert_eq!(next, query);
            let (status, second) = get(&mut big, &next["http://bigchat.test".len()..]);
            assert!(status == 500 || second["nextPageUrl"].is_null());
        }
    }
    let [errors, pages, seconds] = counts;
    assert!((3..=35).contains(&errors), "{errors} errors");
    assert!(
        (30..=90).contains(&seconds),
        "{seconds} second pages of {pages}"
    );
    let by_count = ["MESSAGE", "END", "TRANSFER", "START"].map(|name| names[name]);
    assert!(by_count.is_sorted_by(|a, b| a > b), "{names:?}");
    let is_known =
        |reported: &Reported| !reported.lost && !reported.forgotten && reported.epoch == 1;
    assert!(big.reported().iter().all(is_known));
    let advisors = (1..=10).map(|id| big.advisor(id).unwrap().email_address.clone());
    assert_eq!(advisors.collect::<BTreeSet<_>>().len(), 10);
    assert_eq!(big.advisor(3).unwrap().name, big.advisor(7).unwrap().name);
}

/// In `Mode::Once`, second pages repeat ENDs and TRANSFERs.
#[test]
fn second_pages_repeat_changes() {
    let mut big = BigChat::new(lively());
    let (mut repeated, mut polls) = (0, 0);
    for _ in 0..400 {
        let (_, first) = get(&mut big, &since(-80_000));
        if first["nextPageUrl"].is_null() {
            continue;
        }
        let (status, second) = get(&mut big, &format!("{}&page=1", since(-80_000)));
        if status == 200 {
            polls += 1;
            let again =
                |event: &Value| event["event_name"] != "MESSAGE" && events(&first).contains(event);
            repeated += u32::from(events(&second).iter().any(again));
        }
    }
    let often = repeated * 4 > polls && repeated * 5 < polls * 3;
    assert!(often, "{repeated} of {polls}");
}

#[test]
fn once_dates_events_in_future() {
    let mut big = BigChat::new(lively());
    let others = |big: &mut BigChat| {
        let mut reported = big.reported();
        reported.retain(|reported| reported.name != "START");
        reported
    };
    while others(&mut big).len() < 5 {
        get(&mut big, &since(90_000));
    }
    let at = T0 + 90_000;
    assert!(
        others(&mut big)
            .iter()
            .all(|reported| reported.event_at == at)
    );
}

#[test]
fn bigchat_rejects_as_the_real_one() {
    let mut big = quiet();
    assert_eq!(
        get(&mut big, "/events"),
        (500, json!("Internal Server Error"))
    );
    for query in [
        "start_at=2026-11-22T22:03:27+00:00",
        "start_at=x",
        "start_at=2026-11-22T22:03:27Z&page=x",
    ] {
        let (status, body) = get(&mut big, &format!("/events?{query}"));
        assert!(
            status == 422 && body["detail"][0]["loc"][0] == "query",
            "{body}"
        );
    }
    let empty = json!({ "nextPageUrl": null, "events": [] });
    for query in [
        "start_at=2026-11-22T22:03:27%2B00:00",
        "start_at=2026-11-22T22:03:27Z&end_at=2000-01-01T00:00:00Z",
    ] {
        assert_eq!(
            get(&mut big, &format!("/events?{query}")),
            (200, empty.clone())
        );
    }
    for (target, detail) in [
        ("/conversations/99", "Conversation not found"),
        ("/advisors/99", "Advisor not found"),
        ("/nowhere", "Not Found"),
    ] {
        assert_eq!(get(&mut big, target), (404, json!({ "detail": detail })));
    }
    assert_eq!(get(&mut big, "/advisors/x").0, 422);
    let tenth = serde_json::to_value(big.advisor(10).unwrap().as_ref()).unwrap();
    assert_eq!(get(&mut big, "/advisors/10").1, tenth);

    big.push(transfer(1, 5, 4));
    big.push(json!({ "event_name": "NONSENSE" }));
    assert_eq!(events(&get(&mut big, &since(0)).1).len(), 2);
    assert_eq!(
        get(&mut big, &since(0)).1,
        empty,
        "events are reported once"
    );
    let began = big.reported()[0].started_at.unwrap() - T0;
    let shown = json!({ "events": [start(1, began)], "conversation_id": 1, "advisor_id": 1 });
    assert_eq!(get(&mut big, "/conversations/1").1, shown);

    let next = "http://evil.example/events?page=9";
    big.push_page(Page::Events(
        vec![message(1, 5, "twin")],
        NextPage::Is(next.into()),
    ));
    assert_eq!(get(&mut big, &since(0)).1["nextPageUrl"], next);
    big.set_circles(1.0);
    let itself = format!("http://bigchat.test{}", since(0));
    assert_eq!(get(&mut big, &since(0)).1["nextPageUrl"], itself);
}

#[test]
fn restart_reuses_ids() {
    let mut big = quiet();
    let mut starts = Vec::new();
    for epoch in 1..=3 {
        assert_eq!(big.epoch(), epoch);
        let (_, first) = get(&mut big, "/conversations/1");
        starts.push(first["events"][0]["event_at"].as_i64().unwrap());
        big.open(2, 3600, 1);
        assert_eq!(get(&mut big, "/conversations/2").0, 200);
        let advisor = big.advisor(1);
        if epoch == 1 {
            big.restart();
        } else {
            big.restart_at_next_poll();
            assert_eq!(big.epoch(), epoch);
        }
        get(&mut big, &since(0));
        assert_eq!(get(&mut big, "/conversations/2").0, 404);
        assert_ne!(big.advisor(1), advisor);
    }
    assert!(starts.is_sorted_by(|a, b| a < b), "{starts:?}");
}

#[test]
fn log_pages_are_repeatable() {
    let mut big = BigChat::new(log(Log {
        events_per_second: 5.0,
        page_size: 40,
        history: Duration::from_secs(100),
        ..Log::default()
    }));
    let whole = |big: &mut BigChat, from: i64, to: i64| {
        let end_at = since(to).replace("/events?start_at", "end_at");
        let (mut all, mut target) = (Vec::new(), format!("{}&{end_at}", since(from)));
        loop {
            let (_, page) = get(big, &target);
            assert!(events(&page).len() <= 40);
            all.extend(events(&page).clone());
            match page["nextPageUrl"].as_str() {
                Some(next) => next["http://bigchat.test".len()..].clone_into(&mut target),
                None => return all,
            }
        }
    };
    let all = whole(&mut big, 3400, 3590);
    assert!(all.len() > 200, "{}", all.len());
    assert!(all.is_sorted_by_key(|event| event["event_at"].as_i64()));
    assert_eq!(whole(&mut big, 3400, 3590), all);
    let halves = [whole(&mut big, 3400, 3550), whole(&mut big, 3550, 3590)];
    assert_eq!(halves.concat(), all, "windows do not overlap");
    let is_twin = |pair: &[Value]| pair[0]["event_name"] == "MESSAGE" && pair[0] == pair[1];
    assert!(all.windows(2).any(is_twin), "there are twins");

    big.set_quiet(true);
    big.push(transfer(1, 3660, 9));
    let (_, shown) = get(&mut big, "/conversations/1");
    assert_eq!(shown["advisor_id"], 9, "the current advisor");
    let of_first = |reported: &&Reported| reported.conversation_id == 1;
    assert_eq!(
        events(&shown).len(),
        big.reported().iter().filter(of_first).count()
    );
    big.restart();
    let reported = big.reported();
    assert!(reported.last().unwrap().lost, "its response was not sent");
    assert!(!reported[0].lost && reported.iter().all(|reported| reported.forgotten));
}

/// OurAPI stores and rejects as the real one does.
#[test]
fn our_api_equals_the_real_one() {
    let our = &mut OurApi::new(1);
    let post = |our: &mut OurApi, target: &str, body: Value| ask(our, "POST", target, &body);
    let patch = |our: &mut OurApi, target: &str, body: Value| ask(our, "PATCH", target, &body);
    let agent = |name: &str, email: &str| json!({ "name": name, "email": email });
    let (status, ann) = post(our, "/agents", agent(" Ann O'Brien ", "ann@x.y"));
    assert!(status == 201 && ann["name"] == "Ann O'Brien", "{ann}");
    for again in [agent("Ann O'Brien", "other@x.y"), agent("Other", "ann@x.y")] {
        let unhandled = (500, json!("Internal Server Error"));
        assert_eq!(post(our, "/agents", again), unhandled);
    }
    let (status, short) = post(our, "/agents", json!({ "name": " k " }));
    let of_name = json!({
        "type": "string_too_short", "loc": ["body", "name"], "msg": "String should have at least 2 characters",
        "input": " k ", "ctx": { "min_length": 2 },
    });
    assert!(status == 422 && short["detail"][0] == of_name, "{short}");
    assert_eq!(short["detail"][1]["type"], "missing");
    let id = ann["agent_id"].as_str().unwrap();
    for (target, found) in [
        ("/agents?email=ann%40x.y&name=", json!([ann])),
        ("/agents?email=", json!([ann])),
        ("/agents?name=unknown", json!([])),
        (&format!("/agents/{id}"), ann.clone()),
    ] {
        assert_eq!(get(our, target), (200, found), "{target}");
    }

    let chat = |at: &str| json!({ "external_id": "1", "started_at": at });
    let (status, first) = post(our, "/chats", chat("2026-11-22T22:03:27+02:00"));
    assert_eq!((status, &first["agent_id"]), (201, &Value::Null));
    assert_eq!(
        first["started_at"], "2026-11-22T22:03:27",
        "an offset is dropped"
    );
    let exists = json!({ "detail": "A chat with that external ID already exists." });
    assert_eq!(
        post(our, "/chats", chat("2026-11-22T22:03:27Z")),
        (404, exists)
    );
    let unknown_id = "00000000-0000-4000-8000-000000000000";
    let no_agent = (400, json!({ "detail": "That agent does not exist." }));
    let mut stranger = chat("2026-11-22T22:03:27Z");
    stranger["agent_id"] = json!(unknown_id);
    assert_eq!(post(our, "/chats", stranger), no_agent);
    assert_eq!(get(our, "/chats?external_id="), (200, json!([first])));
    assert_eq!(get(our, "/chats?external_id=2"), (200, json!([])));

    let path = format!("/chats/{}", first["chat_id"].as_str().unwrap());
    assert_eq!(
        patch(our, &path, json!({ "agent_id": unknown_id })),
        no_agent
    );
    let change =
        json!({ "agent_id": id, "ended_at": "2026-11-22T23:00:00.5Z", "external_id": "9" });
    assert_eq!(patch(our, &path, change), (204, json!("")));
    let changed = get(our, &path).1;
    assert_eq!(
        (&changed["agent_id"], &changed["external_id"]),
        (&json!(id), &json!("1"))
    );
    assert_eq!(patch(our, &path, json!({ "started_at": null })).0, 500);
    assert_eq!(patch(our, &path, json!({ "ended_at": null })).0, 204);
    assert_eq!(patch(our, &path, json!({})).0, 204);
    let cleared = get(our, &path).1;
    assert_eq!(
        (&cleared["ended_at"], &cleared["agent_id"]),
        (&Value::Null, &json!(id))
    );

    let messages = format!("{path}/messages");
    let text = |text: &str| json!({ "sent_at": "2026-11-22T22:03:27Z", "text": text });
    for short in ["k", "😀", " \n\u{a0}", ""] {
        assert_eq!(post(our, &messages, text(short)).0, 422, "{short:?}");
    }
    assert_eq!(post(our, &messages, text("  ok\n")), (200, json!({})));
    let stored = get(our, &messages).1;
    assert_eq!(
        (&stored[0]["text"], &stored[0]["sent_at"]),
        (&json!("ok"), &json!("2026-11-22T22:03:27"))
    );
    let unknown = (404, json!({ "detail": "Chat not found" }));
    assert_eq!(
        post(our, &format!("/chats/{unknown_id}/messages"), text("ok")),
        unknown
    );
    assert_eq!(
        patch(our, &format!("/chats/{unknown_id}"), json!({})),
        unknown
    );
    assert_eq!(ask(our, "DELETE", "/chats", &Value::Null).0, 405);
    our.lose_chat("1");
    our.lose_agents();
    assert_eq!(*our.data(), Data::default());
}

/// Concurrent requests split OurAPI's data, unless it behaves as in production.
#[tokio::test]
async fn concurrent_requests_split_our_api() {
    let agent = |n: usize| {
        let body = json!({ "name": format!("Agent {n}"), "email": format!("{n}@x.y") });
        Request::new("POST", "/agents", body.to_string())
    };
    for good in [false, true] {
        let our = Service::new(OurApi::new(1), 1);
        if good {
            our.state().be_good();
        }
        our.set_latency(Duration::from_millis(20));
        our.answer(agent(0)).await.unwrap();
        join_all((1..=4).map(|n| our.answer(agent(n)))).await;
        assert_eq!(our.max_at_once(), 4);
        assert_eq!(our.state().has_stumbled(), !good);
        assert_eq!(our.state().data().agents.len() == 5, good);
        if good {
            assert_eq!(our.answer(agent(0)).await.unwrap().status, 409);
            continue;
        }
        let mut seen = BTreeSet::new();
        while seen.len() < 2 {
            let (_, agents) = get(&mut *our.state(), "/agents");
            seen.insert(agents.to_string().contains("Agent 0"));
        }
        our.state().lose_everything();
        assert_eq!(get(&mut *our.state(), "/agents").1, json!([]));
        assert!(!our.state().has_stumbled());
    }
}

async fn serve<A: Api>(api: A, keep_alive: Duration) -> Server<A> {
    let mut starting = Starting::new().unwrap().keep_alive(keep_alive);
    starting.listen(ANY_PORT, api).await.unwrap()
}

/// A client with one connection for each request, so that a connection closed by a fault does not affect the next one.
fn client() -> Client {
    let client = Client::builder().no_proxy().pool_max_idle_per_host(0);
    client.retry(reqwest::retry::never()).build().unwrap()
}

#[tokio::test]
async fn faults_strike_before_or_after() {
    let mut our_api = OurApi::new(1);
    our_api.be_good();
    let our = serve(our_api, Duration::from_secs(5)).await;
    let count = || our.state().data().agents.len();
    let post = async |timeout: Duration| {
        let name = format!("Agent {}", our.total());
        let request = client()
            .post(format!("{}/agents", our.url()))
            .timeout(timeout);
        request
            .json(&json!({ "name": name, "email": name }))
            .send()
            .await
    };
    let long = Duration::from_secs(30);
    for (fault, answer) in [
        (status(500), Some(500)),
        (crashed(), Some(500)),
        (status(404), Some(404)),
        (status(503).header("retry-after", "7"), Some(503)),
        (status(429).retry_date(60), Some(429)),
        (html(), Some(200)),
        (status(200).body("[]"), Some(200)),
        (dropped(), None),
        (slow(Duration::from_secs(60)), None),
        (late(), None),
        (paused(), None),
        (cut_off(), None),
    ] {
        for (fault, done) in [(fault.clone(), 0), (fault.carried_out(), 1)] {
            our.upset("POST /agents", fault.clone());
            assert_eq!(
                get(&mut *our.state(), "/agents").0,
                200,
                "the fault applies only to POST"
            );
            let before = count();
            let is_prompt = matches!(fault.delay, super::fault::Delay::No);
            let timeout = if is_prompt {
                long
            } else {
                Duration::from_millis(200)
            };
            match (answer, post(timeout).await) {
                (Some(status), answer) => {
                    let answer = answer.unwrap();
                    assert_eq!(answer.status(), status);
                    let has_retry_after = matches!(status, 503 | 429);
                    assert_eq!(
                        answer.headers().contains_key("retry-after"),
                        has_retry_after
                    );
                }
                (None, Ok(answer)) => drop(answer.bytes().await.unwrap_err()),
                (None, Err(error)) => assert_eq!(error.is_timeout(), !is_prompt, "{fault:?}"),
            }
            assert_eq!(count() - before, done, "{fault:?}");
        }
    }
    assert_eq!((our.injected(), our.faults_left()), (24, 0));
    let before = count();
    our.upset("POST /agents", overdue(Duration::from_millis(300)));
    assert!(
        post(Duration::from_millis(100))
            .await
            .unwrap_err()
            .is_timeout()
    );
    assert_eq!(count(), before);
    while our.pausing() > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(count(), before + 1);
    our.outage(Some(status(503)));
    assert_eq!(post(long).await.unwrap().status(), 503);
    our.upset_at_random(1.0, html());
    our.calm();
    assert_eq!(post(long).await.unwrap().status(), 201);
}

#[tokio::test]
async fn unsent_response_counts_as_lost() {
    let big = Service::new(quiet(), 1);
    for (fault, lost) in [
        (Some(dropped()), true),
        (Some(cut_off()), true),
        (None, false),
    ] {
        if let Some(fault) = fault {
            big.upset("GET /events", fault.carried_out());
        }
        big.state().push(end(1, 5));
        big.answer(Request::new("GET", &since(0), "")).await;
        assert_eq!(big.state().reported().last().unwrap().lost, lost);
    }
}

/// All bytes received on a connection until the server closes it.
async fn until_closed(url: &str, path: &str) -> String {
    let address = url.replace("http://", "");
    let connection = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
    connection.try_write(request.as_bytes()).unwrap();
    let mut answer = String::new();
    loop {
        connection.readable().await.unwrap();
        let mut part = [0; 1024];
        match connection.try_read(&mut part) {
            Ok(0) => return answer,
            Ok(length) => answer.push_str(std::str::from_utf8(&part[..length]).unwrap()),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
    }
}

/// The server closes idle connections, and those of unhandled errors.
#[tokio::test]
async fn server_closes_idle_and_broken_connections() {
    let keep_alive = Duration::from_millis(50);
    let our = serve(OurApi::new(1), keep_alive).await;
    our.set_latency(3 * keep_alive);
    let answer = until_closed(&our.url(), "/agents").await;
    let whole = answer.starts_with("HTTP/1.1 200") && answer.ends_with("[]");
    assert!(whole, "a connection in use is not idle: {answer}");
    let big = serve(quiet(), Duration::from_secs(3600)).await;
    let answer = until_closed(&big.url(), "/events").await;
    let unannounced = answer.starts_with("HTTP/1.1 500") && !answer.contains("connection: close");
    assert!(unannounced, "{answer}");
}

/// A service that goes down closes its connections, and comes back at the same address.
#[tokio::test]
async fn service_returns_on_its_address() {
    let our = serve(OurApi::new(1), Duration::from_secs(5)).await;
    let (client, url) = (client(), format!("{}/agents", our.url()));
    our.hold(true);
    let waiting = client.get(&url).send();
    let down = async {
        while our.open_requests() < 1 {
            tokio::task::yield_now().await;
        }
        our.down().await;
    };
    let (waited, ()) = tokio::join!(waiting, down);
    assert!(waited.is_err(), "its connections are cut");
    our.hold(false);
    assert!(client.get(&url).send().await.unwrap_err().is_connect());
    for _ in 0..2 {
        our.up().await.unwrap();
        assert_eq!(client.get(&url).send().await.unwrap().status(), 200);
    }
}

/// Writes to OurAPI what a perfect daemon would write.
fn write(our: &mut OurApi, reported: &[Reported]) {
    for chat in expected(reported, &Rules::default()).chats {
        let mut body = json!({ "external_id": chat.external_ids[0], "started_at": chat.started_at[0], "ended_at": chat.ended_at });
        if let Some(email) = &chat.agents[0] {
            let known = |our: &OurApi| {
                let mut agents = our.data().agents.iter();
                agents
                    .find(|agent| agent.email == *email)
                    .map(|agent| agent.agent_id)
            };
            if known(our).is_none() {
                let advisors = reported
                    .iter()
                    .flat_map(|one| [&one.first_advisor, &one.advisor]);
                let mut advisors = advisors.flatten();
                let advisor = advisors
                    .find(|advisor| advisor.email_address == *email)
                    .unwrap();
                let taken = our
                    .data()
                    .agents
                    .iter()
                    .any(|agent| agent.name == advisor.name);
                let name = match taken {
                    true => format!("{} ({email})", advisor.name),
                    false => advisor.name.clone(),
                };
                let agent = json!({ "name": name, "email": email });
                assert_eq!(ask(our, "POST", "/agents", &agent).0, 201);
            }
            body["agent_id"] = json!(known(our));
        }
        let (status, created) = ask(our, "POST", "/chats", &body);
        assert_eq!(status, 201, "{created}");
        let path = format!("/chats/{}/messages", created["chat_id"].as_str().unwrap());
        for ((sent_at, text), count) in chat.messages {
            let body = json!({ "sent_at": sent_at, "text": text });
            (0..count).for_each(|_| assert_eq!(ask(our, "POST", &path, &body).0, 200));
        }
    }
}

/// A correct result shows no difference, and each wrong result shows one.
#[test]
fn comparison_finds_every_difference() {
    let once = Options {
        active: 5,
        ..lively()
    };
    let history = Duration::from_secs(400);
    for options in [
        once,
        log(Log {
            history,
            ..Log::default()
        }),
    ] {
        let (mut big, mut our) = (BigChat::new(options), OurApi::new(1));
        for poll in 0..60 {
            big.set_clock(Clock::Still(3600 + poll * 10));
            get(&mut big, &since(2600));
            if poll % 20 == 10 {
                big.restart();
            }
        }
        big.set_quiet(true);
        let reported = big.reported();
        write(&mut our, &reported);
        let wanted = expected(&reported, &Rules::default());
        let spoiled = |spoil: &dyn Fn(&mut Data)| {
            let mut data = our.data().clone();
            spoil(&mut data);
            compare(&wanted, &data, &Rules::default())
        };
        let report = spoiled(&|_| {});
        assert!(
            report.is_clean() && report.fallbacks() == 0 && report.expected() > 20,
            "{report}"
        );
        assert_eq!(report.held(), our.message_count());
        fn any(data: &mut Data) -> &mut Vec<super::our_api::Message> {
            data.messages
                .values_mut()
                .find(|messages| !messages.is_empty())
                .unwrap()
        }
        let lost = spoiled(&|data| drop(any(data).remove(0)));
        assert_eq!((lost.missing(), lost.extra()), (1, 0));
        let duplicated = spoiled(&|data| any(data).extend_from_within(..1));
        assert_eq!((duplicated.missing(), duplicated.extra()), (0, 1));
        let wrongs: [&dyn Fn(&mut Data); 7] = [
            &|data| data.chats.last_mut().unwrap().agent_id = None,
            &|data| data.chats[0].ended_at = Some(NaiveDateTime::MIN),
            &|data| data.chats[0].started_at += TimeDelta::seconds(1),
            &|data| data.chats[0].external_id = "other".to_owned(),
            &|data| drop(data.chats.pop()),
            &|data| data.agents.push(data.agents[0].clone()),
            &|data| data.agents[0].name.push('x'),
        ];
        for (index, wrong) in wrongs.iter().enumerate() {
            assert!(!spoiled(*wrong).is_clean(), "wrong {index}");
        }
    }
}

#[test]
fn rules_of_expected_state() {
    let mut big = quiet();
    let poll = |big: &mut BigChat, events: Vec<Value>| {
        big.push_page(events);
        get(big, &since(0));
    };
    big.open(42, 0, 1);
    big.open(43, 0, 1);
    let twins = [
        message(42, 0, "ok"),
        message(42, 0, "ok"),
        message(42, 0, " ok"),
    ];
    poll(
        &mut big,
        [
            vec![start(42, 0), transfer(42, 5, 2), end(42, 9)],
            twins.into(),
        ]
        .concat(),
    );
    poll(
        &mut big,
        vec![
            message(42, 0, "ok"),
            message(42, 0, "k"),
            transfer(42, 5, 3),
            transfer(42, 5, 2),
            transfer(42, 4, 4),
            end(42, 8),
        ],
    );
    poll(&mut big, vec![event(43, "MESSAGE", 0, Value::Null)]);
    let third = big.advisor(3).unwrap();
    big.restart();
    big.open(42, 3700, 1);
    poll(&mut big, vec![start(42, 3700)]);
    let chats = expected(&big.reported(), &Rules::default()).chats;
    let time = |at: i64| DateTime::from_timestamp(T0 + at, 0).unwrap().naive_utc();
    assert_eq!(chats.len(), 2, "an unparsable event makes no chat");
    assert_eq!(chats[0].external_ids, ["42"]);
    assert_eq!(chats[0].started_at, [time(0)]);
    assert_eq!(
        chats[0].agents,
        [Some(third.email_address.clone()), None],
        "of two at the same time, the one that arrived last, without repetitions; or none, because BigChat has restarted"
    );
    assert_eq!(chats[0].ended_at, Some(time(9)));
    assert_eq!(
        chats[0].messages,
        BTreeMap::from([((time(0), "ok".to_owned()), 3)])
    );
    assert_eq!(chats[0].refused, 1, "one character is too short");
    assert_eq!(chats[1].external_ids, ["42@2026-11-22T23:01:40Z"]);
    assert_eq!(
        chats[1].agents,
        [Some(big.advisor(1).unwrap().email_address.clone())]
    );
}

#[test]
fn advisor_from_log_details_is_accepted() {
    for (mode, accepted) in [(Mode::Log(Log::default()), true), (Mode::Once, false)] {
        let mut big = BigChat::new(Options {
            mode,
            quiet: true,
            ..lively()
        });
        big.open(42, 3595, 1);
        big.push(start(42, 3595));
        get(&mut big, &since(3590));
        big.push(transfer(42, 3595, 7));
        // The response is never sent.
        big.answer(&Request::new("GET", &since(3590), ""), 0);
        let seventh = Some(big.advisor(7).unwrap().email_address.clone());
        big.restart();
        let chats = expected(&big.reported(), &Rules::default()).chats;
        assert_eq!(chats[0].agents.contains(&seventh), accepted);
    }
}

/// Events of the latest response are lost, unless a log reports them again.
#[test]
fn latest_response_lost_except_in_log() {
    for (mode, lost) in [
        (Mode::Log(Log::default()), [false, true]),
        (Mode::Once, [true, true]),
    ] {
        let mut big = BigChat::new(Options {
            mode,
            quiet: true,
            ..lively()
        });
        big.open(42, 0, 1);
        for text in ["stored", "in memory"] {
            big.push(message(42, 3595, text));
            get(&mut big, &since(3590));
        }
        assert_eq!(big.latest().len(), 1, "only what was never reported before");
        assert_eq!(big.lose_latest(), 1);
        let fate = |big: &mut BigChat| {
            big.reported()
                .iter()
                .map(|one| one.lost)
                .collect::<Vec<_>>()
        };
        assert_eq!(fate(&mut big), [false, lost[0]]);
        big.restart();
        assert_eq!(fate(&mut big)[..2], [false, lost[1]]);
    }
}

#[tokio::test]
async fn both_services_are_served_and_compared() {
    let simulator = Simulator::start(quiet(), OurApi::new(1)).await.unwrap();
    simulator.bigchat.state().push(message(1, 5, "hello"));
    let polled = client()
        .get(simulator.bigchat.url() + &since(0))
        .send()
        .await
        .unwrap();
    let date = polled.headers()["date"].to_str().unwrap();
    assert_eq!(
        date, "Sun, 22 Nov 2026 23:00:00 GMT",
        "the date comes from BigChat's clock"
    );
    let report = simulator.compare();
    assert_eq!(
        (report.missing(), simulator.bigchat.count("GET /events")),
        (1, 1)
    );
}
