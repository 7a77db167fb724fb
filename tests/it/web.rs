//! The daemon over HTTP: who is answered, and what the probes and metrics tell.

use bigchat_sync::settings::Tokens;
use bigchat_sync::sim::our_api;
use reqwest::header::{CONTENT_SECURITY_POLICY, HOST};
use reqwest::{Client, StatusCode};

use crate::daemon::scripted;
use crate::harness::until;

fn client() -> Client {
    Client::builder().no_proxy().build().expect("a client")
}

#[tokio::test]
async fn it_is_healthy_and_ready_once_both_apis_have_answered() {
    let (_sim, bench) = scripted(our_api::Options::default()).await;
    let (daemon, url) = bench.start_listening(Tokens::default());
    let client = client();
    let status = async |path: &str| {
        let answer = client.get(format!("{url}{path}")).send().await;
        answer.expect("an answer").status()
    };
    assert_eq!(status("/healthz").await, StatusCode::OK);
    until("it is ready", async || {
        status("/readyz").await == StatusCode::OK
    })
    .await;
    daemon.stop().await;
}

#[tokio::test]
async fn names_that_are_not_ours_are_not_answered() {
    let (_sim, bench) = scripted(our_api::Options::default()).await;
    let (daemon, url) = bench.start_listening(Tokens::default());
    for (host, expected) in [
        ("localhost:1", StatusCode::OK),
        ("evil.example", StatusCode::MISDIRECTED_REQUEST),
    ] {
        let asked = client().get(format!("{url}/healthz")).header(HOST, host);
        let answer = asked.send().await.expect("an answer");
        assert_eq!(answer.status(), expected, "{host}");
        assert!(answer.headers().contains_key(CONTENT_SECURITY_POLICY));
    }
    daemon.stop().await;
}
