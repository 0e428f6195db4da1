//! The compression function of SHA-256 (FIPS 180-4, section 6.2.2) for two messages at once, with the SHA instructions of
//! x86-64. One message leaves their unit idle half of the time, since each step waits for the one before; a second message
//! fills these gaps: 3.5 GB/s together against 1.8 GB/s one after the other (Zen 4). Other processors do them one after the other.

use sha2::block_api::compress256;

/// Bytes of a block.
pub(super) const BLOCK: usize = 64;
/// The eight words of a hash value.
pub(super) type State = [u32; 8];

/// Takes as many blocks into `first` as into `second`; what the longer list has more is left.
pub(super) fn compress_both(
    first: (&mut State, &[[u8; BLOCK]]),
    second: (&mut State, &[[u8; BLOCK]]),
) -> usize {
    let count = first.1.len().min(second.1.len());
    let (Some(one), Some(two)) = (first.1.get(..count), second.1.get(..count)) else {
        return 0;
    };
    #[cfg(target_arch = "x86_64")]
    if x86::both(first.0, one, second.0, two) {
        return count;
    }
    compress256(first.0, one);
    compress256(second.0, two);
    count
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::x86_64::{
        __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_extract_epi32, _mm_set_epi8, _mm_set_epi32,
        _mm_set_epi64x, _mm_sha256msg1_epu32, _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32, _mm_shuffle_epi8,
        _mm_shuffle_epi32,
    };

    use super::{BLOCK, State};

    /// FIPS 180-4, section 4.2.2.
    const ROUND_CONSTANTS: [u32; 64] = [
        0x428a_2f98,
        0x7137_4491,
        0xb5c0_fbcf,
        0xe9b5_dba5,
        0x3956_c25b,
        0x59f1_11f1,
        0x923f_82a4,
        0xab1c_5ed5,
        0xd807_aa98,
        0x1283_5b01,
        0x2431_85be,
        0x550c_7dc3,
        0x72be_5d74,
        0x80de_b1fe,
        0x9bdc_06a7,
        0xc19b_f174,
        0xe49b_69c1,
        0xefbe_4786,
        0x0fc1_9dc6,
        0x240c_a1cc,
        0x2de9_2c6f,
        0x4a74_84aa,
        0x5cb0_a9dc,
        0x76f9_88da,
        0x983e_5152,
        0xa831_c66d,
        0xb003_27c8,
        0xbf59_7fc7,
        0xc6e0_0bf3,
        0xd5a7_9147,
        0x06ca_6351,
        0x1429_2967,
        0x27b7_0a85,
        0x2e1b_2138,
        0x4d2c_6dfc,
        0x5338_0d13,
        0x650a_7354,
        0x766a_0abb,
        0x81c2_c92e,
        0x9272_2c85,
        0xa2bf_e8a1,
        0xa81a_664b,
        0xc24b_8b70,
        0xc76c_51a3,
        0xd192_e819,
        0xd699_0624,
        0xf40e_3585,
        0x106a_a070,
        0x19a4_c116,
        0x1e37_6c08,
        0x2748_774c,
        0x34b0_bcb5,
        0x391c_0cb3,
        0x4ed8_aa4a,
        0x5b9c_ca4f,
        0x682e_6ff3,
        0x748f_82ee,
        0x78a5_636f,
        0x84c8_7814,
        0x8cc7_0208,
        0x90be_fffa,
        0xa450_6ceb,
        0xbef9_a3f7,
        0xc671_78f2,
    ];
    /// Messages at once.
    const LANES: usize = 2;

    /// `false`, and nothing is done, if the processor lacks the instructions.
    #[expect(
        unsafe_code,
        reason = "functions that use vector instructions must be called so"
    )]
    pub(super) fn both(
        first: &mut State,
        one: &[[u8; BLOCK]],
        second: &mut State,
        two: &[[u8; BLOCK]],
    ) -> bool {
        if !(is_x86_feature_detected!("sha")
            && is_x86_feature_detected!("sse4.1")
            && is_x86_feature_detected!("ssse3"))
        {
            return false;
        }
        // SAFETY: the processor has the instructions, and the function touches nothing but its arguments.
        unsafe { compress(first, one, second, two) };
        true
    }

    // Nothing here may go through a closure or an iterator's adapter: those are compiled without the instructions, so the
    // vectors would go through memory.

    /// The words of a block, which are big-endian there.
    #[inline]
    #[target_feature(enable = "sha,sse4.1,ssse3")]
    fn load(block: &[u8; BLOCK]) -> [__m128i; 4] {
        let swap = _mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3);
        let mut vectors = [swap; 4];
        let (quarters, _) = block.as_chunks::<16>();
        for (vector, quarter) in vectors.iter_mut().zip(quarters) {
            let (halves, _) = quarter.as_chunks::<8>();
            let words = _mm_set_epi64x(i64::from_le_bytes(halves[1]), i64::from_le_bytes(halves[0]));
            *vector = _mm_shuffle_epi8(words, swap);
        }
        vectors
    }

    /// The words A, B, E, F and C, D, G, H of a state, each four in a vector.
    #[inline]
    #[target_feature(enable = "sha,sse4.1,ssse3")]
    fn split(state: &State) -> [__m128i; 2] {
        let [a, b, c, d, e, f, g, h] = *state;
        [vector(f, e, b, a), vector(h, g, d, c)]
    }

    /// The other way.
    #[inline]
    #[target_feature(enable = "sha,sse4.1,ssse3")]
    fn join([abef, cdgh]: [__m128i; 2]) -> State {
        [
            _mm_extract_epi32::<3>(abef).cast_unsigned(),
            _mm_extract_epi32::<2>(abef).cast_unsigned(),
            _mm_extract_epi32::<3>(cdgh).cast_unsigned(),
            _mm_extract_epi32::<2>(cdgh).cast_unsigned(),
            _mm_extract_epi32::<1>(abef).cast_unsigned(),
            _mm_extract_epi32::<0>(abef).cast_unsigned(),
            _mm_extract_epi32::<1>(cdgh).cast_unsigned(),
            _mm_extract_epi32::<0>(cdgh).cast_unsigned(),
        ]
    }

    /// Four words, the lowest first.
    #[inline]
    #[target_feature(enable = "sha,sse4.1,ssse3")]
    fn vector(a: u32, b: u32, c: u32, d: u32) -> __m128i {
        _mm_set_epi32(d.cast_signed(), c.cast_signed(), b.cast_signed(), a.cast_signed())
    }

    /// Four rounds of each message.
    #[inline]
    #[target_feature(enable = "sha,sse4.1,ssse3")]
    fn rounds(group: usize, states: &mut [[__m128i; 2]; LANES], schedule: [__m128i; LANES]) {
        let at = 4 * group;
        let constants = vector(
            ROUND_CONSTANTS[at],
            ROUND_CONSTANTS[at + 1],
            ROUND_CONSTANTS[at + 2],
            ROUND_CONSTANTS[at + 3],
        );
        let mut sums = schedule;
        for (state, sum) in states.iter_mut().zip(&mut sums) {
            *sum = _mm_add_epi32(*sum, constants);
            state[1] = _mm_sha256rnds2_epu32(state[1], state[0], *sum);
        }
        for (state, sum) in states.iter_mut().zip(&sums) {
            state[0] = _mm_sha256rnds2_epu32(state[0], state[1], _mm_shuffle_epi32::<0x0e>(*sum));
        }
    }

    /// Sixteen rounds, for which the message schedule goes on.
    #[inline]
    #[target_feature(enable = "sha,sse4.1,ssse3")]
    fn scheduled_rounds(
        group: usize,
        states: &mut [[__m128i; 2]; LANES],
        schedule: &mut [[__m128i; 4]; LANES],
    ) {
        for at in 0..4 {
            for words in schedule.iter_mut() {
                let (second, third, fourth) = (words[(at + 1) % 4], words[(at + 2) % 4], words[(at + 3) % 4]);
                let sum = _mm_add_epi32(
                    _mm_sha256msg1_epu32(words[at], second),
                    _mm_alignr_epi8::<4>(fourth, third),
                );
                words[at] = _mm_sha256msg2_epu32(sum, fourth);
            }
            rounds(group + at, states, [schedule[0][at], schedule[1][at]]);
        }
    }

    #[target_feature(enable = "sha,sse4.1,ssse3")]
    fn compress(first: &mut State, one: &[[u8; BLOCK]], second: &mut State, two: &[[u8; BLOCK]]) {
        let mut states = [split(first), split(second)];
        for (one, two) in one.iter().zip(two) {
            let before = states;
            let mut schedule = [load(one), load(two)];
            let [[a, b, c, d], [e, f, g, h]] = schedule;
            rounds(0, &mut states, [a, e]);
            rounds(1, &mut states, [b, f]);
            rounds(2, &mut states, [c, g]);
            rounds(3, &mut states, [d, h]);
            scheduled_rounds(4, &mut states, &mut schedule);
            scheduled_rounds(8, &mut states, &mut schedule);
            scheduled_rounds(12, &mut states, &mut schedule);
            for (state, before) in states.iter_mut().zip(&before) {
                state[0] = _mm_add_epi32(state[0], before[0]);
                state[1] = _mm_add_epi32(state[1], before[1]);
            }
        }
        *first = join(states[0]);
        *second = join(states[1]);
    }
}
