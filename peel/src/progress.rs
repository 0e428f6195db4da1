//! Progress for people who watch: on standard error, only on a terminal, and only for what takes longer than a second.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use peel_fs::Progress;

use crate::describe::printable;

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
        for note in notes(&self.image, self.layers, &self.pulled) {
            // Whoever closed standard error does not want to know.
            let _ = writeln!(std::io::stderr(), "peel: {}", printable(note.as_bytes()));
        }
    }
}

/// One sentence for each reason, with the layers that it holds for.
fn notes(image: &str, layers: usize, pulled: &BTreeMap<usize, String>) -> Vec<String> {
    let mut reasons: Vec<(&str, Vec<String>)> = Vec::new();
    for (layer, reason) in pulled {
        let number = (layer + 1).to_string();
        match reasons.iter_mut().find(|(known, _)| known == reason) {
            Some((_, numbers)) => numbers.push(number),
            None => reasons.push((reason, vec![number])),
        }
    }
    reasons
        .into_iter()
        .map(|(reason, numbers)| {
            let which = match numbers.as_slice() {
                [one] => format!("layer {one} of {layers} was"),
                all if all.len() == layers => format!("all {layers} layers were"),
                some => format!("layers {} of {layers} were", some.join(", ")),
            };
            format!("{image}: {which} pulled whole: {reason}")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_with_the_same_reason_share_a_sentence() {
        let pulled = |list: &[(usize, &str)]| -> BTreeMap<usize, String> {
            list.iter()
                .map(|(layer, reason)| (*layer, (*reason).to_owned()))
                .collect()
        };
        for (layers, list, expected) in [
            (3, vec![], vec![]),
            (3, vec![(1, "r")], vec!["i: layer 2 of 3 was pulled whole: r"]),
            (
                2,
                vec![(0, "r"), (1, "r")],
                vec!["i: all 2 layers were pulled whole: r"],
            ),
            (1, vec![(0, "r")], vec!["i: layer 1 of 1 was pulled whole: r"]),
            (
                4,
                vec![(0, "r"), (1, "s"), (3, "r")],
                vec![
                    "i: layers 1, 4 of 4 were pulled whole: r",
                    "i: layer 2 of 4 was pulled whole: s",
                ],
            ),
        ] {
            assert_eq!(notes("i", layers, &pulled(&list)), expected);
        }
    }
}
