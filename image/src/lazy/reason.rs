//! Why a layer is not lazy, in one sentence each: what `peel inspect` prints and what a mount says when it pulls a layer whole.

use super::{CHUNK_MAX, Format, LAYER_ZEROS_MAX, STREAM_MAX, ZEROS_MAX};
use crate::annotations::{PODMAN_MANIFEST_CHECKSUM, TOC_DIGEST};
use crate::estargz::TocError;
use peel_hash::Digest;

/// Why a layer cannot be served file by file. The texts begin with "it" or "its", for the layer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotLazy {
    /// It is no layer.
    #[error("its media type {0:.200} is not that of a layer")]
    MediaType(String),
    /// Its files cannot be had one by one.
    #[error(
        "its registry ignores range requests: it sends the whole layer when it is asked for a part of it"
    )]
    NoRanges,
    /// An ordinary layer.
    #[error("it is an ordinary layer ({0}) without a table of contents")]
    Plain(Format),
    /// There is, or may be, a TOC, but it could be anybody's.
    #[error(
        "nothing vouches for a table of contents (the manifest has no annotation {TOC_DIGEST} or {PODMAN_MANIFEST_CHECKSUM})"
    )]
    NotVouchedFor,
    /// An annotation that should be a digest is none.
    #[error("the manifest's annotation {name} is no digest: {problem}")]
    Annotation {
        /// Its key.
        name: &'static str,
        /// What is wrong with its value.
        problem: String,
    },
    /// Two annotations that mean the same say different things.
    #[error("the manifest gives two digests for its compressed table of contents, {0} and {1}")]
    TwoDigests(Digest, Digest),
    /// The manifest vouches for a TOC, but there is none.
    #[error(
        "the manifest vouches for a table of contents, but its last bytes are the footer of no lazy format"
    )]
    NoFooter,
    /// There is a footer, but it leads nowhere.
    #[error("its footer is damaged: {0}")]
    Footer(String),
    /// The TOC is not the one that the manifest vouches for.
    #[error("its {what} has the digest {found}, but the manifest vouches for {expected}")]
    Digest {
        /// The TOC, or the compressed TOC.
        what: &'static str,
        /// Its digest.
        found: Digest,
        /// What the manifest says.
        expected: Digest,
    },
    /// The TOC cannot be read or contradicts itself.
    #[error("its table of contents cannot be used: {0}")]
    Toc(String),
    /// The TOC is in another image, which does not give it.
    #[error("its table of contents is kept in an image beside this one, but {0}")]
    Beside(String),
    /// The TOC leaves digests out.
    #[error("its table of contents does not say how to verify {path}")]
    Unverifiable {
        /// A file without them.
        path: String,
    },
    /// A chunk would need too much memory.
    #[error("a chunk of {path} is larger than {} MiB", CHUNK_MAX >> 20)]
    ChunkTooLarge {
        /// Its file.
        path: String,
    },
    /// A chunk behind more bytes than should be decompressed for it.
    #[error(
        "the compressed stream that holds {path} has more than {} MiB up to its end",
        STREAM_MAX >> 20
    )]
    StreamTooLarge {
        /// The chunk's file.
        path: String,
    },
    /// Zeros that would take too long to hash.
    #[error(
        "{path} has more than {} GiB of zeros, or the files up to it more than {} GiB",
        ZEROS_MAX >> 30,
        LAYER_ZEROS_MAX >> 30
    )]
    HolesTooLarge {
        /// Their file.
        path: String,
    },
    /// A file is not in the blob.
    #[error("its table of contents places {path} outside the layer")]
    Outside {
        /// The file.
        path: String,
    },
    /// A file has two digests.
    #[error("its table of contents gives two digests for {path}")]
    TwoFileDigests {
        /// The file.
        path: String,
    },
}

impl NotLazy {
    /// An error of the TOC with what it stems from.
    pub(crate) fn toc(error: TocError) -> Self {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(error) = source {
            text = format!("{text}: {error}");
            source = error.source();
        }
        Self::Toc(text)
    }
}
