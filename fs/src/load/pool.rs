//! One bound for the memory that the metadata of all images takes which are being loaded: each image has bounds of its own
//! ([`super::memory`]), but several that ask for all of them at the same time add up.
//!
//! What must hold: loads that each hold a part never wait for each other without end. When the pool is used up, one load may exceed it
//! until that is over, so it never waits here, and gives back what it holds; the others wait, with a deadline. So all loads together
//! take no more than the pool and what one image may have, but for the [`READERS`](crate::fetch::READERS) indexes that are being read.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::lock;

/// What all loads of a process take from.
#[derive(Debug)]
pub(crate) struct Pool {
    state: Mutex<State>,
    changed: Notify,
    limit: u64,
}

#[derive(Debug, Default)]
struct State {
    taken: u64,
    /// The load that may take more than there is.
    exempt: Option<u64>,
    next_load: u64,
}

/// What one load has taken. Dropping it gives all of it back.
#[derive(Debug)]
pub(crate) struct Share {
    pool: Arc<Pool>,
    load: u64,
    taken: AtomicU64,
}

impl Pool {
    /// A pool of so many bytes.
    pub(crate) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            changed: Notify::new(),
            limit,
        })
    }

    /// Bytes that all loads may take together, but for one that may exceed them.
    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    /// The share of a load that begins.
    pub(crate) fn share(self: &Arc<Self>) -> Arc<Share> {
        let mut state = lock(&self.state);
        let load = state.next_load;
        state.next_load += 1;
        Arc::new(Share {
            pool: Arc::clone(self),
            load,
            taken: AtomicU64::new(0),
        })
    }
}

impl Share {
    /// Takes memory; false when others have it. Nothing can always be taken.
    pub(crate) fn take(&self, bytes: u64) -> bool {
        let mut state = lock(&self.pool.state);
        let taken = state.taken.saturating_add(bytes);
        if bytes > 0 && taken > self.pool.limit && *state.exempt.get_or_insert(self.load) != self.load {
            return false;
        }
        state.taken = taken;
        self.taken.fetch_add(bytes, Ordering::Relaxed);
        true
    }

    /// Takes memory whether it is there or not: it is used already.
    pub(crate) fn take_anyway(&self, bytes: u64) {
        let mut state = lock(&self.pool.state);
        state.taken = state.taken.saturating_add(bytes);
        self.taken.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Takes memory, when it is there; false when it was not for so long.
    pub(crate) async fn reserve(&self, bytes: u64, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            // Before the look: what is given back after it must not be missed.
            let changed = self.pool.changed.notified();
            if self.take(bytes) {
                return true;
            }
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                return false;
            }
        }
    }

    /// Gives back some of what was taken.
    pub(crate) fn give_back(&self, bytes: u64) {
        self.taken.fetch_sub(bytes, Ordering::Relaxed);
        let mut state = lock(&self.pool.state);
        state.taken = state.taken.saturating_sub(bytes);
        if state.taken <= self.pool.limit {
            // The next one that needs it may be another, which the one that had it may wait for.
            state.exempt = None;
        }
        drop(state);
        self.pool.changed.notify_waiters();
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        {
            let mut state = lock(&self.pool.state);
            if state.exempt == Some(self.load) {
                state.exempt = None;
            }
        }
        self.give_back(self.taken.load(Ordering::Relaxed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_load_may_exceed_the_pool_and_the_others_wait() {
        let pool = Pool::new(100);
        let [first, second, third] = [(); 3].map(|()| pool.share());
        assert!(first.take(60) && second.take(40));
        assert!(second.take(500), "somebody has to come to an end");
        assert!(second.take(1) && !first.take(1) && !third.take(1));
        assert!(third.take(0));
        second.give_back(500);
        assert!(!first.take(1), "101 of 100 are taken");
        second.give_back(1);
        assert!(first.take(1), "the next one that does not fit");
        assert!(!second.take(1) && !third.take(1));
        third.take_anyway(7);
        drop(second);
        assert!(third.take(32), "100 of 100");
        assert!(first.take(1) && !third.take(1), "101 of 100 again");
        drop(first);
        assert!(third.take(61) && third.take(1));
        drop(third);
        let state = lock(&pool.state);
        assert_eq!((state.taken, state.exempt), (0, None));
    }

    #[tokio::test]
    async fn loads_that_each_hold_a_part_come_to_an_end() {
        let pool = Pool::new(100);
        let patience = Duration::from_secs(30);
        let loads = (0..20).map(|_| {
            let share = pool.share();
            tokio::spawn(async move {
                for _ in 0..7 {
                    if !share.reserve(30, patience).await {
                        return false;
                    }
                    tokio::task::yield_now().await;
                }
                true
            })
        });
        for load in loads.collect::<Vec<_>>() {
            assert!(load.await.unwrap());
        }
        assert_eq!(lock(&pool.state).taken, 0);
    }

    #[tokio::test]
    async fn a_wait_has_an_end() {
        let pool = Pool::new(100);
        let (first, second, third) = (pool.share(), pool.share(), pool.share());
        assert!(first.take(100) && second.take(1));
        assert!(!third.reserve(1, Duration::from_millis(1)).await);
        let (waited, ()) = tokio::join!(third.reserve(50, Duration::from_secs(30)), async {
            drop(second);
            first.give_back(50);
        });
        assert!(waited);
    }
}
