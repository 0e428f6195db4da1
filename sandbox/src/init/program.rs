//! Finds the container's program and becomes it.
//!
//! Called by the first process as its last step, with the rights of the container's user.

use std::ffi::{CString, OsString};
use std::os::unix::ffi::OsStringExt;

use rustix::fs::{Access, AtFlags, CWD, FileType};
use rustix::io::Errno;

use super::c_string;
use crate::process::{DEFAULT_PATH, name};
use crate::sys;
use crate::wire::{Failure, Kind};

/// A program that exists, with everything `execve` takes.
#[derive(Debug)]
pub(super) struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    /// Looks the first argument up: as a path when it holds a `/`, else in the `PATH` of its own environment.
    pub(super) fn find(args: &[Vec<u8>], env: Vec<OsString>) -> Result<Self, Failure> {
        let wanted = args.first().cloned().unwrap_or_default();
        let search = env
            .iter()
            .find(|entry| name(entry) == b"PATH")
            .map_or(DEFAULT_PATH.as_bytes(), |entry| entry.as_encoded_bytes());
        let candidates: Vec<Vec<u8>> = if wanted.contains(&b'/') {
            vec![wanted.clone()]
        } else {
            let directories = search.get(b"PATH=".len()..).unwrap_or_default();
            let join = |directory: &[u8]| {
                // An empty element is the working directory.
                let directory = if directory.is_empty() {
                    b".".as_slice()
                } else {
                    directory
                };
                [directory, b"/", &wanted].concat()
            };
            directories.split(|byte| *byte == b':').map(join).collect()
        };
        let mut refused = None;
        for candidate in candidates {
            let path = c_string(candidate)?;
            match check(&path) {
                Ok(()) => {
                    return Ok(Self {
                        path,
                        args: args.iter().cloned().map(c_string).collect::<Result<_, _>>()?,
                        env: env
                            .into_iter()
                            .map(|entry| c_string(entry.into_vec()))
                            .collect::<Result<_, _>>()?,
                    });
                }
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                Err(error) => refused = Some(error),
            }
        }
        let shown = String::from_utf8_lossy(&wanted);
        Err(match refused {
            Some(error) => Failure::new(Kind::NotExecutable, shown, error.raw_os_error()),
            None if wanted.contains(&b'/') => {
                Failure::new(Kind::NotFound, "the file does not exist", libc::ENOENT)
            }
            None => Failure::new(
                Kind::NotFound,
                format!("searched {}", String::from_utf8_lossy(search)),
                libc::ENOENT,
            ),
        })
    }

    /// Becomes the program; returns only with the reason why not.
    pub(super) fn exec(self) -> Failure {
        let error = sys::exec(&self.path, &self.args, &self.env);
        let shown = self.path.to_string_lossy().into_owned();
        match error.raw_os_error() {
            // It was there a moment ago: what is missing is what its first line or its ELF header names.
            Some(libc::ENOENT) => Failure::new(
                Kind::NotFound,
                format!("{shown} is there, the interpreter that it names is not"),
                libc::ENOENT,
            ),
            errno => Failure::new(Kind::NotExecutable, shown, errno.unwrap_or(0)),
        }
    }
}

/// Whether a path is a regular file that this user may execute.
fn check(path: &CString) -> Result<(), Errno> {
    let found = rustix::fs::stat(path.as_c_str())?;
    match FileType::from_raw_mode(found.st_mode) {
        FileType::RegularFile => {
            rustix::fs::accessat(CWD, path.as_c_str(), Access::EXEC_OK, AtFlags::EACCESS)
        }
        FileType::Directory => Err(Errno::ISDIR),
        _ => Err(Errno::ACCESS),
    }
}
