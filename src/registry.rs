//! The HTTP edge: requests are parsed into typed values here, and answered in the words of the
//! distribution specification.

use std::future::Ready;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::Either;
use http::header::{ALLOW, CONTENT_LENGTH, EXPECT, RETRY_AFTER};
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use serde_json::Value;

mod access;
mod activity;
mod blob;
mod body;
mod list;
mod manifest;
mod peers;
mod push;
mod referrers;
mod route;
mod sendfile;
pub mod server;
mod tls;
mod token;
mod upload;

pub use body::{Body, TEXT};
pub use sendfile::Outbox;

use route::{Route, RouteError};

use crate::config::Settings;
use crate::health::HealthWatch;
use crate::hosted::users::Gate;
use crate::hosted::{self, Hosted, HostedError, Payload};
use crate::metrics::{Metrics, RequestLabels};
use crate::mirror::{Mirror, MirrorError, Source};
use crate::oci::{Digest, ErrorBody, ErrorCode, Name};
use crate::store::layout::Repository;

/// Characters of a request's target that are logged: no name and digest of ours has more.
const TARGET_LOGGED: usize = 512;
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");
const API_VERSION_VALUE: HeaderValue = HeaderValue::from_static("registry/2.0");
/// Says which registry a request was taken to mean: distribution-spec 1.1, "Registry Proxying".
const NAMESPACE: HeaderName = HeaderName::from_static("oci-namespace");
/// What is served was not confirmed. Registries are to say all that they warn of as 299, and to give
/// no name of their own: distribution-spec 1.1, "Warnings".
const STALE: HeaderValue = HeaderValue::from_static("299 - \"Response is Stale\"");
/// Seconds after which a client that got a 503 may come back. Clients with another place to go
/// don't wait for it.
const RETRY_SECONDS: HeaderValue = HeaderValue::from_static("5");

/// Bytes of a request that are read, and forgotten, when it is refused: clients that send all
/// before they listen would find the connection closed.
const DRAINED: u64 = 32 * 1024 * 1024;

/// An error answer: a code and a message for people.
#[derive(Debug)]
struct Refusal {
    code: ErrorCode,
    status: StatusCode,
    message: String,
    /// What it is about, one for each error.
    details: Vec<Value>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Refusal {
    fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            status: code.status(),
            message: message.into(),
            details: Vec::new(),
            headers: Vec::new(),
        }
    }

    /// With another status than the code's own.
    fn with_status(self, status: StatusCode) -> Self {
        Self { status, ..self }
    }

    fn with_header(mut self, name: HeaderName, value: impl TryInto<HeaderValue>) -> Self {
        // Made of names and numbers, always a valid header.
        if let Ok(value) = value.try_into() {
            self.headers.push((name, value));
        }
        self
    }
}

impl From<MirrorError> for Refusal {
    /// Never a 401, with which some clients hand over the user's own credentials, and never a 429,
    /// which clients retry here at once: with 404 and 503 they go to the registry itself.
    fn from(error: MirrorError) -> Self {
        let code = match &error {
            MirrorError::BlobUnknown(_) => ErrorCode::BlobUnknown,
            MirrorError::ManifestUnknown(_) => ErrorCode::ManifestUnknown,
            MirrorError::NameUnknown(_)
            | MirrorError::NotMirrored { .. }
            | MirrorError::NotHosted(_)
            | MirrorError::Hosted(_) => ErrorCode::NameUnknown,
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
        let refusal = Self::new(code, error.to_string());
        match error {
            MirrorError::TooLarge(_) => refusal.with_status(StatusCode::PAYLOAD_TOO_LARGE),
            _ => refusal,
        }
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
    hosted: Hosted,
    gate: Gate,
    health: HealthWatch,
    metrics: Arc<Metrics>,
}

/// What a request is about, and what it brings, where it brings anything.
struct Asked {
    request: Request<()>,
    route: Route,
    /// Where it is about a hosted name: its repository.
    hosted: Option<Repository>,
    outbox: Option<Outbox>,
}

impl Registry {
    /// The API over a mirror and what is hosted beside it, where `gate` lets users in.
    pub fn new(
        mirror: Mirror,
        hosted: Hosted,
        gate: Gate,
        health: HealthWatch,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            mirror,
            hosted,
            gate,
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
    ) -> Answer
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let started = settings.log.access.then(Instant::now);
        let (head, body) = request.into_parts();
        let request = Request::from_parts(head, ());
        let route = Route::parse(request.uri());
        let kind = route.as_ref().map_or("other", Route::kind);
        let response = match route {
            Ok(route) => {
                let hosted = hosted_by(&settings, &route);
                let needed = access::needed(&settings, &request, &route, hosted.is_some());
                let known = self.recalls(&request, &needed);
                let at_once = known.then(|| self.at_once(&request, &route, hosted.as_ref()));
                match at_once.flatten() {
                    Some(response) => response,
                    None => {
                        let (registry, outbox) = (self.clone(), outbox.cloned());
                        let asked = Asked {
                            request,
                            route,
                            hosted,
                            outbox,
                        };
                        if reads(asked.request.method()) {
                            return Either::Right(Box::pin(async move {
                                registry
                                    .respond(asked, kind, needed, settings, started)
                                    .await
                            }));
                        }
                        let serving = settings.serving.as_ref();
                        let idle = serving.map_or(Duration::ZERO, |it| it.clients.idle);
                        let payload = Payload::new(body, idle);
                        return Either::Right(Box::pin(async move {
                            let writing =
                                registry.write(asked, payload, kind, needed, settings, started);
                            writing.await
                        }));
                    }
                }
            }
            Err(error) => error_answer(&error.into()),
        };
        let response = self.finish(&request, kind, response, &settings, started);
        Either::Left(std::future::ready(response))
    }

    /// The answer to a request that changes nothing.
    async fn respond(
        self,
        asked: Asked,
        kind: &'static str,
        needed: access::Needed,
        settings: Arc<Settings>,
        started: Option<Instant>,
    ) -> Response<Body> {
        let answered = match self.admit(&asked.request, &needed, &settings).await {
            Ok(()) => self.dispatch(&asked, &settings).await,
            Err(refusal) => Err(refusal),
        };
        let response = answered.unwrap_or_else(|refusal| error_answer(&refusal));
        self.finish(&asked.request, kind, response, &settings, started)
    }

    /// The answer to a request that is to change something. It goes on when its client leaves, so
    /// that what it was at is left in order.
    async fn write(
        self,
        asked: Asked,
        mut payload: Payload,
        kind: &'static str,
        needed: access::Needed,
        settings: Arc<Settings>,
        started: Option<Instant>,
    ) -> Response<Body> {
        let (registry, told) = (self.clone(), Arc::clone(&settings));
        let writing = tokio::spawn(async move {
            let answered = match registry.admit(&asked.request, &needed, &told).await {
                Ok(()) => registry.change(&asked, &mut payload, &told).await,
                Err(refusal) => Err(refusal),
            };
            // Who waits to be told to go on sends nothing when it is told something else.
            if answered.is_err() && !asked.request.headers().contains_key(EXPECT) {
                payload.drain(DRAINED).await;
            }
            (asked.request, answered)
        });
        match writing.await {
            Ok((request, answered)) => {
                let response = answered.unwrap_or_else(|refusal| error_answer(&refusal));
                self.finish(&request, kind, response, &settings, started)
            }
            // It has panicked, which is in the log.
            Err(_) => {
                let message = "the request was given up; the log says how";
                error_answer(&Refusal::new(ErrorCode::Unavailable, message))
            }
        }
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
        if let Some(namespace) = request.uri().query().and_then(route::namespace) {
            headers.insert(NAMESPACE, namespace);
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
    fn at_once(
        &self,
        request: &Request<()>,
        route: &Route,
        hosted: Option<&Repository>,
    ) -> Option<Response<Body>> {
        let Route::Manifest {
            name,
            ns,
            reference,
            ..
        } = route
        else {
            return None;
        };
        if !reads(request.method()) {
            return None;
        }
        if let Some(of) = hosted
            && !self.hosted.is_in_bucket()
        {
            let manifest = self.hosted.manifest_at_once(of, reference)?;
            return Some(manifest::hosted(request.headers(), manifest));
        }
        let source = self.source(hosted, name, ns.as_deref()).ok()?;
        if self.is_now(request, hosted) {
            return None;
        }
        let served = self.mirror.manifest_at_once(&source, reference)?;
        Some(manifest::respond(request.headers(), &served))
    }

    /// Where what a request is about is found. What was pushed to a bucket is under its own name.
    fn source(
        &self,
        hosted: Option<&Repository>,
        name: &Name,
        ns: Option<&str>,
    ) -> Result<Source, MirrorError> {
        match hosted.and_then(|of| self.mirror.in_bucket(of)) {
            Some(source) => Ok(source),
            None => self.mirror.source(name, ns),
        }
    }

    /// Whether a request is about what is in a writer's bucket now: a client that pushes leaves out
    /// what HEAD says is there.
    fn is_now(&self, request: &Request<()>, hosted: Option<&Repository>) -> bool {
        hosted.is_some() && self.hosted.is_in_bucket() && request.method() == Method::HEAD
    }

    /// What is asked for, and changes nothing.
    async fn dispatch(
        &self,
        asked: &Asked,
        settings: &Settings,
    ) -> Result<Response<Body>, Refusal> {
        let (request, outbox) = (&asked.request, asked.outbox.clone());
        let of = asked.hosted.as_ref();
        if let Some(of) = of
            && (!self.hosted.is_in_bucket() || matches!(asked.route, Route::Upload { .. }))
        {
            return push::answer(&self.hosted, asked, of).await;
        }
        let is_now = self.is_now(request, of);
        match &asked.route {
            Route::Root => Ok(self.root()),
            Route::Base => Ok(json_answer(Bytes::from_static(b"{}"))),
            Route::Blob { name, ns, digest } => {
                let source = self.source(of, name, ns.as_deref())?;
                if let Some(of) = of.filter(|_| is_now) {
                    let size = self.size_to_push(of, &source, digest).await?;
                    return Ok(blob::about_size(request, digest, size));
                }
                blob::answer(&self.mirror, request, &source, digest, outbox).await
            }
            Route::Manifest {
                name,
                ns,
                reference,
                ..
            } => {
                let source = self.source(of, name, ns.as_deref())?;
                if is_now {
                    let described = self.mirror.describe_now(&source, reference).await?;
                    return Ok(manifest::described(request.headers(), described));
                }
                let (method, asked) = (request.method(), request.headers());
                manifest::answer(&self.mirror, method, asked, &source, reference).await
            }
            Route::Tags { name, ns, page } => {
                let source = self.source(of, name, ns.as_deref())?;
                list::tags(&self.mirror, &source, name, ns.as_deref(), page).await
            }
            Route::Referrers {
                name,
                ns,
                digest,
                artifact_type,
                ..
            } => {
                let source = self.source(of, name, ns.as_deref())?;
                referrers::answer(&self.mirror, &source, digest, artifact_type.as_deref()).await
            }
            Route::Catalog { page } => list::catalog(&self.mirror, page).await,
            Route::Token { scopes } => token::get(&self.gate, request, scopes, settings).await,
            Route::Upload { name, .. } => Err(not_hosted(settings, request.method(), Some(name))),
        }
    }

    /// The size of a blob as a writer's bucket has it now: who pushes leaves out what is said to be
    /// there. Where the bucket can't be asked, it is what is cached.
    async fn size_to_push(
        &self,
        of: &Repository,
        source: &Source,
        digest: &Digest,
    ) -> Result<Option<u64>, Refusal> {
        match self.hosted.use_layer(of, digest).await {
            Ok(Some(size)) => Ok(Some(size)),
            Ok(None) => Err(HostedError::BlobUnknown(of.clone(), digest.clone()).into()),
            Err(HostedError::Bucket(_)) => Ok(self.mirror.blob_size(source, digest).await?),
            Err(error) => Err(error.into()),
        }
    }

    /// What is to change something.
    async fn change(
        &self,
        asked: &Asked,
        payload: &mut Payload,
        settings: &Settings,
    ) -> Result<Response<Body>, Refusal> {
        let method = asked.request.method();
        if let Route::Token { .. } = &asked.route {
            return token::change(&self.gate, &asked.request, payload, settings).await;
        }
        let (Some(of), Some(serving)) = (&asked.hosted, &settings.serving) else {
            return Err(not_hosted(settings, method, asked.route.name()));
        };
        Hosted::check_push(&serving.hosted, of)?;
        match &asked.route {
            Route::Upload { id, wanted, .. } => {
                let id = id.as_deref();
                upload::change(&self.hosted, asked, of, (id, wanted), payload, serving).await
            }
            _ => push::change(&self.hosted, asked, of, payload, &serving.hosted).await,
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

/// Whether a request changes nothing, by its method.
fn reads(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD)
}

/// The repository of a request about a hosted name.
fn hosted_by(settings: &Settings, route: &Route) -> Option<Repository> {
    let hosted = &settings.serving.as_ref()?.hosted;
    if hosted.names.is_empty() {
        return None;
    }
    hosted::repository(hosted, route.name()?, route.ns())
}

/// A push, or a delete, where nothing can be.
fn not_hosted(settings: &Settings, method: &Method, name: Option<&Name>) -> Refusal {
    let hosted = settings
        .serving
        .as_ref()
        .map(|serving| &serving.hosted.names);
    let message = match (name, hosted) {
        (Some(name), Some(hosted)) if !hosted.is_empty() => format!(
            "{method} is not supported for {name}, which is mirrored: pushes are taken for {hosted} \
             alone (`hosted`); push to the registry that has {name}"
        ),
        (_, Some(hosted)) if !hosted.is_empty() => {
            format!("{method} is not supported here: pushes are taken for {hosted} (`hosted`)")
        }
        _ => format!(
            "{method} is not supported: this is a mirror, from which images are pulled; push to the \
             registry that has them"
        ),
    };
    Refusal::new(ErrorCode::Unsupported, message)
}

fn error_answer(refusal: &Refusal) -> Response<Body> {
    let body = ErrorBody::new(refusal.code, &refusal.message, &refusal.details);
    let body = serde_json::to_vec(&body);
    let mut response = json_answer(body.unwrap_or_default().into());
    *response.status_mut() = refusal.status;
    for (name, value) in &refusal.headers {
        response.headers_mut().append(name, value.clone());
    }
    match refusal.status {
        StatusCode::SERVICE_UNAVAILABLE => {
            response.headers_mut().insert(RETRY_AFTER, RETRY_SECONDS);
        }
        StatusCode::METHOD_NOT_ALLOWED if !response.headers().contains_key(ALLOW) => {
            response
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        }
        _ => {}
    }
    response
}
