//! What the two APIs are asked: the routes, by method and path, as the contract has them.

use reqwest::Method;

/// A route of one of the APIs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// BigChat: a page of what happened.
    Events,
    /// BigChat: the details of a conversation.
    Conversation,
    /// BigChat: who an advisor is.
    Advisor,
    /// OurAPI: the chats that a filter finds.
    Chats,
    /// OurAPI: a new chat.
    CreateChat,
    /// OurAPI: a change of a chat.
    ChangeChat,
    /// OurAPI: the messages of a chat.
    Messages,
    /// OurAPI: a new message in a chat.
    AddMessage,
    /// OurAPI: the agents that a filter finds.
    Agents,
    /// OurAPI: an agent.
    Agent,
    /// OurAPI: a new agent.
    CreateAgent,
    /// Either: what it says it is.
    Description,
}

impl Route {
    /// Method and path; `{id}` stands for what is asked for.
    pub fn name(self) -> &'static str {
        match self {
            Self::Events => "GET /events",
            Self::Conversation => "GET /conversations/{id}",
            Self::Advisor => "GET /advisors/{id}",
            Self::Chats => "GET /chats",
            Self::CreateChat => "POST /chats",
            Self::ChangeChat => "PATCH /chats/{id}",
            Self::Messages => "GET /chats/{id}/messages",
            Self::AddMessage => "POST /chats/{id}/messages",
            Self::Agents => "GET /agents",
            Self::Agent => "GET /agents/{id}",
            Self::CreateAgent => "POST /agents",
            Self::Description => "GET /openapi.json",
        }
    }

    /// Its method.
    pub fn method(self) -> Method {
        match self {
            Self::CreateChat | Self::AddMessage | Self::CreateAgent => Method::POST,
            Self::ChangeChat => Method::PATCH,
            _ => Method::GET,
        }
    }

    /// Whether it changes nothing.
    pub fn is_read(self) -> bool {
        self.method().is_safe()
    }

    /// The segments of its path, `id` in its place.
    pub fn path(self, id: &str) -> impl Iterator<Item = &str> {
        let segments = self.name().split('/').skip(1);
        segments.map(move |segment| if segment == "{id}" { id } else { segment })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_the_method_of_its_name_and_takes_an_id_where_there_is_one() {
        use Route::*;
        for route in [
            Events,
            Conversation,
            Advisor,
            Chats,
            CreateChat,
            ChangeChat,
            Messages,
            AddMessage,
            Agents,
            Agent,
            CreateAgent,
            Description,
        ] {
            let path: Vec<&str> = route.path("7").collect();
            let written = format!("{} /{}", route.method(), path.join("/"));
            assert_eq!(written, route.name().replace("{id}", "7"));
        }
    }
}
