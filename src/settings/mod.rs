//! The settings, checked at start. Each is a flag and an environment variable named after the flag.

mod parse;
mod tokens;

use std::fmt;
use std::io::IsTerminal;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use url::Url;

pub(crate) use self::parse::{
    LONGEST, at_least_a_second, at_least_one, number, point_in_time, positive,
};
use self::parse::{base_url, duration, event_name, host, listen, prefix, up_to_256, verify_every};
pub(crate) use self::tokens::{BIGCHAT_TOKEN, OUR_API_TOKEN, heartbeat_url, token_variables};
pub use self::tokens::{Token, TokenError, Tokens};
use crate::domain::backoff::Policy;
use crate::domain::progress::{IdlePass, VerifyMode};
use crate::domain::time::Millis;
use crate::telemetry::log::LogFormat;

/// The default address of the console.
pub const DEFAULT_LISTEN: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8268));

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

    /// Database file; the daemon and `once` create it if it is missing [default: bigchat-sync.db in $STATE_DIRECTORY,
    /// else in the working directory].
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

    /// Time from which to read BigChat, RFC 3339 such as 2026-11-22T22:00:00Z; used until BigChat has answered for the
    /// first time [default: 10 s before the first start].
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

    /// Address of the console, the health endpoints and the metrics, or `off`. An address other than loopback requires
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
    pub fn db(&self) -> PathBuf {
        const NAME: &str = "bigchat-sync.db";
        match (&self.db, std::env::var_os("STATE_DIRECTORY")) {
            (Some(db), _) => db.clone(),
            (None, Some(directory)) => PathBuf::from(directory).join(NAME),
            (None, None) => PathBuf::from(NAME),
        }
    }

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

    /// The retry policy of events.
    pub fn retry(&self) -> Policy {
        Policy {
            initial: self.retry_initial,
            max: self.retry_max,
            max_attempts: self.max_attempts,
        }
    }
}
