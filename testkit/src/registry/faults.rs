//! What goes wrong in the embedded registry, on demand: a small script that tests change while requests run.
//!
//! Called by the end-to-end tests; `peel demo` leaves it empty. Two switches act on everything (`pause`, `refuse`);
//! rules act on the requests that match them, the first match wins.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

/// What a matching request meets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// The answer is this HTTP status with an OCI error body.
    Status(u16),
    /// Every byte of the blob at these offsets is inverted, whatever range is asked for.
    Corrupt(std::ops::Range<u64>),
    /// The body ends after this many bytes and the connection is cut.
    Truncate(u64),
    /// The blob is as short as this: the whole answer, length and all, is consistent with it.
    Shorten(u64),
    /// The answer waits this long before it starts.
    Delay(Duration),
    /// The connection is cut before anything is answered.
    Cut,
}

/// One rule of the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Method to match; `None` is every method.
    pub method: Option<String>,
    /// Text that path and query must contain, for example a digest or `/manifests/`. Empty matches everything.
    pub contains: String,
    /// Requests that match but pass before the rule acts.
    pub skip: u32,
    /// Requests that the rule acts on; `None` is all of them.
    pub times: Option<u32>,
    /// What happens.
    pub action: Action,
}

impl Rule {
    /// A rule for every GET whose target contains `contains`.
    pub fn get(contains: impl Into<String>, action: Action) -> Self {
        Self {
            method: Some("GET".into()),
            contains: contains.into(),
            skip: 0,
            times: None,
            action,
        }
    }

    /// The same, for this many requests only.
    #[must_use]
    pub fn times(mut self, times: u32) -> Self {
        self.times = Some(times);
        self
    }

    /// The same, after letting this many requests pass.
    #[must_use]
    pub fn after(mut self, skip: u32) -> Self {
        self.skip = skip;
        self
    }
}

/// The switches as the server sees them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Switches {
    pub(super) paused: bool,
    pub(super) refused: bool,
}

/// The plan. All methods may be called at any time from any thread.
#[derive(Debug)]
pub struct Faults {
    rules: Mutex<Vec<Rule>>,
    switches: watch::Sender<Switches>,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            rules: Mutex::default(),
            switches: watch::Sender::new(Switches::default()),
        }
    }
}

impl Faults {
    /// Adds a rule behind those that are there.
    pub fn add(&self, rule: Rule) {
        self.rules().push(rule);
    }

    /// Stops answering: new requests and bodies in the middle wait, connections stay open.
    pub fn pause(&self) {
        self.switches.send_modify(|switches| switches.paused = true);
    }

    /// Goes on answering.
    pub fn resume(&self) {
        self.switches.send_modify(|switches| switches.paused = false);
    }

    /// Closes every connection and the listening socket, as a server that is gone.
    pub fn refuse(&self) {
        self.switches.send_modify(|switches| switches.refused = true);
    }

    /// Listens again, on the same port.
    pub fn accept(&self) {
        self.switches.send_modify(|switches| switches.refused = false);
    }

    /// Forgets all rules and switches.
    pub fn clear(&self) {
        self.rules().clear();
        self.switches
            .send_modify(|switches| *switches = Switches::default());
    }

    /// A view of the switches that can be waited on.
    pub(super) fn switches(&self) -> watch::Receiver<Switches> {
        self.switches.subscribe()
    }

    /// Waits while the registry is paused.
    pub(super) async fn unpaused(&self) {
        let mut switches = self.switches();
        // The sender lives as long as `self`; an error would mean that nobody can resume any more.
        let _ = switches.wait_for(|switches| !switches.paused).await;
    }

    /// The action for a request, counting it against the rule's limits.
    pub(super) fn action(&self, method: &str, target: &str) -> Option<Action> {
        let mut rules = self.rules();
        let matching = |rule: &&mut Rule| {
            rule.method.as_deref().is_none_or(|wanted| wanted == method)
                && target.contains(&rule.contains)
                && rule.times != Some(0)
        };
        let rule = rules.iter_mut().find(matching)?;
        if rule.skip > 0 {
            rule.skip -= 1;
            return None;
        }
        if let Some(times) = &mut rule.times {
            *times -= 1;
        }
        Some(rule.action.clone())
    }

    fn rules(&self) -> MutexGuard<'_, Vec<Rule>> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
