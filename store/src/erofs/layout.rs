//! The first pass: checks the tree against what the format can hold and gives every inode its place.

use peel_image::path::COMPONENT_MAX;
use peel_image::tree::{Inode, InodeId, InodeKind, Tree};

use super::directory::Names;
use super::format::{self, BLOCK_SIZE, CHUNK_BITS_MAX, INODE_SIZE, SLOT};
use super::xattrs::Xattrs;
use super::{Problem, format::XATTR_ALIGN};

/// Largest gap before an inode that is moved to the next block for its inline data's sake, in bytes. A larger one would
/// waste more than a block of its own does on average.
const GAP_MAX: u64 = BLOCK_SIZE / 2;

/// Longest target of a symbolic link that any system call takes (Linux `PATH_MAX` without the NUL).
const TARGET_MAX: usize = 4095;

/// Where an inode's data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Data {
    /// There is none.
    None,
    /// All of it behind the inode.
    Inline,
    /// In blocks from `start` on; with `tail`, the last part behind the inode.
    Blocks {
        /// First block.
        start: u32,
        /// Whether the last part is inline.
        tail: bool,
    },
    /// One chunk of `4096 << bits` bytes, a hole.
    Chunk {
        /// Chunk format field.
        bits: u8,
    },
}

/// Where one inode stands and how it is laid out.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// Position in the image, a multiple of [`SLOT`].
    pub(super) position: u64,
    /// Length of the attribute body in bytes, 0 without attributes.
    pub(super) xattr_size: u64,
    /// Length of the data by the inode.
    pub(super) size: u64,
    /// Where the data is.
    pub(super) data: Data,
    /// The directory above, for directories; the root is its own.
    pub(super) parent: InodeId,
}

/// Where everything stands.
pub(super) struct Plan<'a> {
    pub(super) places: Vec<Place>,
    pub(super) xattrs: Xattrs<'a>,
    /// First byte of the shared attributes.
    pub(super) shared_start: u64,
    /// The same as a block number.
    pub(super) shared_block: u32,
    /// First byte of the data blocks.
    pub(super) data_start: u64,
    /// Length of the image in bytes.
    pub(super) end: u64,
    /// The same in blocks.
    pub(super) blocks: u32,
}

impl<'a> Plan<'a> {
    pub(super) fn new(tree: &'a Tree) -> Result<Self, Problem> {
        let parents = parents(tree)?;
        let xattrs = Xattrs::new(tree)?;
        let mut places = Vec::with_capacity(tree.inodes.len());
        // Block 0 is the superblock's alone, so its checksum covers nothing that is not known yet.
        let mut position = BLOCK_SIZE;
        let mut data_blocks = 0;
        for (id, inode) in inodes(tree) {
            let xattr_size = xattrs.size(id, inode)?;
            let header = INODE_SIZE + xattr_size;
            let parent = parents.get(index(id)).copied().unwrap_or(InodeId(0));
            let (size, whole, rest) = data_size(id, inode, parent)?;
            let mut place = Place {
                position,
                xattr_size,
                size,
                data: Data::None,
                parent,
            };
            let mut end = header;
            if let InodeKind::Regular(_) = inode.kind {
                if size > 0 {
                    place.data = Data::Chunk {
                        bits: chunk_bits(id, size)?,
                    };
                    end = header.next_multiple_of(XATTR_ALIGN) + size_of_val(&format::HOLE) as u64;
                }
            } else if size > 0 {
                let inline = rest > 0 && fits_inline(&mut place.position, header + rest);
                let blocks = if inline {
                    whole
                } else {
                    whole + u64::from(rest > 0)
                };
                if inline {
                    end += rest;
                }
                place.data = if blocks == 0 {
                    Data::Inline
                } else {
                    Data::Blocks {
                        // Relative to the first data block until that is known.
                        start: u32::try_from(data_blocks).map_err(|_| too_large(id))?,
                        tail: inline,
                    }
                };
                data_blocks += blocks;
            }
            position = (place.position + end).next_multiple_of(SLOT);
            places.push(place);
        }
        let root = InodeId(0);
        let shared_start = position.next_multiple_of(BLOCK_SIZE);
        let data_start = (shared_start + xattrs.shared_size()).next_multiple_of(BLOCK_SIZE);
        let end = data_start + data_blocks * BLOCK_SIZE;
        let block = |position: u64| u32::try_from(position / BLOCK_SIZE).map_err(|_| too_large(root));
        let first = block(data_start)?;
        let blocks = block(end)?;
        for place in &mut places {
            if let Data::Blocks { start, .. } = &mut place.data {
                *start += first;
            }
        }
        Ok(Self {
            places,
            xattrs,
            shared_start,
            shared_block: block(shared_start)?,
            data_start,
            end,
            blocks,
        })
    }

    /// Node id of the root; the first inode stands right behind the superblock.
    pub(super) fn root_node(&self) -> u16 {
        const ROOT: u16 = 128;
        const _: () = assert!(BLOCK_SIZE / SLOT == 128);
        debug_assert_eq!(
            self.places.first().map(|place| place.position / SLOT),
            Some(u64::from(ROOT))
        );
        ROOT
    }

    /// Node id and type of an inode, for directory entries.
    pub(super) fn target(&self, tree: &Tree, id: InodeId) -> (u64, u8) {
        let node = self
            .places
            .get(index(id))
            .map_or(0, |place| place.position / SLOT);
        let file_type = match tree.inodes.get(index(id)).map(|inode| &inode.kind) {
            Some(InodeKind::Directory(_)) => format::FT_DIRECTORY,
            Some(InodeKind::Regular(_)) => format::FT_REGULAR,
            Some(InodeKind::Symlink(_)) => format::FT_SYMLINK,
            Some(InodeKind::CharDevice(_)) => format::FT_CHAR_DEVICE,
            Some(InodeKind::BlockDevice(_)) => format::FT_BLOCK_DEVICE,
            Some(InodeKind::Fifo) => format::FT_FIFO,
            None => 0,
        };
        (node, file_type)
    }
}

fn index(id: InodeId) -> usize {
    usize::try_from(id.0).unwrap_or(usize::MAX)
}

fn inodes(tree: &Tree) -> impl Iterator<Item = (InodeId, &Inode)> {
    (0..).map(InodeId).zip(&tree.inodes)
}

fn too_large(id: InodeId) -> Problem {
    Problem::new(id, "the image would exceed 16 TiB")
}

/// The directory above each inode (of several names of a file, any). Also checks that this is a tree: a root
/// directory, names that a file system can hold, no directory with two names or above itself.
fn parents(tree: &Tree) -> Result<Vec<InodeId>, Problem> {
    let root = InodeId(0);
    if !matches!(
        tree.inodes.first().map(|inode| &inode.kind),
        Some(InodeKind::Directory(_))
    ) {
        return Err(Problem::new(root, "the root is not a directory"));
    }
    if u32::try_from(tree.inodes.len()).is_err() {
        return Err(Problem::new(root, "there are more inodes than node numbers"));
    }
    let mut parents: Vec<Option<InodeId>> = vec![None; tree.inodes.len()];
    for (id, inode) in inodes(tree) {
        let InodeKind::Directory(children) = &inode.kind else {
            continue;
        };
        for (name, child) in children {
            check_name(id, name)?;
            let target = tree.inodes.get(index(*child));
            let is_directory = match target.map(|target| &target.kind) {
                Some(InodeKind::Directory(_)) => true,
                Some(_) => false,
                None => {
                    return Err(Problem::new(
                        id,
                        format!("it has a child {} that does not exist", child.0),
                    ));
                }
            };
            let known = parents.get_mut(index(*child));
            if is_directory && (*child <= id || known.as_ref().is_some_and(|known| known.is_some())) {
                return Err(Problem::new(
                    *child,
                    "a directory has two names or contains itself",
                ));
            }
            if let Some(known) = known {
                *known = Some(id);
            }
        }
    }
    Ok(parents.into_iter().map(|parent| parent.unwrap_or(root)).collect())
}

fn check_name(directory: InodeId, name: &[u8]) -> Result<(), Problem> {
    let problem = match name {
        b"" | b"." | b".." => "is reserved",
        _ if name.len() > COMPONENT_MAX => "has more than 255 bytes",
        _ if name.contains(&b'/') || name.contains(&0) => "holds a slash or a NUL byte",
        _ => return Ok(()),
    };
    let shown = String::from_utf8_lossy(name.get(..name.len().min(80)).unwrap_or(name)).into_owned();
    Err(Problem::new(
        directory,
        format!("the name {shown:?} in it {problem}"),
    ))
}

/// Length of an inode's data, and of it the whole blocks and the bytes after them. Checks the inode's other fields too.
fn data_size(id: InodeId, inode: &Inode, parent: InodeId) -> Result<(u64, u64, u64), Problem> {
    if inode.metadata.mtime_nanoseconds >= 1_000_000_000 {
        return Err(Problem::new(
            id,
            "its modification time has more nanoseconds than a second",
        ));
    }
    match &inode.kind {
        InodeKind::Directory(children) => {
            let (whole, last) = Names::new(children, id, parent).size();
            let size = whole * BLOCK_SIZE + last;
            Ok((size, size / BLOCK_SIZE, size % BLOCK_SIZE))
        }
        InodeKind::Symlink(target) => {
            if target.is_empty() || target.len() > TARGET_MAX || target.contains(&0) {
                let length = target.len();
                return Err(Problem::new(
                    id,
                    format!(
                        "its link target of {length} bytes is empty, longer than {TARGET_MAX} or holds a NUL byte"
                    ),
                ));
            }
            let size = target.len() as u64;
            Ok((size, 0, size))
        }
        InodeKind::Regular(file) => Ok((file.size, 0, 0)),
        InodeKind::CharDevice(device) | InodeKind::BlockDevice(device) => {
            if device.major >= 1 << 12 || device.minor >= 1 << 20 {
                return Err(Problem::new(
                    id,
                    format!(
                        "device {}:{} is beyond what Linux can name",
                        device.major, device.minor
                    ),
                ));
            }
            Ok((0, 0, 0))
        }
        InodeKind::Fifo => Ok((0, 0, 0)),
    }
}

/// Size field of the smallest chunk that covers a file of `size` bytes; then one chunk entry is enough.
fn chunk_bits(id: InodeId, size: u64) -> Result<u8, Problem> {
    (0..=CHUNK_BITS_MAX)
        .find(|bits| BLOCK_SIZE << bits >= size)
        .ok_or_else(|| Problem::new(id, format!("its size of {size} bytes is beyond 8 TiB")))
}

/// Whether an inode of `length` bytes with its inline data stands in one block, perhaps after a gap. The kernel only
/// wants the data unbroken, but reads short links fast only when the inode is in the same block.
fn fits_inline(position: &mut u64, length: u64) -> bool {
    if length > BLOCK_SIZE {
        return false;
    }
    let next = position.next_multiple_of(BLOCK_SIZE);
    if *position + length <= next || *position == next {
        return true;
    }
    if next - *position > GAP_MAX {
        return false;
    }
    *position = next;
    true
}
