//! The decode threads: inflate streams, check digests, and hand verified chunks on. All CPU work of the engine
//! happens here, and all writing to the store, but for the hashing of large files, and of files of zeros, as a whole ([`super::complete`]).

use std::sync::Arc;
use std::thread;

use bytes::Bytes;
use peel_image::Digest;
use peel_image::compression::{self, ChunkReader};
use peel_image::layer::Chunk;
use peel_image::lazy::{CHUNK_MAX, STREAM_MAX};

use super::claim::Claim;
pub(crate) use super::fair::Lane;
use super::fair::{Bounds, Queues, Refused};
use super::layer::{Layer, Stream};
use super::share::Permit;
use crate::error::Error;

/// Jobs of one image that may wait in each lane. Their bytes are bounded by the transfers' permits; this bounds their number.
const QUEUE: usize = 4096;
/// Jobs that bring so many bytes are large: four times the usual chunk. They never have all threads.
const LARGE: u64 = 16 << 20;
/// Bytes that large jobs under way may bring together: two of the largest chunks.
const LARGE_BYTES: u64 = 2 * CHUNK_MAX;

/// Work for a decode thread.
#[derive(Debug)]
pub(crate) enum Job {
    /// Inflate a stream, verify and deliver the claimed chunks.
    Stream {
        layer: Arc<Layer>,
        stream: Stream,
        bytes: Bytes,
        claims: Vec<Claim>,
        permit: Permit,
    },
    /// Hash a chunk that is on disk, as far as is known.
    Verify(Claim),
}

impl Job {
    /// The image that it is done for.
    fn image(&self) -> u64 {
        match self {
            Self::Stream { layer, .. } => layer.image,
            Self::Verify(claim) => claim.layer.image,
        }
    }

    /// Bytes that it produces or hashes.
    fn cost(&self) -> u64 {
        match self {
            Self::Stream {
                layer, claims, bytes, ..
            } => {
                let produced = Span::of(&places(layer, claims)).end;
                produced.saturating_add(bytes.len() as u64)
            }
            Self::Verify(claim) => claim
                .layer
                .chunk(claim.position)
                .map_or(0, |(_, chunk)| chunk.size),
        }
    }
}

/// The threads and their queues.
#[derive(Debug)]
pub(crate) struct Decoders(Arc<Queues<Job>>);

impl Decoders {
    /// Starts 2 to 4 threads, by the number of processors.
    pub(super) fn start() -> Result<Self, Error> {
        let threads = thread::available_parallelism().map_or(2, usize::from).clamp(2, 4);
        let queues = Arc::new(Queues::new(Bounds {
            queue: QUEUE,
            large: LARGE,
            large_threads: threads - 1,
            large_bytes: LARGE_BYTES,
        }));
        for number in 0..threads {
            let name = format!("peel-decode-{number}");
            let queues = Arc::clone(&queues);
            thread::Builder::new()
                .name(name.clone())
                .spawn(move || {
                    while let Some((job, turn)) = queues.next() {
                        turn.charge(run(job));
                    }
                })
                .map_err(|source| Error::Thread { name, source })?;
        }
        Ok(Self(queues))
    }

    /// Gives a job to the threads. The job comes back when the queue of its image is full, `None` when the threads have ended.
    pub(super) fn try_submit(&self, lane: Lane, job: Job) -> Result<(), Option<Job>> {
        let (image, cost) = (job.image(), job.cost());
        self.0
            .push(lane, image, cost, job)
            .map_err(|refused| match refused {
                Refused::Full(job) => Some(job),
                Refused::Stopped(_) => None,
            })
    }

    /// Gives a job to the threads; if its image has too many, its claims are dropped and tried again later.
    pub(super) fn submit(&self, lane: Lane, job: Job) {
        drop(self.try_submit(lane, job));
    }

    /// Ends the threads after the jobs that they are at; the others are dropped. They hold claims, and those the engine, which holds
    /// this: nobody else would end that.
    pub(super) fn stop(&self) {
        self.0.stop();
    }
}

/// Returns how many bytes more it cost than [`Job::cost`] says.
fn run(job: Job) -> u64 {
    match job {
        Job::Stream {
            layer,
            stream,
            bytes,
            claims,
            permit,
        } => {
            let more = decode(&layer, &stream, &bytes, claims);
            drop(permit);
            more
        }
        Job::Verify(claim) => {
            claim.verify();
            0
        }
    }
}

/// Place of a chunk in the output of its stream, its size and its digest.
type Place = (u64, u64, Digest);

/// Places of the chunks that are wanted.
fn places(layer: &Layer, claims: &[Claim]) -> Vec<Option<Place>> {
    claims
        .iter()
        .map(|claim| layer.chunk(claim.position).and_then(|(_, chunk)| place(chunk)))
        .collect()
}

/// What is wanted of the output of a stream.
#[derive(Debug, Clone, Copy)]
struct Span {
    start: u64,
    end: u64,
    chunks: usize,
}

impl Span {
    fn of(places: &[Option<Place>]) -> Self {
        let ends = places
            .iter()
            .flatten()
            .map(|place| place.0.saturating_add(place.1));
        Self {
            start: places.iter().flatten().map(|place| place.0).min().unwrap_or(0),
            end: ends.max().unwrap_or(0),
            chunks: places.len(),
        }
    }

    fn length(&self) -> u64 {
        self.end - self.start
    }

    /// Whether it is produced once for all chunks.
    fn is_one_piece(&self) -> bool {
        self.chunks > 1 && self.length() <= CHUNK_MAX
    }
}

/// Inflates a stream once, for all chunks that are wanted from it. Returns how many bytes more than expected that took.
fn decode(layer: &Arc<Layer>, stream: &Stream, bytes: &Bytes, claims: Vec<Claim>) -> u64 {
    let places = places(layer, &claims);
    let span = Span::of(&places);
    let start = span.start;
    let together = span
        .is_one_piece()
        .then(|| compression::decode_chunk(stream.encoding, bytes, start, span.length(), STREAM_MAX));
    // Then it is inflated once more.
    let more = match together {
        Some(Err(_)) => span.end,
        _ => 0,
    };
    let mut chunks = ChunkReader::new(stream.encoding, bytes, STREAM_MAX);
    let is_alone = claims.len() == 1;
    for (claim, place) in claims.into_iter().zip(places) {
        let Some((inner, size, digest)) = place else {
            claim.wrong("the chunk has no place in the stream");
            continue;
        };
        let data = match &together {
            Some(Ok(whole)) => part(whole, inner - start, size).map(<[u8]>::to_vec),
            // One chunk at a time: what is behind a broken place must not take the chunks before it with it.
            Some(Err(_)) | None => {
                let chunk = match is_alone {
                    true => compression::decode_chunk(stream.encoding, bytes, inner, size, STREAM_MAX),
                    // In one pass: claims come in the order of the stream.
                    false => chunks.read(inner, size),
                };
                match chunk {
                    Ok(data) => Some(data),
                    Err(error) => {
                        claim.wrong(&error.to_string());
                        continue;
                    }
                }
            }
        };
        match data {
            Some(data) if Digest::of(&data) == digest => claim.deliver(data),
            Some(data) => claim.wrong(&format!("its bytes have the digest {}", Digest::of(&data))),
            None => claim.wrong("the stream is too short"),
        }
    }
    more
}

fn part(whole: &[u8], from: u64, size: u64) -> Option<&[u8]> {
    let from = usize::try_from(from).ok()?;
    whole.get(from..from.checked_add(usize::try_from(size).ok()?)?)
}

/// Place in the stream, size and digest of a chunk.
fn place(chunk: &Chunk) -> Option<Place> {
    match chunk.source {
        peel_image::layer::ChunkSource::Blob { inner_offset, .. } => {
            Some((inner_offset, chunk.size, chunk.digest))
        }
        peel_image::layer::ChunkSource::Zeros => None,
    }
}
