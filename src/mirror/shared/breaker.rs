//! How long a bucket that fails is left alone.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// After the first failure; each further one in a row doubles it.
const FIRST: Duration = Duration::from_secs(1);
/// The longest.
const LONGEST: Duration = Duration::from_secs(30);

/// Whether a bucket is worth being asked: one that failed is left alone for a while, then asked by
/// one request, and by all of them once that was answered.
#[derive(Default)]
pub(super) struct Breaker(Mutex<State>);

#[derive(Default)]
struct State {
    failures: u32,
    until: Option<Instant>,
}

impl Breaker {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it may be asked now. Who is told so after a failure is the only one for `trial`.
    pub(super) fn may_ask(&self, trial: Duration) -> bool {
        let mut state = self.state();
        let now = Instant::now();
        match state.until {
            None => true,
            Some(until) if now < until => false,
            Some(_) => {
                state.until = Some(now + trial);
                true
            }
        }
    }

    /// It has answered.
    pub(super) fn answered(&self) {
        *self.state() = State::default();
    }

    /// It has not, or only that it can't; says for how long it is left alone.
    pub(super) fn failed(&self) -> Duration {
        let mut state = self.state();
        let pause = (FIRST * 2u32.pow(state.failures.min(6))).min(LONGEST);
        // Not all mirrors at the same moment.
        let pause = pause.mul_f32(0.75 + fastrand::f32() / 2.0);
        state.failures += 1;
        state.until = Some(Instant::now() + pause);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_that_fails_is_left_alone_and_then_tried_by_one() {
        let breaker = Breaker::default();
        let trial = Duration::from_mins(1);
        assert!(breaker.may_ask(trial) && breaker.may_ask(trial));
        let first = breaker.failed();
        assert!(!breaker.may_ask(trial), "at once");
        breaker.state().until = Some(Instant::now());
        assert!(breaker.may_ask(trial));
        assert!(!breaker.may_ask(trial), "a second one while it is tried");
        for _ in 0..40 {
            let pause = breaker.failed();
            assert!(pause <= 2 * LONGEST && pause >= first / 2, "{pause:?}");
        }
        breaker.answered();
        assert!(breaker.may_ask(trial) && breaker.may_ask(trial));
    }
}
