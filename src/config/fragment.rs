//! What one file or variable may say: the types that the schema is generated from.
//!
//! The doc comments here are what an editor shows, so they are written for the person who edits
//! the file. Every key may be left out; one that is empty (`listen:`) says nothing.

mod fleet;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use super::settings::{Drift, LogFormat, LogLevel, Pull, Restart, Role, Secret, Sparse};

pub(super) use fleet::{
    AliasFragment, AutoscalingFragment, DnsFragment, FleetFragment, LoadBalancerFragment,
    PolicyFragment, Rfc2136Fragment, Route53Fragment, TsigFragment,
};

/// The configuration of registry-agent: `/etc/registry-agent/config.yaml`, the files in
/// `config.d/` beside it, and `REGISTRY_AGENT_*` environment variables, of which the last to name
/// a key wins.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "registry-agent")]
pub(super) struct Fragment {
    /// What this agent does. Default: mirror.
    pub role: Option<Role>,
    /// Where the registry listens: an IP address and a port; `:5000` is all interfaces. Default:
    /// 127.0.0.1:5000.
    #[schemars(example = &"127.0.0.1:5000")]
    pub listen: Option<String>,
    /// Where `/healthz`, `/readyz`, `/metrics` and `/status` are: a Unix socket's path after
    /// `unix:`, or a loopback address and a port. Default: `admin.sock` in the runtime folder that
    /// systemd or the session gives, else in the storage's root.
    #[schemars(example = &"unix:/run/registry-agent/admin.sock", example = &"127.0.0.1:5001")]
    pub admin: Option<String>,
    /// TLS on the registry's port. Default: plain HTTP.
    pub tls: Option<TlsFragment>,
    /// What clients may do.
    pub clients: Option<ClientsFragment>,
    /// Where images are kept.
    pub storage: Option<StorageFragment>,
    /// The registries that are mirrored, each once. Default: docker.io, anonymously.
    // A hole is an item that did not pass the schema: the items beside it are still checked.
    #[schemars(with = "Option<Vec<UpstreamFragment>>")]
    pub upstreams: Option<Vec<Option<UpstreamFragment>>>,
    /// Names that are pushed here, and never asked of an upstream; `*` stands for any characters,
    /// `/` among them. Default: none.
    #[schemars(example = &["mycompany/*"])]
    pub hosted: Option<Vec<String>>,
    /// Hosted names of which what is stored already was pushed here, to another registry over the
    /// same storage for example. What is stored of other names was cached from an upstream, as far
    /// as one can tell, and is not served once they are hosted. Default: none.
    #[schemars(example = &["mycompany/*"])]
    pub adopt: Option<Vec<String>>,
    /// Hosted names that this agent takes pushes for, where several share a storage. Default: all.
    #[schemars(example = &["mycompany/team-a/*"])]
    pub shard: Option<Vec<String>>,
    /// Tags that stay what they are once they are pushed, as patterns of a name and a tag. Default:
    /// none.
    #[schemars(example = &["mycompany/*:v*"])]
    pub immutable_tags: Option<Vec<String>>,
    /// Whether clients may delete what is hosted here. Default: false.
    pub delete: Option<bool>,
    /// Which manifests are taken although they refer to what is not here: never, indexes (to images
    /// of other platforms) or always. Default: indexes.
    pub sparse: Option<Sparse>,
    /// Who may push to, and pull from, the names that are hosted here: users with passwords, or
    /// `none`, which is anybody who can reach the registry. Default: none, and then `hosted` names
    /// are served on loopback only, or to clients with certificates (`tls.client_ca`).
    pub auth: Option<AuthFragment>,
    /// When a cached tag is asked for again.
    pub freshness: Option<FreshnessFragment>,
    /// How long an upstream may take.
    pub timeouts: Option<TimeoutsFragment>,
    /// How the storage, or a client's mirror, is probed.
    pub health: Option<HealthFragment>,
    /// Headers that are added to every answer of the registry: a value or a list of values by name.
    pub headers: Option<BTreeMap<String, OneOrMany>>,
    /// What is logged, and how.
    pub log: Option<LogFragment>,
    /// How long running answers may go on after SIGTERM. Default: 30s.
    #[schemars(example = &"30s")]
    pub drain: Option<String>,
    /// How this host's container engines are wired, by `plan`, `apply` and
    /// registry-agent-host.service.
    pub host: Option<HostFragment>,
    /// How this host takes part in a fleet.
    pub fleet: Option<FleetFragment>,
}

/// How this host's container engines are wired.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct HostFragment {
    /// What the engines are told: http or https, a host, perhaps a port. Default: this host's
    /// registry, by `listen`; a client has to name one.
    #[schemars(example = &"http://127.0.0.1:5000", example = &"http://docker-mirror.local")]
    pub mirror: Option<String>,
    /// The authority of an https mirror whose certificate the system does not trust, in PEM; a path
    /// that does not begin with `/` is beside the file that says it.
    #[schemars(example = &"/etc/registry-agent/mirror-ca.crt")]
    pub ca: Option<String>,
    /// docker.
    pub docker: Option<DockerFragment>,
    /// containerd, by its `certs.d`.
    pub containerd: Option<EngineFragment>,
    /// podman, buildah, skopeo and CRI-O, by a drop-in of their `registries.conf.d`.
    pub podman: Option<EngineFragment>,
    /// A buildkitd of its own, by its `buildkitd.toml`.
    pub buildkit: Option<EngineFragment>,
    /// What is done when somebody else changes what was wired. Default: correct.
    pub drift: Option<Drift>,
    /// How long the mirror has to have failed before the engines are told to go without it.
    /// Default: 30s.
    #[schemars(example = &"30s")]
    pub withdraw_after: Option<String>,
}

/// How docker is wired.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct DockerFragment {
    /// `true` (it has to be here), `false` (it is left alone), `auto` (where it is here) or
    /// `report` (what would be changed is only said). Default: auto.
    pub manage: Option<ManageFragment>,
    /// Whether the daemon may be restarted where a reload is not enough, which ends its containers
    /// unless it has `live-restore`. Default: never.
    pub restart: Option<Restart>,
    /// `experimental` in `daemon.json`. Default: as it is there.
    pub experimental: Option<bool>,
}

/// How an engine is wired.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct EngineFragment {
    /// `true` (it has to be here), `false` (it is left alone), `auto` (where it is here) or
    /// `report` (what would be changed is only said). Default: auto.
    pub manage: Option<ManageFragment>,
}

/// Whether an engine is wired: true, false, auto or report.
#[derive(Clone, Copy, Deserialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum ManageFragment {
    /// true: it has to be here; false: it is left alone.
    Flag(bool),
    /// By a word.
    Word(ManageWord),
}

/// Whether an engine is wired, by a word.
#[derive(Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum ManageWord {
    /// Where it is here.
    Auto,
    /// What would be changed is only said.
    Report,
}

/// TLS on the registry's port: HTTP/2 and HTTP/1.1. Changed files are taken over within a minute,
/// or at SIGHUP. A path that does not begin with `/` is beside the file that says it.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct TlsFragment {
    /// The certificate in PEM, and those between it and its authority after it.
    #[schemars(example = &"/etc/registry-agent/tls.crt")]
    pub certificate: Option<String>,
    /// Its private key in PEM.
    #[schemars(example = &"/etc/registry-agent/tls.key")]
    pub key: Option<String>,
    /// Authorities in PEM: then only clients that show a certificate of one of them are let in.
    #[schemars(example = &"/etc/registry-agent/clients.crt")]
    pub client_ca: Option<String>,
}

/// Who may push and pull, or `none`: anybody.
#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum AuthFragment {
    /// Anybody.
    Nobody(AuthWord),
    /// Users with passwords.
    Users(UsersFragment),
}

/// Who may push and pull, by a word.
#[derive(Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum AuthWord {
    /// Anybody who can reach the registry.
    None,
}

/// Users with passwords.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct UsersFragment {
    /// The users and the bcrypt hashes of their passwords, as `htpasswd -B` writes them. It is read
    /// again when it changes. A path that does not begin with `/` is beside the file that says it.
    #[schemars(example = &"/etc/registry-agent/htpasswd")]
    pub htpasswd: Option<String>,
    /// Who may pull what is hosted here: anonymous (anybody) or authenticated. To push always takes
    /// a password. Default: anonymous.
    pub pull: Option<Pull>,
    /// The host name that people push to, without a port. docker, podman and skopeo send a password
    /// only where `/v2/` asks for it, and it is asked for under this name alone, since a mirror that
    /// asks for one is given those of Docker Hub. Under it, clients are given tokens. Default: none.
    #[schemars(example = &"registry.example.com")]
    pub name: Option<String>,
}

/// What clients may do.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ClientsFragment {
    /// How long a client may take to send a request, keep a connection without one, or read nothing
    /// of an answer. Default: 60s.
    #[schemars(example = &"60s")]
    pub idle: Option<String>,
}

/// Where images are kept.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct StorageFragment {
    /// A local folder in the layout of the CNCF distribution registry.
    pub filesystem: Option<FilesystemFragment>,
    /// A bucket in the same layout, in place of a folder. A reader serves it, a writer pushes to it,
    /// and the mirrors of a fleet share it: each asks it for what is not on its own disk
    /// (`cache.root`) before it asks an upstream, and brings there what everybody may see of what it
    /// has fetched. For mirrors a bucket, or a `prefix`, of their own.
    pub s3: Option<S3Fragment>,
    /// How much of it is kept.
    pub cache: Option<CacheFragment>,
}

/// A bucket in the layout of the CNCF distribution registry. Credentials come from the standard AWS
/// chain: the environment, the AWS profile, a web identity, or the instance's or task's role.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct S3Fragment {
    /// Its name.
    #[schemars(example = &"example-registry")]
    pub bucket: Option<String>,
    /// Its region. Default: what `AWS_REGION`, the AWS profile or the instance says.
    #[schemars(example = &"eu-central-1")]
    pub region: Option<String>,
    /// What stands before `docker/registry/v2` in every key: registry:2's `rootdirectory`. Default:
    /// nothing.
    #[schemars(example = &"registry")]
    pub prefix: Option<String>,
    /// Where a store is that speaks S3. Default: Amazon's, or what `AWS_ENDPOINT_URL_S3` says.
    #[schemars(example = &"https://s3.example.com")]
    pub endpoint: Option<String>,
    /// Whether the bucket stands in the path, and not before the host's name. Default: false.
    pub path_style: Option<bool>,
    /// Whether clients are sent to S3 itself, by URLs that are good for 20 minutes, for the blobs that
    /// this host does not have on its disk: then they have to reach it. Default: false.
    pub redirect: Option<bool>,
    /// The storage class of what is written. Default: STANDARD.
    #[schemars(example = &"INTELLIGENT_TIERING")]
    pub storage_class: Option<String>,
    /// How what is written is encrypted. Default: as the bucket says.
    pub encryption: Option<EncryptionFragment>,
    /// The ID of a fixed access key, with `secret_key`. Better: a role, which needs neither.
    pub access_key: Option<String>,
    /// The secret of a fixed access key.
    #[schemars(with = "Option<String>", extend("writeOnly" = true))]
    pub secret_key: Option<Secret>,
}

/// How S3 encrypts what is written.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct EncryptionFragment {
    /// `AES256` or `aws:kms`.
    #[schemars(example = &"aws:kms")]
    pub sse: Option<String>,
    /// The key of KMS, by its ID or ARN. Default: the account's key for S3.
    pub kms_key: Option<String>,
}

/// How much of what was fetched is kept.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CacheFragment {
    /// The folder of the disk cache in front of `storage.s3`, from `/`. Default: the state folder
    /// that systemd or the session gives.
    #[schemars(example = &"/var/cache/registry-agent")]
    pub root: Option<String>,
    /// How much may be stored, in bytes (500GB, 20GiB) or as a share (80%) of what others leave of
    /// the disk that holds it: of what is stored and what is free, together. Above it, what was not
    /// used for longest is removed, down to nine tenths of it. Default: 80%.
    #[schemars(example = &"80%", example = &"500GB")]
    pub limit: Option<String>,
}

/// A local folder in the layout of the CNCF distribution registry.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct FilesystemFragment {
    /// The folder that holds `docker/registry/v2`, from `/`. Default: the state folder that systemd
    /// or the session gives.
    #[schemars(example = &"/var/lib/registry-agent")]
    pub root: Option<String>,
}

/// One registry that is mirrored.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct UpstreamFragment {
    /// The name that clients know it by.
    #[schemars(example = &"docker.io", example = &"ghcr.io")]
    pub registry: String,
    /// Where its API is, or a list of places, of which the next is asked where one fails. Default:
    /// the registry's own name by https.
    #[schemars(example = &"https://registry-1.docker.io")]
    pub url: Option<OneOrMany>,
    /// What it is asked as. Default: anonymously.
    pub credentials: Option<CredentialsFragment>,
    /// Whether images that only these credentials can pull are kept, and given to everybody who can
    /// reach this mirror. Default: false; then clients are told that the mirror has no such image,
    /// and ask the registry themselves.
    pub share_private: Option<bool>,
}

/// A user name with a password, or with a file that holds it.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CredentialsFragment {
    /// The account.
    #[schemars(example = &"alice")]
    pub username: String,
    /// The password or access token itself. Better: `password_file`.
    #[schemars(with = "Option<String>", extend("writeOnly" = true))]
    pub password: Option<Secret>,
    /// A file that holds the password or access token and nothing else; a path that does not begin
    /// with `/` is beside the file that says it.
    #[schemars(example = &"/etc/registry-agent/docker.io.password")]
    pub password_file: Option<String>,
}

/// When a cached tag is asked for again.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct FreshnessFragment {
    /// How long a tag is served without asking the upstream. Default: 60s.
    #[schemars(example = &"60s")]
    pub window: Option<String>,
    /// How long the upstream may take to confirm it before what is cached is served. Default: 1s.
    #[schemars(example = &"1s")]
    pub deadline: Option<String>,
}

/// How long an upstream may take, for all but the confirmation of a cached tag.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct TimeoutsFragment {
    /// To accept a connection. Default: 5s.
    #[schemars(example = &"5s")]
    pub connect: Option<String>,
    /// From a request to the head of its answer. Default: 15s.
    #[schemars(example = &"15s")]
    pub headers: Option<String>,
    /// Between two pieces of a body, after which a download goes on by a new request. Default: 15s.
    #[schemars(example = &"15s")]
    pub idle: Option<String>,
}

/// How the storage, or a client's mirror, is probed.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct HealthFragment {
    /// Time between two probes. Default: 10s.
    #[schemars(example = &"10s")]
    pub interval: Option<String>,
    /// Failed probes in a row before the agent is not ready. Default: 3.
    #[schemars(range(min = 1))]
    pub threshold: Option<u32>,
}

/// A value, or several.
#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    /// One value.
    One(String),
    /// Several values, in their order.
    Many(Vec<String>),
}

/// What is logged, and how.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct LogFragment {
    /// The least severe level that is logged. Default: info.
    pub level: Option<LogLevel>,
    /// The form. Default: auto.
    pub format: Option<LogFormat>,
    /// Whether each request is logged, but for the successful checks of `/` and `/v2/`. Default:
    /// true.
    pub access: Option<bool>,
    /// Fields added to every line.
    pub fields: Option<BTreeMap<String, String>>,
}
