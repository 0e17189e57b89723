//! How the service manager is spoken with: org.freedesktop.systemd1(5) over D-Bus, sd_notify(3) and
//! sd_listen_fds(3).

pub mod listen;
pub mod notify;
