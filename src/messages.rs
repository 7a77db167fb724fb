//! Telling which messages OurAPI holds already: there is no idempotency key, so they are told by what they say.
//!
//! Pure: what OurAPI holds and what the journal knows in, what need not be sent out.

use std::collections::HashMap;

use crate::our_api;
use crate::time::Timestamp;

/// What makes two messages of a chat equal: when they were sent, and the words without the white space that OurAPI
/// strips from both ends.
pub type MessageKey = (Timestamp, String);

/// The key of a message, as sent or as held.
pub fn key(sent_at: Timestamp, text: &str) -> MessageKey {
    // Of the characters below 32, some strip the separators 0x1c to 0x1f as well; to compare, they go on both sides.
    let stripped = text.trim_matches(|c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c));
    (sent_at, stripped.to_owned())
}

/// The keys of messages as OurAPI holds them.
pub fn keys(held: &[our_api::Message]) -> Vec<MessageKey> {
    let keys = held
        .iter()
        .map(|message| key(message.sent_at, &message.text));
    keys.collect()
}

/// What is known of a message in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Known to stand in OurAPI.
    Delivered,
    /// It waits, and may stand there already.
    MayBeThere,
    /// It waits, and was never sent.
    New,
}

/// What a look-up told.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct LookUp {
    /// The waiting messages that stand in OurAPI already.
    pub there: Vec<i64>,
    /// The waiting messages that might have stood there, and do not.
    pub missing: Vec<i64>,
    /// The delivered messages that do not stand there any more.
    pub lost: Vec<i64>,
    /// What OurAPI holds beyond what the journal knows of.
    pub beyond: HashMap<MessageKey, u32>,
}

/// Compares what OurAPI holds in a chat with the messages the journal has for it, in order of arrival. Equal
/// messages are counted: each that is known to be delivered accounts for one that is held, and only what is left
/// over can be one that waits.
pub fn look_up(
    held: impl IntoIterator<Item = MessageKey>,
    journal: &[(i64, MessageKey, Standing)],
) -> LookUp {
    let mut result = LookUp::default();
    let mut left: HashMap<MessageKey, u32> = HashMap::new();
    for key in held {
        *left.entry(key).or_default() += 1;
    }
    let mut take = |key: &MessageKey| match left.get_mut(key) {
        Some(count) if *count > 0 => {
            *count -= 1;
            true
        }
        _ => false,
    };
    for (id, key, _) in journal
        .iter()
        .filter(|(.., standing)| *standing == Standing::Delivered)
    {
        if !take(key) {
            result.lost.push(*id);
        }
    }
    for (id, key, _) in journal
        .iter()
        .filter(|(.., standing)| *standing == Standing::MayBeThere)
    {
        if take(key) {
            result.there.push(*id)
        } else {
            result.missing.push(*id)
        }
    }
    left.retain(|_, count| *count > 0);
    result.beyond = left;
    result
}

/// Which delivered messages do not stand there any more. One that another of the same second accounts for may have been
/// changed by OurAPI: to send it again would double it.
pub fn lost(
    held: impl IntoIterator<Item = MessageKey>,
    journal: &[(i64, MessageKey, Standing)],
) -> Vec<i64> {
    let LookUp {
        mut lost, beyond, ..
    } = look_up(held, journal);
    if beyond.is_empty() {
        return lost;
    }
    let mut changed: HashMap<Timestamp, u32> = HashMap::new();
    for ((sent_at, _), count) in beyond {
        *changed.entry(sent_at).or_default() += count;
    }
    let sent_at = journal.iter().map(|(id, (sent_at, _), _)| (*id, *sent_at));
    let sent_at: HashMap<i64, Timestamp> = sent_at.collect();
    lost.retain(
        |lost| match sent_at.get(lost).and_then(|at| changed.get_mut(at)) {
            Some(count) if *count > 0 => {
                *count -= 1;
                false
            }
            _ => true,
        },
    );
    lost
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn k(text: &str) -> MessageKey {
        key(Timestamp::clamped(1), text)
    }

    #[test]
    fn white_space_at_the_ends_does_not_count() {
        assert_eq!(k(" \u{a0}hello\nthere\t\u{1f}"), k("hello\nthere"));
        assert_ne!(k("hello there"), k("hello  there"));
        assert_ne!(
            key(Timestamp::clamped(1), "a"),
            key(Timestamp::clamped(2), "a")
        );
    }

    #[test]
    fn equal_messages_are_counted() {
        use Standing::{Delivered, MayBeThere, New};
        let journal = [
            (1, k("hi"), Delivered),
            (2, k("hi"), MayBeThere),
            (3, k("hi"), MayBeThere),
            (4, k("hi"), New),
        ];
        let with = |held: u32| look_up((0..held).map(|_| k("hi")), &journal);
        assert_eq!(with(0).lost, [1]);
        assert!(with(1).lost.is_empty());
        assert_eq!((with(1).there, with(1).missing), (vec![], vec![2, 3]));
        assert_eq!((with(2).there, with(2).missing), (vec![2], vec![3]));
        assert_eq!((with(3).there, with(3).missing), (vec![2, 3], vec![]));
        assert_eq!(with(5).beyond, HashMap::from([(k("hi"), 2)]));
    }

    #[test]
    fn what_our_api_has_changed_is_not_lost() {
        let journal = [
            (1, k("hi"), Standing::Delivered),
            (2, k("ho"), Standing::Delivered),
            (3, k("hu"), Standing::MayBeThere),
        ];
        assert_eq!(lost([], &journal), [1, 2]);
        assert_eq!(lost([k("hi")], &journal), [2]);
        assert!(lost([k("hi"), k("HO!")], &journal).is_empty());
        assert_eq!(lost([k("HI!")], &journal), [2]);
        let another = key(Timestamp::clamped(2), "HI!");
        assert_eq!(lost([another], &journal), [1, 2]);
    }

    proptest! {
        /// Whatever was carried out of what may have been: afterwards each message stands there once.
        #[test]
        fn in_the_end_each_stands_there_once(messages in proptest::collection::vec((0_u8..3, 0_u8..3, any::<bool>()), 0..30)) {
            let standing = |kind| match kind { 0 => Standing::Delivered, 1 => Standing::MayBeThere, _ => Standing::New };
            let journal: Vec<_> = messages.iter().zip(1_i64..)
                .map(|((text, kind, _), id)| (id, k(&format!("m{text}")), standing(*kind))).collect();
            let there: Vec<_> = journal.iter().zip(&messages)
                .filter(|((.., standing), (.., carried_out))| match standing {
                    Standing::Delivered => true,
                    Standing::MayBeThere => *carried_out,
                    Standing::New => false,
                })
                .map(|((_, key, _), _)| key.clone()).collect();
            let result = look_up(there.clone(), &journal);
            let mut after = there;
            for (id, key, standing) in &journal {
                if *standing == Standing::New || result.missing.contains(id) {
                    after.push(key.clone());
                }
            }
            let mut wanted: Vec<_> = journal.iter().map(|(_, key, _)| key.clone()).collect();
            after.sort();
            wanted.sort();
            prop_assert_eq!(after, wanted);
            prop_assert!(result.beyond.is_empty());
        }
    }
}
