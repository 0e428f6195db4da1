//! The few system calls of this crate that have no safe wrapper.
#![expect(
    unsafe_code,
    reason = "system calls without a safe wrapper; each block states its contract"
)]

use std::io;

/// Marks every descriptor above standard error close-on-exec, so that what a careless parent left open is not kept open
/// by programs that this process starts.
pub fn close_inherited_on_exec() -> io::Result<()> {
    // SAFETY: close_range with CLOSE_RANGE_CLOEXEC closes nothing now; it changes a flag of descriptors, which no owner
    // relies on being unset.
    let result = unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Gives memory that was freed back to the kernel; takes some milliseconds. The allocator of glibc keeps what lies between
/// allocations that live on, in each of its arenas; others give back by themselves.
pub fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes the allocator's own locks and changes nothing that was allocated.
    unsafe {
        libc::malloc_trim(0);
    }
}
