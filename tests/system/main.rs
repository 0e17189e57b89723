//! Whole hosts: real systemd and dockerd, booted by systemd-nspawn, the agent as its unit starts
//! it, and a Docker Hub of our own. Needs root; `tests/all` prepares the machine and runs it.

mod container;
mod control;
#[allow(clippy::unwrap_used, reason = "what plays AWS may panic as a test may")]
#[path = "../support/control_plane/mod.rs"]
mod control_plane;
mod fleet;
mod harness;
mod image;
mod install;
mod interruptions;
mod layout;
mod machine;
mod outage;
mod packages;
mod private;
mod pull;
mod push;
mod registries;
mod service;
mod units;
mod user_data;
mod wiring;
