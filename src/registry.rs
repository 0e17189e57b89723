//! The HTTP edge: requests are parsed into typed values here, and answered in the words of the
//! distribution specification.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode};

mod activity;
mod blob;
mod body;
mod list;
mod manifest;
mod referrers;
mod route;
mod sendfile;
pub mod server;
mod tls;

pub use body::Body;

use route::{Route, RouteError};

use crate::config::Settings;
use crate::health::HealthWatch;
use crate::metrics::{Metrics, RequestLabels};
use crate::mirror::{Mirror, MirrorError};
use crate::oci::{ErrorBody, ErrorCode};

const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");
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
        if code == ErrorCode::Unavailable {
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

    /// Answers one request; never fails.
    pub async fn answer<B>(&self, request: Request<B>, settings: &Settings) -> Response<Body> {
        let started = Instant::now();
        let (parts, _) = request.into_parts();
        let route = Route::parse(&parts.uri);
        let kind = route.as_ref().map_or("other", Route::kind);
        let mut response = match route {
            Ok(route) => match self.at_once(&parts, &route) {
                Some(response) => Ok(response),
                // In a box: a download's state is large, and moved with every request otherwise.
                None => Box::pin(self.dispatch(&parts, route)).await,
            },
            Err(error) => Err(error.into()),
        }
        .unwrap_or_else(|refusal| error_answer(&refusal));
        let headers = response.headers_mut();
        headers.insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
        for (name, value) in &settings.headers {
            headers.append(name, value.clone());
        }
        if parts.method == Method::HEAD {
            *response.body_mut() = Body::empty();
        }
        let status = response.status();
        self.metrics
            .requests
            .get_or_create(&RequestLabels {
                route: kind,
                status: status.as_u16(),
            })
            .inc();
        let access = settings.log.access.then(|| body::Access {
            method: parts.method,
            path: parts.uri.path().to_owned(),
            agent: agent(&parts.headers),
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
    fn at_once(&self, request: &http::request::Parts, route: &Route) -> Option<Response<Body>> {
        let Route::Manifest {
            name,
            ns,
            reference,
        } = route
        else {
            return None;
        };
        if !matches!(request.method, Method::GET | Method::HEAD) {
            return None;
        }
        let source = self.mirror.source(name, ns.as_deref()).ok()?;
        let served = self.mirror.manifest_at_once(&source, reference)?;
        Some(manifest::respond(request, &served))
    }

    async fn dispatch(
        &self,
        request: &http::request::Parts,
        route: Route,
    ) -> Result<Response<Body>, Refusal> {
        if !matches!(request.method, Method::GET | Method::HEAD) {
            return Err(Refusal::new(
                ErrorCode::Unsupported,
                format!(
                    "{} is not supported: this is a mirror, from which images are pulled; push to the registry that has them",
                    request.method
                ),
            ));
        }
        match route {
            Route::Root => Ok(self.root()),
            Route::Base => Ok(json_answer(Bytes::from_static(b"{}"))),
            Route::Blob { name, ns, digest } => {
                let source = self.mirror.source(&name, ns.as_deref())?;
                blob::answer(&self.mirror, request, &source, &digest).await
            }
            Route::Manifest {
                name,
                ns,
                reference,
            } => {
                let source = self.mirror.source(&name, ns.as_deref())?;
                manifest::answer(&self.mirror, request, &source, &reference).await
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
            (StatusCode::OK, "ready\n".to_owned())
        } else {
            (StatusCode::SERVICE_UNAVAILABLE, "not ready\n".to_owned())
        };
        answer(status, "text/plain; charset=utf-8", Bytes::from(text))
    }
}

fn agent(headers: &http::HeaderMap) -> String {
    let agent = headers
        .get(http::header::USER_AGENT)
        .and_then(|value| value.to_str().ok());
    agent.unwrap_or("-").chars().take(120).collect()
}

fn answer(status: StatusCode, content_type: &'static str, bytes: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CONTENT_LENGTH, bytes.len().into());
    *response.body_mut() = Body::full(bytes);
    response
}

fn json_answer(bytes: Bytes) -> Response<Body> {
    answer(StatusCode::OK, "application/json", bytes)
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
