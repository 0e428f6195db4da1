//! Media types of manifests and layers: OCI image specification (media-types.md) and Docker's image manifest v2,
//! schema 2.

use crate::layer::Encoding;

/// OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI image configuration.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// OCI layer: plain tar.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// OCI layer: tar in gzip.
pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// OCI layer: tar in zstd.
pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
/// Docker manifest list.
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker image manifest, schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker image configuration.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// Docker layer: plain tar.
pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
/// Docker layer: tar in gzip.
pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
/// Docker layer: tar in zstd.
pub const DOCKER_LAYER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";

/// OCI layer that registries need not have: plain tar.
pub const OCI_FOREIGN_LAYER: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar";
/// OCI layer that registries need not have: tar in gzip.
pub const OCI_FOREIGN_LAYER_GZIP: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip";
/// OCI layer that registries need not have: tar in zstd.
pub const OCI_FOREIGN_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd";
/// Docker layer that registries need not have: plain tar.
pub const DOCKER_FOREIGN_LAYER: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar";
/// Docker layer that registries need not have: tar in gzip.
pub const DOCKER_FOREIGN_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
/// Docker layer that registries need not have: tar in zstd.
pub const DOCKER_FOREIGN_LAYER_ZSTD: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.zstd";

/// Whether a manifest of this type is a list of manifests, one per platform.
pub fn is_index(media_type: &str) -> bool {
    matches!(media_type, OCI_INDEX | DOCKER_INDEX)
}

/// How a layer of this media type is compressed; `None` for a type that is no layer. Builders have been seen to lie,
/// so a reader also looks at the first bytes ([`crate::compression`]).
pub fn layer_encoding(media_type: &str) -> Option<Encoding> {
    match media_type {
        OCI_LAYER | DOCKER_LAYER | OCI_FOREIGN_LAYER | DOCKER_FOREIGN_LAYER => Some(Encoding::Plain),
        OCI_LAYER_GZIP | DOCKER_LAYER_GZIP | OCI_FOREIGN_LAYER_GZIP | DOCKER_FOREIGN_LAYER_GZIP => {
            Some(Encoding::Gzip)
        }
        OCI_LAYER_ZSTD | DOCKER_LAYER_ZSTD | OCI_FOREIGN_LAYER_ZSTD | DOCKER_FOREIGN_LAYER_ZSTD => {
            Some(Encoding::Zstd)
        }
        _ => None,
    }
}
