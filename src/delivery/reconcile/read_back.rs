//! The remedy for a stale conversation: the chat is read back, and its messages are accounted for.

use tokio::time::sleep;
use tracing::field::{DisplayValue, display};
use uuid::Uuid;

use super::verify::LAG;
use super::{Reconciliation, Step, Stopped};
use crate::delivery::attempts::AttemptError;
use crate::domain::account::{self, MessageKey, MessageState, Recorded};
use crate::domain::conversation::{Conversation, FieldSet, Observed, Pending};
use crate::domain::ids::{AdvisorId, EventId};
use crate::domain::progress::{Missing, Observation};
use crate::http::{Api, ApiError, ErrorKind};
use crate::our_api::{self, Message};

/// When the chat's messages have to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needed {
    /// The chat may have messages that the journal does not know.
    Always,
    /// If the journal has any message of the chat, because a delivered one may be missing.
    IfAny,
    /// If a message waits, because it may have been delivered.
    IfWaiting,
}

/// A chat as read back.
pub(super) enum Refreshed {
    /// The known chat, perhaps changed.
    Ours(our_api::Chat),
    /// The chat does not exist, or another one has its external id.
    Gone,
}

impl Reconciliation {
    pub(super) async fn read_back(&mut self) -> Result<(), Stopped> {
        let first = self.events.first().map(|event| event.id);
        let failed = |error| Stopped::at(first, error);
        let Refreshed::Ours(found) = self.refresh().await.map_err(failed)? else {
            if self.events.is_empty() && !self.rebuilds() {
                // No event needs the chat. The chat is recorded as gone once an event needs it.
                return self.stays_lost();
            }
            return self.gone(self.rebuilds()).await.map_err(failed);
        };
        let unknown = self.unknown_fields();
        let before = self.conversation.observed.agent;
        let (observed, mut drift) = self.merged(&found, unknown).await.map_err(failed)?;
        self.conversation.observed = observed;
        if drift.agent && found.agent_id.is_none() && !self.claim.drift.agent {
            drift.agent = !self.is_agent_lost(before).await.map_err(failed)?;
        }
        // Drift that was already known has been reported.
        if drift != self.claim.drift {
            self.report_drift(drift, &found);
        }
        self.drift = Some(drift);
        self.agent_may_be_gone(before, found.agent_id)
            .await
            .map_err(failed)?;
        let needed = if self.must_be_read() {
            Needed::Always
        } else if self.claim.is_lost && self.rebuilds() {
            Needed::IfAny
        } else {
            Needed::IfWaiting
        };
        self.account(found.chat_id, needed).await
    }

    /// The fields that may have been written without a record in the journal: those changed by an event whose outcome
    /// is unknown, or by an event that may have been delivered with a newer copy of the journal. Waiting changes are
    /// written together, so if one has an unknown outcome, the fields that the others change count, too.
    fn unknown_fields(&self) -> FieldSet {
        let is_unknown = |event: &&Pending| {
            self.claim.may_be_carried_out(event)
                || self.must_be_read() && self.claim.may_be_delivered(event, self.replay_until())
        };
        let changes = || {
            self.events
                .iter()
                .filter(|event| !event.payload.kind().is_message())
        };
        let is_any_unknown = self.events.iter().any(|event| is_unknown(&event));
        if !is_any_unknown {
            return self.unknown_if_stale();
        }
        let changed = match changes().any(|event| self.claim.may_be_carried_out(event)) {
            true => FieldSet::changed_by(changes()),
            false => FieldSet::changed_by(changes().filter(is_unknown)),
        };
        // A field whose desired value differs from the observed one may have been written together with these.
        let Conversation {
            desired, observed, ..
        } = &self.conversation;
        FieldSet {
            started_at: changed.started_at
                || desired.started_at.is_none()
                || desired.started_at != observed.started_at,
            ended_at: changed.ended_at || desired.ended_at > observed.ended_at,
            agent: changed.agent || desired.advisor() != observed.advisor,
        }
    }

    /// All fields if the chat became stale: a write may have been carried out, and it is unknown which fields it
    /// changed.
    pub(super) fn unknown_if_stale(&self) -> FieldSet {
        match self.claim.became_stale {
            true => FieldSet::ALL,
            false => FieldSet::default(),
        }
    }

    /// Whether the chat has no agent because OurAPI has lost the agent. An agent that another client has removed from
    /// the chat still exists. After a loss, the advisor's agent is written again.
    async fn is_agent_lost(&mut self, before: Option<Uuid>) -> Result<bool, AttemptError> {
        let agents = &self.delivery.agents;
        let is_lost = match before {
            Some(agent) if self.rebuilds() => agents.is_gone(agent).await?,
            _ => false,
        };
        if is_lost {
            agents.forget_if_lost(before).await?;
            self.conversation.observed.advisor = None;
        }
        Ok(is_lost)
    }

    /// After a loss, the chat's agent may be gone. If so, and if the advisor now has another agent, that agent is
    /// written. An agent that still exists stays, whichever client set it.
    async fn agent_may_be_gone(
        &mut self,
        before: Option<Uuid>,
        named: Option<Uuid>,
    ) -> Result<(), AttemptError> {
        if named.is_none() && self.claim.drift.agent {
            // Another client has removed the agent.
            return Ok(());
        }
        let agent = named.or(before);
        let Conversation {
            epoch,
            desired,
            observed,
            ..
        } = &mut self.conversation;
        if let Some(advisor) = desired.advisor()
            && self.claim.is_lost
            && observed.advisor == Some(advisor)
            && self.delivery.agents.resolve(*epoch, advisor).await? != agent
            && !self.delivery.agents.is_there(agent).await?
        {
            observed.agent = named;
            observed.advisor = None;
        }
        Ok(())
    }

    /// The observed chat after the fields were read, and the fields that another client has changed.
    pub(super) async fn merged(
        &self,
        found: &our_api::Chat,
        unknown: FieldSet,
    ) -> Result<(Observed, FieldSet), AttemptError> {
        let observed = &self.conversation.observed;
        let (merged, mut drift) = observed.merged(&found.fields(), unknown);
        // After the first reading, the observed agent is the one that another client set, so the merge finds no
        // difference. A write of unknown outcome would have made one.
        let is_same = observed.chat.is_some() && observed.agent == found.agent_id;
        let is_known = self.claim.drift.agent && (is_same || !unknown.agent);
        if drift.agent || is_known {
            // The agent may have been changed back.
            drift.agent = match observed.advisor {
                None => found.agent_id.is_some(),
                Some(advisor) => {
                    let agent = self.agent_of(advisor).await?;
                    agent.is_none_or(|agent| found.agent_id != Some(agent))
                }
            };
        }
        Ok((merged, drift))
    }

    /// The advisor's agent, as far as it is known.
    pub(super) async fn agent_of(&self, advisor: AdvisorId) -> Result<Option<Uuid>, AttemptError> {
        let epoch = self.conversation.epoch;
        let agent = self
            .delivery
            .journal
            .with(move |store| store.agent_of(epoch, advisor));
        Ok(agent.await?)
    }

    pub(super) fn report_drift(&self, drift: FieldSet, found: &our_api::Chat) {
        if !drift.is_empty() {
            tracing::warn!(
                conversation = self.conversation.bigchat_id, chat = %found.chat_id, %drift,
                "a chat was changed in OurAPI by another client or, if this database is a restored backup, after the backup was made; the chat stays as it is"
            );
        }
    }

    /// Records that OurAPI has lost the chat, and that it is not restored.
    fn stays_lost(&mut self) -> Result<(), Stopped> {
        let missing = Missing {
            chat: true,
            ..Missing::default()
        };
        self.report_missing(missing);
        self.missing = Some(missing);
        self.observation = Observation::Read(None);
        Ok(())
    }

    pub(super) fn report_missing(&self, missing: Missing) {
        if !missing.is_none() {
            tracing::error!(
                conversation = self.conversation.bigchat_id, chat = self.logged_chat(), %missing,
                "OurAPI has lost a chat or a part of it; it is not restored, because of --rebuild"
            );
        }
    }

    /// The chat's id as a field of the log.
    pub(super) fn logged_chat(&self) -> Option<DisplayValue<Uuid>> {
        self.conversation.observed.chat.map(display)
    }

    /// Reads the chat by its external id.
    pub(super) async fn refresh(&self) -> Result<Refreshed, AttemptError> {
        let observed = &self.conversation.observed;
        let external_id = observed.external_id.as_deref().unwrap_or_default();
        Ok(match self.delivery.our_api.chat(external_id).await? {
            Some(found) if Some(found.chat_id) == observed.chat => Refreshed::Ours(found),
            _ => Refreshed::Gone,
        })
    }

    /// The conversation's messages in the journal.
    pub(super) async fn recorded(&self) -> Result<Vec<Recorded>, AttemptError> {
        let id = self.conversation.id;
        let replay_until = self.replay_until();
        let recorded = self
            .delivery
            .journal
            .with(move |store| store.recorded_messages(id, replay_until));
        Ok(recorded.await?)
    }

    /// Reads the chat's messages, if needed, and accounts for them.
    pub(super) async fn account(&mut self, chat: Uuid, needed: Needed) -> Result<(), Stopped> {
        let recorded = self.recorded().await.map_err(|error| {
            Stopped::at(self.first_outcome_unknown(), error).during(Step::ComparingMessages)
        })?;
        let is_message = |event: &Pending| event.payload.kind().is_message();
        let may_wait = |message: &Recorded| {
            matches!(
                message.state,
                MessageState::OutcomeUnknown | MessageState::MaybeSent | MessageState::NotSent
            )
        };
        let is_needed = match needed {
            Needed::Always => true,
            Needed::IfAny => !recorded.is_empty(),
            // More messages may be waiting than were claimed. OurAPI may have added even one that it refused.
            Needed::IfWaiting => {
                self.events.iter().any(is_message) || recorded.iter().any(may_wait)
            }
        };
        if !is_needed {
            self.observation = Observation::Read(None);
            return Ok(());
        }
        let at = self.first_outcome_unknown();
        let held = self.held(chat, at).await?;
        let mut accounting = account::account(held, &recorded);
        if !accounting.missing.is_empty() {
            let failed = |error| Stopped::at(at, error).during(Step::ComparingMessages);
            if self.was_just_delivered().await.map_err(failed)? {
                self.await_reads().await.map_err(failed)?;
                let held = self.held(chat, at).await?;
                accounting = account::account(held, &recorded);
            }
        }
        if !self.rebuilds() {
            let missing = Missing {
                messages: count(&accounting.missing),
                ..Missing::default()
            };
            self.report_missing(missing);
            self.missing = Some(missing);
            accounting.missing.clear();
        }
        if !accounting.missing.is_empty() {
            tracing::error!(
                conversation = self.conversation.bigchat_id, %chat, messages = accounting.missing.len(),
                "OurAPI has lost messages of a chat; they are sent again"
            );
        }
        self.observation = Observation::Read(Some(accounting));
        Ok(())
    }

    /// Waits until reads show what was delivered. If the daemon is stopped meanwhile, the chat stays stale.
    async fn await_reads(&self) -> Result<(), AttemptError> {
        tokio::select! {
            () = sleep(LAG) => Ok(()),
            () = self.delivery.stopping.cancelled() => {
                let why = "the daemon is stopping";
                Err(ApiError::not_sent(Api::OurApi, ErrorKind::Withheld, why).into())
            }
        }
    }

    /// The first waiting message that may have been delivered, which is the reason for reading the chat.
    fn first_outcome_unknown(&self) -> Option<EventId> {
        let mut messages = self
            .events
            .iter()
            .filter(|event| self.claim.is_outcome_unknown(event, self.replay_until()));
        messages.next().map(|event| event.id)
    }

    /// Handles a lost chat. OurAPI has probably lost other data, too.
    pub(super) async fn gone(&mut self, rebuild: bool) -> Result<(), AttemptError> {
        tracing::error!(
            conversation = self.conversation.bigchat_id,
            chat = self.logged_chat(),
            rebuild,
            "OurAPI has lost a chat"
        );
        let is_known = self.claim.is_lost && self.observation != Observation::Created
            || self.delivery.agents.losses() > self.claim.losses;
        if !rebuild || !self.rebuilds() {
            // The agents may be gone, too. Checking them again costs one request per agent.
            self.delivery.agents.forget();
        } else if !is_known {
            self.delivery.agents.record_loss().await?;
        }
        if rebuild {
            self.delivery.metrics.chat_was_missing();
        }
        self.observation = Observation::Gone { rebuild };
        Ok(())
    }

    /// The messages that OurAPI has of a chat. A failure is attributed to the event `at`.
    pub(super) async fn held(
        &self,
        chat: Uuid,
        at: Option<EventId>,
    ) -> Result<Vec<MessageKey>, Stopped> {
        match self.delivery.our_api.messages(chat).await {
            Ok(held) => Ok(held.iter().map(Message::key).collect()),
            Err(error) => Err(Stopped::at(at, error.into()).during(Step::ComparingMessages)),
        }
    }
}

pub(super) fn count(missing: &[EventId]) -> u32 {
    u32::try_from(missing.len()).unwrap_or(u32::MAX)
}
