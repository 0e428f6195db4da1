//! Tar streams on which the big tools disagree, and what peel makes of each: the rows of the table "Who does what" in
//! ARCHITECTURE.md. Every stream is mounted as an ordinary gzip layer, and again in every lazy format that can hold it: the
//! tree must be the same.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use peel_tests::image::{ESTARGZ, Layer, MTIME, Tar, estargz_with, push, zstd_chunked};
use peel_tests::world::{World, errors};
use peel_writer::{Dialect, Format};

/// What must come of an image.
#[derive(Debug, Clone, Copy)]
enum Outcome {
    /// This listing.
    Tree(&'static str),
    /// A refusal that says this.
    Refused(&'static str),
}
use Outcome::{Refused, Tree};

struct Case {
    name: &'static str,
    layers: Vec<Vec<u8>>,
    outcome: Outcome,
}

fn case(name: &'static str, tars: &[Tar], outcome: Outcome) -> Case {
    Case {
        name,
        layers: tars.iter().map(|tar| tar.clone().finish()).collect(),
        outcome,
    }
}

/// CAP_NET_RAW in version 2 of the attribute.
const CAPABILITY: &[u8] = &[0, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn t() -> Tar {
    Tar::new()
}

fn cases() -> Vec<Case> {
    let long = |name: &[u8]| t().pax("path", name).file("short", b"x");
    let deep = vec!["d".repeat(200); 21].join("/");
    let mut cases = vec![
        // Names.
        case("absolute name", &[t().file("/abs", b"x")], Tree("abs f=x")),
        case(
            "dots above the root",
            &[t().file("../../up", b"x")],
            Tree("up f=x"),
        ),
        case(
            "dots inside",
            &[t().dir("a").file("a/../b", b"x")],
            Tree("a d755; b f=x"),
        ),
        case(
            "not UTF-8",
            &[t().node(b"\xff\xfe", b'0', "", 0o644, (0, 0), b"x")],
            Tree("\u{fffd}\u{fffd} f=x"),
        ),
        case(
            "a real U+FFFD",
            &[t().node("\u{fffd}".as_bytes(), b'0', "", 0o644, (0, 0), b"x")],
            Tree("\u{fffd} f=x"),
        ),
        case(
            "a component of 255 bytes",
            &[long(&[b'n'; 255])],
            Tree("n*255 f=x"),
        ),
        case(
            "a component of 256 bytes",
            &[long(&[b'n'; 256])],
            Refused("more than 255 bytes"),
        ),
        case(
            "a path above PATH_MAX",
            &[long(format!("{deep}/x").as_bytes())],
            Refused("longer than 4095 bytes"),
        ),
        case("a NUL in a name", &[long(b"a\0b")], Refused("NUL byte")),
        // Order and duplicates.
        case(
            "a file twice",
            &[t().file("a", b"first").file("a", b"second")],
            Tree("a f=second"),
        ),
        case(
            "a directory twice",
            &[t().dir("a").file("a/x", b"x").entry("a", b'5', "", 0o700, b"")],
            Tree("a d700; a/x f=x"),
        ),
        case(
            "a file over a directory",
            &[t().dir("a").file("a/x", b"x").file("a", b"y")],
            Tree("a f=y"),
        ),
        case(
            "a directory over a file",
            &[t().file("a", b"y").dir("a").file("a/x", b"x")],
            Tree("a d755; a/x f=x"),
        ),
        case(
            "a symlink over a directory",
            &[t().dir("a").file("a/x", b"x").symlink("a", "b")],
            Tree("a ->b"),
        ),
        case(
            "no entries for parents",
            &[t().file("p/q/r", b"x")],
            Tree("p d755; p/q d755; p/q/r f=x"),
        ),
        case(
            "a parent after its child",
            &[t().file("p/x", b"x").entry("p", b'5', "", 0o700, b"")],
            Tree("p d700; p/x f=x"),
        ),
        case(
            "a directory over a file over a lower directory",
            &[
                t().dir("a").file("a/low", b"x"),
                t().file("a", b"y").dir("a").file("a/x", b"x"),
            ],
            Tree("a d755; a/x f=x"),
        ),
        case(
            "a directory over a file over a directory",
            &[t()
                .dir("a")
                .file("a/y", b"y")
                .file("a", b"z")
                .dir("a")
                .file("a/x", b"x")],
            Tree("a d755; a/x f=x"),
        ),
        case(
            "a file over a directory without an entry",
            &[t().file("p/x", b"x").file("p", b"y")],
            Tree("p f=y"),
        ),
        case(
            "a file twice, by two spellings",
            &[t().file("a", b"1").file("/a", b"2")],
            Tree("a f=2"),
        ),
        // Hard links.
        case(
            "a hard link to a file that is replaced",
            &[t().file("a", b"one").hard_link("l", "a").file("a", b"two!")],
            Tree("a f=two!; l f=one"),
        ),
        case(
            "hard links to a file that is replaced by a directory",
            &[t()
                .file("a", b"one")
                .hard_link("l", "a")
                .hard_link("m", "l")
                .dir("a")
                .file("a/x", b"x")],
            Tree("a d755; a/x f=x; l f=one n2; m f=one n2"),
        ),
        case(
            "a hard link to a file of a replaced directory",
            &[t().file("d/a", b"one").hard_link("l", "d/a").symlink("d", "x")],
            Tree("d ->x; l f=one"),
        ),
        case(
            "a hard link to a lower file that is replaced",
            &[t().file("a", b"old"), t().hard_link("l", "a").file("a", b"new")],
            Tree("a f=new; l f=old"),
        ),
        case(
            "a hard link before its target",
            &[t().hard_link("l", "a").file("a", b"x")],
            Tree("a f=x n2; l f=x n2"),
        ),
        case(
            "a hard link to itself",
            &[t().hard_link("l", "l")],
            Refused("hard link"),
        ),
        case(
            "hard links in a circle",
            &[t().hard_link("x", "y").hard_link("y", "x")],
            Refused("hard link"),
        ),
        case(
            "a hard link to a directory",
            &[t().dir("d").hard_link("l", "d")],
            Refused("is a directory"),
        ),
        case(
            "a hard link to nothing",
            &[t().hard_link("l", "nothing")],
            Refused("does not exist"),
        ),
        case(
            "a hard link out of the tree",
            &[t().hard_link("l", "../../etc/hostname")],
            Refused("does not exist"),
        ),
        case(
            "a hard link to a symlink",
            &[t().file("a", b"x").symlink("s", "a").hard_link("l", "s")],
            Tree("a f=x; l ->a; s ->a"),
        ),
        case(
            "a hard link to a lower layer",
            &[t().file("a", b"x"), t().hard_link("l", "a")],
            Tree("a f=x n2; l f=x n2"),
        ),
        case(
            "a hard link with metadata of its own",
            &[t()
                .file("a", b"x")
                .pax("uid", b"2")
                .pax("mtime", b"5")
                .pax("SCHILY.xattr.user.k", b"v")
                .entry("b", b'1', "a", 0o4755, b"")],
            Tree("a f=x n2 m4755 u2:0 t5 user.k; b f=x n2 m4755 u2:0 t5 user.k"),
        ),
        case(
            "a hard link before its target, with metadata of its own",
            &[t().entry("b", b'1', "a", 0o4755, b"").file("a", b"x")],
            Tree("a f=x n2; b f=x n2"),
        ),
        case(
            "a hard link to a lower layer, with metadata of its own",
            &[t().file("a", b"x"), t().entry("b", b'1', "a", 0o4755, b"")],
            Tree("a f=x n2; b f=x n2"),
        ),
        case(
            "a hard link without the capability of its target",
            &[t()
                .pax("SCHILY.xattr.security.capability", CAPABILITY)
                .file("a", b"x")
                .hard_link("b", "a")],
            Tree("a f=x n2; b f=x n2"),
        ),
        case(
            "a hard link with a capability",
            &[t()
                .file("a", b"x")
                .pax("SCHILY.xattr.security.capability", CAPABILITY)
                .hard_link("b", "a")],
            Tree("a f=x n2 security.capability; b f=x n2 security.capability"),
        ),
        case(
            "a hard link to a symlink, with metadata of its own",
            &[t()
                .file("a", b"x")
                .symlink("s", "a")
                .pax("uid", b"2")
                .entry("l", b'1', "s", 0o600, b"")],
            Tree("a f=x; l ->a u2:0; s ->a u2:0"),
        ),
        case(
            "a file below a hard link to a lower file",
            &[t().file("a", b"x"), t().hard_link("l", "a").file("l/x", b"x")],
            Refused("no directory"),
        ),
        // Symbolic links.
        case(
            "symlinks with other modes",
            &[t()
                .file("a", b"x")
                .entry("s", b'2', "a", 0o644, b"")
                .entry("t", b'2', "a", 0o4755, b"")],
            Tree("a f=x; s ->a; t ->a"),
        ),
        case(
            "a file below a symlink",
            &[t().dir("real").symlink("s", "real").file("s/x", b"x")],
            Tree("real d755; real/x f=x; s ->real"),
        ),
        case(
            "a file below a symlink to the outside",
            &[t().symlink("s", "/var/tmp/peel-awkward").file("s/x", b"x")],
            Tree(
                "s ->/var/tmp/peel-awkward; var d755; var/tmp d755; var/tmp/peel-awkward d755; var/tmp/peel-awkward/x f=x",
            ),
        ),
        case(
            "a file below a symlink of a lower layer",
            &[t().dir("real").symlink("s", "real"), t().file("s/x", b"x")],
            Tree("real d755; s d755; s/x f=x"),
        ),
        case(
            "a file below a symlink that is replaced",
            &[t()
                .dir("real")
                .symlink("s", "real")
                .file("s/x", b"x")
                .file("s", b"y")],
            Tree("real d755; real/x f=x; s f=y"),
        ),
        case(
            "a file below a file",
            &[t().file("a", b"x").file("a/x", b"x")],
            Refused("no directory"),
        ),
        case(
            "an empty symlink",
            &[t().symlink("s", "")],
            Refused("symbolic link"),
        ),
        case(
            "a symlink above PATH_MAX",
            &[t().pax("linkpath", &[b't'; 4096]).symlink("s", "short")],
            Refused("symbolic link"),
        ),
        // Owners.
        case(
            "the owner 4294967295",
            &[t()
                .pax("uid", b"4294967295")
                .file("a", b"x")
                .pax("gid", b"4294967295")
                .dir("d")],
            Tree("a f=x; d d755"),
        ),
        case(
            "the owner 4294967295 over another one",
            &[
                t().pax("uid", b"5").dir("d"),
                t().pax("uid", b"4294967295").dir("d"),
            ],
            Tree("d d755"),
        ),
        case(
            "the owner -1",
            &[t().pax("uid", b"-1").file("a", b"x")],
            Tree("a f=x"),
        ),
        case(
            "the owner 4294967294",
            &[t().pax("uid", b"4294967294").file("a", b"x")],
            Tree("a f=x u4294967294:0"),
        ),
        case(
            "the owner 4294967296",
            &[t().pax("uid", b"4294967296").file("a", b"x")],
            Refused("the field uid"),
        ),
        // Global headers.
        case(
            "a global header",
            &[t()
                .global("uid", b"7")
                .file("a", b"x")
                .global("path", b"c")
                .file("b", b"y")],
            Tree("a f=x; b f=y"),
        ),
        case(
            "a global header after the last entry",
            &[t().file("a", b"x").global("comment", b"c")],
            Tree("a f=x"),
        ),
        // Devices.
        case(
            "a major number of 12 bits",
            &[t().device("n", 4095, 1)],
            Tree("n c4095:1"),
        ),
        case(
            "a major number of 13 bits",
            &[t().device("n", 4096, 1)],
            Refused("beyond what Linux can name"),
        ),
        case(
            "a minor number of 21 bits",
            &[t().device("n", 1, 1 << 20)],
            Refused("beyond what Linux can name"),
        ),
        case(
            "a major number of 34 bits",
            &[t().device("n", 1 << 33, 1)],
            Refused("device major"),
        ),
        case(
            "the device 0:0",
            &[t().file("a", b"x"), t().device("a", 0, 0)],
            Tree(""),
        ),
        // Whiteouts.
        case(
            "a whiteout",
            &[t().file("a", b"x"), t().file(".wh.a", b"")],
            Tree(""),
        ),
        case(
            "a whiteout in its own layer",
            &[t().file("a", b"x").file(".wh.a", b"")],
            Tree("a f=x"),
        ),
        case(
            "a whiteout of what the layer makes anew",
            &[t().file("a", b"old"), t().file("a", b"new").file(".wh.a", b"")],
            Tree("a f=new"),
        ),
        case(
            "a whiteout before the directory that the layer makes anew",
            &[
                t().dir("a").file("a/low", b"x"),
                t().file(".wh.a", b"").dir("a").file("a/x", b"x"),
            ],
            Tree("a d755; a/x f=x"),
        ),
        case(
            "a whiteout in a directory that is not there",
            &[t().file("a", b"x"), t().file("d/.wh.x", b"")],
            Tree("a f=x; d d755"),
        ),
        case(
            "a whiteout twice",
            &[t().file("a", b"x"), t().file(".wh.a", b"").file(".wh.a", b"")],
            Tree(""),
        ),
        case(
            "a whiteout below a symlink of its layer",
            &[
                t().dir("r").file("r/x", b"x").file("r/y", b"y"),
                t().dir("r").symlink("s", "r").file("s/.wh.x", b""),
            ],
            Tree("r d755; r/y f=y; s ->r"),
        ),
        case(
            "an opaque mark before its directory",
            &[
                t().dir("o").file("o/low", b"x"),
                t().file("o/.wh..wh..opq", b"").dir("o").file("o/x", b"x"),
            ],
            Tree("o d755; o/x f=x"),
        ),
        case(
            "a whiteout of nothing",
            &[t().file(".wh.", b"")],
            Refused("whiteout of no name"),
        ),
        case(
            "an opaque directory after its entries",
            &[
                t().dir("o").file("o/low", b"x"),
                t().dir("o").file("o/new", b"x").file("o/.wh..wh..opq", b""),
            ],
            Tree("o d755; o/new f=x"),
        ),
        case(
            "bookkeeping of AUFS",
            &[
                t().dir("bin").file("bin/old", b"o"),
                t().dir(".wh..wh.plnk")
                    .file(".wh..wh.plnk/1.2", b"linked")
                    .dir(".wh..wh.orph")
                    .file(".wh..wh.aufs", b"")
                    .hard_link("bin/foo", ".wh..wh.plnk/1.2"),
            ],
            Tree("bin d755; bin/foo f=linked; bin/old f=o"),
        ),
        // Types and sizes.
        case(
            "a contiguous file",
            &[t().entry("c", b'7', "", 0o644, b"x")],
            Tree("c f=x"),
        ),
        case(
            "an empty file whose name ends in a slash",
            &[t().entry("a/", b'0', "", 0o644, b"")],
            Tree("a f="),
        ),
        case(
            "a file whose name ends in a slash",
            &[t().entry("a/", b'0', "", 0o644, b"x")],
            Tree("a f=x"),
        ),
        case(
            "a V7 entry whose name ends in a slash",
            &[t().entry("a/", 0, "", 0o700, b"")],
            Tree("a d700"),
        ),
        case(
            "a file in place of the root",
            &[t().entry("./", b'0', "", 0o644, b"x")],
            Refused("the root"),
        ),
        case(
            "an unknown type",
            &[t().entry("c", b'Z', "", 0o644, b"x")],
            Refused("unsupported entry type"),
        ),
        case(
            "a hard link with a content",
            &[t().file("a", b"x").entry("l", b'1', "a", 0o644, &[b'D'; 512])],
            Refused("this is no tar header"),
        ),
    ];
    cases.push(Case {
        name: "no end of archive",
        layers: vec![t().file("a", b"x").cut(0)],
        outcome: Tree("a f=x"),
    });
    cases.push(Case {
        name: "a content that is cut off",
        layers: vec![t().file("a", &[b'x'; 5000]).cut(2000)],
        outcome: Refused("ends too early"),
    });
    cases
}

/// What is unusual about an inode: mode, owner and time as `Tar` gives them are not shown.
fn unusual(path: &Path, metadata: &fs::Metadata, usual_mode: u32) -> String {
    let mut shown = String::new();
    let mode = metadata.mode() & 0o7777;
    if mode != usual_mode {
        shown += &format!(" m{mode:o}");
    }
    if (metadata.uid(), metadata.gid()) != (0, 0) {
        shown += &format!(" u{}:{}", metadata.uid(), metadata.gid());
    }
    if metadata.is_file() && metadata.mtime() != MTIME.cast_signed() {
        shown += &format!(" t{}", metadata.mtime());
    }
    for name in ["security.capability", "user.k"] {
        if rustix::fs::lgetxattr(path, name, &mut [0_u8; 64]).is_ok() {
            shown += &format!(" {name}");
        }
    }
    shown
}

/// All names below a directory, sorted, as `name type`; a regular file shows its content and, from two on, its links. What is
/// unusual about them comes behind.
fn listing(root: &Path) -> String {
    let mut found = Vec::new();
    let mut pending = vec![root.to_path_buf()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let metadata = path.symlink_metadata().unwrap();
            let kind = metadata.file_type();
            let what = if kind.is_dir() {
                pending.push(path.clone());
                format!("d{:o}", metadata.mode() & 0o7777)
            } else if kind.is_symlink() {
                let shown = unusual(&path, &metadata, 0o777);
                format!("->{}{shown}", fs::read_link(&path).unwrap().display())
            } else if kind.is_char_device() {
                let number = metadata.rdev();
                format!("c{}:{}", rustix::fs::major(number), rustix::fs::minor(number))
            } else {
                let content = String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned();
                let shown = unusual(&path, &metadata, 0o644);
                match metadata.nlink() {
                    1 => format!("f={content}{shown}"),
                    links => format!("f={content} n{links}{shown}"),
                }
            };
            found.push((path.strip_prefix(root).unwrap().to_path_buf(), what));
        }
    }
    found.sort();
    let shown = |name: &OsStr| match name.as_bytes() {
        [b'n', rest @ ..] if rest.len() > 100 => format!("n*{}", rest.len() + 1),
        _ => name.to_string_lossy().into_owned(),
    };
    let lines: Vec<String> = found
        .iter()
        .map(|(path, what)| format!("{} {what}", shown(path.as_os_str())))
        .collect();
    lines.join("; ")
}

fn check(world: &World, what: &str, name: &str, outcome: Outcome, digests: &[String]) {
    let dir = world.dir("root");
    let output = world.run(&["mount", name, dir.to_str().unwrap()]);
    if output.status.success() {
        let found = listing(&dir);
        world.umount(&dir);
        match outcome {
            Tree(expected) => assert_eq!(found, expected, "{what}"),
            Refused(reason) => panic!("{what}: not refused ({reason}) but mounted: {found}"),
        }
    } else {
        let message = errors(&output);
        match outcome {
            Tree(expected) => panic!("{what}: not {expected:?} but {message}"),
            Refused(reason) => {
                assert!(message.contains(reason), "{what}: {message}");
                // What no file system can show is known only of the whole tree: there the image is named.
                let named = digests.iter().any(|digest| message.contains(digest));
                let named = named || reason.contains("Linux") && message.contains(name);
                assert!(named, "{what}: no layer is named: {message}");
            }
        }
    }
}

fn digests(layers: &[Layer]) -> Vec<String> {
    layers.iter().map(|layer| layer.digest().to_string()).collect()
}

#[test]
fn awkward_streams_mean_what_the_table_says() {
    let world = World::new();
    let registry = world.registry();
    for (number, case) in cases().into_iter().enumerate() {
        let layers: Vec<Layer> = case.layers.iter().map(|tar| Layer::plain(tar)).collect();
        let name = push(&registry, "plain", &format!("t{number}"), &layers);
        check(&world, case.name, &name, case.outcome, &digests(&layers));
    }
    assert!(!Path::new("/var/tmp/peel-awkward").exists());
    world.assert_sound();
}

/// Formats with a table of contents.
const FORMATS: [(&str, Format); 4] = [
    ("eStargz", ESTARGZ),
    ("eStargz, shared members", estargz_with(0, 50_000, false)),
    ("zstd:chunked, stargz", zstd_chunked(Dialect::Stargz)),
    ("zstd:chunked, podman", zstd_chunked(Dialect::Podman)),
];

/// What their writers refuse: JSON holds no names that are not UTF-8.
const NOT_WRITABLE: &str = "not UTF-8";

#[test]
fn awkward_streams_mean_the_same_in_every_format() {
    let world = World::new();
    let registry = world.registry();
    for (format_number, (format, options)) in FORMATS.into_iter().enumerate() {
        for (number, case) in cases().into_iter().enumerate() {
            let what = format!("{format}: {}", case.name);
            let written = case.layers.iter().map(|tar| Layer::written(tar, options));
            let layers = match written.collect::<Result<Vec<Layer>, _>>() {
                Ok(layers) => {
                    assert!(case.name != NOT_WRITABLE, "{what}: written");
                    layers
                }
                Err(error) => {
                    let mut message = error.to_string();
                    let mut source = std::error::Error::source(&error);
                    while let Some(error) = source {
                        message = format!("{message}: {error}");
                        source = error.source();
                    }
                    match case.outcome {
                        Refused(reason) => assert!(message.contains(reason), "{what}: {message}"),
                        Tree(_) => assert!(case.name == NOT_WRITABLE, "{what}: {message}"),
                    }
                    continue;
                }
            };
            let name = push(
                &registry,
                &format!("f{format_number}"),
                &format!("t{number}"),
                &layers,
            );
            check(&world, &what, &name, case.outcome, &digests(&layers));
        }
    }
    assert!(!Path::new("/var/tmp/peel-awkward").exists());
    let log = world.log();
    assert!(
        !log.contains("pulling a layer whole"),
        "a layer was not lazy:\n{log}"
    );
    world.assert_sound();
}

#[test]
fn times_that_no_table_of_contents_can_tell() {
    const FIRST: i64 = -62_167_219_200;
    const LAST: i64 = 253_402_300_799;
    let tar = t()
        .pax("mtime", b"253402300800")
        .file("late", b"x")
        .pax("mtime", b"253402300799.9")
        .file("last", b"x")
        .pax("mtime", b"-62167219200.5")
        .file("early", b"x")
        .pax("mtime", b"-5.5")
        .file("negative", b"x")
        .finish();
    let names = ["late", "last", "early", "negative"];
    let world = World::new();
    let registry = world.registry();
    let check = |what: &str, layer: Layer, expected: [i64; 4]| {
        let name = push(&registry, "times", &what.replace([' ', ':', ','], ""), &[layer]);
        for verify in ["lazy", "full"] {
            let dir = world.dir("root");
            world.ok(&["mount", "--verify", verify, &name, dir.to_str().unwrap()]);
            let found = names.map(|name| dir.join(name).symlink_metadata().unwrap().mtime());
            world.umount(&dir);
            // What was pulled whole is shown as the tar stream has it.
            if verify == "lazy" || what == "plain" {
                assert_eq!(found, expected, "{what}");
            }
        }
    };
    check("plain", Layer::plain(&tar), [LAST + 1, LAST, FIRST - 1, -6]);
    for (format, options) in FORMATS {
        // Whole seconds are rounded, but not to what cannot be told.
        let negative = if format.ends_with("podman") { -6 } else { -5 };
        let layer = Layer::written(&tar, options).unwrap();
        check(format, layer, [LAST, LAST, FIRST, negative]);
    }
    world.assert_sound();
}

/// How images are converted, and whether files come first.
const CONVERSIONS: [(&str, bool); 7] = [
    ("--estargz", false),
    ("--estargz-external-toc --estargz-keep-diff-id", false),
    ("--zstdchunked", false),
    ("--zstdchunked --dialect stargz", false),
    ("--gzip", false),
    ("--estargz", true),
    ("--zstdchunked", true),
];

#[test]
fn what_depends_on_the_order_survives_every_conversion() {
    let world = World::new();
    let registry = world.registry();
    let list = world.path("list");
    fs::write(&list, "**\n").unwrap();
    let words = [
        "replaced",
        "twice",
        "over",
        "anew",
        "below a symlink",
        "before its directory",
    ];
    let of_order = |case: &Case| words.iter().any(|word| case.name.contains(word));
    for (number, case) in cases().into_iter().filter(of_order).enumerate() {
        let layers: Vec<Layer> = case.layers.iter().map(|tar| Layer::plain(tar)).collect();
        let name = push(&registry, "source", &format!("t{number}"), &layers);
        for (format, (flags, is_reordered)) in CONVERSIONS.into_iter().enumerate() {
            let what = format!("{} {flags}, reordered {is_reordered}", case.name);
            let target = format!("{}/out{format}:t{number}", registry.addr());
            let mut arguments = match is_reordered {
                true => vec!["optimize", "--prefetch-list", list.to_str().unwrap()],
                false => vec!["convert"],
            };
            arguments.extend(flags.split(' '));
            arguments.extend([name.as_str(), &target]);
            world.ok(&arguments);
            let dir = world.dir("converted");
            world.ok(&["mount", "--verify", "full", &target, dir.to_str().unwrap()]);
            let found = listing(&dir);
            world.umount(&dir);
            match case.outcome {
                Tree(expected) => assert_eq!(found, expected, "{what}"),
                Refused(reason) => panic!("{what}: not refused ({reason})"),
            }
        }
    }
    world.assert_sound();
}
