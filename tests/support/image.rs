//! Blobs, manifests and indexes made from a seed: as random as compressed layers are, and the same
//! in every run.

use bytes::Bytes;
use serde_json::{Value, json};

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

pub const KIB: usize = 1024;
pub const MIB: usize = 1024 * KIB;

/// Bytes and their digest.
#[derive(Debug, Clone)]
pub struct Blob {
    pub digest: String,
    pub bytes: Bytes,
}

impl Blob {
    /// `length` bytes that no other seed yields.
    pub fn new(seed: u64, length: usize) -> Self {
        let mut state = seed;
        let words = std::iter::repeat_with(|| split_mix(&mut state).to_le_bytes());
        Self::of(words.flatten().take(length).collect::<Vec<u8>>())
    }

    /// The blob with these bytes.
    pub fn of(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self {
            digest: sha256(&bytes),
            bytes,
        }
    }

    /// The same bytes, known by their SHA-512.
    pub fn by_sha512(self) -> Self {
        let digest = hash("sha512", &ring::digest::SHA512, &self.bytes);
        Self { digest, ..self }
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }
}

/// A manifest or an index: bytes, digest and the media type it is served with.
#[derive(Debug, Clone)]
pub struct Manifest {
    pub blob: Blob,
    pub media_type: String,
}

impl Manifest {
    /// What `document` is as a manifest. Indented, so that a copy that was parsed and written
    /// again differs from it.
    pub fn new(media_type: &str, document: &Value) -> Self {
        let text = serde_json::to_string_pretty(document).expect("JSON of a value");
        Self {
            blob: Blob::of(text),
            media_type: media_type.to_owned(),
        }
    }

    /// The index of these images.
    pub fn index(images: &[&Image]) -> Self {
        let manifests: Vec<Value> = images
            .iter()
            .map(|image| image.manifest.descriptor())
            .collect();
        let document = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests});
        Self::new(OCI_INDEX, &document)
    }

    pub fn digest(&self) -> &str {
        &self.blob.digest
    }

    fn descriptor(&self) -> Value {
        descriptor(&self.media_type, &self.blob)
    }
}

/// An image: its manifest, config and layers.
#[derive(Debug, Clone)]
pub struct Image {
    pub manifest: Manifest,
    pub config: Blob,
    pub layers: Vec<Blob>,
}

impl Image {
    /// An image whose layers have these lengths.
    pub fn new(seed: u64, layers: &[usize]) -> Self {
        let layer = |(number, length): (u64, &usize)| Blob::new(seed * 1000 + number, *length);
        Self::of(seed, (1..).zip(layers).map(layer).collect())
    }

    /// An image of these layers; `seed` makes its config.
    pub fn of(seed: u64, layers: Vec<Blob>) -> Self {
        let config = json!({"architecture": "amd64", "os": "linux", "author": format!("{seed}")});
        let config = Blob::of(config.to_string());
        let layer = "application/vnd.oci.image.layer.v1.tar+gzip";
        let document = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": layers.iter().map(|blob| descriptor(layer, blob)).collect::<Vec<Value>>(),
        });
        Self {
            manifest: Manifest::new(OCI_MANIFEST, &document),
            config,
            layers,
        }
    }

    /// A small image, for tests that are about its manifest.
    pub fn small(seed: u64) -> Self {
        Self::new(seed, &[10 * KIB])
    }

    /// The digest of its manifest.
    pub fn digest(&self) -> &str {
        self.manifest.digest()
    }

    /// Its layers and config.
    pub fn blobs(&self) -> impl Iterator<Item = &Blob> {
        self.layers.iter().chain([&self.config])
    }

    /// Its only, or first, layer.
    pub fn layer(&self) -> &Blob {
        &self.layers[0]
    }
}

fn descriptor(media_type: &str, blob: &Blob) -> Value {
    json!({"mediaType": media_type, "digest": blob.digest, "size": blob.len()})
}

/// Computed here and not by the code under test.
fn sha256(bytes: &[u8]) -> String {
    hash("sha256", &ring::digest::SHA256, bytes)
}

fn hash(name: &str, algorithm: &'static ring::digest::Algorithm, bytes: &[u8]) -> String {
    let hash = ring::digest::digest(algorithm, bytes);
    let digits = hash.as_ref().iter();
    digits.fold(format!("{name}:"), |text, byte| {
        text + &format!("{byte:02x}")
    })
}

/// `SplitMix64` (Steele, Lea, Flood 2014): a sequence that passes for random, from any seed.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}
