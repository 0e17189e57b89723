//! What a registry is called, and what else differs between registries.

use super::record::Role;

/// The names of one registry. Hosts find all of them at its address.
#[derive(Debug)]
pub struct Names {
    /// Where its API is.
    pub registry: &'static str,
    /// Where it gives out tokens, at `/token`.
    pub auth: &'static str,
    /// Where it sends clients for blobs.
    pub cdn: &'static str,
    /// Who its tokens are for.
    pub service: &'static str,
    /// Pulls in six hours that it allows an address, where it limits them.
    pub limit: Option<u32>,
}

/// Docker Hub.
pub const DOCKER_HUB: Names = Names {
    registry: "registry-1.docker.io",
    auth: "auth.docker.io",
    cdn: "production.cloudflare.docker.com",
    service: "registry.docker.io",
    limit: Some(100),
};

/// GitHub's registry, which gives out tokens under its own name.
pub const GHCR: Names = Names {
    registry: "ghcr.io",
    auth: "ghcr.io",
    cdn: "pkg-containers.githubusercontent.com",
    service: "ghcr.io",
    limit: None,
};

impl Names {
    /// Each of them once.
    pub fn all(&self) -> Vec<&'static str> {
        let mut names = vec![self.registry, self.auth, self.cdn];
        names.dedup();
        names
    }

    /// What is asked with this host and path.
    pub fn role(&self, host: &str, path: &str) -> Role {
        match host {
            host if host == self.auth && path == "/token" => Role::Auth,
            host if host == self.registry => Role::Registry,
            host if host == self.cdn => Role::Cdn,
            _ => Role::None,
        }
    }
}
