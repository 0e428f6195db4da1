//! Layers in which entries replace others: what stands in the stream, and what the TOC says of it.

use super::formats::{podman, unzstd};
use super::*;
use peel_image::layer::LayerIndex;
use peel_image::tree::{InodeKind, Tree};
use proptest::test_runner::RngSeed;

fn symlink(name: &str, target: &str) -> Made {
    (name.into(), TarKind::Symlink(target.as_bytes().into()), vec![])
}

/// The entries of an index, in their order.
fn shown(index: &LayerIndex) -> String {
    let entry = |entry: &peel_image::layer::Entry| {
        let path = String::from_utf8(entry.path.as_bytes().to_vec()).unwrap();
        match &entry.kind {
            EntryKind::Directory => format!("{path}/"),
            EntryKind::Regular(file) => format!("{path}={}", file.size),
            EntryKind::Symlink(target) => format!("{path}->{}", String::from_utf8_lossy(target)),
            EntryKind::Hardlink(target) => format!("{path}:{}", String::from_utf8_lossy(target.as_bytes())),
            other => format!("{path} {other:?}"),
        }
    };
    let entries: Vec<String> = index.entries.iter().map(entry).collect();
    entries.join(" ")
}

fn names(tar: &[u8]) -> String {
    let entries = list(tar).into_iter().map(|(entry, _)| entry);
    let own = |entry: &tar::TarEntry| peel_image::estargz::is_reserved(entry.path.as_bytes());
    let names: Vec<String> = entries
        .filter(|entry| !own(entry))
        .map(|entry| String::from_utf8(entry.name.into()).unwrap())
        .collect();
    names.join(" ")
}

#[test]
fn what_is_replaced_is_left_out_where_nobody_can_tell() {
    for (case, made, stream, toc) in [
        (
            "a file twice",
            vec![file("a", b"1"), file("b", b""), file("a", b"22")],
            "b a",
            "b=0 a=2",
        ),
        (
            "a hard link to what is replaced",
            vec![file("a", b"1"), link("l", "a"), file("a", b"22")],
            "l a",
            "l=1 a=2",
        ),
        (
            "more of them",
            vec![
                file("a", b"1"),
                link("l", "a"),
                link("m", "a"),
                link("n", "l"),
                file("a", b"22"),
                link("o", "a"),
            ],
            "l m n a o",
            "l=1 m:l n:l a=2 o:a",
        ),
        (
            "a link that is replaced too",
            vec![
                file("a", b"1"),
                link("l", "a"),
                link("m", "l"),
                file("a", b"22"),
                file("l", b"333"),
            ],
            "m a l",
            "m=1 a=2 l=3",
        ),
        (
            "a link to a symbolic link",
            vec![symlink("a", "x"), link("l", "a"), file("a", b"22")],
            "l a",
            "l->x a=2",
        ),
        (
            "a file over a directory",
            vec![dir("d"), file("d/x", b"1"), link("l", "d/x"), file("d", b"22")],
            "l d",
            "l=1 d=2",
        ),
        (
            "a file over a directory without an entry",
            vec![file("d/x/y", b"1"), file("d/.wh.z", b""), file("d", b"22")],
            "d",
            "d=2",
        ),
        (
            "a directory twice",
            vec![dir("d"), file("d/x", b"1"), dir("d")],
            "d/ d/x",
            "d/ d/x=1",
        ),
    ] {
        let tar = tar_of(&made);
        let (blob, written) = convert(&tar, &Options::default());
        check(&blob, &written);
        assert_eq!(names(&inflate(&blob)), stream, "{case}");
        assert_eq!(shown(&testing::open(&blob).1), toc, "{case}");
        assert!(written.dropped > 0 && written.hidden == 0, "{case}: {written:?}");
        let (blob, written) = convert(&tar, &podman());
        assert_eq!(names(&unzstd(&blob)), stream, "{case}");
        super::formats::check_podman(&blob, &written);
        assert!(
            written
                .annotations
                .contains_key(peel_image::annotations::PODMAN_TARSPLIT_POSITION)
        );
    }
}

#[test]
fn a_stream_stays_whole_where_leaving_out_would_show() {
    for (case, made, toc) in [
        (
            "a directory over a file",
            vec![file("a", b"1"), link("l", "a"), dir("a"), file("a/x", b"22")],
            "l=1 a/ a/x=2 .wh.a=0",
        ),
        (
            "a directory over a file over a directory",
            vec![
                dir("p"),
                dir("p/a"),
                file("p/a/x", b"1"),
                file("p/a", b"1"),
                dir("p/a"),
            ],
            "p/ p/a/ p/.wh.a=0",
        ),
        (
            "one that is whited out besides",
            vec![file(".wh.a", b""), file("a", b"1"), dir("a")],
            ".wh.a=0 a/",
        ),
        (
            "by way of a symbolic link",
            vec![
                dir("real"),
                symlink("s", "real"),
                file("s/x", b"1"),
                file("s/.wh.y", b""),
                file("real/x", b"22"),
            ],
            "real/ s->real real/.wh.y=0 real/x=2",
        ),
        (
            "by way of one that is replaced",
            vec![
                symlink("s", "/real"),
                file("s/x", b"1"),
                file("s", b"22"),
                link("l", "real/x"),
            ],
            "real/x=1 s=2 l:real/x",
        ),
        (
            "a whiteout twice",
            vec![file(".wh.a", b""), file("b", b"1"), file(".wh.a", b"")],
            "b=1 .wh.a=0",
        ),
    ] {
        let tar = tar_of(&made);
        let stream: Vec<&str> = made.iter().map(|(name, ..)| name.trim_end_matches('/')).collect();
        let found = |tar: &[u8]| {
            names(tar)
                .split(' ')
                .map(|name| name.trim_end_matches('/').to_owned())
                .collect::<Vec<_>>()
        };
        let first = Options {
            prioritized: prioritized(&["real/x", "l"]),
            ..Options::default()
        };
        for options in [Options::default(), first] {
            let (blob, written) = convert(&tar, &options);
            check(&blob, &written);
            assert_eq!(found(&inflate(&blob)), stream, "{case}");
            assert_eq!(shown(&testing::open(&blob).1), toc, "{case}");
            assert_eq!(
                (written.dropped, written.not_found.len()),
                (0, options.prioritized.len()),
                "{case}"
            );
        }
        let (blob, written) = convert(&tar, &podman());
        assert_eq!(
            (written.diff_id, found(&unzstd(&blob)).len()),
            (Digest::of(&tar), stream.len()),
            "{case}"
        );
    }
}

#[test]
fn a_directory_with_other_attributes_before_is_kept() {
    let mut tar = Vec::new();
    for (name, attribute) in [("d", "user.a"), ("d", "user.b")] {
        let mut metadata = metadata(0o755);
        metadata.xattrs = [(attribute.as_bytes().into(), b"1".as_slice().into())].into();
        let entry = tar::write::NewEntry {
            name: name.as_bytes(),
            metadata: &metadata,
            kind: &TarKind::Directory,
            user_name: b"",
            group_name: b"",
        };
        tar.extend(tar::write::encode_header(&entry).unwrap());
    }
    let (blob, written) = convert(&tar, &Options::default());
    check(&blob, &written);
    assert_eq!((written.entries, written.hidden), (2, 1));
}

#[test]
fn what_no_tool_unpacks_is_refused_by_name() {
    for (made, entry) in [
        (vec![file("a", b"1"), file("a/x", b"2")], "a/x"),
        (
            vec![symlink("a", "b"), symlink("b", "a"), file("a/x", b"2")],
            "a/x",
        ),
        (vec![dir("./"), file("./", b"1")], ""),
        (
            vec![
                file("a/x", b"1"),
                link("b", "a"),
                file("c", b"1"),
                file("c", b"2"),
            ],
            "b",
        ),
        // A link to a lower file that goes with what stood above it.
        (
            vec![link("l", "d/x"), file("d", b"1"), dir("d"), file("d/x", b"2")],
            "l",
        ),
        // By way of a link that is replaced.
        (vec![link("a", "c"), link("b", "a"), file("a", b"1")], "b"),
    ] {
        let tar = tar_of(&made);
        let outcome = write(
            tar.as_slice(),
            tempfile::tempfile().unwrap(),
            io::sink(),
            &Options::default(),
        );
        assert!(
            matches!(
                &outcome,
                Err(WriteError::Impossible { entry: found, .. } | WriteError::Indescribable { entry: found, .. })
                    if found == entry
            ),
            "{outcome:?}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        rng_seed: RngSeed::Fixed(20_261_130),
        ..ProptestConfig::with_cases(1024)
    })]

    /// The TOC of any layer, merged over any other, is the tree that its entries are one after the other.
    #[test]
    fn a_toc_means_what_the_stream_does(
        entries in proptest::collection::vec(
            ("([ab]/){0,2}[abc]", 0usize..9, "([ab]/){0,2}[abc]"),
            1..14,
        ),
        paths in proptest::collection::vec("([ab]/){0,2}[abc]", 0..3),
        keeps in any::<bool>(),
    ) {
        let made = entries.iter().enumerate().map(|(index, (name, kind, target))| match kind {
            0 | 1 => dir(name),
            2 | 3 => link(name, target),
            4 => symlink(name, &format!("/{target}")),
            5 => {
                let (parent, last) = name.rsplit_once('/').unwrap_or((".", name));
                file(&format!("{parent}/.wh.{last}"), b"")
            }
            6 => file(&format!("{name}/.wh..wh..opq"), b""),
            _ => file(name, format!("{index}").as_bytes()),
        });
        let tar = tar_of(&possible(made.collect()));
        let (source, _) = tar::index_tar(tar.as_slice(), &mut tar::index::HashSink::default()).unwrap();
        let options = Options {
            format: Format::Estargz { chunk_size: 0, min_chunk_size: 0, level: 1, external_toc: keeps, keep_diff_id: keeps },
            prioritized: if keeps { vec![] } else { paths.iter().map(|path| path.clone().into_bytes()).collect() },
            ..Options::default()
        };
        let (blob, written) = convert(&tar, &options);
        let toc = match &written.external_toc {
            None => testing::open(&blob).1,
            Some(toc) => {
                let location = locate(&blob, blob.len() as u64).unwrap();
                peel_image::estargz::read_index(&extract_toc(toc).unwrap().json, location.payload_end).unwrap()
            }
        };
        let files = |index: &LayerIndex| Tree::merge(std::slice::from_ref(index)).map(|tree| {
            let contents = tree.walk().map(|(path, id)| match &tree.inode(id).unwrap().kind {
                InodeKind::Regular(file) => (path, Some(file.object)),
                _ => (path, None),
            });
            contents.collect::<Vec<_>>()
        });
        // Where hard links lead nowhere there is nothing to compare.
        if let Ok(expected) = files(&source) {
            prop_assert_eq!(files(&toc), Ok(expected));
            prop_assert_eq!(peel_image::views::compare(&toc, &source), Ok(()));
        }
    }
}

#[test]
fn links_that_change_a_file_are_refused_where_paths_repeat() {
    let tar = |modes: [u16; 2], last: &str| {
        let mut writer = tar::write::Writer::new(Vec::new());
        let made = [file("a", b"1"), link("l", "a"), file(last, b"2")];
        for ((name, kind, content), mode) in made.iter().zip([modes[0], modes[1], modes[0]]) {
            let entry = tar::write::NewEntry {
                name: name.as_bytes(),
                metadata: &metadata(mode),
                kind,
                user_name: b"",
                group_name: b"",
            };
            writer.append(&entry, &mut content.as_slice()).unwrap();
        }
        writer.finish().unwrap()
    };
    for (modes, last, is_refused) in [
        ([0o640, 0o640], "a", false),
        ([0o640, 0o600], "b", false),
        ([0o640, 0o600], "a", true),
    ] {
        let outcome = write(
            tar(modes, last).as_slice(),
            tempfile::tempfile().unwrap(),
            io::sink(),
            &Options::default(),
        );
        let found = matches!(&outcome, Err(WriteError::Indescribable { entry, .. }) if entry == "l");
        assert_eq!(
            (found, outcome.is_ok()),
            (is_refused, !is_refused),
            "{modes:?} {last}"
        );
    }
}
