//! Access to the journal for tests, by the program's own operations if they exist, and otherwise by SQL.
//!
//! SQL is used to read the view `event_states` and data that no command shows, and to make changes that would otherwise
//! take too long, such as an hour's wait or a thousand failed events.

use std::fmt::Display;

use bigchat_sync::cli::{Cli, Command, CommandError, failed};
use bigchat_sync::domain::ids::EventId;
use bigchat_sync::domain::time::{Millis, Timestamp};
use bigchat_sync::http::{Api, ApiState};
use bigchat_sync::journal::{FailedAttempt, FailedEvent, Figures, PastResolution, Store};
use bigchat_sync::simulator::event::T0;
use clap::Parser;
use rusqlite::Connection;
use rusqlite::types::FromSql;
use serde_json::{Value, json};

use crate::harness::{Bench, TIME_LIMIT, Test, until};

impl Bench {
    /// Whether the daemon has created the database.
    pub(crate) fn is_ready(&self) -> bool {
        self.db().exists()
            && self.value::<i64>("SELECT count(*) FROM sqlite_master WHERE name = 'control'") == 1
    }

    /// How many events are in a state: waiting, delivered, failed or discarded.
    pub(crate) fn events(&self, state: &str) -> i64 {
        self.count_events(&format!("state = '{state}'"))
    }

    /// The number of events in the view `event_states` that match a condition.
    pub(crate) fn count_events(&self, condition: &str) -> i64 {
        self.value(&format!(
            "SELECT count(*) FROM event_states WHERE {condition}"
        ))
    }

    /// Waits until this many events are in a state.
    pub(crate) async fn until_events(&self, state: &str, count: i64) {
        until(&format!("{count} events {state}"), async || {
            self.is_ready() && self.events(state) == count
        })
        .await;
    }

    fn store(&self) -> Store {
        Store::open_shared(&self.db()).expect("a database")
    }

    /// The status of the journal; `None`: the daemon has not created it yet.
    fn figures(&self) -> Option<Figures> {
        if !self.is_ready() {
            return None;
        }
        match Store::open_reader(&self.db()) {
            Ok(mut store) => Some(store.figures(Millis::now()).expect("the figures")),
            Err(error) if error.is_transient() => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// The time up to which BigChat was read, in seconds after 22:00:00.
    pub(crate) fn cursor(&self) -> Option<i64> {
        let cursor = self
            .figures()
            .and_then(|figures| figures.cursor_at.map(Timestamp::unix));
        cursor.map(|cursor| cursor - T0)
    }

    /// Waits until the cursor is at a time.
    pub(crate) async fn until_cursor(&self, at: i64) {
        until(&format!("the cursor is at {at}"), async || {
            self.cursor() == Some(at)
        })
        .await;
    }

    /// Waits until the first poll is complete.
    pub(crate) async fn until_polled(&self) {
        until("a poll", async || self.cursor().is_some()).await;
    }

    /// Waits until the windows of the polls begin after `now`. After a restart, chats with earlier events would be read
    /// back anyway.
    pub(crate) async fn until_cursor_passes(&self, now: i64) {
        until("a later window", async || self.cursor() > Some(now + 1)).await;
    }

    /// Whether an API counts as up. A failing one does, until it is down. `None`: neither a success nor an outage has
    /// been recorded yet.
    pub(crate) fn is_up(&self, api: Api) -> Option<bool> {
        let figures = self.figures()?;
        let state = match api {
            Api::BigChat => figures.bigchat.state,
            Api::OurApi => figures.our_api.state,
        };
        match state {
            ApiState::Unknown => None,
            ApiState::Up | ApiState::Failing => Some(true),
            ApiState::Down => Some(false),
        }
    }

    /// How many restarts of BigChat were noticed.
    pub(crate) fn restarts(&self) -> u64 {
        self.figures().expect("a journal").restarts
    }

    /// How many losses in OurAPI were noticed.
    pub(crate) fn losses(&self) -> u64 {
        self.figures().expect("a journal").losses
    }

    /// The largest number of failed attempts at one event. No command shows this number for each waiting event.
    pub(crate) fn attempts(&self) -> i64 {
        match self.is_ready() {
            true => self.value("SELECT coalesce(max(attempts), 0) FROM attempts"),
            false => 0,
        }
    }

    /// The largest number of counted attempts at one event. No command shows which attempts counted.
    pub(crate) fn counted_attempts(&self) -> i64 {
        self.value("SELECT coalesce(max(counted), 0) FROM attempts")
    }

    /// The number of events with an attempt of unknown outcome. No command shows that once they are delivered.
    pub(crate) fn unknown_outcomes(&self) -> i64 {
        self.value("SELECT count(*) FROM attempts WHERE outcome_unknown = 1")
    }

    /// The end of an API's rate limit, in Unix ms; 0: it never had one. No command shows that.
    pub(crate) fn limited_until(&self, api: Api) -> i64 {
        let name = api.name();
        self.value(&format!(
            "SELECT coalesce(max(limited_until), 0) FROM api_status WHERE name = '{name}'"
        ))
    }

    /// Moves the end of a rate limit, because a test cannot wait for an hour.
    pub(crate) fn set_limited_until(&self, api: Api, at: i64) {
        let name = api.name();
        self.execute(&format!(
            "UPDATE api_status SET limited_until = {at} WHERE name = '{name}'"
        ));
    }

    /// The id of the latest event of a kind.
    pub(crate) fn latest(&self, kind: &str) -> i64 {
        self.value(&format!(
            "SELECT max(id) FROM event_states WHERE kind = '{kind}'"
        ))
    }

    /// The failed events.
    pub(crate) fn failed(&self) -> Vec<FailedEvent> {
        self.store().failed(1000, None).expect("the failed events")
    }

    /// The failed attempts at an event, latest first.
    pub(crate) fn failed_attempts(&self, event: i64) -> Vec<FailedAttempt> {
        let attempts = self.store().failed_attempts(EventId(event));
        attempts.expect("the failed attempts")
    }

    /// The resolutions of failed events, earliest first.
    pub(crate) fn resolutions(&self) -> Vec<PastResolution> {
        let resolutions = self.store().resolutions(None, None, 1000);
        let mut resolutions = resolutions.expect("the resolutions");
        resolutions.reverse();
        resolutions
    }

    /// Runs `bigchat-sync failed` with these arguments, whether or not a daemon is running.
    pub(crate) fn failed_command(&self, arguments: &[&str]) -> Result<String, CommandError> {
        let line = ["bigchat-sync", "failed"].iter().chain(arguments);
        match Cli::try_parse_from(line).expect("a good command").command {
            Some(Command::Failed(command)) => failed::run(&self.db(), command),
            other => panic!("not a `failed` command: {other:?}"),
        }
    }

    /// What `bigchat-sync status --json` prints, and whether its exit code is 0.
    pub(crate) fn status(&self) -> (Value, bool) {
        let output = self.program("status").arg("--json").output();
        let output = output.expect("a process");
        let status = serde_json::from_slice(&output.stdout);
        (status.expect("JSON"), output.status.success())
    }

    /// One value from the database, by SQL.
    pub(crate) fn value<T: FromSql>(&self, sql: &str) -> T {
        let connection = self.connection();
        connection.query_row(sql, [], |row| row.get(0)).expect(sql)
    }

    /// Changes the database, by SQL.
    pub(crate) fn execute(&self, sql: &str) {
        self.connection().execute_batch(sql).expect(sql);
    }

    /// Locks the database against writes of other processes until this is dropped.
    pub(crate) fn lock_database(&self) -> Connection {
        let connection = self.connection();
        let begun = connection.execute_batch("BEGIN IMMEDIATE");
        begun.expect("no transaction lasts longer than the busy timeout");
        connection
    }

    fn connection(&self) -> Connection {
        let connection = Connection::open(self.db()).expect("a database");
        connection.busy_timeout(TIME_LIMIT).expect("a busy timeout");
        connection
    }
}

impl Test {
    /// Fills a new journal by SQL.
    pub(crate) async fn fill(&self, sql: &str) {
        self.differs("the journal is filled by hand");
        self.once().await;
        self.execute(sql);
    }
}

/// SQL that inserts conversation 42 with key 100 into the journal.
pub(crate) const CONVERSATION: &str =
    "INSERT INTO conversations (id, epoch, bigchat_id) VALUES (100, 1, 42);";

/// SQL that inserts a dead letter with this many failed attempts. `conversation` is the key of the conversation or an
/// SQL expression for the key.
pub(crate) fn dead_letter(
    id: impl Display,
    conversation: impl Display,
    kind: &str,
    data: &str,
    reason: &str,
    attempts: u32,
) -> String {
    let data = data.replace('\'', "''");
    format!(
        "INSERT INTO events (id, conversation, kind, event_at, data, fingerprint, received_at)
         VALUES ({id}, {conversation}, '{kind}', 1795384800, '{data}', {id}, 1000);
         INSERT INTO attempts (event, conversation, attempts, counted, reason, request, response)
         SELECT id, conversation, {attempts}, 0, '{reason}', '', '' FROM events WHERE id = {id};
         INSERT INTO dead_letters (event, conversation, failed_at, permanent)
         SELECT id, conversation, 2000, '{reason}' LIKE 'OurAPI permanently rejects%' FROM events WHERE id = {id};"
    )
}

/// SQL for a failed message of [`CONVERSATION`].
pub(crate) fn failed_message(id: i64, text: &str, reason: &str) -> String {
    let data = json!({ "message": text }).to_string();
    dead_letter(id, 100, "MESSAGE", &data, reason, 1)
}

/// SQL for [`CONVERSATION`] with failed messages: `No 1` and so on, each with its reason.
pub(crate) fn failed_messages<'a>(reasons: impl IntoIterator<Item = &'a str>) -> String {
    let failed = (1..)
        .zip(reasons)
        .map(|(id, reason)| failed_message(id, &format!("No {id}"), reason));
    std::iter::once(CONVERSATION.to_owned())
        .chain(failed)
        .collect()
}

/// SQL that inserts a message whose last attempt has failed. The journal must have its conversation.
pub(crate) fn spent(id: i64, conversation: i64) -> String {
    let conversation = format!("(SELECT id FROM conversations WHERE bigchat_id = {conversation})");
    let data = r#"{"message":"x"}"#;
    let reason = "OurAPI gave no usable answer";
    dead_letter(id, conversation, "MESSAGE", data, reason, 10)
}
