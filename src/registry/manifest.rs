//! Manifests: distribution-spec 1.1, end-3.

use std::sync::Arc;

use http::header::{AGE, CONTENT_LENGTH, CONTENT_TYPE, ETAG, WARNING};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};

use super::blob::matches_etag;
use super::{API_VERSION, API_VERSION_VALUE, Body, Refusal, STALE};
use crate::mirror::{Described, Mirror, Served, Source};
use crate::oci::{Manifest, Reference};
use crate::upstream::{CONTENT_DIGEST, Description};

pub(super) async fn answer(
    mirror: &Mirror,
    method: &Method,
    asked: &HeaderMap,
    source: &Source,
    reference: &Reference,
) -> Result<Response<Body>, Refusal> {
    if method == Method::HEAD {
        let described = mirror.describe(source, reference).await?;
        return Ok(self::described(asked, described));
    }
    let served = mirror.manifest(source, reference).await?;
    Ok(respond(asked, &served))
}

/// The answer to HEAD.
pub(super) fn described(asked: &HeaderMap, described: Described) -> Response<Body> {
    match described {
        Described::Served(served) => respond(asked, &served),
        Described::Upstream(described) => respond_with(asked, described),
    }
}

/// The answer with a manifest that is hosted here.
pub(super) fn hosted(asked: &HeaderMap, manifest: Arc<Manifest>) -> Response<Body> {
    let served = Served {
        manifest,
        age: None,
        stale: None,
    };
    respond(asked, &served)
}

/// The answer to HEAD with what an upstream says of a manifest.
fn respond_with(asked: &HeaderMap, described: Description) -> Response<Body> {
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
    if matches_etag(asked, &described.digest) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return response;
    }
    headers.insert(CONTENT_LENGTH, described.size.into());
    response
}

/// The answer with a manifest, to a request with the headers `asked`.
pub(super) fn respond(asked: &HeaderMap, served: &Served) -> Response<Body> {
    let manifest = &served.manifest;
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    headers.clone_from(manifest.headers.get_or_init(|| describe(manifest)));
    match (headers.get_mut(AGE), served.age) {
        (Some(value), Some(age)) => *value = age.as_secs().into(),
        _ => drop(headers.remove(AGE)),
    }
    if served.stale.is_some() {
        headers.insert(WARNING, STALE);
    }
    if matches_etag(asked, &manifest.digest) {
        headers.remove(CONTENT_LENGTH);
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return response;
    }
    *response.body_mut() = Body::full(manifest.bytes.clone());
    response
}

/// The headers that a manifest has in every answer.
fn describe(manifest: &Manifest) -> HeaderMap {
    let mut headers = HeaderMap::new();
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
    headers.insert(CONTENT_LENGTH, manifest.bytes.len().into());
    // What most answers have beside: to put it into a copy of this would make the copy grow.
    headers.insert(API_VERSION, API_VERSION_VALUE);
    headers.insert(AGE, HeaderValue::from_static("0"));
    headers
}
