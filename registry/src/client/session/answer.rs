//! What answers mean: errors in the registry's own words with advice, bodies within limits, failures of the network. Part of [`Session`].

use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use reqwest::header::RETRY_AFTER;
use reqwest::{Response, StatusCode, Url};

use super::{Call, MAX_SMALL_BODY, Session};
use crate::client::retry::{Again, Fault, Pace, retry_after};
use crate::client::{explain, pause, tls_error};
use crate::error::Error;

/// Times of silence that a whole body in memory may take: a minute by default, in which the largest manifest comes at 70 KB/s.
const BODY_TIMES: u32 = 6;

impl Session {
    /// Lets every answer through but those that ask to try again later.
    pub(super) async fn usable(&self, call: &Call<'_>, response: Response) -> Result<Response, Fault> {
        match response.status().as_u16() {
            408 | 429 | 500 | 502 | 503 | 504 => Err(self.refused(call.what, response).await),
            _ => Ok(response),
        }
    }

    /// Nothing is sent to a host that wants a pause.
    pub(super) fn unpaused(&self, url: &Url, what: &str) -> Result<(), Fault> {
        let host = pause::host(url);
        let Some(pause) = self.client.pauses.running(&host) else {
            return Ok(());
        };
        let error = Error::Paused {
            place: Arc::clone(&self.place),
            what: what.to_owned(),
            host,
            status: pause.status,
            until: pause.until,
        };
        Err(Fault {
            error: Box::new(error),
            again: Again::After(Some(pause.until.saturating_duration_since(Instant::now()))),
        })
    }

    /// A final 401. The credentials are read again next time: the user may log in meanwhile.
    pub(super) async fn denied(&self, call: &Call<'_>, response: Response) -> Fault {
        let fault = self.refused(call.what, response).await;
        self.client
            .forget_credential(&self.place.registry, &self.place.repository);
        fault
    }

    /// The fault for an answer that is no success.
    pub(crate) async fn refused(&self, what: &str, response: Response) -> Fault {
        let status = response.status();
        let wait = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok());
        let wait = wait.and_then(retry_after);
        let until = match status.as_u16() {
            429 => true,
            408 | 502 | 503 | 504 => wait.is_some_and(|wait| !wait.is_zero()),
            _ => false,
        }
        .then(|| {
            self.client
                .pauses
                .begin(&pause::host(response.url()), status.as_u16(), wait)
                .until
        });
        let body = self
            .body(what, response, MAX_SMALL_BODY)
            .await
            .unwrap_or_default();
        let registry = &self.place.registry;
        let hint = match status.as_u16() {
            401 | 403 => format!(
                "; it needs other credentials or does not exist: log in with `podman login {registry}` or `docker login \
                 {registry}`"
            ),
            404 => "; check registry, repository and tag".to_owned(),
            429 => match wait {
                Some(wait) => format!(
                    "; the registry wants {} s of pause: log in or wait",
                    wait.as_secs()
                ),
                None => "; too many requests: log in or wait".to_owned(),
            },
            400 if String::from_utf8_lossy(&body)
                .to_ascii_lowercase()
                .contains("https") =>
            {
                "; the port speaks https: leave --plain-http out".to_owned()
            }
            _ => String::new(),
        };
        let error = Error::Status {
            place: Arc::clone(&self.place),
            what: what.to_owned(),
            status: status.as_u16(),
            detail: detail(status, &body),
            hint,
            retry_at: until,
        };
        // A pause that the host did not name is waited for, too.
        let wait = wait.or_else(|| Some(until?.saturating_duration_since(Instant::now())));
        let again = match status.as_u16() {
            408 | 429 | 502 | 503 | 504 => Again::After(wait),
            500 => Again::Brief,
            _ => Again::Never,
        };
        Fault {
            error: Box::new(error),
            again,
        }
    }

    /// Reads a body of at most `limit` bytes, which may take some times of silence as a whole.
    pub(crate) async fn body(&self, what: &str, mut response: Response, limit: u64) -> Result<Bytes, Fault> {
        let too_large = || {
            Fault::fatal(Error::TooLarge {
                place: self.place.to_string(),
                what: what.to_owned(),
                limit,
            })
        };
        if response.content_length().is_some_and(|length| length > limit) {
            return Err(too_large());
        }
        let whole = self.client.options.attempt_timeout.saturating_mul(BODY_TIMES);
        let read = async {
            let mut pace = self.pace();
            let mut body = BytesMut::new();
            while let Some(part) = self.part(what, &mut response, &mut pace).await? {
                if (body.len() + part.len()) as u64 > limit {
                    return Err(too_large());
                }
                body.extend_from_slice(&part);
            }
            Ok::<_, Fault>(body.freeze())
        };
        tokio::time::timeout(whole, read).await.unwrap_or_else(|_| {
            let reason = format!("no end of the body for {} s", whole.as_secs_f32());
            Err(Fault::transient(self.network(what, reason, String::new())))
        })
    }

    /// The patience with one body.
    pub(crate) fn pace(&self) -> Pace {
        Pace::new(self.client.options.attempt_timeout)
    }

    /// The next bytes of a body, which came at `pace` so far.
    pub(crate) async fn part(
        &self,
        what: &str,
        response: &mut Response,
        pace: &mut Pace,
    ) -> Result<Option<Bytes>, Fault> {
        let asked = Instant::now();
        match tokio::time::timeout(pace.left(), response.chunk()).await {
            Ok(Ok(part)) => {
                let bytes = part.as_ref().map_or(0, Bytes::len);
                self.counters.add_bytes(bytes);
                pace.part(bytes, asked.elapsed());
                Ok(part)
            }
            Ok(Err(error)) => Err(self.broken(what, error)),
            Err(_) if pace.bytes() == 0 => Err(self.silent(what)),
            Err(_) => {
                let timeout = self.client.options.attempt_timeout.as_secs_f32();
                let reason = format!("only {} bytes in {timeout} s", pace.bytes());
                Err(Fault::transient(self.network(what, reason, String::new())))
            }
        }
    }

    /// Reads and drops a small body so that its connection can be used again.
    pub(crate) async fn drain(&self, response: Response) {
        if let Err(fault) = self.body("rest of an answer", response, MAX_SMALL_BODY).await {
            tracing::debug!(error = %fault.error, "connection not kept");
        }
    }

    pub(super) fn silent(&self, what: &str) -> Fault {
        let reason = format!(
            "no answer for {} s",
            self.client.options.attempt_timeout.as_secs_f32()
        );
        Fault::transient(self.network(what, reason, String::new()))
    }

    fn network(&self, what: &str, reason: String, hint: String) -> Error {
        Error::Network {
            place: Arc::clone(&self.place),
            what: what.to_owned(),
            reason,
            hint,
        }
    }

    pub(super) fn broken(&self, what: &str, error: reqwest::Error) -> Fault {
        let connect = error.is_connect();
        // URLs of redirect targets carry signatures.
        let error = error.without_url();
        let reason = explain(&error);
        let (hint, again) = match tls_error(&error) {
            Some(tls) if is_plain_peer(tls) => (
                "; the port does not speak TLS: if it is meant to be plain http, use --plain-http",
                Again::Never,
            ),
            Some(rustls::Error::InvalidCertificate(fault)) => (certificate_hint(fault), Again::Never),
            _ if connect && !self.host.answered() => (
                "; check the registry's name and port, and that it is running",
                Again::FirstContact,
            ),
            _ => ("", Again::After(None)),
        };
        Fault {
            error: Box::new(self.network(what, reason, hint.to_owned())),
            again,
        }
    }
}

/// What to do about a certificate that is not taken.
fn certificate_hint(fault: &rustls::CertificateError) -> &'static str {
    // webpki's words for what `openssl req -x509` makes when nothing else is asked for. Other clients take it.
    if format!("{fault:?}").contains("CaUsedAsEndEntity") {
        "; the registry's certificate is marked as that of an authority: make it anew with \
         -addext basicConstraints=critical,CA:FALSE and name it with --tls-ca"
    } else {
        "; if the registry has a certificate of its own authority, name the authority's file with --tls-ca"
    }
}

/// Whether a TLS handshake failed because the other side speaks no TLS at all.
pub(super) fn is_plain_peer(error: &rustls::Error) -> bool {
    matches!(
        error,
        rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType)
    )
}

/// The registry's own words: `{"errors":[{"code":..,"message":..}]}` (OCI distribution specification, "Error Codes").
fn detail(status: StatusCode, body: &[u8]) -> String {
    let reason = status
        .canonical_reason()
        .map(|reason| format!(" {reason}"))
        .unwrap_or_default();
    let json: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let first = json.get("errors").and_then(|errors| errors.get(0));
    let text = |key: &str| {
        first
            .and_then(|error| error.get(key))
            .and_then(|value| value.as_str())
    };
    let clean = |text: &str| {
        text.chars()
            .filter(|c| !c.is_control())
            .take(300)
            .collect::<String>()
    };
    match (text("code"), text("message")) {
        (Some(code), Some(message)) => format!("{reason} ({}: {})", clean(code), clean(message)),
        (Some(text), None) | (None, Some(text)) => format!("{reason} ({})", clean(text)),
        (None, None) => reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_about_certificates() {
        // What webpki's error is called.
        #[derive(Debug)]
        struct CaUsedAsEndEntity;
        impl std::fmt::Display for CaUsedAsEndEntity {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("CaUsedAsEndEntity")
            }
        }
        impl std::error::Error for CaUsedAsEndEntity {}
        let marked =
            rustls::CertificateError::Other(rustls::OtherError(std::sync::Arc::new(CaUsedAsEndEntity)));
        assert!(certificate_hint(&marked).contains("CA:FALSE"));
        let unknown = certificate_hint(&rustls::CertificateError::UnknownIssuer);
        assert!(unknown.contains("--tls-ca") && !unknown.contains("CA:FALSE"));
    }

    #[test]
    fn the_registrys_own_words() {
        for (body, expected) in [
            ("", " Not Found"),
            ("<html>", " Not Found"),
            (
                r#"{"errors":[{"code":"NAME_UNKNOWN","message":"no\nsuch"}]}"#,
                " Not Found (NAME_UNKNOWN: nosuch)",
            ),
            (r#"{"errors":[{"code":"DENIED"}]}"#, " Not Found (DENIED)"),
            (r#"{"errors":[]}"#, " Not Found"),
        ] {
            assert_eq!(detail(StatusCode::NOT_FOUND, body.as_bytes()), expected);
        }
    }
}
