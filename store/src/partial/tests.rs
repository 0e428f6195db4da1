//! Partial objects: filling, reloading, lying lists, threads, and a model.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use peel_image::layer::{Chunk, ChunkSource, Encoding};
use proptest::prelude::*;

use super::*;
use crate::tests::{TestStore, noise};

/// A file in chunks of given sizes, some of them zeros.
struct Sample {
    content: Vec<u8>,
    digest: Digest,
    chunks: Vec<Chunk>,
}

impl Sample {
    fn new(sizes: &[usize], zeros: &[usize], seed: u64) -> Self {
        let mut content = noise(sizes.iter().sum(), seed);
        let mut chunks = Vec::new();
        let mut start = 0;
        for (index, size) in sizes.iter().enumerate() {
            let part = &mut content[start..start + size];
            let source = if zeros.contains(&index) {
                part.fill(0);
                ChunkSource::Zeros
            } else {
                ChunkSource::Blob {
                    encoding: Encoding::Gzip,
                    offset: start as u64 * 3,
                    compressed_size: 10,
                    inner_offset: 0,
                }
            };
            chunks.push(Chunk {
                file_offset: start as u64,
                size: *size as u64,
                digest: Digest::of(part),
                source,
            });
            start += size;
        }
        Self {
            digest: Digest::of(&content),
            content,
            chunks,
        }
    }

    fn open(&self, store: &Store) -> Result<Arc<PartialObject>, Error> {
        store.partial(&self.digest, self.content.len() as u64, &self.chunks)
    }

    fn part(&self, index: usize) -> &[u8] {
        let chunk = &self.chunks[index];
        let start = usize::try_from(chunk.file_offset).unwrap();
        &self.content[start..start + usize::try_from(chunk.size).unwrap()]
    }
}

fn states(partial: &PartialObject) -> Vec<ChunkState> {
    (0..partial.chunk_count())
        .map(|index| partial.state(index))
        .collect()
}

use ChunkState::{Missing, Present, Unconfirmed, Unverified};

#[test]
fn chunks_in_any_order_make_an_object() {
    let test = TestStore::new();
    let sample = Sample::new(&[1000, 5000, 1, 4096], &[], 1);
    let partial = sample.open(&test.store).unwrap();
    assert_eq!(states(&partial), [Missing; 4]);
    assert!(matches!(
        partial.complete(),
        Err(Error::Incomplete { missing: 4, .. })
    ));
    for (index, last) in [(2, false), (0, false), (2, false), (3, false), (1, true)] {
        assert_eq!(partial.write(index, sample.part(index)).unwrap(), last);
        assert_eq!(partial.state(index), Unconfirmed);
    }
    test.store.settle().unwrap();
    assert_eq!(states(&partial), [Present; 4]);
    assert_eq!(partial.read(999, 5003).unwrap(), &sample.content[999..6002]);
    assert!(!test.store.has_object(&sample.digest));
    partial.complete().unwrap();
    assert!(partial.is_complete() && !test.store.has_object(&sample.digest));
    assert_eq!(states(&partial), [Present; 4]);
    test.store.settle().unwrap();
    assert!(test.store.has_object(&sample.digest));
    assert_eq!(partial.read(0, sample.content.len()).unwrap(), sample.content);
    let mut through_fd = vec![0; sample.content.len()];
    rustix::io::pread(partial.file(), &mut through_fd, 0).unwrap();
    assert_eq!(through_fd, sample.content);
    partial.complete().unwrap();
    assert_eq!(test.store.usage().unwrap().partials.files, 0);
    let (_, map) = test.store.partial_paths(&sample.digest);
    assert!(!map.exists());
    assert_eq!(
        test.store.verify_object(&sample.digest).unwrap(),
        crate::Verdict::Intact
    );
}

#[test]
fn what_an_earlier_process_left_is_hashed_before_use() {
    let test = TestStore::new();
    let sample = Sample::new(&[3000; 5], &[4], 2);
    let partial = sample.open(&test.store).unwrap();
    for index in [0, 1, 2] {
        partial.write(index, sample.part(index)).unwrap();
    }
    let (data, _) = test.store.partial_paths(&sample.digest);
    drop(partial);
    let test = test.reopen();
    let file = File::options().write(true).open(&data).unwrap();
    file.write_all_at(b"rot", 3100).unwrap();
    // A hole that did not stay one.
    file.write_all_at(b"rot", 12_100).unwrap();
    let partial = sample.open(&test.store).unwrap();
    assert_eq!(
        states(&partial),
        [Unverified, Unverified, Unverified, Missing, Present]
    );
    assert_eq!(partial.read(12_000, 3000).unwrap(), [0; 3000]);
    for _ in 0..2 {
        assert_eq!(partial.verify(0).unwrap().unwrap(), sample.part(0));
        assert_eq!(partial.verify(1).unwrap(), None);
    }
    assert_eq!(partial.verify(3).unwrap(), None);
    assert_eq!(
        states(&partial),
        [Unconfirmed, Missing, Unverified, Missing, Present]
    );
    assert_eq!(partial.absent(), 3);
    assert!(!partial.write(1, sample.part(1)).unwrap());
    assert!(!partial.write(3, sample.part(3)).unwrap());
    assert!(
        partial.write(2, sample.part(2)).unwrap(),
        "a write replaces what was not verified"
    );
    partial.complete().unwrap();
    test.store.settle().unwrap();
    assert!(
        !test.store.has_object(&sample.digest),
        "a part of it was written by another process, whose errors nobody saw"
    );
    test.store.checkpoint().unwrap();
    assert!(test.store.has_object(&sample.digest));
}

#[test]
fn chunks_that_the_disk_lost_are_missing_again() {
    let test = TestStore::new();
    let sample = Sample::new(&[3000; 4], &[], 12);
    let partial = sample.open(&test.store).unwrap();
    for index in 0..4 {
        partial.write(index, sample.part(index)).unwrap();
    }
    let (data, _) = test.store.partial_paths(&sample.digest);
    let file = File::options().write(true).open(&data).unwrap();
    file.write_all_at(&[0; 3000], 3000).unwrap();
    assert_eq!(partial.verify(0).unwrap().unwrap(), sample.part(0));
    // The table of contents is not to blame.
    assert!(matches!(partial.complete(), Err(Error::Lost(digest)) if digest == sample.digest));
    assert_eq!(states(&partial), [Unconfirmed, Missing, Unconfirmed, Unconfirmed]);
    assert_eq!(partial.absent(), 1);
    assert!(partial.write(1, sample.part(1)).unwrap());
    file.set_len(10_000).unwrap();
    assert_eq!(partial.verify(3).unwrap(), None, "it cannot be read");
    assert_eq!(partial.absent(), 1);
    assert!(partial.write(3, sample.part(3)).unwrap());
    partial.complete().unwrap();
    test.store.settle().unwrap();
    assert!(test.store.has_object(&sample.digest));
}

#[test]
fn a_chunk_that_was_brought_anew_is_no_lie() {
    let test = TestStore::new();
    let sample = Sample::new(&[3000; 3], &[], 13);
    let partial = sample.open(&test.store).unwrap();
    for index in 0..3 {
        partial.write(index, sample.part(index)).unwrap();
    }
    // As after a hash of the whole that met a lost chunk, which is right again.
    assert!(partial.is_whole_after_all().unwrap());
    let lying = Sample {
        digest: Digest::of(b"another file"),
        ..Sample::new(&[3000; 3], &[], 13)
    };
    let partial = lying.open(&test.store).unwrap();
    for index in 0..3 {
        partial.write(index, lying.part(index)).unwrap();
    }
    assert!(!partial.is_whole_after_all().unwrap());
    assert!(matches!(partial.complete(), Err(Error::DigestMismatch { .. })));
}

#[test]
fn a_list_of_zeros_needs_nothing() {
    let test = TestStore::new();
    let sample = Sample::new(&[4096, 100_000], &[0, 1], 3);
    let partial = sample.open(&test.store).unwrap();
    assert_eq!(partial.absent(), 0);
    partial.complete().unwrap();
    test.store.settle().unwrap();
    assert!(test.store.has_object(&sample.digest));
}

#[test]
fn another_chunk_list_gets_nothing_from_the_first() {
    let test = TestStore::new();
    let honest = Sample::new(&[500, 500], &[], 4);
    let mut lying = Sample::new(&[500, 500], &[], 5);
    lying.digest = honest.digest;
    let partial = lying.open(&test.store).unwrap();
    partial.write(0, lying.part(0)).unwrap();
    assert!(
        matches!(honest.open(&test.store), Err(Error::ChunkListConflict(digest)) if digest == honest.digest)
    );
    assert!(Arc::ptr_eq(&partial, &lying.open(&test.store).unwrap()));
    drop(partial);
    let partial = honest.open(&test.store).unwrap();
    assert_eq!(states(&partial), [Missing; 2]);
    drop(partial);
    // The same cut at other places in another blob is the same list.
    let mut moved = Sample::new(&[500, 500], &[], 4);
    let partial = honest.open(&test.store).unwrap();
    for chunk in &mut moved.chunks {
        if let ChunkSource::Blob { offset, .. } = &mut chunk.source {
            *offset += 999;
        }
    }
    assert!(Arc::ptr_eq(&partial, &moved.open(&test.store).unwrap()));
}

#[test]
fn a_whole_that_does_not_match_is_discarded() {
    let test = TestStore::new();
    let mut lying = Sample::new(&[500, 500], &[], 6);
    let found = lying.digest;
    lying.digest = Digest::of(b"what it claims to be");
    let partial = lying.open(&test.store).unwrap();
    partial.write(0, lying.part(0)).unwrap();
    assert!(partial.write(1, lying.part(1)).unwrap());
    match partial.complete() {
        Err(Error::DigestMismatch { expected, found: f }) => assert_eq!((expected, f), (lying.digest, found)),
        other => panic!("{other:?}"),
    }
    assert_eq!(states(&partial), [Missing; 2]);
    assert!(matches!(partial.read(0, 1), Err(Error::Discarded(_))));
    assert!(matches!(
        partial.write(0, lying.part(0)),
        Err(Error::Discarded(_))
    ));
    assert!(matches!(partial.verify(0), Err(Error::Discarded(_))));
    assert!(matches!(partial.complete(), Err(Error::Discarded(_))));
    assert!(!test.store.has_object(&lying.digest));
    assert_eq!(test.store.usage().unwrap().partials.files, 0);
    let again = lying.open(&test.store).unwrap();
    assert!(!Arc::ptr_eq(&partial, &again));
    assert_eq!(states(&again), [Missing; 2]);
}

#[test]
fn a_complete_object_has_every_chunk() {
    let test = TestStore::new();
    let sample = Sample::new(&[300, 300], &[], 7);
    test.store.add_verified(&sample.digest, &sample.content).unwrap();
    assert_eq!(states(&sample.open(&test.store).unwrap()), [Unconfirmed; 2]);
    test.store.settle().unwrap();
    let partial = sample.open(&test.store).unwrap();
    assert_eq!((states(&partial), partial.absent()), (vec![Present; 2], 0));
    assert!(!partial.write(0, sample.part(0)).unwrap());
    partial.complete().unwrap();
    assert_eq!(partial.read(100, 300).unwrap(), &sample.content[100..400]);
    let mut longer = Sample::new(&[300, 301], &[], 7);
    longer.digest = sample.digest;
    assert!(matches!(
        longer.open(&test.store),
        Err(Error::SizeMismatch {
            expected: 601,
            found: 600,
            ..
        })
    ));
}

#[test]
fn the_object_may_arrive_by_another_way() {
    let test = TestStore::new();
    let sample = Sample::new(&[300, 300], &[], 8);
    let partial = sample.open(&test.store).unwrap();
    partial.write(0, sample.part(0)).unwrap();
    test.store.add_verified(&sample.digest, &sample.content).unwrap();
    assert!(partial.write(1, sample.part(1)).unwrap());
    partial.complete().unwrap();
    assert_eq!(partial.read(0, 600).unwrap(), sample.content);
    assert_eq!(test.store.usage().unwrap().partials.files, 0);
    assert_eq!(test.store.usage().unwrap().objects.files, 1);
}

#[test]
fn torn_files_are_made_anew() {
    let test = TestStore::new();
    let sample = Sample::new(&[400, 400], &[], 9);
    let (data, map) = test.store.partial_paths(&sample.digest);
    let cut = |path: &Path, length| {
        File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_len(length)
            .unwrap();
    };
    let flip = |path: &Path, position| {
        let mut content = fs::read(path).unwrap();
        content[position] ^= 1;
        fs::write(path, content).unwrap();
    };
    let damages: [(&str, &dyn Fn()); 6] = [
        ("map cut", &|| cut(&map, 65)),
        ("map empty", &|| cut(&map, 0)),
        ("map magic", &|| flip(&map, 0)),
        ("map checksum", &|| flip(&map, 12)),
        ("data cut", &|| cut(&data, 799)),
        ("data gone", &|| fs::remove_file(&data).unwrap()),
    ];
    for (name, damage) in damages {
        let partial = sample.open(&test.store).unwrap();
        partial.write(0, sample.part(0)).unwrap();
        drop(partial);
        let partial = sample.open(&test.store).unwrap();
        assert_eq!(states(&partial), [Unverified, Missing], "before {name}");
        drop(partial);
        damage();
        let partial = sample.open(&test.store).unwrap();
        assert_eq!(states(&partial), [Missing; 2], "{name}");
    }
}

#[test]
fn impossible_lists_and_calls_are_errors() {
    type Edit<'a> = &'a dyn Fn(&mut Vec<Chunk>);
    let test = TestStore::new();
    let sample = Sample::new(&[400, 400], &[], 10);
    let change = |change: Edit<'_>| {
        let mut chunks = sample.chunks.clone();
        change(&mut chunks);
        test.store.partial(&sample.digest, 800, &chunks)
    };
    let bad: [(&str, Edit<'_>); 6] = [
        ("empty", &|chunks| chunks.clear()),
        ("short", &|chunks| chunks.truncate(1)),
        ("gap", &|chunks| chunks[1].file_offset += 1),
        ("overlap", &|chunks| chunks[1].file_offset -= 1),
        ("nothing", &|chunks| chunks[0].size = 0),
        ("overflow", &|chunks| chunks[1].size = u64::MAX),
    ];
    for (name, edit) in bad {
        assert!(matches!(change(edit), Err(Error::ChunkList { .. })), "{name}");
    }
    let lone = Sample::new(&[400], &[], 11);
    let claim = Digest::of(b"another");
    assert!(matches!(
        test.store.partial(&claim, 400, &lone.chunks),
        Err(Error::ChunkList { .. })
    ));
    lone.open(&test.store).unwrap();

    let partial = sample.open(&test.store).unwrap();
    assert!(matches!(
        partial.write(2, b""),
        Err(Error::NoSuchChunk { index: 2, .. })
    ));
    assert!(matches!(
        partial.write(0, &[0; 399]),
        Err(Error::ChunkSize {
            expected: 400,
            found: 399,
            ..
        })
    ));
    assert!(matches!(partial.verify(9), Err(Error::NoSuchChunk { .. })));
    assert_eq!(partial.state(9), Missing);
    assert!(matches!(partial.read(1, 800), Err(Error::Range { .. })));
    assert!(matches!(partial.read(u64::MAX, 1), Err(Error::Range { .. })));
    assert!(partial.read(800, 0).unwrap().is_empty());
}

#[test]
fn the_registry_forgets_what_nobody_holds() {
    let test = TestStore::new();
    let samples: Vec<Sample> = (20..30).map(|seed| Sample::new(&[10, 10], &[], seed)).collect();
    let open: Vec<_> = samples
        .iter()
        .map(|sample| sample.open(&test.store).unwrap())
        .collect();
    assert_eq!(test.store.inner.partials.len(), 10);
    drop(open);
    assert_eq!(test.store.inner.partials.len(), 0);
}

#[test]
fn threads_fill_while_others_read() {
    let test = TestStore::new();
    for round in 0..5 {
        let sizes: Vec<usize> = (0..200).map(|index| 500 + index * 7).collect();
        let sample = Sample::new(&sizes, &[3, 77], 40 + round);
        let lasts = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for thread in 0..4_usize {
                let (sample, store, lasts) = (&sample, &test.store, &lasts);
                scope.spawn(move || {
                    let partial = sample.open(store).unwrap();
                    for step in 0..sample.chunks.len() {
                        // Every thread goes its own way, so most chunks are written more than once.
                        let index = (step * [1, 3, 7, 9][thread] + thread * 50) % sample.chunks.len();
                        if partial.write(index, sample.part(index)).unwrap() {
                            lasts.fetch_add(1, Ordering::Relaxed);
                            partial.complete().unwrap();
                        }
                    }
                });
                scope.spawn(move || {
                    let partial = sample.open(store).unwrap();
                    for step in 0..3 * sample.chunks.len() {
                        let index = (step * 11 + thread) % sample.chunks.len();
                        if matches!(partial.state(index), Present | Unconfirmed) {
                            let chunk = &sample.chunks[index];
                            let bytes = partial.read(chunk.file_offset, sample.part(index).len()).unwrap();
                            assert!(bytes == sample.part(index), "chunk {index}");
                        }
                    }
                });
            }
        });
        assert_eq!(lasts.into_inner(), 1, "exactly one write is the last");
        test.store.settle().unwrap();
        assert_eq!(
            test.store.verify_object(&sample.digest).unwrap(),
            crate::Verdict::Intact
        );
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(prop::sample::Index),
    Verify(prop::sample::Index),
    Rot(prop::sample::Index),
    Reopen,
    Complete,
}

#[test]
fn the_map_follows_a_model() {
    let test = TestStore::new();
    let step = prop_oneof![
        6 => any::<prop::sample::Index>().prop_map(Step::Write),
        3 => any::<prop::sample::Index>().prop_map(Step::Verify),
        1 => any::<prop::sample::Index>().prop_map(Step::Rot),
        2 => Just(Step::Reopen),
        1 => Just(Step::Complete),
    ];
    let sizes = proptest::collection::vec(1..6000_usize, 2..8);
    let steps = proptest::collection::vec(step, 0..40);
    let zeros = proptest::collection::vec(0..8_usize, 0..2);
    proptest!(ProptestConfig::with_cases(100), |(sizes in sizes, zeros in zeros, steps in steps, seed: u64)| {
        let sample = Sample::new(&sizes, &zeros, seed);
        test.store.remove_object(&sample.digest).unwrap();
        let (data, map) = test.store.partial_paths(&sample.digest);
        remove_quietly(&map);
        let mut partial = sample.open(&test.store).unwrap();
        let is_zero = |index: usize| zeros.contains(&index);
        let mut model: Vec<ChunkState> =
            (0..sizes.len()).map(|index| if is_zero(index) { Present } else { Missing }).collect();
        // Whether the bytes on disk are the chunk's.
        let mut good: Vec<bool> = (0..sizes.len()).map(is_zero).collect();
        let is_here = |state: ChunkState| matches!(state, Present | Unconfirmed);
        for step in steps {
            match step {
                Step::Write(index) => {
                    let index = index.index(sizes.len());
                    let last = partial.write(index, sample.part(index)).unwrap();
                    let was = model[index];
                    if was != Present {
                        model[index] = Unconfirmed;
                    }
                    good[index] = true;
                    prop_assert_eq!(last, !is_here(was) && model.iter().copied().all(is_here));
                }
                Step::Verify(index) => {
                    let index = index.index(sizes.len());
                    let result = partial.verify(index).unwrap();
                    if !good[index] {
                        model[index] = Missing;
                    } else if model[index] == Unverified {
                        model[index] = Unconfirmed;
                    }
                    let part = sample.part(index).to_vec();
                    prop_assert_eq!(result, is_here(model[index]).then_some(part));
                }
                Step::Rot(index) => {
                    let index = index.index(sizes.len());
                    // Verified bytes rot only while no process holds them.
                    if !is_here(model[index]) {
                        let byte = [!sample.part(index)[0]];
                        let file = File::options().write(true).open(&data).unwrap();
                        file.write_all_at(&byte, sample.chunks[index].file_offset).unwrap();
                        good[index] = false;
                    }
                }
                Step::Reopen => {
                    drop(partial);
                    partial = sample.open(&test.store).unwrap();
                    for (index, state) in model.iter_mut().enumerate() {
                        // A chunk that failed its check stays marked on disk: the mark is only a hint.
                        let marked = partial.state(index) == Unverified;
                        match state {
                            Present if is_zero(index) => {}
                            Missing if !marked => {}
                            _ => *state = Unverified,
                        }
                    }
                }
                Step::Complete => {
                    let complete = model.iter().copied().all(is_here);
                    prop_assert_eq!(partial.complete().is_ok(), complete);
                    if complete {
                        test.store.checkpoint().unwrap();
                        prop_assert_eq!(test.store.verify_object(&sample.digest).unwrap(), crate::Verdict::Intact);
                        break;
                    }
                }
            }
            prop_assert_eq!(states(&partial), model.clone());
            prop_assert_eq!(partial.absent(), model.iter().filter(|state| !is_here(**state)).count());
        }
    });
}
