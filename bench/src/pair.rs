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
/// No sample lasts longer, unless a single run does.
const SAMPLE_TIME: Duration = Duration::from_millis(500);
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

    /// Measures the sides of `what`; the last one is the baseline of the others. The first error ends the benchmark.
    pub fn compare<const N: usize>(&mut self, what: &str, sides: [Side<'_>; N]) -> anyhow::Result<()> {
        let mut medians = Vec::new();
        let mut group = self.criterion.benchmark_group(format!("{}/{what}", self.name));
        group.sampling_mode(SamplingMode::Flat);
        for (name, run) in sides {
            let times = RefCell::new(Vec::new());
            let mut failed = None;
            group.bench_function(name, |bencher| {
                bencher.iter_custom(|count| {
                    let (start, mut sum, mut runs) = (Instant::now(), Duration::ZERO, 0);
                    // What does not count takes time too, which criterion does not know of.
                    while runs < count && (runs == 0 || start.elapsed() < SAMPLE_TIME) {
                        runs += 1;
                        match run() {
                            Ok(time) => {
                                times.borrow_mut().push(time);
                                sum += time;
                            }
                            Err(error) => {
                                failed.get_or_insert(error);
                                break;
                            }
                        }
                    }
                    // Criterion divides it by the number of runs that it asked for, and does not take zero.
                    let mean = sum.as_secs_f64() / runs_f64(runs);
                    Duration::from_secs_f64(mean * runs_f64(count)).max(Duration::from_nanos(1))
                });
            });
            if let Some(error) = failed {
                return Err(error.context(format!("{}/{what}/{name}", self.name)));
            }
            medians.extend(median(&times.take()).map(|time| (name, time)));
        }
        group.finish();
        if let Some(((baseline, base), ours)) = medians.split_last() {
            for (name, time) in ours {
                let names = format!("{name} / {baseline}");
                self.lines.push(format!("{what}: {}", line(&names, *time, *base)));
            }
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

/// A number of runs, of which there are never as many as a `u32` holds.
fn runs_f64(number: u64) -> f64 {
    u32::try_from(number).map_or(f64::from(u32::MAX), f64::from)
}

fn line(names: &str, ours: Duration, baseline: Duration) -> String {
    let (ours, baseline) = (ours.as_secs_f64(), baseline.as_secs_f64());
    let ratio = ours / baseline.max(f64::MIN_POSITIVE);
    format!(
        "{names} = {ratio:.3} ({:.3} ms / {:.3} ms, medians)",
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
            "x / y = 1.500 (3.000 ms / 2.000 ms, medians)"
        );
    }
}
