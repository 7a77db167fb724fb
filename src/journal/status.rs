//! What `bigchat-sync status`, the console and the metrics show of the journal. The cost does not grow with the number
//! of events, except for the counts of waiting and failed events, which scan an index.

use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};
use serde::Serialize;

use super::activity::minute;
use super::dead_letters::count_open;
use super::directory::{BELIEVED_DENIALS, Denial, LOSS_MINUTES};
use super::file::DatabaseFile;
use super::queue::count_waiting;
use super::verification::latest_pass;
use super::{Result, Store, api_status, count, pause, unsigned};
use crate::domain::ids::{AdvisorId, ConversationId, EventId};
use crate::domain::pause::Pause;
use crate::domain::time::{Millis, Timestamp};
use crate::http::{Api, ApiStatus};

/// The number of latest deliveries whose delivery times are measured.
const DELIVERIES: u32 = 1_000;

/// The maximum age of these deliveries.
const DELIVERIES_WITHIN: Duration = Duration::from_secs(3600);

/// The maximum number of failed events that are grouped by reason.
const GROUPED: u32 = 10_000;

/// The maximum number of groups.
const GROUPS: u32 = 100;

/// The maximum number of differing chats shown.
const DIFFERING: u32 = 10;

/// The maximum number of advisors shown for each reason.
const ADVISORS: u32 = 10;

/// The maximum number of gaps shown.
const GAPS: u32 = 10;

/// The rates are averages over this many minutes and the current one, or over fewer if the first event is more recent.
const RATE_MINUTES: i64 = 5;

/// Failed events of one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Group {
    /// Why they failed.
    pub reason: String,
    /// The number of events.
    pub count: u64,
    /// When the latest one failed.
    pub latest_at: Millis,
    /// Whether a retry can never succeed.
    pub permanent: bool,
}

/// The event that has waited longest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Oldest {
    /// Its id.
    pub event: EventId,
    /// BigChat's id of its conversation.
    pub conversation: i64,
    /// START, END, MESSAGE or TRANSFER.
    pub kind: String,
    /// When it began to wait.
    pub since: Millis,
    /// How many attempts failed.
    pub attempts: u32,
    /// Why the last attempt failed.
    pub reason: Option<String>,
}

/// A period that BigChat no longer reports. Its events are lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Gap {
    /// By BigChat's clock.
    pub from: Timestamp,
    /// By BigChat's clock.
    pub until: Timestamp,
    /// When the gap was found, by this machine's clock.
    pub found_at: Millis,
}

/// How long deliveries took, from receiving the event to its delivery or dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct DeliveryTimes {
    /// The median, in ms.
    pub median: i64,
    /// The 95th percentile, in ms.
    pub p95: i64,
    /// The maximum, in ms.
    pub max: i64,
    /// The number of deliveries.
    pub count: usize,
}

/// The latest pass, which verifies all chats in idle time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verification {
    pub began_at: Millis,
    /// `None`: it is in progress.
    pub ended_at: Option<Millis>,
    /// How many chats were verified so far, and how many are left.
    pub verified: u64,
    pub left: u64,
}

/// A chat that differs from the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DifferingChat {
    pub external_id: String,
    /// The fields that another client has changed.
    pub drift: Option<String>,
    /// What OurAPI has lost of it.
    pub missing: Option<String>,
}

/// Advisors of the current epoch without an agent, for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WithoutAgent {
    /// What is denied: the advisor, by BigChat, or the agent, by OurAPI.
    pub denied: Denial,
    pub count: u64,
    /// The first of them.
    pub advisors: Vec<AdvisorId>,
}

/// The journal's figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// BigChat.
    pub bigchat: ApiStatus,
    /// OurAPI.
    pub our_api: ApiStatus,
    /// Time between polls of the daemon that is running or ran last, in seconds.
    pub poll_interval_s: f64,
    /// The period in which it verifies each chat, in seconds; `None`: it does not verify chats in idle time.
    pub verify_every_s: Option<f64>,
    /// When a poll last read its window to the end.
    pub polled_at: Option<Millis>,
    /// When a page of a window was last stored. A long window takes several polls.
    pub page_at: Option<Millis>,
    /// The time up to which BigChat was read, by its clock.
    pub cursor_at: Option<Timestamp>,
    /// How far that is behind BigChat's clock, in seconds.
    pub behind_s: Option<i64>,
    /// How far BigChat's clock was ahead of this machine's at the latest completed poll, in seconds.
    pub clock_ahead_s: Option<i64>,
    /// When the cursor last changed, by this machine's clock.
    pub cursor_moved_at: Option<Millis>,
    /// Periods that BigChat no longer reports and that were not read, latest first.
    pub gaps: Vec<Gap>,
    /// The latest time of any event received, by BigChat's clock.
    pub newest_event_at: Option<Timestamp>,
    /// The current pause.
    pub paused: Option<Pause>,
    /// When the latest pause ended.
    pub resumed_at: Option<Millis>,
    /// How many events are waiting.
    pub waiting: u64,
    /// The event that has waited longest.
    pub oldest_waiting: Option<Oldest>,
    /// How many events are dead letters that need action.
    pub failed: u64,
    /// The oldest of these, grouped by reason, most frequent first.
    pub failed_by_reason: Vec<Group>,
    /// How many events were received per minute, over the last five or six minutes.
    pub received_per_minute: f64,
    /// How many events were delivered per minute, over the same time.
    pub delivered_per_minute: f64,
    /// How long recent deliveries took.
    pub delivery_ms: Option<DeliveryTimes>,
    /// How many chats are still to be verified, or checked after a loss.
    pub rebuilding: u64,
    /// The latest pass, which verifies all chats in idle time; `None`: there has been none.
    pub verification: Option<Verification>,
    /// How many chats have fields that another client has changed.
    pub drifted: u64,
    /// How many chats OurAPI has lost, in whole or in part, that were not restored.
    pub incomplete: u64,
    /// Some of the chats that differ.
    pub differing: Vec<DifferingChat>,
    /// The advisors without an agent. Their chats have no agent either.
    pub without_agent: Vec<WithoutAgent>,
    /// How many times OurAPI was found to have lost data.
    pub losses: u64,
    /// How many of these losses were found within the last hour.
    pub recent_losses: u64,
    /// How many times BigChat was found to have restarted.
    pub restarts: u64,
    /// The free space on the disk of the database; `None`: unknown.
    pub disk_free_bytes: Option<u64>,
}

impl Figures {
    /// When BigChat was last read: a poll completed, or a page was stored since; `None`: no poll has completed yet.
    pub fn last_read(&self) -> Option<Millis> {
        self.polled_at.and(self.polled_at.max(self.page_at))
    }
}

impl Store {
    /// The current figures.
    pub fn figures(&mut self, now: Millis) -> Result<Figures> {
        let disk_free_bytes = self.file.as_ref().and_then(DatabaseFile::disk_free_bytes);
        // One transaction, so that all figures are of the same moment.
        let transaction = self.connection.transaction()?;
        let source = source(&transaction, now)?;
        let (pause, resumed_at) = pause::latest(&transaction)?;
        let paused = pause.filter(|pause| pause.left(now).is_some());
        let (received, delivered) = rates(&transaction, now)?;
        let (losses, restarts, rebuilding, poll_interval_s, verify_every_s) = transaction
            .prepare_cached(
                "SELECT losses, (SELECT count(*) - 1 FROM epochs),
                    (SELECT count(*) FROM requested_chats WHERE state IS NULL)
                        + (SELECT count(*) FROM conversations WHERE external_id IS NOT NULL AND forgotten_at IS NULL AND verified_losses < losses),
                    poll_interval, verify_every
                 FROM control",
            )?
            .query_row([], |row| {
                let (losses, restarts) = (unsigned(row, 0)?, unsigned(row, 1)?);
                Ok((losses, restarts, unsigned(row, 2)?, row.get(3)?, row.get(4)?))
            })?;
        let recent_losses = transaction
            .prepare_cached("SELECT coalesce(sum(count), 0) FROM losses WHERE minute > ?1 - ?2 AND minute <= ?1")?
            .query_row([minute(now), LOSS_MINUTES], count)?;
        let (drifted, incomplete) = transaction
            .prepare_cached(
                "SELECT (SELECT count(*) FROM conversations WHERE drift IS NOT NULL),
                    (SELECT count(*) FROM conversations WHERE missing IS NOT NULL)",
            )?
            .query_row([], |row| Ok((unsigned(row, 0)?, unsigned(row, 1)?)))?;
        Ok(Figures {
            bigchat: api_status::of(&transaction, Api::BigChat)?.without_passed_limit(now),
            our_api: api_status::of(&transaction, Api::OurApi)?.without_passed_limit(now),
            poll_interval_s,
            verify_every_s,
            polled_at: source.polled_at,
            page_at: source.page_at,
            cursor_at: source.cursor,
            behind_s: source.behind,
            clock_ahead_s: source.clock_ahead,
            cursor_moved_at: source.cursor_moved_at,
            gaps: gaps(&transaction)?,
            newest_event_at: source.newest_event,
            paused,
            // If no daemon is running, the end of a pause is not recorded.
            resumed_at: match paused {
                Some(_) => None,
                None => resumed_at.or(pause.and_then(|pause| pause.until)),
            },
            waiting: count_waiting(&transaction)?,
            oldest_waiting: oldest_waiting(&transaction)?,
            failed: count_open(&transaction, u32::MAX)?,
            failed_by_reason: groups(&transaction)?,
            received_per_minute: received,
            delivered_per_minute: delivered,
            delivery_ms: delivery_times(&transaction, now)?,
            rebuilding,
            verification: verification(&transaction)?,
            drifted,
            incomplete,
            differing: differing(&transaction)?,
            without_agent: without_agent(&transaction)?,
            losses,
            recent_losses,
            restarts,
            disk_free_bytes,
        })
    }
}

struct Read {
    polled_at: Option<Millis>,
    page_at: Option<Millis>,
    cursor: Option<Timestamp>,
    behind: Option<i64>,
    clock_ahead: Option<i64>,
    cursor_moved_at: Option<Millis>,
    newest_event: Option<Timestamp>,
}

fn source(connection: &Connection, now: Millis) -> Result<Read> {
    Ok(connection
        .prepare_cached(
            "SELECT polled_at, cursor, clock_ahead, newest_event, cursor_moved_at, page_at FROM poll_state",
        )?
        .query_row([], |row| {
            let cursor: Option<Timestamp> = row.get(1)?;
            let ahead: Option<i64> = row.get(2)?;
            let there = ahead.map(|ahead| now.0.div_euclid(1000).saturating_add(ahead));
            Ok(Read {
                polled_at: row.get(0)?,
                page_at: row.get(5)?,
                cursor,
                behind: there
                    .zip(cursor)
                    .map(|(there, cursor)| there.saturating_sub(cursor.unix()).max(0)),
                clock_ahead: ahead,
                newest_event: row.get(3)?,
                cursor_moved_at: row.get(4)?,
            })
        })?)
}

fn gaps(connection: &Connection) -> Result<Vec<Gap>> {
    let mut statement = connection.prepare_cached(
        "SELECT starts_at, ends_at, found_at FROM gaps ORDER BY id DESC LIMIT ?1",
    )?;
    let gaps = statement.query_map([GAPS], |row| {
        Ok(Gap {
            from: row.get(0)?,
            until: row.get(1)?,
            found_at: row.get(2)?,
        })
    })?;
    Ok(gaps.collect::<rusqlite::Result<_>>()?)
}

fn oldest_waiting(connection: &Connection) -> Result<Option<Oldest>> {
    let oldest: Option<ConversationId> = connection
        .prepare_cached(
            "SELECT id FROM conversations WHERE waiting_since IS NOT NULL ORDER BY waiting_since LIMIT 1",
        )?
        .query_row([], |row| row.get(0))
        .optional()?;
    Ok(connection
        .prepare_cached(
            "SELECT e.id, c.bigchat_id, e.kind, c.waiting_since, coalesce(a.attempts, 0), a.reason
             FROM conversations c JOIN events e ON e.id = coalesce(
                (SELECT min(event) FROM redeliveries WHERE conversation = c.id),
                (SELECT id FROM events w WHERE w.conversation = c.id AND w.id > c.offset
                    AND NOT EXISTS (SELECT 1 FROM dead_letters d WHERE d.event = w.id) ORDER BY w.id LIMIT 1))
             LEFT JOIN attempts a ON a.event = e.id
             WHERE c.id = ?1",
        )?
        .query_row([oldest], |row| {
            Ok(Oldest {
                event: row.get(0)?,
                conversation: row.get(1)?,
                kind: row.get(2)?,
                since: row.get(3)?,
                attempts: row.get(4)?,
                reason: row.get(5)?,
            })
        })
        .optional()?)
}

fn verification(connection: &Connection) -> Result<Option<Verification>> {
    let Some(pass) = latest_pass(connection)? else {
        return Ok(None);
    };
    Ok(Some(Verification {
        began_at: pass.began_at,
        ended_at: pass.ended_at,
        verified: pass.verified,
        left: match pass.ended_at {
            None => connection
                .prepare_cached("SELECT count(*) FROM conversations WHERE verified_in < ?1")?
                .query_row([pass.id], count)?,
            Some(_) => 0,
        },
    }))
}

/// Chats with losses come first.
fn differing(connection: &Connection) -> Result<Vec<DifferingChat>> {
    let mut statement = connection.prepare_cached(
        "SELECT external_id, drift, missing FROM (
            SELECT * FROM (SELECT id, external_id, drift, missing FROM conversations WHERE missing IS NOT NULL LIMIT ?1)
            UNION
            SELECT * FROM (SELECT id, external_id, drift, missing FROM conversations WHERE drift IS NOT NULL LIMIT ?1))
         ORDER BY missing IS NULL, id LIMIT ?1",
    )?;
    let differing = statement.query_map([DIFFERING], |row| {
        Ok(DifferingChat {
            external_id: row.get::<_, Option<String>>(0)?.unwrap_or_default(),
            drift: row.get(1)?,
            missing: row.get(2)?,
        })
    })?;
    Ok(differing.collect::<rusqlite::Result<_>>()?)
}

fn without_agent(connection: &Connection) -> Result<Vec<WithoutAgent>> {
    let mut all = Vec::new();
    for denied in [Denial::Advisor, Denial::Agent] {
        let mut statement = connection.prepare_cached(
            // OurAPI is asked once for an address, which several advisors may have, also in different epochs.
            "SELECT bigchat_id, count(*) OVER () FROM (
                SELECT bigchat_id FROM denials
                WHERE what = ?1 AND count >= ?2 AND epoch = (SELECT max(id) FROM epochs)
                UNION
                SELECT v.bigchat_id FROM advisors v JOIN agents a ON a.email = v.email
                WHERE ?1 = ?4 AND v.epoch = (SELECT max(id) FROM epochs) AND a.agent_id IS NULL)
             ORDER BY bigchat_id LIMIT ?3",
        )?;
        let (mut count, mut advisors) = (0, Vec::new());
        let mut rows =
            statement.query(params![denied, BELIEVED_DENIALS, ADVISORS, Denial::Agent])?;
        while let Some(row) = rows.next()? {
            advisors.push(row.get(0)?);
            count = unsigned(row, 1)?;
        }
        if count > 0 {
            all.push(WithoutAgent {
                denied,
                count,
                advisors,
            });
        }
    }
    Ok(all)
}

fn groups(connection: &Connection) -> Result<Vec<Group>> {
    let mut statement = connection.prepare_cached(
        "SELECT reason, count(*), max(failed_at), min(permanent) FROM (
            SELECT coalesce(a.reason, '') AS reason, d.failed_at, d.permanent FROM dead_letters d
            LEFT JOIN attempts a ON a.event = d.event
            WHERE d.discarded_at IS NULL ORDER BY d.event LIMIT ?1)
         GROUP BY reason ORDER BY count(*) DESC, reason LIMIT ?2",
    )?;
    let groups = statement.query_map([GROUPED, GROUPS], |row| {
        Ok(Group {
            reason: row.get(0)?,
            count: unsigned(row, 1)?,
            latest_at: row.get(2)?,
            permanent: row.get(3)?,
        })
    })?;
    Ok(groups.collect::<rusqlite::Result<_>>()?)
}

fn rates(connection: &Connection, now: Millis) -> Result<(f64, f64)> {
    let to = minute(now);
    let from = to - RATE_MINUTES;
    let (received, delivered, first): (f64, f64, Option<i64>) = connection
        .prepare_cached(
            "SELECT total(received), total(delivered), (SELECT min(minute) FROM activity) FROM activity WHERE minute BETWEEN ?1 AND ?2",
        )?
        .query_row([from, to], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    let begun = Millis(first.unwrap_or(from).max(from) * 60_000);
    let minutes = (now.since(begun).as_secs_f64() / 60.0).max(1.0);
    Ok((received / minutes, delivered / minutes))
}

fn delivery_times(connection: &Connection, now: Millis) -> Result<Option<DeliveryTimes>> {
    let mut statement = connection.prepare_cached(
        "SELECT waited FROM deliveries WHERE delivered_at > ?1 AND delivered_at <= ?2 AND waited IS NOT NULL
         ORDER BY delivered_at DESC LIMIT ?3",
    )?;
    let within = params![now.minus(DELIVERIES_WITHIN), now, DELIVERIES];
    let times = statement.query_map(within, |row| row.get::<_, i64>(0))?;
    let mut times: Vec<i64> = times.collect::<rusqlite::Result<_>>()?;
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100].max(0);
    Ok((!times.is_empty()).then(|| DeliveryTimes {
        median: at(50),
        p95: at(95),
        max: at(100),
        count: times.len(),
    }))
}
