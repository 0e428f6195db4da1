//! A layer as its descriptor describes it, and the steps from there to its index.

use std::ops::Range;

use super::{Format, HoleBudget, Located, NotLazy, Origin, Over, Toc, TocState, find_holes, unservable};
use crate::annotations as names;
use crate::estargz::footer::{EXTERNAL_FOOTER, Footer};
use crate::estargz::index::{Unusable, read_index_by, read_verified};
use crate::estargz::{self, FooterError, TOC_MEMBER_MAX};
use crate::layer::{Encoding, LayerIndex};
use crate::media;
use crate::zstd_chunked::{self, Dialect, Position};
use peel_hash::Digest;

/// Smallest guess of the length of TOC and footer.
const GUESS_MIN: u64 = 64 << 10;
/// Largest guess.
const GUESS_MAX: u64 = 4 << 20;
/// Blob bytes per byte of TOC: images of many small files come near 1 in 40.
const GUESS_RATIO: u64 = 40;

/// What errors call the JSON of a TOC.
const JSON: &str = "table of contents";
/// What errors call a TOC as it is in the blob.
const COMPRESSED: &str = "compressed table of contents";

/// A layer that may be lazy.
#[derive(Debug, Clone)]
pub struct Candidate {
    media_type: String,
    size: u64,
    /// What the manifest says that the digest of the JSON is.
    json: Option<Digest>,
    /// What the manifest says that the digest of the compressed TOC is.
    compressed: Option<Digest>,
    /// Why neither may be used.
    refused: Option<NotLazy>,
    /// Where a zstd:chunked TOC is.
    position: Option<Position>,
    tar_split: Option<Position>,
    /// Where an eStargz TOC is.
    toc_offset: Option<u64>,
    /// Whether the TOC is in the image beside.
    beside: bool,
    prefetch_end: Option<u64>,
}

impl Candidate {
    /// Takes what a descriptor says: media type, size of the blob in bytes, and the value of an annotation by its key.
    pub fn new<'a>(media_type: &str, size: u64, annotation: impl Fn(&str) -> Option<&'a str>) -> Self {
        let mut refused = None;
        let mut digest = |name: &'static str| match annotation(name)?.parse::<Digest>() {
            Ok(digest) => Some(digest),
            Err(error) => {
                let problem = error.to_string();
                refused.get_or_insert(NotLazy::Annotation { name, problem });
                None
            }
        };
        let json = digest(names::TOC_DIGEST);
        let newer = digest(names::PODMAN_MANIFEST_CHECKSUM);
        let older = digest(names::STARGZ_MANIFEST_CHECKSUM);
        if let (Some(newer), Some(older)) = (newer, older)
            && newer != older
        {
            refused.get_or_insert(NotLazy::TwoDigests(newer, older));
        }
        let position = |name| annotation(name).and_then(Position::parse);
        let number = |name| annotation(name)?.parse::<u64>().ok();
        let toc_offset = number(names::TOC_OFFSET).filter(|offset| {
            size.checked_sub(*offset)
                .is_some_and(|left| left > 0 && left <= TOC_MEMBER_MAX)
        });
        Self {
            media_type: media_type.to_owned(),
            size,
            json,
            compressed: newer.or(older),
            refused,
            position: position(names::PODMAN_MANIFEST_POSITION)
                .or_else(|| position(names::STARGZ_MANIFEST_POSITION))
                .filter(|position| position.is_sane(size)),
            tar_split: position(names::PODMAN_TARSPLIT_POSITION),
            toc_offset,
            beside: annotation(names::TOC_EXTERNAL).is_some(),
            prefetch_end: number(names::PREFETCH_END)
                .filter(|end| *end > 0 && *end <= toc_offset.unwrap_or(size)),
        }
    }

    /// Length of the blob by the descriptor, in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Whether the manifest vouches for a TOC of this layer. Nobody need ask for bytes of one for which it does not.
    pub fn vouched(&self) -> Result<(), NotLazy> {
        if media::layer_encoding(&self.media_type).is_none() {
            return Err(NotLazy::MediaType(self.media_type.clone()));
        }
        match (&self.refused, self.digest()) {
            (Some(reason), _) => Err(reason.clone()),
            (None, Some(_)) => Ok(()),
            (None, None) => Err(NotLazy::NotVouchedFor),
        }
    }

    /// The digest by which the manifest vouches for a TOC: that of the JSON, if there is one, else that of the compressed TOC.
    pub fn digest(&self) -> Option<Digest> {
        self.json.or(self.compressed)
    }

    /// Names the index of this layer: the blob, every digest that the manifest gives for its TOC, and whatever else of the manifest
    /// goes into the index. Lazy blobs are never hashed whole, so another manifest's annotations must not reach this one's
    /// index.
    pub fn key(&self, blob: &Digest) -> Digest {
        let text =
            |digest: Option<Digest>| digest.map_or_else(|| "-".to_owned(), |digest| digest.to_string());
        let (json, compressed) = (text(self.json), text(self.compressed));
        let prefetch_end = self.prefetch_end.unwrap_or(0);
        Digest::of(format!("lazy layer {blob} {json} {compressed} {prefetch_end}").as_bytes())
    }

    /// End of the prioritized bytes, as far as the manifest tells. A hint.
    pub const fn prefetch_end(&self) -> Option<u64> {
        self.prefetch_end
    }

    /// What to ask for first: the compressed TOC where an annotation has its place, the TOC and the footer where one has its
    /// beginning, nothing where the TOC is in the image beside; else the end of the blob, long enough for most TOCs.
    pub fn first_range(&self) -> Range<u64> {
        if self.beside {
            return self.size..self.size;
        }
        if let Some(position) = &self.position {
            return position.range();
        }
        let guess = (self.size / GUESS_RATIO).clamp(GUESS_MIN, GUESS_MAX);
        self.toc_offset.unwrap_or_else(|| self.size.saturating_sub(guess))..self.size
    }

    /// Finds the TOC. `bytes` are those of [`Candidate::first_range`].
    pub fn locate(&self, bytes: &[u8]) -> Result<Located, NotLazy> {
        if self.beside {
            return Ok(Located {
                format: Format::EstargzExternal,
                origin: Origin::ImageBeside,
                toc: None,
                json_size: None,
                payload_end: self.size.saturating_sub(EXTERNAL_FOOTER as u64),
            });
        }
        if let Some(position) = self.position {
            return Ok(Located {
                format: Format::ZstdChunked(self.dialect().unwrap_or_default()),
                origin: Origin::Annotation,
                toc: Some(position.range()),
                json_size: Some(position.size),
                payload_end: zstd_chunked::payload_end(position, self.tar_split),
            });
        }
        match estargz::locate(bytes, self.size) {
            Ok(location) => {
                let end = location.payload_end;
                let inside = Some(end..end.saturating_add(location.toc_size));
                let (format, toc) = match location.footer {
                    Footer::Estargz { .. } => (Format::Estargz, inside),
                    Footer::Stargz { .. } => (Format::Stargz, inside),
                    Footer::External => (Format::EstargzExternal, None),
                };
                let origin = match &toc {
                    None => Origin::ImageBeside,
                    Some(toc) if Some(toc.start) == self.toc_offset => Origin::Annotation,
                    Some(_) => Origin::Footer,
                };
                Ok(Located {
                    format,
                    origin,
                    toc,
                    json_size: None,
                    payload_end: end,
                })
            }
            Err(FooterError::NotEstargz) => self.locate_zstd(bytes),
            Err(error) => Err(NotLazy::Footer(error.to_string())),
        }
    }

    fn locate_zstd(&self, bytes: &[u8]) -> Result<Located, NotLazy> {
        match zstd_chunked::locate(bytes, self.size) {
            Ok(location) => Ok(Located {
                format: Format::ZstdChunked(self.dialect().unwrap_or(location.footer.dialect())),
                origin: Origin::Footer,
                toc: Some(location.toc),
                json_size: Some(location.footer.toc.size),
                payload_end: location.payload_end,
            }),
            Err(zstd_chunked::FooterError::NotZstdChunked) => Err(match self.vouched() {
                Ok(()) => NotLazy::NoFooter,
                Err(NotLazy::NotVouchedFor) => NotLazy::Plain(self.plain_format()),
                Err(reason) => reason,
            }),
            Err(error) => Err(NotLazy::Footer(error.to_string())),
        }
    }

    /// What the layer is if it is not lazy, by its media type.
    pub fn plain_format(&self) -> Format {
        match media::layer_encoding(&self.media_type) {
            Some(Encoding::Gzip) => Format::Gzip,
            Some(Encoding::Zstd) => Format::Zstd,
            Some(Encoding::Plain) => Format::Tar,
            None => Format::Unknown,
        }
    }

    /// Whose zstd:chunked it is, by who vouches for it: only stargz-snapshotter gives a digest of the JSON.
    fn dialect(&self) -> Option<Dialect> {
        match (self.json, self.compressed) {
            (Some(_), _) => Some(Dialect::Stargz),
            (None, Some(_)) => Some(Dialect::Podman),
            (None, None) => None,
        }
    }

    /// Compares a TOC with all that the manifest says of it.
    pub fn state(&self, toc: &Toc) -> TocState {
        let wrong = [
            (self.json, toc.json_digest),
            (self.compressed, toc.compressed_digest),
        ]
        .into_iter()
        .find_map(|(annotated, digest)| Some((annotated.filter(|annotated| *annotated != digest)?, digest)));
        if let Some((annotated, digest)) = wrong {
            return TocState::Differs { digest, annotated };
        }
        let verified = |digest, over| TocState::Verified { digest, over };
        match (self.vouched(), self.json, self.compressed) {
            (Ok(()), Some(digest), Some(_)) => verified(digest, Over::Both),
            (Ok(()), Some(digest), None) => verified(digest, Over::Json),
            (Ok(()), None, Some(digest)) => verified(digest, Over::Compressed),
            _ => TocState::NotVouchedFor {
                digest: toc.json_digest,
            },
        }
    }

    /// The index that a TOC describes, if the manifest vouches for it and all of its files can be fetched and verified one by
    /// one.
    pub fn index(&self, located: &Located, toc: &Toc) -> Result<LayerIndex, NotLazy> {
        self.vouched()?;
        check(JSON, self.json, toc.json_digest)?;
        check(COMPRESSED, self.compressed, toc.compressed_digest)?;
        let index = read_index_by(&toc.json, &located.rules()).map_err(NotLazy::toc)?;
        self.checked(located, index, &HoleBudget::default())
    }

    /// The index of a TOC that the manifest vouches for, if all of its files can be fetched and verified one by one.
    fn checked(
        &self,
        located: &Located,
        mut index: LayerIndex,
        holes: &HoleBudget,
    ) -> Result<LayerIndex, NotLazy> {
        let end = located.payload_end;
        if located.format == Format::ZstdChunked(Dialect::Podman) {
            // There are no landmarks in this dialect.
            index.prefetch_end = self.prefetch_end.map(|prefetch_end| prefetch_end.min(end));
        }
        find_holes(&mut index, holes);
        match unservable(&index, end) {
            Some(reason) => Err(reason),
            None => Ok(index),
        }
    }

    /// From the compressed TOC to the index: as [`Located::open`] and [`Candidate::index`], but on several threads. Nothing is
    /// decompressed whose compressed bytes are known to be wrong, and nothing comes from JSON that is not the one which the
    /// manifest vouches for, not even an error. Computes for some ten milliseconds where a TOC is large.
    pub fn read(&self, located: &Located, compressed: &[u8]) -> Result<LayerIndex, NotLazy> {
        self.read_within(located, compressed, &HoleBudget::default())
    }

    /// As [`Candidate::read`], for one of the layers of an image, which share a budget.
    pub fn read_within(
        &self,
        located: &Located,
        compressed: &[u8],
        holes: &HoleBudget,
    ) -> Result<LayerIndex, NotLazy> {
        self.vouched()?;
        if let Some(expected) = self.compressed {
            check(COMPRESSED, Some(expected), Digest::of(compressed))?;
        }
        let json = located.decompress(compressed)?;
        let rules = located.rules();
        let index = match self.json {
            None => read_index_by(json.as_bytes(), &rules).map_err(NotLazy::toc),
            Some(expected) => {
                read_verified(json.as_bytes(), &rules, expected).map_err(|unusable| match unusable {
                    Unusable::Other(found) => NotLazy::Digest {
                        what: JSON,
                        found,
                        expected,
                    },
                    Unusable::Toc(error) => NotLazy::toc(error),
                })
            }
        }?;
        drop(json);
        self.checked(located, index, holes)
    }
}

fn check(what: &'static str, expected: Option<Digest>, found: Digest) -> Result<(), NotLazy> {
    match expected {
        Some(expected) if expected != found => Err(NotLazy::Digest {
            what,
            found,
            expected,
        }),
        _ => Ok(()),
    }
}
