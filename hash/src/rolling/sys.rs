//! The rolling checksum over eight bytes at a time, with the vector instructions that every x86-64 has, or over sixteen with
//! AVX2: the sums of the first one, two, three, ... numbers take three steps that are done for all of them at once. It is
//! several times as fast as byte by byte, which is what other processors do. Called for every byte of every larger file.

#[cfg(not(target_arch = "x86_64"))]
pub(super) use plain as scan;

#[cfg(target_arch = "x86_64")]
use super::CHARACTER_OFFSET;
#[cfg(any(test, not(target_arch = "x86_64")))]
use super::next;
use super::{LANES, SPLIT, Scanned};

/// Goes on while no chunk ends. `leaving` are the bytes that leave the window for each byte of `blocks`.
#[cfg(target_arch = "x86_64")]
#[expect(
    unsafe_code,
    reason = "functions that use vector instructions must be called so"
)]
pub(super) fn scan(first: u16, second: u16, blocks: &[[u8; LANES]], leaving: &[[u8; LANES]]) -> Scanned {
    let (mut done, mut sums) = (0, (first, second));
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2; the function reads and writes nothing but its arguments.
        let scanned = unsafe { pairs(first, second, blocks, leaving) };
        (done, sums) = (scanned.blocks, (scanned.first, scanned.second));
    }
    let (blocks, leaving) = (
        blocks.get(done..).unwrap_or_default(),
        leaving.get(done..).unwrap_or_default(),
    );
    // SAFETY: the function needs SSE2, which is part of x86-64; it reads and writes nothing but its arguments.
    let scanned = unsafe { vectors(sums.0, sums.1, blocks, leaving) };
    Scanned {
        blocks: done + scanned.blocks,
        ..scanned
    }
}

/// Two blocks at a time, each in one half of the vectors; ends before the pair in which a chunk ends.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn pairs(first: u16, second: u16, blocks: &[[u8; LANES]], leaving: &[[u8; LANES]]) -> Scanned {
    use core::arch::x86_64::{
        __m256i, _mm_set_epi64x, _mm256_add_epi16, _mm256_cmpeq_epi16, _mm256_cvtepu8_epi16,
        _mm256_extract_epi16, _mm256_movemask_epi8, _mm256_permute2x128_si256, _mm256_permute4x64_epi64,
        _mm256_set1_epi16, _mm256_shufflehi_epi16, _mm256_slli_epi16, _mm256_slli_si256, _mm256_sub_epi16,
    };

    #[target_feature(enable = "avx2")]
    fn widen(bytes: &[[u8; LANES]; 2]) -> __m256i {
        let [low, high] = bytes;
        _mm256_cvtepu8_epi16(_mm_set_epi64x(
            i64::from_le_bytes(*high),
            i64::from_le_bytes(*low),
        ))
    }

    #[target_feature(enable = "avx2")]
    fn prefix_sums(numbers: __m256i) -> __m256i {
        let numbers = _mm256_add_epi16(numbers, _mm256_slli_si256::<2>(numbers));
        let numbers = _mm256_add_epi16(numbers, _mm256_slli_si256::<4>(numbers));
        let numbers = _mm256_add_epi16(numbers, _mm256_slli_si256::<8>(numbers));
        // What the lower half comes to belongs to the upper half too.
        let last = _mm256_shufflehi_epi16::<0xff>(numbers);
        let carried = _mm256_permute2x128_si256::<0x08>(last, last);
        _mm256_add_epi16(numbers, _mm256_permute4x64_epi64::<0b11_11_00_00>(carried))
    }

    /// The last lane in all lanes.
    #[target_feature(enable = "avx2")]
    fn last(numbers: __m256i) -> __m256i {
        _mm256_permute4x64_epi64::<0xff>(_mm256_shufflehi_epi16::<0xff>(numbers))
    }

    let offset = _mm256_set1_epi16((64 * CHARACTER_OFFSET).cast_signed());
    let split = _mm256_set1_epi16(SPLIT.cast_signed());
    let mut sums = (
        _mm256_set1_epi16(first.cast_signed()),
        _mm256_set1_epi16(second.cast_signed()),
    );
    let mut count = 0;
    for (block, leaving) in blocks.as_chunks().0.iter().zip(leaving.as_chunks().0) {
        let leaving = widen(leaving);
        let gain = prefix_sums(_mm256_sub_epi16(widen(block), leaving));
        let first = _mm256_add_epi16(gain, sums.0);
        let loss = _mm256_add_epi16(_mm256_slli_epi16::<6>(leaving), offset);
        let gain_of_second = prefix_sums(_mm256_sub_epi16(first, loss));
        let second = _mm256_add_epi16(gain_of_second, sums.1);
        if _mm256_movemask_epi8(_mm256_cmpeq_epi16(second, split)) != 0 {
            break;
        }
        // Not of the sums themselves, so that the next pair waits for an addition only.
        sums = (
            _mm256_add_epi16(sums.0, last(gain)),
            _mm256_add_epi16(sums.1, last(gain_of_second)),
        );
        count += 2;
    }
    let low = |lane: i32| u16::try_from(lane & 0xffff).unwrap_or(0);
    Scanned {
        blocks: count,
        first: low(_mm256_extract_epi16::<0>(sums.0)),
        second: low(_mm256_extract_epi16::<0>(sums.1)),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse2")]
fn vectors(first: u16, second: u16, blocks: &[[u8; LANES]], leaving: &[[u8; LANES]]) -> Scanned {
    use core::arch::x86_64::{
        __m128i, _mm_add_epi16, _mm_cmpeq_epi16, _mm_cvtsi64_si128, _mm_extract_epi16, _mm_movemask_epi8,
        _mm_set1_epi16, _mm_setzero_si128, _mm_shufflehi_epi16, _mm_slli_epi16, _mm_slli_si128,
        _mm_sub_epi16, _mm_unpackhi_epi64, _mm_unpacklo_epi8,
    };

    #[target_feature(enable = "sse2")]
    fn widen(bytes: [u8; LANES]) -> __m128i {
        _mm_unpacklo_epi8(_mm_cvtsi64_si128(i64::from_le_bytes(bytes)), _mm_setzero_si128())
    }

    #[target_feature(enable = "sse2")]
    fn prefix_sums(numbers: __m128i) -> __m128i {
        let numbers = _mm_add_epi16(numbers, _mm_slli_si128::<2>(numbers));
        let numbers = _mm_add_epi16(numbers, _mm_slli_si128::<4>(numbers));
        _mm_add_epi16(numbers, _mm_slli_si128::<8>(numbers))
    }

    /// The last lane in all lanes.
    #[target_feature(enable = "sse2")]
    fn last(numbers: __m128i) -> __m128i {
        let high = _mm_shufflehi_epi16::<0xff>(numbers);
        _mm_unpackhi_epi64(high, high)
    }

    let offset = _mm_set1_epi16((64 * CHARACTER_OFFSET).cast_signed());
    let split = _mm_set1_epi16(SPLIT.cast_signed());
    let mut sums = (
        _mm_set1_epi16(first.cast_signed()),
        _mm_set1_epi16(second.cast_signed()),
    );
    let mut count = 0;
    for (block, leaving) in blocks.iter().zip(leaving) {
        let leaving = widen(*leaving);
        let first = prefix_sums(_mm_sub_epi16(widen(*block), leaving));
        let first = _mm_add_epi16(first, sums.0);
        let loss = _mm_add_epi16(_mm_slli_epi16::<6>(leaving), offset);
        let second = _mm_add_epi16(prefix_sums(_mm_sub_epi16(first, loss)), sums.1);
        if _mm_movemask_epi8(_mm_cmpeq_epi16(second, split)) != 0 {
            break;
        }
        sums = (last(first), last(second));
        count += 1;
    }
    let low = |lane: i32| u16::try_from(lane & 0xffff).unwrap_or(0);
    Scanned {
        blocks: count,
        first: low(_mm_extract_epi16::<0>(sums.0)),
        second: low(_mm_extract_epi16::<0>(sums.1)),
    }
}

/// The same without vectors.
#[cfg(any(test, not(target_arch = "x86_64")))]
pub(super) fn plain(
    mut first: u16,
    mut second: u16,
    blocks: &[[u8; LANES]],
    leaving: &[[u8; LANES]],
) -> Scanned {
    let mut count = 0;
    for (block, leaving) in blocks.iter().zip(leaving) {
        let before = (first, second);
        for (byte, old) in block.iter().zip(leaving) {
            (first, second) = next(first, second, *byte, *old);
            if second == SPLIT {
                (first, second) = before;
                return Scanned {
                    blocks: count,
                    first,
                    second,
                };
            }
        }
        count += 1;
    }
    Scanned {
        blocks: count,
        first,
        second,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn vectors_and_bytes_give_the_same(
            first in any::<u16>(),
            second in any::<u16>(),
            data in proptest::collection::vec(any::<[u8; LANES]>(), 0..4000),
        ) {
            let leaving: Vec<_> = data.iter().rev().copied().collect();
            let (one, other) = (scan(first, second, &data, &leaving), plain(first, second, &data, &leaving));
            prop_assert_eq!(
                (one.blocks, one.first, one.second),
                (other.blocks, other.first, other.second)
            );
        }
    }
}
