//! Who imports whom, and the circles in it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::modules::{By, House};
use super::resolve::Target;

/// One file names something of another, or of a crate outside of the workspace.
pub struct Import {
    pub from: String,
    pub package: usize,
    pub line: usize,
    pub to: To,
}

pub enum To {
    File {
        file: String,
        package: usize,
    },
    /// A whole path: `std::env::var`.
    Outside(Vec<String>),
}

impl House {
    /// All imports from one file to another one or to a crate outside.
    pub fn imports(&self) -> Vec<Import> {
        let mut imports = Vec::new();
        for (id, module) in self.modules.iter().enumerate() {
            for reference in &module.references {
                let to = match self.resolve(id, &reference.path) {
                    // A lone word that is a module's name is a variable.
                    Target::Module(_) if reference.path.len() == 1 && reference.by == By::Code => continue,
                    Target::Module(to) | Target::Item(to) => {
                        let to = &self.modules[to];
                        let passed_on = reference.by == By::ReExport && to.package == module.package;
                        if passed_on || to.file == module.file {
                            continue;
                        }
                        To::File { file: to.file.clone(), package: to.package }
                    }
                    Target::Outside(path) => To::Outside(path),
                };
                let (from, package, line) = (module.file.clone(), module.package, reference.line);
                imports.push(Import { from, package, line, to });
            }
        }
        imports
    }
}

/// Arrows between names, each with the place of its first import.
#[derive(Default)]
pub struct Graph(BTreeMap<String, BTreeMap<String, String>>);

impl Graph {
    /// Files, with the lines of their imports.
    pub fn of_files(imports: &[Import]) -> Graph {
        let mut graph = Graph::default();
        for import in imports {
            if let To::File { file, .. } = &import.to {
                graph.add(&import.from, file, format!("{}:{} -> {file}", import.from, import.line));
            }
        }
        graph
    }

    pub fn add(&mut self, from: &str, to: &str, place: String) {
        if from != to {
            self.0.entry(from.to_owned()).or_default().entry(to.to_owned()).or_insert(place);
        }
    }

    /// The shortest circle through each arrow that is in one, each once, the shortest first.
    pub fn circles(&self) -> Vec<Vec<&str>> {
        let arrows =
            self.0.iter().flat_map(|(from, all)| all.keys().map(move |to| (from.as_str(), to.as_str())));
        let found: BTreeSet<Vec<&str>> =
            arrows.filter_map(|(from, to)| self.way(to, from)).map(turned).collect();
        let mut circles: Vec<Vec<&str>> = found.into_iter().collect();
        circles.sort_by_key(Vec::len);
        circles
    }

    /// A shortest way, both ends included.
    fn way<'a>(&'a self, from: &'a str, to: &str) -> Option<Vec<&'a str>> {
        let mut before: BTreeMap<&str, &str> = BTreeMap::new();
        let mut ahead = VecDeque::from([from]);
        while let Some(mut at) = ahead.pop_front() {
            if at == to {
                let mut way = vec![at];
                while at != from {
                    at = before[at];
                    way.push(at);
                }
                way.reverse();
                return Some(way);
            }
            for next in self.0.get(at).into_iter().flat_map(BTreeMap::keys) {
                if next != from && !before.contains_key(next.as_str()) {
                    before.insert(next, at);
                    ahead.push_back(next);
                }
            }
        }
        None
    }

    /// The imports of a circle, one a line.
    pub fn tell(&self, circle: &[&str]) -> String {
        let arrows = circle.iter().zip(circle.iter().cycle().skip(1));
        arrows.map(|(from, to)| format!("{}\n", self.0[*from][*to])).collect()
    }
}

/// The same circle from its first name on, so that it is found once.
fn turned(mut circle: Vec<&str>) -> Vec<&str> {
    let first = (0..circle.len()).min_by_key(|&at| circle[at]).unwrap_or(0);
    circle.rotate_left(first);
    circle
}
