//! The HTTP edge: requests are parsed into typed values here, and answered in the words of the
//! distribution specification.

use std::future::Ready;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::future::Either;
use http::header::{ALLOW, CONTENT_LENGTH, RETRY_AFTER};
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode};

mod activity;
mod blob;
mod body;
mod list;
mod manifest;
mod peers;
mod referrers;
mod route;
mod sendfile;
pub mod server;
mod tls;

pub use body::{Body, TEXT};
pub use sendfile::Outbox;

use route::{Route, RouteError};

use crate::config::Settings;
use crate::health::HealthWatch;
use crate::metrics::{Metrics, RequestLabels};
use crate::mirror::{Mirror, MirrorError};
use crate::oci::{ErrorBody, ErrorCode};

/// Characters of a request's target that are logged: no name and digest of ours has more.
const TARGET_LOGGED: usize = 512;
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");
const API_VERSION_VALUE: HeaderValue = HeaderValue::from_static("registry/2.0");
/// What is served was not confirmed. Source: RFC 7234, 5.5.1.
const STALE: HeaderValue = HeaderValue::from_static("110 registry-agent \"Response is Stale\"");
/// Seconds after which a client that got a 503 may come back. Clients with another place to go
/// don't wait for it.
const RETRY_SECONDS: HeaderValue = HeaderValue::from_static("5");

/// An error answer: a code and a message for people.
#[derive(Debug)]
struct Refusal {
    code: ErrorCode,
    status: StatusCode,
    message: String,
}

impl Refusal {
    fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            status: code.status(),
            message: message.into(),
        }
    }
}

impl From<MirrorError> for Refusal {
    /// Never a 401, with which some clients hand over the user's own credentials, and never a 429,
    /// which clients retry here at once: with 404 and 503 they go to the registry itself.
    fn from(error: MirrorError) -> Self {
        let code = match &error {
            MirrorError::BlobUnknown(_) => ErrorCode::BlobUnknown,
            MirrorError::ManifestUnknown(_) => ErrorCode::ManifestUnknown,
            MirrorError::NameUnknown(_) | MirrorError::NotMirrored { .. } => ErrorCode::NameUnknown,
            MirrorError::TooLarge(_) => ErrorCode::ManifestInvalid,
            MirrorError::Unavailable(_)
            | MirrorError::Mismatch { .. }
            | MirrorError::Store(_)
            | MirrorError::Abandoned(_) => ErrorCode::Unavailable,
        };
        if let MirrorError::Store(error) = &error {
            // Paths are for the log, not for clients.
            tracing::error!(%error, "the store failed: {error}");
            return Self::new(code, "this mirror's storage failed; its log says how");
        }
        if matches!(code, ErrorCode::Unavailable | ErrorCode::ManifestInvalid) {
            // Clients go elsewhere without a word: only here can the operator learn of it.
            tracing::warn!(%error, "a request could not be answered: {error}");
        }
        Self::new(code, error.to_string())
    }
}

impl From<RouteError> for Refusal {
    fn from(error: RouteError) -> Self {
        let code = match &error {
            RouteError::Name(_) => ErrorCode::NameInvalid,
            RouteError::Digest(_) => ErrorCode::DigestInvalid,
            // What can't be a tag is the tag of no manifest.
            RouteError::Tag(_) => ErrorCode::ManifestUnknown,
            RouteError::Nothing => ErrorCode::NameUnknown,
            RouteError::Page(_) => ErrorCode::PaginationNumberInvalid,
        };
        Self::new(code, error.to_string())
    }
}

/// An answer: most are there at once, and need no future to be made and moved for them.
pub type Answer =
    Either<Ready<Response<Body>>, Pin<Box<dyn Future<Output = Response<Body>> + Send>>>;

/// The registry's API. Cheap to clone.
#[derive(Clone)]
pub struct Registry {
    mirror: Mirror,
    health: HealthWatch,
    metrics: Arc<Metrics>,
}

impl Registry {
    /// The API over a mirror.
    pub fn new(mirror: Mirror, health: HealthWatch, metrics: Arc<Metrics>) -> Self {
        Self {
            mirror,
            health,
            metrics,
        }
    }

    /// Answers one request; never fails. `outbox` is that of the connection, where it has one.
    pub fn answer<B>(
        &self,
        request: Request<B>,
        outbox: Option<&Outbox>,
        settings: Arc<Settings>,
    ) -> Answer {
        let started = settings.log.access.then(Instant::now);
        let request = request.map(drop);
        let route = Route::parse(request.uri());
        let kind = route.as_ref().map_or("other", Route::kind);
        let response = match route {
            Ok(route) => match self.at_once(&request, &route) {
                Some(response) => response,
                None => {
                    let (registry, outbox) = (self.clone(), outbox.cloned());
                    return Either::Right(Box::pin(async move {
                        let response = registry.dispatch(&request, route, outbox).await;
                        let response = response.unwrap_or_else(|refusal| error_answer(&refusal));
                        registry.finish(&request, kind, response, &settings, started)
                    }));
                }
            },
            Err(error) => error_answer(&error.into()),
        };
        let response = self.finish(&request, kind, response, &settings, started);
        Either::Left(std::future::ready(response))
    }

    /// What all answers have in common.
    fn finish(
        &self,
        request: &Request<()>,
        kind: &'static str,
        mut response: Response<Body>,
        settings: &Settings,
        started: Option<Instant>,
    ) -> Response<Body> {
        let headers = response.headers_mut();
        if !headers.contains_key(API_VERSION) {
            headers.insert(API_VERSION, API_VERSION_VALUE);
        }
        for (name, value) in settings.serving.iter().flat_map(|serving| &serving.headers) {
            headers.append(name, value.clone());
        }
        if request.method() == Method::HEAD {
            *response.body_mut() = Body::empty();
        }
        let status = response.status();
        self.metrics.answers.inc();
        self.metrics
            .requests
            .get_or_create(&RequestLabels {
                route: kind,
                status: status.as_u16(),
            })
            .inc();
        // What only asks whether anybody is here: load balancers, every client of a fleet and the
        // watchdog do that every few seconds.
        let check = matches!(kind, "root" | "base") && status.is_success();
        let started = started.filter(|_| !check);
        let access = started.map(|started| body::Access {
            method: request.method().clone(),
            // With its query: `ns` is which registry was meant.
            target: request
                .uri()
                .path_and_query()
                .map_or_else(String::new, |target| {
                    target.as_str().chars().take(TARGET_LOGGED).collect()
                }),
            agent: agent(request.headers()),
            status,
            started,
        });
        let content = matches!(kind, "blob" | "manifest") && status.is_success();
        let served = content.then(|| self.metrics.served_bytes.clone());
        let promised = response.headers().get(CONTENT_LENGTH);
        let promised = promised.and_then(|length| length.to_str().ok()?.parse().ok());
        response.map(|body| body.observed(promised, served, access))
    }

    /// The answer to what needs no waiting.
    fn at_once(&self, request: &Request<()>, route: &Route) -> Option<Response<Body>> {
        let Route::Manifest {
            name,
            ns,
            reference,
        } = route
        else {
            return None;
        };
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return None;
        }
        let source = self.mirror.source(name, ns.as_deref()).ok()?;
        let served = self.mirror.manifest_at_once(&source, reference)?;
        Some(manifest::respond(request.headers(), &served))
    }

    async fn dispatch(
        &self,
        request: &Request<()>,
        route: Route,
        outbox: Option<Outbox>,
    ) -> Result<Response<Body>, Refusal> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return Err(Refusal::new(
                ErrorCode::Unsupported,
                format!(
                    "{} is not supported: this is a mirror, from which images are pulled; push to the registry that has them",
                    request.method()
                ),
            ));
        }
        match route {
            Route::Root => Ok(self.root()),
            Route::Base => Ok(json_answer(Bytes::from_static(b"{}"))),
            Route::Blob { name, ns, digest } => {
                let source = self.mirror.source(&name, ns.as_deref())?;
                blob::answer(&self.mirror, request, &source, &digest, outbox).await
            }
            Route::Manifest {
                name,
                ns,
                reference,
            } => {
                let source = self.mirror.source(&name, ns.as_deref())?;
                let (method, asked) = (request.method(), request.headers());
                manifest::answer(&self.mirror, method, asked, &source, &reference).await
            }
            Route::Tags { name, ns, page } => {
                let source = self.mirror.source(&name, ns.as_deref())?;
                list::tags(&self.mirror, &source, &name, ns.as_deref(), &page).await
            }
            Route::Referrers {
                name,
                ns,
                digest,
                artifact_type,
            } => {
                let source = self.mirror.source(&name, ns.as_deref())?;
                referrers::answer(&self.mirror, &source, &digest, artifact_type.as_deref()).await
            }
            Route::Catalog { page } => list::catalog(&self.mirror, &page).await,
            Route::Upload => Err(Refusal::new(
                ErrorCode::Unsupported,
                "uploads are not supported: this is a mirror, from which images are pulled",
            )),
        }
    }

    /// For load balancers: 200 while, and only while, the agent is ready.
    fn root(&self) -> Response<Body> {
        let health = self.health.borrow();
        let (status, text) = if health.ready {
            (StatusCode::OK, "ready\n")
        } else {
            (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
        };
        Body::answer(status, TEXT, text)
    }
}

fn agent(headers: &http::HeaderMap) -> String {
    let agent = headers
        .get(http::header::USER_AGENT)
        .and_then(|value| value.to_str().ok());
    agent.unwrap_or("-").chars().take(120).collect()
}

fn json_answer(bytes: Bytes) -> Response<Body> {
    Body::answer(StatusCode::OK, "application/json", bytes)
}

fn error_answer(refusal: &Refusal) -> Response<Body> {
    let body = serde_json::to_vec(&ErrorBody::new(refusal.code, &refusal.message));
    let mut response = json_answer(body.unwrap_or_default().into());
    *response.status_mut() = refusal.status;
    match refusal.status {
        StatusCode::SERVICE_UNAVAILABLE => {
            response.headers_mut().insert(RETRY_AFTER, RETRY_SECONDS);
        }
        StatusCode::METHOD_NOT_ALLOWED => {
            response
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        }
        _ => {}
    }
    response
}
