//! Time since this host booted.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// `CLOCK_BOOTTIME`: it goes on in a suspended host, and no correction of the wall clock moves it.
pub(super) fn now() -> Duration {
    // It is there since Linux 2.6.39, and takes no argument that could be wrong.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}
