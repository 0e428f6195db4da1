//! Blobs in local files: a file of a layout, or a stretch of an archive.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::error::Error;
use crate::options::Counters;

/// Bytes read at once, so that a reader does not wait long and the blocking pool is not asked too often.
const PIECE: u64 = 256 << 10;

/// A stretch of a file.
#[derive(Debug, Clone)]
pub(crate) struct Stretch {
    pub(crate) path: Arc<PathBuf>,
    /// Offset in the file in bytes.
    pub(crate) start: u64,
    /// Length in bytes.
    pub(crate) size: u64,
}

impl Stretch {
    /// All of a file. An error if it is not a regular file.
    pub(crate) fn whole(path: &Path) -> Result<Self, Error> {
        let metadata = std::fs::metadata(path).map_err(Error::file(path, "cannot be read"))?;
        if !metadata.is_file() {
            return Err(Error::layout(path, "is not a regular file"));
        }
        Ok(Self {
            path: Arc::new(path.to_path_buf()),
            start: 0,
            size: metadata.len(),
        })
    }

    /// The first bytes, at most `limit`.
    pub(crate) fn head(&self, limit: usize) -> Result<Vec<u8>, Error> {
        let length = usize::try_from(self.size).unwrap_or(usize::MAX).min(limit);
        let mut bytes = vec![0; length];
        let path = self.path.as_path();
        let file = File::open(path).map_err(Error::file(path, "cannot be opened"))?;
        file.read_exact_at(&mut bytes, self.start)
            .map_err(Error::file(path, "cannot be read"))?;
        Ok(bytes)
    }

    /// The bytes of `range`, which must lie in the stretch.
    pub(crate) async fn stream(
        &self,
        range: Range<u64>,
        counters: Arc<Counters>,
    ) -> Result<FileStream, Error> {
        let path = Arc::clone(&self.path);
        let file = blocking(&self.path, move || File::open(path.as_path())).await?;
        Ok(FileStream {
            file: Arc::new(file),
            path: Arc::clone(&self.path),
            next: self.start + range.start,
            end: self.start + range.end,
            counters,
        })
    }
}

/// A range of a file on its way.
#[derive(Debug)]
pub(crate) struct FileStream {
    file: Arc<File>,
    path: Arc<PathBuf>,
    next: u64,
    end: u64,
    counters: Arc<Counters>,
}

impl FileStream {
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let length = (self.end - self.next).min(PIECE);
        if length == 0 {
            return Ok(None);
        }
        let (file, offset) = (Arc::clone(&self.file), self.next);
        let piece = blocking(&self.path, move || {
            let mut piece = vec![0; usize::try_from(length).unwrap_or(0)];
            file.read_exact_at(&mut piece, offset)?;
            Ok(piece)
        })
        .await?;
        self.next += length;
        self.counters.add_bytes(piece.len());
        Ok(Some(piece.into()))
    }
}

async fn blocking<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(std::io::Error::other(error)))
        .map_err(Error::file(path, "cannot be read"))
}
