//! From what was said to settings that can't be invalid.

mod credentials;
mod fleet;
mod host;
mod hosted;
mod storage;
mod tls;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::{HeaderName, HeaderValue, header};
use serde_json::{Map, Value};
use url::Url;

use super::error::{KeyPath, Place, Remark, quoted};
use super::fragment::{CacheFragment, Fragment, LogFragment, OneOrMany, UpstreamFragment};
use super::limit::CacheLimit;
use super::merge::Merged;
use super::settings::{
    AdminAddress, ClientSettings, FleetSettings, Freshness, HealthSettings, LogFormat, LogLevel,
    LogSettings, Role, Serving, Settings, Storage, Timeouts, UpstreamSettings,
};
use super::source::Sources;
use crate::oci::RegistryHost;

/// Where Docker Hub's API is; its name says something else.
pub(super) const DOCKER_HUB_URL: &str = "https://registry-1.docker.io";

/// The longest path of a Unix socket, in bytes: `sun_path` is 108 with its final NUL.
const SOCKET_PATH_LIMIT: usize = 107;

/// A longer wait is a mistake, and clocks add it without overflow.
const LONGEST: Duration = Duration::from_hours(365 * 24);

/// What says how something is served, of which a client does nothing.
const SERVING_KEYS: &[&str] = &[
    "listen",
    "tls",
    "clients",
    "storage",
    "freshness",
    "timeouts",
    "headers",
    "drain",
    "hosted",
    "adopt",
    "shard",
    "immutable_tags",
    "delete",
    "sparse",
    "auth",
];

/// Headers by which HTTP itself finds where an answer ends.
const FRAMING: &[HeaderName] = &[
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Settings from what was said; none if a remark was added, since then some of it is missing.
///
/// `complete` is whether everything that was said is in `merged`. If some was refused before, then
/// what is missing, or what is wrong of two keys together, would only be a consequence.
pub(super) fn settings(
    merged: &Merged,
    sources: &Sources,
    complete: bool,
    warnings: &mut Vec<Remark>,
    remarks: &mut Vec<Remark>,
) -> Option<Settings> {
    let before = remarks.len();
    let Ok(fragment) = serde_json::from_value(Value::Object(merged.members().clone())) else {
        // serde's own message would repeat the value, which may be a secret.
        let message = "fits its schema but can't be read: please report this as a bug";
        remarks.push(Remark::new(&Place::Default, "", message));
        return None;
    };
    let settings = Conversion {
        merged,
        sources,
        complete,
        warnings,
        remarks,
    }
    .settings(fragment)?;
    (complete && remarks.len() == before).then_some(settings)
}

struct Conversion<'a> {
    merged: &'a Merged,
    sources: &'a Sources,
    complete: bool,
    warnings: &'a mut Vec<Remark>,
    remarks: &'a mut Vec<Remark>,
}

/// Where the registry of this host is.
#[derive(Clone, Copy)]
struct OwnAddress {
    listen: Option<SocketAddr>,
    tls: bool,
}

impl Conversion<'_> {
    /// Converts every key before it gives up on any, so that all that is wrong is said at once.
    fn settings(mut self, mut fragment: Fragment) -> Option<Settings> {
        let (serving, admin, own, mirrored) = match fragment.role.unwrap_or(Role::Mirror) {
            role @ (Role::Mirror | Role::Reader | Role::Writer) => {
                let storage = self.storage(role, fragment.storage.as_mut());
                let root = storage.as_ref().map(|storage| storage.root().to_owned());
                let (serving, own) = self.serving(role, &mut fragment, storage);
                let admin = self.admin(fragment.admin.take(), root.as_deref());
                self.check_ports(own.listen, admin.as_ref());
                let upstreams = serving.iter().flat_map(|serving| &serving.upstreams);
                let mirrored = upstreams.map(|one| one.registry.clone()).collect();
                (serving.map(Some), admin, Some(own), mirrored)
            }
            Role::Client => {
                self.warn_of_what_a_client_ignores();
                let admin = self.client_admin(fragment.admin.take());
                let mirrored = self.mirrored_elsewhere(fragment.upstreams.take());
                (Some(None), admin, None, mirrored)
            }
        };
        let health = fragment.health.unwrap_or_default();
        let least = Duration::from_millis(1);
        let interval = self.duration("health.interval", health.interval, 10, least);
        let mut fleet = fragment.fleet.unwrap_or_default();
        let hosts = fleet.dns.as_mut().and_then(|dns| dns.hosts.take());
        let local_name = hosts.unwrap_or_default().name;
        let fleet = match own {
            Some(_) => self.fleet(fleet),
            None => Some(FleetSettings::default()),
        };
        let host = fragment.host.unwrap_or_default();
        let host = self.host(host, local_name, own, mirrored);
        let auth = serving
            .as_ref()
            .and_then(|serving| serving.as_ref()?.auth.as_ref());
        self.check_mirror_name(auth, host.as_ref());
        Some(Settings {
            admin: admin?,
            serving: serving?,
            health: HealthSettings {
                interval: interval?,
                threshold: health.threshold.unwrap_or(3),
            },
            log: log(fragment.log.unwrap_or_default()),
            host: host?,
            fleet: fleet?,
        })
    }

    /// What is served, and where, which is known also where something else is wrong.
    fn serving(
        &mut self,
        role: Role,
        fragment: &mut Fragment,
        storage: Option<Storage>,
    ) -> (Option<Serving>, OwnAddress) {
        let cache = fragment.storage.take().unwrap_or_default().cache;
        let CacheFragment { limit, .. } = cache.unwrap_or_default();
        let freshness = fragment.freshness.take().unwrap_or_default();
        let timeouts = fragment.timeouts.take().unwrap_or_default();

        let listen = self.listen(fragment.listen.take());
        let cache_limit = self.cache_limit(limit);
        let tls = self.tls(fragment.tls.take());
        let own = OwnAddress {
            listen,
            tls: tls.is_some(),
        };
        let clients = fragment.clients.take().unwrap_or_default();
        let patience = self.duration("clients.idle", clients.idle, 60, Duration::from_millis(1));
        let upstreams = match role {
            Role::Mirror => self.upstreams(fragment.upstreams.take(), listen),
            role => self.no_upstreams(role, fragment.upstreams.is_some()),
        };
        let window = self.duration("freshness.window", freshness.window, 60, Duration::ZERO);
        let least = Duration::from_millis(1);
        let deadline = self.duration("freshness.deadline", freshness.deadline, 1, least);
        let connect = self.duration("timeouts.connect", timeouts.connect, 5, least);
        let header = self.duration("timeouts.headers", timeouts.headers, 15, least);
        let idle = self.duration("timeouts.idle", timeouts.idle, 15, least);
        let headers = self.headers(fragment.headers.take().unwrap_or_default());
        let drain = self.duration("drain", fragment.drain.take(), 30, Duration::ZERO);
        let hosted = self.hosted(role, fragment, &upstreams);
        if role == Role::Mirror
            && !hosted.names.is_empty()
            && matches!(storage, Some(Storage::S3 { .. }))
        {
            let message = "stands beside `storage.s3`, in which a mirror keeps what can be fetched \
                           again, for all mirrors: take pushes by a writer (`role: writer`), or keep \
                           all on the disk (`storage.filesystem`)";
            self.refuse::<()>(&KeyPath::of("hosted"), message);
        }
        if role == Role::Mirror
            && let Some(Storage::S3 { bucket, .. }) = &storage
            && bucket.redirect
        {
            let message = "is for readers and writers: a mirror gives blobs out by itself, as it \
                           verifies them";
            self.refuse::<()>(&KeyPath::of("storage.s3.redirect"), message);
        }
        let auth = self.auth(fragment.auth.take(), &hosted, listen, tls.as_ref());
        let serving = || {
            Some(Serving {
                role,
                listen: listen?,
                tls,
                clients: ClientSettings { idle: patience? },
                storage: storage?,
                cache_limit: cache_limit?,
                upstreams,
                timeouts: Timeouts {
                    connect: connect?,
                    headers: header?,
                    idle: idle?,
                },
                freshness: Freshness {
                    window: window?,
                    deadline: deadline?,
                },
                headers,
                drain: drain?,
                hosted,
                auth,
            })
        };
        (serving(), own)
    }

    fn check_ports(&mut self, listen: Option<SocketAddr>, admin: Option<&AdminAddress>) {
        if let (Some(listen), Some(AdminAddress::Tcp(admin))) = (listen, admin)
            && listen.port() == admin.port()
            && listen.port() != 0
            && self.complete
        {
            let message =
                format!("{admin} has the port of `listen` ({listen}): give it one of its own");
            self.refuse::<()>(&KeyPath::of("admin"), message);
        }
    }

    /// A file for a whole fleet, and beside it a drop-in that says `role: client`, is no mistake:
    /// so these keys are not refused.
    fn warn_of_what_a_client_ignores(&mut self) {
        for key in SERVING_KEYS {
            if self.merged.members().contains_key(*key) {
                let message = "is not used: a client serves nothing";
                let warning = self.merged.remark(&KeyPath::of(key), message);
                self.warnings.push(warning);
            }
        }
        let members = self.merged.members();
        let fleet = members.get("fleet").and_then(Value::as_object);
        let dns = fleet
            .and_then(|fleet| fleet.get("dns"))
            .and_then(Value::as_object);
        // A client can have a name of its own.
        for (path, members, own) in [("fleet", fleet, "dns"), ("fleet.dns", dns, "hosts")] {
            for key in members
                .into_iter()
                .flat_map(Map::keys)
                .filter(|key| *key != own)
            {
                let message = "is not used: a client is no mirror of the fleet";
                let warning = self.merged.remark(&KeyPath::of(path).key(key), message);
                self.warnings.push(warning);
            }
        }
    }

    /// The registries that a client's engines ask the mirror for, by their names alone: how the
    /// mirror asks them, and as whom, is not for this host to know.
    fn mirrored_elsewhere(
        &mut self,
        said: Option<Vec<Option<UpstreamFragment>>>,
    ) -> Vec<RegistryHost> {
        let Some(said) = said else {
            return vec![RegistryHost::docker_hub()];
        };
        let list = KeyPath::of("upstreams");
        let mut first = BTreeMap::new();
        let mut mirrored = Vec::new();
        for (index, upstream) in said.into_iter().enumerate() {
            if let Some(upstream) = upstream {
                let registry = self.registry(&list.item(index), &upstream.registry, &mut first);
                mirrored.extend(registry);
            }
        }
        mirrored
    }

    /// A client has no storage; its socket is in what would be the storage's default folder where
    /// there is no better one.
    fn client_admin(&mut self, said: Option<String>) -> Option<AdminAddress> {
        let state = self.state_folder();
        let nowhere = ["RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"]
            .iter()
            .all(|variable| folder(self.sources, variable).is_none());
        if said.is_none() && nowhere && state.is_none() {
            if !self.complete {
                return None;
            }
            let message = "nothing says where the admin socket can be: set this key (none of \
                           RUNTIME_DIRECTORY, XDG_RUNTIME_DIR, STATE_DIRECTORY, XDG_STATE_HOME and \
                           HOME is set to a path)";
            return self.refuse(&KeyPath::of("admin"), message);
        }
        self.admin(said, state.as_deref())
    }

    /// Records what is wrong with a value; there is nothing to go on with.
    fn refuse<T>(&mut self, path: &KeyPath, message: impl Into<String>) -> Option<T> {
        self.remarks.push(self.merged.remark(path, message));
        None
    }

    fn listen(&mut self, said: Option<String>) -> Option<SocketAddr> {
        let said = said.unwrap_or_else(|| "127.0.0.1:5000".to_owned());
        address(&said).or_else(|| {
            let message = format!(
                "{} is not an address: must be an IP address and a port (127.0.0.1:5000, \
                 [::1]:5000), or a port alone for all interfaces (:5000)",
                quoted(&said)
            );
            self.refuse(&KeyPath::of("listen"), message)
        })
    }

    /// Where state is kept if nothing is said: what systemd, or else the session, gives.
    fn state_folder(&self) -> Option<PathBuf> {
        let below_home = |home| folder(self.sources, home).map(|f| f.join(".local/state"));
        let state = || folder(self.sources, "XDG_STATE_HOME").or_else(|| below_home("HOME"));
        folder(self.sources, "STATE_DIRECTORY")
            .or_else(|| state().map(|folder| folder.join("registry-agent")))
    }

    fn cache_limit(&mut self, said: Option<String>) -> Option<CacheLimit> {
        let Some(said) = said else {
            return Some(CacheLimit::DEFAULT);
        };
        said.parse().ok().or_else(|| {
            let message = format!(
                "{} is not a limit: must be bytes with a unit (500GB, 20GiB), or a share of the \
                 disk, 1% to 100%",
                quoted(&said)
            );
            self.refuse(&KeyPath::of("storage.cache.limit"), message)
        })
    }

    fn admin(&mut self, said: Option<String>, root: Option<&Path>) -> Option<AdminAddress> {
        let path = KeyPath::of("admin");
        let Some(said) = said else {
            let runtime = folder(self.sources, "RUNTIME_DIRECTORY");
            let session = || Some(folder(self.sources, "XDG_RUNTIME_DIR")?.join("registry-agent"));
            let folder = runtime
                .or_else(session)
                .or_else(|| root.map(Path::to_owned))?;
            return self.socket(&path, folder.join("admin.sock"));
        };
        if let Some(socket) = said.strip_prefix("unix:") {
            if absolute(socket) {
                return self.socket(&path, socket.into());
            }
            let message = format!("{} is not a path that begins with /", quoted(socket));
            return self.refuse(&path, message);
        }
        let wanted =
            "must be unix:/path/of/a.sock, or a loopback address and a port (127.0.0.1:5001)";
        match address(&said) {
            Some(address) if address.ip().is_loopback() => Some(AdminAddress::Tcp(address)),
            Some(_) => {
                let message = format!(
                    "{} can be reached from other hosts, and the admin listener asks nobody who \
                     they are: {wanted}",
                    quoted(&said)
                );
                self.refuse(&path, message)
            }
            None => self.refuse(
                &path,
                format!("{} is not an address: {wanted}", quoted(&said)),
            ),
        }
    }

    fn socket(&mut self, path: &KeyPath, socket: PathBuf) -> Option<AdminAddress> {
        let length = socket.as_os_str().len();
        if length > SOCKET_PATH_LIMIT {
            let message = format!(
                "unix:{} is {length} bytes long, and a Unix socket's path can have \
                 {SOCKET_PATH_LIMIT}: set a shorter one, such as \
                 unix:/run/registry-agent/admin.sock",
                socket.display()
            );
            return self.refuse(path, message);
        }
        Some(AdminAddress::Unix(socket))
    }

    /// Who asks no upstream has none.
    fn no_upstreams(&mut self, role: Role, said: bool) -> Vec<UpstreamSettings> {
        if said {
            let message = format!(
                "a {} asks no other registry: remove the key, or make this a mirror (`role: mirror`)",
                role.as_str()
            );
            self.refuse::<()>(&KeyPath::of("upstreams"), message);
        }
        Vec::new()
    }

    fn upstreams(
        &mut self,
        said: Option<Vec<Option<UpstreamFragment>>>,
        listen: Option<SocketAddr>,
    ) -> Vec<UpstreamSettings> {
        let list = KeyPath::of("upstreams");
        let Some(said) = said else {
            let registry = RegistryHost::docker_hub();
            let url = self.url(&list, &default_url(&registry));
            let hub = url.map(|url| UpstreamSettings {
                registry,
                urls: vec![url],
                credentials: None,
                share_private: false,
            });
            return hub.into_iter().collect();
        };
        if said.is_empty() {
            let message = "the list is empty; must name at least one registry, or be left out for \
                           docker.io";
            self.refuse::<()>(&list, message);
        }
        let mut first: BTreeMap<RegistryHost, KeyPath> = BTreeMap::new();
        let mut upstreams = Vec::new();
        for (index, upstream) in said.into_iter().enumerate() {
            let Some(upstream) = upstream else { continue };
            let here = list.item(index);
            let registry = self.registry(&here, &upstream.registry, &mut first);
            let default = || registry.as_ref().map(|it| OneOrMany::One(default_url(it)));
            let urls = upstream.url.or_else(default);
            let urls = urls.and_then(|urls| self.urls(&here.key("url"), urls));
            if let Some(listen) = listen
                && let Some(own) = urls.iter().flatten().find(|url| is_at(url, listen))
            {
                let message = format!(
                    "{own} is where this agent itself listens (`listen`, {listen}): it would ask \
                     itself for ever"
                );
                self.refuse::<()>(&here.key("url"), message);
            }
            let credentials = match upstream.credentials {
                None => Some(None),
                Some(said) => self.credentials(&here, said).map(Some),
            };
            if upstream.share_private == Some(true) && matches!(credentials, Some(None)) {
                let message = "true without `credentials`: nothing private can be seen";
                self.refuse::<()>(&here.key("share_private"), message);
            }
            if let (Some(registry), Some(urls), Some(credentials)) = (registry, urls, credentials) {
                upstreams.push(UpstreamSettings {
                    registry,
                    urls,
                    credentials,
                    share_private: upstream.share_private.unwrap_or(false),
                });
            }
        }
        upstreams
    }

    fn registry(
        &mut self,
        upstream: &KeyPath,
        said: &str,
        first: &mut BTreeMap<RegistryHost, KeyPath>,
    ) -> Option<RegistryHost> {
        let path = upstream.key("registry");
        let registry = match said.parse::<RegistryHost>() {
            Ok(registry) => registry,
            Err(error) => return self.refuse(&path, error.to_string()),
        };
        if let Some(before) = first.get(&registry) {
            let message = format!("{registry} is already {before}: name each registry once");
            return self.refuse(&path, message);
        }
        first.insert(registry.clone(), upstream.clone());
        Some(registry)
    }

    fn urls(&mut self, path: &KeyPath, said: OneOrMany) -> Option<Vec<Url>> {
        match said {
            OneOrMany::One(url) => Some(vec![self.url(path, &url)?]),
            OneOrMany::Many(urls) if urls.is_empty() => {
                self.refuse(path, "the list is empty; must name at least one URL")
            }
            OneOrMany::Many(urls) => {
                let item = |(index, url): (usize, &String)| self.url(&path.item(index), url);
                let urls: Vec<Option<Url>> = urls.iter().enumerate().map(item).collect();
                urls.into_iter().collect()
            }
        }
    }

    fn url(&mut self, path: &KeyPath, said: &str) -> Option<Url> {
        // What stands before an @ or after a ? may be a secret.
        let shown = if said.contains(['@', '?']) {
            "the URL".to_owned()
        } else {
            quoted(said)
        };
        let url = Url::parse(said);
        let wrong = match &url {
            Err(error) => format!("is not a URL ({error})"),
            Ok(url) if !matches!(url.scheme(), "http" | "https") => {
                "is neither http nor https".to_owned()
            }
            Ok(url) if !url.username().is_empty() || url.password().is_some() => {
                "holds a user name or password: put them in `credentials`".to_owned()
            }
            Ok(url) if url.query().is_some() || url.fragment().is_some() => {
                "holds a query or fragment: remove it".to_owned()
            }
            Ok(_) => {
                let mut url = url.ok()?;
                let trimmed = url.path().trim_end_matches('/').to_owned();
                url.set_path(&trimmed);
                return Some(url);
            }
        };
        let message = format!("{shown} {wrong}; must be a URL such as {DOCKER_HUB_URL}");
        self.refuse(path, message)
    }

    /// A file by what was said of it: a relative path is beside the file that says it.
    fn beside(&self, path: &KeyPath, said: &str) -> PathBuf {
        let folder = match self.merged.origin(path).map(|origin| &origin.place) {
            Some(Place::File(file)) => file.parent().unwrap_or(Path::new("")),
            _ => Path::new(""),
        };
        folder.join(said)
    }

    fn duration(
        &mut self,
        dotted: &str,
        said: Option<String>,
        default_seconds: u64,
        least: Duration,
    ) -> Option<Duration> {
        let Some(said) = said else {
            return Some(Duration::from_secs(default_seconds));
        };
        let wrong = match humantime::parse_duration(&said) {
            Ok(duration) if (least..=LONGEST).contains(&duration) => return Some(duration),
            Ok(duration) if duration < least => format!("is too short: at least {least:?}"),
            Ok(_) => "is too long: at most 365d".to_owned(),
            Err(_) => "is not a duration: must be numbers with units, such as 500ms, 60s or 1m30s"
                .to_owned(),
        };
        self.refuse(&KeyPath::of(dotted), format!("{} {wrong}", quoted(&said)))
    }

    fn headers(&mut self, said: BTreeMap<String, OneOrMany>) -> Vec<(HeaderName, HeaderValue)> {
        let mut headers = Vec::new();
        for (name, values) in said {
            let here = KeyPath::of("headers").key(&name);
            let Ok(name) = name.parse::<HeaderName>() else {
                self.refuse::<()>(&here, "is not a header's name: letters, digits and dashes");
                continue;
            };
            if FRAMING.contains(&name) {
                self.refuse::<()>(&here, "can't be set: HTTP itself needs this header");
                continue;
            }
            let (values, many) = match values {
                OneOrMany::One(value) => (vec![value], false),
                OneOrMany::Many(values) => (values, true),
            };
            for (index, value) in values.into_iter().enumerate() {
                if let Ok(value) = value.parse::<HeaderValue>() {
                    headers.push((name.clone(), value));
                } else {
                    let here = if many { here.item(index) } else { here.clone() };
                    let message = "holds a character that no header can, such as a line's end";
                    self.refuse::<()>(&here, message);
                }
            }
        }
        headers
    }
}

fn log(said: LogFragment) -> LogSettings {
    LogSettings {
        level: said.level.unwrap_or(LogLevel::Info),
        format: said.format.unwrap_or(LogFormat::Auto),
        access: said.access.unwrap_or(true),
        fields: said.fields.unwrap_or_default().into_iter().collect(),
    }
}

/// Where a registry's API is if nothing else is said.
fn default_url(registry: &RegistryHost) -> String {
    if registry.is_docker_hub() {
        DOCKER_HUB_URL.to_owned()
    } else {
        format!("https://{registry}")
    }
}

/// Whether a URL leads to what listens at `listen`, as far as its text says.
fn is_at(url: &Url, listen: SocketAddr) -> bool {
    let all = listen.ip().is_unspecified();
    let same = |ip: IpAddr| ip == listen.ip() || all && (ip.is_loopback() || ip.is_unspecified());
    let host = match url.host() {
        Some(url::Host::Ipv4(ip)) => same(ip.into()),
        Some(url::Host::Ipv6(ip)) => same(ip.into()),
        Some(url::Host::Domain(name)) => {
            name == "localhost"
                && (all || listen.ip() == Ipv4Addr::LOCALHOST || listen.ip() == Ipv6Addr::LOCALHOST)
        }
        None => false,
    };
    host && url.port_or_known_default() == Some(listen.port())
}

/// An IP address and a port, or a port alone, which is all interfaces of both families.
pub(super) fn address(text: &str) -> Option<SocketAddr> {
    match text.strip_prefix(':') {
        Some(port) => format!("[::]:{port}").parse().ok(),
        None => text.parse().ok(),
    }
}

/// Whether a text is a path from the root. A NUL would end it halfway for the kernel.
fn absolute(path: &str) -> bool {
    path.starts_with('/') && !path.contains('\0')
}

/// A folder that systemd or the session named, the first if there are several. The XDG base
/// directory specification has relative ones ignored.
fn folder(sources: &Sources, variable: &str) -> Option<PathBuf> {
    let first = sources.variable(variable)?.split(':').next()?;
    absolute(first).then(|| first.into())
}
