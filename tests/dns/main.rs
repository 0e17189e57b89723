//! The fleet's DNS providers against real servers: knot for RFC 2136, ministack for Route 53.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

#[path = "../support/mod.rs"]
mod support;

mod knot;
mod ministack;
mod rfc2136;
mod route53;

use std::net::IpAddr;
use std::process::Child;
use std::time::Duration;

use registry_agent::fleet::facts::{InstanceId, Record, Routing};

const GROUP: &str = "mirrors";
const NAME: &str = "fleet.example.com";

/// A server that ends with its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // One that has ended already is no failure of the test.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn id(id: &str) -> InstanceId {
    InstanceId::new(id)
}

/// An instance's record with addresses of one family.
fn record(owner: &str, addresses: &[&str], routing: Routing) -> Record {
    Record {
        identifier: Some(format!("ra/{GROUP}/{owner}")),
        addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        target: None,
        ttl: Duration::from_secs(30),
        routing,
        health_check: None,
    }
}

/// Whose records there are, and with which addresses.
fn owners(records: &[Record]) -> Vec<(&str, Vec<IpAddr>)> {
    let mut owners: Vec<_> = records
        .iter()
        .map(|record| {
            let owner = record.identifier.as_deref().unwrap_or("nobody");
            let owner = owner.rsplit('/').next().unwrap();
            (owner, record.addresses.clone())
        })
        .collect();
    owners.sort();
    owners
}

fn ips(addresses: &[&str]) -> Vec<IpAddr> {
    addresses.iter().map(|ip| ip.parse().unwrap()).collect()
}
