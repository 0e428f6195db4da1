//! `peel optimize`: runs an image, records what it reads while it starts, and writes it anew with those files first.

mod sample;

use std::io::Write;

use anyhow::{Context, bail};
use peel_image::layer::LayerIndex;
use peel_image::path::EntryPath;
use peel_image::profile::{Profile, ProfileEntry};
use peel_image::tree::Tree;
use peel_registry::ImageName;
use peel_store::Store;

use super::convert::format;
use super::convert::select::Selection;
use super::look::OpenImage;
use super::{convert, record};
use crate::cli::{Global, LoadArgs, OptimizeArgs};
use crate::client::Client;
use crate::progress::LoadProgress;
use crate::protocol::WritableLayer;
use peel_convert::plan::{self, Plan};
use peel_convert::{Settings, patterns};

/// Names without a file that are shown one by one.
const SHOWN: usize = 10;

/// Records, converts, pushes; prints the digest of what the target names then.
pub(super) fn run(global: &Global, args: &OptimizeArgs) -> anyhow::Result<()> {
    let format = format::lazy(&args.lazy, args.reuse.reuse)?;
    convert::check_target(&args.target, format)?;
    let mut selection = Selection::open(global, &args.source, &args.platforms)?;
    let open = &selection.open;
    let mut err = std::io::stderr();
    let found = if args.no_optimize {
        None
    } else if selection.host.is_none() {
        let _ = writeln!(
            err,
            "peel: none of the platforms is this machine's: nothing is run, and no file comes first"
        );
        None
    } else if !args.record_in.is_empty() {
        let record = record::read_all(&args.record_in)?;
        let contents = open.contents()?;
        let recorded = record.accesses.len();
        let (profile, plan) = planned(record, &contents.tree, &contents.layers);
        if plan.left_out > 0 {
            let _ = writeln!(
                err,
                "peel: {} of {recorded} paths of the record are no files with content in the image: left out",
                plan.left_out
            );
        }
        Some((profile, plan))
    } else if let Some(path) = &args.prefetch_list {
        let list = std::fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
        let list = patterns::parse(&list).with_context(|| path.display().to_string())?;
        let contents = open.contents()?;
        let idle = plan::idle(&contents.tree, &list);
        for pattern in idle.iter().take(SHOWN) {
            let _ = writeln!(
                err,
                "peel: {}: {pattern}: no file with content in the image: left out",
                path.display()
            );
        }
        if idle.len() > SHOWN {
            let _ = writeln!(err, "peel: {}: and {} more", path.display(), idle.len() - SHOWN);
        }
        let profile = untimed(plan::matching(&contents.tree, &list));
        Some(planned(profile, &contents.tree, &contents.layers))
    } else {
        Some(sampled(global, args, open)?)
    };
    if let Some((profile, plan)) = found {
        if let Some(path) = &args.record_out {
            record::write(path, open.image.manifest_digest, &profile, &plan)?;
        }
        if plan.files.is_empty() {
            let _ = writeln!(
                err,
                "peel: {}; it is written without files that come first",
                if args.record_in.is_empty() && args.prefetch_list.is_none() {
                    "no file of the image was read"
                } else {
                    "no file of the image is named"
                }
            );
        } else if !global.json {
            let _ = writeln!(err, "files of the image that come first: {}", plan.files.len());
        }
        let host = selection.host.and_then(|host| selection.parts.get_mut(host));
        host.context("image of this machine")?.plan = plan;
    }
    let settings = Settings {
        planned: !args.no_optimize,
        ..convert::settings(format, &args.lazy, args.reuse)
    };
    let outcome = convert::convert(global, &selection, &args.target, settings)?;
    convert::report(global, &args.target, &outcome)
}

fn planned(profile: Profile, tree: &Tree, layers: &[LayerIndex]) -> (Profile, Plan) {
    let plan = Plan::new(tree, layers, profile.accesses.iter().map(|access| &access.path));
    (profile, plan)
}

/// A profile of files that nobody has seen being read.
fn untimed(paths: Vec<EntryPath>) -> Profile {
    let accesses = paths.into_iter().map(|path| ProfileEntry {
        path,
        layer: None,
        at: None,
        executed: false,
    });
    Profile {
        accesses: accesses.collect(),
    }
}

/// Runs the image and finds what it read.
fn sampled(global: &Global, args: &OptimizeArgs, open: &OpenImage) -> anyhow::Result<(Profile, Plan)> {
    let load = LoadArgs {
        // One that is named is this machine's, or nothing would be run.
        platform: args
            .platforms
            .platform
            .first()
            .filter(|_| args.platforms.platform.len() == 1)
            .cloned(),
        how: args.how.clone(),
    };
    let mut request = super::mount_request(global, &args.source, &load, WritableLayer::Required)?;
    request.image = pinned(&args.source, open)?;
    let mut client = Client::connect(global)?;
    let mut progress = LoadProgress::new(&args.source);
    let (mounted, root) = client.mount(request, &mut |step| progress.update(&step))?;
    progress.finish();
    if mounted.manifest_digest != open.image.manifest_digest {
        bail!(
            "{}: its manifest changed from {} to {} meanwhile; try again",
            args.source,
            open.image.manifest_digest,
            mounted.manifest_digest
        );
    }
    let profile = sample::run(args, &mounted, root)?;
    client.release(&mounted.id)?;
    drop(client);
    let layers = stored_layers(global, &mounted.manifest_digest)?;
    let tree = Tree::merge(&layers)?;
    Ok(planned(profile, &tree, &layers))
}

/// The name with the manifest's digest, so that the server runs what will be converted even if the tag moves.
fn pinned(source: &str, open: &OpenImage) -> anyhow::Result<String> {
    let mut name = super::image_name(source)?;
    if let ImageName::Registry(reference) = &mut name {
        reference.digest = Some(open.image.manifest_digest);
    }
    Ok(name.to_string())
}

/// The indexes of the layers as the server has put them into the store.
fn stored_layers(global: &Global, manifest: &peel_image::Digest) -> anyhow::Result<Vec<LayerIndex>> {
    let store = Store::open(&std::path::absolute(&global.store).context("store directory")?)?;
    let record = store
        .image(manifest)?
        .with_context(|| format!("{manifest}: no longer in the store"))?;
    record
        .layers
        .iter()
        .map(|layer| {
            store
                .layer(layer)?
                .with_context(|| format!("index of the layer {layer}: no longer in the store"))
        })
        .collect()
}
