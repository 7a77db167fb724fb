//! `bigchat-sync check`: tests the settings, the database and both APIs, and prints a remedy for each failure.
//!
//! Requests are sent to the APIs only if no daemon is running, because OurAPI may accept only one request at a time.
//! Otherwise the daemon's latest exchanges are reported. BigChat is never asked for events, because it reports each
//! only once.

use std::fmt::{self, Write};
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use reqwest::header;
use serde::Serialize;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::bigchat::BigChat;
use crate::console::guard;
use crate::domain::time::Millis;
use crate::http::route::Route;
use crate::http::{self, Api, ApiError, ApiState, ApiStatus, Http, Network, json};
use crate::journal::{OpenError, Store};
use crate::our_api::{OurApi, lock_is_usable};
use crate::settings::{Listen, Settings, TokenError, Tokens};
use crate::status::WRITABLE;
use crate::telemetry::terminal::{printable, shown, shown_in_full};

/// An external id that no chat has: the check only needs an answer from OurAPI.
const NO_CHAT: &str = "bigchat-sync-check";

/// The conversation that exists from BigChat's start on.
const FIRST_CONVERSATION: i64 = 1;

/// How to print the report.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Print one JSON object instead of lines.
    #[arg(long)]
    json: bool,
}

/// One test and its result.
#[derive(Debug, Serialize)]
struct CheckItem {
    check: &'static str,
    detail: String,
    /// The remedy; `None`: the test passed.
    remedy: Option<String>,
}

#[derive(Debug, Default)]
pub struct Report(Vec<CheckItem>);

impl Report {
    /// The text to print.
    pub fn print(&self, args: &Args) -> serde_json::Result<String> {
        match args.json {
            true => super::json::text(&json!({ "passed": self.all_passed(), "checks": self.0 })),
            false => Ok(self.to_string()),
        }
    }
}

impl Report {
    pub fn all_passed(&self) -> bool {
        self.0.iter().all(|finding| finding.remedy.is_none())
    }

    fn pass(&mut self, what: &'static str, text: impl Into<String>) {
        self.0.push(CheckItem {
            check: what,
            detail: text.into(),
            remedy: None,
        });
    }

    fn fail(&mut self, what: &'static str, text: impl Into<String>, remedy: impl Into<String>) {
        self.0.push(CheckItem {
            check: what,
            detail: text.into(),
            remedy: Some(remedy.into()),
        });
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for CheckItem {
            check,
            detail,
            remedy,
        } in &self.0
        {
            let mark = if remedy.is_none() { "ok" } else { "FAIL" };
            writeln!(f, "{mark:<6}{check:<10}{}", printable(detail))?;
            if let Some(remedy) = remedy {
                writeln!(f, "{:16}→ {remedy}", "")?;
            }
        }
        f.write_char('\n')?;
        f.write_str(match self.all_passed() {
            true => "all checks passed\n",
            false => "some checks failed\n",
        })
    }
}

pub async fn run(settings: &Settings, tokens: Result<Tokens, TokenError>) -> Report {
    let mut report = Report::default();
    let tokens = tokens.and_then(|tokens| tokens.allow(settings.listen).map(|()| tokens));
    let has_tokens = tokens.is_ok();
    let tokens = match tokens {
        Ok(tokens) if settings.bigchat_url == settings.our_api_url => {
            let text = "--bigchat-url and --our-api-url are the same";
            report.fail("settings", text, "set each to the base URL of its API");
            tokens
        }
        Ok(tokens) => {
            report.pass("settings", "are valid");
            tokens
        }
        Err(error) => {
            report.fail("settings", "are invalid", error.to_string());
            Tokens::default()
        }
    };
    let lock = settings.our_api_lock.as_deref().map(lock_is_usable);
    if let Some(Err(error)) = lock {
        let remedy = "name a file that this user may create and write";
        report.fail("settings", error.to_string(), remedy);
        return report;
    }
    for file in &tokens.exposed_files {
        let text = format!(
            "other users of this machine have access to the token file {}",
            shown(file)
        );
        report.fail("settings", text, format!("chmod 600 {}", shown(file)));
    }
    let db = settings.db();
    let Some(state) = check_database(&mut report, &db) else {
        return report;
    };
    match state {
        State::DaemonRuns(mut store) => {
            report.pass(
                "daemon",
                "is running; the results for the APIs are from its latest requests",
            );
            for api in Api::ALL {
                match store.api(api) {
                    Ok(status) => {
                        let status = status.without_passed_limit(Millis::now());
                        last_exchange(&mut report, settings, api, &status);
                    }
                    Err(error) => {
                        report.fail(api.title(), "state cannot be read", error.to_string())
                    }
                }
            }
        }
        State::Free(mut store) => {
            if let Listen::At(address) = settings.listen
                && is_console(address, settings.request_timeout).await
            {
                // That daemon may have a request in flight to OurAPI, which may accept only one at a time.
                let text = format!(
                    "a bigchat-sync already serves the console at http://{address}/, with another database or one that was deleted or replaced; the APIs are not asked"
                );
                let remedy = format!(
                    "if its database was {}, put the file back (with its -wal and -shm), or restart that daemon; otherwise set --db as that daemon does, or another --listen",
                    shown_in_full(&db)
                );
                report.fail("daemon", text, remedy);
                return report;
            }
            if has_tokens {
                report.pass("daemon", "is not running; the APIs are checked directly");
                ask(&mut report, settings, tokens, store.as_mut()).await;
            } else {
                let text = "is not running; the APIs are not asked without their tokens";
                report.pass("daemon", text);
            }
            check_console(&mut report, settings.listen);
        }
    }
    report
}

/// Whether a daemon is using the database.
enum State {
    /// A daemon is using it.
    DaemonRuns(Store),
    /// No daemon is using it, and none can start while this store is open. `None`: the database does not exist yet.
    Free(Option<Store>),
}

fn check_database(report: &mut Report, db: &Path) -> Option<State> {
    let is_missing = match fs::metadata(db) {
        Err(error) => error.kind() == io::ErrorKind::NotFound,
        // An empty file counts as missing, because opening it would write the schema.
        Ok(file) => {
            file.is_file() && file.len() == 0 && File::options().append(true).open(db).is_ok()
        }
    };
    let opened = match is_missing {
        true => match Store::can_be_made(db) {
            Ok(()) => {
                let text = format!("{} will be created at the first start", shown(db));
                report.pass("database", text);
                return Some(State::Free(None));
            }
            Err(error) => Err(error),
        },
        false => match Store::open(db) {
            Err(OpenError::InUse(_)) => Store::open_shared(db).map(State::DaemonRuns),
            opened => opened.map(|store| State::Free(Some(store))),
        },
    };
    let mut state = match opened {
        Ok(state) => state,
        Err(error) => {
            report.fail("database", "cannot be opened", error.to_string());
            return None;
        }
    };
    let (State::DaemonRuns(store) | State::Free(Some(store))) = &mut state else {
        return Some(state);
    };
    match store.try_to_write() {
        Ok(()) => report.pass("database", format!("{} is writable", shown(db))),
        Err(error) => report.fail(
            "database",
            format!("{} is not writable: {error}", shown(db)),
            WRITABLE,
        ),
    }
    for file in store.exposed_files() {
        report.fail(
            "database",
            format!(
                "other users of this machine have access to {}, which contains customers' messages",
                shown(&file)
            ),
            format!("chmod 600 {}", shown(&file)),
        );
    }
    Some(state)
}

fn last_exchange(report: &mut Report, settings: &Settings, api: Api, status: &ApiStatus) {
    let (what, flag) = (api.title(), api.url_setting());
    let url = base(settings, api);
    let ApiStatus {
        state,
        asked_at: Some(asked_at),
        request: Some(request),
        response: Some(response),
        ..
    } = status
    else {
        return report.pass(what, "has not been asked yet");
    };
    let last = format!("at {asked_at}, {request} → {response}");
    if !status.is_of(url) {
        let text = format!("the daemon uses another URL for this API: {last}");
        let remedy = format!("give this command the settings of the daemon; {flag} is {url} here");
        return report.fail(what, text, remedy);
    }
    if let Some(limit) = status.long_limit() {
        let remedy = format!("wait; nothing is lost; if this lasts, ask the operator of {what}");
        return report.fail(what, format!("rate-limited {limit} ({last})"), remedy);
    }
    let Some(problem) = &status.problem else {
        let is = match state {
            ApiState::Unknown => "is probably up",
            _ => "is up",
        };
        return report.pass(what, format!("{is}: {last}"));
    };
    let is = match state {
        ApiState::Down => "is down",
        ApiState::Unknown => "has not been reached yet",
        ApiState::Up | ApiState::Failing => "is failing, not yet counted as down",
    };
    let remedy = match status.lasts {
        true => format!("correct what the reason names; {flag} is {url} here"),
        false => {
            format!("if it is an outage, wait; otherwise correct {flag}, which is {url} here")
        }
    };
    report.fail(what, format!("{is}: {problem} (at {asked_at})"), remedy);
}

fn base(settings: &Settings, api: Api) -> &Url {
    match api {
        Api::BigChat => &settings.bigchat_url,
        Api::OurApi => &settings.our_api_url,
    }
}

/// Sends requests to both APIs as the next session of the daemon would: it obeys a rate limit, and waits while earlier
/// requests to OurAPI may still be in flight.
async fn ask(
    report: &mut Report,
    settings: &Settings,
    tokens: Tokens,
    mut store: Option<&mut Store>,
) {
    let timeout = settings.request_timeout;
    let networks = Network::new(&settings.bigchat_url, timeout)
        .and_then(|bigchat| Ok((bigchat, Network::new(&settings.our_api_url, timeout)?)));
    let (bigchat, our_api) = match networks {
        Ok((bigchat, our_api)) => {
            let (url, token) = (settings.bigchat_url.clone(), tokens.bigchat);
            let bigchat = Http::new(Api::BigChat, bigchat, url, token, settings.retry());
            let (url, token) = (settings.our_api_url.clone(), tokens.our_api);
            let our_api = Http::new(Api::OurApi, our_api, url, token, settings.retry());
            (bigchat, our_api)
        }
        Err(error) => {
            let remedy = "install CA certificates (Debian: ca-certificates)";
            return report.fail("HTTP", format!("cannot create the client: {error}"), remedy);
        }
    };
    for (http, api) in [&bigchat, &our_api].into_iter().zip(Api::ALL) {
        let last = store.as_mut().map(|store| store.api(api));
        let last = last.and_then(Result::ok).unwrap_or_default();
        if last.is_of(http.base()) {
            http.recall(&last);
        }
    }
    ask_bigchat(report, bigchat).await;
    ask_our_api(report, settings, our_api, store).await;
}

async fn ask_bigchat(report: &mut Report, http: Http) {
    let description = http.target(Route::Description, "", None);
    let description = http.call(&description, None, |answer| json(&answer.body));
    let description: Option<Value> = description.await.ok();
    let claim = description.and_then(|description| claim(&description, "/events"));
    let bigchat = BigChat::new(Arc::new(http));
    let answer = match bigchat.conversation(FIRST_CONVERSATION).await {
        Ok(_) => Ok("answers as expected"),
        // BigChat may no longer know the conversation. Another server would not know it either.
        Err(error) if error.is_not_found() => {
            Ok("answers; the first poll will show whether it is BigChat")
        }
        Err(error) => Err(error),
    };
    describe(report, Api::BigChat, bigchat.http(), claim, answer);
}

async fn ask_our_api(
    report: &mut Report,
    settings: &Settings,
    http: Http,
    mut store: Option<&mut Store>,
) {
    let pause = store.as_mut().map(|store| store.pause());
    let pause = pause.and_then(Result::ok).flatten();
    if let Some(pause) = pause.filter(|pause| pause.left(Millis::now()).is_some()) {
        let text = format!("is not asked: deliveries are {pause}");
        return report.pass(Api::OurApi.title(), text);
    }
    let our_api = OurApi::new(Arc::new(http), settings, CancellationToken::new());
    let last_end = store.as_mut().map(|store| store.begin_requests());
    let last_end = match last_end.transpose() {
        Ok(last_end) => last_end,
        Err(error) => {
            let text = format!("is not asked: {error}");
            return report.fail(Api::OurApi.title(), text, WRITABLE);
        }
    };
    if let Some(last_end) = last_end {
        let until = last_end.in_flight_until(settings.request_timeout, Millis::now());
        our_api.restore_timed_out(until);
    }
    let description = our_api.description().await.ok();
    let claim = description.and_then(|description| claim(&description, "/chats"));
    let answer = our_api.chat(NO_CHAT).await;
    let answer = answer.map(|_| "answers as expected");
    describe(report, Api::OurApi, our_api.http(), claim, answer);
    if let (Some(store), Some(last_end)) = (store, last_end)
        && let Err(error) = store.end_session(our_api.timed_out_until(), last_end.clean)
    {
        // The next session will wait for as long as a request may take.
        report.fail("database", format!("cannot be written: {error}"), WRITABLE);
    }
}

/// The API's description of itself.
struct Claim {
    /// Its title and version.
    name: String,
    /// Whether it has the route that identifies the expected API.
    fits: bool,
}

/// Both APIs publish a description. It may be missing in production, which does not count as a failure.
fn claim(description: &Value, route: &str) -> Option<Claim> {
    let text = |field: &str| description["info"][field].as_str();
    Some(Claim {
        name: format!("{} {}", text("title")?, text("version").unwrap_or_default()),
        fits: description["paths"].as_object()?.contains_key(route),
    })
}

fn describe(
    report: &mut Report,
    api: Api,
    http: &Http,
    claim: Option<Claim>,
    answer: Result<&str, ApiError>,
) {
    let (what, flag, url) = (api.title(), api.url_setting(), http.base());
    let says = claim.as_ref().map_or_else(String::new, |claim| {
        format!(" and says it is {:?}", claim.name)
    });
    match answer {
        _ if claim.as_ref().is_some_and(|claim| !claim.fits) => report.fail(
            what,
            format!("{url} answers{says}, and is not {what}"),
            format!("set {flag} to the base URL of {what}; are the two URLs swapped?"),
        ),
        Ok(answer) => report.pass(what, format!("{url} {answer}{says}")),
        Err(error) => report.fail(what, error.to_string(), error.remedy()),
    }
}

/// Whether a bigchat-sync answers at this address.
async fn is_console(mut address: SocketAddr, timeout: Duration) -> bool {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    let Ok(client) = http::client(false, timeout) else {
        return false;
    };
    let answer = client.get(format!("http://{address}/healthz")).send().await;
    answer.is_ok_and(|answer| {
        let server = answer.headers().get(header::SERVER);
        server.is_some_and(|server| server == guard::SERVER)
    })
}

fn check_console(report: &mut Report, listen: Listen) {
    let Listen::At(address) = listen else {
        return report.pass("console", "is off (--listen off)");
    };
    match TcpListener::bind(address) {
        Ok(_) => report.pass("console", format!("can be served at http://{address}/")),
        Err(error) => report.fail(
            "console",
            format!("cannot be served at {address}: {error}"),
            "set --listen to another address, or to off; everything else works without the console",
        ),
    }
}
