//! What the console shows of the journal besides the figures, one page at a time.
//!
//! Each query of the console uses an index and ends after a fixed number of rows, whatever the size of the journal;
//! only a conversation's failed and discarded events are counted. Large texts are truncated. A page ends with the key
//! after which the next one begins, so that no rows are skipped.

mod rows;
pub(super) mod says;

use rusqlite::{Connection, OptionalExtension, Row, params};
use uuid::Uuid;

use super::activity::{minute, names};
use super::dead_letters::{PastResolution, partial_event};
use super::export::delivery_of_event;
use super::{KnownAdvisor, Result, Store, UNREADABLE, limit, unsigned};
use crate::domain::conversation::Details;
use crate::domain::event::PartialEvent;
use crate::domain::ids::{ConversationId, EventId};
use crate::domain::time::{Millis, Timestamp};

pub use rows::{
    Activity, ConversationRow, EventRow, EventState, FailedRow, FoundEvent, Minutes, Page,
    WholeEvent,
};

/// How many rows a page has.
const PAGE: usize = 50;

/// How many failed events are searched for one page of those with a given reason.
const SEARCHED: usize = 10_000;

/// How many failed events of a conversation are listed with it.
const FAILED_LISTED: usize = 100;

/// How many characters of an event are shown in a list, in its conversation, and on its own page.
const IN_A_LIST: usize = 200;
const IN_ITS_CONVERSATION: usize = 4_000;
const BY_ITSELF: usize = 1 << 20;

/// The data of the event `e`, and its size in bytes. JSON larger than any valid event is not even read.
const DATA: &str =
    "iif(octet_length(e.data) > 1048576, NULL, e.data) AS data, octet_length(e.data) AS bytes";

/// What a search is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Search {
    /// The latest conversations.
    Latest,
    /// BigChat's id of a conversation.
    Conversation(i64),
    /// OurAPI's external id of a chat, and the BigChat id that it contains.
    ExternalId(String, i64),
    /// OurAPI's id of a chat or an agent.
    Id(Uuid),
    /// The beginning of an agent's address, or of a word of the agent's name.
    Agent(String),
}

impl Search {
    /// What a user searches for with `text`. External ids begin with `prefix`.
    pub fn read(text: &str, prefix: &str) -> Self {
        let text = text.trim();
        if text.is_empty() {
            return Self::Latest;
        }
        if let Ok(id) = text.trim_start_matches('#').parse() {
            return Self::Conversation(id);
        }
        if let Ok(id) = Uuid::parse_str(text) {
            return Self::Id(id);
        }
        let made_of = text
            .strip_prefix(prefix)
            .and_then(|id| id.split('@').next()?.parse().ok());
        match made_of {
            Some(id) => Self::ExternalId(text.to_owned(), id),
            None => Self::Agent(text.to_owned()),
        }
    }
}

impl Store {
    /// The activity of the last `minutes` minutes, summed over intervals that a chart can show.
    pub fn activity(&mut self, minutes: u32, now: Millis) -> Result<Activity> {
        let step = match minutes {
            0..=60 => 1,
            61..=360 => 5,
            361..=1440 => 15,
            _ => 120,
        };
        let to = minute(now);
        let from = (to - i64::from(minutes) + 1).div_euclid(step) * step;
        let mut statement = self.connection.prepare_cached(ACTIVITY)?;
        let minutes = statement.query_map([from, to, step], |row| {
            Ok(Minutes {
                minute: row.get(0)?,
                kind: row.get(1)?,
                received: unsigned(row, 2)?,
                delivered: unsigned(row, 3)?,
                failed: unsigned(row, 4)?,
            })
        })?;
        Ok(Activity {
            from,
            to,
            step,
            kinds: names().collect(),
            minutes: minutes.collect::<rusqlite::Result<_>>()?,
        })
    }

    /// The failed events with that reason after event `after`, oldest first.
    pub fn failed_for(&mut self, reason: &str, after: EventId) -> Result<Page<FailedRow>> {
        let transaction = self.connection.transaction()?;
        let mut statement = transaction.prepare_cached(FAILED)?;
        let mut found = statement.query(params![after, limit(SEARCHED)])?;
        let (mut ids, mut looked_at, mut last) = (Vec::new(), 0, after);
        let mut more = false;
        while let Some(row) = found.next()? {
            let (id, of): (EventId, String) = (row.get(0)?, row.get(1)?);
            if of == reason {
                more = ids.len() == PAGE;
                if more {
                    break;
                }
                ids.push(id);
            }
            (looked_at, last) = (looked_at + 1, id);
        }
        let mut page = Page {
            rows: Vec::with_capacity(ids.len()),
            next: (more || looked_at == SEARCHED).then_some(last.0),
        };
        for id in ids {
            let mut statement = transaction.prepare_cached(&failed_row())?;
            page.rows.push(statement.query_row([id], read_failed)?);
        }
        Ok(page)
    }

    /// An event, if it exists.
    pub fn whole_event(&mut self, id: EventId) -> Result<Option<WholeEvent>> {
        let event = self
            .connection
            .prepare_cached(WHOLE)?
            .query_row(params![limit(BY_ITSELF), id], read_whole)
            .optional()?;
        let Some(mut event) = event else {
            return Ok(None);
        };
        event.failures = self.failed_attempts(id)?;
        event.resolutions = self.resolutions(Some(id), None, limit(PAGE))?;
        Ok(Some(event))
    }

    /// The matching conversations, the latest first, and whether there are more.
    pub fn find_conversations(&mut self, wanted: &Search) -> Result<(Vec<ConversationRow>, bool)> {
        let transaction = self.connection.transaction()?;
        let more_than_enough = limit(PAGE + 1);
        let mut keys = match wanted {
            Search::Latest => keys(&transaction, LATEST, params![more_than_enough])?,
            Search::Conversation(id) => keys(&transaction, BY_ID, params![id, more_than_enough])?,
            Search::ExternalId(text, id) => keys(
                &transaction,
                BY_EXTERNAL_ID,
                params![id, text, more_than_enough],
            )?,
            Search::Id(id) => {
                let id = id.to_string();
                let mut chat = keys(&transaction, BY_CHAT, params![id, more_than_enough])?;
                chat.extend(keys(&transaction, BY_AGENT, params![id, more_than_enough])?);
                chat
            }
            Search::Agent(text) => {
                let beginning = beginning(text);
                let mut found = Vec::new();
                for agent in agents(&transaction, &beginning)? {
                    found.extend(keys(
                        &transaction,
                        BY_AGENT,
                        params![agent, more_than_enough],
                    )?);
                }
                found.sort_unstable_by(|one, other| other.cmp(one));
                found
            }
        };
        let more = keys.len() > PAGE;
        keys.truncate(PAGE);
        Ok((rows(&transaction, keys)?, more))
    }

    /// All conversations with this id of BigChat's, the latest first. There is at most one per epoch.
    pub fn conversations_of(&mut self, id: i64) -> Result<Vec<ConversationRow>> {
        let transaction = self.connection.transaction()?;
        let keys = keys(&transaction, BY_ID, params![id, i64::MAX])?;
        rows(&transaction, keys)
    }

    /// Events that could not be parsed but name this conversation, among the latest ones.
    pub fn unparsed_of(&mut self, conversation: i64) -> Result<Vec<EventId>> {
        let mut statement = self.connection.prepare_cached(UNPARSED)?;
        let mut events = statement.query([limit(SEARCHED)])?;
        let mut ids = Vec::new();
        while let Some(event) = events.next()? {
            let raw: Option<String> = event.get(1)?;
            let partial = PartialEvent::of(raw.as_deref().unwrap_or_default());
            if partial.conversation == Some(conversation) {
                ids.push(event.get(0)?);
            }
        }
        Ok(ids)
    }

    /// The event whose id is the number that was searched for.
    pub fn found_event(&mut self, wanted: &Search) -> Result<Option<FoundEvent>> {
        let Search::Conversation(id) = wanted else {
            return Ok(None);
        };
        let event = self
            .connection
            .prepare_cached(EVENT)?
            .query_row([id], |row| {
                Ok(FoundEvent {
                    id: row.get(0)?,
                    name: row.get(1)?,
                    conversation: row.get(2)?,
                    conversation_key: row.get(3)?,
                })
            })
            .optional();
        Ok(event?)
    }

    /// A conversation by its key in the journal.
    pub fn conversation_row(&mut self, key: ConversationId) -> Result<Option<ConversationRow>> {
        let transaction = self.connection.transaction()?;
        conversation(&transaction, key)
    }

    /// The events of a conversation after `after`, in the order in which they were received.
    pub fn events_of(&mut self, key: ConversationId, after: EventId) -> Result<Page<EventRow>> {
        let mut statement = self.connection.prepare_cached(&events_of())?;
        let rows = statement.query_map(params![key, after, limit(PAGE + 1)], |row| {
            let (text, text_truncated) = says(row, IN_ITS_CONVERSATION)?;
            Ok(EventRow {
                id: row.get("id")?,
                kind: row.get("kind")?,
                event_at: row.get("event_at")?,
                text,
                text_truncated,
                state: row.get("state")?,
                received_at: row.get("received_at")?,
                state_since: row.get("state_since")?,
                effect: row.get("effect")?,
                attempts: row.get("attempts")?,
                reason: row.get("reason")?,
                next_at: row.get("next_at")?,
            })
        })?;
        Ok(paged(rows.collect::<rusqlite::Result<_>>()?, |row| {
            row.id.0
        }))
    }

    /// The resolutions before `before`, the latest first.
    pub fn resolutions_before(&mut self, before: Option<i64>) -> Result<Page<PastResolution>> {
        let rows = self.resolutions(None, before, limit(PAGE + 1))?;
        Ok(paged(rows, |row| row.id))
    }
}

const ACTIVITY: &str =
    "SELECT minute / ?3 * ?3 AS step, kind, sum(received), sum(delivered), sum(failed) FROM activity
    WHERE minute BETWEEN ?1 AND ?2 GROUP BY step, kind ORDER BY step, kind";

const FAILED: &str =
    "SELECT d.event, coalesce(a.reason, '') FROM dead_letters d LEFT JOIN attempts a ON a.event = d.event
    WHERE d.discarded_at IS NULL AND d.event > ?1 ORDER BY d.event LIMIT ?2";

const WHOLE: &str = concat!(
    "SELECT e.id, e.kind, c.bigchat_id, e.conversation, c.chat_id, e.event_at,
        substr(e.data, 1, ?1) AS data, length(e.data) > ?1 AS data_cut, e.state, e.received_at,
        coalesce(e.discarded_at, e.failed_at, v.delivered_at) AS state_since,
        coalesce(a.attempts, 0) AS attempts, coalesce(a.outcome_unknown, 0) AS outcome_unknown, a.reason,
        nullif(a.request, '') AS request, nullif(a.response, '') AS response,
        coalesce(d.permanent, 0) AS permanent
    FROM event_states e LEFT JOIN dead_letters d ON d.event = e.id LEFT JOIN attempts a ON a.event = e.id
    LEFT JOIN conversations c ON c.id = e.conversation
    LEFT JOIN deliveries v ON v.id = iif(e.state = 'delivered', ",
    delivery_of_event!(),
    ", NULL)
    WHERE e.id = ?2"
);

/// Conversations with a chat or an event. Others may be known only as probe conversations.
const LATEST: &str = "SELECT id FROM conversations c
    WHERE external_id IS NOT NULL OR EXISTS (SELECT 1 FROM events e WHERE e.conversation = c.id)
    ORDER BY id DESC LIMIT ?1";
const BY_ID: &str = "SELECT id FROM conversations WHERE bigchat_id = ?1 ORDER BY id DESC LIMIT ?2";
const BY_EXTERNAL_ID: &str = "SELECT id FROM conversations WHERE bigchat_id = ?1 AND external_id = ?2 ORDER BY id DESC LIMIT ?3";
const BY_CHAT: &str = "SELECT id FROM conversations WHERE chat_id = ?1 ORDER BY id DESC LIMIT ?2";
const BY_AGENT: &str =
    "SELECT id FROM conversations WHERE chat_agent = ?1 ORDER BY id DESC LIMIT ?2";

const EVENT: &str = "SELECT e.id, e.kind, c.bigchat_id, e.conversation
    FROM events e LEFT JOIN conversations c ON c.id = e.conversation WHERE e.id = ?1";

/// There are few agents, so a scan is cheap, and so is a query for the conversations of each. Several addresses may
/// have the same agent.
const BY_NAME_OR_EMAIL: &str = "SELECT DISTINCT agent_id FROM agents
    WHERE agent_id IS NOT NULL AND (email LIKE ?1 ESCAPE '\\'
        OR email IN (SELECT email FROM advisors
            WHERE name LIKE ?1 ESCAPE '\\' OR name LIKE '% ' || ?1 ESCAPE '\\'))";

const CONVERSATION: &str = "SELECT c.id, c.bigchat_id, c.epoch, (SELECT max(id) FROM epochs) AS current_epoch, c.started_at, c.ended_at,
        c.first_advisor, c.transfer_advisor, c.transfer_at, c.details, c.external_id, c.chat_id, c.chat_started_at,
        c.chat_ended_at, c.chat_agent, c.stale_seq > c.fresh_seq AS stale, c.missing, c.waiting,
        (SELECT count(*) FROM dead_letters WHERE conversation = c.id AND discarded_at IS NOT NULL) AS discarded,
        c.forgotten_at, c.forgotten_by, a.bigchat_id AS advisor, a.name, a.email,
        iif(g.email IS NULL, NULL, g.agent_id IS NOT NULL) AS accepted
    FROM conversations c LEFT JOIN advisors a
        ON a.epoch = c.epoch AND a.bigchat_id = coalesce(c.transfer_advisor, c.first_advisor)
    LEFT JOIN agents g ON g.email = a.email
    WHERE c.id = ?1";

const UNPARSED: &str =
    "SELECT id, data FROM events WHERE conversation IS NULL ORDER BY id DESC LIMIT ?1";

const FAILED_OF: &str = "SELECT event, permanent FROM dead_letters
    WHERE conversation = ?1 AND discarded_at IS NULL ORDER BY event LIMIT ?2";

fn failed_row() -> String {
    format!(
        "SELECT e.id, e.kind, c.bigchat_id, {DATA}, coalesce(a.attempts, 0) AS attempts, d.failed_at
         FROM events e JOIN dead_letters d ON d.event = e.id LEFT JOIN attempts a ON a.event = e.id
         LEFT JOIN conversations c ON c.id = e.conversation
         WHERE e.id = ?1"
    )
}

fn events_of() -> String {
    format!(
        "SELECT e.id, e.kind, e.event_at, {DATA}, e.state, e.received_at,
            coalesce(e.discarded_at, e.failed_at, v.delivered_at) AS state_since, v.effect,
            coalesce(a.attempts, 0) AS attempts, a.reason, a.next_at
         FROM (SELECT id FROM events WHERE conversation = ?1 AND id > ?2 ORDER BY id LIMIT ?3) AS page
         JOIN event_states e ON e.id = page.id LEFT JOIN attempts a ON a.event = e.id
         LEFT JOIN deliveries v ON v.id = iif(e.state = 'delivered', {}, NULL)
         ORDER BY e.id",
        delivery_of_event!()
    )
}

/// The content of an event, up to `at_most` characters, and whether there is more.
fn says(row: &Row<'_>, at_most: usize) -> rusqlite::Result<(Option<String>, bool)> {
    let (name, data): (String, Option<String>) = (row.get("kind")?, row.get("data")?);
    if let (None, Some(bytes)) = (&data, row.get::<_, Option<i64>>("bytes")?) {
        return Ok((Some(format!("{bytes} bytes")), true));
    }
    Ok(match says::event(&name, data) {
        None => (None, false),
        Some(mut text) => {
            let end = text.char_indices().nth(at_most).map(|(end, _)| end);
            text.truncate(end.unwrap_or(text.len()));
            (Some(text), end.is_some())
        }
    })
}

fn keys(
    connection: &Connection,
    sql: &str,
    params: impl rusqlite::Params,
) -> Result<Vec<ConversationId>> {
    let mut statement = connection.prepare_cached(sql)?;
    let keys = statement.query_map(params, |row| row.get(0))?;
    Ok(keys.collect::<rusqlite::Result<_>>()?)
}

/// The pattern for texts with this beginning.
fn beginning(text: &str) -> String {
    let mut pattern = String::with_capacity(text.len() + 1);
    for c in text.chars() {
        if matches!(c, '%' | '_' | '\\') {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern.push('%');
    pattern
}

fn agents(connection: &Connection, beginning: &str) -> Result<Vec<String>> {
    let mut statement = connection.prepare_cached(BY_NAME_OR_EMAIL)?;
    let agents = statement.query_map([beginning], |row| row.get(0))?;
    Ok(agents.collect::<rusqlite::Result<_>>()?)
}

fn rows(connection: &Connection, keys: Vec<ConversationId>) -> Result<Vec<ConversationRow>> {
    let rows = keys
        .into_iter()
        .filter_map(|key| conversation(connection, key).transpose());
    rows.collect()
}

fn conversation(connection: &Connection, key: ConversationId) -> Result<Option<ConversationRow>> {
    let row = connection
        .prepare_cached(CONVERSATION)?
        .query_row([key], read_conversation)
        .optional()?;
    let Some(mut row) = row else { return Ok(None) };
    row.permanent = true;
    let mut statement = connection.prepare_cached(FAILED_OF)?;
    let mut failed = statement.query(params![key, limit(FAILED_LISTED + 1)])?;
    while let Some(event) = failed.next()? {
        row.more_failed = row.failed.len() == FAILED_LISTED;
        if row.more_failed {
            break;
        }
        row.failed.push(event.get(0)?);
        row.permanent &= event.get::<_, bool>(1)?;
    }
    Ok(Some(row))
}

/// What BigChat answered about the advisor, if it was asked.
fn known_advisor(row: &Row<'_>) -> rusqlite::Result<Option<KnownAdvisor>> {
    let id: Option<i64> = row.get("advisor")?;
    Ok(match (id, row.get("name")?, row.get("email")?) {
        (None, ..) => None,
        (Some(_), Some(name), Some(email)) => Some(KnownAdvisor::Person { name, email }),
        (Some(_), ..) => Some(KnownAdvisor::Gone),
    })
}

fn read_conversation(row: &Row<'_>) -> rusqlite::Result<ConversationRow> {
    let (first_advisor, transfer_advisor): (Option<i64>, Option<i64>) =
        (row.get("first_advisor")?, row.get("transfer_advisor")?);
    let (details, chat_agent): (Details, Option<String>) =
        (row.get("details")?, row.get("chat_agent")?);
    let advisor = known_advisor(row)?;
    let accepted: Option<bool> = row.get("accepted")?;
    let no_agent = chat_agent.is_none().then(|| {
        let id = transfer_advisor.or(first_advisor);
        says::no_agent(details, id, advisor.as_ref(), accepted)
    });
    let agent = match advisor {
        Some(KnownAdvisor::Person { name, email }) if chat_agent.is_some() => Some((name, email)),
        _ => None,
    };
    let (agent_name, agent_email) = agent.unzip();
    Ok(ConversationRow {
        key: row.get("id")?,
        conversation: row.get("bigchat_id")?,
        epoch: row.get("epoch")?,
        current_epoch: row.get("current_epoch")?,
        started_at: row.get("started_at")?,
        ended_at: row.get("ended_at")?,
        first_advisor,
        transfer_advisor,
        transfer_at: row.get("transfer_at")?,
        details,
        external_id: row.get("external_id")?,
        chat_id: row.get("chat_id")?,
        chat_started_at: row.get("chat_started_at")?,
        chat_ended_at: row.get("chat_ended_at")?,
        chat_agent,
        agent_name,
        agent_email,
        no_agent,
        forgotten_at: row.get("forgotten_at")?,
        forgotten_by: row.get("forgotten_by")?,
        stale: row.get("stale")?,
        missing: row.get("missing")?,
        waiting: unsigned(row, "waiting")?,
        discarded: unsigned(row, "discarded")?,
        failed: Vec::new(),
        more_failed: false,
        permanent: false,
    })
}

fn read_failed(row: &Row<'_>) -> rusqlite::Result<FailedRow> {
    let (kind, data): (String, Option<String>) = (row.get("kind")?, row.get("data")?);
    let known = PartialEvent {
        conversation: row.get("bigchat_id")?,
        at: None,
    };
    Ok(FailedRow {
        id: row.get("id")?,
        conversation: partial_event(&kind, data.as_deref(), known).conversation,
        kind,
        text: says(row, IN_A_LIST)?.0,
        attempts: row.get("attempts")?,
        failed_at: row.get("failed_at")?,
    })
}

fn read_whole(row: &Row<'_>) -> rusqlite::Result<WholeEvent> {
    let (kind, event_at): (String, Timestamp) = (row.get("kind")?, row.get("event_at")?);
    let data: Option<String> = row.get("data")?;
    let known = PartialEvent {
        conversation: row.get("bigchat_id")?,
        at: Some(event_at),
    };
    let PartialEvent { conversation, at } = partial_event(&kind, data.as_deref(), known);
    let raw = match conversation {
        Some(id) if kind != UNREADABLE => format!(
            r#"{{"conversation_id":{id},"event_name":"{kind}","event_at":{},"data":{}}}"#,
            event_at.unix(),
            data.as_deref().unwrap_or("null")
        ),
        _ => data.unwrap_or_default(),
    };
    Ok(WholeEvent {
        id: row.get("id")?,
        permanent: row.get("permanent")?,
        kind,
        conversation,
        conversation_key: row.get("conversation")?,
        chat_id: row.get("chat_id")?,
        event_at: at,
        raw,
        raw_truncated: row.get::<_, Option<bool>>("data_cut")?.unwrap_or_default(),
        state: row.get("state")?,
        received_at: row.get("received_at")?,
        state_since: row.get("state_since")?,
        attempts: row.get("attempts")?,
        outcome_unknown: row.get("outcome_unknown")?,
        reason: row.get("reason")?,
        request: row.get("request")?,
        response: row.get("response")?,
        failures: Vec::new(),
        resolutions: Vec::new(),
    })
}

/// A page of at most [`PAGE`] rows, from a query that returns one row more if there are more.
fn paged<T>(mut rows: Vec<T>, id: impl Fn(&T) -> i64) -> Page<T> {
    let more = rows.len() > PAGE;
    rows.truncate(PAGE);
    let next = rows.last().filter(|_| more).map(id);
    Page { rows, next }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SQLite's plan for a query.
    fn plan(store: &mut Store, sql: &str) -> Vec<String> {
        let mut statement = store
            .connection()
            .prepare(&format!("EXPLAIN QUERY PLAN {sql}"))
            .expect(sql);
        let nothing = vec![rusqlite::types::Null; statement.parameter_count()];
        let plan = statement
            .query_map(rusqlite::params_from_iter(nothing), |row| row.get(3))
            .expect(sql);
        plan.collect::<rusqlite::Result<_>>().expect(sql)
    }

    #[test]
    fn query_scans_no_table() {
        let memory = Connection::open_in_memory().expect("a database");
        let mut store = Store::in_memory(memory, true).expect("our tables");
        for (sql, index) in [
            (ACTIVITY, "activity USING PRIMARY KEY (minute>?"),
            (FAILED, "dead_letters_open"),
            (WHOLE, "e USING INTEGER PRIMARY KEY"),
            (&failed_row(), "e USING INTEGER PRIMARY KEY"),
            (BY_ID, "conversations_by_bigchat_id"),
            (EVENT, "e USING INTEGER PRIMARY KEY"),
            (BY_EXTERNAL_ID, "conversations_by_bigchat_id"),
            (BY_CHAT, "conversations_by_chat"),
            (BY_AGENT, "conversations_by_agent"),
            (CONVERSATION, "c USING INTEGER PRIMARY KEY"),
            (FAILED_OF, "dead_letters_of_conversation (conversation=?)"),
            (&events_of(), "events_of_conversation (conversation=?"),
            (UNPARSED, "events_of_conversation (conversation=?"),
        ] {
            let plan = plan(&mut store, sql);
            assert!(
                plan.iter().take(2).any(|step| step.contains(index)),
                "{sql}: {plan:?}"
            );
            for step in &plan {
                let walks = step.starts_with("SCAN ")
                    && !step.contains("dead_letters_open")
                    && !["SCAN page", "SCAN (subquery-1)"].contains(&step.as_str());
                assert!(!walks && !step.contains("AUTOMATIC"), "{sql}: {step}");
            }
        }
    }

    #[test]
    fn search_text_is_classified() {
        let id = Uuid::from_u128(7);
        for (text, wanted) in [
            ("  ", Search::Latest),
            (" 42 ", Search::Conversation(42)),
            ("#42", Search::Conversation(42)),
            ("a-42", Search::ExternalId("a-42".into(), 42)),
            (
                "a-42@2026-11-22T22:03:27Z",
                Search::ExternalId("a-42@2026-11-22T22:03:27Z".into(), 42),
            ),
            (&id.to_string().to_uppercase(), Search::Id(id)),
            ("jane@", Search::Agent("jane@".into())),
            ("42@", Search::Agent("42@".into())),
            (
                "99999999999999999999",
                Search::Agent("99999999999999999999".into()),
            ),
        ] {
            assert_eq!(Search::read(text, "a-"), wanted, "{text}");
        }
    }

    #[test]
    fn activity_covers_the_requested_minutes() {
        let memory = Connection::open_in_memory().expect("a database");
        let mut store = Store::in_memory(memory, true).expect("a schema");
        for (minutes, step) in [(60, 1), (360, 5), (1440, 15), (10_080, 120)] {
            let activity = store.activity(minutes, Millis(1_795_384_830_000));
            let activity = activity.expect("an activity");
            let covered = activity.to - activity.from + 1;
            let minutes = i64::from(minutes);
            assert_eq!((activity.step, activity.from % step), (step, 0));
            assert!((minutes..minutes + step).contains(&covered), "{covered}");
        }
    }
}
