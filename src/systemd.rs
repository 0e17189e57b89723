//! How the service manager is spoken with: org.freedesktop.systemd1(5) over D-Bus, `sd_notify(3)` and
//! `sd_listen_fds(3)`.
//!
//! - [`manager`] is the connection: what a unit is, and what asks for no job.
//! - [`job`] starts, stops, restarts and reloads, and knows whether it came to pass.
//! - [`listen`] takes the sockets that are passed, [`notify`] tells the state and feeds the watchdog.
//! - [`stray`] keeps a process from ending of a signal that nobody means.

pub mod job;
pub mod listen;
pub mod manager;
pub mod notify;
pub mod stray;

pub use job::{JobError, JobFailure, JobVerb};
pub use manager::{Manager, ManagerError};
