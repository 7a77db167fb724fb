//! Output of long commands: progress bars on a terminal, plain lines anywhere else.
//!
//! On a terminal, other output, such as the log, appears above the bars and does not tear them. Elsewhere there are no
//! escape codes. Nothing here blocks, even if nothing reads the output, because a separate thread writes it (`output`).

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};
use rustix::termios::tcgetwinsize;

use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

use crate::mutex::lock;
use crate::telemetry::journal;
use crate::telemetry::log::LogFormat;
use crate::telemetry::output::Output;

/// The maximum frame rate of the bars.
const FRAMES_PER_SECOND: u8 = 20;

/// The rows and columns of a terminal that does not report its size.
const USUAL_SIZE: (u16, u16) = (24, 80);

/// Standard output and standard error.
#[derive(Debug, Clone)]
pub struct Terminal {
    bars: Option<MultiProgress>,
    output: Arc<Output>,
}

impl Terminal {
    /// Detects a terminal, and starts the writing thread.
    ///
    /// # Errors
    ///
    /// If the operating system refuses a thread.
    pub fn detect() -> io::Result<Self> {
        let output = Output::start(io::stdout(), io::stderr(), journal::is_standard_error())?;
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let bars = (io::stdout().is_terminal() && !dumb).then(|| {
            let terminal = Box::new(Frames {
                output: Arc::clone(&output),
                frame: Mutex::default(),
            });
            let target = ProgressDrawTarget::term_like_with_hz(terminal, FRAMES_PER_SECOND);
            MultiProgress::with_draw_target(target)
        });
        Ok(Self { bars, output })
    }

    /// Whether progress bars are shown. The demo then logs only errors, because the bars show the rest.
    pub fn is_interactive(&self) -> bool {
        self.bars.is_some()
    }

    /// Standard error for a log in this format. The log does not tear the bars.
    pub fn log(&self, format: LogFormat) -> LogWriter {
        self.output.set_format(format);
        LogWriter(self.clone())
    }

    /// Writes a text to standard output, and waits until it is written.
    pub async fn say(&self, text: &str) -> io::Result<()> {
        let line = format!("{text}\n").into_bytes();
        let written = self.with_bars_suspended(|| self.output.answer(line));
        written.await.map_err(io::Error::other)?
    }

    /// Writes lines to standard error. [`Self::flush`] waits for them.
    pub fn print_error(&self, lines: &str) {
        self.write_lines(lines.as_bytes(), Level::ERROR);
    }

    fn write_lines(&self, lines: &[u8], level: Level) {
        self.with_bars_suspended(|| self.output.lines(lines, level));
    }

    /// Waits until everything is written, for a limited time.
    pub fn flush(&self, within: Duration) {
        self.output.flush(within);
    }

    /// The progress bars, on a terminal.
    pub fn bars(&self) -> Option<&MultiProgress> {
        self.bars.as_ref()
    }

    fn with_bars_suspended<T>(&self, write: impl FnOnce() -> T) -> T {
        match &self.bars {
            Some(bars) => bars.suspend(write),
            None => write(),
        }
    }
}

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

/// One event of the log, to be written.
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

/// The terminal on which the bars are drawn, without blocking.
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
        let mut frame = lock(&self.frame);
        frame.push_str(text);
        Ok(())
    }

    /// Moves the cursor by `n` in a direction, by its letter in ECMA-48.
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
        let mut frame = lock(&self.frame);
        if !frame.is_empty() {
            self.output.frame(std::mem::take(&mut *frame).into_bytes());
        }
        Ok(())
    }
}

/// A bar with this template.
pub fn styled(template: &str) -> ProgressBar {
    // A wrong template is seen in every run, and the default style does no harm.
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━╸─");
    ProgressBar::no_length().with_style(style)
}

/// Foreign text without the control characters that a terminal would obey.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// The absolute path in readable form.
pub fn shown_in_full(path: &Path) -> String {
    shown(&std::path::absolute(path).unwrap_or_else(|_| path.to_owned()))
}

/// A path in readable form, whatever its bytes: plain, or quoted and escaped.
pub fn shown(path: &Path) -> String {
    let quoted = format!("{path:?}");
    match path.to_str() {
        Some(plain) if quoted == format!("\"{plain}\"") && !plain.contains(' ') => plain.to_owned(),
        _ => quoted,
    }
}
