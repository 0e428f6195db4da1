//! When the server gives memory back that it has freed.
//!
//! A load takes many times the memory that stays of it, and so do reads of files that are not here yet. Called by the main
//! thread, which looks a few times a second at what has happened.

use std::time::{Duration, Instant};

use crate::protocol::Status;
use crate::sys;

/// How long nothing must have happened: while something does, the memory is soon used again.
const QUIET: Duration = Duration::from_secs(1);
/// Longest time between two times while something happens.
const BUSY: Duration = Duration::from_secs(10);

/// What was used since memory was last given back.
#[derive(Debug)]
pub(super) struct Memory {
    seen: Activity,
    /// Since when there has been something to give back, and when the last thing happened.
    due: Option<(Instant, Instant)>,
}

/// What changes whenever much memory is used or freed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Activity {
    mounts: usize,
    connections: usize,
    requests: u64,
    bytes: u64,
}

impl Activity {
    /// That of a server.
    pub(super) fn of(status: &Status) -> Self {
        Self {
            mounts: status.mounts.len(),
            connections: status.connections,
            requests: status.stats.requests,
            bytes: status.stats.bytes,
        }
    }
}

impl Memory {
    pub(super) fn new() -> Self {
        Self {
            seen: Activity::default(),
            due: None,
        }
    }

    /// Whether it is time to give memory back.
    fn is_due(&mut self, now: Activity, at: Instant) -> bool {
        if now != self.seen {
            self.seen = now;
            let since = self.due.map_or(at, |(since, _)| since);
            self.due = Some((since, at));
        }
        let is_due = self
            .due
            .is_some_and(|(since, last)| at >= last + QUIET || at >= since + BUSY);
        if is_due {
            self.due = None;
        }
        is_due
    }

    /// Gives memory back if it is time, in a thread that may take long.
    pub(super) fn look(&mut self, now: Activity) {
        if self.is_due(now, Instant::now()) {
            drop(tokio::task::spawn_blocking(sys::give_memory_back));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_when_it_is_quiet_and_now_and_then() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let activity = |bytes| Activity {
            bytes,
            ..Activity::default()
        };
        let mut memory = Memory::new();
        assert!(!memory.is_due(activity(0), at(0)), "nothing has happened");
        assert!(!memory.is_due(activity(1), at(1)));
        assert!(memory.is_due(activity(1), at(2)));
        assert!(!memory.is_due(activity(1), at(3)), "it is done");
        let busy: Vec<u64> = (4..30)
            .filter(|second| memory.is_due(activity(*second), at(*second)))
            .collect();
        assert_eq!(busy, [14, 25]);
    }
}
