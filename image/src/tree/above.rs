//! A set of paths that tells which other paths lead through one of them. The merge asks for whiteouts, the plan of a conversion for
//! entries of upper layers; both with the symbolic links of a layer.

use std::collections::HashSet;
use std::hash::{BuildHasher, Hasher, RandomState};

use crate::path::components;

/// Clean paths, of which only hashes are kept: with a chance of one in 10^15 or so some other path is taken for one of them, so
/// whoever asks must be right in either case. No path of the set is missed.
#[derive(Debug, Default)]
pub struct Paths {
    keys: RandomState,
    hashes: HashSet<u64>,
}

impl Paths {
    /// Adds a path. The root means nothing.
    pub fn insert(&mut self, path: &[u8]) {
        let mut hasher = self.keys.build_hasher();
        for name in components(path) {
            add(&mut hasher, name);
        }
        self.hashes.insert(hasher.finish());
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// Whether a path of the set is `path` or lies above it. Takes the length of the path once, not its square.
    pub fn lead_to(&self, path: &[u8]) -> bool {
        let mut hasher = self.keys.build_hasher();
        !self.is_empty()
            && components(path).any(|name| {
                add(&mut hasher, name);
                self.hashes.contains(&hasher.clone().finish())
            })
    }
}

impl<P: AsRef<[u8]>> Extend<P> for Paths {
    fn extend<I: IntoIterator<Item = P>>(&mut self, paths: I) {
        for path in paths {
            self.insert(path.as_ref());
        }
    }
}

/// Goes on to one more component, which ends somewhere.
fn add(hasher: &mut impl Hasher, name: &[u8]) {
    hasher.write(name);
    hasher.write(b"/");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_lead_to_what_lies_below_them() {
        let mut paths = Paths::default();
        assert!(!paths.lead_to(b"a"));
        paths.extend([&b"a/bc"[..], b"d", b"x/y/z"]);
        for (path, expected) in [
            ("", false),
            ("a", false),
            ("a/bc", true),
            ("a/bc/d/e", true),
            ("a/b", false),
            ("a/b/c", false),
            ("a/bcd", false),
            ("abc", false),
            ("d", true),
            ("d/a", true),
            ("d-a", false),
            ("x/y", false),
            ("x/y/z/a", true),
        ] {
            assert_eq!(paths.lead_to(path.as_bytes()), expected, "{path}");
        }
    }
}
