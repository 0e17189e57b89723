//! `host`, and the host's own name for its registry (`fleet.dns.hosts`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use url::Url;

use super::super::error::{KeyPath, quoted};
use super::super::fragment::{EngineFragment, HostFragment, ManageFragment, ManageWord};
use super::super::settings::{DockerSettings, Drift, HostSettings, Manage, Restart};
use super::{Conversion, OwnAddress};
use crate::oci::RegistryHost;

impl Conversion<'_> {
    pub(super) fn host(
        &mut self,
        said: HostFragment,
        local_name: Option<String>,
        own: Option<OwnAddress>,
        mirrored: Vec<RegistryHost>,
    ) -> Option<HostSettings> {
        let mirror = match (said.mirror, own) {
            (Some(mirror), _) => self.mirror(&mirror),
            (None, Some(OwnAddress { listen, tls })) => {
                listen.and_then(|listen| own_address(listen, tls))
            }
            (None, None) if self.complete => {
                let message = "is missing: a client serves nothing itself, so this key has to say \
                               where the mirror is, such as http://docker-mirror.local";
                self.refuse(&KeyPath::of("host.mirror"), message)
            }
            (None, None) => None,
        };
        let here = KeyPath::of("host.ca");
        let ca = said.ca.map(|ca| self.beside(&here, &ca));
        if ca.is_some()
            && self.complete
            && mirror.as_ref().is_some_and(|url| url.scheme() == "http")
        {
            let message =
                "is the authority of a mirror that speaks https, and `host.mirror` is http";
            self.refuse::<()>(&here, message);
        }
        let docker = said.docker.unwrap_or_default();
        let least = Duration::from_secs(1);
        let withdraw_after = self.duration("host.withdraw_after", said.withdraw_after, 30, least);
        let local_name = match local_name {
            Some(name) => Some(self.host_name(&KeyPath::of("fleet.dns.hosts.name"), &name)?),
            None => None,
        };
        Some(HostSettings {
            mirror: mirror?,
            ca,
            docker: DockerSettings {
                manage: manage(docker.manage),
                restart: docker.restart.unwrap_or(Restart::Never),
                experimental: docker.experimental,
            },
            containerd: engine(said.containerd),
            podman: engine(said.podman),
            buildkit: engine(said.buildkit),
            drift: said.drift.unwrap_or(Drift::Correct),
            withdraw_after: withdraw_after?,
            local_name,
            mirrored,
        })
    }

    /// docker 20.10 refuses a mirror with a path, and every version one with a user, a query or a
    /// fragment.
    fn mirror(&mut self, said: &str) -> Option<Url> {
        let path = KeyPath::of("host.mirror");
        let url = self.url(&path, said)?;
        if url.path().is_empty() || url.path() == "/" {
            return Some(url);
        }
        let message = format!(
            "{} has a path, which docker before 25 refuses: must be a scheme, a host and perhaps a \
             port, such as http://docker-mirror.local",
            quoted(said)
        );
        self.refuse(&path, message)
    }

    /// A host's name (RFC 1123, section 2.1), in lower case.
    pub(super) fn host_name(&mut self, path: &KeyPath, said: &str) -> Option<String> {
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
        };
        if said.len() <= 253 && said.split('.').all(label) && said.parse::<IpAddr>().is_err() {
            return Some(said.to_ascii_lowercase());
        }
        let message = format!(
            "{} is not a host's name: must be letters, digits, dashes and dots, such as \
             docker-local.example.com",
            quoted(said)
        );
        self.refuse(path, message)
    }
}

/// How this host reaches its own registry: all interfaces include the loopback one.
fn own_address(listen: SocketAddr, tls: bool) -> Option<Url> {
    let ip = match listen.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) | IpAddr::V6(Ipv6Addr::UNSPECIFIED) => {
            IpAddr::V4(Ipv4Addr::LOCALHOST)
        }
        ip => ip,
    };
    let scheme = if tls { "https" } else { "http" };
    let address = SocketAddr::new(ip, listen.port());
    Url::parse(&format!("{scheme}://{address}")).ok()
}

fn engine(said: Option<EngineFragment>) -> Manage {
    manage(said.unwrap_or_default().manage)
}

fn manage(said: Option<ManageFragment>) -> Manage {
    match said {
        None | Some(ManageFragment::Word(ManageWord::Auto)) => Manage::Auto,
        Some(ManageFragment::Word(ManageWord::Report)) => Manage::Report,
        Some(ManageFragment::Flag(true)) => Manage::Always,
        Some(ManageFragment::Flag(false)) => Manage::Never,
    }
}
