//! What the demo found out: one object for machines, one table for people.
//!
//! Filled and printed by [`super::run`].

use std::io::{self, Write};

use serde::Serialize;

/// One way to start, or one start. Times are seconds since the process was started.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct Start {
    /// Until the manifest was known.
    pub(super) resolve_s: f64,
    /// Until the root file system was mounted.
    pub(super) mount_s: f64,
    /// Until the first byte of output.
    pub(super) ready_s: f64,
    /// Until the program and everything around it had ended.
    pub(super) total_s: f64,
    /// Bytes that came over the link, HTTP headers included.
    pub(super) bytes: u64,
    /// Requests that the registry got.
    pub(super) requests: u64,
}

/// Several starts of the same kind: the one with the median total, and the totals of all.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct Starts {
    /// The median one.
    #[serde(flatten)]
    pub(super) median: Start,
    /// `total_s` of each, in order of measurement.
    pub(super) totals_s: Vec<f64>,
}

impl Starts {
    /// Summarizes; all zero when there is none.
    pub(super) fn of(starts: &[Start]) -> Self {
        let totals_s = starts.iter().map(|start| start.total_s).collect();
        let mut sorted: Vec<&Start> = starts.iter().collect();
        sorted.sort_by(|a, b| a.total_s.total_cmp(&b.total_s));
        let median = sorted.get(sorted.len() / 2).copied().cloned().unwrap_or_default();
        Self { median, totals_s }
    }
}

/// The median of some times, 0 when there is none.
pub(super) fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

/// Everything.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct Report {
    /// What the image is.
    pub(super) image: String,
    /// Compressed size of its layers.
    pub(super) image_bytes: u64,
    /// Number of its layers.
    pub(super) layers: usize,
    /// What ran in it.
    pub(super) workload: Vec<String>,
    /// Round trip time of the link in milliseconds.
    pub(super) rtt_ms: u32,
    /// Rate of the link in Mbit/s.
    pub(super) bandwidth_mbit_s: u32,
    /// Pull everything, unpack, run.
    pub(super) full_pull: Starts,
    /// eStargz, nothing known about the program.
    pub(super) lazy: Starts,
    /// eStargz with the program's files first.
    pub(super) optimized: Starts,
    /// The optimized image once more from the same store.
    pub(super) second_start: Starts,
    /// The unpacked image once more, everything in the page cache.
    pub(super) warm: Starts,
    /// curl fetching as many bytes as the optimized start did.
    pub(super) curl_s: f64,
    /// Compressed size of the files that the program opens, in the optimized image.
    pub(super) opened_bytes: u64,
    /// Time to pull the image from its own registry; only for real images.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) source_pull_s: Option<f64>,
    /// What the numbers above amount to.
    pub(super) ratios: Ratios,
}

/// The comparisons that matter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Ratios {
    /// What the optimized start takes beyond the warm one, over what the full pull takes beyond it.
    pub(super) beyond_warm: f64,
    /// The optimized start over curl and the warm start together.
    pub(super) over_limit: f64,
    /// Bytes of the optimized start over the compressed size of the files that the program opens.
    pub(super) over_fetch: f64,
    /// The second start over the warm one.
    pub(super) second_over_warm: f64,
}

#[expect(
    clippy::cast_precision_loss,
    reason = "sizes of images are far below 2^52 bytes"
)]
fn float(value: u64) -> f64 {
    value as f64
}

impl Report {
    /// Works the ratios out. A divisor of zero gives 0 instead of something that JSON cannot carry.
    pub(super) fn conclude(&mut self) {
        let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        let total = |starts: &Starts| starts.median.total_s;
        let warm = total(&self.warm);
        self.ratios = Ratios {
            beyond_warm: ratio(total(&self.optimized) - warm, total(&self.full_pull) - warm),
            over_limit: ratio(total(&self.optimized), self.curl_s + warm),
            over_fetch: ratio(float(self.optimized.median.bytes), float(self.opened_bytes)),
            second_over_warm: ratio(total(&self.second_start), warm),
        };
    }

    /// The table for people.
    pub(super) fn print(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(out)?;
        writeln!(
            out,
            "Image:    {}, {} in {} layers",
            self.image,
            size(self.image_bytes),
            self.layers
        )?;
        let program = match self.workload.as_slice() {
            [] => "the image's own".to_owned(),
            words => words.join(" "),
        };
        writeln!(out, "Program:  {program}")?;
        writeln!(
            out,
            "Link:     {} ms round trip, {} Mbit/s; page cache dropped before each cold start",
            self.rtt_ms, self.bandwidth_mbit_s
        )?;
        if let Some(seconds) = self.source_pull_s {
            writeln!(
                out,
                "Pulled:   from its own registry in {seconds:.1} s, then measured from here"
            )?;
        }
        writeln!(out)?;
        writeln!(
            out,
            "{:<34} {:>9} {:>9} {:>11} {:>9} {:>11} {:>9}",
            "Times since the start, in seconds",
            "resolved",
            "mounted",
            "first byte",
            "exit",
            "fetched",
            "requests"
        )?;
        let rows = [
            ("full pull and unpack", &self.full_pull),
            ("lazily, without a profile", &self.lazy),
            ("lazily, optimized", &self.optimized),
            ("  again, from the same store", &self.second_start),
            ("warm, from plain directories", &self.warm),
        ];
        for (name, starts) in rows {
            let start = &starts.median;
            writeln!(
                out,
                "{name:<34} {:>9.3} {:>9.3} {:>11.3} {:>9.3} {:>11} {:>9}",
                start.resolve_s,
                start.mount_s,
                start.ready_s,
                start.total_s,
                size(start.bytes),
                start.requests
            )?;
        }
        let fetched = size(self.optimized.median.bytes);
        writeln!(
            out,
            "{:<34} {:>40.3}",
            format!("curl of {fetched}, same link"),
            self.curl_s
        )?;
        writeln!(out)?;
        let lines = [
            (
                self.ratios.beyond_warm,
                "optimized start / full pull, both beyond the warm start",
            ),
            (
                self.ratios.over_limit,
                "optimized start / (curl of the same bytes + warm start)",
            ),
            (
                self.ratios.over_fetch,
                "bytes fetched / compressed size of the files that the program opens",
            ),
            (self.ratios.second_over_warm, "second start / warm start"),
        ];
        for (ratio, text) in lines {
            writeln!(out, "{ratio:>6.3} {text}")?;
        }
        Ok(())
    }
}

fn size(bytes: u64) -> String {
    if bytes > 0 && bytes < 1_000_000 {
        format!("{:.1} kB", float(bytes) / 1e3)
    } else {
        format!("{:.1} MB", float(bytes) / 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(total_s: f64) -> Start {
        Start {
            total_s,
            ..Start::default()
        }
    }

    #[test]
    fn the_median_start_stands_for_all() {
        let starts = Starts::of(&[start(3.0), start(1.0), start(2.0)]);
        assert_eq!(starts.median, start(2.0));
        assert_eq!(starts.totals_s, [3.0, 1.0, 2.0]);
        assert_eq!(Starts::of(&[]), Starts::default());
        assert_eq!((median(&[5.0, 1.0, 2.0]), median(&[])), (2.0, 0.0));
    }

    #[test]
    fn ratios_compare_what_lies_beyond_the_warm_start() {
        let mut report = Report {
            full_pull: Starts::of(&[start(10.5)]),
            optimized: Starts::of(&[Start {
                bytes: 13,
                ..start(1.5)
            }]),
            second_start: Starts::of(&[start(0.55)]),
            warm: Starts::of(&[start(0.5)]),
            curl_s: 0.5,
            opened_bytes: 10,
            ..Report::default()
        };
        report.conclude();
        let expected = Ratios {
            beyond_warm: 0.1,
            over_limit: 1.5,
            over_fetch: 1.3,
            second_over_warm: 1.1,
        };
        assert!((report.ratios.beyond_warm - expected.beyond_warm).abs() < 1e-9);
        assert!((report.ratios.over_limit - expected.over_limit).abs() < 1e-9);
        assert!((report.ratios.over_fetch - expected.over_fetch).abs() < 1e-9);
        assert!((report.ratios.second_over_warm - expected.second_over_warm).abs() < 1e-9);
    }

    #[test]
    fn the_object_has_the_names_that_others_rely_on() {
        let value = serde_json::to_value(Report::default()).unwrap();
        for mode in ["full_pull", "lazy", "optimized", "warm", "second_start"] {
            for field in ["resolve_s", "mount_s", "ready_s", "total_s", "bytes", "requests"] {
                assert!(value[mode][field].is_number(), "{mode}.{field}");
            }
        }
        assert!(value["image_bytes"].is_number() && value["curl_s"].is_number());
        let mut text = Vec::new();
        Report::default().print(&mut text).unwrap();
        assert!(String::from_utf8(text).unwrap().lines().count() > 12);
    }
}
