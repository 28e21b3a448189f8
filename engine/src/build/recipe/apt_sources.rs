//! Where packages come from: this machine's own apt sources, as far as they concern the recipe's release.
//!
//! The project names no mirror. What apt here is set up to use for a release (a local mirror, a pinned archive) is what
//! a root disk of that release is made from; without any, mmdebstrap has its own default.

use std::fs;
use std::path::Path;

/// The entries of `/etc/apt` (sources.list and sources.list.d) that serve `suite`, its updates and its security fixes.
pub fn for_suite(etc_apt: &Path, suite: &str) -> AptSources {
    let mut sources = AptSources::default();
    let mut files = vec![etc_apt.join("sources.list")];
    let parts = fs::read_dir(etc_apt.join("sources.list.d")).into_iter().flatten().flatten();
    let mut parts: Vec<_> = parts.map(|entry| entry.path()).collect();
    parts.sort();
    files.append(&mut parts);
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => sources.add_lines(&text, suite),
            Some("sources") => sources.add_stanzas(&text, suite),
            _ => {}
        }
    }
    sources
}

/// AptSources in apt's two notations.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct AptSources {
    /// One entry a line: the contents of a `.list` file.
    pub lines: String,
    /// Paragraphs of fields: the contents of a `.sources` file.
    pub stanzas: String,
}

impl AptSources {
    fn add_lines(&mut self, text: &str, suite: &str) {
        for line in text.lines() {
            // deb [option=value ...] URI SUITE COMPONENT...
            let Some(rest) = line.trim().strip_prefix("deb").filter(|rest| rest.starts_with([' ', '\t']))
            else {
                continue;
            };
            let rest = rest.trim_start();
            let rest = match rest.strip_prefix('[') {
                Some(options) => options.split_once(']').map_or("", |(_, rest)| rest),
                None => rest,
            };
            let mut words = rest.split_whitespace().skip(1);
            if words.next().is_some_and(|word| serves(word, suite)) && words.any(|word| word == "main") {
                self.lines.push_str(line.trim());
                self.lines.push('\n');
            }
        }
    }

    fn add_stanzas(&mut self, text: &str, suite: &str) {
        for stanza in text.split("\n\n") {
            let field = |name: &str| {
                stanza.lines().find_map(|line| {
                    let (key, value) = line.split_once(':')?;
                    key.eq_ignore_ascii_case(name).then(|| value.split_whitespace().collect::<Vec<_>>())
                })
            };
            let has = |name, word: &str| field(name).is_some_and(|words| words.contains(&word));
            let suites: Vec<&str> = field("Suites").unwrap_or_default();
            let suites: Vec<&str> = suites.into_iter().filter(|word| serves(word, suite)).collect();
            let off = field("Enabled").is_some_and(|words| words == ["no"]);
            if suites.is_empty() || off || !has("Types", "deb") || !has("Components", "main") {
                continue;
            }
            for line in stanza.lines().filter(|line| !line.starts_with('#')) {
                match line.split_once(':') {
                    Some((key, _)) if key.eq_ignore_ascii_case("Suites") => {
                        self.stanzas.push_str(&format!("Suites: {}", suites.join(" ")));
                    }
                    Some((key, _)) if key.eq_ignore_ascii_case("Types") => {
                        self.stanzas.push_str("Types: deb")
                    }
                    _ => self.stanzas.push_str(line),
                }
                self.stanzas.push('\n');
            }
            self.stanzas.push('\n');
        }
    }
}

/// Whether an archive's suite is the release or one of its companions; third parties use other names.
fn serves(word: &str, suite: &str) -> bool {
    let word = word.trim_end_matches('/');
    word.strip_prefix(suite).is_some_and(|rest| matches!(rest, "" | "-updates" | "-security" | "/updates"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_serves_the_release_is_taken_and_nothing_else() {
        let dir = tempfile::TempDir::new().unwrap();
        let parts = dir.path().join("sources.list.d");
        fs::create_dir(&parts).unwrap();
        let list = "# deb http://commented bookworm main\n\
            deb [arch=amd64 signed-by=/k.gpg] http://mirror/debian bookworm main contrib\n\
            deb-src http://mirror/debian bookworm main\n\
            deb http://mirror/debian trixie main\n\
            deb http://vendor/debian bookworm stable\n\
            deb\thttp://mirror/security bookworm-security main\n\
            debug bookworm main\n";
        fs::write(dir.path().join("sources.list"), list).unwrap();
        let stanzas = "Types: deb deb-src\n# why\nURIs: http://mirror/debian\nSuites: bookworm trixie bookworm-updates\n\
            Components: main\nSigned-By:\n -----BEGIN\n .\n\n\
            Types: deb\nURIs: http://off\nSuites: bookworm\nComponents: main\nEnabled: no\n\n\
            Types: deb\nURIs: http://node\nSuites: nodistro\nComponents: main\n";
        fs::write(parts.join("debian.sources"), stanzas).unwrap();
        fs::write(parts.join("off.sources.disabled"), stanzas).unwrap();
        let sources = for_suite(dir.path(), "bookworm");
        let lines: Vec<&str> = sources.lines.lines().collect();
        assert_eq!(
            lines,
            [
                "deb [arch=amd64 signed-by=/k.gpg] http://mirror/debian bookworm main contrib",
                "deb\thttp://mirror/security bookworm-security main"
            ]
        );
        let expected = "Types: deb\nURIs: http://mirror/debian\nSuites: bookworm bookworm-updates\nComponents: main\n\
            Signed-By:\n -----BEGIN\n .\n\n";
        assert_eq!(sources.stanzas, expected);
        assert_eq!(for_suite(dir.path(), "sid"), AptSources::default());
        assert_eq!(for_suite(&dir.path().join("absent"), "bookworm"), AptSources::default());
    }
}
