//! Every path that a module's code names: in `use`, in code, in the arguments of macros and in attributes. Code under
//! `#[cfg(test)]` is left out.

use std::collections::BTreeSet;

use proc_macro2::{TokenStream, TokenTree};
use syn::punctuated::Punctuated;
use syn::visit::{self, Visit};
use syn::{Attribute, Ident, Item, Meta, Token, UseTree, Visibility};

use super::modules::{Binding, By, Reference};

/// What one module names.
#[derive(Default)]
pub struct Collector {
    pub items: BTreeSet<String>,
    pub bindings: Vec<Binding>,
    pub references: Vec<Reference>,
}

impl Collector {
    /// Takes in an item of the module itself.
    pub fn item(&mut self, item: &Item) {
        if is_test(attributes(item)) {
            return;
        }
        self.items.extend(name(item).map(Ident::to_string));
        self.visit_item(item);
    }

    fn refer(&mut self, path: Vec<String>, line: usize, by: By) {
        self.references.push(Reference { path, line, by });
    }

    fn import(&mut self, tree: &UseTree, mut path: Vec<String>, by: By) {
        let (name, line) = match tree {
            UseTree::Path(step) => {
                path.push(step.ident.to_string());
                return self.import(&step.tree, path, by);
            }
            UseTree::Group(group) => {
                return group.items.iter().for_each(|tree| self.import(tree, path.clone(), by));
            }
            UseTree::Glob(glob) => (None, glob.star_token.spans[0].start().line),
            UseTree::Name(last) => (Some(last.ident.to_string()), last.ident.span().start().line),
            UseTree::Rename(last) => (Some(last.ident.to_string()), last.ident.span().start().line),
        };
        // `use a::{self}` and `use a::{self as b}` import `a`.
        let name = name.filter(|name| name != "self" || path.is_empty());
        path.extend(name.clone());
        let bound = match tree {
            UseTree::Rename(last) => Some(last.rename.to_string()),
            UseTree::Glob(_) => None,
            _ => name.or_else(|| path.last().cloned()),
        };
        self.refer(path.clone(), line, by);
        self.bindings.push(Binding { name: bound, path });
    }

    /// Paths in what a macro or an attribute was given, which has no structure but tokens.
    fn tokens(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let is = |at: usize, mark: char| matches!(tokens.get(at), Some(TokenTree::Punct(p)) if p.as_char() == mark);
        let mut at = 0;
        while at < tokens.len() {
            let (start, line) = (at, tokens[at].span().start().line);
            at += 1;
            match &tokens[start] {
                TokenTree::Group(group) => self.tokens(group.stream()),
                TokenTree::Ident(first) => {
                    let mut path = vec![first.to_string()];
                    while let (true, true, Some(TokenTree::Ident(next))) =
                        (is(at, ':'), is(at + 1, ':'), tokens.get(at + 2))
                    {
                        path.push(next.to_string());
                        at += 3;
                    }
                    // A lone word is a variable, a field or a key, unless it is called or looks like a type.
                    let called = is(at, '!') || matches!(tokens.get(at), Some(TokenTree::Group(_)));
                    let field = start > 0 && is(start - 1, '.') && !(start > 1 && is(start - 2, '.'));
                    if !field && (path.len() > 1 || called || path[0].starts_with(char::is_uppercase)) {
                        self.refer(path, line, By::Code);
                    }
                }
                _ => {}
            }
        }
    }
}

impl<'ast> Visit<'ast> for Collector {
    fn visit_item(&mut self, item: &'ast Item) {
        if !is_test(attributes(item)) {
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item(&mut self, item: &'ast syn::ImplItem) {
        let of_tests = match item {
            syn::ImplItem::Fn(function) => is_test(&function.attrs),
            syn::ImplItem::Const(constant) => is_test(&constant.attrs),
            _ => false,
        };
        if !of_tests {
            visit::visit_impl_item(self, item);
        }
    }

    fn visit_field(&mut self, field: &'ast syn::Field) {
        if !is_test(&field.attrs) {
            visit::visit_field(self, field);
        }
    }

    fn visit_local(&mut self, local: &'ast syn::Local) {
        if !is_test(&local.attrs) {
            visit::visit_local(self, local);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        let by = if matches!(item.vis, Visibility::Inherited) { By::Use } else { By::ReExport };
        self.import(&item.tree, Vec::new(), by);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        let line = path.segments.first().map_or(0, |first| first.ident.span().start().line);
        self.refer(names, line, By::Code);
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, called: &'ast syn::Macro) {
        self.visit_path(&called.path);
        self.tokens(called.tokens.clone());
    }

    /// `pub(in path)` is no import.
    fn visit_visibility(&mut self, _: &'ast Visibility) {}

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        if let Meta::List(list) = &attribute.meta {
            self.tokens(list.tokens.clone());
            if list.path.is_ident("serde") {
                self.serde(list.tokens.clone());
            }
        }
    }
}

impl Collector {
    /// serde takes paths as strings: `#[serde(with = "crate::digest::hex")]`.
    fn serde(&mut self, tokens: TokenStream) {
        for token in tokens {
            let TokenTree::Literal(literal) = token else { continue };
            let line = literal.span().start().line;
            let text = literal.to_string();
            let path: Vec<String> = text.trim_matches('"').split("::").map(str::to_owned).collect();
            if path.len() > 1 {
                self.refer(path, line, By::Code);
            }
        }
    }
}

/// Whether only tests see what has these attributes: `#[test]`, `#[cfg(test)]`, `#[cfg(all(test, ...))]`.
pub fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("test")
            || attribute.path().is_ident("cfg")
                && attribute.parse_args::<Meta>().is_ok_and(|meta| needs_test(&meta))
    })
}

fn needs_test(condition: &Meta) -> bool {
    let all = |list: &syn::MetaList| {
        let parts = list.parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated);
        list.path.is_ident("all") && parts.is_ok_and(|parts| parts.iter().any(needs_test))
    };
    condition.path().is_ident("test") || matches!(condition, Meta::List(list) if all(list))
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Union(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

fn name(item: &Item) -> Option<&Ident> {
    match item {
        Item::Const(item) => Some(&item.ident),
        Item::Enum(item) => Some(&item.ident),
        Item::Fn(item) => Some(&item.sig.ident),
        Item::Macro(item) => item.ident.as_ref(),
        Item::Static(item) => Some(&item.ident),
        Item::Struct(item) => Some(&item.ident),
        Item::Trait(item) => Some(&item.ident),
        Item::Type(item) => Some(&item.ident),
        Item::Union(item) => Some(&item.ident),
        _ => None,
    }
}
