//! HTTP clients of the daemon's console and metrics.

use bigchat_sync::settings::Tokens;
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use serde_json::Value;

use crate::harness::{Daemon, Test};

/// The console's token for full access.
pub(crate) const TOKEN: &str = "0123456789abcdef-console";

/// The console's token for read-only access.
pub(crate) const READ_TOKEN: &str = "0123456789abcdef-readers";

pub(crate) fn console_token() -> Tokens {
    Tokens {
        console: Some(TOKEN.into()).into(),
        ..Tokens::default()
    }
}

/// A new client, without open connections.
pub(crate) fn client() -> Client {
    Client::builder().no_proxy().build().expect("a client")
}

pub(crate) async fn sent(request: RequestBuilder) -> Response {
    request.send().await.expect("an answer")
}

/// Whether a GET of a URL succeeds.
pub(crate) async fn succeeds(url: &str) -> bool {
    let answer = client().get(url).send().await;
    answer.is_ok_and(|answer| answer.status().is_success())
}

/// A daemon, and a client of its console.
pub(crate) struct Console<'a> {
    pub(crate) t: &'a Test,
    pub(crate) daemon: Daemon,
    url: String,
    client: Client,
}

impl<'a> Console<'a> {
    pub(crate) fn new(t: &'a Test, tokens: Tokens) -> Self {
        let (daemon, url) = t.start_listening(tokens);
        Self {
            t,
            daemon,
            url,
            client: client(),
        }
    }

    /// The console of a journal that was filled by this SQL.
    pub(crate) async fn over(t: &'a Test, sql: &str) -> Self {
        t.fill(sql).await;
        Self::new(t, Tokens::default())
    }

    /// Its address and port.
    pub(crate) fn address(&self) -> &str {
        self.url.strip_prefix("http://").expect("its URL")
    }

    pub(crate) async fn get(&self, path: &str) -> (StatusCode, Value) {
        let answer = sent(self.client.get(format!("{}{path}", self.url))).await;
        let status = answer.status();
        (status, answer.json().await.unwrap_or_default())
    }

    /// Resolves failed events: `retry` or `discard`.
    pub(crate) async fn resolve(&self, resolution: &str, which: Value) -> (StatusCode, Value) {
        let url = format!("{}/api/failed/{resolution}", self.url);
        let request = self.client.post(url).header("x-bigchat-sync", "1");
        let answer = sent(request.json(&which)).await;
        let status = answer.status();
        (status, answer.json().await.unwrap_or_default())
    }
}
