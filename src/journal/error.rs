//! Why a database was not opened.

use std::path::PathBuf;

use thiserror::Error;

use crate::telemetry::terminal::{shown, shown_in_full};

/// Why a database was not opened. Unless the disk fails, nothing in it was changed.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Another process that delivers is using it.
    #[error(
        "another bigchat-sync is using {} (a daemon, `once` or `verify`); stop it or let it finish, or set another database with --db",
        shown(.0)
    )]
    InUse(PathBuf),
    /// A daemon is using it through another hard link or mount, where its write-ahead log is.
    #[error(
        "the daemon that uses {} has it open by another name, with its -wal and -shm beside that name; set --db as the daemon does",
        shown(.0)
    )]
    OtherName(PathBuf),
    /// Another program's database, or no database at all.
    #[error("{} is not a bigchat-sync database, and was not changed; set another one with --db", shown(.0))]
    Foreign(PathBuf),
    /// Written by a later version of this program.
    #[error(
        "{} was written by a newer bigchat-sync (schema {found}, this one knows {known}), and was not changed; run the newer one",
        shown(.path)
    )]
    Newer {
        /// The database.
        path: PathBuf,
        /// Its schema's version.
        found: i64,
        /// The latest version this program knows.
        known: usize,
    },
    /// Written by an earlier version of this program, which is still using it.
    #[error(
        "an older bigchat-sync is using {}, so its tables cannot be upgraded now; restart the daemon with this version, or use the older one",
        shown(.0)
    )]
    Older(PathBuf),
    /// Written by version 0.1, whose journal cannot be read.
    #[error(
        "{} was written by bigchat-sync 0.1, and was not changed; deliver the waiting events with that version (`bigchat-sync once`), then set another database with --db",
        shown(.0)
    )]
    Version01(PathBuf),
    /// It does not exist, and the command does not create one.
    #[error(
        "there is no database {}; start the daemon first, or name its database with --db (for a service: /var/lib/bigchat-sync/bigchat-sync.db)",
        shown_in_full(.0)
    )]
    Missing(PathBuf),
    /// Truncated or overwritten.
    #[error(
        "{} is damaged ({why}), and was not changed; restore a copy, or set another database with --db",
        shown(.path)
    )]
    Damaged {
        /// The database.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The directory does not exist.
    #[error(
        "{} cannot be opened: the directory {} does not exist; create it, or set another database with --db",
        shown(.path),
        shown(.directory)
    )]
    NoDirectory {
        /// The database.
        path: PathBuf,
        /// Its directory.
        directory: PathBuf,
    },
    /// No file can be created in its directory.
    #[error(
        "{} cannot be opened: no file can be created in {}, where it and its -wal and -shm belong ({source}){}",
        shown(.path),
        shown(.directory),
        remedy(.source)
    )]
    Directory {
        /// The database.
        path: PathBuf,
        /// Its directory.
        directory: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It cannot be read without its write-ahead log, and the log cannot be read.
    #[error(
        "{} cannot be read: its latest changes are in its -wal file, which can be read only with a -shm file, and none can be created; \
         use an account that may write to its directory, or copy the database and its -wal to a writable directory",
        shown(.0)
    )]
    LogUnreadable(PathBuf),
    /// The path is too long for SQLite.
    #[error("{} cannot be opened: SQLite accepts paths of up to 504 bytes; set a shorter one with --db", shown(.0))]
    TooLong(PathBuf),
    /// The file system refused access.
    #[error("{} cannot be opened: {source}{}", shown(.path), remedy(.source))]
    Io {
        /// The file in question.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// SQLite refused to open it.
    #[error("{} cannot be opened: {source}", shown(.path))]
    Sqlite {
        /// The database.
        path: PathBuf,
        /// Why.
        source: rusqlite::Error,
    },
}

/// The remedy for an error of the file system.
fn remedy(error: &std::io::Error) -> &'static str {
    use std::io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
    match error.kind() {
        PermissionDenied => "; use the account of its owner, or give this one access",
        ReadOnlyFilesystem => "; make the file system writable, or set another database with --db",
        _ => "",
    }
}

impl OpenError {
    /// Whether waiting may help: a full disk, or a database that another process has locked.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Sqlite { source, .. } => is_transient(source),
            Self::Io { source, .. } | Self::Directory { source, .. } => {
                source.kind() == std::io::ErrorKind::StorageFull
            }
            _ => false,
        }
    }
}

/// Whether SQLite may accept later what it refuses now.
pub(super) fn is_transient(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{
        DatabaseBusy, DatabaseLocked, DiskFull, FileLockingProtocolFailed, OutOfMemory,
        SystemIoFailure,
    };
    matches!(
        error.sqlite_error_code(),
        Some(
            DatabaseBusy
                | DatabaseLocked
                | DiskFull
                | FileLockingProtocolFailed
                | OutOfMemory
                | SystemIoFailure
        )
    )
}

/// The same for an open database. If SQLite then cannot open a file, it is one of SQLite's own, and no descriptor is
/// left.
pub(super) fn is_transient_when_open(error: &rusqlite::Error) -> bool {
    is_transient(error) || error.sqlite_error_code() == Some(rusqlite::ErrorCode::CannotOpen)
}

#[cfg(test)]
mod tests {
    use rusqlite::{Error, ffi};

    use super::*;
    use crate::journal::JournalError;

    /// If a temporary error counted as permanent, the committer would set conversations aside.
    #[test]
    fn passing_errors_are_transient() {
        let error = |code| Error::SqliteFailure(ffi::Error::new(code), None);
        for (code, opening, open) in [
            (ffi::SQLITE_BUSY_SNAPSHOT, true, true),
            (ffi::SQLITE_FULL, true, true),
            (ffi::SQLITE_NOMEM, true, true),
            (ffi::SQLITE_PROTOCOL, true, true),
            (ffi::SQLITE_CANTOPEN, false, true),
            (ffi::SQLITE_CONSTRAINT, false, false),
            (ffi::SQLITE_CORRUPT, false, false),
        ] {
            let path = PathBuf::new();
            let refused = OpenError::Sqlite {
                path,
                source: error(code),
            };
            assert_eq!(refused.is_transient(), opening, "{code}");
            let failed = JournalError::from(error(code));
            assert_eq!(failed.is_transient(), open, "{code}");
        }
    }
}
