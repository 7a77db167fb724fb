//! A request and its response as stored with a failed event and logged: bounded, and without credentials.

use std::fmt;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::error::Category;

use super::Target;
use super::api::Api;
use super::transport::Response;
use crate::telemetry::log;

/// How much of a request or a response goes into records and logs.
const MAX_RECORD: usize = 2_000;

/// How much of what a response says is wrong, in characters: failed events are grouped by it.
const MAX_COMPLAINT: usize = 200;

/// A request and what came of it, as it is recorded: bounded, and never with a token.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exchange {
    /// Method, path, query and body.
    pub request: String,
    /// Status and body, or why there is no answer.
    pub response: String,
    /// What the response says is wrong with the request, if it says so: short, and on one line.
    pub detail: Option<String>,
    /// The request changes nothing.
    pub is_read: bool,
    /// What is wrong with the response, where its status does not say.
    pub cause: Option<Cause>,
}

/// What is wrong with a response. None of it holds customers' text or credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// It redirects there, or to nowhere.
    Redirect(Option<String>),
    /// A 403 with a page of HTML, which no API sends.
    Firewall,
    /// A success that is not the expected JSON, and what is wrong with it.
    InvalidJson(String),
}

impl Cause {
    /// What a response shows by itself.
    pub(super) fn of(response: &Response) -> Option<Self> {
        let is_html = || response.body.trim_ascii_start().starts_with(b"<");
        match response.status.as_u16() {
            300..=399 => Some(Self::Redirect(response.location.clone())),
            403 if is_html() => Some(Self::Firewall),
            _ => None,
        }
    }

    /// In words, with the setting to correct.
    pub(super) fn with(&self, api: Api) -> String {
        let url = api.url_setting();
        match self {
            Self::Redirect(Some(location)) => {
                format!("{api} redirects to {location}; check {url}")
            }
            Self::Redirect(None) => format!("{api} redirects to nowhere; check {url}"),
            Self::Firewall => format!(
                "a firewall or proxy in front of {api} refuses the request; check it and {url}"
            ),
            Self::InvalidJson(why) => format!("{api} gave no usable answer: {why}"),
        }
    }
}

/// Where a redirect leads, as far as it is no secret: neither user and password, nor query.
pub(super) fn location(value: &str) -> String {
    let end = value.find(['?', '#']).unwrap_or(value.len());
    let value = &value[..end];
    let (scheme, rest) = match value.split_once("//") {
        Some((scheme, rest)) => (format!("{scheme}//"), rest),
        None => (String::new(), value),
    };
    let host_end = rest.find('/').unwrap_or(rest.len());
    let host = rest[..host_end].rsplit('@').next().unwrap_or_default();
    let text = format!("{scheme}{host}{}", &rest[host_end..]);
    text.chars().take(MAX_COMPLAINT).collect()
}

/// Reads a body as JSON, or says what is wrong with it, without what it holds.
pub fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|error| unreadable(body, &error))
}

/// What is wrong with a body that is not the expected JSON, without what it holds.
pub fn unreadable(body: &[u8], error: &serde_json::Error) -> String {
    let start = body.trim_ascii_start();
    if start.is_empty() {
        return "its body is empty".to_owned();
    }
    if start.starts_with(b"<") {
        return "it is a page of HTML, not JSON".to_owned();
    }
    let text = error.to_string();
    match error.classify() {
        // The message quotes what is there instead.
        Category::Data if !text.starts_with("missing field") => {
            let expected = text.rfind("expected ").map_or("", |at| &text[at..]);
            format!("its JSON is another: {expected}")
        }
        Category::Data => format!("its JSON is another: {text}"),
        _ => format!("it is no JSON: {text}"),
    }
}

impl Exchange {
    /// The response was a 5xx.
    pub fn is_server_error(&self) -> bool {
        self.response.starts_with('5')
    }

    /// The record of a request that got this response, or none for this reason.
    pub(super) fn new(
        target: &Target,
        body: Option<&impl serde::Serialize>,
        response: Result<&Response, &str>,
    ) -> Self {
        let (method, path) = (target.route.method(), target.path());
        let body = body
            .and_then(|body| serde_json::to_string(body).ok())
            .unwrap_or_default();
        let detail = response
            .ok()
            .filter(|answer| answer.status.is_client_error())
            .and_then(|answer| detail(&answer.body));
        let response = match response {
            Ok(answer) => format!(
                "{} {}",
                answer.status.as_u16(),
                String::from_utf8_lossy(head(&answer.body))
            ),
            Err(why) => why.to_owned(),
        };
        Self {
            is_read: method.is_safe(),
            cause: None,
            request: shortened(&format!("{method} {path} {body}")),
            response: shortened(&response),
            detail,
        }
    }
}

/// A request as [`Exchange`] has it, without query and body: these hold messages, names and addresses.
pub fn request_head(request: &str) -> &str {
    let path = request.find(' ').map_or(0, |space| space + 1);
    let end = request[path..].find([' ', '?']);
    end.map_or(request, |end| &request[..path + end])
}

/// A response as [`Exchange`] has it, without its body, which may repeat what was sent: the status, or why there is none.
pub fn response_head(response: &str) -> &str {
    if response.starts_with(|c: char| c.is_ascii_digit()) {
        response.split(' ').next().unwrap_or_default()
    } else {
        response
    }
}

/// What is wrong, by the body of a 4xx: `{"detail": "…"}`, or a list of what is wrong with which field, as both services
/// answer.
fn detail(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Wire {
        detail: Detail,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Detail {
        All(String),
        Each(Vec<Wrong>),
    }
    #[derive(Deserialize)]
    struct Wrong {
        #[serde(default)]
        loc: Vec<serde_json::Value>,
        msg: String,
    }
    let text = match serde_json::from_slice::<Wire>(body).ok()?.detail {
        Detail::All(text) => text,
        Detail::Each(all) => {
            let all = all.iter().map(|wrong| {
                match wrong.loc.last().and_then(serde_json::Value::as_str) {
                    Some(field) => format!("{field}: {}", wrong.msg),
                    None => wrong.msg.clone(),
                }
            });
            all.collect::<Vec<_>>().join("; ")
        }
    };
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    (!line.is_empty()).then(|| line.chars().take(MAX_COMPLAINT).collect())
}

impl Exchange {
    /// What the log and the figures show of it, unless message text may be logged.
    pub fn logged(&self) -> Self {
        Self {
            request: log::shown(&self.request, request_head).to_owned(),
            response: log::shown(&self.response, response_head).to_owned(),
            detail: None,
            is_read: self.is_read,
            cause: self.cause.clone(),
        }
    }
}

impl fmt::Display for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            request, response, ..
        } = self.logged();
        write!(f, "{request} -> {response}")
    }
}

fn head(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.len().min(MAX_RECORD)]
}

/// `text`, without its end where it is long.
pub fn shortened(text: &str) -> String {
    let text = text.trim();
    match text.char_indices().nth(MAX_RECORD) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_answer_says_is_wrong_is_put_in_short() {
        let of = |body: &str| detail(body.as_bytes());
        let each = r#"{"detail":[{"loc":["body","text"],"msg":"too\n short","input":"k"},{"loc":["body",0],"msg":"no"}]}"#;
        assert_eq!(of(each).as_deref(), Some("text: too short; no"));
        assert_eq!(of(r#"{"detail":" gone "}"#).as_deref(), Some("gone"));
        let long = format!(r#"{{"detail":"{}"}}"#, "ä".repeat(1000));
        assert_eq!(
            of(&long).map(|text| text.chars().count()),
            Some(MAX_COMPLAINT)
        );
        for nothing in ["", "{}", "<html>", r#"{"detail":""}"#, r#"{"detail":7}"#] {
            assert_eq!(of(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn heads_hold_nothing_of_bodies_and_queries() {
        for (request, head) in [
            (
                "POST /chats/c1/messages {\"text\":\"secret\"}",
                "POST /chats/c1/messages",
            ),
            ("GET /agents?email=ann%40x.test", "GET /agents"),
            ("GET /agents?name=a b", "GET /agents"),
            ("PATCH /chats/c1 {\"a\":\"x?y\"}", "PATCH /chats/c1"),
            ("GET /chats", "GET /chats"),
            ("", ""),
        ] {
            assert_eq!(request_head(request), head);
        }
        for (response, head) in [
            ("422 {\"input\":\"secret\"}", "422"),
            ("200 secret", "200"),
            ("503", "503"),
            ("no connection: refused", "no connection: refused"),
            ("", ""),
        ] {
            assert_eq!(response_head(response), head);
        }
    }
}
