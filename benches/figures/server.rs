//! A BigChat with nothing to tell and an OurAPI that takes everything, on one port and as fast as can be: what they cost is
//! what nobody can save. No more of HTTP is spoken than the clients of this benchmark do.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};

/// A request, as it can be made again.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) body: String,
}

fn is_to_our_api(target: &str) -> bool {
    target.starts_with("/chats") || target.starts_with("/agents")
}

#[derive(Debug, Default)]
struct Seen {
    /// Kept only while somebody wants them.
    made: Option<Vec<Made>>,
    first: Option<Instant>,
    /// The last to OurAPI: each poll asks BigChat something, when all is delivered too.
    last: Option<Instant>,
    /// The first to OurAPI.
    sent: Option<Instant>,
    /// When BigChat was polled last.
    polled: Option<Instant>,
    /// How often.
    polls: u64,
    /// What it tells next.
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
    _until: DropGuard,
    address: SocketAddr,
    shared: Shared,
}

impl Server {
    /// Starts it; each request takes at least `latency`.
    pub(crate) fn start(latency: Duration) -> Self {
        let shared = Shared {
            latency,
            ..Shared::default()
        };
        let stopping = CancellationToken::new();
        let (stopped, served) = (stopping.clone(), shared.clone());
        let (address, bound) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
                let bound = listener.local_addr().expect("an address");
                address.send(bound).expect("somebody waits");
                stopped.run_until_cancelled(accept(listener, served)).await;
            });
        });
        Self {
            _until: stopping.drop_guard(),
            address: bound.recv().expect("a port"),
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

    /// How long it was from the first request to the last to OurAPI.
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

    /// How often BigChat was polled.
    pub(crate) fn polls(&self) -> u64 {
        self.shared.seen.lock().expect("no panic").polls
    }

    /// Has BigChat tell these events when it is polled next.
    pub(crate) fn tell(&self, events: &str) {
        let page = format!(r#"{{"events":[{events}],"nextPageUrl":null}}"#);
        self.shared.seen.lock().expect("no panic").news = Some(page);
    }

    /// How many of the requests that were noted went to OurAPI.
    pub(crate) fn made_to_our_api(&self) -> usize {
        let made = self.made();
        made.iter()
            .filter(|made| is_to_our_api(&made.target))
            .count()
    }

    /// The requests that were made, in order.
    pub(crate) fn made(&self) -> Vec<Made> {
        let mut seen = self.shared.seen.lock().expect("no panic");
        seen.made.take().unwrap_or_default()
    }
}

async fn accept(listener: TcpListener, shared: Shared) {
    loop {
        let (stream, _) = listener.accept().await.expect("a connection");
        stream.set_nodelay(true).expect("no delay");
        tokio::spawn(serve(stream, shared.clone()));
    }
}

/// Answers one request after the other, until the client goes.
async fn serve(mut stream: TcpStream, shared: Shared) {
    let mut read = Vec::new();
    loop {
        let (head, length) = loop {
            if let Some(head) = find(&read, b"\r\n\r\n") {
                let head = head + 4;
                let length = content_length(&read[..head]);
                if read.len() >= head + length {
                    break (head, length);
                }
            }
            if !matches!(stream.read_buf(&mut read).await, Ok(1..)) {
                return;
            }
        };
        let text = std::str::from_utf8(&read[..head + length]).expect("text");
        let (line, body) = (text.lines().next().expect("a line"), &text[head..]);
        let mut parts = line.split(' ');
        let mut part = || parts.next().expect("method and target");
        let answer = shared.answer(part(), part(), body);
        read.drain(..head + length);
        if !shared.latency.is_zero() {
            tokio::time::sleep(shared.latency).await;
        }
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

fn content_length(head: &[u8]) -> usize {
    const NAME: &[u8] = b"\r\ncontent-length: ";
    let Some(at) = find(head, NAME) else { return 0 };
    let digits = head[at + NAME.len()..]
        .iter()
        .take_while(|byte| byte.is_ascii_digit());
    digits.fold(0, |length, digit| length * 10 + usize::from(digit - b'0'))
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|part| part == what)
}

impl Shared {
    fn answer(&self, method: &str, target: &str, body: &str) -> String {
        let path = target.split('?').next().unwrap_or_default();
        let now = Instant::now();
        let mut seen = self.seen.lock().expect("no panic");
        if path == "/events" {
            let news = seen.news.take();
            seen.polls += 1;
            // A poll with nothing to tell is not one whose page is waited for.
            if news.is_some() || seen.polled.is_none() {
                seen.polled = Some(now);
            }
            let page = news.as_deref();
            return written(
                "200 OK",
                page.unwrap_or(r#"{"events":[],"nextPageUrl":null}"#),
            );
        }
        let number = self.count.fetch_add(1, Ordering::SeqCst) + 1;
        seen.first.get_or_insert(now);
        if is_to_our_api(path) {
            seen.sent.get_or_insert(now);
            seen.last = Some(now);
        }
        if let Some(made) = &mut seen.made {
            made.push(Made {
                method: method.to_owned(),
                target: target.to_owned(),
                body: body.to_owned(),
            });
        }
        reply(method, path, body, number)
    }
}

fn reply(method: &str, path: &str, body: &str, number: u64) -> String {
    let id = format_args!("00000000-0000-0000-0000-{number:012x}");
    // What was sent, with an id.
    let sent = || body.strip_prefix('{').expect("an object");
    match (method, path) {
        ("POST", "/chats") => written("201 Created", &format!(r#"{{"chat_id":"{id}",{}"#, sent())),
        ("POST", "/agents") => {
            written("201 Created", &format!(r#"{{"agent_id":"{id}",{}"#, sent()))
        }
        ("POST", _) => written("200 OK", "{}"),
        ("PATCH", _) => "HTTP/1.1 204 No Content\r\n\r\n".to_owned(),
        (_, path) if path.starts_with("/conversations/") => {
            let id = path.trim_start_matches("/conversations/");
            let start = format!(
                r#"{{"conversation_id":{id},"advisor_id":7,"events":[{{"conversation_id":{id},"event_name":"START","event_at":1795384800,"data":null}}]}}"#
            );
            written("200 OK", &start)
        }
        (_, path) if path.starts_with("/advisors/") => written(
            "200 OK",
            r#"{"name":"Ada Lovelace","email_address":"ada@example.com"}"#,
        ),
        _ => written("200 OK", "[]"),
    }
}

fn written(status: &str, body: &str) -> String {
    let (length, date) = (body.len(), httpdate::fmt_http_date(SystemTime::now()));
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\ndate: {date}\r\n\r\n{body}"
    )
}
