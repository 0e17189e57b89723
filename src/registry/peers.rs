//! How many connections each client has: none may have so many that nobody else gets one.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

/// The connections of every client.
#[derive(Debug)]
pub(super) struct Peers {
    counts: Mutex<HashMap<IpAddr, usize>>,
    share: usize,
}

impl Peers {
    /// One client may have this many connections.
    pub(super) fn new(share: usize) -> Arc<Self> {
        Arc::new(Self {
            counts: Mutex::default(),
            share,
        })
    }

    /// A place for one more connection of this client, until it is dropped; `None` where it has its
    /// share.
    pub(super) fn admit(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let client = client(address);
        let mut counts = self.counts();
        let count = counts.entry(client).or_insert(0);
        if *count >= self.share {
            return None;
        }
        *count += 1;
        Some(Place {
            peers: Arc::clone(self),
            client,
        })
    }

    fn counts(&self) -> std::sync::MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whom an address stands for: with IPv6 a single machine has all the addresses of a /64.
fn client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => {
            let prefix = u128::from(address) >> 64 << 64;
            Ipv6Addr::from(prefix).into()
        }
    }
}

/// The place of one connection.
#[derive(Debug)]
pub(super) struct Place {
    peers: Arc<Peers>,
    client: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.peers.counts();
        if let Some(count) = counts.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_has_its_share_and_leaves_the_rest_to_others() {
        let peers = Peers::new(2);
        let [one, other] = ["192.0.2.1", "192.0.2.2"].map(|text| text.parse().unwrap());
        let places = [peers.admit(one), peers.admit(one)];
        assert!(places.iter().all(Option::is_some));
        assert!(peers.admit(one).is_none());
        assert!(peers.admit(other).is_some());
        drop(places);
        assert!(peers.admit(one).is_some());
        assert!(
            peers.counts().is_empty(),
            "those who have left are forgotten"
        );
    }

    #[test]
    fn the_addresses_of_one_machine_are_one_client() {
        for (one, other, same) in [
            ("2001:db8::1", "2001:db8::2", true),
            ("2001:db8::1", "2001:db8:0:1::1", false),
            ("::ffff:192.0.2.1", "192.0.2.1", true),
            ("192.0.2.1", "192.0.2.2", false),
        ] {
            let [a, b] = [one, other].map(|text| client(text.parse().unwrap()));
            assert_eq!(a == b, same, "{one} {other}");
        }
    }
}
