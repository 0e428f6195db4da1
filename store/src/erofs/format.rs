//! Structures and constants of the EROFS on-disk format, little-endian (Linux, fs/erofs/erofs_fs.h). Everything used here
//! is understood by Linux 5.15 and later. Apart from the writer, so that another kind of image (with real chunk
//! addresses and a device table) can use them too.

use zerocopy::byteorder::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::layout::Plan;

/// log2 of the block size: 4096 bytes, which every architecture's kernel can mount.
pub(super) const BLOCK_BITS: u8 = 12;
/// Block size in bytes.
pub(super) const BLOCK: usize = 1 << BLOCK_BITS;
/// [`BLOCK`] for positions.
pub(super) const BLOCK_SIZE: u64 = 1 << BLOCK_BITS;
/// Where the superblock stands.
pub(super) const SUPER_OFFSET: u64 = 1024;
/// Inode positions are multiples of this; a node id is the position in slots.
pub(super) const SLOT: u64 = 32;

const MAGIC: u32 = 0xE0F5_E1E2;
/// The checksum field is used.
const COMPAT_CHECKSUM: u32 = 1;
/// `i_mtime` holds the modification time (before, it was ctime).
const COMPAT_MTIME: u32 = 2;
/// Some inodes have the chunk layout.
const INCOMPAT_CHUNKED_FILE: u32 = 4;

/// Bit 0 of an inode's format: 64 bytes instead of 32.
pub(super) const FORMAT_EXTENDED: u16 = 1;
/// Bits 1 to 3: data layout.
pub(super) const FORMAT_LAYOUT_SHIFT: u16 = 1;
/// All data in whole blocks.
pub(super) const LAYOUT_PLAIN: u16 = 0;
/// Whole blocks, then the rest right behind the inode and its attributes, within one block.
pub(super) const LAYOUT_INLINE: u16 = 2;
/// A table of chunk addresses behind the inode and its attributes.
pub(super) const LAYOUT_CHUNK: u16 = 4;

/// Chunk address of a hole.
pub(super) const HOLE: u32 = u32::MAX;
/// Largest value of the chunk size field: log2 of the chunk size in blocks has 5 bits.
pub(super) const CHUNK_BITS_MAX: u8 = 31;

pub(super) const S_IFIFO: u16 = 0o010_000;
pub(super) const S_IFCHR: u16 = 0o020_000;
pub(super) const S_IFDIR: u16 = 0o040_000;
pub(super) const S_IFBLK: u16 = 0o060_000;
pub(super) const S_IFREG: u16 = 0o100_000;
pub(super) const S_IFLNK: u16 = 0o120_000;

/// Types in directory entries.
pub(super) const FT_REGULAR: u8 = 1;
pub(super) const FT_DIRECTORY: u8 = 2;
pub(super) const FT_CHAR_DEVICE: u8 = 3;
pub(super) const FT_BLOCK_DEVICE: u8 = 4;
pub(super) const FT_FIFO: u8 = 5;
pub(super) const FT_SYMLINK: u8 = 7;

/// `struct erofs_super_block`.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct SuperBlock {
    magic: U32,
    checksum: U32,
    feature_compat: U32,
    block_bits: u8,
    extension_slots: u8,
    root: U16,
    inodes: U64,
    epoch: U64,
    fixed_nanoseconds: U32,
    /// Length of the image in blocks.
    pub(super) blocks: U32,
    meta_block: U32,
    xattr_block: U32,
    uuid: [u8; 16],
    volume_name: [u8; 16],
    feature_incompat: U32,
    compression: U16,
    extra_devices: U16,
    device_table_slot: U16,
    directory_block_bits: u8,
    xattr_prefix_count: u8,
    xattr_prefix_start: U32,
    packed_inode: U64,
    xattr_filter_reserved: u8,
    reserved: [u8; 23],
}

const _: () = assert!(size_of::<SuperBlock>() == 128);

impl SuperBlock {
    /// [`SUPER_OFFSET`] as an index.
    pub(super) const POSITION: usize = 1024;

    pub(super) fn new(plan: &Plan<'_>) -> Self {
        let mut block = Self {
            magic: MAGIC.into(),
            checksum: 0.into(),
            feature_compat: (COMPAT_CHECKSUM | COMPAT_MTIME).into(),
            block_bits: BLOCK_BITS,
            extension_slots: 0,
            root: plan.root_node().into(),
            inodes: (plan.places.len() as u64).into(),
            epoch: 0.into(),
            fixed_nanoseconds: 0.into(),
            blocks: plan.blocks.into(),
            meta_block: 0.into(),
            xattr_block: plan.shared_block.into(),
            uuid: [0; 16],
            volume_name: [0; 16],
            feature_incompat: INCOMPAT_CHUNKED_FILE.into(),
            compression: 0.into(),
            extra_devices: 0.into(),
            device_table_slot: 0.into(),
            directory_block_bits: 0,
            xattr_prefix_count: 0,
            xattr_prefix_start: 0.into(),
            packed_inode: 0.into(),
            xattr_filter_reserved: 0,
            reserved: [0; 23],
        };
        block.checksum = block.computed_checksum().into();
        block
    }

    /// crc32c from the superblock to the end of its block, the field itself 0, without the final inversion. The rest of
    /// the block is zeros in our images.
    fn computed_checksum(&self) -> u32 {
        let mut clear = self.clone();
        clear.checksum = 0.into();
        let rest = [0; BLOCK - Self::POSITION - size_of::<Self>()];
        !crc32c::crc32c_append(crc32c::crc32c(clear.as_bytes()), &rest)
    }

    /// Whether magic and checksum are right.
    pub(super) fn is_intact(&self) -> bool {
        self.magic.get() == MAGIC && self.checksum.get() == self.computed_checksum()
    }
}

/// `struct erofs_inode_extended`.
#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct ExtendedInode {
    pub(super) format: U16,
    pub(super) xattr_count: U16,
    pub(super) mode: U16,
    pub(super) reserved: U16,
    pub(super) size: U64,
    /// First block, device number, or chunk format, by type and layout.
    pub(super) union: U32,
    pub(super) number: U32,
    pub(super) uid: U32,
    pub(super) gid: U32,
    pub(super) mtime: I64,
    pub(super) mtime_nanoseconds: U32,
    pub(super) links: U32,
    pub(super) reserved_2: [u8; 16],
}

/// Length of [`ExtendedInode`].
pub(super) const INODE_SIZE: u64 = 64;
const _: () = assert!(size_of::<ExtendedInode>() == 64);

/// `struct erofs_dirent`.
#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct DirectoryEntry {
    pub(super) node: U64,
    /// Where the name starts in the block.
    pub(super) name_offset: U16,
    pub(super) file_type: u8,
    pub(super) reserved: u8,
}

/// Length of [`DirectoryEntry`].
pub(super) const ENTRY_SIZE: usize = 12;
const _: () = assert!(size_of::<DirectoryEntry>() == ENTRY_SIZE);

/// `struct erofs_xattr_ibody_header`; ids of shared attributes and then own entries follow.
#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct XattrHeader {
    /// Not used without its feature bit.
    pub(super) name_filter: U32,
    pub(super) shared_count: u8,
    pub(super) reserved: [u8; 7],
}

/// Length of [`XattrHeader`].
pub(super) const XATTR_HEADER_SIZE: u64 = 12;
const _: () = assert!(size_of::<XattrHeader>() == 12);

/// `struct erofs_xattr_entry`; name and value follow, padded to [`XATTR_ALIGN`].
#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct XattrEntry {
    /// Length of the name without the prefix that the index stands for.
    pub(super) name_length: u8,
    pub(super) name_index: u8,
    pub(super) value_size: U16,
}

/// Length of [`XattrEntry`].
pub(super) const XATTR_ENTRY_SIZE: u64 = 4;
const _: () = assert!(size_of::<XattrEntry>() == 4);
/// Entries start at multiples of this; it is also the unit of `xattr_count` and of shared ids.
pub(super) const XATTR_ALIGN: u64 = 4;
