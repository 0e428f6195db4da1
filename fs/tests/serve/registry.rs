//! A registry on the loopback interface that serves an OCI layout, and misbehaves when it is told to.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderMap, Response, StatusCode, header};
use axum::routing::get;

/// What the registry has done and how it misbehaves.
#[derive(Debug, Default)]
pub(crate) struct Behaviour {
    /// Every request is refused.
    pub(crate) down: AtomicBool,
    /// What every request for a blob is answered, with a long `Retry-After`; 0 for nothing special.
    pub(crate) refusal: AtomicU16,
    /// Ranges are ignored.
    pub(crate) whole: AtomicBool,
    /// Ranges begin one byte late.
    pub(crate) shifted: AtomicBool,
    /// No request is answered before this is over.
    pub(crate) hold: AtomicBool,
    /// Milliseconds before each answer.
    pub(crate) delay: AtomicU64,
    /// Requests for blobs: digest and range as text.
    pub(crate) blobs: Mutex<Vec<String>>,
    /// Requests of any kind.
    pub(crate) requests: AtomicU64,
    /// Blobs (hex) of which a piece comes each 20 ms, for minutes.
    pub(crate) slow: Mutex<HashSet<String>>,
    /// Bodies of slow blobs that are being sent.
    pub(crate) sending: Arc<AtomicU64>,
    /// Bytes to flip: blob (hex) to offsets.
    pub(crate) damage: Mutex<HashMap<String, Vec<usize>>>,
}

/// A running registry; ends with the process.
#[derive(Debug)]
pub(crate) struct Registry {
    pub(crate) address: SocketAddr,
    pub(crate) behaviour: Arc<Behaviour>,
    _runtime: tokio::runtime::Runtime,
}

#[derive(Debug, Clone)]
struct Served {
    layout: PathBuf,
    behaviour: Arc<Behaviour>,
}

impl Registry {
    pub(crate) fn start(layout: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let behaviour = Arc::<Behaviour>::default();
        let served = Served {
            layout: layout.to_owned(),
            behaviour: Arc::clone(&behaviour),
        };
        let app = Router::new()
            .route("/v2/", get(|| async { StatusCode::OK }))
            .route("/v2/image/manifests/{reference}", get(manifest))
            .route("/v2/image/blobs/{digest}", get(blob))
            .with_state(served);
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(async move { axum::serve(listener, app).await });
        Self {
            address,
            behaviour,
            _runtime: runtime,
        }
    }

    /// Name of the image with this tag.
    pub(crate) fn image(&self, tag: &str) -> String {
        format!("{}/image:{tag}", self.address)
    }

    /// Requests for blobs so far.
    pub(crate) fn blob_requests(&self) -> usize {
        self.behaviour.blobs.lock().unwrap().len()
    }
}

/// Counts a body while it is being sent.
#[derive(Debug)]
struct Sending(Arc<AtomicU64>);

impl Sending {
    fn new(count: &Arc<AtomicU64>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(count))
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn misbehave(behaviour: &Behaviour) -> Result<(), StatusCode> {
    behaviour.requests.fetch_add(1, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(behaviour.delay.load(Ordering::SeqCst))).await;
    while behaviour.hold.load(Ordering::SeqCst) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    if behaviour.down.load(Ordering::SeqCst) {
        return Err(StatusCode::SERVICE_UNAVAILABLE);
    }
    Ok(())
}

fn read_blob(served: &Served, digest: &str) -> Option<Vec<u8>> {
    let hex = digest.strip_prefix("sha256:")?;
    let mut bytes = std::fs::read(served.layout.join("blobs/sha256").join(hex)).ok()?;
    for offset in served
        .behaviour
        .damage
        .lock()
        .unwrap()
        .get(hex)
        .into_iter()
        .flatten()
    {
        bytes[*offset] ^= 0x55;
    }
    Some(bytes)
}

async fn manifest(
    State(served): State<Served>,
    UrlPath(reference): UrlPath<String>,
) -> Result<Response<Body>, StatusCode> {
    misbehave(&served.behaviour).await?;
    let digest = if reference.starts_with("sha256:") {
        reference
    } else {
        tag_digest(&served.layout, &reference).ok_or(StatusCode::NOT_FOUND)?
    };
    let bytes = read_blob(&served, &digest).ok_or(StatusCode::NOT_FOUND)?;
    let parsed: serde_json::Value = serde_json::from_slice(&bytes).map_err(|_| StatusCode::NOT_FOUND)?;
    let media_type = parsed["mediaType"]
        .as_str()
        .unwrap_or("application/vnd.oci.image.manifest.v1+json")
        .to_owned();
    Response::builder()
        .header(header::CONTENT_TYPE, media_type)
        .header("docker-content-digest", digest)
        .body(Body::from(bytes))
        .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}

fn tag_digest(layout: &Path, tag: &str) -> Option<String> {
    let index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(layout.join("index.json")).ok()?).ok()?;
    let found = index["manifests"]
        .as_array()?
        .iter()
        .find(|entry| entry["annotations"]["org.opencontainers.image.ref.name"] == tag)?;
    Some(found["digest"].as_str()?.to_owned())
}

async fn blob(
    State(served): State<Served>,
    UrlPath(digest): UrlPath<String>,
    headers: HeaderMap,
) -> Result<Response<Body>, StatusCode> {
    misbehave(&served.behaviour).await?;
    let refusal = served.behaviour.refusal.load(Ordering::SeqCst);
    if refusal != 0 {
        return Response::builder()
            .status(refusal)
            .header(header::RETRY_AFTER, "3600")
            .body(Body::empty())
            .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR);
    }
    let bytes = read_blob(&served, &digest).ok_or(StatusCode::NOT_FOUND)?;
    let range = headers
        .get(header::RANGE)
        .filter(|_| !served.behaviour.whole.load(Ordering::SeqCst))
        .and_then(|value| value.to_str().ok())
        .map(str::to_owned);
    served
        .behaviour
        .blobs
        .lock()
        .unwrap()
        .push(format!("{digest} {}", range.as_deref().unwrap_or("whole")));
    let hex = digest.trim_start_matches("sha256:");
    if served.behaviour.slow.lock().unwrap().contains(hex) {
        let sending = Sending::new(&served.behaviour.sending);
        let length = bytes.len();
        let pieces = futures::stream::unfold((bytes, 0, sending), |(bytes, from, sending)| async move {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let piece = bytes.get(from..(from + 16).min(bytes.len()))?.to_vec();
            let to = from + piece.len();
            (!piece.is_empty()).then_some((Ok::<_, std::io::Error>(piece), (bytes, to, sending)))
        });
        return Response::builder()
            .header(header::CONTENT_LENGTH, length)
            .body(Body::from_stream(pieces))
            .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR);
    }
    let Some(range) = range else {
        return Ok(Response::new(Body::from(bytes)));
    };
    let (from, to) = range
        .strip_prefix("bytes=")
        .and_then(|range| range.split_once('-'))
        .ok_or(StatusCode::BAD_REQUEST)?;
    let shift = usize::from(served.behaviour.shifted.load(Ordering::SeqCst));
    let from = shift + from.parse::<usize>().map_err(|_| StatusCode::BAD_REQUEST)?;
    let to: usize = to.parse().unwrap_or(bytes.len() - 1).min(bytes.len() - 1);
    let part = bytes
        .get(from..=to)
        .ok_or(StatusCode::RANGE_NOT_SATISFIABLE)?
        .to_vec();
    Response::builder()
        .status(StatusCode::PARTIAL_CONTENT)
        .header(
            header::CONTENT_RANGE,
            format!("bytes {from}-{to}/{}", bytes.len()),
        )
        .body(Body::from(part))
        .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}
