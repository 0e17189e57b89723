//! Uploads: distribution-spec 1.1, end-4 to end-6, end-11, end-13 and end-14.

use http::header::{ALLOW, CONTENT_LENGTH, CONTENT_RANGE, LOCATION, RANGE};
use http::{HeaderMap, HeaderName, Method, Response, StatusCode};

use super::push::{created, empty, set};
use super::route::Wanted;
use super::{Asked, Body, Refusal};
use crate::config::Serving;
use crate::hosted::{self, Chunk, Held, Hosted, HostedError, Payload};
use crate::oci::{Algorithm, Digest, ErrorCode, Name};
use crate::store::layout::Repository;
use crate::store::upload::UploadId;

/// The upload's name: docker's own, beside the location.
const UPLOAD_UUID: HeaderName = HeaderName::from_static("docker-upload-uuid");

/// What is to change an upload, or to begin one.
pub(super) async fn change(
    hosted: &Hosted,
    asked: &Asked,
    of: &Repository,
    (id, wanted): (Option<&str>, &Wanted),
    payload: &mut Payload,
    serving: &Serving,
) -> Result<Response<Body>, Refusal> {
    let (method, headers) = (asked.request.method(), asked.request.headers());
    let Some(name) = asked.route.name() else {
        return Err(HostedError::UploadUnknown.into());
    };
    match (id, method) {
        (None, &Method::POST) => begin(hosted, of, name, wanted, headers, payload, serving).await,
        (Some(id), &Method::PATCH) => {
            let mut held = hosted.hold(of, parse(id)?).await?;
            let received = receive(hosted, &mut held, headers, payload).await;
            at(received, name, &held)?;
            Ok(progress(StatusCode::ACCEPTED, name, &held))
        }
        (Some(id), &Method::PUT) => {
            let digest = digest(wanted.digest.as_deref())?;
            let mut held = hosted.hold(of, parse(id)?).await?;
            hosted.hash_by(&mut held, digest.algorithm());
            let received = receive(hosted, &mut held, headers, payload).await;
            at(received, name, &held)?;
            hosted.commit(held, &digest).await?;
            Ok(created(&format!("/v2/{name}/blobs/{digest}"), &digest))
        }
        (Some(id), &Method::DELETE) => {
            hosted.cancel(of, parse(id)?).await?;
            Ok(empty(StatusCode::NO_CONTENT))
        }
        (id, method) => {
            let allowed = match id {
                Some(_) => "GET, PATCH, PUT, DELETE",
                None => "POST",
            };
            let message = format!("{method} means nothing here: allowed are {allowed}");
            let refusal = Refusal::new(ErrorCode::Unsupported, message);
            Err(refusal.with_header(ALLOW, allowed))
        }
    }
}

/// How far an upload is.
pub(super) async fn status(
    hosted: &Hosted,
    of: &Repository,
    name: &Name,
    id: Option<&str>,
) -> Result<Response<Body>, Refusal> {
    let Some(id) = id else {
        let message = "an upload begins by POST";
        return Err(Refusal::new(ErrorCode::Unsupported, message).with_header(ALLOW, "POST"));
    };
    let held = hosted.hold(of, parse(id)?).await?;
    Ok(progress(StatusCode::NO_CONTENT, name, &held))
}

async fn begin(
    hosted: &Hosted,
    of: &Repository,
    name: &Name,
    wanted: &Wanted,
    headers: &HeaderMap,
    payload: &mut Payload,
    serving: &Serving,
) -> Result<Response<Body>, Refusal> {
    if let Some(mount) = &wanted.mount {
        let digest = digest(Some(mount))?;
        let from = wanted.from.as_deref().map(str::parse::<Name>).transpose();
        let from = from.map_err(|e| Refusal::new(ErrorCode::NameInvalid, e.to_string()))?;
        // What is an upstream's is not ours to give.
        let source = from
            .as_ref()
            .map(|from| hosted::repository(&serving.hosted, from, None));
        let mounted = match &source {
            Some(None) => false,
            Some(Some(from)) => hosted.mount(of, &digest, Some(from)).await?,
            None => hosted.mount(of, &digest, None).await?,
        };
        if mounted {
            return Ok(created(&format!("/v2/{name}/blobs/{digest}"), &digest));
        }
        let held = hosted.begin(of, digest.algorithm()).await?;
        return Ok(progress(StatusCode::ACCEPTED, name, &held));
    }
    if let Some(said) = &wanted.digest {
        let digest = digest(Some(said))?;
        let mut held = hosted.begin(of, digest.algorithm()).await?;
        let id = held.id();
        let received = receive(hosted, &mut held, headers, payload).await;
        if let Err(error) = received {
            // Nobody was told of it, so that nobody could go on with it.
            drop(held);
            let _ = hosted.cancel(of, id).await;
            return Err(error);
        }
        if let Err(error) = hosted.commit(held, &digest).await {
            let _ = hosted.cancel(of, id).await;
            return Err(error.into());
        }
        return Ok(created(&format!("/v2/{name}/blobs/{digest}"), &digest));
    }
    let algorithm = wanted
        .algorithm
        .as_deref()
        .map_or(Some(Algorithm::Sha256), Algorithm::named);
    let algorithm = algorithm.ok_or_else(|| {
        let message = "digest-algorithm is none that this registry knows: sha256 or sha512";
        Refusal::new(ErrorCode::DigestInvalid, message)
    })?;
    let held = hosted.begin(of, algorithm).await?;
    Ok(progress(StatusCode::ACCEPTED, name, &held))
}

async fn receive(
    hosted: &Hosted,
    held: &mut Held,
    headers: &HeaderMap,
    payload: &mut Payload,
) -> Result<(), Refusal> {
    let chunk = chunk(headers)?;
    Ok(hosted.receive(held, payload, chunk).await?)
}

/// Tells who sent the wrong chunk where to go on.
fn at(received: Result<(), Refusal>, name: &Name, held: &Held) -> Result<(), Refusal> {
    received.map_err(|refusal| {
        if refusal.status != StatusCode::RANGE_NOT_SATISFIABLE {
            return refusal;
        }
        refusal
            .with_header(LOCATION, location(name, held))
            .with_header(RANGE, range(held))
    })
}

fn location(name: &Name, held: &Held) -> String {
    format!("/v2/{name}/blobs/uploads/{}", held.id())
}

/// `0-<last byte>`; of nothing as well, as in distribution, by which clients know it.
fn range(held: &Held) -> String {
    format!("0-{}", held.length().saturating_sub(1))
}

fn progress(status: StatusCode, name: &Name, held: &Held) -> Response<Body> {
    let mut response = empty(status);
    set(&mut response, LOCATION, &location(name, held));
    set(&mut response, RANGE, &range(held));
    set(&mut response, UPLOAD_UUID, &held.id().to_string());
    if status != StatusCode::NO_CONTENT {
        response.headers_mut().insert(CONTENT_LENGTH, 0.into());
    }
    response
}

fn parse(id: &str) -> Result<UploadId, Refusal> {
    id.parse().map_err(|_| HostedError::UploadUnknown.into())
}

fn digest(said: Option<&str>) -> Result<Digest, Refusal> {
    let Some(said) = said else {
        let message = "`digest` is missing: an upload ends with the digest of all of it";
        return Err(Refusal::new(ErrorCode::DigestInvalid, message));
    };
    said.parse().map_err(|error: crate::oci::DigestError| {
        Refusal::new(ErrorCode::DigestInvalid, error.to_string())
    })
}

/// Which bytes a request brings: `Content-Range: <first>-<last>`, both included, and `Content-Length`.
fn chunk(headers: &HeaderMap) -> Result<Chunk, Refusal> {
    let length = headers.get(CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    let Some(range) = headers.get(CONTENT_RANGE) else {
        return Ok(Chunk {
            start: None,
            length,
        });
    };
    let wrong = |message: &str| Err(Refusal::new(ErrorCode::BlobUploadInvalid, message));
    let number = |text: &str| -> Option<u64> {
        // `parse` would take a sign.
        text.bytes()
            .all(|c| c.is_ascii_digit())
            .then(|| text.parse().ok())?
    };
    let ends = range.to_str().ok().and_then(|range| {
        let (first, last) = range.split_once('-')?;
        number(first).zip(number(last))
    });
    let Some((first, last)) = ends else {
        return wrong("Content-Range is not <first byte>-<last byte>, in decimal numbers");
    };
    let Some(said) = last.checked_sub(first).and_then(|it| it.checked_add(1)) else {
        return wrong("Content-Range ends before it begins");
    };
    if length.is_some_and(|length| length != said) {
        let message = "Content-Range and Content-Length are not about as many bytes";
        return Err(Refusal::new(ErrorCode::SizeInvalid, message));
    }
    Ok(Chunk {
        start: Some(first),
        length: Some(said),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn a_chunk_says_which_bytes_it_has() {
        for (range, length, expected) in [
            (None, None, Some((None, None))),
            (None, Some("5"), Some((None, Some(5)))),
            (Some("0-4"), Some("5"), Some((Some(0), Some(5)))),
            (Some("5-9"), None, Some((Some(5), Some(5)))),
            (Some("0-4"), Some("4"), None),
            (Some("4-0"), None, None),
            (Some("bytes 0-4"), None, None),
            (Some("0-4/5"), None, None),
            (Some("+0-4"), None, None),
            (Some("0-18446744073709551615"), None, None),
            (Some("-"), None, None),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(range) = range {
                headers.insert(CONTENT_RANGE, HeaderValue::from_static(range));
            }
            if let Some(length) = length {
                headers.insert(CONTENT_LENGTH, HeaderValue::from_static(length));
            }
            let found = chunk(&headers)
                .ok()
                .map(|chunk| (chunk.start, chunk.length));
            assert_eq!(found, expected, "{range:?} {length:?}");
        }
    }
}
