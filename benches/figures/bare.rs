//! The bare client: the same requests with the same client settings, and nothing else. Like the daemon, it runs as a
//! separate process.

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

/// Sends the requests again, `in_flight` at a time. Returns how long that took, and the CPU time.
pub(crate) fn replay(server: &Server, made: &[Request], in_flight: u16) -> (Duration, Duration) {
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
            .arg(in_flight.to_string())
            .arg(&list),
    );
    // The client exits when its list is deleted, so its CPU time can be read before that.
    process::until("all requests", Duration::from_secs(600), || {
        server.count() == made.len() as u64
    });
    std::thread::sleep(Duration::from_millis(100));
    let cpu_time = bare.cpu_time();
    std::fs::remove_file(&list).expect("the file");
    bare.succeeds();
    (server.took(), cpu_time)
}

pub(crate) fn main(arguments: &[String]) {
    let [url, in_flight, list] = arguments else {
        panic!("{MODE} URL IN_FLIGHT LIST");
    };
    let in_flight: usize = in_flight.parse().expect("a number");
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
        let workers = (0..in_flight).map(|_| {
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
                    // If several are in flight, a request may overtake the creation of its chat and get 404.
                    assert!(!answer.status().is_server_error());
                    answer.bytes().await.expect("a body");
                }
            })
        });
        for worker in workers.collect::<Vec<_>>() {
            worker.await.expect("no panic");
        }
    });
    process::until("the list is deleted", Duration::from_secs(60), || {
        !file.exists()
    });
}

/// A client with the daemon's settings.
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
