//! `peel inspect`: how each layer of an image is kept, and what the store's checks of whole layers came to. Only the ends of the
//! blobs are fetched, and the configuration if there is a store.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::Context;
use oci_spec::image::Descriptor;
use peel_image::Digest;
use peel_image::annotations::LAYER_DIGEST;
use peel_image::lazy::Over;
use serde::Serialize;

use super::checks::{Check, checks};
use super::look::OpenImage;
use crate::cli::{Global, InspectArgs};
use crate::describe::printable;
use peel_layers::{Examined, Format, Origin, TocState, annotation};

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
    check: Check,
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
                let examined = match peel_layers::examine(&blob, &descriptor, &beside).await {
                    Ok(examined) => Ok(examined),
                    // The other layers are worth a look all the same.
                    Err(error @ peel_registry::Error::Foreign { .. }) => Err(error.to_string()),
                    Err(error) => return Err(error),
                };
                Ok((descriptor, examined))
            })
        })
        .collect();
    let checks = checks(global, &open);
    for (position, task) in examined.into_iter().enumerate() {
        let (descriptor, examined) = open.runtime.block_on(task).context("task")??;
        let check = checks.get(position).cloned().unwrap_or(Check::NotYet);
        layers.push(layer_report(&descriptor, examined, check));
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

fn layer_report(descriptor: &Descriptor, examined: Result<Examined, String>, check: Check) -> LayerReport {
    let (format, toc, toc_origin, index) = match examined {
        Ok(Examined {
            format,
            toc,
            origin,
            index,
            ..
        }) => (format, toc, origin, index.map_err(|reason| reason.to_string())),
        Err(reason) => (Format::Unknown, TocState::None, None, Err(reason)),
    };
    // Anything else than a digest would be a stranger's words on a terminal.
    let toc_of = annotation(descriptor, LAYER_DIGEST).and_then(|layer| layer.parse::<Digest>().ok());
    let (index, not_lazy) = match (index, toc_of) {
        (Ok(index), _) => (Some(index), None),
        (Err(_), Some(layer)) if matches!(toc, TocState::None) => {
            let reason =
                format!("it is the table of contents of the layer {layer}, for the image beside this one");
            (None, Some(reason))
        }
        (Err(reason), _) => (None, Some(reason)),
    };
    LayerReport {
        digest: descriptor.digest().to_string(),
        media_type: descriptor.media_type().to_string(),
        size: descriptor.size(),
        format,
        lazy: index.is_some(),
        not_lazy,
        toc,
        toc_origin,
        entries: index.as_ref().map(|index| index.entries.len()),
        prefetch_bytes: index.as_ref().and_then(|index| index.prefetch_end),
        check,
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
        "size:     {} bytes in {} {}",
        report.size,
        report.layers.len(),
        if report.layers.len() == 1 {
            "layer"
        } else {
            "layers"
        }
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
            layer.format,
            layer.size,
            printable(layer.media_type.as_bytes())
        )?;
        match &layer.not_lazy {
            None => writeln!(out, "  lazy:     yes")?,
            Some(reason) => writeln!(out, "  lazy:     no: {}", printable(reason.as_bytes()))?,
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
        let on = |when: &Option<String>| when.as_ref().map_or(String::new(), |when| format!(" on {when}"));
        match &layer.check {
            Check::NotYet => writeln!(out, "  checked:  not as a whole yet")?,
            Check::Verified { when, blob } => {
                let how = match blob {
                    true => "",
                    false => ", by its files and tar headers (the blob was not hashed)",
                };
                writeln!(out, "  checked:  right as a whole{}{how}", on(when))?;
            }
            Check::Failed { when, fault } => {
                writeln!(
                    out,
                    "  checked:  WRONG, found{}: {}; it is not loaded",
                    on(when),
                    printable(fault.as_bytes())
                )?;
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
        let (name, value) = (printable(name.as_bytes()), printable(value.as_bytes()));
        writeln!(out, "{indent}{name} = {value}")?;
    }
    Ok(())
}
