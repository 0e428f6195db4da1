//! The HTTP side that all sources and targets with the same options share: connections, tokens, credentials, and what is known
//! about each registry host. [`session::Session`] sends requests for one repository through it.
//!
//! # http or https
//!
//! `plain_http` means http, everywhere. Without it every host gets https, except loopback addresses, where the port is asked: the
//! first request goes out over http, without credentials. If the answer is none of HTTP, or a 400 (what nginx and Go say to
//! plain text on a TLS port), https is tried, and whatever answered is remembered. So a plain registry on loopback costs no extra
//! round trip, and one with TLS costs one.

pub(crate) mod pause;
pub(crate) mod retry;
pub(crate) mod session;

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use reqwest::Url;
use tokio::sync::OnceCell;

use crate::auth::Challenge;
use crate::auth::credentials::{self, Credential};
use crate::auth::token::TokenCache;
use crate::error::Error;
use crate::options::ClientOptions;
use pause::Pauses;

/// Idle connections kept per host: as many as range requests run at once.
const IDLE_CONNECTIONS: usize = 32;
/// How long an idle connection is kept. Load balancers close theirs after 60 s or later.
const IDLE_TIMEOUT: Duration = Duration::from_secs(50);
/// HTTP/2 windows, in bytes: several times the 1.25 MB that a link of 500 Mbit/s and 20 ms has in flight.
const H2_STREAM_WINDOW: u32 = 8 << 20;
const H2_CONNECTION_WINDOW: u32 = 32 << 20;
/// Clients kept for later: one per set of options in use.
const MAX_CLIENTS: usize = 16;

/// Connections and knowledge shared by everything with the same options.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) options: ClientOptions,
    pub(crate) tokens: TokenCache,
    pub(crate) pauses: Pauses,
    http: [OnceLock<reqwest::Client>; 4],
    hosts: Mutex<HashMap<String, Arc<Host>>>,
    credentials: Mutex<HashMap<String, Arc<OnceCell<Option<Credential>>>>>,
}

type Shared = Vec<((ClientOptions, tokio::runtime::Id), Arc<Client>)>;

impl Client {
    /// The client for `options` in this runtime; connections belong to the runtime that opened them.
    pub(crate) fn shared(options: &ClientOptions) -> Arc<Self> {
        static CLIENTS: Mutex<Shared> = Mutex::new(Vec::new());
        let key = (options.clone(), tokio::runtime::Handle::current().id());
        let mut clients = CLIENTS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, client)) = clients.iter().find(|(known, _)| *known == key) {
            return Arc::clone(client);
        }
        if clients.len() >= MAX_CLIENTS {
            clients.remove(0);
        }
        let client = Arc::new(Self {
            options: options.clone(),
            tokens: TokenCache::default(),
            pauses: Pauses::default(),
            http: Default::default(),
            hosts: Mutex::default(),
            credentials: Mutex::default(),
        });
        clients.push((key, Arc::clone(&client)));
        client
    }

    /// The HTTP client for `url`. Loopback hosts never go through a proxy, and plain http needs no certificates: reading the
    /// system's takes several milliseconds and fails on machines that have none.
    pub(crate) fn http(&self, url: &Url) -> Result<&reqwest::Client, Error> {
        let tls = url.scheme() == "https";
        let loopback = url.host_str().is_some_and(is_loopback);
        let [plain, plain_local, secure, secure_local] = &self.http;
        let slot = match (tls, loopback) {
            (false, false) => plain,
            (false, true) => plain_local,
            (true, false) => secure,
            (true, true) => secure_local,
        };
        if let Some(client) = slot.get() {
            return Ok(client);
        }
        let client = build(&self.options, tls, loopback)?;
        Ok(slot.get_or_init(|| client))
    }

    /// What is known about the registry `name` (as the user writes it).
    pub(crate) fn host(&self, name: &str) -> Arc<Host> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Host::new(name, self.options.plain_http));
        Arc::clone(hosts.entry(name.to_owned()).or_insert_with(new))
    }

    /// The credential for a repository, looked up once.
    pub(crate) async fn credential(
        &self,
        registry: &str,
        repository: &str,
    ) -> Result<Option<Credential>, Error> {
        let cell = {
            let mut cells = self.credentials.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(cells.entry(format!("{registry}/{repository}")).or_default())
        };
        let find = || credentials::find(self.options.auth_files.clone(), registry, repository);
        cell.get_or_try_init(find).await.cloned()
    }

    /// Makes the next look-up read the files again: the user may have logged in since.
    pub(crate) fn forget_credential(&self, registry: &str, repository: &str) {
        let mut cells = self.credentials.lock().unwrap_or_else(PoisonError::into_inner);
        cells.remove(&format!("{registry}/{repository}"));
    }
}

fn build(options: &ClientOptions, tls: bool, loopback: bool) -> Result<reqwest::Client, Error> {
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("peel/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .connect_timeout(options.attempt_timeout)
        .pool_max_idle_per_host(IDLE_CONNECTIONS)
        .pool_idle_timeout(IDLE_TIMEOUT)
        .tcp_nodelay(true)
        .tcp_keepalive(Duration::from_secs(30))
        .http2_initial_stream_window_size(H2_STREAM_WINDOW)
        .http2_initial_connection_window_size(H2_CONNECTION_WINDOW);
    if loopback {
        builder = builder.no_proxy();
    }
    if !tls {
        builder = builder.tls_certs_only([]);
    } else if let Some(file) = &options.tls_ca {
        builder = builder.tls_certs_merge(authorities(file)?);
    }
    builder.build().map_err(|error| {
        let text = explain(&error);
        let hint = if text.contains("No CA certificates") {
            "; install the package ca-certificates or name a file with --tls-ca"
        } else {
            ""
        };
        Error::Setup(format!("{text}{hint}"))
    })
}

fn authorities(file: &Path) -> Result<Vec<reqwest::Certificate>, Error> {
    let fail = |reason: String| Error::Setup(format!("--tls-ca {}: {reason}", file.display()));
    let pem = std::fs::read(file).map_err(|error| fail(error.to_string()))?;
    let certificates = reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| fail(explain(&error)))?;
    if certificates.is_empty() {
        return Err(fail("no certificate in PEM form in it".into()));
    }
    Ok(certificates)
}

/// An error with its causes; reqwest's own text is only the outermost.
pub(crate) fn explain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let part = error.to_string();
        if !text.contains(&part) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&part);
        }
        next = error.source();
    }
    text
}

/// The rustls error among an error's causes.
pub(crate) fn tls_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(tls) = error.downcast_ref() {
            return Some(tls);
        }
        // `io::Error::source` skips the error that it wraps.
        let wrapped = error
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::get_ref);
        next = match wrapped {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// 127.0.0.0/8, `::1`, `localhost` and names below it (RFC 6761), with or without port.
pub(crate) fn is_loopback(host: &str) -> bool {
    let bare = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None if host.matches(':').count() == 1 => host.split(':').next().unwrap_or_default(),
        None => host,
    };
    let name = bare.trim_end_matches('.');
    name.eq_ignore_ascii_case("localhost")
        || name.to_ascii_lowercase().ends_with(".localhost")
        || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Which protocol a registry speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Scheme {
    Unknown = 0,
    Http = 1,
    Https = 2,
}

/// What has been learnt about one registry.
#[derive(Debug)]
pub(crate) struct Host {
    /// `registry-1.docker.io` for docker.io.
    authority: String,
    scheme: AtomicU8,
    answered: AtomicBool,
    challenge: Mutex<Option<Challenge>>,
}

impl Host {
    fn new(name: &str, plain_http: bool) -> Self {
        let authority = if name == "docker.io" {
            "registry-1.docker.io"
        } else {
            name
        };
        let scheme = match (plain_http, is_loopback(name)) {
            (true, _) => Scheme::Http,
            (false, true) => Scheme::Unknown,
            (false, false) => Scheme::Https,
        };
        Self {
            authority: authority.to_owned(),
            scheme: AtomicU8::new(scheme as u8),
            answered: AtomicBool::new(false),
            challenge: Mutex::new(None),
        }
    }

    pub(crate) fn scheme(&self) -> Scheme {
        match self.scheme.load(Ordering::Relaxed) {
            1 => Scheme::Http,
            2 => Scheme::Https,
            _ => Scheme::Unknown,
        }
    }

    pub(crate) fn set_scheme(&self, scheme: Scheme) {
        self.scheme.store(scheme as u8, Ordering::Relaxed);
    }

    /// Whether the host has ever sent an HTTP answer. One that never did gets few retries: its name is probably wrong.
    pub(crate) fn answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    pub(crate) fn set_answered(&self) {
        self.answered.store(true, Ordering::Relaxed);
    }

    pub(crate) fn challenge(&self) -> Option<Challenge> {
        self.challenge
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn set_challenge(&self, challenge: Challenge) {
        *self.challenge.lock().unwrap_or_else(PoisonError::into_inner) = Some(challenge);
    }

    /// `path` (from the root) at this host.
    pub(crate) fn url(&self, https: bool, path: &str) -> Result<Url, String> {
        let scheme = if https { "https" } else { "http" };
        format!("{scheme}://{}{path}", self.authority)
            .parse()
            .map_err(|error| format!("{scheme}://{}{path}: {error}", self.authority))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_hosts() {
        for (host, expected) in [
            ("localhost", true),
            ("localhost:5000", true),
            ("LOCALHOST", true),
            ("a.localhost:1", true),
            ("127.0.0.1", true),
            ("127.8.9.1:5000", true),
            ("::1", true),
            ("[::1]", true),
            ("[::1]:5000", true),
            ("128.0.0.1", false),
            ("127.0.0.1.example.com", false),
            ("localhost.example.com", false),
            ("10.0.0.1:5000", false),
            ("[::2]:5000", false),
            ("", false),
        ] {
            assert_eq!(is_loopback(host), expected, "{host}");
        }
    }

    #[test]
    fn hosts_and_their_schemes() {
        assert_eq!(Host::new("localhost:5000", false).scheme(), Scheme::Unknown);
        assert_eq!(Host::new("localhost:5000", true).scheme(), Scheme::Http);
        assert_eq!(Host::new("quay.io", false).scheme(), Scheme::Https);
        let hub = Host::new("docker.io", false).url(true, "/v2/").unwrap();
        assert_eq!(hub.as_str(), "https://registry-1.docker.io/v2/");
    }

    #[tokio::test]
    async fn one_client_per_options() {
        let options = ClientOptions::default();
        let other = ClientOptions {
            plain_http: true,
            ..ClientOptions::default()
        };
        assert!(Arc::ptr_eq(&Client::shared(&options), &Client::shared(&options)));
        assert!(!Arc::ptr_eq(&Client::shared(&options), &Client::shared(&other)));
    }

    #[test]
    fn a_bad_certificate_file_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for path in [file.path(), Path::new("/nonexistent/ca.pem")] {
            let error = authorities(path).unwrap_err().to_string();
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
    }
}
