//! What registries and token servers say outside of documents, for the fuzz target `headers` alone: the parsers themselves are
//! private.

use std::time::{Duration, Instant};

use crate::auth::Challenge;
use crate::auth::token::Token;
use crate::transfer::http::parse_content_range;

/// Reads a value of `WWW-Authenticate`. What a Bearer challenge said, written again as such a header, must be read as the same.
///
/// # Panics
///
/// If it is not.
pub fn challenge(header: &str) {
    let Some(found) = Challenge::best([header].into_iter()) else {
        return;
    };
    let Challenge::Bearer {
        realm,
        service,
        scope,
    } = &found
    else {
        return;
    };
    let quote = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
    let mut again = format!("Bearer realm={}", quote(realm));
    for (name, value) in [("service", service), ("scope", scope)] {
        if let Some(value) = value {
            again = format!("{again},{name}={}", quote(value));
        }
    }
    assert_eq!(
        Challenge::best([again.as_str()].into_iter()),
        Some(found),
        "{again}"
    );
}

/// Reads the answer of a token server.
///
/// # Panics
///
/// If a token that is taken may be logged, or is kept for more than a day.
pub fn token(body: &[u8]) {
    let now = Instant::now();
    if let Ok(token) = Token::parse(body, now) {
        let day = Duration::from_secs(86_400);
        assert!(token.header.is_sensitive(), "a token that would be logged");
        assert!(token.expires <= now + day, "a token without end");
    }
}

/// Reads a value of `Content-Range`: first byte, last byte, and the whole length if it is told.
pub fn content_range(value: &str) -> Option<(u64, u64, Option<u64>)> {
    parse_content_range(value)
}
