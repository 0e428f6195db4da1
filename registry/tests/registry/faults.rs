//! Ranges from a registry that fails in every way that has been seen, and in some that an attacker would choose.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Body;
use peel_image::media;
use peel_registry::{ClientOptions, Error};

use crate::fake::{
    Fake, cut, data, descriptor, document, dripping, error, options, partial, serve, stalled, status, with,
};

const SIZE: usize = 300_000;

#[tokio::test]
async fn ranges_whole_blobs_and_empty_ranges() {
    let content = data(SIZE);
    let served = content.clone();
    let fake = Fake::start(move |seen| serve(seen, &served)).await;
    let blob = fake.blob(&content, &options()).await;
    for (start, end) in [
        (0, 1),
        (0, SIZE),
        (5, 5),
        (100, 70_000),
        (SIZE - 1, SIZE),
        (SIZE, SIZE),
    ] {
        let bytes = blob.read(start as u64..end as u64).await.unwrap();
        assert_eq!(bytes, content[start..end], "{start}..{end}");
    }
    assert_eq!(blob.read_verified(SIZE as u64).await.unwrap(), content);
    assert_eq!(
        fake.log().len(),
        5,
        "an empty range needs no request: {:?}",
        fake.log()
    );
    #[expect(clippy::reversed_empty_ranges, reason = "a range that no caller should make")]
    for range in [0..SIZE as u64 + 1, 7..3] {
        assert!(matches!(blob.read(range).await, Err(Error::Range { .. })));
    }
    assert!(matches!(
        blob.read_verified(10).await,
        Err(Error::TooLarge { .. })
    ));
}

#[tokio::test]
async fn many_ranges_at_once_share_a_client_and_its_counters() {
    let content = data(SIZE);
    let served = content.clone();
    let fake = Fake::start(move |seen| serve(seen, &served)).await;
    let source = fake.source("app", &options()).await;
    let blob = source.blob(&descriptor(media::OCI_LAYER, &content)).unwrap();
    let reads = (0..24_usize).map(|number| {
        let (blob, content) = (blob.clone(), &content);
        async move {
            let (start, end) = (number * 10_000, number * 10_000 + 15_000);
            assert_eq!(
                blob.read(start as u64..end as u64).await.unwrap(),
                content[start..end]
            );
        }
    });
    futures::future::join_all(reads).await;
    let counters = source.counters();
    assert_eq!(
        (counters.requests(), counters.bytes(), counters.retries()),
        (24, 24 * 15_000, 0)
    );
}

#[tokio::test]
async fn a_cut_body_goes_on_where_it_ended() {
    let content = data(SIZE);
    let served = content.clone();
    let fake = Fake::start(move |seen| {
        if seen.number < 3 {
            partial(seen, &served, |part| cut(&part[..50_000]))
        } else {
            serve(seen, &served)
        }
    })
    .await;
    let blob = fake.blob(&content, &options()).await;
    assert_eq!(blob.read(1000..SIZE as u64).await.unwrap(), content[1000..]);
    let starts: Vec<_> = fake.seen().iter().map(|seen| seen.range().unwrap()).collect();
    let last = SIZE - 1;
    assert_eq!(
        starts,
        [(1000, last), (51_000, last), (101_000, last), (151_000, last)]
    );
}

#[tokio::test]
async fn a_silent_body_goes_on_with_a_new_request() {
    let content = data(SIZE);
    let served = content.clone();
    let fake = Fake::start(move |seen| {
        if seen.number == 0 {
            partial(seen, &served, |part| stalled(&part[..50_000], Arc::new(())))
        } else {
            serve(seen, &served)
        }
    })
    .await;
    let options = ClientOptions {
        attempt_timeout: Duration::from_millis(300),
        ..options()
    };
    let source = fake.source("app", &options).await;
    let blob = source.blob(&descriptor(media::OCI_LAYER, &content)).unwrap();
    assert_eq!(blob.read_verified(SIZE as u64).await.unwrap(), content);
    assert_eq!(source.counters().retries(), 1);
    assert_eq!(fake.seen()[1].range(), Some((50_000, SIZE - 1)));
}

/// Patience for a drip of a byte every 20 ms, which is never silent.
fn impatient() -> ClientOptions {
    ClientOptions {
        attempt_timeout: Duration::from_millis(500),
        retry_for: Duration::from_secs(2),
        ..options()
    }
}

const DROP: Duration = Duration::from_millis(20);
/// Far more than patience allows, far less than the drips would take.
const TOO_LONG: Duration = Duration::from_secs(90);

#[tokio::test]
async fn a_dripping_body_goes_on_with_a_new_request() {
    let content = data(SIZE);
    let served = content.clone();
    let fake = Fake::start(move |seen| {
        if seen.number == 0 {
            partial(seen, &served, |part| dripping(part, 1, DROP))
        } else {
            serve(seen, &served)
        }
    })
    .await;
    let source = fake.source("app", &impatient()).await;
    let blob = source.blob(&descriptor(media::OCI_LAYER, &content)).unwrap();
    let read = tokio::time::timeout(TOO_LONG, blob.read_verified(SIZE as u64)).await;
    assert_eq!(read.expect("the drip was waited for").unwrap(), content);
    assert!(source.counters().retries() > 0);
    let (start, _) = fake.seen()[1].range().unwrap();
    assert!(start > 0, "what has come was asked for again");
}

#[tokio::test]
async fn endless_drips_end() {
    // Pieces, their size, and what is said of them: slower than a transfer must be, and too slow as a whole.
    let drip = "bytes in 0.5 s";
    for (what, size, pause, reason) in [
        ("manifest", 1, DROP, drip),
        (
            "manifest",
            64 << 10,
            Duration::from_millis(300),
            "no end of the body for 3 s",
        ),
        ("token", 1, DROP, drip),
        ("blob", 1, DROP, drip),
        ("error", 1, DROP, "503"),
        ("redirect", 1, DROP, "more than 5 redirects"),
    ] {
        let content = data(3 << 20);
        let served = content.clone();
        let fake = Fake::start(move |seen| {
            let slowly = |mut response: axum::response::Response, bytes: &[u8]| {
                *response.body_mut() = dripping(bytes, size, pause);
                response
            };
            match what {
                "token" if seen.path.starts_with("/token") => slowly(status(200), &served),
                "token" => {
                    let realm = format!("Bearer realm=\"http://{}/token\"", seen.header("host").unwrap());
                    with(status(401), "www-authenticate", &realm)
                }
                "blob" => partial(seen, &served, |part| dripping(part, size, pause)),
                "error" => {
                    let refused = error(503, "UNAVAILABLE", "later");
                    slowly(refused, br#"{"errors":[{"code":"UNAVAILABLE"}]}"#)
                }
                "redirect" => slowly(with(status(302), "location", &format!("{}x", seen.path)), &served),
                _ => slowly(document(media::OCI_MANIFEST, b""), &served),
            }
        })
        .await;
        let source = fake.source("app", &impatient()).await;
        let attempt = async {
            if what == "blob" {
                let blob = source.blob(&descriptor(media::OCI_LAYER, &content)).unwrap();
                blob.read(0..1 << 20).await.map(drop)
            } else {
                source.resolve(None).await.map(drop)
            }
        };
        let result = tokio::time::timeout(TOO_LONG, attempt).await;
        let error = result
            .unwrap_or_else(|_| panic!("{what} by {size}: no end"))
            .expect_err(what);
        assert!(error.to_string().contains(reason), "{what} by {size}: {error}");
    }
}

#[tokio::test]
async fn a_dropped_stream_lets_go_of_the_connection() {
    let content = data(SIZE);
    let served = content.clone();
    let alive = Arc::new(());
    let held = Arc::downgrade(&alive);
    let alive = std::sync::Mutex::new(Some(alive));
    let fake = Fake::start(move |seen| {
        let alive = alive.lock().unwrap().take().unwrap();
        partial(seen, &served, |part| stalled(&part[..1000], alive))
    })
    .await;
    let blob = fake.blob(&content, &options()).await;
    let mut stream = blob.stream(0..SIZE as u64).await.unwrap();
    assert_eq!(stream.next().await.unwrap().unwrap(), content[..1000]);
    assert!(held.upgrade().is_some());
    drop(stream);
    let gone = async {
        while held.upgrade().is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(20), gone).await;
    waited.expect("the connection is still held");
}

#[tokio::test]
async fn busy_registries_are_asked_again() {
    let content = data(1000);
    let served = content.clone();
    let fake = Fake::start(move |seen| match seen.number {
        0 => with(error(429, "TOOMANYREQUESTS", "slow down"), "retry-after", "0"),
        1 => status(503),
        2 => status(500),
        3 => with(status(502), "retry-after", "Fri, 31 Dec 1999 23:59:59 GMT"),
        _ => serve(seen, &served),
    })
    .await;
    let blob = fake.blob(&content, &options()).await;
    assert_eq!(blob.read_verified(1000).await.unwrap(), content);
    assert_eq!(fake.log().len(), 5);
}

#[tokio::test]
async fn patience_ends() {
    let fake = Fake::start(|_| error(503, "UNAVAILABLE", "down for today")).await;
    let options = ClientOptions {
        retry_for: Duration::from_millis(300),
        ..options()
    };
    let blob = fake.blob(b"content", &options).await;
    let error = blob.read(0..7).await.unwrap_err();
    let text = error.to_string();
    assert!(error.is_transient() && !error.is_not_found());
    for part in [
        fake.address.as_str(),
        "repository app",
        "503",
        "UNAVAILABLE: down for today",
        "blob sha256:",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert!(fake.log().len() > 1);

    let fake = Fake::start(|_| with(status(429), "retry-after", "86400")).await;
    let blob = fake.blob(b"content", &options).await;
    let text = blob.read(0..7).await.unwrap_err().to_string();
    assert!(
        text.contains("86400 s") && text.contains("log in or wait"),
        "{text}"
    );
    assert_eq!(
        fake.log().len(),
        1,
        "asked again before the time that the registry named"
    );
}

#[tokio::test]
async fn nobody_there() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let options = ClientOptions {
        retry_for: Duration::from_millis(200),
        ..options()
    };
    let name = format!("{address}/app").parse().unwrap();
    let source = peel_registry::Source::open(&name, &options).await.unwrap();
    let error = source.resolve(None).await.unwrap_err();
    let text = error.to_string();
    assert!(error.is_transient());
    for part in [
        address.to_string().as_str(),
        "repository app",
        "manifest latest",
        "check the registry's name",
    ] {
        assert!(text.contains(part), "{text}");
    }
}

#[tokio::test]
async fn a_registry_that_comes_back_is_used_again() {
    let content = data(SIZE);
    let served = content.clone();
    let fake = Fake::start(move |seen| match seen.number {
        0 => partial(seen, &served, |part| cut(&part[..100_000])),
        1..4 => status(503),
        _ => serve(seen, &served),
    })
    .await;
    let short = ClientOptions {
        retry_for: Duration::from_millis(1),
        ..options()
    };
    let blob = fake.blob(&content, &short).await;
    let mut stream = blob.stream(0..SIZE as u64).await.unwrap();
    let mut got = 0;
    let failed = loop {
        match stream.next().await {
            Some(Ok(part)) => got += part.len(),
            Some(Err(error)) => break error,
            None => panic!("the stream ended after {got} bytes without an error"),
        }
    };
    assert!(failed.is_transient() && got == 100_000, "{failed} after {got}");
    assert!(stream.next().await.is_none(), "bytes after an error");

    let blob = fake.blob(&content, &options()).await;
    assert_eq!(blob.read_verified(SIZE as u64).await.unwrap(), content);
}

#[tokio::test]
async fn lies_about_a_range_are_errors() {
    let content = data(10_000);
    let body = |length: usize| Body::from(vec![0; length]);
    type Lie = Box<dyn Fn(&crate::fake::Seen) -> axum::response::Response + Send + Sync>;
    let range = move |text: &'static str, length: usize| -> Lie {
        Box::new(move |_| {
            let mut response = with(status(206), "content-range", text);
            *response.body_mut() = body(length);
            response
        })
    };
    let cases: Vec<(&str, Lie, &str)> = vec![
        (
            "another start",
            range("bytes 0-99/10000", 100),
            "asked for bytes 100-199",
        ),
        (
            "beyond the end",
            range("bytes 100-300/10000", 201),
            "asked for bytes 100-199",
        ),
        (
            "another size",
            range("bytes 100-199/20000", 100),
            "expected 10000 bytes, got 20000",
        ),
        (
            "too long",
            range("bytes 100-199/10000", 150),
            "longer than the range",
        ),
        ("no range", Box::new(|_| status(206)), "without a Content-Range"),
        ("garbage", range("bytes a-b/c", 100), "without a Content-Range"),
        ("refused", Box::new(|_| status(416)), "has no bytes 100..200"),
        (
            "smaller blob",
            Box::new(|_| {
                let mut response = status(200);
                *response.body_mut() = Body::from(vec![0; 500]);
                response
            }),
            "expected 10000 bytes, got 500",
        ),
        (
            "gone",
            Box::new(|_| error(404, "BLOB_UNKNOWN", "no such blob")),
            "BLOB_UNKNOWN",
        ),
    ];
    for (name, lie, reason) in cases {
        let fake = Fake::start(lie).await;
        let blob = fake.blob(&content, &options()).await;
        let error = blob.read(100..200).await.expect_err(name);
        assert!(error.to_string().contains(reason), "{name}: {error}");
        assert!(!error.is_transient(), "{name}: {error}");
        assert_eq!(fake.log().len(), 1, "{name}: asked again");
    }
}

#[tokio::test]
async fn altered_content_is_noticed_at_its_end() {
    let content = data(SIZE);
    let mut altered = content.clone();
    altered[SIZE / 2] ^= 1;
    let fake = Fake::start(move |seen| serve(seen, &altered)).await;
    let blob = fake.blob(&content, &options()).await;
    let error = blob.read_verified(SIZE as u64).await.unwrap_err();
    assert!(
        matches!(&error, Error::DigestMismatch { expected, .. } if *expected == blob.digest()),
        "{error}"
    );
    assert!(error.to_string().contains(&fake.address), "{error}");

    let mut stream = blob.stream_verified().await.unwrap();
    let mut bytes = 0;
    let error = loop {
        match stream.next().await {
            Some(Ok(part)) => bytes += part.len(),
            Some(Err(error)) => break error,
            None => panic!("altered content passed"),
        }
    };
    assert!(matches!(error, Error::DigestMismatch { .. }) && bytes == SIZE);
}

#[tokio::test]
async fn storage_behind_a_redirect_is_remembered_and_told_no_secret() {
    let content = data(SIZE);
    let served = content.clone();
    let expired = Arc::new(AtomicUsize::new(0));
    let refuse = Arc::clone(&expired);
    let storage = Fake::start(move |seen| {
        if refuse
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
            .is_ok()
        {
            return status(403);
        }
        serve(seen, &served)
    })
    .await;
    let target = format!("http://{}/bucket/blob?X-Amz-Signature=s", storage.address);
    let registry = Fake::start(move |seen| {
        if seen.header("authorization") != Some("Basic dXNlcjpzZWNyZXQ=") {
            return with(status(401), "www-authenticate", "Basic realm=\"test\"");
        }
        with(status(307), "location", &target)
    })
    .await;
    let options = crate::auth::with_password(&registry.address, options());
    let blob = registry.blob(&content, &options.options).await;
    assert_eq!(blob.read(0..100).await.unwrap(), content[..100]);
    assert_eq!(blob.read(100..200).await.unwrap(), content[100..200]);
    assert_eq!(
        registry.log().len(),
        2,
        "one refused, one redirected: {:?}",
        registry.log()
    );
    expired.store(1, Ordering::SeqCst);
    assert_eq!(blob.read(200..300).await.unwrap(), content[200..300]);
    assert_eq!(registry.log().len(), 3, "an expired URL is asked for again");
    let at_storage = storage.seen();
    assert_eq!(at_storage.len(), 4);
    for seen in at_storage {
        assert_eq!(seen.header("authorization"), None);
        assert!(seen.range().is_some());
    }

    // Refused for good: the signature is in no error.
    expired.store(100, Ordering::SeqCst);
    let error = blob.read(300..400).await.unwrap_err().to_string();
    assert!(error.contains("403") && !error.contains("Signature"), "{error}");
}

#[tokio::test]
async fn a_remembered_storage_that_fails_is_asked_for_again() {
    let content = data(SIZE);
    type Misbehaviour = Box<dyn Fn(&crate::fake::Seen, &[u8]) -> axum::response::Response + Send + Sync>;
    // What the first storage does after its first good answer; `None`: its host is gone.
    let cases: Vec<(&str, Option<Misbehaviour>, u64)> = vec![
        ("gone", None, 0),
        ("broken", Some(Box::new(|_, _| status(500))), 0),
        ("overloaded", Some(Box::new(|_, _| status(503))), 0),
        (
            "busy",
            Some(Box::new(|_, _| with(status(429), "retry-after", "3600"))),
            0,
        ),
        (
            "replaced",
            Some(Box::new(|_, _| with(status(206), "content-range", "bytes 0-0/1"))),
            0,
        ),
        (
            "silent",
            Some(Box::new(|seen, content| {
                partial(seen, content, |part| stalled(&part[..10], Arc::new(())))
            })),
            1,
        ),
        (
            "cut",
            Some(Box::new(|seen, content| {
                partial(seen, content, |part| cut(&part[..10]))
            })),
            1,
        ),
    ];
    for (name, misbehaviour, retries) in cases {
        let gone = misbehaviour.is_none();
        let served = content.clone();
        let first = Fake::start(move |seen| match &misbehaviour {
            Some(misbehaviour) if seen.number > 0 => misbehaviour(seen, &served),
            _ => with(serve(seen, &served), "connection", "close"),
        })
        .await;
        let served = content.clone();
        let second = Fake::start(move |seen| serve(seen, &served)).await;
        let (here, there) = (first.address.clone(), second.address.clone());
        let registry = Fake::start(move |seen| {
            let storage = if seen.number == 0 { &here } else { &there };
            with(status(307), "location", &format!("http://{storage}/blob"))
        })
        .await;
        let options = ClientOptions {
            attempt_timeout: Duration::from_secs(2),
            ..options()
        };
        let source = registry.source("app", &options).await;
        let blob = source.blob(&descriptor(media::OCI_LAYER, &content)).unwrap();
        assert_eq!(blob.read(0..100).await.unwrap(), content[..100], "{name}");
        if gone {
            first.end().await;
        }
        assert_eq!(blob.read(100..200).await.unwrap(), content[100..200], "{name}");
        assert_eq!(source.counters().retries(), retries, "{name}");
        assert_eq!(registry.log().len(), 2, "{name}: {:?}", registry.log());
        assert_eq!(second.log().len(), 1, "{name}: {:?}", second.log());
    }
}

#[tokio::test]
async fn redirects_end() {
    let fake = Fake::start(|seen| with(status(302), "location", &format!("{}x", seen.path))).await;
    let blob = fake.blob(b"content", &options()).await;
    let error = blob.read(0..7).await.unwrap_err().to_string();
    assert!(error.contains("more than 5 redirects"), "{error}");
    for location in ["file:///etc/passwd", "http://", "gopher://x/"] {
        let fake = Fake::start(move |_| with(status(302), "location", location)).await;
        let blob = fake.blob(b"content", &options()).await;
        let error = blob.read(0..7).await.unwrap_err().to_string();
        assert!(error.contains("Location"), "{location}: {error}");
    }
}

#[tokio::test]
async fn foreign_layers_and_embedded_data() {
    let fake = Fake::start(|_| status(404)).await;
    let source = fake.source("app", &options()).await;
    for media_type in [
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    ] {
        let blob = source.blob(&descriptor(media_type, b"x")).unwrap();
        let error = blob.read_verified(1).await.unwrap_err();
        assert!(matches!(error, Error::Foreign { .. }), "{error}");
        assert!(error.to_string().contains("non-distributable"), "{error}");
        let there = Fake::start(|seen| serve(seen, b"x")).await;
        let source = there.source("app", &options()).await;
        let blob = source.blob(&descriptor(media_type, b"x")).unwrap();
        assert_eq!(blob.read_verified(1).await.unwrap(), "x");
    }
    let asked = fake.log().len();
    let mut embedded = descriptor(media::OCI_CONFIG, b"content");
    embedded.set_data(Some("Y29udGVudA==".into()));
    let blob = source.blob(&embedded).unwrap();
    assert_eq!(blob.read_verified(7).await.unwrap(), "content");
    assert_eq!(blob.read(2..4).await.unwrap(), "nt");
    assert_eq!(fake.log().len(), asked);
    embedded.set_data(Some("Y29udGVuZA==".into()));
    let blob = source.blob(&embedded).unwrap();
    assert!(
        blob.read_verified(7).await.unwrap_err().is_not_found(),
        "altered embedded data was used"
    );
}
