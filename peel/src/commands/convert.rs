//! `peel convert`: images written anew in a lazy format, or back in an ordinary one, without running them.

pub(super) mod format;
pub(super) mod select;

use std::collections::HashMap;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use peel_registry::ImageName;
use peel_writer::Format;

use super::record;
use crate::cli::{ConvertArgs, Global, LazyArgs, ReuseArgs};
use crate::describe::printable;
use crate::progress::Bar;
use peel_convert::plan::Plan;
use peel_convert::{Conversion, How, Outcome, Settings, toc_image};
use select::Selection;

/// How often progress is shown.
const SHOW_EVERY: Duration = Duration::from_millis(200);

/// Converts and pushes; prints the digest of what the target names then.
pub(super) fn run(global: &Global, args: &ConvertArgs) -> anyhow::Result<()> {
    let format = format::any(args)?;
    check_target(&args.target, format)?;
    let mut selection = Selection::open(global, &args.source, &args.platforms)?;
    let record = args
        .estargz_record_in
        .as_ref()
        .or(args.zstdchunked_record_in.as_ref());
    if let Some(path) = record {
        let record = record::read(path)?;
        let paths: Vec<_> = record.accesses.into_iter().map(|access| access.path).collect();
        for part in &mut selection.parts {
            part.plan = Plan::for_every_layer(&paths, part.image.manifest.layers().len());
        }
    }
    let settings = Settings {
        for_every_layer: true,
        planned: record.is_some(),
        ..settings(format, &args.lazy, args.reuse)
    };
    let outcome = convert(global, &selection, &args.target, settings)?;
    report(global, &args.target, &outcome)
}

/// Refuses what cannot be written to, before anything is read or run.
pub(super) fn check_target(target: &str, format: Format) -> anyhow::Result<()> {
    let name = super::image_name(target)?;
    match &name {
        ImageName::Registry(reference) if reference.digest.is_some() => bail!(
            "{target}: a target has no digest: leave @DIGEST out; which one it is, is printed when the image is written"
        ),
        ImageName::Registry(_) | ImageName::Layout { .. } => {}
        ImageName::OciArchive { .. } | ImageName::DockerArchive { .. } => {
            bail!(peel_registry::Error::ReadOnly {
                name: name.to_string()
            })
        }
    }
    if matches!(
        format,
        Format::Estargz {
            external_toc: true,
            ..
        }
    ) {
        toc_image::name(&name)?;
    }
    Ok(())
}

/// The settings from the flags that both commands have.
pub(super) fn settings(format: Format, lazy: &LazyArgs, reuse: ReuseArgs) -> Settings {
    Settings {
        format,
        threads: lazy.estargz_parallelism,
        reuse: reuse.reuse,
        earlier: !reuse.reconvert,
        for_every_layer: false,
        planned: true,
    }
}

/// Converts with progress on a terminal.
pub(super) fn convert(
    global: &Global,
    selection: &Selection,
    target: &str,
    settings: Settings,
) -> anyhow::Result<Outcome> {
    let name = super::image_name(target)?;
    let options = super::client_options(global)?;
    let layers = selection
        .parts
        .iter()
        .flat_map(|part| part.image.manifest.layers());
    // Layers that several platforms share are read once.
    let sizes: HashMap<_, _> = layers.map(|layer| (layer.digest(), layer.size())).collect();
    let total = sizes.values().sum();
    let progress = Arc::new(AtomicU64::new(0));
    let conversion = Conversion {
        source: &selection.open.source,
        parts: &selection.parts,
        index: selection.index.as_deref(),
        target: &name,
        client: &options,
        settings,
        progress: Arc::clone(&progress),
    };
    let converted = selection.open.runtime.block_on(async {
        let mut bar = Bar::new(total);
        let work = conversion.run();
        tokio::pin!(work);
        let mut tick = tokio::time::interval(SHOW_EVERY);
        loop {
            tokio::select! {
                outcome = &mut work => break outcome,
                _ = tick.tick() => bar.set(format!("writing {target}"), progress.load(Ordering::Relaxed), total),
            }
        }
    });
    converted.with_context(|| format!("{target} was not written"))
}

/// The digest and the images beside on standard output, the rest for people on standard error; or everything as JSON.
pub(super) fn report(global: &Global, target: &str, outcome: &Outcome) -> anyhow::Result<()> {
    if global.json {
        return super::print_json(outcome);
    }
    let mut err = std::io::stderr().lock();
    for image in &outcome.images {
        if outcome.images.len() > 1 {
            let platform = image.platform.as_deref().unwrap_or("(no platform)");
            let platform = printable(platform.as_bytes());
            let _ = writeln!(err, "{platform}: {}", image.manifest_digest);
        }
        for (position, layer) in image.layers.iter().enumerate() {
            let how = match layer.how {
                How::Converted => "converted",
                How::Kept => "kept",
                How::Reused => "converted earlier",
            };
            let there = if layer.sent { "" } else { ", was there already" };
            let first = match (layer.prefetch_end, layer.prioritized) {
                (None, _) => String::new(),
                // A layer that was kept: which files those are was decided elsewhere.
                (Some(end), 0) => format!(", {end} bytes first"),
                (Some(end), 1) => format!(", 1 file first ({end} bytes)"),
                (Some(end), files) => format!(", {files} files first ({end} bytes)"),
            };
            let _ = writeln!(
                err,
                "layer {} of {}: {} -> {} bytes, {how}{there}{first}",
                position + 1,
                image.layers.len(),
                layer.source_size,
                layer.size
            );
        }
    }
    let _ = writeln!(err, "{target}");
    drop(err);
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", outcome.manifest_digest)?;
    for name in &outcome.extra_images {
        writeln!(out, "extra image: {name}")?;
    }
    Ok(())
}
