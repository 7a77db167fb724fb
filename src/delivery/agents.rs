//! Which agent an advisor is: found by e-mail address, created if there is none.

use uuid::Uuid;

use super::attempts::AttemptError;
use crate::bigchat::details;
use crate::daemon::context::Context;
use crate::domain::ids::{AdvisorId, Epoch};
use crate::http::route::Route;
use crate::http::{ApiError, ErrorKind, Exchange};
use crate::journal::{KnownAdvisor, KnownAgent};
use crate::our_api::{Agent, is_alike};

/// The agent of an advisor; `None` if BigChat no longer knows the advisor or OurAPI permanently rejects the agent.
pub(super) async fn resolve(
    context: &Context,
    epoch: Epoch,
    advisor: AdvisorId,
) -> Result<Option<Uuid>, AttemptError> {
    if let Some(known) = context.known_agents().get(&(epoch, advisor)) {
        return Ok(*known);
    }
    // Two conversations must not both create it.
    let _one_at_a_time = context.creating_agent.lock().await;
    let losses = context.losses();
    let agent = match details::advisor(&context.bigchat, epoch, advisor).await? {
        KnownAdvisor::Gone => None,
        KnownAdvisor::Person { name, email } => of_person(context, advisor, &name, &email).await?,
    };
    let mut known = context.known_agents();
    if losses == context.losses() {
        known.insert((epoch, advisor), agent);
    }
    Ok(agent)
}

async fn of_person(
    context: &Context,
    advisor: AdvisorId,
    name: &str,
    email: &str,
) -> Result<Option<Uuid>, AttemptError> {
    let address = email.to_owned();
    let known = match context
        .journal
        .with(move |store| store.agent(&address))
        .await?
    {
        Some(known) => known,
        None => {
            let mut spelled = None;
            let found = match find_or_create(context, advisor, name, email).await {
                Ok(agent) => {
                    spelled = Some(agent.email);
                    KnownAgent::Agent(agent.agent_id)
                }
                Err(error) if matches!(error.kind, ErrorKind::Rejected | ErrorKind::Ambiguous) => {
                    let Exchange {
                        request, response, ..
                    } = error.exchange.logged();
                    tracing::warn!(
                        %advisor, reason = error.summary(), request, response,
                        "OurAPI permanently rejects an agent; its chats stay without one"
                    );
                    KnownAgent::Refused
                }
                Err(error) => return Err(error.into()),
            };
            let address = email.to_owned();
            context
                .journal
                .with(move |store| store.record_agent(&address, spelled.as_deref(), found))
                .await?;
            found
        }
    };
    Ok(match known {
        KnownAgent::Agent(id) => Some(id),
        KnownAgent::Refused => None,
    })
}

/// The agent of an e-mail address. What OurAPI takes for the same address or name is for it to say: in case, accents, normal
/// forms and domains it may compare, and store, otherwise than this program would. If it refuses to create an agent, the
/// one that it means is found by its lists.
async fn find_or_create(
    context: &Context,
    advisor: AdvisorId,
    name: &str,
    email: &str,
) -> Result<Agent, ApiError> {
    let our_api = &context.our_api;
    let listed = our_api.agents_by_email(email).await?;
    if let Some(agent) = choose(alike(listed, email), advisor, name) {
        return Ok(agent);
    }
    let error = match create(context, advisor, name, email).await {
        Err(error) if error.kind == ErrorKind::Conflict => error,
        outcome => return outcome,
    };
    // The address is taken by now, or another agent has the name, or OurAPI takes other texts for the same ones.
    let listed = our_api.agents_by_email(email).await?;
    if let Some(agent) = choose(alike(listed.clone(), email), advisor, name) {
        return Ok(agent);
    }
    let namesakes = our_api.agents_by_name(name).await?;
    let both = listed
        .iter()
        .filter(|agent| namesakes.contains(agent))
        .cloned()
        .collect::<Vec<_>>();
    let is_named = namesakes.iter().any(|agent| is_alike(&agent.name, name));
    if error.exchange.is_server_error() && !is_named && listed.is_empty() {
        // It is an outage.
        let kind = ErrorKind::OutcomeUnknown { timed_out: false };
        return Err(our_api.http().reconsider(error, Route::CreateAgent, kind));
    }
    // One that has both is no namesake.
    let error = if both.len() == 1 || !is_named && listed.len() == 1 {
        error
    } else {
        let full_name = format!("{name} ({email})");
        match create(context, advisor, &full_name, email).await {
            Err(error) if error.kind == ErrorKind::Conflict => error,
            outcome => {
                if outcome.is_ok() {
                    tracing::warn!(%advisor, "another agent has the name; the e-mail address was added to the new one's");
                }
                return outcome;
            }
        }
    };
    // So it is the address that is taken.
    let meant = if both.len() == 1 { both } else { listed };
    match <[Agent; 1]>::try_from(meant) {
        Ok([agent]) => {
            tracing::warn!(
                %advisor, agent = %agent.agent_id,
                "OurAPI takes the e-mail address for that of an agent with another spelling; that agent is used"
            );
            Ok(agent)
        }
        Err(_) => Err(error.with_kind(ErrorKind::Ambiguous)),
    }
}

async fn create(
    context: &Context,
    advisor: AdvisorId,
    name: &str,
    email: &str,
) -> Result<Agent, ApiError> {
    let agent = context.our_api.create_agent(name, email).await?;
    tracing::debug!(agent = %agent.agent_id, %advisor, "agent created");
    Ok(agent)
}

/// Those of that e-mail address: to the letter, if there are any, else but for the case.
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

/// Of several agents the one whose name matches, else the first by id, so that it is always the same.
fn choose(mut agents: Vec<Agent>, advisor: AdvisorId, name: &str) -> Option<Agent> {
    if agents.len() > 1 {
        tracing::warn!(%advisor, agents = agents.len(), "several agents have the e-mail address");
    }
    agents.sort_by_key(|agent| (agent.name.trim() != name, agent.agent_id));
    agents.into_iter().next()
}

/// OurAPI says that an agent does not exist. If its list agrees, everything that it holds is read again before it is
/// relied on, and the agent is created anew.
pub(super) async fn missing(
    context: &Context,
    agent: Option<Uuid>,
    error: ApiError,
) -> AttemptError {
    match forget_if_lost(context, agent).await {
        Ok(true) => AttemptError::DataLost("OurAPI has lost an agent"),
        // It exists, or was none of ours: another attempt may succeed.
        Ok(false) => error.into(),
        Err(error) => error,
    }
}

/// Whether OurAPI no longer has the agent of an advisor. Within a verification it is asked once for each.
pub(super) async fn is_gone(
    context: &Context,
    verification: i64,
    epoch: Epoch,
    advisor: AdvisorId,
    agent: Option<Uuid>,
) -> Result<bool, AttemptError> {
    let Some(agent) = agent else { return Ok(false) };
    if let Some(gone) = context.verified_agents().get(&(verification, agent)) {
        return Ok(*gone);
    }
    let known = context
        .journal
        .with(move |store| store.advisor(epoch, advisor));
    let gone = match (known.await?, email_of(context, agent).await?) {
        (Some(KnownAdvisor::Person { email, .. }), spelled) => {
            !exists(context, agent, &spelled.unwrap_or(email)).await?
        }
        (Some(KnownAdvisor::Gone) | None, _) => false,
    };
    let mut verified = context.verified_agents();
    verified.retain(|(of, _), _| *of == verification);
    verified.insert((verification, agent), gone);
    Ok(gone)
}

async fn email_of(context: &Context, agent: Uuid) -> Result<Option<String>, AttemptError> {
    let email = context.journal.with(move |store| store.email_of(agent));
    Ok(email.await?)
}

async fn exists(context: &Context, agent: Uuid, email: &str) -> Result<bool, AttemptError> {
    let agents = context.our_api.agents_by_email(email).await?;
    Ok(agents.iter().any(|found| found.agent_id == agent))
}

/// Asks OurAPI whether it still has an agent, and forgets it if not. Returns whether it was lost.
pub(super) async fn forget_if_lost(
    context: &Context,
    agent: Option<Uuid>,
) -> Result<bool, AttemptError> {
    let Some(agent) = agent else { return Ok(false) };
    let Some(email) = email_of(context, agent).await? else {
        // Forgotten meanwhile: it is looked up again anyway.
        context.known_agents().clear();
        return Ok(true);
    };
    if exists(context, agent, &email).await? {
        return Ok(false);
    }
    tracing::error!(%agent, rebuild = context.settings.rebuild, "OurAPI has lost an agent");
    if context.settings.rebuild {
        context.our_api_lost_data().await?;
    } else {
        context
            .journal
            .with(move |store| store.forget_agent(agent))
            .await?;
        context.known_agents().clear();
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_agents_it_is_always_the_same() {
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
