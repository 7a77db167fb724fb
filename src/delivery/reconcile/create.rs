//! The chat of a conversation: the fields it should have, its external id, and its creation.

use super::Reconciliation;
use super::read_back::Needed;
use crate::bigchat::{SourceError, details};
use crate::delivery::attempts::AttemptError;
use crate::domain::conversation::{Conversation, Desired, Details, Fields, Pending};
use crate::domain::progress::{Effect, Observation};
use crate::domain::time::Timestamp;
use crate::http::{ErrorKind, Resource};
use crate::our_api::{self, NewChat};

impl Reconciliation {
    /// Whether the conversation's details are read before its chat is created: unless its events give both the start
    /// and the advisor.
    pub(super) fn needs_details(&self, desired: &Desired) -> bool {
        let is_complete = desired.started_at.is_some() && desired.transfer.is_some();
        let is_unread = self.conversation.details == Details::Unread;
        self.conversation.observed.chat.is_none() && is_unread && !is_complete
    }

    /// Reads the details of a conversation that BigChat has denied, if its chat has no agent, or its start is unknown.
    /// If BigChat does not answer, the next verification asks again.
    pub(super) async fn read_denied_details(
        &mut self,
        found: &our_api::Chat,
    ) -> Result<(), AttemptError> {
        let Conversation {
            details,
            desired,
            observed,
            ..
        } = &self.conversation;
        let has_agent = observed.agent.or(found.agent_id).is_some();
        let is_known = match desired.transfer {
            Some(_) => desired.started_at.is_some(),
            None => desired.first_advisor.is_some() || has_agent,
        };
        if *details != Details::Unread || is_known {
            return Ok(());
        }
        match details::read(&self.delivery.source, &mut self.conversation).await {
            Err(SourceError::Journal(error)) => Err(error.into()),
            Ok(()) | Err(SourceError::Api(_)) => Ok(()),
        }
    }

    /// The desired fields of the chat. `changes` are already folded into `desired`.
    pub(super) async fn fields(
        &self,
        desired: &Desired,
        changes: &[Pending],
    ) -> Result<Fields, AttemptError> {
        let observed = &self.conversation.observed;
        let earliest = self.events.iter().map(|event| event.at).min();
        let started_at = match (desired.started_at, observed.started_at) {
            (Some(started_at), _) => started_at,
            // Without a START, the chat starts with the earliest event.
            (None, Some(before)) => earliest.map_or(before, |earliest| before.min(earliest)),
            (None, None) => {
                let id = self.conversation.id;
                let journal = &self.delivery.journal;
                let known = journal.with(move |store| store.earliest_event(id)).await?;
                known
                    .into_iter()
                    .chain(earliest)
                    .min()
                    .unwrap_or_else(Timestamp::of_this_machine)
            }
        };
        // Another client, or a newer copy of the journal, may have changed the agent meanwhile. The agent of a new
        // TRANSFER is written in any case.
        let latest = desired.transfer.map(|transfer| transfer.event);
        let is_named = changes.iter().any(|event| Some(event.id) == latest);
        let agent_removed = self.drift.unwrap_or(self.claim.drift).agent;
        let is_settled = observed.agent.is_some() || observed.chat.is_some() && agent_removed;
        let agent = match desired.advisor() {
            // The chat has the advisor's agent, or another client has removed it.
            advisor if is_settled && observed.advisor == advisor && !is_named => observed.agent,
            Some(advisor) => {
                let epoch = self.conversation.epoch;
                self.delivery.agents.resolve(epoch, advisor).await?
            }
            None => observed.agent,
        };
        Ok(Fields {
            started_at,
            ended_at: desired.ended_at,
            agent,
        })
    }

    /// Creates the chat with these fields, or adopts the existing one and returns `None`. If neither a START nor the
    /// details give the start, the first intended start is used again: the chat may already have been created with it,
    /// and nothing else identifies the chat.
    pub(super) async fn create(
        &mut self,
        desired: &Desired,
        fields: &Fields,
    ) -> Result<Option<Effect>, AttemptError> {
        let observed = &self.conversation.observed;
        let intended = observed
            .started_at
            .filter(|_| observed.external_id.is_some() && desired.started_at.is_none());
        let initial = Fields {
            started_at: intended.unwrap_or(fields.started_at),
            ..*fields
        };
        let mut external_id = self.choose_external_id(desired, initial.started_at).await?;
        loop {
            let new = NewChat {
                external_id: &external_id,
                started_at: initial.started_at,
                ended_at: initial.ended_at,
                agent_id: initial.agent,
            };
            let our_api = &self.delivery.our_api;
            let error = match our_api.create_chat(&new).await {
                Ok(created) => {
                    let observed = &mut self.conversation.observed;
                    observed.external_id = Some(external_id);
                    observed.chat = Some(created.chat_id);
                    observed.ended_at = None;
                    observed.apply(&initial, desired.advisor());
                    self.writes += 1;
                    self.observation = Observation::Created;
                    // An earlier event may have arrived since the start was intended.
                    let changed = self.patch(created.chat_id, desired, fields).await?;
                    return Ok(changed.map(|_| Effect::ChatCreated));
                }
                Err(error) => error,
            };
            match error.kind {
                ErrorKind::Conflict => {}
                ErrorKind::NotFound(Resource::Agent) => {
                    return Err(self.agent_missing(initial.agent, error).await);
                }
                _ => return Err(AttemptError::Write(error)),
            }
            match our_api.chat(&external_id).await? {
                // The external id is taken, but no listed chat has it, so the service does not behave like OurAPI.
                None => {
                    let http = our_api.http();
                    let kind = ErrorKind::WrongService;
                    return Err(http.reclassify(error, kind).into());
                }
                Some(found) if self.is_ours(&initial, &found) => {
                    let observed = &mut self.conversation.observed;
                    observed.adopt(external_id, found.chat_id, &found.fields(), desired);
                    self.observation = Observation::Adopted;
                    let accounted = self.account(found.chat_id, Needed::Always).await;
                    return accounted.map(|()| None).map_err(|stopped| stopped.error);
                }
                Some(found) => {
                    let extended = self.with_start(initial.started_at);
                    if extended == external_id {
                        return Err(AttemptError::Write(error.with_kind(ErrorKind::Rejected)));
                    }
                    tracing::warn!(
                        conversation = self.conversation.bigchat_id, %external_id, started_at = %found.started_at,
                        "OurAPI has a chat of another conversation with this external id; adding the start time to the external id"
                    );
                    self.record_intent(&extended, initial.started_at).await?;
                    external_id = extended;
                }
            }
        }
    }

    /// Whether the chat belongs to this conversation: it has the conversation's start, or the start that was intended
    /// for it before the conversation's start was known.
    fn is_ours(&self, fields: &Fields, found: &our_api::Chat) -> bool {
        found.started_at == fields.started_at
            || self.conversation.observed.started_at == Some(found.started_at)
    }

    /// Chooses the external id: the prefix and the conversation id, with the start time if the id was used before.
    async fn choose_external_id(
        &mut self,
        desired: &Desired,
        started_at: Timestamp,
    ) -> Result<String, AttemptError> {
        if let Some(chosen) = self.conversation.observed.external_id.clone() {
            return Ok(chosen);
        }
        let (epoch, bigchat_id) = (self.conversation.epoch, self.conversation.bigchat_id);
        let used = epoch.0 > 1
            && self
                .delivery
                .journal
                .with(move |store| store.id_was_used_before(epoch, bigchat_id))
                .await?;
        let chosen = match used {
            true => self.with_start(started_at),
            false => self.plain(),
        };
        if used || desired.started_at.is_none() {
            self.record_intent(&chosen, started_at).await?;
        }
        Ok(chosen)
    }

    fn plain(&self) -> String {
        let prefix = &self.delivery.settings.external_id_prefix;
        format!("{prefix}{}", self.conversation.bigchat_id)
    }

    fn with_start(&self, started_at: Timestamp) -> String {
        format!("{}@{started_at}", self.plain())
    }

    /// Stores the identity of a chat before the chat is created. If the response is lost, an identity that cannot be
    /// derived again would otherwise be unknown.
    async fn record_intent(
        &mut self,
        external_id: &str,
        started_at: Timestamp,
    ) -> Result<(), AttemptError> {
        let (id, stored) = (self.conversation.id, external_id.to_owned());
        self.delivery
            .journal
            .with(move |store| store.record_intent(id, &stored, started_at))
            .await?;
        self.conversation.observed.external_id = Some(external_id.to_owned());
        self.conversation.observed.started_at = Some(started_at);
        Ok(())
    }
}
