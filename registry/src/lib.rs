//! How image bytes come and go (skeleton of the contract).
#![allow(clippy::todo, missing_debug_implementations, clippy::unused_async)]

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use peel_image::Digest;

/// Name of an image: where it is kept and which one. Parses from and prints as the user writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageName {
    /// `[docker://]registry/repository[:tag][@digest]`; short names go to docker.io as Docker does.
    Registry(Reference),
    /// `oci:DIR[:tag]`
    Layout {
        /// Directory of the layout.
        dir: PathBuf,
        /// `org.opencontainers.image.ref.name` in its index; `None` when there is only one manifest.
        tag: Option<String>,
    },
    /// `oci-archive:FILE[:tag]`
    OciArchive {
        /// The tar file.
        file: PathBuf,
        /// As in a layout.
        tag: Option<String>,
    },
    /// `docker-archive:FILE[:name:tag]`
    DockerArchive {
        /// The tar file.
        file: PathBuf,
        /// Name and tag in its manifest.json.
        tag: Option<String>,
    },
}

/// An image in a registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    /// Host and port as written, `docker.io` for short names.
    pub registry: String,
    /// Repository, with `library/` for official Docker images.
    pub repository: String,
    /// Tag; `latest` when neither tag nor digest is given.
    pub tag: Option<String>,
    /// Manifest digest.
    pub digest: Option<Digest>,
}

/// How to reach registries.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Speak http to every registry; loopback addresses get it when https is not answered there.
    pub plain_http: bool,
    /// PEM file with certificates of authorities to trust beside the system's.
    pub tls_ca: Option<PathBuf>,
    /// How long a connection may take to open and a body may stay silent before the attempt counts as broken.
    pub attempt_timeout: Duration,
    /// How long a broken transfer is tried again before it is an error.
    pub retry_for: Duration,
    /// Credential files to look into, in this order (Docker's config.json, Podman's auth.json).
    pub auth_files: Vec<PathBuf>,
}

/// Why bytes could not come or go. The text names registry, repository and what to do.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// Replaced by the real variants.
    #[error("placeholder")]
    Placeholder,
}

/// A place where an image is read from.
#[derive(Debug, Clone)]
pub struct Source;

/// One manifest of one platform, and its configuration.
#[derive(Debug, Clone)]
pub struct ResolvedImage {
    /// Digest of the manifest (not of the index).
    pub manifest_digest: Digest,
    /// The manifest as it came, byte for byte.
    pub manifest_bytes: Bytes,
    /// The manifest, parsed.
    pub manifest: oci_spec::image::ImageManifest,
}

/// One blob of a source; cheap to clone.
#[derive(Debug, Clone)]
pub struct Blob;

/// The bytes of a range as they arrive, at most some hundred KiB at once. Resumes by itself after a broken connection;
/// ends after exactly the requested length or with an error.
#[derive(Debug)]
pub struct ByteStream;

impl Source {
    /// Opens the place that `name` names. No request is made yet.
    pub async fn open(_name: &ImageName, _options: &ClientOptions) -> Result<Self, Error> {
        todo!()
    }

    /// Finds the manifest for `platform` (`os/architecture[/variant]`; `None` is this machine).
    pub async fn resolve(&self, _platform: Option<&str>) -> Result<ResolvedImage, Error> {
        todo!()
    }

    /// The blob that a descriptor names. No request is made yet.
    pub fn blob(&self, _descriptor: &oci_spec::image::Descriptor) -> Result<Blob, Error> {
        todo!()
    }
}

impl Blob {
    /// Digest by the descriptor.
    pub fn digest(&self) -> Digest {
        todo!()
    }

    /// Size by the descriptor, in bytes.
    pub fn size(&self) -> u64 {
        todo!()
    }

    /// The bytes of `range` of the blob. Not verified: a range cannot be.
    pub async fn stream(&self, _range: std::ops::Range<u64>) -> Result<ByteStream, Error> {
        todo!()
    }

    /// The bytes of `range`, whole, in memory.
    pub async fn read(&self, _range: std::ops::Range<u64>) -> Result<Bytes, Error> {
        todo!()
    }

    /// The whole blob in memory, its digest checked; an error if it is larger than `limit` bytes.
    pub async fn read_verified(&self, _limit: u64) -> Result<Bytes, Error> {
        todo!()
    }
}

impl ByteStream {
    /// The next bytes, `None` at the end of the range.
    pub async fn next(&mut self) -> Option<Result<Bytes, Error>> {
        todo!()
    }
}
