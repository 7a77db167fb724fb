//! The lock of a file around each request to OurAPI, by which several daemons of one machine take turns
//! (`--our-api-lock`).
//!
//! The operating system releases the lock when its holder dies. OurAPI may still be at work on its request then, so the
//! file also says whether a request is in flight: it has one byte while that is so. Whoever takes the lock and finds a byte
//! waits for as long as a request may take.

use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use thiserror::Error;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::telemetry::liveness;
use crate::telemetry::terminal::shown;

/// How often the time spent waiting is counted, and how often a file that cannot be locked is tried again.
const TICK: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    request_timeout: Duration,
    /// Cancelled when no further request is to be begun.
    stopping: CancellationToken,
    /// For how long requests have waited, in µs.
    waited: AtomicU64,
    /// The file cannot be locked, which was logged.
    is_broken: AtomicBool,
}

impl Lock {
    /// The lock of a file that is made where there is none.
    pub fn new(path: PathBuf, request_timeout: Duration, stopping: CancellationToken) -> Self {
        Self {
            path,
            request_timeout,
            stopping,
            waited: AtomicU64::new(0),
            is_broken: AtomicBool::new(false),
        }
    }

    /// For how long requests have waited for it, all together.
    pub(super) fn waited(&self) -> Duration {
        Duration::from_micros(self.waited.load(Ordering::Relaxed))
    }

    /// Waits for the lock; `None`: the daemon is to stop. A file that cannot be locked is waited for, too.
    pub(super) async fn acquire(&self) -> Option<Turn> {
        self.stopping.run_until_cancelled(self.wait()).await
    }

    async fn wait(&self) -> Turn {
        loop {
            let path = self.path.clone();
            // Where nobody waits for it any more, the file is closed as soon as it is locked.
            let locking = spawn_blocking(move || lock(&path));
            match self.alive(locking).await.map_err(io::Error::other) {
                Ok(Ok(turn)) => {
                    if self.is_broken.swap(false, Ordering::Relaxed) {
                        tracing::info!(path = shown(&self.path), "the lock can be taken again");
                    }
                    if turn.was_in_flight {
                        tracing::warn!(
                            path = shown(&self.path),
                            "the last holder of the lock ended during a request; nothing is sent for one request time-out"
                        );
                        self.alive(sleep(self.request_timeout)).await;
                    }
                    return turn;
                }
                Ok(Err(error)) | Err(error) => {
                    if !self.is_broken.swap(true, Ordering::Relaxed) {
                        tracing::error!(
                            path = shown(&self.path), reason = %error,
                            "the lock cannot be taken; nothing is sent to OurAPI until it can"
                        );
                    }
                    self.alive(sleep(TICK)).await;
                }
            }
        }
    }

    /// Waits, which is no standstill, and counts for how long.
    async fn alive<T>(&self, waiting: impl Future<Output = T>) -> T {
        tokio::pin!(waiting);
        let mut counted = Instant::now();
        let mut count = || {
            let now = Instant::now();
            let micros = (now - counted).as_micros();
            let micros = u64::try_from(micros).unwrap_or(u64::MAX);
            self.waited.fetch_add(micros, Ordering::Relaxed);
            counted = now;
        };
        loop {
            tokio::select! {
                biased;
                done = &mut waiting => {
                    count();
                    return done;
                }
                () = sleep(TICK) => {
                    count();
                    liveness::goes_on(std::time::Instant::now());
                }
            }
        }
    }
}

/// The lock is held until this is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    file: File,
    was_in_flight: bool,
}

impl Turn {
    /// A request begins. If the file cannot say so, only the death of this process at just that time is less safe.
    pub(super) fn begin(&self) {
        self.file.set_len(1).ok();
    }

    /// No request is in flight any more.
    pub(super) fn finish(self) {
        self.file.set_len(0).ok();
    }
}

/// A file that cannot serve as a lock.
#[derive(Debug, Error)]
#[error("--our-api-lock {} cannot be used: {source}", shown(.path))]
pub struct LockError {
    path: PathBuf,
    source: io::Error,
}

/// Whether a file can serve as a lock, for a message before it is needed.
///
/// # Errors
///
/// Why it cannot.
pub fn usable(path: &Path) -> Result<(), LockError> {
    open(path).map(drop).map_err(|source| LockError {
        path: path.to_owned(),
        source,
    })
}

/// Locks the file of that name, and waits for as long as it takes.
fn lock(path: &Path) -> io::Result<Turn> {
    loop {
        let file = open(path)?;
        match file.lock() {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            locked => locked?,
        }
        let locked = file.metadata()?;
        // It may have been deleted or replaced meanwhile: others lock the new one.
        if fs::metadata(path).is_ok_and(|named| is_same(&named, &locked)) {
            let was_in_flight = locked.len() > 0;
            return Ok(Turn {
                file,
                was_in_flight,
            });
        }
    }
}

/// Opens the file. One that holds anything is not even opened: closing it would drop a database's own locks.
fn open(path: &Path) -> io::Result<File> {
    match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() || metadata.len() > 1 => {
            let why = "it is no lock file: name one that does not exist, or an empty one";
            return Err(io::Error::new(ErrorKind::InvalidInput, why));
        }
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path)
}

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    fn lock_of(path: &Path, request_timeout: Duration) -> Lock {
        let stopping = CancellationToken::new();
        Lock::new(path.to_owned(), request_timeout, stopping)
    }

    #[tokio::test]
    async fn turn_is_waited_for_and_counted() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("lock");
        let (one, other) = (lock_of(&path, TICK), lock_of(&path, TICK));
        let turn = one.acquire().await.expect("it is free");
        let waiting = other.acquire();
        tokio::pin!(waiting);
        let brief = Duration::from_millis(50);
        timeout(brief, &mut waiting).await.expect_err("it is taken");
        turn.begin();
        turn.finish();
        let turn = waiting.await.expect("it is free");
        assert!(!turn.was_in_flight);
        assert!(other.waited() >= brief / 2);
        // One that is to stop waits no longer.
        one.stopping.cancel();
        assert!(one.acquire().await.is_none());
    }

    #[tokio::test]
    async fn death_in_a_request_is_waited_out() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("lock");
        let request_timeout = Duration::from_millis(300);
        let lock = lock_of(&path, request_timeout);
        let turn = lock.acquire().await.expect("it is free");
        turn.begin();
        drop(turn);
        let began = Instant::now();
        let turn = lock.acquire().await.expect("it is free");
        assert!(began.elapsed() >= request_timeout);
        turn.begin();
        turn.finish();
        let turn = lock.acquire().await.expect("it is free");
        assert!(!turn.was_in_flight, "the request has ended");
    }

    #[tokio::test]
    async fn replaced_file_is_locked_anew() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("lock");
        let lock = lock_of(&path, TICK);
        let old = lock.acquire().await.expect("it is free");
        let waiting = lock.acquire();
        tokio::pin!(waiting);
        let brief = Duration::from_millis(50);
        timeout(brief, &mut waiting).await.expect_err("it is taken");
        fs::remove_file(&path).expect("a file");
        let new = lock.acquire().await.expect("another file");
        drop(old);
        timeout(brief, &mut waiting)
            .await
            .expect_err("the new one is taken");
        drop(new);
        waiting.await.expect("it is free");
    }

    #[test]
    fn file_with_content_is_no_lock() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("diary");
        fs::write(&path, "Dear diary").expect("a file");
        usable(&path).expect_err("it holds something");
        usable(directory.path()).expect_err("a directory");
        usable(&directory.path().join("no/such/place")).expect_err("no directory");
        usable(&directory.path().join("new")).expect("it is made");
    }
}
