//! The pages of the unfinished window, in memory and in the journal. Equal messages are counted across all pages.

use std::collections::HashSet;

use super::{MAX_BYTES, MAX_PAGES};
use crate::bigchat::canonical_query;
use crate::domain::dedupe::{Counts, Key, is_repetition};
use crate::journal::{Journal, JournalError, Store, StoredPage};

/// A window counts as complete after this many successive pages that are empty or repeat earlier ones, since a service
/// may return such pages without end. Single ones prove nothing: empty pages are common, and in a flood of equal
/// messages, a page may equal the previous one.
const MAX_IDLE_PAGES: usize = 10;

#[derive(Debug, Default)]
pub(super) struct Pages {
    /// The pages that are not ingested yet.
    pub(super) new: Vec<StoredPage>,
    /// The keys of the events of each page.
    keys: Vec<Vec<Key>>,
    /// The queries of the pages, [canonical](canonical_query).
    queries: HashSet<String>,
    /// The size of all pages.
    bytes: usize,
}

impl Pages {
    pub(super) async fn load(journal: &Journal) -> Result<Self, JournalError> {
        let mut pages = Self::default();
        for page in journal.with(|store| store.stored_pages()).await? {
            let keys = page.keys();
            pages.add(page, keys);
        }
        Ok(pages)
    }

    /// Drops the pages and their window, so that equal messages are counted anew.
    pub(super) async fn clear(&mut self, journal: &Journal) -> Result<(), JournalError> {
        if !self.keys.is_empty() {
            journal.with(|store| store.forget_window()).await?;
            *self = Self::default();
        }
        Ok(())
    }

    /// Drops all pages but the last, because the next page may overlap it.
    pub(super) async fn retain_last(&mut self, journal: &Journal) -> Result<(), JournalError> {
        let forget = |store: &mut Store| store.forget_pages_but_the_last();
        journal.with(forget).await?;
        *self = Self::load(journal).await?;
        Ok(())
    }

    /// Whether a page is not ingested yet.
    pub(super) fn has_new(&self) -> bool {
        !self.new.is_empty()
    }

    /// Whether the pages have reached the budget of one poll, which bounds the memory used.
    pub(super) fn exceed_budget(&self) -> bool {
        self.keys.len() >= MAX_PAGES || self.bytes > MAX_BYTES
    }

    pub(super) fn counts(&self) -> Counts {
        Counts::of(&self.keys)
    }

    pub(super) fn add(&mut self, page: StoredPage, keys: Vec<Key>) {
        self.keys.push(keys);
        self.queries.insert(canonical_query(&page.query));
        self.bytes += page.body.len();
        if !page.ingested {
            self.new.push(page);
        }
    }

    /// Why a page with these keys is the last one, even if it names a next page.
    pub(super) fn end_of(&self, last: &[Key]) -> Option<&'static str> {
        let is_idle =
            |before: &[Vec<Key>], page: &[Key]| page.is_empty() || is_repetition(before, page);
        let pages = (0..self.keys.len()).rev();
        let idle = pages.take_while(|&page| is_idle(&self.keys[..page], &self.keys[page]));
        let is_last = is_idle(&self.keys, last) && idle.count() + 1 >= MAX_IDLE_PAGES;
        is_last.then_some("too many successive pages are empty or repeat earlier ones")
    }

    /// Whether this page of the window was requested before.
    pub(super) fn has(&self, query: &str) -> bool {
        self.queries.contains(&canonical_query(query))
    }
}
