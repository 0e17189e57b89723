//! Referrers: distribution-spec 1.1, end-12, "Listing Referrers".

use http::header::{CONTENT_TYPE, WARNING};
use http::{HeaderName, HeaderValue, Response};
use serde_json::Value;

use super::{Body, Refusal, STALE, json_answer};
use crate::mirror::{Mirror, Source};
use crate::oci::{Digest, OCI_INDEX};

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
    let index = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": referrers.descriptors,
    });
    let mut response = json_answer(index.to_string().into());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(OCI_INDEX));
    if artifact_type.is_some() {
        headers.insert(FILTERS_APPLIED, HeaderValue::from_static("artifactType"));
    }
    if referrers.stale {
        headers.insert(WARNING, STALE);
    }
    Ok(response)
}
