//! TOCs that are right, TOCs that lie, and the TOCs that upstream's tools wrote.

use proptest::prelude::*;

use super::*;
use crate::estargz::testing;
use crate::layer::{Chunk, ChunkSource, Device, Entry, EntryKind, FileContent, Metadata};
use crate::path::EntryPath;
use peel_hash::Digest;

const A: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const B: &str = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";
const END: u64 = 10_000;

fn read(entries: &str) -> Result<LayerIndex, TocError> {
    let json = format!("{{\"version\":1,\"entries\":[{entries}]}}");
    read_index(json.replace("$A", A).replace("$B", B).as_bytes(), END)
}

fn contents(index: &LayerIndex) -> Vec<(&str, &FileContent)> {
    let content = |entry: &'_ Entry| matches!(entry.kind, EntryKind::Regular(_));
    index
        .entries
        .iter()
        .filter(|entry| content(entry))
        .filter_map(|entry| match &entry.kind {
            EntryKind::Regular(content) => {
                Some((std::str::from_utf8(entry.path.as_bytes()).unwrap(), content))
            }
            _ => None,
        })
        .collect()
}

fn places(content: &FileContent) -> Vec<(u64, u64, u64, u64, u64)> {
    content
        .chunks
        .iter()
        .map(|chunk| match chunk.source {
            ChunkSource::Blob {
                encoding: Encoding::Gzip,
                offset,
                compressed_size,
                inner_offset,
            } => (
                chunk.file_offset,
                chunk.size,
                offset,
                compressed_size,
                inner_offset,
            ),
            _ => panic!("{chunk:?}"),
        })
        .collect()
}

#[test]
fn every_type_is_understood() {
    let index = read(
        r#"{"name":"./d/","type":"dir","mode":1023,"uid":7,"gid":4294967295,"modtime":"2023-11-14T22:13:20Z",
            "userName":"me","xattrs":{"user.colour":"Ymx1ZQ=="},"NumLink":3,"unknown":{"a":[1]}},
           {"name":"d/s","type":"symlink","linkName":"/no/such"},
           {"name":"d/h","type":"hardlink","linkName":"./d/../f"},
           {"name":"c","type":"char","devMajor":1,"devMinor":3},
           {"name":"b","type":"block","devMajor":8},
           {"name":"p","type":"fifo"},
           {"name":"e","type":"reg"},
           {"name":"/f","type":"reg","size":5,"offset":70,"digest":"$A","chunkDigest":"$A"}"#,
    )
    .unwrap();
    let kinds: Vec<_> = index
        .entries
        .iter()
        .map(|entry| (entry.path.to_string(), entry.kind.clone()))
        .collect();
    let device = |major, minor| Device { major, minor };
    let file = FileContent {
        size: 5,
        digest: Some(A.parse().unwrap()),
        chunks: vec![Chunk {
            file_offset: 0,
            size: 5,
            digest: A.parse().unwrap(),
            source: ChunkSource::Blob {
                encoding: Encoding::Gzip,
                offset: 70,
                compressed_size: END - 70,
                inner_offset: 0,
            },
        }],
    };
    assert_eq!(
        kinds,
        [
            ("/d".into(), EntryKind::Directory),
            ("/d/s".into(), EntryKind::Symlink(b"/no/such".as_slice().into())),
            (
                "/d/h".into(),
                EntryKind::Hardlink(EntryPath::clean(b"f").unwrap())
            ),
            ("/c".into(), EntryKind::CharDevice(device(1, 3))),
            ("/b".into(), EntryKind::BlockDevice(device(8, 0))),
            ("/p".into(), EntryKind::Fifo),
            ("/e".into(), EntryKind::Regular(FileContent::empty())),
            ("/f".into(), EntryKind::Regular(file)),
        ]
    );
    assert_eq!(
        index.entries[0].metadata,
        Metadata {
            mode: 0o1777,
            uid: 7,
            gid: 0,
            mtime: 1_700_000_000,
            mtime_nanoseconds: 0,
            xattrs: [(b"user.colour".as_slice().into(), b"blue".as_slice().into())].into(),
        }
    );
    assert_eq!(index.entries[1].metadata.mode, 0o777);
}

#[test]
fn chunks_and_shared_streams_get_their_sizes() {
    let index = read(
        r#"{"name":".prefetch.landmark","type":"reg","size":1,"offset":50,"digest":"$A"},
           {"name":"big","type":"reg","size":10,"offset":100,"digest":"$A","chunkSize":4,"chunkDigest":"$A"},
           {"name":"big","type":"chunk","offset":200,"chunkOffset":4,"chunkSize":4,"chunkDigest":"$B"},
           {"name":"big","type":"chunk","offset":300,"chunkOffset":8,"chunkDigest":"$A"},
           {"name":"x","type":"reg","size":3,"offset":300,"innerOffset":1024,"digest":"$B"},
           {"name":"y","type":"reg","size":4,"offset":300,"innerOffset":2048,"chunkDigest":"$B"},
           {"name":"empty","type":"reg","offset":1},
           {"name":"z","type":"reg","size":4,"offset":9000,"digest":"$B","chunkSize":4,"chunkDigest":"$B"}"#,
    )
    .unwrap();
    assert_eq!(index.prefetch_end, Some(50));
    let contents = contents(&index);
    let found: Vec<_> = contents
        .iter()
        .map(|(name, content)| (*name, places(content)))
        .collect();
    assert_eq!(
        found,
        [
            (
                "big",
                vec![(0, 4, 100, 100, 0), (4, 4, 200, 100, 0), (8, 2, 300, 8700, 0)]
            ),
            ("x", vec![(0, 3, 300, 8700, 1024)]),
            ("y", vec![(0, 4, 300, 8700, 2048)]),
            ("empty", vec![]),
            ("z", vec![(0, 4, 9000, 1000, 0)]),
        ]
    );
    assert!(contents.iter().all(|(_, content)| content.is_lazy()));
}

#[test]
fn what_cannot_be_verified_is_not_lazy() {
    let index = read(
        r#"{"name":"no-digest","type":"reg","size":4,"offset":10,"chunkSize":2,"chunkDigest":"$A"},
           {"name":"no-digest","type":"chunk","offset":20,"chunkOffset":2,"chunkDigest":"$B"},
           {"name":"no-chunk-digest","type":"reg","size":4,"offset":30,"chunkSize":2,"digest":"$A"},
           {"name":"no-chunk-digest","type":"chunk","offset":40,"chunkOffset":2},
           {"name":"nothing","type":"reg","size":4,"offset":50},
           {"name":"good","type":"reg","size":4,"offset":50,"innerOffset":4,"digest":"$A"}"#,
    )
    .unwrap();
    let found: Vec<_> = contents(&index)
        .iter()
        .map(|(name, content)| {
            (
                *name,
                content.digest.is_some(),
                content.chunks.len(),
                content.is_lazy(),
            )
        })
        .collect();
    assert_eq!(
        found,
        [
            ("no-digest", false, 2, false),
            ("no-chunk-digest", true, 0, false),
            ("nothing", false, 0, false),
            ("good", true, 1, true),
        ]
    );
    assert_eq!(places(contents(&index)[3].1), [(0, 4, 50, END - 50, 4)]);
}

#[test]
fn duplicates_stay_in_order() {
    let index = read(r#"{"name":"a","type":"dir"},{"name":"./a","type":"fifo"},{"name":"a/","type":"dir"}"#);
    let kinds: Vec<_> = index
        .unwrap()
        .entries
        .into_iter()
        .map(|entry| entry.kind)
        .collect();
    assert_eq!(
        kinds,
        [EntryKind::Directory, EntryKind::Fifo, EntryKind::Directory]
    );
}

#[test]
fn lies_are_errors_that_name_the_field() {
    let file = r#"{"name":"f","type":"reg","size":10,"offset":100,"digest":"$A"}"#;
    let part =
        r#"{"name":"f","type":"reg","size":10,"offset":100,"digest":"$A","chunkSize":5,"chunkDigest":"$B"}"#;
    for (entries, field) in [
        (r#"{"name":"x","type":"socket"}"#.into(), "type"),
        (r#"{"name":"x","type":""}"#.into(), "type"),
        (r#"{"name":"x","type":"chunk"}"#.into(), "type"),
        (format!(r#"{file},{{"name":"g","type":"chunk","chunkOffset":10}}"#), "type"),
        (
            format!(r#"{part},{{"name":"d","type":"dir"}},{{"name":"f","type":"chunk","chunkOffset":5}}"#),
            "chunkSize",
        ),
        (part.into(), "chunkSize"),
        (format!(r#"{file},{{"name":"f","type":"chunk","offset":101,"chunkOffset":10}}"#), "chunkSize"),
        (format!(r#"{part},{{"name":"f","type":"chunk","offset":101,"chunkOffset":4}}"#), "chunkOffset"),
        (format!(r#"{part},{{"name":"f","type":"chunk","offset":101,"chunkOffset":6}}"#), "chunkOffset"),
        (
            format!(r#"{part},{{"name":"f","type":"chunk","offset":101,"chunkOffset":5,"chunkSize":6}}"#),
            "chunkSize",
        ),
        (
            format!(r#"{part},{{"name":"f","type":"chunk","offset":101,"chunkOffset":5,"chunkSize":4}}"#),
            "chunkSize",
        ),
        (format!(r#"{part},{{"name":"f","type":"chunk","offset":100,"chunkOffset":5}}"#), "innerOffset"),
        (
            format!(r#"{part},{{"name":"f","type":"chunk","offset":100,"innerOffset":4,"chunkOffset":5}}"#),
            "innerOffset",
        ),
        (format!(r#"{part},{{"name":"f","type":"chunk","offset":99,"chunkOffset":5}}"#), "offset"),
        (format!(r#"{file},{{"name":"g","type":"reg","size":1,"offset":99}}"#), "offset"),
        (format!(r#"{file},{{"name":"g","type":"reg","size":1,"offset":100}}"#), "innerOffset"),
        (r#"{"name":"f","type":"reg","size":1,"offset":10000}"#.into(), "offset"),
        (r#"{"name":"f","type":"reg","size":1,"offset":-1}"#.into(), "offset"),
        (r#"{"name":"f","type":"reg","size":1,"innerOffset":-1}"#.into(), "innerOffset"),
        (
            r#"{"name":"f","type":"reg","size":9223372036854775807,"innerOffset":9223372036854775807,"offset":1},
               {"name":"g","type":"reg","size":9223372036854775807,"innerOffset":9223372036854775807,"offset":1}"#.into(),
            "innerOffset",
        ),
        (r#"{"name":"f","type":"reg","size":-1}"#.into(), "size"),
        (r#"{"name":"f","type":"reg","size":1,"chunkSize":-1}"#.into(), "chunkSize"),
        (r#"{"name":"f","type":"reg","size":1,"chunkSize":2}"#.into(), "chunkSize"),
        (r#"{"name":"f","type":"reg","size":2,"chunkOffset":1}"#.into(), "chunkOffset"),
        (r#"{"name":"f","type":"reg","size":1,"offset":1,"digest":"$A","chunkDigest":"$B"}"#.into(), "chunkDigest"),
        (r#"{"name":"f","type":"reg","digest":"$A"}"#.into(), "digest"),
        (r#"{"name":"f","type":"reg","size":1,"digest":"sha512:00"}"#.into(), "digest"),
        (r#"{"name":"f","type":"reg","size":1,"chunkDigest":"x"}"#.into(), "chunkDigest"),
        (r#"{"name":"d","type":"dir","mode":-1}"#.into(), "mode"),
        (r#"{"name":"d","type":"dir","uid":-2}"#.into(), "uid"),
        (r#"{"name":"d","type":"dir","gid":4294967296}"#.into(), "gid"),
        (r#"{"name":"d","type":"dir","modtime":"yesterday"}"#.into(), "modtime"),
        (r#"{"name":"d","type":"dir","xattrs":{"":""}}"#.into(), "xattrs"),
        (r#"{"name":"d","type":"dir","xattrs":{"a":"?"}}"#.into(), "xattrs"),
        (r#"{"name":"d","type":"char","devMajor":4294967296}"#.into(), "devMajor"),
        (r#"{"name":"d","type":"block","devMinor":-1}"#.into(), "devMinor"),
        (r#"{"name":"l","type":"symlink"}"#.into(), "linkName"),
        (r#"{"name":"l","type":"symlink","linkName":"a\u0000b"}"#.into(), "linkName"),
        (r#"{"name":"l","type":"hardlink"}"#.into(), "linkName"),
    ] {
        let entries: String = entries;
        match read(&entries) {
            Err(TocError::Field { field: found, .. }) => assert_eq!(found, field, "{entries}"),
            other => panic!("{entries}: {other:?}"),
        }
    }
}

#[test]
fn names_cannot_leave_the_tree() {
    let index =
        read(r#"{"name":"../../etc/passwd","type":"fifo"},{"name":"l","type":"hardlink","linkName":"../x"}"#);
    let index = index.unwrap();
    assert_eq!(index.entries[0].path.to_string(), "/etc/passwd");
    assert_eq!(
        index.entries[1].kind,
        EntryKind::Hardlink(EntryPath::clean(b"x").unwrap())
    );
    let long = format!(r#"{{"name":"{}","type":"dir"}}"#, "n".repeat(300));
    assert!(matches!(read(&long), Err(TocError::Name { field: "name", .. })));
    let nul = r#"{"name":"l","type":"hardlink","linkName":"a\u0000"}"#;
    assert!(matches!(
        read(nul),
        Err(TocError::Name {
            field: "linkName",
            ..
        })
    ));
}

#[test]
fn a_real_replacement_character_is_told_from_a_lost_name() {
    // As Go's encoding/json and jsoniter write the byte ff and the character U+FFFD.
    let entry = |name: &str, link: &str| {
        read(&format!(
            r#"{{"name":"{name}","type":"symlink","linkName":"{link}"}}"#
        ))
    };
    let index = entry("a\u{fffd}b", "\u{fffd}").unwrap();
    assert_eq!(index.entries[0].path.as_bytes(), "a\u{fffd}b".as_bytes());
    assert_eq!(
        index.entries[0].kind,
        EntryKind::Symlink("\u{fffd}".as_bytes().into())
    );
    // Other escapes make no name doubtful, and a doubtful name is not believed.
    entry(r"\u003ca\u003e", "x").unwrap();
    for (name, link, field) in [
        (r"a\ufffdb", "x", "field name:"),
        (r"a\uFFFDb", "x", "field name:"),
        ("x", r"a\ufffd", "field linkName:"),
        ("\u{fffd}\\u003c", "x", "field name:"),
    ] {
        let error = entry(name, link).unwrap_err().to_string();
        assert!(
            error.contains(field) && error.contains("not UTF-8"),
            "{name} {link}: {error}"
        );
    }
}

#[test]
fn other_json_is_refused() {
    for json in [
        "",
        "[]",
        "{}",
        "{\"entries\":{}}",
        "{\"entries\":[1]}",
        "{\"entries\":[{}]}",
        "{\"entries\":[{\"name\":\"x\"}]}",
        "{\"entries\":[{\"name\":\"x\",\"type\":\"dir\",\"mode\":1.5}]}",
        "{\"entries\":[{\"name\":\"x\",\"type\":\"dir\",\"mode\":99999999999999999999}]}",
        "{\"entries\":[],\"entries\":[]}",
        "{\"entries\":[]} and more",
        "{\"entries\":[]",
        "{\"entries\":[{\"name\":\"\u{0}\",\"type\":\"dir\"}]}",
    ] {
        assert!(
            matches!(read_index(json.as_bytes(), END), Err(TocError::Json(_))),
            "{json}"
        );
    }
    assert!(matches!(
        read_index(b"{\"entries\":[{\"name\":\"\xff\",\"type\":\"dir\"}]}", END),
        Err(TocError::Json(_))
    ));
    assert_eq!(
        read_index(b"{\"version\":1,\"entries\":null}", END)
            .unwrap()
            .entries,
        []
    );
}

#[test]
fn nothing_comes_from_another_toc() {
    let short = 10;
    // Long enough for several threads.
    let long = 10_000;
    for count in [short, long] {
        let dir = |number| format!(r#"{{"name":"{number}{}","type":"dir"}}"#, "n".repeat(200));
        let dirs: Vec<String> = (0..count).map(dir).collect();
        let good = format!("{{\"entries\":[{}]}}", dirs.join(","));
        let bad = good.replace("]", ",1]");
        let (of_good, of_bad) = (Digest::of(good.as_bytes()), Digest::of(bad.as_bytes()));
        let read = |json: &str, digest| read_verified(json.as_bytes(), &rules(END), digest);
        assert_eq!(read(&good, of_good).unwrap().entries.len(), count);
        assert!(matches!(
            read(&bad, of_bad),
            Err(Unusable::Toc(TocError::Json(_)))
        ));
        for (json, found, expected) in [(good, of_good, of_bad), (bad, of_bad, of_good)] {
            match read(&json, expected) {
                Err(Unusable::Other(digest)) => assert_eq!(digest, found),
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn too_many_records_are_refused() {
    let entry = r#"{"name":"a","type":"fifo"}"#;
    let many = vec![entry; RECORDS_MAX + 1].join(",");
    assert!(matches!(read(&many), Err(TocError::TooMany(RECORDS_MAX))));
}

#[test]
fn layers_by_upstream_are_read_and_every_chunk_is_what_the_toc_says() {
    for (tag, files, landmark) in [
        ("esgz", 320, false),
        ("esgz-opt", 320, true),
        ("esgz-chunk64k", 320, false),
        ("esgz-min50k", 320, false),
    ] {
        let layers = testing::layers(tag);
        assert_eq!(layers.len(), 3, "{tag}");
        let mut seen = 0;
        for layer in &layers {
            let (toc, index) = layer.open();
            assert_eq!(toc.digest, layer.toc_digest, "{tag}");
            assert_eq!(index.prefetch_end.is_some(), landmark, "{tag}");
            for (name, content) in contents(&index) {
                let whole: Vec<u8> = content
                    .chunks
                    .iter()
                    .flat_map(|chunk| {
                        let data = testing::decode(&layer.blob, chunk);
                        assert_eq!(Digest::of(&data), chunk.digest, "{tag} {name}");
                        data
                    })
                    .collect();
                assert_eq!(whole.len() as u64, content.size, "{tag} {name}");
                assert_eq!(Some(Digest::of(&whole)), content.digest, "{tag} {name}");
                seen += 1;
            }
        }
        assert_eq!(seen, files, "{tag}");
    }
}

proptest! {
    #[test]
    fn noise_never_panics(json in proptest::collection::vec(any::<u8>(), 0..300), end in any::<u64>()) {
        let _outcome = read_index(&json, end);
    }

    /// Whatever the numbers are, what is accepted keeps the promises of the module.
    #[test]
    fn accepted_tocs_keep_the_promises(
        entries in proptest::collection::vec(
            ((0usize..2), (0i64..6), (0i64..40), (0i64..8), (0i64..6), (0i64..6)),
            0..6,
        )
    ) {
        let text: Vec<String> = entries
            .iter()
            .map(|(kind, size, offset, inner, chunk_offset, chunk_size)| {
                let kind = ["reg", "chunk"][*kind];
                format!(
                    r#"{{"name":"f","type":"{kind}","size":{size},"offset":{offset},"innerOffset":{inner},
                        "chunkOffset":{chunk_offset},"chunkSize":{chunk_size},"chunkDigest":"$A"}}"#
                )
            })
            .collect();
        let Ok(index) = read(&text.join(",")) else { return Ok(()) };
        let mut before = (0, 0);
        for (_, content) in contents(&index) {
            let mut covered = 0;
            for (file_offset, size, offset, compressed_size, inner) in places(content) {
                prop_assert_eq!(file_offset, covered);
                prop_assert!(size > 0 && compressed_size > 0 && offset + compressed_size <= END);
                prop_assert!((offset, inner) >= before);
                before = (offset, inner + size);
                covered += size;
            }
            prop_assert_eq!(covered, content.size);
        }
    }
}
