//! A client that pulls without a break.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::harness::{Host, Image, poll};

/// How long one pull may take before it has failed: a mirror that hangs is waited for.
const PULL: Duration = Duration::from_mins(5);

/// A published image.
pub struct Published {
    /// As `docker pull` names it.
    pub name: String,
    /// What it consists of.
    pub image: Image,
}

/// Pulls that were made, and those that go on.
pub struct Pulls {
    client: Arc<Host>,
    images: Arc<Mutex<Vec<Arc<Published>>>>,
    over: Arc<AtomicBool>,
    made: Arc<Mutex<Vec<Pull>>>,
    thread: Option<JoinHandle<()>>,
}

struct Pull {
    took: Duration,
    failure: Option<String>,
}

impl Pulls {
    /// Pulls these images on a host that is up, one after the other and again and again.
    pub fn begin(client: Arc<Host>, images: Vec<Published>) -> Self {
        let images = images.into_iter().map(Arc::new).collect();
        let images: Arc<Mutex<Vec<_>>> = Arc::new(Mutex::new(images));
        let over = Arc::new(AtomicBool::new(false));
        let made: Arc<Mutex<Vec<Pull>>> = Arc::default();
        let (end, list, host) = (Arc::clone(&over), Arc::clone(&made), Arc::clone(&client));
        let pulled = Arc::clone(&images);
        let thread = thread::spawn(move || {
            for number in 0.. {
                if end.load(Ordering::Relaxed) {
                    return;
                }
                let image = {
                    let images = lock(&pulled);
                    Arc::clone(&images[number % images.len()])
                };
                let began = Instant::now();
                let failure = pull(&host, &image).err();
                let took = began.elapsed();
                lock(&list).push(Pull { took, failure });
            }
        });
        Self {
            client,
            images,
            over,
            made,
            thread: Some(thread),
        }
    }

    /// Pulls this one as well from now on.
    pub fn add(&self, image: Published) {
        lock(&self.images).push(Arc::new(image));
    }

    /// The host that pulls.
    pub fn client(&self) -> &Host {
        &self.client
    }

    /// How many were made so far.
    pub fn count(&self) -> usize {
        lock(&self.made).len()
    }

    /// Waits until so many more were made, the one that goes on now not among them.
    #[track_caller]
    pub fn wait_for_more(&self, more: usize) {
        let (enough, deadline) = (self.count() + 1 + more, PULL * 3);
        poll::until("pulls go on", deadline, || {
            self.assert_none_failed();
            let count = self.count();
            if count >= enough { Ok(()) } else { Err(count) }
        });
    }

    /// Panics with what a pull has failed with, if one has.
    #[track_caller]
    pub fn assert_none_failed(&self) {
        let made = lock(&self.made);
        let failed: Vec<&str> = made.iter().filter_map(|it| it.failure.as_deref()).collect();
        assert!(
            failed.is_empty(),
            "{} of {} pulls failed:\n{}",
            failed.len(),
            made.len(),
            failed.join("\n")
        );
    }

    /// How many were made since there were so many, and how long the slowest of them took.
    pub fn since(&self, count: usize) -> (usize, Duration) {
        let made = lock(&self.made);
        let since = &made[count..];
        let slowest = since.iter().map(|pull| pull.took).max();
        (since.len(), slowest.unwrap_or_default())
    }
}

impl Drop for Pulls {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// Pulls it, makes sure of what was pulled, and forgets it.
fn pull(client: &Host, published: &Published) -> Result<(), String> {
    let name = published.name.as_str();
    let pulled = client.try_run_within(PULL, &["docker", "pull", name]);
    if !pulled.succeeded() {
        return Err(pulled.to_string());
    }
    let id = client.run(&["docker", "image", "inspect", "--format={{.Id}}", name]);
    let blobs = published.image.blobs.iter();
    let digests: BTreeSet<&str> = blobs.map(|blob| blob.digest.as_str()).collect();
    if !digests.contains(id.trim()) {
        return Err(format!("{name} is {id}, which is none of {digests:?}"));
    }
    client.run(&["docker", "rmi", name]);
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
