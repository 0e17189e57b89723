//! Settings: a configuration that can't be invalid.

mod fleet;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use schemars::JsonSchema;
use serde::Deserialize;
use url::Url;

use super::limit::CacheLimit;
use crate::oci::{Patterns, RegistryHost};

pub use fleet::{
    AliasTarget, AutoscalingSettings, DnsPolicy, DnsProvider, DnsSettings, FleetSettings,
    LoadBalancerSettings, Members, TsigAlgorithm, TsigSettings,
};

/// Everything the agent was told, checked. Each field's default is what runs with no file at all.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Where `/healthz`, `/readyz`, `/metrics` and `/status` are: never the registry's port.
    pub admin: AdminAddress,
    /// What is served; nothing by a client.
    pub serving: Option<Serving>,
    /// How the storage, or a client's mirror, is probed.
    pub health: HealthSettings,
    /// What is logged, and how.
    pub log: LogSettings,
    /// How this host's container engines are wired.
    pub host: HostSettings,
    /// How it takes part in a fleet.
    pub fleet: FleetSettings,
}

impl Settings {
    /// What this agent does.
    pub fn role(&self) -> Role {
        match &self.serving {
            Some(serving) => serving.role,
            None => Role::Client,
        }
    }
}

/// What an agent serves, and from where.
#[derive(Debug, Clone, PartialEq)]
pub struct Serving {
    /// What it serves it as: anything but a client.
    pub role: Role,
    /// Where the registry listens.
    pub listen: SocketAddr,
    /// The registry speaks TLS with these files; plain HTTP without.
    pub tls: Option<TlsSettings>,
    /// What clients may do.
    pub clients: ClientSettings,
    /// Where blobs and manifests are kept.
    pub storage: Storage,
    /// How much of it is kept.
    pub cache_limit: CacheLimit,
    /// The registries that are mirrored, each once. Never empty for a mirror, and always for others.
    pub upstreams: Vec<UpstreamSettings>,
    /// When a cached tag is asked for again.
    pub freshness: Freshness,
    /// How long an upstream may take.
    pub timeouts: Timeouts,
    /// Headers that are added to every answer of the registry.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// How long running answers may go on after SIGTERM.
    pub drain: Duration,
    /// What is pushed here.
    pub hosted: HostedSettings,
    /// Who may push and pull that; anybody without.
    pub auth: Option<AuthSettings>,
}

/// What is pushed here, and never asked of an upstream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostedSettings {
    /// The names.
    pub names: Patterns,
    /// Those of which what is stored already was pushed, by whatever wrote it, and not cached.
    pub adopt: Patterns,
    /// Names with tags (`mycompany/*:v*`) that stay what they are once they are pushed.
    pub immutable_tags: Patterns,
    /// The names that this agent takes pushes for; all that are hosted without.
    pub shard: Option<Patterns>,
    /// Whether clients may delete.
    pub delete: bool,
    /// Which manifests may refer to what is not here.
    pub sparse: Sparse,
}

/// Which manifests may refer to what their repository does not have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Sparse {
    /// None.
    Never,
    /// Indexes, to images of other platforms.
    #[default]
    Indexes,
    /// All, images to layers as well.
    Always,
}

/// Who may push and pull what is hosted here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthSettings {
    /// Users and the bcrypt hashes of their passwords.
    pub htpasswd: PathBuf,
    /// Who may pull.
    pub pull: Pull,
    /// The host name that people push to: under it `/v2/` asks who they are. Lower case.
    pub name: Option<String>,
}

/// Who may pull what is hosted here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Pull {
    /// Anybody.
    #[default]
    Anonymous,
    /// Who may push.
    Authenticated,
}

/// How this host's container engines are wired.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSettings {
    /// What the engines are told: http or https, a host, perhaps a port; no path.
    pub mirror: Url,
    /// The authority, in PEM, of a mirror that speaks https with a certificate of its own.
    pub ca: Option<PathBuf>,
    /// docker.
    pub docker: DockerSettings,
    /// containerd's `certs.d`.
    pub containerd: Manage,
    /// podman, buildah, skopeo and CRI-O.
    pub podman: Manage,
    /// buildkitd.
    pub buildkit: Manage,
    /// What is done when somebody else has changed what was wired.
    pub drift: Drift,
    /// How long the mirror has to have failed before the engines are told to go without it.
    pub withdraw_after: Duration,
    /// A name that `/etc/hosts` gives this host's registry (`docker-local.example.com`).
    pub local_name: Option<String>,
    /// The registries that the mirror stands in for; docker's `registry-mirrors` is for docker.io
    /// alone, the other ways to wire an engine are for any.
    pub mirrored: Vec<RegistryHost>,
}

/// How docker is wired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DockerSettings {
    /// Whether it is.
    pub manage: Manage,
    /// Whether its daemon may be restarted.
    pub restart: Restart,
    /// `experimental` in `daemon.json`; nothing is written where it is not said.
    pub experimental: Option<bool>,
}

/// Whether an engine is wired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manage {
    /// Where it is here.
    Auto,
    /// It has to be here: a host without it is an error.
    Always,
    /// It is left alone.
    Never,
    /// What would be changed is said, and nothing is.
    Report,
}

/// Whether a daemon may be restarted where a reload is not enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// Never: what needs it is refused.
    Never,
    /// Where nothing else works.
    IfNeeded,
}

/// What is done when somebody else has changed what was wired.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Drift {
    /// It is said, and put right.
    Correct,
    /// It is said.
    Report,
}

/// What the agent does on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A pull-through cache of other registries.
    Mirror,
    /// Serves what is in a bucket, which it never writes.
    Reader,
    /// Takes pushes, and serves what was pushed.
    Writer,
    /// Serves nothing: this host's engines are wired to a mirror elsewhere (`host.mirror`).
    Client,
}

impl Role {
    /// The name in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Mirror => "mirror",
            Self::Reader => "reader",
            Self::Writer => "writer",
            Self::Client => "client",
        }
    }
}

/// Where the admin listener is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdminAddress {
    /// A loopback address and port.
    Tcp(SocketAddr),
    /// A Unix socket's path.
    Unix(PathBuf),
}

impl fmt::Display for AdminAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// The files that TLS is made of, all in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsSettings {
    /// The certificate that clients are shown, and those between it and its authority.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities of which clients must show a certificate; without, anybody is let in.
    pub client_ca: Option<PathBuf>,
}

/// What clients may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientSettings {
    /// How long a client may send nothing where it is its turn, and read nothing of an answer.
    pub idle: Duration,
}

/// Where content is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Storage {
    /// A folder in distribution's layout.
    Filesystem {
        /// The folder that holds `docker/registry/v2`.
        root: PathBuf,
    },
    /// A bucket in distribution's layout.
    S3 {
        /// The bucket.
        bucket: Box<S3Settings>,
        /// The folder of the disk cache in front of it.
        cache: PathBuf,
    },
}

impl Storage {
    /// The folder of this host that content is in: all of it, or what is cached of a bucket.
    pub fn root(&self) -> &Path {
        match self {
            Self::Filesystem { root } => root,
            Self::S3 { cache, .. } => cache,
        }
    }

    /// The key that names that folder.
    pub fn root_key(&self) -> &'static str {
        match self {
            Self::Filesystem { .. } => "storage.filesystem.root",
            Self::S3 { .. } => "storage.cache.root",
        }
    }
}

/// A bucket, and how it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Settings {
    /// Its name.
    pub bucket: String,
    /// Its region; `None`: what the environment, the AWS profile or the instance says.
    pub region: Option<String>,
    /// What stands before `docker/registry/v2` in every key, as it was said.
    pub prefix: String,
    /// Where the store is, if it is not Amazon's, or if Amazon's is reached by another way.
    pub endpoint: Option<Url>,
    /// Whether the bucket stands in the path, and not before the host's name.
    pub path_style: bool,
    /// Whether clients get the blobs that are not on this host's disk from S3 itself.
    pub redirect: bool,
    /// The storage class of what is written (`STANDARD_IA`); `None`: the bucket's own.
    pub storage_class: Option<String>,
    /// How what is written is encrypted; `None`: as the bucket says.
    pub encryption: Option<Encryption>,
    /// A fixed access key; `None`: the standard AWS chain.
    pub keys: Option<AccessKeys>,
}

/// How S3 encrypts what is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Encryption {
    /// With S3's own keys.
    Aes256,
    /// With a key of KMS.
    Kms {
        /// Its ID or ARN; `None`: the account's key for S3.
        key: Option<String>,
    },
}

/// A fixed access key of AWS, or of a store that speaks S3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessKeys {
    /// Its ID.
    pub id: String,
    /// Its secret.
    pub secret: Secret,
}

/// One registry that is mirrored.
#[derive(Debug, Clone, PartialEq)]
pub struct UpstreamSettings {
    /// The name clients know it by (`docker.io`).
    pub registry: RegistryHost,
    /// Where its API is (`https://registry-1.docker.io`), without trailing slashes in the paths: the
    /// next is asked where one fails. Never empty.
    pub urls: Vec<Url>,
    /// What it is asked as; anonymously without.
    pub credentials: Option<Credentials>,
    /// Whether what only these credentials can see is given to everybody who can reach this mirror.
    pub share_private: bool,
}

/// A user name and password for an upstream.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// The account.
    pub username: String,
    /// Its password or access token.
    pub password: Secret,
}

/// A text that must never be seen: it prints as `***`.
#[derive(Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    pub fn new(secret: impl Into<String>) -> Self {
        Self(secret.into())
    }

    /// The secret itself, for the one place that sends it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// When a cached tag is asked for again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Freshness {
    /// How long a tag is served without asking the upstream.
    pub window: Duration,
    /// How long the upstream may take to confirm it before what is cached is served.
    pub deadline: Duration,
}

/// How long an upstream may take, for all but the revalidation of a tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// To accept a connection.
    pub connect: Duration,
    /// From the request to the head of its answer.
    pub headers: Duration,
    /// Between two pieces of a body.
    pub idle: Duration,
}

/// How the storage, or a client's mirror, is probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HealthSettings {
    /// Time between two probes.
    pub interval: Duration,
    /// Failed probes in a row before the agent is not ready. At least 1.
    pub threshold: u32,
}

/// What is logged, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogSettings {
    /// The least severe level that is logged.
    pub level: LogLevel,
    /// The form.
    pub format: LogFormat,
    /// Whether each request is logged.
    pub access: bool,
    /// Fields added to every line (`service: registry`).
    pub fields: Vec<(String, String)>,
}

/// Severity, as in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// What failed and was not made up for.
    Error,
    /// What a person should know of: an upstream that is down, a probe that failed.
    Warn,
    /// What the agent does: starts, requests, fills.
    Info,
    /// How it does it, for finding a fault.
    Debug,
}

/// The form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text on a terminal, journald under systemd, JSON elsewhere.
    Auto,
    /// Lines for people, on standard error.
    Text,
    /// One JSON object a line, on standard error.
    Json,
    /// The journal's native protocol.
    Journald,
}
