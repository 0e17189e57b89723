//! Manifests: distribution-spec 1.1, end-3.

use http::header::{AGE, CONTENT_LENGTH, CONTENT_TYPE, ETAG, WARNING};
use http::request::Parts;
use http::{HeaderValue, Response, StatusCode};

use super::blob::matches_etag;
use super::{Body, Refusal, STALE};
use crate::mirror::{Mirror, Served, Source};
use crate::oci::Reference;
use crate::upstream::CONTENT_DIGEST;

pub(super) async fn answer(
    mirror: &Mirror,
    request: &Parts,
    source: &Source,
    reference: &Reference,
) -> Result<Response<Body>, Refusal> {
    let served = mirror.manifest(source, reference).await?;
    Ok(respond(request, &served))
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
