//! `registry-agent`: an image registry on every host.
//!
//! # The map
//!
//! **Serve** reads from top to bottom:
//!
//! - [`registry`] is the HTTP edge. It parses requests into the types of [`oci`] and answers in the
//!   words of the distribution specification.
//! - [`mirror`] decides: from the store, or from an upstream, once for everybody; fresh, or stale
//!   because nobody can be asked.
//! - [`hosted`] is what is pushed here, and never asked of an upstream.
//! - [`store`] keeps blobs, manifests and tags in distribution's layout; [`upstream`] asks other
//!   registries.
//!
//! **Host** ([`host`]: facts -> plan -> apply -> verify) wires this host's container engines to the
//! mirror; [`systemd`] is how it and the agent speak with the service manager.
//!
//! **Fleet** ([`fleet`]: observe -> plan -> apply) keeps this host's place in a fleet of mirrors.
//!
//! Around it: [`config`] makes [`config::Settings`] of files and variables; [`agent`] puts a running
//! agent together; [`health`] is the one value that says how it is; [`admin`], [`status`],
//! [`metrics`] and [`log`] tell people; [`tls`] reads certificates; [`warm`] fetches images
//! ahead of time; [`resolve`] finds hosts by their names; [`cli`] is the command line;
//! [`descriptors`] shares out what the system allows; [`failpoint`] kills a debug build where a test
//! says so.

pub mod admin;
pub mod agent;
pub mod cli;
pub mod config;
pub mod descriptors;
pub mod failpoint;
pub mod fleet;
pub mod health;
pub mod host;
pub mod hosted;
pub mod log;
pub mod metrics;
pub mod mirror;
pub mod oci;
pub mod registry;
pub mod resolve;
pub mod status;
pub mod store;
pub mod systemd;
pub mod tls;
pub mod upstream;
pub mod warm;
