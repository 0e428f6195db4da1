//! The order of the prefetch: which bytes of which layer come when.

use std::ops::Range;

/// Smallest segment. A start may change between layers with every file; a request of its own for each of them would
/// leave the link idle for a round trip. At 500 Mbit/s these bytes take about as long as the 20 ms.
const GRAIN: u64 = 1 << 20;

/// Which bytes of which layer to prefetch, in order. `order` is the manifest's annotation; what it leaves out follows,
/// lowest layer first. `begun` is how far each layer is under way already.
pub(super) fn plan(order: Option<&str>, ends: &[Option<u64>], begun: &[u64]) -> Vec<(usize, Range<u64>)> {
    let mut at: Vec<u64> = begun.to_vec();
    let mut segments = Vec::new();
    let mut add = |layer: usize, end: u64| {
        let Some(limit) = ends.get(layer).copied().flatten() else {
            return;
        };
        let Some(start) = at.get_mut(layer) else { return };
        // Never less than a request is worth; what is taken too early is left out of later segments.
        if end.min(limit) > *start {
            let end = end.max(start.saturating_add(GRAIN)).min(limit);
            segments.push((layer, *start..end));
            *start = end;
        }
    };
    for pair in order.unwrap_or_default().split(',') {
        if let Some((layer, end)) = pair.split_once(':')
            && let (Ok(layer), Ok(end)) = (layer.trim().parse(), end.trim().parse())
        {
            add(layer, end);
        }
    }
    for layer in 0..ends.len() {
        add(layer, u64::MAX);
    }
    segments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefetch_follows_the_annotation_then_the_layers() {
        const G: u64 = GRAIN;
        let ends = [Some(10 * G), None, Some(5 * G)];
        for (order, begun, expected) in [
            (None, [0, 0, 0], vec![(0, 0..10 * G), (2, 0..5 * G)]),
            (None, [10 * G, 0, 2 * G], vec![(2, 2 * G..5 * G)]),
            (
                Some("2:2097152,0:4194304,2:5242880"),
                [0, 0, 0],
                vec![
                    (2, 0..2 * G),
                    (0, 0..4 * G),
                    (2, 2 * G..5 * G),
                    (0, 4 * G..10 * G),
                ],
            ),
            (
                Some("2:10, 0:4194304,2:20"),
                [6 * G, 0, 0],
                vec![(2, 0..G), (0, 6 * G..10 * G), (2, G..5 * G)],
            ),
            (
                Some("1:10,9:10,0:99999999,x:y,,0"),
                [0, 0, 0],
                vec![(0, 0..10 * G), (2, 0..5 * G)],
            ),
        ] {
            assert_eq!(plan(order, &ends, &begun), expected, "{order:?}");
        }
    }
}
