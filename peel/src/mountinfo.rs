//! Which mounts exist, in this and in every other mount namespace: /proc/PID/mountinfo (proc_pid_mountinfo(5)).
//!
//! The server asks whether an overlay is still mounted anywhere before it removes its writable layer, and `umount` asks
//! what stands at a directory. An overlay is recognised by its device number, which no other file system has while the
//! overlay lives.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Device number of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DeviceNumber {
    /// 0 for file systems without a block device.
    pub major: u32,
    /// Unique among those.
    pub minor: u32,
}

impl DeviceNumber {
    /// The number in `stat.st_dev`.
    pub fn from_raw(dev: u64) -> Self {
        Self {
            major: rustix::fs::major(dev),
            minor: rustix::fs::minor(dev),
        }
    }
}

/// One line of mountinfo, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The file system.
    pub device: DeviceNumber,
    /// Where it stands in the namespace.
    pub dir: PathBuf,
    /// `overlay`, `ext4` and so on.
    pub kind: Vec<u8>,
}

/// Parses one line; `None` where it is not as documented.
pub fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let dir = unescape(fields.nth(1)?);
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some(Mount {
        device: DeviceNumber {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        },
        dir: PathBuf::from(OsString::from_vec(dir)),
        kind: kind.to_vec(),
    })
}

/// Undoes the kernel's octal escapes of space, tab, newline and backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        let code = (*first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(byte) => {
                out.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => out.push(*first),
        }
    }
    out
}

/// The mounts of one process' namespace, in the order in which they were made.
pub fn of_process(pid: &OsStr) -> io::Result<Vec<Mount>> {
    let text = std::fs::read(Path::new("/proc").join(pid).join("mountinfo"))?;
    Ok(text.split(|byte| *byte == b'\n').filter_map(parse_line).collect())
}

/// The mounts of this process' namespace.
pub fn own() -> io::Result<Vec<Mount>> {
    of_process(OsStr::new("self"))
}

/// The topmost mount at exactly `dir` (absolute, no symbolic links) in this namespace.
pub fn at(dir: &Path) -> io::Result<Option<Mount>> {
    Ok(own()?.into_iter().rfind(|mount| mount.dir == dir))
}

/// Every overlay that some process has in its mount namespace. Reads one mountinfo per namespace, not per process.
pub fn overlays_everywhere() -> io::Result<HashSet<DeviceNumber>> {
    let mut seen = HashSet::new();
    let mut overlays = HashSet::new();
    for entry in std::fs::read_dir("/proc")? {
        let pid = entry?.file_name();
        if !pid.as_bytes().first().is_some_and(u8::is_ascii_digit) {
            continue;
        }
        let namespace = Path::new("/proc").join(&pid).join("ns/mnt");
        // A process may end between any two of these steps; then its namespace matters no more.
        let Ok(namespace) = std::fs::read_link(namespace) else {
            continue;
        };
        if seen.contains(&namespace) {
            continue;
        }
        if let Ok(mounts) = of_process(&pid) {
            seen.insert(namespace);
            overlays.extend(
                mounts
                    .into_iter()
                    .filter(|mount| mount.kind == b"overlay")
                    .map(|mount| mount.device),
            );
        }
    }
    Ok(overlays)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_parsed() {
        let mount = |major, minor, dir: &str, kind: &[u8]| {
            Some(Mount {
                device: DeviceNumber { major, minor },
                dir: dir.into(),
                kind: kind.to_vec(),
            })
        };
        for (line, expected) in [
            (
                "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw",
                mount(98, 0, "/mnt2", b"ext3"),
            ),
            (
                "36 35 0:55 / /a\\040b\\134 rw - overlay overlay rw",
                mount(0, 55, "/a b\\", b"overlay"),
            ),
            (
                "36 35 0:55 / /tail\\0 rw shared:1 master:2 - tmpfs x rw",
                mount(0, 55, "/tail\\0", b"tmpfs"),
            ),
            ("36 35 0-55 / / rw - overlay overlay rw", None),
            ("36 35 0:55 / / rw", None),
            ("", None),
        ] {
            assert_eq!(parse_line(line.as_bytes()), expected, "{line}");
        }
    }

    #[test]
    fn the_root_is_mounted() {
        let root = at(Path::new("/")).unwrap().unwrap();
        let stat = rustix::fs::stat("/").unwrap();
        assert_eq!(root.device, DeviceNumber::from_raw(stat.st_dev));
        assert_eq!(at(Path::new("/proc/self")).unwrap(), None);
    }
}
