//! The tree of modules of each crate: which file each is in, what it defines, imports and refers to.

use std::collections::{BTreeMap, BTreeSet};

use syn::{Attribute, Item, ItemMod};

use super::packages::{Package, Read};
use super::references::{Collector, is_test};

/// A module's place in [`House::modules`].
pub type ModuleId = usize;

/// The modules of all crates of the workspace.
pub struct House {
    pub packages: Vec<Package>,
    pub modules: Vec<Module>,
    /// The root module of each library by its name in paths.
    pub libraries: BTreeMap<String, ModuleId>,
}

#[derive(Default)]
pub struct Module {
    /// The place of its crate in [`House::packages`].
    pub package: usize,
    pub root: ModuleId,
    pub parent: Option<ModuleId>,
    pub file: String,
    pub children: BTreeMap<String, ModuleId>,
    /// The names of what it defines, modules excepted.
    pub items: BTreeSet<String>,
    pub bindings: Vec<Binding>,
    pub references: Vec<Reference>,
}

/// What a `use` brings into a module.
pub struct Binding {
    /// `None` for `*`: all names of `path`.
    pub name: Option<String>,
    pub path: Vec<String>,
}

/// A path that a module names.
pub struct Reference {
    pub path: Vec<String>,
    pub line: usize,
    pub by: By,
}

#[derive(Clone, Copy, PartialEq)]
pub enum By {
    Code,
    Use,
    /// A `use` with a visibility: no import of a file of the same crate, for it only passes a name on.
    ReExport,
}

/// Where the files of a module's children are.
struct Place {
    /// The folder of the module's file: what `#[path]` outside of inline modules counts from.
    beside: String,
    /// The folder of its children.
    below: String,
    inline: bool,
}

impl House {
    pub fn open(packages: Vec<Package>, read: Read) -> House {
        let mut house = House { packages, modules: Vec::new(), libraries: BTreeMap::new() };
        for package in 0..house.packages.len() {
            let roots = house.packages[package].roots.clone();
            for (place, root) in roots.into_iter().enumerate() {
                let id = house.add(Module { package, root: house.modules.len(), ..Module::default() });
                house.load(id, root, true, read);
                if place == 0 && house.packages[package].has_library {
                    house.libraries.insert(house.packages[package].library.clone(), id);
                }
            }
        }
        house
    }

    fn add(&mut self, module: Module) -> ModuleId {
        self.modules.push(module);
        self.modules.len() - 1
    }

    /// Reads a module's file and all below it. `folder_is_its_own` is true for `lib.rs`, `main.rs` and `mod.rs`.
    fn load(&mut self, id: ModuleId, file: String, folder_is_its_own: bool, read: Read) {
        let text = read(&file).unwrap_or_else(|| panic!("there is no {file}"));
        let parsed = syn::parse_file(&text).unwrap_or_else(|error| panic!("{file}: {error}"));
        let (folder, name) = file.rsplit_once('/').unwrap_or(("", &file));
        let beside = folder.to_owned();
        let below =
            if folder_is_its_own { beside.clone() } else { join(folder, name.trim_end_matches(".rs")) };
        self.modules[id].file = file;
        self.fill(id, &parsed.items, &Place { beside, below, inline: false }, read);
    }

    fn fill(&mut self, id: ModuleId, items: &[Item], place: &Place, read: Read) {
        let mut collector = Collector::default();
        for item in items {
            match item {
                Item::Mod(module) if !is_test(&module.attrs) => self.enter(id, module, place, read),
                Item::Mod(_) => {}
                other => collector.item(other),
            }
        }
        let module = &mut self.modules[id];
        module.items = collector.items;
        module.bindings = collector.bindings;
        module.references = collector.references;
    }

    fn enter(&mut self, parent: ModuleId, module: &ItemMod, place: &Place, read: Read) {
        let name = module.ident.to_string();
        let Module { package, root, ref file, .. } = self.modules[parent];
        let file = file.clone();
        let id = self.add(Module { package, root, parent: Some(parent), file, ..Module::default() });
        self.modules[parent].children.insert(name.clone(), id);
        if let Some((_, items)) = &module.content {
            let below = join(&place.below, &name);
            return self.fill(id, items, &Place { beside: place.beside.clone(), below, inline: true }, read);
        }
        if let Some(path) = path_attribute(&module.attrs) {
            let from = if place.inline { &place.below } else { &place.beside };
            return self.load(id, join(from, &path), true, read);
        }
        let flat = join(&place.below, &format!("{name}.rs"));
        if read(&flat).is_some() {
            self.load(id, flat, false, read);
        } else {
            self.load(id, join(&place.below, &format!("{name}/mod.rs")), true, read);
        }
    }
}

/// The file of `#[path = "file"]`.
fn path_attribute(attributes: &[Attribute]) -> Option<String> {
    attributes.iter().filter(|attribute| attribute.path().is_ident("path")).find_map(|attribute| {
        let syn::Expr::Lit(value) = &attribute.meta.require_name_value().ok()?.value else { return None };
        let syn::Lit::Str(path) = &value.lit else { return None };
        Some(path.value())
    })
}

/// `folder/path` without its `..`.
fn join(folder: &str, path: &str) -> String {
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in path.split('/') {
        match part {
            ".." => drop(parts.pop()),
            "." | "" => {}
            other => parts.push(other),
        }
    }
    parts.join("/")
}
