//! The routes of the two APIs, as in the contract.

use reqwest::Method;

use crate::domain::named::named;

named! {
    /// Named by method and path template.
    Route {
        // BigChat:
        Events = "GET /events",
        Conversation = "GET /conversations/{id}",
        Advisor = "GET /advisors/{id}",
        // OurAPI:
        Chats = "GET /chats",
        CreateChat = "POST /chats",
        ChangeChat = "PATCH /chats/{id}",
        Messages = "GET /chats/{id}/messages",
        AddMessage = "POST /chats/{id}/messages",
        Agents = "GET /agents",
        Agent = "GET /agents/{id}",
        CreateAgent = "POST /agents",
        // Both:
        Description = "GET /openapi.json",
    }
}

impl Route {
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
