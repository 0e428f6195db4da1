//! Tar files that hold images. They are looked through once and read in place: an entry is a stretch of the file.
//!
//! [`docker`] reads what `docker save` writes; an OCI layout in a tar file is [`crate::layout`]'s.
//! Only names, sizes and links matter here, and content is skipped without reading it, so this is not `image`'s tar reader, which
//! reads streams.

pub(crate) mod docker;

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Error;
use crate::transfer::file::Stretch;

/// Tar's unit in bytes (POSIX.1-2024, pax, "ustar Interchange Format").
const BLOCK: u64 = 512;
/// Entries of one archive; images have hundreds.
const MAX_ENTRIES: usize = 100_000;
/// Bytes of a PAX header or GNU long name.
const MAX_HEADER: u64 = 1 << 20;
/// Links to links.
const MAX_LINKS: usize = 8;

/// Where the files of an archive are.
#[derive(Debug)]
pub(crate) struct TarIndex {
    path: Arc<PathBuf>,
    entries: HashMap<String, Entry>,
}

#[derive(Debug, PartialEq, Eq)]
enum Entry {
    File { start: u64, size: u64 },
    Link(String),
}

/// What headers before an entry say about it.
#[derive(Debug, Default)]
struct Extra {
    name: Option<String>,
    link: Option<String>,
    size: Option<u64>,
}

impl TarIndex {
    /// Looks through the archive. Blocks on the disk.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let whole = Stretch::whole(path)?;
        if whole.head(2)? == [0x1f, 0x8b] || whole.head(4)? == [0x28, 0xb5, 0x2f, 0xfd] {
            return Err(Error::layout(
                path,
                "the archive is compressed; decompress it first",
            ));
        }
        let file = File::open(path).map_err(Error::file(path, "cannot be opened"))?;
        let entries = scan(&file, whole.size)
            .map_err(|reason| Error::layout(path, format!("no tar file: {reason}")))?;
        Ok(Self {
            path: whole.path,
            entries,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The file `name`, links followed.
    pub(crate) fn get(&self, name: &str) -> Result<Stretch, Error> {
        let mut name = normal(name);
        for _ in 0..MAX_LINKS {
            match self.entries.get(&name) {
                Some(Entry::File { start, size }) => {
                    return Ok(Stretch {
                        path: Arc::clone(&self.path),
                        start: *start,
                        size: *size,
                    });
                }
                Some(Entry::Link(target)) => name = target.clone(),
                None => {
                    return Err(Error::file(self.path.join(&name), "is not in the archive")(
                        std::io::ErrorKind::NotFound.into(),
                    ));
                }
            }
        }
        Err(Error::layout(
            self.path(),
            format!("{name:?} is a link that leads in circles"),
        ))
    }
}

fn scan(file: &File, end: u64) -> Result<HashMap<String, Entry>, String> {
    let read = |offset: u64, length: u64| -> Result<Vec<u8>, String> {
        let length = usize::try_from(length.min(MAX_HEADER)).unwrap_or(0);
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, offset)
            .map_err(|error| format!("at byte {offset}: {error}"))?;
        Ok(bytes)
    };
    let mut entries = HashMap::new();
    let mut extra = Extra::default();
    let mut offset = 0;
    // Two blocks of zeros end an archive; some writers leave them out.
    while offset + BLOCK <= end {
        let header = read(offset, BLOCK)?;
        let header = Header::new(&header).ok_or_else(|| format!("at byte {offset}: damaged header"))?;
        let Some(header) = header else {
            break;
        };
        let start = offset + BLOCK;
        let size = match header.kind {
            b'x' | b'g' | b'L' | b'K' => header.size,
            _ => extra.size.unwrap_or(header.size),
        };
        let next = size
            .checked_next_multiple_of(BLOCK)
            .and_then(|size| start.checked_add(size));
        let next = next.filter(|_| size <= end.saturating_sub(start));
        let Some(next) = next else {
            return Err(format!(
                "at byte {offset}: an entry of {size} bytes goes beyond the end of the file"
            ));
        };
        match header.kind {
            b'x' | b'L' | b'K' if size > MAX_HEADER => {
                return Err(format!("at byte {offset}: header too large"));
            }
            b'x' => extra.pax(&read(start, size)?),
            b'L' => extra.name = Some(text(&read(start, size)?)),
            b'K' => extra.link = Some(text(&read(start, size)?)),
            b'g' => {}
            kind => {
                let extra = std::mem::take(&mut extra);
                let name = normal(&extra.name.unwrap_or(header.name));
                let target = extra.link.unwrap_or(header.link);
                let entry = match kind {
                    0 | b'0' | b'7' => Some(Entry::File { start, size }),
                    b'1' => Some(Entry::Link(normal(&target))),
                    b'2' => Some(Entry::Link(match name.rsplit_once('/') {
                        Some((parent, _)) if !target.starts_with('/') => {
                            normal(&format!("{parent}/{target}"))
                        }
                        _ => normal(&target),
                    })),
                    _ => None,
                };
                if let Some(entry) = entry {
                    entries.insert(name, entry);
                }
                if entries.len() > MAX_ENTRIES {
                    return Err(format!("more than {MAX_ENTRIES} files"));
                }
            }
        }
        offset = next;
    }
    Ok(entries)
}

impl Extra {
    /// Records of a PAX header: `LENGTH KEY=VALUE\n`.
    fn pax(&mut self, mut records: &[u8]) {
        while let Some(blank) = records.iter().position(|&byte| byte == b' ') {
            let (length, _) = records.split_at(blank);
            let length = std::str::from_utf8(length)
                .ok()
                .and_then(|text| text.parse().ok());
            let Some((record, rest)) = length.and_then(|length: usize| records.split_at_checked(length))
            else {
                return;
            };
            let Some(record) = record.get(blank + 1..) else {
                return;
            };
            let record = text(record.strip_suffix(b"\n").unwrap_or(record));
            match record.split_once('=') {
                Some(("path", value)) => self.name = Some(value.to_owned()),
                Some(("linkpath", value)) => self.link = Some(value.to_owned()),
                Some(("size", value)) => self.size = value.parse().ok(),
                _ => {}
            }
            records = rest;
        }
    }
}

struct Header {
    name: String,
    link: String,
    size: u64,
    kind: u8,
}

impl Header {
    /// Parses a header block: `None` if it is damaged, `Some(None)` at the end of the archive.
    fn new(block: &[u8]) -> Option<Option<Self>> {
        if block.iter().all(|&byte| byte == 0) {
            return Some(None);
        }
        let (head, sum, tail) = (block.get(..148)?, block.get(148..156)?, block.get(156..)?);
        let bytes = head.iter().chain(tail).map(|&byte| u64::from(byte)).sum::<u64>();
        if number(sum)? != bytes + 8 * u64::from(b' ') {
            return None;
        }
        let mut name = text(block.get(..100)?);
        let prefix = text(block.get(345..500)?);
        // GNU's header has other fields where USTAR has the prefix.
        if block.get(257..263)? == b"ustar\0" && !prefix.is_empty() {
            name = format!("{prefix}/{name}");
        }
        Some(Some(Self {
            name,
            link: text(block.get(157..257)?),
            size: number(block.get(124..136)?)?,
            kind: *block.get(156)?,
        }))
    }
}

/// Octal digits, or GNU's big-endian binary with the first bit set.
fn number(field: &[u8]) -> Option<u64> {
    if let Some((0x80, rest)) = field.split_first() {
        return rest.iter().try_fold(0_u64, |value, &byte| {
            value.checked_mul(256).map(|value| value + u64::from(byte))
        });
    }
    let digits = std::str::from_utf8(field).ok()?.trim_matches(['\0', ' ']);
    if digits.is_empty() {
        return Some(0);
    }
    u64::from_str_radix(digits, 8).ok()
}

/// A field up to its first NUL.
fn text(field: &[u8]) -> String {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(field.get(..end).unwrap_or_default()).into_owned()
}

/// A path without `.`, `..` and leading slashes.
fn normal(path: &str) -> String {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn archives_of_gnu_tar() {
        let dir = tempfile::tempdir().unwrap();
        let long = format!("{}/{}", "d".repeat(120), "f".repeat(150));
        std::fs::create_dir_all(dir.path().join("in/sub").join("d".repeat(120))).unwrap();
        for (name, content) in [
            ("a", "first"),
            ("sub/b", "second"),
            (&format!("sub/{long}"), "third"),
        ] {
            std::fs::write(dir.path().join("in").join(name), content).unwrap();
        }
        std::os::unix::fs::symlink("../a", dir.path().join("in/sub/link")).unwrap();
        std::os::unix::fs::symlink("loop", dir.path().join("in/loop")).unwrap();
        std::fs::hard_link(dir.path().join("in/a"), dir.path().join("in/z")).unwrap();
        for format in ["gnu", "pax", "posix"] {
            let file = dir.path().join(format!("{format}.tar"));
            let status = Command::new("tar")
                .args(["--format", format, "--sort=name", "-C"])
                .arg(dir.path().join("in"))
                .arg("-cf")
                .arg(&file)
                .arg(".")
                .status()
                .unwrap();
            assert!(status.success());
            let index = TarIndex::open(&file).unwrap();
            for (name, content) in [
                ("a", "first"),
                ("./z", "first"),
                ("sub/b", "second"),
                ("sub/link", "first"),
                (&format!("sub/{long}"), "third"),
            ] {
                let stretch = index.get(name).unwrap();
                assert_eq!(stretch.head(100).unwrap(), content.as_bytes(), "{format}: {name}");
            }
            assert!(index.get("missing").unwrap_err().is_not_found());
            assert!(index.get("loop").unwrap_err().to_string().contains("circles"));

            let mut bytes = std::fs::read(&file).unwrap();
            bytes.truncate(700);
            std::fs::write(&file, &bytes).unwrap();
            let cut = TarIndex::open(&file);
            assert!(
                cut.is_err() || cut.unwrap().get("a").is_err(),
                "{format}: cut archive read"
            );
        }
    }

    #[test]
    fn compressed_archives_say_so() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[0x1f, 0x8b, 8, 0, 0]).unwrap();
        let error = TarIndex::open(file.path()).unwrap_err().to_string();
        assert!(error.contains("compressed"), "{error}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_scanned_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&bytes).unwrap();
            let _ = TarIndex::open(file.path());
            if let Some(Some(header)) = Header::new(&bytes) {
                prop_assert!(header.name.len() <= 3 * 256);
            }
            Extra::default().pax(&bytes);
        }
    }
}
