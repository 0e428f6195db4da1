//! Writer of the metadata-only EROFS image: the whole tree of an image without a byte of file content.
//!
//! Called by [`crate::Store::put_erofs_image`] when an image's layers have been indexed. A regular file that is not empty
//! carries `trusted.overlay.metacopy` (empty) and `trusted.overlay.redirect` = `/ab/cdef...`, so overlayfs takes its
//! content from the object of that name in a data-only lower layer. Its own data is one hole, never read.
//!
//! # Why not the `composefs` crate
//!
//! `composefs` 0.9.4 can carry a redirect that is a plain sha256 (`RegularFile::ExternalNoVerity`). But it is made for
//! trees that were checked before, not for what a registry sends: a name of 300 bytes gives an image that `fsck.erofs`
//! rejects, an attribute of 64 KiB is cut off silently, a large device number or a long name ends in a panic. It builds
//! its own tree and the finished image in memory beside ours and takes 0.37 s for 100,000 files, several times what this
//! writer takes. It brings OpenSSL and tokio, and cannot write the device table that images with real chunk
//! addresses need. What is left to gain is a few hundred lines; these are checked against `fsck.erofs`, `dump.erofs`,
//! the `erofs-rs` reader and the kernel.
//!
//! # Layout of the image
//!
//! | block | content |
//! |---|---|
//! | 0 | superblock at byte 1024 (`format`) |
//! | 1... | inodes in the tree's order, each with its attributes, then its inline data or chunk entry |
//! | then | attributes that several inodes share |
//! | then | blocks of directories and symbolic links that did not fit beside their inode |
//!
//! Two passes over the tree: the first gives every inode its place (`layout`), the second writes from front to back.
//! The output depends on nothing but the tree.
//!
//! # What an image cannot say
//!
//! Attributes outside the namespaces `user`, `trusted`, `security` and the two POSIX ACLs are left out, as every unpacker
//! leaves out what the kernel does not know. A character device 0:0 is a whiteout for overlayfs and hides itself, as it
//! does in any overlay. The image's own `trusted.overlay.*` attributes are escaped to `trusted.overlay.overlay.*`, which
//! overlayfs turns back (Linux 6.7).

mod directory;
mod format;
mod layout;
mod xattrs;

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use peel_image::layer::{Device, MODE_MASK};
use peel_image::tree::{Inode, InodeId, InodeKind, Tree};
use zerocopy::{FromBytes, IntoBytes};

use crate::error::Error;
use format::{BLOCK, BLOCK_SIZE, ExtendedInode, SuperBlock};
use layout::{Data, Place, Plan};

/// Goes up whenever the same tree gives another image, or the same layers another tree, so that older images are not used.
pub const WRITER_VERSION: u32 = 2;

/// Bytes collected before they go to the output.
const OUTPUT_BUFFER: usize = 1 << 20;

/// Why one inode cannot be written; [`write_image`] adds its path.
#[derive(Debug)]
struct Problem {
    inode: InodeId,
    text: String,
}

impl Problem {
    fn new(inode: InodeId, text: impl Into<String>) -> Self {
        Self {
            inode,
            text: text.into(),
        }
    }
}

/// Writes the tree as an EROFS image whose regular files carry overlay redirects to `/ab/cdef...`. Returns the image's
/// length in bytes.
///
/// # Errors
///
/// [`Error::Image`] for a tree that the format cannot hold (attribute bodies beyond 256 KiB, files beyond 8 TiB, device
/// numbers beyond 12 and 20 bits...) or that is none; [`Error::ImageOutput`] when `out` fails.
pub fn write_image(tree: &Tree, out: &mut dyn Write) -> Result<u64, Error> {
    let describe = |problem: Problem| Error::Image {
        name: path_of(tree, problem.inode),
        problem: problem.text,
    };
    let plan = Plan::new(tree).map_err(describe)?;
    let mut image = Output {
        out,
        buffer: Vec::with_capacity(OUTPUT_BUFFER + BLOCK),
        position: 0,
    };
    image.pad_to(format::SUPER_OFFSET)?;
    let super_block = SuperBlock::new(&plan);
    image.put(super_block.as_bytes())?;
    let mut blocks = Vec::new();
    for (index, (inode, place)) in tree.inodes.iter().zip(&plan.places).enumerate() {
        image.pad_to(place.position)?;
        let header = inode_header(inode, place, index);
        image.put(header.as_bytes())?;
        plan.xattrs.encode(inode, &mut image)?;
        match (&inode.kind, place.data) {
            (InodeKind::Directory(children), Data::Inline | Data::Blocks { .. }) => {
                let inline = matches!(place.data, Data::Inline)
                    || matches!(place.data, Data::Blocks { tail: true, .. });
                let names = directory::Names::new(
                    children,
                    InodeId(u32::try_from(index).unwrap_or(u32::MAX)),
                    place.parent,
                );
                let mut ranges = names.blocks().peekable();
                while let Some(range) = ranges.next() {
                    let block = names.encode(range, |id| plan.target(tree, id));
                    if inline && ranges.peek().is_none() {
                        image.put(&block)?;
                    } else {
                        blocks.extend_from_slice(&block);
                        blocks.resize(blocks.len().next_multiple_of(BLOCK), 0);
                    }
                }
            }
            (InodeKind::Symlink(target), Data::Inline) => image.put(target)?,
            (InodeKind::Symlink(target), Data::Blocks { .. }) => {
                blocks.extend_from_slice(target);
                blocks.resize(blocks.len().next_multiple_of(BLOCK), 0);
            }
            (_, Data::Chunk { .. }) => image.put(&format::HOLE.to_le_bytes())?,
            _ => {}
        }
    }
    image.pad_to(plan.shared_start)?;
    plan.xattrs.encode_shared(&mut image)?;
    image.pad_to(plan.data_start)?;
    image.put(&blocks)?;
    image.pad_to(plan.end)?;
    image.flush()?;
    Ok(plan.end)
}

fn inode_header(inode: &Inode, place: &Place, index: usize) -> ExtendedInode {
    let metadata = &inode.metadata;
    let (file_type, union) = match (&inode.kind, place.data) {
        (InodeKind::CharDevice(device), _) => (format::S_IFCHR, device_number(*device)),
        (InodeKind::BlockDevice(device), _) => (format::S_IFBLK, device_number(*device)),
        (InodeKind::Fifo, _) => (format::S_IFIFO, 0),
        (kind, data) => {
            let file_type = match kind {
                InodeKind::Directory(_) => format::S_IFDIR,
                InodeKind::Symlink(_) => format::S_IFLNK,
                _ => format::S_IFREG,
            };
            let union = match data {
                Data::Chunk { bits } => u32::from(bits),
                Data::Blocks { start, .. } => start,
                Data::None | Data::Inline => 0,
            };
            (file_type, union)
        }
    };
    let layout = match place.data {
        Data::None | Data::Blocks { tail: false, .. } => format::LAYOUT_PLAIN,
        Data::Inline | Data::Blocks { tail: true, .. } => format::LAYOUT_INLINE,
        Data::Chunk { .. } => format::LAYOUT_CHUNK,
    };
    ExtendedInode {
        format: (format::FORMAT_EXTENDED | layout << format::FORMAT_LAYOUT_SHIFT).into(),
        xattr_count: xattrs::count_field(place.xattr_size).into(),
        mode: (file_type | (metadata.mode & MODE_MASK)).into(),
        reserved: 0.into(),
        size: place.size.into(),
        union: union.into(),
        // Only 32-bit user space sees this number.
        number: u32::try_from(index).unwrap_or(0).wrapping_add(1).into(),
        uid: metadata.uid.into(),
        gid: metadata.gid.into(),
        mtime: metadata.mtime.into(),
        mtime_nanoseconds: metadata.mtime_nanoseconds.into(),
        links: inode.links.into(),
        reserved_2: [0; 16],
    }
}

/// The kernel's `new_encode_dev` (include/linux/kdev_t.h). The layout pass has checked the ranges.
fn device_number(device: Device) -> u32 {
    (device.minor & 0xff) | (device.major << 8) | ((device.minor & !0xff) << 12)
}

/// The first path that leads to the inode, for error messages only.
fn path_of(tree: &Tree, wanted: InodeId) -> String {
    let mut stack = vec![(InodeId(0), String::new(), 0)];
    let mut left = tree.inodes.len().saturating_mul(2);
    while let Some((id, path, depth)) = stack.pop() {
        if id == wanted {
            return if path.is_empty() { "/".to_owned() } else { path };
        }
        left = left.saturating_sub(1);
        let inode = usize::try_from(id.0)
            .ok()
            .and_then(|index| tree.inodes.get(index));
        // The tree may be one that has just been refused, with a loop in it.
        let (Some(InodeKind::Directory(children)), true) =
            (inode.map(|inode| &inode.kind), depth < 4096 && left > 0)
        else {
            continue;
        };
        for (name, child) in children {
            stack.push((
                *child,
                format!("{path}/{}", String::from_utf8_lossy(name).escape_debug()),
                depth + 1,
            ));
        }
    }
    format!("inode {}", wanted.0)
}

/// Whether the file is a whole image of this writer: the superblock's checksum is right and the length is what it says.
pub(crate) fn check_image(path: &Path) -> io::Result<()> {
    let broken = |problem| io::Error::new(io::ErrorKind::InvalidData, problem);
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut block = [0; BLOCK];
    file.read_exact_at(&mut block, 0)?;
    let (super_block, _) = block
        .get(SuperBlock::POSITION..)
        .and_then(|rest| SuperBlock::read_from_prefix(rest).ok())
        .ok_or_else(|| broken("it has no superblock"))?;
    if !super_block.is_intact() {
        return Err(broken("its superblock is damaged"));
    }
    if u64::from(super_block.blocks.get()) * BLOCK_SIZE != length {
        return Err(broken("it is cut off"));
    }
    Ok(())
}

/// Collects small pieces and knows where the next one will stand.
struct Output<'a> {
    out: &'a mut dyn Write,
    buffer: Vec<u8>,
    position: u64,
}

impl Output<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.position += bytes.len() as u64;
        if bytes.len() >= OUTPUT_BUFFER {
            self.flush()?;
            return self.out.write_all(bytes).map_err(Error::ImageOutput);
        }
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= OUTPUT_BUFFER {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes zeros up to `position`, which the layout pass has put at most a block ahead.
    fn pad_to(&mut self, position: u64) -> Result<(), Error> {
        const ZEROS: [u8; BLOCK] = [0; BLOCK];
        debug_assert!(position >= self.position, "the two passes disagree");
        while self.position < position {
            let length = usize::try_from(position - self.position).map_or(BLOCK, |left| left.min(BLOCK));
            self.put(ZEROS.get(..length).unwrap_or(&ZEROS))?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Error> {
        self.out.write_all(&self.buffer).map_err(Error::ImageOutput)?;
        self.buffer.clear();
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests;
