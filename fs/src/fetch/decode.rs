//! The decode threads: inflate streams, check digests, and hand verified chunks on. All CPU work of the engine
//! happens here, and all writing to the store, but for the hashing of large files, and of files of zeros, as a whole ([`super::complete`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, select};
use peel_image::Digest;
use peel_image::compression::{self, ChunkReader};
use peel_image::layer::Chunk;
use peel_image::lazy::{CHUNK_MAX, STREAM_MAX};

use super::claim::Claim;
use super::layer::{Layer, Stream};
use super::transfer::Permit;
use crate::error::Error;
use crate::lock;

/// Jobs that may wait for each lane. Their bytes are bounded by the transfers' permits; this bounds their number.
const QUEUE: usize = 8192;

/// Who waits for a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    /// A read.
    Demand,
    /// Nobody yet.
    Prefetch,
}

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
    /// Hash a chunk that an earlier process left.
    Verify(Claim),
}

/// The threads and their queues.
#[derive(Debug)]
pub(crate) struct Decoders {
    demand: Sender<Job>,
    prefetch: Sender<Job>,
    stop: Sender<()>,
    threads: usize,
    /// The other ends of `demand` and `prefetch`, to empty them at the end.
    queues: [Receiver<Job>; 2],
    stopped: AtomicBool,
}

impl Decoders {
    /// Starts 2 to 4 threads, by the number of processors.
    pub(super) fn start() -> Result<Self, Error> {
        let threads = thread::available_parallelism().map_or(2, usize::from).clamp(2, 4);
        let (demand, demand_jobs) = bounded(QUEUE);
        let (prefetch, prefetch_jobs) = bounded(QUEUE);
        let (stop, stopped) = bounded(threads);
        for number in 0..threads {
            let name = format!("peel-decode-{number}");
            let (demand_jobs, prefetch_jobs, stopped) =
                (demand_jobs.clone(), prefetch_jobs.clone(), stopped.clone());
            thread::Builder::new()
                .name(name.clone())
                .spawn(move || work(&demand_jobs, &prefetch_jobs, &stopped))
                .map_err(|source| Error::Thread { name, source })?;
        }
        Ok(Self {
            demand,
            prefetch,
            stop,
            threads,
            queues: [demand_jobs, prefetch_jobs],
            stopped: AtomicBool::new(false),
        })
    }

    /// Gives a job to the threads. The job comes back when the queue is full, `None` when the threads have ended.
    pub(super) fn try_submit(&self, lane: Lane, job: Job) -> Result<(), Option<Job>> {
        if self.stopped.load(Ordering::SeqCst) {
            return Err(None);
        }
        let queue = match lane {
            Lane::Demand => &self.demand,
            Lane::Prefetch => &self.prefetch,
        };
        let sent = queue.try_send(job).map_err(|error| match error {
            TrySendError::Full(job) => Some(job),
            TrySendError::Disconnected(_) => None,
        });
        if self.stopped.load(Ordering::SeqCst) {
            self.discard();
        }
        sent
    }

    /// Gives a job to the threads; if they have too many, its claims are dropped and tried again later.
    pub(super) fn submit(&self, lane: Lane, job: Job) {
        drop(self.try_submit(lane, job));
    }

    /// Ends the threads after the jobs that they are at; the others are dropped.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        for _ in 0..self.threads {
            // Full means that every thread has its order already.
            let _ = self.stop.try_send(());
        }
        self.discard();
    }

    /// Drops the jobs that wait. They hold claims, and those the engine, which holds this: nobody else would end that.
    fn discard(&self) {
        for queue in &self.queues {
            while queue.try_recv().is_ok() {}
        }
    }
}

fn work(demand: &Receiver<Job>, prefetch: &Receiver<Job>, stopped: &Receiver<()>) {
    loop {
        if stopped.try_recv().is_ok() {
            return;
        }
        if let Ok(job) = demand.try_recv() {
            run(job);
            continue;
        }
        select! {
            recv(demand) -> job => match job {
                Ok(job) => run(job),
                Err(_) => return,
            },
            recv(prefetch) -> job => match job {
                Ok(job) => run(job),
                Err(_) => return,
            },
            recv(stopped) -> _ => return,
        }
    }
}

fn run(job: Job) {
    match job {
        Job::Stream {
            layer,
            stream,
            bytes,
            claims,
            permit,
        } => {
            decode(&layer, &stream, &bytes, claims);
            drop(permit);
        }
        Job::Verify(claim) => verify(claim),
    }
}

/// Inflates a stream once, for all chunks that are wanted from it.
fn decode(layer: &Arc<Layer>, stream: &Stream, bytes: &Bytes, claims: Vec<Claim>) {
    let places: Vec<Option<(u64, u64, Digest)>> = claims
        .iter()
        .map(|claim| layer.chunk(claim.position).and_then(|(_, chunk)| place(chunk)))
        .collect();
    let start = places.iter().flatten().map(|place| place.0).min().unwrap_or(0);
    let end = places
        .iter()
        .flatten()
        .map(|place| place.0.saturating_add(place.1))
        .max()
        .unwrap_or(0);
    let together = (claims.len() > 1 && end - start <= CHUNK_MAX)
        .then(|| compression::decode_chunk(stream.encoding, bytes, start, end - start, STREAM_MAX));
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
}

fn part(whole: &[u8], from: u64, size: u64) -> Option<&[u8]> {
    let from = usize::try_from(from).ok()?;
    whole.get(from..from.checked_add(usize::try_from(size).ok()?)?)
}

/// Place in the stream, size and digest of a chunk.
fn place(chunk: &Chunk) -> Option<(u64, u64, Digest)> {
    match chunk.source {
        peel_image::layer::ChunkSource::Blob { inner_offset, .. } => {
            Some((inner_offset, chunk.size, chunk.digest))
        }
        peel_image::layer::ChunkSource::Zeros => None,
    }
}

fn verify(claim: Claim) {
    let partial = match &lock(&claim.object.state).backing {
        crate::object::Backing::Partial(partial) => Arc::clone(partial),
        _ => return,
    };
    match partial.verify(claim.chunk() as usize) {
        Ok(true) => claim.found(&partial),
        // Dropping the claim lets the reads that wait fetch the chunk.
        Ok(false) => {}
        Err(error) => {
            tracing::error!(object = %claim.object.digest, %error, "cannot verify what is here of an object");
        }
    }
}
