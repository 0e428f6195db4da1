//! The writer against four judges: `fsck.erofs` and `dump.erofs`, the `erofs-rs` reader, the kernel, and overlayfs on top.
//! Mounting needs root; a test without it fails and says so.

pub(crate) mod build;
mod kernel;
mod reader;

use std::fs;
use std::process::Command;
use std::time::Instant;

use peel_image::Digest;
use peel_image::layer::{Device, Metadata};
use peel_image::tree::{FileRef, Inode, InodeId, InodeKind, Tree};
use proptest::prelude::*;

use build::{TreeBuilder, metadata};

use super::*;

fn image_of(tree: &Tree) -> Vec<u8> {
    let mut image = Vec::new();
    let length = write_image(tree, &mut image).unwrap();
    assert_eq!(length, image.len() as u64);
    image
}

fn refusal(tree: &Tree) -> (String, String) {
    match write_image(tree, &mut std::io::sink()) {
        Err(Error::Image { name, problem }) => (name, problem),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

/// Runs erofs-utils, which must be content with the image.
fn check_with_tools(image: &[u8]) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.erofs");
    fs::write(&path, image).unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program)
            .args(arguments)
            .arg(&path)
            .output()
            .unwrap_or_else(|error| panic!("{program} (package erofs-utils) does not run: {error}"));
        let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        assert!(output.status.success(), "{program}: {text:?}");
        text.concat()
    };
    run("fsck.erofs", &[]);
    run("dump.erofs", &["-s"])
}

/// One of everything, with the sizes at which layouts change.
fn sample() -> Tree {
    let mut tree = TreeBuilder::new();
    tree.directory("usr", metadata(0o755));
    tree.directory("usr/bin", metadata(0o1777));
    tree.file("usr/bin/python3", metadata(0o4755), 6_000_000);
    tree.file("usr/bin/empty", metadata(0o600), 0);
    for size in [1, 4095, 4096, 4097, 1 << 20, (1 << 31) + 1, 1 << 40, 1 << 43] {
        tree.file(&format!("size-{size}"), metadata(0o644), size);
    }
    let hard = tree.file("hard", metadata(0o644), 77);
    tree.link("usr/hard link", hard);
    tree.link("usr/bin/\u{fc}", hard);
    for (name, length) in [
        ("l1", 1),
        ("l59", 59),
        ("l3900", 3900),
        ("l4032", 4032),
        ("l4033", 4033),
        ("l4095", 4095),
    ] {
        tree.symlink(name, &"t".repeat(length));
    }
    let device = |major, minor| Device { major, minor };
    tree.node("null", InodeKind::CharDevice(device(1, 3)), metadata(0o666));
    tree.node(
        "big",
        InodeKind::BlockDevice(device(4095, 1_048_575)),
        metadata(0o660),
    );
    tree.node("pipe", InodeKind::Fifo, metadata(0o622));
    tree.directory(&"n".repeat(255), metadata(0));
    for name in [
        "!first",
        "-dash",
        ".-between",
        ".hidden",
        "..also",
        "...",
        "~last",
    ] {
        tree.file(name, metadata(0o644), 5);
    }
    let mut owned = metadata(0o2750);
    (owned.uid, owned.gid) = (u32::MAX - 1, 4_000_000_000);
    (owned.mtime, owned.mtime_nanoseconds) = (-2, 999_999_999);
    tree.directory("owned", owned.clone());
    owned.mtime = 1 << 40;
    tree.file("owned/late", owned, 3);

    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (1_u16, 7_u16, u32::MAX),
        (2, 5, 1000),
        (4, 5, u32::MAX),
        (16, 5, u32::MAX),
        (32, 0, u32::MAX),
    ] {
        acl.extend_from_slice(&tag.to_le_bytes());
        acl.extend_from_slice(&permissions.to_le_bytes());
        acl.extend_from_slice(&id.to_le_bytes());
    }
    let mut rich = metadata(0o750);
    let mut set = |name: &str, value: &[u8]| rich.xattrs.insert(name.as_bytes().into(), value.into());
    set("user.empty", b"");
    set("user.text", b"value");
    set("user.large", &[7; 40_000]);
    set("trusted.x", b"\0\xff");
    set("trusted.overlay.opaque", b"y");
    set("trusted.overlay.overlay.twice", b"z");
    set("security.thing", b"s");
    set("system.posix_acl_access", &acl);
    set("unknown.namespace", b"dropped");
    set("user.", b"dropped");
    set(&format!("user.{}", "n".repeat(250)), b"long name");
    tree.file("rich", rich.clone(), 10);
    tree.file("rich again", rich.clone(), 0);
    rich.xattrs
        .insert(b"system.posix_acl_default".as_slice().into(), acl.into());
    tree.directory("rich directory", rich.clone());
    rich.xattrs.retain(|name, _| name.starts_with(b"user.t"));
    tree.node(
        "rich link",
        InodeKind::Symlink(b"x".as_slice().into()),
        Metadata::clone(&rich),
    );
    // Enough for several blocks, with a last block too long to stand beside the inode.
    for (directory, count, width) in [("many", 1000, 20), ("wide", 30, 250), ("almost", 17, 225)] {
        tree.directory(directory, metadata(0o755));
        for number in 0..count {
            tree.file(
                &format!("{directory}/{number:0width$}"),
                metadata(0o644),
                number % 3,
            );
        }
    }
    tree.finish()
}

#[test]
fn all_judges_agree_on_one_of_everything() {
    let tree = sample();
    let image = image_of(&tree);
    let summary = check_with_tools(&image);
    assert!(
        summary.contains("mtime") && summary.contains("sb_csum"),
        "{summary}"
    );
    assert!(
        summary.contains(&format!(
            "Filesystem inode count:                       {}",
            tree.inodes.len()
        )),
        "{summary}"
    );
    reader::compare(&tree, &image);
    kernel::compare(&tree, &image);
}

#[test]
fn an_empty_root_is_an_image() {
    let tree = TreeBuilder::new().finish();
    let image = image_of(&tree);
    check_with_tools(&image);
    reader::compare(&tree, &image);
    kernel::compare(&tree, &image);
}

#[test]
fn output_depends_on_nothing_but_the_tree() {
    assert_eq!(image_of(&sample()), image_of(&sample()));
}

#[test]
fn overlay_takes_content_from_objects() {
    kernel::overlay();
}

#[test]
fn a_hundred_thousand_files() {
    let mut tree = TreeBuilder::new();
    tree.directory("flat", metadata(0o755));
    for number in 0..50_000_u64 {
        let mut metadata = metadata(0o644);
        metadata.mtime += i64::try_from(number).unwrap();
        tree.file(&format!("flat/file-{number}"), metadata, number);
    }
    for directory in 0..500_u64 {
        tree.directory(&format!("d{directory:03}"), metadata(0o755));
        for number in 0..100 {
            tree.file(
                &format!("d{directory:03}/{number}.py"),
                metadata(0o644),
                number + directory,
            );
        }
    }
    let tree = tree.finish();
    let mut image = Vec::with_capacity(64 << 20);
    let start = Instant::now();
    write_image(&tree, &mut image).unwrap();
    eprintln!(
        "{} inodes: {} bytes in {:?}",
        tree.inodes.len(),
        image.len(),
        start.elapsed()
    );
    check_with_tools(&image);
    reader::compare(&tree, &image);
    kernel::compare(&tree, &image);
}

#[test]
fn what_the_format_cannot_hold_is_refused_by_name() {
    let with_xattrs = |count: usize, value: usize| {
        let mut metadata = metadata(0o644);
        for number in 0..count {
            let name = format!("user.{number}");
            metadata
                .xattrs
                .insert(name.as_bytes().into(), vec![0; value].into());
        }
        metadata
    };
    let long_escaped = || {
        let mut metadata = metadata(0o644);
        let name = format!("trusted.overlay.{}", "x".repeat(240));
        metadata
            .xattrs
            .insert(name.as_bytes().into(), b"".as_slice().into());
        metadata
    };
    let file = |size| {
        InodeKind::Regular(FileRef {
            size,
            object: Digest::of(b"x"),
            layer: 0,
            entry: 0,
        })
    };
    let mut late = metadata(0o644);
    late.mtime_nanoseconds = 1_000_000_000;
    for (kind, metadata, part) in [
        (file(1), with_xattrs(1, 65_536), "65536 of value"),
        (file(1), with_xattrs(5, 60_000), "extended attributes take"),
        (file(1), long_escaped(), "bytes of name"),
        (file((1 << 43) + 1), metadata(0o644), "8 TiB"),
        (file(1), late, "nanoseconds"),
        (
            InodeKind::Symlink(b"".as_slice().into()),
            metadata(0o777),
            "link target",
        ),
        (
            InodeKind::Symlink(vec![b'a'; 4096].into()),
            metadata(0o777),
            "link target",
        ),
        (
            InodeKind::CharDevice(Device {
                major: 4096,
                minor: 0,
            }),
            metadata(0o600),
            "device 4096:0",
        ),
        (
            InodeKind::BlockDevice(Device {
                major: 0,
                minor: 1 << 20,
            }),
            metadata(0o600),
            "device 0:1048576",
        ),
    ] {
        let mut tree = TreeBuilder::new();
        tree.directory("dir", build::metadata(0o755));
        tree.node("dir/it", kind, metadata);
        let (name, problem) = refusal(&tree.finish());
        assert_eq!(name, "/dir/it");
        assert!(problem.contains(part), "{problem:?} lacks {part:?}");
    }
}

#[test]
fn largest_attributes_fit() {
    let mut tree = TreeBuilder::new();
    let mut rich = metadata(0o644);
    for (name, length) in [
        ("user.a", 65_535),
        ("user.b", 65_535),
        ("user.c", 65_535),
        ("user.d", 65_000),
    ] {
        rich.xattrs
            .insert(name.as_bytes().into(), vec![b'v'; length].into());
    }
    tree.file("rich", rich, 1);
    let mut many = metadata(0o644);
    for number in 0..400 {
        many.xattrs.insert(
            format!("user.{number}").as_bytes().into(),
            b"shared".as_slice().into(),
        );
    }
    // More shared attributes than an inode can refer to.
    tree.file("many", many.clone(), 1);
    tree.file("many again", many, 1);
    let tree = tree.finish();
    let image = image_of(&tree);
    check_with_tools(&image);
    reader::compare(&tree, &image);
}

#[test]
fn what_is_no_tree_is_refused() {
    let directory = |children: &[(&[u8], u32)]| Inode {
        metadata: metadata(0o755),
        links: 2,
        kind: InodeKind::Directory(
            children
                .iter()
                .map(|(name, id)| ((*name).into(), InodeId(*id)))
                .collect(),
        ),
    };
    let fifo = || Inode {
        metadata: metadata(0o644),
        links: 1,
        kind: InodeKind::Fifo,
    };
    for (inodes, part) in [
        (vec![], "root is not a directory"),
        (vec![fifo()], "root is not a directory"),
        (vec![directory(&[(b"a", 1)])], "does not exist"),
        (vec![directory(&[(b"a", 0)])], "contains itself"),
        (
            vec![directory(&[(b"a", 1)]), directory(&[(b"b", 1)])],
            "contains itself",
        ),
        (
            vec![directory(&[(b"a", 1), (b"b", 1)]), directory(&[])],
            "two names",
        ),
        (vec![directory(&[(b"", 1)]), fifo()], "reserved"),
        (vec![directory(&[(b"..", 1)]), fifo()], "reserved"),
        (vec![directory(&[(b"a/b", 1)]), fifo()], "slash"),
        (vec![directory(&[(b"a\0b", 1)]), fifo()], "slash"),
        (vec![directory(&[(&[b'x'; 256], 1)]), fifo()], "255"),
    ] {
        let (_, problem) = refusal(&Tree { inodes });
        assert!(problem.contains(part), "{problem:?} lacks {part:?}");
    }
}

#[test]
fn a_failing_output_is_reported() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    assert!(matches!(
        write_image(&sample(), &mut Full),
        Err(Error::ImageOutput(error)) if error.kind() == io::ErrorKind::StorageFull
    ));
}

#[test]
fn cut_and_altered_images_are_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let image = image_of(&sample());
    let check = |content: &[u8]| {
        fs::write(&path, content).unwrap();
        check_image(&path).map_err(|error| error.kind())
    };
    assert_eq!(check(&image), Ok(()));
    assert_eq!(
        check(&image[..image.len() - 4096]),
        Err(io::ErrorKind::InvalidData)
    );
    assert_eq!(check(&image[..1000]), Err(io::ErrorKind::UnexpectedEof));
    assert_eq!(check(&[]), Err(io::ErrorKind::UnexpectedEof));
    for position in [1024, 1029, 1060, 1151] {
        let mut altered = image.clone();
        altered[position] ^= 1;
        assert_eq!(
            check(&altered),
            Err(io::ErrorKind::InvalidData),
            "byte {position}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_trees_read_back(tree in build::any_tree()) {
        let image = image_of(&tree);
        reader::compare(&tree, &image);
        check_with_tools(&image);
    }

    #[test]
    fn random_trees_mount(tree in build::any_tree()) {
        kernel::compare(&tree, &image_of(&tree));
    }
}
