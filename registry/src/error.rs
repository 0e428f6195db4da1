//! What can go wrong between an image's home and us.
//!
//! Every text names the place (registry and repository, or the file), the thing (manifest, blob, upload) and, where there
//! is something to do about it, what. Errors are `Clone` because one download may have several waiters.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use peel_image::Digest;

use crate::name::Reference;

/// A repository in a registry, as errors print it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Host and port as the user wrote them.
    pub registry: String,
    /// Repository without tag.
    pub repository: String,
}

impl Place {
    pub(crate) fn of(reference: &Reference) -> Arc<Self> {
        Arc::new(Self {
            registry: reference.registry.clone(),
            repository: reference.repository.clone(),
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "registry {}, repository {}", self.registry, self.repository)
    }
}

/// Why bytes could not come or go. The text names registry, repository and what to do.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text is not the name of an image.
    #[error("image name {name:?}: {reason}")]
    Name {
        /// The text, shortened.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The HTTP client could not be set up (certificate file, TLS).
    #[error("HTTP client: {0}")]
    Setup(String),
    /// No connection, or one that broke, and trying again did not help.
    #[error("{place}: {what}: {reason}{hint}")]
    Network {
        /// Where.
        place: Arc<Place>,
        /// What was wanted.
        what: String,
        /// What the network said.
        reason: String,
        /// What to do, beginning with "; ", or empty.
        hint: String,
    },
    /// The registry answered with an error.
    #[error("{place}: {what}: HTTP {status}{detail}{hint}")]
    Status {
        /// Where.
        place: Arc<Place>,
        /// What was wanted.
        what: String,
        /// HTTP status.
        status: u16,
        /// Code and message of the registry's JSON error, beginning with a blank, or empty.
        detail: String,
        /// What to do, beginning with "; ", or empty.
        hint: String,
        /// End of the pause that the host wants.
        retry_at: Option<Instant>,
    },
    /// The registry's answer breaks the protocol.
    #[error("{place}: {what}: {reason}")]
    Protocol {
        /// Where.
        place: Arc<Place>,
        /// What was wanted.
        what: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// A registry that has lost the beginning of an upload which is not kept anywhere else.
    #[error(
        "{place}: {what}: the registry has lost the upload after a broken connection ({reason}); it has to be sent again from its \
         beginning"
    )]
    UploadLost {
        /// Where.
        place: Arc<Place>,
        /// Which upload.
        what: String,
        /// What the registry said.
        reason: String,
    },
    /// Credentials are configured but cannot be used.
    #[error("credentials for {registry}: {reason}")]
    Credentials {
        /// Registry they are for.
        registry: String,
        /// Which file or helper, and what it said. Never a secret.
        reason: String,
    },
    /// Bytes that are not what their digest says.
    #[error("{place}: {what}: expected digest {expected}, got {actual}; the content was altered or damaged")]
    DigestMismatch {
        /// Registry and repository, or file.
        place: String,
        /// What was read.
        what: String,
        /// Digest by the descriptor.
        expected: Digest,
        /// Digest of the bytes.
        actual: Digest,
    },
    /// Content that does not have the size that its descriptor says.
    #[error("{place}: {what}: expected {expected} bytes, got {actual}")]
    SizeMismatch {
        /// Registry and repository, or file.
        place: String,
        /// What was read.
        what: String,
        /// Size by the descriptor in bytes.
        expected: u64,
        /// Size found in bytes.
        actual: u64,
    },
    /// A registry that sends the whole blob when it is asked for a part of it, to a reader who wants no more.
    #[error("{place}: {what}: the registry ignores range requests; a proxy may be in the way")]
    NoRanges {
        /// Where.
        place: Arc<Place>,
        /// Which blob.
        what: String,
    },
    /// A host that has asked for a pause: nothing is sent to it until that is over.
    #[error(
        "{place}: {what}: {host} answered HTTP {status} and wants a pause until {}: nothing is sent to it before; log in or wait",
        date(*until)
    )]
    Paused {
        /// Where.
        place: Arc<Place>,
        /// What was wanted.
        what: String,
        /// Host and port that wants the pause: the registry, its storage or its token server.
        host: String,
        /// HTTP status of the answer that asked for it.
        status: u16,
        /// When it is over.
        until: Instant,
    },
    /// Content larger than its reader allows.
    #[error("{place}: {what}: larger than the limit of {limit} bytes")]
    TooLarge {
        /// Registry and repository, or file.
        place: String,
        /// What was read.
        what: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// A range outside its blob.
    #[error("blob {digest}: range {start}..{end} is outside its {size} bytes")]
    Range {
        /// The blob.
        digest: Digest,
        /// First byte wanted.
        start: u64,
        /// End of the range (exclusive).
        end: u64,
        /// Size of the blob.
        size: u64,
    },
    /// A manifest, index or configuration that cannot be used.
    #[error("{place}: {what}: {reason}")]
    Manifest {
        /// Registry and repository, or file.
        place: String,
        /// Which document.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The text for a platform is none.
    #[error("{text:?} is no platform: write os/architecture[/variant], as linux/arm64")]
    PlatformText {
        /// What was given.
        text: String,
    },
    /// The image has no manifest for the platform.
    #[error("{place}: no image for platform {wanted}; there is: {available}")]
    Platform {
        /// Registry and repository, or file.
        place: String,
        /// The platform asked for.
        wanted: String,
        /// The platforms in the index, joined by commas.
        available: String,
    },
    /// A layer whose bytes are kept outside the place of its image.
    #[error(
        "{place}: layer {digest} is foreign ({media_type}) and not there: bytes that lie elsewhere are not supported; \
         push the image again with its non-distributable layers included"
    )]
    Foreign {
        /// Registry and repository, or file.
        place: String,
        /// The layer.
        digest: String,
        /// Its media type.
        media_type: String,
    },
    /// A local file could not be read or written.
    #[error("{}: {what}: {error}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        error: Arc<std::io::Error>,
    },
    /// A layout or an archive is not what its name says.
    #[error("{}: {reason}", path.display())]
    Layout {
        /// Directory or archive.
        path: PathBuf,
        /// What is wrong with it and what to do.
        reason: String,
    },
    /// A place that cannot be written to.
    #[error("{name}: cannot be written; push to a registry or to oci:DIR[:tag]")]
    ReadOnly {
        /// The image name.
        name: String,
    },
}

impl Error {
    /// Whether trying the same again later may help: the network or the registry failed, not the request.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Network { .. } | Self::Paused { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500 | 502 | 503 | 504),
            _ => false,
        }
    }

    /// Until when the same is refused without a request, because the host has asked for a pause; `None` if it may be tried again at
    /// once, or need not be.
    pub fn retry_at(&self) -> Option<Instant> {
        match self {
            Self::Paused { until, .. } => Some(*until),
            Self::Status { retry_at, .. } => *retry_at,
            _ => None,
        }
    }

    /// Whether the thing asked for does not exist there.
    pub fn is_not_found(&self) -> bool {
        match self {
            Self::Status { status, .. } => *status == 404,
            Self::File { error, .. } => error.kind() == std::io::ErrorKind::NotFound,
            _ => false,
        }
    }

    pub(crate) fn file(path: impl Into<PathBuf>, what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |error| Self::File {
            path,
            what,
            error: Arc::new(error),
        }
    }

    pub(crate) fn layout(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::Layout {
            path: path.into(),
            reason: reason.into(),
        }
    }
}

/// The time of day of an instant that lies ahead.
fn date(instant: Instant) -> String {
    let ahead = instant.saturating_duration_since(Instant::now());
    httpdate::fmt_http_date(SystemTime::now() + ahead)
}
