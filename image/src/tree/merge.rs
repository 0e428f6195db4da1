//! The merge: one arena of nodes that every layer in turn edits, then a copy of what is still reachable.
//! Nothing here recurses, so the depth of a path costs no stack.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use super::above::Paths;
use super::children::Children;
use super::inherit::Inherited;
use super::{
    AUFS, FileRef, HIDDEN, IMAGE_IMPLIED_MAX, IMPLIED_MAX, INODES_MAX, Inode, InodeId, InodeKind, STEPS_MAX,
    SYMLINKS_MAX, Special, TREE_MAX, Tree, TreeError, inode_cost, special,
};
use crate::layer::{Device, Entry, EntryKind, FileContent, LayerIndex, Metadata};
use crate::path::{EntryPath, PATH_MAX, components};
use peel_hash::Digest;

/// Attributes that steer overlayfs.
const OVERLAY_XATTRS: &[u8] = b"trusted.overlay.";

const ROOT: u32 = 0;

/// Metadata of directories that have no entry: as containerd makes them, but at a fixed time.
static IMPLIED: Metadata = Metadata {
    mode: 0o755,
    uid: 0,
    gid: 0,
    mtime: 0,
    mtime_nanoseconds: 0,
    xattrs: BTreeMap::new(),
};

/// What a merge may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// See [`IMPLIED_MAX`].
    pub(super) implied: u32,
    /// See [`IMAGE_IMPLIED_MAX`].
    pub(super) image_implied: u32,
    /// See [`TREE_MAX`].
    pub(super) bytes: u64,
    /// See [`STEPS_MAX`].
    pub(super) steps: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            implied: IMPLIED_MAX,
            image_implied: IMAGE_IMPLIED_MAX,
            bytes: TREE_MAX,
            steps: STEPS_MAX,
        }
    }
}

pub(super) fn merge<'a>(
    layers: impl IntoIterator<Item = &'a LayerIndex>,
    limits: Limits,
) -> Result<Tree, TreeError> {
    let mut merger = Merger::new(limits);
    for (number, layer) in (0_u32..).zip(layers) {
        merger.layer = number;
        merger.parent = None;
        merger.implied_below = merger.implied;
        merger.hide(layer)?;
        merger.nodes.reserve(layer.entries.len());
        for (index, entry) in (0_u32..).zip(&layer.entries) {
            merger.apply(index, entry)?;
        }
        merger.link()?;
        merger.forget_bookkeeping();
    }
    merger.collect()
}

struct Node<'a> {
    /// The layer that made or last changed it.
    layer: u32,
    /// The last layer that linked to it.
    linked: u32,
    metadata: Inherited<'a>,
    kind: Kind<'a>,
}

/// A directory and where it hangs, which tells whether it is still part of the tree.
struct Directory<'a> {
    children: Children<'a>,
    parent: u32,
    name: &'a [u8],
}

impl<'a> Kind<'a> {
    fn directory(parent: u32, name: &'a [u8]) -> Self {
        Self::Directory(Directory {
            children: Children::default(),
            parent,
            name,
        })
    }
}

enum Kind<'a> {
    Directory(Directory<'a>),
    /// Anything but a directory, and its index in its layer.
    Leaf(&'a Entry, u32),
    /// A hard link whose target is not known before its layer ends.
    Link(&'a EntryPath),
    /// A hard link that was resolved.
    Linked(u32),
}

/// Where a [`Kind::Link`] hangs.
struct PendingLink<'a> {
    node: u32,
    parent: u32,
    name: &'a [u8],
    entry: &'a Entry,
}

struct Merger<'a> {
    nodes: Vec<Node<'a>>,
    layer: u32,
    links: Vec<PendingLink<'a>>,
    /// The directory of the entry before and its path, unless that leads through symbolic links: entries of one directory mostly
    /// follow one another, and none of them moves the directory that it is in.
    parent: Option<(&'a [u8], u32)>,
    /// Directories so far that have no entry.
    implied: u32,
    /// Those of the layers below this one.
    implied_below: u32,
    /// Bytes of memory that the nodes take, and the tree that is made of them.
    cost: u64,
    /// Components of paths that were looked up so far.
    steps: Cell<u64>,
    limits: Limits,
}

/// What an entry means for the merge.
enum Role<'a> {
    Ordinary,
    /// Only its parents count.
    Opaque,
    /// Only its parents count; the name that it hides.
    Whiteout(&'a [u8]),
    Ignored,
}

impl<'a> Merger<'a> {
    fn new(limits: Limits) -> Self {
        Self {
            nodes: vec![Node {
                layer: 0,
                linked: 0,
                metadata: Inherited::Given(&IMPLIED),
                kind: Kind::directory(ROOT, b""),
            }],
            layer: 0,
            links: Vec::new(),
            parent: None,
            implied: 0,
            implied_below: 0,
            cost: 0,
            steps: Cell::new(0),
            limits,
        }
    }

    fn role(&self, entry: &'a Entry) -> Result<Role<'a>, TreeError> {
        let Some((parent, last)) = entry.path.parent_and_name() else {
            return Ok(Role::Ordinary);
        };
        if parent.is_empty() && HIDDEN.contains(&last) && !matches!(entry.kind, EntryKind::Directory) {
            return Ok(Role::Ignored);
        }
        match special(entry.path.as_bytes()) {
            // Links may lead to what AUFS kept for itself, so it is there until the layer ends.
            Special::No | Special::Aufs => Ok(Role::Ordinary),
            Special::Opaque => Ok(Role::Opaque),
            Special::Whiteout(b"" | b"." | b"..") => Err(TreeError::Whiteout {
                layer: self.layer,
                path: entry.path.clone(),
            }),
            Special::Whiteout(name) => Ok(Role::Whiteout(name)),
        }
    }

    /// Takes away what the layer's whiteouts and opaque marks hide, before any of its own entries is there.
    fn hide(&mut self, layer: &'a LayerIndex) -> Result<(), TreeError> {
        let detours = detours(layer, self.layer, self.limits)?;
        for (index, entry) in layer.entries.iter().enumerate() {
            let role = self.role(entry)?;
            if !matches!(role, Role::Opaque | Role::Whiteout(_)) {
                continue;
            }
            self.check_steps()?;
            let parent = match detours.get(&index) {
                Some(parent) => parent,
                None => entry
                    .path
                    .parent_and_name()
                    .map_or(&b""[..], |(parent, _)| parent),
            };
            let directory = components(parent).try_fold(ROOT, |id, name| self.step(id, name));
            if let Some(children) = directory.and_then(|id| self.children_mut(id)) {
                match role {
                    Role::Whiteout(name) => {
                        children.remove(name);
                    }
                    _ => children.clear(),
                }
            }
        }
        Ok(())
    }

    fn apply(&mut self, index: u32, entry: &'a Entry) -> Result<(), TreeError> {
        self.check_steps()?;
        let role = self.role(entry)?;
        if matches!(role, Role::Ignored) {
            return Ok(());
        }
        let Some((directory, name)) = entry.path.parent_and_name() else {
            return match (&entry.kind, self.node_mut(ROOT)) {
                (EntryKind::Directory, Some(root)) => {
                    root.metadata = Inherited::Given(&entry.metadata);
                    Ok(())
                }
                _ => Err(TreeError::Root {
                    layer: self.layer,
                    entry: index,
                }),
            };
        };
        let parent = self.parent(entry, directory, name)?;
        if !matches!(role, Role::Ordinary) {
            return Ok(());
        }
        let node = match &entry.kind {
            EntryKind::Directory => {
                let layer = self.layer;
                if let Some(id) = self.child(parent, name)
                    && let Some(node) = self.node_mut(id)
                    && matches!(node.kind, Kind::Directory(_))
                {
                    node.metadata = Inherited::Given(&entry.metadata);
                    node.layer = layer;
                    return Ok(());
                }
                self.add(&entry.metadata, Kind::directory(parent, name))?
            }
            EntryKind::CharDevice(Device { major: 0, minor: 0 }) => {
                if let Some(children) = self.children_mut(parent) {
                    children.remove(name);
                }
                return Ok(());
            }
            EntryKind::Hardlink(target) => {
                let is_leaf = |id: &u32| {
                    self.node(*id)
                        .is_some_and(|node| matches!(node.kind, Kind::Leaf(..)))
                };
                match self.find(target).filter(is_leaf) {
                    Some(id) => {
                        self.inherit(id, &entry.metadata);
                        let layer = self.layer;
                        if let Some(node) = self.node_mut(id) {
                            node.linked = layer;
                        }
                        id
                    }
                    None => {
                        let node = self.add(&entry.metadata, Kind::Link(target))?;
                        self.links.push(PendingLink {
                            node,
                            parent,
                            name,
                            entry,
                        });
                        node
                    }
                }
            }
            _ => self.add(&entry.metadata, Kind::Leaf(entry, index))?,
        };
        if let Some(children) = self.children_mut(parent) {
            children.insert(name, node);
        }
        Ok(())
    }

    /// The directory at `path` that is to hold `entry`; what is missing of it is made.
    fn parent(&mut self, entry: &'a Entry, path: &'a [u8], name: &[u8]) -> Result<u32, TreeError> {
        if let Some((known, id)) = self.parent
            && known == path
        {
            return Ok(id);
        }
        let found = self.directory(path);
        self.parent = found.map(|id| (path, id));
        found.map_or_else(|| self.make_parent(entry, name), Ok)
    }

    /// The directory at `path` if all of the path is directories.
    fn directory(&self, path: &[u8]) -> Option<u32> {
        let id = components(path).try_fold(ROOT, |id, name| self.step(id, name))?;
        matches!(self.node(id)?.kind, Kind::Directory(_)).then_some(id)
    }

    /// As [`Merger::parent`], whatever is on the way.
    fn make_parent(&mut self, entry: &'a Entry, name: &[u8]) -> Result<u32, TreeError> {
        let mut todo: Vec<&'a [u8]> = entry.path.components().rev().skip(1).collect();
        // The directories down to the one in question; no id where one is missing or must be replaced.
        let mut stack: Vec<(&'a [u8], Option<u32>)> = Vec::with_capacity(todo.len());
        let mut followed = 0;
        while let Some(component) = todo.pop() {
            self.count_step();
            match component {
                b"" | b"." => continue,
                b".." => {
                    stack.pop();
                    continue;
                }
                _ => {}
            }
            let current = stack.last().map_or(Some(ROOT), |(_, id)| *id);
            let child = current.and_then(|id| self.step(id, component));
            let Some((id, node)) = child.and_then(|id| Some((id, self.node(id)?))) else {
                stack.push((component, None));
                continue;
            };
            match &node.kind {
                Kind::Directory(_) => stack.push((component, Some(id))),
                _ if node.layer != self.layer && node.linked != self.layer => {
                    stack.push((component, None));
                }
                Kind::Leaf(
                    Entry {
                        kind: EntryKind::Symlink(target),
                        ..
                    },
                    _,
                ) if node.layer == self.layer => {
                    followed += 1;
                    if followed > SYMLINKS_MAX {
                        return Err(TreeError::SymlinkLoop {
                            layer: self.layer,
                            path: entry.path.clone(),
                        });
                    }
                    if target.starts_with(b"/") {
                        stack.clear();
                    }
                    todo.extend(target.split(|byte| *byte == b'/').rev());
                }
                _ => {
                    return Err(TreeError::ParentNotDirectory {
                        layer: self.layer,
                        path: entry.path.clone(),
                    });
                }
            }
        }
        let length: usize = stack.iter().map(|(component, _)| component.len() + 1).sum();
        if followed > 0 && length + name.len() > PATH_MAX {
            return Err(TreeError::TooDeep {
                layer: self.layer,
                path: entry.path.clone(),
            });
        }
        let mut directory = ROOT;
        for (component, id) in stack {
            directory = match id {
                Some(id) => id,
                None => {
                    let id = self.add_implied(directory, component)?;
                    if let Some(children) = self.children_mut(directory) {
                        children.insert(component, id);
                    }
                    id
                }
            };
        }
        Ok(directory)
    }

    /// The path of a directory. A step for each component.
    fn path_of(&self, directory: u32) -> Vec<u8> {
        let (mut names, mut id) = (Vec::new(), directory);
        while id != ROOT
            && let Some(Kind::Directory(directory)) = self.node(id).map(|node| &node.kind)
        {
            self.count_step();
            names.push(directory.name);
            id = directory.parent;
        }
        names.reverse();
        names.join(&b'/')
    }

    /// The node at the target of a hard link. Symbolic links on the way are followed, the last component is not.
    fn find(&self, target: &'a EntryPath) -> Option<u32> {
        let mut todo: Vec<&'a [u8]> = target.components().rev().collect();
        let mut stack = Vec::new();
        let mut followed = 0;
        while let Some(component) = todo.pop() {
            self.count_step();
            match component {
                b"" | b"." => continue,
                b".." => {
                    stack.pop();
                    continue;
                }
                _ => {}
            }
            let id = self.step(stack.last().copied().unwrap_or(ROOT), component)?;
            match &self.node(id)?.kind {
                Kind::Leaf(
                    Entry {
                        kind: EntryKind::Symlink(link),
                        ..
                    },
                    _,
                ) if !todo.is_empty() => {
                    followed += 1;
                    if followed > SYMLINKS_MAX {
                        return None;
                    }
                    if link.starts_with(b"/") {
                        stack.clear();
                    }
                    todo.extend(link.split(|byte| *byte == b'/').rev());
                }
                _ => stack.push(id),
            }
        }
        Some(stack.last().copied().unwrap_or(ROOT))
    }

    /// Resolves the hard links whose targets were not there when they came.
    fn link(&mut self) -> Result<(), TreeError> {
        let links = std::mem::take(&mut self.links);
        for link in &links {
            self.check_steps()?;
            if self.is_attached(link) {
                self.resolve(link)?;
            }
        }
        for link in &links {
            self.check_steps()?;
            if self.is_attached(link)
                && let Some(Kind::Linked(target)) = self.node(link.node).map(|node| &node.kind)
            {
                let target = *target;
                // Nodes are numbered as they come. What comes later says itself what it is.
                if target < link.node {
                    self.inherit(target, &link.entry.metadata);
                }
                if let Some(children) = self.children_mut(link.parent) {
                    children.insert(link.name, target);
                }
            }
        }
        Ok(())
    }

    /// Whether a link is still part of the tree: later entries of its layer may have replaced it or a directory above it.
    fn is_attached(&self, link: &PendingLink<'a>) -> bool {
        if self.child(link.parent, link.name) != Some(link.node) {
            return false;
        }
        let mut id = link.parent;
        while id != ROOT {
            let Some(Kind::Directory(directory)) = self.node(id).map(|node| &node.kind) else {
                return false;
            };
            if self.step(directory.parent, directory.name) != Some(id) {
                return false;
            }
            id = directory.parent;
        }
        true
    }

    /// Follows a chain of hard links to its end and notes the end at each of them.
    fn resolve(&mut self, link: &PendingLink<'a>) -> Result<(), TreeError> {
        let EntryKind::Hardlink(target) = &link.entry.kind else {
            return Ok(());
        };
        let (layer, path) = (self.layer, link.entry.path.clone());
        let mut chain = Vec::new();
        // Marks the links of this chain, to tell a loop from a long chain.
        let mut seen = HashSet::new();
        let mut id = link.node;
        let end = loop {
            match self.node(id).map(|node| &node.kind) {
                Some(Kind::Link(next)) => {
                    if !seen.insert(id) {
                        let target = target.clone();
                        return Err(TreeError::LinkLoop { layer, path, target });
                    }
                    chain.push(id);
                    let Some(next) = self.find(next) else {
                        let target = (*next).clone();
                        return Err(TreeError::LinkMissing { layer, path, target });
                    };
                    id = next;
                }
                Some(Kind::Linked(end)) => break *end,
                Some(Kind::Leaf(..)) => break id,
                Some(Kind::Directory(_)) | None => {
                    let target = target.clone();
                    return Err(TreeError::LinkToDirectory { layer, path, target });
                }
            }
        };
        for id in chain {
            if let Some(node) = self.node_mut(id) {
                node.kind = Kind::Linked(end);
            }
        }
        Ok(())
    }

    /// Copies what can be reached from the root, directory by directory.
    fn collect(&self) -> Result<Tree, TreeError> {
        let mut inodes: Vec<Inode> = Vec::with_capacity(self.nodes.len());
        let mut ids: Vec<Option<InodeId>> = vec![None; self.nodes.len()];
        let mut queue = VecDeque::from([ROOT]);
        if let (Some(slot), Some(root)) = (ids.first_mut(), self.node(ROOT)) {
            *slot = Some(InodeId::ROOT);
            inodes.push(copy(root)?);
        }
        // Directories wait in the order of their new ids.
        while let Some(old) = queue.pop_front() {
            let (Some(Kind::Directory(directory)), Some(id)) = (
                self.node(old).map(|node| &node.kind),
                ids.get(position(old)).copied().flatten(),
            ) else {
                continue;
            };
            let mut names = Vec::with_capacity(directory.children.len_max());
            let mut subdirectories = 0;
            for (name, child) in directory.children.iter() {
                let (Some(node), Some(slot)) = (self.node(child), ids.get_mut(position(child))) else {
                    continue;
                };
                let is_directory = matches!(node.kind, Kind::Directory(_));
                let child_id = match *slot {
                    Some(known) => known,
                    None => {
                        // INODES_MAX nodes fit into the type of an id.
                        let new = InodeId(u32::try_from(inodes.len()).unwrap_or(u32::MAX));
                        *slot = Some(new);
                        inodes.push(copy(node)?);
                        if is_directory {
                            queue.push_back(child);
                        }
                        new
                    }
                };
                if is_directory {
                    subdirectories += 1;
                } else if let Some(inode) = inodes.get_mut(position(child_id.0)) {
                    inode.links += 1;
                }
                names.push((Box::from(name), child_id));
            }
            if let Some(inode) = inodes.get_mut(position(id.0)) {
                inode.links += subdirectories;
                // Sorted already, of which this takes advantage.
                inode.kind = InodeKind::Directory(names.into_iter().collect());
            }
        }
        Ok(Tree { inodes })
    }

    /// Takes AUFS's bookkeeping out of the root directory, now that links which lead there are resolved.
    fn forget_bookkeeping(&mut self) {
        let Some(Kind::Directory(root)) = self.nodes.first_mut().map(|root| &mut root.kind) else {
            return;
        };
        let names: Vec<&[u8]> = root
            .children
            .iter()
            .map(|(name, _)| name)
            .filter(|name| name.starts_with(AUFS))
            .collect();
        for name in names {
            root.children.remove(name);
        }
    }

    /// Gives an inode of this layer the metadata of a link to it. Tools that link to files of lower layers leave those as they
    /// are.
    fn inherit(&mut self, id: u32, link: &Metadata) {
        let layer = self.layer;
        if let Some(node) = self.node_mut(id).filter(|node| node.layer == layer) {
            let is_symlink =
                matches!(node.kind, Kind::Leaf(entry, _) if matches!(entry.kind, EntryKind::Symlink(_)));
            node.metadata.apply(link, is_symlink);
        }
    }

    /// Adds a directory that has no entry.
    fn add_implied(&mut self, parent: u32, name: &'a [u8]) -> Result<u32, TreeError> {
        let layer = self.layer;
        self.implied = self.implied.saturating_add(1);
        let limit = self.limits.implied;
        if self.implied.saturating_sub(self.implied_below) > limit {
            return Err(TreeError::TooManyImplied { layer, limit });
        }
        let limit = self.limits.image_implied;
        if self.implied > limit {
            return Err(TreeError::TooManyImplied { layer, limit });
        }
        self.add(&IMPLIED, Kind::directory(parent, name))
    }

    fn add(&mut self, metadata: &'a Metadata, kind: Kind<'a>) -> Result<u32, TreeError> {
        let layer = self.layer;
        let id = u32::try_from(self.nodes.len()).unwrap_or(u32::MAX);
        if id >= INODES_MAX {
            return Err(TreeError::TooManyInodes { layer });
        }
        let cost = inode_cost(matches!(kind, Kind::Directory(_)), metadata);
        self.cost = self.cost.saturating_add(cost);
        if self.cost > self.limits.bytes {
            return Err(TreeError::TooLarge { layer });
        }
        self.nodes.push(Node {
            layer,
            linked: layer,
            metadata: Inherited::Given(metadata),
            kind,
        });
        Ok(id)
    }

    fn count_step(&self) {
        self.steps.set(self.steps.get().saturating_add(1));
    }

    /// An error once there were too many steps. Those on the way to one path are few enough to count them first.
    fn check_steps(&self) -> Result<(), TreeError> {
        if self.steps.get() > self.limits.steps {
            return Err(TreeError::TooManySteps { layer: self.layer });
        }
        Ok(())
    }

    /// As [`Merger::child`], counted.
    fn step(&self, directory: u32, name: &[u8]) -> Option<u32> {
        self.count_step();
        self.child(directory, name)
    }

    fn node(&self, id: u32) -> Option<&Node<'a>> {
        self.nodes.get(position(id))
    }

    fn node_mut(&mut self, id: u32) -> Option<&mut Node<'a>> {
        self.nodes.get_mut(position(id))
    }

    fn child(&self, directory: u32, name: &[u8]) -> Option<u32> {
        match &self.node(directory)?.kind {
            Kind::Directory(directory) => directory.children.get(name),
            _ => None,
        }
    }

    fn children_mut(&mut self, directory: u32) -> Option<&mut Children<'a>> {
        match &mut self.node_mut(directory)?.kind {
            Kind::Directory(directory) => Some(&mut directory.children),
            _ => None,
        }
    }
}

/// Where the whiteouts and opaque marks lie that lead through symbolic links of their layer: their directories, by index. The error is
/// that the layer is too large.
fn detours(layer: &LayerIndex, number: u32, limits: Limits) -> Result<HashMap<usize, Vec<u8>>, TreeError> {
    let is_mark = |entry: &Entry| {
        matches!(
            special(entry.path.as_bytes()),
            Special::Opaque | Special::Whiteout(_)
        )
    };
    // A hard link may be one to a symbolic link.
    let is_symlink = |entry: &&Entry| matches!(entry.kind, EntryKind::Symlink(_) | EntryKind::Hardlink(_));
    let mut links = Paths::default();
    links.extend(
        layer
            .entries
            .iter()
            .filter(is_symlink)
            .map(|entry| entry.path.as_bytes()),
    );
    let leads_through = |entry: &Entry| {
        let above = entry.path.parent_and_name();
        above.is_some_and(|(above, _)| links.lead_to(above))
    };
    let mut found = HashMap::new();
    let last = layer
        .entries
        .iter()
        .rposition(|entry| !links.is_empty() && is_mark(entry) && leads_through(entry));
    let Some(last) = last else {
        return Ok(found);
    };
    // By itself a layer tells where its links led at that time. What is wrong with it will be found once more, but not that it is too
    // large: lower layers may have the directories that are made here.
    let mut alone = Merger::new(limits);
    alone.layer = number;
    for (index, entry) in layer.entries.iter().enumerate().take(last + 1) {
        alone.check_steps()?;
        let outcome = match entry.path.parent_and_name() {
            Some((directory, name)) if is_mark(entry) => {
                let parent = alone.parent(entry, directory, name);
                parent.map(|parent| {
                    if leads_through(entry) {
                        found.insert(index, alone.path_of(parent));
                    }
                })
            }
            _ => alone.apply(u32::try_from(index).unwrap_or(u32::MAX), entry),
        };
        match outcome {
            Ok(()) => {}
            Err(error) if error.is_limit() => return Err(error),
            Err(_) => break,
        }
    }
    Ok(found)
}

/// The inode of a node, without the names that it has.
fn copy(node: &Node<'_>) -> Result<Inode, TreeError> {
    let (links, kind) = match &node.kind {
        Kind::Leaf(entry, index) => (0, leaf(node.layer, entry, *index)?),
        // Links were resolved when their layer ended.
        Kind::Directory(_) | Kind::Link(_) | Kind::Linked(_) => (2, InodeKind::Directory(BTreeMap::new())),
    };
    let mut metadata = node.metadata.get().clone();
    metadata
        .xattrs
        .retain(|name, _| !name.starts_with(OVERLAY_XATTRS));
    Ok(Inode {
        metadata,
        links,
        kind,
    })
}

fn leaf(layer: u32, entry: &Entry, index: u32) -> Result<InodeKind, TreeError> {
    let path = || entry.path.clone();
    Ok(match &entry.kind {
        EntryKind::Regular(FileContent { size, digest, .. }) => {
            let object = match digest {
                None if *size == 0 => Digest::EMPTY,
                None => return Err(TreeError::NoDigest { layer, path: path() }),
                Some(digest) if (*digest == Digest::EMPTY) != (*size == 0) => {
                    return Err(TreeError::EmptyDigest {
                        layer,
                        path: path(),
                        size: *size,
                        digest: *digest,
                    });
                }
                Some(digest) => *digest,
            };
            InodeKind::Regular(FileRef {
                size: *size,
                object,
                layer,
                entry: index,
            })
        }
        EntryKind::Symlink(target) => InodeKind::Symlink(target.clone()),
        EntryKind::CharDevice(device) => InodeKind::CharDevice(*device),
        EntryKind::BlockDevice(device) => InodeKind::BlockDevice(*device),
        EntryKind::Fifo => InodeKind::Fifo,
        EntryKind::Directory | EntryKind::Hardlink(_) => InodeKind::Directory(BTreeMap::new()),
    })
}

/// An id as an index; ids are below [`INODES_MAX`].
fn position(id: u32) -> usize {
    usize::try_from(id).unwrap_or(usize::MAX)
}
