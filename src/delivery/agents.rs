//! The agent of an advisor: found by e-mail address, or created if there is none.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use uuid::Uuid;

use super::attempts::AttemptError;
use crate::bigchat::{Source, details};
use crate::domain::ids::{AdvisorId, Epoch, VerificationId};
use crate::domain::time::Millis;
use crate::http::{ApiError, ErrorKind};
use crate::journal::{Denial, Journal, JournalError, KnownAdvisor, KnownAgent, Session};
use crate::mutex::lock;
use crate::our_api::{Agent, OurApi, is_alike};
use crate::settings::Settings;

#[derive(Debug)]
pub(crate) struct Agents {
    source: Arc<Source>,
    our_api: Arc<OurApi>,
    journal: Arc<Journal>,
    /// Whether a lost agent is created again before an event needs it.
    rebuild: bool,
    cache: Mutex<Cache>,
    /// Whether an agent is gone, by verification and agent.
    verified: Mutex<HashMap<(VerificationId, Uuid), bool>>,
    /// Held during a search and creation, so that two conversations do not create the same agent.
    creating: tokio::sync::Mutex<()>,
}

/// What is known about OurAPI's agents since its last loss. A response requested before a loss is not cached after it.
#[derive(Debug, Default)]
struct Cache {
    /// The loss counter of OurAPI.
    losses: i64,
    by_advisor: HashMap<(Epoch, AdvisorId), Uuid>,
    /// The agents queried by id, and whether they exist.
    exists: HashMap<Uuid, bool>,
}

impl Cache {
    fn clear(&mut self) {
        self.by_advisor.clear();
        self.exists.clear();
    }
}

impl Agents {
    pub(crate) fn new(
        settings: &Settings,
        session: &Session,
        source: Arc<Source>,
        our_api: Arc<OurApi>,
        journal: Arc<Journal>,
    ) -> Self {
        Self {
            source,
            our_api,
            journal,
            rebuild: settings.rebuild.restores(),
            cache: Mutex::new(Cache {
                losses: session.losses,
                ..Cache::default()
            }),
            verified: Mutex::default(),
            creating: tokio::sync::Mutex::default(),
        }
    }

    /// The loss counter of OurAPI.
    pub(super) fn losses(&self) -> i64 {
        lock(&self.cache).losses
    }

    /// Records that OurAPI has lost data, so that all other data is verified before it is used.
    pub(super) async fn record_loss(&self) -> Result<(), JournalError> {
        let losses = self
            .journal
            .with(|store| store.record_loss(Millis::now()))
            .await?;
        let mut cache = lock(&self.cache);
        cache.losses = cache.losses.max(losses);
        cache.clear();
        Ok(())
    }

    pub(super) fn forget(&self) {
        lock(&self.cache).clear();
    }

    /// The agent of an advisor; `None` if BigChat denies the advisor or restarted before it reported the advisor, or if
    /// OurAPI denies the agent. The next verification pass asks both APIs again, but BigChat only about advisors of the
    /// current epoch.
    pub(super) async fn resolve(
        &self,
        epoch: Epoch,
        advisor: AdvisorId,
    ) -> Result<Option<Uuid>, AttemptError> {
        if let Some(known) = lock(&self.cache).by_advisor.get(&(epoch, advisor)) {
            return Ok(Some(*known));
        }
        let _one_at_a_time = self.creating.lock().await;
        let losses = self.losses();
        let agent = match details::advisor(&self.source, epoch, advisor).await? {
            KnownAdvisor::Gone => None,
            KnownAdvisor::Person { name, email } => {
                let person = Person {
                    epoch,
                    advisor,
                    name: &name,
                    email: &email,
                };
                self.of_person(person, losses).await?
            }
        };
        let mut cache = lock(&self.cache);
        if let Some(agent) = agent
            && losses == cache.losses
        {
            cache.by_advisor.insert((epoch, advisor), agent);
        }
        Ok(agent)
    }

    async fn of_person(
        &self,
        person: Person<'_>,
        losses: i64,
    ) -> Result<Option<Uuid>, AttemptError> {
        let Person { advisor, email, .. } = person;
        let address = email.to_owned();
        let known = match self
            .journal
            .with(move |store| store.agent(&address))
            .await?
        {
            Some(known) => known,
            None => {
                let mut spelled = None;
                let found = match self.find_or_create(person).await {
                    Ok(agent) => {
                        spelled = Some(agent.email);
                        KnownAgent::Agent(agent.agent_id)
                    }
                    Err(AttemptError::Read(error))
                        if matches!(error.kind, ErrorKind::Ambiguous | ErrorKind::Rejected) =>
                    {
                        let failure = self.refused(person, error).await?.logged();
                        tracing::warn!(
                            %advisor, reason = failure.reason, request = failure.request, response = failure.response,
                            "OurAPI does not accept an agent; the advisor's chats have no agent until a verification pass asks again"
                        );
                        KnownAgent::Refused
                    }
                    Err(error) => return Err(error),
                };
                let address = email.to_owned();
                self.journal
                    .with(move |store| {
                        store.record_agent(&address, spelled.as_deref(), found, losses)
                    })
                    .await?;
                found
            }
        };
        Ok(match known {
            KnownAgent::Agent(id) => Some(id),
            KnownAgent::Refused => None,
        })
    }

    /// The agent of an e-mail address. OurAPI decides which addresses or names are equal: it may treat case, accents,
    /// normal forms and domains in its own way. If it refuses to create an agent, its lists identify the existing one.
    async fn find_or_create(&self, person: Person<'_>) -> Result<Agent, AttemptError> {
        let Person {
            advisor,
            name,
            email,
            ..
        } = person;
        let listed = self.our_api.agents_by_email(email).await?;
        if let Some(agent) = choose(alike(listed, email), advisor, name) {
            return Ok(agent);
        }
        let taken = match self.create(person).await? {
            Creation::Created(agent) | Creation::Found(agent) => return Ok(agent),
            Creation::Taken(taken) if !taken.by_namesake => taken,
            Creation::Taken(_) => {
                let full_name = format!("{name} ({email})");
                let renamed = Person {
                    name: &full_name,
                    ..person
                };
                match self.create(renamed).await? {
                    Creation::Created(agent) => {
                        tracing::warn!(%advisor, "another agent has the same name; added the e-mail address to the new agent's name");
                        return Ok(agent);
                    }
                    Creation::Found(agent) => return Ok(agent),
                    Creation::Taken(taken) => taken,
                }
            }
        };
        match <[Agent; 1]>::try_from(taken.agents) {
            Ok([agent]) => {
                tracing::warn!(
                    %advisor, agent = %agent.agent_id,
                    "OurAPI has an agent with another spelling of the e-mail address; using that agent"
                );
                Ok(agent)
            }
            Err(_) => Err(taken.error.with_kind(ErrorKind::Ambiguous).into()),
        }
    }

    /// Creates an agent. If OurAPI refuses, its lists are read to find out why.
    async fn create(&self, person: Person<'_>) -> Result<Creation, AttemptError> {
        let Person {
            advisor,
            name,
            email,
            ..
        } = person;
        let our_api = &self.our_api;
        let mut error = match our_api.create_agent(name, email).await {
            Ok(agent) => {
                tracing::debug!(agent = %agent.agent_id, %advisor, "agent created");
                return Ok(Creation::Created(agent));
            }
            Err(error) if error.kind == ErrorKind::Conflict => error,
            Err(error) => return Err(error.into()),
        };
        // An earlier creation that timed out may have been carried out meanwhile.
        let mut listed = our_api.agents_by_email(email).await?;
        if let Some(agent) = choose(alike(listed.clone(), email), advisor, name) {
            return Ok(Creation::Found(agent));
        }
        // OurAPI may list every address that contains this one, but a longer address belongs to another person.
        let address = email.to_lowercase();
        listed.retain(|agent| !agent.email.to_lowercase().contains(&address));
        let namesakes = our_api.agents_by_name(name).await?;
        let is_named = namesakes.iter().any(|agent| is_alike(&agent.name, name));
        if !is_named && listed.is_empty() {
            // OurAPI also answers 500 if the name or the address is taken. Neither is, so this 500 was an outage.
            let is_outage = error
                .exchange
                .status
                .is_some_and(|status| status.is_server_error());
            if is_outage {
                let kind = ErrorKind::OutcomeUnknown { timed_out: false };
                let http = our_api.http();
                return Err(http.reclassify(error, kind).into());
            }
            // A single refusal proves nothing. If it is repeated, the reason may be a namesake that OurAPI does not
            // list.
            error = self.refused(person, error).await?;
        }
        // If exactly one agent has both the address and the name, it is the one to use. If no agent has the name, and
        // exactly one has the address, it is the one to use. Otherwise the name may be taken by a namesake, and another
        // name may help.
        let both: Vec<Agent> = listed
            .iter()
            .filter(|agent| namesakes.contains(agent))
            .cloned()
            .collect();
        let one_has_both = both.len() == 1;
        Ok(Creation::Taken(Taken {
            by_namesake: !one_has_both && (is_named || listed.len() != 1),
            agents: if one_has_both { both } else { listed },
            error,
        }))
    }

    /// Counts a refusal of the agent. Returns it if it is believed.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Denied`] if it is not believed yet.
    async fn refused(
        &self,
        person: Person<'_>,
        refusal: ApiError,
    ) -> Result<ApiError, AttemptError> {
        let (epoch, AdvisorId(id), now) = (person.epoch, person.advisor, Millis::now());
        let is_believed = self
            .journal
            .with(move |store| store.is_denied(epoch, Denial::Agent, id, now))
            .await?;
        match is_believed {
            true => Ok(refusal),
            false => Err(refusal.with_kind(ErrorKind::Denied).into()),
        }
    }

    /// Handles a not-found response for an agent. If OurAPI's list confirms the loss, the agent is created again when
    /// it is needed. With `--rebuild auto`, all other data is verified before it is used.
    pub(super) async fn missing(&self, agent: Option<Uuid>, error: ApiError) -> AttemptError {
        match self.forget_if_lost(agent).await {
            Ok(true) => AttemptError::DataLost("OurAPI has lost an agent"),
            // The agent exists, or none was written; another attempt may succeed.
            Ok(false) => error.into(),
            Err(error) => error,
        }
    }

    /// Whether OurAPI no longer has an agent. A verification checks each agent once.
    pub(super) async fn is_gone_in(
        &self,
        verification: VerificationId,
        agent: Uuid,
    ) -> Result<bool, AttemptError> {
        if let Some(gone) = lock(&self.verified).get(&(verification, agent)) {
            return Ok(*gone);
        }
        let gone = self.is_gone(agent).await?;
        let mut verified = lock(&self.verified);
        verified.retain(|(of, _), _| *of == verification);
        verified.insert((verification, agent), gone);
        Ok(gone)
    }

    /// Whether OurAPI no longer has an agent. A single not-found response is not believed.
    pub(super) async fn is_gone(&self, agent: Uuid) -> Result<bool, AttemptError> {
        let is_there = match self.email_of(agent).await? {
            Some(email) => {
                self.exists(agent, &email).await? || self.our_api.has_agent(agent).await?
            }
            // Another client has set the agent, or the daemon wrote it before OurAPI lost data.
            None => {
                self.our_api.has_agent(agent).await? || {
                    let agents = self.our_api.agents().await?;
                    agents.iter().any(|listed| listed.agent_id == agent)
                }
            }
        };
        Ok(!is_there)
    }

    /// Whether OurAPI has an agent, created by any client. OurAPI is queried once per agent after each loss.
    pub(super) async fn is_there(&self, agent: Option<Uuid>) -> Result<bool, AttemptError> {
        let Some(agent) = agent else { return Ok(false) };
        if let Some(is_there) = lock(&self.cache).exists.get(&agent) {
            return Ok(*is_there);
        }
        let losses = self.losses();
        let is_there = self.our_api.has_agent(agent).await?;
        let mut cache = lock(&self.cache);
        if losses == cache.losses {
            cache.exists.insert(agent, is_there);
        }
        Ok(is_there)
    }

    async fn email_of(&self, agent: Uuid) -> Result<Option<String>, AttemptError> {
        let email = self.journal.with(move |store| store.email_of(agent));
        Ok(email.await?)
    }

    async fn exists(&self, agent: Uuid, email: &str) -> Result<bool, AttemptError> {
        let agents = self.our_api.agents_by_email(email).await?;
        Ok(agents.iter().any(|found| found.agent_id == agent))
    }

    /// Checks whether OurAPI still has an agent, and forgets the agent if not. Returns whether it was lost.
    pub(super) async fn forget_if_lost(&self, agent: Option<Uuid>) -> Result<bool, AttemptError> {
        let Some(agent) = agent else { return Ok(false) };
        let Some(email) = self.email_of(agent).await? else {
            // The loss was reported for another conversation already, or another client set an agent that the daemon
            // does not know.
            self.forget();
            return Ok(true);
        };
        if self.exists(agent, &email).await? {
            return Ok(false);
        }
        tracing::error!(%agent, rebuild = self.rebuild, "OurAPI has lost an agent");
        if self.rebuild {
            self.record_loss().await?;
        } else {
            self.journal
                .with(move |store| store.forget_agent(agent))
                .await?;
            self.forget();
        }
        Ok(true)
    }
}

/// An advisor, and the fields of the agent.
#[derive(Clone, Copy)]
struct Person<'a> {
    epoch: Epoch,
    advisor: AdvisorId,
    name: &'a str,
    email: &'a str,
}

enum Creation {
    Created(Agent),
    /// The agent existed already.
    Found(Agent),
    Taken(Taken),
}

/// Why OurAPI refuses an agent.
struct Taken {
    /// Whether another name may help.
    by_namesake: bool,
    /// The agents that have the address in another spelling.
    agents: Vec<Agent>,
    error: ApiError,
}

/// The agents with exactly this e-mail address, or else those whose address differs only in case.
fn alike(agents: Vec<Agent>, email: &str) -> Vec<Agent> {
    let (exact, others): (Vec<_>, Vec<_>) =
        agents.into_iter().partition(|agent| agent.email == email);
    if !exact.is_empty() {
        return exact;
    }
    let mut alike = others;
    alike.retain(|agent| is_alike(&agent.email, email));
    alike
}

/// Chooses the agent whose name matches, or else the first by id, so that the choice is always the same.
fn choose(mut agents: Vec<Agent>, advisor: AdvisorId, name: &str) -> Option<Agent> {
    if agents.len() > 1 {
        tracing::warn!(%advisor, agents = agents.len(), "several agents have the e-mail address");
    }
    agents.sort_by_key(|agent| (agent.name.trim() != name, agent.agent_id));
    agents.into_iter().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choice_among_several_agents() {
        let agent = |id, name: &str| Agent {
            agent_id: Uuid::from_u128(id),
            name: name.into(),
            email: "e".into(),
        };
        let chosen =
            |agents| choose(agents, AdvisorId(7), "Ann").map(|agent| agent.agent_id.as_u128());
        assert_eq!(chosen(vec![]), None);
        assert_eq!(chosen(vec![agent(3, "Bob"), agent(2, "Cid")]), Some(2));
        assert_eq!(
            chosen(vec![agent(1, "Bob"), agent(3, "Ann"), agent(2, "Ann")]),
            Some(2)
        );
    }
}
