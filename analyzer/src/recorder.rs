//! The recorder: one thread that takes events out of the kernel's queue as they come.
//!
//! Called by `peel optimize`. Each event comes with an open file. The first of a file (by device and inode number) finds
//! its path; all later ones only set a bit, so a program that reads much costs one `fstat` per event. At most
//! [`BATCH`] event files are open at a time, whatever the limit of descriptors.
//!
//! A path is what the kernel calls the file in the mount that it was opened through. That can be a mount in another
//! namespace, or of a directory further down, so a path is taken only when the root has the same file under it; files
//! that are left over are searched for in the root at the end.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use peel_image::path::EntryPath;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, fstat, openat, statat};
use rustix::io::Errno;

use crate::event::{METADATA_LEN, events};
use crate::{Access, Error, sys};

/// Events that are read at once, each with an open file.
const BATCH: usize = 256;
/// Most different files of a record. An image of 100,000 files is large; each costs about 200 bytes here.
const FILES_MAX: usize = 2_000_000;
/// What the kernel appends to the path of a file that was removed.
const DELETED: &[u8] = b" (deleted)";
/// Deepest directory that the search for left-over files enters.
const DEPTH_MAX: usize = 256;

/// Records every open, access and exec below one mounted root, whichever process does it.
#[derive(Debug)]
pub struct Recorder {
    thread: JoinHandle<Result<Vec<Access>, Error>>,
    stop: OwnedFd,
    seen: Arc<AtomicUsize>,
}

impl Recorder {
    /// Marks the file system of `root` (the container's overlay). Call it before the first instruction runs. The recorder
    /// keeps the mount alive until [`Recorder::finish`].
    pub fn start(root: BorrowedFd<'_>) -> Result<Self, Error> {
        let failed = |step| move |source| Error::Start { step, source };
        let root = root
            .try_clone_to_owned()
            .map_err(failed("keeping the root open"))?;
        let group = sys::new_group().map_err(failed("making a fanotify group"))?;
        let mask = libc::FAN_OPEN | libc::FAN_ACCESS | libc::FAN_OPEN_EXEC;
        sys::mark_file_system(group.as_fd(), mask, root.as_fd())
            .map_err(failed("marking the container's file system"))?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(io::Error::from)
            .map_err(failed("making an event"))?;
        let stopped = stop.try_clone().map_err(failed("making an event"))?;
        let seen = Arc::new(AtomicUsize::new(0));
        let log = Log {
            begin: Instant::now(),
            root,
            files: HashMap::new(),
            order: Vec::new(),
            seen: Arc::clone(&seen),
        };
        let thread = thread::Builder::new()
            .name("peel-recorder".to_owned())
            .spawn(move || log.run(&group, &stopped))
            .map_err(failed("starting a thread"))?;
        Ok(Self { thread, stop, seen })
    }

    /// How many different files were touched until now, for a progress display.
    pub fn seen(&self) -> usize {
        self.seen.load(Ordering::Relaxed)
    }

    /// Ends the recording and returns regular files in the order of their first access. A queue overflow is an error.
    /// Everything that was accessed before the call is in it.
    pub fn finish(self) -> Result<Vec<Access>, Error> {
        rustix::io::write(&self.stop, &1_u64.to_ne_bytes()).map_err(|error| Error::Read {
            step: "stopping",
            source: error.into(),
        })?;
        self.thread.join().unwrap_or(Err(Error::Stopped))
    }
}

/// A file by what `fstat` says of it; an overlay's numbers are unique and stay the same while it is mounted.
type Identity = (u64, u64);

/// What is known of a file.
#[derive(Debug)]
struct Found {
    /// `None` when it is still to be searched for.
    path: Option<EntryPath>,
    identity: Identity,
    at: Duration,
    executed: bool,
    read: bool,
}

struct Log {
    begin: Instant,
    root: OwnedFd,
    /// Place in `order` by identity.
    files: HashMap<Identity, usize>,
    order: Vec<Found>,
    seen: Arc<AtomicUsize>,
}

impl Log {
    /// Reads events until it is told to stop and the queue is empty.
    fn run(mut self, group: &OwnedFd, stop: &OwnedFd) -> Result<Vec<Access>, Error> {
        let mut buffer = vec![0; BATCH * METADATA_LEN];
        loop {
            // Looked at before the queue: what was queued before the stop is read after it.
            let mut fds = [
                PollFd::from_borrowed_fd(group.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Err(Errno::INTR) => continue,
                polled => polled.map_err(read_error("waiting"))?,
            };
            let stopped = !fds[1].revents().is_empty();
            self.drain(group, &mut buffer)?;
            if stopped {
                break;
            }
        }
        self.search()?;
        Ok(self.finish())
    }

    /// Empties the queue.
    fn drain(&mut self, group: &OwnedFd, buffer: &mut [u8]) -> Result<(), Error> {
        loop {
            let length = match rustix::io::read(group, &mut *buffer) {
                Err(Errno::AGAIN) | Ok(0) => return Ok(()),
                Err(Errno::INTR) => continue,
                // Where the kernel has no other way to say so, this is the file of one event that is gone.
                Err(error) if is_gone(error) => continue,
                length => length.map_err(read_error("reading events"))?,
            };
            let at = self.begin.elapsed();
            let at = Duration::from_micros(u64::try_from(at.as_micros()).unwrap_or(u64::MAX));
            let bytes = buffer.get(..length).unwrap_or_default();
            // All of the batch are taken over first, so that an error leaks no descriptor.
            let batch: Vec<_> = events(bytes)
                .map(|event| event.map(|event| (event, sys::event_file(event.fd))))
                .collect();
            for item in batch {
                let (event, file) = item?;
                if event.mask & libc::FAN_Q_OVERFLOW != 0 {
                    return Err(Error::Overflow);
                }
                match file {
                    Some(file) => self.note(&file, event.mask, at)?,
                    None => {
                        let errno = Errno::from_raw_os_error(event.fd.checked_neg().unwrap_or(0));
                        if !is_gone(errno) {
                            return Err(read_error("opening a file that was accessed")(errno));
                        }
                    }
                }
            }
        }
    }

    /// Notes one event.
    fn note(&mut self, file: &OwnedFd, mask: u64, at: Duration) -> Result<(), Error> {
        let stat = fstat(file).map_err(read_error("looking at a file that was accessed"))?;
        if !FileType::from_raw_mode(stat.st_mode).is_file() {
            return Ok(());
        }
        let identity = identity(&stat);
        let known = self
            .files
            .get(&identity)
            .and_then(|index| self.order.get_mut(*index));
        let found = match known {
            Some(found) => found,
            None => {
                if self.order.len() >= FILES_MAX {
                    return Err(Error::TooMany(FILES_MAX));
                }
                let path = self.path_of(file, identity)?;
                self.files.insert(identity, self.order.len());
                self.seen.fetch_add(1, Ordering::Relaxed);
                self.order.push(Found {
                    path,
                    identity,
                    at,
                    executed: false,
                    read: false,
                });
                match self.order.last_mut() {
                    Some(found) => found,
                    None => return Ok(()),
                }
            }
        };
        found.executed |= mask & libc::FAN_OPEN_EXEC != 0;
        found.read |= mask & libc::FAN_ACCESS != 0;
        Ok(())
    }

    /// Path of a file inside the root, `None` when the name that it was opened by does not lead to it.
    fn path_of(&self, file: &OwnedFd, identity: Identity) -> Result<Option<EntryPath>, Error> {
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let name = std::fs::read_link(link).map_err(|source| Error::Read {
            step: "finding the path of a file",
            source,
        })?;
        let name = name.as_os_str().as_bytes();
        let mut rest = name;
        // From the whole name down to its last component: the front may be where the root is mounted.
        while let Some(path) = rest.strip_prefix(b"/") {
            if statat(&self.root, path, AtFlags::SYMLINK_NOFOLLOW)
                .is_ok_and(|stat| self::identity(&stat) == identity)
            {
                return Ok(EntryPath::clean(path).ok());
            }
            let next = path.iter().position(|byte| *byte == b'/');
            rest = next.and_then(|next| path.get(next..)).unwrap_or_default();
        }
        // Removed since: its name of then is all that is left of it.
        Ok(name
            .strip_suffix(DELETED)
            .and_then(|path| EntryPath::clean(path).ok()))
    }

    /// Searches the root for the files that are known by number only.
    fn search(&mut self) -> Result<(), Error> {
        let mut wanted: HashMap<Identity, usize> = self
            .order
            .iter()
            .enumerate()
            .filter(|(_, found)| found.path.is_none())
            .map(|(index, found)| (found.identity, index))
            .collect();
        let mut directories = vec![(Vec::new(), 0)];
        while let Some((path, depth)) = directories.pop() {
            if wanted.is_empty() {
                break;
            }
            self.search_directory(&path, depth, &mut wanted, &mut directories)
                .map_err(read_error("searching the root"))?;
        }
        for index in wanted.into_values() {
            // A file without any name in the root, like one that was never linked, is none of the image's.
            tracing::debug!("an accessed file has no path: {:?}", self.order.get(index));
        }
        Ok(())
    }

    /// Looks through one directory of the root.
    fn search_directory(
        &mut self,
        path: &[u8],
        depth: usize,
        wanted: &mut HashMap<Identity, usize>,
        directories: &mut Vec<(Vec<u8>, usize)>,
    ) -> Result<(), Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let place = if path.is_empty() { b".".as_slice() } else { path };
        let directory = match openat(&self.root, place, flags, Mode::empty()) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(()),
            directory => directory?,
        };
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            let kind = entry.file_type();
            if name == b"." || name == b".." || !(kind.is_dir() || kind.is_file()) {
                continue;
            }
            let child = if path.is_empty() {
                name.to_vec()
            } else {
                [path, b"/", name].concat()
            };
            if kind.is_dir() {
                if depth < DEPTH_MAX {
                    directories.push((child, depth + 1));
                }
                continue;
            }
            let Ok(stat) = statat(&directory, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            if let Some(found) = wanted
                .remove(&identity(&stat))
                .and_then(|index| self.order.get_mut(index))
            {
                found.path = EntryPath::clean(&child).ok();
            }
        }
        Ok(())
    }

    /// The record: one entry per path. A file that was copied up may have changed its number in between.
    fn finish(self) -> Vec<Access> {
        let mut places: HashMap<EntryPath, usize> = HashMap::new();
        let mut accesses: Vec<Access> = Vec::new();
        for found in self.order {
            let Some(path) = found.path else {
                continue;
            };
            let place = places.get(&path).and_then(|place| accesses.get_mut(*place));
            if let Some(access) = place {
                access.executed |= found.executed;
                access.read |= found.read;
                continue;
            }
            places.insert(path.clone(), accesses.len());
            accesses.push(Access {
                path,
                at: found.at,
                executed: found.executed,
                read: found.read,
            });
        }
        accesses
    }
}

fn identity(stat: &Stat) -> Identity {
    (stat.st_dev, stat.st_ino)
}

/// Errors of opening an event's file that mean: it is not a file of the image (a device, which the mount's `nodev`
/// refuses), or it no longer is.
fn is_gone(error: Errno) -> bool {
    [
        Errno::NOENT,
        Errno::STALE,
        Errno::NXIO,
        Errno::NODEV,
        Errno::ACCESS,
    ]
    .contains(&error)
}

fn read_error(step: &'static str) -> impl Fn(Errno) -> Error {
    move |error| Error::Read {
        step,
        source: error.into(),
    }
}
