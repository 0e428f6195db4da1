//! The order of the prefetch: which bytes of which layer come when.

use std::ops::Range;

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
        let end = end.min(limit);
        if end > *start {
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
        let ends = [Some(100), None, Some(50)];
        for (order, begun, expected) in [
            (None, [0, 0, 0], vec![(0, 0..100), (2, 0..50)]),
            (None, [100, 0, 20], vec![(2, 20..50)]),
            (
                Some("2:10,0:40,2:50"),
                [0, 0, 0],
                vec![(2, 0..10), (0, 0..40), (2, 10..50), (0, 40..100)],
            ),
            (
                Some("2:10, 0:40"),
                [60, 0, 0],
                vec![(2, 0..10), (0, 60..100), (2, 10..50)],
            ),
            (
                Some("1:10,9:10,0:99999,x:y,,0"),
                [0, 0, 0],
                vec![(0, 0..100), (2, 0..50)],
            ),
        ] {
            assert_eq!(plan(order, &ends, &begun), expected, "{order:?}");
        }
    }
}
