//! The bare client: the same requests with the same client settings, and nothing else. It runs as a process of its own, as the
//! daemon does.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use reqwest::{Client, Method, redirect};

use crate::process::{self, Process};
use bigchat_sync::simulator::Request;

use crate::server::Server;

/// The argument that makes this program the bare client.
pub(crate) const MODE: &str = "bare-client";

/// Makes the requests again, so many at once, and tells how long that took, and how long on a processor.
pub(crate) fn replay(server: &Server, made: &[Request], at_once: u16) -> (Duration, Duration) {
    let directory = tempfile::tempdir().expect("a directory");
    let list = directory.path().join("requests");
    let lines: Vec<String> = made
        .iter()
        .map(|made| {
            let body = String::from_utf8_lossy(&made.body);
            format!("{} {} {body}", made.method, made.target())
        })
        .collect();
    std::fs::write(&list, lines.join("\n")).expect("a file");
    server.restart(false);
    let mut bare = Process::start(
        process::itself()
            .arg(MODE)
            .arg(server.url())
            .arg(at_once.to_string())
            .arg(&list),
    );
    // It stays until it is told that its time was taken.
    process::until("all requests", Duration::from_secs(600), || {
        server.count() == made.len() as u64
    });
    std::thread::sleep(Duration::from_millis(100));
    let on_processor = bare.on_processor();
    std::fs::remove_file(&list).expect("the file");
    bare.succeeds();
    (server.took(), on_processor)
}

pub(crate) fn main(arguments: &[String]) {
    let [url, at_once, list] = arguments else {
        panic!("{MODE} URL AT_ONCE LIST");
    };
    let at_once: usize = at_once.parse().expect("a number");
    let file = Path::new(list);
    let list = std::fs::read_to_string(file).expect("a list");
    let requests: Vec<(Method, String, String)> = list
        .lines()
        .map(|line| {
            let mut parts = line.splitn(3, ' ');
            let mut part = || parts.next().expect("three parts");
            let method = part().parse().expect("a method");
            (method, format!("{url}{}", part()), part().to_owned())
        })
        .collect();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let (requests, next) = (Arc::new(requests), Arc::new(AtomicUsize::new(0)));
        let client = client();
        let workers = (0..at_once).map(|_| {
            let (requests, next, client) =
                (Arc::clone(&requests), Arc::clone(&next), client.clone());
            tokio::spawn(async move {
                while let Some((method, url, body)) =
                    requests.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    let mut request = client.request(method.clone(), url);
                    if !body.is_empty() {
                        request = request
                            .header("content-type", "application/json")
                            .body(body.clone());
                    }
                    let answer = request.send().await.expect("an answer");
                    // With several in flight one may overtake the creation of its chat.
                    assert!(!answer.status().is_server_error());
                    answer.bytes().await.expect("a body");
                }
            })
        });
        for worker in workers.collect::<Vec<_>>() {
            worker.await.expect("no panic");
        }
    });
    process::until("its time was taken", Duration::from_secs(60), || {
        !file.exists()
    });
}

/// As the daemon's is.
fn client() -> Client {
    Client::builder()
        .user_agent("bigchat-sync-bench")
        .timeout(Duration::from_secs(10))
        .connect_timeout(Duration::from_secs(10))
        .pool_idle_timeout(Duration::from_secs(4))
        .redirect(redirect::Policy::none())
        .retry(reqwest::retry::never())
        .no_proxy()
        .tcp_nodelay(true)
        .build()
        .expect("a client")
}
