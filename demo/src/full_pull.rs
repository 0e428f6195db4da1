//! The ordinary way to start a container, done well: what lazy starts are compared with.
//!
//! Called by [`super::run`]. All layers are downloaded at once, each is decompressed and unpacked while it comes, and
//! checked against its digest; the root file system is a plain overlay of the unpacked directories; the sandbox is the
//! same as that of `peel run`. GNU tar unpacks, because it has been hardened against hostile archives.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio as ProcessStdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use peel_image::compression::{Guard, decoder};
use peel_registry::document::container_config;
use peel_registry::{Blob, ByteStream, ClientOptions, ImageName, Source};
use peel_sandbox::{Container, Exit, Isolation, Network, Overrides, Process, Stdio};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// Largest configuration, in bytes.
const CONFIG_LIMIT: u64 = 4 << 20;

/// An image that was pulled and unpacked.
#[derive(Debug)]
pub(super) struct Unpacked {
    /// One directory for each layer, lowest first.
    layers: Vec<PathBuf>,
    /// The configuration.
    config: String,
    /// When the manifest was known, since the pull began.
    pub(super) resolved: Duration,
}

/// Pulls `name` and unpacks its layers below `dir`.
pub(super) fn pull(name: &str, options: &ClientOptions, dir: &Path) -> Result<Unpacked> {
    let begin = Instant::now();
    let name: ImageName = name.parse()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let source = runtime.block_on(Source::open(&name, options))?;
    let image = runtime.block_on(source.resolve(None))?;
    let resolved = begin.elapsed();
    let handle = runtime.handle();
    let (layers, config) = std::thread::scope(|scope| -> Result<_> {
        let mut workers = Vec::new();
        for (index, descriptor) in image.manifest.layers().iter().enumerate() {
            let blob = source.blob(descriptor)?;
            let target = dir.join(index.to_string());
            fs::create_dir_all(&target)?;
            let thread = std::thread::Builder::new().name(format!("unpack-{index}"));
            workers.push(thread.spawn_scoped(scope, move || -> Result<PathBuf> {
                unpack(&blob, handle, &target).with_context(|| format!("layer {}", blob.digest()))?;
                Ok(target)
            })?);
        }
        let blob = source.blob(image.manifest.config())?;
        let config = handle.block_on(blob.read_verified(CONFIG_LIMIT))?;
        let mut layers = Vec::new();
        for worker in workers {
            layers.push(
                worker
                    .join()
                    .map_err(|_| anyhow::anyhow!("an unpacking thread panicked"))??,
            );
        }
        Ok((layers, config))
    })?;
    Ok(Unpacked {
        layers,
        config: String::from_utf8_lossy(&config).into_owned(),
        resolved,
    })
}

/// Downloads one layer through decompression into tar.
fn unpack(blob: &Blob, handle: &tokio::runtime::Handle, target: &Path) -> Result<()> {
    let stream = handle.block_on(blob.stream_verified())?;
    let download = Download {
        stream,
        handle: handle.clone(),
        part: Bytes::new(),
    };
    let (_, mut plain) = decoder(download, Guard::default())?;
    let mut tar = Command::new("tar")
        .args([
            "--extract",
            "--file=-",
            "--numeric-owner",
            "--same-permissions",
            "--same-owner",
        ])
        .args([
            "--xattrs",
            "--xattrs-include=*",
            "--delay-directory-restore",
            "--verbose",
            "--quoting-style=literal",
        ])
        .arg("--directory")
        .arg(target)
        .stdin(ProcessStdio::piped())
        .stdout(ProcessStdio::piped())
        .env("LC_ALL", "C")
        .spawn()
        .context("cannot run tar")?;
    let mut input = tar.stdin.take().context("tar has no input")?;
    let names = tar.stdout.take().context("tar has no output")?;
    let reader = std::thread::Builder::new()
        .name("unpack-names".into())
        .spawn(move || whiteouts_in(BufReader::new(names)))?;
    let copied = copy(&mut plain, &mut input);
    drop(input);
    let whiteouts = reader
        .join()
        .map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    let status = tar.wait()?;
    copied?;
    ensure!(status.success(), "tar failed ({status})");
    for whiteout in whiteouts {
        apply(target, &whiteout).with_context(|| format!("whiteout {}", whiteout.display()))?;
    }
    Ok(())
}

fn copy(from: &mut dyn Read, to: &mut dyn Write) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 18];
    loop {
        let length = from.read(&mut buffer)?;
        match buffer.get(..length) {
            Some(bytes) if !bytes.is_empty() => to.write_all(bytes)?,
            _ => return Ok(()),
        }
    }
}

/// A layer as it comes, for code that blocks.
struct Download {
    stream: ByteStream,
    handle: tokio::runtime::Handle,
    part: Bytes,
}

impl Read for Download {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.part.is_empty() {
            match self.handle.block_on(self.stream.next()) {
                Some(part) => self.part = part.map_err(io::Error::other)?,
                None => return Ok(0),
            }
        }
        let length = buffer.len().min(self.part.len());
        let part = self.part.split_to(length);
        if let Some(start) = buffer.get_mut(..length) {
            start.copy_from_slice(&part);
        }
        Ok(length)
    }
}

/// The names of whiteouts among those that tar prints.
fn whiteouts_in(mut names: impl BufRead) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut line = Vec::new();
    while names.read_until(b'\n', &mut line)? > 0 {
        let name = line.strip_suffix(b"\n").unwrap_or(&line);
        let path = PathBuf::from(std::ffi::OsString::from_vec(name.to_vec()));
        if path
            .file_name()
            .is_some_and(|name| name.as_bytes().starts_with(b".wh."))
        {
            found.push(path);
        }
        line.clear();
    }
    Ok(found)
}

/// Turns a whiteout of the tar format into one of overlayfs. The directory is opened so that no symbolic link of the
/// layer leads out of it.
fn apply(root: &Path, whiteout: &Path) -> Result<()> {
    let root = rustix::fs::open(
        root,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let relative: PathBuf = whiteout
        .components()
        .filter(|part| matches!(part, std::path::Component::Normal(_)))
        .collect();
    let (Some(parent), Some(name)) = (relative.parent(), relative.file_name()) else {
        return Ok(());
    };
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let dir = rustix::fs::openat2(root, parent, flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
    rustix::fs::unlinkat(&dir, name, AtFlags::empty())?;
    if name == ".wh..wh..opq" {
        rustix::fs::fsetxattr(
            &dir,
            "trusted.overlay.opaque",
            b"y",
            rustix::fs::XattrFlags::empty(),
        )?;
    } else if let Some(hidden) = name
        .as_bytes()
        .strip_prefix(b".wh.")
        .filter(|name| !name.is_empty())
    {
        rustix::fs::mknodat(&dir, hidden, FileType::CharacterDevice, Mode::empty(), 0)?;
    }
    Ok(())
}

/// How one start went. Times are seconds since the start began.
#[derive(Debug, Clone)]
pub(super) struct Started {
    pub(super) mounted: Duration,
    pub(super) ready: Option<Duration>,
    pub(super) total: Duration,
    pub(super) output: Vec<u8>,
}

impl Unpacked {
    /// Mounts a plain overlay of the directories, detached. `scratch` is made anew for the writable layer.
    fn mount(&self, scratch: &Path) -> Result<OwnedFd> {
        if scratch.exists() {
            fs::remove_dir_all(scratch)?;
        }
        let (upper, work) = (scratch.join("upper"), scratch.join("work"));
        for dir in [&upper, &work] {
            fs::create_dir_all(dir)?;
        }
        let overlay = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        for layer in self.layers.iter().rev() {
            rustix::mount::fsconfig_set_string(overlay.as_fd(), "lowerdir+", layer)?;
        }
        rustix::mount::fsconfig_set_string(overlay.as_fd(), "upperdir", &upper)?;
        rustix::mount::fsconfig_set_string(overlay.as_fd(), "workdir", &work)?;
        rustix::mount::fsconfig_create(overlay.as_fd())?;
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        Ok(rustix::mount::fsmount(
            overlay.as_fd(),
            flags,
            MountAttrFlags::empty(),
        )?)
    }

    /// Runs a program in it; `begin` is when the start began. An error when the program does not end with 0.
    pub(super) fn start(&self, command: &[String], scratch: &Path, begin: Instant) -> Result<Started> {
        let root = self.mount(scratch).context("overlay of the unpacked layers")?;
        let mounted = begin.elapsed();
        let overrides = Overrides {
            args: command.iter().map(Into::into).collect(),
            ..Overrides::default()
        };
        let config = container_config(self.config.as_bytes())
            .map_err(|reason| anyhow::anyhow!("configuration of the image: {reason}"))?;
        let process = Process::from_image(config.as_ref(), &overrides)?;
        let isolation = Isolation {
            network: Network::Host,
            hostname: "demo".into(),
            binds: Vec::new(),
            read_only: false,
        };
        let (reader, writer) = io::pipe()?;
        let stdio = Stdio {
            stdin: None,
            stdout: writer.into(),
            stderr: io::stderr().as_fd().try_clone_to_owned()?,
        };
        let mut container = Container::create(root, &process, &isolation, stdio)?;
        let output = std::thread::Builder::new()
            .name("demo-output".into())
            .spawn(move || read_output(reader, begin))?;
        container.start()?;
        let exit = container.wait()?;
        let total = begin.elapsed();
        drop(container);
        let (ready, output) = output
            .join()
            .map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        ensure!(exit == Exit::Code(0), "the program ended with {exit:?}");
        Ok(Started {
            mounted,
            ready,
            total,
            output,
        })
    }
}

/// Reads everything, and notes when the first byte came.
pub(super) fn read_output(mut from: impl Read, begin: Instant) -> io::Result<(Option<Duration>, Vec<u8>)> {
    let mut output = vec![0];
    let ready = match from.read(&mut output)? {
        0 => {
            output.clear();
            None
        }
        _ => Some(begin.elapsed()),
    };
    from.read_to_end(&mut output)?;
    Ok((ready, output))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whiteouts_are_found_by_their_last_component() {
        let list = b"a/\na/.wh.b\n.wh.c\na/.wh..wh..opq\n.wh.d/e\nx\n";
        let found = whiteouts_in(&list[..]).unwrap();
        let expected: Vec<PathBuf> = ["a/.wh.b", ".wh.c", "a/.wh..wh..opq"].map(PathBuf::from).into();
        assert_eq!(found, expected);
    }

    #[test]
    fn output_and_the_time_of_its_first_byte() {
        let (ready, output) = read_output(&b"text"[..], Instant::now()).unwrap();
        assert!(ready.is_some() && output == b"text");
        let (ready, output) = read_output(&b""[..], Instant::now()).unwrap();
        assert!(ready.is_none() && output.is_empty());
    }

    #[test]
    fn a_whiteout_does_not_follow_a_link_out_of_its_layer() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
        for path in [&root, &outside] {
            fs::create_dir(path).unwrap();
        }
        fs::write(outside.join(".wh.victim"), "").unwrap();
        std::os::unix::fs::symlink(&outside, root.join("link")).unwrap();
        assert!(apply(&root, Path::new("link/.wh.victim")).is_err());
        assert!(outside.join(".wh.victim").exists());
    }
}
