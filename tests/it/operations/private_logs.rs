//! No log and no status contains customers' texts or advisors' names and addresses, unless a setting allows it.

use crate::harness::process::Process;
use crate::harness::{Test, run_test, side_by_side};
use bigchat_sync::simulator::bigchat::raw;
use bigchat_sync::simulator::event::{message, start};
use bigchat_sync::simulator::fault::{Fault, status};
use serde_json::json;

/// A part of each text, name and address.
const SECRET: &str = "S3cret";

/// A response that repeats the request, as validators do.
fn echo(code: u16) -> Fault {
    let wrong = json!({"detail": [{"loc": ["body", "text"], "msg": "no: S3cret words", "input": "S3cret words"}]});
    status(code).body(wrong.to_string()).always()
}

/// A failure of a request that contains a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Case {
    MessageRefused,
    MessageFailsAgain,
    OurApiDown,
    OurApiDenies,
    AgentRefused,
    BigChatUnusable,
}

impl Case {
    const ALL: [Self; 6] = [
        Self::MessageRefused,
        Self::MessageFailsAgain,
        Self::OurApiDown,
        Self::OurApiDenies,
        Self::AgentRefused,
        Self::BigChatUnusable,
    ];

    /// Text of the resulting line in the log.
    fn line(self) -> &'static str {
        match self {
            Self::MessageRefused => "OurAPI permanently rejects an event",
            Self::MessageFailsAgain => "delivery failed",
            Self::OurApiDown | Self::OurApiDenies => "OurAPI is down",
            Self::AgentRefused => "OurAPI does not accept an agent",
            Self::BigChatUnusable => "BigChat is down",
        }
    }

    fn begin(self, t: &Test) {
        t.bigchat.advisor(1, "Ann S3cret", "ann.S3cret@x.test");
        let events = [start(42, 0), message(42, 5, "S3cret words")];
        match self {
            Self::MessageRefused => t.our_api.upset("POST /chats/c1/messages*", echo(422)),
            Self::MessageFailsAgain => t.our_api.upset("POST /chats/c1/messages*", echo(500)),
            Self::OurApiDown => t.our_api.upset("*", echo(503)),
            Self::OurApiDenies => t.our_api.upset("*", echo(401)),
            Self::AgentRefused => t.our_api.upset("POST /agents*", echo(422)),
            Self::BigChatUnusable => {
                let broken = r#"{"events":[{"message":"S3cret words"}"#;
                return (0..100).for_each(|_| t.bigchat.reports(raw(broken)));
            }
        }
        t.bigchat.reports(events);
    }
}

/// The log and the status after the case.
async fn log_and_status(t: &Test, case: Case, allowed: &str) -> String {
    t.set("--log-message-text", allowed);
    case.begin(t);
    let mut program = t.program("run");
    program.env("RUST_LOG", "bigchat_sync=debug");
    let daemon = Process::start_as(t, program);
    daemon.until_logged(case.line()).await;
    let mut status = String::new();
    if !matches!(case, Case::MessageRefused) {
        // The status would show the reasons of failed events, which are OurAPI's own words.
        status = t.status().0.to_string();
    }
    let log = daemon.log();
    assert!(daemon.stop().await.success());
    log + &status
}

/// Neither the log nor the status contains texts, names or addresses.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_message_text_is_off() {
    side_by_side(Case::ALL, async |case| {
        run_test(async |t| {
            t.differs("the faults last to the end");
            let text = log_and_status(t, case, "false").await;
            assert!(!text.contains(SECRET), "{case:?}: {text}");
        })
        .await;
    })
    .await;
}

/// Requests and responses are logged completely.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_message_text_is_on() {
    side_by_side(Case::ALL, async |case| {
        run_test(async |t| {
            t.differs("the faults last to the end");
            let text = log_and_status(t, case, "true").await;
            assert!(text.contains("S3cret words"), "{case:?}: {text}");
        })
        .await;
    })
    .await;
}
