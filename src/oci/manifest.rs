//! What a registry needs to know of a manifest: its media type and what it refers to.

use std::sync::OnceLock;

use bytes::Bytes;
use http::HeaderMap;
use serde::Deserialize;

use super::Digest;

/// The largest manifest that is accepted, in bytes (distribution-spec 1.1, "Pushing manifests").
pub const MANIFEST_LIMIT: usize = 4 * 1024 * 1024;

/// The media type of an OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const DOCKER_SCHEMA_1: &str =
    "application/vnd.docker.distribution.manifest.v1+prettyjws";

/// Bytes that are not a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON, or not of a manifest's shape.
    #[error("not a manifest: {0}")]
    Malformed(#[from] serde_json::Error),
    /// JSON, but not an object; a list would pass for one field by field.
    #[error("not a manifest: not a JSON object")]
    NotAnObject,
    /// Larger than [`MANIFEST_LIMIT`].
    #[error("a manifest of more than {MANIFEST_LIMIT} bytes")]
    TooLarge,
}

/// A manifest, byte for byte as it was received, and what was read from it.
#[derive(Debug, Clone)]
pub struct Manifest {
    /// The bytes that the digest is of.
    pub bytes: Bytes,
    /// The digest of `bytes`.
    pub digest: Digest,
    /// The media type to serve it with.
    pub media_type: String,
    /// The config and layers it refers to.
    pub blobs: Vec<Digest>,
    /// The manifests it refers to, where it is an index.
    pub manifests: Vec<Digest>,
    /// The headers it is served with, once it has been: they are the same in every answer.
    pub headers: OnceLock<HeaderMap>,
}

/// The fields of an image manifest, an index, and Docker's schema 1, as far as they matter here.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Fields {
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    schema_version: Option<u64>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    fs_layers: Vec<FsLayer>,
}

#[derive(Deserialize)]
struct Descriptor {
    digest: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct FsLayer {
    blob_sum: String,
}

impl Manifest {
    /// Reads a manifest whose digest has been verified.
    ///
    /// Its own `mediaType` wins, as in distribution; without one, `manifests` makes it an OCI
    /// index, and anything else is an OCI manifest. Descriptors whose digest this registry does
    /// not know are left out of what it refers to: they can't be stored, so nothing refers to them.
    pub fn parse(bytes: Bytes, digest: Digest) -> Result<Self, ManifestError> {
        if bytes.len() > MANIFEST_LIMIT {
            return Err(ManifestError::TooLarge);
        }
        if bytes.trim_ascii_start().first() != Some(&b'{') {
            return Err(ManifestError::NotAnObject);
        }
        let fields: Fields = serde_json::from_slice(&bytes)?;
        let known = |digest: String| digest.parse::<Digest>().ok();
        let media_type = match (fields.media_type, &fields.manifests, fields.schema_version) {
            (Some(own), ..) => own,
            (None, Some(_), _) => OCI_INDEX.to_owned(),
            (None, None, Some(1)) => DOCKER_SCHEMA_1.to_owned(),
            (None, None, _) => OCI_MANIFEST.to_owned(),
        };
        Ok(Self {
            bytes,
            digest,
            media_type,
            blobs: fields
                .config
                .into_iter()
                .chain(fields.layers)
                .map(|descriptor| descriptor.digest)
                .chain(fields.fs_layers.into_iter().map(|layer| layer.blob_sum))
                .filter_map(known)
                .collect(),
            manifests: fields
                .manifests
                .unwrap_or_default()
                .into_iter()
                .filter_map(|descriptor| known(descriptor.digest))
                .collect(),
            headers: OnceLock::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Algorithm;
    use super::*;

    fn parse(text: &str) -> Result<Manifest, ManifestError> {
        let digest = Digest::of(Algorithm::Sha256, text.as_bytes());
        Manifest::parse(Bytes::copy_from_slice(text.as_bytes()), digest)
    }

    #[test]
    fn the_media_type_is_its_own_or_follows_from_its_fields() {
        for (text, media_type) in [
            (
                r#"{"mediaType":"application/x","manifests":[]}"#,
                "application/x",
            ),
            (r#"{"schemaVersion":2,"manifests":[]}"#, OCI_INDEX),
            (r#"{"schemaVersion":2,"layers":[]}"#, OCI_MANIFEST),
            (r#"{"schemaVersion":1,"fsLayers":[]}"#, DOCKER_SCHEMA_1),
        ] {
            assert_eq!(parse(text).unwrap().media_type, media_type, "{text}");
        }
    }

    #[test]
    fn it_refers_to_its_config_and_layers_or_to_its_manifests() {
        let [config, layer] = [b"c", b"l"].map(|bytes| Digest::of(Algorithm::Sha256, bytes));
        let image = parse(&format!(
            r#"{{"config":{{"digest":"{config}"}},"layers":[{{"digest":"{layer}"}},{{"digest":"md5:1"}}]}}"#
        ));
        assert_eq!(image.unwrap().blobs, [config, layer.clone()]);
        let index = parse(&format!(r#"{{"manifests":[{{"digest":"{layer}"}}]}}"#)).unwrap();
        assert_eq!((index.manifests, index.blobs), (vec![layer], vec![]));
    }

    #[test]
    fn what_is_no_manifest_is_refused() {
        assert!(parse("<html>").is_err());
        assert!(parse("[]").is_err());
        let large = format!(r#"{{"x":"{}"}}"#, "x".repeat(MANIFEST_LIMIT));
        assert!(matches!(parse(&large), Err(ManifestError::TooLarge)));
    }
}
