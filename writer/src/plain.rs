//! Ordinary layers, without a TOC: the tar stream compressed or not, and otherwise what it was.
//!
//! That is also the way back from the lazy formats. zstd:chunked of Podman's dialect and eStargz whose DiffID was kept come out
//! as the tar stream that they were made of, with its DiffID. Other eStargz layers, and those of the stargz dialect, hold
//! a stream that was rewritten: of the additions the TOC and the landmarks are dropped here, but the order of the entries and
//! the bytes after the last one, which their writer left out, do not come back; the archive gets an end of its own.
//!
//! Streams are cut into blocks that are compressed independently, several at a time; blocks are so large that this costs
//! less than a hundredth of the size. No spool is needed, and a stream that is no tar stream from some point on is passed on
//! all the same: nothing of it is changed, and whoever unpacks it judges it.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::thread;

use crossbeam_channel::bounded;

use super::blob::Blob;
use super::coder::Coding;
use super::pool::Pool;
use super::tape::{self, Recording, Tape};
use super::{WriteError, Written};
use peel_hash::Hasher;
use peel_image::estargz::is_reserved;
use peel_image::tar::{self, write::padding};
use peel_image::{annotations, media};

/// Bytes that are compressed as one. zstd looks back as far as this at its usual levels.
const BLOCK: usize = 4 << 20;
/// Bytes that are read at once.
const STEP: usize = 256 << 10;
/// Blocks that may wait to be hashed.
const UNHASHED: usize = 2;

/// The end of an archive: two blocks of zeros (POSIX.1-2024, pax, "ustar Interchange Format").
const END: [u8; 2 * tar::BLOCK] = [0; 2 * tar::BLOCK];

type Block = Arc<Vec<u8>>;

/// Writes a layer. The first thing that matters is that no byte is lost; see the module.
pub(super) fn write<R, W>(input: R, output: W, coding: Coding, threads: usize) -> Result<Written, WriteError>
where
    R: Read,
    W: Write,
{
    thread::scope(|scope| {
        let worker = move || {
            let mut coder = coding.start();
            move |block: Block| match &mut coder {
                Ok(coder) => {
                    let mut out = Vec::new();
                    coder.append(&block, &mut out).map(|()| out)
                }
                Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
            }
        };
        let threads = threads.min(coding.threads_max());
        let pool = Pool::start(scope, "layer-pack", threads, worker).map_err(WriteError::Thread)?;
        let (unhashed, blocks) = bounded::<Block>(UNHASHED);
        let hasher = thread::Builder::new()
            .name("layer-diffid".to_owned())
            .spawn_scoped(scope, move || {
                let (mut hasher, mut size) = (Hasher::new(), 0);
                for block in blocks {
                    hasher.update(&block);
                    size += block.len() as u64;
                }
                (hasher.finish(), size)
            })
            .map_err(WriteError::Thread)?;
        let mut running = Running {
            pool,
            unhashed,
            block: Vec::new(),
            is_plain: matches!(coding, Coding::Plain),
            has_output: false,
            blob: Blob::new(output),
            entries: 0,
        };
        let (tape, recording) = tape::record(input);
        running.read(tape, recording)?;
        if !running.block.is_empty() || !running.has_output {
            running.send()?;
        }
        while running.collect()? {}
        let Running {
            unhashed,
            blob,
            entries,
            ..
        } = running;
        drop(unhashed);
        let (diff_id, uncompressed_size) = hasher.join().map_err(|_| WriteError::ThreadLost)?;
        let (blob_digest, blob_size) = blob.finish()?;
        let mut notes = BTreeMap::new();
        if let Some(compressor) = coding.name(false) {
            notes.insert(annotations::COMPRESSOR.to_owned(), compressor);
        }
        Ok(Written {
            diff_id,
            blob_digest,
            blob_size,
            uncompressed_size,
            media_type: match coding {
                Coding::Gzip(..) => media::OCI_LAYER_GZIP,
                Coding::Zstd(_) => media::OCI_LAYER_ZSTD,
                Coding::Plain => media::OCI_LAYER,
            },
            annotations: notes,
            external_toc: None,
            toc_digest: None,
            toc_offset: None,
            prefetch_end: None,
            not_found: Vec::new(),
            entries,
            dropped: 0,
            hidden: 0,
            file_ends: HashMap::new(),
        })
    })
}

struct Running<W> {
    pool: Pool<Block, io::Result<Vec<u8>>>,
    unhashed: crossbeam_channel::Sender<Block>,
    block: Vec<u8>,
    is_plain: bool,
    has_output: bool,
    blob: Blob<W>,
    entries: u64,
}

impl<W: Write> Running<W> {
    fn read<R: Read>(&mut self, tape: Tape<R>, mut recording: Recording) -> Result<(), WriteError> {
        let mut reader = tar::Reader::new(tape);
        let mut buffer = vec![0; STEP];
        let (mut length, mut has_dropped, mut is_broken) = (0, false, false);
        loop {
            let entry = match reader.next_entry() {
                Ok(Some(entry)) => entry,
                Ok(None) => break,
                Err(error) if recording.failed() => return Err(error.into()),
                // Not for this writer to judge.
                Err(_) => {
                    is_broken = true;
                    break;
                }
            };
            let is_dropped = is_reserved(entry.path.as_bytes());
            self.entries += u64::from(!is_dropped);
            has_dropped |= is_dropped;
            loop {
                if is_dropped {
                    recording.skip(reader.position());
                } else {
                    length += self.take(&mut recording, reader.position())?;
                }
                match reader.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(error) if recording.failed() => return Err(WriteError::Input(error)),
                    Err(_) => {
                        is_broken = true;
                        break;
                    }
                }
            }
            let ended = reader.end_entry();
            if is_dropped {
                recording.skip(reader.position());
            }
            is_broken |= ended.is_err();
            match ended {
                Err(error) if recording.failed() => return Err(error.into()),
                _ => length += self.take(&mut recording, reader.position())?,
            }
        }
        let mut trailer = self.take(&mut recording, u64::MAX)?;
        while reader.read_trailer(STEP)? {
            trailer += self.take(&mut recording, u64::MAX)?;
        }
        trailer += self.take(&mut recording, u64::MAX)?;
        if has_dropped && !is_broken && trailer == 0 {
            // The writers of some TOCs leave the end of the archive out, even the last padding. The DiffID is another one anyway.
            self.block.extend_from_slice(padding(length));
            self.block.extend_from_slice(&END);
        }
        Ok(())
    }

    /// Takes what was read up to `offset`; returns how many bytes that were.
    fn take(&mut self, recording: &mut Recording, offset: u64) -> Result<u64, WriteError> {
        let before = self.block.len();
        recording.take(offset, &mut self.block);
        let count = (self.block.len() - before) as u64;
        if self.block.len() >= BLOCK {
            self.send()?;
        }
        Ok(count)
    }

    fn send(&mut self) -> Result<(), WriteError> {
        self.has_output = true;
        let next = Vec::with_capacity(BLOCK + STEP);
        let mut rest = std::mem::replace(&mut self.block, next);
        while rest.len() > BLOCK {
            let after = rest.split_off(BLOCK);
            self.push(std::mem::replace(&mut rest, after))?;
        }
        self.push(rest)
    }

    fn push(&mut self, block: Vec<u8>) -> Result<(), WriteError> {
        let block = Arc::new(block);
        self.unhashed
            .send(Arc::clone(&block))
            .map_err(|_| WriteError::ThreadLost)?;
        if self.is_plain {
            return self.blob.write(&block);
        }
        let weight = block.len() * 2;
        while self.pool.is_full(weight) {
            self.collect()?;
        }
        self.pool.push(block, weight)?;
        Ok(())
    }

    fn collect(&mut self) -> Result<bool, WriteError> {
        let Some(packed) = self.pool.pop()? else {
            return Ok(false);
        };
        let packed = packed.map_err(WriteError::Compressor)?;
        self.blob.write(&packed)?;
        Ok(true)
    }
}
