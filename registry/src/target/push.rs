//! Uploads by the OCI distribution specification ("Pushing blobs", "Pushing manifests").
//!
//! What can be read again goes up in one PUT. If that breaks, the registry is asked how much it has and gets the rest by PATCH and PUT;
//! one that has lost the upload gets all of it again. What is still being made goes up in [`pieces`].

pub(crate) mod pieces;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use peel_image::Digest;
use reqwest::header::{
    CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION, RANGE,
};
use reqwest::{Method, Response, StatusCode, Url};

use super::{ByteSource, Upload};
use crate::client::retry::Fault;
use crate::client::session::{Call, MAX_REDIRECTS, Session, To};
use crate::error::Error;
use crate::name::Reference;
use crate::options::{ClientOptions, Counters};
use pieces::Pieces;

/// Actions of every request of a push: one token serves all of them.
const ACTIONS: &str = "pull,push";
/// Bytes per second at which a registry is trusted to finish an upload: it hashes the blob, and some copy it.
const FINISH_RATE: u64 = 16 << 20;
/// Bytes handed to the connection at once, so that progress is noticed.
const SLICE: usize = 256 << 10;

/// A repository to push to.
#[derive(Debug)]
pub(crate) struct Push {
    session: Arc<Session>,
    reference: Reference,
    /// Uploads that a registry has opened instead of mounting a blob.
    opened: Mutex<HashMap<Digest, Url>>,
}

/// An upload on its way.
#[derive(Debug)]
struct Uploading {
    what: String,
    location: Url,
    /// Bytes that the registry has.
    offset: u64,
}

impl Push {
    pub(crate) fn new(reference: Reference, options: &ClientOptions) -> Self {
        Self {
            session: Arc::new(Session::new(&reference, options)),
            reference,
            opened: Mutex::default(),
        }
    }

    pub(crate) fn counters(&self) -> &Arc<Counters> {
        &self.session.counters
    }

    fn call<'a>(method: Method, to: To<'a>, what: &'a str) -> Call<'a> {
        Call {
            method,
            to,
            headers: HeaderMap::new(),
            body: None,
            what,
            actions: ACTIONS,
            from: None,
        }
    }

    /// Whether the repository has the blob. A redirect to somewhere that does not answer as a registry does is a yes: the registry knows
    /// where the blob is, and storage that signs its URLs for GET refuses HEAD.
    pub(crate) async fn has(&self, digest: &Digest, size: u64) -> Result<bool, Error> {
        let what = format!("blob {digest}");
        let path = self.session.path("blobs", &digest.to_string());
        let call = Self::call(Method::HEAD, To::Path(&path), &what);
        let mut retry = self.session.retry();
        loop {
            let followed = self.session.follow(&call, None).await;
            let elsewhere = followed.as_ref().is_ok_and(|(response, target)| {
                target.is_some() && !matches!(response.status().as_u16(), 200 | 401 | 404)
            });
            let fault = match followed.map(|(response, _)| response) {
                Ok(_) if elsewhere => return Ok(true),
                Ok(response) if response.status() == StatusCode::OK => {
                    let length = number(response.headers(), &CONTENT_LENGTH);
                    return match length {
                        Some(actual) if actual != size => Err(Error::SizeMismatch {
                            place: self.session.place.to_string(),
                            what,
                            expected: size,
                            actual,
                        }),
                        _ => Ok(true),
                    };
                }
                Ok(response) if response.status() == StatusCode::NOT_FOUND => return Ok(false),
                Ok(response) => self.session.refused(&what, response).await,
                Err(fault) => fault,
            };
            self.session.wait(&mut retry, fault).await?;
        }
    }

    pub(crate) async fn mount(&self, digest: &Digest, from: &str) -> Result<bool, Error> {
        let what = format!("mount of blob {digest} from {from}");
        let path = format!(
            "{}?mount={digest}&from={from}",
            self.session.path("blobs", "uploads/")
        );
        let mut call = Self::call(Method::POST, To::Path(&path), &what);
        call.headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        call.from = Some(from);
        let response = self.session.expect(&call).await?;
        if response.status() == StatusCode::CREATED {
            return Ok(true);
        }
        let location = self.location(&what, &response)?;
        self.opened
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(*digest, location);
        Ok(false)
    }

    /// The registry's host and port as the user wrote them.
    pub(crate) fn registry(&self) -> &str {
        &self.reference.registry
    }

    /// Mounts the blob if that works. Any refusal is a no: whoever may not mount (some registries ask for more rights) may
    /// still be able to send.
    pub(crate) async fn mount_or_not(&self, digest: &Digest, from: &str) -> bool {
        if from == self.reference.repository {
            return false;
        }
        match self.mount(digest, from).await {
            Ok(mounted) => mounted,
            Err(error) => {
                tracing::debug!(%error, "not mounted");
                false
            }
        }
    }

    /// Sends a blob that is not there.
    pub(crate) async fn send(
        self: &Arc<Self>,
        digest: Digest,
        size: u64,
        upload: Upload,
    ) -> Result<(), Error> {
        let opened = self
            .opened
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&digest);
        let what = format!("upload of blob {digest}");
        match upload {
            Upload::Stream(mut stream) => {
                let mut pieces = Pieces::new(Arc::clone(self), what, opened);
                while let Some(part) = stream.try_next().await? {
                    pieces.write(part).await?;
                }
                pieces.complete(digest, size).await
            }
            upload => {
                let location = match opened {
                    Some(location) => location,
                    None => self.open(&what).await?.0,
                };
                let uploading = Uploading {
                    what,
                    location,
                    offset: 0,
                };
                self.send_again(uploading, digest, size, &upload).await
            }
        }
    }

    /// Opens an upload: where it goes, and the least size of a piece.
    async fn open(&self, what: &str) -> Result<(Url, Option<u64>), Error> {
        let path = self.session.path("blobs", "uploads/");
        let mut call = Self::call(Method::POST, To::Path(&path), what);
        call.headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        let response = self.session.expect(&call).await?;
        let least = number(
            response.headers(),
            &HeaderName::from_static("oci-chunk-min-length"),
        );
        Ok((self.location(what, &response)?, least))
    }

    fn location(&self, what: &str, response: &Response) -> Result<Url, Error> {
        let url = self.session.location(what, response)?;
        self.session.secured(what, url)
    }

    /// Sends what can be read again.
    async fn send_again(
        &self,
        mut uploading: Uploading,
        digest: Digest,
        size: u64,
        upload: &Upload,
    ) -> Result<(), Error> {
        let mut retry = self.session.retry();
        let mut known = 0;
        loop {
            let rest = size - uploading.offset;
            let body = Body::Upload {
                upload,
                offset: uploading.offset,
                size,
            };
            let result = if uploading.offset == 0 {
                self.finish(&uploading, digest, size, &body, rest).await
            } else {
                match self.patch(&mut uploading, &body, rest).await {
                    Ok(()) => self.finish(&uploading, digest, size, &Body::Nothing, 0).await,
                    Err(fault) => Err(fault),
                }
            };
            let Err(fault) = result else {
                return Ok(());
            };
            self.session.wait(&mut retry, fault).await?;
            self.look(&mut uploading, size).await?;
            if uploading.offset > known {
                retry.progress(usize::try_from(uploading.offset - known).unwrap_or(usize::MAX));
            }
            known = uploading.offset;
        }
    }

    /// Finds out how much of the upload the registry has, and opens another if it has none of it.
    async fn look(&self, uploading: &mut Uploading, size: u64) -> Result<(), Error> {
        if let Some((offset, location)) = self.status(uploading).await?
            && offset <= size
        {
            (uploading.offset, uploading.location) = (offset, location);
            return Ok(());
        }
        (uploading.location, _) = self.open(&uploading.what).await?;
        uploading.offset = 0;
        Ok(())
    }

    /// How many bytes of an upload the registry has, and where it goes on; `None` if the upload is lost.
    async fn status(&self, uploading: &Uploading) -> Result<Option<(u64, Url)>, Error> {
        let call = Self::call(Method::GET, To::Url(&uploading.location), &uploading.what);
        let mut retry = self.session.retry();
        loop {
            let fault = match self
                .session
                .follow(&call, None)
                .await
                .map(|(response, _)| response)
            {
                Ok(response) if response.status().is_success() => {
                    let location = match self.location(&uploading.what, &response) {
                        Ok(location) => location,
                        Err(_) => uploading.location.clone(),
                    };
                    return Ok(received(response.headers()).map(|offset| (offset, location)));
                }
                // Whatever the reason, this upload does not go on.
                Ok(response) => {
                    self.session.drain(response).await;
                    return Ok(None);
                }
                Err(fault) => fault,
            };
            self.session.wait(&mut retry, fault).await?;
        }
    }

    /// Sends the next `length` bytes.
    async fn patch(&self, uploading: &mut Uploading, body: &Body<'_>, length: u64) -> Result<(), Fault> {
        if length == 0 {
            return Ok(());
        }
        let location = uploading.location.clone();
        let mut call = Self::call(Method::PATCH, To::Url(&location), &uploading.what);
        let range = format!("{}-{}", uploading.offset, uploading.offset + length - 1);
        if let Ok(range) = HeaderValue::from_str(&range) {
            call.headers.insert(CONTENT_RANGE, range);
        }
        let response = self.transfer(call, &location, body, length, length).await?;
        // Registries that leave the header out go on at the same URL.
        if response.headers().contains_key(LOCATION) {
            uploading.location = self.location(&uploading.what, &response).map_err(Fault::fatal)?;
        }
        uploading.offset += length;
        self.session.drain(response).await;
        Ok(())
    }

    /// Sends the last `length` bytes of a blob of `size` bytes and closes the upload.
    async fn finish(
        &self,
        uploading: &Uploading,
        digest: Digest,
        size: u64,
        body: &Body<'_>,
        length: u64,
    ) -> Result<(), Fault> {
        let mut url = uploading.location.clone();
        url.query_pairs_mut().append_pair("digest", &digest.to_string());
        let call = Self::call(Method::PUT, To::Url(&url), &uploading.what);
        let response = self.transfer(call, &url, body, length, size).await?;
        self.session.drain(response).await;
        Ok(())
    }

    /// Has the registry forget an upload. One attempt: it forgets abandoned ones by itself, after a while.
    async fn cancel(&self, uploading: &Uploading) {
        let mut call = Self::call(Method::DELETE, To::Url(&uploading.location), &uploading.what);
        call.headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        match self.session.follow(&call, None).await {
            Ok((response, _)) => self.session.drain(response).await,
            Err(fault) => tracing::debug!(error = %fault.error, "upload not cancelled"),
        }
    }

    /// Sends a body of `length` bytes, again where the registry redirects it; the registry may work on `size` bytes before it answers. An
    /// answer that is no success is a fault.
    async fn transfer(
        &self,
        mut call: Call<'_>,
        url: &Url,
        body: &Body<'_>,
        length: u64,
        size: u64,
    ) -> Result<Response, Fault> {
        call.headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        let octets = HeaderValue::from_static("application/octet-stream");
        call.headers.insert(CONTENT_TYPE, octets);
        let mut target = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.transfer_to(&call, &target, body, length, size).await?;
            if response.status().is_success() {
                return Ok(response);
            }
            match self.session.next_hop(&call, &response)? {
                Some(next) => target = next,
                None => return Err(self.session.refused(call.what, response).await),
            }
            self.session.drain(response).await;
        }
        Err(self.session.circles(call.what))
    }

    /// Sends a body once.
    async fn transfer_to(
        &self,
        call: &Call<'_>,
        url: &Url,
        body: &Body<'_>,
        length: u64,
        size: u64,
    ) -> Result<Response, Fault> {
        let bytes = body.open().await.map_err(Fault::fatal)?;
        let bytes =
            bytes.ok_or_else(|| Fault::fatal(self.session.protocol(call.what, "its bytes are gone")))?;
        let (bytes, lost) = remember_error(bytes);
        let patience = self.session.client.options.attempt_timeout;
        let progress = Arc::new(Mutex::new(Progress {
            last: Instant::now(),
            left: length,
        }));
        let body = if length == 0 {
            reqwest::Body::from(Bytes::new())
        } else {
            let (progress, counters) = (Arc::clone(&progress), Arc::clone(&self.session.counters));
            let noted = bytes.map_ok(slices).try_flatten().inspect_ok(move |part| {
                counters.add_sent(part.len());
                let mut progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
                progress.last = Instant::now();
                progress.left = progress.left.saturating_sub(part.len() as u64);
            });
            reqwest::Body::wrap_stream(noted)
        };
        let finishing = patience + Duration::from_secs(size / FINISH_RATE);
        let stalled = Progress::stalled(&progress, patience, finishing);
        let sent = self.session.send_stream(call, url, body, stalled).await;
        let lost = lost.lock().unwrap_or_else(PoisonError::into_inner).take();
        match (sent, lost) {
            (Err(_), Some(error)) => Err(Fault::fatal(error)),
            (sent, _) => sent,
        }
    }

    pub(crate) async fn put_manifest(
        &self,
        bytes: Bytes,
        media_type: &str,
        tagged: bool,
    ) -> Result<Digest, Error> {
        let digest = Digest::of(&bytes);
        let name = match &self.reference {
            Reference {
                digest: Some(pinned), ..
            } if tagged && *pinned != digest => {
                let what = format!("manifest {digest}");
                return Err(self.session.mismatch(&what, *pinned, digest));
            }
            Reference { tag: Some(tag), .. } if tagged => tag.clone(),
            _ => digest.to_string(),
        };
        let what = format!("upload of manifest {name}");
        let path = self.session.path("manifests", &name);
        let mut call = Self::call(Method::PUT, To::Path(&path), &what);
        let value = HeaderValue::from_str(media_type);
        let value = value.map_err(|_| {
            self.session
                .protocol(&what, format!("{media_type:?} is no media type"))
        })?;
        call.headers.insert(CONTENT_TYPE, value);
        call.body = Some(bytes);
        let response = self.session.expect(&call).await?;
        let told = response
            .headers()
            .get("docker-content-digest")
            .and_then(|value| value.to_str().ok());
        if let Some(Ok(told)) = told.map(str::parse::<Digest>)
            && told != digest
        {
            return Err(self.session.mismatch(&what, digest, told));
        }
        Ok(digest)
    }
}

/// How a body goes.
#[derive(Debug)]
struct Progress {
    last: Instant,
    left: u64,
}

impl Progress {
    /// Ends when the body has not moved for `patience`, or the answer has not come for `finishing` after its end.
    async fn stalled(progress: &Mutex<Self>, patience: Duration, finishing: Duration) {
        loop {
            let deadline = {
                let progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
                progress.last + if progress.left == 0 { finishing } else { patience }
            };
            if deadline <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(deadline.into()).await;
        }
    }
}

/// Bytes to send, as often as it takes.
#[derive(Debug)]
enum Body<'a> {
    Nothing,
    /// Memory.
    Parts(Vec<Bytes>),
    /// What is left of something that can be read again.
    Upload {
        upload: &'a Upload,
        offset: u64,
        size: u64,
    },
}

impl Body<'_> {
    /// The bytes from the first one; `None` if they cannot be had again.
    async fn open(&self) -> Result<Option<ByteSource>, Error> {
        match self {
            Self::Nothing => Ok(Some(futures::stream::empty().boxed())),
            Self::Parts(parts) => Ok(Some(futures::stream::iter(parts.clone()).map(Ok).boxed())),
            Self::Upload { upload, offset, size } => upload.read(*offset, *size).await,
        }
    }
}

/// Cuts `bytes` into pieces that show progress on a slow link.
fn slices(bytes: Bytes) -> impl futures::Stream<Item = Result<Bytes, Error>> + Send {
    futures::stream::unfold(bytes, |mut rest| async move {
        if rest.is_empty() {
            return None;
        }
        let part = rest.split_to(rest.len().min(SLICE));
        Some((Ok(part), rest))
    })
}

type Lost = Arc<Mutex<Option<Error>>>;

/// Keeps the error that ends `bytes`: HTTP would only say that the body ended.
fn remember_error(bytes: ByteSource) -> (ByteSource, Lost) {
    let lost = Lost::default();
    let place = Arc::clone(&lost);
    let bytes = bytes.inspect_err(move |error| {
        *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
    });
    (bytes.boxed(), lost)
}

fn number(headers: &HeaderMap, name: &HeaderName) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

/// Bytes that the registry has, by `Range: 0-LAST` (OCI distribution specification, "Pushing a blob in chunks"). distribution writes
/// `0-0` also for none, and no client sends a single byte.
fn received(headers: &HeaderMap) -> Option<u64> {
    let range = headers.get(RANGE)?.to_str().ok()?;
    let range = range
        .trim()
        .trim_start_matches("bytes")
        .trim_start_matches(['=', ' ']);
    let (range, _) = range.split_once('/').unwrap_or((range, ""));
    let (first, last) = range.split_once('-')?;
    // The last of no bytes, as arithmetic has it.
    if (first.trim(), last.trim()) == ("0", "-1") {
        return Some(0);
    }
    match (first.trim(), last.trim().parse::<u64>().ok()?) {
        ("0", 0) => Some(0),
        ("0", last) => last.checked_add(1),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_uploads() {
        for (text, expected) in [
            ("0-0", Some(0)),
            ("0-9", Some(10)),
            ("bytes=0-9", Some(10)),
            ("bytes 0-9/*", Some(10)),
            (" 0-9/100", Some(10)),
            ("0--1", Some(0)),
            ("5-9", None),
            ("0-", None),
            ("0-18446744073709551615", None),
            ("", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(RANGE, HeaderValue::from_static(text));
            assert_eq!(received(&headers), expected, "{text}");
        }
        assert_eq!(received(&HeaderMap::new()), None);
    }
}
