//! Where images are written to: a repository in a registry, or an OCI layout. `convert` and `optimize` push layers, configuration and
//! manifest in that order; a blob that is there already is not sent again.

mod push;
mod upload;

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use peel_image::Digest;

use crate::error::Error;
use crate::layout::write::LayoutWriter;
use crate::name::ImageName;
use crate::options::{ClientOptions, Counters};
use crate::source::blob::Blob;
use crate::source::blocking;
use crate::transfer::ByteStream;
use crate::transfer::file::Stretch;
use push::Push;
pub use upload::BlobUpload;

/// Bytes on their way into a target.
pub(crate) type ByteSource = BoxStream<'static, Result<Bytes, Error>>;

/// A place where an image is written to. Cheap to clone; clones may upload at the same time.
#[derive(Debug, Clone)]
pub struct Target {
    home: Home,
    counters: Arc<Counters>,
}

#[derive(Debug, Clone)]
enum Home {
    Registry(Arc<Push>),
    Layout {
        writer: LayoutWriter,
        tag: Option<String>,
    },
}

/// Where the bytes of a new blob come from. All but [`Upload::Stream`] can be read again from any place, which is what it
/// takes to go on after a broken connection if the registry has lost what was sent.
pub enum Upload {
    /// Memory.
    Bytes(Bytes),
    /// All of a file.
    File(PathBuf),
    /// A blob of some source.
    Blob(Blob),
    /// Something that is being made.
    Stream(BoxStream<'static, Result<Bytes, Error>>),
}

impl std::fmt::Debug for Upload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "Bytes({})", bytes.len()),
            Self::File(path) => write!(f, "File({})", path.display()),
            Self::Blob(blob) => write!(f, "Blob({})", blob.digest()),
            Self::Stream(_) => f.write_str("Stream"),
        }
    }
}

impl Upload {
    /// The bytes from `offset` to `size`; `None` if they cannot be had again.
    pub(crate) async fn read(&self, offset: u64, size: u64) -> Result<Option<ByteSource>, Error> {
        Ok(match self {
            Self::Bytes(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                Some(ByteStream::memory(bytes.slice(start..)).into_stream().boxed())
            }
            Self::File(path) => {
                let path = path.clone();
                let stretch = blocking(move || Stretch::whole(&path)).await?;
                if stretch.size != size {
                    return Err(Error::SizeMismatch {
                        place: stretch.path.display().to_string(),
                        what: "file to upload".to_owned(),
                        expected: size,
                        actual: stretch.size,
                    });
                }
                let stream = stretch.stream(offset..size, Arc::default()).await?;
                Some(ByteStream::file(stream).into_stream().boxed())
            }
            Self::Blob(blob) => Some(blob.stream(offset..size).await?.into_stream().boxed()),
            Self::Stream(_) => None,
        })
    }
}

impl Target {
    /// Opens the place that `name` names; a layout is made if it is not there. No request is made yet. Archives cannot be written to.
    pub async fn open(name: &ImageName, options: &ClientOptions) -> Result<Self, Error> {
        match name.clone() {
            ImageName::Registry(reference) => {
                let push = Push::new(reference, options);
                let counters = Arc::clone(push.counters());
                Ok(Self {
                    home: Home::Registry(Arc::new(push)),
                    counters,
                })
            }
            ImageName::Layout { dir, tag } => {
                let writer = blocking(move || LayoutWriter::open(&dir)).await?;
                Ok(Self {
                    home: Home::Layout { writer, tag },
                    counters: Arc::default(),
                })
            }
            ImageName::OciArchive { .. } | ImageName::DockerArchive { .. } => Err(Error::ReadOnly {
                name: name.to_string(),
            }),
        }
    }

    /// What this target has sent so far. Nothing is counted for layouts.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Whether the blob is there already.
    pub async fn has_blob(&self, digest: &Digest, size: u64) -> Result<bool, Error> {
        match &self.home {
            Home::Registry(push) => push.has(digest, size).await,
            Home::Layout { writer, .. } => {
                let (writer, digest) = (writer.clone(), *digest);
                blocking(move || Ok(writer.has(&digest, size))).await
            }
        }
    }

    /// Asks the registry to take the blob from another of its repositories; `false` if it does not, and the blob has to be sent. Always
    /// `false` for layouts.
    pub async fn mount_blob(&self, digest: &Digest, from_repository: &str) -> Result<bool, Error> {
        match &self.home {
            Home::Registry(push) => push.mount(digest, from_repository).await,
            Home::Layout { .. } => Ok(false),
        }
    }

    /// Sends a blob of known digest and size; `false` if it was there already and nothing was sent. A blob of another repository of
    /// the same registry is taken over from there if the registry allows it (cross-repository mount), which counts as there
    /// already. The receiver checks the digest.
    pub async fn push_blob(&self, digest: Digest, size: u64, upload: Upload) -> Result<bool, Error> {
        if self.has_blob(&digest, size).await? {
            return Ok(false);
        }
        if let (Home::Registry(push), Upload::Blob(blob)) = (&self.home, &upload)
            && blob.digest() == digest
            && let Some(from) = blob.repository_in(push.registry())
            && push.mount_or_not(&digest, from).await
        {
            return Ok(false);
        }
        match &self.home {
            Home::Registry(push) => push.send(digest, size, upload).await?,
            Home::Layout { writer, .. } => {
                let bytes = match upload {
                    Upload::Stream(stream) => stream,
                    upload => {
                        let bytes = upload.read(0, size).await?;
                        bytes.unwrap_or_else(|| futures::stream::empty().boxed())
                    }
                };
                writer.put(digest, size, bytes).await?;
            }
        }
        Ok(true)
    }

    /// Sends bytes, for instance a configuration, and gives their digest.
    pub async fn push_bytes(&self, bytes: Bytes) -> Result<Digest, Error> {
        let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
        self.push_blob(digest, size, Upload::Bytes(bytes)).await?;
        Ok(digest)
    }

    /// Writes the manifest or index that the target's name shall name. Everything that it refers to must be there.
    pub async fn put_manifest(&self, bytes: Bytes, media_type: &str) -> Result<Digest, Error> {
        match &self.home {
            Home::Registry(push) => push.put_manifest(bytes, media_type, true).await,
            Home::Layout { writer, tag } => {
                let (writer, tag, media_type) = (writer.clone(), tag.clone(), media_type.to_owned());
                blocking(move || writer.tag(&bytes, &media_type, tag.as_deref())).await
            }
        }
    }

    /// Writes a manifest that only an index refers to: it gets no tag.
    pub async fn put_untagged_manifest(&self, bytes: Bytes, media_type: &str) -> Result<Digest, Error> {
        match &self.home {
            Home::Registry(push) => push.put_manifest(bytes, media_type, false).await,
            Home::Layout { writer, .. } => {
                let writer = writer.clone();
                blocking(move || writer.put_bytes(&bytes)).await
            }
        }
    }
}
