//! The container's own cgroup in the v2 hierarchy, where this host lets us have one.
//!
//! Made and removed by the supervisor in [`crate::init`]; [`crate::container`] removes it when the supervisor itself was
//! killed. It sets no limits; it groups the container's processes for whoever looks. The maker holds a shared lock on the
//! directory while it lives, so what a killed one left can be told apart and is removed by the next ([`sweep`]).
//!
//! Between mkdir(2) and the lock a new group looks like one that a killed maker left. The maker therefore looks, once it has
//! the lock, whether the group is still there, and begins anew under another name if it is not; a sweep looks in the same
//! way before it removes, so that it never removes another group than the one that it locked.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

/// Start of our cgroups' names.
pub(crate) const PREFIX: &str = "peel-";
/// How long to wait for the kernel to take the last dead process out of a group.
const REMOVE_DEADLINE: Duration = Duration::from_secs(2);
/// How long to try to make a group that sweeps of other processes take away.
const MAKE_DEADLINE: Duration = Duration::from_secs(2);
/// Most left-over groups that are looked at in one go.
const SWEEP_MAX: usize = 256;

/// A cgroup that exists while this does.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
}

impl Cgroup {
    /// Makes the group `name` below the caller's own.
    pub(crate) fn make(name: &str) -> Result<Self, String> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|error| error.to_string())?;
        let own = fs::read_to_string("/proc/self/cgroup").map_err(|error| error.to_string())?;
        let parent = own_directory(&mounts, &own).ok_or("no cgroup v2 hierarchy is mounted")?;
        sweep(&parent);
        Self::make_in(&parent, name).map_err(|error| format!("{}: {error}", parent.join(name).display()))
    }

    /// Makes a group with a name that begins with `name`.
    fn make_in(parent: &Path, name: &str) -> io::Result<Self> {
        let deadline = Instant::now() + MAKE_DEADLINE;
        let mut path = parent.join(name);
        // No name twice: what is removed by its name must be what was looked at.
        for number in 1_u32.. {
            match fs::create_dir(&path) {
                Ok(()) => match open_locked(&path, FlockOperation::NonBlockingLockShared) {
                    Ok(Some(directory)) => return Ok(Self { path, directory }),
                    // A sweep has it, and removes it.
                    Ok(None) => {}
                    Err(error) => {
                        // Nothing is in it yet, so this cannot fail for a reason that another try would cure.
                        let _unused = fs::remove_dir(&path);
                        return Err(error);
                    }
                },
                // The same process id in another pid namespace, or before.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
            if Instant::now() >= deadline {
                break;
            }
            path.set_file_name(format!("{name}-{number}"));
        }
        Err(io::Error::other(format!(
            "it was taken away again and again for {} s",
            MAKE_DEADLINE.as_secs()
        )))
    }

    /// Its directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Its directory, for clone3.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Removes it once its last process is gone.
    pub(crate) fn remove(self) -> io::Result<()> {
        remove(&self.path)
    }
}

/// Removes a cgroup whose processes have ended; one that does not exist is no error.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let deadline = Instant::now() + REMOVE_DEADLINE;
    loop {
        match fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            // The group stays busy for a moment after its last process was waited for.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(1));
            }
            result => return result,
        }
    }
}

/// Opens a directory and locks it without waiting; `None` when somebody else has it, or when it is no longer what `path`
/// names.
fn open_locked(path: &Path, lock: FlockOperation) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let locked = (|| -> Result<_, Errno> {
        let directory = rustix::fs::open(path, flags, Mode::empty())?;
        rustix::fs::flock(&directory, lock)?;
        let (opened, named) = (rustix::fs::fstat(&directory)?, rustix::fs::stat(path)?);
        let same = (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino);
        Ok(same.then_some(directory))
    })();
    match locked {
        Err(Errno::NOENT | Errno::WOULDBLOCK) => Ok(None),
        locked => Ok(locked?),
    }
}

/// Removes what killed makers left: groups of ours that are empty and that nobody holds.
fn sweep(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    let ours = entries.flatten().filter(|entry| {
        entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(PREFIX.as_bytes())
    });
    for entry in ours.take(SWEEP_MAX) {
        // The lock is held until the group is gone.
        if let Ok(Some(_locked)) = open_locked(&entry.path(), FlockOperation::NonBlockingLockExclusive) {
            // Refused while processes are in it, which is what is wanted.
            let _unused = fs::remove_dir(entry.path());
        }
    }
}

/// The directory of the caller's own group, from the contents of `/proc/self/mountinfo` and `/proc/self/cgroup`.
fn own_directory(mountinfo: &str, cgroup: &str) -> Option<PathBuf> {
    let own = cgroup.lines().find_map(|line| line.strip_prefix("0::"))?;
    mountinfo.lines().find_map(|line| {
        // Fields by proc(5): id, parent, device, root, mount point, options, optional fields, "-", type, ...
        let (mount, source) = line.split_once(" - ")?;
        if source.split(' ').next() != Some("cgroup2") {
            return None;
        }
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let below = own.strip_prefix(root.trim_end_matches('/'))?;
        if below.split('/').any(|component| component == "..") {
            return None;
        }
        Some(Path::new(point).join(below.trim_start_matches('/')))
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::{Cgroup, PREFIX, own_directory, sweep};

    #[test]
    fn a_group_is_made_while_others_sweep() {
        // Any directory does: what matters are mkdir, rmdir and locks.
        let parent = tempfile::tempdir().unwrap();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        sweep(parent.path());
                    }
                });
            }
            let makers: Vec<_> = (0..4)
                .map(|maker| {
                    let parent = parent.path();
                    scope.spawn(move || {
                        for number in 0..200 {
                            let group =
                                Cgroup::make_in(parent, &format!("{PREFIX}{maker}-{number}")).unwrap();
                            assert!(group.path().is_dir(), "{}", group.path().display());
                            group.remove().unwrap();
                        }
                    })
                })
                .collect();
            let made: Vec<_> = makers.into_iter().map(thread::ScopedJoinHandle::join).collect();
            done.store(true, Ordering::Relaxed);
            assert!(made.iter().all(Result::is_ok));
        });
        // What a killed maker left goes with the next sweep, what lives stays, and a name that is taken is no obstacle.
        fs::create_dir(parent.path().join(format!("{PREFIX}dead"))).unwrap();
        let first = Cgroup::make_in(parent.path(), &format!("{PREFIX}same")).unwrap();
        let second = Cgroup::make_in(parent.path(), &format!("{PREFIX}same")).unwrap();
        sweep(parent.path());
        assert!(first.path().is_dir() && second.path().is_dir() && first.path() != second.path());
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 2);
    }

    #[test]
    fn own_directory_of_common_layouts() {
        let unified = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let inner = "30 23 0:26 /a/b /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        for (mounts, own, expected) in [
            (
                unified,
                "0::/user.slice/x.scope\n",
                Some("/sys/fs/cgroup/user.slice/x.scope"),
            ),
            (unified, "0::/\n", Some("/sys/fs/cgroup")),
            (hybrid, "5:devices:/\n0::/x\n", Some("/sys/fs/cgroup/unified/x")),
            (inner, "0::/a/b/c\n", Some("/sys/fs/cgroup/c")),
            (unified, "0::/../x\n", None),
            (hybrid, "5:devices:/\n", None),
            ("", "0::/\n", None),
        ] {
            let got = own_directory(mounts, own);
            assert_eq!(got, expected.map(PathBuf::from), "{mounts} {own}");
        }
    }
}
