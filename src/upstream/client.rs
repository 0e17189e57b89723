//! Requests to one upstream: its token flow, its redirects, its deadlines.

use std::error::Error;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http::header::{AUTHORIZATION, LOCATION, USER_AGENT, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use url::Url;

use super::UpstreamError;
use super::challenge::Challenge;
use super::token::{Token, TokenKey, Tokens, may_receive_credentials, usable};
use crate::config::{Credentials, UpstreamSettings};
use crate::metrics::{Metrics, RegistryLabels, UpstreamLabels};
use crate::oci::{Name, RegistryHost};

pub use crate::config::Timeouts;

/// How many redirects are followed: a registry makes one, to its content delivery network.
const REDIRECTS: usize = 5;
/// The largest answer of a token server that is read, in bytes.
const TOKEN_LIMIT: usize = 256 * 1024;

type HttpClient = Client<HttpsConnector<HttpConnector>, Empty<Bytes>>;

/// One registry that is mirrored, and all that is remembered of it.
pub struct Upstream {
    settings: UpstreamSettings,
    timeouts: Timeouts,
    /// Made at the first request: reading the system's certificates is no part of a start.
    http: OnceLock<Result<HttpClient, String>>,
    /// Where the upstream has its tokens, once it has said so: then no request is made in vain.
    bearer: Mutex<Option<Bearer>>,
    tokens: Tokens,
    last: Mutex<LastContact>,
    metrics: Arc<Metrics>,
}

#[derive(Clone)]
struct Bearer {
    realm: Url,
    service: Option<String>,
}

/// What is known of an upstream from its last answers.
#[derive(Debug, Clone, Default)]
pub struct LastContact {
    /// When it last answered at all.
    pub answered: Option<SystemTime>,
    /// When it last did not, and why.
    pub failed: Option<(SystemTime, String)>,
    /// Pulls it says are left in its window, and how many the window has.
    pub budget: Option<(u64, Option<u64>)>,
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl Upstream {
    /// A client of the upstream; nothing is sent yet.
    pub fn new(settings: UpstreamSettings, timeouts: Timeouts, metrics: Arc<Metrics>) -> Self {
        Self {
            settings,
            timeouts,
            http: OnceLock::new(),
            bearer: Mutex::default(),
            tokens: Tokens::default(),
            last: Mutex::default(),
            metrics,
        }
    }

    /// The name clients know it by.
    pub fn registry(&self) -> &RegistryHost {
        &self.settings.registry
    }

    /// How it was configured.
    pub fn settings(&self) -> &UpstreamSettings {
        &self.settings
    }

    /// Its deadlines.
    pub fn timeouts(&self) -> Timeouts {
        self.timeouts
    }

    /// What is known from its last answers.
    pub fn last_contact(&self) -> LastContact {
        self.last
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Sends a request with a token for pulling `name`, where the upstream wants one. A 401 is
    /// answered once with a new token; the second is the caller's.
    pub(super) async fn send(
        &self,
        method: &Method,
        path: &str,
        name: &Name,
        what: &str,
        headers: &HeaderMap,
    ) -> Result<Response<Incoming>, UpstreamError> {
        let url = format!("{}{path}", self.settings.url.as_str().trim_end_matches('/'));
        let url = Url::parse(&url).map_err(|e| self.protocol_error(what, &e.to_string()))?;
        let scope = format!("repository:{name}:pull");
        let known = self
            .bearer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let known = known.map(|Bearer { realm, service }| TokenKey {
            realm,
            service,
            scope: scope.clone(),
        });
        let sent = match &known {
            Some(key) => Some(self.token(key, None, what).await?),
            None => None,
        };
        let response = self
            .follow(method, url.clone(), headers, sent.as_ref(), what)
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
        let authorization = match challenge {
            Challenge::Basic => match &self.settings.credentials {
                Some(credentials) => basic(credentials),
                None => return Ok(response),
            },
            Challenge::Bearer {
                realm,
                service,
                scope: wanted,
            } => {
                let realm = Url::parse(&realm).map_err(|e| {
                    self.protocol_error(what, &format!("a token realm {realm:?}: {e}"))
                })?;
                let bearer = Bearer {
                    realm: realm.clone(),
                    service: service.clone(),
                };
                *self.bearer.lock().unwrap_or_else(PoisonError::into_inner) = Some(bearer);
                let key = TokenKey {
                    realm,
                    service,
                    scope: wanted.unwrap_or(scope),
                };
                // A token was sent and refused: a new one, not the same once more.
                self.token(&key, sent.as_ref(), what).await?
            }
        };
        self.follow(method, url, headers, Some(&authorization), what)
            .await
    }

    /// A token, from memory or from the token server. However many ask, one request is made.
    async fn token(
        &self,
        key: &TokenKey,
        refused: Option<&HeaderValue>,
        what: &str,
    ) -> Result<HeaderValue, UpstreamError> {
        let slot = self.tokens.slot(key);
        let mut slot = slot.lock().await;
        if let Some(header) = usable(slot.as_ref()).filter(|header| Some(header) != refused) {
            return Ok(header);
        }
        let authorization = match &self.settings.credentials {
            Some(credentials) if may_receive_credentials(&key.realm, &self.settings.url) => {
                Some(basic(credentials))
            }
            Some(_) => {
                let reason = format!(
                    "it wants a token from {}, which is not on its own domain: the credentials of \
                     this upstream are not sent there",
                    key.realm
                );
                return Err(self.protocol_error(what, &reason));
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
            )
            .await?;
        let registry = self.registry().to_string();
        match response.status() {
            status if status.is_success() => {}
            StatusCode::TOO_MANY_REQUESTS => {
                return Err(UpstreamError::Limited {
                    registry,
                    what: what.to_owned(),
                });
            }
            StatusCode::UNAUTHORIZED if authorization.is_some() => {
                let reason = format!(
                    "its token server {} refuses our credentials (401)",
                    key.realm
                );
                return Err(self.protocol_error(what, &reason));
            }
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                return Err(UpstreamError::Denied {
                    registry,
                    what: what.to_owned(),
                    status,
                });
            }
            status => {
                return Err(UpstreamError::Status {
                    registry,
                    what: format!("a token for {what}"),
                    status,
                });
            }
        }
        let body = self.collect(response, TOKEN_LIMIT, what).await?;
        let token = Token::parse(&body, asked).map_err(|reason| {
            self.protocol_error(what, &format!("its token server sent {reason}"))
        })?;
        let header = token.header.clone();
        *slot = Some(token);
        Ok(header)
    }

    /// Sends a request and follows its redirects. `authorization` goes to the first host only: a
    /// content delivery network has its own signature in the URL, and no business with our token.
    async fn follow(
        &self,
        method: &Method,
        mut url: Url,
        headers: &HeaderMap,
        mut authorization: Option<&HeaderValue>,
        what: &str,
    ) -> Result<Response<Incoming>, UpstreamError> {
        for _ in 0..=REDIRECTS {
            let mut request = Request::builder()
                .method(method)
                .uri(url.as_str())
                .header(
                    USER_AGENT,
                    concat!("registry-agent/", env!("CARGO_PKG_VERSION")),
                )
                .body(Empty::new())
                .map_err(|e| self.protocol_error(what, &e.to_string()))?;
            request.headers_mut().extend(headers.clone());
            if let Some(authorization) = authorization {
                request
                    .headers_mut()
                    .insert(AUTHORIZATION, authorization.clone());
            }
            let response = self.exchange(request, what).await?;
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
                .ok_or_else(|| self.protocol_error(what, "a redirect to no URL"))?;
            if next.scheme() != url.scheme() && next.scheme() != "https" {
                // Neither is quoted: a signed URL is a credential.
                return Err(self.protocol_error(what, "a redirect from https to another scheme"));
            }
            if next.origin() != url.origin() {
                authorization = None;
            }
            url = next;
        }
        Err(self.protocol_error(what, &format!("more than {REDIRECTS} redirects")))
    }

    /// One request, one answer's head, within the deadline; counted and remembered.
    async fn exchange(
        &self,
        request: Request<Empty<Bytes>>,
        what: &str,
    ) -> Result<Response<Incoming>, UpstreamError> {
        let http = match self
            .http
            .get_or_init(|| http_client(&self.settings.url, self.timeouts))
        {
            Ok(http) => http,
            Err(reason) => return Err(self.failed(self.transport(what, reason.clone()))),
        };
        let deadline = self.timeouts.headers;
        let outcome = match tokio::time::timeout(deadline, http.request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(e)) => Err(self.transport_error(what, &e)),
            Err(_) => Err(self.timeout_error(what, deadline)),
        };
        match outcome {
            Ok(response) => {
                self.count(response.status().as_str());
                self.answered(response.headers());
                Ok(response)
            }
            Err(e) => {
                self.count("error");
                Err(self.failed(e))
            }
        }
    }

    fn count(&self, outcome: &str) {
        let labels = UpstreamLabels {
            registry: self.registry().to_string(),
            outcome: outcome.to_owned(),
        };
        self.metrics.upstream_requests.get_or_create(&labels).inc();
    }

    fn answered(&self, headers: &HeaderMap) {
        let number = |name: &str| -> Option<u64> {
            headers
                .get(name)?
                .to_str()
                .ok()?
                .split(';')
                .next()?
                .trim()
                .parse()
                .ok()
        };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.answered = Some(SystemTime::now());
        if let Some(remaining) = number("ratelimit-remaining") {
            last.budget = Some((remaining, number("ratelimit-limit")));
            let labels = RegistryLabels {
                registry: self.registry().to_string(),
            };
            let gauge = self.metrics.rate_limit_remaining.get_or_create(&labels);
            gauge.set(i64::try_from(remaining).unwrap_or(i64::MAX));
        }
    }

    fn failed(&self, error: UpstreamError) -> UpstreamError {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.failed = Some((SystemTime::now(), error.to_string()));
        error
    }

    pub(crate) fn protocol_error(&self, what: &str, reason: &str) -> UpstreamError {
        UpstreamError::Protocol {
            registry: self.registry().to_string(),
            what: what.to_owned(),
            reason: reason.to_owned(),
        }
    }

    pub(crate) fn timeout_error(&self, what: &str, deadline: Duration) -> UpstreamError {
        UpstreamError::Timeout {
            registry: self.registry().to_string(),
            what: what.to_owned(),
            deadline,
        }
    }

    pub(crate) fn transport_error(&self, what: &str, error: &dyn Error) -> UpstreamError {
        // The outermost error says only "client error (Connect)"; what happened is in its causes.
        let mut reason = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !reason.ends_with(&text) {
                reason = format!("{reason}: {text}");
            }
            cause = error.source();
        }
        self.transport(what, reason)
    }

    pub(crate) fn transport(&self, what: &str, reason: String) -> UpstreamError {
        UpstreamError::Transport {
            registry: self.registry().to_string(),
            what: what.to_owned(),
            reason,
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
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
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
