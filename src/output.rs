//! What a command prints: text for people, or with `--json` exactly one JSON document, on stdout.
//!
//! Commands build one serializable report and call [`Output::report`]; everything else they say goes to stderr.

use std::io::Write;

use serde::Serialize;

/// How the user asked to be answered.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    json: bool,
}

impl Output {
    /// `json`: whether `--json` was given.
    pub fn new(json: bool) -> Output {
        Output { json }
    }

    /// Whether stdout belongs to one JSON document (so text and progress bars must keep off it).
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Prints `report` as the command's only JSON document, or lets `text` render it for people.
    ///
    /// A closed stdout (`forkd images | head -1`) is not an error: the reader has what it wanted.
    pub fn report<T: Serialize>(&self, report: &T, text: impl FnOnce(&T) -> String) {
        let mut printed = if self.json {
            serde_json::to_string_pretty(report).unwrap_or_else(|error| {
                format!("{{\"error\":{{\"why\":\"{}\"}}}}", error.to_string().escape_default())
            })
        } else {
            text(report)
        };
        if !printed.is_empty() && !printed.ends_with('\n') {
            printed.push('\n');
        }
        let mut stdout = std::io::stdout().lock();
        let _ = stdout.write_all(printed.as_bytes()).and_then(|()| stdout.flush());
    }

    /// A line for people while work goes on; silent with `--json`. Goes to stderr, so stdout stays the result.
    pub fn note(&self, line: impl std::fmt::Display) {
        if !self.json {
            let _ = writeln!(std::io::stderr(), "{line}");
        }
    }
}

/// Rows in aligned columns, the first row being the heading. Columns whose heading starts with `>` align right.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let right: Vec<bool> = (0..columns)
        .map(|c| rows.first().and_then(|r| r.get(c)).is_some_and(|h| h.starts_with('>')))
        .collect();
    let cell = |row: usize, column: usize| -> &str {
        let text = rows[row].get(column).map_or("", String::as_str);
        if row == 0 { text.strip_prefix('>').unwrap_or(text) } else { text }
    };
    let widths: Vec<usize> = (0..columns)
        .map(|c| (0..rows.len()).map(|r| cell(r, c).chars().count()).max().unwrap_or(0))
        .collect();
    let mut out = String::new();
    for row in 0..rows.len() {
        let mut line = String::new();
        for (column, (&width, &right)) in widths.iter().zip(&right).enumerate() {
            if column > 0 {
                line.push_str("  ");
            }
            let text = cell(row, column);
            let padding = " ".repeat(width - text.chars().count());
            line.push_str(&if right { padding + text } else { text.to_owned() + &padding });
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_left_and_right() {
        let rows = vec![
            vec!["NAME".to_owned(), ">SIZE".to_owned()],
            vec!["a".to_owned(), "10".to_owned()],
            vec!["longer".to_owned(), "7".to_owned()],
        ];
        assert_eq!(table(&rows), "NAME    SIZE\na         10\nlonger     7\n");
        assert_eq!(table(&[]), "");
    }
}
