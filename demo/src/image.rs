//! The image that the demo starts: python3 with numpy, scipy and pandas from Debian packages, or what this machine has
//! of Python when no Debian mirror answers.
//!
//! Called by `peel demo`. The result is an OCI layout in the cache directory, made once and used again by the next run.
//! Its layers are ordinary `tar+gzip` ones written by GNU tar, so that nothing of the image was made by the code that
//! is about to be measured. Names of mirrors are neither printed nor stored.
//!
//! Split: [`debian`] and [`host`] each fill a tree and say which layer a path belongs to, [`layers`] writes the layout.

mod debian;
mod host;
mod layers;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Tag of the image in its layout.
pub const TAG: &str = "demo";

/// Least compressed size of all layers, in bytes.
pub const MIN_BYTES: u64 = 200_000_000;

/// Changes whenever the image is made in another way, so that an older one in the cache is not used.
const VERSION: &str = "2";

/// Where the files come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Origin {
    /// Debian packages where a mirror answers, else this machine's files.
    Auto,
    /// Debian packages.
    Debian,
    /// This machine's files.
    Host,
}

/// An image that was made.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct MadeImage {
    /// What is in it, one sentence for people.
    pub description: String,
    /// The program to run in it.
    pub workload: Vec<String>,
    /// Compressed size of all layers, in bytes.
    pub layer_bytes: u64,
    /// Number of layers.
    pub layers: usize,
    /// The OCI layout; not part of the stored form.
    #[serde(skip)]
    pub layout: PathBuf,
}

/// Makes the image, or finds it in `cache`. `say` gets a line for each step that takes time.
pub fn make(cache: &Path, origin: Origin, say: &dyn Fn(&str)) -> Result<MadeImage> {
    fs::create_dir_all(cache)
        .with_context(|| format!("cannot make the cache directory {}", cache.display()))?;
    let steps: &[Origin] = match origin {
        Origin::Auto => &[Origin::Debian, Origin::Host],
        Origin::Debian => &[Origin::Debian],
        Origin::Host => &[Origin::Host],
    };
    let mut failed = None;
    for step in steps {
        let layout = layout_dir(cache, *step);
        if let Some(made) = cached(&layout) {
            say(&format!(
                "Using the image in {}: {}.",
                made.layout.display(),
                made.description
            ));
            return Ok(made);
        }
        let result = match step {
            Origin::Host => host::make(&layout, say),
            _ => debian::make(cache, &layout, say),
        };
        match result {
            Ok(made) => return Ok(made),
            Err(error) => {
                say(&format!("No image this way: {error:#}."));
                failed = Some(error);
            }
        }
    }
    Err(failed.unwrap_or_else(|| anyhow::anyhow!("no way to make an image")))
}

fn layout_dir(cache: &Path, origin: Origin) -> PathBuf {
    let name = if origin == Origin::Host { "host" } else { "debian" };
    cache.join(format!("image-{name}-{VERSION}"))
}

/// The facts of a finished image lie beside its layout's own files.
const FACTS: &str = "peel-demo.json";

fn cached(layout: &Path) -> Option<MadeImage> {
    let text = fs::read(layout.join(FACTS)).ok()?;
    let mut made: MadeImage = serde_json::from_slice(&text).ok()?;
    made.layout = layout.to_path_buf();
    Some(made)
}

/// Runs a program to its end and returns its standard output. The error has the last lines of what it said.
fn output(command: &mut std::process::Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let result = command
        .stdin(std::process::Stdio::null())
        .env("LC_ALL", "C.UTF-8")
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    if !result.status.success() {
        let text = String::from_utf8_lossy(&result.stderr);
        let last: Vec<&str> = text
            .lines()
            .rev()
            .filter(|line| !line.contains("://"))
            .take(2)
            .collect();
        anyhow::bail!("{name} failed ({}): {}", result.status, last.join("; "));
    }
    Ok(String::from_utf8_lossy(&result.stdout).into_owned())
}
