//! The daemon's metrics, and Prometheus' text format.
//!
//! Counters and durations are those of this process, and start at zero with it. State that outlives the process
//! (waiting and failed events, the distance behind BigChat) is read from the journal on request, and not duplicated
//! here. There is no global registry: each daemon has its own.

mod counts;

use std::fmt::Write;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode_registry;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use reqwest::StatusCode;

pub use self::counts::Counts;
use crate::domain::event::EventKind;
use crate::domain::named::named;
use crate::domain::progress::Outcome;
use crate::http::route::Route;
use crate::http::{Api, ErrorKind, RequestObserver};
use crate::journal::UNREADABLE;

/// The prefix of every name.
const PREFIX: &str = "bigchat_sync";

/// Upper bounds of request durations, in seconds: from a fast service on this machine to a time-out.
const SECONDS: [f64; 12] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0,
];

/// The daemon's own metrics.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Requests,
    polls: Family<PollLabels, Counter>,
    received: Family<KindLabels, Counter>,
    ignored: Counter,
    attempts: Family<AttemptLabels, Counter>,
    unknown_outcomes: Counter,
    rebuilt: Family<RebuiltLabels, Counter>,
    panics: Counter,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    api: &'static str,
    route: &'static str,
    status: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabels {
    api: &'static str,
    route: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PollLabels {
    outcome: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    kind: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AttemptLabels {
    kind: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RebuiltLabels {
    chat: &'static str,
}

named! {
    /// The outcome of a poll.
    Poll {
        /// The window was read to its end.
        Complete = "complete",
        /// The next poll continues: there were too many pages, or one of them could not be read.
        Incomplete = "incomplete",
        /// BigChat sent no usable response.
        BigChatFailed = "bigchat_failed",
        JournalFailed = "journal_failed",
    }
}

#[derive(Debug, Clone, Copy)]
struct ForRequests;

impl MetricConstructor<Histogram> for ForRequests {
    fn new_metric(&self) -> Histogram {
        Histogram::new(SECONDS)
    }
}

/// Counts the requests to both APIs.
#[derive(Debug, Clone)]
struct Requests {
    total: Family<RequestLabels, Counter>,
    durations: Family<RouteLabels, Histogram, ForRequests>,
}

/// Counts the requests to one API.
#[derive(Debug, Clone)]
pub struct ApiRequests {
    api: &'static str,
    requests: Requests,
}

impl RequestObserver for ApiRequests {
    fn request_made(&self, route: Route, answer: Result<StatusCode, ErrorKind>, took: Duration) {
        let status = match answer {
            Ok(status) => code(status),
            Err(ErrorKind::Unreachable) => "not_sent",
            Err(ErrorKind::OutcomeUnknown { timed_out: true }) => "timed_out",
            Err(ErrorKind::OutcomeUnknown { .. }) => "lost",
            // The request was not sent.
            Err(_) => return,
        };
        let (api, route) = (self.api, route.name());
        self.requests
            .total
            .get_or_create(&RequestLabels { api, route, status })
            .inc();
        self.requests
            .durations
            .get_or_create(&RouteLabels { api, route })
            .observe(took.as_secs_f64());
    }
}

/// A status as a label. Unknown ones share a label, because a server could invent any number of them.
fn code(status: StatusCode) -> &'static str {
    const KNOWN: [(u16, &str); 16] = [
        (200, "200"),
        (201, "201"),
        (204, "204"),
        (400, "400"),
        (401, "401"),
        (403, "403"),
        (404, "404"),
        (408, "408"),
        (409, "409"),
        (422, "422"),
        (425, "425"),
        (429, "429"),
        (500, "500"),
        (502, "502"),
        (503, "503"),
        (504, "504"),
    ];
    let status = status.as_u16();
    match KNOWN.iter().find(|(known, _)| *known == status) {
        Some((_, name)) => name,
        None => match status / 100 {
            1 => "1xx",
            2 => "2xx",
            3 => "3xx",
            4 => "4xx",
            5 => "5xx",
            _ => "other",
        },
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Registry::with_prefix(PREFIX),
            requests: Requests {
                total: Family::default(),
                durations: Family::new_with_constructor(ForRequests),
            },
            polls: Family::default(),
            received: Family::default(),
            ignored: Counter::default(),
            attempts: Family::default(),
            unknown_outcomes: Counter::default(),
            rebuilt: Family::default(),
            panics: Counter::default(),
        };
        // All series begin at zero, so that a first failure is an increase.
        for poll in Poll::ALL {
            metrics.poll(poll).inc_by(0);
        }
        metrics.received(UNREADABLE, 0);
        for kind in EventKind::ALL.map(EventKind::name) {
            metrics.received(kind, 0);
            for outcome in OUTCOMES {
                let labels = AttemptLabels { kind, outcome };
                metrics.attempts.get_or_create(&labels).inc_by(0);
            }
        }
        for chat in [MISSING, DIFFERS] {
            metrics
                .rebuilt
                .get_or_create(&RebuiltLabels { chat })
                .inc_by(0);
        }
        metrics.registered()
    }
}

/// The outcomes of an attempt.
const OUTCOMES: [&str; 3] = ["delivered", "waiting", "failed"];

/// Why a chat is repaired.
const MISSING: &str = "missing";
const DIFFERS: &str = "differs";

impl Metrics {
    fn registered(mut self) -> Self {
        let registry = &mut self.registry;
        registry.register(
            "requests",
            "Requests, by API, route and status; without a status: not_sent, lost (no complete response) or timed_out",
            self.requests.total.clone(),
        );
        registry.register_with_unit(
            "request_duration",
            "Duration of requests, by API and route",
            Unit::Seconds,
            self.requests.durations.clone(),
        );
        registry.register("polls", "Polls of BigChat, by outcome", self.polls.clone());
        registry.register(
            "events_received",
            "New events received, by kind",
            self.received.clone(),
        );
        registry.register(
            "events_ignored",
            "Events dropped by --ignore-events",
            self.ignored.clone(),
        );
        registry.register(
            "event_attempts",
            "Attempts to deliver an event, by kind and outcome; waiting: the event will be retried",
            self.attempts.clone(),
        );
        registry.register(
            "unknown_outcomes",
            "Attempts of unknown outcome; their chats are read back",
            self.unknown_outcomes.clone(),
        );
        registry.register(
            "chats_rebuilt",
            "Repaired chats that were missing in OurAPI or differed",
            self.rebuilt.clone(),
        );
        registry.register(
            "handler_panics",
            "Panics in handlers; each is a bug",
            self.panics.clone(),
        );
        self
    }

    /// The totals, without labels.
    pub fn counts(&self) -> Counts {
        let kinds = EventKind::ALL.map(EventKind::name);
        let polls = |poll| self.poll(poll).get();
        let received = |kind| self.received.get_or_create(&KindLabels { kind }).get();
        let attempted = |outcome| -> u64 {
            let labels = kinds.map(|kind| AttemptLabels { kind, outcome });
            let counts = labels.map(|labels| self.attempts.get_or_create(&labels).get());
            counts.iter().sum()
        };
        let [delivered, waiting, failed] = OUTCOMES;
        let unreadable = received(UNREADABLE);
        Counts {
            polls: Poll::ALL.map(polls).iter().sum(),
            polls_failed: polls(Poll::BigChatFailed) + polls(Poll::JournalFailed),
            received: kinds.map(received).iter().sum::<u64>() + unreadable,
            delivered: attempted(delivered),
            attempts_failed: attempted(waiting),
            failed: attempted(failed) + unreadable,
        }
    }

    /// The counters of requests to an API.
    pub fn requests_to(&self, api: Api) -> ApiRequests {
        ApiRequests {
            api: api.name(),
            requests: self.requests.clone(),
        }
    }

    pub fn polled(&self, poll: Poll) {
        self.poll(poll).inc();
    }

    fn poll(&self, poll: Poll) -> Counter {
        let outcome = poll.name();
        self.polls.get_or_create_owned(&PollLabels { outcome })
    }

    /// Counts events dropped by `--ignore-events`.
    pub fn ignored(&self, count: usize) {
        self.ignored.inc_by(count as u64);
    }

    /// Counts new events of a kind.
    pub fn received(&self, kind: &'static str, count: u32) {
        self.received
            .get_or_create(&KindLabels { kind })
            .inc_by(count.into());
    }

    pub fn attempted(&self, kind: EventKind, outcome: &Outcome) {
        let [delivered, waiting, failed] = OUTCOMES;
        let outcome = match outcome {
            Outcome::Delivered(_) => delivered,
            Outcome::Retry { .. } => waiting,
            Outcome::DeadLetter { .. } => failed,
        };
        let kind = kind.name();
        self.attempts
            .get_or_create(&AttemptLabels { kind, outcome })
            .inc();
    }

    /// Counts an attempt of unknown outcome.
    pub fn unknown_outcome(&self) {
        self.unknown_outcomes.inc();
    }

    /// Counts a chat that OurAPI had lost and that is being rebuilt.
    pub fn chat_was_missing(&self) {
        let chat = MISSING;
        self.rebuilt.get_or_create(&RebuiltLabels { chat }).inc();
    }

    /// Counts a chat that differed from the journal and is being repaired.
    pub fn chat_differed(&self) {
        let chat = DIFFERS;
        self.rebuilt.get_or_create(&RebuiltLabels { chat }).inc();
    }

    pub fn panicked(&self) {
        self.panics.inc();
    }

    /// All metrics in Prometheus' text format, including the current values.
    pub fn text(&self, now: &Now) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode_registry(&mut text, &self.registry)?;
        encode_registry(&mut text, &now.0)?;
        Ok(classic(&text))
    }
}

/// The current values, written together with the counters.
#[derive(Debug)]
pub struct Now(Registry);

impl Default for Now {
    fn default() -> Self {
        Self(Registry::with_prefix(PREFIX))
    }
}

impl Now {
    /// Adds a value.
    pub fn gauge(&mut self, name: &str, help: &str, value: f64) {
        let gauge = Gauge::<f64, AtomicU64>::default();
        gauge.set(value);
        self.0.register(name, help, gauge);
    }

    /// Adds a value for each of several things, distinguished by a label.
    pub fn gauges<'a>(
        &mut self,
        name: &str,
        help: &str,
        label: &'static str,
        values: impl IntoIterator<Item = (&'a str, f64)>,
    ) {
        let gauges = Family::<[(&'static str, String); 1], Gauge<f64, AtomicU64>>::default();
        for (of, value) in values {
            gauges.get_or_create(&[(label, of.to_owned())]).set(value);
        }
        self.0.register(name, help, gauges);
    }

    /// Adds facts as labels of a value that is always 1. Unknown ones are left out.
    pub fn info<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        facts: [(&'static str, Option<&'static str>); N],
    ) {
        let known = facts
            .into_iter()
            .filter_map(|(name, fact)| Some((name, fact?)));
        let labels: Vec<(&'static str, &'static str)> = known.collect();
        let gauges = Family::<Vec<(&'static str, &'static str)>, Gauge<f64, AtomicU64>>::default();
        gauges.get_or_create(&labels).set(1.0);
        self.0.register(name, help, gauges);
    }

    /// Adds a growing sum of time that is measured elsewhere.
    pub fn seconds(&mut self, name: &str, help: &str, value: Duration) {
        let counter = Counter::<f64, AtomicU64>::default();
        counter.inc_by(value.as_secs_f64());
        self.0
            .register_with_unit(name, help, Unit::Seconds, counter);
    }

    /// Adds a growing count that is counted elsewhere.
    pub fn counter(&mut self, name: &str, help: &str, value: u64) {
        let counter: Counter = Counter::default();
        counter.inc_by(value);
        self.0.register(name, help, counter);
    }
}

/// Converts OpenMetrics to the older format that every reader accepts. There a counter has the name of its sample, and
/// units have no line.
fn classic(text: &str) -> String {
    let mut classic = String::with_capacity(text.len() + 1024);
    let mut help = "";
    for line in text.lines() {
        if line.starts_with("# HELP ") {
            help = line;
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap_or((kind, "untyped"));
            let suffix = if kind == "counter" { "_total" } else { "" };
            let rest = help
                .strip_prefix("# HELP ")
                .and_then(|help| help.strip_prefix(name))
                .unwrap_or_default();
            // Writing to a string cannot fail.
            writeln!(classic, "# HELP {name}{suffix}{rest}").ok();
            writeln!(classic, "# TYPE {name}{suffix} {kind}").ok();
        } else if !line.starts_with('#') {
            classic.push_str(line);
            classic.push('\n');
        }
    }
    classic
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::conversation::Attempts;
    use crate::domain::progress::{Effect, Failure};
    use crate::domain::time::Millis;

    /// A server that invents statuses adds no series.
    #[test]
    fn unknown_statuses_share_a_series() {
        let metrics = Metrics::default();
        let requests = metrics.requests_to(Api::OurApi);
        for status in 100..1000 {
            let status = StatusCode::from_u16(status).expect("a status");
            requests.request_made(Route::Chats, Ok(status), Duration::ZERO);
        }
        let text = metrics.text(&Now::default()).expect("a text");
        let series = text
            .lines()
            .filter(|line| line.starts_with("bigchat_sync_requests_total"));
        assert_eq!(series.count(), 22);
    }

    /// An event that cannot be parsed is received and failed at once.
    #[test]
    fn totals_are_sums_over_labels() {
        let metrics = Metrics::default();
        for poll in Poll::ALL {
            metrics.polled(poll);
        }
        let (attempts, failure) = (Attempts::default(), Failure::default());
        let waits = Outcome::Retry {
            attempts,
            next_at: Millis(0),
            failure: failure.clone(),
        };
        let failed = Outcome::DeadLetter {
            attempts,
            failure,
            permanent: false,
        };
        for kind in EventKind::ALL {
            metrics.received(kind.name(), 10);
            metrics.attempted(kind, &Outcome::Delivered(Effect::Nothing));
            metrics.attempted(kind, &failed);
        }
        metrics.attempted(EventKind::Message, &waits);
        metrics.received(UNREADABLE, 3);
        let kinds = EventKind::ALL.len() as u64;
        let expected = Counts {
            polls: 4,
            polls_failed: 2,
            received: 10 * kinds + 3,
            delivered: kinds,
            attempts_failed: 1,
            failed: kinds + 3,
        };
        assert_eq!(metrics.counts(), expected);
    }

    #[test]
    fn counter_names_equal_their_samples() {
        let metrics = Metrics::default();
        metrics.unknown_outcome();
        let timed_out = Err(ErrorKind::OutcomeUnknown { timed_out: true });
        metrics.requests_to(Api::BigChat).request_made(
            Route::Events,
            timed_out,
            Duration::from_millis(4),
        );
        let mut now = Now::default();
        now.gauge("waiting_events", "Events that wait", 3.0);
        now.gauges("up", "Up", "api", [("a\"b", 1.0)]);
        let text = metrics.text(&now).expect("a text");
        for line in [
            "# TYPE bigchat_sync_unknown_outcomes_total counter",
            "bigchat_sync_unknown_outcomes_total 1",
            "# TYPE bigchat_sync_request_duration_seconds histogram",
            r#"bigchat_sync_request_duration_seconds_bucket{le="0.005",api="bigchat",route="GET /events"} 1"#,
            r#"bigchat_sync_requests_total{api="bigchat",route="GET /events",status="timed_out"} 1"#,
            "# HELP bigchat_sync_waiting_events Events that wait.",
            "bigchat_sync_waiting_events 3.0",
            r#"bigchat_sync_up{api="a\"b"} 1.0"#,
            r#"bigchat_sync_polls_total{outcome="bigchat_failed"} 0"#,
        ] {
            assert!(text.lines().any(|one| one == line), "{line} in\n{text}");
        }
        assert!(
            !text.contains("# EOF") && !text.contains("# UNIT"),
            "{text}"
        );
    }
}
