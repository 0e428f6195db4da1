//! Bearer tokens (Docker registry token authentication; OAuth2 form of it): requests to a token server, and the cache that keeps
//! what they gave, by (realm, service, scopes).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use reqwest::{Method, Url};
use serde::Deserialize;
use tokio::sync::OnceCell;

use super::credentials::Credential;

/// Lifetime of a token that names none ("expires_in", Docker token specification: 60 seconds), or none that makes sense.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);
/// Longest lifetime that is believed, in seconds. The registry says 401 when a token has ended before.
const LONGEST_LIFETIME: u64 = 86_400;
/// A token is renewed this long before it ends, so that it does not end on its way.
const MARGIN: Duration = Duration::from_secs(5);
/// Entries kept; a server that has seen more repositories drops them all and starts again.
const MAX_ENTRIES: usize = 512;
/// What we call ourselves at a token server.
const CLIENT_ID: &str = "peel";

/// What a token is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct TokenKey {
    pub(crate) realm: String,
    pub(crate) service: Option<String>,
    /// Sorted, each `repository:NAME:ACTIONS`.
    pub(crate) scopes: Vec<String>,
    /// Whose credentials: entries of two repositories may differ.
    pub(crate) owner: String,
}

/// A token as it goes into `Authorization`.
#[derive(Debug)]
pub(crate) struct Token {
    pub(crate) header: HeaderValue,
    pub(crate) expires: Instant,
}

/// A place in the cache that one request fills and others wait for.
pub(crate) type TokenCell = Arc<OnceCell<Token>>;

/// Tokens by what they are for.
#[derive(Debug, Default)]
pub(crate) struct TokenCache(Mutex<HashMap<TokenKey, TokenCell>>);

impl TokenCache {
    /// The cell for `key`: filled with a token that is still good, or empty.
    pub(crate) fn cell(&self, key: &TokenKey) -> TokenCell {
        let mut cells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cell) = cells.get(key)
            && cell.get().is_none_or(|token| Instant::now() < token.expires)
        {
            return Arc::clone(cell);
        }
        if cells.len() >= MAX_ENTRIES {
            cells.clear();
        }
        let cell = TokenCell::default();
        cells.insert(key.clone(), Arc::clone(&cell));
        cell
    }

    /// Forgets `header`, which the registry has refused. A newer token in its place stays.
    pub(crate) fn forget(&self, header: &HeaderValue) {
        let mut cells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        cells.retain(|_, cell| cell.get().is_none_or(|token| token.header != *header));
    }
}

/// How to ask a token server.
pub(crate) struct TokenRequest {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) authorization: Option<HeaderValue>,
    pub(crate) form: Option<String>,
}

impl TokenRequest {
    /// An anonymous request, or one with a user name and password, is a GET; an identity token needs the OAuth2 POST. `post`
    /// asks for the POST also with a password, for servers that refuse the GET.
    pub(crate) fn new(key: &TokenKey, credential: Option<&Credential>, post: bool) -> Result<Self, String> {
        let mut url: Url = key
            .realm
            .parse()
            .map_err(|error| format!("token server {:?}: {error}", key.realm))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(format!("token server {:?}: neither http nor https", key.realm));
        }
        match credential {
            Some(credential) if post || matches!(credential, Credential::IdentityToken(_)) => {
                let mut form = vec![("client_id", CLIENT_ID)];
                let scope = key.scopes.join(" ");
                form.extend(key.service.as_deref().map(|service| ("service", service)));
                form.push(("scope", &scope));
                match credential {
                    Credential::IdentityToken(token) => {
                        form.extend([("grant_type", "refresh_token"), ("refresh_token", token)]);
                    }
                    Credential::Password { user, password } => {
                        form.extend([
                            ("grant_type", "password"),
                            ("username", user),
                            ("password", password),
                        ]);
                    }
                }
                Ok(Self {
                    method: Method::POST,
                    url,
                    authorization: None,
                    form: Some(encode_form(&form)),
                })
            }
            credential => {
                {
                    let mut query = url.query_pairs_mut();
                    if let Some(service) = &key.service {
                        query.append_pair("service", service);
                    }
                    for scope in &key.scopes {
                        query.append_pair("scope", scope);
                    }
                    query.append_pair("client_id", CLIENT_ID);
                    if let Some(Credential::Password { user, .. }) = credential {
                        query.append_pair("account", user);
                    }
                }
                Ok(Self {
                    method: Method::GET,
                    url,
                    authorization: credential.and_then(basic),
                    form: None,
                })
            }
        }
    }

    /// The request for `client`.
    pub(crate) fn build(self, client: &reqwest::Client) -> reqwest::RequestBuilder {
        let mut request = client.request(self.method, self.url);
        if let Some(authorization) = self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        if let Some(form) = self.form {
            request = request
                .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(form);
        }
        request
    }
}

/// `application/x-www-form-urlencoded` by way of a URL's query, which has the same encoding.
fn encode_form(fields: &[(&str, &str)]) -> String {
    let mut url = Url::parse("http://form/").ok();
    if let Some(url) = &mut url {
        url.query_pairs_mut().extend_pairs(fields);
    }
    url.and_then(|url| url.query().map(str::to_owned))
        .unwrap_or_default()
}

/// The value of `Authorization` for a password; `None` for an identity token, which no registry takes directly.
pub(crate) fn basic(credential: &Credential) -> Option<HeaderValue> {
    let Credential::Password { user, password } = credential else {
        return None;
    };
    secret(&format!(
        "Basic {}",
        STANDARD.encode(format!("{user}:{password}"))
    ))
}

fn secret(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<serde_json::Value>,
}

impl Token {
    /// Reads a token server's answer that was asked for at `asked`.
    pub(crate) fn parse(body: &[u8], asked: Instant) -> Result<Self, String> {
        let answer: Answer = serde_json::from_slice(body)
            .map_err(|_| "the token server's answer is no JSON object with a token")?;
        let token = answer
            .token
            .filter(|token| !token.is_empty())
            .or(answer.access_token)
            .filter(|token| !token.is_empty())
            .ok_or("the token server's answer has no token")?;
        let header = secret(&format!("Bearer {token}"))
            .ok_or("the token server's token has characters that no header may have")?;
        let lifetime = answer.expires_in.as_ref().and_then(lifetime);
        let lifetime = lifetime.unwrap_or(DEFAULT_LIFETIME);
        Ok(Self {
            header,
            expires: asked + lifetime.saturating_sub(MARGIN).max(lifetime / 2),
        })
    }
}

/// A lifetime in seconds, at most [`LONGEST_LIFETIME`]. `None` for one that makes no sense, which is no reason to refuse the token; 0 is
/// what Go writes for none. The specification's minimum of 60 seconds is not enforced: a server that says less means it.
fn lifetime(value: &serde_json::Value) -> Option<Duration> {
    let seconds = match value {
        serde_json::Value::String(text) => text.trim().parse().ok()?,
        value => value.as_f64()?,
    };
    let longest = Duration::from_secs(LONGEST_LIFETIME);
    // Not a number is not greater than anything.
    (seconds > 0.0).then(|| Duration::try_from_secs_f64(seconds).map_or(longest, |time| time.min(longest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> TokenKey {
        TokenKey {
            realm: "https://auth.test/token?x=1".into(),
            service: Some("reg test".into()),
            scopes: vec!["repository:a/b:pull".into(), "repository:c:pull,push".into()],
            owner: "o".into(),
        }
    }

    #[test]
    fn requests_by_kind_of_credential() {
        let password = Credential::Password {
            user: "me".into(),
            password: "p&w".into(),
        };
        let identity = Credential::IdentityToken("id=1".into());
        let query = "x=1&service=reg+test&scope=repository%3Aa%2Fb%3Apull&scope=repository%3Ac%3Apull%2Cpush&client_id=peel";
        let form =
            "client_id=peel&service=reg+test&scope=repository%3Aa%2Fb%3Apull+repository%3Ac%3Apull%2Cpush";

        let request = TokenRequest::new(&key(), None, false).unwrap();
        assert_eq!((request.method, request.authorization), (Method::GET, None));
        assert_eq!(request.url.query(), Some(query));

        let request = TokenRequest::new(&key(), Some(&password), false).unwrap();
        assert_eq!(request.url.query(), Some(format!("{query}&account=me").as_str()));
        assert_eq!(request.authorization.unwrap(), "Basic bWU6cCZ3");

        for (credential, post, grant) in [
            (&identity, false, "grant_type=refresh_token&refresh_token=id%3D1"),
            (&password, true, "grant_type=password&username=me&password=p%26w"),
        ] {
            let request = TokenRequest::new(&key(), Some(credential), post).unwrap();
            assert_eq!((request.method, request.authorization), (Method::POST, None));
            assert_eq!(request.url.query(), Some("x=1"));
            assert_eq!(request.form, Some(format!("{form}&{grant}")));
        }
        let mut odd = key();
        odd.realm = "file:///etc/passwd".into();
        assert!(TokenRequest::new(&odd, None, false).is_err());
    }

    #[test]
    fn answers() {
        let now = Instant::now();
        for (body, header, seconds) in [
            (r#"{"token":"a"}"#, "Bearer a", 55),
            (
                r#"{"access_token":"b","expires_in":300,"token":""}"#,
                "Bearer b",
                295,
            ),
            (r#"{"token":"c","expires_in":2}"#, "Bearer c", 1),
            (r#"{"token":"d","expires_in":-1}"#, "Bearer d", 55),
            (r#"{"token":"e","expires_in":0}"#, "Bearer e", 55),
            (
                r#"{"token":"f","access_token":null,"expires_in":null,"issued_at":0}"#,
                "Bearer f",
                55,
            ),
            (
                r#"{"token":null,"access_token":"g","issued_at":"yesterday"}"#,
                "Bearer g",
                55,
            ),
            (r#"{"token":"h","expires_in":1e300}"#, "Bearer h", 86_395),
            (
                r#"{"token":"i","expires_in":18446744073709551616}"#,
                "Bearer i",
                86_395,
            ),
            (
                r#"{"token":"j","expires_in":-9223372036854775809}"#,
                "Bearer j",
                55,
            ),
            (r#"{"token":"k","expires_in":"300"}"#, "Bearer k", 295),
            (r#"{"token":"l","expires_in":"NaN"}"#, "Bearer l", 55),
            (r#"{"token":"m","expires_in":"soon"}"#, "Bearer m", 55),
            (r#"{"token":"n","expires_in":[]}"#, "Bearer n", 55),
            (r#"{"token":"o","expires_in":300.0}"#, "Bearer o", 295),
        ] {
            let token = Token::parse(body.as_bytes(), now).unwrap();
            assert_eq!(token.header, header);
            assert!(token.header.is_sensitive());
            assert_eq!(token.expires - now, Duration::from_secs(seconds), "{body}");
        }
        for body in ["", "[]", "{}", r#"{"token":"a\nb"}"#] {
            assert!(Token::parse(body.as_bytes(), now).is_err(), "{body}");
        }
    }

    #[test]
    fn an_expired_or_refused_token_makes_room() {
        let cache = TokenCache::default();
        let now = Instant::now();
        let cell = cache.cell(&key());
        cell.set(Token::parse(br#"{"token":"a"}"#, now).unwrap()).unwrap();
        assert!(cache.cell(&key()).get().is_some());
        cache.forget(&HeaderValue::from_static("Bearer other"));
        assert!(cache.cell(&key()).get().is_some());
        cache.forget(&HeaderValue::from_static("Bearer a"));
        let cell = cache.cell(&key());
        assert!(cell.get().is_none());
        cell.set(Token::parse(br#"{"token":"a","expires_in":1e-9}"#, now).unwrap())
            .unwrap();
        assert!(cache.cell(&key()).get().is_none());
    }
}
