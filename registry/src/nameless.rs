//! Files that get their name when they are whole: a process that is killed before leaves nothing behind. Blobs of layouts are
//! written so, and what never gets a name: what waits for a registry that takes no pieces, or comes from one that knows no ranges.
//!
//! `O_TMPFILE` and `linkat(2)` where the file system and `/proc` allow it; elsewhere a named temporary file, which goes away when it is
//! dropped but stays when the process is killed.

use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use tempfile::NamedTempFile;

/// What the files are opened by, once more and to be named.
const DESCRIPTORS: &str = "/proc/self/fd";
/// Mode of a file with a name: blobs of a layout are for everyone who may enter its directory.
const NAMED: u32 = 0o644;

/// A file for this user alone, until it is named.
#[derive(Debug)]
pub(crate) enum Nameless {
    /// Without any name.
    Unlinked(File),
    /// With a name that nobody looks for.
    Temporary(NamedTempFile),
}

impl Nameless {
    /// An empty one on the file system of `dir`. Blocks on the disk.
    pub(crate) fn new_in(dir: &Path) -> io::Result<Self> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        if Path::new(DESCRIPTORS).is_dir()
            && let Ok(file) = rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR)
        {
            return Ok(Self::Unlinked(file.into()));
        }
        // What is wrong with the directory, if that is it, is wrong here, too.
        NamedTempFile::new_in(dir).map(Self::Temporary)
    }

    /// Waits until the disk has it.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file().sync_all()
    }

    /// The file once more, which stays when this value and with it the name are gone.
    pub(crate) fn open(&self) -> io::Result<File> {
        self.file().try_clone()
    }

    fn file(&self) -> &File {
        match self {
            Self::Unlinked(file) => file,
            Self::Temporary(file) => file.as_file(),
        }
    }

    /// Where it can be opened once more, as long as this value lives.
    pub(crate) fn path(&self) -> PathBuf {
        match self {
            Self::Unlinked(file) => Path::new(DESCRIPTORS).join(file.as_raw_fd().to_string()),
            Self::Temporary(file) => file.path().to_owned(),
        }
    }

    /// Gives it a name in the directory that it was made in, in place of what has that name. Blocks on the disk.
    pub(crate) fn name(self, path: &Path) -> io::Result<()> {
        self.file().set_permissions(Permissions::from_mode(NAMED))?;
        match self {
            Self::Unlinked(_) => match self.link(path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => self.replace(path),
                result => result,
            },
            Self::Temporary(file) => Ok(file.persist(path).map(drop)?),
        }
    }

    fn link(&self, path: &Path) -> io::Result<()> {
        Ok(rustix::fs::linkat(
            CWD,
            self.path(),
            CWD,
            path,
            AtFlags::SYMLINK_FOLLOW,
        )?)
    }

    /// A link cannot replace anything, so it gets another name first.
    fn replace(&self, path: &Path) -> io::Result<()> {
        let dir = path.parent().unwrap_or(Path::new("."));
        let between = tempfile::Builder::new().make_in(dir, |name| self.link(name))?;
        Ok(between.persist(path).map(drop)?)
    }
}

impl Write for Nameless {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unlinked(file) => file.write(bytes),
            Self::Temporary(file) => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Unlinked(file) => file.flush(),
            Self::Temporary(file) => file.flush(),
        }
    }
}

/// Where a blob waits that gets no name: `TMPDIR`, or, like Podman, a place that is not memory.
pub(crate) fn temporary_directory() -> PathBuf {
    std::env::var_os("TMPDIR")
        .filter(|dir| !dir.is_empty())
        .map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect()
    }

    #[test]
    fn nothing_is_there_before_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().join("blob");
        for content in ["first", "second"] {
            let before = names(dir.path());
            let mut file = Nameless::new_in(dir.path()).unwrap();
            file.write_all(content.as_bytes()).unwrap();
            assert_eq!(names(dir.path()), before, "a kill would leave it");
            assert_eq!(std::fs::read_to_string(file.path()).unwrap(), content);
            file.name(&name).unwrap();
            assert_eq!(names(dir.path()), ["blob"]);
            assert_eq!(std::fs::read_to_string(&name).unwrap(), content);
            let mode = std::fs::metadata(&name).unwrap().permissions().mode();
            assert_eq!(mode & 0o7777, NAMED);
        }
        drop(Nameless::new_in(dir.path()).unwrap());
        assert_eq!(names(dir.path()), ["blob"]);
    }

    #[test]
    fn a_named_file_does_where_there_is_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().join("blob");
        std::fs::write(&name, "what was there").unwrap();
        let mut file = Nameless::Temporary(NamedTempFile::new_in(dir.path()).unwrap());
        file.write_all(b"content").unwrap();
        assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "content");
        file.name(&name).unwrap();
        assert_eq!(std::fs::read_to_string(&name).unwrap(), "content");
        assert_eq!(names(dir.path()), ["blob"]);
        let error = Nameless::new_in(&dir.path().join("none")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
