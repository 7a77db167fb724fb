//! `bigchat-sync check`: whether the daemon can work as it is set up, and what to do where it cannot.
//!
//! Both APIs are asked only where no daemon runs, since nobody asks OurAPI beside it; else its last exchanges tell. BigChat
//! is never asked for events: it tells each of them only once.

use std::fmt::{self, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use crate::bigchat::BigChat;
use crate::http::route::Route;
use crate::http::{Api, ApiError, ApiStatus, ErrorKind, Http, Network};
use crate::journal::{OpenError, Store};
use crate::our_api::OurApi;
use crate::settings::{Listen, Settings, TokenError, Tokens};
use crate::telemetry::terminal::{printable, shown};

/// An external id that no chat has: whether OurAPI answers is all there is to learn.
const NO_CHAT: &str = "bigchat-sync-check";

/// The conversation that BigChat has had from its start.
const FIRST_CONVERSATION: i64 = 1;

/// What was looked at, and how it was found.
#[derive(Debug)]
struct CheckItem {
    what: &'static str,
    text: String,
    /// What to do about it, if it is not well.
    remedy: Option<String>,
}

/// All that was found.
#[derive(Debug, Default)]
pub struct Report(Vec<CheckItem>);

impl Report {
    /// Whether there is nothing to be done.
    pub fn all_passed(&self) -> bool {
        self.0.iter().all(|finding| finding.remedy.is_none())
    }

    fn pass(&mut self, what: &'static str, text: impl Into<String>) {
        self.0.push(CheckItem {
            what,
            text: text.into(),
            remedy: None,
        });
    }

    fn fail(&mut self, what: &'static str, text: impl Into<String>, remedy: impl Into<String>) {
        self.0.push(CheckItem {
            what,
            text: text.into(),
            remedy: Some(remedy.into()),
        });
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for CheckItem { what, text, remedy } in &self.0 {
            let mark = if remedy.is_none() { "ok" } else { "FAIL" };
            writeln!(f, "{mark:<6}{what:<10}{}", printable(text))?;
            if let Some(remedy) = remedy {
                writeln!(f, "{:16}→ {remedy}", "")?;
            }
        }
        f.write_char('\n')?;
        f.write_str(match self.all_passed() {
            true => "it can work\n",
            false => "it cannot work as it should\n",
        })
    }
}

/// Looks at everything.
pub async fn run(settings: &Settings, tokens: Result<Tokens, TokenError>) -> Report {
    let mut report = Report::default();
    let tokens = tokens.and_then(|tokens| tokens.allow(settings.listen).map(|()| tokens));
    let tokens = match tokens {
        Ok(tokens) if settings.bigchat_url == settings.our_api_url => {
            let text = "name the same place for both APIs";
            report.fail(
                "settings",
                text,
                "set --bigchat-url and --our-api-url apart",
            );
            tokens
        }
        Ok(tokens) => {
            report.pass("settings", "can be used");
            tokens
        }
        Err(error) => {
            report.fail("settings", "cannot be used", error.to_string());
            Tokens::default()
        }
    };
    for file in &tokens.exposed_files {
        let text = format!(
            "token file {}: other users of this machine have access to it",
            shown(file)
        );
        report.fail("settings", text, format!("chmod 600 {}", shown(file)));
    }
    let db = settings.db();
    let Some(state) = look_at_database(&mut report, &db) else {
        return report;
    };
    match state {
        State::DaemonRuns(mut store) => {
            report.pass("daemon", "runs: the APIs are as it last found them");
            for api in Api::ALL {
                match store.api(api.name()) {
                    Ok(status) => last_exchange(&mut report, settings, api, &status),
                    Err(error) => report.fail(api.title(), "cannot be told", error.to_string()),
                }
            }
        }
        State::Free(_kept_for_now) => {
            report.pass("daemon", "does not run: the APIs are asked now");
            ask(&mut report, settings, tokens).await;
            look_at_console(&mut report, settings.listen);
        }
    }
    report
}

/// Who works on the database.
enum State {
    /// A daemon does: it can be read.
    DaemonRuns(Store),
    /// Nobody does, and no daemon starts to as long as this is held.
    Free(Option<Store>),
}

fn look_at_database(report: &mut Report, db: &Path) -> Option<State> {
    let opened = match db.try_exists() {
        Ok(false) => match Store::can_be_made(db) {
            Ok(()) => {
                let text = format!("{} is made at the first start", shown(db));
                report.pass("database", text);
                return Some(State::Free(None));
            }
            Err(error) => Err(error),
        },
        _ => match Store::open(db) {
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
        Ok(()) => report.pass("database", format!("{} can be written", shown(db))),
        Err(error) => report.fail(
            "database",
            format!("{} cannot be written: {error}", shown(db)),
            "free some disk, mend its permissions, or end whatever holds it; a daemon that runs goes on by itself then",
        ),
    }
    for file in store.exposed_files() {
        report.fail(
            "database",
            format!(
                "{} has customers' messages, and other users of this machine have access to it",
                shown(&file)
            ),
            format!("chmod 600 {}", shown(&file)),
        );
    }
    Some(state)
}

fn last_exchange(report: &mut Report, settings: &Settings, api: Api, status: &ApiStatus) {
    let (what, flag) = (api.title(), api.url_setting());
    let url = match api {
        Api::BigChat => &settings.bigchat_url,
        Api::OurApi => &settings.our_api_url,
    };
    let ApiStatus {
        up,
        asked_at: Some(asked_at),
        request: Some(request),
        response: Some(response),
        ..
    } = status
    else {
        return report.pass(what, "was not asked anything yet");
    };
    let last = format!("at {asked_at}, {request} → {response}");
    if !request.contains(url.as_str()) {
        let text = format!("is asked elsewhere by the daemon: {last}");
        let remedy = format!("give this command the daemon's settings: {flag} says {url} here");
        return report.fail(what, text, remedy);
    }
    match up {
        Some(false) => {
            let why = status.trouble.as_deref().unwrap_or_default();
            let remedy = match status.lasts {
                true => format!("correct what the reason names ({flag} is {url} here)"),
                false => format!(
                    "nothing, if it is an outage; else see whether {flag} is right ({url} here)"
                ),
            };
            report.fail(what, format!("is down: {why} ({last})"), remedy);
        }
        Some(true) => report.pass(what, format!("is up: {last}")),
        None => report.pass(what, format!("is not known to be down: {last}")),
    }
}

async fn ask(report: &mut Report, settings: &Settings, tokens: Tokens) {
    let timeout = settings.request_timeout;
    let networks = Network::new(&settings.bigchat_url, timeout)
        .and_then(|bigchat| Ok((bigchat, Network::new(&settings.our_api_url, timeout)?)));
    let (bigchat, our_api) = match networks {
        Ok((bigchat, our_api)) => {
            let (url, token) = (settings.bigchat_url.clone(), tokens.bigchat.into());
            let bigchat = Http::new(Api::BigChat, bigchat, url, token, settings.retry());
            let (url, token) = (settings.our_api_url.clone(), tokens.our_api.into());
            let our_api = Http::new(Api::OurApi, our_api, url, token, settings.retry());
            (bigchat, our_api)
        }
        Err(error) => {
            let remedy = "install CA certificates (Debian: ca-certificates)";
            return report.fail(
                "HTTP",
                format!("the client cannot be made: {error}"),
                remedy,
            );
        }
    };
    let claim = claim(&bigchat, "/events").await;
    let bigchat = BigChat::new(Arc::new(bigchat));
    let answer = match bigchat.conversation(FIRST_CONVERSATION).await {
        Ok(_) => Ok("answers as it should"),
        // It need not know it any more; another server would not know it either.
        Err(error) if matches!(error.kind, ErrorKind::NotFound(_)) => {
            Ok("answers; whether as BigChat does, the first poll tells")
        }
        Err(error) => Err(error),
    };
    tell(report, Api::BigChat, bigchat.http(), claim, answer);
    let claim = self::claim(&our_api, "/chats").await;
    let our_api = OurApi::new(Arc::new(our_api), settings.our_api_concurrency, timeout);
    let answer = our_api.chat(NO_CHAT).await;
    let answer = answer.map(|_| "answers as it should");
    tell(report, Api::OurApi, our_api.http(), claim, answer);
}

/// What an API says it is, if it says so.
struct Claim {
    /// Its title and version.
    name: String,
    /// Whether it has the route without which it cannot be the one it should be.
    fits: bool,
}

/// Both publish a description of themselves; in production it may not be there, and nothing rests on it then.
async fn claim(http: &Http, route: &str) -> Option<Claim> {
    let description = http.target(Route::Description, "", None);
    let answer = http.send(&description, None::<&()>).await.ok()?;
    let description: Value = serde_json::from_slice(&answer.body).ok()?;
    let text = |field: &str| description["info"][field].as_str();
    Some(Claim {
        name: format!("{} {}", text("title")?, text("version").unwrap_or_default()),
        fits: description["paths"].as_object()?.contains_key(route),
    })
}

fn tell(
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
            format!("{url} answers{says}, which is not {what}"),
            format!("set {flag} to where {what} is; are the two URLs mixed up?"),
        ),
        Ok(answer) => report.pass(what, format!("{url} {answer}{says}")),
        Err(error) => report.fail(what, error.to_string(), error.remedy()),
    }
}

fn look_at_console(report: &mut Report, listen: Listen) {
    let Listen::At(address) = listen else {
        return report.pass("console", "is not served (--listen off)");
    };
    match TcpListener::bind(address) {
        Ok(_) => report.pass("console", format!("will be at http://{address}/")),
        Err(error) => report.fail(
            "console",
            format!("cannot be served at {address}: {error}"),
            "set --listen to another address, or to off; all else works without it",
        ),
    }
}
