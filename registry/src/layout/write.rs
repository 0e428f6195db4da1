//! Writing OCI layouts: blobs appear under their digest only when they are whole and checked, the index is replaced in one
//! step, and a lock on `oci-layout` keeps two writers of the index apart. A killed writer leaves nothing but whole blobs.

use std::collections::HashMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::TryStreamExt;
use oci_spec::image::{Descriptor, ImageIndex, MediaType};
use peel_image::{Digest, Hasher};

use super::{MAX_INDEX, REF_NAME, blob_name, parse_index, read_small, tag_of};
use crate::error::Error;
use crate::nameless::Nameless;
use crate::source::blocking;
use crate::target::ByteSource;
use crate::transfer::file::Stretch;

/// Content of `oci-layout` (image-layout.md, "oci-layout file").
const LAYOUT_VERSION: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;
/// How long another writer of the same layout may hold its lock, which it does for milliseconds.
const LOCK_DEADLINE: Duration = Duration::from_secs(30);
/// Bytes gathered before they are written, so that the disk is not asked for every network packet.
const WRITE_AT: usize = 1 << 20;

/// A layout to write into.
#[derive(Debug, Clone)]
pub(crate) struct LayoutWriter {
    dir: PathBuf,
}

impl LayoutWriter {
    /// Opens `dir`, making it a layout if it is empty or not there.
    pub(crate) fn open(dir: &Path) -> Result<Self, Error> {
        let marker = dir.join("oci-layout");
        if !marker.exists() {
            let foreign = |error: std::io::Error| error.kind() != ErrorKind::NotFound;
            match std::fs::read_dir(dir).map(|mut entries| entries.next().is_some()) {
                // Asked again: another writer may have begun the layout since.
                Ok(true) if !marker.exists() && !dir.join("index.json").exists() => {
                    return Err(Error::layout(
                        dir,
                        "is neither empty nor an OCI layout: not written to",
                    ));
                }
                Err(error) if foreign(std::io::Error::from(error.kind())) => {
                    return Err(Error::file(dir, "cannot be read")(error));
                }
                _ => {}
            }
        }
        let make = |dir: &Path| {
            DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(dir)
                .map_err(Error::file(dir, "cannot be made"))
        };
        make(dir)?;
        // The marker comes first, so that a directory with anything in it is never ours without it.
        if !marker.exists() {
            std::fs::write(&marker, LAYOUT_VERSION).map_err(Error::file(&marker, "cannot be written"))?;
        }
        make(&dir.join("blobs/sha256"))?;
        Ok(Self {
            dir: dir.to_path_buf(),
        })
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(blob_name(digest))
    }

    /// Whether the blob is there with this size.
    pub(crate) fn has(&self, digest: &Digest, size: u64) -> bool {
        std::fs::metadata(self.blob_path(digest))
            .is_ok_and(|metadata| metadata.is_file() && metadata.len() == size)
    }

    /// Begins a blob whose digest is not known yet. Blocks on the disk.
    pub(crate) fn begin(&self) -> Result<GrowingBlob, Error> {
        let dir = self.dir.join("blobs/sha256");
        let file = Nameless::new_in(&dir).map_err(Error::file(dir, "cannot be written"))?;
        Ok(GrowingBlob {
            writer: self.clone(),
            parts: Some((file, Hasher::new())),
            size: 0,
            waiting: Vec::new(),
            gathered: 0,
        })
    }

    /// Writes a blob from a stream, checks it, and names it.
    pub(crate) async fn put(&self, digest: Digest, size: u64, mut stream: ByteSource) -> Result<(), Error> {
        let writer = self.clone();
        let mut blob = blocking(move || writer.begin()).await?;
        while let Some(part) = stream.try_next().await? {
            blob.write(part).await?;
            if blob.size > size {
                break;
            }
        }
        blob.finish(digest, size).await.map(drop)
    }

    /// Writes a blob that is in memory. Blocks on the disk.
    pub(crate) fn put_bytes(&self, bytes: &[u8]) -> Result<Digest, Error> {
        let digest = Digest::of(bytes);
        if !self.has(&digest, bytes.len() as u64) {
            self.replace(&self.blob_path(&digest), bytes, false)?;
        }
        Ok(digest)
    }

    /// Writes a manifest or index, and enters it in the layout's index under `tag`, where it replaces what had that tag before
    /// (without a tag: what had none). Blocks on the disk.
    pub(crate) fn tag(&self, bytes: &[u8], media_type: &str, tag: Option<&str>) -> Result<Digest, Error> {
        let digest = self.put_bytes(bytes)?;
        let fail = |reason: String| Error::layout(&self.dir, reason);
        let oci_digest: oci_spec::image::Digest = digest
            .to_string()
            .parse()
            .map_err(|error| fail(format!("digest {digest}: {error}")))?;
        let mut descriptor = Descriptor::new(MediaType::from(media_type), bytes.len() as u64, oci_digest);
        if let Some(tag) = tag {
            descriptor.set_annotations(Some(HashMap::from([(REF_NAME.to_owned(), tag.to_owned())])));
        }
        let _lock = self.lock()?;
        let path = self.dir.join("index.json");
        let mut index = match Stretch::whole(&path) {
            Ok(stretch) => parse_index(&self.dir, &read_small(&stretch, MAX_INDEX)?)?,
            Err(error) if error.is_not_found() => ImageIndex::default(),
            Err(error) => return Err(error),
        };
        index.set_schema_version(oci_spec::image::SCHEMA_VERSION);
        if index.media_type().is_none() {
            index.set_media_type(Some(MediaType::ImageIndex));
        }
        let mut manifests = index.manifests().clone();
        manifests.retain(|known| tag_of(known) != tag);
        manifests.push(descriptor);
        index.set_manifests(manifests);
        let text = serde_json::to_vec(&index).map_err(|error| fail(format!("index.json: {error}")))?;
        self.replace(&path, &text, true)?;
        Ok(digest)
    }

    /// Waits for other writers of the index. The lock ends with the file that is returned.
    fn lock(&self) -> Result<File, Error> {
        let path = self.dir.join("oci-layout");
        let file = OpenOptions::new()
            .read(true)
            .open(&path)
            .map_err(Error::file(&path, "cannot be opened"))?;
        let deadline = Instant::now() + LOCK_DEADLINE;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(std::fs::TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(std::fs::TryLockError::WouldBlock) => {
                    return Err(Error::layout(
                        &self.dir,
                        "another process has been writing to it for too long",
                    ));
                }
                Err(std::fs::TryLockError::Error(error)) => {
                    return Err(Error::file(&path, "cannot be locked")(error));
                }
            }
        }
    }

    /// Replaces `path` in one step.
    fn replace(&self, path: &Path, bytes: &[u8], sync: bool) -> Result<(), Error> {
        let dir = path.parent().unwrap_or(&self.dir);
        let mut file = Nameless::new_in(dir).map_err(Error::file(dir, "cannot be written"))?;
        let written = file
            .write_all(bytes)
            .and_then(|()| if sync { file.sync() } else { Ok(()) })
            .and_then(|()| file.name(path));
        written.map_err(Error::file(path, "cannot be written"))
    }
}

/// A blob that is being written. Dropped, it leaves nothing.
#[derive(Debug)]
pub(crate) struct GrowingBlob {
    writer: LayoutWriter,
    /// The file and the hash of what is in it; `None` after an error.
    parts: Option<(Nameless, Hasher)>,
    /// Bytes so far.
    size: u64,
    waiting: Vec<Bytes>,
    gathered: usize,
}

impl GrowingBlob {
    /// Takes the next bytes.
    pub(crate) async fn write(&mut self, bytes: Bytes) -> Result<(), Error> {
        self.size += bytes.len() as u64;
        self.gathered += bytes.len();
        self.waiting.push(bytes);
        if self.gathered >= WRITE_AT {
            self.flush().await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), Error> {
        let dir = self.writer.dir.clone();
        let failed = || Error::layout(&self.writer.dir, "a blob could not be written before");
        let (mut file, mut hasher) = self.parts.take().ok_or_else(failed)?;
        let batch = std::mem::take(&mut self.waiting);
        self.gathered = 0;
        let parts = blocking(move || {
            for piece in batch {
                hasher.update(&piece);
                file.write_all(&piece)
                    .map_err(Error::file(&dir, "cannot be written"))?;
            }
            Ok((file, hasher))
        })
        .await?;
        self.parts = Some(parts);
        Ok(())
    }

    /// Checks the blob and names it; `false` if it was there already.
    pub(crate) async fn finish(mut self, digest: Digest, size: u64) -> Result<bool, Error> {
        self.flush().await?;
        let (place, what) = (self.writer.dir.display().to_string(), format!("blob {digest}"));
        if self.size != size {
            return Err(Error::SizeMismatch {
                place,
                what,
                expected: size,
                actual: self.size,
            });
        }
        let failed = || Error::layout(&self.writer.dir, "a blob could not be written before");
        let (file, hasher) = self.parts.take().ok_or_else(failed)?;
        let actual = hasher.finish();
        if actual != digest {
            return Err(Error::DigestMismatch {
                place,
                what,
                expected: digest,
                actual,
            });
        }
        let writer = self.writer;
        blocking(move || {
            let there = writer.has(&digest, size);
            if !there {
                let path = writer.blob_path(&digest);
                file.name(&path).map_err(Error::file(path, "cannot be written"))?;
            }
            Ok(!there)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use peel_image::media;

    use super::super::Layout;
    use super::*;

    #[tokio::test]
    async fn tags_replace_and_blobs_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("new/layout");
        let writer = LayoutWriter::open(&dir).unwrap();
        let (first, second) = (b"{\"a\":1}", b"{\"b\":2}");
        for (bytes, tag) in [
            (first, Some("one")),
            (second, Some("one")),
            (first, Some("two")),
            (first, None),
            (second, None),
        ] {
            let digest = writer.tag(bytes, media::OCI_MANIFEST, tag).unwrap();
            assert_eq!(digest, Digest::of(bytes));
        }
        let layout = Layout::open_dir(&dir).unwrap();
        let digest = |tag| layout.find(tag).unwrap().digest().to_string();
        assert_eq!(digest(Some("one")), Digest::of(second).to_string());
        assert_eq!(digest(Some("two")), Digest::of(first).to_string());
        assert_eq!(
            digest(Some(&Digest::of(second).to_string())),
            Digest::of(second).to_string()
        );
        let error = layout.find(None).unwrap_err().to_string();
        assert!(error.contains("several") && error.contains("one, two"), "{error}");
        assert!(layout.find(Some("three")).is_err());

        let data = Bytes::from_static(b"content");
        let put = |digest, size| {
            writer.put(
                digest,
                size,
                crate::transfer::ByteStream::memory(data.clone())
                    .into_stream()
                    .boxed(),
            )
        };
        put(Digest::of(&data), 7).await.unwrap();
        assert!(writer.has(&Digest::of(&data), 7) && !writer.has(&Digest::of(&data), 8));
        let wrong = Digest::of(b"other");
        assert!(matches!(put(wrong, 7).await, Err(Error::DigestMismatch { .. })));
        for size in [6, 8] {
            assert!(
                matches!(put(wrong, size).await, Err(Error::SizeMismatch { .. })),
                "{size}"
            );
        }
        assert!(!writer.has(&wrong, 7));
        let left = std::fs::read_dir(dir.join("blobs/sha256")).unwrap().count();
        assert_eq!(left, 3, "temporary files are left behind");
    }

    #[test]
    fn writers_at_once_lose_no_tag() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for number in 0..16 {
                let dir = dir.path();
                scope.spawn(move || {
                    let writer = LayoutWriter::open(dir).unwrap();
                    let bytes = format!("{{\"n\":{number}}}");
                    let tag = format!("tag{number}");
                    writer
                        .tag(bytes.as_bytes(), media::OCI_MANIFEST, Some(&tag))
                        .unwrap();
                });
            }
        });
        let layout = Layout::open_dir(dir.path()).unwrap();
        for number in 0..16 {
            layout.find(Some(&format!("tag{number}"))).unwrap();
        }
    }

    #[test]
    fn other_directories_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("precious"), "x").unwrap();
        let error = LayoutWriter::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("neither empty"), "{error}");
    }
}
