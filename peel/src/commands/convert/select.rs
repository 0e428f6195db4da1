//! Which images of a source are converted: the one of a platform, or several of an index.

use std::io::Write;

use anyhow::{Context, bail};
use bytes::Bytes;
use peel_registry::{ResolvedImage, ResolvedIndex, Source, is_artifact, is_statement};

use crate::cli::{Global, PlatformArgs};
use crate::commands::look::OpenImage;
use peel_convert::Part;
use peel_convert::plan::Plan;

/// The images to convert.
pub(in crate::commands) struct Selection {
    /// One of them: this machine's, if it is among them.
    pub(in crate::commands) open: OpenImage,
    /// Which of the parts that one is; `None` if none of them is this machine's.
    pub(in crate::commands) host: Option<usize>,
    /// All of them, without files that come first.
    pub(in crate::commands) parts: Vec<Part>,
    /// The index that the target's is made from, if it gets one.
    pub(in crate::commands) index: Option<Bytes>,
}

impl Selection {
    /// Finds the images that the flags name.
    pub(in crate::commands) fn open(
        global: &Global,
        name: &str,
        args: &PlatformArgs,
    ) -> anyhow::Result<Self> {
        let name = crate::commands::image_name(name)?;
        let options = crate::commands::client_options(global)?;
        let runtime = crate::commands::runtime()?;
        let (source, chosen) = runtime.block_on(async {
            let source = Source::open(&name, &options).await?;
            let chosen = choose(&source, args).await?;
            anyhow::Ok((source, chosen))
        })?;
        let image = chosen
            .host
            .and_then(|host| chosen.images.get(host))
            .or(chosen.images.first());
        let image = image.context("no image was chosen")?.1.clone();
        let parts = chosen.images.into_iter().map(|(position, image)| Part {
            platform: image.platform.as_ref().map(platform_text),
            image,
            position,
            plan: Plan::default(),
        });
        Ok(Self {
            parts: parts.collect(),
            open: OpenImage {
                runtime,
                source,
                image,
            },
            host: chosen.host,
            index: chosen.index,
        })
    }
}

struct Chosen {
    /// Each with its position in the index.
    images: Vec<(Option<usize>, ResolvedImage)>,
    host: Option<usize>,
    index: Option<Bytes>,
}

async fn choose(source: &Source, args: &PlatformArgs) -> anyhow::Result<Chosen> {
    let several = args.all_platforms || args.platform.len() > 1;
    let index = source.index().await?;
    let (true, Some(index)) = (several, &index) else {
        let wanted = args.platform.first().map(String::as_str);
        let image = source.resolve(wanted).await?;
        let host = match (wanted, &index) {
            // What the user names is this machine's if the choice for this machine is the same.
            (Some(wanted), Some(index)) => {
                source.choose(index, Some(wanted)).await? == source.choose(index, None).await?
            }
            _ => true,
        };
        return Ok(Chosen {
            images: vec![(None, image)],
            host: host.then_some(0),
            index: None,
        });
    };
    let positions = positions(source, index, args).await?;
    let mut images = Vec::new();
    for position in &positions {
        let entry = index
            .index
            .manifests()
            .get(*position)
            .context("entry of the index")?;
        let image = source.image(entry).await;
        let image = image.with_context(|| {
            let platform = entry.platform().as_ref();
            let platform = platform.map_or_else(|| "no platform".to_owned(), platform_text);
            format!(
                "entry {} of the index ({platform}); --platform names those that are wanted",
                position + 1
            )
        })?;
        images.push((Some(*position), image));
    }
    let host = source.choose(index, None).await?;
    Ok(Chosen {
        images,
        host: positions.iter().position(|position| Some(*position) == host),
        index: Some(index.bytes.clone()),
    })
}

/// The entries of the index that are converted, in its order.
async fn positions(
    source: &Source,
    index: &ResolvedIndex,
    args: &PlatformArgs,
) -> anyhow::Result<Vec<usize>> {
    let manifests = index.index.manifests();
    if !args.all_platforms {
        let mut chosen = Vec::new();
        for platform in &args.platform {
            let Some(position) = source.choose(index, Some(platform)).await? else {
                bail!(
                    "no image for platform {platform} (os/architecture[/variant]); there is: {}",
                    index.platforms()
                );
            };
            chosen.push(position);
        }
        chosen.sort_unstable();
        chosen.dedup();
        return Ok(chosen);
    }
    let (statements, images): (Vec<_>, Vec<_>) = (0..manifests.len()).partition(|position| {
        let entry = manifests.get(*position);
        entry.is_some_and(|entry| is_statement(entry) || (is_artifact(entry) && entry.platform().is_none()))
    });
    if !statements.is_empty() {
        let _ = writeln!(
            std::io::stderr(),
            "peel: {} of {} entries of the index are attestations or artifacts and left out: they describe the image that was",
            statements.len(),
            manifests.len()
        );
    }
    if images.is_empty() {
        bail!("the index has no image; there is: {}", index.platforms());
    }
    Ok(images)
}

fn platform_text(platform: &oci_spec::image::Platform) -> String {
    let variant = platform
        .variant()
        .as_deref()
        .map_or(String::new(), |v| format!("/{v}"));
    format!("{}/{}{variant}", platform.os(), platform.architecture())
}
