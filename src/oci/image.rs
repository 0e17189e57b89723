//! Images as people name them.

use std::fmt;
use std::str::FromStr;

use super::{Name, NameError, Reference, RegistryHost};

/// The tag of an image that is named without one.
const DEFAULT_TAG: &str = "latest";

/// An image by the name that `docker pull` takes: `busybox`, `library/busybox:1.36`,
/// `ghcr.io/owner/app@sha256:...`.
///
/// What comes first is a registry if it has a dot or a port, or is `localhost`; else the image is
/// Docker Hub's. Where there are a tag and a digest, the digest says which image it is. Source:
/// distribution/reference, `normalize.go`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageName {
    /// Who has it.
    pub registry: RegistryHost,
    /// Its repository there.
    pub name: Name,
    /// Which of the repository's images.
    pub reference: Reference,
}

impl FromStr for ImageName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (text, None),
        };
        // A colon before the last slash is a port's.
        let (rest, tag) = match rest.rsplit_once(':') {
            Some((rest, tag)) if !tag.contains('/') => (rest, Some(tag)),
            _ => (rest, None),
        };
        let tag: Reference = Reference::Tag(tag.unwrap_or(DEFAULT_TAG).parse()?);
        let reference = match digest {
            Some(digest) => Reference::Digest(digest.parse()?),
            None => tag,
        };
        let (registry, name) = match rest.split_once('/') {
            Some((host, name)) if host.contains(['.', ':']) || host == "localhost" => {
                (host.parse()?, name)
            }
            _ => (RegistryHost::docker_hub(), rest),
        };
        let name = if registry.is_docker_hub() && !name.contains('/') {
            format!("library/{name}").parse()
        } else {
            name.parse()
        };
        Ok(Self {
            registry,
            // The error repeats what was said, not what was made of it.
            name: name.map_err(|_| NameError::Name(rest.chars().take(80).collect()))?,
            reference,
        })
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let separator = match self.reference {
            Reference::Tag(_) => ':',
            Reference::Digest(_) => '@',
        };
        let Self {
            registry,
            name,
            reference,
        } = self;
        write!(f, "{registry}/{name}{separator}{reference}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_what_docker_pull_takes_them_for() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (said, meant) in [
            ("busybox", "docker.io/library/busybox:latest".to_owned()),
            (
                "library/busybox:1.36",
                "docker.io/library/busybox:1.36".to_owned(),
            ),
            ("owner/app", "docker.io/owner/app:latest".to_owned()),
            (
                "index.docker.io/busybox",
                "docker.io/library/busybox:latest".to_owned(),
            ),
            ("ghcr.io/app", "ghcr.io/app:latest".to_owned()),
            ("localhost:5000/a/b:c", "localhost:5000/a/b:c".to_owned()),
            ("localhost/a", "localhost/a:latest".to_owned()),
            (
                &format!("ghcr.io/owner/app:1@{digest}"),
                format!("ghcr.io/owner/app@{digest}"),
            ),
        ] {
            assert_eq!(said.parse::<ImageName>().unwrap().to_string(), meant);
        }
        for bad in [
            "",
            ":",
            "a:",
            "A",
            "a@",
            "a@latest",
            "a:b:c",
            "/a",
            "https://a/b",
            "a/",
        ] {
            assert!(bad.parse::<ImageName>().is_err(), "{bad:?} is no image");
        }
    }
}
