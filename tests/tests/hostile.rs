//! Registries and images that lie: a clear error or a correct mount, never a panic, a wrong byte or a way out of the tree.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use std::fs;
use std::path::Path;

use peel_image::Digest;
use peel_testkit::registry::{Action, Rule};
use peel_tests::image::{Layer, Tar, entry, noise, push, zstd_chunked};
use peel_tests::world::{World, errors, read};
use peel_writer::Dialect;
use serde_json::{Value, json};

/// EIO.
const EIO: i32 = 5;

/// Three files, each of several chunks.
fn files() -> Vec<(&'static str, Vec<u8>)> {
    [("a", 1), ("b", 2), ("c", 3)]
        .map(|(name, seed)| (name, noise(seed, 300_000)))
        .to_vec()
}

fn tar() -> Vec<u8> {
    let tar = files()
        .iter()
        .fold(Tar::new().dir("data/"), |tar, (name, bytes)| {
            tar.file(&format!("data/{name}"), bytes)
        });
    tar.finish()
}

fn layer() -> Layer {
    Layer::estargz(&tar(), 100_000, &[])
}

#[test]
fn a_chunk_altered_in_the_registry_is_an_error_of_that_file_alone() {
    let world = World::new();
    let registry = world.registry();
    let layer = layer();
    let name = push(&registry, "app", "x", std::slice::from_ref(&layer));
    let place = layer.place_of("data/b");
    let middle = (place.start + place.end) / 2;
    registry.faults().add(Rule::get(
        layer.digest().to_string(),
        Action::Corrupt(middle..middle + 1),
    ));
    let dir = world.mount(&name, "root");
    assert_eq!(read(&dir.join("data/b")).err(), Some(EIO));
    for (name, bytes) in files().iter().filter(|(name, _)| *name != "b") {
        assert!(read(&dir.join("data").join(name)).as_ref() == Ok(bytes), "{name}");
    }
    let log = world.log();
    let line = log.lines().find(|line| line.contains("data/b"));
    let line = line.unwrap_or_else(|| panic!("no log line names the file:\n{log}"));
    assert!(
        line.contains(&layer.digest().hex()),
        "the line does not name the layer: {line}"
    );
    let chunks: Vec<String> = files()[1]
        .1
        .chunks(100_000)
        .map(|chunk| Digest::of(chunk).hex())
        .collect();
    assert!(
        chunks.iter().any(|chunk| line.contains(chunk)),
        "the line does not name the chunk's digest: {line}"
    );
    // A registry that tells the truth again is believed again.
    registry.faults().clear();
    assert!(read(&dir.join("data/b")).unwrap() == files()[1].1);
    world.umount(&dir);
    world.assert_sound();
}

#[test]
fn a_truncated_blob_is_an_error_and_nothing_else() {
    for (what, action) in [
        ("ends early", Action::Shorten(200_000)),
        ("breaks off", Action::Truncate(1000)),
    ] {
        let world = World::new().with_read_deadline(3);
        let registry = world.registry();
        let layer = layer();
        let name = push(&registry, "app", "x", std::slice::from_ref(&layer));
        registry
            .faults()
            .add(Rule::get(layer.digest().to_string(), action));
        let dir = world.dir("root");
        let output = world.run(&["mount", &name, dir.to_str().unwrap()]);
        if output.status.success() {
            let wrong = files()
                .iter()
                .any(|(name, bytes)| read(&dir.join("data").join(name)).is_ok_and(|got| got != *bytes));
            assert!(!wrong, "a blob that {what} gave wrong bytes");
            world.umount(&dir);
        } else {
            let message = errors(&output);
            assert!(
                message.contains(&layer.digest().hex()),
                "a blob that {what}: {message}"
            );
        }
        world.assert_sound();
    }
}

/// A change to a table of contents.
type Lie = fn(&mut Vec<Value>);

/// Mounts images whose tables of contents lie, reads everything, and requires that every read either fails or
/// gives bytes that some file really has.
fn assert_harmless(what: &str, lie: Lie) {
    assert_one_harmless(&format!("eStargz, {what}"), layer(), layer().with_contents(lie));
    for (format, dialect) in [("Podman's", Dialect::Podman), ("stargz's", Dialect::Stargz)] {
        let honest = Layer::written(&tar(), zstd_chunked(dialect)).unwrap();
        let lying = honest.clone().with_zstd_contents(lie);
        assert_one_harmless(&format!("{format} zstd:chunked, {what}"), honest, lying);
    }
}

fn assert_one_harmless(what: &str, honest: Layer, lying: Layer) {
    let world = World::new().with_read_deadline(5);
    let registry = world.registry();
    let honest = push(&registry, "app", "honest", &[honest]);
    let name = push(&registry, "app", "lying", &[lying]);
    let dir = world.dir("lying");
    let output = world.run(&["mount", &name, dir.to_str().unwrap()]);
    if output.status.success() {
        for (name, bytes) in files() {
            match read(&dir.join("data").join(name)) {
                Ok(got) => {
                    // A table that gives one file another's digest has named that other file; nothing else is right.
                    let genuine = files().into_iter().any(|(_, other)| other == got);
                    assert!(got == bytes || genuine, "{what}: {name} has wrong bytes");
                }
                Err(errno) => assert!(
                    [EIO, libc_enoent()].contains(&errno),
                    "{what}: {name}: errno {errno}"
                ),
            }
        }
        let outside = walk(&dir)
            .into_iter()
            .find(|path| path.components().any(|part| part.as_os_str() == ".."));
        assert_eq!(outside, None, "{what}");
        world.umount(&dir);
    } else {
        let message = errors(&output);
        assert!(
            message.contains("sha256:") || message.contains("data/"),
            "{what}: the error names nothing: {message}"
        );
    }
    // Whatever the liar did, it must not have spoilt the store for others.
    let dir = world.mount(&honest, "honest");
    for (name, bytes) in files() {
        assert!(
            read(&dir.join("data").join(name)).unwrap() == bytes,
            "{what}: poisoned {name}"
        );
    }
    world.umount(&dir);
    world.assert_sound();
}

/// ENOENT: a lying entry may be left out of the tree.
fn libc_enoent() -> i32 {
    rustix::io::Errno::NOENT.raw_os_error()
}

fn walk(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        found.push(entry.path());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(walk(&entry.path()));
        }
    }
    found
}

#[test]
fn a_table_of_contents_that_lies_about_sizes() {
    assert_harmless("a larger file", |entries| {
        entry(entries, "data/a")["size"] = json!(400_000);
    });
    assert_harmless("a smaller file", |entries| {
        entry(entries, "data/a")["size"] = json!(100);
    });
    assert_harmless("an absurd file", |entries| {
        entry(entries, "data/a")["size"] = json!(1_u64 << 62);
    });
    assert_harmless("a negative file", |entries| {
        entry(entries, "data/a")["size"] = json!(-1);
    });
    assert_harmless("an absurd chunk", |entries| {
        entry(entries, "data/b")["chunkSize"] = json!(1_u64 << 50);
    });
}

#[test]
fn a_table_of_contents_that_lies_about_places() {
    assert_harmless("an offset beyond the blob", |entries| {
        entry(entries, "data/a")["offset"] = json!(1_u64 << 40);
    });
    assert_harmless("a negative offset", |entries| {
        entry(entries, "data/a")["offset"] = json!(-5);
    });
    assert_harmless("another file's offset", |entries| {
        let other = entry(entries, "data/c")["offset"].clone();
        entry(entries, "data/a")["offset"] = other;
    });
    assert_harmless("chunks that overlap", |entries| {
        for entry in entries.iter_mut().filter(|entry| entry["type"] == "chunk") {
            entry["chunkOffset"] = json!(1);
        }
    });
}

#[test]
fn a_table_of_contents_that_lies_about_digests() {
    assert_harmless("another file's digest", |entries| {
        let other = entry(entries, "data/b")["digest"].clone();
        entry(entries, "data/a")["digest"] = other;
    });
    assert_harmless("a digest of nothing", |entries| {
        entry(entries, "data/a")["digest"] = json!(Digest::of(b"other").to_string());
    });
    assert_harmless("no digests at all", |entries| {
        for entry in entries.iter_mut().filter_map(Value::as_object_mut) {
            entry.remove("digest");
            entry.remove("chunkDigest");
        }
    });
    assert_harmless("a digest that is none", |entries| {
        entry(entries, "data/a")["chunkDigest"] = json!("sha256:../../x");
    });
}

#[test]
fn names_that_lead_out_of_the_tree() {
    assert_harmless("dots", |entries| {
        entry(entries, "data/a")["name"] = json!("../../../../var/tmp/peel-escaped");
    });
    assert_harmless("a root", |entries| {
        entry(entries, "data/a")["name"] = json!("/var/tmp/peel-escaped");
    });
    assert_harmless("a hard link out", |entries| {
        entries.push(json!({"name": "data/l", "type": "hardlink", "linkName": "../../etc/shadow"}));
    });
    assert_harmless("a file below a link", |entries| {
        entries.push(json!({"name": "out", "type": "symlink", "linkName": "/var/tmp"}));
        let mut file = entry(entries, "data/a").clone();
        file["name"] = json!("out/peel-escaped");
        entries.push(file);
    });
    assert!(!Path::new("/var/tmp/peel-escaped").exists());
}

#[test]
fn hard_links_in_a_circle() {
    assert_harmless("a circle of two", |entries| {
        entries.push(json!({"name": "data/x", "type": "hardlink", "linkName": "data/y"}));
        entries.push(json!({"name": "data/y", "type": "hardlink", "linkName": "data/x"}));
    });
    assert_harmless("a link to itself", |entries| {
        entries.push(json!({"name": "data/x", "type": "hardlink", "linkName": "data/x"}));
    });
    assert_harmless("a link to nothing", |entries| {
        entries.push(json!({"name": "data/x", "type": "hardlink", "linkName": "data/nothing"}));
    });
}

#[test]
fn the_same_lies_in_a_plain_layer() {
    let world = World::new();
    let registry = world.registry();
    let cases = [
        ("dots", Tar::new().file("../../../../var/tmp/peel-escaped", b"x")),
        ("a root", Tar::new().file("/var/tmp/peel-escaped", b"x")),
        ("a circle", Tar::new().hard_link("x", "y").hard_link("y", "x")),
        (
            "a file below a link",
            Tar::new()
                .symlink("out", "/var/tmp")
                .file("out/peel-escaped", b"x"),
        ),
    ];
    for (index, (what, tar)) in cases.into_iter().enumerate() {
        let name = push(
            &registry,
            "app",
            &format!("x{index}"),
            &[Layer::plain(&tar.file("ok", b"ok").finish())],
        );
        let dir = world.dir(&format!("root{index}"));
        let output = world.run(&["mount", &name, dir.to_str().unwrap()]);
        if output.status.success() {
            assert_eq!(read(&dir.join("ok")).unwrap(), b"ok", "{what}");
            world.umount(&dir);
        } else {
            assert!(errors(&output).contains("layer"), "{what}: {}", errors(&output));
        }
        assert!(!Path::new("/var/tmp/peel-escaped").exists(), "{what}");
    }
    world.assert_sound();
}
