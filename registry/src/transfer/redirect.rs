//! Where a registry keeps its blobs: the storage URLs that it redirected us to, for as long as they are good.
//!
//! With them a range costs one request instead of two. Signed URLs say how long they live in their query; what does not say so is
//! asked for again after some minutes. A URL that fails earlier is dropped by the reader, who asks the registry again: the storage may
//! have moved.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use peel_image::Digest;
use reqwest::Url;

/// Lifetime of a URL that names none; the shortest that storages sign by default is 15 minutes (S3) and 10 (Docker Hub).
const DEFAULT_LIFETIME: Duration = Duration::from_secs(300);
/// A URL is not used this shortly before its end.
const MARGIN: Duration = Duration::from_secs(10);
/// URLs kept; images have tens of layers.
const MAX_ENTRIES: usize = 4096;

/// Storage URLs by blob.
#[derive(Debug, Default)]
pub(crate) struct Redirects(Mutex<HashMap<Digest, (Url, Instant)>>);

impl Redirects {
    pub(crate) fn get(&self, digest: &Digest) -> Option<Url> {
        let urls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (url, expires) = urls.get(digest)?;
        (Instant::now() < *expires).then(|| url.clone())
    }

    pub(crate) fn keep(&self, digest: Digest, url: Url) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let lifetime = lifetime(&url, now.as_secs()).min(DEFAULT_LIFETIME);
        let mut urls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if urls.len() >= MAX_ENTRIES {
            urls.clear();
        }
        urls.insert(digest, (url, Instant::now() + lifetime.saturating_sub(MARGIN)));
    }

    /// Drops `url`, which has failed. A newer one in its place stays.
    pub(crate) fn forget(&self, digest: &Digest, url: &Url) {
        let mut urls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if urls.get(digest).is_some_and(|(known, _)| known == url) {
            urls.remove(digest);
        }
    }
}

/// How long a signed URL lives: `X-Amz-Expires` and `X-Goog-Expires` are seconds from signing, `Expires` is a Unix time
/// (CloudFront, S3 signature version 2).
fn lifetime(url: &Url, now: u64) -> Duration {
    for (name, value) in url.query_pairs() {
        let Ok(number) = value.parse::<u64>() else {
            continue;
        };
        if name.eq_ignore_ascii_case("X-Amz-Expires") || name.eq_ignore_ascii_case("X-Goog-Expires") {
            return Duration::from_secs(number);
        }
        if name == "Expires" {
            return Duration::from_secs(number.saturating_sub(now));
        }
    }
    DEFAULT_LIFETIME
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes() {
        for (query, seconds) in [
            ("", 300),
            ("X-Amz-Expires=20&X-Amz-Signature=x", 20),
            ("X-Goog-Expires=7", 7),
            ("Expires=1000100", 100),
            ("Expires=999999", 0),
            ("Expires=never", 300),
        ] {
            let url = format!("https://s3.test/blob?{query}").parse().unwrap();
            assert_eq!(lifetime(&url, 1_000_000), Duration::from_secs(seconds), "{query}");
        }
    }

    #[test]
    fn expired_urls_are_not_used() {
        let redirects = Redirects::default();
        let url: Url = "https://s3.test/blob".parse().unwrap();
        let (good, old) = (Digest::of(b"good"), Digest::of(b"old"));
        redirects.keep(good, url.clone());
        redirects.keep(old, "https://s3.test/blob?X-Amz-Expires=5".parse().unwrap());
        assert_eq!(redirects.get(&good).as_ref(), Some(&url));
        assert_eq!(redirects.get(&old), None);
        redirects.forget(&good, &"https://s3.test/older".parse().unwrap());
        assert_eq!(redirects.get(&good).as_ref(), Some(&url));
        redirects.forget(&good, &url);
        assert_eq!(redirects.get(&good), None);
    }
}
