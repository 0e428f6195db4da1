//! Progress for people who watch: on standard error, only on a terminal, and only for what takes longer than a second.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use peel_fs::Progress;

/// What is faster than this shows nothing.
const PATIENCE: Duration = Duration::from_secs(1);
/// Redraws per second.
const REDRAWS: u8 = 5;

/// A bar that appears after a second.
#[derive(Debug)]
pub struct Bar {
    bar: ProgressBar,
    begin: Instant,
    shown: bool,
}

impl Bar {
    /// A bar of `total` bytes (0: not known yet); nothing is drawn yet.
    pub fn new(total: u64) -> Self {
        Self {
            bar: ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden()).with_style(style()),
            begin: Instant::now(),
            shown: false,
        }
    }

    /// Says what is being done and how far it is.
    pub fn set(&mut self, message: String, done: u64, total: u64) {
        if !self.shown && self.begin.elapsed() >= PATIENCE && std::io::stderr().is_terminal() {
            self.bar
                .set_draw_target(ProgressDrawTarget::stderr_with_hz(REDRAWS));
            self.shown = true;
        }
        self.bar.set_message(message);
        self.bar.set_length(total);
        self.bar.set_position(done);
    }

    /// Takes the bar off the screen.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.finish();
    }
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{wide_msg} {bytes}/{total_bytes} {bytes_per_sec}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Progress of the server while it loads an image.
#[derive(Debug)]
pub struct LoadProgress {
    image: String,
    layers: usize,
    /// Layers that are pulled whole, and why.
    pulled: BTreeMap<usize, String>,
    bar: Bar,
}

impl LoadProgress {
    /// For the image that the user named.
    pub fn new(image: &str) -> Self {
        Self {
            image: image.to_owned(),
            layers: 0,
            pulled: BTreeMap::new(),
            bar: Bar::new(0),
        }
    }

    /// The next step.
    pub fn update(&mut self, step: &Progress) {
        match step {
            Progress::Resolved { layers, .. } => self.layers = *layers,
            Progress::Pulling {
                layer,
                reason,
                done,
                total,
            } => {
                self.pulled.entry(*layer).or_insert_with(|| reason.clone());
                let message = format!("{}: layer {} of {}, {reason}", self.image, layer + 1, self.layers);
                self.bar.set(message, *done, *total);
            }
            Progress::Indexed => {}
        }
    }

    /// The image is mounted: the bar goes, and standard error says which layers were pulled whole this time, and why.
    pub fn finish(&self) {
        self.bar.finish();
        for (layer, reason) in &self.pulled {
            let (layer, layers) = (layer + 1, self.layers);
            // Whoever closed standard error does not want to know.
            let _ = writeln!(
                std::io::stderr(),
                "peel: {}: layer {layer} of {layers} was pulled whole: {reason}",
                self.image
            );
        }
    }
}
