//! The order in which a start reads across layers, for the manifest's annotation
//! [`PREFETCH_ORDER`](peel_image::annotations::PREFETCH_ORDER): `layer:end` pairs, "then layer `layer` up to blob offset
//! `end`".
//!
//! Inside a layer the writer has put the files in that order already; between layers only the manifest can say it.

/// Most pairs of the annotation: a few kilobytes of manifest, far below what registries accept.
pub const RUNS_MAX: usize = 256;
/// What a run is stretched to first when there are too many, in bytes; doubled until there are few enough.
const FIRST_STRETCH: u64 = 64 << 10;

/// One file that was read: its layer and where its bytes end in that layer's blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    /// Position of the layer, lowest first.
    pub layer: usize,
    /// End of the file's last chunk in the blob.
    pub end: u64,
}

/// The annotation's value, `None` when there is nothing to prefetch. `prefetch_ends` has each layer's end of the
/// prioritized range (0: none); every one of them is reached in the end.
pub fn annotation(reads: &[Read], prefetch_ends: &[u64]) -> Option<String> {
    let mut stretch = 0;
    let runs = loop {
        let runs = runs(reads, prefetch_ends, stretch);
        // With a stretch beyond every end there is one run per layer, which no stretch can make fewer.
        if runs.len() <= RUNS_MAX || prefetch_ends.iter().all(|end| stretch >= *end) {
            break runs;
        }
        stretch = stretch.saturating_mul(2).max(FIRST_STRETCH);
    };
    let text = runs
        .iter()
        .take(RUNS_MAX)
        .map(|run| format!("{}:{}", run.layer, run.end))
        .collect::<Vec<_>>()
        .join(",");
    (!text.is_empty()).then_some(text)
}

/// Reads joined into runs. A run reaches at least `stretch` bytes beyond where its layer was before, so that short
/// visits to a layer become one.
fn runs(reads: &[Read], prefetch_ends: &[u64], stretch: u64) -> Vec<Read> {
    let mut reached = vec![0; prefetch_ends.len()];
    let mut runs: Vec<Read> = Vec::new();
    let rest = prefetch_ends
        .iter()
        .enumerate()
        .map(|(layer, end)| Read { layer, end: *end });
    for read in reads.iter().copied().chain(rest) {
        let (Some(reached), Some(limit)) = (reached.get_mut(read.layer), prefetch_ends.get(read.layer))
        else {
            continue;
        };
        if read.end.min(*limit) <= *reached {
            continue;
        }
        *reached = read.end.max(reached.saturating_add(stretch)).min(*limit);
        match runs.last_mut() {
            Some(last) if last.layer == read.layer => last.end = *reached,
            _ => runs.push(Read {
                layer: read.layer,
                end: *reached,
            }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read((layer, end): (usize, u64)) -> Read {
        Read { layer, end }
    }

    #[test]
    fn neighbours_are_joined() {
        for (reads, ends, expected) in [
            (&[][..], &[0, 0][..], None),
            (&[], &[0, 70], Some("1:70")),
            (
                &[(0, 10), (0, 20), (1, 5), (0, 30)],
                &[30, 5],
                Some("0:20,1:5,0:30"),
            ),
            // What ends before the point that was reached is there already; what lies beyond the range is not asked for.
            (
                &[(0, 20), (1, 5), (0, 10), (0, 99)],
                &[30, 5],
                Some("0:20,1:5,0:30"),
            ),
            // A layer that does not exist, and one without a range.
            (&[(7, 10), (1, 10), (0, 10)], &[12, 0], Some("0:12")),
        ] {
            let reads: Vec<Read> = reads.iter().copied().map(read).collect();
            assert_eq!(annotation(&reads, ends).as_deref(), expected, "{reads:?}");
        }
    }

    proptest! {
        #[test]
        fn every_range_is_covered_in_few_runs(
            reads in proptest::collection::vec((0_usize..6, 1_u64..5_000_000), 0..2000),
        ) {
            let reads: Vec<Read> = reads.into_iter().map(read).collect();
            let ends: Vec<u64> = (0..6)
                .map(|layer| reads.iter().filter(|read| read.layer == layer).map(|read| read.end).max().unwrap_or(0))
                .collect();
            let text = annotation(&reads, &ends).unwrap_or_default();
            let mut reached = vec![0; ends.len()];
            let mut count = 0;
            for pair in text.split(',').filter(|pair| !pair.is_empty()) {
                let (layer, end) = pair.split_once(':').unwrap();
                let (layer, end): (usize, u64) = (layer.parse().unwrap(), end.parse().unwrap());
                prop_assert!(end > reached[layer], "a run that brings nothing");
                reached[layer] = end;
                count += 1;
            }
            prop_assert!(count <= RUNS_MAX);
            prop_assert_eq!(reached, ends);
        }
    }
}
