//! `peel convert`: an image written anew in a lazy format without running it.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use peel_registry::{ResolvedImage, Source, Target};
use tokio::runtime::Runtime;

use super::look::OpenImage;
use super::record;
use crate::cli::{ConvertArgs, EstargzArgs, Global};
use crate::convert::plan::Plan;
use crate::convert::{Conversion, Outcome, Settings};
use crate::progress::Bar;

/// How often progress is shown.
const SHOW_EVERY: Duration = Duration::from_millis(200);

/// Converts and pushes; prints the manifest's digest.
pub(super) fn run(global: &Global, args: &ConvertArgs) -> anyhow::Result<()> {
    let open = OpenImage::open(global, &args.source, args.platform.as_deref())?;
    let plan = match &args.estargz_record_in {
        Some(path) => {
            let record = record::read(path)?;
            let paths: Vec<_> = record.accesses.into_iter().map(|access| access.path).collect();
            Plan::for_every_layer(&paths, open.image.manifest.layers().len())
        }
        None => Plan::default(),
    };
    let settings = settings(&args.layers, false, true);
    let outcome = convert(
        global,
        &open.runtime,
        (&open.source, &open.image),
        &args.target,
        &plan,
        settings,
    )?;
    report(global, &args.target, &outcome)
}

/// The writer's settings from the flags.
pub(super) fn settings(layers: &EstargzArgs, reuse: bool, for_every_layer: bool) -> Settings {
    Settings {
        chunk_size: layers.estargz_chunk_size,
        level: layers.estargz_compression_level,
        reuse,
        for_every_layer,
    }
}

/// Converts with progress on a terminal.
pub(super) fn convert(
    global: &Global,
    runtime: &Runtime,
    (source, image): (&Source, &ResolvedImage),
    target: &str,
    plan: &Plan,
    settings: Settings,
) -> anyhow::Result<Outcome> {
    let name = super::image_name(target)?;
    let options = super::client_options(global)?;
    let total = image
        .manifest
        .layers()
        .iter()
        .map(oci_spec::image::Descriptor::size)
        .sum();
    let progress = Arc::new(AtomicU64::new(0));
    runtime.block_on(async {
        let target_place = Target::open(&name, &options).await?;
        let conversion = Conversion {
            source,
            image,
            target: &target_place,
            plan,
            settings,
            progress: Arc::clone(&progress),
        };
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
    })
    .with_context(|| format!("{target} was not written"))
}

/// The digest on standard output, the rest for people on standard error; or everything as JSON.
pub(super) fn report(global: &Global, target: &str, outcome: &Outcome) -> anyhow::Result<()> {
    if global.json {
        return super::print_json(outcome);
    }
    let mut err = std::io::stderr().lock();
    for (position, layer) in outcome.layers.iter().enumerate() {
        let what = match (layer.kept, layer.was_there) {
            (true, _) => "kept",
            (false, true) => "written, was there already",
            (false, false) => "written",
        };
        let first = match layer.prefetch_end {
            Some(end) => format!(", {} files first ({end} bytes)", layer.prioritized),
            None => String::new(),
        };
        let _ = writeln!(
            err,
            "layer {} of {}: {} -> {} bytes, {what}{first}",
            position + 1,
            outcome.layers.len(),
            layer.source_size,
            layer.size
        );
    }
    let _ = writeln!(err, "{target}");
    drop(err);
    writeln!(std::io::stdout(), "{}", outcome.manifest_digest)?;
    Ok(())
}
