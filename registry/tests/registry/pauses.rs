//! Hosts that want to be left alone: nothing is sent to them, whoever asks, and other hosts are not affected.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use peel_registry::{ClientOptions, Error};

use crate::fake::{Fake, data, options, serve, status, with};

#[tokio::test]
async fn a_pause_belongs_to_the_host() {
    let content = data(10_000);
    let served = content.clone();
    let paused = Fake::start(|_| with(status(429), "retry-after", "3600")).await;
    let healthy = Fake::start(move |seen| serve(seen, &served)).await;
    let blob = paused.blob(&content, &options()).await;
    let error = blob.read(0..10).await.unwrap_err();
    assert!(matches!(error, Error::Status { status: 429, .. }), "{error}");
    let until = error.retry_at().expect("the pause has an end");
    assert!(until > Instant::now() + Duration::from_secs(3000));
    for number in 0..24_u64 {
        let error = blob.read(number..number + 1).await.unwrap_err();
        assert!(error.is_transient() && error.retry_at().is_some(), "{error}");
        let text = error.to_string();
        let named = [paused.address.as_str(), "429", "GMT"];
        assert!(named.iter().all(|part| text.contains(part)), "{text}");
    }
    assert_eq!(paused.log().len(), 1, "a host that is paused was asked");
    let blob = healthy.blob(&content, &options()).await;
    assert_eq!(blob.read(0..10).await.unwrap(), content[..10]);
}

#[tokio::test]
async fn the_storage_is_a_host_of_its_own() {
    let storage = Fake::start(|_| with(status(503), "retry-after", "3600")).await;
    let location = format!("http://{}/blob", storage.address);
    let registry = Fake::start(move |_| with(status(307), "location", &location)).await;
    let blob = registry.blob(b"content", &options()).await;
    for _ in 0..3 {
        let error = blob.read(0..7).await.unwrap_err();
        assert!(error.retry_at().is_some(), "{error}");
    }
    assert_eq!((registry.log().len(), storage.log().len()), (3, 1));
}

#[tokio::test]
async fn all_that_wait_for_a_pause_come_back_after_it() {
    let content = data(10_000);
    let served = content.clone();
    let begin = Instant::now();
    let early = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&early);
    let fake = Fake::start(move |seen| {
        if seen.number == 0 {
            return with(status(429), "retry-after", "1");
        }
        if begin.elapsed() < Duration::from_secs(1) {
            counted.fetch_add(1, Ordering::Relaxed);
        }
        serve(seen, &served)
    })
    .await;
    let blob = fake.blob(&content, &options()).await;
    blob.read(0..1).await.unwrap();
    let reads = (0..24_u64).map(|number| blob.read(number..number + 10));
    assert!(futures::future::join_all(reads).await.iter().all(Result::is_ok));
    assert_eq!(
        early.load(Ordering::Relaxed),
        0,
        "a host that is paused was asked"
    );
}

#[tokio::test]
async fn a_wait_is_no_longer_than_the_waiter_has_time() {
    let fake = Fake::start(|_| with(status(429), "retry-after", "5")).await;
    let options = ClientOptions {
        retry_for: Duration::from_secs(1),
        ..options()
    };
    let blob = fake.blob(b"content", &options).await;
    for _ in 0..2 {
        assert!(blob.read(0..7).await.unwrap_err().retry_at().is_some());
    }
    assert_eq!(fake.log().len(), 1);
}

#[tokio::test]
async fn permanent_answers_are_told_apart() {
    for (code, transient) in [
        (401, false),
        (403, false),
        (404, false),
        (410, false),
        (416, false),
        (503, true),
    ] {
        let fake = Fake::start(move |_| status(code)).await;
        let options = ClientOptions {
            retry_for: Duration::from_millis(100),
            ..options()
        };
        let error = fake
            .blob(b"content", &options)
            .await
            .read(1..7)
            .await
            .unwrap_err();
        assert_eq!(
            (error.is_transient(), error.retry_at()),
            (transient, None),
            "{code}: {error}"
        );
    }
}
