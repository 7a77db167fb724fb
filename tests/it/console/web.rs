//! The daemon over HTTP: its access control, its health endpoints, and limits that keep clients from starving each
//! other.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bigchat_sync::http::Api;
use bigchat_sync::settings::Tokens;
use bigchat_sync::simulator::event::message;
use bigchat_sync::simulator::fault::{dropped, status};
use reqwest::header::{
    AUTHORIZATION, CONTENT_TYPE, COOKIE, HOST, HeaderMap, ORIGIN, RETRY_AFTER, SET_COOKIE,
};
use reqwest::{RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::harness::process::Process;
use crate::harness::web::{READ_TOKEN, TOKEN, client, console_token, sent, succeeds};
use crate::harness::{run_live_test, until};

/// The time limit for a response that needs no work.
const TIME_LIMIT: Duration = Duration::from_secs(30);

/// The bytes received in response to these bytes, until the connection is closed.
async fn raw(url: &str, request: &str) -> String {
    let mut stream = connect(url).await;
    stream.write_all(request.as_bytes()).await.expect("written");
    let mut answer = String::new();
    timeout(TIME_LIMIT, stream.read_to_string(&mut answer))
        .await
        .expect("an end")
        .ok();
    answer
}

async fn connect(url: &str) -> TcpStream {
    let address = url.strip_prefix("http://").expect("an address");
    TcpStream::connect(address).await.expect("a connection")
}

/// `/healthz` covers only the daemon. `/readyz` names the API or the journal that keeps events from being delivered.
#[tokio::test]
async fn health_endpoints_during_outages() {
    run_live_test(async |t| {
        let (_, url) = t.start_listening(Tokens::default());
        let client = client();
        let ask = async |path: &str| {
            let answer = sent(client.get(format!("{url}{path}"))).await;
            let status = answer.status();
            (status, answer.text().await.expect("a text"))
        };
        let ready = async || ask("/readyz").await.0 == StatusCode::OK;
        until("it is ready before any request to OurAPI", ready).await;

        t.bigchat.outage(Some(dropped()));
        let down = (StatusCode::SERVICE_UNAVAILABLE, "BigChat is down\n".into());
        until("BigChat is down", async || ask("/readyz").await == down).await;
        assert_eq!(ask("/healthz").await, (StatusCode::OK, "ok\n".into()));
        t.bigchat.outage(None);
        until("BigChat is back", ready).await;

        t.our_api.outage(Some(status(503)));
        let at = t.now() - 1;
        t.bigchat.open(2, at, 1);
        t.bigchat.reports_event(message(2, at, "Hello"));
        let down = (StatusCode::SERVICE_UNAVAILABLE, "OurAPI is down\n".into());
        until("OurAPI is down", async || ask("/readyz").await == down).await;
        t.our_api.outage(None);
        until("OurAPI is back", ready).await;

        let away = t.directory().join("away.db");
        std::fs::rename(t.db(), &away).expect("it is moved");
        let refuses = "the journal cannot be written\n";
        until("the journal refuses", async || {
            ask("/readyz").await == (StatusCode::SERVICE_UNAVAILABLE, refuses.into())
        })
        .await;
        assert_eq!(ask("/healthz").await.0, StatusCode::OK);
        std::fs::rename(away, t.db()).expect("it is moved back");
        until("the journal can be written again", ready).await;
    })
    .await;
}

#[tokio::test]
async fn security_headers_on_every_response() {
    run_live_test(async |t| {
        let (_, url) = t.start_listening(console_token());
        let host = ("host", "evil.example");
        for (path, header, status) in [
            ("/healthz", None, StatusCode::OK),
            ("/metrics", None, StatusCode::UNAUTHORIZED),
            ("/nothing", None, StatusCode::NOT_FOUND),
            ("/healthz", Some(host), StatusCode::MISDIRECTED_REQUEST),
        ] {
            let mut request = client().get(format!("{url}{path}"));
            if let Some((name, value)) = header {
                request = request.header(name, value);
            }
            let answer = sent(request).await;
            assert_eq!(answer.status(), status, "{path}");
            let is = |name: &str, part: &str| {
                let value = answer.headers().get(name);
                assert!(
                    value.is_some_and(|value| value.to_str().is_ok_and(|it| it.contains(part))),
                    "{path} {name}: {value:?}"
                );
            };
            is("content-security-policy", "default-src 'none'");
            is("content-security-policy", "frame-ancestors 'none'");
            is("x-content-type-options", "nosniff");
            is("referrer-policy", "no-referrer");
            is("cache-control", "no-store");
            is("cross-origin-resource-policy", "same-origin");
            let policy = answer.headers()["content-security-policy"].to_str();
            assert!(!policy.expect("a policy").contains("unsafe"));
            assert!(!answer.headers().contains_key("access-control-allow-origin"));
        }
    })
    .await;
}

/// Without the token, only the health endpoints are answered.
#[tokio::test]
async fn metrics_need_the_token() {
    run_live_test(async |t| {
        let (_, url) = t.start_listening(console_token());
        let get = |path: &str| client().get(format!("{url}{path}"));
        assert_eq!(sent(get("/healthz")).await.status(), StatusCode::OK);
        assert_eq!(
            sent(get("/metrics")).await.status(),
            StatusCode::UNAUTHORIZED
        );
        for (token, expected) in [
            (format!("Bearer {TOKEN}"), StatusCode::OK),
            (format!("bearer {TOKEN}"), StatusCode::OK),
            (format!("Bearer {TOKEN} "), StatusCode::OK),
            (format!("Bearer {TOKEN}x"), StatusCode::UNAUTHORIZED),
            (format!("Bearer {}", &TOKEN[1..]), StatusCode::UNAUTHORIZED),
            ("Bearer ".into(), StatusCode::UNAUTHORIZED),
            (format!("Basic {TOKEN}"), StatusCode::UNAUTHORIZED),
            (TOKEN.into(), StatusCode::UNAUTHORIZED),
        ] {
            let answer = sent(get("/metrics").header(AUTHORIZATION, &token)).await;
            assert_eq!(answer.status(), expected, "{token}");
        }
        let metrics = sent(get("/metrics").bearer_auth(TOKEN)).await;
        let text = metrics.text().await.expect("a text");
        assert!(
            text.contains("\nbigchat_sync_console_wrong_tokens_total 2\n"),
            "{text}"
        );
    })
    .await;
}

/// The read token reads everything and changes nothing.
#[tokio::test]
async fn read_token_changes_nothing() {
    run_live_test(async |t| {
        let tokens = Tokens {
            console_read: Some(READ_TOKEN.into()).into(),
            ..console_token()
        };
        let (_, url) = t.start_listening(tokens);
        for path in ["/metrics", "/api/status", "/api/failed", "/api/search"] {
            let get = client().get(format!("{url}{path}"));
            let answer = sent(get.bearer_auth(READ_TOKEN)).await;
            assert_eq!(answer.status(), StatusCode::OK, "{path}");
        }
        let post = |path: &str, token: &str| {
            let request = client().post(format!("{url}{path}")).bearer_auth(token);
            sent(request.header("x-bigchat-sync", "1").json(&json!({})))
        };
        for path in [
            "/api/pause",
            "/api/resume",
            "/api/failed/retry",
            "/api/failed/discard",
        ] {
            let refused = post(path, READ_TOKEN).await;
            assert_eq!(refused.status(), StatusCode::FORBIDDEN, "{path}");
            let answer: Value = refused.json().await.expect("JSON");
            let error = answer["error"].as_str().expect("a text");
            assert!(
                error.contains("this token gives read-only access"),
                "{error}"
            );
        }
        assert_eq!(post("/api/resume", TOKEN).await.status(), StatusCode::OK);

        // The same applies to a session that began with the read token.
        let answer = log_in(&url, READ_TOKEN).await;
        let set = answer.headers()[SET_COOKIE].to_str().expect("a cookie");
        let cookie = set.split(';').next().expect("its value").to_owned();
        let login: Value = answer.json().await.expect("JSON");
        let key = login["key"].as_str().expect("a key").to_owned();
        let of_session = |request: RequestBuilder| {
            sent(
                request
                    .header(COOKIE, &cookie)
                    .header("x-bigchat-sync", &key),
            )
        };
        let read = of_session(client().get(format!("{url}/api/status"))).await;
        assert_eq!(read.status(), StatusCode::OK);
        for (path, expected) in [
            ("/api/pause", StatusCode::FORBIDDEN),
            ("/api/logout", StatusCode::NO_CONTENT),
            ("/api/pause", StatusCode::UNAUTHORIZED),
        ] {
            let request = client().post(format!("{url}{path}")).json(&json!({}));
            assert_eq!(of_session(request).await.status(), expected, "{path}");
        }
    })
    .await;
}

/// A login, as the console's page sends it.
async fn log_in(url: &str, token: &str) -> Response {
    let login = client()
        .post(format!("{url}/api/login"))
        .header(ORIGIN, url)
        .header("x-bigchat-sync", "1")
        .json(&json!({ "token": token }));
    sent(login).await
}

/// A login without a token in its body is answered like any other bad request, and does not count as an attempt.
#[tokio::test]
async fn login_with_malformed_body() {
    run_live_test(async |t| {
        let (_, url) = t.start_listening(console_token());
        for body in ["", "{", "[]", "{}", r#"{"token": 7}"#] {
            let post = client().post(format!("{url}/api/login")).body(body);
            let json = post.header(CONTENT_TYPE, "application/json");
            let answer = sent(json.header("x-bigchat-sync", "1")).await;
            assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{body}");
            let answer: Value = answer.json().await.expect("JSON");
            assert!(answer["error"].is_string(), "{body}: {answer}");
        }
        let metrics = sent(client().get(format!("{url}/metrics")).bearer_auth(TOKEN)).await;
        let text = metrics.text().await.expect("a text");
        let none = "\nbigchat_sync_console_wrong_tokens_total 0\n";
        assert!(text.contains(none), "{text}");
    })
    .await;
}

/// A session lasts until its logout, and needs both the cookie and the key.
#[tokio::test]
async fn session_needs_cookie_and_key() {
    run_live_test(async |t| {
        let (_, url) = t.start_listening(console_token());
        let answer = log_in(&url, TOKEN).await;
        assert_eq!(answer.status(), StatusCode::OK);
        let set = answer.headers()[SET_COOKIE].to_str().expect("a cookie");
        assert!(
            set.contains("HttpOnly") && set.contains("SameSite=Strict"),
            "{set}"
        );
        let cookie = set.split(';').next().expect("its value").to_owned();
        let session: Value = answer.json().await.expect("JSON");
        let key = session["key"].as_str().expect("a key").to_owned();
        assert!(!cookie.contains(&key), "two secrets");
        let ask = async |cookie: &str, key: &str| {
            let get = client().get(format!("{url}/metrics"));
            let asked = get.header(COOKIE, cookie).header("x-bigchat-sync", key);
            sent(asked).await.status()
        };
        assert_eq!(ask(&cookie, &key).await, StatusCode::OK);
        assert_eq!(
            ask(&cookie, "1").await,
            StatusCode::UNAUTHORIZED,
            "the cookie alone"
        );
        assert_eq!(
            ask("", &key).await,
            StatusCode::UNAUTHORIZED,
            "the key alone"
        );
        let logout = client()
            .post(format!("{url}/api/logout"))
            .header(COOKIE, &cookie)
            .header("x-bigchat-sync", &key)
            .header(CONTENT_TYPE, "application/json");
        let answer = sent(logout).await;
        assert_eq!(answer.status(), StatusCode::NO_CONTENT);
        let set = answer.headers()[SET_COOKIE].to_str().expect("a cookie");
        assert!(set.contains("Max-Age=0"), "{set}");
        assert_eq!(ask(&cookie, &key).await, StatusCode::UNAUTHORIZED);
    })
    .await;
}

#[tokio::test]
async fn guessing_tokens_is_slowed() {
    run_live_test(async |t| {
        let (_, url) = t.start_listening(console_token());
        let mut statuses = HashMap::new();
        for _ in 0..14 {
            let status = log_in(&url, "wrong").await.status();
            *statuses.entry(status).or_insert(0) += 1;
        }
        // A few more attempts may be allowed if the loop takes long.
        assert!(
            (10..14).contains(&statuses[&StatusCode::UNAUTHORIZED]),
            "{statuses:?}"
        );
        let refused = client().get(format!("{url}/metrics")).bearer_auth("wrong");
        let refused = sent(refused).await;
        assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
        assert!(refused.headers().contains_key(RETRY_AFTER));
        let probe = client().get(format!("{url}/healthz"));
        assert_eq!(sent(probe).await.status(), StatusCode::OK);
    })
    .await;
}

/// A page of another site cannot change or read anything.
#[tokio::test]
async fn requests_from_another_site() {
    run_live_test(async |t| {
        let (_, url) = t.start_listening(Tokens::default());
        let mut ours = HeaderMap::new();
        ours.insert("x-bigchat-sync", "1".parse().expect("a value"));
        ours.insert(CONTENT_TYPE, "application/json".parse().expect("a value"));
        let post = || client().post(format!("{url}/api/logout"));
        let status = async |request: RequestBuilder| sent(request).await.status();
        assert_eq!(
            status(post().headers(ours.clone())).await,
            StatusCode::NO_CONTENT
        );
        assert_eq!(status(post()).await, StatusCode::FORBIDDEN);
        for origin in ["http://evil.example", "http://localhost:1", "null"] {
            let request = post().headers(ours.clone()).header(ORIGIN, origin);
            assert_eq!(status(request).await, StatusCode::FORBIDDEN, "{origin}");
            let read = client()
                .get(format!("{url}/metrics"))
                .header(ORIGIN, origin);
            assert_eq!(status(read).await, StatusCode::FORBIDDEN, "{origin}");
        }
        let read = client().get(format!("{url}/metrics"));
        let read = read.header("sec-fetch-site", "cross-site");
        assert_eq!(status(read).await, StatusCode::FORBIDDEN);
        for host in ["evil.example", "127.0.0.1.evil.example:80"] {
            let rebound = client().get(format!("{url}/metrics")).header(HOST, host);
            assert_eq!(status(rebound).await, StatusCode::MISDIRECTED_REQUEST);
        }
    })
    .await;
}

/// Two servers could parse such a request differently, so that a request hidden in its body would pass the first one.
#[tokio::test]
async fn ambiguous_requests_are_rejected() {
    run_live_test(async |t| {
        let (_, url) = t.start_listening(Tokens::default());
        let ours = "Host: localhost\r\nX-Bigchat-Sync: 1\r\nContent-Type: application/json\r\n";
        let post = |headers: &str, body: &str| {
            format!("POST /api/logout HTTP/1.1\r\n{ours}{headers}\r\n{body}")
        };
        // The connection must be closed, so that a request smuggled in the body is not answered.
        let smuggled = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n";
        let long = format!("X: {}\r\n", "x".repeat(20_000));
        for (request, status) in [
            ("GET /healthz HTTP/1.1\r\n\r\n".into(), "400"),
            ("GET /healthz HTTP/1.0\r\n\r\n".into(), "400"),
            (
                "GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n".into(),
                "400",
            ),
            (
                "GET http://evil.example/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n".into(),
                "400",
            ),
            (
                post(
                    &format!(
                        "Content-Length: {}\r\nTransfer-Encoding: chunked\r\n",
                        smuggled.len() + 5
                    ),
                    &format!("0\r\n\r\n{smuggled}"),
                ),
                "411",
            ),
            (post("Transfer-Encoding: chunked\r\n", "0\r\n\r\n"), "411"),
            (
                post("Transfer-Encoding: chunked, identity\r\n", smuggled),
                "400",
            ),
            (
                post("Content-Length: 5\r\nContent-Length: 6\r\n", smuggled),
                "400",
            ),
            (post("Content-Length: +5\r\n", smuggled), "400"),
            (
                format!("GET /healthz HTTP/1.1\r\nHost: localhost\r\n{long}\r\n"),
                "431",
            ),
        ] {
            let answer = raw(&url, &request).await;
            let head = request.lines().take(2).collect::<Vec<_>>();
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status}"))
                    || answer.starts_with(&format!("HTTP/1.0 {status}")),
                "{head:?}: {answer}"
            );
            assert_eq!(answer.matches("HTTP/1.").count(), 1, "{head:?}: {answer}");
        }
    })
    .await;
}

#[tokio::test]
async fn large_body_is_rejected() {
    run_live_test(async |t| {
        let (_, url) = t.start_listening(console_token());
        let token = "x".repeat(100_000);
        let status = log_in(&url, &token).await.status();
        assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    })
    .await;
}

#[tokio::test]
async fn idle_connections_starve_no_client() {
    run_live_test(async |t| {
        let (_, url) = t.start_listening(console_token());
        let mut silent = Vec::new();
        for kind in 0..200 {
            let mut stream = connect(&url).await;
            let begun = match kind % 3 {
                0 => "",
                1 => "GET /healthz HTTP/1.1\r\nHost: loc",
                // The request was answered long ago, and the connection is still open.
                _ => "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
            };
            stream.write_all(begun.as_bytes()).await.expect("written");
            silent.push(stream);
            if kind % 20 == 19 {
                let probe = sent(client().get(format!("{url}/healthz")));
                let answer = timeout(Duration::from_secs(10), probe).await;
                assert_eq!(answer.expect("at once").status(), StatusCode::OK);
            }
        }
    })
    .await;
}

#[tokio::test]
async fn unfinished_requests_starve_no_client() {
    run_live_test(async |t| {
        let (_, url) = t.start_listening(console_token());
        let head = "POST /api/login HTTP/1.1\r\nHost: localhost\r\nX-Bigchat-Sync: 1\r\n\
        Content-Type: application/json\r\nContent-Length: 1000\r\nExpect: 100-continue\r\n\r\n";
        let mut slow = Vec::new();
        for _ in 0..64 {
            let mut stream = connect(&url).await;
            stream.write_all(head.as_bytes()).await.expect("written");
            let mut interim = [0; 12];
            // From then on, the server waits for the body.
            stream.read_exact(&mut interim).await.expect("an answer");
            assert_eq!(&interim, b"HTTP/1.1 100");
            stream.write_all(b"{").await.expect("written");
            slow.push(stream);
        }
        let probe = sent(client().get(format!("{url}/healthz")));
        let answer = timeout(Duration::from_secs(5), probe).await;
        assert_eq!(answer.expect("before they end").status(), StatusCode::OK);
    })
    .await;
}

/// A daemon stops and closes the database even if clients are connected.
#[tokio::test]
async fn stop_with_clients_connected() {
    run_live_test(async |t| {
        let (daemon, url) = t.start_listening(Tokens::default());
        let client = client();
        until("it is ready", async || {
            let answer = sent(client.get(format!("{url}/readyz"))).await;
            answer.status() == StatusCode::OK
        })
        .await;
        let metrics = sent(client.get(format!("{url}/metrics"))).await;
        assert_eq!(metrics.status(), StatusCode::OK);
        let _idle = connect(&url).await;
        daemon.stop().await;
        let store = bigchat_sync::journal::Store::open(&t.db());
        store.expect("the database is closed");
        let refused = client.get(format!("{url}/healthz")).send().await;
        refused.expect_err("nothing listens");
    })
    .await;
}

/// Events are delivered without the console, and the log names the setting.
#[tokio::test]
async fn console_port_is_taken() {
    run_live_test(async |t| {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = taken.local_addr().expect("its address").to_string();
        t.set("--listen", &address);
        let at = t.now() - 1;
        t.bigchat.open(2, at, 1);
        t.bigchat.reports_event(message(2, at, "Hello"));
        let daemon = Process::start(t);
        t.until_events("delivered", 1).await;
        daemon
            .until_logged_times("set another address with --listen", 1)
            .await;
        assert_eq!(daemon.lines_with(&address), 1, "{}", daemon.log());
        assert!(daemon.stop().await.success());
    })
    .await;
}

#[tokio::test]
async fn public_address_needs_strong_token() {
    run_live_test(async |t| {
        t.set("--listen", "0.0.0.0:0");
        for (token, says) in [
            (None, "needs a token for the console"),
            (Some("secret"), "fewer than 16 characters"),
        ] {
            let mut daemon = t.program("run");
            daemon.env_remove("BIGCHAT_SYNC_CONSOLE_TOKEN");
            if let Some(token) = token {
                daemon.env("BIGCHAT_SYNC_CONSOLE_TOKEN", token);
            }
            let daemon = Process::start_as(t, daemon);
            daemon.until_logged_times(says, 1).await;
            assert_eq!(daemon.ended().await.code(), Some(2));
        }
        let mut daemon = t.program("run");
        daemon.env("BIGCHAT_SYNC_CONSOLE_TOKEN", TOKEN);
        let daemon = Process::start_as(t, daemon);
        daemon.until_logged_times("console at", 1).await;
        assert!(!daemon.log().contains(TOKEN));
        assert!(daemon.stop().await.success());
    })
    .await;
}

/// An API that was down when the last session ended is not reported as down by the next one.
#[tokio::test]
async fn outage_of_the_last_session() {
    run_live_test(async |t| {
        let (daemon, url) = t.start_listening(Tokens::default());
        let is_ready = async |url: &str| succeeds(&format!("{url}/readyz")).await;
        until("it is ready", async || is_ready(&url).await).await;
        t.bigchat.reports_event(message(2, t.now(), "Hello"));
        until("it is delivered", async || t.events("delivered") == 1).await;
        daemon.stop().await;

        t.our_api.outage(Some(dropped()));
        let verify = Process::start_as(t, t.program("verify"));
        until("it is down", async || t.is_up(Api::OurApi) == Some(false)).await;
        verify.stop().await;
        t.our_api.outage(None);

        let (_, url) = t.start_listening(Tokens::default());
        until("it is ready again", async || is_ready(&url).await).await;
    })
    .await;
}

/// Busy clients share the console with others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipelining_clients_starve_no_client() {
    run_live_test(async |t| {
        let (_, url) = t.start_listening(Tokens::default());
        let answered = Arc::new(AtomicUsize::new(0));
        let mut busy = JoinSet::new();
        for _ in 0..64 {
            let (url, answered) = (url.clone(), Arc::clone(&answered));
            busy.spawn(async move {
                let requests = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(20);
                loop {
                    let mut stream = connect(&url).await;
                    let mut answers = vec![0; 64 << 10];
                    while stream.write_all(requests.as_bytes()).await.is_ok()
                        && stream.read(&mut answers).await.is_ok_and(|read| read > 0)
                    {
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        until("they are answered", async || {
            answered.load(Ordering::Relaxed) > 64
        })
        .await;
        for _ in 0..10 {
            let probe = client().get(format!("{url}/healthz")).send();
            let answer = timeout(Duration::from_secs(5), probe).await;
            let answer = answer.expect("in time").expect("an answer");
            assert_eq!(answer.status(), StatusCode::OK);
        }
        busy.shutdown().await;
    })
    .await;
}
