//! What the poller stores: the cursor, the pages of the unfinished window, and their events.

use rusqlite::{OptionalExtension, Transaction, params};

use super::activity::Counts;
use super::{JournalError, Result, Store, UNREADABLE, forget};
use crate::domain::dedupe::{Counts as Received, Key};
use crate::domain::event::{Event, EventKind, PartialEvent, fingerprint, page_events};
use crate::domain::ids::{ConversationId, Epoch, EventId};
use crate::domain::time::{Millis, Timestamp};
use crate::domain::window::Window;
use crate::http::shortened;

/// In seconds. BigChat's `date` header lags behind its clock by up to 1.5 s, so a page of a new epoch may seem to have
/// been served before the restart.
const DATE_LAG: i64 = 2;

/// The oldest time for which BigChat still answers may advance during the search for the end of a gap. An advance of up
/// to this many seconds is not a new gap.
const GAP_MARGIN: i64 = 60;

/// How many unparsable events of one page are stored. A page with more is considered hostile, and must not add millions
/// of rows.
const MAX_UNREADABLE: usize = 100_000;

/// How far BigChat was read, and the unfinished window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PollState {
    /// The time up to which BigChat was read, by its clock; `None` before the first poll.
    pub cursor: Option<Timestamp>,
    pub unfinished: Option<UnfinishedWindow>,
    /// The time at which the latest completely read window was computed; before the first one, the first start of the
    /// daemon. By this machine's clock, because BigChat's may have been wrong at that time.
    pub read_at: Option<Millis>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnfinishedWindow {
    pub window: Window,
    /// The query of the next page; `None`: the last page is stored.
    pub next: Option<String>,
}

/// A page as received, to be stored before it is processed.
#[derive(Debug, Clone)]
pub struct NewPage {
    /// The query of its request.
    pub query: String,
    /// The latest known epoch when the page was requested. The page belongs to this epoch or a later one.
    pub requested_in: Epoch,
    /// BigChat's clock when the page was served: the date of the response, even if that is not believed.
    pub served_at: Timestamp,
    /// The window that is being read.
    pub window: Window,
    /// When the window was computed; `None`: by an earlier process.
    pub window_at: Option<Millis>,
    /// The body.
    pub body: String,
    /// The number of events on it.
    pub events: usize,
    /// How the window continues.
    pub progress: WindowProgress,
}

/// How a window continues after a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WindowProgress {
    /// With the page of this query.
    Next(String),
    /// Not at all: this was the last page, and BigChat was read up to this time.
    Complete(Timestamp),
}

/// A stored page.
#[derive(Debug)]
pub struct StoredPage {
    /// Its id, in order of arrival.
    pub id: i64,
    /// The query of its request.
    pub query: String,
    /// See [`NewPage::served_at`].
    pub served_at: Timestamp,
    /// When its window starts.
    pub window_start: Timestamp,
    /// The body.
    pub body: String,
    /// Whether its events were ingested.
    pub ingested: bool,
    /// The latest known epoch when it was requested.
    pub requested_in: Epoch,
    /// The epoch to which it belongs, once that is certain.
    pub epoch: Option<Epoch>,
}

impl StoredPage {
    /// Its events, without those that cannot be parsed.
    pub fn events(&self) -> Vec<Event> {
        let mut events = Vec::new();
        // The page was valid when it was received.
        page_events(&self.body, |raw| events.extend(Event::parse(raw))).ok();
        events
    }

    /// Its messages.
    pub fn messages(&self) -> Vec<Event> {
        let mut messages = self.events();
        messages.retain(|event| event.kind.is_message());
        messages
    }

    /// Whether it was certainly served before `at`, by BigChat's clock.
    pub fn was_served_before(&self, at: Timestamp) -> bool {
        self.served_at.unix() + DATE_LAG < at.unix()
    }

    /// The keys of all its events.
    pub fn keys(&self) -> Vec<Key> {
        keys(&self.body)
    }
}

/// The keys of all events of a page, in their order.
pub fn keys(body: &str) -> Vec<Key> {
    let mut keys = Vec::new();
    page_events(body, |raw| {
        keys.push(match Event::parse(raw) {
            Ok(event) => Key::from(&event),
            Err(_) => {
                Key::from_json(raw).unwrap_or_else(|| Key::unparsed(fingerprint(&[raw.as_bytes()])))
            }
        });
    })
    .ok();
    keys
}

/// The result of ingesting a page.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ingested {
    /// New events.
    pub new: usize,
    /// New events that could not be parsed.
    pub unreadable: usize,
    /// Events dropped by `--ignore-events`.
    pub ignored: usize,
    /// Whether the page had any event that was not known. Ignored and unparsable events never count as known.
    pub progress: bool,
    /// New events by kind.
    pub received: Vec<(&'static str, u32)>,
    /// The latest event in the journal.
    pub last_event: EventId,
}

impl Store {
    /// How far BigChat was read, and the unfinished window.
    pub fn poll_state(&mut self) -> Result<PollState> {
        Ok(self.connection.query_row(
            "SELECT cursor, window_start, window_end, next_query, read_at FROM poll_state",
            [],
            |row| {
                let window = Option::zip(row.get(1)?, row.get(2)?);
                let next = row.get(3)?;
                Ok(PollState {
                    cursor: row.get(0)?,
                    unfinished: window.map(|(start, end)| UnfinishedWindow {
                        window: Window { start, end },
                        next,
                    }),
                    read_at: row.get(4)?,
                })
            },
        )?)
    }

    /// Records when the daemon first started, unless that is recorded already, and the first cursor once it is known.
    pub fn begin_reading(
        &mut self,
        started_at: Millis,
        cursor: Option<Timestamp>,
        now: Millis,
    ) -> Result<()> {
        let transaction = self.begin()?;
        let sql = "UPDATE poll_state SET read_at = coalesce(read_at, ?1)";
        transaction.execute(sql, [started_at])?;
        if let Some(cursor) = cursor {
            move_cursor(&transaction, cursor, now)?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// Records that BigChat no longer reports events between the old cursor and `ends_at`, and sets the new `cursor`.
    /// The next window starts at `ends_at`, which is `cursor` minus the overlap. Returns the start of the gap if it is
    /// new, and not the continuation of a known gap.
    pub fn skip_gap(
        &mut self,
        ends_at: Timestamp,
        cursor: Timestamp,
        now: Millis,
    ) -> Result<Option<Timestamp>> {
        let transaction = self.begin()?;
        let starts_at: Option<Timestamp> =
            transaction.query_row("SELECT cursor FROM poll_state", [], |row| row.get(0))?;
        let starts_at = starts_at.filter(|starts_at| *starts_at < ends_at);
        let mut new = None;
        if let Some(starts_at) = starts_at {
            let extended = transaction.execute(
                "UPDATE gaps SET ends_at = ?2 WHERE ?1 - ends_at BETWEEN 0 AND ?3",
                params![
                    starts_at,
                    ends_at,
                    cursor.unix() - ends_at.unix() + GAP_MARGIN
                ],
            )?;
            if extended == 0 {
                transaction.execute(
                    "INSERT INTO gaps (starts_at, ends_at, found_at) VALUES (?1, ?2, ?3)",
                    params![starts_at, ends_at, now],
                )?;
                new = Some(starts_at);
            }
        }
        drop_window(&transaction)?;
        move_cursor(&transaction, cursor, now)?;
        transaction.execute("UPDATE poll_state SET read_at = ?1, idle_polls = 0", [now])?;
        transaction.execute("DELETE FROM inbox", [])?;
        transaction.commit()?;
        Ok(new)
    }

    /// The pages of the unfinished window, in order of arrival.
    pub fn stored_pages(&mut self) -> Result<Vec<StoredPage>> {
        let mut statement = self.connection.prepare_cached(
            "SELECT id, query, served_at, window_start, body, ingested, requested_in FROM inbox ORDER BY id",
        )?;
        let pages = statement.query_map([], |row| {
            Ok(StoredPage {
                id: row.get(0)?,
                query: row.get(1)?,
                served_at: row.get(2)?,
                window_start: row.get(3)?,
                body: row.get(4)?,
                ingested: row.get(5)?,
                requested_in: row.get(6)?,
                epoch: None,
            })
        })?;
        Ok(pages.collect::<rusqlite::Result<_>>()?)
    }

    /// Stores a page and how its window continues, durably and in one transaction. Returns the page's id.
    pub fn store_page(&mut self, page: &NewPage) -> Result<i64> {
        self.in_place()?;
        let transaction = self.begin()?;
        let id = transaction
            .prepare_cached(
                "INSERT INTO inbox (query, served_at, window_start, body, requested_in)
                 VALUES (?1, ?2, ?3, ?4, ?5) RETURNING id",
            )?
            .query_row(
                params![
                    page.query,
                    page.served_at,
                    page.window.start,
                    page.body,
                    page.requested_in
                ],
                |row| row.get(0),
            )?;
        let (next, cursor) = match &page.progress {
            WindowProgress::Next(query) => (Some(query), None),
            WindowProgress::Complete(cursor) => (None, Some(cursor)),
        };
        let now = Millis::now();
        transaction.execute(
            "UPDATE poll_state SET window_start = ?1, window_end = ?2, next_query = ?3, page_at = ?5,
                window_at = coalesce(?4, window_at)",
            params![page.window.start, page.window.end, next, page.window_at, now],
        )?;
        if let Some(cursor) = cursor {
            move_cursor(&transaction, *cursor, now)?;
        }
        transaction.commit()?;
        Ok(id)
    }

    /// The epoch of a page, given the time at which it was served and BigChat's time `now`. If the page seems to have
    /// been served after `now`, the latest restart has set the clock back, and the page is from before it.
    pub fn epoch_at(&mut self, served_at: Timestamp, now: Timestamp) -> Result<Epoch> {
        Ok(self
            .connection
            .prepare_cached(
                "SELECT id FROM epochs WHERE id = 1
                    OR began_at <= ?1 + ?3 AND (?1 <= ?2 + ?3 OR id < (SELECT max(id) FROM epochs))
                 ORDER BY id DESC LIMIT 1",
            )?
            .query_row(params![served_at, now, DATE_LAG], |row| row.get(0))?)
    }

    /// Whether the journal has such an event, in any epoch, ingested or on a stored page.
    pub fn has_event(&mut self, event: &Event) -> Result<bool> {
        if self
            .stored_pages()?
            .iter()
            .any(|page| page.events().contains(event))
        {
            return Ok(true);
        }
        Ok(self.latest_epoch_of(event)?.is_some())
    }

    /// For each of these messages in turn, looks up the latest epoch that has it. Returns the first of these epochs
    /// that is `earliest` or later, but before `current`. A BigChat with a log reports the events of the last seconds
    /// again, so such a message shows the epoch of its page. Other events do not, because several epochs may have equal
    /// ones.
    pub fn earlier_epoch(
        &mut self,
        messages: &[Event],
        earliest: Epoch,
        current: Epoch,
    ) -> Result<Option<Epoch>> {
        for message in messages {
            let latest = self.latest_epoch_of(message)?;
            if latest >= Some(earliest) && latest < Some(current) {
                return Ok(latest);
            }
        }
        Ok(None)
    }

    /// The latest epoch in which the journal has such an event.
    fn latest_epoch_of(&self, event: &Event) -> Result<Option<Epoch>> {
        let mut statement = self.connection.prepare_cached(
            "SELECT id, forgotten_at IS NOT NULL, epoch FROM conversations WHERE bigchat_id = ?1 ORDER BY epoch DESC",
        )?;
        let mut rows = statement.query([event.conversation])?;
        while let Some(row) = rows.next()? {
            let known = Known {
                id: row.get(0)?,
                is_forgotten: row.get(1)?,
            };
            if count_equal(&self.connection, known, event)? > 0 {
                return Ok(Some(row.get(2)?));
            }
        }
        Ok(None)
    }

    /// Ingests the events of a stored page into their conversations in the page's epoch. An event is new if the journal
    /// has fewer equal ones than were `received` on the stored pages. The conversations of new events become due.
    /// `may_be_dropped`: events of the page's window may have been delivered, and dropped after the retention period,
    /// so the chats are read back first.
    pub fn ingest(
        &mut self,
        page: &StoredPage,
        epoch: Epoch,
        may_be_dropped: bool,
        received: &Received,
        ignore: &[String],
        now: Millis,
    ) -> Result<Ingested> {
        let transaction = self.begin()?;
        let before = may_be_dropped
            .then(|| last_event(&transaction))
            .transpose()?;
        let mut ingested = Ingested::default();
        let (mut unreadable, mut outcome) = (0, Ok(()));
        let (mut counts, mut newest) = (Counts::default(), None);
        page_events(&page.body, |raw| {
            let is_ignored = |name: String| ignore.contains(&name);
            if outcome.is_err() {
                return;
            }
            if !ignore.is_empty() && Event::name(raw).is_some_and(is_ignored) {
                ingested.ignored += 1;
                return;
            }
            outcome = match Event::parse(raw) {
                Ok(event) => ingest(
                    &transaction,
                    epoch,
                    &event,
                    received.get(&Key::from(&event)),
                    now,
                )
                .map(|new| {
                    ingested.new += usize::from(new.is_some());
                    counts.of(Some(event.kind)).received += u32::from(new.is_some());
                    // A time in the future does not show how old the event is.
                    newest = newest.max(Some(event.at.min(page.served_at)));
                }),
                Err(reason) => {
                    unreadable += 1;
                    if unreadable > MAX_UNREADABLE {
                        return;
                    }
                    let count = received.get(&Key::unparsed(fingerprint(&[raw.as_bytes()])));
                    insert_unreadable(&transaction, epoch, raw, &reason.to_string(), count, now)
                        .map(|new| {
                            ingested.new += usize::from(new);
                            ingested.unreadable += usize::from(new);
                            let count = counts.of(None);
                            count.received += u32::from(new);
                            count.failed += u32::from(new);
                        })
                }
            };
        })
        .map_err(|error| JournalError::InvalidRow(format!("a page in the inbox: {error}")))?;
        outcome?;
        if unreadable > MAX_UNREADABLE {
            let beyond = unreadable - MAX_UNREADABLE;
            tracing::error!(events = beyond, query = %page.query, "a page has too many events that cannot be parsed; those beyond the limit are not stored");
        }
        transaction
            .prepare_cached("UPDATE inbox SET ingested = 1 WHERE id = ?1")?
            .execute([page.id])?;
        if let Some(before) = before {
            transaction.execute(
                "UPDATE conversations SET read_in_session = 0 WHERE id IN (SELECT conversation FROM events WHERE id > ?1)",
                [before],
            )?;
        }
        counts.store(&transaction, now)?;
        if let Some(newest) = newest {
            transaction
                .prepare_cached(
                    "UPDATE poll_state SET newest_event = max(coalesce(newest_event, ?1), ?1)",
                )?
                .execute([newest])?;
        }
        ingested.progress = ingested.new + ingested.ignored + unreadable > 0;
        ingested.last_event = last_event(&transaction)?;
        ingested.received = counts.received();
        transaction.commit()?;
        Ok(ingested)
    }

    /// Records that a window was read to its end, and drops its pages. `cursor`: the time up to which BigChat was read.
    /// `clock_ahead`: by how many seconds BigChat's clock is ahead of this machine's.
    pub fn end_poll(&mut self, cursor: Timestamp, now: Millis, clock_ahead: i64) -> Result<()> {
        let transaction = self.begin()?;
        transaction.execute(
            "UPDATE poll_state SET polled_at = ?1, clock_ahead = ?2, read_at = coalesce(window_at, read_at), idle_polls = 0",
            params![now, clock_ahead],
        )?;
        transaction.execute("DELETE FROM inbox", [])?;
        drop_window(&transaction)?;
        move_cursor(&transaction, cursor, now)?;
        transaction.commit()?;
        Ok(())
    }

    /// Drops the unfinished window and its pages. All their events must have been ingested. The count of idle polls
    /// stays, since the window may be read again.
    pub fn forget_window(&mut self) -> Result<()> {
        let transaction = self.begin()?;
        transaction.execute("DELETE FROM inbox", [])?;
        drop_window(&transaction)?;
        transaction.commit()?;
        Ok(())
    }

    /// Counts a poll that used up its budget. Returns how many such polls found no new event, minus how many found one.
    /// The subtraction makes up for a window that is read again: the second time, the pages with those new events hold
    /// only known ones and count as idle.
    pub fn count_idle_poll(&mut self, is_idle: bool) -> Result<i64> {
        let sql =
            "UPDATE poll_state SET idle_polls = idle_polls + iif(?1, 1, -1) RETURNING idle_polls";
        Ok(self
            .connection
            .query_row(sql, [is_idle], |row| row.get(0))?)
    }

    /// Deletes all stored pages except the last.
    pub fn forget_pages_but_the_last(&mut self) -> Result<()> {
        self.connection.execute(
            "DELETE FROM inbox WHERE id <> (SELECT max(id) FROM inbox)",
            [],
        )?;
        Ok(())
    }
}

fn drop_window(transaction: &Transaction<'_>) -> Result<()> {
    transaction.execute(
        "UPDATE poll_state SET window_start = NULL, window_end = NULL, next_query = NULL, window_at = NULL",
        [],
    )?;
    Ok(())
}

/// Moves the cursor, unless it is there already.
fn move_cursor(transaction: &Transaction<'_>, cursor: Timestamp, now: Millis) -> Result<()> {
    transaction.execute(
        "UPDATE poll_state SET cursor = ?1, cursor_moved_at = ?2 WHERE cursor IS NOT ?1",
        params![cursor, now],
    )?;
    Ok(())
}

/// Ingests one event, unless the journal already has as many equal ones as were received. Returns its id if it is new.
fn ingest(
    transaction: &Transaction<'_>,
    epoch: Epoch,
    event: &Event,
    received: u32,
    now: Millis,
) -> Result<Option<EventId>> {
    let known = conversation(transaction, epoch, event)?;
    if count_equal(transaction, known, event)? >= received.max(1) {
        return Ok(None);
    }
    let id = insert(transaction, known, event, now)?;
    if known.is_forgotten {
        forget::settle(transaction, known.id, now)?;
        return Ok(Some(id));
    }
    // The conversation becomes due, unless it is waiting for its next attempt, or a write may still be in flight. The
    // back-off of a failed verification does not delay the event.
    transaction
        .prepare_cached(
            "UPDATE conversations SET waiting = waiting + 1, waiting_since = coalesce(waiting_since, ?2),
                due_at = iif(waiting > 0 OR stale_seq > fresh_seq, coalesce(due_at, ?2), ?2)
             WHERE id = ?1",
        )?
        .execute(params![known.id, now])?;
    Ok(Some(id))
}

/// The conversation of an event.
#[derive(Debug, Clone, Copy)]
struct Known {
    id: ConversationId,
    /// Whether its events are stored without data.
    is_forgotten: bool,
}

impl Known {
    /// The data to store for one of its events.
    fn stored_data(self, event: &Event) -> Option<&str> {
        event.data.as_deref().filter(|_| !self.is_forgotten)
    }
}

fn last_event(connection: &rusqlite::Connection) -> Result<EventId> {
    Ok(
        connection.query_row("SELECT coalesce(max(id), 0) FROM events", [], |row| {
            row.get(0)
        })?,
    )
}

/// The conversation of an event, which is inserted if it is new. A START sets its start time, unless it is known
/// already.
fn conversation(transaction: &Transaction<'_>, epoch: Epoch, event: &Event) -> Result<Known> {
    let started_at = (event.kind == EventKind::Start).then_some(event.at);
    let known: Option<(Known, Option<Timestamp>)> = transaction
        .prepare_cached(
            "SELECT id, forgotten_at IS NOT NULL, started_at FROM conversations WHERE epoch = ?1 AND bigchat_id = ?2",
        )?
        .query_row(params![epoch, event.conversation], |row| {
            let known = Known {
                id: row.get(0)?,
                is_forgotten: row.get(1)?,
            };
            Ok((known, row.get(2)?))
        })
        .optional()?;
    match known {
        None => {
            transaction
                .prepare_cached(
                    "INSERT INTO conversations (epoch, bigchat_id, started_at) VALUES (?1, ?2, ?3)",
                )?
                .execute(params![epoch, event.conversation, started_at])?;
            Ok(Known {
                id: ConversationId(transaction.last_insert_rowid()),
                is_forgotten: false,
            })
        }
        Some((known, None)) if started_at.is_some() => {
            transaction
                .prepare_cached("UPDATE conversations SET started_at = ?2 WHERE id = ?1")?
                .execute(params![known.id, started_at])?;
            Ok(known)
        }
        Some((known, _)) => Ok(known),
    }
}

fn count_equal(connection: &rusqlite::Connection, known: Known, event: &Event) -> Result<u32> {
    Ok(connection
        .prepare_cached(
            "SELECT count(*) FROM events
             WHERE conversation = ?1 AND fingerprint = ?2 AND kind = ?3 AND event_at = ?4 AND data IS ?5",
        )?
        .query_row(
            params![
                known.id,
                event.fingerprint(),
                event.kind,
                event.at,
                known.stored_data(event)
            ],
            |row| row.get(0),
        )?)
}

fn insert(
    transaction: &Transaction<'_>,
    known: Known,
    event: &Event,
    now: Millis,
) -> Result<EventId> {
    let values = params![
        known.id,
        event.kind,
        event.at,
        known.stored_data(event),
        event.fingerprint(),
        now
    ];
    Ok(transaction
        .prepare_cached(
            "INSERT INTO events (conversation, kind, event_at, data, fingerprint, received_at)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6) RETURNING id",
        )?
        .query_row(values, |row| row.get(0))?)
}

/// Stores an unparsable event as a dead letter, unless it is stored already.
fn insert_unreadable(
    transaction: &Transaction<'_>,
    epoch: Epoch,
    raw: &str,
    reason: &str,
    received: u32,
    now: Millis,
) -> Result<bool> {
    let fingerprint = fingerprint(&[raw.as_bytes()]);
    let known: Option<(EventId, u32)> = transaction
        .prepare_cached(
            "SELECT e.id, d.received FROM events e JOIN dead_letters d ON d.event = e.id
             WHERE e.conversation IS NULL AND e.fingerprint = ?1 AND coalesce(e.data, ?2) = ?2 AND d.epoch = ?3",
        )?
        .query_row(params![fingerprint, raw, epoch], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .optional()?;
    if let Some((event, known)) = known {
        if known < received {
            transaction
                .prepare_cached("UPDATE dead_letters SET received = ?2 WHERE event = ?1")?
                .execute(params![event, received])?;
        }
        return Ok(false);
    }
    let event: EventId = transaction
        .prepare_cached(
            "INSERT INTO events (kind, event_at, data, fingerprint, received_at) VALUES (?1, 0, ?2, ?3, ?4) RETURNING id",
        )?
        .query_row(params![UNREADABLE, raw, fingerprint, now], |row| row.get(0))?;
    transaction
        .prepare_cached(
            "INSERT INTO dead_letters (event, failed_at, epoch, received, permanent) VALUES (?1, ?2, ?3, ?4, 1)",
        )?
        .execute(params![event, now, epoch, received.max(1)])?;
    transaction
        .prepare_cached(
            "INSERT INTO attempts (event, attempts, counted, reason, request, response) VALUES (?1, 0, 0, ?2, '', '')",
        )?
        .execute(params![event, shortened(reason)])?;
    if let Some(conversation) = PartialEvent::of(raw).conversation
        && forget::is_forgotten(transaction, epoch, conversation)?
    {
        forget::erase_unparsed(transaction, event, now)?;
    }
    Ok(true)
}

/// Parses an unparsable dead letter again, for example after an upgrade of the program. If that succeeds, the event
/// replaces the dead letter, in the dead letter's epoch: a message as often as it was received, any other event once.
/// Otherwise, the reason is updated. Returns whether parsing succeeded. If this journal is a restored backup, the
/// event may have been delivered after the backup was made, so it counts as attempted, and its chat is read back first.
pub(super) fn ingest_dead_letter(
    transaction: &Transaction<'_>,
    id: EventId,
    now: Millis,
) -> Result<bool> {
    let (raw, epoch, received): (String, Epoch, u32) = transaction
        .prepare_cached(
            "SELECT e.data, coalesce(d.epoch, (SELECT max(id) FROM epochs)), coalesce(d.received, 1)
             FROM events e JOIN dead_letters d ON d.event = e.id WHERE e.id = ?1",
        )?
        .query_row([id], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    let event = match Event::parse(&raw) {
        Ok(event) => event,
        Err(reason) => {
            transaction
                .prepare_cached("UPDATE attempts SET reason = ?2 WHERE event = ?1")?
                .execute(params![id, shortened(&reason.to_string())])?;
            return Ok(false);
        }
    };
    let count = if event.kind.is_message() { received } else { 1 };
    while let Some(new) = ingest(transaction, epoch, &event, count, now)? {
        transaction
            .prepare_cached(
                "INSERT INTO attempts (event, conversation, attempts, counted, reason, request, response)
                 SELECT e.id, e.conversation, 1, 0, a.reason, '', '' FROM events e, attempts a WHERE e.id = ?1 AND a.event = ?2",
            )?
            .execute([new, id])?;
        transaction
            .prepare_cached(
                "UPDATE conversations SET stale_seq = stale_seq + 1 WHERE id = (SELECT conversation FROM events WHERE id = ?1)",
            )?
            .execute([new])?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use super::*;

    #[test]
    fn epoch_by_time() {
        let memory = Connection::open_in_memory().expect("a database");
        let mut store = Store::in_memory(memory, true).expect("a schema");
        let at = |seconds: i64| Timestamp::from_unix(1_000 + seconds).expect("a time");
        let mut epoch_at = |served_at, now| store.epoch_at(at(served_at), at(now));
        assert_eq!(epoch_at(0, 0).expect("an epoch"), Epoch(1));
        assert_eq!(epoch_at(300, 0).expect("an epoch"), Epoch(1));
        store
            .start_epoch(Epoch(1), at(0), None)
            .expect("a second epoch");
        for (served_at, now, epoch) in [
            (-3, 9, 1),
            // `date` may lag.
            (-2, 9, 2),
            (0, 9, 2),
            (9, 9, 2),
            (11, 9, 2),
            // The restart has set the clock back.
            (12, 9, 1),
        ] {
            let by_time = store.epoch_at(at(served_at), at(now)).expect("an epoch");
            assert_eq!(by_time, Epoch(epoch), "{served_at} {now}");
        }
    }
}
