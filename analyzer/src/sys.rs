//! The two fanotify calls and the ownership of the descriptors that come with events.
//!
//! Called by [`crate::recorder`] alone.
#![expect(unsafe_code, reason = "fanotify has no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Errors of opening an event's file come in place of the descriptor (since 6.13); not in the C library's bindings yet.
const FAN_REPORT_FD_ERROR: libc::c_uint = 0x2000;

/// A new notification group with an unlimited queue. Event files are opened for reading, without waiting (a fifo would),
/// without becoming anybody's terminal and without touching the access time.
pub(crate) fn new_group() -> io::Result<OwnedFd> {
    let flags = libc::FAN_CLASS_NOTIF
        | libc::FAN_CLOEXEC
        | libc::FAN_NONBLOCK
        | libc::FAN_UNLIMITED_QUEUE
        | libc::FAN_UNLIMITED_MARKS;
    let files = libc::O_RDONLY | libc::O_LARGEFILE | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOATIME;
    let init = |flags| {
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::fanotify_init(flags, files.cast_unsigned()) };
        if fd == -1 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    match init(flags | FAN_REPORT_FD_ERROR) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => init(flags),
        group => group,
    }
}

/// Asks for events of the whole file system that a directory is on, through whichever of its mounts they come.
pub(crate) fn mark_file_system(
    group: BorrowedFd<'_>,
    mask: u64,
    directory: BorrowedFd<'_>,
) -> io::Result<()> {
    // A path that means the directory itself: a descriptor of a detached mount alone is refused.
    let path = c".";
    // SAFETY: the path is a C string that lives across the call.
    let done = unsafe {
        libc::fanotify_mark(
            group.as_raw_fd(),
            libc::FAN_MARK_ADD | libc::FAN_MARK_FILESYSTEM,
            mask,
            directory.as_raw_fd(),
            path.as_ptr(),
        )
    };
    if done == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Takes over the descriptor of an event that was just read; `None` for none.
pub(crate) fn event_file(fd: i32) -> Option<OwnedFd> {
    // SAFETY: the kernel made the descriptor for the reader of the event, and each event is looked at once.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}
