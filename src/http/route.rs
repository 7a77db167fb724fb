//! The routes of the two APIs, as in the contract.

use reqwest::Method;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    // BigChat:
    Events,
    Conversation,
    Advisor,
    // OurAPI:
    Chats,
    CreateChat,
    ChangeChat,
    Messages,
    AddMessage,
    Agents,
    Agent,
    CreateAgent,
    // Both:
    Description,
}

impl Route {
    const ALL: [Self; 12] = [
        Self::Events,
        Self::Conversation,
        Self::Advisor,
        Self::Chats,
        Self::CreateChat,
        Self::ChangeChat,
        Self::Messages,
        Self::AddMessage,
        Self::Agents,
        Self::Agent,
        Self::CreateAgent,
        Self::Description,
    ];

    /// Method and path template.
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

    pub fn method(self) -> Method {
        match self {
            Self::CreateChat | Self::AddMessage | Self::CreateAgent => Method::POST,
            Self::ChangeChat => Method::PATCH,
            _ => Method::GET,
        }
    }

    pub fn is_read(self) -> bool {
        self.method().is_safe()
    }

    /// The segments of the path, with `id` in place of `{id}`.
    pub fn path(self, id: &str) -> impl Iterator<Item = &str> {
        let segments = self.name().split('/').skip(1);
        segments.map(move |segment| if segment == "{id}" { id } else { segment })
    }

    /// Whether a path relative to a base URL is that of a route, judging by its first segment.
    pub fn is_path(path: &str) -> bool {
        let first = path.split('/').next();
        Self::ALL.iter().any(|route| route.path("").next() == first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn method_and_path_match_the_name() {
        for route in Route::ALL {
            let path: Vec<&str> = route.path("7").collect();
            let written = format!("{} /{}", route.method(), path.join("/"));
            assert_eq!(written, route.name().replace("{id}", "7"));
        }
    }
}
