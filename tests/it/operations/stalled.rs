//! Polling, delivery, `/healthz`, exit codes and time limits do not depend on whether standard error is read, or works
//! at all.

use crate::harness::process::{Process, Signal, free_address, terminal};
use crate::harness::web::succeeds;
use crate::harness::{Bench, run_live_test, side_by_side, until};
use bigchat_sync::simulator::event::message;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_setfl};

/// The time limit for an immediate end, if the machine is busy.
const AT_ONCE: Duration = Duration::from_secs(4);

/// A destination of the output, and the file that must stay open for it.
struct Sink {
    what: &'static str,
    to: OwnedFd,
    _open: Option<OwnedFd>,
}

impl Sink {
    /// Destinations that accept no more bytes, without an error.
    fn stalled() -> [Self; 3] {
        let (reader, mut pipe) = std::io::pipe().expect("a pipe");
        fcntl_setfl(&pipe, OFlags::NONBLOCK).expect("flags");
        fill(&mut pipe);
        fcntl_setfl(&pipe, OFlags::empty()).expect("flags");
        let (other, mut socket) = UnixStream::pair().expect("sockets");
        socket.set_nonblocking(true).expect("flags");
        fill(&mut socket);
        socket.set_nonblocking(false).expect("flags");
        let (mut master, slave) = terminal();
        // Ctrl-S.
        master.write_all(b"\x13").expect("a terminal");
        [
            Self::new("a full pipe", pipe, Some(reader.into())),
            Self::new("a full socket", socket, Some(other.into())),
            Self::new("a terminal after Ctrl-S", slave, Some(master.into())),
        ]
    }

    /// Destinations that fail.
    fn broken() -> [Self; 3] {
        let (_, pipe) = std::io::pipe().expect("a pipe");
        let full = File::options().write(true).open("/dev/full");
        let (_, slave) = terminal();
        [
            Self::new("a pipe without a reader", pipe, None),
            Self::new("a full disk", full.expect("a device"), None),
            Self::new("a closed terminal", slave, None),
        ]
    }

    fn all() -> impl Iterator<Item = Self> {
        Self::stalled().into_iter().chain(Self::broken())
    }

    fn new(what: &'static str, to: impl Into<OwnedFd>, open: Option<OwnedFd>) -> Self {
        Self {
            what,
            to: to.into(),
            _open: open,
        }
    }

    /// Starts a command with that output.
    fn start(&self, mut command: Command) -> Process {
        let to = || Stdio::from(self.to.try_clone().expect("a descriptor"));
        command.stdin(Stdio::null()).stdout(to()).stderr(to());
        command.env("RUST_LOG", "debug");
        Process::spawn(command)
    }
}

fn fill(sink: &mut impl Write) {
    loop {
        match sink.write(&[b'x'; 4096]) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) => panic!("{error}"),
        }
    }
}

/// A disk that does not respond: opening the file waits until a lease on it is returned, for at most 45 s.
struct HangingDisk(Process);

impl HangingDisk {
    fn with(t: &Bench) -> Self {
        // 1024: F_SETLEASE; 1: F_WRLCK.
        let lease = "$SIG{IO} = 'IGNORE'; open(F, '+<', $ARGV[0]) or die; \
                     defined(fcntl(F, 1024, 1)) or die \"$!\"; $| = 1; print 'taken'; sleep 60";
        let mut perl = Command::new("perl");
        perl.args(["-e", lease]).arg(t.db());
        perl.stdout(Stdio::piped());
        let mut holder = Process::spawn(perl);
        let mut taken = [0; 5];
        let mut output = holder.stdout();
        output.read_exact(&mut taken).expect("the lease");
        Self(holder)
    }

    /// Waits until a process is waiting for the disk.
    async fn until_awaited(&self) {
        let id = self.0.id();
        until("the database is opened", async || {
            let locks = std::fs::read_to_string("/proc/locks").expect("the locks");
            locks.lines().any(|lock| {
                let words: Vec<&str> = lock.split_whitespace().collect();
                words.contains(&"LEASE") && words.contains(&"BREAKING") && words.contains(&&*id)
            })
        })
        .await;
    }
}

/// Polling, delivery and the console do not wait for the log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_is_not_read() {
    side_by_side(Sink::all(), async |sink| {
        let what = sink.what;
        run_live_test(async |t| {
            t.differs("it is stopped before all is delivered");
            t.our_api.set_latency(Duration::from_millis(2));
            let address = free_address();
            t.set("--listen", &address);
            let now = t.now();
            t.bigchat.open(10, now - 100, 1);
            // Enough for the display of progress on a terminal.
            let events = (0..1500).map(|n| message(10, now - 5, &format!("message {n}")));
            t.bigchat.reports(events);
            let daemon = sink.start(t.program("run"));
            until(&format!("{what}: it delivers"), async || {
                t.our_api.message_count() > 600
            })
            .await;
            until(&format!("{what}: it is healthy"), async || {
                succeeds(&format!("http://{address}/healthz")).await
            })
            .await;
            let polls = t.bigchat.count("GET /events");
            until(&format!("{what}: it polls"), async || {
                t.bigchat.count("GET /events") > polls + 2
            })
            .await;
            assert_eq!(daemon.stop().await.code(), Some(0), "{what}");
        })
        .await;
    })
    .await;
}

/// A second signal ends the daemon immediately, even if its output is stalled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn second_signal_without_output() {
    side_by_side(Sink::all(), async |sink| {
        run_live_test(async |t| {
            t.set("--request-timeout", "60s");
            t.bigchat.hold(true);
            let daemon = sink.start(t.program("run"));
            until("a request", async || t.bigchat.open_requests() > 0).await;
            daemon.signal(Signal::TERM);
            daemon.signal(Signal::INT);
            let status = daemon.ends_within(AT_ONCE).await;
            assert_eq!(status.code(), Some(1), "{}", sink.what);
            t.bigchat.hold(false);
        })
        .await;
    })
    .await;
}

/// A daemon that waits for its disk stops in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hanging_disk_without_output() {
    side_by_side(Sink::all(), async |sink| {
        run_live_test(async |t| {
            t.once().await;
            let disk = HangingDisk::with(t);
            let daemon = sink.start(t.program("run"));
            disk.until_awaited().await;
            assert_eq!(daemon.stop().await.code(), Some(1), "{}", sink.what);
        })
        .await;
    })
    .await;
}

/// The exit code is the same as with working output.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_setting_without_output() {
    side_by_side(Sink::all(), async |sink| {
        run_live_test(async |t| {
            for (what, flag, token, code) in [
                ("a bad token", None, "two words", 2),
                ("a bad flag", Some("--poll-overlap=soon"), "t0ken", 2),
                (
                    "no such directory",
                    Some("--db=/nowhere/journal.db"),
                    "t0ken",
                    1,
                ),
            ] {
                let mut program = t.program("once");
                if let Some(flag) = flag {
                    program = Command::new(program.get_program());
                    program.arg("once").arg(flag);
                }
                program.env("BIGCHAT_SYNC_OUR_API_TOKEN", token);
                let what = format!("{} on {}", what, sink.what);
                let status = sink.start(program).ends_within(AT_ONCE).await;
                assert_eq!(status.code(), Some(code), "{what}");
            }
        })
        .await;
    })
    .await;
}

/// Polling continues, and the daemon stops in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn systemd_socket_is_full() {
    run_live_test(async |t| {
        let socket = t.directory().join("notify");
        // The manager never reads.
        let _manager = UnixDatagram::bind(&socket).expect("a socket");
        let mut run = t.program("run");
        run.env("NOTIFY_SOCKET", &socket)
            .env("WATCHDOG_USEC", "2000")
            .env_remove("WATCHDOG_PID")
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let daemon = Process::spawn(run);
        let full = UnixDatagram::unbound().expect("a socket");
        full.set_nonblocking(true).expect("flags");
        until("it takes no more", async || {
            full.send_to(b"STATUS=", &socket)
                .is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
        })
        .await;
        let polls = t.bigchat.count("GET /events");
        until("it polls", async || {
            t.bigchat.count("GET /events") > polls + 5
        })
        .await;
        assert_eq!(daemon.stop().await.code(), Some(0));
    })
    .await;
}
