//! What a run costs beside its time: processor time of all threads, and the largest resident memory. Called by the benchmarks
//! of the writer. Both come from `/proc` (proc(5)), for this process and for others alike.

use std::fmt;
use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::Context;

/// Clock ticks per second in `/proc/PID/stat`, the same on all Linux machines of today.
const TICKS: u64 = 100;
/// How often another process is looked at.
const POLL: Duration = Duration::from_millis(2);

/// The costs of one run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time in user and kernel mode.
    pub processor: Duration,
    /// Most resident memory in KiB.
    pub peak: u64,
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, peak) = (self.processor.as_secs_f64(), self.peak / 1024);
        write!(
            f,
            "{seconds:.2} s of processor time, at most {peak} MiB of memory"
        )
    }
}

/// Runs `work` in this process. What it had in memory before counts too.
pub fn own<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(T, Usage)> {
    // Resets the high-water mark.
    fs::write("/proc/self/clear_refs", "5").context("/proc/self/clear_refs")?;
    let before = processor_time("self", Fields::Own)?;
    let result = work()?;
    let processor = processor_time("self", Fields::Own)? - before;
    let peak = peak("self").context("no VmHWM in /proc/self/status")?;
    Ok((result, Usage { processor, peak }))
}

/// Runs a command, which must succeed.
pub fn command(command: &mut Command) -> anyhow::Result<Usage> {
    let name = command.get_program().to_string_lossy().into_owned();
    let before = processor_time("self", Fields::Children)?;
    let mut child = command.spawn().with_context(|| format!("cannot run {name}"))?;
    let id = child.id().to_string();
    let mut usage = Usage::default();
    let status = loop {
        usage.peak = usage.peak.max(peak(&id).unwrap_or(0));
        match child.try_wait()? {
            Some(status) => break status,
            None => std::thread::sleep(POLL),
        }
    };
    anyhow::ensure!(status.success(), "{name}: {status}");
    usage.processor = processor_time("self", Fields::Children)? - before;
    Ok(usage)
}

/// Whose time is asked for.
#[derive(Clone, Copy)]
enum Fields {
    Own = 11,
    Children = 13,
}

fn processor_time(process: &str, fields: Fields) -> anyhow::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The name before it is in parentheses and may hold anything.
    let (_, rest) = stat.rsplit_once(')').context("/proc/PID/stat")?;
    let ticks: u64 = rest
        .split_whitespace()
        .skip(fields as usize)
        .take(2)
        .map(|field| field.parse().unwrap_or(0))
        .sum();
    Ok(Duration::from_millis(ticks * 1000 / TICKS))
}

/// The high-water mark of resident memory in KiB.
fn peak(process: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_time_are_seen() {
        let (sum, usage) = own(|| {
            let data = vec![1_u8; 64 << 20];
            let started = std::time::Instant::now();
            let mut sum = 0_u64;
            while started.elapsed() < Duration::from_millis(100) {
                sum += data.iter().map(|byte| u64::from(*byte)).sum::<u64>();
            }
            Ok(sum)
        })
        .unwrap();
        assert!(sum > 0 && usage.peak > 60 << 10, "{usage}");
        assert!(usage.processor > Duration::ZERO);
        let usage = command(Command::new("sh").args(["-c", "sleep 0.05"])).unwrap();
        assert!(usage.peak > 0);
        assert!(command(&mut Command::new("false")).is_err());
    }
}
