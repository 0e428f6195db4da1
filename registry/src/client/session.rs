//! Requests for one repository: authorization, redirects, and what an answer means. Sources and targets call it.
//!
//! `Authorization` goes to the registry's own origin (scheme, host and port) only; redirects are followed by hand for that
//! reason. A redirect from https to http is refused. Response bodies that nobody needs are read to their end, because only
//! then is the connection used again.

mod answer;
mod login;

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use peel_image::Digest;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Method, Response, StatusCode, Url};

use super::retry::{Again, Fault, Retry};
use super::{Client, Host, Scheme, pause, tls_error};
use crate::auth::Challenge;
use crate::error::{Error, Place};
use crate::name::Reference;
use crate::options::{ClientOptions, Counters};
use crate::transfer::redirect::Redirects;
use crate::transfer::spool::Spools;
use answer::is_plain_peer;

/// Hops from the registry to a blob's storage. Two are seen in practice.
pub(crate) const MAX_REDIRECTS: usize = 5;
/// Largest error body and token answer, in bytes.
const MAX_SMALL_BODY: u64 = 256 << 10;

/// One repository of one registry, and everything shared behind it.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) client: Arc<Client>,
    pub(crate) place: Arc<Place>,
    pub(crate) counters: Arc<Counters>,
    host: Arc<Host>,
    learnt: Mutex<Vec<String>>,
    pub(crate) redirects: Redirects,
    pub(crate) spools: Spools,
}

/// Where a request goes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum To<'a> {
    /// A path from the root of the registry.
    Path(&'a str),
    /// Where the registry has sent us.
    Url(&'a Url),
}

/// One request, as often as it has to be sent.
#[derive(Debug, Clone)]
pub(crate) struct Call<'a> {
    pub(crate) method: Method,
    pub(crate) to: To<'a>,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Option<Bytes>,
    /// What errors call it.
    pub(crate) what: &'a str,
    /// Actions on the repository, in the order that token servers write them.
    pub(crate) actions: &'static str,
    /// A second repository to read from, for mounts.
    pub(crate) from: Option<&'a str>,
}

impl<'a> Call<'a> {
    pub(crate) fn get(path: &'a str, what: &'a str) -> Self {
        Self {
            method: Method::GET,
            to: To::Path(path),
            headers: HeaderMap::new(),
            body: None,
            what,
            actions: "pull",
            from: None,
        }
    }
}

impl Session {
    pub(crate) fn new(reference: &Reference, options: &ClientOptions) -> Self {
        let client = Client::shared(options);
        Self {
            host: client.host(&reference.registry),
            client,
            place: Place::of(reference),
            counters: Arc::default(),
            learnt: Mutex::default(),
            redirects: Default::default(),
            spools: Default::default(),
        }
    }

    pub(crate) fn retry(&self) -> Retry {
        Retry::new(self.client.options.retry_for)
    }

    /// Waits before the next attempt, or gives the fault's error back.
    pub(crate) async fn wait(&self, retry: &mut Retry, fault: Fault) -> Result<(), Error> {
        retry.wait(fault).await?;
        self.counters.add_retry();
        Ok(())
    }

    pub(crate) fn protocol(&self, what: &str, reason: impl Into<String>) -> Error {
        Error::Protocol {
            place: Arc::clone(&self.place),
            what: what.to_owned(),
            reason: reason.into(),
        }
    }

    /// Sends `call` until it succeeds (2xx) or is given up; redirects that keep its method are followed.
    pub(crate) async fn expect(&self, call: &Call<'_>) -> Result<Response, Error> {
        let mut retry = self.retry();
        loop {
            let fault = match self.follow(call, None).await.map(|(response, _)| response) {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) => self.refused(call.what, response).await,
                Err(fault) => fault,
            };
            self.wait(&mut retry, fault).await?;
        }
    }

    /// The whole body that answers `call`, redirects followed, and its headers.
    pub(crate) async fn fetch(&self, call: &Call<'_>, limit: u64) -> Result<(HeaderMap, Bytes), Error> {
        let mut retry = self.retry();
        loop {
            let fault = match self.fetch_once(call, limit).await {
                Ok(done) => return Ok(done),
                Err(fault) => fault,
            };
            self.wait(&mut retry, fault).await?;
        }
    }

    async fn fetch_once(&self, call: &Call<'_>, limit: u64) -> Result<(HeaderMap, Bytes), Fault> {
        let (mut response, _) = self.follow(call, None).await?;
        if response.status() != StatusCode::OK {
            return Err(self.refused(call.what, response).await);
        }
        let headers = std::mem::take(response.headers_mut());
        let body = self.body(call.what, response, limit).await?;
        Ok((headers, body))
    }

    /// One attempt that follows redirects, from `start` if there is one, and says where they ended.
    pub(crate) async fn follow(
        &self,
        call: &Call<'_>,
        start: Option<Url>,
    ) -> Result<(Response, Option<Url>), Fault> {
        let mut target = start;
        for _ in 0..=MAX_REDIRECTS {
            let hop = Call {
                to: target.as_ref().map_or(call.to, To::Url),
                ..call.clone()
            };
            let response = self.attempt(&hop).await?;
            let Some(next) = self.next_hop(call, &response)? else {
                return Ok((response, target));
            };
            self.drain(response).await;
            target = Some(next);
        }
        Err(self.circles(call.what))
    }

    pub(crate) fn circles(&self, what: &str) -> Fault {
        let reason = format!("more than {MAX_REDIRECTS} redirects");
        Fault::fatal(self.protocol(what, reason))
    }

    /// Where an answer sends the same request; `None` if it does not. Only 307 and 308 keep a method that is not GET or HEAD (RFC 9110,
    /// section 15.4).
    pub(crate) fn next_hop(&self, call: &Call<'_>, response: &Response) -> Result<Option<Url>, Fault> {
        let reads = matches!(call.method, Method::GET | Method::HEAD);
        let followed = match response.status() {
            StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT => true,
            status => reads && is_redirect(status),
        };
        if !followed {
            return Ok(None);
        }
        let mut next = self.location(call.what, response).map_err(Fault::fatal)?;
        if !reads {
            next = self.secured(call.what, next).map_err(Fault::fatal)?;
        }
        if response.url().scheme() == "https" && next.scheme() != "https" {
            let host = next.host_str().unwrap_or_default();
            let reason = format!("redirect from https to {}://{host} refused", next.scheme());
            return Err(Fault::fatal(self.protocol(call.what, reason)));
        }
        Ok(Some(next))
    }

    /// The URL in `Location`, relative ones resolved.
    pub(crate) fn location(&self, what: &str, response: &Response) -> Result<Url, Error> {
        let text = response
            .headers()
            .get(LOCATION)
            .and_then(|value| value.to_str().ok());
        let text = text.ok_or_else(|| self.protocol(what, "the answer has no Location header"))?;
        let url = response.url().join(text);
        let url = url.map_err(|error| self.protocol(what, format!("Location is no URL: {error}")))?;
        if matches!(url.scheme(), "http" | "https") && url.has_host() {
            Ok(url)
        } else {
            Err(self.protocol(what, format!("Location has the scheme {:?}", url.scheme())))
        }
    }

    /// One attempt: authorization as far as it is known, a second request when the registry asks for another. Any status is
    /// a success except 401 and those that mean "try again".
    pub(crate) async fn attempt(&self, call: &Call<'_>) -> Result<Response, Fault> {
        if let To::Url(url) = call.to
            && !self.is_home(url)
        {
            let response = self.send(url.clone(), call, None).await?;
            return self.usable(call, response).await;
        }
        let known = self.authorization(call).await?;
        let response = self.send_home(call, known.as_ref()).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return self.usable(call, response).await;
        }
        if let Some(header) = &known {
            self.client.tokens.forget(header);
        }
        let Some(()) = self.learn(response.headers()) else {
            return Err(self.denied(call, response).await);
        };
        let Some(fresh) = self.authorization(call).await? else {
            return Err(self.denied(call, response).await);
        };
        if matches!(self.host.challenge(), Some(Challenge::Basic)) && known.as_ref() == Some(&fresh) {
            return Err(self.denied(call, response).await);
        }
        self.drain(response).await;
        let response = self.send_home(call, Some(&fresh)).await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            self.client.tokens.forget(&fresh);
            return Err(self.denied(call, response).await);
        }
        self.usable(call, response).await
    }

    /// Sends to the registry itself, finding out first which protocol it speaks.
    async fn send_home(
        &self,
        call: &Call<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, Fault> {
        match self.host.scheme() {
            Scheme::Unknown => {}
            scheme => {
                let url = self.url(call, scheme == Scheme::Https)?;
                return self.send(url, call, authorization).await;
            }
        }
        let result = self.send(self.url(call, false)?, call, None).await;
        let odd = match &result {
            Ok(response) => response.status() == StatusCode::BAD_REQUEST,
            Err(fault) => fault.again != Again::FirstContact,
        };
        if odd && self.speaks_tls().await? {
            self.host.set_scheme(Scheme::Https);
            return self.send(self.url(call, true)?, call, None).await;
        }
        if result.is_ok() {
            self.host.set_scheme(Scheme::Http);
        }
        result
    }

    async fn speaks_tls(&self) -> Result<bool, Fault> {
        let url = self.home(true, "/v2/")?;
        let request = self.client.http(&url).map_err(Fault::fatal)?.get(url);
        self.counters.add_request();
        Ok(
            match tokio::time::timeout(self.client.options.attempt_timeout, request.send()).await {
                Ok(Ok(_)) => true,
                // Only a TLS peer sends a certificate or an alert.
                Ok(Err(error)) => tls_error(&error).is_some_and(|tls| !is_plain_peer(tls)),
                Err(_) => false,
            },
        )
    }

    fn url(&self, call: &Call<'_>, https: bool) -> Result<Url, Fault> {
        match call.to {
            To::Url(url) => Ok(url.clone()),
            To::Path(path) => self.home(https, path),
        }
    }

    fn home(&self, https: bool, path: &str) -> Result<Url, Fault> {
        let url = self.host.url(https, path);
        url.map_err(|reason| Fault::fatal(self.protocol("URL", reason)))
    }

    /// Whether `url` is at the registry's own origin.
    fn is_home(&self, url: &Url) -> bool {
        let https = match self.host.scheme() {
            Scheme::Unknown => return false,
            scheme => scheme == Scheme::Https,
        };
        self.host
            .url(https, "/")
            .is_ok_and(|home| home.origin() == url.origin())
    }

    /// `url` with the registry's scheme, if it differs in nothing but that: registries behind a TLS proxy that does not tell them so
    /// write http into their answers. Any other step down from https is an error: an image may be secret.
    pub(crate) fn secured(&self, what: &str, mut url: Url) -> Result<Url, Error> {
        if self.host.scheme() != Scheme::Https || url.scheme() != "http" {
            return Ok(url);
        }
        if let Ok(home) = self.host.url(true, "/")
            && home.host_str() == url.host_str()
            && (url.port().is_none() || url.port() == home.port())
            && url.set_scheme("https").is_ok()
            // The default port of http has become that of https, or the registry's own.
            && url.set_port(home.port()).is_ok()
        {
            return Ok(url);
        }
        let host = url.host_str().unwrap_or_default();
        Err(self.protocol(
            what,
            format!("an upload by plain http to {host} is refused: the registry speaks https"),
        ))
    }

    async fn send(
        &self,
        url: Url,
        call: &Call<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, Fault> {
        self.unpaused(&url, call.what)?;
        let mut request = self
            .client
            .http(&url)
            .map_err(Fault::fatal)?
            .request(call.method.clone(), url)
            .headers(call.headers.clone());
        if let Some(value) = authorization {
            request = request.header(AUTHORIZATION, value.clone());
        }
        if let Some(body) = &call.body {
            self.counters.add_sent(body.len());
            request = request.body(body.clone());
        }
        self.send_request(request, call.what).await
    }

    async fn send_request(&self, request: reqwest::RequestBuilder, what: &str) -> Result<Response, Fault> {
        self.counters.add_request();
        let patience = self.client.options.attempt_timeout;
        match tokio::time::timeout(patience, request.send()).await {
            Ok(Ok(response)) => {
                self.host.set_answered();
                if response.status() != StatusCode::TOO_MANY_REQUESTS {
                    self.client.pauses.answered(&pause::host(response.url()));
                }
                Ok(response)
            }
            Ok(Err(error)) => Err(self.broken(what, error)),
            Err(_) => Err(self.silent(what)),
        }
    }

    /// Sends a request whose body cannot be sent twice. `wait` ends when the body has stopped moving for too long.
    pub(crate) async fn send_stream(
        &self,
        call: &Call<'_>,
        url: &Url,
        body: reqwest::Body,
        stalled: impl Future<Output = ()>,
    ) -> Result<Response, Fault> {
        self.unpaused(url, call.what)?;
        let is_home = self.is_home(url);
        let authorization = match is_home {
            true => self.authorization(call).await?,
            false => None,
        };
        let http = self.client.http(url).map_err(Fault::fatal)?;
        let mut request = http
            .request(call.method.clone(), url.clone())
            .headers(call.headers.clone())
            .body(body);
        if let Some(value) = &authorization {
            request = request.header(AUTHORIZATION, value.clone());
        }
        self.counters.add_request();
        let response = tokio::select! {
            response = request.send() => response.map_err(|error| self.broken(call.what, error))?,
            () = stalled => return Err(self.silent(call.what)),
        };
        // What another host asks for would be asked of the registry from then on, passwords included.
        if !is_home || response.status() != StatusCode::UNAUTHORIZED {
            return self.usable(call, response).await;
        }
        if let Some(header) = &authorization {
            self.client.tokens.forget(header);
        }
        let again = self.learn(response.headers()).is_some();
        let fault = self.denied(call, response).await;
        Err(if again {
            Fault::transient(*fault.error)
        } else {
            fault
        })
    }

    /// Opens up to `connections` connections and logs in, so that requests which come together find them open.
    pub(crate) async fn warm(&self, connections: usize) {
        let call = Call::get("/v2/", "ping");
        let ping = || async {
            if let Ok(response) = self.send_home(&call, None).await {
                self.drain(response).await;
            }
        };
        futures::future::join_all((0..connections).map(|_| ping())).await;
    }

    /// The path of something in this repository.
    pub(crate) fn path(&self, kind: &str, name: &str) -> String {
        format!("/v2/{}/{kind}/{name}", self.place.repository)
    }

    pub(crate) fn mismatch(&self, what: &str, expected: Digest, actual: Digest) -> Error {
        Error::DigestMismatch {
            place: self.place.to_string(),
            what: what.to_owned(),
            expected,
            actual,
        }
    }
}

pub(crate) fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}
