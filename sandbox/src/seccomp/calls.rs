//! The calls that the profile refuses, and the numbers that they have in each calling convention.
//!
//! Numbers come from the crate `syscalls`, which has the kernel's tables of every architecture. What they do not have is
//! x32, which shares the table of x86-64.

use std::ops::RangeInclusive;
use std::str::FromStr;

use syscalls::{aarch64, arm, riscv64, x86, x86_64};

/// Number of `removexattrat`, the last call that was reviewed; the numbers from 424 on are the same on every architecture.
pub(super) const LAST_KNOWN: u32 = 466;
/// `__X32_SYSCALL_BIT`: marks the number of an x32 call (asm/unistd.h).
pub(super) const X32_BIT: u32 = 0x4000_0000;

/// Numbers of the calls that x32 has a table entry of its own for (arch/x86/entry/syscalls/syscall_64.tbl).
const X32_OWN: RangeInclusive<u32> = X32_BIT + 512..=X32_BIT + 547;
/// Those among them that are refused; under their old number they do not exist.
const X32_REFUSED: [(&str, u32); 2] = [("kexec_load", X32_BIT + 528), ("move_pages", X32_BIT + 533)];
/// `breakpoint` and `cacheflush`, `set_tls`: the calls of arm that Docker's profile allows (asm/unistd.h, `__ARM_NR_BASE`).
const ARM_OWN: [RangeInclusive<u32>; 2] = [0x0f_0001..=0x0f_0002, 0x0f_0005..=0x0f_0005];

/// Calls that act on the whole host or that only its administrator needs, under all names that a convention knows them by:
/// `umount` is `umount2` without flags, `stime` and `clock_settime64` set the clock as `clock_settime` does.
pub(super) const REFUSED: &[&str] = &[
    "_sysctl",
    "acct",
    "add_key",
    "bdflush",
    "bpf",
    "clock_settime",
    "clock_settime64",
    "create_module",
    "delete_module",
    "fanotify_init",
    "finit_module",
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "get_kernel_syms",
    "get_mempolicy",
    "init_module",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "ioperm",
    "iopl",
    "kcmp",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "lookup_dcookie",
    "lsm_get_self_attr",
    "lsm_list_modules",
    "lsm_set_self_attr",
    "mbind",
    "migrate_pages",
    "mount",
    "mount_setattr",
    "move_mount",
    "move_pages",
    "nfsservctl",
    "open_by_handle_at",
    "open_tree",
    "pciconfig_iobase",
    "pciconfig_read",
    "pciconfig_write",
    "perf_event_open",
    "pidfd_getfd",
    "pivot_root",
    "process_madvise",
    "query_module",
    "quotactl",
    "quotactl_fd",
    "reboot",
    "request_key",
    "set_mempolicy",
    "set_mempolicy_home_node",
    "setdomainname",
    "sethostname",
    "setns",
    "settimeofday",
    "stime",
    "swapoff",
    "swapon",
    "sysfs",
    "syslog",
    "umount",
    "umount2",
    "unshare",
    "uselib",
    "userfaultfd",
    "ustat",
    "vhangup",
    "vm86",
    "vm86old",
];

/// A calling convention of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Abi {
    X86_64,
    /// 32-bit programs on x86-64.
    I386,
    /// Programs on x86-64 with 32-bit pointers; told apart by the number, not by the architecture.
    X32,
    Aarch64,
    /// 32-bit programs on arm64.
    Arm,
    Riscv64,
}

impl Abi {
    /// The conventions that a kernel runs beside each other, its own first; x32 comes with x86-64. `None` for an
    /// architecture that is not known.
    pub(super) fn of_kernel(architecture: &str) -> Option<&'static [Self]> {
        Some(match architecture {
            "x86_64" => &[Self::X86_64, Self::I386],
            "aarch64" => &[Self::Aarch64, Self::Arm],
            "riscv64" => &[Self::Riscv64],
            _ => return None,
        })
    }

    /// `AUDIT_ARCH_*`, by which a filter sees the convention (linux/audit.h).
    pub(super) fn audit_architecture(self) -> u32 {
        match self {
            Self::X86_64 | Self::X32 => 0xc000_003e,
            Self::I386 => 0x4000_0003,
            Self::Aarch64 => 0xc000_00b7,
            Self::Arm => 0x4000_0028,
            Self::Riscv64 => 0xc000_00f3,
        }
    }

    /// What is added to every number.
    pub(super) fn number_bits(self) -> u32 {
        if self == Self::X32 { X32_BIT } else { 0 }
    }

    /// Numbers above [`LAST_KNOWN`] that were reviewed.
    pub(super) fn numbers_beyond(self) -> &'static [RangeInclusive<u32>] {
        match self {
            Self::X32 => &[X32_OWN],
            Self::Arm => &ARM_OWN,
            Self::X86_64 | Self::I386 | Self::Aarch64 | Self::Riscv64 => &[],
        }
    }

    /// The numbers of a call; none where the convention does not have it.
    pub(super) fn numbers(self, name: &str) -> Vec<u32> {
        let number = match self {
            Self::X86_64 | Self::X32 => x86_64::Sysno::from_str(name).map(|call| call.id()),
            Self::I386 => x86::Sysno::from_str(name).map(|call| call.id()),
            Self::Aarch64 => aarch64::Sysno::from_str(name).map(|call| call.id()),
            Self::Arm => arm::Sysno::from_str(name).map(|call| call.id()),
            Self::Riscv64 => riscv64::Sysno::from_str(name).map(|call| call.id()),
        };
        let number = number.ok().and_then(|number| u32::try_from(number).ok());
        let mut numbers: Vec<u32> = number
            .into_iter()
            .map(|number| number | self.number_bits())
            .collect();
        if self == Self::X32 {
            let own = X32_REFUSED.iter().filter(|(own, _)| *own == name);
            numbers.extend(own.map(|(_, number)| *number));
        }
        numbers
    }
}
