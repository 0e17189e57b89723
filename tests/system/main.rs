//! Whole hosts: real systemd and dockerd, booted by systemd-nspawn, the agent as its unit starts
//! it, and a Docker Hub of our own. Needs root; `tests/all` prepares the machine and runs it.

mod control;
mod harness;
mod install;
mod interruptions;
mod layout;
mod outage;
mod private;
mod pull;
mod push;
mod registries;
mod service;
mod units;
mod wiring;
