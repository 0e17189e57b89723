//! What goes when the cache is full: what was not used for longest, between two watermarks.
//!
//! A blob is as recently used as the last of itself and the manifests that refer to it, so that an
//! image whose manifest is all that its clients still ask for stays whole. What goes of an image is
//! filled again when somebody wants it, so that no order of removal breaks one; blobs go before
//! manifests as old as they are, since those cost little and answer for a tag.

use std::time::{Duration, Instant, SystemTime};

use indicatif::DecimalBytes;
use tokio::sync::Mutex;

use super::Mirror;
use crate::config::CacheLimit;
use crate::store::collect::Collected;
use crate::store::filesystem::Disk;
use crate::store::{Removed, StoreError, Stored};

/// One eviction at a time, and what became of the last.
#[derive(Default)]
pub(super) struct Evictions(Mutex<Last>);

#[derive(Default)]
struct Last {
    /// When it ended, having freed something.
    freed: Option<Instant>,
    /// Whether it could not do what the limit asks for.
    fell_short: bool,
    /// How many bytes were stored when all but what was pushed here was gone: until there are more,
    /// there is nothing to look for.
    all_pushed: Option<u64>,
}

impl Mirror {
    /// How much may be stored.
    pub fn cache_limit(&self) -> CacheLimit {
        self.live().cache_limit
    }

    /// Looks after the cache for ever, every `interval`, which is asked anew each time.
    pub async fn look_after_cache(self, interval: impl Fn() -> Duration) {
        loop {
            // Also within the limit: it costs a look at the downloads that there are.
            if let Err(error) = self.0.store.remove_stale_fills().await {
                tracing::warn!(%error, "downloads that were given up could not be removed: {error}");
            }
            self.keep_within_limit().await;
            tokio::time::sleep(interval()).await;
        }
    }

    /// Removes what nobody needs, or only says what that is; nothing is evicted or counted
    /// meanwhile. It goes on when who has asked for it leaves.
    pub async fn collect(&self, dry_run: bool) -> Result<Collected, StoreError> {
        let mirror = self.clone();
        let collecting = tokio::spawn(async move {
            let mut last = mirror.0.evictions.0.lock().await;
            last.all_pushed = None;
            let collected = mirror.0.store.collect(dry_run).await;
            mirror.0.metrics.set_cache_bytes(mirror.0.store.bytes());
            collected
        });
        match collecting.await {
            Ok(collected) => collected,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The agent ends, and nobody waits any longer.
                Err(error) => Err(StoreError::Io {
                    action: "collect from",
                    path: self.0.store.root().to_owned(),
                    source: std::io::Error::other(error),
                }),
            },
        }
    }

    /// Evicts if the cache is over its limit.
    pub(super) async fn keep_within_limit(&self) {
        // One that is under way does what there is to do.
        let Ok(mut last) = self.0.evictions.0.try_lock() else {
            return;
        };
        if let Err(error) = self.evict_to_limit(&mut last).await {
            tracing::warn!(%error, "the cache could not be kept within its limit: {error}");
        }
        self.0.metrics.set_cache_bytes(self.0.store.bytes());
    }

    async fn evict_to_limit(&self, last: &mut Last) -> Result<(), StoreError> {
        let store = &self.0.store;
        let limit = self.cache_limit();
        let over = || async {
            let disk = store.disk().await?;
            if !may_be_over(limit, disk) {
                return Ok(0);
            }
            if store.bytes().is_none() {
                store.count().await?;
            }
            let cached = store.bytes().unwrap_or(0) + store.fill_bytes().await?;
            Ok::<u64, StoreError>(excess(limit, disk, cached))
        };
        if over().await? == 0 {
            last.fell_short = false;
            last.all_pushed = None;
            return Ok(());
        }
        if last.all_pushed.is_some() && store.bytes() <= last.all_pushed {
            return Ok(());
        }
        store.remove_stale().await?;
        let need = over().await?;
        if need == 0 {
            return Ok(());
        }
        let listed = store.inventory().await?;
        let others = listed.iter().filter(|stored| !stored.pushed);
        let others: u64 = others.map(|stored| stored.size).sum();
        let removed = self.evict(listed, need, last).await?;
        last.all_pushed = store.bytes().filter(|_| removed.bytes >= others);
        let short = removed.bytes < need;
        if short && !last.fell_short {
            tracing::warn!(
                %limit, missing = %DecimalBytes(need - removed.bytes),
                "all that could be evicted does not bring the cache below storage.cache.limit: \
                 all else is being read, or was pushed here"
            );
        }
        last.fell_short = short;
        Ok(())
    }

    /// Writes about `bytes`, and once more after an eviction where the disk is too full for them.
    pub async fn with_room<T, F>(&self, bytes: u64, write: impl Fn() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        match write().await {
            Err(error) if error.is_full() && self.make_room(bytes).await => write().await,
            written => written,
        }
    }

    /// Evicts because the disk has refused `bytes` more, whatever the limit; says whether that
    /// freed anything.
    pub async fn make_room(&self, bytes: u64) -> bool {
        let came = Instant::now();
        let mut last = self.0.evictions.0.lock().await;
        // Somebody else has made room while we waited.
        if last.freed.is_some_and(|freed| freed > came) {
            return true;
        }
        let freed = self.evict_for(bytes, &mut last).await;
        self.0.metrics.set_cache_bytes(self.0.store.bytes());
        freed.unwrap_or_else(|error| {
            tracing::warn!(%error, "no room could be made on a full disk: {error}");
            false
        })
    }

    async fn evict_for(&self, bytes: u64, last: &mut Last) -> Result<bool, StoreError> {
        let store = &self.0.store;
        if store.remove_stale().await? > 0 {
            return Ok(true);
        }
        let available = store.disk().await?.available;
        let listed = store.inventory().await?;
        let sizes = |held| {
            let such = listed
                .iter()
                .filter(move |it| (it.held || it.pushed) == held);
            such.map(|stored| stored.size).sum::<u64>()
        };
        let evictable = sizes(false);
        // Nothing is gained by losing all for what would not fit even then.
        if evictable + available < bytes {
            return Ok(false);
        }
        // Not for every piece anew: each time lists the whole store.
        let tenth = (evictable + sizes(true)) / 10;
        let need = bytes.saturating_sub(available).max(tenth).max(1);
        let removed = self.evict(listed, need, last).await?;
        Ok(removed.bytes > 0)
    }

    async fn evict(
        &self,
        listed: Vec<Stored>,
        need: u64,
        last: &mut Last,
    ) -> Result<Removed, StoreError> {
        let victims = victims(&listed, need);
        let removed = self.0.store.remove(listed, victims).await?;
        if removed.bytes > 0 {
            last.freed = Some(Instant::now());
            self.0.metrics.evicted_blobs.inc_by(removed.count);
            self.0.metrics.evicted_bytes.inc_by(removed.bytes);
            tracing::info!(
                blobs = removed.count,
                bytes = removed.bytes,
                "what was not used for longest was evicted"
            );
        }
        Ok(removed)
    }
}

/// Whether the cache can be over its limit, as far as the disk alone tells: to know how much is
/// cached takes a scan.
fn may_be_over(limit: CacheLimit, disk: Disk) -> bool {
    match limit {
        CacheLimit::Bytes(_) => true,
        // As if all that is used were cached: others' bytes make the cache's share smaller, never
        // its excess larger.
        CacheLimit::Share(percent) => disk.used > share(percent, disk.used + disk.available),
    }
}

/// How many bytes must go: none up to the limit, and above it all down to nine tenths of it, so
/// that not every blob that comes is paid for by a search for one that goes.
fn excess(limit: CacheLimit, disk: Disk, cached: u64) -> u64 {
    let high = match limit {
        CacheLimit::Bytes(limit) => limit,
        // What others use is not the cache's to have, nor to make up for: of a disk that they fill
        // it would lose all that it has, and they would fill that as well. As `df` has it, what is
        // kept for root is none of the disk.
        CacheLimit::Share(percent) => share(percent, cached.saturating_add(disk.available)),
    };
    if cached <= high {
        return 0;
    }
    cached - (high - high / 10)
}

fn share(percent: u8, of: u64) -> u64 {
    let share = u128::from(of) * u128::from(percent) / 100;
    u64::try_from(share).unwrap_or(u64::MAX)
}

/// Which to remove, by their places in the list, so that at least `need` bytes go: those that were
/// not used for longest, and none that somebody holds.
fn victims(listed: &[Stored], need: u64) -> Vec<usize> {
    let used = last_uses(listed);
    let mut order: Vec<usize> = (0..listed.len()).collect();
    order.retain(|&at| !listed[at].held && !listed[at].pushed);
    order.sort_unstable_by_key(|&at| (used[at], listed[at].refers_to.is_some(), at));
    let mut freed = 0;
    let enough = |at: &usize| {
        let before = freed;
        freed += listed[*at].size;
        before < need
    };
    order.into_iter().take_while(enough).collect()
}

/// When each was last used: itself, or through what refers to it.
fn last_uses(listed: &[Stored]) -> Vec<SystemTime> {
    let mut order: Vec<usize> = (0..listed.len()).collect();
    order.sort_unstable_by_key(|&at| std::cmp::Reverse(listed[at].used));
    let mut uses = vec![None; listed.len()];
    let mut pending = Vec::new();
    // From the latest on, so that the first time to reach something is its last use.
    for from in order {
        let when = listed[from].used;
        pending.push(from);
        while let Some(at) = pending.pop() {
            if uses[at].is_none() {
                uses[at] = Some(when);
                let references = listed[at].refers_to.iter().flatten();
                pending.extend(references.map(|&reference| reference as usize));
            }
        }
    }
    let of = |(used, stored): (Option<SystemTime>, &Stored)| used.unwrap_or(stored.used);
    uses.into_iter().zip(listed).map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::{Algorithm, Digest};

    /// A blob of 10 bytes that was used at this second.
    fn blob(used: u64) -> Stored {
        Stored {
            digest: Digest::of(Algorithm::Sha256, b"any"),
            size: 10,
            used: SystemTime::UNIX_EPOCH + Duration::from_secs(used),
            held: false,
            pushed: false,
            refers_to: None,
            partial: false,
        }
    }

    fn manifest(used: u64, refers_to: &[u32]) -> Stored {
        Stored {
            refers_to: Some(refers_to.into()),
            ..blob(used)
        }
    }

    fn held(stored: Stored) -> Stored {
        Stored {
            held: true,
            ..stored
        }
    }

    fn pushed(stored: Stored) -> Stored {
        Stored {
            pushed: true,
            ..stored
        }
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first() {
        for (name, listed, need, expected) in [
            ("nothing is needed", vec![blob(1)], 0, vec![]),
            ("nothing is there", vec![], 10, vec![]),
            (
                "the oldest, and no more than needed",
                vec![blob(3), blob(1), blob(2)],
                11,
                vec![1, 2],
            ),
            (
                "all where that is not enough",
                vec![blob(2), blob(1)],
                100,
                vec![1, 0],
            ),
            (
                "what is held stays",
                vec![held(blob(1)), blob(2)],
                20,
                vec![1],
            ),
            (
                "what was pushed stays",
                vec![pushed(blob(1)), blob(2)],
                20,
                vec![1],
            ),
            (
                "a manifest that is used keeps its blobs",
                vec![manifest(5, &[1]), blob(1), blob(3)],
                10,
                vec![2],
            ),
            (
                "an index that is used keeps what it refers to",
                vec![manifest(5, &[1]), manifest(1, &[2]), blob(1), blob(3)],
                10,
                vec![3],
            ),
            (
                "a manifest that is not used keeps nothing",
                vec![manifest(1, &[1]), blob(2), blob(3)],
                20,
                vec![0, 1],
            ),
            (
                "blobs before a manifest as old as they are",
                vec![manifest(2, &[1]), blob(1)],
                20,
                vec![1, 0],
            ),
            (
                "a shared blob is as recent as the latest that refers to it",
                vec![manifest(1, &[2]), manifest(9, &[2]), blob(1), blob(2)],
                20,
                vec![0, 3],
            ),
            (
                "manifests that refer to each other",
                vec![manifest(1, &[1]), manifest(2, &[0])],
                20,
                vec![0, 1],
            ),
        ] {
            assert_eq!(victims(&listed, need), expected, "{name}");
        }
    }

    #[test]
    fn between_the_watermarks_nothing_goes_and_above_down_to_the_low_one() {
        let disk = |used, available| Disk {
            size: 1000,
            used,
            available,
        };
        for (limit, disk, cached, expected) in [
            (CacheLimit::Bytes(100), disk(999, 1), 100, 0),
            (CacheLimit::Bytes(100), disk(0, 1000), 101, 11),
            (CacheLimit::Share(80), disk(800, 200), 800, 0),
            (CacheLimit::Share(80), disk(810, 190), 810, 90),
            // 100 blocks are kept for root.
            (CacheLimit::Share(50), disk(500, 400), 500, 95),
            (CacheLimit::Share(100), disk(1000, 0), 1000, 0),
            // Others use most of the disk, then all but what is cached.
            (CacheLimit::Share(80), disk(900, 100), 400, 0),
            (CacheLimit::Share(80), disk(950, 50), 200, 0),
            (CacheLimit::Share(80), disk(960, 40), 200, 27),
            (CacheLimit::Share(80), disk(1000, 0), 200, 56),
            (CacheLimit::Share(80), disk(1000, 0), 0, 0),
        ] {
            assert_eq!(
                excess(limit, disk, cached),
                expected,
                "{limit} {disk:?} {cached}"
            );
            assert!(
                expected == 0 || may_be_over(limit, disk),
                "{limit} {disk:?}"
            );
        }
        let below = disk(799, 201);
        assert!(
            !may_be_over(CacheLimit::Share(80), below),
            "a scan for nothing"
        );
    }
}
