//! Whose turn it is on a connection: it ends when its client has let its turn pass for too long.
//!
//! hyper has deadlines for the head of an HTTP/1 request alone. A client can as well send nothing
//! at all, hold an HTTP/2 connection by answering pings, or let its answers wait there by giving no
//! window, and so keep a place for as long as it likes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus_client::metrics::gauge::Gauge;
use tokio::time::Instant;

/// What happens on one connection.
#[derive(Debug, Clone)]
pub(super) struct Activity {
    state: Arc<Mutex<State>>,
    /// Answers under way, on all connections.
    running: Gauge,
}

#[derive(Debug)]
struct State {
    /// Answers that wait for us, not for the client.
    ours: usize,
    /// When it last became the client's turn.
    since: Instant,
}

impl Activity {
    pub(super) fn new(running: Gauge) -> Self {
        let state = State {
            ours: 0,
            since: Instant::now(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            running,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request has come: it is our turn.
    pub(super) fn turn(&self) -> Turn {
        self.state().ours += 1;
        self.running.inc();
        Turn {
            activity: self.clone(),
            ours: true,
        }
    }

    /// Waits until it has been the client's turn for `limit`, without a break.
    pub(super) async fn passed(&self, limit: Duration) {
        loop {
            let (ours, since) = {
                let state = self.state();
                (state.ours, state.since)
            };
            // Looked at again only then: what happens meanwhile costs no wakeup.
            let end = if ours > 0 { Instant::now() } else { since } + limit;
            if end <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(end).await;
        }
    }
}

/// Whose turn it is in one answer. Dropped, it is the client's to ask for another.
#[derive(Debug)]
pub(super) struct Turn {
    activity: Activity,
    ours: bool,
}

impl Turn {
    /// We have to find or to read something before the answer goes on.
    pub(super) fn ours(&mut self) {
        if !self.ours {
            self.activity.state().ours += 1;
            self.ours = true;
        }
    }

    /// What there is of the answer is the client's to read.
    pub(super) fn clients(&mut self) {
        let mut state = self.activity.state();
        state.since = Instant::now();
        if self.ours {
            state.ours -= 1;
            self.ours = false;
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.clients();
        self.activity.running.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(20);

    /// Whether the client's time is over within a few limits.
    async fn is_over(activity: &Activity) -> bool {
        tokio::time::timeout(LIMIT * 5, activity.passed(LIMIT))
            .await
            .is_ok()
    }

    #[tokio::test]
    async fn only_the_clients_own_time_counts() {
        let running = Gauge::default();
        let activity = Activity::new(running.clone());
        assert!(is_over(&activity).await, "it sends nothing");
        let mut turn = activity.turn();
        assert!(!is_over(&activity).await, "we are still looking");
        turn.clients();
        assert!(is_over(&activity).await, "it reads nothing");
        turn.ours();
        assert!(!is_over(&activity).await, "more is on its way to us");
        assert_eq!(running.get(), 1);
        drop(turn);
        assert_eq!(running.get(), 0);
        assert!(is_over(&activity).await, "it asks for nothing more");
    }
}
