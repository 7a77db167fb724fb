//! The random behavior of BigChat.

use rand::RngExt;
use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::IndexedRandom;
use serde_json::{Value, json};

use super::bigchat::{BigChat, Log, Mode};
use super::event::{event_at, is_message};

const FIRST_NAMES: [&str; 14] = [
    "Ann-Marie",
    "Dr. Olive",
    "Seán",
    "Zoë",
    "Mr Bernard",
    "J.",
    "D'Arcy",
    "Mary Jane",
    "Ali",
    "Ngozi",
    "Pat",
    "Xi",
    "Iñaki",
    "Miss Una",
];
const LAST_NAMES: [&str; 14] = [
    "O'Brien",
    "Smith-Jones",
    "St. John",
    "de la Cruz",
    "Murphy",
    "Ó Súilleabháin",
    "Li",
    "Njoroge",
    "Müller",
    "D'Souza",
    "Byrne Jr.",
    "Ng",
    "Walsh",
    "van 't Hoff",
];
const WORDS: [&str; 16] = [
    "dolor", "sit", "amet", "order", "parcel", "refund", "please", "late", "account", "quidem",
    "vero", "nihil", "invoice", "help", "eos", "when",
];
/// Texts that a service may store, strip, escape or measure wrongly. The first ones are too short for OurAPI.
const AWKWARD: [&str; 14] = [
    "k",
    "😀",
    "",
    "   ",
    "\u{a0}x\u{a0}",
    "ok",
    "  ok",
    "ok  \n",
    "👍🏽 thanks",
    "<script>alert('hi')</script>",
    "O'Brien said \"no\"; DROP TABLE chats; --",
    "line one\nline two\r\n\tline three",
    "a\u{0}b \\u0000 \\",
    "ünïcödé שלום e\u{301}",
];

impl BigChat {
    fn person(&mut self) -> String {
        let first = pick(&mut self.rng, &FIRST_NAMES);
        format!("{first} {}", pick(&mut self.rng, &LAST_NAMES))
    }

    /// A name, and an e-mail address made from another name, unless they are to match.
    pub(super) fn make_up_advisor(&mut self) -> (String, String) {
        let mut name = self.person();
        loop {
            let person = self.person();
            if self.options.own_addresses {
                name.clone_from(&person);
            }
            let address = person.replace(' ', "_").to_lowercase();
            // Over several epochs, the names are used up.
            let number = match self.addresses.len() {
                count @ 100.. => format!("{count}."),
                _ => String::new(),
            };
            let address = format!("{number}{address}@company.com");
            if self.addresses.insert(address.clone()) {
                return (name, address);
            }
        }
    }

    /// Opens the next conversation, which starts now.
    fn open_next(&mut self, now: i64) -> (i64, i64) {
        let last = self.conversations.last_key_value();
        let id = last.map_or(1, |(id, _)| id + 1);
        // Right after a restart, the new epoch may begin a second in the future.
        let first = self.conversations.get(&1);
        let now = first.map_or(now, |first| now.max(first.started_at));
        let advisor = self.rng.random_range(1..=10);
        self.last_start = self.last_start.max(now);
        self.insert_conversation(id, now, advisor);
        (id, now)
    }

    fn text(&mut self) -> String {
        if self.options.awkward && self.rng.random_bool(0.15) {
            return pick(&mut self.rng, &AWKWARD).to_owned();
        }
        let count = self.rng.random_range(3..9);
        let words: Vec<&str> = (0..count).map(|_| pick(&mut self.rng, &WORDS)).collect();
        format!("{}.", words.join(" "))
    }

    /// The next event of a conversation, if there is one.
    fn happening(&mut self, id: i64) -> Option<(&'static str, Value)> {
        if self.rng.random_bool(0.2) {
            return Some(("END", Value::Null));
        }
        if self.rng.random_bool(0.2) {
            let old = self.conversations.get(&id);
            let old = old.map_or(1, |conversation| conversation.first_advisor);
            let new = self.rng.random_range(1..=10);
            let data = json!({ "old_advisor_id": old, "new_advisor_id": new });
            return Some(("TRANSFER", data));
        }
        let message = self.rng.random_bool(0.7);
        message.then(|| ("MESSAGE", json!({ "message": self.text() })))
    }

    /// How many copies of an event are reported. `twins` is the probability that a message has a second copy.
    fn copies(&mut self, name: &str, twins: f64) -> usize {
        let twin = is_message(name) && self.options.awkward && self.rng.random_bool(twins);
        1 + usize::from(twin)
    }

    fn active(&self) -> Vec<i64> {
        let ids = self.conversations.keys().rev().take(self.options.active);
        ids.rev().copied().collect()
    }

    /// Adds random events to a page, and returns whether there is another page; `None`: an error that loses the page.
    pub(super) fn make_up(
        &mut self,
        start_at: i64,
        page: i64,
        events: &mut Vec<Value>,
    ) -> Option<bool> {
        if self.rng.random_bool(0.05) {
            return None;
        }
        let now = self.unix_now();
        let before = events.len();
        for id in self.active() {
            let Some((name, data)) = self.happening(id) else {
                continue;
            };
            // A window of a second or less, or one that begins in the future, has only one time.
            let at = if now - start_at <= 1 {
                start_at
            } else {
                self.rng.random_range(start_at..=now)
            };
            if is_message(name) && self.has_reported(id, at, &data) {
                // A client cannot distinguish it from one that is reported again.
                continue;
            }
            let copies = self.copies(name, 0.03);
            events.extend(std::iter::repeat_n(event_at(id, name, at, data), copies));
        }
        if page > 0 && self.rng.random_bool(0.4) {
            events.extend(self.repeatable.choose(&mut self.rng).cloned());
        }
        if self.rng.random_bool(0.5) {
            let (id, at) = self.open_next(now);
            events.push(event_at(id, "START", at, Value::Null));
        }
        let repeatable =
            |event: &&Value| event["event_name"] == "END" || event["event_name"] == "TRANSFER";
        self.repeatable = events[before..]
            .iter()
            .filter(repeatable)
            .cloned()
            .collect();
        Some(page < 1 && !events.is_empty() && self.rng.random_bool(0.2))
    }

    /// Lets the log of [`Mode::Log`] grow up to the present.
    pub(super) fn grow(&mut self) {
        let Mode::Log(Log {
            events_per_second: rate,
            max_late,
            ..
        }) = self.options.mode
        else {
            return;
        };
        let now = self.now_in_seconds();
        if self.options.quiet || self.down || rate <= 0.0 {
            self.next_arrival = self.next_arrival.max(now);
            return;
        }
        while self.next_arrival <= now {
            let arrival = self.next_arrival as i64;
            self.next_arrival += 1.0 / rate;
            let late = match self.rng.random_bool(0.1) {
                true => i64::from(self.rng.random_range(0..=max_late)),
                false => 0,
            };
            if self.rng.random_bool(0.1) {
                let (id, at) = self.open_next(arrival);
                self.log_item(event_at(id, "START", at, Value::Null));
                continue;
            }
            let id = self.active().choose(&mut self.rng).copied().unwrap_or(1);
            if let Some((name, data)) = self.happening(id) {
                for _ in 0..self.copies(name, 0.05) {
                    self.log_item(event_at(id, name, arrival - late, data.clone()));
                }
            }
        }
    }
}

fn pick(rng: &mut Xoshiro256PlusPlus, choices: &[&'static str]) -> &'static str {
    choices.choose(rng).copied().unwrap_or_default()
}
