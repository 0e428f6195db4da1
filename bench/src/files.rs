//! Trees of files that are the same in every run. Called by [`crate::image`] and by the baselines.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use peel_image::layer::Metadata;
use peel_image::tar::TarKind;
use peel_image::tar::write::{NewEntry, Writer};

/// Modification time of everything.
const MTIME: i64 = 1_700_000_000;
/// Bytes of text that contents are cut from.
const POOL: usize = 1 << 20;
/// Longest piece of the pool that is copied at once. Text of some hundred words compresses about as well as program
/// sources do.
const PIECE: u64 = 400;
/// Files per directory.
const PER_DIRECTORY: usize = 500;

/// Pseudorandom numbers: xorshift64* by S. Vigna. Not for secrets.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The sequence that belongs to `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn next_number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    /// A number below `end`, which must not be 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next_number() % end
    }
}

/// What files hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Words; compresses to about a third.
    Text,
    /// Does not compress.
    Noise,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Path in the tree, without a leading slash.
    pub path: String,
    /// Length in bytes.
    pub size: u64,
}

/// A tree of directories with files.
#[derive(Debug, Clone)]
pub struct Files {
    /// Directories, all of them in the root.
    pub directories: Vec<String>,
    /// Files, directory by directory.
    pub files: Vec<File>,
    kind: Kind,
    pool: Vec<u8>,
}

impl Files {
    /// `count` files whose sizes lie between `min` and `max` bytes, 500 in a directory.
    pub fn new(count: usize, min: u64, max: u64, kind: Kind) -> Self {
        let mut random = Random::new(1);
        let directories = count.div_ceil(PER_DIRECTORY);
        let file = |number: usize| File {
            path: format!(
                "d{:03}/file-{:03}",
                number / PER_DIRECTORY,
                number % PER_DIRECTORY
            ),
            size: min + random.below(max - min + 1),
        };
        Self {
            directories: (0..directories).map(|number| format!("d{number:03}")).collect(),
            files: (0..count).map(file).collect(),
            kind,
            pool: text_pool(),
        }
    }

    /// The same tree with a directory of `count` large files more, `size` bytes each.
    #[must_use]
    pub fn with_large(mut self, count: usize, size: u64) -> Self {
        self.directories.push("large".to_owned());
        self.files.extend((0..count).map(|number| File {
            path: format!("large/file-{number:03}"),
            size,
        }));
        self
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }

    /// What a file holds. No two files hold the same.
    pub fn content(&self, file: &File) -> Vec<u8> {
        let seed = file.path.bytes().fold(file.size, |seed, byte| {
            seed.wrapping_mul(0x0100_0000_01b3) ^ u64::from(byte)
        });
        let mut random = Random::new(seed);
        let length = usize::try_from(file.size).unwrap_or(usize::MAX);
        let mut content = file.path.clone().into_bytes();
        content.reserve(length);
        while content.len() < length {
            match self.kind {
                Kind::Noise => content.extend_from_slice(&random.next_number().to_le_bytes()[..7]),
                Kind::Text => {
                    let piece = usize::try_from(1 + random.below(PIECE)).unwrap_or_default();
                    let start = usize::try_from(random.next_number()).unwrap_or_default() % (POOL - piece);
                    content.extend(self.pool.iter().skip(start).take(piece));
                }
            }
        }
        content.truncate(length);
        content
    }

    /// The tree as a tar stream.
    pub fn write_tar<W: Write>(&self, stream: W) -> anyhow::Result<W> {
        let mut tar = Writer::new(stream);
        let mut append = |name: &str, mode, kind: &TarKind, content: &[u8]| {
            let entry = NewEntry {
                name: name.as_bytes(),
                metadata: &Metadata {
                    mode,
                    mtime: MTIME,
                    ..Metadata::default()
                },
                kind,
                user_name: b"root",
                group_name: b"root",
            };
            tar.append(&entry, &mut &*content)
        };
        for directory in &self.directories {
            append(directory, 0o755, &TarKind::Directory, b"")?;
        }
        for file in &self.files {
            let kind = TarKind::Regular { size: file.size };
            append(&file.path, 0o644, &kind, &self.content(file))?;
        }
        Ok(tar.finish()?)
    }

    /// The tree as a directory.
    pub fn unpack(&self, root: &Path) -> io::Result<()> {
        for directory in &self.directories {
            fs::create_dir_all(root.join(directory))?;
        }
        for file in &self.files {
            fs::write(root.join(&file.path), self.content(file))?;
        }
        Ok(())
    }
}

/// Text of made-up words, frequent ones first.
fn text_pool() -> Vec<u8> {
    let mut random = Random::new(2);
    let letters = b"etaoinshrdlucmfwypvbgkjqxz";
    let words: Vec<Vec<u8>> = (0..4096)
        .map(|_| {
            let length = 2 + random.below(8);
            let letter = |_| {
                // The smaller of two numbers: frequent letters are frequent.
                let at = random.below(26).min(random.below(26));
                letters
                    .get(usize::try_from(at).unwrap_or_default())
                    .copied()
                    .unwrap_or(b'e')
            };
            (0..length).map(letter).collect()
        })
        .collect();
    let mut pool = Vec::with_capacity(POOL + 16);
    while pool.len() < POOL {
        let range = 1 + random.below(4096);
        let at = usize::try_from(random.below(range)).unwrap_or_default();
        pool.extend(words.get(at).into_iter().flatten());
        pool.push(if random.below(12) == 0 { b'\n' } else { b' ' });
    }
    pool.truncate(POOL);
    pool
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use peel_image::Digest;
    use peel_image::layer::EntryKind;
    use peel_image::tar::index::{HashSink, index_tar};

    use super::*;

    #[test]
    fn a_tar_stream_holds_what_a_directory_holds() {
        for kind in [Kind::Text, Kind::Noise] {
            let files = Files::new(700, 0, 3000, kind);
            let tar = files.write_tar(Vec::new()).unwrap();
            let dir = tempfile::tempdir().unwrap();
            files.unpack(dir.path()).unwrap();
            let (index, _) = index_tar(tar.as_slice(), &mut HashSink::default()).unwrap();
            assert_eq!(index.entries.len(), 702);
            let mut bytes = 0;
            for entry in &index.entries {
                let path = dir.path().join(OsStr::from_bytes(entry.path.as_bytes()));
                let EntryKind::Regular(content) = &entry.kind else {
                    assert!(path.is_dir());
                    continue;
                };
                assert_eq!(content.digest, Some(Digest::of(&fs::read(path).unwrap())));
                bytes += content.size;
            }
            assert_eq!(bytes, files.bytes());
        }
    }

    #[test]
    fn contents_differ_and_stay_the_same() {
        let files = Files::new(600, 100, 200, Kind::Text);
        let all: HashSet<Vec<u8>> = files.files.iter().map(|file| files.content(file)).collect();
        assert_eq!(all.len(), 600);
        let again = Files::new(600, 100, 200, Kind::Text);
        assert!(again.files.iter().all(|file| all.contains(&again.content(file))));
    }
}
