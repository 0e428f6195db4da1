//! `peel inspect`: how each layer of an image is kept. Only the ends of the blobs are fetched.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::Context;
use oci_spec::image::Descriptor;
use peel_image::Digest;
use peel_image::lazy::Over;
use serde::Serialize;

use super::look::OpenImage;
use crate::cli::{Global, InspectArgs};
use crate::layers::{self, Examined, Format, Origin, TocState};

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    image: String,
    manifest_digest: Digest,
    media_type: String,
    /// Compressed bytes of all layers.
    size: u64,
    annotations: BTreeMap<String, String>,
    layers: Vec<LayerReport>,
}

#[derive(Debug, Serialize)]
struct LayerReport {
    digest: String,
    media_type: String,
    size: u64,
    format: Format,
    lazy: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_lazy: Option<String>,
    toc: TocState,
    /// What told where the TOC is.
    #[serde(skip_serializing_if = "Option::is_none")]
    toc_origin: Option<Origin>,
    #[serde(skip_serializing_if = "Option::is_none")]
    entries: Option<usize>,
    /// Bytes that are fetched first.
    #[serde(skip_serializing_if = "Option::is_none")]
    prefetch_bytes: Option<u64>,
    annotations: BTreeMap<String, String>,
}

/// Prints it.
pub(super) fn run(global: &Global, args: &InspectArgs) -> anyhow::Result<()> {
    let open = OpenImage::open(global, &args.image, args.platform.as_deref())?;
    let manifest = &open.image.manifest;
    let beside = open.beside();
    let mut layers = Vec::new();
    let examined: Vec<_> = manifest
        .layers()
        .iter()
        .cloned()
        .map(|descriptor| {
            let (source, beside) = (open.source.clone(), beside.clone());
            open.runtime.spawn(async move {
                let blob = source.blob(&descriptor)?;
                let examined = layers::examine(&blob, &descriptor, &beside).await?;
                Ok::<_, peel_registry::Error>((descriptor, examined))
            })
        })
        .collect();
    for task in examined {
        let (descriptor, examined) = open.runtime.block_on(task).context("task")??;
        layers.push(layer_report(&descriptor, examined));
    }
    let report = Report {
        image: args.image.clone(),
        manifest_digest: open.image.manifest_digest,
        media_type: open.image.media_type.clone(),
        size: layers.iter().map(|layer| layer.size).sum(),
        annotations: sorted(manifest.annotations().as_ref()),
        layers,
    };
    if global.json {
        super::print_json(&report)
    } else {
        Ok(print(&report)?)
    }
}

fn sorted(annotations: Option<&std::collections::HashMap<String, String>>) -> BTreeMap<String, String> {
    annotations
        .into_iter()
        .flatten()
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

fn layer_report(descriptor: &Descriptor, examined: Examined) -> LayerReport {
    let (index, not_lazy) = match examined.index {
        Ok(index) => (Some(index), None),
        Err(reason) => (None, Some(reason.to_string())),
    };
    LayerReport {
        digest: descriptor.digest().to_string(),
        media_type: descriptor.media_type().to_string(),
        size: descriptor.size(),
        format: examined.format,
        lazy: index.is_some(),
        not_lazy,
        toc: examined.toc,
        toc_origin: examined.origin,
        entries: index.as_ref().map(|index| index.entries.len()),
        prefetch_bytes: index.as_ref().and_then(|index| index.prefetch_end),
        annotations: sorted(descriptor.annotations().as_ref()),
    }
}

fn print(report: &Report) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "image:    {}", report.image)?;
    writeln!(
        out,
        "manifest: {} ({})",
        report.manifest_digest, report.media_type
    )?;
    writeln!(
        out,
        "size:     {} bytes in {} layers",
        report.size,
        report.layers.len()
    )?;
    print_annotations(&mut out, "", &report.annotations)?;
    for (position, layer) in report.layers.iter().enumerate() {
        writeln!(out)?;
        writeln!(
            out,
            "layer {} of {}: {}",
            position + 1,
            report.layers.len(),
            layer.digest
        )?;
        writeln!(
            out,
            "  format:   {}, {} bytes ({})",
            layer.format, layer.size, layer.media_type
        )?;
        match &layer.not_lazy {
            None => writeln!(out, "  lazy:     yes")?,
            Some(reason) => writeln!(out, "  lazy:     no: {reason}")?,
        }
        let origin = match layer.toc_origin {
            Some(Origin::Annotation) => "; its place is in an annotation",
            Some(Origin::Footer) => "; its place is in the footer",
            Some(Origin::ImageBeside) => "; it is in the image beside this one",
            None => "",
        };
        match layer.toc {
            TocState::None => {}
            TocState::Verified { digest, over } => {
                let over = match over {
                    Over::Json => "",
                    Over::Compressed => " (compressed)",
                    Over::Both => " (and so is that of its compressed form)",
                };
                writeln!(out, "  TOC:      {digest}, as the manifest says{over}{origin}")?;
            }
            TocState::NotVouchedFor { digest } => {
                writeln!(out, "  TOC:      {digest}, the manifest says nothing{origin}")?;
            }
            TocState::Differs { digest, annotated } => {
                writeln!(
                    out,
                    "  TOC:      {digest}, but the manifest says {annotated}{origin}"
                )?;
            }
        }
        if let Some(entries) = layer.entries {
            writeln!(out, "  entries:  {entries}")?;
            match layer.prefetch_bytes {
                Some(bytes) => writeln!(out, "  prefetch: {bytes} bytes")?,
                None => writeln!(out, "  prefetch: nothing")?,
            }
        }
        print_annotations(&mut out, "  ", &layer.annotations)?;
    }
    Ok(())
}

fn print_annotations(
    out: &mut impl Write,
    indent: &str,
    all: &BTreeMap<String, String>,
) -> std::io::Result<()> {
    for (name, value) in all {
        writeln!(out, "{indent}{name} = {}", value.escape_debug())?;
    }
    Ok(())
}
