//! One load of an image, whoever asks: requests that are the same share the work, its progress and its result.
//!
//! What must hold: the work is nobody's own. It runs in a thread of its own, so no caller that is slow or gone holds it up, and
//! whoever is left has its result. An error is shared by those who waited for it; who asks after that begins anew. Requests are
//! the same if all of them is: name, platform, pull policy, how to reach the registry and with which credentials, and what is
//! wanted of the image.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use crate::error::Error;
use crate::service::Image;
use crate::{LoadRequest, Progress, lock};

/// Loads that are under way.
#[derive(Debug, Default)]
pub(crate) struct Flights(Mutex<Vec<Arc<Flight>>>);

/// A load and those who wait for it.
#[derive(Debug)]
struct Flight {
    request: LoadRequest,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// What there is to tell, oldest first: of each step, and of each layer that is pulled, the last.
    steps: Vec<(u64, Progress)>,
    /// How much was told.
    told: u64,
    /// Callers that wait.
    waiting: usize,
    outcome: Option<Outcome>,
}

type Outcome = Result<Arc<Image>, Arc<Error>>;

impl Flights {
    /// Waits for the load that this request shares, or begins one. `work` is called in a thread of its own, or never.
    pub(crate) fn load(
        self: &Arc<Self>,
        request: &LoadRequest,
        progress: &(dyn Fn(Progress) + Send + Sync),
        work: impl FnOnce(&LoadRequest, &(dyn Fn(Progress) + Send + Sync)) -> Result<Arc<Image>, Error>
        + Send
        + 'static,
    ) -> Result<Arc<Image>, Error> {
        let (flight, is_new) = self.join(request);
        if is_new {
            let under_way = UnderWay {
                flights: Arc::clone(self),
                flight: Arc::clone(&flight),
                outcome: Err(Error::Stopping),
            };
            let name = "peel-load";
            let spawned = thread::Builder::new().name(name.to_owned()).spawn(move || {
                let mut under_way = under_way;
                let flight = Arc::clone(&under_way.flight);
                under_way.outcome = work(&flight.request, &|step| flight.tell(step));
            });
            if let Err(source) = spawned {
                flight.leave();
                return Err(Error::Thread {
                    name: name.to_owned(),
                    source,
                });
            }
        }
        flight.wait(progress)
    }

    fn join(&self, request: &LoadRequest) -> (Arc<Flight>, bool) {
        let mut flights = lock(&self.0);
        if let Some(flight) = flights.iter().find(|flight| flight.request == *request) {
            lock(&flight.state).waiting += 1;
            return (Arc::clone(flight), false);
        }
        let flight = Arc::new(Flight {
            request: request.clone(),
            state: Mutex::new(State {
                waiting: 1,
                ..State::default()
            }),
            changed: Condvar::new(),
        });
        flights.push(Arc::clone(&flight));
        (flight, true)
    }

    /// How many callers wait for loads.
    pub(crate) fn waiting(&self) -> usize {
        let flights = lock(&self.0);
        flights.iter().map(|flight| lock(&flight.state).waiting).sum()
    }
}

/// The work of a flight. When it is dropped, the flight has its result.
struct UnderWay {
    flights: Arc<Flights>,
    flight: Arc<Flight>,
    outcome: Result<Arc<Image>, Error>,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        // From here on, requests begin anew: an error is for those who waited for it.
        lock(&self.flights.0).retain(|flight| !Arc::ptr_eq(flight, &self.flight));
        let outcome = std::mem::replace(&mut self.outcome, Err(Error::Stopping));
        let mut state = lock(&self.flight.state);
        if state.waiting > 0 {
            state.outcome = Some(outcome.map_err(Arc::new));
        }
        drop(state);
        self.flight.changed.notify_all();
    }
}

impl Flight {
    /// Tells a step to those who wait.
    fn tell(&self, step: Progress) {
        let mut state = lock(&self.state);
        state.told += 1;
        let number = state.told;
        let layer = |step: &Progress| match step {
            Progress::Pulling { layer, .. } => Some(*layer),
            Progress::Resolved { .. } | Progress::Indexed => None,
        };
        // Those who come later are told that a layer is pulled, and how far that is, but not how it went.
        state
            .steps
            .retain(|(_, earlier)| layer(&step).is_none() || layer(earlier) != layer(&step));
        state.steps.push((number, step));
        drop(state);
        self.changed.notify_all();
    }

    /// Waits for the result; what happens meanwhile, and happened before, is told to `progress`.
    fn wait(&self, progress: &(dyn Fn(Progress) + Send + Sync)) -> Result<Arc<Image>, Error> {
        let mut heard = 0;
        let mut state = lock(&self.state);
        loop {
            let news = state.steps.iter().filter(|(number, _)| *number > heard);
            let news: Vec<(u64, Progress)> = news.cloned().collect();
            if let Some((last, _)) = news.last() {
                heard = *last;
                drop(state);
                for (_, step) in news {
                    progress(step);
                }
                state = lock(&self.state);
                continue;
            }
            if state.outcome.is_some() {
                break;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting -= 1;
        let outcome = if state.waiting == 0 {
            state.outcome.take()
        } else {
            state.outcome.clone()
        };
        drop(state);
        outcome
            .unwrap_or_else(|| Err(Arc::new(Error::Stopping)))
            .map_err(|error| {
                // The last one has it for itself.
                Arc::try_unwrap(error).unwrap_or_else(Error::Shared)
            })
    }

    /// A caller waits no more.
    fn leave(&self) {
        lock(&self.state).waiting -= 1;
    }
}
