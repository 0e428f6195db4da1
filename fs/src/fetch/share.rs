//! Slots and memory of requests, shared out by registry and by image.
//!
//! By registry, because requests to one that is gone or slow keep both for as long as they are tried again, which is as long
//! as a read waits at most. By image, because what was fetched keeps its memory until it is decoded: no image may have all of
//! a registry's share, and who has least of it is served first.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use tokio::sync::oneshot;

use crate::lock;

/// Compressed bytes in flight for each lane and registry, in KiB.
const MEMORY_KIB: u32 = 80 << 10;
/// How much of that one image may have.
const MEMORY_KIB_OF_IMAGE: u32 = 64 << 10;
/// Registries that are told apart at a time, in each lane; more than these share what the others leave.
const SHARES: usize = 4;
/// How often others may pass a request that waits for more than there is.
const PASSES: u32 = 64;

/// What one lane may use.
#[derive(Debug)]
pub(super) struct Limits {
    /// Requests at once to one registry, of all images and of one.
    slots: (u32, u32),
    /// At most [`SHARES`].
    shares: Mutex<Vec<Share>>,
}

/// What the requests to one registry may use.
#[derive(Debug, Clone)]
struct Share {
    /// Host and port; `None` for local layouts and archives.
    registry: Option<String>,
    slots: Arc<Room>,
    memory: Arc<Room>,
}

impl Limits {
    /// So many requests at once to one registry, so many of them for one image.
    pub(super) fn new(slots: u32, of_image: u32) -> Self {
        Self {
            slots: (slots, of_image),
            shares: Mutex::default(),
        }
    }

    /// Whether any bytes are in flight.
    pub(super) fn in_use(&self) -> bool {
        lock(&self.shares)
            .iter()
            .any(|share| share.memory.free() < MEMORY_KIB)
    }

    /// A slot for a request of this image. `None` when the service ends.
    pub(super) async fn slot(&self, registry: Option<&str>, image: u64) -> Option<Grant> {
        let slots = self.share(registry).slots;
        Room::take(&slots, image, 1).await
    }

    /// Memory for so many bytes of this image, or all that it may have. `None` when the service ends.
    pub(super) async fn memory(&self, registry: Option<&str>, image: u64, bytes: u64) -> Option<Grant> {
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(MEMORY_KIB_OF_IMAGE);
        let memory = self.share(registry).memory;
        Room::take(&memory, image, kib).await
    }

    /// The share of a registry.
    fn share(&self, registry: Option<&str>) -> Share {
        let mut shares = lock(&self.shares);
        if let Some(share) = shares.iter().find(|share| share.registry.as_deref() == registry) {
            return share.clone();
        }
        let new = || Share {
            registry: registry.map(str::to_owned),
            slots: Arc::new(Room::new(self.slots.0, self.slots.1)),
            memory: Arc::new(Room::new(MEMORY_KIB, MEMORY_KIB_OF_IMAGE)),
        };
        if shares.len() < SHARES {
            let share = new();
            shares.push(share.clone());
            return share;
        }
        if let Some(idle) = shares.iter_mut().find(|share| share.is_idle()) {
            idle.registry = registry.map(str::to_owned);
            return idle.clone();
        }
        let left = |share: &&Share| (share.slots.free(), share.memory.free());
        shares.iter().max_by_key(left).cloned().unwrap_or_else(new)
    }
}

impl Share {
    /// Whether nobody has or waits for anything of it: grants and those who wait keep the rooms.
    fn is_idle(&self) -> bool {
        Arc::strong_count(&self.slots) == 1 && Arc::strong_count(&self.memory) == 1
    }
}

/// A number of units that images take and give back.
#[derive(Debug)]
struct Room {
    /// How many one image may have.
    of_image: u32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    free: u32,
    images: BTreeMap<u64, Of>,
}

/// What one image has and wants.
#[derive(Debug, Default)]
struct Of {
    held: u32,
    /// In the order in which it asked.
    waiting: VecDeque<Asked>,
}

#[derive(Debug)]
struct Asked {
    units: u32,
    /// How often others were served while there was not enough for this one.
    passed: u32,
    grant: oneshot::Sender<Grant>,
}

/// Units of a room; dropping it gives them back.
#[derive(Debug)]
pub(crate) struct Grant {
    room: Arc<Room>,
    image: u64,
    units: u32,
}

/// The right to have bytes in flight; shared by the streams of a transfer.
pub(crate) type Permit = Arc<Grant>;

impl Room {
    fn new(units: u32, of_image: u32) -> Self {
        Self {
            of_image: of_image.min(units),
            state: Mutex::new(State {
                free: units,
                images: BTreeMap::new(),
            }),
        }
    }

    fn free(&self) -> u32 {
        lock(&self.state).free
    }

    /// Takes units for an image, at least one and no more than it may have, when it is its turn.
    async fn take(room: &Arc<Self>, image: u64, units: u32) -> Option<Grant> {
        let units = units.clamp(1, room.of_image);
        let (grant, granted) = oneshot::channel();
        let asked = Asked {
            units,
            passed: 0,
            grant,
        };
        lock(&room.state)
            .images
            .entry(image)
            .or_default()
            .waiting
            .push_back(asked);
        Self::serve(room);
        granted.await.ok()
    }

    /// Grants what can be granted.
    fn serve(room: &Arc<Self>) {
        let mut is_more = true;
        while is_more {
            is_more = false;
            let mut granted = Vec::new();
            {
                let mut state = lock(&room.state);
                while let Some((image, asked)) = state.next(room.of_image) {
                    granted.push((image, asked));
                }
            }
            // Not under the lock: a grant that is taken may be dropped at once.
            for (image, asked) in granted {
                let grant = Grant {
                    room: Arc::clone(room),
                    image,
                    units: asked.units,
                };
                if let Err(mut grant) = asked.grant.send(grant) {
                    // Nobody waits for it any more. Dropping it would call this function once for each such request.
                    grant.give_back();
                    is_more = true;
                }
            }
        }
    }
}

impl State {
    /// The request that is next: of the image that has least among those that may have what they ask for. One that was passed too often
    /// while there was not enough for it holds up all others.
    fn next(&mut self, of_image: u32) -> Option<(u64, Asked)> {
        let free = self.free;
        let mut waiting: Vec<(u32, u64)> = self
            .images
            .iter()
            .filter(|(_, of)| {
                let first = of.waiting.front();
                first.is_some_and(|asked| of.held.saturating_add(asked.units) <= of_image)
            })
            .map(|(image, of)| (of.held, *image))
            .collect();
        waiting.sort_unstable();
        let first = |image: &u64| self.images.get(image).and_then(|of| of.waiting.front());
        let tired = |(_, image): &&(u32, u64)| first(image).is_some_and(|asked| asked.passed >= PASSES);
        let next = match waiting.iter().find(tired) {
            Some((_, image)) => *image,
            None => waiting
                .iter()
                .map(|(_, image)| *image)
                .find(|image| first(image).is_some_and(|asked| asked.units <= free))?,
        };
        let of = self.images.get_mut(&next)?;
        let asked = of.waiting.pop_front_if(|asked| asked.units <= free)?;
        of.held += asked.units;
        self.free -= asked.units;
        for (_, image) in waiting {
            let first = self.images.get_mut(&image).and_then(|of| of.waiting.front_mut());
            if let Some(asked) = first.filter(|asked| asked.units > free && image != next) {
                asked.passed += 1;
            }
        }
        Some((next, asked))
    }
}

impl Grant {
    /// Gives the units back, without serving others.
    fn give_back(&mut self) {
        let units = std::mem::take(&mut self.units);
        let mut state = lock(&self.room.state);
        state.free += units;
        if let Some(of) = state.images.get_mut(&self.image) {
            of.held = of.held.saturating_sub(units);
            if of.held == 0 && of.waiting.is_empty() {
                state.images.remove(&self.image);
            }
        }
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        // One without units was given back.
        if self.units > 0 {
            self.give_back();
            Room::serve(&self.room);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::{Pin, pin};
    use std::task::{Context, Poll, Waker};

    use super::*;

    type Asking = Pin<Box<dyn Future<Output = Option<Grant>>>>;

    /// What has come of it so far.
    fn poll(asking: &mut Asking) -> Option<Grant> {
        match asking.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(grant) => grant,
            Poll::Pending => None,
        }
    }

    fn ask(room: &Arc<Room>, image: u64, units: u32) -> Asking {
        let room = Arc::clone(room);
        let mut asking: Asking = Box::pin(async move { Room::take(&room, image, units).await });
        // Asking begins with the first look; what it gives at once is given back here.
        if let Some(grant) = poll(&mut asking) {
            return Box::pin(std::future::ready(Some(grant)));
        }
        asking
    }

    fn at_once<T>(future: impl Future<Output = T>) -> Option<T> {
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        }
    }

    #[test]
    fn an_image_leaves_room_for_others_and_who_has_least_is_next() {
        let room = Arc::new(Room::new(8, 6));
        let mut hog: Vec<_> = (0..10).map(|_| ask(&room, 1, 1)).collect();
        let mut held: Vec<_> = hog.iter_mut().filter_map(poll).collect();
        assert_eq!(held.len(), 6, "what one image may have");
        let mut second = ask(&room, 2, 2);
        let second = poll(&mut second).expect("the rest is for others");
        let mut third = ask(&room, 3, 1);
        assert!(poll(&mut third).is_none(), "nothing is left");
        held.truncate(5);
        assert!(hog.iter_mut().skip(6).find_map(poll).is_none());
        let third = poll(&mut third).expect("it has less than the one that asked before");
        drop((second, third));
        drop(held);
        assert!(hog.iter_mut().skip(6).all(|asking| poll(asking).is_some()));
        drop(hog);
        assert_eq!(room.free(), 8);
        assert!(lock(&room.state).images.is_empty());
    }

    #[test]
    fn a_large_request_is_not_passed_for_ever() {
        let room = Arc::new(Room::new(4, 4));
        let mut first = ask(&room, 1, 2);
        let first = poll(&mut first).unwrap();
        let mut large = ask(&room, 2, 4);
        assert!(poll(&mut large).is_none());
        let mut small = 0;
        while small < 1000 && poll(&mut ask(&room, 3, 1)).is_some() {
            small += 1;
        }
        assert_eq!(small, PASSES);
        drop(first);
        assert!(poll(&mut large).is_some());
        assert!(poll(&mut ask(&room, 3, 1)).is_some());
    }

    #[test]
    fn who_does_not_wait_any_more_takes_nothing() {
        let room = Arc::new(Room::new(1, 1));
        let mut first = ask(&room, 1, 1);
        let first = poll(&mut first).unwrap();
        drop(ask(&room, 2, 1));
        drop(first);
        assert_eq!(room.free(), 1);
        assert!(
            poll(&mut ask(&room, 3, 100)).is_some(),
            "no more than it may have"
        );
    }

    #[test]
    fn any_number_of_requests_may_be_cancelled() {
        let room = Arc::new(Room::new(1, 1));
        let mut first = ask(&room, 1, 1);
        let first = poll(&mut first).unwrap();
        let cancelled: Vec<_> = (0..50_000).map(|_| ask(&room, 2, 1)).collect();
        let mut last = ask(&room, 2, 1);
        drop(cancelled);
        drop(first);
        assert!(poll(&mut last).is_some());
        assert_eq!(room.free(), 1);
        assert!(lock(&room.state).images.is_empty());
    }

    #[test]
    fn a_registry_without_slots_leaves_the_others_theirs() {
        let limits = Limits::new(24, 16);
        let take = |registry: &str, image| {
            let memory = at_once(limits.memory(Some(registry), image, 1 << 20))??;
            Some((at_once(limits.slot(Some(registry), image))??, memory))
        };
        let mut stuck: Vec<_> = std::iter::from_fn(|| take("dead", 1)).collect();
        assert_eq!(stuck.len(), 16);
        stuck.extend(std::iter::from_fn(|| take("dead", 2)));
        assert_eq!(stuck.len(), 24);
        assert!(limits.in_use() && take("healthy", 1).is_some());
        drop(stuck);
        assert!(!limits.in_use());
    }

    #[test]
    fn shares_are_few_and_go_to_those_that_use_them() {
        let limits = Limits::new(4, 4);
        let mut used: Vec<_> = (0..SHARES)
            .map(|number| {
                let registry = number.to_string();
                let slots = if number == 2 { 1 } else { 4 };
                let take = || at_once(limits.slot(Some(&registry), 1)).flatten();
                std::iter::from_fn(take).take(slots).collect::<Vec<_>>()
            })
            .collect();
        let guest = limits.share(Some("guest"));
        assert_eq!(guest.registry.as_deref(), Some("2"), "the one with most left");
        drop(guest);
        drop(used.remove(1));
        let heir = limits.share(Some("heir"));
        assert_eq!(heir.slots.free(), 4);
        assert_eq!(heir.registry.as_deref(), Some("heir"));
        assert!(
            limits.share(None).registry.is_some(),
            "a share that is used was given away"
        );
        assert_eq!(lock(&limits.shares).len(), SHARES);
    }
}
