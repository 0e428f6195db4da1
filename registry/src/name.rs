//! Names of images: what users type and what errors print.
//!
//! Grammar of the registry form: `reference` of the distribution project (Docker's), with Docker's rule for short names: the
//! part before the first slash is a host only if it has a dot, a colon or an upper-case letter, or is `localhost`.
//! `Display` writes the full name, and parsing that gives the same value again.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use peel_image::Digest;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::Error;

/// Longest repository, in bytes (distribution `reference`: `NameTotalLengthMax`).
const MAX_REPOSITORY: usize = 255;
/// Longest tag, in bytes (OCI distribution specification, "Pulling manifests").
const MAX_TAG: usize = 128;

/// Name of an image: where it is kept and which one. Parses from and prints as the user writes it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ImageName {
    /// `[docker://]registry/repository[:tag][@digest]`; short names go to docker.io as Docker does.
    Registry(Reference),
    /// `oci:DIR[:tag]`
    Layout {
        /// Directory of the layout.
        dir: PathBuf,
        /// `org.opencontainers.image.ref.name` in its index; `None` when there is only one manifest.
        tag: Option<String>,
    },
    /// `oci-archive:FILE[:tag]`
    OciArchive {
        /// The tar file.
        file: PathBuf,
        /// As in a layout.
        tag: Option<String>,
    },
    /// `docker-archive:FILE[:name:tag]`
    DockerArchive {
        /// The tar file.
        file: PathBuf,
        /// Name and tag in its manifest.json.
        tag: Option<String>,
    },
}

/// An image in a registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    /// Host and port as written, `docker.io` for short names.
    pub registry: String,
    /// Repository, with `library/` for official Docker images.
    pub repository: String,
    /// Tag; `latest` when neither tag nor digest is given.
    pub tag: Option<String>,
    /// Manifest digest.
    pub digest: Option<Digest>,
}

impl ImageName {
    /// The same name with its path, if it has one, made absolute against `directory`. For names that go to another process.
    pub fn absolute(self, directory: &Path) -> Self {
        match self {
            Self::Registry(_) => self,
            Self::Layout { dir, tag } => Self::Layout {
                dir: directory.join(dir),
                tag,
            },
            Self::OciArchive { file, tag } => Self::OciArchive {
                file: directory.join(file),
                tag,
            },
            Self::DockerArchive { file, tag } => Self::DockerArchive {
                file: directory.join(file),
                tag,
            },
        }
    }
}

impl FromStr for ImageName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if let Some(rest) = text.strip_prefix("oci:") {
            let (dir, tag) = split_path(text, rest, "oci:DIR[:tag]")?;
            return Ok(Self::Layout { dir, tag });
        }
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            let (file, tag) = split_path(text, rest, "oci-archive:FILE[:tag]")?;
            return Ok(Self::OciArchive { file, tag });
        }
        if let Some(rest) = text.strip_prefix("docker-archive:") {
            let (file, tag) = split_path(text, rest, "docker-archive:FILE[:name:tag]")?;
            if let Some(tag) = &tag {
                tag.parse::<Reference>()?;
            }
            return Ok(Self::DockerArchive { file, tag });
        }
        text.strip_prefix("docker://")
            .unwrap_or(text)
            .parse()
            .map(Self::Registry)
    }
}

/// As skopeo does: everything after the first colon is the tag, which may itself hold colons and slashes.
fn split_path(name: &str, rest: &str, form: &str) -> Result<(PathBuf, Option<String>), Error> {
    let (path, tag) = match rest.split_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (rest, None),
    };
    if path.is_empty() {
        return Err(bad(name, format!("the path is missing; write {form}")));
    }
    if path.contains('\0') || tag.is_some_and(|tag| tag.contains(char::is_control)) {
        return Err(bad(name, "control characters are not allowed".into()));
    }
    match tag {
        Some("") => Err(bad(
            name,
            format!("the tag after the colon is empty; write {form}"),
        )),
        tag => Ok((PathBuf::from(path), tag.map(str::to_owned))),
    }
}

fn bad(name: &str, reason: String) -> Error {
    Error::Name {
        name: name.chars().take(300).collect(),
        reason,
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let fail = |reason: &str| bad(text, reason.to_owned());
        if text.is_empty() {
            return Err(fail("it is empty"));
        }
        if let Some((scheme, _)) = text.split_once("://") {
            return Err(fail(&format!(
                "{scheme:?} is no known transport; use docker://, oci:, oci-archive: or docker-archive:"
            )));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                let digest = digest.parse().map_err(|error| fail(&format!("{error}")))?;
                (rest, Some(digest))
            }
            None => (text, None),
        };
        // A colon after the last slash starts the tag; one before it belongs to the host's port.
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if let Some(tag) = tag
            && !is_tag(tag)
        {
            return Err(fail(
                "a tag has 1 to 128 letters, digits, dots, dashes or underscores and starts with none of . and -",
            ));
        }
        let (host, path) = match name.split_once('/') {
            Some((host, path)) if is_host_like(host) => (host, path),
            _ => ("docker.io", name),
        };
        let registry = if host == "index.docker.io" {
            "docker.io"
        } else {
            host
        };
        if !is_host(registry) {
            return Err(fail(&format!("{registry:?} is no host[:port]")));
        }
        if path.is_empty() {
            return Err(fail("the repository is missing"));
        }
        if path.chars().any(|c| c.is_ascii_uppercase()) {
            return Err(fail("the repository must be in lower case"));
        }
        if !path.split('/').all(is_component) {
            return Err(fail(
                "each part of a repository is lower-case letters and digits, joined by one dot, one or two \
                 underscores, or dashes",
            ));
        }
        let repository = if registry == "docker.io" && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        if repository.len() > MAX_REPOSITORY {
            return Err(fail("the repository is longer than 255 bytes"));
        }
        let tag = match (tag, digest) {
            (None, None) => Some("latest".to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(Self {
            registry: registry.to_owned(),
            repository,
            tag,
            digest,
        })
    }
}

fn is_host_like(part: &str) -> bool {
    part.contains(['.', ':']) || part == "localhost" || part.chars().any(|c| c.is_ascii_uppercase())
}

fn is_host(host: &str) -> bool {
    let (name, port) = if let Some(rest) = host.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else {
            return false;
        };
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return false;
        }
        match port {
            "" => (None, None),
            port => match port.strip_prefix(':') {
                Some(port) => (None, Some(port)),
                None => return false,
            },
        }
    } else {
        match host.split_once(':') {
            Some((name, port)) => (Some(name), Some(port)),
            None => (Some(host), None),
        }
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    name.is_none_or(|name| name.split('.').all(label))
        && port.is_none_or(|port| port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok())
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= MAX_TAG
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(part: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let edge = |byte: Option<u8>| byte.is_some_and(alphanumeric);
    edge(part.bytes().next())
        && edge(part.bytes().last())
        && part
            .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            .all(|separator| {
                matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|b| b == b'-')
            })
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (prefix, path, tag) = match self {
            Self::Registry(reference) => return reference.fmt(f),
            Self::Layout { dir, tag } => ("oci", dir, tag),
            Self::OciArchive { file, tag } => ("oci-archive", file, tag),
            Self::DockerArchive { file, tag } => ("docker-archive", file, tag),
        };
        write!(f, "{prefix}:{}", path.display())?;
        match tag {
            Some(tag) => write!(f, ":{tag}"),
            None => Ok(()),
        }
    }
}

impl Serialize for ImageName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ImageName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_as_docker_reads_them() {
        let digest = format!("sha256:{HEX}");
        let pinned = format!("docker.io/library/debian@{digest}");
        let both = format!("quay.io/a/b:v1@{digest}");
        for (text, printed) in [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:12", "docker.io/library/debian:12"),
            ("docker://debian:12", "docker.io/library/debian:12"),
            ("index.docker.io/debian", "docker.io/library/debian:latest"),
            ("user/image", "docker.io/user/image:latest"),
            ("localhost/image", "localhost/image:latest"),
            (
                "localhost:5000/a/b__c/d--e.f",
                "localhost:5000/a/b__c/d--e.f:latest",
            ),
            ("127.0.0.1:5000/image:tag", "127.0.0.1:5000/image:tag"),
            ("[::1]:5000/image", "[::1]:5000/image:latest"),
            ("Host/image", "Host/image:latest"),
            ("ghcr.io/a/b/c:V1.2-x_y", "ghcr.io/a/b/c:V1.2-x_y"),
            (&format!("debian@{digest}"), &pinned),
            (&both, &both),
            ("oci:dir", "oci:dir"),
            ("oci:/a/dir:tag", "oci:/a/dir:tag"),
            ("oci:dir:docker.io/library/x:1", "oci:dir:docker.io/library/x:1"),
            ("oci-archive:a.tar:tag", "oci-archive:a.tar:tag"),
            ("docker-archive:a.tar", "docker-archive:a.tar"),
            (
                "docker-archive:a.tar:busybox:1.36",
                "docker-archive:a.tar:busybox:1.36",
            ),
        ] {
            let name: ImageName = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(name.to_string(), printed, "{text}");
        }
    }

    #[test]
    fn malformed_names_say_why() {
        for (text, reason) in [
            ("", "empty"),
            ("Debian", "lower case"),
            ("a/B", "lower case"),
            ("debian:", "a tag has"),
            ("debian:-x", "a tag has"),
            ("a//b", "each part"),
            ("a/_b", "each part"),
            ("a___b", "each part"),
            ("a..b/c", "no host"),
            ("a.b/../c", "each part"),
            ("host:99999/x", "no host"),
            ("[::1/x", "no host"),
            ("localhost:5000/", "repository is missing"),
            ("debian@sha256:12", "64 lower-case"),
            ("debian@sha512:12", "only sha256"),
            ("http://host/x", "no known transport"),
            ("oci:", "path is missing"),
            ("oci:dir:", "tag after the colon is empty"),
            ("oci-archive:", "path is missing"),
            ("docker-archive:f:UPPER", "lower case"),
        ] {
            let error = text.parse::<ImageName>().expect_err(text).to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
        let long = format!("a.b/{}", "x/".repeat(200) + "y");
        assert!(long.parse::<ImageName>().is_err());
    }

    proptest! {
        #[test]
        fn any_text_parses_to_a_name_that_prints_as_itself(text in "\\PC{0,40}") {
            if let Ok(name) = text.parse::<ImageName>() {
                prop_assert_eq!(name.to_string().parse::<ImageName>().unwrap(), name);
            }
        }

        #[test]
        fn well_formed_names_round_trip(
            host in "(docker\\.io|[a-z]{1,5}\\.[a-z]{2,3}(:[1-9][0-9]{0,3})?|localhost)",
            path in "[a-z0-9]{1,5}((\\.|_|__|-{1,3})[a-z0-9]{1,3}){0,2}(/[a-z0-9]{1,4}){0,3}",
            tag in proptest::option::of("[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}"),
            digest in proptest::option::of(any::<[u8; 32]>()),
        ) {
            let mut text = format!("{host}/{path}");
            if let Some(tag) = &tag {
                text.push_str(&format!(":{tag}"));
            }
            if let Some(digest) = digest {
                text.push_str(&format!("@{}", Digest::from_bytes(digest)));
            }
            let name: ImageName = text.parse().unwrap();
            prop_assert_eq!(name.to_string().parse::<ImageName>().unwrap(), name.clone());
            let ImageName::Registry(reference) = name else { panic!("{text} is no registry name") };
            prop_assert_eq!(reference.registry, host);
            prop_assert_eq!(reference.digest, digest.map(Digest::from_bytes));
            let expected = tag.or_else(|| digest.is_none().then(|| "latest".to_owned()));
            prop_assert_eq!(reference.tag, expected);
        }
    }
}
