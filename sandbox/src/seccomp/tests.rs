//! The profile of every kernel, run here: an interpreter of the instructions that it consists of.

use seccompiler::sock_filter;

use super::calls::{Abi, LAST_KNOWN, REFUSED, X32_BIT};
use super::{KILL, NO_SUCH_CALL, profile_of};

const ALLOW: u32 = 0x7fff_0000;
const EPERM: u32 = 0x0005_0000 | libc::EPERM.cast_unsigned();
const KERNELS: [&str; 3] = ["x86_64", "aarch64", "riscv64"];

/// The action for a call whose first argument is `argument`.
fn evaluate(program: &[sock_filter], architecture: u32, number: u32, argument: u64) -> u32 {
    let word = |offset: u32| match offset {
        0 => number,
        4 => architecture,
        16 => u32::try_from(argument & u64::from(u32::MAX)).unwrap(),
        20 => u32::try_from(argument >> 32).unwrap(),
        24.. => 0,
        _ => panic!("offset {offset}"),
    };
    let (mut at, mut accumulator) = (0, 0);
    loop {
        let step = &program[at];
        at += 1;
        let mut branch = |taken: bool| at += usize::from(if taken { step.jt } else { step.jf });
        match step.code {
            0x20 => accumulator = word(step.k),
            0x54 => accumulator &= step.k,
            0x05 => at += step.k as usize,
            0x15 => branch(accumulator == step.k),
            0x25 => branch(accumulator > step.k),
            0x35 => branch(accumulator >= step.k),
            0x45 => branch(accumulator & step.k != 0),
            0x06 => return step.k,
            code => panic!("code {code:#x}"),
        }
    }
}

/// Every convention that a kernel runs.
fn conventions(kernel: &str) -> Vec<Abi> {
    let mut abis = Abi::of_kernel(kernel).unwrap().to_vec();
    if kernel == "x86_64" {
        abis.push(Abi::X32);
    }
    abis
}

/// The action for a call by name; it must exist.
fn call(kernel: &str, abi: Abi, name: &str, argument: u64) -> u32 {
    let program = profile_of(kernel).unwrap();
    let number = *abi
        .numbers(name)
        .last()
        .unwrap_or_else(|| panic!("{abi:?} has no {name}"));
    evaluate(&program, abi.audit_architecture(), number, argument)
}

#[test]
fn programs_fit_the_kernel() {
    for kernel in KERNELS {
        let program = profile_of(kernel).unwrap();
        assert!(program.len() <= 4096, "{kernel}: {}", program.len());
    }
    assert!(profile_of("vax").is_err());
}

#[test]
fn a_call_is_refused_in_every_convention() {
    for kernel in KERNELS {
        for abi in conventions(kernel) {
            let program = profile_of(kernel).unwrap();
            for name in REFUSED {
                for number in abi.numbers(name) {
                    let action = evaluate(&program, abi.audit_architecture(), number, 0);
                    assert_eq!(action, EPERM, "{abi:?} {name} {number}");
                }
            }
        }
    }
    // Every name is one that some kernel knows.
    let all: Vec<Abi> = KERNELS.iter().flat_map(|kernel| conventions(kernel)).collect();
    for name in REFUSED {
        assert!(all.iter().any(|abi| !abi.numbers(name).is_empty()), "{name}");
    }
}

#[test]
fn numbers_are_the_kernels() {
    for (abi, name, numbers) in [
        (Abi::X86_64, "mount", &[165_u32][..]),
        (Abi::I386, "mount", &[21]),
        (Abi::X32, "mount", &[X32_BIT + 165]),
        (Abi::Aarch64, "mount", &[40]),
        (Abi::Arm, "mount", &[21]),
        (Abi::I386, "umount", &[22]),
        (Abi::I386, "umount2", &[52]),
        (Abi::I386, "stime", &[25]),
        (Abi::I386, "clock_settime64", &[404]),
        (Abi::Arm, "clock_settime64", &[404]),
        (Abi::I386, "unshare", &[310]),
        (Abi::Arm, "unshare", &[337]),
        (Abi::I386, "keyctl", &[288]),
        (Abi::Arm, "keyctl", &[311]),
        (Abi::I386, "socket", &[359]),
        (Abi::Arm, "socket", &[281]),
        (Abi::I386, "socketcall", &[102]),
        (Abi::Arm, "socketcall", &[]),
        (Abi::X32, "kexec_load", &[X32_BIT + 246, X32_BIT + 528]),
        (Abi::X86_64, "clone3", &[435]),
        (Abi::I386, "clone3", &[435]),
    ] {
        assert_eq!(abi.numbers(name), numbers, "{abi:?} {name}");
    }
    assert_eq!(
        i64::from(Abi::X86_64.numbers("removexattrat")[0]),
        i64::from(LAST_KNOWN)
    );
    // This machine's own, by another source.
    let own = Abi::of_kernel(std::env::consts::ARCH).unwrap()[0];
    for (name, number) in [
        ("mount", libc::SYS_mount),
        ("unshare", libc::SYS_unshare),
        ("io_uring_setup", libc::SYS_io_uring_setup),
        ("clone", libc::SYS_clone),
    ] {
        assert_eq!(
            own.numbers(name).into_iter().map(i64::from).collect::<Vec<_>>(),
            [number]
        );
    }
}

#[test]
fn ordinary_and_unknown_calls() {
    for kernel in KERNELS {
        let program = profile_of(kernel).unwrap();
        for abi in conventions(kernel) {
            let run = |number| evaluate(&program, abi.audit_architecture(), number, 0);
            for name in [
                "read",
                "exit",
                "getpid",
                "execve",
                "futex",
                "ptrace",
                "openat2",
                "removexattrat",
            ] {
                assert_eq!(call(kernel, abi, name, 0), ALLOW, "{abi:?} {name}");
            }
            assert_eq!(call(kernel, abi, "clone3", 0), NO_SUCH_CALL, "{abi:?}");
            for number in [LAST_KNOWN + 1, 511, 548, 5000, 0x3fff_ffff] {
                assert_eq!(run(number | abi.number_bits()), NO_SUCH_CALL, "{abi:?} {number}");
            }
            assert_eq!(run(u32::MAX), NO_SUCH_CALL, "{abi:?}");
        }
    }
    let x86 = profile_of("x86_64").unwrap();
    let arm = profile_of("aarch64").unwrap();
    let rows = [
        // x32 has its own execve (520) and writev (516); without the bit these numbers mean nothing.
        (&x86, Abi::X32, X32_BIT + 512, ALLOW),
        (&x86, Abi::X32, X32_BIT + 520, ALLOW),
        (&x86, Abi::X32, X32_BIT + 547, ALLOW),
        (&x86, Abi::X32, X32_BIT + 528, EPERM),
        (&x86, Abi::X86_64, 520, NO_SUCH_CALL),
        (&x86, Abi::I386, X32_BIT + 20, NO_SUCH_CALL),
        (&arm, Abi::Arm, 0x0f_0000, NO_SUCH_CALL),
        (&arm, Abi::Arm, 0x0f_0002, ALLOW),
        (&arm, Abi::Arm, 0x0f_0005, ALLOW),
        (&arm, Abi::Arm, 0x0f_0006, NO_SUCH_CALL),
        (&arm, Abi::Aarch64, 0x0f_0002, NO_SUCH_CALL),
        // The architectures of another kernel.
        (&arm, Abi::X86_64, 39, KILL),
        (&x86, Abi::Arm, 20, KILL),
        (&x86, Abi::Riscv64, 172, KILL),
    ];
    for (program, abi, number, action) in rows {
        let got = evaluate(program, abi.audit_architecture(), number, 0);
        assert_eq!(got, action, "{abi:?} {number:#x}");
    }
}

#[test]
fn arguments_decide() {
    for kernel in KERNELS {
        for abi in conventions(kernel) {
            for (name, argument, action) in [
                ("clone", 17, ALLOW),
                ("clone", 0x1000_0000 | 17, EPERM),
                ("clone", 0x0002_0000, EPERM),
                ("personality", 0, ALLOW),
                ("personality", 8, ALLOW),
                ("personality", 0xffff_ffff, ALLOW),
                ("personality", 0x0004_0000, EPERM),
                ("socket", 1, ALLOW),
                ("socket", 2, ALLOW),
                ("socket", 38, EPERM),
                ("socket", 39, ALLOW),
                ("socket", 40, EPERM),
                // The kernel takes 32 bits of it.
                ("socket", 0x1_0000_0028, EPERM),
                ("socketpair", 1, ALLOW),
            ] {
                assert_eq!(
                    call(kernel, abi, name, argument),
                    action,
                    "{abi:?} {name} {argument:#x}"
                );
            }
        }
    }
}

#[test]
fn socketcall_is_as_in_dockers_profile() {
    // SYS_SOCKET, SYS_BIND and SYS_SENDMSG of linux/net.h.
    for operation in [1, 2, 16] {
        let got = call("x86_64", Abi::I386, "socketcall", operation);
        assert_eq!(got, ALLOW, "{operation}");
    }
}
