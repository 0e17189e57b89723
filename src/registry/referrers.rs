//! Referrers: distribution-spec 1.1, end-12, "Listing Referrers".

use http::header::{CONTENT_TYPE, LINK, WARNING};
use http::{HeaderName, HeaderValue, Response};
use serde_json::Value;

use super::{Body, Refusal, STALE, json_answer};
use crate::hosted::Hosted;
use crate::mirror::{Mirror, Source};
use crate::oci::{Digest, ErrorCode, Name, OCI_INDEX};
use crate::store::layout::Repository;

/// Says by what the list was narrowed.
const FILTERS_APPLIED: HeaderName = HeaderName::from_static("oci-filters-applied");

pub(super) async fn answer(
    mirror: &Mirror,
    source: &Source,
    digest: &Digest,
    artifact_type: Option<&str>,
) -> Result<Response<Body>, Refusal> {
    let mut referrers = mirror.referrers(source, digest).await?;
    if let Some(wanted) = artifact_type {
        let of_type = |descriptor: &Value| descriptor["artifactType"] == wanted;
        referrers.descriptors.retain(of_type);
    }
    let mut response = index_of(&referrers.descriptors, artifact_type);
    if referrers.stale {
        response.headers_mut().insert(WARNING, STALE);
    }
    Ok(response)
}

/// The referrers of a hosted manifest.
pub(super) async fn hosted(
    hosted: &Hosted,
    of: &Repository,
    name: &Name,
    digest: &Digest,
    artifact_type: Option<&str>,
    last: Option<&str>,
) -> Result<Response<Body>, Refusal> {
    let after = last.map(str::parse::<Digest>).transpose();
    let after = after.map_err(|error| Refusal::new(ErrorCode::DigestInvalid, error.to_string()))?;
    let page = hosted.referrers(of, digest, artifact_type, after.as_ref());
    let page = page.await?;
    let mut response = index_of(&page.descriptors, artifact_type);
    if let Some(last) = page.more_after {
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        query.append_pair("last", last.as_str());
        if let Some(artifact_type) = artifact_type {
            query.append_pair("artifactType", artifact_type);
        }
        let link = format!(
            "</v2/{name}/referrers/{digest}?{}>; rel=\"next\"",
            query.finish()
        );
        // Percent-encoded: always a valid header.
        if let Ok(link) = HeaderValue::try_from(link) {
            response.headers_mut().insert(LINK, link);
        }
    }
    Ok(response)
}

fn index_of(descriptors: &[Value], artifact_type: Option<&str>) -> Response<Body> {
    let index = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": descriptors,
    });
    let mut response = json_answer(index.to_string().into());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(OCI_INDEX));
    if artifact_type.is_some() {
        headers.insert(FILTERS_APPLIED, HeaderValue::from_static("artifactType"));
    }
    response
}
