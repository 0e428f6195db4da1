//! A path and its baseline, measured one after the other. Called by every benchmark: criterion shows each of them by itself,
//! the ratios are shown at the end.

use std::cell::RefCell;
use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, SamplingMode};

/// Samples of each side: as few as criterion takes, since some of them last a second.
const SAMPLES: usize = 10;
/// How long each side is measured, if one sample takes no longer than a tenth of it.
const TIME: Duration = Duration::from_secs(2);
/// The first run is the one that fills caches; criterion makes at least one.
const WARM_UP: Duration = Duration::from_millis(1);

/// The comparisons of one benchmark.
pub struct Comparisons {
    criterion: Criterion,
    name: &'static str,
    lines: Vec<String>,
}

impl std::fmt::Debug for Comparisons {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Comparisons")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// One side of a comparison: what it is called, and what runs it once and tells how long the part took that counts.
pub type Side<'a> = (&'a str, &'a mut dyn FnMut() -> anyhow::Result<Duration>);

impl Comparisons {
    /// Of the benchmark with that name; criterion's options come from the command line.
    pub fn new(name: &'static str) -> Self {
        let criterion = Criterion::default()
            .sample_size(SAMPLES)
            .measurement_time(TIME)
            .warm_up_time(WARM_UP)
            .configure_from_args();
        Self {
            criterion,
            name,
            lines: Vec::new(),
        }
    }

    /// Measures both sides of `what`. The first error ends the benchmark.
    pub fn compare<'a>(&mut self, what: &str, ours: Side<'a>, baseline: Side<'a>) -> anyhow::Result<()> {
        let mut medians = Vec::new();
        let mut group = self.criterion.benchmark_group(format!("{}/{what}", self.name));
        group.sampling_mode(SamplingMode::Flat);
        let names = format!("{} / {}", ours.0, baseline.0);
        for (name, run) in [ours, baseline] {
            let times = RefCell::new(Vec::new());
            let mut failed = None;
            group.bench_function(name, |bencher| {
                bencher.iter_custom(|count| {
                    let mut sum = Duration::ZERO;
                    for _ in 0..count {
                        match run() {
                            Ok(time) => {
                                times.borrow_mut().push(time);
                                sum += time;
                            }
                            Err(error) => {
                                failed.get_or_insert(error);
                            }
                        }
                    }
                    // Criterion divides by it.
                    sum.max(Duration::from_nanos(1))
                });
            });
            if let Some(error) = failed {
                return Err(error.context(format!("{}/{what}/{name}", self.name)));
            }
            medians.extend(median(&times.take()));
        }
        group.finish();
        if let [ours, baseline] = *medians {
            self.lines
                .push(format!("{what}: {}", line(&names, ours, baseline)));
        }
        Ok(())
    }

    /// Shows the ratios of a measurement, with the load of the machine, without which they mean little.
    pub fn finish(self) {
        self.criterion.final_summary();
        if !crate::measuring() {
            return;
        }
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load = load.split(' ').next().unwrap_or_default();
        for line in self.lines {
            println!("ratio {} (load {load}) {line}", self.name);
        }
    }
}

/// How long `work` takes.
pub fn timed<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<Duration> {
    let start = Instant::now();
    black_box(work()?);
    Ok(start.elapsed())
}

fn line(names: &str, ours: Duration, baseline: Duration) -> String {
    let (ours, baseline) = (ours.as_secs_f64(), baseline.as_secs_f64());
    let ratio = ours / baseline.max(f64::MIN_POSITIVE);
    format!(
        "{names} = {ratio:.2} ({:.3} ms / {:.3} ms, medians)",
        ours * 1e3,
        baseline * 1e3
    )
}

fn median(times: &[Duration]) -> Option<Duration> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_compares_medians() {
        let of = |milliseconds: [u64; 3]| median(&milliseconds.map(Duration::from_millis)).unwrap();
        assert_eq!(median(&[]), None);
        assert_eq!(
            line("x / y", of([2, 30, 3]), of([2, 1, 90])),
            "x / y = 1.50 (3.000 ms / 2.000 ms, medians)"
        );
    }
}
