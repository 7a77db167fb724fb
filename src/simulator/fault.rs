//! Faults of requests, in one vocabulary: `status(503)`, `dropped().carried_out()`, `slow(SECOND).times(3)`.
//!
//! A fault replaces or delays the usual response. It also says whether the request is carried out anyway.
//! [`Service`](super::Service) chooses the requests that meet it.

use std::time::Duration;

use super::exchange::Reply;

/// Longer than any client waits.
const TOO_LATE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delay {
    No,
    For(Duration),
    /// Until [`Service::resume`](super::Service::resume).
    Paused,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Usual,
    Instead(Reply),
    /// The connection is closed without a response.
    None,
    /// The response breaks off halfway through its body.
    CutOff,
}

/// A fault of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub(super) answer: Answer,
    pub(super) delay: Delay,
    /// Whether the request is carried out before the delay and the response.
    pub(super) carried_out: bool,
    /// Whether the request is carried out even if the client has gone by then.
    pub(super) detached: bool,
    /// A `retry-after` with the date this many seconds from now, by the service's clock.
    pub(super) retry_date: Option<i64>,
    pub(super) times: usize,
}

const USUAL: Fault = Fault {
    answer: Answer::Usual,
    delay: Delay::No,
    carried_out: false,
    detached: false,
    retry_date: None,
    times: 1,
};

/// A response with this status, without a body.
pub fn status(status: u16) -> Fault {
    Fault {
        answer: Answer::Instead(Reply::new(status)),
        ..USUAL
    }
}

/// An unhandled error: 500, and the connection is closed.
pub fn crashed() -> Fault {
    Fault {
        answer: Answer::Instead(Reply::unhandled()),
        ..USUAL
    }
}

/// The connection is closed without a response.
pub fn dropped() -> Fault {
    Fault {
        answer: Answer::None,
        ..USUAL
    }
}

/// A response that breaks off halfway through its body.
pub fn cut_off() -> Fault {
    Fault {
        answer: Answer::CutOff,
        ..USUAL
    }
}

/// A success with an HTML page, as from a proxy's login.
pub fn html() -> Fault {
    let page = "<!doctype html><title>Sign in</title><p>Please sign in.";
    status(200).header("content-type", "text/html").body(page)
}

/// The usual response after a delay. The request is not carried out if the client has gone by then.
pub fn slow(delay: Duration) -> Fault {
    USUAL.after(delay)
}

/// A response that comes after every client has given up.
pub fn late() -> Fault {
    status(200).after(TOO_LATE)
}

/// The request is carried out after a delay, even if the client has gone by then, as in the real services.
pub fn overdue(delay: Duration) -> Fault {
    Fault {
        detached: true,
        ..slow(delay)
    }
}

/// The usual response, once [`Service::resume`](super::Service::resume) is called.
pub fn paused() -> Fault {
    Fault {
        delay: Delay::Paused,
        ..USUAL
    }
}

impl Fault {
    pub fn body(self, body: impl AsRef<[u8]>) -> Self {
        self.change(|reply| reply.body = body.as_ref().to_vec())
    }

    pub fn header(self, name: &str, value: &str) -> Self {
        self.change(|reply| reply.headers.push((name.to_owned(), value.to_owned())))
    }

    /// Adds a `retry-after` with the date this many seconds from now, by the service's clock.
    pub fn retry_date(mut self, seconds: i64) -> Self {
        self.retry_date = Some(seconds);
        self
    }

    /// Delays the response.
    pub fn after(mut self, delay: Duration) -> Self {
        self.delay = Delay::For(delay);
        self
    }

    /// Carries out the request anyway.
    pub fn carried_out(mut self) -> Self {
        self.carried_out = true;
        self
    }

    /// Strikes this many times instead of once.
    pub fn times(mut self, times: usize) -> Self {
        self.times = times;
        self
    }

    /// Strikes until [`Service::calm`](super::Service::calm).
    pub fn always(self) -> Self {
        self.times(usize::MAX)
    }

    /// The fault in words, as an outage of a service.
    pub fn in_words(&self) -> String {
        match &self.answer {
            Answer::None => "drops all connections".to_owned(),
            Answer::Usual => "hangs".to_owned(),
            Answer::Instead(reply) if reply.status != 200 => {
                format!("answers {} to everything", reply.status)
            }
            Answer::Instead(_) | Answer::CutOff => "answers nonsense".to_owned(),
        }
    }

    fn change(mut self, change: impl FnOnce(&mut Reply)) -> Self {
        if let Answer::Instead(reply) = &mut self.answer {
            change(reply);
        }
        self
    }
}

/// Whether a request's line matches a pattern: the beginning of a line, in which `*` stands for anything and `{id}` for
/// one segment of a path. If a pattern has no `*` or `?` and ends within the path, the path must end there, too.
pub(super) fn fits(line: &str, pattern: &str) -> bool {
    let mut rest = line;
    for (number, part) in pattern.split("{id}").enumerate() {
        if number > 0 {
            rest = rest.trim_start_matches(|c| !matches!(c, '/' | '?' | ' '));
        }
        let mut parts = part.split('*');
        let first = parts.next().and_then(|part| rest.strip_prefix(part));
        let left = first.and_then(|rest| {
            parts.try_fold(rest, |rest, part| {
                rest.split_once(part).map(|(_, rest)| rest)
            })
        });
        match left {
            Some(left) => rest = left,
            None => return false,
        }
    }
    let in_path =
        !pattern.is_empty() && !pattern.contains(['*', '?']) && pattern.split(' ').nth(2).is_none();
    !in_path || rest.is_empty() || rest.starts_with(['?', ' '])
}

#[cfg(test)]
mod tests {
    use super::fits;

    #[test]
    fn pattern_ends_where_a_path_ends() {
        let line = r#"POST /chats/c1/messages {"text":"bad"}"#;
        for pattern in [
            "",
            "*",
            "POST",
            "POST *",
            "POST /chats/c1/messages",
            "POST /chats/{id}/messages",
            "POST /chats/*",
            "POST /chats/c1/messages {",
            "POST /chats/{id}/messages*bad",
        ] {
            assert!(fits(line, pattern), "{pattern}");
        }
        for pattern in [
            "POST /chats",
            "POST /chats/{id}",
            "POST /chats/c1/mess",
            "GET",
            "POST /chats/{id}/messages*good",
        ] {
            assert!(!fits(line, pattern), "{pattern}");
        }
        assert!(fits("GET /events?start_at=1", "GET /events"));
        assert!(!fits("GET /conversations/12", "GET /conversations/1"));
    }
}
