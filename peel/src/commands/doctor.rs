//! `peel doctor`: what this machine lacks, why that matters, and what to do about it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use peel_fs::mount::probe::{self, Probe};
use peel_image::layer::{Entry, EntryKind, LayerIndex, Metadata};
use peel_image::path::EntryPath;
use peel_image::tree::Tree;
use peel_store::{Count, Store};
use serde::Serialize;

use crate::cli::Global;
use crate::client::{self, Client};
use crate::describe::{describe, printable};
use crate::store_dir::StoreDir;

/// How much of a thing's absence matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    /// As it should be.
    Ok,
    /// peel works, with less.
    Warning,
    /// peel does not work.
    Missing,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    what: String,
    state: State,
    /// What was found.
    detail: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn ok(what: &str, detail: impl Into<String>) -> Self {
        Self {
            what: what.to_owned(),
            state: State::Ok,
            detail: detail.into(),
            remedy: None,
        }
    }

    fn missing(what: &str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            what: what.to_owned(),
            state: State::Missing,
            detail: detail.into(),
            remedy: Some(remedy.into()),
        }
    }
}

/// Looks at everything; the exit status is 1 if something essential is missing.
pub(super) fn run(global: &Global) -> anyhow::Result<ExitCode> {
    let store_path = std::path::absolute(&global.store).context("store directory")?;
    let mut findings = vec![kernel(), privileges()];
    match StoreDir::make(&store_path).and_then(|_| Ok(Store::open(&store_path)?)) {
        Ok(store) => {
            findings.extend(probes(store.root()));
            findings.push(usage(&store));
            findings.push(space(store.root()));
            findings.push(checks(&store));
        }
        Err(error) => findings.push(Finding::missing(
            "store",
            describe(&error),
            "run peel as root, or choose another directory with --store or PEEL_STORE",
        )),
    }
    findings.push(server(&store_path));

    if global.json {
        super::print_json(&findings)?;
    } else {
        print(&findings)?;
    }
    let missing = findings.iter().any(|finding| finding.state == State::Missing);
    Ok(if missing {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn kernel() -> Finding {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let mut numbers = release
        .split(|char: char| !char.is_ascii_digit())
        .map_while(|number| number.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (6, 13) {
        Finding::ok("kernel", release)
    } else {
        Finding::missing(
            "kernel",
            format!("Linux {release}"),
            "boot Linux 6.13 or newer: EROFS from files needs 6.12, overlay layers given as descriptors 6.13",
        )
    }
}

fn privileges() -> Finding {
    /// CAP_SYS_ADMIN (capabilities(7)).
    const SYS_ADMIN: u64 = 1 << 21;
    let effective = std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
            u64::from_str_radix(line.trim(), 16).ok()
        });
    match effective {
        Some(set) if set & SYS_ADMIN != 0 => Finding::ok("privileges", "CAP_SYS_ADMIN is there"),
        _ => Finding::missing(
            "privileges",
            "CAP_SYS_ADMIN is not there, without which nothing can be mounted",
            "run peel as root",
        ),
    }
}

/// The mounts that serving an image is made of, each tried.
fn probes(store: &Path) -> Vec<Finding> {
    let image = match probe_image(store) {
        Ok(image) => image,
        Err(error) => {
            let detail = describe(&error);
            return vec![Finding::missing(
                "store is writable",
                detail,
                "check the disk below the store",
            )];
        }
    };
    let directory = store.join("tmp");
    let mut found: Vec<Finding> = probe::all(&directory, &image).into_iter().map(finding).collect();
    found.push(access_lists(probe::access_lists(&directory, &image)));
    // It lies below tmp/, which a server empties when it starts.
    let _ = std::fs::remove_file(&image);
    found
}

/// A limit of every kernel so far, and none of the machine's: worth to be told, and no warning.
fn access_lists(probe: Probe) -> Finding {
    match probe.problem {
        None => Finding::ok(probe.what, "works"),
        Some(problem) => Finding {
            what: probe.what.to_owned(),
            state: State::Ok,
            detail: format!("only on what something has changed before ({problem})"),
            remedy: Some(
                "where a program sets access lists (setfacl) on files of the image, let something change the file or directory \
                 first, say `chmod u+r FILE` or `touch DIRECTORY`: the kernel's overlay refuses only what still lies in EROFS. \
                 Lists that the image itself has are kept"
                    .to_owned(),
            ),
        },
    }
}

fn finding(probe: Probe) -> Finding {
    let remedy = match probe.what {
        what if what.contains("EROFS") => {
            "load the module erofs (modprobe erofs); its files as mount sources need Linux 6.12 and \
             CONFIG_EROFS_FS_BACKED_BY_FILE"
        }
        what if what.contains("FUSE") => {
            "load the module fuse (modprobe fuse) and see that /dev/fuse is there"
        }
        what if what.contains("writable") => {
            "put the store on ext4, xfs or btrfs: a writable overlay needs extended attributes and no overlay below"
        }
        what if what.contains("overlay") => {
            "load the module overlay (modprobe overlay); Linux 6.13 or newer is needed"
        }
        _ => "run peel as root on Linux 6.13 or newer, outside of containers that forbid mounts",
    };
    match probe.problem {
        None => Finding::ok(probe.what, "works"),
        Some(problem) => Finding::missing(probe.what, problem, remedy),
    }
}

/// A small EROFS image: an empty directory in the root.
fn probe_image(store: &Path) -> anyhow::Result<PathBuf> {
    let directory = |path| Entry {
        path,
        metadata: Metadata {
            mode: 0o755,
            ..Metadata::default()
        },
        kind: EntryKind::Directory,
    };
    let below = EntryPath::clean(probe::ACCESS_LIST_DIRECTORY.as_bytes())?;
    let tree = Tree::merge(&[LayerIndex {
        entries: vec![directory(EntryPath::root()), directory(below)],
        prefetch_end: None,
    }])?;
    let path = store.join(format!("tmp/probe-{}.erofs", std::process::id()));
    let mut file = std::fs::File::create(&path).with_context(|| path.display().to_string())?;
    peel_store::erofs::write_image(&tree, &mut file)?;
    Ok(path)
}

fn usage(store: &Store) -> Finding {
    let shown = |count: &Count| format!("{} ({} bytes on disk)", count.files, count.disk_bytes);
    match store.usage() {
        Ok(usage) => Finding::ok(
            "store",
            format!(
                "{}: images {}, complete objects {}, partial objects {}",
                store.root().display(),
                usage.images.files,
                shown(&usage.objects),
                shown(&usage.partials)
            ),
        ),
        Err(error) => Finding::missing("store", error.to_string(), "check the disk below the store"),
    }
}

fn space(store: &Path) -> Finding {
    /// Below this, the next image of some size does not fit.
    const LOW: u64 = 1 << 30;
    match rustix::fs::statvfs(store) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let detail = format!("{free} bytes free");
            if free >= LOW {
                Finding::ok("disk", detail)
            } else {
                Finding {
                    what: "disk".to_owned(),
                    state: State::Warning,
                    detail,
                    remedy: Some("make room, or choose another directory with --store".to_owned()),
                }
            }
        }
        Err(error) => Finding::missing("disk", error.to_string(), "check the disk below the store"),
    }
}

/// Images with layers that did not pass the check of the whole layer.
fn checks(store: &Store) -> Finding {
    const WHAT: &str = "checks of whole layers";
    let names = match store.names() {
        Ok(names) => names,
        Err(error) => return Finding::missing(WHAT, error.to_string(), "check the disk below the store"),
    };
    let mut faults = Vec::new();
    for (name, manifest) in &names {
        match peel_fs::image_faults(store, manifest) {
            Ok(found) => faults.extend(
                found
                    .into_iter()
                    .map(|(layer, fault)| format!("{name}: layer {layer}: {fault}")),
            ),
            Err(error) => {
                return Finding::missing(WHAT, describe(&error.into()), "check the disk below the store");
            }
        }
    }
    if faults.is_empty() {
        return Finding::ok(WHAT, format!("nothing wrong was found in {} images", names.len()));
    }
    Finding {
        what: WHAT.to_owned(),
        state: State::Warning,
        // A strange image has its say in these.
        detail: faults
            .iter()
            .map(|fault| printable(fault.as_bytes()))
            .collect::<Vec<_>>()
            .join("\n"),
        remedy: Some(
            "end what still runs from these images: they are not loaded any more, because their tables of contents, or their \
             configurations, do not say what their layers hold. Ask who made them, or make them anew (`peel convert` from the ordinary \
             image). `peel inspect IMAGE` tells more"
                .to_owned(),
        ),
    }
}

fn server(store: &Path) -> Finding {
    let answered = Client::connect_if_running(store)
        .and_then(|client| client.map(|mut client| client.status()).transpose());
    match answered {
        Ok(None) => Finding::ok("server", "not running; the first command that needs it starts it"),
        Ok(Some(status)) => {
            let mut detail = format!(
                "process {} for {} s, {} mounts, {} requests, {} bytes fetched; log: {}",
                status.pid,
                status.uptime.as_secs(),
                status.mounts.len(),
                status.stats.requests,
                status.stats.bytes,
                client::log_path(store).display()
            );
            for mount in &status.mounts {
                let place = mount
                    .dir
                    .as_ref()
                    .map_or_else(|| "a container".to_owned(), |dir| dir.display().to_string());
                detail.push_str(&format!("\n{} at {place}", mount.image));
            }
            Finding::ok("server", detail)
        }
        Err(error) => Finding::missing(
            "server",
            describe(&error),
            format!("look into {}", client::log_path(store).display()),
        ),
    }
}

fn print(findings: &[Finding]) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for finding in findings {
        let state = match finding.state {
            State::Ok => "ok",
            State::Warning => "warning",
            State::Missing => "MISSING",
        };
        let detail = finding.detail.replace('\n', "\n         ");
        writeln!(out, "{state:<8} {}: {detail}", finding.what)?;
        if let Some(remedy) = &finding.remedy {
            writeln!(out, "         what to do: {remedy}")?;
        }
    }
    Ok(())
}
