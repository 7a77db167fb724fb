//! Telling events apart that carry no id.
//!
//! An event is known by its conversation, name, time and data ([`Key`]), and by how many like it there are. The
//! [`Tally`] of a poll works out how many: equal events on one page are that many. On a later page an equal END or
//! TRANSFER is the same one told again (BigChat does that in two of five polls). An equal MESSAGE there is either
//! another, or the pages have shifted under us; then, and only then, the earlier page is asked for again, and what
//! comes tells; where that cannot be had any more, pages have shifted if the later one begins as the earlier one ended.
//! The journal afterwards holds at least as many as the tally says: what earlier polls brought counts,
//! so that what is told again is not taken twice.
//!
//! Pure: pages in, numbers out.

use std::collections::{HashMap, HashSet};

use crate::event::{Event, Kind};

/// What makes events equal, as far as a poll needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// BigChat's id of the conversation.
    pub conversation: i64,
    /// See [`Event::digest`].
    pub digest: i64,
    /// Which kind of event it is.
    pub kind: Kind,
}

impl From<&Event> for Key {
    fn from(event: &Event) -> Self {
        Self {
            conversation: event.conversation,
            digest: event.digest(),
            kind: event.kind,
        }
    }
}

/// What the pages of one poll have told so far.
#[derive(Debug, Default)]
pub struct Tally {
    pages: Vec<HashMap<Key, u32>>,
    told: HashMap<Key, Told>,
    /// Equal messages on two pages that what the journal knows explains, so far.
    explained: HashMap<Key, Vec<Unclear>>,
    unclear: Vec<Unclear>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Told {
    count: u32,
    page: usize,
}

/// Equal messages on two pages, of which it is not clear yet whether they are the same.
#[derive(Debug, Clone, Copy)]
struct Unclear {
    key: Key,
    earlier: usize,
    later: usize,
}

/// What a page that was asked for again turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Again {
    /// What it was: the pages stand still.
    Same,
    /// Partly what it was: the pages have shifted.
    Shifted,
    /// Nothing of what it was: this BigChat tells everything once.
    Different,
}

impl Tally {
    /// Takes in the next page; its number is how many were taken in before. `known` tells how many events of a key
    /// the journal holds from earlier polls: what those explain is not unclear.
    pub fn page(&mut self, events: &[Key], known: impl Fn(&Key) -> u32) {
        let number = self.pages.len();
        let counts = count(events);
        for (key, count) in &counts {
            let told = self.told.entry(*key).or_default();
            if !key.kind.is_message() || told.count == 0 {
                told.count = told.count.max(*count);
            } else {
                let pairs = self.explained.entry(*key).or_default();
                pairs.push(Unclear {
                    key: *key,
                    earlier: told.page,
                    later: number,
                });
                if told.count + count > known(key) {
                    self.unclear.append(pairs);
                }
                // Unless the earlier page shows otherwise, it is another.
                told.count += count;
            }
            told.page = number;
        }
        self.pages.push(counts);
    }

    /// The page to ask for again, by its number, if anything is unclear.
    pub fn unclear(&self) -> Option<usize> {
        self.unclear.first().map(|unclear| unclear.earlier)
    }

    /// Page `number` cannot be had again: what is unclear by it counts as another, but for what the next page
    /// `repeated` of it.
    pub fn give_up(&mut self, number: usize, repeated: &[Key]) {
        self.unclear.retain(|unclear| unclear.earlier != number);
        for key in repeated.iter().filter(|key| key.kind.is_message()) {
            if let Some(told) = self.told.get_mut(key) {
                told.count = told.count.saturating_sub(1);
            }
        }
    }

    /// Takes in page `number` as it came when it was asked for again.
    pub fn again(&mut self, number: usize, events: &[Key]) {
        let counts = count(events);
        let (about, rest) = std::mem::take(&mut self.unclear)
            .into_iter()
            .partition(|unclear| unclear.earlier == number);
        self.unclear = rest;
        let Some(before) = self.pages.get(number) else {
            return;
        };
        let verdict = compare(before, &counts, &about);
        match verdict {
            Again::Same => {}
            Again::Different => {
                for (key, count) in &counts {
                    let told = &mut self.told.entry(*key).or_default().count;
                    *told = if key.kind.is_message() {
                        *told + count
                    } else {
                        (*told).max(*count)
                    };
                }
            }
            Again::Shifted => {
                // What the next page told was counted on top of this one as it was; it belongs on top of this one
                // as it is now. Never fewer than were seen at any one time. A page further on is out of reach of a
                // shift that left part of this one in place: what came there is another.
                let next = Some(number + 1)
                    .filter(|next| about.iter().any(|unclear| unclear.later == *next));
                let keys: HashSet<Key> = counts.keys().chain(before.keys()).copied().collect();
                for key in keys {
                    let was = before.get(&key).copied().unwrap_or(0);
                    let is = counts.get(&key).copied().unwrap_or(0);
                    let told = &mut self.told.entry(key).or_default().count;
                    let moved = next
                        .and_then(|next| self.pages[next].get(&key))
                        .copied()
                        .unwrap_or(0);
                    *told = match key.kind.is_message() {
                        true if moved > 0 => {
                            (told.saturating_sub(was) + is).max(told.saturating_sub(moved))
                        }
                        // What is new on it came late, or has moved on from the page before.
                        _ => (*told).max(is),
                    };
                }
            }
        }
    }

    /// How many events of that key this poll has told.
    pub fn told(&self, key: &Key) -> u32 {
        self.told.get(key).map_or(0, |told| told.count)
    }
}

/// What the end of a page and the beginning of the next have in common: so many events a shift has moved over.
pub fn repeated<'a>(page: &[Key], next: &'a [Key]) -> &'a [Key] {
    let longest = page.len().min(next.len());
    let moved = (1..=longest)
        .rev()
        .find(|moved| page[page.len() - moved..] == next[..*moved]);
    &next[..moved.unwrap_or(0)]
}

fn count(events: &[Key]) -> HashMap<Key, u32> {
    let mut counts = HashMap::new();
    for key in events {
        *counts.entry(*key).or_default() += 1;
    }
    counts
}

/// Only STARTs and MESSAGEs tell pages apart, since BigChat repeats ENDs and TRANSFERs; unless there is no other
/// than the message in question.
fn compare(before: &HashMap<Key, u32>, now: &HashMap<Key, u32>, about: &[Unclear]) -> Again {
    let telling = |key: &Key| matches!(key.kind, Kind::Start | Kind::Message);
    let in_question = |key: &Key| about.iter().any(|unclear| unclear.key == *key);
    let others = before.keys().any(|key| telling(key) && !in_question(key));
    let counts = |key: &&Key| telling(key) || !others;
    let (before_all, now_all) = (before, now);
    let before: HashSet<&Key> = before.keys().filter(counts).collect();
    let now: HashSet<&Key> = now.keys().filter(counts).collect();
    if before == now && before.iter().all(|key| before_all[key] == now_all[key]) {
        Again::Same
    } else if before.is_disjoint(&now) {
        Again::Different
    } else {
        Again::Shifted
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Capitals are ENDs, digits STARTs, all else MESSAGEs.
    fn keys(page: &str) -> Vec<Key> {
        page.chars()
            .map(|c| {
                let kind = match c {
                    'A'..='Z' => Kind::End,
                    '0'..='9' => Kind::Start,
                    _ => Kind::Message,
                };
                Key {
                    conversation: 1,
                    digest: i64::from(u32::from(c)),
                    kind,
                }
            })
            .collect()
    }

    fn told(tally: &Tally, which: &str) -> Vec<u32> {
        keys(which).iter().map(|key| tally.told(key)).collect()
    }

    fn poll(pages: &[&str]) -> Tally {
        let mut tally = Tally::default();
        for page in pages {
            tally.page(&keys(page), |_| 0);
        }
        tally
    }

    #[test]
    fn equal_events_on_one_page_are_that_many() {
        assert_eq!(told(&poll(&["kkEa"]), "kEa"), [2, 1, 1]);
    }

    #[test]
    fn an_end_on_a_later_page_is_the_same_and_needs_no_question() {
        let tally = poll(&["aE", "bE"]);
        assert_eq!(told(&tally, "E"), [1]);
        assert_eq!(tally.unclear(), None);
    }

    #[test]
    fn an_equal_message_on_a_later_page_is_asked_about() {
        assert_eq!(poll(&["ak", "bc", "k"]).unclear(), Some(0));
        assert_eq!(poll(&["ak", "kb"]).unclear(), Some(0));
    }

    #[test]
    fn where_the_earlier_page_is_gone_the_edges_tell_whether_pages_have_shifted() {
        let given_up = |first: &str, second: &str| {
            let mut tally = poll(&[first, second]);
            let (page, next) = (keys(first), keys(second));
            tally.give_up(0, repeated(&page, &next));
            assert_eq!(tally.unclear(), None);
            told(&tally, "k")
        };
        assert_eq!(given_up("abk", "kcd"), [1], "it has moved on");
        assert_eq!(given_up("akEb", "kEbc"), [1], "and so have others");
        assert_eq!(given_up("kk", "kkk"), [3], "two of three");
        assert_eq!(given_up("kab", "kcd"), [2], "it was not at the end");
        assert_eq!(given_up("abk", "ckd"), [2], "nor at the beginning");
    }

    #[test]
    fn what_earlier_polls_explain_is_not_asked_about() {
        let mut tally = Tally::default();
        tally.page(&keys("ak"), |_| 2);
        tally.page(&keys("kb"), |_| 2);
        assert_eq!(tally.unclear(), None);
        assert_eq!(told(&tally, "k"), [2]);
    }

    #[test]
    fn what_was_explained_is_asked_about_once_there_is_one_too_many() {
        // Two twins are known. The pages shift by one after the first of them was told.
        let mut tally = Tally::default();
        for page in ["ak", "kb", "ck"] {
            tally.page(&keys(page), |_| 2);
        }
        assert_eq!(tally.unclear(), Some(0));
        tally.again(0, &keys("la"));
        assert_eq!(tally.unclear(), Some(1));
        tally.again(1, &keys("kb"));
        assert_eq!((told(&tally, "k"), tally.unclear()), (vec![2], None));
    }

    #[test]
    fn the_earlier_page_tells_what_it_was() {
        for (pages, again, expected, why) in [
            (["ak", "kb"], "ak", 2, "it stands still: another"),
            (["ak", "kb"], "la", 1, "it shifted: the same"),
            (["akk", "kb"], "lak", 2, "it shifted by one of two"),
            (
                ["kb", "bk"],
                "kl",
                2,
                "it shifted, but this one stayed: another",
            ),
            (["ak", "kb"], "xy", 2, "everything is told once: another"),
            (
                ["ak", "kb"],
                "xk",
                2,
                "partly the same, and it stands on both: two",
            ),
            (
                ["akE", "kb"],
                "xyE",
                2,
                "a repeated END does not make it the same page",
            ),
            (
                ["Ek", "kb"],
                "lE",
                1,
                "nothing but an END to go by: it shifted",
            ),
        ] {
            let mut tally = poll(&pages);
            tally.again(0, &keys(again));
            assert_eq!(tally.unclear(), None, "{why}");
            assert_eq!(told(&tally, "k"), [expected], "{why}");
        }
    }

    #[test]
    fn what_has_moved_onto_the_page_asked_for_again_is_not_another() {
        let mut tally = poll(&["ab", "cd", "de"]);
        tally.again(1, &keys("bc"));
        assert_eq!(told(&tally, "abcde"), [1, 1, 1, 1, 1]);
    }

    #[test]
    fn what_comes_when_a_page_is_asked_for_again_is_kept_too() {
        let mut tally = poll(&["ak", "kb"]);
        tally.again(0, &keys("la"));
        assert_eq!(told(&tally, "lakb"), [1, 1, 1, 1]);
    }

    #[test]
    fn a_page_that_shifted_in_part_gave_to_the_next_one_only() {
        let mut tally = poll(&["kkk", "abc", "def", "fk"]);
        tally.again(2, &keys("cde"));
        tally.again(0, &keys("lkk"));
        assert_eq!(tally.unclear(), None);
        assert_eq!(
            told(&tally, "kf"),
            [4, 1],
            "the one that left is among the pages read before"
        );
    }

    proptest! {
        /// A log in pages, into which late events are put while it is read: everything in it is told exactly as
        /// often as it stands there, except what was put in where it was read already.
        #[test]
        fn a_log_that_shifts_is_told_once(
            log in proptest::collection::vec(0_u8..4, 4..24),
            size in 2_usize..5,
            shift_before in 1_usize..4,
            late in 0_usize..2,
        ) {
            // Distinct events but for one that stands there often, as twins do.
            let mut log: Vec<char> = log.iter().enumerate()
                .map(|(i, twin)| if *twin == 0 { 'k' } else { char::from_u32(0x4e00 + i as u32).expect("a character") })
                .collect();
            let page = |log: &[char], n: usize| keys(&log.iter().skip(n * size).take(size).collect::<String>());
            let mut tally = Tally::default();
            let mut n = 0;
            while n * size < log.len() {
                if n == shift_before && late == 1 {
                    log.insert(0, 'l');
                }
                tally.page(&page(&log, n), |_| 0);
                while let Some(unclear) = tally.unclear() {
                    tally.again(unclear, &page(&log, unclear));
                }
                n += 1;
            }
            for (c, key) in log.iter().map(|c| (c, keys(&c.to_string())[0])) {
                prop_assert!(*c == 'k' || tally.told(&key) <= 1, "{} stands there once", c);
            }
            let expected = u32::try_from(log.iter().filter(|c| **c == 'k').count()).expect("few");
            let told = tally.told(&keys("k")[0]);
            if late == 0 {
                prop_assert_eq!(told, expected);
            } else {
                prop_assert!(told >= expected, "never fewer than there are: {} of {}", told, expected);
            }
        }
    }
}
