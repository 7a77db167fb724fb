//! Reconciling a conversation: sends the difference between the desired and the observed chat.
//!
//! The journal's record of the chat may be wrong: after a write of unknown outcome, a crash, a loss in OurAPI, or with an
//! older copy of the database. The conversation is *stale* then, and there is one cure: the chat is read back, and its
//! messages are accounted for. That ends the claim; the next claim sends missing and waiting events.

use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::attempts::AttemptError;
use super::chat;
use super::handlers::{self, message};
use super::worker::Worker;
use crate::domain::account::{self, MessageKey, MessageState, Recorded};
use crate::domain::conversation::{Conversation, Desired, Drift, Fields, Pending, UnknownFields};
use crate::domain::ids::EventId;
use crate::domain::progress::{
    Claim, DifferingFields, Effect, Missing, Observation, VerificationResult, Verify, VerifyMode,
    Work,
};
use crate::http::{ApiError, ErrorKind, Resource};
use crate::our_api::{self, Message};
use crate::settings::MessageAuthor;

/// The result of a piece of work.
#[derive(Debug)]
pub(super) struct Reconciled {
    pub(super) conversation: Conversation,
    pub(super) events: Vec<Pending>,
    pub(super) claim: Claim,
    /// The events delivered or permanently rejected. The others were not attempted.
    pub(super) done: Vec<(EventId, Result<Effect, AttemptError>)>,
    /// Set if the work ended early.
    pub(super) stopped: Option<Stopped>,
    pub(super) observation: Observation,
    /// A chat was adopted, and its messages could not be read.
    pub(super) is_unread: bool,
    pub(super) consumed: Vec<MessageKey>,
    /// How many writes OurAPI carried out.
    pub(super) writes: u32,
    pub(super) verified: Option<(Verify, Option<VerificationResult>)>,
    /// What differs and stays, as far as the chat was read.
    pub(super) drift: Option<Drift>,
    pub(super) missing: Option<Missing>,
}

/// Why the work ended early.
#[derive(Debug)]
pub(super) struct Stopped {
    /// The event; `None`: the chat itself.
    pub(super) at: Option<EventId>,
    pub(super) error: AttemptError,
    /// The chat's messages could not be read.
    pub(super) reading_messages: bool,
    /// A change of the chat failed that no event requests: the event was not sent.
    pub(super) changing_chat: bool,
}

impl Stopped {
    fn at(event: Option<EventId>, error: AttemptError) -> Self {
        Self {
            at: event,
            error,
            reading_messages: false,
            changing_chat: false,
        }
    }
}

/// Delivers the events of a conversation until they are done, one fails, or the daemon is to stop. A verification ends
/// before its next request once it is to give way.
pub(super) async fn reconcile(
    worker: &Worker,
    work: Work,
    give_way: &CancellationToken,
) -> Reconciled {
    let Work {
        conversation,
        events,
        claim,
        verify,
    } = work;
    let mut run = Reconciled {
        conversation,
        events,
        claim,
        done: Vec::new(),
        stopped: None,
        observation: Observation::None,
        is_unread: false,
        consumed: Vec::new(),
        writes: 0,
        verified: verify.map(|verify| (verify, None)),
        drift: None,
        missing: None,
    };
    let ended = match verify {
        Some(verify) => Box::pin(run.verify(worker, verify, give_way)).await,
        None => run.deliver(worker).await,
    };
    run.stopped = ended.err();
    run
}

/// When the chat's messages have to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needed {
    /// The chat may have messages that the journal does not know.
    Always,
    /// If messages were delivered, which may be missing.
    IfAny,
    /// If messages wait, which may have been delivered.
    IfWaiting,
}

/// Whether a waiting message may have been delivered.
pub(super) fn is_outcome_unknown(worker: &Worker, event: &Pending) -> bool {
    event.payload.kind().is_message()
        && (event.attempts.outcome_unknown || worker.may_be_delivered(event.id))
}

/// A chat as read back.
enum Refreshed {
    /// The known chat, perhaps changed.
    Ours(our_api::Chat),
    /// The chat does not exist, or another one has its external id.
    Gone,
}

impl Reconciled {
    async fn deliver(&mut self, worker: &Worker) -> Result<(), Stopped> {
        if self.is_stale(worker) {
            return Box::pin(self.read_back(worker)).await;
        }
        // Rare futures are boxed, so that the one polled for each message stays small.
        Box::pin(self.change_chat(worker)).await?;
        if self.observation != Observation::None && self.observation != Observation::Created {
            return Ok(());
        }
        self.send_messages(worker).await
    }

    /// Whether the journal's record of the chat may be wrong.
    fn is_stale(&self, worker: &Worker) -> bool {
        self.conversation.observed.chat.is_some()
            && (self.claim.became_stale || self.claim.is_lost || self.is_replayed(worker))
    }

    /// Whether a newer copy of the journal may have delivered some of the events, and the chat was not read yet.
    fn is_replayed(&self, worker: &Worker) -> bool {
        // If the messages cannot be read, the fields were.
        let is_replayed = |event: &Pending| {
            worker.may_be_delivered(event.id)
                && (event.payload.kind().is_message()
                    || !worker.is_unreadable(self.conversation.id))
        };
        !self.claim.is_read && self.events.iter().any(is_replayed)
    }

    async fn read_back(&mut self, worker: &Worker) -> Result<(), Stopped> {
        let first = self.events.first().map(|event| event.id);
        let failed = |error| Stopped::at(first, error);
        let Refreshed::Ours(found) = self.refresh(worker).await.map_err(failed)? else {
            if self.events.is_empty() && !worker.settings.rebuild.restores() {
                // Nothing needs the chat. It is forgotten once an event does.
                return self.stays_lost();
            }
            return self
                .gone(worker, worker.settings.rebuild.restores())
                .await
                .map_err(failed);
        };
        let unknown = self.unknown_fields(worker);
        let drift = self.merge(worker, &found, unknown).await.map_err(failed)?;
        // A drift that was known before was reported then.
        if drift != self.claim.drift {
            self.report_drift(drift, &found);
        }
        self.drift = Some(drift);
        self.agent_may_be_gone(worker, found.agent_id)
            .await
            .map_err(failed)?;
        let needed = if self.is_replayed(worker) {
            Needed::Always
        } else if self.claim.is_lost && worker.settings.rebuild.restores() {
            Needed::IfAny
        } else {
            Needed::IfWaiting
        };
        self.account(worker, found.chat_id, needed).await
    }

    /// The fields that may have been written although the journal does not record it: those named by events of unknown
    /// outcome, or which a newer copy of the journal may have delivered. Changes are written together.
    fn unknown_fields(&self, worker: &Worker) -> UnknownFields {
        let is_unknown = |event: &&Pending| {
            event.attempts.outcome_unknown
                || self.is_replayed(worker) && worker.may_be_delivered(event.id)
        };
        let changes = || {
            self.events
                .iter()
                .filter(|event| !event.payload.kind().is_message())
        };
        let is_any_unknown = self.events.iter().any(|event| is_unknown(&event));
        if !is_any_unknown {
            // It is unknown which fields were being written.
            return match self.claim.became_stale {
                true => UnknownFields::ALL,
                false => UnknownFields::default(),
            };
        }
        let changed = match changes().any(|event| event.attempts.outcome_unknown) {
            true => UnknownFields::changed_by(changes()),
            false => UnknownFields::changed_by(changes().filter(is_unknown)),
        };
        // A field that differs from the desired one may have been written with them.
        let Conversation {
            desired, observed, ..
        } = &self.conversation;
        UnknownFields {
            started_at: changed.started_at
                || desired.started_at.is_none()
                || desired.started_at != observed.started_at,
            ended_at: changed.ended_at || desired.ended_at > observed.ended_at,
            agent: changed.agent || desired.advisor() != observed.advisor,
        }
    }

    /// After a loss, the chat's agent may be gone. It is resolved again, and written if another one results. An agent
    /// that still exists stays, whichever client set it.
    async fn agent_may_be_gone(
        &mut self,
        worker: &Worker,
        named: Option<Uuid>,
    ) -> Result<(), AttemptError> {
        let Conversation {
            epoch,
            desired,
            observed,
            ..
        } = &mut self.conversation;
        if let Some(advisor) = desired.advisor()
            && self.claim.is_lost
            && observed.advisor == Some(advisor)
            && worker.agents.resolve(*epoch, advisor).await? != named
            && !worker.agents.is_there(named).await?
        {
            observed.agent = named;
            observed.advisor = None;
        }
        Ok(())
    }

    /// Merges what was read, and returns the fields that another client has changed.
    async fn merge(
        &mut self,
        worker: &Worker,
        found: &our_api::Chat,
        unknown: UnknownFields,
    ) -> Result<Drift, AttemptError> {
        let Conversation {
            epoch, observed, ..
        } = &mut self.conversation;
        let (epoch, advisor) = (*epoch, observed.advisor.filter(|_| !unknown.agent));
        let mut drift = observed.merge(&found.fields(), unknown);
        // Once it was read, another client's agent is the recorded one.
        drift.agent |= self.claim.drift.agent && !unknown.agent;
        if drift.agent {
            // It may have been changed back.
            drift.agent = match advisor {
                None => found.agent_id.is_some(),
                Some(advisor) => {
                    let agent = worker
                        .journal
                        .with(move |store| store.agent_of(epoch, advisor));
                    let agent = agent.await?;
                    agent.is_none_or(|agent| found.agent_id != Some(agent))
                }
            };
        }
        Ok(drift)
    }

    fn report_drift(&self, drift: Drift, found: &our_api::Chat) {
        if !drift.is_none() {
            tracing::warn!(
                conversation = self.conversation.bigchat_id, chat = %found.chat_id, %drift,
                "a chat was changed in OurAPI by another client, or after this copy of the database was made; it stays as it is"
            );
        }
    }

    /// OurAPI has lost the chat, and it is not restored.
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

    fn report_missing(&self, missing: Missing) {
        if !missing.is_none() {
            tracing::error!(
                conversation = self.conversation.bigchat_id,
                chat = self
                    .conversation
                    .observed
                    .chat
                    .map(tracing::field::display::<Uuid>),
                %missing,
                "OurAPI has lost a chat or a part of it; it is not restored, because of --rebuild"
            );
        }
    }

    /// Reads the chat by its external id.
    async fn refresh(&self, worker: &Worker) -> Result<Refreshed, AttemptError> {
        let observed = &self.conversation.observed;
        let external_id = observed.external_id.as_deref().unwrap_or_default();
        Ok(match worker.our_api.chat(external_id).await? {
            Some(found) if Some(found.chat_id) == observed.chat => Refreshed::Ours(found),
            _ => Refreshed::Gone,
        })
    }

    /// The conversation's messages in the journal.
    async fn recorded(&self, worker: &Worker) -> Result<Vec<Recorded>, AttemptError> {
        let id = self.conversation.id;
        let replay_until = worker.session.replay_until.get();
        let recorded = worker
            .journal
            .with(move |store| store.recorded_messages(id, replay_until));
        Ok(recorded.await?)
    }

    /// Reads the chat's messages, if needed, and accounts for them.
    async fn account(
        &mut self,
        worker: &Worker,
        chat: Uuid,
        needed: Needed,
    ) -> Result<(), Stopped> {
        let recorded = self
            .recorded(worker)
            .await
            .map_err(|error| Stopped::at(self.first_outcome_unknown(worker), error))?;
        let is_message = |event: &Pending| event.payload.kind().is_message();
        let is_unknown = |message: &Recorded| message.state == MessageState::OutcomeUnknown;
        let is_needed = match needed {
            Needed::Always => true,
            Needed::IfAny => !recorded.is_empty(),
            // More may wait than was claimed.
            Needed::IfWaiting => {
                self.events.iter().any(is_message) || recorded.iter().any(is_unknown)
            }
        };
        if !is_needed {
            self.observation = Observation::Read(None);
            return Ok(());
        }
        let held = held(worker, chat, self.first_outcome_unknown(worker)).await?;
        let mut accounting = account::account(held, &recorded);
        if !worker.settings.rebuild.restores() {
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

    /// The first waiting message that may have been delivered. It is the reason to read the chat.
    fn first_outcome_unknown(&self, worker: &Worker) -> Option<EventId> {
        let mut messages = self
            .events
            .iter()
            .filter(|event| is_outcome_unknown(worker, event));
        messages.next().map(|event| event.id)
    }

    /// Handles a lost chat. OurAPI has probably lost other data, too.
    async fn gone(&mut self, worker: &Worker, rebuild: bool) -> Result<(), AttemptError> {
        tracing::error!(
            conversation = self.conversation.bigchat_id,
            chat = self
                .conversation
                .observed
                .chat
                .map(tracing::field::display::<Uuid>),
            rebuild,
            "OurAPI has lost a chat"
        );
        let is_known = self.claim.is_lost && self.observation != Observation::Created
            || worker.agents.losses() > self.claim.losses;
        if !rebuild {
            // The agents may be gone, too; a check costs one request each.
            worker.agents.forget();
        } else if !is_known {
            worker.agents.record_loss().await?;
        }
        worker.metrics.chat_was_missing();
        self.observation = Observation::Gone { rebuild };
        Ok(())
    }

    /// Writes the desired fields of the chat: all changes at once, or one by one if one of them has failed before or OurAPI
    /// rejects them together.
    async fn change_chat(&mut self, worker: &Worker) -> Result<(), Stopped> {
        let changes: Vec<Pending> = self
            .events
            .iter()
            .filter(|event| !event.payload.kind().is_message())
            .cloned()
            .collect();
        let has_failed = changes.iter().any(|event| event.attempts.failed > 0);
        if changes.len() < 2 || !has_failed {
            match self.write_chat(worker, &changes).await {
                Ok(None) => return Ok(()),
                Ok(Some(effect)) => {
                    self.done
                        .extend(changes.iter().map(|event| (event.id, Ok(effect))));
                    return Ok(());
                }
                Err(error) if !error.is_rejection() => {
                    let first = changes.first().or(self.events.first());
                    return Err(Stopped {
                        changing_chat: changes.is_empty(),
                        ..Stopped::at(first.map(|event| event.id), error)
                    });
                }
                Err(error) if changes.is_empty() => return self.unchangeable(error),
                Err(error) if changes.len() == 1 => {
                    self.done.push((changes[0].id, Err(error)));
                    return Ok(());
                }
                Err(_) => {}
            }
        }
        for event in changes {
            if worker.stopping.is_cancelled() {
                return Ok(());
            }
            match self.write_chat(worker, std::slice::from_ref(&event)).await {
                Ok(None) => return Ok(()),
                Ok(Some(effect)) => self.done.push((event.id, Ok(effect))),
                Err(error) if error.is_rejection() => self.done.push((event.id, Err(error))),
                Err(error) => return Err(Stopped::at(Some(event.id), error)),
            }
        }
        Ok(())
    }

    /// OurAPI rejects a change that no waiting event requests. An existing chat stays as it is and still gets messages;
    /// without a chat, the first message fails, or there is none until the next event.
    fn unchangeable(&mut self, error: AttemptError) -> Result<(), Stopped> {
        let chat = self.conversation.observed.chat;
        if chat.is_none() {
            if let Some(first) = self.events.first() {
                self.done.push((first.id, Err(error)));
                return Ok(());
            }
            self.observation = Observation::Read(None);
        }
        let failure = error.logged();
        tracing::warn!(
            conversation = self.conversation.bigchat_id, chat = chat.map(tracing::field::display),
            reason = %failure.reason, request = %failure.request, response = %failure.response,
            "OurAPI rejects a change of a chat; it stays as it is"
        );
        Ok(())
    }

    /// Folds `changes` and writes the difference. `None`: an existing chat was adopted, or the chat is lost; nothing was
    /// written.
    async fn write_chat(
        &mut self,
        worker: &Worker,
        changes: &[Pending],
    ) -> Result<Option<Effect>, AttemptError> {
        let observed = &self.conversation.observed;
        let is_needed = !self.events.is_empty()
            || observed.chat.is_some()
            || observed.external_id.is_some()
                && (worker.settings.rebuild.restores() || self.claim.is_rewound);
        if !is_needed {
            if self.claim.is_lost {
                // No part of the chat exists, and none is desired.
                self.observation = Observation::Read(None);
            }
            return Ok(Some(Effect::Nothing));
        }
        chat::read_details(worker, &mut self.conversation, changes).await?;
        let mut desired = self.conversation.desired;
        for event in changes {
            handlers::fold(&mut desired, event);
        }
        let earliest = self.events.iter().map(|event| event.at).min();
        let fields = chat::fields(worker, &self.conversation, &desired, changes, earliest).await?;
        let effect = match self.conversation.observed.chat {
            Some(chat) => self.patch(worker, chat, &desired, &fields).await?,
            None => self.create(worker, &desired, &fields).await?,
        };
        if effect.is_some() {
            self.conversation.desired = desired;
        }
        Ok(effect)
    }

    async fn patch(
        &mut self,
        worker: &Worker,
        chat: Uuid,
        desired: &Desired,
        fields: &Fields,
    ) -> Result<Option<Effect>, AttemptError> {
        let observed = &mut self.conversation.observed;
        let change = observed.diff(fields);
        if change.is_empty() {
            observed.apply(fields, desired.advisor());
            return Ok(Some(Effect::Nothing));
        }
        let Err(error) = worker.our_api.change_chat(chat, &change).await else {
            observed.apply(fields, desired.advisor());
            self.writes += 1;
            return Ok(Some(Effect::ChatChanged));
        };
        match error.kind {
            ErrorKind::NotFound(Resource::Chat) => {
                self.chat_missing(worker, error).await.map(|()| None)
            }
            ErrorKind::NotFound(Resource::Agent) => {
                Err(self.agent_missing(worker, fields.agent, error).await)
            }
            _ => Err(AttemptError::Write(error)),
        }
    }

    async fn create(
        &mut self,
        worker: &Worker,
        desired: &Desired,
        fields: &Fields,
    ) -> Result<Option<Effect>, AttemptError> {
        match chat::create(worker, &mut self.conversation, desired, fields).await? {
            chat::Created::New => {
                self.writes += 1;
                self.observation = Observation::Created;
                // It was created with the first intended fields, and more may be known by now.
                let changed = match self.conversation.observed.chat {
                    Some(chat) => self.patch(worker, chat, desired, fields).await?,
                    None => None,
                };
                Ok(changed.map(|_| Effect::ChatCreated))
            }
            chat::Created::Adopted(chat) => {
                let accounted = self.account(worker, chat, Needed::Always).await;
                self.is_unread = accounted.is_err();
                accounted.map_err(|stopped| stopped.error)?;
                Ok(None)
            }
        }
    }

    /// Handles a response that the chat does not exist. It is believed only if OurAPI's list confirms it.
    async fn chat_missing(&mut self, worker: &Worker, error: ApiError) -> Result<(), AttemptError> {
        match self.refresh(worker).await? {
            Refreshed::Gone => self.gone(worker, worker.settings.rebuild.restores()).await,
            // The list has the chat.
            Refreshed::Ours(_) => Err(AttemptError::Write(
                error.with_kind(ErrorKind::OutcomeUnknown { timed_out: false }),
            )),
        }
    }

    /// Handles a response that an agent does not exist. If confirmed, the chat has none until the agent is created again.
    async fn agent_missing(
        &mut self,
        worker: &Worker,
        agent: Option<Uuid>,
        error: ApiError,
    ) -> AttemptError {
        let error = worker.agents.missing(agent, error).await;
        if matches!(error, AttemptError::DataLost(_)) {
            self.conversation.observed.agent = None;
            self.conversation.observed.advisor = None;
        }
        error
    }

    async fn send_messages(&mut self, worker: &Worker) -> Result<(), Stopped> {
        let Some(chat) = self.conversation.observed.chat else {
            return Ok(());
        };
        let target = worker.our_api.message_target(chat);
        let events = std::mem::take(&mut self.events);
        let sent = self.send_all(worker, &target, &events).await;
        self.events = events;
        sent
    }

    async fn send_all(
        &mut self,
        worker: &Worker,
        target: &our_api::MessageTarget,
        events: &[Pending],
    ) -> Result<(), Stopped> {
        let author = match worker.settings.message_author {
            MessageAuthor::None => None,
            MessageAuthor::Agent => self.conversation.observed.agent,
        };
        for event in events {
            let Some(text) = event.payload.text() else {
                continue;
            };
            if worker.stopping.is_cancelled() {
                return Ok(());
            }
            // A credit counts only for a message that may have been sent before.
            if event
                .credit
                .is_some_and(|as_of| event.id <= as_of.max(worker.session.replay_until.get()))
            {
                self.consumed.push(account::key(event.at, text));
                self.done.push((event.id, Ok(Effect::Nothing)));
                continue;
            }
            let sent = message::send(&worker.our_api, target, event, text, author).await;
            let Err(error) = sent else {
                self.writes += 1;
                self.done.push((event.id, Ok(Effect::MessageAdded)));
                continue;
            };
            let error = match error.kind {
                ErrorKind::NotFound(Resource::Chat) => {
                    match Box::pin(self.chat_missing(worker, error)).await {
                        Ok(()) => return Ok(()),
                        Err(error) => error,
                    }
                }
                ErrorKind::NotFound(Resource::Agent) => {
                    Box::pin(self.agent_missing(worker, author, error)).await
                }
                _ => AttemptError::Write(error),
            };
            if error.is_rejection() {
                self.done.push((event.id, Err(error)));
            } else {
                return Err(Stopped::at(Some(event.id), error));
            }
        }
        Ok(())
    }

    /// Compares the chat with the journal, and restores or overwrites as the mode allows.
    async fn verify(
        &mut self,
        worker: &Worker,
        verify: Verify,
        give_way: &CancellationToken,
    ) -> Result<(), Stopped> {
        let failed = |error| Stopped::at(None, error);
        let refreshed = self.refresh(worker).await.map_err(failed)?;
        if give_way.is_cancelled() || worker.stopping.is_cancelled() {
            return Ok(());
        }
        let Refreshed::Ours(found) = refreshed else {
            return self.verify_gone(worker, verify).await.map_err(failed);
        };
        let held = held(worker, found.chat_id, None).await?;
        if give_way.is_cancelled() || worker.stopping.is_cancelled() {
            return Ok(());
        }
        let recorded = self.recorded(worker).await.map_err(failed)?;
        let accounting = account::account(held, &recorded);
        let fields = self.verify_fields(worker, verify, &found).await;
        let (drift, missing, fields) = fields.map_err(failed)?;
        let found_now = VerificationResult {
            is_unreadable: false,
            missing: Missing {
                messages: count(&accounting.missing),
                ..missing
            },
            drift,
            fields,
        };
        self.verified(verify, found_now);
        if verify.is_idle {
            self.report_drift(drift, &found);
        }
        let is_left = match verify.mode {
            VerifyMode::Report => true,
            VerifyMode::Restore => found_now.missing.is_none(),
            VerifyMode::Overwrite => false,
        };
        if is_left {
            return Ok(());
        }
        if found_now != VerificationResult::default() {
            worker.metrics.chat_differed();
        }
        if verify.is_idle {
            tracing::error!(
                conversation = self.conversation.bigchat_id, chat = %found.chat_id, missing = %found_now.missing,
                "OurAPI has lost a part of a chat; it is sent again"
            );
        }
        self.observation = Observation::Read(Some(accounting));
        Ok(())
    }

    async fn verify_gone(&mut self, worker: &Worker, verify: Verify) -> Result<(), AttemptError> {
        let recorded = self.recorded(worker).await?;
        let accounting = account::account(Vec::new(), &recorded);
        self.verified(
            verify,
            VerificationResult {
                missing: Missing {
                    chat: true,
                    messages: count(&accounting.missing),
                    ..Missing::default()
                },
                ..VerificationResult::default()
            },
        );
        match verify.mode {
            VerifyMode::Report => Ok(()),
            VerifyMode::Restore | VerifyMode::Overwrite => self.gone(worker, true).await,
        }
    }

    fn verified(&mut self, verify: Verify, found: VerificationResult) {
        let (missing, drift) = found.left(verify.mode);
        if verify.is_idle {
            self.report_missing(missing);
        }
        (self.missing, self.drift) = (Some(missing), Some(drift));
        self.verified = Some((verify, Some(found)));
    }

    /// Compares the fields of a chat with what was written, and merges them unless the mode only reports. The next
    /// write then restores what is missing, and overwrites what another client has changed if the mode says so.
    async fn verify_fields(
        &mut self,
        worker: &Worker,
        verify: Verify,
        found: &our_api::Chat,
    ) -> Result<(Drift, Missing, DifferingFields), AttemptError> {
        let before = self.conversation.observed.clone();
        let mut drift = self.merge(worker, found, UnknownFields::default()).await?;
        let mut missing = Missing {
            ended_at: before.ended_at.is_some() && found.ended_at.is_none(),
            ..Missing::default()
        };
        // An agent set by another client is not verified.
        if self.conversation.desired.advisor() == before.advisor
            && (!drift.agent || found.agent_id.is_none())
        {
            let verification = self.claim.verifications;
            missing.agent = worker.agents.is_gone(verification, before.agent).await?;
        }
        drift.agent &= !missing.agent;
        let advisor = before.advisor.or(self.conversation.desired.advisor());
        let recorded_agent = match (self.conversation.epoch, advisor) {
            // Another client's agent is the recorded one, once it was read.
            (epoch, Some(advisor)) if drift.agent => {
                let agent = worker
                    .journal
                    .with(move |store| store.agent_of(epoch, advisor));
                agent.await?
            }
            _ => before.agent,
        };
        let fields = DifferingFields {
            started_at: drift
                .started_at
                .then_some((before.started_at, found.started_at)),
            ended_at: (drift.ended_at || missing.ended_at)
                .then_some((before.ended_at, found.ended_at)),
            agent: (drift.agent || missing.agent).then_some((recorded_agent, found.agent_id)),
        };
        let observed = &mut self.conversation.observed;
        match verify.mode {
            VerifyMode::Report => *observed = before.clone(),
            VerifyMode::Restore => {}
            VerifyMode::Overwrite => {
                *observed = before.clone();
                let unknown = UnknownFields {
                    // Details never override a TRANSFER, even one that only another copy of the journal knows.
                    agent: (!drift.is_none() || missing.ended_at || missing.agent)
                        && (self.conversation.desired.transfer.is_some()
                            || found.agent_id.is_none()),
                    ..UnknownFields::ALL
                };
                self.conversation.observed.merge(&found.fields(), unknown);
                if unknown.agent {
                    // The agent is written again, whichever client set it.
                    self.conversation.observed.advisor = None;
                }
            }
        }
        if missing.agent && verify.mode != VerifyMode::Report {
            worker.agents.forget_if_lost(before.agent).await?;
            self.conversation.observed.advisor = None;
            self.conversation.observed.agent = None;
        }
        Ok((drift, missing, fields))
    }
}

/// The messages that OurAPI has of a chat. A failure is one of the event `at`.
async fn held(
    worker: &Worker,
    chat: Uuid,
    at: Option<EventId>,
) -> Result<Vec<MessageKey>, Stopped> {
    match worker.our_api.messages(chat).await {
        Ok(held) => Ok(held.iter().map(Message::key).collect()),
        Err(error) => Err(Stopped {
            reading_messages: true,
            ..Stopped::at(at, error.into())
        }),
    }
}

fn count(missing: &[EventId]) -> u32 {
    u32::try_from(missing.len()).unwrap_or(u32::MAX)
}
