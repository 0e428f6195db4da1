//! A blob that is written into a target while it is being made. The converter begins one per layer.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use peel_image::Digest;

use super::push::pieces::Pieces;
use super::{Home, Target};
use crate::error::Error;
use crate::layout::write::GrowingBlob;
use crate::source::blocking;

/// A blob on its way into a target whose digest and size are known only at its end. At most one piece of it (8 MiB, or what the
/// registry demands, up to 64 MiB) is held in memory; [`BlobUpload::write`] waits while that is on its way. Drop it, or
/// better [`BlobUpload::abort`] it, to give it up: nothing of it shows in the target then.
#[derive(Debug)]
pub struct BlobUpload {
    going: Going,
}

enum Going {
    Registry(Box<Pieces>),
    Layout(GrowingBlob),
}

impl fmt::Debug for Going {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Registry(_) => "Registry",
            Self::Layout(_) => "Layout",
        })
    }
}

impl Target {
    /// Begins a blob whose digest and size are not known yet. No request is made before there is more than a piece of it.
    pub async fn begin_blob(&self) -> Result<BlobUpload, Error> {
        self.begin(false).await
    }

    /// The same for a registry that has lost uploads in pieces: the blob is gathered in a temporary file and sent at its end.
    pub async fn begin_whole_blob(&self) -> Result<BlobUpload, Error> {
        self.begin(true).await
    }

    async fn begin(&self, whole: bool) -> Result<BlobUpload, Error> {
        let going = match &self.home {
            Home::Registry(push) => {
                let what = "upload of a new blob".to_owned();
                let pieces = Pieces::new(Arc::clone(push), what, None);
                Going::Registry(Box::new(if whole { pieces.whole() } else { pieces }))
            }
            Home::Layout { writer, .. } => {
                let writer = writer.clone();
                Going::Layout(blocking(move || writer.begin()).await?)
            }
        };
        Ok(BlobUpload { going })
    }
}

impl BlobUpload {
    /// Takes the next bytes. [`Error::UploadLost`] means that the registry has forgotten the bytes before them: whoever makes
    /// them may begin again with another upload.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), Error> {
        match &mut self.going {
            Going::Registry(pieces) => pieces.write(bytes).await,
            Going::Layout(blob) => blob.write(bytes).await,
        }
    }

    /// Names the blob; `false` if the target had one of that name already and this one was given up. The receiver checks the digest. Errors
    /// as for [`BlobUpload::write`].
    pub async fn finish(self, digest: Digest, size: u64) -> Result<bool, Error> {
        match self.going {
            Going::Registry(pieces) => pieces.finish(digest, size).await,
            Going::Layout(blob) => blob.finish(digest, size).await,
        }
    }

    /// Gives the blob up and has the registry forget what it has of it.
    pub async fn abort(self) {
        match self.going {
            Going::Registry(pieces) => pieces.abort().await,
            Going::Layout(blob) => drop(blob),
        }
    }
}
