//! A BigChat with nothing to tell and an OurAPI that takes everything, on one port and as fast as can be: what they cost is
//! what nobody can save.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// A request, as it can be made again.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    pub(crate) method: Method,
    pub(crate) target: String,
    pub(crate) body: String,
}

impl Made {
    pub(crate) fn is_to_our_api(&self) -> bool {
        is_to_our_api(&self.target)
    }
}

fn is_to_our_api(target: &str) -> bool {
    target.starts_with("/chats") || target.starts_with("/agents")
}

#[derive(Debug, Default)]
struct Seen {
    /// Kept only while somebody wants them.
    made: Option<Vec<Made>>,
    first: Option<Instant>,
    last: Option<Instant>,
    /// The first to OurAPI.
    sent: Option<Instant>,
    /// When BigChat was polled last.
    polled: Option<Instant>,
    /// What it tells then.
    news: Option<String>,
}

/// What all requests share.
#[derive(Clone, Debug, Default)]
struct Shared {
    seen: Arc<Mutex<Seen>>,
    count: Arc<AtomicU64>,
    latency: Duration,
}

/// The server, until it is dropped.
pub(crate) struct Server {
    _runtime: Runtime,
    address: SocketAddr,
    shared: Shared,
}

impl Server {
    /// Starts it; each request takes at least `latency`.
    pub(crate) fn start(latency: Duration) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let shared = Shared {
            latency,
            ..Shared::default()
        };
        let router = Router::new().fallback(answer).with_state(shared.clone());
        let listener = runtime
            .block_on(TcpListener::bind("127.0.0.1:0"))
            .expect("a port");
        let address = listener.local_addr().expect("an address");
        runtime.spawn(async move {
            use axum::serve::ListenerExt;
            let listener = listener.tap_io(|stream| stream.set_nodelay(true).expect("nodelay"));
            axum::serve(listener, router).await.expect("it serves");
        });
        Self {
            _runtime: runtime,
            address,
            shared,
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Begins anew to count, and to keep requests if they are wanted.
    pub(crate) fn reset(&self, keep: bool) {
        *self.shared.seen.lock().expect("no panic") = Seen {
            made: keep.then(Vec::new),
            ..Seen::default()
        };
        self.shared.count.store(0, Ordering::SeqCst);
    }

    /// How many requests there were, those to /events aside.
    pub(crate) fn count(&self) -> u64 {
        self.shared.count.load(Ordering::SeqCst)
    }

    /// How long it was from the first request to the last.
    pub(crate) fn took(&self) -> Duration {
        let seen = self.shared.seen.lock().expect("no panic");
        seen.last.expect("requests") - seen.first.expect("requests")
    }

    /// When the first request to OurAPI came.
    pub(crate) fn sent(&self) -> Option<Instant> {
        self.shared.seen.lock().expect("no panic").sent
    }

    /// When BigChat was polled last.
    pub(crate) fn polled(&self) -> Option<Instant> {
        self.shared.seen.lock().expect("no panic").polled
    }

    /// Has BigChat tell this event when it is polled next.
    pub(crate) fn tell(&self, event: &str) {
        let page = format!(r#"{{"events":[{event}],"nextPageUrl":null}}"#);
        self.shared.seen.lock().expect("no panic").news = Some(page);
    }

    /// The requests that were made, in order.
    pub(crate) fn made(&self) -> Vec<Made> {
        let mut seen = self.shared.seen.lock().expect("no panic");
        seen.made.take().unwrap_or_default()
    }
}

async fn answer(State(shared): State<Shared>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path();
    if path == "/events" {
        let mut seen = shared.seen.lock().expect("no panic");
        let news = seen.news.take();
        // A poll with nothing to tell is not one whose page is waited for.
        if news.is_some() || seen.polled.is_none() {
            seen.polled = Some(Instant::now());
        }
        let page = news
            .as_deref()
            .unwrap_or(r#"{"events":[],"nextPageUrl":null}"#);
        return json(StatusCode::OK, page);
    }
    let now = Instant::now();
    let body = to_bytes(body, 1 << 20).await.expect("a body");
    let number = shared.count.fetch_add(1, Ordering::SeqCst) + 1;
    {
        let mut seen = shared.seen.lock().expect("no panic");
        seen.first.get_or_insert(now);
        if is_to_our_api(path) {
            seen.sent.get_or_insert(now);
        }
        seen.last = Some(now);
        if let Some(made) = &mut seen.made {
            made.push(Made {
                method: parts.method.clone(),
                target: parts.uri.to_string(),
                body: String::from_utf8_lossy(&body).into_owned(),
            });
        }
    }
    if !shared.latency.is_zero() {
        tokio::time::sleep(shared.latency).await;
    }
    reply(&parts.method, path, &body, number)
}

fn reply(method: &Method, path: &str, body: &Bytes, number: u64) -> Response {
    let id = format!("00000000-0000-0000-0000-{number:012x}");
    match (method.as_str(), path) {
        ("POST", "/chats" | "/agents") => {
            // What was sent, with an id.
            let sent = std::str::from_utf8(body).expect("JSON");
            let sent = sent.strip_prefix('{').expect("an object");
            let text = format!(r#"{{"chat_id":"{id}","agent_id":"{id}",{sent}"#);
            let text = match path {
                "/chats" if sent.contains("agent_id") => {
                    text.replacen(&format!(r#""agent_id":"{id}","#), "", 1)
                }
                _ => text,
            };
            json(StatusCode::CREATED, &text)
        }
        ("POST", _) => json(StatusCode::OK, "{}"),
        ("PATCH", _) => StatusCode::NO_CONTENT.into_response(),
        (_, "/chats" | "/agents") => json(StatusCode::OK, "[]"),
        (_, path) if path.starts_with("/conversations/") => {
            let id = path.trim_start_matches("/conversations/");
            let start = format!(
                r#"{{"conversation_id":{id},"advisor_id":7,"events":[{{"conversation_id":{id},"event_name":"START","event_at":1795384800,"data":null}}]}}"#
            );
            json(StatusCode::OK, &start)
        }
        (_, path) if path.starts_with("/advisors/") => json(
            StatusCode::OK,
            r#"{"name":"Ada Lovelace","email_address":"ada@example.com"}"#,
        ),
        _ => json(StatusCode::OK, "[]"),
    }
}

fn json(status: StatusCode, body: &str) -> Response {
    let kind = [(header::CONTENT_TYPE, "application/json")];
    (status, kind, Body::from(body.to_owned())).into_response()
}
