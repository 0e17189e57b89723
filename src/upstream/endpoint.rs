//! Requests to one URL of an upstream: its token flow, its redirects, its deadlines.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::{Bytes, BytesMut};
use http::header::{AUTHORIZATION, LOCATION, USER_AGENT, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use url::Url;

use super::challenge::Challenge;
use super::error::{Question, UpstreamError};
use super::record::{Record, retry_after};
use super::token::{Asking, LONGEST, Slot, Token, TokenKey, Tokens, may_receive_credentials};
use crate::config::{Credentials, Timeouts};
use crate::oci::{Name, RegistryHost};
use crate::resolve::{self, Connector};

/// How many redirects are followed: a registry makes one, to its content delivery network.
const REDIRECTS: usize = 5;
/// The largest answer of a token server that is read, in bytes.
const TOKEN_LIMIT: usize = 256 * 1024;

type HttpClient = Client<HttpsConnector<Connector>, Empty<Bytes>>;

/// A failure that took longer is not waited for again at once.
const COSTLY: Duration = Duration::from_millis(500);
/// After a failure that was waited for, an endpoint is not asked for as long as that took, and no
/// longer than this.
const DOWN_FOR: Duration = Duration::from_secs(5);
/// The longest that an endpoint which limits blobs is not asked for any.
const BLOBS_PAUSE: Duration = Duration::from_mins(1);

/// One URL at which an upstream is asked.
pub(super) struct Endpoint {
    registry: RegistryHost,
    url: Url,
    /// How the paths of its API begin.
    api: String,
    credentials: Option<Credentials>,
    timeouts: Timeouts,
    /// Made at the first request: reading the system's certificates is no part of a start.
    http: OnceLock<Result<HttpClient, String>>,
    /// Where it has its tokens, once it has said so: then no request is made in vain.
    bearer: Mutex<Option<Bearer>>,
    tokens: Tokens,
    /// Until when it does not want to be asked for blobs.
    blobs_paused: Mutex<Option<Instant>>,
    /// Until when it is not asked, and what it would cost to.
    down: Mutex<Option<(Instant, UpstreamError)>>,
    record: Arc<Record>,
    /// In whose name.
    pub(super) asked_as: AskedAs,
}

/// In whose name an endpoint is asked.
#[derive(Debug, Clone, Copy)]
pub(super) enum AskedAs {
    /// Our own: the pulls that it says are left are ours.
    Ourselves,
    /// Nobody's, to see what everybody may see. A token says that as of when it was issued, so that
    /// it is not used for longer than this.
    Nobody(Duration),
}

/// What was asked, beside the answer: links in it are relative to that.
#[derive(Clone)]
pub(super) struct Asked {
    /// The endpoint's URL.
    pub(super) endpoint: Url,
    /// The request's.
    pub(super) url: Url,
}

#[derive(Clone)]
struct Bearer {
    realm: Url,
    service: Option<String>,
}

impl Endpoint {
    pub(super) fn new(
        registry: RegistryHost,
        url: Url,
        credentials: Option<&Credentials>,
        timeouts: Timeouts,
        record: Arc<Record>,
        asked_as: AskedAs,
    ) -> Self {
        Self {
            registry,
            api: format!("{}/v2/", url.path().trim_end_matches('/')),
            url,
            credentials: credentials.cloned(),
            timeouts,
            http: OnceLock::new(),
            bearer: Mutex::default(),
            tokens: Tokens::default(),
            blobs_paused: Mutex::default(),
            down: Mutex::default(),
            record,
            asked_as,
        }
    }

    fn question<'a>(&'a self, what: &'a str) -> Question<'a> {
        Question {
            registry: &self.registry,
            what,
        }
    }

    /// Whether it failed a moment ago, after having been waited for.
    pub(super) fn is_down(&self) -> bool {
        self.down_with().is_some()
    }

    fn down_with(&self) -> Option<UpstreamError> {
        let down = self.down.lock().unwrap_or_else(PoisonError::into_inner);
        let (until, error) = down.as_ref()?;
        (Instant::now() < *until).then(|| error.clone())
    }

    /// Asks for a path of a repository; anything but a success is an error. A dead endpoint costs
    /// one wait and not one for each request.
    pub(super) async fn get(
        self: &Arc<Self>,
        method: &Method,
        path: &str,
        name: &Name,
        what: &str,
        headers: &HeaderMap,
    ) -> Result<Response<Incoming>, UpstreamError> {
        if let Some(error) = self.down_with() {
            return Err(error);
        }
        let of_blobs = asks_for(path, "blobs");
        if of_blobs
            && self
                .blobs_paused()
                .is_some_and(|until| Instant::now() < until)
        {
            return Err(self.question(what).limited());
        }
        let mut response = self.send(method, path, name, what, headers).await?;
        match response.status() {
            StatusCode::TOO_MANY_REQUESTS if of_blobs => {
                *self.blobs_paused() = retry_after(response.headers(), BLOBS_PAUSE);
                Err(self.question(what).limited())
            }
            status if status.is_success() => {
                let asked = Asked {
                    endpoint: self.url.clone(),
                    url: self.at(path, what)?,
                };
                response.extensions_mut().insert(asked);
                Ok(response)
            }
            status => Err(self.question(what).status(status)),
        }
    }

    fn blobs_paused(&self) -> MutexGuard<'_, Option<Instant>> {
        self.blobs_paused
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn bearer(&self) -> MutexGuard<'_, Option<Bearer>> {
        self.bearer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn at(&self, path: &str, what: &str) -> Result<Url, UpstreamError> {
        let url = format!("{}{path}", self.url.as_str().trim_end_matches('/'));
        Url::parse(&url).map_err(|e| self.question(what).protocol(e.to_string()))
    }

    /// Sends a request with a token for pulling `name`, where the upstream wants one. A 401 is
    /// answered with another token, and one to a token that is new is the caller's.
    async fn send(
        self: &Arc<Self>,
        method: &Method,
        path: &str,
        name: &Name,
        what: &str,
        headers: &HeaderMap,
    ) -> Result<Response<Incoming>, UpstreamError> {
        let url = self.at(path, what)?;
        let scope = format!("repository:{name}:pull");
        let known = self.bearer().clone();
        let key = |Bearer { realm, service }| TokenKey {
            realm,
            service,
            scope: scope.clone(),
        };
        let mut sent = None;
        let mut refused_by = None;
        if let Some(key) = known.map(key) {
            match self.token(&key, None, what).await {
                Ok((token, _)) => sent = Some(token),
                // The token server may be elsewhere by now: only the endpoint knows.
                Err(error) => {
                    *self.bearer() = None;
                    refused_by = Some((key.realm, error));
                }
            }
        }
        let response = self
            .follow(method, url.clone(), headers, sent.as_ref(), what, true)
            .await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        let Some(challenge) = response
            .headers()
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .find_map(|value| Challenge::parse(value.to_str().ok()?))
        else {
            return Ok(response);
        };
        let (realm, service, wanted) = match (challenge, &self.credentials) {
            (Challenge::Basic, None) => return Ok(response),
            (Challenge::Basic, Some(credentials)) => {
                let authorization = basic(credentials);
                return self
                    .follow(method, url, headers, Some(&authorization), what, true)
                    .await;
            }
            (
                Challenge::Bearer {
                    realm,
                    service,
                    scope,
                },
                _,
            ) => (realm, service, scope),
        };
        let realm = Url::parse(&realm).map_err(|e| {
            let reason = format!("a token realm {realm:?}: {e}");
            self.question(what).protocol(reason)
        })?;
        // A redirect may not go there either: in clear, anybody on the way could have named any host
        // of this network.
        if realm.scheme() != "https" && realm.scheme() != self.url.scheme() {
            let reason =
                format!("it is asked by https, and wants a token from {realm}, which is not");
            return Err(self.question(what).protocol(reason));
        }
        if let Some((same, error)) = refused_by
            && same == realm
        {
            return Err(error);
        }
        let bearer = Bearer {
            realm: realm.clone(),
            service: service.clone(),
        };
        let key = TokenKey {
            realm,
            service,
            scope: wanted.unwrap_or(scope),
        };
        loop {
            // A token was sent and refused: another, not the same once more.
            let (token, is_new) = self.token(&key, sent.as_ref(), what).await?;
            // Remembered only now: a realm that gives no token must not stand in the way of the
            // next challenge.
            *self.bearer() = Some(bearer.clone());
            let response = self
                .follow(method, url.clone(), headers, Some(&token), what, true)
                .await?;
            if is_new || response.status() != StatusCode::UNAUTHORIZED {
                return Ok(response);
            }
            sent = Some(token);
        }
    }

    /// A token other than the one that was `refused`, from memory or from the token server, and
    /// whether it is new. However many ask, one request is made, and whoever waited for it shares
    /// how it ended. Nobody waits for one that replaces a token which still serves.
    async fn token(
        self: &Arc<Self>,
        key: &TokenKey,
        refused: Option<&HeaderValue>,
        what: &str,
    ) -> Result<(HeaderValue, bool), UpstreamError> {
        let came = Instant::now();
        let slot = self.tokens.slot(key);
        let serves = || slot.usable().filter(|header| Some(header) != refused);
        if let Some(header) = serves() {
            if let Some(asking) = slot.ask_ahead() {
                tokio::spawn(Arc::clone(self).replace_token(
                    key.clone(),
                    Arc::clone(&slot),
                    asking,
                ));
            }
            return Ok((header, false));
        }
        let _asking = slot.ask().await;
        if let Some(header) = serves() {
            return Ok((header, false));
        }
        if let Some(error) = slot.failed(came) {
            return Err(error);
        }
        let token = self.new_token(key, what, true).await;
        let header = token.as_ref().map(|token| token.header.clone());
        let header = header.map_err(Clone::clone);
        slot.keep(token);
        Ok((header?, true))
    }

    /// Replaces a token that still serves.
    async fn replace_token(self: Arc<Self>, key: TokenKey, slot: Arc<Slot>, _asking: Asking) {
        let what = format!("another token for {}", key.scope);
        let token = self.new_token(&key, &what, false).await;
        if let Err(error) = &token {
            tracing::warn!(%error, "a token that ends soon could not be replaced yet: {error}");
        }
        slot.keep(token);
    }

    /// Asks the token server. `needed`: without the token, nothing can be had of the endpoint.
    async fn new_token(
        &self,
        key: &TokenKey,
        what: &str,
        needed: bool,
    ) -> Result<Token, UpstreamError> {
        let authorization = match &self.credentials {
            Some(credentials) if may_receive_credentials(&key.realm, &self.url) => {
                Some(basic(credentials))
            }
            Some(_) => {
                let reason = format!(
                    "it wants a token from {}, which is not on its own domain: the credentials of \
                     this upstream are not sent there",
                    key.realm
                );
                return Err(self.question(what).protocol(reason));
            }
            None => None,
        };
        let asked = Instant::now();
        let response = self
            .follow(
                &Method::GET,
                key.url(),
                &HeaderMap::new(),
                authorization.as_ref(),
                what,
                needed,
            )
            .await?;
        match response.status() {
            status if status.is_success() => {}
            StatusCode::UNAUTHORIZED if authorization.is_some() => {
                let reason = format!(
                    "its token server {} refuses our credentials (401)",
                    key.realm
                );
                return Err(self.question(what).protocol(reason));
            }
            status => {
                let token = format!("a token for {what}");
                return Err(self.question(&token).status(status));
            }
        }
        let question = self.question(what);
        let body = collect(response, TOKEN_LIMIT, self.timeouts.idle, question).await?;
        let longest = match self.asked_as {
            AskedAs::Ourselves => LONGEST,
            AskedAs::Nobody(longest) => longest,
        };
        Token::parse(&body, asked, longest).map_err(|reason| {
            let reason = format!("its token server sent {reason}");
            self.question(what).protocol(reason)
        })
    }

    /// Sends a request and follows its redirects. `authorization` goes to the first host only: a
    /// content delivery network has its own signature in the URL, and no business with our token.
    /// `needed`: without the first answer, nothing can be had of the endpoint.
    async fn follow(
        &self,
        method: &Method,
        mut url: Url,
        headers: &HeaderMap,
        mut authorization: Option<&HeaderValue>,
        what: &str,
        needed: bool,
    ) -> Result<Response<Incoming>, UpstreamError> {
        for hop in 0..=REDIRECTS {
            let mut request = Request::builder()
                .method(method)
                .uri(url.as_str())
                .header(
                    USER_AGENT,
                    concat!("registry-agent/", env!("CARGO_PKG_VERSION")),
                )
                .body(Empty::new())
                .map_err(|e| self.question(what).protocol(e.to_string()))?;
            request.headers_mut().extend(headers.clone());
            if let Some(authorization) = authorization {
                request
                    .headers_mut()
                    .insert(AUTHORIZATION, authorization.clone());
            }
            let response = self.exchange(request, what, needed && hop == 0).await?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let Some(location) = response.headers().get(LOCATION) else {
                return Ok(response);
            };
            let next = location
                .to_str()
                .ok()
                .and_then(|location| url.join(location).ok())
                .ok_or_else(|| self.question(what).protocol("a redirect to no URL"))?;
            if next.scheme() != url.scheme() && next.scheme() != "https" {
                // Neither is quoted: a signed URL is a credential.
                return Err(self
                    .question(what)
                    .protocol("a redirect from https to another scheme"));
            }
            if next.origin() != url.origin() {
                authorization = None;
            }
            url = next;
        }
        Err(self
            .question(what)
            .protocol(format!("more than {REDIRECTS} redirects")))
    }

    /// One request, one answer's head, within the deadline; counted and remembered. `own` is a
    /// request to the endpoint or its token server, not to where a redirect leads: without those
    /// nothing can be had of it.
    async fn exchange(
        &self,
        request: Request<Empty<Bytes>>,
        what: &str,
        own: bool,
    ) -> Result<Response<Incoming>, UpstreamError> {
        let began = Instant::now();
        let deadline = self.timeouts.headers;
        let path = request.uri().path();
        let pulls = matches!(self.asked_as, AskedAs::Ourselves)
            && own
            && path.starts_with(&self.api)
            && asks_for(path, "manifests");
        // Not the registry itself: its token server, or where it redirects to.
        let elsewhere = request
            .uri()
            .host()
            .filter(|host| Some(*host) != self.url.host_str());
        let elsewhere = elsewhere.map(|host| format!("{what}, at {host}"));
        let what = elsewhere.as_deref().unwrap_or(what);
        let http = self
            .http
            .get_or_init(|| http_client(&self.url, self.timeouts));
        let outcome = match http {
            Err(reason) => Err(self.question(what).transport(reason)),
            Ok(http) => match tokio::time::timeout(deadline, http.request(request)).await {
                Ok(Ok(response)) => Ok(response),
                Ok(Err(e)) => Err(self.question(what).broken(&e)),
                Err(_) => Err(self.question(what).timeout(deadline)),
            },
        };
        let down = match &outcome {
            Ok(response) => {
                self.record
                    .answered(response.status(), response.headers(), pulls);
                None
            }
            Err(error) => {
                self.record.failed(error);
                let waited = began.elapsed();
                let costly = waited >= COSTLY.min(deadline);
                costly.then(|| (Instant::now() + waited.min(DOWN_FOR), error.clone()))
            }
        };
        if own {
            *self.down.lock().unwrap_or_else(PoisonError::into_inner) = down;
        }
        outcome
    }
}

/// Whether a path is one of this kind: names may hold `blobs` and `manifests` themselves.
pub(super) fn asks_for(path: &str, kind: &str) -> bool {
    path.rsplit('/').nth(1) == Some(kind)
}

/// Reads a whole body of at most `limit` bytes, giving up when nothing arrives for a while.
pub(super) async fn collect(
    response: Response<Incoming>,
    limit: usize,
    idle: Duration,
    question: Question<'_>,
) -> Result<Bytes, UpstreamError> {
    let mut body = Limited::new(response.into_body(), limit);
    let mut bytes = BytesMut::new();
    loop {
        match tokio::time::timeout(idle, body.frame()).await {
            Err(_) => return Err(question.timeout(idle)),
            Ok(None) => return Ok(bytes.freeze()),
            Ok(Some(Ok(frame))) => {
                if let Ok(data) = frame.into_data() {
                    bytes.extend_from_slice(&data);
                }
            }
            Ok(Some(Err(e))) => {
                let e: &(dyn std::error::Error + 'static) = &*e;
                return Err(if e.is::<LengthLimitError>() {
                    question.too_large(limit)
                } else {
                    question.broken(e)
                });
            }
        }
    }
}

fn basic(credentials: &Credentials) -> HeaderValue {
    let pair = format!("{}:{}", credentials.username, credentials.password.reveal());
    let mut header = HeaderValue::try_from(format!("Basic {}", BASE64_STANDARD.encode(pair)))
        .unwrap_or(HeaderValue::from_static("Basic"));
    header.set_sensitive(true);
    header
}

/// HTTP/1.1 only: a large layer over one multiplexed connection is slower than over its own.
fn http_client(url: &Url, timeouts: Timeouts) -> Result<HttpClient, String> {
    let mut connector = resolve::connector();
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(timeouts.connect));
    connector.set_keepalive(Some(Duration::from_secs(30)));
    let certificates = rustls_native_certs::load_native_certs();
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(certificates.certs);
    if roots.is_empty() && url.scheme() == "https" {
        return Err(
            "no CA certificates on this host: install the package ca-certificates, or name \
                    a file in the environment variable SSL_CERT_FILE"
                .to_owned(),
        );
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = HttpsConnectorBuilder::new()
        .with_tls_config(tls)
        .https_or_http()
        .enable_http1()
        .wrap_connector(connector);
    Ok(Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(Duration::from_secs(30))
        .build(connector))
}
