//! The pages of the poll in progress, in memory as in the journal: equal messages are counted over all of them.

use std::collections::HashSet;

use super::{MAX_BYTES, MAX_PAGES};
use crate::bigchat::canonical_query;
use crate::domain::dedupe::{Counts, Key, is_repetition};
use crate::journal::{Journal, JournalError, Store, StoredPage};

/// How many successive pages without events complete a poll: a service may name a further, empty page without end. An
/// empty page among others is nothing unusual.
const MAX_EMPTY_PAGES: usize = 10;

/// The pages of the poll in progress.
#[derive(Debug, Default)]
pub(super) struct Pages {
    /// As they came.
    pub(super) kept: Vec<StoredPage>,
    /// The keys of their events.
    keys: Vec<Vec<Key>>,
    /// By which queries they were requested, in [one spelling](canonical_query).
    queries: HashSet<String>,
}

impl Pages {
    /// The stored ones.
    pub(super) async fn load(journal: &Journal) -> Result<Self, JournalError> {
        let mut pages = Self::default();
        for page in journal.with(|store| store.stored_pages()).await? {
            let keys = page.keys();
            pages.add(page, keys);
        }
        Ok(pages)
    }

    /// Drops them: what follows is counted anew.
    pub(super) async fn forget(&mut self, journal: &Journal) -> Result<(), JournalError> {
        if !self.kept.is_empty() {
            journal.with(|store| store.forget_pages()).await?;
            *self = Self::default();
        }
        Ok(())
    }

    /// Drops all but the last, which the next one may overlap.
    pub(super) async fn forget_but_the_last(
        &mut self,
        journal: &Journal,
    ) -> Result<(), JournalError> {
        let forget = |store: &mut Store| store.forget_pages_but_the_last();
        journal.with(forget).await?;
        *self = Self::load(journal).await?;
        Ok(())
    }

    /// Whether there are any that are not admitted yet.
    pub(super) fn are_new(&self) -> bool {
        self.kept.iter().any(|page| !page.ingested)
    }

    /// Whether they are as many as one poll requests, and too many to be held in memory for longer.
    pub(super) fn are_many(&self) -> bool {
        let bytes: usize = self.kept.iter().map(|page| page.body.len()).sum();
        self.kept.len() >= MAX_PAGES || bytes > MAX_BYTES
    }

    /// How often each event was received.
    pub(super) fn counts(&self) -> Counts {
        Counts::of(&self.keys)
    }

    /// Adds a stored page with the keys of its events.
    pub(super) fn add(&mut self, page: StoredPage, keys: Vec<Key>) {
        self.keys.push(keys);
        self.queries.insert(canonical_query(&page.query));
        self.kept.push(page);
    }

    /// Why no page follows these and a last one, whatever that says of the next.
    pub(super) fn end_of(&self, last: &[Key]) -> Option<&'static str> {
        let empty = self.keys.iter().rev().take_while(|keys| keys.is_empty());
        if is_repetition(&self.keys, last) {
            Some("a page repeats an earlier one of the same poll")
        } else if last.is_empty() && empty.count() + 1 >= MAX_EMPTY_PAGES {
            Some("page after page has no events")
        } else {
            None
        }
    }

    /// Whether the poll has requested a page by this query before.
    pub(super) fn has(&self, query: &str) -> bool {
        self.queries.contains(&canonical_query(query))
    }
}
