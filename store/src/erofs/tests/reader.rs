//! The image as the `erofs-rs` reader sees it.

use std::collections::{BTreeMap, HashMap};

use erofs_rs::EroFS;
use erofs_rs::backend::SliceImage;
use peel_image::tree::{InodeId, InodeKind, Tree};

use super::build::expected_xattrs;

/// Walks tree and image together.
pub(super) fn compare(tree: &Tree, image: &[u8]) {
    let fs = EroFS::new(SliceImage::new(image)).unwrap();
    let root = fs.super_block().root_inode_id();
    let mut nodes: HashMap<InodeId, u64> = HashMap::new();
    let mut stack = vec![(InodeId(0), root, String::from("/"))];
    while let Some((id, node, path)) = stack.pop() {
        if let Some(known) = nodes.insert(id, node) {
            assert_eq!(known, node, "{path}: hard links must share a node");
            continue;
        }
        let want = &tree.inodes[usize::try_from(id.0).unwrap()];
        let got = fs.get_inode(node).unwrap();
        let metadata = &want.metadata;
        let mode = std::os::unix::fs::PermissionsExt::mode(&got.permissions());
        assert_eq!(mode & 0o7777, u32::from(metadata.mode), "{path}: mode");
        assert_eq!(
            (got.uid(), got.gid()),
            (metadata.uid, metadata.gid),
            "{path}: owner"
        );
        assert_eq!(
            got.modified_unix(),
            (metadata.mtime, metadata.mtime_nanoseconds),
            "{path}: mtime"
        );
        assert_eq!(got.nlink(), want.links, "{path}: links");
        assert_eq!(
            fs.xattrs_inode(got).unwrap(),
            expected_xattrs(want),
            "{path}: xattrs"
        );
        match &want.kind {
            InodeKind::Directory(children) => {
                assert!(got.is_dir(), "{path}");
                let mut listed = BTreeMap::new();
                let mut order = Vec::new();
                for entry in fs.read_dir(&path).unwrap() {
                    let entry = entry.unwrap();
                    order.push(entry.dir_entry.file_name().to_vec());
                    listed.insert(entry.dir_entry.file_name().to_vec(), entry.dir_entry.nid());
                }
                assert!(order.is_sorted(), "{path}: order");
                assert_eq!(order.len(), children.len(), "{path}: entries");
                for (name, child) in children {
                    let node = *listed
                        .get(&**name)
                        .unwrap_or_else(|| panic!("{path}: lacks {name:?}"));
                    let name = String::from_utf8(name.to_vec()).unwrap();
                    stack.push((*child, node, format!("{}/{name}", path.trim_end_matches('/'))));
                }
            }
            InodeKind::Regular(file) => {
                assert!(got.is_file(), "{path}");
                assert_eq!(got.data_size(), file.size, "{path}: size");
                let mut bytes = [1; 16];
                let count = fs.open_inode_file(got).unwrap().read_at(&mut bytes, 0).unwrap();
                assert_eq!(count as u64, file.size.min(16), "{path}: readable bytes");
                assert!(
                    bytes[..count].iter().all(|byte| *byte == 0),
                    "{path}: a hole is zeros"
                );
            }
            InodeKind::Symlink(target) => {
                assert_eq!(
                    fs.read_link_inode(got).unwrap().as_bytes(),
                    &**target,
                    "{path}: target"
                );
            }
            InodeKind::CharDevice(device) | InodeKind::BlockDevice(device) => {
                assert_eq!(got.device(), Some((device.major, device.minor)), "{path}: device");
            }
            InodeKind::Fifo => assert!(got.file_type().is_fifo(), "{path}"),
        }
    }
    assert_eq!(nodes.len(), tree.inodes.len(), "every inode is reachable");
}
