//! The demo image from Debian packages, with no maintainer script run.
//!
//! Called by [`super::make`]. apt works out and downloads the closure of each layer's packages against an empty package
//! status, so the machine's own packages do not matter; `dpkg-deb` gives each package's files as a tar stream; what
//! the scripts would have done and a program needs is done here: merged /usr, the shared users and groups, the
//! alternatives for BLAS and LAPACK, Python's byte code and the linker's cache.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::layers::{self, Plan, listing, with_parents};
use super::{MIN_BYTES, MadeImage, output};

/// The layers: what each is called, and the packages that it adds to those below it.
const LAYERS: &[Stage] = &[
    ("Debian base system", &["?essential"]),
    ("python3", &["python3"]),
    ("numpy", &["python3-numpy", "libopenblas0-pthread"]),
    ("scipy", &["python3-scipy"]),
    ("pandas", &["python3-pandas"]),
];

/// One more layer that the workload does not touch, for releases whose packages alone make a smaller image.
const EXTRA: Stage = (
    "matplotlib and scikit-learn",
    &["python3-matplotlib", "python3-sklearn"],
);

/// Least download that needs no extra layer: gzip makes layers at least a third larger than packages, which use xz.
const ENOUGH: u64 = MIN_BYTES / 4 * 3;

/// What the demo runs: three large imports and a small computation that needs each of them.
const WORKLOAD: &str = "import numpy, scipy, pandas; \
    frame = pandas.DataFrame({'n': numpy.arange(1, 6)}); \
    print('mean', frame.n.mean(), 'det', round(float(numpy.linalg.det(numpy.eye(3) * 2)), 3), \
    'scipy', scipy.__version__)";

/// Libraries that several packages offer, and the directory of the plain implementation beside openblas's.
const ALTERNATIVES: &[(&str, &str)] = &[
    ("libblas.so.3", "blas"),
    ("liblapack.so.3", "lapack"),
    ("libopenblas.so.0", "openblas-serial"),
];

/// Top-level directories that are links into /usr since the merge.
const MERGED: &[&str] = &["bin", "sbin", "lib", "lib32", "lib64", "libx32", "libo32"];

/// Makes the image; an error says why it cannot be made on this machine.
pub(super) fn make(cache: &Path, layout: &Path, say: &dyn Fn(&str)) -> Result<MadeImage> {
    for tool in ["apt-get", "dpkg-deb", "ldconfig"] {
        let found = ["/usr/bin", "/usr/sbin", "/sbin"]
            .iter()
            .any(|dir| Path::new(dir).join(tool).exists());
        ensure!(found, "this is no Debian machine: no {tool}");
    }
    let (apt, mut stages) = Apt::open(cache, say)?;
    say(&format!(
        "Downloading {} Debian packages.",
        stages.iter().map(|stage| stage.1.len()).sum::<usize>()
    ));
    let mut packages = apt.download(LAYERS)?;
    let downloaded: u64 = packages
        .values()
        .filter_map(|file| fs::metadata(file).ok())
        .map(|file| file.len())
        .sum();
    if downloaded < ENOUGH {
        say("They are too few for an ordinary image; downloading some more.");
        let all = [LAYERS, &[EXTRA]].concat();
        stages = apt.stages(&all)?;
        packages = apt.download(&all)?;
    }

    let work = tempfile::Builder::new().prefix("tree-").tempdir_in(cache)?;
    let tree = work.path().join("root");
    say("Unpacking them.");
    for name in MERGED {
        fs::create_dir_all(tree.join("usr").join(name))?;
        symlink(Path::new("usr").join(name), tree.join(name))?;
    }
    let mut owner: BTreeMap<PathBuf, usize> = BTreeMap::new();
    let mut before = BTreeMap::new();
    for (index, (name, stage)) in stages.iter().enumerate() {
        for package in stage {
            let file = packages
                .get(package)
                .with_context(|| format!("{package} was not downloaded"))?;
            unpack(file, &tree)?;
        }
        if index == 0 {
            base_files(&tree)?;
        }
        alternatives(&tree)?;
        // The extra layer is there to be carried, not to be run; compiling it would take most of the time.
        if *name != EXTRA.0 {
            byte_code(&tree)?;
        }
        let after = listing(&tree)?;
        for (path, state) in &after {
            if before.get(path) != Some(state) {
                owner.insert(path.clone(), index);
            }
        }
        before = after;
    }
    output(Command::new("ldconfig").arg("-r").arg(&tree))?;
    let last = stages.len() - 1;
    owner.insert("etc/ld.so.cache".into(), last);
    owner.retain(|path, _| tree.join(path).symlink_metadata().is_ok());
    check(&tree)?;

    let layers = stages
        .iter()
        .enumerate()
        .map(|(index, (name, _))| {
            let own = owner
                .iter()
                .filter(|(_, stage)| **stage == index)
                .map(|(path, _)| path.clone());
            ((*name).to_owned(), with_parents(own))
        })
        .collect();
    let plan = Plan {
        root: tree,
        layers,
        env: vec![
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into(),
            "LANG=C.UTF-8".into(),
        ],
        cmd: vec!["python3".into()],
    };
    let made = MadeImage {
        description: "python3 with numpy, scipy and pandas from Debian packages".into(),
        workload: vec!["python3".into(), "-c".into(), WORKLOAD.into()],
        layer_bytes: 0,
        layers: 0,
        layout: PathBuf::new(),
    };
    let made = layers::write(&plan, layout, made, say)?;
    if made.layer_bytes < MIN_BYTES {
        fs::remove_dir_all(layout)?;
        bail!(
            "the packages of this release make only {} bytes",
            made.layer_bytes
        );
    }
    Ok(made)
}

/// Name of a layer and what it adds.
type Stage = (&'static str, &'static [&'static str]);

/// For each layer its name and the packages that it adds.
type Stages = Vec<(&'static str, BTreeSet<String>)>;

/// apt with a state of its own.
#[derive(Debug)]
struct Apt {
    archives: PathBuf,
    options: Vec<String>,
}

impl Apt {
    /// Finds package lists (the machine's own, else fresh ones in the cache) and plans the layers.
    fn open(cache: &Path, say: &dyn Fn(&str)) -> Result<(Self, Stages)> {
        let archives = cache.join("archives");
        fs::create_dir_all(archives.join("partial"))?;
        let status = cache.join("status");
        fs::write(&status, "")?;
        let mut options: Vec<String> = vec![
            format!("Dir::State::status={}", status.display()),
            format!(
                "Dir::State::extended_states={}",
                cache.join("extended_states").display()
            ),
            format!("Dir::Cache={}", cache.display()),
            format!("Dir::Cache::archives={}", archives.display()),
            "APT::Install-Recommends=false".into(),
            "APT::Sandbox::User=root".into(),
            "Acquire::Retries=3".into(),
            "Acquire::http::Timeout=20".into(),
            "Acquire::https::Timeout=20".into(),
            "Debug::NoLocking=1".into(),
        ];
        let apt = Self {
            archives: archives.clone(),
            options: options.clone(),
        };
        if let Ok(stages) = apt.stages(LAYERS) {
            return Ok((apt, stages));
        }
        say("Fetching package lists.");
        let lists = cache.join("lists");
        fs::create_dir_all(lists.join("partial"))?;
        options.push(format!("Dir::State::lists={}", lists.display()));
        let apt = Self { archives, options };
        output(apt.command().args(["-q", "update"])).context("no Debian mirror answers")?;
        let stages = apt.stages(LAYERS)?;
        Ok((apt, stages))
    }

    fn command(&self) -> Command {
        let mut command = Command::new("apt-get");
        for option in &self.options {
            command.arg("-o").arg(option);
        }
        command
    }

    /// For each layer the packages that it adds, as `NAME_VERSION` in file names.
    fn stages(&self, layers: &[Stage]) -> Result<Stages> {
        let mut wanted: Vec<&str> = Vec::new();
        let mut below: BTreeSet<String> = BTreeSet::new();
        let mut stages = Vec::new();
        for (name, packages) in layers {
            wanted.extend(*packages);
            let plan = output(self.command().args(["-s", "install"]).args(&wanted))?;
            let closure: BTreeSet<String> = plan.lines().filter_map(planned).collect();
            stages.push((*name, closure.difference(&below).cloned().collect()));
            below.extend(closure);
        }
        Ok(stages)
    }

    /// Downloads everything and returns the file of each package by `NAME_VERSION`.
    fn download(&self, layers: &[Stage]) -> Result<BTreeMap<String, PathBuf>> {
        let wanted = layers.iter().flat_map(|(_, packages)| *packages);
        output(self.command().args(["-q", "-y", "-d", "install"]).args(wanted))
            .context("the packages cannot be downloaded")?;
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(&self.archives)? {
            let path = entry?.path();
            // File names look like `NAME_VERSION_ARCHITECTURE.deb`.
            let stem = path
                .file_name()
                .and_then(|name| name.to_str())
                .and_then(|name| name.strip_suffix(".deb"));
            if let Some((name, _)) = stem.and_then(|stem| stem.rsplit_once('_')) {
                files.insert(name.to_owned(), path.clone());
            }
        }
        Ok(files)
    }
}

/// The package of a line `Inst NAME (VERSION ORIGIN [ARCHITECTURE]) ...`, as `NAME_VERSION` in file names.
fn planned(line: &str) -> Option<String> {
    let (name, rest) = line.strip_prefix("Inst ")?.split_once(' ')?;
    let version = rest.split_once('(')?.1.split([' ', ')']).next()?;
    Some(format!("{name}_{}", version.replace(':', "%3a")))
}

/// Unpacks one package's files. Directories that are links here stay links, which merges /lib into /usr/lib.
fn unpack(package: &Path, tree: &Path) -> Result<()> {
    let mut source = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run dpkg-deb")?;
    let stream = source.stdout.take().context("dpkg-deb has no output")?;
    let unpacked = Command::new("tar")
        .args([
            "--extract",
            "--file=-",
            "--numeric-owner",
            "--same-permissions",
            "--keep-directory-symlink",
        ])
        .arg("--directory")
        .arg(tree)
        .stdin(stream)
        .status()
        .context("cannot run tar")?;
    ensure!(
        source.wait()?.success() && unpacked.success(),
        "{} cannot be unpacked",
        package.display()
    );
    Ok(())
}

/// What the scripts of the base packages would have made.
fn base_files(tree: &Path) -> Result<()> {
    for name in ["passwd", "group"] {
        let master = tree.join("usr/share/base-passwd").join(format!("{name}.master"));
        fs::copy(&master, tree.join("etc").join(name))
            .with_context(|| format!("base-passwd has no {name}.master"))?;
    }
    for (link, target) in [("var/run", "/run"), ("var/lock", "/run/lock")] {
        let link = tree.join(link);
        if link.symlink_metadata().is_err() {
            symlink(target, link)?;
        }
    }
    Ok(())
}

/// Links the linear algebra libraries to the best implementation that is there, as update-alternatives does.
fn alternatives(tree: &Path) -> Result<()> {
    let libraries = tree.join("usr/lib");
    for triplet in fs::read_dir(&libraries)?.filter_map(std::result::Result::ok) {
        let name = triplet.file_name();
        let Some(name) = name.to_str().filter(|name| name.contains("-linux-")) else {
            continue;
        };
        for (library, plain) in ALTERNATIVES {
            let best = ["openblas-pthread", plain]
                .into_iter()
                .find(|dir| libraries.join(name).join(dir).join(library).exists());
            let Some(best) = best else { continue };
            let choice = tree.join("etc/alternatives").join(format!("{library}-{name}"));
            let target = format!("/usr/lib/{name}/{best}/{library}");
            link(&choice, Path::new(&target))?;
            let place = libraries.join(name).join(library);
            link(&place, Path::new(&format!("/etc/alternatives/{library}-{name}")))?;
        }
    }
    Ok(())
}

/// Makes or changes a symbolic link; one that is right already is left alone, so that it stays in its layer.
fn link(place: &Path, target: &Path) -> Result<()> {
    if fs::read_link(place).is_ok_and(|old| old == target) {
        return Ok(());
    }
    if place.symlink_metadata().is_ok() {
        fs::remove_file(place)?;
    }
    if let Some(parent) = place.parent() {
        fs::create_dir_all(parent)?;
    }
    symlink(target, place)?;
    Ok(())
}

/// A command that runs in the tree.
fn inside(tree: &Path) -> Command {
    let mut command = Command::new("chroot");
    command
        .arg(tree)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LANG", "C.UTF-8");
    command
}

/// Compiles Python's modules, as the packages' scripts do; files that are compiled already are left alone.
fn byte_code(tree: &Path) -> Result<()> {
    if !tree.join("usr/bin/python3").exists() {
        return Ok(());
    }
    let mut dirs = vec!["/usr/lib/python3".to_owned()];
    for entry in fs::read_dir(tree.join("usr/lib"))?.filter_map(std::result::Result::ok) {
        if let Some(name) = entry
            .file_name()
            .to_str()
            .filter(|name| name.starts_with("python3."))
        {
            dirs.push(format!("/usr/lib/{name}"));
        }
    }
    // Some packages ship files for other versions of Python; those do not compile and are not needed, so the status
    // says nothing. That what the workload needs is there is checked at the end. Python's own parallel mode needs
    // semaphores, which need a mounted /dev/shm; one process for each directory does without.
    let mut running = Vec::new();
    for dir in dirs {
        let child = inside(tree)
            .args(["/usr/bin/python3", "-m", "compileall", "-q", &dir])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot run chroot")?;
        running.push(child);
    }
    for mut child in running {
        child.wait()?;
    }
    Ok(())
}

/// Runs the workload once in the tree.
fn check(tree: &Path) -> Result<()> {
    let text = output(inside(tree).args(["/usr/bin/python3", "-c", WORKLOAD]))
        .context("the workload does not run in the new image")?;
    ensure!(
        text.starts_with("mean 3.0"),
        "the workload said {text:?} in the new image"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_read_from_the_plan_of_apt() {
        let cases = [
            (
                "Inst libc6 (2.36-9 Debian:12.15/oldstable [amd64]) []",
                Some("libc6_2.36-9"),
            ),
            (
                "Inst python3-numpy (1:1.24.2-1 Debian:12.15/oldstable [amd64])",
                Some("python3-numpy_1%3a1.24.2-1"),
            ),
            ("Conf libc6 (2.36-9 Debian:12.15/oldstable [amd64])", None),
            ("Inst broken", None),
            ("", None),
        ];
        for (line, expected) in cases {
            assert_eq!(planned(line).as_deref(), expected, "{line}");
        }
    }

    #[test]
    fn a_link_that_is_right_is_left_alone() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("deep/link");
        link(&place, Path::new("/a")).unwrap();
        let first = place.symlink_metadata().unwrap().ino();
        link(&place, Path::new("/a")).unwrap();
        assert_eq!(place.symlink_metadata().unwrap().ino(), first);
        link(&place, Path::new("/b")).unwrap();
        assert_eq!(fs::read_link(&place).unwrap(), Path::new("/b"));
    }
}
