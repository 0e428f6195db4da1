//! Which file of which layer comes first: paths that a start touched, turned into prioritized lists per layer.
//!
//! A path belongs to the layer that provides it in the merged tree, whatever other layers hold under the same name. The
//! order of first access is kept within each layer (for the writer) and across layers (for the manifest).

use std::collections::HashSet;

use peel_image::layer::{Entry, EntryKind, LayerIndex};
use peel_image::path::EntryPath;
use peel_image::tree::{FileRef, InodeKind, Paths, Tree};

use super::patterns::Pattern;

/// A file that comes first.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Prioritized {
    /// Position of its layer, lowest first.
    pub layer: usize,
    /// Its name in that layer.
    pub path: EntryPath,
    /// The entry that holds its content: another name of the same file where `path` is a hard link.
    pub content: EntryPath,
    /// Position of the path in the list that the plan was made from.
    pub input: usize,
}

/// The order in which files come first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// By first access, every file once.
    pub files: Vec<Prioritized>,
    /// Paths that are no regular file with content in the image (made while it ran, directories, empty files), and those in
    /// layers whose order must stay.
    pub left_out: usize,
}

impl Plan {
    /// The prioritized paths of one layer.
    pub fn of_layer(&self, layer: usize) -> impl Iterator<Item = &Prioritized> {
        self.files.iter().filter(move |file| file.layer == layer)
    }

    /// Every path in every layer, for a record whose layers are not known; as ctr-remote's `convert` does.
    pub fn for_every_layer(paths: &[EntryPath], layers: usize) -> Self {
        let files = (0..layers).flat_map(|layer| {
            paths.iter().enumerate().map(move |(input, path)| Prioritized {
                layer,
                path: path.clone(),
                content: path.clone(),
                input,
            })
        });
        Self {
            files: files.collect(),
            left_out: 0,
        }
    }

    /// Finds each path's layer. Symbolic links are followed: a record holds what the kernel resolved, but lists that
    /// people write name links as well.
    pub fn new<'a>(tree: &Tree, layers: &[LayerIndex], paths: impl Iterator<Item = &'a EntryPath>) -> Self {
        let mut names: Vec<Option<HashSet<&EntryPath>>> = vec![None; layers.len()];
        let fixed = fixed(layers);
        let mut seen = HashSet::new();
        let mut plan = Self::default();
        for (input, path) in paths.enumerate() {
            let Some(file) = find(tree, path) else {
                plan.left_out += 1;
                continue;
            };
            let prioritized = locate(file, path, input, layers, &mut names);
            let prioritized = prioritized.filter(|file| !fixed.contains(&file.layer));
            let Some(prioritized) = prioritized else {
                plan.left_out += 1;
                continue;
            };
            if seen.insert((prioritized.layer, prioritized.content.clone())) {
                plan.files.push(prioritized);
            }
        }
        plan
    }
}

/// The layers with an entry below what is a symbolic link in a lower layer. Tools that unpack all layers into one tree put it
/// where that link leads, and there the order of such a layer decides which of two entries stays.
fn fixed(layers: &[LayerIndex]) -> HashSet<usize> {
    let mut links = Paths::default();
    let mut fixed = HashSet::new();
    for (number, layer) in layers.iter().enumerate() {
        let mut parent: &[u8] = b"";
        for entry in layer.entries.iter().filter(|_| !links.is_empty()) {
            let target = match &entry.kind {
                EntryKind::Hardlink(target) => Some(target),
                _ => None,
            };
            let above = entry.path.parent_and_name().map_or(&b""[..], |(above, _)| above);
            let is_new = std::mem::replace(&mut parent, above) != above;
            if is_new && links.lead_to(above)
                || target
                    .and_then(EntryPath::parent_and_name)
                    .is_some_and(|(above, _)| links.lead_to(above))
            {
                fixed.insert(number);
                break;
            }
        }
        let symlinks = layer
            .entries
            .iter()
            .filter(|entry| matches!(entry.kind, EntryKind::Symlink(_)));
        links.extend(symlinks.map(|entry| entry.path.as_bytes()));
    }
    fixed
}

fn find<'a>(tree: &'a Tree, path: &EntryPath) -> Option<&'a FileRef> {
    let inode = tree.resolve(path.as_bytes(), true).ok()?;
    match &tree.inode(inode)?.kind {
        InodeKind::Regular(file) if file.size > 0 => Some(file),
        _ => None,
    }
}

fn locate<'a>(
    file: &FileRef,
    path: &EntryPath,
    input: usize,
    layers: &'a [LayerIndex],
    names: &mut [Option<HashSet<&'a EntryPath>>],
) -> Option<Prioritized> {
    let layer = usize::try_from(file.layer).ok()?;
    let entries = &layers.get(layer)?.entries;
    let content = &entries.get(usize::try_from(file.entry).ok()?)?.path;
    let is_link = |entry: &&Entry| matches!(entry.kind, EntryKind::Hardlink(_));
    let links = names
        .get_mut(layer)?
        .get_or_insert_with(|| entries.iter().filter(is_link).map(|entry| &entry.path).collect());
    let path = if links.contains(path) { path } else { content };
    Some(Prioritized {
        layer,
        path: path.clone(),
        content: content.clone(),
        input,
    })
}

/// The paths of the tree that match, in the order of the patterns, then of the names.
pub fn matching(tree: &Tree, patterns: &[Pattern]) -> Vec<EntryPath> {
    let mut all = Vec::new();
    for pattern in patterns {
        match pattern.literal() {
            Some(path) => all.push(path),
            None => {
                let names = tree.walk().filter_map(|(name, _)| EntryPath::clean(&name).ok());
                all.extend(names.filter(|path| pattern.matches(path)));
            }
        }
    }
    all
}

/// The patterns that name no regular file with content: most are spelling mistakes.
pub fn idle<'a>(tree: &Tree, patterns: &'a [Pattern]) -> Vec<&'a Pattern> {
    let is_idle = |pattern: &&Pattern| {
        let paths = matching(tree, std::slice::from_ref(*pattern));
        !paths.iter().any(|path| find(tree, path).is_some())
    };
    patterns.iter().filter(is_idle).collect()
}

#[cfg(test)]
mod tests {
    use peel_image::Digest;
    use peel_image::layer::{Chunk, ChunkSource, Encoding, FileContent, Metadata};

    use super::super::patterns;
    use super::*;

    fn path(text: &str) -> EntryPath {
        EntryPath::clean(text.as_bytes()).unwrap()
    }

    fn entry(name: &str, kind: EntryKind) -> Entry {
        Entry {
            path: path(name),
            metadata: Metadata {
                mode: 0o755,
                ..Metadata::default()
            },
            kind,
        }
    }

    fn file(name: &str, content: &str) -> Entry {
        let digest = Digest::of(content.as_bytes());
        let size = content.len() as u64;
        let chunk = Chunk {
            file_offset: 0,
            size,
            digest,
            source: ChunkSource::Blob {
                encoding: Encoding::Gzip,
                offset: 0,
                compressed_size: 10,
                inner_offset: 0,
            },
        };
        entry(
            name,
            EntryKind::Regular(FileContent {
                size,
                digest: Some(digest),
                chunks: vec![chunk],
            }),
        )
    }

    fn layers() -> Vec<LayerIndex> {
        let layer = |entries| LayerIndex {
            entries,
            prefetch_end: None,
        };
        vec![
            layer(vec![
                entry("bin", EntryKind::Symlink(b"usr/bin".as_slice().into())),
                entry("usr/bin", EntryKind::Directory),
                file("usr/bin/sh", "shell"),
                entry("usr/bin/dash", EntryKind::Hardlink(path("usr/bin/sh"))),
                file("etc/a", "old"),
                file("etc/b", "b"),
                entry("etc/empty", EntryKind::Regular(FileContent::empty())),
            ]),
            layer(vec![file("etc/a", "new"), file("etc/.wh.b", "")]),
        ]
    }

    #[test]
    fn paths_belong_to_the_layer_that_shows() {
        let layers = layers();
        let tree = Tree::merge(&layers).unwrap();
        let record = [
            "etc/a",
            "bin/dash",
            "etc/b",
            "usr/bin/sh",
            "tmp/new",
            "usr",
            "etc/empty",
            "etc/a",
        ]
        .map(path);
        let plan = Plan::new(&tree, &layers, record.iter());
        let shown: Vec<_> = plan
            .files
            .iter()
            .map(|file| (file.layer, file.path.to_string(), file.content.to_string()))
            .collect();
        let expect = |layer, path: &str, content: &str| (layer, path.to_owned(), content.to_owned());
        assert_eq!(
            shown,
            [
                expect(1, "/etc/a", "/etc/a"),
                expect(0, "/usr/bin/sh", "/usr/bin/sh"),
            ]
        );
        assert_eq!([plan.files[0].input, plan.files[1].input], [0, 1]);
        assert_eq!(
            plan.left_out, 4,
            "gone, made at run time, a directory, an empty file"
        );
        let link = [path("usr/bin/dash")];
        let plan = Plan::new(&tree, &layers, link.iter());
        assert_eq!(plan.files[0].path, path("usr/bin/dash"));
        assert_eq!(plan.files[0].content, path("usr/bin/sh"));
        assert_eq!((plan.of_layer(0).count(), plan.of_layer(1).count()), (1, 0));
    }

    #[test]
    fn layers_that_lead_through_links_of_others_keep_their_order() {
        let layer = |entries| LayerIndex {
            entries,
            prefetch_end: None,
        };
        let layers = vec![
            layer(vec![
                entry("s", EntryKind::Symlink(b"real".as_slice().into())),
                file("x", "1"),
            ]),
            layer(vec![file("real/a", "2"), file("s/a", "3")]),
            layer(vec![
                entry("d/l", EntryKind::Hardlink(path("s/a"))),
                file("y", "4"),
            ]),
            layer(vec![file("sx/b", "5"), file("z", "6")]),
        ];
        assert_eq!(fixed(&layers), HashSet::from([1, 2]));
        let tree = Tree::merge(&layers).unwrap();
        let record = ["x", "real/a", "s/a", "y", "z"].map(path);
        let plan = Plan::new(&tree, &layers, record.iter());
        let shown: Vec<_> = plan
            .files
            .iter()
            .map(|file| (file.layer, file.path.to_string()))
            .collect();
        assert_eq!(shown, [(0, "/x".to_owned()), (3, "/z".to_owned())]);
        assert_eq!(plan.left_out, 3);
    }

    #[test]
    fn patterns_name_files_of_the_tree() {
        let tree = Tree::merge(&layers()).unwrap();
        let list = patterns::parse(b"etc/a\nusr/bin/*\n").unwrap();
        assert_eq!(
            matching(&tree, &list),
            ["etc/a", "usr/bin/dash", "usr/bin/sh"].map(path)
        );
        let list = patterns::parse(b"etc/a\n/etc/A\nusr/*\n**/sh\n*.p?\n").unwrap();
        let idle: Vec<_> = idle(&tree, &list).iter().map(ToString::to_string).collect();
        assert_eq!(idle, ["etc/A", "usr/*", "*.p?"]);
    }
}
