//! What comes from what: packs and snapshots, their forks, the children of those, their branches, and the snapshots that
//! were taken of children.

use crate::fork::children::{self, ChildrenError, RunningFork};
use crate::local::paths::Paths;
use crate::local::run_dir::ChildState;
use crate::local::snapshot_list::{self, SnapshotDescription};
use serde::Serialize;
use std::collections::BTreeMap;

/// What a node of the tree is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeKind {
    /// A pack, or a snapshot that is not there any more.
    Pack,
    /// A local snapshot.
    Snapshot,
    /// A fork that runs.
    Fork,
    /// A child, or a branch of one.
    Child,
}

/// One of them, and what comes from it. Its JSON form is a contract of `forkd tree --json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TreeNode {
    /// What it is.
    pub kind: NodeKind,
    /// A tag, the name of a pack or fork, a child's id.
    pub name: String,
    /// Where a child stands; null for one that is over and has left its fork.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<ChildState>,
    /// What a snapshot takes on disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// What comes from it.
    pub children: Vec<TreeNode>,
}

/// The packs and snapshots that something comes from, by name.
pub fn tree(paths: &Paths) -> Result<Vec<TreeNode>, ChildrenError> {
    let (forks, snapshots) = (children::list_with_ancestors(paths)?, snapshot_list::list(paths)?);
    Ok(Known::new(&forks, &snapshots).roots())
}

/// All that there is.
struct Known<'a> {
    forks: &'a [RunningFork],
    snapshots: BTreeMap<&'a str, &'a SnapshotDescription>,
}

impl<'a> Known<'a> {
    fn new(forks: &'a [RunningFork], snapshots: &'a [SnapshotDescription]) -> Known<'a> {
        Known { forks, snapshots: snapshots.iter().map(|found| (&*found.tag, found)).collect() }
    }

    fn roots(&self) -> Vec<TreeNode> {
        let of_forks = self.forks.iter().map(origin_of);
        let of_snapshots =
            self.snapshots.values().filter_map(|found| Some(self.origin_of_snapshot(&found.tag)?.0));
        let mut names: Vec<_> = of_forks.chain(of_snapshots).collect();
        names.sort_unstable();
        names.dedup();
        // What comes from something else is shown there.
        names.retain(|name| self.origin_of_snapshot(name).is_none());
        names.into_iter().map(|name| self.origin(name)).collect()
    }

    /// What the child was forked from that a snapshot was taken of, and that child. `None` also for one that came, over
    /// others, from a snapshot whose name it has now.
    fn origin_of_snapshot(&self, tag: &str) -> Option<(&'a str, &'a str)> {
        let found = |tag: &str| {
            let found = self.snapshots.get(tag)?;
            Some((found.forked_from.as_deref()?, found.child.as_deref()?))
        };
        let first = found(tag)?;
        let mut at = first.0;
        for _ in 0..=self.snapshots.len() {
            match found(at) {
                _ if at == tag => return None,
                Some((next, _)) => at = next,
                None => return Some(first),
            }
        }
        None
    }

    /// A pack or snapshot with all that comes from it.
    fn origin(&self, name: &str) -> TreeNode {
        let mut children: Vec<_> =
            self.forks.iter().filter(|fork| origin_of(fork) == name).map(|fork| self.fork(fork)).collect();
        // Snapshots of children of forks that have ended.
        let mut gone: BTreeMap<&str, Vec<TreeNode>> = BTreeMap::new();
        for (tag, (_, child)) in self.snapshots_of(name) {
            if !self.is_shown(name, child) {
                gone.entry(child).or_default().push(self.origin(tag));
            }
        }
        children.extend(gone.into_iter().map(|(id, children)| node(NodeKind::Child, id, children)));
        let snapshot = self.snapshots.get(name);
        let kind = if snapshot.is_some() { NodeKind::Snapshot } else { NodeKind::Pack };
        TreeNode { disk_bytes: snapshot.map(|found| found.disk_bytes), ..node(kind, name, children) }
    }

    /// The snapshots that were taken of children of forks of `name`.
    fn snapshots_of(&self, name: &str) -> impl Iterator<Item = (&'a str, (&'a str, &'a str))> {
        let came = self.snapshots.keys().filter_map(|tag| Some((*tag, self.origin_of_snapshot(tag)?)));
        came.filter(move |(_, (origin, _))| *origin == name)
    }

    fn is_shown(&self, name: &str, child: &str) -> bool {
        let of_name = self.forks.iter().filter(|fork| origin_of(fork) == name);
        of_name.flat_map(|fork| &fork.status.children).any(|shown| shown.id == child)
    }

    fn fork(&self, fork: &RunningFork) -> TreeNode {
        let first = fork.status.children.iter().filter(|child| child.parent.is_none());
        let children = first.map(|child| self.child(fork, &child.id, child.state)).collect();
        node(NodeKind::Fork, &fork.fork, children)
    }

    fn child(&self, fork: &RunningFork, id: &str, state: ChildState) -> TreeNode {
        let branches = fork.status.children.iter().filter(|child| child.parent.as_deref() == Some(id));
        let branches = branches.map(|child| self.child(fork, &child.id, child.state));
        let snapshots = self.snapshots_of(origin_of(fork)).filter(|(_, (_, child))| *child == id);
        let children = branches.chain(snapshots.map(|(tag, _)| self.origin(tag))).collect();
        TreeNode { state: Some(state), ..node(NodeKind::Child, id, children) }
    }
}

fn origin_of(fork: &RunningFork) -> &str {
    fork.status.forked_from.as_deref().unwrap_or(&fork.status.pack)
}

fn node(kind: NodeKind, name: &str, children: Vec<TreeNode>) -> TreeNode {
    TreeNode { kind, name: name.to_owned(), state: None, disk_bytes: None, children }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::run_dir::{ChildStatus, ForkStatus};

    fn fork(name: &str, of: &str, children: &[(&str, Option<&str>, ChildState)]) -> RunningFork {
        let child = |(id, parent, state): &(&str, Option<&str>, ChildState)| ChildStatus {
            id: (*id).to_owned(),
            pid: 1,
            state: *state,
            error: None,
            network: None,
            ports: Vec::new(),
            on_disk: false,
            parent: parent.map(str::to_owned),
            expires_in_ms: None,
        };
        let children = children.iter().map(child).collect();
        let (pack, forked_from) = ("p".to_owned(), Some(of.to_owned()));
        let status = ForkStatus { pack, forked_from, bytes_fetched: 0, bytes_total: 0, children };
        RunningFork { fork: name.to_owned(), status }
    }

    fn snapshot(tag: &str, came: Option<(&str, &str)>) -> SnapshotDescription {
        SnapshotDescription {
            tag: tag.to_owned(),
            description: String::new(),
            base_image: String::new(),
            created_at: String::new(),
            memory_mib: None,
            disk_bytes: 1,
            child: came.map(|(_, child)| child.to_owned()),
            forked_from: came.map(|(from, _)| from.to_owned()),
            base: None,
            broken: None,
        }
    }

    /// `name(children)`.
    fn drawn(nodes: &[TreeNode]) -> String {
        let one = |node: &TreeNode| match &*node.children {
            [] => node.name.clone(),
            children => format!("{}({})", node.name, drawn(children)),
        };
        nodes.iter().map(one).collect::<Vec<_>>().join(" ")
    }

    fn roots(forks: &[RunningFork], snapshots: &[SnapshotDescription]) -> Vec<TreeNode> {
        Known::new(forks, snapshots).roots()
    }

    #[test]
    fn each_hangs_where_it_came_from() {
        let (ready, over) = (ChildState::Ready, ChildState::Killed);
        let forks = [
            fork(
                "a",
                "base",
                &[("a-1", None, ready), ("a-2", Some("a-1"), over), ("a-3", Some("a-2"), ready)],
            ),
            fork("b", "kept", &[("b-1", None, ready)]),
            fork("c", "o/n@v1", &[("c-1", None, ready)]),
        ];
        let snapshots = [
            snapshot("alone", None),
            snapshot("base", None),
            snapshot("kept", Some(("base", "a-3"))),
            snapshot("later", Some(("kept", "b-9"))),
        ];
        let found = roots(&forks, &snapshots);
        assert_eq!(drawn(&found), "base(a(a-1(a-2(a-3(kept(b(b-1) b-9(later))))))) o/n@v1(c(c-1))");
        assert_eq!((found[0].kind, found[1].kind), (NodeKind::Snapshot, NodeKind::Pack));
        let first = &found[0].children[0].children[0];
        assert_eq!(
            (first.kind, first.state, first.children[0].state),
            (NodeKind::Child, Some(ready), Some(over))
        );
    }

    #[test]
    fn a_base_that_is_gone_is_a_root_and_names_may_go_round_in_circles() {
        assert_eq!(drawn(&roots(&[], &[snapshot("t", Some(("gone", "a-1")))])), "gone(a-1(t))");
        assert_eq!(drawn(&roots(&[], &[snapshot("t", None)])), "");
        let forks = [fork("a", "t", &[("a-1", None, ChildState::Ready)])];
        assert_eq!(drawn(&roots(&forks, &[snapshot("t", Some(("t", "a-1")))])), "t(a(a-1))");
        let circle = [snapshot("t", Some(("u", "b-1"))), snapshot("u", Some(("t", "a-1")))];
        assert_eq!(drawn(&roots(&forks, &circle)), "t(a(a-1))");
        let behind = [&circle[..], &[snapshot("v", Some(("u", "b-1")))]].concat();
        assert_eq!(drawn(&roots(&[], &behind)), "");
    }
}
