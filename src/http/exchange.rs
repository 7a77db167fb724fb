//! A request and its response, as logged and stored with an event: bounded, and without credentials.

use reqwest::StatusCode;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::error::Category;

use super::Target;
use super::api::Api;
use super::transport::{MAX_BODY, Response};

/// Maximum length of a request or a response in characters.
const MAX_RECORD: usize = 2_000;

/// Maximum length of a detail in characters. Dead letters are grouped by their details.
const MAX_DETAIL: usize = 200;

#[derive(Debug, Clone, Default)]
pub struct Exchange {
    /// `None`: there was no request.
    pub target: Option<Target>,
    /// Method, path, query and body.
    pub request: String,
    /// `None`: there was no response.
    pub status: Option<StatusCode>,
    /// Status and body, or why there was no response.
    pub response: String,
    /// The reason for a 4xx, from its body, on one line.
    pub detail: Option<String>,
    /// The fault of the response, if its status does not show it.
    pub cause: Option<Cause>,
}

/// A fault of a response, without customers' text or credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// A redirect to this scheme and host; `None`: there was no location.
    Redirect(Option<String>),
    /// A 407, or a 403 with an HTML page, which neither API sends.
    Firewall,
    /// A success without the expected JSON, with the reason.
    InvalidJson(String),
    /// A page of events that is larger than the limit.
    PageTooLarge,
}

impl Cause {
    /// The fault that the response shows before its JSON is parsed.
    pub(super) fn of(response: &Response) -> Option<Self> {
        let is_html = || response.body.trim_ascii_start().starts_with(b"<");
        match response.status.as_u16() {
            300..=399 => Some(Self::Redirect(response.location.clone())),
            403 if is_html() => Some(Self::Firewall),
            407 => Some(Self::Firewall),
            _ => None,
        }
    }

    /// One line, with the setting to check.
    pub(super) fn summary(&self, api: Api) -> String {
        let url = api.url_setting();
        match self {
            Self::Redirect(Some(location)) => {
                format!("{api} redirects to {location}; check {url}")
            }
            Self::Redirect(None) => format!("{api} redirects without a location; check {url}"),
            Self::Firewall => format!(
                "a firewall or proxy in front of {api} refuses the request; check it and {url}"
            ),
            Self::InvalidJson(reason) => format!("{api} gave no usable answer: {reason}"),
            Self::PageTooLarge => format!(
                "a page of {api} is larger than {} MiB; set a shorter --max-window",
                MAX_BODY >> 20
            ),
        }
    }
}

/// Scheme and host of a redirect's location. The rest may contain secrets or a customer's data.
pub(super) fn location(value: &str) -> String {
    match value.split_once("//") {
        Some((scheme, rest)) if !scheme.contains(['/', '?', '#']) => {
            let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
            let host = rest[..end].rsplit('@').next().unwrap_or_default();
            let text = format!("{scheme}//{host}");
            text.chars().take(MAX_DETAIL).collect()
        }
        _ => "another path".to_owned(),
    }
}

/// Parses a body as JSON.
///
/// # Errors
///
/// The reason, without text of the body.
pub fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|error| unreadable(body, &error))
}

/// Why a body is not the expected JSON, without text of the body.
pub fn unreadable(body: &[u8], error: &serde_json::Error) -> String {
    let start = body.trim_ascii_start();
    if start.is_empty() {
        return "empty body".to_owned();
    }
    if start.starts_with(b"<") {
        return "HTML instead of JSON".to_owned();
    }
    let text = error.to_string();
    match error.classify() {
        // The rest of the message quotes the body.
        Category::Data if !text.starts_with("missing field") => {
            let expected = text.rfind("expected ").map(|at| &text[at..]);
            let reason = expected.unwrap_or("a field has an unexpected value");
            format!("unexpected JSON: {reason}")
        }
        Category::Data => format!("unexpected JSON: {text}"),
        _ => format!("invalid JSON: {text}"),
    }
}

impl Exchange {
    /// Records a request and its response, or the reason why there was none.
    pub(super) fn new(
        target: &Target,
        body: Option<&str>,
        response: Result<&Response, &str>,
        cause: Option<Cause>,
    ) -> Self {
        let (method, path) = (target.route.method(), target.path());
        let request = format!("{method} {path} {}", body.unwrap_or_default());
        let detail = response
            .ok()
            .filter(|response| response.status.is_client_error())
            .and_then(|response| detail(&response.body));
        let status = response.ok().map(|response| response.status);
        let response = match response {
            Ok(response) => format!(
                "{} {}",
                response.status.as_u16(),
                String::from_utf8_lossy(head(&response.body))
            ),
            Err(reason) => reason.to_owned(),
        };
        Self {
            target: Some(target.clone()),
            request: shortened(&request),
            status,
            response: shortened(&response),
            detail,
            cause,
        }
    }
}

/// The detail in the body of a 4xx, in the two forms that both services use: `{"detail": "…"}`, or a list with an entry
/// per field.
fn detail(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Wire {
        detail: Detail,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Detail {
        Text(String),
        Fields(Vec<FieldDetail>),
    }
    #[derive(Deserialize)]
    struct FieldDetail {
        #[serde(default)]
        loc: Vec<serde_json::Value>,
        msg: String,
    }
    let text = match serde_json::from_slice::<Wire>(body).ok()?.detail {
        Detail::Text(text) => text,
        Detail::Fields(details) => {
            let details = details.iter().map(|detail| {
                match detail.loc.last().and_then(serde_json::Value::as_str) {
                    Some(field) => format!("{field}: {}", detail.msg),
                    None => detail.msg.clone(),
                }
            });
            details.collect::<Vec<_>>().join("; ")
        }
    };
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    (!line.is_empty()).then(|| line.chars().take(MAX_DETAIL).collect())
}

fn head(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.len().min(MAX_RECORD)]
}

/// `text`, cut at the maximum length of a record.
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
    fn detail_of_a_4xx() {
        let of = |body: &str| detail(body.as_bytes());
        let each = r#"{"detail":[{"loc":["body","text"],"msg":"too\n short","input":"k"},{"loc":["body",0],"msg":"no"}]}"#;
        assert_eq!(of(each).as_deref(), Some("text: too short; no"));
        assert_eq!(of(r#"{"detail":" gone "}"#).as_deref(), Some("gone"));
        let long = format!(r#"{{"detail":"{}"}}"#, "ä".repeat(1000));
        assert_eq!(of(&long).map(|text| text.chars().count()), Some(MAX_DETAIL));
        for nothing in ["", "{}", "<html>", r#"{"detail":""}"#, r#"{"detail":7}"#] {
            assert_eq!(of(nothing), None, "{nothing}");
        }
    }

    /// A path may name a customer or contain a token.
    #[test]
    fn location_has_no_path() {
        for (value, shown) in [
            ("https://a:b@host:1/ann@x.test/t0ken?q#f", "https://host:1"),
            ("http://host", "http://host"),
            ("http://host?q=1", "http://host"),
            ("//host/path", "//host"),
            ("/login/t0ken", "another path"),
            ("login?to=//host/x", "another path"),
            ("", "another path"),
        ] {
            assert_eq!(location(value), shown, "{value}");
        }
    }
}
