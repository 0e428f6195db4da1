//! The directories of a store as a process of root may use them: found, or made, without following what other users can
//! put in their place.
//!
//! Every command that touches a store comes here first, before it reads, writes or connects to anything in it. What must
//! hold afterwards: the store and its `run` belong to this user and nobody else can write to them, so no name in them is
//! another user's; and no directory above lets another user replace them.
//!
//! The path is walked from the root, one name after the other and without following links. A link is followed only if it
//! belongs to this user, to root, or to who called sudo; a directory on the way must belong to one of them as well, and may
//! be writable for all only if it is sticky, as /tmp is. Groups are trusted as far as the directory's owner trusts them.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

/// Links on the way that are followed; the kernel follows as many (`MAXSYMLINKS`).
const LINKS_MAX: u32 = 40;
/// Name of the directory of locks, socket and log.
const RUN: &str = "run";
/// Permission bits: writable for group or others; sticky.
const WRITABLE_FOR_GROUP: u32 = 0o020;
const WRITABLE_FOR_ALL: u32 = 0o002;
const STICKY: u32 = 0o1000;

/// A store's directory and its `run`, open and checked.
#[derive(Debug)]
pub struct StoreDir {
    run: File,
}

impl StoreDir {
    /// Finds the store's directories; makes what is missing of them, private to this user.
    pub fn make(store: &Path) -> anyhow::Result<Self> {
        Self::find(store, true)?.context("a store that was just made is gone")
    }

    /// Finds them; `None` when there is no such store.
    pub fn open(store: &Path) -> anyhow::Result<Option<Self>> {
        Self::find(store, false)
    }

    fn find(store: &Path, make: bool) -> anyhow::Result<Option<Self>> {
        let path = std::path::absolute(store).context("store directory")?;
        let Some(dir) = Walk::new(make).run(&path)? else {
            return Ok(None);
        };
        own_alone(dir.as_fd(), &path)?;
        let run_path = path.join(RUN);
        let Some(run) =
            child(dir.as_fd(), OsStr::new(RUN), make).map_err(|error| denied(error, &run_path))?
        else {
            return Ok(None);
        };
        own_alone(run.as_fd(), &run_path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let run =
            rustix::fs::openat(&run, ".", flags, Mode::empty()).map_err(|error| denied(error, &run_path))?;
        Ok(Some(Self { run: run.into() }))
    }

    /// The open `run` directory.
    pub fn into_run(self) -> File {
        self.run
    }
}

/// Opens a file of a directory that [`StoreDir`] has checked, making it where it is missing; `flags` say for what. A link,
/// or anything else than a file of this user with this one name, is refused.
pub fn open_file(dir: BorrowedFd<'_>, name: &str, flags: OFlags) -> io::Result<File> {
    let flags =
        flags | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o600))?;
    let found = rustix::fs::fstat(&file)?;
    let regular = FileType::from_raw_mode(found.st_mode) == FileType::RegularFile;
    if !regular || found.st_uid != this_user() || found.st_nlink != 1 {
        return Err(io::Error::other(
            "not a file of this user with one name; remove it and see who can write there",
        ));
    }
    Ok(file.into())
}

fn this_user() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn denied(error: Errno, path: &Path) -> anyhow::Error {
    let shown = path.display();
    match error {
        Errno::ACCESS | Errno::PERM => {
            anyhow::anyhow!("{shown}: no permission; run peel as root, or choose another --store")
        }
        error => anyhow::Error::from(io::Error::from(error)).context(format!("{shown}: cannot be used")),
    }
}

/// Opens a name in a directory as a place, following no link; with `make`, a directory is made where nothing is.
fn child(dir: BorrowedFd<'_>, name: &OsStr, make: bool) -> Result<Option<OwnedFd>, Errno> {
    let open = || {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat2(dir, name, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS)
    };
    match open() {
        Err(Errno::NOENT) if make => {
            match rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error),
            }
            open().map(Some)
        }
        Err(Errno::NOENT) => Ok(None),
        found => found.map(Some),
    }
}

/// Checks that a directory belongs to this user and that nobody else can write to it.
fn own_alone(dir: BorrowedFd<'_>, path: &Path) -> anyhow::Result<()> {
    let found = look(dir).map_err(|error| denied(error, path))?;
    let shown = path.display();
    if FileType::from_raw_mode(found.st_mode) != FileType::Directory {
        bail!("{shown}: not a directory; choose another --store");
    }
    if found.st_uid != this_user() {
        bail!(
            "{shown}: belongs to user {}, not to user {}; choose another --store",
            found.st_uid,
            this_user()
        );
    }
    if found.st_mode & (WRITABLE_FOR_GROUP | WRITABLE_FOR_ALL) != 0 {
        // What stands in it may be anybody's.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let listing =
            rustix::fs::openat(dir, ".", flags, Mode::empty()).map_err(|error| denied(error, path))?;
        rustix::fs::fchmod(&listing, Mode::from_raw_mode(0o700)).map_err(|error| denied(error, path))?;
        let mut entries = rustix::fs::Dir::new(listing).map_err(|error| denied(error, path))?;
        let strange = entries.find_map(|entry| {
            let name = entry.ok()?.file_name().to_bytes().to_vec();
            (name != b"." && name != b"..").then_some(name)
        });
        if let Some(name) = strange {
            bail!(
                "{shown}: others could write to it, so {:?} in it may be anybody's; it is private from now on: see what is in \
                 it and try again, or choose another --store",
                String::from_utf8_lossy(&name)
            );
        }
    }
    Ok(())
}

fn look(place: BorrowedFd<'_>) -> Result<Stat, Errno> {
    rustix::fs::statat(place, "", AtFlags::EMPTY_PATH)
}

/// A walk down a path.
struct Walk {
    make: bool,
    /// Whose links and directories are trusted.
    trusted: [Option<u32>; 3],
    links: u32,
}

impl Walk {
    fn new(make: bool) -> Self {
        let this = this_user();
        // Whoever may run this by sudo can do as root what he likes anyway.
        let caller = std::env::var("SUDO_UID").ok().and_then(|uid| uid.parse().ok());
        Self {
            make,
            trusted: [Some(0), Some(this), caller.filter(|_| this == 0)],
            links: 0,
        }
    }

    fn trusts(&self, user: u32) -> bool {
        self.trusted.contains(&Some(user))
    }

    /// The directory at an absolute path, as a place; `None` when it is not there and is not to be made.
    fn run(mut self, path: &Path) -> anyhow::Result<Option<OwnedFd>> {
        let mut left: VecDeque<OsString> = names(path).collect();
        let mut at = PathBuf::from("/");
        let mut dir = root().map_err(|error| denied(error, &at))?;
        while let Some(name) = left.pop_front() {
            self.check_way(dir.as_fd(), &at)?;
            let next_path = at.join(&name);
            let Some(next) =
                child(dir.as_fd(), &name, self.make).map_err(|error| denied(error, &next_path))?
            else {
                return Ok(None);
            };
            let found = look(next.as_fd()).map_err(|error| denied(error, &next_path))?;
            if FileType::from_raw_mode(found.st_mode) != FileType::Symlink {
                at = if name == ".." {
                    at.parent().unwrap_or(&at).to_owned()
                } else {
                    next_path
                };
                dir = next;
                continue;
            }
            if !self.trusts(found.st_uid) {
                bail!(
                    "{}: a symbolic link of user {}, which is not followed; choose another --store",
                    next_path.display(),
                    found.st_uid
                );
            }
            self.links += 1;
            if self.links > LINKS_MAX {
                return Err(denied(Errno::LOOP, &next_path));
            }
            let target = rustix::fs::readlinkat(&next, "", Vec::new())
                .map_err(|error| denied(error, &next_path))?
                .into_bytes();
            let target = PathBuf::from(OsString::from_vec(target));
            if target.is_absolute() {
                at = PathBuf::from("/");
                dir = root().map_err(|error| denied(error, &at))?;
            }
            for name in names(&target).collect::<Vec<_>>().into_iter().rev() {
                left.push_front(name);
            }
        }
        Ok(Some(dir))
    }

    /// Checks that nobody else can replace what stands in a directory on the way.
    fn check_way(&self, dir: BorrowedFd<'_>, path: &Path) -> anyhow::Result<()> {
        let found = look(dir).map_err(|error| denied(error, path))?;
        let shown = path.display();
        if !self.trusts(found.st_uid) {
            bail!(
                "{shown}: belongs to user {}, who could replace the store below it; choose another --store",
                found.st_uid
            );
        }
        if found.st_mode & WRITABLE_FOR_ALL != 0 && found.st_mode & STICKY == 0 {
            bail!(
                "{shown}: everybody can write to it and could replace the store below it; make it sticky (chmod +t), or choose \
                 another --store"
            );
        }
        Ok(())
    }
}

fn root() -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open("/", flags, Mode::empty())
}

/// The names of a path, `..` among them.
fn names(path: &Path) -> impl Iterator<Item = OsString> + '_ {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use std::fs::{self, DirBuilder, Permissions};
    use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown, symlink};

    use super::*;

    /// Somebody else.
    const OTHER: u32 = 65_534;

    fn refused(store: &Path) -> String {
        let opened = StoreDir::open(store).unwrap_err().to_string();
        assert_eq!(StoreDir::make(store).unwrap_err().to_string(), opened);
        opened
    }

    #[test]
    fn a_store_is_made_private_and_found_again() {
        let root = tempfile::tempdir().unwrap();
        let store = root.path().join("a/b/store");
        assert!(StoreDir::open(&store).unwrap().is_none());
        StoreDir::make(&store).unwrap();
        for path in [store.clone(), store.join("run"), root.path().join("a")] {
            assert_eq!(
                fs::metadata(&path).unwrap().mode() & 0o7777,
                0o700,
                "{}",
                path.display()
            );
        }
        assert!(StoreDir::open(&store).unwrap().is_some());
        // Links of this user, with and without `..` in them, are followed.
        symlink("a/../a/b", root.path().join("link")).unwrap();
        symlink(root.path().join("link"), root.path().join("again")).unwrap();
        assert!(
            StoreDir::open(&root.path().join("again/store"))
                .unwrap()
                .is_some()
        );
        symlink("loop", root.path().join("loop")).unwrap();
        assert!(refused(&root.path().join("loop/store")).contains("loop"));
    }

    #[test]
    fn what_is_another_users_is_refused_before_a_write() {
        let root = tempfile::tempdir().unwrap();
        let aim = root.path().join("aim");
        DirBuilder::new().mode(0o700).create(&aim).unwrap();
        let theirs = |name: &str| {
            let path = root.path().join(name);
            fs::create_dir(&path).unwrap();
            chown(&path, Some(OTHER), None).unwrap();
            path
        };
        // The store itself, a directory above it, a link to it.
        let store = theirs("store");
        fs::create_dir(store.join("run")).unwrap();
        symlink(aim.join("file"), store.join("run/daemon.log")).unwrap();
        assert!(refused(&store).contains("belongs to user 65534"));
        let above = theirs("above");
        assert!(refused(&above.join("store")).contains("could replace"));
        assert!(!above.join("store").exists());
        let link = root.path().join("link");
        symlink(&aim, &link).unwrap();
        std::os::unix::fs::lchown(&link, Some(OTHER), None).unwrap();
        assert!(refused(&link).contains("symbolic link of user 65534"));
        // Its `run`: a directory of another user's, a link.
        for (name, prepare) in [
            (
                "r1",
                (|run, _| {
                    fs::create_dir(run).unwrap();
                    chown(run, Some(OTHER), None).unwrap();
                }) as fn(&Path, &Path),
            ),
            ("r2", |run, aim| symlink(aim, run).unwrap()),
        ] {
            let store = root.path().join(name);
            DirBuilder::new().mode(0o700).create(&store).unwrap();
            prepare(&store.join("run"), &aim);
            refused(&store);
        }
        assert_eq!(fs::read_dir(&aim).unwrap().count(), 0);
    }

    #[test]
    fn directories_that_others_can_write() {
        let root = tempfile::tempdir().unwrap();
        let open = root.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, Permissions::from_mode(0o777)).unwrap();
        assert!(refused(&open.join("store")).contains("everybody can write"));
        fs::set_permissions(&open, Permissions::from_mode(0o1777)).unwrap();
        StoreDir::make(&open.join("store")).unwrap();
        // A store that is empty becomes private, one with something in it may hold anybody's.
        let empty = root.path().join("empty");
        fs::create_dir(&empty).unwrap();
        fs::set_permissions(&empty, Permissions::from_mode(0o777)).unwrap();
        StoreDir::make(&empty).unwrap();
        assert_eq!(fs::metadata(&empty).unwrap().mode() & 0o7777, 0o700);
        let planted = root.path().join("planted");
        fs::create_dir(&planted).unwrap();
        symlink("/", planted.join("run")).unwrap();
        fs::set_permissions(&planted, Permissions::from_mode(0o777)).unwrap();
        assert!(
            StoreDir::make(&planted)
                .unwrap_err()
                .to_string()
                .contains("may be anybody's")
        );
    }

    #[test]
    fn only_plain_files_are_opened() {
        let root = tempfile::tempdir().unwrap();
        let run = StoreDir::make(&root.path().join("store")).unwrap().into_run();
        let dir = root.path().join("store/run");
        let open = |name| open_file(run.as_fd(), name, OFlags::WRONLY);
        open("new").unwrap();
        open("new").unwrap();
        let aim = root.path().join("aim");
        symlink(&aim, dir.join("link")).unwrap();
        fs::hard_link(dir.join("new"), dir.join("second")).unwrap();
        rustix::fs::mknodat(&run, "pipe", FileType::Fifo, Mode::RUSR, 0).unwrap();
        for name in ["link", "second", "pipe"] {
            assert!(open(name).is_err(), "{name}");
        }
        assert!(!aim.exists());
    }
}
