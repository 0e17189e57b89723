//! Manifests: distribution-spec 1.1, end-3.

use http::header::{AGE, CONTENT_LENGTH, CONTENT_TYPE, ETAG, WARNING};
use http::request::Parts;
use http::{HeaderValue, Method, Response, StatusCode};

use super::blob::matches_etag;
use super::{Body, Refusal, STALE};
use crate::mirror::{Described, Mirror, Served, Source};
use crate::oci::Reference;
use crate::upstream::{CONTENT_DIGEST, Description};

pub(super) async fn answer(
    mirror: &Mirror,
    request: &Parts,
    source: &Source,
    reference: &Reference,
) -> Result<Response<Body>, Refusal> {
    if request.method == Method::HEAD {
        return Ok(match mirror.describe(source, reference).await? {
            Described::Served(served) => respond(request, &served),
            Described::Upstream(described) => respond_with(request, described),
        });
    }
    let served = mirror.manifest(source, reference).await?;
    Ok(respond(request, &served))
}

/// The answer to HEAD with what an upstream says of a manifest.
fn respond_with(request: &Parts, described: Description) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    for (name, value) in [
        (CONTENT_DIGEST, described.digest.to_string()),
        (ETAG, format!("\"{}\"", described.digest)),
    ] {
        if let Ok(value) = HeaderValue::try_from(value) {
            headers.insert(name, value);
        }
    }
    headers.insert(CONTENT_TYPE, described.media_type);
    if matches_etag(&request.headers, &described.digest) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return response;
    }
    headers.insert(CONTENT_LENGTH, described.size.into());
    response
}

/// The answer with a manifest.
pub(super) fn respond(request: &Parts, served: &Served) -> Response<Body> {
    let manifest = &served.manifest;
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    for (name, value) in [
        (CONTENT_DIGEST, manifest.digest.to_string()),
        (ETAG, format!("\"{}\"", manifest.digest)),
        // The manifest's own words, which came from an upstream.
        (CONTENT_TYPE, manifest.media_type.clone()),
    ] {
        if let Ok(value) = HeaderValue::try_from(value) {
            headers.insert(name, value);
        }
    }
    if let Some(age) = served.age {
        headers.insert(AGE, age.as_secs().into());
    }
    if served.stale.is_some() {
        headers.insert(WARNING, STALE);
    }
    if matches_etag(&request.headers, &manifest.digest) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return response;
    }
    headers.insert(CONTENT_LENGTH, manifest.bytes.len().into());
    *response.body_mut() = Body::full(manifest.bytes.clone());
    response
}
