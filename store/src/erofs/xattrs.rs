//! Extended attributes of an inode: which of them the image carries, under which short names, and how they are packed.
//!
//! An attribute that several inodes have with the same value is written once and referred to by its place
//! (`trusted.overlay.metacopy` above all: every file has it).

use std::borrow::Cow;
use std::collections::BTreeMap;

use peel_image::tree::{Inode, InodeId, InodeKind, Tree};
use zerocopy::IntoBytes;

use super::format::{XATTR_ALIGN, XATTR_ENTRY_SIZE, XATTR_HEADER_SIZE, XattrEntry, XattrHeader};
use super::{Output, Problem};
use crate::error::Error;

/// Name prefixes and their numbers (`EROFS_XATTR_INDEX_*`).
const PREFIXES: [(&[u8], u8); 3] = [(b"user.", 1), (TRUSTED, TRUSTED_INDEX), (b"security.", 6)];
/// Attributes that have a number of their own.
const WHOLE_NAMES: [(&[u8], u8); 2] = [(b"system.posix_acl_access", 2), (b"system.posix_acl_default", 3)];

const TRUSTED: &[u8] = b"trusted.";
const TRUSTED_INDEX: u8 = 4;
/// What overlayfs takes for its own, without `trusted.`; one more `overlay.` makes it the image's again.
const OVERLAY: &[u8] = b"overlay.";
const METACOPY: &[u8] = b"overlay.metacopy";
const REDIRECT: &[u8] = b"overlay.redirect";

/// Longest name without its prefix.
const NAME_MAX: usize = 255;
/// Longest value: the field has 16 bits.
const VALUE_MAX: usize = 65_535;
/// Longest attribute body: `xattr_count` has 16 bits.
const BODY_MAX: u64 = XATTR_HEADER_SIZE + (65_535 - 1) * XATTR_ALIGN;
/// Most of an inode's own attributes that can be shared ones: the count has 8 bits, and the metacopy mark takes one.
const SHARED_MAX: usize = 254;

/// Shared id of `trusted.overlay.metacopy`.
const METACOPY_ID: u32 = 0;
/// Length of `/ab/cdef...`.
const REDIRECT_SIZE: usize = 66;
/// Length of the entry of `trusted.overlay.redirect`.
const REDIRECT_ENTRY_SIZE: u64 =
    (XATTR_ENTRY_SIZE + REDIRECT.len() as u64 + REDIRECT_SIZE as u64).next_multiple_of(XATTR_ALIGN);

/// One attribute as the image has it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Attribute<'a> {
    index: u8,
    /// The name behind the prefix.
    name: Cow<'a, [u8]>,
    value: Cow<'a, [u8]>,
}

impl Attribute<'_> {
    /// Length of its entry.
    fn size(&self) -> u64 {
        (XATTR_ENTRY_SIZE + self.name.len() as u64 + self.value.len() as u64).next_multiple_of(XATTR_ALIGN)
    }

    fn encode(&self, out: &mut Vec<u8>) {
        let entry = XattrEntry {
            // Checked by the layout pass.
            name_length: u8::try_from(self.name.len()).unwrap_or(u8::MAX),
            name_index: self.index,
            value_size: u16::try_from(self.value.len()).unwrap_or(u16::MAX).into(),
        };
        out.extend_from_slice(entry.as_bytes());
        out.extend_from_slice(&self.name);
        out.extend_from_slice(&self.value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
}

/// The attributes of a tree.
pub(super) struct Xattrs<'a> {
    /// The image's own attributes that are written once, and their ids; [`METACOPY_ID`] goes before them.
    shared: BTreeMap<Attribute<'a>, u32>,
    shared_size: u64,
}

impl<'a> Xattrs<'a> {
    /// Finds what is worth sharing.
    pub(super) fn new(tree: &'a Tree) -> Result<Self, Problem> {
        let mut uses: BTreeMap<Attribute<'a>, u32> = BTreeMap::new();
        for inode in tree
            .inodes
            .iter()
            .filter(|inode| !inode.metadata.xattrs.is_empty())
        {
            for attribute in own(inode) {
                *uses.entry(attribute).or_default() += 1;
            }
        }
        // A reference of 4 bytes for an entry of 4 gains nothing.
        uses.retain(|attribute, uses| *uses > 1 && attribute.size() > 4);
        // The first entry is the one that every file has.
        let mut shared_size = metacopy().size();
        for (attribute, id) in &mut uses {
            *id = u32::try_from(shared_size / XATTR_ALIGN)
                .map_err(|_| Problem::new(InodeId(0), "the extended attributes exceed 16 GiB"))?;
            shared_size += attribute.size();
        }
        Ok(Self {
            shared: uses,
            shared_size,
        })
    }

    /// Length of the shared area in bytes.
    pub(super) const fn shared_size(&self) -> u64 {
        self.shared_size
    }

    /// Length of the inode's attribute body in bytes, 0 when it has none.
    pub(super) fn size(&self, id: InodeId, inode: &Inode) -> Result<u64, Problem> {
        for attribute in own(inode) {
            if attribute.name.len() > NAME_MAX || attribute.value.len() > VALUE_MAX {
                let name = String::from_utf8_lossy(&attribute.name).into_owned();
                return Err(Problem::new(
                    id,
                    format!(
                        "its extended attribute {name:?} has {} bytes of name and {} of value, the limits are {NAME_MAX} and {VALUE_MAX}",
                        attribute.name.len(),
                        attribute.value.len()
                    ),
                ));
            }
        }
        let (shared, own) = self.split(inode);
        let overlay = match redirect(inode) {
            Some(_) => XATTR_ALIGN + REDIRECT_ENTRY_SIZE,
            None => 0,
        };
        let entries =
            overlay + shared.len() as u64 * XATTR_ALIGN + own.iter().map(Attribute::size).sum::<u64>();
        if entries == 0 {
            return Ok(0);
        }
        let size = XATTR_HEADER_SIZE + entries;
        if size > BODY_MAX {
            return Err(Problem::new(
                id,
                format!("its extended attributes take {size} bytes, the limit is {BODY_MAX}"),
            ));
        }
        Ok(size)
    }

    /// Writes the inode's attribute body.
    pub(super) fn encode(&self, inode: &Inode, out: &mut Output<'_>) -> Result<(), Error> {
        let (shared, own) = self.split(inode);
        let redirect = redirect(inode);
        if shared.is_empty() && own.is_empty() && redirect.is_none() {
            return Ok(());
        }
        let count = shared.len() + usize::from(redirect.is_some());
        let header = XattrHeader {
            name_filter: 0.into(),
            shared_count: u8::try_from(count).unwrap_or(u8::MAX),
            reserved: [0; 7],
        };
        let mut body = Vec::with_capacity(128);
        body.extend_from_slice(header.as_bytes());
        if redirect.is_some() {
            body.extend_from_slice(&METACOPY_ID.to_le_bytes());
        }
        for id in shared {
            body.extend_from_slice(&id.to_le_bytes());
        }
        if let Some(path) = redirect {
            let attribute = Attribute {
                index: TRUSTED_INDEX,
                name: Cow::Borrowed(REDIRECT),
                value: Cow::Borrowed(&path),
            };
            attribute.encode(&mut body);
        }
        for attribute in own {
            attribute.encode(&mut body);
        }
        out.put(&body)
    }

    /// Writes the shared area.
    pub(super) fn encode_shared(&self, out: &mut Output<'_>) -> Result<(), Error> {
        let mut body = Vec::new();
        for attribute in std::iter::once(&metacopy()).chain(self.shared.keys()) {
            body.clear();
            attribute.encode(&mut body);
            out.put(&body)?;
        }
        Ok(())
    }

    /// Ids of the shared ones among the inode's own attributes, and those that it has for itself.
    fn split<'i>(&self, inode: &'i Inode) -> (Vec<u32>, Vec<Attribute<'i>>) {
        let mut shared = Vec::new();
        let mut alone = Vec::new();
        for attribute in own(inode) {
            match self.shared.get(&attribute) {
                Some(id) if shared.len() < SHARED_MAX => shared.push(*id),
                _ => alone.push(attribute),
            }
        }
        (shared, alone)
    }
}

/// The inode's `xattr_count` field for a body of that length.
pub(super) fn count_field(size: u64) -> u16 {
    match size.checked_sub(XATTR_HEADER_SIZE) {
        Some(entries) => u16::try_from(entries / XATTR_ALIGN + 1).unwrap_or(u16::MAX),
        None => 0,
    }
}

fn metacopy<'a>() -> Attribute<'a> {
    Attribute {
        index: TRUSTED_INDEX,
        name: Cow::Borrowed(METACOPY),
        value: Cow::Borrowed(b""),
    }
}

/// Where overlayfs finds the content of a regular file that is not empty: `/ab/cdef...`, as in
/// [`crate::Store::object_name`].
fn redirect(inode: &Inode) -> Option<[u8; REDIRECT_SIZE]> {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let InodeKind::Regular(file) = &inode.kind else {
        return None;
    };
    if file.size == 0 {
        return None;
    }
    let mut path = [b'/'; REDIRECT_SIZE];
    let digits = file
        .object
        .as_bytes()
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 0xf]);
    // The two slashes are at 0 and 3.
    let places = path
        .iter_mut()
        .enumerate()
        .filter(|(place, _)| !matches!(place, 0 | 3));
    for ((_, place), digit) in places.zip(digits) {
        *place = DIGITS[usize::from(digit)];
    }
    Some(path)
}

/// The image's own attributes, as far as Linux knows their namespace.
fn own(inode: &Inode) -> impl Iterator<Item = Attribute<'_>> {
    inode.metadata.xattrs.iter().filter_map(|(name, value)| {
        let (index, name) = short_name(name)?;
        Some(Attribute {
            index,
            name,
            value: Cow::Borrowed(value),
        })
    })
}

/// The number of the name's prefix and the rest of it.
fn short_name(name: &[u8]) -> Option<(u8, Cow<'_, [u8]>)> {
    if let Some((_, index)) = WHOLE_NAMES.iter().find(|(whole, _)| *whole == name) {
        return Some((*index, Cow::Borrowed(b"")));
    }
    let (rest, index) = PREFIXES
        .iter()
        .find_map(|(prefix, index)| Some((name.strip_prefix(*prefix)?, *index)))?;
    if rest.is_empty() || rest.contains(&0) {
        return None;
    }
    if index == TRUSTED_INDEX && rest.starts_with(OVERLAY) {
        return Some((index, Cow::Owned([OVERLAY, rest].concat())));
    }
    Some((index, Cow::Borrowed(rest)))
}
