//! A registry whose every answer is written by the test, and that remembers what it was asked.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::Response;
use peel_image::{Digest, media};
use peel_registry::{Blob, ClientOptions, ImageName, Source};

/// One request as it arrived.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: Method,
    /// Path and query.
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    /// How many requests came before.
    pub(crate) number: usize,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// First and last byte asked for.
    pub(crate) fn range(&self) -> Option<(usize, usize)> {
        let range = self.header("range")?.strip_prefix("bytes=")?;
        let (first, last) = range.split_once('-')?;
        Some((first.parse().ok()?, last.parse().ok()?))
    }
}

type Handler = Box<dyn Fn(&Seen) -> Response + Send + Sync>;

struct Inner {
    handler: Handler,
    seen: Mutex<Vec<Seen>>,
}

/// A server on a loopback port that lives as long as the test's runtime.
#[derive(Clone)]
pub(crate) struct Fake {
    pub(crate) address: String,
    inner: Arc<Inner>,
    listening: tokio::task::AbortHandle,
}

impl Fake {
    pub(crate) async fn start(handler: impl Fn(&Seen) -> Response + Send + Sync + 'static) -> Self {
        let inner = Arc::new(Inner {
            handler: Box::new(handler),
            seen: Mutex::default(),
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let app = Router::new().fallback(answer).with_state(Arc::clone(&inner));
        let listening = tokio::spawn(async move { axum::serve(listener, app).await }).abort_handle();
        Self {
            address,
            inner,
            listening,
        }
    }

    /// Takes no more connections.
    pub(crate) async fn end(&self) {
        self.listening.abort();
        while !self.listening.is_finished() {
            tokio::task::yield_now().await;
        }
    }

    /// What was asked so far: method and path.
    pub(crate) fn log(&self) -> Vec<String> {
        self.seen()
            .iter()
            .map(|seen| format!("{} {}", seen.method, seen.path))
            .collect()
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.inner.seen.lock().unwrap().clone()
    }

    pub(crate) async fn source(&self, name: &str, options: &ClientOptions) -> Source {
        let name: ImageName = format!("{}/{name}", self.address).parse().unwrap();
        Source::open(&name, options).await.unwrap()
    }

    /// A blob of the repository `app`.
    pub(crate) async fn blob(&self, data: &[u8], options: &ClientOptions) -> Blob {
        let source = self.source("app:latest", options).await;
        source.blob(&descriptor(media::OCI_LAYER_GZIP, data)).unwrap()
    }
}

async fn answer(State(inner): State<Arc<Inner>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 30).await.unwrap_or_default();
    let seen = {
        let mut log = inner.seen.lock().unwrap();
        let seen = Seen {
            method: parts.method,
            path: parts.uri.to_string(),
            headers: parts.headers,
            body,
            number: log.len(),
        };
        log.push(seen.clone());
        seen
    };
    (inner.handler)(&seen)
}

/// Options that fail fast.
pub(crate) fn options() -> ClientOptions {
    ClientOptions {
        attempt_timeout: Duration::from_secs(5),
        retry_for: Duration::from_secs(20),
        ..ClientOptions::default()
    }
}

pub(crate) fn descriptor(media_type: &str, data: &[u8]) -> oci_spec::image::Descriptor {
    let digest = Digest::of(data)
        .to_string()
        .parse::<oci_spec::image::Digest>()
        .unwrap();
    oci_spec::image::Descriptor::new(media_type.into(), data.len() as u64, digest)
}

/// Bytes that differ everywhere.
pub(crate) fn data(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[0]
        })
        .collect()
}

pub(crate) fn status(code: u16) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::from_u16(code).unwrap();
    response
}

pub(crate) fn with(mut response: Response, name: &'static str, value: &str) -> Response {
    response.headers_mut().insert(name, value.parse().unwrap());
    response
}

pub(crate) fn error(code: u16, name: &str, message: &str) -> Response {
    let mut response = status(code);
    *response.body_mut() = format!(r#"{{"errors":[{{"code":"{name}","message":"{message}"}}]}}"#).into();
    response
}

pub(crate) fn document(media_type: &'static str, body: &[u8]) -> Response {
    with(
        Response::new(Body::from(body.to_vec())),
        "content-type",
        media_type,
    )
}

/// Serves `data` as a good registry does.
pub(crate) fn serve(seen: &Seen, data: &[u8]) -> Response {
    partial(seen, data, |part| Body::from(part.to_vec()))
}

/// Serves `data` with headers as they should be and a body as the test wants it.
pub(crate) fn partial(seen: &Seen, data: &[u8], body: impl FnOnce(&[u8]) -> Body) -> Response {
    let (code, part, range) = match seen.range() {
        Some((first, last)) => (
            206,
            &data[first..=last],
            Some(format!("bytes {first}-{last}/{}", data.len())),
        ),
        None => (200, data, None),
    };
    let mut response = status(code);
    *response.body_mut() = body(part);
    response
        .headers_mut()
        .insert(header::CONTENT_LENGTH, part.len().into());
    match range {
        Some(range) => with(response, "content-range", &range),
        None => response,
    }
}

/// `part`, and then the connection breaks.
pub(crate) fn cut(part: &[u8]) -> Body {
    let pieces = vec![
        Ok(Bytes::copy_from_slice(part)),
        Err(std::io::Error::other("the test breaks the connection")),
    ];
    // The pause lets the first piece leave before the connection goes.
    Body::from_stream(futures::StreamExt::then(
        futures::stream::iter(pieces),
        |piece| async {
            tokio::time::sleep(Duration::from_millis(30)).await;
            piece
        },
    ))
}

/// `part`, and then nothing for ever. `alive` is let go of with the connection.
pub(crate) fn stalled(part: &[u8], alive: Arc<()>) -> Body {
    let first = futures::stream::iter(vec![Ok::<_, std::io::Error>(Bytes::copy_from_slice(part))]);
    let rest = futures::stream::unfold(alive, |alive| async move {
        std::future::pending::<()>().await;
        Some((Ok(Bytes::new()), alive))
    });
    Body::from_stream(futures::StreamExt::chain(first, rest))
}

/// `part` in pieces of `size` bytes with a pause before each.
pub(crate) fn dripping(part: &[u8], size: usize, pause: Duration) -> Body {
    let rest = Bytes::copy_from_slice(part);
    Body::from_stream(futures::stream::unfold(rest, move |mut rest| async move {
        if rest.is_empty() {
            return None;
        }
        tokio::time::sleep(pause).await;
        let piece = rest.split_to(size.min(rest.len()));
        Some((Ok::<_, std::io::Error>(piece), rest))
    }))
}
