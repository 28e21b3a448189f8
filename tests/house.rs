//! The house keeps its order: crates import downwards, no files import each other in a circle, and what one place only
//! may name is named there alone. Reads the sources of all crates of the workspace.

#[path = "house/cases.rs"]
mod cases;
#[path = "house/graph.rs"]
mod graph;
#[path = "house/modules.rs"]
mod modules;
#[path = "house/packages.rs"]
mod packages;
#[path = "house/references.rs"]
mod references;
#[path = "house/resolve.rs"]
mod resolve;

use std::path::Path;
use std::sync::LazyLock;

use graph::{Graph, Import, To};
use modules::House;

/// Each crate with all that it may import. Tests may import more: `[dev-dependencies]` do not count.
const ARROWS: &[(&str, &[&str])] = &[
    ("forkd", &["engine", "archive", "fs", "vmm", "abi"]),
    ("daemon", &["engine", "fs", "vmm", "abi"]),
    ("engine", &["archive", "fs", "vmm", "abi"]),
    ("archive", &[]),
    ("fs", &["abi"]),
    ("vmm", &["abi"]),
    ("guest", &["abi", "archive"]),
    ("abi", &[]),
];

/// Crates that few files may name: how the paths of those begin.
const KEPT: &[(&str, &[&str])] = &[
    ("axum", &["daemon/src"]),
    ("clap", &["src/cli"]),
    ("fuser", &["fs/src/fuse"]),
    ("reqwest", &["fs/src/source/http"]),
    (
        "kvm_ioctls",
        &[
            "vmm/src/arch.rs",
            "vmm/src/devices/bus.rs",
            "vmm/src/kvm.rs",
            "vmm/src/machine.rs",
            "vmm/src/pvm",
            "vmm/src/vcpu",
        ],
    ),
];

/// What belongs to the program at the terminal, and the engine may not name.
const OF_THE_TERMINAL: &[&str] = &[
    "clap",
    "dbg",
    "eprint",
    "eprintln",
    "print",
    "println",
    "std::env::args",
    "std::env::args_os",
    "std::env::var",
    "std::env::var_os",
    "std::env::vars",
    "std::env::vars_os",
    "std::io::stderr",
    "std::io::stdin",
    "std::io::stdout",
    "std::process::ExitCode",
    "std::process::exit",
];

/// The only files of the engine that look into the environment, and for what.
const OF_THE_ENVIRONMENT: &[(&str, &str)] = &[
    // PATH, in which the programs that a build runs are looked for, too, and the proxies that they use.
    ("engine/src/build/tools.rs", "std::env::var_os"),
    // FORKD_AGENT, the program that goes into machines.
    ("engine/src/build/recipe/agent_binary.rs", "std::env::var_os"),
];

static HOUSE: LazyLock<House> = LazyLock::new(|| {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(root.join(path)).ok();
    House::open(packages::packages(&read), &read)
});
static IMPORTS: LazyLock<Vec<Import>> = LazyLock::new(|| HOUSE.imports());

/// Fails with all faults that there are.
fn none(faults: Vec<String>) {
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

#[test]
fn manifests_depend_downwards() {
    none(wrong_dependencies(&HOUSE));
}

#[test]
fn code_imports_downwards() {
    none(wrong_crates(&HOUSE, &IMPORTS));
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    none(circles(&Graph::of_files(&IMPORTS)));
}

#[test]
fn no_rooms_of_the_engine_import_each_other_in_a_circle() {
    none(circles(&rooms(&IMPORTS)));
}

#[test]
fn what_one_place_may_name_is_named_there_alone() {
    none(out_of_place(&IMPORTS));
}

#[test]
fn the_engine_knows_no_terminal() {
    none(of_the_terminal(&IMPORTS));
}

fn may_import(from: &str, to: &str) -> bool {
    let allowed = ARROWS.iter().find(|(name, _)| *name == from);
    allowed.unwrap_or_else(|| panic!("ARROWS has no line for the crate {from}")).1.contains(&to)
}

fn wrong_dependencies(house: &House) -> Vec<String> {
    let names: Vec<&str> = house.packages.iter().map(|package| package.name.as_str()).collect();
    let pairs =
        house.packages.iter().flat_map(|from| from.dependencies.iter().map(move |to| (&from.name, to)));
    pairs
        .filter(|(from, to)| names.contains(&to.as_str()) && !may_import(from, to))
        .map(|(from, to)| format!("{from}'s Cargo.toml depends on {to}"))
        .collect()
}

fn wrong_crates(house: &House, imports: &[Import]) -> Vec<String> {
    let name = |package: usize| house.packages[package].name.as_str();
    let mut faults = Vec::new();
    for Import { from, package, line, to } in imports {
        if let To::File { file, package: other } = to
            && package != other
            && !may_import(name(*package), name(*other))
        {
            faults.push(format!("{from}:{line} -> {file}"));
        }
    }
    faults.dedup();
    faults
}

fn circles(graph: &Graph) -> Vec<String> {
    graph.circles().iter().map(|circle| graph.tell(circle)).collect()
}

/// The folders and files right below `engine/src`, with the places of their imports.
fn rooms(imports: &[Import]) -> Graph {
    let room = |file: &str| Some(file.strip_prefix("engine/src/")?.split(['/', '.']).next()?.to_owned());
    let mut graph = Graph::default();
    for Import { from, line, to, .. } in imports {
        if let To::File { file, .. } = to
            && let (Some(one), Some(other)) = (room(from), room(file))
        {
            graph.add(&one, &other, format!("{one} -> {other}: {from}:{line} -> {file}"));
        }
    }
    graph
}

fn out_of_place(imports: &[Import]) -> Vec<String> {
    let fault = |import: &Import| {
        let To::Outside(path) = &import.to else { return None };
        let (_, places) = KEPT.iter().find(|(kept, _)| *kept == path[0])?;
        let elsewhere = !places.iter().any(|place| import.from.starts_with(place));
        elsewhere.then(|| format!("{}:{} names {}", import.from, import.line, path.join("::")))
    };
    imports.iter().filter_map(fault).collect()
}

fn of_the_terminal(imports: &[Import]) -> Vec<String> {
    let fault = |import: &Import| {
        let To::Outside(path) = &import.to else { return None };
        let path = path.join("::");
        let within = |name: &&str| {
            path == *name || path.strip_prefix(*name).is_some_and(|rest| rest.starts_with("::"))
        };
        let allowed = OF_THE_ENVIRONMENT.contains(&(import.from.as_str(), path.as_str()));
        let named = import.from.starts_with("engine/") && !allowed && OF_THE_TERMINAL.iter().any(within);
        named.then(|| format!("{}:{} names {path}", import.from, import.line))
    };
    imports.iter().filter_map(fault).collect()
}
