//! Manifests and indexes, and how few requests they take.

use axum::response::Response;
use peel_image::{Digest, media};
use peel_registry::Error;

use crate::fake::{Fake, Seen, descriptor, document, options, status, with};

fn manifest(config: &[u8]) -> Vec<u8> {
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": media::OCI_MANIFEST,
        "config": descriptor(media::OCI_CONFIG, config),
        "layers": [],
    });
    manifest.to_string().into_bytes()
}

fn entry(document: &[u8], media_type: &str, platform: Option<(&str, &str)>) -> serde_json::Value {
    let mut entry = serde_json::to_value(descriptor(media_type, document)).unwrap();
    if let Some((os, architecture)) = platform {
        entry["platform"] = serde_json::json!({ "os": os, "architecture": architecture });
    }
    entry
}

fn index(entries: &[serde_json::Value]) -> Vec<u8> {
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": entries });
    index.to_string().into_bytes()
}

/// Serves the documents by digest, and the first as `latest`.
fn serve(documents: Vec<(&'static str, Vec<u8>)>) -> impl Fn(&Seen) -> Response {
    move |seen| {
        let name = seen.path.rsplit('/').next().unwrap();
        let found = documents.iter().enumerate().find(|(number, (_, bytes))| {
            name == Digest::of(bytes).to_string() || (*number == 0 && name == "latest")
        });
        match found {
            Some((_, (media_type, bytes))) => document(media_type, bytes),
            None => status(404),
        }
    }
}

const CONFIG: &[u8] = br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;

#[tokio::test]
async fn an_index_costs_two_requests_and_an_image_one() {
    let (amd, arm) = (manifest(CONFIG), manifest(b"{}"));
    let top = index(&[
        entry(&arm, media::OCI_MANIFEST, Some(("linux", "arm64"))),
        entry(&amd, media::OCI_MANIFEST, Some(("linux", "amd64"))),
        entry(b"attestation", media::OCI_MANIFEST, Some(("unknown", "unknown"))),
    ]);
    let documents = vec![
        (media::OCI_INDEX, top.clone()),
        (media::OCI_MANIFEST, amd.clone()),
        (media::OCI_MANIFEST, arm.clone()),
        (media::OCI_CONFIG, CONFIG.to_vec()),
    ];
    let fake = Fake::start(serve(documents)).await;
    let source = fake.source("app", &options()).await;
    let image = source.resolve(Some("linux/amd64")).await.unwrap();
    assert_eq!(image.manifest_digest, Digest::of(&amd));
    assert_eq!(image.manifest_bytes, amd);
    assert_eq!(image.index_bytes.as_deref(), Some(top.as_slice()));
    assert_eq!(
        image.platform.as_ref().unwrap().architecture().to_string(),
        "amd64"
    );
    let amd_digest = Digest::of(&amd);
    let expected = [
        "GET /v2/app/manifests/latest".to_owned(),
        format!("GET /v2/app/manifests/{amd_digest}"),
    ];
    assert_eq!(fake.log(), expected);
    let accept: Vec<_> = fake.seen()[0].headers.get_all("accept").iter().cloned().collect();
    assert_eq!(accept.len(), 4, "{accept:?}");

    let index = source.index().await.unwrap().unwrap();
    assert_eq!(
        (index.digest, index.index.manifests().len()),
        (Digest::of(&top), 3)
    );
    assert_eq!(fake.log().len(), 2, "the index is asked for once");
    let arm_image = source.image(&index.index.manifests()[0]).await.unwrap();
    assert_eq!(arm_image.manifest_digest, Digest::of(&arm));
    let (bytes, config) = source.config(&image).await.unwrap();
    assert_eq!((bytes.as_ref(), config.architecture.as_str()), (CONFIG, "amd64"));

    let error = source.resolve(Some("linux/s390x")).await.unwrap_err().to_string();
    assert!(
        error.contains("linux/s390x") && error.contains("linux/arm64, linux/amd64"),
        "{error}"
    );

    let pinned = fake
        .source(&format!("app:ignored@{amd_digest}"), &options())
        .await;
    let before = fake.log().len();
    assert_eq!(pinned.resolve(None).await.unwrap().manifest_bytes, amd);
    assert!(pinned.index().await.unwrap().is_none());
    assert_eq!(fake.log().len(), before + 1);
}

#[tokio::test]
async fn docker_types_and_indexes_in_indexes() {
    let image = manifest(CONFIG);
    let image = String::from_utf8(image)
        .unwrap()
        .replace(media::OCI_MANIFEST, media::DOCKER_MANIFEST)
        .into_bytes();
    let inner = index(&[entry(&image, media::DOCKER_MANIFEST, Some(("linux", "amd64")))]);
    let outer = index(&[entry(&inner, media::DOCKER_INDEX, Some(("linux", "amd64")))]);
    let documents = vec![
        (media::OCI_INDEX, outer),
        (media::DOCKER_INDEX, inner),
        (media::DOCKER_MANIFEST, image.clone()),
    ];
    let fake = Fake::start(serve(documents)).await;
    let source = fake.source("app", &options()).await;
    let resolved = source.resolve(Some("linux/amd64")).await.unwrap();
    assert_eq!(resolved.manifest_bytes, image);
    assert_eq!(resolved.media_type, media::DOCKER_MANIFEST);

    let mut deep = image.clone();
    let mut documents = Vec::new();
    for level in 0..8 {
        let media_type = if level == 0 {
            media::DOCKER_MANIFEST
        } else {
            media::OCI_INDEX
        };
        documents.push((media_type, deep.clone()));
        deep = index(&[entry(&deep, media_type, Some(("linux", "amd64")))]);
    }
    documents.insert(0, (media::OCI_INDEX, deep));
    let fake = Fake::start(serve(documents)).await;
    let error = fake
        .source("app", &options())
        .await
        .resolve(Some("linux/amd64"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("indexes within each other"), "{error}");
}

#[tokio::test]
async fn manifests_that_are_not_what_they_should_be() {
    let good = manifest(CONFIG);
    let digest = Digest::of(&good);

    let altered = Fake::start(|_| document(media::OCI_MANIFEST, &manifest(b"altered"))).await;
    let source = altered.source(&format!("app@{digest}"), &options()).await;
    let error = source.resolve(None).await.unwrap_err();
    assert!(
        matches!(error, Error::DigestMismatch { expected, .. } if expected == digest),
        "{error}"
    );

    let told = digest.to_string();
    let lying = Fake::start(move |_| {
        with(
            document(media::OCI_MANIFEST, &manifest(b"altered")),
            "docker-content-digest",
            &told,
        )
    })
    .await;
    let error = lying
        .source("app", &options())
        .await
        .resolve(None)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { .. }), "{error}");

    let huge = Fake::start(|_| document(media::OCI_MANIFEST, &vec![b' '; (4 << 20) + 1])).await;
    let error = huge
        .source("app", &options())
        .await
        .resolve(None)
        .await
        .unwrap_err();
    assert!(
        matches!(error, Error::TooLarge { limit, .. } if limit == 4 << 20),
        "{error}"
    );

    let missing = Fake::start(|_| crate::fake::error(404, "MANIFEST_UNKNOWN", "manifest unknown")).await;
    let error = missing
        .source("app:v9", &options())
        .await
        .resolve(None)
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(error.is_not_found());
    for part in [
        "repository app",
        "manifest v9",
        "MANIFEST_UNKNOWN",
        "check registry, repository and tag",
    ] {
        assert!(text.contains(part), "{text}");
    }
}

#[tokio::test]
async fn warm_connections_are_found_open() {
    let image = manifest(CONFIG);
    let fake = Fake::start(serve(vec![(media::OCI_MANIFEST, image)])).await;
    let source = fake.source("app", &options()).await;
    let (resolved, ()) = tokio::join!(source.resolve(None), source.warm(3));
    resolved.unwrap();
    assert_eq!(source.counters().requests(), 4);
    assert_eq!(fake.log().iter().filter(|line| *line == "GET /v2/").count(), 3);
}
