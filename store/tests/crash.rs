//! What a kill and a full disk leave behind: nothing that has the name of an object without its content.

#![expect(
    clippy::unwrap_used,
    reason = "a test's helper fails by panicking, like the test"
)]

use std::env;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use peel_image::Digest;
use peel_image::layer::{Chunk, ChunkSource, Encoding};
use peel_store::{Error, ImageRecord, Store, Verdict};

/// Tells the child where to write.
const VARIABLE: &str = "PEEL_CRASH_TEST_STORE";

/// Content number `number`; some are larger than the writer's buffer.
fn content(number: u64) -> Vec<u8> {
    let length = if number.is_multiple_of(16) { 700_000 } else { 3000 };
    let mut state = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    })
    .take(length)
    .collect()
}

/// `content` in seven chunks.
fn chunks(content: &[u8]) -> Vec<Chunk> {
    let size = content.len().div_ceil(7);
    content
        .chunks(size)
        .scan(0, |offset, part| {
            let chunk = Chunk {
                file_offset: *offset,
                size: part.len() as u64,
                digest: Digest::of(part),
                source: ChunkSource::Blob {
                    encoding: Encoding::Gzip,
                    offset: *offset,
                    compressed_size: 1,
                    inner_offset: 0,
                },
            };
            *offset += chunk.size;
            Some(chunk)
        })
        .collect()
}

fn part<'a>(content: &'a [u8], chunk: &Chunk) -> &'a [u8] {
    let start = usize::try_from(chunk.file_offset).unwrap();
    &content[start..start + usize::try_from(chunk.size).unwrap()]
}

fn record(number: u64) -> ImageRecord {
    let manifest = content(number);
    ImageRecord {
        manifest_digest: Digest::of(&manifest),
        manifest,
        config: Vec::new(),
        layers: Vec::new(),
    }
}

/// Writes in every way there is until it is killed; `thread` keeps the contents apart.
fn write_forever(store: &Store, thread: u64) {
    for step in 0.. {
        let content = content(step * 4 + thread);
        let digest = Digest::of(&content);
        match step % 3 {
            0 => store.add_verified(&digest, &content).unwrap(),
            1 => {
                let mut writer = store.object_writer().unwrap();
                writer.write_all(&content).unwrap();
                writer.finish(Some(&digest)).unwrap();
            }
            _ => {
                let chunks = chunks(&content);
                let partial = store.partial(&digest, content.len() as u64, &chunks).unwrap();
                for (index, chunk) in chunks.iter().enumerate() {
                    partial.write(index, part(&content, chunk)).unwrap();
                }
                partial.complete().unwrap();
            }
        }
        store.put_image(&record(step % 10)).unwrap();
        if step % 50 == 49 {
            store.checkpoint().unwrap();
        }
    }
}

#[test]
#[ignore = "started by the test below, which kills it"]
fn child() {
    let root = env::var_os(VARIABLE)
        .expect("this is the child of a_kill_leaves_no_half_object; it is not run alone");
    let store = Store::open(Path::new(&root)).unwrap();
    store.lock().unwrap();
    thread::scope(|scope| {
        for thread in 0..4 {
            let store = &store;
            scope.spawn(move || write_forever(store, thread));
        }
    });
}

/// A child that is killed whatever happens.
struct Victim(Child);

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn objects(store: &Store) -> Vec<Digest> {
    let mut found = Vec::new();
    for shard in fs::read_dir(store.objects_dir()).unwrap() {
        let shard = shard.unwrap();
        for entry in fs::read_dir(shard.path()).unwrap() {
            let name =
                [shard.file_name(), entry.unwrap().file_name()].map(|name| name.into_string().unwrap());
            found.push(Digest::from_hex(&name.concat()).unwrap());
        }
    }
    found
}

#[test]
fn a_kill_leaves_no_half_object() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("store");
    let mut seen = 0;
    for round in 0..5 {
        let child = Command::new(env::current_exe().unwrap())
            .args(["--ignored", "--exact", "child"])
            .env(VARIABLE, &root)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut victim = Victim(child);
        let deadline = Instant::now() + Duration::from_secs(60);
        // Killed at a different point each time, but never before there is something to look at.
        while !Store::open(&root).is_ok_and(|store| objects(&store).len() > seen) {
            assert!(Instant::now() < deadline, "the child writes nothing");
            assert!(
                victim.0.try_wait().unwrap().is_none(),
                "the child ended by itself"
            );
            thread::sleep(Duration::from_millis(20));
        }
        thread::sleep(Duration::from_millis(50 + 37 * round));
        drop(victim);

        let store = Store::open(&root).unwrap();
        store.lock().unwrap();
        let objects = objects(&store);
        assert!(objects.len() > seen, "round {round} added nothing");
        seen = objects.len();
        for digest in &objects {
            assert_eq!(store.verify_object(digest).unwrap(), Verdict::Intact, "{digest}");
        }
        assert_eq!(fs::read_dir(root.join("tmp")).unwrap().count(), 0);
        for number in 0..10 {
            let expected = record(number);
            let found = store.image(&expected.manifest_digest).unwrap();
            assert!(found.is_none_or(|found| found == expected), "record {number}");
        }
        // What a partial object kept is either right or found out.
        for number in 0..2000 {
            let content = content(number);
            let digest = Digest::of(&content);
            let file = store
                .root()
                .join("partial")
                .join(Store::object_name(&digest))
                .with_extension("data");
            if !file.exists() {
                continue;
            }
            let chunks = chunks(&content);
            let partial = store.partial(&digest, content.len() as u64, &chunks).unwrap();
            for (index, chunk) in chunks.iter().enumerate() {
                match partial.verify(index).unwrap() {
                    Some(bytes) => assert!(bytes == part(&content, chunk)),
                    None => drop(partial.write(index, part(&content, chunk)).unwrap()),
                }
            }
            partial.complete().unwrap();
        }
        store.checkpoint().unwrap();
        assert_eq!(store.pending_count(), 0);
    }
}

/// A small file system that goes with the value.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(directory: &Path, kind: &str) -> Self {
        let target = directory.join(kind);
        fs::create_dir(&target).unwrap();
        let run = |program: &str, arguments: &[&str]| {
            let output = Command::new(program).args(arguments).output().unwrap();
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(
                output.status.success(),
                "{program} {arguments:?} (needs root): {text}"
            );
        };
        let path = target.to_str().unwrap();
        if kind == "tmpfs" {
            run("mount", &["-t", "tmpfs", "-o", "size=12m", "peel-test", path]);
        } else {
            let image = directory.join("image");
            fs::File::create(&image).unwrap().set_len(24 << 20).unwrap();
            let image = image.to_str().unwrap();
            run("/sbin/mkfs.ext4", &["-q", "-N", "4096", image]);
            run("mount", &["-o", "loop", image, path]);
        }
        Self(target)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_is_a_clear_error() {
    let directory = tempfile::tempdir().unwrap();
    for kind in ["tmpfs", "ext4"] {
        let disk = SmallDisk::new(directory.path(), kind);
        let store = Store::open(&disk.0).unwrap();
        store.lock().unwrap();
        // The marker is written while there is room.
        store.add_verified(&Digest::of(b"before"), b"before").unwrap();
        store.settle().unwrap();
        let mut full = [false; 3];
        // Some fit when others do not, so go on for a while.
        for number in 0..400 {
            let content = content(number * 4);
            let digest = Digest::of(&content);
            let way = usize::try_from(number % 3).unwrap();
            let result = match way {
                0 => store.add_verified(&digest, &content),
                1 => {
                    let mut writer = store.object_writer().unwrap();
                    match writer.write_all(&content) {
                        Ok(()) => writer.finish(Some(&digest)).map(drop),
                        Err(error) => {
                            assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "{kind}");
                            assert!(writer.finish(Some(&digest)).is_err());
                            full[way] = true;
                            Ok(())
                        }
                    }
                }
                _ => {
                    let chunks = chunks(&content);
                    let fill = || {
                        let partial = store.partial(&digest, content.len() as u64, &chunks)?;
                        for (index, chunk) in chunks.iter().enumerate() {
                            partial.write(index, part(&content, chunk))?;
                        }
                        partial.complete()
                    };
                    fill()
                }
            };
            match result {
                Ok(()) => {}
                Err(error) => {
                    assert!(
                        error.is_no_space() && error.to_string().contains("full"),
                        "{kind}: {error}"
                    );
                    full[way] = true;
                }
            }
            if full == [true; 3] {
                break;
            }
        }
        assert_eq!(full, [true; 3], "{kind}: the disk never filled");
        store.settle().unwrap();
        let kept = objects(&store);
        assert!(!kept.is_empty());
        for digest in &kept {
            assert_eq!(store.verify_object(digest).unwrap(), Verdict::Intact, "{kind}");
        }
        // Room again: everything works as before.
        for digest in &kept {
            store.remove_object(digest).unwrap();
        }
        store.add_verified(&Digest::of(b"after"), b"after").unwrap();
        assert!(matches!(
            store.partial(&Digest::of(b"x"), 1, &[]),
            Err(Error::ChunkList { .. })
        ));
        store.checkpoint().unwrap();
    }
}
