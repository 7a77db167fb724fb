//! The journal stores every event in SQLite before it is processed, and then its outcome. It also stores what is known
//! about both APIs.
//!
//! All SQL is here, as named operations of [`Store`]. One thread works on the database, so that no async thread waits
//! for a disk. [`Journal::with`] passes it one operation at a time. An operation that writes is one transaction, and no
//! transaction is open across a request. The journal selects due conversations. All other decisions about delivery and
//! polling are made by their modules and only stored here.

mod activity;
mod api_status;
mod commit;
mod console;
mod dead_letters;
mod directory;
mod error;
mod export;
mod file;
mod forget;
mod inbox;
mod messages;
mod pause;
#[cfg(test)]
mod property;
mod queue;
mod retention;
mod schema;
mod sessions;
mod status;
mod storage;
mod verification;

use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rusqlite::{Connection, Row, RowIndex};
use thiserror::Error;
use tokio::sync::oneshot;

use crate::domain::event::{EventKind, Payload};
use crate::telemetry::liveness;
use crate::telemetry::terminal::shown;
use file::DatabaseFile;

pub use console::{
    Activity, ConversationRow, EventRow, EventState, FailedRow, FoundEvent, Minutes, Page, Search,
    WholeEvent,
};
pub use dead_letters::{
    FailedAttempt, FailedEvent, Operator, PastResolution, Reason, Resolution, Resolved, Selection,
};
pub use directory::{Denial, FirstConversation, KnownAdvisor, KnownAgent, Probe};
pub use error::OpenError;
pub use export::{Exported, Position};
pub use forget::Forgotten;
pub use inbox::{Ingested, NewPage, PollState, StoredPage, UnfinishedWindow, WindowProgress, keys};
pub use queue::{ClaimRequest, Claimed};
pub use retention::Pruned;
pub use sessions::{Intervals, LastEnd, ReplayUntil, Session};
pub use status::{
    DeliveryTimes, DifferingChat, Figures, Gap, Group, Oldest, Verification, WithoutAgent,
};
pub use storage::{Refusal, Storage};
pub use verification::{Difference, VerificationProgress};

/// Why an operation failed.
#[derive(Debug, Error)]
pub enum JournalError {
    /// SQLite or the disk refused the operation. Nothing was changed; the operation may succeed later.
    #[error("cannot use the database: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// A row that this program never writes. The database was edited.
    #[error("invalid row in the database: {0}")]
    InvalidRow(String),
    /// The file was deleted or replaced while it was open. Further writes would be lost.
    #[error("{} was deleted or replaced; put it back, or restart to continue with the new file", shown(.0))]
    Replaced(PathBuf),
    /// The operation has panicked, or the journal's thread has ended.
    #[error("the journal is closed")]
    Closed,
}

impl JournalError {
    /// Whether waiting may help: a full disk, or a database that another process has locked.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Sqlite(error) if error::is_transient_when_open(error))
    }
}

/// What an operation returns.
pub type Result<T> = std::result::Result<T, JournalError>;

/// The kind of an event that could not be parsed.
pub const UNREADABLE: &str = "UNREADABLE";

/// How long to wait after the database has refused an operation.
pub const STORAGE_PAUSE: Duration = Duration::from_secs(1);

/// The size of a trial write in bytes. Space that a failed write left in the write-ahead log can be reused even on a
/// full disk. The trial write is usually larger than that space, so that it fails if the disk is full.
const TRIAL_WRITE: i64 = 64 << 10;

/// An operation on the database, including the return of its result.
pub(crate) type Operation = Box<dyn FnOnce(&mut Store) + Send>;

/// Executes operations one after the other.
pub(crate) trait Executor: std::fmt::Debug + Send + Sync {
    /// Accepts an operation. It may be executed before or after this future completes, or never.
    fn execute(&self, operation: Operation) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

/// The journal, shared by all its users. Dropping it waits for the operation in progress.
#[derive(Debug)]
pub struct Journal {
    executor: Box<dyn Executor>,
}

/// The thread that works on a database.
#[derive(Debug)]
struct Thread {
    operations: Option<mpsc::Sender<Operation>>,
    handle: Option<JoinHandle<()>>,
}

/// The database, for use on the journal's thread.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
    /// `None` for a database in memory. Declared after the connection, so that it is closed last.
    file: Option<DatabaseFile>,
}

impl Store {
    /// Opens the database for the daemon. Creates or upgrades it if needed, and locks out other daemons.
    pub fn open(path: &Path) -> std::result::Result<Self, OpenError> {
        schema::open_for_daemon(path).map(Self::over)
    }

    /// Opens the database for reading, even while a daemon is using it. An older version is upgraded first; that fails
    /// while an older daemon is using it.
    pub fn open_reader(path: &Path) -> std::result::Result<Self, OpenError> {
        schema::open_reader(path).map(Self::over)
    }

    /// Opens the database for a command beside the daemon.
    pub fn open_shared(path: &Path) -> std::result::Result<Self, OpenError> {
        schema::open_shared(path).map(Self::over)
    }

    /// Whether [`Self::open`] could create a database there.
    pub fn can_be_made(path: &Path) -> std::result::Result<(), OpenError> {
        file::can_be_made(path)
    }

    fn over((connection, file): schema::Opened) -> Self {
        Self {
            connection,
            file: Some(file),
        }
    }

    /// Whether the database is locked by a daemon, or by a command that does a daemon's work.
    pub fn is_in_use(&self) -> bool {
        self.file.as_ref().is_some_and(DatabaseFile::is_in_use)
    }

    /// The size of the database with its write-ahead log, in bytes.
    pub fn bytes(&self) -> u64 {
        let file = self.file.as_ref();
        file.map_or(0, |file| file.bytes() + file.log_bytes().unwrap_or(0))
    }

    /// The database's files that other users may read or write.
    pub fn exposed_files(&self) -> Vec<PathBuf> {
        let file = self.file.as_ref();
        file.map(DatabaseFile::exposed).unwrap_or_default()
    }

    /// Fails if the path no longer refers to the open file. The daemon must not receive events then, because BigChat
    /// reports them only once.
    pub fn in_place(&self) -> Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        if file.is_in_place() {
            Ok(())
        } else {
            Err(JournalError::Replaced(file.named().to_owned()))
        }
    }

    /// Checks that the database can be written now. It commits, because an uncommitted row would not reach the disk.
    pub fn try_to_write(&mut self) -> Result<()> {
        self.in_place()?;
        let transaction = self.begin()?;
        transaction.execute(
            "INSERT INTO scratch (zeros) VALUES (zeroblob(?1))",
            [TRIAL_WRITE],
        )?;
        let id = transaction.last_insert_rowid();
        transaction.commit()?;
        self.connection
            .execute("DELETE FROM scratch WHERE id = ?1", [id])?;
        Ok(())
    }

    /// A number that changes whenever another process has written to the database.
    pub fn data_version(&mut self) -> Result<i64> {
        let mut version = self.connection.prepare_cached("PRAGMA data_version")?;
        Ok(version.query_row([], |row| row.get(0))?)
    }

    /// Begins a transaction that writes. It takes the write lock at once: a transaction that begins to write later
    /// fails if another process has written meanwhile.
    fn begin(&mut self) -> rusqlite::Result<rusqlite::Transaction<'_>> {
        self.connection
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)
    }
}

impl Journal {
    /// Starts the journal's thread over a database.
    ///
    /// # Errors
    ///
    /// If the operating system refuses to create a thread.
    pub fn start(store: Store) -> std::io::Result<Self> {
        Ok(Self::over(Thread::start(store)?))
    }

    pub(crate) fn over(executor: impl Executor + 'static) -> Self {
        Self {
            executor: Box::new(executor),
        }
    }

    /// Executes one operation, and waits for its result.
    pub async fn with<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&mut Store) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let operation: Operation = Box::new(move |store| {
            // The caller may be gone. The operation is not undone.
            drop(reply.send(operation(store)));
        });
        self.executor.execute(operation).await;
        let answer = answer.await;
        liveness::record_progress(Instant::now());
        answer.map_err(|_| JournalError::Closed)?
    }
}

impl Thread {
    fn start(mut store: Store) -> std::io::Result<Self> {
        let (operations, queue) = mpsc::channel::<Operation>();
        let thread = std::thread::Builder::new().name("journal".into());
        let handle = thread.spawn(move || {
            for operation in queue {
                // The transaction is rolled back and the caller receives an error. Other operations continue.
                if panic::catch_unwind(AssertUnwindSafe(|| operation(&mut store))).is_err() {
                    tracing::error!("a journal operation panicked; this is a bug");
                }
            }
        })?;
        Ok(Self {
            operations: Some(operations),
            handle: Some(handle),
        })
    }
}

impl Executor for Thread {
    fn execute(&self, operation: Operation) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        // A thread that has ended drops the operation, and the caller receives an error.
        if let Some(operations) = &self.operations {
            operations.send(operation).ok();
        }
        Box::pin(std::future::ready(()))
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.operations = None;
        if let Some(handle) = self.handle.take()
            && handle.join().is_err()
        {
            tracing::error!("the journal thread panicked, which is a bug; restart the daemon");
        }
    }
}

/// Reads a count. SQL has no unsigned type.
fn unsigned(row: &Row<'_>, index: impl RowIndex) -> rusqlite::Result<u64> {
    Ok(u64::try_from(row.get::<_, i64>(index)?).unwrap_or_default())
}

/// The count in the first column of a query.
fn count(row: &Row<'_>) -> rusqlite::Result<u64> {
    unsigned(row, 0)
}

/// A limit on rows, as SQL takes it.
fn limit(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// A value in a column that this program always sets.
fn present<T>(value: Option<T>, what: impl FnOnce() -> String) -> Result<T> {
    value.ok_or_else(|| JournalError::InvalidRow(what()))
}

/// The payload of a stored event. The error does not quote the data, because errors are logged.
fn payload(name: &str, data: Option<&str>) -> Result<Payload> {
    let kind = EventKind::from_name(name);
    let payload = kind.and_then(|kind| Payload::from_data(kind, data).ok());
    present(payload, || format!("the data of a {name} cannot be read"))
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Store {
        /// A database in memory, opened like a daemon's. Only a new one gets the schema.
        pub(crate) fn in_memory(mut connection: Connection, new: bool) -> rusqlite::Result<Self> {
            schema::prepare(&connection)?;
            connection.pragma_update(None, "foreign_keys", true)?;
            if new {
                schema::upgrade(&mut connection, 0)?;
            }
            Ok(Self {
                connection,
                file: None,
            })
        }

        /// The database itself, for checks.
        pub(crate) fn connection(&mut self) -> &mut Connection {
            &mut self.connection
        }
    }
}
