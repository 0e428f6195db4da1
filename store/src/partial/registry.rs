//! Which partial objects are open in this process, so that all who want the same one share it.
//!
//! The table's mutex is held for a look-up only. Each object has a slot with a mutex of its own, held while its files are
//! opened or made: a second opener has to wait for just that. Order: a slot is never waited for with the table locked.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use peel_image::Digest;

use super::PartialObject;

/// The open partial objects.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    slots: Mutex<HashMap<Digest, Arc<Slot>>>,
}

/// The place of one digest.
#[derive(Debug, Default)]
pub(super) struct Slot {
    live: Mutex<Weak<PartialObject>>,
}

impl Slot {
    pub(super) fn lock(&self) -> MutexGuard<'_, Weak<PartialObject>> {
        // A panic while it was held left either the old or the new reference; both are sound.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registry {
    pub(super) fn slot(&self, digest: &Digest) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(slots.entry(*digest).or_default())
    }

    /// Frees the slot unless somebody uses it or a newer object lives in it.
    pub(super) fn forget(&self, digest: &Digest) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        // One reference is the table's own: nobody holds or waits for the slot, and nobody can begin to while the table is
        // locked.
        let unused = slots
            .get(digest)
            .is_some_and(|slot| Arc::strong_count(slot) == 1 && slot.lock().strong_count() == 0);
        if unused {
            slots.remove(digest);
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}
