//! Epochs of BigChat, its advisors, and their agents in OurAPI.

use rusqlite::{Connection, OptionalExtension, params};
use uuid::Uuid;

use super::activity::minute;
use super::queue::uuid;
use super::{Result, Store};
use crate::domain::event::Event;
use crate::domain::ids::{AdvisorId, Epoch};
use crate::domain::named::named;
use crate::domain::time::{Millis, Timestamp};

/// For how many minutes a loss counts as recent.
pub(super) const LOSS_MINUTES: i64 = 60;

/// How many denials must be counted before they are believed. A few may be temporary: from an instance that lags behind
/// the others at the same address, or from another service that answers for a while.
pub(super) const BELIEVED_DENIALS: u32 = 3;

named! {
    /// What an API denies, because it does not know or accept it.
    Denial {
        /// BigChat does not know the conversation, or has no usable record.
        Conversation = "conversation",
        /// BigChat does not know the advisor, or has no usable record.
        Advisor = "advisor",
        /// OurAPI does not accept the advisor's agent.
        Agent = "agent",
    }
}

/// A conversation whose start time shows whether BigChat has restarted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// BigChat's id of the conversation.
    pub bigchat_id: i64,
    /// When it started.
    pub started_at: Timestamp,
}

/// The first conversation of an epoch, whose id is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FirstConversation {
    pub started_at: Timestamp,
    /// Its first advisor.
    pub advisor: Option<AdvisorId>,
}

/// What the journal knows about an advisor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KnownAdvisor {
    /// Name and e-mail address.
    Person {
        /// Names are not unique.
        name: String,
        /// The address identifies the advisor.
        email: String,
    },
    /// BigChat does not know the advisor, or has no usable record.
    Gone,
}

/// What the journal knows about an e-mail address in OurAPI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KnownAgent {
    /// OurAPI's agent with that address.
    Agent(Uuid),
    /// OurAPI does not accept the agent.
    Refused,
}

pub(super) fn current_epoch(connection: &Connection) -> Result<Epoch> {
    Ok(connection
        .prepare_cached("SELECT max(id) FROM epochs")?
        .query_row([], |row| row.get(0))?)
}

impl Store {
    /// The current epoch.
    pub fn epoch(&mut self) -> Result<Epoch> {
        current_epoch(&self.connection)
    }

    /// The current epoch, and the conversations in it with the lowest ids whose start time is known. After a restart
    /// BigChat assigns these ids first.
    pub fn probes(&mut self, at_most: u32) -> Result<(Epoch, Vec<Probe>)> {
        let epoch = self.epoch()?;
        let mut statement = self.connection.prepare_cached(
            // A distinct condition for each, so that each is found by the index whatever the number of conversations.
            "SELECT bigchat_id, started_at FROM conversations
             WHERE epoch = ?1 AND bigchat_id = 1 AND started_at IS NOT NULL
             UNION ALL
             SELECT * FROM (SELECT bigchat_id, started_at FROM conversations
                WHERE epoch = ?1 AND bigchat_id <> 1 AND started_at IS NOT NULL ORDER BY bigchat_id LIMIT ?2)
             LIMIT ?2",
        )?;
        let probes = statement.query_map(params![epoch, at_most], |row| {
            Ok(Probe {
                bigchat_id: row.get(0)?,
                started_at: row.get(1)?,
            })
        })?;
        Ok((epoch, probes.collect::<rusqlite::Result<_>>()?))
    }

    /// The time of the first of these STARTs for whose conversation the epoch has another start time.
    pub fn first_other_start(
        &mut self,
        epoch: Epoch,
        starts: &[Event],
    ) -> Result<Option<Timestamp>> {
        let mut has_other = self.connection.prepare_cached(
            "SELECT 1 FROM conversations WHERE epoch = ?1 AND bigchat_id = ?2 AND started_at <> ?3",
        )?;
        for start in starts {
            if has_other.exists(params![epoch, start.conversation, start.at])? {
                return Ok(Some(start.at));
            }
        }
        Ok(None)
    }

    /// Records when a conversation started, and its first advisor, if it has one.
    pub fn record_details(
        &mut self,
        epoch: Epoch,
        bigchat_id: i64,
        started_at: Timestamp,
        advisor: Option<AdvisorId>,
    ) -> Result<()> {
        record_details(&self.connection, epoch, bigchat_id, started_at, advisor)
    }

    /// Begins a new epoch, because BigChat has restarted since `epoch`, at `began_at` or before. Since then, ids mean
    /// new conversations and advisors. Returns the new epoch; `None` if another caller has begun one already.
    pub fn start_epoch(
        &mut self,
        epoch: Epoch,
        began_at: Timestamp,
        first: Option<FirstConversation>,
    ) -> Result<Option<Epoch>> {
        let transaction = self.begin()?;
        if current_epoch(&transaction)? != epoch {
            return Ok(None);
        }
        let epoch = Epoch(epoch.0 + 1);
        transaction.execute(
            "INSERT INTO epochs (id, began_at) VALUES (?1, ?2)",
            params![epoch, began_at],
        )?;
        // BigChat is not asked about earlier epochs again, but OurAPI is.
        transaction.execute("DELETE FROM denials WHERE what <> ?1", [Denial::Agent])?;
        if let Some(FirstConversation {
            started_at,
            advisor,
        }) = first
        {
            record_details(&transaction, epoch, 1, started_at, advisor)?;
        }
        transaction.commit()?;
        Ok(Some(epoch))
    }

    /// What is known about an advisor; `None`: nothing is known.
    pub fn advisor(&mut self, epoch: Epoch, bigchat_id: AdvisorId) -> Result<Option<KnownAdvisor>> {
        let row: Option<(Option<String>, Option<String>)> = self
            .connection
            .prepare_cached(
                "SELECT name, email FROM advisors WHERE epoch = ?1 AND bigchat_id = ?2",
            )?
            .query_row(params![epoch, bigchat_id], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })
            .optional()?;
        Ok(row.map(|row| match row {
            (Some(name), Some(email)) => KnownAdvisor::Person { name, email },
            _ => KnownAdvisor::Gone,
        }))
    }

    /// Counts a denial, and returns whether it is believed: it was repeated, with at least a poll interval in between.
    pub fn is_denied(
        &mut self,
        epoch: Epoch,
        what: Denial,
        bigchat_id: i64,
        now: Millis,
    ) -> Result<bool> {
        Ok(self
            .connection
            .prepare_cached(
                "INSERT INTO denials (epoch, what, bigchat_id, count, counted_at)
                 VALUES (?1, ?2, ?3, 1, ?4)
                 ON CONFLICT DO UPDATE SET (count, counted_at) = (SELECT count + is_apart, iif(is_apart, ?4, counted_at)
                    FROM (SELECT abs(?4 - counted_at) >= 1000 * poll_interval AS is_apart FROM control))
                 RETURNING count >= ?5",
            )?
            .query_row(
                params![epoch, what, bigchat_id, now, BELIEVED_DENIALS],
                |row| row.get(0),
            )?)
    }

    /// Whether a denial was believed, and may be asked about again.
    pub fn is_believed(&mut self, epoch: Epoch, what: Denial, bigchat_id: i64) -> Result<bool> {
        Ok(self
            .connection
            .prepare_cached(
                "SELECT 1 FROM denials WHERE epoch = ?1 AND what = ?2 AND bigchat_id = ?3 AND count >= ?4",
            )?
            .exists(params![epoch, what, bigchat_id, BELIEVED_DENIALS])?)
    }

    /// Records BigChat's answer about an advisor.
    pub fn record_advisor(
        &mut self,
        epoch: Epoch,
        bigchat_id: AdvisorId,
        advisor: &KnownAdvisor,
    ) -> Result<()> {
        let (name, email) = match advisor {
            KnownAdvisor::Person { name, email } => (Some(name), Some(email)),
            KnownAdvisor::Gone => (None, None),
        };
        if name.is_some() {
            self.connection
                .prepare_cached(
                    "DELETE FROM denials WHERE epoch = ?1 AND what = ?2 AND bigchat_id = ?3",
                )?
                .execute(params![epoch, Denial::Advisor, bigchat_id])?;
        }
        self.connection
            .prepare_cached("INSERT OR REPLACE INTO advisors (epoch, bigchat_id, name, email) VALUES (?1, ?2, ?3, ?4)")?
            .execute(params![epoch, bigchat_id, name, email])?;
        Ok(())
    }

    /// What is known about the agent of an e-mail address.
    pub fn agent(&mut self, email: &str) -> Result<Option<KnownAgent>> {
        let row: Option<Option<String>> = self
            .connection
            .prepare_cached("SELECT agent_id FROM agents WHERE email = ?1")?
            .query_row([email], |row| row.get(0))
            .optional()?;
        row.map(|id| {
            id.map_or(Ok(KnownAgent::Refused), |id| {
                Ok(KnownAgent::Agent(uuid(&id)?))
            })
        })
        .transpose()
    }

    /// Records the agent of an e-mail address, and OurAPI's spelling of the address. Does nothing if OurAPI has lost
    /// data since the agent was requested, that is, if the number of losses is no longer `losses`.
    pub fn record_agent(
        &mut self,
        email: &str,
        spelled: Option<&str>,
        agent: KnownAgent,
        losses: i64,
    ) -> Result<()> {
        let id = match agent {
            KnownAgent::Agent(id) => Some(id.to_string()),
            KnownAgent::Refused => None,
        };
        if id.is_some() {
            self.connection
                .prepare_cached(
                    "DELETE FROM denials WHERE what = ?2 AND EXISTS (SELECT 1 FROM advisors v
                        WHERE v.epoch = denials.epoch AND v.bigchat_id = denials.bigchat_id AND v.email = ?1)",
                )?
                .execute(params![email, Denial::Agent])?;
        }
        self.connection
            .prepare_cached(
                "INSERT OR REPLACE INTO agents (email, spelled, agent_id)
                 SELECT ?1, ?2, ?3 FROM control WHERE losses = ?4",
            )?
            .execute(params![email, spelled, id, losses])?;
        Ok(())
    }

    /// The e-mail address of an agent as OurAPI spells it, if the journal has the agent.
    pub fn email_of(&mut self, agent: Uuid) -> Result<Option<String>> {
        Ok(self
            .connection
            .prepare_cached("SELECT coalesce(spelled, email) FROM agents WHERE agent_id = ?1")?
            .query_row([agent.to_string()], |row| row.get(0))
            .optional()?)
    }

    /// Records that OurAPI has lost data: every agent and every chat is checked again before it is used. Returns how
    /// many losses there have been.
    pub fn record_loss(&mut self, now: Millis) -> Result<i64> {
        let transaction = self.begin()?;
        let minute = minute(now);
        // A clock that was set back must not make old losses look recent forever.
        transaction.execute(
            "DELETE FROM losses WHERE minute NOT BETWEEN ?1 - ?2 AND ?1",
            [minute, LOSS_MINUTES],
        )?;
        transaction.execute(
            "INSERT INTO losses (minute, count) VALUES (?1, 1) ON CONFLICT (minute) DO UPDATE SET count = count + 1",
            [minute],
        )?;
        transaction.execute("DELETE FROM agents", [])?;
        let losses = transaction.query_row(
            "UPDATE control SET losses = losses + 1 RETURNING losses",
            [],
            |row| row.get(0),
        )?;
        transaction.commit()?;
        Ok(losses)
    }

    /// The agent of an advisor, if known.
    pub fn agent_of(&mut self, epoch: Epoch, advisor: AdvisorId) -> Result<Option<Uuid>> {
        let agent: Option<Option<String>> = self
            .connection
            .prepare_cached(
                "SELECT a.agent_id FROM advisors v JOIN agents a ON a.email = v.email
                 WHERE v.epoch = ?1 AND v.bigchat_id = ?2",
            )?
            .query_row(params![epoch, advisor], |row| row.get(0))
            .optional()?;
        agent.flatten().map(|id| uuid(&id)).transpose()
    }

    /// Forgets the agent.
    pub fn forget_agent(&mut self, agent: Uuid) -> Result<()> {
        self.connection.execute(
            "DELETE FROM agents WHERE agent_id = ?1",
            [agent.to_string()],
        )?;
        Ok(())
    }
}

/// Forgets which advisors and conversations BigChat denies and which agents OurAPI denies, so that they are asked for
/// again. Their denials stay counted, so a single further one is believed. Those of earlier epochs stay denied.
pub(super) fn ask_again(connection: &Connection) -> Result<()> {
    connection.execute("DELETE FROM agents WHERE agent_id IS NULL", [])?;
    connection.execute(
        "DELETE FROM advisors WHERE name IS NULL AND epoch = (SELECT max(id) FROM epochs)",
        [],
    )?;
    // These are found through the denials, since the conversations' details have no index.
    connection.execute(
        "UPDATE conversations SET details = 'unread'
         WHERE details = 'gone' AND iif(transfer_advisor IS NULL, chat_agent, started_at) IS NULL
            AND (epoch, bigchat_id) IN (
            SELECT epoch, bigchat_id FROM denials WHERE epoch = (SELECT max(id) FROM epochs) AND what = ?1)",
        [Denial::Conversation],
    )?;
    Ok(())
}

fn record_details(
    connection: &Connection,
    epoch: Epoch,
    bigchat_id: i64,
    started_at: Timestamp,
    advisor: Option<AdvisorId>,
) -> Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO conversations (epoch, bigchat_id, started_at, first_advisor, details) VALUES (?1, ?2, ?3, ?4, 'read')
             ON CONFLICT (epoch, bigchat_id) DO UPDATE SET
                started_at = coalesce(started_at, excluded.started_at),
                first_advisor = iif(details = 'read', first_advisor, excluded.first_advisor),
                details = 'read'",
        )?
        .execute(params![epoch, bigchat_id, started_at, advisor])?;
    Ok(())
}
