//! Reconciling a conversation: its chat is brought to what its events say, and only what differs is sent.
//!
//! What the journal remembers of the chat may be wrong: after a write of unknown outcome, a crash, with an older copy of
//! the database, after a loss in OurAPI. The conversation is *stale* then, and there is one cure: the chat is read back,
//! and its messages are accounted for. That ends the claim; what is missing or waits goes on from what was read.

use uuid::Uuid;

use super::attempts::AttemptError;
use super::chat;
use super::handlers::{self, message};
use super::worker::Worker;
use crate::domain::account::{self, MessageKey, MessageState, Recorded};
use crate::domain::conversation::{Conversation, Desired, Fields, Pending, Unsure};
use crate::domain::ids::EventId;
use crate::domain::progress::{
    ChatState, Claim, Effect, Observation, VerificationResult, Verify, Work,
};
use crate::http::{ApiError, ErrorKind, Resource};
use crate::our_api::{self, Message};
use crate::settings::MessageAuthor;

/// What became of a piece of work.
#[derive(Debug)]
pub(super) struct Reconciled {
    /// The conversation as it is now.
    pub(super) conversation: Conversation,
    pub(super) events: Vec<Pending>,
    pub(super) claim: Claim,
    /// The events that were delivered or permanently rejected. The others were not tried.
    pub(super) done: Vec<(EventId, Result<Effect, AttemptError>)>,
    /// What stopped the work before its end.
    pub(super) stopped: Option<Stopped>,
    pub(super) observation: Observation,
    /// A chat was taken over, and its messages could not be read.
    pub(super) is_unread: bool,
    pub(super) consumed: Vec<MessageKey>,
    /// How many writes OurAPI carried out.
    pub(super) writes: u32,
    pub(super) verified: Option<(Verify, Option<VerificationResult>)>,
}

/// What stopped the work before its end.
#[derive(Debug)]
pub(super) struct Stopped {
    /// At which event; `None`: at the chat itself.
    pub(super) at: Option<EventId>,
    pub(super) error: AttemptError,
    /// The chat's messages could not be read.
    pub(super) reading_messages: bool,
}

impl Stopped {
    fn at(event: Option<EventId>, error: AttemptError) -> Self {
        Self {
            at: event,
            error,
            reading_messages: false,
        }
    }
}

/// Delivers the events of a conversation until they are done, one fails, or the daemon is to stop.
pub(super) async fn reconcile(worker: &Worker, work: Work) -> Reconciled {
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
    };
    let ended = match verify {
        Some(verify) => Box::pin(run.verify(worker, verify)).await,
        None => run.deliver(worker).await,
    };
    run.stopped = ended.err();
    run
}

/// When the chat's messages have to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needed {
    /// Messages that the journal does not know may be among them.
    Always,
    /// Messages that were delivered may be missing.
    IfAny,
    /// Only those that wait may have been delivered.
    IfWaiting,
}

/// Whether a message may be delivered though it waits.
pub(super) fn is_in_doubt(worker: &Worker, event: &Pending) -> bool {
    event.what.kind().is_message()
        && (event.attempts.outcome_unknown || worker.may_be_delivered(event.id))
}

/// What a chat was found to be.
enum Refreshed {
    /// As it was remembered, or changed.
    Ours(our_api::Chat),
    /// It is gone, or another one has its external id.
    Gone,
}

impl Reconciled {
    async fn deliver(&mut self, worker: &Worker) -> Result<(), Stopped> {
        if self.is_stale(worker) {
            return Box::pin(self.read_back(worker)).await;
        }
        // Boxed, as what is rare is: what is polled for each message stays small.
        Box::pin(self.change_chat(worker)).await?;
        if self.observation != Observation::None && self.observation != Observation::Created {
            return Ok(());
        }
        self.send_messages(worker).await
    }

    /// Whether what the journal remembers of the chat may be wrong.
    fn is_stale(&self, worker: &Worker) -> bool {
        self.conversation.observed.chat.is_some()
            && (self.claim.is_in_doubt || self.claim.is_lost || self.is_replayed(worker))
    }

    /// Whether a newer copy of the journal may have delivered some of the events, and the chat was not read since.
    fn is_replayed(&self, worker: &Worker) -> bool {
        // Where the messages cannot be read, the fields were.
        let is_in_doubt = |event: &Pending| {
            worker.may_be_delivered(event.id)
                && (event.what.kind().is_message() || !worker.is_unreadable(self.conversation.id))
        };
        !self.claim.is_read && self.events.iter().any(is_in_doubt)
    }

    async fn read_back(&mut self, worker: &Worker) -> Result<(), Stopped> {
        let first = self.events.first().map(|event| event.id);
        let refreshed = self
            .refresh(worker)
            .await
            .map_err(|error| Stopped::at(first, error))?;
        let Refreshed::Ours(found) = refreshed else {
            return self
                .gone(worker, worker.settings.rebuild)
                .await
                .map_err(|error| Stopped::at(first, error));
        };
        let unsure = self.unsure(worker);
        let drift = self.conversation.observed.merge(&found.fields(), unsure);
        if !drift.is_none() {
            tracing::warn!(
                conversation = self.conversation.bigchat_id, chat = %found.chat_id, %drift,
                "a chat was changed in OurAPI by another client; it stays as it is"
            );
        }
        self.agent_may_be_gone(worker, found.agent_id)
            .await
            .map_err(|error| Stopped::at(first, error))?;
        let needed = if self.is_replayed(worker) {
            Needed::Always
        } else if self.claim.is_lost && worker.settings.rebuild {
            Needed::IfAny
        } else {
            Needed::IfWaiting
        };
        self.account(worker, found.chat_id, needed).await
    }

    /// The fields that may have been written without the journal knowing: those named by events whose outcome is unknown,
    /// or which a newer copy of the journal may have delivered. Changes are written together.
    fn unsure(&self, worker: &Worker) -> Unsure {
        let is_unsure = |event: &&Pending| {
            event.attempts.outcome_unknown
                || self.is_replayed(worker) && worker.may_be_delivered(event.id)
        };
        let changes = || {
            self.events
                .iter()
                .filter(|event| !event.what.kind().is_message())
        };
        if !self.claim.is_in_doubt || self.events.iter().any(|event| is_unsure(&event)) {
            if changes().any(|event| event.attempts.outcome_unknown) {
                return Unsure::named_by(changes());
            }
            return Unsure::named_by(changes().filter(is_unsure));
        }
        // What was being written is not known.
        Unsure::ALL
    }

    /// After a loss the agent that the chat names may be gone: it is resolved again, and written if it is another one now. One
    /// that is still there stays, whoever named it.
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

    /// Reads the chat by its external id.
    async fn refresh(&self, worker: &Worker) -> Result<Refreshed, AttemptError> {
        let observed = &self.conversation.observed;
        let external_id = observed.external_id.as_deref().unwrap_or_default();
        Ok(match worker.our_api.chat(external_id).await? {
            Some(found) if Some(found.chat_id) == observed.chat => Refreshed::Ours(found),
            _ => Refreshed::Gone,
        })
    }

    /// The messages that the journal has of the conversation.
    async fn recorded(&self, worker: &Worker) -> Result<Vec<Recorded>, AttemptError> {
        let id = self.conversation.id;
        let replay_until = worker.session.replay_until.get();
        let recorded = worker
            .journal
            .with(move |store| store.recorded_messages(id, replay_until));
        Ok(recorded.await?)
    }

    /// Reads the chat's messages, if that is needed, and accounts for them.
    async fn account(
        &mut self,
        worker: &Worker,
        chat: Uuid,
        needed: Needed,
    ) -> Result<(), Stopped> {
        let recorded = self
            .recorded(worker)
            .await
            .map_err(|error| Stopped::at(self.first_in_doubt(worker), error))?;
        let is_message = |event: &Pending| event.what.kind().is_message();
        let is_unknown = |message: &Recorded| message.standing == MessageState::OutcomeUnknown;
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
        let held = worker
            .our_api
            .messages(chat)
            .await
            .map_err(|error| Stopped {
                at: self.first_in_doubt(worker),
                error: error.into(),
                reading_messages: true,
            })?;
        let mut accounting = account::account(held.iter().map(Message::key), &recorded);
        if !worker.settings.rebuild {
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

    /// The first message that may be delivered: the chat is read to find out.
    fn first_in_doubt(&self, worker: &Worker) -> Option<EventId> {
        let mut messages = self
            .events
            .iter()
            .filter(|event| is_in_doubt(worker, event));
        messages.next().map(|event| event.id)
    }

    /// OurAPI has lost the chat, and with it probably more.
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
            // The agents may be gone as well; to find out costs one request each.
            worker.agents.forget();
        } else if !is_known {
            worker.agents.record_loss().await?;
        }
        worker.metrics.chat_was_missing();
        self.observation = Observation::Gone { rebuild };
        Ok(())
    }

    /// Brings the chat's fields to what the events say: all changes at once, or one by one if one of them has failed
    /// before or OurAPI rejects them together.
    async fn change_chat(&mut self, worker: &Worker) -> Result<(), Stopped> {
        let changes: Vec<Pending> = self
            .events
            .iter()
            .filter(|event| !event.what.kind().is_message())
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
                    return Err(Stopped::at(first.map(|event| event.id), error));
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

    /// OurAPI rejects the chat though no event asks for a change. A chat that exists stays as it is, and takes messages;
    /// without one the first message fails.
    fn unchangeable(&mut self, error: AttemptError) -> Result<(), Stopped> {
        let Some(chat) = self.conversation.observed.chat else {
            let Some(first) = self.events.first() else {
                return Err(Stopped::at(None, error));
            };
            self.done.push((first.id, Err(error)));
            return Ok(());
        };
        let failure = error.logged();
        tracing::warn!(
            conversation = self.conversation.bigchat_id, %chat,
            reason = %failure.reason, request = %failure.request, response = %failure.response,
            "OurAPI rejects a change of a chat; it stays as it is"
        );
        Ok(())
    }

    /// Writes what differs once `changes` are folded in. `None`: an existing chat was taken over, and nothing written.
    async fn write_chat(
        &mut self,
        worker: &Worker,
        changes: &[Pending],
    ) -> Result<Option<Effect>, AttemptError> {
        let observed = &self.conversation.observed;
        let is_needed = !self.events.is_empty()
            || observed.chat.is_some()
            || observed.external_id.is_some() && (worker.settings.rebuild || self.claim.is_rewound);
        if !is_needed {
            if self.claim.is_lost {
                // Nothing of it is there, and nothing is to be.
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
                // It was created as was intended first, and more may be known by now.
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

    /// OurAPI says that the chat does not exist. Believed only if its list answers without it.
    async fn chat_missing(&mut self, worker: &Worker, error: ApiError) -> Result<(), AttemptError> {
        match self.refresh(worker).await? {
            Refreshed::Gone => self.gone(worker, worker.settings.rebuild).await,
            // It exists all the same.
            Refreshed::Ours(_) => Err(AttemptError::Write(
                error.with_kind(ErrorKind::OutcomeUnknown { timed_out: false }),
            )),
        }
    }

    /// OurAPI says that an agent does not exist. If so, the chat has none until it gets its own again.
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
            let Some(text) = event.what.text() else {
                continue;
            };
            if worker.stopping.is_cancelled() {
                return Ok(());
            }
            // Only a message that may have been sent before is the one that OurAPI holds.
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

    /// Compares the chat with the journal. Repairing writes what events say, whatever is there.
    async fn verify(&mut self, worker: &Worker, verify: Verify) -> Result<(), Stopped> {
        let failed = |error| Stopped::at(None, error);
        let recorded = self.recorded(worker).await.map_err(failed)?;
        let (chat, held) = match self.refresh(worker).await.map_err(failed)? {
            Refreshed::Ours(found) => {
                let held = worker.our_api.messages(found.chat_id).await;
                let held = held.map_err(|error| failed(error.into()))?;
                let held: Vec<_> = held.iter().map(Message::key).collect();
                let differs = self.differs(worker, verify, &found).await.map_err(failed)?;
                if verify.repair {
                    self.conversation.observed.merge(
                        &found.fields(),
                        Unsure {
                            // Details never undo a TRANSFER, be it one that only another copy of the journal knows.
                            agent: differs
                                && (self.conversation.desired.transfer.is_some()
                                    || found.agent_id.is_none()),
                            ..Unsure::ALL
                        },
                    );
                    // So it is taken over, as with a chat that is adopted.
                    self.conversation.observed.agent = found.agent_id;
                }
                (
                    if differs {
                        ChatState::Differs
                    } else {
                        ChatState::Same
                    },
                    held,
                )
            }
            Refreshed::Gone => (ChatState::Missing, Vec::new()),
        };
        let accounting = account::account(held, &recorded);
        let messages = u32::try_from(accounting.missing.len()).unwrap_or(u32::MAX);
        self.verified = Some((verify, Some(VerificationResult { chat, messages })));
        if !verify.repair {
            return Ok(());
        }
        if chat == ChatState::Missing {
            return self.gone(worker, true).await.map_err(failed);
        }
        if chat == ChatState::Differs || messages > 0 {
            worker.metrics.chat_differed();
        }
        self.observation = Observation::Read(Some(accounting));
        Ok(())
    }

    /// Whether a chat has other fields than were written, or an agent that is gone.
    async fn differs(
        &mut self,
        worker: &Worker,
        verify: Verify,
        found: &our_api::Chat,
    ) -> Result<bool, AttemptError> {
        let Conversation {
            epoch,
            desired,
            observed,
            ..
        } = &self.conversation;
        let mut merged = observed.clone();
        let drift = merged.merge(&found.fields(), Unsure::default());
        let end_is_gone = merged.ended_at != observed.ended_at && found.ended_at.is_none();
        let agent = observed.agent;
        let agent_is_gone = match desired.advisor() {
            Some(advisor) if observed.advisor == Some(advisor) => {
                worker
                    .agents
                    .is_gone(verify.verification, *epoch, advisor, agent)
                    .await?
            }
            _ => false,
        };
        if agent_is_gone && verify.repair {
            worker.agents.forget_if_lost(agent).await?;
            self.conversation.observed.advisor = None;
            self.conversation.observed.agent = None;
        }
        Ok(!drift.is_none() || end_is_gone || agent_is_gone)
    }
}
