//! Standard output, where commands that take long are watched: moving pictures on a terminal, plain lines anywhere else.
//!
//! On a terminal all else that is written, the log above all, goes above the picture and does not tear it. Elsewhere there
//! is not one escape code. Nothing here blocks, whatever reads it: `output` does the writing.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};
use rustix::termios::tcgetwinsize;

use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

use crate::telemetry::journal;
use crate::telemetry::log::LogFormat;
use crate::telemetry::output::Output;

/// How often the picture is drawn anew, at most.
const FRAMES_PER_SECOND: u8 = 20;

/// The size of a terminal that does not say how large it is: rows and columns.
const USUAL_SIZE: (u16, u16) = (24, 80);

/// Standard output and standard error, as what they are.
#[derive(Debug, Clone)]
pub struct Terminal {
    picture: Option<MultiProgress>,
    output: Arc<Output>,
    /// Standard error is the journal of systemd, which reads priorities.
    is_journal: bool,
}

impl Terminal {
    /// Finds out whether anybody sees pictures, and starts to write.
    ///
    /// # Errors
    ///
    /// When the operating system has no thread left.
    pub fn detect() -> io::Result<Self> {
        let output = Output::start(io::stdout(), io::stderr())?;
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let picture = (io::stdout().is_terminal() && !dumb).then(|| {
            let terminal = Box::new(Frames {
                output: Arc::clone(&output),
                frame: Mutex::default(),
            });
            let target = ProgressDrawTarget::term_like_with_hz(terminal, FRAMES_PER_SECOND);
            MultiProgress::with_draw_target(target)
        });
        let is_journal = journal::is_standard_error();
        Ok(Self {
            picture,
            output,
            is_journal,
        })
    }

    /// Whether the picture tells the most of what a log would say as a warning.
    pub fn is_interactive(&self) -> bool {
        self.picture.is_some()
    }

    /// Standard error for a log of that format that does not tear the picture.
    pub fn log(&self, format: LogFormat) -> LogWriter {
        self.output.set_format(format, self.is_journal);
        LogWriter(self.clone())
    }

    /// Writes something that stays, and waits until it is written.
    pub async fn say(&self, text: &str) -> io::Result<()> {
        let line = format!("{text}\n").into_bytes();
        let written = self.above(|| self.output.answer(line));
        written.await.map_err(io::Error::other)?
    }

    /// Writes lines to standard error, for [`Self::flush`] to wait for.
    pub fn complain(&self, lines: &str) {
        self.write_lines(lines.as_bytes(), Level::ERROR);
    }

    fn write_lines(&self, lines: &[u8], level: Level) {
        let prefixed;
        let lines = match self.is_journal && self.output.format() == LogFormat::Text {
            true => {
                prefixed = journal::prefixed(lines, level);
                &prefixed
            }
            false => lines,
        };
        self.above(|| self.output.lines(lines));
    }

    /// Waits until everything is written, but no longer than that.
    pub fn flush(&self, within: Duration) {
        self.output.flush(within);
    }

    /// The picture, if anybody sees it.
    pub fn picture(&self) -> Option<&MultiProgress> {
        self.picture.as_ref()
    }

    fn above<T>(&self, write: impl FnOnce() -> T) -> T {
        match &self.picture {
            Some(picture) => picture.suspend(write),
            None => write(),
        }
    }
}

/// Writes the log.
#[derive(Debug)]
pub struct LogWriter(Terminal);

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = Log;

    fn make_writer(&'a self) -> Log {
        Log(self.0.clone(), Level::INFO)
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Log {
        Log(self.0.clone(), *metadata.level())
    }
}

/// One event of the log, on its way.
#[derive(Debug)]
pub struct Log(Terminal, Level);

impl Write for Log {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        self.0.write_lines(lines, self.1);
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The terminal as the picture is drawn on it: frame by frame, none of which blocks.
#[derive(Debug)]
struct Frames {
    output: Arc<Output>,
    frame: Mutex<String>,
}

impl Frames {
    fn size(&self) -> (u16, u16) {
        match tcgetwinsize(io::stdout()) {
            Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row, size.ws_col),
            _ => USUAL_SIZE,
        }
    }

    fn draw(&self, text: &str) -> io::Result<()> {
        let mut frame = self.frame.lock().unwrap_or_else(PoisonError::into_inner);
        frame.push_str(text);
        Ok(())
    }

    /// Moves the cursor by `n` in a direction, as ECMA-48 names it.
    fn move_cursor(&self, n: usize, direction: char) -> io::Result<()> {
        match n {
            0 => Ok(()),
            n => self.draw(&format!("\x1b[{n}{direction}")),
        }
    }
}

impl TermLike for Frames {
    fn width(&self) -> u16 {
        self.size().1
    }

    fn height(&self) -> u16 {
        self.size().0
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'A')
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'B')
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'C')
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'D')
    }

    fn write_line(&self, s: &str) -> io::Result<()> {
        self.draw(s)?;
        self.draw("\n")
    }

    fn write_str(&self, s: &str) -> io::Result<()> {
        self.draw(s)
    }

    fn clear_line(&self) -> io::Result<()> {
        self.draw("\r\x1b[2K")
    }

    fn flush(&self) -> io::Result<()> {
        let mut frame = self.frame.lock().unwrap_or_else(PoisonError::into_inner);
        if !frame.is_empty() {
            self.output.frame(std::mem::take(&mut *frame).into_bytes());
        }
        Ok(())
    }
}

/// A bar of this look.
pub fn styled(template: &str) -> ProgressBar {
    // A template that is wrong shows in any run; the default one does no harm.
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━╸─");
    ProgressBar::no_length().with_style(style)
}

/// What strangers wrote, without what a terminal would obey.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// A path that can be recognised, whatever its bytes: plain, or else quoted and escaped.
pub fn shown(path: &Path) -> String {
    let quoted = format!("{path:?}");
    match path.to_str() {
        Some(plain) if quoted == format!("\"{plain}\"") && !plain.contains(' ') => plain.to_owned(),
        _ => quoted,
    }
}
