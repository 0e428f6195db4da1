//! Bytes of blobs on their way to a reader, from wherever they are.
//!
//! [`ByteStream`] is what a reader sees; [`http`] reads from registries and resumes, [`spool`] keeps blobs of registries
//! that know no ranges, [`file`] from local files and archives.

pub(crate) mod file;
pub(crate) mod http;
pub(crate) mod redirect;
pub(crate) mod spool;

use bytes::{Bytes, BytesMut};
use futures::Stream;
use peel_image::{Digest, Hasher};

use crate::error::Error;

/// The bytes of a range as they arrive, at most some hundred KiB at once. Resumes by itself after a broken connection;
/// ends after exactly the requested length or with an error. Dropping it cancels the transfer.
#[derive(Debug)]
pub struct ByteStream {
    inner: Inner,
    check: Option<Check>,
    failed: bool,
}

#[derive(Debug)]
enum Inner {
    Memory(Option<Bytes>),
    File(file::FileStream),
    Http(Box<http::HttpStream>),
    Spool(spool::SpoolStream),
}

/// What the whole stream must hash to.
#[derive(Debug)]
struct Check {
    hasher: Hasher,
    expected: Digest,
    place: String,
}

impl ByteStream {
    pub(crate) fn memory(bytes: Bytes) -> Self {
        Self::new(Inner::Memory(Some(bytes).filter(|bytes| !bytes.is_empty())))
    }

    pub(crate) fn file(stream: file::FileStream) -> Self {
        Self::new(Inner::File(stream))
    }

    pub(crate) fn http(stream: http::HttpStream) -> Self {
        Self::new(Inner::Http(Box::new(stream)))
    }

    pub(crate) fn spool(stream: spool::SpoolStream) -> Self {
        Self::new(Inner::Spool(stream))
    }

    fn new(inner: Inner) -> Self {
        Self {
            inner,
            check: None,
            failed: false,
        }
    }

    /// Makes the end of the stream an error if its bytes do not hash to `expected`.
    pub(crate) fn verified(mut self, expected: Digest, place: String) -> Self {
        self.check = Some(Check {
            hasher: Hasher::new(),
            expected,
            place,
        });
        self
    }

    /// The next bytes, `None` at the end of the range. After an error there is nothing more.
    pub async fn next(&mut self) -> Option<Result<Bytes, Error>> {
        if self.failed {
            return None;
        }
        let next = match &mut self.inner {
            Inner::Memory(bytes) => Ok(bytes.take()),
            Inner::File(stream) => stream.next().await,
            Inner::Http(stream) => stream.next().await,
            Inner::Spool(stream) => stream.next().await,
        };
        let result = match next {
            Ok(Some(bytes)) => {
                if let Some(check) = &mut self.check {
                    check.hasher.update(&bytes);
                }
                return Some(Ok(bytes));
            }
            Ok(None) => self.check.take().map_or(Ok(()), Check::finish),
            Err(error) => Err(error),
        };
        match result {
            Ok(()) => None,
            Err(error) => {
                self.failed = true;
                Some(Err(error))
            }
        }
    }

    /// All the rest in one piece. `size` is what to reserve at first.
    pub(crate) async fn collect(mut self, size: usize) -> Result<Bytes, Error> {
        let mut whole = BytesMut::new();
        while let Some(part) = self.next().await {
            let part = part?;
            if whole.is_empty() && part.len() >= size {
                return match self.next().await {
                    None => Ok(part),
                    Some(Err(error)) => Err(error),
                    Some(Ok(more)) => {
                        whole.extend_from_slice(&part);
                        whole.extend_from_slice(&more);
                        continue;
                    }
                };
            }
            if whole.is_empty() {
                whole.reserve(size);
            }
            whole.extend_from_slice(&part);
        }
        Ok(whole.freeze())
    }

    /// The same bytes as a `Stream`.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes, Error>> + Send + 'static {
        futures::stream::unfold(self, |mut stream| async move {
            let item = stream.next().await?;
            Some((item, stream))
        })
    }
}

impl Check {
    fn finish(self) -> Result<(), Error> {
        let actual = self.hasher.finish();
        if actual == self.expected {
            return Ok(());
        }
        Err(Error::DigestMismatch {
            place: self.place,
            what: format!("blob {}", self.expected),
            expected: self.expected,
            actual,
        })
    }
}
