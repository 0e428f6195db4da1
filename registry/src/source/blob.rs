//! One blob of a source.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use oci_spec::image::{Descriptor, MediaType};
use peel_image::Digest;

use super::{Inner, blocking, embedded};
use crate::error::Error;
use crate::transfer::ByteStream;
use crate::transfer::http::RemoteBlob;

/// One blob of a source; cheap to clone.
#[derive(Debug, Clone)]
pub struct Blob {
    source: Arc<Inner>,
    digest: Digest,
    size: u64,
    /// The bytes, if the descriptor brought them along (image specification, "Embedded Content").
    data: Option<Bytes>,
    /// The media type of a layer that the place need not have.
    foreign: Option<Arc<str>>,
    /// The bytes must come as ranges, or not at all.
    only_ranges: bool,
}

impl Blob {
    pub(crate) fn new(source: &Arc<Inner>, descriptor: &Descriptor) -> Result<Self, Error> {
        let media_type = descriptor.media_type();
        let digest = source.digest(descriptor)?;
        Ok(Self {
            source: Arc::clone(source),
            digest,
            size: descriptor.size(),
            data: embedded(descriptor, digest),
            foreign: is_foreign(media_type).then(|| media_type.as_ref().into()),
            only_ranges: false,
        })
    }

    /// The same blob for readers who can do without ranges: [`Error::NoRanges`] where the registry sends the whole blob when it is
    /// asked for a part. Such an answer is kept for a short time for whoever then reads the whole.
    pub fn only_ranges(&self) -> Self {
        Self {
            only_ranges: true,
            ..self.clone()
        }
    }

    /// Digest by the descriptor.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Size by the descriptor, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The registry that the blob is read from (host and port as users write them); `None` for local places.
    pub fn registry(&self) -> Option<&str> {
        Some(&self.source.session()?.place.registry)
    }

    /// The repository that the blob is read from, if it is one of that registry (host and port as users write them).
    pub(crate) fn repository_in(&self, registry: &str) -> Option<&str> {
        let place = &self.source.session()?.place;
        (place.registry == registry).then_some(place.repository.as_str())
    }

    /// The bytes of `range` of the blob, once the first answer is there. Not verified: a range cannot be. An empty range makes no
    /// request; one that ends behind the blob is an error. Where the registry sends the whole blob when it is asked for a part, the blob
    /// is fetched once into a temporary file and its parts come from there.
    pub async fn stream(&self, range: Range<u64>) -> Result<ByteStream, Error> {
        if range.start > range.end || range.end > self.size {
            return Err(Error::Range {
                digest: self.digest,
                start: range.start,
                end: range.end,
                size: self.size,
            });
        }
        if range.is_empty() {
            return Ok(ByteStream::memory(Bytes::new()));
        }
        if let Some(data) = &self.data {
            let bounds = (usize::try_from(range.start), usize::try_from(range.end));
            if let (Ok(start), Ok(end)) = bounds
                && end <= data.len()
            {
                return Ok(ByteStream::memory(data.slice(start..end)));
            }
        }
        if let Some(session) = self.source.session() {
            let remote = RemoteBlob {
                session: Arc::clone(session),
                digest: self.digest,
                size: self.size,
            };
            let stream = remote.stream(range, self.only_ranges).await;
            return stream.map_err(|error| self.outside(error));
        }
        let (source, digest) = (Arc::clone(&self.source), self.digest);
        let stretch = blocking(move || source.stretch(&digest)).await;
        let stretch = stretch.map_err(|error| self.outside(error))?;
        if stretch.size != self.size {
            return Err(Error::SizeMismatch {
                place: self.source.place().to_owned(),
                what: format!("blob {}", self.digest),
                expected: self.size,
                actual: stretch.size,
            });
        }
        let counters = Arc::clone(self.source.counters());
        Ok(ByteStream::file(stretch.stream(range, counters).await?))
    }

    /// What an error means for a layer whose bytes may lie elsewhere. Its `urls` are never followed.
    fn outside(&self, error: Error) -> Error {
        match &self.foreign {
            Some(media_type) if error.is_not_found() || matches!(error, Error::Layout { .. }) => {
                Error::Foreign {
                    place: self.source.place().to_owned(),
                    digest: self.digest.to_string(),
                    media_type: media_type.to_string(),
                }
            }
            _ => error,
        }
    }

    /// The whole blob; its end is an error if the bytes do not hash to the blob's digest. What came before that end must
    /// not be used until then.
    pub async fn stream_verified(&self) -> Result<ByteStream, Error> {
        let stream = self.stream(0..self.size).await?;
        Ok(stream.verified(self.digest, self.source.place().to_owned()))
    }

    /// The bytes of `range`, whole, in memory.
    pub async fn read(&self, range: Range<u64>) -> Result<Bytes, Error> {
        let length = range.end.saturating_sub(range.start);
        let stream = self.stream(range).await?;
        stream.collect(first_reserve(length)).await
    }

    /// The whole blob in memory, its digest checked; an error if it is larger than `limit` bytes.
    pub async fn read_verified(&self, limit: u64) -> Result<Bytes, Error> {
        if self.size > limit {
            return Err(Error::TooLarge {
                place: self.source.place().to_owned(),
                what: format!("blob {}", self.digest),
                limit,
            });
        }
        let stream = self.stream_verified().await?;
        stream.collect(first_reserve(self.size)).await
    }
}

/// Memory to reserve for `length` bytes that have not come yet: a descriptor that lies about its size costs no more than this.
fn first_reserve(length: u64) -> usize {
    usize::try_from(length.min(32 << 20)).unwrap_or(0)
}

/// Layers that a registry need not have: "non-distributable" in OCI, "foreign" in Docker.
fn is_foreign(media_type: &MediaType) -> bool {
    let text = media_type.as_ref();
    text.starts_with("application/vnd.oci.image.layer.nondistributable.")
        || text.starts_with("application/vnd.docker.image.rootfs.foreign.")
}
