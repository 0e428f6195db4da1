//! Real mounts of the vector images, served from layouts and from a registry that misbehaves. Needs root, FUSE, EROFS from
//! files and overlayfs with data-only layers (Linux 6.13); fails with the kernel's message where they are missing.
#![expect(
    clippy::unwrap_used,
    reason = "tests and what they share end at the first surprise"
)]

#[path = "serve/forge.rs"]
mod forge;
#[path = "serve/full.rs"]
mod full;
#[path = "serve/kept.rs"]
mod kept;
#[path = "serve/lies.rs"]
mod lies;
#[path = "serve/loads.rs"]
mod loads;
#[path = "serve/refusals.rs"]
mod refusals;
#[path = "serve/registry.rs"]
mod registry;
#[path = "serve/support.rs"]
mod support;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use peel_fs::Options;
use peel_image::Digest;

use forge::{Forge, Forged, noise};
use peel_testkit::vectors;
use registry::Registry;
use support::{Host, eventually, expected, layer, place};

/// A file of several chunks.
const BIG: &str = "usr/lib/big.bin";

fn oci(tag: &str) -> String {
    vectors::image(tag)
}

fn registry() -> Registry {
    Registry::start(&vectors::layout())
}

fn digest_of(path: &std::path::Path) -> Digest {
    Digest::of(&fs::read(path).unwrap())
}

#[test]
fn every_vector_mounts_to_the_expected_listing() {
    let expected = expected();
    for tag in ["org", "esgz", "esgz-opt", "esgz-chunk64k", "esgz-min50k"] {
        let host = Host::new();
        let image = host.load(&oci(tag));
        let lazy = image
            .layers()
            .iter()
            .filter(|layer| layer.not_lazy.is_none())
            .count();
        assert_eq!(
            lazy,
            if tag == "org" { 0 } else { 3 },
            "{tag}: {:?}",
            image.layers()
        );
        let mount = host.mount(&image);
        assert_eq!(mount.listing(), expected, "{tag}: cold");
        assert_eq!(mount.listing(), expected, "{tag}: warm");
        let writable = host.mount_writable(&image);
        assert_eq!(writable.listing(), expected, "{tag}: with a writable layer");
    }
}

#[test]
fn all_vectors_in_one_store_share_their_files() {
    let host = Host::new();
    let mounts: Vec<_> = ["esgz", "esgz-opt", "esgz-chunk64k", "org"]
        .into_iter()
        .map(|tag| host.open(&oci(tag)))
        .collect();
    for mount in &mounts {
        assert_eq!(mount.listing(), expected());
    }
    let digest = digest_of(&mounts[0].path(BIG));
    let object = fs::metadata(host.object(&digest)).unwrap();
    assert_eq!((object.nlink(), object.len()), (1, 5_518_890), "one file on disk");
}

#[test]
fn a_second_image_fetches_nothing_that_is_here() {
    let registry = registry();
    let host = Host::new();
    let first = host.open(&registry.image("esgz"));
    let content = fs::read(first.path(BIG)).unwrap();
    let second = host.open(&registry.image("esgz-opt"));
    let before = registry.blob_requests();
    assert_eq!(fs::read(second.path(BIG)).unwrap(), content);
    assert_eq!(registry.blob_requests(), before, "the bytes are here already");
}

#[test]
fn a_damaged_chunk_fails_its_file_alone_until_it_is_repaired() {
    let registry = registry();
    let (blob, index) = layer("esgz", 0);
    let big = place(&index, BIG);
    assert!(big.chunks.len() > 1, "{BIG} has several chunks");
    let middle = (big.chunks[1].start + big.chunks[1].end) / 2;
    registry
        .behaviour
        .damage
        .lock()
        .unwrap()
        .insert(blob, vec![middle]);
    let host = Host::new();
    let mount = host.open(&registry.image("esgz"));
    let error = fs::read(mount.path(BIG)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc_eio()), "{error}");
    let mut start = vec![0; 1000];
    File::open(mount.path(BIG))
        .unwrap()
        .read_exact_at(&mut start, 0)
        .unwrap();
    assert_eq!(fs::read(mount.path("etc/os-release")).unwrap().len(), 24);
    registry.behaviour.damage.lock().unwrap().clear();
    assert_eq!(digest_of(&mount.path(BIG)), big.digest, "after the repair");
}

fn libc_eio() -> i32 {
    rustix::io::Errno::IO.raw_os_error()
}

#[test]
fn many_readers_of_a_missing_chunk_make_one_request() {
    let registry = registry();
    let host = Host::new();
    let mount = host.open(&registry.image("esgz"));
    let before = registry.blob_requests();
    registry.behaviour.delay.store(200, Ordering::SeqCst);
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| assert_eq!(fs::read(mount.path("etc/os-release")).unwrap().len(), 24));
        }
    });
    assert_eq!(registry.blob_requests() - before, 1);
}

#[test]
fn random_reads_from_many_threads_see_the_right_bytes() {
    let registry = registry();
    registry.behaviour.delay.store(5, Ordering::SeqCst);
    let reference = {
        let host = Host::new();
        fs::read(host.open(&oci("org")).path(BIG)).unwrap()
    };
    let host = Host::new();
    let mount = host.open(&registry.image("esgz-chunk64k"));
    thread::scope(|scope| {
        for seed in 0..8_usize {
            let (mount, reference) = (&mount, &reference);
            scope.spawn(move || {
                let file = File::open(mount.path(BIG)).unwrap();
                let mut state = seed * 7919 + 1;
                for _ in 0..200 {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    let offset = (state >> 16) % reference.len();
                    let length = ((state >> 40) % 100_000).min(reference.len() - offset);
                    let mut bytes = vec![0; length];
                    file.read_exact_at(&mut bytes, offset as u64).unwrap();
                    assert!(
                        bytes == reference[offset..offset + length],
                        "at {offset}+{length}"
                    );
                }
            });
        }
    });
    eventually("the file becomes an object", || {
        fs::read(mount.path(BIG)).unwrap();
        host.object(&Digest::of(&reference)).exists()
    });
}

#[test]
fn an_outage_delays_reads_and_an_endless_one_fails_them() {
    let registry = registry();
    let host = Host::with(Options {
        read_deadline: Duration::from_secs(3),
        ..Options::default()
    });
    let mount = host.open(&registry.image("esgz"));
    registry.behaviour.down.store(true, Ordering::SeqCst);
    let error = fs::read(mount.path("etc/os-release")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc_eio()), "{error}");
    thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(mount.path("etc/passwd")));
        thread::sleep(Duration::from_millis(500));
        registry.behaviour.down.store(false, Ordering::SeqCst);
        assert_eq!(reader.join().unwrap().unwrap().len(), 26);
    });
    assert_eq!(
        fs::read(mount.path("etc/os-release")).unwrap().len(),
        24,
        "the failure is not remembered"
    );
}

#[test]
fn a_read_that_failed_leaves_no_file_open() {
    let registry = registry();
    let host = Host::with(Options {
        read_deadline: Duration::from_millis(500),
        ..Options::default()
    });
    let mount = host.open(&registry.image("esgz"));
    // Longer than reads wait: the request goes on for a while when nobody waits for it any more.
    registry.behaviour.delay.store(1500, Ordering::SeqCst);
    registry.behaviour.down.store(true, Ordering::SeqCst);
    fs::read(mount.path(BIG)).unwrap_err();
    let partial = host.store.join("partial");
    eventually("no descriptor of a partial object is left", || {
        let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
        let mut open = open.filter_map(|fd| fs::read_link(fd.path()).ok());
        !open.any(|path| path.starts_with(&partial))
    });
}

#[test]
fn reads_that_wait_hold_nobody_up() {
    let mut files: Vec<(String, Vec<u8>)> = (0..64)
        .map(|number| (format!("small{number}"), noise(number, 20_000)))
        .collect();
    files.push(("zzz".to_owned(), noise(99, 1 << 20)));
    let entries: Vec<(&str, &[u8])> = files
        .iter()
        .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
        .collect();
    let mut forge = Forge::new();
    forge.image(
        "image",
        &Forged {
            files: &entries,
            chunk_size: 64 << 10,
            ..Forged::default()
        },
    );
    let registry = Registry::start(forge.path());
    let host = Host::with(Options {
        read_deadline: Duration::from_secs(20),
        ..Options::default()
    });
    let mount = host.open(&registry.image("image"));
    let mut here = [0; 4096];
    File::open(mount.path("zzz"))
        .unwrap()
        .read_exact_at(&mut here, 0)
        .unwrap();
    registry.behaviour.down.store(true, Ordering::SeqCst);
    let answered = std::sync::atomic::AtomicUsize::new(0);
    thread::scope(|scope| {
        for number in 0..64 {
            let (mount, answered) = (&mount, &answered);
            scope.spawn(move || {
                let bytes = fs::read(mount.path(&format!("small{number}"))).unwrap();
                answered.fetch_add(1, Ordering::SeqCst);
                assert!(!bytes.is_empty());
            });
        }
        thread::sleep(Duration::from_millis(300));
        let file = File::open(mount.path("zzz")).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let mut again = [0; 4096];
        file.read_exact_at(&mut again, 0).unwrap();
        assert!(here == again);
        let waiting = 64 - answered.load(Ordering::SeqCst);
        registry.behaviour.down.store(false, Ordering::SeqCst);
        assert_eq!(waiting, 64, "all of them were waiting meanwhile");
    });
}

#[test]
fn a_registry_that_hangs_holds_up_its_own_images_only() {
    // Each larger than a first window; in whatever order they are read, no request takes more than three of them.
    let files: Vec<(String, Vec<u8>)> = (0..48)
        .map(|number| (format!("large{number}"), noise(number, 1200 << 10)))
        .collect();
    let entries: Vec<(&str, &[u8])> = files
        .iter()
        .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
        .collect();
    let mut forge = Forge::new();
    forge.image(
        "image",
        &Forged {
            files: &entries,
            chunk_size: 2 << 20,
            ..Forged::default()
        },
    );
    let (hanging, healthy) = (Registry::start(forge.path()), registry());
    // Requests hang for longer than reads may: a read without a slot fails.
    let host = Host::with(Options {
        read_deadline: Duration::from_secs(15),
        ..Options::default()
    });
    let mut request = host.request(&hanging.image("image"));
    request.client.attempt_timeout = Duration::from_secs(600);
    let mount = host.mount(&host.service.load(&request, &|_| {}).unwrap());
    let other = host.open(&healthy.image("esgz"));
    let before = hanging.behaviour.requests.load(Ordering::SeqCst);
    hanging.behaviour.delay.store(600_000, Ordering::SeqCst);
    let answered = std::sync::atomic::AtomicUsize::new(0);
    thread::scope(|scope| {
        for (name, _) in files.iter().rev() {
            let (mount, answered) = (&mount, &answered);
            scope.spawn(move || {
                let result = fs::read(mount.path(name));
                answered.fetch_add(1, Ordering::SeqCst);
                assert_eq!(result.unwrap_err().raw_os_error(), Some(libc_eio()), "{name}");
            });
        }
        eventually("as many requests as there may be", || {
            hanging.behaviour.requests.load(Ordering::SeqCst) >= before + 16
        });
        assert_eq!(fs::read(other.path("etc/os-release")).unwrap().len(), 24);
        assert_eq!(
            answered.load(Ordering::SeqCst),
            0,
            "all of them were waiting meanwhile"
        );
    });
}

#[test]
fn a_file_that_was_open_when_it_completed_needs_no_daemon() {
    let registry = registry();
    let host = Host::new();
    let image = host.load(&registry.image("esgz"));
    let mut mount = host.mount(&image);
    drop(image);
    let mut open = File::open(mount.path(BIG)).unwrap();
    let mut bytes = Vec::new();
    open.read_to_end(&mut bytes).unwrap();
    let digest = Digest::of(&bytes);
    eventually("the file becomes an object", || host.object(&digest).exists());
    // By now the overlay was made to forget, but for what is open.
    thread::sleep(Duration::from_secs(1));
    drop(open);
    thread::sleep(Duration::from_secs(1));
    mount.forget();
    host.service.clone().stop();
    assert_eq!(digest_of(&mount.path(BIG)), digest, "read without the daemon");
}

#[test]
fn a_completed_file_needs_no_daemon() {
    let registry = registry();
    let host = Host::new();
    let image = host.load(&registry.image("esgz"));
    let mut mount = host.mount(&image);
    drop(image);
    let mut byte = [0];
    File::open(mount.path(BIG))
        .unwrap()
        .read_exact(&mut byte)
        .unwrap();
    let digest = digest_of(&mount.path(BIG));
    eventually("the file becomes an object", || host.object(&digest).exists());
    // The overlay is made to forget after a pause.
    thread::sleep(Duration::from_secs(1));
    mount.forget();
    host.service.clone().stop();
    assert_eq!(digest_of(&mount.path(BIG)), digest, "read without the daemon");
    let error = fs::read(mount.path("usr/lib/mod299.py"));
    assert!(
        error.is_err() || host.object(&Digest::of(&error.unwrap())).exists(),
        "what is missing is an error, never other bytes"
    );
}

#[test]
fn an_object_that_lost_its_image_is_brought_by_the_next_one() {
    let registry = registry();
    let host = Host::new();
    let name = registry.image("esgz");
    {
        let mount = host.open(&name);
        // Looked up and opened, so its inode is known, but nothing is fetched.
        drop(File::open(mount.path("etc/os-release")).unwrap());
    }
    let keeps = host.store.join("records/names");
    eventually("the name is kept", || {
        fs::read_dir(&keeps).unwrap().next().is_some()
    });
    let mount = host.open(&name);
    assert_eq!(fs::read(mount.path("etc/os-release")).unwrap().len(), 24);
}

#[test]
fn prefetch_brings_the_prioritized_files_unasked() {
    let registry = registry();
    let host = Host::new();
    let mut request = host.request(&registry.image("esgz-opt"));
    request.prefetch = true;
    let image = host.service.load(&request, &|_| {}).unwrap();
    let (_, index) = layer("esgz-opt", 0);
    assert!(index.prefetch_end.is_some(), "the layer has a landmark");
    for path in ["usr/lib/mod007.py", "bin/sh", "etc/os-release", BIG] {
        let file = place(&index, path);
        eventually(path, || host.object(&file.digest).exists());
    }
    let before = registry.blob_requests();
    let mount = host.mount(&image);
    assert_eq!(
        fs::metadata(mount.path(BIG)).unwrap().len(),
        place(&index, BIG).size
    );
    fs::read(mount.path(BIG)).unwrap();
    assert_eq!(registry.blob_requests(), before);
}

/// Nanoseconds on a processor of all threads of this process with that name.
fn busy(name: &str) -> u64 {
    let threads = fs::read_dir("/proc/self/task").unwrap().flatten();
    let named = threads.map(|thread| thread.path()).filter(|thread| {
        // A thread may end while it is looked at.
        fs::read_to_string(thread.join("comm")).is_ok_and(|found| found.trim() == name)
    });
    let busy = named.filter_map(|thread| {
        let text = fs::read_to_string(thread.join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    busy.sum()
}

#[test]
fn large_files_are_hashed_where_no_read_waits_for_a_chunk() {
    let large = noise(7, 24 << 20);
    let mut forge = Forge::new();
    forge.image(
        "image",
        &Forged {
            files: &[("large", &large)],
            chunk_size: 4 << 20,
            prioritized: &["large"],
            ..Forged::default()
        },
    );
    let host = Host::new();
    let mut request = host.request(&format!("oci:{}:image", forge.path().display()));
    request.prefetch = true;
    let before = busy("peel-complete");
    let image = host.service.load(&request, &|_| {}).unwrap();
    let digest = Digest::of(&large);
    eventually("the file becomes an object", || host.object(&digest).exists());
    // No processor hashes 24 MiB in less than a millisecond.
    assert!(busy("peel-complete") > before + 1_000_000);
    assert_eq!(digest_of(&host.mount(&image).path("large")), digest);
}

#[test]
fn images_that_disagree_about_chunks_see_the_same_bytes() {
    let registry = registry();
    let host = Host::new();
    let coarse = host.open(&registry.image("esgz"));
    let mut start = vec![0; 4096];
    File::open(coarse.path(BIG))
        .unwrap()
        .read_exact_at(&mut start, 0)
        .unwrap();
    let fine = host.open(&registry.image("esgz-chunk64k"));
    let mut again = vec![0; 4096];
    File::open(fine.path(BIG))
        .unwrap()
        .read_exact_at(&mut again, 0)
        .unwrap();
    assert!(start == again);
    let (_, index) = layer("esgz", 0);
    let digest = place(&index, BIG).digest;
    eventually("it is served only once the whole was checked, and kept", || {
        host.object(&digest).exists()
    });
    assert_eq!(digest_of(&fine.path(BIG)), digest);
}

#[test]
fn an_image_that_disagrees_is_not_held_up_and_helps_reads_that_wait() {
    let (away, near) = (registry(), registry());
    let host = Host::with(Options {
        read_deadline: Duration::from_secs(4),
        ..Options::default()
    });
    let coarse = host.open(&away.image("esgz"));
    away.behaviour.down.store(true, Ordering::SeqCst);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut start = [0; 4096];
            File::open(coarse.path(BIG))?.read_exact_at(&mut start, 0)
        });
        thread::sleep(Duration::from_millis(500));
        // The kernel holds the page that the reader waits for; dropping what it has cached of the file waits for that.
        let fine = host.open(&near.image("esgz-chunk64k"));
        // What the first image's registry does not give comes by the chunks of the second one.
        reader.join().unwrap().unwrap();
        away.behaviour.down.store(false, Ordering::SeqCst);
        let (_, index) = layer("esgz", 0);
        assert_eq!(digest_of(&fine.path(BIG)), place(&index, BIG).digest);
    });
}

#[test]
fn an_image_is_not_bound_to_the_chunks_of_one_that_is_gone() {
    let registry = registry();
    let host = Host::with(Options {
        read_deadline: Duration::from_secs(3),
        ..Options::default()
    });
    {
        let coarse = host.open(&registry.image("esgz"));
        registry.behaviour.down.store(true, Ordering::SeqCst);
        fs::read(coarse.path(BIG)).unwrap_err();
        registry.behaviour.down.store(false, Ordering::SeqCst);
    }
    let fine = host.open(&registry.image("esgz-chunk64k"));
    let (_, index) = layer("esgz", 0);
    assert_eq!(digest_of(&fine.path(BIG)), place(&index, BIG).digest);
}

#[test]
fn a_writable_mount_copies_up_and_leaves_the_image_alone() {
    let host = Host::new();
    let image = host.load(&oci("esgz"));
    let (first, second) = (host.mount_writable(&image), host.mount_writable(&image));
    let before = fs::read(first.path("etc/passwd")).unwrap();
    let mut changed = before.clone();
    changed.extend_from_slice(b"more\n");
    fs::write(first.path("etc/passwd"), &changed).unwrap();
    std::os::unix::fs::chown(first.path(BIG), Some(5), Some(6)).unwrap();
    fs::remove_file(first.path("etc/os-release")).unwrap();
    fs::rename(first.path("home"), first.path("house")).unwrap();
    assert_eq!(fs::read(first.path("etc/passwd")).unwrap(), changed);
    assert_eq!(fs::metadata(first.path(BIG)).unwrap().uid(), 5);
    assert_eq!(digest_of(&first.path(BIG)), digest_of(&second.path(BIG)));
    assert_eq!(fs::read(second.path("etc/passwd")).unwrap(), before);
    assert_eq!(second.listing(), expected());
    let (root, plain) = (first.path(""), host.mount(&image));
    assert_eq!(
        fs::metadata(root).unwrap().permissions().mode(),
        fs::metadata(plain.path("")).unwrap().permissions().mode(),
        "the root directory looks as in the image"
    );
}

#[test]
fn hints_start_the_prefetch_before_the_toc_is_here() {
    let files: Vec<(String, Vec<u8>)> = (0..200)
        .map(|number| {
            (
                format!("f{number:03}"),
                noise(number, 20_000 + 97 * usize::try_from(number).unwrap()),
            )
        })
        .collect();
    let entries: Vec<(&str, &[u8])> = files
        .iter()
        .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
        .collect();
    let prioritized: Vec<&str> = entries
        .iter()
        .map(|(name, _)| *name)
        .filter(|name| *name < "f190")
        .collect();
    let mut forge = Forge::new();
    forge.image(
        "image",
        &Forged {
            files: &entries,
            prioritized: &prioritized,
            hints: true,
            ..Forged::default()
        },
    );
    let registry = Registry::start(forge.path());
    let host = Host::new();
    let mut request = host.request(&registry.image("image"));
    request.prefetch = true;
    let image = host.service.load(&request, &|_| {}).unwrap();
    for name in &prioritized {
        let (_, bytes) = files.iter().find(|(known, _)| known == name).unwrap();
        eventually(name, || host.object(&Digest::of(bytes)).exists());
    }
    let wire: u64 = host.service.stats().bytes;
    let whole: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    assert!(
        wire < whole as u64,
        "{wire} bytes came for {whole}, nothing twice"
    );
    let before = registry.blob_requests();
    let mount = host.mount(&image);
    for (name, bytes) in &files {
        assert!(fs::read(mount.path(name)).unwrap() == *bytes, "{name}");
    }
    assert!(registry.blob_requests() > before, "the rest was not prefetched");
}
