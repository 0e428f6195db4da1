//! User names and passwords from Docker's `config.json` and Podman's `auth.json`, credential helpers included.
//!
//! The files are read and helpers run on a thread of their own with a deadline: a helper may wait for a key ring that never
//! opens. Podman also keeps credentials per repository (`quay.io/team`); the longest match wins (containers-auth.json(5)).

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use docker_credential::{CredentialRetrievalError, DockerCredential};

use crate::error::Error;

/// Longest wait for a credential helper. Helpers that ask a cloud's metadata service take some seconds.
const HELPER_DEADLINE: Duration = Duration::from_secs(30);
/// A credential file larger than this is none.
const MAX_FILE: u64 = 4 << 20;
/// What Docker calls docker.io in its files.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// A secret for one registry.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credential {
    Password {
        user: String,
        password: String,
    },
    /// An OAuth2 refresh token, good only at the token server.
    IdentityToken(String),
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Password(..)",
            Self::IdentityToken(_) => "IdentityToken(..)",
        })
    }
}

/// The credential for `repository` of `registry` from the first of `files` that has one.
pub(crate) async fn find(
    files: Vec<PathBuf>,
    registry: &str,
    repository: &str,
) -> Result<Option<Credential>, Error> {
    if files.is_empty() {
        return Ok(None);
    }
    let fail = |reason: String| Error::Credentials {
        registry: registry.to_owned(),
        reason,
    };
    let (send, receive) = tokio::sync::oneshot::channel();
    let (host, path) = (registry.to_owned(), repository.to_owned());
    std::thread::Builder::new()
        .name("credentials".into())
        .spawn(move || {
            // The receiver is gone when the deadline has passed: nobody is left to tell.
            let _ = send.send(search(&files, &host, &path));
        })
        .map_err(|error| fail(format!("no thread to look them up: {error}")))?;
    match tokio::time::timeout(HELPER_DEADLINE, receive).await {
        Ok(Ok(found)) => found.map_err(fail),
        Ok(Err(_)) => Err(fail("the look-up ended without a result".into())),
        Err(_) => Err(fail(format!(
            "the credential helper has not answered for {} s; check credsStore and credHelpers in Docker's config.json",
            HELPER_DEADLINE.as_secs()
        ))),
    }
}

fn search(files: &[PathBuf], registry: &str, repository: &str) -> Result<Option<Credential>, String> {
    let keys = keys(registry, repository);
    for file in files {
        if let Some(found) = search_file(file, registry, &keys)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// The names under which credentials may stand, best first: `host/a/b`, `host/a`, then the host itself.
fn keys(registry: &str, repository: &str) -> Vec<String> {
    let mut keys = Vec::new();
    let mut path = repository;
    loop {
        keys.push(format!("{registry}/{path}"));
        match path.rsplit_once('/') {
            Some((parent, _)) => path = parent,
            None => break,
        }
    }
    if registry == "docker.io" {
        keys.push(DOCKER_HUB_KEY.to_owned());
    }
    keys.push(registry.to_owned());
    keys
}

fn search_file(file: &Path, registry: &str, keys: &[String]) -> Result<Option<Credential>, String> {
    let text = match read_limited(file) {
        Ok(text) => text,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(format!("{}: {error}", file.display())),
    };
    if text.trim_ascii().is_empty() {
        return Ok(None);
    }
    let config: serde_json::Value =
        serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", file.display()))?;
    let listed = |table: &str, key: &str| config.get(table).is_some_and(|table| table.get(key).is_some());
    for key in keys {
        // Helpers know hosts only; a key with a path counts where the file itself lists it.
        let host_key = key == registry || key == DOCKER_HUB_KEY;
        if !host_key && !listed("auths", key) && !listed("credHelpers", key) {
            continue;
        }
        match docker_credential::get_credential_from_reader(text.as_slice(), key) {
            Ok(DockerCredential::UsernamePassword(user, _)) if user.is_empty() => {}
            Ok(DockerCredential::UsernamePassword(user, password)) => {
                return Ok(Some(Credential::Password { user, password }));
            }
            Ok(DockerCredential::IdentityToken(token)) => return Ok(Some(Credential::IdentityToken(token))),
            Err(CredentialRetrievalError::NoCredentialConfigured) => {}
            // The helpers' protocol for "there is none" (docker-credential-helpers, errCredentialsNotFoundMessage).
            Err(CredentialRetrievalError::HelperFailure { stdout, stderr, .. })
                if stdout.contains("credentials not found") || stderr.contains("credentials not found") => {}
            // A helper's output may hold secrets: only its name is told.
            Err(CredentialRetrievalError::HelperFailure { helper, .. }) => {
                return Err(format!("{}: {helper} failed for {key}", file.display()));
            }
            Err(error) => return Err(format!("{}: {key}: {error}", file.display())),
        }
    }
    Ok(None)
}

fn read_limited(file: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut text = Vec::new();
    std::fs::File::open(file)?.take(MAX_FILE).read_to_end(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use base64::Engine;

    use super::*;

    fn auth(user: &str, password: &str) -> serde_json::Value {
        let text = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        serde_json::json!({ "auth": text })
    }

    fn password(user: &str) -> Option<Credential> {
        Some(Credential::Password {
            user: user.into(),
            password: "secret".into(),
        })
    }

    #[test]
    fn longest_key_wins_and_files_are_tried_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("auth.json"), dir.path().join("config.json"));
        let missing = dir.path().join("missing.json");
        let podman = serde_json::json!({ "auths": {
            "quay.io": auth("host", "secret"),
            "quay.io/team": auth("team", "secret"),
            "quay.io/team/app": auth("app", "secret"),
        }});
        let docker = serde_json::json!({ "auths": {
            "https://index.docker.io/v1/": auth("hub", "secret"),
            "quay.io": auth("unused", "secret"),
            "localhost:5000": { "identitytoken": "token" },
            "empty.io": {},
        }});
        std::fs::write(&first, podman.to_string()).unwrap();
        std::fs::write(&second, docker.to_string()).unwrap();
        let files = [missing, first, second];
        let token = Some(Credential::IdentityToken("token".into()));
        for (registry, repository, expected) in [
            ("quay.io", "team/app", password("app")),
            ("quay.io", "team/app/sub", password("app")),
            ("quay.io", "team/other", password("team")),
            ("quay.io", "teams/app", password("host")),
            ("docker.io", "library/debian", password("hub")),
            ("localhost:5000", "a", token),
            ("empty.io", "a", None),
            ("unknown.io", "a", None),
        ] {
            assert_eq!(
                search(&files, registry, repository),
                Ok(expected),
                "{registry}/{repository}"
            );
        }
    }

    #[test]
    fn a_damaged_file_is_named_and_its_content_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("auth.json");
        std::fs::write(&file, r#"{"auths": {"a.io": {"auth": "!!!secret"}}}"#).unwrap();
        let error = search(&[file], "a.io", "x").unwrap_err();
        assert!(
            error.contains("auth.json") && !error.contains("secret"),
            "{error}"
        );
    }

    #[test]
    fn a_secret_is_never_printed() {
        let credential = Credential::Password {
            user: "u".into(),
            password: "hunter2".into(),
        };
        assert!(!format!("{credential:?}").contains("hunter2"));
    }
}
