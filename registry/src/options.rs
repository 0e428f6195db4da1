//! How registries are reached, and what a transfer has cost. The command fills [`ClientOptions`] from its flags and sends them to
//! the server process.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How long an attempt may be silent. Long enough for a registry that fetches a blob from a cold back end before its first byte.
const DEFAULT_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long broken transfers are tried again: registries restart within seconds, load balancers within a minute.
const DEFAULT_RETRY_FOR: Duration = Duration::from_secs(60);

/// How to reach registries.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ClientOptions {
    /// Speak http to every registry. Loopback addresses are tried with http first, whatever this says.
    pub plain_http: bool,
    /// PEM file with certificates of authorities to trust beside the system's.
    pub tls_ca: Option<PathBuf>,
    /// How long a connection may take to open and a body may stay silent, or take for 32 KiB, before the attempt counts as broken.
    /// What is held in memory as a whole, such as a manifest, may take six times as long.
    pub attempt_timeout: Duration,
    /// How long a broken transfer is tried again before it is an error.
    pub retry_for: Duration,
    /// Credential files to look into, in this order (Docker's config.json, Podman's auth.json).
    pub auth_files: Vec<PathBuf>,
}

impl Default for ClientOptions {
    /// https, the system's authorities, 10 s per attempt, 60 s of retries, no credentials.
    fn default() -> Self {
        Self {
            plain_http: false,
            tls_ca: None,
            attempt_timeout: DEFAULT_ATTEMPT_TIMEOUT,
            retry_for: DEFAULT_RETRY_FOR,
            auth_files: Vec::new(),
        }
    }
}

impl ClientOptions {
    /// The defaults, with the credential files where Podman and Docker keep them: `$REGISTRY_AUTH_FILE`,
    /// `$XDG_RUNTIME_DIR/containers/auth.json`, `~/.config/containers/auth.json`, `$DOCKER_CONFIG/config.json`,
    /// `~/.docker/config.json`. Files that do not exist are no error.
    pub fn from_env() -> Self {
        Self {
            auth_files: auth_files(|name| std::env::var_os(name).filter(|value| !value.is_empty())),
            ..Self::default()
        }
    }
}

fn auth_files(env: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let below = |variable: &str, path: &str| env(variable).map(|dir| PathBuf::from(dir).join(path));
    [
        env("REGISTRY_AUTH_FILE").map(PathBuf::from),
        below("XDG_RUNTIME_DIR", "containers/auth.json"),
        below("HOME", ".config/containers/auth.json"),
        below("DOCKER_CONFIG", "config.json"),
        below("HOME", ".docker/config.json"),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// What a source or target has sent and received so far. Shared by all clones and blobs of it.
#[derive(Debug, Default)]
pub struct Counters {
    requests: AtomicU64,
    bytes: AtomicU64,
    sent: AtomicU64,
    retries: AtomicU64,
}

impl Counters {
    /// HTTP requests, tokens and redirects included. None for local layouts.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Bytes of content received, without HTTP headers; for local layouts the bytes read.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Bytes of content sent.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Attempts that broke and were repeated.
    pub fn retries(&self) -> u64 {
        self.retries.load(Ordering::Relaxed)
    }

    pub(crate) fn add_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_bytes(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn add_sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn add_retry(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credential_files_in_the_order_of_podman_and_docker() {
        let files = auth_files(|name| {
            Some(match name {
                "REGISTRY_AUTH_FILE" => "/r/auth".into(),
                "XDG_RUNTIME_DIR" => "/run/u".into(),
                "HOME" => "/h".into(),
                "DOCKER_CONFIG" => "/d".into(),
                _ => return None,
            })
        });
        let expected = [
            "/r/auth",
            "/run/u/containers/auth.json",
            "/h/.config/containers/auth.json",
            "/d/config.json",
            "/h/.docker/config.json",
        ];
        assert_eq!(files, expected.map(PathBuf::from));
        assert_eq!(auth_files(|_| None), Vec::<PathBuf>::new());
    }
}
