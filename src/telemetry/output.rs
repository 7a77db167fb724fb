//! Standard output and standard error, written by a separate thread.
//!
//! A pipe that nothing reads, a terminal after Ctrl-S or a log file on a hanging disk blocks its writer. Here it blocks
//! only this thread. The queue is bounded: further log lines are dropped and counted, and the next line written reports
//! the count.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;
use tracing::Level;

use crate::mutex::lock;
use crate::telemetry::journal;
use crate::telemetry::log::{self, LogFormat};

/// How many bytes may be queued: several thousand lines.
const MAX_QUEUED: usize = 1 << 20;

/// How long to wait before a write that would block is tried again. Such a write occurs if another process that shares
/// the descriptor has made it non-blocking.
const TRY_AGAIN: Duration = Duration::from_millis(20);

/// The queue of the writing thread.
pub(crate) struct Output {
    queue: Mutex<Queue>,
    changed: Condvar,
    format: OnceLock<LogFormat>,
    /// Standard error is systemd's journal, which reads priorities.
    is_journal: bool,
}

#[derive(Default)]
struct Queue {
    pieces: VecDeque<Piece>,
    /// The size of all pieces not written yet.
    bytes: usize,
    /// Whether a piece is being written.
    writing: bool,
    /// Lines of the log that were dropped or could not be written, and have not been reported yet.
    lost: u64,
}

enum Piece {
    /// Lines of the log, for standard error.
    Lines(Vec<u8>),
    /// A frame of progress bars, for standard output.
    Frame(Vec<u8>),
    /// The output of a command, for standard output, and a channel to report that it is written.
    Answer(Vec<u8>, oneshot::Sender<io::Result<()>>),
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Output").finish_non_exhaustive()
    }
}

impl Output {
    /// Starts the writing thread.
    pub(crate) fn start(
        out: impl Write + Send + 'static,
        err: impl Write + Send + 'static,
        is_journal: bool,
    ) -> io::Result<Arc<Self>> {
        let output = Arc::new(Self {
            queue: Mutex::default(),
            changed: Condvar::new(),
            format: OnceLock::new(),
            is_journal,
        });
        let writing = Arc::clone(&output);
        thread::Builder::new()
            .name("output".into())
            .spawn(move || writing.write(out, err))?;
        Ok(output)
    }

    /// Sets the format of the log. Only the first call has an effect.
    pub(crate) fn set_format(&self, format: LogFormat) {
        self.format.get_or_init(|| format);
    }

    fn format(&self) -> LogFormat {
        self.format.get().copied().unwrap_or(LogFormat::Text)
    }

    /// Queues lines for standard error, unless the queue is full.
    pub(crate) fn lines(&self, lines: &[u8], level: Level) {
        let lines = self.with_priority(lines, level);
        let mut queue = lock(&self.queue);
        if queue.bytes + lines.len() > MAX_QUEUED {
            queue.lost += count(&lines);
            return;
        }
        queue.bytes += lines.len();
        match queue.pieces.back_mut() {
            Some(Piece::Lines(before)) => before.extend_from_slice(&lines),
            _ => queue.pieces.push_back(Piece::Lines(lines.into_owned())),
        }
        self.changed.notify_all();
    }

    /// Queues a frame for standard output, unless the queue is full.
    pub(crate) fn frame(&self, frame: Vec<u8>) {
        let mut queue = lock(&self.queue);
        if queue.bytes + frame.len() <= MAX_QUEUED {
            queue.bytes += frame.len();
            queue.pieces.push_back(Piece::Frame(frame));
            self.changed.notify_all();
        }
    }

    /// Queues a command's output for standard output. It is never dropped: the caller waits until it is written.
    pub(crate) fn answer(&self, answer: Vec<u8>) -> oneshot::Receiver<io::Result<()>> {
        let (done, written) = oneshot::channel();
        let mut queue = lock(&self.queue);
        queue.bytes += answer.len();
        queue.pieces.push_back(Piece::Answer(answer, done));
        self.changed.notify_all();
        written
    }

    /// Waits until everything is written, for a limited time.
    pub(crate) fn flush(&self, within: Duration) {
        let unwritten = |queue: &mut Queue| queue.writing || !queue.pieces.is_empty();
        drop(
            self.changed
                .wait_timeout_while(lock(&self.queue), within, unwritten),
        );
    }

    fn write(&self, mut out: impl Write, mut err: impl Write) {
        let mut torn = false;
        let mut queue = lock(&self.queue);
        loop {
            let Some(piece) = queue.pieces.pop_front() else {
                queue.writing = false;
                self.changed.notify_all();
                queue = self
                    .changed
                    .wait_while(queue, |queue| queue.pieces.is_empty())
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            queue.writing = true;
            let lost = queue.lost;
            drop(queue);
            let size = match piece {
                Piece::Lines(lines) => {
                    let mut text = self.head(lost, torn);
                    let head = text.len();
                    text.extend_from_slice(&lines);
                    let written = write_all(&mut err, &text).0;
                    if let Some(last) = text[..written].last() {
                        torn = *last != b'\n';
                    }
                    let mut queue = lock(&self.queue);
                    if written >= head {
                        queue.lost -= lost;
                    }
                    queue.lost += count(&text[written.max(head)..]);
                    lines.len()
                }
                Piece::Frame(frame) => {
                    // A frame that cannot be drawn is dropped.
                    write_all(&mut out, &frame).1.ok();
                    frame.len()
                }
                Piece::Answer(answer, done) => {
                    let outcome = write_all(&mut out, &answer).1;
                    // The caller may be gone.
                    done.send(outcome).ok();
                    answer.len()
                }
            };
            queue = lock(&self.queue);
            queue.bytes -= size;
        }
    }

    /// The text before the next lines: the end of a truncated line, and the number of lost lines.
    fn head(&self, lost: u64, torn: bool) -> Vec<u8> {
        let mut head = Vec::new();
        if torn {
            head.push(b'\n');
        }
        if lost > 0 {
            let line = log::lost(self.format(), lost);
            head.extend_from_slice(&self.with_priority(line.as_bytes(), Level::ERROR));
        }
        head
    }

    /// The lines as standard error expects them.
    fn with_priority<'a>(&self, lines: &'a [u8], level: Level) -> Cow<'a, [u8]> {
        match self.is_journal && self.format() == LogFormat::Text {
            true => journal::prefixed(lines, level).into(),
            false => lines.into(),
        }
    }
}

/// The number of lines, including one whose beginning is missing.
fn count(lines: &[u8]) -> u64 {
    lines.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// Writes as much as possible, and returns how many bytes were written.
fn write_all(to: &mut impl Write, bytes: &[u8]) -> (usize, io::Result<()>) {
    let mut written = 0;
    while written < bytes.len() {
        match to.write(&bytes[written..]) {
            Ok(0) => return (written, Err(ErrorKind::WriteZero.into())),
            Ok(more) => written += more,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(TRY_AGAIN),
            Err(error) => return (written, Err(error)),
        }
    }
    (written, to.flush())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Long, because the machine may be busy.
    const TIME_LIMIT: Duration = Duration::from_secs(30);

    /// A writer under the test's control. Each write takes as many bytes as the test allows, or fails.
    struct Scripted {
        next: mpsc::Receiver<Result<usize, ErrorKind>>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Scripted {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // Blocks until the test continues.
            let most = self.next.recv().unwrap_or(Ok(usize::MAX))?;
            let taken = most.min(bytes.len());
            let mut written = self.written.lock().expect("no panic");
            written.extend_from_slice(&bytes[..taken]);
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Scene {
        output: Arc<Output>,
        outcomes: mpsc::Sender<Result<usize, ErrorKind>>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Scene {
        fn new() -> Self {
            let (outcomes, next) = mpsc::channel();
            let written = Arc::<Mutex<Vec<u8>>>::default();
            let err = Scripted {
                next,
                written: Arc::clone(&written),
            };
            let output = Output::start(io::sink(), err, false).expect("a thread");
            output.set_format(LogFormat::Json);
            Self {
                output,
                outcomes,
                written,
            }
        }

        fn lines(&self, lines: &[u8]) {
            self.output.lines(lines, Level::INFO);
        }

        fn unblock(&self, outcome: Result<usize, ErrorKind>) {
            self.outcomes.send(outcome).expect("it writes");
        }

        /// Waits until `condition` is true of the queue.
        fn until(&self, condition: impl Fn(&Queue) -> bool) {
            let (queue, waited) = self
                .output
                .changed
                .wait_timeout_while(lock(&self.output.queue), TIME_LIMIT, |queue| {
                    !condition(queue)
                })
                .expect("no panic");
            drop(queue);
            assert!(!waited.timed_out());
        }

        /// Waits until the queue is empty, and returns what was written.
        fn written(&self) -> String {
            self.until(|queue| queue.pieces.is_empty() && !queue.writing);
            let written = self.written.lock().expect("no panic").clone();
            String::from_utf8(written).expect("text")
        }
    }

    /// The numbers of lost lines reported in a log.
    fn reported(log: &str) -> Vec<u64> {
        log.lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter_map(|line| line["lines"].as_u64())
            .collect()
    }

    #[test]
    fn lines_beyond_limit_are_counted() {
        for (size, more) in [(10, 3), (1000, 1), (70_000, 40)] {
            let scene = Scene::new();
            let line = "x".repeat(size - 1) + "\n";
            let room = MAX_QUEUED / size;
            for _ in 0..room + more {
                scene.lines(line.as_bytes());
            }
            assert_eq!(
                lock(&scene.output.queue).bytes,
                room * size,
                "what is being written counts"
            );
            for _ in 0..4 {
                scene.unblock(Ok(usize::MAX));
            }
            let written = scene.written();
            assert_eq!(written.matches(&line).count(), room);
            scene.lines(b"after\n");
            let written = scene.written();
            let lost: u64 = reported(&written).iter().sum();
            assert_eq!(lost, more as u64);
            assert!(written.ends_with("after\n"), "with the next line");
            assert_eq!(lock(&scene.output.queue).bytes, 0);
        }
    }

    /// Lines that cannot be written are counted, and reported with the next line that can.
    #[test]
    fn unwritable_lines_are_counted() {
        for kind in [
            ErrorKind::BrokenPipe,
            ErrorKind::StorageFull,
            ErrorKind::Other,
        ] {
            let scene = Scene::new();
            for _ in 0..3 {
                scene.unblock(Err(kind));
                scene.lines(b"lost\n");
                assert_eq!(scene.written(), "", "and nothing is tried meanwhile");
            }
            scene.unblock(Ok(usize::MAX));
            scene.lines(b"after\n");
            let written = scene.written();
            assert_eq!(reported(&written), [3], "{written}");
            assert!(written.ends_with("after\n"));
            scene.unblock(Ok(usize::MAX));
            scene.lines(b"and on\n");
            assert_eq!(reported(&scene.written()), [3], "once");
        }
    }

    #[test]
    fn truncated_line_spoils_no_other() {
        for cut in [1, 4, 6] {
            let scene = Scene::new();
            scene.unblock(Ok(cut));
            scene.unblock(Err(ErrorKind::StorageFull));
            scene.lines(b"one\ntwo\n");
            scene.written();
            scene.unblock(Ok(usize::MAX));
            scene.lines(b"{\"after\":1}\n");
            let written = scene.written();
            assert!(written.ends_with("\n{\"after\":1}\n"), "{written}");
            assert!(!written.contains("\n\n"), "{written}");
            let whole = written.lines().filter(|line| ["one", "two"].contains(line));
            let whole = whole.count() as u64;
            assert_eq!(reported(&written), [2 - whole], "{written}");
        }
    }

    #[test]
    fn blocking_descriptor_is_waited_for() {
        for times in 1..4 {
            let scene = Scene::new();
            for _ in 0..times {
                scene.unblock(Err(ErrorKind::WouldBlock));
            }
            scene.unblock(Err(ErrorKind::Interrupted));
            scene.unblock(Ok(2));
            scene.unblock(Ok(usize::MAX));
            scene.lines(b"late\n");
            assert_eq!(scene.written(), "late\n");
        }
    }

    /// A flush waits for a stalled log for a limited time only.
    #[test]
    fn flush_of_stalled_log_is_bounded() {
        for lines in [1, 100, 100_000] {
            let scene = Scene::new();
            for _ in 0..lines {
                scene.lines(b"a line that is never read\n");
            }
            // The test ends only if the call returns.
            scene.output.flush(Duration::from_millis(10));
            assert!(lock(&scene.output.queue).bytes > 0);
            assert!(scene.written.lock().expect("no panic").is_empty());
        }
    }
}
