//! Trees made by hand and at random.

use std::collections::BTreeMap;

use peel_image::Digest;
use peel_image::layer::{Device, Metadata, Xattrs};
use peel_image::tree::{FileRef, Inode, InodeId, InodeKind, Tree};
use proptest::prelude::*;

/// Builds a tree path by path; parents first.
pub(crate) struct TreeBuilder {
    inodes: Vec<Inode>,
    directories: BTreeMap<String, usize>,
}

pub(crate) fn metadata(mode: u16) -> Metadata {
    Metadata {
        mode,
        uid: 1000,
        gid: 1001,
        mtime: 1_700_000_000,
        mtime_nanoseconds: 123_456_789,
        xattrs: Xattrs::new(),
    }
}

/// What a test file of that name holds, cut or repeated to its size.
pub(crate) fn object_of(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

impl TreeBuilder {
    pub(crate) fn new() -> Self {
        let root = Inode {
            metadata: metadata(0o755),
            links: 2,
            kind: InodeKind::Directory(BTreeMap::new()),
        };
        Self {
            inodes: vec![root],
            directories: BTreeMap::from([(String::new(), 0)]),
        }
    }

    pub(crate) fn directory(&mut self, path: &str, metadata: Metadata) {
        let id = self.node(path, InodeKind::Directory(BTreeMap::new()), metadata);
        let index = usize::try_from(id.0).unwrap();
        self.inodes[index].links = 2;
        self.directories.insert(path.to_owned(), index);
        let parent = self.directories[Self::parent(path).0];
        self.inodes[parent].links += 1;
    }

    pub(crate) fn file(&mut self, path: &str, metadata: Metadata, size: u64) -> InodeId {
        let object = if size == 0 { Digest::EMPTY } else { object_of(path) };
        self.content(path, metadata, size, object)
    }

    pub(crate) fn content(&mut self, path: &str, metadata: Metadata, size: u64, object: Digest) -> InodeId {
        let file = FileRef {
            size,
            object,
            layer: 0,
            entry: 0,
        };
        self.node(path, InodeKind::Regular(file), metadata)
    }

    pub(crate) fn symlink(&mut self, path: &str, target: &str) {
        self.node(
            path,
            InodeKind::Symlink(target.as_bytes().into()),
            metadata(0o777),
        );
    }

    pub(crate) fn node(&mut self, path: &str, kind: InodeKind, metadata: Metadata) -> InodeId {
        let id = InodeId(u32::try_from(self.inodes.len()).unwrap());
        self.inodes.push(Inode {
            metadata,
            links: 0,
            kind,
        });
        self.link(path, id);
        id
    }

    pub(crate) fn link(&mut self, path: &str, id: InodeId) {
        let (parent, name) = Self::parent(path);
        let parent = *self.directories.get(parent).expect("parents come first");
        let InodeKind::Directory(children) = &mut self.inodes[parent].kind else {
            panic!("{path:?} is not below a directory");
        };
        assert!(
            children.insert(name.as_bytes().into(), id).is_none(),
            "{path:?} twice"
        );
        let inode = &mut self.inodes[usize::try_from(id.0).unwrap()];
        inode.links += 1;
    }

    pub(crate) fn finish(self) -> Tree {
        Tree { inodes: self.inodes }
    }

    fn parent(path: &str) -> (&str, &str) {
        path.rsplit_once('/').unwrap_or(("", path))
    }
}

fn any_metadata() -> impl Strategy<Value = Metadata> {
    let name = prop_oneof![
        "user\\.[a-z]{1,3}",
        "trusted\\.(overlay\\.)?[a-z]{1,20}",
        "security\\.x[a-z]{0,3}"
    ];
    let value = prop_oneof![
        3 => proptest::collection::vec(any::<u8>(), 0..40),
        1 => proptest::collection::vec(any::<u8>(), 3900..4200),
    ];
    let xattrs = proptest::collection::btree_map(name, value, 0..4).prop_map(|xattrs| {
        let boxed = |(name, value): (String, Vec<u8>)| (name.into_bytes().into(), value.into());
        xattrs.into_iter().map(boxed).collect::<Xattrs>()
    });
    let times = (-(1_i64 << 40)..1 << 40, 0..1_000_000_000_u32);
    (0..0o10_000_u16, any::<(u32, u32)>(), times, xattrs).prop_map(|(mode, owner, time, xattrs)| Metadata {
        mode,
        // The largest number means "nobody in particular" to the kernel.
        uid: owner.0.min(u32::MAX - 1),
        gid: owner.1.min(u32::MAX - 1),
        mtime: time.0,
        mtime_nanoseconds: time.1,
        xattrs,
    })
}

#[derive(Debug, Clone)]
enum Step {
    Directory,
    File(u64),
    Link,
    Symlink(usize),
    Device(u32, u32, bool),
    Fifo,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Directory),
        6 => prop_oneof![Just(0), 1..10_000_u64, 1..1_u64 << 43].prop_map(Step::File),
        2 => Just(Step::Link),
        2 => prop_oneof![1..100_usize, 3900..4096_usize].prop_map(Step::Symlink),
        // 0:0 would be a whiteout; the tree may hold one, but nothing is to be compared then.
        1 => (0..4096_u32, 1..1_u32 << 20, any::<bool>()).prop_map(|(major, minor, block)| Step::Device(major, minor, block)),
        1 => Just(Step::Fifo),
    ]
}

/// Any tree that the format can hold.
pub(crate) fn any_tree() -> impl Strategy<Value = Tree> {
    let name = prop_oneof![3 => "[!-.0-~]{1,8}", 1 => "[a-b]{230,255}"];
    let step = (any_step(), any_metadata(), name, any::<prop::sample::Index>());
    (any_metadata(), proptest::collection::vec(step, 0..120)).prop_map(|(root, steps)| {
        let mut tree = TreeBuilder::new();
        tree.inodes[0].metadata = root;
        let mut files: Vec<InodeId> = Vec::new();
        for (number, (step, metadata, name, index)) in steps.into_iter().enumerate() {
            let directories: Vec<&String> = tree.directories.keys().collect();
            let parent = index.get(&directories).as_str();
            let path = if parent.is_empty() {
                name.clone()
            } else {
                format!("{parent}/{name}")
            };
            let InodeKind::Directory(children) = &tree.inodes[tree.directories[parent]].kind else {
                continue;
            };
            if matches!(name.as_str(), "." | "..")
                || children.contains_key(name.as_bytes())
                || path.len() > 3000
            {
                continue;
            }
            match step {
                Step::Directory => tree.directory(&path, metadata),
                Step::File(size) => files.push(tree.file(&path, metadata, size)),
                Step::Link if files.is_empty() => {}
                Step::Link => tree.link(&path, *index.get(&files)),
                Step::Symlink(length) => {
                    let target = format!("{number}").repeat(length);
                    let kind = InodeKind::Symlink(target.as_bytes()[..length].into());
                    tree.node(&path, kind, metadata);
                }
                Step::Device(major, minor, block) => {
                    let device = Device { major, minor };
                    let kind = if block {
                        InodeKind::BlockDevice(device)
                    } else {
                        InodeKind::CharDevice(device)
                    };
                    tree.node(&path, kind, metadata);
                }
                Step::Fifo => {
                    tree.node(&path, InodeKind::Fifo, metadata);
                }
            }
        }
        tree.finish()
    })
}

/// The attributes that the image must show for an inode: what overlayfs reads, and the image's own, those of overlayfs
/// escaped, those outside the known namespaces gone.
pub(crate) fn expected_xattrs(inode: &Inode) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut expected = BTreeMap::new();
    for (name, value) in &inode.metadata.xattrs {
        let name = match name.strip_prefix(b"trusted.overlay.") {
            Some(rest) => [b"trusted.overlay.overlay.".as_slice(), rest].concat(),
            None if name.starts_with(b"unknown.") || **name == *b"user." => continue,
            None => name.to_vec(),
        };
        expected.insert(name, value.to_vec());
    }
    if let InodeKind::Regular(file) = &inode.kind
        && file.size > 0
    {
        let hex = file.object.hex();
        let path = format!("/{}/{}", &hex[..2], &hex[2..]);
        expected.insert(b"trusted.overlay.metacopy".to_vec(), Vec::new());
        expected.insert(b"trusted.overlay.redirect".to_vec(), path.into_bytes());
    }
    expected
}
