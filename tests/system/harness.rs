//! What the system tests stand on.
//!
//! ```text
//! let network = Network::new();                              a bridge in its own namespace
//! let hub = Hub::start(&network);                            Docker Hub, with its own CA
//! let host = Host::new(&network, "one", 11);                 a Debian root, powered off
//! hub.introduce_to(&host);                                   names and CA
//! host.write("/etc/docker/daemon.json", "{}");               files, before or after the boot
//! host.boot();
//! host.run(&["docker", "pull", "busybox"]);                  panics with the output if it fails
//! ```
//!
//! Everything is named after this process, is taken down on drop, and what a killed run left is
//! removed by the next one. A panic prints each host's journal and the Hub's requests.

pub mod agent;
pub mod authority;
pub mod command;
pub mod distribution;
pub mod docker;
pub mod engines;
pub mod host;
pub mod hub;
pub mod image;
pub mod metadata;
pub mod network;
pub mod package;
pub mod poll;
pub mod scratch;
pub mod tap;

pub use agent::Agent;
pub use docker::Docker;
pub use host::Host;
pub use hub::Hub;
pub use image::Image;
pub use network::Network;
pub use package::Packages;
