//! The end of a blob: TOC, footer, and what the descriptor must say of them.

use std::collections::BTreeMap;
use std::io::Write;

use super::assembly::Assembled;
use super::tables::Marks;
use super::toc::Shape;
use super::{Settings, WriteError, Written};
use peel_hash::Digest;
use peel_image::estargz::footer;
use peel_image::{annotations, media};

/// The kind of TOC that stands in positions and footers of zstd:chunked: that of CRFS, as all of them.
const MANIFEST_TYPE: u64 = 1;
/// End of the footer of the stargz dialect, and of Podman's where there is no tar-split.
const STARGZ_MAGIC: [u8; 8] = *b"GnUlInUx";
/// End of the footer of Podman's dialect.
const PODMAN_MAGIC: [u8; 8] = *b"GNUlInUx";

/// Writes TOC and footer. `has_moved`: files were moved to the front.
pub(super) fn finish<W: Write>(
    mut assembled: Assembled<W>,
    settings: &Settings,
    has_moved: bool,
) -> Result<Written, WriteError> {
    let mut notes = BTreeMap::new();
    let mut note = |name: &str, value: String| {
        notes.insert(name.to_owned(), value);
    };
    let payload_end = assembled.blob.size();
    let mut external_toc = None;
    let mut toc_offset = None;
    match settings.shape {
        Shape::Estargz if settings.has_external_toc => {
            assembled.blob.write(&footer::encode_external())?;
            note(annotations::TOC_EXTERNAL, "1".to_owned());
        }
        Shape::Estargz => {
            assembled.hash_toc()?;
            assembled.blob.write(&assembled.toc.data)?;
            assembled.blob.write(&footer::encode(payload_end))?;
            toc_offset = Some(payload_end);
        }
        Shape::StargzZstd | Shape::Podman => {
            let toc = &assembled.toc;
            let position = assembled.blob.write_skippable(&toc.data)?;
            toc_offset = Some(position);
            let length = toc.data.len() as u64;
            let text = format!("{position}:{length}:{}:{MANIFEST_TYPE}", toc.length);
            let checksum = Digest::of(&toc.data).to_string();
            let mut footer = vec![position, length, toc.length, MANIFEST_TYPE];
            let mut magic = STARGZ_MAGIC;
            if let Some(split) = &toc.tar_split {
                let start = assembled.blob.write_skippable(&split.data)?;
                let length = split.data.len() as u64;
                footer.extend([start, length, split.length]);
                note(
                    annotations::PODMAN_TARSPLIT_POSITION,
                    format!("{start}:{length}:{}", split.length),
                );
                magic = PODMAN_MAGIC;
            }
            let (of_position, of_checksum) = match settings.shape {
                Shape::Podman => (
                    annotations::PODMAN_MANIFEST_POSITION,
                    annotations::PODMAN_MANIFEST_CHECKSUM,
                ),
                Shape::Estargz | Shape::StargzZstd => (
                    annotations::STARGZ_MANIFEST_POSITION,
                    annotations::STARGZ_MANIFEST_CHECKSUM,
                ),
            };
            note(of_position, text);
            note(of_checksum, checksum);
            let mut bytes: Vec<u8> = footer.into_iter().flat_map(u64::to_le_bytes).collect();
            bytes.extend_from_slice(&magic);
            assembled.blob.write_skippable(&bytes)?;
        }
    }
    let (diff_id, uncompressed_size) = assembled.diff_id();
    let toc_digest = assembled.toc.digest;
    if settings.shape != Shape::Podman {
        note(annotations::TOC_DIGEST, toc_digest.to_string());
        note(annotations::UNCOMPRESSED_SIZE, uncompressed_size.to_string());
    }
    if let Some(offset) = toc_offset {
        note(annotations::TOC_OFFSET, offset.to_string());
    }
    if let Some(compressor) = settings.coding.name(true) {
        note(annotations::COMPRESSOR, compressor);
    }
    let Marks { landmark, file_ends } = assembled.marks;
    let prefetch_end = match landmark {
        Some(landmark) => Some(landmark).filter(|_| settings.prioritized),
        // Without a landmark only the annotation says it.
        None => file_ends.values().max().copied(),
    };
    if let Some(end) = prefetch_end.filter(|_| has_moved) {
        note(annotations::PREFETCH_END, end.to_string());
    }
    if settings.has_external_toc {
        external_toc = Some(assembled.toc.data);
    }
    let (blob_digest, blob_size) = assembled.blob.finish()?;
    Ok(Written {
        diff_id,
        blob_digest,
        blob_size,
        uncompressed_size,
        media_type: match settings.shape {
            Shape::Estargz => media::OCI_LAYER_GZIP,
            Shape::StargzZstd | Shape::Podman => media::OCI_LAYER_ZSTD,
        },
        annotations: notes,
        external_toc,
        toc_digest: Some(toc_digest),
        toc_offset,
        prefetch_end,
        not_found: Vec::new(),
        entries: 0,
        dropped: 0,
        hidden: 0,
        file_ends,
    })
}
