//! The names in a directory while layers are merged. Called by [`super::merge`].
//!
//! Most layers list a directory in the order of its names, and then a name is put behind the last one without any search. Names
//! that come in another order go to a map. What a name costs is logarithmic in the number of names, whatever their order.

use std::collections::BTreeMap;

/// Names and what they stand for, a name at most once.
#[derive(Debug, Default)]
pub(super) struct Children<'a> {
    /// Ascending names. One that was removed leaves its place empty.
    ascending: Vec<(&'a [u8], Option<u32>)>,
    /// Names that are not in the other list.
    others: BTreeMap<&'a [u8], u32>,
}

impl<'a> Children<'a> {
    pub(super) fn get(&self, name: &[u8]) -> Option<u32> {
        match self.place(name) {
            Some(place) => self.ascending.get(place)?.1,
            None => self.others.get(name).copied(),
        }
    }

    /// Adds a name or gives it another meaning.
    pub(super) fn insert(&mut self, name: &'a [u8], id: u32) {
        if self.others.is_empty() && self.ascending.last().is_none_or(|(last, _)| *last < name) {
            self.ascending.push((name, Some(id)));
            return;
        }
        match self.place(name).and_then(|place| self.ascending.get_mut(place)) {
            Some((_, slot)) => *slot = Some(id),
            None => {
                self.others.insert(name, id);
            }
        }
    }

    pub(super) fn remove(&mut self, name: &[u8]) {
        match self.place(name).and_then(|place| self.ascending.get_mut(place)) {
            Some((_, slot)) => *slot = None,
            None => {
                self.others.remove(name);
            }
        }
    }

    pub(super) fn clear(&mut self) {
        self.ascending.clear();
        self.others.clear();
    }

    /// Not fewer than the names.
    pub(super) fn len_max(&self) -> usize {
        self.ascending.len() + self.others.len()
    }

    /// All names in their order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&'a [u8], u32)> {
        let present = |(name, id): &(&'a [u8], Option<u32>)| Some((*name, (*id)?));
        let mut ascending = self.ascending.iter().filter_map(present).peekable();
        let mut others = self.others.iter().map(|(name, id)| (*name, *id)).peekable();
        std::iter::from_fn(move || match (ascending.peek(), others.peek()) {
            (Some((name, _)), Some((other, _))) if other < name => others.next(),
            (Some(_), _) => ascending.next(),
            (None, _) => others.next(),
        })
    }

    /// Where a name is in the ascending list.
    fn place(&self, name: &[u8]) -> Option<usize> {
        self.ascending
            .binary_search_by(|(other, _)| (*other).cmp(name))
            .ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NAMES: [&[u8]; 8] = [b"a", b"b", b"ba", b"c", b"cc", b"d", b"e", b"f"];

    proptest! {
        /// 0 removes, 9 clears, anything else is inserted.
        #[test]
        fn as_a_map_would(steps in proptest::collection::vec((0..NAMES.len(), 0_u32..10), 0..60), sorted in any::<bool>()) {
            let mut steps = steps;
            if sorted {
                steps.sort_by_key(|(name, _)| *name);
            }
            let mut map = BTreeMap::new();
            let mut children = Children::default();
            for (name, step) in steps {
                let name = NAMES[name];
                match step {
                    0 => {
                        map.remove(name);
                        children.remove(name);
                    }
                    9 => {
                        map.clear();
                        children.clear();
                    }
                    id => {
                        map.insert(name, id);
                        children.insert(name, id);
                    }
                }
                for name in NAMES {
                    prop_assert_eq!(children.get(name), map.get(name).copied());
                }
                let all: Vec<(&[u8], u32)> = children.iter().collect();
                prop_assert_eq!(all, map.iter().map(|(name, id)| (*name, *id)).collect::<Vec<_>>());
                prop_assert!(children.len_max() >= map.len());
            }
        }
    }
}
