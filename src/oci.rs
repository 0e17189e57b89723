//! The OCI distribution specification's vocabulary as types that can't be wrong.
//!
//! Every value that comes from a client, an upstream or a file is parsed into one of these at the
//! edge, so nothing further in checks again, and no path or URL is ever formed from raw input.

mod digest;
mod error;
mod image;
mod manifest;
mod name;
mod pattern;
mod pushed;

pub use digest::{Algorithm, Digest, DigestError, Hasher};
pub use error::{ErrorBody, ErrorCode};
pub use image::ImageName;
pub use manifest::{MANIFEST_LIMIT, Manifest, ManifestError, OCI_INDEX};
pub use name::{Name, NameError, Reference, RegistryHost, Tag};
pub use pattern::{Pattern, PatternError, Patterns};
pub use pushed::{Pushed, PushedError, Subject};
