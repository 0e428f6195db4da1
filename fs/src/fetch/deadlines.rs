//! When reads that wait must be looked at. Reads that start over keep their deadline, so entries do not come in its order.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Mutex;
use std::time::Instant;

use crate::lock;

/// Deadlines and the numbers of the objects that are read, soonest first.
#[derive(Debug, Default)]
pub(super) struct Deadlines(Mutex<BinaryHeap<Reverse<(Instant, u32)>>>);

impl Deadlines {
    /// A read of the object waits until then.
    pub(super) fn push(&self, deadline: Instant, object: u32) {
        lock(&self.0).push(Reverse((deadline, object)));
    }

    /// Takes the object of a read whose deadline has passed.
    pub(super) fn due(&self, now: Instant) -> Option<u32> {
        let mut waiting = lock(&self.0);
        let Reverse((deadline, object)) = *waiting.peek()?;
        (deadline <= now).then(|| {
            waiting.pop();
            object
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_soonest_comes_first_whenever_it_was_added() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let deadlines = Deadlines::default();
        for (seconds, object) in [(60, 1), (90, 2), (30, 3), (60, 4)] {
            deadlines.push(at(seconds), object);
        }
        assert_eq!(deadlines.due(at(29)), None);
        assert_eq!(deadlines.due(at(30)), Some(3));
        assert_eq!(deadlines.due(at(59)), None);
        assert_eq!([1, 2].map(|_| deadlines.due(at(60))), [Some(1), Some(4)]);
        assert_eq!(deadlines.due(at(89)), None);
        assert_eq!(deadlines.due(at(1000)), Some(2));
        assert_eq!(deadlines.due(at(1000)), None);
    }
}
