//! Which manifest of an index is for this machine.
//!
//! Platforms are written `os/architecture[/variant]` in Go's words; the first or the rest may be left out. Variants are levels of
//! one architecture: a machine of a level runs images of that level and below, and the highest of these is the best (as
//! containerd chooses).

use oci_spec::image::{Descriptor, Platform};

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

    /// The best of `manifests`; among equals the first.
    pub(crate) fn choose<'a>(&self, manifests: &'a [Descriptor]) -> Option<&'a Descriptor> {
        let mut best: Option<(u32, &Descriptor)> = None;
        for descriptor in manifests {
            if let Some(level) = descriptor
                .platform()
                .as_ref()
                .and_then(|platform| self.accepts(platform))
                && best.is_none_or(|(known, _)| level > known)
            {
                best = Some((level, descriptor));
            }
        }
        best.map(|(_, descriptor)| descriptor)
    }

    /// The level of an image for `platform` if it runs here.
    fn accepts(&self, platform: &Platform) -> Option<u32> {
        let (architecture, implied) = normal(&platform.architecture().to_string());
        let variant = platform
            .variant()
            .as_deref()
            .filter(|variant| !variant.is_empty());
        let level = level(&architecture, variant.or(implied))?;
        (platform.os().to_string() == self.os && architecture == self.architecture && level <= self.variant)
            .then_some(level)
    }
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

/// The platforms of an index as errors print them, each once.
pub(crate) fn list(manifests: &[Descriptor]) -> String {
    let mut all: Vec<String> = Vec::new();
    for platform in manifests.iter().map(show) {
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
        Some(platform) => {
            let variant = platform
                .variant()
                .as_deref()
                .map_or(String::new(), |v| format!("/{v}"));
            format!("{}/{}{variant}", platform.os(), platform.architecture())
        }
        None => "(no platform)".to_owned(),
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
        ] {
            let manifests = index(platforms);
            let chosen = Wanted::parse(wanted).unwrap().choose(&manifests);
            let expected = expected.map(|number: usize| &manifests[number]);
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
        assert_eq!(Wanted::host().choose(&manifests), Some(&manifests[1]));
    }
}
