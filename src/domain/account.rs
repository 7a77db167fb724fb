//! Accounting: matching a chat's messages with those of the journal. OurAPI has no idempotency key, so time and text
//! identify a message, and equal ones are counted.

use std::collections::{BTreeMap, HashMap};

use super::ids::EventId;
use crate::domain::time::Timestamp;

/// The key that equal messages of a chat share: the time of sending, and the text without the white space that OurAPI
/// strips from both ends.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageKey {
    pub sent_at: Timestamp,
    pub text: String,
}

impl MessageKey {
    pub fn new(sent_at: Timestamp, text: &str) -> Self {
        // Python strips the separators 0x1c to 0x1f, too.
        let stripped =
            text.trim_matches(|c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c));
        Self {
            sent_at,
            text: stripped.to_owned(),
        }
    }
}

/// A message of the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    pub id: EventId,
    pub key: MessageKey,
    pub state: MessageState,
}

/// Whether OurAPI has a message, as far as the journal knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageState {
    Delivered,
    /// It waits. If this journal is a restored backup, the daemon may have sent it after the backup was made.
    MaybeSent,
    /// It waits, and either the outcome of an attempt is unknown, or it was delivered before OurAPI reported the chat
    /// as gone.
    OutcomeUnknown,
    /// A dead letter of unknown outcome, which is not sent again.
    DeadOutcomeUnknown,
    /// A discarded dead letter of unknown outcome. It accounts only for an equal message in OurAPI that no other
    /// message of the journal matches.
    DiscardedOutcomeUnknown,
    /// It waits or is a dead letter, and no attempt can have delivered it.
    NotSent,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accounting {
    /// Delivered messages that OurAPI does not have.
    pub missing: Vec<EventId>,
    /// The messages in OurAPI that are not accounted for by a delivered message or a dead letter, with their number. A
    /// waiting message that matches one need not be sent.
    pub credits: HashMap<MessageKey, u32>,
    /// The messages of unknown outcome for which there is a credit. Their outcome stays unknown until the credit is
    /// used, so that they can match again if the chat is read again before that: of the waiting messages, only those of
    /// unknown outcome can match a message that OurAPI altered.
    pub credited: Vec<EventId>,
}

/// Matches the journal's messages with those in OurAPI, each at most once. Exact matches come first: those of delivered
/// messages, then those of messages that may have been sent. OurAPI may have altered a message. So each delivered
/// message without an exact match then accounts for one remaining message of the same second, whichever it is, and so
/// does each message of unknown outcome that was not discarded. `recorded` is in order of arrival.
pub fn account(
    existing: impl IntoIterator<Item = MessageKey>,
    recorded: &[Recorded],
) -> Accounting {
    let mut left = Left::default();
    for key in existing {
        left.add(key);
    }
    let mut unmatched = Vec::new();
    let mut credited = Vec::new();
    for states in [
        &[MessageState::Delivered][..],
        &[MessageState::DeadOutcomeUnknown],
        &[MessageState::OutcomeUnknown, MessageState::MaybeSent],
        &[MessageState::DiscardedOutcomeUnknown],
    ] {
        let matching = recorded
            .iter()
            .filter(|message| states.contains(&message.state));
        for message in matching {
            if !left.take(&message.key) {
                unmatched.push(message);
            } else if matches!(
                message.state,
                MessageState::OutcomeUnknown | MessageState::MaybeSent
            ) {
                credited.push(message);
            }
        }
    }
    let mut missing = Vec::new();
    for message in unmatched {
        let may_be_altered = !matches!(
            message.state,
            MessageState::MaybeSent | MessageState::DiscardedOutcomeUnknown
        );
        let altered = may_be_altered && left.take_of_second(message.key.sent_at);
        match message.state {
            MessageState::Delivered if !altered => missing.push(message.id),
            MessageState::OutcomeUnknown if altered => credited.push(message),
            _ => {}
        }
    }
    for message in &credited {
        left.add(message.key.clone());
    }
    credited.retain(|message| message.state == MessageState::OutcomeUnknown);
    Accounting {
        missing,
        credits: left.into_credits(),
        credited: credited.iter().map(|message| message.id).collect(),
    }
}

/// How many messages in OurAPI are not yet accounted for, by second and text. No number is zero.
#[derive(Default)]
struct Left(HashMap<Timestamp, BTreeMap<String, u32>>);

impl Left {
    fn add(&mut self, key: MessageKey) {
        let texts = self.0.entry(key.sent_at).or_default();
        *texts.entry(key.text).or_default() += 1;
    }

    fn take(&mut self, MessageKey { sent_at, text }: &MessageKey) -> bool {
        let Some(texts) = self.0.get_mut(sent_at) else {
            return false;
        };
        match texts.get_mut(text) {
            None => return false,
            Some(1) => {
                texts.remove(text);
            }
            Some(count) => *count -= 1,
        }
        true
    }

    fn take_of_second(&mut self, sent_at: Timestamp) -> bool {
        let texts = self.0.get(&sent_at);
        let first = texts.and_then(|texts| texts.keys().next().cloned());
        first.is_some_and(|text| self.take(&MessageKey { sent_at, text }))
    }

    fn into_credits(self) -> HashMap<MessageKey, u32> {
        let by_second = self.0.into_iter();
        let credits = by_second.flat_map(|(sent_at, texts)| {
            let counts = texts.into_iter();
            counts.map(move |(text, count)| (MessageKey { sent_at, text }, count))
        });
        credits.collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(second: i64, text: &str) -> MessageKey {
        MessageKey::new(Timestamp::clamped(second), text)
    }

    fn recorded(id: i64, key: MessageKey, state: MessageState) -> Recorded {
        Recorded {
            id: EventId(id),
            key,
            state,
        }
    }

    #[test]
    fn white_space_at_both_ends_stripped() {
        assert_eq!(of(1, " a b\u{a0}\n"), of(1, "a b"));
        assert_eq!(of(1, "\x1ca\x1f"), of(1, "a"));
        assert_ne!(of(1, "a  b"), of(1, "a b"));
        assert_ne!(of(1, "a"), of(2, "a"));
    }

    #[test]
    fn delivered_messages_account_first() {
        use MessageState::{Delivered, MaybeSent};
        let journal = [
            recorded(1, of(1, "a"), Delivered),
            recorded(2, of(1, "a"), MaybeSent),
        ];
        assert!(account([of(1, "a")], &journal).credits.is_empty());
        let two = account([of(1, "a"), of(1, "a")], &journal);
        assert_eq!(two.credits, HashMap::from([(of(1, "a"), 1)]));
        let none = account([], &journal);
        assert_eq!(none.missing, [EventId(1)]);
    }

    #[test]
    fn an_altered_message_is_not_missing() {
        use MessageState::{Delivered, MaybeSent, OutcomeUnknown};
        let altered = || [of(1, "censored")];
        let delivered = [recorded(1, of(1, "a"), Delivered)];
        assert_eq!(account(altered(), &delivered), Accounting::default());
        let unknown = [recorded(1, of(1, "a"), OutcomeUnknown)];
        assert_eq!(
            account(altered(), &unknown).credits,
            HashMap::from([(of(1, "a"), 1)])
        );
        // Without an attempt, the message in OurAPI may be one that BigChat will report again.
        let maybe = [recorded(1, of(1, "a"), MaybeSent)];
        assert_eq!(
            account(altered(), &maybe).credits,
            HashMap::from([(of(1, "censored"), 1)])
        );
        let elsewhere = [recorded(1, of(2, "a"), Delivered)];
        assert_eq!(account(altered(), &elsewhere).missing, [EventId(1)]);
    }

    #[test]
    fn dead_letter_of_unknown_outcome_accounts() {
        use MessageState::{DeadOutcomeUnknown, MaybeSent};
        let journal = [
            recorded(1, of(1, "a"), DeadOutcomeUnknown),
            recorded(2, of(1, "a"), MaybeSent),
        ];
        assert!(account([of(1, "a")], &journal).credits.is_empty());
    }

    /// A discarded message does not account for another message of its second.
    #[test]
    fn discarded_message_accounts_only_exactly() {
        use MessageState::{DiscardedOutcomeUnknown, OutcomeUnknown};
        let journal = |text| {
            [
                recorded(1, of(1, "a"), DiscardedOutcomeUnknown),
                recorded(2, of(1, text), OutcomeUnknown),
            ]
        };
        let alone = [recorded(1, of(1, "a"), DiscardedOutcomeUnknown)];
        let credits = account([of(1, "b")], &alone).credits;
        assert_eq!(credits, HashMap::from([(of(1, "b"), 1)]));
        assert!(account([of(1, "a")], &journal("b")).credits.is_empty());
        // Of two equal messages, it is unknown which one OurAPI has.
        let credits = account([of(1, "a")], &journal("a")).credits;
        assert_eq!(credits, HashMap::from([(of(1, "a"), 1)]));
    }

    fn state() -> impl Strategy<Value = MessageState> {
        prop_oneof![
            Just(MessageState::Delivered),
            Just(MessageState::MaybeSent),
            Just(MessageState::OutcomeUnknown),
            Just(MessageState::DeadOutcomeUnknown),
            Just(MessageState::DiscardedOutcomeUnknown),
            Just(MessageState::NotSent),
        ]
    }

    proptest! {
        #[test]
        fn each_copy_is_accounted_for_once(
            existing in proptest::collection::vec((0_i64..3, 0_u8..3), 0..8),
            messages in proptest::collection::vec((0_i64..3, 0_u8..3, state()), 0..8),
        ) {
            let key_of = |second: i64, text: u8| of(second, &format!("text {text}"));
            let journal: Vec<Recorded> = messages.iter().zip(1..)
                .map(|((second, text, state), id)| recorded(id, key_of(*second, *text), *state))
                .collect();
            let count = existing.len();
            let result = account(existing.iter().map(|(second, text)| key_of(*second, *text)), &journal);
            let credits: u32 = result.credits.values().sum();
            let delivered = messages.iter().filter(|(.., state)| *state == MessageState::Delivered).count();
            // Each copy is either a credit, or accounted for by a delivered message or a dead letter.
            prop_assert!(credits as usize + (delivered - result.missing.len()) <= count);
            // A message is missing only if OurAPI has fewer exact copies of it than were delivered.
            for message in journal.iter().filter(|message| result.missing.contains(&message.id)) {
                let same = |key: &MessageKey| *key == message.key;
                let copies = existing.iter().filter(|(second, text)| same(&key_of(*second, *text))).count();
                let sent = journal.iter().filter(|other| other.state == MessageState::Delivered && same(&other.key)).count();
                prop_assert!(copies < sent);
            }
        }
    }
}
