//! Counting events that carry no id.
//!
//! An event is identified by its conversation, kind, time and data ([`Key`]), and by how many equal ones a poll
//! reports. Equal MESSAGEs all count, whether on one page or on several, with one exception. A late event that is
//! inserted into a part already read shifts the following pages, so that the next page begins with the end of the
//! previous one. The repeated events count once. Equal events of all other kinds count once, since BigChat repeats ENDs
//! and TRANSFERs on several pages.
//!
//! Pure. The journal then stores only the events that earlier polls have not reported.

use std::collections::HashMap;

use crate::domain::event::{Event, EventKind};

/// The key that equal events of a poll share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// BigChat's id of the conversation; 0 if the event could not be parsed.
    pub conversation: i64,
    /// See [`Event::fingerprint`].
    pub fingerprint: i64,
    /// `None`: the event could not be parsed.
    pub kind: Option<EventKind>,
}

impl Key {
    pub fn unparsed(fingerprint: i64) -> Self {
        Self {
            conversation: 0,
            fingerprint,
            kind: None,
        }
    }

    /// The replacement for an event that is erased from a stored page.
    pub fn to_json(self) -> String {
        let kind = self.kind.map(EventKind::name);
        serde_json::json!({ "erased": [self.conversation, self.fingerprint, kind] }).to_string()
    }

    /// Reads what [`Self::to_json`] writes.
    pub fn from_json(text: &str) -> Option<Self> {
        #[derive(serde::Deserialize)]
        struct Erased {
            erased: (i64, i64, Option<String>),
        }
        let (conversation, fingerprint, kind) = serde_json::from_str::<Erased>(text).ok()?.erased;
        let kind = match kind {
            Some(name) => Some(EventKind::from_name(&name)?),
            None => None,
        };
        Some(Self {
            conversation,
            fingerprint,
            kind,
        })
    }

    /// Whether each of several equal events on a page counts. An event that could not be parsed may be a message.
    fn is_counted(&self) -> bool {
        self.kind.is_none_or(EventKind::is_message)
    }

    /// Whether BigChat repeats such an event on later pages of the same poll.
    fn is_repeated(&self) -> bool {
        match self.kind {
            Some(EventKind::End | EventKind::Transfer) => true,
            Some(EventKind::Start | EventKind::Message) | None => false,
        }
    }
}

impl From<&Event> for Key {
    fn from(event: &Event) -> Self {
        Self {
            conversation: event.conversation,
            fingerprint: event.fingerprint(),
            kind: Some(event.kind),
        }
    }
}

/// How many events of each key the pages of one poll report.
#[derive(Debug, Default)]
pub struct Counts(HashMap<Key, u32>);

impl Counts {
    /// Counts the events of the pages of one poll.
    pub fn of(pages: &[Vec<Key>]) -> Self {
        let mut counts = HashMap::new();
        for (number, page) in pages.iter().enumerate() {
            // The first page of a loop is recognized only together with the second.
            let next = pages.get(number + 1);
            if next.is_some_and(|next| is_loop(&pages[..=number], next)) {
                continue;
            }
            for key in &page[repeated(&pages[..number], page)..] {
                let count: &mut u32 = counts.entry(*key).or_default();
                *count = if key.is_counted() { *count + 1 } else { 1 };
            }
        }
        Self(counts)
    }

    pub fn get(&self, key: &Key) -> u32 {
        self.0.get(key).copied().unwrap_or(0)
    }
}

/// How many of the first events of a page repeat earlier pages.
fn repeated(before: &[Vec<Key>], page: &[Key]) -> usize {
    if is_repetition(before, page) {
        return page.len();
    }
    last(before).map_or(0, |last| overlap(last, page))
}

/// Whether a page repeats the previous one under another URL, or both repeat earlier ones, so that the pagination
/// loops. ENDs and TRANSFERs prove nothing, since BigChat repeats them anyway.
pub fn is_repetition(before: &[Vec<Key>], page: &[Key]) -> bool {
    let repeats = last(before).is_some_and(|last| last == page) && counted(page) > 0;
    repeats || is_loop(before, page)
}

/// Whether a page and the one before it repeat two earlier pages in succession. A single equal page may be a different
/// one.
fn is_loop(before: &[Vec<Key>], page: &[Key]) -> bool {
    let Some((previous, earlier)) = before.split_last() else {
        return false;
    };
    counted(previous) + counted(page) > 1
        && earlier
            .windows(2)
            .any(|pair| pair[0] == *previous && pair[1] == page)
}

/// How many events of a page are of a kind that BigChat does not repeat.
fn counted(page: &[Key]) -> usize {
    page.iter().filter(|key| !key.is_repeated()).count()
}

/// The last page that is not empty.
fn last(pages: &[Vec<Key>]) -> Option<&[Key]> {
    pages
        .iter()
        .rfind(|page| !page.is_empty())
        .map(Vec::as_slice)
}

/// Length of the longest suffix of `page` that is a prefix of `next`. Linear (Knuth-Morris-Pratt), since a hostile page
/// may have a million equal events.
fn overlap(page: &[Key], next: &[Key]) -> usize {
    // For each prefix of `next`, the length of its longest proper prefix that is also its suffix.
    let mut borders = vec![0; next.len()];
    let mut matched = 0;
    for at in 1..next.len() {
        matched = extended(next, &borders, matched, &next[at]);
        borders[at] = matched;
    }
    let mut matched = 0;
    for key in &page[page.len().saturating_sub(next.len())..] {
        matched = extended(next, &borders, matched, key);
    }
    matched
}

/// Length of the longest prefix of `next` that ends with `key`, given that the prefix of length `matched` precedes it.
fn extended(next: &[Key], borders: &[usize], mut matched: usize, key: &Key) -> usize {
    while matched > 0 && next[matched] != *key {
        matched = borders[matched - 1];
    }
    matched + usize::from(next.get(matched) == Some(key))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Capitals are ENDs, digits are STARTs, `?` is an event that could not be parsed, and all others are MESSAGEs.
    fn keys(page: &str) -> Vec<Key> {
        page.chars()
            .map(|c| {
                let kind = match c {
                    '?' => None,
                    'A'..='Z' => Some(EventKind::End),
                    '0'..='9' => Some(EventKind::Start),
                    _ => Some(EventKind::Message),
                };
                Key {
                    conversation: 1,
                    fingerprint: i64::from(u32::from(c)),
                    kind,
                }
            })
            .collect()
    }

    fn count(pages: &[&str], of: char) -> u32 {
        let pages: Vec<_> = pages.iter().map(|page| keys(page)).collect();
        Counts::of(&pages).get(&keys(&of.to_string())[0])
    }

    #[test]
    fn equal_messages_on_one_page() {
        assert_eq!(count(&["kkEa"], 'k'), 2);
        assert_eq!(count(&["kkEa"], 'E'), 1);
        assert_eq!(count(&["?a?"], '?'), 2, "each may be a message");
    }

    #[test]
    fn equal_messages_on_later_pages() {
        assert_eq!(count(&["kab", "ckd"], 'k'), 2);
        assert_eq!(count(&["kab", "kcd"], 'k'), 2, "it was not at the end");
        assert_eq!(count(&["abk", "ckd"], 'k'), 2, "nor at the beginning");
        assert_eq!(count(&["ak", "b", "k"], 'k'), 2, "nor on the page before");
    }

    #[test]
    fn overlap_of_shifted_pages_counts_once() {
        assert_eq!(count(&["abk", "kcd"], 'k'), 1);
        assert_eq!(count(&["akEb", "kEbc"], 'k'), 1, "a longer overlap");
        assert_eq!(count(&["kk", "kkk"], 'k'), 3, "two of three");
        assert_eq!(count(&["akk", "kb"], 'k'), 2, "one of two");
        assert_eq!(count(&["a?k", "?kb"], 'k'), 1, "unparsed events count");
        assert_eq!(count(&["ak", "", "kb"], 'k'), 1, "across an empty page");
    }

    #[test]
    fn equal_changes_count_once() {
        assert_eq!(count(&["aE", "bE", "EE"], 'E'), 1);
        assert_eq!(count(&["1a", "b1"], '1'), 1);
    }

    #[test]
    fn repeated_page_under_another_url() {
        let is = |before: &[&str], page: &str| {
            let before: Vec<_> = before.iter().map(|page| keys(page)).collect();
            is_repetition(&before, &keys(page))
        };
        for (before, page) in [
            (vec!["ab"], "ab"),
            (vec!["k"], "k"),
            (vec!["?"], "?"),
            (vec!["ab", ""], "ab"),
            (vec!["ab", "cd", "ab"], "cd"),
            (vec!["k", "a", "k"], "a"),
            (vec!["ab", "E", "ab"], "E"),
        ] {
            assert!(is(&before, page), "{before:?} {page}");
        }
        for (before, page) in [
            (vec![], "ab"),
            (vec!["ab"], "b"),
            (vec!["ab"], "ba"),
            (vec!["E"], "E"),
            (vec![""], ""),
            (vec!["k", "a"], "k"),
            (vec!["ab", "cd"], "ab"),
            (vec!["ab", "cd", "ab"], "ef"),
            (vec!["E", "F", "E"], "F"),
            (vec!["k", "E", "k"], "E"),
        ] {
            assert!(!is(&before, page), "{before:?} {page}");
        }
        assert_eq!(count(&["kab", "cd", "kab"], 'k'), 2, "it is another page");
        assert_eq!(count(&["kab", "cd", "kab", "ce"], 'k'), 2);
        assert_eq!(count(&["kab", "cd", "kab", "cd"], 'k'), 1, "a loop");
    }

    proptest! {
        #[test]
        fn the_overlap_is_the_longest(page in "[ab]{0,12}", next in "[ab]{0,12}") {
            let (page, next) = (keys(&page), keys(&next));
            let longest = (0..=page.len().min(next.len()))
                .rev()
                .find(|many| page[page.len() - many..] == next[..*many]);
            prop_assert_eq!(Some(overlap(&page, &next)), longest);
        }

        /// Late events are inserted into a log while it is read page by page. An event counts at most as often as it is
        /// in the log, and at least as often as on one page.
        #[test]
        fn a_shifting_log_is_counted_once(
            log in proptest::collection::vec(0_u8..4, 1..24),
            size in 2_usize..6,
            shifts in proptest::collection::vec(0_usize..3, 12),
        ) {
            // All events are distinct except `k`, which may repeat.
            let mut log: Vec<char> = log
                .iter()
                .zip('\u{4e00}'..)
                .map(|(twin, other)| if *twin == 0 { 'k' } else { other })
                .collect();
            let mut late = '\u{6e00}'..;
            let mut pages: Vec<Vec<Key>> = Vec::new();
            while pages.len() * size < log.len() {
                let page: String = log.iter().skip(pages.len() * size).take(size).collect();
                pages.push(keys(&page));
                for _ in 0..shifts.get(pages.len()).copied().unwrap_or(0).min(size) {
                    log.insert(0, late.next().expect("a character"));
                }
            }
            let counts = Counts::of(&pages);
            for c in &log {
                let key = keys(&c.to_string())[0];
                let in_log = log.iter().filter(|other| *other == c).count();
                let on_one_page = pages
                    .iter()
                    .map(|page| page.iter().filter(|other| **other == key).count())
                    .max();
                let counted = counts.get(&key) as usize;
                prop_assert!(counted <= in_log, "{c}: {counted} of {in_log}");
                prop_assert!(Some(counted) >= on_one_page, "{c}: {counted}");
            }
        }
    }
}
