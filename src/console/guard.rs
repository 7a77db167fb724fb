//! Access control, based on a request's head.
//!
//! - DNS rebinding: `Host` must not be a name that another site can point to this address. Addresses and `localhost`
//!   cannot be rebound; other names are those of `--console-host`.
//! - Cross-site requests: the browser's own headers (`Origin`, `Sec-Fetch-Site`) must name the console's page,
//!   including the port. A request that changes something needs a header and a content type that other pages cannot
//!   send without a preflight request, which is never granted.
//! - Requests that two servers may read differently (two hosts, a host in the target, a body without a length) are
//!   refused.
//! - Other users of this machine: without a token, they can read but not change anything.
//! - Responses cannot be framed, sniffed or stored, and only the console's own script runs.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::body::{HttpBody, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use thiserror::Error;
use tokio::task::spawn_blocking;
use tokio::time::error::Elapsed;
use tokio::time::timeout;

use super::connections::{Ends, Place};
use super::login::Access;
use super::{Web, error};
use crate::user;

/// The header that only the console's requests have: `1`, or the key returned by a login.
pub(crate) const KEY: HeaderName = HeaderName::from_static("x-bigchat-sync");

/// The path that ends a login session.
pub(super) const LOGOUT: &str = "/api/logout";

/// The time limit for a request's body, and then for its response.
const ANSWER: Duration = Duration::from_secs(10);

/// The maximum size of a body: ids of some thousand events.
const MAX_BODY: usize = 64 << 10;

/// The name of this program in its responses.
pub(crate) const SERVER: &str = "bigchat-sync";

/// Restrictions for browsers, and the name of this program, sent with every response.
const HEADERS: [(HeaderName, &str); 9] = [
    // `check` recognizes a daemon's console by this header.
    (header::SERVER, SERVER),
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CACHE_CONTROL, "no-store"),
    (
        HeaderName::from_static("cross-origin-opener-policy"),
        "same-origin",
    ),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        "same-origin",
    ),
    (
        HeaderName::from_static("permissions-policy"),
        "camera=(), geolocation=(), microphone=()",
    ),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(crate) enum Rejection {
    #[error("a request must have one Host header, and a target that begins with a slash")]
    Malformed,
    #[error(
        "the console does not know this host name; use its address, or add the name with --console-host"
    )]
    UnknownHost,
    #[error("requests from pages of other sites are refused")]
    CrossSite,
    #[error("a request that changes something must have the header X-Bigchat-Sync")]
    NotOurs,
    #[error("a body must have a Content-Length")]
    NoLength,
    #[error("a body must be application/json")]
    NotJson,
    #[error("a body must be at most {MAX_BODY} bytes long")]
    TooLarge,
    #[error("a token is needed; log in, or send it as `Authorization: Bearer …`")]
    Unidentified,
    #[error(
        "without a token, only root and the user of the daemon may change anything, not {}; set BIGCHAT_SYNC_CONSOLE_TOKEN_FILE, restart the daemon, and log in with the token",
        .0.map_or_else(|| "an unknown user".to_owned(), user::name)
    )]
    ReadOnly(Option<u32>),
    #[error(
        "this token gives read-only access; log in with the token from BIGCHAT_SYNC_CONSOLE_TOKEN or BIGCHAT_SYNC_CONSOLE_TOKEN_FILE"
    )]
    ReadToken,
    #[error("too many wrong tokens; wait {0} s")]
    TooManyTries(u64),
    #[error("the request was not answered in time")]
    TooSlow,
}

impl From<Elapsed> for Rejection {
    fn from(_: Elapsed) -> Self {
        Self::TooSlow
    }
}

impl IntoResponse for Rejection {
    fn into_response(self) -> Response {
        let status = match self {
            Self::Malformed => StatusCode::BAD_REQUEST,
            Self::UnknownHost => StatusCode::MISDIRECTED_REQUEST,
            Self::CrossSite | Self::NotOurs | Self::ReadOnly(_) | Self::ReadToken => {
                StatusCode::FORBIDDEN
            }
            Self::NoLength => StatusCode::LENGTH_REQUIRED,
            Self::NotJson => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Unidentified => StatusCode::UNAUTHORIZED,
            Self::TooManyTries(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::TooSlow => StatusCode::SERVICE_UNAVAILABLE,
        };
        let mut response = error(status, &self.to_string());
        let headers = response.headers_mut();
        match self {
            Self::Unidentified => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            Self::TooManyTries(seconds) => {
                headers.insert(header::RETRY_AFTER, seconds.into());
            }
            // The rest of the connection cannot be parsed reliably.
            Self::Malformed | Self::NoLength | Self::TooLarge => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        response
    }
}

/// Refuses requests that fail the checks, and adds the headers to responses.
pub(super) async fn csrf_guard(
    State(web): State<Arc<Web>>,
    Extension(place): Extension<Place>,
    request: Request,
    next: Next,
) -> Response {
    let answer = async {
        allow(
            &web.names,
            request.method(),
            request.uri(),
            request.headers(),
        )?;
        let request = timeout(ANSWER, buffer_body(request)).await??;
        let _open = place.hold_open();
        Ok::<_, Rejection>(timeout(ANSWER, next.run(request)).await?)
    };
    let mut response = answer.await.unwrap_or_else(IntoResponse::into_response);
    for (name, value) in HEADERS {
        response
            .headers_mut()
            .insert(name, HeaderValue::from_static(value));
    }
    response
}

/// The request with its complete body.
async fn buffer_body(request: Request) -> Result<Request, Rejection> {
    let (head, body) = request.into_parts();
    if body
        .size_hint()
        .upper()
        .is_none_or(|size| size > MAX_BODY as u64)
    {
        return Err(Rejection::TooLarge);
    }
    let body = to_bytes(body, MAX_BODY)
        .await
        .map_err(|_| Rejection::Malformed)?;
    Ok(Request::from_parts(head, body.into()))
}

/// The client of a request that changes something, for the record of resolutions.
#[derive(Debug, Clone)]
pub(super) struct Client(pub(super) String);

/// Refuses unknown clients. If a token is set, a client must have it. If none is set, every user of this machine may
/// read, but only the daemon's own user and root may change anything.
pub(super) async fn authenticate(
    State(web): State<Arc<Web>>,
    Extension(ends): Extension<Ends>,
    mut request: Request,
    next: Next,
) -> Response {
    let known = if web.login.is_needed() {
        let peer = ends.peer.ip();
        // A logout changes only the client's own login session.
        let changes = !reads(request.method()) && request.uri().path() != LOGOUT;
        match web.login.authenticate(peer, request.headers()) {
            Ok(Access::Read) if changes => Err(Rejection::ReadToken),
            known => known.map(|_| format!("token holder at {}", peer.to_canonical())),
        }
    } else if reads(request.method()) {
        Ok(String::new())
    } else {
        trusted(ends).await
    };
    match known {
        Ok(client) => {
            request.extensions_mut().insert(Client(client));
            next.run(request).await
        }
        Err(refusal) => refusal.into_response(),
    }
}

/// The name of the client process's user, if this user may do whatever the daemon may.
async fn trusted(ends: Ends) -> Result<String, Rejection> {
    let owner = move || user::of_peer(ends.peer, ends.local?);
    let uid = spawn_blocking(owner).await.ok().flatten();
    match uid {
        Some(uid) if user::is_trusted(uid) => Ok(user::name(uid)),
        uid => Err(Rejection::ReadOnly(uid)),
    }
}

/// Whether a request with this method only reads.
fn reads(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD)
}

fn allow(
    names: &[String],
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
) -> Result<(), Rejection> {
    if uri.authority().is_some() || !uri.path().starts_with('/') {
        return Err(Rejection::Malformed);
    }
    let host = single_header(headers, &header::HOST)?.ok_or(Rejection::Malformed)?;
    if !is_ours(host, names) {
        return Err(Rejection::UnknownHost);
    }
    let reads = reads(method);
    if let Some(origin) = single_header(headers, &header::ORIGIN)?
        && !is_of(origin, host)
    {
        return Err(Rejection::CrossSite);
    }
    match fetch(headers, "site")? {
        None | Some("same-origin" | "none") => {}
        // Another site may link to the console.
        Some(_)
            if reads
                && fetch(headers, "mode")? == Some("navigate")
                && fetch(headers, "dest")? == Some("document") => {}
        Some(_) => return Err(Rejection::CrossSite),
    }
    if headers.contains_key(header::TRANSFER_ENCODING) {
        return Err(Rejection::NoLength);
    }
    if reads {
        return Ok(());
    }
    if !headers.contains_key(KEY) {
        return Err(Rejection::NotOurs);
    }
    let kind =
        single_header(headers, &header::CONTENT_TYPE)?.and_then(|kind| kind.split(';').next());
    match kind {
        Some(kind) if kind.trim().eq_ignore_ascii_case("application/json") => Ok(()),
        _ => Err(Rejection::NotJson),
    }
}

/// The value of a header that must not be repeated.
fn single_header<'a>(
    headers: &'a HeaderMap,
    name: &HeaderName,
) -> Result<Option<&'a str>, Rejection> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => value.to_str().map(Some).map_err(|_| Rejection::Malformed),
        (Some(_), Some(_)) => Err(Rejection::Malformed),
    }
}

/// The value of a `Sec-Fetch` header.
fn fetch<'a>(headers: &'a HeaderMap, what: &str) -> Result<Option<&'a str>, Rejection> {
    let name = match what {
        "site" => HeaderName::from_static("sec-fetch-site"),
        "mode" => HeaderName::from_static("sec-fetch-mode"),
        _ => HeaderName::from_static("sec-fetch-dest"),
    };
    single_header(headers, &name)
}

/// Whether a `Host` is a name that other sites cannot point to this machine.
fn is_ours(host: &str, names: &[String]) -> bool {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, port)) if address.parse::<Ipv6Addr>().is_ok() => (None, port),
            _ => return false,
        },
        None => match host.find(':') {
            Some(colon) => (Some(&host[..colon]), &host[colon..]),
            None => (Some(host), ""),
        },
    };
    let port_is_one = match port.strip_prefix(':') {
        Some(port) => port.parse::<u16>().is_ok(),
        None => port.is_empty(),
    };
    port_is_one
        && name.is_none_or(|name| {
            name.parse::<Ipv4Addr>().is_ok()
                || name.eq_ignore_ascii_case("localhost")
                || names.iter().any(|ours| ours.eq_ignore_ascii_case(name))
        })
}

/// Whether an `Origin` is the console's, given this `Host`. The scheme may be that of a proxy in front.
fn is_of(origin: &str, host: &str) -> bool {
    ["http://", "https://"]
        .iter()
        .filter_map(|scheme| origin.strip_prefix(scheme))
        .any(|origin| origin.eq_ignore_ascii_case(host))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The result of the checks for a request with this head.
    fn ask(method: Method, target: &str, headers: &[(&str, &str)]) -> Result<(), Rejection> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let name: HeaderName = name.parse().expect("a name");
            map.append(name, HeaderValue::from_str(value).expect("a value"));
        }
        let names = ["ops.example".to_owned()];
        allow(&names, &method, &target.parse().expect("a target"), &map)
    }

    /// Only host names that other sites cannot rebind are accepted.
    #[test]
    fn rebindable_host_is_refused() {
        for host in [
            "127.0.0.1:8268",
            "127.0.0.1",
            "localhost:8268",
            "LOCALHOST",
            "[::1]:8268",
            "[::1]",
            "192.168.1.7:8268",
            "ops.example",
            "Ops.Example:443",
        ] {
            assert_eq!(ask(Method::GET, "/", &[("host", host)]), Ok(()), "{host}");
        }
        for host in [
            "evil.example:8268",
            "ops.example.evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "user@127.0.0.1",
            "127.0.0.1:8268@evil.example",
            "127.0.0.1:80:80",
            "127.0.0.1:port",
            "[::1",
            "[::1]evil.example",
            "[evil.example]",
            "localhost.",
            "0x7f.1",
            "",
            ":8268",
            "127.0.0.1, evil.example",
        ] {
            assert_eq!(
                ask(Method::GET, "/", &[("host", host)]),
                Err(Rejection::UnknownHost),
                "{host}"
            );
        }
    }

    /// A request that two servers may read differently is refused.
    #[test]
    fn ambiguous_request_is_refused() {
        let host = ("host", "localhost");
        let length = ("transfer-encoding", "chunked");
        for (target, headers, refusal) in [
            ("/", vec![], Rejection::Malformed),
            (
                "/",
                vec![host, ("host", "evil.example")],
                Rejection::Malformed,
            ),
            ("http://localhost/", vec![host], Rejection::Malformed),
            ("http://evil.example/", vec![host], Rejection::Malformed),
            ("*", vec![host], Rejection::Malformed),
            ("localhost:80", vec![host], Rejection::Malformed),
            ("/", vec![host, length], Rejection::NoLength),
            (
                "/",
                vec![
                    host,
                    ("origin", "http://localhost"),
                    ("origin", "http://localhost"),
                ],
                Rejection::Malformed,
            ),
        ] {
            assert_eq!(
                ask(Method::GET, target, &headers),
                Err(refusal),
                "{target} {headers:?}"
            );
        }
    }

    /// Other sites may link to the console, but nothing more.
    #[test]
    fn other_sites_may_only_link() {
        let host = ("host", "localhost:8268");
        let get = |headers: &[(&str, &str)]| ask(Method::GET, "/", &[&[host], headers].concat());
        assert_eq!(get(&[("sec-fetch-site", "same-origin")]), Ok(()));
        assert_eq!(get(&[("sec-fetch-site", "none")]), Ok(()));
        assert_eq!(get(&[("origin", "http://localhost:8268")]), Ok(()));
        for site in ["cross-site", "same-site", "new-fangled"] {
            let document = [
                ("sec-fetch-site", site),
                ("sec-fetch-mode", "navigate"),
                ("sec-fetch-dest", "document"),
            ];
            assert_eq!(get(&document), Ok(()), "a link");
            let frame = [
                ("sec-fetch-site", site),
                ("sec-fetch-mode", "navigate"),
                ("sec-fetch-dest", "iframe"),
            ];
            assert_eq!(get(&frame), Err(Rejection::CrossSite));
            let script = [("sec-fetch-site", site), ("sec-fetch-mode", "no-cors")];
            assert_eq!(get(&script), Err(Rejection::CrossSite));
        }
        for origin in [
            "null",
            "",
            "http://localhost",
            "http://localhost:3000",
            "http://localhost:82680",
            "http://evil.example",
            "ftp://localhost:8268",
            "http://localhost:8268/",
        ] {
            assert_eq!(
                get(&[("origin", origin)]),
                Err(Rejection::CrossSite),
                "{origin}"
            );
        }
    }

    /// A change needs a header and a content type that other pages cannot send.
    #[test]
    fn changes_need_header_and_type() {
        let host = ("host", "localhost:8268");
        let origin = ("origin", "http://localhost:8268");
        let (ours, json) = (
            ("x-bigchat-sync", "1"),
            ("content-type", "application/json"),
        );
        let post = |headers: &[(&str, &str)]| {
            ask(
                Method::POST,
                "/api/failed/retry",
                &[&[host], headers].concat(),
            )
        };
        assert_eq!(post(&[ours, json]), Ok(()), "a script");
        assert_eq!(
            post(&[ours, ("content-type", "Application/JSON; charset=utf-8")]),
            Ok(())
        );
        assert_eq!(
            post(&[ours, json, origin, ("sec-fetch-site", "same-origin")]),
            Ok(())
        );
        assert_eq!(post(&[json, origin]), Err(Rejection::NotOurs));
        assert_eq!(post(&[ours, origin]), Err(Rejection::NotJson));
        for kind in [
            "text/plain",
            "application/x-www-form-urlencoded",
            "application/jsonp",
            "text/plain; application/json",
        ] {
            assert_eq!(
                post(&[ours, ("content-type", kind)]),
                Err(Rejection::NotJson),
                "{kind}"
            );
        }
        let link = [
            ours,
            json,
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-mode", "navigate"),
            ("sec-fetch-dest", "document"),
        ];
        assert_eq!(post(&link), Err(Rejection::CrossSite), "a form");
        assert_eq!(
            post(&[ours, json, ("origin", "http://localhost:3000")]),
            Err(Rejection::CrossSite)
        );
        assert_eq!(
            ask(Method::DELETE, "/", &[host, json]),
            Err(Rejection::NotOurs)
        );
        assert_eq!(
            ask(Method::OPTIONS, "/", &[host]),
            Err(Rejection::NotOurs),
            "a preflight request is never granted"
        );
    }
}
