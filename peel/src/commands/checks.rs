//! What the store's checks of whole layers came to, for the commands that show images where they are: `inspect` and `ls`.
//!
//! What must hold: a store, or a configuration, that cannot be read is no reason to tell less of the rest.

use std::time::UNIX_EPOCH;

use peel_fs::{LayerCheck, layer_check};
use peel_image::format_time;
use peel_store::Store;
use serde::Serialize;

use super::look::OpenImage;
use crate::cli::Global;
use crate::store_dir::StoreDir;
use peel_convert::diff_ids;

/// What the store knows of a layer as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub(super) enum Check {
    /// Nobody checked it there.
    NotYet,
    /// Its DiffID and its table of contents are right.
    Verified {
        /// RFC 3339.
        #[serde(skip_serializing_if = "Option::is_none")]
        when: Option<String>,
        /// Whether the blob's own digest was computed, too.
        blob: bool,
    },
    /// It will not be loaded.
    Failed {
        /// RFC 3339.
        #[serde(skip_serializing_if = "Option::is_none")]
        when: Option<String>,
        /// What is wrong, in a sentence.
        fault: String,
    },
}

/// What the store knows of the layers, lowest first; nothing, if there is no store, if it has checked nothing yet, or if the
/// configuration that tells the DiffIDs cannot be had. Only where something was checked, the configuration is asked for.
pub(super) fn checks(global: &Global, open: &OpenImage) -> Vec<Check> {
    let verdicts = global.store.join("records/verdicts");
    let are_there = std::fs::read_dir(verdicts).is_ok_and(|mut verdicts| verdicts.next().is_some());
    let known = are_there && StoreDir::open(&global.store).is_ok_and(|dir| dir.is_some());
    let Some(store) = known.then(|| Store::open(&global.store).ok()).flatten() else {
        return Vec::new();
    };
    let (bytes, _) = match open.runtime.block_on(open.source.config(&open.image)) {
        Ok(config) => config,
        Err(error) => {
            tracing::warn!(%error, "whether the layers were checked is not known without the configuration");
            return Vec::new();
        }
    };
    let (layers, diff_ids) = (open.image.manifest.layers(), diff_ids(&bytes));
    if layers.len() != diff_ids.len() {
        return Vec::new();
    }
    layers
        .iter()
        .zip(diff_ids)
        .map(
            |(descriptor, diff_id)| match layer_check(&store, descriptor, diff_id) {
                None => Check::NotYet,
                Some(LayerCheck { verdict, when }) => {
                    let when = when.and_then(|when| {
                        let seconds = when.duration_since(UNIX_EPOCH).ok()?.as_secs();
                        Some(format_time(i64::try_from(seconds).ok()?, 0))
                    });
                    match verdict.fault {
                        None => Check::Verified {
                            when,
                            blob: verdict.blob,
                        },
                        Some(fault) => Check::Failed { when, fault },
                    }
                }
            },
        )
        .collect()
}
