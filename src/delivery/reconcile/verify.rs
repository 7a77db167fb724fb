//! Verification: a chat of a conversation without work is compared with the journal.

use tokio_util::sync::CancellationToken;

use super::read_back::{Refreshed, count, held};
use super::{Reconciled, Stopped};
use crate::delivery::attempts::AttemptError;
use crate::delivery::worker::Worker;
use crate::domain::account;
use crate::domain::conversation::{Drift, Observed, UnknownFields};
use crate::domain::progress::{
    FieldDifference, Missing, Observation, VerificationResult, Verify, VerifyMode,
};
use crate::our_api;

impl Reconciled {
    /// Compares the chat with the journal, and restores or overwrites as the mode allows.
    pub(super) async fn verify(
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
        let before = self.conversation.observed.clone();
        let fields = self.verify_fields(worker, verify, &found, &before).await;
        let (drift, missing, fields) = fields.map_err(|error| {
            // Nothing was found, so nothing may be written.
            self.conversation.observed = before;
            failed(error)
        })?;
        let missing = Missing {
            messages: count(&accounting.missing),
            ..missing
        };
        let found_now = VerificationResult {
            is_unreadable: false,
            missing,
            drift,
            fields,
        };
        let differs = found_now != VerificationResult::default();
        self.verified(verify, found_now);
        if verify.is_idle {
            self.report_drift(drift, &found);
        }
        let is_left = match verify.mode {
            VerifyMode::Report => true,
            VerifyMode::Restore => missing.is_none(),
            VerifyMode::Overwrite => false,
        };
        if is_left {
            return Ok(());
        }
        if differs {
            worker.metrics.chat_differed();
        }
        if verify.is_idle {
            tracing::error!(
                conversation = self.conversation.bigchat_id, chat = %found.chat_id, %missing,
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
        before: &Observed,
    ) -> Result<(Drift, Missing, Vec<FieldDifference>), AttemptError> {
        // A write of the daemon that was carried out is no drift.
        let unknown = self.unknown_if_stale();
        let mut drift = self.merge(worker, found, unknown).await?;
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
            // After the first reading, the observed agent is the one that another client set.
            (epoch, Some(advisor)) if drift.agent => {
                let agent = worker
                    .journal
                    .with(move |store| store.agent_of(epoch, advisor));
                agent.await?
            }
            _ => before.agent,
        };
        let mut fields = Vec::new();
        if drift.started_at {
            let (recorded, found) = (before.started_at, Some(found.started_at));
            fields.push(FieldDifference::new("started_at", recorded, found));
        }
        if drift.ended_at || missing.ended_at {
            let (recorded, found) = (before.ended_at, found.ended_at);
            fields.push(FieldDifference::new("ended_at", recorded, found));
        }
        if drift.agent || missing.agent {
            let (recorded, found) = (recorded_agent, found.agent_id);
            fields.push(FieldDifference::new("agent_id", recorded, found));
        }
        let observed = &mut self.conversation.observed;
        match verify.mode {
            VerifyMode::Report => *observed = before.clone(),
            VerifyMode::Restore => {}
            VerifyMode::Overwrite => {
                *observed = before.clone();
                let unknown = UnknownFields {
                    // Details never override a TRANSFER. If this journal has none, the agent found may be from one that
                    // only another copy of the journal knows.
                    agent: (drift.agent || unknown.agent)
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
