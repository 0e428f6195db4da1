//! Which manifest of an index is for this machine.
//!
//! Platforms are written `os/architecture[/variant]` in Go's words; the first or the rest may be left out. Variants are levels of
//! one architecture: a machine of a level runs images of that level and below, and the highest of these is the best (as
//! containerd chooses). After all of these come the images of the older architecture whose programs the machine runs too: 386 on amd64,
//! arm on arm64 (containerd, `platforms.Only`).
//!
//! An entry that describes another one (an attestation of BuildKit) is never chosen; one of an artifact only if no other entry is of
//! the platform. Entries that do not say their platform are the matter of [`super::resolve`], which asks their configurations.

use oci_spec::image::Descriptor;
use peel_image::media;

/// A platform to choose an image for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    os: String,
    architecture: String,
    variant: u32,
}

impl Wanted {
    /// Parses `os/architecture[/variant]`. An operating system alone has this machine's architecture, an architecture alone is one of
    /// Linux (as containerd reads them).
    pub(crate) fn parse(text: &str) -> Option<Self> {
        if SYSTEMS.contains(&text.to_ascii_lowercase().as_str()) {
            return Some(Self {
                os: text.to_ascii_lowercase(),
                ..Self::host()
            });
        }
        let first = text.split('/').next()?;
        if ARCHITECTURES.contains(&normal(first).0.as_str()) {
            return Self::parse(&format!("linux/{text}"));
        }
        let mut parts = text.split('/');
        let (os, architecture, variant) = (parts.next()?, parts.next()?, parts.next());
        let word = |part: &str| {
            !part.is_empty()
                && part
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        };
        if parts.next().is_some() || !word(os) || !word(architecture) || !variant.is_none_or(word) {
            return None;
        }
        let (architecture, implied) = normal(architecture);
        let variant = variant.filter(|variant| !variant.is_empty()).or(implied);
        Some(Self {
            os: os.to_ascii_lowercase(),
            variant: level(&architecture, variant)?,
            architecture,
        })
    }

    /// This machine.
    pub(crate) fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", x86_level()),
            "aarch64" => ("arm64", LEVEL_ARM64),
            "arm" => ("arm", LEVEL_ARM),
            "x86" => ("386", 0),
            "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", 0),
            "loongarch64" => ("loong64", 0),
            other => (other, 0),
        };
        Self {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant,
        }
    }

    /// Position of the best of `manifests` that say their platform; among equals the first.
    pub(crate) fn choose(&self, manifests: &[Descriptor]) -> Option<usize> {
        let mut best: Option<((bool, Rank), usize)> = None;
        for (position, descriptor) in manifests.iter().enumerate() {
            if is_statement(descriptor) || !says_platform(descriptor) {
                continue;
            }
            let accepted = descriptor.platform().as_ref().and_then(|platform| {
                self.rank(
                    &platform.os().to_string(),
                    &platform.architecture().to_string(),
                    platform.variant().as_deref().unwrap_or_default(),
                )
            });
            let Some(rank) = accepted else { continue };
            let rank = (!is_artifact(descriptor), rank);
            if best.is_none_or(|(known, _)| rank > known) {
                best = Some((rank, position));
            }
        }
        best.map(|(_, position)| position)
    }

    /// How well an image for this platform does here; `None` if it does not run. An operating system that is left out is Linux.
    pub(crate) fn rank(&self, os: &str, architecture: &str, variant: &str) -> Option<Rank> {
        let os = if os.is_empty() {
            "linux".to_owned()
        } else {
            os.to_ascii_lowercase()
        };
        let (architecture, implied) = normal(architecture);
        let level = level(
            &architecture,
            Some(variant).filter(|variant| !variant.is_empty()).or(implied),
        )?;
        if os != self.os {
            return None;
        }
        let native = architecture == self.architecture;
        let fits = match (self.architecture.as_str(), architecture.as_str()) {
            _ if native => level <= self.variant,
            ("amd64", "386") => true,
            ("arm64", "arm") => level <= self.variant,
            _ => false,
        };
        fits.then_some(Rank { native, level })
    }
}

/// How well an image does on a machine; the greatest is the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    /// It is for the machine's own architecture.
    native: bool,
    level: u32,
}

/// Annotation of entries that are statements about another entry (BuildKit's attestation storage).
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";

/// Whether an entry of an index is no image: a statement about one, or of no platform that can exist.
pub fn is_statement(entry: &Descriptor) -> bool {
    let says = entry
        .annotations()
        .as_ref()
        .is_some_and(|all| all.contains_key(REFERENCE_TYPE));
    let nowhere = entry.platform().as_ref().is_some_and(|platform| {
        platform.os().to_string() == "unknown" && platform.architecture().to_string() == "unknown"
    });
    (says || nowhere) && !media::is_index(entry.media_type().as_ref())
}

/// Whether an entry says that it is something else than an image (image specification, "artifactType").
pub fn is_artifact(entry: &Descriptor) -> bool {
    entry
        .artifact_type()
        .as_ref()
        .is_some_and(|kind| !matches!(kind.as_ref(), "" | media::OCI_CONFIG | media::DOCKER_CONFIG))
}

/// Whether an entry says for which architecture it is.
pub(crate) fn says_platform(entry: &Descriptor) -> bool {
    entry
        .platform()
        .as_ref()
        .is_some_and(|platform| !platform.architecture().to_string().is_empty())
}

/// Operating systems that images are made for.
const SYSTEMS: [&str; 4] = ["linux", "windows", "darwin", "freebsd"];
/// Architectures that images are made for.
const ARCHITECTURES: [&str; 9] = [
    "386", "amd64", "arm", "arm64", "loong64", "mips64le", "ppc64le", "riscv64", "s390x",
];
/// arm64 without a variant is v8.
const LEVEL_ARM64: u32 = 800;
/// arm without a variant is v7.
const LEVEL_ARM: u32 = 700;

/// Names that people write for Go's architectures, and the variant that some of them imply.
fn normal(architecture: &str) -> (String, Option<&'static str>) {
    let lower = architecture.to_ascii_lowercase();
    let (name, variant) = match lower.as_str() {
        "x86_64" | "x86-64" => ("amd64", None),
        "i386" | "i686" | "x86" => ("386", None),
        "aarch64" => ("arm64", None),
        "armhf" => ("arm", Some("v7")),
        "armel" => ("arm", Some("v6")),
        _ => return (lower, None),
    };
    (name.to_owned(), variant)
}

/// A variant as a number that grows with what it needs; `None` if it cannot be understood.
fn level(architecture: &str, variant: Option<&str>) -> Option<u32> {
    let Some(variant) = variant else {
        return Some(match architecture {
            "amd64" => 100,
            "arm64" => LEVEL_ARM64,
            "arm" => LEVEL_ARM,
            _ => 0,
        });
    };
    let digits = variant.strip_prefix(['v', 'V']).unwrap_or(variant);
    let (major, minor) = digits.split_once('.').unwrap_or((digits, "0"));
    let (major, minor): (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
    (major < 1000 && minor < 100).then_some(major * 100 + minor)
}

/// The x86-64 level (psABI) of this processor.
#[cfg(target_arch = "x86_64")]
fn x86_level() -> u32 {
    use std::arch::is_x86_feature_detected as has;
    let v2 = has!("sse4.2") && has!("ssse3") && has!("popcnt") && has!("cmpxchg16b");
    let v3 = has!("avx2")
        && has!("bmi1")
        && has!("bmi2")
        && has!("f16c")
        && has!("fma")
        && has!("lzcnt")
        && has!("movbe");
    let v4 = has!("avx512f") && has!("avx512bw") && has!("avx512cd") && has!("avx512dq") && has!("avx512vl");
    match (v2, v2 && v3, v2 && v3 && v4) {
        (_, _, true) => 400,
        (_, true, _) => 300,
        (true, _, _) => 200,
        _ => 100,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn x86_level() -> u32 {
    100
}

/// The platforms of an index as errors print them, each once. `found` has those that the configurations of some entries say, by their
/// positions.
pub(crate) fn list(manifests: &[Descriptor], found: &[(usize, String)]) -> String {
    let mut all: Vec<String> = Vec::new();
    for (position, entry) in manifests.iter().enumerate() {
        let by_configuration = found.iter().find(|(known, _)| *known == position);
        let platform = by_configuration.map_or_else(|| show(entry), |(_, text)| text.clone());
        if !all.contains(&platform) {
            all.push(platform);
        }
    }
    match all.as_slice() {
        [] => "nothing: the index is empty".to_owned(),
        all => all.join(", "),
    }
}

/// A platform as errors print it.
fn show(descriptor: &Descriptor) -> String {
    match descriptor.platform() {
        Some(platform) if says_platform(descriptor) => {
            let variant = platform
                .variant()
                .as_deref()
                .map_or(String::new(), |v| format!("/{v}"));
            format!("{}/{}{variant}", platform.os(), platform.architecture())
        }
        _ => "(no platform)".to_owned(),
    }
}

impl std::fmt::Display for Wanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(platforms: &[&str]) -> Vec<Descriptor> {
        let entry = |(number, text): (usize, &&str)| {
            let mut parts = text.split('/');
            let (os, architecture) = (parts.next().unwrap(), parts.next().unwrap());
            let mut json = serde_json::json!({
                "mediaType": peel_image::media::OCI_MANIFEST,
                "digest": format!("sha256:{number:064}"),
                "size": 1,
                "platform": { "os": os, "architecture": architecture },
            });
            if let Some(variant) = parts.next() {
                json["platform"]["variant"] = variant.into();
            }
            serde_json::from_value(json).unwrap()
        };
        platforms.iter().enumerate().map(entry).collect()
    }

    #[test]
    fn choices() {
        let common = [
            "linux/amd64",
            "linux/arm/v6",
            "linux/arm/v7",
            "linux/arm64/v8",
            "unknown/unknown",
        ];
        let levels = [
            "linux/amd64/v3",
            "linux/amd64",
            "linux/amd64/v2",
            "linux/amd64/v4",
        ];
        for (platforms, wanted, expected) in [
            (&common[..], "linux/amd64", Some(0)),
            (&common, "linux/x86_64", Some(0)),
            (&common, "linux/arm64", Some(3)),
            (&common, "linux/aarch64/v8", Some(3)),
            (&common, "linux/arm64/v8.2", Some(3)),
            (&common, "linux/arm", Some(2)),
            (&common, "linux/arm/v7", Some(2)),
            (&common, "linux/arm/v6", Some(1)),
            (&common, "linux/arm/v5", None),
            (&common, "linux/s390x", None),
            (&common, "windows/amd64", None),
            (&levels, "linux/amd64", Some(1)),
            (&levels, "linux/amd64/v1", Some(1)),
            (&levels, "linux/amd64/v2", Some(2)),
            (&levels, "linux/amd64/v3", Some(0)),
            (&levels, "linux/amd64/v9", Some(3)),
            (&["linux/arm64"], "linux/arm64/v8", Some(0)),
            (&common, "arm64", Some(3)),
            (&common, "arm64/v8", Some(3)),
            (&common, "arm/v6", Some(1)),
            (&common, "armel", Some(1)),
            (&["windows/amd64", "linux/s390x"], "s390x", Some(1)),
            (&["linux/riscv64", "linux/riscv64"], "linux/riscv64", Some(0)),
            (&["linux/amd64/strange"], "linux/amd64", None),
            (&["linux/386", "linux/amd64"], "linux/amd64", Some(1)),
            (&["linux/arm64", "linux/386"], "linux/amd64/v3", Some(1)),
            (&["linux/amd64"], "linux/386", None),
            (&["linux/arm/v5", "linux/arm/v7"], "linux/arm64", Some(1)),
            (&["linux/arm/v7", "linux/arm64"], "linux/arm64/v9", Some(1)),
            (&["linux/arm/v9"], "linux/arm64", None),
            (&["/amd64", "linux/arm64"], "linux/amd64", Some(0)),
            (&["linux/", "/"], "linux/amd64", None),
        ] {
            let manifests = index(platforms);
            let chosen = Wanted::parse(wanted).unwrap().choose(&manifests);
            assert_eq!(chosen, expected, "{wanted} of {platforms:?}");
        }
    }

    #[test]
    fn malformed_platforms() {
        for text in [
            "",
            "plan9",
            "linux,windows",
            "linux/",
            "/amd64",
            "a/b/c/d",
            "linux/amd64/x y",
            "linux/amd64/fast",
        ] {
            assert_eq!(Wanted::parse(text), None, "{text}");
        }
    }

    #[test]
    fn this_machine_finds_its_image() {
        let text = format!("linux/{}", Wanted::host().architecture);
        let manifests = index(&["plan9/amd64", &text]);
        assert_eq!(Wanted::host().choose(&manifests), Some(1));
    }

    #[test]
    fn statements_and_artifacts_are_not_images() {
        let mut manifests = index(&["linux/amd64", "linux/amd64", "linux/amd64"]);
        let annotations = [(REFERENCE_TYPE.to_owned(), "attestation-manifest".to_owned())];
        manifests[0].set_annotations(Some(annotations.into()));
        manifests[1].set_artifact_type(Some("application/vnd.example".into()));
        let wanted = Wanted::parse("linux/amd64").unwrap();
        assert_eq!(wanted.choose(&manifests), Some(2));
        assert_eq!(wanted.choose(&manifests[..2]), Some(1), "better than nothing");
        assert_eq!(wanted.choose(&manifests[..1]), None);
        assert!(is_statement(&manifests[0]) && !is_statement(&manifests[1]));
        assert!(is_statement(&index(&["unknown/unknown"])[0]));
    }
}
