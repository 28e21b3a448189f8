//! Where in a recipe something stands.

use std::fmt;

use toml::de::{DeTable, DeValue};

/// One step on the way to a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// A key of a table.
    Key(&'static str),
    /// One of several, counted from 0.
    At(usize),
}

/// The way to a value.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct KeyPath(Vec<Step>);

impl KeyPath {
    /// Of keys in tables: "warm.argv".
    pub(super) fn of(text: &'static str) -> Self {
        Self(text.split('.').map(Step::Key).collect())
    }

    /// Of the `at`th table under `name`: a key in it.
    pub(super) fn within(name: &'static str, at: usize, key: &'static str) -> Self {
        let mut steps = vec![Step::Key(name), Step::At(at)];
        steps.extend(key.split('.').filter(|key| !key.is_empty()).map(Step::Key));
        Self(steps)
    }

    /// The line, counted from 1, in which the value begins, or what is nearest above it.
    pub(super) fn line(&self, text: &str) -> Option<usize> {
        let table = DeTable::parse(text).ok()?;
        let mut start = None;
        let mut value: Option<&DeValue<'_>> = None;
        for step in &self.0 {
            let found = match (step, value) {
                (Step::Key(name), None) => table.get_ref().get_key_value(*name),
                (Step::Key(name), Some(DeValue::Table(table))) => table.get_key_value(*name),
                (Step::At(at), Some(DeValue::Array(array))) => {
                    let Some(item) = array.get(*at) else { break };
                    start = Some(item.span().start);
                    value = Some(item.get_ref());
                    continue;
                }
                // One table in place of several.
                (Step::At(0), Some(DeValue::Table(_))) => continue,
                _ => None,
            };
            let Some((key, item)) = found else { break };
            start = Some(key.span().start);
            value = Some(item.get_ref());
        }
        start.map(|start| {
            text.as_bytes()[..start.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
        })
    }
}

impl fmt::Display for KeyPath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys = self.0.iter().filter_map(|step| match step {
            Step::Key(name) => Some(*name),
            Step::At(_) => None,
        });
        formatter.write_str(&keys.collect::<Vec<_>>().join("."))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "name = \"x\"\n[base]\nsuite = \"y\"\n\n[[files]]\nfrom = \"a\"\n[[files]]\nfrom = \"b\"\n\
        to = \"/b\"\n[probe]\neval = \"1\"\n";

    #[test]
    fn lines_are_those_of_the_key_or_of_what_is_above_it() {
        assert_eq!(KeyPath::of("name").line(TEXT), Some(1));
        assert_eq!(KeyPath::of("base.suite").line(TEXT), Some(3));
        assert_eq!(KeyPath::within("files", 1, "to").line(TEXT), Some(9));
        assert_eq!(KeyPath::within("files", 1, "mode").line(TEXT), Some(7));
        assert_eq!(KeyPath::within("probe", 0, "eval").line(TEXT), Some(11));
        assert_eq!(KeyPath::of("vcpus").line(TEXT), None);
        assert_eq!(KeyPath::of("name").line("= nonsense"), None);
        assert_eq!(KeyPath::within("files", 1, "to").to_string(), "files.to");
    }
}
