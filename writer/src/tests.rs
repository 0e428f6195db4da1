//! What was written is read back by this crate, by gzip and GNU tar, and compared with what upstream's tools wrote.

use std::io::Write as _;
use std::process::{Command, Stdio};

use proptest::prelude::*;
use serde_json::Value;

use super::*;
use peel_image::estargz::testing::{self, decode};
use peel_image::estargz::{extract_toc, locate};
use peel_image::layer::{Device, EntryKind, FileContent, Metadata};
use peel_image::path::EntryPath;
use peel_image::tar::{self, TarKind};

mod formats;
mod meaning;
mod metadata;
mod round_trip;

/// A tar entry of a test: name, what it is, content.
type Made = (String, TarKind, Vec<u8>);

fn file(name: &str, content: &[u8]) -> Made {
    let size = content.len() as u64;
    (name.into(), TarKind::Regular { size }, content.to_vec())
}

fn dir(name: &str) -> Made {
    (name.into(), TarKind::Directory, Vec::new())
}

fn link(name: &str, target: &str) -> Made {
    let kind = TarKind::Hardlink {
        raw: target.as_bytes().into(),
        target: EntryPath::clean(target.as_bytes()).unwrap(),
    };
    (name.into(), kind, Vec::new())
}

/// The entries without those that no tool could unpack, or no table of contents describe.
fn possible(made: Vec<Made>) -> Vec<Made> {
    let mut made = made;
    loop {
        let mut names = names::Names::default();
        for (name, kind, _) in &made {
            let kind = match kind {
                TarKind::Directory => names::Kind::Directory { xattrs: 0 },
                TarKind::Symlink(target) => names::Kind::Symlink(target),
                TarKind::Hardlink { target, .. } => names::Kind::Hardlink(target.as_bytes()),
                _ => names::Kind::Other,
            };
            names.push(&EntryPath::clean(name.as_bytes()).unwrap(), kind);
        }
        match replay::run(&names) {
            Ok(_) => {
                let rules = normal::Rules {
                    keeps_stream: true,
                    compares_names: false,
                };
                let Err(WriteError::Indescribable { entry, .. }) = normal::Normal::of(&names, rules) else {
                    return made;
                };
                let is_link = |kind: &TarKind| matches!(kind, TarKind::Hardlink { .. });
                let path = EntryPath::clean(entry.as_bytes()).unwrap();
                let leads_there =
                    |name: &str| EntryPath::clean(name.as_bytes()).is_ok_and(|name| name == path);
                let before = made.len();
                made.retain(|(name, kind, _)| !(is_link(kind) && leads_there(name)));
                if made.len() == before {
                    // By way of a symbolic link: some link less, until it is none of them.
                    let last = made.iter().rposition(|(_, kind, _)| is_link(kind)).unwrap();
                    made.remove(last);
                }
            }
            Err(
                replay::Impossible::BelowFile(index)
                | replay::Impossible::TooDeep(index)
                | replay::Impossible::ToDirectory(index),
            ) => {
                made.remove(index);
            }
            Err(impossible) => panic!("{impossible:?}"),
        }
    }
}

fn metadata(mode: u16) -> Metadata {
    Metadata {
        mode,
        uid: 1000,
        gid: 70_000,
        mtime: 1_700_000_000,
        mtime_nanoseconds: 0,
        xattrs: [(b"user.colour".as_slice().into(), b"\0\xff".as_slice().into())].into(),
    }
}

fn tar_of(entries: &[Made]) -> Vec<u8> {
    let mut writer = tar::write::Writer::new(Vec::new());
    for (name, kind, content) in entries {
        let entry = tar::write::NewEntry {
            name: name.as_bytes(),
            metadata: &metadata(0o640),
            kind,
            user_name: b"me",
            group_name: b"us",
        };
        writer.append(&entry, &mut content.as_slice()).unwrap();
    }
    writer.finish().unwrap()
}

fn estargz(chunk_size: u64, level: i32) -> Format {
    Format::Estargz {
        chunk_size,
        min_chunk_size: 0,
        level,
        external_toc: false,
        keep_diff_id: false,
    }
}

fn options_of(format: Format) -> Options {
    Options {
        format,
        ..Options::default()
    }
}

/// A blob that went through the spool. Where that was not needed, it must be the same without.
fn convert(tar: &[u8], options: &Options) -> (Vec<u8>, Written) {
    let mut blob = Vec::new();
    let written = write(tar, tempfile::tempfile().unwrap(), &mut blob, options).unwrap();
    let mut again = Vec::new();
    match write(tar, tempfile::tempfile().unwrap(), &mut again, &refusing(options)) {
        // Its meaning depends on the order: only the whole tells.
        Err(WriteError::Duplicate { .. }) => {}
        outcome => assert_eq!((again == blob, &outcome.unwrap()), (true, &written)),
    }
    (blob, written)
}

fn refusing(options: &Options) -> Options {
    Options {
        duplicates: Duplicates::Refuse,
        ..options.clone()
    }
}

fn inflate(blob: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    let mut stream = flate2::bufread::MultiGzDecoder::new(blob);
    stream.read_to_end(&mut tar).unwrap();
    tar
}

fn prioritized(paths: &[&str]) -> Vec<Vec<u8>> {
    paths.iter().map(|path| path.as_bytes().to_vec()).collect()
}

/// The entries of a tar stream with their contents.
fn list(tar: &[u8]) -> Vec<(tar::TarEntry, Vec<u8>)> {
    let mut reader = tar::Reader::new(tar);
    let mut entries = Vec::new();
    while let Some(mut entry) = reader.next_entry().unwrap() {
        let mut content = Vec::new();
        reader.read_to_end(&mut content).unwrap();
        entry.offset = 0;
        entries.push((entry, content));
    }
    entries
}

/// Everything that must hold of any blob that was written.
fn check(blob: &[u8], written: &Written) {
    let location = locate(blob, blob.len() as u64).unwrap();
    assert_eq!(Some(location.payload_end), written.toc_offset);
    let (toc, index) = testing::open(blob);
    assert_eq!(Some(toc.digest), written.toc_digest);
    assert_eq!(index.prefetch_end, written.prefetch_end);
    assert_eq!(Digest::of(blob), written.blob_digest);
    assert_eq!(blob.len() as u64, written.blob_size);
    let tar = inflate(blob);
    assert_eq!(Digest::of(&tar), written.diff_id);
    assert_eq!(tar.len() as u64, written.uncompressed_size);

    let mut entries = list(&tar);
    let (last, json) = entries.pop().unwrap();
    assert_eq!((last.name.as_ref(), json), (TOC_NAME.as_bytes(), toc.json));
    entries.retain(|(entry, _)| !peel_image::estargz::is_reserved(entry.path.as_bytes()));
    assert_eq!(entries.len() as u64, written.entries);
    let (unpacked, _) = tar::index_tar(tar.as_slice(), &mut tar::index::HashSink::default()).unwrap();
    // Where hard links lead nowhere there is nothing to compare.
    if peel_image::tree::Tree::merge(std::slice::from_ref(&unpacked)).is_ok() {
        assert_eq!(peel_image::views::compare(&index, &unpacked), Ok(()));
    }
    for indexed in &index.entries {
        let EntryKind::Regular(FileContent { size, digest, chunks }) = &indexed.kind else {
            assert_eq!(TarKind::from(&indexed.kind).size(), 0);
            continue;
        };
        let pieces: Vec<Vec<u8>> = chunks.iter().map(|chunk| decode(blob, chunk)).collect();
        let content = pieces.concat();
        assert_eq!(*size, content.len() as u64);
        assert_eq!(*digest, Some(Digest::of(&content)), "{}", indexed.path);
        for (piece, chunk) in pieces.iter().zip(chunks) {
            assert_eq!(Digest::of(piece), chunk.digest);
        }
    }
}

/// Bytes that compress somewhat and differ everywhere.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        u8::try_from(state & 0x1f).unwrap_or(0)
    })
    .take(length)
    .collect()
}

fn sample() -> Vec<Made> {
    let device = Device { major: 1, minor: 3 };
    let mut entries = vec![
        dir("./"),
        dir("./usr/"),
        file("./usr/big", &noise(3_000_000, 1)),
        file("./usr/empty", b""),
        link("./usr/link", "./usr/big"),
        (
            "./usr/soft".into(),
            TarKind::Symlink(b"big".as_slice().into()),
            vec![],
        ),
        ("./null".into(), TarKind::CharDevice(device), vec![]),
        ("./sda".into(), TarKind::BlockDevice(device), vec![]),
        ("./pipe".into(), TarKind::Fifo, vec![]),
        file("./chunk-exactly", &noise(100_000, 2)),
        file("./two-exactly", &noise(200_000, 3)),
    ];
    entries.extend((0..300).map(|index| file(&format!("./usr/f{index}"), &noise(index * 11, 9))));
    entries
}

#[test]
fn the_output_does_not_depend_on_the_number_of_threads() {
    let tar = tar_of(&sample());
    for list in [vec![], prioritized(&["usr/f7", "usr/link"])] {
        let options = |threads| Options {
            format: estargz(100_000, DEFAULT_GZIP_LEVEL),
            prioritized: list.clone(),
            threads,
            ..Options::default()
        };
        let (blob, written) = convert(&tar, &options(1));
        check(&blob, &written);
        for threads in [2, 5, 5, 0] {
            assert!(
                convert(&tar, &options(threads)) == (blob.clone(), written.clone()),
                "{threads} threads"
            );
        }
    }
}

#[test]
fn a_file_larger_than_all_work_in_flight() {
    let content = noise(100_003, 4).repeat(500);
    let tar = tar_of(&[file("a", b"a"), file("big", &content), file("z", b"z")]);
    let options = Options {
        format: estargz(1 << 20, DEFAULT_GZIP_LEVEL),
        prioritized: prioritized(&["z"]),
        threads: 1,
        ..Options::default()
    };
    let (blob, written) = convert(&tar, &options);
    check(&blob, &written);
}

#[test]
fn a_blob_converts_to_itself() {
    let tar = tar_of(&sample());
    let options = Options {
        prioritized: prioritized(&["/usr/f3"]),
        ..Options::default()
    };
    let (blob, written) = convert(&tar, &options);
    let (again, second) = convert(&inflate(&blob), &options);
    assert!(again == blob);
    assert_eq!(second, written);
}

#[test]
fn chunk_sizes_stand_in_the_toc_as_upstream_writes_them() {
    let tar = tar_of(&sample());
    let options = Options {
        format: estargz(100_000, DEFAULT_GZIP_LEVEL),
        ..Options::default()
    };
    let (blob, _) = convert(&tar, &options);
    let toc: Value = serde_json::from_slice(&testing::open(&blob).0.json).unwrap();
    let sizes = |name: &str| -> Vec<(&str, u64, u64)> {
        let number = |entry: &Value, key: &str| entry[key].as_u64().unwrap_or(0);
        toc["entries"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|entry| entry["name"] == name)
            .map(|entry| {
                let kind = entry["type"].as_str().unwrap();
                (kind, number(entry, "chunkOffset"), number(entry, "chunkSize"))
            })
            .collect()
    };
    assert_eq!(sizes("./usr/f9"), [("reg", 0, 0)]);
    assert_eq!(sizes("./usr/empty"), [("reg", 0, 0)]);
    assert_eq!(sizes("./chunk-exactly"), [("reg", 0, 100_000)]);
    assert_eq!(
        sizes("./two-exactly"),
        [("reg", 0, 100_000), ("chunk", 100_000, 100_000)]
    );
    assert_eq!(toc["entries"][1]["userName"], "me");
    assert_eq!(toc["entries"][2]["userName"], Value::Null);
}

#[test]
fn prioritized_files_come_first() {
    let tar = tar_of(&[
        file(".no.prefetch.landmark", b"\x0f"),
        dir("d/"),
        file("d/a", b"old"),
        file("d/b", b"b"),
        link("d/c", "t"),
        file("t", b"target"),
        file("d/a", b"new"),
        file("stargz.index.json", b"{}"),
    ]);
    let names = |blob: &[u8]| -> Vec<String> {
        list(&inflate(blob))
            .into_iter()
            .map(|(entry, _)| String::from_utf8(entry.name.into_vec()).unwrap())
            .collect()
    };
    let options = |paths: &[&str]| Options {
        prioritized: prioritized(paths),
        ..Options::default()
    };
    let (blob, written) = convert(&tar, &options(&["/d/c", "x/y", "../d/a"]));
    check(&blob, &written);
    assert_eq!(
        names(&blob),
        [
            "d/",
            "d/c",
            "t",
            "d/a",
            ".prefetch.landmark",
            "d/b",
            "stargz.index.json"
        ]
    );
    assert_eq!(list(&inflate(&blob))[3].1, b"new");
    let missing: Vec<_> = written
        .not_found
        .iter()
        .map(|missing| missing.path.as_slice())
        .collect();
    assert_eq!(missing, [b"x/y"]);

    let (blob, written) = convert(&tar, &options(&[]));
    check(&blob, &written);
    assert_eq!(
        names(&blob),
        [
            ".no.prefetch.landmark",
            "d/",
            "d/b",
            "d/c",
            "t",
            "d/a",
            "stargz.index.json"
        ]
    );
    assert_eq!(written.prefetch_end, None);

    let (blob, written) = convert(&tar, &options(&["nothing"]));
    check(&blob, &written);
    assert_eq!(names(&blob)[0], ".prefetch.landmark");
    assert!(written.prefetch_end.is_some());
}

#[test]
fn gzip_and_gnu_tar_read_what_was_written() {
    for entries in [sample(), vec![]] {
        let tar = tar_of(&entries);
        let options = Options {
            prioritized: prioritized(&["usr/f200"]),
            ..Options::default()
        };
        let (blob, written) = convert(&tar, &options);
        let mut path = tempfile::NamedTempFile::new().unwrap();
        path.write_all(&blob).unwrap();
        let unpacked = Command::new("gzip")
            .arg("-dc")
            .stdin(path.reopen().unwrap())
            .output();
        let unpacked = unpacked.unwrap();
        assert!(
            unpacked.status.success(),
            "{}",
            String::from_utf8_lossy(&unpacked.stderr)
        );
        assert_eq!(Digest::of(&unpacked.stdout), written.diff_id);
        let listed = Command::new("tar")
            .args(["--list", "--gzip", "--file"])
            .arg(path.path())
            .stderr(Stdio::inherit())
            .output()
            .unwrap();
        assert!(listed.status.success());
        let lines = String::from_utf8(listed.stdout).unwrap().lines().count();
        assert_eq!(lines, entries.len() + 2);
    }
}

/// The TOC entries of a blob with what may differ between compressors taken out.
fn comparable(blob: &[u8]) -> Vec<Value> {
    let location = locate(blob, blob.len() as u64).unwrap();
    let start = usize::try_from(location.payload_end).unwrap();
    let toc = extract_toc(&blob[start..blob.len() - location.footer.size()]).unwrap();
    let toc: Value = serde_json::from_slice(&toc.json).unwrap();
    assert_eq!(toc["version"], 1);
    let mut before = 0;
    let entry = |entry: &Value| {
        let mut entry = entry.as_object().unwrap().clone();
        if let Some(offset) = entry.remove("offset") {
            let offset = offset.as_u64().unwrap();
            assert!(offset > before, "{entry:?}");
            before = offset;
        }
        Value::Object(entry)
    };
    toc["entries"].as_array().unwrap().iter().map(entry).collect()
}

#[test]
fn upstreams_tool_and_this_one_write_the_same_toc() {
    let paths = prioritized(&["usr/lib/mod007.py", "bin/sh", "etc/os-release", "usr/lib/big.bin"]);
    for (tag, prioritized, chunk_size) in [
        ("esgz-opt", paths, 0),
        ("esgz", vec![], 0),
        ("esgz-chunk64k", vec![], 65_536),
    ] {
        let options = Options {
            format: estargz(chunk_size, DEFAULT_GZIP_LEVEL),
            prioritized,
            ..Options::default()
        };
        for (ours, theirs) in testing::layers("org").iter().zip(testing::layers(tag)) {
            let (blob, written) = convert(&inflate(&ours.blob), &options);
            check(&blob, &written);
            assert_eq!(comparable(&blob), comparable(&theirs.blob), "{tag}");
            let strip = |blob: &[u8]| -> Vec<_> {
                let mut entries = list(&inflate(blob));
                entries.pop();
                entries
                    .into_iter()
                    .map(|(entry, content)| (entry.name, entry.kind, content))
                    .collect()
            };
            assert!(strip(&blob) == strip(&theirs.blob), "{tag}");
        }
    }
}

#[test]
fn headers_stay_as_they_were() {
    let org = &testing::layers("org")[0].blob;
    let (blob, _) = convert(&inflate(org), &Options::default());
    let headers = |tar: &[u8]| -> Vec<Vec<u8>> {
        list(tar)
            .into_iter()
            .filter(|(entry, _)| !peel_image::estargz::is_reserved(entry.path.as_bytes()))
            .map(|(entry, _)| entry.raw_headers)
            .collect()
    };
    assert_eq!(headers(&inflate(&blob)), headers(&inflate(org)));
}

#[test]
fn bad_input_and_bad_options_are_errors() {
    let fails = |tar: &[u8], options: &Options| {
        write(tar, tempfile::tempfile().unwrap(), std::io::sink(), options).unwrap_err()
    };
    let tar = tar_of(&sample());
    let good = Options::default();
    assert!(matches!(
        fails(&tar[..100_000], &good),
        WriteError::Content { .. } | WriteError::Tar(_)
    ));
    assert!(matches!(fails(&[b'x'; 2048], &good), WriteError::Tar(_)));
    let mut unknown = tar.clone();
    unknown[156] = b'Z';
    assert!(matches!(fails(&unknown, &good), WriteError::Tar(_)));
    let options = |chunk_size, level| Options {
        format: estargz(chunk_size, level),
        ..Options::default()
    };
    assert!(matches!(
        fails(&tar, &options(u64::MAX, 6)),
        WriteError::ChunkSize(_)
    ));
    for level in [-1, 0, 13] {
        assert!(matches!(
            fails(&tar, &options(0, level)),
            WriteError::Level { .. }
        ));
    }

    let mut writer = tar::write::Writer::new(Vec::new());
    let entry = tar::write::NewEntry {
        name: b"caf\xe9",
        metadata: &metadata(0o644),
        kind: &TarKind::Fifo,
        user_name: b"",
        group_name: b"",
    };
    writer.append(&entry, &mut std::io::empty()).unwrap();
    let latin = writer.finish().unwrap();
    assert!(matches!(fails(&latin, &good), WriteError::NotUtf8 { .. }));
}

/// A disk that fills up after so many bytes.
struct Full(std::io::Cursor<Vec<u8>>, usize);

impl Read for Full {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Full {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.1 = self.1.checked_sub(data.len()).ok_or(io::ErrorKind::StorageFull)?;
        self.0.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Full {
    fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
        self.0.seek(to)
    }
}

#[test]
fn a_full_disk_is_an_error_and_not_a_hang() {
    let tar = tar_of(&sample());
    let full = |room| Full(std::io::Cursor::new(Vec::new()), room);
    let options = Options::default();
    assert!(matches!(
        write(tar.as_slice(), full(500_000), io::sink(), &options),
        Err(WriteError::Spool(_))
    ));
    assert!(matches!(
        write(tar.as_slice(), full(usize::MAX), full(500_000), &options),
        Err(WriteError::Output(_))
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_layer_round_trips(
        entries in proptest::collection::vec(
            ("[ab\u{e9}]{1,2}(/[ab]{1,2}){0,2}", 0usize..8, prop_oneof![Just(0usize), 1usize..3000, Just(512usize), Just(4096usize)]),
            0..25,
        ),
        paths in proptest::collection::vec("[ab]{1,2}(/[ab]{1,2}){0,2}", 0..5),
        chunk_size in prop_oneof![Just(0u64), 1u64..5000, Just(512u64)],
        level in 1i32..=9,
        threads in 1usize..4,
    ) {
        let made: Vec<Made> = entries
            .iter()
            .enumerate()
            .map(|(index, (name, kind, size))| match kind {
                0 => dir(name),
                1 => link(name, "a"),
                2 => (name.clone(), TarKind::Symlink(b"../x".as_slice().into()), vec![]),
                3 => (name.clone(), TarKind::Fifo, vec![]),
                _ => file(name, &noise(*size, index as u64)),
            })
            .collect();
        let tar = tar_of(&possible(made));
        let options = Options {
            format: estargz(if chunk_size > 0 && chunk_size < 64 { 64 } else { chunk_size }, level),
            prioritized: paths.iter().map(|path| path.clone().into_bytes()).collect(),
            threads,
            ..Options::default()
        };
        let (blob, written) = convert(&tar, &options);
        check(&blob, &written);
        let single = convert(&tar, &Options { threads: 1, ..options });
        prop_assert!(single == (blob, written));
    }
}
