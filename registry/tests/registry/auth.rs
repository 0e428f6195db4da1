//! Basic and Bearer, with credentials from files and helpers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::response::Response;
use base64::Engine;
use peel_image::media;
use peel_registry::ClientOptions;

use crate::fake::{Fake, Seen, data, descriptor, document, error, options, serve, status, with};

/// Options with a credential file that lives as long as they do.
pub(crate) struct WithFile {
    pub(crate) options: ClientOptions,
    _file: tempfile::NamedTempFile,
}

pub(crate) fn with_config(config: &serde_json::Value, options: ClientOptions) -> WithFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), config.to_string()).unwrap();
    let options = ClientOptions {
        auth_files: vec![file.path().to_owned()],
        ..options
    };
    WithFile { options, _file: file }
}

/// `user` and `secret` for `registry`.
pub(crate) fn with_password(registry: &str, options: ClientOptions) -> WithFile {
    let auth = base64::engine::general_purpose::STANDARD.encode("user:secret");
    with_config(
        &serde_json::json!({ "auths": { registry: { "auth": auth } } }),
        options,
    )
}

#[tokio::test]
async fn basic_once_asked_for_is_sent_at_once() {
    let content = data(1000);
    let served = content.clone();
    let fake = Fake::start(move |seen| match seen.header("authorization") {
        Some("Basic dXNlcjpzZWNyZXQ=") => serve(seen, &served),
        _ => with(status(401), "www-authenticate", "Basic realm=\"r\""),
    })
    .await;
    let file = with_password(&fake.address, options());
    let blob = fake.blob(&content, &file.options).await;
    assert_eq!(blob.read(0..10).await.unwrap(), content[..10]);
    assert_eq!(blob.read(10..20).await.unwrap(), content[10..20]);
    assert_eq!(fake.log().len(), 3);
    assert_eq!(
        fake.seen()[0].header("authorization"),
        None,
        "credentials before a challenge"
    );
}

#[tokio::test]
async fn a_login_that_is_missing_or_wrong_says_what_to_do() {
    let fake = Fake::start(|_| {
        with(
            error(401, "UNAUTHORIZED", "who are you"),
            "www-authenticate",
            "Basic realm=\"r\"",
        )
    })
    .await;
    let wrong = with_password(&fake.address, options());
    for (options, requests) in [(options(), 1), (wrong.options, 2)] {
        let before = fake.log().len();
        let source = fake.source("app:v1", &options).await;
        let error = source.resolve(None).await.unwrap_err();
        let text = error.to_string();
        for part in [
            &fake.address,
            "repository app",
            "manifest v1",
            "UNAUTHORIZED: who are you",
            "podman login",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(
            !text.contains("secret") && !format!("{error:?}").contains("secret"),
            "{error:?}"
        );
        assert_eq!(fake.log().len() - before, requests);
    }
}

#[tokio::test]
async fn credentials_are_read_again_after_a_refusal() {
    let fake = Fake::start(|seen| match seen.header("authorization") {
        Some("Basic dXNlcjpzZWNyZXQ=") => serve(seen, b"content"),
        _ => with(status(401), "www-authenticate", "Basic realm=\"r\""),
    })
    .await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let options = ClientOptions {
        auth_files: vec![file.path().to_owned()],
        ..options()
    };
    let blob = fake.blob(b"content", &options).await;
    blob.read(0..7).await.unwrap_err();
    let config = serde_json::json!({ "auths": { fake.address.as_str(): { "auth": "dXNlcjpzZWNyZXQ=" } } });
    std::fs::write(file.path(), config.to_string()).unwrap();
    assert_eq!(blob.read(0..7).await.unwrap(), "content");
}

/// A registry that wants the token `tN` of its token server, where N counts the tokens given.
struct Bearer {
    registry: Fake,
    tokens: Fake,
    /// Tokens up to this number are refused.
    expired: Arc<AtomicUsize>,
}

async fn bearer(
    content: &'static [u8],
    give: impl Fn(&Seen) -> Option<Response> + Send + Sync + 'static,
) -> Bearer {
    let tokens = Fake::start(move |seen| {
        give(seen).unwrap_or_else(|| {
            let token = format!(r#"{{"token":"t{}","expires_in":300}}"#, seen.number + 1);
            document("application/json", token.as_bytes())
        })
    })
    .await;
    let expired = Arc::new(AtomicUsize::new(0));
    let refused = Arc::clone(&expired);
    let realm = format!("http://{}/token", tokens.address);
    let registry = Fake::start(move |seen| {
        let token = seen
            .header("authorization")
            .and_then(|value| value.strip_prefix("Bearer t"));
        match token.map(|number| number.parse::<usize>().unwrap()) {
            Some(number) if number > refused.load(Ordering::SeqCst) => serve(seen, content),
            _ => {
                let repository = seen.path.split('/').nth(2).unwrap();
                let challenge = format!(
                    "Bearer realm=\"{realm}\",service=\"reg\",scope=\"repository:{repository}:pull\""
                );
                with(status(401), "www-authenticate", &challenge)
            }
        }
    })
    .await;
    Bearer {
        registry,
        tokens,
        expired,
    }
}

#[tokio::test]
async fn anonymous_tokens_are_kept_until_they_are_refused() {
    let pair = bearer(b"content", |_| None).await;
    let blob = pair.registry.blob(b"content", &options()).await;
    let reads = (0..8).map(|_| blob.read(0..7));
    for read in futures::future::join_all(reads).await {
        assert_eq!(read.unwrap(), "content");
    }
    let query = "GET /token?service=reg&scope=repository%3Aapp%3Apull&client_id=peel";
    assert_eq!(pair.tokens.log(), [query], "one token for all who wait for it");
    assert_eq!(pair.tokens.seen()[0].header("authorization"), None);

    pair.expired.store(1, Ordering::SeqCst);
    assert_eq!(blob.read(0..7).await.unwrap(), "content");
    assert_eq!(pair.tokens.log().len(), 2);

    // What is known about the registry saves another repository the refusal.
    let before = pair.registry.log().len();
    let other = pair.registry.source("other", &options()).await;
    let other = other.blob(&descriptor(media::OCI_LAYER, b"content")).unwrap();
    assert_eq!(other.read(0..7).await.unwrap(), "content");
    assert_eq!(pair.registry.log().len(), before + 1);
    assert!(pair.tokens.log()[2].contains("repository%3Aother%3Apull"));
}

#[tokio::test]
async fn passwords_go_to_the_token_server_alone() {
    let pair = bearer(b"content", |seen| {
        let known = seen.header("authorization") == Some("Basic dXNlcjpzZWNyZXQ=");
        (!known).then(|| error(401, "UNAUTHORIZED", "bad password"))
    })
    .await;
    let file = with_password(&pair.registry.address, options());
    let blob = pair.registry.blob(b"content", &file.options).await;
    assert_eq!(blob.read(0..7).await.unwrap(), "content");
    assert!(pair.tokens.log()[0].ends_with("&account=user"));
    for seen in pair.registry.seen() {
        assert!(
            !seen
                .header("authorization")
                .unwrap_or_default()
                .starts_with("Basic")
        );
    }

    let blob = pair.registry.blob(b"content", &options()).await;
    let text = blob.read(0..7).await.unwrap_err().to_string();
    assert!(
        text.contains("token from 127.0.0.1") && text.contains("podman login"),
        "{text}"
    );
}

#[tokio::test]
async fn identity_tokens_and_servers_without_get_are_posted_to() {
    let identity = serde_json::json!({ "identitytoken": "refresh" });
    let password = serde_json::json!({ "auth": "dXNlcjpzZWNyZXQ=" });
    for (entry, requests, form) in [
        (identity, 1, "grant_type=refresh_token&refresh_token=refresh"),
        (password, 2, "grant_type=password&username=user&password=secret"),
    ] {
        let pair = bearer(b"content", |seen| (seen.method != "POST").then(|| status(405))).await;
        let config = serde_json::json!({ "auths": { pair.registry.address.as_str(): entry } });
        let file = with_config(&config, options());
        let blob = pair.registry.blob(b"content", &file.options).await;
        assert_eq!(blob.read(0..7).await.unwrap(), "content");
        let seen = pair.tokens.seen();
        assert_eq!(seen.len(), requests);
        let body = String::from_utf8(seen[requests - 1].body.to_vec()).unwrap();
        assert!(body.ends_with(form), "{body}");
        assert_eq!(seen[requests - 1].header("authorization"), None);
    }
}

#[tokio::test]
async fn token_servers_that_fail() {
    for (answer, reason) in [
        ("", "no JSON object with a token"),
        ("{}", "has no token"),
        (r#"{"token":"a\u0000b"}"#, "no header may have"),
    ] {
        let pair = bearer(b"content", move |_| {
            Some(document("application/json", answer.as_bytes()))
        })
        .await;
        let blob = pair.registry.blob(b"content", &options()).await;
        let text = blob.read(0..7).await.unwrap_err().to_string();
        assert!(text.contains(reason), "{answer}: {text}");
    }
    let pair = bearer(b"content", |seen| (seen.number == 0).then(|| status(503))).await;
    let blob = pair.registry.blob(b"content", &options()).await;
    assert_eq!(
        blob.read(0..7).await.unwrap(),
        "content",
        "a busy token server is asked again"
    );
}
