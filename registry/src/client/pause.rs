//! Pauses that hosts have asked for: 429, or `Retry-After` with another status. A pause belongs to the host, not to the request that was
//! told: while it lasts, [`super::session`] sends nothing to that host, and whoever wants to either waits or fails.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::Url;

/// Longest pause that is kept: after this, a host is asked again whatever it said.
const LONGEST: Duration = Duration::from_secs(3600);
/// First pause after a 429 that does not say how long; it doubles with each one after it.
const FIRST: Duration = Duration::from_secs(1);
/// Doublings of that pause: up to 16 s.
const DOUBLINGS: u32 = 4;
/// Hosts kept. Their number is that of the registries in use and their storages.
const MAX_HOSTS: usize = 256;

/// The pauses of all hosts, by host and port.
#[derive(Debug, Default)]
pub(crate) struct Pauses(Mutex<HashMap<String, Pause>>);

/// One pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pause {
    /// When it is over.
    pub(crate) until: Instant,
    /// HTTP status of the answer that asked for it.
    pub(crate) status: u16,
    /// Pauses of unknown length that came before it without a success in between.
    before: u32,
}

impl Pauses {
    /// The pause of this host, if one is running.
    pub(crate) fn running(&self, host: &str) -> Option<Pause> {
        let pauses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pauses
            .get(host)
            .copied()
            .filter(|pause| Instant::now() < pause.until)
    }

    /// The host has answered `status` and wants to be left alone for this long; a length that it does not name is taken to grow. Returns
    /// the pause that is running now.
    pub(crate) fn begin(&self, host: &str, status: u16, wanted: Option<Duration>) -> Pause {
        let mut pauses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let known = pauses.get(host).copied();
        let before = match known {
            // Answers to requests that were under way together count once.
            Some(known) if now < known.until => known.before,
            Some(known) => known.before.saturating_add(1),
            None => 0,
        };
        let length = wanted.unwrap_or_else(|| FIRST * (1 << before.min(DOUBLINGS)));
        let until = now + length.min(LONGEST);
        let pause = match known {
            Some(known) if until <= known.until => known,
            _ => Pause {
                until,
                status,
                before,
            },
        };
        if known.is_none() && pauses.len() >= MAX_HOSTS {
            pauses.retain(|_, pause| now < pause.until);
        }
        if known.is_some() || pauses.len() < MAX_HOSTS {
            pauses.insert(host.to_owned(), pause);
        }
        pause
    }

    /// The host has answered a request. What it said before is over, unless it is still to be waited for.
    pub(crate) fn answered(&self, host: &str) {
        let mut pauses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if pauses
            .get(host)
            .is_some_and(|pause| pause.until <= Instant::now())
        {
            pauses.remove(host);
        }
    }
}

/// Host and port of a URL, by which its pause is known.
pub(crate) fn host(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_belongs_to_its_host() {
        let pauses = Pauses::default();
        let begun = pauses.begin("a", 429, Some(Duration::from_secs(3600)));
        assert_eq!(pauses.running("a"), Some(begun));
        assert_eq!(pauses.running("b"), None);
        let shorter = pauses.begin("a", 503, Some(Duration::from_secs(1)));
        assert_eq!(shorter, begun, "a pause is never cut short");
        pauses.answered("a");
        assert_eq!(
            pauses.running("a"),
            Some(begun),
            "an answer from before it changes nothing"
        );
        let absurd = pauses.begin("c", 429, Some(Duration::MAX));
        assert!(absurd.until <= Instant::now() + LONGEST);
    }

    #[test]
    fn pauses_of_unknown_length_grow_until_there_is_an_answer() {
        let pauses = Pauses::default();
        let over = |pauses: &Pauses| {
            let mut all = pauses.0.lock().unwrap();
            all.get_mut("a").unwrap().until = Instant::now();
        };
        let mut lengths = Vec::new();
        for _ in 0..7 {
            let before = Instant::now();
            let pause = pauses.begin("a", 429, None);
            assert_eq!(
                pauses.begin("a", 429, Some(Duration::ZERO)),
                pause,
                "counted once"
            );
            lengths.push((pause.until - before).as_secs());
            over(&pauses);
        }
        assert_eq!(lengths, [1, 2, 4, 8, 16, 16, 16]);
        pauses.answered("a");
        assert_eq!(pauses.begin("a", 429, None).before, 0);
    }

    #[test]
    fn hosts_are_few() {
        let pauses = Pauses::default();
        for number in 0..2 * MAX_HOSTS {
            pauses.begin(&number.to_string(), 429, Some(Duration::from_secs(60)));
        }
        assert_eq!(pauses.0.lock().unwrap().len(), MAX_HOSTS);
    }
}
