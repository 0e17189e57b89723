//! Holding blobs in the middle, so that something else can happen just then.

use std::future::Future;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::harness::poll;

/// How holding ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The rest is sent.
    Released,
    /// The answer breaks off.
    Cut,
}

/// Where the bodies of blobs pass.
#[derive(Default)]
pub struct Gate {
    closed: Mutex<Option<Arc<Hold>>>,
}

/// One time that the gate was closed.
struct Hold {
    after: usize,
    reached: AtomicBool,
    end: watch::Sender<Option<End>>,
}

impl Gate {
    /// Holds bodies that begin from now on after so many bytes.
    pub fn close(&self, after: usize) {
        let hold = Hold {
            after,
            reached: AtomicBool::new(false),
            end: watch::Sender::new(None),
        };
        let before = self.lock().replace(Arc::new(hold));
        assert!(before.is_none(), "blobs are held already");
    }

    /// Waits until a body is held.
    #[track_caller]
    pub fn wait_until_reached(&self, deadline: Duration) {
        let hold = self.lock().clone().expect("blobs are not held");
        poll::until("a blob is held in the middle", deadline, || {
            let reached = hold.reached.load(Ordering::Acquire);
            reached.then_some(()).ok_or("no blob was asked for")
        });
    }

    /// Ends the holding, for those that are held and for those to come.
    pub fn open(&self, end: End) {
        let hold = self.lock().take().expect("blobs are not held");
        hold.end.send_replace(Some(end));
    }

    /// For a body of `length` bytes that begins: where it has to wait, and for what.
    pub fn stop(&self, length: usize) -> Option<(usize, impl Future<Output = End> + use<>)> {
        let hold = self.lock().clone().filter(|hold| hold.after < length)?;
        let (after, mut end) = (hold.after, hold.end.subscribe());
        let wait = async move {
            hold.reached.store(true, Ordering::Release);
            let end = end.wait_for(Option::is_some).await;
            // The sender is in `hold`, which is here.
            end.ok().and_then(|end| *end).unwrap_or(End::Cut)
        };
        Some((after, wait))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<Hold>>> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
