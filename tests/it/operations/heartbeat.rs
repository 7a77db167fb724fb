//! The heartbeats that a dead man's switch receives. Its responses have no effect.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use bigchat_sync::simulator::event::message;
use bigchat_sync::simulator::fault::paused;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::harness::journal::dead_letter;
use crate::harness::process::Process;
use crate::harness::{Bench, run_live_test, until};

/// A service that receives heartbeats, as healthchecks.io does.
struct Switch {
    url: String,
    received: Arc<Mutex<Vec<String>>>,
}

impl Switch {
    /// Starts a switch that answers with these heads in turn, and then with 200.
    async fn start(heads: &[&str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/s3cret", listener.local_addr().expect("a port"));
        let received = Arc::<Mutex<Vec<String>>>::default();
        let mut heads: VecDeque<String> = heads.iter().map(ToString::to_string).collect();
        let log = Arc::clone(&received);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let request = read_request(&mut stream).await;
                log.lock().expect("no panic").push(request);
                let head = heads.pop_front().unwrap_or_else(|| "200 OK".into());
                let answer =
                    format!("HTTP/1.1 {head}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                // The client may have gone.
                stream.write_all(answer.as_bytes()).await.ok();
            }
        });
        Self { url, received }
    }

    fn received(&self) -> Vec<String> {
        self.received.lock().expect("no panic").clone()
    }

    /// Waits for the first request, and returns it.
    async fn first(&self) -> String {
        until("a heartbeat", async || !self.received().is_empty()).await;
        self.received().remove(0)
    }
}

/// Reads a complete request.
async fn read_request(stream: &mut tokio::net::TcpStream) -> String {
    let mut request = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&request).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(": ")?;
                name.eq_ignore_ascii_case("content-length")
                    .then(|| value.parse::<usize>().ok())?
            });
            if body.len() >= length.unwrap_or(0) {
                return text;
            }
        }
        let mut piece = [0; 4096];
        match stream.read(&mut piece).await {
            Ok(read @ 1..) => request.extend_from_slice(&piece[..read]),
            _ => return String::from_utf8_lossy(&request).into_owned(),
        }
    }
}

/// A daemon in a separate process, with the URL in its environment.
fn start(t: &Bench, url: &str) -> Process {
    let mut program = t.program("run");
    program.env("BIGCHAT_SYNC_HEARTBEAT_URL", url);
    Process::start_as(t, program)
}

#[tokio::test]
async fn healthy_daemon_sends_one_heartbeat() {
    run_live_test(async |t| {
        let switch = Switch::start(&[]).await;
        let daemon = start(t, &switch.url);
        let request = switch.first().await;
        assert!(request.starts_with("GET /s3cret HTTP/1.1\r\n"), "{request}");
        t.bigchat.further_polls(3).await;
        assert_eq!(switch.received().len(), 1, "once a minute");
        assert!(daemon.stop().await.success());
        assert!(!t.logged().contains("s3cret"), "{}", t.logged());
    })
    .await;
}

#[tokio::test]
async fn problems_posted_without_message_text() {
    run_live_test(async |t| {
        t.fails(1);
        t.bigchat.open(10, t.now() - 100, 1);
        t.bigchat.reports([message(10, t.now() - 1, "delivered")]);
        t.once().await;
        let conversation = "(SELECT id FROM conversations WHERE bigchat_id = 10)";
        let data = r#"{"message":"my credit card"}"#;
        let reason = "OurAPI permanently rejects it: my credit card";
        t.execute(&dead_letter(7, conversation, "MESSAGE", data, reason, 1));
        let switch = Switch::start(&[]).await;
        let daemon = start(t, &format!("{}?rid=1", switch.url));
        let request = switch.first().await;
        assert!(
            request.starts_with("POST /s3cret/fail?rid=1 HTTP/1.1\r\n"),
            "{request}"
        );
        let (_, body) = request.split_once("\r\n\r\n").expect("a body");
        assert!(body.contains("1 failed event"), "{body}");
        assert!(!request.contains("credit card"), "{request}");
        assert!(daemon.stop().await.success());
    })
    .await;
}

/// A waiting event is a problem, unless deliveries are paused.
#[tokio::test]
async fn waiting_event_and_pause() {
    run_live_test(async |t| {
        t.differs("nothing is delivered");
        t.our_api.outage(Some(
            bigchat_sync::simulator::fault::status(503).body("my credit card"),
        ));
        t.bigchat.open(10, t.now() - 100, 1);
        t.bigchat.reports([message(10, t.now() - 1, "waits")]);
        t.once().await;
        t.execute(
            "UPDATE conversations SET waiting_since = waiting_since - 3600000;
            UPDATE attempts SET reason = 'OurAPI permanently rejects it: my credit card'",
        );
        let switch = Switch::start(&[]).await;
        let daemon = start(t, &switch.url);
        let request = switch.first().await;
        assert!(request.starts_with("POST /s3cret/fail "), "{request}");
        assert!(
            request.contains("MESSAGE of conversation 10 has waited"),
            "{request}"
        );
        assert!(!request.contains("credit card"), "{request}");
        assert!(daemon.stop().await.success());

        let paused = t.program("pause").output().expect("a process");
        assert!(paused.status.success());
        let switch = Switch::start(&[]).await;
        let daemon = start(t, &switch.url);
        let request = switch.first().await;
        assert!(request.starts_with("GET /s3cret "), "{request}");
        assert!(daemon.stop().await.success());
    })
    .await;
}

#[tokio::test]
async fn redirect_is_not_followed() {
    run_live_test(async |t| {
        let elsewhere = Switch::start(&[]).await;
        let moved = format!("302 Found\r\nlocation: {}", elsewhere.url);
        let switch = Switch::start(&[&moved]).await;
        let daemon = start(t, &switch.url);
        daemon
            .until_logged_times("a heartbeat was not received", 1)
            .await;
        assert_eq!(daemon.lines_with("302 Found"), 1);
        t.bigchat.open(10, t.now() - 100, 1);
        t.delivers([message(10, t.now() - 1, "all the same")]).await;
        assert_eq!(elsewhere.received().len(), 0);
        assert!(daemon.stop().await.success());
        assert!(!t.logged().contains("s3cret"));
    })
    .await;
}

#[tokio::test]
async fn unreachable_switch_is_only_a_warning() {
    run_live_test(async |t| {
        let daemon = start(t, "http://127.0.0.1:1/s3cret");
        daemon
            .until_logged_times("a heartbeat was not received", 1)
            .await;
        t.bigchat.open(10, t.now() - 100, 1);
        t.delivers([message(10, t.now() - 1, "all the same")]).await;
        assert!(t.status().1);
        assert!(daemon.stop().await.success());
        assert!(!t.logged().contains("s3cret"));
    })
    .await;
}

#[tokio::test]
async fn heartbeat_url_is_checked_at_start() {
    run_live_test(async |t| {
        let mut program = t.program("run");
        program.env("BIGCHAT_SYNC_HEARTBEAT_URL", "hc.example/s3cret");
        let refused = program.output().expect("a process");
        assert_eq!(refused.status.code(), Some(2));
        let text = crate::harness::process::printed(&refused);
        assert!(text.contains("BIGCHAT_SYNC_HEARTBEAT_URL"), "{text}");
        assert!(!text.contains("s3cret"), "{text}");
    })
    .await;
}

/// Only the daemon itself can report that the database refuses writes.
#[tokio::test]
async fn unwritable_journal_is_reported() {
    run_live_test(async |t| {
        let switch = Switch::start(&[]).await;
        t.bigchat.open(10, t.now() - 100, 1);
        t.bigchat.reports([message(10, t.now() - 1, "waits")]);
        t.bigchat.upset("GET /events", paused());
        let daemon = start(t, &switch.url);
        until("it polls", async || t.bigchat.pausing() == 1).await;
        let lock = t.lock_database();
        t.bigchat.resume();
        let request = switch.first().await;
        assert!(request.starts_with("POST /s3cret/fail "), "{request}");
        assert!(
            request.contains("the journal cannot be written"),
            "{request}"
        );
        drop(lock);
        t.until_events("delivered", 1).await;
        assert!(daemon.stop().await.success());
    })
    .await;
}
