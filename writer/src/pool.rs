//! Work on several cores whose results come back in the order in which it was handed out, however the threads were
//! scheduled: what makes the writer's output independent of their number.

use std::collections::VecDeque;
use std::io;
use std::thread::{Builder, Scope};

use crossbeam_channel::{Receiver, Sender, bounded};

/// Most bytes of work in flight, by the caller's count. Large enough that no core waits for the next 4 MiB chunk, small
/// enough that memory stays bounded on machines of many cores.
const WEIGHT_MAX: usize = 48 << 20;

/// Most jobs in flight for each thread: on a machine that does other things too, a thread may have to wait for a core while
/// the others go on.
const JOBS_PER_THREAD: usize = 12;

/// Threads that turn jobs into results.
pub(super) struct Pool<J, O> {
    jobs: Option<Sender<(J, Sender<O>)>>,
    waiting: VecDeque<(usize, Receiver<O>)>,
    weight: usize,
    depth: usize,
}

/// A worker went away without an answer: it panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WorkerLost;

impl<J: Send, O: Send> Pool<J, O> {
    /// Starts `threads` threads in `scope`; each makes its own worker with `worker`. They end when the pool is dropped.
    pub(super) fn start<'scope, 'env, F, W>(
        scope: &'scope Scope<'scope, 'env>,
        name: &str,
        threads: usize,
        worker: F,
    ) -> io::Result<Self>
    where
        F: Fn() -> W + Send + Clone + 'scope,
        W: FnMut(J) -> O,
        J: 'scope,
        O: 'scope,
    {
        let depth = threads * JOBS_PER_THREAD;
        let (sender, receiver) = bounded::<(J, Sender<O>)>(depth);
        for index in 0..threads {
            let receiver = receiver.clone();
            let worker = worker.clone();
            Builder::new()
                .name(format!("{name}-{index}"))
                .spawn_scoped(scope, move || {
                    let mut worker = worker();
                    for (job, answer) in receiver {
                        // Nobody waits for the answer when the caller has failed meanwhile.
                        let _unwanted = answer.send(worker(job));
                    }
                })?;
        }
        Ok(Self {
            jobs: Some(sender),
            waiting: VecDeque::new(),
            weight: 0,
            depth,
        })
    }

    /// Whether another job of `weight` bytes must wait until a result has been taken.
    pub(super) fn is_full(&self, weight: usize) -> bool {
        !self.waiting.is_empty() && (self.waiting.len() >= self.depth || self.weight + weight > WEIGHT_MAX)
    }

    /// Hands out a job. Take results before while the pool [is full](Self::is_full).
    pub(super) fn push(&mut self, job: J, weight: usize) -> Result<(), WorkerLost> {
        let (answer, result) = bounded(1);
        let jobs = self.jobs.as_ref().ok_or(WorkerLost)?;
        jobs.send((job, answer)).map_err(|_| WorkerLost)?;
        self.waiting.push_back((weight, result));
        self.weight += weight;
        Ok(())
    }

    /// Whether the oldest job whose result was not taken is done.
    pub(super) fn is_ready(&self) -> bool {
        self.waiting.front().is_some_and(|(_, result)| !result.is_empty())
    }

    /// Waits for the result of the oldest job whose result was not taken; `None` when there is none.
    pub(super) fn pop(&mut self) -> Result<Option<O>, WorkerLost> {
        let Some((weight, result)) = self.waiting.pop_front() else {
            return Ok(None);
        };
        self.weight -= weight;
        result.recv().map(Some).map_err(|_| WorkerLost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_and_work_is_bounded() {
        let results = std::thread::scope(|scope| {
            let mut pool = Pool::start(scope, "test", 4, || {
                |job: u64| {
                    std::thread::sleep(std::time::Duration::from_micros(job * 7919 % 500));
                    job
                }
            })
            .unwrap();
            let mut results = Vec::new();
            for job in 0..200 {
                while pool.is_full(WEIGHT_MAX / 3) {
                    results.push(pool.pop().unwrap().unwrap());
                }
                assert!(pool.waiting.len() <= 2);
                pool.push(job, WEIGHT_MAX / 3).unwrap();
            }
            while let Some(result) = pool.pop().unwrap() {
                results.push(result);
            }
            results
        });
        assert_eq!(results, (0..200).collect::<Vec<_>>());
    }

    #[test]
    fn a_worker_that_panics_is_an_error() {
        let lost = std::panic::catch_unwind(|| {
            std::thread::scope(|scope| {
                let mut pool =
                    Pool::start(scope, "test", 1, || |_: u8| -> u8 { panic!("on purpose") }).unwrap();
                pool.push(0, 1).unwrap();
                assert_eq!(pool.pop(), Err(WorkerLost));
            });
        });
        assert!(lost.is_err(), "the scope passes the panic on");
    }
}
