//! Blobs whose digest is known only at their end: pieces, broken connections, registries that forget, and those that take no pieces.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use peel_image::Digest;
use peel_registry::{Error, ImageName, Source, Target};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::fake::{Seen, data, error, options, status, with};
use crate::services::docker_registry;
use crate::upload::{Shared, methods, registry, target};

/// Bytes of a piece, as the documentation of `BlobUpload` says.
const PIECE: usize = 8 << 20;

/// Writes `content` bit by bit and finishes it.
async fn write(target: &Target, content: &[u8]) -> Result<bool, Error> {
    let mut upload = target.begin_blob().await?;
    for part in content.chunks(128 << 10) {
        upload.write(part.to_vec().into()).await?;
    }
    upload.finish(Digest::of(content), content.len() as u64).await
}

#[tokio::test]
async fn pieces_go_up_while_the_blob_is_made() {
    let (fake, state) = registry(|_, _| None).await;
    let target = target(&fake, "app").await;
    let content = data(2 * PIECE + 1000);
    let mut upload = target.begin_blob().await.unwrap();
    for part in content.chunks(128 << 10) {
        upload.write(part.to_vec().into()).await.unwrap();
    }
    assert_eq!(methods(&fake), "POST PATCH PATCH", "nothing waits for the end");
    let digest = Digest::of(&content);
    assert!(upload.finish(digest, content.len() as u64).await.unwrap());
    assert_eq!(methods(&fake), "POST PATCH PATCH HEAD PATCH PUT");
    assert!(state.lock().unwrap().bytes == content);
    assert_eq!(target.counters().sent(), content.len() as u64);
}

#[tokio::test]
async fn a_blob_of_one_piece_takes_one_put_or_nothing() {
    let (fake, state) = registry(|_, _| None).await;
    let target = target(&fake, "app").await;
    let content = data(700_000);
    assert!(write(&target, &content).await.unwrap());
    assert_eq!(methods(&fake), "HEAD POST PUT");
    assert!(state.lock().unwrap().bytes == content);
    assert!(!write(&target, &content).await.unwrap());
    assert_eq!(methods(&fake), "HEAD POST PUT HEAD");
    assert_eq!(target.counters().sent(), 700_000);
}

#[tokio::test]
async fn a_large_blob_that_is_there_is_given_up() {
    let content = data(PIECE + 1);
    let size = content.len().to_string();
    let (fake, _) =
        registry(move |seen, _| (seen.method == "HEAD").then(|| with(status(200), "content-length", &size)))
            .await;
    let target = target(&fake, "app").await;
    assert!(!write(&target, &content).await.unwrap());
    assert_eq!(methods(&fake), "POST PATCH HEAD DELETE");
}

/// Keeps a part of the body of request `number`, then answers 502.
fn breaks_at(number: usize, kept: usize) -> impl Fn(&Seen, &Shared) -> bool {
    move |seen, state| {
        let now = seen.number == number;
        if now {
            let part = seen.body.get(..kept).unwrap_or(&seen.body);
            state.lock().unwrap().bytes.extend_from_slice(part);
        }
        now
    }
}

#[tokio::test]
async fn a_broken_piece_goes_on_where_the_registry_is() {
    for kept in [0, 1_000_000, PIECE] {
        let broken = breaks_at(2, kept);
        let (fake, state) = registry(move |seen, state| broken(seen, state).then(|| status(502))).await;
        let target = target(&fake, "app").await;
        let content = data(2 * PIECE + 5);
        assert!(write(&target, &content).await.unwrap());
        assert!(state.lock().unwrap().bytes == content, "{kept}");
        let again = if kept == PIECE { "" } else { "PATCH " };
        assert_eq!(
            methods(&fake),
            format!("POST PATCH PATCH GET {again}HEAD PATCH PUT")
        );
    }
}

#[tokio::test]
async fn registries_that_forget_are_told_apart() {
    let gone = || error(404, "BLOB_UPLOAD_UNKNOWN", "upload lost");
    type Fail = Box<dyn Fn(&Seen, &Shared) -> Option<axum::response::Response> + Send + Sync>;
    let cases: Vec<(&str, Fail)> = vec![
        (
            "the session is gone after a broken connection",
            Box::new(move |seen, _| match seen.method.as_str() {
                "PATCH" if seen.number == 2 => Some(status(502)),
                "GET" => Some(gone()),
                _ => None,
            }),
        ),
        (
            "the session is gone without one",
            Box::new(move |seen, _| match seen.method.as_str() {
                "PATCH" if seen.number > 1 => Some(gone()),
                "GET" => Some(gone()),
                _ => None,
            }),
        ),
        (
            "confirmed bytes are gone",
            Box::new(|seen, state| {
                (seen.number == 2).then(|| {
                    state.lock().unwrap().bytes.truncate(100);
                    status(502)
                })
            }),
        ),
        (
            "it disagrees for ever",
            Box::new(|seen, _| (seen.method == "PATCH" && seen.number > 1).then(|| status(416))),
        ),
        (
            "it takes one piece but not another",
            Box::new(|seen, _| (seen.method == "PATCH" && seen.number > 1).then(|| status(400))),
        ),
        (
            "it forgets at the end",
            Box::new(move |seen, _| (seen.method == "PUT").then(gone)),
        ),
    ];
    for (what, fail) in cases {
        let (fake, state) = registry(fail).await;
        let target = target(&fake, "app").await;
        let result = write(&target, &data(2 * PIECE + 5)).await;
        let error = result.expect_err(what);
        assert!(matches!(error, Error::UploadLost { .. }), "{what}: {error}");
        assert!(error.to_string().contains("repository app"), "{what}: {error}");
        assert_eq!(state.lock().unwrap().done, None, "{what}");
        assert!(fake.seen().len() < 20, "{what}: {:?}", fake.log());
    }
}

#[tokio::test]
async fn registries_without_pieces_get_the_blob_whole() {
    for code in [404, 405, 415, 501] {
        let (fake, state) = registry(move |seen, _| (seen.method == "PATCH").then(|| status(code))).await;
        let target = target(&fake, "app").await;
        let content = data(2 * PIECE + 5);
        assert!(write(&target, &content).await.unwrap(), "{code}");
        assert!(state.lock().unwrap().bytes == content, "{code}");
        let log = methods(&fake);
        assert!(log.ends_with("DELETE HEAD POST PUT"), "{code}: {log}");
    }
}

#[tokio::test]
async fn a_blob_is_sent_whole_where_pieces_get_lost() {
    let (fake, state) = registry(|seen, _| (seen.method == "PATCH").then(|| status(400))).await;
    let target = target(&fake, "app").await;
    for content in [data(1000), data(2 * PIECE + 5)] {
        let mut upload = target.begin_whole_blob().await.unwrap();
        for part in content.chunks(128 << 10) {
            upload.write(part.to_vec().into()).await.unwrap();
        }
        assert!(
            upload
                .finish(Digest::of(&content), content.len() as u64)
                .await
                .unwrap()
        );
        assert!(state.lock().unwrap().bytes == content);
    }
    assert_eq!(methods(&fake), "HEAD POST PUT HEAD POST PUT");
}

#[tokio::test]
async fn the_least_size_of_a_piece() {
    for (least, expected) in [
        (PIECE + PIECE / 2, "POST PATCH HEAD PATCH PUT"),
        (100 << 20, "POST HEAD POST PUT"),
    ] {
        let (fake, state) = registry(move |seen, _| {
            (seen.method == "POST").then(|| {
                let opened = with(status(202), "location", "/upload/1?state=x");
                with(opened, "oci-chunk-min-length", &least.to_string())
            })
        })
        .await;
        let target = target(&fake, "app").await;
        let content = data(2 * PIECE);
        assert!(write(&target, &content).await.unwrap());
        assert!(state.lock().unwrap().bytes == content);
        assert_eq!(methods(&fake), expected, "{least}");
    }
}

#[tokio::test]
async fn wrong_digests_and_sizes_are_refused() {
    let (fake, state) = registry(|_, _| None).await;
    let registry = target(&fake, "app").await;
    let dir = tempfile::tempdir().unwrap();
    let layout: ImageName = format!("oci:{}", dir.path().join("l").display()).parse().unwrap();
    let layout = Target::open(&layout, &options()).await.unwrap();
    for target in [&registry, &layout] {
        for content in [data(1000), data(PIECE + 1000)] {
            let begin = async || {
                let mut upload = target.begin_blob().await.unwrap();
                upload.write(content.clone().into()).await.unwrap();
                upload
            };
            let size = content.len() as u64;
            let error = begin()
                .await
                .finish(Digest::of(&content), size + 1)
                .await
                .unwrap_err();
            assert!(matches!(error, Error::SizeMismatch { .. }), "{error}");
            let error = begin()
                .await
                .finish(Digest::of(b"other"), size)
                .await
                .unwrap_err()
                .to_string();
            assert!(
                error.contains("DIGEST_INVALID") || error.contains("expected digest"),
                "{error}"
            );
            begin().await.abort().await;
        }
    }
    assert_eq!(state.lock().unwrap().done, None);
    let left = std::fs::read_dir(dir.path().join("l/blobs/sha256"))
        .unwrap()
        .count();
    assert_eq!(left, 0, "temporary files are left behind");
}

#[tokio::test]
async fn layouts_take_growing_blobs() {
    let dir = tempfile::tempdir().unwrap();
    let name: ImageName = format!("oci:{}:v1", dir.path().join("l").display())
        .parse()
        .unwrap();
    let target = Target::open(&name, &options()).await.unwrap();
    for length in [0, 1, 3_000_001] {
        let content = data(length);
        assert!(write(&target, &content).await.unwrap());
        assert!(!write(&target, &content).await.unwrap());
        let path = dir.path().join("l/blobs/sha256").join(Digest::of(&content).hex());
        assert!(std::fs::read(path).unwrap() == content);
    }
}

/// A way to `backend` that breaks once, when `limit` bytes have gone towards it.
async fn breaking_way(backend: String, limit: u64) -> (String, Arc<AtomicU64>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let left = Arc::new(AtomicU64::new(limit));
    let count = Arc::clone(&left);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let (backend, left) = (backend.clone(), Arc::clone(&left));
            tokio::spawn(async move {
                let mut server = tokio::net::TcpStream::connect(backend).await.unwrap();
                let (mut from_client, mut to_client) = client.split();
                let (mut from_server, mut to_server) = server.split();
                let up = async {
                    let mut buffer = vec![0; 64 << 10];
                    loop {
                        let length = from_client.read(&mut buffer).await?;
                        if length == 0 {
                            return to_server.shutdown().await;
                        }
                        let before = left.load(Ordering::Relaxed);
                        if before > 0 {
                            left.store(before.saturating_sub(length as u64), Ordering::Relaxed);
                            if before <= length as u64 {
                                return Err(std::io::Error::other("the test breaks the connection"));
                            }
                        }
                        to_server.write_all(&buffer[..length]).await?;
                    }
                };
                let down = tokio::io::copy(&mut from_server, &mut to_client);
                tokio::select! {
                    _ = up => {}
                    _ = down => {}
                }
            });
        }
    });
    (address, count)
}

#[tokio::test]
async fn a_cut_connection_costs_a_piece() {
    let (fake, state) = registry(|_, _| None).await;
    let (address, left) = breaking_way(fake.address.clone(), (PIECE + PIECE / 2) as u64).await;
    let name: ImageName = format!("{address}/app").parse().unwrap();
    let target = Target::open(&name, &options()).await.unwrap();
    let content = data(3 * PIECE);
    assert!(write(&target, &content).await.unwrap());
    assert_eq!(left.load(Ordering::Relaxed), 0, "the connection was not cut");
    assert!(target.counters().retries() > 0);
    assert!(state.lock().unwrap().bytes == content);
    assert!(
        target.counters().sent() < (4 * PIECE) as u64,
        "more than a piece was sent again"
    );
}

/// What docker-registry does with an upload whose connection was cut depends on its version; a blob is never damaged by it.
#[tokio::test]
async fn docker_registry_behind_a_cut_connection() {
    let backend = docker_registry();
    let (address, left) = breaking_way(backend.address.clone(), (PIECE + PIECE / 2) as u64).await;
    let name: ImageName = format!("{address}/app").parse().unwrap();
    let target = Target::open(&name, &options()).await.unwrap();
    let content = data(3 * PIECE);
    match write(&target, &content).await {
        Ok(sent) => assert!(sent),
        Err(error) => {
            assert!(matches!(error, Error::UploadLost { .. }), "{error}");
            assert!(write(&target, &content).await.unwrap());
        }
    }
    assert_eq!(left.load(Ordering::Relaxed), 0, "the connection was not cut");
    let source = Source::open(&name, &options()).await.unwrap();
    let descriptor = crate::fake::descriptor(peel_image::media::OCI_LAYER_GZIP, &content);
    let blob = source.blob(&descriptor).unwrap();
    assert!(blob.read_verified(1 << 30).await.unwrap() == content);
}
