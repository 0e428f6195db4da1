//! Gives up what the container may not have: capabilities, the host's user, the chance of getting anything back.
//!
//! Called by the first process after its root is in place. The order matters: the bounding set can be shrunk only with
//! CAP_SETPCAP, groups set only with CAP_SETGID, and both are gone after the change of user.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Gid, Uid, fchown, fstatfs};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::user::Account;
use crate::wire::{At, Failure};

/// Magic number of the file system that anonymous pipes live in (linux/magic.h).
const PIPEFS_MAGIC: u64 = 0x5049_5045;
/// Numbers of capabilities that can exist at all; the kernel's sets have 64 bits.
const CAPABILITIES: u32 = 64;

/// Docker's default set. CAP_MKNOD is harmless here, because no file system that the program can write to allows opening
/// devices.
fn kept() -> CapabilitySet {
    CapabilitySet::CHOWN
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::FSETID
        | CapabilitySet::FOWNER
        | CapabilitySet::MKNOD
        | CapabilitySet::NET_RAW
        | CapabilitySet::SETGID
        | CapabilitySet::SETUID
        | CapabilitySet::SETFCAP
        | CapabilitySet::SETPCAP
        | CapabilitySet::NET_BIND_SERVICE
        | CapabilitySet::SYS_CHROOT
        | CapabilitySet::KILL
        | CapabilitySet::AUDIT_WRITE
}

/// Becomes the user with Docker's default capabilities in the bounding set: root has them, others have none. After this
/// neither a set-user-id program nor file capabilities give any back.
pub(super) fn become_user(account: &Account) -> Result<(), Failure> {
    rustix::thread::clear_ambient_capability_set().at("clearing ambient capabilities")?;
    for number in 0..CAPABILITIES {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if kept().contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // Beyond the last one that this kernel knows.
            Err(rustix::io::Errno::INVAL) => break,
            result => result.at("dropping capabilities")?,
        }
    }
    let groups: Vec<Gid> = account.groups.iter().copied().map(Gid::from_raw).collect();
    let (gid, uid) = (Gid::from_raw(account.gid), Uid::from_raw(account.uid));
    rustix::thread::set_thread_groups(&groups).at("setting supplementary groups")?;
    rustix::thread::set_thread_res_gid(gid, gid, gid).at("changing the group")?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).at("changing the user")?;
    let present = rustix::thread::capabilities(None).at("reading capabilities")?;
    let wanted = if account.uid == 0 {
        kept() & present.permitted
    } else {
        CapabilitySet::empty()
    };
    let sets = CapabilitySets {
        effective: wanted,
        permitted: wanted,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets).at("dropping capabilities")?;
    rustix::thread::set_no_new_privs(true).at("setting no_new_privs")
}

/// Gives anonymous pipes among standard input, output and error to the user, who could not open `/dev/stdout` otherwise.
/// Files and terminals of the host are left alone.
pub(super) fn own_pipes(stdio: &[OwnedFd], uid: u32) -> Result<(), Failure> {
    if uid == 0 {
        return Ok(());
    }
    for fd in stdio {
        let found = fstatfs(fd).at("looking at standard input and output")?;
        if u64::try_from(found.f_type) == Ok(PIPEFS_MAGIC) {
            fchown(fd, Some(Uid::from_raw(uid)), None)
                .map_err(io::Error::from)
                .at("giving standard input and output to the user")?;
        }
    }
    Ok(())
}
