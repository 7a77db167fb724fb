//! The simulated services against the facts that are known of the real ones, over HTTP, and the comparison against both a
//! right and a wrong result.

#![expect(clippy::unwrap_used, reason = "a test may fail so")]

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use chrono::{DateTime, NaiveDateTime, SecondsFormat, TimeDelta, Utc};
use futures_util::future::join_all;
use reqwest::{Client, Method, Response, StatusCode};
use serde_json::{Value, json};

use super::{
    Options, Sim,
    bigchat::{self, Log, Mode, NextPage, Told},
    compare::{Rules, compare, expected},
    faults::{Fault, RetryAfter, When},
    our_api::{self, Held},
};

struct Bench {
    sim: Sim,
    client: Client,
}

async fn bench(bigchat: bigchat::Options, our_api: our_api::Options) -> Bench {
    let sim = Sim::start(Options {
        bigchat,
        our_api,
        ..Options::default()
    })
    .await
    .unwrap();
    Bench {
        sim,
        client: client(),
    }
}

fn client() -> Client {
    // A connection of which a fault disposes must not surprise the next request.
    Client::builder()
        .no_proxy()
        .pool_max_idle_per_host(0)
        .retry(reqwest::retry::never())
        .build()
        .unwrap()
}

fn quiet() -> bigchat::Options {
    bigchat::Options {
        quiet: true,
        ..bigchat::Options::default()
    }
}

fn log(log: Log) -> bigchat::Options {
    bigchat::Options {
        mode: Mode::Log(log),
        ..bigchat::Options::default()
    }
}

fn stamp(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Secs, true)
}

/// A time some seconds from now.
fn ago(seconds: i64) -> String {
    stamp(Utc::now() - TimeDelta::seconds(seconds))
}

impl Bench {
    async fn try_get(&self, path: &str) -> reqwest::Result<Response> {
        self.client
            .get(format!("{}{path}", self.sim.bigchat_url()))
            .send()
            .await
    }

    async fn get(&self, path: &str) -> (StatusCode, Value) {
        read(self.try_get(path).await.unwrap()).await
    }

    async fn page(&self, query: &str) -> Value {
        let (status, page) = self.get(&format!("/events?{query}")).await;
        assert_eq!(status, 200, "{page}");
        page
    }

    async fn our(&self, method: Method, path: &str, body: Value) -> (StatusCode, Value) {
        let request = self
            .client
            .request(method, format!("{}{path}", self.sim.our_api_url()));
        let request = if body.is_null() {
            request
        } else {
            request.json(&body)
        };
        read(request.send().await.unwrap()).await
    }

    async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        self.our(Method::POST, path, body).await
    }

    async fn look(&self, path: &str) -> Value {
        self.our(Method::GET, path, Value::Null).await.1
    }

    /// Writes to OurAPI what a perfect daemon would.
    async fn write(&self, told: &[Told]) {
        for chat in expected(told, &Rules::default()).chats {
            let mut body = json!({ "external_id": chat.external_ids[0], "started_at": chat.started_at[0], "ended_at": chat.ended_at });
            if let Some(email) = &chat.agents[0] {
                let advisors = told
                    .iter()
                    .flat_map(|told| [&told.first_advisor, &told.advisor])
                    .flatten();
                let name = advisors
                    .filter(|advisor| advisor.email_address == *email)
                    .map(|advisor| advisor.name.clone())
                    .next()
                    .unwrap();
                let mut agents = self.sim.our_api.agents();
                if !agents.iter().any(|agent| agent.email == *email) {
                    let name = if agents.iter().any(|agent| agent.name == name) {
                        format!("{name} ({email})")
                    } else {
                        name
                    };
                    assert_eq!(
                        self.post("/agents", json!({ "name": name, "email": email }))
                            .await
                            .0,
                        201
                    );
                    agents = self.sim.our_api.agents();
                }
                body["agent_id"] = json!(
                    agents
                        .iter()
                        .find(|agent| agent.email == *email)
                        .unwrap()
                        .agent_id
                );
            }
            let (status, created) = self.post("/chats", body).await;
            assert_eq!(status, 201, "{created}");
            let path = format!("/chats/{}/messages", created["chat_id"].as_str().unwrap());
            for ((sent_at, text), count) in chat.messages {
                for _ in 0..count {
                    assert_eq!(
                        self.post(&path, json!({ "sent_at": sent_at, "text": text }))
                            .await
                            .0,
                        200
                    );
                }
            }
        }
    }
}

async fn read(response: Response) -> (StatusCode, Value) {
    let status = response.status();
    let text = response.text().await.unwrap();
    (
        status,
        serde_json::from_str(&text).unwrap_or(Value::String(text)),
    )
}

fn events(page: &Value) -> &Vec<Value> {
    page["events"].as_array().unwrap()
}

fn message(id: i64, at: i64, text: &str) -> Value {
    json!({ "conversation_id": id, "event_name": "MESSAGE", "event_at": at, "data": { "message": text } })
}

#[tokio::test]
async fn once_tells_events_as_the_real_one_does() {
    let bench = bench(
        bigchat::Options {
            clock_offset: 3600,
            ..Default::default()
        },
        Default::default(),
    )
    .await;
    let begin = Utc::now() + TimeDelta::seconds(3600 - 10);
    let (mut names, mut errors, mut pages, mut second_pages) =
        (BTreeMap::<String, u32>::new(), 0, 0, 0);
    for _ in 0..300 {
        let response = bench
            .try_get(&format!("/events?start_at={}", stamp(begin)))
            .await
            .unwrap();
        let date = httpdate::parse_http_date(response.headers()["date"].to_str().unwrap()).unwrap();
        let now = Utc::now() + TimeDelta::seconds(3600);
        assert!(
            (now - TimeDelta::seconds(3)..=now).contains(&DateTime::<Utc>::from(date)),
            "the date is by its own clock"
        );
        let (status, page) = read(response).await;
        if status == 500 {
            errors += 1;
            continue;
        }
        pages += 1;
        for event in events(&page) {
            let (name, at) = (
                event["event_name"].as_str().unwrap(),
                event["event_at"].as_i64().unwrap(),
            );
            assert!((begin.timestamp()..=now.timestamp()).contains(&at));
            assert!(
                name != "START" || event["conversation_id"] != 1,
                "the first START is never told"
            );
            *names.entry(name.to_owned()).or_default() += 1;
        }
        if let Some(next) = page["nextPageUrl"].as_str() {
            second_pages += 1;
            assert_eq!(
                next,
                format!(
                    "{}/events?start_at={}&page=1",
                    bench.sim.bigchat_url(),
                    stamp(begin)
                )
            );
            let (status, second) = read(bench.client.get(next).send().await.unwrap()).await;
            assert!(status == 500 || second["nextPageUrl"].is_null());
        }
    }
    assert!((3..=35).contains(&errors), "{errors} errors");
    assert!(
        (30..=90).contains(&second_pages),
        "{second_pages} second pages of {pages}"
    );
    assert!(
        names["MESSAGE"] > names["END"]
            && names["END"] > names["TRANSFER"]
            && names["TRANSFER"] > names["START"],
        "{names:?}"
    );
    let told = bench.sim.bigchat.told();
    assert!(
        told.iter()
            .all(|told| !told.lost && !told.over && told.run == 1)
    );
    let emails: BTreeSet<_> = (1..=10)
        .map(|id| bench.sim.bigchat.advisor(id).unwrap().email_address.clone())
        .collect();
    assert_eq!(emails.len(), 10);
    assert_eq!(
        bench.sim.bigchat.advisor(3).unwrap().name,
        bench.sim.bigchat.advisor(7).unwrap().name
    );
}

#[tokio::test]
async fn once_second_pages_repeat_ends_and_transfers() {
    let bench = bench(Default::default(), Default::default()).await;
    let (mut repeated, mut polls) = (0, 0);
    for _ in 0..400 {
        let (_, first) = bench
            .get(&format!("/events?start_at={}", ago(86_400)))
            .await;
        if first["nextPageUrl"].is_null() {
            continue;
        }
        let (status, second) = bench
            .get(&format!("/events?start_at={}&page=1", ago(86_400)))
            .await;
        if status == 200 {
            polls += 1;
            let again =
                |event: &&Value| event["event_name"] != "MESSAGE" && events(&first).contains(event);
            repeated += u32::from(events(&second).iter().any(|event| again(&event)));
        }
    }
    assert!(
        repeated * 4 > polls && repeated * 5 < polls * 3,
        "{repeated} of {polls}"
    );
}

#[tokio::test]
async fn bigchat_refuses_and_shows_as_the_real_one_does() {
    let bench = bench(quiet(), Default::default()).await;
    let big = &bench.sim.bigchat;
    assert_eq!(
        bench.get("/events").await,
        (
            StatusCode::INTERNAL_SERVER_ERROR,
            json!("Internal Server Error")
        )
    );
    for query in [
        "start_at=2026-11-22T22:03:27+00:00",
        "start_at=x",
        "start_at=2026-11-22T22:03:27Z&page=x",
    ] {
        let (status, body) = bench.get(&format!("/events?{query}")).await;
        assert!(
            status == 422 && body["detail"][0]["loc"][0] == "query",
            "{body}"
        );
    }
    for query in [
        "start_at=2026-11-22T22:03:27%2B00:00",
        "start_at=2026-11-22T22:03:27Z&end_at=2000-01-01T00:00:00Z",
    ] {
        assert_eq!(
            bench.page(query).await,
            json!({ "nextPageUrl": null, "events": [] })
        );
    }
    assert_eq!(
        bench.get("/conversations/99").await,
        (
            StatusCode::NOT_FOUND,
            json!({ "detail": "Conversation not found" })
        )
    );
    assert_eq!(
        bench.get("/advisors/99").await,
        (
            StatusCode::NOT_FOUND,
            json!({ "detail": "Advisor not found" })
        )
    );
    assert_eq!(bench.get("/nowhere").await.0, 404);
    assert_eq!(bench.get("/advisors/x").await.0, 422);
    assert_eq!(
        bench.get("/advisors/10").await.1,
        serde_json::to_value(big.advisor(10).unwrap().as_ref()).unwrap()
    );

    big.push(
        1,
        "TRANSFER",
        1_700_000_000,
        json!({ "old_advisor_id": 1, "new_advisor_id": 4 }),
    );
    big.push_raw(json!({ "event_name": "NONSENSE" }));
    let page = bench.page(&format!("start_at={}", ago(10))).await;
    assert_eq!(events(&page).len(), 2);
    assert_eq!(
        events(&bench.page(&format!("start_at={}", ago(10))).await).len(),
        0,
        "events are told once"
    );
    let (_, shown) = bench.get("/conversations/1").await;
    let start = big.told()[0].started_at;
    let only =
        json!([{ "conversation_id": 1, "event_name": "START", "event_at": start, "data": null }]);
    assert_eq!(
        shown,
        json!({ "events": only, "conversation_id": 1, "advisor_id": 1 })
    );

    big.push_page(
        vec![message(1, 1_700_000_000, "twin")],
        NextPage::Url("http://evil.example/events?page=9".to_owned()),
    );
    assert_eq!(
        bench.page(&format!("start_at={}", ago(10))).await["nextPageUrl"],
        "http://evil.example/events?page=9"
    );
    assert_eq!(big.traffic.count("GET /conversations/{id}"), 2);
}

#[tokio::test]
async fn once_dates_events_in_the_future_if_asked_to() {
    let bench = bench(Default::default(), Default::default()).await;
    let begin = (Utc::now() + TimeDelta::days(1)).timestamp();
    while bench
        .sim
        .bigchat
        .told()
        .iter()
        .filter(|told| told.name != "START")
        .count()
        < 5
    {
        bench
            .get(&format!("/events?start_at={}", ago(-86_400)))
            .await;
    }
    assert!(
        bench
            .sim
            .bigchat
            .told()
            .iter()
            .all(|told| told.name == "START" || (begin..begin + 60).contains(&told.event_at))
    );
}

#[tokio::test]
async fn a_restart_begins_at_one_again_for_others() {
    let bench = bench(quiet(), Default::default()).await;
    let big = &bench.sim.bigchat;
    let mut starts = Vec::new();
    for run in 1..=3 {
        assert_eq!(big.run(), run);
        starts.push(
            bench.get("/conversations/1").await.1["events"][0]["event_at"]
                .as_i64()
                .unwrap(),
        );
        if run == 3 {
            break;
        }
        big.push(2, "START", starts[0], Value::Null);
        bench.page(&format!("start_at={}", ago(10))).await;
        assert_eq!(bench.get("/conversations/2").await.0, 200);
        let advisor = big.advisor(1).unwrap();
        if run == 1 {
            big.restart();
        } else {
            big.restart_at_next_poll();
            assert_eq!(big.run(), 2);
        }
        bench.page(&format!("start_at={}", ago(10))).await;
        assert_eq!(bench.get("/conversations/2").await.0, 404);
        assert_ne!(big.advisor(1).unwrap(), advisor);
    }
    assert!(starts.is_sorted_by(|a, b| a < b), "{starts:?}");
}

#[tokio::test]
async fn the_log_gives_the_same_again_in_pages() {
    let history = Duration::from_secs(100);
    let bench = bench(
        log(Log {
            events_per_second: 5.0,
            page_size: 40,
            history,
            ..Log::default()
        }),
        Default::default(),
    )
    .await;
    let (begin, middle, end) = (ago(200), ago(50), ago(10));
    let whole = async |start: &str, end: &str| {
        let (mut all, mut url) = (
            Vec::new(),
            format!(
                "{}/events?start_at={start}&end_at={end}",
                bench.sim.bigchat_url()
            ),
        );
        loop {
            let (_, page) = read(bench.client.get(&url).send().await.unwrap()).await;
            assert!(events(&page).len() <= 40);
            all.extend(events(&page).clone());
            match page["nextPageUrl"].as_str() {
                Some(next) => url = next.to_owned(),
                None => return all,
            }
        }
    };
    let all = whole(&begin, &end).await;
    assert!(all.len() > 200, "{}", all.len());
    assert!(all.is_sorted_by_key(|event| event["event_at"].as_i64()));
    assert_eq!(whole(&begin, &end).await, all);
    assert_eq!(
        [whole(&begin, &middle).await, whole(&middle, &end).await].concat(),
        all,
        "windows do not overlap"
    );
    assert!(
        all.windows(2)
            .any(|pair| pair[0]["event_name"] == "MESSAGE" && pair[0] == pair[1]),
        "there are twins"
    );

    let big = &bench.sim.bigchat;
    big.set_quiet(true);
    let last = Utc::now().timestamp() + 60;
    big.push(
        1,
        "TRANSFER",
        last,
        json!({ "old_advisor_id": 1, "new_advisor_id": 9 }),
    );
    let (_, shown) = bench.get("/conversations/1").await;
    assert_eq!(shown["advisor_id"], 9, "the advisor of now");
    let told = big.told();
    assert_eq!(
        events(&shown).len(),
        told.iter().filter(|told| told.conversation_id == 1).count()
    );
    big.restart();
    let told = big.told();
    assert!(
        told.last().unwrap().lost && !told[0].lost && told.iter().all(|told| told.over),
        "what nobody was told is lost"
    );
}

#[tokio::test]
async fn our_api_keeps_and_refuses_as_the_real_one_does() {
    let bench = bench(quiet(), Default::default()).await;
    let (status, agent) = bench
        .post(
            "/agents",
            json!({ "name": " Ann O'Brien ", "email": "ann@x.y" }),
        )
        .await;
    assert!(status == 201 && agent["name"] == "Ann O'Brien", "{agent}");
    for (name, email) in [("Ann O'Brien", "other@x.y"), ("Other", "ann@x.y")] {
        let again = bench
            .post("/agents", json!({ "name": name, "email": email }))
            .await;
        assert_eq!(
            again,
            (
                StatusCode::INTERNAL_SERVER_ERROR,
                json!("Internal Server Error")
            )
        );
    }
    let (status, short) = bench.post("/agents", json!({ "name": " k " })).await;
    let of_name = json!({
        "type": "string_too_short", "loc": ["body", "name"], "msg": "String should have at least 2 characters",
        "input": " k ", "ctx": { "min_length": 2 },
    });
    assert!(
        status == 422 && short["detail"][0] == of_name && short["detail"][1]["type"] == "missing",
        "{short}"
    );
    assert_eq!(
        bench.look("/agents?email=ann%40x.y&name=").await,
        json!([agent])
    );
    assert_eq!(bench.look("/agents?email=").await, json!([agent]));
    assert_eq!(bench.look("/agents?name=nobody").await, json!([]));
    assert_eq!(
        bench
            .look(&format!("/agents/{}", agent["agent_id"].as_str().unwrap()))
            .await,
        agent
    );

    let (status, chat) = bench
        .post(
            "/chats",
            json!({ "external_id": "1", "started_at": "2026-11-22T22:03:27+02:00" }),
        )
        .await;
    let id = chat["chat_id"].as_str().unwrap();
    assert!(
        status == 201 && chat["started_at"] == "2026-11-22T22:03:27" && chat["agent_id"].is_null(),
        "{chat}"
    );
    let exists = json!({ "detail": "A chat with that external ID already exists." });
    let again = json!({ "external_id": "1", "started_at": "2026-11-22T22:03:27Z" });
    assert_eq!(
        bench.post("/chats", again).await,
        (StatusCode::NOT_FOUND, exists)
    );
    let nobody = "00000000-0000-4000-8000-000000000000";
    let stranger =
        json!({ "external_id": "1", "started_at": "2026-11-22T22:03:27Z", "agent_id": nobody });
    let refused = (
        StatusCode::BAD_REQUEST,
        json!({ "detail": "That agent does not exist." }),
    );
    assert_eq!(bench.post("/chats", stranger).await, refused);
    assert_eq!(bench.look("/chats?external_id=").await, json!([chat]));
    assert_eq!(bench.look("/chats?external_id=2").await, json!([]));

    let path = format!("/chats/{id}");
    assert_eq!(
        bench
            .our(Method::PATCH, &path, json!({ "agent_id": nobody }))
            .await,
        refused
    );
    let change = json!({ "agent_id": agent["agent_id"], "ended_at": "2026-11-22T23:00:00.5Z", "external_id": "9" });
    assert_eq!(
        bench.our(Method::PATCH, &path, change).await,
        (StatusCode::NO_CONTENT, json!(""))
    );
    let changed = bench.look(&path).await;
    assert!(
        changed["agent_id"] == agent["agent_id"] && changed["external_id"] == "1",
        "{changed}"
    );
    assert_eq!(
        bench
            .our(Method::PATCH, &path, json!({ "started_at": null }))
            .await
            .0,
        500
    );
    assert_eq!(
        bench
            .our(Method::PATCH, &path, json!({ "ended_at": null }))
            .await
            .0,
        204
    );
    assert_eq!(bench.our(Method::PATCH, &path, json!({})).await.0, 204);
    let cleared = bench.look(&path).await;
    assert!(
        cleared["ended_at"].is_null() && cleared["agent_id"] == agent["agent_id"],
        "{cleared}"
    );

    let messages = format!("{path}/messages");
    for text in ["k", "😀", " \n\u{a0}", ""] {
        assert_eq!(
            bench
                .post(
                    &messages,
                    json!({ "sent_at": "2026-11-22T22:03:27Z", "text": text })
                )
                .await
                .0,
            422
        );
    }
    let ok = json!({ "sent_at": "2026-11-22T22:03:27Z", "text": "  ok\n" });
    assert_eq!(
        bench.post(&messages, ok.clone()).await,
        (StatusCode::OK, json!({}))
    );
    let kept = bench.look(&messages).await;
    assert!(
        kept[0]["text"] == "ok" && kept[0]["sent_at"] == "2026-11-22T22:03:27",
        "{kept}"
    );
    let unknown = (StatusCode::NOT_FOUND, json!({ "detail": "Chat not found" }));
    assert_eq!(
        bench.post(&format!("/chats/{nobody}/messages"), ok).await,
        unknown
    );
    assert_eq!(
        bench
            .our(Method::PATCH, &format!("/chats/{nobody}"), json!({}))
            .await,
        unknown
    );
    assert_eq!(
        bench.our(Method::DELETE, "/chats", Value::Null).await.0,
        405
    );

    let our = &bench.sim.our_api;
    assert_eq!((our.traffic.max_in_flight(), our.stumbled()), (1, false));
    our.forget_chat("1");
    our.wipe_agents();
    assert_eq!(
        (our.chats(), our.agents(), our.message_count()),
        (vec![], vec![], 0)
    );
}

#[tokio::test]
async fn our_api_stumbles_over_requests_at_once_unless_it_is_a_good_one() {
    let agent = |n| json!({ "name": format!("Agent {n}"), "email": format!("{n}@x.y") });
    for good in [false, true] {
        let options = if good {
            our_api::Options::good()
        } else {
            our_api::Options::default()
        };
        let bench = bench(
            quiet(),
            our_api::Options {
                latency: Duration::from_millis(50),
                ..options
            },
        )
        .await;
        let our = &bench.sim.our_api;
        assert_eq!(bench.post("/agents", agent(0)).await.0, 201);
        our.hang(true);
        let requests = join_all((1..=4).map(|n| bench.post("/agents", agent(n))));
        let let_go = async {
            while our.traffic.open() < 4 {
                tokio::task::yield_now().await;
            }
            our.hang(false);
        };
        tokio::join!(requests, let_go);
        assert_eq!(our.traffic.max_in_flight(), 4);
        assert_eq!(our.stumbled(), !good);
        assert_eq!(our.agents().len() == 5, good);
        if good {
            assert_eq!(bench.post("/agents", agent(0)).await.0, 409);
            continue;
        }
        let mut seen = BTreeSet::new();
        while seen.len() < 2 {
            seen.insert(
                bench
                    .look("/agents")
                    .await
                    .as_array()
                    .unwrap()
                    .iter()
                    .any(|agent| agent["name"] == "Agent 0"),
            );
        }
        our.wipe();
        assert_eq!(
            (bench.look("/agents").await, our.stumbled()),
            (json!([]), false)
        );
    }
}

#[tokio::test]
async fn faults_strike_before_or_after() {
    let bench = bench(quiet(), our_api::Options::good()).await;
    let our = &bench.sim.our_api;
    let post = async |n: usize, fault: &Fault| {
        let patience = if matches!(fault, Fault::Hang(_) | Fault::Pause | Fault::Late(_)) {
            Duration::from_millis(200)
        } else {
            Duration::from_secs(30)
        };
        let body = json!({ "name": format!("Agent {n}"), "email": format!("{n}@x.y") });
        bench
            .client
            .post(format!("{}/agents", our.url()))
            .timeout(patience)
            .json(&body)
            .send()
            .await
    };
    let hang = Fault::Hang(Duration::from_secs(60));
    let kinds = [
        Fault::Drop,
        hang,
        Fault::Pause,
        Fault::Status(500),
        Fault::Status(404),
        Fault::RetryLater(503, RetryAfter::Seconds(7)),
        Fault::RetryLater(429, RetryAfter::Date(60)),
        Fault::Html,
        Fault::CutOff,
        Fault::Body("[]".to_owned()),
    ];
    let mut sent = 0;
    for (when, carried_out) in [(When::Before, 0), (When::After, 1)] {
        for fault in &kinds {
            our.faults.script("POST /agents", when, fault.clone(), 1);
            assert_eq!(
                bench.look("/agents").await.as_array().unwrap().len(),
                our.agents().len(),
                "it is not meant for this"
            );
            let before = our.agents().len();
            sent += 1;
            match (fault, post(sent, fault).await) {
                (Fault::Drop, answer) => assert!(!answer.unwrap_err().is_timeout()),
                (Fault::Hang(_) | Fault::Pause, answer) => {
                    assert!(answer.unwrap_err().is_timeout())
                }
                (Fault::CutOff, answer) => assert!(answer.unwrap().bytes().await.is_err()),
                (Fault::Status(status) | Fault::RetryLater(status, _), answer) => {
                    let answer = answer.unwrap();
                    assert_eq!(answer.status(), *status);
                    assert_eq!(
                        answer.headers().contains_key("retry-after"),
                        matches!(fault, Fault::RetryLater(..))
                    );
                }
                (Fault::Html | Fault::Body(_), answer) => assert_eq!(answer.unwrap().status(), 200),
                (Fault::Late(_), _) => unreachable!("it is carried out before and after"),
            }
            assert_eq!(
                our.agents().len() - before,
                carried_out,
                "{when:?} {fault:?}"
            );
        }
    }
    assert_eq!(
        (our.faults.injected(), our.faults.left()),
        (2 * kinds.len() as u64, 0)
    );
    let (late, before) = (Fault::Late(Duration::from_millis(300)), our.agents().len());
    our.faults
        .script("POST /agents", When::Before, late.clone(), 1);
    assert!(post(98, &late).await.unwrap_err().is_timeout());
    assert_eq!(our.agents().len(), before);
    while our.agents().len() == before {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    our.faults.outage(Some(Fault::Status(503)));
    assert_eq!(post(99, &Fault::Drop).await.unwrap().status(), 503);
    our.faults.rate(1.0, When::Before, Fault::Html);
    our.faults.clear();
    assert_eq!(post(99, &Fault::Drop).await.unwrap().status(), 201);
}

#[tokio::test]
async fn what_never_went_out_is_known_to_be_lost() {
    let bench = bench(quiet(), Default::default()).await;
    let big = &bench.sim.bigchat;
    for (fault, lost) in [
        (Some(Fault::Drop), true),
        (Some(Fault::CutOff), true),
        (None, false),
    ] {
        if let Some(fault) = fault {
            big.faults.script("GET /events", When::After, fault, 1);
        }
        big.push(1, "END", 1_700_000_000, Value::Null);
        if let Ok(response) = bench
            .try_get(&format!("/events?start_at={}", ago(10)))
            .await
        {
            assert_eq!(response.bytes().await.is_err(), lost);
        }
        assert_eq!(big.told().last().unwrap().lost, lost);
    }
}

/// What comes back on a connection until the server closes it.
async fn until_closed(url: &str, path: &str) -> String {
    let connection = tokio::net::TcpStream::connect(url.replace("http://", ""))
        .await
        .unwrap();
    connection
        .try_write(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes())
        .unwrap();
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

#[tokio::test]
async fn the_server_closes_idle_connections_and_those_of_unhandled_errors() {
    let keep_alive = Duration::from_millis(50);
    let our_api = our_api::Options {
        keep_alive,
        latency: 3 * keep_alive,
        ..Default::default()
    };
    let bench = bench(
        bigchat::Options {
            keep_alive: Duration::from_secs(3600),
            ..quiet()
        },
        our_api,
    )
    .await;
    let answer = until_closed(&bench.sim.our_api_url(), "/agents").await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with("[]"),
        "one in use is not idle: {answer}"
    );
    let answer = until_closed(&bench.sim.bigchat_url(), "/events").await;
    assert!(
        answer.starts_with("HTTP/1.1 500") && !answer.contains("connection: close"),
        "{answer}"
    );
}

#[tokio::test]
async fn the_server_cuts_its_connections_when_it_stops() {
    let bench = bench(quiet(), Default::default()).await;
    let Bench { sim, client } = bench;
    let url = sim.our_api_url();
    sim.our_api.hang(true);
    let waiting = client.get(format!("{url}/agents")).send();
    let stop = async {
        while sim.our_api.traffic.open() < 1 {
            tokio::task::yield_now().await;
        }
        sim.shutdown().await.unwrap();
    };
    let (waited, ()) = tokio::join!(waiting, stop);
    assert!(waited.is_err(), "its connections are cut");
    assert!(client.get(url).send().await.unwrap_err().is_connect());
}

#[tokio::test]
async fn a_right_result_is_clean_and_a_wrong_one_is_not() {
    let once = bigchat::Options {
        active: 5,
        ..Default::default()
    };
    let history = Duration::from_secs(400);
    for options in [
        once,
        log(Log {
            history,
            ..Log::default()
        }),
    ] {
        let bench = bench(options, Default::default()).await;
        let big = &bench.sim.bigchat;
        for poll in 0..60 {
            bench.get(&format!("/events?start_at={}", ago(1000))).await;
            if poll % 20 == 10 {
                big.restart();
                big.set_quiet(false);
            }
        }
        big.set_quiet(true);
        let told = big.told();
        bench.write(&told).await;
        let report = bench.sim.compare();
        assert!(
            report.is_clean() && report.fallbacks() == 0 && report.expected() > 20,
            "{report}"
        );
        assert_eq!(report.held(), bench.sim.our_api.message_count());

        let wanted = expected(&told, &Rules::default());
        let spoiled = |spoil: &dyn Fn(&mut Held)| {
            let mut held = bench.sim.our_api.held();
            spoil(&mut held);
            compare(&wanted, &held, &Rules::default())
        };
        let any = |held: &mut Held| {
            held.messages
                .values_mut()
                .find(|messages| !messages.is_empty())
                .unwrap()
                .first()
                .cloned()
                .unwrap()
        };
        let lost = spoiled(&|held| {
            let gone = any(held);
            held.messages.values_mut().for_each(|messages| {
                messages.retain(|message| message.message_id != gone.message_id)
            });
        });
        assert_eq!((lost.missing(), lost.extra()), (1, 0));
        let doubled = spoiled(&|held| {
            let again = any(held);
            held.messages
                .entry(again.chat_id.unwrap())
                .or_default()
                .push(again);
        });
        assert_eq!((doubled.missing(), doubled.extra()), (0, 1));
        let wrongs: [&dyn Fn(&mut Held); 7] = [
            &|held| held.chats.last_mut().unwrap().agent_id = None,
            &|held| held.chats[0].ended_at = Some(NaiveDateTime::MIN),
            &|held| held.chats[0].started_at += TimeDelta::seconds(1),
            &|held| held.chats[0].external_id = "other".to_owned(),
            &|held| drop(held.chats.pop()),
            &|held| held.agents.push(held.agents[0].clone()),
            &|held| held.agents[0].name.push('x'),
        ];
        for (index, wrong) in wrongs.iter().enumerate() {
            assert!(!spoiled(*wrong).is_clean(), "wrong {index}");
        }
    }
}

#[tokio::test]
async fn the_rules_of_what_is_expected() {
    let bench = bench(quiet(), Default::default()).await;
    let big = &bench.sim.bigchat;
    let poll = async |events: Vec<Value>| {
        big.push_page(events, NextPage::None);
        bench.page(&format!("start_at={}", ago(10))).await;
    };
    let at = 1_763_849_007; // 2025-11-22T22:03:27Z
    let transfer = |at: i64, to: i64| json!({ "conversation_id": 42, "event_name": "TRANSFER", "event_at": at, "data": { "old_advisor_id": 1, "new_advisor_id": to } });
    let plain = |name: &str, at: i64| json!({ "conversation_id": 42, "event_name": name, "event_at": at, "data": null });
    poll(vec![
        plain("START", at),
        transfer(at + 5, 2),
        plain("END", at + 9),
        message(42, at, "ok"),
        message(42, at, "ok"),
        message(42, at, " ok"),
    ])
    .await;
    poll(vec![
        message(42, at, "ok"),
        message(42, at, "k"),
        transfer(at + 5, 3),
        transfer(at + 5, 2),
        transfer(at + 4, 4),
        plain("END", at + 8),
    ])
    .await;
    poll(vec![
        json!({ "conversation_id": 43, "event_name": "MESSAGE", "event_at": at, "data": null }),
    ])
    .await;
    let third = big.advisor(3).unwrap();
    big.restart();
    let later = Utc::now().timestamp() + 100;
    poll(vec![plain("START", later)]).await;
    let chats = expected(&big.told(), &Rules::default()).chats;
    let time = |at: i64| DateTime::from_timestamp(at, 0).unwrap().naive_utc();
    assert_eq!(chats.len(), 2, "what cannot be understood makes no chat");
    assert_eq!(
        (
            chats[0].external_ids.as_slice(),
            chats[0].started_at.as_slice()
        ),
        (["42".to_owned()].as_slice(), [time(at)].as_slice())
    );
    assert_eq!(
        chats[0].agents,
        [Some(third.email_address.clone()), None],
        "the later of two at one time, told again or not; nobody, if there was no time to ask"
    );
    assert_eq!(chats[0].ended_at, Some(time(at + 9)));
    assert_eq!(
        chats[0].messages,
        BTreeMap::from([((time(at), "ok".to_owned()), 3)])
    );
    assert_eq!(chats[0].refused, 1, "one character is too little");
    assert_eq!(
        chats[1].external_ids,
        [format!(
            "42@{}",
            stamp(DateTime::from_timestamp(later, 0).unwrap())
        )]
    );
    assert_eq!(
        chats[1].agents,
        [Some(big.advisor(1).unwrap().email_address.clone())]
    );
}

#[tokio::test]
async fn an_advisor_that_only_the_details_of_a_log_told_of_is_accepted() {
    for (mode, accepted) in [(Mode::Log(Log::default()), true), (Mode::Once, false)] {
        let options = bigchat::Options { mode, ..quiet() };
        let bench = bench(options, Default::default()).await;
        let big = &bench.sim.bigchat;
        let at = Utc::now().timestamp() - 5;
        let data = json!({ "old_advisor_id": 1, "new_advisor_id": 7 });
        big.open(42, at, 1);
        big.push(42, "START", at, Value::Null);
        bench.page(&format!("start_at={}", ago(10))).await;
        big.push(42, "TRANSFER", at, data);
        big.faults
            .script("GET /events", When::After, Fault::Drop, 1);
        let query = format!("/events?start_at={}", ago(10));
        bench.try_get(&query).await.unwrap_err();
        let seventh = Some(big.advisor(7).unwrap().email_address.clone());
        big.restart();
        let chats = expected(&big.told(), &Rules::default()).chats;
        assert_eq!(chats[0].agents.contains(&seventh), accepted);
    }
}

#[tokio::test]
async fn what_is_unsaid_is_lost_unless_a_log_tells_it_again() {
    for (mode, lost) in [
        (Mode::Log(Log::default()), [false, true]),
        (Mode::Once, [true, true]),
    ] {
        let options = bigchat::Options { mode, ..quiet() };
        let bench = bench(options, Default::default()).await;
        let big = &bench.sim.bigchat;
        let query = format!("start_at={}", ago(10));
        let at = Utc::now().timestamp() - 5;
        big.push_raw(message(42, at, "kept"));
        bench.page(&query).await;
        big.push_raw(message(42, at, "in hand"));
        bench.page(&query).await;
        assert_eq!(big.latest().len(), 1, "only what was never told before");
        assert_eq!(big.unsay_latest(), 1);
        let fate = || big.told().iter().map(|told| told.lost).collect::<Vec<_>>();
        assert_eq!(fate(), [false, lost[0]]);
        big.restart();
        assert_eq!(fate()[..2], [false, lost[1]]);
    }
}

#[tokio::test]
async fn a_service_that_is_down_refuses_and_comes_back_where_it_was() {
    let bench = bench(quiet(), Default::default()).await;
    let big = &bench.sim.bigchat;
    assert_eq!(bench.get("/conversations/1").await.0, 200);
    big.down().await.unwrap();
    let error = bench.try_get("/conversations/1").await.unwrap_err();
    assert!(error.is_connect(), "{error}");
    for _ in 0..2 {
        big.up().await.unwrap();
        assert_eq!(bench.get("/conversations/1").await.0, 200);
    }
}

#[tokio::test]
async fn pages_go_in_circles_on_request() {
    let bench = bench(quiet(), Default::default()).await;
    bench.sim.bigchat.set_circles(1.0);
    let query = format!("start_at={}", ago(10));
    let page = bench.page(&query).await;
    let url = format!("{}/events?{query}", bench.sim.bigchat_url());
    assert_eq!(page["nextPageUrl"], json!(url));
}
