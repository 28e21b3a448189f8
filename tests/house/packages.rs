//! What each `Cargo.toml` of the workspace says: the crates, their root files and their dependencies.

use toml::{Table, Value};

/// Reads a file by its path from the workspace's root; `None` where there is none.
pub type Read<'a> = &'a dyn Fn(&str) -> Option<String>;

pub struct Package {
    /// The name without the prefix that all but the command line's crate have: `fs` for `forkd-fs`.
    pub name: String,
    /// The name in paths: `forkd_fs`.
    pub library: String,
    /// Where the library's modules begin, and those of each program.
    pub roots: Vec<String>,
    pub has_library: bool,
    /// The names, as in `name`, of all crates that the code (not its tests) may import.
    pub dependencies: Vec<String>,
}

/// All members of the workspace, the root's own package first.
pub fn packages(read: Read) -> Vec<Package> {
    let root = manifest(read, "Cargo.toml");
    let members = root["workspace"]["members"].as_array().expect("the workspace lists its members");
    let folders = members.iter().map(|member| format!("{}/", member.as_str().expect("a member is a path")));
    std::iter::once(String::new()).chain(folders).map(|folder| package(read, &folder)).collect()
}

fn package(read: Read, folder: &str) -> Package {
    let manifest = manifest(read, &format!("{folder}Cargo.toml"));
    let full_name = manifest["package"]["name"].as_str().expect("a package has a name");
    let path_of =
        |target: &Value| target.get("path").and_then(Value::as_str).map(|path| format!("{folder}{path}"));
    let library = manifest.get("lib").and_then(path_of).unwrap_or(format!("{folder}src/lib.rs"));
    let has_library = read(&library).is_some();
    let mut roots: Vec<String> = Some(library).filter(|_| has_library).into_iter().collect();
    roots.extend(Some(format!("{folder}src/main.rs")).filter(|main| read(main).is_some()));
    let programs = manifest.get("bin").and_then(Value::as_array).into_iter().flatten().filter_map(path_of);
    for program in programs {
        if !roots.contains(&program) {
            roots.push(program);
        }
    }
    Package {
        name: short(full_name),
        library: full_name.replace('-', "_"),
        roots,
        has_library,
        dependencies: dependencies(&manifest),
    }
}

/// What `[dependencies]`, `[build-dependencies]` and those of one target only name; a renamed crate by its own name.
fn dependencies(manifest: &Table) -> Vec<String> {
    let targets = manifest.get("target").and_then(Value::as_table);
    let per_target = targets.into_iter().flat_map(Table::values).filter_map(Value::as_table);
    std::iter::once(manifest)
        .chain(per_target)
        .flat_map(|table| ["dependencies", "build-dependencies"].map(|kind| table.get(kind)))
        .filter_map(|listed| listed?.as_table())
        .flatten()
        .map(|(name, how)| short(how.get("package").and_then(Value::as_str).unwrap_or(name)))
        .collect()
}

fn manifest(read: Read, path: &str) -> Table {
    let text = read(path).unwrap_or_else(|| panic!("there is no {path}"));
    text.parse().unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn short(name: &str) -> String {
    name.strip_prefix("forkd-").unwrap_or(name).to_owned()
}
