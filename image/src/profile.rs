//! What an image touched while it started, in the order of first access: the profile that decides which files a layer
//! stores first.
//!
//! Made by `peel analyze` and `peel optimize`, kept in files of JSON lines. The lines are those of ctr-remote
//! (stargz-snapshotter, `recorder/recorder.go`),
//!
//! ```text
//! {"path":"usr/bin/x","manifestDigest":"sha256:...","layerIndex":3}
//! ```
//!
//! with fields of ours that it ignores: `atMicroseconds` (time of the first access since the start of the run),
//! `executed` (`true` or absent) and `pathBase64` (the name's bytes where they are not UTF-8; `path` then only resembles it).
//! On reading, every field but `path` may be missing and unknown ones are ignored, so records of either tool serve both.

use std::collections::HashMap;
use std::io::{self, BufRead, Read, Write};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};

use crate::path::{EntryPath, PathError};
use peel_hash::{Digest, DigestError};

/// Longest line in bytes: a name of `PATH_MAX` bytes, each written as an escape of six, once more in base 64, and the rest.
pub const LINE_MAX: u64 = 64 << 10;
/// Most accesses of a profile: far more files than any start opens.
pub const ACCESSES_MAX: usize = 1_000_000;

/// The record of one run, or of several merged ones.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Profile {
    /// In the order of first access.
    pub accesses: Vec<ProfileEntry>,
}

/// The first access to one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProfileEntry {
    /// The file, symbolic links resolved.
    pub path: EntryPath,
    /// The layer that the file came from when the run was recorded. Only a hint: the image may have been built anew.
    pub layer: Option<LayerRef>,
    /// Microseconds from the start of the run; `None` where the recorder does not tell.
    pub at: Option<u64>,
    /// Whether the file was executed.
    pub executed: bool,
}

/// A layer of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerRef {
    /// Digest of the image's manifest.
    pub manifest: Digest,
    /// Position in the manifest's layers, 0 for the lowest; `None` where only the image is known.
    pub index: Option<u32>,
}

/// Why a profile cannot be read or written. Lines are counted from 1.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// The stream failed.
    #[error("reading or writing the access record failed")]
    Io(#[source] io::Error),
    /// A line is longer than [`LINE_MAX`].
    #[error("line {0} of the access record is longer than {LINE_MAX} bytes")]
    LineTooLong(usize),
    /// A line is no JSON object with a `path`.
    #[error("line {line} of the access record is malformed")]
    Json {
        /// The line.
        line: usize,
        /// What the JSON parser says.
        #[source]
        source: serde_json::Error,
    },
    /// `pathBase64` is not base 64.
    #[error("line {line} of the access record: pathBase64 is malformed")]
    Base64 {
        /// The line.
        line: usize,
        /// What the decoder says.
        #[source]
        source: base64::DecodeError,
    },
    /// The name cannot be a path.
    #[error("line {line} of the access record")]
    Path {
        /// The line.
        line: usize,
        /// Why not.
        #[source]
        source: PathError,
    },
    /// `manifestDigest` is no digest.
    #[error("line {line} of the access record")]
    Digest {
        /// The line.
        line: usize,
        /// Why not.
        #[source]
        source: DigestError,
    },
    /// More than [`ACCESSES_MAX`] lines.
    #[error("the access record has more than {ACCESSES_MAX} lines")]
    TooMany,
}

/// One line, field by field.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path_base64: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    manifest_digest: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    layer_index: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    at_microseconds: Option<u64>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    executed: bool,
}

impl Profile {
    /// Reads JSON lines; empty lines are skipped. Paths are cleaned, and nothing else is changed: a file that is listed
    /// twice stays listed twice.
    pub fn read(mut stream: impl BufRead) -> Result<Self, ProfileError> {
        let mut accesses = Vec::new();
        let mut buffer = Vec::new();
        for number in 1.. {
            buffer.clear();
            let mut limited = stream.by_ref().take(LINE_MAX + 1);
            if limited.read_until(b'\n', &mut buffer).map_err(ProfileError::Io)? == 0 {
                break;
            }
            let line = buffer.strip_suffix(b"\n").unwrap_or(&buffer);
            if u64::try_from(line.len()).unwrap_or(u64::MAX) > LINE_MAX {
                return Err(ProfileError::LineTooLong(number));
            }
            if line.trim_ascii().is_empty() {
                continue;
            }
            if accesses.len() >= ACCESSES_MAX {
                return Err(ProfileError::TooMany);
            }
            accesses.push(parse_line(line, number)?);
        }
        Ok(Self { accesses })
    }

    /// Writes JSON lines.
    pub fn write(&self, mut stream: impl Write) -> Result<(), ProfileError> {
        for access in &self.accesses {
            let name = access.path.as_bytes();
            let (path, path_base64) = match std::str::from_utf8(name) {
                Ok(text) => (text.to_owned(), None),
                Err(_) => (
                    String::from_utf8_lossy(name).into_owned(),
                    Some(BASE64.encode(name)),
                ),
            };
            let line = Line {
                path,
                path_base64,
                manifest_digest: access.layer.map(|layer| layer.manifest.to_string()),
                layer_index: access.layer.and_then(|layer| layer.index),
                at_microseconds: access.at,
                executed: access.executed,
            };
            let mut text = serde_json::to_vec(&line).map_err(|error| ProfileError::Io(error.into()))?;
            text.push(b'\n');
            stream.write_all(&text).map_err(ProfileError::Io)?;
        }
        stream.flush().map_err(ProfileError::Io)
    }

    /// The files of all `runs`, each once, ordered by the earliest time at which any run touched them; by the earliest
    /// position in a run where some access has no time. Ties go to the earlier run. A file was executed if it was in
    /// any run, and its layer is the one that the first run to know it tells.
    pub fn merge(runs: &[Self]) -> Self {
        let timed = runs
            .iter()
            .flat_map(|run| &run.accesses)
            .all(|access| access.at.is_some());
        // For each file its key and its place in the order in which the files are met.
        let mut places: HashMap<&EntryPath, usize> = HashMap::new();
        let mut merged: Vec<(u64, ProfileEntry)> = Vec::new();
        for run in runs {
            for (position, access) in (0_u64..).zip(&run.accesses) {
                let key = access.at.filter(|_| timed).unwrap_or(position);
                let place = *places.entry(&access.path).or_insert(merged.len());
                match merged.get_mut(place) {
                    None => merged.push((key, access.clone())),
                    Some((earliest, entry)) => {
                        *earliest = key.min(*earliest);
                        entry.at = entry.at.into_iter().chain(access.at).min();
                        entry.layer = entry.layer.or(access.layer);
                        entry.executed |= access.executed;
                    }
                }
            }
        }
        merged.sort_by_key(|(key, _)| *key);
        Self {
            accesses: merged.into_iter().map(|(_, access)| access).collect(),
        }
    }
}

fn parse_line(text: &[u8], line: usize) -> Result<ProfileEntry, ProfileError> {
    let fields: Line = serde_json::from_slice(text).map_err(|source| ProfileError::Json { line, source })?;
    let name = match fields.path_base64 {
        None => fields.path.into_bytes(),
        Some(bytes) => BASE64
            .decode(bytes)
            .map_err(|source| ProfileError::Base64 { line, source })?,
    };
    let path = EntryPath::clean(&name).map_err(|source| ProfileError::Path { line, source })?;
    // ctr-remote leaves the digest empty where it does not know the image.
    let manifest = fields.manifest_digest.filter(|text| !text.is_empty());
    let manifest = manifest.map(|text| text.parse()).transpose();
    let manifest: Option<Digest> = manifest.map_err(|source| ProfileError::Digest { line, source })?;
    Ok(ProfileEntry {
        path,
        layer: manifest.map(|manifest| LayerRef {
            manifest,
            index: fields.layer_index,
        }),
        at: fields.at_microseconds,
        executed: fields.executed,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn access(path: &str, at: Option<u64>) -> ProfileEntry {
        ProfileEntry {
            path: EntryPath::clean(path.as_bytes()).unwrap(),
            layer: None,
            at,
            executed: false,
        }
    }

    fn written(profile: &Profile) -> Vec<u8> {
        let mut text = Vec::new();
        profile.write(&mut text).unwrap();
        text
    }

    #[test]
    fn lines_are_those_of_ctr_remote() {
        let mut entry = access("usr/bin/\"x", None);
        entry.layer = Some(LayerRef {
            manifest: Digest::EMPTY,
            index: Some(3),
        });
        let profile = Profile {
            accesses: vec![entry],
        };
        let text = String::from_utf8(written(&profile)).unwrap();
        let expected = format!(
            "{{\"path\":\"usr/bin/\\\"x\",\"manifestDigest\":\"{}\",\"layerIndex\":3}}\n",
            Digest::EMPTY
        );
        assert_eq!(text, expected);
        assert_eq!(Profile::read(text.as_bytes()).unwrap(), profile);
    }

    #[test]
    fn foreign_lines_are_read() {
        for (text, expected) in [
            ("", &[][..]),
            ("\n \n", &[]),
            ("{\"path\":\"./a/../b\",\"new\":[1]}", &[access("b", None)]),
            (
                "{\"path\":\"a\",\"manifestDigest\":\"\",\"layerIndex\":null}\r\n{\"path\":\"/b\",\"atMicroseconds\":7}\n",
                &[access("a", None), access("b", Some(7))],
            ),
        ] {
            assert_eq!(
                Profile::read(text.as_bytes()).unwrap().accesses,
                expected,
                "{text:?}"
            );
        }
    }

    #[test]
    fn malformed_lines_are_named() {
        let long = format!("{{\"path\":\"{}\"}}", "a".repeat(70_000));
        for (text, expected) in [
            (
                "{\"path\":\"a\"}\n\n{}",
                "line 3 of the access record is malformed",
            ),
            ("x", "line 1 "),
            ("{\"path\":\"a\\u0000\"}", "line 1 "),
            ("{\"path\":\"a\",\"pathBase64\":\"-\"}", "pathBase64"),
            ("{\"path\":\"a\",\"manifestDigest\":\"md5:0\"}", "line 1 "),
            ("{\"path\":\"a\",\"layerIndex\":-1}", "malformed"),
            (&long, "line 1 of the access record is longer than 65536 bytes"),
        ] {
            let error = Profile::read(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}, not {expected}");
        }
        // The longest name there is fits, however it is written.
        let name = vec![b"\x01".repeat(255); 15].join(&b'/');
        let accesses = vec![ProfileEntry {
            path: EntryPath::clean(&name).unwrap(),
            ..access("", Some(u64::MAX))
        }];
        let profile = Profile { accesses };
        assert_eq!(Profile::read(&written(&profile)[..]).unwrap(), profile);
    }

    #[test]
    fn runs_are_merged_by_time_or_else_by_position() {
        let run = |accesses: &[(&str, Option<u64>)]| Profile {
            accesses: accesses.iter().map(|(path, at)| access(path, *at)).collect(),
        };
        let order = |runs: &[Profile]| {
            let merged = Profile::merge(runs);
            let paths = merged.accesses.iter().map(|access| access.path.to_string());
            paths.collect::<String>()
        };
        let first = run(&[("a", Some(1)), ("b", Some(10)), ("c", Some(30))]);
        let second = run(&[("a", Some(2)), ("d", Some(5)), ("c", Some(6)), ("a", Some(9))]);
        assert_eq!(order(&[first.clone(), second.clone()]), "/a/d/c/b");
        assert_eq!(Profile::merge(&[first.clone(), second]).accesses[2].at, Some(6));
        let untimed = run(&[("c", None), ("e", None)]);
        assert_eq!(order(&[first.clone(), untimed]), "/a/c/b/e");
        assert_eq!(Profile::merge(std::slice::from_ref(&first)), first);
        assert_eq!(Profile::merge(&[]), Profile::default());
    }

    proptest! {
        #[test]
        fn profiles_round_trip(
            accesses in proptest::collection::vec(
                (
                    proptest::collection::vec(1_u8..=255, 0..40),
                    any::<Option<([u8; 32], Option<u32>)>>(),
                    any::<Option<u64>>(),
                    any::<bool>(),
                ),
                0..10,
            ),
        ) {
            let accesses = accesses.into_iter().map(|(name, layer, at, executed)| ProfileEntry {
                path: EntryPath::clean(&name).unwrap(),
                layer: layer.map(|(digest, index)| LayerRef { manifest: Digest::from_bytes(digest), index }),
                at,
                executed,
            });
            let profile = Profile { accesses: accesses.collect() };
            prop_assert_eq!(Profile::read(&written(&profile)[..]).unwrap(), profile);
        }

        #[test]
        fn any_text_is_a_profile_or_an_error(text in "(\\{\"path\":\"[a\\\\/\"]{0,5}\"(,\"(pathBase64|layerIndex)\":.{0,4})?\\}?\n?){0,4}") {
            if let Ok(profile) = Profile::read(text.as_bytes()) {
                prop_assert!(profile.accesses.len() <= 4);
            }
        }
    }
}
