//! The database file: which file a path names, the lock that keeps a second daemon out, and who may read the file.

use std::fs::{self, File, Metadata, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{Access, access, fstatvfs};
use uuid::Uuid;

use super::error::OpenError;
use crate::mutex::lock;

/// The longest path that SQLite can open, in bytes: its limit, less the longest suffix it appends.
const LONGEST_PATH: usize = 504;

/// How many symbolic links are followed, the same number as in Linux.
const MOST_LINKS: usize = 40;

/// How long a command may hold the lock to find out whether a daemon holds it.
const LOCK_CHECKED_WITHIN: Duration = Duration::from_millis(200);

/// Only the owner may read and write, because the database contains customers' messages.
const PRIVATE: u32 = 0o600;

/// A file, independent of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Inode {
    device: u64,
    number: u64,
}

impl From<&Metadata> for Inode {
    fn from(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            number: metadata.ino(),
        }
    }
}

/// The database files that this process has open. Closing any descriptor of a file drops all POSIX locks that the
/// process has on it, including SQLite's. Another process that closes the database would then delete the write-ahead
/// log that this process uses. So descriptors are reused, and closed only when this process has no connection left and
/// no other thread is opening the file.
static OPEN: Mutex<Vec<Open>> = Mutex::new(Vec::new());

#[derive(Debug)]
struct Open {
    inode: Inode,
    descriptor: Arc<File>,
}

impl Open {
    /// Whether a [`DatabaseFile`] has the descriptor.
    fn is_used(&self) -> bool {
        Arc::strong_count(&self.descriptor) > 1
    }
}

/// Closes the files that this process no longer uses.
#[derive(Debug)]
struct Closing;

impl Drop for Closing {
    fn drop(&mut self) {
        let mut open = lock(&OPEN);
        let used = open.iter().filter(|open| open.is_used());
        let used: Vec<Inode> = used.map(|open| open.inode).collect();
        open.retain(|open| used.contains(&open.inode));
    }
}

/// Who locks an open database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lock {
    /// A daemon, or a command in its place: one at a time.
    Daemon,
    /// Commands that can read the file only while it does not change, so that no daemon may start.
    Reader,
}

/// The file of a database. It stays open longer than SQLite's connection.
///
/// The lock is `flock`'s, which SQLite does not use. It belongs to the file, not to its name, and ends with the
/// process.
#[derive(Debug)]
pub(super) struct DatabaseFile {
    named: PathBuf,
    path: PathBuf,
    inode: Inode,
    descriptor: Arc<File>,
    lock: Option<Lock>,
    /// Declared after the descriptor, so that it is dropped once the descriptor is released.
    _closing: Closing,
}

impl Drop for DatabaseFile {
    fn drop(&mut self) {
        self.unlock();
    }
}

impl DatabaseFile {
    /// Opens the file for a daemon, and creates it if it does not exist.
    pub(super) fn create(named: &Path) -> Result<Self, OpenError> {
        let mut options = File::options();
        options.read(true).write(true).create(true).mode(PRIVATE);
        Self::open_with(named, &options).map_err(|error| match error {
            // The error is from the directory, not from the file.
            OpenError::Io { .. } if !named.exists() => can_be_made(named).err().unwrap_or(error),
            error => error,
        })
    }

    /// Opens an existing file.
    pub(super) fn open(named: &Path) -> Result<Self, OpenError> {
        Self::open_with(named, File::options().read(true)).map_err(|error| match error {
            OpenError::NoDirectory { .. } => OpenError::Missing(named.to_owned()),
            OpenError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                OpenError::Missing(named.to_owned())
            }
            error => error,
        })
    }

    fn open_with(named: &Path, options: &OpenOptions) -> Result<Self, OpenError> {
        let path = resolve(named)?;
        let io = |source| OpenError::Io {
            path: named.to_owned(),
            source,
        };
        let mut open = lock(&OPEN);
        let there = fs::metadata(&path).ok();
        if there.as_ref().is_some_and(|there| !there.is_file()) {
            return Err(OpenError::Foreign(named.to_owned()));
        }
        let there = there.as_ref().map(Inode::from);
        let mut known = open.iter().filter(|open| Some(open.inode) == there);
        let (inode, descriptor) = match known.find(|open| !open.is_used()) {
            Some(idle) => (idle.inode, Arc::clone(&idle.descriptor)),
            None => {
                let descriptor = Arc::new(options.open(&path).map_err(io)?);
                let inode = Inode::from(&descriptor.metadata().map_err(io)?);
                open.push(Open {
                    inode,
                    descriptor: Arc::clone(&descriptor),
                });
                (inode, descriptor)
            }
        };
        Ok(Self {
            named: named.to_owned(),
            path,
            inode,
            descriptor,
            lock: None,
            _closing: Closing,
        })
    }

    /// The name by which it was opened, for error messages.
    pub(super) fn named(&self) -> &Path {
        &self.named
    }

    /// The absolute path without symbolic links, which SQLite cannot mistake for another file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether its name still refers to this file.
    pub(super) fn is_in_place(&self) -> bool {
        fs::metadata(&self.named).is_ok_and(|there| Inode::from(&there) == self.inode)
    }

    /// Its first `bytes` bytes, or fewer if it is shorter.
    pub(super) fn head(&self, bytes: usize) -> io::Result<Vec<u8>> {
        let mut head = vec![0; bytes];
        let mut length = 0;
        while length < bytes {
            match self
                .descriptor
                .read_at(&mut head[length..], length as u64)?
            {
                0 => break,
                read => length += read,
            }
        }
        head.truncate(length);
        Ok(head)
    }

    /// Its size without the write-ahead log, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        let metadata = self.descriptor.metadata();
        metadata.map_or(0, |metadata| metadata.len())
    }

    /// The size of its write-ahead log, in bytes. `None`: there is none.
    pub(super) fn log_bytes(&self) -> Option<u64> {
        fs::metadata(self.beside("-wal")).ok().map(|log| log.len())
    }

    /// The free space on its disk for users other than root, in bytes.
    pub(super) fn disk_free_bytes(&self) -> Option<u64> {
        let disk = fstatvfs(&*self.descriptor).ok()?;
        Some(disk.f_bavail.saturating_mul(disk.f_frsize))
    }

    /// Whether the write-ahead log has changes that are not in the file yet.
    pub(super) fn has_log(&self) -> bool {
        self.log_bytes().is_some_and(|bytes| bytes > 0)
    }

    /// Whether a transaction was interrupted before the write-ahead log existed.
    pub(super) fn has_rollback_journal(&self) -> bool {
        fs::metadata(self.beside("-journal")).is_ok_and(|journal| journal.len() > 0)
    }

    /// Locks the file. Fails if a conflicting lock is held.
    pub(super) fn lock(&mut self, lock: Lock) -> Result<(), OpenError> {
        let deadline = Instant::now() + LOCK_CHECKED_WITHIN;
        loop {
            let locked = match lock {
                Lock::Daemon => self.descriptor.try_lock(),
                Lock::Reader => self.descriptor.try_lock_shared(),
            };
            match locked {
                Ok(()) => {
                    self.lock = Some(lock);
                    break;
                }
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(LOCK_CHECKED_WITHIN / 20);
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(OpenError::InUse(self.named.clone()));
                }
                Err(TryLockError::Error(source)) => {
                    return Err(OpenError::Io {
                        path: self.named.clone(),
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    /// Undoes [`Self::lock`]. Closing the file is not enough: a process that was just forked may have a copy of the
    /// descriptor.
    pub(super) fn unlock(&mut self) {
        if self.lock.take().is_some() {
            self.descriptor.unlock().ok();
        }
    }

    /// Whether a daemon, or a command in its place, holds the lock. The check takes the lock for a moment.
    pub(super) fn is_in_use(&self) -> bool {
        if let Some(lock) = self.lock {
            return lock == Lock::Daemon;
        }
        match self.descriptor.try_lock_shared() {
            Ok(()) => {
                self.descriptor.unlock().ok();
                false
            }
            Err(error) => matches!(error, TryLockError::WouldBlock),
        }
    }

    /// Whether a daemon has the file open by another name. Its write-ahead log is then beside that name, and a second
    /// log, created here, would destroy the database.
    pub(super) fn is_in_use_by_another_name(&self) -> bool {
        let deadline = Instant::now() + LOCK_CHECKED_WITHIN;
        while self.is_in_use() && self.log_bytes().is_none() {
            if Instant::now() > deadline {
                return true;
            }
            // The daemon may just be starting.
            std::thread::sleep(LOCK_CHECKED_WITHIN / 20);
        }
        false
    }

    /// Why SQLite is not allowed to write the file, or to create files beside it.
    pub(super) fn why_refused(&self) -> Option<OpenError> {
        for path in ["", "-wal", "-shm"].map(|end| self.beside(end)) {
            match access(&path, Access::WRITE_OK).map_err(io::Error::from) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Some(OpenError::Io { path, source });
                }
                _ => {}
            }
        }
        can_be_made(&self.named).err()
    }

    /// Makes the file and those beside it private to their owner. Files that SQLite creates later inherit the mode.
    pub(super) fn make_private(&self) -> io::Result<()> {
        let private = || Permissions::from_mode(PRIVATE);
        if mode(&self.descriptor.metadata()?) != PRIVATE {
            self.descriptor.set_permissions(private())?;
        }
        for path in self.exposed() {
            fs::set_permissions(path, private())?;
        }
        Ok(())
    }

    /// Its files that other users may read or write.
    pub(super) fn exposed(&self) -> Vec<PathBuf> {
        let is_exposed = |path: &PathBuf| {
            fs::symlink_metadata(path)
                .is_ok_and(|there| there.is_file() && mode(&there) & 0o077 != 0)
        };
        ["", "-wal", "-shm"]
            .map(|end| self.beside(end))
            .into_iter()
            .filter(is_exposed)
            .collect()
    }

    /// The file beside it with that suffix.
    pub(super) fn beside(&self, end: &str) -> PathBuf {
        let mut name = self.path.as_os_str().to_owned();
        name.push(end);
        PathBuf::from(name)
    }
}

fn mode(metadata: &Metadata) -> u32 {
    metadata.permissions().mode() & 0o777
}

/// Whether a database, or its `-wal` and `-shm`, can be created there. The check creates and removes another file.
pub(super) fn can_be_made(named: &Path) -> Result<(), OpenError> {
    let path = resolve(named)?;
    let directory = path.parent().unwrap_or(&path);
    let trial = directory.join(format!(".bigchat-sync-{}", Uuid::new_v4()));
    let mut options = File::options();
    options.write(true).create_new(true).mode(PRIVATE);
    let made = options.open(&trial).and_then(|_| fs::remove_file(&trial));
    made.map_err(|source| OpenError::Directory {
        path: named.to_owned(),
        directory: directory.to_owned(),
        source,
    })
}

/// The absolute path of the file that a name refers to, whether or not it exists, resolved as SQLite does.
fn resolve(named: &Path) -> Result<PathBuf, OpenError> {
    let mut target = named.to_owned();
    for _ in 0..MOST_LINKS {
        let Ok(link) = fs::read_link(&target) else {
            break;
        };
        target.pop();
        target.push(link);
    }
    let directory = match target.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => &target,
    };
    let in_full = fs::canonicalize(directory).map_err(|source| {
        let (path, directory) = (named.to_owned(), directory.to_owned());
        match source.kind() {
            io::ErrorKind::NotFound => OpenError::NoDirectory { path, directory },
            _ => OpenError::Directory {
                path,
                directory,
                source,
            },
        }
    })?;
    let path = match target.file_name() {
        Some(name) => in_full.join(name),
        None => in_full,
    };
    if path.as_os_str().len() > LONGEST_PATH {
        return Err(OpenError::TooLong(named.to_owned()));
    }
    Ok(path)
}
