//! The control plane that the fleet's tests run against (`support/control_plane`), by the clients
//! that the agent has: that it does what Amazon's does, and goes wrong as it is told. `differential`
//! holds it to what others say who are not ours: moto and ministack.
#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

mod clients;
mod clouds;
#[path = "../support/control_plane/mod.rs"]
mod control_plane;
mod differential;
mod faults;
mod groups;
mod hooks;
mod metadata;
mod names;
#[path = "../support/mod.rs"]
mod support;
mod targets;
