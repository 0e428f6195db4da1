//! Uploads of blobs whose end is not known yet: the bytes go up in pieces (PATCH) while they are made, and the digest closes the
//! upload (OCI distribution specification, "Pushing a blob in chunks"). `Target::begin_blob` and streams of `Target::push_blob`
//! end here.
//!
//! A piece is kept in memory until the registry has confirmed it. After a broken connection the registry is asked how much it
//! has, and gets the rest of that piece; so one piece is all that must be kept, and all that a broken connection costs.
//! A registry that has lost what it had confirmed cannot be helped from here: [`Error::UploadLost`] tells whoever makes the
//! bytes to begin again. One that takes no pieces at all gets the blob in one PUT, from a temporary file.
//!
//! A blob of no more than one piece goes up in one PUT at its end, and not at all if the registry has it.

use std::io::{BufWriter, Write};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use peel_image::Digest;
use reqwest::Url;

use super::{Body, Push, Upload, Uploading};
use crate::error::Error;
use crate::nameless::{Nameless, temporary_directory};
use crate::source::blocking;

/// Bytes of a piece: some round trips of a fast link, and little memory.
const PIECE: usize = 8 << 20;
/// Largest piece that a registry may demand with `OCI-Chunk-Min-Length`; one that wants more gets the blob whole.
const MAX_PIECE: usize = 64 << 20;
/// How often a registry may disagree about its offset, without any broken connection, before the upload counts as lost.
const MAX_DISAGREEMENTS: u32 = 3;
/// Answers to a piece by registries that take none, or not another one.
const TAKES_NO_PIECES: [u16; 7] = [400, 404, 405, 411, 415, 416, 501];

/// A blob on its way.
#[derive(Debug)]
pub(crate) struct Pieces {
    push: Arc<Push>,
    what: String,
    /// Bytes that have not been sent.
    waiting: Vec<Bytes>,
    /// Their number.
    length: usize,
    /// Bytes of a piece.
    piece: usize,
    /// All bytes so far.
    size: u64,
    state: State,
    /// Gather everything, even if the registry might take pieces.
    whole: bool,
}

#[derive(Debug)]
enum State {
    /// Nothing was sent. A registry that would not mount the blob has opened an upload instead.
    New(Option<Url>),
    /// Piece by piece.
    Open(Uploading),
    /// Gathered, for a registry that wants all at once.
    Whole(BufWriter<Nameless>),
    /// An upload that failed.
    Failed,
}

impl Pieces {
    pub(crate) fn new(push: Arc<Push>, what: String, opened: Option<Url>) -> Self {
        Self {
            push,
            what,
            waiting: Vec::new(),
            length: 0,
            piece: PIECE,
            size: 0,
            state: State::New(opened),
            whole: false,
        }
    }

    /// Sends all in one PUT, whatever the registry might take.
    pub(crate) fn whole(self) -> Self {
        Self { whole: true, ..self }
    }

    /// Takes the next bytes; sends a piece once there are enough of them.
    pub(crate) async fn write(&mut self, bytes: Bytes) -> Result<(), Error> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.size += bytes.len() as u64;
        self.length += bytes.len();
        self.waiting.push(bytes);
        if self.length < self.piece {
            return Ok(());
        }
        if matches!(self.state, State::New(_)) {
            self.open().await?;
            if self.length < self.piece {
                return Ok(());
            }
        }
        self.send_waiting().await
    }

    /// Opens the upload, now that it is clear that there is more than a piece.
    async fn open(&mut self) -> Result<(), Error> {
        let State::New(opened) = &mut self.state else {
            return Ok(());
        };
        if self.whole {
            self.state = State::Whole(temporary().await?);
            return Ok(());
        }
        let (location, least) = match opened.take() {
            Some(location) => (location, None),
            None => self.push.open(&self.what).await?,
        };
        let least = usize::try_from(least.unwrap_or(0)).unwrap_or(usize::MAX);
        if least > MAX_PIECE {
            tracing::debug!(least, "the registry wants large pieces: it gets the blob whole");
            self.state = State::Whole(temporary().await?);
            return Ok(());
        }
        self.piece = PIECE.max(least);
        self.state = State::Open(Uploading {
            what: self.what.clone(),
            location,
            offset: 0,
        });
        Ok(())
    }

    async fn send_waiting(&mut self) -> Result<(), Error> {
        let parts = std::mem::take(&mut self.waiting);
        self.length = 0;
        // Put back on success only: after an error nothing more can be sent.
        self.state = match std::mem::replace(&mut self.state, State::Failed) {
            State::Open(mut uploading) => match self.push.send_piece(&mut uploading, &parts).await {
                Ok(()) => State::Open(uploading),
                Err(error) if uploading.offset == 0 && takes_no_pieces(&error) => {
                    tracing::debug!(%error, "the registry takes no pieces: it gets the blob whole");
                    self.push.cancel(&uploading).await;
                    State::Whole(append(temporary().await?, parts).await?)
                }
                Err(error) => {
                    self.push.cancel(&uploading).await;
                    return Err(error);
                }
            },
            State::Whole(file) => State::Whole(append(file, parts).await?),
            State::New(_) | State::Failed => {
                let error = self
                    .push
                    .session
                    .protocol(&self.what, "the upload has failed before");
                return Err(error);
            }
        };
        Ok(())
    }

    /// Closes the upload under `digest`; `false` if the registry had that blob already and the upload was given up.
    pub(crate) async fn finish(self, digest: Digest, size: u64) -> Result<bool, Error> {
        if self.push.has(&digest, size).await? {
            self.abort().await;
            return Ok(false);
        }
        self.complete(digest, size).await?;
        Ok(true)
    }

    /// Closes the upload under `digest`, which the registry checks.
    pub(crate) async fn complete(mut self, digest: Digest, size: u64) -> Result<(), Error> {
        if self.size != size {
            let (place, what, actual) = (self.push.session.place.to_string(), self.what.clone(), self.size);
            self.abort().await;
            return Err(Error::SizeMismatch {
                place,
                what,
                expected: size,
                actual,
            });
        }
        if !matches!(self.state, State::New(_)) && self.length > 0 {
            self.send_waiting().await?;
        }
        match self.state {
            State::New(opened) => {
                let location = match opened {
                    Some(location) => location,
                    None => self.push.open(&self.what).await?.0,
                };
                let uploading = Uploading {
                    what: self.what,
                    location,
                    offset: 0,
                };
                let upload = Upload::Bytes(joined(self.waiting));
                self.push.send_again(uploading, digest, size, &upload).await
            }
            State::Open(uploading) => self.push.close(&uploading, digest, size).await,
            State::Whole(file) => {
                let file = blocking(move || {
                    file.into_inner()
                        .map_err(|error| spool_failed(error.into_error()))
                })
                .await?;
                let (location, _) = self.push.open(&self.what).await?;
                let uploading = Uploading {
                    what: self.what,
                    location,
                    offset: 0,
                };
                let upload = Upload::File(file.path());
                self.push.send_again(uploading, digest, size, &upload).await
            }
            State::Failed => Err(self
                .push
                .session
                .protocol(&self.what, "the upload has failed before")),
        }
    }

    /// Gives the upload up.
    pub(crate) async fn abort(self) {
        if let State::Open(uploading) = &self.state {
            self.push.cancel(uploading).await;
        }
    }
}

impl Push {
    /// Sends one piece, from where the registry is.
    async fn send_piece(&self, uploading: &mut Uploading, parts: &[Bytes]) -> Result<(), Error> {
        let start = uploading.offset;
        let length: u64 = parts.iter().map(|part| part.len() as u64).sum();
        let mut retry = self.session.retry();
        let mut disagreements = 0;
        loop {
            let sent = uploading.offset - start;
            if sent == length {
                return Ok(());
            }
            let body = Body::Parts(after(parts, sent));
            let Err(fault) = self.patch(uploading, &body, length - sent).await else {
                return Ok(());
            };
            let said = fault.error.to_string();
            if uploading.offset > 0 && takes_no_pieces(&fault.error) {
                disagreements += 1;
                if disagreements > MAX_DISAGREEMENTS {
                    return Err(self.lost(uploading, said));
                }
            } else {
                self.session.wait(&mut retry, fault).await?;
            }
            match self.status(uploading).await? {
                Some((offset, location)) if (start..=start + length).contains(&offset) => {
                    retry.progress(
                        usize::try_from(offset.saturating_sub(uploading.offset)).unwrap_or(usize::MAX),
                    );
                    (uploading.offset, uploading.location) = (offset, location);
                }
                Some((offset, _)) => {
                    return Err(self.lost(uploading, format!("it has {offset} of {start} bytes")));
                }
                None => return Err(self.lost(uploading, said)),
            }
        }
    }

    /// Closes an upload whose bytes are all there.
    async fn close(&self, uploading: &Uploading, digest: Digest, size: u64) -> Result<(), Error> {
        let mut retry = self.session.retry();
        loop {
            let Err(fault) = self.finish(uploading, digest, size, &Body::Nothing, 0).await else {
                return Ok(());
            };
            let unknown = is_status(&fault.error, &[404, 416]);
            let said = fault.error.to_string();
            if !unknown {
                self.session.wait(&mut retry, fault).await?;
            }
            // The answer may have been lost behind a success, and then the upload is gone and the blob is there.
            if self.has(&digest, size).await? {
                return Ok(());
            }
            if unknown {
                return Err(self.lost(uploading, said));
            }
        }
    }

    fn lost(&self, uploading: &Uploading, reason: String) -> Error {
        Error::UploadLost {
            place: Arc::clone(&self.session.place),
            what: uploading.what.clone(),
            reason,
        }
    }
}

/// `parts` without their first `skip` bytes.
fn after(parts: &[Bytes], skip: u64) -> Vec<Bytes> {
    let mut skip = usize::try_from(skip).unwrap_or(usize::MAX);
    let rest = parts.iter().filter_map(|part| {
        let here = skip.min(part.len());
        skip -= here;
        (here < part.len()).then(|| part.slice(here..))
    });
    rest.collect()
}

fn joined(parts: Vec<Bytes>) -> Bytes {
    let mut whole = BytesMut::with_capacity(parts.iter().map(Bytes::len).sum());
    for part in parts {
        whole.extend_from_slice(&part);
    }
    whole.freeze()
}

fn is_status(error: &Error, wanted: &[u16]) -> bool {
    matches!(error, Error::Status { status, .. } if wanted.contains(status))
}

fn takes_no_pieces(error: &Error) -> bool {
    is_status(error, &TAKES_NO_PIECES)
}

fn spool_failed(error: std::io::Error) -> Error {
    Error::file(
        temporary_directory(),
        "temporary file of an upload cannot be written",
    )(error)
}

async fn temporary() -> Result<BufWriter<Nameless>, Error> {
    blocking(|| {
        let file = Nameless::new_in(&temporary_directory()).map_err(spool_failed)?;
        Ok(BufWriter::new(file))
    })
    .await
}

async fn append(mut file: BufWriter<Nameless>, parts: Vec<Bytes>) -> Result<BufWriter<Nameless>, Error> {
    blocking(move || {
        for part in parts {
            file.write_all(&part).map_err(spool_failed)?;
        }
        Ok(file)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_of_a_piece() {
        let parts = ["abc", "", "de", "f"].map(Bytes::from);
        for (skip, expected) in [
            (0, "abcdef"),
            (1, "bcdef"),
            (3, "def"),
            (4, "ef"),
            (6, ""),
            (9, ""),
        ] {
            assert_eq!(joined(after(&parts, skip)), expected, "{skip}");
        }
    }
}
