//! Real files: programs, libraries and texts of the machine's own `/usr` as a tar stream. Called by the benchmarks whose
//! result depends on what compresses how well. Generated text repeats itself across files as no image does.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

/// Directories that the files come from, each a third of the bytes.
const SOURCES: [&str; 3] = ["bin", "lib", "share"];
/// Files above this size would stand for a whole directory.
const FILE_MAX: u64 = 8 << 20;

/// A tar file in `dir` with about `bytes` bytes of files: the first ones by name, the same in every run on the same machine.
/// Fails where there are less than half as many.
pub fn tar_file(dir: &Path, bytes: u64) -> anyhow::Result<PathBuf> {
    let mut names = Vec::new();
    let mut sum = 0;
    for source in SOURCES {
        let mut rest = bytes / SOURCES.len() as u64;
        gather(Path::new(source), &mut rest, &mut sum, &mut names)?;
    }
    ensure!(
        sum >= bytes / 2,
        "/usr has too few files to measure with ({sum} bytes); name a tar file in PEEL_BENCH_TAR"
    );
    let path = dir.join("usr.tar");
    let mut tar = Command::new("tar")
        .args([
            "--create",
            "--directory=/usr",
            "--no-recursion",
            "--null",
            "--files-from=-",
        ])
        .stdin(Stdio::piped())
        .stdout(File::create(&path)?)
        .spawn()
        .context("tar cannot be run")?;
    let mut list = tar.stdin.take().context("tar takes no list")?;
    list.write_all(&names.join(&0))?;
    drop(list);
    let status = tar.wait()?;
    ensure!(status.success(), "tar ended with {status}");
    Ok(path)
}

/// Adds what is below `/usr/NAME`, directories before what is in them, until `rest` bytes are used up.
fn gather(name: &Path, rest: &mut u64, sum: &mut u64, names: &mut Vec<Vec<u8>>) -> anyhow::Result<()> {
    let path = Path::new("/usr").join(name);
    let entries = fs::read_dir(&path).with_context(|| path.display().to_string())?;
    let mut entries = entries.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    names.push(bytes(name.as_os_str()));
    for entry in entries {
        let (name, metadata) = (name.join(entry.file_name()), entry.metadata()?);
        if metadata.is_dir() && *rest > 0 {
            gather(&name, rest, sum, names)?;
        } else if metadata.is_symlink() {
            names.push(bytes(name.as_os_str()));
        } else if metadata.is_file() && metadata.len() <= FILE_MAX.min(*rest) {
            *rest -= metadata.len();
            *sum += metadata.len();
            names.push(bytes(name.as_os_str()));
        }
    }
    Ok(())
}

fn bytes(name: &OsStr) -> Vec<u8> {
    name.as_bytes().to_vec()
}
