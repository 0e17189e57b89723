//! `registry-agent`: an image registry on every host.

pub mod cli;
pub mod config;
pub mod oci;
