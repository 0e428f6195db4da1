//! The system calls that no safe wrapper offers: clone3, mount_setattr, execve, signal reset, raising `lo`.
//!
//! Called by [`crate::container`] (host side) and [`crate::init`] (inside). What must hold: [`fork`] is only called by a
//! process with one thread.
#![expect(
    unsafe_code,
    reason = "namespaces, mount attributes and exec have no safe wrappers"
)]

use std::ffi::{CStr, CString};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::thread::UnshareFlags;

/// Which side of [`fork`] this is.
pub(crate) enum Forked {
    /// The new process.
    Child,
    /// The process that called, with its child's descriptor.
    Parent(OwnedFd),
}

/// `clone3` without shared memory: a fork into new namespaces (`CLONE_NEW*` in `flags`) and, where given, into a cgroup.
/// The caller must have one thread only, or the child would inherit locks that nobody can release.
pub(crate) fn fork(flags: libc::c_int, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Forked> {
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is a plain C struct for which all zeroes is the documented default.
    let mut args: libc::clone_args = unsafe { mem::zeroed() };
    args.flags = u64::from(flags.cast_unsigned()) | u64::from(libc::CLONE_PIDFD.cast_unsigned());
    args.pidfd = ptr::from_mut(&mut pidfd).addr() as u64;
    args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    if let Some(cgroup) = cgroup {
        // CLONE_INTO_CGROUP does not fit the C int that libc declares the flags with.
        args.flags |= 0x2_0000_0000;
        args.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    // SAFETY: `args` and the `pidfd` it points to live across the call; no stack is given and no CLONE_VM is set, so the
    // child runs on a copy of this process, which has one thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        // SAFETY: the kernel stored a new descriptor, with close-on-exec set, that nobody else owns.
        _ => Ok(Forked::Parent(unsafe { OwnedFd::from_raw_fd(pidfd) })),
    }
}

/// Gives the calling thread's future children a pid namespace of their own, or the caller other namespaces.
/// Never called with `UnshareFlags::FILES`.
pub(crate) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: the contract concerns the table of descriptors (FILES) alone, which is never in `flags`.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

/// `mount_setattr`: sets `MOUNT_ATTR_*` bits on the mount that `mount` refers to, on all below it when `recursive`.
pub(crate) fn set_mount_attributes(mount: BorrowedFd<'_>, set: u64, recursive: bool) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string, and `attributes` has the size that is given, both for the whole call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Brings the interface `lo` of the current network namespace up.
pub(crate) fn raise_loopback() -> io::Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: ifreq is a plain C struct for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(c"lo".to_bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap_or(1);
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives across the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if done == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Every signal to its default action, none blocked: what a program may expect at its start.
pub(crate) fn reset_signals() {
    // The kernel's own struct sigaction (handler, flags, restorer, mask), all zero: SIG_DFL. The C library's function
    // would refuse the two signals that it keeps for itself, which may have been inherited as ignored.
    let default = [0_u64; 4];
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: the kernel reads 32 bytes at most, and no handler of this process is lost that is still needed. Fails
        // for SIGKILL and SIGSTOP, which cannot be changed.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                ptr::null::<u64>(),
                size_of::<u64>(),
            )
        };
    }
    // SAFETY: sigset_t is a plain C type for which all zeroes is valid; sigemptyset makes it the empty set anyway.
    let mut none: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: `none` is a valid set to write to.
    unsafe { libc::sigemptyset(&raw mut none) };
    // SAFETY: `none` is a valid set and the old set is not asked for.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()) };
}

/// Closes every descriptor above 2: what the caller's process let through by accident. Only for a process that has just
/// started and owns none.
pub(crate) fn close_inherited() -> io::Result<()> {
    // SAFETY: no descriptor above 2 has an owner yet.
    let done = unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, 0_u32) };
    if done == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Marks every descriptor above 2 close-on-exec, so that the container's program gets standard input, output, error and
/// nothing of the host.
pub(crate) fn close_others_on_exec() -> io::Result<()> {
    // SAFETY: only flags change; no descriptor is closed under its owner.
    let done = unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if done == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// `execve`; returns only with an error.
pub(crate) fn exec(path: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings
            .iter()
            .map(|string| string.as_ptr())
            .chain([ptr::null()])
            .collect()
    };
    let (argv, envp) = (pointers(args), pointers(env));
    // SAFETY: both arrays end with a null pointer, and they and the C strings they point to live across the call.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    io::Error::last_os_error()
}

/// Sends any signal number, also a real-time one, to the process of `pidfd`.
pub(crate) fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: no memory is passed: the siginfo is null.
    let done = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            ptr::null::<libc::siginfo_t>(),
            0_u32,
        )
    };
    if done == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// First and last real-time signal that programs may use.
pub(crate) fn realtime_signals() -> (i32, i32) {
    (libc::SIGRTMIN(), libc::SIGRTMAX())
}
