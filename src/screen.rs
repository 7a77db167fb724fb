//! Standard output, where commands that take long are watched: moving pictures on a terminal, plain lines anywhere else.
//!
//! On a terminal all else that is written, the log above all, goes above the picture and does not tear it. Elsewhere there
//! is not one escape code.

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Standard output, as what it is; without a picture unless that is found out.
#[derive(Debug, Clone, Default)]
pub struct Screen {
    picture: Option<MultiProgress>,
}

impl Screen {
    /// Finds out whether anybody sees pictures.
    pub fn detect() -> Self {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let picture = (io::stdout().is_terminal() && !dumb)
            .then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stdout()));
        Self { picture }
    }

    /// Whether the picture tells the most of what a log would say as a warning.
    pub fn is_picture(&self) -> bool {
        self.picture.is_some()
    }

    /// Standard error for a log that does not tear the picture.
    pub fn log(&self) -> impl Fn() -> Log + Send + Sync + use<> {
        let screen = self.clone();
        move || Log(screen.clone())
    }

    /// Writes something that stays.
    pub fn say(&self, text: &str) -> io::Result<()> {
        self.above(|| writeln!(io::stdout(), "{text}"))
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

/// One line of the log, on its way.
#[derive(Debug)]
pub struct Log(Screen);

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.above(|| io::stderr().write(line))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
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
