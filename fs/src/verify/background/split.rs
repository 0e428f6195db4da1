//! The tar stream of a layer in Podman's dialect of zstd:chunked, from its tar-split and the objects in the store.
//!
//! The chain of trust: the manifest's annotation names the sha256 of the compressed TOC, the TOC that of the compressed
//! tar-split (`tarSplitDigest`). Both are fetched again, a few percent of the layer; nothing is used before its digest is
//! right. A layer whose TOC does not name its tar-split (written before 2024) has none that can be trusted.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex};

use oci_spec::image::Descriptor;
use peel_image::annotations::{PODMAN_MANIFEST_CHECKSUM, PODMAN_MANIFEST_POSITION, PODMAN_TARSPLIT_POSITION};
use peel_image::compression::{Guard, decoder};
use peel_image::layer::{EntryKind, LayerIndex};
use peel_image::path::EntryPath;
use peel_image::tar::index::HashSink;
use peel_image::tar::index_tar;
use peel_image::tar_split::{self, Reader, TAR_SPLIT_MAX};
use peel_image::{Digest, Hasher};
use peel_registry::Blob;
use peel_store::Store;
use rustix::fs::OFlags;
use serde::Deserialize;

use super::super::annotation;
use super::{Stoppable, wait};
use crate::error::chain;
use crate::fetch::Engine;
use crate::lock;

/// Where TOC and tar-split lie in a blob.
#[derive(Debug)]
pub(super) struct Place {
    toc: Range<u64>,
    toc_digest: Digest,
    split: Range<u64>,
}

impl Place {
    /// Digest of the compressed TOC.
    pub(super) fn toc_digest(&self) -> Digest {
        self.toc_digest
    }
}

/// What a tar-split and the objects came to.
pub(super) enum Rebuilt {
    /// The index of the stream, and its digest.
    Stream(LayerIndex, Digest),
    /// They do not fit each other.
    Wrong(String),
}

/// The only part of the TOC that matters here.
#[derive(Deserialize)]
struct Toc {
    #[serde(rename = "tarSplitDigest")]
    tar_split_digest: Option<String>,
}

/// Whether the layer says that it has a tar-split.
pub(super) fn is_there(descriptor: &Descriptor) -> bool {
    annotation(descriptor, PODMAN_TARSPLIT_POSITION).is_some()
}

/// Where the annotations place TOC and tar-split; `None` for a layer without tar-split.
pub(super) fn place(descriptor: &Descriptor) -> Result<Option<Place>, String> {
    let Some(split) = annotation(descriptor, PODMAN_TARSPLIT_POSITION) else {
        return Ok(None);
    };
    let get = |name: &str| annotation(descriptor, name).ok_or_else(|| format!("no annotation {name}"));
    let toc_digest = get(PODMAN_MANIFEST_CHECKSUM)?.parse();
    Ok(Some(Place {
        toc: range(get(PODMAN_MANIFEST_POSITION)?)?,
        toc_digest: toc_digest.map_err(|error| format!("{PODMAN_MANIFEST_CHECKSUM}: {error}"))?,
        split: range(split)?,
    }))
}

/// `offset:compressed length:...`, within the limit of both documents.
fn range(position: &str) -> Result<Range<u64>, String> {
    let invalid = || format!("unusable position {position:?}");
    let mut numbers = position.split(':').map(str::parse::<u64>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(offset)), Some(Ok(length))) if length <= TAR_SPLIT_MAX => {
            Ok(offset..offset.checked_add(length).ok_or_else(invalid)?)
        }
        _ => Err(invalid()),
    }
}

/// Makes the tar stream again. An error is something that could not be had; what does not fit is [`Rebuilt::Wrong`].
pub(super) fn rebuild(
    engine: &Arc<Engine>,
    blob: &Blob,
    place: &Place,
    listed: &LayerIndex,
) -> Result<Rebuilt, String> {
    let wrong = |error: String| format!("its table of contents: {error}");
    let mut json = Vec::new();
    let mut toc = unpacked(fetch(engine, blob, &place.toc, &place.toc_digest)?)?;
    toc.read_to_end(&mut json)
        .map_err(|error| wrong(error.to_string()))?;
    let toc: Toc = serde_json::from_slice(&json).map_err(|error| wrong(error.to_string()))?;
    let digest = toc
        .tar_split_digest
        .ok_or("its table of contents does not name its tar-split")?
        .parse::<Digest>()
        .map_err(|error| wrong(error.to_string()))?;
    let lines = Reader::new(BufReader::new(unpacked(fetch(
        engine,
        blob,
        &place.split,
        &digest,
    )?)?));
    let files = listed.entries.iter().filter_map(|entry| match &entry.kind {
        EntryKind::Regular(content) => Some((&entry.path, content.digest?)),
        _ => None,
    });
    let objects: HashMap<&EntryPath, Digest> = files.collect();
    // What is no fault of the layer.
    let missing = Mutex::new(None);
    let open = |name: &[u8], _size| -> io::Result<File> {
        let path = EntryPath::clean(name).map_err(io::Error::other)?;
        let object = objects
            .get(&path)
            .ok_or_else(|| io::Error::other("its table of contents does not list this file"))?;
        let reason = match engine.store.open_object(object) {
            Ok(Some(file)) => return Ok(file),
            Ok(None) => format!("object {object} is gone"),
            Err(error) => error.to_string(),
        };
        *lock(&missing) = Some(reason);
        Err(io::ErrorKind::NotFound.into())
    };
    let hasher = Mutex::new(Hasher::new());
    let stream = Hashing {
        stream: Stoppable {
            engine,
            stream: tar_split::Rebuilt::new(lines, open),
        },
        hasher: &hasher,
    };
    let result = index_tar(stream, &mut HashSink::default());
    if let Some(reason) = lock(&missing).take() {
        return Err(reason);
    }
    if engine.is_stopping() {
        return Err("the service is stopping".to_owned());
    }
    let found = std::mem::take(&mut *lock(&hasher)).finish();
    Ok(match result {
        Ok((index, _)) => Rebuilt::Stream(index, found),
        Err(error) => Rebuilt::Wrong(format!(
            "its tar-split {digest} does not fit its table of contents {}: {}",
            place.toc_digest,
            chain(&error)
        )),
    })
}

/// A range of the blob in a file without a name, its digest checked.
fn fetch(engine: &Arc<Engine>, blob: &Blob, range: &Range<u64>, expected: &Digest) -> Result<File, String> {
    let mut file = scratch(&engine.store).map_err(|error| format!("a temporary file: {error}"))?;
    let (blob, range) = (blob.clone(), range.clone());
    let (mut file, found) = wait(engine, async move {
        let mut hasher = Hasher::new();
        let mut stream = blob.stream(range).await.map_err(|error| error.to_string())?;
        while let Some(bytes) = stream.next().await {
            let bytes = bytes.map_err(|error| error.to_string())?;
            hasher.update(&bytes);
            // Some KiB into the page cache: no reason for a thread of its own.
            file.write_all(&bytes).map_err(|error| error.to_string())?;
        }
        Ok::<_, String>((file, hasher.finish()))
    })??;
    if found != *expected {
        return Err(format!(
            "bytes that should have the digest {expected} have {found}"
        ));
    }
    file.rewind().map_err(|error| error.to_string())?;
    Ok(file)
}

fn scratch(store: &Store) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(OFlags::TMPFILE.bits().cast_signed())
        .open(store.root().join("tmp"))
}

/// The bytes uncompressed, within the limit of both documents.
fn unpacked(file: File) -> Result<Box<dyn Read + Send>, String> {
    let guard = Guard {
        output_max: TAR_SPLIT_MAX,
        ..Guard::default()
    };
    let (_, stream) = decoder(file, guard).map_err(|error| error.to_string())?;
    Ok(stream)
}

/// Hashes what passes.
struct Hashing<'a, R> {
    stream: R,
    hasher: &'a Mutex<Hasher>,
}

impl<R: Read> Read for Hashing<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.stream.read(buffer)?;
        lock(self.hasher).update(buffer.get(..length).unwrap_or_default());
        Ok(length)
    }
}
