//! The pages of the poll under way, in memory as in the journal: what they told, counted, and by which of them equal
//! messages are told apart.

use std::collections::{HashMap, HashSet};

use super::{MAX_BYTES, MAX_PAGES};
use crate::bigchat::{Page, page_events};
use crate::context::Context;
use crate::dedupe::{self, Key, Tally};
use crate::event::Event;
use crate::journal::{JournalError, KeptPage, Store};

/// The pages of the poll under way.
#[derive(Debug, Default)]
pub(super) struct Pages {
    /// As they came.
    pub(super) kept: Vec<KeptPage>,
    /// What they told, counted.
    pub(super) tally: Tally,
    /// Where in `kept` the pages stand, by their number in the tally; those asked for again are not among them.
    first_told: Vec<usize>,
}

impl Pages {
    /// Those that are kept in the journal.
    pub(super) async fn load(context: &Context) -> Result<Self, JournalError> {
        let mut pages = Self::default();
        for page in context.journal.with(|store| store.kept_pages()).await? {
            pages.add(context, page).await?;
        }
        Ok(pages)
    }

    /// Lets go of them: what comes next is not told apart by them.
    pub(super) async fn forget(&mut self, context: &Context) -> Result<(), JournalError> {
        if !self.kept.is_empty() {
            context.journal.with(|store| store.forget_pages()).await?;
            *self = Self::default();
        }
        Ok(())
    }

    /// Lets go of all but the last: what comes next is told apart by that one only.
    pub(super) async fn forget_but_the_last(
        &mut self,
        context: &Context,
    ) -> Result<(), JournalError> {
        let forget = |store: &mut Store| store.forget_pages_but_the_last();
        context.journal.with(forget).await?;
        *self = Self::load(context).await?;
        Ok(())
    }

    /// Whether there are any that are not admitted yet.
    pub(super) fn are_new(&self) -> bool {
        self.kept.iter().any(|page| !page.admitted)
    }

    /// Whether they are as many as one poll asks for, and too many to be held in memory for longer.
    pub(super) fn are_many(&self) -> bool {
        self.kept.len() >= MAX_PAGES || self.bytes() > MAX_BYTES
    }

    /// How much memory they take.
    pub(super) fn bytes(&self) -> usize {
        self.kept.iter().map(|page| page.body.len()).sum()
    }

    /// The page of that number in the tally.
    pub(super) fn page(&self, number: usize) -> Option<&KeptPage> {
        self.first_told
            .get(number)
            .and_then(|index| self.kept.get(*index))
    }

    /// What that page tells.
    fn keys(&self, number: usize) -> Vec<Key> {
        self.page(number).map_or_else(Vec::new, |page| {
            page.events().iter().map(Key::from).collect()
        })
    }

    /// Whether a page has an event in common with the one of that number.
    pub(super) fn has_some_of(&self, number: usize, page: &Page) -> bool {
        let keys: HashSet<Key> = self.keys(number).into_iter().collect();
        let mut some = false;
        page_events(&page.body, |raw| {
            some |= Event::parse(raw).is_ok_and(|event| keys.contains(&Key::from(&event)));
        });
        some
    }

    /// The page of that number cannot be had again.
    pub(super) fn give_up(&mut self, number: usize) {
        let (page, next) = (self.keys(number), self.keys(number + 1));
        self.tally.give_up(number, dedupe::repeated(&page, &next));
    }

    /// Takes in a page that was kept.
    pub(super) async fn add(
        &mut self,
        context: &Context,
        page: KeptPage,
    ) -> Result<(), JournalError> {
        let events = page.events();
        let keys: Vec<Key> = events.iter().map(Key::from).collect();
        let again = page.again_of.and_then(|id| {
            self.first_told
                .iter()
                .position(|told| self.kept[*told].id == id)
        });
        match again {
            Some(number) => self.tally.again(number, &keys),
            None => {
                let known = self.known(context, &events).await?;
                self.tally
                    .page(&keys, |key| known.get(key).copied().unwrap_or(0));
                self.first_told.push(self.kept.len());
            }
        }
        self.kept.push(page);
        Ok(())
    }

    /// How many the journal holds of those messages that this poll has told before.
    async fn known(
        &self,
        context: &Context,
        events: &[Event],
    ) -> Result<HashMap<Key, u32>, JournalError> {
        let mut known = HashMap::new();
        for event in events {
            let key = Key::from(event);
            if event.kind.is_message() && self.tally.told(&key) > 0 && !known.contains_key(&key) {
                let event = event.clone();
                known.insert(
                    key,
                    context
                        .journal
                        .with(move |store| store.count_known(&event))
                        .await?,
                );
            }
        }
        Ok(known)
    }
}
