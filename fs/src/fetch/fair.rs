//! Work that waits for threads, shared out by image: an image that has much of it fills its own queue and waits for itself.
//!
//! [`Fair`] is start-time fair queueing (Goyal, Vin, Cheng: SIGCOMM 1996): each image has a clock that advances by the bytes
//! that its work costs, and the one that is furthest behind is next. One that comes anew begins at the time of the work that
//! was begun last, so it neither waits for what others have queued nor has saved up a claim. [`Queues`] adds lanes, threads
//! that wait, and bounds for large work: that never has all threads, nor more than so many bytes of memory at a time.
//!
//! Used by the decode threads ([`super::decode`]) and by those that hash whole files ([`super::complete`]).

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Condvar, Mutex, PoisonError};

use crate::lock;

/// What any work costs besides its bytes, in bytes: opening files, answering, waking threads.
const OVERHEAD: u64 = 4 << 10;
/// Bytes of demand that may pass waiting prefetches before one of those has its turn: a read may wait for a chunk that was
/// claimed by a prefetch.
const PASS_MAX: u64 = 64 << 20;

/// Who waits for work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    /// A read.
    Demand,
    /// Nobody yet.
    Prefetch,
}

/// Queues of one lane, one for each image.
#[derive(Debug)]
pub(super) struct Fair<T> {
    queues: BTreeMap<u64, Queue<T>>,
    /// When the work that was begun last was due.
    clock: u64,
    arrivals: u64,
    /// Work from so many bytes on is large.
    large: u64,
}

#[derive(Debug)]
struct Queue<T> {
    /// In two queues, so that the small need not wait when there is no room for the large.
    small: VecDeque<Waiting<T>>,
    large: VecDeque<Waiting<T>>,
    /// When its next work is due.
    time: u64,
}

#[derive(Debug)]
struct Waiting<T> {
    work: T,
    bytes: u64,
    arrival: u64,
}

/// Work whose turn it is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Next<T> {
    pub(super) work: T,
    pub(super) image: u64,
    pub(super) bytes: u64,
}

impl<T> Queue<T> {
    fn is_empty(&self) -> bool {
        self.small.is_empty() && self.large.is_empty()
    }

    /// The queue of its next work and when that came.
    fn next(&self, with_large: bool) -> Option<(bool, u64)> {
        let small = self.small.front().map(|first| (false, first.arrival));
        let large = self.large.front().map(|first| (true, first.arrival));
        let large = large.filter(|_| with_large);
        small.into_iter().chain(large).min_by_key(|(_, arrival)| *arrival)
    }
}

impl<T> Fair<T> {
    /// Without work. Work from `large` bytes on is large.
    pub(super) const fn new(large: u64) -> Self {
        Self {
            queues: BTreeMap::new(),
            clock: 0,
            arrivals: 0,
            large,
        }
    }

    /// Whether no work waits.
    pub(super) fn is_empty(&self) -> bool {
        self.queues.values().all(Queue::is_empty)
    }

    /// How much work of an image waits.
    pub(super) fn waiting(&self, image: u64) -> usize {
        self.queues
            .get(&image)
            .map_or(0, |queue| queue.small.len() + queue.large.len())
    }

    /// Adds work of an image that costs so many bytes.
    pub(super) fn push(&mut self, image: u64, bytes: u64, work: T) {
        let (clock, arrival) = (self.clock, self.arrivals);
        self.arrivals += 1;
        let queue = self.queues.entry(image).or_insert_with(|| Queue {
            small: VecDeque::new(),
            large: VecDeque::new(),
            time: clock,
        });
        let size = if bytes >= self.large {
            &mut queue.large
        } else {
            &mut queue.small
        };
        size.push_back(Waiting { work, bytes, arrival });
    }

    /// Takes the work that is next. Large work waits where `admits` says no to its bytes; no other large work passes it.
    pub(super) fn pop(&mut self, admits: impl Fn(u64) -> bool) -> Option<Next<T>> {
        let large = self.queues.iter().filter_map(|(image, queue)| {
            let first = queue.large.front()?;
            Some((queue.time, first.arrival, *image, first.bytes))
        });
        let large = large
            .min()
            .filter(|(.., bytes)| admits(*bytes))
            .map(|(_, _, image, _)| image);
        let (.., image, is_large) = self
            .queues
            .iter()
            .filter_map(|(image, queue)| {
                let (is_large, arrival) = queue.next(large == Some(*image))?;
                Some((queue.time, arrival, *image, is_large))
            })
            .min()?;
        let queue = self.queues.get_mut(&image)?;
        let size = if is_large {
            &mut queue.large
        } else {
            &mut queue.small
        };
        let Waiting { work, bytes, .. } = size.pop_front()?;
        self.clock = self.clock.max(queue.time);
        queue.time = self.clock.saturating_add(bytes).saturating_add(OVERHEAD);
        self.forget();
        Some(Next { work, image, bytes })
    }

    /// Work of the image cost so much more than was said.
    pub(super) fn charge(&mut self, image: u64, bytes: u64) {
        if let Some(queue) = self.queues.get_mut(&image) {
            queue.time = queue.time.saturating_add(bytes);
        }
    }

    /// Takes all work.
    pub(super) fn take_all(&mut self) -> Vec<T> {
        let queues = std::mem::take(&mut self.queues).into_values();
        queues
            .flat_map(|queue| queue.small.into_iter().chain(queue.large))
            .map(|waiting| waiting.work)
            .collect()
    }

    /// Lets go of images that have no work and owe nothing. Where nobody waits, nothing is owed.
    fn forget(&mut self) {
        if self.is_empty() {
            self.queues.clear();
        }
        let clock = self.clock;
        self.queues
            .retain(|_, queue| !queue.is_empty() || queue.time > clock);
    }
}

/// What work may have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Work of one image that may wait in a lane.
    pub(super) queue: usize,
    /// Work from so many bytes on is large.
    pub(super) large: u64,
    /// Threads that may be at large work at a time.
    pub(super) large_threads: usize,
    /// Bytes of large work that may be under way at a time; one alone may exceed them.
    pub(super) large_bytes: u64,
}

/// Queues that threads take work from.
#[derive(Debug)]
pub(super) struct Queues<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    bounds: Bounds,
}

#[derive(Debug)]
struct State<T> {
    demand: Fair<T>,
    prefetch: Fair<T>,
    /// Bytes of demand that passed prefetches since one of those had its turn.
    passed: u64,
    running: Running,
    stopped: bool,
}

/// Large work that is under way.
#[derive(Debug, Default)]
struct Running {
    threads: usize,
    bytes: u64,
}

/// Why work was not taken on.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused<T> {
    /// Its image has filled its queue.
    Full(T),
    /// [`Queues::stop`] was called.
    Stopped(T),
}

/// Work that a thread is at; dropping it ends that.
#[derive(Debug)]
pub(super) struct Turn<'q, T> {
    queues: &'q Queues<T>,
    lane: Lane,
    image: u64,
    bytes: u64,
}

impl<T> Queues<T> {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self {
            state: Mutex::new(State {
                demand: Fair::new(bounds.large),
                prefetch: Fair::new(bounds.large),
                passed: 0,
                running: Running::default(),
                stopped: false,
            }),
            changed: Condvar::new(),
            bounds,
        }
    }

    /// Adds work of an image that costs so many bytes.
    pub(super) fn push(&self, lane: Lane, image: u64, bytes: u64, work: T) -> Result<(), Refused<T>> {
        {
            let mut state = lock(&self.state);
            if state.stopped {
                return Err(Refused::Stopped(work));
            }
            let fair = state.lane(lane);
            if fair.waiting(image) >= self.bounds.queue {
                return Err(Refused::Full(work));
            }
            fair.push(image, bytes, work);
        }
        self.changed.notify_one();
        Ok(())
    }

    /// The next work, as soon as there is some; `None` when it is over.
    pub(super) fn next(&self) -> Option<(T, Turn<'_, T>)> {
        let mut state = lock(&self.state);
        loop {
            if state.stopped {
                return None;
            }
            if let Some((lane, Next { work, image, bytes })) = state.pop(&self.bounds) {
                let turn = Turn {
                    queues: self,
                    lane,
                    image,
                    bytes,
                };
                return Some((work, turn));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends all waiting, and drops the work that nobody has begun.
    pub(super) fn stop(&self) {
        let left = {
            let mut state = lock(&self.state);
            state.stopped = true;
            [state.demand.take_all(), state.prefetch.take_all()]
        };
        self.changed.notify_all();
        // Not under the lock: what is dropped may be the last of more than itself.
        drop(left);
    }
}

impl<T> State<T> {
    fn lane(&mut self, lane: Lane) -> &mut Fair<T> {
        match lane {
            Lane::Demand => &mut self.demand,
            Lane::Prefetch => &mut self.prefetch,
        }
    }

    fn pop(&mut self, bounds: &Bounds) -> Option<(Lane, Next<T>)> {
        let lanes = if self.passed >= PASS_MAX {
            [Lane::Prefetch, Lane::Demand]
        } else {
            [Lane::Demand, Lane::Prefetch]
        };
        for lane in lanes {
            let (threads, under_way) = (self.running.threads, self.running.bytes);
            let admits = |bytes: u64| {
                threads < bounds.large_threads
                    && (threads == 0 || under_way.saturating_add(bytes) <= bounds.large_bytes)
            };
            let Some(next) = self.lane(lane).pop(admits) else {
                continue;
            };
            self.passed = match lane {
                Lane::Demand if !self.prefetch.is_empty() => {
                    self.passed.saturating_add(next.bytes + OVERHEAD)
                }
                _ => 0,
            };
            if next.bytes >= bounds.large {
                self.running.threads += 1;
                self.running.bytes = self.running.bytes.saturating_add(next.bytes);
            }
            return Some((lane, next));
        }
        None
    }
}

impl<T> Turn<'_, T> {
    /// The work cost so many bytes more than was said.
    pub(super) fn charge(&self, bytes: u64) {
        lock(&self.queues.state).lane(self.lane).charge(self.image, bytes);
    }
}

impl<T> Drop for Turn<'_, T> {
    fn drop(&mut self) {
        if self.bytes < self.queues.bounds.large {
            return;
        }
        {
            let mut state = lock(&self.queues.state);
            state.running.threads = state.running.threads.saturating_sub(1);
            state.running.bytes = state.running.bytes.saturating_sub(self.bytes);
        }
        // Large work may wait that nobody was woken up for.
        self.queues.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn order(fair: &mut Fair<&'static str>) -> Vec<&'static str> {
        std::iter::from_fn(|| fair.pop(|_| true))
            .map(|next| next.work)
            .collect()
    }

    #[test]
    fn an_image_with_much_work_waits_for_itself() {
        let mut fair = Fair::new(u64::MAX);
        for work in ["a1", "a2", "a3"] {
            fair.push(1, 250 * MIB, work);
        }
        assert_eq!(fair.pop(|_| true).unwrap().work, "a1");
        for work in ["b1", "b2", "b3"] {
            fair.push(2, 100 * MIB, work);
        }
        fair.push(3, 1, "c");
        assert_eq!(order(&mut fair), ["b1", "c", "b2", "b3", "a2", "a3"]);
    }

    #[test]
    fn nobody_saves_up_a_claim() {
        let mut fair = Fair::new(u64::MAX);
        fair.push(1, 1, "first");
        fair.push(2, MIB, "other");
        assert_eq!(order(&mut fair), ["first", "other"]);
        for work in ["b1", "b2", "b3"] {
            fair.push(2, MIB, work);
        }
        assert_eq!(fair.pop(|_| true).unwrap().work, "b1");
        for work in ["a1", "a2", "a3"] {
            fair.push(1, MIB, work);
        }
        assert_eq!(order(&mut fair), ["a1", "b2", "a2", "b3", "a3"]);
    }

    #[test]
    fn what_cost_more_than_was_said_is_owed() {
        let mut fair = Fair::new(u64::MAX);
        for work in ["a1", "a2"] {
            fair.push(1, MIB, work);
        }
        assert_eq!(fair.pop(|_| true).unwrap().work, "a1");
        fair.charge(1, 10 * MIB);
        for work in ["b1", "b2", "b3"] {
            fair.push(2, 2 * MIB, work);
        }
        assert_eq!(order(&mut fair), ["b1", "b2", "b3", "a2"]);
    }

    #[test]
    fn small_work_passes_large_work_that_has_no_room_and_large_work_does_not() {
        let mut fair = Fair::new(MIB);
        fair.push(1, 600 * MIB, "large");
        fair.push(2, 2 * MIB, "medium");
        assert!(fair.pop(|bytes| bytes < 500 * MIB).is_none());
        fair.push(1, 1, "small");
        fair.push(3, 1, "other");
        assert_eq!(fair.pop(|bytes| bytes < 500 * MIB).unwrap().work, "small");
        assert_eq!(
            order(&mut fair),
            ["medium", "other", "large"],
            "the small one was paid for"
        );
    }

    #[test]
    fn large_work_never_has_all_threads_nor_all_memory() {
        let queues = Queues::new(Bounds {
            queue: 4,
            large: MIB,
            large_threads: 2,
            large_bytes: 10 * MIB,
        });
        let push = |image, bytes, work| queues.push(Lane::Demand, image, bytes, work);
        for number in 0..4 {
            push(1, 6 * MIB, number).unwrap();
        }
        assert_eq!(
            push(1, 6 * MIB, 4),
            Err(Refused::Full(4)),
            "its own queue is full"
        );
        push(2, 3 * MIB, 20).unwrap();
        push(2, 1, 21).unwrap();
        let (first, turn_of_first) = queues.next().unwrap();
        let (second, turn_of_second) = queues.next().unwrap();
        assert_eq!([first, second], [0, 20], "9 of 10 MiB");
        assert_eq!(queues.next().unwrap().0, 21, "a thread is left");
        assert!(lock(&queues.state).pop(&queues.bounds).is_none(), "two threads");
        drop(turn_of_second);
        assert!(lock(&queues.state).pop(&queues.bounds).is_none(), "12 of 10 MiB");
        drop(turn_of_first);
        assert_eq!(queues.next().unwrap().0, 1);
        queues.stop();
        assert!(queues.next().is_none());
        assert_eq!(push(1, 1, 5), Err(Refused::Stopped(5)));
    }

    #[test]
    fn demand_comes_first_and_prefetches_come_to_their_turn() {
        let queues = Queues::new(Bounds {
            queue: 1000,
            large: u64::MAX,
            large_threads: 1,
            large_bytes: 0,
        });
        queues.push(Lane::Prefetch, 1, MIB, "prefetch").unwrap();
        for _ in 0..100 {
            queues.push(Lane::Demand, 1, MIB, "demand").unwrap();
        }
        let place = std::iter::from_fn(|| Some(queues.next()?.0)).position(|work| work == "prefetch");
        assert_eq!(place, Some(64));
    }
}
