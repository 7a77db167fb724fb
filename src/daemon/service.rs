//! The service manager: systemd is notified of the daemon's start, status and stop, and that it is not stuck.
//!
//! Nothing is sent if no service manager started the process (no `NOTIFY_SOCKET`). The watchdog is notified only while
//! nothing is stuck. Without these notifications, systemd kills the process and starts another, which continues from
//! the journal.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// How often the status is sent.
const STATUS_EVERY: Duration = Duration::from_secs(10);

/// By how much the start is extended each time, while a disk is full, a database is locked or a large one is upgraded.
const EXTENSION: Duration = Duration::from_secs(30);

type Notify = dyn Fn(&[NotifyState<'_>]) -> io::Result<()> + Send + Sync;

/// The service manager, if there is one.
#[derive(Clone, Default)]
pub struct SystemdNotifier(Option<Arc<Present>>);

struct Present {
    notify: Box<Notify>,
    watchdog: Option<Duration>,
    unheard: AtomicBool,
}

impl fmt::Debug for SystemdNotifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let watchdog = self.0.as_ref().map(|present| present.watchdog);
        f.debug_tuple("SystemdNotifier").field(&watchdog).finish()
    }
}

impl SystemdNotifier {
    /// The service manager that started this process.
    pub fn detect() -> Self {
        match std::env::var_os("NOTIFY_SOCKET") {
            Some(socket) => Self::new(sd_notify::watchdog_enabled(), move |states| {
                send(&socket, states)
            }),
            None => Self::default(),
        }
    }

    fn new(
        watchdog: Option<Duration>,
        notify: impl Fn(&[NotifyState<'_>]) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self(Some(Arc::new(Present {
            notify: Box::new(notify),
            watchdog,
            unheard: AtomicBool::new(false),
        })))
    }

    /// Waits for the start, however long it takes, and notifies the service manager that the daemon is ready.
    pub async fn during_start<T, E>(
        &self,
        start: impl Future<Output = Result<Option<T>, E>>,
    ) -> Result<Option<T>, E> {
        let more_time = async {
            loop {
                let micros = u32::try_from(EXTENSION.as_micros()).unwrap_or(u32::MAX);
                self.notify(&[NotifyState::ExtendTimeoutUsec(micros)]);
                sleep(EXTENSION / 3).await;
            }
        };
        let started = tokio::select! {
            biased;
            started = start => started?,
            () = more_time => None,
        };
        if started.is_some() {
            self.notify(&[NotifyState::Ready]);
        }
        Ok(started)
    }

    /// Sends the status, and the watchdog's notification while nothing is `stuck`. Notifies once when the daemon is to
    /// stop.
    pub async fn run_watchdog<F>(
        &self,
        stuck: impl Fn() -> Option<&'static str>,
        status: impl Fn() -> F,
        stopping: &CancellationToken,
    ) -> Infallible
    where
        F: Future<Output = String>,
    {
        let Some(present) = &self.0 else {
            return std::future::pending().await;
        };
        let watching = async {
            let Some(interval) = present.watchdog else {
                return std::future::pending().await;
            };
            let mut was_stuck = false;
            loop {
                let what = stuck();
                match what {
                    None => self.notify(&[NotifyState::Watchdog]),
                    Some(what) if !was_stuck => {
                        tracing::error!(
                            reason = what,
                            "the daemon is stuck; unless it recovers, the service manager will restart it"
                        );
                    }
                    Some(_) => {}
                }
                was_stuck = what.is_some();
                sleep(interval / 2).await;
            }
        };
        let reporting = async {
            loop {
                self.notify(&[NotifyState::Status(&status().await)]);
                sleep(STATUS_EVERY).await;
            }
        };
        let both = async { tokio::join!(watching, reporting) };
        tokio::select! {
            (never, ()) = both => match never {},
            () = stopping.cancelled() => {}
        }
        self.notify(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
        std::future::pending().await
    }

    fn notify(&self, states: &[NotifyState<'_>]) {
        let Some(present) = &self.0 else { return };
        if let Err(error) = (present.notify)(states)
            && !present.unheard.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(reason = %error, "the service manager cannot be notified");
        }
    }
}

/// Sends states to the service manager's socket. Never blocks: the daemon's work must not depend on the service
/// manager.
fn send(socket: &OsStr, states: &[NotifyState<'_>]) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    let lines: String = states.iter().map(|state| format!("{state}\n")).collect();
    let sender = UnixDatagram::unbound()?;
    sender.set_nonblocking(true)?;
    sender.send_to_addr(lines.as_bytes(), &address)?;
    Ok(())
}

/// A variable of the environment. A token file that systemd hands over (`LoadCredential=`) counts as if a variable
/// named it.
pub fn variable(name: &str) -> Option<OsString> {
    let value = std::env::var_os(name);
    if value.is_some() {
        return value;
    }
    let token = name.strip_suffix("_FILE")?;
    if std::env::var_os(token).is_some() {
        return None;
    }
    let token = token.strip_prefix("BIGCHAT_SYNC_")?;
    let file = format!("bigchat-sync.{}", token.to_lowercase().replace('_', "-"));
    let path = PathBuf::from(std::env::var_os("CREDENTIALS_DIRECTORY")?).join(file);
    path.exists().then(|| path.into_os_string())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// A service manager, and the notifications sent to it.
    fn manager(watchdog: Option<Duration>) -> (SystemdNotifier, Arc<Mutex<Vec<String>>>) {
        let sent = Arc::<Mutex<Vec<String>>>::default();
        let received = Arc::clone(&sent);
        let manager = SystemdNotifier::new(watchdog, move |states| {
            let mut sent = received.lock().expect("no panic");
            sent.extend(states.iter().map(ToString::to_string));
            Ok(())
        });
        (manager, sent)
    }

    /// The watchdog is notified only while nothing is stuck.
    #[tokio::test(start_paused = true)]
    async fn watchdog_stops_while_stuck() {
        let (manager, sent) = manager(Some(Duration::from_secs(60)));
        let stuck = AtomicBool::new(false);
        let stopping = CancellationToken::new();
        let fed = || {
            let sent = sent.lock().expect("no panic");
            sent.iter().filter(|sent| *sent == "WATCHDOG=1").count()
        };
        let attending = manager.run_watchdog(
            || stuck.load(Ordering::Relaxed).then_some("delivery"),
            async || "fine".to_owned(),
            &stopping,
        );
        let course = async {
            sleep(Duration::from_secs(301)).await;
            let before = fed();
            assert!(before >= 10, "at least every half interval: {before}");
            stuck.store(true, Ordering::Relaxed);
            sleep(Duration::from_secs(300)).await;
            assert_eq!(fed(), before);
            stuck.store(false, Ordering::Relaxed);
            sleep(Duration::from_secs(60)).await;
            assert!(fed() > before, "it may recover in time");
            stopping.cancel();
            sleep(Duration::from_secs(1)).await;
            let last = sent.lock().expect("no panic").len();
            sleep(Duration::from_secs(60)).await;
            assert_eq!(sent.lock().expect("no panic").len(), last);
        };
        tokio::select! {
            never = attending => match never {},
            () = course => {}
        }
        let sent = sent.lock().expect("no panic");
        assert_eq!(sent[sent.len() - 2..], ["STOPPING=1", "STATUS=stopping"]);
    }

    /// The time limit of a long start is extended again and again.
    #[tokio::test(start_paused = true)]
    async fn long_start_is_extended() {
        let (manager, sent) = manager(None);
        let start = async {
            sleep(Duration::from_secs(3600)).await;
            Ok::<_, Infallible>(Some(()))
        };
        let Ok(started) = manager.during_start(start).await;
        assert_eq!(started, Some(()));
        let sent = sent.lock().expect("no panic");
        let (extensions, ready) = sent.split_at(sent.len() - 1);
        assert_eq!(ready, ["READY=1"]);
        assert!(extensions.len() > 120, "before the last one ends");
        assert!(
            extensions
                .iter()
                .all(|sent| sent == "EXTEND_TIMEOUT_USEC=30000000")
        );
    }
}
