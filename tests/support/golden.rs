//! Comparison with the files under `tests/golden`, byte for byte. `FORKD_GOLDEN=write` writes them anew instead.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{env, fs};

use similar::TextDiff;

/// One folder of golden files, compared by one test.
pub struct Golden {
    dir: PathBuf,
    write: bool,
    seen: BTreeSet<String>,
    differences: Vec<String>,
}

impl Golden {
    pub fn open(folder: &str) -> Golden {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(folder);
        let write = env::var_os("FORKD_GOLDEN").is_some_and(|value| value == "write");
        if write {
            fs::create_dir_all(&dir).unwrap();
        }
        Golden { dir, write, seen: BTreeSet::new(), differences: Vec::new() }
    }

    /// Compares one file. Differences are kept, so that one run shows them all.
    pub fn check(&mut self, name: &str, actual: &str) {
        assert!(self.seen.insert(name.to_owned()), "{name} is compared twice");
        let path = self.dir.join(name);
        if self.write {
            return fs::write(&path, actual).unwrap();
        }
        match fs::read_to_string(&path) {
            Ok(golden) if golden == actual => {}
            Ok(golden) => {
                let diff = TextDiff::from_lines(golden.as_str(), actual);
                let diff = diff.unified_diff().context_radius(2).header("golden", "now").to_string();
                self.differences.push(format!("{} differs:\n{diff}", path.display()));
            }
            Err(error) => {
                self.differences.push(format!("{}: {error}; it would be:\n{actual}", path.display()))
            }
        }
    }

    /// Fails when a file differed, or when the folder holds one that nobody compared.
    pub fn finish(mut self) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten() {
            let entry = entry.unwrap();
            if self.seen.contains(entry.file_name().to_str().unwrap()) {
                continue;
            }
            if self.write {
                fs::remove_file(entry.path()).unwrap();
            } else {
                self.differences.push(format!("{} belongs to nothing", entry.path().display()));
            }
        }
        let (count, all) = (self.differences.len(), self.differences.join("\n"));
        assert!(count == 0, "{count} golden files differ; FORKD_GOLDEN=write writes them anew\n\n{all}");
    }
}

/// What differs from run to run and takes a fixed name instead.
#[derive(Default)]
pub struct Names(Vec<(String, String)>);

impl Names {
    /// `text` is called `<name>` from here on. What is named first is looked for first.
    pub fn name(&mut self, text: impl Into<String>, name: &str) {
        self.0.push((text.into(), format!("<{name}>")));
    }

    /// A path, also where links in it have been followed.
    pub fn path(&mut self, path: &Path, name: &str) {
        if let Ok(real) = path.canonicalize() {
            self.name(real.to_str().unwrap(), name);
        }
        self.name(path.to_str().unwrap(), name);
    }

    /// With the names, and with log lines that tell neither the time nor the module.
    pub fn apply(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (from, to) in &self.0 {
            text = text.replace(from, to);
        }
        text.split_inclusive('\n').map(|line| log_line(line).unwrap_or_else(|| line.to_owned())).collect()
    }
}

/// A log line is `2026-01-02T03:04:05.678901Z  WARN module: text`.
fn log_line(line: &str) -> Option<String> {
    let (time, rest) = line.split_once(' ')?;
    let is_time = time.len() == 27 && time.ends_with('Z') && time.as_bytes()[10] == b'T';
    let (level, rest) = rest.trim_start().split_once(' ').filter(|_| is_time)?;
    let (_module, said) = rest.split_once(": ")?;
    Some(format!("<time> {level} <module>: {said}"))
}

/// A JSON document in which the values of some keys, also those in arrays, are placeholders of the same type. Everything
/// else stays as it is: the order of the keys, and the layout.
///
/// A key followed by `?` may be null: there, null is a placeholder too.
pub fn with_placeholders(document: &str, keys: &[&str]) -> String {
    let mut open: Vec<&str> = Vec::new();
    let mut out = String::new();
    for line in document.split_inclusive('\n') {
        let body = line.trim();
        let (key, value) = match body.strip_prefix('"').and_then(|rest| rest.split_once("\": ")) {
            Some((key, value)) => (key, value),
            None => (open.last().copied().unwrap_or_default(), body),
        };
        match value {
            "{" | "[" => open.push(key),
            "}" | "]" | "}," | "]," => drop(open.pop()),
            _ => {}
        }
        let scalar = value.strip_suffix(',').unwrap_or(value);
        let nullable = keys.iter().any(|wanted| wanted.strip_suffix('?') == Some(key));
        let replaced = match placeholder(scalar) {
            Some(_) if nullable => Some("\"<any>\""),
            Some(placeholder) if keys.contains(&key) => Some(placeholder),
            _ => None,
        };
        match replaced {
            Some(placeholder) => {
                let at = line.rfind(scalar).unwrap();
                out.push_str(&line[..at]);
                out.push_str(placeholder);
                out.push_str(&line[at + scalar.len()..]);
            }
            None => out.push_str(line),
        }
    }
    out
}

fn placeholder(scalar: &str) -> Option<&'static str> {
    let first = scalar.bytes().next()?;
    match first {
        b'"' => Some("\"<text>\""),
        b'0'..=b'9' | b'-' if scalar.contains(['.', 'e']) => Some("0.0"),
        b'0'..=b'9' | b'-' => Some("0"),
        b't' | b'f' => Some("false"),
        b'n' => Some("null"),
        _ => None,
    }
}
