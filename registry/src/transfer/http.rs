//! Ranges of blobs from a registry: one request, and as many more as connections break.
//!
//! What a registry may do wrong is told apart: a body that ends early, falls silent or only drips is fetched on from where it
//! stopped; one that ignores the range goes into a file ([`super::spool`]), or is an error for readers who can do without; one that
//! claims another range, another size, or that does not end is an error. What a header says of the body's encoding decides nothing: several
//! storages send one that means nothing. It explains a body that is not the blob.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use peel_image::Digest;
use reqwest::header::{CONTENT_ENCODING, CONTENT_RANGE, HeaderValue, RANGE};
use reqwest::{Response, StatusCode, Url};

use crate::client::retry::{Fault, Pace, Retry};
use crate::client::session::{Call, Session};
use crate::error::Error;
use crate::transfer::ByteStream;
use crate::transfer::spool::{SpoolStream, Spools};

/// How long the end of a body is waited for after its last byte.
const END_OF_BODY: Duration = Duration::from_millis(100);

/// A blob of a repository.
#[derive(Debug, Clone)]
pub(crate) struct RemoteBlob {
    pub(crate) session: Arc<Session>,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// A range of a blob on its way.
#[derive(Debug)]
pub(crate) struct HttpStream {
    blob: RemoteBlob,
    what: String,
    start: u64,
    next: u64,
    end: u64,
    /// An answer that ignores the range is an error.
    only_ranges: bool,
    /// Where the rest comes from, if the registry ignores ranges.
    spool: Option<SpoolStream>,
    /// How the answer says that its body is encoded, if nothing shows that it is not.
    encoding: Option<String>,
    skip: u64,
    response: Option<Response>,
    /// The remembered storage URL that `response` came from.
    remembered: Option<Url>,
    /// The patience with the body of `response`.
    pace: Pace,
    retry: Retry,
}

impl RemoteBlob {
    /// Asks for `range`, which must lie in the blob and not be empty, and waits for the first answer. With `only_ranges`, an answer with
    /// the whole blob is [`Error::NoRanges`], even if the range is all of it.
    pub(crate) async fn stream(&self, range: Range<u64>, only_ranges: bool) -> Result<ByteStream, Error> {
        let spool = self.session.spools.get(&self.digest);
        if let Some(spool) = spool.filter(|_| !only_ranges) {
            return Ok(ByteStream::spool(spool.stream(range)));
        }
        let whole = range == (0..self.size) && !only_ranges;
        if let Some(response) = whole.then(|| self.session.spools.take(&self.digest)).flatten() {
            return Ok(ByteStream::http(HttpStream::whole(self, response)?));
        }
        let mut stream = HttpStream::new(self, range, only_ranges);
        stream.connect().await?;
        Ok(ByteStream::http(stream))
    }
}

impl HttpStream {
    fn new(blob: &RemoteBlob, range: Range<u64>, only_ranges: bool) -> Self {
        Self {
            blob: blob.clone(),
            what: format!("blob {}", blob.digest),
            start: range.start,
            next: range.start,
            end: range.end,
            only_ranges,
            spool: None,
            encoding: None,
            skip: 0,
            response: None,
            remembered: None,
            pace: blob.session.pace(),
            retry: blob.session.retry(),
        }
    }

    /// All of a blob, whose beginning is `response`.
    pub(crate) fn whole(blob: &RemoteBlob, response: Response) -> Result<Self, Error> {
        let mut stream = Self::new(blob, 0..blob.size, false);
        stream.skip = stream.offset(&response)?;
        stream.response = Some(response);
        Ok(stream)
    }

    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if let Some(spool) = &mut self.spool {
                return spool.next().await;
            }
            if self.next >= self.end {
                self.finish().await;
                return Ok(None);
            }
            if self.response.is_none() {
                self.connect().await?;
            }
            let Some(response) = &mut self.response else {
                continue;
            };
            let session = &self.blob.session;
            let fault = match session.part(&self.what, response, &mut self.pace).await {
                Ok(Some(part)) => match self.accept(part)? {
                    Some(part) => return Ok(Some(part)),
                    None => continue,
                },
                // A body that is encoded ends where it will end the next time.
                Ok(None) if self.encoding.is_some() => return Err(self.encoded()),
                Ok(None) => Fault::transient(Error::Network {
                    place: Arc::clone(&session.place),
                    what: self.what.clone(),
                    reason: format!("the body ended at byte {} of {}", self.next, self.end),
                    hint: String::new(),
                }),
                Err(fault) => fault,
            };
            self.response = None;
            if let Some(url) = self.remembered.take() {
                session.redirects.forget(&self.blob.digest, &url);
            }
            self.blob.session.wait(&mut self.retry, fault).await?;
        }
    }

    /// Cuts what was not asked for off `part`; `None` if nothing is left.
    fn accept(&mut self, mut part: Bytes) -> Result<Option<Bytes>, Error> {
        let skipped = self.skip.min(part.len() as u64);
        self.skip -= skipped;
        // `skipped` is at most the length of `part`, so it fits.
        let part = part.split_off(usize::try_from(skipped).unwrap_or(usize::MAX).min(part.len()));
        if part.is_empty() {
            return Ok(None);
        }
        self.retry.progress(part.len());
        let left = self.end - self.next;
        let length = part.len() as u64;
        if length <= left {
            self.next += length;
            return Ok(Some(part));
        }
        let whole = self
            .response
            .as_ref()
            .is_some_and(|r| r.status() == StatusCode::OK);
        if whole && self.end < self.blob.size {
            self.response = None;
            self.next = self.end;
            return Ok(Some(part.slice(..usize::try_from(left).unwrap_or(part.len()))));
        }
        if self.encoding.is_some() {
            return Err(self.encoded());
        }
        Err(self.protocol("the body is longer than the range that was asked for"))
    }

    /// Reads the end of the body, which makes the connection free for the next request.
    async fn finish(&mut self) {
        let Some(mut response) = self.response.take() else {
            return;
        };
        if response.status() == StatusCode::OK && self.end < self.blob.size {
            return;
        }
        // The end is nearly always here already; without it the connection is closed, which only costs a new one.
        let end = self.blob.session.part(&self.what, &mut response, &mut self.pace);
        if !matches!(tokio::time::timeout(END_OF_BODY, end).await, Ok(Ok(None))) {
            tracing::debug!(what = %self.what, "the body goes on behind its last byte; connection not kept");
        }
    }

    async fn connect(&mut self) -> Result<(), Error> {
        loop {
            let fault = match self.connect_once().await {
                Ok(()) => return Ok(()),
                Err(fault) => fault,
            };
            self.blob.session.wait(&mut self.retry, fault).await?;
        }
    }

    async fn connect_once(&mut self) -> Result<(), Fault> {
        let session = Arc::clone(&self.blob.session);
        let path = session.path("blobs", &self.blob.digest.to_string());
        let what = self.what.clone();
        let mut call = Call::get(&path, &what);
        let whole = self.next == 0 && self.end == self.blob.size;
        if !whole || self.only_ranges {
            let range = format!("bytes={}-{}", self.next, self.end - 1);
            let range = HeaderValue::from_str(&range)
                .map_err(|error| Fault::fatal(session.protocol(&self.what, error.to_string())))?;
            call.headers.insert(RANGE, range);
        }
        let mut start = session.redirects.get(&self.blob.digest);
        loop {
            let remembered = start.take();
            let (mut response, target) = match (session.follow(&call, remembered.clone()).await, &remembered)
            {
                (Ok(followed), _) => followed,
                // The storage does not answer, or only that it cannot: the registry may know another one by now.
                (Err(fault), Some(url)) => {
                    tracing::debug!(what = %self.what, error = %fault.error, "a remembered storage URL failed");
                    session.redirects.forget(&self.blob.digest, url);
                    continue;
                }
                (Err(fault), None) => return Err(fault),
            };
            let ignored = response.status() == StatusCode::OK && call.headers.contains_key(RANGE);
            if ignored && self.only_ranges {
                session.spools.keep(self.blob.digest, response);
                return Err(Fault::fatal(Error::NoRanges {
                    place: Arc::clone(&session.place),
                    what: self.what.clone(),
                }));
            }
            // From its beginning on, a reader would not get more out of a file.
            if ignored && self.start > 0 {
                match Spools::begin(&self.blob, response).await {
                    Ok(spool) => {
                        self.spool = Some(spool.stream(self.next..self.end));
                        return Ok(());
                    }
                    Err(back) => response = back,
                }
            }
            match (response.status().as_u16(), remembered) {
                (200 | 206, remembered) => match (self.offset(&response), remembered) {
                    (Ok(skip), remembered) => {
                        if let (Some(url), None) = (target, &remembered) {
                            session.redirects.keep(self.blob.digest, url);
                        }
                        self.skip = skip;
                        self.remembered = remembered;
                        self.pace = session.pace();
                        self.response = Some(response);
                        return Ok(());
                    }
                    (Err(_), Some(url)) => session.redirects.forget(&self.blob.digest, &url),
                    (Err(error), None) => return Err(Fault::fatal(error)),
                },
                // A storage URL that has ended is refused in many ways: 403 (S3, Azure), 400 (GCS), 401, 404, 410.
                (_, Some(url)) => {
                    session.redirects.forget(&self.blob.digest, &url);
                    session.drain(response).await;
                }
                (416, None) => {
                    let reason = format!("the registry has no bytes {}..{} of it", self.next, self.end);
                    return Err(Fault::fatal(session.protocol(&self.what, reason)));
                }
                _ => {
                    return Err(session.refused(&self.what, response).await);
                }
            }
        }
    }

    /// Checks what the answer says of its body, and gives the number of bytes before the first wanted one.
    fn offset(&mut self, response: &Response) -> Result<u64, Error> {
        let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        self.encoding = text(CONTENT_ENCODING)
            .filter(|encoding| is_coding(encoding))
            .map(|encoding| encoding.chars().take(100).collect());
        if response.status() == StatusCode::OK {
            match response.content_length() {
                Some(length) if length == self.blob.size => self.encoding = None,
                Some(_) if self.encoding.is_some() => return Err(self.encoded()),
                Some(length) => return Err(self.size_mismatch(length)),
                None => {}
            }
            return Ok(self.next);
        }
        let range = text(CONTENT_RANGE).and_then(parse_content_range);
        let Some((first, last, total)) = range else {
            return Err(self.protocol("206 without a Content-Range that can be read"));
        };
        match total {
            Some(total) if total == self.blob.size => self.encoding = None,
            Some(_) if self.encoding.is_some() => return Err(self.encoded()),
            Some(total) => return Err(self.size_mismatch(total)),
            None => {}
        }
        if first != self.next || last < first || last >= self.end {
            return Err(self.protocol(&format!(
                "asked for bytes {}-{}, got bytes {first}-{last}",
                self.next,
                self.end - 1
            )));
        }
        Ok(0)
    }

    fn protocol(&self, reason: &str) -> Error {
        self.blob.session.protocol(&self.what, reason)
    }

    fn encoded(&self) -> Error {
        let encoding = self.encoding.as_deref().unwrap_or_default();
        self.protocol(&format!(
            "the body is encoded as {encoding:?}, which was not asked for, and is not the blob; a proxy may be in the way"
        ))
    }

    fn size_mismatch(&self, actual: u64) -> Error {
        Error::SizeMismatch {
            place: self.blob.session.place.to_string(),
            what: self.what.clone(),
            expected: self.blob.size,
            actual,
        }
    }
}

/// Whether a value of `Content-Encoding` names a coding that changes bytes (RFC 9110, section 8.4.1).
pub(crate) fn is_coding(value: &str) -> bool {
    value.split(',').any(|coding| {
        let coding = coding.trim().to_ascii_lowercase();
        matches!(
            coding.as_str(),
            "gzip" | "x-gzip" | "compress" | "x-compress" | "deflate" | "br" | "zstd"
        )
    })
}

/// `bytes FIRST-LAST/TOTAL` with `*` for an unknown total (RFC 9110, section 14.4).
pub(crate) fn parse_content_range(value: &str) -> Option<(u64, u64, Option<u64>)> {
    let (range, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.trim().split_once('-')?;
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    Some((first.trim().parse().ok()?, last.trim().parse().ok()?, total))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn content_ranges() {
        for (text, expected) in [
            ("bytes 0-9/10", Some((0, 9, Some(10)))),
            ("bytes 5-9/*", Some((5, 9, None))),
            ("bytes 9-5/10", Some((9, 5, Some(10)))),
            ("bytes */10", None),
            ("bytes 0-/10", None),
            ("bytes 0-9", None),
            ("items 0-9/10", None),
            ("bytes 0-99999999999999999999/1", None),
        ] {
            assert_eq!(parse_content_range(text), expected, "{text}");
        }
    }

    #[test]
    fn codings() {
        for (value, is) in [
            ("", false),
            ("identity", false),
            ("aws-chunked", false),
            ("utf-8", false),
            ("GZIP", true),
            ("aws-chunked, gzip", true),
            ("zstd", true),
        ] {
            assert_eq!(is_coding(value), is, "{value}");
        }
    }

    proptest! {
        #[test]
        fn content_range_round_trips(first: u64, last: u64, total: Option<u64>) {
            let end = total.map_or("*".to_owned(), |total| total.to_string());
            let text = format!("bytes {first}-{last}/{end}");
            prop_assert_eq!(parse_content_range(&text), Some((first, last, total)));
        }
    }
}
