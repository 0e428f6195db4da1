//! Uploads to a registry that breaks them.

use std::sync::{Arc, Mutex};

use axum::response::Response;
use peel_image::{Digest, media};
use peel_registry::{Error, ImageName, Target, Upload};

use crate::fake::{Fake, Seen, data, error, options, status, with};

/// What a test registry has received for the only upload that it knows.
#[derive(Default)]
pub(crate) struct Received {
    pub(crate) bytes: Vec<u8>,
    /// Digest of the finished blob.
    pub(crate) done: Option<String>,
}

pub(crate) type Shared = Arc<Mutex<Received>>;

/// A registry for uploads. `fail` may answer a request instead, after having kept as much of its body as it likes.
pub(crate) async fn registry(
    fail: impl Fn(&Seen, &Shared) -> Option<Response> + Send + Sync + 'static,
) -> (Fake, Shared) {
    let state = Shared::default();
    let shared = Arc::clone(&state);
    let fake = Fake::start(move |seen| {
        if let Some(response) = fail(seen, &shared) {
            return response;
        }
        let mut state = shared.lock().unwrap();
        let at = |response, state: &Received| {
            let last = state.bytes.len().saturating_sub(1);
            with(
                with(response, "location", "/upload/1?state=x"),
                "range",
                &format!("0-{last}"),
            )
        };
        match seen.method.as_str() {
            "HEAD" => match &state.done {
                Some(digest) if seen.path.ends_with(digest.as_str()) => {
                    with(status(200), "content-length", &state.bytes.len().to_string())
                }
                _ => status(404),
            },
            "POST" => {
                state.bytes.clear();
                at(status(202), &state)
            }
            "GET" => at(status(204), &state),
            "PATCH" => {
                let start = format!("{}-", state.bytes.len());
                if !seen.header("content-range").unwrap().starts_with(&start) {
                    return status(416);
                }
                state.bytes.extend_from_slice(&seen.body);
                at(status(202), &state)
            }
            "PUT" => {
                state.bytes.extend_from_slice(&seen.body);
                let wanted = seen.path.split("digest=").nth(1).unwrap().replace("%3A", ":");
                if Digest::of(&state.bytes).to_string() != wanted {
                    return error(
                        400,
                        "DIGEST_INVALID",
                        "provided digest did not match uploaded content",
                    );
                }
                state.done = Some(wanted);
                status(201)
            }
            _ => status(405),
        }
    })
    .await;
    (fake, state)
}

pub(crate) async fn target(fake: &Fake, name: &str) -> Target {
    let name: ImageName = format!("{}/{name}", fake.address).parse().unwrap();
    Target::open(&name, &options()).await.unwrap()
}

pub(crate) fn methods(fake: &Fake) -> String {
    let log = fake.seen();
    log.iter()
        .map(|seen| seen.method.as_str())
        .collect::<Vec<_>>()
        .join(" ")
}

#[tokio::test]
async fn one_put_for_what_is_known_and_nothing_for_what_is_there() {
    let (fake, state) = registry(|_, _| None).await;
    let content = data(700_000);
    let digest = Digest::of(&content);
    let target = target(&fake, "app:v1").await;
    let upload = || Upload::Bytes(content.clone().into());
    assert!(target.push_blob(digest, 700_000, upload()).await.unwrap());
    assert_eq!(methods(&fake), "HEAD POST PUT");
    assert_eq!(state.lock().unwrap().bytes, content);
    assert!(!target.push_blob(digest, 700_000, upload()).await.unwrap());
    assert_eq!(methods(&fake), "HEAD POST PUT HEAD");
    assert_eq!(target.counters().sent(), 700_000);
    let put = &fake.seen()[2];
    assert_eq!(put.header("content-length"), Some("700000"));
    assert!(
        put.path.starts_with("/upload/1?state=x&digest=sha256%3A"),
        "{}",
        put.path
    );
}

#[tokio::test]
async fn a_broken_put_goes_on_where_the_registry_is() {
    let (fake, state) = registry(|seen, state| {
        let broken = seen.method == "PUT" && !seen.body.is_empty() && seen.number < 4;
        broken.then(|| {
            state
                .lock()
                .unwrap()
                .bytes
                .extend_from_slice(&seen.body[..400_000]);
            status(503)
        })
    })
    .await;
    let content = data(700_000);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &content).unwrap();
    let target = target(&fake, "app").await;
    let upload = Upload::File(file.path().to_owned());
    assert!(
        target
            .push_blob(Digest::of(&content), 700_000, upload)
            .await
            .unwrap()
    );
    assert_eq!(methods(&fake), "HEAD POST PUT GET PATCH PUT");
    assert_eq!(fake.seen()[4].body.len(), 300_000);
    assert_eq!(state.lock().unwrap().bytes, content);
}

#[tokio::test]
async fn a_lost_upload_starts_again() {
    let (fake, state) = registry(|seen, _| match (seen.method.as_str(), seen.number) {
        ("PUT", 2) => Some(status(503)),
        ("GET", _) => Some(error(404, "BLOB_UPLOAD_UNKNOWN", "upload lost")),
        _ => None,
    })
    .await;
    let content = data(100_000);
    let target = target(&fake, "app").await;
    let upload = Upload::Bytes(content.clone().into());
    assert!(
        target
            .push_blob(Digest::of(&content), 100_000, upload)
            .await
            .unwrap()
    );
    assert_eq!(methods(&fake), "HEAD POST PUT GET POST PUT");
    assert_eq!(state.lock().unwrap().bytes, content);
}

#[tokio::test]
async fn a_stream_goes_up_in_pieces() {
    let (fake, state) = registry(|seen, state| {
        (seen.method == "PATCH" && seen.number == 3).then(|| {
            state
                .lock()
                .unwrap()
                .bytes
                .extend_from_slice(&seen.body[..1_000_000]);
            status(502)
        })
    })
    .await;
    let content = data(20_000_000);
    let pieces: Vec<_> = content
        .chunks(123_457)
        .map(|piece| Ok(piece.to_vec().into()))
        .collect();
    let stream = futures::StreamExt::boxed(futures::stream::iter(pieces));
    let target = target(&fake, "app").await;
    let digest = Digest::of(&content);
    assert!(
        target
            .push_blob(digest, 20_000_000, Upload::Stream(stream))
            .await
            .unwrap()
    );
    assert_eq!(methods(&fake), "HEAD POST PATCH PATCH GET PATCH PATCH PUT");
    assert!(state.lock().unwrap().bytes == content);
}

#[tokio::test]
async fn sources_that_fail_or_lie() {
    let (fake, _) = registry(|_, _| None).await;
    let target = target(&fake, "app").await;
    let digest = Digest::of(b"content");
    let short = futures::StreamExt::boxed(futures::stream::iter(vec![Ok("cont".into())]));
    let error = target
        .push_blob(digest, 7, Upload::Stream(short))
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::SizeMismatch {
                expected: 7,
                actual: 4,
                ..
            }
        ),
        "{error}"
    );

    let other = Upload::Bytes("altered".into());
    let error = target.push_blob(digest, 7, other).await.unwrap_err().to_string();
    assert!(
        error.contains("DIGEST_INVALID") && error.contains("repository app"),
        "{error}"
    );

    let missing = Upload::File("/nonexistent/layer".into());
    let error = target
        .push_blob(digest, 7, missing)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("/nonexistent/layer"), "{error}");

    let gone = Fake::start(|_| crate::fake::error(404, "BLOB_UNKNOWN", "no such blob")).await;
    let blob = gone.blob(b"content", &options()).await;
    let error = target
        .push_blob(digest, 7, Upload::Blob(blob))
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("BLOB_UNKNOWN") && error.contains(&gone.address),
        "{error}"
    );
}

#[tokio::test]
async fn mounts() {
    let (fake, _) = registry(|seen, _| seen.path.contains("from=base").then(|| status(201))).await;
    let target = target(&fake, "app").await;
    let digest = Digest::of(b"content");
    assert!(target.mount_blob(&digest, "base").await.unwrap());
    let path = format!("/v2/app/blobs/uploads/?mount={digest}&from=base");
    assert_eq!(fake.seen()[0].path, path);
    // Refused: the registry has opened an upload instead, which is used.
    assert!(!target.mount_blob(&digest, "elsewhere").await.unwrap());
    assert!(
        target
            .push_blob(digest, 7, Upload::Bytes("content".into()))
            .await
            .unwrap()
    );
    assert_eq!(methods(&fake), "POST POST HEAD PUT");
}

#[tokio::test]
async fn blobs_of_another_repository_are_mounted() {
    for (answer, expected) in [
        (Some(201), "HEAD POST"),
        // The registry has opened an upload instead, which is used.
        (None, "HEAD POST GET PUT"),
        // It does not like mounts at all.
        (Some(403), "HEAD POST GET POST PUT"),
    ] {
        let content = b"content";
        let (fake, state) = registry(move |seen, _| {
            if seen.path == format!("/v2/base/blobs/{}", Digest::of(content)) {
                return Some(crate::fake::serve(seen, content));
            }
            let mounts = seen.path.contains("mount=");
            answer.filter(|_| mounts).map(status)
        })
        .await;
        let source = fake.source("base:latest", &options()).await;
        let blob = source
            .blob(&crate::fake::descriptor(media::OCI_LAYER_GZIP, content))
            .unwrap();
        let target = target(&fake, "app").await;
        let sent = target
            .push_blob(blob.digest(), 7, Upload::Blob(blob.clone()))
            .await
            .unwrap();
        assert_eq!(sent, answer != Some(201));
        let log: Vec<_> = methods(&fake).split(' ').map(str::to_owned).collect();
        let mut sorted = log.clone();
        sorted.sort();
        let mut wanted: Vec<_> = expected.split(' ').map(str::to_owned).collect();
        wanted.sort();
        assert_eq!(sorted, wanted, "{answer:?}: {log:?}");
        if sent {
            assert_eq!(state.lock().unwrap().bytes, content);
        }
    }
}

#[tokio::test]
async fn manifests_by_tag_and_digest() {
    let fake = Fake::start(|_| status(201)).await;
    let bytes: axum::body::Bytes = "{}".into();
    let digest = Digest::of(&bytes);
    let tagged = target(&fake, "app:v1").await;
    assert_eq!(
        tagged
            .put_manifest(bytes.clone(), media::OCI_INDEX)
            .await
            .unwrap(),
        digest
    );
    tagged
        .put_untagged_manifest(bytes.clone(), media::OCI_MANIFEST)
        .await
        .unwrap();
    let pinned = target(&fake, &format!("app@{digest}")).await;
    pinned.put_manifest(bytes, media::OCI_MANIFEST).await.unwrap();
    let by_digest = format!("PUT /v2/app/manifests/{digest}");
    assert_eq!(fake.log(), ["PUT /v2/app/manifests/v1", &by_digest, &by_digest]);
    assert_eq!(fake.seen()[0].header("content-type"), Some(media::OCI_INDEX));
    let error = pinned
        .put_manifest("[]".into(), media::OCI_MANIFEST)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { .. }), "{error}");
    for name in ["oci-archive:x.tar", "docker-archive:x.tar"] {
        let error = Target::open(&name.parse().unwrap(), &options())
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains(name) && error.contains("oci:DIR"), "{error}");
    }
}
