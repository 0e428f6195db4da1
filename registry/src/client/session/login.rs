//! Logging in: what goes into `Authorization`, and where it comes from. Part of [`Session`].

use std::sync::PoisonError;
use std::time::Instant;

use reqwest::StatusCode;
use reqwest::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};

use super::{Call, MAX_SMALL_BODY, Session};
use crate::auth::Challenge;
use crate::auth::credentials::Credential;
use crate::auth::token::{Token, TokenKey, TokenRequest, basic};
use crate::client::retry::Fault;
use crate::client::{Scheme, is_loopback};
use crate::error::Place;

/// Scopes learnt from challenges beside our own; more than one is already unusual.
const MAX_LEARNT: usize = 8;

impl Session {
    /// The value of `Authorization` by what the registry has asked for so far.
    pub(super) async fn authorization(&self, call: &Call<'_>) -> Result<Option<HeaderValue>, Fault> {
        let Some(challenge) = self.host.challenge() else {
            return Ok(None);
        };
        let Place { registry, repository } = &*self.place;
        let credential = self.client.credential(registry, repository).await;
        let credential = credential.map_err(Fault::fatal)?;
        let (realm, service) = match challenge {
            Challenge::Basic => return Ok(credential.as_ref().and_then(basic)),
            Challenge::Bearer { realm, service, .. } => (realm, service),
        };
        let mut scopes = self.learnt.lock().unwrap_or_else(PoisonError::into_inner).clone();
        scopes.push(format!("repository:{repository}:{}", call.actions));
        scopes.extend(call.from.map(|from| format!("repository:{from}:pull")));
        scopes.sort();
        scopes.dedup();
        let key = TokenKey {
            realm,
            service,
            scopes,
            owner: format!("{registry}/{repository}"),
        };
        let cell = self.client.tokens.cell(&key);
        let token = cell
            .get_or_try_init(|| self.buy_token(&key, credential.as_ref()))
            .await?;
        Ok(Some(token.header.clone()))
    }

    async fn buy_token(&self, key: &TokenKey, credential: Option<&Credential>) -> Result<Token, Fault> {
        let fatal = |reason: String| Fault::fatal(self.protocol("login", reason));
        for post in [false, true] {
            let asked = Instant::now();
            let request = TokenRequest::new(key, credential, post).map_err(fatal)?;
            let server = request.url.host_str().unwrap_or_default().to_owned();
            if self.host.scheme() == Scheme::Https && request.url.scheme() != "https" && !is_loopback(&server)
            {
                return Err(fatal(format!(
                    "the token server {server} is not reached by https: refused"
                )));
            }
            let what = format!("token from {server}");
            self.unpaused(&request.url, &what)?;
            let http = self.client.http(&request.url).map_err(Fault::fatal)?;
            let response = self.send_request(request.build(http), &what).await?;
            match response.status() {
                StatusCode::OK => {
                    let body = self.body(&what, response, MAX_SMALL_BODY).await?;
                    return Token::parse(&body, asked).map_err(fatal);
                }
                StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED if !post && credential.is_some() => {
                    self.drain(response).await;
                }
                _ => {
                    let fault = self.refused(&what, response).await;
                    self.client
                        .forget_credential(&self.place.registry, &self.place.repository);
                    return Err(fault);
                }
            }
        }
        Err(fatal("the token server takes neither GET nor POST".into()))
    }

    /// Remembers what a 401 asks for; `None` if it asks for nothing that we have.
    pub(super) fn learn(&self, headers: &HeaderMap) -> Option<()> {
        let values = headers.get_all(WWW_AUTHENTICATE).iter();
        let challenge = Challenge::best(values.filter_map(|value| value.to_str().ok()))?;
        if let Challenge::Bearer {
            scope: Some(scope), ..
        } = &challenge
        {
            let own = format!("repository:{}:", self.place.repository);
            let mut learnt = self.learnt.lock().unwrap_or_else(PoisonError::into_inner);
            for scope in scope.split_ascii_whitespace() {
                // Our own repository is in every request for a token, with the actions that the call needs.
                if !scope.starts_with(&own)
                    && !learnt.iter().any(|known| known == scope)
                    && learnt.len() < MAX_LEARNT
                {
                    learnt.push(scope.to_owned());
                }
            }
        }
        self.host.set_challenge(challenge);
        Some(())
    }
}
