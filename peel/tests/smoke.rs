//! The built program against images that upstream's tools made: every command once, and what must hold when things are
//! killed. Needs root, the kernel features that `peel doctor` names, and python3.

#[path = "smoke/world.rs"]
mod world;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use serde_json::Value;
use world::{World, eventually, kill, text};

/// The tags that must mount to the same tree: plain gzip, eStargz, eStargz with files first, eStargz in small chunks.
const TAGS: [&str; 4] = ["org", "esgz", "esgz-opt", "esgz-chunk64k"];
/// What `/bin/sh` of the vectors prints.
const LINE: &str = "hello from the vectors image\n";

#[test]
fn images_mount_to_the_expected_tree() {
    let world = World::new();
    for tag in TAGS {
        let dir = world.dir(tag);
        world.ok(&["mount", &world.vector(tag), text(&dir)]);
        world.assert_listing(&dir, tag);
    }
    for tag in TAGS {
        world.ok(&["umount", text(&world.dir(tag))]);
    }
    world.assert_nothing_left();
}

#[test]
fn containers_run() {
    let world = World::new();
    for tag in TAGS {
        assert_eq!(world.ok(&["run", &world.vector(tag)]), LINE, "{tag}");
    }
    let image = world.vector("esgz");
    for (arguments, code, message) in [
        (&["/nope"][..], 127, "no such program"),
        (&["/etc/os-release"], 126, "cannot be executed"),
    ] {
        let output = world.run(&[&["run", &image], arguments].concat());
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
        assert!(
            String::from_utf8_lossy(&output.stderr).contains(message),
            "{output:?}"
        );
    }
    assert_eq!(
        world.run(&["run", "--no-such-flag", &image]).status.code(),
        Some(125)
    );
    assert_eq!(
        world.run(&["run", "oci:/does/not/exist:x"]).status.code(),
        Some(125)
    );
    world.assert_nothing_left();
}

#[test]
fn a_run_says_how_long_it_took() {
    let world = World::new();
    let file = world.path("timing.json");
    let image = world.vector("esgz-opt");
    assert_eq!(world.ok(&["run", "--timing-file", text(&file), &image]), LINE);
    let timing: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let second = |name: &str| {
        timing[name]
            .as_f64()
            .unwrap_or_else(|| panic!("{name} in {timing}"))
    };
    assert!(second("resolve_s") <= second("mount_s"), "{timing}");
    assert!(second("mount_s") <= second("ready_s"), "{timing}");
    assert!(second("ready_s") <= second("total_s"), "{timing}");
    let first = timing["bytes"].as_u64().unwrap();
    assert_eq!(timing["requests"], 0, "a layout needs no registry: {timing}");
    world.ok(&["run", "--timing-file", text(&file), &image]);
    let timing: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    // A layout's index and manifest are looked at every time; everything else is in the store.
    assert!(timing["bytes"].as_u64().unwrap() < first, "{first} then {timing}");
    world.assert_nothing_left();
}

#[test]
fn configuration_and_flags_reach_the_process() {
    let world = World::new();
    let image = world.vector("esgz");
    let shell = |flags: &[&str], script: &str| {
        let host = world.host_programs();
        let mut arguments = vec!["run"];
        arguments.extend(host.iter().map(String::as_str));
        arguments.extend(flags);
        arguments.extend([image.as_str(), "/usr/bin/sh", "-c", script]);
        world.run(&arguments)
    };
    let output = shell(
        &["-e", "A=1", "-w", "/var", "-u", "7:8", "--hostname", "there"],
        "echo $A $PWD $(id -u) $(id -g) $(cat /proc/sys/kernel/hostname); exit 3",
    );
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "1 /var 7 8 there\n",
        "{output:?}"
    );
    assert_eq!(output.status.code(), Some(3));
    let output = shell(&[], "echo new > /tmp/x && cat /tmp/x");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "new\n", "{output:?}");
    let output = shell(&["--read-only"], "echo new > /etc/x");
    assert_ne!(output.status.code(), Some(0), "wrote to a read-only root");
    world.assert_nothing_left();
}

#[test]
fn signals_are_passed_on() {
    let world = World::new();
    let image = world.vector("esgz");
    let host = world.host_programs();
    let mut arguments = vec!["run"];
    arguments.extend(host.iter().map(String::as_str));
    let script = "trap 'echo got it; exit 7' TERM; echo up; while :; do sleep 0.02; done";
    arguments.extend([image.as_str(), "/usr/bin/sh", "-c", script]);
    let mut running = world.start(&arguments);
    assert_eq!(running.line(), "up");
    kill(running.pid(), "TERM");
    assert_eq!(running.line(), "got it");
    assert_eq!(running.wait().code(), Some(7));

    // SIGTERM asks for the end, in the image's own way.
    let script = "trap 'echo quit; exit 8' QUIT; echo up; while :; do sleep 0.02; done";
    let mut stopped = vec!["run", "--stop-signal", "SIGQUIT"];
    stopped.extend(host.iter().map(String::as_str));
    stopped.extend([image.as_str(), "/usr/bin/sh", "-c", script]);
    let mut running = world.start(&stopped);
    assert_eq!(running.line(), "up");
    kill(running.pid(), "TERM");
    assert_eq!(running.line(), "quit");
    assert_eq!(running.wait().code(), Some(8));

    let mut running = world.start(&arguments);
    assert_eq!(running.line(), "up");
    kill(running.pid(), "KILL");
    running.wait();
    world.assert_nothing_left();
}

#[test]
fn a_converted_image_is_the_same_image() {
    let world = World::new();
    let target = format!("oci:{}:converted", text(&world.path("layout")));
    let digest = world.ok(&["convert", &world.vector("org"), &target]);
    assert_eq!(
        world.ok(&["convert", &world.vector("org"), &target]),
        digest,
        "output differs from run to run"
    );
    let report: Value = serde_json::from_str(&world.ok(&["--json", "inspect", &target])).unwrap();
    assert_eq!(report["manifest_digest"], digest.trim());
    for layer in report["layers"].as_array().unwrap() {
        assert_eq!(
            (&layer["lazy"], &layer["format"]),
            (&true.into(), &"eStargz".into()),
            "{layer}"
        );
        assert_eq!(layer["toc"]["state"], "verified", "{layer}");
    }
    let dir = world.dir("converted");
    world.ok(&["mount", &target, text(&dir)]);
    world.assert_listing(&dir, "converted");
    world.ok(&["umount", text(&dir)]);
    assert_eq!(world.ok(&["run", &target]), LINE);
    world.assert_nothing_left();
}

#[test]
fn an_optimized_image_has_first_what_was_read() {
    let world = World::new();
    let target = format!("oci:{}:optimized", text(&world.path("layout")));
    let record = world.path("record");
    world.ok(&[
        "optimize",
        "--record-out",
        text(&record),
        &world.vector("org"),
        &target,
    ]);
    let lines = std::fs::read_to_string(&record).unwrap();
    let paths: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(
        paths
            .iter()
            .any(|line| line["path"] == "bin/sh" && line["layerIndex"] == 0),
        "{lines}"
    );
    let report: Value = serde_json::from_str(&world.ok(&["--json", "inspect", &target])).unwrap();
    let end = report["layers"][0]["prefetch_bytes"].as_u64().unwrap();
    assert!(
        end > 0 && end < report["layers"][0]["size"].as_u64().unwrap(),
        "{report}"
    );
    assert_eq!(
        report["layers"][0]["annotations"]["dev.peel.prefetch.end"],
        end.to_string()
    );
    assert_eq!(
        report["annotations"]["dev.peel.prefetch.order"],
        format!("0:{end}")
    );
    let dir = world.dir("optimized");
    world.ok(&["mount", &target, text(&dir)]);
    world.assert_listing(&dir, "optimized");
    world.ok(&["umount", text(&dir)]);

    // The record does the same without running anything, and so does a list of patterns; unread layers can be kept.
    let again = format!("oci:{}:again", text(&world.path("layout")));
    let from_record = world.ok(&[
        "optimize",
        "--record-in",
        text(&record),
        &world.vector("org"),
        &again,
    ]);
    assert_eq!(from_record.trim(), report["manifest_digest"], "from the record");
    std::fs::write(world.path("list"), "# first\n**/s[h]\n").unwrap();
    let list = world.path("list");
    let json = world.ok(&[
        "--json",
        "optimize",
        "--reuse",
        "--prefetch-list",
        text(&list),
        &world.vector("esgz"),
        &again,
    ]);
    let outcome: Value = serde_json::from_str(&json).unwrap();
    let how: Vec<&str> = outcome["images"][0]["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| layer["how"].as_str().unwrap())
        .collect();
    assert_eq!(how, ["converted", "kept", "kept"], "{outcome}");
    world.ok(&["mount", &again, text(&dir)]);
    world.assert_listing(&dir, "again");
    world.ok(&["umount", text(&dir)]);
    world.assert_nothing_left();
}

#[test]
fn images_are_looked_into_without_a_store() {
    let world = World::new();
    for tag in TAGS {
        let image = world.vector(tag);
        let report: Value = serde_json::from_str(&world.ok(&["--json", "inspect", &image])).unwrap();
        for layer in report["layers"].as_array().unwrap() {
            assert_eq!(layer["lazy"], tag != "org", "{tag}: {layer}");
            assert_eq!(layer["not_lazy"].is_string(), tag == "org", "{tag}: {layer}");
        }
        assert!(
            world.ok(&["ls", &image]).lines().any(|line| line == "etc"),
            "{tag}"
        );
        let long = world.ok(&["ls", "-l", &image, "/bin/sh"]);
        assert!(long.starts_with("- 0755"), "{tag}: {long}");
        let everything = world.ok(&["ls", "-R", &image]);
        assert_eq!(everything.lines().count(), world.expected_entries(), "{tag}");
        assert!(
            world
                .ok(&["cat", &image, "etc/os-release"])
                .starts_with("ID=vectors\n"),
            "{tag}"
        );
        let big = world.run(&["cat", &image, "/usr/lib/big.bin"]).stdout;
        assert_eq!(
            peel_image::Digest::of(&big).hex(),
            world.expected_digest("usr/lib/big.bin"),
            "{tag}"
        );
        assert_eq!(world.run(&["cat", &image, "/etc"]).status.code(), Some(1));
        assert_eq!(world.run(&["cat", &image, "/nope"]).status.code(), Some(1));
    }
    assert!(!world.store().exists(), "a store was made");
}

#[test]
fn mounts_share_one_server() {
    let world = World::new();
    // All at once: one of them starts the server.
    let running: Vec<_> = TAGS
        .iter()
        .map(|tag| world.start(&["mount", &world.vector(tag), text(&world.dir(tag))]))
        .collect();
    for (mut mount, tag) in running.into_iter().zip(TAGS) {
        assert!(mount.wait().success(), "{tag}: {}", mount.errors());
    }
    assert_eq!(world.servers().len(), 1);
    for tag in TAGS {
        world.assert_listing(&world.dir(tag), tag);
    }
    for tag in TAGS {
        world.ok(&["umount", text(&world.dir(tag))]);
    }
    world.assert_nothing_left();
}

#[test]
fn a_killed_server_leaves_nothing_behind() {
    let world = World::new();
    let (first, second) = (world.dir("first"), world.dir("second"));
    let image = world.vector("esgz-opt");
    world.ok(&["mount", &image, text(&first)]);
    world.ok(&["mount", &image, text(&second)]);
    world.assert_listing(&first, "before");
    std::fs::write(first.join("etc/written"), "x").unwrap();
    kill(world.servers()[0], "KILL");
    eventually("the server to be gone", || world.servers().is_empty());
    // What was read before is complete, so the kernel serves it alone; what was written is there too.
    assert!(
        std::fs::read_to_string(first.join("etc/os-release"))
            .unwrap()
            .starts_with("ID=vectors")
    );
    assert_eq!(std::fs::read_to_string(first.join("etc/written")).unwrap(), "x");
    // Once without a server, once with a later one.
    world.ok(&["umount", text(&first)]);
    assert_eq!(world.ok(&["run", &image]), LINE);
    assert_eq!(world.scratch().len(), 1, "the second mount's layer must stay");
    world.ok(&["umount", text(&second)]);
    world.assert_nothing_left();
}

#[test]
fn a_mount_that_another_namespace_has_keeps_its_layer() {
    let world = World::new();
    let dir = world.dir("shared");
    world.ok(&["mount", &world.vector("esgz"), text(&dir)]);
    let script = format!(
        "echo up; read go; echo late > {0}/etc/late; cat {0}/etc/late",
        text(&dir)
    );
    let mut other = std::process::Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(other.stdout.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    world.ok(&["umount", text(&dir)]);
    writeln!(other.stdin.take().unwrap(), "go").unwrap();
    said.read_line(&mut line).unwrap();
    assert_eq!(line, "up\nlate\n");
    assert!(other.wait().unwrap().success());
    world.assert_nothing_left();
}

#[test]
fn files_and_terminals_of_the_host_stay_out_of_reach() {
    let world = World::new();
    let log = world.path("log");
    std::fs::write(&log, "before\n").unwrap();
    let append = || std::fs::File::options().append(true).open(&log).unwrap();
    let script = "echo out; echo err >&2; : > /proc/self/fd/1; : > /proc/self/fd/2; exit 3";
    let mut arguments = vec!["run".to_owned()];
    arguments.extend(world.host_programs());
    arguments.extend([
        world.vector("esgz"),
        "/usr/bin/sh".into(),
        "-c".into(),
        script.into(),
    ]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let status = world
        .command(&arguments)
        .stdout(append())
        .stderr(append())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(3));
    let mut lines: Vec<String> = std::fs::read_to_string(&log)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect();
    lines.sort();
    assert_eq!(
        lines,
        ["before", "err", "out"],
        "the program truncated a file of the host"
    );
    let output = world.run(&["run", "-i", "-t", &world.vector("esgz")]);
    assert_eq!(output.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&output.stderr).contains("needs a terminal"));
    world.assert_nothing_left();
}

#[test]
fn umount_takes_only_what_is_ours_and_unused() {
    let world = World::new();
    let (ours, other) = (world.dir("ours"), world.dir("other"));
    let output = world.run(&["umount", text(&other)]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("not a mount of the store"),
        "{output:?}"
    );
    world.ok(&["mount", &world.vector("esgz"), text(&ours)]);
    let held = std::fs::File::open(ours.join("etc")).unwrap();
    let output = world.run(&["umount", text(&ours)]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("still used"),
        "{output:?}"
    );
    drop(held);
    world.ok(&["umount", text(&ours)]);

    // Taken away by somebody else: the server notices.
    world.ok(&["mount", "--read-only", &world.vector("esgz"), text(&ours)]);
    assert!(
        std::fs::write(ours.join("x"), "x").is_err(),
        "wrote to a read-only mount"
    );
    rustix::mount::unmount(&ours, rustix::mount::UnmountFlags::empty()).unwrap();
    world.assert_nothing_left();
    assert_eq!(
        world
            .run(&["mount", &world.vector("esgz"), "/does/not/exist"])
            .status
            .code(),
        Some(1)
    );
    assert_eq!(
        world
            .run(&["mount", &world.vector("nope"), text(&ours)])
            .status
            .code(),
        Some(1)
    );
    world.assert_nothing_left();
}

#[test]
fn a_server_that_is_told_to_stop_stops() {
    let world = World::new();
    let dir = world.dir("dir");
    world.ok(&["mount", &world.vector("esgz"), text(&dir)]);
    kill(world.servers()[0], "TERM");
    eventually("the server to stop", || world.servers().is_empty());
    world.ok(&["umount", text(&dir)]);
    world.assert_nothing_left();
}

#[test]
fn doctor_and_documentation_work() {
    let world = World::new();
    let findings: Value = serde_json::from_str(&world.ok(&["--json", "doctor"])).unwrap();
    for finding in findings.as_array().unwrap() {
        assert_eq!(finding["state"], "ok", "{finding}");
    }
    let man = world.path("man");
    world.ok(&["man", text(&man)]);
    assert!(Path::new(&man).join("peel-run.1").exists());
    assert!(world.ok(&["completions", "bash"]).contains("optimize"));
    assert!(world.ok(&["help", "optimize"]).contains("--wait-on-line"));
    world.assert_nothing_left();
}

#[test]
fn a_store_may_have_a_long_path() {
    let mut world = World::new();
    // Longer than the address of a socket can be.
    let long = world.path(&"x".repeat(60)).join("y".repeat(60));
    world.set_store(&long);
    assert_eq!(world.ok(&["run", &world.vector("esgz")]), LINE);
    world.assert_nothing_left();
}
