//! systemd's journal, which reads the priority of each line.

use std::ffi::OsStr;
use std::io;

use rustix::fs::fstat;
use tracing::Level;

/// Whether standard error is the journal. systemd names that file in the environment.
pub(crate) fn is_standard_error() -> bool {
    let Ok(stat) = fstat(io::stderr()) else {
        return false;
    };
    names(
        std::env::var_os("JOURNAL_STREAM").as_deref(),
        stat.st_dev,
        stat.st_ino,
    )
}

/// Whether `JOURNAL_STREAM` names this file, by its device and inode. A process may have inherited the variable but
/// have another standard error.
fn names(variable: Option<&OsStr>, device: u64, number: u64) -> bool {
    let named = variable
        .and_then(OsStr::to_str)
        .and_then(|text| text.split_once(':'));
    named == Some((&device.to_string(), &number.to_string()))
}

/// The lines of an event, each with the priority of its level, because the journal treats each line as a message.
pub(crate) fn prefixed(lines: &[u8], level: Level) -> Vec<u8> {
    let priority: &[u8] = match level {
        Level::ERROR => b"<3>",
        Level::WARN => b"<4>",
        Level::INFO => b"<6>",
        _ => b"<7>",
    };
    let mut prefixed = Vec::with_capacity(lines.len() + priority.len());
    for line in lines.split_inclusive(|byte| *byte == b'\n') {
        prefixed.extend_from_slice(priority);
        prefixed.extend_from_slice(line);
    }
    prefixed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn journal_is_recognized_by_its_file() {
        let is_named = |variable: &str| names(Some(OsStr::new(variable)), 8, 4711);
        assert!(is_named("8:4711"));
        for other in ["8:4712", "9:4711", "8:47", "8", "", ":", "8:4711:1"] {
            assert!(!is_named(other), "{other}");
        }
        assert!(!names(None, 8, 4711));
    }

    #[test]
    fn every_line_has_the_priority() {
        let lines = b"a bug: panicked\n   0: frame\n   1: frame\n";
        let expected = b"<3>a bug: panicked\n<3>   0: frame\n<3>   1: frame\n";
        assert_eq!(prefixed(lines, Level::ERROR), expected);
        assert_eq!(prefixed(b"torn", Level::DEBUG), b"<7>torn");
        assert_eq!(prefixed(b"", Level::INFO), b"");
    }
}
