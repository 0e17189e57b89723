//! One piece of work, many who wait for it.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

/// Work under way, by what it is for. `S` is the state that those who wait can watch.
pub(super) struct Flights<K, S>(Arc<Mutex<HashMap<K, Flight<S>>>>);

impl<K, S> Default for Flights<K, S> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

/// A piece of work under way. Its sender is dropped when the work has ended, also by a panic.
pub(super) struct Flight<S> {
    /// When it began.
    pub(super) started: Instant,
    /// Its state; `None` before there is one.
    pub(super) state: watch::Receiver<Option<S>>,
}

impl<S> Clone for Flight<S> {
    fn clone(&self) -> Self {
        Self {
            started: self.started,
            state: self.state.clone(),
        }
    }
}

impl<S: Clone> Flight<S> {
    /// The last state of the work, once that has ended; `None` if it ended without one.
    pub(super) async fn landed(mut self) -> Option<S> {
        while self.state.changed().await.is_ok() {}
        self.state.borrow().clone()
    }
}

impl<K, S> Flights<K, S>
where
    K: Clone + Eq + Hash + Send + 'static,
    S: Send + Sync + 'static,
{
    /// Lets nobody join what is under way, which goes on for those who wait for it.
    pub(super) fn close(&self) {
        let mut flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        flights.clear();
    }

    /// Lets nobody join the work for `key`, which goes on for those who wait for it.
    pub(super) fn leave(&self, key: &K) {
        let mut flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        flights.remove(key);
    }

    /// The work for `key`, where it is under way.
    pub(super) fn get(&self, key: &K) -> Option<Flight<S>> {
        let flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        flights.get(key).cloned()
    }

    /// Joins the work for `key`, beginning it where it is not under way. It runs as a task of its
    /// own, so that it ends even when nobody waits for it any longer. What it gives in the end is
    /// its last state, published when the next to come begins anew: nobody is given the outcome of
    /// work that had ended before they asked.
    pub(super) fn join<F>(
        &self,
        key: K,
        work: impl FnOnce(watch::Sender<Option<S>>) -> F,
    ) -> Flight<S>
    where
        F: Future<Output = Option<S>> + Send + 'static,
    {
        self.join_within(Duration::MAX, key, work)
    }

    /// Joins the work for `key` as [`Self::join`] does, unless that has been under way for longer
    /// than `patience`: then it begins anew beside it, which goes on for those who wait for it.
    pub(super) fn join_within<F>(
        &self,
        patience: Duration,
        key: K,
        work: impl FnOnce(watch::Sender<Option<S>>) -> F,
    ) -> Flight<S>
    where
        F: Future<Output = Option<S>> + Send + 'static,
    {
        let mut flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = flights.get(&key)
            && flight.started.elapsed() <= patience
        {
            return flight.clone();
        }
        let (sender, state) = watch::channel(None);
        let flight = Flight {
            started: Instant::now(),
            state,
        };
        flights.insert(key.clone(), flight.clone());
        let landing = Landing {
            key,
            state: flight.state.clone(),
            flights: Arc::clone(&self.0),
        };
        let work = work(sender.clone());
        tokio::spawn(async move {
            let last = work.await;
            // Also dropped when the work panics.
            drop(landing);
            if last.is_some() {
                sender.send_replace(last);
            }
        });
        flight
    }
}

/// Takes a flight off the table when its work has ended, however it ended.
struct Landing<K: Eq + Hash, S> {
    key: K,
    state: watch::Receiver<Option<S>>,
    flights: Arc<Mutex<HashMap<K, Flight<S>>>>,
}

impl<K: Eq + Hash, S> Drop for Landing<K, S> {
    fn drop(&mut self) {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        // One that took too long may have another in its place.
        if let Some(flight) = flights.get(&self.key)
            && flight.state.same_channel(&self.state)
        {
            flights.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn many_wait_for_one_piece_of_work_and_the_next_begins_anew() {
        let flights: Flights<&str, usize> = Flights::default();
        let begun = Arc::new(AtomicUsize::new(0));
        for round in 1..=2 {
            let (open, gate) = oneshot::channel::<()>();
            let mut gate = Some(gate);
            let mut joined = Vec::new();
            for _ in 0..16 {
                let begun = Arc::clone(&begun);
                let gate = &mut gate;
                joined.push(flights.join("key", |sender| {
                    let gate = gate.take();
                    async move {
                        let number = begun.fetch_add(1, Ordering::Relaxed) + 1;
                        gate.unwrap().await.unwrap();
                        drop(sender);
                        Some(number)
                    }
                }));
            }
            open.send(()).unwrap();
            for flight in joined {
                assert_eq!(flight.landed().await, Some(round));
            }
            assert!(flights.0.lock().unwrap().is_empty(), "before its last word");
        }
    }

    #[tokio::test]
    async fn work_that_takes_too_long_is_begun_anew_beside_it() {
        let flights: Flights<&str, u8> = Flights::default();
        let begin = |patience, number| {
            let (open, gate) = oneshot::channel::<()>();
            let flight = flights.join_within(patience, "key", |_sender| async move {
                gate.await.unwrap();
                Some(number)
            });
            (open, flight)
        };
        let (open_first, first) = begin(Duration::ZERO, 1);
        let (open_second, second) = begin(Duration::ZERO, 2);
        open_first.send(()).unwrap();
        assert_eq!(first.landed().await, Some(1));
        // The first has not taken the second off the table.
        let (_, third) = begin(Duration::MAX, 3);
        open_second.send(()).unwrap();
        assert_eq!(second.landed().await, Some(2));
        assert_eq!(third.landed().await, Some(2));
        assert!(flights.0.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn work_goes_on_when_nobody_waits() {
        let flights: Flights<u8, ()> = Flights::default();
        let (done, finished) = oneshot::channel();
        drop(flights.join(0, |sender| async move {
            tokio::task::yield_now().await;
            done.send(()).unwrap();
            drop(sender);
            Some(())
        }));
        finished.await.unwrap();
    }

    #[tokio::test]
    async fn work_that_panics_lets_everybody_go_and_the_next_begins_anew() {
        let flights: Flights<u8, u8> = Flights::default();
        let flight = flights.join(0, |_sender| async { panic!("on purpose") });
        assert_eq!(flight.landed().await, None);
        while !flights.0.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        let flight = flights.join(0, |_sender| async { Some(1) });
        assert_eq!(flight.landed().await, Some(1));
    }
}
