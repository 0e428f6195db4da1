//! The tar reader and writer against GNU tar and Python's tarfile: streams that either of them writes are read alike by
//! Python and by us, and what we write is read alike and unpacked by GNU tar. Needs root (devices, owners), `tar` and
//! `python3`.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;

use peel_image::Digest;
use peel_image::layer::{Device, Metadata};
use peel_image::path::EntryPath;
use peel_image::tar::write::{NewEntry, Writer};
use peel_image::tar::{Reader, TarKind};
use serde_json::{Value, json};

/// Prints what Python reads: one JSON object per member, bytes as Latin-1.
const PYTHON_READ: &str = r#"
import hashlib, json, posixpath, sys, tarfile
text = lambda t: t.encode("utf-8", "surrogateescape").decode("latin-1")
with tarfile.open(sys.argv[1], encoding="utf-8", errors="surrogateescape") as tar:
    for m in tar:
        out = {"path": text(posixpath.normpath("/" + m.name).lstrip("/")), "mode": m.mode & 0o7777, "uid": m.uid,
               "gid": m.gid, "uname": text(m.uname), "gname": text(m.gname), "mtime": m.mtime}
        out["xattrs"] = {text(k[13:]): text(v) for k, v in m.pax_headers.items() if k.startswith("SCHILY.xattr.")}
        if m.isreg():
            out.update(type="file", size=m.size, sha256=hashlib.sha256(tar.extractfile(m).read()).hexdigest())
        elif m.isdir(): out["type"] = "dir"
        elif m.issym(): out.update(type="symlink", target=text(m.linkname))
        elif m.islnk(): out.update(type="hardlink", target=text(m.linkname))
        elif m.isfifo(): out["type"] = "fifo"
        else: out.update(type="char" if m.ischr() else "block", rdev=[m.devmajor, m.devminor])
        print(json.dumps(out))
"#;

/// Writes a stream in the format named by the second argument, with values at the limits of each.
const PYTHON_WRITE: &str = r#"
import io, sys, tarfile
path, name = sys.argv[1:]
format = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}[name]
headers = {"comment": "x", "gname": "everyone"} if name == "pax" else {}
with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape", pax_headers=headers) as tar:
    def add(name, content=b"", type=tarfile.REGTYPE, **fields):
        info = tarfile.TarInfo(name)
        info.type, info.size = type, len(content)
        for key, value in fields.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(content))
    add("plain", b"content", uname="somebody", uid=1000, mtime=1700000000)
    add("d" * 60 + "/" + "e" * 60 + "/" + "f" * 90, b"x" * 513)
    add("d\u00e4ta", b"utf-8")
    add("not-utf-8-\udcff", b"")
    add("link", type=tarfile.SYMTYPE, linkname="t" * 100)
    add("hard", type=tarfile.LNKTYPE, linkname="plain")
    add("dir", type=tarfile.DIRTYPE, mode=0o1777)
    add("old-file", b"7", type=tarfile.AREGTYPE)
    add("contiguous", b"8", type=tarfile.CONTTYPE)
    add("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3)
    add("disk", type=tarfile.BLKTYPE, devmajor=8, devminor=300)
    add("fifo", type=tarfile.FIFOTYPE, mode=0o4600)
    if name != "ustar":
        add("/".join(["n" * 200] * 4), b"long")
        add("long-link", type=tarfile.SYMTYPE, linkname="t" * 400)
        add("large", uid=4000000000, gid=2097152, mtime=-5)
        add("future", mtime=9000000000)
    if name == "pax":
        add("times", mtime=1.5)
        add("before", mtime=-1.5)
        add("attributes", b"x", pax_headers={"SCHILY.xattr.user.a": "v\nw=", "SCHILY.xattr.user.empty.not": "1"})
        add("own-group", gname="mine")
"#;

fn run(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn latin1(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(*byte)).collect()
}

fn ours(path: &Path) -> Vec<Value> {
    let mut reader = Reader::new(File::open(path).unwrap());
    let mut lines = Vec::new();
    while let Some(entry) = reader.next_entry().unwrap() {
        let metadata = &entry.metadata;
        let xattrs = metadata.xattrs.iter();
        let xattrs: serde_json::Map<_, _> = xattrs
            .map(|(name, value)| (latin1(name), latin1(value).into()))
            .collect();
        let device = |device: &Device| json!([device.major, device.minor]);
        let more = match &entry.kind {
            TarKind::Directory => json!({"type": "dir"}),
            TarKind::Regular { size } => {
                let mut content = Vec::new();
                reader.read_to_end(&mut content).unwrap();
                json!({"type": "file", "size": size, "sha256": Digest::of(&content).hex()})
            }
            TarKind::Symlink(target) => json!({"type": "symlink", "target": latin1(target)}),
            TarKind::Hardlink { raw, .. } => json!({"type": "hardlink", "target": latin1(raw)}),
            TarKind::CharDevice(number) => json!({"type": "char", "rdev": device(number)}),
            TarKind::BlockDevice(number) => json!({"type": "block", "rdev": device(number)}),
            TarKind::Fifo => json!({"type": "fifo"}),
        };
        let mut line = json!({
            "path": latin1(entry.path.as_bytes()),
            "mode": entry.raw_mode & 0o7777,
            "uid": metadata.uid,
            "gid": metadata.gid,
            "uname": latin1(&entry.user_name),
            "gname": latin1(&entry.group_name),
            "mtime": [metadata.mtime, metadata.mtime_nanoseconds],
            "xattrs": xattrs,
        });
        line.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        lines.push(line);
    }
    let trailer = reader.finish().unwrap();
    assert!(!trailer.has_data);
    lines
}

/// Fails unless Python and we read the same; returns the lines.
fn compare(path: &Path, what: &str) -> Vec<Value> {
    let python = run(Command::new("python3").args(["-c", PYTHON_READ]).arg(path));
    let python: Vec<Value> = python
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let ours = ours(path);
    for (theirs, ours) in python.iter().zip(&ours) {
        let (mut theirs, mut mine) = (theirs.clone(), ours.clone());
        // Python gives global headers to every entry; Go's tools, and so we, do not.
        if theirs["gname"] == "everyone" {
            theirs["gname"] = mine["gname"].clone();
        }
        assert_ne!(mine["gname"], "everyone", "{what}");
        // Python keeps times as floating point numbers.
        let (time, exact) = (theirs["mtime"].take(), mine["mtime"].take());
        let exact = exact[0].as_f64().unwrap() + exact[1].as_f64().unwrap() / 1e9;
        assert!(
            (time.as_f64().unwrap() - exact).abs() < 1e-5,
            "{what}: {theirs}: {time}, not {exact}"
        );
        assert_eq!(theirs, mine, "{what}");
    }
    assert_eq!(python.len(), ours.len(), "{what}");
    ours
}

/// A directory with every kind of file.
fn make_files(root: &Path, long_names: bool) {
    let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    fs::create_dir_all(root.join("dir/sub")).unwrap();
    set(&root.join("dir/sub"), 0o1770);
    fs::write(root.join("dir/file"), vec![7; 1000]).unwrap();
    fs::write(root.join("dir/d\u{e4}ta"), b"").unwrap();
    fs::hard_link(root.join("dir/file"), root.join("hard")).unwrap();
    symlink("dir/../nowhere", root.join("link")).unwrap();
    std::os::unix::fs::chown(root.join("dir/file"), Some(1234), Some(70_000)).unwrap();
    // After the owner, whose change takes set-id bits away.
    set(&root.join("dir/file"), 0o4755);
    for (name, kind, device) in [
        ("null", "c", &["1", "3"][..]),
        ("disk", "b", &["8", "17"]),
        ("fifo", "p", &[]),
    ] {
        run(Command::new("mknod").arg(root.join(name)).arg(kind).args(device));
    }
    let time = ["-hd", "2001-02-03 04:05:06.123456789 UTC"];
    run(Command::new("touch").args(time).arg(root.join("dir/file")));
    if long_names {
        let deep = root.join(["n".repeat(120).as_str(); 4].join("/"));
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("l".repeat(200)), b"deep").unwrap();
        symlink("t".repeat(300), root.join("long-link")).unwrap();
        fs::hard_link(deep.join("l".repeat(200)), root.join("long-hard")).unwrap();
    }
}

#[test]
fn what_gnu_tar_writes() {
    let scratch = tempfile::tempdir().unwrap();
    for format in ["v7", "ustar", "oldgnu", "gnu", "posix"] {
        let root = scratch.path().join(format);
        make_files(&root, !matches!(format, "v7" | "ustar"));
        if format == "v7" {
            // V7 headers have no devices and no fifos.
            for name in ["null", "disk", "fifo"] {
                fs::remove_file(root.join(name)).unwrap();
            }
        }
        let tar = scratch.path().join(format!("{format}.tar"));
        let mut command = Command::new("tar");
        command
            .arg(format!("--format={format}"))
            .arg("-C")
            .arg(&root)
            .arg("-cf")
            .arg(&tar)
            .arg(".");
        run(&mut command);
        let lines = compare(&tar, format);
        let file = lines
            .iter()
            .find(|line| line["path"] == "dir/file" || line["path"] == "hard")
            .unwrap();
        assert_eq!(
            (&file["uid"], &file["mode"]),
            (&json!(1234), &json!(0o4755)),
            "{format}"
        );
        let nanoseconds = if format == "posix" { 123_456_789 } else { 0 };
        assert_eq!(file["mtime"], json!([981_173_106, nanoseconds]), "{format}");
    }
}

#[test]
fn sparse_files_of_gnu_tar() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path().join("files");
    fs::create_dir(&root).unwrap();
    let mut data = vec![0; 3 << 20];
    // More regions than fit into a header and one extension block.
    for piece in data.chunks_mut(65536).step_by(2) {
        piece[..4096].fill(9);
    }
    fs::write(root.join("many"), &data).unwrap();
    fs::write(root.join("tail"), [vec![0; 1 << 20], vec![1; 10]].concat()).unwrap();
    for name in ["many", "tail"] {
        run(Command::new("fallocate").arg("--dig-holes").arg(root.join(name)));
    }
    File::create(root.join("hole"))
        .unwrap()
        .set_len(5_000_001)
        .unwrap();
    fs::write(root.join("plain"), b"plain").unwrap();
    for (format, version) in [
        ("gnu", "1.0"),
        ("oldgnu", "1.0"),
        ("posix", "0.0"),
        ("posix", "0.1"),
        ("posix", "1.0"),
    ] {
        let tar = scratch.path().join("sparse.tar");
        let mut command = Command::new("tar");
        command
            .arg(format!("--format={format}"))
            .arg("--sparse")
            .arg(format!("--sparse-version={version}"));
        run(command
            .arg("-C")
            .arg(&root)
            .arg("-cf")
            .arg(&tar)
            .args(["many", "tail", "hole", "plain"]));
        assert!(
            fs::metadata(&tar).unwrap().len() < 2 << 20,
            "{format} {version}: not sparse"
        );
        let lines = compare(&tar, &format!("{format} {version}"));
        assert_eq!(lines[0]["sha256"], Digest::of(&data).hex());
        assert_eq!(lines[2]["size"], 5_000_001);
        let mut reader = Reader::new(File::open(&tar).unwrap());
        let contained = std::iter::from_fn(|| reader.next_entry().unwrap()).map(|entry| entry.self_contained);
        assert_eq!(contained.collect::<Vec<_>>(), [false, false, false, true]);
    }
}

#[test]
fn what_python_writes() {
    let scratch = tempfile::tempdir().unwrap();
    for format in ["ustar", "gnu", "pax"] {
        let tar = scratch.path().join(format);
        run(Command::new("python3")
            .args(["-c", PYTHON_WRITE])
            .arg(&tar)
            .arg(format));
        assert!(compare(&tar, format).len() >= 12);
    }
}

#[test]
fn what_we_write() {
    let scratch = tempfile::tempdir().unwrap();
    let ordinary = Metadata {
        mode: 0o644,
        mtime: 1_700_000_000,
        ..Metadata::default()
    };
    let large = Metadata {
        mode: 0o4711,
        uid: 4_000_000_000,
        gid: 70_000,
        mtime: 1_700_000_000,
        mtime_nanoseconds: 123_456_789,
        xattrs: [("user.a", &b"v\n="[..]), ("user.b", b"w")]
            .map(|(name, value)| (name.as_bytes().into(), value.into()))
            .into(),
    };
    let hard = |raw: &str| TarKind::Hardlink {
        raw: raw.as_bytes().into(),
        target: EntryPath::clean(raw.as_bytes()).unwrap(),
    };
    let deep = ["n".repeat(100).as_str(); 4].join("/");
    let split = format!("{}/{}", "p".repeat(150), "q".repeat(99));
    let mut writer = Writer::new(Vec::new());
    for (name, metadata, kind) in [
        ("dir", &ordinary, TarKind::Directory),
        ("dir/file", &large, TarKind::Regular { size: 1000 }),
        ("dir/empty", &ordinary, TarKind::Regular { size: 0 }),
        ("dir/hard", &large, hard("dir/file")),
        ("link", &ordinary, TarKind::Symlink(b"t".repeat(300).into())),
        (
            "null",
            &ordinary,
            TarKind::CharDevice(Device { major: 1, minor: 3 }),
        ),
        (
            "disk",
            &ordinary,
            TarKind::BlockDevice(Device {
                major: 259,
                minor: 1_000_000,
            }),
        ),
        ("fifo", &ordinary, TarKind::Fifo),
        (&deep, &ordinary, TarKind::Directory),
        (&format!("{deep}/file"), &ordinary, TarKind::Regular { size: 1 }),
        (&split, &ordinary, TarKind::Regular { size: 512 }),
        ("long-hard", &ordinary, hard(&split)),
        ("d\u{e4}ta", &ordinary, TarKind::Regular { size: 4 }),
    ] {
        let entry = NewEntry {
            name: name.as_bytes(),
            metadata,
            kind: &kind,
            user_name: b"somebody",
            group_name: "a group with a name that is too long for a header".as_bytes(),
        };
        writer.append(&entry, &mut std::io::repeat(b'x')).unwrap();
    }
    let tar = scratch.path().join("ours.tar");
    fs::write(&tar, writer.finish().unwrap()).unwrap();
    let lines = compare(&tar, "ours");
    assert_eq!(lines.len(), 13);

    // GNU tar unpacks it, finds no difference, and packs the same again.
    let root = scratch.path().join("unpacked");
    fs::create_dir(&root).unwrap();
    let names = ["--numeric-owner", "--xattrs", "-C"];
    run(Command::new("tar").args(names).arg(&root).arg("-xpf").arg(&tar));
    run(Command::new("tar").args(names).arg(&root).arg("-df").arg(&tar));
    let again = scratch.path().join("again.tar");
    let list = scratch.path().join("list");
    let paths = lines.iter().map(|line| {
        let path: Vec<u8> = line["path"]
            .as_str()
            .unwrap()
            .chars()
            .map(|c| u8::try_from(c).unwrap())
            .collect();
        String::from_utf8(path).unwrap() + "\n"
    });
    fs::write(&list, paths.collect::<String>()).unwrap();
    let mut command = Command::new("tar");
    command
        .args(["--format=posix", "--no-recursion"])
        .args(names)
        .arg(&root)
        .arg("-cf")
        .arg(&again);
    run(command.arg("-T").arg(&list));
    let without_names = |lines: Vec<Value>| {
        let strip = |mut line: Value| {
            for field in ["uname", "gname"] {
                line.as_object_mut().unwrap().remove(field);
            }
            if line["type"] == "hardlink" {
                // Its own fields mean nothing, and GNU tar writes those of the file.
                line = json!({"path": line["path"], "target": line["target"]});
            }
            line
        };
        lines.into_iter().map(strip).collect::<Vec<_>>()
    };
    // A link's mode cannot be set.
    let mut expected = without_names(lines);
    expected[4]["mode"] = json!(0o777);
    assert_eq!(without_names(ours(&again)), expected);
}
