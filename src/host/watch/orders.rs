//! What the loop is told, also while it is busy.

use std::pin::pin;
use std::time::Duration;

use tokio::sync::mpsc;

/// What the loop is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The configuration is read again (SIGHUP).
    Reload,
    /// The engines are unwired, and it ends (SIGTERM, SIGINT).
    Stop,
}

/// The orders, in the sequence in which they are carried out: a stop once, and for good.
pub(super) struct Orders {
    receiver: mpsc::Receiver<Order>,
    /// How long what is under way may take to end once a stop is ordered.
    grace: Duration,
    reload: bool,
    stop: bool,
}

impl Orders {
    pub(super) fn new(receiver: mpsc::Receiver<Order>, grace: Duration) -> Self {
        Self {
            receiver,
            grace,
            reload: false,
            stop: false,
        }
    }

    /// The next order. It may be given up and asked for again.
    pub(super) async fn next(&mut self) -> Order {
        if self.stop {
            return Order::Stop;
        }
        if std::mem::take(&mut self.reload) {
            return Order::Reload;
        }
        // A closed channel is an order to stop: nobody is there to give another.
        self.receiver.recv().await.unwrap_or(Order::Stop)
    }

    /// Comes when a stop is ordered. A reload that is ordered before it waits for its turn.
    async fn stopped(&mut self) {
        while !self.stop {
            match self.receiver.recv().await {
                Some(Order::Reload) => self.reload = true,
                Some(Order::Stop) | None => self.stop = true,
            }
        }
    }

    /// Does it, unless a stop is ordered and it does not end soon after. What is given up so is cut
    /// off as by a crash, which changes of the host are made for: the journal knows how far they
    /// are, and what takes them back is [`crate::host::apply::Apply::recover`].
    pub(super) async fn unless_stopped<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = pin!(work);
        tokio::select! {
            biased;
            done = &mut work => return Some(done),
            () = self.stopped() => {}
        }
        tokio::time::timeout(self.grace, work).await.ok()
    }

    /// The same for what only waits.
    pub(super) async fn unless_stopped_at_once(&mut self, wait: impl Future<Output = ()>) {
        tokio::select! {
            biased;
            () = self.stopped() => {}
            () = wait => {}
        }
    }
}
