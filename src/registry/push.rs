//! Hosted names: pulls of them, and all that changes them but for uploads. distribution-spec 1.1,
//! end-2, end-3, end-7 to end-10 and end-12.

use http::header::{ALLOW, CONTENT_TYPE, LOCATION};
use http::{HeaderName, HeaderValue, Method, Response, StatusCode};
use serde_json::json;

use super::route::Route;
use super::{Asked, Body, Refusal, blob, list, manifest, reads, referrers, upload};
use crate::config::HostedSettings;
use crate::hosted::{Hosted, HostedError, Payload, Unread};
use crate::mirror::BlobContent;
use crate::oci::{
    Algorithm, Digest, ErrorCode, MANIFEST_LIMIT, ManifestError, Name, PushedError, Reference, Tag,
};
use crate::store::layout::Repository;
use crate::upstream::CONTENT_DIGEST;

/// Says that the registry lists the manifest as a referrer of this one.
const SUBJECT: HeaderName = HeaderName::from_static("oci-subject");
/// Says that a tag of the request was moved.
const TAG: HeaderName = HeaderName::from_static("oci-tag");
/// The most tags that a request may move.
const TAGS: usize = 64;

impl From<HostedError> for Refusal {
    fn from(error: HostedError) -> Self {
        let message = error.to_string();
        let of = |code| Self::new(code, message.clone());
        match &error {
            HostedError::BlobUnknown(..) => of(ErrorCode::BlobUnknown),
            HostedError::ManifestUnknown(..) => of(ErrorCode::ManifestUnknown),
            HostedError::NameUnknown(_) => of(ErrorCode::NameUnknown),
            HostedError::UploadUnknown => of(ErrorCode::BlobUploadUnknown),
            HostedError::UploadBusy => {
                of(ErrorCode::BlobUploadInvalid).with_status(StatusCode::CONFLICT)
            }
            HostedError::OutOfOrder { .. } => {
                of(ErrorCode::BlobUploadInvalid).with_status(StatusCode::RANGE_NOT_SATISFIABLE)
            }
            HostedError::WrongSize { .. } => of(ErrorCode::SizeInvalid),
            HostedError::Mismatch { .. } => of(ErrorCode::DigestInvalid),
            HostedError::Broken(error) if error.kind() == std::io::ErrorKind::TimedOut => {
                of(ErrorCode::BlobUploadInvalid).with_status(StatusCode::REQUEST_TIMEOUT)
            }
            HostedError::Broken(_) => of(ErrorCode::BlobUploadInvalid),
            HostedError::Manifest(PushedError::Unreadable(ManifestError::TooLarge)) => too_large(),
            HostedError::Manifest(_) => of(ErrorCode::ManifestInvalid),
            HostedError::Lacks(_, lacking) => {
                let mut refusal = of(ErrorCode::ManifestBlobUnknown);
                let detail = |digest: &Digest| json!({"digest": digest.as_str()});
                refusal.details = lacking.iter().map(detail).collect();
                refusal
            }
            HostedError::Immutable(..) | HostedError::Moved(..) => {
                of(ErrorCode::Denied).with_status(StatusCode::CONFLICT)
            }
            HostedError::OtherShard { .. } => of(ErrorCode::Denied),
            HostedError::Leaving => {
                of(ErrorCode::Unsupported).with_status(StatusCode::SERVICE_UNAVAILABLE)
            }
            HostedError::NoDeletes => of(ErrorCode::Unsupported),
            HostedError::Store(error) if error.is_full() => {
                // Paths are for the log, not for clients.
                tracing::error!(%error, "a push has found the disk full: {error}");
                let message = "the registry's disk is full: nothing of this request was stored";
                Self::new(ErrorCode::Unavailable, message)
                    .with_status(StatusCode::INSUFFICIENT_STORAGE)
            }
            HostedError::Bucket(error) => {
                tracing::error!(%error, "the bucket failed: {error}");
                of(ErrorCode::Unavailable)
            }
            HostedError::Store(error) => {
                tracing::error!(%error, "the store failed: {error}");
                let message = "this registry's storage failed; its log says how";
                Self::new(ErrorCode::Unavailable, message)
            }
        }
    }
}

fn too_large() -> Refusal {
    let message = format!("a manifest has at most {MANIFEST_LIMIT} bytes");
    Refusal::new(ErrorCode::ManifestInvalid, message).with_status(StatusCode::PAYLOAD_TOO_LARGE)
}

/// What of a hosted name is asked for, and changes nothing.
pub(super) async fn answer(
    hosted: &Hosted,
    asked: &Asked,
    of: &Repository,
) -> Result<Response<Body>, Refusal> {
    let request = &asked.request;
    match &asked.route {
        Route::Blob { digest, .. } => {
            let found = hosted.blob(of, digest).await?;
            if blob::is_about_size(request, digest) {
                return Ok(blob::about_size(request, digest, Some(found.size)));
            }
            let content = BlobContent::stored(found);
            blob::respond(request, digest, content, asked.outbox.clone()).await
        }
        Route::Manifest { reference, .. } => {
            let found = hosted.manifest(of, reference).await?;
            Ok(manifest::hosted(request.headers(), found))
        }
        Route::Tags { name, ns, page } => {
            list::hosted_tags(hosted, of, name, ns.as_deref(), page).await
        }
        Route::Referrers {
            name,
            digest,
            artifact_type,
            last,
            ..
        } => {
            let (artifact_type, last) = (artifact_type.as_deref(), last.as_deref());
            referrers::hosted(hosted, of, name, digest, artifact_type, last).await
        }
        Route::Upload { name, id, .. } => upload::status(hosted, of, name, id.as_deref()).await,
        Route::Root | Route::Base | Route::Catalog { .. } | Route::Token { .. } => Err(
            Refusal::new(ErrorCode::NameUnknown, "this is about no repository"),
        ),
    }
}

/// What is to change a hosted name, but for an upload.
pub(super) async fn change(
    hosted: &Hosted,
    asked: &Asked,
    of: &Repository,
    payload: &mut Payload,
    settings: &HostedSettings,
) -> Result<Response<Body>, Refusal> {
    let method = asked.request.method();
    match (&asked.route, method) {
        (
            Route::Manifest {
                name,
                reference,
                tags,
                ..
            },
            &Method::PUT,
        ) => {
            let names = (of, name, reference, &tags[..]);
            put_manifest(hosted, asked, names, payload, settings).await
        }
        (Route::Manifest { reference, .. }, &Method::DELETE) => {
            let deleted = hosted.delete_manifest(settings, of, reference).await;
            deleted.map_err(|error| delete_refusal(error, "GET, HEAD, PUT"))?;
            Ok(empty(StatusCode::ACCEPTED))
        }
        (Route::Blob { digest, .. }, &Method::DELETE) => {
            let deleted = hosted.delete_blob(settings, of, digest).await;
            deleted.map_err(|error| delete_refusal(error, "GET, HEAD"))?;
            Ok(empty(StatusCode::ACCEPTED))
        }
        (route, method) => {
            let allowed = match route {
                Route::Manifest { .. } => "GET, HEAD, PUT, DELETE",
                Route::Blob { .. } => "GET, HEAD, DELETE",
                _ => "GET, HEAD",
            };
            debug_assert!(!reads(method));
            let refusal = Refusal::new(
                ErrorCode::Unsupported,
                format!("{method} means nothing here: allowed are {allowed}"),
            );
            Err(refusal.with_header(ALLOW, allowed))
        }
    }
}

fn delete_refusal(error: HostedError, allowed: &'static str) -> Refusal {
    let refusal = Refusal::from(error);
    if refusal.status == StatusCode::METHOD_NOT_ALLOWED {
        return refusal.with_header(ALLOW, allowed);
    }
    refusal
}

async fn put_manifest(
    hosted: &Hosted,
    asked: &Asked,
    (of, name, reference, said): (&Repository, &Name, &Reference, &[String]),
    payload: &mut Payload,
    settings: &HostedSettings,
) -> Result<Response<Body>, Refusal> {
    let tags = tags(reference, said)?;
    let content_type = asked.request.headers().get(CONTENT_TYPE);
    let content_type = content_type.map(HeaderValue::to_str).transpose();
    let content_type = content_type.map_err(|_| {
        let message = "Content-Type holds characters that no media type has";
        Refusal::new(ErrorCode::ManifestInvalid, message)
    })?;
    let bytes = payload.whole(MANIFEST_LIMIT).await;
    let bytes = bytes.map_err(|error| match error {
        Unread::TooLarge => too_large(),
        Unread::Broken(error) => HostedError::Broken(error).into(),
    })?;
    let algorithm = match reference {
        Reference::Tag(_) => Algorithm::Sha256,
        Reference::Digest(said) => said.algorithm(),
    };
    let digest = Digest::of(algorithm, &bytes);
    if let Reference::Digest(said) = reference
        && *said != digest
    {
        let (said, found) = (said.clone(), digest);
        return Err(HostedError::Mismatch { said, found }.into());
    }
    let manifest = (bytes, digest.clone(), content_type);
    let subject = hosted.push_manifest(settings, of, manifest, &tags).await?;
    let mut response = created(&format!("/v2/{name}/manifests/{reference}"), &digest);
    if let Some(subject) = subject {
        set(&mut response, SUBJECT, subject.as_str());
    }
    if matches!(reference, Reference::Digest(_)) {
        for tag in &tags {
            if let Ok(value) = HeaderValue::from_str(tag.as_str()) {
                response.headers_mut().append(TAG, value);
            }
        }
    }
    Ok(response)
}

/// The tags that a push moves: its own, or those that it names beside a digest.
fn tags(reference: &Reference, said: &[String]) -> Result<Vec<Tag>, Refusal> {
    let wrong = |message: String| Err(Refusal::new(ErrorCode::ManifestInvalid, message));
    match reference {
        Reference::Tag(tag) if said.is_empty() => Ok(vec![tag.clone()]),
        Reference::Tag(_) => wrong("`tag` is for a push by digest: this one names a tag".into()),
        Reference::Digest(_) if said.len() > TAGS => {
            wrong(format!("{} tags at once: at most {TAGS}", said.len()))
        }
        Reference::Digest(_) => {
            let tags = said.iter().map(|tag| tag.parse::<Tag>());
            let tags: Result<Vec<Tag>, _> = tags.collect();
            tags.or_else(|error| wrong(error.to_string()))
        }
    }
}

/// The answer that something is here now, and where.
pub(super) fn created(location: &str, digest: &Digest) -> Response<Body> {
    let mut response = empty(StatusCode::CREATED);
    set(&mut response, LOCATION, location);
    set(&mut response, CONTENT_DIGEST, digest.as_str());
    response
}

pub(super) fn empty(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

/// `value` is made of names, digests and numbers, always a valid header.
pub(super) fn set(response: &mut Response<Body>, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}
