//! Where images are read from. `store` and the commands open a [`Source`] by name; all kinds of places look the same to them.

pub(crate) mod beside;
pub(crate) mod blob;
mod nested;
pub(crate) mod platform;
pub(crate) mod resolve;

use std::sync::Arc;

use bytes::Bytes;
use oci_spec::image::Descriptor;
use peel_image::{Digest, media};
use reqwest::header::{ACCEPT, CONTENT_ENCODING, CONTENT_TYPE, HeaderValue};
use tokio::sync::OnceCell;

use crate::archive::docker::DockerArchive;
use crate::client::session::{Call, Session};
use crate::error::Error;
use crate::layout::Layout;
use crate::name::ImageName;
use crate::options::{ClientOptions, Counters};
use crate::transfer::file::Stretch;
use crate::transfer::http::is_coding;
use blob::Blob;
use resolve::Document;

/// Largest manifest or index in bytes (OCI distribution specification, "Pushing manifests": registries should limit to 4 MiB).
pub(crate) const MAX_MANIFEST: u64 = 4 << 20;
/// Answer of a registry to a manifest that it has not said the digest of.
const CONTENT_DIGEST: &str = "docker-content-digest";

/// A place where an image is read from. Cheap to clone; clones share connections, counters and the manifest.
#[derive(Debug, Clone)]
pub struct Source {
    inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    home: Home,
    /// What errors call it.
    place: String,
    counters: Arc<Counters>,
    top: OnceCell<Document>,
}

#[derive(Debug)]
enum Home {
    Registry {
        session: Arc<Session>,
        tag: Option<String>,
        digest: Option<Digest>,
    },
    Layout {
        layout: Arc<Layout>,
        tag: Option<String>,
    },
    DockerArchive(Box<DockerArchive>),
}

impl Source {
    /// Opens the place that `name` names. No request is made yet; layouts and archives are looked at.
    pub async fn open(name: &ImageName, options: &ClientOptions) -> Result<Self, Error> {
        let (home, place, counters) = match name.clone() {
            ImageName::Registry(reference) => {
                let session = Arc::new(Session::new(&reference, options));
                let (place, counters) = (session.place.to_string(), Arc::clone(&session.counters));
                let home = Home::Registry {
                    session,
                    tag: reference.tag,
                    digest: reference.digest,
                };
                (home, place, counters)
            }
            ImageName::Layout { dir, tag } => {
                let place = dir.display().to_string();
                let layout = blocking(move || Layout::open_dir(&dir)).await?;
                (layout_home(layout, tag), place, Arc::default())
            }
            ImageName::OciArchive { file, tag } => {
                let place = file.display().to_string();
                let layout = blocking(move || Layout::open_archive(&file)).await?;
                (layout_home(layout, tag), place, Arc::default())
            }
            ImageName::DockerArchive { file, tag } => {
                let place = file.display().to_string();
                let archive = blocking(move || DockerArchive::open(&file, tag.as_deref())).await?;
                (Home::DockerArchive(Box::new(archive)), place, Arc::default())
            }
        };
        let inner = Inner {
            home,
            place,
            counters,
            top: OnceCell::new(),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The blob that a descriptor names. No request is made yet. An error for digests that are not sha256. The `urls` of a descriptor
    /// are never followed: a foreign layer is read if its bytes are here, and else an error when it is read.
    pub fn blob(&self, descriptor: &Descriptor) -> Result<Blob, Error> {
        Blob::new(&self.inner, descriptor)
    }

    /// What this source and its blobs have received so far.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.inner.counters)
    }

    /// Opens up to `connections` connections to the registry, so that requests that start together later find them open. Meant to
    /// run while [`Source::resolve`] waits for its answer. Does nothing for layouts and archives; errors are left to whoever needs the
    /// connection.
    pub async fn warm(&self, connections: usize) {
        if let Home::Registry { session, .. } = &self.inner.home {
            session.warm(connections).await;
        }
    }
}

fn layout_home(layout: Layout, tag: Option<String>) -> Home {
    Home::Layout {
        layout: Arc::new(layout),
        tag,
    }
}

impl Inner {
    pub(crate) fn place(&self) -> &str {
        &self.place
    }

    pub(crate) fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    pub(crate) fn session(&self) -> Option<&Arc<Session>> {
        match &self.home {
            Home::Registry { session, .. } => Some(session),
            _ => None,
        }
    }

    /// Where a local source has the blob. Blocks on the disk.
    pub(crate) fn stretch(&self, digest: &Digest) -> Result<Stretch, Error> {
        match &self.home {
            Home::Layout { layout, .. } => layout.blob(digest),
            Home::DockerArchive(archive) => archive.blob(digest),
            Home::Registry { .. } => Err(Error::layout(&self.place, "is not a local place")),
        }
    }

    /// The document that the name itself names, fetched once.
    async fn top(self: &Arc<Self>) -> Result<&Document, Error> {
        self.top.get_or_try_init(|| self.fetch_top()).await
    }

    async fn fetch_top(self: &Arc<Self>) -> Result<Document, Error> {
        match &self.home {
            Home::Registry { session, tag, digest } => {
                let name = match (digest, tag) {
                    (Some(digest), _) => digest.to_string(),
                    (None, Some(tag)) => tag.clone(),
                    (None, None) => "latest".to_owned(),
                };
                self.fetch_manifest(session, &name, *digest).await
            }
            Home::Layout { layout, tag } => {
                let descriptor = layout.find(tag.as_deref())?;
                self.child(&descriptor).await
            }
            Home::DockerArchive(archive) => Ok(archive.document()),
        }
    }

    /// The manifest or index that a descriptor in an index names.
    async fn child(self: &Arc<Self>, descriptor: &Descriptor) -> Result<Document, Error> {
        match &self.home {
            Home::Registry { session, .. } => {
                let digest = self.digest(descriptor)?;
                self.fetch_manifest(session, &digest.to_string(), Some(digest))
                    .await
            }
            _ => {
                let bytes = Blob::new(self, descriptor)?.read_verified(MAX_MANIFEST).await?;
                let media_type = descriptor.media_type().to_string();
                Document::parse(
                    &self.place,
                    descriptor.digest().as_ref(),
                    Some(&media_type),
                    bytes,
                )
            }
        }
    }

    fn digest(&self, descriptor: &Descriptor) -> Result<Digest, Error> {
        let text = descriptor.digest().to_string();
        text.parse().map_err(|error| Error::Manifest {
            place: self.place.clone(),
            what: format!("descriptor of {text}"),
            reason: format!("{error}"),
        })
    }

    async fn fetch_manifest(
        &self,
        session: &Session,
        name: &str,
        expected: Option<Digest>,
    ) -> Result<Document, Error> {
        let what = format!("manifest {name}");
        let path = session.path("manifests", name);
        let mut call = Call::get(&path, &what);
        for media_type in [
            media::OCI_INDEX,
            media::OCI_MANIFEST,
            media::DOCKER_INDEX,
            media::DOCKER_MANIFEST,
        ] {
            call.headers.append(ACCEPT, HeaderValue::from_static(media_type));
        }
        let (headers, bytes) = session.fetch(&call, MAX_MANIFEST).await?;
        let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let actual = Digest::of(&bytes);
        let encoding = header(CONTENT_ENCODING.as_str()).filter(|encoding| is_coding(encoding));
        // Registries with sha512 manifests write another algorithm there; only ours can be compared.
        let told = header(CONTENT_DIGEST).and_then(|text| text.parse::<Digest>().ok());
        if let Some(expected) = expected.or(told)
            && expected != actual
        {
            if let Some(encoding) = encoding {
                return Err(session.protocol(&what, encoded(encoding)));
            }
            return Err(session.mismatch(&what, expected, actual));
        }
        let media_type = header(CONTENT_TYPE.as_str()).map(bare_media_type);
        let is_text = serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).is_ok();
        match encoding {
            Some(encoding) if !is_text => Err(session.protocol(&what, encoded(encoding))),
            _ => Document::parse(&self.place, name, media_type, bytes),
        }
    }

    /// A document that somebody else keeps the bytes of.
    pub(crate) fn manifest_error(&self, what: String, reason: impl Into<String>) -> Error {
        Error::Manifest {
            place: self.place.clone(),
            what,
            reason: reason.into(),
        }
    }
}

/// What is wrong with a document that came in a coding.
fn encoded(encoding: &str) -> String {
    format!("the body is encoded as {encoding:.100?}, which was not asked for; a proxy may be in the way")
}

/// A media type without its parameters.
fn bare_media_type(value: &str) -> &str {
    value.split(';').next().unwrap_or_default().trim()
}

/// Runs `work` where it may wait for the disk.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Error::Setup(format!("a worker ended: {error}"))))
}

/// Bytes that are known already.
pub(crate) fn embedded(descriptor: &Descriptor, digest: Digest) -> Option<Bytes> {
    use base64::Engine;
    let data = descriptor.data().as_ref()?;
    let bytes = base64::engine::general_purpose::STANDARD.decode(data).ok()?;
    (bytes.len() as u64 == descriptor.size() && Digest::of(&bytes) == digest).then(|| bytes.into())
}
