//! The demo image from this machine's own files, for when no Debian mirror answers: the Python that is installed here
//! with all its modules and the libraries it needs, and other files of /usr up to the size of an ordinary image.
//!
//! Called by [`super::make`]. Nothing is copied: tar reads the files where they are.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::layers::{self, Plan, listing, with_parents};
use super::{MIN_BYTES, MadeImage, output};

/// Modules that the workload imports where they are installed; the standard ones are always there.
const MODULES: &[&str] = &[
    "numpy",
    "scipy",
    "pandas",
    "json",
    "http.client",
    "xml.dom.minidom",
    "sqlite3",
    "asyncio",
    "unittest",
    "decimal",
];

/// Where other files come from, in this order.
const FILLERS: &[&str] = &["usr/lib", "usr/share", "usr/bin", "usr/libexec", "usr/include"];

/// Assumed ratio of gzip for files that were not compressed yet: deliberately high, so that enough is taken.
const GZIP_RATIO: u64 = 4;

/// Makes the image.
pub(super) fn make(layout: &Path, say: &dyn Fn(&str)) -> Result<MadeImage> {
    let python = ["/usr/bin/python3", "/usr/local/bin/python3"]
        .into_iter()
        .find(|path| Path::new(path).exists());
    let Some(python) = python else {
        bail!("there is no Debian mirror and no python3 on this machine; install python3");
    };
    let available: Vec<&str> = MODULES
        .iter()
        .copied()
        .filter(|module| output(Command::new(python).args(["-c", &format!("import {module}")])).is_ok())
        .collect();
    let workload = format!(
        "import {}; print('imported', {})",
        available.join(", "),
        available.len()
    );
    // Every file that Python has open or mapped after the imports, by its own account.
    let script = format!(
        "import sys; {}\nfor m in list(sys.modules.values()):\n f = getattr(m, '__file__', None)\n \
         if f: print(f)\nfor l in open('/proc/self/maps'):\n p = l.split(None, 5)\n \
         if len(p) > 5 and p[5].startswith('/'): print(p[5].strip())\nprint(sys.executable)\n\
         for p in sys.path:\n print(p)",
        format_args!("import {}", available.join(", "))
    );
    let text = output(Command::new(python).args(["-c", &script])).context("python3 does not run")?;

    let mut program = BTreeSet::new();
    let mut modules = BTreeSet::new();
    for name in [
        "bin",
        "sbin",
        "lib",
        "lib64",
        "tmp",
        "etc/ld.so.cache",
        "etc/passwd",
        "etc/group",
    ] {
        if Path::new("/").join(name).symlink_metadata().is_ok() {
            program.insert(PathBuf::from(name));
        }
    }
    add(python.as_ref(), &mut program)?;
    // The program interpreter is a name of its own beside the file that is mapped.
    for line in output(Command::new("ldd").arg(python))?.lines() {
        for word in line.split_whitespace().filter(|word| word.starts_with('/')) {
            add(word.as_ref(), &mut program)?;
        }
    }
    for line in text.lines().filter(|line| line.starts_with('/')) {
        let path = Path::new(line);
        if path.is_dir() {
            let relative = relative(&fs::canonicalize(path)?);
            // A directory of modules; never a home directory or the root.
            if !relative.starts_with("usr/lib") && !relative.starts_with("usr/local/lib") {
                continue;
            }
            modules.extend(listing(path)?.into_keys().map(|name| relative.join(name)));
            add(path, &mut modules)?;
        } else if path.is_file() {
            add(
                path,
                if line.contains("/python3") {
                    &mut modules
                } else {
                    &mut program
                },
            )?;
        }
    }
    // A mapped file shows under its full name; programs ask for it by a link such as libz.so.1.
    let libraries: BTreeSet<PathBuf> = program
        .iter()
        .filter_map(|path| path.parent())
        .filter(|dir| dir.starts_with("usr/lib"))
        .map(Into::into)
        .collect();
    for dir in libraries {
        for entry in fs::read_dir(Path::new("/").join(&dir))?.filter_map(std::result::Result::ok) {
            let target = fs::canonicalize(entry.path()).map(|target| relative(&target));
            if target.is_ok_and(|target| program.contains(&target)) {
                program.insert(dir.join(entry.file_name()));
            }
        }
    }
    let mut size = weight(&program) + weight(&modules);
    let mut layers = vec![
        ("program and libraries".to_owned(), with_parents(program)),
        ("Python modules".to_owned(), with_parents(modules)),
    ];
    for filler in FILLERS {
        if size / GZIP_RATIO >= MIN_BYTES {
            break;
        }
        let mut other = BTreeSet::new();
        for name in listing(&Path::new("/").join(filler))
            .unwrap_or_default()
            .into_keys()
        {
            if size / GZIP_RATIO >= MIN_BYTES {
                break;
            }
            let path = Path::new(filler).join(name);
            if !layers.iter().any(|(_, paths)| paths.contains(&path)) {
                size += path_size(&path);
                other.insert(path);
            }
        }
        if !other.is_empty() {
            layers.push((format!("other files of /{filler}"), with_parents(other)));
        }
    }
    let plan = Plan {
        root: PathBuf::from("/"),
        layers,
        env: vec!["PATH=/usr/local/bin:/usr/bin:/bin".into(), "LANG=C.UTF-8".into()],
        cmd: vec![python.into()],
    };
    let made = MadeImage {
        description: format!("this machine's python3 with {}", available.join(", ")),
        workload: vec![python.into(), "-c".into(), workload],
        layer_bytes: 0,
        layers: 0,
        layout: PathBuf::new(),
    };
    let made = layers::write(&plan, layout, made, say)?;
    if made.layer_bytes < MIN_BYTES {
        say(&format!(
            "This machine has too few files: the image is only {} bytes.",
            made.layer_bytes
        ));
    }
    Ok(made)
}

/// A path as it stands in the image.
fn relative(path: &Path) -> PathBuf {
    path.strip_prefix("/").unwrap_or(path).to_path_buf()
}

/// Adds a file under its real name, and every symbolic link on the way to it.
fn add(path: &Path, set: &mut BTreeSet<PathBuf>) -> Result<()> {
    let mut current = path.to_path_buf();
    // Eight links are more than any library has; the kernel itself gives up at forty.
    for _ in 0..8 {
        let dir = current
            .parent()
            .and_then(|parent| fs::canonicalize(parent).ok())
            .unwrap_or_default();
        let Some(name) = current.file_name() else {
            return Ok(());
        };
        let real = dir.join(name);
        set.insert(relative(&real));
        match fs::read_link(&real) {
            Ok(target) => current = dir.join(target),
            Err(_) => return Ok(()),
        }
    }
    bail!("too many symbolic links at {}", path.display())
}

fn path_size(path: &Path) -> u64 {
    let metadata = Path::new("/").join(path).symlink_metadata();
    metadata
        .ok()
        .filter(fs::Metadata::is_file)
        .map_or(0, |metadata| metadata.len())
}

fn weight(paths: &BTreeSet<PathBuf>) -> u64 {
    paths.iter().map(|path| path_size(path)).sum()
}
