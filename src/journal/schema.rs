//! Opening the database: one process at a time, the schema brought up to date, and nothing touched that is not ours.

use std::fs::{File, TryLockError};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, TransactionBehavior};
use thiserror::Error;

/// Marks a database as ours (`PRAGMA application_id`): "BCSY".
const APPLICATION_ID: i32 = 0x4243_5359;

/// Each brings the schema from one version (`PRAGMA user_version`) to the next.
const MIGRATIONS: &[&str] = &[
    include_str!("../../migrations/0001_journal.sql"),
    include_str!("../../migrations/0002_rebuild.sql"),
    include_str!("../../migrations/0003_operation.sql"),
    include_str!("../../migrations/0004_checks.sql"),
];

/// For how long somebody may have the lock who only looks whether it is taken.
const LOOKED_AT: Duration = Duration::from_millis(200);

/// How long a statement waits for another process (a command, a backup) to be done. The daemon tries again anyway,
/// and must be able to stop.
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);

/// How large the write-ahead log may stay. It grows for as long as somebody reads an old state of the database (a
/// backup, a forgotten shell), and would keep that size for ever.
const WAL_SIZE: i64 = 8 << 20;

/// Why a database was not opened. Except for a failing disk, nothing in it was changed.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Another daemon works on it.
    #[error("another bigchat-sync works on {0}; stop it first, or set another database with --db")]
    InUse(PathBuf),
    /// Some other program's database, or no database at all.
    #[error("{0} is not a bigchat-sync database, and is left as it is; set another one with --db")]
    Foreign(PathBuf),
    /// Written by a later version of this program.
    #[error(
        "{path} was written by a newer bigchat-sync (schema {found}, this one knows {known}), and is left as it is; run the newer one"
    )]
    Newer {
        /// The database.
        path: PathBuf,
        /// Its schema's version.
        found: i64,
        /// The latest version this program knows.
        known: usize,
    },
    /// Written by an earlier version of this program, which still works on it.
    #[error(
        "an older bigchat-sync works on {0}, whose tables must not change meanwhile; restart the daemon with this version, or use the older one"
    )]
    Older(PathBuf),
    /// There is none, for a command that does not make one.
    #[error("there is no database {0}; name the daemon's with --db")]
    Missing(PathBuf),
    /// Cut off, or written over.
    #[error(
        "{path} is damaged ({why}), and is left as it is; restore a copy, or set another database with --db"
    )]
    Damaged {
        /// The database.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The file system refuses.
    #[error("{path} cannot be opened: {source}")]
    Io {
        /// The file in question.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// SQLite refuses.
    #[error("{path} cannot be opened: {source}")]
    Sqlite {
        /// The database.
        path: PathBuf,
        /// Why.
        source: rusqlite::Error,
    },
}

impl OpenError {
    /// Whether it may pass by itself: a full disk, somebody who holds the database for a while.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Sqlite { source, .. } => may_pass(source),
            Self::Io { source, .. } => source.kind() == std::io::ErrorKind::StorageFull,
            _ => false,
        }
    }
}

/// Whether what SQLite refuses now it may do later.
pub(super) fn may_pass(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseBusy, DatabaseLocked, DiskFull, SystemIoFailure};
    matches!(
        error.sqlite_error_code(),
        Some(DatabaseBusy | DatabaseLocked | DiskFull | SystemIoFailure)
    )
}

/// Which file a database is, whatever name it goes by.
#[derive(Debug, Clone)]
struct Identity {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }
}

impl Identity {
    fn of(path: &Path) -> Result<Self, OpenError> {
        let metadata = std::fs::metadata(path).map_err(|source| OpenError::Io {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }
}

/// Holds off other daemons for as long as it lives. The operating system lets go of it when the process ends,
/// however it ends.
#[derive(Debug)]
pub(super) struct InstanceLock {
    file: File,
}

impl Drop for InstanceLock {
    fn drop(&mut self) {
        // Closing lets go as well, but not while a process that was just forked off still has a copy.
        self.file.unlock().ok();
    }
}

impl InstanceLock {
    pub(super) fn take(db: &Path) -> Result<Self, OpenError> {
        let path = Self::path(db);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path);
        let file = file.map_err(|source| OpenError::Io {
            path: path.clone(),
            source,
        })?;
        let deadline = Instant::now() + LOOKED_AT;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self { file }),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(LOOKED_AT / 20);
                }
                Err(TryLockError::WouldBlock) => return Err(OpenError::InUse(db.to_owned())),
                Err(TryLockError::Error(source)) => return Err(OpenError::Io { path, source }),
            }
        }
    }

    /// Whether somebody has it. To find out takes it for a moment.
    pub(super) fn is_taken(db: &Path) -> bool {
        let Ok(file) = File::open(Self::path(db)) else {
            return false;
        };
        let taken = matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock));
        drop(Self { file });
        taken
    }

    fn path(db: &Path) -> PathBuf {
        // By whatever name it goes.
        let db = std::fs::canonicalize(db).unwrap_or_else(|_| db.to_owned());
        beside(&db, ".lock")
    }
}

/// A database that this process has open, for as long as this lives.
#[derive(Debug)]
pub(super) struct Opened(Identity);

/// The databases that this process has open, each as often as it has. Whoever closes a file takes from his whole process the
/// locks on it (POSIX), SQLite's too: another SQLite that ends would think itself the last one, and delete the write-ahead
/// log under this one. So a file that is open here is not looked into as a file.
static OPENED: Mutex<Vec<Identity>> = Mutex::new(Vec::new());

impl Opened {
    /// Whether it is still the file of its name.
    pub(super) fn is_in_place(&self) -> bool {
        Identity::of(&self.0.path).is_ok_and(|there| there == self.0)
    }

    /// By what name it was opened.
    pub(super) fn path(&self) -> &Path {
        &self.0.path
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = opened.iter().position(|opened| *opened == self.0) {
            opened.swap_remove(at);
        }
    }
}

/// Opens the database at `path`, and makes it if `create`: whoever asks for that holds the lock. It is brought up to date,
/// unless an older daemon works on it.
pub(super) fn open(path: &Path, create: bool) -> Result<(Connection, Opened), OpenError> {
    // One after the other: what one looks into no other has just opened.
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    let is_open = Identity::of(path).is_ok_and(|file| opened.contains(&file));
    if !is_open {
        look_into(path, create)?;
    }
    let connection = open_as_ours(path, create)?;
    let file = Identity::of(path)?;
    opened.push(file.clone());
    Ok((connection, Opened(file)))
}

/// Looks whether it may be opened, as a file and without changing it.
fn look_into(path: &Path, create: bool) -> Result<(), OpenError> {
    let ours = inspect(path)?;
    if !ours && !create {
        return Err(OpenError::Missing(path.to_owned()));
    }
    if ours && !has_log(path) {
        // With a log there is no way to look without taking part.
        look_through(path).map_err(|source| sqlite(path, source))?;
    }
    Ok(())
}

fn open_as_ours(path: &Path, locked: bool) -> Result<Connection, OpenError> {
    let mut connection = connect(path).map_err(|source| sqlite(path, source))?;
    let found = version(&connection).map_err(|source| sqlite(path, source))?;
    match usize::try_from(found) {
        Ok(found) if found <= MIGRATIONS.len() => {
            let _lock = match found < MIGRATIONS.len() && !locked {
                true => Some(lock_to_upgrade(path)?),
                false => None,
            };
            upgrade(&mut connection, found).map_err(|source| sqlite(path, source))?;
            Ok(connection)
        }
        _ => Err(OpenError::Newer {
            path: path.to_owned(),
            found,
            known: MIGRATIONS.len(),
        }),
    }
}

/// Keeps daemons away while the tables change, for a command that is no daemon itself.
fn lock_to_upgrade(path: &Path) -> Result<InstanceLock, OpenError> {
    InstanceLock::take(path).map_err(|error| match error {
        OpenError::InUse(path) => OpenError::Older(path),
        error => error,
    })
}

pub(super) fn sqlite(path: &Path, source: rusqlite::Error) -> OpenError {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    let path = path.to_owned();
    match source.sqlite_error_code() {
        Some(DatabaseCorrupt | NotADatabase) => OpenError::Damaged {
            path,
            why: source.to_string(),
        },
        _ => OpenError::Sqlite { path, source },
    }
}

/// Whether a write-ahead log holds what is not in the database's own file yet.
fn has_log(path: &Path) -> bool {
    std::fs::metadata(beside(path, "-wal")).is_ok_and(|log| log.len() > 0)
}

/// How large a database is, with its write-ahead log, in bytes.
pub(super) fn size(path: &Path) -> u64 {
    [path.to_owned(), beside(path, "-wal")]
        .iter()
        .filter_map(|file| std::fs::metadata(file).ok())
        .map(|file| file.len())
        .sum()
}

/// The file beside a database whose name ends so.
fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    PathBuf::from(name)
}

/// Reads the heads of all tables, in a way that creates and changes no file: what is damaged must stay as it is. A
/// thorough check would take as long as the database is large.
fn look_through(path: &Path) -> rusqlite::Result<()> {
    let mut uri = url::Url::parse("file:///").map_err(|_| rusqlite::Error::InvalidQuery)?;
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    uri.set_path(&path.to_string_lossy());
    uri.set_query(Some("immutable=1"));
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
    let connection = Connection::open_with_flags(uri.as_str(), flags)?;
    let tables: Vec<String> = connection
        .prepare("SELECT name FROM sqlite_schema WHERE type = 'table'")?
        .query_map([], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    for table in tables {
        connection
            .prepare(&format!("SELECT * FROM \"{table}\" LIMIT 1"))?
            .query([])?
            .next()?;
    }
    Ok(())
}

/// Whether there is a database of ours. Reads the file's header and nothing else: SQLite itself would already
/// change a foreign one by opening it (write-ahead log, recovery).
fn inspect(path: &Path) -> Result<bool, OpenError> {
    const MAGIC: &[u8; 16] = b"SQLite format 3\0";
    let io = |source| OpenError::Io {
        path: path.to_owned(),
        source,
    };
    let mut header = Vec::new();
    match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(io(source)),
        Ok(file) => file.take(100).read_to_end(&mut header).map_err(io)?,
    };
    if header.is_empty() {
        return Ok(false);
    }
    // Offsets by SQLite's file format: user version at 60, application id at 68, both big-endian.
    let field = |offset: usize| {
        header
            .get(offset..offset + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .map(i32::from_be_bytes)
    };
    if header.starts_with(MAGIC) && header.len() < 100 {
        return Err(damaged(path));
    }
    if !header.starts_with(MAGIC) || field(68) != Some(APPLICATION_ID) {
        return Err(OpenError::Foreign(path.to_owned()));
    }
    let found = i64::from(field(60).unwrap_or_default());
    match usize::try_from(found) {
        Ok(version) if version <= MIGRATIONS.len() => {
            // In units of pages, the size of the file as of the last checkpoint: at 16 and 28.
            let page = match header.get(16..18) {
                Some([0, 1]) => 65_536,
                Some([high, low]) => u64::from(u16::from_be_bytes([*high, *low])),
                _ => 0,
            };
            let pages = u64::from(field(28).unwrap_or_default().cast_unsigned());
            // After the header: another process may be making it just now.
            let length = std::fs::metadata(path).map_or(0, |file| file.len());
            if length < page * pages && !has_log(path) {
                return Err(damaged(path));
            }
            Ok(true)
        }
        _ => Err(OpenError::Newer {
            path: path.to_owned(),
            found,
            known: MIGRATIONS.len(),
        }),
    }
}

fn damaged(path: &Path) -> OpenError {
    OpenError::Damaged {
        path: path.to_owned(),
        why: "its end is missing".into(),
    }
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    // A plan is for any values: else statements are planned anew for other ones, again and again.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    connection.set_prepared_statement_cache_capacity(64);
    // Before the journal mode, so that no file exists that does not say whose it is.
    if version(&connection)? == 0 {
        connection.pragma_update(None, "application_id", APPLICATION_ID)?;
    }
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "journal_size_limit", WAL_SIZE)?;
    connection.pragma_update(None, "foreign_keys", true)?;
    Ok(connection)
}

fn version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, "user_version", |row| row.get(0))
}

pub(super) fn upgrade(connection: &mut Connection, from: usize) -> rusqlite::Result<()> {
    for (index, migration) in MIGRATIONS.iter().enumerate().skip(from) {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        // A command beside the daemon may have done it meanwhile.
        if usize::try_from(version(&transaction)?).is_ok_and(|found| found > index) {
            continue;
        }
        transaction.execute_batch(migration)?;
        transaction.pragma_update(
            None,
            "user_version",
            i64::try_from(index + 1).unwrap_or(i64::MAX),
        )?;
        transaction.commit()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_or_newer_file_is_refused_and_left_as_it_is() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a.db");
        let other = Connection::open(&path).expect("a database");
        other
            .execute_batch("CREATE TABLE theirs (a)")
            .expect("a table");
        drop(other);
        let refused_untouched = |expected: fn(&OpenError) -> bool| {
            let before = std::fs::read(&path).expect("the file");
            let error = open(&path, true).expect_err("it is not ours");
            assert!(expected(&error), "{error}");
            assert_eq!(std::fs::read(&path).expect("the file"), before);
            assert_eq!(
                std::fs::read_dir(directory.path())
                    .expect("the directory")
                    .count(),
                1
            );
        };
        refused_untouched(|error| matches!(error, OpenError::Foreign(_)));
        std::fs::write(&path, "Dear diary").expect("a file");
        refused_untouched(|error| matches!(error, OpenError::Foreign(_)));

        std::fs::remove_file(&path).expect("the file");
        let (newer, _opened) = open(&path, true).expect("a new database");
        newer
            .pragma_update(None, "user_version", 99)
            .expect("a later version");
        newer
            .pragma_update(None, "journal_mode", "DELETE")
            .expect("one file only");
        drop((newer, _opened));
        refused_untouched(|error| matches!(error, OpenError::Newer { found: 99, .. }));
    }

    #[test]
    fn what_is_checked_stays_checked_and_costs_no_table_of_its_own() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a.db");
        let mut old = connect(&path).expect("a database");
        for migration in &MIGRATIONS[..3] {
            old.execute_batch(migration).expect("a schema");
        }
        old.pragma_update(None, "user_version", 3)
            .expect("a version");
        let insert = "INSERT INTO events (name, event_at, data, digest, state, kept_at, settled_at)
            VALUES ('UNREADABLE', 0, '?', 0, 'failed', 0, 0)";
        old.execute(insert, []).expect("an event");
        let beside = connect(&path).expect("another process");
        let prepared = beside.prepare(insert).map(drop);
        prepared.expect("it knows the tables");
        upgrade(&mut old, 3).expect("it can be upgraded");
        let (reopened, _opened) = open(&path, false).expect("it is ours");
        for connection in [old, beside, reopened] {
            let sound: String = connection
                .pragma_query_value(None, "integrity_check", |row| row.get(0))
                .expect("an answer");
            assert_eq!(sound, "ok");
            for (table, column) in [
                ("events", "name"),
                ("events", "state"),
                ("events", "sent"),
                ("conversations", "details"),
            ] {
                connection
                    .execute_batch(
                        "INSERT OR IGNORE INTO conversations (epoch, bigchat_id) VALUES (1, 1)",
                    )
                    .expect("a conversation");
                let update = format!("UPDATE {table} SET {column} = 'nonsense'");
                let refused = connection.execute(&update, []);
                let refused = refused.expect_err("it is no such thing").to_string();
                assert!(refused.contains("CHECK"), "{column}: {refused}");
                let mut plan = connection
                    .prepare(&format!("EXPLAIN {update}"))
                    .expect("a plan");
                let steps = plan
                    .query_map([], |row| row.get::<_, String>(1))
                    .expect("steps");
                assert!(
                    !steps.flatten().any(|step| step == "OpenEphemeral"),
                    "{column} costs a table"
                );
            }
        }
    }

    #[test]
    fn what_an_older_daemon_works_on_is_left_as_it_is() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a.db");
        let old = connect(&path).expect("a database");
        let newest = i64::try_from(MIGRATIONS.len()).expect("a few");
        for migration in &MIGRATIONS[..MIGRATIONS.len() - 1] {
            old.execute_batch(migration).expect("a schema");
        }
        old.pragma_update(None, "user_version", newest - 1)
            .expect("a version");
        let daemon = InstanceLock::take(&path).expect("the lock");
        let refused = open(&path, false).map(drop);
        assert!(matches!(refused, Err(OpenError::Older(_))), "{refused:?}");
        assert_eq!(version(&old).ok(), Some(newest - 1));
        drop(daemon);
        let _opened = open(&path, false).expect("nobody works on it");
        assert_eq!(version(&old).ok(), Some(newest));
        InstanceLock::take(&path).expect("the command lets go of it");
    }

    #[test]
    fn one_daemon_at_a_time() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a.db");
        let first = InstanceLock::take(&path).expect("the lock");
        assert!(matches!(
            InstanceLock::take(&path),
            Err(OpenError::InUse(_))
        ));
        drop(first);
        assert!(InstanceLock::take(&path).is_ok());
    }

    #[test]
    fn a_command_makes_no_database() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a.db");
        assert!(matches!(open(&path, false), Err(OpenError::Missing(_))));
        assert!(!path.exists());
    }
}
