//! The reader against the writer (property), against GNU tar and Python's tarfile, and against hostile streams.

use std::io::Read as _;

use proptest::prelude::*;

use super::header::{self, Block};
use super::write::{NewEntry, Writer, encode_header};
use super::{BLOCK, Reader, TarEntry, TarKind, TarProblem};
use crate::layer::{Device, Metadata, SYMLINK_MODE};
use crate::path::EntryPath;

#[derive(Debug, Clone)]
struct Sample {
    name: Vec<u8>,
    metadata: Metadata,
    kind: TarKind,
    content: Vec<u8>,
    user_name: Vec<u8>,
    group_name: Vec<u8>,
}

impl Sample {
    fn entry(&self) -> NewEntry<'_> {
        NewEntry {
            name: &self.name,
            metadata: &self.metadata,
            kind: &self.kind,
            user_name: &self.user_name,
            group_name: &self.group_name,
        }
    }
}

fn write(samples: &[Sample]) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new());
    for sample in samples {
        writer.append(&sample.entry(), &mut &sample.content[..]).unwrap();
    }
    writer.finish().unwrap()
}

fn read(stream: &[u8]) -> Vec<(TarEntry, Vec<u8>)> {
    let mut reader = Reader::new(stream);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry().unwrap() {
        let mut content = Vec::new();
        reader.read_to_end(&mut content).unwrap();
        entries.push((entry, content));
    }
    let trailer = reader.finish().unwrap();
    assert_eq!(trailer.offset + trailer.size, stream.len() as u64);
    entries
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let component = prop_oneof![
        8 => proptest::collection::vec(1_u8..=255, 1..30),
        1 => proptest::collection::vec(1_u8..=255, 90..255),
    ];
    let component = component.prop_map(|mut component| {
        for byte in &mut component {
            if matches!(byte, b'/' | b'.') {
                *byte = b'_';
            }
        }
        component
    });
    proptest::collection::vec(component, 1..6).prop_map(|components| components.join(&b'/'))
}

fn kind() -> impl Strategy<Value = (TarKind, Vec<u8>)> {
    let device = || {
        prop_oneof![0..4096_u32, any::<u32>()].prop_flat_map(|major| {
            prop_oneof![0..1_048_576_u32, any::<u32>()].prop_map(move |minor| Device { major, minor })
        })
    };
    prop_oneof![
        Just((TarKind::Directory, Vec::new())),
        proptest::collection::vec(any::<u8>(), 0..2000).prop_map(|content| {
            let size = content.len() as u64;
            (TarKind::Regular { size }, content)
        }),
        proptest::collection::vec(1_u8..=255, 1..300)
            .prop_map(|target| (TarKind::Symlink(target.into()), Vec::new())),
        name().prop_map(|raw| {
            let target = EntryPath::clean(&raw).unwrap();
            let raw = raw.into();
            (TarKind::Hardlink { raw, target }, Vec::new())
        }),
        device().prop_map(|device| (TarKind::CharDevice(device), Vec::new())),
        device().prop_map(|device| (TarKind::BlockDevice(device), Vec::new())),
        Just((TarKind::Fifo, Vec::new())),
    ]
}

fn metadata() -> impl Strategy<Value = Metadata> {
    let xattrs = proptest::collection::btree_map(
        "[a-z]{1,8}\\.[a-z.]{1,20}".prop_map(|name| name.into_bytes().into_boxed_slice()),
        proptest::collection::vec(any::<u8>(), 0..100).prop_map(Vec::into_boxed_slice),
        0..4,
    );
    let id = || prop_oneof![0..70_000_u32, 0..u32::MAX];
    let time = prop_oneof![0..2_000_000_000_i64, -1000..1000_i64, (i64::MIN + 1)..i64::MAX];
    let nanoseconds = prop_oneof![Just(0), 0..1_000_000_000_u32];
    (0_u16..0o10000, id(), id(), time, nanoseconds, xattrs).prop_map(
        |(mode, uid, gid, mtime, mtime_nanoseconds, xattrs)| Metadata {
            mode,
            uid,
            gid,
            mtime,
            mtime_nanoseconds,
            xattrs,
        },
    )
}

fn sample() -> impl Strategy<Value = Sample> {
    let owner = || proptest::collection::vec(1_u8..=255, 0..40);
    (name(), metadata(), kind(), owner(), owner()).prop_map(
        |(name, mut metadata, (kind, content), user_name, group_name)| {
            if matches!(kind, TarKind::Symlink(_)) {
                metadata.mode = SYMLINK_MODE;
            }
            Sample {
                name,
                metadata,
                kind,
                content,
                user_name,
                group_name,
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn what_is_written_is_read_back(samples in proptest::collection::vec(sample(), 0..6)) {
        let stream = write(&samples);
        let entries = read(&stream);
        prop_assert_eq!(entries.len(), samples.len());
        let mut again = Vec::new();
        for (sample, (entry, content)) in samples.iter().zip(&entries) {
            prop_assert_eq!(&entry.path, &EntryPath::clean(&sample.name).unwrap());
            prop_assert_eq!(&entry.metadata, &sample.metadata);
            prop_assert_eq!(&entry.kind, &sample.kind);
            prop_assert_eq!(entry.user_name.as_ref(), &sample.user_name[..]);
            prop_assert_eq!(entry.group_name.as_ref(), &sample.group_name[..]);
            prop_assert_eq!(content, &sample.content);
            prop_assert!(entry.self_contained);
            again.extend_from_slice(&entry.raw_headers);
            again.extend_from_slice(content);
            again.extend_from_slice(super::write::padding(content.len() as u64));
        }
        again.extend_from_slice(&super::write::END_OF_ARCHIVE);
        prop_assert!(again == stream, "raw headers do not give the stream again");
    }

    #[test]
    fn damaged_streams_never_panic(
        samples in proptest::collection::vec(sample(), 1..4),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
        fix in any::<bool>(),
    ) {
        let mut stream = write(&samples);
        for (position, byte) in damage {
            let position = position.index(stream.len());
            stream[position] = byte;
        }
        if fix {
            // Let the damage get past the checksum.
            for block in stream.chunks_exact_mut(BLOCK) {
                let mut sealed = Block(<[u8; BLOCK]>::try_from(&*block).unwrap());
                if sealed.bytes(header::MAGIC).starts_with(b"ustar") {
                    sealed.seal();
                    block.copy_from_slice(&sealed.0);
                }
            }
        }
        let mut reader = Reader::new(&stream[..]);
        let mut content = Vec::new();
        while let Ok(Some(_)) = reader.next_entry() {
            content.clear();
            if (&mut reader).take(1 << 20).read_to_end(&mut content).is_err() {
                break;
            }
        }
    }
}

fn header_of(name: &[u8], kind: &TarKind) -> Vec<u8> {
    let entry = NewEntry {
        name,
        metadata: &Metadata::default(),
        kind,
        user_name: b"",
        group_name: b"",
    };
    encode_header(&entry).unwrap()
}

/// A header whose bytes are altered and whose checksum is right.
fn altered(kind: &TarKind, alter: impl FnOnce(&mut [u8; BLOCK])) -> Vec<u8> {
    let mut block = Block(header_of(b"name", kind).try_into().unwrap());
    alter(&mut block.0);
    block.seal();
    block.0.to_vec()
}

#[test]
fn malformed_streams_are_clear_errors() {
    let file = TarKind::Regular { size: 10 };
    let check = |stream: Vec<u8>, expected: &str| {
        let mut reader = Reader::new(&stream[..]);
        let error = loop {
            match reader.next_entry() {
                Ok(Some(_)) => {}
                Ok(None) => panic!("no error where {expected:?} was expected"),
                Err(error) => break error,
            }
        };
        assert!(error.to_string().contains(expected), "{error}, not {expected}");
    };
    let mut bad_sum = header_of(b"name", &file);
    bad_sum[0] = b'N';
    check(bad_sum, "\"Name\" at byte 0: the header's checksum");
    check(
        header_of(b"name", &file),
        "\"name\" at byte 0: the stream ends too early, inside a file's content",
    );
    check(
        [header_of(b"name", &file), vec![b'c'; 9]].concat(),
        "\"name\" at byte 0: the stream ends too early, inside a file's content",
    );
    check(header_of(b"name", &file)[..100].to_vec(), "inside a header block");
    check(vec![b'x'; 512], "checksum");
    let fifo = header_of(b"first", &TarKind::Fifo);
    check(
        [&fifo[..], &[0; 512], &fifo].concat(),
        "at byte 512: a single zero block",
    );
    check(altered(&file, |b| b[124] = 0xff), "the field size");
    check(altered(&file, |b| b[108] = b'x'), "the field uid");
    check(
        altered(&file, |b| {
            b[108..116].copy_from_slice(&[0x80, 0, 0, 1, 0, 0, 0, 0]);
        }),
        "the field uid",
    );
    let device = TarKind::CharDevice(Device { major: 1, minor: 3 });
    check(
        altered(&device, |b| {
            b[329..337].copy_from_slice(&[0x80, 0, 0, 1, 0, 0, 0, 0]);
        }),
        "the field device major",
    );
    check(altered(&file, |b| b[156] = b'M'), "unsupported entry type 'M'");
    check(
        altered(&file, |b| b[156] = b'2'),
        "the target of the symbolic link",
    );
    let old = altered(&file, |b| {
        b[4] = b'/';
        b[156] = 0;
    });
    check(old, "a directory with content");
    check(altered(&file, |b| b[156] = b'x'), "inside an extended header");
    let pax = altered(&file, |b| {
        b[156] = b'x';
        b[124..136].copy_from_slice(b"77777777777\0");
    });
    check(pax, "an extended header of more than 1048576 bytes");
    let lone = [
        altered(&TarKind::Regular { size: 0 }, |b| b[156] = b'x'),
        vec![0; 1024],
    ]
    .concat();
    check(lone, "inside an extended header");
    let bomb = altered(&TarKind::Regular { size: 0 }, |b| {
        b[156] = b'S';
        b[483..495].copy_from_slice(b"77777777777\0");
    });
    let stream = [bomb.clone(), bomb.clone(), bomb].concat();
    check(stream, "holes of sparse files of more than");
}

#[test]
fn old_and_odd_headers() {
    let empty = TarKind::Regular { size: 0 };
    let kind = |block: Vec<u8>| read(&block).remove(0).0.kind;
    assert_eq!(kind(altered(&empty, |b| b[156] = 0)), empty);
    assert_eq!(kind(altered(&empty, |b| b[156] = b'7')), empty);
    // A slash at the end of the name means a directory in V7 headers alone, as in Go.
    assert_eq!(kind(altered(&empty, |b| b[4] = b'/')), empty);
    let old = altered(&empty, |b| {
        b[4] = b'/';
        b[156] = 0;
    });
    assert_eq!(kind(old), TarKind::Directory);
    // A V7 header has no prefix and no names: the bytes there mean nothing.
    let v7 = altered(&empty, |b| {
        b[257..265].fill(0);
        b[265..300].fill(b'x');
        b[345..400].fill(b'x');
    });
    let entry = read(&v7).remove(0).0;
    assert_eq!(
        (entry.path.as_bytes(), entry.user_name.as_ref()),
        (&b"name"[..], &b""[..])
    );
    // Content of a link or a device is no content (Go, POSIX): the next header follows at once.
    let link = altered(&TarKind::Fifo, |b| b[124..136].copy_from_slice(b"00000001000\0"));
    assert_eq!(read(&[link.clone(), link].concat()).len(), 2);
}

/// An extended header of this type.
fn records(kind: u8, records: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut data = Vec::new();
    for (key, value) in records {
        super::pax::push(&mut data, key, value);
    }
    let size = data.len() as u64;
    let header = altered(&TarKind::Regular { size }, |b| b[156] = kind);
    [&header, &data[..], super::write::padding(size)].concat()
}

#[test]
fn global_records_mean_nothing() {
    let fifo = header_of(b"fifo", &TarKind::Fifo);
    let global = records(
        b'g',
        &[
            (b"uid", b"7"),
            (b"mtime", b"1.5"),
            (b"path", b"other"),
            (b"SCHILY.xattr.user.a", b"v"),
        ],
    );
    let before = records(b'x', &[(b"path", b"lost"), (b"gid", b"9")]);
    let after = records(b'x', &[(b"path", b"kept"), (b"mtime", b"2")]);
    let stream = [
        // What stands before a global header is about that header, as in Go.
        before,
        global.clone(),
        fifo.clone(),
        global.clone(),
        after,
        fifo.clone(),
        fifo,
        // At the end of the entries, too.
        global.clone(),
    ]
    .concat();
    let entries = read(&stream);
    let found: Vec<_> = entries
        .iter()
        .map(|(entry, _)| (&*entry.name, entry.metadata.mtime, entry.metadata.xattrs.len()))
        .collect();
    assert_eq!(found, [(&b"fifo"[..], 0, 0), (b"kept", 2, 0), (b"fifo", 0, 0)]);
    for (entry, _) in &entries {
        assert_eq!((entry.metadata.uid, entry.metadata.gid), (0, 0));
        assert!(!entry.self_contained);
    }
    // Their bytes are kept with the entry that follows, and what is malformed is still an error.
    assert_eq!(
        entries[1].0.raw_headers.get(..global.len()),
        Some(global.as_slice())
    );
    let mut broken = global;
    broken[512] = b'x';
    assert!(Reader::new(broken.as_slice()).next_entry().is_err());
}

#[test]
fn owners_that_are_none_and_modes_of_links() {
    let pax = |id: &[u8]| {
        [
            records(b'x', &[(b"uid", id), (b"gid", id)]),
            header_of(b"fifo", &TarKind::Fifo),
        ]
        .concat()
    };
    let binary = |bytes: [u8; 8]| {
        altered(&TarKind::Fifo, |block| {
            block[108..116].copy_from_slice(&bytes);
            block[116..124].copy_from_slice(&bytes);
        })
        .to_vec()
    };
    for (stream, raw, id) in [
        (pax(b"4294967295"), 4_294_967_295, Some(0)),
        (pax(b"-1"), -1, Some(0)),
        (pax(b"4294967294"), 4_294_967_294, Some(4_294_967_294)),
        (pax(b"4294967296"), 0, None),
        (pax(b"-2"), 0, None),
        (
            binary([0x80, 0, 0, 0, 255, 255, 255, 255]),
            4_294_967_295,
            Some(0),
        ),
        (binary([255; 8]), -1, Some(0)),
        (binary([0x80, 0, 0, 1, 0, 0, 0, 0]), 0, None),
        (binary(*b"0001750\0"), 1000, Some(1000)),
    ] {
        match (Reader::new(stream.as_slice()).next_entry(), id) {
            (Ok(Some(entry)), Some(id)) => {
                assert_eq!((entry.metadata.uid, entry.metadata.gid), (id, id));
                assert_eq!(entry.raw_owner, (raw, raw));
            }
            (Err(error), None) => assert!(error.to_string().contains("uid"), "{error}"),
            (other, _) => panic!("{raw}: {other:?}"),
        }
    }
    let link = altered(&TarKind::Symlink(b"x"[..].into()), |block| {
        block[100..108].copy_from_slice(b"0000644\0");
    });
    let entry = Reader::new(link.as_slice()).next_entry().unwrap().unwrap();
    assert_eq!((entry.metadata.mode, entry.raw_mode), (0o777, 0o644));
}

#[test]
fn bytes_after_the_end_are_reported() {
    let mut stream = write(&[]);
    stream.extend_from_slice(&[0; 9000]);
    let trailer = Reader::new(&stream[..]).finish().unwrap();
    assert_eq!(
        (trailer.offset, trailer.size, trailer.has_data),
        (0, 10024, false)
    );
    stream.extend_from_slice(b"hidden");
    let trailer = Reader::new(&stream[..]).finish().unwrap();
    assert_eq!((trailer.offset, trailer.size, trailer.has_data), (0, 10030, true));
    assert_eq!(Reader::new(&b""[..]).finish().unwrap().size, 0);
}

#[test]
fn a_failing_stream_is_named_as_such() {
    struct Broken;
    impl std::io::Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::other("broken"))
        }
    }
    let error = Reader::new(Broken).next_entry().unwrap_err();
    assert!(matches!(error.problem, TarProblem::Read(_)), "{error}");
}

#[test]
fn the_padding_of_the_last_file_may_be_missing() {
    let whole = [
        header_of(b"name", &TarKind::Regular { size: 10 }),
        vec![b'c'; 10],
        vec![0; 502],
    ]
    .concat();
    for length in [522, 600, 1023, 1024] {
        let mut reader = Reader::new(&whole[..length]);
        assert!(reader.next_entry().unwrap().is_some());
        assert!(reader.next_entry().unwrap().is_none(), "{length} bytes");
        assert_eq!(reader.finish().unwrap().size, 0, "{length} bytes");
    }
}
