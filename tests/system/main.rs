//! Whole hosts: real systemd and dockerd, booted by systemd-nspawn, the agent as its unit starts
//! it, and a Docker Hub of our own. Needs root; `tests/all` prepares the machine and runs it.

mod container;
mod control;
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
