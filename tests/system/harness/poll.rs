//! Waiting for something that sends no event.

use std::fmt::Debug;
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_millis(50);

/// Looks until `look` says `Ok`, or panics with what it said last once `deadline` has passed.
#[track_caller]
pub fn until<T, E: Debug>(what: &str, deadline: Duration, look: impl FnMut() -> Result<T, E>) -> T {
    match within(deadline, look) {
        Ok(found) => found,
        Err(last) => panic!("{what}: not within {deadline:?}; last seen: {last:?}"),
    }
}

/// Looks until `look` says `Ok`, or returns what it said last once `deadline` has passed.
pub fn within<T, E>(deadline: Duration, mut look: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    let end = Instant::now() + deadline;
    loop {
        match look() {
            Err(_) if Instant::now() < end => pause(),
            last => return last,
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the one pause between two looks of a test; no runtime runs on a test's thread"
)]
fn pause() {
    std::thread::sleep(INTERVAL);
}
