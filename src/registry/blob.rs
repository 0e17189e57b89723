//! Blobs: distribution-spec 1.1, end-2, with the ranges of RFC 9110, 14.

use std::ops::RangeInclusive;

use http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_NONE_MATCH,
    IF_RANGE, LOCATION, RANGE,
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version};

use super::sendfile::Outbox;
use super::{Body, Refusal, error_answer};
use crate::mirror::{BlobContent, Mirror, Source};
use crate::oci::{Digest, ErrorCode};
use crate::upstream::CONTENT_DIGEST;

pub(super) async fn answer(
    mirror: &Mirror,
    request: &Request<()>,
    source: &Source,
    digest: &Digest,
    outbox: Option<Outbox>,
) -> Result<Response<Body>, Refusal> {
    if is_about_size(request, digest) {
        let size = mirror.blob_size(source, digest).await?;
        return Ok(about_size(request, digest, size));
    }
    // A HEAD is answered here, as its answer is known here.
    if let Some(url) = mirror.elsewhere(source, digest).await? {
        return redirect(digest, &url);
    }
    let content = mirror.blob(source, digest).await?;
    respond(request, digest, content, outbox).await
}

/// The answer that a blob is to be fetched from there, now and only now.
fn redirect(digest: &Digest, url: &str) -> Result<Response<Body>, Refusal> {
    let Ok(url) = HeaderValue::from_str(url) else {
        let message = "this registry can't say where the blob is";
        return Err(Refusal::new(ErrorCode::Unavailable, message));
    };
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    let headers = response.headers_mut();
    headers.insert(LOCATION, url);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    insert(headers, CONTENT_DIGEST, digest.to_string());
    Ok(response)
}

/// Whether a request is answered without any of a blob's bytes.
pub(super) fn is_about_size(request: &Request<()>, digest: &Digest) -> bool {
    request.method() == Method::HEAD || matches_etag(request.headers(), digest)
}

/// The answer without any of a blob's bytes.
pub(super) fn about_size(
    request: &Request<()>,
    digest: &Digest,
    size: Option<u64>,
) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    describe(response.headers_mut(), digest);
    if matches_etag(request.headers(), digest) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
    } else if let Some(size) = size {
        response.headers_mut().insert(CONTENT_LENGTH, size.into());
    }
    response
}

/// The answer with a blob, or the part of it that is asked for.
pub(super) async fn respond(
    request: &Request<()>,
    digest: &Digest,
    mut content: BlobContent,
    outbox: Option<Outbox>,
) -> Result<Response<Body>, Refusal> {
    let mut response = Response::new(Body::empty());
    if content.size.is_none() && request.version() < Version::HTTP_11 {
        // Before HTTP/1.1 a body without a length ends with its connection, whole or not: only one
        // that is known to be right can be sent.
        content.whole().await?;
    }
    describe(response.headers_mut(), digest);
    let headers = response.headers_mut();
    match wanted(request.headers(), digest, content.size) {
        Wanted::All => {
            if let Some(size) = content.size {
                headers.insert(CONTENT_LENGTH, size.into());
            }
            content.ready(0).await?;
            *response.body_mut() = Body::pieces(content.pieces(0, None), outbox);
        }
        Wanted::Part { range, size } => {
            let (start, end) = (*range.start(), *range.end() + 1);
            headers.insert(CONTENT_LENGTH, (end - start).into());
            insert(
                headers,
                CONTENT_RANGE,
                format!("bytes {start}-{}/{size}", range.end()),
            );
            content.ready(start).await?;
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            *response.body_mut() = Body::pieces(content.pieces(start, Some(end)), outbox);
        }
        Wanted::Nothing { size } => {
            let message = format!("the blob has {size} bytes, and none in that range");
            let refusal = Refusal::new(ErrorCode::Unsupported, message)
                .with_status(StatusCode::RANGE_NOT_SATISFIABLE);
            response = error_answer(&refusal);
            insert(
                response.headers_mut(),
                CONTENT_RANGE,
                format!("bytes */{size}"),
            );
        }
    }
    Ok(response)
}

/// The headers that a blob has in every answer. It can never change under its digest.
fn describe(headers: &mut HeaderMap, digest: &Digest) {
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(
        CACHE_CONTROL,
        HeaderValue::from_static("max-age=31536000, immutable"),
    );
    insert(headers, CONTENT_DIGEST, digest.to_string());
    insert(headers, ETAG, format!("\"{digest}\""));
}

/// `value` is made of digits, hexadecimal digits and punctuation, always a valid header.
fn insert(headers: &mut HeaderMap, name: http::HeaderName, value: String) {
    if let Ok(value) = HeaderValue::try_from(value) {
        headers.insert(name, value);
    }
}

/// Whether the client has the blob already. Source: RFC 9110, 13.1.2.
pub(super) fn matches_etag(headers: &HeaderMap, digest: &Digest) -> bool {
    headers
        .get_all(IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|tag| tag.trim().trim_start_matches("W/"))
        .any(|tag| tag == "*" || tag.trim_matches('"') == digest.as_str())
}

/// Which bytes a request is for.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    All,
    Part {
        range: RangeInclusive<u64>,
        size: u64,
    },
    Nothing {
        size: u64,
    },
}

/// Reads `Range`. What can't be read, asks for several ranges, or is about another version, is
/// answered with the whole: RFC 9110, 14.2, allows to ignore it.
fn wanted(headers: &HeaderMap, digest: &Digest, size: Option<u64>) -> Wanted {
    let (Some(range), Some(size)) = (headers.get(RANGE), size) else {
        return Wanted::All;
    };
    if let Some(version) = headers.get(IF_RANGE)
        && version.as_bytes() != format!("\"{digest}\"").as_bytes()
    {
        return Wanted::All;
    }
    range
        .to_str()
        .ok()
        .and_then(|range| parse_range(range, size))
        .unwrap_or(Wanted::All)
}

fn parse_range(range: &str, size: u64) -> Option<Wanted> {
    let (unit, range) = range.split_once('=')?;
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (first, last) = range.trim().split_once('-')?;
    let number = |text: &str| -> Option<u64> {
        // `parse` would take a sign.
        text.bytes()
            .all(|c| c.is_ascii_digit())
            .then(|| text.parse().ok())?
    };
    let (start, end) = match (first, last) {
        ("", suffix) => match number(suffix)? {
            0 => return Some(Wanted::Nothing { size }),
            length => (size.saturating_sub(length), size.checked_sub(1)),
        },
        (first, "") => (number(first)?, size.checked_sub(1)),
        (first, last) => {
            let (start, end) = (number(first)?, number(last)?);
            // Invalid, and not merely beyond the end: RFC 9110, 14.2, allows to refuse it, and who
            // sends this is better told.
            if end < start {
                return Some(Wanted::Nothing { size });
            }
            (start, size.checked_sub(1).map(|last| last.min(end)))
        }
    };
    Some(match end {
        Some(end) if start <= end => Wanted::Part {
            range: start..=end,
            size,
        },
        _ => Wanted::Nothing { size },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_the_rfc_has_them() {
        let part = |start, end| {
            Some(Wanted::Part {
                range: start..=end,
                size: 10,
            })
        };
        for (range, expected) in [
            ("bytes=0-0", part(0, 0)),
            ("bytes=2-5", part(2, 5)),
            ("bytes=2-", part(2, 9)),
            ("bytes=-3", part(7, 9)),
            ("bytes=-30", part(0, 9)),
            ("bytes=5-100", part(5, 9)),
            ("Bytes=5-18446744073709551615", part(5, 9)),
            ("bytes=10-", Some(Wanted::Nothing { size: 10 })),
            ("bytes=10-12", Some(Wanted::Nothing { size: 10 })),
            ("bytes=-0", Some(Wanted::Nothing { size: 10 })),
            ("bytes=5-2", Some(Wanted::Nothing { size: 10 })),
            ("bytes=0-1,3-4", None),
            ("bytes=+1-2", None),
            ("bytes=-", None),
            ("bytes=99999999999999999999-", None),
            ("items=0-1", None),
            ("bytes", None),
        ] {
            assert_eq!(parse_range(range, 10), expected, "{range}");
        }
        assert_eq!(
            parse_range("bytes=0-", 0),
            Some(Wanted::Nothing { size: 0 })
        );
    }

    #[test]
    fn a_range_of_another_version_gets_the_whole() {
        let digest: Digest = format!("sha256:{}", "a".repeat(64)).parse().unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(RANGE, HeaderValue::from_static("bytes=0-0"));
        assert_ne!(wanted(&headers, &digest, Some(10)), Wanted::All);
        assert_eq!(wanted(&headers, &digest, None), Wanted::All);
        headers.insert(IF_RANGE, HeaderValue::from_static("\"other\""));
        assert_eq!(wanted(&headers, &digest, Some(10)), Wanted::All);
        headers.insert(
            IF_RANGE,
            HeaderValue::try_from(format!("\"{digest}\"")).unwrap(),
        );
        assert_ne!(wanted(&headers, &digest, Some(10)), Wanted::All);
    }
}
