//! The image as the kernel sees it: mounted from a file, detached, so that nothing can be left behind.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use peel_image::tree::{InodeId, InodeKind, Tree};
use rustix::buffer::spare_capacity;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

use super::build::{TreeBuilder, expected_xattrs, metadata};
use super::image_of;
use crate::Store;

fn mount(kind: &str, options: impl FnOnce(&OwnedFd) -> rustix::io::Result<()>) -> OwnedFd {
    let create = || -> rustix::io::Result<OwnedFd> {
        let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        options(&context)?;
        rustix::mount::fsconfig_create(context.as_fd())?;
        rustix::mount::fsmount(
            context.as_fd(),
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::empty(),
        )
    };
    create().unwrap_or_else(|error| panic!("cannot mount {kind} (needs root and Linux 6.15): {error}"))
}

fn mount_image(path: &Path) -> OwnedFd {
    mount("erofs", |context| {
        rustix::mount::fsconfig_set_string(context.as_fd(), "source", path)?;
        rustix::mount::fsconfig_set_flag(context.as_fd(), "ro")
    })
}

/// A path that leads into the mount.
fn root_of(mount: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/.", mount.as_raw_fd()))
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = Vec::with_capacity(64 << 10);
    rustix::fs::llistxattr(path, spare_capacity(&mut names)).unwrap();
    names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .filter_map(|name| {
            let mut value = Vec::with_capacity(64 << 10);
            match rustix::fs::lgetxattr(path, OsStr::from_bytes(name), spare_capacity(&mut value)) {
                Ok(_) => Some((name.to_vec(), value)),
                Err(Errno::NODATA) => None,
                Err(error) => panic!("{path:?}: {:?}: {error}", String::from_utf8_lossy(name)),
            }
        })
        .collect()
}

/// Walks tree and mount together.
pub(super) fn compare(tree: &Tree, image: &[u8]) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("image");
    fs::write(&file, image).unwrap();
    let mount = mount_image(&file);
    let mut numbers: HashMap<InodeId, u64> = HashMap::new();
    let mut stack = vec![(InodeId(0), root_of(&mount))];
    while let Some((id, path)) = stack.pop() {
        let want = &tree.inodes[usize::try_from(id.0).unwrap()];
        let got = fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
        if let Some(known) = numbers.insert(id, got.ino()) {
            assert_eq!(known, got.ino(), "{path:?}: hard links must share a number");
            continue;
        }
        let metadata = &want.metadata;
        assert_eq!(got.mode() & 0o7777, u32::from(metadata.mode), "{path:?}: mode");
        assert_eq!(
            (got.uid(), got.gid()),
            (metadata.uid, metadata.gid),
            "{path:?}: owner"
        );
        let time = (got.mtime(), got.mtime_nsec());
        assert_eq!(
            time,
            (metadata.mtime, metadata.mtime_nanoseconds.into()),
            "{path:?}: mtime"
        );
        assert_eq!(got.nlink(), u64::from(want.links), "{path:?}: links");
        let kind = got.file_type();
        let mut expected = expected_xattrs(want);
        if !kind.is_file() && !kind.is_dir() {
            // xattr(7): user attributes exist for files and directories only.
            expected.retain(|name, _| !name.starts_with(b"user."));
        }
        assert_eq!(xattrs(&path), expected, "{path:?}: xattrs");
        match &want.kind {
            InodeKind::Directory(children) => {
                let mut listed = BTreeMap::new();
                for entry in fs::read_dir(&path).unwrap() {
                    let entry = entry.unwrap();
                    listed.insert(entry.file_name().into_vec(), entry.file_type().unwrap());
                }
                assert_eq!(listed.len(), children.len(), "{path:?}: entries");
                for (name, child) in children {
                    let listed = listed
                        .get(&**name)
                        .unwrap_or_else(|| panic!("{path:?}: lacks {name:?}"));
                    let child_path = path.join(OsStr::from_bytes(name));
                    let found = fs::symlink_metadata(&child_path).unwrap().file_type();
                    assert_eq!(*listed, found, "{child_path:?}: type in the directory");
                    stack.push((*child, child_path));
                }
                assert!(!path.join("no such name").exists(), "{path:?}");
            }
            InodeKind::Regular(file) => {
                assert!(kind.is_file(), "{path:?}");
                assert_eq!(got.len(), file.size, "{path:?}: size");
            }
            InodeKind::Symlink(target) => {
                let found = fs::read_link(&path).unwrap();
                assert_eq!(found.as_os_str().as_bytes(), &**target, "{path:?}: target");
            }
            InodeKind::CharDevice(device) | InodeKind::BlockDevice(device) => {
                let block = matches!(want.kind, InodeKind::BlockDevice(_));
                assert!(
                    if block {
                        kind.is_block_device()
                    } else {
                        kind.is_char_device()
                    },
                    "{path:?}"
                );
                let number = (rustix::fs::major(got.rdev()), rustix::fs::minor(got.rdev()));
                assert_eq!(number, (device.major, device.minor), "{path:?}: device");
            }
            InodeKind::Fifo => assert!(kind.is_fifo(), "{path:?}"),
        }
    }
    assert_eq!(numbers.len(), tree.inodes.len(), "every inode is reachable");
}

/// EROFS image over the store's objects: content, copy-up, an absent object, the image's own overlay attributes.
pub(super) fn overlay() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("store")).unwrap();
    store.lock().unwrap();
    let content = b"hello from an object\n".repeat(1000);
    let object = peel_image::Digest::of(&content);
    store.add_verified(&object, &content).unwrap();
    store.settle().unwrap();

    let mut tree = TreeBuilder::new();
    let mut marked = metadata(0o640);
    marked.xattrs.insert(
        b"trusted.overlay.opaque".as_slice().into(),
        b"y".as_slice().into(),
    );
    let size = content.len() as u64;
    tree.content("present", marked, size, object);
    tree.content("same", metadata(0o755), size, object);
    tree.file("absent", metadata(0o644), 10);
    tree.file("empty", metadata(0o644), 0);
    let image = directory.path().join("image");
    fs::write(&image, image_of(&tree.finish())).unwrap();

    let open = |name: &str| {
        let path = directory.path().join(name);
        fs::create_dir_all(&path).unwrap();
        rustix::fs::open(
            &path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .unwrap()
    };
    let (upper, work, lower) = (open("upper"), open("work"), mount_image(&image));
    let mount = mount("overlay", |context| {
        let context = context.as_fd();
        rustix::mount::fsconfig_set_fd(context, "lowerdir+", lower.as_fd())?;
        rustix::mount::fsconfig_set_fd(context, "datadir+", store.objects_fd())?;
        rustix::mount::fsconfig_set_fd(context, "upperdir", upper.as_fd())?;
        rustix::mount::fsconfig_set_fd(context, "workdir", work.as_fd())?;
        rustix::mount::fsconfig_set_string(context, "metacopy", "on")?;
        rustix::mount::fsconfig_set_string(context, "redirect_dir", "on")
    });
    let root = root_of(&mount);
    assert_eq!(fs::read(root.join("present")).unwrap(), content);
    assert_eq!(fs::read(root.join("same")).unwrap(), content);
    assert_eq!(fs::read(root.join("empty")).unwrap(), b"");
    assert_eq!(fs::metadata(root.join("present")).unwrap().mode() & 0o7777, 0o640);
    let shown = xattrs(&root.join("present"));
    let own = shown.get(b"trusted.overlay.opaque".as_slice());
    assert_eq!(own.map(Vec::as_slice), Some(b"y".as_slice()));
    assert_eq!(shown.len(), 1, "overlayfs hides its own: {shown:?}");
    // The error differs between kernels; what matters is that no byte comes.
    assert!(fs::File::open(root.join("absent")).is_err());

    fs::write(root.join("same"), b"changed").unwrap();
    assert_eq!(fs::read(root.join("same")).unwrap(), b"changed");
    assert_eq!(fs::read(root.join("present")).unwrap(), content);
    let mut file = fs::File::options()
        .append(true)
        .open(root.join("present"))
        .unwrap();
    std::io::Write::write_all(&mut file, b"more").unwrap();
    assert_eq!(
        fs::read(root.join("present")).unwrap(),
        [content.as_slice(), b"more"].concat()
    );
    assert_eq!(store.verify_object(&object).unwrap(), crate::Verdict::Intact);
}
