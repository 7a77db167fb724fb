//! The settings: each a flag and an environment variable named after it, checked at start.
//!
//! Bearer tokens come from the environment or from a file, never from a flag: any user of the machine can read flags in
//! the process list.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{IsTerminal, Read};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use clap::{Args, ValueEnum};
use secrecy::{ExposeSecret, SecretString};
use thiserror::Error;
use url::Url;

use crate::domain::backoff::Policy;
use crate::domain::progress::{IdlePass, VerifyMode};
use crate::domain::time::{Millis, Timestamp};
use crate::telemetry::log::LogFormat;
use crate::telemetry::terminal::shown;

/// The default address of the console.
pub const DEFAULT_LISTEN: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8268));

/// The minimum length of the console's token, in characters.
const MIN_CONSOLE_TOKEN: usize = 16;

/// All settings.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Settings (each also as an environment variable)")]
pub struct Settings {
    /// Base URL of BigChat.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_BIGCHAT_URL", value_name = "URL", default_value = "http://127.0.0.1:8267", value_parser = base_url)]
    pub bigchat_url: Url,

    /// Base URL of OurAPI.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_OUR_API_URL", value_name = "URL", default_value = "http://127.0.0.1:8266", value_parser = base_url)]
    pub our_api_url: Url,

    /// Database file, created if missing [default: bigchat-sync.db in $STATE_DIRECTORY, else in the working directory].
    #[arg(long, global = true, env = "BIGCHAT_SYNC_DB", value_name = "FILE")]
    pub db: Option<PathBuf>,

    /// Time between polls of BigChat.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_POLL_INTERVAL", value_name = "TIME", allow_hyphen_values = true, default_value = "10s", value_parser = positive)]
    pub poll_interval: Duration,

    /// How far each poll overlaps the previous one, to catch late events.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_POLL_OVERLAP", value_name = "TIME", allow_hyphen_values = true, default_value = "5s", value_parser = duration)]
    pub poll_overlap: Duration,

    /// Longest period that one poll covers. After downtime, polls follow each other without a pause.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_MAX_WINDOW", value_name = "TIME", allow_hyphen_values = true, default_value = "1h", value_parser = at_least_a_second)]
    pub max_window: Duration,

    /// Time from which the first poll reads, RFC 3339 such as 2026-11-22T22:00:00Z; used at the first start only
    /// [default: 10 s ago].
    #[arg(long, global = true, env = "BIGCHAT_SYNC_SINCE", value_name = "TIME", allow_hyphen_values = true, value_parser = point_in_time)]
    pub since: Option<Millis>,

    /// Kinds of events to count and drop, separated by commas.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_IGNORE_EVENTS", value_name = "NAME", value_delimiter = ',', value_parser = event_name)]
    pub ignore_events: Vec<String>,

    /// Maximum number of requests in flight to OurAPI from this process. All processes that use one OurAPI count
    /// together: two daemons with 1 each send 2 at once, unless --our-api-lock makes them take turns. More than 1 in
    /// total corrupts an OurAPI that keeps one database per thread.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_OUR_API_CONCURRENCY", value_name = "N", allow_hyphen_values = true, default_value_t = 1, value_parser = up_to_256)]
    pub our_api_concurrency: u16,

    /// File to lock during each request to OurAPI, so that daemons on one machine with the same file take turns. The
    /// file is created if it does not exist, and stays empty.
    #[arg(
        long,
        global = true,
        env = "BIGCHAT_SYNC_OUR_API_LOCK",
        value_name = "FILE"
    )]
    pub our_api_lock: Option<PathBuf>,

    /// Prefix of every external id, for several BigChats on one OurAPI. It must never change. The requests of all
    /// daemons on one OurAPI add up: see --our-api-concurrency.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_EXTERNAL_ID_PREFIX", value_name = "TEXT", default_value = "", hide_default_value = true, value_parser = prefix)]
    pub external_id_prefix: String,

    /// Time limit of one request.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_REQUEST_TIMEOUT", value_name = "TIME", allow_hyphen_values = true, default_value = "10s", value_parser = positive)]
    pub request_timeout: Duration,

    /// Back-off after the first failure of an event; doubles with each further failure. The actual wait is a random
    /// fraction of it.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_RETRY_INITIAL", value_name = "TIME", allow_hyphen_values = true, default_value = "1s", value_parser = positive)]
    pub retry_initial: Duration,

    /// Maximum back-off.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_RETRY_MAX", value_name = "TIME", allow_hyphen_values = true, default_value = "5m", value_parser = positive)]
    pub retry_max: Duration,

    /// Failed attempts of one event, while other conversations succeed, before it becomes a dead letter.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_MAX_ATTEMPTS", value_name = "N", allow_hyphen_values = true, default_value_t = 10, value_parser = at_least_one)]
    pub max_attempts: u32,

    /// How long delivered and discarded events are stored. Waiting events, and dead letters that are not discarded, are
    /// never dropped.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_RETENTION", value_name = "TIME", allow_hyphen_values = true, default_value = "30d", value_parser = duration)]
    pub retention: Duration,

    /// Author of every message in OurAPI, because BigChat does not say who wrote it.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_MESSAGE_AUTHOR", value_enum, default_value_t = MessageAuthor::None)]
    pub message_author: MessageAuthor,

    /// What to do about chats, agents and messages that OurAPI lost. If a lost chat is not restored, its next event
    /// creates a chat with that event alone.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_REBUILD", value_enum, default_value_t = Rebuild::Auto)]
    pub rebuild: Rebuild,

    /// Period in which every chat with stored events is compared once with the journal (the database); `off` disables
    /// this. It happens in idle time, and takes at most a tenth of OurAPI's time.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_VERIFY_EVERY", value_name = "TIME", allow_hyphen_values = true, default_value = "24h", value_parser = verify_every)]
    pub verify_every: VerifyEvery,

    /// Address of the console, the probes and the metrics, or `off`. An address other than loopback requires
    /// BIGCHAT_SYNC_CONSOLE_TOKEN or BIGCHAT_SYNC_CONSOLE_TOKEN_FILE.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_LISTEN", value_name = "ADDRESS", default_value_t = Listen::At(DEFAULT_LISTEN), value_parser = listen)]
    pub listen: Listen,

    /// Additional host names of the console, for example behind a reverse proxy, separated by commas.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_CONSOLE_HOST", value_name = "NAME", value_delimiter = ',', value_parser = host)]
    pub console_host: Vec<String>,

    /// Format of the log [default: text on a terminal, else json]. RUST_LOG sets its level.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_LOG_FORMAT", value_enum)]
    pub log_format: Option<LogFormat>,

    /// Log whole requests and responses. They contain customers' messages, and advisors' names and e-mail addresses.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_LOG_MESSAGE_TEXT", value_name = "BOOL", default_value_t = false, action = clap::ArgAction::Set)]
    pub log_message_text: bool,

    /// Time between two summaries in the log. A summary with nothing to report is left out.
    #[arg(long, global = true, env = "BIGCHAT_SYNC_LOG_SUMMARY", value_name = "TIME", allow_hyphen_values = true, default_value = "5m", value_parser = positive)]
    pub log_summary: Duration,
}

/// `--listen`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listen {
    /// Not at all.
    Off,
    /// At this address.
    At(SocketAddr),
}

/// `--rebuild`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Rebuild {
    /// Restore them from the journal (the database).
    Auto,
    /// Only report them.
    Report,
    /// Do not check for losses.
    Off,
}

impl Rebuild {
    /// Whether losses in OurAPI are restored before an event needs the chat.
    pub fn restores(self) -> bool {
        self == Self::Auto
    }
}

/// `--verify-every`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VerifyEvery {
    Off,
    Within(Duration),
}

/// `--message-author`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MessageAuthor {
    /// No agent.
    None,
    /// The agent that the chat has when the message is sent.
    Agent,
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::At(address) => address.fmt(f),
        }
    }
}

impl Settings {
    /// The path of the database.
    pub fn db(&self) -> PathBuf {
        const NAME: &str = "bigchat-sync.db";
        match (&self.db, std::env::var_os("STATE_DIRECTORY")) {
            (Some(db), _) => db.clone(),
            (None, Some(directory)) => PathBuf::from(directory).join(NAME),
            (None, None) => PathBuf::from(NAME),
        }
    }

    /// The format of the log.
    pub fn log_format(&self) -> LogFormat {
        match self.log_format {
            Some(format) => format,
            None if std::io::stderr().is_terminal() => LogFormat::Text,
            None => LogFormat::Json,
        }
    }

    /// The pass that verifies all chats in idle time; `None`: there is none.
    pub fn idle_pass(&self) -> Option<IdlePass> {
        let VerifyEvery::Within(every) = self.verify_every else {
            return None;
        };
        let mode = match self.rebuild {
            Rebuild::Auto => VerifyMode::Restore,
            Rebuild::Report => VerifyMode::Report,
            Rebuild::Off => return None,
        };
        Some(IdlePass { every, mode })
    }

    /// The back-off of events.
    pub fn retry(&self) -> Policy {
        Policy {
            initial: self.retry_initial,
            max: self.retry_max,
            max_attempts: self.max_attempts,
        }
    }
}

/// The variables that give the tokens, each also with `_FILE`.
pub(crate) const BIGCHAT_TOKEN: &str = "BIGCHAT_SYNC_BIGCHAT_TOKEN";
pub(crate) const OUR_API_TOKEN: &str = "BIGCHAT_SYNC_OUR_API_TOKEN";
const CONSOLE_TOKEN: &str = "BIGCHAT_SYNC_CONSOLE_TOKEN";
const CONSOLE_READ_TOKEN: &str = "BIGCHAT_SYNC_CONSOLE_READ_TOKEN";
const HEARTBEAT_URL: &str = "BIGCHAT_SYNC_HEARTBEAT_URL";

/// The settings that are environment variables, but not flags.
pub(crate) fn token_variables() -> impl Iterator<Item = String> {
    let names = [
        BIGCHAT_TOKEN,
        OUR_API_TOKEN,
        CONSOLE_TOKEN,
        CONSOLE_READ_TOKEN,
        HEARTBEAT_URL,
    ];
    let with_file = |name: &str| [name.to_owned(), format!("{name}_FILE")];
    names.into_iter().flat_map(with_file)
}

/// The secrets that the environment sets: bearer tokens and the heartbeat URL. Clones share them, and a reload replaces
/// them everywhere.
#[derive(Debug, Clone, Default)]
pub struct Tokens {
    /// `BIGCHAT_SYNC_BIGCHAT_TOKEN`, or the content of the file `BIGCHAT_SYNC_BIGCHAT_TOKEN_FILE`.
    pub bigchat: Token,
    /// Likewise `BIGCHAT_SYNC_OUR_API_TOKEN`.
    pub our_api: Token,
    /// Likewise `BIGCHAT_SYNC_CONSOLE_TOKEN`: clients of the console must send it.
    pub console: Token,
    /// Likewise `BIGCHAT_SYNC_CONSOLE_READ_TOKEN`, for read-only access.
    pub console_read: Token,
    /// Likewise `BIGCHAT_SYNC_HEARTBEAT_URL`. It is a secret, because it is all that is needed to report the daemon as
    /// healthy.
    pub heartbeat_url: Token,
    /// The token files that all users of this machine may read or write, as of the start.
    pub exposed_files: Vec<PathBuf>,
}

/// A token that cannot be read or sent.
#[derive(Debug, Error)]
pub enum TokenError {
    /// Both variables are set.
    #[error("{0} and {0}_FILE are both set; unset one of them")]
    Both(String),
    /// The file cannot be read.
    #[error(
        "cannot read the token file {} named by {variable}_FILE: {source}",
        token_file(path)
    )]
    File {
        /// The variable without `_FILE`.
        variable: String,
        /// The path that it names.
        path: PathBuf,
        /// Why it cannot be read.
        source: std::io::Error,
    },
    /// The token is empty, or has characters that a header cannot carry.
    #[error(
        "the token from {0} or {0}_FILE is empty, or has white space or other characters that a header cannot contain"
    )]
    Unusable(String),
    /// The console's token is too short.
    #[error(
        "the token from {0} or {0}_FILE has fewer than {MIN_CONSOLE_TOKEN} characters and can be guessed; `openssl rand -hex 16` makes a good one"
    )]
    Short(&'static str),
    /// Only the read token is set, so no client could change anything.
    #[error(
        "{CONSOLE_READ_TOKEN} is set without {CONSOLE_TOKEN}; set both, because no client could change anything"
    )]
    ReadOnly,
    /// The read token could change everything.
    #[error("{CONSOLE_READ_TOKEN} and {CONSOLE_TOKEN} give the same token; make another one")]
    SameToken,
    /// The heartbeat URL is not an HTTP URL.
    #[error(
        "{HEARTBEAT_URL} or {HEARTBEAT_URL}_FILE does not give a URL that begins with https:// or http://"
    )]
    HeartbeatUrl,
    /// A token was set before, and no longer is.
    #[error("{0} and {0}_FILE no longer give a token")]
    Gone(String),
    /// The console would be open to other machines without a token.
    #[error(
        "--listen {0} needs a token for the console: set BIGCHAT_SYNC_CONSOLE_TOKEN_FILE or BIGCHAT_SYNC_CONSOLE_TOKEN, or listen on 127.0.0.1"
    )]
    Open(SocketAddr),
}

/// The path of a token file for an error message. A relative one may be the token itself, set in the wrong variable.
fn token_file(path: &Path) -> String {
    if path.is_absolute() {
        shown(path)
    } else {
        "with a relative path (not shown, because it may be the token itself)".into()
    }
}

impl Tokens {
    /// Reads the tokens from the environment. `variable` returns the value of a variable.
    pub fn read(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, TokenError> {
        let mut exposed_files = Vec::new();
        let mut token = |name| read_token(name, &variable, &mut exposed_files);
        Ok(Self {
            bigchat: token(BIGCHAT_TOKEN)?.into(),
            our_api: token(OUR_API_TOKEN)?.into(),
            console: token(CONSOLE_TOKEN)?.into(),
            console_read: token(CONSOLE_READ_TOKEN)?.into(),
            heartbeat_url: token(HEARTBEAT_URL)?.into(),
            exposed_files,
        })
    }

    /// Whether the console may be served at that address.
    pub fn allow(&self, listen: Listen) -> Result<(), TokenError> {
        let (console, console_read) = (self.console.get(), self.console_read.get());
        allow(console.as_ref(), console_read.as_ref(), listen)
    }

    /// Reads the tokens again. `variable` returns the value of an environment variable. If a token cannot be read, the
    /// old one stays in use. Returns the variable of each new token, or why the old one stays.
    pub fn reload(
        &self,
        variable: impl Fn(&str) -> Option<OsString>,
        listen: Listen,
    ) -> Vec<Result<&'static str, TokenError>> {
        let reload = |name: &'static str, old: &Token| {
            let new = read_token(name, &variable, &mut Vec::new())?;
            match (new, old.get()) {
                (None, None) => Ok(None),
                (None, Some(_)) => Err(TokenError::Gone(name.into())),
                (Some(new), _) if old.is(&new) => Ok(None),
                (Some(new), _) => {
                    match name {
                        CONSOLE_TOKEN => {
                            allow(Some(&new), self.console_read.get().as_ref(), listen)?;
                        }
                        CONSOLE_READ_TOKEN => {
                            allow(self.console.get().as_ref(), Some(&new), listen)?;
                        }
                        _ => {}
                    }
                    old.set(new);
                    Ok(Some(name))
                }
            }
        };
        let reloaded = [
            reload(BIGCHAT_TOKEN, &self.bigchat),
            reload(OUR_API_TOKEN, &self.our_api),
            reload(CONSOLE_TOKEN, &self.console),
            reload(CONSOLE_READ_TOKEN, &self.console_read),
            reload(HEARTBEAT_URL, &self.heartbeat_url),
        ];
        reloaded.into_iter().filter_map(Result::transpose).collect()
    }
}

/// The token in a variable or its file. A file that all users of this machine may read or write is added to
/// `exposed_files`.
fn read_token(
    name: &str,
    variable: impl Fn(&str) -> Option<OsString>,
    exposed_files: &mut Vec<PathBuf>,
) -> Result<Option<SecretString>, TokenError> {
    let text = match (variable(name), variable(&format!("{name}_FILE"))) {
        (None, None) => return Ok(None),
        (Some(_), Some(_)) => return Err(TokenError::Both(name.into())),
        (Some(token), None) => token.to_string_lossy().into_owned(),
        (None, Some(path)) => {
            let path = PathBuf::from(path);
            let (text, is_exposed) = read_file(&path).map_err(|source| TokenError::File {
                variable: name.into(),
                path: path.clone(),
                source,
            })?;
            exposed_files.extend(is_exposed.then_some(path));
            text
        }
    };
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(TokenError::Unusable(name.into()));
    }
    let token = SecretString::from(token);
    if name == HEARTBEAT_URL && heartbeat_url(&token).is_none() {
        return Err(TokenError::HeartbeatUrl);
    }
    Ok(Some(token))
}

/// The URL of heartbeats, if the value is one.
pub(crate) fn heartbeat_url(text: &SecretString) -> Option<Url> {
    let url = Url::parse(text.expose_secret()).ok()?;
    (matches!(url.scheme(), "http" | "https") && url.has_host()).then_some(url)
}

fn allow(
    console: Option<&SecretString>,
    console_read: Option<&SecretString>,
    listen: Listen,
) -> Result<(), TokenError> {
    let Listen::At(address) = listen else {
        return Ok(());
    };
    for (name, token) in [(CONSOLE_TOKEN, console), (CONSOLE_READ_TOKEN, console_read)] {
        if token.is_some_and(|token| token.expose_secret().len() < MIN_CONSOLE_TOKEN) {
            return Err(TokenError::Short(name));
        }
    }
    match (console, console_read) {
        (None, Some(_)) => Err(TokenError::ReadOnly),
        (None, None) if !address.ip().is_loopback() => Err(TokenError::Open(address)),
        (Some(all), Some(read)) if all.expose_secret() == read.expose_secret() => {
            Err(TokenError::SameToken)
        }
        _ => Ok(()),
    }
}

/// The current bearer token, if any. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Token(Arc<RwLock<Option<SecretString>>>);

impl Token {
    /// The current token.
    pub fn get(&self) -> Option<SecretString> {
        let token = self.0.read().unwrap_or_else(PoisonError::into_inner);
        token.clone()
    }

    /// Whether this is the current token.
    fn is(&self, token: &SecretString) -> bool {
        self.get()
            .is_some_and(|now| now.expose_secret() == token.expose_secret())
    }

    fn set(&self, token: SecretString) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(token);
    }
}

impl From<Option<SecretString>> for Token {
    fn from(token: Option<SecretString>) -> Self {
        Self(Arc::new(RwLock::new(token)))
    }
}

/// The content of a token file, and whether all users of this machine may read or write it.
fn read_file(path: &Path) -> std::io::Result<(String, bool)> {
    let mut file = File::open(path)?;
    let metadata = file.metadata()?;
    let is_exposed = metadata.is_file() && metadata.permissions().mode() & 0o006 != 0;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok((text, is_exposed))
}
// These errors do not repeat the value, which may contain a secret.

fn base_url(text: &str) -> Result<Url, String> {
    // An `@` is refused anywhere, because a slash in a password makes the parser take the user for the host and the
    // password for a path.
    if text.contains('@') {
        return Err("a URL must not contain credentials; see --help on tokens".into());
    }
    let no_scheme = || Err("it has no scheme: put http:// or https:// in front".into());
    let url = match Url::parse(text) {
        Ok(url) => url,
        Err(url::ParseError::RelativeUrlWithoutBase) if !text.is_empty() => return no_scheme(),
        Err(error) => {
            return Err(format!(
                "{error}; expected a URL such as https://api.example"
            ));
        }
    };
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        // The parser takes the host in `localhost:8266` for a scheme.
        return match text.contains("://") {
            true => Err("expected http:// or https:// and a host".into()),
            false => no_scheme(),
        };
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("expected a host or a path at the end, without ? or #".into());
    }
    Ok(url)
}

/// A whole number, for any argument.
pub(crate) fn number<N: FromStr>(text: &str) -> Result<N, String> {
    text.parse()
        .map_err(|_| "expected a whole number such as 10".into())
}

fn up_to_256(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(count @ 1..=256) => Ok(count),
        _ => Err("expected a whole number from 1 to 256, such as 8".into()),
    }
}

pub(crate) fn at_least_one(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(count @ 1..) => Ok(count),
        _ => Err("expected a whole number from 1 to 4294967295, such as 10".into()),
    }
}

fn listen(text: &str) -> Result<Listen, String> {
    if text == "off" {
        return Ok(Listen::Off);
    }
    text.parse()
        .map(Listen::At)
        .map_err(|_| "expected an address such as 127.0.0.1:8268 or [::1]:8268, or off".into())
}

fn host(text: &str) -> Result<String, String> {
    match url::Host::parse(text) {
        Ok(host) => Ok(host.to_string()),
        Err(_) => Err("expected a host name such as sync.example, without a port".into()),
    }
}

/// The maximum of every duration, far below the range of a timestamp.
pub(crate) const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);

/// A length of time, for any argument.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(duration) if duration > LONGEST => Err("expected at most 100 years".into()),
        Ok(duration) => Ok(duration),
        Err(_) => {
            Err("expected a duration with its unit, such as 500ms, 10s, 5m, 1h or 30d".into())
        }
    }
}

pub(crate) fn positive(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        duration if duration < Duration::from_millis(1) => Err("expected at least 1ms".into()),
        duration => Ok(duration),
    }
}

fn verify_every(text: &str) -> Result<VerifyEvery, String> {
    if text == "off" {
        return Ok(VerifyEvery::Off);
    }
    positive(text)
        .map(VerifyEvery::Within)
        .map_err(|_| "expected a duration with its unit, such as 12h or 7d, or off".into())
}

pub(crate) fn at_least_a_second(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        duration if duration < Duration::from_secs(1) => Err("expected at least 1s".into()),
        duration => Ok(duration),
    }
}

pub(crate) fn point_in_time(text: &str) -> Result<Millis, String> {
    let time = chrono::DateTime::parse_from_rfc3339(text)
        .map_err(|_| "expected a point in time with its zone, such as 2026-11-22T22:00:00Z")?;
    Timestamp::from_unix(time.timestamp()).ok_or("expected a time between 1970 and 9999")?;
    Ok(Millis(time.timestamp_millis()))
}

fn event_name(text: &str) -> Result<String, String> {
    match text.trim() {
        "" => Err("expected the name of an event".into()),
        name => Ok(name.to_owned()),
    }
}

fn prefix(text: &str) -> Result<String, String> {
    if text.chars().any(|c| c.is_whitespace() || c.is_control()) || text.chars().count() > 100 {
        return Err("expected at most 100 characters and no white space".into());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// URLs that cannot work are refused with the reason.
    #[test]
    fn unusable_urls_are_refused() {
        for bad in [
            "127.0.0.1:8266",
            "ftp://host",
            "http://user:secret@host",
            "http://host/?a=b",
            "",
        ] {
            assert!(base_url(bad).is_err(), "{bad}");
        }
        assert!(base_url("https://host/api/v1/").is_ok());
    }

    /// Durations beyond any calculation are refused.
    #[test]
    fn unusable_durations_are_refused() {
        assert_eq!(positive("1ms"), Ok(Duration::from_millis(1)));
        assert_eq!(duration("0s"), Ok(Duration::ZERO));
        for bad in ["0s", "999us", "101y", "18446744073709551615s", "soon"] {
            assert!(positive(bad).is_err(), "{bad}");
        }
        assert!(duration("101y").is_err());
        assert!(at_least_a_second("999ms").is_err());
    }

    /// A token comes from one source, and is never shown.
    #[test]
    fn token_has_one_source() {
        let set = |pairs: &'static [(&str, &str)]| {
            Tokens::read(|name| {
                pairs
                    .iter()
                    .find(|(key, _)| *key == name)
                    .map(|(_, value)| value.into())
            })
        };
        let tokens = set(&[("BIGCHAT_SYNC_OUR_API_TOKEN", " s3cret\n")]).expect("a token");
        assert!(tokens.our_api.is(&"s3cret".into()));
        assert!(tokens.bigchat.get().is_none());
        assert!(!format!("{tokens:?}").contains("s3cret"));
        let both = set(&[
            ("BIGCHAT_SYNC_BIGCHAT_TOKEN", "a"),
            ("BIGCHAT_SYNC_BIGCHAT_TOKEN_FILE", "b"),
        ]);
        assert!(matches!(both, Err(TokenError::Both(_))));
        assert!(matches!(
            set(&[("BIGCHAT_SYNC_BIGCHAT_TOKEN", "")]),
            Err(TokenError::Unusable(_))
        ));
        assert!(matches!(
            set(&[("BIGCHAT_SYNC_BIGCHAT_TOKEN_FILE", "/does/not/exist")]),
            Err(TokenError::File { .. })
        ));
    }

    /// A reload replaces the tokens that can be used; the others stay as they are.
    #[test]
    fn reload_replaces_usable_tokens() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("token");
        let good = "a-token-that-cannot-be-guessed";
        for name in [BIGCHAT_TOKEN, OUR_API_TOKEN, CONSOLE_TOKEN] {
            let variable = |asked: &str| {
                (asked == format!("{name}_FILE")).then(|| file.clone().into_os_string())
            };
            std::fs::write(&file, good).expect("a file");
            let tokens = Tokens::read(variable).expect("a token");
            let [used] = [&tokens.bigchat, &tokens.our_api, &tokens.console]
                .into_iter()
                .filter(|token| token.get().is_some())
                .collect::<Vec<_>>()[..]
            else {
                panic!("one of them")
            };
            let reload = || tokens.reload(variable, Listen::At(DEFAULT_LISTEN));
            assert!(reload().is_empty(), "nothing is new");
            for bad in ["", " \n", "two words", "ä"] {
                std::fs::write(&file, bad).expect("a file");
                assert!(
                    matches!(reload()[..], [Err(TokenError::Unusable(_))]),
                    "{bad:?}"
                );
                assert!(used.is(&good.into()), "{bad:?}");
            }
            std::fs::remove_file(&file).expect("a file");
            assert!(matches!(reload()[..], [Err(TokenError::File { .. })]));
            let gone = tokens.reload(|_| None, Listen::Off);
            assert!(matches!(gone[..], [Err(TokenError::Gone(_))]));
            assert!(used.is(&good.into()));
            std::fs::write(&file, "another-token-that-cannot-be-guessed\n").expect("a file");
            assert!(matches!(reload()[..], [Ok(new)] if new == name));
            assert!(used.is(&"another-token-that-cannot-be-guessed".into()));
            std::fs::write(&file, "short").expect("a file");
            let short = reload();
            match name {
                CONSOLE_TOKEN => assert!(matches!(short[..], [Err(TokenError::Short(_))])),
                _ => assert!(matches!(short[..], [Ok(_)])),
            }
        }
    }

    /// The tokens from these variables, or why they cannot be used.
    fn console_tokens(pairs: &[(&str, &str)]) -> Result<(), TokenError> {
        let variable = |name: &str| {
            let pair = pairs.iter().find(|(set, _)| *set == name);
            pair.map(|(_, value)| OsString::from(value))
        };
        Tokens::read(variable)?.allow(Listen::At(DEFAULT_LISTEN))
    }

    #[test]
    fn read_token_needs_another_full_one() {
        let (one, other) = ("0123456789abcdef", "fedcba9876543210");
        let both = |all, read| console_tokens(&[(CONSOLE_TOKEN, all), (CONSOLE_READ_TOKEN, read)]);
        both(one, other).expect("two tokens");
        assert!(matches!(both(one, one), Err(TokenError::SameToken)));
        assert!(matches!(
            both(one, "short"),
            Err(TokenError::Short(CONSOLE_READ_TOKEN))
        ));
        assert!(matches!(
            console_tokens(&[(CONSOLE_READ_TOKEN, one)]),
            Err(TokenError::ReadOnly)
        ));
    }

    #[test]
    fn heartbeat_url_is_a_url() {
        for bad in ["hc.example/uuid", "ftp://hc.example/uuid", "https://"] {
            let read = console_tokens(&[(HEARTBEAT_URL, bad)]);
            let error = read.expect_err(bad).to_string();
            assert!(error.contains(HEARTBEAT_URL), "{error}");
            assert!(!error.contains("uuid"), "{error}");
        }
        console_tokens(&[(HEARTBEAT_URL, "https://hc.example/uuid")]).expect("a URL");
    }

    /// A token that is set only after the start is used from the next reload on.
    #[test]
    fn token_added_after_the_start() {
        let tokens = Tokens::default();
        let given = |name: &str| (name == CONSOLE_TOKEN).then(|| "0123456789abcdef".into());
        assert!(matches!(
            tokens.reload(given, Listen::Off)[..],
            [Ok(CONSOLE_TOKEN)]
        ));
        assert!(tokens.console.is(&"0123456789abcdef".into()));
        assert!(!format!("{tokens:?}").contains("0123456789abcdef"));
    }
}
