//! The server's loop: accepts connections, takes requests apart, applies the fault plan, counts.
//!
//! Called by [`super::Registry::start`] on the registry's thread. Every open connection is known here, so that `refuse`
//! and the end of the registry can cut it.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{Response, StatusCode, header};
use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;

use super::faults::{Action, Switches};
use super::{RequestRecord, Shared, pull, push};

/// Pause after a failed accept or bind, so that an error that stays does not take a whole core.
const RETRY: Duration = Duration::from_millis(10);

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;

/// Second handles of all open connections, to cut them with.
type Open = Arc<Mutex<BTreeMap<u64, std::net::TcpStream>>>;

/// The server before it runs.
#[derive(Debug)]
pub(super) struct Server {
    listener: std::net::TcpListener,
    shared: Arc<Shared>,
    stopped: watch::Receiver<bool>,
}

impl Server {
    pub(super) fn new(
        listener: std::net::TcpListener,
        shared: Arc<Shared>,
        stopped: watch::Receiver<bool>,
    ) -> Self {
        Self {
            listener,
            shared,
            stopped,
        }
    }

    /// Serves until it is told to stop.
    pub(super) async fn run(self) {
        let Self {
            listener,
            shared,
            mut stopped,
        } = self;
        let listener = match Gate::new(listener, shared.faults.switches()) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(%error, "the embedded registry cannot listen");
                return;
            }
        };
        let open = Arc::clone(&listener.open);
        let pushes = Arc::new(push::Uploads::default());
        let app = axum::Router::new().fallback(answer).with_state((shared, pushes));
        tokio::select! {
            result = async { axum::serve(listener, app).await } => {
                if let Err(error) = result {
                    tracing::error!(%error, "the embedded registry ended");
                }
            }
            _ = stopped.wait_for(|stopped| *stopped) => {}
        }
        cut(&open);
    }
}

/// Cuts every open connection.
fn cut(open: &Open) {
    for stream in open.lock().unwrap_or_else(PoisonError::into_inner).values() {
        // It may be closed already, which is as good.
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
}

/// A listener that can go away and come back on the same port.
#[derive(Debug)]
struct Gate {
    addr: SocketAddr,
    listener: Option<TcpListener>,
    switches: watch::Receiver<Switches>,
    open: Open,
    next: u64,
}

impl Gate {
    fn new(listener: std::net::TcpListener, switches: watch::Receiver<Switches>) -> io::Result<Self> {
        let addr = listener.local_addr()?;
        let listener = Some(TcpListener::from_std(listener)?);
        Ok(Self {
            addr,
            listener,
            switches,
            open: Arc::default(),
            next: 0,
        })
    }

    fn bind(&self) -> io::Result<TcpListener> {
        let socket = if self.addr.is_ipv4() {
            TcpSocket::new_v4()?
        } else {
            TcpSocket::new_v6()?
        };
        socket.set_reuseaddr(true)?;
        socket.bind(self.addr)?;
        socket.listen(BACKLOG)
    }

    /// Registers a new connection.
    fn admit(&mut self, stream: TcpStream) -> io::Result<Tracked> {
        stream.set_nodelay(true)?;
        let std = stream.into_std()?;
        let handle = std.try_clone()?;
        let stream = TcpStream::from_std(std)?;
        let id = self.next;
        self.next += 1;
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id, handle);
        Ok(Tracked {
            stream,
            id,
            open: Arc::clone(&self.open),
        })
    }
}

impl Listener for Gate {
    type Io = Tracked;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            if self.switches.borrow_and_update().refused {
                self.listener = None;
                cut(&self.open);
                if self.switches.changed().await.is_err() {
                    // Nobody can open the gate any more; the registry is being dropped.
                    std::future::pending::<()>().await;
                }
                continue;
            }
            let Some(listener) = &self.listener else {
                match self.bind() {
                    Ok(listener) => self.listener = Some(listener),
                    Err(_) => tokio::time::sleep(RETRY).await,
                }
                continue;
            };
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => match self.admit(stream) {
                        Ok(tracked) => return (tracked, peer),
                        Err(error) => tracing::debug!(%error, "a connection was gone before it was served"),
                    },
                    Err(_) => tokio::time::sleep(RETRY).await,
                },
                changed = self.switches.changed() => if changed.is_err() {
                    std::future::pending::<()>().await;
                },
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(self.addr)
    }
}

/// A connection that is known as open until it is dropped.
#[derive(Debug)]
struct Tracked {
    stream: TcpStream,
    id: u64,
    open: Open,
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.id);
    }
}

impl AsyncRead for Tracked {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Tracked {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Answers one request.
async fn answer(
    State((shared, uploads)): State<(Arc<Shared>, Arc<push::Uploads>)>,
    request: Request,
) -> Response<Body> {
    let method = request.method().as_str().to_owned();
    let target = request
        .uri()
        .path_and_query()
        .map_or_else(String::new, ToString::to_string);
    let range = request
        .headers()
        .get(header::RANGE)
        .and_then(|value| value.to_str().ok())
        .map(str::to_owned);
    shared.faults.unpaused().await;
    let action = shared.faults.action(&method, &target);
    let response = match &action {
        Some(Action::Status(status)) => {
            let status = StatusCode::from_u16(*status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            failure(status, "UNKNOWN", "a fault of the test")
        }
        Some(Action::Cut) => cut_body(),
        _ => {
            if let Some(Action::Delay(delay)) = action {
                tokio::time::sleep(delay).await;
            }
            route(&shared, &uploads, request, action).await
        }
    };
    let status = if response.extensions().get::<CutMark>().is_some() {
        0
    } else {
        response.status().as_u16()
    };
    shared.note(RequestRecord {
        method,
        target,
        range,
        status,
    });
    response
}

/// Marks an answer that is no answer.
#[derive(Debug, Clone)]
struct CutMark;

/// An answer whose body fails at once, which makes the HTTP layer cut the connection.
fn cut_body() -> Response<Body> {
    let broken = futures::stream::once(async { Err::<bytes::Bytes, _>(io::Error::other("cut")) });
    let mut response = Response::new(Body::from_stream(broken));
    response.extensions_mut().insert(CutMark);
    response
}

/// What a path of the distribution specification names.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place<'a> {
    /// `/v2/`
    Base,
    /// `/v2/<name>/manifests/<reference>`
    Manifest(&'a str, &'a str),
    /// `/v2/<name>/blobs/<digest>`
    Blob(&'a str, &'a str),
    /// `/v2/<name>/blobs/uploads/` with the upload's id, empty for a new one.
    Upload(&'a str, &'a str),
    /// `/v2/<name>/tags/list`
    Tags(&'a str),
}

/// Takes a path apart. Repository names may contain slashes, so the fixed words are looked for from the end.
pub(super) fn place(path: &str) -> Option<Place<'_>> {
    let rest = path.strip_prefix("/v2")?;
    let rest = rest.strip_prefix('/').unwrap_or(rest);
    if rest.is_empty() {
        return Some(Place::Base);
    }
    if let Some(name) = rest.strip_suffix("/tags/list") {
        return Some(Place::Tags(name));
    }
    for suffix in ["/blobs/uploads", "/blobs/uploads/"] {
        if let Some(name) = rest.strip_suffix(suffix) {
            return Some(Place::Upload(name, ""));
        }
    }
    let (head, last) = rest.rsplit_once('/')?;
    if let Some(name) = head.strip_suffix("/blobs/uploads") {
        return Some(Place::Upload(name, last));
    }
    if let Some(name) = head.strip_suffix("/manifests") {
        return Some(Place::Manifest(name, last));
    }
    head.strip_suffix("/blobs").map(|name| Place::Blob(name, last))
}

async fn route(
    shared: &Arc<Shared>,
    uploads: &push::Uploads,
    request: Request,
    action: Option<Action>,
) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let method = request.method().as_str().to_owned();
    match (method.as_str(), place(&path)) {
        ("GET" | "HEAD", Some(Place::Base)) => json(StatusCode::OK, "{}".into()),
        ("GET" | "HEAD", Some(Place::Manifest(name, reference))) => {
            pull::manifest(shared, name, reference, method == "HEAD", action)
        }
        ("GET" | "HEAD", Some(Place::Blob(_, digest))) => {
            pull::blob(shared, digest, request.headers(), method == "HEAD", action)
        }
        ("GET", Some(Place::Tags(name))) => pull::tags(shared, name),
        ("PUT", Some(Place::Manifest(name, reference))) => {
            push::manifest(shared, name, reference, request).await
        }
        (_, Some(Place::Upload(name, id))) => push::upload(shared, uploads, name, id, request).await,
        (_, Some(_)) => failure(
            StatusCode::METHOD_NOT_ALLOWED,
            "UNSUPPORTED",
            "not offered by this registry",
        ),
        (_, None) => failure(
            StatusCode::NOT_FOUND,
            "NAME_UNKNOWN",
            "no such path in the distribution API",
        ),
    }
}

/// An answer with a JSON body.
pub(super) fn json(status: StatusCode, text: String) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static("application/json"),
    );
    response
}

/// An error as the distribution specification wants it.
pub(super) fn failure(status: StatusCode, code: &str, message: &str) -> Response<Body> {
    let body = serde_json::json!({ "errors": [{ "code": code, "message": message }] });
    json(status, body.to_string())
}
