//! The log: standard error, as lines for people or as JSON, rate-limited.
//!
//! A limited number of lines of each kind (each place in the code that logs) is written. Further ones are counted until
//! the next summary, which reports the count. So an operator sees each kind of problem, even if a thousand
//! conversations have one of them.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::collections::HashMap;
use std::fmt::{self, Write};
use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, Mutex};

use chrono::{SecondsFormat, Utc};
use clap::ValueEnum;
use serde_json::json;
use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::fmt::format::{self, debug_fn};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry};

use crate::mutex::lock;
use crate::telemetry::terminal::{Terminal, printable};

/// How many lines of a kind are written between two summaries.
pub const BURST: u32 = 10;

/// The modules whose lines summarize others and are never left out.
const NEVER_LEFT_OUT: [&str; 3] = [
    module_path!(),
    "bigchat_sync::daemon::progress",
    "bigchat_sync::daemon::summary",
];

/// What this process has logged since the latest summary.
static LINES: LazyLock<Mutex<HashMap<Identifier, Lines>>> = LazyLock::new(Mutex::default);

/// `--log-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Human-readable lines.
    Text,
    /// One JSON object per line.
    Json,
}

/// The lines of one kind.
#[derive(Debug, Default)]
struct Lines {
    count: u32,
    /// The message of the first line left out.
    message: String,
}

/// Logs a warning if the condition is true, else the same line at debug level.
macro_rules! log_at {
    ($is_warning:expr, $($line:tt)+) => {
        if $is_warning {
            tracing::warn!($($line)+);
        } else {
            tracing::debug!($($line)+);
        }
    };
}

pub(crate) use log_at;

/// Whether requests and responses are logged completely (`--log-message-text`).
static MESSAGE_TEXT: AtomicBool = AtomicBool::new(false);

/// Sets whether requests and responses are logged completely.
pub fn show_message_text(enabled: bool) {
    MESSAGE_TEXT.store(enabled, Ordering::Relaxed);
}

/// Whether the log may contain customers' text and advisors' names.
pub(crate) fn shows_message_text() -> bool {
    MESSAGE_TEXT.load(Ordering::Relaxed)
}

/// The filter in `RUST_LOG`, if it is set. A filter that is not about this program is an error, and so is a mistyped
/// level, which is otherwise a valid filter for a module of that name.
fn filter() -> Result<Option<EnvFilter>, String> {
    let set = std::env::var_os(EnvFilter::DEFAULT_ENV).unwrap_or_default();
    let Some(set) = set.to_str() else {
        return Err("it is not UTF-8".to_owned());
    };
    if set.is_empty() {
        return Ok(None);
    }
    let filter = EnvFilter::try_new(set).map_err(|error| error.to_string())?;
    match set.split(',').any(is_about_us) {
        true => Ok(Some(filter)),
        false => Err(format!(
            "{set} is neither a level nor about a module of this program"
        )),
    }
}

/// Whether a directive of a filter is about all modules, or about some of this program.
fn is_about_us(directive: &str) -> bool {
    const US: &str = env!("CARGO_CRATE_NAME");
    let target = directive
        .split(['=', '['])
        .next()
        .unwrap_or_default()
        .trim();
    target.parse::<LevelFilter>().is_ok() || target.starts_with(US) || US.starts_with(target)
}

/// Starts the log at a level, which RUST_LOG can change.
pub fn start(format: LogFormat, level: &str, terminal: &Terminal) {
    let (filter, invalid) = match filter() {
        Ok(filter) => (filter, None),
        Err(reason) => (None, Some(reason)),
    };
    let filter = filter.unwrap_or_else(|| EnvFilter::new(level));
    // At levels debug and trace, all lines are written.
    let bounded = filter.max_level_hint() <= Some(LevelFilter::INFO);
    let lines = tracing_subscriber::fmt::layer().with_writer(terminal.log(format));
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match format {
        LogFormat::Text => lines
            .fmt_fields(debug_fn(write_field).delimited(" "))
            .with_target(false)
            .with_ansi(io::stderr().is_terminal())
            .boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry()
        .with(lines)
        .with(filter)
        .with(bounded.then_some(Bound))
        .init();
    // The default hook writes to standard error directly, and blocks if nothing reads it.
    std::panic::set_hook(Box::new(|panic| {
        let backtrace = Backtrace::capture();
        let backtrace = match backtrace.status() {
            BacktraceStatus::Captured => format!("\n{backtrace}"),
            _ => String::new(),
        };
        tracing::error!(reason = %format_args!("{panic}{backtrace}"), "panicked; this is a bug");
    }));
    if let Some(reason) = invalid {
        tracing::warn!(
            reason,
            "RUST_LOG is ignored; set it to error, warn, info, debug or trace"
        );
    }
}

/// Writes a field of a line of text. A value is quoted if its end would not be clear otherwise.
fn write_field(
    writer: &mut format::Writer<'_>,
    field: &Field,
    value: &dyn fmt::Debug,
) -> fmt::Result {
    if field.name().starts_with("log.") {
        // These fields name the place in a library's code that wrote the line.
        return Ok(());
    }
    let text = format!("{value:?}");
    if field.name() == "message" {
        return writer.write_str(&printable(&text));
    }
    let is_plain = |c: char| !c.is_whitespace() && !c.is_control() && c != '"';
    if text.starts_with('"') || text.chars().all(is_plain) {
        write!(writer, "{field}={}", printable(&text))
    } else {
        write!(writer, "{field}={text:?}")
    }
}

/// The line that reports lost lines. It bypasses the log, which lost them.
pub(crate) fn lost(format: LogFormat, lines: u64) -> String {
    const MESSAGE: &str =
        "log lines were lost, because standard error was not read or could not be written";
    let now = Utc::now().to_rfc3339_opts(SecondsFormat::Micros, true);
    match format {
        LogFormat::Text => format!("{now} ERROR {MESSAGE} lines={lines}\n"),
        LogFormat::Json => {
            let line = json!({
                "timestamp": now, "level": "ERROR", "message": MESSAGE, "lines": lines, "target": module_path!(),
            });
            format!("{line}\n")
        }
    }
}

/// Reports the lines left out since the previous call, and resets the counts. Returns whether there were any.
pub fn report_left_out() -> bool {
    let mut left_out: Vec<Lines> = std::mem::take(&mut *lock(&LINES)).into_values().collect();
    left_out.retain(|lines| lines.count > BURST);
    for Lines { count, message } in &left_out {
        tracing::warn!(lines = count - BURST, like = %message, "left out of the log");
    }
    !left_out.is_empty()
}

/// The filter that leaves lines out.
struct Bound;

impl<S: Subscriber> Layer<S> for Bound {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if NEVER_LEFT_OUT.contains(&metadata.target()) {
            return true;
        }
        let mut lines = lock(&LINES);
        let lines = lines.entry(metadata.callsite()).or_default();
        lines.count = lines.count.saturating_add(1);
        if lines.count == BURST + 1 {
            event.record(&mut Message(&mut lines.message));
        }
        lines.count <= BURST
    }
}

/// Extracts an event's message from its fields.
struct Message<'a>(&'a mut String);

impl Visit for Message<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            // Writing to a string cannot fail.
            write!(self.0, "{value:?}").ok();
        }
    }
}
