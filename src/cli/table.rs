//! Tables and counts for people.

use std::io;

use comfy_table::{Table, presets};
use rustix::termios::tcgetwinsize;

use crate::telemetry::terminal::printable;

/// The width if standard output is not a terminal.
const COLUMNS: usize = 80;

/// The indentation of a text below its row.
const INDENT: &str = "    ";

/// A count with its noun.
pub(super) fn counted(count: impl Into<u64>, what: &str) -> String {
    let count = count.into();
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// A row and the text below it. The text is cut to one line.
pub(super) struct Row<const N: usize> {
    pub(super) cells: [String; N],
    pub(super) text: Option<String>,
}

/// A table with a text below each row, cut to the terminal's width or to [`COLUMNS`].
pub(super) fn table<const N: usize>(header: [&str; N], rows: &[Row<N>]) -> String {
    table_of_width(header, rows, columns())
}

fn table_of_width<const N: usize>(header: [&str; N], rows: &[Row<N>], columns: usize) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    for row in rows {
        table.add_row(row.cells.iter().map(|cell| printable(cell)));
    }
    let table = table.trim_fmt();
    let mut lines = table.lines();
    let mut shown = lines.next().unwrap_or_default().to_owned() + "\n";
    for (line, row) in lines.zip(rows) {
        shown += line;
        shown.push('\n');
        if let Some(text) = &row.text {
            shown += INDENT;
            shown += &cut(&printable(text), columns.saturating_sub(INDENT.len()));
            shown.push('\n');
        }
    }
    shown
}

/// A text of at most that many characters, with an ellipsis if it was longer.
fn cut(text: &str, characters: usize) -> String {
    if text.chars().count() <= characters {
        return text.to_owned();
    }
    let shown = text.chars().take(characters.saturating_sub(1));
    shown.chain(['…']).collect()
}

fn columns() -> usize {
    match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_col > 0 => usize::from(size.ws_col),
        _ => COLUMNS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each text is one line that fits the width.
    #[test]
    fn text_fits_on_one_line() {
        let row = |id: &str, text: Option<&str>| Row {
            cells: [id.to_owned(), "a\nb".to_owned()],
            text: text.map(str::to_owned),
        };
        let rows = [
            row("1", Some("line\nline")),
            row("22", None),
            row("3", Some(&"é".repeat(100))),
        ];
        let shown = table_of_width(["id", "reason"], &rows, 20);
        let lines: Vec<&str> = shown.lines().map(str::trim_end).collect();
        let long = format!("    {}…", "é".repeat(15));
        let expected = [
            " id  reason",
            " 1   a\u{fffd}b",
            "    line\u{fffd}line",
            " 22  a\u{fffd}b",
            " 3   a\u{fffd}b",
            &long,
        ];
        assert_eq!(lines, expected);
    }
}
