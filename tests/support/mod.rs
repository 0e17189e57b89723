//! What the loopback tests share: an upstream registry that fails on command, the agent itself as
//! a process, a client that sees how an answer ended, and images made from seeds.
//!
//! Everything blocks and runs in plain threads: a test reads as the order in which things happen.
#![allow(dead_code, reason = "every test target uses a part of it")]

pub mod agent;
pub mod client;
pub mod cloud_tools;
pub mod disk;
pub mod image;
pub mod responder;
pub mod upstream;

use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long anything may take before a test calls it lost. Long, since it is only ever waited out
/// by a test that fails.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `condition` holds, and fails the test with `what` if it doesn't within `deadline`.
/// The one place that polls.
#[track_caller]
#[expect(
    clippy::disallowed_methods,
    reason = "the one place that polls, in a thread of its own"
)]
pub fn eventually(deadline: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < deadline,
            "not within {deadline:?}: {what}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A loopback address of its own for every server, so that a port can be chosen, left and taken
/// again without another test, or the source port of a connection, getting in between.
pub fn own_address() -> Ipv4Addr {
    static NEXT: AtomicU32 = AtomicU32::new(2);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    assert!(
        number < 511,
        "more servers than a test process has addresses"
    );
    let process = std::process::id() % (1 << 15);
    Ipv4Addr::from_bits(127 << 24 | process << 9 | number)
}

/// Writes a file of a test's own, replacing what was there.
#[expect(
    clippy::disallowed_methods,
    reason = "a test's own file: nobody reads it half-written"
)]
pub fn write_file(path: &Path, content: &[u8]) {
    let written = std::fs::File::create(path).and_then(|mut file| file.write_all(content));
    written.unwrap_or_else(|error| panic!("writing {}: {error}", path.display()));
}
