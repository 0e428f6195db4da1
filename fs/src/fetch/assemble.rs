//! Puts the pieces in which a range of a blob arrives together to whole streams, in whatever order they come.
//!
//! Used by one transfer at a time; holds slices of the received buffers, so nothing is copied unless a stream spans
//! several of them.

use bytes::{Bytes, BytesMut};

use super::claim::{Claim, Wanted};

/// Streams that wait for their bytes.
#[derive(Debug)]
pub(crate) struct Assembler {
    streams: Vec<Pending>,
}

#[derive(Debug)]
struct Pending {
    wanted: Option<Wanted>,
    start: u64,
    end: u64,
    missing: u64,
    pieces: Vec<(u64, Bytes)>,
}

/// A stream all of whose bytes are here.
#[derive(Debug)]
pub(crate) struct Ready {
    /// The stream and its chunks.
    pub(crate) wanted: Wanted,
    /// Its bytes.
    pub(crate) bytes: Bytes,
}

impl Assembler {
    /// Waits for these streams, ascending by offset.
    pub(crate) fn new(wanted: Vec<Wanted>) -> Self {
        let streams = wanted
            .into_iter()
            .map(|wanted| Pending {
                start: wanted.stream.range.start,
                end: wanted.stream.range.end,
                missing: wanted.stream.range.end - wanted.stream.range.start,
                pieces: Vec::new(),
                wanted: Some(wanted),
            })
            .collect();
        Self { streams }
    }

    /// Gives up: the claims of the streams that are not complete.
    pub(crate) fn into_claims(self) -> impl Iterator<Item = Claim> {
        self.streams
            .into_iter()
            .filter_map(|stream| stream.wanted)
            .flat_map(|wanted| wanted.claims)
    }

    /// Takes the bytes at `offset` of the blob, which no earlier call had, and returns the streams that they complete.
    pub(crate) fn push(&mut self, offset: u64, bytes: &Bytes) -> Vec<Ready> {
        let end = offset + bytes.len() as u64;
        // Streams of a correct layer do not overlap, so their ends ascend too; the few that a lying one makes overlap
        // cost a longer walk.
        let mut ready = Vec::new();
        let last = self.streams.partition_point(|stream| stream.start < end);
        for stream in self.streams.iter_mut().take(last) {
            let from = stream.start.max(offset);
            let to = stream.end.min(end);
            if stream.missing == 0 || from >= to {
                continue;
            }
            let Some(piece) = slice(bytes, from - offset, to - offset) else {
                continue;
            };
            stream.missing -= to - from;
            stream.pieces.push((from, piece));
            if stream.missing == 0
                && let Some(wanted) = stream.wanted.take()
            {
                let bytes = join(std::mem::take(&mut stream.pieces));
                ready.push(Ready { wanted, bytes });
            }
        }
        let done = self
            .streams
            .iter()
            .take_while(|stream| stream.wanted.is_none())
            .count();
        self.streams.drain(..done);
        ready
    }

    /// Whether nothing is waited for any more.
    pub(crate) fn is_done(&self) -> bool {
        self.streams.is_empty()
    }
}

fn slice(bytes: &Bytes, from: u64, to: u64) -> Option<Bytes> {
    let (from, to) = (usize::try_from(from).ok()?, usize::try_from(to).ok()?);
    (to <= bytes.len()).then(|| bytes.slice(from..to))
}

fn join(mut pieces: Vec<(u64, Bytes)>) -> Bytes {
    if let [(_, piece)] = pieces.as_slice() {
        return piece.clone();
    }
    pieces.sort_by_key(|(offset, _)| *offset);
    let mut whole = BytesMut::with_capacity(pieces.iter().map(|(_, piece)| piece.len()).sum());
    for (_, piece) in pieces {
        whole.extend_from_slice(&piece);
    }
    whole.freeze()
}

#[cfg(test)]
mod tests {
    use peel_image::layer::Encoding;
    use proptest::prelude::*;

    use super::*;
    use crate::fetch::layer::Stream;

    fn wanted(start: u64, end: u64) -> Wanted {
        Wanted {
            stream: Stream::for_test(start..end, Encoding::Plain),
            claims: Vec::new(),
        }
    }

    fn blob(length: usize) -> Bytes {
        (0..=250_u8).cycle().take(length).collect()
    }

    #[test]
    fn gaps_are_dropped_and_streams_come_as_soon_as_they_are_whole() {
        let blob = blob(100);
        let mut assembler = Assembler::new(vec![wanted(0, 10), wanted(20, 40)]);
        assert_eq!(assembler.push(0, &blob.slice(0..15)).len(), 1);
        assert_eq!(assembler.push(15, &blob.slice(15..39)).len(), 0);
        let ready = assembler.push(39, &blob.slice(39..100));
        assert_eq!(ready[0].bytes, blob.slice(20..40));
        assert!(assembler.is_done());
    }

    proptest! {
        #[test]
        fn any_cutting_and_order_gives_the_same_streams(
            mut cuts in prop::collection::btree_set(1_usize..999, 0..20),
            streams in prop::collection::btree_set(0_u64..1000, 2..20),
            seed in any::<usize>(),
        ) {
            let blob = blob(1000);
            let edges: Vec<u64> = streams.into_iter().collect();
            let mut assembler = Assembler::new(edges.windows(2).map(|pair| wanted(pair[0], pair[1])).collect());
            cuts.extend([0, 1000]);
            let cuts: Vec<usize> = cuts.into_iter().collect();
            let mut pieces: Vec<_> = cuts.windows(2).map(|pair| pair[0]..pair[1]).collect();
            let turn = seed % pieces.len();
            pieces.rotate_left(turn);
            let mut seen = Vec::new();
            for piece in pieces {
                for ready in assembler.push(piece.start as u64, &blob.slice(piece)) {
                    let range = ready.wanted.stream.range;
                    let place = usize::try_from(range.start)?..usize::try_from(range.end)?;
                    prop_assert_eq!(&ready.bytes, &blob.slice(place));
                    seen.push(range.start);
                }
            }
            seen.sort_unstable();
            prop_assert_eq!(&seen[..], &edges[..edges.len() - 1]);
            prop_assert!(assembler.is_done());
        }
    }
}
