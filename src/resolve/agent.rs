//! Which agent an advisor is: found by e-mail address, created where there is none.

use uuid::Uuid;

use crate::context::Context;
use crate::http::Exchange;
use crate::journal::{KnownAdvisor, KnownAgent};
use crate::our_api::{Agent, OurApiError, Trouble};
use crate::resolve::details;
use crate::setback::Setback;

/// The agent of an advisor; `None` where BigChat no longer knows the advisor or OurAPI refuses the agent for good.
pub async fn resolve(context: &Context, epoch: i64, advisor: i64) -> Result<Option<Uuid>, Setback> {
    if let Some(known) = context.known_agents().get(&(epoch, advisor)) {
        return Ok(*known);
    }
    let _one_at_a_time = context.creating_agent.lock().await;
    let losses = context.losses();
    let agent = match details::advisor(context, epoch, advisor).await? {
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
    advisor: i64,
    name: &str,
    email: &str,
) -> Result<Option<Uuid>, Setback> {
    let address = email.to_owned();
    let known = match context
        .journal
        .with(move |store| store.agent(&address))
        .await?
    {
        Some(known) => known,
        None => {
            let found = match find_or_create(context, advisor, name, email).await {
                Ok(agent) => KnownAgent::Agent(agent.agent_id),
                Err(error) if error.trouble == Trouble::Refused => {
                    let Exchange {
                        request, response, ..
                    } = error.exchange.logged();
                    tracing::warn!(
                        advisor, reason = %error.trouble, request, response,
                        "OurAPI refuses the agent for good: chats stay without one"
                    );
                    KnownAgent::Refused
                }
                Err(error) => return Err(error.into()),
            };
            let address = email.to_owned();
            context
                .journal
                .with(move |store| store.note_agent(&address, found))
                .await?;
            found
        }
    };
    Ok(match known {
        KnownAgent::Agent(id) => Some(id),
        KnownAgent::Refused => None,
    })
}

async fn find_or_create(
    context: &Context,
    advisor: i64,
    name: &str,
    email: &str,
) -> Result<Agent, OurApiError> {
    let our_api = &context.our_api;
    if let Some(agent) = choose(our_api.agents_by_email(email).await?, advisor, name) {
        return Ok(agent);
    }
    let error = match create(context, advisor, name, email).await {
        Err(error) if matches!(error.trouble, Trouble::ConflictOrOutage | Trouble::Conflict) => {
            error
        }
        outcome => return outcome,
    };
    // An outage, or the address is there by now, or somebody else has the name.
    if let Some(agent) = choose(our_api.agents_by_email(email).await?, advisor, name) {
        return Ok(agent);
    }
    if our_api.agents_by_name(name).await?.is_empty() {
        return Err(error);
    }
    tracing::warn!(
        advisor,
        "another agent has the name: the new one gets its e-mail address added"
    );
    create(context, advisor, &format!("{name} ({email})"), email).await
}

async fn create(
    context: &Context,
    advisor: i64,
    name: &str,
    email: &str,
) -> Result<Agent, OurApiError> {
    let agent = context.our_api.create_agent(name, email).await?;
    tracing::debug!(agent = %agent.agent_id, advisor, "agent created");
    Ok(agent)
}

/// Of several agents the one whose name fits, else the first by id, so that it is always the same.
fn choose(mut agents: Vec<Agent>, advisor: i64, name: &str) -> Option<Agent> {
    if agents.len() > 1 {
        tracing::warn!(
            advisor,
            agents = agents.len(),
            "several agents have the e-mail address"
        );
    }
    agents.sort_by_key(|agent| (agent.name.trim() != name, agent.agent_id));
    agents.into_iter().next()
}

/// OurAPI says that an agent does not exist. Looks whether that is so, and has it built again.
pub async fn missing(context: &Context, agent: Option<Uuid>, error: OurApiError) -> Setback {
    match forget_if_lost(context, agent).await {
        Ok(true) => Setback::Rebuilding("OurAPI has lost an agent"),
        // It is there, or was none of ours: nothing to be done but try again.
        Ok(false) => error.into(),
        Err(setback) => setback,
    }
}

/// Whether OurAPI holds an agent, if it is one of ours. In a rebuild it is asked once for each.
pub async fn is_there(
    context: &Context,
    rebuild: i64,
    agent: Option<Uuid>,
) -> Result<bool, Setback> {
    let Some(agent) = agent else { return Ok(true) };
    if let Some(there) = context.looked_for().get(&(rebuild, agent)) {
        return Ok(*there);
    }
    let there = match email_of(context, agent).await? {
        Some(email) => our_api_holds(context, agent, &email).await?,
        None => true,
    };
    let mut looked_for = context.looked_for();
    looked_for.retain(|(of, _), _| *of == rebuild);
    looked_for.insert((rebuild, agent), there);
    Ok(there)
}

/// The same; one that is not there is forgotten, so that it is built again.
pub async fn forget_if_lost_in(
    context: &Context,
    rebuild: i64,
    agent: Option<Uuid>,
) -> Result<(), Setback> {
    if !is_there(context, rebuild, agent).await? {
        forget_if_lost(context, agent).await?;
    }
    Ok(())
}

/// Looks whether OurAPI still has an agent, and forgets it if not. Returns whether it was lost.
async fn forget_if_lost(context: &Context, agent: Option<Uuid>) -> Result<bool, Setback> {
    let Some(agent) = agent else { return Ok(false) };
    let Some(email) = email_of(context, agent).await? else {
        // Forgotten meanwhile: it is looked for anyhow.
        context.known_agents().clear();
        return Ok(true);
    };
    if our_api_holds(context, agent, &email).await? {
        return Ok(false);
    }
    tracing::error!(%agent, rebuild = context.settings.rebuild, "OurAPI has lost an agent");
    if context.settings.rebuild {
        context.our_api_lost_data().await?;
    } else {
        context
            .journal
            .with(move |store| store.forget_agent(&email))
            .await?;
        context.known_agents().clear();
    }
    Ok(true)
}

async fn email_of(context: &Context, agent: Uuid) -> Result<Option<String>, Setback> {
    let email = context
        .journal
        .with(move |store| store.email_of(agent))
        .await?;
    Ok(email)
}

async fn our_api_holds(context: &Context, agent: Uuid, email: &str) -> Result<bool, Setback> {
    let agents = context.our_api.agents_by_email(email).await?;
    Ok(agents.iter().any(|there| there.agent_id == agent))
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
        let chosen = |agents| choose(agents, 7, "Ann").map(|agent| agent.agent_id.as_u128());
        assert_eq!(chosen(vec![]), None);
        assert_eq!(chosen(vec![agent(3, "Bob"), agent(2, "Cid")]), Some(2));
        assert_eq!(
            chosen(vec![agent(1, "Bob"), agent(3, "Ann"), agent(2, "Ann")]),
            Some(2)
        );
    }
}
