//! The time that the control plane lives in.

use std::time::{Duration, Instant, SystemTime};

/// A clock that a test turns. It stands still between turns, or goes on by itself as well.
#[derive(Debug)]
pub struct Clock {
    /// What the wall clock said at its zero: credentials and dates are relative to real ones.
    pub origin: SystemTime,
    /// Since when it goes by itself.
    runs: Option<Instant>,
    turned: Duration,
}

impl Clock {
    pub fn new(runs: bool) -> Self {
        Self {
            origin: SystemTime::now(),
            runs: runs.then(Instant::now),
            turned: Duration::ZERO,
        }
    }

    /// Since its zero.
    pub fn now(&self) -> Duration {
        self.turned + self.runs.map_or(Duration::ZERO, |since| since.elapsed())
    }

    pub fn turn(&mut self, by: Duration) {
        self.turned += by;
    }
}
