//! The default seccomp profile: what Docker's refuses, written as what is refused.
//!
//! Called by [`crate::init`] as its last act before exec. Docker ships a list of some 350 allowed calls; what it keeps a
//! container with the default capabilities from is the list of names in [`calls`]. A list of refusals alone would let
//! through whatever a later kernel adds, so a call is looked at twice:
//!
//! 1. A number above the last one that was reviewed, and `clone3`, fail with ENOSYS. A program then takes its older
//!    way. (`clone3` takes its flags from memory, which a filter cannot see.)
//! 2. The calls of the list fail with EPERM, `clone` only when it asks for namespaces, `personality` and `socket` only
//!    with certain arguments.
//!
//! A kernel runs programs of other calling conventions beside its own (i386 and x32 on x86-64, 32-bit arm on arm64), with
//! other numbers. Each has a section of its own; calls of any other architecture end the process:
//!
//! ```text
//! load the architecture, go to its section, or kill
//! section: (x86-64: go to the section of x32 if bit 30 of the number is set)
//!          unknown numbers: ENOSYS
//!          the rules, compiled by seccompiler: EPERM or allow
//! ```

mod calls;

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

use calls::{Abi, LAST_KNOWN, REFUSED, X32_BIT};

/// `CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET`.
const CLONE_NAMESPACES: u64 = 0x7e02_0000;
/// `AF_ALG`: the kernel's cryptography, a long tail of code that no container needs.
const AF_ALG: u64 = 38;
/// `AF_VSOCK`: reaches the hypervisor and its other guests.
const AF_VSOCK: u64 = 40;
/// What `personality` may be asked for: Linux, Linux with 32-bit uname, both without address randomization changes
/// (`UNAME26`), and the question for the present one.
const PERSONALITIES: [u64; 5] = [0, 8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Opcodes of linux/bpf_common.h: load the word at offset k of `seccomp_data`.
const LOAD_WORD: u16 = 0x20;
/// Jump by k.
const JUMP: u16 = 0x05;
/// Jump by `jt` if the accumulator is k, else by `jf`; both count from the next instruction.
const JUMP_IF_EQUAL: u16 = 0x15;
/// The same if it is greater than k.
const JUMP_IF_GREATER: u16 = 0x25;
/// The same if it is k or greater.
const JUMP_IF_AT_LEAST: u16 = 0x35;
/// End with action k.
const RETURN: u16 = 0x06;
/// `SECCOMP_RET_ERRNO` with ENOSYS in its low 16 bits (linux/seccomp.h).
const NO_SUCH_CALL: u32 = 0x0005_0000 | libc::ENOSYS.cast_unsigned();
/// `SECCOMP_RET_KILL_PROCESS`.
const KILL: u32 = 0x8000_0000;

/// Where `seccomp_data` holds the call's number and its architecture.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// What seccompiler puts before the rules: load the architecture, compare, kill. Sections are chosen here instead.
const COMPILED_PREFIX: usize = 3;

/// The profile for a kernel of this machine's architecture. As in Docker's profile, i386 programs may make sockets by
/// `socketcall`, whose address family lies in memory where no filter sees it: glibc for i386 knows no other way.
pub(crate) fn profile() -> Result<BpfProgram, BackendError> {
    profile_of(std::env::consts::ARCH)
}

/// The same for a kernel of any architecture that is known.
fn profile_of(architecture: &str) -> Result<BpfProgram, BackendError> {
    let abis = Abi::of_kernel(architecture)
        .ok_or_else(|| BackendError::InvalidTargetArch(architecture.to_owned()))?;
    let mut program = vec![step(LOAD_WORD, ARCHITECTURE)];
    for abi in abis {
        let mut section = section(*abi)?;
        if *abi == Abi::X86_64 {
            section = with_x32(section, self::section(Abi::X32)?);
        }
        // The jumps of a section are relative, and one that is skipped leaves the architecture loaded.
        program.push(jump(JUMP_IF_EQUAL, abi.audit_architecture(), 1, 0));
        program.push(step(JUMP, length(&section)));
        program.extend(section);
    }
    program.push(step(RETURN, KILL));
    Ok(program)
}

/// Both conventions of the architecture x86-64 in one section: the number tells them apart.
fn with_x32(native: BpfProgram, x32: BpfProgram) -> BpfProgram {
    let mut both = vec![
        step(LOAD_WORD, NUMBER),
        jump(JUMP_IF_AT_LEAST, X32_BIT, 0, 1),
        step(JUMP, length(&native)),
    ];
    both.extend(native);
    both.extend(x32);
    both
}

/// What is done with the calls of one convention.
fn section(abi: Abi) -> Result<BpfProgram, BackendError> {
    let mut section = unknown_calls(abi);
    let rules = refused_calls(abi)?;
    section.extend(rules.into_iter().skip(COMPILED_PREFIX));
    Ok(section)
}

/// Where a test of [`unknown_calls`] goes on.
#[derive(Debug, Clone, Copy)]
enum Goal {
    Next,
    /// Behind the next instruction.
    Second,
    NoSuchCall,
    Rules,
}

/// ENOSYS for calls that are newer than the list, and for `clone3`, whose flags cannot be seen.
fn unknown_calls(abi: Abi) -> BpfProgram {
    let mut tests = Vec::new();
    for own in abi.numbers_beyond() {
        tests.push((JUMP_IF_AT_LEAST, *own.start(), Goal::Next, Goal::Second));
        tests.push((JUMP_IF_GREATER, *own.end(), Goal::Next, Goal::Rules));
    }
    let last = LAST_KNOWN | abi.number_bits();
    tests.push((JUMP_IF_GREATER, last, Goal::NoSuchCall, Goal::Next));
    for clone3 in abi.numbers("clone3") {
        tests.push((JUMP_IF_EQUAL, clone3, Goal::NoSuchCall, Goal::Next));
    }
    let mut program = vec![step(LOAD_WORD, NUMBER)];
    let count = tests.len();
    for (index, (code, k, then, otherwise)) in tests.into_iter().enumerate() {
        // Behind the tests stand a jump to the rules and the return.
        let left = u8::try_from(count - index).unwrap_or(u8::MAX);
        let distance = |goal| match goal {
            Goal::Next => 0,
            Goal::Second => 1,
            Goal::NoSuchCall => left,
            Goal::Rules => left + 1,
        };
        program.push(jump(code, k, distance(then), distance(otherwise)));
    }
    program.push(step(JUMP, 1));
    program.push(step(RETURN, NO_SUCH_CALL));
    program
}

/// EPERM for the list.
fn refused_calls(abi: Abi) -> Result<BpfProgram, BackendError> {
    let argument = |index, op, value| SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value);
    // One rule per flag: a masked comparison holds only when all bits of the mask are as given.
    let flags = (0..64)
        .map(|bit| 1_u64 << bit)
        .filter(|flag| CLONE_NAMESPACES & flag != 0);
    let clone: Result<Vec<_>, BackendError> = flags
        .map(|flag| SeccompRule::new(vec![argument(0, SeccompCmpOp::MaskedEq(flag), flag)?]))
        .collect();
    let others: Result<Vec<_>, _> = PERSONALITIES
        .iter()
        .map(|known| argument(0, SeccompCmpOp::Ne, *known))
        .collect();
    let sockets: Result<Vec<_>, BackendError> = [AF_ALG, AF_VSOCK]
        .iter()
        .map(|family| SeccompRule::new(vec![argument(0, SeccompCmpOp::Eq, *family)?]))
        .collect();
    let partly = [
        ("clone", clone?),
        ("personality", vec![SeccompRule::new(others?)?]),
        ("socket", sockets?),
    ];
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for (name, conditions) in REFUSED.iter().map(|name| (*name, Vec::new())).chain(partly) {
        for number in abi.numbers(name) {
            rules.insert(number.into(), conditions.clone());
        }
    }
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    // Any architecture does, since its test is left out.
    SeccompFilter::new(rules, SeccompAction::Allow, refuse, TargetArch::x86_64)?.try_into()
}

fn step(code: u16, k: u32) -> sock_filter {
    jump(code, k, 0, 0)
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// Length of a section as a distance; the kernel takes 4096 instructions at most.
fn length(section: &[sock_filter]) -> u32 {
    u32::try_from(section.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
