//! Finding and listing: lookups with and without following symbolic links, and the walk over all names.
//! Called by `ls` and `cat`, by the sandbox (users, working directory) and by tests.

use std::collections::btree_map;

use super::{InodeId, InodeKind, SYMLINKS_MAX, Tree};
use crate::path::EntryPath;

/// Why a path does not lead to an inode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// A component does not exist.
    #[error("{0:?} does not exist in the image")]
    NotFound(String),
    /// A component that is not the last one is no directory.
    #[error("{0:?} in the image is no directory")]
    NotDirectory(String),
    /// Too many symbolic links.
    #[error("{0:?} leads through more than {SYMLINKS_MAX} symbolic links")]
    Loop(String),
}

impl Tree {
    /// The inode at `path`; no symbolic link is followed, neither on the way nor at the end.
    pub fn lookup(&self, path: &EntryPath) -> Option<InodeId> {
        path.components()
            .try_fold(InodeId::ROOT, |id, name| self.children(id)?.get(name).copied())
    }

    /// The inode that a process in the container would reach by `path`: symbolic links are followed, absolute ones from
    /// the image's root, and `..` stops at the root. `follow_last` says whether a link at the very end is followed too.
    pub fn resolve(&self, path: &[u8], follow_last: bool) -> Result<InodeId, ResolveError> {
        let mut todo: Vec<&[u8]> = path.split(|byte| *byte == b'/').rev().collect();
        let mut stack: Vec<(&[u8], InodeId)> = Vec::new();
        let mut followed = 0;
        while let Some(component) = todo.pop() {
            let shown = || {
                let names = stack.iter().map(|(name, _)| *name).chain([component]);
                let path = names.collect::<Vec<_>>().join(&b'/');
                format!("/{}", String::from_utf8_lossy(&path))
            };
            let directory = stack.last().map_or(InodeId::ROOT, |(_, id)| *id);
            let Some(children) = self.children(directory) else {
                return Err(ResolveError::NotDirectory(lossy(path)));
            };
            match component {
                b"" | b"." => continue,
                b".." => {
                    stack.pop();
                    continue;
                }
                _ => {}
            }
            let id = *children
                .get(component)
                .ok_or_else(|| ResolveError::NotFound(shown()))?;
            match self.inode(id).map(|inode| &inode.kind) {
                Some(InodeKind::Symlink(target)) if follow_last || !todo.is_empty() => {
                    followed += 1;
                    if followed > SYMLINKS_MAX {
                        return Err(ResolveError::Loop(lossy(path)));
                    }
                    if target.starts_with(b"/") {
                        stack.clear();
                    }
                    todo.extend(target.split(|byte| *byte == b'/').rev());
                }
                _ => stack.push((component, id)),
            }
        }
        Ok(stack.last().map_or(InodeId::ROOT, |(_, id)| *id))
    }

    /// Every name below the root with its inode, each directory before its children, names sorted by bytes within a
    /// directory. A file with several hard links comes once per name.
    pub fn walk(&self) -> Walk<'_> {
        let root = self.children(InodeId::ROOT).map(btree_map::BTreeMap::iter);
        Walk {
            tree: self,
            path: Vec::new(),
            stack: root.into_iter().map(|children| (0, children)).collect(),
        }
    }
}

fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// Iterator of [`Tree::walk`]: paths relative to the root, without a leading slash, and their inodes.
#[derive(Debug)]
pub struct Walk<'a> {
    tree: &'a Tree,
    /// The directory whose children come next.
    path: Vec<u8>,
    stack: Vec<Level<'a>>,
}

/// An open directory: the length of its path, and its children that are still to come.
type Level<'a> = (usize, btree_map::Iter<'a, Box<[u8]>, InodeId>);

impl Iterator for Walk<'_> {
    type Item = (Vec<u8>, InodeId);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (length, children) = self.stack.last_mut()?;
            self.path.truncate(*length);
            let Some((name, id)) = children.next() else {
                self.stack.pop();
                continue;
            };
            if !self.path.is_empty() {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(name);
            if let Some(children) = self.tree.children(*id) {
                self.stack.push((self.path.len(), children.iter()));
            }
            return Some((self.path.clone(), *id));
        }
    }
}
