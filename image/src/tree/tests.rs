//! Edge cases as a table, and random layers against a naive model.
//!
//! Layers and trees are written one entry per line: `d PATH` directory, `f PATH CONTENT` file, `h PATH TARGET` hard link,
//! `s PATH TARGET` symbolic link, `c PATH MAJOR:MINOR` device, `p PATH` fifo. `@N` gives the user id by which metadata
//! is told apart (default 0), and in a tree `xN` the link count where it is not 1 (files) or 2 and more (directories).

mod model;

use std::collections::BTreeMap;
use std::time::Instant;

use proptest::prelude::*;

use super::merge::Limits;
use super::*;
use crate::layer::{Entry, EntryKind, FileContent, SYMLINK_MODE};

fn path(text: &str) -> EntryPath {
    EntryPath::clean(text.as_bytes()).unwrap()
}

fn file(content: &str) -> EntryKind {
    EntryKind::Regular(FileContent {
        size: content.len() as u64,
        digest: Some(Digest::of(content.as_bytes())),
        chunks: Vec::new(),
    })
}

fn entry(name: &str, kind: EntryKind) -> Entry {
    let metadata = Metadata {
        mode: 0o755,
        ..Metadata::default()
    };
    Entry {
        path: path(name),
        metadata,
        kind,
    }
}

fn parse(line: &str) -> Entry {
    let (line, uid) = line.split_once(" @").unwrap_or((line, "0"));
    let mut words = line.split(' ');
    let (kind, name, argument) = (
        words.next().unwrap(),
        words.next().unwrap(),
        words.next().unwrap_or_default(),
    );
    let kind = match kind {
        "d" => EntryKind::Directory,
        "f" => file(argument),
        "h" => EntryKind::Hardlink(path(argument)),
        "s" => EntryKind::Symlink(argument.as_bytes().into()),
        "c" => {
            let (major, minor) = argument.split_once(':').unwrap();
            let (major, minor) = (major.parse().unwrap(), minor.parse().unwrap());
            EntryKind::CharDevice(Device { major, minor })
        }
        "p" => EntryKind::Fifo,
        _ => panic!("{line}"),
    };
    let mut entry = entry(name, kind);
    entry.metadata.uid = uid.parse().unwrap();
    entry
}

fn layer(entries: impl IntoIterator<Item = Entry>) -> LayerIndex {
    LayerIndex {
        entries: entries.into_iter().collect(),
        prefetch_end: None,
    }
}

fn layers(texts: &[&str]) -> Vec<LayerIndex> {
    let lines = |text: &&str| layer(text.split(", ").filter(|line| !line.is_empty()).map(parse));
    texts.iter().map(lines).collect()
}

/// The tree in the notation above. Contents are shown as the layer and entry that hold them would have them.
fn show(tree: &Tree, layers: &[LayerIndex]) -> Vec<String> {
    let line = |(path, id): (Vec<u8>, InodeId)| {
        let path = String::from_utf8(path).unwrap();
        let inode = tree.inode(id).unwrap();
        let mut line = match &inode.kind {
            InodeKind::Directory(_) => format!("d {path}"),
            InodeKind::Regular(file) => {
                let source = &layers[file.layer as usize].entries[file.entry as usize];
                let EntryKind::Regular(content) = &source.kind else {
                    panic!("{path} refers to {source:?}");
                };
                assert_eq!((content.size, content.digest), (file.size, Some(file.object)));
                format!("f {path} {}.{}", file.layer, file.entry)
            }
            InodeKind::Symlink(target) => format!("s {path} {}", String::from_utf8_lossy(target)),
            InodeKind::CharDevice(device) | InodeKind::BlockDevice(device) => {
                format!("c {path} {}:{}", device.major, device.minor)
            }
            InodeKind::Fifo => format!("p {path}"),
        };
        if inode.metadata.uid != 0 {
            line += &format!(" @{}", inode.metadata.uid);
        }
        if !matches!(inode.kind, InodeKind::Directory(_)) && inode.links != 1 {
            line += &format!(" x{}", inode.links);
        }
        line
    };
    tree.walk().map(line).collect()
}

#[test]
fn edge_cases() {
    for (texts, expected) in [
        (&[][..], ""),
        (&[""], ""),
        // Missing parents.
        (&["f a/b/c 1"], "d a, d a/b, f a/b/c 0.0"),
        (&["f a/b 1, d a @5"], "d a @5, f a/b 0.0"),
        (&["d a @5", "f a/b 1"], "d a @5, f a/b 1.0"),
        // Later wins, between layers and within one.
        (&["f a 1", "f a 2 @3"], "f a 1.0 @3"),
        (&["f a 1, f a 2"], "f a 0.1"),
        (&["d a, f a/b 1, f a 2"], "f a 0.2"),
        (&["f a 1, d a, f a/b 1"], "d a, f a/b 0.2"),
        // Directories over directories, files over directories, directories over files.
        (&["d a @1, f a/b 1", "d a @2"], "d a @2, f a/b 0.1"),
        (&["d a, f a/b 1", "f a 2"], "f a 1.0"),
        (&["f a 1", "d a, f a/b 2"], "d a, f a/b 1.1"),
        (&["f a 1", "f a/b 2"], "d a, f a/b 1.0"),
        (&["d a @1, f a/b 1", "s a x", "d a @2"], "d a @2"),
        // Whiteouts.
        (
            &["f b/x 1", "s c b, h a c, f a/.wh..wh..opq 0"],
            "s a b x2, d b, s c b x2",
        ),
        (&["f a 1, f b 1", "f .wh.a -"], "f b 0.1"),
        (&["d a, f a/b 1", "f .wh.a -"], ""),
        (&["d a, f a/b 1, f a/c 1", "f a/.wh.b -"], "d a, f a/c 0.2"),
        (&["f a 1", "f .wh.a -, f a 2"], "f a 1.1"),
        (&["f a 1", "f a 2, f .wh.a -"], "f a 1.0"),
        (
            &["d a @1, f a/b 1", "d a @2, f a/c 2, f .wh.a -"],
            "d a @2, f a/c 1.1",
        ),
        (&["d a, f a/b 1", "f a/.wh.b -", "f a/b 3"], "d a, f a/b 2.0"),
        (&["f a 1", "f .wh.b -"], "f a 0.0"),
        (&["", "f a/b/.wh.c -"], "d a, d a/b"),
        (&["f a 1", "f a/.wh.c -"], "d a"),
        (&["f a 1, f .wh.a -"], "f a 0.0"),
        (&["f .wh..wh.aufs -, f .wh..wh.plnk/1 -, f a 1"], "f a 0.2"),
        (&["f d/.wh.x 1", "f d/.wh..wh.x -"], "d d"),
        // AUFS's bookkeeping: links into it are followed, nothing of it is seen, and it is no whiteout.
        (
            &[
                "f bin/old 1",
                "d .wh..wh.plnk, f .wh..wh.plnk/1 1, f .wh..wh.plnk/.wh.old 1, d .wh..wh.orph, f .wh..wh.aufs -, \
                 h bin/foo .wh..wh.plnk/1, h bin/bar .wh..wh.plnk/1",
                "f .wh..wh.plnk/1 2",
            ],
            "d bin, f bin/bar 1.1 x2, f bin/foo 1.1 x2, f bin/old 0.0",
        ),
        // By way of a symbolic link of their layer, where it led at that time.
        (
            &["f r/x 1, f r/y 1, f q/x 1", "s s r, f s/.wh.x -, s s q"],
            "d q, f q/x 0.2, d r, f r/y 0.1, s s q",
        ),
        (
            &["f r/x 1, f q/x 1", "s s r, f s/.wh..wh..opq -, f r/z 1"],
            "d q, f q/x 0.1, d r, f r/z 1.2, s s r",
        ),
        // Opaque directories.
        (
            &["d a @1, f a/b 1, d a/c", "d a @2, f a/d 2, f a/.wh..wh..opq -"],
            "d a @2, f a/d 1.1",
        ),
        (&["d a, f a/b 1", "f a/.wh..wh..opq -, f a/b 2"], "d a, f a/b 1.1"),
        (&["d a @7, f a/b 1", "f a/.wh..wh..opq -"], "d a @7"),
        (&["f a 1, f b 1", "f .wh..wh..opq -, f c 1"], "f c 1.1"),
        (
            &["d a, f a/b 1", "f a/.wh..wh..opq -", "f a/c 2"],
            "d a, f a/c 2.0",
        ),
        // The root's own entry.
        (&["d . @4, f a 1"], "f a 0.1"),
        // Names that try to leave the tree.
        (&["f ../../a 1, f /b/../../c 1"], "f a 0.0, f c 0.1"),
        // Hard links.
        (&["f a 1, h b a"], "f a 0.0 x2, f b 0.0 x2"),
        // They give what they say of the owner to their target, if they come later.
        (&["f a 1 @1, h b a @2"], "f a 0.0 @2 x2, f b 0.0 @2 x2"),
        (
            &["f a 1 @1, h b a @2, h c b @3"],
            "f a 0.0 @3 x3, f b 0.0 @3 x3, f c 0.0 @3 x3",
        ),
        (&["h b a @2, f a 1 @1"], "f a 0.1 @1 x2, f b 0.1 @1 x2"),
        (&["f a 1 @1", "h b a @2"], "f a 0.0 @1 x2, f b 0.0 @1 x2"),
        (&["f a 1 @1", "h b a @2, f a 2 @3"], "f a 1.1 @3, f b 0.0 @1"),
        (&["f a 1 @1, h b a @2, f b 2 @3"], "f a 0.0 @2, f b 0.2 @3"),
        (&["f a 1 @1, h b a @2, f a 2 @3"], "f a 0.2 @3, f b 0.0 @2"),
        (&["s a x @1, h b a @2"], "s a x @2 x2, s b x @2 x2"),
        (&["h b a, f a 1"], "f a 0.1 x2, f b 0.1 x2"),
        (&["h c b, h b a, f a 1"], "f a 0.2 x3, f b 0.2 x3, f c 0.2 x3"),
        (&["f a 1, h b a, f a 2"], "f a 0.2, f b 0.0"),
        (&["f a 1", "h b a"], "f a 0.0 x2, f b 0.0 x2"),
        (&["f a 1", "h b a, f a 2"], "f a 1.1, f b 0.0"),
        (&["f a 1, h b a", "f a 2"], "f a 1.0, f b 0.0"),
        (&["f a 1, h b a", "f .wh.a -"], "f b 0.0"),
        (&["f a 1, h b a", "h c b, f .wh.a -"], "f b 0.0 x2, f c 0.0 x2"),
        (&["s a x, h b a"], "s a x x2, s b x x2"),
        (&["c a 1:3, h b a"], "c a 1:3 x2, c b 1:3 x2"),
        (&["h b missing, f b 1"], "f b 0.1"),
        (
            &["d d, f d/a 1, s e d, h b e/a"],
            "f b 0.1 x2, d d, f d/a 0.1 x2, s e d",
        ),
        // Symbolic links as parents: those of the same layer are followed, inside the tree.
        (
            &["d usr, s lib usr/lib, f lib/a 1"],
            "s lib usr/lib, d usr, d usr/lib, f usr/lib/a 0.2",
        ),
        (
            &["s lib /usr/lib, f lib/a 1"],
            "s lib /usr/lib, d usr, d usr/lib, f usr/lib/a 0.1",
        ),
        // A directory that is replaced by way of such a link is not the parent of what follows.
        (
            &["s l /, d e, d d, f d/a 1, s l/d e, f d/b 2"],
            "s d e, d e, f e/b 0.5, s l /",
        ),
        (
            &["d d, s d/up ../../../x, f d/up/a 1"],
            "d d, s d/up ../../../x, d x, f x/a 0.2",
        ),
        (&["s a b, s b c, f a/x 1"], "s a b, s b c, d c, f c/x 0.2"),
        (
            &["s lib usr/lib, d usr, d usr/lib", "f lib/a 1"],
            "d lib, f lib/a 1.0, d usr, d usr/lib",
        ),
        // Overlayfs's own whiteout.
        (&["f a 1, f b 1", "c a 0:0"], "f b 0.1"),
        (&["c a 0:0, c b 0:1"], "c b 0:1"),
        // What eStargz keeps for itself, in the root directory only.
        (
            &[
                "f .prefetch.landmark 1, f .no.prefetch.landmark 1, f stargz.index.json 1, f a/.prefetch.landmark 1",
            ],
            "d a, f a/.prefetch.landmark 0.3",
        ),
    ] {
        let layers = layers(texts);
        let tree = Tree::merge(&layers).unwrap_or_else(|error| panic!("{texts:?}: {error}"));
        assert_eq!(show(&tree, &layers).join(", "), expected, "{texts:?}");
    }
}

#[test]
fn impossible_layers_are_clear_errors() {
    for (texts, expected) in [
        (
            &["h a b"][..],
            "layer 0: /a is a hard link to /b, which does not exist",
        ),
        (
            &["f b 1", "f .wh.b -, h a b"],
            "layer 1: /a is a hard link to /b, which does not exist",
        ),
        (
            &["h a a"],
            "layer 0: /a is a hard link to /a, which leads back to it",
        ),
        (&["h a b, h b c, h c a"], "leads back to it"),
        (
            &["d b, h a b"],
            "layer 0: /a is a hard link to /b, which is a directory",
        ),
        (&["h a /"], "is a directory"),
        (&["h a b, d b"], "is a directory"),
        (
            &["f a 1, f a/b 1"],
            "layer 0: /a/b lies below an entry of the same layer",
        ),
        (&["h a b, f b 1, f a/c 1"], "layer 0: /a/c lies below"),
        (&["f b 1", "h a b, f a/c 1"], "layer 1: /a/c lies below"),
        (
            &["s a b, s b a, f a/x 1"],
            "layer 0: /a/x leads through more than 40 symbolic links",
        ),
        (&["f . 1"], "layer 0: entry 0 would replace the root"),
        (
            &["d x, f a/.wh.. -"],
            "layer 0: /a/.wh.. is a whiteout of no name",
        ),
        (&["f .wh.. -"], "whiteout of no name"),
        (&["f .wh... -"], "whiteout of no name"),
        (&["f .wh. -"], "whiteout of no name"),
    ] {
        let error = Tree::merge(&layers(texts)).unwrap_err().to_string();
        assert!(error.contains(expected), "{texts:?}: {error}");
    }
}

#[test]
fn contents_must_be_known() {
    let with = |size, digest| {
        let chunks = Vec::new();
        Tree::merge(&[layer([entry(
            "d/a",
            EntryKind::Regular(FileContent { size, digest, chunks }),
        )])])
    };
    let error = with(1, None).unwrap_err();
    assert!(matches!(error, TreeError::NoDigest { layer: 0, .. }), "{error}");
    assert!(matches!(
        with(1, Some(Digest::EMPTY)),
        Err(TreeError::EmptyDigest { .. })
    ));
    assert!(matches!(
        with(0, Some(Digest::of(b"x"))),
        Err(TreeError::EmptyDigest { .. })
    ));
    let tree = with(0, None).unwrap();
    let id = tree.lookup(&path("d/a")).unwrap();
    assert!(
        matches!(&tree.inode(id).unwrap().kind, InodeKind::Regular(file) if file.object == Digest::EMPTY)
    );
}

#[test]
fn attributes_that_steer_overlayfs_are_left_out() {
    let mut entry = entry("a", file("x"));
    for name in [
        &b"trusted.overlay.redirect"[..],
        b"trusted.overlay",
        b"user.overlay.opaque",
    ] {
        entry.metadata.xattrs.insert(name.into(), Box::default());
    }
    let tree = Tree::merge(&[layer([entry])]).unwrap();
    let names: Vec<_> = tree.inodes[1]
        .metadata
        .xattrs
        .keys()
        .map(|name| name.to_vec())
        .collect();
    assert_eq!(names, [&b"trusted.overlay"[..], b"user.overlay.opaque"]);
}

#[test]
fn inodes_have_link_counts_and_parents_come_first() {
    let layers = layers(&["d a @2, d a/b, d a/c, f a/c/x 1, h y a/c/x"]);
    let tree = Tree::merge(&layers).unwrap();
    let links = |name: &str| tree.inode(tree.lookup(&path(name)).unwrap()).unwrap().links;
    assert_eq!((links(""), links("a"), links("a/b"), links("y")), (3, 4, 2, 2));
    assert_eq!(tree.inodes.len(), 5);
    assert_eq!(tree.inodes[0].metadata.mode, 0o755);
    for (id, inode) in (0_u32..).zip(&tree.inodes) {
        if let InodeKind::Directory(children) = &inode.kind {
            for child in children.values() {
                let is_directory = tree.children(*child).is_some();
                assert!(
                    child.0 > id || !is_directory,
                    "{child:?} comes before its parent {id}"
                );
            }
        }
    }
}

#[test]
fn paths_resolve_as_in_the_container() {
    let layers =
        layers(&["d usr, f usr/a 1, s lib usr, s abs /lib/a, s up ../../usr/a, s loop loop, s dangling no"]);
    let tree = Tree::merge(&layers).unwrap();
    let a = tree.lookup(&path("usr/a")).unwrap();
    for name in [
        "usr/a",
        "/lib/a",
        "abs",
        "up",
        "/../usr/./a",
        "lib/../usr/a",
        "//lib//a",
    ] {
        assert_eq!(tree.resolve(name.as_bytes(), true), Ok(a), "{name}");
    }
    assert_eq!(tree.resolve(b"", true), Ok(InodeId::ROOT));
    assert_eq!(
        tree.resolve(b"lib/", false),
        Ok(tree.lookup(&path("usr")).unwrap())
    );
    assert_eq!(
        tree.resolve(b"lib", false),
        Ok(tree.lookup(&path("lib")).unwrap())
    );
    assert_eq!(tree.lookup(&path("lib/a")), None);
    assert!(matches!(tree.resolve(b"loop", true), Err(ResolveError::Loop(_))));
    assert!(matches!(
        tree.resolve(b"usr/a/", true),
        Err(ResolveError::NotDirectory(_))
    ));
    assert!(matches!(
        tree.resolve(b"usr/a/x", true),
        Err(ResolveError::NotDirectory(_))
    ));
    assert!(matches!(
        tree.resolve(b"dangling", true),
        Err(ResolveError::NotFound(_))
    ));
    assert_eq!(
        tree.resolve(b"usr/no", true),
        Err(ResolveError::NotFound("/usr/no".into()))
    );
}

#[test]
fn hard_links_give_all_their_metadata() {
    let xattr = |name: &str, value: &str| (name.as_bytes().into(), value.as_bytes().into());
    let with = |line: &str, mode, mtime, xattrs: &[(&str, &str)]| {
        let mut entry = parse(line);
        entry.metadata = Metadata {
            mode,
            uid: 1,
            gid: 2,
            mtime,
            mtime_nanoseconds: 5,
            xattrs: xattrs.iter().map(|(name, value)| xattr(name, value)).collect(),
        };
        entry
    };
    let both = [("security.capability", "c"), ("user.a", "1")];
    let cap = [("security.capability", "d")];
    for (target, links, mode, xattrs) in [
        (
            "f a 1",
            vec![vec![("user.b", "2")]],
            0o4711,
            vec![("user.a", "1"), ("user.b", "2")],
        ),
        ("f a 1", vec![both.to_vec()], 0o4711, both.to_vec()),
        (
            "f a 1",
            vec![vec![], cap.to_vec()],
            0o4711,
            vec![("security.capability", "d"), ("user.a", "1")],
        ),
        ("f a 1", vec![cap.to_vec(), vec![]], 0o4711, vec![("user.a", "1")]),
        (
            "s a x",
            vec![vec![("user.a", "3")]],
            SYMLINK_MODE,
            vec![("user.a", "3")],
        ),
    ] {
        let target = with(
            target,
            if target.starts_with('s') {
                SYMLINK_MODE
            } else {
                0o644
            },
            1,
            &both,
        );
        let links = links.iter().map(|xattrs| with("h b a", 0o4711, 9, xattrs));
        let layer = layer(std::iter::once(target).chain(links));
        let tree = Tree::merge(std::slice::from_ref(&layer)).unwrap();
        let expected = Metadata {
            mode,
            ..with("f a 1", 0, 9, &xattrs).metadata
        };
        for name in ["a", "b"] {
            let inode = tree.inode(tree.lookup(&path(name)).unwrap()).unwrap();
            assert_eq!(inode.metadata, expected, "{layer:?}");
        }
    }
}

#[test]
fn what_layers_imply_has_limits() {
    let limits = Limits {
        implied: 10,
        image_implied: 15,
        bytes: 100_000,
        steps: 1000,
    };
    let chain = |start: char, length: usize| format!("f {start}/{}x 1", "d/".repeat(length - 1));
    let texts = |texts: &[&str]| merge::merge(&layers(texts), limits);
    assert!(texts(&[&chain('a', 10), &chain('b', 5)]).is_ok());
    // What has an entry, or was there before, is not implied.
    let listed = "d a, d a/b, d a/b/c, f a/b/c/d/e/f/g/h/i/j/k/l/m/x 1";
    assert!(texts(&[listed, listed, &chain('z', 5)]).is_ok());
    for (layers, layer, limit) in [
        (vec![chain('a', 11)], 0, 10),
        (vec![chain('a', 1), chain('b', 11)], 1, 10),
        (vec![chain('a', 10), chain('b', 6)], 1, 15),
        (vec![format!("{}, {}", chain('a', 6), chain('b', 5))], 0, 10),
    ] {
        let layers: Vec<&str> = layers.iter().map(String::as_str).collect();
        let error = texts(&layers).unwrap_err();
        assert_eq!(error, TreeError::TooManyImplied { layer, limit }, "{layers:?}");
    }
    let many = |count: usize, line: fn(usize) -> String| {
        let lines: Vec<String> = (0..count).map(line).collect();
        texts(&[&lines.join(", ")])
    };
    let file = |number: usize| format!("f {number} x");
    assert!(many(300, file).is_ok());
    assert_eq!(many(500, file).unwrap_err(), TreeError::TooLarge { layer: 0 });
    let directory = |number: usize| format!("d {number}");
    assert!(many(160, directory).is_ok());
    assert_eq!(
        many(170, directory).unwrap_err(),
        TreeError::TooLarge { layer: 0 }
    );

    // Where a whiteout leads by way of a symbolic link is found without the lower layers.
    let lower = "d a, d b, d c, d d, d e, d f, f f/x 1";
    let upper = |last: char| {
        let files: Vec<String> = ('a'..=last).map(|name| format!("f {name}/d/y 2")).collect();
        format!("{}, s s f, f s/.wh.x 0", files.join(", "))
    };
    let tree = texts(&[lower, &upper('d')]).unwrap();
    assert_eq!(tree.lookup(&path("f/x")), None);
    let error = texts(&[lower, &upper('e')]).unwrap_err();
    assert_eq!(error, TreeError::TooManyImplied { layer: 1, limit: 10 });

    // Paths that are long only by way of symbolic links.
    let long = format!("s s {}", "./".repeat(500));
    for line in ["f s/x 1", "h l s/x"] {
        let once = format!("f x 1, {long}, {line}");
        assert!(texts(&[&once]).is_ok(), "{line}");
        let again = format!("{once}, {line}, {line}, {line}");
        assert_eq!(
            texts(&[&again]).unwrap_err(),
            TreeError::TooManySteps { layer: 0 },
            "{line}"
        );
    }
}

#[test]
fn messages_about_limits_name_layer_and_limit() {
    for (limit, expected) in [
        (
            IMPLIED_MAX,
            "layer 3: its paths lead through more than 250000 directories that have no entry",
        ),
        (
            IMAGE_IMPLIED_MAX,
            "layer 3: its paths lead through more than 500000 directories that have no entry, together with the layers below",
        ),
    ] {
        let error = TreeError::TooManyImplied { layer: 3, limit };
        assert_eq!((error.to_string().as_str(), error.layer()), (expected, 3));
    }
}

#[test]
fn large_and_deep_layers() {
    let start = Instant::now();
    let wide = layer((0..100_000).map(|number| {
        let name = format!(
            "usr/lib/python3/dist-packages/package{}/module{number}.py",
            number % 1000
        );
        entry(&name, file(&number.to_string()))
    }));
    let deep = layer([entry(&"d/".repeat(2048), EntryKind::Directory)]);
    // A chain of links, each to one that comes later.
    let chain = (0..50_000).map(|number| {
        let kind = EntryKind::Hardlink(path(&format!("l{}", number + 1)));
        entry(&format!("l{number}"), kind)
    });
    let chain = layer(chain.chain([entry("l50000", file("end"))]));
    let merged = Instant::now();
    let tree = Tree::merge(&[wide, deep, chain]).unwrap();
    println!("made in {:?}, merged in {:?}", merged - start, merged.elapsed());
    assert_eq!(tree.inodes.len(), 1 + 4 + 1000 + 100_000 + 2048 + 1);
    assert_eq!(
        tree.inode(tree.lookup(&path("l7")).unwrap()).unwrap().links,
        50_001
    );
    assert_eq!(tree.walk().count(), 4 + 1000 + 100_000 + 2048 + 50_001);

    // Symbolic links that put a directory ever deeper end at the longest path that Linux has.
    let long = "e/".repeat(1500);
    let entries = [
        entry("a", EntryKind::Symlink(long.as_bytes().into())),
        entry(&format!("{long}b"), EntryKind::Symlink(long.as_bytes().into())),
        entry("a/b/x", file("1")),
    ];
    let error = Tree::merge(&[layer(entries)]).unwrap_err();
    assert!(matches!(error, TreeError::TooDeep { .. }), "{error}");
}
