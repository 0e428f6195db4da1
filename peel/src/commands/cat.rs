//! `peel cat`: a file of an image. Of a lazy layer just the file's chunks are fetched, each verified before it is printed.

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;

use anyhow::{Context, bail};
use peel_image::layer::{Chunk, ChunkSource, EntryKind, FileContent};
use peel_image::tree::{FileRef, InodeKind};
use peel_image::{Digest, Hasher, compression, tar};
use peel_registry::Blob;

use super::look::{Contents, OpenImage};
use crate::cli::{CatArgs, Global};

/// Bytes that are copied at once.
const PIECE: usize = 128 << 10;

/// Prints it.
pub(super) fn run(global: &Global, args: &CatArgs) -> anyhow::Result<()> {
    let open = OpenImage::open(global, &args.image, args.platform.as_deref())?;
    let contents = open.contents()?;
    let id = contents.tree.resolve(args.path.as_bytes(), true)?;
    let file = match contents.tree.inode(id).map(|inode| &inode.kind) {
        Some(InodeKind::Regular(file)) => file,
        _ => bail!("{}: not a regular file", args.path.display()),
    };
    if file.size == 0 {
        return Ok(());
    }
    let (blob, content) = find(&contents, file).context("the layer of the file")?;
    if content.chunks.is_empty() {
        return print_whole(&open, blob, file);
    }
    let mut out = std::io::stdout().lock();
    let mut chunks = content.chunks.iter().flat_map(pieces);
    let fetch = |chunk: Option<Chunk>| {
        let blob = blob.clone();
        chunk.map(|chunk| {
            open.runtime
                .spawn(async move { peel_layers::fetch_chunk(&blob, &chunk).await })
        })
    };
    // The next chunk is fetched while one is printed.
    let mut next = fetch(chunks.next());
    while let Some(task) = next {
        next = fetch(chunks.next());
        let bytes = open.runtime.block_on(task).context("task")??;
        out.write_all(&bytes)?;
    }
    Ok(out.flush()?)
}

/// A chunk as it is printed: as it is, or a run of zeros, however long, little by little.
fn pieces(chunk: &Chunk) -> impl Iterator<Item = Chunk> {
    let size = match chunk.source {
        ChunkSource::Zeros => PIECE,
        ChunkSource::Blob { .. } => usize::try_from(chunk.size).unwrap_or(usize::MAX),
    };
    let (whole, size) = (chunk.clone(), size.max(1));
    (0..whole.size).step_by(size).map(move |done| Chunk {
        size: (whole.size - done).min(size as u64),
        ..whole.clone()
    })
}

fn find<'a>(contents: &'a Contents, file: &FileRef) -> Option<(&'a Blob, &'a FileContent)> {
    let layer = usize::try_from(file.layer).ok()?;
    let entry = contents
        .layers
        .get(layer)?
        .entries
        .get(usize::try_from(file.entry).ok()?)?;
    match &entry.kind {
        EntryKind::Regular(content) => Some((contents.blobs.get(layer)?, content)),
        _ => None,
    }
}

/// Prints a file of a layer that is one stream: it is put aside and printed when its digest is right.
fn print_whole(open: &OpenImage, blob: &Blob, file: &FileRef) -> anyhow::Result<()> {
    let stream = open
        .runtime
        .block_on(peel_layers::reader(blob, open.runtime.handle()))?;
    let (_, stream) = compression::decoder(stream, compression::Guard::default())?;
    let mut reader = tar::Reader::new(stream);
    for _ in 0..=file.entry {
        if reader.next_entry()?.is_none() {
            bail!("layer {}: ended before the file", blob.digest());
        }
    }
    let mut spool = tempfile::tempfile().context("temporary file")?;
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; PIECE];
    loop {
        let length = reader.read(&mut buffer)?;
        let piece = buffer.get(..length).unwrap_or_default();
        if piece.is_empty() {
            break;
        }
        hasher.update(piece);
        spool.write_all(piece).context("temporary file")?;
    }
    let found: Digest = hasher.finish();
    if found != file.object {
        bail!(
            "layer {}: the file is {found} now, and was {} before",
            blob.digest(),
            file.object
        );
    }
    spool.seek(SeekFrom::Start(0)).context("temporary file")?;
    std::io::copy(&mut spool, &mut std::io::stdout().lock())?;
    Ok(())
}
