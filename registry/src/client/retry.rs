//! When a broken attempt is repeated: exponential backoff with jitter, the server's `Retry-After`, and an end.
//!
//! One [`Retry`] lives as long as one transfer. Bytes that arrive start its time afresh, so a long download survives any number of
//! short failures while a registry that stays away is given up after `retry_for`.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant, SystemTime};

use crate::error::Error;

/// First pause: a restarted connection usually works at once.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause: a registry that is back is noticed within this time.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Time for a host that never answered: enough for a registry that is just starting.
const FIRST_CONTACT: Duration = Duration::from_secs(2);
/// Time for a server that answers 500: one that does so longer will not stop because we wait.
const BRIEF: Duration = Duration::from_secs(5);
/// Most that a pause which the server named is drawn out. It names the same one to all transfers of an image.
const SPREAD: Duration = Duration::from_secs(5);
/// Bytes that count as progress, and that a body must bring for each time that it may be silent. Fewer would let a registry keep
/// a reader for ever; twenty transfers that share half a megabit per second bring as many in the default time.
const PROGRESS: u64 = 32 << 10;

/// A failed attempt.
#[derive(Debug)]
pub(crate) struct Fault {
    /// Boxed to keep results small.
    pub(crate) error: Box<Error>,
    pub(crate) again: Again,
}

/// Whether an attempt is repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Again {
    /// The next attempt would fail the same way.
    Never,
    /// It may work; not before the time that the server named.
    After(Option<Duration>),
    /// The host was not reached and never has been.
    FirstContact,
    /// The server failed in itself (500). Some do so once, others for ever.
    Brief,
}

impl Fault {
    pub(crate) fn fatal(error: Error) -> Self {
        Self {
            error: Box::new(error),
            again: Again::Never,
        }
    }

    pub(crate) fn transient(error: Error) -> Self {
        Self {
            error: Box::new(error),
            again: Again::After(None),
        }
    }
}

/// The patience with one body: [`PROGRESS`] bytes, or its end, within the time that it may be silent. Only time that a reader
/// has waited counts, not what it does between two parts.
#[derive(Debug)]
pub(crate) struct Pace {
    limit: Duration,
    left: Duration,
    bytes: u64,
}

impl Pace {
    pub(crate) fn new(limit: Duration) -> Self {
        Self {
            limit,
            left: limit,
            bytes: 0,
        }
    }

    /// How long the next part may be waited for.
    pub(crate) fn left(&self) -> Duration {
        self.left
    }

    /// Bytes that came within the time that is running.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Notes a part of `bytes` that was `waited` for.
    pub(crate) fn part(&mut self, bytes: usize, waited: Duration) {
        self.bytes = self.bytes.saturating_add(bytes as u64);
        self.left = self.left.saturating_sub(waited);
        if self.bytes >= PROGRESS {
            *self = Self::new(self.limit);
        }
    }
}

/// The patience of one transfer.
#[derive(Debug)]
pub(crate) struct Retry {
    limit: Duration,
    since: Option<Instant>,
    pause: Duration,
    progress: u64,
}

impl Retry {
    pub(crate) fn new(limit: Duration) -> Self {
        Self {
            limit,
            since: None,
            pause: FIRST_PAUSE,
            progress: 0,
        }
    }

    /// Notes that `bytes` have arrived.
    pub(crate) fn progress(&mut self, bytes: usize) {
        self.progress = self.progress.saturating_add(bytes as u64);
        if self.progress >= PROGRESS && self.since.is_some() {
            *self = Self::new(self.limit);
        }
    }

    /// Waits until the next attempt may start, or gives `fault`'s error back.
    pub(crate) async fn wait(&mut self, fault: Fault) -> Result<(), Error> {
        match self.next_pause(&fault) {
            Some(pause) => {
                tracing::debug!(error = %fault.error, ?pause, "trying again");
                tokio::time::sleep(pause).await;
                Ok(())
            }
            None => Err(*fault.error),
        }
    }

    fn next_pause(&mut self, fault: &Fault) -> Option<Duration> {
        let (limit, wanted) = match fault.again {
            Again::Never => return None,
            Again::After(wanted) => (self.limit, wanted),
            Again::FirstContact => (self.limit.min(FIRST_CONTACT), None),
            Again::Brief => (self.limit.min(BRIEF), None),
        };
        self.progress = 0;
        let left = limit.checked_sub(self.since.get_or_insert_with(Instant::now).elapsed())?;
        let pause = jitter(self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        match wanted {
            // Asking before the server's time only makes it angrier: waiting in vain helps nobody.
            Some(wanted) if wanted > left => None,
            Some(wanted) if wanted <= pause => Some(pause),
            // Never earlier, and not all at once.
            Some(wanted) => Some((wanted + part_of((wanted / 2).min(SPREAD))).min(left)),
            None if left.is_zero() => None,
            None => Some(pause.min(left)),
        }
    }
}

/// Between three and five quarters of `pause`, so that many waiters do not come back together.
fn jitter(pause: Duration) -> Duration {
    pause * 3 / 4 + part_of(pause / 2)
}

/// Between nothing and all of `time`, at random.
fn part_of(time: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish() % 1024;
    time * u32::try_from(random).unwrap_or(0) / 1024
}

/// The value of `Retry-After` (RFC 9110, section 10.2.3): seconds or a date.
pub(crate) fn retry_after(value: &str) -> Option<Duration> {
    if let Ok(seconds) = value.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(value.trim()).ok()?;
    Some(date.duration_since(SystemTime::now()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(again: Again) -> Fault {
        Fault {
            error: Box::new(Error::Setup("test".into())),
            again,
        }
    }

    #[test]
    fn pauses_grow_and_end() {
        let mut retry = Retry::new(Duration::from_secs(60));
        let pauses: Vec<_> = (0..8)
            .map(|_| retry.next_pause(&fault(Again::After(None))).unwrap())
            .collect();
        assert!(pauses[0] < Duration::from_millis(70), "{pauses:?}");
        assert!(
            pauses[7] > Duration::from_secs(1) && pauses[7] < Duration::from_secs(3),
            "{pauses:?}"
        );
        assert_eq!(retry.next_pause(&fault(Again::Never)), None);
        assert_eq!(
            Retry::new(Duration::ZERO).next_pause(&fault(Again::After(None))),
            None
        );
    }

    #[test]
    fn the_servers_time_is_kept_or_refused() {
        let mut retry = Retry::new(Duration::from_secs(10));
        let after = |seconds| fault(Again::After(Some(Duration::from_secs(seconds))));
        let pause = retry.next_pause(&after(7)).unwrap();
        assert!(
            pause >= Duration::from_secs(7) && pause <= Duration::from_secs(10),
            "{pause:?}"
        );
        assert_eq!(retry.next_pause(&after(11)), None);
    }

    #[test]
    fn transfers_told_the_same_time_come_back_apart() {
        for (seconds, last) in [(4, 6), (30, 35)] {
            let wanted = Duration::from_secs(seconds);
            let pauses: Vec<_> = (0..64)
                .map(|_| {
                    let mut retry = Retry::new(Duration::from_secs(60));
                    retry.next_pause(&fault(Again::After(Some(wanted)))).unwrap()
                })
                .collect();
            let (first, most) = (pauses.iter().min().unwrap(), pauses.iter().max().unwrap());
            assert!(
                *first >= wanted && *most <= Duration::from_secs(last),
                "{pauses:?}"
            );
            // Sixty-four draws from more than a thousand values: all in a quarter of them happens to nobody.
            assert!(
                *most - *first > (Duration::from_secs(last) - wanted) / 4,
                "{pauses:?}"
            );
        }
    }

    #[test]
    fn progress_starts_the_time_afresh() {
        let mut retry = Retry::new(Duration::from_secs(60));
        for _ in 0..6 {
            retry.next_pause(&fault(Again::After(None)));
        }
        retry.progress(100);
        assert!(retry.since.is_some());
        retry.progress(64 << 10);
        assert!(retry.since.is_none() && retry.pause == FIRST_PAUSE);
    }

    #[test]
    fn a_drip_uses_its_time_up() {
        let limit = Duration::from_secs(10);
        let mut pace = Pace::new(limit);
        for second in 1..=10 {
            pace.part(1000, Duration::from_secs(1));
            assert_eq!(pace.left(), Duration::from_secs(10 - second));
        }
        assert_eq!(pace.bytes(), 10_000);
        let mut pace = Pace::new(limit);
        for _ in 0..100 {
            pace.part(4 << 10, Duration::from_secs(1));
            assert!(pace.left() > Duration::from_secs(2), "slow, but no drip");
        }
    }

    #[test]
    fn retry_after_values() {
        assert_eq!(retry_after(" 5 "), Some(Duration::from_secs(5)));
        assert_eq!(retry_after("Fri, 31 Dec 1999 23:59:59 GMT"), Some(Duration::ZERO));
        assert_eq!(retry_after("soon"), None);
        assert_eq!(retry_after("-1"), None);
    }
}
