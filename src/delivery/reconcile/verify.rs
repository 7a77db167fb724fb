//! Verification: compares the chat of a conversation without work with the journal.

use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::read_back::{Refreshed, count};
use super::{Reconciliation, Stopped};
use crate::delivery::attempts::AttemptError;
use crate::domain::account;
use crate::domain::conversation::{Conversation, FieldSet, Fields, Observed};
use crate::domain::ids::VerificationId;
use crate::domain::progress::{
    FieldDifference, Missing, Observation, VerificationResult, Verify, VerifyMode,
};
use crate::domain::time::Millis;
use crate::our_api;

/// How long OurAPI's reads may lag behind its writes, if several instances share its data.
pub(super) const LAG: Duration = Duration::from_secs(2);

impl Reconciliation {
    /// Compares the chat with the journal, and restores or overwrites as the mode allows.
    pub(super) async fn verify(
        &mut self,
        verify: Verify,
        give_way: &CancellationToken,
    ) -> Result<(), Stopped> {
        let failed = |error| Stopped::at(None, error);
        if self.was_just_delivered().await.map_err(failed)? {
            tokio::select! {
                () = sleep(LAG) => {}
                () = give_way.cancelled() => return Ok(()),
                () = self.delivery.stopping.cancelled() => return Ok(()),
            }
        }
        let refreshed = self.refresh().await.map_err(failed)?;
        if give_way.is_cancelled() || self.delivery.stopping.is_cancelled() {
            return Ok(());
        }
        let Refreshed::Ours(found) = refreshed else {
            return self.verify_gone(verify).await.map_err(failed);
        };
        let held = self.held(found.chat_id, None).await?;
        if give_way.is_cancelled() || self.delivery.stopping.is_cancelled() {
            return Ok(());
        }
        let recorded = self.recorded().await.map_err(failed)?;
        let accounting = account::account(held, &recorded);
        if verify.mode != VerifyMode::Report {
            self.read_denied_details(&found).await.map_err(failed)?;
        }
        let compared = self.compare_fields(verify, &found).await;
        let (merged, mut result) = compared.map_err(failed)?;
        let observed = self.observed_after(verify.mode, &found, merged, &result);
        self.conversation.observed = observed.await.map_err(failed)?;
        result.missing.messages = count(&accounting.missing);
        let (missing, drift) = (result.missing, result.drift);
        // A denied advisor or agent is asked for again.
        let lacks_agent = self.conversation.lacks_agent() && !drift.agent;
        let lacks_start = self.conversation.lacks_start() && !drift.started_at;
        let differs = result != VerificationResult::default();
        let is_left = match verify.mode {
            VerifyMode::Report => true,
            VerifyMode::Restore => missing.is_none() && !lacks_agent && !lacks_start,
            VerifyMode::Overwrite => false,
        };
        if !is_left {
            if differs {
                self.delivery.metrics.chat_differed();
            }
            if verify.is_idle && !missing.is_none() {
                tracing::error!(
                    conversation = self.conversation.bigchat_id, chat = %found.chat_id, %missing,
                    "OurAPI has lost a part of a chat; it is sent again"
                );
            }
            self.observation = Observation::Read(Some(accounting));
        }
        self.verified(verify, result);
        if verify.is_idle {
            self.report_drift(drift, &found);
        }
        Ok(())
    }

    /// Whether an event was delivered so recently that a read may not show it yet.
    pub(super) async fn was_just_delivered(&self) -> Result<bool, AttemptError> {
        let (id, since) = (self.conversation.id, Millis::now().minus(LAG));
        let latest = self
            .delivery
            .journal
            .with(move |store| store.was_delivered_since(id, since));
        Ok(latest.await?)
    }

    async fn verify_gone(&mut self, verify: Verify) -> Result<(), AttemptError> {
        let recorded = self.recorded().await?;
        let accounting = account::account(Vec::new(), &recorded);
        match (verify.mode, self.conversation.observed.chat) {
            (VerifyMode::Report, _) => {}
            (_, Some(_)) => self.gone(true).await?,
            // This loss is known already.
            (_, None) => self.observation = Observation::Gone { rebuild: true },
        }
        let missing = Missing {
            chat: true,
            messages: count(&accounting.missing),
            ..Missing::default()
        };
        self.verified(
            verify,
            VerificationResult {
                missing,
                ..VerificationResult::default()
            },
        );
        Ok(())
    }

    /// Records the result of a verification that has succeeded. The repair must already be prepared, since the chat
    /// counts as verified from here on.
    fn verified(&mut self, verify: Verify, found: VerificationResult) {
        let (missing, drift) = found.left(verify.mode);
        if verify.is_idle {
            self.report_missing(missing);
        }
        (self.missing, self.drift) = (Some(missing), Some(drift));
        self.found = Some(found);
    }

    /// Compares the fields of a chat with what was written. Returns the merged chat, too.
    async fn compare_fields(
        &self,
        verify: Verify,
        found: &our_api::Chat,
    ) -> Result<(Observed, VerificationResult), AttemptError> {
        let observed = &self.conversation.observed;
        // A write of the daemon that was carried out is not drift.
        let unknown = self.unknown_if_stale();
        let (merged, mut drift) = self.merged(found, unknown).await?;
        // An end whose loss was noticed, but that could not be written again, is still missing.
        let ended_at = observed.ended_at.max(self.conversation.desired.ended_at);
        let missing = Missing {
            ended_at: ended_at.is_some() && found.ended_at.is_none(),
            agent: self
                .agent_is_gone(verify.verification, found.agent_id)
                .await?,
            ..Missing::default()
        };
        let recorded = Observed {
            ended_at,
            agent: self.recorded_agent(drift).await?,
            ..observed.clone()
        };
        drift.agent &= !missing.agent;
        let kept = FieldSet {
            started_at: drift.started_at && self.conversation.desired.started_at.is_none(),
            agent: drift.agent && !self.may_overwrite_agent(found),
            ..FieldSet::default()
        };
        let result = VerificationResult {
            is_unreadable: false,
            missing,
            drift,
            kept,
            fields: differences(&recorded, &found.fields(), drift, missing),
        };
        Ok((merged, result))
    }

    /// Whether OurAPI no longer has the chat's agent, whichever client set it. If the chat has no agent, the reason may
    /// be that the agent that the daemon wrote is gone.
    async fn agent_is_gone(
        &self,
        verification: VerificationId,
        found: Option<Uuid>,
    ) -> Result<bool, AttemptError> {
        let Conversation {
            desired, observed, ..
        } = &self.conversation;
        let written = observed
            .agent
            .filter(|_| desired.advisor() == observed.advisor);
        match found.or(written) {
            Some(agent) if desired.advisor().is_some() => {
                self.delivery.agents.is_gone_in(verification, agent).await
            }
            _ => Ok(false),
        }
    }

    /// Whether a repair may overwrite the agent that was found. Details never override a TRANSFER. If this journal has
    /// no TRANSFER, the agent may be from one that only another copy of the journal knows.
    fn may_overwrite_agent(&self, found: &our_api::Chat) -> bool {
        self.conversation.desired.transfer.is_some() || found.agent_id.is_none()
    }

    /// The agent that the daemon wrote.
    async fn recorded_agent(&self, drift: FieldSet) -> Result<Option<Uuid>, AttemptError> {
        let Conversation {
            desired, observed, ..
        } = &self.conversation;
        match observed.advisor.or(desired.advisor()) {
            // After the first reading, the observed agent is the one that another client set.
            Some(advisor) if drift.agent => self.agent_of(advisor).await,
            _ => Ok(observed.agent),
        }
    }

    /// The observed chat after the verification. The next write restores what is missing, and in
    /// [`VerifyMode::Overwrite`] also overwrites what another client has changed.
    async fn observed_after(
        &self,
        mode: VerifyMode,
        found: &our_api::Chat,
        merged: Observed,
        result: &VerificationResult,
    ) -> Result<Observed, AttemptError> {
        let observed = &self.conversation.observed;
        let mut after = match mode {
            VerifyMode::Report => return Ok(observed.clone()),
            VerifyMode::Restore => merged,
            VerifyMode::Overwrite => {
                let unknown = FieldSet {
                    started_at: !result.kept.started_at,
                    agent: (result.drift.agent || self.unknown_if_stale().agent)
                        && self.may_overwrite_agent(found),
                    ..FieldSet::ALL
                };
                let (mut after, _) = observed.merged(&found.fields(), unknown);
                if unknown.agent {
                    // The agent is written again, whichever client set it.
                    after.advisor = None;
                }
                after
            }
        };
        if result.missing.agent {
            let gone = found.agent_id.or(observed.agent);
            self.delivery.agents.forget_if_lost(gone).await?;
            (after.agent, after.advisor) = (found.agent_id, None);
        }
        Ok(after)
    }
}

fn differences(
    recorded: &Observed,
    found: &Fields,
    drift: FieldSet,
    missing: Missing,
) -> Vec<FieldDifference> {
    let [started_at, ended_at, agent] = FieldSet::NAMES;
    let mut differences = Vec::new();
    if drift.started_at {
        let (recorded, found) = (recorded.started_at, Some(found.started_at));
        differences.push(FieldDifference::new(started_at, recorded, found));
    }
    if drift.ended_at || missing.ended_at {
        let (recorded, found) = (recorded.ended_at, found.ended_at);
        differences.push(FieldDifference::new(ended_at, recorded, found));
    }
    if drift.agent || missing.agent {
        let (recorded, found) = (recorded.agent, found.agent);
        differences.push(FieldDifference::new(agent, recorded, found));
    }
    differences
}
