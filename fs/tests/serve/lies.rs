//! Images whose TOCs claim files of other images, with other lengths and other chunks: the harm stays with the liar.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use peel_fs::Options;
use peel_image::Digest;

use crate::digest_of;
use crate::forge::{Forge, Forged, noise};
use crate::registry::Registry;
use crate::support::{Host, eventually};

/// Length of the honest file.
const LENGTH: usize = 1 << 20;
const CHUNK: u64 = 64 << 10;

/// What a liar claims to be the honest file: length and chunk size. A file of one chunk is vouched for by its own digest, one of
/// several by its TOC.
const CLAIMS: [(usize, u64); 4] = [
    (LENGTH / 4 + 1, CHUNK),
    (LENGTH * 3, CHUNK),
    (LENGTH / 4 + 1, 4 << 20),
    (LENGTH * 3, 4 << 20),
];

/// A registry with the honest file as `good`, and what claims to be it as `evil`.
fn registry(length: usize, chunk_size: u64) -> (Registry, Vec<u8>, Forge) {
    let (good, evil) = (noise(1, LENGTH), noise(2, length));
    let mut forge = Forge::new();
    let (good_files, evil_files) = ([("file", good.as_slice())], [("file", evil.as_slice())]);
    forge.image(
        "good",
        &Forged {
            files: &good_files,
            chunk_size: CHUNK,
            ..Forged::default()
        },
    );
    forge.image(
        "evil",
        &Forged {
            files: &evil_files,
            chunk_size,
            lies: &[("file", Digest::of(&good))],
            ..Forged::default()
        },
    );
    (Registry::start(forge.path()), good, forge)
}

/// The digest of a file that is read through a mapping: beyond the length that the kernel knows, that is a SIGBUS.
fn mapped(path: &Path) -> String {
    const PROGRAM: &str = "import hashlib, mmap, sys\n\
        with open(sys.argv[1], 'rb') as file:\n\
        \x20   print(hashlib.sha256(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)).hexdigest())";
    let output = Command::new("python3")
        .args(["-c", PROGRAM])
        .arg(path)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn first_bytes(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4096];
    File::open(path)?.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[test]
fn a_false_length_does_not_cut_another_image_s_file() {
    for (length, chunk_size) in CLAIMS {
        for (touched, mapping) in [(false, true), (true, true), (true, false)] {
            let what = format!("{length} bytes in chunks of {chunk_size}, touched: {touched}");
            let (registry, good, _forge) = registry(length, chunk_size);
            let host = Host::with(Options {
                read_deadline: Duration::from_secs(10),
                ..Options::default()
            });
            let liar = host.open(&registry.image("evil"));
            if touched {
                // The kernel learns the length that the liar says. Its bytes are answered until all of them are found false.
                drop(first_bytes(&liar.path("file")));
            }
            let honest = host.open(&registry.image("good"));
            if mapping {
                assert_eq!(mapped(&honest.path("file")), Digest::of(&good).hex(), "{what}");
            }
            assert!(fs::read(honest.path("file")).unwrap() == good, "{what}");
        }
    }
}

#[test]
fn a_false_length_that_comes_later_changes_nothing() {
    for (length, chunk_size) in CLAIMS {
        let what = format!("{length} bytes in chunks of {chunk_size}");
        let (registry, good, _forge) = registry(length, chunk_size);
        let host = Host::with(Options {
            read_deadline: Duration::from_secs(10),
            ..Options::default()
        });
        let honest = host.open(&registry.image("good"));
        let open = File::open(honest.path("file")).unwrap();
        assert!(
            first_bytes(&honest.path("file")).unwrap() == good[..4096],
            "{what}"
        );
        let liar = host.open(&registry.image("evil"));
        let mut rest = vec![0; LENGTH - 4096];
        open.read_exact_at(&mut rest, 4096).unwrap();
        assert!(rest == good[4096..], "{what}: in a file that was open");
        assert_eq!(mapped(&honest.path("file")), Digest::of(&good).hex(), "{what}");
        drop(liar);
    }
}

#[test]
fn a_liar_whose_bytes_never_come_does_not_hold_the_honest_image_up() {
    for (length, chunk_size) in CLAIMS {
        let what = format!("{length} bytes in chunks of {chunk_size}");
        let (away, _, _forge) = registry(length, chunk_size);
        let (near, good, _near) = registry(length, chunk_size);
        let host = Host::with(Options {
            read_deadline: Duration::from_secs(20),
            ..Options::default()
        });
        let liar = host.open(&away.image("evil"));
        drop(first_bytes(&liar.path("file")));
        away.behaviour.down.store(true, Ordering::SeqCst);
        let honest = host.open(&near.image("good"));
        assert!(fs::read(honest.path("file")).unwrap() == good, "{what}");
        drop(liar);
    }
}

/// An image that claims, in its TOC, to hold the content of another image's file.
#[test]
fn a_lying_toc_cannot_give_its_bytes_to_another_image() {
    let (good, evil) = (noise(1, 1 << 20), noise(2, 1 << 20));
    let digest = Digest::of(&good);
    let mut forge = Forge::new();
    let (good_files, evil_files) = ([("file", good.as_slice())], [("file", evil.as_slice())]);
    let chunk_size = 64 << 10;
    forge.image(
        "good",
        &Forged {
            files: &good_files,
            chunk_size,
            ..Forged::default()
        },
    );
    forge.image(
        "evil",
        &Forged {
            files: &evil_files,
            chunk_size,
            lies: &[("file", digest)],
            ..Forged::default()
        },
    );
    let registry = Registry::start(forge.path());
    for evil_is_read_whole in [false, true] {
        let host = Host::new();
        let liar = host.open(&registry.image("evil"));
        let mut bytes = vec![0; 4096];
        File::open(liar.path("file"))
            .unwrap()
            .read_exact_at(&mut bytes, 0)
            .unwrap();
        assert!(bytes == evil[..4096], "its own TOC vouches for these bytes");
        if evil_is_read_whole {
            // The hash of the whole tells; whether that reader still gets its bytes does not matter.
            drop(fs::read(liar.path("file")));
        }
        let honest = host.open(&registry.image("good"));
        assert!(fs::read(honest.path("file")).unwrap() == good);
        eventually("the disk has it", || host.object(&digest).exists());
        assert_eq!(digest_of(&host.object(&digest)), digest);
        drop(liar);
        let again = host.open(&registry.image("evil"));
        assert!(
            fs::read(again.path("file")).unwrap() == good,
            "now it is what it claims to be"
        );
    }
}

#[test]
fn a_file_whose_toc_lies_about_it_becomes_an_error() {
    let (good, evil) = (noise(3, 1 << 20), noise(4, 1 << 20));
    let files = [("file", evil.as_slice()), ("other", b"other".as_slice())];
    let mut forge = Forge::new();
    forge.image(
        "evil",
        &Forged {
            files: &files,
            chunk_size: 64 << 10,
            lies: &[("file", Digest::of(&good))],
            ..Forged::default()
        },
    );
    let host = Host::new();
    let mount = host.open(&format!("oci:{}:evil", forge.path().display()));
    drop(fs::read(mount.path("file")));
    eventually("the whole hash is checked", || {
        let file = File::open(mount.path("file")).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        file.read_exact_at(&mut [0; 100], 500_000).is_err()
    });
    assert!(!host.object(&Digest::of(&good)).exists());
    assert_eq!(fs::read(mount.path("other")).unwrap(), b"other");
}

/// An image of these files in two chunks each, and one that claims the same files with other bytes.
fn pair(files: &[(String, Vec<u8>)], seed: u64) -> (Registry, Forge) {
    let mut forge = Forge::new();
    let evil: Vec<Vec<u8>> = (seed..)
        .zip(files)
        .map(|(seed, (_, bytes))| noise(seed, bytes.len()))
        .collect();
    let good: Vec<(&str, &[u8])> = files
        .iter()
        .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
        .collect();
    let claimed: Vec<(&str, &[u8])> = files
        .iter()
        .zip(&evil)
        .map(|((name, _), bytes)| (name.as_str(), bytes.as_slice()))
        .collect();
    let lies: Vec<(&str, Digest)> = good
        .iter()
        .map(|(name, bytes)| (*name, Digest::of(bytes)))
        .collect();
    let chunk_size = 4096;
    forge.image(
        "good",
        &Forged {
            files: &good,
            chunk_size,
            ..Forged::default()
        },
    );
    forge.image(
        "evil",
        &Forged {
            files: &claimed,
            chunk_size,
            lies: &lies,
            ..Forged::default()
        },
    );
    (Registry::start(forge.path()), forge)
}

#[test]
fn however_many_files_were_false_none_is_seen_by_another_image() {
    // More than any queue has places.
    let files: Vec<(String, Vec<u8>)> = (0..1200)
        .map(|number| (format!("f{number:04}"), noise(number, 8192)))
        .collect();
    let (near, _forge) = pair(&files, 10_000);
    let stuck = [("stuck".to_owned(), noise(5000, 8192))];
    let (away, _away) = pair(&stuck, 20_000);
    let host = Host::with(Options {
        read_deadline: Duration::from_secs(15),
        ..Options::default()
    });
    let liar = host.open(&near.image("evil"));
    // This file is found false too, and then waits for its true bytes: for as long the kernel drops no page of it, nor of those
    // behind it.
    let false_one = host.open(&away.image("evil"));
    let image = host.load(&away.image("good"));
    let true_one = host.mount(&image);
    let slow = || away.behaviour.slow.lock().unwrap();
    slow().insert(image.layers()[0].digest.hex());
    thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(false_one.path("stuck")));
        eventually("the true bytes are asked for", || {
            away.behaviour.sending.load(Ordering::SeqCst) > 0
        });
        for (name, _) in &files {
            drop(fs::read(liar.path(name)));
        }
        drop(liar);
        let honest = host.open(&near.image("good"));
        for (name, bytes) in &files {
            assert!(fs::read(honest.path(name)).unwrap() == *bytes, "{name}");
        }
        slow().clear();
        drop(reader.join().unwrap());
    });
    assert!(fs::read(true_one.path("stuck")).unwrap() == stuck[0].1);
}
