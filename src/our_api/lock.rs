//! The file lock around each request to OurAPI. With it, several daemons on one machine take turns (`--our-api-lock`).
//!
//! The operating system releases the lock when its holder dies. OurAPI may then still be carrying out the holder's
//! request, so the file contains one byte while a request is in flight. A process that takes the lock and finds the
//! byte waits as long as a request may take.

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

/// The interval at which the waiting time is counted, and at which a file that cannot be locked is tried again.
const TICK: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    request_timeout: Duration,
    /// Cancelled at shutdown: no further request is begun.
    stopping: CancellationToken,
    /// The total waiting time of requests, in µs.
    waited: AtomicU64,
    /// Whether it was logged that the file cannot be locked.
    is_broken: AtomicBool,
}

impl Lock {
    /// The lock of a file, which is created if it does not exist.
    pub(super) fn new(
        path: PathBuf,
        request_timeout: Duration,
        stopping: CancellationToken,
    ) -> Self {
        Self {
            path,
            request_timeout,
            stopping,
            waited: AtomicU64::new(0),
            is_broken: AtomicBool::new(false),
        }
    }

    /// The total waiting time of requests.
    pub(super) fn waited(&self) -> Duration {
        Duration::from_micros(self.waited.load(Ordering::Relaxed))
    }

    /// Waits for the lock, or until the file can be locked; `None`: the daemon is to stop.
    pub(super) async fn acquire(&self) -> Option<Turn> {
        self.stopping.run_until_cancelled(self.wait()).await
    }

    async fn wait(&self) -> Turn {
        loop {
            let path = self.path.clone();
            // If the waiting future is dropped, the file is closed as soon as it is locked.
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

    /// Waits, counts the time, and keeps the liveness check satisfied.
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
                    liveness::record_progress(std::time::Instant::now());
                }
            }
        }
    }
}

/// The lock while it is held. Dropping this releases the lock.
#[derive(Debug)]
pub(super) struct Turn {
    file: File,
    was_in_flight: bool,
}

impl Turn {
    /// Marks a request as in flight. If the mark cannot be written, the lock still works, but the next holder does not
    /// wait for the end of the request if this process dies during it.
    pub(super) fn begin(&self) {
        self.file.set_len(1).ok();
    }

    /// Removes the mark.
    pub(super) fn finish(self) {
        self.file.set_len(0).ok();
    }
}

/// A file that cannot be used as a lock.
#[derive(Debug, Error)]
#[error("--our-api-lock {} cannot be used: {source}", shown(.path))]
pub struct LockError {
    path: PathBuf,
    source: io::Error,
}

/// Checks whether a file can be used as a lock, so that an error is reported at the start.
///
/// # Errors
///
/// If the file cannot be used as a lock.
pub fn usable(path: &Path) -> Result<(), LockError> {
    open(path).map(drop).map_err(|source| LockError {
        path: path.to_owned(),
        source,
    })
}

/// Locks the file, however long that takes.
fn lock(path: &Path) -> io::Result<Turn> {
    loop {
        let file = open(path)?;
        match file.lock() {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            locked => locked?,
        }
        let locked = file.metadata()?;
        // The file may have been deleted or replaced meanwhile. Other processes then lock the new file.
        if fs::metadata(path).is_ok_and(|named| is_same(&named, &locked)) {
            let was_in_flight = locked.len() > 0;
            return Ok(Turn {
                file,
                was_in_flight,
            });
        }
    }
}

/// Opens the file. A file with more than one byte is not even opened: it may be the database, and closing it would drop
/// the locks that this process has on it.
fn open(path: &Path) -> io::Result<File> {
    match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() || metadata.len() > 1 => {
            let why = "it is not a lock file; name a file that is empty or does not exist";
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
        let turn = one.acquire().await.expect("the lock is free");
        let waiting = other.acquire();
        tokio::pin!(waiting);
        let brief = Duration::from_millis(50);
        timeout(brief, &mut waiting)
            .await
            .expect_err("the lock is taken");
        turn.begin();
        turn.finish();
        let turn = waiting.await.expect("the lock is free");
        assert!(!turn.was_in_flight);
        assert!(other.waited() >= brief / 2);
        // A lock that is to stop does not wait.
        one.stopping.cancel();
        assert!(one.acquire().await.is_none());
    }

    /// After the holder's death during a request, the next one waits until the request has ended.
    #[tokio::test]
    async fn holder_dies_during_request() {
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
        usable(&path).expect_err("it has content");
        usable(directory.path()).expect_err("a directory");
        usable(&directory.path().join("no/such/place")).expect_err("no directory");
        usable(&directory.path().join("new")).expect("it is created");
    }
}
