//! Platforms, as an index names them.

use std::env::consts;
use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

use crate::oci::Digest;

/// What an image runs on: `linux/amd64`, `linux/arm/v7`. Source: image-spec 1.1, "Image index".
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Platform {
    os: String,
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
}

/// The platforms that are wanted.
#[derive(Debug, Clone)]
pub enum Platforms {
    /// Whatever there is.
    All,
    /// These.
    Only(Vec<Platform>),
}

impl Platform {
    /// This host's, in Go's words, as container engines say it.
    pub fn host() -> Self {
        let architecture = match consts::ARCH {
            "x86_64" => "amd64",
            "x86" => "386",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self {
            os: consts::OS.to_owned(),
            architecture: architecture.to_owned(),
            variant: None,
        }
    }

    /// Whether `offered` is what was asked for. Who names no variant takes any.
    fn takes(&self, offered: &Self) -> bool {
        self.os == offered.os
            && self.architecture == offered.architecture
            && match (&self.variant, &offered.variant) {
                (None, _) => true,
                (Some(wanted), Some(offered)) => wanted == offered,
                // The one variant that goes without saying.
                (Some(wanted), None) => self.architecture == "arm64" && wanted == "v8",
            }
    }
}

impl FromStr for Platform {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split('/').map(str::to_owned);
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(os), Some(architecture), variant, None)
                if !os.is_empty() && !architecture.is_empty() =>
            {
                Ok(Self {
                    os,
                    architecture,
                    variant,
                })
            }
            _ => Err("not a platform: os/architecture, such as linux/amd64 or linux/arm/v7".into()),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant
            .iter()
            .try_for_each(|variant| write!(f, "/{variant}"))
    }
}

/// The part of an index that says which manifest is for whom.
#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    digest: String,
    #[serde(default)]
    platform: Option<Platform>,
}

impl Platforms {
    /// The manifests of an index that are wanted, or why there are none.
    pub(super) fn choose(&self, index: &[u8]) -> Result<Vec<Digest>, String> {
        let index: Index = serde_json::from_slice(index).map_err(|e| e.to_string())?;
        let wanted = |entry: &&Entry| match (self, &entry.platform) {
            (Self::All, _) => true,
            (Self::Only(wanted), Some(offered)) => {
                wanted.iter().any(|wanted| wanted.takes(offered))
            }
            (Self::Only(_), None) => false,
        };
        let chosen = index.manifests.iter().filter(wanted);
        let chosen: Vec<Digest> = chosen
            .filter_map(|entry| entry.digest.parse().ok())
            .collect();
        let Self::Only(wanted) = self else {
            return Ok(chosen);
        };
        let offered: Vec<&Platform> = index
            .manifests
            .iter()
            .filter_map(|entry| entry.platform.as_ref())
            .collect();
        let missing = |wanted: &&Platform| !offered.iter().any(|offered| wanted.takes(offered));
        if let Some(missing) = wanted.iter().find(missing) {
            let offered: Vec<String> = offered.iter().map(ToString::to_string).collect();
            return Err(format!(
                "it is not for {missing}, only for {}",
                offered.join(", ")
            ));
        }
        Ok(chosen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_asked_for_what_was_wanted() {
        let digit = |digit: &str| format!("sha256:{}", digit.repeat(64));
        let entry = |digest: &str, os: &str, architecture: &str, variant: Option<&str>| {
            serde_json::json!({
                "digest": digit(digest),
                "platform": {"os": os, "architecture": architecture, "variant": variant},
            })
        };
        let index = serde_json::json!({"manifests": [
            entry("1", "linux", "amd64", None),
            entry("2", "linux", "arm", Some("v6")),
            entry("3", "linux", "arm", Some("v7")),
            entry("4", "linux", "arm64", None),
            entry("5", "unknown", "unknown", None),
            {"digest": digit("6")},
        ]});
        let index = index.to_string();
        let choose = |wanted: &[&str]| {
            let wanted = wanted.iter().map(|text| text.parse().unwrap()).collect();
            let chosen = Platforms::Only(wanted).choose(index.as_bytes());
            chosen.map(|digests| {
                digests
                    .iter()
                    .map(|d| d.hex()[..1].to_owned())
                    .collect::<String>()
            })
        };
        assert_eq!(choose(&["linux/amd64"]).as_deref(), Ok("1"));
        assert_eq!(
            choose(&["linux/arm/v7", "linux/arm64/v8"]).as_deref(),
            Ok("34")
        );
        assert_eq!(choose(&["linux/arm"]).as_deref(), Ok("23"));
        assert_eq!(Platforms::All.choose(index.as_bytes()).unwrap().len(), 6);
        let error = choose(&["linux/amd64", "windows/amd64"]).unwrap_err();
        assert!(
            error.contains("windows/amd64") && error.contains("linux/arm/v6"),
            "{error}"
        );
    }

    #[test]
    fn a_platform_has_two_or_three_parts() {
        assert!("linux".parse::<Platform>().is_err());
        assert!("linux/".parse::<Platform>().is_err());
        assert!("linux/arm/v7/x".parse::<Platform>().is_err());
        assert_eq!(
            "linux/arm/v7".parse::<Platform>().unwrap().to_string(),
            "linux/arm/v7"
        );
    }
}
