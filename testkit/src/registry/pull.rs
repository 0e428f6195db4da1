//! The pull half of the embedded registry: manifests, blobs, ranges of blobs, tags.
//!
//! Called by the router. Blobs are streamed from their files; the bytes are counted as they are handed over.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use bytes::Bytes;
use peel_hash::Digest;

use super::Shared;
use super::faults::Action;
use super::serve::{failure, json};

/// Bytes read from a blob's file at once.
const STEP: u64 = 128 * 1024;

/// Time for the bytes before a truncation to leave.
const FLUSH: Duration = Duration::from_millis(50);

/// The header in which registries repeat the digest.
const DIGEST_HEADER: &str = "docker-content-digest";

/// GET or HEAD of a manifest.
pub(super) fn manifest(
    shared: &Arc<Shared>,
    name: &str,
    reference: &str,
    head: bool,
    action: Option<Action>,
) -> Response<Body> {
    match shared.content.manifest(name, reference) {
        Some(found) => body(shared, &found.digest, &found.media_type, None, head, action),
        None => failure(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", "no such manifest"),
    }
}

/// GET or HEAD of a blob, or of a range of it.
pub(super) fn blob(
    shared: &Arc<Shared>,
    digest: &str,
    headers: &HeaderMap,
    head: bool,
    action: Option<Action>,
) -> Response<Body> {
    let range = headers.get(header::RANGE).and_then(|value| value.to_str().ok());
    match digest.parse() {
        Ok(digest) => body(shared, &digest, "application/octet-stream", range, head, action),
        Err(_) => failure(StatusCode::BAD_REQUEST, "DIGEST_INVALID", "not a sha256 digest"),
    }
}

/// GET of the list of tags.
pub(super) fn tags(shared: &Arc<Shared>, name: &str) -> Response<Body> {
    let tags = shared.content.tags(name);
    if tags.is_empty() {
        return failure(StatusCode::NOT_FOUND, "NAME_UNKNOWN", "no such repository");
    }
    json(
        StatusCode::OK,
        serde_json::json!({ "name": name, "tags": tags }).to_string(),
    )
}

/// What a `Range` header asks of a body of `size` bytes.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    /// Everything: no range, or one that this server does not understand (RFC 9110 lets it ignore those).
    Whole,
    /// These bytes.
    Part(Range<u64>),
    /// Nothing that exists.
    Unsatisfiable,
}

fn wanted(range: Option<&str>, size: u64) -> Wanted {
    let Some((first, last)) = range
        .and_then(|range| range.strip_prefix("bytes="))
        .and_then(|range| range.split_once('-'))
    else {
        return Wanted::Whole;
    };
    let part = match (first.trim().parse::<u64>(), last.trim().parse::<u64>()) {
        (Ok(first), Ok(last)) if first <= last => first..last.saturating_add(1).min(size),
        (Ok(first), Err(_)) if last.trim().is_empty() => first..size,
        (Err(_), Ok(suffix)) if first.trim().is_empty() => size.saturating_sub(suffix)..size,
        _ => return Wanted::Whole,
    };
    if part.start < part.end {
        Wanted::Part(part)
    } else {
        Wanted::Unsatisfiable
    }
}

fn body(
    shared: &Arc<Shared>,
    digest: &Digest,
    media_type: &str,
    range: Option<&str>,
    head: bool,
    action: Option<Action>,
) -> Response<Body> {
    let opened = File::open(shared.content.blob_path(digest)).and_then(|file| {
        let size = file.metadata()?.len();
        Ok((file, size))
    });
    let Ok((file, mut size)) = opened else {
        return failure(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", "no such blob");
    };
    if let Some(Action::Shorten(limit)) = action {
        size = size.min(limit);
    }
    let mut response = Response::new(Body::empty());
    let part = match wanted(range, size) {
        Wanted::Whole => 0..size,
        Wanted::Part(part) => {
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            let text = format!("bytes {}-{}/{size}", part.start, part.end - 1);
            set(&mut response, header::CONTENT_RANGE.as_str(), &text);
            part
        }
        Wanted::Unsatisfiable => {
            let mut response = failure(
                StatusCode::RANGE_NOT_SATISFIABLE,
                "SIZE_INVALID",
                "no byte of the blob is in that range",
            );
            set(
                &mut response,
                header::CONTENT_RANGE.as_str(),
                &format!("bytes */{size}"),
            );
            return response;
        }
    };
    set(&mut response, header::CONTENT_TYPE.as_str(), media_type);
    set(
        &mut response,
        header::CONTENT_LENGTH.as_str(),
        &(part.end - part.start).to_string(),
    );
    set(&mut response, header::ACCEPT_RANGES.as_str(), "bytes");
    set(&mut response, DIGEST_HEADER, &digest.to_string());
    if !head {
        *response.body_mut() = stream(Arc::clone(shared), file, part, action);
    }
    response
}

/// Sets a header whose value is known to be printable; a media type from a push that is not is left out.
fn set(response: &mut Response<Body>, name: &'static str, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

/// The bytes of `part`, with the fault applied.
fn stream(shared: Arc<Shared>, file: File, part: Range<u64>, action: Option<Action>) -> Body {
    let begin = part.start;
    let next = move |position: u64| {
        let (file, action) = (file.try_clone(), action.clone());
        let (shared, part) = (Arc::clone(&shared), part.clone());
        async move {
            shared.faults.unpaused().await;
            let mut end = (position + STEP).min(part.end);
            if let Some(Action::Truncate(limit)) = action {
                if position >= begin.saturating_add(limit) && position < part.end {
                    // The HTTP layer throws away what it has not written when a body fails; this lets it write.
                    tokio::time::sleep(FLUSH).await;
                    return Err(io::Error::other("truncated by a fault"));
                }
                end = end.min(begin.saturating_add(limit));
            }
            if position >= end {
                return Ok::<_, io::Error>(None);
            }
            let mut bytes = vec![0; usize::try_from(end - position).map_err(io::Error::other)?];
            file?.read_exact_at(&mut bytes, position)?;
            if let Some(Action::Corrupt(range)) = &action {
                for (offset, byte) in (position..).zip(bytes.iter_mut()) {
                    if range.contains(&offset) {
                        *byte = !*byte;
                    }
                }
            }
            shared.body_bytes.fetch_add(end - position, Ordering::Relaxed);
            Ok(Some((Bytes::from(bytes), end)))
        }
    };
    Body::from_stream(futures::stream::try_unfold(begin, next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_follow_rfc_9110() {
        let cases = [
            (None, Wanted::Whole),
            (Some("bytes=0-0"), Wanted::Part(0..1)),
            (Some("bytes=2-5"), Wanted::Part(2..6)),
            (Some("bytes=2-500"), Wanted::Part(2..10)),
            (Some("bytes=7-"), Wanted::Part(7..10)),
            (Some("bytes=-3"), Wanted::Part(7..10)),
            (Some("bytes=-300"), Wanted::Part(0..10)),
            (Some("bytes=0-18446744073709551615"), Wanted::Part(0..10)),
            (Some("bytes=10-"), Wanted::Unsatisfiable),
            (Some("bytes=10-12"), Wanted::Unsatisfiable),
            (Some("bytes=-0"), Wanted::Unsatisfiable),
            (Some("bytes=5-2"), Wanted::Whole),
            (Some("bytes=0-1,4-5"), Wanted::Whole),
            (Some("lines=1-2"), Wanted::Whole),
            (Some("bytes="), Wanted::Whole),
        ];
        for (range, expected) in cases {
            assert_eq!(wanted(range, 10), expected, "{range:?}");
        }
    }
}
