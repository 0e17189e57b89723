//! `POST /collect` on the admin listener: has the running agent remove what nobody needs, as only it
//! knows what is in use. Everybody on the host may look at an agent; this is for who may write to
//! its storage, and proves that by a file there.

use http::{Response, StatusCode};

use super::{Body, TEXT};
use crate::agent::Shared;
use crate::store::upload::UploadId;

/// The path.
pub const PATH: &str = "/collect";

/// What a request asks for: `proof=<uuid>`, and `dry-run`, where nothing is to be removed.
struct Asked {
    proof: UploadId,
    dry_run: bool,
}

impl Asked {
    fn parse(query: &str) -> Option<Self> {
        let (mut proof, mut dry_run) = (None, false);
        for (key, value) in url::form_urlencoded::parse(query.as_bytes()) {
            match &*key {
                "proof" => proof = value.parse().ok(),
                "dry-run" => dry_run = true,
                _ => return None,
            }
        }
        let proof = proof?;
        Some(Self { proof, dry_run })
    }
}

pub(super) async fn answer(query: Option<&str>, shared: &Shared) -> Response<Body> {
    let say = |status, text: &str| Body::answer(status, TEXT, format!("{text}\n"));
    let Some(asked) = query.and_then(Asked::parse) else {
        return say(
            StatusCode::BAD_REQUEST,
            "the query is proof=UUID, perhaps with dry-run",
        );
    };
    let Some(mirror) = &shared.mirror else {
        return say(StatusCode::NOT_FOUND, "a client stores nothing");
    };
    let refused = match mirror.store().take_proof(asked.proof).await {
        Ok(true) => None,
        Ok(false) => Some(format!(
            "this agent's storage is {}, and the proof is not in it",
            mirror.store().root().display()
        )),
        Err(error) => Some(error.to_string()),
    };
    if let Some(refused) = refused {
        return say(StatusCode::FORBIDDEN, &refused);
    }
    match mirror.collect(asked.dry_run).await {
        Ok(collected) => {
            if !asked.dry_run {
                tracing::info!(
                    blobs = collected.blobs.count,
                    bytes = collected.blobs.bytes,
                    links = collected.links.count,
                    uploads = collected.uploads.count,
                    aside = collected.aside.count,
                    "what nobody needs was removed"
                );
            }
            let body = serde_json::to_vec(&collected).unwrap_or_default();
            Body::answer(StatusCode::OK, "application/json", body)
        }
        Err(error) => {
            tracing::error!(%error, "what nobody needs could not be removed: {error}");
            say(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string())
        }
    }
}
