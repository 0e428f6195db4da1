//! Indexes within indexes (image specification, "Image Index": an entry may be an index), laid out flat: what [`Source::resolve`] chooses
//! from and what [`Source::index`] gives.
//!
//! An entry of an inner index that names no platform has that of the entry which leads to it. An inner index that is not there
//! stays as the entry that it is: images are copied for some platforms only, and then the others are missed by nobody who does
//! not ask for them. A circle cannot be made, since every index names others by their digests; depth and number have
//! limits, because few bytes can name many.
//!
//! [`Source::resolve`]: super::Source::resolve
//! [`Source::index`]: super::Source::index

use std::sync::Arc;

use bytes::Bytes;
use oci_spec::image::{Descriptor, ImageIndex};
use peel_image::media;
use serde_json::Value;

use super::Inner;
use super::resolve::{Content, Document};
use crate::document;
use crate::error::Error;

/// Indexes within each other. Nobody is known to nest more than two.
pub(super) const MAX_DEPTH: usize = 4;
/// Inner indexes of one index, all levels together: as many as a generous build has platforms.
const MAX_INDEXES: usize = 64;
/// Bytes of all inner indexes together: what is in memory at once.
const MAX_BYTES: usize = 16 << 20;

/// An index without inner ones.
#[derive(Debug, Clone)]
pub(crate) struct Flat {
    pub(crate) index: ImageIndex,
    /// As JSON: the bytes that came, if nothing was inside.
    pub(crate) bytes: Bytes,
}

/// Lays an index out; `None` if the document is none. One request for each inner index.
pub(super) async fn flatten(source: &Arc<Inner>, top: &Document) -> Result<Option<Flat>, Error> {
    let Content::Index(index) = &top.content else {
        return Ok(None);
    };
    if !index.manifests().iter().any(is_index) {
        return Ok(Some(Flat {
            index: ImageIndex::clone(index),
            bytes: top.bytes.clone(),
        }));
    }
    let fail = |reason: String| source.manifest_error(format!("index {}", top.digest), reason);
    let malformed = |error: serde_json::Error| fail(error.to_string());
    let mut flat: Value = serde_json::from_slice(&top.bytes).map_err(malformed)?;
    document::drop_nulls(&mut flat);
    // What is still to be looked at, the next one last, each with the number of indexes that it is in.
    let mut pending: Vec<(usize, Value)> = entries(&mut flat).into_iter().map(|entry| (1, entry)).collect();
    pending.reverse();
    let mut found = Vec::new();
    let (mut indexes, mut size) = (0, 0);
    while let Some((depth, mut entry)) = pending.pop() {
        document::complete_platform(&mut entry);
        let descriptor: Descriptor = serde_json::from_value(entry.clone()).map_err(malformed)?;
        if !is_index(&descriptor) {
            found.push(entry);
            continue;
        }
        indexes += 1;
        if depth >= MAX_DEPTH {
            return Err(fail(format!("more than {MAX_DEPTH} indexes within each other")));
        }
        if indexes > MAX_INDEXES {
            return Err(fail(format!("more than {MAX_INDEXES} indexes within it")));
        }
        let inner = match source.child(&descriptor).await {
            Ok(inner) => inner,
            Err(error) if error.is_not_found() => {
                tracing::debug!(%error, "an inner index is left out");
                found.push(entry);
                continue;
            }
            Err(error) => return Err(error),
        };
        size += inner.bytes.len();
        if size > MAX_BYTES {
            return Err(fail(format!("more than {MAX_BYTES} bytes of indexes within it")));
        }
        let mut inner: Value = serde_json::from_slice(&inner.bytes).map_err(malformed)?;
        document::drop_nulls(&mut inner);
        let inherit = |mut inner: Value| {
            if let (Some(fields), Some(platform)) = (inner.as_object_mut(), entry.get("platform")) {
                fields.entry("platform").or_insert_with(|| platform.clone());
            }
            (depth + 1, inner)
        };
        pending.extend(entries(&mut inner).into_iter().rev().map(inherit));
    }
    if let Some(fields) = flat.as_object_mut() {
        fields.insert("manifests".to_owned(), Value::Array(found));
    }
    let bytes = serde_json::to_vec(&flat).map_err(malformed)?;
    Ok(Some(Flat {
        index: document::index_of(flat).map_err(fail)?,
        bytes: bytes.into(),
    }))
}

fn is_index(entry: &Descriptor) -> bool {
    media::is_index(entry.media_type().as_ref())
}

/// Takes the entries out of an index.
fn entries(index: &mut Value) -> Vec<Value> {
    match index.get_mut("manifests").map(Value::take) {
        Some(Value::Array(entries)) => entries,
        _ => Vec::new(),
    }
}
