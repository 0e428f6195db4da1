//! The TOC as it stands in a blob: a gzip member with one tar entry, which holds JSON.
//!
//! The manifest vouches for the sha256 of exactly these JSON bytes, so they are kept as they are and never written anew.
//! [`TocEntry`] is the JSON's own shape; [`super::index`] gives it meaning and the crate `writer` makes it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::{TOC_JSON_MAX, TOC_MEMBER_MAX, TOC_NAME};
use crate::compression::{CompressionError, inflate_member};
use crate::path::PathError;
use crate::tar::{self, TarError, TarKind};
use peel_hash::Digest;

/// The JSON of a TOC and its digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TocBytes {
    /// The JSON, byte for byte.
    pub json: Vec<u8>,
    /// sha256 of the JSON: what the annotation [`TOC_DIGEST`](crate::annotations::TOC_DIGEST) must say.
    pub digest: Digest,
}

/// Why a TOC cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TocError {
    /// The member is longer than [`TOC_MEMBER_MAX`].
    #[error("the TOC has {0} compressed bytes; the limit is {TOC_MEMBER_MAX}")]
    MemberTooLarge(u64),
    /// The JSON is longer than [`TOC_JSON_MAX`].
    #[error("the TOC has {0} bytes of JSON; the limit is {TOC_JSON_MAX}")]
    TooLarge(u64),
    /// The compressed TOC is no zstd stream, or a damaged one.
    #[error("the compressed TOC cannot be decompressed")]
    Zstd(#[source] CompressionError),
    /// The member cannot be inflated.
    #[error("the TOC's gzip member cannot be inflated")]
    Gzip(#[source] CompressionError),
    /// The member holds no tar stream.
    #[error("the TOC's member cannot be read as a tar stream")]
    Tar(#[from] TarError),
    /// The tar stream holds something else.
    #[error("the TOC's member holds no file named {TOC_NAME}")]
    Missing,
    /// The JSON is not all there.
    #[error("the TOC's member ends inside the file {TOC_NAME}")]
    Truncated,
    /// The JSON is malformed.
    #[error("the TOC is not the JSON that it should be")]
    Json(#[from] serde_json::Error),
    /// There are more entries, chunks and attributes than a reader will hold.
    #[error("the TOC holds more than {0} entries, chunks and extended attributes")]
    TooMany(usize),
    /// An entry's name cannot be a path.
    #[error("TOC entry {entry:?}: field {field}")]
    Name {
        /// Name of the entry.
        entry: String,
        /// `name` or `linkName`.
        field: &'static str,
        /// What is wrong with it.
        #[source]
        source: PathError,
    },
    /// A field of an entry contradicts the rest.
    #[error("TOC entry {entry:?}: field {field}: {problem}")]
    Field {
        /// Name of the entry.
        entry: String,
        /// The JSON key.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

/// Room for the tar headers before the JSON and the end of the archive after it.
const HEADERS_MAX: u64 = 1 << 20;

/// One element of the TOC's `entries`: a file, directory, ..., or a further chunk of the file before it. Absent numbers are
/// 0 and absent texts empty, in both directions.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TocEntry<'a> {
    /// The name in the tar stream, not cleaned. Borrowed if the JSON has it without an escape, as `link_name`: that tells a real
    /// U+FFFD from one that stands for bytes which are not UTF-8.
    #[serde(borrow)]
    pub name: Cow<'a, str>,
    /// `dir`, `reg`, `symlink`, `hardlink`, `char`, `block`, `fifo` or `chunk`.
    #[serde(borrow, rename = "type")]
    pub kind: Cow<'a, str>,
    /// Length of a regular file in bytes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub size: i64,
    /// Modification time, RFC 3339.
    #[serde(default, borrow, skip_serializing_if = "str::is_empty")]
    pub modtime: Cow<'a, str>,
    /// Target of a symbolic or hard link.
    #[serde(default, borrow, skip_serializing_if = "str::is_empty")]
    pub link_name: Cow<'a, str>,
    /// Permission, set-id and sticky bits.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub mode: i64,
    /// Owning user.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub uid: i64,
    /// Owning group.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gid: i64,
    /// Name of the user; only where it differs from the last one of the same id.
    #[serde(default, borrow, skip_serializing_if = "str::is_empty")]
    pub user_name: Cow<'a, str>,
    /// Name of the group; only where it differs from the last one of the same id.
    #[serde(default, borrow, skip_serializing_if = "str::is_empty")]
    pub group_name: Cow<'a, str>,
    /// Where in the blob the stream starts that holds the chunk.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub offset: i64,
    /// Where in that stream, uncompressed, the chunk starts.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub inner_offset: i64,
    /// Major device number.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dev_major: i64,
    /// Minor device number.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dev_minor: i64,
    /// Extended attributes, values in base64.
    #[serde(
        default,
        deserialize_with = "few_xattrs",
        skip_serializing_if = "Option::is_none"
    )]
    pub xattrs: Option<BTreeMap<String, String>>,
    /// sha256 of a whole regular file.
    #[serde(default, borrow, skip_serializing_if = "str::is_empty")]
    pub digest: Cow<'a, str>,
    /// Where the chunk starts in the file.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub chunk_offset: i64,
    /// Length of the chunk; 0 means up to the end of the file.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub chunk_size: i64,
    /// sha256 of the chunk.
    #[serde(default, borrow, skip_serializing_if = "str::is_empty")]
    pub chunk_digest: Cow<'a, str>,
    /// Only in Podman's zstd:chunked: empty for bytes, `zeros` for a run of zeros.
    #[serde(default, borrow, skip_serializing_if = "str::is_empty")]
    pub chunk_type: Cow<'a, str>,
    /// Only in Podman's zstd:chunked, and only on the `reg` entry: where in the blob the file's bytes end.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub end_offset: i64,
}

/// Most extended attributes of one entry: as many names as fit into what Linux lists of a file (`XATTR_LIST_MAX`, 64 KiB). They are
/// counted while they are read, since a TOC of nothing else would take twenty times its size.
const XATTRS_MAX: usize = 32 << 10;

fn few_xattrs<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<BTreeMap<String, String>>, D::Error> {
    struct Few;

    impl<'de> Visitor<'de> for Few {
        type Value = BTreeMap<String, String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "an object of at most {XATTRS_MAX} extended attributes")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut xattrs = BTreeMap::new();
            let mut count = 0_usize;
            while let Some((name, value)) = map.next_entry()? {
                count += 1;
                if count > XATTRS_MAX {
                    return Err(A::Error::invalid_length(count, &self));
                }
                xattrs.insert(name, value);
            }
            Ok(xattrs)
        }
    }

    struct Maybe;

    impl<'de> Visitor<'de> for Maybe {
        type Value = Option<BTreeMap<String, String>>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            Few.expecting(f)
        }

        fn visit_none<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
            deserializer.deserialize_map(Few).map(Some)
        }
    }

    deserializer.deserialize_option(Maybe)
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes the field by reference"
)]
fn is_zero(number: &i64) -> bool {
    *number == 0
}

/// The JSON of a TOC and whatever else was uncompressed with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Json {
    data: Vec<u8>,
    range: Range<usize>,
}

impl Json {
    /// The JSON alone.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.data.get(self.range.clone()).unwrap_or_default()
    }

    /// The JSON alone. Moves its bytes to the beginning of what was uncompressed, if they are not there.
    pub(crate) fn into_bytes(mut self) -> Vec<u8> {
        self.data.truncate(self.range.end);
        self.data.drain(..self.range.start.min(self.data.len()));
        self.data
    }
}

impl From<Vec<u8>> for Json {
    fn from(data: Vec<u8>) -> Self {
        let range = 0..data.len();
        Self { data, range }
    }
}

/// Takes the TOC out of its gzip member: the blob's bytes from the TOC's offset up to the footer.
pub fn extract_toc(member: &[u8]) -> Result<TocBytes, TocError> {
    let json = extract_json(member)?;
    let digest = Digest::of(json.as_bytes());
    let json = json.into_bytes();
    Ok(TocBytes { json, digest })
}

/// As [`extract_toc`], without the digest.
pub(crate) fn extract_json(member: &[u8]) -> Result<Json, TocError> {
    let length = u64::try_from(member.len()).unwrap_or(u64::MAX);
    if length > TOC_MEMBER_MAX {
        return Err(TocError::MemberTooLarge(length));
    }
    let hint = member
        .last_chunk()
        .map(|size| u64::from(u32::from_le_bytes(*size)));
    let limit = TOC_JSON_MAX + HEADERS_MAX;
    let data = inflate_member(member, hint, limit).map_err(TocError::Gzip)?;
    let mut stream = tar::Reader::new(data.as_slice());
    let entry = stream.next_entry()?.ok_or(TocError::Missing)?;
    let TarKind::Regular { size } = entry.kind else {
        return Err(TocError::Missing);
    };
    if entry.path.as_bytes() != TOC_NAME.as_bytes() || !entry.self_contained {
        return Err(TocError::Missing);
    }
    if size > TOC_JSON_MAX {
        return Err(TocError::TooLarge(size));
    }
    let start = usize::try_from(stream.position()).unwrap_or(usize::MAX);
    let end = usize::try_from(size)
        .ok()
        .and_then(|size| start.checked_add(size));
    let end = end.filter(|end| *end <= data.len()).ok_or(TocError::Truncated)?;
    let range = start..end;
    Ok(Json { data, range })
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;
    use crate::layer::Metadata;
    use crate::tar::write::{NewEntry, Writer};

    fn member(entries: &[(&str, &[u8])]) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        for (name, content) in entries {
            let kind = TarKind::Regular {
                size: content.len() as u64,
            };
            let entry = NewEntry {
                name: name.as_bytes(),
                metadata: &Metadata::default(),
                kind: &kind,
                user_name: b"",
                group_name: b"",
            };
            writer.append(&entry, &mut &**content).unwrap();
        }
        gzip(&writer.finish().unwrap())
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::read::GzEncoder::new(data, flate2::Compression::fast());
        let mut out = Vec::new();
        encoder.read_to_end(&mut out).unwrap();
        out
    }

    #[test]
    fn the_json_comes_out_as_it_went_in() {
        let json = b"{\"version\":1,\n\t\"entries\":[]}";
        let toc = extract_toc(&member(&[(TOC_NAME, json)])).unwrap();
        assert_eq!(toc.json, json);
        assert_eq!(toc.digest, Digest::of(json));
    }

    #[test]
    fn attributes_are_counted_while_they_are_read() {
        for (count, is_good) in [(0, true), (3, true), (XATTRS_MAX, true), (XATTRS_MAX + 1, false)] {
            let xattrs: Vec<_> = (0..count).map(|number| format!("\"{number}\":\"\"")).collect();
            let json = format!(
                "{{\"name\":\"a\",\"type\":\"dir\",\"xattrs\":{{{}}}}}",
                xattrs.join(",")
            );
            let entry: Result<TocEntry<'_>, _> = serde_json::from_str(&json);
            assert_eq!(
                entry.ok().map(|entry| entry.xattrs.map(|xattrs| xattrs.len())),
                is_good.then_some(Some(count))
            );
        }
        let entry: TocEntry<'_> =
            serde_json::from_str("{\"name\":\"a\",\"type\":\"dir\",\"xattrs\":null}").unwrap();
        assert_eq!(entry.xattrs, None);
    }

    #[test]
    fn other_members_are_refused() {
        let good = member(&[(TOC_NAME, b"{}")]);
        assert!(matches!(extract_toc(b""), Err(TocError::Gzip(_))));
        assert!(matches!(extract_toc(b"not gzip at all"), Err(TocError::Gzip(_))));
        assert!(matches!(
            extract_toc(&gzip(b"no tar at all")),
            Err(TocError::Tar(_))
        ));
        assert!(matches!(
            extract_toc(good.get(..good.len() / 2).unwrap()),
            Err(TocError::Gzip(_))
        ));
        assert!(matches!(extract_toc(&member(&[])), Err(TocError::Missing)));
        assert!(matches!(
            extract_toc(&member(&[("etc/passwd", b"{}")])),
            Err(TocError::Missing)
        ));
        let mut header = [0; 512];
        let huge = NewEntry {
            name: TOC_NAME.as_bytes(),
            metadata: &Metadata::default(),
            kind: &TarKind::Regular {
                size: TOC_JSON_MAX + 1,
            },
            user_name: b"",
            group_name: b"",
        };
        header.copy_from_slice(&tar::write::encode_header(&huge).unwrap());
        assert!(matches!(extract_toc(&gzip(&header)), Err(TocError::TooLarge(_))));
    }
}
