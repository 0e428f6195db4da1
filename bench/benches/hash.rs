//! Hashing, one core, from memory: two messages at once against `sha2` one after the other, and the rolling checksum that cuts
//! files into chunks against one sha256 of the same bytes. The layer writer does both to every byte.

use std::hint::black_box;

use peel_bench::measuring;
use peel_bench::pair::{Comparisons, timed};
use peel_hash::Digest;
use peel_hash::rolling::Splitter;
use sha2::Digest as _;

/// Bytes of each message: beyond any cache, as the bytes of a layer are.
const LENGTH: usize = 64 << 20;
/// Bytes that the splitter is given at once, as by the layer writer.
const BLOCK: usize = 1 << 16;

fn main() -> anyhow::Result<()> {
    let length = if measuring() { LENGTH } else { 1 << 20 };
    let (one, two) = (noise(1, length), noise(2, length));
    let expected = [&one, &two].map(|data| Digest::from_bytes(sha2::Sha256::digest(data).into()));
    anyhow::ensure!(Digest::of_each([&*one, &*two]) == expected, "the digests differ");
    let chunks = split(&one);
    anyhow::ensure!(chunks > length / 1_000_000, "only {chunks} chunks");

    let mut comparisons = Comparisons::new("hash");
    comparisons.compare(
        "sha256 of two messages",
        [
            ("both at once", &mut || {
                timed(|| Ok(Digest::of_each([&*one, &*two])))
            }),
            ("sha2", &mut || {
                timed(|| Ok([&one, &two].map(sha2::Sha256::digest)))
            }),
        ],
    )?;
    comparisons.compare(
        "chunks of a file",
        [
            ("rolling checksum", &mut || timed(|| Ok(split(&one)))),
            ("sha256", &mut || timed(|| Ok(Digest::of(&one)))),
        ],
    )?;
    comparisons.finish();
    Ok(())
}

/// The number of chunks of a file with this content.
fn split(data: &[u8]) -> usize {
    let (mut splitter, mut chunks) = (Splitter::new(), 0);
    let mut count = |cut| {
        black_box(cut);
        chunks += 1;
    };
    for block in data.chunks(BLOCK) {
        splitter.push(block, &mut count);
    }
    splitter.finish(&mut count);
    chunks
}

/// Bytes that look random; the same for the same seed.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    let words = std::iter::repeat_with(|| {
        // Knuth's multiplier (MMIX); the upper half is what varies.
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 32).to_le_bytes()
    });
    words.flatten().take(length).collect()
}
