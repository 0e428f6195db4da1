//! What to run: an image's configuration with the user's changes on top, by Docker's rules.
//!
//! [`Process::from_image`] is called by the command; [`crate::Container::create`] takes the result. Nothing here touches
//! the root file system: names of users are looked up inside, by the container's first process.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use oci_spec::image::Config;

use crate::{Error, sys};

/// The search path where an image sets none (Docker's).
pub const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What to run and how; the image's config with the user's changes on top.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Program and arguments.
    pub args: Vec<OsString>,
    /// `NAME=value`.
    pub env: Vec<OsString>,
    /// Working directory inside the root, made if it is missing.
    pub cwd: PathBuf,
    /// `user[:group]` by name or id as in the image's config; empty is root. Names are looked up in the root's
    /// /etc/passwd and /etc/group.
    pub user: String,
    /// Allocate a terminal.
    pub terminal: bool,
    /// Signal that stops it, by the image's config; SIGTERM when not given.
    pub stop_signal: Option<String>,
}

/// What the user asked for beyond the image's configuration; the default changes nothing.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// Replaces the image's entrypoint and with it the image's arguments; an empty list, or one empty string, removes it.
    pub entrypoint: Option<Vec<OsString>>,
    /// Replaces the image's arguments when not empty.
    pub args: Vec<OsString>,
    /// `NAME=value` sets; `NAME` alone takes the caller's own value, or unsets where there is none.
    pub env: Vec<OsString>,
    /// Replaces the working directory.
    pub cwd: Option<PathBuf>,
    /// Replaces the user.
    pub user: Option<String>,
    /// Allocate a terminal.
    pub terminal: bool,
    /// Replaces the signal that stops it.
    pub stop_signal: Option<String>,
}

impl Process {
    /// Merges an image's configuration (none is an empty one) and the user's wishes. Fails when neither names a program.
    pub fn from_image(config: Option<&Config>, overrides: &Overrides) -> Result<Self, Error> {
        let strings = |list: Option<&Vec<String>>| -> Vec<OsString> {
            list.into_iter().flatten().map(OsString::from).collect()
        };
        let image_args = || strings(config.and_then(|config| config.cmd().as_ref()));
        let (entrypoint, args) = match &overrides.entrypoint {
            Some(entrypoint) => {
                let reset = entrypoint.iter().all(|word| word.is_empty());
                (
                    if reset { Vec::new() } else { entrypoint.clone() },
                    overrides.args.clone(),
                )
            }
            None => (
                strings(config.and_then(|config| config.entrypoint().as_ref())),
                if overrides.args.is_empty() {
                    image_args()
                } else {
                    overrides.args.clone()
                },
            ),
        };
        let args: Vec<OsString> = entrypoint.into_iter().chain(args).collect();
        if args.first().is_none_or(|program| program.is_empty()) {
            return Err(Error::NoProgram);
        }
        let mut env = vec![OsString::from(DEFAULT_PATH)];
        if overrides.terminal {
            env.push(OsString::from("TERM=xterm"));
        }
        for entry in strings(config.and_then(|config| config.env().as_ref())) {
            set(&mut env, entry);
        }
        for entry in &overrides.env {
            if entry.as_bytes().contains(&b'=') {
                set(&mut env, entry.clone());
            } else if let Some(value) = std::env::var_os(entry) {
                let mut entry = entry.clone();
                entry.push("=");
                entry.push(value);
                set(&mut env, entry);
            } else {
                env.retain(|present| name(present) != entry.as_bytes());
            }
        }
        let image_cwd = config.and_then(|config| config.working_dir().as_deref());
        let cwd = overrides
            .cwd
            .as_deref()
            .or(image_cwd.map(Path::new))
            .unwrap_or(Path::new("/"));
        let image_user = config.and_then(|config| config.user().clone());
        let image_stop = config.and_then(|config| config.stop_signal().clone());
        Ok(Self {
            args,
            env,
            // A relative directory starts at the root.
            cwd: Path::new("/").join(cwd),
            user: overrides.user.clone().or(image_user).unwrap_or_default(),
            terminal: overrides.terminal,
            stop_signal: overrides.stop_signal.clone().or(image_stop),
        })
    }

    /// Number of the signal that stops it; `None` when [`Process::stop_signal`] is no signal's name.
    pub fn stop_signal_number(&self) -> Option<i32> {
        self.stop_signal
            .as_deref()
            .filter(|name| !name.is_empty())
            .map_or(Some(libc::SIGTERM), signal_number)
    }
}

/// Name of an environment entry.
pub(crate) fn name(entry: &OsStr) -> &[u8] {
    entry
        .as_bytes()
        .split(|byte| *byte == b'=')
        .next()
        .unwrap_or_default()
}

/// Sets an entry in the place of the one with its name, or at the end.
fn set(env: &mut Vec<OsString>, entry: OsString) {
    match env.iter_mut().find(|present| name(present) == name(&entry)) {
        Some(present) => *present = entry,
        None => env.push(entry),
    }
}

/// A signal's number from `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`, in any case, as images write it.
pub fn signal_number(text: &str) -> Option<i32> {
    let (first, last) = sys::realtime_signals();
    if let Ok(number) = text.parse::<i32>() {
        return (1..=last).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let realtime = |start: i32, offset: &str, sign: i32| {
        let offset = if offset.is_empty() {
            0
        } else {
            offset.get(1..)?.parse::<i32>().ok()?
        };
        let number = start.checked_add(sign.checked_mul(offset)?)?;
        (first..=last).contains(&number).then_some(number)
    };
    if let Some(offset) = name.strip_prefix("RTMIN") {
        return (offset.is_empty() || offset.starts_with('+'))
            .then(|| realtime(first, offset, 1))
            .flatten();
    }
    if let Some(offset) = name.strip_prefix("RTMAX") {
        return (offset.is_empty() || offset.starts_with('-'))
            .then(|| realtime(last, offset, -1))
            .flatten();
    }
    SIGNALS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, number)| *number)
}

/// The standard signals, by signal(7).
const SIGNALS: [(&str, i32); 32] = [
    ("ABRT", libc::SIGABRT),
    ("ALRM", libc::SIGALRM),
    ("BUS", libc::SIGBUS),
    ("CHLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("FPE", libc::SIGFPE),
    ("HUP", libc::SIGHUP),
    ("ILL", libc::SIGILL),
    ("INT", libc::SIGINT),
    ("IO", libc::SIGIO),
    ("IOT", libc::SIGIOT),
    ("KILL", libc::SIGKILL),
    ("PIPE", libc::SIGPIPE),
    ("POLL", libc::SIGPOLL),
    ("PROF", libc::SIGPROF),
    ("PWR", libc::SIGPWR),
    ("QUIT", libc::SIGQUIT),
    ("SEGV", libc::SIGSEGV),
    ("STKFLT", libc::SIGSTKFLT),
    ("STOP", libc::SIGSTOP),
    ("SYS", libc::SIGSYS),
    ("TERM", libc::SIGTERM),
    ("TRAP", libc::SIGTRAP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("USR1", libc::SIGUSR1),
    ("USR2", libc::SIGUSR2),
    ("VTALRM", libc::SIGVTALRM),
    ("WINCH", libc::SIGWINCH),
    ("XCPU", libc::SIGXCPU),
];

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::path::Path;

    use oci_spec::image::{Config, ConfigBuilder};

    use super::{DEFAULT_PATH, Overrides, Process, signal_number};
    use crate::Error;

    fn words(list: &[&str]) -> Vec<OsString> {
        list.iter().map(OsString::from).collect()
    }

    fn image(entrypoint: &[&str], cmd: &[&str]) -> Config {
        let owned = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        ConfigBuilder::default()
            .entrypoint(owned(entrypoint))
            .cmd(owned(cmd))
            .env(owned(&["A=1", "B=2"]))
            .working_dir("srv")
            .user("www:data")
            .stop_signal("SIGQUIT")
            .build()
            .unwrap()
    }

    #[test]
    fn arguments_by_dockers_rules() {
        type Row<'a> = (
            &'a [&'a str],
            &'a [&'a str],
            Option<&'a [&'a str]>,
            &'a [&'a str],
            &'a [&'a str],
        );
        let rows: [Row<'_>; 8] = [
            (&["e"], &["c"], None, &[], &["e", "c"]),
            (&["e"], &["c"], None, &["u"], &["e", "u"]),
            (&[], &["c"], None, &[], &["c"]),
            (&[], &["c", "d"], None, &["u"], &["u"]),
            (&["e"], &["c"], Some(&["x"]), &[], &["x"]),
            (&["e"], &["c"], Some(&["x"]), &["u"], &["x", "u"]),
            (&["e"], &["c"], Some(&[""]), &["u"], &["u"]),
            (&["e", "f"], &[], None, &[], &["e", "f"]),
        ];
        for (entrypoint, cmd, asked, args, expected) in rows {
            let overrides = Overrides {
                entrypoint: asked.map(words),
                args: words(args),
                ..Overrides::default()
            };
            let process = Process::from_image(Some(&image(entrypoint, cmd)), &overrides).unwrap();
            assert_eq!(
                process.args,
                words(expected),
                "{entrypoint:?} {cmd:?} {asked:?} {args:?}"
            );
        }
        for (config, entrypoint) in [
            (None, None),
            (Some(image(&["e"], &["c"])), Some(words(&[""]))),
            (Some(image(&[], &[])), None),
        ] {
            let overrides = Overrides {
                entrypoint,
                ..Overrides::default()
            };
            let error = Process::from_image(config.as_ref(), &overrides).unwrap_err();
            assert!(matches!(error, Error::NoProgram));
        }
    }

    #[test]
    fn everything_else_is_the_images_unless_overridden() {
        let config = image(&["e"], &[]);
        let plain = Process::from_image(Some(&config), &Overrides::default()).unwrap();
        assert_eq!(plain.env, words(&[DEFAULT_PATH, "A=1", "B=2"]));
        assert_eq!(plain.cwd, Path::new("/srv"));
        assert_eq!(plain.user, "www:data");
        assert_eq!(plain.stop_signal_number(), Some(libc::SIGQUIT));
        let changed = Process::from_image(
            Some(&config),
            &Overrides {
                env: words(&["B=3", "PATH=/x", "A", "C=", "PEEL_TEST_NOT_SET"]),
                cwd: Some("/y".into()),
                user: Some("0".to_owned()),
                terminal: true,
                stop_signal: Some("9".to_owned()),
                ..Overrides::default()
            },
        )
        .unwrap();
        assert_eq!(changed.env, words(&["PATH=/x", "TERM=xterm", "B=3", "C="]));
        assert_eq!(changed.cwd, Path::new("/y"));
        assert_eq!((changed.user.as_str(), changed.terminal), ("0", true));
        assert_eq!(changed.stop_signal_number(), Some(9));
    }

    #[test]
    fn signals_by_name_and_number() {
        for (text, expected) in [
            ("SIGTERM", Some(15)),
            ("term", Some(15)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(libc::SIGRTMIN() + 3)),
            ("RTMAX-1", Some(libc::SIGRTMAX() - 1)),
            ("SIGRTMIN", Some(libc::SIGRTMIN())),
            ("RTMIN-1", None),
            ("SIGRTMIN+99", None),
            ("0", None),
            ("-3", None),
            ("65", None),
            ("SIG", None),
            ("", None),
        ] {
            assert_eq!(signal_number(text), expected, "{text}");
        }
    }
}
