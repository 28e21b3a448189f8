//! From a path in a module to the file that defines what it names, through re-exports.

use super::modules::{House, Module, ModuleId};

#[derive(Debug, PartialEq)]
pub enum Target {
    /// Something that this module defines.
    Item(ModuleId),
    /// The module itself.
    Module(ModuleId),
    /// Something of a crate outside of the workspace, or no import at all: the whole path, imports resolved.
    Outside(Vec<String>),
}

/// Names that import each other in a circle are not resolved for ever.
const DEEPEST: usize = 16;

impl House {
    pub fn resolve(&self, from: ModuleId, path: &[String]) -> Target {
        self.find(from, path, DEEPEST).unwrap_or_else(|| Target::Outside(path.to_vec()))
    }

    fn find(&self, from: ModuleId, path: &[String], deepest: usize) -> Option<Target> {
        match path[0].as_str() {
            "crate" => return self.descend(self.modules[from].root, &path[1..], deepest),
            "self" | "super" => return self.descend(from, path, deepest),
            "Self" => return None,
            _ => {}
        }
        if let Some(found) = self.descend_known(from, path, deepest) {
            return Some(found);
        }
        self.beyond_bindings(from, path, deepest)
    }

    fn beyond_bindings(&self, from: ModuleId, path: &[String], deepest: usize) -> Option<Target> {
        let child = self.modules[from].children.get(&path[0]);
        self.descend(*child.or_else(|| self.libraries.get(&path[0]))?, &path[1..], deepest)
    }

    /// What `path` is in `at`. A name that nothing defines comes out of a macro: it is taken as an item of `at`.
    fn descend(&self, at: ModuleId, path: &[String], deepest: usize) -> Option<Target> {
        match path.first().map(String::as_str) {
            None => Some(Target::Module(at)),
            Some("self") => self.descend(at, &path[1..], deepest),
            Some("super") => self.descend(self.modules[at].parent?, &path[1..], deepest),
            Some(_) => self.descend_known(at, path, deepest).or(Some(Target::Item(at))),
        }
    }

    fn descend_known(&self, at: ModuleId, path: &[String], deepest: usize) -> Option<Target> {
        let Module { children, items, bindings, .. } = &self.modules[at];
        let (name, last) = (&path[0], path.len() == 1);
        let deeper = deepest.checked_sub(1)?;
        if last && items.contains(name) {
            return Some(Target::Item(at));
        }
        if let Some(&child) = children.get(name).filter(|_| !last) {
            return self.descend(child, &path[1..], deeper);
        }
        if items.contains(name) {
            return Some(Target::Item(at));
        }
        if let Some(binding) = bindings.iter().find(|binding| binding.name.as_ref() == Some(name)) {
            let whole = [&binding.path, &path[1..]].concat();
            let found = match &whole[0] == name {
                // `use log::log`: the first is no binding, or it would be itself.
                true => self.beyond_bindings(at, &whole, deeper),
                false => self.find(at, &whole, deeper),
            };
            return Some(found.unwrap_or(Target::Outside(whole)));
        }
        if let Some(&child) = children.get(name) {
            return Some(Target::Module(child));
        }
        bindings.iter().filter(|binding| binding.name.is_none()).find_map(|all| {
            match self.find(at, &all.path, deeper)? {
                Target::Module(module) => self.descend_known(module, path, deeper),
                _ => None,
            }
        })
    }
}
