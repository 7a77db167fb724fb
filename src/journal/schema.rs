//! Opens the database: updates the schema, and never changes a file that is not ours.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, MAIN_DB, OpenFlags, TransactionBehavior, ffi};

use super::error::OpenError;
use super::file::{DatabaseFile, Lock};
use crate::telemetry::terminal::shown;

/// Marks a database as ours (`PRAGMA application_id`): "BCS2".
const APPLICATION_ID: i32 = 0x4243_5332;

/// The mark of databases of version 0.1: "BCSY".
const APPLICATION_ID_0_1: i32 = 0x4243_5359;

/// Each entry migrates the schema from one version (`PRAGMA user_version`) to the next.
const MIGRATIONS: &[&str] = &[
    include_str!("../../migrations/0001_journal.sql"),
    include_str!("../../migrations/0002_retried_at.sql"),
    include_str!("../../migrations/0003_denials.sql"),
    include_str!("../../migrations/0004_permanent.sql"),
    include_str!("../../migrations/0005_poll_state.sql"),
    include_str!("../../migrations/0006_requested_chats.sql"),
    include_str!("../../migrations/0007_forgotten.sql"),
];

/// How long a statement waits for another process (a command, a backup). It is short, because the daemon tries again
/// anyway and must be able to stop.
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);

/// The maximum size of the write-ahead log. It grows for as long as another process (a backup, a forgotten shell) reads
/// an old state of the database, and would then keep that size forever.
const WAL_SIZE: i64 = 8 << 20;

/// With these flags, SQLite opens a read-only file for reading only. `SQLITE_OPEN_CREATE` is left out, because all
/// users could read a file that SQLite creates.
const WRITING: OpenFlags = OpenFlags::SQLITE_OPEN_READ_WRITE.union(OpenFlags::SQLITE_OPEN_NO_MUTEX);

/// A connection to a database, and the database's file, which must stay open longer.
pub(super) type Opened = (Connection, DatabaseFile);

/// Opens the database for a daemon. Locks it, creates it if it does not exist, makes it private, and upgrades it.
pub(super) fn open_for_daemon(path: &Path) -> Result<Opened, OpenError> {
    let mut file = DatabaseFile::create(path)?;
    file.lock(Lock::Daemon)?;
    if inspect(&file)? {
        check_tables(&file)?;
    }
    if let Err(error) = file.make_private()
        && !file.exposed().is_empty()
    {
        tracing::warn!(db = %shown(path), reason = %error, "other users of this machine have access to the database; run `chmod 600` on its files");
    }
    let mut connection = connect(&file)?;
    let found = known_version(&file, &connection)?;
    upgrade(&mut connection, found).map_err(|source| sqlite(path, source))?;
    Ok((connection, file))
}

/// Opens the database for a command beside the daemon. Upgrades it first if needed; that fails while an older daemon is
/// using it.
pub(super) fn open_shared(path: &Path) -> Result<Opened, OpenError> {
    let mut file = open_existing(path)?;
    let mut connection = connect(&file)?;
    let found = known_version(&file, &connection)?;
    if found < MIGRATIONS.len() {
        // No daemon may start while the tables change.
        file.lock(Lock::Daemon).map_err(|error| match error {
            OpenError::InUse(path) => OpenError::Older(path),
            error => error,
        })?;
        let upgraded = upgrade(&mut connection, found);
        file.unlock();
        upgraded.map_err(|source| sqlite(path, source))?;
    }
    Ok((connection, file))
}

/// Opens the database for reading, even where nothing can be written. An older version is upgraded as by
/// [`open_shared`].
pub(super) fn open_reader(path: &Path) -> Result<Opened, OpenError> {
    let mut file = open_existing(path)?;
    let connection = match connect_to_read(file.path()) {
        Err(error) if is_refused(&error) && file.has_log() => {
            return Err(OpenError::LogUnreadable(path.to_owned()));
        }
        // SQLite cannot create a file beside the database. It needs none unless a daemon is running.
        Err(error) if is_refused(&error) => {
            file.lock(Lock::Reader)?;
            connect_to_unchanging(file.path())
        }
        connected => connected,
    };
    let connection = connection.map_err(|source| sqlite(path, source))?;
    if known_version(&file, &connection)? < MIGRATIONS.len() {
        drop((connection, file));
        return open_shared(path);
    }
    Ok((connection, file))
}

/// Opens the file of one of our databases, without creating or changing anything.
fn open_existing(path: &Path) -> Result<DatabaseFile, OpenError> {
    let file = DatabaseFile::open(path)?;
    if !inspect(&file)? {
        return Err(OpenError::Missing(path.to_owned()));
    }
    if file.is_in_use_by_another_name() {
        return Err(OpenError::OtherName(path.to_owned()));
    }
    if !file.is_in_use() {
        check_tables(&file)?;
    }
    Ok(file)
}

/// The version of the database's schema, if it is a known one.
fn known_version(file: &DatabaseFile, connection: &Connection) -> Result<usize, OpenError> {
    let found = version(connection).map_err(|source| sqlite(file.named(), source))?;
    check_version(file, found)
}

fn check_version(file: &DatabaseFile, found: i64) -> Result<usize, OpenError> {
    match usize::try_from(found) {
        Ok(version) if version <= MIGRATIONS.len() => Ok(version),
        _ => Err(OpenError::Newer {
            path: file.named().to_owned(),
            found,
            known: MIGRATIONS.len(),
        }),
    }
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

/// Whether SQLite was not allowed to write, or to create the files it needs.
fn is_refused(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{CannotOpen, ReadOnly};
    matches!(error.sqlite_error_code(), Some(CannotOpen | ReadOnly))
}

/// Reads the first row of each table, without creating or changing a file, because a damaged database must stay as it
/// is. A full check would take time in proportion to the size.
fn check_tables(file: &DatabaseFile) -> Result<(), OpenError> {
    // With a log, reading would need the `-shm` file.
    if file.has_log() {
        return Ok(());
    }
    let look = || {
        let connection = connect_to_unchanging(file.path())?;
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
    };
    look().map_err(|source| sqlite(file.named(), source))
}

/// Whether the file is one of our databases. Reads only the header: SQLite itself would change a foreign one on opening
/// it (write-ahead log, recovery).
fn inspect(file: &DatabaseFile) -> Result<bool, OpenError> {
    const MAGIC: &[u8; 16] = b"SQLite format 3\0";
    const HEADER: usize = 100;
    let path = file.named();
    let header = file.head(HEADER).map_err(|source| OpenError::Io {
        path: path.to_owned(),
        source,
    })?;
    // The power failed while SQLite was writing the first page of a new database. SQLite undoes that with its rollback
    // journal.
    let is_unwritten = header.iter().all(|byte| *byte == 0) && file.has_rollback_journal();
    if header.is_empty() || is_unwritten {
        return Ok(false);
    }
    // Offsets in SQLite's file format: user version at 60, application id at 68, both big-endian.
    let field = |offset: usize| {
        header
            .get(offset..offset + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .map(i32::from_be_bytes)
    };
    if header.starts_with(MAGIC) && header.len() < HEADER {
        return Err(damaged(path));
    }
    if header.starts_with(MAGIC) && field(68) == Some(APPLICATION_ID_0_1) {
        return Err(OpenError::Version01(path.to_owned()));
    }
    if !header.starts_with(MAGIC) || field(68) != Some(APPLICATION_ID) {
        return Err(OpenError::Foreign(path.to_owned()));
    }
    check_version(file, i64::from(field(60).unwrap_or_default()))?;
    // The size of the file at the last checkpoint, in pages (offsets 16 and 28).
    let page = match header.get(16..18) {
        Some([0, 1]) => 65_536,
        Some([high, low]) => u64::from(u16::from_be_bytes([*high, *low])),
        _ => 0,
    };
    let pages = u64::from(field(28).unwrap_or_default().cast_unsigned());
    // The size is read after the header, because another process may be creating the file.
    if file.bytes() < page * pages && !file.has_log() {
        return Err(damaged(path));
    }
    Ok(true)
}

fn damaged(path: &Path) -> OpenError {
    OpenError::Damaged {
        path: path.to_owned(),
        why: "its end is missing".into(),
    }
}

/// Opens the database for writing.
fn connect(file: &DatabaseFile) -> Result<Connection, OpenError> {
    let connected = connect_to(file.path());
    connected.map_err(|error| match is_refused(&error) {
        // SQLite's error names neither the file nor the reason.
        true => file
            .why_refused()
            .unwrap_or_else(|| sqlite(file.named(), error)),
        false => sqlite(file.named(), error),
    })
}

fn connect_to(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(path, WRITING)?;
    if connection.is_readonly(MAIN_DB)? {
        let read_only = ffi::Error::new(ffi::SQLITE_READONLY);
        return Err(rusqlite::Error::SqliteFailure(read_only, None));
    }
    prepare(&connection)?;
    // Set before the journal mode, so that every existing file is marked as ours.
    if version(&connection)? == 0 {
        connection.pragma_update(None, "application_id", APPLICATION_ID)?;
    }
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "journal_size_limit", WAL_SIZE)?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // Deleted text is overwritten where that takes no additional write; `forget` overwrites the rest.
    connection.pragma_update(None, "secure_delete", "FAST")?;
    Ok(connection)
}

/// Opens the database for reading, with write access if possible, because the last process to close a database cleans
/// up its files.
fn connect_to_read(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(path, WRITING)?;
    prepare(&connection)?;
    connection.pragma_update(None, "query_only", true)?;
    version(&connection)?;
    Ok(connection)
}

/// Opens the database as a file that does not change: no lock, no write-ahead log, no file created.
fn connect_to_unchanging(path: &Path) -> rusqlite::Result<Connection> {
    let escaped = path.as_os_str().as_bytes().iter();
    let escaped: String = escaped.map(|byte| format!("%{byte:02x}")).collect();
    let uri = format!("file:{escaped}?immutable=1");
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY
        | OpenFlags::SQLITE_OPEN_NO_MUTEX
        | OpenFlags::SQLITE_OPEN_URI;
    let connection = Connection::open_with_flags(uri, flags)?;
    prepare(&connection)?;
    Ok(connection)
}

pub(super) fn prepare(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    // Query plans must not depend on the values, or SQLite would plan statements again for each new value.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(())
}

fn version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, "user_version", |row| row.get(0))
}

/// Applies all migrations in one transaction, so that no other process sees a version in between.
pub(super) fn upgrade(connection: &mut Connection, from: usize) -> rusqlite::Result<()> {
    if from == MIGRATIONS.len() {
        return Ok(());
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    // Another process may have upgraded it meanwhile.
    let found = usize::try_from(version(&transaction)?).unwrap_or(from);
    let Some(migrations @ [_, ..]) = MIGRATIONS.get(found..) else {
        return Ok(());
    };
    for migration in migrations {
        transaction.execute_batch(migration)?;
    }
    let newest = i64::try_from(MIGRATIONS.len()).unwrap_or(i64::MAX);
    transaction.pragma_update(None, "user_version", newest)?;
    transaction.commit()
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    /// A new file, without a schema.
    fn made(path: &Path) -> Connection {
        File::create(path).expect("a file");
        connect_to(path).expect("a database")
    }

    /// A new file, with the schema of an earlier version.
    fn of_version(version: usize, path: &Path) -> Connection {
        let old = made(path);
        for migration in &MIGRATIONS[..version] {
            old.execute_batch(migration).expect("a schema");
        }
        old.pragma_update(None, "user_version", i64::try_from(version).expect("few"))
            .expect("a version");
        old
    }

    /// A foreign or newer file is refused, and not changed.
    #[test]
    fn foreign_or_newer_file_stays_unchanged() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a.db");
        let other = Connection::open(&path).expect("a database");
        other
            .execute_batch("CREATE TABLE theirs (a)")
            .expect("a table");
        drop(other);
        let refused_untouched = |expected: fn(&OpenError) -> bool| {
            let before = std::fs::read(&path).expect("the file");
            let error = open_for_daemon(&path).expect_err("it is not ours");
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
        let old = Connection::open(&path).expect("a database");
        old.pragma_update(None, "application_id", APPLICATION_ID_0_1)
            .expect("its mark");
        old.pragma_update(None, "user_version", 4)
            .expect("its version");
        drop(old);
        refused_untouched(|error| matches!(error, OpenError::Version01(_)));

        std::fs::remove_file(&path).expect("the file");
        let (newer, _opened) = open_for_daemon(&path).expect("a new database");
        newer
            .pragma_update(None, "user_version", 99)
            .expect("a later version");
        newer
            .pragma_update(None, "journal_mode", "DELETE")
            .expect("one file only");
        drop((newer, _opened));
        refused_untouched(|error| matches!(error, OpenError::Newer { found: 99, .. }));
    }

    /// The size of a new database has reached the disk, but its first page has not. The rollback journal says how to
    /// undo both.
    #[test]
    fn power_cut_during_the_first_write() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a.db");
        std::fs::write(&path, [0; 4096]).expect("a file");
        let refused = open_for_daemon(&path).map(drop);
        assert!(matches!(refused, Err(OpenError::Foreign(_))), "{refused:?}");
        let magic = [0xd9, 0xd5, 0x05, 0xf9, 0x20, 0xa1, 0x63, 0xd7];
        // Records, nonce, former size in pages, size of a sector, size of a page.
        let numbers = [0_u32, 7, 0, 512, 4096].map(u32::to_be_bytes);
        let mut journal = [&magic[..], numbers.as_flattened()].concat();
        journal.resize(512, 0);
        std::fs::write(directory.path().join("a.db-journal"), journal).expect("a file");
        let (connection, _file) = open_for_daemon(&path).expect("a new database");
        assert_eq!(
            version(&connection).ok(),
            i64::try_from(MIGRATIONS.len()).ok()
        );
    }

    /// A database that an older daemon is using is not upgraded.
    #[test]
    fn database_of_older_daemon_stays_unchanged() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a.db");
        let old = of_version(MIGRATIONS.len() - 1, &path);
        let newest = i64::try_from(MIGRATIONS.len()).expect("a few");
        let lock = || {
            let mut daemon = DatabaseFile::create(&path).expect("the file");
            daemon.lock(Lock::Daemon).map(|()| daemon)
        };
        let daemon = lock().expect("the lock");
        let refused = open_shared(&path).map(drop);
        assert!(matches!(refused, Err(OpenError::Older(_))), "{refused:?}");
        assert_eq!(version(&old).ok(), Some(newest - 1));
        drop(daemon);
        let _opened = open_shared(&path).expect("no daemon uses it");
        assert_eq!(version(&old).ok(), Some(newest));
        lock().expect("the command releases it");
    }

    /// Earlier versions recognized permanent failures by kind and reason.
    #[test]
    fn upgrade_marks_permanent_failures() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut old = of_version(3, &directory.path().join("a.db"));
        let failed = [
            (1, "MESSAGE", "OurAPI permanently rejects it: too short"),
            (2, "MESSAGE", "OurAPI gave no usable answer"),
            (3, "UNREADABLE", "unknown kind of event"),
        ];
        for (id, kind, reason) in failed {
            let sql = format!(
                "INSERT INTO events (id, kind, event_at, fingerprint, received_at) VALUES ({id}, '{kind}', 0, 0, 0);
                 INSERT INTO attempts (event, attempts, counted, reason, request, response)
                    VALUES ({id}, 1, 1, '{reason}', '', '');
                 INSERT INTO dead_letters (event, failed_at) VALUES ({id}, 0);"
            );
            old.execute_batch(&sql).expect("a dead letter");
        }
        upgrade(&mut old, 3).expect("an upgrade");
        let permanent: String = old
            .query_row(
                "SELECT group_concat(event) FROM dead_letters WHERE permanent",
                [],
                |row| row.get(0),
            )
            .expect("dead letters");
        assert_eq!(permanent, "1,3");
    }

    /// In earlier versions, a failed event of a forgotten conversation had no delivery, so it was never dropped.
    #[test]
    fn upgrade_settles_forgotten_events() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut old = of_version(6, &directory.path().join("a.db"));
        old.execute_batch(
            "INSERT INTO conversations (id, epoch, bigchat_id, forgotten_at, forgotten_by) VALUES (1, 1, 42, 7, 'me'), (2, 1, 43, NULL, NULL);
             INSERT INTO events (id, conversation, kind, event_at, fingerprint, received_at)
                VALUES (1, 1, 'START', 0, 0, 0), (2, 1, 'MESSAGE', 0, 0, 0), (3, 2, 'START', 0, 0, 0);
             INSERT INTO deliveries (conversation, from_event, through, delivered_at, effect) VALUES (1, 1, 1, 5, 'chat created');",
        )
        .expect("events");
        upgrade(&mut old, 6).expect("an upgrade");
        let deliveries: String = old
            .query_row(
                "SELECT group_concat(from_event || ' at ' || delivered_at, ', ') FROM deliveries",
                [],
                |row| row.get(0),
            )
            .expect("deliveries");
        assert_eq!(deliveries, "1 at 5, 2 at 7");
    }

    #[test]
    fn command_creates_no_database() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a.db");
        assert!(matches!(open_shared(&path), Err(OpenError::Missing(_))));
        assert!(!path.exists());
    }
}
