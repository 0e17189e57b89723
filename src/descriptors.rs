//! File descriptors: as many as the system lets this process have, and how many of them clients may
//! take.
//!
//! A connection takes one, and one more for the blob that is sent on it; an upstream's download takes
//! two. With none left nothing works: nobody is accepted on any port, no file is opened, no upstream
//! is asked.

use crate::registry::server::Places;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Connections of the registry at once, where there are descriptors for them. More wait to be
/// accepted: each costs memory.
const CONNECTIONS: u64 = 4096;
/// Connections of the admin listener at once.
const ADMIN_CONNECTIONS: u64 = 32;
/// What is kept for all else: the admin listener, upstreams and their downloads, files of the store,
/// and the runtime's own.
const KEPT: u64 = 256;

/// How many connections there may be at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connections {
    /// Of the registry: half of them are for one client, so that others get in beside it.
    pub registry: Places,
    /// Of the admin listener: its clients are this host's own.
    pub admin: Places,
}

impl Connections {
    /// Raises the soft limit of descriptors to the hard one, and shares out what there is. Outside
    /// systemd the soft limit is often 1,024, for the sake of programs that use select(2).
    pub fn with_all_descriptors() -> Self {
        let limit = raise().unwrap_or_else(|errno| {
            tracing::warn!(%errno, "the limit of file descriptors could not be raised: {errno}");
            getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft)
        });
        let connections = Self::within(limit);
        if (connections.registry.all as u64) < CONNECTIONS {
            tracing::warn!(
                descriptors = limit,
                connections = connections.registry.all,
                "few clients can connect at once: raise the hard limit of open files (`LimitNOFILE=`, \
                 `ulimit -Hn`)"
            );
        } else {
            tracing::debug!(descriptors = limit, "the limit of file descriptors");
        }
        connections
    }

    fn within(descriptors: u64) -> Self {
        let left = descriptors - KEPT.min(descriptors / 2);
        let places = |most: u64, of: u64| usize::try_from(of.clamp(1, most)).unwrap_or(1);
        let registry = places(CONNECTIONS, left / 2);
        let admin = places(ADMIN_CONNECTIONS, descriptors / 8);
        Self {
            registry: Places {
                all: registry,
                each: (registry / 2).max(1),
            },
            admin: Places {
                all: admin,
                each: admin,
            },
        }
    }
}

fn raise() -> nix::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_leave_descriptors_for_everything_else() {
        for (descriptors, registry, admin) in [
            (1 << 20, 4096, 32),
            (8448, 4096, 32),
            (8192, 3968, 32),
            (1024, 384, 32),
            (96, 24, 12),
            (2, 1, 1),
        ] {
            let within = Connections::within(descriptors);
            assert_eq!((within.registry.all, within.admin.all), (registry, admin));
            assert_eq!(within.registry.each, (registry / 2).max(1), "half");
            assert_eq!(within.admin.each, admin);
        }
    }
}
