//! What only whole layers tell: `--verify full` before a start, and the check in the background afterwards. The liars here have
//! a table of contents that the manifest vouches for, chunks with right digests, and still another tar stream.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use peel_image::Digest;
use peel_testkit::registry::Registry;
use peel_tests::image::{Layer, Tar, entry, noise, push, zstd_chunked};
use peel_tests::world::{TAGS, World, assert_expected, errors, eventually, read, text, vector};
use peel_writer::Dialect;
use serde_json::{Value, json};

fn tar() -> Vec<u8> {
    let tar = Tar::new()
        .dir("data/")
        .file("data/a", &noise(1, 300_000))
        .file("data/b", &noise(2, 3000));
    tar.finish()
}

fn layer() -> Layer {
    Layer::estargz(&tar(), 100_000, &[])
}

/// A layer whose table of contents makes a program set-user-id that its tar stream does not.
fn two_faced() -> Layer {
    layer().with_contents(|entries| entry(entries, "data/a")["mode"] = json!(0o4755))
}

/// The same files in a dialect of zstd:chunked.
fn zstd(dialect: Dialect) -> Layer {
    Layer::written(&tar(), zstd_chunked(dialect)).unwrap()
}

/// Full verification; the message of its failure.
fn refused(world: &World, name: &str, arguments: &[&str]) -> String {
    let dir = world.dir("refused");
    let output = world.run(&[&["mount"], arguments, &[name, dir.to_str().unwrap()]].concat());
    assert!(!output.status.success(), "{name} {arguments:?} was mounted");
    errors(&output)
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o7777
}

fn read_all(dir: &Path) {
    for name in ["a", "b"] {
        read(&dir.join("data").join(name)).unwrap();
    }
}

/// Copies an image from the registry into a layout.
fn layout(world: &World, registry: &Registry, tag: &str) -> String {
    let target = format!("oci:{}:{tag}", world.path("layout").display());
    let output = Command::new("skopeo")
        .args(["copy", "--quiet", "--src-tls-verify=false"])
        .arg(format!("docker://{}/app:{tag}", registry.addr()))
        .arg(&target)
        .output()
        .unwrap_or_else(|error| panic!("these tests need skopeo: {error}"));
    assert!(output.status.success(), "skopeo: {}", errors(&output));
    target
}

#[test]
fn a_table_of_contents_that_is_not_the_tar_stream_is_refused_by_full_verification() {
    let world = World::new();
    let registry = world.registry();
    let liar = two_faced();
    let name = push(&registry, "app", "liar", std::slice::from_ref(&liar));
    // Every digest that a lazy start can check is right.
    let dir = world.mount(&name, "lazy");
    assert_eq!(mode(&dir.join("data/a")), 0o4755);
    read_all(&dir);
    world.umount(&dir);
    let message = refused(&world, &name, &["--verify", "full"]);
    let toc = liar.toc.unwrap();
    for part in [liar.digest(), toc, liar.diff_id] {
        assert!(message.contains(&part.to_string()), "no {part} in: {message}");
    }
    assert!(
        message.contains("/data/a") && message.contains("the mode"),
        "{message}"
    );
    // What was found is known from now on, without a download and for lazy starts too.
    let before = registry.log().len();
    let message = refused(&world, &name, &["--verify", "lazy"]);
    assert!(
        message.contains("found wrong before") && message.contains("the mode"),
        "{message}"
    );
    let blob = liar.digest().to_string();
    let log = registry.log().split_off(before);
    assert!(!log.iter().any(|request| request.target.contains(&blob)));
    world.assert_sound();
}

#[test]
fn a_wrong_diff_id_is_refused_by_full_verification() {
    let world = World::new();
    let registry = world.registry();
    let (right, wrong) = (layer(), Digest::of(b"another layer"));
    let name = push(&registry, "app", "liar", &[right.clone().with_diff_id(wrong)]);
    let dir = world.mount(&name, "lazy");
    read_all(&dir);
    world.umount(&dir);
    let message = refused(&world, &name, &["--verify", "full"]);
    for part in [right.digest(), right.diff_id, wrong] {
        assert!(message.contains(&part.to_string()), "no {part} in: {message}");
    }
    // The same blob under a configuration that is right is another matter.
    let honest = push(&registry, "app", "honest", &[right]);
    let dir = world.dir("honest");
    world.ok(&["mount", "--verify", "full", &honest, dir.to_str().unwrap()]);
    world.umount(&dir);
    world.assert_sound();
}

#[test]
fn what_was_verified_in_full_is_not_pulled_again() {
    let world = World::new();
    let registry = world.registry();
    let layers = [layer(), Layer::plain(&Tar::new().file("plain", b"x").finish())];
    let name = push(&registry, "app", "x", &layers);
    let full = |pull: &str| {
        let dir = world.dir("full");
        world.ok(&[
            "mount",
            "--verify",
            "full",
            "--pull",
            pull,
            &name,
            dir.to_str().unwrap(),
        ]);
        read_all(&dir);
        assert_eq!(read(&dir.join("plain")).unwrap(), b"x");
        world.umount(&dir);
    };
    // Loaded lazily before, it still has to be verified.
    let dir = world.mount(&name, "lazy");
    world.umount(&dir);
    let message = refused(&world, &name, &["--verify", "full", "--pull", "never"]);
    assert!(message.contains("not verified in full"), "{message}");
    full("missing");
    let blobs = |before: usize| {
        let log = registry.log().split_off(before);
        let blobs = layers.iter().map(|layer| layer.digest().to_string());
        let asked = |blob: String| log.iter().any(|request| request.target.contains(&blob));
        blobs.filter(|blob| asked(blob.clone())).count()
    };
    assert_eq!(blobs(0), 2);
    let before = registry.log().len();
    full("never");
    full("missing");
    assert_eq!(registry.log().len(), before, "a verified image made requests");
    full("always");
    assert_eq!(blobs(before), 0, "a verified layer was pulled again");
    // A file that is lost is noticed.
    let object = world.objects().pop().unwrap();
    fs::remove_file(object).unwrap();
    let message = refused(&world, &name, &["--verify", "full", "--pull", "never"]);
    assert!(message.contains("not verified in full"), "{message}");
    full("missing");
    assert!(blobs(before) > 0);
    world.assert_sound();
}

#[test]
fn every_honest_image_passes_full_verification() {
    let world = World::new();
    for tag in TAGS {
        let dir = world.dir(tag);
        world.ok(&["mount", "--verify", "full", &vector(tag), dir.to_str().unwrap()]);
        assert_expected(&dir, tag);
        world.umount(&dir);
    }
    world.assert_sound();
}

/// Mounts, reads everything, and waits for what the log says about the layer.
fn in_the_background(world: &World, name: &str, arguments: &[&str], expected: &str) -> PathBuf {
    let dir = world.dir("background");
    world.ok(&[&["mount"], arguments, &[name, dir.to_str().unwrap()]].concat());
    read_all(&dir);
    eventually(expected, || world.log().contains(expected));
    dir
}

#[test]
fn a_layer_that_lies_is_found_in_the_background() {
    for download in [false, true] {
        let world = World::new();
        let registry = world.registry();
        let liar = two_faced();
        let mut name = push(&registry, "app", "liar", std::slice::from_ref(&liar));
        let mut arguments: &[&str] = &["--verify", "background"];
        if !download {
            // A layout costs nothing to read again.
            name = layout(&world, &registry, "liar");
            arguments = &[];
        }
        let dir = in_the_background(&world, &name, arguments, "will not be loaded again");
        let log = world.log();
        let line = log
            .lines()
            .find(|line| line.contains("will not be loaded again"))
            .unwrap();
        for part in [
            name.clone(),
            liar.digest().to_string(),
            liar.toc.unwrap().to_string(),
            liar.diff_id.to_string(),
        ] {
            assert!(line.contains(&part), "no {part} in: {line}");
        }
        assert!(line.contains("ERROR"), "{line}");
        // Who has it mounted keeps it: taking it away would be worse.
        read_all(&dir);
        world.umount(&dir);
        let message = refused(&world, &name, &[]);
        assert!(message.contains("found wrong before"), "{message}");
        world.assert_sound();
    }
}

#[test]
fn an_honest_layer_is_found_right_in_the_background_once() {
    let world = World::new();
    let registry = world.registry();
    push(&registry, "app", "x", &[layer()]);
    let name = layout(&world, &registry, "x");
    let right = "a layer that is here in full is right";
    for _ in 0..2 {
        let dir = in_the_background(&world, &name, &[], right);
        world.umount(&dir);
    }
    assert_eq!(world.log().matches(right).count(), 1);
    world.assert_sound();
}

#[test]
fn nothing_is_downloaded_twice_unless_asked_for() {
    let world = World::new();
    let registry = world.registry();
    let layers = [two_faced()];
    let name = push(&registry, "app", "x", &layers);
    let dir = world.mount(&name, "lazy");
    read_all(&dir);
    let bytes = || registry.counters().body_bytes;
    // The background looks every two seconds.
    let before = bytes();
    std::thread::sleep(std::time::Duration::from_secs(5));
    assert_eq!(bytes(), before);
    read_all(&dir);
    world.umount(&dir);
    world.assert_sound();
}

/// Whether `ls` and `doctor` say that the only layer of the image is wrong.
fn is_called_wrong(world: &World, name: &str) -> bool {
    let listing = world.run(&["ls", name, "data"]);
    assert!(listing.status.success(), "{}", errors(&listing));
    assert_eq!(text(&listing), "a\nb\n", "the list itself stays as it is");
    let said = errors(&listing).contains("WRONG: layer 1 of 1");
    let lines = world.json(&["ls", name, "data"]);
    for line in lines.as_array().unwrap() {
        assert_eq!(line.get("check") == Some(&json!("failed")), said, "{line}");
    }
    if world.store().exists() {
        let findings = world.json(&["doctor"]);
        let mut findings = findings.as_array().unwrap().iter();
        let finding = findings
            .find(|finding| finding["what"] == "checks of whole layers")
            .unwrap();
        assert_eq!(finding["state"] == "warning", said, "{finding}");
        let named = finding["detail"]
            .as_str()
            .unwrap()
            .contains(&format!("{name}: layer sha256:"));
        assert_eq!(named && finding["remedy"].is_string(), said, "{finding}");
    }
    said
}

/// What `inspect` says of the check of the only layer: for machines and for people.
fn inspected(world: &World, name: &str) -> (Value, String) {
    let report = world.json(&["inspect", name]);
    let text = world.ok(&["inspect", name]);
    let line = text.lines().find(|line| line.contains("checked:")).unwrap();
    (report["layers"][0]["check"].clone(), line.to_owned())
}

#[test]
fn inspect_ls_and_doctor_tell_what_the_checks_came_to() {
    let right = zstd(Dialect::Podman);
    let liar = right
        .clone()
        .with_zstd_contents(|entries| entry(entries, "data/a")["mode"] = json!(0o4755));
    for (what, layer, arguments, end) in [
        (
            "lazy",
            right.clone(),
            [].as_slice(),
            "a layer that is here in full is right",
        ),
        ("full", right, &["--verify", "full"], ""),
        ("plain", Layer::plain(&tar()), &[], ""),
        ("liar", liar, &[], "will not be loaded again"),
    ] {
        let world = World::new();
        let registry = world.registry();
        let name = push(&registry, "app", what, &[layer]);
        let (check, line) = inspected(&world, &name);
        assert_eq!(check, json!({"state": "not-yet"}), "{what}");
        assert!(line.contains("not as a whole yet"), "{what}: {line}");
        assert!(!is_called_wrong(&world, &name), "{what}");
        assert!(!world.store().exists(), "{what}: inspect made a store");
        let dir = in_the_background(&world, &name, arguments, end);
        let (check, line) = inspected(&world, &name);
        assert_eq!(is_called_wrong(&world, &name), what == "liar", "{what}");
        let when = check["when"].as_str().unwrap();
        assert!(
            when.starts_with("20") && when.ends_with('Z') && line.contains(when),
            "{what}: {line}"
        );
        match what {
            "liar" => {
                assert_eq!(check["state"], "failed");
                assert!(check["fault"].as_str().unwrap().contains("the mode"), "{check}");
                assert!(line.contains("WRONG") && line.contains("the mode"), "{line}");
            }
            _ => {
                assert_eq!(check["state"], "verified", "{what}: {check}");
                // From the tar-split, the blob's own bytes are not read again.
                assert_eq!(check["blob"], json!(what != "lazy"), "{what}: {check}");
                assert!(line.contains("right as a whole"), "{what}: {line}");
            }
        }
        world.umount(&dir);
        world.assert_sound();
    }
}

#[test]
fn podmans_dialect_is_checked_from_its_tar_split() {
    let right = zstd(Dialect::Podman);
    let setuid = right
        .clone()
        .with_zstd_contents(|entries| entry(entries, "data/a")["mode"] = json!(0o4755));
    let hidden = right
        .clone()
        .with_zstd_contents(|entries| entries.retain(|entry| entry["name"] != "data/b"));
    let diff_id = right.clone().with_diff_id(Digest::of(b"another layer"));
    for (what, layer, said) in [
        ("honest", right, None),
        ("set-user-id", setuid, Some("the mode")),
        ("hidden", hidden, Some("does not list this file")),
        ("diff-id", diff_id, Some("the configuration says")),
    ] {
        let world = World::new();
        let registry = world.registry();
        let name = push(&registry, "app", what, std::slice::from_ref(&layer));
        let dir = world.mount(&name, "lazy");
        assert!(
            !world.log().contains("pulling a layer whole"),
            "{what}: {}",
            world.log()
        );
        read(&dir.join("data/a")).unwrap();
        let _ = read(&dir.join("data/b"));
        let end = match said {
            None => "a layer that is here in full is right",
            Some(_) => "will not be loaded again",
        };
        let before = registry.counters().body_bytes;
        eventually(end, || world.log().contains(end));
        // Table and tar headers were fetched again, and no file.
        let bytes = registry.counters().body_bytes - before;
        assert!(bytes < 10_000, "{what}: {bytes} bytes for the check");
        world.umount(&dir);
        if let Some(said) = said {
            let log = world.log();
            let line = log.lines().find(|line| line.contains(end)).unwrap();
            for part in [&name, &layer.digest().to_string(), &layer.diff_id.to_string()] {
                assert!(line.contains(part), "{what}: no {part} in: {line}");
            }
            assert!(line.contains(said), "{what}: {line}");
            let message = refused(&world, &name, &["--verify", "full"]);
            assert!(message.contains("found wrong before"), "{what}: {message}");
        }
        world.assert_sound();
    }
}

#[test]
fn zstd_chunked_layers_are_verified_in_full() {
    for (what, dialect) in [("podman", Dialect::Podman), ("stargz", Dialect::Stargz)] {
        let world = World::new();
        let registry = world.registry();
        let name = push(&registry, "app", what, &[zstd(dialect)]);
        let dir = world.dir("full");
        world.ok(&["mount", "--verify", "full", &name, dir.to_str().unwrap()]);
        read_all(&dir);
        world.umount(&dir);
        world.assert_sound();
    }
}

#[test]
fn zstd_chunked_layers_that_lie_are_refused_by_full_verification() {
    for dialect in [Dialect::Podman, Dialect::Stargz] {
        let right = zstd(dialect);
        let (setuid, hidden) = (right.clone(), right.clone());
        for (what, liar, said) in [
            (
                "set-user-id",
                setuid.with_zstd_contents(|entries| entry(entries, "data/a")["mode"] = json!(0o4755)),
                "the mode",
            ),
            (
                "hidden",
                hidden.with_zstd_contents(|entries| entries.retain(|entry| entry["name"] != "data/b")),
                "it is not in the table of contents",
            ),
            (
                "diff-id",
                right.with_diff_id(Digest::of(b"another layer")),
                "the configuration says",
            ),
        ] {
            let world = World::new();
            let registry = world.registry();
            let name = push(&registry, "app", what, std::slice::from_ref(&liar));
            // All that a lazy start can see of it is right.
            let dir = world.mount(&name, "lazy");
            assert!(
                !world.log().contains("pulling a layer whole"),
                "{dialect:?}, {what}"
            );
            read(&dir.join("data/a")).unwrap();
            world.umount(&dir);
            let message = refused(&world, &name, &["--verify", "full"]);
            for part in [said, &liar.digest().to_string(), &liar.diff_id.to_string()] {
                assert!(
                    message.contains(part),
                    "{dialect:?}, {what}: no {part} in: {message}"
                );
            }
            world.assert_sound();
        }
    }
}

#[test]
fn the_stargz_dialect_is_checked_in_the_background() {
    for (what, layer, end) in [
        (
            "honest",
            zstd(Dialect::Stargz),
            "a layer that is here in full is right",
        ),
        (
            "liar",
            zstd(Dialect::Stargz)
                .with_zstd_contents(|entries| entry(entries, "data/a")["mode"] = json!(0o4755)),
            "will not be loaded again",
        ),
    ] {
        let world = World::new();
        let registry = world.registry();
        push(&registry, "app", what, std::slice::from_ref(&layer));
        // There is no tar-split to check it from; a layout costs nothing to read again.
        let name = layout(&world, &registry, what);
        let dir = in_the_background(&world, &name, &[], end);
        world.umount(&dir);
        if what == "liar" {
            let message = refused(&world, &name, &[]);
            assert!(
                message.contains("found wrong before") && message.contains("the mode"),
                "{message}"
            );
        }
        world.assert_sound();
    }
}
