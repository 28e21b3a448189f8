//! The part of the tree above the packs, as the registry lists them, and its changes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;

use rustix::io::Errno;

use super::inode::{Entry, Inode, Kind, PACK_SHIFT, ROOT};
use super::listing::PackListing;
use super::pack::PackNode;
use crate::format::is_plain_name;
use crate::store::StoreOptions;

/// The version every package has, which moves.
const LATEST: &str = "latest";

/// A name that leads elsewhere than before, or nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangedName {
    /// The directory it is in.
    pub directory: Inode,
    /// The name.
    pub name: String,
}

/// Every directory above packs, and every pack ever listed.
#[derive(Debug)]
pub(super) struct ListedTree {
    /// Inode numbers less 1.
    nodes: Vec<Node>,
    packs: Vec<Arc<PackNode>>,
    /// Inodes of the packs that have a name now.
    shown: BTreeSet<Inode>,
}

#[derive(Debug)]
pub(super) struct Node {
    parent: Inode,
    pub(super) content: Content,
    pub(super) modified: SystemTime,
}

#[derive(Debug)]
pub(super) enum Content {
    Directory(BTreeMap<String, Inode>),
    Symlink(String),
    Report,
}

/// What a version's name should lead to.
enum NameTarget<'a> {
    Pack(&'a PackListing),
    /// Another version's name.
    Link(&'a str),
}

/// By owner, package and version.
type Names<'a> = BTreeMap<&'a str, BTreeMap<&'a str, BTreeMap<&'a str, NameTarget<'a>>>>;

impl ListedTree {
    /// The root with its reports.
    pub(super) fn new() -> Self {
        let mut listed = Self { nodes: Vec::new(), packs: Vec::new(), shown: BTreeSet::new() };
        listed.add(ROOT, Content::Directory(BTreeMap::new()));
        let reports = listed.directory(ROOT, ".forkd", &mut Vec::new());
        let report = listed.add(reports, Content::Report);
        listed.name(reports, "stats.json", report);
        listed
    }

    /// Makes the names those of `listings`. Returns the ones that changed.
    pub(super) fn update(&mut self, listings: &[PackListing], options: &StoreOptions) -> Vec<ChangedName> {
        let mut changed = Vec::new();
        let wanted = names(listings);
        for (owner, packages) in &wanted {
            let owner = self.directory(ROOT, owner, &mut changed);
            for (package, versions) in packages {
                let package = self.directory(owner, package, &mut changed);
                for (version, target) in versions {
                    if !self.leads_to(package, version, target) {
                        let inode = self.make(package, target, options);
                        self.name(package, version, inode);
                        changed.push(ChangedName { directory: package, name: (*version).to_owned() });
                    }
                }
                self.retain(package, &mut changed, &|version| versions.contains_key(version));
            }
            self.retain(owner, &mut changed, &|package| packages.contains_key(package));
        }
        self.retain(ROOT, &mut changed, &|owner| owner == ".forkd" || wanted.contains_key(owner));
        self.forget_hidden();
        changed
    }

    fn add(&mut self, parent: Inode, content: Content) -> Inode {
        self.nodes.push(Node { parent, content, modified: SystemTime::now() });
        self.nodes.len() as Inode
    }

    fn name(&mut self, directory: Inode, name: &str, inode: Inode) {
        if let Some(children) = self.children_mut(directory) {
            children.insert(name.to_owned(), inode);
        }
    }

    /// The names in a directory that is about to change.
    fn children_mut(&mut self, directory: Inode) -> Option<&mut BTreeMap<String, Inode>> {
        let node = self.nodes.get_mut(directory as usize - 1)?;
        node.modified = SystemTime::now();
        match &mut node.content {
            Content::Directory(children) => Some(children),
            Content::Symlink(_) | Content::Report => None,
        }
    }

    /// The directory of that name, made when there is none.
    fn directory(&mut self, parent: Inode, name: &str, changed: &mut Vec<ChangedName>) -> Inode {
        if let Ok(inode) = self.named(parent, name) {
            return inode;
        }
        let inode = self.add(parent, Content::Directory(BTreeMap::new()));
        self.name(parent, name, inode);
        changed.push(ChangedName { directory: parent, name: name.to_owned() });
        inode
    }

    fn make(&mut self, package: Inode, target: &NameTarget<'_>, options: &StoreOptions) -> Inode {
        match target {
            NameTarget::Link(version) => self.add(package, Content::Symlink((*version).to_owned())),
            NameTarget::Pack(listing) => {
                let inode = (self.packs.len() as Inode + 1) << PACK_SHIFT;
                self.packs.push(Arc::new(PackNode::new(inode, package, listing, options.clone())));
                inode
            }
        }
    }

    fn leads_to(&self, package: Inode, version: &str, target: &NameTarget<'_>) -> bool {
        let Ok(inode) = self.named(package, version) else { return false };
        match (target, self.node(inode)) {
            (NameTarget::Link(wanted), Ok(Node { content: Content::Symlink(target), .. })) => {
                target == wanted
            }
            (NameTarget::Pack(listing), Err(_)) => {
                let pack = (inode >> PACK_SHIFT) as usize;
                self.pack(pack - 1).is_ok_and(|pack| pack.shows(listing))
            }
            _ => false,
        }
    }

    fn retain(&mut self, directory: Inode, changed: &mut Vec<ChangedName>, keep: &dyn Fn(&str) -> bool) {
        let Ok(Node { content: Content::Directory(children), .. }) = self.node(directory) else { return };
        let gone: Vec<(String, Inode)> = children
            .iter()
            .filter(|(name, _)| !keep(name))
            .map(|(name, &inode)| (name.clone(), inode))
            .collect();
        for (name, inode) in gone {
            // What is below goes too.
            self.retain(inode, changed, &|_| false);
            if let Some(children) = self.children_mut(directory) {
                children.remove(&name);
            }
            changed.push(ChangedName { directory, name });
        }
    }

    /// Frees the memory of packs that lost their name; those in use fetch what they need again.
    fn forget_hidden(&mut self) {
        let children = self.nodes.iter().filter_map(|node| match &node.content {
            Content::Directory(children) => Some(children.values()),
            Content::Symlink(_) | Content::Report => None,
        });
        let shown = children.flatten().copied().filter(|inode| inode >> PACK_SHIFT > 0).collect();
        for hidden in std::mem::replace(&mut self.shown, shown).difference(&self.shown) {
            self.packs[(hidden >> PACK_SHIFT) as usize - 1].release_memory();
        }
    }

    /// A directory, link or report above the packs.
    pub(super) fn node(&self, inode: Inode) -> Result<&Node, Errno> {
        (inode as usize).checked_sub(1).and_then(|at| self.nodes.get(at)).ok_or(Errno::STALE)
    }

    pub(super) fn pack(&self, number: usize) -> Result<Arc<PackNode>, Errno> {
        self.packs.get(number).cloned().ok_or(Errno::STALE)
    }

    /// What `name` in a directory leads to.
    pub(super) fn named(&self, directory: Inode, name: &str) -> Result<Inode, Errno> {
        match &self.node(directory)?.content {
            Content::Directory(children) => children.get(name).copied().ok_or(Errno::NOENT),
            Content::Symlink(_) | Content::Report => Err(Errno::NOTDIR),
        }
    }

    /// The names in a directory from a position on.
    pub(super) fn entries_from(&self, directory: Inode, position: u64) -> Result<Vec<Entry>, Errno> {
        let Node { parent, content: Content::Directory(children), .. } = self.node(directory)? else {
            return Err(Errno::NOTDIR);
        };
        let names = children.iter().map(|(name, &inode)| (inode, self.kind(inode), name.into()));
        Ok(Entry::listing(directory, *parent, names, position))
    }

    pub(super) fn subdirectories(&self, directory: Inode) -> u32 {
        match self.node(directory).map(|node| &node.content) {
            Ok(Content::Directory(children)) => {
                children.values().filter(|&&child| self.kind(child) == Kind::Directory).count() as u32
            }
            _ => 0,
        }
    }

    fn kind(&self, inode: Inode) -> Kind {
        match self.node(inode).map(|node| &node.content) {
            Ok(Content::Symlink(_)) => Kind::Symlink,
            Ok(Content::Report) => Kind::File,
            // What is no node is a pack's directory: nothing else has a name.
            Ok(Content::Directory(_)) | Err(_) => Kind::Directory,
        }
    }

    /// The packs that have a name.
    pub(super) fn shown(&self) -> impl Iterator<Item = &Arc<PackNode>> {
        self.shown.iter().map(|inode| &self.packs[(inode >> PACK_SHIFT) as usize - 1])
    }

    /// How many names there are.
    pub(super) fn names(&self) -> u64 {
        let names = |node: &Node| match &node.content {
            Content::Directory(children) => children.len(),
            Content::Symlink(_) | Content::Report => 0,
        };
        1 + self.nodes.iter().map(names).sum::<usize>() as u64
    }
}

/// What each name should lead to. Names that are not plain are left out; of equal ones the first counts.
fn names(listings: &[PackListing]) -> Names<'_> {
    let plain = |listing: &&PackListing| {
        [&listing.owner, &listing.name, &listing.version].iter().all(|name| is_plain_name(name))
    };
    let mut names = Names::new();
    for listing in listings.iter().filter(plain) {
        let versions = names.entry(&listing.owner).or_default().entry(&listing.name).or_default();
        versions.entry(&listing.version).or_insert(NameTarget::Pack(listing));
    }
    for versions in names.values_mut().flat_map(BTreeMap::values_mut) {
        if let Some(twin) = twin_of_latest(versions) {
            versions.insert(LATEST, NameTarget::Link(twin));
        }
    }
    names
}

/// The named version that is the same pack as `latest`.
fn twin_of_latest<'a>(versions: &BTreeMap<&'a str, NameTarget<'a>>) -> Option<&'a str> {
    let Some(NameTarget::Pack(latest)) = versions.get(LATEST) else { return None };
    let twin = |(&version, target): (&&'a str, &NameTarget<'a>)| match target {
        NameTarget::Pack(other) if version != LATEST && other.location == latest.location => Some(version),
        _ => None,
    };
    versions.iter().filter_map(twin).next_back()
}
