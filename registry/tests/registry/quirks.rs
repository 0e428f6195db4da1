//! Registries that work, but not as others do: no ranges, headers that mean nothing, redirects of everything, answers without a
//! `Location`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::response::Response;
use peel_image::{Digest, media};
use peel_registry::{Error, ImageName, Target, Upload};

use crate::auth::with_password;
use crate::fake::{Fake, Seen, cut, data, descriptor, document, options, partial, serve, status, with};
use crate::upload::{methods, registry, target};

fn whole(seen: &Seen, data: &[u8]) -> Response {
    let mut plain = seen.clone();
    plain.headers.clear();
    serve(&plain, data)
}

fn part(content: &[u8], start: u64, end: u64) -> &[u8] {
    &content[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()]
}

#[tokio::test]
async fn a_blob_without_ranges_is_fetched_once() {
    let content = data(3 << 20);
    let served = content.clone();
    let fake = Fake::start(move |seen| whole(seen, &served)).await;
    let blob = fake.blob(&content, &options()).await;
    let reads = [
        (5 << 19, (5 << 19) + 1),
        (1 << 20, 3 << 20),
        (100_000, 200_000),
        (0, 10),
        (0, 3 << 20),
    ];
    for (start, end) in reads {
        assert_eq!(
            blob.read(start..end).await.unwrap(),
            part(&content, start, end),
            "{start}..{end}"
        );
    }
    let together = (0..16_u64).map(|number| blob.read(number << 17..(number << 17) + 70_000));
    for (bytes, number) in futures::future::join_all(together).await.into_iter().zip(0..) {
        assert_eq!(
            bytes.unwrap(),
            part(&content, number << 17, (number << 17) + 70_000)
        );
    }
    assert_eq!(fake.log().len(), 1, "{:?}", fake.log());
}

#[tokio::test]
async fn whoever_can_do_without_ranges_hears_that_there_are_none() {
    let content = data(300_000);
    let served = content.clone();
    let fake = Fake::start(move |seen| whole(seen, &served)).await;
    let blob = fake.blob(&content, &options()).await;
    for range in [200_000..300_000, 0..10, 0..300_000] {
        let error = blob.only_ranges().read(range).await.unwrap_err();
        assert!(
            matches!(error, Error::NoRanges { .. }) && !error.is_transient(),
            "{error}"
        );
    }
    let asked = fake.log().len();
    assert_eq!(blob.read_verified(300_000).await.unwrap(), content);
    assert_eq!(
        fake.log().len(),
        asked,
        "what had come already was asked for again"
    );
}

#[tokio::test]
async fn ranges_may_end_in_the_middle() {
    let content = data(2 << 20);
    let (served, without) = (content.clone(), Arc::new(AtomicBool::new(false)));
    let ends = Arc::clone(&without);
    let fake = Fake::start(move |seen| {
        if ends.load(Ordering::Relaxed) {
            return whole(seen, &served);
        }
        ends.store(seen.number == 1, Ordering::Relaxed);
        partial(seen, &served, |part| match seen.number {
            1 => cut(&part[..50_000]),
            _ => Body::from(part.to_vec()),
        })
    })
    .await;
    let blob = fake.blob(&content, &options()).await;
    for (start, end) in [(10, 20), (1_000_000, 1_200_000), (5, 2 << 20)] {
        assert_eq!(
            blob.read(start..end).await.unwrap(),
            part(&content, start, end),
            "{start}..{end}"
        );
    }
    assert!(without.load(Ordering::Relaxed));
    assert_eq!(fake.log().len(), 3, "{:?}", fake.log());
}

#[tokio::test]
async fn a_whole_blob_that_breaks_goes_on_without_ranges() {
    let content = data(300_000);
    let served = content.clone();
    let fake = Fake::start(move |seen| match seen.number {
        0..=2 => {
            let mut response = whole(seen, &served);
            let sent = (seen.number + 1) * 80_000;
            *response.body_mut() = cut(&served[..sent]);
            response
        }
        _ => whole(seen, &served),
    })
    .await;
    let blob = fake.blob(&content, &options()).await;
    assert_eq!(blob.read_verified(300_000).await.unwrap(), content);
    let fake_of_parts = Fake::start({
        let served = content.clone();
        move |seen| match seen.number {
            0 => {
                let mut response = whole(seen, &served);
                *response.body_mut() = cut(&served[..80_000]);
                response
            }
            _ => whole(seen, &served),
        }
    })
    .await;
    let blob = fake_of_parts.blob(&content, &options()).await;
    assert_eq!(
        blob.read(200_000..200_100).await.unwrap(),
        part(&content, 200_000, 200_100)
    );
}

#[tokio::test]
async fn a_spool_that_fails_is_an_error_and_the_next_read_tries_again() {
    let content = data(300_000);
    let served = content.clone();
    let fake = Fake::start(move |seen| match seen.number {
        0 => {
            let mut response = whole(seen, &served);
            *response.body_mut() = cut(&served[..80_000]);
            response
        }
        1 => status(403),
        _ => whole(seen, &served),
    })
    .await;
    let blob = fake.blob(&content, &options()).await;
    let error = blob.read(200_000..200_100).await.unwrap_err();
    assert!(matches!(error, Error::Status { status: 403, .. }), "{error}");
    assert_eq!(
        blob.read(200_000..200_100).await.unwrap(),
        part(&content, 200_000, 200_100)
    );
}

#[tokio::test]
async fn the_digest_decides_and_not_the_encoding() {
    let content = data(100_000);
    for encoding in ["", "identity", "aws-chunked", "gzip", "aws-chunked,gzip"] {
        let served = content.clone();
        let fake = Fake::start(move |seen| with(serve(seen, &served), "content-encoding", encoding)).await;
        let blob = fake.blob(&content, &options()).await;
        assert_eq!(blob.read_verified(100_000).await.unwrap(), content, "{encoding}");
        assert_eq!(blob.read(10..20).await.unwrap(), content[10..20], "{encoding}");
    }
}

#[tokio::test]
async fn a_body_that_really_is_encoded_is_named() {
    let content = data(100_000);
    for (length, sized) in [(50_000, true), (50_000, false), (150_000, false)] {
        let fake = Fake::start(move |_| {
            let body = vec![7; length];
            let body = match sized {
                true => Body::from(body),
                false => Body::from_stream(futures::stream::iter([Ok::<_, std::io::Error>(body)])),
            };
            with(Response::new(body), "content-encoding", "gzip")
        })
        .await;
        let error = fake
            .blob(&content, &options())
            .await
            .read_verified(100_000)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("encoded as \"gzip\""), "{error}");
        assert_eq!(fake.log().len(), 1);
    }
    let fake = Fake::start(|_| {
        with(
            document(media::OCI_MANIFEST, &[0x1f, 0x8b, 8]),
            "content-encoding",
            "gzip",
        )
    })
    .await;
    for name in ["app".to_owned(), format!("app@{}", Digest::of(b"x"))] {
        let error = fake
            .source(&name, &options())
            .await
            .resolve(None)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("encoded as \"gzip\""), "{error}");
    }
}

#[tokio::test]
async fn redirected_uploads_keep_method_and_body() {
    for code in [307, 308] {
        let (fake, state) = registry(move |seen, _| {
            let again = seen.path.contains("again=1");
            let target = match seen.path.contains('?') {
                true => seen.path.replacen('?', "?again=1&", 1),
                false => format!("{}?again=1", seen.path),
            };
            (!again).then(|| with(status(code), "location", &target))
        })
        .await;
        let content = data(700_000);
        let digest = Digest::of(&content);
        let target = target(&fake, "app:v1").await;
        let upload = || Upload::Bytes(content.clone().into());
        assert!(target.push_blob(digest, 700_000, upload()).await.unwrap());
        assert_eq!(methods(&fake), "HEAD HEAD POST POST PUT PUT", "{code}");
        assert_eq!(state.lock().unwrap().bytes, content);
        let long = data(9 << 20);
        let parts: Vec<_> = long
            .chunks(1 << 20)
            .map(|part| Ok(axum::body::Bytes::copy_from_slice(part)))
            .collect();
        let stream = Box::pin(futures::stream::iter(parts));
        let digest = Digest::of(&long);
        assert!(
            target
                .push_blob(digest, long.len() as u64, Upload::Stream(stream))
                .await
                .unwrap()
        );
        assert_eq!(state.lock().unwrap().bytes, long);
    }
}

#[tokio::test]
async fn other_hosts_get_the_body_and_no_credentials() {
    let stored = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&stored);
    let storage = Fake::start(move |seen| {
        assert_eq!(seen.header("authorization"), None);
        *kept.lock().unwrap() = seen.body.to_vec();
        status(201)
    })
    .await;
    let location = format!("http://{}/put", storage.address);
    let fake = Fake::start(
        move |seen| match (seen.method.as_str(), seen.header("authorization")) {
            (_, None) if seen.path == "/token" || seen.path.starts_with("/token?") => {
                document("application/json", br#"{"token":"t"}"#)
            }
            (_, None) => {
                let host = seen.header("host").unwrap();
                let challenge = format!("Bearer realm=\"http://{host}/token\",service=\"s\"");
                with(status(401), "www-authenticate", &challenge)
            }
            ("HEAD", _) => status(404),
            ("POST", _) => with(status(202), "location", "/upload/1"),
            _ => with(status(307), "location", &location),
        },
    )
    .await;
    let content = data(1000);
    let upload = Upload::Bytes(content.clone().into());
    let target = target(&fake, "app").await;
    assert!(
        target
            .push_blob(Digest::of(&content), 1000, upload)
            .await
            .unwrap()
    );
    assert_eq!(*stored.lock().unwrap(), content);
}

#[tokio::test]
async fn other_hosts_cannot_ask_for_the_password() {
    for code in [202, 307] {
        let storage = Fake::start(move |seen| match seen.path.starts_with("/token") {
            true => document("application/json", br#"{"token":"t"}"#),
            false => {
                let host = seen.header("host").unwrap();
                let challenge = format!("Bearer realm=\"http://{host}/token\",service=\"s\"");
                with(status(401), "www-authenticate", &challenge)
            }
        })
        .await;
        let location = format!("http://{}/put", storage.address);
        let fake = Fake::start(move |seen| match seen.method.as_str() {
            "HEAD" => status(404),
            "POST" if code == 202 => with(status(202), "location", &location),
            "POST" => with(status(202), "location", "/upload/1"),
            _ => with(status(code), "location", &location),
        })
        .await;
        let file = with_password(&fake.address, options());
        let name: ImageName = format!("{}/app", fake.address).parse().unwrap();
        let target = Target::open(&name, &file.options).await.unwrap();
        let content = data(1000);
        let digest = Digest::of(&content);
        let upload = Upload::Bytes(content.into());
        let error = target.push_blob(digest, 1000, upload).await.unwrap_err();
        assert!(error.to_string().contains("HTTP 401"), "{code}: {error}");
        // Nor later.
        assert!(!target.has_blob(&digest, 1000).await.unwrap());
        let seen = storage.seen();
        assert!(!seen.is_empty());
        for request in seen {
            assert!(request.path.starts_with("/put"), "{code}: {}", request.path);
            assert_eq!(request.header("authorization"), None, "{code}");
        }
    }
}

#[tokio::test]
async fn redirects_of_uploads_end() {
    for (code, wanted) in [(307, "more than 5 redirects"), (302, "HTTP 302")] {
        let fake = Fake::start(move |seen| match seen.method.as_str() {
            "HEAD" => status(404),
            _ => with(status(code), "location", &format!("{}x", seen.path)),
        })
        .await;
        let target = target(&fake, "app").await;
        let upload = Upload::Bytes("x".into());
        let error = target.push_blob(Digest::of(b"x"), 1, upload).await.unwrap_err();
        assert!(error.to_string().contains(wanted), "{error}");
    }
}

#[tokio::test]
async fn a_redirected_look_is_answered_by_whoever_knows() {
    let size = 7;
    for (code, expected) in [(404, false), (403, true), (405, true), (200, true)] {
        let fake = Fake::start(move |seen| match seen.path.as_str() {
            "/there" => with(status(code), "content-length", &size.to_string()),
            _ => with(status(307), "location", "/there"),
        })
        .await;
        let target = target(&fake, "app").await;
        assert_eq!(
            target.has_blob(&Digest::of(b"content"), size).await.unwrap(),
            expected,
            "{code}"
        );
    }
}

#[tokio::test]
async fn a_piece_without_location_goes_on_at_the_same_url() {
    let (fake, state) = registry(|seen, state| {
        (seen.method == "PATCH").then(|| {
            state.lock().unwrap().bytes.extend_from_slice(&seen.body);
            status(202)
        })
    })
    .await;
    let content = data(17 << 20);
    let parts: Vec<_> = content
        .chunks(1 << 20)
        .map(|part| Ok(axum::body::Bytes::copy_from_slice(part)))
        .collect();
    let target = target(&fake, "app").await;
    let upload = Upload::Stream(Box::pin(futures::stream::iter(parts)));
    let digest = Digest::of(&content);
    assert!(
        target
            .push_blob(digest, content.len() as u64, upload)
            .await
            .unwrap()
    );
    assert_eq!(state.lock().unwrap().bytes, content);
    assert_eq!(methods(&fake), "HEAD POST PATCH PATCH PATCH PUT");
}

fn manifest(config: &[u8], layers: &[&[u8]]) -> Vec<u8> {
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| descriptor(media::OCI_LAYER, layer))
        .collect();
    let config = descriptor(media::OCI_CONFIG, config);
    serde_json::json!({ "schemaVersion": 2, "mediaType": media::OCI_MANIFEST, "config": config, "layers": layers })
        .to_string()
        .into_bytes()
}

#[tokio::test]
async fn configurations_decide_where_entries_say_nothing() {
    let config = |architecture: &str| {
        format!(r#"{{"os":"linux","architecture":"{architecture}","rootfs":{{"diff_ids":null}}}}"#)
            .into_bytes()
    };
    let (amd, arm, silent) = (config("amd64"), config("arm64"), b"{\"x\":1}".to_vec());
    let images = [
        manifest(b"{}", &[b"chart"]),
        manifest(&arm, &[]),
        manifest(&amd, &[]),
        manifest(&silent, &[]),
    ];
    let [chart, of_arm, of_amd, of_nobody] = &images;
    let mut documents: Vec<Vec<u8>> = images.to_vec();
    documents.extend([amd, arm, silent.clone(), b"{}".to_vec()]);
    for (entries, platform, expected) in [
        (vec![chart, of_arm, of_amd], "linux/amd64", Some(of_amd)),
        (vec![chart, of_arm, of_amd], "linux/arm64", Some(of_arm)),
        (
            vec![chart, of_arm, of_nobody, of_amd],
            "linux/amd64",
            Some(of_amd),
        ),
        (vec![chart, of_nobody, of_arm], "linux/amd64", Some(of_nobody)),
        (vec![chart, of_arm], "linux/amd64", None),
        (vec![of_arm], "linux/amd64", Some(of_arm)),
    ] {
        let entries: Vec<_> = entries
            .into_iter()
            .map(|entry| descriptor(media::OCI_MANIFEST, entry))
            .collect();
        let index = serde_json::json!({ "manifests": entries, "annotations": null })
            .to_string()
            .into_bytes();
        let served = documents.clone();
        let fake = Fake::start(move |seen| {
            let name = seen.path.rsplit('/').next().unwrap();
            if name == "latest" {
                return document(media::OCI_INDEX, &index);
            }
            let found = served.iter().find(|bytes| Digest::of(bytes).to_string() == name);
            found.map_or_else(|| status(404), |bytes| serve(seen, bytes))
        })
        .await;
        let source = fake.source("app", &options()).await;
        let index = source.index().await.unwrap().unwrap();
        let position = source.choose(&index, Some(platform)).await.unwrap();
        match (source.resolve(Some(platform)).await, expected) {
            (Ok(image), Some(expected)) => {
                assert_eq!(image.manifest_bytes, *expected, "{platform}");
                let chosen = &index.index.manifests()[position.unwrap()];
                assert_eq!(chosen.digest().to_string(), Digest::of(expected).to_string());
            }
            (Err(error), None) => {
                assert_eq!(position, None);
                let text = error.to_string();
                assert!(
                    text.contains("linux/arm64") && text.contains("no image"),
                    "{text}"
                );
            }
            (found, _) => panic!("{platform}: {found:?}"),
        }
    }
}
