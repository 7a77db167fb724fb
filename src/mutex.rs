//! Locks mutexes, in one place so that a panic is handled in the same way everywhere.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a mutex, even if a thread has panicked while it held the lock. That panic is reported where it occurred, and
/// one failed task must not fail all others. The caches, counts and states in the program's mutexes are usable after an
/// update that was cut short.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
