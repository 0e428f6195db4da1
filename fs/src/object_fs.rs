//! The object file system: every object that is not complete yet, as a file `ab/cdef...`, over FUSE.
//!
//! It is the last data layer of every overlay, so the kernel comes here only for objects that it does not find in the
//! store. The threads that read from `/dev/fuse` never wait for the network: a read whose bytes are missing moves its
//! reply into the fetch engine and the thread takes the next request.
//!
//! An object keeps its inode number for the life of the service, and names and attributes are given to the kernel for
//! good: an overlay that has found an object here keeps pointing at that inode. So a length that images disagree about is
//! not told before it is known; the kernel asks for it again at every open, because its attributes were dropped then.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use crossbeam_channel::{Receiver, Sender, bounded};
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, Notifier, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyStatfs, Request, Session, SessionACL,
};
use peel_image::Digest;

use crate::error::Error;
use crate::fetch::Engine;
use crate::lock;
use crate::object::Object;

/// Threads that answer the kernel. They do no more than copy bytes.
const THREADS: usize = 3;
/// Readahead requests that the kernel may have open at once. Each may wait for the network, so the default of 12 would
/// stall the readahead of other files behind one slow chunk.
const MAX_BACKGROUND: u16 = 512;
/// Objects never change, and the kernel may never look for another one under the same name.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Inode numbers: 1 is the root, then the directories `00` to `ff`, then the objects by number.
const FIRST_DIRECTORY: u64 = 2;
const FIRST_OBJECT: u64 = FIRST_DIRECTORY + 256;

/// The file system that answers the kernel.
#[derive(Debug)]
struct ObjectFs {
    engine: Arc<Engine>,
    lookups: Arc<Lookups>,
}

/// Names that nobody knows yet, while images are being registered: their lookups wait instead of failing.
#[derive(Debug, Default)]
pub(crate) struct Lookups(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    /// By number; the sender tells that a lookup waits.
    registrations: HashMap<u64, Sender<()>>,
    next: u64,
    lookups: Vec<(Digest, ReplyEntry)>,
}

impl Lookups {
    /// Whether images are being registered; if so, they hurry.
    pub(crate) fn hurry(&self) -> bool {
        lock(&self.0).hurry()
    }
}

impl Waiting {
    fn hurry(&self) -> bool {
        for registration in self.registrations.values() {
            // Full means that it has been told.
            let _ = registration.try_send(());
        }
        !self.registrations.is_empty()
    }
}

/// A registration that is under way. Dropping it lets the lookups go on that waited for it.
#[derive(Debug)]
pub(crate) struct Registration {
    lookups: Arc<Lookups>,
    engine: Arc<Engine>,
    number: u64,
    wanted: Receiver<()>,
}

impl Registration {
    /// Begins a registration.
    pub(crate) fn begin(lookups: &Arc<Lookups>, engine: &Arc<Engine>) -> Self {
        // One message says it all.
        let (sender, wanted) = bounded(1);
        let mut waiting = lock(&lookups.0);
        let number = waiting.next;
        waiting.next += 1;
        waiting.registrations.insert(number, sender);
        Self {
            lookups: Arc::clone(lookups),
            engine: Arc::clone(engine),
            number,
            wanted,
        }
    }

    /// Waits until a lookup needs this registration, at most for `patience`.
    pub(crate) fn wait(&self, patience: Duration) {
        // Both outcomes mean that it is time.
        let _ = self.wanted.recv_timeout(patience);
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let waiting = {
            let mut waiting = lock(&self.lookups.0);
            waiting.registrations.remove(&self.number);
            // A lookup whose object came with this registration need not wait for another one.
            std::mem::take(&mut waiting.lookups)
        };
        for (digest, reply) in waiting {
            answer_lookup(&self.engine, &self.lookups, digest, reply);
        }
    }
}

/// The threads that serve the mount.
#[derive(Debug)]
pub(crate) struct Served {
    thread: Option<JoinHandle<()>>,
    notifier: Notifier,
}

/// Drops what the kernel has cached of an object's bytes and attributes.
pub(crate) fn invalidate(notifier: &Notifier, number: u32) {
    // A length of 0 means up to the end.
    if let Err(error) = notifier.inval_inode(INodeNo(inode_of(number)), 0, 0) {
        tracing::warn!(%error, "cannot drop cached pages of an object");
    }
}

impl Served {
    /// For messages to the kernel.
    pub(crate) fn notifier(&self) -> Notifier {
        self.notifier.clone()
    }

    /// Waits for the threads, which end when the connection is aborted.
    pub(crate) fn join(&mut self) {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a thread of the object file system panicked");
        }
    }
}

/// Serves a mounted FUSE file system through (a duplicate of) its device descriptor.
pub(crate) fn serve(engine: &Arc<Engine>, lookups: &Arc<Lookups>, device: OwnedFd) -> Result<Served, Error> {
    let file_system = ObjectFs {
        engine: Arc::clone(engine),
        lookups: Arc::clone(lookups),
    };
    let mut config = Config::default();
    config.n_threads = Some(THREADS);
    config.acl = SessionACL::All;
    let session = Session::from_fd(file_system, device, SessionACL::All, config)
        .map_err(Error::io("/dev/fuse", "begin to serve the object file system"))?;
    let notifier = session.notifier();
    let name = "peel-fuse";
    let thread = thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            if let Err(error) = session.run() {
                tracing::debug!(%error, "the object file system has ended");
            }
        })
        .map_err(|source| Error::Thread {
            name: name.to_owned(),
            source,
        })?;
    Ok(Served {
        thread: Some(thread),
        notifier,
    })
}

const fn inode_of(number: u32) -> u64 {
    FIRST_OBJECT + number as u64
}

fn answer_lookup(engine: &Arc<Engine>, lookups: &Lookups, digest: Digest, reply: ReplyEntry) {
    // The object is looked for under the lock that a registration ends with, so that no lookup is left behind.
    let mut waiting = lock(&lookups.0);
    match engine.table.find(&digest) {
        Some(object) => {
            drop(waiting);
            object.seen.store(true, Ordering::Release);
            // An answer may wait inside the engine, so it must not keep it.
            let of_answer = (Arc::downgrade(engine), Arc::clone(&object));
            engine.size(&object, move |size| {
                let (engine, object) = of_answer;
                if let Some(engine) = engine.upgrade() {
                    engine.looked_up(&object);
                }
                match size {
                    Ok(size) => reply.entry(&FOREVER, &file(&object, size), Generation(0)),
                    Err(error) => reply.error(Errno::from_i32(error.raw_os_error())),
                }
            });
        }
        None if waiting.hurry() => waiting.lookups.push((digest, reply)),
        None => {
            drop(waiting);
            reply.error(Errno::ENOENT);
        }
    }
}

fn directory(inode: u64) -> FileAttr {
    attributes(inode, FileType::Directory, 0o555, 0)
}

fn file(object: &Object, size: u64) -> FileAttr {
    attributes(inode_of(object.number), FileType::RegularFile, 0o444, size)
}

fn attributes(inode: u64, kind: FileType, perm: u16, size: u64) -> FileAttr {
    FileAttr {
        ino: INodeNo(inode),
        size,
        blocks: size.div_ceil(512),
        atime: SystemTime::UNIX_EPOCH,
        mtime: SystemTime::UNIX_EPOCH,
        ctime: SystemTime::UNIX_EPOCH,
        crtime: SystemTime::UNIX_EPOCH,
        kind,
        perm,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// The byte that a directory name of two digits stands for.
fn shard(name: &[u8]) -> Option<u8> {
    let digits = std::str::from_utf8(name)
        .ok()
        .filter(|digits| digits.len() == 2)?;
    let byte = u8::from_str_radix(digits, 16).ok()?;
    // Capital digits and signs are other names.
    (format!("{byte:02x}") == digits).then_some(byte)
}

impl ObjectFs {
    fn object(&self, inode: INodeNo) -> Option<Arc<Object>> {
        let number = inode.0.checked_sub(FIRST_OBJECT)?;
        self.engine.table.get(u32::try_from(number).ok()?)
    }
}

impl Filesystem for ObjectFs {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Both errors name the nearest value that would do; neither matters for correctness.
        let _ = config.set_max_background(MAX_BACKGROUND);
        let _ = config.set_congestion_threshold(MAX_BACKGROUND);
        for wanted in [
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_EXPLICIT_INVAL_DATA,
            InitFlags::FUSE_HAS_RESEND,
        ] {
            let _ = config.add_capabilities(wanted);
        }
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == INodeNo::ROOT {
            match shard(name.as_bytes()) {
                Some(byte) => {
                    reply.entry(
                        &FOREVER,
                        &directory(FIRST_DIRECTORY + u64::from(byte)),
                        Generation(0),
                    );
                }
                None => reply.error(Errno::ENOENT),
            }
            return;
        }
        let digest = parent
            .0
            .checked_sub(FIRST_DIRECTORY)
            .and_then(|byte| u8::try_from(byte).ok())
            .zip(name.to_str())
            .and_then(|(byte, rest)| Digest::from_hex(&format!("{byte:02x}{rest}")).ok());
        match digest {
            Some(digest) => answer_lookup(&self.engine, &self.lookups, digest, reply),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        if inode.0 < FIRST_OBJECT {
            reply.attr(&FOREVER, &directory(inode.0));
            return;
        }
        match self.object(inode) {
            Some(object) => {
                let of_answer = Arc::clone(&object);
                self.engine.size(&object, move |size| match size {
                    Ok(size) => reply.attr(&FOREVER, &file(&of_answer, size)),
                    Err(error) => reply.error(Errno::from_i32(error.raw_os_error())),
                });
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let Some(object) = self.object(inode) else {
            reply.error(Errno::ENOENT);
            return;
        };
        self.engine.opened(&object);
        reply.opened(
            FileHandle(0),
            FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
        );
    }

    fn release(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
        if let Some(object) = self.object(inode) {
            self.engine.closed(&object);
        }
    }

    fn read(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(object) = self.object(inode) else {
            reply.error(Errno::EIO);
            return;
        };
        // A length that images disagree about is found out, and kept to, when the bytes are.
        let left = object.known_size().unwrap_or(u64::MAX).saturating_sub(offset);
        let length = usize::try_from(left.min(u64::from(size))).unwrap_or(0);
        if length == 0 {
            reply.data(&[]);
            return;
        }
        thread_local! {
            static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        if let Some(snapshot) = self.engine.ready(&object, offset, length) {
            BUFFER.with_borrow_mut(|buffer| {
                match snapshot.read_into(&self.engine.store, &object.digest, offset, length, buffer) {
                    Ok(()) => reply.data(buffer),
                    Err(error) => {
                        tracing::error!(object = %object.digest, %error, "cannot read the object from the store");
                        reply.error(Errno::EIO);
                    }
                }
            });
            return;
        }
        let answer = move |result: Result<&[u8], rustix::io::Errno>| match result {
            Ok(bytes) => reply.data(bytes),
            Err(error) => reply.error(Errno::from_i32(error.raw_os_error())),
        };
        self.engine.read(&object, offset, length, Box::new(answer));
    }

    fn readdir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _offset: u64,
        reply: ReplyDirectory,
    ) {
        // Nobody lists a data layer, and what there is to list changes all the time.
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        const BLOCK: u32 = 4096;
        const NAME_MAX: u32 = 255;
        reply.statfs(0, 0, 0, 0, 0, BLOCK, NAME_MAX, BLOCK);
    }
}

/// A duplicate of a descriptor.
pub(crate) fn duplicate(fd: &OwnedFd) -> Result<OwnedFd, Error> {
    fd.as_fd()
        .try_clone_to_owned()
        .map_err(Error::io("/dev/fuse", "duplicate the descriptor"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_two_small_hexadecimal_digits_are_a_directory() {
        for (name, expected) in [
            ("00", Some(0)),
            ("ff", Some(0xff)),
            ("a7", Some(0xa7)),
            ("A7", None),
            ("+7", None),
            ("7", None),
            ("007", None),
            ("", None),
            ("..", None),
        ] {
            assert_eq!(shard(name.as_bytes()), expected, "{name:?}");
        }
    }
}
