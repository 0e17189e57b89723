//! What a manifest has to be before it is taken from a client that pushes it, and what it says of
//! itself to those who list the referrers of another one.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::{Map, Value};

use super::manifest::DOCKER_SCHEMA_1;
use super::{Digest, MANIFEST_LIMIT, Manifest, ManifestError, OCI_INDEX};

/// Media types that have rules of their own. Source: image-spec 1.1 and Docker's "Image Manifest
/// Version 2, Schema 2".
const IMAGES: &[&str] = &[
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
const INDEXES: &[&str] = &[
    OCI_INDEX,
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

/// A manifest that is not taken, and why.
#[derive(Debug, thiserror::Error)]
pub enum PushedError {
    /// It is too large, or nothing can be read from it.
    #[error("{0}")]
    Unreadable(#[from] ManifestError),
    /// Its `mediaType`, or what its fields make it, is not what the request says.
    #[error("the manifest is {own}, and Content-Type says {said}: they have to be the same")]
    OtherType {
        /// What it is.
        own: String,
        /// What was said.
        said: String,
    },
    /// A field is missing, or is not what it has to be.
    #[error("{field} {problem}")]
    Field {
        /// Where (`layers[2].digest`).
        field: String,
        /// What is wrong with it, as the end of a sentence that begins with the field.
        problem: &'static str,
    },
}

/// A manifest that fits the specification, and what it refers to.
#[derive(Debug)]
pub struct Pushed {
    /// The manifest.
    pub manifest: Manifest,
    /// What its repository has to have: config and layers, without those that are not to be
    /// distributed.
    pub blobs: Vec<Digest>,
    /// The manifest that it is about.
    pub subject: Option<Digest>,
}

impl Pushed {
    /// Reads a manifest that a client has sent as `content_type`, whose digest has been verified.
    pub fn parse(
        bytes: Bytes,
        digest: Digest,
        content_type: Option<&str>,
    ) -> Result<Self, PushedError> {
        let manifest = Manifest::parse(bytes, digest)?;
        let document: Map<String, Value> = serde_json::from_slice(&manifest.bytes)
            .map_err(|error| PushedError::Unreadable(ManifestError::Malformed(error)))?;
        if document
            .get("mediaType")
            .is_some_and(|own| !own.is_string())
        {
            return Err(field("mediaType", "is not a text"));
        }
        let own = manifest.media_type.as_str();
        if own == DOCKER_SCHEMA_1 {
            return Err(field(
                "schemaVersion",
                "is 1: such manifests are of before 2016, and not taken",
            ));
        }
        // Parameters are to be ignored: distribution-spec 1.1, "Pushing manifests".
        let said = content_type.map(|said| said.split(';').next().unwrap_or_default().trim());
        if let Some(said) = said
            && !said.eq_ignore_ascii_case(own)
        {
            return Err(PushedError::OtherType {
                own: own.to_owned(),
                said: said.chars().take(100).collect(),
            });
        }
        let known = IMAGES.contains(&own) || INDEXES.contains(&own);
        if known && document.get("schemaVersion") != Some(&Value::from(2)) {
            return Err(field("schemaVersion", "is not 2"));
        }
        if IMAGES.contains(&own) && !document.contains_key("config") {
            return Err(field("config", "is missing"));
        }
        if INDEXES.contains(&own) && !document.contains_key("manifests") {
            return Err(field("manifests", "is missing"));
        }
        texts(&document, "")?;
        let mut blobs = Vec::new();
        if let Some(config) = document.get("config") {
            blobs.push(descriptor(config, "config")?);
        }
        for (name, required) in [("layers", true), ("blobs", true), ("manifests", false)] {
            let items = match document.get(name) {
                // The latter is how Go writes an empty list.
                None | Some(Value::Null) => continue,
                Some(Value::Array(items)) => items,
                Some(_) => return Err(field(name, "is not a list")),
            };
            for (index, item) in items.iter().enumerate() {
                let digest = descriptor(item, &format!("{name}[{index}]"))?;
                if required && !is_elsewhere(item) {
                    blobs.push(digest);
                }
            }
        }
        let subject = document.get("subject").filter(|subject| !subject.is_null());
        let subject = subject.map(|subject| descriptor(subject, "subject"));
        Ok(Self {
            subject: subject.transpose()?,
            manifest,
            blobs,
        })
    }
}

fn field(field: impl Into<String>, problem: &'static str) -> PushedError {
    PushedError::Field {
        field: field.into(),
        problem,
    }
}

/// Checks the texts that a manifest and a descriptor may both have.
fn texts(object: &Map<String, Value>, place: &str) -> Result<(), PushedError> {
    let within = |name: &str| {
        let dot = if place.is_empty() { "" } else { "." };
        format!("{place}{dot}{name}")
    };
    if object
        .get("artifactType")
        .is_some_and(|it| !it.is_string() && !it.is_null())
    {
        return Err(field(within("artifactType"), "is not a text"));
    }
    match object.get("annotations") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Object(annotations)) if annotations.values().all(Value::is_string) => Ok(()),
        Some(_) => Err(field(within("annotations"), "is not a mapping of texts")),
    }
}

/// Checks a descriptor, and gives its digest. Source: image-spec 1.1, "Content Descriptors".
fn descriptor(value: &Value, place: &str) -> Result<Digest, PushedError> {
    let Value::Object(object) = value else {
        return Err(field(place, "is not a descriptor"));
    };
    let media_type = object.get("mediaType").and_then(Value::as_str);
    if !media_type.is_some_and(is_media_type) {
        return Err(field(format!("{place}.mediaType"), "is not a media type"));
    }
    let Some(size) = object.get("size").and_then(Value::as_u64) else {
        return Err(field(format!("{place}.size"), "is not a number of bytes"));
    };
    let digest = object.get("digest").and_then(Value::as_str);
    let Some(Ok(digest)) = digest.map(str::parse::<Digest>) else {
        let problem = "is not a digest that this registry knows: sha256 or sha512";
        return Err(field(format!("{place}.digest"), problem));
    };
    texts(object, place)?;
    if let Some(data) = object.get("data").filter(|data| !data.is_null()) {
        let data = data.as_str().and_then(|data| STANDARD.decode(data).ok());
        let same = data.is_some_and(|data| {
            data.len() as u64 == size && Digest::of(digest.algorithm(), &data) == digest
        });
        if !same {
            return Err(field(
                format!("{place}.data"),
                "is not the content that its digest is of, in base64",
            ));
        }
    }
    Ok(digest)
}

/// `type/subtype`, of the characters that RFC 6838, 4.2, has for them.
fn is_media_type(text: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part
                .bytes()
                .all(|c| c.is_ascii_alphanumeric() || b"!#$&-^_.+".contains(&c))
    };
    text.split_once('/')
        .is_some_and(|(kind, subtype)| part(kind) && part(subtype))
}

/// Whether a layer is not to be distributed, but to be had at a URL of its own. Source: image-spec
/// 1.1, "Non-Distributable Layers".
fn is_elsewhere(layer: &Value) -> bool {
    let media_type = layer["mediaType"].as_str().unwrap_or_default();
    media_type.contains(".nondistributable.") || media_type.contains(".rootfs.foreign.")
}

/// What a manifest says to those who list the referrers of its subject.
#[derive(Debug)]
pub struct Subject {
    /// The manifest that it is about.
    pub digest: Digest,
    /// Its own descriptor, as a list of referrers has it.
    pub descriptor: Value,
    /// Its type there.
    pub artifact_type: Option<String>,
}

impl Subject {
    /// Of a stored manifest; `None` where it is about no other. Source: distribution-spec 1.1,
    /// "Listing Referrers".
    pub fn of(manifest: &Manifest) -> Option<Self> {
        if manifest.bytes.len() > MANIFEST_LIMIT {
            return None;
        }
        let document: Value = serde_json::from_slice(&manifest.bytes).ok()?;
        let digest = document["subject"]["digest"].as_str()?.parse().ok()?;
        let own = document["artifactType"].as_str();
        let own = own.filter(|own| !own.is_empty());
        let artifact_type = own.or_else(|| document["config"]["mediaType"].as_str());
        let artifact_type = artifact_type.map(str::to_owned);
        let mut descriptor = serde_json::json!({
            "mediaType": manifest.media_type,
            "digest": manifest.digest.as_str(),
            "size": manifest.bytes.len(),
        });
        if let Some(artifact_type) = &artifact_type {
            descriptor["artifactType"] = artifact_type.as_str().into();
        }
        if let Some(annotations @ Value::Object(_)) = document.get("annotations") {
            descriptor["annotations"] = annotations.clone();
        }
        Some(Self {
            digest,
            descriptor,
            artifact_type,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Algorithm;
    use super::*;
    use serde_json::json;

    const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";

    fn parse(document: &Value, content_type: Option<&str>) -> Result<Pushed, PushedError> {
        let bytes = Bytes::from(document.to_string());
        let digest = Digest::of(Algorithm::Sha256, &bytes);
        Pushed::parse(bytes, digest, content_type)
    }

    fn item(content: &[u8]) -> Value {
        let digest = Digest::of(Algorithm::Sha256, content);
        json!({"mediaType": "a/b", "digest": digest.as_str(), "size": content.len()})
    }

    fn image() -> Value {
        json!({"schemaVersion": 2, "mediaType": IMAGE, "config": item(b"c"), "layers": [item(b"l")]})
    }

    #[test]
    fn what_fits_the_specification_is_taken() {
        let pushed = parse(
            &image(),
            Some("application/vnd.oci.image.manifest.v1+json; q=1"),
        );
        assert_eq!(pushed.unwrap().blobs.len(), 2);
        let mut elsewhere = image();
        elsewhere["layers"][0]["mediaType"] =
            "application/vnd.oci.image.layer.nondistributable.v1.tar".into();
        assert_eq!(parse(&elsewhere, Some(IMAGE)).unwrap().blobs.len(), 1);
        let mut with_data = image();
        with_data["config"]["data"] = "Yw==".into();
        assert!(parse(&with_data, Some(IMAGE)).is_ok());
        let any = json!({"mediaType": "application/vnd.example+json", "whatever": 1});
        assert!(parse(&any, Some("application/vnd.example+json")).is_ok());
        assert!(parse(&any, None).is_ok());
    }

    #[test]
    fn what_does_not_is_refused_with_its_place() {
        let with = |pointer: &str, value: Value| {
            let mut document = image();
            *document.pointer_mut(pointer).unwrap() = value;
            document
        };
        let without = |name: &str| {
            let mut document = image();
            document.as_object_mut().unwrap().remove(name);
            document
        };
        for (document, place) in [
            (with("/mediaType", json!(1)), "not a manifest"),
            (with("/mediaType", json!("a/b")), "Content-Type"),
            (with("/schemaVersion", json!(3)), "schemaVersion"),
            (without("schemaVersion"), "schemaVersion"),
            (without("config"), "config"),
            (with("/config/digest", json!("md5:1")), "config.digest"),
            (with("/config/size", json!(-1)), "config.size"),
            (with("/config/size", json!("1")), "config.size"),
            (
                with("/layers/0/mediaType", json!("")),
                "layers[0].mediaType",
            ),
            (
                with("/layers/0/mediaType", json!("a")),
                "layers[0].mediaType",
            ),
            (with("/layers/0", json!("text")), "not a manifest"),
        ] {
            let error = parse(&document, Some(IMAGE)).unwrap_err().to_string();
            assert!(error.contains(place), "{error} for {document}");
        }
        let mut wrong = image();
        wrong["config"]["data"] = "eA==".into();
        assert!(parse(&wrong, Some(IMAGE)).is_err());
        let mut wrong = image();
        wrong["annotations"] = json!({"a": 1});
        assert!(parse(&wrong, Some(IMAGE)).is_err());
    }

    #[test]
    fn an_index_without_a_type_of_its_own_has_none_as_a_referrer() {
        let mut index = json!({
            "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [], "subject": item(b"s"),
            "annotations": {"a": "b"},
        });
        let subject = Subject::of(&parse(&index, None).unwrap().manifest).unwrap();
        assert_eq!(subject.artifact_type, None);
        assert_eq!(subject.descriptor["annotations"], json!({"a": "b"}));
        assert!(subject.descriptor.get("artifactType").is_none());
        index["artifactType"] = "x/y".into();
        let subject = Subject::of(&parse(&index, None).unwrap().manifest).unwrap();
        assert_eq!(subject.artifact_type.as_deref(), Some("x/y"));
        let mut image = image();
        assert!(Subject::of(&parse(&image, None).unwrap().manifest).is_none());
        image["subject"] = item(b"s");
        let subject = Subject::of(&parse(&image, None).unwrap().manifest).unwrap();
        assert_eq!(subject.artifact_type.as_deref(), Some("a/b"));
    }
}
