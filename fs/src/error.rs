//! The error type of the crate. Every text names the thing, the place and, where there is one, the way out.

use std::io;
use std::path::PathBuf;

use peel_image::Digest;
use rustix::io::Errno;

/// Why an image could not be loaded or mounted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image's source could not be read.
    #[error("{image}: {source}")]
    Registry {
        /// The image as the user wrote it.
        image: String,
        /// What the registry client says.
        source: Box<peel_registry::Error>,
    },
    /// A load failed that several callers waited for.
    #[error(transparent)]
    Shared(std::sync::Arc<Error>),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] peel_store::Error),
    /// The name is not known to the store and asking the registry was forbidden.
    #[error("{image}: not in the store, and the pull policy `never` forbids to ask its registry")]
    NotInStore {
        /// The image as the user wrote it.
        image: String,
    },
    /// The store does not have the image in full and verified, and asking the registry was forbidden.
    #[error("{image}: not verified in full before, and the pull policy `never` forbids to pull it for that")]
    NotVerified {
        /// The image as the user wrote it.
        image: String,
    },
    /// The configuration of the image is not what the manifest promises.
    #[error("{image}: configuration {digest}: {reason}")]
    Config {
        /// The image as the user wrote it.
        image: String,
        /// Digest of the configuration by the manifest.
        digest: Digest,
        /// What is wrong with it.
        reason: String,
    },
    /// The manifest cannot be used.
    #[error("{image}: manifest {digest}: {reason}")]
    Manifest {
        /// The image as the user wrote it.
        image: String,
        /// Digest of the manifest.
        digest: Digest,
        /// What is wrong with it.
        reason: String,
    },
    /// A layer that has to be pulled whole is broken.
    #[error("{image}: layer {layer}: {reason}")]
    Layer {
        /// The image as the user wrote it.
        image: String,
        /// Digest of the layer blob.
        layer: Digest,
        /// What is wrong with it.
        reason: String,
    },
    /// The layers do not merge into a tree.
    #[error("{image}: {source} (that layer is {layer})")]
    Tree {
        /// The image as the user wrote it.
        image: String,
        /// Digest of the blob of the layer that does not fit.
        layer: Digest,
        /// Why they do not.
        source: Box<peel_image::tree::TreeError>,
    },
    /// The tree is none that a file system can show.
    #[error("{image}: {source}")]
    Unshowable {
        /// The image as the user wrote it.
        image: String,
        /// What cannot be shown.
        source: peel_store::Error,
    },
    /// A mount could not be made or changed.
    #[error("{what}: {step}: {source}{}", shown(messages))]
    Mount {
        /// Which mount, for example `overlay of sha256:...`.
        what: String,
        /// The step that failed.
        step: String,
        /// What the kernel wrote to the file system context, joined by `; `. May be empty.
        messages: String,
        /// The error of the system call.
        source: io::Error,
    },
    /// A file or directory of the host could not be used.
    #[error("{path}: {action}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The error of the system call.
        source: io::Error,
    },
    /// The system refused a thread.
    #[error("cannot start thread {name}: {source}")]
    Thread {
        /// Name of the thread.
        name: String,
        /// The error of the system call.
        source: io::Error,
    },
    /// The service was stopped while the work was under way.
    #[error("the file service is stopping")]
    Stopping,
}

fn shown(messages: &str) -> String {
    if messages.is_empty() {
        String::new()
    } else {
        format!(" (kernel: {messages})")
    }
}

impl Error {
    /// A closure that wraps an I/O error with the file and what was tried.
    pub(crate) fn io(path: impl Into<PathBuf>, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, action, source }
    }
}

impl Error {
    /// Whether a mount failed because of what its file holds, or because the file is gone, and not because of the kernel or
    /// of rights.
    pub(crate) fn is_damaged_file_system(&self) -> bool {
        let (Self::Mount { source, .. } | Self::Io { source, .. }) = self else {
            return false;
        };
        // EINVAL: no superblock; EBADMSG: its checksum; EUCLEAN: an inode that cannot be; EIO: beyond the end of the file.
        matches!(
            Errno::from_io_error(source),
            Some(Errno::INVAL | Errno::BADMSG | Errno::UCLEAN | Errno::IO | Errno::OPNOTSUPP | Errno::NOENT)
        )
    }
}

/// An error and what it stems from.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
