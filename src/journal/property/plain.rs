//! The journal, as plainly as can be: no database, no conditions, one thing after the other.

use std::collections::BTreeMap;

use crate::conversation::Attempts;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Waiting,
    Delivered,
    Failed,
    Discarded,
}

#[derive(Debug, Clone)]
pub(super) struct Event {
    pub(super) conversation: usize,
    pub(super) text: u8,
    pub(super) state: State,
    pub(super) attempts: Attempts,
    pub(super) kept_at: i64,
    pub(super) next_at: Option<i64>,
    pub(super) settled_at: Option<i64>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Conversation {
    pub(super) due: Option<i64>,
    pub(super) claimed: Option<Vec<i64>>,
    pub(super) found: [u8; 2],
}

/// The journal, as plainly as can be.
#[derive(Debug, Default)]
pub(super) struct Plain {
    pub(super) now: i64,
    pub(super) last_id: i64,
    pub(super) events: BTreeMap<i64, Event>,
    pub(super) conversations: BTreeMap<usize, Conversation>,
}

impl Plain {
    pub(super) fn of(&mut self, conversation: usize, state: State) -> Vec<i64> {
        let fits = |event: &Event| event.conversation == conversation && event.state == state;
        let events = self.events.iter().filter(|(_, event)| fits(event));
        events.map(|(id, _)| *id).collect()
    }

    pub(super) fn in_state(&self, state: State) -> Vec<i64> {
        let events = self.events.iter().filter(|(_, event)| event.state == state);
        events.map(|(id, _)| *id).collect()
    }

    pub(super) fn conversation(&mut self, id: usize) -> &mut Conversation {
        self.conversations.entry(id).or_default()
    }

    pub(super) fn tell(&mut self, conversation: usize, text: u8, count: usize) {
        let equal = |event: &&Event| event.conversation == conversation && event.text == text;
        let known = self.events.values().filter(equal).count();
        for _ in known..count {
            self.last_id += 1;
            let event = Event {
                conversation,
                text,
                state: State::Waiting,
                attempts: Attempts::default(),
                kept_at: self.now,
                next_at: None,
                settled_at: None,
            };
            self.events.insert(self.last_id, event);
            self.wake(conversation);
        }
        self.conversation(conversation);
    }

    pub(super) fn wake(&mut self, id: usize) {
        let now = self.now;
        let conversation = self.conversation(id);
        if conversation.claimed.is_none() {
            conversation.due.get_or_insert(now);
        }
    }

    pub(super) fn reschedule(&mut self, id: usize, not_before: Option<i64>) {
        let first = self
            .of(id, State::Waiting)
            .first()
            .map(|id| self.events[id].clone());
        let due = first.map(|event| {
            let due = event.next_at.unwrap_or(event.kept_at.min(self.now));
            due.max(not_before.unwrap_or(0))
        });
        self.conversation(id).due = due;
    }

    /// What is to be claimed: those due for longest first, each with all that waits of it.
    pub(super) fn claim(&mut self, at_most: usize) -> Vec<(usize, Vec<(i64, Attempts)>)> {
        let mut due: Vec<(i64, usize)> = self
            .conversations
            .iter()
            .filter_map(|(id, conversation)| {
                Some((conversation.due.filter(|due| *due <= self.now)?, *id))
            })
            .collect();
        due.sort_unstable();
        let mut claimed = Vec::new();
        for (_, id) in due.into_iter().take(at_most) {
            let events = self.of(id, State::Waiting);
            let attempts = events
                .iter()
                .map(|id| (*id, self.events[id].attempts))
                .collect();
            *self.conversation(id) = Conversation {
                due: None,
                claimed: Some(events),
                ..self.conversation(id).clone()
            };
            claimed.push((id, attempts));
        }
        claimed
    }

    pub(super) fn deliver(&mut self, id: i64) {
        let now = self.now;
        if let Some(event) = self
            .events
            .get_mut(&id)
            .filter(|event| event.state == State::Waiting)
        {
            (event.state, event.settled_at) = (State::Delivered, Some(now));
        }
    }

    pub(super) fn abandon(&mut self, id: usize) {
        let claimed = self.conversation(id).claimed.take().unwrap_or_default();
        let last = claimed.last().copied().unwrap_or(0);
        // One that was decided about meanwhile is taken for in doubt too, and costs a look-up.
        for event in self
            .of(id, State::Waiting)
            .into_iter()
            .filter(|event| *event <= last)
        {
            if let Some(event) = self.events.get_mut(&event) {
                event.attempts.in_doubt = true;
            }
        }
        let waits = !self.of(id, State::Waiting).is_empty();
        self.conversation(id).due = waits.then_some(self.now + 500);
    }

    pub(super) fn nothing_later_than(&mut self, latest: i64) {
        let now = self.now;
        let times = self
            .conversations
            .values_mut()
            .map(|conversation| &mut conversation.due)
            .chain(self.events.values_mut().map(|event| &mut event.next_at));
        for time in times.flatten().filter(|time| **time > latest) {
            *time = now;
        }
    }

    pub(super) fn lose(&mut self, id: usize, in_doubt: bool) {
        self.conversation(id).found = [0, 0];
        let fits = |event: &&mut Event| event.conversation == id;
        for event in self.events.values_mut().filter(fits) {
            if event.state == State::Delivered {
                (event.state, event.settled_at) = (State::Waiting, None);
            }
            event.attempts.in_doubt |= in_doubt && event.state == State::Waiting;
        }
    }

    pub(super) fn look_up(&mut self, id: usize, held: [u8; 2], up_to: i64) -> Vec<i64> {
        let mut left = held;
        for event in self.of(id, State::Delivered) {
            let left = &mut left[usize::from(self.events[&event].text)];
            *left = left.saturating_sub(1);
        }
        let mut there = Vec::new();
        for event in self.of(id, State::Waiting) {
            let Event { text, attempts, .. } = self.events[&event];
            if !attempts.in_doubt && event > up_to {
                continue;
            }
            let left = &mut left[usize::from(text)];
            if *left > 0 {
                *left -= 1;
                there.push(event);
                self.deliver(event);
            } else if let Some(event) = self.events.get_mut(&event) {
                event.attempts.in_doubt = false;
            }
        }
        self.conversation(id).found = left;
        there
    }
}
