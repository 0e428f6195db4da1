//! Where bytes rest (skeleton of the contract).
#![allow(clippy::todo, missing_debug_implementations, clippy::unused_async)]

pub mod erofs;

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use peel_image::Digest;
use peel_image::layer::{Chunk, LayerIndex};

/// Why the store could not do something; names the file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Replaced by the real variants.
    #[error("placeholder")]
    Placeholder,
}

/// One store directory. Cheap to clone; used by one server process at a time (see [`Store::lock`]).
#[derive(Debug, Clone)]
pub struct Store;

/// An object that is being written; nothing is visible before it is finished. Implements `std::io::Write` and hashes
/// what passes.
#[derive(Debug)]
pub struct ObjectWriter;

/// An object some of whose chunks are missing: a sparse file and a chunk map. Shared by all who read it.
#[derive(Debug)]
pub struct PartialObject;

/// What the store knows of an image that it has seen before: enough to mount it again without a request.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct ImageRecord {
    /// Digest of the platform's manifest.
    pub manifest_digest: Digest,
    /// The manifest, byte for byte.
    pub manifest: Vec<u8>,
    /// The configuration, byte for byte.
    pub config: Vec<u8>,
    /// For each layer, lowest first, its blob digest; the index is kept by that name.
    pub layers: Vec<Digest>,
}

impl Store {
    /// Opens the store in `root`, made if it is not there (mode 0700). Does not lock it.
    pub fn open(_root: &Path) -> Result<Self, Error> {
        todo!()
    }

    /// Takes the store for this process, recovers from a crash or power loss, clears what half-finished work left.
    /// The lock ends with the process. An error when another process has it.
    pub fn lock(&self) -> Result<(), Error> {
        todo!()
    }

    /// Makes everything durable (syncfs) and marks the store as cleanly closed.
    pub fn checkpoint(&self) -> Result<(), Error> {
        todo!()
    }

    /// The directory given to [`Store::open`].
    pub fn root(&self) -> &Path {
        todo!()
    }

    /// Directory of complete objects (`ab/cdef...` below it): an overlay data layer.
    pub fn objects_dir(&self) -> PathBuf {
        todo!()
    }

    /// Name of an object below the objects directory: `ab/cdef...`.
    pub fn object_name(_digest: &Digest) -> String {
        todo!()
    }

    /// Whether the object is complete.
    pub fn has_object(&self, _digest: &Digest) -> bool {
        todo!()
    }

    /// Starts a new object whose digest is not known or not checked yet.
    pub fn object_writer(&self) -> Result<ObjectWriter, Error> {
        todo!()
    }

    /// Adds an object whose bytes the caller has already hashed to `digest`.
    pub fn add_verified(&self, _digest: &Digest, _bytes: &[u8]) -> Result<(), Error> {
        todo!()
    }

    /// Opens or makes the partial object of a file of `size` bytes with these chunks. Chunks found on disk from an
    /// earlier process count as present but unverified until they have been hashed again. A map on disk with another
    /// chunk list is thrown away.
    pub fn partial(
        &self,
        _digest: &Digest,
        _size: u64,
        _chunks: &[Chunk],
    ) -> Result<Arc<PartialObject>, Error> {
        todo!()
    }

    /// Keeps an image, so that it can be mounted again offline.
    pub fn put_image(&self, _record: &ImageRecord) -> Result<(), Error> {
        todo!()
    }

    /// The image of that manifest, if it is kept.
    pub fn image(&self, _manifest_digest: &Digest) -> Result<Option<ImageRecord>, Error> {
        todo!()
    }

    /// Remembers that `name` (as the user writes it, with the platform) meant that manifest.
    pub fn put_name(&self, _name: &str, _manifest_digest: &Digest) -> Result<(), Error> {
        todo!()
    }

    /// What `name` meant when it was last resolved.
    pub fn name(&self, _name: &str) -> Result<Option<Digest>, Error> {
        todo!()
    }

    /// Keeps the index of a layer by its blob digest.
    pub fn put_layer(&self, _blob: &Digest, _index: &LayerIndex) -> Result<(), Error> {
        todo!()
    }

    /// The index of a layer, if it is kept.
    pub fn layer(&self, _blob: &Digest) -> Result<Option<LayerIndex>, Error> {
        todo!()
    }

    /// The EROFS image for the manifest, if it is kept and whole.
    pub fn erofs_image(&self, _manifest_digest: &Digest) -> Option<PathBuf> {
        todo!()
    }

    /// Writes the EROFS image of an image's tree and returns its path.
    pub fn put_erofs_image(
        &self,
        _manifest_digest: &Digest,
        _tree: &peel_image::tree::Tree,
    ) -> Result<PathBuf, Error> {
        todo!()
    }
}

impl ObjectWriter {
    /// Ends the object and makes it visible. With `expected`, a different digest is an error and nothing appears.
    pub fn finish(self, _expected: Option<&Digest>) -> Result<Digest, Error> {
        todo!()
    }
}

impl std::io::Write for ObjectWriter {
    fn write(&mut self, _data: &[u8]) -> std::io::Result<usize> {
        todo!()
    }

    fn flush(&mut self) -> std::io::Result<()> {
        todo!()
    }
}

/// What the chunk map says of one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkState {
    /// Not here.
    Missing,
    /// Written by an earlier process; must be hashed before a byte of it is exposed.
    Unverified,
    /// Here and verified by this process.
    Present,
}

impl PartialObject {
    /// State of chunk `index` (position in the chunk list).
    pub fn state(&self, _index: usize) -> ChunkState {
        todo!()
    }

    /// Reads the chunk from disk, hashes it and moves it from Unverified to Present (true) or Missing (false).
    pub fn verify(&self, _index: usize) -> Result<bool, Error> {
        todo!()
    }

    /// Writes a chunk that the caller has verified against its digest. Returns true when this was the last missing
    /// one. Writing a chunk twice is harmless.
    pub fn write(&self, _index: usize, _bytes: &[u8]) -> Result<bool, Error> {
        todo!()
    }

    /// Reads bytes of the file; the caller has made sure that all chunks under the range are Present.
    pub fn read(&self, _offset: u64, _length: usize) -> Result<Vec<u8>, Error> {
        todo!()
    }

    /// All chunks are Present: hashes the whole file, renames it to its object name. A digest that differs discards
    /// the data and is an error.
    pub fn complete(&self) -> Result<(), Error> {
        todo!()
    }

    /// The file that holds the bytes.
    pub fn file(&self) -> BorrowedFd<'_> {
        todo!()
    }
}
