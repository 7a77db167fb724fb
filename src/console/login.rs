//! Authentication: by the token itself, or by a login session that was begun with the token.
//!
//! In this module, a session is a login session. It consists of a cookie that scripts cannot read, and a key that only
//! the console's own pages have. Both are required, because browsers send a host's cookies to all its ports, and so to
//! other programs that listen there. A session ends when the user signs out, after 12 hours, when the token is
//! replaced, and with the daemon.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::json;
use subtle::{Choice, ConstantTimeEq};

use super::api::RequestError;
use super::guard::{KEY, Rejection};
use super::{Web, error};
use crate::mutex::lock;
use crate::settings::Token;

/// The maximum number of sessions. A further login ends the oldest session.
const MAX_SESSIONS: usize = 32;

/// How long a session lasts: a working day.
const SESSION: Duration = Duration::from_secs(12 * 3600);

/// How many wrong tokens one network may send in a burst.
const TRIES: f64 = 10.0;

/// The time after which a network may send one more.
const TRY_EVERY: Duration = Duration::from_secs(6);

/// For how many networks attempts are counted separately. All others share one count.
const MAX_NETWORKS: usize = 1000;

/// The tokens, the sessions, and the failed attempts.
#[derive(Debug)]
pub(super) struct Login {
    token: Token,
    read_token: Token,
    cookie: String,
    sessions: Mutex<Vec<Session>>,
    tries: Mutex<Tries>,
    failures: AtomicU64,
}

/// The access that a token gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    All,
    Read,
}

/// What a client needs for the requests of its session.
struct Secrets {
    cookie: String,
    key: String,
}

/// `Debug` must not show a secret.
struct Session {
    access: Access,
    /// The token of its login. The session ends when this token is replaced.
    token: SecretString,
    cookie: String,
    key: String,
    until: Instant,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").finish_non_exhaustive()
    }
}

/// `POST /api/login`.
#[derive(Deserialize)]
pub(super) struct Credentials {
    token: String,
}

/// Begins a session: the response sets its cookie, and contains the key to send as `X-Bigchat-Sync`.
pub(super) async fn login(
    State(web): State<Arc<Web>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    credentials: Result<Json<Credentials>, JsonRejection>,
) -> Result<Response, RequestError> {
    let Json(credentials) = credentials?;
    let login = &web.login;
    if !login.is_needed() {
        return Ok(error(
            StatusCode::NOT_FOUND,
            "no token is set: there is no need to log in",
        ));
    }
    let begun = login.begin(peer.ip(), &credentials.token, Instant::now());
    Ok(match begun {
        Ok(Secrets { cookie, key }) => {
            tracing::info!(%peer, "login to the console");
            let cookie = login.set_cookie(&cookie, SESSION, &headers);
            ([(header::SET_COOKIE, cookie)], Json(json!({ "key": key }))).into_response()
        }
        Err(refusal) => {
            tracing::warn!(%peer, "login to the console failed");
            refusal.into_response()
        }
    })
}

pub(super) async fn logout(State(web): State<Arc<Web>>, headers: HeaderMap) -> Response {
    let login = &web.login;
    if !login.is_needed() {
        return StatusCode::NO_CONTENT.into_response();
    }
    login.end(&headers);
    let cookie = login.set_cookie("", Duration::ZERO, &headers);
    ([(header::SET_COOKIE, cookie)], StatusCode::NO_CONTENT).into_response()
}

impl Login {
    /// The first token gives full access, the second read access. The port distinguishes the cookies of several daemons
    /// on one host.
    pub(super) fn new([token, read_token]: [Token; 2], port: u16) -> Self {
        Self {
            token,
            read_token,
            cookie: format!("bigchat_sync_{port}"),
            sessions: Mutex::default(),
            tries: Mutex::default(),
            failures: AtomicU64::new(0),
        }
    }

    /// Whether a token is set.
    pub(super) fn is_needed(&self) -> bool {
        self.token.get().is_some()
    }

    /// How many wrong tokens were sent.
    pub(super) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// The access of a request's client, if a token is set.
    pub(super) fn authenticate(
        &self,
        peer: IpAddr,
        headers: &HeaderMap,
    ) -> Result<Access, Rejection> {
        let now = Instant::now();
        if let Some(token) = bearer(headers) {
            return self.check(peer, token, now);
        }
        let key = headers.get(KEY).map_or(&b""[..], HeaderValue::as_bytes);
        let sessions = self.sessions(now);
        let session = self
            .cookies(headers)
            .find_map(|cookie| sessions.iter().find(|session| session.is(cookie, key)));
        session
            .map(|session| session.access)
            .ok_or(Rejection::Unidentified)
    }

    fn begin(&self, peer: IpAddr, token: &str, now: Instant) -> Result<Secrets, Rejection> {
        let access = self.check(peer, token.as_bytes(), now)?;
        let session = Session {
            access,
            token: SecretString::from(token),
            cookie: secret(),
            key: secret(),
            until: now + SESSION,
        };
        let secrets = Secrets {
            cookie: session.cookie.clone(),
            key: session.key.clone(),
        };
        let mut sessions = self.sessions(now);
        if sessions.len() >= MAX_SESSIONS {
            sessions.remove(0);
        }
        sessions.push(session);
        Ok(secrets)
    }

    fn end(&self, headers: &HeaderMap) {
        let key = headers.get(KEY).map_or(&b""[..], HeaderValue::as_bytes);
        let cookies: Vec<&[u8]> = self.cookies(headers).collect();
        self.sessions(Instant::now())
            .retain(|session| !cookies.iter().any(|cookie| session.is(cookie, key)));
    }

    /// The access that a token gives. After too many wrong tokens, requests from that network are refused unchecked.
    fn check(&self, peer: IpAddr, token: &[u8], now: Instant) -> Result<Access, Rejection> {
        let mut tries = lock(&self.tries);
        tries.may_try(peer, now)?;
        let is = |right: &Token| {
            let right = right.get();
            right.is_some_and(|right| right.expose_secret().as_bytes().ct_eq(token).into())
        };
        match (is(&self.token), is(&self.read_token)) {
            (true, _) => Ok(Access::All),
            (false, true) => Ok(Access::Read),
            (false, false) => {
                tries.failed(peer, now);
                self.failures.fetch_add(1, Ordering::Relaxed);
                Err(Rejection::Unidentified)
            }
        }
    }

    /// The sessions that have not ended.
    fn sessions(&self, now: Instant) -> MutexGuard<'_, Vec<Session>> {
        let mut sessions = lock(&self.sessions);
        let (token, read_token) = (self.token.get(), self.read_token.get());
        sessions.retain(|session| {
            let token = match session.access {
                Access::All => &token,
                Access::Read => &read_token,
            };
            let token = token.as_ref().map(ExposeSecret::expose_secret);
            now < session.until && Some(session.token.expose_secret()) == token
        });
        sessions
    }

    /// The cookies with our name. Programs on other ports of the host may have set some of them.
    fn cookies<'a>(&'a self, headers: &'a HeaderMap) -> impl Iterator<Item = &'a [u8]> {
        headers
            .get_all(header::COOKIE)
            .iter()
            .filter_map(|cookies| cookies.to_str().ok())
            .flat_map(|cookies| cookies.split(';'))
            .filter_map(|cookie| cookie.trim().split_once('='))
            .filter(|(name, _)| *name == self.cookie)
            .map(|(_, value)| value.as_bytes())
    }

    fn set_cookie(&self, value: &str, lasts: Duration, headers: &HeaderMap) -> String {
        let name = &self.cookie;
        let seconds = lasts.as_secs();
        // Behind a proxy, only the browser's headers show whether it uses HTTPS.
        let secure = headers
            .get(header::ORIGIN)
            .is_some_and(|origin| origin.as_bytes().starts_with(b"https://"));
        let secure = if secure { "; Secure" } else { "" };
        format!("{name}={value}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict{secure}")
    }
}

impl Session {
    fn is(&self, cookie: &[u8], key: &[u8]) -> bool {
        let both: Choice = self.cookie.as_bytes().ct_eq(cookie) & self.key.as_bytes().ct_eq(key);
        both.into()
    }
}

fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(token)
}

fn secret() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// How many wrong tokens each network may still send.
#[derive(Debug, Default)]
struct Tries {
    networks: HashMap<IpAddr, Credit>,
}

#[derive(Debug, Clone, Copy)]
struct Credit {
    left: f64,
    at: Instant,
}

impl Credit {
    fn now(self, now: Instant) -> f64 {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() / TRY_EVERY.as_secs_f64();
        (self.left + gained).min(TRIES)
    }
}

impl Tries {
    fn may_try(&self, peer: IpAddr, now: Instant) -> Result<(), Rejection> {
        let left = self
            .networks
            .get(&self.network(peer))
            .map_or(TRIES, |credit| credit.now(now));
        if left >= 1.0 {
            return Ok(());
        }
        let wait = (1.0 - left) * TRY_EVERY.as_secs_f64();
        // At most `TRY_EVERY`.
        Err(Rejection::TooManyTries(wait.ceil() as u64))
    }

    fn failed(&mut self, peer: IpAddr, now: Instant) {
        if self.networks.len() >= MAX_NETWORKS {
            self.networks.retain(|_, credit| credit.now(now) < TRIES);
        }
        let network = self.network(peer);
        let left = self
            .networks
            .get(&network)
            .map_or(TRIES, |credit| credit.now(now));
        let credit = Credit {
            left: left - 1.0,
            at: now,
        };
        self.networks.insert(network, credit);
    }

    /// The network of an address. For IPv6 it is the prefix, because a client has many addresses.
    fn network(&self, peer: IpAddr) -> IpAddr {
        const OTHERS: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
        let network = match peer.to_canonical() {
            IpAddr::V6(address) => {
                Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into()
            }
            v4 => v4,
        };
        if self.networks.len() >= MAX_NETWORKS && !self.networks.contains_key(&network) {
            OTHERS
        } else {
            network
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "a token that is long enough";
    const READ_TOKEN: &str = "another token that is long enough";

    fn login() -> Login {
        let tokens = [TOKEN, READ_TOKEN].map(|token| Some(SecretString::from(token)).into());
        Login::new(tokens, 8268)
    }

    fn peer(last: u8) -> IpAddr {
        IpAddr::from([127, 0, 0, last])
    }

    fn headers(pairs: &[(&str, String)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| {
                let name: header::HeaderName = name.parse().expect("a name");
                (name, HeaderValue::from_str(value).expect("a value"))
            })
            .collect()
    }

    #[test]
    fn session_needs_cookie_and_key() {
        let (login, now) = (login(), Instant::now());
        let Secrets { cookie, key } = login.begin(peer(1), TOKEN, now).expect("a session");
        let ask = |cookie: &str, key: &str| {
            let cookies = format!("a=b; bigchat_sync_8268=tossed; bigchat_sync_8268={cookie}");
            let headers = headers(&[("cookie", cookies), ("x-bigchat-sync", key.to_owned())]);
            login.authenticate(peer(1), &headers)
        };
        assert_eq!(ask(&cookie, &key), Ok(Access::All));
        assert_eq!(ask(&cookie, "1"), Err(Rejection::Unidentified));
        assert_eq!(ask(&cookie, ""), Err(Rejection::Unidentified));
        assert_eq!(ask("", &key), Err(Rejection::Unidentified));
        assert_eq!(ask(&key, &cookie), Err(Rejection::Unidentified));
        let other = login.begin(peer(1), TOKEN, now).expect("a session");
        assert_eq!(
            ask(&other.cookie, &key),
            Err(Rejection::Unidentified),
            "another's"
        );
        assert!(login.sessions(now + SESSION).is_empty());
        assert_eq!(
            ask(&cookie, &key),
            Err(Rejection::Unidentified),
            "it is over"
        );
    }

    /// A session of the read token can only read.
    #[test]
    fn session_of_the_read_token() {
        let (login, now) = (login(), Instant::now());
        assert_eq!(
            login.check(peer(1), READ_TOKEN.as_bytes(), now),
            Ok(Access::Read)
        );
        let Secrets { cookie, key } = login.begin(peer(1), READ_TOKEN, now).expect("a session");
        let cookies = format!("bigchat_sync_8268={cookie}");
        let headers = headers(&[("cookie", cookies), ("x-bigchat-sync", key)]);
        assert_eq!(login.authenticate(peer(1), &headers), Ok(Access::Read));
    }

    #[test]
    fn sessions_are_bounded() {
        let (login, now) = (login(), Instant::now());
        for _ in 0..MAX_SESSIONS + 5 {
            login.begin(peer(1), TOKEN, now).expect("a session");
        }
        assert_eq!(login.sessions(now).len(), MAX_SESSIONS);
    }

    /// Guessing is slowed down, and does not lock out other networks.
    #[test]
    fn guessing_slows_only_its_network() {
        let (login, now) = (login(), Instant::now());
        let wrong = |who, at| login.check(who, b"wrong", at);
        let right = |who, at| login.check(who, TOKEN.as_bytes(), at);
        for _ in 0..10 {
            assert_eq!(wrong(peer(1), now), Err(Rejection::Unidentified));
        }
        assert_eq!(
            wrong(peer(1), now),
            Err(Rejection::TooManyTries(TRY_EVERY.as_secs()))
        );
        assert_eq!(
            right(peer(1), now),
            Err(Rejection::TooManyTries(TRY_EVERY.as_secs())),
            "a wrong token must use up an attempt"
        );
        assert_eq!(right(peer(2), now), Ok(Access::All));
        assert_eq!(right(peer(1), now + TRY_EVERY), Ok(Access::All));
        for _ in 0..20 {
            assert_eq!(
                right(peer(2), now),
                Ok(Access::All),
                "being right costs nothing"
            );
        }
        let addresses = (0..20_u16).map(|n| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, n]));
        let refused = addresses
            .filter(|who| wrong(*who, now) != Err(Rejection::Unidentified))
            .count();
        assert_eq!(refused, 10, "addresses of one network share a count");
    }

    /// Beyond the maximum number of networks, all others share one count.
    #[test]
    fn other_networks_share_a_count() {
        let (login, now) = (login(), Instant::now());
        let addresses = (0..2_000_u16).map(|n| IpAddr::from([0x2001, 0xdb8, 0, n, 0, 0, 0, 1]));
        let refused = addresses
            .filter(|who| login.check(*who, b"wrong", now) != Err(Rejection::Unidentified))
            .count();
        assert_eq!(refused, 2_000 - MAX_NETWORKS - 10);
        let tries = login.tries.lock().expect("no panic");
        assert!(tries.networks.len() <= MAX_NETWORKS + 1);
    }

    #[test]
    fn cookie_is_bound_to_its_console() {
        let cookie = login().set_cookie("x", SESSION, &HeaderMap::new());
        assert_eq!(
            cookie,
            "bigchat_sync_8268=x; Path=/; Max-Age=43200; HttpOnly; SameSite=Strict"
        );
        let https = headers(&[("origin", "https://ops.example".into())]);
        let cookie = login().set_cookie("x", SESSION, &https);
        assert!(cookie.ends_with("; Secure"), "{cookie}");
    }

    #[test]
    fn debug_prints_no_secret() {
        let login = login();
        let Secrets { cookie, key } = login
            .begin(peer(1), TOKEN, Instant::now())
            .expect("a session");
        let printed = format!("{login:?}");
        for secret in [TOKEN, &cookie, &key] {
            assert!(!printed.contains(secret), "{printed}");
        }
    }
}
