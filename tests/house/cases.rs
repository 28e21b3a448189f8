//! Small made-up workspaces: what the tests of the house find, and what they rightly let pass.

use crate::graph::Graph;
use crate::modules::House;
use crate::packages::packages;
use crate::{circles, of_the_terminal, out_of_place, rooms, wrong_crates, wrong_dependencies};

const ROOT: &str = "[workspace]\nmembers = [\"engine\", \"fs\", \"vmm\"]\n[package]\nname = \"forkd\"\n";

/// A workspace of these files, and of a manifest and an empty library for each member that has none.
fn house(files: &[(&str, &str)]) -> House {
    let read = |path: &str| {
        let given = files.iter().find(|(name, _)| *name == path).map(|(_, text)| (*text).to_owned());
        given.or_else(|| match path.split_once('/') {
            None if path == "Cargo.toml" => Some(ROOT.to_owned()),
            Some((name, "Cargo.toml")) => Some(format!("[package]\nname = \"forkd-{name}\"\n")),
            Some((name, "src/lib.rs")) if name != "src" => Some(String::new()),
            _ => None,
        })
    };
    House::open(packages(&read), &read)
}

/// The circles between files of a library with these modules, all of them the root's children unless one is `lib`.
fn circles_of(files: &[(&str, &str)]) -> Vec<String> {
    let declared: String = files.iter().map(|(name, _)| format!("mod {name};\n")).collect();
    let named: Vec<(String, &str)> =
        files.iter().map(|(name, text)| (format!("src/{name}.rs"), *text)).collect();
    let mut all: Vec<(&str, &str)> = named.iter().map(|(name, text)| (name.as_str(), *text)).collect();
    if !files.iter().any(|(name, _)| *name == "lib") {
        all.push(("src/lib.rs", &declared));
    }
    circles(&Graph::of_files(&house(&all).imports()))
}

#[test]
fn a_straight_circle_is_found_with_its_lines() {
    let found =
        circles_of(&[("a", "\nuse crate::b::B;\npub struct A;"), ("b", "pub struct B;\nuse super::a::A;")]);
    assert_eq!(found, ["src/a.rs:2 -> src/b.rs\nsrc/b.rs:2 -> src/a.rs\n"]);
}

#[test]
fn a_circle_round_a_corner_is_found_once() {
    let found = circles_of(&[
        ("a", "use crate::b::B;"),
        ("b", "pub struct B(crate::c::C);"),
        ("c", "pub struct C;\nfn f() { println!(\"{}\", 1 + crate::a::one()) }"),
    ]);
    assert_eq!(found, ["src/a.rs:1 -> src/b.rs\nsrc/b.rs:1 -> src/c.rs\nsrc/c.rs:2 -> src/a.rs\n"]);
}

#[test]
fn two_circles_through_one_file_are_two() {
    let found = circles_of(&[
        ("a", "use crate::{b::B, c::C};\npub struct A;"),
        ("b", "use crate::a::A; pub struct B;"),
        ("c", "use crate::a::A; pub struct C;"),
    ]);
    assert_eq!(found.len(), 2, "{found:#?}");
}

#[test]
fn a_circle_through_a_re_export_ends_at_the_file_that_defines() {
    let files = [
        ("lib", "mod parent; mod other;"),
        ("parent", "mod child;\npub use child::Thing;"),
        ("parent/child", "use crate::other::Other;\npub struct Thing;"),
        ("other", "use crate::parent::Thing;\npub struct Other;"),
    ];
    assert_eq!(
        circles_of(&files),
        ["src/other.rs:1 -> src/parent/child.rs\nsrc/parent/child.rs:1 -> src/other.rs\n"]
    );
}

#[test]
fn re_exports_of_re_exports_and_of_all_names_resolve_too() {
    let files = [
        ("lib", "mod parent; mod other; pub use parent::*;"),
        ("parent", "mod child;\npub use child::Thing as Renamed;"),
        ("parent/child", "pub struct Thing(crate::other::Other);"),
        ("other", "pub struct Other;\nfn f() -> crate::Renamed { todo!() }"),
    ];
    assert_eq!(
        circles_of(&files),
        ["src/other.rs:2 -> src/parent/child.rs\nsrc/parent/child.rs:1 -> src/other.rs\n"]
    );
}

#[test]
fn a_parent_that_uses_its_child_is_in_a_circle_with_a_child_that_uses_the_parent() {
    let child = ("parent/child", "use super::Shared;\npub struct Thing;");
    let root = ("lib", "mod parent;");
    let declares = ("parent", "mod child;\npub use child::Thing;\npub struct Shared;");
    assert!(circles_of(&[root, declares, child]).is_empty());
    let uses = ("parent", "mod child;\npub use child::Thing;\npub struct Shared;\nfn f(_: Thing) {}");
    assert_eq!(
        circles_of(&[root, uses, child]),
        ["src/parent.rs:4 -> src/parent/child.rs\nsrc/parent/child.rs:1 -> src/parent.rs\n"]
    );
}

#[test]
fn modules_in_line_at_other_paths_and_in_folders_are_found() {
    let files = [
        ("lib", "mod a { pub mod inner; }\n#[path = \"elsewhere/b.rs\"]\nmod b;\nmod c;"),
        ("a/inner", "pub fn f() { crate::b::f() }"),
        ("elsewhere/b", "pub fn f() { crate::c::f() }"),
        ("c/mod", "use crate::a;\npub fn f() { a::inner::f() }"),
    ];
    assert_eq!(
        circles_of(&files),
        ["src/a/inner.rs:1 -> src/elsewhere/b.rs\n\
          src/elsewhere/b.rs:1 -> src/c/mod.rs\n\
          src/c/mod.rs:2 -> src/a/inner.rs\n"]
    );
}

#[test]
fn tests_variables_and_names_of_other_crates_are_no_imports() {
    let of_tests = "#[cfg(test)]\nmod tests { use crate::b::B; }\n#[cfg(all(test, unix))]\nuse crate::b::B;\n\
        #[test]\nfn f() { crate::b::f() }";
    let no_imports = "use crate::a;\nfn f(lib: u8) { let a = std::a::f(lib); println!(\"{a}\", a = a.b()); }";
    let found = circles_of(&[
        ("lib", "mod a;\nmod b;\n#[cfg(test)]\nmod absent;"),
        ("a", of_tests),
        ("b", no_imports),
    ]);
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn a_crate_that_imports_upwards_or_sideways_is_found() {
    let house = house(&[
        (
            "fs/Cargo.toml",
            "[package]\nname = \"forkd-fs\"\n[dependencies]\nvm = { package = \"forkd-vmm\" }\n",
        ),
        ("fs/src/lib.rs", "\nuse forkd_engine::Progress;\npub use forkd_vmm::Machine;"),
        (
            "vmm/Cargo.toml",
            "[package]\nname = \"forkd-vmm\"\n[dev-dependencies]\nforkd-fs = {}\nserde = \"1\"\n",
        ),
        ("vmm/src/lib.rs", "#[cfg(test)]\nuse forkd_fs::Store;"),
        ("engine/src/lib.rs", "pub struct Progress;\nuse forkd_fs::Store;\nuse forkd_vmm::Machine;"),
    ]);
    assert_eq!(wrong_dependencies(&house), ["fs's Cargo.toml depends on vmm"]);
    assert_eq!(
        wrong_crates(&house, &house.imports()),
        ["fs/src/lib.rs:2 -> engine/src/lib.rs", "fs/src/lib.rs:3 -> vmm/src/lib.rs"]
    );
}

#[test]
fn a_crate_named_out_of_its_place_is_found() {
    let house = house(&[
        ("fs/src/lib.rs", "mod fuse;\nmod tree;"),
        ("fs/src/fuse.rs", "use fuser::Filesystem;"),
        ("fs/src/tree.rs", "use std::fmt;\nfn f() -> fuser::Errno { fuser::Errno }"),
    ]);
    let faults = out_of_place(&house.imports());
    assert!(!faults.is_empty() && faults.iter().all(|fault| fault == "fs/src/tree.rs:2 names fuser::Errno"));
}

#[test]
fn an_engine_that_writes_to_the_terminal_is_found() {
    let house = house(&[
        ("src/lib.rs", "fn f() { println!(); }"),
        (
            "engine/src/lib.rs",
            "use std::env;\nfn f() { env::var(\"A\"); env::temp_dir(); }\nfn g() { ok(print!(\"b\")) }",
        ),
    ]);
    assert_eq!(
        of_the_terminal(&house.imports()),
        ["engine/src/lib.rs:2 names std::env::var", "engine/src/lib.rs:3 names print"]
    );
}

#[test]
fn rooms_that_import_each_other_are_found_though_their_files_do_not() {
    let house = house(&[
        (
            "engine/src/lib.rs",
            "mod hub { pub mod pull; pub mod serve; }\nmod local { pub mod paths; pub mod mounts; }",
        ),
        ("engine/src/hub/pull.rs", "use crate::local::paths::Paths;"),
        ("engine/src/hub/serve.rs", "pub struct Serve;"),
        ("engine/src/local/paths.rs", "pub struct Paths;"),
        ("engine/src/local/mounts.rs", "use crate::hub::serve::Serve;"),
    ]);
    assert!(circles(&Graph::of_files(&house.imports())).is_empty());
    let hub = "hub -> local: engine/src/hub/pull.rs:1 -> engine/src/local/paths.rs\n";
    let local = "local -> hub: engine/src/local/mounts.rs:1 -> engine/src/hub/serve.rs\n";
    assert_eq!(circles(&rooms(&house.imports())), [format!("{hub}{local}")]);
}
