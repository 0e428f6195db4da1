//! Log lines that would come thousands of times: of each kind, about each layer, one in a while, with the number of those that
//! were left out.
//!
//! Called by the fetch engine, where each read, retry and chunk may have the same thing to say.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use peel_image::Digest;

use crate::lock;

/// How long lines of a kind are left out after one of them.
const INTERVAL: Duration = Duration::from_secs(30);
/// Kinds and layers that are told apart at a time; beyond, layers are not.
const SUBJECTS_MAX: usize = 256;

/// Remembers what was said lately.
#[derive(Debug, Default)]
pub(crate) struct Quiet(Mutex<HashMap<(&'static str, Digest), Said>>);

#[derive(Debug)]
struct Said {
    at: Instant,
    left_out: u64,
}

/// Lines that were left out and that nothing has told about.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LeftOut {
    /// Of this kind.
    pub(crate) kind: &'static str,
    /// About this layer.
    pub(crate) layer: Digest,
    /// How many.
    pub(crate) lines: u64,
}

impl Quiet {
    /// Whether a line of this kind about this layer is to be logged now; if so, how many were left out since the last one.
    pub(crate) fn may_say(&self, kind: &'static str, layer: &Digest, now: Instant) -> Option<u64> {
        let mut said = lock(&self.0);
        let mut subject = (kind, *layer);
        if said.len() >= SUBJECTS_MAX && !said.contains_key(&subject) {
            subject.1 = Digest::EMPTY;
        }
        match said.get_mut(&subject) {
            Some(last) if now.saturating_duration_since(last.at) < INTERVAL => {
                last.left_out += 1;
                None
            }
            Some(last) => {
                last.at = now;
                Some(std::mem::take(&mut last.left_out))
            }
            None => {
                said.insert(subject, Said { at: now, left_out: 0 });
                Some(0)
            }
        }
    }

    /// Forgets what was said long ago. Returns what has to be told about that.
    pub(crate) fn forget(&self, now: Instant) -> Vec<LeftOut> {
        let mut said = lock(&self.0);
        let mut left_out = Vec::new();
        said.retain(|(kind, layer), last| {
            let is_over = now.saturating_duration_since(last.at) >= INTERVAL;
            if is_over && last.left_out > 0 {
                left_out.push(LeftOut {
                    kind,
                    layer: *layer,
                    lines: last.left_out,
                });
            }
            !is_over
        });
        left_out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_in_a_while_and_no_line_is_lost_count_of() {
        let quiet = Quiet::default();
        let start = Instant::now();
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        assert_eq!(quiet.may_say("fetch", &a, start), Some(0));
        for _ in 0..1000 {
            assert_eq!(quiet.may_say("fetch", &a, start), None);
        }
        assert_eq!(quiet.may_say("fetch", &b, start), Some(0));
        assert_eq!(quiet.may_say("keep", &a, start), Some(0));
        assert_eq!(quiet.forget(start), []);
        let later = start + INTERVAL;
        assert_eq!(quiet.may_say("fetch", &a, later), Some(1000));
        assert_eq!(quiet.may_say("fetch", &a, later), None);
        let left_out = LeftOut {
            kind: "fetch",
            layer: a,
            lines: 1,
        };
        assert_eq!(quiet.forget(later + INTERVAL), [left_out]);
        assert!(lock(&quiet.0).is_empty());
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let quiet = Quiet::default();
        let now = Instant::now();
        let said = (0..10_000_u32)
            .filter(|number| {
                let layer = Digest::of(&number.to_le_bytes());
                quiet.may_say("fetch", &layer, now).is_some()
            })
            .count();
        assert_eq!(said, SUBJECTS_MAX + 1);
        assert_eq!(quiet.forget(now + INTERVAL)[0].lines, 10_000 - said as u64);
    }
}
