//! Configuration: fragments (what one file or variable says) are merged, and become settings that
//! can't be invalid.
//!
//! 1. [`Sources`] are read in the order in which they count: the file, the drop-ins beside it in
//!    name order, the environment (`source`, `document`).
//! 2. What each says is walked against the schema that its types generate (`fragment`, `schema`),
//!    and what fits is merged, remembering who said it (`merge`).
//! 3. The whole is converted to [`Settings`] (`convert`).
//!
//! Each step goes on past what it refuses, so that one run shows everything that is wrong. A
//! `config.yml` of registry:2 takes the file's place in step 1 (`distribution`).

mod convert;
mod distribution;
mod document;
mod error;
mod fragment;
mod limit;
mod merge;
mod schema;
mod settings;
mod source;

use std::path::{Path, PathBuf};

pub use error::Errors;
pub use limit::CacheLimit;
pub use schema::schema;
pub use settings::{
    AccessKeys, AdminAddress, AliasTarget, AuthSettings, AutoscalingSettings, ClientSettings,
    Credentials, DnsPolicy, DnsProvider, DnsSettings, DockerSettings, Drift, Encryption,
    FleetSettings, Freshness, HealthSettings, HostSettings, HostedSettings, LoadBalancerSettings,
    LogFormat, LogLevel, LogSettings, Manage, Members, Pull, Restart, Role, S3Settings, Secret,
    Serving, Settings, Sparse, Storage, Timeouts, TlsSettings, TsigAlgorithm, TsigSettings,
    UpstreamSettings,
};
pub use source::{DEFAULT_FILE, Sources};

use merge::Merged;

/// A configuration that can be run.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// What to do.
    pub settings: Settings,
    /// What was said and is done otherwise, one line each, never with a secret.
    pub warnings: Vec<String>,
    /// The configuration files that were read, in the order in which they count.
    pub files: Vec<PathBuf>,
}

/// What is done where nothing is said: no file is read, and no variable. It is what is left where
/// the configuration is broken, and something has to be done all the same.
pub fn defaults() -> Result<Settings, Errors> {
    let sources = Sources {
        config: None,
        distribution: None,
        environment: Vec::new(),
    };
    let (mut warnings, mut errors) = (Vec::new(), Vec::new());
    let sources = sources.of_the_unit();
    let settings = convert::settings(
        &Merged::default(),
        &sources,
        true,
        &mut warnings,
        &mut errors,
    );
    settings.ok_or(Errors(errors))
}

/// Reads the configuration. It starts nothing and changes nothing.
pub fn load(sources: &Sources) -> Result<Loaded, Errors> {
    let schema = schema();
    let mut files = Vec::new();
    let mut warnings = Vec::new();
    let mut errors = Vec::new();

    let mut merged = Merged::default();
    let mut layers = Vec::new();
    if let Some(file) = &sources.distribution {
        if let Some(ours) = &sources.config {
            errors.push(error::Remark::new(
                &error::Place::File(ours.clone()),
                "",
                "--config and --distribution-config are given: only one can say what to do",
            ));
        }
        merged = distribution::read(file, sources, &mut files, &mut warnings, &mut errors);
    } else {
        let main = sources.config.as_deref().unwrap_or(Path::new(DEFAULT_FILE));
        let must_exist = sources.config.is_some();
        layers = source::files(main, must_exist, &mut files, &mut warnings, &mut errors);
    }
    layers.extend(source::variables(sources, &schema, &mut errors));
    for layer in layers {
        let members = schema::accept(&schema, layer.members, &layer.place, &mut errors);
        merged.add(members, &layer.place.into());
    }

    let complete = errors.is_empty();
    match convert::settings(&merged, sources, complete, &mut warnings, &mut errors) {
        Some(settings) if errors.is_empty() => {
            let warnings = warnings.iter().map(ToString::to_string).collect();
            Ok(Loaded {
                settings,
                warnings,
                files,
            })
        }
        _ => Err(Errors(errors)),
    }
}
