//! The default seccomp profile: what Docker's refuses, written as what is refused.
//!
//! Called by [`crate::init`] as its last act before exec. Docker ships a list of some 350 allowed calls; what it keeps a
//! container with the default capabilities from is the short list below. A list of refusals alone would let through
//! whatever a later kernel adds, so two programs are installed:
//!
//! 1. [`unknown_calls`]: a call with a number above the last one that was reviewed, and `clone3`, fail with ENOSYS.
//!    A program then takes its older way. (`clone3` takes its flags from memory, which a filter cannot see.)
//! 2. [`refused_calls`]: the calls of the list fail with EPERM, `clone` only when it asks for namespaces, `personality`
//!    and `socket` only with certain arguments.
//!
//! Where both refuse, the kernel takes the error of the program that was installed last. Calls of another architecture
//! (32-bit programs) end the process.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

/// Number of `removexattrat`, the last call that was reviewed; the numbers from 424 on are the same on every architecture.
const LAST_KNOWN: u32 = 466;
/// `CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET`.
const CLONE_NAMESPACES: u64 = 0x7e02_0000;
/// `AF_ALG`: the kernel's cryptography, a long tail of code that no container needs.
const AF_ALG: u64 = 38;
/// `AF_VSOCK`: reaches the hypervisor and its other guests.
const AF_VSOCK: u64 = 40;
/// What `personality` may be asked for: Linux, Linux with 32-bit uname, both without address randomization changes
/// (`UNAME26`), and the question for the present one.
const PERSONALITIES: [u64; 5] = [0, 8, 0x2_0000, 0x2_0008, 0xffff_ffff];
/// `lsm_get_self_attr` to `lsm_list_modules`, which the C library bindings do not name.
const SYS_LSM: [i64; 3] = [459, 460, 461];

/// Calls that act on the whole host or that only its administrator needs.
const REFUSED: &[i64] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_fanotify_init,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_get_mempolicy,
    libc::SYS_init_module,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_kcmp,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_lookup_dcookie,
    libc::SYS_mbind,
    libc::SYS_migrate_pages,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_move_pages,
    libc::SYS_nfsservctl,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pivot_root,
    libc::SYS_process_madvise,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_set_mempolicy,
    libc::SYS_set_mempolicy_home_node,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_setns,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
];

/// Those that exist on x86-64 alone.
#[cfg(target_arch = "x86_64")]
const REFUSED_HERE: &[i64] = &[
    libc::SYS__sysctl,
    libc::SYS_ioperm,
    libc::SYS_iopl,
    libc::SYS_sysfs,
    libc::SYS_uselib,
    libc::SYS_ustat,
];
#[cfg(not(target_arch = "x86_64"))]
const REFUSED_HERE: &[i64] = &[];

/// The profile as programs, in the order in which they are installed.
pub(crate) fn profile() -> Result<[BpfProgram; 2], seccompiler::BackendError> {
    Ok([unknown_calls(), refused_calls()?])
}

/// ENOSYS for calls that are newer than this list, and for `clone3`.
fn unknown_calls() -> BpfProgram {
    // Opcodes of linux/bpf_common.h: load the word at offset k, jump if the accumulator is greater than or equal to k.
    const LOAD_WORD: u16 = 0x20;
    const JUMP_IF_GREATER: u16 = 0x25;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    /// `SECCOMP_RET_ERRNO`; the error is in the low 16 bits.
    const FAIL: u32 = 0x0005_0000;
    const ALLOW: u32 = 0x7fff_0000;
    let instruction = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    let clone3 = u32::try_from(libc::SYS_clone3).unwrap_or(u32::MAX);
    vec![
        // The call's number is the first word of seccomp_data. The x32 calls have bit 30 set, so they are refused too.
        instruction(LOAD_WORD, 0, 0, 0),
        instruction(JUMP_IF_GREATER, 1, 0, LAST_KNOWN),
        instruction(JUMP_IF_EQUAL, 0, 1, clone3),
        instruction(RETURN, 0, 0, FAIL | libc::ENOSYS.cast_unsigned()),
        instruction(RETURN, 0, 0, ALLOW),
    ]
}

/// EPERM for the list.
fn refused_calls() -> Result<BpfProgram, seccompiler::BackendError> {
    let argument = |index, op, value| SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = REFUSED
        .iter()
        .chain(REFUSED_HERE)
        .chain(&SYS_LSM)
        .map(|call| (*call, Vec::new()))
        .collect();
    // One rule per flag: a masked comparison holds only when all bits of the mask are as given.
    let flags = (0..64)
        .map(|bit| 1_u64 << bit)
        .filter(|flag| CLONE_NAMESPACES & flag != 0);
    let clone: Result<Vec<_>, _> = flags
        .map(|flag| SeccompRule::new(vec![argument(0, SeccompCmpOp::MaskedEq(flag), flag)?]))
        .collect();
    rules.insert(libc::SYS_clone, clone?);
    let others: Result<Vec<_>, _> = PERSONALITIES
        .iter()
        .map(|known| argument(0, SeccompCmpOp::Ne, *known))
        .collect();
    rules.insert(libc::SYS_personality, vec![SeccompRule::new(others?)?]);
    let sockets: Result<Vec<_>, _> = [AF_ALG, AF_VSOCK]
        .iter()
        .map(|family| SeccompRule::new(vec![argument(0, SeccompCmpOp::Eq, *family)?]))
        .collect();
    rules.insert(libc::SYS_socket, sockets?);
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::{LAST_KNOWN, REFUSED, profile};

    #[test]
    fn programs_fit_the_kernel_and_the_list_is_known() {
        let programs = profile().unwrap();
        assert!(
            programs
                .iter()
                .all(|program| !program.is_empty() && program.len() < 4096)
        );
        assert!(REFUSED.iter().all(|call| *call <= i64::from(LAST_KNOWN)));
    }
}
