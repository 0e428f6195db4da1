//! `peel ls`: a directory of an image, from its tables of contents. If one of them was found wrong when its layer was checked as a whole,
//! that is said on standard error, and in each line of `--json`: what is listed is what that table says.

use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;

use anyhow::Context;
use peel_image::tree::{Inode, InodeId, InodeKind, Tree};
use serde::Serialize;
use serde::ser::{SerializeSeq, Serializer};

use super::checks::{Check, checks};
use super::look::OpenImage;
use crate::cli::{Global, LsArgs};
use crate::describe::printable;

/// One line of the listing.
#[derive(Debug, Serialize)]
struct Line {
    /// Below the directory that was asked for.
    name: String,
    #[serde(rename = "type")]
    kind: &'static str,
    /// Permission bits, octal.
    mode: String,
    uid: u32,
    gid: u32,
    links: u32,
    size: u64,
    /// Seconds since the epoch.
    mtime: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    /// A layer of the image was found wrong as a whole; only then it is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    check: Option<&'static str>,
}

/// Prints it.
pub(super) fn run(global: &Global, args: &LsArgs) -> anyhow::Result<()> {
    let open = OpenImage::open(global, &args.image, args.platform.as_deref())?;
    let tree = open.contents()?.tree;
    let path = args.path.as_bytes();
    let start = tree.resolve(path, true)?;
    let check = warn(&checks(global, &open)).then_some("failed");
    let mut out = io::BufWriter::new(io::stdout().lock());
    // Printed as they are found: the paths of a deep tree take far more room than the tree.
    if global.json {
        let mut serializer = serde_json::Serializer::new(&mut out);
        // As an error of the output, which tells a pipe that nobody reads any more.
        let mut lines = serializer.serialize_seq(None).map_err(io::Error::from)?;
        each(&tree, start, path, args.recursive, &mut |mut line| {
            line.check = check;
            Ok(lines.serialize_element(&line).map_err(io::Error::from)?)
        })?;
        lines.end().map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        each(&tree, start, path, args.recursive, &mut |line| {
            if args.long {
                print_long(&mut out, &line)?;
            } else {
                writeln!(out, "{}", line.name)?;
            }
            Ok(())
        })?;
    }
    Ok(out.flush()?)
}

/// What takes the lines.
type Sink<'s> = dyn FnMut(Line) -> anyhow::Result<()> + 's;

/// The lines of a directory, or the one of anything else.
fn each(
    tree: &Tree,
    start: InodeId,
    path: &[u8],
    recursive: bool,
    sink: &mut Sink<'_>,
) -> anyhow::Result<()> {
    match tree.children(start) {
        Some(_) => list(tree, start, &mut Vec::new(), recursive, sink),
        None => sink(line(tree, start, path)?),
    }
}

/// Says which layers were found wrong; true if there are any.
fn warn(checks: &[Check]) -> bool {
    let mut any = false;
    for (check, number) in checks.iter().zip(1..) {
        let Check::Failed { when, fault } = check else {
            continue;
        };
        any = true;
        let on = when.as_ref().map_or(String::new(), |when| format!(" on {when}"));
        let fault = printable(fault.as_bytes());
        let _ = writeln!(
            io::stderr(),
            "peel: WRONG: layer {number} of {} did not pass its check{on}: {fault}; it is not loaded, and this list is not to be trusted",
            checks.len()
        );
    }
    any
}

fn list(
    tree: &Tree,
    directory: InodeId,
    path: &mut Vec<u8>,
    recursive: bool,
    sink: &mut Sink<'_>,
) -> anyhow::Result<()> {
    // A tree has no path longer than the kernel's limit, which bounds the depth.
    for (name, id) in tree.children(directory).into_iter().flatten() {
        let length = path.len();
        if length > 0 {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        sink(line(tree, *id, path)?)?;
        if recursive {
            list(tree, *id, path, true, sink)?;
        }
        path.truncate(length);
    }
    Ok(())
}

fn line(tree: &Tree, id: InodeId, name: &[u8]) -> anyhow::Result<Line> {
    let inode = tree.inode(id).context("inode")?;
    let Inode {
        metadata,
        links,
        kind,
    } = inode;
    let (kind, size, target, device) = match kind {
        InodeKind::Directory(_) => ("directory", 0, None, None),
        InodeKind::Regular(file) => ("file", file.size, None, None),
        InodeKind::Symlink(target) => ("symlink", target.len() as u64, Some(printable(target)), None),
        InodeKind::CharDevice(device) => ("character device", 0, None, Some(device)),
        InodeKind::BlockDevice(device) => ("block device", 0, None, Some(device)),
        InodeKind::Fifo => ("fifo", 0, None, None),
    };
    Ok(Line {
        name: printable(name),
        kind,
        mode: format!("{:04o}", metadata.mode),
        uid: metadata.uid,
        gid: metadata.gid,
        links: *links,
        size,
        mtime: metadata.mtime,
        target,
        device: device.map(|device| format!("{}:{}", device.major, device.minor)),
        check: None,
    })
}

fn print_long(out: &mut impl Write, line: &Line) -> io::Result<()> {
    let kind = match line.kind {
        "directory" => 'd',
        "symlink" => 'l',
        "character device" => 'c',
        "block device" => 'b',
        "fifo" => 'p',
        _ => '-',
    };
    let size = line.device.clone().unwrap_or_else(|| line.size.to_string());
    write!(
        out,
        "{kind} {} {:>3} {:>6} {:>6} {size:>12} {:>12} {}",
        line.mode, line.links, line.uid, line.gid, line.mtime, line.name
    )?;
    match &line.target {
        Some(target) => writeln!(out, " -> {target}"),
        None => writeln!(out),
    }
}
