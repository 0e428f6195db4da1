//! Names of entries inside an image: relative, clean, and unable to leave the tree by construction.
//!
//! Tar and TOC names come from strangers (`/x`, `./x`, `../x`, `a//b/../c`). Upstream cleans them as Go's
//! `path.Clean("/" + name)` does, so `..` stops at the root; [`EntryPath::clean`] does the same and adds the limits that
//! the kernel has anyway.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Longest name of one component in bytes (Linux `NAME_MAX`).
pub const COMPONENT_MAX: usize = 255;
/// Longest path in bytes (Linux `PATH_MAX` without the terminating NUL).
pub const PATH_MAX: usize = 4095;

/// A clean path relative to the root of an image: bytes, no leading or trailing `/`, no empty, `.` or `..` component,
/// no NUL. The root itself is the empty path.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct EntryPath(Box<[u8]>);

/// Why a name cannot be a path inside an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// A NUL byte would end the name early in every system call.
    #[error("name {0:?} holds a NUL byte")]
    Nul(String),
    /// A component is longer than [`COMPONENT_MAX`].
    #[error("name {0:?}... has a component of more than {COMPONENT_MAX} bytes")]
    ComponentTooLong(String),
    /// The path is longer than [`PATH_MAX`].
    #[error("name {0:?}... is longer than {PATH_MAX} bytes")]
    TooLong(String),
}

impl EntryPath {
    /// The root directory of the image.
    pub fn root() -> Self {
        Self::default()
    }

    /// Cleans a name as it stands in a tar header or a TOC: `..` never climbs above the root.
    pub fn clean(name: &[u8]) -> Result<Self, PathError> {
        let shown = || String::from_utf8_lossy(name.get(..name.len().min(80)).unwrap_or(name)).into_owned();
        if name.contains(&0) {
            return Err(PathError::Nul(shown()));
        }
        // Most names are clean but for a slash at the end of directories.
        let candidate = name.strip_suffix(b"/").unwrap_or(name);
        if is_clean(candidate) {
            return Ok(Self(candidate.into()));
        }
        // Never longer than the name, of which a TOC may have 150 MiB: a list of its components would take eight times as much.
        let mut path = Vec::new();
        for component in name.split(|byte| *byte == b'/') {
            match component {
                b"" | b"." => {}
                b".." => path.truncate(path.iter().rposition(|byte| *byte == b'/').unwrap_or(0)),
                _ if component.len() > COMPONENT_MAX => return Err(PathError::ComponentTooLong(shown())),
                _ => {
                    if !path.is_empty() {
                        path.push(b'/');
                    }
                    path.extend_from_slice(component);
                }
            }
        }
        if path.len() > PATH_MAX {
            return Err(PathError::TooLong(shown()));
        }
        Ok(Self(path.into_boxed_slice()))
    }

    /// The path's bytes; empty for the root.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether this is the root directory.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The components from the root down; none for the root itself.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        components(&self.0)
    }

    /// The path of the directory that holds this path, empty for the root, and the last component. `None` for the root.
    pub fn parent_and_name(&self) -> Option<(&[u8], &[u8])> {
        if self.is_root() {
            return None;
        }
        match self.0.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => Some((self.0.get(..slash)?, self.0.get(slash + 1..)?)),
            None => Some((b"", &self.0)),
        }
    }

    /// The last component, `None` for the root.
    pub fn file_name(&self) -> Option<&[u8]> {
        self.parent_and_name().map(|(_, name)| name)
    }

    /// The directory that holds this path, `None` for the root.
    pub fn parent(&self) -> Option<Self> {
        self.parent_and_name().map(|(parent, _)| Self(parent.into()))
    }

    /// This path with one more component, which is cleaned like any other name.
    pub fn join(&self, name: &[u8]) -> Result<Self, PathError> {
        Self::clean(&[self.as_bytes(), b"/", name].concat())
    }
}

/// Whether a name without NUL bytes is a clean path other than the root.
fn is_clean(name: &[u8]) -> bool {
    let clean =
        |component: &[u8]| !matches!(component, b"" | b"." | b"..") && component.len() <= COMPONENT_MAX;
    name.len() <= PATH_MAX && name.split(|byte| *byte == b'/').all(clean)
}

/// The components of a clean path.
pub fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/')
        .filter(|component| !component.is_empty())
}

impl fmt::Display for EntryPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}", String::from_utf8_lossy(&self.0).escape_debug())
    }
}

impl fmt::Debug for EntryPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_cleaned_as_upstream_does() {
        for (name, clean) in [
            ("", ""),
            ("/", ""),
            ("./", ""),
            ("..", ""),
            ("x", "x"),
            ("/x", "x"),
            ("./x", "x"),
            ("../x", "x"),
            ("a//b/./c/", "a/b/c"),
            ("a/b/../../../c", "c"),
            ("...", "..."),
        ] {
            assert_eq!(
                EntryPath::clean(name.as_bytes()).unwrap().as_bytes(),
                clean.as_bytes(),
                "{name:?}"
            );
        }
    }

    #[test]
    fn impossible_names_are_errors() {
        assert!(matches!(EntryPath::clean(b"a\0b"), Err(PathError::Nul(_))));
        assert!(matches!(
            EntryPath::clean(&[b'a'; 256]),
            Err(PathError::ComponentTooLong(_))
        ));
        assert!(matches!(
            EntryPath::clean("a/".repeat(2049).as_bytes()),
            Err(PathError::TooLong(_))
        ));
    }

    proptest! {
        #[test]
        fn cleaning_is_what_the_components_say(
            name in proptest::collection::vec(prop_oneof![Just(b"/".to_vec()), Just(b".".to_vec()), Just(b"a".to_vec()),
                Just(vec![b'b'; 130]), Just(vec![b'c'; 2000])], 0..12)
        ) {
            let name = name.concat();
            let mut components: Vec<&[u8]> = Vec::new();
            for component in name.split(|byte| *byte == b'/') {
                match component {
                    b"" | b"." => {}
                    b".." => drop(components.pop()),
                    _ => components.push(component),
                }
            }
            let expected = components.join(&b'/');
            match EntryPath::clean(&name) {
                Ok(path) => prop_assert_eq!(path.as_bytes(), expected),
                Err(PathError::TooLong(_)) => prop_assert!(expected.len() > PATH_MAX),
                Err(_) => prop_assert!(name.split(|byte| *byte == b'/').any(|part| part.len() > COMPONENT_MAX)),
            }
        }
    }

    #[test]
    fn parents_end_at_the_root() {
        let path = EntryPath::clean(b"a/b").unwrap();
        assert_eq!(path.file_name(), Some(&b"b"[..]));
        assert_eq!(path.parent_and_name(), Some((&b"a"[..], &b"b"[..])));
        let parent = path.parent().unwrap();
        assert_eq!(parent.as_bytes(), b"a");
        assert_eq!(parent.parent_and_name(), Some((&b""[..], &b"a"[..])));
        assert!(parent.parent().unwrap().is_root());
        assert_eq!(EntryPath::root().parent_and_name(), None);
        assert_eq!(EntryPath::root().parent(), None);
    }
}
