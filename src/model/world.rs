//! The state that outlasts the daemon: the journal, OurAPI and BigChat. In equal worlds, the daemon behaves the same
//! from there on.

use std::collections::BTreeSet;
use std::fmt::{self, Write};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use rusqlite::Connection;
use rusqlite::types::ValueRef;
use uuid::Uuid;

use super::script::{Script, Scripted};
use crate::domain::time::Millis;
use crate::journal::Store;
use crate::simulator::OurApi;

/// All that outlasts the daemon.
#[derive(Clone)]
pub(super) struct World {
    /// The journal, serialized by SQLite.
    pub(super) journal: Arc<[u8]>,
    pub(super) our_api: OurApi,
    pub(super) bigchat: Scripted,
    /// How many times OurAPI has lost everything.
    pub(super) wipes: usize,
    /// This machine's clock.
    pub(super) now: Millis,
    canonical: Arc<str>,
}

impl PartialEq for World {
    fn eq(&self, other: &Self) -> bool {
        self.canonical == other.canonical
    }
}

impl Eq for World {}

impl Hash for World {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.canonical.hash(hasher);
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.canonical)
    }
}

impl World {
    /// The initial world.
    pub(super) fn new(script: Arc<Script>) -> Self {
        let connection = Connection::open_in_memory().expect("a database in memory");
        // The pages are small, because each state has its own database.
        connection
            .pragma_update(None, "page_size", 512)
            .expect("a page size");
        let mut store = Store::in_memory(connection, true).expect("a journal");
        Self::of(
            &mut store,
            OurApi::new(1).in_order(),
            Scripted::new(script),
            0,
            Millis(1_800_000_000_000),
        )
    }

    /// The current world, as a daemon that starts now finds it.
    pub(super) fn of(
        store: &mut Store,
        our_api: OurApi,
        mut bigchat: Scripted,
        wipes: usize,
        now: Millis,
    ) -> Self {
        bigchat.client_died();
        let image = store.connection().serialize("main").expect("an image");
        let journal: Arc<[u8]> = Arc::from(&image[..]);
        drop(image);
        let mut canonical = Canonical::default();
        canonical.journal(store.connection()).expect("its rows");
        canonical.our_api(&our_api);
        let canonical = format!("{}{}{wipes} wipes", canonical.text(), bigchat.canonical());
        Self {
            journal,
            our_api,
            bigchat,
            wipes,
            now,
            canonical: canonical.into(),
        }
    }

    /// The same world, with another one's journal.
    pub(super) fn with_journal_of(&self, other: &Self) -> Self {
        let mut store = other.store();
        Self::of(
            &mut store,
            self.our_api.clone(),
            self.bigchat.clone(),
            self.wipes,
            self.now,
        )
    }

    /// The journal, opened.
    pub(super) fn store(&self) -> Store {
        let mut connection = Connection::open_in_memory().expect("a database in memory");
        connection
            .deserialize_read_exact("main", &self.journal[..], self.journal.len(), false)
            .expect("the image");
        Store::in_memory(connection, false).expect("a journal")
    }
}

/// Rows as text, without differences that do not matter to a starting daemon.
///
/// For OurAPI's ids, and for times by this machine's clock, only the order matters: all these times are in the past
/// when the daemon starts. Data that was read in earlier sessions counts as old. For two counters, it only matters
/// whether one is behind the other.
#[derive(Default)]
struct Canonical {
    cells: Vec<Cell>,
    times: BTreeSet<i64>,
    ids: BTreeSet<Uuid>,
}

/// The counters with which others are compared.
struct Numbers {
    losses: i64,
    verifications: Vec<i64>,
}

enum Cell {
    Text(String),
    Time(i64),
    Id(Uuid),
}

/// Numbers above this one are times by this machine's clock, in milliseconds.
const MILLISECONDS: i64 = 1_000_000_000_000;

impl Canonical {
    fn journal(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        let losses: i64 =
            connection.query_row("SELECT losses FROM control", [], |row| row.get(0))?;
        let mut verifications = connection.prepare("SELECT id FROM verifications")?;
        let verifications: Vec<i64> = verifications
            .query_map([], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        let numbers = Numbers {
            losses,
            verifications,
        };
        let mut tables = connection.prepare(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%' ORDER BY name",
        )?;
        let tables: Vec<String> = tables
            .query_map([], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        for table in tables {
            self.push(format!("{table}:\n"));
            let mut statement = connection.prepare(&format!("SELECT * FROM {table}"))?;
            let columns: Vec<String> = statement.column_names().map(str::to_owned).collect();
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                for (index, column) in columns.iter().enumerate() {
                    self.column(&table, column, row.get_ref(index)?, &numbers);
                }
                self.push("\n".to_owned());
            }
        }
        Ok(())
    }

    fn column(&mut self, table: &str, column: &str, value: ValueRef<'_>, numbers: &Numbers) {
        let number = value.as_i64().unwrap_or_default();
        match (table, column, value) {
            (_, _, ValueRef::Null) => self.push("- ".to_owned()),
            ("attempts" | "failures", "reason" | "request" | "response", _)
            | ("events", "fingerprint", _)
            | ("conversations", "read_in_session" | "stale_seq", _)
            | ("requested_chats", "messages" | "fields", _)
            | ("deliveries" | "credits" | "activity" | "losses", _, _)
            | ("control", "session" | "writes_succeeded" | "losses", _) => {}
            ("attempts", "writes_then", _) => self.push("some ".to_owned()),
            ("attempts", "attempts", _) | ("failures", "attempt", _) => {
                self.push(format!("{} ", number.min(1)));
            }
            ("conversations", "verified_losses", _) => {
                self.push(format!("{} ", number < numbers.losses));
            }
            ("verifications", "id", _)
            | ("requested_chats", "verification", _)
            | ("conversations", "verified_in", _) => {
                let later = numbers.verifications.iter().filter(|id| **id > number);
                self.push(format!("{} ", later.count()));
            }
            ("verifications", "verified" | "missing" | "differing" | "messages", _) => {}
            (_, "chat_id" | "chat_agent" | "agent_id", ValueRef::Text(id)) => {
                self.id(Uuid::try_parse_ascii(id).expect("an id"));
            }
            (_, _, ValueRef::Integer(_)) if number > MILLISECONDS => {
                self.times.insert(number);
                self.cells.push(Cell::Time(number));
            }
            (_, _, ValueRef::Text(text)) => {
                self.push(format!("{} ", String::from_utf8_lossy(text)))
            }
            _ => self.push(format!("{number} ")),
        }
    }

    fn our_api(&mut self, our_api: &OurApi) {
        let data = our_api.data();
        self.push("OurAPI:\n".to_owned());
        for agent in &data.agents {
            self.push(format!("{} {} ", agent.name, agent.email));
            self.id(agent.agent_id);
        }
        for chat in &data.chats {
            self.push(format!(
                "\n{} {} {:?} ",
                chat.external_id, chat.started_at, chat.ended_at
            ));
            self.id(chat.chat_id);
            if let Some(agent) = chat.agent_id {
                self.id(agent);
            }
            let mut messages: Vec<_> = data
                .messages
                .get(&chat.chat_id)
                .into_iter()
                .flatten()
                .collect();
            messages.sort_by_key(|message| (message.sent_at, message.text.as_str()));
            for message in messages {
                self.push(format!(
                    "{} {:?} {:?} ",
                    message.sent_at, message.text, message.agent_id
                ));
            }
        }
        self.push("\n".to_owned());
    }

    fn push(&mut self, text: String) {
        self.cells.push(Cell::Text(text));
    }

    fn id(&mut self, id: Uuid) {
        self.ids.insert(id);
        self.cells.push(Cell::Id(id));
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for cell in &self.cells {
            let written = match cell {
                Cell::Text(part) => text.write_str(part),
                Cell::Time(time) => write!(text, "t{} ", self.times.range(..time).count()),
                Cell::Id(id) => write!(text, "#{} ", self.ids.range(..id).count()),
            };
            written.expect("writing to a string cannot fail");
        }
        text
    }
}
