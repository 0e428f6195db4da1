//! Annotations of layer descriptors and manifests that lazy formats use.
//!
//! The first group is upstream's (stargz-snapshotter, `estargz/types.go` and `nativeconverter/`; containers/storage,
//! `pkg/chunked/internal/minimal/compression.go`), the last is peel's own: hints that save round trips or order
//! the prefetch. A hint is never trusted: what it points at is verified like anything else.

/// sha256 of the uncompressed TOC JSON of an eStargz (or stargz-dialect zstd:chunked) layer.
pub const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";
/// Uncompressed size of an eStargz layer in bytes, decimal.
pub const UNCOMPRESSED_SIZE: &str = "io.containers.estargz.uncompressed-size";

/// On a layer of a TOC image: the eStargz layer whose TOC it holds.
pub const LAYER_DIGEST: &str = "containerd.io/snapshot/stargz/layer.digest";
/// What is added to an image's tag to name the image beside it that holds the TOCs of its layers.
pub const TOC_IMAGE_SUFFIX: &str = "-esgztoc";

/// zstd:chunked by Podman, Buildah, Skopeo (containers/storage 1.44 and later): sha256 of the compressed TOC.
pub const PODMAN_MANIFEST_CHECKSUM: &str = "io.github.containers.zstd-chunked.manifest-checksum";
/// zstd:chunked: where the compressed TOC is, `offset:compressed size:size:1`.
pub const PODMAN_MANIFEST_POSITION: &str = "io.github.containers.zstd-chunked.manifest-position";
/// zstd:chunked: where the compressed tar-split is, `offset:compressed size:size`.
pub const PODMAN_TARSPLIT_POSITION: &str = "io.github.containers.zstd-chunked.tarsplit-position";
/// zstd:chunked by stargz-snapshotter and nerdctl, and by Podman before 2022-11: as [`PODMAN_MANIFEST_CHECKSUM`].
pub const STARGZ_MANIFEST_CHECKSUM: &str = "io.containers.zstd-chunked.manifest-checksum";
/// zstd:chunked by stargz-snapshotter and nerdctl, and by Podman before 2022-11: as [`PODMAN_MANIFEST_POSITION`].
pub const STARGZ_MANIFEST_POSITION: &str = "io.containers.zstd-chunked.manifest-position";

/// peel: present where the TOC of an eStargz layer is in the image beside it. Saves the request for the footer.
pub const TOC_EXTERNAL: &str = "dev.peel.toc.external";
/// peel: offset of the TOC in the layer blob in bytes, decimal. Saves the request for the footer.
pub const TOC_OFFSET: &str = "dev.peel.toc.offset";
/// peel: end of the prioritized range `[0, end)` of the layer blob in bytes, decimal. Lets the prefetch start together
/// with the request for the TOC.
pub const PREFETCH_END: &str = "dev.peel.prefetch.end";
/// peel: on the manifest; the order in which a start reads across layers, as `layer:end` pairs joined by commas:
/// "then layer `layer` up to blob offset `end`".
pub const PREFETCH_ORDER: &str = "dev.peel.prefetch.order";
/// peel: the compressor of a layer, its version and its level, as in `libdeflate 1.26 level 7`: what it takes to make the same
/// bytes again.
pub const COMPRESSOR: &str = "dev.peel.compressor";
