//! What the embedded registry holds: blobs as files named by their sha256, manifests by repository and tag.
//!
//! Called by the request handlers, and directly by the demo and the tests to put content in without HTTP. A blob
//! appears under its name only when it is whole and its digest was checked.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use peel_hash::{Digest, Hasher};

/// A manifest's place: repository, and tag or digest.
type Key = (String, String);

/// Size of the buffer for copying and warming, in bytes.
const BUFFER: usize = 1 << 20;

/// Blobs and manifests.
#[derive(Debug)]
pub struct Content {
    dir: PathBuf,
    manifests: Mutex<BTreeMap<Key, Manifest>>,
}

/// A manifest by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Its media type.
    pub media_type: String,
    /// Its digest; its bytes are the blob of that name.
    pub digest: Digest,
}

impl Content {
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir.join("uploads"))?;
        Ok(Self {
            dir: dir.to_path_buf(),
            manifests: Mutex::default(),
        })
    }

    /// The file of a blob, whether it exists or not.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(digest.hex())
    }

    /// The size of a blob that is here, in bytes.
    pub fn blob_size(&self, digest: &Digest) -> Option<u64> {
        fs::metadata(self.blob_path(digest))
            .ok()
            .map(|metadata| metadata.len())
    }

    /// Adds a blob from memory.
    pub fn put_blob(&self, bytes: &[u8]) -> io::Result<Digest> {
        let mut file = self.upload()?;
        file.write_all(bytes)?;
        let digest = Digest::of(bytes);
        self.finish(file, &digest)?;
        Ok(digest)
    }

    /// Adds a blob from a reader.
    pub fn put_blob_from(&self, mut reader: impl Read) -> io::Result<Digest> {
        let mut file = self.upload()?;
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = reader.read(&mut buffer)?;
            let Some(bytes) = buffer.get(..length).filter(|bytes| !bytes.is_empty()) else {
                break;
            };
            hasher.update(bytes);
            file.write_all(bytes)?;
        }
        let digest = hasher.finish();
        self.finish(file, &digest)?;
        Ok(digest)
    }

    /// Adds a manifest under `reference` (a tag, or its digest) and under its digest.
    pub fn put_manifest(
        &self,
        repository: &str,
        reference: &str,
        media_type: &str,
        bytes: &[u8],
    ) -> io::Result<Digest> {
        let digest = self.put_blob(bytes)?;
        let manifest = Manifest {
            media_type: media_type.into(),
            digest,
        };
        let mut manifests = self.manifests();
        manifests.insert((repository.into(), digest.to_string()), manifest.clone());
        manifests.insert((repository.into(), reference.into()), manifest);
        Ok(digest)
    }

    /// The manifest that `reference` names in that repository.
    pub fn manifest(&self, repository: &str, reference: &str) -> Option<Manifest> {
        self.manifests()
            .get(&(repository.to_owned(), reference.to_owned()))
            .cloned()
    }

    /// The tags of a repository in order.
    pub fn tags(&self, repository: &str) -> Vec<String> {
        let manifests = self.manifests();
        let names = manifests
            .keys()
            .filter(|(name, tag)| name == repository && !tag.contains(':'));
        names.map(|(_, tag)| tag.clone()).collect()
    }

    /// Reads every blob once, so that it is in the page cache: a registry is another machine, and a dropped page cache
    /// on this one must not make it slower.
    pub fn warm(&self) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if !entry.file_type()?.is_file() {
                continue;
            }
            let mut file = File::open(entry.path())?;
            while file.read(&mut buffer)? > 0 {}
        }
        Ok(())
    }

    /// A file to upload into; it vanishes unless [`Content::finish`] is called.
    pub(super) fn upload(&self) -> io::Result<tempfile::NamedTempFile> {
        tempfile::NamedTempFile::new_in(self.dir.join("uploads"))
    }

    /// Names an upload whose digest the caller has checked.
    pub(super) fn finish(&self, file: tempfile::NamedTempFile, digest: &Digest) -> io::Result<()> {
        file.persist(self.blob_path(digest))
            .map_err(|error| error.error)?;
        Ok(())
    }

    fn manifests(&self) -> MutexGuard<'_, BTreeMap<Key, Manifest>> {
        self.manifests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
